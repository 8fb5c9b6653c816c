"""Owns `Graph`: the recorded nodes, which of them are saved, and the last write at each hook point."""

from __future__ import annotations

import os
from collections.abc import Iterable
from heapq import heappop, heappush
from typing import Any

from .draw import Drawing, Shown, table_html, written
from .errors import OrderError, StepError
from .node import (
    CALL,
    KINDS,
    PARAMETER,
    READ,
    WRITE,
    Captured,
    GradPoint,
    HookPoint,
    Node,
    user_frame,
)
from .operations import GUARDED
from .structure import ATOMS, leaves


class Box:
    """Where one saved value is delivered. Only the user's proxies keep it alive after the run.

    Attributes:
        number: which save of its block it belongs to, from 0.
    """

    __slots__ = ("error", "full", "number", "value")

    def __init__(self, number: int) -> None:
        self.number = number
        self.full = False
        self.value: Any = None
        self.error: Exception | None = None


class Series(Box):
    """Where a value arrives that is saved at each step of a loop: a list, in the order of the steps."""

    __slots__ = ("parts",)

    def __init__(self) -> None:
        self.number = -1
        self.parts: list[Box] = []

    def part(self, number: int, block: int, invoke: int | None) -> Box:
        """Where the value of one step arrives.

        Args:
            number: among the saves of its block.
            block: the block's own number.
            invoke: its prompt; None for that of the loop.
        """
        box = Box(number)
        self.parts.append(box)
        return box

    @property
    def full(self) -> bool:  # type: ignore[override]
        return self.error is None and all(p.full or p.error is not None for p in self.parts)

    @property
    def value(self) -> list[Any]:
        return [part.value for part in self.parts if part.full]

    @property
    def error(self) -> Exception | None:  # type: ignore[override]
        """The first error that is no step that never came."""
        errors = (p.error for p in self.parts if p.error is not None)
        return next((e for e in errors if not (isinstance(e, StepError) and e.ended)), None)


class Graph:
    """Nodes in recorded order.

    Attributes:
        nodes: every node; `nodes[i].index == i` and arguments come before their users.
        saves: saved nodes and the boxes that wait for their values, until the run has ended.
        rounds: of saves in a loop over steps, by number: the invoke and the step that each is of.
        writes: the last WRITE node of each invoke at each hook point.
        backwards: the nodes of `backward()`, in recorded order.
        stops: the nodes of `stop()`, in recorded order.
        plans: of a graph that runs again and again, its plans by sizes of the prompt.
        traced: indices of the nodes whose values autograd must pass through.
        passed: what stands for each place of an attached module, for those that use it.
        branched: it has branches, see branches.py.
        lasting: nodes of lasting edits, by index, and which node of the edits each is.
        needs_grad: a captured tensor requires grad.
        fixed_positions: it holds positions of tokens that fit prompts of these lengths alone.
        counts_tokens: it holds some that fit prompts without padding alone.
    """

    __slots__ = (
        "_inner",
        "_saved",
        "_searched",
        "backwards",
        "branched",
        "counts_tokens",
        "fixed_positions",
        "lasting",
        "needs_grad",
        "nodes",
        "passed",
        "plans",
        "rounds",
        "saves",
        "stops",
        "traced",
        "writes",
    )

    #: The condition of the branch that is being written.
    guard: Node | None = None

    def __init__(self) -> None:
        self._saved: tuple[int, ...] = ()
        self._inner: set[tuple[str, str]] = set()
        self._searched = 0
        self.fixed_positions = self.counts_tokens = False
        self.nodes: list[Node] = []
        self.saves: list[tuple[Node, Box]] = []
        self.rounds: dict[int, tuple[int, int]] = {}
        self.writes: dict[tuple[int, HookPoint], Node] = {}
        self.needs_grad = self.branched = False
        self.backwards: list[Node] = []
        self.stops: list[Node] = []
        self.plans: dict[Any, Any] | None = None
        self.traced: set[int] = set()
        self.passed: dict[tuple[int, HookPoint], Node] = {}
        self.lasting: dict[int, int] = {}

    def append(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        invoke: int = -1,
    ) -> Node:
        """Record a node at the user's current line."""
        frame = user_frame(3)
        file, line = frame.f_code.co_filename, frame.f_lineno
        nodes = self.nodes
        node = Node(len(nodes), kind, target, args, kwargs or {}, invoke, file, line)
        nodes.append(node)
        return node

    def live(self, writes: Iterable[Node] | None = None) -> bytearray:
        """1 for every node on which a save or a last write depends; the others need not run.

        Args:
            writes: the last writes that count; None for all.
        """
        alive = bytearray(len(self.nodes))
        for index in self.saved():
            alive[index] = 1
        last = self.writes.values() if writes is None else writes
        for node in (*last, *self.backwards, *self.stops):
            alive[node.index] = 1
        for node in reversed(self.nodes):
            if alive[node.index] and node.args:
                for argument in arguments(node):
                    alive[argument.index] = 1
            elif alive[node.index] and type(node.target) is GradPoint:
                alive[node.target.node.index] = 1
        return alive

    def lasting_writes(self) -> dict[tuple[int, HookPoint], int]:
        """The last writes that are those of lasting edits, with nothing of the block in them: alike
        for alike prompts. Each with its number in the edits."""
        alike: set[int] = set()
        for index in sorted(self.lasting):
            node = self.nodes[index]
            if all(one.index in alike for one in arguments(node)) and not node.draws:
                alike.add(index)
        return {
            spot: self.lasting[node.index]
            for spot, node in self.writes.items()
            if node.index in alike
        }

    def inner_operations(self) -> frozenset[tuple[str, str]]:
        """The operations inside forwards that it names: path of the module, and port."""
        for node in self.nodes[self._searched :]:
            if (node.kind == READ or node.kind == WRITE) and "." in node.target.port:
                self._inner.add((node.target.path, node.target.port))
        self._searched = len(self.nodes)
        return frozenset(self._inner)

    def wanted_by(self, invoke: int) -> tuple[Node, ...]:
        """What an invoke saves and writes."""
        found = [node for node, _ in self.saves if node.invoke == invoke]
        found += [write.args[0] for (owner, _), write in self.writes.items() if owner == invoke]
        return tuple(dict.fromkeys(found))

    def extend_stops(self) -> None:
        """Let each stop wait for what was recorded before it and is used behind it, but for what later
        steps would have given."""
        live = self.live()
        steps: list[int] = []
        for node in self.nodes:
            own = node.target.step if type(node.target) is HookPoint and node.kind == READ else 0
            steps.append(max((steps[argument.index] for argument in arguments(node)), default=own))
        for stop in self.stops:
            behind = [
                argument
                for node in self.nodes[stop.index + 1 :]
                if live[node.index]
                for argument in arguments(node)
            ]
            behind += [node for node, _ in self.saves]
            needed = {
                node.index: node
                for node in behind
                if node.index < stop.index and node.invoke == stop.invoke
            }
            more = [
                needed[index] for index in sorted(needed) if needed[index] not in arguments(stop)
            ]
            at = stop.args[4 if stop.target is GUARDED else 0]
            stop.args = tuple(
                one
                for one in (*stop.args, *more)
                if type(one) is not Node or steps[one.index] <= at
            )
            stop.used = None

    def settle(self) -> bool:
        """Give those that use a place of an attached module what was written there last.

        Returns:
            Whether anything has changed; then the nodes are in another order.

        Raises:
            OrderError: what is written there depends on what is computed from it.
        """
        found = [(spot, self.writes[spot]) for spot in self.passed if spot in self.writes]
        for spot, write in found:
            passed = self.passed[spot]
            passed.args = (write.args[0], *passed.args[1:])
            passed.used = None
            del self.writes[spot]
        if found:
            self._sort([write for _, write in found])
        return bool(found)

    def _sort(self, changed: list[Node]) -> None:
        """Put arguments before their users again, else in recorded order."""
        users: dict[int, list[Node]] = {}
        waiting = []
        for node in self.nodes:
            used = {argument.index for argument in arguments(node)}
            if type(node.target) is GradPoint:
                used.add(node.target.node.index)
            for index in used:
                users.setdefault(index, []).append(node)
            waiting.append(len(used))
        ready = [index for index, count in enumerate(waiting) if not count]
        order: list[Node] = []
        while ready:
            node = self.nodes[heappop(ready)]
            order.append(node)
            for user in users.get(node.index, ()):
                waiting[user.index] -= 1
                if not waiting[user.index]:
                    heappush(ready, user.index)
        if len(order) < len(self.nodes):
            write = next(node for node in changed if waiting[node.index])
            passed = next(n for n in self.passed.values() if n.args[0] is write.args[0])
            raise OrderError.passes(str(write.target), write.location, passed.location)
        traced = {id(self.nodes[index]) for index in self.traced}
        lasting = {id(self.nodes[index]): number for index, number in self.lasting.items()}
        for index, node in enumerate(order):
            node.index = index
        self.nodes[:] = order
        self.traced = {node.index for node in order if id(node) in traced}
        self.lasting = {node.index: lasting[id(node)] for node in order if id(node) in lasting}
        self._searched = 0

    def release(self) -> None:
        """Let go of the boxes; which nodes were saved stays known."""
        self._saved = self.saved_in_order()
        self.saves.clear()

    def saved(self) -> frozenset[int]:
        """Indices of the saved nodes."""
        return frozenset(self.saved_in_order())

    def saved_in_order(self) -> tuple[int, ...]:
        """Indices of the saved nodes, one for each save, in the order of the saves."""
        return self._saved or tuple(node.index for node, _ in self.saves)

    def again(self) -> Graph:
        """The same graph for another run, with a new box for each save."""
        graph = Graph()
        graph.nodes, graph.writes = self.nodes, self.writes
        graph.needs_grad, graph.fixed_positions = self.needs_grad, self.fixed_positions
        graph.counts_tokens = self.counts_tokens
        graph.backwards, graph.traced = self.backwards, self.traced
        graph.passed, graph.lasting = self.passed, self.lasting
        graph.branched, graph.stops = self.branched, self.stops
        graph.plans = self.plans = {} if self.plans is None else self.plans
        for number, index in enumerate(self.saved_in_order()):
            graph.saves.append((self.nodes[index], Box(number)))
        return graph

    def lint(self) -> None:
        """Check what every other room relies on, for tests: an AssertionError is our bug. What a
        user can get wrong is refused at its line, or where the planner orders the invokes."""
        for index, node in enumerate(self.nodes):
            assert node.index == index
            assert node.kind in KINDS
            if node.kind in (READ, PARAMETER):
                assert not node.args and not node.kwargs
            elif node.kind == WRITE:
                assert len(node.args) == 1 and not node.kwargs
            for argument in arguments(node):
                assert argument.index < index and self.nodes[argument.index] is argument

    def __len__(self) -> int:
        return len(self.nodes)

    def draw(
        self, path: str | os.PathLike[str] | None = None, *, limit: int | None = 200
    ) -> Drawing:
        """The graph as a picture, which a notebook shows; `print(drawing)` gives it as Mermaid text.

        Args:
            path: also write it there; the suffix decides: .svg and .png (by Graphviz), .dot, .mmd.
            limit: how many operations are drawn at most, from both ends; None draws all.
        """
        drawing = Drawing(self._shown(), limit)
        if path is not None:
            drawing.save(path)
        return drawing

    def _shown(self) -> list[Shown]:
        saved, alive = self.saved(), self.live()
        return [
            Shown(
                node.index,
                node.kind,
                written(node) or _text(node),
                node.invoke,
                str(node.location),
                node.index in saved,
                bool(alive[node.index]),
                tuple(argument.index for argument in arguments(node)),
            )
            for node in self.nodes
        ]

    def __str__(self) -> str:
        saved = self.saved()
        lines = []
        for node in self.nodes:
            star = " (saved)" if node.index in saved else ""
            place = "" if node.invoke < 0 else f"  invoke {node.invoke}"
            lines.append(f"{node!r:>5} {_text(node)}{star}  #{place}  {node.location}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        saved, writes = len(self.saved_in_order()), len(self.writes)
        return f"<graph: {len(self.nodes)} operations, {saved} saved, {writes} places written>"

    def _repr_html_(self) -> str:
        return table_html(repr(self).strip("<>"), self._shown())


def _text(node: Node) -> str:
    """What a node does."""
    if node.target is GUARDED:
        guard, wanted, *_ = node.args
        what = node.guarded
        return f"{written(what) or _text(what)} {'if' if wanted else 'unless'} {guard!r}"
    inner = [_show(a) for a in node.args]
    inner += [f"{key}={_show(value)}" for key, value in node.kwargs.items()]
    if node.kind == WRITE:
        return f"{node.target} = {', '.join(inner)}"
    if node.kind in (READ, PARAMETER):
        return str(node.target)
    return f"{node.target.name if node.kind == CALL else node.target}({', '.join(inner)})"


def _show(value: Any) -> str:
    name = getattr(value, "name", None)
    return name if isinstance(name, str) and not isinstance(value, Captured) else repr(value)


def arguments(node: Node) -> tuple[Node, ...]:
    """The nodes that `node` uses, one for each use."""
    used = node.used
    if used is None:
        found: list[Node] = []
        for argument in (*node.args, *node.kwargs.values()) if node.kwargs else node.args:
            if type(argument) is Node:
                found.append(argument)
            elif type(argument) not in ATOMS:
                found.extend(leaf for leaf in leaves(argument) if type(leaf) is Node)
        used = node.used = tuple(found)
    return used
