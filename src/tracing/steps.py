"""Owns loops over the steps of a generation: `tracer.iter[a:b]` and `tracer.all()`.

As a `for` loop, each round records at its step, and it has as many rounds as the generation has steps:
where that may end early, what is recorded so far is run to tell. As a `with`, the block is recorded
once: it is a template, which is put into the graph once for each step when the block ends. A step that
never comes leaves its nodes without values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .errors import BlockError
from .graph import Series
from .node import CALL
from .operations import STEP
from .proxy import Handle
from .recording import OPEN, Recording
from .template import Template


class Iter:
    """`tracer.iter`, to be indexed with a slice, a list or one step."""

    __slots__ = ("_most", "_recording")

    def __init__(self, recording: Recording, most: Callable[[], int]) -> None:
        self._recording = recording
        self._most = most

    def _not_indexed(self, *args: Any, **kwargs: Any) -> Any:
        raise BlockError.not_indexed()

    # Without an index Python would loop over `iter[0]`, `iter[1]`, … without end.
    __call__ = __enter__ = __exit__ = __iter__ = _not_indexed

    def __getitem__(self, key: Any) -> Steps:
        if isinstance(key, slice):
            ends = (key.start, key.stop, key.step)
            if any(end is not None and (type(end) is not int or end < 0) for end in ends):
                raise BlockError.steps(f"iter[{key.start}:{key.stop}]")
            most = self._most()
            stop = most if key.stop is None else min(key.stop, most)
            return Steps(self._recording, range(key.start or 0, stop, key.step or 1))
        several = isinstance(key, (list, tuple, range))
        steps = list(key) if several else [key]
        if any(type(step) is not int or step < 0 for step in steps) or steps != sorted({*steps}):
            raise BlockError.steps(f"iter[{key!r}]")
        return Steps(self._recording, steps, single=not several)


class Steps:
    """Steps of a generation, for a `for` loop or a `with` block."""

    __slots__ = ("_kept", "_recording", "_single", "_start", "_steps")

    def __init__(self, recording: Recording, steps: Any, single: bool = False) -> None:
        self._recording = recording
        self._steps: list[int] = list(steps)
        self._single = single
        self._start = 0
        self._kept: tuple[Any, ...] = ()

    def __iter__(self) -> Iterator[int]:
        self._check()
        recording, before = self._recording, self._recording.step
        try:
            for step in self._steps:
                if not recording.comes(step):
                    return
                recording.step = step
                yield step
        finally:
            recording.step = before

    def _check(self) -> None:
        recording = self._recording
        if recording.state is not OPEN or recording.invoke < 0:
            raise BlockError.closed("iter")
        if recording.loop is not None:
            raise BlockError(
                "A loop over steps was opened inside another one. Close the first one."
            )

    def __enter__(self) -> Any:
        self._check()
        recording, graph = self._recording, self._recording.graph
        self._kept = (
            recording.step,
            recording.current,
            recording.states,
            recording.bound,
            graph.writes,
            graph.saves,
            graph.passed,
            graph.stops,
            recording.no_values,
        )
        if self._single:
            recording.step = self._steps[0]
            return recording.step
        self._start = recording.loop = len(graph.nodes)
        recording.looped = True
        recording.step = self._steps[0] if self._steps else 0
        recording.around = recording.current
        recording.current, recording.states, recording.bound = {}, {}, {}
        graph.writes, graph.saves, graph.passed = {}, [], {}
        graph.stops = []
        recording.no_values = (
            "this block is recorded once for several steps; `for step in tracer.iter[…]` "
            "records each by itself"
        )
        return Handle(recording, graph.append(CALL, STEP, (), None, recording.invoke))

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        recording, graph = self._recording, self._recording.graph
        if self._single:
            recording.step = self._kept[0]
            return
        first = self._steps[0] if self._steps else 0
        template = Template.of(recording, self._start, first)
        for node, series in graph.saves:
            assert isinstance(series, Series)
            template.saves.append((node, series))
        del graph.nodes[self._start :]
        recording.step, recording.current, recording.states, recording.bound, *others = self._kept
        graph.writes, graph.saves, graph.passed, graph.stops, recording.no_values = others
        recording.loop, recording.around, self._kept = None, {}, ()
        recording.decided = None  # a condition of the loop is none of what comes behind it
        for step in self._steps if kind is None else ():
            template.place(recording, step)
