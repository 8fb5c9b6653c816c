"""Mixtral, GPT-OSS and others with a mixture of experts in place of the MLP."""

from __future__ import annotations

from typing import Any

from ...envoy.names import Spot
from .architecture import Architecture, Weight, decoder, interface, router
from .llama import COMMON
from .registry import register


def _stacked(first: bool) -> Any:
    """Gate or up-projection of all experts, side by side as [expert, (2 d_expert), d_model]."""

    def view(value: Any, sizes: Any) -> Any:
        width = value.shape[1] // 2
        part = value[:, :width] if first else value[:, width:]
        return part.transpose(1, 2)

    return view


def _turned(value: Any, sizes: Any) -> Any:
    return value.transpose(1, 2)


EXPERTS = {
    "mlp.experts.W_gate": Weight("mlp.experts", "gate_up_proj", _stacked(True)),
    "mlp.experts.W_in": Weight("mlp.experts", "gate_up_proj", _stacked(False)),
    "mlp.experts.W_out": Weight("mlp.experts", "down_proj", _turned),
}


@register("mixtral")
def mixtral(config: Any) -> Architecture:
    return decoder(
        **COMMON,
        ln1="input_layernorm",
        ln2="post_attention_layernorm",
        experts=router("mlp.gate", "mlp.experts"),
        weights={**EXPERTS, "mlp.router.W": Weight("mlp.gate", "weight", lambda w, sizes: w.T)},
    )


def _every_other(start: int) -> Any:
    """Gate and up-projection of GPT-OSS alternate on the last axis."""
    return lambda value, sizes: value[..., start::2]


@register("gpt_oss")
def gpt_oss(config: Any) -> Architecture:
    return decoder(
        **COMMON,
        ln1="input_layernorm",
        ln2="post_attention_layernorm",
        attention=interface("self_attn", sinks=True),
        experts=router("mlp.router", "mlp.experts"),
        places=dict.fromkeys(("mlp_out", "post_mlp"), Spot("mlp", "output", (0,))),
        weights={
            "mlp.experts.W_gate": Weight("mlp.experts", "gate_up_proj", _every_other(0)),
            "mlp.experts.W_in": Weight("mlp.experts", "gate_up_proj", _every_other(1)),
            "mlp.experts.b_gate": Weight("mlp.experts", "gate_up_proj_bias", _every_other(0)),
            "mlp.experts.b_in": Weight("mlp.experts", "gate_up_proj_bias", _every_other(1)),
            "mlp.experts.W_out": Weight("mlp.experts", "down_proj"),
            "mlp.experts.b_out": Weight("mlp.experts", "down_proj_bias"),
            "mlp.router.W": Weight("mlp.router", "weight", lambda w, sizes: w.T),
            "mlp.router.b": Weight("mlp.router", "bias"),
            "attn.sinks": Weight("self_attn", "sinks"),
        },
    )
