"""A module that one forward calls several times: `.output` alone is refused, `.calls[i]` is the ith."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from graftwork import LanguageModel, Model
from graftwork.intervention.repeats import may_repeat
from graftwork.tracing.errors import StepError

SEVERAL = r"`act` is called several times in one forward. Write `.calls\[0\]"


class Twice(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.act = torch.nn.GELU()
        self.last = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.first(x))
        return self.last(self.act(x))


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return Model(Twice())


X = torch.linspace(-1, 1, 8).reshape(2, 4)


def reads(model: Any) -> None:
    with model.trace(X):
        value = model.act.output.save()
    _ = value.value


def reads_more(model: Any) -> None:
    with model.trace(X):
        value, last = model.act.input.sum().save(), model.last.output.save()
    assert last.value.shape == (2, 4)
    _ = value.value


def asks(model: Any) -> None:
    with model.trace(X):
        if model.act.output.sum() > 0:
            model.last.output.save()


def writes(model: Any) -> None:
    with model.trace(X):
        model.act.output[:] = 0
        model.last.output.save()


def writes_what_it_read(model: Any) -> None:
    with model.trace(X):
        model.last.output[:] = model.act.output.sum()
        model.output.save()


def skips(model: Any) -> None:
    with model.trace(X):
        model.act.skip(model.act.input)
        model.output.save()


@pytest.mark.parametrize("block", [reads, reads_more, asks, writes, writes_what_it_read, skips])
def test_output_alone_is_refused(model: Any, block: Callable[[Any], None]) -> None:
    with pytest.raises(StepError, match=SEVERAL):
        block(model)


@pytest.mark.parametrize("plan", [None, False])
def test_each_call_by_its_number(model: Any, plan: Any) -> None:
    module = model.load()
    first = module.act(module.first(X))
    with model.trace(X, plan=plan):
        calls = [model.act.calls[i].output.save() for i in (0, 1)]
    assert torch.equal(calls[0].value, first) and torch.equal(calls[1].value, module.act(first))
    with model.trace(X, plan=plan):
        alone = model.act.calls[0].output.save()
    assert torch.equal(alone.value, first)
    with model.trace(X, plan=plan):
        model.act.calls[0].output[:] = 1
        last = model.output.save()
    assert torch.equal(last.value, module.last(module.act(torch.ones(2, 4))))
    with model.trace(X, plan=plan):
        model.act.calls[0].skip(model.act.calls[0].input)
        last = model.output.save()
    assert torch.equal(last.value, module.last(module.act(module.first(X))))


def test_a_cache_leaves_it_out_and_says_why(model: Any) -> None:
    with model.trace(X) as tracer:
        cache = tracer.cache()
    assert cache.keys() == ["first", "last"]
    with pytest.raises(StepError, match=SEVERAL):
        _ = cache["act"].output


def test_layers_that_share_their_weights() -> None:
    config = transformers.AlbertConfig(
        vocab_size=61, hidden_size=16, embedding_size=8, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    module = transformers.AlbertForMaskedLM(config).eval()
    model: Any = LanguageModel(module)
    layer = model.albert.encoder.albert_layer_groups[0].albert_layers[0]
    with torch.no_grad():
        ids = torch.tensor([[5, 2, 9]])
        states = module(input_ids=ids, output_hidden_states=True).hidden_states
    with model.trace(ids):
        saved = [layer.calls[i].output.save() for i in range(3)]
    for value, expected in zip(saved, states[1:], strict=True):
        found = value.value[0] if isinstance(value.value, tuple) else value.value
        torch.testing.assert_close(found, expected)
    with model.trace(ids):
        value = layer.output.save()
    with pytest.raises(StepError, match="called several times"):
        _ = value.value


def test_forwards_that_call_each_block_once_are_left_early() -> None:
    from transformers.models.t5.modeling_t5 import T5Stack

    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    )
    assert not may_repeat(gpt2, "transformer.h.1.mlp.act")
    assert not may_repeat(gpt2, "transformer.wte")
    assert may_repeat(Twice(), "act") and not may_repeat(Twice(), "first")
    config = transformers.T5Config(
        vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
    )
    t5 = transformers.T5ForConditionalGeneration(config)
    assert isinstance(t5.encoder, T5Stack) and may_repeat(t5, "encoder.dropout")
    assert not may_repeat(t5, "encoder.block.0.layer.0.SelfAttention")
