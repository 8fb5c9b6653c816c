"""Owns names that hold on every architecture: what a declared place is, and `model.layers[i]`.

An architecture declares, for each name, a `Spot`: a port of a module (or an operation inside its
forward), a part of what is there, and the view that gives it the shape of the name. Reading a name
gives a view of that place, so what is written there reaches the computation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from ..tracing.context import current_tracer
from ..tracing.errors import BlockError, OperationError, UnavailableNameError
from ..tracing.proxy import BlockOutput, Proxy, assign

#: A view of what is at a place, from the value, the sizes of the model, and other names (`Here`).
Layout = Callable[[Any, Any, Any], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Spot:
    """Where a name is.

    Attributes:
        path: module, below the block (or the model, for the model's own names); "" is that itself.
        port: "output", "input" or "inputs"; of an operation inside its forward, with that before it:
            "source.add_0.output". "eager." instead of "source." runs it with eager attention.
        parts: the way from what is there to the tensor: (0,) for the first part of a tuple.
        layout: gives it the shape of the name; None where it has that.
    """

    path: str
    port: str = "output"
    parts: tuple[Any, ...] = ()
    layout: Layout | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Derived:
    """A name whose value is computed from others, and whose change is carried to one of them.

    Attributes:
        read: the value as a view of one place, from a `Here` and the vocabulary of the model.
        needs: the names that it is made of.
    """

    read: Callable[[Any, Any], Any]
    needs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Missing:
    """A name that an architecture does not have, and why."""

    reason: str


Place = Spot | Derived | Missing


class Here:
    """Reads other names of the same layer, in the open invoke: `here("resid_pre")`.

    Attributes:
        root: the model.
        vocabulary: what knows its names.
        layer: -1 for the model's own names.
        prefix: path of the block; for the model's own names, of the model.
    """

    __slots__ = ("layer", "prefix", "root", "vocabulary")

    def __init__(self, root: Any, vocabulary: Any, layer: int) -> None:
        self.root = root
        self.vocabulary = vocabulary
        self.layer = layer
        self.prefix: str = vocabulary.prefix if layer < 0 else vocabulary.layer_path(layer)

    def __call__(self, name: str) -> Any:
        return read_name(self.root, self.vocabulary, self.layer, name)

    def path(self, below: str) -> str:
        """A path below the block, from the root."""
        return f"{self.prefix}.{below}" if self.prefix and below else self.prefix or below


def read_name(root: Any, vocabulary: Any, layer: int, name: str) -> Any:
    """The proxy of a name for the open invoke; `layer` -1 means the model's own names.

    Raises:
        UnavailableNameError: the architecture has no such name.
        BlockError: outside a block.
    """
    places = vocabulary.model_places() if layer < 0 else vocabulary.layer_places(layer)
    place = places.get(name)
    if place is None:
        raise UnavailableNameError.unknown(name, vocabulary.kind, places)
    if isinstance(place, Missing):
        raise UnavailableNameError.missing(_shown(layer, name), vocabulary.kind, place.reason)
    if current_tracer() is None:
        raise BlockError.outside(_shown(layer, name))
    here = Here(root, vocabulary, layer)
    derived = isinstance(place, Derived)
    found = _read_derived(here, place) if derived else read_spot(here, place)
    vocabulary.check(layer, name, found)
    return found


def _read_derived(here: Here, place: Derived) -> Any:
    """In a branch it is read as outside of it: what is behind the branch goes on from it, too."""
    recording = current_tracer().recording  # type: ignore[union-attr]
    graph: Any = recording.graph
    inner = graph
    while graph.guard is not None:
        graph = graph.around
    recording.graph = graph
    try:
        return place.read(here, here.vocabulary)
    finally:
        recording.graph = inner


def read_spot(here: Here, spot: Spot) -> Any:
    """What is at a place of a module, in the shape of its name."""
    path = here.path(spot.path)
    envoy = here.root.get(path) if path else here.root
    operation, dot, port = spot.port.rpartition(".")
    found = getattr(envoy._operation(operation, 0) if dot else envoy, port)
    if isinstance(found, BlockOutput) and not spot.parts:
        found = found[0]
    for part in spot.parts:
        found = found[part] if type(part) is int else getattr(found, part)
    return found if spot.layout is None else spot.layout(found, here.vocabulary.sizes, here)


def write_name(root: Any, vocabulary: Any, layer: int, name: str, value: Any) -> None:
    """Replace what is at a name, for the open invoke."""
    found = read_name(root, vocabulary, layer, name)
    if isinstance(found, Proxy) and value is not found:
        assign(found._recording, found, value)


def _shown(layer: int, name: str) -> str:
    return f"model.{name}" if layer < 0 else f"model.layers[{layer}].{name}"


class Layer:
    """A transformer block under the names that hold on every architecture.

    `layer.resid_pre`, `layer.z`, `layer.pattern` and the others are read and written inside a block;
    `layer["attn.W_Q"]` is a weight; what is no such name is the block's own: `layer.output`,
    `layer.self_attn`. `print(layer.support())` shows which names there are here, and why not others.
    """

    __slots__ = ("_envoy", "_index", "_vocabulary")
    _envoy: Any
    _index: int
    _vocabulary: Any

    def __init__(self, envoy: Any, vocabulary: Any, index: int) -> None:
        object.__setattr__(self, "_envoy", envoy)
        object.__setattr__(self, "_vocabulary", vocabulary)
        object.__setattr__(self, "_index", index)

    @property
    def index(self) -> int:
        return self._index

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self._vocabulary.layer_places(self._index):
            return read_name(self._envoy._root, self._vocabulary, self._index, name)
        try:
            return getattr(self._envoy, name)
        except AttributeError as error:
            known = self._vocabulary.layer_places(self._index)
            raise UnavailableNameError.unknown(name, self._vocabulary.kind, known) from error

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._vocabulary.layer_places(self._index):
            write_name(self._envoy._root, self._vocabulary, self._index, name, value)
        else:
            setattr(self._envoy, name, value)

    def support(self) -> Any:
        """A table of the names: where each is, or why there is none."""
        return self._vocabulary.support(self._index)

    # ---------------------------------------------------------------- weights

    def _weights(self) -> Any:
        return self._vocabulary.layer_weights(self._index)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            module = self._vocabulary.layer_module(self._index, key)
            return self._weights()[key] if module is None else module
        return self._envoy[key]

    def __setitem__(self, key: str, value: Any) -> None:
        """Write a weight for good: a tensor of its shape, or one number, which fills it."""
        self._weights()[key] = value

    def __contains__(self, key: object) -> bool:
        return key in self._weights()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights())

    def __len__(self) -> int:
        return len(self._weights())

    def keys(self) -> Any:
        return self._weights().keys()

    def values(self) -> Any:
        return self._weights().values()

    def items(self) -> Any:
        return self._weights().items()

    def __dir__(self) -> list[str]:
        return sorted({*self._vocabulary.layer_places(self._index), *dir(self._envoy), "support"})

    def __repr__(self) -> str:
        return f"layer {self._index}: {self._envoy!r}"


class Layers:
    """`model.layers`: the blocks of a model in order, under names that hold everywhere."""

    __slots__ = ("_root", "_vocabulary")

    def __init__(self, root: Any, vocabulary: Any) -> None:
        self._root = root
        self._vocabulary = vocabulary

    def __len__(self) -> int:
        return len(self._vocabulary)

    def __getitem__(self, index: Any) -> Any:
        count = len(self)
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(count))]
        if not hasattr(index, "__index__"):
            raise OperationError("`model.layers` is indexed by number: `model.layers[3]`.")
        number = index.__index__()
        if not -count <= number < count:
            raise UnavailableNameError.no_layer(number, count)
        number %= count
        envoy = self._root.get(self._vocabulary.layer_path(number))
        return Layer(envoy, self._vocabulary, number)

    def __iter__(self) -> Iterator[Layer]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"<{len(self)} layers of {self._vocabulary.kind}>"
