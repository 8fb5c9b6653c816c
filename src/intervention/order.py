"""Owns the order between invokes: which has to run before which, and which must run together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from graphlib import CycleError, TopologicalSorter

from ..tracing.errors import OrderError, ScheduleError
from ..tracing.graph import Graph, arguments
from ..tracing.node import BACKWARD, READ, GradPoint, HookPoint, Node, Point
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


def position(hook_point: Point, schedule: Schedule) -> Position | None:
    """Where a hook point comes in a run; None for a place that the trial forward never reached."""
    if hook_point.port == "result":
        return _RESULT
    visit = schedule.find(hook_point)
    return None if visit is None else (hook_point.step, visit.order)


def waits_of(graph: Graph) -> dict[int, list[Node]]:
    """For each backward, by node index, what its gradients' new values need that is no gradient of it:
    they are wanted while it runs."""
    found: dict[int, list[Node]] = {}
    for backward in graph.backwards:
        writes = [
            node
            for (_, place), node in graph.writes.items()
            if isinstance(place, GradPoint) and graph.backward_of(place) is backward
        ]
        if not writes:
            continue
        # What follows from the gradients of this backward, in recorded order.
        follows = bytearray(len(graph.nodes))
        for node in graph.nodes:
            if node.kind == READ:
                own = isinstance(node.target, GradPoint)
                follows[node.index] = own and graph.backward_of(node.target) is backward
            elif any(follows[argument.index] for argument in arguments(node)):
                follows[node.index] = 1
        wanted: dict[int, Node] = {}
        seen = set()
        stack = list(writes)
        while stack:
            for argument in arguments(stack.pop()):
                if not follows[argument.index]:
                    wanted[argument.index] = argument
                elif argument.index not in seen:
                    seen.add(argument.index)
                    stack.append(argument)
        if wanted:
            found[backward.index] = [wanted[index] for index in sorted(wanted)]
    return found


def dependencies(graph: Graph, waits: dict[int, list[Node]], node: Node) -> Iterable[Node]:
    """What must have run before `node`, as far as the graph itself says."""
    if node.kind == READ and isinstance(node.target, GradPoint):
        return (graph.backward_of(node.target),)
    if node.kind == BACKWARD:
        return (*arguments(node), *waits.get(node.index, ()))
    return arguments(node)


def sorted_nodes(graph: Graph, waits: dict[int, list[Node]]) -> Iterable[Node]:
    """All nodes, each after what it depends on: the recorded order, but for gradients that are read
    before their backward.

    Raises:
        OrderError: backwards wait for each other's gradients.
    """
    if not graph.backwards:
        return graph.nodes
    before = {
        node.index: [one.index for one in dependencies(graph, waits, node)] for node in graph.nodes
    }
    try:
        order = list(TopologicalSorter(before).static_order())
    except CycleError as error:
        circle = [graph.nodes[index] for index in error.args[1]]
        found = [node for node in circle if node.kind == BACKWARD]
        raise OrderError.gradients(found[0].location, found[-1].location) from None
    return [graph.nodes[index] for index in order]


def requirements(
    graph: Graph, live: bytearray, waits: dict[int, list[Node]]
) -> dict[int, frozenset[int]]:
    """For each last write in a forward, the reads there that it depends on, by node index."""
    needed: list[frozenset[int] | None] = [None] * len(graph.nodes)
    nothing: frozenset[int] = frozenset()
    for node in sorted_nodes(graph, waits):
        if not live[node.index]:
            continue
        if node.kind == READ and not isinstance(node.target, GradPoint):
            needed[node.index] = frozenset((node.index,))
            continue
        found = nothing
        for argument in dependencies(graph, waits, node):
            more = needed[argument.index] or nothing
            found = found | more if found and more is not found else more or found
        needed[node.index] = found
    last = (node.index for place, node in graph.writes.items() if type(place[1]) is HookPoint)
    return {index: needed[index] or nothing for index in last if live[index]}


def edges(
    graph: Graph,
    live: bytearray,
    schedule: Callable[[], Schedule],
    waits: dict[int, list[Node]] | None = None,
) -> list[Edge]:
    """The uses of one invoke's values in another's writes.

    Raises:
        OrderError: a write needs a later value of its own invoke.
    """
    found: dict[tuple[int, int, bool, HookPoint], Edge] = {}
    for index, reads in requirements(graph, live, waits or {}).items():
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
    if read.step != write.step and "result" not in (read.port, write.port):
        return read.step > write.step
    try:
        first, second = position(read, schedule()), position(write, schedule())
    except ScheduleError:
        # Not known before the run; the run itself finds a value that comes too late.
        return False
    return first is not None and second is not None and first > second


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
