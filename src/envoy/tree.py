"""Owns the module tree as HTML, folded, for a notebook. It reads names and shapes, no weights."""

from __future__ import annotations

import html
from collections.abc import Iterator

import torch
from torch.nn.parameter import is_lazy


def tree_html(module: torch.nn.Module, path: str) -> str:
    """The module and what is in it. Numbered modules of one kind are shown once, with their count."""
    return _Tree().item(module, path, opened=True)


class _Tree:
    """What is known of the modules met so far: a block is described once, however often it occurs."""

    def __init__(self) -> None:
        self._kinds: dict[int, int] = {}
        self._numbers: dict[object, int] = {}

    def kind(self, module: torch.nn.Module) -> int:
        """A number that modules of the same class, shapes and parts share."""
        found = self._kinds.get(id(module))
        if found is None:
            what = (
                type(module),
                module.extra_repr(),
                tuple((name, _shape(tensor)) for name, tensor in _tensors(module)),
                tuple((name, self.kind(child)) for name, child in _children(module)),
            )
            found = self._kinds[id(module)] = self._numbers.setdefault(what, len(self._numbers))
        return found

    def item(self, module: torch.nn.Module, name: str, opened: bool = False) -> str:
        text = html.escape(type(module).__name__)
        extra = module.extra_repr()
        if extra and len(extra) <= 100:
            text += f'(<span style="opacity:0.7">{html.escape(extra)}</span>)'
        title = (
            (f"<code><b>{html.escape(name)}</b></code> " if name else "") + text + _count(module)
        )
        if opened and any(parameter.is_meta for parameter in module.parameters()):
            title += " (weights not loaded)"
        inner = [
            f"<li><code>{html.escape(own)}</code> {html.escape(_shape(tensor))}</li>"
            for own, tensor in _tensors(module)
        ]
        for names, child in self._runs(module):
            first = names[0]
            label = first if len(names) == 1 else f"{first} … {names[-1]}"
            below = self.item(child, label)
            if len(names) > 1:
                kind = html.escape(type(child).__name__)
                below = f"<b>{len(names)} × {kind}</b>, each: {below}"
            inner.append(f"<li>{below}</li>")
        if not inner:
            return title
        style = ' style="list-style:none;margin:0;padding-left:1.2em"'
        return (
            f"<details{' open' if opened else ''}><summary>{title}</summary>"
            f"<ul{style}>{''.join(inner)}</ul></details>"
        )

    def _runs(self, module: torch.nn.Module) -> Iterator[tuple[list[str], torch.nn.Module]]:
        """The children, numbered ones of one kind in a row together. Others keep their names."""
        names: list[str] = []
        last: torch.nn.Module | None = None
        for name, child in _children(module):
            alike = last is not None and self.kind(child) == self.kind(last)
            if alike and name.isdigit() and names[-1].isdigit():
                names.append(name)
                continue
            if last is not None:
                yield names, last
            names, last = [name], child
        if last is not None:
            yield names, last


def _children(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    return ((name, child) for name, child in module._modules.items() if child is not None)


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for group in (module._parameters, module._buffers):
        yield from ((name, tensor) for name, tensor in group.items() if tensor is not None)


def _shape(tensor: torch.Tensor) -> str:
    if is_lazy(tensor):  # it gets its shape in the first forward
        return "of a shape that is not known yet"
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _size(tensor: torch.Tensor) -> int:
    return 0 if is_lazy(tensor) else tensor.numel()


def _count(module: torch.nn.Module) -> str:
    total = sum(map(_size, module.parameters()))
    if not total:
        return ""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if total >= size:
            return f' <span style="opacity:0.7">{total / size:.1f}{unit} parameters</span>'
    return f' <span style="opacity:0.7">{total} parameters</span>'
