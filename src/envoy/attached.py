"""Owns what a call of an attached module on proxies is: it is recorded operation by operation, and it
and the modules inside it are places like those of the model, `layer.sae.encoder.output`.
"""

from __future__ import annotations

from typing import Any

import torch

from ..tracing.node import HookPoint
from ..tracing.proxy import Proxy
from ..tracing.recording import OPEN, Recording
from ..tracing.structure import leaves
from ..tracing.template import pass_through


def open_recording(*values: Any) -> Recording | None:
    """The block that is open and to which a proxy among the values belongs."""
    for leaf in leaves(values):
        if isinstance(leaf, Proxy) and leaf._recording.state is OPEN:
            return leaf._recording
    return None


def record(module: torch.nn.Module, path: str, args: Any, kwargs: Any) -> Any:
    """Call `module` on proxies; what it and its modules take and give is at a place under `path`."""
    recording = open_recording(args, kwargs)
    assert recording is not None
    handles = []

    def ours(value: Any) -> bool:
        # Another thread may call the same module, on other values.
        return open_recording(value) is recording

    def watch(place: str, child: torch.nn.Module) -> None:
        def before(_module: Any, args: Any, kwargs: Any) -> Any:
            if not ours((args, kwargs)):
                return None
            taken = pass_through(recording, HookPoint(place, "inputs"), (args, kwargs))
            positional, named = taken[0], taken[1]
            return (
                tuple(positional[i] for i in range(len(args))),
                {key: named[key] for key in kwargs},
            )

        def after(_module: Any, _args: Any, output: Any) -> Any:
            if not ours(output):
                return None
            return pass_through(recording, HookPoint(place, "output"), output)

        handles.append(child.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(child.register_forward_hook(after))

    try:
        for name, child in module.named_modules():
            watch(f"{path}.{name}" if name else path, child)
        return module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
