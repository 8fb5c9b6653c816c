"""Owns which path a call belongs to where one module object stands at several paths.

A hook knows the object that is called, not the name by which it was called. So while a forward is
watched, each further place of such an object holds a *twin*: another object with the same `__dict__`,
hence the same weights, children, hooks and state. Which twin is called tells the path; for what is
inside a shared module, which twin of that is being called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import get_ident
from types import TracebackType
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

Place = tuple[torch.nn.Module, str]


def further_places(root: torch.nn.Module) -> list[Place]:
    """Parent and name of every place at which a module stands once more; none in most models."""
    seen = {id(root)}
    stack, found = [root], list[Place]()
    while stack:
        parent = stack.pop()
        for name, child in parent._modules.items():
            if child is None:
                continue
            if id(child) in seen:
                found.append((parent, name))
            else:
                seen.add(id(child))
                stack.append(child)
    return found


class Twins:
    """The twins of one watched forward, as a context. It costs a walk over the tree, 1 µs a module.

    Attributes:
        _running: for each shared module, by its `__dict__`, the twins that are being called now.
    """

    __slots__ = ("_handles", "_places", "_root", "_running", "_thread")

    def __init__(self, root: torch.nn.Module) -> None:
        self._root = root
        self._places: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []
        self._handles: list[RemovableHandle] = []
        self._running: dict[int, list[torch.nn.Module]] = {}
        self._thread = get_ident()

    def __enter__(self) -> Twins:
        try:
            for parent, name in further_places(self._root):
                module = parent._modules[name]
                assert module is not None
                twin = object.__new__(type(module))
                object.__setattr__(twin, "__dict__", vars(module))
                if id(vars(module)) not in self._running:
                    running = self._running[id(vars(module))] = []
                    self._watch(module, running)
                self._places.append((parent, name, module))
                parent._modules[name] = twin
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        # A second Ctrl-C may arrive half-way: what it left is done by the next call.
        try:
            self._put_back()
        finally:
            self._put_back()

    def _put_back(self) -> None:
        while self._places:
            parent, name, module = self._places[-1]
            parent._modules[name] = module
            self._places.pop()
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()

    def _watch(self, module: torch.nn.Module, running: list[torch.nn.Module]) -> None:
        def begins(twin: torch.nn.Module, _: Any) -> None:
            if get_ident() == self._thread:
                running.append(twin)

        self._handles.append(module.register_forward_pre_hook(begins, prepend=True))

    def seal(self) -> None:
        """All other hooks are installed: a call ends after the last of them."""
        done = set[int]()
        for _, _, module in self._places:
            key = id(vars(module))
            if key not in done:
                done.add(key)
                ends = self._ends(self._running[key])
                self._handles.append(module.register_forward_hook(ends, always_call=True))

    def _ends(self, running: list[torch.nn.Module]) -> Callable[..., None]:
        def ends(_: torch.nn.Module, __: Any, ___: Any) -> None:
            if get_ident() == self._thread:
                running.pop()

        return ends

    def here(self, path: str) -> Callable[[], bool] | None:
        """What tells whether a call belongs to a path; None where nothing on it is shared."""
        if not self._running or not path:
            return None
        wanted: list[tuple[list[torch.nn.Module], torch.nn.Module]] = []
        module = self._root
        for name in path.split("."):
            module = module._modules[name]  # type: ignore[assignment]
            running = self._running.get(id(vars(module)))
            if running is not None:
                wanted.append((running, module))
        if not wanted:
            return None
        return lambda: all(bool(running) and running[-1] is twin for running, twin in wanted)

    def hook(self, path: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook that hears the calls at one path alone."""
        here = self.here(path)
        return hook if here is None else lambda *given: hook(*given) if here() else None

    def forward(
        self, path: str, forward: Callable[..., Any], original: Callable[..., Any]
    ) -> Callable[..., Any]:
        """`forward` for the calls at one path, `original` for those at others."""
        here = self.here(path)
        if here is None:
            return forward

        # Others look at the signature.
        @functools.wraps(original)
        def either(*args: Any, **kwargs: Any) -> Any:
            return (forward if here() else original)(*args, **kwargs)

        return either
