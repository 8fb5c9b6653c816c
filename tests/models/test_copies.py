"""Copies of a model: deep, pickled, moved."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from graftwork import LanguageModel, Model
from graftwork.tracing.errors import EditError

IDS = [3, 4, 5, 6]


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=61, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def _logits(model: Any) -> torch.Tensor:
    with model.trace(IDS) as tracer:
        logits = tracer.output.logits.save()
    found: torch.Tensor = logits.value
    return found


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_weights(way: Any) -> None:
    module = gpt2()
    model: Any = LanguageModel(module)
    before = _logits(model)
    copied = way(model)
    assert type(copied) is LanguageModel
    assert torch.equal(_logits(copied), before)
    copied.layers[0]["attn.W_Q"][:] = 0
    assert copied.load() is not module
    assert copied.load().transformer.h[0].attn.c_attn.weight[:, :16].abs().max() == 0
    assert torch.equal(_logits(model), before)
    assert not torch.equal(_logits(copied), before)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_what_is_not_loaded_is_not_loaded(way: Any, tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path)
    model = LanguageModel(str(tmp_path))
    copied = way(model)
    assert not model.loaded and not copied.loaded
    assert torch.equal(_logits(copied), _logits(model))
    assert copied.load() is not model.load()


def test_a_copy_has_the_edits_and_a_pickle_says_how() -> None:
    model: Any = LanguageModel(gpt2())
    with model.edit() as edited:
        model.transformer.h[0].output[0][:] = 0
    copied = copy.deepcopy(edited)
    assert torch.equal(_logits(copied), _logits(edited))
    assert not torch.equal(_logits(copied), _logits(model))
    with pytest.raises(EditError, match="save_edits"):
        pickle.dumps(edited)


def test_to_gives_the_model_and_casts_what_blocks_see() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    model: Any = Model(module)
    x = torch.randn(2, 4, dtype=torch.float64)
    with model.trace(x.float()):
        assert model[0].output.dtype == torch.float32
    assert model.to(torch.float64) is model
    with model.trace(x):
        assert model[0].output.dtype == torch.float64
        hidden = model[0].output.save()
    assert torch.equal(hidden.value, module[0](x).detach())
