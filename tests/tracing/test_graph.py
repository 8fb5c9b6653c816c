"""The recorded graph: what it holds, how it prints, what of it is needed."""

from typing import Any

import numpy as np
import torch

import graftwork
from graftwork import Model
from graftwork.tracing.errors import Location, near
from graftwork.tracing.node import CALL, MODULE, PARAMETER, READ, WRITE


def test_graph_prints_one_operation_a_line_with_the_users_line(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x) as tracer:
        h = toy.mid.output
        (h[:, -1] * 2).save()  # doubled
        toy.inp.output += toy.out.bias  # shifted
        toy.out(h).save()
    lines = str(tracer.graph).splitlines()
    assert len(lines) == len(tracer.graph) == len(tracer.graph.nodes)
    assert "mid.output" in lines[0] and "h = toy.mid.output" in lines[0]
    (doubled,) = (line for line in lines if "mul(%1, 2)" in line)
    assert "(saved)" in doubled and "# doubled" in doubled and "test_graph.py" in doubled
    assert any("inp.output = %" in line and "# shifted" in line for line in lines)
    assert any("out.bias" in line for line in lines) and any("out(%0)" in line for line in lines)


def test_graph_of_every_kind_of_node_keeps_the_invariants(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x) as tracer:
        toy.mid.output[:, 0] += torch.ones(8)
        toy.tup.output[0].view(-1)[0] = toy.out.weight.sum()
        toy.act.input = np.zeros((2, 5, 8), dtype=np.float32)
        graftwork.apply(lambda a: a[0], [toy.out(toy.mid.output)]).save()
    tracer.graph.lint()
    kinds = {node.kind for node in tracer.graph.nodes}
    assert kinds == {READ, CALL, MODULE, PARAMETER, WRITE}


def test_what_nothing_depends_on_is_not_live(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x) as tracer:
        unused = toy.mid.output * 3
        unused.sum()
        kept = (toy.inp.output * 2).save()
        live = tracer.graph.live()
        named = {repr(n): bool(live[n.index]) for n in tracer.graph.nodes}
    assert list(named.values()) == [False, False, False, True, True]
    assert kept.shape == (2, 5, 8)


def test_each_write_replaces_the_one_before(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x) as tracer:
        for i in range(4):
            toy.mid.output[:, i] = 0
        writes = dict(tracer.graph.writes)
        live = tracer.graph.live()
    (last,) = writes.values()
    assert sum(live[n.index] for n in tracer.graph.nodes if n.kind == WRITE) == 1
    assert last.index == max(n.index for n in tracer.graph.nodes if n.kind == WRITE)


def test_graph_holds_no_value_after_the_block(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x) as tracer:
        h: Any = (toy.mid.output * 2).save()
    assert tracer.graph.saves == [] and tracer.graph.saved() == {h._node.index}
    assert not any(isinstance(value, torch.Tensor) for n in tracer.graph.nodes for value in n.args)


def test_location_shows_the_source() -> None:
    line = test_location_shows_the_source.__code__.co_firstlineno
    assert str(Location(__file__, line)).endswith("`def test_location_shows_the_source() -> None:`")
    assert str(Location("<nowhere>", 3)) == "<nowhere>:3"


def test_near_names() -> None:
    assert near("trasnformer", ["transformer", "lm_head"]) == "Did you mean `transformer`?"
    assert near("zzz", ["a", "b"]) == "It has `a`, `b`."
    assert near("zzz", []) == "It has no submodules."
