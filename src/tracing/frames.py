"""Owns which frames of an error a user sees: their own, and the line that they wrote, not ours.

An operation fails where the graph runs, thirty frames below the `with` that ends the block, while the
line that asked for it has been left long ago. So where the user calls us (the end of a block, a value
on demand, loading), an error that passes is cut: the user's frames stay, one of ours stays, and the
line that recorded the operation is the last one, so that a debugger stands there, too. The cut also
lets go of the values that the dropped frames hold.

`error.full_traceback` has all frames as text. With the environment variable `GRAFTWORK_TRACEBACK=full`
nothing is cut.
"""

from __future__ import annotations

import ast
import functools
import linecache
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, TracebackType
from typing import ParamSpec, TypeVar

from .errors import Location, line_of
from .node import IN_PACKAGE, TORCH

_VARIABLE = "GRAFTWORK_TRACEBACK"
_OURS, _LIBRARY, _USERS = "ours", "library", "user's"
_STDLIB = os.path.dirname(os.path.abspath(os.__file__)) + os.sep
_INSTALLED = (os.sep + "site-packages" + os.sep, os.sep + "dist-packages" + os.sep)
#: Frames that are shown below the one of ours.
_MOST = 3

_kinds: dict[str, str] = {}

P = ParamSpec("P")
R = TypeVar("R")


def entry(function: Callable[P, R]) -> Callable[P, R]:
    """A function that users call, whose errors are cut as this file says."""

    @functools.wraps(function)
    def entered(*args: P.args, **kwargs: P.kwargs) -> R:
        __tracebackhide__ = True
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            shorten(error)
            raise error

    return entered


def shorten(error: BaseException) -> None:
    """Cut the frames of an error that was caught where the user called us; raise it again after."""
    caught = error.__traceback__
    if caught is None:
        return
    below = caught.tb_next  # what raises it again adds its own frame
    if os.environ.get(_VARIABLE) == "full":
        error.__traceback__ = below
        return
    again = hasattr(error, "full_traceback")
    if not again:
        frames = traceback.walk_tb(below)
        error.full_traceback = traceback.StackSummary.extract(frames, lookup_lines=False)  # type: ignore[attr-defined]
    line = line_of(error)
    kept = _users(below)
    if not again:
        kept = _last_of_library(below) if line is None and not kept else kept
        if line is not None:
            kept = _users(_below_ours(below))  # not the model's own, which came by that place
    if line is not None and not any(_is_at(one, line) for one in kept):
        kept.insert(0, _traceback_at(line, caught.tb_frame))
    cut = None
    for one in reversed(kept[:1] + kept[1:][1 - _MOST :]):
        cut = TracebackType(cut, one.tb_frame, one.tb_lasti, one.tb_lineno)
    error.__traceback__ = cut
    if error.__cause__ is not None or error.__context__ is not None:
        _shorten_chain(error, caught.tb_frame)


def _entries(start: TracebackType | None) -> Iterator[TracebackType]:
    while start is not None:
        yield start
        start = start.tb_next


def _users(start: TracebackType | None) -> list[TracebackType]:
    """The entries of the user's own code."""
    return [one for one in _entries(start) if _kind(one.tb_frame) == _USERS]


def _last_of_library(start: TracebackType | None) -> list[TracebackType]:
    """The last entry of a library that is not torch: the line of the model that failed."""
    return [one for one in _entries(start) if _kind(one.tb_frame) == _LIBRARY][-1:]


def _below_ours(start: TracebackType | None) -> TracebackType | None:
    """What the operation that failed has called."""
    for one in _entries(start):
        if one.tb_frame.f_code.co_filename.startswith(IN_PACKAGE):
            start = one.tb_next
    return start


def _kind(frame: FrameType) -> str:
    file = frame.f_code.co_filename
    kind = _kinds.get(file)
    if kind is None:
        if file.startswith(IN_PACKAGE) or file.startswith((TORCH, "<frozen ")):
            kind = _OURS
        elif any(part in file for part in _INSTALLED):
            kind = _LIBRARY
        else:
            kind = _OURS if file.startswith(_STDLIB) else _USERS
        _kinds[file] = kind
    return kind


def _is_at(one: TracebackType, line: Location) -> bool:
    return (one.tb_frame.f_code.co_filename, one.tb_lineno) == line


def _traceback_at(line: Location, frame: FrameType | None) -> TracebackType:
    """An entry for a line of the user's: in their own frame if that is still there, with its
    variables, else in an empty one."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename == line.file and any(line.line == n for _, _, n in code.co_lines()):
            return TracebackType(None, frame, _instruction(code, line.line), line.line)
        frame = frame.f_back
    empty = _empty_frame(line)
    return TracebackType(None, empty, _instruction(empty.f_code, line.line), line.line)


def _instruction(code: CodeType, line: int) -> int:
    """The offset of the instruction that stands for most of a line: Python underlines what it stands
    for, and no less than the line is known to have failed."""
    positions = getattr(code, "co_positions", None)  # from Python 3.11
    widths = [
        (last - first, 2 * number)
        for number, (start, end, first, last) in enumerate(positions() if positions else ())
        if start == end == line and first is not None and last is not None
    ]
    # An offset that no instruction has would let IPython search for one without end.
    return max(widths, default=(0, 0))[1]


def _empty_frame(line: Location) -> FrameType:
    """A frame that says it is at a line: the one that was there has gone."""
    source = linecache.getline(line.file, line.line).rstrip()
    tree = ast.parse("sys._getframe()", mode="eval")
    for node in ast.walk(tree):
        if isinstance(node, ast.expr):
            node.lineno = node.end_lineno = line.line
            node.col_offset = len(source.encode()) - len(source.lstrip().encode())
            node.end_col_offset = max(len(source.encode()), node.col_offset + 1)
    code = compile(tree, line.file, "eval").replace(co_name="recorded here")
    frame: FrameType = eval(code, {"sys": sys})
    return frame


def _shorten_chain(error: BaseException, frame: FrameType) -> None:
    """Cut what the error came from, up to what the user was handling when they called us."""
    outside = set()
    caller: FrameType | None = frame.f_back
    while caller is not None:
        outside.add(caller)
        caller = caller.f_back
    seen, pending = {id(error)}, [error.__cause__, error.__context__]
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        first = one.__traceback__
        if first is not None and first.tb_frame in outside:
            continue
        kept = _users(first)[-1:]
        one.__traceback__ = kept[0] if kept else None
        pending += [one.__cause__, one.__context__]
