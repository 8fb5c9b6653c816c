"""Gemma, Gemma 2 and Gemma 3 (text): RMS norms whose gain is 1 + parameter, scaled embeddings.

Gemma 2 and 3 also normalize what attention and MLP add, and so `attn_out` and `mlp_out` are behind
those norms.
"""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, decoder
from .llama import COMMON
from .registry import register


@register("gemma")
def gemma(config: Any) -> Architecture:
    return decoder(
        **COMMON,
        ln1="input_layernorm",
        ln2="post_attention_layernorm",
        offset=1.0,
        embed_scale=config.hidden_size**0.5,
    )


@register("gemma2", "gemma3_text")
def gemma2(config: Any) -> Architecture:
    return decoder(
        **COMMON,
        ln1="input_layernorm",
        ln1_post="post_attention_layernorm",
        ln2="pre_feedforward_layernorm",
        ln2_post="post_feedforward_layernorm",
        offset=1.0,
        embed_scale=config.hidden_size**0.5,
    )
