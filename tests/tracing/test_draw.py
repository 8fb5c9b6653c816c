"""Pictures and tables of graphs: what they show, and that nothing in them is syntax by accident."""

import os
import re
import shutil
import stat
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwork import Model
from graftwork.tracing import Graph, Tracer
from graftwork.tracing.errors import DrawError
from graftwork.tracing.node import READ, HookPoint


class Checker(HTMLParser):
    """Every tag is closed, in order."""

    EMPTY = frozenset({"br", "rect", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def block(toy: Model, x: torch.Tensor) -> Tracer:
    with toy.trace() as tracer:
        with tracer.invoke(x):
            h = toy.mid.output
            h * 3  # nothing depends on it
            donor = h[:, -1].save()  # the "donor" <b>|</b>
        with tracer.invoke(x + 1):
            toy.mid.output[:, -1] = donor
            toy.out(toy.mid.output + toy.out.bias).save()
    return tracer


@pytest.fixture
def without_dot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def fake_dot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A `dot` that writes down how it was called and answers with a picture."""
    place = tmp_path / "bin"
    place.mkdir()
    program = place / "dot"
    program.write_text(
        f'#!/bin/sh\necho "$@" > {place}/args\n/bin/cat > {place}/source\necho "<svg></svg>"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(place))
    yield place


def test_picture_says_what_the_user_wrote(toy: Model, x: torch.Tensor) -> None:
    drawing = block(toy, x).graph.draw()
    for line in (
        "%0 mid.output",
        "%1 %0 * 3",
        "%2 %0[:, -1] ★",
        "%4 %3[:, -1] = %2",
        "mid.output = %4",
        "out.bias",
    ):
        assert f'label="{line}' in drawing.dot or f' {line}"' in drawing.dot, line
    assert drawing.dot.count("subgraph cluster_") == 2 and "n2 -> n4;" in drawing.dot


def test_dead_and_saved_nodes_are_marked(toy: Model, x: torch.Tensor) -> None:
    drawing = block(toy, x).graph.draw()
    styles = dict(re.findall(r'(n\d+) \[.*style="([^"]*)"', drawing.dot))
    assert [name for name, style in styles.items() if "dashed" in style] == ["n1"]
    thick = re.findall(r"(n\d+) \[.*penwidth", drawing.dot)
    saved = [f"n{i}" for i in sorted(block(toy, x).graph.saved())]
    assert thick == saved and len(saved) == 2
    assert ":::a_call_dead" in drawing.mermaid and ":::a_call_saved" in drawing.mermaid


def test_mermaid_has_one_box_a_node_and_one_arrow_a_use(toy: Model, x: torch.Tensor) -> None:
    graph = block(toy, x).graph
    text = str(graph.draw())
    assert text == graph.draw().mermaid and text.startswith("flowchart TB\n")
    boxes = re.findall(r"^ +n(\d+)[\[(]", text, re.M)
    assert list(map(int, boxes)) == list(range(len(graph)))
    uses = {
        (a.index, n.index)
        for n in graph.nodes
        for a in n.args
        if hasattr(a, "index") and hasattr(a, "kind")
    }
    arrows = {tuple(map(int, pair)) for pair in re.findall(r"n(\d+) --> n(\d+)", text)}
    assert arrows == uses
    assert text.count("subgraph ") == text.count("\n  end") == 2


NASTY = 'a"b<c>|{d}[e](f)&g#h;\\n\n`%%`end\x07'


def nasty_graph() -> Graph:
    graph = Graph()
    graph.append(READ, HookPoint(NASTY, "output"), invoke=0)
    graph.nodes[0].file = NASTY
    return graph


def test_labels_are_escaped() -> None:
    drawing = nasty_graph().draw()
    (label,) = re.findall(r'n0\["(.*)"\]:::', drawing.mermaid)
    plain = re.sub(r"#(\d+);", lambda found: chr(int(found[1])), label)
    assert plain.startswith('%0 a"b<c>|{d}[e](f)&g#h;\\n ')
    assert not set('"<>|{}[]()&`\\') & set(label) and "%%" not in label
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', drawing.dot)
    assert any(s.startswith('%0 a\\"b<c>|{d}[e](f)&amp;g#h;\\\\n ') for s in strings)
    # Nothing is left of a quote that closed too early.
    rest = re.sub(r'"(?:[^"\\]|\\.)*"', "", drawing.dot)
    assert '"' not in rest and "<" not in rest and "`" not in rest


def test_table_is_well_formed_and_escaped(toy: Model, x: torch.Tensor) -> None:
    page = Checker(block(toy, x).graph._repr_html_())
    assert page.tags.count("tr") == len(block(toy, x).graph) + 1
    assert '# the "donor" <b>|</b>' in page.text and "%0[:, -1]" in page.text
    assert "b" in page.tags  # "saved"
    nasty = Checker(nasty_graph()._repr_html_())
    assert 'a"b<c>|{d}' in nasty.text and "c" not in nasty.tags


def test_no_line_of_mermaid_has_a_word_of_its_language_by_accident(
    toy: Model, x: torch.Tensor
) -> None:
    words = {"call", "click", "end", "default", "style", "class", "graph", "href", "linkStyle"}
    outside = re.sub(r'"[^"]*"', "", block(toy, x).graph.draw().mermaid)
    lines = [line.strip() for line in outside.splitlines()]
    used = {word for line in lines if line != "end" for word in re.findall(r"[A-Za-z_]+", line)}
    assert not words & used


def test_long_graphs_are_elided_with_a_sentence(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x) as tracer:
        h = toy.mid.output
        for _ in range(500):
            h = h + 1
        h.save()
    graph = tracer.graph
    drawing = graph.draw(limit=20)
    assert "481 operations are not drawn" in drawing.mermaid
    assert len(re.findall(r"^ +n\d+\(", drawing.mermaid, re.M)) == 19
    assert "hidden -> n491;" in drawing.dot and "n490" not in drawing.dot
    assert len(re.findall(r"^ +n\d+ \[", graph.draw(limit=None).dot, re.M)) == 501
    assert "not drawn" not in graph.draw(limit=None).dot
    assert repr(drawing).startswith("<drawing of 501 operations")
    page = Checker(graph._repr_html_())
    assert "301 operations are not shown" in page.text and page.tags.count("tr") == 202


def test_graph_in_one_line_and_printed_in_full(toy: Model, x: torch.Tensor) -> None:
    graph = block(toy, x).graph
    assert repr(graph) == f"<graph: {len(graph)} operations, 2 saved, 1 places written>"
    assert len(str(graph).splitlines()) == len(graph)


def test_suffix_decides_what_is_written(
    toy: Model, x: torch.Tensor, tmp_path: Path, fake_dot: Path
) -> None:
    graph = block(toy, x).graph
    drawing = graph.draw(tmp_path / "graph.svg")
    assert (tmp_path / "graph.svg").read_text() == "<svg></svg>\n"
    assert (fake_dot / "args").read_text() == "-Tsvg\n"
    assert (fake_dot / "source").read_text() == drawing.dot
    drawing.save(tmp_path / "graph.png")
    assert (fake_dot / "args").read_text() == "-Tpng\n"
    drawing.save(str(tmp_path / "graph.dot"))
    assert (tmp_path / "graph.dot").read_text() == drawing.dot + "\n"
    graph.draw(str(tmp_path / "graph.mmd"))
    assert (tmp_path / "graph.mmd").read_text() == drawing.mermaid + "\n"
    with pytest.raises(DrawError, match=r"graph\.pdf` does not end in .*\.svg, \.png"):
        drawing.save(tmp_path / "graph.pdf")
    assert drawing._repr_mimebundle_()["image/svg+xml"] == "<svg></svg>\n"


def test_without_graphviz_a_notebook_gets_mermaid(
    toy: Model, x: torch.Tensor, tmp_path: Path, without_dot: None
) -> None:
    drawing = block(toy, x).graph.draw()
    bundle = drawing._repr_mimebundle_()
    assert bundle["text/markdown"] == f"```mermaid\n{drawing.mermaid}\n```"
    assert "image/svg+xml" not in bundle
    with pytest.raises(DrawError, match=r"needs Graphviz.*Install it.*\.mmd"):
        drawing.save(tmp_path / "graph.svg")
    assert not (tmp_path / "graph.svg").exists()


def test_a_failure_of_graphviz_is_told(toy: Model, x: torch.Tensor, fake_dot: Path) -> None:
    (fake_dot / "dot").write_text("#!/bin/sh\necho 'out of luck' >&2\nexit 1\n")
    with pytest.raises(DrawError, match=r"could not draw the graph: out of luck"):
        block(toy, x).graph.draw().render()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz, a program, is not installed")
def test_graphviz_draws_it(toy: Model, x: torch.Tensor, tmp_path: Path) -> None:
    for graph in (block(toy, x).graph, nasty_graph()):
        file = tmp_path / "graph.svg"
        graph.draw(file)
        root = ElementTree.parse(file).getroot()
        texts = "\n".join(root.itertext())
        kinds = [e.get("class") for e in root.iter() if e.get("class")]
        assert kinds.count("node") == len(graph)
        assert ("mid.output" in texts) or ('a"b<c>|{d}[e](f)&g#h;\\n' in texts)
        assert os.path.getsize(file) > 500
