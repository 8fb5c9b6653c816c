"""Owns the outputs of blocks that a base pass keeps, and forwards that start from them.

Variants of different starts share one forward, whose batch grows: the rows of a variant join it
after the last block that they skip, with the kept output of that block. While the pass runs, the
`forward` of the blocks before the last start is replaced on the instance: it computes the rows that
have joined and appends those that join next. The blocks' hooks run as always, so a write at the output
of the last skipped block finds what it would find in a whole forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..tracing.errors import BlockError
from ..tracing.node import HookPoint
from ..tracing.structure import ATOMS, children, leaves, map_leaves, rebuild
from .plan import Pass, Plan, Resume
from .rows import BATCH, Place, TensorAxes, map_axes, matching, narrow
from .run import Front, Run
from .schedule import Schedule
from .source import put_back


class Prefix:
    """Hidden states between the blocks of a chain, for each distinct input.

    Attributes:
        _kept: by invoke that stands for an input, and block: [row, token, d_model].
        _left: how many invokes will still start from each.
        _stands: for each invoke whose input a base pass runs, the one that stands for it there.
    """

    def __init__(self, plan: Plan, schedule: Schedule) -> None:
        self._chain = plan.chain
        self._schedule = schedule
        self._kept: dict[tuple[int, int], torch.Tensor] = {}
        self._stands = {invoke: invoke for one in plan.passes if one.base for invoke in one.invokes}
        self._stands.update(pair for one in plan.passes for pair in one.shared.items())
        self._resume = plan.resume or Resume()
        for invoke, (block, hidden) in self._resume.starts.items():
            self._stands[invoke] = invoke
            self._kept[invoke, block] = hidden
        self._caches: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._left: dict[tuple[int, int], int] = {}
        for one in plan.passes:
            for invoke, start in one.starts.items():
                key = (self._stands[invoke], start - 1)
                self._left[key] = self._left.get(key, 0) + 1

    def path(self, block: int) -> str:
        return self._chain[block]

    def _axes(self, block: int) -> TensorAxes:
        """Axes of the hidden states in what a block returns."""
        axes = self._schedule.axes(HookPoint(self._chain[block], "output"))
        first = next(leaf for leaf in _tensors(axes))
        return first

    def keep(
        self, one: Pass, block: int, output: Any, places: dict[int, Place] | None, rows: int
    ) -> None:
        """Keep the output of a block for later passes of this run, or for later runs."""
        hidden = next(leaf for leaf in leaves(output) if isinstance(leaf, torch.Tensor))
        for invoke in one.invokes:
            later = self._resume.keeps.get(invoke) == block
            now = (invoke, block) in self._left
            if not later and not now:
                continue
            own = hidden
            if places is not None:
                own = narrow(hidden, self._axes(block), places[invoke], rows, 1)
            own = own.clone()
            if later:
                self._resume.found[invoke] = (block, own)
            if now:
                self._kept[invoke, block] = own

    def _joining(self, one: Pass, invokes: list[int], run: Run) -> torch.Tensor:
        """Hidden states of the rows that join after a block; zeros where there is padding."""
        width = max(width for _, width in run.extents.values())
        parts = []
        for invoke in invokes:
            part = self._kept[self._stands[invoke], one.starts[invoke] - 1]
            if part.shape[1] < width:
                rest = part.new_zeros((part.shape[0], width - part.shape[1], *part.shape[2:]))
                part = torch.cat((part, rest) if run.pads_right else (rest, part), dim=1)
            parts.append(part[:, one.cut :])
        # Always a copy: the model may write there, and others may start from it later.
        return torch.cat(parts) if len(parts) > 1 else parts[0].clone()

    def _front(self, one: Pass, block: int, run: Run) -> torch.Tensor:
        """The first tokens of the rows that have joined after a block, as far as they are kept."""
        parts = []
        for invoke in one.invokes:
            if one.starts.get(invoke, 0) > block + 1:
                break
            kept = self._kept.get((self._stands.get(invoke, -1), block))
            parts.append((run.extents[invoke][0], kept))
        like = next(kept for _, kept in parts if kept is not None)
        shape = (one.cut, *like.shape[2:])
        return torch.cat(
            [
                like.new_full((rows, *shape), float("nan")) if kept is None else kept[:, : one.cut]
                for rows, kept in parts
            ]
        )

    @contextmanager
    def skipping(
        self,
        root: torch.nn.Module,
        one: Pass,
        run: Run,
        at_path: Callable[[torch.nn.Module, str], torch.nn.Module],
    ) -> Iterator[None]:
        """Let the rows of a pass join where they start, while the context is open."""
        last = max(one.starts.values(), default=0)
        if one.cut:
            width = max(width for _, width in run.extents.values())
            run.front = Front(one.cut, width)
        replaced: list[tuple[torch.nn.Module, str, Any]] = []
        run.undo.append(partial(put_back, replaced))
        try:
            for block in range(last):
                joining = [i for i in one.invokes if one.starts.get(i, 0) == block + 1]
                if joining and run.front is not None:
                    point = HookPoint(self._chain[block], "output")
                    run.front.hidden[point] = self._front(one, block, run)
                module = at_path(root, self._chain[block])
                # accelerate keeps a forward of its own on the instance.
                replaced.append((module, "forward", module.__dict__.get("forward")))
                module.forward = self._forward(one, run, block, joining, module.forward)
            yield
        finally:
            put_back(replaced)

    def _forward(
        self, one: Pass, run: Run, block: int, joining: list[int], original: Callable[..., Any]
    ) -> Callable[..., Any]:
        """The forward of a block before the last start of a pass."""
        path = self._chain[block]
        taken = self._schedule.visits[path, "inputs", 0].axes
        given = self._schedule.visits[path, "output", 0].axes
        rows = {i: count for i, (count, _) in run.extents.items()}
        now = sum(rows[i] for i in one.invokes if one.starts.get(i, 0) <= block)
        then = now + sum(rows[i] for i in joining)
        every = run.rows

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not now:
                if not joining:
                    return _as_output(given, _first_tensor((args, kwargs)))
                run.batch_has(then)
                return _as_output(given, self._joining(one, joining, run))
            args, kwargs = _first_rows((args, kwargs), taken, now, every)
            run.batch_has(now)
            output = original(*args, **kwargs)
            if joining:
                hidden = torch.cat((_first_tensor(output), self._joining(one, joining, run)))
                output = _with_first_tensor(output, hidden)
            run.batch_has(then)
            return output

        return forward

    def keep_cache(
        self, one: Pass, cache: list[tuple[torch.Tensor, torch.Tensor]], run: Run
    ) -> None:
        """Keep the keys and values of a base pass, [row, head, token, d_head] for each layer."""
        start = 0
        for invoke, (count, width) in run.extents.items():
            self._caches[invoke] = [
                (k[start : start + count, :, -width:], v[start : start + count, :, -width:])
                for k, v in cache
            ]
            start += count

    def cache(self, one: Pass) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the first tokens of a pass with a cut, for each layer: of the rows that
        have joined when the layer runs. A layer that none runs tells the number of tokens alone."""
        layers = []
        for layer in range(len(next(iter(self._caches.values())))):
            joined = [i for i in one.invokes if one.starts.get(i, 0) <= layer] or one.invokes
            own = [self._caches[self._stands[invoke]][layer] for invoke in joined]
            keys = torch.cat([keys[:, :, : one.cut] for keys, _ in own])
            layers.append((keys, torch.cat([values[:, :, : one.cut] for _, values in own])))
        return layers

    def release(self, one: Pass) -> None:
        """Free what no later pass starts from."""
        for invoke, start in one.starts.items():
            key = (self._stands[invoke], start - 1)
            self._left[key] -= 1
            if not self._left[key]:
                del self._kept[key]


def _tensors(axes: Any) -> Iterator[TensorAxes]:
    if isinstance(axes, TensorAxes):
        yield axes
    else:
        for part in children(axes) or ():
            yield from _tensors(part)


def _first_tensor(value: Any) -> torch.Tensor:
    return next(leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor))


def _with_first_tensor(value: Any, tensor: torch.Tensor) -> Any:
    first = _first_tensor(value)
    return map_leaves(lambda leaf: tensor if leaf is first else leaf, value)


def _as_output(axes: Any, hidden: torch.Tensor) -> Any:
    """Hidden states in the structure that a block returns, with nothing else in it."""
    first = next(_tensors(axes))
    return map_axes(lambda axes: hidden if axes is first else None, axes)


def _first_rows(value: Any, axes: Any, rows: int, every: int) -> Any:
    """The part of a block's arguments that belongs to the first rows of the batch.

    Raises:
        BlockError: an argument was not seen when the model was measured, so its rows are not known.
    """
    if isinstance(value, torch.Tensor):
        if not isinstance(axes, TensorAxes) or len(axes.axes) != value.ndim:
            if every > 1 and every in value.shape:
                raise BlockError.unknown_rows(list(value.shape))
            return value
        for dimension, axis in enumerate(axes.axes):
            if axis.role == BATCH and value.shape[dimension] == axis.factor * every:
                value = value.narrow(dimension, 0, axis.factor * rows)
        return value
    parts = children(value)
    if type(value) in ATOMS or parts is None:
        return value
    known = matching(value, axes)
    return rebuild(
        value, [_first_rows(p, a, rows, every) for p, a in zip(parts, known, strict=True)]
    )
