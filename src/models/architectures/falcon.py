"""Falcon: one or more queries share a key and a value; parallel in all but the oldest models."""

from __future__ import annotations

from typing import Any

from ...envoy.names import Missing, Place, Spot
from .architecture import (
    Architecture,
    Features,
    Part,
    decoder,
    head_first,
    third_of_head,
)
from .registry import register


def _of_group(part: str) -> Features:
    """[..., (group (queries + 2) d_head)]: the queries of a group, its key and its value."""

    def features(value: Any, sizes: Any) -> Any:
        queries = sizes.n_heads // sizes.n_kv_heads
        groups = value.unflatten(-1, (sizes.n_kv_heads, queries + 2, sizes.d_head))
        if part == "q":
            return groups[..., :-2, :].flatten(-3, -2)
        return groups[..., -2 if part == "k" else -1, :]

    return features


@register("falcon")
def falcon(config: Any) -> Architecture:
    attn = "self_attention"
    new, several = (
        config.new_decoder_architecture,
        config.num_kv_heads != config.num_attention_heads,
    )
    shared = new or config.multi_query
    parallel = new or config.parallel_attn
    two_norms = new and config.num_ln_in_parallel_attn == 2
    attention: dict[str, Place] = {
        "q": Spot(attn, "source.apply_rotary_pos_emb_0.output", (0,), head_first),
        "k": Spot(attn, "source.apply_rotary_pos_emb_0.output", (1,), head_first),
        "v": Spot(attn, "source.reshape_2.output", (), head_first),
        "scores": Spot(attn, "eager.softmax_0.input"),
        "pattern": Spot(attn, "eager.softmax_0.output"),
    }
    places: dict[str, Place] = {}
    if config.alibi:
        attention["q"] = Spot(attn, "source.reshape_0.output", (), head_first)
        attention["k"] = Spot(attn, "source.reshape_1.output", (), head_first)
        hidden = Missing(
            "with alibi, Falcon's fused attention takes the biases in its mask, and its eager one adds "
            'them again: load it with attn_implementation="eager"'
        )
        if config._attn_implementation == "sdpa":
            attention["scores"] = attention["pattern"] = hidden
        else:
            attention["scores"] = Spot(attn, "source.softmax_1.input")
            attention["pattern"] = Spot(attn, "source.softmax_1.output")
    if new and several:
        repeated = Missing(
            "Falcon repeats keys and values for the queries of a group before anything is done with "
            "them: use k_pre and v_pre"
        )
        attention["k"] = attention["v"] = repeated
        # A selection of queries is copied, not viewed, in the fused projection.
        places["q_pre"] = Spot(attn, "source.self__split_heads_0.output", (0,))
    thirds = third_of_head
    return decoder(
        layers="transformer.h",
        embed="transformer.word_embeddings",
        positional="alibi" if config.alibi else "rotary",
        ln_final="transformer.ln_f",
        norm="LN",
        ln1="ln_attn" if two_norms else "input_layernorm",
        attn=attn,
        q=Part("query_key_value", _of_group("q") if shared else thirds(0)),
        k=Part("query_key_value", _of_group("k") if shared else thirds(1)),
        v=Part("query_key_value", _of_group("v") if shared else thirds(2)),
        o="dense",
        ln2="ln_mlp" if two_norms else None if parallel else "post_attention_layernorm",
        w_in="dense_h_to_4h",
        w_out="dense_4h_to_h",
        parallel=parallel,
        resid_mid="source.dropout_add_0.output",
        attention=attention,
        places=places,
    )
