"""Passes run one after the other: in halves where the memory does not hold them, no further than they
must, and under the settings that the block was given."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import graftwork.engines.execution
from graftwork import LanguageModel
from graftwork.intervention import Settings
from graftwork.intervention.plan import settings_of
from graftwork.tracing.errors import InputError


@pytest.fixture
def module(tools: Any) -> Any:
    return copy.deepcopy(tools.module("gpt2"))


@pytest.fixture
def model(module: Any) -> LanguageModel:
    return LanguageModel(module)


ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
    "python": MemoryError(),
}


@contextmanager
def little_memory(
    module: Any, rows: int, path: str = "transformer.h.1.mlp", error: str = "cpu"
) -> Iterator[list[int]]:
    """A module that does not take more than `rows` rows. Gives the rows of all its forwards."""
    place, seen = module.get_submodule(path), []

    def refuse(_: Any, args: Any) -> None:
        seen.append(args[0].shape[0])
        if args[0].shape[0] > rows:
            raise ERRORS[error]

    handle = place.register_forward_pre_hook(refuse)
    try:
        yield seen
    finally:
        handle.remove()


def expected_logits(tools: Any, module: Any, prompt: torch.Tensor, edits: Any = None) -> Any:
    return tools.plain(module, prompt[None], edits=edits)["lm_head", "output"]


# ---------------------------------------------------------------- out of memory


@pytest.mark.parametrize("error", list(ERRORS))
def test_batch_that_does_not_fit_runs_in_halves(
    error: str, module: Any, model: Any, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ids, saved = tools.prompts(5, 6, 5, 6, 5), []
    with caplog.at_level(logging.WARNING, "graftwork"):
        with little_memory(module, 3, error=error) as rows:
            with model.trace() as tracer:
                for prompt in ids:
                    with tracer.invoke(prompt):
                        model.transformer.h[0].output[:, 1] *= 2
                        saved.append(model.lm_head.output.save())
    assert rows == [5, 2, 3]
    assert len([r for r in caplog.records if "did not fit" in r.getMessage()]) == 1

    def double(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, 1] *= 2
        return value

    for prompt, value in zip(ids, saved, strict=True):
        logits = expected_logits(tools, module, prompt, {("transformer.h.0", "output"): double})
        assert tools.difference(value.value, logits) is None
    assert tools.hooks(module) == 0


def test_halves_are_halved_again(module: Any, model: Any, tools: Any) -> None:
    ids, saved = tools.prompts(*[4] * 9), []
    with little_memory(module, 1) as rows:
        with model.trace() as tracer:
            for prompt in ids:
                with tracer.invoke(prompt):
                    saved.append(model.transformer.h[2].output.save())
    assert rows.count(1) == 9 and max(rows) == 9
    for prompt, value in zip(ids, saved, strict=True):
        expected = tools.plain(module, prompt[None])["transformer.h.2", "output"]
        assert tools.difference(value.value, expected) is None


@pytest.mark.parametrize("path", ["transformer.h.0.mlp", "transformer.h.2.mlp"])
def test_base_pass_and_variants_run_in_halves(
    path: str, module: Any, model: Any, tools: Any
) -> None:
    ids, saved = tools.prompts(5, 5, 5, 5), []
    with little_memory(module, 2, path) as rows:
        with model.trace() as tracer:
            for prompt in ids:
                for k in (None, 0, 1):
                    with tracer.invoke(prompt):
                        if k is not None:
                            model.transformer.h[k].output[:, 2] = 0
                        first = model.transformer.h[0].output.save()
                        saved.append((prompt, k, first, model.lm_head.output.save()))
    assert max(rows) > 2 and sum(rows) > 0

    def zero(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, 2] = 0
        return value

    for prompt, k, first, logits in saved:
        edits = {} if k is None else {(f"transformer.h.{k}", "output"): zero}
        seen = tools.plain(module, prompt[None], edits=edits)
        assert tools.difference(first.value, seen["transformer.h.0", "output"]) is None
        assert tools.difference(logits.value, seen["lm_head", "output"]) is None
    assert not any("forward" in child.__dict__ for child in module.modules())


def test_halves_run_in_the_order_of_their_uses(module: Any, model: Any, tools: Any) -> None:
    ids, saved = tools.prompts(5, 5, 5, 5), []
    with little_memory(module, 2):
        with model.trace() as tracer:
            invokes = [tracer.invoke(prompt) for prompt in ids]
            with invokes[3]:
                source = model.transformer.h[1].output
            for invoke in invokes[:3]:
                with invoke:
                    model.transformer.h[1].output[:, 0] = source[:, 0]
                    saved.append(model.lm_head.output.save())
    taken = tools.plain(module, ids[3][None])["transformer.h.1", "output"]

    def take(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, 0] = taken[:, 0]
        return value

    for prompt, value in zip(ids, saved, strict=False):
        logits = expected_logits(tools, module, prompt, {("transformer.h.1", "output"): take})
        assert tools.difference(value.value, logits) is None


def swap(model: Any, ids: list[torch.Tensor]) -> list[Any]:
    """The first and the last prompt swap values, the second and the last but one, …"""
    saved = []
    with model.trace() as tracer:
        invokes = [tracer.invoke(prompt) for prompt in ids]
        rows = []
        for invoke in invokes:
            with invoke:
                rows.append(model.transformer.h[1].output[:, 0] + 0)
        for i, invoke in enumerate(invokes):
            with invoke:
                model.transformer.h[1].output[:, 0] = rows[-1 - i]
                saved.append(model.lm_head.output.save())
    return saved


def test_prompts_that_swap_values_stay_together_in_halves(
    module: Any, model: Any, tools: Any
) -> None:
    ids = tools.prompts(5, 5, 5, 5)
    with little_memory(module, 2) as rows:
        saved = swap(model, ids)
    assert rows == [4, 2, 2]
    plain = [tools.plain(module, prompt[None])["transformer.h.1", "output"] for prompt in ids]
    for i, (prompt, value) in enumerate(zip(ids, saved, strict=True)):

        def take(mine: torch.Tensor, i: int = i) -> torch.Tensor:
            mine = mine.clone()
            mine[:, 0] = plain[-1 - i][:, 0]
            return mine

        logits = expected_logits(tools, module, prompt, {("transformer.h.1", "output"): take})
        assert tools.difference(value.value, logits) is None


def test_prompts_that_swap_values_and_do_not_fit_together_say_so(
    module: Any, model: Any, tools: Any
) -> None:
    with little_memory(module, 1):
        with pytest.raises(MemoryError, match=r"2 prompts that use each other's values"):
            swap(model, tools.prompts(5, 5))
    assert tools.hooks(module) == 0


def test_prompt_that_does_not_fit_says_how_large_it_is(module: Any, model: Any, tools: Any) -> None:
    pair = torch.stack(tools.prompts(7, 7))
    with little_memory(module, 1):
        with pytest.raises(MemoryError, match=r"2 rows of 7 tokens .* \d+ MiB"):
            with model.trace(pair):
                model.lm_head.output.save()
    assert tools.hooks(module) == 0
    with model.trace(pair[:1]):
        value = model.lm_head.output.save()
    assert tools.difference(value.value, expected_logits(tools, module, pair[0])) is None


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    module: Any, model: Any, tools: Any
) -> None:
    seen = []

    def fail(_: Any, args: Any) -> None:
        seen.append(len(args[0]))
        raise RuntimeError("something else")

    handle = module.transformer.h[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="something else"):
        with model.trace() as tracer:
            for prompt in tools.prompts(5, 5):
                with tracer.invoke(prompt):
                    model.lm_head.output.save()
    handle.remove()
    assert seen == [2]
    assert tools.hooks(module) == 0


def test_values_of_a_failed_pass_are_forgotten(module: Any, model: Any, tools: Any) -> None:
    """They had arrived before the memory was full, and arrive again in the halves."""
    ids, saved = tools.prompts(5, 5, 5, 5), []
    with little_memory(module, 2, "transformer.h.2.mlp"):
        with model.trace() as tracer:
            for prompt in ids:
                with tracer.invoke(prompt):
                    saved.append(model.transformer.h[0].output.sum().save())
                    model.lm_head.output.save()
    for prompt, value in zip(ids, saved, strict=True):
        expected = tools.plain(module, prompt[None])["transformer.h.0", "output"].sum()
        assert tools.difference(value.value, expected) is None


# ---------------------------------------------------------------- early stop


@contextmanager
def blocks_run(module: Any) -> Iterator[list[int]]:
    ran: list[int] = []
    handles = [
        block.mlp.register_forward_pre_hook(lambda _m, _a, i=i: ran.append(i))
        for i, block in enumerate(module.transformer.h)
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("prompts", [1, 3])
def test_reading_a_block_runs_no_further(
    k: int, prompts: int, module: Any, model: Any, tools: Any
) -> None:
    ids = tools.prompts(*[5] * prompts)
    with blocks_run(module) as ran:
        with model.trace() as tracer:
            for prompt in ids:
                with tracer.invoke(prompt):
                    model.transformer.h[k].output.save()
    assert ran == list(range(k + 1))


def test_all_blocks_run_if_stop_is_switched_off(module: Any, model: Any, tools: Any) -> None:
    (prompt,) = tools.prompts(5)
    with blocks_run(module) as ran:
        with model.trace(prompt, plan={"stop": False}):
            model.transformer.h[0].output.save()
    assert ran == [0, 1, 2]


def test_nothing_runs_where_nothing_is_asked_of_an_invoke(
    module: Any, model: Any, tools: Any
) -> None:
    ids = tools.prompts(5, 5)
    with blocks_run(module) as ran:
        with model.trace(plan={"micro_batches": False}) as tracer:
            with tracer.invoke(ids[0]):
                pass
            with tracer.invoke(ids[1]):
                model.transformer.h[0].output.save()
    assert ran == [0]


# ---------------------------------------------------------------- settings and progress


def test_settings_are_read_from_what_the_user_gives() -> None:
    assert settings_of(None) == settings_of(True) == Settings()
    assert settings_of(False) == Settings.naive()
    assert settings_of({"tokens": 5, "stop": False}) == Settings(tokens=5, stop=False)
    mine = Settings(memory=False)
    assert settings_of(mine) is mine


def test_unknown_switch_names_the_nearest(model: Any, tools: Any) -> None:
    with pytest.raises(InputError, match=r"no switch `micro_batch`.*micro_batches"):
        model.trace(*tools.prompts(3), plan={"micro_batch": False})
    with pytest.raises(InputError, match="not str"):
        model.trace(*tools.prompts(3), plan="fast")


@pytest.mark.parametrize("wanted", [True, False])
def test_progress_is_shown_over_long_blocks_alone(
    wanted: bool, model: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def bar(passes: Any, title: str, **options: Any) -> Any:
        seen.append((len(passes), options["disable"], options["delay"]))
        return passes

    monkeypatch.setattr(graftwork.engines.execution, "tqdm", bar)
    ids = tools.prompts(3, 4, 5)
    with model.trace(plan={"micro_batches": False, "progress": wanted}) as tracer:
        for prompt in ids:
            with tracer.invoke(prompt):
                model.transformer.h[0].output.save()
    assert seen == [(3, not wanted, 2)]
    with model.trace(ids[0]):
        model.transformer.h[0].output.save()
    assert len(seen) == 1, "one pass has no bar"
