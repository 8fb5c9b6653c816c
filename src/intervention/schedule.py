"""Owns `Schedule`: what a model's forward does, learned without running it.

Two forwards on fake tensors with different sizes tell the order of the modules, the structure of
what goes in and comes out of each, and what every axis counts: a size that went 2 → 3 with the
batch is the batch, 13 → 17 the tokens, 26 → 51 both flattened into one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..tracing.errors import GraftworkError, ScheduleError
from ..tracing.node import HookPoint
from ..tracing.structure import ATOMS, children, rebuild
from .rows import (
    BATCH,
    BATCH_TOKEN,
    FIXED,
    TOKEN,
    UNKNOWN,
    Axis,
    TensorAxes,
)

#: (batch, tokens) of the two trial forwards.
SIZES = ((2, 13), (3, 17))

Key = tuple[str, str, int]


@dataclasses.dataclass(slots=True)
class Visit:
    """One arrival in a forward: its position in the order, and the axes of its value."""

    order: int
    axes: Any


@dataclasses.dataclass(slots=True)
class Schedule:
    """The arrivals of one forward.

    Attributes:
        visits: by (path, port, call).
    """

    visits: dict[Key, Visit]

    def find(self, hook_point: HookPoint) -> Visit | None:
        return self.visits.get((hook_point.path, hook_point.port, hook_point.call))

    def axes(self, hook_point: HookPoint) -> Any:
        visit = self.find(hook_point)
        return None if visit is None else visit.axes


def measure(
    module: torch.nn.Module,
    make_inputs: Callable[[int, int], tuple[tuple[Any, ...], dict[str, Any]]],
    sorts: Callable[[torch.nn.Module], bool] = lambda module: False,
) -> Schedule:
    """Run `module` twice on fake tensors and compare.

    Args:
        module: a skeleton on the meta device, or a real module.
        make_inputs: called under the fake mode with (batch, tokens); gives args and kwargs of the
            forward.
        sorts: true for modules that bring the tokens of the batch into an order that depends on the
            data, as experts do. What is inside them belongs to no prompt, and is not in the schedule.

    Raises:
        ScheduleError: the module cannot be run on fake tensors.
    """
    try:
        first, second = (_arrivals(module, make_inputs, *size) for size in SIZES)
        inside = tuple(f"{path}." for path, child in module.named_modules() if sorts(child))
    except GraftworkError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        raise ScheduleError.no_schedule("This block", reason) from error
    if [key for key, _ in first] != [key for key, _ in second]:
        raise ScheduleError.no_schedule(
            "This block", "the order of its modules depends on its input"
        )
    visits = {
        key: Visit(order, _compare(value, other))
        for order, ((key, value), (_, other)) in enumerate(zip(first, second, strict=True))
        if not inside or not key[0].startswith(inside)
    }
    return Schedule(visits)


def _arrivals(
    module: torch.nn.Module,
    make_inputs: Callable[[int, int], tuple[tuple[Any, ...], dict[str, Any]]],
    batch: int,
    tokens: int,
) -> list[tuple[Key, Any]]:
    events: list[tuple[Key, Any]] = []
    calls: dict[str, int] = {}
    open_calls: dict[str, list[int]] = {}

    def before(path: str) -> Callable[..., None]:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            call = calls[path] = calls.get(path, -1) + 1
            open_calls.setdefault(path, []).append(call)
            events.append(((path, "inputs", call), _shapes((args, kwargs))))

        return hook

    def after(path: str) -> Callable[..., None]:
        def hook(_: Any, args: Any, output: Any) -> None:
            events.append(((path, "output", open_calls[path].pop()), _shapes(output)))

        return hook

    handles = []
    modes = [(child, child.training) for child in module.modules()]
    try:
        # A module at two paths is the same place under two names.
        for path, child in module.named_modules(remove_duplicate=False):
            handles.append(child.register_forward_pre_hook(before(path), with_kwargs=True))
            handles.append(child.register_forward_hook(after(path)))
        module.eval()
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            args, kwargs = make_inputs(batch, tokens)
            module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for child, training in modes:
            child.training = training
    return events


@dataclasses.dataclass(frozen=True, slots=True)
class _Shape:
    sizes: tuple[int, ...]
    dtype: torch.dtype


def _shapes(value: Any) -> Any:
    """The structure of a value with shapes for tensors: fake tensors must not outlive their mode."""
    if isinstance(value, torch.Tensor):
        return _Shape(tuple(value.shape), value.dtype)
    if type(value) in ATOMS:
        return value
    parts = children(value)
    if parts is None:
        return None
    if isinstance(value, dict):
        return {key: _shapes(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_shapes(part) for part in parts)
    return rebuild(value, [_shapes(part) for part in parts])


def _compare(value: Any, other: Any) -> Any:
    if isinstance(value, _Shape):
        if not isinstance(other, _Shape) or len(value.sizes) != len(other.sizes):
            return None
        axes = tuple(_axis(a, b) for a, b in zip(value.sizes, other.sizes, strict=True))
        return TensorAxes(axes, value.dtype)
    if type(value) in ATOMS:
        return value
    mine, theirs = children(value), children(other)
    if mine is None or theirs is None or len(mine) != len(theirs):
        return None
    return rebuild(value, [_compare(a, b) for a, b in zip(mine, theirs, strict=True)])


def _axis(a: int, b: int) -> Axis:
    if a == b:
        return Axis(FIXED, a)
    (batch_a, tokens_a), (batch_b, tokens_b) = SIZES
    for role, unit_a, unit_b in (
        (BATCH, batch_a, batch_b),
        (TOKEN, tokens_a, tokens_b),
        (BATCH_TOKEN, batch_a * tokens_a, batch_b * tokens_b),
    ):
        if a % unit_a == 0 and a // unit_a * unit_b == b:
            return Axis(role, a // unit_a)
    return Axis(UNKNOWN, a)
