"""Owns `HookedTransformerConfig`: the sizes and kinds of a model under TransformerLens' names, what is
built from them, and the start values of weights.

What is built is a class of transformers as it is, so a configuration that no such class computes is
refused, and the message says what can be had instead. Three shapes are known:

    positions     norm   MLP      class        what else it can do
    "standard"    LN     plain    GPT-2        no division of scores, or one by the layer's number too
    "rotary"      RMS    gated    Llama        any d_head, grouped queries; it has no biases
    "rotary"      LN     plain    GPT-NeoX     rotary_dim below d_head, parallel attention and MLP

None of them has b_U. They are built without dropout, which TransformerLens does not have.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from ..models.architectures import Architecture, stacks_of
from ..models.language import LanguageModel
from ..models.weights import shares
from ..tracing.errors import GraftworkError, near

#: Types of models whose texts get no beginning-of-text token in TransformerLens unless it is asked for.
#: Source: TransformerLens 3.9, loading_from_pretrained.py for bloom, gpt_neox, phi, qwen, qwen2 and
#: qwen3; what that loader does not know is as its model_bridge has it.
_NO_BOS = frozenset(
    "bloom ernie4_5 ernie4_5_moe exaone exaone4 glm glm4 glm4_moe glm4_moe_lite glm4v "
    "glm_moe_dsa gpt_neox granite granitemoe granitemoehybrid llada minimax_m2 mpt phi phimoe "
    "qwen qwen2 qwen2_5_vl qwen2_audio qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_moe qwen3_next "
    "qwen3_vl qwen3_vl_moe recurrent_gemma seed_oss smollm3 starcoder2".split()
)
#: How TransformerLens says that a soft cap is not used.
_NO_CAP = -1.0
_POSITIONS = ("standard", "rotary", "shortformer", "alibi", "relative_positional_bias", "none")
_NORMS = ("LN", "LNPre", "RMS", "RMSPre", None)
_DIRECTIONS = ("causal", "bidirectional")
_BUILT = (
    'What can be built is positional_embedding_type="standard" with normalization_type="LN" and '
    'gated_mlp=False (GPT-2), "rotary" with "RMS" and gated_mlp=True (Llama), or "rotary" with "LN" '
    "and gated_mlp=False (GPT-NeoX)."
)


class ConfigError(GraftworkError, ValueError):
    """A configuration that contradicts itself, or that no class of transformers computes."""

    @classmethod
    def unknown(cls, name: str, known: Iterable[str]) -> ConfigError:
        return cls(f"`{name}` is no field of HookedTransformerConfig. {near(name, known)}")

    @classmethod
    def value(cls, name: str, value: object, known: Iterable[object]) -> ConfigError:
        return cls(f"`{name}` is {' or '.join(repr(one) for one in known)}, not {value!r}.")

    @classmethod
    def not_built(cls, name: str, value: object, reason: str) -> ConfigError:
        return cls(f"`{name}={value!r}` cannot be built: {reason}")


@dataclasses.dataclass(kw_only=True)
class HookedTransformerConfig:
    """Sizes, kinds and start values of a model, as TransformerLens names them.

    Fields can be set later; what is computed from others is computed once, when it is made. To make
    one does not touch the state of random numbers: see `set_seed_everywhere`.

    Attributes:
        n_layers: blocks.
        d_model: channels of the residual stream.
        n_ctx: most tokens of a prompt; None where positions have no end.
        d_head: channels of a head.
        n_heads: query heads; -1 means d_model // d_head.
        d_mlp: neurons of an MLP; None means 4 d_model, or none with `attn_only`; 0 is no MLP.
        act_fn: activation of the MLP, as transformers calls it.
        d_vocab: rows of the embedding; -1 where the tokenizer is to say it.
        d_vocab_out: logits; -1 means d_vocab.
        eps: what norms add to the variance.
        use_attn_scale, attn_scale: scores are divided by attn_scale; -1 means sqrt(d_head).
        attn_only: no MLPs.
        positional_embedding_type: "standard", "rotary", "shortformer", "alibi",
            "relative_positional_bias" or "none".
        rotary_dim: channels of a head that are rotated; None means all, with rotary positions.
        normalization_type: "LN", "RMS", the same without gain and bias ("LNPre", "RMSPre"), or None.
        parallel_attn_mlp: attention and MLP read the same residual stream.
        gated_mlp: the MLP multiplies two projections.
        n_key_value_heads: heads of keys and values, where queries share them; None means n_heads.
        attn_scores_soft_cap, output_logits_soft_cap: -1 where there is none.
        window_size, use_local_attn, attn_types: of sliding attention; types are "local" or "global".
        attention_dir: "causal" or "bidirectional".
        init_mode: "gpt2", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal" or
            "muP": see `init_weights`.
        initializer_range: the standard deviation with "gpt2", else the gain; negative means the mode's
            default, 0.8 / sqrt(d_model) or 1. "muP" does not use it.
        seed: of the start values; None draws them from torch's own state.
        use_attn_result, use_split_qkv_input, use_hook_mlp_in, use_attn_in, use_hook_tokens,
            ungroup_grouped_query_attention: hook points that are only there if asked for.
        default_prepend_bos: texts begin with the BOS token. Of a model that exists, what
            TransformerLens has for its type: not for Bloom, GLM, GPT-NeoX (Pythia), Granite, Phi, Qwen.
        device: None means "cuda" if there is one, else "cpu".
        dtype: a torch.dtype, or its name.

    Raises:
        ConfigError: a field or a value is not known, or sizes contradict each other.

    Source: TransformerLens, config/hooked_transformer_config.py; `NTK`, `yarn` and `rotary` fields hold
    the parameters of rotary positions.
    """

    n_layers: int
    d_model: int
    n_ctx: int | None
    d_head: int
    n_heads: int = -1
    d_mlp: int | None = None
    act_fn: str | None = "relu"
    d_vocab: int = -1
    d_vocab_out: int = -1
    eps: float = 1e-5
    use_attn_scale: bool = True
    attn_scale: float = -1.0
    scale_attn_by_inverse_layer_idx: bool = False
    attn_only: bool = False
    positional_embedding_type: str = "standard"
    normalization_type: str | None = "LN"
    final_rms: bool = False
    use_normalization_before_and_after: bool = False
    post_embedding_ln: bool = False
    parallel_attn_mlp: bool = False
    gated_mlp: bool = False
    n_key_value_heads: int | None = None
    ungroup_grouped_query_attention: bool = False
    tie_word_embeddings: bool = False
    num_experts: int | None = None
    experts_per_token: int | None = None
    norm_topk_prob: bool = False

    attention_dir: str = "causal"
    window_size: int | None = None
    use_local_attn: bool = False
    attn_types: list[str] | None = None
    attn_scores_soft_cap: float = _NO_CAP
    output_logits_soft_cap: float = _NO_CAP
    use_qk_norm: bool = False
    clip_qkv: float | None = None
    use_logn_attn: bool = False
    use_attention_sinks: bool = False
    train_seq_length: int | None = None

    rotary_dim: int | None = None
    rotary_base: float = 10000.0
    rotary_base_local: float | None = None
    rotary_scaling_factor: float = 1.0
    rotary_adjacent_pairs: bool = False
    use_dynamic_ntk_rope: bool = False
    use_NTK_by_parts_rope: bool = False
    NTK_by_parts_low_freq_factor: float = 1.0
    NTK_by_parts_high_freq_factor: float = 4.0
    NTK_by_parts_factor: float = 8.0
    NTK_original_ctx_len: int = 8192
    use_yarn_rope: bool = False
    yarn_factor: float = 1.0
    yarn_attention_factor: float = 1.0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_truncate: bool = True
    yarn_global_attn_only: bool = False
    relative_attention_max_distance: int | None = None
    relative_attention_num_buckets: int | None = None

    use_attn_result: bool = False
    use_split_qkv_input: bool = False
    use_hook_mlp_in: bool = False
    use_attn_in: bool = False
    use_hook_tokens: bool = False

    init_weights: bool = True
    init_mode: str = "gpt2"
    initializer_range: float = -1.0
    seed: int | None = None

    model_name: str = "custom"
    original_architecture: str | None = None
    tokenizer_name: str | None = None
    tokenizer_prepends_bos: bool | None = None
    default_prepend_bos: bool = True
    decoder_start_token_id: int | None = None
    trust_remote_code: bool = False
    from_checkpoint: bool = False
    checkpoint_index: int | None = None
    checkpoint_label_type: str | None = None
    checkpoint_value: int | None = None
    load_in_4bit: bool = False
    quantization_method: str | None = None
    uses_rms_norm: bool = False
    layer_norm_folding: bool = False
    device: str | None = None
    n_devices: int = 1
    dtype: torch.dtype = torch.float32

    def __new__(cls, *args: Any, **fields: Any) -> HookedTransformerConfig:
        # Before the dataclass' own __init__, which would know no name that is near.
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ConfigError.unknown(name, known)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, known in (
            ("positional_embedding_type", _POSITIONS),
            ("normalization_type", _NORMS),
            ("attention_dir", _DIRECTIONS),
            ("init_mode", tuple(_SPREADS)),
            ("default_prepend_bos", (True, False)),
        ):
            if getattr(self, name) not in known:
                raise ConfigError.value(name, getattr(self, name), known)
        self._check_sizes()
        self.dtype = _dtype(self.dtype)
        if self.d_mlp is None and not self.attn_only:
            self.d_mlp = 4 * self.d_model
        if self.d_vocab_out == -1:
            self.d_vocab_out = self.d_vocab
        if self.attn_scale == -1.0:
            self.attn_scale = math.sqrt(self.d_head) if self.use_attn_scale else 1.0
        if self.rotary_dim is None and self.positional_embedding_type == "rotary":
            self.rotary_dim = self.d_head
        if self.initializer_range < 0:
            gpt2 = self.init_mode == "gpt2"
            self.initializer_range = 0.8 / math.sqrt(self.d_model) if gpt2 else 1.0
        self.device = str(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def _check_sizes(self) -> None:
        for name in ("n_layers", "d_model", "n_ctx"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ConfigError(f"`{name}` is at least 1, not {size}.")
        if self.n_heads == -1:
            if self.d_head < 1 or self.d_model % self.d_head:
                raise ConfigError(
                    f"d_model={self.d_model} is no multiple of d_head={self.d_head}, so n_heads cannot "
                    "be found from them: give n_heads."
                )
            self.n_heads = self.d_model // self.d_head
        groups = self.n_key_value_heads
        if groups is not None and (groups < 1 or self.n_heads % groups):
            raise ConfigError(
                f"n_heads={self.n_heads} is no multiple of n_key_value_heads={groups}: each head of "
                "keys and values serves as many queries as every other."
            )
        if self.use_local_attn and (self.window_size is None or self.attn_types is None):
            raise ConfigError(
                "`use_local_attn` needs window_size and attn_types, one for each layer."
            )

    @property
    def n_params(self) -> int:
        """Numbers in the matrices of attention and MLPs alone: no embeddings, biases or norms.

        Keys and values are counted once for each head of theirs. TransformerLens counts them once for
        each query head, so with grouped queries its number is larger.
        """
        shared = self.n_key_value_heads or self.n_heads
        layer = 2 * self.d_model * self.d_head * (self.n_heads + shared)
        if not self.attn_only:
            neurons = self.d_model * (self.d_mlp or 0) * (3 if self.gated_mlp else 2)
            # Each expert has a row of the router, too.
            layer += (neurons + self.d_model) * self.num_experts if self.num_experts else neurons
        return self.n_layers * layer

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, and n_params."""
        return {**dataclasses.asdict(self), "n_params": self.n_params}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> HookedTransformerConfig:
        """A configuration from fields by name; n_params, which is computed, is left out.

        Raises:
            ConfigError: a field is not known or missing, or a value cannot be.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        given = {name: value for name, value in config_dict.items() if name != "n_params"}
        missing = [
            name
            for name, field in fields.items()
            if name not in given and field.default is dataclasses.MISSING
        ]
        if missing and not set(given) - set(fields):
            raise ConfigError(f"HookedTransformerConfig needs {', '.join(missing)}.")
        return cls(**given)

    @classmethod
    def unwrap(cls, config: Mapping[str, Any] | HookedTransformerConfig) -> HookedTransformerConfig:
        """The configuration itself, or one made from fields by name.

        Raises:
            ConfigError: it is neither, or does not fit (`from_dict`).
        """
        if isinstance(config, cls):
            return config
        if isinstance(config, Mapping):
            return cls.from_dict(config)
        raise ConfigError(
            f"A HookedTransformerConfig or a dict of its fields is needed, not {config!r}. Use "
            "`from_pretrained` to load a model by its name."
        )

    def set_seed_everywhere(self, seed: int) -> None:
        """Seed torch, numpy and Python's random for the whole process."""
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def is_layer_norm_activation(self) -> bool:
        """True if a LayerNorm follows the activation, as in SoLU."""
        return self.act_fn is not None and self.act_fn.endswith("_ln")


def _dtype(given: Any) -> torch.dtype:
    found = getattr(torch, str(given).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"`dtype` is a floating torch.dtype or its name, not {given!r}.")
    return found


# -------------------------------------------------------------------- of a model


def config_of(model: LanguageModel) -> HookedTransformerConfig:
    """What TransformerLens' configuration would say of a model, from its `cfg` and configuration.

    A model without attention has n_heads and d_head 0, one without MLPs d_mlp 0.

    Raises:
        UnavailableNameError: the model's architecture is not known.
    """
    sizes, text = model.cfg, model.config.get_text_config()
    rotary = sizes.positional_embedding_type == "rotary"
    relative = sizes.positional_embedding_type == "relative"
    vocabulary = model.vocabulary((stacks_of(model.config) or ("layers",))[-1])
    block = vocabulary.architecture.block(0)
    inside = {path.rpartition(".")[2] for path in _paths_below(model, vocabulary.layer_path(0))}
    shared = sizes.n_kv_heads
    generates = getattr(model.module_tree(), "can_generate", lambda: True)()
    scale, by_layer = _scale_of(text, sizes.d_head)
    start = getattr(text, "initializer_range", None)
    return HookedTransformerConfig(
        n_layers=sizes.n_layers,
        d_model=sizes.d_model,
        n_ctx=sizes.n_ctx,
        d_head=sizes.d_head,
        n_heads=sizes.n_heads,
        d_mlp=sizes.d_mlp or 0,
        act_fn=sizes.act_fn,
        d_vocab=sizes.d_vocab,
        d_vocab_out=sizes.d_vocab_out,
        eps=1e-5 if sizes.eps is None else float(sizes.eps),
        use_attn_scale=scale is not None,
        attn_scale=1.0 if scale is None else scale,
        scale_attn_by_inverse_layer_idx=by_layer,
        positional_embedding_type="relative_positional_bias"
        if relative
        else sizes.positional_embedding_type,
        normalization_type=sizes.normalization_type,
        uses_rms_norm=sizes.normalization_type == "RMS",
        use_normalization_before_and_after={"ln1", "ln1_post"} <= set(block.norms),
        parallel_attn_mlp=sizes.parallel_attn_mlp,
        gated_mlp=sizes.gated_mlp,
        n_key_value_heads=None if shared in (0, sizes.n_heads) else shared,
        tie_word_embeddings=sizes.tie_word_embeddings,
        num_experts=sizes.num_experts,
        experts_per_token=sizes.experts_per_token,
        attention_dir="causal" if generates else "bidirectional",
        attn_scores_soft_cap=sizes.attn_scores_soft_cap or _NO_CAP,
        output_logits_soft_cap=sizes.output_logits_soft_cap or _NO_CAP,
        use_qk_norm=bool(inside & {"q_norm", "q_layernorm"}),
        use_attention_sinks="attn.sinks" in block.weights,
        **_window_of(text, sizes.window_size, sizes.n_layers),
        **(_rotation_of(text, sizes.d_head) if rotary else {}),
        init_weights=False,
        initializer_range=-1.0 if start is None else float(start),
        model_name=sizes.model_name,
        original_architecture=sizes.architecture,
        tokenizer_name=getattr(model.tokenizer, "name_or_path", None) or None,
        default_prepend_bos=model.config.model_type not in _NO_BOS,
        device=str(model.device),
        dtype=torch.float32 if sizes.dtype is None else sizes.dtype,
    )


def _paths_below(model: LanguageModel, path: str) -> list[str]:
    return [name for name, _ in model.module_tree().get_submodule(path).named_modules()]


def _scale_of(text: Any, d_head: int) -> tuple[float | None, bool]:
    """What scores are divided by, None for nothing, and whether by the number of the layer too."""
    by_layer = bool(getattr(text, "scale_attn_by_inverse_layer_idx", False))
    if text.model_type in ("gpt_neo", "t5") or not getattr(text, "scale_attn_weights", True):
        return None, by_layer
    return math.sqrt(getattr(text, "query_pre_attn_scalar", None) or d_head), by_layer


def _window_of(text: Any, window: int | None, n_layers: int) -> dict[str, Any]:
    if window is None:
        return {}
    kinds = getattr(text, "layer_types", None) or getattr(text, "attention_layers", None)
    local = [kind in ("sliding_attention", "local") for kind in kinds or ("local",) * n_layers]
    return {
        "window_size": window,
        "use_local_attn": any(local),
        "attn_types": ["local" if one else "global" for one in local],
    }


def _rotation_of(text: Any, d_head: int) -> dict[str, Any]:
    """The fields of rotary positions, from transformers' `rope_parameters`."""
    every = getattr(text, "rope_parameters", None) or {}
    rope = every.get("full_attention", every)
    near_by = every.get("sliding_attention", {})
    part = rope.get("partial_rotary_factor") or getattr(text, "partial_rotary_factor", None) or 1.0
    found = {
        "rotary_dim": getattr(text, "rotary_dim", None) or int(d_head * part),
        "rotary_base": float(rope.get("rope_theta", 10000.0)),
        "rotary_base_local": near_by.get("rope_theta"),
        "rotary_adjacent_pairs": text.model_type in ("gptj", "codegen"),
    }
    names = {
        "linear": {"rotary_scaling_factor": "factor"},
        "llama3": {
            "NTK_by_parts_factor": "factor",
            "NTK_by_parts_low_freq_factor": "low_freq_factor",
            "NTK_by_parts_high_freq_factor": "high_freq_factor",
            "NTK_original_ctx_len": "original_max_position_embeddings",
        },
        "yarn": {
            "yarn_factor": "factor",
            "yarn_attention_factor": "attention_factor",
            "yarn_beta_fast": "beta_fast",
            "yarn_beta_slow": "beta_slow",
            "yarn_original_max_position_embeddings": "original_max_position_embeddings",
            "yarn_truncate": "truncate",
        },
    }.get(rope.get("rope_type", "default"), {})
    found.update({mine: rope[name] for mine, name in names.items() if name in rope})
    found["use_NTK_by_parts_rope"] = rope.get("rope_type") == "llama3"
    found["use_yarn_rope"] = rope.get("rope_type") == "yarn"
    found["use_dynamic_ntk_rope"] = rope.get("rope_type") == "dynamic"
    return found


# -------------------------------------------------------------------- building

#: Fields that none of the classes computes with another value than the default.
_NEVER_BUILT = (
    "attn_only", "attention_dir", "use_local_attn", "attn_scores_soft_cap", "output_logits_soft_cap",
    "use_qk_norm", "clip_qkv", "use_logn_attn", "use_attention_sinks", "final_rms", "num_experts",
    "use_normalization_before_and_after", "post_embedding_ln", "rotary_base_local",
    "rotary_adjacent_pairs", "use_dynamic_ntk_rope", "use_yarn_rope",
)  # fmt: skip
#: Activations with parameters of their own, which have no unified name.
_LEARNED_ACTIVATIONS = ("prelu", "xielu")


def build(config: HookedTransformerConfig) -> torch.nn.Module:
    """A model of transformers with random weights, of the shape that a configuration asks for.

    Its weights are those that transformers starts with: `init_weights` sets those of the configuration.
    With a seed they repeat, and torch's own random state stays as it was. If d_vocab_out differs from
    d_vocab, the head has d_vocab_out rows, which transformers' own `labels=` loss and `from_pretrained`
    do not know.

    Returns:
        GPT2LMHeadModel, LlamaForCausalLM or GPTNeoXForCausalLM, for evaluation, on the CPU.

    Raises:
        ConfigError: no class computes it.
    """
    make = _class_for(config)
    _check_vocabulary(config)
    _check_activation(config)
    from transformers import AutoModelForCausalLM

    options = make(config)
    options.update(dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")))
    if config.init_mode == "gpt2":
        options["initializer_range"] = config.initializer_range
    # Random numbers are drawn on the CPU, whatever the device, so that they are the same everywhere.
    with torch.random.fork_rng(devices=[], enabled=config.seed is not None):
        if config.seed is not None:
            torch.default_generator.manual_seed(config.seed)
        make_module: Any = AutoModelForCausalLM.from_config
        module = make_module(_hf_config(options), dtype=config.dtype)
        if config.d_vocab_out != config.d_vocab:
            head = torch.nn.Linear(config.d_model, config.d_vocab_out, bias=False)
            torch.nn.init.normal_(head.weight, std=module.config.initializer_range)
            module.set_output_embeddings(head.to(config.dtype))
    built: torch.nn.Module = module.eval()
    return built


def _hf_config(options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**options)


def _class_for(
    config: HookedTransformerConfig,
) -> Callable[[HookedTransformerConfig], dict[str, Any]]:
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in _NEVER_BUILT:
        if getattr(config, name) != defaults[name]:
            reason = f"no class of transformers that is built here computes it. {_BUILT}"
            raise ConfigError.not_built(name, getattr(config, name), reason)
    kind = config.normalization_type
    if kind in ("LNPre", "RMSPre"):
        raise ConfigError.not_built(
            "normalization_type",
            kind,
            f'norms of transformers have gains; give "{kind.removesuffix("Pre")}", whose gains start '
            "at 1 and biases at 0, which is the same until they are trained.",
        )
    found = _SHAPES.get((config.positional_embedding_type, kind, config.gated_mlp))
    if found is None:
        gated = "a gated" if config.gated_mlp else "a plain"
        raise ConfigError(
            f"No class that is built here has positional_embedding_type="
            f"{config.positional_embedding_type!r} with normalization_type={kind!r} and {gated} MLP. "
            f"{_BUILT}"
        )
    return found


def _check_vocabulary(config: HookedTransformerConfig) -> None:
    if config.d_vocab < 1 or config.d_vocab_out < 1:
        raise ConfigError(
            f"d_vocab={config.d_vocab} and d_vocab_out={config.d_vocab_out}: give d_vocab, or a "
            "tokenizer that says it."
        )
    if config.tie_word_embeddings and config.d_vocab_out != config.d_vocab:
        raise ConfigError(
            f"Embedding and unembedding of d_vocab={config.d_vocab} and d_vocab_out="
            f"{config.d_vocab_out} cannot share their weights: set tie_word_embeddings=False."
        )
    if config.n_ctx is None:
        raise ConfigError.not_built("n_ctx", None, "give the most tokens that a prompt may have.")


def _check_activation(config: HookedTransformerConfig) -> None:
    from transformers.activations import ACT2FN

    if config.act_fn not in ACT2FN or config.act_fn in _LEARNED_ACTIVATIONS:
        known = [name for name in ACT2FN if name not in _LEARNED_ACTIVATIONS]
        raise ConfigError.not_built(
            "act_fn",
            config.act_fn,
            f"transformers has no such activation for these classes. {near(str(config.act_fn), known)}",
        )
    if not config.d_mlp or config.d_mlp < 1:
        raise ConfigError.not_built("d_mlp", config.d_mlp, f"every block has an MLP. {_BUILT}")


def _heads_fill(config: HookedTransformerConfig, kind: str) -> None:
    """Where one matrix makes queries, keys and values, heads are slices of d_model."""
    if config.n_heads * config.d_head != config.d_model:
        raise ConfigError(
            f"{kind} needs d_head = d_model / n_heads, and {config.d_model} / {config.n_heads} is not "
            f"{config.d_head}: change one of them, or take rotary positions, RMS and a gated MLP, "
            "where d_head is free."
        )
    if config.n_key_value_heads not in (None, config.n_heads):
        raise ConfigError.not_built(
            "n_key_value_heads",
            config.n_key_value_heads,
            f"{kind} has keys and values of each head's own; queries share them with rotary positions, "
            "RMS and a gated MLP.",
        )


def _plain_scale(config: HookedTransformerConfig, kind: str, may_leave: bool = False) -> None:
    if config.scale_attn_by_inverse_layer_idx and not may_leave:
        raise ConfigError.not_built(
            "scale_attn_by_inverse_layer_idx", True, f"{kind} does not; GPT-2 does. {_BUILT}"
        )
    if not config.use_attn_scale and not may_leave:
        raise ConfigError.not_built(
            "use_attn_scale",
            False,
            f"{kind} always divides scores by sqrt(d_head); GPT-2 need not. {_BUILT}",
        )
    usual = math.sqrt(config.d_head)
    if config.use_attn_scale and not math.isclose(config.attn_scale, usual, rel_tol=1e-6):
        raise ConfigError.not_built(
            "attn_scale", config.attn_scale, f"{kind} divides scores by sqrt(d_head) = {usual:.6g}."
        )


def _not_parallel(config: HookedTransformerConfig, kind: str) -> None:
    if config.parallel_attn_mlp:
        raise ConfigError.not_built(
            "parallel_attn_mlp",
            True,
            f"{kind} has attention before the MLP; they are parallel with rotary positions, LN and a "
            "plain MLP.",
        )


def _rope(config: HookedTransformerConfig) -> dict[str, Any]:
    """transformers' `rope_parameters`."""
    size = config.rotary_dim
    if size is None or not 2 <= size <= config.d_head or size % 2:
        raise ConfigError.not_built(
            "rotary_dim",
            size,
            f"channels are rotated in pairs: give an even number from 2 to d_head={config.d_head}.",
        )
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": float(config.rotary_base)}
    if config.use_NTK_by_parts_rope:
        found.update(
            rope_type="llama3",
            factor=float(config.NTK_by_parts_factor),
            low_freq_factor=float(config.NTK_by_parts_low_freq_factor),
            high_freq_factor=float(config.NTK_by_parts_high_freq_factor),
            original_max_position_embeddings=config.NTK_original_ctx_len,
        )
    elif config.rotary_scaling_factor != 1.0:
        found.update(rope_type="linear", factor=float(config.rotary_scaling_factor))
    return found


def _gpt2(config: HookedTransformerConfig) -> dict[str, Any]:
    _heads_fill(config, "GPT-2")
    _plain_scale(config, "GPT-2", may_leave=True)
    _not_parallel(config, "GPT-2")
    return {
        "model_type": "gpt2",
        "vocab_size": config.d_vocab,
        "n_positions": config.n_ctx,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_mlp,
        "activation_function": config.act_fn,
        "layer_norm_epsilon": config.eps,
        "scale_attn_weights": config.use_attn_scale,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "tie_word_embeddings": config.tie_word_embeddings,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }


def _llama(config: HookedTransformerConfig) -> dict[str, Any]:
    _plain_scale(config, "Llama")
    _not_parallel(config, "Llama")
    if config.rotary_dim != config.d_head:
        raise ConfigError.not_built(
            "rotary_dim",
            config.rotary_dim,
            f"Llama rotates all of d_head={config.d_head}; with LN and a plain MLP, a part can be.",
        )
    if config.d_model % config.n_heads:
        raise ConfigError.not_built(
            "n_heads", config.n_heads, f"Llama needs a divisor of d_model={config.d_model}."
        )
    return {
        "model_type": "llama",
        "vocab_size": config.d_vocab,
        "max_position_embeddings": config.n_ctx,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_key_value_heads or config.n_heads,
        "head_dim": config.d_head,
        "intermediate_size": config.d_mlp,
        "hidden_act": config.act_fn,
        "rms_norm_eps": config.eps,
        "rope_parameters": _rope(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_dropout": 0.0,
    }


def _gpt_neox(config: HookedTransformerConfig) -> dict[str, Any]:
    _heads_fill(config, "GPT-NeoX")
    _plain_scale(config, "GPT-NeoX")
    rope = _rope(config)
    assert config.rotary_dim is not None
    # transformers rounds d_head * part down, so a part that is a little too small would lose a channel.
    part = config.rotary_dim / config.d_head
    if int(config.d_head * part) < config.rotary_dim:
        part = math.nextafter(part, 1.0)
    return {
        "model_type": "gpt_neox",
        "vocab_size": config.d_vocab,
        "max_position_embeddings": config.n_ctx,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_mlp,
        "hidden_act": config.act_fn,
        "layer_norm_eps": config.eps,
        "use_parallel_residual": config.parallel_attn_mlp,
        "rope_parameters": {**rope, "partial_rotary_factor": part},
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


#: Positions, norm and whether the MLP is gated → the options of transformers' configuration.
_SHAPES: dict[tuple[str, str | None, bool], Callable[[HookedTransformerConfig], dict[str, Any]]] = {
    ("standard", "LN", False): _gpt2,
    ("rotary", "RMS", True): _llama,
    ("rotary", "LN", False): _gpt_neox,
}


# -------------------------------------------------------------------- start values


def fans(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """How many numbers a weight takes and gives, as a map: fan-in and fan-out.

    Args:
        name: unified: "attn.W_Q".
        shape: as under that name: [head, d_model, d_head], for W_O [head, d_head, d_model], else
            [..., d_in, d_out].

    For W_O that is n_heads * d_head and d_model. TransformerLens' calc_fan_in_and_fan_out takes d_head
    and n_heads * d_model there, as if heads did not add up; all other weights are as there.
    """
    *_, fan_in, fan_out = shape
    leaf = name.rpartition(".")[2]
    if leaf in ("W_Q", "W_K", "W_V") and len(shape) == 3:
        return fan_in, shape[0] * fan_out
    if leaf == "W_O" and len(shape) == 3:
        return shape[0] * fan_in, fan_out
    return fan_in, fan_out


def _xavier(name: str, shape: tuple[int, ...], gain: float) -> float:
    return gain * math.sqrt(2.0 / sum(fans(name, shape)))


def _kaiming(name: str, shape: tuple[int, ...], gain: float) -> float:
    return gain * math.sqrt(2.0 / fans(name, shape)[0])


def _mup(name: str, shape: tuple[int, ...], gain: float) -> float:
    fan_in, part = fans(name, shape)[0], name.partition(".")[0]
    # By the whole part: "unembed" has "embed" in it.
    if part in ("embed", "pos_embed"):
        return 1.0
    return 1.0 / fan_in if part == "unembed" else 1.0 / math.sqrt(fan_in)


#: Mode → standard deviation of a weight, from its name, shape and initializer_range.
_SPREADS: dict[str, Callable[[str, tuple[int, ...], float], float]] = {
    "gpt2": lambda name, shape, gain: gain,
    "xavier_uniform": _xavier,
    "xavier_normal": _xavier,
    "kaiming_uniform": _kaiming,
    "kaiming_normal": _kaiming,
    "muP": _mup,
}


def init_weights(model: LanguageModel, config: HookedTransformerConfig) -> None:
    """Give every weight of a model, under its unified name, the start value of a mode.

    Biases become 0, gains of norms 1, and matrices are drawn with the standard deviation

        gpt2       r, of a normal distribution
        xavier_*   r sqrt(2 / (fan_in + fan_out))
        kaiming_*  r sqrt(2 / fan_in)
        muP        1 / fan_in for W_U, 1 for W_E and W_pos, 1 / sqrt(fan_in) for all others

    with r = initializer_range, and `fans` of the weight. Numbers are drawn as float32 on the CPU, so a
    seed gives the same on every device and dtype; torch's own random state is used only without a
    seed. An unembedding that shares the embedding's weights has its values. Parameters without a
    unified name stay as they are; what `build` makes has none.

    Raises:
        ConfigError: the mode is muP and embedding and unembedding share their weights.
        OperationError: a weight is quantized or offloaded.

    Source: TransformerLens, HookedTransformer.init_weights; muP: Yang et al. 2022, Tensor Programs V,
    arXiv 2203.03466, table 3.
    """
    vocabulary = model.vocabulary()
    architecture, whole = vocabulary.architecture, vocabulary.model_weights()
    tied = "unembed.W_U" in whole and shares(whole["embed.W_E"], whole["unembed.W_U"])
    if tied and config.init_mode == "muP":
        raise ConfigError(
            "muP starts W_E with scale 1 and W_U with 1 / d_model, which weights that are shared "
            "cannot both have: set tie_word_embeddings=False."
        )
    generator = None if config.seed is None else torch.Generator().manual_seed(config.seed)
    tables = [(whole, _offsets(architecture, None))]
    tables += [
        (vocabulary.layer_weights(index), _offsets(architecture, index))
        for index in range(len(vocabulary))
    ]
    for weights, offsets in tables:
        for name in weights:
            leaf = name.rpartition(".")[2]
            if leaf.startswith("W"):
                if name != "unembed.W_U" or not tied:
                    weights[name] = _draw(name, tuple(weights[name].shape), config, generator)
            elif leaf == "w":
                weights[name] = 1.0 - offsets.get(name, 0.0)
            elif leaf == "b" or leaf.startswith("b_"):
                weights[name] = 0.0


def _offsets(architecture: Architecture, index: int | None) -> dict[str, float]:
    """What is added to the parameter of each norm, by the name of its weight."""
    if index is None:
        return {"ln_final.w": architecture.norm.offset} if architecture.norm else {}
    return {f"{name}.w": norm.offset for name, norm in architecture.block(index).norms.items()}


def _draw(
    name: str,
    shape: tuple[int, ...],
    config: HookedTransformerConfig,
    generator: torch.Generator | None,
) -> torch.Tensor:
    std = _SPREADS[config.init_mode](name, shape, config.initializer_range)
    drawn = torch.empty(shape, dtype=torch.float32)
    if config.init_mode.endswith("_uniform"):
        bound = math.sqrt(3.0) * std
        return drawn.uniform_(-bound, bound, generator=generator)
    return drawn.normal_(0.0, std, generator=generator)
