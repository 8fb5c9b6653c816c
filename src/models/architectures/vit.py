"""ViT: an encoder of image patches."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...envoy.names import Missing, Spot
from .architecture import Architecture, Weight, decoder
from .registry import register


@register("vit")
def vit(config: Any) -> Architecture:
    found = decoder(
        layers="vit.layers",
        embed="vit.embeddings.patch_embeddings",
        positional="standard",
        ln_final="vit.layernorm",
        norm="LN",
        ln1="layernorm_before",
        attn="attention",
        q="q_proj",
        k="k_proj",
        v="v_proj",
        o="o_proj",
        ln2="layernorm_after",
        w_in="fc1",
        w_out="fc2",
        unembed="classifier",
        model_places={
            "embed": Spot("vit.embeddings.patch_embeddings"),
            "pos_embed": Missing(
                'positions are a parameter that is added to the patches: model["pos_embed.W_pos"]'
            ),
        },
    )
    table = Weight("vit.embeddings", "position_embeddings", lambda value, sizes: value[0])
    shapes = {
        "embed": ("batch", "patch", "d_model"),
        "unembed_in": ("batch", "d_model"),
        "unembed_out": ("batch", "d_vocab_out"),
        "logits": ("batch", "d_vocab_out"),
    }
    weights = {**found.weights, "pos_embed.W_pos": table}
    return dataclasses.replace(found, weights=weights, shapes=shapes)
