"""Owns what the planner is told of one block's model and prompts."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

from ..intervention import Schedule
from ..tracing.context import Tracer


class Host(Protocol):
    """What a block's facts are asked of: a model."""

    def schedule(self, prompt: Any = None, tracer: Tracer | None = None) -> Schedule: ...

    def mixes_rows(self) -> bool: ...

    def batch_class(self, tracer: Tracer, invoke: int) -> Hashable: ...

    def prompt_identity(self, tracer: Tracer, prompt: Any) -> Hashable: ...

    def budget(self, tracer: Tracer, all_logits: bool) -> int: ...

    def may_share(self, tracer: Tracer) -> bool: ...

    def may_be_causal(self) -> bool: ...

    def unembedding_path(self) -> str | None: ...


class BlockFacts:
    """The facts of one block."""

    def __init__(self, host: Host, tracer: Tracer) -> None:
        self._host = host
        self._tracer = tracer
        # Asked for again and again while one block is planned, and always the same in it.
        self._known: Schedule | None = None
        self._classes: dict[int, Hashable] = {}
        self._mixes: bool | None = None

    @property
    def generates(self) -> bool:
        return self._tracer.generates

    def schedule(self) -> Schedule:
        if self._known is None:
            first = next(i.prompt for i in self._tracer.invokes if i.prompt is not None)
            self._known = self._host.schedule(first, self._tracer)
        return self._known

    def batch_class(self, invoke: int) -> Hashable:
        if self._mixes is None:
            self._mixes = self._host.mixes_rows()
        if self._mixes:
            return invoke
        if invoke not in self._classes:
            self._classes[invoke] = self._host.batch_class(self._tracer, invoke)
        return self._classes[invoke]

    def extent(self, invoke: int) -> tuple[int, int]:
        prompt = self._tracer.invokes[invoke].prompt
        return len(prompt.lengths), max(1, prompt.width)

    def identity(self, invoke: int) -> Hashable:
        if self._tracer.part is not None and invoke in self._tracer.part.resume.starts:
            return None  # its writes that earlier runs have carried out are not in the graph
        return self._host.prompt_identity(self._tracer, self._tracer.invokes[invoke].prompt)

    def budget(self, all_logits: bool) -> int:
        return self._host.budget(self._tracer, all_logits)

    def may_share(self) -> bool:
        return self._host.may_share(self._tracer)

    def may_be_causal(self) -> bool:
        return self._host.may_be_causal()

    def head(self) -> str | None:
        return self._host.unembedding_path()
