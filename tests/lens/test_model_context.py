"""Weights by location, sizes and tokens, of a model that is not loaded and of one that is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from graftwork import LanguageModel
from graftwork.lens.model_context import (
    ActivationLocationType,
    Dimension,
    InferenceEngineType,
    InvalidTokenException,
    ModelContext,
    StandardModelContext,
    StubModelContext,
    WeightLocationType,
    activation_shape_by_location_type,
    get_default_device,
    get_embedding,
    get_unembedding_with_ln_gain,
    weight_shape_by_location_type,
)
from graftwork.tracing.errors import (
    GraftworkError,
    InputError,
    LoadError,
    ShapeError,
    UnavailableNameError,
)

_DECODER: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GPT: dict[str, Any] = {
    "vocab_size": 61,
    "n_positions": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 24,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_OPT = {k: v for k, v in _DECODER.items() if k not in ("intermediate_size", "pad_token_id")}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _DECODER),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_GROUPED, "head_dim": 8}),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**_GPT, "rotary_dim": 4}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**_OPT, "ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": 1},
    ),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": 61, "hidden_size": 16, "n_layer": 2, "n_head": 4},
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
}
W, D = WeightLocationType, Dimension


def build(kind: str) -> Any:
    """A tiny model whose parameters are all different."""
    config, model, options = MODELS[kind]
    torch.manual_seed(0)
    module = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


@pytest.fixture
def tiny() -> ModelContext:
    return ModelContext("graftwork/tiny", device="cpu")


def heads(rows: torch.Tensor, count: int, repeat: int = 1) -> torch.Tensor:
    """[(head d_head), d_model] of a projection's own weight → [head, d_model, d_head]."""
    size = rows.shape[0] // count
    each = [rows[i * size : (i + 1) * size].T for i in range(count)]
    return torch.stack([one for one in each for _ in range(repeat)])


def of_gpt2(module: Any, layer: int) -> dict[W, torch.Tensor]:
    block, base = module.transformer.h[layer], module.transformer
    q, k, v = block.attn.c_attn.weight.split(16, dim=1)
    return {
        W.MLP_TO_HIDDEN: block.mlp.c_fc.weight,
        W.MLP_TO_RESIDUAL: block.mlp.c_proj.weight,
        W.EMBEDDING: base.wte.weight,
        W.UNEMBEDDING: module.lm_head.weight.T,
        W.POSITION_EMBEDDING: base.wpe.weight,
        W.ATTN_TO_QUERY: heads(q.T, 4),
        W.ATTN_TO_KEY: heads(k.T, 4),
        W.ATTN_TO_VALUE: heads(v.T, 4),
        W.ATTN_TO_RESIDUAL: heads(block.attn.c_proj.weight, 4).transpose(1, 2),
        W.LAYER_NORM_GAIN_FINAL: base.ln_f.weight,
        W.LAYER_NORM_BIAS_FINAL: base.ln_f.bias,
        W.LAYER_NORM_GAIN_PRE_ATTN: block.ln_1.weight,
        W.LAYER_NORM_GAIN_PRE_MLP: block.ln_2.weight,
    }


def of_llama(module: Any, layer: int, offset: float = 0.0) -> dict[W, torch.Tensor]:
    block, base = module.model.layers[layer], module.model
    attn = block.self_attn
    return {
        W.MLP_TO_HIDDEN: block.mlp.up_proj.weight.T,
        W.MLP_TO_RESIDUAL: block.mlp.down_proj.weight.T,
        W.EMBEDDING: base.embed_tokens.weight,
        W.UNEMBEDDING: module.lm_head.weight.T,
        W.ATTN_TO_QUERY: heads(attn.q_proj.weight, 4),
        W.ATTN_TO_KEY: heads(attn.k_proj.weight, 2, repeat=2),
        W.ATTN_TO_VALUE: heads(attn.v_proj.weight, 2, repeat=2),
        W.ATTN_TO_RESIDUAL: heads(attn.o_proj.weight.T, 4).transpose(1, 2),
        W.LAYER_NORM_GAIN_FINAL: base.norm.weight + offset,
        W.LAYER_NORM_GAIN_PRE_ATTN: block.input_layernorm.weight + offset,
        W.LAYER_NORM_GAIN_PRE_MLP: block.post_attention_layernorm.weight + offset,
    }


def of_gpt_neox(module: Any, layer: int) -> dict[W, torch.Tensor]:
    block, base = module.gpt_neox.layers[layer], module.gpt_neox
    fused = block.attention.query_key_value.weight
    parts = [[fused[12 * h + 4 * i : 12 * h + 4 * i + 4] for h in range(4)] for i in range(3)]
    q, k, v = (torch.cat(part) for part in parts)
    return {
        W.MLP_TO_HIDDEN: block.mlp.dense_h_to_4h.weight.T,
        W.MLP_TO_RESIDUAL: block.mlp.dense_4h_to_h.weight.T,
        W.EMBEDDING: base.embed_in.weight,
        W.UNEMBEDDING: module.lm_head.weight.T,
        W.ATTN_TO_QUERY: heads(q, 4),
        W.ATTN_TO_KEY: heads(k, 4),
        W.ATTN_TO_VALUE: heads(v, 4),
        W.ATTN_TO_RESIDUAL: heads(block.attention.dense.weight.T, 4).transpose(1, 2),
        W.LAYER_NORM_GAIN_FINAL: base.final_layer_norm.weight,
        W.LAYER_NORM_BIAS_FINAL: base.final_layer_norm.bias,
        W.LAYER_NORM_GAIN_PRE_ATTN: block.input_layernorm.weight,
        W.LAYER_NORM_GAIN_PRE_MLP: block.post_attention_layernorm.weight,
    }


FORMULAS: dict[str, Any] = {
    "gpt2": of_gpt2,
    "llama": of_llama,
    "gpt_neox": of_gpt_neox,
    "gemma": lambda module, layer: of_llama(module, layer, 1.0),
}


# -------------------------------------------------------------------- weights


@pytest.mark.parametrize("shard", ["1GB", "5KB"])
@pytest.mark.parametrize("kind", list(FORMULAS))
def test_weights_are_those_of_the_module_before_and_after_loading(
    tmp_path: Path, kind: str, shard: str
) -> None:
    module = build(kind)
    module.save_pretrained(tmp_path, max_shard_size=shard)
    context = ModelContext.from_model_type(str(tmp_path), device="cpu")
    model = context.model
    for loaded in (False, True):
        if loaded:
            assert context.get_or_create_model() is model
        for layer in range(2):
            wanted = FORMULAS[kind](module, layer)
            for location in W:
                if location not in wanted:
                    with pytest.raises(UnavailableNameError, match=f"`{location.value}` does not"):
                        context.get_weight(location, layer)
                    continue
                found = context.get_weight(location, layer)
                assert torch.equal(found, wanted[location]), (location, layer)
                assert found.shape == context.get_shape_from_spec(location.shape_spec)
                assert not found.requires_grad
        assert model.loaded == loaded


def test_weights_of_a_loaded_model_are_its_own_memory(tiny: ModelContext) -> None:
    module: Any = tiny.get_or_create_model().load()
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    for location in W:
        assert tiny.get_weight(location, 1).untyped_storage().data_ptr() in own


@pytest.mark.parametrize(("given", "layer"), [("attn.to_query", 1), ("embedding", None)])
def test_locations_may_be_given_as_text(tiny: ModelContext, given: str, layer: int | None) -> None:
    assert torch.equal(tiny.get_weight(given, layer), tiny.get_weight(W(given), layer))


def test_weights_can_be_normalized_along_an_axis(tiny: ModelContext) -> None:
    plain = tiny.get_weight(W.ATTN_TO_QUERY, 2)
    for axis, dimension in enumerate(W.ATTN_TO_QUERY.shape_spec):
        found = tiny.get_weight(W.ATTN_TO_QUERY, 2, normalize_dim=dimension)
        torch.testing.assert_close(found, plain / plain.norm(dim=axis, keepdim=True))
    by_name = tiny.get_weight("mlp.to_hidden", 0, "residual_stream_channels")
    torch.testing.assert_close(by_name.norm(dim=0), torch.ones(tiny.n_neurons))


def test_repeated_keys_are_normalized_as_they_are_given(tmp_path: Path) -> None:
    context = ModelContext(LanguageModel(build("llama")))
    plain = context.get_weight(W.ATTN_TO_KEY, 0)
    found = context.get_weight(W.ATTN_TO_KEY, 0, normalize_dim=D.ATTN_HEADS)
    torch.testing.assert_close(found, plain / plain.norm(dim=0, keepdim=True))


def test_normalizing_leaves_the_model_as_it_is(tiny: ModelContext) -> None:
    tiny.get_or_create_model()
    before = tiny.get_weight(W.EMBEDDING).clone()
    tiny.get_weight(W.EMBEDDING, normalize_dim=D.VOCAB_SIZE)
    assert torch.equal(tiny.get_weight(W.EMBEDDING), before)


def test_weights_go_to_the_device_that_is_asked_for(tiny: ModelContext) -> None:
    assert tiny.get_weight(W.EMBEDDING).device.type == "cpu"
    assert tiny.get_weight(W.EMBEDDING, device="meta").device.type == "meta"
    assert tiny.get_weight(W.EMBEDDING, device=torch.device("meta")).shape == (2048, 128)


def test_one_norm_before_attention_and_mlp_is_that_of_both() -> None:
    module = build("gptj")
    context = ModelContext(LanguageModel(module))
    gain = module.transformer.h[1].ln_1.weight
    assert torch.equal(context.get_weight(W.LAYER_NORM_GAIN_PRE_ATTN, 1), gain)
    assert torch.equal(context.get_weight(W.LAYER_NORM_GAIN_PRE_MLP, 1), gain)


def test_rows_before_the_first_position_are_left_out() -> None:
    module = build("opt")
    found = ModelContext(LanguageModel(module)).get_weight(W.POSITION_EMBEDDING)
    assert torch.equal(found, module.model.decoder.embed_positions.weight[2:])


def test_a_mixture_of_experts_has_no_single_mlp() -> None:
    context = ModelContext(LanguageModel(build("mixtral")))
    assert context.get_weight(W.ATTN_TO_VALUE, 0).shape == (4, 16, 4)
    with pytest.raises(
        UnavailableNameError, match=r"`mlp\.to_hidden` does not.*no weight `mlp.W_in`"
    ):
        context.get_weight(W.MLP_TO_HIDDEN, 0)


def test_an_unknown_location_is_refused_with_near_names(tiny: ModelContext) -> None:
    with pytest.raises(InputError, match=r"'mlp\.to_hiden' is no location.*`mlp\.to_hidden`"):
        tiny.get_weight("mlp.to_hiden", 0)


@pytest.mark.parametrize("location", [one for one in W if not one.has_no_layers])
def test_a_location_of_a_layer_needs_one(tiny: ModelContext, location: W) -> None:
    with pytest.raises(InputError, match=f"`{location.value}` is in every layer: give one, 0 to 3"):
        tiny.get_weight(location)
    for layer in (-1, 4, True):
        with pytest.raises(UnavailableNameError, match="there are 4 layers"):
            tiny.get_weight(location, layer)


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        (D.VOCAB_SIZE, r"has `vocab_size` 0 times"),
        (D.SEQUENCE_TOKENS, r"has `sequence_tokens` 0 times"),
        ("residual", r"'residual' is no dimension.*`residual_stream_channels`"),
    ],
)
def test_an_axis_that_the_weight_does_not_have_is_refused(
    tiny: ModelContext, dimension: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tiny.get_weight(W.MLP_TO_HIDDEN, 0, normalize_dim=dimension)
    assert not tiny.model.loaded


def test_an_axis_that_a_weight_has_twice_is_refused(
    tiny: ModelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = (D.RESIDUAL_STREAM_CHANNELS, D.RESIDUAL_STREAM_CHANNELS)
    monkeypatch.setitem(weight_shape_by_location_type, W.EMBEDDING, twice)
    with pytest.raises(InputError, match="2 times"):
        tiny.get_weight(W.EMBEDDING, normalize_dim=D.RESIDUAL_STREAM_CHANNELS)


def test_a_shape_that_the_location_does_not_promise_is_refused(
    tiny: ModelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = (D.MAX_CONTEXT_LENGTH, D.RESIDUAL_STREAM_CHANNELS)
    monkeypatch.setitem(weight_shape_by_location_type, W.EMBEDDING, other)
    with pytest.raises(ShapeError, match=r"\[2048, 128\].*max_context_length=256"):
        tiny.get_weight(W.EMBEDDING)


# -------------------------------------------------------------------- the unembedding


@pytest.mark.parametrize("kind", list(FORMULAS))
def test_unembedding_with_gain_gives_the_logits_of_a_normalized_stream(kind: str) -> None:
    module = build(kind)
    if kind in ("gpt2", "gpt_neox"):
        base = module.transformer.ln_f if kind == "gpt2" else module.gpt_neox.final_layer_norm
        torch.nn.init.zeros_(base.bias)
    context = ModelContext(LanguageModel(module))
    found = get_unembedding_with_ln_gain(context)
    assert found.shape == (16, 61)
    with context.get_or_create_model().trace([1, 2, 3]):
        normalized = context.model.ln_final_normalized.save()
        logits = context.model.logits.save()
    torch.testing.assert_close(normalized.value @ found, logits.value, rtol=1e-4, atol=1e-4)


def test_the_embedding_is_the_one_of_the_checkpoint() -> None:
    module = build("gemma")
    found = get_embedding(ModelContext(LanguageModel(module)))
    assert torch.equal(found, module.model.embed_tokens.weight)


# -------------------------------------------------------------------- tokens


def test_tokens_and_texts_are_each_others_inverse(tiny: ModelContext) -> None:
    text = "The Eiffel Tower is in the city of"
    ids = tiny.encode(text)
    assert all(isinstance(one, int) for one in ids)
    assert tiny.decode(ids) == text
    parts = tiny.decode_token_list(ids)
    assert "".join(parts) == text
    assert tiny.encode_token_str_list(parts) == ids
    assert [tiny.decode_token(one) for one in ids] == parts
    assert tiny.encode("<|endoftext|>") == [0]


@pytest.mark.parametrize(("text", "count"), [("Hello there", 5), ("", 0)])
def test_a_text_that_is_not_one_token_is_refused(tiny: ModelContext, text: str, count: int) -> None:
    with pytest.raises(InvalidTokenException, match=f"{text!r} is not exactly one.*It is {count}:"):
        tiny.encode_token_str(text)
    with pytest.raises(InvalidTokenException):
        tiny.encode_token_str_list([" the", text])


def test_the_encoding_is_the_tokenizer(tiny: ModelContext) -> None:
    encoding = tiny.get_encoding()
    assert encoding.n_vocab == 2048
    assert encoding.decode(encoding.encode(" the")) == " the"
    assert repr(encoding) == "<encoding of graftwork/tiny, 2048 tokens>"


def test_a_model_without_tokenizer_has_no_texts() -> None:
    with pytest.raises(InputError, match="LlamaForCausalLM has no tokenizer"):
        ModelContext(LanguageModel(build("llama"))).encode("a")


# -------------------------------------------------------------------- sizes


def test_sizes_are_known_without_weights(tiny: ModelContext) -> None:
    assert tiny.n_neurons == 512
    assert tiny.n_attention_heads == 8
    assert tiny.n_layers == 4
    assert tiny.n_residual_stream_channels == 128
    assert tiny.n_vocab == 2048
    assert tiny.n_context == 256
    assert tiny.get_dim_size("query_and_key_channels") == tiny.get_dim_size(D.VALUE_CHANNELS) == 16
    assert tiny.get_shape_from_spec((D.LAYERS, D.SINGLETON, D.MLP_ACTS)) == (4, 1, 512)
    assert not tiny.model.loaded


@pytest.mark.parametrize("dimension", [one for one in D if not one.is_model_intrinsic])
def test_sizes_of_a_prompt_are_not_those_of_the_model(tiny: ModelContext, dimension: D) -> None:
    with pytest.raises(InputError, match=f"`{dimension.value}` is not a size of the model"):
        tiny.get_dim_size(dimension)


def test_a_size_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(UnavailableNameError, match="`max_context_length` does not exist on Bloom"):
        _ = ModelContext(LanguageModel(build("bloom"))).n_context


def test_the_configuration_is_a_dictionary_for_json(tiny: ModelContext) -> None:
    found = json.loads(json.dumps(tiny.get_model_config_as_dict()))
    assert found["n_embd"] == found["d_model"] == 128
    assert found["n_layers"] == 4
    assert found["dtype"] == "float32"


# -------------------------------------------------------------------- contexts


def test_the_model_is_built_once(tiny: ModelContext) -> None:
    model = tiny.get_or_create_model()
    assert isinstance(model, LanguageModel)
    assert model.loaded
    module = model.load()
    assert tiny.get_or_create_model() is model
    assert model.load() is module


def test_options_of_a_name_reach_the_model() -> None:
    context = StandardModelContext.from_model_type(
        "graftwork/tiny", InferenceEngineType.STANDARD, device="cpu", dtype="bf16"
    )
    assert context.get_weight(W.EMBEDDING).dtype == torch.bfloat16
    assert context.get_or_create_model().load().dtype == torch.bfloat16
    assert repr(context) == "<ModelContext graftwork/tiny on cpu>"


def test_a_name_goes_to_the_default_device() -> None:
    assert ModelContext("graftwork/tiny").device == get_default_device()


def test_what_cannot_be_had_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="inference_engine_type='sharded'"):
        ModelContext.from_model_type("graftwork/tiny", "sharded")
    with pytest.raises(LoadError, match="dtype only apply to a model that is loaded by name"):
        ModelContext(LanguageModel(build("llama")), dtype="fp16")
    with pytest.raises(LoadError, match=r"config\.json"):
        ModelContext(str(tmp_path))


def test_a_stub_holds_sizes_and_nothing_else() -> None:
    stub = StubModelContext({D.LAYERS: 3, D.MLP_ACTS: 7})
    assert stub.n_layers == 3
    assert stub.get_shape_from_spec((D.MLP_ACTS, D.SINGLETON)) == (7, 1)
    with pytest.raises(UnavailableNameError, match="`vocab_size` does not exist on stub"):
        _ = stub.n_vocab
    for use in (
        lambda: stub.get_weight(W.MLP_TO_HIDDEN, 1),
        stub.get_or_create_model,
        lambda: stub.model,
        stub.get_encoding,
        stub.get_model_config_as_dict,
        lambda: stub.encode("a"),
    ):
        with pytest.raises(UnavailableNameError, match="holds sizes only"):
            use()


# -------------------------------------------------------------------- tables


def test_every_location_has_a_shape() -> None:
    assert list(weight_shape_by_location_type) == list(W)
    assert list(activation_shape_by_location_type) == list(ActivationLocationType)
    assert ActivationLocationType.ATTN_QK_PROBS.shape_spec_per_token_sequence == (
        D.SEQUENCE_TOKENS,
        D.ATTENDED_TO_SEQUENCE_TOKENS,
        D.ATTN_HEADS,
    )
    assert ActivationLocationType.LOGITS.has_no_layers
    assert not ActivationLocationType.ATTN_KEY.has_no_layers


def test_errors_are_of_the_package() -> None:
    assert issubclass(InvalidTokenException, GraftworkError)
