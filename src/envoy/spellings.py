"""Owns the names that other libraries have for the places of the unified vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..tracing.errors import InputError, UnavailableNameError
from .names import Missing


def _of_norm(norm: str) -> dict[str, str]:
    return {f"{norm}.hook_{part}": f"{norm}_{part}" for part in ("scale", "normalized")}


#: TransformerLens, below `blocks.{i}.`, in the order in which its blocks pass them. Hooks are called in
#: this order, which counts where two names are at one place of the forward: what heads add and their
#: sum are both the output of one projection where nothing lies between.
LENS: dict[str, str] = {
    "hook_resid_pre": "resid_pre",
    "hook_q_input": "q_input",
    "hook_k_input": "k_input",
    "hook_v_input": "v_input",
    **_of_norm("ln1"),
    "attn.hook_q": "q_pre",
    "attn.hook_k": "k_pre",
    "attn.hook_v": "v_pre",
    "attn.hook_rot_q": "q",
    "attn.hook_rot_k": "k",
    "attn.hook_attn_scores": "scores",
    "attn.hook_pattern": "pattern",
    "attn.hook_z": "z",
    "attn.hook_result": "head_out",
    **_of_norm("ln1_post"),
    "hook_attn_out": "attn_out",
    "hook_resid_mid": "resid_mid",
    "hook_cross_attn_in": "cross_attn_in",
    "hook_cross_attn_out": "cross_attn_out",
    "hook_resid_mid_cross": "resid_mid_cross",
    "hook_mlp_in": "ln2_in",
    **_of_norm("ln2"),
    "mlp.hook_expert_weights": "expert_weights",
    "mlp.hook_expert_indices": "expert_indices",
    "mlp.hook_pre": "mlp_pre",
    "mlp.hook_pre_linear": "mlp_up",
    "mlp.hook_post": "mlp_post",
    **_of_norm("ln2_post"),
    "hook_mlp_out": "mlp_out",
    "hook_resid_post": "resid_post",
}
#: TransformerLens, of the whole model.
LENS_OWN: dict[str, str] = {
    "hook_embed": "embed",
    "hook_pos_embed": "pos_embed",
    "ln_final.hook_scale": "ln_final_scale",
    "ln_final.hook_normalized": "ln_final_normalized",
    "unembed.hook_in": "unembed_in",
    "unembed.hook_out": "unembed_out",
    "hook_unembed": "unembed_out",
}
#: taker, in `layer_{i}_{name}`.
POINTS: dict[str, str] = {
    "pre_attn": "pre_attn",
    "attn_pre_out": "z",
    "post_attn": "post_attn",
    "pre_mlp": "pre_mlp",
    "mlp_pre_out": "mlp_post",
    "post_mlp": "post_mlp",
    "pre_decoder": "resid_pre",
    "post_decoder": "resid_post",
}
#: transformer-debugger, with a layer.
LOCATIONS: dict[str, str] = {
    "resid.delta_attn": "attn_out",
    "resid.post_attn": "resid_mid",
    "resid.delta_mlp": "mlp_out",
    "resid.post_mlp": "resid_post",
    "attn_ln.scale": "ln1_scale",
    "mlp_ln.scale": "ln2_scale",
    "attn.q": "q",
    "attn.k": "k",
    "attn.v": "v",
    "attn.qk_logits": "scores",
    "attn.qk_probs": "pattern",
    "attn.v_out": "z",
    "mlp.pre_act": "mlp_pre",
    "mlp.post_act": "mlp_post",
}
#: transformer-debugger, of the whole model.
LOCATIONS_OWN: dict[str, str] = {
    "resid.post_emb": "post_emb",
    "resid.post_ln_f": "ln_final",
    "resid.ln_f.scale": "ln_final_scale",
    "logits": "logits",
}
#: nnterp, `model.layers_output[i]`.
ACCESSORS: dict[str, str] = {
    "layers_input": "resid_pre",
    "layers_output": "resid_post",
    "attentions_input": "attn_in",
    "attentions_output": "attn_out",
    "attention_queries": "q",
    "attention_keys": "k",
    "attention_values": "v",
    "attention_scores": "scores",
    "attention_probabilities": "pattern",
    "attention_head_outputs": "head_out",
    "mlps_input": "mlp_in",
    "mlps_output": "mlp_out",
    "router_logits": "router_logits",
    "expert_indices": "expert_indices",
    "expert_weights": "expert_weights",
}
_LAYERED = {**POINTS, **LOCATIONS, **ACCESSORS, **LENS}
#: What users of TransformerLens ask of the model itself, and what is written here.
LENS_METHODS: dict[str, str] = {
    "blocks": "`model.layers`",
    "unembed": '`model["unembed"]`',
    "run_with_cache": "`cache = tracer.cache()` in `with model.trace(prompt) as tracer:`",
    "run_with_hooks": "an assignment in a block, `model.layers[3].resid_post = value`",
    **dict.fromkeys(("add_hook", "add_perma_hook"), "`with model.edit(inplace=True):`"),
    **dict.fromkeys(("reset_hooks", "remove_all_hook_fns"), "`model.clear_edits()`"),
    **dict.fromkeys(
        ("hook_dict", "hook_points"), '`model.hook("blocks.3.attn.hook_z")`, one place at a time'
    ),
    "loss_fn": "`model.trace(ids, labels=ids)` and `tracer.output.loss` in it",
    **dict.fromkeys(
        ("to_tokens", "to_single_token"), '`model.tokenizer(text, return_tensors="pt").input_ids`'
    ),
    **dict.fromkeys(("to_string", "to_single_str_token"), "`model.tokenizer.decode(ids)`"),
    "to_str_tokens": "`model.tokenizer.convert_ids_to_tokens(ids)`",
    "tokens_to_residual_directions": '`model["unembed.W_U"][:, ids].T`',
    **dict.fromkeys(("QK", "OV"), "`model.weights.QK`"),
    **{
        name: f"`model.weights.{name}`"
        for name in (
            "W_E W_pos W_U b_U W_Q W_K W_V W_O b_Q b_K b_V b_O W_in W_gate W_out b_in b_out".split()
        )
    },
    **dict.fromkeys(
        "accumulated_bias all_composition_scores all_head_labels get_token_position process_weights_ "
        "sample_datapoint set_use_attn_in set_use_attn_result set_use_hook_mlp_in "
        "set_use_split_qkv_input".split(),
        "",
    ),
}


def elsewhere(name: str) -> str | None:
    """What is written here for a name that another library gives to something of the model."""
    if name in ACCESSORS:
        return f"here it is `model.layers[3].{ACCESSORS[name]}` in a block."
    if name in LENS_METHODS:
        own = f"here it is {LENS_METHODS[name]}; " if LENS_METHODS[name] else ""
        return (
            f"{own}under its name in TransformerLens it is in "
            "`graftwork.lens.HookedTransformer(model)`."
        )
    if name.startswith("hook_"):
        place = name if name in LENS_OWN else f"blocks.3.{name}"
        return f'a place by its name in TransformerLens is `model.hook("{place}")`, in a block.'
    return None


def resolve(name: str, layer: int | None, vocabulary: Any) -> tuple[int, str]:
    """Layer (-1 for the model's own) and unified name that a name of any spelling means.

    Raises:
        UnavailableNameError: it is no name, or the architecture does not have it.
        InputError: the layer is missing.
    """
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name) or re.fullmatch(r"layer_(\d+)_(.+)", name)
    if found:
        layer, rest = int(found[1]), found[2]
        table = LENS if name.startswith("blocks") else POINTS
        if rest not in table:
            start = name[: len(name) - len(rest)]
            raise UnavailableNameError.unknown(
                name, vocabulary.kind, [f"{start}{one}" for one in table]
            )
        own = table[rest]
    elif name in LENS_OWN or name in LOCATIONS_OWN:
        own = {**LENS_OWN, **LOCATIONS_OWN}[name]
        if own == "post_emb":
            return 0, "resid_pre"
        return -1, own
    elif name in vocabulary.model_places() and layer is None:
        return -1, name
    else:
        own = _LAYERED.get(name, name)
        if own not in vocabulary.layer_places(0):
            known = [*_LAYERED, *LENS_OWN, *LOCATIONS_OWN, *vocabulary.layer_places(0)]
            known += [f"blocks.0.{one}" for one in LENS]
            raise UnavailableNameError.unknown(name, vocabulary.kind, known)
        if layer is None:
            raise InputError(f"`{name}` is in every layer: give one, `layer=3`.")
    count = len(vocabulary)
    if not -count <= layer < count:
        raise UnavailableNameError.no_layer(layer, count)
    return layer % count, own


def lens_names(vocabulary: Any) -> dict[str, tuple[int, str]]:
    """Every name of TransformerLens that exists on a model, with what it means, in firing order."""
    found: dict[str, tuple[int, str]] = {}

    def has(places: Any, own: str) -> bool:
        return own in places and not isinstance(places[own], Missing)

    for name in ("hook_embed", "hook_pos_embed"):
        if has(vocabulary.model_places(), LENS_OWN[name]):
            found[name] = (-1, LENS_OWN[name])
    for index in range(len(vocabulary)):
        for name, own in LENS.items():
            if has(vocabulary.layer_places(index), own):
                found[f"blocks.{index}.{name}"] = (index, own)
    for name in (
        "ln_final.hook_scale",
        "ln_final.hook_normalized",
        "unembed.hook_in",
        "unembed.hook_out",
    ):
        if has(vocabulary.model_places(), LENS_OWN[name]):
            found[name] = (-1, LENS_OWN[name])
    return found


def no_lens_name(vocabulary: Any, name: str, known: Iterable[str]) -> UnavailableNameError:
    """Why a name of TransformerLens means nothing on a model; `known` are those that do."""
    below = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if below and int(below[1]) >= len(vocabulary):
        return UnavailableNameError.no_layer(int(below[1]), len(vocabulary))
    places = vocabulary.layer_places(int(below[1])) if below else vocabulary.model_places()
    place = places.get(LENS.get(below[2], "") if below else LENS_OWN.get(name, ""))
    if isinstance(place, Missing):
        return UnavailableNameError.missing(name, vocabulary.kind, place.reason)
    return UnavailableNameError.unknown(name, vocabulary.kind, known)
