"""Owns `Session`: blocks that run one after the other at its end, with values that flow between them.

A value of an earlier block stands in a later one as a `Later`: the earlier run fills its box, and the
session empties it when the last block that uses it has run.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

from .context import Block, Exit, Tracer, open_block
from .errors import BlockError, ForeignProxyError
from .frames import entry
from .graph import Box, Graph
from .node import Later, Node, user_line
from .proxy import Proxy
from .recording import ABANDONED, OPEN, Recording
from .structure import leaves


class Session(Block):
    """`with model.session() as session:`. Blocks opened inside run when it ends, in their order.

    Attributes:
        blocks: those that have ended, and the open one, in their order.
        model: None, as no module can be named outside the blocks.
    """

    def __init__(self) -> None:
        self.model: Any = None
        self.blocks: list[Tracer] = []
        self._open: Tracer | None = None
        self._laters: dict[tuple[int, int], Later] = {}
        self.location = user_line(3)

    def admit(self, tracer: Tracer) -> Session | None:
        if tracer.recording.no_values is not None:
            return None  # it has no values that could flow, and ends by itself
        self.blocks.append(tracer)
        self._open = tracer
        tracer.recording.session = self
        return self

    def leave(self, tracer: Tracer, abandoned: bool) -> None:
        """A block of this session ends; unless it is abandoned, it can still be recorded in."""
        self._open = None
        recording = tracer.recording
        recording.invoke, recording.step = -1, 0
        if abandoned:
            self.blocks.remove(tracer)
        for proxy in recording.current.values():
            proxy._place = None  # what is written to it from here on is not written to the model

    # ---------------------------------------------------------------- values between blocks

    def _number(self, recording: Recording) -> int:
        return next(n for n, tracer in enumerate(self.blocks) if tracer.recording is recording)

    def place(self, recording: Recording, used: tuple[Any, ...]) -> Recording:
        """Where an operation belongs that uses values of several blocks: the open block, or else the
        latest of them."""
        found = {id(recording): recording}
        for leaf in leaves(used):
            if isinstance(leaf, Proxy) and leaf._recording.session is self:
                found[id(leaf._recording)] = leaf._recording
        if len(found) == 1:
            return recording
        if self._open is not None:
            return self._open.recording
        return max(found.values(), key=self._number)

    def later(self, source: Recording, node: Node, target: Recording) -> Later:
        """What stands in `target` for the value of a node of an earlier block.

        Raises:
            ForeignProxyError: it is a later block.
        """
        if self._number(source) > self._number(target):
            raise ForeignProxyError.later(node.describe(), node.location)
        key = (id(source), node.index)
        found = self._laters.get(key)
        if found is None:
            found = self._laters[key] = Later(source, node, Box(-1))
        target.graph.needs_grad |= source.graph.needs_grad
        return found

    # ---------------------------------------------------------------- the end

    def __enter__(self) -> Session:
        outer = open_block()
        if outer is not None or self.entered:
            raise BlockError.session_in_block((outer or self).location)
        self.open()
        return self

    @Exit
    @entry
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.left:
            if kind is None:
                raise BlockError.was_reset(self.location)
            return
        self.close()
        try:
            if kind is None:
                self._run()
        finally:
            self._drop()

    def abandon(self) -> None:
        super().abandon()
        self._drop()

    def _drop(self) -> None:
        for tracer in self.blocks:
            if tracer.recording.state is OPEN:
                tracer.recording.close(ABANDONED)
        for later in self._laters.values():
            later.drop()
        self._laters.clear()

    def _run(self) -> None:
        for tracer in [one for one in self.blocks if not one.left]:
            tracer.abandon()
        used: list[set[Later]] = [set() for _ in self.blocks]
        last: dict[Later, int] = {}
        for number in reversed(range(len(self.blocks))):
            tracer = self.blocks[number]
            for later in last:
                if later.source is tracer.recording:
                    tracer.graph.saves.append((later.node, later.box))
            used[number] = _used(tracer)
            for later in used[number]:
                last.setdefault(later, number)
        for number, tracer in enumerate(self.blocks):
            values = [later.value() for later in used[number]]
            tracer.graph.needs_grad |= any(
                isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves(values)
            )
            del values
            tracer.run()
            for later in used[number]:
                if last[later] == number:
                    later.drop()


def _used(tracer: Tracer) -> set[Later]:
    """The values of earlier blocks that a block uses in what it runs."""
    graph: Graph = tracer.graph
    # Switches of the planner may let all nodes run.
    live = graph.live() if tracer.settings is None else bytearray(b"\1") * len(graph.nodes)
    return {
        leaf
        for node in graph.nodes
        if live[node.index]
        for leaf in leaves((node.args, node.kwargs))
        if type(leaf) is Later
    }
