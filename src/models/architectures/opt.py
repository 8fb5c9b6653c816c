"""OPT and Galactica: the block itself has the MLP, on batch and token in one axis."""

from __future__ import annotations

from typing import Any

from ...envoy.names import Missing
from .architecture import Architecture, decoder
from .registry import register


@register("opt")
def opt(config: Any) -> Architecture:
    before = config.do_layer_norm_before
    after = "this OPT normalizes behind the sums of attention and MLP, not before"
    return decoder(
        layers="model.decoder.layers",
        embed="model.decoder.embed_tokens",
        pos_embed="model.decoder.embed_positions",
        positional="standard",
        ln_final="model.decoder.final_layer_norm" if before else None,
        norm="LN",
        ln1="self_attn_layer_norm" if before else None,
        attn="self_attn",
        q="q_proj",
        k="k_proj",
        v="v_proj",
        o="out_proj",
        ln2="final_layer_norm" if before else None,
        mlp=None,
        w_in="fc1",
        w_out="fc2",
        flat=True,
        places={} if before else {"resid_mid": Missing(after)},
        post_norm=not before,
    )
