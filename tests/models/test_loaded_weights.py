"""That no weight is random, or left out, without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from graftwork import LanguageModel
from graftwork.tracing.errors import LoadError

IDS = [3, 4, 5, 6]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        vocab_size=61,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def _configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _store(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_missing_weight_is_refused_by_name(folder: Path) -> None:
    _store(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    model = LanguageModel(str(folder))
    with (
        pytest.raises(LoadError, match=r"would be random: `model.layers.1.mlp.up_proj.weight`\."),
        model.trace(IDS),
    ):
        model.lm_head.output.save()
    assert not model.loaded
    assert LanguageModel(str(folder), allow_missing="model.layers.1.mlp.*").load() is not None


def test_many_missing_weights_are_counted(folder: Path) -> None:
    _configure(folder, num_hidden_layers=5)
    with pytest.raises(
        LoadError, match=r"no weights for 26 of those .*model.layers.3.* and 20 more"
    ):
        LanguageModel(str(folder)).load()


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"num_hidden_layers": 2}, r"13 weights in the blocks.*`model.layers.2.input_layernorm"),
        (
            {"attention_bias": False},
            r"12 weights in the blocks.*`model.layers.0.self_attn.k_proj.bias",
        ),
        (
            {"hidden_size": 32, "head_dim": 4},
            r"`lm_head.weight` \[61, 16\] there and \[61, 32\] here",
        ),
        ({"vocab_size": 62}, r"`lm_head.weight` \[61, 16\] there and \[62, 16\] here"),
    ],
)
def test_a_changed_configuration_is_refused(folder: Path, changes: Any, found: str) -> None:
    _configure(folder, **changes)
    with pytest.raises(LoadError, match=found):
        LanguageModel(str(folder)).load()


def test_fewer_layers_are_loaded_where_that_is_said(folder: Path) -> None:
    whole = LanguageModel(str(folder)).load()
    _configure(folder, num_hidden_layers=2)
    model = LanguageModel(str(folder), allow_missing=["model.layers.2.*"])
    with model.trace(IDS):
        hidden = model.model.layers[1].output.save()
    found: list[torch.Tensor] = []
    whole.get_submodule("model.layers.1").register_forward_hook(lambda _m, _a, o: found.append(o))
    with torch.no_grad():
        whole(torch.tensor([IDS]))
    assert torch.equal(hidden.value, found[0])


def test_what_older_files_hold_beside_their_weights_is_no_matter(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=61, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)

    def as_it_was(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8)
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    _store(tmp_path, as_it_was)
    model = LanguageModel(str(tmp_path))
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(model.load().get_parameter("transformer.wpe.weight"), stored["wpe.weight"])


def test_a_tied_weight_is_not_missing(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=61, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert LanguageModel(str(tmp_path)).load() is not None
