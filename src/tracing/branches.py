"""Owns branches: `with tracer.cond(value > 0):` and `with tracer.otherwise():`.

Both are recorded. Operations of a branch are *guarded*: where the condition does not hold they do not
run, and their value is SKIPPED. What a branch changes outside of itself becomes a *selection* of the
new and the old value. So a branch is made of operations like all others, and what is read does not
depend on it: only what is computed, changed and saved does.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from .errors import BlockError
from .graph import Graph
from .node import CALL, MODULE, Node
from .operations import GUARDED, KEPT, PASSED, POSITIONS, SELECT, STEP, STOP, TEST, TOKENS
from .proxy import node_of
from .recording import OPEN, Recording

#: What stands for something else, which is put in its place or chosen without being computed.
_FREE = frozenset({SELECT, TOKENS, POSITIONS, PASSED, STEP})
_HERE = "inside `tracer.cond`"


class Branch(Graph):
    """The graph of a block while a branch is written: the same nodes, but new ones are guarded.

    Attributes:
        around: what it is a branch of.
        guard: the node of the condition, True or False.
        wanted: which of them this branch is for.
    """

    __slots__ = ("around", "guard", "wanted")

    def __init__(self, around: Graph, guard: Node, wanted: bool) -> None:
        super().__init__()
        self.nodes, self.saves, self.writes = around.nodes, around.saves, around.writes
        self.backwards, self.traced, self.passed = around.backwards, around.traced, around.passed
        self.stops, self.rounds = around.stops, around.rounds
        self.lasting, self.needs_grad = around.lasting, around.needs_grad
        self.fixed_positions, self.branched = around.fixed_positions, True
        self.counts_tokens = around.counts_tokens
        self.around = around
        self.guard: Node = guard
        self.wanted = wanted

    def append(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        invoke: int = -1,
    ) -> Node:
        if (kind == CALL and target not in _FREE) or kind == MODULE:
            args = (self.guard, self.wanted, kind, target, *args)
            return super().append(CALL, GUARDED, args, kwargs, invoke)
        return super().append(kind, target, args, kwargs, invoke)

    def select(self, new: Node, old: Node | None, invoke: int) -> Node:
        """The new value where the branch is taken, else the old one."""
        return super().append(CALL, SELECT, (self.guard, self.wanted, new, old), None, invoke)

    def keep(self, node: Node, invoke: int) -> Node:
        """The value of `node` where the branch is taken."""
        return self.append(CALL, KEPT, (node,), None, invoke)


def record_stop(recording: Recording) -> None:
    """`tracer.stop()`: the run of the open invoke ends when what it has recorded so far is there."""
    graph, invoke = recording.graph, recording.invoke
    args = (recording.step, *graph.wanted_by(invoke))
    graph.stops.append(graph.append(CALL, STOP, args, None, invoke))


class Cond:
    """One branch, as a context."""

    __slots__ = ("_before", "_condition", "_recording", "_wanted")

    def __init__(self, recording: Recording, condition: Any, wanted: bool) -> None:
        self._recording = recording
        self._condition = condition
        self._wanted = wanted
        self._before: tuple[Any, ...] = ()

    def __enter__(self) -> None:
        recording = self._recording
        if recording.state is not OPEN or recording.invoke < 0:
            raise BlockError.no_invoke("tracer.cond()")
        graph, guard = recording.graph, self._condition
        if self._wanted:
            node = node_of(recording, guard)
            guard = graph.append(CALL, TEST, (node,), None, recording.invoke)
        elif recording.decided is None or recording.decided[1] != len(graph.nodes):
            raise BlockError.otherwise()
        else:
            guard = recording.decided[0]
        self._before = (graph, recording.no_values, recording.no_gradients, guard)
        recording.graph = Branch(graph, guard, self._wanted)
        recording.no_values = f"{_HERE} both branches are recorded; decide with `if` instead"
        recording.no_gradients = f"{_HERE} a backward would run in one branch alone"
        recording.decided = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        recording, branch = self._recording, self._recording.graph
        graph, recording.no_values, recording.no_gradients, guard = self._before
        graph.branched = True
        graph.needs_grad |= branch.needs_grad
        graph.fixed_positions |= branch.fixed_positions
        graph.counts_tokens |= branch.counts_tokens
        recording.graph = graph
        if self._wanted:
            recording.decided = guard, len(graph.nodes)
