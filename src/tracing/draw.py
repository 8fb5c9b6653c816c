"""Owns `Drawing`, a graph as a picture, and the table of a graph in a notebook.

A picture is SVG where Graphviz' `dot` is installed, else Mermaid text, which GitHub and notebooks
draw themselves. Fills are light with dark letters, so that both can be read on any background.
"""

from __future__ import annotations

import dataclasses
import html
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import DrawError
from .node import CALL, MODULE, PARAMETER, READ, WRITE, Node
from .operations import (
    AGAIN,
    ELEMENT,
    FIELD,
    FIRST_ARGUMENT,
    GETITEM,
    ITEM,
    OPERATORS,
    PUT,
    SELECT,
    SETITEM,
    TAKE,
    Operation,
)

#: Fill by kind of node, and the shape of its box in DOT and in Mermaid.
_STYLES = {
    READ: ("#cfe3fa", "box", "[{}]"),
    CALL: ("#ececec", "ellipse", "({})"),
    MODULE: ("#e5d6f5", "box3d", "[[{}]]"),
    PARAMETER: ("#d3eed3", "cylinder", "[({})]"),
    WRITE: ("#fbd5cf", "box", "[{}]"),
}
_OTHER = ("#fdf1c7", "box", "[{}]")
#: Letters of a label, and rows of a table.
_WIDTH = 60
_ROWS = 200
_SUFFIXES = (".svg", ".png", ".dot", ".mmd")


@dataclasses.dataclass(frozen=True, slots=True)
class Shown:
    """What is drawn of one node.

    Attributes:
        text: what it does.
        location: the user's file and line.
        alive: a save or a write depends on it.
        arguments: indices of the nodes that it uses.
    """

    index: int
    kind: str
    text: str
    invoke: int
    location: str
    saved: bool
    alive: bool
    arguments: tuple[int, ...]


_SIGNS = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "truediv": "/",
    "floordiv": "//",
    "mod": "%",
    "pow": "**",
    "matmul": "@",
    "and": "&",
    "or": "|",
    "xor": "^",
    "lshift": "<<",
    "rshift": ">>",
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
}
_REFLECTED = {f"r{name}" for name in _SIGNS}
_SIGNS_OF = {
    id(operation): sign
    for name, sign in _SIGNS.items()
    for prefix in ("", "r", "i")
    if (operation := OPERATORS.get(f"__{prefix}{name}__")) is not None
}


def written(node: Node) -> str | None:
    """An operation of the block as Python writes it, for those that have a sign of their own."""
    target, args = node.target, node.args
    if node.kind != CALL:
        return None
    if target is SELECT:
        guard, wanted, new, old = args
        return f"{new!r} {'if' if wanted else 'unless'} {guard!r} else {old!r}"
    if target is PUT or target is AGAIN:
        view, inner = args[2], args[3]
        place = _part(view, inner) or f" ({view.name})"
        return f"{args[0]!r} with {place} = {args[1]!r}" if target is PUT else f"{args[0]!r}{place}"
    if target is SETITEM:
        return f"{args[0]!r}{_index(args[1])} = {args[2]!r}"
    place = _part(target, args[1:])
    if place:
        return f"{args[0]!r}{place}"
    if target is FIRST_ARGUMENT:
        return f"the first argument of {args[0]!r}"
    sign = _SIGNS_OF.get(id(target))
    if sign is None or len(args) != 2:
        return None
    first, last = args[::-1] if target.name in _REFLECTED else args
    return f"{first!r} {sign} {last!r}"


_INDEXING = frozenset({GETITEM, TAKE, ITEM, ELEMENT})


def _part(view: Operation, args: tuple[Any, ...]) -> str:
    """`[0, :]` or `.name` for the views that are written so."""
    if view in _INDEXING:
        return _index(args[0])
    return f".{args[0]}" if view is FIELD else ""


def _index(key: Any) -> str:
    keys = key if type(key) is tuple and key else (key,)
    return f"[{', '.join(map(_key, keys))}]"


def _key(key: Any) -> str:
    if type(key) is not slice:
        return "..." if key is Ellipsis else repr(key)
    parts = ["" if part is None else repr(part) for part in (key.start, key.stop)]
    return ":".join(parts) + ("" if key.step is None else f":{key.step!r}")


class Drawing:
    """A graph as a picture.

    `print(drawing)` shows it as Mermaid text, `drawing.save("graph.svg")` writes it, and a notebook
    draws it. Saved nodes have a thick border and a star, nodes that nothing depends on a dashed one.
    """

    def __init__(self, nodes: list[Shown], limit: int | None = 200) -> None:
        self._hidden = 0
        half = 0 if limit is None else max(1, limit // 2)
        if limit is not None and len(nodes) > limit:
            self._hidden = len(nodes) - 2 * half
            nodes = [*nodes[:half], *nodes[-half:]]
        self._nodes = nodes
        self._known = {node.index for node in nodes}

    # ---------------------------------------------------------------- texts

    @property
    def dot(self) -> str:
        """The picture in the language of Graphviz."""
        lines = [
            "digraph graph_of_a_block {",
            '  bgcolor="transparent"; rankdir="TB";',
            '  node [fontname="sans-serif", fontsize=11, fontcolor="#1a1a1a", style="filled"];',
            '  edge [color="#888888"];',
        ]
        for invoke, nodes in self._by_invoke():
            inside = "  " if invoke < 0 else "    "
            if invoke >= 0:
                lines += [
                    f"  subgraph cluster_{invoke} {{",
                    f'    label="invoke {invoke}"; fontname="sans-serif"; '
                    'fontcolor="#888888"; color="#888888";',
                ]
            for node in nodes:
                fill, shape, _ = _STYLES.get(node.kind, _OTHER)
                style = "filled" if node.alive else "filled,dashed"
                border = ', penwidth="3"' if node.saved else ""
                lines.append(
                    f"{inside}n{node.index} [label={_quoted(_label(node))}, "
                    f"tooltip={_quoted(node.location)}, shape={shape}, "
                    f'style="{style}", fillcolor="{fill}"{border}];'
                )
            if invoke >= 0:
                lines.append("  }")
        if self._hidden:
            lines.append(
                f'  hidden [label={_quoted(self._sentence())}, shape=plaintext, style=""];'
            )
        lines += [f"  {first} -> {last};" for first, last in self._edges()]
        return "\n".join([*lines, "}"])

    @property
    def mermaid(self) -> str:
        """The picture in the language of Mermaid."""
        lines = ["flowchart TB"]
        for invoke, nodes in self._by_invoke():
            if invoke >= 0:
                lines.append(f'  subgraph invoke_{invoke}["invoke {invoke}"]')
            for node in nodes:
                box = _STYLES.get(node.kind, _OTHER)[2]
                text = box.format(f'"{_entities(_label(node))}"')
                lines.append(f"    n{node.index}{text}:::{_class(node)}")
            if invoke >= 0:
                lines.append("  end")
        if self._hidden:
            lines.append(f'  hidden["{_entities(self._sentence())}"]')
        lines += [f"  {first} --> {last}" for first, last in self._edges()]
        for name, node in {_class(node): node for node in self._nodes}.items():
            fill = _STYLES.get(node.kind, _OTHER)[0]
            border = ",stroke-width:3px" if node.saved else ""
            border += "" if node.alive else ",stroke-dasharray:4 3"
            lines.append(f"  classDef {name} fill:{fill},color:#1a1a1a,stroke:#888{border}")
        return "\n".join(lines)

    def _by_invoke(self) -> Iterator[tuple[int, list[Shown]]]:
        groups: dict[int, list[Shown]] = {}
        for node in self._nodes:
            groups.setdefault(node.invoke, []).append(node)
        yield from sorted(groups.items())

    def _edges(self) -> list[tuple[str, str]]:
        """From each argument to its user, once; those of nodes that are left out come from one box."""
        edges: dict[tuple[str, str], None] = {}
        for node in self._nodes:
            for argument in node.arguments:
                first = f"n{argument}" if argument in self._known else "hidden"
                edges[first, f"n{node.index}"] = None
        return list(edges)

    def _sentence(self) -> str:
        return f"… {self._hidden} operations are not drawn: draw(limit=None) draws all"

    # ---------------------------------------------------------------- showing and writing

    def render(self, form: str = "svg") -> bytes:
        """The picture as Graphviz draws it.

        Args:
            form: "svg" or "png".

        Raises:
            DrawError: Graphviz is not installed, or it failed.
        """
        dot = shutil.which("dot")
        if dot is None:
            raise DrawError.no_graphviz(form)
        done = subprocess.run([dot, f"-T{form}"], input=self.dot.encode(), capture_output=True)
        if done.returncode:
            raise DrawError.failed(done.stderr.decode(errors="replace"))
        return done.stdout

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture. The suffix decides: .svg and .png (by Graphviz), .dot, .mmd.

        Raises:
            DrawError: another suffix, or Graphviz is needed and missing.
        """
        file = Path(path)
        if file.suffix not in _SUFFIXES:
            raise DrawError.suffix(str(path), _SUFFIXES)
        if file.suffix in (".dot", ".mmd"):
            text = self.dot if file.suffix == ".dot" else self.mermaid
            file.write_text(text + "\n", encoding="utf-8")
        else:
            file.write_bytes(self.render(file.suffix[1:]))

    def __str__(self) -> str:
        return self.mermaid

    def __repr__(self) -> str:
        count = len(self._nodes) + self._hidden
        return f"<drawing of {count} operations: print it for Mermaid text, or save it as .svg>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        if shutil.which("dot") is not None:
            return {"image/svg+xml": self.render().decode(), "text/plain": repr(self)}
        return {"text/markdown": f"```mermaid\n{self.mermaid}\n```", "text/plain": str(self)}


def _label(node: Shown) -> str:
    text = _plain(node.text)
    if len(text) > _WIDTH:
        text = text[: _WIDTH - 1] + "…"
    return f"%{node.index} {text}" + (" ★" if node.saved else "")


def _class(node: Shown) -> str:
    # "call" alone is a word of Mermaid's own.
    kind = node.kind if node.kind in _STYLES else "other"
    return f"a_{kind}" + ("_saved" if node.saved else "") + ("" if node.alive else "_dead")


def _plain(text: str) -> str:
    """`text` in one line, without control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def _quoted(text: str) -> str:
    """A string of DOT, in which no letter has another meaning."""
    text = _plain(text).replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;")
    return f'"{text}"'


def _entities(text: str) -> str:
    """Text of Mermaid: what could be syntax or HTML is written by its number."""
    text = re.sub(r"[^\w\s.,:=+*/%…★-]", lambda found: f"#{ord(found[0])};", _plain(text))
    # Two of them would start a comment, also inside a string.
    return text.replace("%%", "#37;#37;")


def table_html(title: str, nodes: list[Shown]) -> str:
    """The nodes as a table that is folded away, for a notebook."""
    half = _ROWS // 2
    elided = len(nodes) - 2 * half if len(nodes) > _ROWS else 0
    rows = []
    for number, node in enumerate(nodes):
        if elided and half <= number < half + elided:
            if number == half:
                text = f"… {elided} operations are not shown: print(graph) shows all"
                rows.append(f'<tr><td colspan="4">{text}</td></tr>')
            continue
        fill = _STYLES.get(node.kind, _OTHER)[0]
        faint = "" if node.alive else ' style="opacity:0.5" title="nothing depends on it"'
        invoke = "" if node.invoke < 0 else str(node.invoke)
        rows.append(
            f'<tr{faint}><td style="border-left:4px solid {fill}">%{node.index}</td>'
            f'<td style="text-align:left"><code>{html.escape(_plain(node.text))}</code>'
            f"{' <b>saved</b>' if node.saved else ''}</td><td>{invoke}</td>"
            f'<td style="text-align:left"><small>{html.escape(_plain(node.location))}</small></td></tr>'
        )
    head = "<tr><th></th><th>operation</th><th>invoke</th><th>line</th></tr>"
    opened = " open" if len(nodes) <= 30 else ""
    return (
        f"<details{opened}><summary>{html.escape(title)}</summary>"
        f"<table>{head}{''.join(rows)}</table></details>"
    )
