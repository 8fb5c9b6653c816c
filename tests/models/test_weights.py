"""Weights under unified names, against the modules' own parameters, layout by layout."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from graftwork import LanguageModel
from graftwork.models.weights import dequantized
from graftwork.tracing.errors import (
    InputError,
    OperationError,
    ShapeError,
    UnavailableNameError,
)

SHARED = (
    "gpt2 gpt_neo gptj gpt_neox opt llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 falcon "
    "falcon_alibi bloom olmo2 mixtral gpt_oss bert roberta"
).split()
EVERY = [*SHARED, "falcon_groups", "llama_biases"]
IDS = torch.tensor([[5, 17, 3, 44, 29, 8, 12]])


def _variant(name: str) -> Any:
    general = {
        "vocab_size": 61,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if name == "falcon_groups":
        config: Any = transformers.FalconConfig(
            **general, new_decoder_architecture=True, num_kv_heads=2, alibi=False, bias=True
        )
        return transformers.FalconForCausalLM(config).eval()
    config = transformers.LlamaConfig(
        **general,
        intermediate_size=24,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        pad_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def fresh(tools: SimpleNamespace) -> Any:
    """A function that gives a new model by name, whose parameters are all random."""

    def make(name: str) -> Any:
        module = _variant(name) if name not in (*SHARED, "mamba") else tools.module(name)
        module = copy.deepcopy(module)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for path, parameter in module.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "A_log" not in path:
                    parameter.copy_(noise * 0.3 + (parameter.ndim == 1))
        return LanguageModel(module)

    return make


# -------------------------------------------------------------------- layouts by hand

_BLOCKS = {
    **dict.fromkeys(
        "gpt2 gpt_neo gptj falcon falcon_alibi falcon_groups bloom".split(), "transformer.h"
    ),
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
}


def _blocks(name: str) -> str:
    return _BLOCKS.get(name, "model.layers")


def _sizes(config: Any, name: str) -> tuple[int, int, int]:
    """Heads, heads of keys and values, and d_head."""
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    if name == "falcon":
        shared = 1
    if name == "falcon_groups":
        shared = 2
    return heads, shared, getattr(config, "head_dim", None) or config.hidden_size // heads


def _columns(weight: torch.Tensor, starts: list[int], width: int) -> torch.Tensor:
    """[d_in, d_out] → [head, d_in, d_head], whose heads begin at columns `starts`."""
    return torch.stack([weight[..., start : start + width] for start in starts])


def _starts(name: str, heads: int, shared: int, width: int) -> dict[str, list[int]]:
    """Where the columns of each head begin in fused projections."""
    each = heads // shared
    if name == "gpt2":
        return {p: [(i * heads + h) * width for h in range(heads)] for i, p in enumerate("QKV")}
    if name == "phi3":
        return {
            "Q": [h * width for h in range(heads)],
            "K": [(heads + k) * width for k in range(shared)],
            "V": [(heads + shared + k) * width for k in range(shared)],
        }
    if name in ("falcon", "falcon_groups"):
        group = (each + 2) * width
        return {
            "Q": [h // each * group + h % each * width for h in range(heads)],
            "K": [k * group + each * width for k in range(shared)],
            "V": [k * group + (each + 1) * width for k in range(shared)],
        }
    return {p: [(3 * h + i) * width for h in range(heads)] for i, p in enumerate("QKV")}


_FUSED = {
    "gpt2": "attn.c_attn",
    "gpt_neox": "attention.query_key_value",
    "phi3": "self_attn.qkv_proj",
    **dict.fromkeys(
        "falcon falcon_alibi falcon_groups bloom".split(), "self_attention.query_key_value"
    ),
}
_SEPARATE = {
    "gpt_neo": ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
    "gptj": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    **dict.fromkeys(
        ("bert", "roberta"),
        ("attention.self.query", "attention.self.key", "attention.self.value"),
    ),
}
_OUT = {
    "gpt2": "attn.c_proj",
    "gpt_neo": "attn.attention.out_proj",
    "gptj": "attn.out_proj",
    "gpt_neox": "attention.dense",
    "opt": "self_attn.out_proj",
    "phi": "self_attn.dense",
    "bert": "attention.output.dense",
    "roberta": "attention.output.dense",
    **dict.fromkeys("falcon falcon_alibi falcon_groups bloom".split(), "self_attention.dense"),
}
_MLP = {  # up, gate, down
    "gpt2": ("mlp.c_fc", None, "mlp.c_proj"),
    "gpt_neo": ("mlp.c_fc", None, "mlp.c_proj"),
    "gptj": ("mlp.fc_in", None, "mlp.fc_out"),
    "opt": ("fc1", None, "fc2"),
    "phi": ("mlp.fc1", None, "mlp.fc2"),
    "bert": ("intermediate.dense", None, "output.dense"),
    "roberta": ("intermediate.dense", None, "output.dense"),
    **dict.fromkeys(
        "gpt_neox falcon falcon_alibi falcon_groups bloom".split(),
        ("mlp.dense_h_to_4h", None, "mlp.dense_4h_to_h"),
    ),
}
_SANDWICH = {
    "ln1": "input_layernorm",
    "ln1_post": "post_attention_layernorm",
    "ln2": "pre_feedforward_layernorm",
    "ln2_post": "post_feedforward_layernorm",
}
_NORMS = {
    "gpt2": {"ln1": "ln_1", "ln2": "ln_2"},
    "gpt_neo": {"ln1": "ln_1", "ln2": "ln_2"},
    "gptj": {"ln1": "ln_1"},
    "opt": {"ln1": "self_attn_layer_norm", "ln2": "final_layer_norm"},
    "phi": {"ln1": "input_layernorm"},
    "falcon": {"ln1": "input_layernorm"},
    "falcon_alibi": {"ln1": "input_layernorm"},
    "falcon_groups": {"ln1": "ln_attn", "ln2": "ln_mlp"},
    "olmo2": {"ln1_post": "post_attention_layernorm", "ln2_post": "post_feedforward_layernorm"},
    "bert": {},
    "roberta": {},
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
}
_USUAL = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}


def by_hand(name: str, module: Any, index: int) -> dict[str, torch.Tensor]:
    """Every weight of a layer, cut out of the parameters."""
    heads, shared, width = _sizes(module.config, name)
    parameters = dict(module.named_parameters())
    found: dict[str, torch.Tensor] = {}

    def weight(path: str) -> torch.Tensor:
        """[d_in, d_out]"""
        value = parameters[f"{_blocks(name)}.{index}.{path}.weight"].detach()
        conv = type(module.get_submodule(f"{_blocks(name)}.{index}.{path}")).__name__ == "Conv1D"
        return value if conv else value.T

    def bias(path: str) -> torch.Tensor | None:
        value = parameters.get(f"{_blocks(name)}.{index}.{path}.bias")
        return None if value is None else value.detach()

    def keep(key: str, value: torch.Tensor | None) -> None:
        if value is not None:
            found[key] = value

    if name in _FUSED:
        starts = _starts(name, heads, shared, width)
        for part in "QKV":
            keep(f"attn.W_{part}", _columns(weight(_FUSED[name]), starts[part], width))
            whole = bias(_FUSED[name])
            keep(f"attn.b_{part}", None if whole is None else _columns(whole, starts[part], width))
    else:
        usual = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        for part, path in zip("QKV", _SEPARATE.get(name, usual), strict=True):
            count = heads if part == "Q" else shared
            starts_of = [h * width for h in range(count)]
            keep(f"attn.W_{part}", _columns(weight(path), starts_of, width))
            whole = bias(path)
            keep(f"attn.b_{part}", None if whole is None else _columns(whole, starts_of, width))
    out = _OUT.get(name, "self_attn.o_proj")
    rows = weight(out)
    found["attn.W_O"] = torch.stack([rows[h * width : (h + 1) * width] for h in range(heads)])
    keep("attn.b_O", bias(out))
    if name in ("mixtral", "gpt_oss"):
        _experts_by_hand(name, parameters, f"{_blocks(name)}.{index}.", found)
    elif name == "phi3":
        both = weight("mlp.gate_up_proj")
        half = both.shape[1] // 2
        found["mlp.W_gate"], found["mlp.W_in"] = both[:, :half], both[:, half:]
        found["mlp.W_out"] = weight("mlp.down_proj")
    else:
        usual_mlp = ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
        for part, path in zip(("in", "gate", "out"), _MLP.get(name, usual_mlp), strict=True):
            if path is not None:
                keep(f"mlp.W_{part}", weight(path))
                keep(f"mlp.b_{part}", bias(path))
    for norm, path in _NORMS.get(name, _USUAL).items():
        found[f"{norm}.w"] = parameters[f"{_blocks(name)}.{index}.{path}.weight"].detach()
        keep(f"{norm}.b", bias(path))
    return found


def _experts_by_hand(name: str, parameters: Any, start: str, found: dict[str, Any]) -> None:
    both = parameters[f"{start}mlp.experts.gate_up_proj"].detach()
    down = parameters[f"{start}mlp.experts.down_proj"].detach()
    if name == "mixtral":
        half = both.shape[1] // 2
        found["mlp.experts.W_gate"] = torch.stack([e[:half].T for e in both])
        found["mlp.experts.W_in"] = torch.stack([e[half:].T for e in both])
        found["mlp.experts.W_out"] = torch.stack([e.T for e in down])
        found["mlp.router.W"] = parameters[f"{start}mlp.gate.weight"].detach().T
        return
    found["mlp.experts.W_gate"] = torch.stack([e[:, 0::2] for e in both])
    found["mlp.experts.W_in"] = torch.stack([e[:, 1::2] for e in both])
    found["mlp.experts.W_out"] = down
    biases = parameters[f"{start}mlp.experts.gate_up_proj_bias"].detach()
    found["mlp.experts.b_gate"], found["mlp.experts.b_in"] = biases[:, 0::2], biases[:, 1::2]
    found["mlp.experts.b_out"] = parameters[f"{start}mlp.experts.down_proj_bias"].detach()
    found["mlp.router.W"] = parameters[f"{start}mlp.router.weight"].detach().T
    found["mlp.router.b"] = parameters[f"{start}mlp.router.bias"].detach()
    found["attn.sinks"] = parameters[f"{start}self_attn.sinks"].detach()


# -------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", EVERY)
def test_every_weight_is_cut_out_of_its_parameter(name: str, fresh: Any) -> None:
    model: Any = fresh(name)
    for index, layer in enumerate(model.layers):
        expected = by_hand(name, model.load(), index)
        if name in ("bert", "roberta"):
            assert set(expected) <= set(layer)
        else:
            assert set(layer) == set(expected)
        assert len(layer) == len(list(layer)) == len(layer.items())
        for key, value in expected.items():
            assert key in layer
            assert layer[key].shape == value.shape, key
            assert torch.equal(torch.as_tensor(layer[key]), value), key


@pytest.mark.parametrize("name", EVERY)
def test_the_models_own_weights(name: str, fresh: Any) -> None:
    model: Any = fresh(name)
    module = model.load()
    embedding = module.get_input_embeddings().weight
    head = module.get_output_embeddings()
    assert torch.equal(model["embed.W_E"], embedding)
    assert torch.equal(model["unembed.W_U"], head.weight.T)
    assert ("unembed.b_U" in model) == (head.bias is not None)
    if head.bias is not None:
        assert torch.equal(model["unembed.b_U"], head.bias)
    assert model["embed"] is module.get_input_embeddings()
    assert model["unembed"] is head
    if name not in ("bert", "roberta"):
        assert model["ln_final"].weight.shape == (16,)
        assert torch.equal(model["ln_final.w"], model["ln_final"].weight)
    if name in ("gpt2", "gpt_neo"):
        assert torch.equal(model["pos_embed.W_pos"], module.transformer.wpe.weight)
    if name == "llama":
        assert "pos_embed.W_pos" not in model
        with pytest.raises(UnavailableNameError):
            model["pos_embed.W_pos"]


def test_modules_of_a_layer_by_what_they_are(fresh: Any) -> None:
    for name, norms in (
        ("gpt2", ("ln_1", "ln_2")),
        ("llama", ("input_layernorm", "post_attention_layernorm")),
        ("opt", ("self_attn_layer_norm", "final_layer_norm")),
        ("gemma2", ("input_layernorm", "pre_feedforward_layernorm")),
    ):
        model: Any = fresh(name)
        block = model.load().get_submodule(f"{_blocks(name)}.1")
        for key, other, path in zip(
            ("attn.ln_in", "mlp.ln_in"), ("ln1", "ln2"), norms, strict=True
        ):
            assert model.layers[1][key] is block.get_submodule(path)
            assert model.layers[1][other] is block.get_submodule(path)


def test_missing_and_unknown_weights_say_so(fresh: Any) -> None:
    layer = fresh("llama").layers[0]
    assert "attn.b_Q" not in layer and "attn.b_Q" not in list(layer)
    assert layer.keys() and "attn.b_O" not in layer.keys()  # noqa: SIM118
    with pytest.raises(UnavailableNameError, match="no such parameter"):
        layer["attn.b_Q"]
    with pytest.raises(UnavailableNameError, match="no such parameter"):
        layer["attn.b_Q"] = 0
    with pytest.raises(UnavailableNameError, match=r"`attn\.W_Q`"):
        layer["attn.W_q"]
    assert 3 not in layer
    with pytest.raises(UnavailableNameError, match=r"embed\.W_E"):
        fresh("llama")["embed.W_F"]
    model = fresh("mamba")
    assert "attn.W_Q" not in model.layers[0]
    assert torch.equal(
        model.layers[1]["mixer.W_in"], model.load().backbone.layers[1].mixer.in_proj.weight.T
    )


# -------------------------------------------------------------------- writing


def _logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", EVERY)
def test_writes_reach_the_parameters_and_the_forward(name: str, fresh: Any) -> None:
    model: Any = fresh(name)
    assert torch.is_grad_enabled()
    pristine = {key: value.clone() for key, value in model.load().state_dict().items()}
    for key in list(model.layers[1]):
        module = model.load()
        module.load_state_dict(pristine)
        before, logits = by_hand(name, module, 1), _logits(module)
        if key not in before:
            continue  # norms of BERT, which are checked with it
        value = torch.as_tensor(model.layers[1][key]).clone()
        new = value * 1.5 + 0.25

        model.layers[1][key][...] = new
        assert torch.equal(by_hand(name, module, 1)[key], new), key
        for other, old in before.items():
            if other != key:
                assert torch.equal(by_hand(name, module, 1)[other], old), (key, other)
        assert not torch.allclose(_logits(module), logits) or key == "attn.b_K", key

        model.layers[1][key] = value
        assert torch.equal(by_hand(name, module, 1)[key], value)
        model.layers[1][key] *= 2
        assert torch.equal(by_hand(name, module, 1)[key], value * 2), key
        model.layers[1][key] += 0.5
        assert torch.equal(by_hand(name, module, 1)[key], value * 2 + 0.5)
        model.layers[1][key].zero_()
        assert by_hand(name, module, 1)[key].abs().max() == 0
        model.layers[1][key][0] += 1
        expected = torch.zeros_like(value)
        expected[0] += 1
        assert torch.equal(by_hand(name, module, 1)[key], expected)
        model.layers[1][key] = 0.125
        assert (by_hand(name, module, 1)[key] == 0.125).all()
        with pytest.raises(ShapeError, match="was given"):
            model.layers[1][key] = torch.zeros(2, 3, 4, 5)
        assert (by_hand(name, module, 1)[key] == 0.125).all()
        for parameter in module.parameters():
            assert parameter.requires_grad and parameter.is_leaf and parameter.grad_fn is None


def test_queries_of_groups_write_themselves_back(fresh: Any) -> None:
    """Falcon's queries of several groups have no view, so what is given is a copy with a home."""
    for name in ("falcon_groups", "falcon"):
        model: Any = fresh(name)
        module, expected = model.load(), by_hand(name, model.load(), 1)["attn.W_Q"].clone()
        others = {k: v.clone() for k, v in by_hand(name, module, 1).items() if k != "attn.W_Q"}
        w = model.layers[1]["attn.W_Q"]

        def check() -> None:
            assert torch.equal(by_hand(name, module, 1)["attn.W_Q"], expected)  # noqa: B023
            assert torch.equal(torch.as_tensor(w), expected)  # noqa: B023

        w[0] += 1
        expected[0] += 1
        check()
        w[:, :10] = 0
        expected[:, :10] = 0
        check()
        w[2].fill_(0.5)
        expected[2].fill_(0.5)
        check()
        row = w[3][11]
        row.add_(2)
        expected[3][11] += 2
        check()
        row *= 3
        expected[3][11] *= 3
        check()
        w.transpose(1, 2)[1, 0] = 7.0
        expected.transpose(1, 2)[1, 0] = 7.0
        check()
        w[w > 1] = 0.25
        expected[expected > 1] = 0.25
        check()
        w.masked_fill_(expected < 0, 0.0)
        expected.masked_fill_(expected < 0, 0.0)
        check()
        torch.nn.init.constant_(w[1], 0.75)
        expected[1] = 0.75
        check()
        w.data[0, 0] = 3.0
        expected[0, 0] = 3.0
        check()
        w.copy_(expected * 2)
        expected *= 2
        check()
        for head in w:
            head[0] = 5.0
        expected[:, 0] = 5.0
        check()
        w.unbind(0)[1].mul_(2)
        expected[1] *= 2
        check()
        torch.add(w, 1, out=w)
        expected += 1
        check()
        other = torch.zeros(w.shape)
        other.copy_(w)
        other += w
        assert torch.equal(other, expected * 2)
        x = torch.ones(w.shape, requires_grad=True)
        (x * w).sum().backward()
        assert torch.equal(x.grad, expected)
        model.layers[1]["attn.W_Q"] -= 1
        expected -= 1
        assert torch.equal(by_hand(name, module, 1)["attn.W_Q"], expected)
        product = model.layers[1]["attn.W_Q"] * 2
        product[0] = 100.0  # a result of its own
        assert torch.equal(by_hand(name, module, 1)["attn.W_Q"], expected)
        for key, value in others.items():
            assert torch.equal(by_hand(name, module, 1)[key], value), key


def test_a_weight_that_is_written_inside_a_traced_model_is_used(fresh: Any) -> None:
    model: Any = fresh("falcon_groups")
    model.layers[1]["attn.W_O"][2] = 0
    with model.trace(IDS) as tracer:
        heads = model.layers[1].head_out.save()
        logits = tracer.output.logits.save()
    assert heads.value[:, :, 2].abs().max() == 0
    torch.testing.assert_close(logits.value, _logits(model.load()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", ["a", torch.ones(16), torch.ones(16, 61), [1, 2]])
def test_a_weight_is_assigned_a_tensor_of_its_shape_or_one_number(fresh: Any, value: Any) -> None:
    model = fresh("gpt2")
    weight = model.load().transformer.wte.weight
    before = weight.detach().clone()
    with pytest.raises(
        ShapeError, match=r"`embed\.W_E` has the shape .* or one number for all of it"
    ):
        model["embed.W_E"] = value
    assert torch.equal(weight, before)
    model["embed.W_E"] = 3
    assert bool((weight == 3).all())
    model["embed.W_E"] = before
    assert torch.equal(weight, before)


def test_weights_are_not_deleted(fresh: Any) -> None:
    weights = fresh("gpt2").layers[0]._weights()
    with pytest.raises(OperationError, match="set it to 0"):
        del weights["attn.W_Q"]


# -------------------------------------------------------------------- quantized


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tools: SimpleNamespace) -> dict[str, str]:
    """Models of a size that quantizing in blocks of 64 needs."""
    found = {}
    for name in ("llama", "gpt2"):
        torch.manual_seed(0)
        if name == "llama":
            config: Any = transformers.LlamaConfig(
                vocab_size=61,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=32,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
            module: Any = transformers.LlamaForCausalLM(config)
        else:
            config = transformers.GPT2Config(
                vocab_size=61,
                n_positions=32,
                n_embd=64,
                n_layer=2,
                n_head=4,
                bos_token_id=None,
                eos_token_id=None,
            )
            module = transformers.GPT2LMHeadModel(config)
        folder = tmp_path_factory.mktemp(name)
        module.save_pretrained(folder)
        tools.tokenizer().save_pretrained(folder)
        found[name] = str(folder)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4", "int4"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_quantized_weights_are_read_and_not_written(
    folders: dict[str, str], name: str, kind: str
) -> None:
    full: Any = LanguageModel(folders[name])
    model: Any = LanguageModel(folders[name], dtype=kind)
    cosine = 0.0
    for key in ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out"):
        expected, found = full.layers[1][key], model.layers[1][key]
        assert found.shape == expected.shape, key
        a, b = torch.as_tensor(found).float().flatten(), expected.float().flatten()
        cosine = float(torch.cosine_similarity(a, b, dim=0))
        assert cosine > {"int8": 0.999, "nf4": 0.97, "int4": 0.95}[kind], key
        for write in (
            lambda w: w.zero_(),
            lambda w: w.__setitem__(0, 0),
            lambda w: w[0].fill_(0),
            lambda w: w.__iadd__(1),
            lambda w: w[:, 0].mul_(2),
            lambda w: next(iter(w)).zero_(),
            lambda w: torch.add(w, 1, out=w),
        ):
            with pytest.raises(OperationError, match="quantized"):
                write(model.layers[1][key])
        with pytest.raises(OperationError, match="quantized"):
            model.layers[1][key] = 0
        again = torch.as_tensor(model.layers[1][key])
        assert torch.equal(again, torch.as_tensor(found))
        assert (found * 2).shape == expected.shape  # calculations are free
    with model.trace(IDS):
        heads, out = model.layers[1].head_out.save(), model.layers[1].o_out.save()
    total = heads.value.sum(2)
    if "attn.b_O" in model.layers[1]:
        total = total + model.layers[1]["attn.b_O"]
    assert torch.cosine_similarity(total.flatten(), out.value.flatten(), dim=0) > 0.99


def test_dequantized_gives_none_for_plain_weights() -> None:
    assert dequantized(torch.nn.Linear(2, 2)) is None


# -------------------------------------------------------------------- sizes


def test_sizes_of_every_architecture(architecture: str, tools: SimpleNamespace) -> None:
    model: Any = tools.model(architecture)
    cfg, config, module = model.cfg, model.config, tools.module(architecture)
    name = architecture
    assert cfg.n_layers == cfg.n_layer == len(model.layers) == config.num_hidden_layers
    assert cfg.d_model == config.hidden_size == 16
    assert cfg.d_vocab == cfg.d_vocab_out == 61
    assert cfg.model_name == config.model_type
    assert cfg.architecture == type(module).__name__
    assert cfg.dtype is torch.float32
    if name == "mamba":
        assert (cfg.n_heads, cfg.n_kv_heads, cfg.d_head, cfg.d_mlp) == (0, 0, 0, None)
        assert cfg.positional_embedding_type == "none" and cfg.normalization_type == "RMS"
        return
    heads, shared, width = _sizes(config, name)
    assert (cfg.n_heads, cfg.n_kv_heads, cfg.d_head) == (heads, shared, width)
    assert cfg.n_key_value_heads == shared
    wide = "gpt2 gpt_neo gptj falcon falcon_alibi bloom".split()
    assert cfg.d_mlp == (64 if name in wide else 24)
    layer_norm = "gpt2 gpt_neo gptj gpt_neox opt phi falcon falcon_alibi bloom".split()
    if name not in ("bert", "roberta"):
        assert cfg.normalization_type == ("LN" if name in layer_norm else "RMS")
    positions = {
        **dict.fromkeys("gpt2 gpt_neo opt bert roberta".split(), "standard"),
        **dict.fromkeys("bloom falcon_alibi".split(), "alibi"),
    }
    assert cfg.positional_embedding_type == positions.get(name, "rotary")
    parallel = name in "gptj gpt_neox phi falcon falcon_alibi".split()
    assert cfg.parallel_attn_mlp is cfg.parallel is parallel
    gated = name not in (*layer_norm, "bert", "roberta", "mixtral", "gpt_oss")
    if name not in ("mixtral", "gpt_oss"):
        assert cfg.gated_mlp is cfg.gated is gated
    assert cfg.post_norm is (name in ("bert", "roberta"))
    experts = name in ("mixtral", "gpt_oss")
    assert (cfg.num_experts, cfg.experts_per_token) == ((4, 2) if experts else (None, None))
    caps = (50.0, 30.0) if name == "gemma2" else (None, None)
    assert (cfg.attn_scores_soft_cap, cfg.output_logits_soft_cap) == caps
    scaled = name in ("gemma", "gemma2", "gemma3_text")
    assert cfg.embed_scale == (4.0 if scaled else 1.0)
    windowed = name in "gpt_neo mistral gemma2 gemma3_text gpt_oss".split()
    assert cfg.window_size == (4 if windowed else None)
    if name != "bloom":
        most = {"roberta": 34, "falcon_alibi": config.max_position_embeddings}
        assert cfg.n_ctx == (most.get(name, 32) if name != "falcon_alibi" else most[name])
    tied = module.get_output_embeddings().weight is module.get_input_embeddings().weight
    assert cfg.tie_word_embeddings is tied
    assert cfg.to_dict()["n_heads"] == heads


def test_epsilon_is_that_of_the_norms(architecture: str, tools: SimpleNamespace) -> None:
    module, found = tools.module(architecture), set()
    for child in module.modules():
        if "Norm" in type(child).__name__:
            names = ("eps", "variance_epsilon", "epsilon")
            found.add(next(getattr(child, one) for one in names if hasattr(child, one)))
    eps = tools.model(architecture).cfg.eps
    assert eps in found


# -------------------------------------------------------------------- stacked


@pytest.mark.parametrize("name", "gpt2 llama phi3 falcon falcon_groups gpt_neox qwen2 bert".split())
def test_stacked_weights_equal_loops(name: str, fresh: Any) -> None:
    model: Any = fresh(name)
    weights, layers = model.weights, [by_hand(name, model.load(), i) for i in range(3)]
    heads, shared, width = _sizes(model.config, name)
    each = heads // shared

    def stacked(key: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.stack([layer.get(key, torch.zeros(shape)) for layer in layers])

    for part in "QKV":
        count = heads if part == "Q" else shared
        w = stacked(f"attn.W_{part}", ())
        b = stacked(f"attn.b_{part}", (count, width))
        if part != "Q":
            assert torch.equal(getattr(weights, f"_W_{part}"), w)
            assert torch.equal(getattr(weights, f"_b_{part}"), b)
            w = torch.stack([w[:, h // each] for h in range(heads)], 1)
            b = torch.stack([b[:, h // each] for h in range(heads)], 1)
        assert torch.equal(getattr(weights, f"W_{part}"), w)
        assert torch.equal(getattr(weights, f"b_{part}"), b)
        assert w.shape == (3, heads, 16, width)
    for key, name_of, size in (
        ("W_O", "attn.W_O", ()),
        ("b_O", "attn.b_O", (16,)),
        ("W_in", "mlp.W_in", ()),
        ("W_out", "mlp.W_out", ()),
        ("b_in", "mlp.b_in", (model.cfg.d_mlp,)),
        ("b_out", "mlp.b_out", (16,)),
    ):
        assert torch.equal(getattr(weights, key), stacked(name_of, size)), key
    if model.cfg.gated:
        assert torch.equal(weights.W_gate, stacked("mlp.W_gate", ()))
    else:
        assert weights.W_gate is None
    assert torch.equal(weights.W_E, model.load().get_input_embeddings().weight)
    assert torch.equal(weights.W_U, model.load().get_output_embeddings().weight.T)
    assert weights.b_U.shape == (61,)
    assert weights.all_head_labels() == [f"L{i}H{h}" for i in range(3) for h in range(heads)]
    assert weights.n_params_total == sum(p.numel() for p in model.load().parameters())
    for one in (weights.W_Q, weights.b_O, weights.W_in):
        one.zero_()  # a copy
    assert weights.W_Q.abs().max() > 0


@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon_groups"])
def test_circuits_and_composition_scores_equal_dense_formulas(name: str, fresh: Any) -> None:
    model: Any = fresh(name)
    weights, heads = model.weights, model.cfg.n_heads
    qk = torch.stack(
        [layer_q @ layer_k.mT for layer_q, layer_k in zip(weights.W_Q, weights.W_K, strict=True)]
    )
    ov = torch.stack([v @ o for v, o in zip(weights.W_V, weights.W_O, strict=True)])
    torch.testing.assert_close(weights.QK.AB, qk, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights.OV.AB, ov, rtol=1e-4, atol=1e-5)
    for mode in "QKV":
        right = {"Q": qk, "K": qk.mT, "V": ov}[mode]
        scores = weights.all_composition_scores(mode)
        assert scores.shape == (3, heads, 3, heads)
        for a, b, c, d in itertools.product(range(3), range(heads), range(3), range(heads)):
            expected = torch.tensor(0.0)
            if a < c:
                left, other = ov[a, b], right[c, d]
                expected = (left @ other).norm() / left.norm() / other.norm()
            torch.testing.assert_close(scores[a, b, c, d], expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(InputError, match='"Q", "K" or "V"'):
        weights.all_composition_scores("O")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_accumulated_biases(name: str, fresh: Any) -> None:
    model: Any = fresh(name)
    layers = [by_hand(name, model.load(), index) for index in range(3)]
    zero = torch.zeros(16)
    for layer, mlp_input, with_mlp in itertools.product(range(4), (False, True), (False, True)):
        if layer == 3 and mlp_input:
            with pytest.raises(InputError):
                model.weights.accumulated_bias(layer, mlp_input=True)
            continue
        expected = zero.clone()
        for one in layers[:layer]:
            expected += one.get("attn.b_O", zero)
            expected += one.get("mlp.b_out", zero) if with_mlp else zero
        if mlp_input:
            expected += layers[layer].get("attn.b_O", zero)
        found = model.weights.accumulated_bias(layer, mlp_input, with_mlp)
        torch.testing.assert_close(found, expected)
    for wrong in (-1, 4):
        with pytest.raises(InputError, match="layers 0 to 2"):
            model.weights.accumulated_bias(wrong)


def test_positions_and_what_is_not_stacked(fresh: Any) -> None:
    gpt2, llama, mixtral = fresh("gpt2"), fresh("llama"), fresh("mixtral")
    assert gpt2.weights.W_E_pos.shape == (61 + 32, 16)
    assert torch.equal(gpt2.weights.W_E_pos[61:], gpt2.load().transformer.wpe.weight)
    with pytest.raises(UnavailableNameError):
        llama.weights.W_pos
    with pytest.raises(UnavailableNameError, match="W_Q"):
        llama.weights.W_q
    with pytest.raises(UnavailableNameError):
        mixtral.weights.W_in
    assert not hasattr(llama.weights, "W_nothing")


# -------------------------------------------------------------------- taker's page


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "qwen2"])
def test_the_example_of_model_maps(
    name: str, fresh: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line of taker's documentation of model maps; token 1000 is 50 of the tiny vocabulary."""
    model: Any = fresh(name)
    assert isinstance(model["embed"], torch.nn.Module)
    assert isinstance(model["unembed"], torch.nn.Module)
    assert isinstance(model["ln_final"], torch.nn.Module)
    layer_0, layer_1 = model.layers[0], model.layers[1]
    before = {key: torch.as_tensor(layer_1[key]).clone() for key in layer_1}
    heads = model.cfg.n_heads
    assert layer_0["attn.W_Q"].shape == (heads, 16, model.cfg.d_head)
    assert layer_0["attn.W_K"].shape == layer_0["attn.W_V"].shape
    assert layer_0["mlp.W_in"].shape == layer_0["mlp.W_out"].T.shape
    assert isinstance(layer_0["attn.ln_in"], torch.nn.Module)
    assert isinstance(layer_0["mlp.ln_in"], torch.nn.Module)

    model["embed.W_E"][50] = torch.randn_like(model["embed.W_E"][50])
    layer_0["attn.W_Q"][:, :10] = 0
    assert by_hand(name, model.load(), 0)["attn.W_Q"][:, :10].abs().max() == 0
    print(f"Model has {len(model.layers)} layers")
    print(f"Hidden size: {model.cfg.d_model}")
    print(f"Number of attention heads: {model.cfg.n_heads}")
    if "attn.b_Q" in layer_0:
        old = layer_0["attn.b_Q"].clone()
        layer_0["attn.b_Q"] += 0.1
        assert torch.equal(by_hand(name, model.load(), 0)["attn.b_Q"], old + 0.1)
    assert ("attn.b_Q" in layer_0) is (name != "llama")
    for i, layer in enumerate(model.layers):
        print(f"Layer {i} attention output shape: {layer['attn.W_O'].shape}")
    assert "Model has 3 layers" in capsys.readouterr().out
    for key, value in before.items():
        assert torch.equal(torch.as_tensor(layer_1[key]), value)
