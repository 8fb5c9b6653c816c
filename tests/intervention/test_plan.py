"""The form of a plan: its settings, and passes that are split in two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from graftwork import Model
from graftwork.intervention import Pass, Settings
from graftwork.intervention.plan import Arrival
from graftwork.tracing.node import READ, HookPoint, Node

PLACE = HookPoint("1", "output")


def read(index: int, invoke: int) -> Node:
    return Node(index, READ, PLACE, (), {}, invoke, __file__, 1)


def pass_of(count: int, **rest: Any) -> Pass:
    one = Pass(list(range(count)), **rest)
    one.arrivals[PLACE] = Arrival(PLACE, [read(i, i) for i in range(count)], [])
    return one


def test_naive_settings_switch_everything_off() -> None:
    naive = Settings.naive()
    switches = ("dead_code", "micro_batches", "prefix_reuse", "less_head", "stop", "memory")
    assert not any(getattr(naive, switch) for switch in switches)
    assert all(getattr(Settings(), switch) for switch in switches)


def test_halves_have_what_is_wanted_of_their_own_invokes() -> None:
    halves = pass_of(5).halves()
    assert [half.invokes for half in halves] == [[0, 1], [2, 3, 4]]
    for half in halves:
        assert [node.invoke for node in half.arrivals[PLACE].reads] == half.invokes


def test_halves_of_a_base_pass_take_those_along_that_share_their_input() -> None:
    one = pass_of(2, shared={7: 0, 8: 1, 9: 1}, base=True, keep={1})
    first, second = one.halves()
    assert first.shared == {7: 0} and second.shared == {8: 1, 9: 1}
    assert first.base and second.base


def test_halves_are_cut_at_a_seam() -> None:
    first, second = pass_of(6, seams=[4, 5]).halves()
    assert first.invokes == [0, 1, 2, 3] and second.invokes == [4, 5]
    assert first.halves() == []
    assert [half.invokes for half in second.halves()] == [[4], [5]]


@pytest.mark.parametrize("one", [pass_of(1), pass_of(3, seams=[])])
def test_a_pass_that_cannot_be_split_has_no_halves(one: Pass) -> None:
    assert one.halves() == []


# ---------------------------------------------------------------- plans of plain modules

WIDTH = 4


def rows(count: int = 1) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4))))


def passes(model: Any, tracer: Any) -> list[list[int]]:
    return [one.invokes for one in model.plan_block(tracer).passes]


def test_prompts_of_a_plain_module_run_as_one_batch(model: Any) -> None:
    with model.trace() as tracer:
        for _ in range(200):
            with tracer.invoke(rows()):
                model[1].output[:, 0] = 0
                model[3].output.save()
    assert passes(model, tracer) == [list(range(200))]


def test_later_place_of_another_prompt_runs_in_an_earlier_pass(model: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(rows()):
            model[0].output[:] = 0
        with tracer.invoke(rows()):
            late = model[3].output
        with tracer.invoke(rows()):
            model[1].output[:] = late
            model[3].output.save()
    assert passes(model, tracer) == [[0, 1], [2]]


def test_earlier_or_equal_place_of_another_prompt_shares_the_pass(model: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(rows()):
            early, same = model[0].output, model[2].output
        with tracer.invoke(rows()):
            model[2].output[:] = early + same
            model[3].output.save()
    assert passes(model, tracer) == [[0, 1]]


def test_only_the_last_write_of_a_place_arrives(model: Any) -> None:
    with model.trace(rows()) as tracer:
        model[1].output[:, 0] = 0
        model[1].output[:, 1] = 1
        model[1].output *= 3
        model[3].output.save()
    (one,) = model.plan_block(tracer).passes
    arrival = one.arrivals[HookPoint("1", "output")]
    assert len(arrival.reads) == 1 and len(arrival.writes) == 1
