"""Owns the form of a `Plan`: passes, their batches, and what each wants of each arrival.

How a plan is found stands in planner.py, order.py and batches.py. What they know of a model comes
from `Facts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, Protocol

import torch

from ..tracing.errors import InputError, near
from ..tracing.node import HookPoint, Node
from .schedule import Schedule


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """Which passes of the planner run; all do unless switched off.

    Attributes:
        dead_code: leave out what no save and no write depends on.
        micro_batches: run several prompts in one forward.
        prefix_reuse: compute what prompts share once, start each variant at its first edited block.
        causal: let variants of a causal decoder compute from their first edited token on.
        less_head: unembed the last position alone where only that is used.
        stop: leave the forward after the last needed module.
        memory: free values after their last use.
        share_memory: a saved value may lie in the memory in which the forward made it, with others,
            where the forward does not write there again. Off: each has memory of its own.
        tokens: most tokens in one forward, padding included; None fits it to the free memory.
        progress: show a bar over the passes of a block that takes more than two seconds.
    """

    dead_code: bool = True
    micro_batches: bool = True
    prefix_reuse: bool = True
    causal: bool = True
    less_head: bool = True
    stop: bool = True
    memory: bool = True
    share_memory: bool = False
    tokens: int | None = None
    progress: bool = True

    @classmethod
    def naive(cls) -> Settings:
        """Each invoke in a forward of its own, from the first module to the last."""
        return cls(False, False, False, False, False, False, False)


class Facts(Protocol):
    """What the planner knows of the model and of the prompts of one block."""

    @property
    def generates(self) -> bool: ...

    def schedule(self) -> Schedule:
        """Raises ScheduleError where the model cannot be measured."""

    def batch_class(self, invoke: int) -> Hashable:
        """Prompts of one class can be padded to one batch."""

    def extent(self, invoke: int) -> tuple[int, int]:
        """Rows, and tokens of the longest one."""

    def identity(self, invoke: int) -> Hashable:
        """Equal for the same input; None if that cannot be told."""

    def budget(self, all_logits: bool) -> int:
        """Tokens that fit into one forward; with all of their logits, or the last ones alone."""

    def may_share(self) -> bool:
        """False if equal inputs need not be equal computations, or if somebody else looks on."""

    def may_be_causal(self) -> bool:
        """False if the model cannot continue from keys and values of earlier tokens."""

    def head(self) -> str | None:
        """Path of the unembedding, if the forward can be told to apply it to few positions."""


@dataclasses.dataclass(slots=True)
class Arrival:
    """What is wanted of one arrival: the reads and the last writes of each invoke."""

    hook_point: HookPoint
    reads: list[Node]
    writes: list[Node]


@dataclasses.dataclass(slots=True)
class Pass:
    """One run of the entry point.

    Attributes:
        invokes: the invokes that have rows in its batch, in this order.
        shared: invokes that have the same input as one in the batch, and which.
        base: it computes what several invokes share, see batches.py.
        starts: for each invoke that skips blocks of the chain, how many. The invokes of a pass stand
            in the order of their starts.
        cut: first tokens that are not computed, because they are those of the base pass.
        caches: the keys and values of its tokens are kept for passes with a cut.
        keep: blocks whose outputs later passes start from.
        seams: before which of its invokes the batch may be halved; None for any.
        positions: the last positions that are unembedded; 0 for all.
        arrivals: by hook point.
    """

    invokes: list[int]
    shared: dict[int, int] = dataclasses.field(default_factory=dict)
    base: bool = False
    starts: dict[int, int] = dataclasses.field(default_factory=dict)
    cut: int = 0
    caches: bool = False
    keep: set[int] = dataclasses.field(default_factory=set)
    seams: list[int] | None = None
    positions: int = 0
    arrivals: dict[HookPoint, Arrival] = dataclasses.field(default_factory=dict)

    def touches(self, port: str) -> bool:
        """True if something is wanted of a port of that kind: "skip", "source"."""
        return any(port in point.port.split(".") for point in self.arrivals)

    def paths_of_first_calls(self) -> set[str]:
        """The modules of which something is wanted by one who knows of no second call."""
        known = {point.path for point in self.arrivals if point.call}
        return {point.path for point in self.arrivals} - known

    def halves(self) -> list[Pass]:
        """This pass as two, with half of its batch each; none if its invokes need each other."""
        count = len(self.invokes)
        seams = range(1, count) if self.seams is None else self.seams
        if not seams:
            return []
        at = min(seams, key=lambda seam: abs(seam - count // 2))
        return [self._part(0, at), self._part(at, count)]

    def _part(self, first: int, stop: int) -> Pass:
        invokes = self.invokes[first:stop]
        shared = {i: stands for i, stands in self.shared.items() if stands in invokes}
        members = {*invokes, *shared}
        seams = self.seams and [seam - first for seam in self.seams if first < seam < stop]
        starts = {i: start for i, start in self.starts.items() if i in members}
        part = dataclasses.replace(
            self, invokes=invokes, shared=shared, starts=starts, seams=seams, arrivals={}
        )
        for hook_point, arrival in self.arrivals.items():
            reads = [node for node in arrival.reads if node.invoke in members]
            writes = [node for node in arrival.writes if node.invoke in members]
            if reads or writes:
                part.arrivals[hook_point] = Arrival(hook_point, reads, writes)
        return part


@dataclasses.dataclass(slots=True)
class Resume:
    """Hidden states that go from one run of a block to the next, each as the number of the block of
    the chain and its output [row, token, d_model].

    Attributes:
        starts: for each invoke that starts from some, those.
        keeps: for each invoke whose hidden states are kept, the block.
        found: what was kept.
    """

    starts: dict[int, tuple[int, torch.Tensor]] = dataclasses.field(default_factory=dict)
    keeps: dict[int, int] = dataclasses.field(default_factory=dict)
    found: dict[int, tuple[int, torch.Tensor]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class Plan:
    """The work of one block.

    Attributes:
        live: 1 for each node that runs.
        users: for each node, the live nodes that use it, once for each use.
        passes: in order.
        chain: paths of the blocks that passes may start in.
        settings: what was switched on.
        resume: hidden states of earlier runs of the block, and for later ones.
        waits: for each backward, what it waits for besides its loss.
        skipped: reads and writes inside what their invoke skips, by index, and the skip.
    """

    live: bytearray
    users: list[list[Node] | None]
    passes: list[Pass]
    chain: tuple[str, ...]
    settings: Settings
    resume: Resume | None = None
    waits: list[list[Node]] = dataclasses.field(default_factory=list)
    skipped: dict[int, Node] = dataclasses.field(default_factory=dict)


def settings_of(given: Any) -> Settings:
    """Planner settings from what the user gave: None, False, a mapping of switches, or Settings.

    Raises:
        InputError: it is something else, or names no pass of the planner.
    """
    if given is None or given is True:
        return Settings()
    if given is False:
        return Settings.naive()
    if isinstance(given, Settings):
        return given
    if isinstance(given, Mapping):
        known = [field.name for field in dataclasses.fields(Settings)]
        for name in given:
            if name not in known:
                raise InputError(f"plan= has no switch `{name}`. {near(name, known)}")
        return Settings(**given)
    raise InputError(f"plan= takes False or a mapping of switches, not {type(given).__name__}.")
