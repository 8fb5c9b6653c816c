"""Owns the states of places: what is computed beside the value at a place, with the changes to it.

A computed name (see envoy/derived.py) is a part of a state. A state is a view of what is at its place,
but cannot be read off it again once it was changed: so a block has one for each place and name, which
loops, edits and branches go on from as they go on from the value at the place itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .errors import OperationError, WireError
from .node import HookPoint, Node
from .operations import AGAIN, PUT, Operation
from .proxy import Handle, Proxy, current_node, record, root_of
from .recording import Recording
from .structure import leaves, map_leaves

Spot = tuple[int, HookPoint]


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """Which state it is.

    Attributes:
        spot: the place that it is a view of.
        operation: computes it.
        name: tells apart several of one kind at one place.
    """

    spot: Spot
    operation: Operation
    name: str


@dataclasses.dataclass(slots=True, eq=False)
class State:
    """A state as it is now.

    Attributes:
        of: what is at the other places that it was computed from.
        first: computed it.
        at: what was at its own place then.
        bound: its place had been assigned anew before, in the same recording.
        proxy: stands for it.
    """

    of: tuple[Node, ...]
    first: Node
    at: Node
    bound: bool
    proxy: Proxy

    @property
    def is_changed(self) -> bool:
        return _unchanged(self.proxy._node) is not self.first


@dataclasses.dataclass(slots=True)
class Kept:
    """A state of a template: what it was, and what it became if it was changed."""

    key: Key
    of: tuple[Node, ...]
    first: Node
    at: Node
    bound: bool
    last: Node | None

    def written(self) -> dict[str, Any]:
        """It as plain data, beside the nodes."""
        owner, point = self.key.spot
        nodes = {"first": self.first.index, "at": self.at.index}
        nodes["last"] = -1 if self.last is None else self.last.index
        of = [node.index for node in self.of]
        return {
            "place": [owner, *point],
            "name": self.key.name,
            "bound": self.bound,
            "of": of,
            **nodes,
        }

    @classmethod
    def read(cls, written: dict[str, Any], nodes: list[Node]) -> Kept:
        """What `written` gave, which may come from anyone.

        Raises:
            WireError: it does not fit the nodes.
        """
        try:
            owner, *point = written["place"]
            first, at = nodes[written["first"]], nodes[written["at"]]
            last = None if written["last"] == -1 else nodes[written["last"]]
            of = tuple(nodes[index] for index in written["of"])
            key = Key((owner, HookPoint(*point)), first.target, str(written["name"]))
            kept = cls(key, of, first, at, bool(written["bound"]), last)
            if owner != 0 or kept.views()[-1][0] is not key.operation:
                raise ValueError("no state of a place")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            reason = f"what is computed beside a place: {error}"
            raise WireError.content("The edits", reason) from error
        return kept

    def views(self) -> list[tuple[Any, Any, Any]]:
        """The way from what is at the place to the state: operations with what else they take."""
        found, node = list[tuple[Any, Any, Any]](), self.first
        while node is not self.at:
            found.append((node.target, node.args[1:], node.kwargs))
            node = node.args[0]
        return found[::-1]


def _unchanged(node: Node) -> Node:
    """What a state was before it followed its place, or got a part of its own back."""
    while True:
        args = node.args
        if node.target is AGAIN:
            node = args[1]
        elif node.target is PUT and args[1].target is args[2] and args[1].args[0] is args[0]:
            node = args[0]
        else:
            return node


def state_of(
    operation: Operation,
    whole: Proxy,
    args: tuple[Any, ...],
    name: str,
    made_of: tuple[Any, ...],
) -> Proxy:
    """The state `operation(whole, *args)` of the place that `whole` is a view of, recorded once.

    Args:
        name: tells apart several of one kind at one place.
        made_of: what `args` are computed from.

    Raises:
        OperationError: it was changed, and then what it is computed from.
    """
    recording, root = whole._recording, root_of(whole)
    if root._place is None or recording.current.get(root._place) is not root:
        found: Proxy = record(recording, operation, (whole, *args), {})
        return found
    roots = [root_of(leaf) for leaf in leaves((*args, *made_of)) if isinstance(leaf, Proxy)]
    of = tuple(one._node for one in roots if one._place is not None)
    place, key = root._place, Key(root._place, operation, name)
    state: State | None = recording.states.get(key)
    if state is not None and root_of(state.proxy) is root:
        if _same(state.of, of):
            return state.proxy
        _check(state, of)
    proxy: Proxy = record(recording, operation, (whole, *args), {})
    bound = place in recording.bound
    recording.states[key] = State(of, proxy._node, root._node, bound, proxy)
    return proxy


def _same(one: tuple[Node, ...], other: tuple[Node, ...]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _check(state: State, of: tuple[Node, ...]) -> None:
    """Refuse to compute anew what was changed."""
    if state.is_changed:
        new = next(node for node in of if all(node is not one for one in state.of))
        last = state.proxy._node
        raise OperationError.computed_anew(last.location, new.describe(), new.location)


def _set(proxy: Proxy, node: Node) -> None:
    assert proxy._parent is not None
    proxy._node, proxy._seen = node, current_node(proxy._parent)


# -------------------------------------------------------------------- templates


def keep(recording: Recording) -> list[Kept]:
    """The states of a recording, as they go with what is at their places in the end."""
    found = []
    for key, state in recording.states.items():
        if recording.current.get(key.spot) is root_of(state.proxy):
            last = current_node(state.proxy) if state.is_changed else None
            found.append(Kept(key, state.of, state.first, state.at, state.bound, last))
    return found


def go_on(recording: Recording, key: Key, kept: Kept, of: tuple[Node, ...], node: Node) -> Node:
    """What a template's state begins with, where it is placed: the state that is there already, else
    `node`, which computes it.

    Args:
        of: what it is computed from, there.
    """
    found = recording.states.get(key)
    root = recording.current.get(key.spot)
    if kept.bound or found is None or root_of(found.proxy) is not root:
        return node
    if not _same(found.of, of):
        _check(found, of)
        return node
    before = current_node(found.proxy)
    again = (node.args[0], before, node.target, node.args[1:], node.kwargs)
    node.target, node.args, node.kwargs, node.used = AGAIN, again, {}, None
    return node


def carry(
    recording: Recording, key: Key, kept: Kept, of: tuple[Node, ...], values: dict[int, Any]
) -> None:
    """The state of a template becomes that of the recording in which it was placed, after what is
    written at its place."""

    def swap(leaf: Any) -> Any:
        return values.get(leaf.index, leaf) if type(leaf) is Node else leaf

    root = recording.current[key.spot]
    found, last = recording.states.get(key), swap(kept.last)
    if (
        found is not None
        and root_of(found.proxy) is root
        and not kept.bound
        and _same(found.of, of)
    ):
        _set(found.proxy, last)
        return
    proxy: Proxy = root
    for operation, args, options in kept.views():
        view = (operation, map_leaves(swap, args), map_leaves(swap, options))
        proxy = Handle(recording, last, None, proxy, view)
    _set(proxy, last)
    first, at = swap(kept.first), swap(kept.at)
    if first.target is AGAIN and found is not None:
        first, at = found.first, found.at
    recording.states[key] = State(of, first, at, False, proxy)
