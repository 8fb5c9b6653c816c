"""Branches that are recorded, against plain hooks that decide with `if`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import graftwork
from graftwork import LanguageModel, Model
from graftwork.tracing.errors import BlockError, NotRunError, OrderError, StepError
from graftwork.tracing.wire import pack, unpack

PROMPTS = [
    "The Eiffel Tower is in the city of",
    "Big Ben is in",
    "The Colosseum is in the old city",
]


@pytest.fixture(scope="module")
def model() -> Any:
    return LanguageModel("graftwork/tiny")


def plain(model: Any, prompt: str, change: Callable[[float, torch.Tensor], None]) -> torch.Tensor:
    """Logits of a run whose hook at block 1 knows a number of block 0."""
    module, number = model.load(), []

    def first(_module: Any, _args: Any, output: Any) -> None:
        number.append(float((output[0] if isinstance(output, tuple) else output)[0, -1, 0]))

    def second(_module: Any, _args: Any, output: Any) -> None:
        change(number[0], output[0] if isinstance(output, tuple) else output)

    handles = [
        module.transformer.h[0].register_forward_hook(first),
        module.transformer.h[1].register_forward_hook(second),
    ]
    try:
        with torch.no_grad():
            ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
            return module(ids).logits  # type: ignore[no-any-return]
    finally:
        for handle in handles:
            handle.remove()


def number_of(model: Any, prompt: str) -> float:
    found: list[float] = []
    plain(model, prompt, lambda number, _: found.append(number))
    return found[0]


def close(found: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.value, expected, rtol=1e-4, atol=1e-4)


CHANGES: list[Callable[[Any], Any]] = [
    lambda h: h.mul_(2),
    lambda h: h.__setitem__((slice(None), -1), 0),
    lambda h: h[:, 0].add_(1),
    lambda h: h.__setitem__(slice(None), torch.tanh(h)),
]


@pytest.mark.slow
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=3),
    st.floats(-2, 2),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(0, 3)),
    st.one_of(st.none(), st.integers(0, 3)),
)
def test_a_branch_is_what_if_would_have_decided(
    model: Any, prompts: list[str], limit: float, taken: int, other: int | None, inner: int | None
) -> None:
    found = []
    with model.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                number = model.transformer.h[0].output[0][0, -1, 0]
                hidden = model.transformer.h[1].output[0]
                with tracer.cond(number > limit):
                    CHANGES[taken](hidden)
                    if inner is not None:
                        with tracer.cond(number > limit + 1):
                            CHANGES[inner](hidden)
                if other is not None:
                    with tracer.otherwise():
                        CHANGES[other](hidden)
                found.append(model.lm_head.output.save())

    def change(number: float, hidden: torch.Tensor) -> None:
        if number > limit:
            CHANGES[taken](hidden)
            if inner is not None and number > limit + 1:
                CHANGES[inner](hidden)
        elif other is not None:
            CHANGES[other](hidden)

    for prompt, logits in zip(prompts, found, strict=True):
        close(logits, plain(model, prompt, change))


def test_each_prompt_decides_for_itself_and_only_its_branch_runs(model: Any) -> None:
    numbers = [number_of(model, prompt) for prompt in PROMPTS[:2]]
    limit = sum(numbers) / 2
    high, low = [], []
    saved = []
    with model.trace() as tracer:
        for prompt in PROMPTS[:2]:
            with tracer.invoke(prompt):
                number = model.transformer.h[0].output[0][0, -1, 0]
                with tracer.cond(number > limit):
                    first = graftwork.apply(lambda x: high.append(x.item()) or x, number).save()
                with tracer.otherwise():
                    second = graftwork.apply(lambda x: low.append(x.item()) or x, number).save()
                saved.append((first, second))
    assert high == [pytest.approx(max(numbers), abs=1e-4)]
    assert low == [pytest.approx(min(numbers), abs=1e-4)]
    for (first, second), number in zip(saved, numbers, strict=True):
        chosen, left = (first, second) if number > limit else (second, first)
        assert float(chosen) == pytest.approx(number, abs=1e-4)
        with pytest.raises(StepError, match=r"(?s)test_branches\.py.*branch that was not taken"):
            _ = left.value


def test_views_and_values_of_before_are_right_after_both_branches(model: Any) -> None:
    with model.trace(PROMPTS[0]) as tracer:
        hidden = model.transformer.h[1].output[0]
        part = hidden[:, 0]
        clean = hidden.clone()
        hidden[:] += 1
        with tracer.cond(hidden.sum() > -1e9):
            part[:] = 7
        with tracer.otherwise():
            part[:] = 8
        with tracer.cond(hidden.sum() > 1e9):
            part[:] = 9
        after, whole, before = part.save(), hidden.save(), clean.save()
    assert bool((after == 7).all())
    expected = before.value + 1
    expected[:, 0] = 7
    torch.testing.assert_close(whole.value, expected)


@pytest.mark.parametrize("limit", [-1e9, 1e9])
def test_an_operator_on_a_place_in_a_branch_is_seen_by_handles_of_before(
    model: Any, limit: float
) -> None:
    """`place *= 0.5` is written in place, though Python then assigns what it wrote."""
    with model.trace(PROMPTS[0]) as tracer:
        keys = model.layers[0].k_pre
        part = model.transformer.h[0].attn.output[0]
        before = keys.save(), part.save()
        with tracer.cond(keys.sum() > limit):
            model.layers[0].k_pre *= 0.5
            model.transformer.h[0].attn.output[0] *= 0.5
        with tracer.otherwise():
            keys += 1
            part += 1
        after = keys.save(), part.save()
        now = model.layers[0].k_pre.save(), model.transformer.h[0].attn.output[0].save()
    for old, new, there in zip(before, after, now, strict=True):
        close(new, old.value * 0.5 if limit < 0 else old.value + 1)
        close(there, new.value)


@pytest.mark.parametrize("taken", [True, False])
def test_skips_and_replaced_outputs(model: Any, taken: bool) -> None:
    limit = -1e9 if taken else 1e9
    with model.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            with tracer.cond(model.transformer.h[0].output[0].sum() > limit):
                model.transformer.h[2].mlp.skip(model.transformer.h[2].mlp.input * 0)
                model.transformer.h[1].output = model.transformer.h[1].output * 0.5
            found = model.lm_head.output.save()
        with tracer.invoke(PROMPTS[1]):
            other = model.lm_head.output.save()
    module = model.load()

    def half(_module: Any, _args: Any, output: Any) -> Any:
        return (output[0] * 0.5, *output[1:]) if isinstance(output, tuple) else output * 0.5

    handles = []
    if taken:
        handles.append(module.transformer.h[1].register_forward_hook(half))
        handles.append(
            module.transformer.h[2].mlp.register_forward_hook(lambda _m, _a, out: out * 0)
        )
    expected = plain(model, PROMPTS[0], lambda *_: None)
    for handle in handles:
        handle.remove()
    close(found, expected)
    close(other, plain(model, PROMPTS[1], lambda *_: None))


def test_in_a_loop_the_steps_that_were_not_taken_are_left_out(model: Any) -> None:
    with model.generate(PROMPTS[0], max_new_tokens=4) as tracer:
        with tracer.all():
            logits = model.lm_head.output[0, -1]
            with tracer.cond(logits.argmax() == logits[:1000].argmax()):
                low = logits.max().save()
            with tracer.otherwise():
                high = (-logits.max()).save()
            every = logits.max().save()
            which = (logits.argmax() < 1000).save()
    expected = [float(v) for v, w in zip(every.value, which.value, strict=True) if w]
    rest = [-float(v) for v, w in zip(every.value, which.value, strict=True) if not w]
    assert [float(v) for v in low.value] == expected
    assert [float(v) for v in high.value] == rest
    assert len(every) == len(expected) + len(rest)


def test_edits_in_a_loop_where_a_condition_holds(model: Any) -> None:
    with model.generate(PROMPTS[0], max_new_tokens=4) as tracer:
        with tracer.all() as step:
            with tracer.cond(step == 1):
                model.transformer.h[1].output[0].t[-1] *= -1
    module, forwards = model.load(), []

    def hook(_module: Any, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        forwards.append(1)
        if len(forwards) == 2:
            hidden[:, -1] *= -1

    handle = module.transformer.h[1].register_forward_hook(hook)
    ids = torch.tensor([model.tokenizer(PROMPTS[0])["input_ids"]])
    expected = module.generate(ids, max_new_tokens=4, do_sample=False)
    handle.remove()
    assert tracer.output.tolist() == expected.tolist()


def test_gradients_pass_through_the_branch_that_was_taken() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model: Any = Model(module)
    x, factor = torch.randn(1, 4), nn.Parameter(torch.tensor(3.0))
    for wanted in (True, False):
        factor.grad = None
        with model.trace(x) as tracer:
            hidden = model[0].output
            with tracer.cond((hidden.sum() > 1e9) if not wanted else (hidden.sum() < 1e9)):
                hidden[:] *= factor
            model[1].output.sum().backward()
        module.zero_grad()
        inner = module[0](x).detach()
        scale = torch.tensor(3.0, requires_grad=True)
        module[1](inner * scale).sum().backward()
        module.zero_grad()
        if wanted:
            torch.testing.assert_close(factor.grad, scale.grad)
        else:
            assert factor.grad is None or float(factor.grad) == 0


def test_branches_are_sent_and_drawn(model: Any) -> None:
    with model.trace(PROMPTS[0]) as tracer:
        number = model.transformer.h[0].output[0][0, -1, 0]
        with tracer.cond(number > 0):
            model.transformer.h[1].output[0][:] *= 2
            model.lm_head(model.transformer.h[1].output[0]).save()
        with tracer.otherwise():
            model.transformer.h[1].output[0][:, -1] = 0
        model.lm_head.output.save()
    assert "unless %" in str(tracer.graph) and "if %" in tracer.graph.draw().mermaid
    experiment = tracer.compile()
    experiment.graph = unpack(pack(tracer.graph)).graph
    for prompt in PROMPTS:

        def change(number: float, hidden: torch.Tensor) -> None:
            if number > 0:
                hidden.mul_(2)
            else:
                hidden[:, -1] = 0

        results = experiment(prompt)
        expected = plain(model, prompt, change)
        torch.testing.assert_close(results[1], expected, rtol=1e-4, atol=1e-4)
        if number_of(model, prompt) <= 0:
            with pytest.raises(StepError, match="not taken"):
                _ = results[0]


def test_what_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"one value.*\.any\(\)") as raised:
        with model.trace(PROMPTS[0]) as tracer, tracer.cond(model.transformer.h[0].output[0] > 0):
            model.transformer.h[1].output[0][:] = 0
    assert "test_branches.py" in str(raised.value).splitlines()[0]
    with pytest.raises(BlockError, match="directly after"), model.trace(PROMPTS[0]) as tracer:
        with tracer.otherwise():
            pass
    with pytest.raises(BlockError, match="directly after"), model.trace(PROMPTS[0]) as tracer:
        with tracer.cond(True):
            pass
        model.transformer.h[0].output.save()
        with tracer.otherwise():
            pass
    with pytest.raises(OrderError, match=r"transformer\.h\.3\.output"):
        with model.trace(PROMPTS[0]) as tracer:
            with tracer.cond(model.transformer.h[3].output[0].sum() > 0):
                model.transformer.h[1].output[0][:] = 0
            model.lm_head.output.save()
    with pytest.raises(StepError, match="not taken"), model.trace(PROMPTS[0]) as tracer:
        with tracer.cond(model.transformer.h[0].output[0].sum() > 1e9):
            value = model.transformer.h[1].output[0] * 2
        model.transformer.h[2].output[0][:] = value
    with pytest.raises(NotRunError, match="decide with `if`"), model.trace(PROMPTS[0]) as tracer:
        with tracer.cond(True):
            float(model.transformer.h[0].output[0].sum())
    with pytest.raises(StepError, match="backward"), model.trace(PROMPTS[0]) as tracer:
        with tracer.cond(True):
            model.lm_head.output.sum().backward()
    with pytest.raises(BlockError, match="cond"), model.trace() as tracer:
        with tracer.cond(True):
            pass
    assert not any(child._forward_hooks for child in model.load().modules())


def test_a_wrong_shape_in_either_branch_is_found_by_a_scan(model: Any) -> None:
    with pytest.raises(RuntimeError, match="size"), model.scan(PROMPTS[0]) as tracer:
        with tracer.cond(model.transformer.h[0].output[0].sum() > 0):
            pass
        with tracer.otherwise():
            model.transformer.h[1].output[0][:] = torch.zeros(3)


def test_values_on_demand_after_a_branch(model: Any) -> None:
    with model.trace(PROMPTS[0]) as tracer:
        with tracer.cond(model.transformer.h[0].output[0].sum() > -1e9):
            model.transformer.h[1].output[0][:] = 5
        total = float(model.transformer.h[1].output[0].sum())
        logits = model.lm_head.output.save()
    assert total == 5 * 8 * 128
    close(logits, plain(model, PROMPTS[0], lambda _, hidden: hidden.fill_(5)))


def test_a_handle_whose_place_a_branch_assigned_is_written_in_the_branch_alone(model: Any) -> None:
    layer = model.layers[1]
    names = ("resid_post", "head_out", "z")

    def assigned(name: str, below: bool) -> Any:
        with model.trace(PROMPTS[0]) as tracer:
            old = getattr(layer, name)
            with tracer.cond(model.layers[0].resid_post.sum() > 1e9):
                setattr(layer, name, getattr(layer, name) * 2)
                old[:] = 7  # cut off here, so nothing of the model
            if below:
                old[:] = 7
            return model.lm_head.output.save()

    with model.trace(PROMPTS[0]):
        expected = model.lm_head.output.save()
    for name in names:
        with pytest.raises(BlockError, match="was assigned"):
            assigned(name, below=True)
        close(assigned(name, below=False), expected)
