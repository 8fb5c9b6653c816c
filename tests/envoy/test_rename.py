"""Names that a user gives to modules mean the modules themselves."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from graftwork import LanguageModel, Model
from graftwork.tracing.errors import LoadError, UnknownModuleError

NAMES = {"transformer": "model", "h": ["layers", "blocks"], "attn": "self_attn"}


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=50, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config).eval()


def test_new_names_beside_the_old_ones() -> None:
    module = gpt2()
    model: Any = LanguageModel(module, rename=NAMES)
    assert model.model.layers[1].self_attn.path == "transformer.h.1.attn"
    assert model.model is model.transformer and model.transformer.blocks is model.transformer.h
    assert "layers" in dir(model.transformer)
    kept: list[torch.Tensor] = []
    handle = module.transformer.h[1].attn.register_forward_hook(
        lambda _m, _a, out: kept.append(out[0])
    )
    with model.trace([1, 2, 3]):
        new = model.model.layers[1].self_attn.output[0].save()
    handle.remove()
    assert torch.equal(new.value, kept[0].detach())


def test_a_path_gets_a_name_at_the_root_and_a_class_beside_each() -> None:
    rename = {"transformer.h": "layers", ".transformer.ln_f": ".final"}
    model: Any = LanguageModel(gpt2(), rename=rename)
    assert model.layers[0].path == "transformer.h.0" and model.final.path == "transformer.ln_f"
    assert model.get("layers.1.mlp").path == "transformer.h.1.mlp"
    plain: Any = Model(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), rename={nn.ReLU: "act"})
    assert plain.act.path == "1"


def test_a_lazy_model_knows_them_before_it_is_loaded_and_edits_do() -> None:
    model: Any = LanguageModel("graftwork/tiny", rename=NAMES)
    with model.edit() as edited:
        model.model.layers[0].output[0][:] = 0
    assert not model.loaded
    with edited.trace("The") as tracer:
        hidden = edited.model.blocks[0].output[0].save()
        cache = tracer.cache(modules=["model.layers.1"])
    assert hidden.abs().max() == 0
    assert cache["transformer.h.1"].output is not None


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"attn": "mlp"}, "has a `mlp` already"),
        ({"attn": "output"}, "has a `output` already"),
        ({"transformer": "generate"}, "the model has a `generate` already"),
        ({"attn": "x", "mlp": "x"}, "would mean"),
        ({"atn": "x"}, "no module is called `atn`. Did you mean `attn`"),
        ({"transformer.hh": "x"}, "no module is called"),
        ({nn.Conv2d: "x"}, "of the class Conv2d"),
        ({"attn": "a.b"}, "no name without dots"),
        ({"attn": 3}, "3 for `attn` is no name"),
    ],
)
def test_what_is_refused(rename: dict[Any, Any], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        LanguageModel(gpt2(), rename=rename)


def test_a_name_that_nobody_gave() -> None:
    model: Any = LanguageModel(gpt2(), rename=NAMES)
    with pytest.raises(UnknownModuleError):
        _ = model.model.layerz
    with pytest.raises(UnknownModuleError):
        model.get("model.layers.7")
