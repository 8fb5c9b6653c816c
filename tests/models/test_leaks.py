"""Many blocks leave nothing behind, and a model that is dropped frees its weights."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from graftwork import LanguageModel
from graftwork.tracing.graph import Graph
from graftwork.tracing.node import Node
from graftwork.tracing.recording import Recording

PROMPT = "The Eiffel Tower is in the city of"


def saves(model: LanguageModel) -> None:
    with model.trace(PROMPT):
        model.transformer.h[1].output[:, -1] *= 2
        assert model.transformer.h[2].output.shape[-1] == 128
        model.lm_head.output[0, -1].save()


def sweep(model: LanguageModel) -> None:
    with model.trace() as tracer:
        for layer in range(3):
            with tracer.invoke(PROMPT):
                model.transformer.h[layer].output[:, -1] = 0
                model.lm_head.output[0, -1].save()


def gradient(model: LanguageModel) -> None:
    with model.trace(PROMPT):
        model.lm_head.output[0, -1, 7].backward()
        model.transformer.h[1].output.grad.save()


def steps(model: LanguageModel) -> None:
    with model.generate(PROMPT, max_new_tokens=2) as tracer, tracer.all():
        model.transformer.h[1].output.save()


def demand(model: LanguageModel) -> None:
    with model.trace(PROMPT):
        assert model.transformer.h[1].output.norm() > 0
        model.lm_head.output[0, -1].save()


def failed(model: LanguageModel) -> None:
    with pytest.raises(RuntimeError), model.trace(PROMPT):
        (model.transformer.h[1].output @ torch.ones(3, 3)).save()


def session(model: LanguageModel) -> None:
    with model.session():
        with model.trace(PROMPT):
            hidden = model.transformer.h[1].output
        with model.trace(PROMPT):
            model.transformer.h[1].output[:] = hidden


def inner(model: LanguageModel) -> None:
    with model.trace(PROMPT) as tracer:
        model.transformer.h[1].mlp.source.self_act_0.output[:] = 0
        model.transformer.h[2].skip(model.transformer.h[2].input)
        tracer.cache("transformer.h.*")


def edit(model: LanguageModel) -> None:
    model.transformer.h[1].probe = torch.nn.Linear(128, 128)
    with model.edit() as edited:
        block = model.transformer.h[1]
        block.output[0][:] += block.probe(block.output[0])
    with edited.trace(PROMPT):
        edited.transformer.h[1].probe.output[:] *= 2
        edited.lm_head.output[0, -1].save()


def branch(model: LanguageModel) -> None:
    with model.trace(PROMPT) as tracer:
        hidden = model.transformer.h[1].output[0]
        with tracer.cond(hidden.norm() > 0):
            hidden[:] *= 2
        model.transformer.h[2].output.save()
        tracer.stop()


def cached(model: LanguageModel) -> None:
    with model.trace(PROMPT) as tracer:
        tracer.cache(modules="transformer.h.*")
        torch.autograd.grad(model.lm_head.output[0, -1, 7], model.transformer.h[1].output)[0].save()


KINDS = [saves, sweep, gradient, steps, demand, failed, session, inner, edit, branch, cached]


def alive() -> dict[str, int]:
    gc.collect()
    counts = dict.fromkeys(("tensors", "graphs", "nodes", "recordings"), 0)
    for thing in gc.get_objects():
        # Objects with a `__class__` of their own (transformers' lazy modules) are none of these.
        kind = type(thing)
        counts["tensors"] += issubclass(kind, torch.Tensor)
        counts["graphs"] += issubclass(kind, Graph)
        counts["nodes"] += kind is Node
        counts["recordings"] += kind is Recording
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("block", KINDS, ids=lambda block: block.__name__)
def test_blocks_leave_nothing_behind(block: Callable[[LanguageModel], None]) -> None:
    model = LanguageModel("graftwork/tiny")
    for _ in range(3):
        block(model)
    before = alive()
    for _ in range(120):
        block(model)
    assert alive() == before
    module = model.load()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert not any("forward" in m.__dict__ for m in module.modules())


@pytest.mark.slow
def test_a_dropped_model_frees_its_weights() -> None:
    model = LanguageModel("graftwork/tiny")
    for block in KINDS:
        block(model)
    with model.trace(PROMPT):
        kept = model.transformer.h[1].output.save()
    weight = weakref.ref(model.load().lm_head.weight)
    del model
    gc.collect()
    assert weight() is None
    assert kept.shape == (1, 8, 128)
