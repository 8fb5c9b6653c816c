"""Owns the text that explains a plan: passes, batches, what is skipped, and the estimated work."""

from __future__ import annotations

import html
from typing import Any, Protocol

import torch

from ..intervention import Pass, Plan, Schedule, Shapes, Task
from ..tracing.errors import GraftworkError, ScheduleError
from ..tracing.job import Job, Recorded
from ..tracing.node import HookPoint
from ..tracing.structure import leaves


class Described(Protocol):
    """What an explanation is made from: a model."""

    def plan_task(self, task: Task) -> Plan: ...

    def schedule(self, prompt: Any = None, block: Recorded | None = None) -> Schedule: ...

    def skeleton(self) -> torch.nn.Module: ...

    def unembedding_path(self) -> str | None: ...

    def oracle(self, written: Recorded) -> Shapes: ...


class Explanation(str):
    """Text that shows itself as it is, in a terminal and in a notebook."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self)}</pre>"


def explain(model: Described, job: Job) -> Explanation:
    """The plan of a block as text.

    The work counts two operations for each weight and token that meets it; attention's own products
    are left out. Naive is one whole forward for each prompt.
    """
    plan = model.plan_task(Task(job))
    prompts = {i: p for i, p in enumerate(job.prompts) if p is not None}
    costs = _Costs(model, job)
    rows: list[tuple[str, ...]] = []
    total = 0
    for number, one in enumerate(plan.passes, 1):
        if job.entry.generates and not costs.touches_head(one):
            # transformers unembeds the prompt's last position alone unless it is asked for more.
            one.positions = 1
        count = sum(len(prompts[i].lengths) for i in one.invokes)
        width = max(prompts[i].width for i in one.invokes)
        own = sum(len(prompts[i].lengths) * prompts[i].width for i in one.invokes)
        stop = None if job.entry.generates or job.uses_output else costs.last(one)
        if not plan.settings.stop:
            stop = None
        total += costs.of(one, count, max(width, 1), stop)
        share = 1 - own / (count * width) if width else 0.0
        rows.append(
            (
                str(number),
                f"{len(one.invokes)}"
                + (f" for {len(one.invokes) + len(one.shared)}" if one.base else ""),
                _extent(count, width, one.cut),
                f"{share:.0%}",
                costs.blocks(one, stop),
                {0: "all"}.get(one.positions, f"last {one.positions}")
                if costs.has_head(stop)
                else "–",
                "the end" if stop is None else stop[0],
            )
        )
    naive = sum(
        costs.of(Pass([i]), len(p.lengths), max(p.width, 1), None) for i, p in prompts.items()
    )
    titles = ("pass", "prompts", "rows × tokens", "padding", "blocks", "logits", "runs to")
    lines = [
        f"{_count(len(prompts), 'prompt')} in {_count(len(plan.passes), 'pass')}, "
        + (
            f"{_flops(total)} of {_flops(naive)} for one whole forward each"
            if costs.known
            else "work unknown: the model cannot be measured without weights"
        )
        + (" (first token)" if job.entry.generates else ""),
        *_table(titles, rows),
        f"{_count(len(job.graph.saved_in_order()), 'value')} saved, {_saved_bytes(model, job)}.",
    ]
    return Explanation("\n".join(lines))


def _count(number: int, what: str) -> str:
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}{'' if number == 1 else plural}"


def _extent(rows: int, width: int, cut: int) -> str:
    if not width:
        return str(rows)
    return f"{rows} × {width}" if not cut else f"{rows} × {width - cut} (from {cut})"


class _Costs:
    """Work of the modules of a model, by place in the forward."""

    def __init__(self, model: Described, job: Job) -> None:
        self._head = model.unembedding_path()
        self.known = True
        try:
            first = next(p for p in job.prompts if p is not None)
            self._schedule = model.schedule(first, job)
        except ScheduleError:
            self._schedule = Schedule({})
            self.known = False
        self._chain = self._schedule.chain
        self._weights: list[tuple[int, str, int]] = []
        for path, module in model.skeleton().named_modules():
            visit = self._schedule.visits.get((path, "inputs", 0))
            if visit is None or isinstance(module, torch.nn.Embedding):
                continue
            size = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim > 1)
            if size:
                self._weights.append((visit.order, path, size))

    def last(self, one: Pass) -> tuple[str, int] | None:
        """The last place that a pass waits for."""
        orders = []
        for point in one.arrivals:
            visit = self._schedule.find(point)
            if point.port == "result" or visit is None:
                return None
            orders.append((visit.order, str(point)))
        for block in one.keep:
            point = HookPoint(self._chain[block], "output")
            orders.append((self._schedule.visits[point.path, "output", 0].order, str(point)))
        if not orders:
            return None
        order, name = max(orders)
        return name, order

    def of(self, one: Pass, rows: int, tokens: int, stop: tuple[str, int] | None) -> int:
        # How many of the rows have joined when a block runs.
        joined = {
            f"{path}.": rows
            * sum(one.starts.get(i, 0) <= k for i in one.invokes)
            // len(one.invokes)
            for k, path in enumerate(self._chain[: max(one.starts.values(), default=0)])
        }
        work = 0
        for order, path, size in self._weights:
            if stop is not None and order > stop[1]:
                continue
            here = next((count for block, count in joined.items() if path.startswith(block)), rows)
            positions = one.positions if path == self._head and one.positions else tokens - one.cut
            work += 2 * size * here * positions
        return work

    def blocks(self, one: Pass, stop: tuple[str, int] | None) -> str:
        if not self._chain:
            return "all"
        starts = [self._schedule.visits[path, "inputs", 0].order for path in self._chain]
        end = len(starts) if stop is None else sum(order <= stop[1] for order in starts)
        first = min((one.starts.get(i, 0) for i in one.invokes), default=0)
        if end <= first:
            return f"none of {len(starts)}"
        last = max(one.starts.values(), default=0)
        joins = f", rows join up to {last}" if last > first else ""
        return f"{first}–{end - 1} of {len(starts)}{joins}"

    def touches_head(self, one: Pass) -> bool:
        return any(
            point.path in ("", self._head) and point.port != "result" for point in one.arrivals
        )

    def has_head(self, stop: tuple[str, int] | None) -> bool:
        if self._head is None or stop is None:
            return self._head is not None
        return self._schedule.visits[self._head, "inputs", 0].order <= stop[1]


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    shown = rows if len(rows) <= 24 else [*rows[:12], ("…",) * len(titles), *rows[-11:]]
    widths = [max(len(row[i]) for row in [titles, *shown]) for i in range(len(titles))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [titles, *shown]
    ]


def _flops(count: int) -> str:
    for unit, size in (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kFLOP"


def _saved_bytes(model: Described, job: Job) -> str:
    shapes, total = model.oracle(job), 0
    try:
        for index in job.graph.saved_in_order():
            for leaf in leaves(shapes.value(job.graph.nodes[index])):
                if isinstance(leaf, torch.Tensor):
                    total += leaf.numel() * leaf.element_size()
    except GraftworkError as error:
        return f"of unknown size ({type(error).__name__})"
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if total >= size:
            return f"{total / size:.1f} {unit}"
    return f"{total} bytes"
