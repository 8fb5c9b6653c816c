"""Owns the check of a block's shapes before the weights of its model are loaded.

What is certain without numbers is said: operations of torch whose shapes do not fit, and indices that
are out of range. What the trial shapes cannot know, and all that is computed of it, is left to the
run: functions of the user, which must not run twice, values whose axes are not known, and places of a
generation where transformers computes less than the whole.
"""

from __future__ import annotations

import re

import torch

from ..tracing.errors import GraftworkError
from ..tracing.graph import Graph, arguments
from ..tracing.node import CALL, READ, Captured, GradPoint, Node
from ..tracing.operations import APPLY, ELEMENT, FIELD, GUARDED
from ..tracing.structure import leaves, summary
from .rows import Opaque
from .shapes import Shapes

#: Words of torch's errors about shapes; what it says of dtypes and of missing kernels has none of them.
_OF_SHAPES = re.compile(
    r"shape|size|dimension|out of (bounds|range)|cannot be multiplied|must match|broadcast"
    r"|reduction dim|too many indices|numel",
    re.IGNORECASE,
)


class ShapeCheck:
    """Checks nodes of one graph, each once, in their order."""

    def __init__(self, graph: Graph, shapes: Shapes, unlike: frozenset[str] = frozenset()) -> None:
        """
        Args:
            unlike: modules whose values are not those of a trial, as those of a generation's head.
        """
        self._graph = graph
        self._shapes = shapes
        self._unlike = unlike
        self._unknown: set[int] = set()
        self._next = 0

    def go_on(self, live: bytearray | None = None) -> None:
        """Check what was recorded since.

        Args:
            live: 1 for each node that runs; None checks all.

        Raises:
            Exception: torch's own, with the user's line and the shapes that were found.
        """
        nodes = self._graph.nodes
        while self._next < len(nodes):
            node = nodes[self._next]
            self._next += 1
            if (live is None or live[node.index]) and not self._is_known(node):
                self._unknown.add(node.index)

    def _is_known(self, node: Node) -> bool:
        """False for a node whose value only a run knows."""
        if any(argument.index in self._unknown for argument in arguments(node)):
            return False
        if node.target is APPLY or node.target is GUARDED:
            return False  # the user's function; what a branch that is not taken would do
        if node.kind == READ:
            point = node.target
            if isinstance(point, GradPoint) or point.port == "result" or point.path in self._unlike:
                return False
        try:
            value = self._shapes.value(node)
        except GraftworkError:
            return False
        except Exception as error:
            if self._is_certain(node, error):
                self._say(node, error)
                raise
            return False
        return not any(isinstance(leaf, Opaque) for leaf in leaves(value))

    def _is_certain(self, node: Node, error: Exception) -> bool:
        if node.kind != CALL:
            return False
        if node.target is ELEMENT or node.target is FIELD:
            # What a tensor has is known; what else a module may return is not.
            whole = self._shapes.value(node.args[0])
            kinds = (IndexError, AttributeError)
            return isinstance(whole, torch.Tensor) and isinstance(error, kinds)
        if not isinstance(error, (RuntimeError, IndexError, ValueError)) or isinstance(
            error, NotImplementedError
        ):
            return False
        given = [leaf for a in arguments(node) for leaf in leaves(self._shapes.value(a))]
        tensors = any(isinstance(leaf, torch.Tensor) for leaf in given)
        # Behind the line and the operation, which are ours.
        said = str(error).split("\n", 1)[-1].split("`: ", 1)[-1]
        return tensors and _OF_SHAPES.search(said) is not None

    def _say(self, node: Node, error: Exception) -> None:
        given = [summary(self._shapes.value(argument)) for argument in arguments(node)]
        given += [
            summary(leaf.tensor)
            for leaf in leaves((node.args, node.kwargs))
            if type(leaf) is Captured
        ]
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (
                f"{error.args[0]}\nIt was given {', '.join(given)}, as the shapes tell; nothing was "
                "loaded or run. Inside a block, `.shape` of every value tells what is there.",
            )
