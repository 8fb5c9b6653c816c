"""Gradients in blocks against plain hooks with torch's own autograd, one prompt at a time."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import graftwork
from graftwork import LanguageModel, Model
from graftwork.tracing.errors import (
    BlockError,
    OperationError,
    OrderError,
    ShapeError,
    StepError,
)

Place = tuple[str, str]
Loss = Callable[[torch.Tensor], torch.Tensor]


def last_logit(logits: torch.Tensor) -> Any:
    return (logits[:, -1, 3] ** 2).sum()


def autograd(
    module: nn.Module,
    ids: torch.Tensor,
    places: list[Place],
    loss: Loss = last_logit,
    edits: dict[Place, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    grad_edits: dict[Place, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    parts: dict[str, int] | None = None,
    **inputs: Any,
) -> dict[Place, torch.Tensor]:
    """The gradient at each place (path, "input" or "output"), by torch alone; parameters get theirs.

    Args:
        ids: [row, token].
        edits: of the values in the forward.
        grad_edits: of the gradients in the backward; what is given back is before the edit.
    """
    found: dict[Place, torch.Tensor] = {}
    edits, grad_edits = edits or {}, grad_edits or {}

    def watch(place: Place, value: torch.Tensor) -> torch.Tensor:
        if place in edits:
            value = edits[place](value)
        if place not in places:
            return value
        # Of its own, so that other users of the same tensor do not count.
        value = value * 1 if value.requires_grad else value.detach().clone().requires_grad_()

        def hook(gradient: torch.Tensor) -> torch.Tensor | None:
            found[place] = gradient.clone()
            return grad_edits[place](gradient) if place in grad_edits else None

        value.register_hook(hook)
        return value

    def before(path: str) -> Callable[..., Any]:
        def hook(_: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (watch((path, "input"), args[0]), *args[1:]), kwargs
            name = next(iter(kwargs))
            return args, {**kwargs, name: watch((path, "input"), kwargs[name])}

        return hook

    def after(path: str) -> Callable[..., Any]:
        def hook(_: Any, __: Any, output: Any) -> Any:
            if isinstance(output, torch.Tensor):
                return watch((path, "output"), output)
            return (watch((path, "output"), output[0]), *output[1:])

        return hook

    handles = []
    for path, port in dict.fromkeys([*places, *edits]):
        child = module.get_submodule(path)
        if port == "input":
            handles.append(child.register_forward_pre_hook(before(path), with_kwargs=True))
        else:
            handles.append(child.register_forward_hook(after(path)))
    try:
        with torch.enable_grad():
            loss(module(input_ids=ids, use_cache=False, **inputs).logits).backward()
    finally:
        for handle in handles:
            handle.remove()
    return found


def close(value: Any, expected: torch.Tensor, tolerance: float = 1e-5, floor: float = 1e-3) -> bool:
    value = value.value if hasattr(value, "value") else value
    if value.shape != expected.shape or value.dtype != expected.dtype:
        return False
    scale = max(float(expected.abs().max()), floor)
    return bool(((value - expected).abs() <= tolerance * scale).all())


@pytest.fixture
def gpt2(tools: SimpleNamespace) -> Iterator[tuple[Any, LanguageModel]]:
    module = tools.fresh("gpt2")
    yield module, LanguageModel(module)
    assert tools.left_behind(module) == []


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.tensor([[5, 9, 2, 11, 30, 7]])


def params(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """The gradients of the parameters, which are then forgotten."""
    found = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    return found


def untouched(module: nn.Module) -> bool:
    """A block's backward leaves nothing on parameters that nobody asked for."""
    return all(gradient is None for gradient in params(module).values())


def same_params(one: dict[str, Any], other: dict[str, Any]) -> bool:
    assert one.keys() == other.keys()
    return all(
        (g is None) == (h is None) and (g is None or close(g, h, floor=0.1))
        for g, h in zip(one.values(), other.values(), strict=True)
    )


# -------------------------------------------------------------------- equal to autograd

ARCHITECTURES = {
    "gpt2": ("transformer.h", "attn", "mlp"),
    "llama": ("model.layers", "self_attn", "mlp"),
    "gemma2": ("model.layers", "self_attn", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
    "opt": ("model.decoder.layers", "self_attn", "fc1"),
    "bloom": ("transformer.h", "self_attention", "mlp"),
    "mixtral": ("model.layers", "self_attn", "mlp"),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_autograds(
    name: str, frozen: bool, ids: torch.Tensor, tools: SimpleNamespace
) -> None:
    blocks, attention, mlp = ARCHITECTURES[name]
    module = tools.fresh(name)
    module.requires_grad_(not frozen)
    model: Any = LanguageModel(module)
    places = [
        (f"{blocks}.{i}{part}", port)
        for i in range(4)
        for part, port in (
            ("", "output"),
            (f".{attention}", "output"),
            (f".{mlp}", "output"),
            (f".{mlp}", "input"),
        )
    ]
    expected = autograd(module, ids, places)
    params(module)
    saved = {}
    with model.trace(ids):
        # Gemma 2 caps what its head gives.
        last_logit(model.output.logits).backward()
        for path, port in reversed(places):
            value = getattr(model.get(path), port)
            if path.endswith(attention):
                value = value[0]
            saved[path, port] = value.grad.save()
    for place in places:
        assert close(saved[place], expected[place]), place
    assert untouched(module)
    assert tools.left_behind(module) == []


def test_an_encoder_has_gradients(ids: torch.Tensor) -> None:
    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    torch.manual_seed(0)
    module = transformers.BertForMaskedLM(config).eval()
    model: Any = LanguageModel(module)
    places = [("bert.encoder.layer.0", "output"), ("bert.encoder.layer.1.attention", "output")]
    expected = autograd(module, ids, places, attention_mask=torch.ones_like(ids))
    with model.trace(ids):
        first = model.bert.encoder.layer[0].output.grad.save()
        second = model.bert.encoder.layer[1].attention.output[0].grad.save()
        last_logit(model.output.logits).backward()
    assert close(first, expected[places[0]])
    assert close(second, expected[places[1]])


def test_the_input_of_a_block_is_not_what_else_uses_that_tensor(
    gpt2: Any, ids: torch.Tensor
) -> None:
    module, model = gpt2
    # The residual stream goes into ln_2 and past it.
    expected = autograd(module, ids, [("transformer.h.1.ln_2", "input")])
    with model.trace(ids):
        gradient = model.transformer.h[1].ln_2.input.grad.save()
        last_logit(model.lm_head.output).backward()
    assert close(gradient, expected["transformer.h.1.ln_2", "input"])


def test_half_precision(tools: SimpleNamespace, ids: torch.Tensor) -> None:
    module = tools.fresh("llama").to(torch.bfloat16)
    model: Any = LanguageModel(module)
    expected = autograd(module, ids, [("model.layers.1", "output")])
    with model.trace(ids):
        gradient = model.model.layers[1].output.grad.save()
        last_logit(model.lm_head.output).backward()
    assert gradient.dtype == torch.bfloat16
    assert close(gradient, expected["model.layers.1", "output"])


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_views_have_views_of_the_gradient(frozen: bool, gpt2: Any, ids: torch.Tensor) -> None:
    module, model = gpt2
    module.requires_grad_(not frozen)
    path = "transformer.h.2.attn.c_proj"
    expected = autograd(module, ids, [(path, "input"), ("transformer.h.1", "output")])
    with model.trace(ids):
        heads = model.transformer.h[2].attn.c_proj.input.unflatten(-1, (4, 4))
        hidden = model.transformer.h[1].output
        last_logit(model.lm_head.output).backward()
        of_heads = heads.grad.save()
        of_one = heads[:, :, 2].grad.save()
        of_last = hidden[0][:, -1].grad.save()
        of_row = hidden[0][0].grad.save()
        whole = hidden.grad.save()
        of_t = hidden.t[-2].grad.save()
        of_t_too = hidden.grad.t[-2].save()
    gradient = expected[path, "input"].unflatten(-1, (4, 4))
    assert close(of_heads, gradient)
    assert close(of_one, gradient[:, :, 2])
    gradient = expected["transformer.h.1", "output"]
    assert close(whole, gradient)
    assert close(of_last, gradient[:, -1])
    assert close(of_row, gradient[0])
    assert close(of_t, gradient[:, -2])
    assert close(of_t_too, gradient[:, -2])


def test_values_of_the_block_have_gradients(gpt2: Any, ids: torch.Tensor) -> None:
    module, model = gpt2
    module.requires_grad_(False)
    with model.trace(ids):
        hidden = model.transformer.h[1].output.save()
        doubled = hidden * 2
        loss = (doubled**3).sum()
        loss.backward()
        of_doubled, of_hidden = doubled.grad.save(), hidden.grad.save()
        alone = hidden.detach()
        (alone**2).sum().backward()
        of_alone = alone.grad.save()
        of_parameter = model.transformer.ln_f.weight.grad
    h = hidden.value.detach()
    assert close(of_doubled, 3 * (2 * h) ** 2)
    assert close(of_hidden, 6 * (2 * h) ** 2)
    assert close(of_alone, 2 * h)
    assert of_parameter is not None


def test_a_parameters_gradient_is_that_of_this_backward(gpt2: Any, ids: torch.Tensor) -> None:
    module, model = gpt2
    autograd(module, ids, [])
    expected = params(module)["transformer.ln_f.weight"]
    assert expected is not None
    module.transformer.ln_f.weight.grad = torch.ones(16)  # of an earlier backward
    with model.trace(ids):
        last_logit(model.lm_head.output).backward()
        gradient = model.transformer.ln_f.weight.grad.save()
    assert close(gradient, expected)
    assert close(module.transformer.ln_f.weight.grad, expected + 1)


def test_an_edited_value_has_its_own_gradient(gpt2: Any, ids: torch.Tensor) -> None:
    module, model = gpt2
    path = "transformer.h.1"
    edits = {(path, "output"): lambda h: h * 0.5 + 1}
    expected = autograd(module, ids, [(path, "output")], edits=edits)[path, "output"]
    with model.trace(ids):
        hidden = model.transformer.h[1].output
        before = hidden.grad.save()
        hidden[:] = hidden * 0.5 + 1
        after = hidden.grad.save()
        last_logit(model.lm_head.output).backward()
    assert close(after, expected)
    assert close(before, expected * 0.5)


def test_modules_that_change_their_input_in_place() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    model: Any = Model(module)
    x = torch.randn(3, 4)
    for frozen in (False, True):
        module.requires_grad_(not frozen)
        with model.trace(x):
            pre = model[0].output.save()
            (model[2].output ** 2).sum().backward()
            gradient = model[0].output.grad.save()
        h = module[0](x).detach().requires_grad_()
        (module[2](torch.relu(h)) ** 2).sum().backward()
        assert torch.equal(pre.value.detach(), h.detach())
        assert close(gradient, h.grad)


# -------------------------------------------------------------------- several backwards


def test_each_backward_has_its_own_gradients(gpt2: Any, ids: torch.Tensor) -> None:
    module, model = gpt2
    place = ("transformer.h.1", "output")
    losses: list[Loss] = [lambda x, i=i: x[:, -1, i].sum() ** 2 for i in range(3)]  # type: ignore[misc]
    expected = [autograd(module, ids, [place], loss)[place] for loss in losses]
    params(module)
    with model.trace(ids):
        logits, hidden = model.lm_head.output, model.transformer.h[1].output
        early = hidden.grad.save()
        losses[0](logits).backward()
        first = hidden.grad.save()
        losses[1](logits).backward()
        second = hidden.grad.save()
        with losses[2](logits).backward():
            third = hidden.grad.save()
        again = hidden.grad.save()
    assert close(early, expected[0]) and close(first, expected[0])
    assert close(second, expected[1])
    assert close(third, expected[2]) and close(again, expected[2])
    assert untouched(module)


def test_a_context_means_its_backward_also_after_a_later_one(gpt2: Any, ids: torch.Tensor) -> None:
    module, model = gpt2
    place = ("transformer.h.1", "output")
    expected = autograd(module, ids, [place])[place]
    with model.trace(ids):
        hidden = model.transformer.h[1].output
        first = last_logit(model.lm_head.output).backward()
        (model.lm_head.output[:, -1, 5] ** 2).sum().backward()
        with first:
            gradient = hidden.grad.save()
        other = hidden.grad.save()
    assert close(gradient, expected)
    assert not close(other, expected)


@pytest.mark.filterwarnings("ignore:Using backward.* with create_graph")
def test_gradients_of_gradients(gpt2: Any, ids: torch.Tensor) -> None:
    module, model = gpt2
    with model.trace(ids):
        hidden = model.transformer.h[3].output
        last_logit(model.lm_head.output).backward(create_graph=True)
        gradient = hidden.grad
        (gradient**2).sum().backward()
        second = hidden.grad.save()
    clean: dict[str, torch.Tensor] = {}

    def keep(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        clean["h"] = output.detach().requires_grad_()
        return clean["h"]

    handle = module.transformer.h[3].register_forward_hook(keep)
    loss = last_logit(module(input_ids=ids).logits)
    handle.remove()
    (first,) = torch.autograd.grad(loss, clean["h"], create_graph=True)
    (expected,) = torch.autograd.grad((first**2).sum(), clean["h"])
    assert close(second, expected)


# -------------------------------------------------------------------- edited gradients


EDITS: dict[str, tuple[Callable[[Any], None], Callable[[torch.Tensor], torch.Tensor]]] = {}


def _edit(name: str, expected: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def add(function: Callable[[Any], None]) -> Callable[[Any], None]:
        EDITS[name] = function, expected
        return function

    return add


def _zero_last(g: torch.Tensor) -> torch.Tensor:
    g = g.clone()
    g[:, -1] = 0
    return g


@_edit("zero", torch.zeros_like)
def _zero(h: Any) -> None:
    h.grad[:] = 0


@_edit("times", lambda g: g * 2)
def _times(h: Any) -> None:
    h.grad *= 2


@_edit("replace", lambda g: torch.ones_like(g))
def _replace(h: Any) -> None:
    h.grad = torch.ones(1, 6, 16)


@_edit("part", _zero_last)
def _part(h: Any) -> None:
    h.grad[:, -1] = 0


@_edit("of a part", _zero_last)
def _of_a_part(h: Any) -> None:
    h[:, -1].grad = torch.zeros(1, 16)


@_edit("of a part, in place", lambda g: torch.cat([g[:, :-1], g[:, -1:] * 3], 1))
def _of_a_part_in_place(h: Any) -> None:
    h[:, -1].grad *= 3


@_edit("twice", lambda g: (g + 1) * 2)
def _twice(h: Any) -> None:
    h.grad += 1
    h.grad.mul_(2)


@_edit("other double", lambda g: g.double() * 0.5)
def _double(h: Any) -> None:
    h.grad = h.grad.double() * 0.5


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", EDITS)
def test_an_edited_gradient_reaches_what_is_below(
    name: str, before: bool, gpt2: Any, ids: torch.Tensor
) -> None:
    module, model = gpt2
    edit, expected_edit = EDITS[name]
    place, below = ("transformer.h.2", "output"), ("transformer.h.0", "output")
    grad_edits = {place: lambda g: expected_edit(g).to(g.dtype)}
    expected = autograd(module, ids, [place, below], grad_edits=grad_edits)
    params(module)
    with model.trace(ids):
        hidden = model.transformer.h[2].output
        if not before:
            last_logit(model.lm_head.output).backward()
        clean = hidden.grad.save()
        edit(hidden)
        edited = hidden.grad.save()
        lower = model.transformer.h[0].output.grad.save()
        if before:
            last_logit(model.lm_head.output).backward()
    assert close(clean, expected[place])
    assert close(edited.value.float(), expected_edit(expected[place]).float())
    assert close(lower, expected[below])
    assert untouched(module)


def test_an_edit_may_use_what_is_read_later_than_the_loss(gpt2: Any, ids: torch.Tensor) -> None:
    module, model = gpt2
    values: dict[str, torch.Tensor] = {}
    with model.trace(ids):
        early, late = model.transformer.h[0].output, model.transformer.h[3].output
        (model.transformer.h[1].output ** 2).sum().backward()
        early.grad[:] = late * 2
        late.save()
        gradient = model.transformer.wte.output.grad.save()
    module.zero_grad()

    def keep(name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            values[name] = output

        return hook

    handles = [
        module.transformer.wte.register_forward_hook(keep("wte")),
        module.transformer.h[0].register_forward_hook(keep("early")),
    ]
    module(input_ids=ids)
    for handle in handles:
        handle.remove()
    values["early"].backward(2 * late.value.detach())
    assert close(gradient, values["wte"].grad)


def test_one_backwards_gradient_in_anothers_edit(gpt2: Any, ids: torch.Tensor) -> None:
    _, model = gpt2
    with model.trace(ids):
        hidden = model.transformer.h[1].output
        with (hidden**2).sum().backward():
            mine = hidden.grad
        with (hidden**3).sum().backward():
            hidden.grad[:] = mine
            below = model.transformer.h[0].output.grad.save()
        with (hidden**2).sum().backward():
            expected = model.transformer.h[0].output.grad.save()
    assert torch.equal(below.value, expected.value)


def test_tuples_whose_parts_are_replaced(gpt2: Any, ids: torch.Tensor) -> None:
    module, model = gpt2
    path = "transformer.h.1.attn"
    edits = {(path, "output"): lambda a: a * 3}
    expected = autograd(module, ids, [(path, "output")], edits=edits)[path, "output"]
    with model.trace(ids):
        attention = model.transformer.h[1].attn
        attention.output[0][:] = attention.output[0] * 3
        attention.output[0].grad *= 1
        gradient = attention.output[0].grad.save()
        last_logit(model.lm_head.output).backward()
    assert close(gradient, expected)
    with model.trace(ids):
        part = model.transformer.h[1].attn.output
        part[0] = part[0] * 3
        gradient = part[0].grad.save()
        last_logit(model.lm_head.output).backward()
    assert close(gradient, expected)


# -------------------------------------------------------------------- batches


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gemma2"])
def test_gradients_of_a_batch_are_those_of_each_prompt_alone(
    name: str, frozen: bool, tools: SimpleNamespace
) -> None:
    blocks, attention, mlp = ARCHITECTURES[name]
    module = tools.fresh(name)
    module.requires_grad_(not frozen)
    model: Any = LanguageModel(module)
    prompts = tools.prompts(3, 7, 5)
    # The flattened hidden states of OPT are no [row, token] axes.
    places = [(f"{blocks}.1", "output"), (f"{blocks}.2.{mlp}", "input")]
    expected = [
        autograd(module, p[None], [*places, (f"{blocks}.2.{attention}", "output")]) for p in prompts
    ]
    params(module)
    saved: list[dict[Any, Any]] = []
    with tools.batches_of(module) as batches, model.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                mine = {
                    place: getattr(model.get(place[0]), place[1]).grad.save() for place in places
                }
                part = model.get(f"{blocks}.2.{attention}").output[0]
                last_logit(model.output.logits).backward()
                mine[f"{blocks}.2.{attention}", "output"] = part.grad.save()
                saved.append(mine)
    for mine, theirs in zip(saved, expected, strict=True):
        for place in theirs:
            assert close(mine[place], theirs[place]), place
    assert untouched(module)
    assert [rows for rows, _ in batches] == [3]


def test_one_loss_of_several_prompts(gpt2: Any, tools: SimpleNamespace) -> None:
    module, model = gpt2
    prompts = tools.prompts(3, 6)
    place = ("transformer.h.1", "output")
    expected = [autograd(module, p[None], [place])[place] for p in prompts]
    for how in (None, {"micro_batches": False}):
        hiddens, total = [], 0
        with model.trace(plan=how) as tracer:
            for prompt in prompts:
                with tracer.invoke(prompt):
                    hiddens.append(model.transformer.h[1].output)
                    total = last_logit(model.lm_head.output) + total
            total.backward()
            gradients = [hidden.grad.save() for hidden in hiddens]
        for gradient, theirs in zip(gradients, expected, strict=True):
            assert close(gradient, theirs)


def test_a_backward_in_the_second_invoke_alone(gpt2: Any, tools: SimpleNamespace) -> None:
    module, model = gpt2
    one, two = tools.prompts(6, 4)
    place = ("transformer.h.1", "output")
    expected = autograd(module, two[None], [place])[place]
    clean = tools.plain(module, one)
    with model.trace() as tracer:
        with tracer.invoke(one):
            first = model.transformer.h[1].output
            first.save()
        with tracer.invoke(two):
            gradient = model.transformer.h[1].output.grad.save()
            last_logit(model.lm_head.output).backward()
            nothing = first.grad.save()
    assert close(gradient, expected)
    assert close(first.value.detach(), clean["transformer.h.1", "output"])
    assert not nothing.value.any()


def test_the_whole_batchs_gradient_has_all_rows(gpt2: Any, tools: SimpleNamespace) -> None:
    module, model = gpt2
    prompts = tools.prompts(5, 5)
    place = ("transformer.h.1", "output")
    expected = autograd(module, torch.stack(prompts), [place])[place]
    with model.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                model.transformer.h[0].output.save()
        with tracer.invoke():
            gradient = model.transformer.h[1].output.grad.save()
            last_logit(model.lm_head.output).backward()
    assert close(gradient, expected)


def test_an_edited_gradient_of_one_prompt_leaves_the_other(
    gpt2: Any, tools: SimpleNamespace
) -> None:
    module, model = gpt2
    one, two = tools.prompts(4, 7)
    place, below = ("transformer.h.2", "output"), ("transformer.h.0", "output")
    edited = autograd(module, one[None], [place, below], grad_edits={place: lambda g: g * 3})
    clean = autograd(module, two[None], [below])
    gradients = []
    with model.trace() as tracer:
        for prompt in (one, two):
            with tracer.invoke(prompt):
                last_logit(model.lm_head.output).backward()
                if prompt is one:
                    model.transformer.h[2].output.grad *= 3
                gradients.append(model.transformer.h[0].output.grad.save())
    assert close(gradients[0], edited[below])
    assert close(gradients[1], clean[below])


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    layers=st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True),
    edited=st.integers(0, 3),
    factor=st.sampled_from([0.0, -1.0, 2.0]),
    batched=st.booleans(),
    frozen=st.booleans(),
    tokens=st.sampled_from([None, 12]),
)
def test_batched_is_solo(
    tools: SimpleNamespace,
    lengths: list[int],
    layers: list[int],
    edited: int,
    factor: float,
    batched: bool,
    frozen: bool,
    tokens: int | None,
) -> None:
    module, model = tools.module("llama"), tools.model("llama")
    module.requires_grad_(not frozen)
    try:
        places = [(f"model.layers.{i}", "output") for i in {*layers, edited}]
        gradient_edit = {(f"model.layers.{edited}", "output"): lambda g: g * factor}
        prompts = tools.prompts(*lengths)
        expected = [autograd(module, p[None], places, grad_edits=gradient_edit) for p in prompts]
        params(module)
        saved = []
        with model.trace(plan={"micro_batches": batched, "tokens": tokens}) as tracer:
            for prompt in prompts:
                with tracer.invoke(prompt):
                    hidden = model.model.layers
                    saved.append({i: hidden[i].output.grad.save() for i in layers})
                    hidden[edited].output.grad *= factor
                    last_logit(model.lm_head.output).backward()
        for mine, theirs in zip(saved, expected, strict=True):
            for i in layers:
                assert close(mine[i], theirs[f"model.layers.{i}", "output"], 1e-4)
        assert untouched(module)
    finally:
        module.requires_grad_(True)


# -------------------------------------------------------------------- attribution patching


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_attribution_patching_of_all_layers_takes_one_forward_and_one_backward(
    frozen: bool, gpt2: Any, tools: SimpleNamespace
) -> None:
    """Attribution patching: gradient × (clean − corrupted), a first-order estimate of patching.

    Source: Nanda, Attribution Patching: Activation Patching At Industrial Scale, 2023.
    """
    module, model = gpt2
    module.requires_grad_(not frozen)
    clean, corrupted = tools.prompts(6, 6)
    places = [(f"transformer.h.{i}", "output") for i in range(4)]
    values = tools.plain(module, clean)
    corrupted_values = tools.plain(module, corrupted)
    gradients = autograd(module, corrupted[None], places)
    layers, scores = model.transformer.h, []
    with tools.batches_of(module) as batches, model.trace() as tracer:
        with tracer.invoke(clean):
            kept = [layer.output for layer in layers]
        with tracer.invoke(corrupted):
            last_logit(model.lm_head.output).backward()
            for layer, other in zip(layers, kept, strict=True):
                score = layer.output.grad * (other - layer.output)
                scores.append(score.sum(-1).save())
    assert len(batches) == 1
    for score, place in zip(scores, places, strict=True):
        expected = gradients[place] * (values[place] - corrupted_values[place])
        assert close(score.value.detach(), expected.sum(-1), 1e-4)


# -------------------------------------------------------------------- order


def test_a_write_may_use_the_gradient_of_an_earlier_loss(gpt2: Any, ids: torch.Tensor) -> None:
    module, model = gpt2
    with model.trace(ids) as tracer:
        early = model.transformer.h[0].output
        (model.transformer.h[1].output ** 2).sum().backward()
        model.transformer.h[3].output[:] = early.grad
        output = tracer.output.logits.save()
        early.grad.save()
    hidden: dict[str, torch.Tensor] = {}
    handles = [
        module.transformer.h[i].register_forward_hook(
            lambda _m, _a, out, i=i: hidden.__setitem__(i, out)
        )
        for i in (0, 1)
    ]
    module(input_ids=ids)
    for handle in handles:
        handle.remove()
    (gradient,) = torch.autograd.grad((hidden[1] ** 2).sum(), hidden[0])
    expected = module.lm_head(module.transformer.ln_f(gradient))
    assert close(output.value.detach(), expected.detach())


def test_a_write_that_needs_the_gradient_of_a_later_loss_is_refused(
    gpt2: Any, ids: torch.Tensor
) -> None:
    _, model = gpt2
    with pytest.raises(OrderError, match=r"(?s)# write.*lm_head.output.*# read"):
        with model.trace(ids):
            logits = model.lm_head.output  # read
            last_logit(logits).backward()
            model.transformer.h[2].output[:] = model.transformer.h[0].output.grad  # write


def test_the_gradient_of_another_invoke_comes_from_an_earlier_pass(
    gpt2: Any, ids: torch.Tensor
) -> None:
    module, model = gpt2
    place = ("transformer.h.1", "output")
    gradient = autograd(module, ids, [place])[place]
    path = "transformer.h.2"
    with model.trace() as tracer:
        with tracer.invoke(ids):
            hidden = model.transformer.h[1].output
            last_logit(model.lm_head.output).backward()
        with tracer.invoke(ids):
            model.transformer.h[2].output[:] = hidden.grad
            logits = model.lm_head.output.save()
    handle = module.get_submodule(path).register_forward_hook(lambda *_: gradient)
    expected = module(input_ids=ids).logits
    handle.remove()
    assert close(logits.value.detach(), expected.detach())


def test_backwards_that_wait_for_each_other_are_refused(gpt2: Any, ids: torch.Tensor) -> None:
    _, model = gpt2
    with pytest.raises(OrderError, match=r"(?s)# first.*wait for each other's gradients"):
        with model.trace(ids):
            hidden = model.transformer.h[0].output
            (hidden.grad * hidden).sum().backward()  # first
            hidden[:] = hidden


# -------------------------------------------------------------------- what cannot be had


def test_a_gradient_on_which_the_loss_does_not_depend(gpt2: Any, ids: torch.Tensor) -> None:
    _, model = gpt2
    with model.trace(ids):
        (model.transformer.h[0].output ** 2).sum().backward()  # the loss
        gradient = model.transformer.h[2].output.grad.save()
        fine = model.transformer.h[0].output.grad.save()
    assert fine.shape == (1, 6, 16)
    with pytest.raises(
        StepError, match=r"(?s)the loss derived at .*# the loss.* does not depend on it"
    ):
        gradient.value
    with pytest.raises(StepError, match="does not depend on it"):
        with model.trace(ids):
            (model.transformer.h[0].output ** 2).sum().backward()
            model.transformer.h[2].output.grad[:] = 0


def test_a_written_gradient_of_another_shape_names_its_line(
    gpt2: Any, ids: torch.Tensor, tools: SimpleNamespace
) -> None:
    module, model = gpt2
    message = r"(?s)# here.*transformer.h.1.output.grad.*\[1, 6, 16\].*\[1, 5, 16\]"
    with pytest.raises(ShapeError, match=message):
        with model.trace(ids):
            last_logit(model.lm_head.output).backward()
            model.transformer.h[1].output.grad = torch.zeros(1, 5, 16)  # here
    assert tools.left_behind(module) == []


def test_a_gradient_without_a_backward_is_refused_before_loading() -> None:
    model: Any = LanguageModel("graftwork/tiny")
    with pytest.raises(BlockError, match=r"(?s)# here.*no `loss.backward\(\)`"):
        with model.trace("The"):
            model.transformer.h[0].output.grad.save()  # here
    assert not model.loaded


def test_a_generation_has_no_gradients(gpt2: Any, ids: torch.Tensor) -> None:
    _, model = gpt2
    with pytest.raises(StepError, match=r"(?s)`backward\(\)` cannot be here.*# here"):
        with model.generate(ids, max_new_tokens=2):
            model.lm_head.output.sum().backward()  # here
    with pytest.raises(StepError, match=r"(?s)`grad` cannot be here.*# here"):
        with model.generate(ids, max_new_tokens=2):
            model.lm_head.output.grad  # here


def test_only_a_tensor_has_a_gradient(gpt2: Any, ids: torch.Tensor) -> None:
    _, model = gpt2
    with pytest.raises(OperationError, match=r"transformer.h.0.attn.output.grad`: only a float"):
        with model.trace(ids):
            model.transformer.h[0].attn.output.grad.save()
            last_logit(model.lm_head.output).backward()


def test_torchs_own_refusals_name_the_line(gpt2: Any, ids: torch.Tensor) -> None:
    _, model = gpt2
    with pytest.raises(RuntimeError, match="only for scalar outputs") as caught:
        with model.trace(ids):
            model.lm_head.output.backward()  # of no scalar
    assert "# of no scalar" in str(caught.value).splitlines()[0]


def test_gradient_checkpointing_is_refused(gpt2: Any, ids: torch.Tensor) -> None:
    module, model = gpt2
    module.train()
    module.transformer.gradient_checkpointing = True
    module.transformer.h[0].gradient_checkpointing = True
    with pytest.raises(BlockError, match="gradient_checkpointing_disable"):
        with model.trace(ids):
            last_logit(model.lm_head.output).backward()


def test_an_error_in_a_gradients_function_leaves_nothing(
    gpt2: Any, ids: torch.Tensor, tools: SimpleNamespace
) -> None:
    module, model = gpt2
    hidden: list[torch.Tensor] = []

    def fails(gradient: torch.Tensor) -> torch.Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        with model.trace(ids):
            last_logit(model.lm_head.output).backward()
            value = model.transformer.h[1].output
            graftwork.apply(hidden.append, value)
            value.grad = graftwork.apply(fails, value.grad)
    assert tools.left_behind(module) == []
    params(module)
    autograd(module, ids, [])
    assert params(module)["transformer.wte.weight"] is not None


# -------------------------------------------------------------------- torch.autograd


def test_autograd_grad(gpt2: Any, ids: torch.Tensor) -> None:
    module, model = gpt2
    places = [("transformer.h.0", "output"), ("transformer.h.2.attn", "output")]
    expected = autograd(module, ids, places)
    params(module)
    with model.trace(ids):
        h1, h2 = model.transformer.h[0].output, model.transformer.h[2].attn.output[0]
        h1.save()
        loss = last_logit(model.lm_head.output)
        g1, g2 = torch.autograd.grad(loss, [h1, h2])
        later = (h1 * 2).sum()  # values are still those of the watched tensors
        (g3,) = torch.autograd.grad(later, h1)
        g1, g2, g3 = g1.save(), g2.save(), g3.save()
    assert close(g1, expected[places[0]])
    assert close(g2, expected[places[1]])
    assert close(g3, torch.full((1, 6, 16), 2.0))
    assert all(gradient is None for gradient in params(module).values())


def test_backward_with_inputs_reaches_those_alone(gpt2: Any, ids: torch.Tensor) -> None:
    module, model = gpt2
    place = ("transformer.h.0", "output")
    expected = autograd(module, ids, [place])
    all_weights = params(module)
    weight = module.transformer.ln_f.weight
    with model.trace(ids):
        hidden = model.transformer.h[0].output
        last_logit(model.lm_head.output).backward(inputs=[hidden, weight])
        gradient = hidden.grad.save()
    assert close(gradient, expected[place])
    found = params(module)
    assert close(found.pop("transformer.ln_f.weight"), all_weights["transformer.ln_f.weight"])  # type: ignore[arg-type]
    assert all(gradient is None for gradient in found.values())


def test_a_given_gradient(gpt2: Any, ids: torch.Tensor) -> None:
    module, model = gpt2
    place = ("transformer.h.0", "output")
    weight = torch.randn(1, 6, 61)
    expected = autograd(module, ids, [place], lambda logits: (logits * weight).sum())
    with model.trace(ids):
        model.lm_head.output.backward(weight)
        gradient = model.transformer.h[0].output.grad.save()
    assert close(gradient, expected[place])


# -------------------------------------------------------------------- around a run


def test_gradients_where_they_are_switched_off_outside(gpt2: Any, ids: torch.Tensor) -> None:
    module, model = gpt2
    place = ("transformer.h.0", "output")
    expected = autograd(module, ids, [place])[place]
    with torch.no_grad():
        with model.trace(ids):
            last_logit(model.lm_head.output).backward()
            gradient = model.transformer.h[0].output.grad.save()
        assert not torch.is_grad_enabled()
        with model.trace(ids):
            plain = model.transformer.h[0].output.save()
    assert close(gradient, expected)
    assert not plain.value.requires_grad


def test_shapes_while_recording_and_explanations(gpt2: Any, ids: torch.Tensor) -> None:
    _, model = gpt2
    with model.trace(ids) as tracer:
        hidden = model.transformer.h[1].output
        loss = last_logit(model.lm_head.output)
        loss.backward()
        assert hidden.grad.shape == (1, 6, 16)
        assert hidden[:, -1].grad.shape == (1, 16)
        assert model.transformer.h[1].attn.output[0].grad.shape == (1, 6, 16)
        hidden.grad.save()
        text = str(tracer.explain())
        tracer.graph.lint()
        printed = str(tracer.graph)
    assert "1 value saved, 384 bytes" in text
    assert "transformer.h.1.output.grad" in printed
    assert f"backward({loss._node!r}" in printed


def test_nothing_watches_after_the_run(gpt2: Any, ids: torch.Tensor) -> None:
    _, model = gpt2
    calls: list[int] = []

    def count(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * 0

    with model.trace(ids):
        hidden = model.transformer.h[1].output
        loss = last_logit(model.lm_head.output)
        loss.backward(retain_graph=True)
        hidden.grad = graftwork.apply(count, hidden.grad)
        kept = loss.save()
    model.load().zero_grad()
    kept.value.backward()  # the user's own, not touched by the block's edits
    assert calls == [1]
    found = params(model.load())
    autograd(model.load(), ids, [])
    assert same_params(found, params(model.load()))


def test_values_die_with_the_block(gpt2: Any, ids: torch.Tensor) -> None:
    _, model = gpt2
    seen: list[weakref.ref[Any]] = []

    def look(value: torch.Tensor) -> torch.Tensor:
        seen.append(weakref.ref(value))
        return value.sum()

    gc.collect()
    gc.disable()
    try:
        with model.trace(ids):
            hidden = model.transformer.h[1].output
            graftwork.apply(look, hidden).save()
            loss = last_logit(model.lm_head.output)
            loss.backward()
            graftwork.apply(look, hidden.grad).save()
            kept = loss.save()
        assert kept.value.requires_grad
        assert [one() for one in seen] == [None, None]
    finally:
        gc.enable()


def test_passes_let_go_of_their_activations(gpt2: Any, tools: SimpleNamespace) -> None:
    _, model = gpt2
    alive: list[weakref.ref[Any]] = []
    most: list[int] = []

    def look(value: torch.Tensor) -> torch.Tensor:
        alive.append(weakref.ref(value))
        most.append(sum(one() is not None for one in alive))
        return value * 1

    saved = []
    with model.trace(plan={"micro_batches": False}) as tracer:
        for prompt in tools.prompts(4, 4, 4, 4):
            with tracer.invoke(prompt):
                hidden = model.transformer.h[1].output
                hidden[:] = graftwork.apply(look, hidden)
                loss = last_logit(model.lm_head.output)
                loss.backward()
                saved.append(loss.save())
    # What is left of a graph that was gone through holds no activations.
    with pytest.raises(RuntimeError, match="second time"):
        saved[0].value.backward()
    assert len(most) == 4


def test_two_threads(tools: SimpleNamespace) -> None:
    module = tools.fresh("gpt2")
    model: Any = LanguageModel(module)
    prompts = tools.prompts(3, 4, 5, 6)
    place = ("transformer.h.1", "output")
    expected = [autograd(module, p[None], [place])[place] for p in prompts]
    params(module)
    found: dict[int, Any] = {}

    def work(numbers: list[int]) -> None:
        for number in numbers:
            with model.trace(prompts[number]):
                last_logit(model.lm_head.output).backward()
                gradient = model.transformer.h[1].output.grad.save()
            found[number] = gradient

    threads = [threading.Thread(target=work, args=(n,)) for n in ([0, 1], [2, 3])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(close(found[i], expected[i]) for i in range(4))
    assert untouched(module)


# -------------------------------------------------------------------- training


def test_a_steering_vector_is_trained_as_with_a_hook(gpt2: Any, ids: torch.Tensor) -> None:
    module, model = gpt2
    module.requires_grad_(False)
    target = torch.tensor([17])

    def train(step: Callable[[torch.Tensor], float]) -> tuple[list[float], torch.Tensor]:
        vector = torch.zeros(16, requires_grad=True)
        optimizer = torch.optim.Adam([vector], lr=0.2)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            losses.append(step(vector))
            optimizer.step()
        return losses, vector.detach()

    def ours(vector: torch.Tensor) -> float:
        with model.trace(ids):
            model.transformer.h[1].output[:, -1] += vector
            loss = nn.functional.cross_entropy(model.lm_head.output[:, -1], target)
            loss.backward()
            kept = loss.save()
        return float(kept.detach())

    def plain(vector: torch.Tensor) -> float:
        def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            return torch.cat([output[:, :-1], output[:, -1:] + vector], 1)

        handle = module.transformer.h[1].register_forward_hook(hook)
        loss = nn.functional.cross_entropy(module(input_ids=ids).logits[:, -1], target)
        handle.remove()
        loss.backward()
        return float(loss.detach())

    losses, vector = train(ours)
    expected, other = train(plain)
    assert losses[-1] < 0.8 * losses[0]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert close(vector, other, 1e-3)


class LoRA(nn.Module):
    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


class Rotated(nn.Module):
    """Interchange in a learned subspace.

    Source: Geiger et al., Finding Alignments Between Interpretable Causal Variables and Distributed
    Neural Representations, 2023.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.basis = nn.utils.parametrizations.orthogonal(nn.Linear(width, rank, bias=False))

    def forward(self, base: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return base + (source - base) @ self.basis.weight.T @ self.basis.weight


@pytest.mark.parametrize("applied", [True, False], ids=["apply", "called"])
def test_an_adapter_is_trained_over_a_compiled_experiment(
    applied: bool, gpt2: Any, tools: SimpleNamespace
) -> None:
    module, model = gpt2
    module.requires_grad_(False)
    adapter = LoRA(16, 4)
    prompts = tools.prompts(5, 5)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    with model.trace(prompts[0]) as tracer:
        mlp = model.transformer.h[2].mlp
        out = graftwork.apply(adapter, mlp.input) if applied else adapter(mlp.input)
        mlp.output += out
        logits = model.lm_head.output[:, -1]
        loss = nn.functional.cross_entropy(logits, torch.tensor([23]))
        loss.backward()
        loss.save()
    experiment = tracer.compile()
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        losses.append(float(experiment(prompts[step % 2])[loss].detach()))
        optimizer.step()
    assert losses[-1] < 0.3 * losses[1]


def test_a_rotated_subspace_is_trained_over_blocks(gpt2: Any, tools: SimpleNamespace) -> None:
    module, model = gpt2
    module.requires_grad_(False)
    base, source = tools.prompts(5, 5)
    target = int(tools.plain(module, source)["lm_head", "output"][0, -1].argmax())
    subspace = Rotated(16, 4)
    optimizer = torch.optim.Adam(subspace.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with model.trace() as tracer:
            with tracer.invoke(source):
                theirs = model.transformer.h[2].output[:, -1]
            with tracer.invoke(base):
                hidden = model.transformer.h[2].output
                hidden[:, -1] = graftwork.apply(subspace, hidden[:, -1], theirs)
                logits = model.lm_head.output[:, -1]
                loss = nn.functional.cross_entropy(logits, torch.tensor([target]))
                loss.backward()
                loss.save()
        losses.append(float(loss.detach()))
        optimizer.step()
    weight = subspace.basis.weight.detach()
    assert close(weight @ weight.T, torch.eye(4), 1e-4)
    assert losses[-1] < 0.7 * losses[0]


def test_a_probe_is_trained_by_gradients_after_the_block(gpt2: Any, ids: torch.Tensor) -> None:
    module, model = gpt2
    module.requires_grad_(False)
    probe = nn.Linear(16, 2)
    with model.trace(ids):
        out = graftwork.apply(probe, model.transformer.h[1].output).save()
        hidden = model.transformer.h[1].output.save()
    out.value.sum().backward()
    assert probe.weight.grad is not None
    assert close(probe.weight.grad, hidden.value.sum((0, 1)).expand(2, 16))


# -------------------------------------------------------------------- the model is as it was


def test_a_parameter_gets_a_gradient_only_where_it_is_asked_for(
    gpt2: Any, ids: torch.Tensor
) -> None:
    module, model = gpt2
    head, norm = module.transformer.wte.weight, module.transformer.ln_f.weight
    autograd(module, ids, [])
    expected = params(module)
    norm.grad = torch.full((16,), 3.0)  # of an earlier backward
    with model.trace(ids):
        last_logit(model.lm_head.output).backward()
    assert torch.equal(norm.grad, torch.full((16,), 3.0))
    norm.grad = None
    assert untouched(module)
    with model.trace(ids):
        gradient = model.transformer.ln_f.weight.grad
        last_logit(model.lm_head.output).backward()
        gradient.save()
    found = params(module)
    assert close(found.pop("transformer.ln_f.weight"), expected["transformer.ln_f.weight"])  # type: ignore[arg-type]
    assert all(one is None for one in found.values())
    with model.trace(ids):
        last_logit(model.lm_head.output).backward(inputs=[head, norm])
    found = params(module)
    for name in ("transformer.ln_f.weight", "transformer.wte.weight"):
        assert close(found.pop(name), expected[name], floor=0.1)  # type: ignore[arg-type]
    assert all(one is None for one in found.values())


def test_parameters_that_are_trained_while_others_are_frozen_get_gradients(
    gpt2: Any, ids: torch.Tensor
) -> None:
    module, model = gpt2
    module.requires_grad_(False)
    chosen = module.transformer.h[1].mlp.requires_grad_()
    flags = [one.requires_grad for one in module.parameters()]
    autograd(module, ids, [])
    expected = params(module)
    with model.trace(ids):
        last_logit(model.lm_head.output).backward()
    assert [one.requires_grad for one in module.parameters()] == flags
    found = params(module)
    assert same_params(found, expected)
    assert sum(one is not None for one in found.values()) == len(list(chosen.parameters()))


def test_a_backward_over_two_runs_leaves_no_gradient(gpt2: Any, ids: torch.Tensor) -> None:
    module, model = gpt2
    with model.trace(ids):
        loss = last_logit(model.lm_head.output)
        loss.backward()
        if model.transformer.h[0].output.grad.sum() > -1e9:
            loss.save()
    assert untouched(module)
