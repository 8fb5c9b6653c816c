"""Owns that torch and the model are as they were, whatever ends a run: also a second Ctrl-C, that comes
while the first one is cleaned up after.

Python raises KeyboardInterrupt where a function is called, has just returned, or a loop turns, and
nowhere else. So a context manager that is written in Python can be interrupted before the first line
of its `__exit__`, and what a function returns can be lost before it is kept. Here, what is to be undone
is written down before it is done; what undoes it can be called again; and it is called between a `try`
and its `finally` with nothing between them, once more for each interrupt.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.utils._python_dispatch as dispatch
from torch.utils.hooks import RemovableHandle

T = TypeVar("T")

_FLAGS = (
    "_is_in_torch_dispatch_mode",
    "_is_in_non_infra_torch_dispatch_mode",
    "_is_in_any_mode_without_ignore_compile_internals",
)
_DEVICES = ("cpu", "cuda")


class TorchState(NamedTuple):
    """What of torch's state in this thread a forward or a trial on fake tensors changes for a while."""

    grad: bool
    dtype: torch.dtype
    modes: tuple[Any, ...]
    functions: int
    lifts: bool
    meta: bool
    flags: tuple[Any, ...]
    autocast: tuple[bool, ...]

    @classmethod
    def now(cls) -> TorchState:
        return cls(
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            tuple(dispatch._get_current_dispatch_mode_stack()),
            torch._C._len_torch_function_stack(),
            torch._C._only_lift_cpu_tensors(),
            torch._C._meta_in_tls_dispatch_include(),
            tuple(getattr(dispatch, name, None) for name in _FLAGS),
            tuple(torch.is_autocast_enabled(device) for device in _DEVICES),
        )

    def restore(self) -> None:
        """Make it so again."""
        found = TorchState.now()
        if found == self:
            return
        while found.modes and not _begins(self.modes, found.modes):
            torch._C._pop_torch_dispatch_stack(_key(found.modes[-1]))
            found = TorchState.now()
        for mode in self.modes[len(found.modes) :]:
            torch._C._push_on_torch_dispatch_stack(mode)
        while torch._C._len_torch_function_stack() > self.functions:
            torch._C._pop_torch_function_stack()
        for name, value in zip(_FLAGS, self.flags, strict=True):
            if value is not None:
                setattr(dispatch, name, value)
        torch._C._set_only_lift_cpu_tensors(self.lifts)
        torch._C._set_meta_in_tls_dispatch_include(self.meta)
        for device, enabled in zip(_DEVICES, self.autocast, strict=True):
            if torch.is_autocast_enabled(device) is not enabled:
                torch.set_autocast_enabled(device, enabled)
        if torch.get_default_dtype() is not self.dtype:
            torch.set_default_dtype(self.dtype)
        torch._C._set_grad_enabled(self.grad)


def _begins(whole: tuple[Any, ...], part: tuple[Any, ...]) -> bool:
    return len(part) <= len(whole) and all(a is b for a, b in zip(whole, part, strict=False))


def _key(mode: Any) -> Any:
    return getattr(mode, "_mode_key", None)


def unharmed(work: Callable[[], T], undo: Callable[[], None] | None = None) -> T:
    """`work()`; then torch's state is as it was, and `undo()` is done, however it ends.

    Args:
        undo: may be called again where it was interrupted.
    """
    before = TorchState.now()

    def restore() -> None:
        before.restore()
        if undo is not None:
            undo()

    # No call may stand between these lines: each `finally` is entered also when the one before it was
    # interrupted. What there is to do is done after the first that was not; the others find nothing.
    try:
        try:
            try:
                result = work()
            finally:
                restore()
        except BaseException:
            restore()
            raise
    except BaseException:
        restore()
        raise
    return result


def put_back(places: Iterable[tuple[Any, str]]) -> Callable[[], None]:
    """Gives what makes attributes be what they are now.

    Args:
        places: owners and names.
    """
    before = [(owner, name, getattr(owner, name)) for owner, name in places]

    def put() -> None:
        for owner, name, value in before:
            if getattr(owner, name) is not value:
                setattr(owner, name, value)

    return put


def uninterrupted(work: Callable[[], T]) -> T:
    """`work()`, with a Ctrl-C held back to its end; for what is short.

    On fake tensors, torch's own Python code runs below its C++ code, which ends the process where a
    mode was not left as it was entered: there an interrupt cannot be undone afterwards.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        return unharmed(work)
    held: list[Any] = []
    try:
        signal.signal(signal.SIGINT, lambda *given: held.append(given))
        result = unharmed(work)
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(*held[0])
    return result


def add_hook(
    handles: list[RemovableHandle],
    module: torch.nn.Module,
    hook: Callable[..., Any],
    *,
    inputs: bool = False,
    first: bool = False,
    always: bool = False,
) -> None:
    """Register a forward hook, or with `inputs` a pre-hook with keywords. Its handle is in the list
    before the hook is on the module: what torch's own functions give afterwards may be lost.

    Args:
        first: before the hooks that are there.
        always: also when the forward raises.
    """
    table: Any = module._forward_pre_hooks if inputs else module._forward_hooks
    kinds: Any = module._forward_hooks_always_called if always else None
    if inputs:
        kinds = module._forward_pre_hooks_with_kwargs
    handle = RemovableHandle(table, extra_dict=kinds)
    handles.append(handle)
    if kinds is not None:
        kinds[handle.id] = True
    table[handle.id] = hook
    if first:
        table.move_to_end(handle.id, last=False)


def remove_hooks(handles: list[RemovableHandle]) -> None:
    """Remove hooks; may be called again where it was interrupted."""
    while handles:
        handles[-1].remove()
        handles.pop()
