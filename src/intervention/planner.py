"""Owns the way from a graph to a `Plan`. Each function is one pass of the planner; none of them
touches a model, and `Settings` switches each off, to compare results.

dead code → order (waves; refuses what has no order) → micro-batches and prefix reuse → less head. Where
a pass stops and what is freed when is decided while it runs, from the same plan.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from ..tracing.errors import BlockError, ScheduleError
from ..tracing.graph import Graph, arguments
from ..tracing.node import CALL, READ, WRITE, Node
from ..tracing.operations import GETITEM
from .batches import answered, arrange, in_base, repeated
from .order import awaited, edges
from .plan import Arrival, Facts, Pass, Plan, Settings
from .schedule import Schedule
from .skip import is_skip, skipped_places

logger = logging.getLogger("graftwork")


def plan(graph: Graph, prompted: Sequence[int], facts: Facts, settings: Settings) -> Plan:
    """Plan a block.

    Args:
        graph: what was recorded.
        prompted: the invokes that have a prompt; the others see the whole batch.

    Raises:
        OrderError: a write needs a later value of its own forward, or invokes wait for each other.
        BlockError: something sees the whole batch, and the prompts cannot run together.
    """
    live = dead_code(graph, settings)
    users = users_of(graph, live)
    waits = awaited(graph, live) if graph.backwards or graph.traced else []
    uses = edges(graph, live, facts.schedule, waits) if graph.writes else []
    known: Schedule | None = None
    passes: list[Pass] = []
    if len(prompted) == 1:
        passes = [Pass(list(prompted))]
    elif prompted:
        together = next(_whole_batch(graph, live, set(prompted)), None)
        known = _measured(facts)
        logits = not settings.less_head or _wants_all_logits(graph, users, live, facts)
        passes = arrange(
            graph, live, users, prompted, uses, facts, settings, known, together is not None, logits
        )
        if together is not None and len(passes) > 1:
            raise BlockError.whole_batch(together.location, len(passes))
    if graph.lasting and known is not None and any(one.base for one in passes):
        for index in repeated(graph, passes, known):
            live[index] = 0
        live = needed(graph, live)
        users = users_of(graph, live)
    result = Plan(live, users, passes, known.chain if known else (), settings, waits=waits)
    if any(is_skip(point) for _, point in graph.writes):
        known = known or _measured(facts)
        result.skipped = skipped_places(graph, live, prompted, known)
    place_arrivals(graph, result, known)
    if settings.less_head:
        less_head(graph, result, facts)
    return result


def _measured(facts: Facts) -> Schedule | None:
    try:
        return facts.schedule()
    except ScheduleError as error:
        logger.warning("each prompt runs in a pass of its own: %s", error)
        return None


def dead_code(graph: Graph, settings: Settings) -> bytearray:
    """1 for each node that runs."""
    return graph.live() if settings.dead_code else bytearray(b"\1") * len(graph.nodes)


def needed(graph: Graph, live: bytearray) -> bytearray:
    """`live` without what only writes need that it does not have."""
    alive = graph.live([node for node in graph.writes.values() if live[node.index]])
    return bytearray(a & b for a, b in zip(alive, live, strict=True))


def users_of(graph: Graph, live: bytearray) -> list[list[Node] | None]:
    """For each node, the live nodes that use it, once for each use."""
    users: list[list[Node] | None] = [None] * len(graph.nodes)
    for node in graph.nodes:
        if live[node.index] and node.kind != READ:
            for argument in arguments(node):
                known = users[argument.index]
                if known is None:
                    users[argument.index] = [node]
                else:
                    known.append(node)
    return users


def _whole_batch(graph: Graph, live: bytearray, prompted: set[int]) -> Iterator[Node]:
    """Nodes that see the whole batch inside the forward."""
    return (
        node
        for node in graph.nodes
        if live[node.index]
        and node.kind in (READ, WRITE)
        and node.invoke not in prompted
        and node.target.port != "result"
    )


def place_arrivals(graph: Graph, plan: Plan, schedule: Schedule | None) -> None:
    """Fill in what each pass wants of each arrival."""
    home: dict[int, Pass] = {}
    base: dict[int, Pass] = {}
    for one in plan.passes:
        for invoke in (*one.invokes, *one.shared):
            (base if one.base else home)[invoke] = one
    last = {node.index for node in graph.writes.values()}
    skipped = plan.skipped
    for node in graph.nodes:
        if not plan.live[node.index] or (node.kind != READ and node.kind != WRITE):
            continue
        if skipped and node.index in skipped:
            continue
        invoke, target = node.invoke, node.target
        if target.port == "grad":
            continue  # autograd brings it, not the forward
        one = home.get(invoke) or base.get(invoke) or plan.passes[0]
        start = one.starts.get(invoke, 0)
        if start and invoke in base and schedule is not None:
            if node.kind == READ:
                before = answered(graph, schedule, node, start)
            else:
                before = node.index in graph.lasting and in_base(schedule, target, start)
            if before:
                one = base[invoke]
        arrival = one.arrivals.get(target)
        if arrival is None:
            arrival = one.arrivals[target] = Arrival(target, [], [])
        if node.kind == READ:
            arrival.reads.append(node)
        elif node.index in last:
            arrival.writes.append(node)


def _wants_all_logits(
    graph: Graph, users: list[list[Node] | None], live: bytearray, facts: Facts
) -> bool:
    head, saved = facts.head(), graph.saved()
    return any(
        node.kind == READ
        and live[node.index]
        and node.target.path in ("", head)
        and not _last_positions(node, users, saved)
        for node in graph.nodes
    )


def less_head(graph: Graph, plan: Plan, facts: Facts) -> None:
    """Where only last positions of the logits are used, unembed those alone."""
    head = facts.head()
    if head is None:
        return
    saved = graph.saved()
    for one in plan.passes:
        positions = 0
        for hook_point, arrival in one.arrivals.items():
            if hook_point.path == head and hook_point.port == "output" and not arrival.writes:
                wanted = [_last_positions(node, plan.users, saved) for node in arrival.reads]
                if all(wanted):
                    positions = max(positions, *wanted)
                    continue
            if hook_point.path in ("", head) or hook_point.path.startswith(f"{head}."):
                positions = 0
                break
        one.positions = positions


def _last_positions(read: Node, users: list[list[Node] | None], saved: frozenset[int]) -> int:
    """How many of the last positions the users of a read take; 0 if they may take others."""
    used = users[read.index]
    if read.index in saved or not used:
        return 0
    most = 0
    for user in used:
        if user.kind != CALL or user.target is not GETITEM or user.args[0] is not read:
            return 0
        key = user.args[1]
        # Another first index may be a mask that counts tokens, or a new axis.
        if type(key) is not tuple or len(key) < 2 or type(key[0]) not in (slice, int):
            return 0
        token = key[1]
        if type(token) is slice and token.stop is None and token.step in (None, 1):
            token = token.start
        if type(token) is not int or token >= 0:
            return 0
        most = max(most, -token)
    return most
