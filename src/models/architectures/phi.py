"""Phi: parallel attention and MLP behind one norm. Phi 3: Llama with fused projections."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, Part, decoder, grouped, half
from .llama import COMMON
from .registry import register


@register("phi")
def phi(config: Any) -> Architecture:
    return decoder(
        **{
            **COMMON,
            "norm": "LN",
            "ln_final": "model.final_layernorm",
            "o": "dense",
            "w_in": "fc1",
            "w_gate": None,
            "w_out": "fc2",
        },
        ln1="input_layernorm",
        parallel=True,
    )


@register("phi3")
def phi3(config: Any) -> Architecture:
    return decoder(
        **{
            **COMMON,
            "q": Part("qkv_proj", grouped("q")),
            "k": Part("qkv_proj", grouped("k")),
            "v": Part("qkv_proj", grouped("v")),
            "w_gate": Part("gate_up_proj", half(0)),
            "w_in": Part("gate_up_proj", half(1)),
        },
        ln1="input_layernorm",
        ln2="post_attention_layernorm",
    )
