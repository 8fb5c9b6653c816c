"""Blocks on language models: many prompts, whole batches, generations, and what goes wrong in them."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graftwork
from graftwork import LanguageModel
from graftwork.tracing.errors import (
    BlockError,
    InputError,
    NotRunError,
    OperationError,
    OrderError,
    ShapeError,
    StepError,
)


@pytest.fixture(scope="module")
def module(tools: Any) -> Any:
    return tools.module("gpt2")


@pytest.fixture(scope="module")
def model(tools: Any) -> Any:
    return tools.model("gpt2")


def plain_generation(module: Any, prompt: torch.Tensor, **options: Any) -> Any:
    prompt = prompt if prompt.ndim == 2 else prompt[None]
    options = {"pad_token_id": 0, "do_sample": False, **options}
    return module.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


def outputs_of(module: Any, path: str, prompt: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """What a module gives at each forward of a plain generation."""
    seen: list[torch.Tensor] = []
    handle = module.get_submodule(path).register_forward_hook(
        lambda _, args, output: seen.append(output.clone())
    )
    plain_generation(module, prompt, **options)
    handle.remove()
    return seen


# ---------------------------------------------------------------- a property: batched = solo


def heads_of(third: int) -> Any:
    """GPT-2's query, key or value vectors as a view of what `c_attn` gives."""

    def view(value: torch.Tensor) -> torch.Tensor:
        part = value[..., third * 16 : (third + 1) * 16]
        return part.unflatten(-1, (4, 4)).transpose(1, 2)

    return view


#: name → (path, port) that plain hooks change, how to change it there, and the same in a block.
PLACES: dict[str, Any] = {
    "output": ("transformer.h.1", "output"),
    "output[0]": ("transformer.h.1", "output"),
    "input": ("transformer.h.1", "input"),
    "mlp output": ("transformer.h.0.mlp", "output"),
    "mlp input": ("transformer.h.2.mlp", "input"),
    "norm output": ("transformer.h.2.ln_1", "output"),
    "inner": ("transformer.h.0.mlp.c_fc", "output"),
    "query": ("transformer.h.1.attn.c_attn", "output"),
    "key": ("transformer.h.1.attn.c_attn", "output"),
    "value": ("transformer.h.1.attn.c_attn", "output"),
    "logits": ("lm_head", "output"),
}
THIRDS = {"query": 0, "key": 1, "value": 2}


def edit_in_block(model: Any, place: str, token: int, head: int) -> None:
    path, port = PLACES[place]
    envoy = model.get(path)
    if place in THIRDS:
        getattr(model.transformer.h[1].attn, place).output[:, head, token] = 0.5
    elif place == "output[0]":
        envoy.output[0][:, token] *= 3
    elif port == "output":
        envoy.output.t[token] = envoy.output.t[token] * 3
    else:
        envoy.input[:, token] *= 3


def edit_plainly(place: str, token: int, head: int) -> Any:
    def change(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        if place in THIRDS:
            heads_of(THIRDS[place])(value)[:, head, token] = 0.5
        else:
            value[:, token] *= 3
        return value

    return {PLACES[place]: change}


@pytest.mark.slow
@settings(
    max_examples=40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_batched_prompts_with_edits_are_the_solo_prompts(
    data: st.DataObject, module: Any, model: Any, tools: Any
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=4))
    prompts = tools.prompts(*lengths, seed=data.draw(st.integers(0, 99)))
    edits: list[tuple[str, int, int] | None] = []
    for n in lengths:
        place = data.draw(st.none() | st.sampled_from(list(PLACES)))
        token = data.draw(st.integers(-n, n - 1))
        edits.append(place and (place, token, data.draw(st.integers(0, 3))))
    paths = ["transformer.h.1.attn", "transformer.h.2", "transformer.ln_f", "lm_head"]
    saved = []
    with model.trace() as tracer:
        for prompt, edit in zip(prompts, edits, strict=True):
            with tracer.invoke(prompt):
                if edit is not None:
                    edit_in_block(model, *edit)
                saved.append([model.get(path).output.save() for path in paths])
    for prompt, edit, values in zip(prompts, edits, saved, strict=True):
        changes = None if edit is None else edit_plainly(*edit)
        expected = tools.plain(module, prompt[None], edits=changes)
        for path, value in zip(paths, values, strict=True):
            assert tools.difference(value.value, expected[path, "output"]) is None, (edit, path)
    assert tools.hooks(module) == 0


@pytest.mark.slow
@settings(
    max_examples=30, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_batched_generations_with_edits_are_the_solo_generations(
    data: st.DataObject, tools: Any
) -> None:
    name = data.draw(st.sampled_from(["gpt2", "llama", "opt", "bloom", "mixtral", "mamba"]))
    module, model = tools.module(name), tools.model(name)
    lengths = data.draw(st.lists(st.integers(1, 8), min_size=2, max_size=3))
    prompts = tools.prompts(*lengths, seed=data.draw(st.integers(0, 99)))
    count = data.draw(st.integers(2, 4))
    options = {"max_new_tokens": count, **data.draw(st.sampled_from([{}, {"num_beams": 2}]))}
    if data.draw(st.booleans()):
        new = plain_generation(module, prompts[0], **options)[0, -count:].tolist()
        options["eos_token_id"] = data.draw(st.sampled_from(new))
    steps = st.none() | st.integers(0, count - 1)
    edits = [data.draw(st.tuples(steps, st.sampled_from([0.0, -2.0, 3.0]))) for _ in lengths]
    path = next(p for p, _ in module.named_modules() if p.endswith(".1"))
    saved, invokers = [], []
    with model.generate(do_sample=False, pad_token_id=0, **options) as generator:
        for prompt, (step, factor) in zip(prompts, edits, strict=True):
            with generator.invoke(prompt) as invoker:
                values = []
                for i in range(count):
                    if i:
                        invoker.next()
                    block = model.get(path)
                    if i == step:
                        block.output[0][:, -1] *= factor
                    values.append(block.output[0].save())
            saved.append(values)
            invokers.append(invoker)
    for prompt, edit, values, invoker in zip(prompts, edits, saved, invokers, strict=True):
        seen: list[torch.Tensor] = []

        def hook(_: Any, args: Any, output: Any, edit: Any = edit, seen: Any = seen) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden.clone()
            if len(seen) == edit[0]:
                hidden[:, -1] *= edit[1]
            seen.append(hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = module.get_submodule(path).register_forward_hook(hook)
        expected = plain_generation(module, prompt, **options)
        handle.remove()
        assert invoker.output.tolist() == expected.tolist()
        for value, wanted in zip(values, seen, strict=False):
            assert tools.difference(value.value, wanted) is None
        for value in values[len(seen) :]:
            with pytest.raises(StepError):
                _ = value.value


# ---------------------------------------------------------------- positions


def test_positions_are_written_in_each_row_of_a_padded_invoke(
    module: Any, model: Any, tools: Any
) -> None:
    a, b = tools.prompts(3, 6)
    vector = torch.randn(16)
    with model.trace([a.tolist(), b.tolist()]):
        hidden = model.transformer.h[0].output
        hidden.t[0] = vector
        hidden.t[-1] += vector
        hidden.t[1:2] *= 2
        last = model.lm_head.output.t[-1].save()

    def change(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, 0] = vector
        value[:, -1] += vector
        value[:, 1:2] *= 2
        return value

    for i, prompt in enumerate((a, b)):
        edits = {("transformer.h.0", "output"): change}
        expected = tools.plain(module, prompt[None], edits=edits)["lm_head", "output"]
        assert tools.difference(last.value[i], expected[0, -1]) is None


def test_positions_on_an_axis_that_is_not_the_second(module: Any, model: Any, tools: Any) -> None:
    a, b = tools.prompts(3, 6)
    with model.trace() as tracer:
        for prompt in (a, b):
            with tracer.invoke(prompt):
                values = model.transformer.h[1].attn.value.output
                values.t[-1] = 0
                last = model.lm_head.output.save()
    head = heads_of(2)

    def change(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        head(value)[:, :, -1] = 0
        return value

    edits = {("transformer.h.1.attn.c_attn", "output"): change}
    expected = tools.plain(module, b[None], edits=edits)["lm_head", "output"]
    assert tools.difference(last.value, expected) is None


@pytest.mark.parametrize(
    "key", [0, -1, 2, slice(None), slice(1, None), slice(None, -1), slice(-3, -1), slice(0, 4, 2)]
)
def test_positions_in_a_row_with_padding_are_those_of_the_row_alone(
    key: Any, module: Any, model: Any, tools: Any
) -> None:
    (a,) = tools.prompts(4)
    padded = torch.cat([torch.tensor([0, 0]), a, torch.tensor([0])])
    mask = [0, 0, 1, 1, 1, 1, 0]
    with model.trace(padded, attention_mask=mask):
        value = model.transformer.h[1].output.t[key].save()
    expected = tools.plain(module, a[None])["transformer.h.1", "output"]
    assert tools.difference(value.value, expected[:, key]) is None


def test_positions_where_batch_and_tokens_are_one_axis(tools: Any) -> None:
    module, model = tools.module("opt"), tools.model("opt")
    a, b = tools.prompts(3, 6)
    with model.trace() as tracer:
        for prompt in (b, a):
            with tracer.invoke(prompt):
                last = model.model.decoder.layers[1].fc1.output.t[-1].save()
    expected = tools.plain(module, a[None])["model.decoder.layers.1.fc1", "output"]
    assert tools.difference(last.value, expected[-1]) is None
    with pytest.raises(OperationError, match="counts the tokens of several rows together"):
        with model.trace([[3, 4], [5, 6]]):
            model.model.decoder.layers[1].fc1.output.t[-1].save()


@pytest.mark.parametrize("key", [3, -4])
def test_a_position_that_a_prompt_does_not_have_is_refused(
    key: int, model: Any, tools: Any
) -> None:
    with pytest.raises(InputError, match="the prompt has 3 tokens"):
        with model.trace(tools.prompts(3)[0]):
            model.transformer.h[0].output.t[key].save()


def test_positions_that_rows_have_in_different_numbers_are_refused(model: Any) -> None:
    with pytest.raises(OperationError, match=r"prompts of lengths \[2, 3\]"):
        with model.trace([[3, 4], [5, 6, 7]]):
            model.transformer.h[0].output.t[1:].save()


def test_what_has_no_tokens_has_no_positions(model: Any, tools: Any) -> None:
    with pytest.raises(OperationError, match="has no axis that counts tokens"):
        with model.trace(tools.prompts(3)[0]):
            model.transformer.h[0].output.mean(1).t[0].save()


# ---------------------------------------------------------------- the whole batch


def test_the_whole_batch_of_a_generation(module: Any, model: Any, tools: Any) -> None:
    prompts = tools.prompts(3, 6)
    with model.generate(max_new_tokens=3, do_sample=False, pad_token_id=0) as generator:
        for prompt in prompts:
            with generator.invoke(prompt):
                pass
        with generator.invoke() as whole:
            first = model.lm_head.output.save()
            whole.next(2)
            model.transformer.h[1].output[:] *= -1
            third = model.transformer.h[2].output.save()
    assert first.shape == (2, 6, tools.vocabulary)
    for i, prompt in enumerate(prompts):
        calls = [0]

        def hook(_: Any, args: Any, output: torch.Tensor, calls: Any = calls) -> Any:
            calls[0] += 1
            return -output if calls[0] == 3 else None

        handle = module.transformer.h[1].register_forward_hook(hook)
        expected = plain_generation(module, prompt, max_new_tokens=3)
        calls[0] = 0
        blocks = outputs_of(module, "transformer.h.2", prompt, max_new_tokens=3)
        handle.remove()
        assert generator.output[i, -3:].tolist() == expected[0, -3:].tolist()
        assert tools.difference(third.value[i : i + 1], blocks[2]) is None


def test_an_invoke_without_input_sees_the_padded_batch(module: Any, model: Any, tools: Any) -> None:
    a, b = tools.prompts(3, 6)
    with model.trace() as tracer:
        with tracer.invoke(a):
            pass
        with tracer.invoke(b):
            pass
        with tracer.invoke():
            hidden = model.transformer.h[1].output.save()
            last = model.lm_head.output.t[-1].save()
            first = model.lm_head.output.t[0].save()
            assert tuple(model.transformer.h[1].output.shape) == (2, 6, 16)
    assert hidden.shape == (2, 6, 16)
    for i, prompt in enumerate((a, b)):
        expected = tools.plain(module, prompt[None])
        block = expected["transformer.h.1", "output"]
        assert tools.difference(hidden.value[i : i + 1, -len(prompt) :], block) is None
        logits = expected["lm_head", "output"][0]
        assert tools.difference(last.value[i], logits[-1]) is None
        assert tools.difference(first.value[i], logits[0]) is None


def test_an_edit_of_the_whole_batch_keeps_that_of_its_only_prompt(
    module: Any, model: Any, tools: Any
) -> None:
    (a,) = tools.prompts(4)
    with model.trace() as tracer:
        with tracer.invoke():
            model.transformer.h[0].output *= 2
        with tracer.invoke(a):
            model.transformer.h[0].output[:, -1] += 1
            hidden = model.transformer.h[1].output.save()

    def change(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([value[:, :-1], value[:, -1:] + 1], 1) * 2

    expected = tools.plain(module, a[None], edits={("transformer.h.0", "output"): change})
    assert tools.difference(hidden.value, expected["transformer.h.1", "output"]) is None


@pytest.mark.parametrize("whole_first", [True, False])
def test_edits_of_the_whole_batch_follow_those_of_one_prompt(
    whole_first: bool, module: Any, model: Any, tools: Any
) -> None:
    a, b = tools.prompts(3, 6)
    saved = []
    with model.trace() as tracer:

        def whole() -> None:
            with tracer.invoke():
                model.transformer.h[0].output *= 2

        if whole_first:
            whole()
        for i, prompt in enumerate((a, b)):
            with tracer.invoke(prompt):
                if i == 0:
                    model.transformer.h[0].output[:, -1] += 1
                saved.append(model.transformer.h[1].output.save())
        if not whole_first:
            whole()

    def change(i: int) -> Any:
        def function(value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            if i == 0:
                value[:, -1] += 1
            return value * 2

        return function

    for i, prompt in enumerate((a, b)):
        expected = tools.plain(
            module, prompt[None], edits={("transformer.h.0", "output"): change(i)}
        )
        assert tools.difference(saved[i].value, expected["transformer.h.1", "output"]) is None


def test_the_whole_batch_is_refused_where_prompts_run_apart(model: Any, tools: Any) -> None:
    a, b = tools.prompts(3, 6)
    with pytest.raises(BlockError, match=r"the whole batch was used here.*it takes 2 passes"):
        with model.trace() as tracer:
            with tracer.invoke(a):
                late = model.transformer.h[2].output[:, -1]
            with tracer.invoke(b):
                model.transformer.h[0].output[:, -1] = late
            with tracer.invoke():
                model.transformer.h[1].output.save()


def test_the_forwards_own_output_by_prompt_and_of_the_batch(
    module: Any, model: Any, tools: Any
) -> None:
    a, b = tools.prompts(3, 6)
    with model.trace() as tracer:
        with tracer.invoke(a):
            own = tracer.output.logits.save()
        with tracer.invoke(b):
            pass
        whole = tracer.output.logits.save()
    with torch.no_grad():
        assert tools.difference(own.value, module(a[None]).logits) is None
        assert tools.difference(whole.value[1:], module(b[None]).logits) is None
    assert whole.shape == (2, 6, tools.vocabulary)
    assert tools.difference(tracer.output.logits, whole.value) is None


def test_the_output_that_was_not_asked_for_says_how(model: Any, tools: Any) -> None:
    (a,) = tools.prompts(3)
    with model.trace(a) as tracer:
        model.transformer.h[0].output.save()
    with pytest.raises(NotRunError, match=r"`output = tracer.output.save\(\)`"):
        _ = tracer.output


# ---------------------------------------------------------------- early stop


def blocks_run(module: Any, seen: list[int]) -> list[Any]:
    return [
        block.register_forward_pre_hook(lambda *_, i=i: seen.append(i))
        for i, block in enumerate(module.transformer.h)
    ]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("transformer.h.0", [0]),
        ("transformer.h.1.ln_1", [0, 1]),
        ("transformer.wte", []),
        ("lm_head", [0, 1, 2]),
    ],
)
def test_a_trace_stops_after_the_last_needed_module(
    place: str, expected: list[int], module: Any, model: Any, tools: Any
) -> None:
    seen: list[int] = []
    counters = blocks_run(module, seen)
    with model.trace() as tracer:
        for prompt in tools.prompts(3, 5):
            with tracer.invoke(prompt):
                model.get(place).output.save()
    assert seen == expected
    seen.clear()
    with model.trace(tools.prompts(3)[0]) as tracer:
        model.get(place).output.save()
        tracer.output.save()
    assert seen == [0, 1, 2]
    for counter in counters:
        counter.remove()


def test_reads_that_nothing_needs_do_not_run_the_model(module: Any, model: Any, tools: Any) -> None:
    seen: list[int] = []
    counters = blocks_run(module, seen)
    with model.trace(tools.prompts(3)[0]):
        model.transformer.h[2].output[0].mean()
    for counter in counters:
        counter.remove()
    assert seen == []


# ---------------------------------------------------------------- across prompts


def test_two_prompts_swap_their_values_at_one_place(module: Any, model: Any, tools: Any) -> None:
    a, b = tools.prompts(4, 4)
    block = model.transformer.h[1]
    with model.trace() as tracer:
        with tracer.invoke(a):
            mine = block.output[:, -1].clone()
            first = model.lm_head.output.save()
        with tracer.invoke(b):
            theirs = block.output[:, -1].clone()  # as in torch: the view would follow the write
            block.output[:, -1] = mine
            second = model.lm_head.output.save()
        with tracer.invoke(a):
            block.output[:, -1] = theirs
            third = model.lm_head.output.save()
    place = ("transformer.h.1", "output")
    clean = {id(p): tools.plain(module, p[None]) for p in (a, b)}

    def patched(prompt: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        def change(value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            value[:, -1] = clean[id(source)][place][:, -1]
            return value

        return tools.plain(module, prompt[None], edits={place: change})["lm_head", "output"]

    assert tools.difference(first.value, clean[id(a)]["lm_head", "output"]) is None
    assert tools.difference(second.value, patched(b, a)) is None
    assert tools.difference(third.value, patched(a, b)) is None


@pytest.mark.parametrize("lengths", [(4, 4), (3, 6), (6, 3)])
def test_a_swap_in_both_directions(
    lengths: tuple[int, int], module: Any, model: Any, tools: Any
) -> None:
    a, b = tools.prompts(*lengths)
    block = model.transformer.h[1]
    rows: list[int] = []
    counter = module.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with model.trace(plan={"prefix_reuse": False}) as tracer:
        with tracer.invoke(a):
            of_a = block.output[:, -1]
        with tracer.invoke(b):
            of_b = block.output[:, -1].clone()  # as in torch: the view would follow the write
            block.output[:, -1] = of_a
            logits_b = model.lm_head.output.save()
        with tracer.invoke(a):
            block.output[:, -1] = of_b
            logits_a = model.lm_head.output.save()
    counter.remove()
    assert rows == [3]
    place = ("transformer.h.1", "output")
    clean = [tools.plain(module, p[None])[place][:, -1] for p in (a, b)]
    for prompt, source, logits in ((a, clean[1], logits_a), (b, clean[0], logits_b)):

        def change(value: torch.Tensor, source: torch.Tensor = source) -> torch.Tensor:
            return torch.cat([value[:, :-1], source[:, None]], 1)

        expected = tools.plain(module, prompt[None], edits={place: change})
        assert tools.difference(logits.value, expected["lm_head", "output"]) is None


@pytest.mark.parametrize("source_first", [True, False])
def test_a_later_value_of_another_prompt_makes_a_second_pass(
    source_first: bool, module: Any, model: Any, tools: Any
) -> None:
    a, b = tools.prompts(5, 3)
    rows: list[int] = []
    counter = module.register_forward_pre_hook(lambda *_: rows.append(1))
    h = model.transformer.h
    with model.trace() as tracer:
        with tracer.invoke(a):
            late = h[2].output[:, -1]
        with tracer.invoke(b):
            h[0].output[:, 0] = late
            logits = model.lm_head.output.save()
    counter.remove()
    assert len(rows) == 2
    value = tools.plain(module, a[None])["transformer.h.2", "output"][:, -1]

    def change(hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([value[:, None], hidden[:, 1:]], 1)

    expected = tools.plain(module, b[None], edits={("transformer.h.0", "output"): change})
    assert tools.difference(logits.value, expected["lm_head", "output"]) is None


def test_an_earlier_value_of_another_prompt_needs_no_second_pass(
    module: Any, model: Any, tools: Any
) -> None:
    a, b = tools.prompts(5, 3)
    rows: list[int] = []
    counter = module.register_forward_pre_hook(lambda *_: rows.append(1))
    h = model.transformer.h
    with model.trace(plan={"prefix_reuse": False}) as tracer:
        with tracer.invoke(b):
            h[2].output[:, 0] = 0  # an edit here, so that order matters
        with tracer.invoke(a):
            early = h[0].output[:, -1]
        with tracer.invoke(b):
            h[2].output[:, 0] = early
            logits = model.lm_head.output.save()
    counter.remove()
    assert len(rows) == 1
    value = tools.plain(module, a[None])["transformer.h.0", "output"][:, -1]

    def change(hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([value[:, None], hidden[:, 1:]], 1)

    expected = tools.plain(module, b[None], edits={("transformer.h.2", "output"): change})
    assert tools.difference(logits.value, expected["lm_head", "output"]) is None


def test_a_chain_of_three_waves(module: Any, model: Any, tools: Any) -> None:
    a, b, c = tools.prompts(5, 3, 4)
    h = model.transformer.h
    with model.trace() as tracer:
        with tracer.invoke(a):
            first = h[2].output[:, -1]
        with tracer.invoke(b):
            h[0].output[:, -1] = first
            second = h[2].output[:, -1]
        with tracer.invoke(c):
            h[0].output[:, -1] = second
            logits = model.lm_head.output.save()

    def last(value: torch.Tensor) -> Any:
        return lambda hidden: torch.cat([hidden[:, :-1], value[:, None]], 1)

    place, late = ("transformer.h.0", "output"), ("transformer.h.2", "output")
    one = tools.plain(module, a[None])[late][:, -1]
    two = tools.plain(module, b[None], edits={place: last(one)})[late][:, -1]
    expected = tools.plain(module, c[None], edits={place: last(two)})
    assert tools.difference(logits.value, expected["lm_head", "output"]) is None


def test_a_later_value_in_generation_comes_from_a_second_pass(
    module: Any, model: Any, tools: Any
) -> None:
    a, b = tools.prompts(5, 3)
    h = model.transformer.h
    with model.generate(max_new_tokens=2, do_sample=False, pad_token_id=0) as generator:
        with generator.invoke(b) as second:
            pass
        with generator.invoke(a) as first:
            first.next()
            late = h[2].output[:, -1]
        with generator.invoke(b) as third:
            h[0].output[:, -1] = late
    value = outputs_of(module, "transformer.h.2", a, max_new_tokens=2)[1][:, -1]

    def change(_: Any, args: Any, hidden: torch.Tensor) -> Any:
        if hidden.shape[1] == 1:
            return None
        return torch.cat([hidden[:, :-1], value[:, None]], 1)

    assert second.output.tolist() == plain_generation(module, b, max_new_tokens=2).tolist()
    handle = module.transformer.h[0].register_forward_hook(change)
    expected = plain_generation(module, b, max_new_tokens=2)
    handle.remove()
    assert third.output.tolist() == expected.tolist()
    assert generator.output[2, -2:].tolist() == expected[0, -2:].tolist()
    assert generator.output.shape == (3, 7)


@pytest.fixture
def unloaded(module: Any, tmp_path: Path) -> LanguageModel:
    """The tiny GPT-2 by folder: its weights are not loaded."""
    module.save_pretrained(tmp_path)
    return LanguageModel(str(tmp_path))


@pytest.mark.slow
def test_prompts_that_wait_for_each_other_are_refused_before_loading(
    unloaded: LanguageModel, tools: Any
) -> None:
    model: Any = unloaded
    a, b = tools.prompts(3, 4)
    h = model.transformer.h
    with pytest.raises(OrderError) as raised:
        with model.trace() as tracer:
            with tracer.invoke(a) as first:
                late_a = h[2].output[:, -1]
            with tracer.invoke(b):
                late_b = h[2].output[:, -1]
                h[0].output[:, -1] = late_a  # the line of b
            with first:
                h[0].output[:, -1] = late_b  # the line of a
    assert "wait for each other" in str(raised.value)
    assert "# the line of a" in str(raised.value)
    assert "# the line of b" in str(raised.value)
    assert not model.loaded


@pytest.mark.slow
def test_a_write_that_needs_a_later_value_is_refused_before_loading(
    unloaded: LanguageModel, tools: Any
) -> None:
    model: Any = unloaded
    with pytest.raises(OrderError) as raised:
        with model.trace(tools.prompts(3)[0]):
            late = model.transformer.h[2].output  # the later line
            model.transformer.h[0].output = late * 2  # the earlier place
    message = str(raised.value)
    assert "`transformer.h.0.output`" in message and "`transformer.h.2.output`" in message
    assert "# the later line" in message and "# the earlier place" in message
    assert not model.loaded
    with model.trace(tools.prompts(3)[0]):
        value = model.transformer.h[0].output.save()
    assert model.loaded
    assert value.shape == (1, 3, 16)


@pytest.mark.slow
def test_a_later_step_cannot_be_written_into_an_earlier_one(
    unloaded: LanguageModel, tools: Any
) -> None:
    model: Any = unloaded
    block = model.transformer.h[0]
    with pytest.raises(OrderError, match="computed later in the same forward"):
        with model.generate(max_new_tokens=3) as generator:
            with generator.invoke(tools.prompts(3)[0]) as invoker:
                early = block.output
                invoker.next()
                early[:, -1] = block.output[:, -1]
    assert not model.loaded


def test_reads_in_any_order_give_the_same_values(module: Any, model: Any, tools: Any) -> None:
    (a,) = tools.prompts(4)
    expected = tools.plain(module, a[None])
    paths = ["lm_head", "transformer.h.2", "transformer.wte", "transformer.h.0.mlp"]
    with model.trace(a):
        total = sum((model.get(path).output.mean() for path in paths), 0)
        total = total.save()
        saved = [model.get(path).output.save() for path in paths]
    for path, value in zip(paths, saved, strict=True):
        assert tools.difference(value.value, expected[path, "output"]) is None
    assert torch.allclose(total.value, sum(expected[p, "output"].mean() for p in paths))


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 4},
        {"max_length": 9},
        {"max_new_tokens": 4, "use_cache": False},
        {"max_new_tokens": 3, "num_beams": 3},
        {"max_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2},
        {"max_new_tokens": 4, "repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_generation_of_one_prompt_is_the_plain_one(
    options: dict[str, Any], module: Any, model: Any, tools: Any
) -> None:
    (a,) = tools.prompts(5)
    with model.generate(a, do_sample=False, pad_token_id=0, **options) as generator:
        inside = generator.output.save()
    expected = plain_generation(module, a, **options)
    assert generator.output.tolist() == expected.tolist()
    assert inside.value.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 9},
        {"max_new_tokens": 4, "repetition_penalty": 3.0},
        {"max_new_tokens": 6, "no_repeat_ngram_size": 1},
        {"min_length": 8, "max_new_tokens": 6, "eos_token_id": 5},
        {"max_new_tokens": 3, "num_beams": 2, "length_penalty": 2.0, "eos_token_id": 5},
    ],
    ids=str,
)
def test_options_that_see_the_padding_are_those_of_each_prompt_alone(
    options: dict[str, Any], module: Any, model: Any, tools: Any
) -> None:
    for seed in range(4):
        prompts = tools.prompts(3, 6, 3, seed=seed)
        invokers = []
        with model.generate(do_sample=False, pad_token_id=0, **options) as generator:
            for prompt in prompts:
                with generator.invoke(prompt) as invoker:
                    pass
                invokers.append(invoker)
        for prompt, invoker in zip(prompts, invokers, strict=True):
            expected = plain_generation(module, prompt, **options)
            assert invoker.output.tolist() == expected.tolist()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sampling_with_a_seed_is_the_plain_one(
    seed: int, module: Any, model: Any, tools: Any
) -> None:
    (a,) = tools.prompts(5)
    options = {"max_new_tokens": 6, "do_sample": True, "pad_token_id": 0}
    torch.manual_seed(seed)
    expected = plain_generation(module, a, **options)
    torch.manual_seed(seed)
    with model.generate(a, **options) as generator:
        model.transformer.h[0].output.save()
    assert generator.output.tolist() == expected.tolist()
    torch.manual_seed(seed)
    expected = plain_generation(module, a, num_return_sequences=3, **options)
    torch.manual_seed(seed)
    with model.generate(a, num_return_sequences=3, **options) as generator:
        hidden = model.transformer.h[0].output.save()
    assert generator.output.tolist() == expected.tolist()
    assert hidden.shape == (3, 5, 16)


@pytest.mark.parametrize("use_cache", [True, False])
def test_every_step_of_every_prompt(use_cache: bool, module: Any, model: Any, tools: Any) -> None:
    prompts = tools.prompts(3, 6)
    options = {"max_new_tokens": 4, "use_cache": use_cache}
    saved = []
    with model.generate(do_sample=False, pad_token_id=0, **options) as generator:
        for prompt in prompts:
            with generator.invoke(prompt) as invoker:
                block, head = model.transformer.h[1], model.lm_head
                steps = [(block.output.save(), head.output.save(), head.output.t[-1].save())]
                shapes = [tuple(block.output.shape)]
                invoker.next()
                steps.append((block.output.save(), head.output.save(), head.output.t[-1].save()))
                shapes.append(tuple(block.output.shape))
                invoker.next(2)
                steps.append((block.output.save(), head.output.save(), head.output.t[-1].save()))
                shapes.append(tuple(block.output.shape))
            saved.append(steps)
            assert shapes == [
                (1, len(prompt) if not step else 1 if use_cache else len(prompt) + step, 16)
                for step in (0, 1, 3)
            ]
    for prompt, steps in zip(prompts, saved, strict=True):
        blocks = outputs_of(module, "transformer.h.1", prompt, **options)
        heads = outputs_of(module, "lm_head", prompt, logits_to_keep=0, **options)
        for (hidden, logits, last), step in zip(steps, (0, 1, 3), strict=True):
            assert tools.difference(hidden.value, blocks[step]) is None
            assert tools.difference(logits.value, heads[step]) is None
            assert tools.difference(last.value, heads[step][:, -1]) is None


def test_positions_in_several_rows_of_one_invoke_at_each_step(
    module: Any, model: Any, tools: Any
) -> None:
    a, b = tools.prompts(3, 6)
    with model.generate(max_new_tokens=2, do_sample=False, pad_token_id=0) as generator:
        with generator.invoke([a.tolist(), b.tolist()]) as invoker:
            first = model.transformer.h[1].output.t[0].save()
            last = model.lm_head.output.t[-1].save()
            invoker.next()
            second = model.lm_head.output.t[-1].save()
    for i, prompt in enumerate((a, b)):
        blocks = outputs_of(module, "transformer.h.1", prompt, max_new_tokens=2)
        heads = outputs_of(module, "lm_head", prompt, max_new_tokens=2)
        assert tools.difference(first.value[i], blocks[0][0, 0]) is None
        assert tools.difference(last.value[i], heads[0][0, -1]) is None
        assert tools.difference(second.value[i], heads[1][0, -1]) is None
    assert invoker.output.shape == (2, 8)


def test_an_edit_at_a_step_changes_what_comes_from_there_on(
    module: Any, model: Any, tools: Any
) -> None:
    prompts = tools.prompts(3, 6)
    options = {"max_new_tokens": 5}
    with model.generate(do_sample=False, pad_token_id=0, **options) as generator:
        for i, prompt in enumerate(prompts):
            with generator.invoke(prompt) as invoker:
                if i == 0:
                    invoker.next(2)
                    model.lm_head.output[:, -1, 17] = 1e4
    clean = [plain_generation(module, p, **options)[0, -5:].tolist() for p in prompts]
    assert generator.output[1, -5:].tolist() == clean[1]
    changed = generator.output[0, -5:].tolist()
    assert changed[:2] == clean[0][:2]
    assert changed[2] == 17
    forced = torch.cat([prompts[0], torch.tensor(changed[:3])])
    assert changed[3:] == plain_generation(module, forced, max_new_tokens=2)[0, -2:].tolist()


@pytest.mark.parametrize("extra", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}])
def test_beams_of_each_prompt_are_its_own(
    extra: dict[str, int], module: Any, model: Any, tools: Any
) -> None:
    prompts = tools.prompts(3, 6)
    options = {"max_new_tokens": 3, **extra}
    saved, invokers = [], []
    with model.generate(do_sample=False, pad_token_id=0, **options) as generator:
        for prompt in prompts:
            with generator.invoke(prompt) as invoker:
                step = [model.transformer.h[1].output.save()]
                assert tuple(model.transformer.h[1].output.shape) == (3, len(prompt), 16)
                invoker.next()
                step.append(model.transformer.h[1].output.save())
                saved.append(step)
            invokers.append(invoker)
    each = extra.get("num_return_sequences", 1)
    assert len(generator.output) == 2 * each
    for i, prompt in enumerate(prompts):
        blocks = outputs_of(module, "transformer.h.1", prompt, **options)
        assert tools.difference(saved[i][0].value, blocks[0]) is None
        assert tools.difference(saved[i][1].value, blocks[1]) is None
        expected = plain_generation(module, prompt, **options)
        assert invokers[i].output.tolist() == expected.tolist()


def test_an_edit_of_one_prompts_beams_leaves_the_others(
    module: Any, model: Any, tools: Any
) -> None:
    prompts = tools.prompts(3, 6)
    options = {"max_new_tokens": 3, "num_beams": 3}
    invokers = []
    with model.generate(do_sample=False, pad_token_id=0, **options) as generator:
        for i, prompt in enumerate(prompts):
            with generator.invoke(prompt) as invoker:
                if i == 1:
                    invoker.next()
                    model.transformer.h[1].output[:] *= -2
            invokers.append(invoker)
    assert invokers[0].output.tolist() == plain_generation(module, prompts[0], **options).tolist()
    calls = [0]

    def change(_: Any, args: Any, output: torch.Tensor) -> Any:
        calls[0] += 1
        return output * -2 if calls[0] == 2 else None

    handle = module.transformer.h[1].register_forward_hook(change)
    expected = plain_generation(module, prompts[1], **options)
    handle.remove()
    assert invokers[1].output.tolist() == expected.tolist()


def eos_after(module: Any, prompt: torch.Tensor, steps: int, total: int) -> int:
    """The id that the prompt's greedy generation has first at that step."""
    new = plain_generation(module, prompt, max_new_tokens=total)[0, -total:].tolist()
    assert new[steps] not in new[:steps]
    return int(new[steps])


def early_end(module: Any, tools: Any) -> tuple[list[torch.Tensor], int]:
    """Two prompts and an id that ends the first after two tokens and never the second."""
    for seed in range(200):
        prompts = tools.prompts(3, 6, seed=seed)
        rows = [plain_generation(module, p, max_new_tokens=5)[0, -5:].tolist() for p in prompts]
        end = rows[0][1]
        if end != rows[0][0] and end not in rows[1]:
            return prompts, end
    raise AssertionError("no such prompts")


def test_a_step_after_one_prompts_end_is_an_error_for_that_value_alone(
    module: Any, model: Any, tools: Any
) -> None:
    prompts, end = early_end(module, tools)
    options = {"max_new_tokens": 5, "eos_token_id": end}
    saved, invokers = [], []
    with model.generate(do_sample=False, pad_token_id=0, **options) as generator:
        for prompt in prompts:
            with generator.invoke(prompt) as invoker:
                steps = [model.transformer.h[1].output.save()]
                for _ in range(4):
                    invoker.next()
                    steps.append(model.transformer.h[1].output.save())
            saved.append(steps)
            invokers.append(invoker)
    expected = [outputs_of(module, "transformer.h.1", p, **options) for p in prompts]
    assert [len(e) for e in expected] == [2, 5]
    for steps, values in zip(saved, expected, strict=True):
        for step, value in zip(steps, values, strict=False):
            assert tools.difference(step.value, value) is None
    for step in saved[0][2:]:
        with pytest.raises(StepError, match="generation ended before"):
            _ = step.value
    for prompt, invoker in zip(prompts, invokers, strict=True):
        assert invoker.output.tolist() == plain_generation(module, prompt, **options).tolist()


def test_steps_after_the_beam_search_of_one_prompt_is_done(
    module: Any, model: Any, tools: Any
) -> None:
    options = {"max_new_tokens": 5, "num_beams": 2}
    for seed in range(5):
        prompts = tools.prompts(3, 6, seed=seed)
        end = int(plain_generation(module, prompts[0], **options)[0, 4])
        saved = []
        with model.generate(
            do_sample=False, pad_token_id=0, eos_token_id=end, **options
        ) as generator:
            for prompt in prompts:
                with generator.invoke(prompt) as invoker:
                    steps = [model.transformer.h[1].output.save()]
                    for _ in range(4):
                        invoker.next()
                        steps.append(model.transformer.h[1].output.save())
                saved.append(steps)
        for prompt, steps in zip(prompts, saved, strict=True):
            expected = outputs_of(module, "transformer.h.1", prompt, eos_token_id=end, **options)
            for step, value in zip(steps, expected, strict=False):
                assert tools.difference(step.value, value) is None
            for step in steps[len(expected) :]:
                with pytest.raises(StepError):
                    _ = step.value


def test_a_write_after_one_prompts_end_changes_nothing(module: Any, model: Any, tools: Any) -> None:
    prompts, end = early_end(module, tools)
    options = {"max_new_tokens": 5, "eos_token_id": end}
    with model.generate(do_sample=False, pad_token_id=0, **options) as generator:
        with generator.invoke(prompts[0]) as first:
            first.next(3)
            model.transformer.h[1].output[:] = 0
        with generator.invoke(prompts[1]) as second:
            kept = model.transformer.h[1].output.save()
    assert first.output.tolist() == plain_generation(module, prompts[0], **options).tolist()
    assert second.output.tolist() == plain_generation(module, prompts[1], **options).tolist()
    assert kept.shape == (1, 6, 16)


def test_a_generation_that_ends_altogether(module: Any, model: Any, tools: Any) -> None:
    (a,) = tools.prompts(4)
    end = int(plain_generation(module, a, max_new_tokens=1)[0, -1])
    with model.generate(a, max_new_tokens=5, eos_token_id=end, do_sample=False,
                        pad_token_id=0) as generator:  # fmt: skip
        first = model.transformer.h[1].output.save()
        generator.next(3)
        fourth = model.transformer.h[1].output.save()
        sum_of_both = (first + fourth).save()
    assert first.shape == (1, 4, 16)
    for value in (fourth, sum_of_both):
        with pytest.raises(StepError, match=r"step 3 .*ended before"):
            _ = value.value
    assert generator.output.shape == (1, 5)


def test_a_prompt_that_a_criterion_ends_is_ended_alone(module: Any, model: Any, tools: Any) -> None:
    prompts = tools.prompts(3, 6)
    end = int(plain_generation(module, prompts[0], max_new_tokens=5)[0, 4])

    def ends(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return ids[:, -1] == end

    criteria = transformers.StoppingCriteriaList([ends])
    options = {"max_new_tokens": 5, "stopping_criteria": criteria}
    saved = []
    with model.generate(do_sample=False, pad_token_id=0, **options) as generator:
        for prompt in prompts:
            with generator.invoke(prompt) as invoker:
                invoker.next(4)
                saved.append(model.lm_head.output.save())
    rows = [plain_generation(module, p, **options) for p in prompts]
    assert rows[0].shape[1] < 3 + 5
    with pytest.raises(StepError, match="step 4"):
        _ = saved[0].value
    assert generator.output.shape[0] == 2


def test_generation_as_a_mapping(module: Any, model: Any, tools: Any) -> None:
    prompts = tools.prompts(3, 6)
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_scores": True}
    invokers = []
    with model.generate(do_sample=False, pad_token_id=0, **options) as generator:
        for prompt in prompts:
            with generator.invoke(prompt) as invoker:
                model.transformer.h[1].output.save()
            invokers.append(invoker)
        scores = generator.output.scores[1].save()
    for i, prompt in enumerate(prompts):
        expected = plain_generation(module, prompt, **options)
        assert invokers[i].output.tolist() == expected.sequences.tolist()
        assert tools.difference(scores.value[i : i + 1], expected.scores[1]) is None
    assert generator.output.sequences.shape == (2, 9)


def test_the_result_inside_an_invoke_is_that_prompts_own(
    module: Any, model: Any, tools: Any
) -> None:
    prompts = tools.prompts(3, 6)
    own = []
    with model.generate(max_new_tokens=3, do_sample=False, pad_token_id=0) as generator:
        for prompt in prompts:
            with generator.invoke(prompt):
                own.append(generator.output.save())
    for prompt, value in zip(prompts, own, strict=True):
        expected = plain_generation(module, prompt, max_new_tokens=3)
        assert value.value.tolist() == expected.tolist()


def test_the_root_is_read_at_each_step(module: Any, model: Any, tools: Any) -> None:
    (a,) = tools.prompts(4)
    with model.generate(a, max_new_tokens=2, do_sample=False, pad_token_id=0) as generator:
        first = model.output.logits.save()
        generator.next()
        second = model.output.logits.save()
    heads = outputs_of(module, "lm_head", a, logits_to_keep=0, max_new_tokens=2)
    assert tools.difference(first.value, heads[0]) is None
    assert tools.difference(second.value, heads[1]) is None


def test_a_step_beyond_the_last_is_an_error_for_that_value(model: Any, tools: Any) -> None:
    (a,) = tools.prompts(4)
    with model.generate(a, max_new_tokens=2, pad_token_id=0) as generator:
        first = model.lm_head.output.save()
        generator.next(7)
        never = model.lm_head.output.save()
    assert first.shape == (1, 4, tools.vocabulary)
    with pytest.raises(StepError, match="step 7"):
        _ = never.value


def test_more_tokens_than_positions_are_refused(model: Any, tools: Any) -> None:
    (a,) = tools.prompts(30)
    with pytest.raises(InputError, match=r"(?s)30 tokens.*5 new ones.*32 positions"):
        with model.generate(a, max_new_tokens=5):
            model.lm_head.output.save()
    with model.generate(a, max_new_tokens=3, pad_token_id=0) as generator:
        pass
    assert generator.output.shape == (1, 33)


def test_options_that_the_model_does_not_know_are_its_own_error(model: Any, tools: Any) -> None:
    (a,) = tools.prompts(4)
    with pytest.raises(ValueError, match="no_such_option"):
        with model.generate(a, max_new_tokens=2, no_such_option=1):
            pass
    with pytest.raises(InputError, match=r"no input `use_cash`\. Did you mean `use_cache`"):
        with model.trace(a, use_cash=False):
            pass
    # A model of its own: transformers leaves its own hooks behind when it collects hidden states.
    other = LanguageModel(copy.deepcopy(model.load()))
    with other.trace(a, use_cache=False, output_hidden_states=True) as tracer:
        states = tracer.output.hidden_states.save()
    assert len(states.value) == 4


def test_next_in_a_trace_is_refused(model: Any, tools: Any) -> None:
    with pytest.raises(BlockError, match="`next\\(\\)` was called in a trace"):
        with model.trace(tools.prompts(4)[0]) as tracer:
            tracer.next()


def test_a_shared_module_does_not_shift_the_steps(tools: Any) -> None:
    module = copy.deepcopy(tools.module("gpt2"))
    module.transformer.h[2].mlp = module.transformer.h[0].mlp
    model: Any = LanguageModel(module)
    prompts = tools.prompts(3, 6)
    saved = []
    with model.generate(max_new_tokens=3, do_sample=False, pad_token_id=0) as generator:
        for prompt in prompts:
            with generator.invoke(prompt) as invoker:
                mlp = model.transformer.h[0].mlp
                again = model.transformer.h[2].mlp
                steps = [(mlp.output.save(), again.output.save())]
                invoker.next(2)
                steps.append((mlp.output.save(), again.output.save()))
            saved.append(steps)
    for prompt, steps in zip(prompts, saved, strict=True):
        values = outputs_of(module, "transformer.h.0.mlp", prompt, max_new_tokens=3)
        assert len(values) == 6
        assert tools.difference(steps[0][0].value, values[0]) is None
        assert tools.difference(steps[0][1].value, values[1]) is None
        assert tools.difference(steps[1][0].value, values[4]) is None
        assert tools.difference(steps[1][1].value, values[5]) is None


# ---------------------------------------------------------------- what is written


def test_a_wrong_shape_names_the_line_of_the_write(module: Any, model: Any, tools: Any) -> None:
    a, b = tools.prompts(3, 6)
    wrong = torch.zeros(1, 9, 16)
    for many in (False, True):
        with pytest.raises(ShapeError, match="the wrong line") as raised:
            with model.trace() as tracer:
                with tracer.invoke(a):
                    model.transformer.h[1].output = wrong  # the wrong line
                    model.lm_head.output.save()
                if many:
                    with tracer.invoke(b):
                        model.lm_head.output.save()
        assert "[1, 3, 16]" in str(raised.value) and "[1, 9, 16]" in str(raised.value)
        assert tools.hooks(module) == 0


def test_a_value_shared_by_all_prompts_is_changed_for_one_alone(tools: Any) -> None:
    """ALiBi of MPT has no batch axis, so a prompt that edits it runs apart."""
    torch.manual_seed(0)
    config = transformers.MptConfig(
        vocab_size=61, d_model=16, n_heads=4, n_layers=2, max_seq_len=32
    )
    module = transformers.MptForCausalLM(config).eval()
    model: Any = LanguageModel(module)
    a, b = tools.prompts(3, 6)
    with model.trace() as tracer:
        with tracer.invoke(a):
            bias = model.transformer.blocks[1].inputs[1]["position_bias"]
            bias[:] = bias * 2
            logits = model.lm_head.output.save()
        with tracer.invoke(b):
            other = model.lm_head.output.save()
    with torch.no_grad():
        assert tools.difference(other.value, module(b[None]).logits) is None

    def hook(_: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "position_bias": kwargs["position_bias"] * 2}

    handle = module.transformer.blocks[1].register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        expected = module(a[None]).logits
    handle.remove()
    assert tools.difference(logits.value, expected) is None


# ---------------------------------------------------------------- threads, interrupts, state


def test_two_threads_on_one_model_are_both_right(module: Any, model: Any, tools: Any) -> None:
    prompts = tools.prompts(3, 6, 4, 5)
    expected = [tools.plain(module, p[None])["transformer.h.2", "output"] for p in prompts]
    problems: list[Any] = []

    def work(i: int) -> None:
        try:
            for _ in range(15):
                with model.trace(prompts[i]):
                    model.transformer.h[0].output[:] += 0 * i
                    value = model.transformer.h[2].output.save()
                if found := tools.difference(value.value, expected[i]):
                    problems.append(found)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert tools.hooks(module) == 0


def test_a_plain_forward_of_another_thread_does_not_enter_a_run(
    module: Any, model: Any, tools: Any
) -> None:
    a, b = tools.prompts(3, 6)
    expected = tools.plain(module, a[None])["lm_head", "output"]
    plain: list[torch.Tensor] = []

    def other() -> None:
        with torch.no_grad():
            plain.append(module(b[None]).logits)

    def meanwhile(value: torch.Tensor) -> torch.Tensor:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return value * 2

    with model.trace(a):
        model.transformer.h[0].output = graftwork.apply(meanwhile, model.transformer.h[0].output)
        model.transformer.h[1].output[:] = model.transformer.h[1].output / 2
        logits = model.lm_head.output.save()
    clean = tools.plain(module, b[None])["lm_head", "output"]
    assert tools.difference(plain[0], clean) is None

    edits = {
        ("transformer.h.0", "output"): lambda v: v * 2,
        ("transformer.h.1", "output"): lambda v: v / 2,
    }
    edited = tools.plain(module, a[None], edits=edits)["lm_head", "output"]
    assert tools.difference(logits.value, edited) is None
    assert tools.difference(logits.value, expected) is not None


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Boom, SystemExit])
@pytest.mark.parametrize("where", ["apply", "forward", "generate"])
def test_an_interrupted_run_leaves_no_hooks(
    error: type[BaseException], where: str, module: Any, model: Any, tools: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    a, b = tools.prompts(3, 6)

    def raises(*args: Any, **kwargs: Any) -> Any:
        raise error("stop")

    with monkeypatch.context() as patch:
        if where == "forward":
            patch.setattr(module.transformer.h[1].mlp, "forward", raises)
        block = model.generate(max_new_tokens=2) if where == "generate" else model.trace()
        with pytest.raises(error):
            with block as tracer:
                for prompt in (a, b):
                    with tracer.invoke(prompt):
                        model.transformer.h[0].output[:] += 1
                        if where != "forward":
                            graftwork.apply(raises, model.transformer.h[1].output).save()
                        unfinished = model.transformer.h[2].output.save()
    assert tools.hooks(module) == 0
    with pytest.raises(NotRunError, match="the run failed before"):
        _ = unfinished.value
    with model.trace(a):
        value = model.lm_head.output.save()
    expected = tools.plain(module, a[None])["lm_head", "output"]
    assert tools.difference(value.value, expected) is None


def test_a_block_left_by_an_exception_runs_nothing(module: Any, model: Any, tools: Any) -> None:
    seen: list[int] = []
    counters = blocks_run(module, seen)
    with pytest.raises(Boom), model.trace(tools.prompts(3)[0]) as tracer:
        value = model.transformer.h[0].output.save()
        raise Boom
    for counter in counters:
        counter.remove()
    assert seen == []
    with pytest.raises(NotRunError, match="left by an exception"):
        _ = value.value
    with pytest.raises(NotRunError, match="left by an exception"):
        _ = tracer.output


def test_no_autograd_graph_without_need(module: Any, model: Any, tools: Any) -> None:
    (a,) = tools.prompts(4)
    before = [p.requires_grad for p in module.parameters()]
    with model.trace(a):
        clean = model.lm_head.output.save()
    assert not clean.value.requires_grad
    vector = torch.zeros(16, requires_grad=True)
    with model.trace(a):
        model.transformer.h[0].output[:] += vector
        logits = model.lm_head.output.save()
    assert logits.value.requires_grad
    logits.value.sum().backward()
    assert vector.grad is not None and vector.grad.abs().sum() > 0
    module.zero_grad()
    assert [p.requires_grad for p in module.parameters()] == before
    assert tools.difference(logits.value.detach(), clean.value) is None


def test_training_mode_stays_as_it_was(module: Any, model: Any, tools: Any) -> None:
    a, b = tools.prompts(3, 6)
    module.train()
    try:
        with model.trace() as tracer:
            for prompt in (a, b):
                with tracer.invoke(prompt):
                    model.transformer.h[0].output.save()
        assert module.training
        assert all(child.training for child in module.modules())
    finally:
        module.eval()


def test_measuring_touches_no_mode_of_any_module(tools: Any) -> None:
    module = copy.deepcopy(tools.module("gpt2"))
    module.transformer.h[1].train()
    modes = [child.training for child in module.modules()]
    weights = [p.clone() for p in module.parameters()]
    model = LanguageModel(module)
    model.schedule()
    assert [child.training for child in module.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(weights, module.parameters(), strict=True))
    assert tools.hooks(module) == 0


# ---------------------------------------------------------------- what is refused at its line


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_new_toknes": 3}, r"no option `max_new_toknes`\. Did you mean `max_new_tokens`"),
        ({"max_new_tokens": "a"}, r"`max_new_tokens='a'`: it is a whole number, 1 or more"),
        ({"max_new_tokens": -2}, r"`max_new_tokens=-2`: it is a whole number"),
        ({"max_new_tokens": 2.5}, r"`max_new_tokens=2\.5`: it is a whole number"),
        ({"max_new_tokens": True}, r"`max_new_tokens=True`: it is a whole number"),
        ({"num_beams": 0}, r"`num_beams=0`: it is a whole number, 1 or more"),
    ],
)
def test_options_of_a_generation_are_checked_at_their_line(
    model: Any, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        model.generate(**options)
    with pytest.raises(InputError, match=sentence):
        model.generate([3, 4], **options)


def test_options_that_transformers_knows_are_taken(model: Any, module: Any) -> None:
    ids = torch.tensor([[5, 7, 3]])
    options = {"max_new_tokens": torch.tensor(3), "output_attentions": False, "logits_to_keep": 1}
    found = model.generate(ids, pad_token_id=0, do_sample=False, **options)[:]
    assert torch.equal(found, plain_generation(module, ids, max_new_tokens=3))


def test_an_invoke_takes_inputs_and_no_options(model: Any) -> None:
    with pytest.raises(InputError, match=r"no input `output_hidden_stats`.*`output_hidden_states`"):
        with model.trace() as tracer, tracer.invoke([3, 4], output_hidden_stats=True):
            pass
    with pytest.raises(InputError, match=r"`max_new_tokens` is an option of the whole block"):
        with model.generate() as generator, generator.invoke([3, 4], max_new_tokens=3):
            pass


def test_a_plain_call_has_an_input(model: Any) -> None:
    with pytest.raises(
        InputError, match=r"called without an input: give it one, `model\(prompt\)`"
    ):
        model()


@pytest.mark.parametrize(
    ("embeddings", "sentence"),
    [
        (
            torch.zeros(1, 4, 7),
            r"`inputs_embeds` has shape \[1, 4, 7\]; \[row, token, \d+\] is wanted",
        ),
        (torch.zeros(4, 7), r"`inputs_embeds` has shape \[1, 4, 7\]"),
        (torch.zeros(7), r"`inputs_embeds` has shape \[7\]"),
        (torch.zeros(1, 4, 16, dtype=torch.long), r"holds int64"),
    ],
)
def test_embeddings_have_the_width_of_the_model(
    model: Any, embeddings: torch.Tensor, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        model.trace(inputs_embeds=embeddings)


def test_the_whole_batch_is_not_measured_before_its_prompts(model: Any, module: Any) -> None:
    def asks(use: Any) -> None:
        with model.trace() as tracer:
            with tracer.invoke([3, 4]):
                pass
            with tracer.invoke() as whole:
                use(model.lm_head.output, whole)
            with tracer.invoke([5, 6]):
                pass

    for use in (
        lambda value, whole: value.shape,
        lambda value, whole: len(value),
        lambda value, whole: bool(value.sum() > 0),
        lambda value, whole: whole.mask,
    ):
        with pytest.raises(BlockError, match="A prompt was opened after an invoke without input"):
            asks(use)
    with model.trace() as tracer:
        with tracer.invoke():
            logits = model.lm_head.output.save()
            named = model.layers[0].resid_post.save()
        with tracer.invoke([3, 4]):
            pass
        with tracer.invoke([5, 6]):
            pass
    expected = module(torch.tensor([[3, 4], [5, 6]])).logits
    torch.testing.assert_close(logits.value, expected, rtol=1e-4, atol=1e-5)
    assert named.shape[:2] == (2, 2)
