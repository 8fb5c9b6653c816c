"""Arguments that a forward changes: each further pass has them as they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache, LogitsProcessor

from graftwork import LanguageModel, Model
from graftwork.tracing.errors import BlockError, InputError

IDS = torch.tensor([[11, 3, 40, 22, 8, 3, 40, 1]])
PAST, REST = IDS[:, :4], IDS[:, 4:]
PLAIN: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def module() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model(module: Any) -> Any:
    return LanguageModel(module)


@pytest.fixture
def cache(module: Any) -> Any:
    cache = DynamicCache()
    with torch.no_grad():
        module(PAST, past_key_values=cache)
    return cache


@torch.no_grad()
def logits(module: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return module(ids).logits[:, -1]


def test_a_value_on_demand_does_not_use_a_cache_up(module: Any, model: Any, cache: Any) -> None:
    with model.trace(REST, past_key_values=cache) as tracer:
        hidden = model.model.layers[1].output
        if hidden.sum() > -1e9 and float(hidden.mean()) > -1e9:
            model.model.layers[1].output[:] *= 1.0
        found = tracer.output.logits[:, -1].save()
    torch.testing.assert_close(found.value, logits(module), atol=1e-5, rtol=1e-4)
    assert [layer.keys.shape[2] for layer in cache.layers] == [8, 8, 8]


def test_a_block_leaves_a_cache_as_one_forward_does(model: Any, cache: Any) -> None:
    with model.trace(REST, past_key_values=cache):
        first = model.model.layers[0].output.save()
        if first.sum() > -1e9:  # all that is saved is known then
            pass
    assert [layer.keys.shape[2] for layer in cache.layers] == [8, 8, 8]


def test_two_equal_invokes_each_have_the_cache(module: Any, model: Any, cache: Any) -> None:
    other = torch.tensor([[9, 2]])
    with model.trace(past_key_values=cache) as tracer:
        found = []
        for ids in (REST, REST, other):
            with tracer.invoke(ids):
                found.append(model.lm_head.output[:, -1].save())
    for value, ids in zip(found, (REST, REST, other), strict=True):
        expected = logits(module, torch.cat([PAST, ids], 1))
        torch.testing.assert_close(value.value, expected, atol=1e-5, rtol=1e-4)


def test_two_waves_do_not_grow_a_cache_twice(module: Any, model: Any, cache: Any) -> None:
    with model.trace(past_key_values=cache) as tracer:
        with tracer.invoke(REST):
            late = model.model.layers[2].output
        with tracer.invoke(REST):
            model.model.layers[0].output[:] += 0 * late
            found = model.lm_head.output[:, -1].save()
    torch.testing.assert_close(found.value, logits(module), atol=1e-5, rtol=1e-4)
    assert cache.get_seq_length() == 8


def test_a_cache_of_one_invoke(module: Any, model: Any, cache: Any) -> None:
    again = copy.deepcopy(cache)
    with model.trace() as tracer:
        with tracer.invoke(REST, past_key_values=cache):
            first = model.lm_head.output[:, -1]
            if first.sum() > -1e9:
                first = first.save()
        with tracer.invoke(REST, past_key_values=again):
            second = model.lm_head.output[:, -1].save()
    for found in (first, second):
        torch.testing.assert_close(found.value, logits(module), atol=1e-5, rtol=1e-4)


def test_a_cache_with_the_rows_of_all_invokes_is_shared(module: Any, model: Any) -> None:
    both = DynamicCache()
    past = torch.tensor([[1, 2, 3], [7, 8, 9]])
    with torch.no_grad():
        module(past, past_key_values=both)
    rests = [torch.tensor([[4]]), torch.tensor([[5]])]
    with model.trace(past_key_values=both) as tracer:
        found = []
        for ids in rests:
            with tracer.invoke(ids):
                found.append(model.lm_head.output[:, -1].save())
    for row, value in enumerate(found):
        expected = logits(module, torch.cat([past[row : row + 1], rests[row]], 1))
        torch.testing.assert_close(value.value, expected, atol=1e-5, rtol=1e-4)


class Counts(LogitsProcessor):
    """Has a state: another token at each call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, ids: Any, scores: Any) -> Any:
        self.calls += 1
        scores = scores.clone()
        scores[:, 10 + self.calls] = 1e4
        return scores


def test_a_processor_with_a_state_begins_anew_for_each_prompt(module: Any, model: Any) -> None:
    mine, theirs = Counts(), Counts()
    expected = module.generate(IDS, logits_processor=[theirs], **PLAIN)
    with model.generate(logits_processor=[mine], **PLAIN) as generator:
        invokers = []
        for ids in (REST, IDS):
            with generator.invoke(ids) as invoker:
                if model.lm_head.output.sum() > -1e9:
                    pass
            invokers.append(invoker)
    assert invokers[1].output.tolist() == expected.tolist()
    assert invokers[0].output[0, 4:].tolist() == expected[0, 8:].tolist() == [11, 12, 13, 14]
    assert mine.calls == theirs.calls == 4


def test_a_cache_in_a_generation(module: Any, model: Any, cache: Any) -> None:
    expected = module.generate(IDS, **PLAIN)
    with model.generate(IDS, past_key_values=cache, **PLAIN) as generator:
        if model.lm_head.output.sum() > -1e9:
            pass
        later = model.model.layers[1].output
        shape = later.shape
        last = later.t[-1].save()
    assert generator.output.tolist() == expected.tolist()
    with torch.no_grad():
        hidden = module(IDS, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(last.value, hidden[:, -1], atol=1e-5, rtol=1e-4)
    assert tuple(shape) == (1, 4, 16)
    with (
        pytest.raises(InputError, match=r"cache stands for the prompt's first 11 tokens"),
        model.generate(IDS, past_key_values=cache, **PLAIN),
    ):
        model.model.layers[1].output.t[0].save()


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Any, generator: Any = None) -> Any:
        noise = torch.rand(x.shape, generator=generator)
        return self.second(self.first(x) + noise)


def test_a_generator_draws_the_same_in_each_pass() -> None:
    torch.manual_seed(0)
    net = Noisy()
    model, x = Model(net), torch.ones(2, 3)
    expected = net(x, torch.Generator().manual_seed(3))
    after = torch.Generator().manual_seed(3)
    net(x, after)
    generator = torch.Generator().manual_seed(3)
    with model.trace() as tracer:
        with tracer.invoke(x, generator):
            if model.first.output.sum() > -1e9:
                late = model.second.output.save()
        with tracer.invoke(x, generator):
            model.first.output[:] += 0 * late
            found = model.second.output.save()
    torch.testing.assert_close(late.value, expected)
    torch.testing.assert_close(found.value, expected)
    assert torch.equal(generator.get_state(), after.get_state())


def test_what_cannot_be_copied_or_run_again_is_refused(model: Any, cache: Any) -> None:
    with model.trace(REST, past_key_values=cache) as tracer:
        model.lm_head.output.save()
    with pytest.raises(BlockError, match=r"test_changing\.py:\d+.*DynamicCache.*run again"):
        tracer.compile()

    class Fixed:
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("a lock")

    net: Any = Model(Noisy())
    with (
        pytest.raises(BlockError, match=r"test_changing\.py:\d+.*Fixed.*a lock"),
        net.trace(torch.ones(1, 3), Fixed()),
    ):
        float(net.first.output.sum())


@pytest.mark.parametrize("prompts", [1, 2])
def test_a_value_on_demand_is_no_forward_that_batchnorm_counts(prompts: int) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    module = copy.deepcopy(plain)
    model, inputs, saved = Model(module), [torch.randn(5, 3) for _ in range(prompts)], []
    with model.trace() as tracer:
        for given in inputs:
            with tracer.invoke(given):
                assert model[1].output.sum() > -1e9
                saved.append(model[2].output.save())
    for given, found in zip(inputs, saved, strict=True):
        torch.testing.assert_close(found.value, plain(given))
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), buffer)


def test_a_block_whose_values_were_all_demanded_counts_once() -> None:
    plain = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).train()
    module, given = copy.deepcopy(plain), torch.randn(5, 3)
    model = Model(module)
    with model.trace(given):
        hidden = model[0].output.save()
        assert hidden.sum() > -1e9
    torch.testing.assert_close(hidden.value, plain[0](given))
    torch.testing.assert_close(module[0].running_mean, plain[0].running_mean)
    assert module[0].num_batches_tracked == 1
