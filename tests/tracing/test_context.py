"""Blocks: what they run, what they leave behind, and what they say when used wrongly."""

import asyncio
import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graftwork
from graftwork import GraftworkError, LanguageModel, Model
from graftwork.tracing import current_tracer

HERE = r"test_context\.py:\d+"


class EditsInPlace(nn.Module):
    """A model that goes on to change what its layers returned."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.two = nn.Identity()
        self.three = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.two(self.one(x))
        h += 100
        h.mul_(2)
        return self.three(h)


@pytest.fixture
def editing() -> Model:
    torch.manual_seed(0)
    return Model(EditsInPlace())


@pytest.fixture(autouse=True)
def _no_block_is_left_open() -> Iterator[None]:
    yield
    assert current_tracer() is None


def hidden_states(model: LanguageModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """What enters the blocks of a GPT-2, by plain hooks; transformers' own way leaves hooks."""
    module, found = model.load(), []
    handles = [
        module.transformer.drop.register_forward_hook(lambda _m, _a, out: found.append(out)),
        *(
            block.register_forward_hook(lambda _m, _a, out: found.append(out))
            for block in module.transformer.h
        ),
    ]
    with torch.no_grad():
        module(ids)
    for handle in handles:
        handle.remove()
    return found


# ------------------------------------------------------------------ order and ad-hoc modules


def test_reads_may_be_written_in_any_order(gpt2: LanguageModel, ids: torch.Tensor) -> None:
    plain = hidden_states(gpt2, ids)
    with gpt2.trace(ids):
        found = {i: gpt2.transformer.h[i].output[0].save() for i in (2, 0, 1)}
        embedded = gpt2.transformer.drop.output.save()
    assert torch.equal(embedded.value, plain[0])
    assert torch.equal(found[0].value, plain[1]) and torch.equal(found[1].value, plain[2])


def test_difference_of_a_later_and_an_earlier_value(gpt2: LanguageModel, ids: torch.Tensor) -> None:
    plain = hidden_states(gpt2, ids)
    with gpt2.trace(ids):
        moved = (gpt2.transformer.h[1].output[0] - gpt2.transformer.h[0].output[0]).save()
    assert torch.equal(moved.value, plain[2] - plain[1])


def test_module_is_applied_at_any_point_and_out_of_order(
    gpt2: LanguageModel, ids: torch.Tensor
) -> None:
    module = gpt2.load()
    with torch.no_grad():
        plain = module(ids).logits
        lens = [module.lm_head(module.transformer.ln_f(h)) for h in hidden_states(gpt2, ids)[1:3]]
    with gpt2.trace(ids) as tracer:
        late = gpt2.lm_head(gpt2.transformer.ln_f(gpt2.transformer.h[1].output[0])).save()
        early = gpt2.lm_head(gpt2.transformer.ln_f(gpt2.transformer.h[0].output[0])).save()
        logits = tracer.output.logits.save()
    assert torch.equal(early.value, lens[0]) and torch.equal(late.value, lens[1])
    assert torch.equal(logits.value, plain)


def test_module_applied_by_hand_fires_no_hooks_of_the_block(
    gpt2: LanguageModel, ids: torch.Tensor
) -> None:
    module = gpt2.load()
    hidden = hidden_states(gpt2, ids)
    with gpt2.trace(ids):
        block = gpt2.transformer.h[2]
        gpt2.transformer.h[0].output[0][:, 0] += 1
        again = block(gpt2.transformer.h[0].output[0] * 0)
        mlp = block.mlp.output.save()
        again = (again[0] if not isinstance(again, graftwork.tracing.Proxy) else again).save()
        block.mlp.output[:] += 0
    expected: list[torch.Tensor] = []

    def add(_m: Any, _a: Any, out: torch.Tensor) -> None:
        out[:, 0] += 1

    handles = [
        module.transformer.h[0].register_forward_hook(add),
        module.transformer.h[2].mlp.register_forward_hook(
            lambda _m, _a, out: expected.append(out.clone())
        ),
    ]
    with torch.no_grad():
        module(ids)
    for handle in handles:
        handle.remove()
    assert torch.equal(mlp.value, expected[0])
    with torch.no_grad():
        assert torch.equal(again.value, module.transformer.h[2](hidden[1] * 0))


def test_parameters_can_be_used_as_values(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x):
        used = (toy.mid.output @ toy.out.weight.T + toy.out.bias).save()
        direct = toy.out(toy.mid.output).save()
    torch.testing.assert_close(used.value, direct.value)


# ------------------------------------------------------------------ isolation and memory


def test_saved_value_is_not_changed_by_the_model(editing: Model, x: torch.Tensor) -> None:
    with torch.no_grad():
        expected = editing.load().one(x)
    with editing.trace(x) as tracer:
        h = editing.one.output
        whole, row, twice = h.save(), h[0].save(), h.view(-1, 8).save()
        through = editing.two.output.save()
        pair = (h, [h[:, 0]])
        nested = graftwork.apply(lambda p: p, pair).save()
        output = tracer.output.save()
    assert torch.equal(whole.value, expected) and torch.equal(row.value, expected[0])
    assert torch.equal(twice.value, expected.view(-1, 8)) and torch.equal(through.value, expected)
    assert torch.equal(nested.value[0], expected) and torch.equal(
        nested.value[1][0], expected[:, 0]
    )
    with torch.no_grad():
        assert torch.equal(output.value, editing.load()(x))


def test_saved_value_that_is_written_is_not_changed_by_the_model(
    editing: Model, x: torch.Tensor
) -> None:
    with editing.trace(x) as tracer:
        new = (editing.one.output * 3).save()
        editing.one.output = new
        again = editing.one.output.save()
        tracer.output.save()
    with torch.no_grad():
        expected = editing.load().one(x) * 3
    assert torch.equal(new.value, expected) and torch.equal(again.value, expected)


def test_saved_value_that_is_written_into_a_container_is_not_changed(x: torch.Tensor) -> None:
    class Returns(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 1, x + 2

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Returns()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = self.pair(x)
            a.zero_()
            return a + b.zero_()

    model = Model(Owner())
    with model.trace(x):
        new = (model.pair.output[0] * 3).save()
        model.pair.output[0] = new
        whole = model.pair.output.save()
        joined = (model.pair.output + (new,)).save()  # noqa: RUF005 - the concatenation is meant
        model.output.save()
    assert torch.equal(new.value, (x + 1) * 3)
    assert torch.equal(whole.value[0], (x + 1) * 3) and torch.equal(whole.value[1], x + 2)
    assert torch.equal(joined.value[1], x + 2) and torch.equal(joined.value[2], (x + 1) * 3)


def test_captured_tensor_that_is_written_is_not_changed_by_the_model(
    editing: Model, x: torch.Tensor
) -> None:
    value, part = torch.ones(2, 5, 8), torch.ones(5, 8)
    with editing.trace(x):
        editing.one.output = value
        editing.one.output[0] = part
        editing.output.save()
    assert torch.equal(value, torch.ones(2, 5, 8)) and torch.equal(part, torch.ones(5, 8))


def test_assigned_captured_tensor_alone_is_not_changed_by_the_model(
    editing: Model, x: torch.Tensor
) -> None:
    value = torch.ones(2, 5, 8)
    with editing.trace(x):
        editing.one.output = value
        after = (editing.output * 0 + value).save()
    assert torch.equal(value, torch.ones(2, 5, 8)) and torch.equal(after.value[0], value[0])


@pytest.mark.parametrize("kind", ["product", "view", "weight", "module", "applied"])
def test_value_used_after_it_was_written_is_not_changed_by_the_model(
    editing: Model, x: torch.Tensor, kind: str
) -> None:
    weight = editing.load().three.weight
    before = weight.detach().clone()
    with editing.trace(x[0, :, None]):
        h = editing.one.output
        value = {
            "product": lambda: h * 2,
            "view": lambda: (h * 2)[:],
            "weight": lambda: editing.three.weight[:5, None],
            "module": lambda: editing.two(h),
            "applied": lambda: graftwork.apply(lambda a: a, h * 2),
        }[kind]()
        editing.one.output = value
        early = value.save()
        late = (editing.output * 0 + value).save()
    assert torch.equal(early.value, late.value) and torch.equal(weight, before)


def test_input_tensor_is_not_changed_by_an_edit(toy: Model, x: torch.Tensor) -> None:
    before = x.clone()
    with toy.trace(x):
        toy.inp.input[:] = 0
        toy.input[:] = 1
        toy.output.save()
    assert torch.equal(x, before)


@pytest.mark.parametrize("part", ["row", "last", "transposed", "chunk", "expanded", "copy"])
def test_saved_part_does_not_keep_the_whole_alive(toy: Model, x: torch.Tensor, part: str) -> None:
    with toy.trace(x):
        h = toy.mid.output
        found = {
            "row": lambda: h[0],
            "last": lambda: h[:, -1],
            "transposed": lambda: h.mT[:, 0],
            "chunk": lambda: h.chunk(2, -1)[0],
            "expanded": lambda: h[:1, :1].expand(1, 2, 8)[:, 1],
            "copy": lambda: h + 1,
        }[part]().save()
    value = found.value
    assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_dropped_handle_frees_its_value_at_once(toy: Model, x: torch.Tensor) -> None:
    gc.disable()
    try:
        with toy.trace(x):
            h = toy.mid.output
            one, two = h.save(), (h * 2).save()
            toy.mid.output[:, 0] = 0
            third = toy.mid.output[0].save()
        del h
        seen = [weakref.ref(p.value) for p in (one, two, third)]
        del one
        assert seen[0]() is None and seen[1]() is not None
        del two, third
        assert [r() for r in seen] == [None] * 3
    finally:
        gc.enable()


def test_value_is_freed_after_its_last_use(toy: Model, x: torch.Tensor) -> None:
    gc.disable()
    alive: list[Any] = []
    counts: list[int] = []

    def watch(value: torch.Tensor) -> torch.Tensor:
        alive.append(weakref.ref(value))
        return value.sum()

    def count(value: torch.Tensor) -> torch.Tensor:
        counts.append(sum(r() is not None for r in alive))
        return value.sum()

    try:
        with toy.trace(x):
            big = toy.inp.output * 2
            total = graftwork.apply(watch, big)
            graftwork.apply(count, toy.act.output).save()
            total.save()
        assert counts == [0]
    finally:
        gc.enable()


def test_nothing_unneeded_runs(toy: Model, x: torch.Tensor) -> None:
    ran: list[str] = []

    def note(name: str, value: torch.Tensor) -> torch.Tensor:
        ran.append(name)
        return value

    with toy.trace(x):
        graftwork.apply(note, "unused", toy.mid.output)
        graftwork.apply(note, "used", toy.mid.output).save()
    assert ran == ["used"]


def test_gradients_are_off_unless_the_block_needs_them(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x):
        h = toy.mid.output.save()
        modes = graftwork.apply(lambda _: torch.is_grad_enabled(), toy.mid.output).save()
    assert not h.value.requires_grad and modes.value is False


def test_gradient_reaches_a_captured_parameter(toy: Model, x: torch.Tensor, reference: Any) -> None:
    steer = nn.Parameter(torch.full((8,), 0.5))
    with toy.trace(x):
        toy.inp.output[:, -1] += steer
        loss = toy.output.pow(2).mean().save()
    loss.value.backward()

    other = nn.Parameter(torch.full((8,), 0.5))

    def add(_m: Any, _a: Any, out: torch.Tensor) -> torch.Tensor:
        changed = out.clone()
        changed[:, -1] += other
        return changed

    handle = toy.load().inp.register_forward_hook(add)
    toy.load()(x).pow(2).mean().backward()
    handle.remove()
    torch.testing.assert_close(steer.grad, other.grad)


# ------------------------------------------------------------------ captured tensors


def test_captured_tensor_changed_before_the_run(toy: Model, x: torch.Tensor) -> None:
    vector = torch.ones(8)
    message = rf"{HERE}.*`vector` \(shape \[8\]\) was changed in place.*vector\.clone\(\)"
    with pytest.raises(GraftworkError, match=f"(?s){message}"):
        with toy.trace(x):
            (toy.mid.output + vector).save()
            vector += 1


def test_captured_tensor_changed_after_the_run_is_free(toy: Model, x: torch.Tensor) -> None:
    vector = torch.ones(8)
    with toy.trace(x):
        kept = (toy.mid.output * 0 + vector).save()
    vector += 1
    assert torch.equal(kept.value, torch.ones(2, 5, 8))


def test_captured_meta_tensor(toy: Model, x: torch.Tensor) -> None:
    empty = torch.empty(8, device="meta")
    with pytest.raises(GraftworkError, match=rf"`empty` has no data.*{HERE}"):
        with toy.trace(x):
            (toy.mid.output + empty).save()


def test_captured_array_is_taken_as_it_is_at_that_line(toy: Model, x: torch.Tensor) -> None:
    array = np.ones(8, dtype=np.float32)
    with toy.trace(x):
        kept = (toy.mid.output * 0 + array).save()
        array += 1
    assert torch.equal(kept.value, torch.ones(2, 5, 8))


def test_captured_lists_and_numbers(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x):
        h = toy.mid.output
        taken = h[[0, 1], [2, 3]].save()
        shaped = h.new_tensor([1.0, 2.0]).save()
        written = toy.mid.output
        written[:, [0, 1]] = torch.tensor([[1.0], [2.0]])
        after = written.save()
        whole = h.save()
    assert taken.value.shape == (2, 8) and shaped.value.tolist() == [1, 2]
    assert torch.equal(after.value[:, 0], torch.ones(2, 8))
    assert torch.equal(whole.value[:, 1], torch.full((2, 8), 2.0))


# ------------------------------------------------------------------ after the block


@pytest.fixture
def saved(toy: Model, x: torch.Tensor) -> Any:
    with toy.trace(x):
        h = toy.mid.output.save()
    return h


def test_saved_proxy_prints_as_its_value(saved: Any) -> None:
    value = saved.value
    assert isinstance(value, torch.Tensor)
    assert repr(saved) == repr(value) and str(saved) == str(value) and f"{saved}" == f"{value}"
    assert "saved" in repr(saved[0].sum()) or float(saved[0].sum()) == float(value[0].sum())


def test_saved_proxy_takes_part_in_arithmetic(saved: Any) -> None:
    v = saved.value
    pairs = [
        (saved + 1, v + 1),
        (1 - saved, 1 - v),
        (saved * saved, v * v),
        (v / saved, v / v),
        (2**saved, 2**v),
        (saved @ v.mT, v @ v.mT),
        (v @ saved.mT, v @ v.mT),
        (-saved, -v),
        (abs(saved), v.abs()),
        (saved > 0, v > 0),
        (v > saved, v > v),
        (saved == v, v == v),
        (saved[0], v[0]),
        (saved[:, -1, None], v[:, -1, None]),
        (saved[saved > 0], v[v > 0]),
        (v[saved > 0], v[v > 0]),
        (saved.mean(-1), v.mean(-1)),
        (saved.topk(2).values, v.topk(2).values),
        (saved.T.contiguous() if v.ndim == 2 else saved.mT, v.mT),
        (torch.softmax(saved, -1), torch.softmax(v, -1)),
        (torch.cat([saved, v]), torch.cat([v, v])),
        (torch.stack([saved, saved]), torch.stack([v, v])),
        (torch.where(saved > 0, saved, 0), torch.where(v > 0, v, 0)),
        (torch.einsum("btd,bsd->bts", saved, saved), torch.einsum("btd,bsd->bts", v, v)),
        (F.layer_norm(saved, (8,)), F.layer_norm(v, (8,))),
        (nn.Identity()(saved) * 1, v),
        (torch.as_tensor(saved.value), v),
    ]
    for found, expected in pairs:
        assert type(found) is torch.Tensor and torch.equal(found, expected)
    assert torch.equal(saved, v) and torch.allclose(v, saved)
    torch.testing.assert_close(saved.value, v)


def test_saved_proxy_describes_itself_as_its_value(saved: Any) -> None:
    assert saved.shape == (2, 5, 8) and saved.dtype == torch.float32 and saved.ndim == 3
    assert saved.device == torch.device("cpu") and saved.size(0) == 2 and saved.dim() == 3
    assert len(saved) == 2 and saved.numel() == 80 and not saved.requires_grad
    assert "save" in dir(saved) and "softmax" in dir(saved)


def test_saved_proxy_iterates(saved: Any) -> None:
    assert [row.shape for row in saved] == [(5, 8), (5, 8)]
    a, b = saved
    assert torch.equal(torch.stack([a, b]), saved.value)
    assert all(torch.equal(p, q) for p, q in zip(saved, saved.value, strict=True))


def test_saved_proxy_goes_to_numpy(saved: Any) -> None:
    v = saved.value.numpy()
    for array in (np.asarray(saved), np.array(saved), saved.numpy(), saved.cpu().numpy()):
        assert isinstance(array, np.ndarray) and np.array_equal(array, v)
    assert np.array(saved, dtype=np.float64).dtype == np.float64
    copied = np.array(saved)
    copied[:] = 0
    assert saved.value.abs().sum() > 0
    assert np.array_equal(np.add(saved, 1), v + 1)
    assert np.array_equal(np.exp(saved), np.exp(v))
    assert np.array_equal(v + saved, v + v) and np.array_equal(saved + v, v + v)
    assert np.allclose(saved, v)
    assert np.stack([saved, saved]).shape == (2, 2, 5, 8)


def test_saved_scalars_are_numbers(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x):
        total = toy.mid.output.sum().save()
        index = toy.mid.output[0, 0].argmax().save()
        flag = (toy.mid.output > -100).all().save()
    value = total.value
    assert float(total) == value.item() == total.item()
    assert int(total) == int(value) and complex(total) == complex(value)
    assert f"{total:.3f}" == f"{value.item():.3f}" and round(float(total), 2)
    assert [10, 20, 30, 40, 50, 60, 70, 80][index] == 10 * (int(index) + 1)
    assert "abcdefgh"[index] and list(range(8))[: index.item()] is not None
    assert bool(flag) and (1 if flag else 2) == 1 and flag
    assert index in (0, 1, 2, 3, 4, 5, 6, 7) and index.tolist() == int(index)


def test_saved_proxy_is_copied_and_pickled_as_its_value(saved: Any) -> None:
    for copied in (
        copy.deepcopy(saved),
        copy.copy(saved),
        pickle.loads(pickle.dumps(saved)),
        copy.deepcopy({"h": [saved]})["h"][0],
    ):
        assert type(copied) is torch.Tensor and torch.equal(copied, saved.value)


def test_saved_proxy_goes_through_torch_save(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x):
        h, pair, keyed = toy.mid.output.save(), toy.tup.output.save(), toy.dic.output.save()
    file = io.BytesIO()
    torch.save({"h": [h]}, file)
    file.seek(0)
    loaded = torch.load(file)["h"][0]
    assert type(loaded) is torch.Tensor and torch.equal(loaded, h.value)
    file = io.BytesIO()
    torch.save([pair, keyed], file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again[0][1], pair.value[1])
    assert torch.equal(again[1]["other"], keyed.value["other"])


def test_saved_structures_behave_as_structures(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x):
        pair, record, keyed = toy.tup.output.save(), toy.rec.output.save(), toy.dic.output.save()
    a, b = pair
    assert torch.equal(a, pair.value[0]) and torch.equal(pair[-1], b) and len(pair) == 2
    assert record.note == "as it is" and torch.equal(record.hidden, record.value.hidden)
    assert list(keyed) == ["hidden", "other"] and "hidden" in keyed
    assert next(iter(keyed.items()))[0] == "hidden" and keyed.get("no") is None


def test_saved_proxy_is_changed_in_place_as_a_tensor(saved: Any) -> None:
    before = saved.value.clone()
    saved[:, 0] = 0
    saved.add_(1)
    saved *= 2
    before[:, 0] = 0
    assert torch.equal(torch.as_tensor(np.asarray(saved)), (before + 1) * 2)


def test_saved_proxy_is_a_constant_in_a_later_block(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x):
        h = toy.mid.output.save()
        mask = (toy.mid.output > 0).save()
    with toy.trace(x * 0):
        toy.mid.output = h
        toy.mid.output[:, 0] += h[:, 0]
        toy.mid.output[mask] = 0
        swapped = toy.mid.output.save()
        inner = torch.cat([h, toy.mid.output]).save()
    expected = h.value.clone()
    expected[:, 0] += expected[:, 0].clone()
    expected[mask.value] = 0
    assert torch.equal(swapped.value, expected)
    assert torch.equal(inner.value, torch.cat([h.value, expected]))


def test_saved_values_live_in_lists_and_dicts(gpt2: LanguageModel, ids: torch.Tensor) -> None:
    with gpt2.trace(ids):
        layers = [block.output[0].save() for block in gpt2.transformer.h]
        named = {"first": layers[0], "sum": sum(layers).save()}
    stacked = torch.stack(layers)
    assert stacked.shape == (3, 2, 7, 64)
    torch.testing.assert_close(stacked.sum(0), named["sum"].value)


def test_unsaved_value_says_where_to_save_it(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x):
        h = toy.mid.output
        h.save()
        other = toy.inp.output * 2
    message = rf"(?s)was not saved.*Add `\.save\(\)`.*{HERE}.*other = toy\.inp\.output \* 2"
    for use in (
        lambda: other.value,
        lambda: other + 1,
        lambda: other.shape,
        lambda: torch.sum(other),
        lambda: other[0],
        lambda: list(other),
        lambda: float(other),
        lambda: np.asarray(other),
        lambda: f"{other:.2f}",
        lambda: bool(other),
        lambda: other.mean(),
        lambda: copy.deepcopy(other),
        lambda: other.save(),
        lambda: len(other),
    ):
        with pytest.raises(GraftworkError, match=message):
            use()
    assert "recorded at" in repr(other)


def test_value_read_inside_the_block(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x):
        h = toy.mid.output.save()
        with pytest.raises(GraftworkError, match=rf"still recording.*{HERE}"):
            h.value


def test_block_left_by_an_exception_runs_nothing(toy: Model, x: torch.Tensor) -> None:
    calls: list[int] = []
    handle = toy.load().register_forward_pre_hook(lambda *_: calls.append(1))
    tracer = toy.trace(x)
    with pytest.raises(ZeroDivisionError):
        with tracer:
            h = toy.mid.output.save()
            toy.mid.output[:] = 0
            1 / 0
    assert calls == []
    handle.remove()
    with pytest.raises(GraftworkError, match="left by an exception, so nothing ran"):
        h.value
    with pytest.raises(GraftworkError, match="left by an exception"):
        tracer.output


def test_return_inside_a_block_runs_it(toy: Model, x: torch.Tensor) -> None:
    def last() -> Any:
        with toy.trace(x):
            return toy.mid.output[:, -1].save()

    assert last().value.shape == (2, 8)


def test_break_out_of_a_block_runs_it(toy: Model, x: torch.Tensor) -> None:
    for _ in range(3):
        with toy.trace(x):
            h = toy.mid.output.save()
            break
    assert h.value.shape == (2, 5, 8)


def test_block_with_nothing_to_do(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x):
        pass
    with toy.trace(x):
        toy.mid.output


# ------------------------------------------------------------------ blocks used wrongly


def test_invoke_inside_an_invoke(toy: Model, x: torch.Tensor) -> None:
    with pytest.raises(GraftworkError, match="invoke was opened inside another invoke"):
        with toy.trace() as tracer:
            with tracer.invoke(x):
                with tracer.invoke(x):
                    pass


def test_invoke_in_a_block_that_has_its_prompt(toy: Model, x: torch.Tensor) -> None:
    with pytest.raises(GraftworkError, match="already has its prompt"):
        with toy.trace(x) as tracer:
            with tracer.invoke(x):
                pass


def test_block_inside_a_block(toy: Model, x: torch.Tensor) -> None:
    with pytest.raises(GraftworkError, match="block was opened inside another block"):
        with toy.trace(x):
            with toy.trace(x):
                pass


def test_a_block_whose_with_is_never_left_is_named_and_can_be_closed(
    toy: Model, x: torch.Tensor
) -> None:
    def waits() -> Iterator[None]:
        with toy.trace(x):
            yield

    waiting = waits()
    next(waiting)
    for opens in (toy.trace, toy.scan):
        with pytest.raises(GraftworkError, match=HERE + r".*toy\.trace\(x\)(.|\n)*reset\(\)"):
            with opens(x):
                pass
    for other in (toy.session, toy.edit):
        with pytest.raises(GraftworkError, match=HERE + r".*toy\.trace\(x\)(.|\n)*reset\(\)"):
            with other():
                pass
    graftwork.reset()
    assert current_tracer() is None
    with toy.trace(x):
        found = toy.mid.output.save()
    assert found.shape == toy.load().mid(x).shape
    with pytest.raises(GraftworkError, match=r"closed by `graftwork\.reset\(\)`.*has not run"):
        next(waiting)

    opened = [toy.trace(x), toy.session(), toy.edit()]
    for block in opened:
        block.__enter__()
        graftwork.reset()
        with toy.trace(x):
            again = toy.mid.output.save()
        assert torch.equal(again.value, found.value)
        block.__exit__(KeyError, KeyError(), None)
    session = toy.session()
    session.__enter__()
    toy.trace(x).__enter__()
    graftwork.reset()
    graftwork.reset()
    with toy.trace(x):
        pass


def test_a_generator_that_is_closed_elsewhere_leaves_no_block_open(
    toy: Model, x: torch.Tensor
) -> None:
    def waits() -> Iterator[None]:
        with toy.trace(x):
            yield

    waiting = waits()
    next(waiting)
    thread = threading.Thread(target=waiting.close)
    thread.start()
    thread.join()
    with toy.trace(x):
        found = toy.mid.output.save()
    assert found.value.shape[0] == x.shape[0]


def test_a_task_outlives_the_block_that_it_was_started_in(toy: Model, x: torch.Tensor) -> None:
    async def later() -> torch.Tensor:
        with pytest.raises(GraftworkError, match="only known inside a block"):
            toy.mid.output
        with toy.trace(x):
            found = toy.mid.output.save()
        return found.value

    async def main() -> torch.Tensor:
        with toy.trace(x):
            task = asyncio.create_task(later())
        return await task

    with toy.trace(x):
        expected = toy.mid.output.save()
    assert torch.equal(asyncio.run(main()), expected.value)


def test_what_a_session_left_open_ends_with_it(toy: Model, x: torch.Tensor) -> None:
    def waits() -> Iterator[Any]:
        with toy.trace(x):
            yield toy.mid.output.save()

    with toy.session():
        waiting = waits()
        lost = next(waiting)
    assert current_tracer() is None
    with pytest.raises(GraftworkError, match="nothing ran"):
        lost.value
    with toy.trace(x):
        pass


def test_no_invoke_is_open(toy: Model, x: torch.Tensor) -> None:
    with pytest.raises(GraftworkError, match=r"`mid\.output` was used in a block but in no invoke"):
        with toy.trace():
            toy.mid.output.save()


def test_block_without_a_prompt(toy: Model) -> None:
    with pytest.raises(GraftworkError, match="The block has no prompt"):
        with toy.trace():
            pass


def test_closed_block_is_not_used_again(toy: Model, x: torch.Tensor) -> None:
    tracer = toy.trace(x)
    with tracer:
        toy.mid.output.save()
    with pytest.raises(GraftworkError, match="block that is closed"), tracer:
        pass
    with pytest.raises(GraftworkError, match="`invoke` was called on a block that is closed"):
        tracer.invoke(x)


def test_next_in_a_trace(toy: Model, x: torch.Tensor) -> None:
    with pytest.raises(GraftworkError, match="`next\\(\\)` was called in a trace"):
        with toy.trace() as tracer:
            with tracer.invoke(x) as invoker:
                invoker.next()


def test_output_of_a_trace_that_did_not_use_it(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x) as tracer:
        toy.mid.output.save()
    with pytest.raises(GraftworkError, match=r"was not asked for.*tracer\.output\.save"):
        tracer.output


def test_place_used_outside_a_block(toy: Model) -> None:
    with pytest.raises(GraftworkError, match=r"`mid\.output` is only known inside a block"):
        toy.mid.output
    with pytest.raises(GraftworkError, match=r"`mid\.output` is only known inside a block"):
        toy.mid.output = 1


def test_place_of_another_model(toy: Model, editing: Model, x: torch.Tensor) -> None:
    with pytest.raises(GraftworkError, match="`one` belongs to another model"):
        with toy.trace(x):
            editing.one.output.save()


def test_unsaved_proxy_of_another_block(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x):
        lost = toy.mid.output
    with toy.trace(x):
        with pytest.raises(
            GraftworkError, match=rf"(?s)comes from another block and was not saved.*{HERE}"
        ):
            toy.mid.output + lost


def test_proxy_of_another_block_that_is_still_open(
    toy: Model, editing: Model, x: torch.Tensor
) -> None:
    found: list[Any] = []

    def other() -> None:
        with editing.trace(x):
            h = editing.one.output
            h.save()
            found.append(h)
            opened.set()
            done.wait(10)

    opened, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    opened.wait(10)
    try:
        with toy.trace(x):
            with pytest.raises(GraftworkError, match="another block, which has not run"):
                toy.mid.output + found[0]
    finally:
        done.set()
        thread.join()


def test_saved_proxy_of_another_model(toy: Model, editing: Model, x: torch.Tensor) -> None:
    with editing.trace(x):
        other = editing.one.output.save()
    with toy.trace(x):
        toy.mid.output = other
        found = toy.mid.output.save()
    assert torch.equal(found.value, other.value)


def test_run_that_fails_leaves_no_hooks_and_says_so(toy: Model, x: torch.Tensor) -> None:
    def fail(_: Any) -> Any:
        raise KeyError("by the user")

    with pytest.raises(KeyError) as caught:
        with toy.trace(x):
            early = toy.inp.output.save()
            graftwork.apply(fail, toy.mid.output).save()
            late = toy.out.output.save()
    assert any("test_context.py" in note for note in caught.value.__notes__)
    assert early.value.shape == (2, 5, 8)  # it was there when the run failed
    with pytest.raises(GraftworkError, match="the run failed before it was reached"):
        late.value


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_hooks_are_gone_after_any_failure(toy: Model, x: torch.Tensor, error: Any) -> None:
    def fail(_: Any) -> Any:
        raise error

    with pytest.raises(error):
        with toy.trace(x):
            graftwork.apply(fail, toy.mid.output).save()
            toy.out.output.save()
    with toy.trace(x):
        assert toy.mid.output.save() is not None


# ------------------------------------------------------------------ errors with the user's line


def test_error_inside_torch_names_the_line(toy: Model, x: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        with toy.trace(x):
            wrong = toy.mid.output @ torch.zeros(3, 3)  # the line
            wrong.save()
    said = str(caught.value).splitlines()[0]
    assert "the line" in said and "test_context.py" in said and "matmul" in str(caught.value)


def helper(value: Any) -> Any:
    return value.view(7, 7)  # in a helper


class Foreign(nn.Module):
    def forward(self, value: Any) -> Any:
        return F.linear(value, torch.zeros(3, 3))  # in a forward


@pytest.mark.parametrize(
    ("function", "line"), [(helper, "in a helper"), (Foreign(), "in a forward")]
)
def test_error_recorded_in_the_users_function_names_that_line(
    toy: Model, x: torch.Tensor, function: Any, line: str
) -> None:
    with pytest.raises(RuntimeError) as caught:
        with toy.trace(x):
            function(toy.mid.output).save()
    assert line in str(caught.value).splitlines()[0]


def test_error_recorded_by_a_torch_module_names_its_call(toy: Model, x: torch.Tensor) -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(RuntimeError) as caught:
        with toy.trace(x):
            layer(toy.mid.output).save()  # the call
    assert "the call" in str(caught.value).splitlines()[0]


@pytest.mark.parametrize("kind", ["assign", "slice", "tuple", "view", "add"])
def test_wrong_shape_in_a_write_names_its_line(toy: Model, x: torch.Tensor, kind: str) -> None:
    bad = torch.zeros(3, 7)
    with pytest.raises((GraftworkError, RuntimeError)) as caught:
        with toy.trace(x):
            if kind == "assign":
                toy.mid.output = bad  # the write
            elif kind == "slice":
                toy.mid.output[:, 0] = bad  # the write
            elif kind == "tuple":
                toy.tup.output[0] = bad  # the write
            elif kind == "view":
                toy.mid.output.view(10, 8)[0] = bad  # the write
            else:
                toy.mid.output += bad  # the write
            toy.output.save()
    said = str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))
    assert "the write" in said


def test_structure_that_does_not_fit_names_its_line(toy: Model, x: torch.Tensor) -> None:
    with pytest.raises(GraftworkError, match=r"(?s)^.*# the write`\n.*`tup\.output` does not fit"):
        with toy.trace(x):
            toy.tup.output = toy.inp.output  # the write
            toy.output.save()


def test_misspelt_method(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x):
        with pytest.raises(GraftworkError, match=r"`nrom` is no method.*`norm`"):
            toy.mid.output.nrom()
        with pytest.raises(GraftworkError, match=r"is a value and cannot be called"):
            toy.mid.output(x)
        with pytest.raises(GraftworkError, match=r"not applied"):
            toy.mid.output + toy.mid.output.sum


def test_misspelt_field_says_what_there_is(toy: Model, x: torch.Tensor) -> None:
    with pytest.raises(AttributeError, match=r"no attribute `meen`\. Did you mean `mean`"):
        with toy.trace(x):
            toy.mid.output.meen.save()


def test_function_that_changes_its_argument(toy: Model, x: torch.Tensor) -> None:
    def spoil(value: torch.Tensor) -> torch.Tensor:
        return value.add_(1)

    with pytest.raises(GraftworkError, match=rf"(?s){HERE}.*`spoil` changed its argument in place"):
        with toy.trace(x):
            graftwork.apply(spoil, toy.mid.output).save()


def test_function_that_uses_a_value_it_was_not_given(toy: Model, x: torch.Tensor) -> None:
    with pytest.raises(GraftworkError, match=rf"was not given it.*Pass it as an argument.*{HERE}"):
        with toy.trace(x):
            other = toy.inp.output
            graftwork.apply(lambda value: value + other, toy.mid.output).save()


def test_function_may_run_the_model_without_disturbing_the_block(
    toy: Model, x: torch.Tensor
) -> None:
    module = toy.load()

    def other(_: torch.Tensor) -> torch.Tensor:
        module.out(x * 2)
        with toy.trace(x * 3):
            inner = toy.out.output.save()
        return inner.value

    with torch.no_grad():
        hidden = module.act(module.mid(module.inp(x)))
        triple = module.act(module.mid(module.inp(x * 3)))
        expected, nested = module.out(hidden), module.out(triple)
    with toy.trace(x):
        inner = graftwork.apply(other, toy.inp.output).save()
        found = toy.out.output.save()
    assert torch.equal(inner.value, nested) and torch.equal(found.value, expected)


def test_apply_outside_a_block_is_the_call_itself(saved: Any) -> None:
    assert torch.equal(graftwork.apply(lambda v, k: v * k, saved, k=2), saved.value * 2)


def test_write_that_needs_a_later_value(toy: Model, x: torch.Tensor) -> None:
    message = (
        r"(?s)# the write`\n.*computed later.*written: .*`inp\.output`"
        r".*needs:.*`out\.output`.*late ="
    )
    with pytest.raises(GraftworkError, match=message):
        with toy.trace(x):
            late = toy.out.output
            toy.inp.output[:] = late  # the write
            toy.output.save()


# ------------------------------------------------------------------ threads and tasks


def test_threads_do_not_see_each_others_blocks(toy: Model, x: torch.Tensor) -> None:
    expected = {}
    for i in range(4):
        with toy.trace(x * i):
            expected[i] = toy.mid.output.save()
    found: dict[int, Any] = {}
    errors: list[BaseException] = []
    barrier = threading.Barrier(4)

    def work(i: int) -> None:
        try:
            for _ in range(5):
                with toy.trace(x * i):
                    barrier.wait(10)
                    h = toy.mid.output.save()
                    toy.mid.output[:] = 0
                found[i] = h.value
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(torch.equal(found[i], expected[i].value) for i in range(4))


def test_tasks_do_not_see_each_others_blocks(toy: Model, x: torch.Tensor) -> None:
    async def work(i: int) -> torch.Tensor:
        with toy.trace(x * i):
            await asyncio.sleep(0)
            h = toy.mid.output
            await asyncio.sleep(0)
            h = (h * 1).save()
        return h.value

    async def both() -> list[torch.Tensor]:
        return await asyncio.gather(work(1), work(2), work(3))

    found = asyncio.run(both())
    with torch.no_grad():
        for i, value in enumerate(found, 1):
            assert torch.equal(value, toy.load().mid(toy.load().inp(x * i)))


def test_block_shows_what_it_is(toy: Model, x: torch.Tensor) -> None:
    tracer = toy.trace(x)
    assert (
        repr(tracer) == "<trace block that is not open: write `with model.trace(...) as tracer:`>"
    )
    with tracer:
        toy.mid.output.sum().save()
        assert repr(tracer) == "<trace block, open: 1 prompts, 2 operations>"
    assert repr(tracer) == "<trace block, done: 1 prompts, 2 operations>"


def test_failed_run_keeps_no_value_until_the_garbage_collector_comes(
    toy: Model, x: torch.Tensor
) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def note(value: torch.Tensor) -> torch.Tensor:
        doubled = value * 2
        seen.append(weakref.ref(doubled))
        return doubled

    def fail(value: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError), toy.trace(x):
            early = graftwork.apply(note, toy.inp.output)
            late = graftwork.apply(fail, toy.mid.output)
            (early + late).sum().save()  # `early` waits for `late`
        assert seen[0]() is None
    finally:
        gc.enable()
