"""T5: an encoder and a decoder; positions as biases of the scores."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...envoy.names import Missing, Spot
from .architecture import (
    Architecture,
    Norm,
    Weight,
    decoder,
    heads,
    interface,
    norm_places,
)
from .registry import register


def _by_head(weight: Any, sizes: Any) -> Any:
    return heads(weight, sizes).permute(1, 0, 2)


def _stack(config: Any, stack: str) -> Architecture:
    last = 2 if stack == "decoder" else 1
    mlp = f"layer.{last}.DenseReluDense"
    places: dict[str, Any] = {"resid_mid": Spot("layer.0", "output", (0,))}
    if stack == "decoder":
        cross = interface("layer.1.EncDecAttention")
        places.update({f"cross_{name}": spot for name, spot in cross.items()})
        places.update(norm_places("ln_cross", Norm("layer.1.layer_norm", "RMS")))
        places["cross_z"] = Spot(
            "layer.1.EncDecAttention.o", "input", (), lambda x, sizes, here: heads(x, sizes)
        )
        places["cross_attn_in"] = Spot("layer.1.EncDecAttention", "input")
        places["cross_attn_out"] = Spot("layer.1.EncDecAttention", "output", (0,))
        places["resid_mid_cross"] = Spot("layer.1", "output", (0,))
    found = decoder(
        layers=f"{stack}.block",
        embed=f"{stack}.embed_tokens",
        positional="relative",
        ln_final=f"{stack}.final_layer_norm",
        norm="RMS",
        ln1="layer.0.layer_norm",
        attn="layer.0.SelfAttention",
        q="q",
        k="k",
        v="v",
        o="o",
        ln2=f"layer.{last}.layer_norm",
        mlp=mlp,
        w_in="wi_1" if config.is_gated_act else "wi",
        w_gate="wi_0" if config.is_gated_act else None,
        w_out="wo",
        places=places,
    )
    if stack == "encoder":
        hidden = Missing("the encoder's result goes to the decoder, which gives the logits")
        own = {**found.places, **dict.fromkeys(("logits", "unembed_in", "unembed_out"), hidden)}
        found = dataclasses.replace(found, places=own)
    if stack == "decoder":
        block, core = found.blocks[0], "layer.1.EncDecAttention"
        more = {
            f"cross_attn.W_{name.upper()}": Weight(f"{core}.{name}", "weight", _by_head)
            for name in "qkv"
        }
        more["cross_attn.W_O"] = Weight(
            f"{core}.o", "weight", lambda w, sizes: w.unflatten(0, (sizes.n_heads, sizes.d_head))
        )
        more["ln_cross.w"] = Weight("layer.1.layer_norm")
        block = dataclasses.replace(block, weights={**block.weights, **more})
        found = dataclasses.replace(found, blocks=(block,))
    return found


@register("t5", stacks=("encoder", "decoder"))
def t5(config: Any, stack: str) -> Architecture:
    return _stack(config, stack)
