"""Owns the hooks: installs those of one pass on a real model, and always removes them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import get_ident
from types import TracebackType
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..tracing.errors import LoadError
from .interrupts import add_hook, remove_hooks
from .plan import Pass
from .prefix import Prefix
from .run import Run, Site
from .source import forward_name, is_inner, put_back, tapped_forward
from .twins import Twins


def at_path(module: torch.nn.Module, path: str) -> torch.nn.Module:
    """The module at a dotted path. As `get_submodule`, in a fifth of its time."""
    if path:
        for name in path.split("."):
            module = module._modules[name]  # type: ignore[assignment]
    return module


def _refuse_compiled(module: torch.nn.Module, path: str) -> None:
    if module.__dict__.get("_compiled_call_impl") is not None:
        raise LoadError.compiled_in_place(path)
    if "_orig_mod" in module._modules:
        raise LoadError.compiled(f"`{path}` is compiled by torch.compile")


_HOOKED = ("output", "inputs")


class Patcher:
    """The hooks of one pass, as a context.

    Only the modules that the pass names are touched, at 2 to 5 µs each.
    """

    __slots__ = ("_arrive", "_handles", "_pass", "_prefix", "_replaced", "_root", "_run", "_twins")

    def __init__(
        self, root: torch.nn.Module, run: Run, one: Pass | None = None, prefix: Prefix | None = None
    ) -> None:
        self._root = root
        self._arrive: Callable[..., Any] = run.arrive
        self._run = run
        self._pass = one
        self._prefix = prefix
        self._handles: list[RemovableHandle] = []
        self._replaced: list[tuple[torch.nn.Module, str, Any]] = []
        self._twins = Twins(root)
        run.undo.append(self._remove)

    def __enter__(self) -> None:
        twins = self._twins
        try:
            twins.__enter__()
            others = [site for site in self._run.sites if site.port not in _HOOKED]
            if others:
                self._replace_forwards(others)
            for site in self._run.sites:
                if site.port == "output":
                    module = self._at(site.path)
                    hook = twins.hook(site.path, _output_hook(self._run, site, self._arrive))
                    add_hook(self._handles, module, hook)
                elif site.port == "inputs":
                    module = self._at(site.path)
                    hook = twins.hook(site.path, _inputs_hook(self._run, site, self._arrive))
                    add_hook(self._handles, module, hook, inputs=True)
            if self._prefix is not None and self._pass is not None:
                for block in self._pass.keep:
                    module = self._at(self._prefix.path(block))
                    hook = _keep_hook(self._run, self._prefix, self._pass, block)
                    # Before hooks of the module's owner: they run again where variants start.
                    add_hook(self._handles, module, hook, first=True)
            twins.seal()
        except BaseException:
            self._remove()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()

    def _replace_forwards(self, sites: list[Site]) -> None:
        """Reach inner operations and skipped modules, which no hook reaches."""
        run, inner = self._run, dict[str, dict[str, Any]]()
        if any(site.port.startswith("functions.") for site in sites):
            self._arrive = _uncounted(run.arrive)
        for site in sites:
            if is_inner(site.port):
                inner.setdefault(site.path, {})[site.port] = _tap(run, site, self._arrive)
        # All are made of the forwards as they are: one object may stand at several paths.
        tapped = []
        for path, ports in inner.items():
            module = self._at(path)
            tapped.append((path, module, tapped_forward(module, path, ports, run.listens)))
        for path, module, forward in tapped:
            name = forward_name(module)
            self._replace(module, name, self._twins.forward(path, forward, getattr(module, name)))
        for site in sites:
            if site.port == "skip":
                module, path = self._at(site.path), site.path
                forward = _skipping(run, site, module.forward)
                self._replace(module, "forward", self._twins.forward(path, forward, module.forward))

    def _at(self, path: str) -> torch.nn.Module:
        """The module at a path.

        Raises:
            LoadError: it, or what it is in, was compiled since it was wrapped: no hook would run.
        """
        module, here = self._root, ""
        _refuse_compiled(module, here)
        for name in path.split(".") if path else ():
            module = module._modules[name]  # type: ignore[assignment]
            here = f"{here}.{name}" if here else name
            _refuse_compiled(module, here)
        return module

    def _replace(self, module: torch.nn.Module, name: str, forward: Callable[..., Any]) -> None:
        """Give this instance another forward until the pass is over."""
        # accelerate keeps a forward of its own on the instance.
        self._replaced.append((module, name, module.__dict__.get(name)))
        setattr(module, name, forward)

    def _remove(self) -> None:
        put_back(self._replaced)
        remove_hooks(self._handles)
        self._twins.__exit__(None, None, None)


# Arrivals of another thread's forward, or of a module applied by hand, are not the run's.


def _uncounted(arrive: Callable[..., Any]) -> Callable[..., Any]:
    """What the graph computes is none of the torch functions that a forward calls."""

    def quiet(site: Site, value: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return arrive(site, value)

    return quiet


def _output_hook(run: Run, site: Site, arrive: Callable[..., Any]) -> Callable[..., Any]:
    thread = run.thread

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        if run.suspended or get_ident() != thread:
            return None
        return arrive(site, output)

    return hook


def _keep_hook(run: Run, prefix: Prefix, one: Pass, block: int) -> Callable[..., None]:
    thread = run.thread

    def hook(_module: Any, _args: Any, output: Any) -> None:
        if not run.suspended and get_ident() == thread:
            prefix.keep(one, block, output, run.places, run.rows)
            run.arrived()

    return hook


def _tap(run: Run, site: Site, arrive: Callable[..., Any]) -> Callable[..., Any]:
    thread = run.thread
    if site.port.endswith("skip"):

        def skip(compute: Callable[[], Any], inputs: Any) -> Any:
            if run.suspended or get_ident() != thread:
                return compute()
            return run.skip(site, compute, inputs)

        return skip

    def tap(value: Any) -> Any:
        if run.suspended or get_ident() != thread:
            return None
        return arrive(site, value)

    return tap


def _skipping(run: Run, site: Site, original: Callable[..., Any]) -> Callable[..., Any]:
    thread = run.thread

    # Others look at the signature: `generate` checks its keywords against the root's.
    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if run.suspended or get_ident() != thread:
            return original(*args, **kwargs)
        return run.skip(site, lambda: original(*args, **kwargs), (args, kwargs))

    return forward


def _inputs_hook(run: Run, site: Site, arrive: Callable[..., Any]) -> Callable[..., Any]:
    thread = run.thread

    def hook(_module: Any, args: Any, kwargs: Any) -> Any:
        if run.suspended or get_ident() != thread:
            return None
        return arrive(site, (args, kwargs))

    return hook
