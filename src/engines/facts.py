"""Owns what the planner is told of one block's model and prompts."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

from ..intervention import Schedule, Task
from ..tracing.job import Job, Recorded


class Host(Protocol):
    """What a block's facts are asked of: a model."""

    def schedule(self, prompt: Any = None, block: Recorded | None = None) -> Schedule: ...

    def mixes_rows(self) -> bool: ...

    def batch_class(self, task: Task, invoke: int) -> Hashable: ...

    def prompt_identity(self, prompt: Any) -> Hashable: ...

    def budget(self, schedule: Schedule, all_logits: bool) -> int: ...

    def may_share(self, job: Job) -> bool: ...

    def may_be_causal(self) -> bool: ...

    def unembedding_path(self) -> str | None: ...


class BlockFacts:
    """The facts of one block."""

    def __init__(self, host: Host, task: Task) -> None:
        self._host = host
        self._task = task
        # Asked for again and again while one block is planned, and always the same in it.
        self._known: Schedule | None = None
        self._classes: dict[int, Hashable] = {}
        self._mixes: bool | None = None

    @property
    def generates(self) -> bool:
        return self._task.job.entry.generates

    def schedule(self) -> Schedule:
        if self._known is None:
            job = self._task.job
            first = next(p for p in job.prompts if p is not None)
            self._known = self._host.schedule(first, job)
        return self._known

    def batch_class(self, invoke: int) -> Hashable:
        if self._mixes is None:
            self._mixes = self._host.mixes_rows()
        if self._mixes:
            return invoke
        if invoke not in self._classes:
            self._classes[invoke] = self._host.batch_class(self._task, invoke)
        return self._classes[invoke]

    def extent(self, invoke: int) -> tuple[int, int]:
        prompt = self._task.job.prompts[invoke]
        return len(prompt.lengths), max(1, prompt.width)

    def identity(self, invoke: int) -> Hashable:
        if self._task.part is not None and invoke in self._task.part.resume.starts:
            return None  # its writes that earlier runs have carried out are not in the graph
        return self._host.prompt_identity(self._task.job.prompts[invoke])

    def budget(self, all_logits: bool) -> int:
        return self._host.budget(self.schedule(), all_logits)

    def may_share(self) -> bool:
        return self._host.may_share(self._task.job)

    def may_be_causal(self) -> bool:
        return self._host.may_be_causal()

    def head(self) -> str | None:
        return self._host.unembedding_path()
