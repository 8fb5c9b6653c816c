"""Owns hook functions on named places: `add_hook`, contexts of hooks, and how a run calls them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..envoy.spellings import no_lens_name
from ..tracing.errors import InputError, UnavailableNameError

HookFunction = Callable[..., Any]
NamesFilter = str | Callable[[str], bool]


@dataclasses.dataclass
class Hook:
    """One function on one place.

    Attributes:
        direction: "fwd" or "bwd".
        level: depth of the context that added it; None for `add_hook`.
        thread: that of the context, in whose forwards alone it is called; None for all.
    """

    function: HookFunction
    direction: str
    permanent: bool = False
    level: int | None = None
    thread: int | None = None

    @property
    def heard(self) -> bool:
        """Whether forwards of this thread call it."""
        return self.thread is None or self.thread == get_ident()


class HookPoint:
    """A place as a hook function is told of it: `hook.name`, `hook.layer()`, and `hook.ctx`, a
    dictionary that stays until contexts are cleared."""

    def __init__(self, name: str, owner: Hooks) -> None:
        self.name = name
        self.ctx: dict[Any, Any] = {}
        self.hooks: list[Hook] = []
        self._owner = owner

    def layer(self) -> int:
        """The layer of the place.

        Raises:
            InputError: it is in no layer.
        """
        parts = self.name.split(".")
        if parts[0] != "blocks":
            raise InputError(f"`{self.name}` is in no layer")
        return int(parts[1])

    def add_hook(
        self,
        hook: HookFunction,
        dir: str = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Call `hook(tensor, hook=point)` when a run passes; what it returns replaces the tensor."""
        if dir not in ("fwd", "bwd"):
            raise InputError(f'dir is "fwd" or "bwd", not {dir!r}')
        one = Hook(hook, dir, is_permanent, level)
        self.hooks.insert(0 if prepend else len(self.hooks), one)

    def add_perma_hook(self, hook: HookFunction, dir: str = "fwd") -> None:
        """As `add_hook`; stays when hooks are reset."""
        self.add_hook(hook, dir, is_permanent=True)

    def remove_hooks(
        self, dir: str = "both", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Take functions away, of one context's level or all."""

        def goes(one: Hook) -> bool:
            if dir not in ("both", one.direction) or (one.permanent and not including_permanent):
                return False
            return level is None or (one.level == level and one.heard)

        self.hooks = [one for one in self.hooks if not goes(one)]

    def clear_context(self) -> None:
        self.ctx.clear()

    def __repr__(self) -> str:
        return f"<hook point {self.name}, {len(self.hooks)} hooks>"


class Hooks:
    """The hook points of a model.

    Attributes:
        points: by name, in the order in which a forward passes them.
    """

    def __init__(self, names: Iterable[str], vocabulary: Any) -> None:
        self.points = {name: HookPoint(name, self) for name in names}
        self._levels = threading.local()
        self._lock = threading.Lock()
        self._vocabulary = vocabulary

    def find(self, wanted: Any) -> list[HookPoint]:
        """The points that a name, a list of names or a predicate means.

        Raises:
            UnavailableNameError: none.
        """
        if isinstance(wanted, str):
            if wanted not in self.points:
                raise no_lens_name(self._vocabulary, wanted, self.points)
            return [self.points[wanted]]
        if callable(wanted):
            found = [point for name, point in self.points.items() if wanted(name)]
            if not found:
                raise UnavailableNameError(
                    f"the filter matches none of the {len(self.points)} places of "
                    f"{self._vocabulary.kind}: {', '.join(list(self.points)[:4])}, …"
                )
            return found
        if isinstance(wanted, (list, tuple, set, frozenset)):
            names = [point for one in wanted for point in self.find(one)]
            return list(dict.fromkeys(names))
        raise InputError(
            f"a filter is a name, a list of names or a function of a name, not {type(wanted).__name__}"
        )

    @property
    def level(self) -> int:
        """How many contexts of this thread are open."""
        return getattr(self._levels, "depth", 0)

    def active(self) -> list[HookPoint]:
        """The points that have functions."""
        return [p for p in self.points.values() if any(one.heard for one in p.hooks)]

    def reset(
        self,
        clear_contexts: bool = True,
        direction: str = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        with self._lock:
            for point in self.points.values():
                if point.hooks:
                    point.remove_hooks(direction, including_permanent, level)
                if clear_contexts:
                    point.clear_context()

    @contextmanager
    def added(
        self,
        forward: Iterable[tuple[Any, HookFunction]],
        backward: Iterable[tuple[Any, HookFunction]],
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[None]:
        """Functions that are there while the context is open, and only these are taken away."""
        # Names are looked up first: a wrong one leaves nothing behind.
        found = [
            (point, function, direction)
            for pairs, direction in ((forward, "fwd"), (backward, "bwd"))
            for wanted, function in pairs
            for point in self.find(wanted)
        ]
        level = self._levels.depth = self.level + 1
        try:
            with self._lock:
                for point, function, direction in found:
                    point.hooks.append(Hook(function, direction, False, level, get_ident()))
            yield
        finally:
            if reset_hooks_end:
                self.reset(clear_contexts, level=level)
            self._levels.depth = level - 1


def call_forward(value: torch.Tensor, point: HookPoint, hooks: list[Hook]) -> torch.Tensor:
    """What the functions of a point make of a value. They may change it in place."""
    if isinstance(value, FakeTensor):
        return value  # a shape is asked for, and nothing runs: a function is called once a run
    value = value.clone()
    for one in hooks:
        result = one.function(value, hook=point)
        if result is not None:
            value = result
    return value


def watch_gradient(
    value: torch.Tensor, functions: list[Callable[[torch.Tensor], Any]]
) -> torch.Tensor:
    """The same value, with its gradient going through functions, each of which may replace it."""
    if not torch.is_grad_enabled() or not value.is_floating_point():
        return value
    watched = value.clone() if value.requires_grad else value.detach().clone().requires_grad_()
    for function in functions:
        watched.register_hook(function)  # type: ignore[no-untyped-call]
    return watched


def backward_function(point: HookPoint, hook: Hook) -> Callable[[torch.Tensor], Any]:
    """A function for `Tensor.register_hook`."""

    def run(gradient: torch.Tensor) -> Any:
        result = hook.function(gradient, hook=point)
        return result[0] if isinstance(result, tuple) else result

    return run
