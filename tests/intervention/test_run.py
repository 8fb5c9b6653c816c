"""One execution: when values are there, what they keep alive, and what the model feels of it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import graftwork
from graftwork import Model
from graftwork.tracing.errors import OrderError, ShapeError, StepError


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def module() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def hooks(module: nn.Module) -> int:
    return sum(
        len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules()
    )


def same(a: Any, b: Any) -> bool:
    return torch.allclose(a, b, atol=1e-6)


def test_a_saved_part_owns_no_more_than_itself(module: nn.Module) -> None:
    model: Any = Model(module)
    saved = []
    with model.trace() as tracer:
        for n in (1, 50):
            with tracer.invoke(torch.randn(n, 4)):
                saved += [model[0].output.save(), model[2].output[0].save(), model[2].input.save()]
    for value in saved:
        tensor = value.value
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_a_saved_value_is_what_it_was_at_that_line(module: nn.Module) -> None:
    model: Any = Model(module)
    x = torch.randn(2, 4)
    with model.trace(x):
        before = model[0].output.save()
        model[0].output[:, 0] = 7
        between = model[0].output.save()
        model[0].output *= 2
        after = model[0].output.save()
    clean = module[0](x)
    once = torch.cat([torch.full((2, 1), 7.0), clean[:, 1:]], 1)
    assert same(before.value, clean)
    assert same(between.value, once)
    assert same(after.value, once * 2)


def test_a_value_dies_after_its_last_use(module: nn.Module) -> None:
    model: Any = Model(module)
    seen: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def big(value: torch.Tensor) -> torch.Tensor:
        made = value.repeat(3, 1)
        seen.append(weakref.ref(made))
        return made

    def look(value: torch.Tensor) -> torch.Tensor:
        gc.collect()
        alive.append(seen[0]() is not None)
        return value

    with model.trace(torch.randn(2, 4)):
        made = graftwork.apply(big, model[0].output)
        total = made.sum()
        model[2].output[:] = model[2].output + total
        model[3].output[:] = graftwork.apply(look, model[3].output)
    assert alive == [False]


def test_a_value_that_is_needed_later_is_kept(module: nn.Module) -> None:
    model: Any = Model(module)
    x = torch.randn(2, 4)
    with model.trace(x):
        model[4].output[:] = model[4].output + model[0].output
        out = model.output.save()
    assert same(out.value, module(x) + module[0](x))


def test_nothing_is_changed_where_nothing_is_written(module: nn.Module) -> None:
    model: Any = Model(module)
    x = torch.randn(2, 4)
    expected = module(x)
    with model.trace(x) as tracer:
        (model[0].output * 0).save()
        model[2].output.relu().save()
        out = tracer.output.save()
    assert torch.equal(out.value, expected)


def test_a_module_applied_by_hand_is_not_a_call_of_the_forward(module: nn.Module) -> None:
    model: Any = Model(module)
    x = torch.randn(2, 4)
    with model.trace(x):
        by_hand = model[2](model[0].output).save()
        real = model[2].output.save()
        inner = graftwork.apply(lambda h: module[2](h) * 2, model[0].output).save()
    hidden = module[0](x)
    assert same(by_hand.value, module[2](hidden))
    assert same(real.value, module[2](torch.relu(hidden)))
    assert same(inner.value, module[2](hidden) * 2)


def test_a_block_inside_a_function_of_a_run_is_a_run_of_its_own(module: nn.Module) -> None:
    model: Any = Model(module)
    x, y = torch.randn(2, 4), torch.randn(3, 4)

    def another(value: torch.Tensor) -> torch.Tensor:
        with model.trace(y):
            inner = model[2].output.save()
        return value + inner.value.sum()

    with model.trace(x):
        model[0].output[:] = graftwork.apply(another, model[0].output)
        out = model[2].output.save()
    clean = module[2](module[1](module[0](y))).sum()
    assert same(out.value, module[2](torch.relu(module[0](x) + clean)))
    assert hooks(module) == 0


def test_a_model_that_catches_errors_does_not_catch_the_early_stop() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.after = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                x = self.inner(x)
            except Exception:
                x = x * 0
            ran.append(True)
            return self.after(x)

    ran: list[bool] = []
    model: Any = Model(Careful())
    with model.trace(torch.randn(2, 4)):
        value = model.inner.output.save()
    assert value.shape == (2, 4)
    assert ran == []


def test_the_inputs_of_the_root_are_edited(module: nn.Module) -> None:
    model: Any = Model(module)
    x = torch.randn(2, 4)
    with model.trace(x):
        model.input[:] = model.input * 2
        out = model.output.save()
    assert same(out.value, module(x * 2))


def test_the_users_own_tensors_are_not_written_to(module: nn.Module) -> None:
    model: Any = Model(module)
    x, vector = torch.randn(2, 4), torch.randn(4)
    before, kept = x.clone(), vector.clone()
    with model.trace(x):
        model.input[:] = 0
        model[0].output = model[0].output + vector
        model[0].output[:, 1] = 5
        model[2].output = vector.expand(2, 4)
        model[2].output[:, 0] = 9
        model.output.save()
    assert torch.equal(x, before)
    assert torch.equal(vector, kept)


def test_a_write_of_another_shape_names_its_line_and_leaves_no_hooks(module: nn.Module) -> None:
    model: Any = Model(module)
    with pytest.raises(ShapeError, match=r"(?s)# here.*\[2, 4\].*\[2, 5\]"):
        with model.trace(torch.randn(2, 4)):
            model[2].output = torch.zeros(2, 5)  # here
            model.output.save()
    assert hooks(module) == 0


def test_a_write_keeps_the_dtype_of_the_place(module: nn.Module) -> None:
    model: Any = Model(module)
    x = torch.randn(2, 4)
    with model.trace(x):
        model[0].output = model[0].output.double() * 2
        out = model[1].output.save()
    assert out.value.dtype == torch.float32
    assert same(out.value, torch.relu(module[0](x) * 2))


def test_a_later_value_of_one_forward_is_an_order_error(module: nn.Module) -> None:
    model: Any = Model(module)
    with pytest.raises(OrderError, match=r"(?s)# write.*`0\.output`.*`4\.output`.*# read"):
        with model.trace(torch.randn(2, 4)):
            late = model[4].output  # read
            model[0].output[:] = late  # write
    assert hooks(module) == 0


def test_one_value_that_is_missing_leaves_the_others() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x)

    model: Any = Model(Half())
    with model.trace(torch.randn(2, 4)):
        fine = model.a.output.save()
        missing = model.b.output.save()
        both = (model.a.output + model.b.output).save()
    assert fine.shape == (2, 4)
    for value in (missing, both):
        with pytest.raises(StepError, match="`b` was not called in this forward"):
            _ = value.value


def test_gradients_reach_a_captured_tensor_through_edits_of_several_prompts(
    module: nn.Module,
) -> None:
    model: Any = Model(module)
    xs = [torch.randn(2, 4), torch.randn(3, 4)]
    scales = [torch.full((4,), 1.5, requires_grad=True) for _ in xs]
    saved = []
    with model.trace() as tracer:
        for x, scale in zip(xs, scales, strict=True):
            with tracer.invoke(x):
                model[0].output = model[0].output * scale
                saved.append(model.output.save())
    sum(value.value.sum() for value in saved).backward()
    for x, scale in zip(xs, scales, strict=True):
        other = torch.full((4,), 1.5, requires_grad=True)
        hidden = module[0](x).detach() * other
        module[4](module[3](module[2](module[1](hidden)))).sum().backward()
        assert same(scale.grad, other.grad)
