"""Owns modules that an invoke skips: a result without their computation, and what is then not there.

A skip is a write at the port "skip", which stands right after the inputs: the module's `forward` asks
the run for its result. The module computes all the same where its result holds the rows of others,
where it fills a cache, and where the shape of its result is not known.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..tracing.graph import Graph
from ..tracing.node import READ, WRITE, HookPoint, Node
from ..tracing.structure import ATOMS, children, leaves, map_leaves, rebuild
from .rows import BATCH, TOKEN, UNKNOWN, Misfit, TensorAxes, map_axes, matching
from .schedule import Schedule


def is_skip(hook_point: HookPoint) -> bool:
    """True for a place whose write replaces a computation."""
    return hook_point.port.endswith("skip")


def skipped_places(
    graph: Graph, live: bytearray, prompted: Iterable[int], schedule: Schedule | None
) -> dict[int, Node]:
    """The reads and writes of places inside what their invoke skips, and the skip, by node index.

    Args:
        prompted: the invokes that have a prompt; a skip of another one is for all prompts.
        schedule: None if the model cannot be measured; then paths tell what is inside.
    """
    own = set(prompted)
    skips = [node for place, node in graph.writes.items() if live[node.index] and is_skip(place[1])]
    found: dict[int, Node] = {}
    for node in graph.nodes:
        if node.kind not in (READ, WRITE) or node.target.port in ("result", "grad"):
            continue
        for skip in skips:
            mine = skip.invoke == node.invoke or skip.invoke not in own
            if mine and _inside(node.target, skip.target, schedule):
                found[node.index] = skip
    return found


def _inside(place: HookPoint, skip: HookPoint, schedule: Schedule | None) -> bool:
    ports = (skip.port, _sibling(skip, "inputs"), _sibling(skip, "output"))
    own = (place.path, place.call) == (skip.path, skip.call) and place.port in ports
    if own or place.step != skip.step:
        return False
    if schedule is not None:
        begin, end = (
            schedule.find(skip),
            schedule.find(skip._replace(port=_sibling(skip, "output"))),
        )
        at = schedule.find(place)
        if begin is not None and end is not None and at is not None:
            return begin.order < at.order < end.order
    if place.path == skip.path:
        return place.port.startswith(skip.port.removesuffix("skip") + "source.")
    return skip.port == "skip" and (not skip.path or place.path.startswith(f"{skip.path}."))


def _sibling(skip: HookPoint, port: str) -> str:
    return skip.port.removesuffix("skip") + port


def fills_cache(inputs: Any) -> bool:
    """True if a cache of keys and values is among the inputs: a gap in it would shift the others."""
    return any(type(leaf).__name__.endswith("Cache") for leaf in leaves(inputs))


def blank(given: Any, taken: Any, inputs: Any, rows: int | None, tokens: int) -> Any:
    """A stand-in for what a module would return: the right shapes, zeros without memory.

    Args:
        given, taken: axes of what it returns and takes.
        inputs: what it takes now; they tell device and dtype, and how many rows and tokens.
        rows: rows of the batch; None if the inputs alone tell.
        tokens: tokens of the batch, for a module whose inputs do not tell.

    Returns:
        None where that is not known.
    """
    pairs = list(_pairs(inputs, taken))
    sizes: dict[str, set[int]] = {BATCH: set(), TOKEN: set()}
    for tensor, axes in pairs:
        for size, axis in zip(tensor.shape, axes.axes, strict=True):
            if axis.role in sizes and axis.factor:
                sizes[axis.role].add(size // axis.factor)
    counts = sizes[BATCH] | ({rows} if rows is not None else set())
    known = [axes for axes in _tensor_axes(given)]
    unknown = any(axis.role == UNKNOWN for axes in known for axis in axes.axes)
    if unknown or not known or len(counts) != 1 or isinstance(given, dict):
        return None  # a dict in the schedule has lost its class
    batch = counts.pop()
    # Keys and values may be longer than the tokens that go through the module: the first count.
    lengths = [
        size // axis.factor
        for tensor, axes in pairs
        for size, axis in zip(tensor.shape, axes.axes, strict=True)
        if axis.role == TOKEN and axis.factor
    ]
    length = lengths[0] if lengths else tokens
    first = next(((t, a) for t, a in pairs if t.is_floating_point()), None)
    device = next((leaf.device for leaf in leaves(inputs) if isinstance(leaf, torch.Tensor)), None)

    def make(axes: TensorAxes) -> torch.Tensor:
        # The loaded model may compute in another dtype than its skeleton.
        same = first is not None and first[1].dtype == axes.dtype
        dtype = first[0].dtype if first is not None and same else axes.dtype
        shape = [axis.size(batch, length) for axis in axes.axes]
        return torch.zeros((), dtype=dtype, device=device).expand(shape)

    return map_axes(make, given)


def _pairs(value: Any, axes: Any) -> Iterable[tuple[torch.Tensor, TensorAxes]]:
    """The tensors of a value whose axes are known."""
    if isinstance(value, torch.Tensor):
        if isinstance(axes, TensorAxes) and len(axes.axes) == value.ndim:
            yield value, axes
        return
    parts = None if type(value) in ATOMS else children(value)
    if parts is not None:
        for part, sub in zip(parts, matching(value, axes), strict=True):
            yield from _pairs(part, sub)


def _tensor_axes(axes: Any) -> Iterable[TensorAxes]:
    if isinstance(axes, TensorAxes):
        yield axes
    else:
        for part in (None if type(axes) in ATOMS else children(axes)) or ():
            yield from _tensor_axes(part)


def as_result(given: Any, like: Any) -> Any:
    """What a skip was given, in the structure of the module's result.

    The first part alone, or the first few, may stand for a tuple; a tuple of one for a tensor. A part
    that is not given is that of `like`.

    Raises:
        Misfit: it has more parts than the result.
    """
    if given is None:
        return like
    parts = None if type(like) in ATOMS or isinstance(like, torch.Tensor) else children(like)
    if parts is None:
        while isinstance(given, (tuple, list)) and len(given) == 1:
            given = given[0]
        return given
    theirs = [given] if isinstance(given, torch.Tensor) else children(given)
    if isinstance(given, dict) and isinstance(like, dict):
        theirs = [given.get(key) for key in like]
    if theirs is None or len(theirs) > len(parts):
        raise Misfit(f"{type(like).__name__} of {len(parts)} parts", type(given).__name__)
    theirs = [*theirs, *[None] * (len(parts) - len(theirs))]
    return rebuild(like, [as_result(one, part) for one, part in zip(theirs, parts, strict=True)])


def without_blanks(result: Any, stand_in: Any) -> Any:
    """`result` with None for the parts that no skip gave."""
    blanks = {id(leaf) for leaf in leaves(stand_in) if isinstance(leaf, torch.Tensor)}
    return map_leaves(lambda leaf: None if id(leaf) in blanks else leaf, result)
