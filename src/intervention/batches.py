"""Owns which prompts share a forward: micro-batches under a budget, and prefixes computed once.

Prefix reuse. Prompts with the same input are the same computation up to their first write. A *base*
pass runs each such input once, answers what is read before that point and keeps the outputs of the
blocks that variants start from. A variant's pass skips those blocks: the last skipped one gives the
kept output. Everything from that output on belongs to the variant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Hashable, Iterable, Sequence

from ..tracing.errors import OrderError
from ..tracing.graph import Graph, arguments
from ..tracing.node import CALL, READ, WRITE, HookPoint, Node
from ..tracing.operations import ELEMENT, FIELD, FIRST_ARGUMENT, GETITEM, PUT
from .causal import cuts
from .order import Edge, levels, position, units
from .plan import Facts, Pass, Settings
from .rows import splits, tensors_in
from .schedule import Schedule

#: Into how many parts of a prompt the positions are sorted where variants start in its middle.
CUTS = 4
#: Most padding in a batch, as a share of its tokens.
PADDING = 0.25
#: Tokens below which a forward costs about what reading its weights costs, so that padding is free.
FEW = 256


@dataclasses.dataclass(slots=True)
class Reuse:
    """What prefix reuse decided.

    Attributes:
        start: for each invoke that starts later than the first block, how many blocks it skips.
        base: for each invoke whose input a base pass runs, the invoke that stands for it there.
        whole: the invokes that the base pass serves to the end, because they write nothing.
    """

    start: dict[int, int] = dataclasses.field(default_factory=dict)
    base: dict[int, int] = dataclasses.field(default_factory=dict)
    whole: set[int] = dataclasses.field(default_factory=set)


def unsplittable(
    graph: Graph,
    live: bytearray,
    users: list[list[Node] | None],
    schedule: Schedule,
    invokes: Sequence[int],
    facts: Facts,
) -> set[int]:
    """The invokes that use a value which cannot be split into prompts: they run alone."""
    members = set(invokes)
    padded = len({facts.extent(invoke)[1] for invoke in invokes}) > 1
    known: dict[HookPoint, bool] = {}
    alone = set()
    for node in graph.nodes:
        if not live[node.index] or node.kind not in (READ, WRITE) or node.invoke not in members:
            continue
        can = known.get(node.target)
        if can is None:
            can = node.target.port in ("result", "grad")
            if not can:
                visit = schedule.find(node.target)
                can = visit is not None and splits(visit.axes, padded)
            known[node.target] = can
        if not can or _takes_opaque_field(node, users, schedule):
            alone.add(node.invoke)
    return alone


def _takes_opaque_field(node: Node, users: list[list[Node] | None], schedule: Schedule) -> bool:
    """True if a field of the forward's output is used that is no tensor, such as a cache."""
    if node.kind != READ or node.target.path or node.target.port != "output":
        return False
    axes = schedule.axes(node.target)
    if not isinstance(axes, dict):
        return False
    for user in users[node.index] or ():
        if user.kind == CALL and user.target in (FIELD, GETITEM):
            key = user.args[1]
            fields = axes if type(key) is str else dict(enumerate(axes.values()))
            if type(key) in (str, int) and fields.get(key) is None:
                return True
    return False


def whole_outputs(graph: Graph, live: bytearray, users: list[list[Node] | None]) -> set[int]:
    """The invokes that use the forward's output as a whole, with all that blocks put in it."""
    saved = graph.saved()
    return {
        node.invoke
        for node in graph.nodes
        if node.kind == READ
        and live[node.index]
        and not node.target.path
        and node.target.port == "output"
        and (
            node.index in saved
            or any(
                u.kind != CALL or u.target not in (FIELD, GETITEM) for u in users[node.index] or ()
            )
        )
    }


def _wholes(
    read: Node, users: list[list[Node] | None], saved: frozenset[int]
) -> frozenset[int] | None:
    """What a block took or returned, as read and with other hidden states put in; None if anything
    looks at more of it than the hidden states."""
    taken = read.target.port == "inputs"
    seen = {read.index}
    stack = [read]
    while stack:
        node = stack.pop()
        if node.index in saved:
            return None
        for user in users[node.index] or ():
            if user.kind == WRITE and user.target == read.target:
                continue
            if user.kind != CALL or user.args[0] is not node:
                return None
            view = user.target if user.target is not PUT else user.args[2]
            key = user.args[1:] if user.target is not PUT else tuple(user.args[3])
            if not (
                view is FIRST_ARGUMENT if taken else view in (ELEMENT, GETITEM) and key == (0,)
            ):
                return None
            if user.target is not PUT:
                continue
            if user.index not in seen:
                seen.add(user.index)
                stack.append(user)
    return frozenset(seen)


def beyond_hidden_states(
    graph: Graph, live: bytearray, users: list[list[Node] | None], schedule: Schedule
) -> tuple[set[tuple[int, HookPoint]], set[int]]:
    """Who uses more of what a block of the chain takes or returns than the hidden states.

    Returns:
        The places of each invoke where that is so and that it writes, and the invokes that look at
        such a part.
    """
    points = {
        HookPoint(path, port)
        for path in schedule.chain
        for port in ("inputs", "output")
        if tensors_in(schedule.visits[path, port, 0].axes) > 1
    }
    saved = graph.saved()
    wholes: dict[tuple[int, HookPoint], frozenset[int] | None] = {}
    looking = set()
    for node in graph.nodes:
        if node.kind == READ and live[node.index] and node.target in points:
            found = wholes[node.invoke, node.target] = _wholes(node, users, saved)
            if found is None:
                looking.add(node.invoke)
    written = set()
    for place, node in graph.writes.items():
        if live[node.index] and place[1] in points and place[1].port == "output":
            known = wholes.get(place) or frozenset()
            if any(argument.index not in known for argument in arguments(node)):
                written.add(place)
    return written, looking


def first_written_blocks(
    graph: Graph,
    live: bytearray,
    schedule: Schedule,
    invokes: Iterable[int],
    more: set[tuple[int, HookPoint]],
    lasting: Container[tuple[int, HookPoint]],
) -> dict[int, int]:
    """How many blocks of the chain lie before the first write of each invoke; all without a write.

    Writes of lasting edits do not count: they are the same for all.
    """
    visits = [schedule.visits[path, "output", 0] for path in schedule.chain]
    ends = [visit.order for visit in visits]
    found = dict.fromkeys(invokes, len(ends))
    for (invoke, hook_point), node in graph.writes.items():
        if invoke not in found or not live[node.index] or hook_point.port == "result":
            continue
        if (invoke, hook_point) in lasting:
            continue
        at = position(hook_point, schedule)
        # A write at a block's own output leaves the block itself as it is.
        before = 0 if at is None else sum(end <= at[1] for end in ends)
        # Of what a block returns, the hidden states alone are kept.
        before -= (invoke, hook_point) in more
        found[invoke] = min(found[invoke], before)
    return found


def reuse(
    graph: Graph,
    live: bytearray,
    schedule: Schedule,
    invokes: Sequence[int],
    group: dict[int, frozenset[int]],
    facts: Facts,
    alone: set[int],
    more: set[tuple[int, HookPoint]],
) -> Reuse:
    """Decide which prompts start from a shared prefix: where that saves blocks."""
    result = Reuse()
    if not schedule.chain:
        return result
    classes: dict[Hashable, list[int]] = {}
    for invoke in invokes:
        identity = facts.identity(invoke)
        if identity is not None and len(group[invoke]) == 1 and invoke not in alone:
            classes.setdefault(identity, []).append(invoke)
    lasting = graph.lasting_writes() if graph.lasting else {}
    written = {s[0] for s, node in graph.writes.items() if live[node.index] and s not in lasting}
    starts = first_written_blocks(graph, live, schedule, invokes, more, lasting)
    for members in classes.values():
        plain = [invoke for invoke in members if invoke not in written]
        variants = [invoke for invoke in members if invoke in written and starts[invoke]]
        saved = sum(starts[invoke] for invoke in variants) + len(schedule.chain) * len(plain)
        cost = len(schedule.chain) if plain else max((starts[i] for i in variants), default=0)
        if len(members) < 2 or saved <= cost:
            continue
        stands = plain[0] if plain else variants[0]
        for invoke in (*plain, *variants):
            result.base[invoke] = stands
        for invoke in variants:
            result.start[invoke] = starts[invoke]
        result.whole.update(plain)
    if result.base:
        # Inputs that nothing is written to may as well run in the base pass.
        for members in classes.values():
            if len(members) == 1 and members[0] not in written:
                result.base[members[0]] = members[0]
                result.whole.add(members[0])
    return result


def pack(
    members: Iterable[tuple[frozenset[int], list[int]]],
    facts: Facts,
    limit: int | None,
    padding: float = PADDING,
) -> list[list[int]]:
    """Batches under a budget of tokens with little padding, long prompts first.

    Args:
        members: units that must stay together, each with its invokes.
        limit: tokens in one batch, padding included; None for no limit.
        padding: most padding in a batch, as a share of its tokens.
    """
    sized = []
    for _, invokes in members:
        extents = [facts.extent(invoke) for invoke in invokes]
        rows, width = sum(r for r, _ in extents), max(w for _, w in extents)
        sized.append((width, rows, sum(r * w for r, w in extents), invokes))
    sized.sort(key=lambda item: -item[0])
    batches: list[list[int]] = []
    widest = rows_now = own_now = 0
    for width, rows, own, invokes in sized:
        total = (rows_now + rows) * max(widest, 1)
        padded = total - own_now - own if widest else 0
        light = total <= FEW or padded <= padding * total
        fits = batches and (limit is None or total <= limit) and light
        if fits:
            batches[-1].extend(invokes)
            rows_now, own_now = rows_now + rows, own_now + own
        else:
            batches.append(list(invokes))
            widest, rows_now, own_now = width, rows, own
    return batches


def arrange(
    graph: Graph,
    live: bytearray,
    users: list[list[Node] | None],
    prompted: Sequence[int],
    uses: list[Edge],
    facts: Facts,
    settings: Settings,
    schedule: Schedule | None,
    together: bool,
    all_logits: bool,
) -> list[Pass]:
    """The passes of a block with several prompts, in order, without their arrivals.

    Args:
        uses: uses of one invoke's values in another's writes.
        schedule: None if the model cannot be measured: then each prompt runs alone.
        all_logits: the logits of all positions are computed.
        together: something in the block sees the whole batch, so it must not be split.

    Raises:
        OrderError: invokes wait for each other.
    """
    group = units(prompted, uses)
    alone: set[int] = set()
    if schedule is not None and not together:
        alone = unsplittable(graph, live, users, schedule, prompted, facts)
    plan = Reuse()
    looking: set[int] = set()
    cut: dict[int, int] = {}
    may = settings.prefix_reuse and not together and not facts.generates and facts.may_share()
    # Autograd goes back through the whole forward of a prompt.
    may = may and not graph.backwards
    if may and schedule is not None:
        more, looking = beyond_hidden_states(graph, live, users, schedule)
        unshared = alone | whole_outputs(graph, live, users)
        plan = reuse(graph, live, schedule, prompted, group, facts, unshared, more)
        if settings.causal and plan.start and facts.may_be_causal():
            # After the last block there is nothing to save, and in short prompts little.
            widths = {i: facts.extent(i)[1] for i in plan.start}
            last = len(schedule.chain)
            widths = {i: w for i, w in widths.items() if w >= 2 * CUTS and plan.start[i] < last}
            cut = cuts(graph, live, users, schedule, plan.start, widths)
    served = _served_by_base(graph, plan, uses, schedule)
    needed = [edge for edge in uses if edge not in served]
    rest = [invoke for invoke in prompted if invoke not in plan.whole]
    limit = None
    if settings.micro_batches and schedule is not None and not together:
        limit = settings.tokens or facts.budget(all_logits)

    padding = 1.0 if together else PADDING

    def start_of(invoke: int) -> int:
        return plan.start.get(invoke, 0)

    def form(level: dict[int, int]) -> list[tuple[int, list[int]]]:
        kinds: dict[tuple[int, Hashable], dict[frozenset[int], list[int]]] = {}
        for invoke in rest:
            unit = group[invoke]
            if settings.micro_batches and schedule is not None and invoke not in alone:
                width = facts.extent(invoke)[1]
                bucket = cut.get(invoke, 0) * CUTS // width
                # Rows that start from a cut have no room for padding.
                causal = (bucket, width) if bucket else None
                # No rows may join where such a part of another row is looked at.
                start = start_of(invoke) if invoke in looking else None
                kind: Hashable = (facts.batch_class(invoke), causal, start)
            else:
                kind = ("alone", min(unit))
            kinds.setdefault((level[invoke], kind), {}).setdefault(unit, []).append(invoke)
        formed: list[tuple[int, list[int]]] = []
        for (wave, _), members in kinds.items():
            for unit, invokes in members.items():
                if len(invokes) < len(unit):
                    edge = next(e for e in uses if e.first in unit and e.second in unit)
                    raise OrderError.cycle(edge.write.location, edge.read.location)
            ordered = sorted(members.items(), key=lambda item: start_of(item[1][0]))
            formed.extend((wave, batch) for batch in pack(ordered, facts, limit, padding))
        return sorted(formed, key=lambda item: item[0])

    wave_of = levels({i: group[i] for i in rest}, needed, lambda edge: edge.later)
    formed = form(wave_of)
    batch_of = {invoke: number for number, (_, b) in enumerate(formed) for invoke in b}
    if any(batch_of.get(e.first) != batch_of.get(e.second) for e in needed if not e.later):
        # Their prompts do not fit one batch: the value then comes from an earlier one.
        formed = form(levels({i: group[i] for i in rest}, needed, lambda edge: True))
    passes = [_base(batch, plan) for batch in _base_batches(plan, facts, limit)]
    for _, batch in formed:
        if together or facts.generates:
            batch.sort()  # somebody sees its rows, in the order of the prompts
        else:
            depth = depths(batch, group, needed)
            batch.sort(key=lambda i: (start_of(i), depth.get(i, 0), min(group[i]), i))
        first = min(cut.get(invoke, 0) for invoke in batch)
        alike = len({facts.extent(invoke)[1] for invoke in batch}) == 1
        starts = {invoke: plan.start[invoke] for invoke in batch if invoke in plan.start}
        seams = [] if together else seams_of(batch, group, needed)
        passes.append(Pass(batch, starts=starts, cut=first if alike else 0, seams=seams))
    if any(one.cut for one in passes):
        # Their keys and values are wanted of all blocks.
        for one in passes:
            if one.base and schedule is not None:
                one.keep.add(len(schedule.chain) - 1)
                one.caches = True
    return passes


def depths(
    batch: list[int], group: dict[int, frozenset[int]], uses: Iterable[Edge]
) -> dict[int, int]:
    """How many invokes of a batch each waits for, one after the other; empty if none does."""
    members = set(batch)
    inside = [edge for edge in uses if edge.first in members and edge.second in members]
    return levels({i: group[i] for i in batch}, inside, lambda edge: True) if inside else {}


def seams_of(
    batch: list[int], group: dict[int, frozenset[int]], uses: Iterable[Edge]
) -> list[int] | None:
    """Before which of its invokes a batch may be halved: where none uses a value of a later one.

    None where nothing in the batch uses another's value.
    """
    place = {invoke: number for number, invoke in enumerate(batch)}
    inside = [edge for edge in uses if edge.first in place and edge.second in place]
    if not inside:
        return None
    closed: set[int] = set()
    for edge in inside:
        first, second = place[edge.first], place[edge.second]
        if first > second:
            closed.update(range(second + 1, first + 1))
    for unit in {group[invoke] for invoke in batch}:
        places = sorted(place[invoke] for invoke in unit)
        closed.update(range(places[0] + 1, places[-1] + 1))
    return [seam for seam in range(1, len(batch)) if seam not in closed]


def answered(graph: Graph, schedule: Schedule, read: Node, start: int) -> bool:
    """True if the base pass answers a read of a variant that skips `start` blocks."""
    at = position(read.target, schedule)
    if at is None:
        return False
    boundary = (0, schedule.visits[schedule.chain[start - 1], "output", 0].order)
    return at < boundary or (at == boundary and (read.invoke, read.target) not in graph.writes)


def in_base(schedule: Schedule, point: HookPoint, start: int) -> bool:
    """True if a write at a place comes before a variant that skips `start` blocks."""
    at = position(point, schedule)
    return at is not None and at < (
        0,
        schedule.visits[schedule.chain[start - 1], "output", 0].order,
    )


def repeated(graph: Graph, passes: list[Pass], schedule: Schedule) -> set[int]:
    """Writes of lasting edits, by node index, that a base pass does already for the same input."""
    lasting, found = graph.lasting_writes(), set[int]()
    starts = {invoke: start for one in passes for invoke, start in one.starts.items()}
    for one in passes:
        if not one.base:
            continue
        stands = {**{invoke: invoke for invoke in one.invokes}, **one.shared}
        done: set[tuple[int, HookPoint]] = set()
        for invoke, point in lasting:
            if invoke not in stands:
                continue
            if invoke in starts and not in_base(schedule, point, starts[invoke]):
                continue
            if (stands[invoke], point) in done:
                found.add(graph.writes[invoke, point].index)
            done.add((stands[invoke], point))
    return found


def _served_by_base(
    graph: Graph, plan: Reuse, uses: list[Edge], schedule: Schedule | None
) -> set[Edge]:
    """The uses whose value a base pass computes, before everything else."""
    served = set()
    for edge in uses:
        start = plan.start.get(edge.first)
        if edge.first in plan.whole or (
            start is not None
            and schedule is not None
            and answered(graph, schedule, edge.read, start)
        ):
            served.add(edge)
    return served


def _base_batches(plan: Reuse, facts: Facts, limit: int | None) -> list[list[int]]:
    kinds: dict[Hashable, list[tuple[frozenset[int], list[int]]]] = {}
    for invoke in sorted(set(plan.base.values())):
        kinds.setdefault(facts.batch_class(invoke), []).append((frozenset((invoke,)), [invoke]))
    return [batch for members in kinds.values() for batch in pack(members, facts, limit)]


def _base(batch: list[int], plan: Reuse) -> Pass:
    own = set(batch)
    shared = {i: rep for i, rep in plan.base.items() if rep in own and i != rep}
    members = own | set(shared)
    keep = {start - 1 for invoke, start in plan.start.items() if invoke in members}
    return Pass(batch, shared=shared, base=True, keep=keep)
