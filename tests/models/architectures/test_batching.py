"""A prompt never feels its neighbours: on every architecture, each value of a batched prompt is what
plain transformers computes for that prompt alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from graftwork import LanguageModel
from graftwork.intervention.rows import BATCH, FIXED, TOKEN, splits
from graftwork.tracing.errors import InputError
from graftwork.tracing.node import HookPoint

LENGTHS = (3, 7, 1, 5)

# Inside these modules the tokens of the batch are sorted by expert, so prompts run apart.
SORTED = ".experts."


def forwards(module: torch.nn.Module, seen: list[int]) -> Any:
    """Counts the forwards of a module by the rows of each."""

    def hook(_: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        seen.append(len(ids))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def port(model: Any, path: str, name: str) -> Any:
    return getattr(model.get(path) if path else model, name)


def called_again(module: Any, prompt: torch.Tensor) -> set[str]:
    """The modules that one forward calls more than once."""
    called: list[str] = []
    handles = [
        child.register_forward_pre_hook(lambda *_, path=path: called.append(path))
        for path, child in module.named_modules()
    ]
    with torch.no_grad():
        module(prompt[None])
    for handle in handles:
        handle.remove()
    return {path for path in called if called.count(path) > 1}


def test_every_value_is_that_of_the_solo_forward(architecture: str, tools: Any) -> None:
    module, model = tools.module(architecture), tools.model(architecture)
    prompts = tools.prompts(*LENGTHS)
    expected = [tools.plain(module, prompt[None]) for prompt in prompts]
    several = called_again(module, prompts[0])  # their values are those of `.calls[i]`
    places = [one for one in expected[0] if SORTED not in one[0] and one[0] not in several]
    saved = []
    rows: list[int] = []
    counter = forwards(module, rows)
    with model.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                saved.append({place: port(model, *place).save() for place in places})
    counter.remove()
    assert rows == [len(prompts)], "the prompts share one forward"
    wrong = {
        (place, i): found
        for i, values in enumerate(saved)
        for place, value in values.items()
        if (found := tools.difference(value.value, expected[i][place]))
    }
    assert wrong == {}
    assert tools.hooks(module) == 0


def test_the_axes_of_every_value_are_known(architecture: str, tools: Any) -> None:
    module, schedule = tools.module(architecture), tools.model(architecture).schedule()
    unknown = [key for key, visit in schedule.visits.items() if not splits(visit.axes, True)]
    assert unknown == []
    block = schedule.axes(HookPoint(f"{blocks_of(module)}.1", "output"))
    hidden = block[0] if isinstance(block, tuple) else block
    assert [axis.role for axis in hidden.axes] == [BATCH, TOKEN, FIXED]
    orders = [visit.order for visit in schedule.visits.values()]
    assert orders == sorted(orders)


def test_values_inside_experts_are_that_of_the_solo_forward(tools: Any) -> None:
    module, model = tools.module("mixtral"), tools.model("mixtral")
    prompts = tools.prompts(*LENGTHS)
    saved = []
    with model.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                saved.append(model.model.layers[1].mlp.experts.act_fn.output.save())
    for prompt, value in zip(prompts, saved, strict=True):
        place = ("model.layers.1.mlp.experts.act_fn", "output")
        assert tools.difference(value.value, tools.plain(module, prompt[None])[place]) is None


def test_measuring_experts_leaves_the_models_own_implementation(tools: Any) -> None:
    module = tools.module("mixtral")
    before = module.config._experts_implementation
    tools.model("mixtral").schedule()
    assert module.config._experts_implementation == before
    assert tools.model("mixtral").skeleton().config._experts_implementation == "batched_mm"


def blocks_of(module: torch.nn.Module) -> str:
    """The path of the list of blocks."""
    lists = [p for p, c in module.named_modules() if isinstance(c, torch.nn.ModuleList)]
    return min(lists, key=len)


def test_edit_of_one_prompt_is_the_solo_edit_and_leaves_the_others(
    architecture: str, tools: Any
) -> None:
    module, model = tools.module(architecture), tools.model(architecture)
    prompts = tools.prompts(*LENGTHS)
    vector = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(5))
    first = f"{blocks_of(module)}.1"
    last = f"{blocks_of(module)}.2"

    def plus(value: Any) -> Any:
        return (value[0] + vector, *value[1:]) if isinstance(value, tuple) else value + vector

    for name in ("output", "input"):
        before = [tools.plain(module, p[None]) for p in prompts]
        edited = tools.plain(module, prompts[0][None], edits={(first, name): plus})
        saved, logits = [], []
        with model.trace() as tracer:
            for i, prompt in enumerate(prompts):
                with tracer.invoke(prompt):
                    if i == 0 and name == "output":
                        model.get(first).output[0] += vector
                    elif i == 0:
                        model.get(first).input = model.get(first).input + vector
                    saved.append(model.get(last).output[0].save())
                    logits.append(model.output.logits.save())
        for i, (value, logit) in enumerate(zip(saved, logits, strict=True)):
            reference = edited if i == 0 else before[i]
            hidden = tools.tensors(reference[last, "output"])[0]
            assert tools.difference(value.value, hidden) is None, (name, i)
            final = reference["", "output"].logits
            assert tools.difference(logit.value, final) is None, (name, i)
        assert tools.difference(saved[0].value, tools.tensors(before[0][last, "output"])[0])


def test_position_of_a_token_is_that_in_its_own_prompt(architecture: str, tools: Any) -> None:
    module, model = tools.module(architecture), tools.model(architecture)
    prompts = tools.prompts(4, 9, 6)
    block = f"{blocks_of(module)}.1"
    saved = []
    with model.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                hidden = model.get(block).output[0]
                saved.append([hidden.t[0].save(), hidden.t[-1].save(), hidden.token[1:3].save()])
    for prompt, (first, last, middle) in zip(prompts, saved, strict=True):
        expected = tools.tensors(tools.plain(module, prompt[None])[block, "output"])[0]
        assert tools.difference(first.value, expected[:, 0]) is None
        assert tools.difference(last.value, expected[:, -1]) is None
        assert tools.difference(middle.value, expected[:, 1:3]) is None


def test_rows_of_one_invoke_have_their_own_positions(architecture: str, tools: Any) -> None:
    module, model = tools.module(architecture), tools.model(architecture)
    a, b, c = tools.prompts(4, 9, 6)
    block = f"{blocks_of(module)}.1"
    with model.trace() as tracer:
        with tracer.invoke([a.tolist(), b.tolist()]):
            hidden = model.get(block).output[0]
            first, last = hidden.t[0].save(), hidden.t[-1].save()
            ends = hidden.t[-3:-1].save()
            logits = model.output.logits.save()
        with tracer.invoke(c):
            other = model.get(block).output[0].save()
    solo = [tools.plain(module, p[None]) for p in (a, b, c)]
    rows = [tools.tensors(s[block, "output"])[0] for s in solo]
    assert logits.shape[:2] == (2, 9)
    for i, row in enumerate(rows[:2]):
        assert tools.difference(first.value[i], row[0, 0]) is None
        assert tools.difference(last.value[i], row[0, -1]) is None
        assert tools.difference(ends.value[i], row[0, -3:-1]) is None
        own = solo[i]["", "output"].logits[0]
        start = 0 if model.pads_right else 9 - len(own)
        assert tools.difference(logits.value[i, start : start + len(own)], own) is None
    assert tools.difference(other.value, rows[2]) is None


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert", "Electra", "Albert"])
def test_what_an_encoder_takes_from_the_first_token_is_the_prompts_own(
    kind: str, tools: Any
) -> None:
    """A pooler or a classifier reads `[:, 0]`: padding there would be another prompt's."""
    torch.manual_seed(0)
    named = {
        "hidden_size": "dim",
        "intermediate_size": "hidden_dim",
        "num_hidden_layers": "n_layers",
    }
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 40, "embedding_size": 16}
    if kind == "DistilBert":
        sizes = {named.get(name, name): size for name, size in sizes.items()} | {"n_heads": 4}
    config = getattr(transformers, f"{kind}Config")(**sizes, num_labels=3)
    module = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    model: Any = LanguageModel(module)
    prompts = tools.prompts(6, 3)
    with torch.no_grad():
        expected = torch.cat([module(input_ids=prompt[None]).logits for prompt in prompts])
    saved, rows = [], list[int]()
    counter = forwards(module, rows)
    with model.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                saved.append(model.output.logits.save())
    with model.trace([prompt.tolist() for prompt in prompts]):
        together = model.output.logits.save()
    counter.remove()
    assert rows == [2, 2]
    assert tools.difference(torch.cat([value.value for value in saved]), expected) is None
    assert tools.difference(together.value, expected) is None


def doubled(name: str, tools: Any, **options: Any) -> Any:
    module = copy.deepcopy(tools.module(name)).double()
    for option, value in options.items():
        getattr(module, option)(value)
    return module


@pytest.mark.parametrize("name", ["bloom", "gemma2", "llama", "gpt_neo", "bert"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_prompts_of_a_model_in_float64_do_not_feel_each_other(
    name: str, attention: str, tools: Any
) -> None:
    """An eager softmax in float32 makes minus infinity of the lowest float64 of a mask."""
    module = doubled(name, tools)
    if attention == "eager" or getattr(module, "_supports_sdpa", False):
        module.set_attn_implementation(attention)
    model: Any = LanguageModel(module)
    prompts = tools.prompts(3, 5)
    saved = []
    with model.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                saved.append((model.layers[1].pattern.save(), model.output.logits.save()))
    for prompt, (pattern, logits) in zip(prompts, saved, strict=True):
        with torch.no_grad():
            expected = module(input_ids=prompt[None]).logits
        torch.testing.assert_close(logits.value, expected)
        assert pattern.value.isfinite().all() and pattern.shape[-2:] == (len(prompt),) * 2
    lists = [prompt.tolist() for prompt in prompts]
    if name in ("bloom", "gemma2") or (name, attention) == ("llama", "eager"):
        with pytest.raises(InputError, match="invoke of its own"):
            model.trace(lists)
    else:
        with model.trace(lists):
            together = model.output.logits.save()
        own = together.value[0, :3] if name == "bert" else together.value[0, -3:]
        torch.testing.assert_close(own, saved[0][1].value[0])


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "gpt_neox", "phi"])
def test_a_pattern_has_the_type_of_the_models_own_softmax(name: str, tools: Any) -> None:
    module = doubled(name, tools)
    prompt = tools.prompts(5)[0]
    for attention, kind in (("sdpa", torch.float64), ("eager", torch.float32)):
        module.set_attn_implementation(attention)
        with torch.no_grad():
            expected = module(input_ids=prompt[None]).logits
        model: Any = LanguageModel(module)
        with model.trace(prompt):
            pattern = model.layers[0].pattern
            dtype = pattern.dtype
            pattern, logits = pattern.save(), model.output.logits.save()
        assert pattern.value.dtype == dtype == kind
        # What is only read leaves the model's numbers as they are.
        torch.testing.assert_close(logits.value, expected, rtol=1e-12, atol=1e-12)


# PEFT asks transformers for what it will drop, and says what it ignores.
@pytest.mark.filterwarnings("ignore")
def test_prompts_behind_a_learned_prefix_do_not_feel_each_other(tools: Any) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    module: Any = get_peft_model(copy.deepcopy(tools.module("llama")), config).eval()
    model: Any = LanguageModel(module)
    prompts, saved = tools.prompts(5, 2), []
    with model.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                saved.append(model.output.logits.save())
    for prompt, logits in zip(prompts, saved, strict=True):
        with torch.no_grad():
            expected = module(
                input_ids=prompt[None], attention_mask=torch.ones_like(prompt[None])
            ).logits
        assert tools.difference(logits.value, expected) is None
    with pytest.raises(InputError, match="would need padding"):
        model.trace([prompt.tolist() for prompt in prompts])


def plain_generation(module: Any, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
    mask = torch.ones_like(prompt[None])
    return module.generate(prompt[None], attention_mask=mask, do_sample=False, **options)


def steps_of(module: Any, path: str, prompt: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """What comes out of a module at each forward of a plain generation."""
    seen: list[torch.Tensor] = []

    def hook(_: Any, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = module.get_submodule(path).register_forward_hook(hook)
    plain_generation(module, prompt, **options)
    handle.remove()
    return seen


@pytest.mark.slow
def test_generation_of_a_batch_is_that_of_each_prompt(causal: str, tools: Any) -> None:
    module, model = tools.module(causal), tools.model(causal)
    prompts = tools.prompts(3, 8, 5)
    options = {"max_new_tokens": 4, "pad_token_id": 0}
    block = f"{blocks_of(module)}.1"
    saved, invokers = [], []
    with model.generate(do_sample=False, **options) as generator:
        for prompt in prompts:
            with generator.invoke(prompt) as invoker:
                steps = []
                for step in range(4):
                    if step:
                        invoker.next()
                    steps.append((model.get(block).output[0].save(), model.lm_head.output.save()))
                saved.append(steps)
            invokers.append(invoker)
    for i, prompt in enumerate(prompts):
        plain = plain_generation(module, prompt, **options)
        assert generator.output[i, -4:].tolist() == plain[0, -4:].tolist()
        assert invokers[i].output.tolist() == plain.tolist()
        blocks = steps_of(module, block, prompt, **options)
        heads = steps_of(module, "lm_head", prompt, logits_to_keep=0, **options)
        for step in range(4):
            hidden, logits = saved[i][step]
            assert tools.difference(hidden.value, blocks[step]) is None, step
            assert tools.difference(logits.value, heads[step]) is None, step
        assert saved[i][0][1].shape[1] == len(prompt)


@pytest.mark.slow
def test_edit_of_a_later_step_touches_its_prompt_alone(causal: str, tools: Any) -> None:
    module, model = tools.module(causal), tools.model(causal)
    prompts = tools.prompts(3, 8, 5)
    options = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
    block = f"{blocks_of(module)}.1"
    vector = torch.randn(16, generator=torch.Generator().manual_seed(3)) * 4
    saved = []
    with model.generate(**options) as generator:
        for i, prompt in enumerate(prompts):
            with generator.invoke(prompt) as invoker:
                if i == 1:
                    invoker.next(2)
                    model.get(block).output[0][:] += vector
                    invoker.next()
                else:
                    invoker.next(3)
                saved.append(model.lm_head.output.save())

    calls = SimpleNamespace(count=-1)

    def hook(_: Any, args: Any, output: Any) -> Any:
        calls.count += 1
        if calls.count != 2:
            return None
        if isinstance(output, tuple):
            return (output[0] + vector, *output[1:])
        return output + vector

    for i, prompt in enumerate(prompts):
        handles = []
        if i == 1:
            handles = [module.get_submodule(block).register_forward_hook(hook)]
        calls.count = -1
        expected = steps_of(module, "lm_head", prompt, max_new_tokens=4, pad_token_id=0)
        calls.count = -1
        plain = plain_generation(module, prompt, max_new_tokens=4, pad_token_id=0)
        for handle in handles:
            handle.remove()
        assert generator.output[i, -4:].tolist() == plain[0, -4:].tolist()
        assert tools.difference(saved[i].value, expected[3]) is None
