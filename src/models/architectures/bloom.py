"""Bloom: linear biases for positions; attention and MLP add the residual stream themselves."""

from __future__ import annotations

from typing import Any

from ...envoy.names import Missing, Place, Spot
from .architecture import Architecture, Part, decoder, third_of_head
from .registry import register


def _by_head(value: Any, sizes: Any, here: Any) -> Any:
    """[(batch head), token, d_head] → [batch, token, head, d_head]."""
    return value.unflatten(0, (-1, sizes.n_heads)).transpose(1, 2)


def _keys_by_head(value: Any, sizes: Any, here: Any) -> Any:
    """[(batch head), d_head, token] → [batch, token, head, d_head]."""
    return value.unflatten(0, (-1, sizes.n_heads)).permute(0, 3, 1, 2)


@register("bloom")
def bloom(config: Any) -> Architecture:
    attn = "self_attention"
    places: dict[str, Place] = {
        "attn_out": Spot(f"{attn}.dense"),
        "resid_mid": Spot(attn, "output", (0,)),
        "mlp_out": Spot("mlp.dense_4h_to_h"),
        "post_attn": Spot(f"{attn}.dense"),
        "post_mlp": Spot("mlp.dense_4h_to_h"),
    }
    if config.apply_residual_connection_post_layernorm:
        places["resid_mid"] = Missing(
            "this Bloom adds to the normalized stream, so resid_mid is no sum of resid_pre"
        )
    return decoder(
        layers="transformer.h",
        embed="transformer.word_embeddings",
        positional="alibi",
        ln_final="transformer.ln_f",
        norm="LN",
        ln1="input_layernorm",
        attn=attn,
        q=Part("query_key_value", third_of_head(0)),
        k=Part("query_key_value", third_of_head(1)),
        v=Part("query_key_value", third_of_head(2)),
        o="dense",
        ln2="post_attention_layernorm",
        w_in="dense_h_to_4h",
        w_out="dense_4h_to_h",
        attention={
            "q": Spot(attn, "source.reshape_0.output", (), _by_head),
            "k": Spot(attn, "source.transpose_0.output", (), _keys_by_head),
            "v": Spot(attn, "source.reshape_2.output", (), _by_head),
            "scores": Spot(attn, "source.softmax_0.input"),
            "pattern": Spot(attn, "source.softmax_0.output"),
        },
        places=places,
        model_places={"embed": Spot("transformer.word_embeddings_layernorm")},
    )
