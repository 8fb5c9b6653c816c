"""Damaged files, each named in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from graftwork import LanguageModel
from graftwork.tracing.errors import LoadError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=61,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _swap(file: Path) -> None:
    index = json.loads(file.read_text())
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"] = dict.fromkeys(index["weight_map"], names[0])
    file.write_text(json.dumps(index))


FIRST, INDEX = "model-00001-of-*.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("pattern", "damage", "message"),
    [
        (
            FIRST,
            _cut,
            r"model-00001-of-\d+.safetensors \(\d+ bytes\) cannot be read.*fetch it again",
        ),
        (FIRST, lambda file: file.write_bytes(b""), r"model-00001-of-\d+.safetensors \(0 bytes\)"),
        (FIRST, lambda file: file.unlink(), r"no file 'model-00001-of-.*which its index names"),
        (FIRST, lambda file: file.write_bytes(b"<html>404</html>"), "model-00001-of-"),
        (INDEX, lambda file: file.write_text("{"), "index.json is no index of weights"),
        (INDEX, lambda file: file.write_text("{}"), "index.json is no index of weights"),
        (INDEX, lambda file: file.write_text("[]"), "index.json is no index of weights"),
        (INDEX, lambda file: file.write_text(""), "index.json is no index of weights"),
    ],
)
def test_a_damaged_file_is_named(
    shards: Path, tmp_path: Path, pattern: str, damage: Any, message: str
) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    damage(next(iter(folder.glob(pattern))))
    model = LanguageModel(str(folder))
    with pytest.raises(LoadError, match=message) as caught:
        model.load()
    assert "\n" not in str(caught.value)
    assert not model.loaded


def test_an_index_of_other_files_is_refused(shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    _swap(folder / INDEX)
    with pytest.raises(LoadError, match=r"no weights for|which the index says is in it"):
        LanguageModel(str(folder)).load()


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_damaged_pickle_is_named(shards: Path, tmp_path: Path, kept: float) -> None:
    module = transformers.AutoModelForCausalLM.from_pretrained(shards)
    module.config.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(module.state_dict(), file)
    whole = LanguageModel(str(tmp_path)).load()
    assert torch.equal(whole.get_parameter("lm_head.weight"), module.lm_head.weight)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
    with pytest.raises(LoadError, match=r"pytorch_model.bin \(\d+ bytes\) of .* cannot be read"):
        LanguageModel(str(tmp_path)).load()


def test_code_in_a_folder_is_not_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": own}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit")

    def asked(*_: Any) -> str:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(LoadError, match=r"has code of its own.*trust_remote_code=True"):
        LanguageModel(str(tmp_path))


def test_a_tokenizer_with_code_of_its_own_is_not_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers.GPT2Config(n_embd=12, n_layer=1).save_pretrained(tmp_path)
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    (tmp_path / "own.py").write_text("raise SystemExit")

    def asked(*_: Any) -> str:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    assert LanguageModel(str(tmp_path)).tokenizer is None


_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 7
        return output
"""


def test_trusted_code_is_the_class(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    folder = Path(shutil.copytree(shards, tmp_path / "own"))
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": own}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(_CODE)
    model = LanguageModel(str(folder), trust_remote_code=True)
    with model.trace([3, 4, 5]) as tracer:
        logits = tracer.output.logits.save()
    plain = transformers.AutoModelForCausalLM.from_pretrained(shards)
    with torch.no_grad():
        assert torch.allclose(logits.value, plain(torch.tensor([[3, 4, 5]])).logits + 7, atol=1e-5)
