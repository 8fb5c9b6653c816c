"""Owns names that are computed: per-head outputs, normalization inside a norm, inputs by head.

Each is a view of one place of the forward: read, it is computed from values and weights there;
changed, the change is carried to that place, so that the computation goes on as if its own formula
had given the changed value.

Neither can be read off the place again: the sum of heads does not tell its terms. So a name is a part
of a state, the place's value with what was computed beside it, which keeps the changes. Within an
invoke there is one state for a place, whose parts stay right when one of them is changed, and later
reads of the name show earlier changes (see tracing/states.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ..tracing.allow_list import declare
from ..tracing.operations import VIEW, Operation
from ..tracing.proxy import Proxy, record
from ..tracing.states import state_of


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Derivation:
    """How a name is computed.

    Attributes:
        state: from the place's value and arguments, a tuple: that value, what was computed, ….
        part: the name, as a view of the state.
    """

    state: Operation
    part: Operation


class _State(Operation):
    """A view that keeps what was computed when its whole is changed from elsewhere."""

    __slots__ = ()

    def again(self, whole: Any, part: Any, *args: Any, **kwargs: Any) -> Any:
        return whole, *part[1:]


def _declared(operation: Operation) -> Operation:
    """A graph that is sent may name it."""
    return declare(f"derived.{operation.name.replace(' ', '_')}", operation)


def _state(name: str, function: Callable[..., tuple[Any, ...]]) -> Operation:
    return _declared(
        _State(name, function, VIEW, inverse=lambda whole, state, *_: state[0], copies=True)
    )


def _part(
    state: Operation,
    name: str,
    index: int,
    put: Callable[[Any, Any], tuple[Any, ...]],
    fresh: bool = True,
) -> Derivation:
    part = Operation(name, lambda state: state[index], VIEW, fresh, inverse=put, computed=True)
    return Derivation(state, _declared(part))


def _replaced(whole: Any, new: Any, old: Any, made: Callable[[Any], Any]) -> Any:
    """`made(new)` where it differs from `made(old)`, and elsewhere the numbers of `whole`, which are
    made of `old` but for rounding; gradients are those of `made(new)` everywhere."""
    after, before = made(new), made(old)
    same = whole + (after - before)
    return torch.where(after == before, same, after).to(whole.dtype)


# -------------------------------------------------------------------- sums


def _head_out(whole: Any, z: torch.Tensor, weight: torch.Tensor) -> tuple[Any, ...]:
    return whole, torch.einsum("bthe,hed->bthd", z, weight.to(z.dtype))


def _put_term(state: Any, part: Any) -> tuple[Any, ...]:
    whole, before = state
    return whole + (part - before).sum(2), part


#: What each head adds: out-projection's output, z [batch, token, head, d_head] and W_O.
HEAD_OUT = _part(_state("with head_out", _head_out), "head_out", 1, _put_term)


def _expert_out(whole: Any, parts: Any) -> tuple[Any, ...]:
    return whole, torch.stack(list(parts), 2)


#: What each chosen expert adds: their sum [batch, token, d_model], and each alone.
EXPERT_OUT = _part(_state("with expert_out", _expert_out), "expert_out", 1, _put_term)


# -------------------------------------------------------------------- norms


def _normalize(x: torch.Tensor, eps: float, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and normalized input, in single precision at least."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    x = x - x.mean(-1, keepdim=True) if kind == "LN" else x
    scale = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return scale, x / scale


def _finish(normalized: Any, weight: Any, bias: Any) -> Any:
    result = normalized if weight is None else normalized * weight
    return result if bias is None else result + bias


def _norm(
    whole: Any, x: torch.Tensor, weight: Any, bias: Any, eps: float, kind: str
) -> tuple[Any, ...]:
    scale, normalized = _normalize(x, eps, kind)
    return whole, scale.to(whole.dtype), normalized.to(whole.dtype), weight, bias


def _put_scale(state: Any, part: Any) -> tuple[Any, ...]:
    _, scale, normalized, *_ = state
    whole, _, *others = _put_normalized(state, normalized * (scale / part))
    return whole, part, *others


def _put_normalized(state: Any, part: Any) -> tuple[Any, ...]:
    whole, scale, before, weight, bias = state
    whole = _replaced(whole, part, before, lambda value: _finish(value, weight, bias))
    return whole, scale, part, weight, bias


_NORM = _state("with norm", _norm)
#: What a norm divides by [..., 1]: its output, input, gain, bias, epsilon, and "LN" or "RMS".
NORM_SCALE = _part(_NORM, "norm_scale", 1, _put_scale)
#: The same before gain and bias.
NORMALIZED = _part(_NORM, "normalized", 2, _put_normalized)


# -------------------------------------------------------------------- inputs by head


def _by_head(whole: Any, resid: torch.Tensor, *args: Any) -> tuple[Any, ...]:
    return whole, resid.unsqueeze(2).expand(-1, -1, whole.shape[2], -1), *args


def _put_by_head(state: Any, part: Any) -> tuple[Any, ...]:
    whole, before, norm, weight, bias, eps, kind = state
    gain, shift = norm

    def projected(resid: Any) -> Any:
        normed = _finish(_normalize(resid, eps, kind)[1].to(resid.dtype), gain, shift)
        result = torch.einsum("bthd,hde->bthe", normed, weight.to(normed.dtype))
        return result if bias is None else result + bias

    whole = _replaced(whole, part, before, projected)
    return whole, part, norm, weight, bias, eps, kind


#: The residual stream as each head takes it: projected queries (or keys, values) by head, resid_pre,
#: gain and bias of the norm, the projection's weight and bias by head, epsilon, kind of the norm.
HEAD_INPUT = _part(_state("with head_input", _by_head), "head_input", 1, _put_by_head, fresh=False)


# -------------------------------------------------------------------- in a block


def derive(
    derivation: Derivation,
    whole: Proxy,
    *args: Any,
    name: str = "",
    made_of: tuple[Any, ...] = (),
) -> Any:
    """The name `derivation` of what is at `whole`, recorded.

    Args:
        *args: what else it is computed from.
        name: tells apart several of one kind at one place.
        made_of: what `args` are computed from.
    """
    state = state_of(derivation.state, whole, args, name, made_of)
    return record(state._recording, derivation.part, (state,), {})
