"""Owns `Trial`: one forward of a skeleton on fake tensors, with every value that was seen on its way.

Values are compared by identity: a tensor that leaves one module and enters another is the same
object. `Trial` keeps them all, with the torch operation that made each, so that what is asked later
("what was added to the stream?") is read off what happened. What it concludes nothing from: names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ...intervention.source import forward_name, listing, put_back, tapped_forward
from ...tracing.errors import GraftworkError
from ...tracing.structure import leaves

#: One state of one tensor: operations that write into a tensor give it the next state.
Key = tuple[int, int]

#: Operations that show the same numbers in another form.
SAME = frozenset(
    "view _unsafe_view reshape clone transpose t permute expand contiguous _to_copy alias detach "
    "unsqueeze squeeze unbind split split_with_sizes slice select chunk as_strided lift_fresh "
    "_reshape_alias unflatten native_dropout dropout movedim".split()
)


@dataclasses.dataclass(slots=True)
class Made:
    """How a tensor came to be.

    Attributes:
        name: of the torch operation, without its overload: "add".
        takes: the tensors that it took.
        numbers: what it took besides tensors.
        modules: paths of the modules that were being run, the innermost last.
    """

    name: str
    takes: tuple[Key, ...]
    numbers: tuple[Any, ...]
    modules: tuple[str, ...]


@dataclasses.dataclass(slots=True)
class Event:
    """A value at a port: `parts` is the way from it to each of its tensors.

    Attributes:
        path: module.
        port: "inputs" or "output", of an operation in its forward with that before it.
        value: what was there.
        tensors: the tensors in it, by the way to each.
    """

    path: str
    port: str
    value: Any
    tensors: dict[tuple[Any, ...], Key]


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes each torch operation. It keeps all tensors, so that no identity is given twice."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors: dict[int, torch.Tensor] = {}
        self.made: dict[Key, Made] = {}
        self.modules: list[str] = []
        self._states: dict[int, int] = {}

    def key(self, tensor: torch.Tensor) -> Key:
        self.tensors.setdefault(id(tensor), tensor)
        return id(tensor), self._states.get(id(tensor), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(leaves((args, kwargs)))
        takes = tuple(self.key(leaf) for leaf in given if isinstance(leaf, torch.Tensor))
        numbers = tuple(leaf for leaf in given if isinstance(leaf, (int, float)))
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        written = name.endswith("_") and not name.endswith("__") and takes
        made = Made(name.rstrip("_") if written else name, takes, numbers, tuple(self.modules))
        for leaf in leaves(result):
            if isinstance(leaf, torch.Tensor):
                if written and id(leaf) == takes[0][0]:
                    self._states[id(leaf)] = self._states.get(id(leaf), 0) + 1
                self.made.setdefault(self.key(leaf), made)
        return result


def _parts(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, torch.Tensor):
        yield way, value
    elif isinstance(value, (tuple, list)):
        for number, part in enumerate(value):
            yield from _parts(part, (*way, number))
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _parts(part, (*way, name))


class Trial:
    """What one forward did.

    Attributes:
        batch, tokens: how large its input was.
        mode: the fake mode in which its tensors can be looked at.
        events: in the order in which they were.
        result: what the model returned.
        functions: what the operations inside forwards called, by (path, operation).
        untold: modules whose forward has no text, with the reason.
    """

    def __init__(self, batch: int, tokens: int) -> None:
        self.batch, self.tokens = batch, tokens
        self.mode: AbstractContextManager[Any] = FakeTensorMode(allow_non_fake_inputs=True)
        self.ledger = _Ledger()
        self.events: list[Event] = []
        self.result: Any = None
        self.functions: dict[tuple[str, str], Any] = {}
        self.untold: dict[str, str] = {}
        self._places: dict[Key, list[tuple[str, str, tuple[Any, ...]]]] | None = None

    def tensor(self, key: Key) -> torch.Tensor:
        return self.ledger.tensors[key[0]]

    def shape(self, key: Key) -> tuple[int, ...]:
        return tuple(self.tensor(key).shape)

    def made(self, key: Key) -> Made | None:
        return self.ledger.made.get(key)

    def event(self, path: str, port: str) -> Event | None:
        """The first value at a port."""
        return next((e for e in self.events if e.path == path and e.port == port), None)

    def first(self, path: str, port: str = "inputs") -> Key | None:
        """The tensor that is first at a port; of inputs, that which `input` means."""
        event = self.event(path, port)
        if event is None:
            return None
        if port.endswith("inputs"):
            args, kwargs = event.value
            place = (0, 0) if args else (1, next(iter(kwargs), None))
            return event.tensors.get(place)
        return event.tensors.get((), event.tensors.get((0,)))

    def places(self, key: Key) -> list[tuple[str, str, tuple[Any, ...]]]:
        """Every port at which a tensor was, in order."""
        if self._places is None:
            self._places = {}
            for event in self.events:
                for way, one in event.tensors.items():
                    self._places.setdefault(one, []).append((event.path, event.port, way))
        return self._places.get(key, [])

    def source_of(self, key: Key) -> Key:
        """The tensor whose numbers these are, before changes of form."""
        while True:
            made = self.made(key)
            if made is None or made.name not in SAME or not made.takes:
                return key
            key = made.takes[0]

    def back(self, key: Key, stops: Callable[[Key], bool], skip: bool = False) -> list[Key]:
        """The nearest tensors that `stops` holds for, among those that one was made of.

        Args:
            skip: not that one itself.
        """
        found: dict[Key, None] = {}
        seen: set[Key] = set()
        waiting = [key]
        while waiting:
            one = waiting.pop()
            if one in seen:
                continue
            seen.add(one)
            if stops(one) and not (skip and one == key):
                found[one] = None
                continue
            made = self.made(one)
            if made is not None:
                waiting.extend(reversed(made.takes))
        return list(found)

    def between(self, key: Key, ends: Iterable[Key]) -> list[str] | None:
        """Operations from one of `ends` to a tensor that change numbers; None if there is no way."""
        ends = set(ends)
        reaches: dict[Key, set[str] | None] = {}

        def walk(one: Key) -> set[str] | None:
            if one in ends:
                return set()
            if one in reaches:
                return reaches[one]
            reaches[one] = None
            made = self.made(one)
            if made is None:
                return None
            below = [found for found in map(walk, made.takes) if found is not None]
            if not below:
                return None
            own = set() if made.name in SAME else {made.name}
            reaches[one] = own.union(*below)
            return reaches[one]

        found = walk(key)
        return None if found is None else sorted(found)


def run_trial(
    module: torch.nn.Module,
    make_inputs: Callable[[int, int], tuple[tuple[Any, ...], dict[str, Any]]],
    size: tuple[int, int],
    told: Iterable[str] = (),
    inner: Iterable[tuple[str, str]] = (),
    fake: bool = True,
) -> Trial:
    """One forward on fake tensors.

    Args:
        module: a skeleton on the meta device.
        make_inputs: gives the inputs of the forward, from (batch, tokens).
        told: modules of which every operation in the text of the forward is noted.
        inner: operations further in that are noted, too: paths, and ports without "inputs".
        fake: without numbers; else the module must be a loaded one.
    """
    trial = Trial(*size)
    ledger = trial.ledger

    def note(path: str, port: str, value: Any) -> None:
        with torch._C.DisableTorchFunction():
            tensors = {way: ledger.key(one) for way, one in _parts(value)}
        trial.events.append(Event(path, port, value, tensors))

    def before(path: str) -> Callable[..., None]:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            ledger.modules.append(path)
            note(path, "inputs", (args, dict(kwargs)))

        return hook

    def after(path: str) -> Callable[..., None]:
        def hook(_: Any, args: Any, output: Any) -> None:
            ledger.modules.pop()
            note(path, "output", output)

        return hook

    def ports(path: str, prefixes: Iterable[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for prefix in prefixes:

            def begin(value: Any, prefix: str = prefix) -> None:
                note(path, f"{prefix}.inputs", (value[0], dict(value[1])))

            def end(value: Any, prefix: str = prefix) -> None:
                note(path, f"{prefix}.output", value)

            def called(function: Any, prefix: str = prefix) -> None:
                trial.functions.setdefault((path, prefix), function)

            found.update({f"{prefix}.inputs": begin, f"{prefix}.output": end})
            found[f"{prefix}.found"] = called
        return found

    wanted: dict[str, list[str]] = {}
    for path in told:
        child = module.get_submodule(path)
        try:
            names = listing(getattr(child, forward_name(child)), path).names
        except GraftworkError as error:
            trial.untold[path] = str(error)
            continue
        wanted[path] = [f"source.{name}" for name in names]
    for path, prefix in inner:
        wanted.setdefault(path, []).append(prefix)
    replaced: list[tuple[torch.nn.Module, str, Any]] = []
    handles = []
    modes = [(child, child.training) for child in module.modules()]
    try:
        for path, child in module.named_modules():
            handles.append(child.register_forward_pre_hook(before(path), with_kwargs=True))
            handles.append(child.register_forward_hook(after(path)))
        for path, prefixes in wanted.items():
            child = module.get_submodule(path)
            try:
                forward = tapped_forward(child, path, ports(path, prefixes), lambda: True)
            except GraftworkError as error:
                trial.untold[path] = str(error)
                continue
            name = forward_name(child)
            replaced.append((child, name, child.__dict__.get(name)))
            setattr(child, name, forward)
        module.eval()
        if not fake:
            trial.mode = nullcontext()
        with torch.no_grad(), trial.mode:
            args, kwargs = make_inputs(*size)
            with ledger:
                trial.result = module(*args, **kwargs)
    finally:
        put_back(replaced)
        for handle in handles:
            handle.remove()
        for child, training in modes:
            child.training = training
    return trial
