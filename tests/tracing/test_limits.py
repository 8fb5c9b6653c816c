"""What a graph may make of Python's own values, and of time: refused before it is made."""

import operator
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwork import GraftworkError, LanguageModel, Model
from graftwork.tracing import allow_list, limits
from graftwork.tracing.errors import LimitError
from graftwork.tracing.graph import Graph
from graftwork.tracing.interpreter import Interpreter
from graftwork.tracing.limits import Limits
from graftwork.tracing.node import CALL, Node
from graftwork.tracing.operations import METHODS, OPERATORS, SETITEM, Operation, function_operation
from graftwork.tracing.proxy import CONSTANT

BIG = 10**9


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("__pow__", (10, BIG)),
        ("__rpow__", (BIG, 10)),
        ("__ipow__", (10, BIG)),
        ("__mul__", (2**62, 8)),
        ("__imul__", (-(2**62), 8)),
        ("__add__", (2**64 - 1, 1)),
        ("__sub__", (-(2**63), 1)),
        ("__lshift__", (1, 64)),
        ("__lshift__", (1, 2**62)),
        ("__rlshift__", (2**62, 1)),
        ("__ilshift__", (1, 2**62)),
        ("__mul__", ([0], BIG)),
        ("__rmul__", (BIG, (0,))),
        ("__mul__", ("a", BIG)),
        ("__mul__", ([0], torch.tensor(BIG))),
        ("__imul__", ([0], BIG)),
        ("__add__", ([0] * 600_000, [0] * 600_000)),
        ("__iadd__", ([0], torch.zeros(1).expand(BIG))),
        ("__or__", ({i: 0 for i in range(600_000)}, {-i: 0 for i in range(600_000)})),
    ],
)
def test_what_python_computes_is_bounded_before_it_is_made(
    name: str, args: tuple[Any, ...]
) -> None:
    with pytest.raises(LimitError, match=r"64 bits|more than 1000000 parts"):
        OPERATORS[name].function(*args)


def test_a_text_is_not_formatted() -> None:
    with pytest.raises(TypeError, match="formats"):
        OPERATORS["__mod__"].function("%1000000000d", 5)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("pow", (2, 63)),
        ("pow", (-1, 10**9)),
        ("pow", (2, -1)),
        ("pow", (2.0, 100)),
        ("lshift", (1, 63)),
        ("mul", (3, 4)),
        ("mul", ([1, 2], 3)),
        ("add", ((1,), (2, 3))),
        ("add", ("a", "b")),
        ("mod", (7, 3)),
        ("floordiv", (-7, 2)),
        ("or_", ({1: 2}, {3: 4})),
        ("xor", (True, False)),
        ("neg", (5,)),
    ],
)
def test_what_fits_is_what_python_gives(name: str, args: tuple[Any, ...]) -> None:
    expected = getattr(operator, name)(*args)
    found = OPERATORS[f"__{name.strip('_')}__"].function(*args)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "args"),
    [("unbind", ()), ("split", (1,)), ("chunk", (BIG,)), ("unsafe_chunk", (BIG,))],
)
def test_an_axis_is_not_split_into_any_number_of_tensors(name: str, args: tuple[Any, ...]) -> None:
    x = torch.zeros(1).expand(BIG)
    for operation in (METHODS[name], function_operation(getattr(torch, name))):
        with pytest.raises(LimitError, match="more than"):
            operation.function(x, *args)
    for sections in (BIG, torch.tensor(BIG)):
        with pytest.raises(LimitError, match="more than"):
            METHODS["tensor_split"].function(torch.zeros(3), sections)
    assert len(METHODS["unbind"].function(torch.zeros(3))) == 3
    assert len(METHODS["split"].function(torch.zeros(5000), 2500)) == 2


def run(operations: list[tuple[Operation, Any]]) -> list[Any]:
    """Values of calls; each takes the one before it in its arguments."""
    graph, values = Graph(), list[Any]()
    interpreter = Interpreter(values, lambda: None, lambda path: None)
    for operation, arguments in operations:
        node = graph.append(CALL, operation, arguments(graph.nodes))
        values.append(interpreter.evaluate(node))
    return values


def twice(nodes: list[Node]) -> tuple[Any, ...]:
    return ((nodes[-1], nodes[-1]) if nodes else (0, 0), None)


def test_containers_that_share_their_parts_are_counted_with_all_of_them() -> None:
    assert len(run([(CONSTANT, twice)] * 15)) == 15
    with pytest.raises(LimitError, match="more than 1000000 parts"):
        run([(CONSTANT, twice)] * 60)
    with pytest.raises(LimitError, match="nested deeper than 100"):
        run([(CONSTANT, lambda nodes: ((nodes[-1],) if nodes else (0,), None))] * 200)
    half = [(CONSTANT, lambda nodes: ([0] * 600_000, None))]
    with pytest.raises(LimitError, match="together"):
        run([*half, *[(CONSTANT, lambda nodes: (nodes[-1], None))] * 60])
    grows = (SETITEM, lambda nodes: (nodes[-1], slice(0, 0), nodes[-1]))
    with pytest.raises(LimitError, match="more than 1000000 parts"):
        run([*half, grows])


def test_every_limit_is_in_the_table() -> None:
    assert Limits() == limits.LIMITS
    names = {name for name in vars(limits) if name.isupper()}
    assert names == {"LIMITS", "LEAST", "MOST", "PARTS", "DEPTH", "PARTS_OF_RUN", "POWER"}


def test_an_edit_that_hangs_or_fills_the_memory_is_refused_while_it_is_read(
    tmp_path: Path,
) -> None:
    model, file = LanguageModel("graftwork/tiny"), tmp_path / "file.edits"
    with model.edit() as edited:
        h = model.transformer.h[1].output
        model.transformer.h[1].output = h.repeat(2, 1, 1)[:1] * 2.0
    edited.save_edits(file)
    LanguageModel("graftwork/tiny").load_edits(file)
    with pytest.raises(GraftworkError, match=r"100 numbers are the most"):
        LanguageModel("graftwork/tiny").load_edits(file, limits=Limits(elements=100))
    with pytest.raises(GraftworkError, match="more than 1 nodes"):
        LanguageModel("graftwork/tiny").load_edits(file, limits=Limits(count=1))


def refused(function: Any, *args: Any, **kwargs: Any) -> list[str]:
    operation = function_operation(function)
    name = allow_list.name_of(operation)
    assert name is not None
    return list(allow_list.complaints(operation, name, args, kwargs))


def test_how_long_a_function_works_stands_in_the_graph(toy: Model) -> None:
    x, node = torch.ones(2, 2), Graph().append(CALL, CONSTANT, (3, None))
    for function, good in [
        (torch.matrix_power, -3),
        (torch.linalg.matrix_power, 3),
        (torch.mvlgamma, 2),
        (torch.repeat_interleave, 2),
        (torch.nn.functional.one_hot, 7),
    ]:
        assert not refused(function, x, good)
        for bad in (-(2**63), 2**62, node, x, None, True):
            assert refused(function, x, bad), (function, bad)
        assert refused(function, x)
    assert refused(torch.nn.functional.one_hot, x, num_classes=-1)


#: Called with what no kernel expects: each of these ended the process, or ran on, for some name.
WILD = """
import sys, torch, warnings
warnings.simplefilter("ignore")
torch.set_num_threads(1)
from graftwork.tracing import allow_list
log = torch.randn(6, 2, 5).log_softmax(2)
wild = torch.tensor([[-1, 2**40, -(2**40)], [1, 2, 3]])
f, nan = torch.rand(5, 5), torch.full((3, 3), float("nan"))
lu, pivots = torch.rand(3, 3), torch.tensor([-2, 2**30, 9], dtype=torch.int32)
layers = [torch.rand(12, 3), torch.rand(12, 4), torch.rand(12), torch.rand(12)]
none = torch.zeros(0, dtype=torch.long)
cases = [
    (log, wild, [6, 6], [3, 2]), (log, wild, torch.tensor([6, 2**40]), torch.tensor([3, 2**40])),
    (f, torch.tensor([0, 2**40, 2, 1]), torch.tensor([0, -(2**30)])), (f, wild), (wild, f),
    (nan,), (nan, nan), (f.abs() * 1e30, torch.rand(5, 5)), (lu, pivots), (lu, pivots, lu),
    (lu, lu, pivots), (torch.rand(0, 3, 5), none.int()), (f, 2**62), (f, -(2**63)), (wild, -1),
    (torch.rand(7, 3), none, torch.rand(1, 2, 4), layers, True, 1, 0.0, False, False),
    (torch.rand(5, 2, 3), [torch.rand(1, 2, 4)] * 2, layers, True, 1, -1.0, False, True, True),
    (torch.rand(3, 3, 3), torch.rand(3, 3, 0)), (f, [2**62, -1, 100], 2), (wild, wild, wild),
    (f, 0, wild[0], f), (f, wild[0], f), ([wild, f],), (f, [wild[0]], f), (f, f, f, 99, 99, True),
]
for name, operation in allow_list.operations().items():
    if "." not in name or name in sys.argv[1:]:
        continue
    for args in cases:
        if list(allow_list.complaints(operation, name, args, {})):
            continue
        print(name, flush=True)
        try:
            operation.function(*args)
        except Exception:
            pass
print("END")
"""


@pytest.mark.slow
def test_no_listed_operation_ends_the_process_or_runs_on() -> None:
    done = subprocess.run([sys.executable, "-c", WILD], capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert lines[-1] == "END", (lines[-3:], done.returncode, done.stderr[-500:])
