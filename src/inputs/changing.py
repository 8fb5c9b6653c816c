"""Owns the arguments that a forward changes: a cache, a generator, a logits processor with a state.

A block may take several forwards for what its user sees as one: waves, prompts that run alone, values
on demand. Each has such arguments as they were before the first. The last forward of the block has the
user's own, which are afterwards as one forward leaves them; the others have copies.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from ..tracing.errors import BlockError
from ..tracing.job import Job
from ..tracing.structure import ATOMS, deep_copy, leaves, map_leaves

_FIXED = (
    torch.Tensor,
    torch.nn.Module,
    type,
    enum.Enum,
    functools.partial,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
)
#: What only an array, a configuration, a tokenizer, a streamer has: no forward changes the first three,
#: and a streamer is to hear of every prompt.
_TELLING = ("__array__", "__array_interface__", "to_json_string", "convert_ids_to_tokens", "put")


def is_changed(value: Any) -> bool:
    """True for an argument that a forward may change. Nobody tells of an object of another library, so
    it is taken for one unless it is known as something else."""
    if type(value) in ATOMS or isinstance(value, _FIXED):
        return False
    if isinstance(value, torch.Generator):
        return True
    if not hasattr(value, "__dict__") or type(value).__module__.startswith(__package__[:9]):
        return False
    return not any(hasattr(value, name) for name in _TELLING)


def changed_in(value: Any) -> list[Any]:
    """The arguments in a structure that a forward may change."""
    return [leaf for leaf in leaves(value) if is_changed(leaf)]


class Statistics:
    """What modules in training mode keep of the forwards that they see, such as BatchNorm's means. A
    forward for a value on demand is none that they count: the block's own comes after it."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._before = [
            (child._buffers, name, buffer, buffer.clone())
            for child in module.modules()
            if child.training
            for name, buffer in child._buffers.items()
            if buffer is not None and not buffer.is_meta
        ]

    def put_back(self) -> bool:
        """Let them be what they were; True if a forward has been counted."""
        counted = False
        with torch.no_grad():
            for held, name, buffer, value in self._before:
                # Not by its `_version`, which the kernels of BatchNorm leave as it is.
                if held.get(name) is not buffer or not torch.equal(buffer, value):
                    held[name], counted = buffer, True
                    buffer.copy_(value)
        return counted


class Changing:
    """The arguments of one block that its forwards change."""

    def __init__(self, job: Job) -> None:
        given = [
            job.entry.options,
            *(p.arguments for p in job.prompts if p is not None),
        ]
        self._found = {id(one): one for part in given if part for one in changed_in(part)}
        self._location = job.location

    def __bool__(self) -> bool:
        return bool(self._found)

    @property
    def kind(self) -> str:
        """The type of the first."""
        return next((type(one).__name__ for one in self._found.values()), "")

    def again(self) -> Callable[[Any], Any]:
        """A function that puts copies into a structure, the same copy wherever the same object is.

        Raises:
            BlockError: one cannot be copied.
        """
        memo: dict[int, Any] = {}
        copies: dict[int, Any] = {}
        for key, one in self._found.items():
            if isinstance(one, torch.Generator):
                memo[key] = torch.Generator(one.device)
                memo[key].set_state(one.get_state())
            # What hangs on it and is no part of its state.
            for part in vars(one).values() if hasattr(one, "__dict__") else ():
                if isinstance(part, torch.nn.Module) or hasattr(part, "convert_ids_to_tokens"):
                    memo[id(part)] = part
        for key, one in self._found.items():
            try:
                copies[key] = deep_copy(one, memo)
            except Exception as error:  # whatever keeps an object from being copied
                raise BlockError.uncopied(type(one).__name__, str(error), self._location) from error

        def swap(leaf: Any) -> Any:
            return copies.get(id(leaf), leaf)

        return lambda value: map_leaves(swap, value)
