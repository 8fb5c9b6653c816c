"""GPT-Neo, whose attention is a method of its own and always computes the pattern."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, decoder, own_attention
from .registry import register


@register("gpt_neo")
def gpt_neo(config: Any) -> Architecture:
    return decoder(
        layers="transformer.h",
        embed="transformer.wte",
        pos_embed="transformer.wpe",
        positional="standard",
        ln_final="transformer.ln_f",
        norm="LN",
        ln1="ln_1",
        attn="attn",
        inner="attention",
        q="q_proj",
        k="k_proj",
        v="v_proj",
        o="out_proj",
        ln2="ln_2",
        w_in="c_fc",
        w_out="c_proj",
        attention=own_attention("attn.attention"),
    )
