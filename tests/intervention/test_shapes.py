"""Shapes and positions that a block is told while it is written, against plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from graftwork import LanguageModel
from graftwork.tracing.errors import InputError, NotRunError, ScheduleError

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


#: A tiny llama, and one whose cache keeps four tokens.
@pytest.fixture(scope="module", params=[None, 4], ids=["all", "window"])
def grouped(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=request.param,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LanguageModel(MistralForCausalLM(config).eval())


def keys_at(model: Any, tokens: int, step: int) -> int:
    """How many keys a layer sees, by transformers' own account of its cache."""
    cache = DynamicCache(config=model.config)
    for count in [tokens] + [1] * step:
        found = cache.update(torch.ones(1, 2, count, 4), torch.ones(1, 2, count, 4), 0)
    return int(found[0].shape[2])


def test_sizes_behind_a_cache_count_its_keys(grouped: Any) -> None:
    asked, found = {}, {}
    prompts = [[5, 9, 3, 22, 7], [41, 32], [[5, 9, 3, 22, 7], [41, 32]]]
    with grouped.generate(max_new_tokens=3) as generator:
        for number, prompt in enumerate(prompts):
            with generator.invoke(prompt) as invoker:
                for step in range(3):
                    block = grouped.layers[1]
                    for name in ("q", "k", "v", "pattern", "scores", "z", "resid_post"):
                        value = getattr(block, name)
                        asked[number, step, name] = tuple(value.shape)
                        found[number, step, name] = value.save()
                    if number < 2:
                        mean = (block.k.sum(1) / block.k.shape[1]).save()
                        asked[number, step, "mean"], found[number, step, "mean"] = (), mean
                    if step < 2:
                        invoker.next()
    for (number, step, name), sizes in asked.items():
        if name == "mean":
            wanted = found[number, step, "k"].value.mean(1)
            torch.testing.assert_close(found[number, step, name].value, wanted)
            continue
        assert sizes == tuple(found[number, step, name].value.shape), (number, step, name)
        if name == "k":
            tokens = len(prompts[number]) if number < 2 else 5
            assert sizes == (2 if number == 2 else 1, keys_at(grouped, tokens, step), 2, 4)


def test_sizes_of_keys_in_loops(grouped: Any) -> None:
    prompt = [5, 9, 3]
    with grouped.generate(prompt, max_new_tokens=4) as generator:
        whole = [grouped.layers[1].k.save()]
        for _ in range(3):
            generator.next()
            whole.append(grouped.layers[1].k.save())
    wanted = [one.value for one in whole]
    with grouped.generate(prompt, max_new_tokens=4) as generator:
        means, last = [], []
        for _ in generator.iter[:]:
            keys = grouped.layers[1].k
            means.append((keys.sum(1) / keys.shape[1]).save())
            last.append(keys[:, keys.shape[1] - 1].save())
    torch.testing.assert_close([one.value for one in means], [one.mean(1) for one in wanted])
    torch.testing.assert_close([one.value for one in last], [one[:, -1] for one in wanted])
    for steps in (slice(0, 4), slice(1, 4)):
        with grouped.generate(prompt, max_new_tokens=4) as generator:
            with generator.iter[steps]:
                keys = grouped.layers[1].k
                mean = (keys.sum(1) / keys.shape[1]).save()
                end = keys.t[-1].save()
                shown = grouped.layers[1].pattern[..., -1].save()
        torch.testing.assert_close(mean.value, [one.mean(1) for one in wanted[steps]])
        torch.testing.assert_close(end.value, [one[:, -1] for one in wanted[steps]])
        assert len(shown.value) == len(wanted[steps])


def test_own_tokens_of_keys_behind_a_cache(grouped: Any) -> None:
    prompts = [[5, 9, 3, 22, 7], [41, 32]]
    alone = []
    for prompt in prompts:
        with grouped.generate(prompt, max_new_tokens=2) as generator:
            generator.next()
            alone.append(grouped.layers[1].k.save())
    wanted = [one.value for one in alone]
    windowed = grouped.config.sliding_window is not None
    with grouped.generate(prompts, max_new_tokens=2) as generator:
        generator.next()
        keys = grouped.layers[1].k
        last, moved = keys.t[-1].save(), (keys * 2).t[-1].save()
        if not windowed:
            first, mean = keys.t[0].save(), keys.t.mean().save()
    torch.testing.assert_close(last.value, torch.cat([one[:, -1] for one in wanted]))
    torch.testing.assert_close(moved.value, 2 * last.value)
    if windowed:
        with pytest.raises(InputError, match=r"`\.t\[0\]`: the cache of this layer no longer"):
            with grouped.generate(prompts, max_new_tokens=2) as generator:
                generator.next()
                grouped.layers[1].k.t[0].save()
        return
    torch.testing.assert_close(first.value, torch.cat([one[:, 0] for one in wanted]))
    torch.testing.assert_close(mean.value, torch.cat([one.mean(1) for one in wanted]))


def test_sizes_without_a_cache_and_behind_the_users_own(grouped: Any) -> None:
    ids = torch.tensor([[5, 9, 3, 22, 7]])
    with grouped.generate(ids, max_new_tokens=2, use_cache=False) as generator:
        generator.next()
        assert tuple(grouped.layers[1].k.shape) == (1, 6, 2, 4)
    cache = DynamicCache(config=grouped.config)
    with torch.no_grad():
        grouped.load()(ids[:, :2], past_key_values=cache)
    with grouped.trace(ids[:, 2:], past_key_values=cache):
        keys, pattern = grouped.layers[1].k, grouped.layers[1].pattern
        assert tuple(keys.shape) == (1, 5, 2, 4) and tuple(pattern.shape) == (1, 4, 3, 5)
        keys = keys.save()
    assert tuple(keys.shape) == (1, 5, 2, 4)
    roomy = StaticCache(config=grouped.config, max_cache_len=12)
    with pytest.raises(ScheduleError, match="a cache whose room is not the tokens so far"):
        with grouped.trace(ids, past_key_values=roomy):
            _ = grouped.layers[1].k.shape


def test_sizes_of_a_decoder_behind_its_cache() -> None:
    config = T5Config(
        vocab_size=61, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, eos_token_id=None
    )
    config.decoder_start_token_id = 0
    model = LanguageModel(T5ForConditionalGeneration(config).eval())
    asked, found = {}, {}
    with model.generate([5, 9, 3, 22, 7], max_new_tokens=3) as generator:
        for step in range(3):
            for name in ("k", "pattern", "resid_post"):
                value = getattr(model.decoder_layers[1], name)
                asked[step, name], found[step, name] = tuple(value.shape), value.save()
            if step < 2:
                generator.next()
    assert [asked[step, "k"][1] for step in range(3)] == [1, 2, 3]
    assert asked == {place: tuple(value.value.shape) for place, value in found.items()}
