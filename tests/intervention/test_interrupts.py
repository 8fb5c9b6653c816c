"""After a Ctrl-C, or two in a row, at whatever line: torch and the model are as they were."""

import _thread
import os
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, initialization

import graftwork
from graftwork import LanguageModel
from graftwork.intervention.interrupts import TorchState, put_back, unharmed
from graftwork.models.loading import what_loading_replaces
from graftwork.tracing import current_tracer

OURS = os.path.dirname(os.path.abspath(graftwork.__file__))
#: Where transformers replaces functions of torch while it makes a model.
PATCHES = initialization.__file__
IDS = [[1, 2, 3, 4, 5]]


def interrupted(run: Callable[[], Any], lines: set[int]) -> int:
    """Call `run` with a Ctrl-C at lines of this package, of this file and of context managers of torch,
    by their number in the order in which they run; gives how many lines ran."""
    count = 0

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count in lines:
                _thread.interrupt_main()
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        ours = code.co_filename.startswith((OURS, PATCHES)) or code.co_filename == __file__
        return line if ours or code.co_name in ("__enter__", "__exit__") else None

    sys.settrace(call)
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return count


def tiny() -> LanguageModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=16,
        vocab_size=50,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=49,
    )
    return LanguageModel(GPT2LMHeadModel(config).eval())


def trace(model: LanguageModel) -> None:
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            h = model.transformer.h[1].output
            assert h.shape[-1] == 16
            h[:, -1] = 0
            model.lm_head.output.save()
        with tracer.invoke([1, 2, 3]):
            model.transformer.h[0].output.save()
            left = 1  # what a Ctrl-C meets here is raised in `__exit__`
        left += 1


def generate(model: LanguageModel) -> None:
    with model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0):
        model.transformer.h[1].mlp.output.save()


def check(model: LanguageModel, before: TorchState, expected: torch.Tensor, at: Any) -> None:
    assert TorchState.now() == before, at
    module = model.load()
    for child in module.modules():
        hooks = (child._forward_hooks, child._forward_pre_hooks, child._forward_hooks_always_called)
        assert not any(hooks) and "forward" not in child.__dict__, at
        assert not child.training, at
    assert all(parameter.requires_grad for parameter in module.parameters()), at
    skeleton = model.skeleton()
    assert not any(c._forward_hooks or c._forward_pre_hooks for c in skeleton.modules()), at
    free: list[bool] = []

    def take() -> None:
        free.append(model._lock.acquire(blocking=False))
        if free[-1]:
            model._lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert free == [True], at
    with model.trace(IDS):
        model.transformer.h[1].output[:, -1] = 0
        found = model.lm_head.output.save()
    assert torch.equal(found.value, expected), at
    assert current_tracer() is None, at


@pytest.mark.slow
@pytest.mark.parametrize("block", [trace, generate])
def test_the_next_block_is_right_after_any_interrupt(
    block: Callable[[LanguageModel], None],
) -> None:
    before, reference = TorchState.now(), tiny()
    with reference.trace(IDS):
        reference.transformer.h[1].output[:, -1] = 0
        saved = reference.lm_head.output.save()
    expected = saved.value
    total = interrupted(lambda: block(tiny()), set())
    step = int(os.environ.get("GRAFTWORK_INTERRUPT_STEP", max(1, total // 12)))
    for first in range(1, total, step):
        for second in (0, 3):
            model = tiny()
            lines = {first, first + second}
            interrupted(lambda model=model: block(model), lines)  # type: ignore[misc]
            check(model, before, expected, lines)


@pytest.mark.slow
def test_the_next_load_is_right_after_any_interrupt(tmp_path: Path) -> None:
    module = tiny().load()
    module.save_pretrained(tmp_path)
    expected = module(torch.tensor(IDS)).logits
    before = TorchState.now()
    functions = {(owner, name): getattr(owner, name) for owner, name in what_loading_replaces()}
    models: list[LanguageModel] = []

    def load() -> None:
        models.append(LanguageModel(tmp_path))
        models[-1].load()

    total = interrupted(load, set())
    step = int(os.environ.get("GRAFTWORK_INTERRUPT_STEP", max(1, total // 10)))
    for first in range(1, total, step):
        models.clear()
        interrupted(load, {first, first + 2})
        assert TorchState.now() == before, first
        for (owner, name), function in functions.items():
            assert getattr(owner, name) is function, (first, name)
        model = models[0] if models else LanguageModel(tmp_path)
        assert torch.equal(model(torch.tensor(IDS)).logits, expected), first


def test_what_was_replaced_is_put_back() -> None:
    owner = types.SimpleNamespace(one=1, two=2)
    undo = put_back([(owner, "one"), (owner, "two")])
    owner.one = 5
    undo()
    assert (owner.one, owner.two) == (1, 2)


def test_what_an_exit_does_not_reach_is_put_back() -> None:
    before = TorchState.now()
    mode = torch._subclasses.fake_tensor.FakeTensorMode()
    undone: list[int] = []

    def work() -> None:
        torch.set_default_dtype(torch.float64)
        torch.device("meta").__enter__()
        mode.__enter__()
        torch._C._set_grad_enabled(False)
        raise KeyboardInterrupt

    def undo() -> None:
        undone.append(1)
        if len(undone) < 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unharmed(work, undo)
    assert len(undone) == 3 and TorchState.now() == before
    assert torch.zeros(1).device.type == "cpu" and torch.zeros(1).dtype is torch.float32
