"""What each policy computes at each point, against torch's own hooks on each prompt alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from graftwork import LanguageModel

from ..models.conftest import random_prompts
from .conftest import (
    CAUSAL,
    HEADS,
    LAYERS,
    POINTS,
    TEXT,
    close,
    fresh,
    hooked,
    module,
    numbers,
    plain,
    seen,
    size,
)

Function = Callable[[torch.Tensor], torch.Tensor]
PROMPTS = [p.tolist() for p in random_prompts(4, 6)]
PIXELS = numbers(2, 3, 8, 8, seed=5)


def rows_of(name: str) -> list[torch.Tensor]:
    """Prompts, each alone."""
    if name == "vit":
        return [PIXELS[:1], PIXELS[1:]]
    return [torch.tensor(prompt) for prompt in PROMPTS]


def logits_of(model: Any, name: str) -> list[torch.Tensor]:
    """Logits of a batch of the prompts, by prompt, [1, token, d_vocab]."""
    if name == "vit":
        with model.trace(PIXELS):
            box = model.logits.save()
        return [box.value[:1], box.value[1:]]
    found = model.get_logits(PROMPTS)
    right = name in ("bert", "roberta")  # encoders are padded on the right
    starts = [0 if right else len(found[0]) - len(prompt) for prompt in PROMPTS]
    return [
        row[None, start : start + len(prompt)]
        for row, start, prompt in zip(found, starts, PROMPTS, strict=True)
    ]


def check(model: Any, name: str, functions: dict[tuple[str, int], Function]) -> None:
    """The batch gives what each prompt gives alone with torch's hooks; and something has changed."""
    for found, inputs in zip(logits_of(model, name), rows_of(name), strict=True):
        close(found, plain(name, inputs, functions))
        assert (found - plain(name, inputs)).abs().max() > 1e-5


def add_first(param: torch.Tensor) -> Function:
    def function(x: torch.Tensor) -> torch.Tensor:
        count = min(x.shape[1], param.shape[0])
        return torch.cat([x[:, :count] + param[:count], x[:, count:]], 1)

    return function


def put(vectors: dict[int, torch.Tensor]) -> Function:
    def function(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        for token, vector in vectors.items():
            if token < x.shape[1]:
                x[:, token] = vector
        return x

    return function


def whitening(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count = torch.Size(shape).numel()
    rotate = torch.linalg.qr(numbers(count, count, seed=3)).Q
    return numbers(*shape, seed=4), rotate, numbers(count, seed=6).abs() + 0.5


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", [*TEXT, "vit"])
def test_every_policy_at_every_point(name: str, point: str) -> None:
    model, d = fresh(name), size(name, point)
    here = model.hooks[point][1]
    vector, other = numbers(*d, seed=1), numbers(*d, seed=2)
    spot = (point, 1)

    keep = (vector > 0).float()
    here["mask"].set_mask(keep)
    here["mask"].set_offset(other)
    check(model, name, {spot: lambda x: x * keep + other * (1 - keep)})
    model.hooks.reset()

    additions = numbers(5, *d, seed=7)
    here.set_actadd(additions)
    check(model, name, {spot: add_first(additions)})
    model.hooks.reset()

    here["replace"].add_token(0, vector)
    here["replace"].add_token(3, other)
    check(model, name, {spot: put({0: vector, 3: other})})
    model.hooks.reset()

    here["postbias"].set_bias(vector)
    check(model, name, {spot: lambda x: x + vector})
    model.hooks.reset()

    shift, rotate, scale = whitening(d)
    here["whiten"].set_whitening(shift, rotate, scale)
    whitened: Function = lambda x: (  # noqa: E731
        ((x + shift).flatten(2) @ rotate.T) * scale
    ).reshape(x.shape)
    check(model, name, {spot: whitened})
    model.hooks.reset()

    # Only where the configuration has no `unoffset` is an offset alone a change.
    here["offset"].set_offset(vector)
    if "unoffset" not in model.hooks.config.at(point, 1):
        check(model, name, {spot: lambda x: x + vector})
    model.hooks.reset()
    for found, inputs in zip(logits_of(model, name), rows_of(name), strict=True):
        close(found, plain(name, inputs))


@pytest.mark.parametrize("name", [*TEXT, "vit"])
def test_collect_keeps_what_is_there(name: str) -> None:
    model = fresh(name)
    model.hooks.enable_collect_hooks()
    model.hooks["mlp_pre_out"][0]["replace"].add_token(1, numbers(*size(name, "mlp_pre_out")))
    functions = {("mlp_pre_out", 0): put({1: numbers(*size(name, "mlp_pre_out"))})}
    for inputs in rows_of(name):
        if name == "vit":
            with model.trace(inputs):
                model.logits.save()
        else:
            model.get_logits(inputs)
        for point in POINTS:
            spots = [(point, layer) for layer in range(LAYERS)]
            expected = torch.stack(seen(name, inputs, spots, functions))
            close(model.hooks[point]["collect"], expected)
            close(model.hooks[point][2]["collect"].activation, expected[2])


@pytest.mark.parametrize("kind", ["step", "sigmoid", "tanh", "relu", "function"])
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_kinds_of_mask(name: str, kind: str) -> None:
    model, d = fresh(name), size(name, "mlp_pre_out")
    mask = model.hooks["mlp_pre_out"][1]["mask"]
    parameter, other = numbers(*d, seed=1), numbers(*d, seed=2)
    functions: dict[str, Function] = {
        "step": lambda p: (p > 0).float(),
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "relu": torch.relu,
        "function": lambda p: p.sin() ** 2,
    }
    mask.mask_fn = functions[kind] if kind == "function" else kind
    mask.set_mask(parameter)
    mask.set_offset(other)
    m = functions[kind](parameter)
    check(model, name, {("mlp_pre_out", 1): lambda x: x * m + other * (1 - m)})
    close(mask.mask.detach(), m)


ORDERED = ["gpt2", "opt", "llama", "gpt_neox", "gemma2", "roberta", "mistral", "vit"]


@pytest.mark.parametrize("point", ["mlp_pre_out", "attn_pre_out"])
@pytest.mark.parametrize("name", ORDERED)
def test_order_of_the_default_configuration(name: str, point: str) -> None:
    """offset, mask, replace, collect, unoffset."""
    model, d = fresh(name), size(name, point)
    o, m_off, vector = numbers(*d, seed=1), numbers(*d, seed=2), numbers(*d, seed=3)
    keep = (numbers(*d, seed=4) > 0).float()
    here = model.hooks[point][1]
    # In another order than that in which they apply.
    here["replace"].add_token(2, vector)
    here["mask"].set_offset(m_off)
    here["mask"].set_mask(keep)
    here["offset"].set_offset(o)
    here["collect"].enable()
    kept = []

    def function(x: torch.Tensor) -> torch.Tensor:
        x = (x + o) * keep + m_off * (1 - keep)
        x = put({2: vector})(x)
        kept.append(x.clone())
        return x - o

    check(model, name, {(point, 1): function})
    inputs = rows_of(name)[0]
    kept.clear()
    plain(name, inputs, {(point, 1): function})
    if name == "vit":
        with model.trace(inputs):
            model.logits.save()
    else:
        model.get_logits(inputs)
    close(here["collect"].activation, kept[0])
    assert torch.equal(here["collect"].activation[0, 2], vector)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_collect_sees_the_offset_that_is_undone(name: str) -> None:
    model = fresh(name)
    o = numbers(*size(name, "mlp_pre_out"))
    model.hooks["mlp_pre_out"][1]["offset"].set_offset(o)
    model.hooks["mlp_pre_out"][1]["collect"].enable()
    ids = torch.tensor(PROMPTS[0])
    close(model.get_logits(ids), plain(name, ids))
    (there,) = seen(name, ids, [("mlp_pre_out", 1)])
    close(model.hooks["mlp_pre_out"][1]["collect"].activation, there + o)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_masked_entirely_ends_as_its_offset_without_the_offset(name: str) -> None:
    """With o = −mean it is ablation by the mean."""
    model, d = fresh(name), size(name, "mlp_pre_out")
    mean = numbers(*d, seed=8)
    here = model.hooks["mlp_pre_out"][1]
    here["mask"].set_mask(torch.zeros(d))
    here["offset"].set_offset(-mean)
    check(model, name, {("mlp_pre_out", 1): lambda x: mean.expand_as(x)})


def test_order_of_the_configuration_is_the_order() -> None:
    model = fresh(
        "gpt2", hook_config="mlp_pre_out: postbias, replace, mask\nmlp_pre_out: 2: mask, postbias"
    )
    d = size("gpt2", "mlp_pre_out")
    bias, vector = numbers(*d, seed=1), numbers(*d, seed=2)
    keep = (numbers(*d, seed=3) > 0).float()
    for layer in (1, 2):
        here = model.hooks["mlp_pre_out"][layer]
        here["mask"].set_mask(keep)
        here["postbias"].set_bias(bias)
    model.hooks["mlp_pre_out"][1]["replace"].add_token(0, vector)
    check(
        model,
        "gpt2",
        {
            ("mlp_pre_out", 1): lambda x: put({0: vector})(x + bias) * keep,
            ("mlp_pre_out", 2): lambda x: x * keep + bias,
        },
    )
    # And after the configuration has changed.
    model.hooks.config.set("mlp_pre_out", 1, ["mask", "postbias", "replace"])
    check(
        model,
        "gpt2",
        {
            ("mlp_pre_out", 1): lambda x: put({0: vector})(x * keep + bias),
            ("mlp_pre_out", 2): lambda x: x * keep + bias,
        },
    )


@pytest.mark.parametrize("name", [*TEXT, "vit"])
def test_heads_are_seen_apart(name: str) -> None:
    model, d = fresh(name), size(name, "attn_pre_out")
    mask = model.hooks["attn_pre_out"][2]["mask"]
    assert mask.shape == d == tuple(mask.param.shape) and d[0] == HEADS
    keep = torch.ones(d)
    keep[1] = 0
    mask.set_mask(keep)
    check(model, name, {("attn_pre_out", 2): lambda x: x * keep})
    # Flat, too.
    mask.set_mask(keep.flatten())
    check(model, name, {("attn_pre_out", 2): lambda x: x * keep})


@pytest.mark.parametrize("name", [*TEXT, "vit"])
def test_layers_have_their_own(name: str) -> None:
    model, d = fresh(name), size(name, "mlp_pre_out")
    first, last = numbers(*d, seed=1), numbers(*d, seed=2)
    model.hooks["mlp_pre_out"][0]["replace"].add_token(0, first)
    model.hooks["mlp_pre_out"][-1]["replace"].add_token(1, last)
    spots: dict[tuple[str, int], Function] = {
        ("mlp_pre_out", 0): put({0: first}),
        ("mlp_pre_out", LAYERS - 1): put({1: last}),
    }
    check(model, name, spots)
    model.hooks.enable_collect_hooks(["mlp_pre_out"])
    inputs = rows_of(name)[0]
    with model.trace(inputs):
        model.logits.save()
    for layer, value in enumerate(model.hooks["mlp_pre_out"]["collect"]):
        assert torch.equal(value[0, 0], first) is (layer == 0)
        assert torch.equal(value[0, 1], last) is (layer == LAYERS - 1)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "llama", "bert"])
def test_every_row_of_a_batch(name: str) -> None:
    """OPT has the rows and tokens of its MLP in one axis."""
    model, d = fresh(name), size(name, "mlp_pre_out")
    vector = numbers(*d)
    model.hooks["mlp_pre_out"][1]["replace"].add_token(2, vector)
    ids = torch.stack(random_prompts(5, 5, 5))
    close(model.get_logits(ids), plain(name, ids, {("mlp_pre_out", 1): put({2: vector})}))
    with model.trace(ids):
        there = model.layers[1].mlp_post.save()
    assert all(torch.equal(row[2], vector) for row in there.value)
    assert not any(torch.equal(row[1], vector) for row in there.value)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_whitening_and_back(name: str) -> None:
    model, d = fresh(name), size(name, "attn_pre_out")
    model.set_hook_config("attn_pre_out: whiten, mask, collect, unwhiten")
    shift, rotate, scale = whitening(d)
    here = model.hooks["attn_pre_out"][1]
    here["whiten"].set_whitening(shift, rotate, scale)
    here["collect"].enable()
    ids = torch.tensor(PROMPTS[1])
    close(model.get_logits(ids), plain(name, ids))
    (x,) = seen(name, ids, [("attn_pre_out", 1)])
    white = ((x + shift).flatten(2) @ rotate.T * scale).reshape(x.shape)
    close(here["collect"].activation, white)
    # What is not there in the whitened space is not there afterwards.
    keep = torch.ones(d)
    keep[0] = 0
    here["mask"].set_mask(keep)

    def function(x: torch.Tensor) -> torch.Tensor:
        y = ((x + shift).flatten(2) @ rotate.T * scale).reshape(x.shape) * keep
        return ((y.flatten(2) / scale) @ rotate).reshape(x.shape) - shift

    check(model, name, {("attn_pre_out", 1): function})


def test_a_scale_of_zero_has_an_inverse() -> None:
    model = fresh("gpt2", hook_config="mlp_pre_out: whiten, unwhiten")
    count = 64
    scale = torch.ones(count)
    scale[3] = 0
    here = model.hooks["mlp_pre_out"][1]
    here["whiten"].set_whitening(torch.zeros(count), torch.eye(count), scale)
    keep = (scale > 0).float()
    check(model, "gpt2", {("mlp_pre_out", 1): lambda x: x * keep})


@pytest.mark.parametrize("name", CAUSAL)
def test_half_precision(name: str) -> None:
    import copy

    model = LanguageModel(copy.deepcopy(module(name)).bfloat16())
    d = size(name, "mlp_pre_out")
    here = model.hooks["mlp_pre_out"][1]
    vector, keep = numbers(*d, seed=1), (numbers(*d, seed=2) > 0).float()
    here["replace"].add_token(1, vector)
    here["mask"].set_mask(keep)
    here["collect"].enable()
    ids = torch.tensor(PROMPTS[1])[None]
    found = model.get_logits(ids)
    kept = []

    def function(x: torch.Tensor) -> torch.Tensor:
        x = put({1: vector.bfloat16()})(x * keep.bfloat16())
        kept.append(x.clone())
        return x

    with torch.no_grad(), hooked(name, {("mlp_pre_out", 1): function}, of=model.module_tree()):
        expected = model.module_tree()(ids).logits
    assert found.dtype == torch.bfloat16
    close(found, expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(here["collect"].activation, kept[0])


def test_double_precision() -> None:
    import copy

    model = LanguageModel(copy.deepcopy(module("llama")).double())
    vector = numbers(24, seed=1).double() / 3
    model.hooks["mlp_pre_out"][1]["replace"].add_token(1, vector)
    model.hooks["mlp_pre_out"][2]["postbias"].set_bias(vector)
    model.hooks["mlp_pre_out"][0].set_actadd(vector[None])
    ids = torch.tensor(PROMPTS[1])[None]
    functions: dict[tuple[str, int], Function] = {
        ("mlp_pre_out", 0): add_first(vector[None]),
        ("mlp_pre_out", 1): put({1: vector}),
        ("mlp_pre_out", 2): lambda x: x + vector,
    }
    with torch.no_grad(), hooked("llama", functions, of=model.module_tree()):
        expected = model.module_tree()(ids).logits
    close(model.get_logits(ids), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_int8(name: str, tmp_path: Any) -> None:
    pytest.importorskip("bitsandbytes")
    module(name).save_pretrained(tmp_path)
    model = LanguageModel(str(tmp_path), dtype="int8")
    d = size(name, "mlp_pre_out")
    vector, keep = numbers(*d, seed=1), (numbers(*size(name, "attn_pre_out"), seed=2) > 0).float()
    model.hooks["mlp_pre_out"][1]["replace"].add_token(1, vector)
    model.hooks["attn_pre_out"][1]["mask"].set_mask(keep)
    ids = torch.tensor(PROMPTS[1])[None]
    found = model.get_logits(ids)
    functions: dict[tuple[str, int], Function] = {
        ("mlp_pre_out", 1): lambda x: put({1: vector.to(x)})(x),
        ("attn_pre_out", 1): lambda x: x * keep.to(x),
    }
    with torch.no_grad(), hooked(name, functions, of=model.module_tree()):
        expected = model.module_tree()(ids).logits
    close(found.float(), expected.float(), rtol=1e-2, atol=1e-2)
