"""Owns `Schedule`: what a model's forward does, learned without running it.

Two forwards on fake tensors with different sizes tell the order of the modules, the structure of
what goes in and comes out of each, and what every axis counts: a size that went 2 → 3 with the
batch is the batch, 13 → 17 the tokens, 26 → 51 both flattened into one.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from ..tracing.errors import GraftworkError, ScheduleError
from ..tracing.node import HookPoint
from ..tracing.structure import ATOMS, children, leaves, rebuild
from .interrupts import add_hook, remove_hooks, unharmed, uninterrupted
from .rows import (
    BATCH,
    BATCH_TARGET,
    BATCH_TOKEN,
    FIXED,
    KEY,
    TARGET,
    TOKEN,
    UNKNOWN,
    Axis,
    TensorAxes,
)
from .source import forward_name, put_back, tapped_forward
from .twins import Twins

#: (batch, tokens) of the two trial forwards.
SIZES: tuple[tuple[int, ...], ...] = ((2, 13), (3, 17))
#: By the tokens of a trial, those of a decoder that has its own.
TARGETS = {13: 11, 17: 19}


def behind_cache(most: int | None) -> tuple[tuple[int, ...], ...]:
    """(batch, tokens, past) of the trial forwards behind a cache that has seen `past` tokens: one, and
    more than any cache keeps. A fake tensor costs the same at any size.

    Args:
        most: tokens that the model can have in all; None where nothing limits them.
    """
    past = 1 << 24 if most is None else max(2, most - max(TARGETS.values()))
    return (2, 13, 1), (3, 17, past), (2, 13, past)


Key = tuple[str, str, int]


@dataclasses.dataclass(slots=True)
class Visit:
    """One arrival in a forward: its position in the order, and the axes of its value.

    Attributes:
        stable: the forward does not write into its memory later.
    """

    order: int
    axes: Any
    stable: bool = False


@dataclasses.dataclass(slots=True)
class Schedule:
    """The arrivals of one forward.

    Attributes:
        visits: by (path, port, call).
        chain: paths of the blocks that hand the hidden states on to each other and nothing else;
            empty if there are none, or if that is not certain. See `find_chain`.
        callees: the functions that measured inner operations call, by path and the port's beginning;
            at a module whose torch functions are counted, their names.
    """

    visits: dict[Key, Visit]
    chain: tuple[str, ...] = ()
    callees: dict[tuple[str, str], Any] = dataclasses.field(default_factory=dict)

    def find(self, hook_point: HookPoint) -> Visit | None:
        path, port, _, call = hook_point
        if port.endswith("skip"):
            # Decided right after the inputs, and what is written is a result.
            place = port.removesuffix("skip")
            begin = self.visits.get((path, f"{place}inputs", call))
            end = self.visits.get((path, f"{place}output", call))
            return Visit(begin.order, end.axes) if begin and end else None
        return self.visits.get((path, port, call))

    def axes(self, hook_point: HookPoint) -> Any:
        visit = self.find(hook_point)
        return None if visit is None else visit.axes


def measure(
    module: torch.nn.Module,
    make_inputs: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]],
    sorts: Callable[[torch.nn.Module], bool] = lambda module: False,
    inner: Iterable[tuple[str, str]] = (),
    sizes: tuple[tuple[int, ...], ...] = SIZES,
) -> Schedule:
    """Run `module` a few times on fake tensors and compare.

    Args:
        module: a skeleton on the meta device, or a real module.
        make_inputs: called under the fake mode with the sizes of each trial; gives args and kwargs of
            the forward. What it runs of the module to have them is not noted.
        sorts: true for modules that bring the tokens of the batch into an order that depends on the
            data, as experts do. What is inside them belongs to no prompt, and is not in the schedule.
        inner: operations inside forwards that are measured, too: paths of modules, and ports.
        sizes: of the trials, `SIZES` or those of `behind_cache`.

    Raises:
        ScheduleError: the module cannot be run on fake tensors.
    """
    try:
        callees: dict[tuple[str, str], Any] = {}

        def trials() -> list[Any]:
            return [_arrivals(module, make_inputs, size, inner, callees) for size in sizes]

        with quiet():
            trial, *others = uninterrupted(trials)
        first = trial[0]
        every = module.named_modules(remove_duplicate=False)
        inside = tuple(f"{path}." for path, child in every if sorts(child))
    except GraftworkError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        raise ScheduleError.no_schedule("This block", reason) from error
    keys = [event.key for event in first]
    if any(keys != [event.key for event in other] for other, _ in others):
        raise ScheduleError.no_schedule(
            "This block", "the order of its modules depends on its input"
        )
    changed: dict[int, int] = {}
    for use in trial[1]:
        if use.changes:
            changed[use.memory] = max(use.time, changed.get(use.memory, 0))
    visits = {
        one.key: Visit(
            order,
            _compare([one.shapes, *(events[order].shapes for events, _ in others)], sizes),
            all(changed.get(memory, 0) <= order for _, memory, _ in one.tensors),
        )
        for order, one in enumerate(first)
        if not inside or not one.key[0].startswith(inside)
    }
    # Caches are left out of runs that skip blocks.
    chain = find_chain(module, *trial) if sizes is SIZES else ()
    if not all(_is_hidden(visits[path, "output", 0].axes) for path in chain):
        chain = ()
    return Schedule(visits, chain, callees)


_noise = logging.getLogger("torch._subclasses.fake_tensor")


def _nothing(_: logging.LogRecord) -> bool:
    return False


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch logs of errors on fake tensors before it raises them, with its own frames."""
    _noise.addFilter(_nothing)
    try:
        yield
    finally:
        _noise.removeFilter(_nothing)


def _is_hidden(axes: Any) -> bool:
    """True if the first tensor of what a block returns is [row, …] or [row, token, …]."""
    while not isinstance(axes, TensorAxes):
        axes = next(part for part in children(axes) or () if part is not None)
    roles = [axis.role for axis in axes.axes]
    return (
        roles[:1] == [BATCH]
        and axes.axes[0].factor == 1
        and set(roles[2:]) <= {FIXED}
        and roles[1:2] in ([], [FIXED], [TOKEN], [TARGET])
    )


@dataclasses.dataclass(slots=True)
class _Event:
    """One arrival of a trial forward.

    Attributes:
        shapes: its value with shapes for tensors.
        tensors: for each tensor in it, its identity, and its memory: which, and how many arrivals
            there had been when it was last written; 0 for what the forward was given.
        opaque: it holds an object that may carry values past the blocks.
    """

    key: Key
    shapes: Any
    tensors: tuple[tuple[int, int, int], ...]
    opaque: bool


@dataclasses.dataclass(slots=True)
class _Use:
    """An operation of a trial forward took a tensor.

    Attributes:
        time: how many arrivals there had been.
        memory: the storage of the tensor.
        written: how many arrivals there had been when that was last written.
        changes: the operation writes there.
    """

    time: int
    memory: int
    written: int
    changes: bool


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes who writes and who takes which memory in a trial forward.

    It keeps all tensors, as a freed one's identity would be given to another. Views have their
    tensor's memory.
    """

    def __init__(self, events: list[_Event]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uses: list[_Use] = []
        self._events = events
        self._kept: dict[int, torch.Tensor] = {}
        self._written: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        now = len(self._events)
        changed = []
        for argument, value in _named(func, args, kwargs):
            changes = argument.alias_info is not None and argument.alias_info.is_write
            for leaf in leaves(value):
                if isinstance(leaf, torch.Tensor):
                    _, memory, written = self.of(leaf)
                    self.uses.append(_Use(now, memory, written, changes))
                    if changes:
                        changed.append(memory)
        result = func(*args, **kwargs)
        for leaf in leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._kept.setdefault(id(leaf), leaf)
                self._written.setdefault(_memory(leaf), now)
        self._written.update(dict.fromkeys(changed, now))
        return result

    def of(self, tensor: torch.Tensor) -> tuple[int, int, int]:
        self._kept.setdefault(id(tensor), tensor)
        memory = _memory(tensor)
        return id(tensor), memory, self._written.setdefault(memory, 0)


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _named(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """The arguments of a torch operation with their declarations."""
    declared = func._schema.arguments
    yield from zip(declared, args, strict=False)
    by_name = {argument.name: argument for argument in declared}
    yield from ((by_name[name], value) for name, value in kwargs.items())


def find_chain(module: torch.nn.Module, events: list[_Event], uses: list[_Use]) -> tuple[str, ...]:
    """The longest list of sibling blocks of which each takes what the one before it gave.

    It is a chain only if nothing else that came to be inside it is used elsewhere. A tensor that a
    block takes besides the hidden states must be older than the first block (shared keys and values
    or a memory are not). Nor may any operation take memory that another block wrote, however it came
    by it: by an attribute, a dict, a closure, or from what a block returned besides the hidden
    states. No object that a block takes may hold a tensor. Caches are left out of runs that skip
    blocks. What this cannot see is state that is no tensor, such as a counter in Python.
    """
    at = {event.key: (number, event) for number, event in enumerate(events)}
    best: tuple[str, ...] = ()
    for path, parent in module.named_modules():
        if not isinstance(parent, torch.nn.ModuleList) or len(parent) < 2:
            continue
        if len({id(block) for block in parent}) < len(parent):
            continue  # what replaces the forward of one would replace that of another
        paths = tuple(f"{path}.{name}" for name in parent._modules)
        if len(paths) > len(best) and _is_chain(paths, at, uses):
            best = paths
    return best


def _is_chain(paths: tuple[str, ...], at: dict[Key, tuple[int, _Event]], uses: list[_Use]) -> bool:
    spans: list[tuple[int, int]] = []
    handed: list[int] = []  # the memory of the hidden states between blocks
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
        if any(written > first for _, _, written in taken.tensors[1:]):
            return False
        before = end[1]
        spans.append((number, end[0]))
        handed.append(end[1].tensors[0][1])
    assert first is not None
    last = spans[-1][1]
    inside = _inside(first, last, spans)
    for use in uses:
        if use.time <= first:
            continue
        block = inside.get(use.time)
        if use.changes and use.written <= first and block is not None and use.memory in handed:
            return False  # hidden states are changed in place: skipped blocks would not do that
        if use.written <= first or (use.written > last and use.time > last):
            continue
        if block is None:
            if use.time <= last or use.memory != handed[-1]:
                return False
        elif inside.get(use.written) != block and (not block or use.memory != handed[block - 1]):
            return False
    return not any(
        first < written <= last and memory != handed[-1]
        for number, event in at.values()
        if number > last
        for _, memory, written in event.tensors
    )


def _inside(first: int, last: int, spans: list[tuple[int, int]]) -> dict[int, int]:
    """For each count of arrivals between the first and the last block, in which block that is."""
    return {
        time: block
        for block, (begin, end) in enumerate(spans)
        for time in range(begin + 1, end + 1)
        if first < time <= last
    }


def _arrivals(
    module: torch.nn.Module,
    make_inputs: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]],
    size: tuple[int, ...],
    inner: Iterable[tuple[str, str]] = (),
    callees: dict[tuple[str, str], Any] | None = None,
) -> tuple[list[_Event], list[_Use]]:
    events: list[_Event] = []
    ledger = _Ledger(events)

    def note(key: Key, value: Any) -> None:
        # What is asked of tensors here is none of the forward's own torch functions.
        with torch._C.DisableTorchFunction():
            _note(key, value)

    def _note(key: Key, value: Any) -> None:
        tensors, opaque = [], False
        for leaf in leaves(value):
            if isinstance(leaf, torch.Tensor):
                tensors.append(ledger.of(leaf))
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

    def ports(path: str, prefixes: Iterable[str]) -> dict[str, Any]:
        """What takes in the values of inner operations."""
        found: dict[str, Any] = {}
        for prefix in prefixes:
            place = f"{path}:{prefix}"

            def begin(value: Any, place: str = place, prefix: str = prefix) -> None:
                call = calls[place] = calls.get(place, -1) + 1
                open_calls.setdefault(place, []).append(call)
                note((path, f"{prefix}.inputs", call), value)

            def end(value: Any, place: str = place, prefix: str = prefix) -> None:
                note((path, f"{prefix}.output", open_calls[place].pop()), value)

            def called(function: Any, prefix: str = prefix) -> None:
                if callees is not None:
                    callees[path, prefix] = function

            found.update({f"{prefix}.inputs": begin, f"{prefix}.output": end})
            found[f"{prefix}.found"] = called
        return found

    def counted(path: str) -> Callable[[list[str]], None]:
        def seen(names: list[str]) -> None:
            if callees is not None:
                callees[path, "functions"] = names

        return seen

    prefixes: dict[str, set[str]] = {}
    for path, port in inner:
        prefixes.setdefault(path, set()).add(port.rpartition(".")[0])
    replaced: list[tuple[torch.nn.Module, str, Any]] = []
    handles: list[RemovableHandle] = []
    modes = [(child, child.training) for child in module.modules()]
    twins = Twins(module)

    def run() -> None:
        twins.__enter__()
        for path, child in module.named_modules(remove_duplicate=False):
            begins, ends = twins.hook(path, before(path)), twins.hook(path, after(path))
            add_hook(handles, child, begins, inputs=True)
            add_hook(handles, child, ends)
        twins.seal()
        tapped = []
        for path, own in prefixes.items():
            child = module.get_submodule(path)
            wants = counted(path) if any(p.startswith("functions") for p in own) else None
            names = sorted(p for p in own if "." in p)
            forward = tapped_forward(child, path, ports(path, names), lambda: True, wants)
            tapped.append((path, child, forward))
        for path, child, forward in tapped:
            name = forward_name(child)
            replaced.append((child, name, child.__dict__.get(name)))
            setattr(child, name, twins.forward(path, forward, getattr(child, name)))
        module.eval()
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            args, kwargs = make_inputs(*size)
            events.clear()
            calls.clear()
            with ledger:
                module(*args, **kwargs)

    def undo() -> None:
        put_back(replaced)
        remove_hooks(handles)
        twins.__exit__(None, None, None)
        for child, training in modes:
            child.training = training

    unharmed(run, undo)
    return events, ledger.uses


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


def _compare(values: list[Any], sizes: tuple[tuple[int, ...], ...]) -> Any:
    """The axes of a value, from its shapes in each trial."""
    first = values[0]
    if isinstance(first, _Shape):
        if any(not isinstance(one, _Shape) or len(one.sizes) != len(first.sizes) for one in values):
            return None
        found = zip(*(one.sizes for one in values), strict=True)
        return TensorAxes(tuple(_axis(entries, sizes) for entries in found), first.dtype)
    if type(first) in ATOMS:
        return first
    parts = [part for part in map(children, values) if part is not None]
    if len(parts) < len(values) or len({len(part) for part in parts}) > 1:
        return None
    return rebuild(first, [_compare(list(each), sizes) for each in zip(*parts, strict=True)])


def _axis(entries: tuple[int, ...], sizes: tuple[tuple[int, ...], ...]) -> Axis:
    """What an axis counts that has so many entries in trials of these sizes."""
    if len(set(entries)) == 1:
        return Axis(FIXED, entries[0])
    batches, tokens, *past = zip(*sizes, strict=True)
    targets = tuple(TARGETS[one] for one in tokens)
    for role, units in (
        (BATCH, batches),
        (TOKEN, tokens),
        (BATCH_TOKEN, _times(batches, tokens)),
        (TARGET, targets),
        (BATCH_TARGET, _times(batches, targets)),
    ):
        factor, rest = divmod(entries[0], units[0])
        if not rest and entries == _times((factor,) * len(units), units):
            return Axis(role, factor)
    for held in past:
        for new in (tokens, targets):
            found = _keys(entries, new, held)
            if found is not None:
                return found
    return Axis(UNKNOWN, entries[0])


def _keys(entries: tuple[int, ...], new: tuple[int, ...], past: tuple[int, ...]) -> Axis | None:
    """An axis of keys, if they are those of so many new tokens behind so many in a cache."""
    factor, rest = divmod(entries[0], past[0] + new[0])
    if rest or not factor:
        return None
    kept = entries[-1] // factor - new[-1]
    axis = Axis(KEY, factor, None if kept == past[-1] else kept)
    each = zip(entries, new, past, strict=True)
    return axis if all(n == axis.size(0, t, t, p) for n, t, p in each) else None


def _times(ones: tuple[int, ...], others: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a * b for a, b in zip(ones, others, strict=True))
