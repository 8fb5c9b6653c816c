"""Skipped modules: against forwards that are replaced by hand on the instances."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graftwork import LanguageModel, Model, apply
from graftwork.tracing.errors import OrderError, ShapeError, StepError

NAMES = {
    "gpt2": ("transformer.h", "mlp", "attn"),
    "llama": ("model.layers", "mlp", "self_attn"),
    "opt": ("model.decoder.layers", "fc2", "self_attn"),
}


@contextmanager
def replaced(module: Any, path: str, function: Callable[..., Any]) -> Iterator[None]:
    """The forward of one module is `function` of its first argument."""
    target = module.get_submodule(path)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(args[0] if args else next(iter(kwargs.values())))

    target.forward = forward
    try:
        yield
    finally:
        del target.forward


def plain_logits(module: Any, ids: torch.Tensor, skips: dict[str, Callable[..., Any]]) -> Any:
    with ExitStack() as stack:
        for path, function in skips.items():
            stack.enter_context(replaced(module, path, function))
        with torch.no_grad():
            return module(input_ids=ids[None], use_cache=False).logits


@pytest.mark.parametrize("name", list(NAMES))
def test_a_skipped_block_passes_its_input_on(name: str, tools: SimpleNamespace) -> None:
    module, model = tools.module(name), tools.model(name)
    (ids,) = tools.prompts(7)
    blocks = NAMES[name][0]
    with tools.block_rows(module) as rows, model.trace(ids):
        block = model.get(f"{blocks}.1")
        block.skip(block.input)
        logits = model.lm_head.output.save()
    expected = plain_logits(module, ids, {f"{blocks}.1": lambda hidden: hidden})
    assert tools.close(logits, expected)
    assert (rows[0], rows[1], rows[2]) == (1, 0, 1)


def test_the_output_of_a_skipped_module_is_what_was_given_and_can_be_edited(
    tools: SimpleNamespace,
) -> None:
    module, model = tools.module("llama"), tools.model("llama")
    (ids,) = tools.prompts(5)
    given = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1))
    with model.trace(ids):
        mlp = model.model.layers[2].mlp
        mlp.skip(given)
        before = mlp.output.save()
        mlp.output[:, -1] = 0
        logits = model.lm_head.output.save()
    edited = given.clone()
    edited[:, -1] = 0
    assert torch.equal(before.value, given)
    assert tools.close(logits, plain_logits(module, ids, {"model.layers.2.mlp": lambda _: edited}))


def test_a_value_of_an_earlier_place_of_another_invoke_is_given(tools: SimpleNamespace) -> None:
    module, model = tools.module("gpt2"), tools.model("gpt2")
    one, two = tools.prompts(6, 6)
    source = tools.plain(module, one)["transformer.h.0.mlp", "output"]
    with model.trace() as tracer:
        with tracer.invoke(one):
            other = model.transformer.h[0].mlp.output
        with tracer.invoke(two):
            model.transformer.h[2].mlp.skip(other)
            logits = model.lm_head.output.save()
    assert tools.close(logits, plain_logits(module, two, {"transformer.h.2.mlp": lambda _: source}))


@pytest.mark.parametrize("form", ["tuple", "first", "list of one"])
def test_the_first_part_stands_for_a_tuple(form: str, tools: SimpleNamespace) -> None:
    module, model = tools.module("gpt2"), tools.model("gpt2")
    (ids,) = tools.prompts(5)
    given = torch.full((1, 5, 16), 0.5)
    value: Any = {"tuple": (given, None), "first": given, "list of one": [given]}[form]
    with model.trace(ids):
        attention = model.transformer.h[1].attn
        attention.skip(value)
        output = attention.output.save()
        logits = model.lm_head.output.save()
    expected = plain_logits(module, ids, {"transformer.h.1.attn": lambda _: (given, None)})
    assert tools.close(logits, expected)
    assert torch.equal(output.value[0], given) and output.value[1] is None


def test_a_block_that_returns_a_tensor_takes_a_tuple_of_one(tools: SimpleNamespace) -> None:
    module, model = tools.module("llama"), tools.model("llama")
    (ids,) = tools.prompts(5)
    with model.trace(ids):
        layer = model.model.layers[1]
        layer.skip((layer.input,))
        logits = model.lm_head.output.save()
    assert tools.close(logits, plain_logits(module, ids, {"model.layers.1": lambda h: h}))


def test_a_skip_of_one_prompt_leaves_the_others(tools: SimpleNamespace) -> None:
    module, model = tools.module("gpt2"), tools.model("gpt2")
    short, long = tools.prompts(3, 8)
    with model.trace() as tracer:
        with tracer.invoke(short):
            block = model.transformer.h[1]
            block.skip(block.input)
            first = model.lm_head.output.save()
        with tracer.invoke(long):
            second = model.lm_head.output.save()
    assert tools.close(first, plain_logits(module, short, {"transformer.h.1": lambda h: h}))
    assert tools.close(second, plain_logits(module, long, {}))


def test_what_all_prompts_of_a_batch_skip_does_not_run(tools: SimpleNamespace) -> None:
    module, model = tools.module("gpt2"), tools.model("gpt2")
    lengths = tools.prompts(3, 8, 5)
    results = []
    with tools.block_rows(module) as rows, model.trace() as tracer:
        for factor, ids in enumerate(lengths):
            with tracer.invoke(ids):
                block = model.transformer.h[2]
                block.skip(block.input * (factor + 1))
                results.append(model.lm_head.output.save())
    assert (rows[1], rows[2], rows[3]) == (3, 0, 3)
    for factor, (ids, logits) in enumerate(zip(lengths, results, strict=True)):
        expected = plain_logits(module, ids, {"transformer.h.2": lambda h, k=factor + 1: h * k})
        assert tools.close(logits, expected)


def test_the_whole_batch_is_skipped(tools: SimpleNamespace) -> None:
    module, model = tools.module("gpt2"), tools.model("gpt2")
    one, two = tools.prompts(4, 4)
    with model.trace() as tracer:
        with tracer.invoke(one):
            first = model.lm_head.output.save()
        with tracer.invoke(two):
            inner = model.transformer.h[1].mlp.output.save()
        with tracer.invoke():
            block = model.transformer.h[1]
            block.skip(block.input)
    assert tools.close(first, plain_logits(module, one, {"transformer.h.1": lambda h: h}))
    with pytest.raises(StepError, match=r"mlp` was not called: `transformer\.h\.1` was skipped"):
        inner.value


def test_the_last_of_two_skips_counts(tools: SimpleNamespace) -> None:
    module, model = tools.module("gpt2"), tools.model("gpt2")
    (ids,) = tools.prompts(4)
    with model.trace(ids):
        mlp = model.transformer.h[1].mlp
        mlp.skip(torch.ones(1, 4, 16))
        mlp.skip(torch.zeros(1, 4, 16))
        logits = model.lm_head.output.save()
    expected = plain_logits(module, ids, {"transformer.h.1.mlp": lambda h: torch.zeros_like(h)})
    assert tools.close(logits, expected)


@pytest.mark.parametrize("batched", [False, True])
def test_what_is_inside_a_skipped_module_has_no_value(
    batched: bool, tools: SimpleNamespace
) -> None:
    model = tools.model("gpt2")
    one, two = tools.prompts(4, 6)
    with model.trace() as tracer:
        with tracer.invoke(one):
            block = model.transformer.h[1]
            block.skip(block.input)
            inner = block.mlp.c_fc.output.save()
            taken = block.input.save()
        if batched:
            with tracer.invoke(two):
                other = model.transformer.h[1].mlp.c_fc.output.save()
    with pytest.raises(StepError, match=r"`transformer\.h\.1` was skipped at .*test_skip\.py:\d+"):
        inner.value
    assert taken.shape == (1, 4, 16)
    assert not batched or other.shape == (1, 6, 64)


@pytest.mark.parametrize("batched", [False, True])
def test_an_edit_inside_a_skipped_module_is_refused(batched: bool, tools: SimpleNamespace) -> None:
    model = tools.model("gpt2")
    one, two = tools.prompts(4, 6)
    with pytest.raises(StepError, match="was skipped at"):
        with model.trace() as tracer:
            with tracer.invoke(one):
                block = model.transformer.h[1]
                block.skip(block.input)
                block.mlp.output[:] = 0
                model.lm_head.output.save()
            if batched:
                with tracer.invoke(two):
                    model.lm_head.output.save()


def test_a_later_edit_that_needs_what_was_skipped_says_so(tools: SimpleNamespace) -> None:
    model = tools.model("gpt2")
    (ids,) = tools.prompts(4)
    with pytest.raises(StepError, match="was skipped at"):
        with model.trace(ids):
            block = model.transformer.h[1]
            block.skip(block.input)
            model.transformer.h[2].output[0][:] = block.mlp.output


@pytest.mark.parametrize("batched", [False, True])
def test_a_wrong_shape_names_the_line(batched: bool, tools: SimpleNamespace) -> None:
    model = tools.model("gpt2")
    one, two = tools.prompts(4, 6)
    with pytest.raises(ShapeError, match=r"(?s)test_skip\.py:\d+.*skip\(wrong\).*\[1, 4, 16\]"):
        with model.trace() as tracer:
            with tracer.invoke(one):
                wrong = torch.zeros(1, 3, 16)
                model.transformer.h[1].mlp.skip(wrong)
                model.lm_head.output.save()
            if batched:
                with tracer.invoke(two):
                    model.lm_head.output.save()
    with pytest.raises(ShapeError, match="of 2 parts"):
        with model.trace(one):
            model.transformer.h[1].attn.skip((torch.zeros(1, 4, 16), None, None))


def test_a_value_from_later_is_refused(tools: SimpleNamespace) -> None:
    model = tools.model("gpt2")
    (ids,) = tools.prompts(4)
    with pytest.raises(OrderError, match=r"transformer\.h\.1\.skip"):
        with model.trace(ids):
            model.transformer.h[1].skip(model.transformer.h[2].output)


def test_a_failed_run_leaves_nothing(tools: SimpleNamespace) -> None:
    model = tools.model("gpt2")
    (ids,) = tools.prompts(4)
    kind = type(model.load().transformer.h[1])
    own = kind.forward
    with pytest.raises(ZeroDivisionError):
        with model.trace(ids):
            block = model.transformer.h[1]

            def fails(_: Any) -> Any:
                assert kind.forward is own  # the class is never touched
                raise ZeroDivisionError

            block.skip(block.input)
            apply(fails, model.transformer.h[2].output[0]).save()
    assert tools.left_behind(model.load()) == [] and kind.forward is own


def test_a_forward_of_the_instance_is_put_back(tools: SimpleNamespace) -> None:
    module = tools.fresh("gpt2")
    model = LanguageModel(module)
    (ids,) = tools.prompts(4)
    mlp = module.transformer.h[1].mlp
    own = mlp.forward
    mlp.forward = mine = lambda hidden: own(hidden)
    with model.trace(ids):
        model.transformer.h[1].mlp.skip(torch.zeros(1, 4, 16))
        model.lm_head.output.save()
    assert mlp.forward is mine


def test_the_given_tensor_is_not_changed_by_the_run(tools: SimpleNamespace) -> None:
    class Doubles(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.one(x)
            hidden += 1
            return self.two(hidden)

    module = Doubles()
    model = Model(module)
    given = torch.ones(2, 3)
    with model.trace(torch.randn(2, 3)) as tracer:
        model.one.skip(given)
        result = tracer.output.save()
    assert torch.equal(given, torch.ones(2, 3))
    torch.testing.assert_close(result.value, module.two(torch.full((2, 3), 2.0)).detach())


def test_gradients_reach_a_given_tensor(tools: SimpleNamespace) -> None:
    module, model = tools.module("gpt2"), tools.model("gpt2")
    (ids,) = tools.prompts(4)
    given = torch.zeros(1, 4, 16, requires_grad=True)
    with model.trace(ids):
        model.transformer.h[1].mlp.skip(given)
        logits = model.lm_head.output.save()
    logits.value.sum().backward()
    found = given.grad
    fresh = torch.zeros(1, 4, 16, requires_grad=True)
    with replaced(module, "transformer.h.1.mlp", lambda _: fresh):
        module(input_ids=ids[None]).logits.sum().backward()
    module.zero_grad()
    torch.testing.assert_close(found, fresh.grad)


def test_a_dtype_is_that_of_the_module(tools: SimpleNamespace) -> None:
    module = tools.fresh("llama").to(torch.bfloat16)
    model = LanguageModel(module)
    (ids,) = tools.prompts(4)
    with model.trace(ids):
        model.model.layers[1].mlp.skip(torch.zeros(1, 4, 16))
        logits = model.lm_head.output.save()
    expected = plain_logits(module, ids, {"model.layers.1.mlp": lambda h: torch.zeros_like(h)})
    assert logits.value.dtype == torch.bfloat16
    assert torch.equal(logits.value, expected)


def test_a_module_that_runs_twice_is_skipped_once(tools: SimpleNamespace) -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Linear(3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.inner(x))

    module = Twice()
    model = Model(module)
    x = torch.randn(2, 3)
    with model.trace(x) as tracer:
        model.inner.calls[0].skip(torch.ones(2, 3))
        second = model.inner.get("0").calls[1].output.save()
        result = tracer.output.save()
    expected = module.inner(torch.ones(2, 3)).detach()
    torch.testing.assert_close(result.value, expected)
    torch.testing.assert_close(second.value, expected)


def test_two_threads_do_not_see_each_others_skips(tools: SimpleNamespace) -> None:
    module, model = tools.module("gpt2"), tools.model("gpt2")
    (ids,) = tools.prompts(6)
    expected = {
        True: plain_logits(module, ids, {"transformer.h.1": lambda h: h}),
        False: plain_logits(module, ids, {}),
    }
    wrong: list[str] = []

    def work(skips: bool) -> None:
        for _ in range(8):
            with model.trace(ids):
                if skips:
                    block = model.transformer.h[1]
                    block.skip(block.input)
                logits = model.lm_head.output.save()
            if not tools.close(logits, expected[skips]):
                wrong.append(f"skips={skips}")

    threads = [threading.Thread(target=work, args=(flag,)) for flag in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("batched", [False, True])
def test_a_generation_skips_at_the_steps_that_are_named(
    batched: bool, tools: SimpleNamespace
) -> None:
    module, model = tools.module("llama"), tools.model("llama")
    one, two = tools.prompts(5, 3)

    def expected(ids: torch.Tensor, steps: set[int]) -> list[torch.Tensor]:
        """Greedy steps with a cache, where the layer computes and its result is replaced."""
        seen: list[torch.Tensor] = []

        def hook(_: Any, args: Any, output: Any) -> Any:
            return args[0] if len(seen) in steps else None

        handle = module.model.layers[1].register_forward_hook(hook)
        cache, tokens = None, ids[None]
        with torch.no_grad():
            for _ in range(3):
                out = module(input_ids=tokens, past_key_values=cache, use_cache=True)
                cache, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
                seen.append(out.logits[:, -1])
        handle.remove()
        return seen

    saved: list[Any] = []
    with model.generate(max_new_tokens=3, do_sample=False) as generator:
        with generator.invoke(one) as invoker:
            for step in range(3):
                if step:
                    invoker.next()
                layer = model.model.layers[1]
                if step != 1:
                    layer.skip(layer.input)
                saved.append(model.lm_head.output[:, -1].save())
        if batched:
            with generator.invoke(two):
                model.lm_head.output.save()
    for value, reference in zip(saved, expected(one, {0, 2}), strict=True):
        assert tools.close(value, reference)


# ---------------------------------------------------------------- a property: planned = plain


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[int, dict[tuple[int, str], float]]]:
    """For each invoke its prompt, and what it skips: a place and what its input is multiplied by."""
    place = st.tuples(st.integers(0, 3), st.sampled_from(["block", "mlp", "attention"]))
    skips = st.dictionaries(place, st.sampled_from([0.0, 0.5, 1.0]), max_size=2)
    return draw(st.lists(st.tuples(st.integers(0, 2), skips), min_size=1, max_size=7))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(NAMES))
@given(program=programs(), plan=st.sampled_from([None, False]))
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_plan_gives_what_plain_forwards_give(
    name: str,
    program: list[tuple[int, dict[tuple[int, str], float]]],
    plan: Any,
    tools: SimpleNamespace,
) -> None:
    module, model = tools.module(name), tools.model(name)
    blocks, mlp, attention = NAMES[name]
    ids = tools.prompts(3, 9, 9)
    inner = {"block": "", "mlp": f".{mlp}", "attention": f".{attention}"}
    if name == "opt":
        inner["mlp"] = ".final_layer_norm"
    logits = []
    used: list[dict[str, float]] = []
    with model.trace(plan=plan) as tracer:
        for prompt, skips in program:
            whole = {block for block, kind in skips if kind == "block"}
            skips = {
                f"{blocks}.{block}{inner[kind]}": factor
                for (block, kind), factor in skips.items()
                if kind == "block" or block not in whole
            }
            used.append(skips)
            with tracer.invoke(ids[prompt]):
                for path, factor in skips.items():
                    place = model.get(path)
                    place.skip(place.input * factor)
                logits.append(model.lm_head.output.save())
    for (prompt, _), skips, found in zip(program, used, logits, strict=True):

        def function(path: str, factor: float) -> Callable[..., Any]:
            pair = path.endswith(attention)
            return lambda h: (h * factor, None) if pair else h * factor

        expected = plain_logits(
            module, ids[prompt], {path: function(path, f) for path, f in skips.items()}
        )
        assert tools.close(found, expected, 1e-4)
