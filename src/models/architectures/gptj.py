"""GPT-J: parallel, with attention in a method of its own that always computes the pattern."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, decoder, own_attention
from .registry import register


@register("gptj")
def gptj(config: Any) -> Architecture:
    return decoder(
        layers="transformer.h",
        embed="transformer.wte",
        ln_final="transformer.ln_f",
        norm="LN",
        ln1="ln_1",
        attn="attn",
        q="q_proj",
        k="k_proj",
        v="v_proj",
        o="out_proj",
        w_in="fc_in",
        w_out="fc_out",
        parallel=True,
        attention=own_attention("attn"),
    )
