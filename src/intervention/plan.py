"""Owns the way from a graph to a `Plan`: which nodes run, in how many passes, at which arrivals.

Each function is one pass of the planner over the graph. None of them touches a model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

from ..tracing.errors import Location, OrderError, ScheduleError
from ..tracing.graph import Graph, arguments
from ..tracing.node import READ, WRITE, HookPoint, Node
from .schedule import Schedule


@dataclasses.dataclass(slots=True)
class Arrival:
    """What is wanted of one arrival: the reads and the last writes of each invoke."""

    hook_point: HookPoint
    reads: list[Node]
    writes: list[Node]


@dataclasses.dataclass(slots=True)
class Pass:
    """One run of the entry point.

    Attributes:
        invokes: indices of the invokes with a prompt that are batched in it.
        arrivals: by hook point.
    """

    invokes: list[int]
    arrivals: dict[HookPoint, Arrival]


@dataclasses.dataclass(slots=True)
class Plan:
    """The work of one block.

    Attributes:
        live: 1 for each node that runs.
        passes: in order.
        users: for each node, the live nodes that use it, once for each use.
    """

    live: bytearray
    passes: list[Pass]
    users: list[list[Node] | None]


def plan(
    graph: Graph,
    prompted: Sequence[int],
    schedule: Callable[[], Schedule],
    batches: Callable[[list[int]], list[list[int]]],
) -> Plan:
    """Plan a block.

    Args:
        graph: what was recorded.
        prompted: the invokes that have a prompt; the others see the whole batch.
        schedule: the model's schedule, asked for only where the order of two places matters.
        batches: splits invokes that may run together into batches that can.

    Raises:
        OrderError: a write needs a later value of its own forward, or invokes wait for each other.
    """
    live = graph.live()
    users: list[list[Node] | None] = [None] * len(graph.nodes)
    plain = True
    for node in graph.nodes:
        if live[node.index] and node.kind != READ:
            for argument in arguments(node):
                known = users[argument.index]
                if known is None:
                    users[argument.index] = [node]
                else:
                    known.append(node)
            if node.kind == WRITE:
                plain = False
    waves = [list(prompted)] if plain else split_waves(graph, live, prompted, schedule)
    groups = [batch for wave in waves for batch in batches(wave)]
    if len(groups) > 1 and not plain:
        groups = keep_order(graph, live, groups, schedule)
    return Plan(live, [Pass(group, {}) for group in groups], users)


def arrivals(graph: Graph, plan: Plan, prompted: Iterable[int]) -> None:
    """Fill in what each pass wants of each arrival."""
    where = {invoke: one for one in plan.passes for invoke in one.invokes}
    with_prompt = set(prompted)
    last = {node.index for node in graph.writes.values()}
    for node in graph.nodes:
        if not plan.live[node.index] or node.kind not in (READ, WRITE):
            continue
        one = where[node.invoke] if node.invoke in with_prompt else plan.passes[0]
        arrival = one.arrivals.get(node.target)
        if arrival is None:
            arrival = one.arrivals[node.target] = Arrival(node.target, [], [])
        if node.kind == READ:
            arrival.reads.append(node)
        elif node.index in last:
            arrival.writes.append(node)


def requirements(graph: Graph, live: bytearray) -> dict[int, frozenset[int]]:
    """For each last write, the reads that it depends on, by node index."""
    needed: dict[int, frozenset[int]] = {}
    nothing: frozenset[int] = frozenset()
    for node in graph.nodes:
        if not live[node.index]:
            continue
        if node.kind == READ:
            needed[node.index] = frozenset((node.index,))
            continue
        found = nothing
        for argument in arguments(node):
            found = found | needed[argument.index] if found else needed[argument.index]
        needed[node.index] = found
    return {node.index: needed[node.index] for node in graph.writes.values()}


def split_waves(
    graph: Graph,
    live: bytearray,
    prompted: Sequence[int],
    schedule: Callable[[], Schedule],
) -> list[list[int]]:
    """Sort invokes into passes so that each write finds the values of other invokes that it needs.

    A value of another invoke can be used in the same pass if it arrives no later than the write;
    otherwise that invoke has to run in an earlier pass.

    Raises:
        OrderError: a write needs a later value of its own invoke, or two invokes wait for each other.
    """
    schedule = functools.cache(schedule)
    after: dict[tuple[int, int], tuple[Node, Node]] = {}
    together: dict[tuple[int, int], tuple[Node, Node]] = {}
    for index, reads in requirements(graph, live).items():
        write = graph.nodes[index]
        for read in (graph.nodes[i] for i in reads):
            if read.target == write.target:
                if read.invoke != write.invoke:
                    together[read.invoke, write.invoke] = (read, write)
                continue
            try:
                later = _later(read, write, schedule)
            except ScheduleError:
                # In one prompt the run itself will tell; of two, the one that is used runs first.
                later = read.invoke != write.invoke
            if read.invoke == write.invoke:
                if later:
                    raise OrderError.later(
                        write.describe(), write.location, read.describe(), read.location
                    )
            elif later:
                after[read.invoke, write.invoke] = (read, write)
            else:
                together[read.invoke, write.invoke] = (read, write)
    if not after:
        return [list(prompted)]
    level = dict.fromkeys((*prompted, *(i for pair in (*after, *together) for i in pair)), 0)
    for round_ in range(len(level) + 1):
        changed = None
        for (first, second), by in [*after.items(), *((pair, None) for pair in together)]:
            least = level[first] + (by is not None)
            if level[second] < least:
                level[second] = least
                changed = by or changed
        if changed is None and round_:
            break
    else:
        raise OrderError.cycle(*_cycle(after, together))
    waves: list[list[int]] = [[] for _ in range(max(level.values()) + 1)]
    for invoke in prompted:
        waves[level[invoke]].append(invoke)
    return [wave for wave in waves if wave]


def _cycle(
    after: dict[tuple[int, int], tuple[Node, Node]],
    together: dict[tuple[int, int], tuple[Node, Node]],
) -> tuple[Location, Location]:
    """The lines of two writes that wait for each other, the second perhaps over further invokes."""
    edges = {**together, **after}
    for (first, second), (_, write) in after.items():
        reached: dict[
            int, Location
        ] = {}  # invoke → line of the write by which it was reached first
        queue = [second]
        for invoke in queue:
            for (source, target), (_, by) in edges.items():
                if source == invoke and target not in reached:
                    reached[target] = by.location
                    queue.append(target)
        if first in reached:
            return write.location, reached[first]
    raise AssertionError("levels grew without end, so there is a cycle")


def _later(read: Node, write: Node, schedule: Callable[[], Schedule]) -> bool:
    """True if what `read` reads arrives after what `write` writes."""
    read_at: HookPoint = read.target
    write_at: HookPoint = write.target
    if read_at.port == "result" or write_at.port == "result":
        return read_at.port == "result" and write_at.port != "result"
    if read_at.step != write_at.step:
        return read_at.step > write_at.step
    first, second = schedule().find(read_at), schedule().find(write_at)
    if first is None or second is None:
        return False  # a place that the trial forward never reached: the run itself will tell
    return first.order > second.order


def keep_order(
    graph: Graph, live: bytearray, groups: list[list[int]], schedule: Callable[[], Schedule]
) -> list[list[int]]:
    """Order batches so that the ones whose values others need come first.

    Raises:
        OrderError: batches need each other's values, because their prompts cannot share a pass.
    """
    group_of = {invoke: number for number, group in enumerate(groups) for invoke in group}
    before: dict[int, set[int]] = {number: set() for number in range(len(groups))}
    lines: dict[tuple[int, int], tuple[Node, Node]] = {}
    for index, reads in requirements(graph, live).items():
        write = graph.nodes[index]
        for read in (graph.nodes[i] for i in reads):
            first, second = group_of.get(read.invoke), group_of.get(write.invoke)
            if first is not None and second is not None and first != second:
                before[second].add(first)
                lines[first, second] = (read, write)
    ordered: list[int] = []
    while len(ordered) < len(groups):
        ready = [n for n in before if n not in ordered and before[n] <= set(ordered)]
        if not ready:
            stuck = [pair for pair in lines if pair[0] not in ordered and pair[1] not in ordered]
            raise OrderError.cycle(lines[stuck[0]][1].location, lines[stuck[-1]][1].location)
        ordered.extend(ready)
    return [groups[number] for number in ordered]
