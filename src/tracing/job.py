"""Owns `Job`: a finished block as data, which is all that is known of it where it runs.

While a block is written it is a `Recording`. What is asked of both, such as shapes, takes a `Recorded`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

from .errors import InputError, Location
from .graph import Graph
from .node import CALL, GradPoint, Later, Node
from .operations import STOP
from .structure import ATOMS, leaves, map_leaves


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """How the model is entered.

    Attributes:
        generates: True for `generate`, False for the forward.
        options: passed to it beside the prompts.
    """

    generates: bool
    options: Mapping[str, Any]


class Recorded(Protocol):
    """A block while it is written, or afterwards."""

    @property
    def graph(self) -> Graph: ...

    @property
    def prompts(self) -> Sequence[Any]:
        """What the model read of each invoke's arguments; None sees the whole batch."""

    @property
    def entry(self) -> Entry: ...

    @property
    def loop(self) -> int | None:
        """Index of the first node of the loop over steps that is open."""

    @property
    def lasting(self) -> bool:
        """It is for prompts that come later."""

    @property
    def seen(self) -> Hashable:
        """Equal while the model cannot have been changed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """A finished block.

    Attributes:
        graph: its operations.
        prompts: what the model read of each invoke's arguments, by number; None sees the whole batch.
        lines: the user's line of each invoke.
        entry: how the model is entered.
        location: the user's line of the block.
        settings: which passes of the planner run, as the user gave them.
        uses_output: what the entry point returns is used in it.
        edits: the lasting edits that were placed in it.
        seen: equal while the model cannot have been changed.
    """

    graph: Graph
    prompts: tuple[Any, ...]
    lines: tuple[Location, ...]
    entry: Entry
    location: Location
    settings: Any = None
    uses_output: bool = False
    edits: tuple[Any, ...] = ()
    seen: Hashable = None

    @property
    def loop(self) -> None:
        """None: no loop is open."""

    @property
    def lasting(self) -> bool:
        return False

    def join(self, other: Job) -> Job:
        """One job that does what both do: the invokes of `other` come behind those of this one. The
        boxes of both wait for their values; neither job may run by itself afterwards.

        Raises:
            InputError: they cannot run together.
        """
        for job in (self, other):
            _check_joins(job)
        if self.entry.generates != other.entry.generates:
            raise InputError.joins("one generates and the other is a trace")
        if self.settings != other.settings:
            raise InputError.joins("their planner settings differ")
        options, most = _joined_options(self.entry.options, other.entry.options)
        graph = _joined_graph(self, other)
        for job, first in ((self, 0), (other, len(self.prompts))):
            own = job.entry.options.get(_STEPS)
            if own is not None and own != most:
                _stop_after(graph, own - 1, range(first, first + len(job.prompts)), job.location)
        return Job(
            graph,
            self.prompts + other.prompts,
            self.lines + other.lines,
            Entry(self.entry.generates, options),
            self.location,
            self.settings,
            False,
            self.edits if self.edits == other.edits else self.edits + other.edits,
            (self.seen, other.seen),
        )


_STEPS = "max_new_tokens"


def _check_joins(job: Job) -> None:
    """Refuse a job that sees more than its own prompts."""
    if any(prompt is None for prompt in job.prompts):
        raise InputError.joins(f"the block at {job.location} sees the whole batch")
    if job.uses_output and not job.entry.generates:
        raise InputError.joins(f"the block at {job.location} uses what the whole forward returns")
    for node in job.graph.nodes:
        if any(type(leaf) is Later for leaf in leaves((node.args, node.kwargs))):
            raise InputError.joins(f"{node.location} uses a value of another block")


def _joined_options(
    one: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[Mapping[str, Any], int | None]:
    """The options of both, and how many steps there are at most."""
    for name in {*one, *other} - {_STEPS}:
        here, there = one.get(name, _ABSENT), other.get(name, _ABSENT)
        if here is not there and not (type(here) in ATOMS and here == there):
            raise InputError.joins(f"their `{name}` differs")
    first, second = one.get(_STEPS), other.get(_STEPS)
    if first == second:
        return one, first
    if type(first) is not int or type(second) is not int:
        raise InputError.joins(f"one gives `{_STEPS}` and the other does not")
    most = max(first, second)
    return {**one, _STEPS: most}, most


_ABSENT = object()


def _joined_graph(one: Job, other: Job) -> Graph:
    """The nodes of both, those of `other` with numbers behind those of `one`."""
    first, second, graph = one.graph, other.graph, Graph()
    invokes, backwards = len(one.prompts), len(first.backwards)
    graph.nodes = list(first.nodes)
    nodes: dict[int, Node] = {}

    def place(point: Any) -> Any:
        if type(point) is GradPoint:
            return point._replace(node=nodes[point.node.index], backward=point.backward + backwards)
        return point

    def swap(leaf: Any) -> Any:
        return nodes[leaf.index] if type(leaf) is Node else leaf

    for node in second.nodes:
        new = Node(
            len(graph.nodes),
            node.kind,
            place(node.target),
            map_leaves(swap, node.args),
            map_leaves(swap, node.kwargs),
            node.invoke + invokes if node.invoke >= 0 else node.invoke,
            node.file,
            node.line,
        )
        nodes[node.index] = new
        graph.nodes.append(new)

    def spots(found: dict[Any, Node]) -> dict[Any, Node]:
        return {(i + invokes, place(at)): nodes[n.index] for (i, at), n in found.items()}

    rounds = {
        number + len(first.saves): (invoke + invokes, step)
        for number, (invoke, step) in second.rounds.items()
    }
    graph.saves = first.saves + [(nodes[node.index], box) for node, box in second.saves]
    graph.rounds = {**first.rounds, **rounds}
    graph.writes = {**first.writes, **spots(second.writes)}
    graph.passed = {**first.passed, **spots(second.passed)}
    graph.backwards = first.backwards + [nodes[node.index] for node in second.backwards]
    graph.stops = first.stops + [nodes[node.index] for node in second.stops]
    graph.traced = first.traced | {nodes[index].index for index in second.traced}
    # The same edits have the same numbers: what prompts of both have in common is computed once.
    shift = 0 if one.edits == other.edits else max(first.lasting.values(), default=-1) + 1
    graph.lasting = dict(first.lasting)
    graph.lasting.update((nodes[i].index, number + shift) for i, number in second.lasting.items())
    for name in ("needs_grad", "branched", "fixed_positions", "counts_tokens"):
        setattr(graph, name, getattr(first, name) or getattr(second, name))
    return graph


def _stop_after(graph: Graph, step: int, invokes: range, at: Location) -> None:
    """End the generations of some invokes before others."""
    for invoke in invokes:
        args = (step, *graph.wanted_by(invoke))
        stop = Node(len(graph.nodes), CALL, STOP, args, {}, invoke, at.file, at.line)
        graph.nodes.append(stop)
        graph.stops.append(stop)


@dataclasses.dataclass(slots=True)
class Outcome:
    """What a job gave beside its saved values, which are in the boxes of its graph.

    Attributes:
        result: what the entry point returned; None if it stopped early.
        outputs: of a generation, each invoke's own rows of it, without padding.
        stopped: the step after which `stop()` ended the generation of an invoke.
        begins_with: of a generation of a decoder, how many tokens an invoke's began with.
    """

    result: Any = None
    outputs: dict[int, Any] = dataclasses.field(default_factory=dict)
    stopped: dict[int, int | None] = dataclasses.field(default_factory=dict)
    begins_with: dict[int, int] = dataclasses.field(default_factory=dict)
