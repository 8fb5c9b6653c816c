"""Hooks are there while a pass runs, on the modules that it names, and never after."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils.hooks import RemovableHandle

import graftwork
from graftwork import LanguageModel, Model
from graftwork.intervention.patcher import at_path
from graftwork.tracing.errors import LoadError


@pytest.fixture
def module() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), nn.Tanh())


def hooked(module: nn.Module) -> list[str]:
    return [
        path
        for path, child in module.named_modules()
        if child._forward_hooks or child._forward_pre_hooks
    ]


def test_only_the_named_modules_are_touched_and_only_while_running(module: nn.Module) -> None:
    model: Any = Model(module)
    seen: list[list[str]] = []

    def look(value: torch.Tensor) -> torch.Tensor:
        seen.append(hooked(module))
        return value

    with model.trace(torch.randn(2, 4)):
        value = graftwork.apply(look, model[1][1].output)
        (value + model[2].input).save()
        assert hooked(module) == []
    assert seen == [["1.1", "2"]]
    assert hooked(module) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_while_hooks_are_installed_leaves_none(
    error: type[BaseException], module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = Model(module)

    class Fails(OrderedDict[int, Any]):
        def __setitem__(self, key: int, hook: Any) -> None:
            super().__setitem__(key, hook)
            raise error

    monkeypatch.setattr(module[2], "_forward_hooks", Fails())
    with pytest.raises(error):
        with model.trace(torch.randn(2, 4)):
            model[0].output.save()
            model[1][0].input.save()
            model[2].output.save()
    assert hooked(module) == []


def test_an_interrupt_while_hooks_are_removed_leaves_none(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = Model(module)
    remove, calls = RemovableHandle.remove, []

    def interrupted(handle: Any) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise KeyboardInterrupt
        remove(handle)

    monkeypatch.setattr(RemovableHandle, "remove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        with model.trace(torch.randn(2, 4)):
            model[0].output.save()
            model[1][0].input.save()
            model[2].output.save()
    assert hooked(module) == []


def test_the_users_own_hooks_stay_and_come_first(module: Any) -> None:
    model: Any = Model(module)
    x = torch.randn(2, 4)
    handle = module[0].register_forward_hook(lambda _, args, output: output * 10)
    with model.trace(x):
        value = model[0].output.save()
    assert torch.allclose(value.value, module[0].forward(x) * 10)
    assert hooked(module) == ["0"]
    handle.remove()
    assert hooked(module) == []


def test_a_module_at_a_path(module: nn.Module) -> None:
    assert at_path(module, "") is module
    assert at_path(module, "1.1") is module.get_submodule("1.1")


# torch warns of its own use of TorchScript, which it deprecates, when it compiles.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", ["", "transformer.h.1"])
def test_a_model_that_was_compiled_in_place_is_refused_where_a_block_runs(path: str) -> None:
    config = transformers.GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    module = transformers.GPT2LMHeadModel(config).eval()
    model: Any = LanguageModel(module)
    compiled = module.get_submodule(path)
    compiled.compile()
    with pytest.raises(LoadError, match=r"compiled in place.*module\._compiled_call_impl = None"):
        with model.trace([1, 2, 3]):
            model.transformer.h[1].output.save()
    compiled._compiled_call_impl = None  # as the message says
    with model.trace([1, 2, 3]):
        value = model.transformer.h[1].output.save()
    assert value.value is not None
