"""Owns causal prefix reuse: which first tokens of a variant are those of the base pass.

In a causal decoder the tokens before the first written position are what they are in the base pass,
and so are their keys and values. A variant then computes from a *cut* on: the first position that it
writes, or reads at a place whose base value is not kept. Places are read and written by absolute
position, so values are completed in front while the graph sees them: with the kept hidden states at
the variant's start, with NaN elsewhere, where the analysis found that nothing looks.
"""

from __future__ import annotations

from typing import Any

import torch

from ..tracing.graph import Graph
from ..tracing.node import CALL, READ, Node
from ..tracing.operations import ELEMENT, FIRST_ARGUMENT, GETITEM, PUT, SETITEM
from ..tracing.structure import ATOMS, children, rebuild
from .order import position
from .rows import TOKEN, TensorAxes, matching
from .schedule import Schedule


def cuts(
    graph: Graph,
    live: bytearray,
    users: list[list[Node] | None],
    schedule: Schedule,
    starts: dict[int, int],
    widths: dict[int, int],
) -> dict[int, int]:
    """For each variant, how many of its first tokens need not be computed.

    Args:
        starts: blocks that each variant skips.
        widths: tokens of each variant.
    """
    found = dict(widths)
    saved = graph.saved()
    ends = [schedule.visits[path, "output", 0].order for path in schedule.chain]
    for node in graph.nodes:
        if not live[node.index] or node.kind != READ or node.invoke not in found:
            continue
        invoke, target = node.invoke, node.target
        # Numbers and shapes inside a forward tell how many tokens it computes.
        if target.port not in ("inputs", "output") or target.step or target.call:
            found[invoke] = 0
            continue
        at, boundary = position(target, schedule), (0, ends[starts[invoke] - 1])
        if at is not None and at < boundary:
            continue  # the base pass answers it
        kept = at == boundary
        first = _first_token(node, schedule.axes(target), users, saved, widths[invoke], kept)
        found[invoke] = min(found[invoke], first)
    for (invoke, target), write in graph.writes.items():
        if invoke in found and live[write.index]:
            first = _first_written(write, schedule.axes(target), widths[invoke])
            found[invoke] = min(found[invoke], first)
    # The last token is always computed.
    return {invoke: min(cut, widths[invoke] - 1) for invoke, cut in found.items()}


def _axis(axes: Any) -> int | None:
    """The one token axis of a tensor."""
    if not isinstance(axes, TensorAxes):
        return None
    found = [i for i, axis in enumerate(axes.axes) if axis.role == TOKEN and axis.factor == 1]
    others = any(axis.role not in ("fixed", "batch", TOKEN) for axis in axes.axes)
    return found[0] if len(found) == 1 and not others else None


def _position(key: Any, axis: int, width: int) -> int:
    """The first position on the token axis that an index takes; 0 if that cannot be told."""
    if type(key) is not tuple or len(key) <= axis:
        return 0
    if any(part != slice(None) for part in key[:axis] if type(part) is slice):
        return 0
    if any(type(part) not in (slice, int) for part in key[: axis + 1]):
        return 0
    if any(type(part) is int for part in key[1:axis]):
        return 0
    token = key[axis]
    if type(token) is slice:
        if token.step not in (None, 1) or type(token.start) not in (int, type(None)):
            return 0
        token = token.start or 0
    first: int = token + width if token < 0 else token
    return max(0, first)


def _first_token(
    node: Node,
    axes: Any,
    users: list[list[Node] | None],
    saved: frozenset[int],
    width: int,
    kept: bool,
) -> int:
    """The first position that the users of a value look at; 0 if they may look anywhere."""
    if kept:
        return width  # the value is complete
    if node.index in saved:
        return 0
    first = width
    for user in users[node.index] or ():
        if user.kind != CALL or user.args[0] is not node:
            return 0
        operation, rest = user.target, user.args[1:]
        axis = _axis(axes)
        if axis is not None and operation is ELEMENT and rest == (0,):
            first = min(first, _first_token(user, axes, users, saved, width, kept))
        elif axis is not None and operation in (GETITEM, SETITEM):
            if operation is SETITEM:
                # Only its own write may use the whole that it makes.
                first = min(first, _only_written(user, users, saved, width))
            first = min(first, _position(rest[0], axis, width))
        elif axis is not None and operation is PUT and rest[1] in (GETITEM, ELEMENT):
            first = min(first, _only_written(user, users, saved, width))
        elif operation is FIRST_ARGUMENT or (
            operation in (GETITEM, ELEMENT) and axis is None and type(rest[0]) is int
        ):
            part = _part(axes, operation, rest)
            first = min(first, _first_token(user, part, users, saved, width, kept))
        elif operation is PUT:
            first = min(first, _only_written(user, users, saved, width))
        else:
            return 0
    return first


def _only_written(
    node: Node, users: list[list[Node] | None], saved: frozenset[int], width: int
) -> int:
    """`width` if a changed whole only goes on to its write; 0 if something else looks at it."""
    if node.index in saved:
        return 0
    for user in users[node.index] or ():
        if user.kind == CALL and user.target in (PUT, SETITEM):
            # Either the next change of the same whole, or the part of a larger one.
            if not _only_written(user, users, saved, width):
                return 0
        elif user.kind == CALL:
            return 0
    return width


def _part(axes: Any, operation: Any, rest: tuple[Any, ...]) -> Any:
    if operation is FIRST_ARGUMENT:
        args, kwargs = axes if isinstance(axes, tuple) and len(axes) == 2 else ((), {})
        if args:
            return args[0]
        return next(iter(kwargs.values()), None)
    parts = axes if isinstance(axes, (tuple, list)) else ()
    return parts[rest[0]] if -len(parts) <= rest[0] < len(parts) else None


def _first_written(write: Node, axes: Any, width: int) -> int:
    """The first position in which a written value differs from what was there; 0 if any may."""
    place = (write.invoke, write.target)
    views = (ELEMENT, FIRST_ARGUMENT, GETITEM)

    def follow(node: Any) -> tuple[int, tuple[Any, ...], Any]:
        """First changed position, the way from the place to this part of it, and its axes."""
        if not isinstance(node, Node):
            raise _Unknown
        if node.kind == READ and (node.invoke, node.target) == place:
            return width, (), axes
        if node.kind != CALL:
            raise _Unknown
        operation, args = node.target, node.args
        if operation is SETITEM:
            first, way, known = follow(args[0])
            return min(first, token_position(args[1], known)), way, known
        if operation is PUT:
            first, way, known = follow(args[0])
            _, part, view, rest, _ = args
            if view is GETITEM and _axis(known) is not None:
                return min(first, token_position(rest[0], known)), way, known
            inside, its_way, _ = follow(part)
            if its_way != (*way, (view, rest)):
                raise _Unknown
            return min(first, inside), way, known
        if operation in views and (operation is FIRST_ARGUMENT or type(args[1]) is int):
            first, way, known = follow(args[0])
            inner = known if operation is ELEMENT and _axis(known) is not None else None
            if inner is None:
                inner = _part(known, operation, args[1:])
            return first, (*way, (operation, args[1:])), inner
        raise _Unknown

    def token_position(key: Any, known: Any) -> int:
        axis = _axis(known)
        return 0 if axis is None else _position(key, axis, width)

    try:
        first, way, _ = follow(write.args[0])
    except _Unknown:
        return 0
    return 0 if way else first


class _Unknown(Exception):
    """A written value is not a change of what was there."""


def complete(value: Any, axes: Any, front: torch.Tensor | None, cut: int, width: int) -> Any:
    """`value` with its first `cut` tokens put in front: `front`, or NaN.

    Args:
        value: what arrived, with `width - cut` tokens, or fewer at the end.
        front: [row, cut, d_model] for the first tensor; None where no base value is kept.
    """
    if isinstance(value, torch.Tensor):
        axis = _axis(axes)
        if axis is None or value.shape[axis] != width - cut:
            return value
        if front is None:
            shape = list(value.shape)
            shape[axis] = cut
            fill = float("nan") if value.is_floating_point() else 0
            front = value.new_full(shape, fill)
        return torch.cat((front, value), dim=axis)
    parts = children(value)
    if type(value) in ATOMS or parts is None:
        return value
    known = matching(value, axes)
    mapped = []
    for part, sub in zip(parts, known, strict=True):
        mapped.append(complete(part, sub, front, cut, width))
        if isinstance(part, torch.Tensor):
            front = None
    return rebuild(value, mapped)


def trim(value: Any, axes: Any, cut: int, width: int) -> Any:
    """The reverse of `complete`."""
    if isinstance(value, torch.Tensor):
        axis = _axis(axes)
        if axis is None or value.shape[axis] != width:
            return value
        return value.narrow(axis, cut, width - cut)
    parts = children(value)
    if type(value) in ATOMS or parts is None:
        return value
    known = matching(value, axes)
    return rebuild(
        value, [trim(part, sub, cut, width) for part, sub in zip(parts, known, strict=True)]
    )
