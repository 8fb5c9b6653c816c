"""Owns which values are one tensor, as told at the line of a `save`, before there is any.

An operation tells it by its name or by its arguments; a module of torch by its class; the places of
other modules are asked of the schedule, once for each model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from ..tracing.graph import arguments
from ..tracing.node import (
    CALL,
    MODULE,
    PARAMETER,
    READ,
    WRITE,
    Captured,
    GradPoint,
    HookPoint,
    Node,
)
from ..tracing.operations import (
    AGAIN,
    APPLY,
    ELEMENT,
    GETITEM,
    GUARDED,
    ITEM,
    KEPT,
    PUT,
    SELECT,
    SETITEM,
    TAKE,
    Operation,
)

#: Modules of torch that give several tensors, what they are given, or nothing.
_OTHERS = (torch.nn.RNNBase, torch.nn.RNNCellBase, torch.nn.MultiheadAttention, torch.nn.Identity)
#: What shows or changes its first argument, so that it is what that one is.
_AS_FIRST = frozenset({GETITEM, TAKE, ITEM, SETITEM, KEPT, PUT})


def gives_tensor(module: torch.nn.Module) -> bool:
    """True for a module whose class tells that it gives one tensor."""
    kind = type(module)
    return (
        kind.__module__.startswith("torch.nn.modules.")
        and not module._modules
        and not isinstance(module, _OTHERS)
        and not getattr(module, "return_indices", False)
    )


class Tensors:
    """Which values of one block are one tensor.

    Args:
        module: the module at a path.
        remembered: what is known of the model's places already, by `kind`, path and port.
        kind: options of the block that change what modules return.
        fake: a value without numbers of a node; may raise.
    """

    __slots__ = ("_fake", "_kind", "_module", "_nodes", "_places", "_remembered")

    def __init__(
        self,
        module: Callable[[str], torch.nn.Module],
        remembered: dict[Hashable, bool],
        kind: Hashable,
        fake: Callable[[Node], Any],
    ) -> None:
        self._module = module
        self._remembered = remembered
        self._kind = kind
        self._fake = fake
        # By node: numbers are given anew where a loop ends.
        self._nodes: dict[Node, bool] = {}
        self._places: dict[tuple[str, str], bool] = {}

    def holds(self, node: Node) -> bool:
        """True if the value of `node` is known to be one tensor."""
        if node.kind == READ:
            return self._at(node)
        found = self._nodes.get(node)
        if found is None:
            chain = [
                node
            ]  # not recursive: a loop of the user's makes a chain of thousands of nodes
            while True:
                last = chain[-1]
                first = _first(last)
                if first is None or first in self._nodes or first.kind == READ:
                    break
                chain.append(first)
            for one in reversed(chain):
                found = self._nodes[one] = self._computed(one)
        assert found is not None
        return found

    def _computed(self, node: Node) -> bool:
        if node.kind == PARAMETER:
            return True
        if node.kind == MODULE:
            return gives_tensor(self._module(node.target)) or self._ask(node)
        if node.kind == WRITE:
            return self.holds(node.args[0])
        target, args = node.target, node.args
        if target is GUARDED:
            return self._computed(node.guarded)
        if target is SELECT:
            return all(self._is(one) for one in args[2:])
        if target is AGAIN:
            return self._is(args[1])
        if target in _AS_FIRST:
            return self._is(args[0]) or (target not in (KEPT, PUT) and self._ask(node))
        if target is ELEMENT and args[1] == 0:
            return True  # a block's hidden states
        if target is APPLY:
            return False  # a function of the user's is not called to see what it gives
        assert isinstance(target, Operation)
        if target.mixes:
            return any(self._is(one) for one in args) or self._ask(node)
        if target.tensor and args and self._is(args[0]):
            return True
        return self._ask(node)

    def _is(self, argument: Any) -> bool:
        if type(argument) is Node:
            return self.holds(argument)
        return isinstance(argument, (Captured, torch.Tensor))

    def _at(self, read: Node) -> bool:
        point: HookPoint | GradPoint = read.target
        if type(point) is GradPoint:
            return True
        assert type(point) is HookPoint
        place = (point.path, point.port)
        found = self._places.get(place)
        if found is None:
            found = self._places[place] = self._of_model(read, point)
        return found

    def _of_model(self, read: Node, point: HookPoint) -> bool:
        module = self._module(point.path)
        # With the class: the module at a path may have been replaced since.
        own = () if point.port == "result" else (type(module),)
        key = (self._kind, point.path, point.port, *own)
        found = self._remembered.get(key)
        if found is None:
            found = point.port == "output" and gives_tensor(module)
            # The same in every step; a later one would have to be measured by itself.
            at = point._replace(step=0)
            first = Node(-1, READ, at, (), {}, read.invoke, read.file, read.line)
            found = self._remembered[key] = found or self._ask(first)
        return found

    def _ask(self, node: Node) -> bool:
        if _uses_function(node):
            return False
        try:
            return isinstance(self._fake(node), torch.Tensor)
        except Exception:  # whatever keeps it from being told; the run says what is wrong
            return False


def _first(node: Node) -> Node | None:
    """The argument that tells what the value of `node` is, if it is one."""
    args = node.guarded.args if node.target is GUARDED else node.args
    return args[0] if args and type(args[0]) is Node else None


def _uses_function(node: Node) -> bool:
    """True if a function of the user's has to be called for the value of `node`."""
    seen, stack = {node}, [node]
    while stack:
        one = stack.pop()
        if one.kind == CALL and (
            one.target is APPLY or (one.target is GUARDED and APPLY in one.args)
        ):
            return True
        for argument in arguments(one):
            if argument not in seen:
                seen.add(argument)
                stack.append(argument)
    return False
