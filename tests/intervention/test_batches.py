"""Which invokes share a forward: under a budget, with little padding, at no price in values."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import graftwork.intervention.batches
import graftwork.models.base
from graftwork import LanguageModel
from graftwork.intervention.batches import PADDING, pack
from graftwork.tracing.errors import BlockError

MIXED = (3, 12, 5, 9, 3, 4, 12, 7, 1, 2, 8, 6, 3, 11, 10)


@pytest.fixture
def model(tools: SimpleNamespace) -> LanguageModel:
    model: LanguageModel = tools.model("gpt2")
    return model


@pytest.fixture
def little_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit on padding holds for batches of a few tokens, too."""
    monkeypatch.setattr(graftwork.intervention.batches, "FEW", 0, raising=False)


def real_tokens(batches: list[tuple[int, ...]], lengths: tuple[int, ...]) -> list[float]:
    """The share of padding in each batch, whose prompts are known by their lengths in order."""
    left = sorted(lengths, reverse=True)
    shares = []
    for rows, width in batches:
        own, left = sum(left[:rows]), left[rows:]
        shares.append(1 - own / (rows * width))
    return shares


# ---------------------------------------------------------------- budget, padding, order


@pytest.mark.parametrize("tokens", [1, 24, 60, None])
def test_batches_keep_to_the_budget_with_little_padding_and_right_results(
    tokens: int | None, model: Any, tools: SimpleNamespace, little_padding: None
) -> None:
    module, ids = tools.module("gpt2"), tools.prompts(*MIXED)
    saved = []
    with tools.batches_of(module) as batches:
        with model.trace(plan={"tokens": tokens}) as tracer:
            for prompt in ids:
                with tracer.invoke(prompt):
                    saved.append(model.transformer.h[1].output.save())
    if tokens is not None:
        assert all(rows * width <= tokens or rows == 1 for rows, width in batches)
    assert all(share <= PADDING for share in real_tokens(batches, MIXED))
    assert sum(rows for rows, _ in batches) == len(ids)
    if tokens == 1:
        assert len(batches) == len(ids)
    for prompt, value in zip(ids, saved, strict=True):
        assert tools.close(value, tools.plain(module, prompt)["transformer.h.1", "output"])


def test_equal_lengths_fill_the_budget(model: Any, tools: SimpleNamespace) -> None:
    module, ids = tools.module("gpt2"), tools.prompts(*[6] * 10)
    with tools.batches_of(module) as batches:
        with model.trace(plan={"tokens": 25}) as tracer:
            for prompt in ids:
                with tracer.invoke(prompt):
                    model.lm_head.output.save()
    assert batches == [(4, 6), (4, 6), (2, 6)]


def test_budget_is_chosen_from_the_free_memory(
    model: Any, tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, ids = tools.module("gpt2"), tools.prompts(*[6] * 10)

    def run() -> list[tuple[int, ...]]:
        with tools.batches_of(module) as batches:
            with model.trace() as tracer:
                for prompt in ids:
                    with tracer.invoke(prompt):
                        model.lm_head.output.save()
        return list(batches)

    assert run() == [(10, 6)]
    monkeypatch.setattr(graftwork.models.base, "free_memory", lambda device: 1 << 17)
    few = run()
    assert 1 < len(few) <= 10
    monkeypatch.setattr(graftwork.models.base, "free_memory", lambda device: 0)
    assert run() == [(1, 6)] * 10


@pytest.mark.parametrize("plan", [False, {"micro_batches": False}])
def test_without_micro_batches_each_prompt_runs_alone(
    plan: Any, model: Any, tools: SimpleNamespace
) -> None:
    module, ids = tools.module("gpt2"), tools.prompts(6, 6, 6)
    with tools.batches_of(module) as batches:
        with model.trace(plan=plan) as tracer:
            for prompt in ids:
                with tracer.invoke(prompt):
                    model.lm_head.output.save()
    assert batches == [(1, 6)] * 3


def test_pack_keeps_units_together_and_puts_long_prompts_first(little_padding: None) -> None:
    class Facts:
        def extent(self, invoke: int) -> tuple[int, int]:
            return 1, invoke

    def unit(*invokes: int) -> tuple[frozenset[int], list[int]]:
        return frozenset(invokes), list(invokes)

    units = [unit(2), unit(8, 3), unit(7), unit(6), unit(5), unit(1)]
    assert pack(units, Facts(), None) == [[8, 3, 7, 6], [5], [2, 1]]  # type: ignore[arg-type]
    assert pack(units, Facts(), 14) == [[8, 3], [7, 6], [5], [2, 1]]  # type: ignore[arg-type]
    every = pack(units, Facts(), None, padding=1.0)  # type: ignore[arg-type]
    assert every == [[8, 3, 7, 6, 5, 2, 1]]


# ---------------------------------------------------------------- what must share a forward


def test_prompts_that_use_each_others_values_stay_together(
    model: Any, tools: SimpleNamespace
) -> None:
    module, ids = tools.module("gpt2"), tools.prompts(6, 6, 6, 6)
    saved = []
    with tools.batches_of(module) as batches:
        with model.trace(plan={"tokens": 6}) as tracer:
            invokes = [tracer.invoke(prompt) for prompt in ids]
            rows = []
            for invoke in invokes:
                with invoke:
                    rows.append(model.transformer.h[1].output[:, 0] + 0)
            for i, other in enumerate((3, 2, 1, 0)):
                with invokes[i]:
                    model.transformer.h[1].output[:, 0] = rows[other]
                    saved.append(model.lm_head.output.save())
    assert batches == [(2, 6), (2, 6)]
    plain = [tools.plain(module, prompt)["transformer.h.1", "output"] for prompt in ids]
    for i, other in enumerate((3, 2, 1, 0)):

        def change(value: torch.Tensor, other: int = other) -> torch.Tensor:
            value[:, 0] = plain[other][:, 0]
            return value

        seen = tools.plain(module, ids[i], [(("transformer.h.1", "output"), change)])
        assert tools.close(saved[i], seen["lm_head", "output"])


def test_invoke_without_a_prompt_sees_all_prompts_in_one_batch(
    model: Any, tools: SimpleNamespace, little_padding: None
) -> None:
    module, ids = tools.module("gpt2"), tools.prompts(2, 12)
    with tools.batches_of(module) as batches:
        with model.trace(plan={"tokens": 1}) as tracer:
            for prompt in ids:
                with tracer.invoke(prompt):
                    model.transformer.h[0].output.save()
            with tracer.invoke():
                every = model.transformer.h[1].output.save()
    assert batches == [(2, 12)]
    assert every.shape == (2, 12, 16)


def test_invoke_without_a_prompt_needs_the_prompts_in_one_batch(
    model: Any, tools: SimpleNamespace
) -> None:
    ids = tools.prompts(4, 6)
    with pytest.raises(BlockError):
        with model.trace() as tracer:
            with tracer.invoke(ids[0]):
                late = model.transformer.h[3].output
            with tracer.invoke(ids[1]):
                model.transformer.h[0].output[:, 0] = late[:, 0]
            with tracer.invoke():
                model.transformer.h[1].output.save()


# ---------------------------------------------------------------- thousands


def tensor_bytes() -> int:
    """Bytes of all tensors that are alive."""
    found = {}
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, torch.nn.Parameter) and one.device.type == "cpu":
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("reuse", [True, False])
def test_two_thousand_invokes_run_in_bounded_memory(
    reuse: bool, model: Any, tools: SimpleNamespace
) -> None:
    module = tools.module("gpt2")
    ids = tools.prompts(*range(5, 15))
    count, effects, alive, passes = 2000, [], [], 0

    def look(_: Any, args: Any, kwargs: Any) -> None:
        nonlocal passes
        passes += 1
        if passes % 16 == 1:
            alive.append(tensor_bytes())

    model.schedule()
    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with model.trace(plan={"tokens": 150, "prefix_reuse": reuse}) as tracer:
            for i in range(count):
                with tracer.invoke(ids[i % 10]):
                    model.transformer.h[i % 4].output[:, i % 5] *= 2
                    effects.append(model.lm_head.output[:, -1, 7].save())
    finally:
        handle.remove()
    assert passes > 100
    assert max(alive) - alive[0] < 200_000, "what is alive does not grow with the passes"
    assert all(effect.value.untyped_storage().nbytes() == 4 for effect in effects)
    for i in range(0, count, 191):

        def change(value: torch.Tensor, i: int = i) -> torch.Tensor:
            value[:, i % 5] *= 2
            return value

        place = (f"transformer.h.{i % 4}", "output")
        seen = tools.plain(module, ids[i % 10], [(place, change)])
        assert tools.close(effects[i], seen["lm_head", "output"][:, -1, 7])
