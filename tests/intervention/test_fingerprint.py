"""A model that is changed after a block: the next block knows it as it is now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from graftwork import LanguageModel
from graftwork.intervention.fingerprint import fingerprint


@pytest.fixture
def module() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def resize(module: Any) -> None:
    module.resize_token_embeddings(70, mean_resizing=False)


def widen(module: Any) -> None:
    mlp = module.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj = torch.nn.Linear(16, 40), torch.nn.Linear(16, 40)
    mlp.down_proj = torch.nn.Linear(40, 16)


def double(module: Any) -> None:
    module.double()


def inject(module: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=4, target_modules=["gate_proj"]), module)


@pytest.mark.parametrize("change", [resize, widen, double, inject])
def test_shapes_are_those_of_the_changed_model(module: Any, change: Callable[[Any], None]) -> None:
    model: Any = LanguageModel(module)

    def look(ids: list[int]) -> tuple[Any, ...]:
        with model.trace() as tracer:
            with tracer.invoke(ids):
                places = [model.lm_head.output, model.model.layers[0].mlp.gate_proj.output]
                known = [(tuple(place.shape), place.dtype) for place in places]
                saved = [place.save() for place in places]
            with tracer.invoke([4, 5, 6, 7]):
                model.output.logits.save()
        assert known == [(tuple(one.value.shape), one.value.dtype) for one in saved]
        return tuple(known)

    before = look([1, 2, 3])
    change(module)
    after = look([1, 2, 69 if change is resize else 3])
    assert (before != after) == (change is not inject)
    if change is inject:
        with model.trace([1, 2]):
            place = model.model.layers[0].mlp.gate_proj.lora_A["default"].output
            shape, saved = tuple(place.shape), place.save()
        assert shape == tuple(saved.value.shape) == (1, 2, 4)


def test_a_change_of_the_configuration_counts(module: Any) -> None:
    model: Any = LanguageModel(module)
    with model.trace([1, 2]):
        assert model.model.layers[0].self_attn.output[0].shape == (1, 2, 16)
        model.output.save()
    module.set_attn_implementation("eager")
    with model.trace([1, 2]):
        assert model.model.layers[0].self_attn.output[1].shape == (1, 4, 2, 2)
        model.output.save()


def test_nothing_is_measured_anew_for_a_model_that_is_the_same(module: Any) -> None:
    model: Any = LanguageModel(module)
    first = model.schedule()
    before = fingerprint(module)
    with torch.no_grad():
        module(torch.tensor([[1, 2]]))
        module.lm_head.weight.mul_(2)
    module.train()
    assert fingerprint(module) == before and model.schedule() is first


def test_an_edited_view_follows_its_model(module: Any) -> None:
    model: Any = LanguageModel(module)
    with model.edit() as edited:
        model.layers[0].mlp_out[:] *= 2
    widen(module)
    with edited.trace([1, 2]):
        assert edited.layers[0].mlp_post.shape == (1, 2, 40)
        value = edited.layers[0].mlp_post.save()
    assert value.value.shape == (1, 2, 40)


class Pair(torch.nn.Module):
    def forward(self, hidden: Any) -> Any:
        return hidden, hidden * 2


def test_a_replaced_module_that_gives_a_structure_is_asked_anew(module: Any) -> None:
    model: Any = LanguageModel(module)
    with model.trace([3, 4]):
        before = model.model.norm.output.save()
    assert isinstance(before, torch.Tensor)
    module.model.layers[1].post_attention_layernorm = torch.nn.Sequential(Pair(), First())
    module.model.norm = Pair()
    module.lm_head = torch.nn.Sequential(First(), module.lm_head)
    with model.trace([3, 4]):
        pair = model.model.norm.output.save()
    assert not isinstance(pair, torch.Tensor) and torch.equal(pair[1], pair[0] * 2)


class First(torch.nn.Module):
    def forward(self, hidden: Any) -> Any:
        return hidden[0]
