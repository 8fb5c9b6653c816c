"""Owns the evaluation of one node, on real or on fake values, and says whose line an error is of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .errors import CapturedTensorError, LimitError, place_error
from .graph import arguments
from .limits import DEPTH, PARTS, PARTS_OF_RUN
from .node import CALL, MODULE, PARAMETER, WRITE, Captured, Later, Node
from .operations import APPLY, GUARDED, SELECT, SKIPPED, STOP
from .structure import ATOMS, children, leaves, map_leaves


class Interpreter:
    """Evaluates nodes against a table of values.

    Attributes:
        values: value of each node by index.
        call_module: applies the module at a path.
        parameter: the parameter or buffer at a path.

    A captured tensor goes to the device of the first value that it meets.
    """

    __slots__ = ("_checked", "_parts", "call_module", "parameter", "values")

    def __init__(
        self,
        values: Sequence[Any],
        call_module: Callable[..., Any],
        parameter: Callable[[str], Any],
    ) -> None:
        self.values = values
        self.call_module = call_module
        self.parameter = parameter
        self._parts = 0
        self._checked: set[Captured] = set()  # once in a run: their memory has to be read

    def evaluate(self, node: Node) -> Any:
        """The value of `node`, whose arguments have been evaluated.

        Raises:
            CapturedTensorError: a captured tensor was changed since it was recorded.
            Exception: whatever the operation raises, which says the user's line.
        """
        try:
            if node.kind == PARAMETER:
                return self.parameter(node.target)
            if node.target is GUARDED:
                return self.evaluate(node.guarded)
            args, kwargs = self.resolve(node)
            if node.kind == WRITE:
                return args[0]
            if node.kind == MODULE:
                return self.call_module(node.target, *args, **kwargs)
            assert node.kind == CALL
            if node.target is APPLY:
                return _call_unchanged(node, args, kwargs)
            result = node.target.function(*args, **kwargs)
            if type(result) is not torch.Tensor and isinstance(result, (tuple, list, dict)):
                self._count(node, result)
            return result
        except Exception as error:
            # What a function of the user's raises is left as it says it: its own lines are shown.
            place_error(error, node.location, node.describe(), message=node.target is not APPLY)
            raise

    def _count(self, node: Node, value: Any) -> None:
        """Refuse a value of too many parts: what shares parts is small in memory, and grows without
        an end wherever it is walked through."""
        waiting, found, depth = [value], 0, 0
        while waiting:
            depth += 1
            if depth > DEPTH:
                raise LimitError.depth(node.describe().strip("`"), DEPTH)
            inner: list[Any] = []
            for one in waiting:
                parts = children(one)
                found += 1 if parts is None else len(parts)
                inner += [p for p in parts or () if type(p) not in ATOMS]
                if len(inner) > PARTS or found > PARTS:
                    raise LimitError.parts(node.describe().strip("`"), PARTS)
            waiting = [one for one in inner if not isinstance(one, torch.Tensor)]
        self._parts += found
        if self._parts > PARTS_OF_RUN:
            raise LimitError.run(node.describe().strip("`"), PARTS_OF_RUN)

    def resolve(self, node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The values of the arguments of `node`."""
        args = tuple(self._resolve(node, argument) for argument in node.args)
        if not node.kwargs:
            return args, {}
        return args, {key: self._resolve(node, value) for key, value in node.kwargs.items()}

    def _resolve(self, node: Node, argument: Any) -> Any:
        kind = type(argument)
        if kind is Node:
            return self.values[argument.index]
        if kind in ATOMS:
            return argument
        return map_leaves(lambda leaf: self._leaf(node, leaf), argument)

    def _leaf(self, node: Node, leaf: Any) -> Any:
        if type(leaf) is Node:
            return self.values[leaf.index]
        if type(leaf) is Captured:
            return self._captured(node, leaf)
        return self._later(node, leaf) if type(leaf) is Later else leaf

    def _later(self, node: Node, later: Later) -> Any:
        return map_leaves(
            lambda leaf: self._beside(node, leaf) if isinstance(leaf, torch.Tensor) else leaf,
            later.value(),
        )

    def _captured(self, node: Node, captured: Captured) -> torch.Tensor:
        tensor = captured.tensor
        if captured not in self._checked:
            if captured.is_changed():
                raise CapturedTensorError.changed(captured.name, tensor.shape, node.location)
            if captured.content is not None:
                self._checked.add(captured)
        return self._beside(node, tensor)

    def _beside(self, node: Node, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the device of the first value that it meets."""
        for argument in arguments(node):
            for leaf in leaves(self.values[argument.index]):
                if isinstance(leaf, torch.Tensor):
                    return tensor if tensor.device == leaf.device else tensor.to(leaf.device)
        return tensor


class BranchInterpreter(Interpreter):
    """Evaluates the nodes of a graph with branches: of each, what its condition lets run."""

    __slots__ = ()

    def evaluate(self, node: Node) -> Any:
        target = node.target
        if target is GUARDED or target is SELECT:
            taken = self.values[node.args[0].index] is node.args[1]
            if target is SELECT:
                chosen = node.args[2] if taken else node.args[3]
                return SKIPPED if chosen is None else self.values[chosen.index]
            if not taken:
                return SKIPPED
            target = node.args[3]
        if target is not STOP and any(
            self.values[argument.index] is SKIPPED for argument in arguments(node)
        ):
            return SKIPPED
        return super().evaluate(node)


def _versions(values: Any) -> list[tuple[torch.Tensor, int]]:
    return [
        (leaf, leaf._version)
        for leaf in leaves(values)
        if isinstance(leaf, torch.Tensor) and not leaf.is_inference()
    ]


def _call_unchanged(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the user's own function and make sure that it did not write into the model's memory."""
    before = _versions((args[1:], kwargs))
    result = args[0](*args[1:], **kwargs)
    if any(tensor._version != version for tensor, version in before):
        raise CapturedTensorError.mutated(
            f"`{getattr(args[0], '__name__', args[0])}`", node.location
        )
    return result
