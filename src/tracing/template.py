"""Owns `Template`: recorded operations that are put into a graph again, for other steps and prompts.

A loop over steps and an edit of a model are both one: they are recorded once, and put into the graph as
often as they apply. So planner and run know neither of them. What depends on the step or on the prompt
stands in a template as an operation of its own, in whose place its answer is put: `STEP`, `TOKENS`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .errors import InputError
from .graph import Graph, Series, arguments
from .node import CALL, READ, WRITE, HookPoint, Node
from .operations import GUARDED, PASSED, POSITIONS, PUT, SETITEM, STEP, STOP, TOKENS
from .proxy import CONSTANT, Handle, Proxy, current_node, node_of
from .recording import Recording
from .states import Kept, Key, carry, go_on, keep
from .structure import map_leaves


def is_stop(node: Node) -> bool:
    """True for a `stop()`, also in a branch."""
    target = node.args[3] if node.target is GUARDED else node.target
    return target is STOP


Spot = tuple[int, HookPoint]


@dataclasses.dataclass(slots=True)
class Template:
    """Operations that were recorded once.

    Attributes:
        nodes: in recorded order; what they use of the graph around them comes before them.
        writes: the last write at each place.
        kinds: the kind of proxy of each place that was named.
        bound: the places that were assigned anew, with what was there before.
        states: what is computed beside the values at places, where it was changed.
        saves: saved nodes, and the lists that their values go to.
        step: the step at which it was recorded.
        needs_grad: a captured tensor requires grad.
        lasting: an edit, which applies to every step that has the tokens that it names.
        number: where the numbers of its operations begin, among those of several lasting templates.
    """

    nodes: list[Node]
    writes: dict[Spot, Node]
    kinds: dict[Spot, type[Handle]]
    bound: dict[Spot, Node] = dataclasses.field(default_factory=dict)
    states: list[Kept] = dataclasses.field(default_factory=list)
    saves: list[tuple[Node, Series]] = dataclasses.field(default_factory=list)
    step: int = 0
    needs_grad: bool = False
    lasting: bool = False
    number: int = 0

    @classmethod
    def of(cls, recording: Recording, start: int = 0, step: int = 0) -> Template:
        """What a recording holds of places and writes, with its nodes from `start` on."""
        graph, states = recording.graph, keep(recording)
        kinds = {spot: proxy._kind for spot, proxy in recording.current.items()}
        nodes = graph.nodes[start:]
        bound = dict(recording.bound)
        return cls(nodes, dict(graph.writes), kinds, bound, states, [], step, graph.needs_grad)

    def place(self, recording: Recording, step: int, invoke: int | None = None) -> None:
        """Put it into the graph of `recording`.

        Args:
            step: the forward that it is for.
            invoke: the invoke; None for that of each operation.

        Raises:
            InputError: the prompt does not have the tokens that it names.
        """
        graph, shift = recording.graph, step - self.step
        first = len(graph.nodes)
        values = self._place_nodes(recording, step, shift, invoke)
        for (owner, point), write in self.writes.items():
            before = write.args[0]
            node = values.get(before.index, before)
            if node is None:
                continue
            spot = (owner if invoke is None else invoke, _shifted(point, shift))
            graph.writes[spot] = _copy(graph, write, spot[1], (node,), {}, spot[0])
            self._follow(recording, (owner, point), spot, node, values)
        for kept in self.states:
            if kept.last is not None and values.get(kept.last.index, kept.last) is not None:
                key, of = self._state(kept, shift, invoke, values)
                carry(recording, key, kept, of, values)
        for node, series in self.saves:
            # A value from before the loop is the same in every step.
            kept = values.get(node.index, node)
            number = len(graph.saves)
            if step:
                graph.rounds[number] = recording.invoke if invoke is None else invoke, step
            graph.saves.append((kept, series.part(number, recording.serial, invoke)))
        graph.needs_grad = graph.needs_grad or self.needs_grad
        if self.lasting and not step:
            placed = range(first, len(graph.nodes))
            graph.lasting.update((index, index - first + self.number) for index in placed)

    def _follow(
        self,
        recording: Recording,
        of: Spot,
        spot: Spot,
        node: Node,
        values: dict[int, Any],
    ) -> None:
        """Handles on a place see what is written into it, but not what is assigned anew."""
        kind, known = self.kinds.get(of), recording.current.get(spot)
        bound = self.bound.get(of)
        if known is not None:
            seen = node if bound is None else values.get(bound.index, bound)
            if seen is not None:
                known._node = seen
        if kind is not None and (known is None or bound is not None):
            recording.current[spot] = kind(recording, node, spot)

    def _state(
        self, kept: Kept, shift: int, invoke: int | None, values: dict[int, Any]
    ) -> tuple[Key, tuple[Node, ...]]:
        """Which state it is where it is placed, and what it is computed from there."""
        owner, point = kept.key.spot
        spot = (owner if invoke is None else invoke, _shifted(point, shift))
        of = tuple(values.get(node.index, node) for node in kept.of)
        return dataclasses.replace(kept.key, spot=spot), of

    def _place_nodes(
        self, recording: Recording, step: int, shift: int, invoke: int | None
    ) -> dict[int, Any]:
        """What each node has become, by its old index: a node or an index; None if it has no value."""
        graph = recording.graph
        values: dict[int, Any] = {}
        begins = {kept.first.index: kept for kept in self.states}

        def swap(leaf: Any) -> Any:
            return values.get(leaf.index, leaf) if type(leaf) is Node else leaf

        for node in self.nodes:
            owner, target = node.invoke if invoke is None else invoke, node.target
            if node.kind == WRITE:
                continue
            if node.kind == READ:
                spot = (owner, _shifted(target, shift))
                known = recording.current.get(spot)
                if known is None:
                    new = _copy(graph, node, spot[1], (), {}, owner)
                    kind = self.kinds.get((node.invoke, target), Handle)
                    known = recording.current[spot] = kind(recording, new, spot)
                values[node.index] = current_node(known)
                continue
            if any(values.get(a.index, a) is None for a in arguments(node)):
                # A change of tokens that are not there changes nothing.
                first = node.args[0] if target is PUT or target is SETITEM else None
                values[node.index] = None if first is None else values.get(first.index, first)
                continue
            args, kwargs = map_leaves(swap, node.args), map_leaves(swap, node.kwargs)
            if target is STEP:
                values[node.index] = _copy(graph, node, CONSTANT, (step, None), {}, owner)
            elif target is POSITIONS and not recording.lasting:
                rows = recording.ask().positions(args[0])
                graph.fixed_positions = True
                values[node.index] = _copy(graph, node, CONSTANT, (rows, None), {}, owner)
            elif target is TOKENS and not recording.lasting:
                values[node.index] = self._index(recording, node, args, step)
            else:
                if is_stop(node):
                    at = 4 if target is GUARDED else 0
                    args = (*args[:at], args[at] + shift, *args[at + 1 :])
                if target is PASSED:
                    spot = (owner, _shifted(args[1], shift))
                    args = (args[0], spot[1])
                    recording.current[spot] = Handle(recording, args[0], spot)
                new = values[node.index] = _copy(graph, node, target, args, kwargs, owner)
                if node.index in begins:
                    kept = begins[node.index]
                    key, of = self._state(kept, shift, invoke, values)
                    values[node.index] = go_on(recording, key, kept, of, new)
                elif target is PASSED:
                    graph.passed[spot] = new
                elif is_stop(new):
                    graph.stops.append(new)
        return values

    def _index(self, recording: Recording, node: Node, args: tuple[Any, ...], step: int) -> Any:
        try:
            return recording.ask().token_index(args[0], args[1])
        except InputError as error:
            if self.lasting and step:
                return None
            raise InputError(f"{error} Recorded at {node.location}") from None


def _copy(
    graph: Graph, node: Node, target: Any, args: Any, kwargs: dict[str, Any], invoke: int
) -> Node:
    nodes = graph.nodes
    new = Node(len(nodes), node.kind, target, args, kwargs, invoke, node.file, node.line)
    nodes.append(new)
    return new


def _shifted(point: Any, shift: int) -> Any:
    return point if point.port == "result" else point._replace(step=point.step + shift)


def pass_through(recording: Recording, point: HookPoint, value: Any) -> Proxy:
    """Make `value` what is at a place of an attached module; what uses the result uses what is there
    in the end.

    Args:
        value: a proxy, or a container of proxies.
    """
    graph, invoke = recording.graph, recording.invoke
    if recording.step:
        point = point._replace(step=recording.step)
    while (invoke, point) in graph.passed:
        point = point._replace(call=point.call + 1)
    node = node_of(recording, value)
    spot = (invoke, point)
    recording.current[spot] = Handle(recording, node, spot)
    graph.passed[spot] = graph.append(CALL, PASSED, (node, point), None, invoke)
    return Handle(recording, graph.passed[spot])
