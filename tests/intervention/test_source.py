"""Operations inside forwards: against plain hooks, attention computed by hand, and functions that are
replaced in their module."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama

from graftwork import LanguageModel, Model, apply
from graftwork.tracing.errors import ScheduleError, ShapeError, SourceError, StepError

NAMES = {
    "gpt2": ("transformer.h", "attn", "self_c_proj_0", modeling_gpt2),
    "llama": ("model.layers", "self_attn", "self_o_proj_0", modeling_llama),
}


def eager(name: str, tools: SimpleNamespace) -> Any:
    return tools.fresh(name, attn_implementation="eager")


def patterns(module: Any, ids: torch.Tensor) -> Any:
    with torch.no_grad():
        return module(input_ids=ids[None], output_attentions=True).attentions


def logits_with(
    module: Any, name: str, ids: torch.Tensor, layer: int, monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """Logits where the softmax of one layer is uniform over the visible tokens, by a replaced function
    in the module that defines the architecture."""
    own = torch.nn.functional.softmax
    calls = iter(range(1000))

    def softmax(scores: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        pattern = own(scores, *args, **kwargs)
        return (
            own(scores.clamp(max=0) * 0 + (scores < -1e9) * -1e9, dim=-1)
            if (next(calls) == layer)
            else pattern
        )

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "softmax", softmax)
        return module(input_ids=ids[None], use_cache=False).logits


@pytest.mark.parametrize("name", list(NAMES))
@pytest.mark.parametrize("plan", [None, False])
def test_the_pattern_inside_the_attention_of_each_prompt(
    name: str, plan: Any, tools: SimpleNamespace
) -> None:
    module = eager(name, tools)
    model = LanguageModel(module)
    blocks, attention, projection, _ = NAMES[name]
    saved = []
    prompts = tools.prompts(4, 9)
    with model.trace(plan=plan) as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                place = model.get(f"{blocks}.2.{attention}")
                inside = place.source.attention_interface_0.source
                pattern = inside.softmax_0.output.save()
                second = place.source.attention_interface_0.output[1].save()
                taken = getattr(place.source, projection).input.save()
                same = model.get(f"{blocks}.2.{attention}.{projection[5:-2]}").input.save()
            saved.append((pattern, second, taken, same))
    assert tools.left_behind(module) == []  # before transformers hangs its own recorders in
    for ids, (pattern, second, taken, same) in zip(prompts, saved, strict=True):
        expected = patterns(module, ids)[2]
        assert tools.close(pattern, expected) and tools.close(second, expected)
        assert torch.equal(taken.value, same.value)


@pytest.mark.parametrize("name", list(NAMES))
@pytest.mark.parametrize("batched", [False, True])
def test_an_edited_pattern_reaches_the_logits_of_its_prompt_alone(
    name: str, batched: bool, tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = eager(name, tools)
    model = LanguageModel(module)
    blocks, attention, _, _ = NAMES[name]
    one, two = tools.prompts(4, 9)

    def uniform(scores: torch.Tensor) -> torch.Tensor:
        visible = (scores > -1e9).float()
        return visible / visible.sum(-1, keepdim=True)

    with model.trace() as tracer:
        with tracer.invoke(one):
            softmax = model.get(
                f"{blocks}.1.{attention}"
            ).source.attention_interface_0.source.nn_functional_softmax_0
            softmax.output = apply(uniform, softmax.input)
            edited = model.lm_head.output.save()
        if batched:
            with tracer.invoke(two):
                plain = model.lm_head.output.save()
    assert tools.close(edited, logits_with(module, name, one, 1, monkeypatch))
    if batched:
        assert tools.close(plain, tools.plain(module, two)["lm_head", "output"])


def test_queries_and_keys_that_the_attention_takes(tools: SimpleNamespace) -> None:
    """Grouped-query attention, after rotation: the pattern computed by hand from them."""
    module = tools.module("llama")  # sdpa
    model = tools.model("llama")
    (ids,) = tools.prompts(6)
    with model.trace(ids):
        inputs = model.model.layers[1].self_attn.source.attention_interface_0.inputs
        query, key, value = (inputs[0][i].save() for i in (1, 2, 3))
        mixed = model.model.layers[1].self_attn.o_proj.input.save()
    key, value = (x.value.repeat_interleave(2, dim=1) for x in (key, value))
    scores = query.value @ key.transpose(-1, -2) * module.model.layers[1].self_attn.scaling
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    assert tools.close(mixed, (scores.softmax(-1) @ value).transpose(1, 2).reshape(1, 6, 16))


def test_an_argument_is_edited(tools: SimpleNamespace) -> None:
    module, model = tools.module("llama"), tools.model("llama")
    one, two = tools.prompts(6, 3)
    with model.trace() as tracer:
        with tracer.invoke(one):
            interface = model.model.layers[1].self_attn.source.attention_interface_0
            interface.inputs[0][3][:] = 0  # the values
            mixed = model.model.layers[1].self_attn.output[0].save()
        with tracer.invoke(two):
            other = model.model.layers[1].self_attn.output[0].save()
    assert not mixed.value.any()
    assert tools.close(other, tools.plain(module, two)["model.layers.1.self_attn", "output"])


def test_operators_and_activations_of_an_mlp(tools: SimpleNamespace) -> None:
    module, model = tools.module("llama"), tools.model("llama")
    (ids,) = tools.prompts(5)
    with model.trace(ids):
        mlp = model.model.layers[0].mlp
        act = mlp.source.self_act_fn_0.output.save()
        product = mlp.source.mul_0.output.save()
        mlp.source.mul_0.output[:, -1] = 0
        result = mlp.output.save()
    plain = tools.plain(module, ids)
    up = plain["model.layers.0.mlp.up_proj", "output"]
    assert tools.close(act, plain["model.layers.0.mlp.act_fn", "output"])
    assert tools.close(product, act.value * up)
    edited = product.value.clone()
    edited[:, -1] = 0
    with torch.no_grad():
        assert tools.close(result, module.model.layers[0].mlp.down_proj(edited))


@pytest.mark.parametrize("batched", [False, True])
def test_an_operation_is_skipped(batched: bool, tools: SimpleNamespace) -> None:
    module, model = tools.module("gpt2"), tools.model("gpt2")
    one, two = tools.prompts(5, 3)
    with model.trace() as tracer:
        with tracer.invoke(one):
            op = model.transformer.h[1].mlp.source.self_act_0
            op.skip(op.input)
            inner = model.transformer.h[1].mlp.act.output.save()
            result = model.transformer.h[1].mlp.output.save()
        if batched:
            with tracer.invoke(two):
                other = model.transformer.h[1].mlp.output.save()
    plain = tools.plain(module, one)["transformer.h.1.mlp.c_fc", "output"]
    with torch.no_grad():
        assert tools.close(result, module.transformer.h[1].mlp.c_proj(plain))
    with pytest.raises(StepError, match="was skipped at"):
        inner.value
    if batched:
        assert tools.close(other, tools.plain(module, two)["transformer.h.1.mlp", "output"])
    with pytest.raises(ShapeError, match=r"test_source\.py"):
        with model.trace(one):
            model.transformer.h[1].mlp.source.self_act_0.skip(torch.zeros(1, 2, 64))


@pytest.mark.parametrize("name", list(NAMES))
def test_steps_of_a_generation(name: str, tools: SimpleNamespace) -> None:
    module = eager(name, tools)
    model = LanguageModel(module)
    blocks, attention, _, _ = NAMES[name]
    long, short = tools.prompts(7, 4)
    saved: dict[int, list[Any]] = {0: [], 1: []}
    with model.generate(max_new_tokens=3, do_sample=False) as generator:
        for index, ids in enumerate((long, short)):
            with generator.invoke(ids) as invoker:
                for step in range(3):
                    if step:
                        invoker.next()
                    op = model.get(f"{blocks}.1.{attention}").source.attention_interface_0
                    saved[index].append(op.source.softmax_0.output.save())
    for index, ids in enumerate((long, short)):
        cache, tokens = None, ids[None]
        for found in saved[index]:
            with torch.no_grad():
                out = module(input_ids=tokens, past_key_values=cache, output_attentions=True)
            cache, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
            assert tools.close(found, out.attentions[1])


def test_variants_of_one_prompt_start_before_the_edited_operation(tools: SimpleNamespace) -> None:
    module, model = tools.module("gpt2"), tools.model("gpt2")
    (ids,) = tools.prompts(9)

    def block(plan: Any) -> list[Any]:
        saved = []
        with model.trace(plan=plan) as tracer:
            for factor in range(4):
                with tracer.invoke(ids):
                    model.transformer.h[2].mlp.source.self_act_0.output *= factor
                    saved.append(model.lm_head.output.save())
        return saved

    with tools.block_rows(module) as rows:
        planned = block(None)
    assert rows[0] == rows[1] == 1 and rows[2] == rows[3] == 4
    for found, expected in zip(planned, block(False), strict=True):
        assert tools.close(found, expected.value)
    for factor, found in enumerate(planned):
        act = ("transformer.h.2.mlp.act", "output")
        plain = tools.plain(module, ids, [(act, lambda x, f=factor: x * f)])
        assert tools.close(found, plain["lm_head", "output"])


def test_torch_functions_are_reached_without_text(tools: SimpleNamespace) -> None:
    space: dict[str, Any] = {"torch": torch}
    exec("def forward(self, x):\n    return torch.tanh(self.linear(x)) + 1", space)
    kind = type("Made", (torch.nn.Module,), {"forward": space["forward"]})
    module = kind()
    module.linear = torch.nn.Linear(3, 3)
    model = Model(module)
    x = torch.randn(2, 3)
    with pytest.raises(SourceError, match=r"no source text.*module\.functions"):
        print(model.source)
    with model.trace(x) as tracer:
        assert "tanh_0" in dir(model.functions)
        hidden = model.linear.output * 2  # what the graph computes is not counted
        model.functions.tanh_0.output = hidden
        result = tracer.output.save()
    torch.testing.assert_close(result.value, module.linear(x).detach() * 2 + 1)
    assert tools.left_behind(module) == []


class Base(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def decorated(function: Any) -> Any:
    import functools

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) + 100

    return wrapper


class Odd(Base):
    """What is hard about a function: super, private names, decorators, loops, closures, in place."""

    __hidden = 3

    @decorated
    @torch.no_grad()
    def forward(self, x: torch.Tensor, times: int = 2) -> torch.Tensor:
        text = """
two lines"""
        assert text.startswith("\n")
        y = super().forward(x)
        for _ in range(times):
            y = torch.add(y, self.__hidden)
        y = y.clone()
        y.mul_(2)
        y += 1
        return -y


def test_functions_that_are_hard_to_compile_again(tools: SimpleNamespace) -> None:
    module, other = Odd(), Odd()
    own = Odd.forward
    model = Model(module)
    x = torch.tensor([[1.0], [2.0]])
    during = []

    def look(value: torch.Tensor) -> torch.Tensor:
        during.append((Odd.forward is own, "forward" in other.__dict__, other(x)))
        return value

    plain = module(x)
    with model.trace(x) as tracer:
        source = model.source
        first = source.super_forward_0.output.save()
        second = source.add_0.calls[1].output.save()
        source.mul__0.output[:] = 7
        apply(look, source.add_1.input).save()
        result = tracer.output.save()
    assert torch.equal(first.value, x * 2)
    assert torch.equal(second.value, x * 2 + 6)
    assert torch.equal(result.value, torch.full((2, 1), -8.0) + 100)
    assert during[0][:2] == (True, False) and torch.equal(during[0][2], plain)
    assert Odd.forward is own and "forward" not in module.__dict__


def test_an_error_inside_keeps_its_file_and_line(tools: SimpleNamespace) -> None:
    class Fails(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(x)
            return y @ torch.zeros(7, 7)  # the line

    module = Fails()
    with pytest.raises(RuntimeError) as error:
        with Model(module).trace(torch.ones(2, 3), plan=False) as tracer:
            Model.source  # the property alone
            tracer.model.source.relu_0.output.save()
            tracer.output.save()
    lines = [str(entry.statement) for entry in error.traceback]
    assert any("# the line" in line for line in lines)
    assert "forward" not in module.__dict__


def test_generators_and_modules_say_what_to_do(tools: SimpleNamespace) -> None:
    model = tools.model("gpt2")
    with pytest.raises(SourceError, match=r"Write `\.source` of that module itself"):
        print(model.transformer.h[0].mlp.source.self_act_0.source)
    with pytest.raises(SourceError, match=r"Did you mean `self_c_proj_0`"):
        model.transformer.h[0].mlp.source.self_c_prj_0


def test_a_block_without_inner_operations_keeps_its_schedule(tools: SimpleNamespace) -> None:
    model = LanguageModel(tools.fresh("gpt2"))
    plain = model.schedule()
    with model.trace(tools.prompts(4)[0]) as tracer:
        model.transformer.h[0].attn.source.self_c_proj_0.output.save()
        inner = model.schedule(None, tracer.recording)
        model.transformer.h[1].attn.source.self_c_proj_0.output.save()
        assert model.schedule(None, tracer.recording) is inner  # measured for all layers
    assert model.schedule() is plain and inner is not plain
    assert len(inner.visits) > len(plain.visits) and inner.chain == plain.chain


def test_two_threads_and_two_models(tools: SimpleNamespace) -> None:
    one, two = LanguageModel(tools.fresh("gpt2")), LanguageModel(tools.fresh("gpt2"))
    (ids,) = tools.prompts(5)
    expected = tools.plain(one.load(), ids)["lm_head", "output"]
    wrong: list[str] = []

    def work(model: LanguageModel, edits: bool) -> None:
        for _ in range(6):
            with model.trace(ids):
                if edits:
                    model.transformer.h[1].mlp.source.self_act_0.output[:] = 0
                logits = model.lm_head.output.save()
            if tools.close(logits, expected) == edits:
                wrong.append(str(edits))

    jobs = [(one, True), (one, False), (two, False)]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert tools.left_behind(one.load()) == []


def test_an_operation_that_does_not_run_has_no_value(tools: SimpleNamespace) -> None:
    model = tools.model("gpt2")
    (ids,) = tools.prompts(5)
    with model.trace(ids):
        value = model.transformer.h[1].attn.source.self_q_attn_0.output.save()
        model.lm_head.output.save()
    with pytest.raises(StepError, match=r"self_q_attn_0"):
        value.value
    with pytest.raises((SourceError, ScheduleError)):
        print(model.transformer.h[1].attn.source.self_q_attn_0.source)


def test_under_a_forward_of_accelerate(tools: SimpleNamespace) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    module = tools.fresh("gpt2")
    mlp = module.transformer.h[1].mlp
    seen = []

    class Counts(ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(module is mlp)  # a trial forward runs on a copy
            return args, kwargs

    add_hook_to_module(mlp, Counts())
    before = dict(mlp.__dict__)
    model = LanguageModel(module)
    (ids,) = tools.prompts(5)
    with model.trace(ids):
        model.transformer.h[1].mlp.source.self_act_0.output[:] = 0
        result = model.transformer.h[1].mlp.output.save()
    assert seen.count(True) == 1
    assert tools.close(result, mlp.c_proj.bias.detach().expand(1, 5, 16))
    assert all(mlp.__dict__[name] is before[name] for name in ("forward", "_old_forward"))
