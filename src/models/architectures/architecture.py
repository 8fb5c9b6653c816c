"""Owns what an architecture declares: where each name of the vocabulary is, and each weight.

A file of this folder gives, for the configurations it knows, one `Architecture`. Most are decoders
whose parts differ in names and layouts alone, which `decoder` puts together:

    @register("my_type")
    def my_type(config):
        return decoder(
            layers="model.layers", embed="model.embed_tokens", ln_final="model.norm", norm="RMS",
            ln1="input_layernorm", attn="self_attn", q="q_proj", k="k_proj", v="v_proj", o="o_proj",
            ln2="post_attention_layernorm", mlp="mlp", w_in="up_proj", w_gate="gate_proj",
            w_out="down_proj",
        )
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ...envoy.derived import (
    EXPERT_OUT,
    HEAD_INPUT,
    HEAD_OUT,
    NORM_SCALE,
    NORMALIZED,
    derive,
)
from ...envoy.names import Derived, Missing, Place, Spot

#: A view of the last axis of a value or of a weight [d_in, d_out]: from it and the sizes.
Features = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """The outputs of a linear module that belong to one projection.

    Attributes:
        path: the module.
        features: from [..., all outputs] to [..., head, d_head], or to [..., d_mlp]; None for all.
        flat: the module sees batch and token in one axis.
    """

    path: str
    features: Features | None = None
    flat: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Weight:
    """A parameter under a unified name.

    Attributes:
        path: the module, below the block or the model.
        parameter: its name there.
        view: from the parameter (of a linear module: as [d_in, d_out]) and the sizes, the weight in
            the one orientation of all architectures. A view, so that writes reach the parameter.
    """

    path: str
    parameter: str = "weight"
    view: Features | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Norm:
    """A normalization.

    Attributes:
        path: the module.
        kind: "LN", which subtracts the mean, or "RMS".
        offset: what is added to the parameter to give the gain: 1 in Gemma.
        flat: as for `Part`.
    """

    path: str
    kind: str
    offset: float = 0.0
    flat: bool = False


@dataclasses.dataclass(frozen=True)
class Block:
    """One transformer block.

    Attributes:
        places, weights: by unified name.
        norms: by name: ln1, ln2, ln1_post, ln2_post.
        parallel: attention and MLP both read resid_pre.
        post_norm: resid_mid and resid_post are normalized sums, as in BERT.
    """

    places: Mapping[str, Place]
    weights: Mapping[str, Weight]
    norms: Mapping[str, Norm] = dataclasses.field(default_factory=dict)
    parallel: bool = False
    post_norm: bool = False
    gated: bool = False
    attends: bool = True


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The vocabulary of a configuration.

    Attributes:
        layers: path of the list of blocks.
        blocks: one for each layer, or one for all.
        places, weights: the model's own.
        norm: the final norm; None if there is none.
        positional: "standard" (learned and added), "rotary", "alibi", "relative" or "none".
        head: path of the unembedding.
        embed_scale: what embeddings are multiplied by.
        probed: found by looking at a model, not declared.
        shapes: of names that have another one than everywhere: a classifier has no tokens.
    """

    layers: str
    blocks: tuple[Block, ...]
    places: Mapping[str, Place]
    weights: Mapping[str, Weight]
    norm: Norm | None = None
    positional: str = "rotary"
    head: str = "lm_head"
    embed_scale: float = 1.0
    probed: bool = False
    shapes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def block(self, index: int) -> Block:
        return self.blocks[index if len(self.blocks) > 1 else 0]


# -------------------------------------------------------------------- layouts


def heads(value: Any, sizes: Any) -> Any:
    """[..., (head d_head)] → [..., head, d_head]."""
    return value.unflatten(-1, (sizes.n_heads, sizes.d_head))


def kv_heads(value: Any, sizes: Any) -> Any:
    """The same for keys and values."""
    return value.unflatten(-1, (sizes.n_kv_heads, sizes.d_head))


def third(index: int) -> Features:
    """Queries, keys and values side by side: [..., (part head d_head)]."""
    return lambda value, sizes: value.unflatten(-1, (3, sizes.n_heads, sizes.d_head))[
        ..., index, :, :
    ]


def third_of_head(index: int) -> Features:
    """Queries, keys and values of each head together: [..., (head part d_head)]."""
    return lambda value, sizes: value.unflatten(-1, (sizes.n_heads, 3, sizes.d_head))[..., index, :]


def grouped(part: str) -> Features:
    """All queries, then all keys, then all values, with fewer of the last two."""

    def features(value: Any, sizes: Any) -> Any:
        q, k = sizes.n_heads * sizes.d_head, sizes.n_kv_heads * sizes.d_head
        start, stop = {"q": (0, q), "k": (q, q + k), "v": (q + k, q + 2 * k)}[part]
        return (heads if part == "q" else kv_heads)(value[..., start:stop], sizes)

    return features


def half(index: int) -> Features:
    """The first or second half: gate and up-projection in one module."""
    return lambda value, sizes: value.unflatten(-1, (2, sizes.d_mlp))[..., index, :]


def head_first(value: Any, sizes: Any, here: Any) -> Any:
    """[batch, head, token, d_head] → [batch, token, head, d_head]."""
    return value.transpose(1, 2)


def in_heads(value: Any, sizes: Any, here: Any) -> Any:
    """[batch, token, (head d_head)] → [batch, token, head, d_head]."""
    return heads(value, sizes)


def unflattened(value: Any, sizes: Any, here: Any) -> Any:
    """[(batch token), …] → [batch, token, …]."""
    # By its rows: a compiled block runs on prompts of other lengths, too.
    return value.unflatten(0, (here("resid_pre").shape[0], -1))


def _layout(part: Part) -> Any:
    features, flat = part.features, part.flat

    def layout(value: Any, sizes: Any, here: Any) -> Any:
        if flat:
            value = unflattened(value, sizes, here)
        return value if features is None else features(value, sizes)

    return layout if features is not None or flat else None


# -------------------------------------------------------------------- parts of a block


def interface(attn: str, sinks: bool = False) -> dict[str, Place]:
    """Attention that goes through transformers' attention interface.

    Args:
        sinks: a learned score joins those of the keys before the softmax and leaves it again; scores
            and pattern are without it, so rows of the pattern sum to less than 1.
    """
    call = "attention_interface_0"
    inner = f"eager.{call}.source"
    scores, pattern = (
        Spot(attn, f"{inner}.softmax_0.input"),
        Spot(attn, f"{inner}.softmax_0.output"),
    )
    if sinks:
        scores = Spot(attn, f"{inner}.cat_0.input", (0,))
        pattern = Spot(attn, f"{inner}.dropout_0.input")
    return {
        "q": Spot(attn, f"source.{call}.inputs", (0, 1), head_first),
        "k": Spot(attn, f"source.{call}.inputs", (0, 2), head_first),
        "v": Spot(attn, f"source.{call}.inputs", (0, 3), head_first),
        "scores": scores,
        "pattern": pattern,
    }


def own_attention(attn: str, call: str = "self__attn_0", kind: str = "source") -> dict[str, Place]:
    """Attention in a method of the module: `attn_output, weights = self._attn(q, k, v, mask)`."""
    return {
        "q": Spot(attn, f"{kind}.{call}.inputs", (0, 0), head_first),
        "k": Spot(attn, f"{kind}.{call}.inputs", (0, 1), head_first),
        "v": Spot(attn, f"{kind}.{call}.inputs", (0, 2), head_first),
        "scores": Spot(attn, f"{kind}.{call}.source.softmax_0.input"),
        "pattern": Spot(attn, f"{kind}.{call}.source.softmax_0.output"),
    }


def norm_places(name: str, norm: Norm) -> dict[str, Place]:
    """What goes into a norm and comes out, its scale, and its result before gain and bias."""
    layout = unflattened if norm.flat else None

    def parts(here: Any, vocabulary: Any) -> tuple[Any, ...]:
        gain, bias, eps = vocabulary.norm_values(norm, here)
        return here(f"{name}_in"), gain, bias, eps, norm.kind

    return {
        f"{name}_in": Spot(norm.path, "input", (), layout),
        f"{name}_out": Spot(norm.path, "output", (), layout),
        f"{name}_scale": Derived(
            lambda here, vocabulary: derive(
                NORM_SCALE, here(f"{name}_out"), *parts(here, vocabulary)
            ),
            (f"{name}_in", f"{name}_out"),
        ),
        f"{name}_normalized": Derived(
            lambda here, vocabulary: derive(
                NORMALIZED, here(f"{name}_out"), *parts(here, vocabulary)
            ),
            (f"{name}_in", f"{name}_out"),
        ),
    }


HEAD_OUTPUT = Derived(
    lambda here, vocabulary: derive(
        HEAD_OUT, here("o_out"), here("z"), vocabulary.recorded_weight(here, "attn.W_O")
    ),
    ("o_out", "z"),
)


def head_input(which: str, norm: Norm | None) -> Place:
    """`hook_q_input`: the residual stream as the projection of each head takes it."""
    if norm is None:
        return Missing("there is no norm before attention, so attn_in is what every head takes")

    def read(here: Any, vocabulary: Any) -> Any:
        gain, shift, eps = vocabulary.norm_values(norm, here)
        weight = vocabulary.recorded_weight(here, f"attn.W_{which.upper()}")
        bias = vocabulary.recorded_weight(here, f"attn.b_{which.upper()}")
        return derive(
            HEAD_INPUT,
            here(f"{which}_pre"),
            here("ln1_in"),
            (gain, shift),
            weight,
            bias,
            eps,
            norm.kind,
            name=which,
        )

    return Derived(read, (f"{which}_pre", "ln1_in"))


def expert_output(experts: str, flat: bool = True) -> Place:
    """What each chosen expert of a token adds, by applying the experts to one choice at a time."""

    def read(here: Any, vocabulary: Any) -> Any:
        whole, entered = here("experts_out"), here("experts_in")
        indices, weights = here("expert_indices"), here("expert_weights")
        batch, token, chosen = indices.shape
        apply = vocabulary.module(here, experts)
        parts = [
            apply(
                entered.reshape(batch * token, -1),
                indices[..., j : j + 1].reshape(batch * token, 1),
                weights[..., j : j + 1].reshape(batch * token, 1),
            ).reshape(batch, token, -1)
            for j in range(chosen)
        ]
        return derive(EXPERT_OUT, whole, parts, made_of=(entered, indices, weights))

    return Derived(read, ("experts_out", "expert_indices", "expert_weights"))


def router(gate: str, experts: str, logits: str = "linear_0") -> dict[str, Place]:
    """A mixture of experts whose router returns (logits, weights, indices), tokens flattened.

    Args:
        logits: the operation in the router's forward that gives them: those that it returns are used
            by nobody.
    """
    weights, indices = 1, 2
    return {
        "router_logits": Spot(gate, f"source.{logits}.output", (), unflattened),
        "expert_weights": Spot(gate, "output", (weights,), unflattened),
        "expert_indices": Spot(gate, "output", (indices,), unflattened),
        "experts_in": Spot(experts, "input", (), unflattened),
        "experts_out": Spot(experts, "output", (), unflattened),
        "expert_out": expert_output(experts),
    }


# -------------------------------------------------------------------- a decoder


def _in_out(view: Features | None) -> Features:
    """Weights of a linear module arrive as [d_in, d_out]."""
    return lambda weight, sizes: weight if view is None else view(weight, sizes)


def _projection(name: str, part: Part, bias: bool) -> dict[str, Weight]:
    def weight(value: Any, sizes: Any) -> Any:
        assert part.features is not None
        return part.features(value, sizes).permute(1, 0, 2)

    found = {f"attn.W_{name}": Weight(part.path, "weight", weight)}
    if bias:
        found[f"attn.b_{name}"] = Weight(part.path, "bias", part.features)
    return found


def _out_heads(value: Any, sizes: Any) -> Any:
    return value.unflatten(0, (sizes.n_heads, sizes.d_head))


def _part(given: str | Part, prefix: str, features: Features | None, flat: bool = False) -> Part:
    part = Part(given) if isinstance(given, str) else given
    return dataclasses.replace(
        part,
        path=f"{prefix}.{part.path}" if prefix else part.path,
        features=part.features or features,
        flat=part.flat or flat,
    )


def decoder(
    *,
    layers: str,
    embed: str,
    ln_final: str | None,
    norm: str,
    attn: str,
    o: str,
    q: str | Part,
    k: str | Part,
    v: str | Part,
    w_in: str | Part,
    w_out: str | Part,
    w_gate: str | Part | None = None,
    mlp: str | None = "mlp",
    ln1: str | None = None,
    ln2: str | None = None,
    ln1_post: str | None = None,
    ln2_post: str | None = None,
    unembed: str = "lm_head",
    pos_embed: str | None = None,
    positional: str = "rotary",
    offset: float = 0.0,
    parallel: bool = False,
    flat: bool = False,
    inner: str = "",
    attention: Mapping[str, Place] | None = None,
    resid_mid: str = "source.add_0.output",
    experts: Mapping[str, Place] | None = None,
    places: Mapping[str, Place] | None = None,
    model_places: Mapping[str, Place] | None = None,
    weights: Mapping[str, Weight] | None = None,
    embed_scale: float = 1.0,
    post_norm: bool = False,
) -> Architecture:
    """A stack of blocks of attention and MLP, from paths.

    Args:
        layers, embed, ln_final, unembed, pos_embed: paths in the model.
        norm: "LN" or "RMS".
        attn, mlp, ln1, ln2, ln1_post, ln2_post: paths in a block; `ln1_post` normalizes what attention
            adds. `mlp=None`: its parts are the block's own.
        q, k, v, o: below `attn`; w_in, w_gate, w_out: below `mlp`.
        inner: the module of `attn` that has them, where that is one deeper.
        flat: the MLP sees batch and token in one axis.
        resid_mid: the operation in the block's forward that makes it.
        attention, experts, places, model_places, weights: what differs from all this.
    """
    core = f"{attn}.{inner}" if inner else attn
    below = f"{mlp}" if mlp else ""
    parts = {
        "q": _part(q, core, heads),
        "k": _part(k, core, kv_heads),
        "v": _part(v, core, kv_heads),
    }
    out = f"{core}.{o}" if not o.startswith("^") else o[1:]
    norms = {
        name: Norm(path, norm, offset, flat and name in ("ln2", "ln2_post"))
        for name, path in (
            ("ln1", ln1),
            ("ln2", ln2),
            ("ln1_post", ln1_post),
            ("ln2_post", ln2_post),
        )
        if path is not None
    }
    before = norms.get("ln1") if ln1 is not None else None
    found: dict[str, Place] = {
        "resid_pre": Spot("", "input"),
        "resid_post": Spot("", "output"),
        "attn_in": Spot(core, "input"),
        "z": Spot(out, "input", (), in_heads),
        "o_out": Spot(out, "output"),
        "attn_out": Spot(ln1_post) if ln1_post else Spot(attn, "output", (0,)),
        "head_out": HEAD_OUTPUT,
        **{f"{name}_pre": Spot(p.path, "output", (), _layout(p)) for name, p in parts.items()},
        **(attention or interface(core)),
        **{f"{name}_input": head_input(name, before) for name in "qkv"},
    }
    if parallel:
        found["resid_mid"] = Missing(
            "attention and MLP are parallel here: both read resid_pre, and nothing is between them"
        )
    else:
        found["resid_mid"] = Spot("", resid_mid)
    for name, one in norms.items():
        found.update(norm_places(name, one))
    up = _part(w_in, below, None, flat)
    down = _part(w_out, below, None, flat)
    gate = None if w_gate is None else _part(w_gate, below, None, flat)
    first = up if gate is None else gate
    flattened = unflattened if flat else None
    entered = mlp if mlp is not None else up.path
    left = ln2_post or (mlp if mlp is not None else down.path)
    found["mlp_in"] = Spot(entered, "input", (), flattened)
    found["mlp_out"] = Spot(left, "output", (), flattened)
    found["pre_attn"] = found.get("ln1_in", found["attn_in"])
    found["post_attn"] = found["attn_out"]
    found["pre_mlp"] = found.get("ln2_in", found["mlp_in"])
    found["post_mlp"] = found["mlp_out"]
    every: dict[str, Weight] = {}
    if experts is None:
        found["mlp_pre"] = Spot(first.path, "output", (), _layout(first))
        found["mlp_post"] = Spot(down.path, "input", (), flattened)
        if gate is not None:
            found["mlp_up"] = Spot(up.path, "output", (), _layout(up))
            every["mlp.W_gate"] = Weight(gate.path, "weight", _in_out(gate.features))
            every["mlp.b_gate"] = Weight(gate.path, "bias", gate.features)
        else:
            found["mlp_up"] = Missing("its MLP has no gate")
        every["mlp.W_in"] = Weight(up.path, "weight", _in_out(up.features))
        every["mlp.b_in"] = Weight(up.path, "bias", up.features)
        every["mlp.W_out"] = Weight(down.path, "weight")
        every["mlp.b_out"] = Weight(down.path, "bias")
    else:
        reason = "its neurons are those of experts, each of which sees some tokens: use expert_out"
        found.update({name: Missing(reason) for name in ("mlp_pre", "mlp_post", "mlp_up")})
        found.update(experts)
    for name, part in parts.items():
        every.update(_projection(name.upper(), part, True))
    every["attn.W_O"] = Weight(out, "weight", _out_heads)
    every["attn.b_O"] = Weight(out, "bias")
    for name, one in norms.items():
        every[f"{name}.w"] = Weight(one.path, "weight")
        every[f"{name}.b"] = Weight(one.path, "bias")
    found.update(places or {})
    every.update(weights or {})
    last = None if ln_final is None else Norm(ln_final, norm, offset)
    own: dict[str, Place] = {
        "embed": Spot(embed, "output"),
        "pos_embed": Spot(pos_embed, "output")
        if pos_embed
        else Missing(f"its positions are {positional}: no vector of a position is added"),
        "logits": Spot("", "output", ("logits",)),
        "unembed_in": Spot(unembed, "input"),
        "unembed_out": Spot(unembed, "output"),
    }
    if last is not None:
        own["ln_final"] = Spot(last.path)
        own.update(norm_places("ln_final", last))
    else:
        own["ln_final"] = Missing("it has no final norm")
    own.update(model_places or {})
    whole = {
        "embed.W_E": Weight(embed, "weight"),
        "unembed.W_U": Weight(unembed, "weight"),
        "unembed.b_U": Weight(unembed, "bias"),
    }
    if pos_embed:
        whole["pos_embed.W_pos"] = Weight(pos_embed, "weight")
    if last is not None:
        whole["ln_final.w"] = Weight(last.path, "weight")
        whole["ln_final.b"] = Weight(last.path, "bias")
    return Architecture(
        layers,
        (Block(found, every, norms, parallel, post_norm, gate is not None),),
        own,
        whole,
        last,
        positional,
        unembed,
        embed_scale,
    )
