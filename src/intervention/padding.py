"""Owns the warning that an operation takes padding for tokens. It looks at finished graphs, before they
run, and only at prompts that have padding of their own: a list of texts, say, or the whole batch.

Rows of different lengths in one invoke are one value [row, token, …], whose short rows hold padding.
Most operations pass it on, where it does no harm. These do not: reductions over the tokens, and
indices that count from an end where short rows have none of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch

from ..tracing.errors import GraftworkError, PaddingWarning
from ..tracing.graph import arguments
from ..tracing.job import Recorded
from ..tracing.node import CALL, READ, Captured, Node, user_frame
from ..tracing.operations import GETITEM, GUARDED, SETITEM, TAKE
from .shapes import Layout, Shapes, is_own

#: What reduces or sorts a tensor over some axes: the position of the argument that names them behind
#: the tensor, and the axis that is meant without it (None: all).
_OVER: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(
        "mean sum prod amax amin std var std_mean var_mean nanmean nansum max min median nanmedian "
        "argmax argmin all any aminmax logsumexp softmax log_softmax cumsum cumprod "
        "count_nonzero".split(),
        (0, None),
    ),
    **dict.fromkeys(
        "norm vector_norm linalg_norm linalg_vector_norm quantile nanquantile".split(), (1, None)
    ),
    **dict.fromkeys("sort argsort mode cummax cummin logcumsumexp".split(), (0, -1)),
    **dict.fromkeys("topk kthvalue normalize".split(), (1, -1)),
}  # fmt: skip
#: What takes a part of an axis: `select(axis, index)`.
_PARTS = frozenset({"select", "narrow", "index_select"})


def warn_of_padding(written: Recorded, shapes: Shapes) -> None:
    """Say once for each line of a block where padding is taken for tokens."""
    ragged = {i for i, p in enumerate(written.prompts) if _is_ragged(written, p)}
    if not ragged:
        return
    said = set()
    registry = user_frame(2).f_globals.setdefault("__warningregistry__", {})
    for node in written.graph.nodes:
        if node.kind != CALL or (node.file, node.line) in said:
            continue
        for message in _complaints(
            node.guarded if node.target is GUARDED else node, shapes, ragged
        ):
            said.add((node.file, node.line))
            warnings.warn_explicit(message, PaddingWarning, node.file, node.line, registry=registry)
            break


def _is_ragged(written: Recorded, prompt: Any) -> bool:
    """True if some row that an invoke sees has padding in it."""
    if prompt is not None:
        return any(length != prompt.width for length in prompt.lengths)
    prompts = [p for p in written.prompts if p is not None]
    return len({n for p in prompts for n in (p.width, *p.lengths)}) > 1


def _complaints(node: Node, shapes: Shapes, ragged: set[int]) -> Iterator[str]:
    value = next(iter(node.args), None)
    if type(value) is not Node:
        return
    name = node.target.name
    indexes = node.target in (GETITEM, TAKE, SETITEM)
    if not (indexes or name in _OVER or name in _PARTS):
        return
    source = shapes.source(value)
    if source is None or source.invoke not in ragged:
        return
    try:
        spans, width = shapes.spans(value)
        layout = shapes.layout(value)
        own = [spans[row] for row in _rows(value, shapes, len(spans))]
        if all(span == (0, width) for span in own):
            return
        fake = shapes.value(value)
        if name in _OVER and not indexes:
            yield from _reduces(node, layout, fake.ndim, source, own)
        elif layout.flat:
            return
        elif indexes:
            if layout.rows == 0:
                own = _chosen(own, node.args[1])
            for axis, key in _by_axis(node.args[1], fake.ndim, layout):
                yield from _indexes(axis, key, layout, fake.shape, own, width, source)
        else:
            yield from _part(node, layout, fake.shape, own, width, source)
    except GraftworkError:
        return  # which axis counts tokens is not known, or none does


def _reduces(
    node: Node, layout: Layout, ndim: int, source: Node, own: list[tuple[int, int]]
) -> Iterator[str]:
    name = node.target.name
    position, default = _OVER[name]
    given = node.kwargs.get("dim", node.kwargs.get("axis", _argument(node, position + 1)))
    if given is None:
        given = default
    axes = [given] if type(given) is int else given if isinstance(given, (tuple, list)) else None
    if axes is None and given is not None:
        return  # `torch.max(one, other)`: no reduction
    if axes is None or layout.tokens[0] in [axis % ndim for axis in axes if type(axis) is int]:
        yield (
            f"`{name}` over the tokens of {source.describe()} takes in padding: the rows have "
            f"{_lengths(own)} tokens of their own. Reduce over each row's own tokens with `.t.mean()`, "
            "`.t.sum()`, `.t.max()`, `.t.min()`; `invoker.mask` [row, token] tells which they are."
        )


def _argument(node: Node, position: int) -> Any:
    return node.args[position] if len(node.args) > position else None


def _by_axis(key: Any, ndim: int, layout: Layout) -> Iterator[tuple[int, Any]]:
    """Each part of an index that counts entries of an axis, with that axis."""
    parts = list(key) if type(key) is tuple else [key]
    if any(type(part) is Node for part in parts):
        return
    if layout.rows is not None and layout.rows < len(parts) and _is_list(parts[layout.rows]):
        return  # rows and columns in pairs: who writes that counts in each row
    named = sum(part is not None and part is not Ellipsis for part in parts)
    axis = 0
    for part in parts:
        if part is None:
            continue
        if part is Ellipsis:
            axis += ndim - named
            continue
        yield axis, part
        dims = part.tensor.ndim if type(part) is Captured and part.tensor.dtype == torch.bool else 1
        axis += dims


def _is_list(part: Any) -> bool:
    return isinstance(part, list) or (type(part) is Captured and part.tensor.ndim > 0)


def _indexes(
    axis: int,
    key: Any,
    layout: Layout,
    shape: torch.Size,
    own: list[tuple[int, int]],
    width: int,
    source: Node,
) -> Iterator[str]:
    if axis not in layout.tokens or shape[axis] != width:
        return
    key = _numbers(key)
    if key is not None and not all(is_own(key, span, width) for span in own):
        yield (
            f"an index of the tokens of {source.describe()} takes in padding: the rows have "
            f"{_lengths(own)} tokens of their own in {width} columns. `.t[…]` counts each row's own "
            "tokens; `invoker.mask` [row, token] tells which they are."
        )


def _numbers(key: Any) -> Any:
    """An index as a number, a slice or a list of numbers; None for others."""
    if type(key) is Captured:
        tensor = key.tensor
        whole = not tensor.is_floating_point() and tensor.dtype != torch.bool and tensor.ndim < 2
        key = tensor.tolist() if whole else None
    if isinstance(key, (list, range)):
        return list(key) if all(type(one) is int for one in key) else None
    if isinstance(key, slice):
        return (
            key
            if all(type(p) in (int, type(None)) for p in (key.start, key.stop, key.step))
            else None
        )
    return key if type(key) is int else None


def _part(
    node: Node,
    layout: Layout,
    shape: torch.Size,
    own: list[tuple[int, int]],
    width: int,
    source: Node,
) -> Iterator[str]:
    axis = node.kwargs.get("dim", _argument(node, 1))
    start = node.kwargs.get("index", node.kwargs.get("start", _argument(node, 2)))
    length = node.kwargs.get("length", _argument(node, 3))
    if type(axis) is int:
        if node.target.name == "narrow" and type(start) is int and type(length) is int:
            start = list(range(start, start + length))
        yield from _indexes(axis % len(shape), start, layout, shape, own, width, source)


def _rows(node: Node, shapes: Shapes, count: int) -> list[int]:
    """Which rows are in a value: an index of its rows may have left some out."""
    found, chain = list(range(count)), []
    while node.kind != READ:
        chain.append(node)
        node = next(a for a in arguments(node))
    for one in reversed(chain):
        if one.target is GETITEM or one.target is TAKE:
            try:
                first = shapes.layout(one.args[0]).rows == 0
            except GraftworkError:
                first = False
            if first:
                found = _chosen(found, one.args[1])
    return found


def _chosen(rows: list[Any], key: Any) -> list[Any]:
    """Those of the rows of a value that an index of it takes; all where that is not known."""
    key = _numbers(key[0] if type(key) is tuple and key else key)
    try:
        if isinstance(key, slice):
            return rows[key]
        return rows if key is None else [rows[i] for i in ([key] if type(key) is int else key)]
    except IndexError:
        return rows


def _lengths(own: list[tuple[int, int]]) -> str:
    lengths = sorted({stop - start for start, stop in own})
    return " or ".join(map(str, lengths)) if len(lengths) < 4 else f"{lengths[0]} to {lengths[-1]}"
