"""Owns that runs on the same modules take turns, also where these have several wrappers: what one run
puts in the place of a block's forward would be run by the other, too.

Wrapped modules that have a module in common form a group, and a run holds the locks of its whole group.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch

T = TypeVar("T")
_Locks = tuple[tuple[int, threading.RLock], ...]


class _Group:
    """Wrapped modules that have modules in common.

    Attributes:
        locks: all that a run takes, in the order in which they were made.
    """

    def __init__(self) -> None:
        self.locks: tuple[tuple[int, threading.RLock], ...] = ((next(_numbers), threading.RLock()),)


class Turn:
    """The lock of a wrapped module, as `threading.RLock` is."""

    def __init__(self) -> None:
        self.group = _Group()
        self._taken: list[tuple[tuple[int, threading.RLock], ...]] = []

    def acquire(self, blocking: bool = True) -> bool:
        while True:
            locks = self.group.locks
            for count, (_, lock) in enumerate(locks):
                if not lock.acquire(blocking=blocking):
                    _release(locks[:count])
                    return False
            if self.group.locks is locks:
                self._taken.append(locks)
                return True
            _release(locks)  # the group grew while this waited

    def release(self) -> None:
        _release(self._taken.pop())

    def during(self, work: Callable[[], T]) -> T:
        """`work()`, with the lock held. A Ctrl-C at any time leaves it released: `with` of a lock of
        Python's own cannot be interrupted before it is entered or after it is left, and that of a
        class can."""
        while True:
            locks = self.group.locks
            found = self._holding(locks, locks, work)
            if found is not None:
                return found[0]

    def _holding(self, locks: _Locks, rest: _Locks, work: Callable[[], T]) -> tuple[T] | None:
        """None if the group grew while this waited."""
        if not rest:
            return (work(),) if self.group.locks is locks else None
        with rest[0][1]:
            return self._holding(locks, rest[1:], work)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()


def _release(locks: tuple[tuple[int, threading.RLock], ...]) -> None:
    for _, lock in reversed(locks):
        lock.release()


_numbers = itertools.count()
_turns: WeakKeyDictionary[torch.nn.Module, Turn] = WeakKeyDictionary()
_registry = threading.Lock()


def turn_of(module: torch.nn.Module, turn: Turn | None = None) -> Turn:
    """The lock that runs on `module` hold.

    Args:
        turn: the one to use if it has none yet: that of the skeleton which it was loaded for.
    """
    with _registry:
        known = _turns.get(module)
        if known is None:
            known = turn or Turn()
            mine = set(module.modules())
            for other, theirs in list(_turns.items()):
                if not mine.isdisjoint(other.modules()):
                    _join(known, theirs)
            _turns[module] = known
        elif turn is not None:
            _join(turn, known)
        return known


def _join(one: Turn, other: Turn) -> None:
    group, joined = one.group, other.group
    if group is joined:
        return
    group.locks = tuple(sorted({*group.locks, *joined.locks}, key=lambda pair: pair[0]))
    for turn in (other, *_turns.values()):
        if turn.group is joined:
            turn.group = group
