"""A recorded block runs again on other prompts, as if it had been recorded for them."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from graftwork import LanguageModel, Model
from graftwork.tracing.errors import BlockError, InputError, StepError


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=3,
        n_embd=64,
        n_head=8,
        vocab_size=300,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LanguageModel(GPT2LMHeadModel(config).eval())


def plain(model: LanguageModel, ids: list[int], scale: float | None = None) -> torch.Tensor:
    """Last logits by a plain hook that scales the last token after the second block."""
    block = model.load().transformer.h[1]

    def hook(_m: object, _a: object, output: torch.Tensor) -> torch.Tensor | None:
        if scale is None:
            return None
        output = output.clone()
        output[:, -1] *= scale
        return output

    handle = block.register_forward_hook(hook)
    try:
        with torch.no_grad():
            return model.load()(torch.tensor([ids])).logits[:, -1]
    finally:
        handle.remove()


def test_same_graph_on_other_prompts(model: LanguageModel) -> None:
    with model.trace([1, 2, 3]) as tracer:
        model.transformer.h[1].output[:, -1] *= 2.0
        logits = model.lm_head.output[:, -1].save()
    experiment = tracer.compile()
    assert experiment.prompts == 1
    for ids in ([4, 5, 6, 7], [9], [1, 2, 3]):
        assert torch.allclose(experiment(ids)[logits], plain(model, ids, 2.0), atol=1e-5)
    assert torch.equal(experiment()[0], logits.value)


def test_several_prompts_and_saves_keep_their_order(model: LanguageModel) -> None:
    with model.trace() as tracer:
        with tracer.invoke([1, 2, 3]):
            first = model.lm_head.output[:, -1].save()
        with tracer.invoke([4, 5]):
            model.transformer.h[1].output[:, -1] *= 0.5
            second = model.lm_head.output[:, -1].save()
    results = tracer.compile()([7, 8, 9, 10], [11, 12, 13])
    assert len(results) == len(list(results)) == 2
    assert torch.allclose(results[first], plain(model, [7, 8, 9, 10]), atol=1e-5)
    assert torch.allclose(results[second], plain(model, [11, 12, 13], 0.5), atol=1e-5)


def test_each_run_has_values_of_its_own(model: LanguageModel) -> None:
    with model.trace([1, 2, 3]) as tracer:
        hidden = model.transformer.h[0].output.save()
    experiment = tracer.compile()
    before = hidden.value.clone()
    other = experiment([5, 6])[hidden]
    again = experiment([5, 6])[hidden]
    assert other is not again
    other.zero_()
    assert not torch.equal(other, again)
    assert torch.equal(hidden.value, before)


def test_compiled_inside_the_block_or_after_it(model: LanguageModel) -> None:
    with model.trace([1, 2, 3]) as tracer:
        logits = model.lm_head.output[:, -1].save()
        inside = tracer.compile()
    after = tracer.compile()
    expected = plain(model, [8, 9])
    assert torch.allclose(inside([8, 9])[logits], expected, atol=1e-5)
    assert torch.allclose(after([8, 9])[logits], expected, atol=1e-5)


def test_generation_runs_again(model: LanguageModel) -> None:
    with model.generate(max_new_tokens=2, do_sample=False) as generator:
        with generator.invoke([1, 2, 3]) as invoker:
            invoker.next()
            later = model.transformer.h[2].output.save()
        ids = generator.output.save()
    results = generator.compile()([4, 5, 6, 7])
    prompt = torch.tensor([[4, 5, 6, 7]])
    expected = model.load().generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(results[ids], expected)
    assert results[later].shape == (1, 1, 64)


def test_a_captured_parameter_is_used_as_it_is_now() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    model, x = Model(module), torch.randn(3, 4)
    steer = torch.nn.Parameter(torch.zeros(4))
    with model.trace(x) as tracer:
        model[0].output += steer
        out = model[1].output.save()
    experiment = tracer.compile()
    optimizer = torch.optim.SGD([steer], lr=0.1)
    losses = []
    for _ in range(20):
        loss = experiment(x)[out].square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        expected = module[1](module[0](x) + steer)
    assert torch.allclose(experiment(x)[out], expected, atol=1e-6)


def test_another_number_of_prompts_is_refused(model: LanguageModel) -> None:
    with model.trace([1, 2, 3]) as tracer:
        model.lm_head.output.save()
    with pytest.raises(InputError, match="takes 1 prompts, 2 were given"):
        tracer.compile()([1], [2])
    with pytest.raises(InputError, match=r"written for a prompt of 1 rows, this one has 2"):
        tracer.compile()([[1, 2], [3, 4]])


def test_positions_of_rows_of_different_lengths_are_not_reused(model: LanguageModel) -> None:
    with model.trace([[1, 2, 3], [4, 5]]) as tracer:
        first = model.transformer.wte.output.t[0].save()
    experiment = tracer.compile()
    assert torch.equal(
        experiment([[7, 8, 9], [5, 6]])[first], model.load().transformer.wte.weight[[7, 5]]
    )
    with pytest.raises(InputError, match="rows of different lengths"):
        experiment([[7, 8], [5, 6, 9]])


def test_positions_in_one_prompt_are_its_own(model: LanguageModel) -> None:
    with model.trace([1, 2, 3]) as tracer:
        last = model.transformer.wte.output.t[-1].save()
        second = model.transformer.wte.output.t[1].save()
    results = tracer.compile()([9, 8, 7, 6, 5])
    weight = model.load().transformer.wte.weight
    assert torch.equal(results[last], weight[[5]])
    assert torch.equal(results[second], weight[[8]])


def test_a_block_without_prompt_is_refused(model: LanguageModel) -> None:
    tracer = model.trace()
    with pytest.raises(BlockError, match="no prompt"):
        tracer.compile()


def test_a_step_that_never_ran_is_an_error(model: LanguageModel) -> None:
    with model.generate(max_new_tokens=1) as generator:
        with generator.invoke([1, 2, 3]) as invoker:
            invoker.next()
            model.lm_head.output.save()
    results = generator.compile()([4, 5])  # the others are not lost
    with pytest.raises(StepError, match="step 1"):
        _ = results[0]


def test_an_unsaved_handle_is_not_among_the_results(model: LanguageModel) -> None:
    with model.trace([1, 2, 3]) as tracer:
        hidden = model.transformer.h[0].output
        hidden.sum().save()
    with pytest.raises(KeyError, match="not saved"):
        tracer.compile()([4])[hidden]


def test_a_size_that_was_that_of_the_prompt_is_not_taken_for_anothers(gpt2: LanguageModel) -> None:
    with gpt2.trace([[5, 6, 7]]) as tracer:
        hidden = gpt2.transformer.h[1].output[0]
        mean = (hidden.sum(1) / hidden.shape[1]).save()
    experiment = tracer.compile()
    other = experiment([[8, 9, 10]])[mean]
    with gpt2.trace([[8, 9, 10]]):
        expected = gpt2.transformer.h[1].output[0].mean(1).save()
    torch.testing.assert_close(other, expected)
    for ids in ([[8, 9]], [[1, 2, 3, 4]]):
        with pytest.raises(InputError, match="asked for a size"):
            experiment(ids)
    with gpt2.trace([[5, 6, 7]]) as tracer:
        logits = gpt2.lm_head.output
        last = logits[:, -1]
        last = (last / last.shape[-1]).save()  # a size that is the model's own
    assert tracer.compile()([[8, 9]])[last].shape == last.shape
