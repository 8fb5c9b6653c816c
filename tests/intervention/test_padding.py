"""Where padding is taken for tokens, the user's line is named, once; and nowhere else."""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from graftwork import LanguageModel
from graftwork.tracing.errors import PaddingWarning

RAGGED = [[3, 4, 5], [6, 7, 8, 9, 10, 11]]
SAME = [[3, 4, 5], [6, 7, 8]]


def found(
    model: LanguageModel, function: Callable[[Any], Any], prompt: Any, **how: Any
) -> list[warnings.WarningMessage]:
    """The warnings of a block that saves what a function makes of a block's hidden states."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with model.trace(prompt, **how):
            value = function(model.transformer.h[1].output[0])
            if value is not None:
                value.save()
    return seen


TAKES_PADDING: dict[str, Callable[[Any], Any]] = {
    "mean": lambda h: h.mean(1),
    "mean of all": lambda h: h.mean(),
    "of torch": lambda h: torch.mean(h, dim=1),
    "counted from the end": lambda h: h.sum(-2),
    "several axes": lambda h: h.amax((0, 1)),
    "max": lambda h: h.max(1).values,
    "norm": lambda h: h.norm(dim=1),
    "of what is computed": lambda h: (h * 2).exp().mean(1),
    "rows and tokens in one": lambda h: h.flatten(0, 1).mean(0),
    "a cumulative sum": lambda h: h.cumsum(1),
    "of the short row": lambda h: h[0].mean(0),
    "first": lambda h: h[:, 0],
    "second of a short row": lambda h: h[0, 1],
    "range": lambda h: h[:, 1:3],
    "list": lambda h: h[:, [0, 1]],
    "without the first": lambda h: h[:, 1:],
    "more than a row has": lambda h: h[:, -5:],
    "tensor": lambda h: h[:, torch.tensor([0, 2])],
    "select": lambda h: h.select(1, 0),
    "narrow": lambda h: torch.narrow(h, 1, 0, 2),
    "written": lambda h: h.__setitem__((slice(None), 0), 0.0),
    "behind an ellipsis": lambda h: h[..., 0, :],
}
TAKES_NONE: dict[str, Callable[[Any], Any]] = {
    "last": lambda h: h[:, -1],
    "last ones": lambda h: h[:, -3:],
    "without the last": lambda h: h[:, :-1],
    "all": lambda h: h[:, :],
    "features": lambda h: h.softmax(-1),
    "rows": lambda h: h.mean(0),
    "one token": lambda h: h[:, -1].mean(),
    "the long row": lambda h: h[1].mean(0),
    "the long row's first": lambda h: h[1, 0],
    "the long row as a batch": lambda h: h[1:].mean(1),
    "two tensors": lambda h: h.max(h * 2),
    "pairs": lambda h: h[[0, 1], [3, 0]],
    "own positions": lambda h: h.t[0] + h.t[-1],
    "own ranges": lambda h: h.t[1:3],
    "own mean": lambda h: h.t.mean(),
}


@pytest.mark.parametrize("kind", TAKES_PADDING)
def test_padding_that_is_taken_for_tokens_is_named(kind: str, tools: Any) -> None:
    (one,) = found(tools.model("gpt2"), TAKES_PADDING[kind], RAGGED)
    assert one.category is PaddingWarning
    assert "takes in padding: the rows have" in str(one.message)
    assert "invoker.mask" in str(one.message)
    assert one.filename == __file__


@pytest.mark.parametrize("kind", TAKES_NONE)
def test_what_takes_no_padding_is_not_named(kind: str, tools: Any) -> None:
    assert not found(tools.model("gpt2"), TAKES_NONE[kind], RAGGED)


def test_where_nothing_is_padded_nothing_is_said(tools: Any) -> None:
    model = tools.model("gpt2")
    for function in TAKES_PADDING.values():
        if function is not TAKES_PADDING["more than a row has"]:
            assert not found(model, function, SAME)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with model.trace() as tracer:  # each invoke sees its own tokens alone
            for prompt in RAGGED:
                with tracer.invoke(prompt):
                    model.transformer.h[1].output.mean(1).save()
                    model.transformer.h[1].output[:, 0].save()
    assert not seen


def test_padding_of_the_users_own_mask(tools: Any) -> None:
    model = tools.model("gpt2")
    mask = [[1, 1, 0]]
    (one,) = found(model, lambda h: h[:, -1], [3, 4, 5], attention_mask=mask)
    assert "`.t[…]` counts each row's own" in str(one.message)
    assert not found(model, lambda h: h[:, 0], [3, 4, 5], attention_mask=mask)


def test_a_line_is_named_once(tools: Any) -> None:
    model = tools.model("gpt2")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            with model.trace(RAGGED):
                for block in model.transformer.h:
                    block.output.mean(1).save()
    assert len(seen) == 1
    assert "block.output.mean(1)" in linecache.getline(__file__, seen[0].lineno)


def test_what_sees_the_whole_batch(tools: Any) -> None:
    model = tools.model("gpt2")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with model.trace() as tracer:
            for prompt in RAGGED:
                with tracer.invoke(prompt):
                    pass
            with tracer.invoke():
                model.transformer.h[1].output.mean(1).save()
                model.transformer.h[1].output.t.mean().save()
    assert len(seen) == 1


def test_attention_to_padding_and_from_it(tools: Any) -> None:
    model = LanguageModel(tools.module("gpt2"))

    def block(function: Callable[[Any], Any]) -> int:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with model.trace(RAGGED):
                function(model.layers[1].pattern).save()
        return len(seen)

    assert block(lambda pattern: pattern[..., 0]) == 1  # to a first column that is padding
    assert block(lambda pattern: pattern.mean(2)) == 1  # over queries, padding's too
    assert block(lambda pattern: pattern.sum(-1)) == 0  # padding is not attended to
    assert block(lambda pattern: pattern.t[0]) == 0


def test_steps_edits_branches_and_compiled_blocks(tools: Any) -> None:
    model = LanguageModel(tools.module("gpt2"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with model.generate(RAGGED, max_new_tokens=3) as generator:
            with generator.all() as step:
                hidden = model.transformer.h[1].output
                hidden.mean(1).save()  # the prompt's tokens are padded, one token is not
                with generator.cond(step < 1):
                    hidden[:, 0].save()
    assert len(seen) == 2
    with model.edit() as edited:
        edited_hidden = model.transformer.h[1].output
        edited_hidden += edited_hidden.mean(1, keepdim=True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with edited.trace(SAME):
            edited.lm_head.output.save()
        assert not seen
        with edited.trace(RAGGED):
            edited.lm_head.output.save()
        assert len(seen) == 1
        with model.trace(SAME) as tracer:
            model.transformer.h[1].output.mean(1).save()
        assert len(seen) == 1
        tracer.compile()(RAGGED)
        assert len(seen) == 2


def test_a_scan_says_it_too(tools: Any) -> None:
    model = tools.model("gpt2")
    with pytest.warns(PaddingWarning, match="`mean` over the tokens of `transformer.h.1.output`"):
        with model.scan(RAGGED):
            model.transformer.h[1].output.mean(1).save()
