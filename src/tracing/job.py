"""Owns `Job`: a finished block as data, which is all that is known of it where it runs.

While a block is written it is a `Recording`. What is asked of both, such as shapes, takes a `Recorded`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

from .errors import Location
from .graph import Graph


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
