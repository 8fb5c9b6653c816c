"""Owns `Node`, the closed set of node kinds, and the names of places: `HookPoint` in a forward,
`GradPoint` in a backward.

A node is data: what to do with which earlier nodes, and the user's line that asked for it. It is
never changed once recorded and holds no value; values live in a run.
"""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any, NamedTuple

import torch

from .errors import Location

#: The value that arrives at a place. `target` is a HookPoint or a GradPoint.
READ = "read"
#: An operation on earlier values. `target` is an Operation.
CALL = "call"
#: A module of the model applied at this point. `target` is its path.
MODULE = "module"
#: A parameter or buffer of the model. `target` is its path.
PARAMETER = "parameter"
#: The value of its one argument replaces what is at a place. `target` is a HookPoint or a GradPoint.
WRITE = "write"
#: Gradients flow back from its first argument. `target` is a Backward.
BACKWARD = "backward"

KINDS = frozenset({READ, CALL, MODULE, PARAMETER, WRITE, BACKWARD})

_SRC = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Frames of these folders are never the user's: a module called on a proxy records from inside torch.
_NOT_THE_USER = (
    *(os.path.join(_SRC, room) + os.sep for room in ("tracing", "envoy", "intervention", "models")),
    os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,
)
_EINOPS = os.sep + os.path.join("site-packages", "einops") + os.sep


# Asked for every node, so remembered by file name.
_ours: dict[str, bool] = {}


def _is_ours(file: str) -> bool:
    ours = _ours[file] = file.startswith(_NOT_THE_USER) or _EINOPS in file
    return ours


def user_frame(depth: int) -> FrameType:
    """The nearest frame that is neither ours nor torch's, from `depth` frames above the caller.

    One frame walk, no stack capture: capturing stacks was two thirds of the recording cost of an
    earlier library of this field.
    """
    first = sys._getframe(depth)
    frame: FrameType | None = first
    while frame is not None:
        file = frame.f_code.co_filename
        ours = _ours.get(file)
        if ours is False or (ours is None and not _is_ours(file)):
            return frame
        frame = frame.f_back
    return first


def user_line(depth: int = 1) -> Location:
    """File and line of `user_frame`."""
    frame = user_frame(depth + 1)
    return Location(frame.f_code.co_filename, frame.f_lineno)


class HookPoint(NamedTuple):
    """A place in a run: the `port` of the module at `path`, in forward `step`, at its nth `call`.

    Attributes:
        path: dotted path of the module in the tree; "" is the root.
        port: "output" or "inputs" of the module, or "result", what the entry point returns.
        step: which forward of the root module, from 0; in generation, one per generated token.
        call: which call of this module inside that step, from 0.
    """

    path: str
    port: str
    step: int = 0
    call: int = 0

    def __str__(self) -> str:
        name = f"{self.path}.{self.port}" if self.path else self.port
        if self.call:
            name += f" (call {self.call})"
        return name + (f" at step {self.step}" if self.step else "")


class GradPoint(NamedTuple):
    """The gradient of a tensor in one backward: a place that is read and written as a hook point is.

    Attributes:
        path: what the tensor is called.
        node: whose value the tensor is, or holds it in a structure.
        parts: the way into that structure: operations with their further arguments.
        backward: number of the backward in its graph; one beyond the last stands for the last.
        port, step, call: as those of a HookPoint.
    """

    path: str
    node: Node
    parts: tuple[tuple[Any, tuple[Any, ...]], ...]
    backward: int
    port: str = "grad"
    step: int = 0
    call: int = 0

    def __str__(self) -> str:
        return f"{self.path}.grad"

    def tensor(self, value: Any) -> Any:
        """The tensor in the value of `node`."""
        for operation, args in self.parts:
            value = operation.function(value, *args)
        return value


#: A place that is read and written.
Point = HookPoint | GradPoint


class Backward(NamedTuple):
    """What a BACKWARD node does.

    Attributes:
        name: "backward" adds to the `.grad` of parameters; "grad", as `torch.autograd.grad`, does not.
        inputs: the gradients that are wanted; none for all.
    """

    name: str
    inputs: tuple[GradPoint, ...] = ()


class Captured:
    """A tensor from outside the block, with the version it had when it was recorded."""

    __slots__ = ("name", "tensor", "version")

    def __init__(self, tensor: torch.Tensor, name: str) -> None:
        self.tensor = tensor
        self.name = name
        # Inference tensors have no version counter; they cannot be changed outside inference mode.
        # What is trained changes on purpose: an optimizer's step lies between two runs.
        trained = tensor.requires_grad and tensor.is_leaf
        changes = tensor.is_inference() or trained or isinstance(tensor, torch.nn.Parameter)
        self.version = None if changes else tensor._version

    def __repr__(self) -> str:
        return f"{self.name}{list(self.tensor.shape)}"


class Node:
    """One recorded operation.

    Attributes:
        index: position in the graph; arguments always have smaller ones.
        invoke: the invoke it was recorded in.
        args, kwargs: literals, `Captured` tensors and other nodes, nested in plain containers.
        file, line: the user's line.
    """

    __slots__ = ("args", "file", "index", "invoke", "kind", "kwargs", "line", "target")

    def __init__(
        self,
        index: int,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        invoke: int,
        file: str,
        line: int,
    ) -> None:
        self.index = index
        self.kind = kind
        self.target = target
        self.args = args
        self.kwargs = kwargs
        self.invoke = invoke
        self.file = file
        self.line = line

    @property
    def location(self) -> Location:
        return Location(self.file, self.line)

    def describe(self) -> str:
        """What the node stands for, in the user's terms."""
        if self.kind == READ or self.kind == WRITE:
            return f"`{self.target}`"
        if self.kind == CALL:
            return f"the result of `{self.target.name}`"
        if self.kind == BACKWARD:
            return f"`{self.target.name}`"
        return f"`{self.target}`"

    def __repr__(self) -> str:
        return f"%{self.index}"
