"""Owns `Experiment`: a recorded block that runs again on other prompts, and its `Results`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .errors import BlockError, InputError, StepError
from .frames import entry
from .graph import Box, Graph
from .node import Node
from .proxy import Proxy


class Results(Sequence[Any]):
    """The saved values of one run, in the order of their `save()`. One that the run did not reach, such
    as that of a branch that was not taken, raises its reason.

    `results[0]`, or `results[handle]` with the proxy that the block saved.
    """

    def __init__(self, boxes: list[Box]) -> None:
        self._boxes = boxes

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, Proxy):
            if key._box is None:
                raise KeyError(f"{key!r} was not saved in this block")
            key = key._box.number
        if isinstance(key, slice):
            return [_value(box) for box in self._boxes[key]]
        return _value(self._boxes[key])

    def __len__(self) -> int:
        return len(self._boxes)

    def __iter__(self) -> Iterator[Any]:
        return (_value(box) for box in self._boxes)

    def __repr__(self) -> str:
        return f"Results({[box.error or box.value for box in self._boxes]!r})"


class Experiment:
    """What a block recorded, ready to run on other prompts without recording again.

    Attributes:
        graph: the recorded operations.
        prompts: how many prompts it takes, one for each invoke that had one.

    Example:
        with model.trace("first prompt") as tracer:
            logits = model.lm_head.output[:, -1].save()
        experiment = tracer.compile()
        experiment("another prompt")[logits]
    """

    def __init__(
        self,
        graph: Graph,
        prompts: list[Any],
        run: Callable[[Graph, tuple[Any, ...]], None],
        sized: Node | None = None,
    ) -> None:
        self.graph = graph
        self.prompts = len(prompts)
        self._first = prompts
        self._run = run
        self._sized = sized

    @entry
    def __call__(self, *prompts: Any) -> Results:
        """Run on other prompts.

        Args:
            *prompts: one for each invoke that had one, in their order, each in any form that an
                invoke takes. None at all: those of the block.

        Raises:
            InputError: another number of prompts, or one of another form than the graph allows.
        """
        if prompts and len(prompts) != self.prompts:
            raise InputError(
                f"this experiment takes {self.prompts} prompts, {len(prompts)} were given; a prompt "
                "of several rows is a list of its own."
            )
        graph = self.graph.again()
        boxes = [box for _, box in graph.saves]
        self._run(graph, prompts)
        for box in boxes:
            if not (isinstance(box.error, StepError) and box.error.ended):
                _value(box)
        return Results(boxes)

    def check(self, new: list[Any]) -> None:
        """Refuse prompts that the graph was not written for."""
        for before, after in zip(self._first, new, strict=True):
            if len(before.lengths) != len(after.lengths):
                raise InputError(
                    f"the block was written for a prompt of {len(before.lengths)} rows, this one has "
                    f"{len(after.lengths)}."
                )
            if self._sized is not None and before.lengths != after.lengths:
                what, at = self._sized.describe(), self._sized.location
                raise InputError(
                    f"the block asked for a size of {what} ({at}), which was that of a prompt of "
                    f"{before.lengths} tokens and is another one for {after.lengths}. Write the block "
                    "without that number (`h.mean(1)`, `h.t.mean()`), or open a new one."
                )
            if self.graph.fixed_positions and before.lengths != after.lengths:
                raise InputError(
                    "the block counted the own tokens of rows of different lengths, so it runs on "
                    f"prompts of the same lengths alone: {before.lengths}, not {after.lengths}."
                )
            if self.graph.counts_tokens and set(after.lengths) != {after.width}:
                raise InputError(
                    "the block used `.t` on rows without padding, so it runs on prompts without "
                    f"padding alone, not on rows of {after.lengths} tokens."
                )


def _value(box: Box) -> Any:
    if box.error is not None:
        raise box.error.with_traceback(None)
    if not box.full:
        raise BlockError("a saved value was not computed")
    return box.value
