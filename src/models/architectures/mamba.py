"""Mamba: blocks of one mixer each, without attention or MLP."""

from __future__ import annotations

from typing import Any

from ...envoy.names import Missing, Place, Spot
from .architecture import Architecture, Block, Norm, Weight, norm_places
from .registry import register

_ATTENTION = Missing("a Mamba block has a mixer and no attention: use mixer_in and mixer_out")
_MLP = Missing("a Mamba block has a mixer and no MLP: use mixer_in and mixer_out")


@register("mamba", "falcon_mamba")
def mamba(config: Any) -> Architecture:
    norm, last = Norm("norm", "RMS"), Norm("backbone.norm_f", "RMS")
    places: dict[str, Place] = {
        "resid_pre": Spot("", "input"),
        "resid_mid": Missing("a Mamba block adds once, so nothing is in its middle"),
        "resid_post": Spot("", "output"),
        "mixer_in": Spot("mixer", "input"),
        "mixer_out": Spot("mixer", "output"),
        **norm_places("ln1", norm),
    }
    names = "attn_in attn_out q k v q_pre k_pre v_pre scores pattern z head_out o_out".split()
    places.update({name: _ATTENTION for name in names})
    places.update({name: _MLP for name in "mlp_in mlp_out mlp_pre mlp_post mlp_up".split()})
    weights = {
        "ln1.w": Weight("norm"),
        "mixer.W_in": Weight("mixer.in_proj"),
        "mixer.W_x": Weight("mixer.x_proj"),
        "mixer.W_dt": Weight("mixer.dt_proj"),
        "mixer.b_dt": Weight("mixer.dt_proj", "bias"),
        "mixer.W_out": Weight("mixer.out_proj"),
        "mixer.A_log": Weight("mixer", "A_log"),
        "mixer.D": Weight("mixer", "D"),
    }
    own: dict[str, Place] = {
        "embed": Spot("backbone.embeddings"),
        "pos_embed": Missing("a recurrence needs no vectors of positions"),
        "ln_final": Spot("backbone.norm_f"),
        "logits": Spot("", "output", ("logits",)),
        "unembed_in": Spot("lm_head", "input"),
        "unembed_out": Spot("lm_head", "output"),
        **norm_places("ln_final", last),
    }
    whole = {
        "embed.W_E": Weight("backbone.embeddings"),
        "unembed.W_U": Weight("lm_head"),
        "ln_final.w": Weight("backbone.norm_f"),
    }
    block = Block(places, weights, {"ln1": norm}, attends=False)
    return Architecture("backbone.layers", (block,), own, whole, last, "none")
