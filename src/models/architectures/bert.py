"""BERT and RoBERTa: norms behind the sums of attention and MLP."""

from __future__ import annotations

from typing import Any

from ...envoy.names import Spot
from .architecture import Architecture, Norm, decoder, norm_places
from .registry import register


def _bert(base: str, head: str) -> Architecture:
    places = {
        "attn_out": Spot("attention.output.dense"),
        "resid_mid": Spot("attention.output"),
        "mlp_in": Spot("intermediate.dense", "input"),
        "mlp_out": Spot("output.dense"),
        "pre_attn": Spot("attention", "input"),
        "post_attn": Spot("attention.output"),
        "pre_mlp": Spot("intermediate.dense", "input"),
        "post_mlp": Spot("", "output"),
    }
    found = decoder(
        layers=f"{base}.encoder.layer",
        embed=f"{base}.embeddings.word_embeddings",
        pos_embed=f"{base}.embeddings.position_embeddings",
        positional="standard",
        ln_final=None,
        norm="LN",
        attn="attention",
        inner="self",
        q="query",
        k="key",
        v="value",
        o="^attention.output.dense",
        mlp=None,
        w_in="intermediate.dense",
        w_out="output.dense",
        unembed=head,
        places={
            **places,
            **norm_places("ln1_post", Norm("attention.output.LayerNorm", "LN")),
            **norm_places("ln2_post", Norm("output.LayerNorm", "LN")),
        },
        post_norm=True,
    )
    return found


@register("bert")
def bert(config: Any) -> Architecture:
    return _bert("bert", "cls.predictions.decoder")


@register("roberta", "xlm-roberta", "camembert")
def roberta(config: Any) -> Architecture:
    return _bert("roberta", "lm_head.decoder")
