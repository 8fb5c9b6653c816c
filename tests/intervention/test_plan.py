"""Plans of recorded blocks: what runs, in which passes. Only graphs, no model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from graftwork import Model
from graftwork.intervention import Schedule, arrivals, measure, plan
from graftwork.intervention.plan import Plan
from graftwork.tracing.errors import OrderError, ScheduleError
from graftwork.tracing.graph import Graph
from graftwork.tracing.node import HookPoint

WIDTH = 4


class Caught(Exception):
    """Leaves a block before it runs."""


def chain() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))


@pytest.fixture
def model() -> Any:
    return Model(chain())


def schedule() -> Schedule:
    return measure(chain(), lambda batch, tokens: ((torch.zeros(batch, WIDTH),), {}))


def unmeasurable() -> Schedule:
    raise ScheduleError.no_schedule("This block", "no reason")


def together(wave: list[int]) -> list[list[int]]:
    return [wave]


def apart(wave: list[int]) -> list[list[int]]:
    return [[index] for index in wave]


def graph_of(model: Any, *blocks: Callable[[], Any]) -> Graph:
    """Record each function in an invoke of its own, and run nothing."""
    kept = None
    with pytest.raises(Caught):
        with model.trace() as tracer:
            for block in blocks:
                with tracer.invoke(torch.zeros(1, WIDTH)):
                    block()
            kept = tracer.graph
            snapshot = Snapshot(kept)
            raise Caught
    return snapshot  # type: ignore[return-value]


class Snapshot(Graph):
    """The graph as it was inside the block: leaving it lets go of the saves."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.nodes = list(graph.nodes)
        self.saves = list(graph.saves)
        self.writes = dict(graph.writes)


def passes(work: Plan) -> list[list[int]]:
    return [one.invokes for one in work.passes]


def make(graph: Graph, count: int, known: Any = schedule, batches: Any = together) -> Plan:
    return plan(graph, list(range(count)), known, batches)


def test_what_no_save_or_write_needs_does_not_run(model: Any) -> None:
    def block() -> None:
        kept = model[1].output * 2
        (model[2].output + 1).sum()
        kept.save()

    graph = graph_of(model, block)
    work = make(graph, 1)
    alive = [node.describe() for node in graph.nodes if work.live[node.index]]
    assert alive == ["`1.output`", "the result of `mul`"]
    arrivals(graph, work, [0])
    assert list(work.passes[0].arrivals) == [HookPoint("1", "output")]


def test_a_write_is_needed_by_itself(model: Any) -> None:
    def block() -> None:
        model[1].output[:, 0] = 0

    graph = graph_of(model, block)
    work = make(graph, 1)
    arrivals(graph, work, [0])
    (arrival,) = work.passes[0].arrivals.values()
    assert len(arrival.reads) == 1 and len(arrival.writes) == 1


def test_only_the_last_write_of_a_place_arrives(model: Any) -> None:
    def block() -> None:
        model[1].output[:, 0] = 0
        model[1].output[:, 1] = 1
        model[1].output *= 3

    graph = graph_of(model, block)
    work = make(graph, 1)
    arrivals(graph, work, [0])
    (arrival,) = work.passes[0].arrivals.values()
    assert len(arrival.writes) == 1
    assert arrival.writes[0] is graph.nodes[-1]


def test_reads_alone_ask_for_no_schedule(model: Any) -> None:
    graph = graph_of(model, lambda: model[3].output.save(), lambda: model[0].output.save())
    assert passes(make(graph, 2, unmeasurable)) == [[0, 1]]


def test_a_write_from_its_own_place_asks_for_no_schedule(model: Any) -> None:
    def block() -> None:
        model[1].output[:] = model[1].output * 2

    assert passes(make(graph_of(model, block), 1, unmeasurable)) == [[0]]


def test_an_earlier_or_equal_place_of_another_prompt_shares_the_pass(model: Any) -> None:
    taken: dict[str, Any] = {}

    def source() -> None:
        taken["early"] = model[0].output
        taken["same"] = model[2].output

    def target() -> None:
        model[2].output[:] = taken["early"] + taken["same"]

    assert passes(make(graph_of(model, source, target), 2)) == [[0, 1]]


@pytest.mark.parametrize("known", [schedule, unmeasurable])
def test_a_later_place_of_another_prompt_runs_first(model: Any, known: Any) -> None:
    taken: dict[str, Any] = {}

    def plain() -> None:
        model[0].output[:] = 0

    def source() -> None:
        taken["late"] = model[3].output

    def target() -> None:
        model[1].output[:] = taken["late"]

    graph = graph_of(model, plain, source, target)
    assert passes(make(graph, 3, known)) == [[0, 1], [2]]


def test_waves_follow_chains(model: Any) -> None:
    taken: list[Any] = []

    def link() -> None:
        if taken:
            model[0].output[:] = taken[-1]
        taken.append(model[3].output)

    graph = graph_of(model, link, link, link)
    assert passes(make(graph, 3)) == [[0], [1], [2]]


def test_the_inputs_of_a_place_come_before_its_output(model: Any) -> None:
    def forward() -> None:
        model[1].output[:] = model[1].input

    def backward() -> None:
        late = model[1].output
        model[1].input[:] = late

    assert passes(make(graph_of(model, forward), 1)) == [[0]]
    with pytest.raises(OrderError, match=r"`1\.output`"):
        make(graph_of(model, backward), 1)


def test_a_cycle_names_a_line_of_each_prompt(model: Any) -> None:
    taken: dict[str, Any] = {}
    with pytest.raises(Caught), model.trace() as tracer:
        with tracer.invoke(torch.zeros(1, WIDTH)) as first:
            taken["a"] = model[3].output
        with tracer.invoke(torch.zeros(1, WIDTH)):
            taken["b"] = model[3].output
            model[0].output[:] = taken["a"]  # the line of b
        with first:
            model[0].output[:] = taken["b"]  # the line of a
        graph = Snapshot(tracer.graph)
        raise Caught
    with pytest.raises(OrderError) as raised:
        make(graph, 2)
    assert "# the line of a" in str(raised.value) and "# the line of b" in str(raised.value)


def test_a_cycle_over_a_place_that_both_share(model: Any) -> None:
    """One edge is to a later pass, the way back is through one pass."""
    taken: dict[str, Any] = {}
    with pytest.raises(Caught), model.trace() as tracer:
        with tracer.invoke(torch.zeros(1, WIDTH)) as first:
            taken["a"] = model[3].output
        with tracer.invoke(torch.zeros(1, WIDTH)):
            taken["b"] = model[1].output.clone()
            model[1].output[:] = taken["a"]  # needs the later
        with first:
            model[1].output[:] = taken["b"]  # the way back
        graph = Snapshot(tracer.graph)
        raise Caught
    with pytest.raises(OrderError) as raised:
        make(graph, 2)
    assert "# needs the later" in str(raised.value) and "# the way back" in str(raised.value)


def test_prompts_that_cannot_share_a_pass_run_in_the_order_of_their_needs(model: Any) -> None:
    taken: dict[str, Any] = {}

    def source() -> None:
        taken["early"] = model[0].output

    with pytest.raises(Caught), model.trace() as tracer:
        with tracer.invoke(torch.zeros(1, WIDTH)) as first:
            pass
        with tracer.invoke(torch.zeros(1, WIDTH)):
            source()
        with first:
            model[2].output[:] = taken["early"]
        graph = Snapshot(tracer.graph)
        raise Caught
    assert passes(make(graph, 2, schedule, together)) == [[0, 1]]
    assert passes(make(graph, 2, schedule, apart)) == [[1], [0]]


def test_a_swap_of_prompts_that_cannot_share_a_pass_is_refused(model: Any) -> None:
    with pytest.raises(Caught), model.trace() as tracer:
        with tracer.invoke(torch.zeros(1, WIDTH)) as first:
            mine = model[1].output.clone()
        with tracer.invoke(torch.zeros(1, WIDTH)):
            theirs = model[1].output.clone()
            model[1].output[:] = mine  # one way
        with first:
            model[1].output[:] = theirs  # the other way
        graph = Snapshot(tracer.graph)
        raise Caught
    assert passes(make(graph, 2, schedule, together)) == [[0, 1]]
    with pytest.raises(OrderError) as raised:
        make(graph, 2, schedule, apart)
    assert "# one way" in str(raised.value) and "# the other way" in str(raised.value)


def test_hundreds_of_prompts_are_planned_as_one(model: Any) -> None:
    def block() -> None:
        model[1].output[:, 0] = 0
        model[3].output.save()

    graph = graph_of(model, *[block] * 200)
    assert passes(make(graph, 200)) == [list(range(200))]
