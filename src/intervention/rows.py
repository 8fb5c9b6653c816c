"""Owns where one invoke's part lies in a batched value: which rows, which tokens, and putting an
edited part back.

What the axes of a value mean is never guessed from its shape: the schedule measured it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ..tracing.structure import ATOMS, children, rebuild

FIXED, BATCH, TOKEN, BATCH_TOKEN, UNKNOWN = "fixed", "batch", "token", "batch·token", "unknown"
#: The tokens of the decoder where an encoder reads the prompt: prompts of a batch have equally many.
TARGET, BATCH_TARGET = "target", "batch·target"
#: The tokens that attention looks at: those of a forward behind the ones that a cache holds.
KEY = "key"


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
    """What one axis of a tensor counts.

    Attributes:
        role: FIXED, BATCH, TOKEN, BATCH_TOKEN (both flattened into one), the same with TARGET, KEY, or
            UNKNOWN.
        factor: how many entries for each unit; for FIXED, the size.
        window: of KEY, how many tokens the cache keeps at most; None if it keeps all.
    """

    role: str
    factor: int
    window: int | None = None

    def size(self, batch: int, tokens: int, targets: int = 1, past: int = 0) -> int:
        """Entries on this axis for a batch of `batch` rows of `tokens` tokens, and `targets` of the
        decoder's own, behind `past` that a cache has seen."""
        if self.role == BATCH:
            return self.factor * batch
        if self.role == TOKEN:
            return self.factor * tokens
        if self.role == BATCH_TOKEN:
            return self.factor * batch * tokens
        if self.role == TARGET:
            return self.factor * targets
        if self.role == BATCH_TARGET:
            return self.factor * batch * targets
        if self.role == KEY:
            return self.factor * (self.kept(past) + targets)
        return self.factor

    def kept(self, past: int) -> int:
        """How many of `past` tokens a cache still holds."""
        return past if self.window is None else min(past, self.window)


@dataclasses.dataclass(frozen=True, slots=True)
class TensorAxes:
    """The axes and dtype of a tensor in the schedule."""

    axes: tuple[Axis, ...]
    dtype: torch.dtype

    @property
    def has_batch(self) -> bool:
        return any(axis.role in (BATCH, BATCH_TOKEN, BATCH_TARGET) for axis in self.axes)


class Opaque:
    """Stands, in one prompt's part of a batch, for a value whose axes are not known: a leaf."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason


@dataclasses.dataclass(slots=True)
class Place:
    """The rows and tokens of one invoke in the batch of a pass.

    Attributes:
        start, count: its prompts among those of the pass.
        tokens: its own tokens so far, the longest prompt's if it has several.
        first: they begin where the batch begins, and padding is on the right; else they end where it
            ends.
    """

    start: int
    count: int
    tokens: int
    first: bool = False

    def own(self, tensor: torch.Tensor, dimension: int, tokens: int) -> torch.Tensor:
        """Its own entries on an axis of `tensor` that counts tokens."""
        padding = tensor.shape[dimension] - tokens
        return tensor.narrow(dimension, 0 if self.first else padding, tokens)


def region(
    tensor: torch.Tensor, axes: TensorAxes, place: Place, rows: int, each: int
) -> torch.Tensor:
    """A view of the part of `tensor` that belongs to `place`; flattened axes are unflattened in it.

    Args:
        tensor: a value of the whole batch.
        axes: what its axes mean.
        rows: rows of the batch, beams included.
        each: rows for each prompt; more than 1 with beams or several sequences.
    """
    dimension = 0
    for axis in axes.axes:
        if axis.role == BATCH:
            k = axis.factor * each
            tensor = tensor.narrow(dimension, place.start * k, place.count * k)
        elif axis.role == TOKEN and axis.factor == 1:
            tensor = place.own(tensor, dimension, min(place.tokens, tensor.shape[dimension]))
        elif axis.role in (BATCH_TOKEN, BATCH_TARGET):
            width = tensor.shape[dimension] // rows
            tensor = tensor.unflatten(dimension, (rows, width))  # type: ignore[no-untyped-call]
            tensor = tensor.narrow(dimension, place.start * each, place.count * each)
            dimension += 1
            if axis.role == BATCH_TOKEN:
                tensor = place.own(tensor, dimension, min(place.tokens * axis.factor, width))
        dimension += 1
    return tensor


def narrow(value: Any, axes: Any, place: Place, rows: int, each: int) -> Any:
    """One invoke's part of a batched value: a view where that is possible.

    Args:
        value: a tensor or a structure of them.
        axes: the same structure of TensorAxes, from the schedule.
    """
    if isinstance(value, torch.Tensor):
        if not isinstance(axes, TensorAxes) or len(axes.axes) != value.ndim:
            return Opaque("it was not seen when the model's structure was measured")
        if any(axis.role == UNKNOWN for axis in axes.axes):
            return Opaque("its axes are neither batch nor token nor fixed")
        if any(
            axis.role == BATCH and size != axis.factor * rows
            for axis, size in zip(axes.axes, value.shape, strict=True)
        ):
            return Opaque("it has another number of rows than the batch")
        part = region(value, axes, place, rows, each)
        if part.ndim != value.ndim:
            for dimension, axis in enumerate(axes.axes):
                if axis.role in (BATCH_TOKEN, BATCH_TARGET):
                    part = part.flatten(dimension, dimension + 1)
        # A row range of a padded batch has gaps; alone it would not, and `view` would work.
        if value.is_contiguous() and not part.is_contiguous():
            return part.contiguous()
        return part
    if type(value) in ATOMS:
        return value
    parts = children(value)
    if parts is None:
        # A cache, say: it holds the tokens of all prompts. A function or a class holds none.
        return value if callable(value) else Opaque("it belongs to the whole batch")
    known = matching(value, axes)
    return rebuild(
        value,
        [narrow(part, sub, place, rows, each) for part, sub in zip(parts, known, strict=True)],
    )


def splits(axes: Any, padded: bool) -> bool:
    """True if a value with these axes can be split into the parts of the prompts of a batch.

    Args:
        axes: a structure of TensorAxes.
        padded: prompts of different lengths are in the batch.
    """
    if isinstance(axes, TensorAxes):
        tokens = [axis for axis in axes.axes if axis.role == TOKEN]
        if any(axis.role == UNKNOWN for axis in axes.axes):
            return False
        # Without a batch axis it may be a sum over all prompts, or the positions of the longest one.
        return axes.has_batch and not (padded and any(axis.factor != 1 for axis in tokens))
    parts = None if type(axes) in ATOMS else children(axes)
    return parts is None or all(splits(part, padded) for part in parts)


def tensors_in(axes: Any) -> int:
    """How many tensors a structure has."""
    if isinstance(axes, TensorAxes):
        return 1
    parts = None if type(axes) in ATOMS else children(axes)
    return sum(tensors_in(part) for part in parts or ())


def bytes_each(axes: Any) -> int:
    """Bytes of the tensors of a structure for one row of one token."""
    if isinstance(axes, TensorAxes):
        entries = 1
        for axis in axes.axes:
            entries *= axis.size(1, 1)
        return entries * axes.dtype.itemsize
    parts = None if type(axes) in ATOMS else children(axes)
    return sum(bytes_each(part) for part in parts or ())


def matching(value: Any, axes: Any) -> list[Any]:
    """The axes of each child of `value`; None where the schedule has no such child."""
    if isinstance(value, dict):
        return [axes.get(key) if isinstance(axes, dict) else None for key in value]
    count = len(children(value) or ())
    known = children(axes) if axes is not None and not isinstance(axes, TensorAxes) else None
    return [known[i] if known and i < len(known) else None for i in range(count)]


class Misfit(Exception):
    """A part does not fit the whole. The caller knows the user's line and says it.

    Attributes:
        owner: who changed the part, as given to `put`.
        shared: the whole has no rows of its own for each prompt.
    """

    def __init__(self, expected: str, found: str, owner: Any = None, shared: bool = False) -> None:
        super().__init__(expected, found)
        self.expected = expected
        self.found = found
        self.owner = owner
        self.shared = shared


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """One invoke's part of a value, as it was and as it is to be."""

    before: Any
    after: Any
    place: Place
    owner: Any

    def part(self, value: Any, i: int) -> Change:
        """The change of the ith part of `value`."""
        old = _children_like(value, self.before, self.owner)
        new = _children_like(value, self.after, self.owner)
        return Change(old[i], new[i], self.place, self.owner)


def put(value: Any, changes: list[Change], axes: Any, rows: int, each: int) -> Any:
    """`value` with the parts of several invokes replaced; the original stays as it is.

    Args:
        value: a value of the whole batch.
        axes: the same structure of TensorAxes, from the schedule.

    Raises:
        Misfit: a part has another structure or shape than it had.
    """
    changes = [change for change in changes if change.after is not change.before]
    if not changes:
        return value
    if isinstance(value, torch.Tensor):
        if not isinstance(axes, TensorAxes) or not axes.has_batch:
            raise Misfit("", "", changes[0].owner, shared=True)
        changed = value.clone()
        for change in changes:
            check(change.before, change.after, change.owner)
            target = region(changed, axes, change.place, rows, each)
            target.copy_(change.after.reshape(target.shape))
        return changed
    parts = children(value)
    if type(value) in ATOMS or parts is None:
        for change in changes:
            if type(change.after) not in ATOMS or change.after != change.before:
                raise Misfit("", "", change.owner, shared=True)
        return value
    known = matching(value, axes)
    return rebuild(
        value,
        [
            put(part, [change.part(value, i) for change in changes], known[i], rows, each)
            for i, part in enumerate(parts)
        ],
    )


def _children_like(value: Any, other: Any, owner: Any = None) -> list[Any]:
    mine, theirs = children(value), children(other)
    if mine is None or theirs is None or len(mine) != len(theirs):
        raise Misfit(type(value).__name__, type(other).__name__, owner)
    return theirs


def fit(before: Any, after: Any) -> Any:
    """`after`, checked to have the structure of `before`, in its dtypes and on its devices.

    Raises:
        Misfit: it has another structure or shape.
    """
    if after is before:
        return after
    if isinstance(before, torch.Tensor):
        check(before, after)
        return after.to(device=before.device, dtype=before.dtype)
    mine = children(before)
    if type(before) in ATOMS or mine is None:
        return after
    theirs = _children_like(before, after)
    return rebuild(before, [fit(b, a) for b, a in zip(mine, theirs, strict=True)])


def check(before: torch.Tensor, after: Any, owner: Any = None) -> None:
    """Raise Misfit unless `after` is a tensor of the shape of `before`."""
    if not isinstance(after, torch.Tensor):
        raise Misfit(f"a tensor {list(before.shape)}", type(after).__name__, owner)
    if after.shape != before.shape:
        raise Misfit(f"{list(before.shape)}", f"{list(after.shape)}", owner)


def map_axes(function: Callable[[TensorAxes], Any], axes: Any) -> Any:
    """A structure of axes with `function` applied to each tensor."""
    if isinstance(axes, TensorAxes):
        return function(axes)
    parts = None if type(axes) in ATOMS else children(axes)
    if parts is None:
        return axes
    return rebuild(axes, [map_axes(function, part) for part in parts])
