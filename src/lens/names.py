"""Owns the short ways to write TransformerLens' names of activations: `("k", 6)` and `"k6"` mean
`"blocks.6.attn.hook_k"`.

Which of the names exist on a model, and what they mean there, is known to `graftwork.envoy.spellings`.
"""

from __future__ import annotations

import re

_NAMES = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_mid": "mid",
    "mlp_post": "post",
}
_PARTS = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}
#: The part of a block that a name belongs to, whatever part was asked for.
_HOMES = {
    **dict.fromkeys("k v q z rot_k rot_q result pattern attn_scores".split(), "attn"),
    **dict.fromkeys("pre post mid pre_linear expert_weights expert_indices".split(), "mlp"),
}
#: Names that every norm has; without a layer, those of the final one are meant.
_OF_NORMS = ("scale", "normalized")


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """The full name of an activation.

    Args:
        name: short ("resid_pre", "k", "attn"; "k_grad" for a gradient), with the layer and part ("k6",
            "scale4ln1"), or the full name itself, which is returned as it is.
        layer: from 0, for names that every block has.
        layer_type: the part of the block, where a name is in several: "ln1", "ln2", "attn" (or "a"),
            "mlp" ("m"), "block" ("b").

    Example:
        get_act_name("normalized", 27, "ln2")  # "blocks.27.ln2.hook_normalized"

    Source: TransformerLens, utilities/components_utils.py.
    """
    if layer is None and layer_type is None and ("." in name or name.startswith("hook_")):
        return name
    joined = re.fullmatch(r"([a-z_]+)(\d+)([a-z]?.*)", name)
    if joined:
        name, layer, layer_type = joined[1], joined[2], joined[3]
    whole = name.removesuffix("_grad")
    gradient = name[len(whole) :]
    name = _NAMES.get(whole, whole)
    part = _HOMES.get(name, _PARTS.get(layer_type or "", layer_type or ""))
    if name in _OF_NORMS and layer is None:
        part = part or "ln_final"
    below = f"{part}.hook_{name}{gradient}" if part else f"hook_{name}{gradient}"
    return below if layer is None else f"blocks.{layer}.{below}"
