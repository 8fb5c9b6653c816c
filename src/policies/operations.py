"""Owns what policies compute: functions of values that a graph records, one for each kind of policy."""

from __future__ import annotations

from typing import Any

import torch

from ..tracing.allow_list import declare
from ..tracing.operations import Operation
from ..tracing.proxy import Proxy, positions_of, record
from ..tracing.structure import leaves

#: Where the tokens of a row lie in a value: first column, column behind the last, and the number of the
#: first among the prompt's own tokens.
Rows = list[tuple[int, int, int]]


def _each(value: torch.Tensor, rows: Rows) -> list[tuple[int, int, int, int]]:
    """Row, first and last column and first number, for every row: beams repeat those of a prompt."""
    if not rows:
        return []
    times = max(1, value.shape[0] // len(rows))
    return [
        (number * times + again, *row) for number, row in enumerate(rows) for again in range(times)
    ]


def _add_tokens(value: torch.Tensor, additions: torch.Tensor, rows: Rows) -> torch.Tensor:
    result = value.clone()
    additions = additions.to(value)
    for row, start, stop, first in _each(value, rows):
        count = min(stop - start, additions.shape[0] - first)
        if count > 0:
            part = additions[first : first + count].reshape(count, *value.shape[2:])
            result[row, start : start + count] = result[row, start : start + count] + part
    return result


def _replace_tokens(
    value: torch.Tensor, replacements: dict[Any, torch.Tensor], rows: Rows
) -> torch.Tensor:
    result = value.clone()
    for row, start, stop, first in _each(value, rows):
        for key, vector in replacements.items():
            column = start + int(key) - first
            if int(key) >= first and column < stop:
                result[row, column] = vector.to(value).reshape(value.shape[2:])
    return result


def _mask(value: torch.Tensor, mask: torch.Tensor, offset: Any) -> torch.Tensor:
    mask = mask.to(value)
    result = value * mask
    return result if offset is None else result + offset.to(value) * (1 - mask)


def _shift(value: torch.Tensor, shift: torch.Tensor, sign: int) -> torch.Tensor:
    return value + sign * shift.to(value)


def _whiten(
    value: torch.Tensor, offset: torch.Tensor, rotate: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    flat = (value + offset.to(value)).flatten(2)
    return ((flat @ rotate.to(value).T) * scale.to(value)).reshape(value.shape)


def _unwhiten(
    value: torch.Tensor, offset: torch.Tensor, rotate_inv: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    inverse = (1 / scale.to(value)).clamp(-1e6, 1e6)
    flat = (value.flatten(2) * inverse) @ rotate_inv.to(value).T
    return flat.reshape(value.shape) - offset.to(value)


def _operation(name: str, function: Any) -> Operation:
    return declare(f"policy.{name}", Operation(name, function, fresh=True))


ADD_TOKENS = _operation("add_tokens", _add_tokens)
REPLACE_TOKENS = _operation("replace_tokens", _replace_tokens)
MASK = _operation("mask", _mask)
SHIFT = _operation("shift", _shift)
WHITEN = _operation("whiten", _whiten)
UNWHITEN = _operation("unwhiten", _unwhiten)


def perform(operation: Operation, value: Any, *args: Any, counted: bool = False) -> Any:
    """An operation on a value of a block, recorded, or on a tensor.

    Args:
        counted: it needs to know which tokens of their prompts the columns of the value are.
    """
    if not isinstance(value, Proxy):
        rows: Rows = [(0, value.shape[1], 0)] * value.shape[0] if counted else []
        return operation.function(value, *args, *([rows] if counted else []))
    given = (*args, positions_of(value)) if counted else args
    for leaf in leaves(given):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            value._recording.graph.needs_grad = True
    return record(value._recording, operation, (value, *given), {})
