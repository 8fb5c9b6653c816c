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
from torch.utils._python_dispatch import TorchDispatchMode

from ..tracing.errors import GraftworkError, ScheduleError
from ..tracing.node import HookPoint
from ..tracing.structure import ATOMS, children, leaves, rebuild
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
        chain: paths of the blocks that hand the hidden states on to each other and nothing else;
            empty if there are none, or if that is not certain. See `find_chain`.
    """

    visits: dict[Key, Visit]
    chain: tuple[str, ...] = ()

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
    if [event.key for event in first] != [event.key for event in second]:
        raise ScheduleError.no_schedule(
            "This block", "the order of its modules depends on its input"
        )
    visits = {
        one.key: Visit(order, _compare(one.shapes, other.shapes))
        for order, (one, other) in enumerate(zip(first, second, strict=True))
        if not inside or not one.key[0].startswith(inside)
    }
    return Schedule(visits, find_chain(module, first))


@dataclasses.dataclass(slots=True)
class _Event:
    """One arrival of a trial forward.

    Attributes:
        shapes: its value with shapes for tensors.
        tensors: for each tensor in it, its identity and how many arrivals there had been when it
            came to be; 0 for what the forward was given.
        opaque: it holds an object that may carry values past the blocks.
    """

    key: Key
    shapes: Any
    tensors: tuple[tuple[int, int], ...]
    opaque: bool


class _Births(TorchDispatchMode):
    """Notes when each tensor of a trial forward came to be, and keeps it: a freed one's identity
    would be given to another."""

    def __init__(self, events: list[_Event]) -> None:
        super().__init__()
        self._events = events
        self._born: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._born.setdefault(id(leaf), (leaf, len(self._events)))
        return result

    def of(self, tensor: torch.Tensor) -> tuple[int, int]:
        kept = self._born.setdefault(id(tensor), (tensor, 0))
        return id(tensor), kept[1]


def find_chain(module: torch.nn.Module, events: list[_Event]) -> tuple[str, ...]:
    """The longest list of sibling blocks of which each takes what the one before it gave.

    It is a chain only if nothing else that came to be inside it is handed on: a tensor that a block
    takes besides the hidden states must be older than the first block (shared keys and values or a
    memory are not), and no object may hold one. Caches are left out of runs that skip blocks.
    """
    at = {event.key: (number, event) for number, event in enumerate(events)}
    best: tuple[str, ...] = ()
    for path, parent in module.named_modules():
        if not isinstance(parent, torch.nn.ModuleList) or len(parent) < 2:
            continue
        paths = tuple(f"{path}.{name}" for name in parent._modules)
        if len(paths) > len(best) and _is_chain(paths, at):
            best = paths
    return best


def _is_chain(paths: tuple[str, ...], at: dict[Key, tuple[int, _Event]]) -> bool:
    first = before = None
    for path in paths:
        begin, end = at.get((path, "inputs", 0)), at.get((path, "output", 0))
        if begin is None or end is None or (path, "inputs", 1) in at:
            return False
        number, taken = begin
        first = number if first is None else first
        if taken.opaque or not taken.tensors or not end[1].tensors:
            return False
        if before is not None and taken.tensors[0][0] != before.tensors[0][0]:
            return False
        if any(born > first for _, born in taken.tensors[1:]):
            return False
        before = end[1]
    return True


def _arrivals(
    module: torch.nn.Module,
    make_inputs: Callable[[int, int], tuple[tuple[Any, ...], dict[str, Any]]],
    batch: int,
    tokens: int,
) -> list[_Event]:
    events: list[_Event] = []
    births = _Births(events)

    def note(key: Key, value: Any) -> None:
        tensors, opaque = [], False
        for leaf in leaves(value):
            if isinstance(leaf, torch.Tensor):
                tensors.append(births.of(leaf))
            elif type(leaf) not in ATOMS and not type(leaf).__name__.endswith("Cache"):
                opaque = True
        events.append(_Event(key, _shapes(value), tuple(tensors), opaque))

    calls: dict[str, int] = {}
    open_calls: dict[str, list[int]] = {}

    def before(path: str) -> Callable[..., None]:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            call = calls[path] = calls.get(path, -1) + 1
            open_calls.setdefault(path, []).append(call)
            note((path, "inputs", call), (args, kwargs))

        return hook

    def after(path: str) -> Callable[..., None]:
        def hook(_: Any, args: Any, output: Any) -> None:
            note((path, "output", open_calls[path].pop()), output)

        return hook

    handles = []
    training = module.training
    try:
        for path, child in module.named_modules():
            handles.append(child.register_forward_pre_hook(before(path), with_kwargs=True))
            handles.append(child.register_forward_hook(after(path)))
        module.eval()
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            args, kwargs = make_inputs(batch, tokens)
            with births:
                module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        module.train(training)
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
