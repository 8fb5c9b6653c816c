"""Values on demand: what a block runs while it is written, compared with plain torch hooks."""

from __future__ import annotations

import code
import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import graftwork
from graftwork import GraftworkError, LanguageModel, Model
from graftwork.tracing.errors import PaddingWarning


class Counter:
    """How often modules run, by plain hooks."""

    def __init__(self, module: nn.Module, paths: list[str]) -> None:
        self.counts = dict.fromkeys(paths, 0)
        self._handles = []
        for path in paths:
            child = module.get_submodule(path)
            self._handles.append(child.register_forward_hook(self._hook(path)))

    def _hook(self, path: str) -> Any:
        def hook(*_: Any) -> None:
            self.counts[path] += 1

        return hook

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()


def plain(module: Any, ids: torch.Tensor, path: str, hooks: dict[str, Any] | None = None) -> Any:
    """What a module returns, with plain hooks that edit."""
    seen: list[Any] = []
    handles = [
        module.get_submodule(name).register_forward_hook(lambda _m, _a, out, f=f: f(out))
        for name, f in (hooks or {}).items()
    ]
    handles.append(
        module.get_submodule(path).register_forward_hook(
            lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    )
    try:
        with torch.no_grad():
            module(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0].clone()


MID = "transformer.h.1"


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (lambda h: bool(h.sum() > 1e9), lambda t: False),
        (lambda h: float(h.norm()), lambda t: float(t.norm())),
        (lambda h: int(h.argmax()), lambda t: int(t.argmax())),
        (lambda h: complex(h.norm()), lambda t: complex(t.norm())),
        (lambda h: h.norm().item(), lambda t: t.norm().item()),
        (lambda h: h[0, 0, :3].tolist(), lambda t: t[0, 0, :3].tolist()),
        (lambda h: h.numpy().sum(), lambda t: t.numpy().sum()),
        (lambda h: np.asarray(h).mean(), lambda t: t.numpy().mean()),
        (lambda h: np.exp(h).mean().item(), lambda t: np.exp(t.numpy()).mean()),
        (lambda h: float(h[0, 0, 0]) in h, lambda t: True),
        (lambda h: h[0, 0, 0] in h, lambda t: True),
        (lambda h: f"{h.sum():.3f}", lambda t: f"{t.sum():.3f}"),
        (lambda h: f"{h.argmax()}", lambda t: f"{t.argmax()}"),
        (lambda h: list(range(9))[(h[0, 0] > 0).sum() % 9], lambda t: int((t[0, 0] > 0).sum()) % 9),
    ],
)
def test_each_way_to_ask(
    gpt2: LanguageModel, gpt2_module: Any, ids: torch.Tensor, use: Any, expected: Any
) -> None:
    with gpt2.trace(ids):
        found = use(gpt2.transformer.h[1].output[0])
        last = gpt2.transformer.h[2].output[0].save()
    want = expected(plain(gpt2_module, ids, MID))
    assert type(found) is type(want) or isinstance(found, (float, int))
    assert found == want if isinstance(found, str) else np.allclose(found, want, rtol=1e-5)
    torch.testing.assert_close(last.value, plain(gpt2_module, ids, "transformer.h.2"))


def test_a_description_runs_nothing(
    gpt2: LanguageModel, gpt2_module: Any, ids: torch.Tensor
) -> None:
    with Counter(gpt2_module, [MID]) as counter:
        with gpt2.trace(ids):
            h = gpt2.transformer.h[1].output[0]
            assert "proxy of" in repr(h) and "proxy of" in str(h)
            for refused in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(GraftworkError, match="real value of"):
                    refused(h)
        assert counter.counts == {MID: 0}


def test_a_loop_on_a_value_runs_the_model_once(
    gpt2: LanguageModel, gpt2_module: Any, ids: torch.Tensor
) -> None:
    with Counter(gpt2_module, ["transformer.wte", "transformer.h.2"]) as counter:
        with gpt2.trace(ids):
            h, rounds = gpt2.transformer.h[1].output[0], 0
            while h.norm() > 0.01:
                h, rounds = h * 0.5, rounds + 1
            h = h.save()
    expected = plain(gpt2_module, ids, MID)
    while expected.norm() > 0.01:
        expected = expected * 0.5
    torch.testing.assert_close(h.value, expected)
    assert rounds > 2 and counter.counts == {"transformer.wte": 1, "transformer.h.2": 0}


def test_the_exit_starts_behind_the_block_that_was_asked(
    gpt2: LanguageModel, gpt2_module: Any, ids: torch.Tensor
) -> None:
    blocks = [f"transformer.h.{i}.mlp" for i in range(3)]
    with Counter(gpt2_module, blocks) as counter:
        with gpt2.trace(ids):
            gpt2.transformer.h[0].output[0][:] *= 3
            if gpt2.transformer.h[1].output[0].norm() > 0:
                gpt2.transformer.h[1].output[0][:, -1] = 0
            assert counter.counts == dict(zip(blocks, (1, 1, 0), strict=True))
            last = gpt2.transformer.h[2].output[0].save()
    assert counter.counts == dict.fromkeys(blocks, 1)

    def zero(out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[:, -1] = 0
        return out

    hooks = {"transformer.h.0": lambda out: out * 3, MID: zero}
    torch.testing.assert_close(last.value, plain(gpt2_module, ids, "transformer.h.2", hooks))


def test_an_earlier_write_makes_the_value_new(
    gpt2: LanguageModel, gpt2_module: Any, ids: torch.Tensor
) -> None:
    with gpt2.trace(ids):
        h = gpt2.transformer.h[1].output[0]
        before = h.norm().item()
        gpt2.transformer.h[0].output[0][:] *= 5
        after = h.norm().item()
        gpt2.transformer.h[2].output[0][:] *= 5
        again = h.norm().item()
        saved = h.save()
    edited = plain(gpt2_module, ids, MID, {"transformer.h.0": lambda out: out * 5})
    assert before == pytest.approx(float(plain(gpt2_module, ids, MID).norm()), rel=1e-5)
    assert after == again == pytest.approx(float(edited.norm()), rel=1e-5)
    torch.testing.assert_close(saved.value, edited)


def test_what_a_module_takes_is_edited_at_a_later_step_after_a_value_was_asked_for(
    gpt2: LanguageModel, ids: torch.Tensor
) -> None:
    """A cache is among what the block takes: the run that finds the value leaves nothing of it."""
    module = gpt2.load()
    one, two = ids[0, :3].tolist(), ids[0, :5].tolist()
    with gpt2.generate(max_new_tokens=2) as generator:
        with generator.invoke(one):
            value = gpt2.transformer.h[0].mlp.output
        with generator.invoke(two) as invoker:
            invoker.next()
            gpt2.transformer.h[1].input[:] *= 0.5
            gpt2.transformer.h[1].mlp.output[:] *= value.mean()
            hidden = gpt2.transformer.h[1].output[0]
            assert hidden.sum().item() != 0
            found = hidden.save()
    factor = plain(module, torch.tensor([one]), "transformer.h.0.mlp").mean()
    with torch.no_grad():
        first = module(torch.tensor([two]), use_cache=True)
    token = first.logits[:, -1:].argmax(-1)
    seen: list[torch.Tensor] = []
    block = module.transformer.h[1]
    handles = [
        block.register_forward_pre_hook(lambda _m, args: (args[0] * 0.5, *args[1:])),
        block.mlp.register_forward_hook(lambda _m, _a, out: out * factor),
        block.register_forward_hook(
            lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
        ),
    ]
    with torch.no_grad():
        module(token, past_key_values=first.past_key_values, use_cache=True)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, seen[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("branch", [False, True])
def test_what_a_module_takes_is_edited_beside_the_mask_of_the_batch(branch: bool) -> None:
    """The run that finds a value is of one prompt alone, which needs no mask."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=9,
    )
    module = LlamaForCausalLM(config).eval()
    model: Any = LanguageModel(module)
    one, two = [3, 4, 5], [5, 6]
    found = []
    with model.trace() as tracer:
        with tracer.invoke(one):
            layer = model.model.layers[0]
            taken = layer.input
            layer.skip(taken * 0.5)
            if branch:
                with tracer.cond(taken.sum() > -1e9):
                    layer.input[:] += 0.25
            else:
                layer.input = taken + 0.25
            assert model.model.layers[1].self_attn.input.sum().item() != 0
            found.append(model.model.norm.output.save())
        with tracer.invoke(two):
            found.append(model.model.layers[0].self_attn.input.save())
    assert_close(found[1], plain(module, torch.tensor([two]), "model.layers.0.input_layernorm"))
    embedded = module.model.embed_tokens(torch.tensor([one])).detach()
    handle = module.model.layers[0].register_forward_hook(lambda *_: embedded * 0.5)
    expected = plain(module, torch.tensor([one]), "model.norm")
    handle.remove()
    assert_close(found[0], expected)


def test_a_value_of_two_prompts_that_begin_alike_is_asked_for(
    gpt2: LanguageModel, ids: torch.Tensor
) -> None:
    """What the first blocks gave is kept for the other prompt of this run, and for the next run."""
    module, own = gpt2.load(), ids[0, :6].tolist()
    second = "transformer.h.1.attn.c_attn"
    with gpt2.trace() as tracer:
        with tracer.invoke(own):
            first = gpt2.transformer.h[1].attn.c_attn.output
            first *= 0.5
            factor = first.norm().tanh() * gpt2.transformer.h[1].ln_2.input.norm().tanh() * 0.5
        with tracer.invoke(own):
            gpt2.transformer.h[1].attn.c_attn.output[:] *= factor
            assert gpt2.transformer.h[1].attn.c_attn.output.sum().item() != 0
            found = gpt2.transformer.h[1].output[0].save()
            whole = factor.save()
    expected = plain(
        module, torch.tensor([own]), "transformer.h.1", {second: lambda out: out * whole}
    )
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_functions_whose_value_is_known_run_once(gpt2: LanguageModel, ids: torch.Tensor) -> None:
    calls = []

    def count(value: torch.Tensor) -> torch.Tensor:
        calls.append(value.shape)
        return value * 2

    with gpt2.trace(ids):
        double = graftwork.apply(count, gpt2.transformer.h[0].output[0])
        assert double.sum() != 0
        gpt2.transformer.h[1].output[0][:] = double
        saved = double.save()
        last = gpt2.transformer.h[1].output[0].save()
    assert len(calls) == 1 and torch.equal(saved.value, last.value)


def test_values_between_padded_prompts(gpt2: LanguageModel, gpt2_module: Any) -> None:
    short, long = torch.arange(4)[None] + 5, torch.arange(9)[None] + 30
    with pytest.warns(PaddingWarning, match="`sum` over the tokens"):
        with gpt2.trace() as tracer:
            with tracer.invoke(short):
                first = gpt2.transformer.h[0].output[0]
            with tracer.invoke(long):
                second = gpt2.transformer.h[1].output[0]
                found = float(second.sum())
                second[:, -1] = first[:, -1] * (2 if found > 0 else 3)
                last = gpt2.transformer.h[2].output[0].save()
            between = float(first.sum())
            with tracer.invoke():
                whole = float(gpt2.transformer.h[0].output[0].abs().sum())
                assert whole > 0
    clean, other = plain(gpt2_module, short, "transformer.h.0"), plain(gpt2_module, long, MID)
    assert found == pytest.approx(float(other.sum()), rel=1e-4)
    assert between == pytest.approx(float(clean.sum()), rel=1e-4)

    def edit(out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[:, -1] = clean[:, -1] * (2 if found > 0 else 3)
        return out

    expected = plain(gpt2_module, long, "transformer.h.2", {MID: edit})
    torch.testing.assert_close(last.value, expected, atol=1e-5, rtol=1e-4)


def test_a_value_of_another_prompt_inside_a_write(gpt2: LanguageModel, gpt2_module: Any) -> None:
    one, two = torch.arange(6)[None] + 5, torch.arange(6)[None] + 40
    with gpt2.trace() as tracer:
        with tracer.invoke(one):
            source = gpt2.transformer.h[0].output[0]
        with tracer.invoke(two):
            gpt2.transformer.h[0].output[0][:] = source
            after = gpt2.transformer.h[2].output[0]
            before = float(after.norm())
        with tracer.invoke(one):
            pass
    expected = plain(gpt2_module, one, "transformer.h.2")
    assert before == pytest.approx(float(expected.norm()), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}])
def test_a_generation_that_looks_at_its_values(
    gpt2: LanguageModel, gpt2_module: Any, ids: torch.Tensor, options: Any
) -> None:
    ids = ids[:1]
    torch.manual_seed(3)
    expected = gpt2_module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, pad_token_id=0, **options
    )
    torch.manual_seed(3)
    with gpt2.generate(max_new_tokens=4, pad_token_id=0, **options) as generator:
        with generator.invoke(ids) as invoker:
            first = float(gpt2.transformer.h[1].output[0].norm())
            invoker.next(2)
            third = float(gpt2.transformer.h[1].output[0].norm())
            saved = gpt2.transformer.h[1].output[0].save()
            result = generator.output[0].tolist()
    assert torch.equal(generator.output, expected) and result == expected[0].tolist()
    full = plain(gpt2_module, expected[:, : ids.shape[1] + 2], MID)
    assert first == pytest.approx(float(full[:, : ids.shape[1]].norm()), rel=1e-4)
    assert third == pytest.approx(float(full[:, -1].norm()), rel=1e-4)
    assert float(saved.value.norm()) == pytest.approx(third)


def test_a_wrong_operation_is_of_the_line_that_recorded_it(
    gpt2: LanguageModel, gpt2_module: Any, ids: torch.Tensor
) -> None:
    with gpt2.trace(ids):
        h = gpt2.transformer.h[1].output[0]
        wrong = h @ torch.zeros(3, 3)
        with pytest.raises(RuntimeError) as caught:
            float(wrong.sum())
        assert "test_demand.py" in str(caught.value).splitlines()[0]
        good = float(h.sum())  # the block goes on
    assert good == pytest.approx(float(plain(gpt2_module, ids, MID).sum()), rel=1e-4)


def test_an_outer_proxy_in_a_function_of_the_run(gpt2: LanguageModel, ids: torch.Tensor) -> None:
    with gpt2.trace(ids):
        h = gpt2.transformer.h[1].output[0]
        spied = graftwork.apply(lambda value: value * float(h.sum()), h)
        with pytest.raises(GraftworkError, match="was not given it"):
            float(spied.sum())


def test_from_exec_and_from_a_console(
    gpt2: LanguageModel, gpt2_module: Any, ids: torch.Tensor
) -> None:
    text = (
        "with model.trace(ids):\n"
        "    h = model.transformer.h[1].output[0]\n"
        "    found = 'large' if h.norm() > 0.01 else 'small'\n"
        "    h = h.save()\n"
    )
    place: dict[str, Any] = {"model": gpt2, "ids": ids}
    exec(text, place)
    assert place["found"] == "large"
    console = code.InteractiveConsole({"model": gpt2, "ids": ids})
    for line in [*text.splitlines(), ""]:
        console.push(line)
    assert console.locals["found"] == "large"
    torch.testing.assert_close(console.locals["h"].value, plain(gpt2_module, ids, MID))


def test_two_threads(gpt2: LanguageModel, gpt2_module: Any, ids: torch.Tensor) -> None:
    found: dict[int, float] = {}

    def work(number: int) -> None:
        with gpt2.trace(ids):
            gpt2.transformer.h[0].output[0][:] *= number
            value = float(gpt2.transformer.h[1].output[0].norm())
            found[number] = value

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (1, 2, 3):
        hooks = {"transformer.h.0": lambda out, n=number: out * n}
        expected = plain(gpt2_module, ids, MID, hooks)
        assert found[number] == pytest.approx(float(expected.norm()), rel=1e-4)


def test_known_values_are_freed_with_the_block(gpt2: LanguageModel, ids: torch.Tensor) -> None:
    with gpt2.trace(ids) as tracer:
        h = gpt2.transformer.h[1].output[0]
        assert float(h.norm()) > 0
        known = [weakref.ref(v) for v in tracer.recording.known.values.values()]
        assert any(ref() is not None for ref in known)
    gc.disable()
    try:
        assert all(ref() is None for ref in known)
    finally:
        gc.enable()


def test_a_plain_module(toy: Model, x: torch.Tensor, reference: Any) -> None:
    kept: dict[str, torch.Tensor] = {}
    with toy.trace(x) as tracer:
        h = toy.mid.output
        scale = 2.0 if h.mean() > 0 else -1.0
        toy.mid.output = h * scale
        out = tracer.output.save()
    reference(toy._module, (x,), {"mid": lambda out: kept.update(mid=out.clone())})
    factor = 2.0 if kept["mid"].mean() > 0 else -1.0
    expected = reference(toy._module, (x,), {"mid": lambda out: out * factor})
    torch.testing.assert_close(out.value, expected)


def test_dropout_is_drawn_once(ids: torch.Tensor) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5))
    model, x = Model(module.train()), torch.ones(4, 8)
    torch.manual_seed(0)
    with model.trace(x):
        h = model[1].output
        first = h.tolist()
        model[2].output[:] += 0
        last = model[3].output.save()
        saved = h.save()
    assert saved.value.tolist() == first
    torch.manual_seed(0)
    torch.testing.assert_close(last.value, module(x).detach())


def test_a_layer_by_its_number(gpt2: LanguageModel, gpt2_module: Any, ids: torch.Tensor) -> None:
    with gpt2.trace(ids):
        number = (gpt2.transformer.h[0].output[0] > 0).sum() % 2 + 1
        h = gpt2.transformer.h[number].output[0].save()
    expected = int((plain(gpt2_module, ids, "transformer.h.0") > 0).sum()) % 2 + 1
    torch.testing.assert_close(h.value, plain(gpt2_module, ids, f"transformer.h.{expected}"))
