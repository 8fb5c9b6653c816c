"""Owns names that are computed: per-head outputs, normalization inside a norm, inputs by head.

Each is a view of one place of the forward: read, it is computed from values and weights there;
changed, the change is carried to that place, so that the computation goes on as if its own formula
had given the changed value.
"""

from __future__ import annotations

from typing import Any

import torch

from ..tracing.operations import VIEW, Operation
from ..tracing.proxy import Proxy, record


def _head_out(whole: Any, z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bthe,hed->bthd", z, weight.to(z.dtype))


def _put_head_out(whole: Any, part: Any, z: Any, weight: Any) -> Any:
    return whole + (part - _head_out(whole, z, weight)).sum(2)


#: What each head adds: out-projection's output, z [batch, token, head, d_head] and W_O.
HEAD_OUT = Operation("head_out", _head_out, VIEW, inverse=_put_head_out)


def _expert_out(whole: Any, parts: Any) -> torch.Tensor:
    return torch.stack(list(parts), 2)


def _put_expert_out(whole: Any, part: Any, parts: Any) -> Any:
    return whole + (part - _expert_out(whole, parts)).sum(2)


#: What each chosen expert adds: their sum [batch, token, d_model], and each alone.
EXPERT_OUT = Operation("expert_out", _expert_out, VIEW, inverse=_put_expert_out)


def _centered(x: torch.Tensor, kind: str) -> torch.Tensor:
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return x - x.mean(-1, keepdim=True) if kind == "LN" else x


def _scale(whole: Any, x: torch.Tensor, weight: Any, bias: Any, eps: float, kind: str) -> Any:
    return (_centered(x, kind).pow(2).mean(-1, keepdim=True) + eps).sqrt().to(whole.dtype)


def _finish(whole: Any, normalized: Any, weight: Any, bias: Any) -> Any:
    result = normalized
    if weight is not None:
        result = result * weight
    return (result if bias is None else result + bias).to(whole.dtype)


def _put_scale(whole: Any, part: Any, x: Any, weight: Any, bias: Any, eps: Any, kind: str) -> Any:
    return _finish(whole, _centered(x, kind) / part, weight, bias)


def _normalized(whole: Any, x: torch.Tensor, weight: Any, bias: Any, eps: float, kind: str) -> Any:
    centered = _centered(x, kind)
    return (centered / (centered.pow(2).mean(-1, keepdim=True) + eps).sqrt()).to(whole.dtype)


def _put_normalized(
    whole: Any, part: Any, x: Any, weight: Any, bias: Any, eps: Any, kind: str
) -> Any:
    return _finish(whole, part, weight, bias)


#: What a norm divides by [..., 1]: its output, input, gain, bias, epsilon, and "LN" or "RMS".
NORM_SCALE = Operation("norm_scale", _scale, VIEW, inverse=_put_scale)
#: The same before gain and bias.
NORMALIZED = Operation("normalized", _normalized, VIEW, inverse=_put_normalized)


def _by_head(whole: Any, resid: torch.Tensor, *_: Any) -> torch.Tensor:
    return resid.unsqueeze(2).expand(-1, -1, whole.shape[2], -1)


def _put_by_head(
    whole: Any, part: Any, resid: Any, norm: Any, weight: Any, bias: Any, eps: float, kind: str
) -> Any:
    gain, shift = norm
    normed = _finish(part, _normalized(part, part, None, None, eps, kind), gain, shift)
    result = torch.einsum("bthd,hde->bthe", normed, weight.to(normed.dtype))
    return result if bias is None else result + bias


#: The residual stream as each head takes it: projected queries (or keys, values) by head, resid_pre,
#: gain and bias of the norm, the projection's weight and bias by head, epsilon, kind of the norm.
HEAD_INPUT = Operation("head_input", _by_head, VIEW, inverse=_put_by_head)


def derive(operation: Operation, whole: Proxy, *args: Any) -> Any:
    """The view `operation` of `whole`, recorded."""
    return record(whole._recording, operation, (whole, *args), {})
