"""Owns `Recording`: the graph of one block while it is written, and what a proxy may ask of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

from .errors import BlockError, NotRunError
from .frames import shorten
from .graph import Box, Graph, Series
from .job import Entry
from .node import Captured, HookPoint, Node, user_line

OPEN, RUNNING, DONE, FAILED, ABANDONED = "open", "running", "done", "failed", "abandoned"


class Oracle(Protocol):
    """Answers questions about values that have not been computed."""

    def value(self, node: Node) -> Any:
        """A value of the right structure, shapes and dtypes, without numbers."""

    def is_tensor(self, node: Node) -> bool:
        """True if the value of `node` is known to be one tensor."""

    def device(self) -> torch.device:
        """Where the model's values will be."""

    def token_index(self, node: Node, key: Any) -> Any:
        """The index that selects `key` of the prompt's own tokens in the value of `node`."""

    def positions(self, node: Node) -> list[tuple[int, int, int]]:
        """Where the own tokens of each row lie in the value of `node`, and the number of the first."""

    def own_rows(self, node: Node) -> list[tuple[int, int, int]]:
        """As `positions`; nothing where the rows have no padding."""

    def token_axis(self, node: Node) -> int:
        """Which axis of the value of `node` counts tokens."""

    def own_axes(self, node: Node) -> tuple[int, int | None]:
        """Which axes of the value of `node` count tokens and rows."""

    def mask(self, invoke: int, step: int) -> torch.Tensor:
        """Which columns of each row are the prompts' own tokens: [row, token]."""

    def namesake(self, point: HookPoint, name: str) -> Any:
        """What `name` is in a submodule that is called as the port of `point` is; None if there is
        no such submodule, or nothing of that name in it."""

    def sizes(self, node: Node) -> list[int | None]:
        """The sizes of a tensor; None where they are those of the prompts."""


_serials = itertools.count()


class Recording:
    """What one block has recorded so far.

    Attributes:
        graph: the nodes.
        entry: how the model is entered.
        prompts: what the model read of each invoke's arguments; None sees the whole batch.
        state: OPEN while the block is written, then RUNNING, then DONE, FAILED or ABANDONED.
        invoke: index of the open invoke, -1 between invokes.
        step: the forward that the open invoke talks about.
        current: per invoke and hook point, the proxy of what is there now (see `Proxy`).
        states: what is computed beside the values at places (see states.py).
        cut: by id, the handles whose places were assigned anew in a branch, with that and its line.
        bound: the places that were assigned anew, with what was there before.
        serial: a number that no other recording has.
        saved: the proxies that `save()` returned, until the block has ended.
        containers: lists and dicts whose values are kept as they are when the block ends.
        retained: the proxies whose gradients are kept, until the block has ended.
        oracle: shapes on demand; None once the block has ended.
        compute: runs what is recorded so far up to a node, for its value.
        reaches: runs what is recorded so far, to tell whether the open invoke has a step.
        known: what such runs have found, until the block has ended.
        session: the session that the block belongs to.
        caches: what the open invoke records when it ends.
        around: what `current` is around the loop over steps that is open.
        loop: index of the first node of the loop over steps that is open; None outside.
        decided: the condition of the branch that has just ended, and how many nodes there were.
        lasting: it is an edit: what it records is for prompts that come later.
        lent: tensors from outside whose memory is watched, by id.
        parts: handles on parts of containers, by id of the handle on the value at the place.
        parameters: weights that names have used, by invoke and path.
        looped: there was such a loop, whose own proxies have no single value.
        no_values: why no value can be had here; None where it can.
        no_gradients: why no `backward()` can be here; None where it can.
        early: checks what was recorded since, at its line; None where only the exit does.
        sized: the values whose sizes were told to the user.
        asked: invokes whose sizes or values were asked for while the block was written.
        backward: which backward `.grad` means, inside `with loss.backward():`.
    """

    __slots__ = (
        "around",
        "asked",
        "backward",
        "bound",
        "caches",
        "compute",
        "containers",
        "current",
        "cut",
        "decided",
        "early",
        "entry",
        "graph",
        "invoke",
        "known",
        "lasting",
        "lent",
        "loop",
        "looped",
        "no_gradients",
        "no_values",
        "oracle",
        "parameters",
        "parts",
        "prompts",
        "reaches",
        "retained",
        "saved",
        "serial",
        "session",
        "sized",
        "state",
        "states",
        "step",
    )

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.prompts: list[Any] = []
        self.graph = Graph()
        self.state = OPEN
        self.invoke = -1
        self.step = 0
        self.current: dict[tuple[int, HookPoint], Any] = {}
        self.states: dict[Any, Any] = {}
        self.bound: dict[tuple[int, HookPoint], Node] = {}
        self.cut: dict[int, tuple[Any, Graph, Any]] = {}
        self.saved: list[Any] = []
        self.retained: list[Any] = []
        self.containers: list[Any] = []
        self.parameters: dict[tuple[int, str], Any] = {}
        self.parts: dict[int, Any] = {}
        self.lent: dict[int, Captured] = {}
        self.serial = next(_serials)
        self.oracle: Oracle | None = None
        self.compute: Callable[[Node], Any] | None = None
        self.reaches: Callable[[int], bool] | None = None
        self.known: Any = None
        self.session: Any = None
        self.no_values: str | None = None
        self.loop: int | None = None
        self.looped = self.lasting = False
        self.decided: tuple[Node, int] | None = None
        self.around: dict[tuple[int, HookPoint], Any] = {}
        self.caches: list[Any] = []
        self.asked: set[int] = set()
        self.sized: list[Node] = []
        self.backward: int | None = None
        self.no_gradients: str | None = None
        self.early: Callable[[], None] | None = None

    @property
    def seen(self) -> Hashable:
        """Another one when the block begins to run: only in between the model can be changed."""
        return self.serial, self.state

    def close(self, state: str) -> None:
        """End the block. What was delivered belongs to the user's proxies alone from here on: no
        cycle may keep a dropped value until the garbage collector comes by."""
        self.state, self.invoke = state, -1
        self.current.clear()
        self.states.clear()
        self.bound.clear()
        self.cut.clear()
        self.parameters.clear()
        self.lent.clear()
        self.parts.clear()
        for handle in self.saved:
            handle._end()
        self.saved.clear()
        self.retained.clear()
        self.containers.clear()
        self.graph.release()
        self.oracle = self.compute = self.reaches = self.known = self.session = self.early = None

    def ask(self) -> Oracle:
        assert self.oracle is not None, "an open block has an oracle"
        return self.oracle

    def demand(self, node: Node, use: str) -> Any:
        """The real value of `node`, while the block is open.

        Raises:
            NotRunError: there are no values here.
        """
        if self.no_values is not None or self.compute is None:
            reason = self.no_values or "this block runs elsewhere"
            raise NotRunError.no_values(use, node.describe(), reason, user_line(3))
        self.asked.add(node.invoke)
        self.state = RUNNING
        try:
            return self.compute(node)
        except BaseException as error:
            __tracebackhide__ = True
            shorten(error)
            raise error
        finally:
            self.state = OPEN

    def comes(self, step: int) -> bool:
        """True unless the generation of the open invoke is known to end before `step`."""
        if not step or self.reaches is None or self.no_values is not None or self.state is not OPEN:
            return True
        self.state = RUNNING
        try:
            return self.reaches(step)
        finally:
            self.state = OPEN

    def check(self, node: Node) -> None:
        """Raises BlockError for a node of a loop over steps that has ended."""
        nodes = self.graph.nodes
        if node.index >= len(nodes) or nodes[node.index] is not node:
            raise BlockError.left_loop(node.describe(), node.location)

    def box(self, node: Node) -> Box:
        """Where a value arrives that is saved in a block with loops."""
        if self.lasting:
            raise BlockError.saves_in_edit(node.describe())
        self.check(node)
        return Box(len(self.graph.saves)) if self.loop is None else Series()

    def save(self, node: Node) -> Box:
        if self.graph.guard is not None:
            node = self.graph.keep(node, self.invoke)  # type: ignore[attr-defined]
        box = Box(len(self.graph.saves)) if not self.looped else self.box(node)
        self.graph.saves.append((node, box))
        return box
