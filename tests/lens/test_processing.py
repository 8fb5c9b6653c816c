"""Weight processing against plain forwards of transformers and against each formula, computed densely.

Every model has random weights, gains and biases: the usual ones and zeros would hide what is not
folded.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional

from graftwork import LanguageModel
from graftwork.lens.processing import (
    ProcessingError,
    center_unembed,
    center_writing_weights,
    fill_missing_keys,
    fold_layer_norm,
    fold_value_biases,
    load_state_dict_into,
    process,
    refactor_factored_attn_matrices,
    state_dict_of,
    steps_for,
)
from graftwork.models.architectures import architecture_of, registry
from graftwork.tracing.errors import GraftworkError, ShapeError, UnavailableNameError

VOCABULARY = 61
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED = {"num_key_value_heads": 2}
_HEAD_DIM = {**_GROUPED, "head_dim": 8}
_GEMMA = {**_HEAD_DIM, "sliding_window": 4, "query_pre_attn_scalar": 8}
_NEO = {
    "attention_types": [[["global", "local"], 2]],
    "window_size": 4,
    "num_hidden_layers": 4,
    "intermediate_size": None,
}
_OPT = {"ffn_dim": 24, "word_embed_proj_dim": 16}
_NEW_FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

#: Name → model type of transformers, options beside `_SIZES`.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt_neo": ("gpt_neo", _NEO),
    "gptj": ("gptj", {"rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", _OPT),
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 4}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", _HEAD_DIM),
    "gemma": ("gemma", _HEAD_DIM),
    "gemma2": ("gemma2", _GEMMA),
    "phi": ("phi", {}),
    "phi3": ("phi3", _GROUPED),
    "falcon": ("falcon", {"alibi": False}),
    "bloom": ("bloom", {}),
    "olmo2": ("olmo2", _GROUPED),
    # variants
    "gpt2_tall_heads": ("gpt2", {"hidden_size": 12, "num_attention_heads": 2}),
    "gpt2_untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt_neox_serial": ("gpt_neox", {"use_parallel_residual": False}),
    "opt_projected": ("opt", {**_OPT, "word_embed_proj_dim": 8}),
    "opt_post_norm": ("opt", {**_OPT, "do_layer_norm_before": False}),
    "llama_biases": ("llama", {**_GROUPED, "attention_bias": True, "mlp_bias": True}),
    "gemma3": ("gemma3_text", _GEMMA),
    "phi_qk_norm": ("phi", {"qk_layernorm": True}),
    "falcon_new": ("falcon", {**_NEW_FALCON, "alibi": False}),
    "falcon_one_norm": ("falcon", {**_NEW_FALCON, "alibi": False, "num_ln_in_parallel_attn": 1}),
    "falcon_serial": (
        "falcon",
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "bloom_adds_norms": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "bloom_slow": ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}),
    "ministral3": ("ministral3", _HEAD_DIM),
    "smollm3": ("smollm3", _GROUPED),
    "seed_oss": ("seed_oss", _HEAD_DIM),
    "olmo3": ("olmo3", _GROUPED),
    "mixtral": ("mixtral", {**_GROUPED, **_EXPERTS}),
    "gpt_oss": ("gpt_oss", {**_HEAD_DIM, **_EXPERTS, "sliding_window": 4}),
    "mamba": ("mamba", {"state_size": 4}),
    "bert": ("bert", {}),
}
NORM_KINDS = {
    "LN": [
        "gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "phi", "falcon", "bloom", "gpt2_tall_heads",
        "gpt2_untied", "gpt_neox_serial", "phi_qk_norm", "falcon_new", "falcon_one_norm",
        "falcon_serial", "bloom_slow",
    ],
    "RMS": [
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "llama_biases", "gemma3",
        "ministral3", "smollm3", "seed_oss",
    ],
}  # fmt: skip
FOLDED = [*NORM_KINDS["LN"], *NORM_KINDS["RMS"]]
#: Steps that are off though they were asked for, with a part of the reason.
OFF: dict[str, dict[str, str]] = {
    **{name: {} for name in NORM_KINDS["LN"]},
    **{name: {"center_writing_weights": "only LayerNorm"} for name in NORM_KINDS["RMS"]},
    "gemma2": {"center_writing_weights": "only LayerNorm", "center_unembed": "soft cap"},
    "bloom_slow": {"fold_value_biases": "does not add b_O"},
    "opt_projected": {
        "fold_ln": "projection is between the final norm",
        "center_writing_weights": "projection is between the embedding",
    },
    "opt_post_norm": dict.fromkeys(("fold_ln", "center_writing_weights"), "also added"),
    "bloom_adds_norms": dict.fromkeys(("fold_ln", "center_writing_weights"), "also added"),
    "olmo2": {"fold_ln": "attention of layer 0", "center_writing_weights": "only LayerNorm"},
    "olmo3": {"fold_ln": "attention of layer 0", "center_writing_weights": "only LayerNorm"},
    "mixtral": {"fold_ln": "mixture of experts", "center_writing_weights": "only LayerNorm"},
    "gpt_oss": {
        "fold_ln": "mixture of experts",
        "center_writing_weights": "only LayerNorm",
        "fold_value_biases": "sinks",
    },
    "mamba": {"fold_ln": "not attention and an MLP", "center_writing_weights": "only LayerNorm"},
    "bert": dict.fromkeys(("fold_ln", "center_writing_weights"), "also added"),
}
REFACTORED = ["gpt2", "gpt_neo", "opt", "bloom", "gpt2_tall_heads", "falcon_serial", "bert"]
STEPS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
NONE = dict.fromkeys(STEPS, False)

#: Log-probabilities and logits of magnitude 5, in float32: the largest difference measured is 8e-6.
SINGLE = 3e-5
#: In float64, the largest difference measured is 1e-14.
DOUBLE = 1e-12
#: What computes in float32 even where the weights are float64.
INEXACT = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3"), "its norms multiply by the gain in float32"),
    **dict.fromkeys(("bloom", "bloom_slow", "bloom_adds_norms"), "its softmax is in float32"),
}
#: What torch does not compute in float64.
NO_DOUBLE = {
    **dict.fromkeys(("mixtral", "gpt_oss"), "grouped products of matrices"),
    "mamba": "its scan mixes float32 and float64",
}


def fresh(name: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A tiny model with random weights, gains and biases."""
    kind, options = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **{**_SIZES, **options})
    auto = transformers.AutoModelForMaskedLM if kind == "bert" else None
    module = (auto or transformers.AutoModelForCausalLM).from_config(config).eval()
    return LanguageModel(randomized(module).to(dtype))


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return module


shared = functools.cache(fresh)  # for what leaves the model as it is, as processing does


@functools.cache
def processed(name: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    return process(shared(name, dtype))


def logits(model: LanguageModel, **inputs: Any) -> torch.Tensor:
    """Of a plain forward, as float64 [batch, token, d_vocab]."""
    if not inputs:
        ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        found: torch.Tensor = model.load()(**inputs).logits
    return found.double()


def off_by(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def snapshot(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.load().state_dict().items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def near(one: torch.Tensor, other: torch.Tensor, close: float = DOUBLE) -> bool:
    return one.shape == other.shape and off_by(one, other) < close


def layers(state: dict[str, torch.Tensor]) -> range:
    return range(1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")))


# -------------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_stay_and_the_original_is_untouched(name: str) -> None:
    model = fresh(name)
    before, tied = snapshot(model), model.config.tie_word_embeddings
    expected = logits(model)
    result = process(model)
    found = logits(result)
    assert type(result.load()) is type(model.load())
    assert off_by(expected.log_softmax(-1), found.log_softmax(-1)) < SINGLE
    if "center_unembed" not in OFF[name]:
        assert off_by(expected - expected.mean(-1, keepdim=True), found) < SINGLE
    assert same_bits(before, snapshot(model))
    assert model.config.tie_word_embeddings == tied
    assert torch.equal(logits(model), expected)
    mine = {id(p) for p in model.load().parameters()}
    assert mine.isdisjoint(id(p) for p in result.load().parameters())


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", MODELS)
def test_each_step_alone_keeps_log_probabilities(name: str, step: str) -> None:
    model = shared(name)
    result = process(model, **{**NONE, step: True})
    expected = logits(model).log_softmax(-1)
    assert off_by(expected, logits(result).log_softmax(-1)) < SINGLE


@pytest.mark.parametrize("name", REFACTORED)
@pytest.mark.parametrize("others", [True, False])
def test_refactored_attention_keeps_log_probabilities(name: str, others: bool) -> None:
    model = shared(name, torch.float64)
    flags = {} if others else NONE
    result = process(model, **flags, refactor_factored_attn_matrices=True)
    expected = logits(model).log_softmax(-1)
    close = 1e-5 if name in (*INEXACT, "gpt_neo") else DOUBLE  # GPT-Neo's scores are float32
    assert off_by(expected, logits(result).log_softmax(-1)) < close
    assert not near(result.weights.W_Q, model.weights.W_Q, 1e-3)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in (*INEXACT, *NO_DOUBLE)])
def test_a_model_in_float64_is_processed_in_float64(name: str) -> None:
    model, result = shared(name, torch.float64), processed(name, torch.float64)
    expected, found = logits(model), logits(result)
    assert {p.dtype for p in result.load().parameters()} == {torch.float64}
    assert off_by(expected.log_softmax(-1), found.log_softmax(-1)) < DOUBLE


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "llama", "qwen2", "phi", "bloom"])
def test_padded_rows_keep_log_probabilities(name: str) -> None:
    """A row of padding attends to nothing, so b_V is only folded where something is attended to."""
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = logits(shared(name), **inputs).log_softmax(-1)[mask.bool()]
    found = logits(processed(name), **inputs).log_softmax(-1)[mask.bool()]
    assert off_by(expected, found) < SINGLE


@pytest.mark.parametrize("name", FOLDED)
def test_norms_are_plain_after_folding(name: str) -> None:
    model, result = shared(name), processed(name)
    assert set(snapshot(model)) <= set(snapshot(result)) | {"lm_head.weight"}
    state, norms = state_dict_of(result), ("ln1", "ln2", "ln_final")
    gains = [key for key in state if key.split(".")[-2] in norms and key.endswith(".w")]
    shifts = [key for key in state if key.split(".")[-2] in norms and key.endswith(".b")]
    serial = not result.cfg.parallel_attn_mlp
    assert len(gains) >= 1 + (1 + serial) * result.cfg.n_layers
    assert all(torch.equal(state[key], torch.ones_like(state[key])) for key in gains)
    assert all(not state[key].any() for key in shifts)
    assert bool(shifts) == (name in NORM_KINDS["LN"])
    if name.startswith("gemma"):
        assert not result.layers[1]["ln1.w"].any()  # its gain is 1 + parameter
    if name in ("gemma2", "gemma3"):  # what attention adds is normalized by a norm that stays
        assert torch.equal(result.layers[1]["ln1_post.w"], model.layers[1]["ln1_post.w"])


@pytest.mark.parametrize("name", NORM_KINDS["LN"])
def test_what_writes_and_what_reads_has_no_mean(name: str) -> None:
    state = state_dict_of(processed(name))
    for layer in layers(state):
        for key in ("attn.W_O", "mlp.W_out"):
            assert off_by(state[f"blocks.{layer}.{key}"].mean(-1), torch.zeros(())) < 1e-6
        for key in ("attn.b_O", "mlp.b_out"):
            bias = state.get(f"blocks.{layer}.{key}", torch.zeros(1))
            assert abs(float(bias.mean())) < 1e-6
        readers = [k for k in state if k.startswith(f"blocks.{layer}.") and k[-3:-1] == "W_"]
        for key in [k for k in readers if k[-1] in "QKV"] + [f"blocks.{layer}.mlp.W_in"]:
            assert off_by(state[key].mean(-2), torch.zeros(())) < 1e-6
    for key in ("embed.W_E", "pos_embed.W_pos", "unembed.W_U"):
        if key in state:
            assert off_by(state[key].mean(-1), torch.zeros(())) < 1e-6
    assert off_by(state["unembed.W_U"].mean(0), torch.zeros(())) < 1e-6
    assert abs(float(state["unembed.b_U"].mean())) < 1e-6


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "phi", "falcon", "opt", "bloom", "llama_biases"])
def test_value_biases_are_zero_after_folding(name: str) -> None:
    model, result = shared(name), processed(name)
    assert not result.weights.b_V.any()
    assert result.weights.b_O.any(-1).all()
    if name == "qwen2":  # its class has no such bias
        assert model.layers[0].self_attn.o_proj.bias is None
        bias = result.load().get_submodule("model.layers.0.self_attn.o_proj").bias
        assert isinstance(bias, torch.nn.Parameter)


def test_biases_of_fused_projections_are_created_as_one() -> None:
    model, result = shared("falcon"), processed("falcon")
    path = "transformer.h.1.self_attention.query_key_value"
    assert model.load().get_submodule(path).bias is None
    bias = result.load().get_submodule(path).bias
    state = fold_value_biases(fold_layer_norm(state_dict_of(model), model.cfg), model.cfg)
    parts = [state[f"blocks.1.attn.{key}"] for key in ("b_Q", "_b_K", "_b_V")]
    assert near(bias.detach(), torch.cat(parts).flatten(), 1e-6)
    assert bias.requires_grad


# -------------------------------------------------------------------- the copy


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "opt", "gemma", "gemma2", "bloom", "falcon"])
def test_tied_embeddings_are_separated_in_the_copy_alone(name: str) -> None:
    model, result = shared(name), processed(name)
    assert model.config.tie_word_embeddings and model.cfg.tie_word_embeddings
    assert not result.config.tie_word_embeddings and not result.cfg.tie_word_embeddings
    one, other = model.load(), result.load()
    assert one.get_output_embeddings().weight is one.get_input_embeddings().weight
    assert other.get_output_embeddings().weight is not other.get_input_embeddings().weight
    found = logits(result)
    other.tie_weights()  # what transformers calls before it saves or resizes
    assert torch.equal(logits(result), found)


def test_without_steps_the_copy_has_the_same_bits_and_stays_tied() -> None:
    model = shared("gpt2")
    result = process(model, **NONE)
    assert same_bits(snapshot(model), snapshot(result))
    assert result.config.tie_word_embeddings
    assert result.load().lm_head.weight is result.load().transformer.wte.weight


@pytest.mark.slow
def test_the_copy_is_a_model_like_any_other() -> None:
    model = LanguageModel("graftwork/tiny", rename={"attn": "attention"})
    assert steps_for(model)["fold_ln"] and not model.loaded
    result = process(model)
    assert result.tokenizer is model.tokenizer
    with model.trace("The Eiffel Tower") as tracer:
        expected = model.logits.save()
    with result.trace("The Eiffel Tower"):
        pre = result.layers[1].resid_pre.save()
        found = result.logits.save()
        result.transformer.h[0].attention.output.save()
    assert tracer is not None
    assert near(expected.value.log_softmax(-1), found.value.log_softmax(-1), SINGLE)
    assert off_by(pre.value.mean(-1), torch.zeros(())) < 1e-5
    with model.generate("The Eiffel Tower", max_new_tokens=5, do_sample=False) as one:
        ids = one.output.save()
    with result.generate("The Eiffel Tower", max_new_tokens=5, do_sample=False) as other:
        mine = other.output.save()
    assert torch.equal(ids.value, mine.value)


def test_processing_twice_changes_nothing_more() -> None:
    once = processed("gpt2", torch.float64)
    twice = state_dict_of(process(once))
    assert all(near(value, twice[key]) for key, value in state_dict_of(once).items())


def test_training_mode_and_frozen_parameters_are_kept() -> None:
    model = fresh("falcon")
    model.load().requires_grad_(False)
    model.load().train()
    result = process(model).load()
    assert result.training
    assert not any(p.requires_grad for p in result.parameters())


@pytest.mark.parametrize("name", ["gpt2", "gemma", "qwen2"])
def test_half_precision_is_rounded_once(name: str) -> None:
    model = fresh(name, torch.bfloat16)
    single = LanguageModel(copy.deepcopy(model.load()).float())
    result, expected = process(model), process(single)
    assert {p.dtype for p in result.load().parameters()} == {torch.bfloat16}
    theirs = expected.load().state_dict()
    assert same_bits(snapshot(result), {k: v.bfloat16() for k, v in theirs.items()})


# -------------------------------------------------------------------- which steps


@pytest.mark.parametrize("name", MODELS)
def test_steps_that_do_not_apply_say_why(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "graftwork"):
        steps = steps_for(shared(name))
    assert steps == {
        **{step: step not in OFF[name] for step in STEPS},
        "refactor_factored_attn_matrices": False,
    }
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(OFF[name])
    for step, reason in OFF[name].items():
        [message] = [text for text in messages if text.startswith(f"{step} is off for ")]
        assert reason in message


def test_steps_that_nobody_asked_for_are_off_without_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert not any(steps_for(shared("mixtral"), **NONE).values())
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama", "rotary positions turn"),
        ("gpt_neox", "rotary positions turn"),
        ("mamba", "it has no attention"),
    ],
)
def test_attention_that_cannot_be_refactored_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ProcessingError, match=reason):
        process(shared(name), refactor_factored_attn_matrices=True)
    with pytest.raises(ProcessingError, match=reason):
        refactor_factored_attn_matrices({}, shared(name).cfg)


def test_shared_keys_and_values_are_not_refactored() -> None:
    cfg = dataclasses.replace(shared("falcon").cfg, positional_embedding_type="alibi")
    with pytest.raises(ProcessingError, match="share keys and values"):
        refactor_factored_attn_matrices(state_dict_of(shared("falcon")), cfg)


# -------------------------------------------------------------------- each formula


def stream(d_model: int) -> torch.Tensor:
    """[token, d_model]"""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, d_model, generator=generator, dtype=torch.float64) * 2 + 0.7


def normalized(x: torch.Tensor, kind: str | None, gain: Any, shift: Any = None) -> torch.Tensor:
    if kind == "LN":
        return functional.layer_norm(x, x.shape[-1:], gain, shift, 1e-5)
    return functional.rms_norm(x, x.shape[-1:], gain, 1e-5)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("name", FOLDED)
def test_folded_weights_compute_what_norm_and_weights_did(name: str, center: bool) -> None:
    model = shared(name, torch.float64)
    cfg, before = model.cfg, state_dict_of(model)
    after = fold_layer_norm(before, cfg, center_weights=center)
    x, seen = stream(cfg.d_model), 0
    for layer in layers(before):
        at = f"blocks.{layer}."
        second = "ln2" if f"{at}ln2.w" in before else "ln1"
        pairs = [("ln1", f"attn.{key}") for key in ("W_Q", "W_K", "W_V", "_W_K", "_W_V")]
        pairs += [(second, "mlp.W_in"), (second, "mlp.W_gate")]
        for norm, key in pairs:
            if at + key not in before:
                continue
            seen += 1
            weight, bias = before[at + key], before.get(at + key.replace("W_", "b_"), 0)
            entered = normalized(x, cfg.normalization_type, *_norm(before, at + norm))
            expected = torch.einsum("td,...de->t...e", entered, weight) + bias
            entered = normalized(x, cfg.normalization_type, None)
            found = torch.einsum("td,...de->t...e", entered, after[at + key])
            assert near(found + after.get(at + key.replace("W_", "b_"), 0), expected)
            centered = near(after[at + key].mean(-2), torch.zeros_like(after[at + key][..., 0, :]))
            assert centered == (center and cfg.normalization_type == "LN")
    assert seen == cfg.n_layers * (5 if cfg.gated_mlp else 4)
    W_U, b_U = before["unembed.W_U"], before.get("unembed.b_U", 0)
    expected = normalized(x, cfg.normalization_type, *_norm(before, "ln_final")) @ W_U + b_U
    found = normalized(x, cfg.normalization_type, None) @ after["unembed.W_U"]
    assert near(found + after.get("unembed.b_U", 0), expected)


def _norm(state: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    return state[f"{name}.w"], state.get(f"{name}.b")


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "falcon"])
def test_centered_writers_are_projected_off_the_mean(name: str) -> None:
    model = shared(name, torch.float64)
    before = state_dict_of(model)
    after = center_writing_weights(before, model.cfg)
    d_model = model.cfg.d_model
    projection = torch.eye(d_model, dtype=torch.float64) - 1 / d_model
    writers = ("W_E", "W_pos", "W_O", "b_O", "W_out", "b_out")
    changed = 0
    for key, value in before.items():
        if key.rpartition(".")[2] in writers:
            changed += 1
            assert near(after[key], value @ projection)
        else:
            assert after[key] is value
    assert changed >= 2 + 2 * model.cfg.n_layers - (name != "gpt2")


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama"])
def test_centered_unembedding_gives_logits_without_a_mean(name: str) -> None:
    model = shared(name, torch.float64)
    before = state_dict_of(model)
    after = center_unembed(before, model.cfg)
    x = stream(model.cfg.d_model)
    expected = x @ before["unembed.W_U"] + before.get("unembed.b_U", 0)
    found = x @ after["unembed.W_U"] + after.get("unembed.b_U", 0)
    assert near(found, expected - expected.mean(-1, keepdim=True))
    assert ("unembed.b_U" in before) == (name == "gptj")


@pytest.mark.parametrize("name", ["gpt2", "opt", "phi", "qwen2", "llama_biases"])
def test_folded_value_biases_add_what_the_heads_did(name: str) -> None:
    model = shared(name, torch.float64)
    cfg, before = model.cfg, state_dict_of(model)
    after = fold_value_biases(before, cfg)
    mark = "_" if name in ("qwen2", "llama_biases") else ""
    queries = cfg.n_heads // cfg.n_kv_heads
    assert queries == (2 if mark else 1)
    for layer in layers(before):
        at = f"blocks.{layer}.attn."
        expected = before.get(f"{at}b_O", torch.zeros(cfg.d_model, dtype=torch.float64)).clone()
        for head in range(cfg.n_heads):
            for channel in range(cfg.d_head):
                value = before[f"{at}{mark}b_V"][head // queries, channel]
                expected += value * before[f"{at}W_O"][head, channel]
        assert near(after[f"{at}b_O"], expected)
        assert not after[f"{at}{mark}b_V"].any()


@pytest.mark.parametrize("name", REFACTORED)
def test_refactored_matrices_have_the_same_products_and_orthogonal_factors(name: str) -> None:
    model = shared(name, torch.float64)
    cfg, before = model.cfg, fill_missing_keys(state_dict_of(model), model.cfg)
    after = refactor_factored_attn_matrices(before, cfg)
    x = stream(cfg.d_model)
    for layer in layers(before):
        at = f"blocks.{layer}.attn."

        def scores(state: dict[str, torch.Tensor], at: str = at) -> torch.Tensor:
            q, k = (torch.einsum("td,hde->hte", x, state[f"{at}W_{n}"]) for n in "QK")
            q, k = q + state[f"{at}b_Q"][:, None], k + state[f"{at}b_K"][:, None]
            return q @ k.mT

        def added(state: dict[str, torch.Tensor], at: str = at) -> torch.Tensor:
            v = torch.einsum("td,hde->hte", x, state[f"{at}W_V"]) + state[f"{at}b_V"][:, None]
            return (v @ state[f"{at}W_O"]).sum(0) + state[f"{at}b_O"]

        assert near(scores(after), scores(before))
        assert near(added(after), added(before))
        assert all(after[key].shape == before[key].shape for key in after)
        assert not after[f"{at}b_V"].any()
        W_V, W_O = after[f"{at}W_V"], after[f"{at}W_O"]
        assert near(
            W_O @ W_O.mT, torch.eye(cfg.d_head, dtype=torch.float64).expand_as(W_O @ W_O.mT)
        )
        squares = W_V.mT @ W_V
        strengths = squares.diagonal(dim1=-2, dim2=-1)
        assert near(squares, torch.diag_embed(strengths))
        assert bool((strengths.diff(dim=-1) <= 0).all())
        q, k = (torch.cat([after[f"{at}W_{n}"], after[f"{at}b_{n}"][:, None]], 1) for n in "QK")
        assert near(q.mT @ q, k.mT @ k)
        assert near(q.mT @ q, torch.diag_embed((q.mT @ q).diagonal(dim1=-2, dim2=-1)))


def test_heads_wider_than_the_stream_are_refactored() -> None:
    cfg = dataclasses.replace(shared("gpt2").cfg, n_layers=1, d_model=3, n_heads=2, n_kv_heads=2)
    cfg = dataclasses.replace(cfg, d_head=7)
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_Q": (2, 3, 7), "W_K": (2, 3, 7), "W_V": (2, 3, 7), "W_O": (2, 7, 3)}
    before = {
        f"blocks.0.attn.{key}": torch.randn(shape, generator=generator, dtype=torch.float64)
        for key, shape in shapes.items()
    }
    after = refactor_factored_attn_matrices(before, cfg)
    Q, K, V, O = (f"blocks.0.attn.W_{name}" for name in "QKVO")  # noqa: E741
    assert all(after[key].shape == before[key].shape for key in before)
    assert near(after[Q] @ after[K].mT, before[Q] @ before[K].mT)
    assert near(after[V] @ after[O], before[V] @ before[O])


@pytest.mark.parametrize(
    "function",
    [
        fill_missing_keys,
        fold_layer_norm,
        center_writing_weights,
        center_unembed,
        fold_value_biases,
        refactor_factored_attn_matrices,
    ],
)
def test_formulas_leave_what_they_are_given(function: Any) -> None:
    model = shared("gpt2")
    state = state_dict_of(model)
    before = {key: value.clone() for key, value in state.items()}
    result = function(state, model.cfg)
    assert same_bits(state, before)
    assert not same_bits(result, before)


@pytest.mark.parametrize(
    ("function", "name", "reason"),
    [
        (fold_layer_norm, "mixtral", "mixture of experts"),
        (fold_layer_norm, "bert", "also added"),
        (fold_layer_norm, "mamba", "not attention and an MLP"),
        (center_writing_weights, "llama", "only LayerNorm"),
        (center_writing_weights, "opt_post_norm", "also added"),
        (center_unembed, "gemma2", "soft cap"),
        (fold_value_biases, "gpt_oss", "sinks"),
    ],
)
def test_formulas_refuse_what_would_change_the_model(function: Any, name: str, reason: str) -> None:
    with pytest.raises(ProcessingError, match=reason):
        function(state_dict_of(shared(name)), shared(name).cfg)


def test_gains_are_not_folded_past_biases_that_stay() -> None:
    model = shared("gpt2")
    state = state_dict_of(model)
    with pytest.raises(ProcessingError, match=r"blocks\.0\.ln1\.b"):
        fold_layer_norm(state, model.cfg, fold_biases=False)
    llama = shared("llama")
    found = fold_layer_norm(state_dict_of(llama), llama.cfg, fold_biases=False)
    assert same_bits(found, fold_layer_norm(state_dict_of(llama), llama.cfg))


# -------------------------------------------------------------------- state dicts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_written_back_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    model = fresh(name, dtype)
    before, state = snapshot(model), state_dict_of(model)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(type(value) is torch.Tensor for value in state.values())
    load_state_dict_into(model, fill_missing_keys(state, model.cfg))
    assert same_bits(before, snapshot(model))
    for value in state.values():
        value.zero_()
    assert same_bits(before, snapshot(model))


def test_names_and_shapes_are_those_of_transformer_lens() -> None:
    model = shared("qwen2")
    cfg, state = model.cfg, fill_missing_keys(state_dict_of(model), model.cfg)
    shapes = {key: tuple(value.shape) for key, value in state.items() if "blocks.0" in key}
    assert {key.removeprefix("blocks.0."): shape for key, shape in shapes.items()} == {
        "attn.W_Q": (4, 16, 4),
        "attn._W_K": (2, 16, 4),
        "attn._W_V": (2, 16, 4),
        "attn.W_O": (4, 4, 16),
        "attn.b_Q": (4, 4),
        "attn._b_K": (2, 4),
        "attn._b_V": (2, 4),
        "attn.b_O": (16,),
        "mlp.W_in": (16, 24),
        "mlp.W_gate": (16, 24),
        "mlp.W_out": (24, 16),
        "mlp.b_in": (24,),
        "mlp.b_out": (16,),
        "ln1.w": (16,),
        "ln2.w": (16,),
    }
    assert state["embed.W_E"].shape == (cfg.d_vocab, 16)
    assert state["unembed.W_U"].shape == (16, cfg.d_vocab)
    assert state["unembed.b_U"].shape == (cfg.d_vocab,)
    assert "blocks.2.attn.W_K" in state_dict_of(shared("gpt2"))
    assert torch.equal(
        state_dict_of(shared("gemma"))["ln_final.w"], 1 + shared("gemma")["ln_final.w"]
    )


def test_weights_that_are_written_are_what_the_forward_uses() -> None:
    one, other = fresh("gpt2"), fresh("gpt2_untied")
    load_state_dict_into(other, {key: value * 1.5 for key, value in state_dict_of(one).items()})
    load_state_dict_into(one, {key: value * 1.5 for key, value in state_dict_of(one).items()})
    assert torch.equal(logits(one), logits(other))
    assert one.config.tie_word_embeddings


def test_a_model_that_has_run_sees_what_is_written_into_it() -> None:
    model, ids = fresh("qwen2"), torch.tensor([[3, 4, 5]])
    with model.trace(ids):
        before = model.layers[1].head_out.save()
    load_state_dict_into(model, fold_value_biases(state_dict_of(model), model.cfg))
    with model.trace(ids):
        after, added = model.layers[1].head_out.save(), model.layers[1].o_out.save()
    assert before.value.shape == after.value.shape  # [batch, token, head, d_model]
    assert near(after.value.sum(-2) + model.layers[1]["attn.b_O"], added.value, SINGLE)
    assert model.layers[1]["attn.b_O"].any()


def test_writing_one_of_tied_embeddings_separates_them() -> None:
    model = fresh("gpt2")
    embedding = model["embed.W_E"].clone()
    load_state_dict_into(model, {"unembed.W_U": torch.zeros(16, VOCABULARY)})
    assert torch.equal(model["embed.W_E"], embedding)
    assert not model["unembed.W_U"].any() and not model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({"blocks.0.attn.W_X": torch.ones(1)}, UnavailableNameError, "W_X"),
        ({"blocks.9.attn.W_Q": torch.ones(1)}, UnavailableNameError, r"blocks\.9"),
        ({"blocks.0.ln1.b": torch.ones(16)}, UnavailableNameError, r"ln1\.b"),
        ({"blocks.0.attn.W_K": torch.ones(4, 16, 4)}, UnavailableNameError, "W_K"),
        ({"blocks.0.attn._W_K": torch.ones(4, 16, 4)}, ShapeError, r"\[2, 16, 4\]"),
        ({"blocks.0.attn.b_O": torch.ones(4)}, ShapeError, r"\[16\], and \[4\]"),
        ({"blocks.0.attn._b_V": torch.ones(8)}, ShapeError, r"\[2, 4\], and \[8\]"),
    ],
)
def test_a_state_dict_that_does_not_fit_writes_nothing(
    state: dict[str, torch.Tensor], error: type[GraftworkError], message: str
) -> None:
    model = fresh("llama")
    before = snapshot(model)
    with pytest.raises(error, match=message):
        load_state_dict_into(model, {"embed.W_E": torch.zeros(VOCABULARY, 16), **state})
    assert same_bits(before, snapshot(model))


# -------------------------------------------------------------------- refusals


def test_quantized_weights_are_refused() -> None:
    model = fresh("llama")
    projection = model.load().get_submodule("model.layers.1.mlp.down_proj")
    weight = projection.weight.to(torch.int8)
    projection.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ProcessingError, match=r"layers\.1\.mlp\.down_proj` is quantized"):
        process(model)
    model = fresh("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    for refused in (process, steps_for, lambda model: load_state_dict_into(model, {})):
        with pytest.raises(ProcessingError, match="it is quantized, so load the model without"):
            refused(model)


def test_offloaded_weights_are_refused() -> None:
    model = fresh("llama")
    model.load().get_submodule("model.layers.1").to("meta")
    with pytest.raises(ProcessingError, match=r"layers\.1.* is offloaded"):
        process(model)


def test_projections_that_are_more_than_a_weight_are_refused() -> None:
    class Adapted(torch.nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.weight, self.bias, self.base = base.weight, base.bias, base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) * 2

    model = fresh("llama")
    attention = model.load().get_submodule("model.layers.0.self_attn")
    attention.q_proj = Adapted(attention.q_proj)
    with pytest.raises(ProcessingError, match="is a Adapted, which is no plain linear module"):
        process(model)
    model = fresh("llama")
    attention = model.load().get_submodule("model.layers.0.self_attn")
    torch.nn.utils.parametrizations.weight_norm(attention.o_proj)
    with pytest.raises(ProcessingError, match="which is no plain linear module"):
        process(model)


def test_layers_that_share_weights_are_refused() -> None:
    model = fresh("gpt2")
    blocks = model.load().get_submodule("transformer.h")
    blocks[2].mlp.c_fc = blocks[0].mlp.c_fc
    with pytest.raises(ProcessingError, match=r"h\.2\.mlp\.c_fc` is shared by several layers"):
        process(model)


def test_models_without_logits_or_with_two_stacks_are_refused() -> None:
    config = transformers.AutoConfig.for_model("gpt2", **_SIZES)
    model = LanguageModel(transformers.GPT2ForSequenceClassification(config).eval())
    with pytest.raises(ProcessingError, match="it has no unembedding"):
        process(model)
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2}
    config = transformers.AutoConfig.for_model("t5", **sizes, num_heads=4)
    model = LanguageModel(transformers.T5ForConditionalGeneration(config).eval())
    with pytest.raises(ProcessingError, match="an encoder and a decoder"):
        process(model)


def test_a_second_reader_of_the_final_norm_keeps_norms_from_being_folded() -> None:
    config = transformers.AutoConfig.for_model("gpt2", **_SIZES, num_labels=1)
    module = randomized(transformers.GPT2DoubleHeadsModel(config).eval())
    model = LanguageModel(module)
    assert not steps_for(model)["fold_ln"]
    ids = torch.randint(3, VOCABULARY, (1, 2, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, other = module(ids), process(model).load()(ids)
    assert near(one.logits.log_softmax(-1), other.logits.log_softmax(-1), SINGLE)
    assert near(one.mc_logits, other.mc_logits, SINGLE)


@pytest.mark.parametrize("odd", [False, True])
def test_a_model_that_nobody_declared_is_tried(odd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(config: Any) -> Any:
        known = copy.copy(config)
        known.model_type = "qwen2"
        return dataclasses.replace(architecture_of(known), probed=True)

    def double(module: torch.nn.Module, given: tuple[torch.Tensor]) -> torch.Tensor:
        return given[0] * 2

    monkeypatch.setitem(registry._DECLARED, "seen_qwen2", (seen, ("layers",)))
    module = fresh("qwen2").load().train()
    module.config.model_type = "seen_qwen2"
    if odd:  # b_V then counts twice, and no structure that is looked at tells
        module.get_submodule("model.layers.1.self_attn.o_proj").register_forward_pre_hook(double)
    model = LanguageModel(module)
    if odd:
        with pytest.raises(ProcessingError, match=r"`fold_value_biases` changes log-probabilities"):
            process(model)
    result = process(model, fold_value_biases=not odd)
    assert all(child.training for child in result.load().modules())
    expected = logits(model).log_softmax(-1)
    assert off_by(expected, logits(result).log_softmax(-1)) < SINGLE
