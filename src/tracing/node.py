"""Owns `Node`, the closed set of node kinds, and `HookPoint`, the name of a place in a forward.

A node is data: what to do with which earlier nodes, and the user's line that asked for it. It is
never changed once recorded and holds no value; values live in a run.
"""

from __future__ import annotations

import os
import sys
import zlib
from types import FrameType
from typing import Any, NamedTuple

import torch

from .errors import Location, NotRunError

#: The value that arrives at a hook point. `target` is a HookPoint.
READ = "read"
#: An operation on earlier values. `target` is an Operation.
CALL = "call"
#: A module of the model applied at this point. `target` is its path.
MODULE = "module"
#: A parameter or buffer of the model. `target` is its path.
PARAMETER = "parameter"
#: The value of its one argument replaces what is at a hook point. `target` is a HookPoint.
WRITE = "write"

# What the names of functions hold that draw random numbers, or may.
_DRAWS = "apply rand normal uniform dropout bernoulli multinomial exponential poisson".split()

KINDS = frozenset({READ, CALL, MODULE, PARAMETER, WRITE})

_SRC = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
IN_PACKAGE = tuple(room.path + os.sep for room in os.scandir(_SRC) if room.is_dir())
TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
# Frames of these folders are never the user's: a module called on a proxy records from inside torch.
_NOT_THE_USER = (*IN_PACKAGE, TORCH)
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
    """The gradient of the value of a node, in one backward pass. A place like a HookPoint.

    Attributes:
        path: the node in the user's terms.
        node: whose gradient it is.
        backward: which `backward()` of the block, from 0.
    """

    path: str
    node: Node
    backward: int
    port: str = "grad"
    step: int = 0
    call: int = 0

    def __str__(self) -> str:
        return f"{self.path}.grad"


class Captured:
    """A tensor from outside the block, with the version it had when it was recorded.

    Attributes:
        content: a checksum of its numbers, where the version does not tell whether they were changed.
    """

    __slots__ = ("content", "name", "tensor", "version")

    def __init__(self, tensor: torch.Tensor, name: str, content: int | None = None) -> None:
        self.tensor = tensor
        self.name = name
        self.content = content
        # Inference tensors have no version counter; they cannot be changed outside inference mode.
        # Parameters change on purpose: an optimizer's step lies between two runs of an experiment.
        changes = tensor.is_inference() or isinstance(tensor, torch.nn.Parameter)
        self.version = None if changes else tensor._version

    def is_changed(self) -> bool:
        """True if it was changed in place since it was recorded."""
        if self.version is not None and self.tensor._version != self.version:
            return True
        return self.content is not None and checksum(self.tensor) != self.content

    def __repr__(self) -> str:
        return f"{self.name}{list(self.tensor.shape)}"


#: Bytes up to which memory that others write to is copied where it is captured, rather than watched.
_COPIED = 1 << 16
#: Bytes up to which all numbers of it are watched; of larger ones, a sample.
_WATCHED = 1 << 24
_SAMPLE = 1 << 16


def is_lent(tensor: torch.Tensor) -> bool:
    """True if others may write to its memory unseen by torch, as numpy does to what it shares: such
    memory cannot be resized."""
    if type(tensor) is not torch.Tensor or not tensor.is_cpu or tensor.layout != torch.strided:
        return False
    return not tensor.untyped_storage().resizable() and tensor.numel() > 0


def checksum(tensor: torch.Tensor) -> int:
    """A number that tells whether the numbers of a tensor [any shape] have changed."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() * flat.element_size() > _WATCHED:
        flat = flat[:: flat.numel() // _SAMPLE]
    return zlib.crc32(flat.contiguous().view(torch.uint8).numpy().data)


def captured(tensor: torch.Tensor, name: str) -> Captured:
    """What a node holds for a tensor from outside: its numbers at this line, or a watch on them."""
    if not is_lent(tensor):
        return Captured(tensor, name)
    if not tensor.requires_grad and tensor.numel() * tensor.element_size() <= _COPIED:
        return Captured(tensor.clone(), name)
    return Captured(tensor, name, checksum(tensor))


class Later:
    """A value of an earlier block of a session, in a later one.

    Attributes:
        source: the recording of the earlier block.
        node: the node there.
        box: where that block's run delivers the value.
        found: the value, if it was asked for before that run.
        ready: it was.
    """

    __slots__ = ("box", "found", "node", "ready", "source")

    def __init__(self, source: Any, node: Node, box: Any) -> None:
        self.source = source
        self.node = node
        self.box = box
        self.found: Any = None
        self.ready = False

    def value(self) -> Any:
        """Raises NotRunError after the last use."""
        if self.box.full:
            return self.box.value
        if self.box.error is not None:
            raise self.box.error
        if not self.ready:
            raise NotRunError.freed(self.node.describe(), self.node.location)
        return self.found

    def drop(self) -> None:
        self.box.value = self.found = self.source = None
        self.box.full = self.ready = False

    def __repr__(self) -> str:
        return f"{self.node!r} of an earlier block"


class Node:
    """One recorded operation.

    Attributes:
        index: position in the graph; arguments always have smaller ones.
        invoke: the invoke it was recorded in.
        args, kwargs: literals, `Captured` tensors and other nodes, nested in plain containers.
        file, line: the user's line.
        used: the nodes among its arguments, once they were asked for; see `graph.arguments`.
    """

    __slots__ = ("args", "file", "index", "invoke", "kind", "kwargs", "line", "target", "used")

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
        self.used: tuple[Node, ...] | None = None

    @property
    def guarded(self) -> Node:
        """What a guarded node does where its condition holds."""
        _, _, kind, target, *args = self.args
        return Node(
            self.index, kind, target, tuple(args), self.kwargs, self.invoke, self.file, self.line
        )

    @property
    def draws(self) -> bool:
        """It may draw random numbers, so that it is not the same when it runs again."""
        name = getattr(self.target, "name", "")
        return any(word in name for word in _DRAWS)

    @property
    def location(self) -> Location:
        return Location(self.file, self.line)

    def describe(self) -> str:
        """What the node stands for, in the user's terms."""
        if self.kind == READ or self.kind == WRITE:
            return f"`{self.target}`"
        if self.kind == CALL:
            target, args = self.target, self.args
            if target.name == "guarded":
                target, args = args[3], args[4:]
            if isinstance(target, str):
                return f"`{target}`"
            return args[0].describe() if target.name == "kept" else f"the result of `{target.name}`"
        return f"`{self.target}`"

    def __repr__(self) -> str:
        return f"%{self.index}"


def grad_point(node: Node, backward: int) -> GradPoint:
    """The place of the gradient of `node`."""
    return GradPoint(node.describe().strip("`"), node, backward)
