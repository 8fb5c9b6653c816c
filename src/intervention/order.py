"""Owns the order between invokes: which has to run before which, and which must run together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from graphlib import CycleError, TopologicalSorter
from typing import Any

from ..tracing.errors import BlockError, OrderError, ScheduleError
from ..tracing.graph import Graph, arguments
from ..tracing.node import PARAMETER, READ, GradPoint, HookPoint, Node
from .plan import Plan
from .schedule import Schedule

#: Position of a place in a run: its step and its place in the order of that forward.
Position = tuple[int, int]

_RESULT = (1 << 60, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Edge:
    """A write of one invoke uses a read of another.

    Attributes:
        later: the read arrives after the write's place in a forward, so it needs an earlier pass.
    """

    first: int
    second: int
    later: bool
    read: Node
    write: Node


def position(hook_point: HookPoint, schedule: Schedule) -> Position | None:
    """Where a hook point comes in a run; None for a place that the trial forward never reached."""
    if hook_point.port in ("result", "grad"):
        return _RESULT
    visit = schedule.find(hook_point)
    return None if visit is None else (hook_point.step, visit.order)


def requirements(
    graph: Graph, live: bytearray, waits: list[list[Node]]
) -> dict[int, frozenset[int]]:
    """For each last write, the reads that it depends on, by node index."""
    needed: list[frozenset[int] | None] = [None] * len(graph.nodes)
    nothing: frozenset[int] = frozenset()
    for node in graph.nodes:
        if not live[node.index]:
            continue
        if node.kind == READ:
            own = frozenset((node.index,))
            if type(node.target) is GradPoint:
                own = frozenset(_needs(graph, waits, node.target.backward)[0])
            needed[node.index] = own
            continue
        found = nothing
        for argument in arguments(node):
            more = needed[argument.index] or nothing
            found = found | more if found and more is not found else more or found
        needed[node.index] = found
    last = (node.index for node in graph.writes.values())
    return {index: needed[index] or nothing for index in last if live[index]}


def awaited(graph: Graph, live: bytearray) -> list[list[Node]]:
    """For each backward, what the new values of its gradients need that is no gradient of it: they are
    wanted while it runs.

    Raises:
        BlockError: a gradient is wanted of no backward.
        OrderError: backwards wait for each other.
    """
    for node in graph.nodes:
        point = node.target
        if type(point) is GradPoint and live[node.index] and point.backward >= len(graph.backwards):
            raise BlockError.no_backward(str(point), node.location)
    found: list[list[Node]] = []
    for number in range(len(graph.backwards)):
        places: list[tuple[Any, Node]] = [(spot[1], node) for spot, node in graph.writes.items()]
        stack = [
            node for place, node in places if type(place) is GradPoint and place.backward == number
        ]
        wanted: dict[int, Node] = {}
        if stack:
            follows = _following(graph, number)
            seen = set[int]()
            while stack:
                for argument in arguments(stack.pop()):
                    if not follows[argument.index]:
                        wanted[argument.index] = argument
                    elif argument.index not in seen:
                        seen.add(argument.index)
                        stack.append(argument)
        found.append([wanted[index] for index in sorted(wanted)])
    _refuse_circles(graph, found)
    return found


def _following(graph: Graph, number: int) -> bytearray:
    """1 for what is computed from the gradients of a backward."""
    follows = bytearray(len(graph.nodes))
    for node in graph.nodes:
        if node.kind == READ:
            follows[node.index] = type(node.target) is GradPoint and node.target.backward == number
        elif any(follows[argument.index] for argument in arguments(node)):
            follows[node.index] = 1
    return follows


def _needs(graph: Graph, waits: list[list[Node]], number: int) -> tuple[set[int], set[int]]:
    """The reads of the forward, and the backwards, that one backward needs."""
    reads, others, seen = set[int](), set[int](), set[int]()
    stack = [*arguments(graph.backwards[number]), *waits[number]]
    while stack:
        node = stack.pop()
        if node.index in seen:
            continue
        seen.add(node.index)
        if type(node.target) is GradPoint:
            if node.kind == READ and node.target.backward not in others:
                others.add(node.target.backward)
                more = graph.backwards[node.target.backward]
                stack += [*arguments(more), *waits[node.target.backward]]
        elif node.kind == READ:
            reads.add(node.index)
        stack.extend(arguments(node))
    return reads, others


def _refuse_circles(graph: Graph, waits: list[list[Node]]) -> None:
    needs = [_needs(graph, waits, number)[1] for number in range(len(graph.backwards))]
    for number, others in enumerate(needs):
        if number in others:
            back = next(other for other in others if number in needs[other])
            raise OrderError.gradients(
                graph.backwards[number].location, graph.backwards[back].location
            )


def edges(
    graph: Graph,
    live: bytearray,
    schedule: Callable[[], Schedule],
    waits: list[list[Node]] | None = None,
) -> list[Edge]:
    """The uses of one invoke's values in another's writes.

    Args:
        waits: for each backward, what it waits for besides its loss.

    Raises:
        OrderError: a write needs a later value of its own invoke.
    """
    found: dict[tuple[int, int, bool, HookPoint], Edge] = {}
    for index, reads in requirements(graph, live, waits or []).items():
        write = graph.nodes[index]
        for read in (graph.nodes[i] for i in reads):
            if read.target == write.target:
                later = False
            else:
                later = _later(read.target, write.target, schedule)
            if read.invoke != write.invoke:
                # One for each place that is read: a base pass may answer some of them alone.
                edge = Edge(read.invoke, write.invoke, later, read, write)
                found.setdefault((read.invoke, write.invoke, later, read.target), edge)
            elif later:
                raise OrderError.later(
                    write.describe(), write.location, read.describe(), read.location
                )
    return list(found.values())


def _later(read: HookPoint, write: HookPoint, schedule: Callable[[], Schedule]) -> bool:
    if read.step != write.step and not {"result", "grad"} & {read.port, write.port}:
        return read.step > write.step
    try:
        first, second = position(read, schedule()), position(write, schedule())
    except ScheduleError:
        # Not known before the run; the run itself finds a value that comes too late.
        return False
    return first is not None and second is not None and first > second


def passed_by(graph: Graph, plan: Plan) -> list[frozenset[tuple[str, int]]]:
    """For each backward, the nodes and passes that it may go through: what was computed there is kept
    as long as another one may go there, too."""
    if len(graph.backwards) == 1:
        return [frozenset()]
    pass_of = {
        invoke: number
        for number, one in enumerate(plan.passes)
        for invoke in (*one.invokes, *one.shared)
    }
    written: dict[int, list[Node]] = {}
    for (invoke, place), node in graph.writes.items():
        if type(place) is HookPoint:
            written.setdefault(pass_of.get(invoke, 0), []).append(node)
    found = []
    for backward in graph.backwards:
        seen = set[tuple[str, int]]()
        stack = [backward]
        while stack:
            for argument in arguments(stack.pop()):
                if ("node", argument.index) in seen or argument.kind == PARAMETER:
                    continue
                seen.add(("node", argument.index))
                stack.append(argument)
                if argument.kind == READ:
                    number = pass_of.get(argument.invoke, 0)
                    if ("pass", number) not in seen:
                        seen.add(("pass", number))
                        stack += written.get(number, ())
        found.append(frozenset(seen))
    return found


def units(invokes: Iterable[int], uses: Iterable[Edge]) -> dict[int, frozenset[int]]:
    """For each invoke, the invokes that must share its pass: those that use each other's values.

    Raises:
        OrderError: two of them would each have to run before the other.
    """
    group = {invoke: frozenset((invoke,)) for invoke in invokes}
    uses = [edge for edge in uses if edge.first in group and edge.second in group]
    while True:
        before: dict[frozenset[int], set[frozenset[int]]] = {one: set() for one in group.values()}
        for edge in uses:
            if group[edge.first] != group[edge.second]:
                before[group[edge.second]].add(group[edge.first])
        try:
            TopologicalSorter(before).prepare()
        except CycleError as error:
            merged = frozenset().union(*error.args[1])
            group.update(dict.fromkeys(merged, merged))
            continue
        break
    for edge in uses:
        if edge.later and group[edge.first] == group[edge.second]:
            back = next(
                e for e in uses if group[e.first] == group[edge.first] and e.second == edge.first
            )
            raise OrderError.cycle(edge.write.location, back.write.location)
    return group


def levels(
    group: dict[int, frozenset[int]], uses: Iterable[Edge], strict: Callable[[Edge], bool]
) -> dict[int, int]:
    """In which wave each invoke runs: after those with a strict edge to it, not before the others."""
    before: dict[frozenset[int], dict[frozenset[int], int]] = {one: {} for one in group.values()}
    for edge in uses:
        first, second = group.get(edge.first), group.get(edge.second)
        if first is not None and second is not None and first != second:
            known = before[second].get(first, 0)
            before[second][first] = max(known, int(strict(edge)))
    level: dict[frozenset[int], int] = {}
    for one in TopologicalSorter(before).static_order():
        level[one] = max((level[f] + weight for f, weight in before[one].items()), default=0)
    return {invoke: level[one] for invoke, one in group.items()}
