"""Owns `Recording`: the graph of one block while it is written, and what a proxy may ask of it."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from .graph import Box, Graph
from .node import Node, Point

OPEN, RUNNING, DONE, FAILED, ABANDONED = "open", "running", "done", "failed", "abandoned"


class Oracle(Protocol):
    """Answers questions about values that have not been computed."""

    def value(self, node: Node) -> Any:
        """A value of the right structure, shapes and dtypes, without numbers."""

    def device(self) -> torch.device:
        """Where the model's values will be."""

    def token_index(self, node: Node, key: Any) -> Any:
        """The index that selects `key` of the prompt's own tokens in the value of `node`."""


class Recording:
    """What one block has recorded so far.

    Attributes:
        graph: the nodes.
        state: OPEN while the block is written, then RUNNING, then DONE, FAILED or ABANDONED.
        invoke: index of the open invoke, -1 between invokes.
        step: the forward that the open invoke talks about.
        current: per invoke and place, the proxy of what is there now (see `Proxy`).
        generates: it runs as a generation, which has no gradients.
        backward: number of the backward that `.grad` means, under `with loss.backward():`.
        saved: the proxies that `save()` returned, until the block has ended.
        oracle: shapes on demand; None once the block has ended.
    """

    __slots__ = (
        "backward",
        "current",
        "generates",
        "graph",
        "invoke",
        "oracle",
        "saved",
        "state",
        "step",
    )

    def __init__(self, oracle: Oracle, generates: bool = False) -> None:
        self.graph = Graph()
        self.state = OPEN
        self.invoke = -1
        self.step = 0
        self.generates = generates
        self.backward: int | None = None
        self.current: dict[tuple[int, Point], Any] = {}
        self.saved: list[Any] = []
        self.oracle: Oracle | None = oracle

    def close(self, state: str) -> None:
        """End the block. What was delivered belongs to the user's proxies alone from here on: no
        cycle may keep a dropped value until the garbage collector comes by."""
        self.state = state
        self.current.clear()
        for handle in self.saved:
            # A saved part would keep the saved whole alive.
            handle._parent = None
        self.saved.clear()
        self.graph.release()
        self.oracle = None

    def ask(self) -> Oracle:
        assert self.oracle is not None, "an open block has an oracle"
        return self.oracle

    def save(self, node: Node) -> Box:
        box = Box(len(self.graph.saves))
        self.graph.saves.append((node, box))
        return box
