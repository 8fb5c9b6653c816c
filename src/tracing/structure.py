"""Owns walking nested values: tuples, named tuples, lists, dicts, slices, dataclasses, ModelOutput.

A container is rebuilt only if something inside it changed, so an untouched value keeps its identity.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

ATOMS = frozenset(
    {int, float, bool, str, bytes, complex, type(None), type(...), torch.dtype, torch.device}
)


def rebuild(container: Any, items: list[Any]) -> Any:
    """A container like `container` with `items` in the order of `children`."""
    kind: Any = type(container)
    if kind is tuple or kind is list:
        return kind(items)
    if kind is slice:
        return slice(*items)
    if isinstance(container, tuple):
        # Named tuples take fields one by one; torch.return_types take one sequence.
        return kind(*items) if hasattr(container, "_fields") else kind(items)
    if isinstance(container, dict):
        pairs = dict(zip(container.keys(), items, strict=True))
        # A ModelOutput is a dict and a dataclass; its constructor sets both from keywords.
        if hasattr(kind, "__dataclass_fields__"):
            return kind(**pairs)
        changed = copy.copy(container)
        changed.update(pairs)
        return changed
    changed = copy.copy(container)
    if isinstance(container, list):
        changed[:] = items
        return changed
    for field, item in zip(dataclasses.fields(container), items, strict=True):
        object.__setattr__(changed, field.name, item)
    return changed


def children(value: Any) -> list[Any] | None:
    """The parts of a container, or None for a leaf."""
    kind = type(value)
    if kind in ATOMS or isinstance(value, torch.Tensor):
        return None
    if isinstance(value, (tuple, list)):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    if kind is slice:
        return [value.start, value.stop, value.step]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return None


def map_leaves(function: Callable[[Any], Any], value: Any, own: bool = False) -> Any:
    """`value` with `function` applied to every leaf.

    Args:
        own: containers that can be changed are rebuilt in any case: later changes do not reach them.
    """
    if type(value) in ATOMS:
        return function(value)
    parts = children(value)
    if parts is None:
        return function(value)
    mapped = [map_leaves(function, part, own) for part in parts]
    keeps = not own or isinstance(value, (tuple, slice)) or callable(value)
    if keeps and all(new is old for new, old in zip(mapped, parts, strict=True)):
        return value
    return rebuild(value, mapped)


def leaves(value: Any) -> Iterator[Any]:
    """Every leaf of `value`, in order."""
    parts = None if type(value) in ATOMS else children(value)
    if parts is None:
        yield value
    else:
        for part in parts:
            yield from leaves(part)


def snapshot(value: Any) -> Any:
    """A copy of `value` that later in-place operations cannot reach and that owns its storage."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) in ATOMS:
        return value
    parts = children(value)
    if parts is None:
        if callable(value):
            return value  # a module among the arguments of a function, say
        # Caches and other objects of the model grow in place during generation.
        return deep_copy(value)
    return rebuild(value, [snapshot(part) for part in parts])


def deep_copy(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """As `copy.deepcopy`, also where an object holds tensors that autograd has recorded, which that
    refuses: gradients go through their copies."""
    memo = {} if memo is None else memo
    seen: set[int] = set()
    stack = [value]
    while stack:
        one = stack.pop()
        if type(one) in ATOMS or id(one) in seen or id(one) in memo:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            if not one.is_leaf:
                memo[id(one)] = one.clone()
            continue
        stack += children(one) or ()
        if hasattr(one, "__dict__") and not isinstance(one, type):
            stack += vars(one).values()
    return copy.deepcopy(value, memo)


def summary(value: Any) -> str:
    """The structure of a value in one line: shapes and types, no numbers."""
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return "(" + ", ".join(summary(part) for part in value) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(summary(part) for part in value) + "]"
    if isinstance(value, dict):
        inner = ", ".join(f"{key}: {summary(part)}" for key, part in value.items())
        return f"{type(value).__name__}({inner})"
    return "None" if value is None else type(value).__name__


def columns_of(spans: Sequence[tuple[int, int]], width: int) -> torch.Tensor:
    """Which columns of each row lie in its span: bool [row, token]."""
    found = torch.zeros(len(spans), width, dtype=torch.bool)
    for row, (start, stop) in enumerate(spans):
        found[row, start:stop] = True
    return found
