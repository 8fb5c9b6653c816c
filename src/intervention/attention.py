"""Owns the switch of one attention module to the implementation that computes its pattern.

Fused attention has no scores and no pattern. A module whose pattern is wanted runs its file's own
eager function in that pass, with its mask in the form that this takes; all others stay as they are.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

#: Ports that begin so are operations inside the forward as it runs with eager attention.
EAGER = "eager"


def with_eager_attention(
    module: torch.nn.Module, forward: Callable[..., Any], listens: Callable[[], bool]
) -> Callable[..., Any]:
    """`forward` of an attention module, run with the eager implementation of its file.

    Args:
        listens: false for calls that are not the run's; those run as before.
    """
    config: Any = module.config
    if getattr(config, "_attn_implementation", None) in ("eager", None):
        return forward
    eager = copy.copy(config)
    eager._attn_implementation_internal = "eager"
    signature = inspect.signature(forward)
    # T5 calls it `mask`.
    mask = next((one for one in ("attention_mask", "mask") if one in signature.parameters), None)

    @functools.wraps(forward)
    def switched(*args: Any, **kwargs: Any) -> Any:
        if not listens():
            return forward(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        hidden = next(iter(bound.arguments.values()))
        if mask is not None:
            given = bound.arguments.get(mask)
            passed = (*bound.args, *bound.kwargs.values())
            bound.arguments[mask] = _additive(module, given, hidden, passed)
        module.config = eager
        wide = hidden.dtype == torch.float64
        try:
            with _SoftmaxInOwnType() if wide else nullcontext():
                result = forward(*bound.args, **bound.kwargs)
        finally:
            module.config = config
        # Fused attention gives None for its weights; nothing behind it may see a difference.
        if type(result) is tuple and len(result) == 2 and isinstance(result[1], torch.Tensor):
            return result[0], None
        return result

    return switched


class _SoftmaxInOwnType(TorchFunctionMode):
    """Keeps float64 where an eager function takes its softmax in float32, as fused attention does. In
    float32 the lowest float64, which masks, would be minus infinity, and a whole row of it NaN."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") is torch.float32 and getattr(func, "__name__", "") == "softmax":
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def _keys(module: torch.nn.Module, passed: tuple[Any, ...], queries: int) -> int:
    """How many keys the module will have for its queries, by the cache among what it was passed: one
    of a fixed length gives those that are not written yet, too."""
    layer = getattr(module, "layer_idx", None)
    cache = next((one for one in passed if hasattr(one, "get_mask_sizes")), None)
    if cache is None or layer is None:
        return queries
    keys: int = cache.get_mask_sizes(queries, layer)[0]
    return keys


def _additive(
    module: torch.nn.Module,
    mask: torch.Tensor | None,
    hidden: torch.Tensor,
    passed: tuple[Any, ...],
) -> torch.Tensor | None:
    """The mask of a fused implementation as numbers that are added to the scores.

    Args:
        mask: None (causal for several queries where the module is), booleans or numbers
            [batch, 1 or head, query, key], or [batch, key] with zeros for padding.
        hidden: [batch, query, d_model].
        passed: all that the module was given, its cache among it.
    """
    queries = hidden.shape[1]
    lowest = torch.finfo(hidden.dtype).min
    causal = getattr(module, "is_causal", True)
    if mask is None:
        if not causal or queries == 1:
            return None
        # Torch's own causal mask, which stands in for one that is left out, begins at the first key.
        keys = _keys(module, passed, queries)
        visible = torch.ones(queries, keys, dtype=torch.bool, device=hidden.device).tril()
        mask = visible[None, None]
    elif mask.ndim == 2:
        keys = mask.shape[-1]
        visible = torch.ones(queries, keys, dtype=torch.bool, device=hidden.device)
        if causal:
            visible = visible.tril(keys - queries)
            window = getattr(module, "sliding_window", None)
            if window is not None:
                visible = visible.triu(keys - queries - window + 1)
        mask = visible[None, None] & mask[:, None, None, :].bool()
    if mask.dtype == torch.bool:
        zeros = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
        return torch.where(mask, zeros, lowest)
    return mask
