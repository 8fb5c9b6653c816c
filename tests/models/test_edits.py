"""Lasting edits, against plain hooks on the same model."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import graftwork
from graftwork import LanguageModel, Model
from graftwork.tracing.errors import (
    BlockError,
    EditError,
    InputError,
    NotRunError,
    OperationError,
    OrderError,
    ShapeError,
    StepError,
    UnknownModuleError,
    WireError,
)
from graftwork.tracing.wire import pack

from .conftest import build

PROMPT, OTHER = "The Eiffel Tower is in the city of", "Big Ben is in"
Change = Callable[[torch.Tensor], Any]


@contextmanager
def hooked(module: nn.Module, changes: dict[str, Change]) -> Iterator[None]:
    """Plain hooks that change what modules give, the hidden states of a tuple, in place."""

    def hook(change: Change) -> Callable[..., None]:
        def run(_module: Any, _args: Any, output: Any) -> None:
            change(output[0] if isinstance(output, tuple) else output)

        return run

    handles = [
        module.get_submodule(path).register_forward_hook(hook(change))
        for path, change in changes.items()
    ]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def close(found: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.value, expected, rtol=1e-4, atol=1e-4)


class Tiny:
    """The model of the package, and plain runs of it."""

    def __init__(self) -> None:
        self.model: Any = LanguageModel("graftwork/tiny")
        self.module: Any = self.model.load()

    def ids(self, prompt: str) -> torch.Tensor:
        return torch.tensor([self.model.tokenizer(prompt)["input_ids"]])

    def logits(self, prompt: str, changes: dict[str, Change]) -> torch.Tensor:
        with hooked(self.module, changes):
            return self.module(self.ids(prompt)).logits  # type: ignore[no-any-return]

    def generated(self, prompt: str, new: int, changes: dict[str, Change], **options: Any) -> Any:
        with hooked(self.module, changes):
            return self.module.generate(
                self.ids(prompt), max_new_tokens=new, do_sample=False, **options
            )


@pytest.fixture(scope="module")
def shared() -> Tiny:
    return Tiny()


@pytest.fixture
def tiny(shared: Tiny) -> Iterator[Tiny]:
    yield shared
    shared.model.clear_edits()
    shared.model._held.attached.clear()
    shared.model._envoys.clear()


class Coder(nn.Module):
    """A small sparse autoencoder."""

    def __init__(self, width: int = 128, features: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.encoder = nn.Linear(width, features)
        self.act = nn.ReLU()
        self.decoder = nn.Linear(features, width)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 8

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.act(self.encoder(hidden)))  # type: ignore[no-any-return]


# ---------------------------------------------------------------- views and the model itself


def test_the_view_is_edited_and_the_model_is_not(tiny: Tiny) -> None:
    model = tiny.model

    def change(hidden: torch.Tensor) -> None:
        hidden[:, -1] *= 3

    with model.edit() as edited:
        model.transformer.h[1].output[0][:, -1] *= 3
    with edited.trace(PROMPT):
        own = edited.lm_head.output.save()
        hidden = edited.transformer.h[1].output[0].save()
    with edited.trace(PROMPT):
        named = model.lm_head.output.save()  # the model's names mean the edited one there
    with model.trace(PROMPT):
        clean = model.lm_head.output.save()
    expected = tiny.logits(PROMPT, {"transformer.h.1": change})
    close(own, expected)
    close(named, expected)
    close(clean, tiny.logits(PROMPT, {}))
    kept: dict[str, torch.Tensor] = {}
    tiny.logits(PROMPT, {"transformer.h.1": lambda h: (change(h), kept.update(h=h.clone()))})
    close(hidden, kept["h"])
    assert not tiny.module.transformer.h[1]._forward_hooks


def test_in_place_and_cleared(tiny: Tiny) -> None:
    model = tiny.model
    with model.edit(inplace=True) as same:
        model.transformer.h[0].mlp.output[:] = 0
    assert same is model
    with model.trace(PROMPT):
        edited = model.lm_head.output.save()
    model.clear_edits()
    with model.trace(PROMPT):
        clean = model.lm_head.output.save()
    close(edited, tiny.logits(PROMPT, {"transformer.h.0.mlp": lambda h: h.zero_()}))
    close(clean, tiny.logits(PROMPT, {}))


def test_edits_of_an_edited_model_come_after_its_own(tiny: Tiny) -> None:
    model = tiny.model
    with model.edit() as first:
        model.transformer.h[1].output[0][:] *= 2
    with first.edit() as second:
        first.transformer.h[1].output[0][:] += 1
    first.clear_edits()
    with second.trace(PROMPT):
        found = second.lm_head.output.save()
    with first.trace(PROMPT):
        cleared = first.lm_head.output.save()
    close(found, tiny.logits(PROMPT, {"transformer.h.1": lambda h: h.mul_(2).add_(1)}))
    close(cleared, tiny.logits(PROMPT, {}))


def test_edits_are_recorded_before_the_weights_are_there() -> None:
    model: Any = LanguageModel("graftwork/tiny")
    with model.edit() as edited:
        model.transformer.h[0].output[0][:] = 0
    assert not model.loaded and not edited.loaded
    with edited.trace(PROMPT):
        hidden = edited.transformer.h[0].output[0].save()
    assert model.loaded and edited.loaded and model.load() is edited.load()
    assert hidden.abs().max() == 0


def test_the_users_own_edits_in_a_block_come_after(tiny: Tiny) -> None:
    model = tiny.model
    with model.edit() as edited:
        model.transformer.h[1].output[0][:] += 1
    with edited.trace(PROMPT):
        before = edited.transformer.h[1].output[0].clone().save()
        edited.transformer.h[1].output[0][:] *= 2
        logits = edited.lm_head.output.save()
    kept: dict[str, torch.Tensor] = {}

    def change(hidden: torch.Tensor) -> None:
        hidden += 1
        kept["h"] = hidden.clone()
        hidden *= 2

    close(logits, tiny.logits(PROMPT, {"transformer.h.1": change}))
    close(before, kept["h"])


# ---------------------------------------------------------------- prompts, tokens, generation


def test_each_prompt_of_a_batch_has_them_at_its_own_tokens(tiny: Tiny) -> None:
    model, vector = tiny.model, torch.randn(128, generator=torch.Generator().manual_seed(0)) * 4

    def change(hidden: torch.Tensor) -> None:
        hidden[:, 2] += vector
        hidden[:, -1] *= 0.5

    with model.edit() as edited:
        hidden = model.transformer.h[0].output[0]
        hidden.t[2] += vector
        hidden.t[-1] *= 0.5
    prompts = [PROMPT, OTHER, "The Colosseum is in the old city of"]
    with edited.trace() as tracer:
        found = []
        for prompt in prompts:
            with tracer.invoke(prompt):
                found.append(model.lm_head.output.save())
    for prompt, logits in zip(prompts, found, strict=True):
        close(logits, tiny.logits(prompt, {"transformer.h.0": change}))
    with edited.trace([PROMPT, OTHER]):
        rows = model.lm_head.output[:, -1].save()
    for row, prompt in enumerate([PROMPT, OTHER]):
        expected = tiny.logits(prompt, {"transformer.h.0": change})[0, -1]
        torch.testing.assert_close(rows.value[row], expected, rtol=1e-4, atol=1e-4)


def test_a_prompt_without_the_token_is_refused_with_the_line_of_the_edit(tiny: Tiny) -> None:
    with tiny.model.edit() as edited:
        tiny.model.transformer.h[0].output[0].t[6] = 0
    with pytest.raises(InputError, match=r"(?s)`\.t\[6\]`.*has 1 tokens.*test_edits\.py:\d+"):
        edited.trace("The")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_every_step_of_a_generation_has_them(tiny: Tiny, options: dict[str, Any]) -> None:
    model = tiny.model

    def change(hidden: torch.Tensor) -> None:
        hidden[:, -1, :64] *= -1

    with model.edit() as edited:
        model.transformer.h[2].output[0][:, -1, :64] *= -1
    with edited.generate(max_new_tokens=5, **options) as generator:
        with generator.invoke(PROMPT) as one:
            hidden = edited.transformer.h[2].output[0].save()
        with generator.invoke(OTHER) as two:
            pass
    for invoker, prompt in ((one, PROMPT), (two, OTHER)):
        expected = tiny.generated(prompt, 5, {"transformer.h.2": change}, **options)
        assert invoker.output[0].tolist() == expected[0].tolist()
        plain = tiny.generated(prompt, 5, {}, **options)
        assert prompt != PROMPT or plain[0].tolist() != expected[0].tolist()
    assert hidden.shape[1] == tiny.ids(PROMPT).shape[1]


def test_a_token_that_a_step_does_not_have_is_left_out_there(tiny: Tiny) -> None:
    model = tiny.model

    def change(hidden: torch.Tensor) -> None:
        if hidden.shape[1] > 1:
            hidden[:, 3] = 9
        hidden[:, -1, :64] *= -1

    with model.edit() as edited:
        model.transformer.h[1].output[0].t[3] = 9
        model.transformer.h[1].output[0].t[-1][:, :64] *= -1
    with edited.generate(PROMPT, max_new_tokens=4) as generator:
        pass
    expected = tiny.generated(PROMPT, 4, {"transformer.h.1": change})
    assert generator.output.tolist() == expected.tolist()


def test_shapes_are_those_of_each_prompt(tiny: Tiny) -> None:
    model = tiny.model
    with model.edit() as edited:
        hidden = model.transformer.h[0].output[0]
        assert hidden.shape[-1] == 128 and hidden.ndim == 3 and len(hidden.shape) == 3
        heads = hidden.view(hidden.shape[0], hidden.shape[1], 4, 32)
        hidden[:] = heads.flip(2).reshape(*hidden.shape)
        hidden[:, : hidden.size(1) // 2] = 0
    with edited.trace() as tracer:
        with tracer.invoke(PROMPT):
            first = model.lm_head.output.save()
        with tracer.invoke(OTHER):
            second = model.lm_head.output.save()

    def change(hidden: torch.Tensor) -> None:
        hidden.copy_(hidden.unflatten(-1, (4, 32)).flip(2).flatten(2))
        hidden[:, : hidden.shape[1] // 2] = 0

    close(first, tiny.logits(PROMPT, {"transformer.h.0": change}))
    close(second, tiny.logits(OTHER, {"transformer.h.0": change}))


def test_skips_and_inner_operations(tiny: Tiny) -> None:
    model = tiny.model
    with model.edit() as edited:
        model.transformer.h[1].skip(model.transformer.h[1].input)
        model.transformer.h[2].attn.source.attention_interface_0.output[0][:, -1] = 0
    with edited.trace() as tracer:
        with tracer.invoke(PROMPT):
            logits = model.lm_head.output.save()
        with tracer.invoke(OTHER):
            other = model.lm_head.output.save()
    module = tiny.module
    own = module.transformer.h[1].forward
    projection = module.transformer.h[2].attn.c_proj

    def last_is_nothing(_module: Any, args: Any) -> None:
        args[0][:, -1] = 0

    handle = projection.register_forward_pre_hook(last_is_nothing)
    module.transformer.h[1].forward = lambda hidden, *args, **kwargs: hidden
    try:
        expected = [tiny.logits(prompt, {}) for prompt in (PROMPT, OTHER)]
    finally:
        handle.remove()
        assert own != module.transformer.h[1].forward
        del module.transformer.h[1].forward
    close(logits, expected[0])
    close(other, expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bloom", "opt", "gemma2"])
def test_other_architectures(name: str) -> None:
    model: Any = LanguageModel(build(name))
    module: Any = model.load()
    blocks = [p for p, child in module.named_modules() if model.is_block(child)]
    place = blocks[1]
    scale = torch.linspace(-2, 2, 16)
    with model.edit() as edited:
        model.get(place).output[0].t[-1] *= scale
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]

    def change(hidden: torch.Tensor) -> None:
        hidden[:, -1] *= scale

    for ids in prompts:
        with edited.trace(ids) as tracer:
            found = tracer.output.logits.save()
        with hooked(module, {place: change}):
            expected = module(torch.tensor([ids])).logits
        close(found, expected)
    with edited.trace() as tracer:
        logits = []
        for ids in prompts:
            with tracer.invoke(ids):
                logits.append(tracer.output.logits.save())
    for ids, found in zip(prompts, logits, strict=True):
        with hooked(module, {place: change}):
            close(found, module(torch.tensor([ids])).logits)


def test_bf16(tiny: Tiny) -> None:
    module = copy.deepcopy(tiny.module).to(torch.bfloat16)
    model: Any = LanguageModel(module, tokenizer=tiny.model.tokenizer)
    vector = torch.randn(128)
    with model.edit() as edited:
        model.transformer.h[0].output[0][:] += vector.to(torch.bfloat16)
    with edited.trace(PROMPT):
        logits = model.lm_head.output.save()
    with hooked(module, {"transformer.h.0": lambda h: h.add_(vector.to(torch.bfloat16))}):
        assert torch.equal(logits.value, module(tiny.ids(PROMPT)).logits)


OPERATIONS: list[tuple[Callable[[Any], Any], Change]] = [
    (lambda h: h.__setitem__((slice(None), -1), 0), lambda h: h[:, -1].zero_()),
    (lambda h: h.mul_(2), lambda h: h.mul_(2)),
    (lambda h: h.t.__setitem__(1, 3.0), lambda h: h[:, 1].fill_(3.0)),
    (lambda h: h[..., 5:9].neg_(), lambda h: h[..., 5:9].neg_()),
    (lambda h: h.t[1:3].clamp_(-0.1, 0.1), lambda h: h[:, 1:3].clamp_(-0.1, 0.1)),
]


@pytest.mark.slow
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=3),
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 4), st.booleans()), min_size=1, max_size=5
    ),
)
def test_sweeps_on_edited_models_are_plain_hooks(tiny: Tiny, lasting: Any, variants: Any) -> None:
    model = tiny.model
    with model.edit() as edited:
        for layer, number in lasting:
            OPERATIONS[number][0](model.transformer.h[layer].output[0])
    found = []
    with edited.trace() as tracer:
        for layer, number, long in variants:
            with tracer.invoke(PROMPT if long else OTHER):
                OPERATIONS[number][0](model.transformer.h[layer].output[0])
                found.append(model.lm_head.output.save())
        with tracer.invoke(PROMPT):
            plain = model.lm_head.output.save()

    def changes(more: list[tuple[int, int]]) -> dict[str, Change]:
        by_layer: dict[str, list[Change]] = {}
        for layer, number in [*lasting, *more]:
            by_layer.setdefault(f"transformer.h.{layer}", []).append(OPERATIONS[number][1])

        def all_of(some: list[Change]) -> Change:
            return lambda hidden: [change(hidden) for change in some]

        return {path: all_of(some) for path, some in by_layer.items()}

    for (layer, number, long), logits in zip(variants, found, strict=True):
        close(logits, tiny.logits(PROMPT if long else OTHER, changes([(layer, number)])))
    close(plain, tiny.logits(PROMPT, changes([])))


def test_a_sweep_computes_the_common_prefix_once(tiny: Tiny) -> None:
    model = tiny.model
    with model.edit() as edited:
        model.transformer.h[0].output[0][:] *= 2
    rows: list[int] = []
    handle = tiny.module.transformer.h[1].mlp.register_forward_hook(
        lambda _m, _a, out: rows.append(out.shape[0])
    )
    try:
        with edited.trace() as tracer:
            found = []
            for position in range(6):
                with tracer.invoke(PROMPT):
                    model.transformer.h[3].output[0][:, position] = 0
                    found.append(model.lm_head.output.save())
    finally:
        handle.remove()
    assert sum(rows) == 1
    for position, logits in enumerate(found):
        changes: dict[str, Change] = {
            "transformer.h.0": lambda h: h.mul_(2),
            "transformer.h.3": lambda h, p=position: h[:, p].zero_(),  # type: ignore[misc]
        }
        close(logits, tiny.logits(PROMPT, changes))


def test_noise_of_an_edit_is_drawn_for_each_prompt(tiny: Tiny) -> None:
    model = tiny.model
    with model.edit() as edited:
        hidden = model.transformer.h[0].output[0]
        hidden[:] += torch.randn_like(hidden)
    with edited.trace() as tracer:
        found = []
        for position in (0, 1):
            with tracer.invoke(PROMPT):
                model.transformer.h[3].output[0][:, position] = 0
                found.append(model.transformer.h[1].output[0].save())
    assert not torch.allclose(found[0].value, found[1].value)


# ---------------------------------------------------------------- gradients, values, scans, experiments


def test_a_captured_parameter_is_trained(tiny: Tiny) -> None:
    model, vector = tiny.model, nn.Parameter(torch.zeros(128))
    with model.edit() as edited:
        model.transformer.h[1].output[0][:] += vector
    with edited.trace(PROMPT):
        model.lm_head.output[0, -1, 7].backward()
    found = vector.grad
    other = torch.zeros(128, requires_grad=True)
    handle = tiny.module.transformer.h[1].register_forward_hook(
        lambda _m, _a, out: (out[0] + other, *out[1:]) if isinstance(out, tuple) else out + other
    )
    tiny.module(tiny.ids(PROMPT)).logits[0, -1, 7].backward()
    handle.remove()
    tiny.module.zero_grad()
    torch.testing.assert_close(found, other.grad)


def test_values_on_demand_scans_and_experiments(tiny: Tiny) -> None:
    model = tiny.model
    with model.edit() as edited:
        model.transformer.h[0].output[0][:, -1] = 0
    with edited.trace(PROMPT):
        hidden = model.transformer.h[0].output[0]
        asked = bool(hidden[:, -1].abs().sum() == 0)
        hidden[:, 0] = 1
        logits = model.lm_head.output.save()
    assert asked

    def change(hidden: torch.Tensor) -> None:
        hidden[:, -1] = 0
        hidden[:, 0] = 1

    close(logits, tiny.logits(PROMPT, {"transformer.h.0": change}))
    with edited.scan(PROMPT):
        scanned = model.transformer.h[0].output[0].save()
    assert scanned.shape == (1, 8, 128) and scanned.is_meta
    with edited.trace(PROMPT) as tracer:
        model.lm_head.output.save()
    experiment = tracer.compile()
    expected = tiny.logits(OTHER, {"transformer.h.0": lambda h: h[:, -1].zero_()})
    torch.testing.assert_close(experiment(OTHER)[0], expected, rtol=1e-4, atol=1e-4)


def test_sessions(tiny: Tiny) -> None:
    model = tiny.model
    with model.edit() as edited:
        model.transformer.h[0].output[0][:] *= 2
    with model.session():
        with model.trace(PROMPT):
            clean = model.transformer.h[0].output[0]
        with edited.trace(PROMPT):
            ratio = (edited.transformer.h[0].output[0] / clean).save()
    torch.testing.assert_close(ratio.value, torch.full_like(ratio.value, 2.0))


# ---------------------------------------------------------------- attached modules


def test_an_attached_module_is_read_and_edited_inside(tiny: Tiny) -> None:
    model, coder = tiny.model, Coder()
    model.transformer.h[1].coder = coder
    with model.edit() as edited:
        block = model.transformer.h[1]
        block.output[0][:] = block.coder(block.output[0])
    with edited.trace() as tracer:
        with tracer.invoke(PROMPT):
            features = edited.transformer.h[1].coder.act.output.save()
            taken = edited.transformer.h[1].coder.input.save()
            plain = model.lm_head.output.save()
        with tracer.invoke(PROMPT):
            edited.transformer.h[1].coder.encoder.output[:, :, 3] = 50
            changed = model.lm_head.output.save()
            after = edited.transformer.h[1].coder.output.save()
        with tracer.invoke(OTHER):
            edited.transformer.h[1].coder.act.output[:] *= 0
            other = model.lm_head.output.save()
    kept: dict[str, torch.Tensor] = {}

    def first(hidden: torch.Tensor) -> None:
        kept.update(taken=hidden.clone(), features=coder.act(coder.encoder(hidden)))
        hidden.copy_(coder(hidden))

    close(plain, tiny.logits(PROMPT, {"transformer.h.1": first}))
    close(features, kept["features"])
    close(taken, kept["taken"])

    def second(hidden: torch.Tensor) -> None:
        code = coder.encoder(hidden)
        code[:, :, 3] = 50
        hidden.copy_(coder.decoder(coder.act(code)))
        kept["after"] = hidden.clone()

    close(changed, tiny.logits(PROMPT, {"transformer.h.1": second}))
    close(after, kept["after"])
    bias = coder.decoder.bias.detach()
    close(other, tiny.logits(OTHER, {"transformer.h.1": lambda h: h.copy_(bias.expand_as(h))}))
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in coder.modules())
    assert "coder" not in dict(tiny.module.transformer.h[1].named_children())


def test_an_attached_module_in_a_generation_and_twice_in_one_edit(tiny: Tiny) -> None:
    model, coder = tiny.model, Coder()
    model.coder = coder
    with model.edit() as edited:
        for layer in (0, 2):
            hidden = model.transformer.h[layer].output[0]
            hidden[:] = hidden + 0.1 * edited.coder(hidden)
    with edited.generate(PROMPT, max_new_tokens=4) as generator:
        with generator.all():
            edited.coder.output[:] *= 2
    assert generator.output.shape[0] == 1

    def change(factor: float) -> Change:
        return lambda h: h.copy_(h + 0.1 * factor * coder(h))

    places = {"transformer.h.0": change(2.0), "transformer.h.2": change(1.0)}
    assert generator.output.tolist() == tiny.generated(PROMPT, 4, places).tolist()


def test_calls_of_an_attached_module_in_a_plain_block(tiny: Tiny) -> None:
    model, coder = tiny.model, Coder()
    model.transformer.h[0].coder = coder
    with model.trace(PROMPT):
        hidden = model.transformer.h[0].output[0]
        out = model.transformer.h[0].coder(hidden).save()
        weight = (model.transformer.h[0].coder.decoder.weight.sum() + hidden.sum() * 0).save()
    with torch.no_grad():
        kept: dict[str, torch.Tensor] = {}
        tiny.logits(PROMPT, {"transformer.h.0": lambda h: kept.update(h=h.clone())})
        close(out, coder(kept["h"]))
        close(weight, coder.decoder.weight.sum())
    x = torch.randn(2, 128)
    torch.testing.assert_close(model.transformer.h[0].coder(x), coder(x))


def test_what_is_written_there_must_not_depend_on_the_result(tiny: Tiny) -> None:
    model = tiny.model
    model.transformer.h[0].coder = Coder()
    with model.edit() as edited:
        block = model.transformer.h[0]
        block.output[0][:] = block.coder(block.output[0])
    with (
        pytest.raises(OrderError, match=r"coder\.encoder\.output.*depends"),
        edited.trace(PROMPT),
    ):
        coder = edited.transformer.h[0].coder
        coder.encoder.output = coder.encoder.output + coder.output.sum()
        edited.lm_head.output.save()


def test_an_attached_module_that_is_not_called(tiny: Tiny) -> None:
    model = tiny.model
    model.transformer.h[0].coder = Coder()
    with pytest.raises(BlockError, match=r"coder\.output` is a place of an attached"):
        with model.trace(PROMPT):
            model.transformer.h[0].coder.output.save()
    del model.transformer.h[0].coder
    with pytest.raises(UnknownModuleError, match="coder"):
        _ = model.transformer.h[0].coder
    with pytest.raises(OperationError, match="nothing is attached"):
        del model.transformer.h[0].coder


@pytest.mark.parametrize("name", ["attn", "input", "get", "training"])
def test_names_that_are_taken(tiny: Tiny, name: str) -> None:
    with pytest.raises((OperationError, BlockError)):
        setattr(tiny.model.transformer.h[0], name, nn.Linear(2, 2))
    with pytest.raises(OperationError, match="part of the model"):
        tiny.model.lm_head = nn.Linear(2, 2)


# ---------------------------------------------------------------- files


def test_edits_are_saved_and_loaded(tiny: Tiny, tmp_path: Path) -> None:
    model, vector = tiny.model, torch.randn(128)
    model.transformer.h[1].coder = Coder()
    with model.edit() as edited:
        block = model.transformer.h[1]
        block.output[0][:] = block.coder(block.output[0])
        block.coder.act.output[..., 5] = 2.0
        model.transformer.h[0].output[0].t[2] += vector
    file = tmp_path / "edits"
    edited.save_edits(file)
    assert b"pickle" not in file.read_bytes()
    fresh: Any = LanguageModel("graftwork/tiny")
    with fresh.edit(inplace=True):
        fresh.transformer.h[3].output[0][:] *= 2
    fresh.load_edits(file)
    with fresh.trace() as tracer:
        with tracer.invoke(PROMPT):
            logits = fresh.lm_head.output.save()
            features = fresh.transformer.h[1].coder.act.output.save()
        with tracer.invoke(OTHER):
            fresh.transformer.h[1].coder.act.output[:] = 0
            other = fresh.lm_head.output.save()
    coder = Coder()
    kept: dict[str, torch.Tensor] = {}

    def second(factor: float) -> Change:
        def change(hidden: torch.Tensor) -> None:
            code = coder.act(coder.encoder(hidden))
            code[..., 5] = 2.0
            kept["features"] = code
            hidden.copy_(coder.decoder(code * factor))

        return change

    def first(hidden: torch.Tensor) -> None:
        hidden[:, 2] += vector

    def changes(factor: float) -> dict[str, Change]:
        return {
            "transformer.h.0": first,
            "transformer.h.1": second(factor),
            "transformer.h.3": lambda h: h.mul_(2),
        }

    close(logits, tiny.logits(PROMPT, changes(1.0)))
    close(features, kept["features"])
    close(other, tiny.logits(OTHER, changes(0.0)))
    with pytest.raises(EditError, match="attach it again"):
        fresh.transformer.h[1].coder(torch.zeros(1, 128))


def test_a_loaded_sequence_has_its_order(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny.model
    layers = [nn.Linear(128, 128, bias=False) for _ in range(11)]
    model.transformer.h[1].stack = nn.Sequential(*layers)
    with model.edit() as edited:
        block = model.transformer.h[1]
        block.output[0][:] = block.stack(block.output[0])
    edited.save_edits(tmp_path / "edits")
    fresh: Any = LanguageModel("graftwork/tiny")
    fresh.load_edits(tmp_path / "edits")
    with fresh.trace(PROMPT):
        third = fresh.transformer.h[1].stack[2].output.save()
        tenth = fresh.transformer.h[1].stack[9].output.save()
    kept: dict[str, torch.Tensor] = {}
    tiny.logits(PROMPT, {"transformer.h.1": lambda h: kept.update(h=h.clone())})
    with torch.no_grad():
        close(third, nn.Sequential(*layers[:3])(kept["h"]))
        close(tenth, nn.Sequential(*layers[:10])(kept["h"]))


def test_edits_that_do_not_fit_are_refused_and_change_nothing(tiny: Tiny, tmp_path: Path) -> None:
    model, file = tiny.model, tmp_path / "edits"
    with model.edit() as edited:
        model.transformer.h[1].output[0][:] += torch.ones(128)
    edited.save_edits(file)
    narrow: Any = LanguageModel(build("gpt2"))
    with pytest.raises(EditError, match=r"(?s)saved on GPT2LMHeadModel and do not fit .*128"):
        narrow.load_edits(file)
    llama: Any = LanguageModel(build("llama"))
    with pytest.raises(EditError, match=r"LlamaForCausalLM: it has no module `transformer\.h\.1`"):
        llama.load_edits(file)
    assert narrow._edits is None and llama._edits is None
    with model.trace(PROMPT) as tracer:
        model.lm_head.output.save()
    file.write_bytes(pack(tracer.graph))
    with pytest.raises(EditError, match="no edits"):
        model.load_edits(file)
    file.write_bytes(pack(tracer.graph, extra={"kind": "edits of a model"}))
    with pytest.raises(EditError, match="no edit has"):
        model.load_edits(file)
    file.write_bytes(b"\0" * 100)
    with pytest.raises(WireError):
        model.load_edits(file)
    with pytest.raises(EditError, match="no edits to save"):
        model.save_edits(file)
    with model.edit() as edited:
        model.transformer.h[1].output[0][:] = graftwork.apply(abs, model.transformer.h[1].output[0])
    with pytest.raises(WireError, match=r"test_edits\.py"):
        edited.save_edits(file)


# ---------------------------------------------------------------- what an edit is not


def test_what_has_no_meaning_without_a_prompt(tiny: Tiny) -> None:
    model = tiny.model
    with pytest.raises(BlockError, match="saved in an edit"), model.edit():
        model.transformer.h[0].output.save()
    with pytest.raises(StepError, match="edit has no prompt"), model.edit():
        model.transformer.h[0].output[0].sum().backward()
    with pytest.raises(NotRunError, match=r"graftwork\.apply"), model.edit():
        bool(model.transformer.h[0].output[0].sum() > 0)
    with pytest.raises(NotRunError, match="length"), model.edit():
        list(model.transformer.h[0].output[0])
    with pytest.raises(BlockError, match="Close the edit"), model.edit():
        with model.trace(PROMPT):
            pass
    with pytest.raises(BlockError, match="inside a block"), model.trace(PROMPT):
        with model.edit():
            pass
    with model.trace(PROMPT):
        logits = model.lm_head.output.save()
    close(logits, tiny.logits(PROMPT, {}))


def test_a_wrong_shape_is_refused_at_its_line_before_any_run() -> None:
    model: Any = LanguageModel("graftwork/tiny")
    with pytest.raises(ShapeError, match=re.escape("transformer.h.0.output")), model.edit():
        model.transformer.h[0].output = torch.zeros(7)
    assert not model.loaded and model._edits is None
    with pytest.raises(RuntimeError) as raised, model.edit(inplace=True):
        model.transformer.h[0].output[0][:] += torch.zeros(7)
    assert "test_edits.py" in str(raised.value).splitlines()[0]
    assert model._edits is None


def test_a_broken_edit_leaves_the_model_as_it_was(tiny: Tiny) -> None:
    with pytest.raises(ZeroDivisionError), tiny.model.edit(inplace=True) as model:
        model.transformer.h[0].output[0][:] = 0
        _ = 1 / 0
    with tiny.model.trace(PROMPT):
        logits = tiny.model.lm_head.output.save()
    close(logits, tiny.logits(PROMPT, {}))


def test_any_module() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model: Any = Model(module)
    with model.edit() as edited:
        model[0].output[:, 0] = 0
    x = torch.randn(3, 4)
    with edited.trace(x):
        out = edited.output.save()
    hidden = module[0](x)
    hidden[:, 0] = 0
    torch.testing.assert_close(out.value, module[2](module[1](hidden)).detach())


def test_a_file_that_cannot_be_read_or_written_is_one_sentence(tmp_path: Path) -> None:
    model = LanguageModel("graftwork/tiny")
    with pytest.raises(EditError, match=r"cannot be read from `.*nothing`: No such file"):
        model.load_edits(tmp_path / "nothing")
    with model.edit(inplace=True):
        model.transformer.h[1].mlp.output[:] = 0
    with pytest.raises(EditError, match=r"cannot be written to `.*`: No such file or directory"):
        model.save_edits(tmp_path / "no folder" / "file")
