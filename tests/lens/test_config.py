"""Configurations against transformers' own, and start values against their formulas."""

from __future__ import annotations

import copy
import importlib.util
import math
import pickle
import random
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from graftwork import GraftworkError, LanguageModel
from graftwork.lens.config import (
    ConfigError,
    HookedTransformerConfig,
    build,
    config_of,
    fans,
    init_weights,
)


def tiny_models() -> ModuleType:
    """The tiny models of the tests of models."""
    path = Path(__file__).parents[1] / "models" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_models", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TINY = tiny_models()
COMMON: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 24,
    "n_ctx": 16,
    "d_head": 6,
    "d_mlp": 40,
    "d_vocab": 29,
    "act_fn": "gelu_new",
    "eps": 1e-4,
    "seed": 3,
    "device": "cpu",
}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": COMMON,
    "llama": {
        **COMMON,
        "positional_embedding_type": "rotary",
        "normalization_type": "RMS",
        "gated_mlp": True,
        "act_fn": "silu",
        "d_head": 10,
        "n_heads": 4,
        "n_key_value_heads": 2,
        "rotary_base": 500.0,
    },
    "gpt_neox": {
        **COMMON,
        "positional_embedding_type": "rotary",
        "parallel_attn_mlp": True,
        "rotary_dim": 2,
        "act_fn": "gelu",
    },
}
CLASSES = {
    "gpt2": transformers.GPT2LMHeadModel,
    "llama": transformers.LlamaForCausalLM,
    "gpt_neox": transformers.GPTNeoXForCausalLM,
}
WIDE = {"n_layers": 1, "d_model": 96, "d_head": 12, "d_mlp": 160, "d_vocab": 300, "n_ctx": 64}


def config(shape: str = "gpt2", **changes: Any) -> HookedTransformerConfig:
    return HookedTransformerConfig(**{**SHAPES[shape], **changes})


def started(**changes: Any) -> LanguageModel:
    asked = config(**changes)
    model = LanguageModel(build(asked))
    init_weights(model, asked)
    return model


def weights_of(model: LanguageModel) -> dict[str, torch.Tensor]:
    vocabulary = model.vocabulary()
    found = {name: weight.clone() for name, weight in vocabulary.model_weights().items()}
    for index in range(len(vocabulary)):
        layer = vocabulary.layer_weights(index)
        found.update({f"{index}.{name}": weight.clone() for name, weight in layer.items()})
    return found


# -------------------------------------------------------------------- fields


def test_defaults_follow_from_the_other_fields() -> None:
    found = HookedTransformerConfig(n_layers=2, d_model=24, n_ctx=16, d_head=6, d_vocab=29)
    assert (found.n_heads, found.d_mlp, found.d_vocab_out) == (4, 96, 29)
    assert found.initializer_range == pytest.approx(0.8 / math.sqrt(24))
    assert found.attn_scale == pytest.approx(math.sqrt(6))
    assert found.rotary_dim is None
    assert config("llama").rotary_dim == 10
    assert config(init_mode="xavier_normal").initializer_range == 1.0
    assert config(d_mlp=None, attn_only=True).d_mlp is None
    assert found.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert config(act_fn="solu_ln").is_layer_norm_activation()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_dict_gives_the_same_configuration_back(shape: str) -> None:
    asked = config(shape)
    fields = asked.to_dict()
    assert fields["n_params"] == asked.n_params
    assert HookedTransformerConfig.from_dict(fields) == asked
    assert HookedTransformerConfig.unwrap(fields) == asked
    assert HookedTransformerConfig.unwrap(asked) is asked


def test_dtype_may_be_given_by_name() -> None:
    assert config(dtype="torch.bfloat16").dtype is config(dtype="bfloat16").dtype is torch.bfloat16
    with pytest.raises(ConfigError, match=r"floating torch\.dtype"):
        config(dtype="int8")


@pytest.mark.parametrize("shape", SHAPES)
def test_n_params_counts_the_matrices_of_attention_and_mlp(shape: str) -> None:
    asked = config(shape)
    model = LanguageModel(build(asked))
    matrices = [
        weight.numel()
        for name, weight in weights_of(model).items()
        if ".attn.W_" in name or ".mlp.W_" in name
    ]
    assert asked.n_params == sum(matrices)


def test_n_params_of_experts_counts_each_and_the_router() -> None:
    found = config(num_experts=3, experts_per_token=1).n_params
    assert found == 2 * (4 * 24 * 24 + 3 * (2 * 24 * 40 + 24))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_mode": "he"}, r"`init_mode` is 'gpt2' or .* not 'he'"),
        ({"normalization_type": "Layer"}, r"`normalization_type` is 'LN' or"),
        ({"positional_embedding_type": "sinus"}, r"`positional_embedding_type` is 'standard' or"),
        ({"attention_dir": "left"}, r"`attention_dir` is 'causal' or"),
        ({"default_prepend_bos": None}, r"`default_prepend_bos` is True or False, not None"),
        ({"d_head": 7}, r"d_model=24 is no multiple of d_head=7.*give n_heads"),
        ({"n_key_value_heads": 3}, r"n_heads=4 is no multiple of n_key_value_heads=3"),
        ({"n_layers": 0}, r"`n_layers` is at least 1, not 0"),
        ({"use_local_attn": True}, r"`use_local_attn` needs window_size and attn_types"),
    ],
)
def test_fields_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_an_unknown_field_is_refused_with_near_names() -> None:
    with pytest.raises(ConfigError, match=r"`n_layer` is no field.*Did you mean `n_layers`"):
        HookedTransformerConfig.from_dict({**COMMON, "n_layer": 2})
    with pytest.raises(ConfigError, match=r"`initialiser_range`.*Did you mean `initializer_range`"):
        config(initialiser_range=0.1)
    with pytest.raises(ConfigError, match=r"`n_layer` is no field"):
        HookedTransformerConfig.from_dict({"n_layer": 2, "d_model": 8})


def test_configurations_are_copied_and_pickled() -> None:
    asked = config("llama", attn_types=["local", "global"], window_size=4)
    for twin in (copy.deepcopy(asked), pickle.loads(pickle.dumps(asked)), replace(asked)):
        assert twin == asked and twin is not asked


def test_missing_fields_and_names_of_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs n_layers, n_ctx, d_head"):
        HookedTransformerConfig.unwrap({"d_model": 8})
    with pytest.raises(GraftworkError, match=r"not 'gpt2'.*from_pretrained"):
        HookedTransformerConfig.unwrap("gpt2")  # type: ignore[arg-type]


def test_only_set_seed_everywhere_touches_the_state_of_random_numbers() -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        asked = config(seed=5)
        assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
        drawn = []
        for _ in range(2):
            asked.set_seed_everywhere(11)
            drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))
        assert drawn[0] == drawn[1]
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


# -------------------------------------------------------------------- building


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_built_has_the_sizes_asked_for(shape: str) -> None:
    asked = config(shape)
    module = build(asked)
    assert type(module) is CLASSES[shape] and not module.training
    model = LanguageModel(module)
    cfg, found = model.cfg, weights_of(model)
    shared = asked.n_key_value_heads or asked.n_heads
    assert (cfg.n_layers, cfg.d_model, cfg.n_ctx, cfg.eps) == (2, 24, 16, 1e-4)
    assert (cfg.n_heads, cfg.n_kv_heads, cfg.d_head) == (4, shared, asked.d_head)
    assert cfg.act_fn == asked.act_fn
    assert cfg.parallel_attn_mlp == asked.parallel_attn_mlp
    assert found["embed.W_E"].shape == (29, 24)
    assert found["unembed.W_U"].shape == (24, 29)
    for index in range(2):
        assert found[f"{index}.attn.W_Q"].shape == (4, 24, asked.d_head)
        assert found[f"{index}.attn.W_K"].shape == (shared, 24, asked.d_head)
        assert found[f"{index}.attn.W_V"].shape == (shared, 24, asked.d_head)
        assert found[f"{index}.attn.W_O"].shape == (4, asked.d_head, 24)
        assert found[f"{index}.mlp.W_in"].shape == (24, 40)
        assert found[f"{index}.mlp.W_out"].shape == (40, 24)
        assert (f"{index}.mlp.W_gate" in found) == asked.gated_mlp
    assert ("pos_embed.W_pos" in found) == (shape == "gpt2")
    logits = module(input_ids=torch.arange(12).view(2, 6)).logits
    assert logits.shape == (2, 6, 29) and logits.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_that_is_built_has_a_unified_name(shape: str) -> None:
    model = LanguageModel(build(config(shape)))
    assert sum(w.numel() for w in weights_of(model).values()) == sum(
        p.numel() for p in model.load().parameters()
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_dropped_in_training(shape: str) -> None:
    module = build(config(shape)).train()
    ids = torch.arange(6)[None]
    assert torch.equal(module(ids).logits, module(ids).logits)


def test_switches_reach_transformers() -> None:
    gpt2: Any = build(config(use_attn_scale=False, scale_attn_by_inverse_layer_idx=True))
    assert [block.attn.scaling for block in gpt2.transformer.h] == [1.0, 0.5]
    assert gpt2.lm_head.weight is not gpt2.transformer.wte.weight
    tied: Any = build(config(tie_word_embeddings=True))
    assert tied.lm_head.weight is tied.transformer.wte.weight
    neox: Any = build(config("gpt_neox", parallel_attn_mlp=False))
    assert not neox.gpt_neox.layers[0].use_parallel_residual
    assert neox.gpt_neox.layers[0].attention.rotary_ndims == 2
    llama: Any = build(config("llama"))
    rotation = 500.0 ** (-torch.arange(0, 10, 2) / 10)
    torch.testing.assert_close(llama.model.rotary_emb.inv_freq, rotation)
    slower: Any = build(config("llama", rotary_scaling_factor=4.0))
    torch.testing.assert_close(slower.model.rotary_emb.inv_freq, rotation / 4)


@pytest.mark.parametrize("d_head", [6, 14, 98])
def test_every_number_of_rotated_channels_arrives(d_head: int) -> None:
    for size in range(2, d_head + 1, 2):
        module: Any = build(
            config("gpt_neox", n_layers=1, d_model=d_head, d_head=d_head, d_mlp=4, rotary_dim=size)
        )
        assert module.gpt_neox.layers[0].attention.rotary_ndims == size
        assert module.gpt_neox.rotary_emb.inv_freq.shape == (size // 2,)


def test_weights_have_the_dtype_and_rotation_stays_precise() -> None:
    module: Any = build(config("llama", dtype=torch.bfloat16))
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert module.model.rotary_emb.inv_freq.dtype is torch.float32


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_may_be_other_than_tokens(shape: str) -> None:
    asked = config(shape, d_vocab_out=5)
    model = LanguageModel(build(asked))
    init_weights(model, asked)
    assert (model.cfg.d_vocab, model.cfg.d_vocab_out) == (29, 5)
    assert model.load()(torch.arange(6)[None]).logits.shape == (1, 6, 5)
    with pytest.raises(ConfigError, match="cannot share their weights"):
        build(config(shape, d_vocab_out=5, tie_word_embeddings=True))


def test_a_seed_builds_the_same_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    one, other, third = (build(config(seed=seed)).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], third["lm_head.weight"])


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ("gpt2", {"attn_only": True}, r"`attn_only=True` cannot be built.*What can be built is"),
        ("gpt2", {"attention_dir": "bidirectional"}, r"`attention_dir='bidirectional'` cannot"),
        (
            "gpt2",
            {"positional_embedding_type": "shortformer"},
            r"'shortformer' with .*'LN'.*can be",
        ),
        ("gpt2", {"normalization_type": None}, r"normalization_type=None and a plain MLP.*can be"),
        ("gpt2", {"normalization_type": "RMS"}, r"normalization_type='RMS' and a plain MLP"),
        ("gpt2", {"normalization_type": "LNPre"}, r'give "LN", whose gains start at 1'),
        ("llama", {"normalization_type": "RMSPre"}, r'give "RMS", whose gains start at 1'),
        ("gpt2", {"gated_mlp": True}, r"'LN' and a gated MLP.*What can be built"),
        ("gpt2", {"act_fn": "solu_ln"}, r"`act_fn='solu_ln'` cannot be built"),
        ("gpt2", {"act_fn": "gelu_ne"}, r"Did you mean `gelu_new`"),
        ("gpt2", {"act_fn": "xielu"}, r"`act_fn='xielu'` cannot be built"),
        ("gpt2", {"d_mlp": 0}, r"`d_mlp=0` cannot be built"),
        ("gpt2", {"d_head": 8, "n_heads": 4}, r"GPT-2 needs d_head = d_model / n_heads.*free"),
        ("gpt_neox", {"d_head": 8, "n_heads": 4}, r"GPT-NeoX needs d_head = d_model / n_heads"),
        ("gpt2", {"n_key_value_heads": 2}, r"`n_key_value_heads=2` cannot be built"),
        ("gpt2", {"parallel_attn_mlp": True}, r"GPT-2 has attention before the MLP"),
        ("llama", {"parallel_attn_mlp": True}, r"Llama has attention before the MLP"),
        ("llama", {"use_attn_scale": False}, r"Llama always divides scores by sqrt\(d_head\)"),
        ("llama", {"scale_attn_by_inverse_layer_idx": True}, r"Llama does not; GPT-2 does"),
        ("gpt2", {"attn_scale": 3.0}, r"`attn_scale=3.0` cannot be built"),
        ("llama", {"rotary_dim": 4}, r"Llama rotates all of d_head=10"),
        ("llama", {"n_heads": 5, "n_key_value_heads": 5}, r"divisor of d_model=24"),
        ("gpt_neox", {"rotary_dim": 3}, r"rotated in pairs"),
        ("gpt_neox", {"rotary_dim": 8}, r"even number from 2 to d_head=6"),
        ("gpt2", {"d_vocab": -1}, r"give d_vocab"),
        ("gpt2", {"n_ctx": None}, r"`n_ctx=None` cannot be built"),
        ("llama", {"output_logits_soft_cap": 30.0}, r"`output_logits_soft_cap=30.0` cannot"),
        ("llama", {"num_experts": 4, "experts_per_token": 2}, r"`num_experts=4` cannot"),
        ("llama", {"use_qk_norm": True}, r"`use_qk_norm=True` cannot"),
        (
            "gpt2",
            {"use_local_attn": True, "window_size": 4, "attn_types": ["local", "global"]},
            r"`use_local_attn=True` cannot",
        ),
    ],
)
def test_what_no_class_computes_is_refused(
    shape: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(config(shape, **changes))


# -------------------------------------------------------------------- of a model

NAMES = set(
    "model_name original_architecture init_weights seed uses_rms_norm default_prepend_bos".split()
)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_configuration_of_what_was_built_is_the_one_asked_for(shape: str) -> None:
    asked = config(shape)
    found = config_of(LanguageModel(build(asked)))
    assert (found.model_name, found.init_weights) == (shape, False)
    mine, theirs = found.to_dict(), asked.to_dict()
    assert {k: v for k, v in mine.items() if k not in NAMES} == {
        k: v for k, v in theirs.items() if k not in NAMES
    }


ROPE = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "n_inner": 20}),
        ("gpt2", {"scale_attn_weights": False}),
        ("llama", {"head_dim": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("gpt_neox", {"rope_parameters": ROPE}),
        ("gpt_neox", {"rope_parameters": ROPE, "use_parallel_residual": False}),
    ],
)
def test_a_model_built_like_another_computes_the_same_with_its_weights(
    name: str, changes: dict[str, Any]
) -> None:
    options = {**TINY.CAUSAL[name][1], **changes, "initializer_range": 0.5}
    theirs: Any = CLASSES[name](CLASSES[name].config_class(**options)).eval()
    mine = build(config_of(LanguageModel(theirs)))
    mine.load_state_dict(theirs.state_dict())
    ids = torch.arange(3, 23)[None]
    assert torch.equal(mine(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("name", TINY.ARCHITECTURES)
def test_configurations_of_tiny_models(name: str) -> None:
    model = TINY.wrap(name)
    found, cfg = config_of(model), model.cfg
    assert HookedTransformerConfig.from_dict(found.to_dict()) == found
    for size in ("n_layers", "d_model", "n_heads", "d_head", "d_vocab", "d_vocab_out", "n_ctx"):
        assert getattr(found, size) == getattr(cfg, size), size
    assert found.d_mlp == (cfg.d_mlp or 0)
    assert (found.n_key_value_heads or found.n_heads) == cfg.n_kv_heads
    assert found.positional_embedding_type == cfg.positional_embedding_type
    assert found.normalization_type == cfg.normalization_type
    assert found.attention_dir == ("bidirectional" if name in TINY.MASKED else "causal")


def test_what_sizes_do_not_say_is_read_from_the_configuration() -> None:
    def of(name: str) -> HookedTransformerConfig:
        return config_of(TINY.wrap(name))

    assert (of("gptj").rotary_dim, of("gptj").rotary_adjacent_pairs) == (4, True)
    assert (of("gpt_neox").rotary_dim, of("phi").rotary_dim, of("llama").rotary_dim) == (1, 2, 4)
    assert not of("gpt_neo").use_attn_scale and of("gpt_neo").attn_scale == 1.0
    assert of("gpt_neo").attn_types == ["global", "local"] * 2
    assert of("gpt2").use_attn_scale and of("gpt2").attn_scale == 2.0
    assert (of("mistral").window_size, of("mistral").attn_types) == (4, ["local"] * 3)
    assert of("gemma2").attn_types == ["local", "global", "local"]
    assert of("gemma2").attn_scale == pytest.approx(math.sqrt(8))
    assert of("gemma2").use_normalization_before_and_after
    assert not of("llama").use_normalization_before_and_after
    assert (of("gemma2").attn_scores_soft_cap, of("gemma2").output_logits_soft_cap) == (50.0, 30.0)
    assert (of("gemma3_text").rotary_base, of("gemma3_text").rotary_base_local) == (1e6, 1e4)
    assert of("qwen3").use_qk_norm and not of("qwen2").use_qk_norm
    assert (of("mixtral").num_experts, of("mixtral").experts_per_token) == (4, 2)
    assert of("gpt_oss").use_attention_sinks and of("gpt_oss").use_yarn_rope
    assert not of("bloom").default_prepend_bos
    assert (of("mamba").n_heads, of("mamba").d_head, of("mamba").d_mlp) == (0, 0, 0)


# -------------------------------------------------------------------- start values


def expected_std(mode: str, name: str, shape: tuple[int, ...], gain: float) -> float:
    """Written out by weight, with the sizes of WIDE: 8 heads of 12, 96 channels."""
    into, out = {
        "embed.W_E": (300, 96),
        "pos_embed.W_pos": (64, 96),
        "unembed.W_U": (96, 300),
        "attn.W_Q": (96, 96),
        "attn.W_K": (96, shape[0] * 12),
        "attn.W_V": (96, shape[0] * 12),
        "attn.W_O": (96, 96),
        "mlp.W_in": (96, 160),
        "mlp.W_gate": (96, 160),
        "mlp.W_out": (160, 96),
    }[name.removeprefix("0.")]
    if mode == "gpt2":
        return gain
    if mode == "muP":
        if name in ("embed.W_E", "pos_embed.W_pos"):
            return 1.0
        return 1 / into if name == "unembed.W_U" else into**-0.5
    return gain * math.sqrt(2 / (into + out) if mode.startswith("xavier") else 2 / into)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gain", [-1.0, 0.3])
@pytest.mark.parametrize(
    "mode",
    ["gpt2", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "muP"],
)
def test_start_values_have_the_spread_of_their_mode(shape: str, mode: str, gain: float) -> None:
    grouped = {"n_heads": 8, "n_key_value_heads": 4} if shape == "llama" else {"n_heads": 8}
    changes = {**WIDE, **grouped, "rotary_dim": None}
    model = started(shape=shape, init_mode=mode, initializer_range=gain, **changes)
    default = 0.8 / math.sqrt(96) if mode == "gpt2" else 1.0
    seen = 0
    for name, weight in weights_of(model).items():
        leaf = name.rpartition(".")[2]
        if leaf.startswith("W_"):
            std = expected_std(mode, name, tuple(weight.shape), default if gain < 0 else gain)
            # Four standard errors of the standard deviation, and of the mean.
            error = 4 / math.sqrt(weight.numel())
            assert weight.std().item() == pytest.approx(std, rel=error), name
            assert abs(weight.mean().item()) < error * std, name
            if mode.endswith("_uniform"):
                largest = weight.abs().max().item()
                assert 0.99 * math.sqrt(3) * std < largest <= math.sqrt(3) * std * 1.000001, name
            else:
                assert weight.abs().max().item() > 2.5 * std, name
            seen += 1
        else:
            assert (weight == (1.0 if leaf == "w" else 0.0)).all(), name
    assert seen >= 8


def test_mup_tells_unembedding_from_embedding() -> None:
    found = weights_of(started(init_mode="muP", **WIDE))
    assert found["unembed.W_U"].std().item() == pytest.approx(1 / 96, rel=0.05)
    assert found["embed.W_E"].std().item() == pytest.approx(1.0, rel=0.05)


def test_fans_of_heads_are_those_of_the_whole_map() -> None:
    assert fans("attn.W_Q", (4, 24, 6)) == (24, 24)
    assert fans("attn.W_K", (2, 24, 6)) == (24, 12)
    assert fans("attn.W_O", (4, 6, 24)) == (24, 24)
    assert fans("attn.W_O", (4, 10, 24)) == (40, 24)
    assert fans("mlp.W_in", (24, 96)) == (24, 96)
    assert fans("mlp.experts.W_in", (8, 24, 96)) == (24, 96)


def test_each_weight_is_drawn_anew() -> None:
    found = [w for name, w in weights_of(started()).items() if name.endswith("W_Q")]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0][0], found[0][1])


@pytest.mark.parametrize("shape", SHAPES)
def test_seeds_repeat_and_leave_the_random_state(shape: str) -> None:
    state = torch.get_rng_state()
    one, other, third = (weights_of(started(shape=shape, seed=seed)) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not any(torch.equal(one[name], third[name]) for name in one if "W_" in name)


def test_without_a_seed_weights_come_from_torchs_state() -> None:
    with torch.random.fork_rng(devices=[]):
        found = []
        for _ in range(2):
            torch.default_generator.manual_seed(1)
            found.append(weights_of(started(seed=None))["embed.W_E"])
        found.append(weights_of(started(seed=None))["embed.W_E"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_seed_gives_the_same_weights_in_every_dtype() -> None:
    single, half, double = (
        weights_of(started(dtype=dtype))["embed.W_E"]
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    )
    assert torch.equal(single.bfloat16(), half) and torch.equal(single.double(), double)


def test_start_values_replace_those_of_a_trained_model() -> None:
    model, asked = started(), config()
    before = weights_of(model)
    with torch.no_grad():
        for parameter in model.load().parameters():
            parameter.add_(1.0)
    init_weights(model, asked)
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(model).items())


def test_shared_embeddings_are_drawn_once_and_refused_by_mup() -> None:
    model = started(tie_word_embeddings=True, **WIDE)
    found = weights_of(model)
    assert torch.equal(found["embed.W_E"], found["unembed.W_U"].T)
    with pytest.raises(ConfigError, match=r"muP.*tie_word_embeddings=False"):
        init_weights(model, config(init_mode="muP"))


def test_gains_are_one_where_the_parameter_lacks_one() -> None:
    options = TINY.CAUSAL["gemma"][1]
    model = LanguageModel(transformers.GemmaForCausalLM(transformers.GemmaConfig(**options)))
    with torch.no_grad():
        model.load().model.norm.weight.fill_(3.0)
    init_weights(model, config())
    found = weights_of(model)
    assert (found["ln_final.w"] == 0).all() and (found["0.ln1.w"] == 0).all()
