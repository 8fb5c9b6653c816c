"""Owns what users touch of inner operations: `module.source`, `module.functions` and their parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from ..tracing.errors import OperationError, SourceError


class Listing(Protocol):
    """The operations of one function."""

    @property
    def names(self) -> list[str]: ...

    def find(self, name: str) -> str | None: ...


class Place(Protocol):
    """A place with ports, as a module is."""

    output: Any
    input: Any
    inputs: Any

    def skip(self, value: Any) -> None: ...


class Owner(Protocol):
    """The module that the operations are in."""

    def _listing(self, prefix: str) -> Listing:
        """The operations under a prefix of ports, such as "source"."""

    @property
    def path(self) -> str: ...

    def _operation(self, prefix: str, call: int) -> Place:
        """The place of one of them."""


class SourceEnvoy:
    """The operations inside a function of the model, by name: `module.source.softmax_0`.

    Printed, it shows the text with the names beside it.
    """

    __slots__ = ("_owner", "_prefix")

    def __init__(self, owner: Any, prefix: str) -> None:
        self._owner: Owner = owner
        self._prefix = prefix

    def __getattr__(self, name: str) -> OperationEnvoy:
        if name.startswith("__"):
            raise AttributeError(name)
        listing = self._owner._listing(self._prefix)
        found = listing.find(name)
        if found is None:
            raise SourceError.operation(str(listing).split("\n", 1)[0], name, listing.names)
        return OperationEnvoy(self._owner, f"{self._prefix}.{found}")

    def __iter__(self) -> Iterator[OperationEnvoy]:
        names = self._owner._listing(self._prefix).names
        return (OperationEnvoy(self._owner, f"{self._prefix}.{name}") for name in names)

    def __len__(self) -> int:
        return len(self._owner._listing(self._prefix).names)

    def __bool__(self) -> bool:
        return True

    def __dir__(self) -> list[str]:
        return self._owner._listing(self._prefix).names

    def __repr__(self) -> str:
        return str(self._owner._listing(self._prefix))


class OperationEnvoy:
    """An operation inside a function; it is read and edited as a module is."""

    __slots__ = ("_call", "_owner", "_prefix")
    _call: int
    _owner: Owner
    _prefix: str

    def __init__(self, owner: Any, prefix: str, call: int = 0) -> None:
        object.__setattr__(self, "_owner", owner)
        object.__setattr__(self, "_prefix", prefix)
        object.__setattr__(self, "_call", call)

    def _place(self) -> Place:
        return self._owner._operation(self._prefix, self._call)

    @property
    def name(self) -> str:
        return self._prefix.rpartition(".")[2]

    @property
    def output(self) -> Any:
        """What the operation gives."""
        return self._place().output

    @output.setter
    def output(self, value: Any) -> None:
        self._place().output = value

    @property
    def inputs(self) -> Any:
        """What it is called with: `(args, kwargs)`; without the object of a method."""
        return self._place().inputs

    @inputs.setter
    def inputs(self, value: Any) -> None:
        self._place().inputs = value

    @property
    def input(self) -> Any:
        """The first positional argument, or else the first keyword argument."""
        return self._place().input

    @input.setter
    def input(self, value: Any) -> None:
        self._place().input = value

    def skip(self, value: Any) -> None:
        """Leave the operation out: `value` is its result."""
        self._place().skip(value)

    @property
    def source(self) -> SourceEnvoy:
        """The operations inside the function that is called here."""
        return SourceEnvoy(self._owner, f"{self._prefix}.source")

    @property
    def calls(self) -> OperationCalls:
        """The times that it runs in one forward, as in a loop: `.calls[1].output`."""
        return OperationCalls(self._owner, self._prefix)

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            object.__setattr__(self, name, value)
        except AttributeError:
            raise OperationError(
                f"`{name}` of `{self._prefix}` cannot be assigned: write `.output`, `.input` or "
                "`.inputs` of it inside a block."
            ) from None

    def __repr__(self) -> str:
        return f"<operation {self._prefix} of {self._owner.path or 'the model'}>"


class OperationCalls:
    """`operation.calls[i]`: the operation as it runs for the ith time in one forward."""

    __slots__ = ("_owner", "_prefix")

    def __init__(self, owner: Any, prefix: str) -> None:
        self._owner = owner
        self._prefix = prefix

    def __getitem__(self, call: int) -> OperationEnvoy:
        if call < 0:
            raise OperationError("calls are counted from 0; how many there will be is not known")
        return OperationEnvoy(self._owner, self._prefix, call)
