"""Owns `scan`: a block that is checked on values without numbers, and never loads the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from ..intervention import Plan, Shapes, Task, warn_of_padding
from ..intervention.rows import Misfit, Opaque, fit
from ..tracing.errors import (
    GraftworkError,
    NotRunError,
    ScheduleError,
    ShapeError,
    UnmeasuredError,
)
from ..tracing.graph import Graph, arguments
from ..tracing.job import Entry, Job, Outcome, Recorded
from ..tracing.node import READ, WRITE, Node
from ..tracing.recording import Recording
from ..tracing.structure import leaves, map_leaves
from ..tracing.template import Template


class Scanned(Protocol):
    """What a scan needs of a model."""

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def oracle(self, written: Recorded) -> Shapes: ...

    def explain(self, job: Job) -> Any: ...

    def plan_task(self, task: Task) -> Plan: ...

    def module_paths(self, modules: Any) -> list[str]: ...

    def lasting_edits(self) -> list[Template]: ...

    def early_check(self, written: Recording) -> Callable[[], None] | None: ...


class Scan:
    """Ends a block by evaluating what it recorded on meta tensors."""

    def __init__(self, model: Scanned) -> None:
        self._model = model
        self.prepare, self.oracle, self.explain = model.prepare, model.oracle, model.explain
        self.lasting_edits, self.early_check = model.lasting_edits, model.early_check

    def module_paths(self, modules: Any) -> list[str]:
        return self._model.module_paths(modules)

    def most_steps(self, entry: Entry, prompt: Any) -> int:
        return 1  # a scan is one forward

    def may_end(self, entry: Entry) -> bool:
        return False

    def reaches(self, job: Job, invoke: int, step: int, known: Any) -> bool:
        return True

    def remember(self) -> Any:
        return None  # there are no values that could be known

    def check_repeats(self, job: Job) -> None:
        """Nothing runs, so nothing is changed."""

    def demand(self, job: Job, node: Node, known: Any) -> Any:
        raise AssertionError("the recording of a scan says that it has no values")

    def run(self, job: Job, known: Any = None) -> Outcome:
        """Check every recorded node; saved values become meta tensors.

        Raises:
            OrderError: a write needs a later value.
            ShapeError: a written value does not fit.
        """
        self._model.plan_task(Task(job))
        graph, shapes = job.graph, self._model.oracle(job)
        warn_of_padding(job, shapes)
        unknown: dict[int, GraftworkError] = {}
        result = None
        for node, value, reason in check(graph, shapes):
            if reason is not None:
                unknown[node.index] = reason
            elif node.kind == READ and not node.target.path and node.target.port == "output":
                result = _meta(value)
        for node, box in graph.saves:
            box.error = unknown.get(node.index)
            if box.error is None:
                value = shapes.value(node)
                opaque = next((leaf for leaf in leaves(value) if isinstance(leaf, Opaque)), None)
                if opaque is not None:
                    box.error = ScheduleError.shared(node.describe(), node.location, opaque.reason)
                else:
                    box.value, box.full = _meta(value), True
        return Outcome(result)


def check(graph: Graph, shapes: Shapes) -> Iterator[tuple[Node, Any, GraftworkError | None]]:
    """Every node with its value without numbers, or with the reason why there is none.

    Raises:
        ShapeError: a written value does not fit.
    """
    unknown: dict[int, GraftworkError] = {}
    for node in graph.nodes:
        reason = next((unknown[a.index] for a in arguments(node) if a.index in unknown), None)
        value = None
        if reason is None:
            try:
                value = shapes.value(node)
            except (NotRunError, DataDependentOutputException):
                # What the numbers decide is left to the run.
                reason = NotRunError.on_demand("scan", node.describe(), node.location)
            except UnmeasuredError as error:
                reason = error
        if reason is not None:
            unknown[node.index] = reason
        elif node.kind == WRITE and node.target.port in ("inputs", "output"):
            _check(node, _at(shapes, node), value)
        yield node, value, reason


def _at(shapes: Shapes, write: Node) -> Any:
    """What the model itself has at the place of a write."""
    return shapes.value(
        Node(-1 - write.index, READ, write.target, (), {}, write.invoke, write.file, write.line)
    )


def _check(write: Node, expected: Any, found: Any) -> None:
    if any(isinstance(leaf, Opaque) for leaf in leaves(expected)):
        return
    try:
        fit(_meta(expected), _meta(found))
    except Misfit as misfit:
        raise ShapeError.write(
            write.describe(), write.location, misfit.expected, misfit.found
        ) from None


def _meta(value: Any) -> Any:
    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return torch.empty(tuple(leaf.shape), dtype=leaf.dtype, device="meta")

    return map_leaves(plain, value)
