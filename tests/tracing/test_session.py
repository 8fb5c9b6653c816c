"""Sessions: several blocks that run at the end, compared with plain torch hooks."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import graftwork
from graftwork import GraftworkError, LanguageModel, Model

MID = "transformer.h.1"
ONE, TWO = torch.arange(6)[None] + 5, torch.arange(6)[None] + 40


def plain(module: Any, ids: torch.Tensor, path: str, hooks: dict[str, Any] | None = None) -> Any:
    """What a module returns, with plain hooks that edit."""
    seen: list[Any] = []
    handles = [
        module.get_submodule(name).register_forward_hook(lambda _m, _a, out, f=f: f(out))
        for name, f in (hooks or {}).items()
    ]
    handles.append(
        module.get_submodule(path).register_forward_hook(lambda _m, _a, out: seen.append(out))
    )
    try:
        with torch.no_grad():
            module(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0].clone()


def forwards(module: Any, ran: list[int]) -> Any:
    return module.get_submodule("transformer.wte").register_forward_hook(
        lambda *_: ran.append(1) and None
    )


def test_an_unsaved_value_flows_into_an_edit(gpt2: LanguageModel, gpt2_module: Any) -> None:
    ran: list[int] = []
    handle = forwards(gpt2_module, ran)
    with gpt2.session():
        with gpt2.trace(ONE):
            h = gpt2.transformer.h[1].output[0]
        assert not ran
        with gpt2.trace(TWO):
            gpt2.transformer.h[1].output[0][:, -1] = h[:, -1]
            last = gpt2.transformer.h[2].output[0].save()
            assert h.shape == (1, 6, 64) and (h + gpt2.transformer.h[0].output[0]).ndim == 3
        with pytest.raises(GraftworkError, match="when the session exits"):
            last.value
        assert not ran
    handle.remove()
    assert len(ran) == 2
    source = plain(gpt2_module, ONE, MID)

    def edit(out: torch.Tensor) -> torch.Tensor:
        return torch.cat((out[:, :-1], source[:, -1:]), 1)

    expected = plain(gpt2_module, TWO, "transformer.h.2", {MID: edit})
    torch.testing.assert_close(last.value, expected)
    with pytest.raises(GraftworkError, match="not saved"):
        h.value


@pytest.mark.parametrize("augmented", [False, True])
def test_a_sum_over_a_data_set(gpt2: LanguageModel, gpt2_module: Any, augmented: bool) -> None:
    data = [torch.arange(n)[None] + 7 * n for n in (3, 5, 8)]
    with gpt2.session():
        total: Any = 0
        for ids in data:
            with gpt2.trace(ids):
                loss = gpt2.transformer.h[1].output[0].norm()
                if augmented:
                    total += loss
                else:
                    total = total + loss
        mean = total / len(data)
        mean = mean.save()
    expected = sum(plain(gpt2_module, ids, MID).norm() for ids in data) / 3
    torch.testing.assert_close(mean.value, expected)


def test_values_of_two_blocks_between_blocks(gpt2: LanguageModel, gpt2_module: Any) -> None:
    with gpt2.session():
        with gpt2.trace(ONE):
            one = gpt2.transformer.h[1].output[0]
        with gpt2.trace(TWO):
            two = gpt2.transformer.h[1].output[0]
        both = torch.stack([two, one]).save()
        one *= 0  # a value of its own by now: the model is not changed
        with gpt2.trace(TWO):
            third = (two.mean() + gpt2.transformer.h[0].output[0].mean()).save()
    expected = [plain(gpt2_module, TWO, MID), plain(gpt2_module, ONE, MID)]
    torch.testing.assert_close(both.value, torch.stack(expected))
    mean = expected[0].mean() + plain(gpt2_module, TWO, "transformer.h.0").mean()
    torch.testing.assert_close(third.value, mean)


def test_a_value_on_demand_in_a_session(gpt2: LanguageModel, gpt2_module: Any) -> None:
    ran: list[int] = []
    calls: list[int] = []

    def counted(value: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return value * 2

    handle = forwards(gpt2_module, ran)
    with gpt2.session():
        with gpt2.trace(ONE):
            one = graftwork.apply(counted, gpt2.transformer.h[1].output[0])
        with gpt2.trace(TWO):
            gpt2.transformer.h[0].output[0][:] = one
            after = gpt2.transformer.h[0].output[0]
            found = float(after.sum())
            saved = after.save()
        assert float(one.sum()) == found
    handle.remove()
    expected = 2 * plain(gpt2_module, ONE, MID)
    assert found == pytest.approx(float(expected.sum()), rel=1e-4)
    torch.testing.assert_close(saved.value, expected)
    assert len(calls) == 1


def test_a_generation_and_its_result(gpt2: LanguageModel, gpt2_module: Any) -> None:
    with gpt2.session():
        with gpt2.generate(ONE, max_new_tokens=3, pad_token_id=0) as generator:
            pass
        with gpt2.trace(TWO) as tracer:
            out = tracer.output.logits.save()
    expected = gpt2_module.generate(
        ONE, attention_mask=torch.ones_like(ONE), max_new_tokens=3, pad_token_id=0
    )
    assert torch.equal(generator.output, expected)
    torch.testing.assert_close(out.value, gpt2_module(TWO).logits.detach())


def test_an_exception_in_a_session_abandons_all(gpt2: LanguageModel, gpt2_module: Any) -> None:
    ran: list[int] = []
    handle = forwards(gpt2_module, ran)
    with pytest.raises(ZeroDivisionError):
        with gpt2.session():
            with gpt2.trace(ONE):
                h = gpt2.transformer.h[1].output[0].save()
            raise ZeroDivisionError
    handle.remove()
    assert not ran
    with pytest.raises(GraftworkError, match="left by an exception"):
        h.value
    with gpt2.trace(ONE):  # nothing is open any more
        h = gpt2.transformer.h[1].output[0].save()
    torch.testing.assert_close(h.value, plain(gpt2_module, ONE, MID))


def test_a_block_that_fails_ends_the_later_ones(gpt2: LanguageModel, gpt2_module: Any) -> None:
    with pytest.raises(RuntimeError):
        with gpt2.session():
            with gpt2.trace(ONE):
                first = gpt2.transformer.h[1].output[0].save()
            with gpt2.trace(TWO):
                wrong = (first @ torch.ones(2, 2)).save()
            with gpt2.trace(TWO):
                third = gpt2.transformer.h[1].output[0].save()
    torch.testing.assert_close(first.value, plain(gpt2_module, ONE, MID))
    for lost in (wrong, third):
        with pytest.raises(GraftworkError, match="has no value"):
            lost.value


def test_a_value_is_freed_after_its_last_use(gpt2: LanguageModel) -> None:
    kept: list[Any] = []

    def watch(value: torch.Tensor) -> int:
        kept.append(weakref.ref(value))
        return 0

    def check(_: torch.Tensor) -> bool:
        return kept[0]() is None

    gc.disable()
    try:
        with gpt2.session():
            with gpt2.trace(ONE):
                h = gpt2.transformer.h[1].output[0]
            with gpt2.trace(TWO):
                graftwork.apply(watch, h).save()
            with gpt2.trace(TWO):
                freed = graftwork.apply(check, gpt2.transformer.h[0].output[0]).save()
        assert freed.value is True
    finally:
        gc.enable()


def test_what_has_no_meaning(gpt2: LanguageModel, toy: Model, x: torch.Tensor) -> None:
    with gpt2.session():
        with pytest.raises(GraftworkError, match="only known inside a block"):
            gpt2.transformer.h[1].output
        with pytest.raises(GraftworkError, match="session was opened inside"):
            with gpt2.session():
                pass
        with gpt2.trace(ONE) as first:
            with pytest.raises(GraftworkError, match="inside another block"):
                with gpt2.trace(TWO):
                    pass
            h = gpt2.transformer.h[1].output[0]
        with pytest.raises(GraftworkError, match="closed"):
            first.invoke(ONE)
        with gpt2.trace(TWO):
            with pytest.raises(GraftworkError, match="total = total"):
                h.add_(gpt2.transformer.h[1].output[0])
            with pytest.raises(GraftworkError, match="total = total"):
                h[:, 0] = gpt2.transformer.h[1].output[0][:, 0]
        with gpt2.scan(TWO):
            scanned = gpt2.transformer.h[1].output[0].save()
        assert scanned.value.is_meta
        with toy.trace(x):
            other = (toy.mid.output.sum() + h.sum()).save()
    assert other.shape == ()
