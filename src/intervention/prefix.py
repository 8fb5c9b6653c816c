"""Owns the outputs of blocks that a base pass keeps, and forwards that start from them.

A skipped block's `forward` is replaced on its instance while the pass runs, and put back after it:
all but the last skipped one hand their input on, the last one gives the kept output. Its hooks run as
always, so a write at its output finds what it would find in a whole forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..tracing.node import HookPoint
from ..tracing.structure import children, leaves
from .plan import Pass, Plan
from .rows import Place, TensorAxes, map_axes, narrow, region
from .run import Front, Run
from .schedule import Schedule


class Prefix:
    """Hidden states between the blocks of a chain, for each distinct input.

    Attributes:
        _kept: by invoke that stands for an input, and block: [row, token, d_model].
        _left: how many invokes will still start from each.
    """

    def __init__(self, plan: Plan, schedule: Schedule) -> None:
        self._chain = plan.chain
        self._schedule = schedule
        self._kept: dict[tuple[int, int], torch.Tensor] = {}
        self._stands = {invoke: invoke for one in plan.passes if one.base for invoke in one.invokes}
        self._stands.update(pair for one in plan.passes for pair in one.shared.items())
        self.rows_of: dict[int, int] = {}
        self._caches: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._left: dict[tuple[int, int], int] = {}
        for one in plan.passes:
            for invoke in one.invokes if one.start else ():
                key = (self._stands[invoke], one.start - 1)
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
        """Keep the output of a block in a base pass."""
        hidden = next(leaf for leaf in leaves(output) if isinstance(leaf, torch.Tensor))
        for invoke in one.invokes:
            if (invoke, block) not in self._left:
                continue
            own = hidden
            if places is not None:
                own = narrow(hidden, self._axes(block), places[invoke], rows, 1)
            self._kept[invoke, block] = own.clone()

    def _gather(self, one: Pass, places: dict[int, Place] | None, rows: int) -> torch.Tensor:
        """The batch's hidden states at the start of a pass; zeros where there is padding."""
        block = one.start - 1
        parts = [self._kept[self._stands[invoke], block] for invoke in one.invokes]
        if places is None:
            # The model may change it in place, and others may start from it later.
            last = self._left[self._stands[one.invokes[0]], block] == 1
            return parts[0] if last else parts[0].clone()
        width = max(part.shape[1] for part in parts)
        first = parts[0]
        if all(part.shape[1] == width for part in parts):
            return torch.cat(parts)
        hidden = first.new_zeros((rows, width, *first.shape[2:]))
        for invoke, part in zip(one.invokes, parts, strict=True):
            region(hidden, self._axes(block), places[invoke], rows, 1).copy_(part)
        return hidden

    @contextmanager
    def skipping(
        self,
        root: torch.nn.Module,
        one: Pass,
        run: Run,
        at_path: Callable[[torch.nn.Module, str], torch.nn.Module],
    ) -> Iterator[None]:
        """Skip the first blocks of the chain while the context is open."""
        if not one.start:
            yield
            return
        hidden = self._gather(one, run.places, run.rows)
        if one.cut:
            width = hidden.shape[1]
            point = HookPoint(self._chain[one.start - 1], "output")
            run.front = Front(point, hidden[:, : one.cut], one.cut, width)
            hidden = hidden[:, one.cut :]
        replaced: list[tuple[torch.nn.Module, Any]] = []
        try:
            for block in range(one.start):
                module = at_path(root, self._chain[block])
                shape = self._schedule.axes(HookPoint(self._chain[block], "output"))
                given = hidden if block == one.start - 1 else None
                # accelerate keeps a forward of its own on the instance.
                replaced.append((module, module.__dict__.get("forward")))
                module.forward = _forward(shape, given)
            yield
        finally:
            for module, before in replaced:
                if before is None:
                    del module.forward
                else:
                    module.forward = before

    def keep_cache(
        self, one: Pass, cache: list[tuple[torch.Tensor, torch.Tensor]], widths: dict[int, int]
    ) -> None:
        """Keep the keys and values of a base pass, [row, head, token, d_head] for each layer."""
        start = 0
        for invoke in one.invokes:
            count, width = self.rows_of[invoke], widths[invoke]
            self._caches[invoke] = [
                (k[start : start + count, :, -width:], v[start : start + count, :, -width:])
                for k, v in cache
            ]
            start += count

    def cache(self, one: Pass) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the first tokens of a pass with a cut, for each layer."""
        own = [self._caches[self._stands[invoke]] for invoke in one.invokes]
        layers = []
        for layer in range(len(own[0])):
            keys = torch.cat([rows[layer][0][:, :, : one.cut] for rows in own])
            values = torch.cat([rows[layer][1][:, :, : one.cut] for rows in own])
            layers.append((keys, values))
        return layers

    def release(self, one: Pass) -> None:
        """Free what no later pass starts from."""
        for invoke in one.invokes if one.start else ():
            key = (self._stands[invoke], one.start - 1)
            self._left[key] -= 1
            if not self._left[key]:
                del self._kept[key]


def _tensors(axes: Any) -> Iterator[TensorAxes]:
    if isinstance(axes, TensorAxes):
        yield axes
    else:
        for part in children(axes) or ():
            yield from _tensors(part)


def _forward(shape: Any, given: torch.Tensor | None) -> Callable[..., Any]:
    """A forward that gives its first tensor on, or `given`, in the structure that the block returns."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = given
        if hidden is None:
            hidden = next(leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        rest = [hidden]
        return map_axes(lambda _: rest.pop() if rest else None, shape)

    return forward
