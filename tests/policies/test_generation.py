"""Policies over the steps of a generation: each prompt's own tokens are counted, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ..models.conftest import random_prompts
from .conftest import CAUSAL, close, fresh, hooked, module, numbers, size

SHORT, LONG = random_prompts(3, 6)
POINT = "mlp_pre_out"


class Steps:
    """Functions of single tokens, as hooks of a generation of one prompt: it counts what has come."""

    def __init__(self, change: Callable[[torch.Tensor, int], torch.Tensor], cached: bool) -> None:
        self.change = change
        self.cached = cached
        self.seen = 0
        self.kept: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self.cached:
            self.seen = 0
        x = x.clone()
        for column in range(x.shape[1]):
            x[:, column] = self.change(x[:, column], self.seen + column)
        self.seen += x.shape[1]
        self.kept.append(x.clone())
        return x


def expected(
    name: str, ids: torch.Tensor, change: Callable[..., Any], new: int = 5, **options: Any
) -> tuple[torch.Tensor, Steps]:
    """Transformers' own generation with torch's hooks, [row, token]."""
    steps = Steps(change, options.get("use_cache", True))
    ids = ids[None]
    with torch.no_grad(), hooked(name, {(POINT, 1): steps}, options.get("num_beams", 1)):
        found = module(name).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    return found, steps


def replaced(vectors: dict[int, torch.Tensor]) -> Callable[..., Any]:
    return lambda x, token: vectors[token].expand_as(x) if token in vectors else x


def vectors_of(name: str, *tokens: int) -> dict[int, torch.Tensor]:
    return {token: 3 * numbers(*size(name, POINT), seed=token) for token in tokens}


def set_up(model: Any, vectors: dict[int, torch.Tensor]) -> Any:
    policy = model.hooks[POINT][1]["replace"]
    for token, vector in vectors.items():
        policy.add_token(token, vector)
    return policy


@pytest.mark.parametrize("name", CAUSAL)
def test_prompts_of_a_batch_have_their_own_tokens(name: str) -> None:
    """Tokens of prompts and of what is generated; the shorter prompt is padded."""
    model, vectors = fresh(name), vectors_of(name, 0, 2, 4, 7)
    set_up(model, vectors)
    with model.generate(max_new_tokens=5) as generator:
        with generator.invoke(SHORT) as first:
            pass
        with generator.invoke(LONG) as second:
            pass
    for invoke, ids in ((first, SHORT), (second, LONG)):
        tokens, _ = expected(name, ids, replaced(vectors))
        assert torch.equal(invoke.output, tokens)


def test_it_makes_a_difference() -> None:
    for name in CAUSAL:
        vectors = vectors_of(name, 0, 2, 4, 7)
        if not torch.equal(
            expected(name, LONG, replaced(vectors))[0], expected(name, LONG, replaced({}))[0]
        ):
            return
    raise AssertionError("no replacement has changed a token")


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_rows_of_one_prompt_have_their_own_tokens(name: str) -> None:
    model, vectors = fresh(name), vectors_of(name, 0, 2, 4, 7)
    set_up(model, vectors)
    with model.generate([SHORT.tolist(), LONG.tolist()], max_new_tokens=5) as generator:
        pass
    for row, ids in zip(generator.output, (SHORT, LONG), strict=True):
        tokens, _ = expected(name, ids, replaced(vectors))
        assert torch.equal(row[-tokens.shape[1] :], tokens[0])


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "llama"])
def test_additions_over_steps(name: str) -> None:
    model = fresh(name)
    additions = 3 * numbers(8, *size(name, POINT))
    model.hooks[POINT][1].set_actadd(additions)
    with model.generate(SHORT, max_new_tokens=7) as generator:
        pass
    tokens, _ = expected(
        name, SHORT, lambda x, token: x + additions[token] if token < 8 else x, new=7
    )
    assert torch.equal(generator.output, tokens)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_beams(name: str) -> None:
    model, vectors = fresh(name), vectors_of(name, 0, 3, 6)
    set_up(model, vectors)
    with model.generate(LONG, max_new_tokens=4, num_beams=3) as generator:
        pass
    tokens, _ = expected(name, LONG, replaced(vectors), new=4, num_beams=3)
    assert torch.equal(generator.output, tokens)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_beams_of_several_prompts(name: str) -> None:
    model, vectors = fresh(name), vectors_of(name, 0, 3, 6)
    set_up(model, vectors)
    with model.generate(max_new_tokens=4, num_beams=3) as generator:
        with generator.invoke(SHORT) as first:
            pass
        with generator.invoke(LONG) as second:
            pass
    for invoke, ids in ((first, SHORT), (second, LONG)):
        tokens, _ = expected(name, ids, replaced(vectors), new=4, num_beams=3)
        assert torch.equal(invoke.output, tokens)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_without_a_cache_every_step_has_all_tokens(name: str) -> None:
    model, vectors = fresh(name), vectors_of(name, 1, 4, 7)
    set_up(model, vectors)
    with model.generate(max_new_tokens=5, use_cache=False) as generator:
        with generator.invoke(SHORT) as first:
            pass
        with generator.invoke(LONG) as second:
            pass
    for invoke, ids in ((first, SHORT), (second, LONG)):
        tokens, _ = expected(name, ids, replaced(vectors), use_cache=False)
        assert torch.equal(invoke.output, tokens)


# -------------------------------------------------------------------- collecting


@pytest.mark.parametrize("name", CAUSAL)
def test_collect_joins_steps(name: str) -> None:
    model, vectors = fresh(name), vectors_of(name, 1, 7)
    set_up(model, vectors)
    collect = model.hooks[POINT][1]["collect"]
    collect.enable(concat=True)
    with model.generate(LONG, max_new_tokens=4):
        pass
    _, steps = expected(name, LONG, replaced(vectors), new=4)
    close(collect.activation, torch.cat(steps.kept, 1))
    collect.enable()
    with model.generate(LONG, max_new_tokens=4):
        pass
    close(collect.activation, steps.kept[-1])


def test_collect_of_several_prompts_is_by_prompt() -> None:
    model = fresh("llama")
    model.hooks.enable_collect_hooks([POINT], [1], concat=True)
    collect = model.hooks[POINT][1]["collect"]
    with model.generate(max_new_tokens=3) as generator:
        with generator.invoke(SHORT):
            pass
        with generator.invoke(LONG):
            pass
    for found, ids in zip(collect.activation, (SHORT, LONG), strict=True):
        _, steps = expected("llama", ids, replaced({}), new=3)
        close(found, torch.cat(steps.kept, 1))
    # Of a trace, too, where they are padded.
    with model.trace() as tracer:
        with tracer.invoke(SHORT):
            pass
        with tracer.invoke(LONG):
            pass
    assert [one.shape[1] for one in collect.activation] == [3, 6]
    assert isinstance(model.hooks[POINT]["collect"], list)


def test_collect_keeps_the_last_block_alone() -> None:
    model = fresh("gpt2")
    model.hooks.enable_collect_hooks([POINT])
    model.get_logits(SHORT)
    model.get_logits(LONG)
    assert model.hooks[POINT]["collect"].shape == (3, 1, 6, 64)
    model.hooks.disable_all_collect_hooks()
    kept = model.hooks[POINT]["collect"].clone()
    model.get_logits(SHORT)
    assert torch.equal(model.hooks[POINT]["collect"], kept)
    model.hooks[POINT][0]["collect"].reset()
    assert model.hooks[POINT][0]["collect"].activation is None
    assert model.hooks[POINT]["collect"].shape[0] == 2


# -------------------------------------------------------------------- counting on


def test_each_block_counts_from_its_first_token() -> None:
    model, vectors = fresh("gpt2"), vectors_of("gpt2", 1)
    policy = set_up(model, vectors)
    first, second = model.get_logits(LONG), model.get_logits(LONG)
    assert torch.equal(first, second) and policy.tokens_seen == 0


def test_without_autorestart_the_count_goes_on() -> None:
    model, d = fresh("gpt2"), size("gpt2", POINT)
    additions = numbers(20, *d)
    policy = model.hooks[POINT][1]["actadd"]
    policy.set_actadd(additions)
    policy.autorestart = False
    for block in range(3):
        found = model.get_logits(LONG)
        from .conftest import plain

        part = additions[6 * block : 6 * block + 6]
        padded = torch.cat([part, torch.zeros(6 - len(part), *d)])
        close(found, plain("gpt2", LONG, {(POINT, 1): lambda x, p=padded: x + p}))
        assert policy.tokens_seen == 6 * (block + 1)
    policy.restart()
    assert policy.tokens_seen == 0
    close(
        model.get_logits(LONG),
        plain("gpt2", LONG, {(POINT, 1): lambda x: x + additions[:6]}),
    )
    policy.tokens_seen = 4
    close(
        model.get_logits(SHORT),
        plain("gpt2", SHORT, {(POINT, 1): lambda x: x + additions[4:7]}),
    )
    assert policy.tokens_seen == 7


def test_without_autorestart_replacements_are_of_later_blocks() -> None:
    model = fresh("llama")
    policy = set_up(model, vectors_of("llama", 1, 7))
    policy.autorestart = False
    model.hooks[POINT][1]["collect"].enable()
    there = []
    for _ in range(3):
        model.get_logits(SHORT)
        there.append(model.hooks[POINT][1]["collect"].activation[0])
    same = [
        [
            t
            for t in range(3)
            if torch.equal(one[t], vectors_of("llama", 1 + 6 * (b // 2))[1 + 6 * (b // 2)])
        ]
        for b, one in enumerate(there)
    ]
    assert same == [[1], [], [1]]  # numbers 1 and, in the third block, 7


def test_without_autorestart_a_generation_counts_prompt_and_steps() -> None:
    model = fresh("gpt2")
    policy = set_up(model, vectors_of("gpt2", 50))
    policy.autorestart = False
    with model.generate(LONG, max_new_tokens=4):
        pass
    assert policy.tokens_seen == 6 + 3  # the last token is not fed to the model
    with model.generate(max_new_tokens=2) as generator:
        with generator.invoke(SHORT):
            pass
        with generator.invoke(LONG):
            pass
    assert policy.tokens_seen == 9 + 6 + 1
    with pytest.raises(ZeroDivisionError):
        with model.trace(LONG):
            raise ZeroDivisionError
    assert policy.tokens_seen == 16
    policy.autorestart = True
    model.get_logits(LONG)
    assert policy.tokens_seen == 0


@pytest.mark.parametrize("name", CAUSAL)
def test_text(name: str) -> None:
    model = fresh(name)
    ids = model.tokenizer("w3 w9 w5", return_tensors="pt")["input_ids"]
    tokens, _ = expected(name, ids[0], replaced({}), new=6)
    assert model.generate("w3 w9 w5", num=6) == model.tokenizer.decode(
        tokens[0], skip_special_tokens=True
    )


def test_texts() -> None:
    model = fresh("llama")
    alone = [model.generate(text, num=4) for text in ("w3 w9 w5", "w7")]
    assert model.generate(["w3 w9 w5", "w7"], num=4) == alone
    assert model.generate("w3 w9 w5", "w7", num=4) == alone
    assert model.generate(["w7"], num=4) == alone[1]
    # What was asked of the policies holds here, too.
    set_up(model, {0: torch.full((24,), 50.0)})
    changed = model.generate("w3 w9 w5", num=4)
    ids = model.tokenizer("w3 w9 w5", return_tensors="pt")["input_ids"][0]
    tokens, _ = expected("llama", ids, replaced({0: torch.full((24,), 50.0)}), new=4)
    assert changed == model.tokenizer.decode(tokens[0], skip_special_tokens=True)
