"""Shapes and positions that a block is told while it is written, against plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from graftwork import LanguageModel
from graftwork.tracing.errors import NotRunError

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


def test_sizes_in_a_loop_that_is_recorded_once_are_those_of_the_step(tiny: Any) -> None:
    means, heads = list[torch.Tensor](), list[torch.Tensor]()

    def change(out: torch.Tensor, step: int) -> None:
        means.append(out.sum(1) / out.shape[1])
        heads.append(out.reshape(*out.shape[:2], HEADS, -1).clone())
        part = out[:, out.shape[1] - 1]
        part += 5
        out[:, : out.shape[1] // 2] *= out.numel()

    logits = hooked(tiny, 3, {"transformer.h.1.mlp": change})
    with tiny.generate(PROMPT, max_new_tokens=3) as generator:
        with generator.all():
            hidden = tiny.layers[1].mlp_out
            assert hidden.shape[2] == hidden.size(-1) == WIDTH and len(hidden) == 1
            mean = (hidden.sum(1) / hidden.shape[1]).save()
            split = hidden.reshape(*hidden.shape[:2], HEADS, -1).save()
            tokens = hidden.size(1).save()
            part = hidden[:, hidden.shape[1] - 1]
            part += 5
            hidden[:, : hidden.shape[1] // 2] *= hidden.numel()
            keys = tiny.layers[0].pattern.shape[-1].save()
            given = tiny.logits[:, -1:].save()
    length = len(tiny.tokenizer(PROMPT)["input_ids"])
    torch.testing.assert_close(mean.value, means)
    torch.testing.assert_close(split.value, heads)
    torch.testing.assert_close(given.value, logits)
    assert tokens.value == [length, 1, 1] and keys.value == [length, length + 1, length + 2]


def test_a_size_of_the_step_that_must_be_a_number_now_is_refused(tiny: Any) -> None:
    uses: list[Callable[[Any], Any]] = [
        lambda hidden: range(hidden.shape[1]),
        lambda hidden: len(hidden[0]),
        lambda hidden: list(hidden[0]),
    ]
    for use in uses:
        with pytest.raises(NotRunError, match="step"):
            with tiny.generate(PROMPT, max_new_tokens=3) as generator:
                with generator.all():
                    use(tiny.layers[1].mlp_out)


@pytest.mark.parametrize("where", ["edit", "trace", "several"])
def test_a_part_that_a_value_of_the_block_picks_shares_memory_as_in_torch(
    tiny: Any, where: str
) -> None:
    def change(out: torch.Tensor, step: int) -> None:
        place = out[0].norm(dim=-1).argmax()
        part = out[:, place]
        part += 5
        copy = out[:, place.unsqueeze(0)]
        copy += 7
        out[:, place] *= 2
        last = out[:, out.shape[1] - 1]
        last -= 3

    def record(model: Any) -> None:
        out = model.transformer.h[1].mlp.output
        place = out[0].norm(dim=-1).argmax()
        part = out[:, place]
        part += 5
        copy = out[:, place.unsqueeze(0)]
        copy += 7
        out[:, place] *= 2
        last = out[:, out.shape[1] - 1]
        last -= 3

    expected = hooked(tiny, 1, {"transformer.h.1.mlp": change})[0]
    model = tiny
    if where == "edit":
        with tiny.edit() as model:
            record(tiny)
    with model.trace() as tracer:
        for _ in range(2 if where == "several" else 1):
            with tracer.invoke(PROMPT):
                if where != "edit":
                    record(tiny)
                logits = tiny.lm_head.output[:, -1:].save()
    torch.testing.assert_close(logits.value, expected)
