"""`tracer.stop()`, against plain transformers and plain hooks that count."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from graftwork import LanguageModel, Model
from graftwork.tracing.errors import BlockError, StepError
from graftwork.tracing.wire import pack, unpack

PROMPT, OTHER = "The Eiffel Tower is in the city of", "Big Ben is in"


@pytest.fixture(scope="module")
def model() -> Any:
    return LanguageModel("graftwork/tiny")


@pytest.fixture
def ran(model: Any) -> Iterator[list[int]]:
    """How often each block has run."""
    blocks = model.load().transformer.h
    counts = [0] * len(blocks)

    def count(number: int) -> Any:
        def hook(*_: Any) -> None:
            counts[number] += 1

        return hook

    handles = [block.register_forward_hook(count(i)) for i, block in enumerate(blocks)]
    yield counts
    for handle in handles:
        handle.remove()


def plain(model: Any, prompt: str, new: int, **options: Any) -> Any:
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    return model.load().generate(ids, max_new_tokens=new, do_sample=False, **options).tolist()


def test_a_trace_leaves_the_forward_when_all_its_prompts_have_stopped(
    model: Any, ran: list[int]
) -> None:
    with model.trace() as tracer:
        for prompt in (PROMPT, OTHER):
            with tracer.invoke(prompt):
                hidden = model.transformer.h[1].output[0].save()
                tracer.stop()
                late = model.transformer.h[3].output[0].save()
    assert ran == [1, 1, 0, 0] and hidden.shape[-1] == 128
    with pytest.raises(StepError, match=r"(?s)stopped at .*test_stop\.py.*tracer\.stop"):
        _ = late.value


def test_another_prompt_of_the_batch_goes_on(model: Any, ran: list[int]) -> None:
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            model.transformer.h[0].output[0].save()
            tracer.stop()
        with tracer.invoke(OTHER):
            found = model.transformer.h[2].output[0].save()
    assert ran == [1, 1, 1, 0]
    with model.trace(OTHER):
        alone = model.transformer.h[2].output[0].save()
    torch.testing.assert_close(found.value, alone.value, rtol=1e-4, atol=1e-4)


def test_a_value_of_a_stopped_prompt_is_there_for_a_later_one(model: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            value = model.transformer.h[1].output[0]
            tracer.stop()
        with tracer.invoke(OTHER):
            model.transformer.h[0].output[:] *= value.mean()
            found = model.transformer.h[2].output[0].save()
    seen: list[torch.Tensor] = []
    module = model.load()

    def keep(_module: Any, _args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    def scale(_module: Any, _args: Any, output: Any) -> None:
        (output[0] if isinstance(output, tuple) else output).mul_(seen[0].mean())

    with torch.no_grad():
        for text, hooks in ((PROMPT, {1: keep}), (OTHER, {0: scale, 2: keep})):
            handles = [module.transformer.h[i].register_forward_hook(h) for i, h in hooks.items()]
            module(**model.tokenizer(text, return_tensors="pt"))
            for handle in handles:
                handle.remove()
    torch.testing.assert_close(found, seen[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("generates", [False, True])
def test_a_value_is_asked_for_where_a_stop_waits_for_another_prompt(
    model: Any, generates: bool
) -> None:
    """The stop is that of a prompt that the value needs; the other prompt is one that it does not."""
    h, third = model.transformer.h, "London is"
    options = {"max_new_tokens": 3} if generates else {}
    with (model.generate if generates else model.trace)(**options) as tracer:
        with tracer.invoke(PROMPT):
            first = h[0].output[0]
        with tracer.invoke(OTHER) as invoker:
            scale = h[0].output[0].mean()
            if generates:
                invoker.next()
            own = h[1].output[0] * 1
            own[:, -1] = first[:, -1]
            own = own.save()
            tracer.stop()
        with tracer.invoke(third):
            number = (h[2].output[0] * scale).abs().sum().item()
            again = (h[2].output[0] * scale).abs().sum().item()
    seen: dict[tuple[str, int], torch.Tensor] = {}
    for text in (PROMPT, OTHER, third):

        def keep(i: int, output: Any, text: str = text) -> None:
            seen[text, i] = output[0] if isinstance(output, tuple) else output

        handles = [
            block.register_forward_hook(lambda _m, _a, output, i=i: keep(i, output))
            for i, block in enumerate(model.load().transformer.h)
        ]
        with torch.no_grad():
            model.load()(**model.tokenizer(text, return_tensors="pt"))
        for handle in handles:
            handle.remove()
    expected = (seen[third, 2] * seen[OTHER, 0].mean()).abs().sum().item()
    assert number == pytest.approx(expected, rel=1e-4) and again == number
    torch.testing.assert_close(own[:, -1], seen[PROMPT, 0][:, -1], rtol=1e-4, atol=1e-4)
    assert len(own[0]) == (1 if generates else seen[OTHER, 0].shape[1])


@pytest.mark.parametrize("form", ["straight", "loop", "condition"])
@pytest.mark.parametrize("edited", [False, True])
def test_a_stop_does_not_wait_for_later_steps(model: Any, form: str, edited: bool) -> None:
    """What was recorded before it for all steps, by a loop or an edit, ends with it."""

    def hook(_module: Any, _args: Any, output: Any) -> None:
        output[..., 0] += 0.5

    handle = model.load().transformer.h[1].mlp.register_forward_hook(hook)
    expected = plain(model, PROMPT, 1 if form == "straight" else 2)
    handle.remove()
    view = model
    if edited:
        with model.edit() as view:
            model.transformer.h[1].mlp.output[..., 0] += 0.5
    with view.generate(PROMPT, max_new_tokens=5) as generator:
        if not edited:
            with generator.all():
                view.transformer.h[1].mlp.output[..., 0] += 0.5
                view.transformer.h[2].mlp.output.save()
        if form == "straight":
            generator.stop()
        elif form == "loop":
            with generator.iter[1:2]:
                generator.stop()
        else:
            with generator.all() as step, generator.cond(step == 1):
                generator.stop()
        with generator.all():
            found = view.transformer.h[1].mlp.output.save()
    assert generator.output.tolist() == expected
    assert len(found) == (1 if form == "straight" else 2)


@pytest.mark.parametrize("limit", [-1e9, 1e9])
def test_where_a_condition_holds(model: Any, ran: list[int], limit: float) -> None:
    with model.trace(PROMPT) as tracer:
        hidden = model.transformer.h[0].output[0].save()
        with tracer.cond(hidden.sum() > limit):
            tracer.stop()
        model.transformer.h[2].output[0][:] = 0
        late = model.transformer.h[2].output[0].save()
    if limit < 0:
        assert ran == [1, 0, 0, 0]
        with pytest.raises(StepError, match="stopped"):
            _ = late.value
    else:
        assert late.abs().max() == 0


def test_a_generation_keeps_its_tokens(model: Any) -> None:
    with model.generate(PROMPT, max_new_tokens=6) as generator:
        with generator.all() as step:
            logits = model.lm_head.output[0, -1].save()
            with generator.cond(step == 2):
                generator.stop()
    assert generator.output.tolist() == plain(model, PROMPT, 3)
    assert len(logits) == 3


def test_each_prompt_of_a_generation_ends_alone(model: Any) -> None:
    full = plain(model, PROMPT, 6)[0]
    width = len(model.tokenizer(PROMPT)["input_ids"])
    with model.generate(max_new_tokens=6) as generator:
        with generator.invoke(PROMPT) as first, generator.all():
            token = model.lm_head.output[0, -1].argmax()
            tokens = token.save()
            with generator.cond(token == full[width + 1]):
                generator.stop()
        with generator.invoke(OTHER) as second, generator.all():
            others = model.lm_head.output[0, -1].argmax().save()
        with generator.invoke(OTHER) as third:
            generator.stop()
    length = full.index(full[width + 1], width) + 1
    assert first.output[0].tolist() == full[:length]
    assert [int(t) for t in tokens.value] == full[width:length]
    expected = plain(model, OTHER, 6)
    assert second.output.tolist() == expected
    assert third.output.tolist() == plain(model, OTHER, 1)
    assert len(others) == len(expected[0]) - len(model.tokenizer(OTHER)["input_ids"])
    assert first.stopped == length - width - 1 and second.stopped is None


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"use_cache": False}])
def test_beams_and_no_cache(model: Any, options: dict[str, Any]) -> None:
    with model.generate(PROMPT, max_new_tokens=6, **options) as generator:
        with generator.all() as step:
            with generator.cond(step == 1):
                generator.stop()
    expected = plain(model, PROMPT, 2, **options)
    assert generator.output.shape[1] == len(expected[0])


def test_in_a_for_loop_and_with_a_value_on_demand(model: Any) -> None:
    with model.generate(PROMPT, max_new_tokens=5) as generator:
        for step in generator.iter[0:4]:
            if int(model.lm_head.output[0, -1].argmax()) >= 0 and step == 1:
                generator.stop()
                break
    assert generator.output.tolist() == plain(model, PROMPT, 2)


def test_what_was_written_before_counts(model: Any) -> None:
    with model.generate(PROMPT, max_new_tokens=5) as generator:
        model.transformer.h[2].output[0][:, -1] *= -1
        generator.stop()

    def hook(_module: Any, _args: Any, output: Any) -> None:
        (output[0] if isinstance(output, tuple) else output)[:, -1] *= -1

    handle = model.load().transformer.h[2].register_forward_hook(hook)
    expected = plain(model, PROMPT, 1)
    handle.remove()
    assert generator.output.tolist() == expected


def test_a_sweep_whose_variants_stop(model: Any) -> None:
    with model.trace() as tracer:
        found = []
        for position in range(4):
            with tracer.invoke(PROMPT):
                model.transformer.h[1].output[0][:, position] = 0
                found.append(model.transformer.h[2].output[0].save())
                tracer.stop()
        with tracer.invoke(PROMPT):
            tracer.stop()
    for position, hidden in enumerate(found):
        with model.trace(PROMPT):
            model.transformer.h[1].output[0][:, position] = 0
            alone = model.transformer.h[2].output[0].save()
        torch.testing.assert_close(hidden.value, alone.value, rtol=1e-4, atol=1e-4)


def test_a_forward_that_goes_on_behind_a_stop_has_all_results(model: Any, ran: list[int]) -> None:
    with model.trace(PROMPT, plan={"stop": False}) as tracer:
        mlp = model.transformer.h[1].mlp
        found = mlp.input.save()
        mlp.skip(mlp.input)
        tracer.stop()
    assert ran == [1, 1, 1, 1] and found.shape[-1] == model.config.n_embd


def test_any_module_and_sent_graphs() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model: Any = Model(module)
    calls: list[int] = []
    module[1].register_forward_hook(lambda *_: calls.append(1))
    with model.trace(torch.ones(1, 4)) as tracer:
        found = model[0].output.save()
        tracer.stop()
    experiment = tracer.compile()
    experiment.graph = unpack(pack(tracer.graph)).graph
    torch.testing.assert_close(experiment()[0], found.value)
    torch.testing.assert_close(found.value.detach(), module[0](torch.ones(1, 4)).detach())
    assert calls == []


def test_what_is_refused(model: Any) -> None:
    with pytest.raises(BlockError, match=r"tracer\.output"), model.trace(PROMPT) as tracer:
        tracer.stop()
        tracer.output.logits.save()
    with pytest.raises(BlockError, match=r"tracer\.stop\(\)"), model.trace() as tracer:
        tracer.stop()
    assert not any(child._forward_hooks for child in model.load().modules())
