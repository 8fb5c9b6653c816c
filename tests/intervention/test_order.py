"""Which invoke runs before which: waves, swaps, and what cannot be put in an order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graftwork import LanguageModel
from graftwork.tracing.errors import OrderError


@pytest.fixture
def model(tools: SimpleNamespace) -> LanguageModel:
    model: LanguageModel = tools.model("gpt2")
    return model


def copied(value: torch.Tensor, token: int) -> Any:
    def change(mine: torch.Tensor) -> torch.Tensor:
        mine[:, token] = value[:, token]
        return mine

    return change


PLANS = [None, False, {"prefix_reuse": False}, {"micro_batches": False}, {"tokens": 1}]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("source", ["first", "last"])
def test_value_of_a_later_place_comes_from_an_earlier_wave(
    source: str, plan: Any, model: Any, tools: SimpleNamespace
) -> None:
    module, ids = tools.module("gpt2"), tools.prompts(6, 4)
    values = {}
    with model.trace(plan=plan) as tracer:
        invokes = [tracer.invoke(prompt) for prompt in ids]
        reads, writes = invokes if source == "first" else reversed(invokes)
        with reads:
            values["late"] = model.transformer.h[3].output
        with writes:
            model.transformer.h[0].output[:, 1] = values["late"][:, 1]
            logits = model.lm_head.output.save()
    read, written = ids if source == "first" else ids[::-1]
    late = tools.plain(module, read)["transformer.h.3", "output"]
    seen = tools.plain(module, written, [(("transformer.h.0", "output"), copied(late, 1))])
    assert tools.close(logits, seen["lm_head", "output"])


@pytest.mark.parametrize("plan", PLANS)
def test_waves_follow_a_chain_of_uses(plan: Any, model: Any, tools: SimpleNamespace) -> None:
    module, ids = tools.module("gpt2"), tools.prompts(5, 7, 6, 4)
    taken: Any = None
    logits = []
    with model.trace(plan=plan) as tracer:
        for prompt in ids:
            with tracer.invoke(prompt):
                if taken is not None:
                    model.transformer.h[1].output[:, 2] = taken
                taken = model.transformer.h[3].output[:, 2]
                logits.append(model.lm_head.output.save())
    before: torch.Tensor | None = None
    for prompt, value in zip(ids, logits, strict=True):
        edits = [(("transformer.h.1", "output"), copied(before, 2))] if before is not None else []
        seen = tools.plain(module, prompt, edits)
        before = seen["transformer.h.3", "output"]
        assert tools.close(value, seen["lm_head", "output"])


def test_value_of_an_earlier_place_is_used_in_the_same_batch(
    model: Any, tools: SimpleNamespace
) -> None:
    module, ids = tools.module("gpt2"), tools.prompts(6, 6)
    with tools.batches_of(module) as batches:
        with model.trace() as tracer:
            with tracer.invoke(ids[0]):
                early = model.transformer.h[1].output
            with tracer.invoke(ids[1]):
                model.transformer.h[1].output[:] = early
                model.lm_head.output.save()
    assert batches == [(2, 6)]


@pytest.mark.parametrize("plan", PLANS)
def test_prompts_swap_values_at_one_hook_point(
    plan: Any, model: Any, tools: SimpleNamespace
) -> None:
    module, ids = tools.module("gpt2"), tools.prompts(6, 4)
    logits = []
    with model.trace(plan=plan) as tracer:
        invokes = [tracer.invoke(prompt) for prompt in ids]
        rows = []
        for invoke in invokes:
            with invoke:
                rows.append(model.transformer.h[2].output[:, 1] + 0)
        for invoke, row in zip(invokes, reversed(rows), strict=True):
            with invoke:
                model.transformer.h[2].output[:, 1] = row
                logits.append(model.lm_head.output.save())
    plain = [tools.plain(module, prompt)["transformer.h.2", "output"] for prompt in ids]
    for prompt, other, value in zip(ids, reversed(plain), logits, strict=True):
        seen = tools.plain(module, prompt, [(("transformer.h.2", "output"), copied(other, 1))])
        assert tools.close(value, seen["lm_head", "output"])


@pytest.mark.parametrize("plan", PLANS)
def test_written_and_unwritten_places_of_a_variant_may_both_be_used(
    plan: Any, model: Any, tools: SimpleNamespace
) -> None:
    """One is answered by the base pass, the other by the variant's own, which then runs first."""
    module = tools.module("gpt2")
    (prompt,) = tools.prompts(6)
    with model.trace(plan=plan) as tracer:
        for _ in range(2):
            with tracer.invoke(prompt):
                model.lm_head.output.save()
        reader, variant = tracer.invoke(prompt), tracer.invoke(prompt)
        with variant:
            early = model.transformer.wte.output
            model.transformer.h[0].output[:, 1] *= 2
            late = model.transformer.h[0].output
        with reader:
            model.transformer.wte.output[:, 3] = early[:, 3]
            model.transformer.h[0].output[:, 1] = early[:, 1] * 0 + late[:, 1]
            logits = model.lm_head.output.save()

    def double(value: torch.Tensor) -> torch.Tensor:
        value[:, 1] *= 2
        return value

    first = tools.plain(module, prompt, [(("transformer.h.0", "output"), double)])
    taken = first["transformer.h.0", "output"]
    seen = tools.plain(module, prompt, [(("transformer.h.0", "output"), copied(taken, 1))])
    assert tools.close(logits, seen["lm_head", "output"])


def test_invokes_that_wait_for_each_other_are_refused_before_the_weights_load() -> None:
    model = LanguageModel("graftwork/tiny")
    with pytest.raises(OrderError) as raised:
        with model.trace() as tracer:
            first = tracer.invoke([1, 2, 3])
            second = tracer.invoke([3, 2, 1])
            with first:
                late = model.transformer.h[-1].output
            with second:
                other = model.transformer.h[-1].output
                model.transformer.h[0].output[:] = late  # the line of the second
            with first:
                model.transformer.h[0].output[:] = other  # the line of the first
                model.lm_head.output.save()
    assert not model.loaded
    assert "# the line of the first" in str(raised.value)
    assert "# the line of the second" in str(raised.value)


def test_cycle_over_a_swap_and_a_later_place_is_refused_before_the_weights_load() -> None:
    model = LanguageModel("graftwork/tiny")
    with pytest.raises(OrderError) as raised:
        with model.trace() as tracer:
            first = tracer.invoke([1, 2, 3])
            second = tracer.invoke([3, 2, 1])
            with first:
                late = model.transformer.h[-1].output
            with second:
                same = model.transformer.h[1].output + 0
                model.transformer.h[1].output[:] = late  # needs the later
            with first:
                model.transformer.h[1].output[:] = same  # the way back
                model.lm_head.output.save()
    assert not model.loaded
    assert "# needs the later" in str(raised.value)
    assert "# the way back" in str(raised.value)


def test_later_value_of_its_own_forward_is_refused_before_the_weights_load() -> None:
    model = LanguageModel("graftwork/tiny")
    with pytest.raises(OrderError, match="computed later in the same forward") as raised:
        with model.trace([1, 2, 3]):
            late = model.transformer.h[1].output  # read here
            model.transformer.h[0].output[:] = late  # written here
            model.lm_head.output.save()
    assert not model.loaded
    assert "# written here" in str(raised.value)
