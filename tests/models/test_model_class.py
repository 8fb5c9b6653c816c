"""Which class a checkpoint is: the one that was saved, another only where it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from graftwork import LanguageModel
from graftwork.tracing.errors import InputError, LoadError

_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_PIXELS = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_WHISPER = {
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 16 for side in ("encoder", "decoder")},
    "d_model": 16,
    "vocab_size": 61,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
}
IDS = [3, 4, 5, 6]


def _config(name: str) -> Any:
    if name.startswith("Llava"):
        text, vision = transformers.LlamaConfig(**_SIZES), transformers.CLIPVisionConfig(**_PIXELS)
        return transformers.LlavaConfig(
            text_config=text, vision_config=vision, image_token_index=60
        )
    if name.startswith("Whisper"):
        return transformers.WhisperConfig(**_WHISPER)
    if name.startswith("ViT"):
        return transformers.ViTConfig(**_PIXELS)
    if name.startswith("Electra"):
        return transformers.ElectraConfig(**_SIZES, embedding_size=16)
    return getattr(transformers, f"{name.split('For')[0].removesuffix('Model')}Config")(**_SIZES)


def _saved(name: str, folder: Path) -> Any:
    torch.manual_seed(0)
    module = getattr(transformers, name)(_config(name)).eval()
    module.save_pretrained(folder)
    return module


@pytest.mark.parametrize(
    "name",
    [
        "LlamaForSequenceClassification",
        "LlamaForTokenClassification",
        "LlamaModel",
        "BertForQuestionAnswering",
        "BertForSequenceClassification",
        "BertForMaskedLM",
        "BertModel",
        "ElectraForPreTraining",
        "WhisperForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "ViTModel",
    ],
)
def test_a_folder_is_loaded_as_what_was_saved(name: str, tmp_path: Path) -> None:
    module = _saved(name, tmp_path)
    model = LanguageModel(str(tmp_path))
    assert type(model.module_tree()) is type(module)
    loaded = model.load()
    assert type(loaded) is type(module)
    ours, theirs = loaded.state_dict(), module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_classifier_gives_its_own_logits(tmp_path: Path) -> None:
    module = _saved("LlamaForSequenceClassification", tmp_path)
    model = LanguageModel(str(tmp_path))
    with model.trace(IDS) as tracer:
        logits = tracer.output.logits.save()
    with torch.no_grad():
        expected = module(torch.tensor([IDS])).logits
    assert expected.shape == (1, 2)
    assert torch.allclose(logits.value, expected, atol=1e-6)
    with pytest.raises(InputError, match="LlamaForSequenceClassification generates nothing"):
        model.generate(IDS, max_new_tokens=2)


def test_pixels_go_into_a_bare_vision_model(tmp_path: Path) -> None:
    module = _saved("ViTModel", tmp_path)
    pixels = torch.rand(2, 3, 8, 8)
    model = LanguageModel(str(tmp_path))
    with model.trace(pixels) as tracer:
        hidden = tracer.output.last_hidden_state.save()
    with torch.no_grad():
        assert torch.allclose(hidden.value, module(pixels).last_hidden_state, atol=1e-6)


@pytest.mark.parametrize("asked", ["AutoModel", "LlamaModel", transformers.LlamaModel])
def test_another_class_is_loaded_where_it_is_asked_for(asked: Any, tmp_path: Path) -> None:
    module = _saved("LlamaForCausalLM", tmp_path)
    model = LanguageModel(str(tmp_path), automodel=asked)
    assert type(model.load()) is transformers.LlamaModel
    with model.trace(IDS) as tracer:
        hidden = tracer.output.last_hidden_state.save()
    with torch.no_grad():
        expected = module.model(torch.tensor([IDS])).last_hidden_state
    assert torch.allclose(hidden.value, expected, atol=1e-6)


def test_a_head_that_no_file_has_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    module = _saved("LlamaForCausalLM", tmp_path)
    model = LanguageModel(str(tmp_path), task="text-classification")
    with pytest.raises(
        LoadError, match=r"would be random: `score.weight`.*allow_missing=\[\"score"
    ):
        model.load()
    assert not model.loaded
    model = LanguageModel(
        str(tmp_path), automodel="AutoModelForSequenceClassification", allow_missing=["score.*"]
    )
    loaded: Any = model.load()
    assert type(loaded) is transformers.LlamaForSequenceClassification
    assert torch.equal(loaded.model.norm.weight, module.model.norm.weight)


def test_a_configuration_that_names_no_class_gets_no_random_head(tmp_path: Path) -> None:
    module = transformers.BertModel(_config("BertModel"))
    module.save_pretrained(tmp_path)
    config = module.config
    config.architectures = None
    config.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"would be random.*`automodel=`"):
        LanguageModel(str(tmp_path)).load()
    model = LanguageModel(str(tmp_path), automodel="BertModel")
    assert torch.equal(
        model.load().state_dict()["embeddings.word_embeddings.weight"],
        module.embeddings.word_embeddings.weight,
    )


def test_a_class_that_transformers_lacks_is_loaded_by_its_kind_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = _saved("LlamaForCausalLM", tmp_path)
    module.config.architectures = ["LLaMAForCausalLM"]
    module.config.save_pretrained(tmp_path)
    model = LanguageModel(str(tmp_path))
    assert "saved as a `LLaMAForCausalLM`" in caplog.text
    assert type(model.load()) is transformers.LlamaForCausalLM


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"automodel": "AutoModelForCausalML"},
            "no class 'AutoModelForCausalML'.*ForCausalLM",
        ),
        ({"automodel": "GPT2LMHeadModel"}, "no model for a configuration of the type `llama`"),
        ({"automodel": "AutoModelForImageClassification"}, "no model for a .*LlamaForCausalLM"),
        ({"automodel": 3}, "takes a class of transformers or its name, not int"),
        ({"task": "text-clasification"}, "is not known.*text-classification"),
        ({"task": "ner", "automodel": "AutoModel"}, "give `automodel=` or `task=`"),
    ],
)
def test_choices_that_do_not_fit_are_refused(options: Any, message: str, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**_SIZES)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=message):
        LanguageModel(str(tmp_path), **options)
