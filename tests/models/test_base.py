"""Blocks on any torch module: tuples, keywords, several calls, modules that cannot be measured."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import graftwork
from graftwork import LanguageModel, Model
from graftwork.tracing.errors import (
    BlockError,
    LoadError,
    OperationError,
    OrderError,
    StepError,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def same(a: Any, b: Any) -> bool:
    return torch.allclose(a, b, atol=1e-5)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def count_forwards(module: nn.Module) -> list[int]:
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0]) if args else 0))
    return seen


def test_reads_and_edits_of_an_mlp() -> None:
    module = mlp()
    model: Any = Model(module)
    x = torch.randn(4, 6)
    with model.trace(x):
        hidden = model[1].output.save()
        model[2].output[:, 3] = 0
        out = model.output.save()
    first = module[1](module[0](x))
    second = module[2](first).detach()
    second[:, 3] = 0
    assert same(hidden.value, first)
    assert same(out.value, module[4](module[3](second)))


def test_many_prompts_share_a_forward_and_are_the_solo_ones() -> None:
    module = mlp()
    rows = count_forwards(module)
    model: Any = Model(module)
    xs = [torch.randn(n, 6) for n in (2, 1, 5)]
    saved = []
    with model.trace() as tracer:
        for i, x in enumerate(xs):
            with tracer.invoke(x):
                if i == 1:
                    model[0].output[:] = 0
                saved.append((model[2].output.save(), model.output.save()))
    assert rows == [8]
    for i, (x, (hidden, out)) in enumerate(zip(xs, saved, strict=True)):
        first = module[0](x) * (i != 1)
        expected = module[2](module[1](first))
        assert same(hidden.value, expected)
        assert same(out.value, module[4](module[3](expected)))


def test_prompts_of_different_shapes_run_apart() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    rows = count_forwards(module)
    model: Any = Model(module)
    xs = [torch.randn(2, 1, 8, 8), torch.randn(1, 1, 6, 9), torch.randn(3, 1, 8, 8)]
    saved = []
    with model.trace() as tracer:
        for x in xs:
            with tracer.invoke(x):
                assert tuple(model[0].output.shape) == (len(x), 4, x.shape[2] - 2, x.shape[3] - 2)
                saved.append((model[0].output.save(), model.output.save()))
    assert sorted(rows) == [1, 5]
    for x, (conv, out) in zip(xs, saved, strict=True):
        assert same(conv.value, module[0](x))
        assert same(out.value, module(x))


def test_a_later_block_may_have_other_shapes() -> None:
    model: Any = Model(nn.Sequential(nn.ReLU(), nn.ReLU()))
    for shape in ((2, 4), (3, 5, 6)):
        with model.trace(torch.randn(shape)):
            assert tuple(model[0].output.shape) == shape
            model[0].output.save()


class Recurrent(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, num_layers=2, batch_first=batch_first)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        out, _ = self.lstm(x, state)
        return self.head(out)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_recurrent_module_gives_its_tuple(batch_first: bool) -> None:
    module = Recurrent(batch_first)
    model: Any = Model(module)
    xs = [torch.randn(2, 5, 4), torch.randn(2, 5, 4)]
    saved = []
    with model.trace() as tracer:
        for x in xs:
            with tracer.invoke(x):
                out, (h, c) = model.lstm.output
                saved.append((out.save(), h.save(), c.save(), model.output.save()))
    for x, values in zip(xs, saved, strict=True):
        out, (h, c) = module.lstm(x)
        for value, expected in zip(values, (out, h, c, module(x)), strict=True):
            assert value.shape == expected.shape
            assert same(value.value, expected)


def test_an_edit_inside_a_nested_tuple() -> None:
    module = Recurrent(True)
    model: Any = Model(module)
    x = torch.randn(2, 5, 4)
    with model.trace(x):
        model.lstm.output[0][:, -1] = 0
        out = model.output.save()
    expected = module.lstm(x)[0].detach()
    expected[:, -1] = 0
    assert same(out.value, module.head(expected))


def test_tensors_without_a_common_batch_run_alone() -> None:
    module = Recurrent(True)
    model: Any = Model(module)
    x = torch.randn(3, 5, 4)
    state = (torch.randn(2, 3, 6), torch.randn(2, 3, 6))
    with model.trace() as tracer:
        with tracer.invoke(x, state):
            first = model.output.save()
        with tracer.invoke(x + 1, state=state):
            second = model.output.save()
    assert same(first.value, module(x, state))
    assert same(second.value, module(x + 1, state))


def test_modules_that_mix_rows_are_not_batched() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    model: Any = Model(module)
    xs = [torch.randn(3, 4), torch.randn(5, 4)]
    saved = []
    with model.trace() as tracer:
        for x in xs:
            with tracer.invoke(x):
                saved.append(model.output.save())
    for x, value in zip(xs, saved, strict=True):
        assert same(value.value, module(x))


class Structure(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@dataclasses.dataclass
class Record:
    total: torch.Tensor
    parts: list[torch.Tensor]


class Inner(nn.Module):
    def forward(self, a: torch.Tensor, *, scale: float, b: torch.Tensor) -> Structure:
        return Structure(a * scale, b + 1)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: torch.Tensor, y: torch.Tensor, flip: bool = False) -> Any:
        both = self.inner(x, scale=2.0, b=y)
        left, right = (both.right, both.left) if flip else both
        return Record(left + right, [left, right])


def test_several_inputs_keywords_and_structures() -> None:
    module = Outer()
    model: Any = Model(module)
    xs = [(torch.randn(2, 3), torch.randn(2, 3)), (torch.randn(1, 3), torch.randn(1, 3))]
    saved = []
    with model.trace() as tracer:
        for i, (x, y) in enumerate(xs):
            with tracer.invoke(x, y=y, flip=True):
                (first,), keywords = model.inner.inputs
                saved.append((first.save(), keywords["b"].save(), model.inner.output.left.save()))
                if i == 0:
                    model.inner.output.right[:] = 7
                saved[-1] += (model.output.total.save(), model.output.parts[0].save())
    for i, ((x, y), (a, b, left, total, part)) in enumerate(zip(xs, saved, strict=True)):
        right = torch.full_like(y, 7) if i == 0 else y + 1
        assert same(a.value, x) and same(b.value, y) and same(left.value, x * 2)
        assert same(total.value, x * 2 + right)
        assert same(part.value, right)


def test_an_input_given_by_keyword_is_edited() -> None:
    module = Outer()
    model: Any = Model(module)
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    with model.trace(x, y):
        keywords = model.inner.inputs[1]
        keywords["b"][:] = keywords["b"] * 3
        model.inner.input += 1
        total = model.output.total.save()
    assert same(total.value, (x + 1) * 2 + y * 3 + 1)


class Shared(nn.Module):
    """One layer is called three times; `again` is the same layer under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.again = self.layer
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.relu(self.again(torch.tanh(self.layer(x)))))


@pytest.mark.parametrize("many", [False, True])
def test_the_calls_of_one_forward_are_told_apart(many: bool) -> None:
    module = Shared()
    model: Any = Model(module)
    rows = count_forwards(module)
    xs = [torch.randn(2, 4) for _ in range(1 + many)]
    saved = []
    with model.trace() as tracer:
        for x in xs:
            with tracer.invoke(x):
                calls = [model.layer.calls[i].output.save() for i in (1, 0)]
                plain, again = model.layer.output.save(), model.again.output.save()
                saved.append((*calls, again, plain, model.again.input.save()))
    assert len(rows) == 1
    for x, (third, first, second, plain, inside) in zip(xs, saved, strict=True):
        one = module.layer(x)
        two = module.layer(torch.tanh(one))
        assert same(first.value, one) and same(plain.value, one)
        assert same(second.value, two) and same(inside.value, torch.tanh(one))
        assert same(third.value, module.layer(torch.relu(two)))


def test_an_edit_of_one_call_leaves_the_other_calls() -> None:
    module = Shared()
    model: Any = Model(module)
    x, z = torch.randn(2, 4), torch.randn(2, 4)
    with model.trace() as tracer:
        with tracer.invoke(x):
            model.again.output[:] = 5
            out = model.output.save()
        with tracer.invoke(z):
            other = model.output.save()
    assert same(out.value, module.layer(torch.full((2, 4), 5.0)))
    assert same(other.value, module(z))


def test_a_call_that_never_happens_is_an_error_of_that_value() -> None:
    model: Any = Model(Shared())
    with model.trace(torch.randn(2, 4)):
        fine = model.output.save()
        never = model.layer.calls[3].output.save()
        unused = model.unused.output.save()
    assert fine.shape == (2, 4)
    with pytest.raises(StepError, match="`layer` was not called 4 times"):
        _ = never.value
    with pytest.raises(StepError, match="`unused` was not called"):
        _ = unused.value


def test_a_write_to_a_module_that_is_not_called_is_an_error() -> None:
    module = Shared()
    model: Any = Model(module)
    with pytest.raises(StepError, match=r"(?s)test_base\.py.*`unused` was not called"):
        with model.trace(torch.randn(2, 4)):
            model.unused.output[:] = 0
            model.output.save()
    assert not module.layer._forward_hooks


# ---------------------------------------------------------------- no schedule


class Deciding(nn.Module):
    """What it does depends on the data, so no trial run on fake tensors can pass."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.how == "if" and x.sum() > 0:
            x = -x
        if self.how == "item":
            x = x * x.sum().item()
        if self.how == "numpy":
            x = x + torch.from_numpy(x.detach().numpy().copy())
        return self.second(x)


@pytest.mark.parametrize("how", ["if", "item", "numpy"])
def test_a_module_that_cannot_be_measured_runs_one_prompt_a_pass(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = Deciding(how)
    rows = count_forwards(module)
    model: Any = Model(module)
    xs = [torch.randn(2, 4), torch.randn(2, 4)]
    saved = []
    with caplog.at_level(logging.WARNING, "graftwork"), model.trace() as tracer:
        for i, x in enumerate(xs):
            with tracer.invoke(x):
                hidden = model.first.output
                if i == 0:
                    model.second.output[:] = model.second.output + 1
                saved.append((hidden.save(), model.output.save()))
    assert rows == [2, 2]
    assert "each prompt runs in a pass of its own" in caplog.text
    for i, (x, (hidden, out)) in enumerate(zip(xs, saved, strict=True)):
        assert same(hidden.value, module.first(x))
        assert same(out.value, module(x) + (i == 0))


def test_a_value_goes_forward_in_a_module_that_cannot_be_measured() -> None:
    module = Deciding("if")
    model: Any = Model(module)
    x = torch.randn(2, 4)
    with model.trace(x):
        model.second.output[:] = model.first.output
        out = model.output.save()
    assert same(out.value, module.first(x))


def test_a_value_cannot_go_backward_in_a_module_that_cannot_be_measured() -> None:
    module = Deciding("if")
    model: Any = Model(module)
    with pytest.raises(OrderError, match="the impossible line"):
        with model.trace(torch.randn(2, 4)):
            late = model.second.output
            model.first.output[:] = late  # the impossible line
    assert not module.first._forward_hooks and not module.second._forward_hooks


@pytest.mark.parametrize("source", ["first", "second"])
def test_a_value_of_another_prompt_in_a_module_that_cannot_be_measured(source: str) -> None:
    module = Deciding("if")
    model: Any = Model(module)
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    with model.trace() as tracer:
        with tracer.invoke(y):
            model.first.output[:] = 0
            before = model.output.save()
        with tracer.invoke(x):
            taken = getattr(model, source).output
        with tracer.invoke(y):
            model.second.output[:] = taken
            out = model.output.save()
    expected = module.first(x) if source == "first" else module(x)
    assert same(out.value, expected)
    assert same(before.value, module.second(torch.zeros(2, 4)))


def test_the_whole_batch_is_refused_where_prompts_run_apart() -> None:
    model: Any = Model(Deciding("if"))
    with pytest.raises(BlockError, match="prompts of this block cannot run together"):
        with model.trace() as tracer:
            for _ in range(2):
                with tracer.invoke(torch.randn(2, 4)):
                    model.first.output.save()
            with tracer.invoke():
                model.second.output.save()


class Selecting(nn.Module):
    """How many rows go through `inner` depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x[x[:, 0] > 0]  # as many rows as the data says
        return self.inner(kept).sum() + x


def test_a_module_with_shapes_of_the_data_runs_one_prompt_a_pass() -> None:
    module = Selecting()
    model: Any = Model(module)
    xs = [torch.randn(3, 1), torch.randn(4, 1)]
    saved = []
    with model.trace() as tracer:
        for x in xs:
            with tracer.invoke(x):
                saved.append((model.inner.output.save(), model.output.save()))
    for x, (inner, out) in zip(xs, saved, strict=True):
        assert same(inner.value, module.inner(x[x[:, 0] > 0]))
        assert same(out.value, module(x))


# ---------------------------------------------------------------- state, and what is refused


def test_gradients_flow_only_where_they_are_asked_for() -> None:
    module = mlp()
    module[0].weight.requires_grad_(False)
    model: Any = Model(module)
    x = torch.randn(4, 6)
    with model.trace(x):
        out = model.output.save()
    assert not out.value.requires_grad
    scale = torch.ones(8, requires_grad=True)
    with model.trace(x):
        model[1].output = model[1].output * scale
        out = model.output.save()
    out.value.sum().backward()
    assert scale.grad is not None
    assert [p.requires_grad for p in module.parameters()] == [False, True, True, True, True, True]


def test_gradients_of_an_input_that_asks_for_them() -> None:
    module = mlp()
    model: Any = Model(module)
    x = torch.randn(4, 6, requires_grad=True)
    with model.trace(x):
        model[1].output[:, 0] = 0
        out = model.output.save()
    out.value.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_scalars_and_objects_of_different_prompts_stay_apart() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, scale: torch.Tensor, table: Any) -> torch.Tensor:
            return x * scale + table[0]

    module = Scaled()
    model: Any = Model(module)
    x = torch.randn(2, 3)
    tables = [torch.arange(5000).numpy(), torch.arange(5000).numpy() + 3]
    saved = []
    with model.trace() as tracer:
        for i in range(3):
            with tracer.invoke(x, torch.tensor(float(i)), tables[i % 2]):
                saved.append(model.output.save())
    for i, value in enumerate(saved):
        assert same(value.value, module(x, torch.tensor(float(i)), tables[i % 2]))


def test_a_value_over_all_rows_is_each_prompts_own() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mean(x.mean()) * 0 + x

    module = Mean()
    model: Any = Model(module)
    xs = [torch.randn(2, 3), torch.randn(4, 3)]
    saved = []
    with model.trace() as tracer:
        for x in xs:
            with tracer.invoke(x):
                saved.append(model.mean.output.save())
    for x, value in zip(xs, saved, strict=True):
        assert same(value.value, x.mean())


def test_an_error_of_a_hook_leaves_no_hooks() -> None:
    module = mlp()
    model: Any = Model(module)
    with pytest.raises(RuntimeError, match="size of tensor"):
        with model.trace(torch.randn(4, 6)):
            (model[0].output + torch.zeros(9)).save()
    assert all(not child._forward_hooks for child in module.modules())
    with model.trace(torch.randn(4, 6)):
        out = model.output.save()
    assert out.shape == (4, 3)


def test_in_place_modules_do_not_change_what_was_saved() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    model: Any = Model(module)
    x = torch.randn(3, 4)
    with model.trace() as tracer:
        for part in (x[:1], x[1:]):
            with tracer.invoke(part):
                hidden = model[0].output.save()
                later = (model[0].output * 1 + model[2].output.sum()).save()
    assert same(hidden.value, module[0](x[1:]))
    expected = module[0](x[1:]) + module(x[1:]).sum()
    assert same(later.value, expected)


def test_only_modules_can_be_models() -> None:
    with pytest.raises(LoadError, match=r"takes a torch\.nn\.Module, not int"):
        Model(3)  # type: ignore[arg-type]


def test_a_name_gives_a_language_model() -> None:
    model: Any = Model("graftwork/tiny")
    assert isinstance(model, LanguageModel) and not model.loaded


def test_a_block_without_a_prompt_is_refused() -> None:
    model: Any = Model(mlp())
    with pytest.raises(BlockError, match="has no prompt"), model.trace():
        pass


def test_apply_sees_each_prompts_own_rows() -> None:
    model: Any = Model(mlp())
    shapes = []
    with model.trace() as tracer:
        for n in (2, 3):
            with tracer.invoke(torch.randn(n, 6)):
                shapes.append(graftwork.apply(lambda h: tuple(h.shape), model[0].output).save())
    assert [shape.value for shape in shapes] == [(2, 8), (3, 8)]


# ---------------------------------------------------------------- words of other libraries


def test_what_stands_in_for_a_block_of_other_libraries() -> None:
    model: Any = LanguageModel("graftwork/tiny")
    prompt = "Big Ben is in the city of"
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        logits = model.load()(ids).logits
        tokens = model.load().generate(ids, max_new_tokens=2, do_sample=False)
    torch.testing.assert_close(model.trace(prompt).output.logits, logits)
    torch.testing.assert_close(model.trace(prompt, trace=False).logits, logits)
    assert model.generate(prompt, max_new_tokens=2).output.tolist() == tokens.tolist()
    assert model.generate(prompt, max_new_tokens=2, trace=False).tolist() == tokens.tolist()
    with model.trace(prompt) as tracer:
        inside = tracer.result.logits.save()
    torch.testing.assert_close(inside.value, logits)
    with pytest.raises(BlockError, match="prompt"):
        model.trace(trace=False)
    with pytest.raises(OperationError, match=r"invoker\.next\(\)"):
        model.lm_head.next()
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        for _ in range(2):
            with tracer.invoke(prompt):
                last = model.lm_head.output.save()
                barrier()
    torch.testing.assert_close(last.value, logits)


def test_what_was_read_before_a_stop_is_computed_with_behind_it() -> None:
    model: Any = LanguageModel("graftwork/tiny")
    prompt = "Big Ben is in the city of"
    with model.trace(prompt) as tracer:
        hidden = model.transformer.h[1].output[0]
        shifted = hidden + 1
        tracer.stop()
        twice, more = (hidden * 2).save(), (shifted * 3).save()
        late = model.transformer.h[3].output.save()
    seen: list[torch.Tensor] = []
    handle = (
        model.load()
        .transformer.h[1]
        .register_forward_hook(
            lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    )
    try:
        with torch.no_grad():
            model.load()(torch.tensor([model.tokenizer(prompt)["input_ids"]]))
    finally:
        handle.remove()
    torch.testing.assert_close(twice.value, seen[0] * 2)
    torch.testing.assert_close(more.value, (seen[0] + 1) * 3)
    with pytest.raises(StepError, match="stopped"):
        _ = late.value


def test_a_view_whose_edits_were_not_recorded_to_the_end_is_refused() -> None:
    model: Any = LanguageModel("graftwork/tiny")
    views = []
    with pytest.raises(ValueError, match="on the way"):
        with model.edit() as edited:
            views.append(edited)
            model.transformer.h[1].output[0][:] = 0
            raise ValueError("on the way")
    uses = [
        lambda view: view.trace("a"),
        lambda view: view.generate("a", max_new_tokens=1),
        lambda view: view.edit(),
    ]
    for use in uses:
        with pytest.raises(BlockError, match=r"(?s)has no edits.*Record the edits again"):
            use(views[0])
    with model.trace("a"):
        model.lm_head.output.save()


def test_methods_that_change_the_module_give_the_model() -> None:
    module = mlp()
    model = Model(module)
    assert model.double() is model and module[0].weight.dtype == torch.float64
    with model.trace(torch.ones(1, 6, dtype=torch.float64)):
        out = model[0].output.save()
    assert out.dtype == torch.float64
    assert model.half().bfloat16().float() is model and module[0].weight.dtype == torch.float32
    assert model.train() is model and module.training
    assert model.eval().requires_grad_(False).cpu() is model
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    lazy = LanguageModel("graftwork/tiny")
    assert lazy.cpu().double() is lazy and lazy.loaded
    with lazy.trace("Big Ben"):
        logits = lazy.lm_head.output.save()
    assert logits.dtype == torch.float64


def test_a_sparse_output_is_computed_with_and_saved() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).relu().to_sparse()

    module, x, right = Sparse(), torch.randn(3, 4), torch.randn(4, 2)
    with Model(module).trace(x) as tracer:
        dense = tracer.output.to_dense().save()
        double = (tracer.output * 2).save()
        product = torch.sparse.mm(tracer.output, right).save()
        whole = tracer.output.save()
    expected = module(x).detach()
    assert torch.equal(dense, expected.to_dense())
    assert torch.equal(double.to_dense(), 2 * expected.to_dense())
    assert torch.equal(product, expected.to_dense() @ right)
    assert torch.equal(whole.to_dense(), expected.to_dense())
