"""Owns what policies compute: functions of values that a graph records, one for each kind of policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..tracing.allow_list import declare
from ..tracing.operations import APPLY, Operation
from ..tracing.proxy import Proxy, positions_of, record

#: Where the tokens of a row lie in a value: first column, column behind the last, and the number of the
#: first among the prompt's own tokens.
Rows = list[tuple[int, int, int]]


def _each(value: torch.Tensor, rows: Rows) -> list[tuple[int, int, int, int]]:
    """Row, first and last column and first number, for every row: beams repeat those of a prompt."""
    if not rows:
        return []
    times, columns = max(1, value.shape[0] // len(rows)), value.shape[1]
    return [
        # A prompt of which no tokens are known, as an image, has them in every column.
        (number * times + again, start, min(stop, columns) if stop > start else columns, first)
        for number, (start, stop, first) in enumerate(rows)
        for again in range(times)
    ]


def _count_tokens(value: torch.Tensor, rows: Rows) -> int:
    """How many tokens the longest prompt has, up to the last column."""
    return max((first + stop - start for _, start, stop, first in _each(value, rows)), default=0)


def _add_tokens(
    value: torch.Tensor, additions: torch.Tensor, begin: int, rows: Rows
) -> torch.Tensor:
    result = value.clone()
    additions = additions[begin:].to(value)
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


def _step(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter > 0).to(parameter.dtype)


#: What turns the parameter of a mask into the mask.
MASKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "step": _step,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
}


def _mask(value: torch.Tensor, parameter: torch.Tensor, offset: Any, kind: Any) -> torch.Tensor:
    mask = (parameter if kind is None else MASKS[kind](parameter)).to(value)
    result = value * mask
    return result if offset is None else result + offset.to(value) * (1 - mask)


def _shift(value: torch.Tensor, shift: torch.Tensor, sign: int) -> torch.Tensor:
    return value + sign * shift.to(value)


def _single(value: torch.Tensor) -> torch.Tensor:
    """In single precision at least: half precision does not hold 1e6."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _whiten(
    value: torch.Tensor, offset: torch.Tensor, rotate: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    x = _single(value)
    flat = (x + offset.to(x)).flatten(2)
    return ((flat @ rotate.to(x).T) * scale.to(x)).reshape(value.shape).to(value.dtype)


def _unwhiten(
    value: torch.Tensor, offset: torch.Tensor, rotate_inv: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    x = _single(value)
    flat = (x.flatten(2) * (1 / scale.to(x)).clamp(-1e6, 1e6)) @ rotate_inv.to(x).T
    return (flat.reshape(value.shape) - offset.to(x)).to(value.dtype)


def _operation(name: str, function: Any) -> Operation:
    return declare(f"policy.{name}", Operation(name, function, fresh=True))


COUNT_TOKENS = _operation("count_tokens", _count_tokens)
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
    return record(value._recording, operation, (value, *given), {})


def call(function: Callable[[Any], Any], argument: Any, value: Any) -> Any:
    """A Python function of an argument, recorded in the block of `value` if it is of one."""
    if not isinstance(value, Proxy):
        return function(argument)
    if isinstance(function, torch.nn.Module) and any(
        p.requires_grad for p in function.parameters()
    ):
        value._recording.graph.needs_grad = True
    return record(value._recording, APPLY, (function, argument), {})
