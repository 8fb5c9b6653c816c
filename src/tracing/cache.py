"""Owns `Cache`: the values of many modules of one prompt, kept without naming each.

It records when its invoke ends, so that it holds what is there after all edits. Nothing of it is
special to planner or run: each value is a read, copied to where the user wants it as it arrives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .errors import BlockError, StepError, near
from .node import CALL, READ, HookPoint
from .operations import Operation
from .proxy import Handle, Proxy
from .recording import OPEN, Recording
from .steps import Steps
from .structure import ATOMS, map_leaves


def _cached(value: Any, device: Any, dtype: Any) -> Any:
    def copy(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            kind = dtype if leaf.is_floating_point() else None
            return leaf.detach().to(device or leaf.device, kind or leaf.dtype, copy=True)
        return leaf if type(leaf) in ATOMS else None  # no caches: they grow with every step

    return map_leaves(copy, value)


CACHED = Operation("cached", _cached, fresh=True)


class Cache:
    """What the modules of one prompt return: `cache["transformer.h.0"].output`.

    In a generation each value is a list, one for each step that came. `cache.transformer.h[0]` is
    `cache["transformer.h.0"]`.
    """

    def __init__(
        self, recording: Recording, paths: Sequence[str], device: Any, dtype: Any, inputs: bool
    ) -> None:
        self._recording = recording
        self._paths = list(paths)
        self._options = (device, dtype)
        self._ports = ("output", "inputs") if inputs else ("output",)
        self._values: dict[tuple[str, str], Proxy] = {}
        self._stepped = False

    def record(self, steps: Steps | None) -> None:
        """Record the reads, for each of the steps of a generation."""
        if steps is None:
            self._record()
            return
        self._stepped = True
        with steps:
            self._record()

    def _record(self) -> None:
        recording = self._recording
        graph, invoke = recording.graph, recording.invoke
        for path in self._paths:
            for port in self._ports:
                place = (invoke, HookPoint(path, port, recording.step))
                known = recording.current.get(place)
                if known is None:
                    node = graph.append(READ, place[1], (), None, invoke)
                    known = recording.current[place] = Handle(recording, node, place)
                args = (known._node, *self._options)
                node = graph.append(CALL, CACHED, args, None, invoke)
                self._values[path, port] = Handle(recording, node).save()

    def _value(self, path: str, port: str) -> Any:
        if not self._values:
            raise BlockError("a cache has its values when its block has run.")
        return self._values[path, port].value

    def keys(self) -> list[str]:
        """The paths of the modules that ran."""
        return [path for path in self._paths if self._has(path)]

    def _has(self, path: str) -> bool:
        try:
            value = self._value(path, "output")
        except StepError:
            return False  # a module that this forward does not call
        return not (self._stepped and not value)

    def __getitem__(self, path: str) -> Entry:
        if path not in self._paths:
            raise KeyError(f"`{path}` is not in the cache. {near(path, self._paths)}")
        return Entry(self, path)

    def __contains__(self, path: object) -> bool:
        return path in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __getattr__(self, name: str) -> Entry:
        return getattr(Entry(self, ""), name)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        if self._recording.state is OPEN:
            return f"<cache of {len(self._paths)} modules, not run>"
        return f"<cache of {len(self)} modules>"


class Entry:
    """One module of a cache, or the way to it."""

    __slots__ = ("_cache", "_path")

    def __init__(self, cache: Cache, path: str) -> None:
        self._cache = cache
        self._path = path

    @property
    def output(self) -> Any:
        """What the module returned."""
        return self._cache._value(self._path, "output")

    @property
    def inputs(self) -> Any:
        """`(args, kwargs)`, with `include_inputs=True`."""
        if "inputs" not in self._cache._ports:
            raise BlockError("this cache has no inputs: write `tracer.cache(include_inputs=True)`.")
        return self._cache._value(self._path, "inputs")

    def __getattr__(self, name: str) -> Entry:
        if name.startswith("__"):
            raise AttributeError(name)
        path = f"{self._path}.{name}" if self._path else name
        if not any(known == path or known.startswith(f"{path}.") for known in self._cache._paths):
            raise AttributeError(f"`{path}` is not in the cache. {near(path, self._cache._paths)}")
        return Entry(self._cache, path)

    def __getitem__(self, index: int) -> Entry:
        return getattr(self, str(index))  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"<`{self._path}` in {self._cache!r}>"
