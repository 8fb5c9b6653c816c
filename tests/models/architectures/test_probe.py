"""What is found by looking at a model is what its hooks say, and is checked before it is used."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from graftwork import LanguageModel
from graftwork.envoy.names import Missing, Spot, read_name
from graftwork.models.architectures import declared, registry
from graftwork.models.architectures.probe import probe
from graftwork.models.vocabulary import Vocabulary
from graftwork.tracing.errors import UnavailableNameError

DECLARED = "gpt2 gpt_neox llama qwen3 gemma2 phi olmo2 mixtral".split()


# -------------------------------------------------------------------- an invented architecture


class OddConfig(PreTrainedConfig):
    model_type = "odd_one"
    vocab_size = 61
    hidden_size = 16
    num_attention_heads = 4
    num_hidden_layers = 3


class OddMixing(nn.Module):
    """Attention of its own: the text has the products, one function further in."""

    def __init__(self) -> None:
        super().__init__()
        self.three = nn.Linear(16, 48)
        self.back = nn.Linear(16, 16)

    def weigh(self, asked: Any, known: Any, told: Any) -> Any:
        scores = torch.matmul(asked, known.transpose(-1, -2)) / 2.0
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -1e9)
        return torch.matmul(torch.softmax(scores, -1), told)

    def forward(self, x: Any) -> Any:
        b, t, _ = x.shape
        told, asked, known = self.three(x).view(b, t, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return self.back(self.weigh(asked, known, told).transpose(1, 2).reshape(b, t, 16))


class OddBlock(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(16), nn.RMSNorm(16, eps=1e-6)
        self.look = OddMixing()
        self.both, self.out = nn.Linear(16, 48, bias=False), nn.Linear(24, 16)

    def forward(self, stream: Any) -> Any:
        seen = 0.5 * self.look(self.first(stream))
        stream = seen + stream
        plain, gate = self.both(self.second(stream)).chunk(2, -1)
        return stream + self.out(plain * torch.tanh(gate))


class OddForCausalLM(PreTrainedModel):
    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(61, 16)
        self.stack = nn.ModuleList(OddBlock() for _ in range(3))
        self.end, self.to_words = nn.LayerNorm(16), nn.Linear(16, 61, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.words

    def get_output_embeddings(self) -> Any:
        return self.to_words

    def forward(self, input_ids: Any, use_cache: Any = None, return_dict: Any = None) -> Any:
        x = self.words(input_ids) * 3.0
        for block in self.stack:
            x = block(x)
        return CausalLMOutputWithPast(logits=self.to_words(self.end(x)))


def drawn(module: Any) -> Any:
    """The module with weights so large that what is wrong shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return module.eval()


def odd() -> Any:
    return drawn(OddForCausalLM(OddConfig()))


_SMALL = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
OTHERS = {
    "Granite": {"residual_multiplier": 0.3},
    "Cohere": {},
    "StableLm": {"partial_rotary_factor": 0.5},
    "Glm4": {"head_dim": 4},
}


def other(name: str) -> Any:
    config = getattr(transformers, f"{name}Config")(**{**_SMALL, **OTHERS[name]})
    return drawn(getattr(transformers, f"{name}ForCausalLM")(config))


# -------------------------------------------------------------------- what is compared


def undeclare(monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    declared()  # so that all are read
    monkeypatch.delitem(registry._DECLARED, model_type)


def values(model: Any, prompt: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    """Every name that there is."""
    vocabulary = model.vocabulary()
    saved = {}
    with model.trace(prompt):
        for layer in range(-1, len(vocabulary)):
            places = vocabulary.model_places() if layer < 0 else vocabulary.layer_places(layer)
            for name, place in places.items():
                if not isinstance(place, Missing):
                    saved[layer, name] = read_name(model, vocabulary, layer, name).save()
    return {key: box.value for key, box in saved.items()}


PROMPT = torch.tensor([5, 9, 17, 33, 40, 2])


@pytest.mark.parametrize("name", DECLARED)
def test_what_is_found_is_what_is_declared(
    name: str, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = values(LanguageModel(tools.module(name)), PROMPT)
    undeclare(monkeypatch, tools.module(name).config.model_type)
    model = LanguageModel(tools.module(name))
    found = values(model, PROMPT)
    assert model.vocabulary().architecture.probed
    assert {key[1] for key in expected.keys() - found.keys()} == set()
    wrong = {
        key: difference
        for key, value in expected.items()
        if (difference := tools.difference(found[key], value))
    }
    assert wrong == {}
    assert tools.hooks(tools.module(name)) == 0


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_neox", "bloom"])
def test_weights_that_are_found_are_those_that_are_declared(
    name: str, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = LanguageModel(tools.module(name))
    expected = {key: value.clone() for key, value in before.layers[1].items()}
    sizes = before.cfg
    undeclare(monkeypatch, name)
    model = LanguageModel(tools.module(name))
    found = dict(model.layers[1].items())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert model.cfg == sizes


def test_an_invented_architecture_is_understood(tools: Any) -> None:
    module = odd()
    model = LanguageModel(module)
    model.verify_names()
    plain = tools.plain(module, PROMPT[None])
    found = values(model, PROMPT)
    b, t = 1, len(PROMPT)
    for layer in range(3):
        at = f"stack.{layer}"
        three = plain[f"{at}.look.three", "output"].view(b, t, 3, 4, 4)
        v, q, k = three.unbind(2)
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / 2.0
        scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -1e9)
        both = plain[f"{at}.both", "output"]
        expected = {
            "resid_pre": plain[at, "input"],
            "resid_mid": plain[f"{at}.second", "input"],
            "resid_post": plain[at, "output"],
            "attn_in": plain[f"{at}.look", "input"],
            "attn_out": 0.5 * plain[f"{at}.look", "output"],
            "mlp_in": plain[f"{at}.both", "input"],
            "mlp_out": plain[f"{at}.out", "output"],
            "q": q, "k": k, "v": v, "q_pre": q, "k_pre": k, "v_pre": v,
            "scores": scores,
            "pattern": scores.softmax(-1),
            "z": plain[f"{at}.look.back", "input"].view(b, t, 4, 4),
            "o_out": plain[f"{at}.look.back", "output"],
            "mlp_pre": both[..., 24:],
            "mlp_up": both[..., :24],
            "mlp_post": plain[f"{at}.out", "input"],
            "ln1_in": plain[f"{at}.first", "input"],
            "ln2_out": plain[f"{at}.second", "output"],
        }  # fmt: skip
        wrong = {
            name: difference
            for name, value in expected.items()
            if (difference := tools.difference(found[layer, name], value))
        }
        assert wrong == {}
    assert model.cfg.embed_scale == 3.0
    assert (model.cfg.n_heads, model.cfg.d_head, model.cfg.d_mlp) == (4, 4, 24)
    assert model.cfg.gated_mlp and not model.cfg.parallel_attn_mlp
    norms = model.vocabulary().architecture.block(0).norms
    assert [norms[name].kind for name in ("ln1", "ln2")] == ["LN", "RMS"]


def test_an_edit_of_an_invented_architecture_is_that_of_a_hook(tools: Any) -> None:
    module = odd()
    model = LanguageModel(module)

    def without_a_head(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value.view(1, -1, 4, 4)[:, :, 2] = 0
        return value

    expected = tools.plain(
        module, PROMPT[None], edits={("stack.1.look.back", "input"): without_a_head}
    )
    with model.trace(PROMPT):
        model.layers[1].z[:, :, 2] = 0
        logits = model.logits.save()
    assert tools.difference(logits.value, expected["to_words", "output"]) is None


@pytest.mark.parametrize("name", OTHERS)
def test_types_without_a_declaration_keep_every_promise(name: str, tools: Any) -> None:
    module = other(name)
    model = LanguageModel(module)
    report = model.verify_names()
    parallel = name == "Cohere"
    wanted = set(
        "resid_pre resid_post attn_in attn_out mlp_in mlp_out q k v scores pattern z".split()
    )
    assert wanted | ({"resid_mid"} - ({"resid_mid"} if parallel else set())) <= set(report.names)
    found = values(model, PROMPT)
    plain = tools.plain(module, PROMPT[None], use_cache=False)
    at = "model.layers.1"
    assert tools.difference(found[1, "resid_pre"], plain[at, "input"]) is None
    assert tools.difference(found[1, "mlp_in"], plain[f"{at}.mlp", "input"]) is None
    if name == "Granite":
        parts = 0.3 * plain[f"{at}.self_attn", "output"][0], 0.3 * plain[f"{at}.mlp", "output"]
        assert tools.difference(found[1, "attn_out"], parts[0]) is None
        assert tools.difference(found[1, "mlp_out"], parts[1]) is None
    if name == "Glm4":
        middle = plain[f"{at}.post_attention_layernorm", "input"]
        assert tools.difference(found[1, "resid_mid"], middle) is None
        after = plain[f"{at}.post_self_attn_layernorm", "output"]
        assert tools.difference(found[1, "attn_out"], after) is None
    if parallel:
        assert "parallel" in model.layers[0].support().missing["resid_mid"]


# -------------------------------------------------------------------- before it is used


def test_it_is_said_once_that_nothing_is_declared(caplog: pytest.LogCaptureFixture) -> None:
    model = LanguageModel(odd())
    with caplog.at_level(logging.WARNING, logger="graftwork"):
        model.layers[0].support()
        model.layers[1].support()
    (record,) = [r for r in caplog.records if "odd_one" in r.getMessage()]
    assert "found by looking at it" in record.getMessage()
    assert "found by looking at it" in str(model.layers[0].support())


def with_wrong_name(model: Any, **places: Any) -> None:
    """As if looking at it had gone wrong."""
    architecture = probe(model)
    block = architecture.block(0)
    block = dataclasses.replace(block, places={**block.places, **places})
    wrong = dataclasses.replace(architecture, blocks=(block,))
    model._vocabularies = {"layers": Vocabulary(model, wrong)}


def test_a_wrong_name_is_refused_when_it_is_used() -> None:
    model = LanguageModel(odd())
    with_wrong_name(model, resid_mid=Spot("", "input"), z=Spot("first", "output"))
    with model.trace(PROMPT):
        right = model.layers[1].resid_pre.save()
    assert right.value.shape == (1, len(PROMPT), 16)
    for _ in range(2):
        with pytest.raises(UnavailableNameError, match=r"(?s)looking at it is wrong.*resid_mid"):
            with model.trace(PROMPT):
                model.layers[1].resid_mid.save()


def test_names_are_checked_once() -> None:
    module = odd()
    model = LanguageModel(module)
    rows: list[int] = []
    module.register_forward_pre_hook(lambda _, args, kwargs: rows.append(1), with_kwargs=True)

    def use() -> int:
        before = len(rows)
        with model.trace(PROMPT):
            model.layers[1].mlp_out.save()
        return len(rows) - before

    assert use() > 1
    assert use() == 1


def test_the_check_leaves_the_edits_of_the_model_where_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = LanguageModel(odd())
    with model.edit(inplace=True):
        model.layers[1].mlp_out[:] = 0
    kept, seen = model._edits, []
    load = model._held.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(model._edits is kept)  # as a block of another thread would find it
        return load(*args, **kwargs)

    monkeypatch.setattr(model._held.module, "forward", forward)
    with model.trace(PROMPT):
        model.layers[1].resid_mid.save()
    assert len(seen) > 1 and all(seen)


def test_the_check_does_not_see_what_the_block_or_an_edit_does() -> None:
    model = LanguageModel(odd())
    with model.edit() as edited:
        edited.layers[1].mlp_out[:] = 0
    with edited.trace(PROMPT):
        middle = edited.layers[1].resid_mid.save()
        after = edited.layers[1].resid_post.save()
    assert torch.equal(middle.value, after.value)


def test_a_value_that_is_asked_for_in_an_open_block_is_checked_too() -> None:
    model = LanguageModel(odd())
    with model.trace(PROMPT):
        if float(model.layers[1].attn_out.norm()) > 0:
            after = model.layers[2].attn_out.save()
    assert after.value.shape == (1, len(PROMPT), 16)


def test_a_model_without_blocks_is_refused() -> None:
    class NoBlocks(OddForCausalLM):
        def __init__(self, config: OddConfig) -> None:
            super().__init__(config)
            self.stack = nn.ModuleList()

    model = LanguageModel(drawn(NoBlocks(OddConfig())))
    with pytest.raises(UnavailableNameError, match="no list of blocks"):
        model.layers[0].support()
