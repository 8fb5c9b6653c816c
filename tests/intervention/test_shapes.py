"""Shapes and positions that a block is told while it is written, against plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from graftwork import LanguageModel

PROMPT = "Big Ben is in the city of"
HEADS, WIDTH = 8, 128


@pytest.fixture(scope="module")
def tiny() -> Any:
    model = LanguageModel("graftwork/tiny")
    model.load()
    return model


def hooked(
    model: Any, new: int, hooks: dict[str, Callable[[torch.Tensor, int], Any]]
) -> list[torch.Tensor]:
    """Logits of each forward of a generation with plain hooks, which get what a module gives and the
    number of the forward."""
    module, seen = model.load(), []
    step = -1

    def begins(*_: Any) -> None:
        nonlocal step
        step += 1

    handles = [module.register_forward_pre_hook(begins)]
    handles.append(module.lm_head.register_forward_hook(lambda _m, _a, out: seen.append(out)))
    for path, change in hooks.items():
        handles.append(
            module.get_submodule(path).register_forward_hook(
                lambda _m, _a, out, change=change: change(out, step)
            )
        )
    ids = torch.tensor([model.tokenizer(PROMPT)["input_ids"]])
    try:
        with torch.no_grad():
            module.generate(ids, max_new_tokens=new, do_sample=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize("steps", [range(1, 3), range(3)], ids=["iter", "all"])
def test_tokens_after_a_write_in_the_same_loop(tiny: Any, steps: range) -> None:
    queries: list[torch.Tensor] = []

    def scaled(out: torch.Tensor, step: int) -> None:
        if step in steps:
            out *= 1.5

    def read(out: torch.Tensor, step: int) -> None:
        if step in steps:
            queries.append(out[:, -1, :WIDTH].unflatten(-1, (HEADS, -1)).clone())

    def silent(out: torch.Tensor, step: int) -> None:
        if step in steps:
            out[:, -1] = 0

    logits = hooked(
        tiny,
        3,
        {
            "transformer.h.0.mlp": scaled,
            "transformer.h.2.attn.c_attn": read,
            "transformer.h.2.mlp.act": silent,
        },
    )
    with tiny.generate(PROMPT, max_new_tokens=3) as generator:
        with generator.iter[1:3] if len(steps) == 2 else generator.all():
            tiny.layers[0].mlp_out[:] *= 1.5
            found = tiny.layers[2].q.t[-1].save()
            tiny.layers[2].mlp_post.t[-1] = 0
            given = tiny.logits.save()
    assert [tuple(one.shape) for one in found.value] == [(1, HEADS, WIDTH // HEADS)] * len(steps)
    torch.testing.assert_close(found.value, queries)
    last = [one[:, -1:] for one in given.value]
    torch.testing.assert_close(last, [logits[step] for step in steps])
