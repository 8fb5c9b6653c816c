"""Owns `Sizes`: what a model's configuration and modules tell of it, in the same words everywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..tracing.errors import UnavailableNameError
from .architectures import Architecture


@dataclasses.dataclass(frozen=True)
class Sizes:
    """`model.cfg`: sizes and kinds, under TransformerLens' names where it has one.

    Attributes:
        n_layers, n_layer: blocks.
        d_model: channels of the residual stream.
        d_mlp: neurons of an MLP, of one expert in a mixture; None where there is no MLP.
        n_heads, n_kv_heads: query heads, and heads of keys and values; 0 without attention.
        d_head: channels of a head.
        d_vocab: rows of the embedding.
        d_vocab_out: logits.
        n_ctx: positions that the configuration names; None if it names none.
        act_fn: activation of the MLP, as transformers calls it.
        normalization_type: "LN", "RMS", or None.
        positional_embedding_type: "standard", "rotary", "alibi", "relative" or "none".
        parallel_attn_mlp: attention and MLP read the same residual stream.
        gated_mlp: the MLP multiplies two projections.
        post_norm: sums of attention and MLP are normalized, as in BERT.
        eps: what norms add to the variance.
        attn_scores_soft_cap, output_logits_soft_cap: None where there is none.
        window_size: of sliding attention, in tokens; None where all is seen.
        num_experts, experts_per_token: of a mixture of experts; None without.
        tie_word_embeddings: embedding and unembedding share their weights.
        embed_scale: what embeddings are multiplied by.
        model_name, architecture: type and class in transformers.
        dtype: of the weights.
    """

    n_layers: int
    d_model: int
    d_mlp: int | None
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_vocab: int
    d_vocab_out: int
    n_ctx: int | None
    act_fn: str | None
    normalization_type: str | None
    positional_embedding_type: str
    parallel_attn_mlp: bool
    gated_mlp: bool
    post_norm: bool
    eps: float | None
    attn_scores_soft_cap: float | None
    output_logits_soft_cap: float | None
    window_size: int | None
    num_experts: int | None
    experts_per_token: int | None
    tie_word_embeddings: bool
    embed_scale: float
    model_name: str
    architecture: str
    dtype: torch.dtype | None = None

    @property
    def n_layer(self) -> int:
        return self.n_layers

    @property
    def n_key_value_heads(self) -> int:
        return self.n_kv_heads

    @property
    def parallel(self) -> bool:
        return self.parallel_attn_mlp

    @property
    def gated(self) -> bool:
        return self.gated_mlp

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnavailableNameError.size(name, self.architecture, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The sizes by name."""
        return dataclasses.asdict(self)


def _first(config: Any, *names: str) -> Any:
    for name in names:
        found = getattr(config, name, None)
        if found is not None:
            return found
    return None


def _int(value: Any) -> int | None:
    # Some configurations have one value for each layer.
    if isinstance(value, (list, tuple)):
        value = value[0] if value and len(set(map(str, value))) == 1 else None
    return None if value is None else int(value)


def _epsilon(module: torch.nn.Module, architecture: Architecture) -> float | None:
    """What the first norm adds, where the configuration does not say, as OPT's."""
    norms = architecture.block(0).norms
    places = [f"{architecture.layers}.0.{one.path}" for one in norms.values()]
    places += [architecture.norm.path] if architecture.norm is not None else []
    for place in places:
        try:
            norm = module.get_submodule(place)
        except AttributeError:
            continue
        found: float | None = _first(norm, "eps", "variance_epsilon", "epsilon")
        if found is not None:
            return found
    return None


def sizes_of(
    config: Any, module: torch.nn.Module, architecture: Architecture, n_layers: int
) -> Sizes:
    """The sizes of a model, from its configuration and, where that is silent, its modules.

    Args:
        module: the model or its skeleton.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    block = architecture.block(0)

    def shape_of(name: str, whole: bool = False) -> tuple[int, ...] | None:
        weight = (architecture.weights if whole else block.weights).get(name)
        if weight is None:
            return None
        prefix = "" if whole else f"{architecture.layers}.0"
        path = ".".join(part for part in (prefix, weight.path) if part)
        try:
            found = getattr(module.get_submodule(path), weight.parameter, None)
        except AttributeError:
            return None
        return None if found is None else tuple(found.shape)

    embedding = shape_of("embed.W_E", whole=True)
    d_model = _first(text, "hidden_size", "n_embd", "d_model", "dim", "model_dim")
    heads = _int(
        _first(text, "num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads")
    )
    # Falcon keeps the number for older models, too, where each query has its own.
    shared = _int(_first(text, "num_key_value_heads", "num_kv_heads", "n_head_kv"))
    if getattr(text, "model_type", "") == "falcon" and not text.new_decoder_architecture:
        shared = 1 if text.multi_query else heads
    d_head = _int(_first(text, "head_dim", "d_kv", "attention_head_dim", "kv_channels"))
    if d_head is None and heads:
        d_head = d_model // heads
    neurons = shape_of("mlp.W_out")
    down = None if neurons is None else max((n for n in neurons if n != d_model), default=d_model)
    experts = _int(_first(text, "num_local_experts", "num_experts", "n_routed_experts"))
    d_mlp = down
    if d_mlp is None and block.attends:
        d_mlp = _int(
            _first(
                text,
                *(("moe_intermediate_size",) if experts else ()),
                "intermediate_size",
                "ffn_dim",
                "n_inner",
                "d_ff",
            )
        )
    head = shape_of("unembed.W_U", whole=True)
    rows = embedding[0] if embedding is not None and len(embedding) == 2 else None
    vocabulary = rows or int(getattr(text, "vocab_size", 0) or 0)
    norm = next(iter(block.norms.values()), architecture.norm)
    first = next(module.parameters(), None)
    window = _first(text, "sliding_window", "window_size")
    if getattr(text, "use_sliding_window", True) is False:
        window = None
    return Sizes(
        n_layers=n_layers,
        d_model=int(d_model),
        d_mlp=d_mlp,
        n_heads=heads if heads and block.attends else 0,
        n_kv_heads=(shared or heads or 0) if block.attends else 0,
        d_head=d_head if d_head and block.attends else 0,
        d_vocab=vocabulary,
        d_vocab_out=head[0] if head is not None else vocabulary,
        n_ctx=_int(_first(text, "max_position_embeddings", "n_positions", "n_ctx", "seq_length")),
        act_fn=_first(
            text,
            "hidden_activation",
            "hidden_act",
            "activation_function",
            "activation",
            "dense_act_fn",
        ),
        normalization_type=None if norm is None else norm.kind,
        positional_embedding_type=architecture.positional,
        parallel_attn_mlp=block.parallel,
        gated_mlp=block.gated,
        post_norm=block.post_norm,
        eps=_first(
            text, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"
        )
        or _epsilon(module, architecture),
        attn_scores_soft_cap=_first(text, "attn_logit_softcapping"),
        output_logits_soft_cap=_first(text, "final_logit_softcapping", "logits_soft_cap"),
        window_size=_int(window),
        num_experts=experts,
        experts_per_token=_int(_first(text, "num_experts_per_tok", "top_k")) if experts else None,
        tie_word_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        embed_scale=architecture.embed_scale,
        model_name=str(getattr(config, "model_type", "")),
        architecture=type(module).__name__,
        dtype=None if first is None else first.dtype,
    )
