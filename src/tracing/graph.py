"""Owns `Graph`: the recorded nodes, which of them are saved, and the last write at each hook point."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .node import (
    BACKWARD,
    CALL,
    KINDS,
    PARAMETER,
    READ,
    WRITE,
    Captured,
    GradPoint,
    Node,
    Point,
    user_frame,
)
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


class Graph:
    """Nodes in recorded order.

    Attributes:
        nodes: every node; `nodes[i].index == i` and arguments come before their users.
        saves: saved nodes and the boxes that wait for their values, until the run has ended.
        writes: the last WRITE node of each invoke at each place.
        backwards: the BACKWARD nodes, in recorded order.
        needs_grad: a captured tensor requires grad, or a gradient is used.
        fixed_positions: it holds positions of tokens that fit prompts of these lengths alone.
    """

    __slots__ = (
        "_saved",
        "backwards",
        "fixed_positions",
        "needs_grad",
        "nodes",
        "saves",
        "writes",
    )

    def __init__(self) -> None:
        self._saved: tuple[int, ...] = ()
        self.fixed_positions = False
        self.nodes: list[Node] = []
        self.saves: list[tuple[Node, Box]] = []
        self.writes: dict[tuple[int, Point], Node] = {}
        self.backwards: list[Node] = []
        self.needs_grad = False

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

    def live(self) -> bytearray:
        """1 for every node on which a save, a last write or a backward depends; the others need not
        run."""
        alive = bytearray(len(self.nodes))
        for index in self.saved():
            alive[index] = 1
        for node in self.writes.values():
            alive[node.index] = 1
        for node in self.backwards:
            alive[node.index] = 1
        for node in reversed(self.nodes):
            if alive[node.index] and node.args:
                for argument in arguments(node):
                    alive[argument.index] = 1
        return alive

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
        graph.nodes, graph.writes, graph.backwards = self.nodes, self.writes, self.backwards
        graph.needs_grad, graph.fixed_positions = self.needs_grad, self.fixed_positions
        for number, index in enumerate(self.saved_in_order()):
            graph.saves.append((self.nodes[index], Box(number)))
        return graph

    def backward_of(self, point: GradPoint) -> Node:
        """The backward that a gradient belongs to."""
        return self.backwards[min(point.backward, len(self.backwards) - 1)]

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
            if type(node.target) is GradPoint:
                assert node.target.node.index < index
                assert self.nodes[node.target.node.index] is node.target.node
            for argument in arguments(node):
                assert argument.index < index and self.nodes[argument.index] is argument

    def __len__(self) -> int:
        return len(self.nodes)

    def __str__(self) -> str:
        saved = self.saved()
        lines = []
        for node in self.nodes:
            inner = [_show(a) for a in node.args]
            inner += [f"{key}={_show(value)}" for key, value in node.kwargs.items()]
            if node.kind == WRITE:
                text = f"{node.target} = {', '.join(inner)}"
            elif node.kind in (READ, PARAMETER):
                text = str(node.target)
            else:
                name = node.target.name if node.kind in (CALL, BACKWARD) else node.target
                text = f"{name}({', '.join(inner)})"
            star = " (saved)" if node.index in saved else ""
            place = "" if node.invoke < 0 else f"  invoke {node.invoke}"
            lines.append(f"{node!r:>5} {text}{star}  #{place}  {node.location}")
        return "\n".join(lines)


def _show(value: Any) -> str:
    name = getattr(value, "name", None)
    return name if isinstance(name, str) and not isinstance(value, Captured) else repr(value)


def arguments(node: Node) -> Iterator[Node]:
    """The nodes that `node` uses, one for each use."""
    for argument in (*node.args, *node.kwargs.values()) if node.kwargs else node.args:
        if type(argument) is Node:
            yield argument
        elif type(argument) not in ATOMS:
            yield from (leaf for leaf in leaves(argument) if type(leaf) is Node)
