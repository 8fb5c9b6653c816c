"""Blocks as data: two jobs that are joined give what each gives alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from graftwork import LanguageModel
from graftwork.tracing.errors import InputError
from graftwork.tracing.job import Job, Outcome

from ..models.conftest import build, random_prompts

PROMPTS = [one.tolist() for one in random_prompts(5, 3, 7, 4)]


class Collector:
    """An engine that runs nothing and keeps the jobs."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.jobs: list[Job] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def run(self, job: Job, known: Any = None) -> Outcome:
        graph = job.graph.again()
        graph.rounds = job.graph.rounds
        self.jobs.append(dataclasses.replace(job, graph=graph))
        return Outcome()


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(build("llama"))


def collected(model: Any, tracer: Any, write: Callable[[Any], Any]) -> Job:
    collector = Collector(model)
    tracer._backend = collector
    with tracer:
        write(tracer)
    return collector.jobs[0]


def values(job: Job) -> list[Any]:
    found = []
    for _, box in job.graph.saves:
        if box.error is not None:
            raise box.error
        found.append(box.value)
    return found


def read(layer: int) -> Callable[[Any], Any]:
    def write(tracer: Any) -> Any:
        block = tracer.model.layers[layer]
        block.resid_mid[:, -1] = block.resid_mid[:, -1] * 2
        block.resid_post.save()
        tracer.model.lm_head.output[:, -1].save()

    return write


def two_prompts(tracer: Any) -> Any:
    with tracer.invoke(PROMPTS[1]):
        source = tracer.model.layers[0].resid_post[:, -1]
    with tracer.invoke(PROMPTS[2]):
        tracer.model.layers[0].resid_post[:, 0] = source
        tracer.model.layers[2].resid_post.save()


def branch(tracer: Any) -> Any:
    layer = tracer.model.layers[1]
    with tracer.cond(layer.z.sum() > -1e9):
        layer.head_out[:, :, 1] = 0
    layer.o_out.save()


def gradient(tracer: Any) -> Any:
    resid = tracer.model.layers[0].resid_post
    tracer.model.lm_head.output.sum().backward()
    resid.grad.save()


def skip(tracer: Any) -> Any:
    layer = tracer.model.model.layers[1]
    layer.skip(layer.input)
    tracer.model.lm_head.output.save()


TRACES = [read(0), two_prompts, branch, gradient, read(1), skip]


def trace(model: Any, number: int) -> Any:
    args = () if TRACES[number] is two_prompts else (PROMPTS[number % 4],)
    return model.trace(*args)


def test_traces_that_are_joined_give_what_each_gives(model: LanguageModel) -> None:
    def jobs() -> list[Job]:
        return [collected(model, trace(model, n), write) for n, write in enumerate(TRACES)]

    alone = jobs()
    for job in alone:
        model.run(job)
    expected = [value for job in alone for value in values(job)]
    first, *rest = jobs()
    for job in rest:
        first = first.join(job)
    first.graph.lint()
    model.run(first)
    for found, wanted in zip(values(first), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_edits_are_numbered_apart_where_they_differ(model: LanguageModel) -> None:
    with model.edit() as edited:
        edited.layers[1].head_out[:, :, 2] = 0
    views = [model, edited, edited, model]

    def jobs() -> list[Job]:
        return [
            collected(view, view.trace(ids), read(2))
            for view, ids in zip(views, PROMPTS, strict=True)
        ]

    alone = jobs()
    for job in alone:
        model.run(job)
    first, *rest = jobs()
    for job in rest:
        first = first.join(job)
    model.run(first)
    expected = [value for job in alone for value in values(job)]
    for found, wanted in zip(values(first), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_generations_of_several_lengths_are_joined(model: LanguageModel) -> None:
    counts = [2, 4, 1, 3]

    def write(tracer: Any) -> Any:
        with tracer.all():
            tracer.model.layers[1].resid_mid[:] = tracer.model.layers[1].resid_mid * 1.5
            tracer.model.lm_head.output[:, -1].save()

    def jobs() -> list[Job]:
        return [
            collected(model, model.generate(ids, max_new_tokens=n, do_sample=False), write)
            for ids, n in zip(PROMPTS, counts, strict=True)
        ]

    alone, expected = jobs(), []
    outputs = [model.run(job).result for job in alone]
    for job in alone:
        expected += values(job)
    first, *rest = jobs()
    for job in rest:
        first = first.join(job)
    first.graph.lint()
    outcome = model.run(first)
    found = values(first)
    assert len(found) == len(expected) == sum(counts)
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5)
    for number, output in enumerate(outputs):
        assert torch.equal(outcome.outputs[number], output)


def test_what_cannot_run_together_is_refused(model: LanguageModel) -> None:
    plain = collected(model, model.trace(PROMPTS[0]), read(0))

    def whole(tracer: Any) -> Any:
        with tracer.invoke(PROMPTS[0]):
            pass
        with tracer.invoke():
            tracer.model.layers[0].resid_post.save()

    other = collected(model, model.trace(), whole)
    with pytest.raises(InputError, match="sees the whole batch"):
        plain.join(other)
    with pytest.raises(InputError, match="uses what the whole forward returns"):
        plain.join(collected(model, model.trace(PROMPTS[0]), lambda t: t.output.logits.save()))
    generation = model.generate(PROMPTS[0], max_new_tokens=2)
    with pytest.raises(InputError, match="one generates"):
        plain.join(collected(model, generation, lambda t: t.model.lm_head.output.save()))
    unplanned = collected(model, model.trace(PROMPTS[0], plan=False), read(0))
    with pytest.raises(InputError, match="settings differ"):
        plain.join(unplanned)
    sampled = [
        collected(
            model,
            model.generate(PROMPTS[0], max_new_tokens=2, temperature=t, do_sample=True),
            lambda tracer: tracer.model.lm_head.output.save(),
        )
        for t in (0.5, 0.7)
    ]
    with pytest.raises(InputError, match="`temperature` differs"):
        sampled[0].join(sampled[1])
