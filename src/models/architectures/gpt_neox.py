"""GPT-NeoX and Pythia: queries, keys and values of each head together in one module."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, Part, decoder, third_of_head
from .registry import register


@register("gpt_neox")
def gpt_neox(config: Any) -> Architecture:
    return decoder(
        layers="gpt_neox.layers",
        embed="gpt_neox.embed_in",
        ln_final="gpt_neox.final_layer_norm",
        norm="LN",
        ln1="input_layernorm",
        attn="attention",
        q=Part("query_key_value", third_of_head(0)),
        k=Part("query_key_value", third_of_head(1)),
        v=Part("query_key_value", third_of_head(2)),
        o="dense",
        ln2="post_attention_layernorm",
        w_in="dense_h_to_4h",
        w_out="dense_4h_to_h",
        parallel=config.use_parallel_residual,
        resid_mid="source.add_2.output",
    )
