"""One module object at several paths: each path is the call there, as a copy of the object would be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from graftwork import LanguageModel, Model
from graftwork.intervention.twins import further_places


def hooks_of(module: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.fixture
def net() -> Any:
    torch.manual_seed(0)
    act = torch.nn.ReLU()
    return torch.nn.Sequential(torch.nn.Linear(4, 4), act, torch.nn.Linear(4, 4), act)


def apart(net: Any) -> Any:
    """The same network with an object of its own at each path."""
    return torch.nn.Sequential(*(copy.deepcopy(layer) for layer in net))


def values(net: Any, x: torch.Tensor, **edits: Any) -> dict[str, torch.Tensor]:
    """What comes out of each layer, by plain hooks on objects of their own."""
    plain, seen = apart(net), {}
    for name, layer in plain.named_children():

        def hook(_: Any, __: Any, output: Any, name: str = name) -> Any:
            seen[name] = edits.get(f"at{name}", lambda value: value)(output)
            return seen[name]

        layer.register_forward_hook(hook)
    with torch.no_grad():
        plain(x)
    return seen


def test_each_path_is_its_own_call(net: Any) -> None:
    model, x = Model(net), torch.randn(2, 4)
    expected = values(net, x)
    with model.trace(x) as tracer:
        cache = tracer.cache()
        last, entered = model[3].output.save(), model[3].input.save()
        shape = model[3].output.shape
        first = model[1].output.save()
    assert torch.equal(first.value, expected["1"]) and torch.equal(last.value, expected["3"])
    assert torch.equal(entered.value, expected["2"]) and shape == (2, 4)
    assert cache.keys() == ["0", "1", "2", "3"]
    assert torch.equal(cache["3"].output, expected["3"])
    assert net[1] is net[3] and hooks_of(net) == 0 and further_places(net) == [(net, "3")]


def test_an_edit_at_one_path_leaves_the_other(net: Any) -> None:
    model, x = Model(net), torch.randn(2, 4)
    expected = values(net, x, at3=lambda value: value * -2)
    with model.trace(x):
        model[3].output[:] *= -2
        first, last = model[1].output.save(), model.output.save()
    assert torch.equal(first.value, expected["1"]) and torch.equal(last.value, expected["3"])
    with model.trace(x):
        model[3].skip(model[3].input)
        first, last = model[1].output.save(), model.output.save()
    assert torch.equal(first.value, expected["1"]) and torch.equal(last.value, expected["2"])


def test_prompts_of_a_batch_keep_their_calls(net: Any) -> None:
    model, rows = Model(net), [torch.randn(1, 4) for _ in range(3)]
    saved = []
    with model.trace() as tracer:
        for number, row in enumerate(rows):
            with tracer.invoke(row):
                if number == 1:
                    model[3].output[:] = 7
                saved.append((model[1].output.save(), model.output.save()))
    for number, (first, last) in enumerate(saved):
        expected = values(net, rows[number])
        torch.testing.assert_close(first.value, expected["1"])
        want = torch.full((1, 4), 7.0) if number == 1 else expected["3"]
        torch.testing.assert_close(last.value, want)


def test_after_a_failed_run_the_object_stands_where_it_stood(net: Any) -> None:
    act = net[1]
    act.register_forward_hook(lambda *_: 1 / 0)
    model = Model(net)
    with pytest.raises(ZeroDivisionError), model.trace(torch.randn(1, 4)):
        model[3].output.save()
    assert net[1] is act and net[3] is act and hooks_of(net) == 1


@pytest.fixture(scope="module")
def shared() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    module = transformers.LlamaForCausalLM(config).eval()
    module.model.layers[2] = module.model.layers[1]
    return module


def test_a_block_that_stands_twice_has_names_at_each_place(shared: Any) -> None:
    separate = copy.deepcopy(shared)
    separate.model.layers[2] = copy.deepcopy(separate.model.layers[1])
    prompt, saved = [5, 9, 3, 1], []
    for module in (shared, separate):
        model: Any = LanguageModel(module)
        with model.trace() as tracer:
            for scale in (0.0, 1.0):
                with tracer.invoke(prompt):
                    model.layers[2].mlp_out[:] *= scale
                    places = [model.layers[i].resid_post for i in (1, 2)]
                    places += [model.layers[i].pattern for i in (1, 2)]
                    places += [model.layers[i].q for i in (1, 2)]
                    places += [model.model.layers[2].mlp.act_fn.input, model.output.logits]
                    saved.append([place.save() for place in places])
    for mine, theirs in ((saved[0], saved[2]), (saved[1], saved[3])):
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one.value, other.value)
    assert not torch.equal(saved[0][0].value, saved[0][1].value)
    assert shared.model.layers[1] is shared.model.layers[2] and hooks_of(shared) == 0
