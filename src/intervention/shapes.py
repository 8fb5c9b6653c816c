"""Owns the answers that a block gives while it is written: shapes, dtypes, positions of tokens.

It evaluates the recorded nodes on fake tensors; where a model's own values come in, the schedule
says their structure. Nothing here needs weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..tracing.context import Tracer
from ..tracing.errors import InputError, OperationError, ScheduleError
from ..tracing.graph import arguments
from ..tracing.interpreter import Interpreter
from ..tracing.node import READ, Captured, HookPoint, Node
from .rows import UNKNOWN, Opaque, TensorAxes, map_axes
from .schedule import SIZES, Schedule


class Prompt(Protocol):
    """What a model made of the arguments of one invoke.

    Attributes:
        lengths: own tokens of each of its rows; the longest one sets its width. Zeros where the
            model has no tokens.
    """

    lengths: list[int]


class Structure(Protocol):
    """What is known of a model without its weights."""

    def schedule(self) -> Schedule: ...

    def submodule(self, path: str) -> torch.nn.Module: ...

    def meta_parameter(self, path: str) -> torch.Tensor: ...

    def planned_device(self) -> torch.device: ...


class Shapes:
    """The oracle of one block."""

    def __init__(self, tracer: Tracer, structure: Structure) -> None:
        self._tracer = tracer
        self._structure = structure
        self._fakes: Fakes | None = None
        self._trials: list[Fakes] | None = None

    def value(self, node: Node) -> Any:
        """A fake value of `node`. Raises ScheduleError if the model cannot be run fake."""
        if self._fakes is None:
            self._fakes = Fakes(self._structure, self._size)
        return self._fakes.value(node)

    def device(self) -> torch.device:
        return self._structure.planned_device()

    def _lengths(self, node: Node) -> list[int]:
        """Tokens of each row that the invoke of `node` sees."""
        invokes = self._tracer.invokes
        invoke = max(node.invoke, 0)
        prompt = invokes[invoke].prompt if invoke < len(invokes) else None
        prompts = [prompt] if prompt is not None else [i.prompt for i in invokes if i.prompt]
        return [length for p in prompts for length in p.lengths]

    def _size(self, node: Node) -> tuple[int, int]:
        lengths = self._lengths(node)
        hook_point: HookPoint = node.target
        beams = 1
        if self._tracer.generates:
            names = ("num_beams", "num_return_sequences")
            beams = max(int(self._tracer.kwargs.get(name) or 1) for name in names)
        tokens = 1 if hook_point.step else max(lengths, default=0)
        return len(lengths) * beams, tokens

    def token_axis(self, node: Node) -> int:
        """Which axis of the value of `node` counts tokens.

        Raises:
            OperationError: none does, or several do.
        """
        if self._trials is None:
            self._trials = [
                Fakes(self._structure, lambda node, n=n: (self._size(node)[0], n))  # type: ignore[misc]
                for _, n in SIZES
            ]
        try:
            first, second = (trial.value(node) for trial in self._trials)
        except ScheduleError:
            raise
        except Exception:
            # A captured tensor fits this prompt's own length alone: find that length instead.
            return self._axis_of_length(node)
        if isinstance(first, torch.Tensor) and first.ndim == second.ndim:
            sizes = zip(first.shape, second.shape, strict=True)
            found = [i for i, (a, b) in enumerate(sizes) if a != b]
            if found:
                return found[0]
        raise OperationError(f"`.t`: {node.describe()} has no axis that counts tokens.")

    def _axis_of_length(self, node: Node) -> int:
        value = self.value(node)
        tokens = max(self._lengths(node), default=0)
        if isinstance(value, torch.Tensor):
            found = [i for i, size in enumerate(value.shape) if size == tokens]
            if len(found) == 1:
                return found[0]
        raise OperationError(
            f"`.t`: which axis of {node.describe()} counts tokens cannot be told; index that axis."
        )

    def token_index(self, node: Node, key: Any) -> Any:
        """The index that takes `key` of each row's own tokens out of the value of `node`.

        Raises:
            InputError: a prompt has no such token.
            OperationError: rows of different lengths would give different numbers of tokens.
        """
        axis = self.token_axis(node)
        hook_point = _origin(node)
        lengths = self._lengths(node)
        if hook_point is not None and hook_point.step:
            lengths = [1] * len(lengths)
        if type(key) is int:
            for length in lengths:
                if not -length <= key < length:
                    raise InputError(f"`.t[{key}]`: the prompt has {length} tokens.")
        width = max(lengths, default=0)
        if all(length == width for length in lengths) or not isinstance(key, (int, slice)):
            return (*(slice(None),) * axis, key)
        if axis != 1:
            raise OperationError("`.t` on prompts of different lengths needs [batch, token, …].")
        starts = [width - length for length in lengths]
        rows = list(range(len(lengths)))
        if isinstance(key, int):
            pairs = zip(starts, lengths, strict=True)
            return rows, [start + key % length for start, length in pairs]
        taken = [list(range(*key.indices(length))) for length in lengths]
        if len({len(t) for t in taken}) > 1:
            raise OperationError(
                f"`.t[{key}]` takes {sorted({len(t) for t in taken})} tokens from prompts of lengths "
                f"{sorted(set(lengths))}; give each prompt an invoke of its own."
            )
        places = [[start + i for i in t] for start, t in zip(starts, taken, strict=True)]
        return [[row] for row in rows], places


def _origin(node: Node) -> HookPoint | None:
    """The hook point that a value comes from, along first arguments."""
    while node.kind != READ:
        first = next(arguments(node), None)
        if first is None:
            return None
        node = first
    return node.target  # type: ignore[no-any-return]


class Fakes:
    """Values of the nodes of one block without numbers: right structures, shapes and dtypes.

    They live on the meta device, where the skeleton is.
    """

    def __init__(self, structure: Structure, size: Callable[[Node], tuple[int, int]]) -> None:
        self._structure = structure
        self._size = size
        self._values: dict[int, Any] = {}
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def value(self, node: Node) -> Any:
        """The fake value of `node`.

        Raises:
            ScheduleError: the model cannot be run fake, or never reaches that place.
        """
        if node.index in self._values:
            return self._values[node.index]
        if node.kind == READ:
            result = self._read(node)
        else:
            for argument in arguments(node):
                self.value(argument)
            interpreter = _MetaInterpreter(
                self._values,  # type: ignore[arg-type]
                self._call,
                self._structure.meta_parameter,
            )
            with torch.no_grad(), self._mode:
                result = interpreter.evaluate(node)
        self._values[node.index] = result
        return result

    def _call(self, path: str, *args: Any, **kwargs: Any) -> Any:
        return self._structure.submodule(path).forward(*args, **kwargs)

    def _read(self, node: Node) -> Any:
        hook_point: HookPoint = node.target
        axes = self._structure.schedule().axes(hook_point)
        if axes is None:
            raise ScheduleError.no_schedule(
                f"The shape of `{hook_point}`", "this place was not reached in it"
            )
        batch, tokens = self._size(node)

        def make(tensor: TensorAxes) -> Any:
            if any(axis.role == UNKNOWN for axis in tensor.axes):
                return Opaque("its axes are neither batch nor token nor fixed")
            sizes = [axis.size(batch, tokens) for axis in tensor.axes]
            return torch.empty(sizes, dtype=tensor.dtype, device="meta")

        with self._mode:
            return map_axes(make, axes)


class _MetaInterpreter(Interpreter):
    """Evaluates on the meta device; captured tensors join it there."""

    __slots__ = ()

    def _captured(self, node: Node, captured: Captured) -> torch.Tensor:
        return torch.empty_like(captured.tensor, device="meta")
