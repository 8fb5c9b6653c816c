"""Owns the policies as functions from a value to a value, for any place of a block.

    layer = model.layers[2]
    layer.mlp_post = graftwork.policies.replace(layer.mlp_post, {3: vector})

Values are [batch, token, *d]; tokens are counted in each prompt's own, whatever it is batched with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..tracing.errors import InputError, near
from . import operations as ops

MASKS = ops.MASKS


def check_mask(kind: Any) -> None:
    """Refuse what is no kind of mask.

    Raises:
        InputError: there is none of that name.
    """
    if not callable(kind) and kind not in MASKS:
        raise InputError(f"no mask is called `{kind}`. {near(str(kind), MASKS)}")


def mask(value: Any, parameter: Any, offset: Any = None, kind: Any = "step") -> Any:
    """value · m + offset · (1 − m), with m = step(parameter > 0), or "sigmoid", "tanh", "relu" or a
    function of it.

    Args:
        parameter, offset: [*d].
    """
    check_mask(kind)
    if callable(kind):
        parameter, kind = ops.call(kind, parameter, value), None
    return ops.perform(ops.MASK, value, parameter, offset, kind)


def actadd(value: Any, additions: torch.Tensor, begin: int = 0) -> Any:
    """Add vectors to the first tokens of each prompt: additions [token, *d], from number `begin`."""
    return ops.perform(ops.ADD_TOKENS, value, additions, begin, counted=True)


def replace(value: Any, replacements: Mapping[Any, torch.Tensor]) -> Any:
    """Replace the values of tokens: {index among the prompt's own tokens: [*d]}."""
    for key in replacements:
        if int(key) < 0:
            raise InputError(f"token {key}: tokens are counted from the first one, 0")
    given = {int(key): vector for key, vector in replacements.items()}
    return ops.perform(ops.REPLACE_TOKENS, value, given, counted=True)


def offset(value: Any, shift: torch.Tensor) -> Any:
    """value + shift, [*d]."""
    return ops.perform(ops.SHIFT, value, shift, 1)


def unoffset(value: Any, shift: torch.Tensor) -> Any:
    """value − shift, [*d]."""
    return ops.perform(ops.SHIFT, value, shift, -1)


def postbias(value: Any, bias: torch.Tensor) -> Any:
    """value + bias, [*d]."""
    return ops.perform(ops.SHIFT, value, bias, 1)


def collect(value: Any) -> Any:
    """Keep the value beyond the run; gives its handle, whose `.value` is the tensor."""
    return value.save()


def whiten(value: Any, shift: Any, rotate: torch.Tensor, scale: torch.Tensor) -> Any:
    """rotate · flatten(value + shift) · scale; rotate is [n, n] for n = the product of *d."""
    return ops.perform(ops.WHITEN, value, shift, rotate, scale)


def unwhiten(value: Any, shift: Any, rotate_inv: torch.Tensor, scale: torch.Tensor) -> Any:
    """The inverse of `whiten`; 1 / scale is at most 1e6."""
    return ops.perform(ops.UNWHITEN, value, shift, rotate_inv, scale)
