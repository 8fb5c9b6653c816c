"""Shapes that do not fit are told before the weights are loaded, with torch's type and the line."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch

import graftwork
from graftwork import LanguageModel

PROMPT = "Big Ben is in the city of"  # 8 tokens, of 128 numbers each
SMALL = torch.zeros(5)

WRONG: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "matrix": (lambda h: (h @ torch.zeros(5, 5)).save(), RuntimeError, "[5, 5] float32"),
    "in place": (lambda h: h.add_(SMALL), RuntimeError, "[5] float32"),
    "written part": (lambda h: h[:, 0].copy_(SMALL), RuntimeError, "[5] float32"),
    "set": (lambda h: h.__setitem__((slice(None), 0), SMALL), RuntimeError, "[5] float32"),
    "position": (lambda h: h[:, 12].save(), IndexError, "index 12 is out of bounds"),
    "view": (lambda h: h.view(7, -1).save(), RuntimeError, "[1, 8, 128] float32"),
    "cat": (lambda h: torch.cat([h, h.sum(0)]).save(), RuntimeError, "[8, 128] float32"),
    "field": (lambda h: h.hidden_states.save(), AttributeError, "no attribute `hidden_states`"),
    "second part": (lambda h: h[1].save(), IndexError, "hidden states [1, 8, 128] alone"),
}


def lines_of(error: BaseException) -> set[int]:
    """The lines of this file that an error shows, in its frames and its message."""
    shown = "".join(traceback.format_exception(error))
    return {
        number
        for number in range(1, 200)
        if f'{__file__}", line {number},' in shown or f"{__file__}:{number}" in shown
    }


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_fit_is_told_before_the_weights_are_loaded(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = LanguageModel("graftwork/tiny")
    function, error, words = WRONG[kind]
    with pytest.raises(error) as told:
        with model.trace(PROMPT):
            function(model.transformer.h[1].output)
    assert not model.loaded
    assert words in str(told.value) and "nothing was loaded or run" in str(told.value)
    assert function.__code__.co_firstlineno in lines_of(told.value)
    assert not caplog.records  # torch's trial run keeps quiet


def test_where_the_forward_is_known_it_is_told_at_the_line() -> None:
    model: Any = LanguageModel("graftwork/tiny")
    with model.scan(PROMPT):
        pass
    with model.scan(PROMPT):
        assert model.transformer.h[0].output.shape == (1, 8, 128)
    reached = False
    with pytest.raises(RuntimeError, match=r"\[5, 5\]"):
        with model.trace(PROMPT):
            _ = model.transformer.h[1].output @ torch.zeros(5, 5)
            reached = True
    assert not reached and not model.loaded


def test_what_is_asked_for_in_the_block_is_checked_before() -> None:
    model: Any = LanguageModel("graftwork/tiny")
    with pytest.raises(RuntimeError, match=r"nothing was loaded"):
        with model.trace(PROMPT):
            (model.transformer.h[1].output @ torch.zeros(5, 5)).save()
            float(model.transformer.h[0].output.sum())
    assert not model.loaded


def test_steps_of_a_generation_have_their_own_sizes() -> None:
    model: Any = LanguageModel("graftwork/tiny")
    with pytest.raises(IndexError, match="index 2 is out of bounds for dimension 1 with size 1"):
        with model.generate(PROMPT, max_new_tokens=3) as tracer:
            with tracer.all():
                model.transformer.h[1].output[:, 2].save()
    assert not model.loaded
    with model.generate(PROMPT, max_new_tokens=2) as tracer:
        with tracer.all():
            last = model.transformer.h[1].output[:, -1].save()
            head = model.lm_head.output[0, -1].save()
    assert [one.shape for one in last.value] == [(1, 128)] * 2
    assert [one.shape for one in head.value] == [(2048,)] * 2


def test_a_function_of_the_user_is_not_run_for_it() -> None:
    model: Any = LanguageModel("graftwork/tiny")
    calls: list[torch.Tensor] = []

    def count(value: torch.Tensor) -> torch.Tensor:
        calls.append(value)
        return value.sum(0)

    with pytest.raises(RuntimeError):
        with model.trace(PROMPT):
            found = graftwork.apply(count, model.transformer.h[1].output)
            (found + SMALL).save()  # only the run knows what the function gives
    assert model.loaded and len(calls) == 1 and not calls[0].is_meta


def test_what_is_not_used_and_what_a_branch_leaves_out_runs_as_before() -> None:
    model: Any = LanguageModel("graftwork/tiny")
    with model.trace(PROMPT) as tracer:
        hidden = model.transformer.h[1].output
        _ = hidden @ torch.zeros(5, 5)
        with tracer.cond(hidden.sum().isnan()):
            (hidden @ torch.zeros(5, 5)).save()
        kept = hidden.save()
    assert kept.value.shape == (1, 8, 128)


def test_a_loaded_model_tells_it_in_the_run_with_the_same_type() -> None:
    model: Any = LanguageModel("graftwork/tiny")
    model.load()
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied") as told:
        with model.trace(PROMPT):
            (model.transformer.h[1].output @ torch.zeros(5, 5)).save()
    assert "@ torch.zeros(5, 5)).save()" in str(told.value)


def test_a_number_behind_the_hidden_states_is_named_once(
    tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = tools.model("gpt2")
    caplog.set_level(logging.WARNING, logger="graftwork")
    with model.trace([3, 4, 5]):
        for block in model.transformer.h:
            row = block.output[0][0].save()
        fine = [block.output[0][:, 0], block.output[0].t[0], block.output[0][0:1]]
        fine += [block.output[0][0, -1], block.mlp.output[0][-1]]
    assert row.value.shape == (3, 16) and len(fine) == 5
    (one,) = caplog.records
    assert "a number behind it is a row of the batch" in one.getMessage()
    assert f"{__file__}:" in one.getMessage() and "block.output[0][0].save()" in one.getMessage()
    with model.trace([3, 4, 5]):
        model.transformer.h[0].output[0][-1] = 0
    assert len(caplog.records) == 2
