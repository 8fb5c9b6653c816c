"""Owns `DifferentiatedRun`: the run of a graph with backwards.

A gradient comes by the hook of its tensor while a backward runs, and is taken in as a value of the
model is: its reads are bound, what has become ready runs, and what was written there goes on in its
place. That happens inside autograd's engine, which is inside the evaluation of the BACKWARD node, which
may be inside a forward. So a gradient brings a list of ready nodes of its own: those of the forward
wait, and so does a further backward.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from heapq import heappush
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..tracing.errors import BlockError, OperationError, add_note
from ..tracing.graph import Graph, arguments
from ..tracing.node import BACKWARD, PARAMETER, READ, WRITE, GradPoint, HookPoint, Node
from .plan import Plan
from .rows import Misfit, fit
from .run import Run

#: A watched tensor: the index of the node whose value has it, and the way into that value.
Key = tuple[int, tuple[Any, ...]]


class _Same(torch.autograd.Function):
    """A value as a tensor of its own for autograd, in the same memory.

    No view: operations in place on a view go past the hooks of the view. With an anchor that requires
    a gradient it requires one, too; that is how gradients begin in a model with frozen weights.
    """

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, anchor: torch.Tensor | None) -> torch.Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class DifferentiatedRun(Run):
    """One execution of a plan with backwards.

    Attributes:
        _points: what is wanted of each tensor in each backward: its reads, and its last writes.
        _watched: by node, the tensors in its value that are watched.
        _inputs: tensors that a backward names, which must not be replaced by copies.
        _running: the backward that runs now; hooks do nothing while none does.
        _waiting_backwards: that became ready inside the one that runs.
        _shared: how many backwards that have not run go through each part of the computation.
    """

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        call_module: Callable[..., Any],
        parameter: Callable[[str], Any],
    ) -> None:
        self._points: dict[tuple[Key, int], tuple[list[Node], list[Node]]] = {}
        self._watched: dict[int, dict[tuple[Any, ...], GradPoint]] = {}
        self._named: dict[Key, torch.Tensor | None] = {}
        self._handles: list[RemovableHandle] = []
        self._running: Node | None = None
        self._postponed: list[int] = []
        self._began = False
        # Hooks of tensors on several devices run in several threads.
        self._lock = threading.RLock()
        self._uses = _uses(graph, plan)
        self._left: dict[Any, int] = {}
        for uses in self._uses.values():
            for use in uses:
                self._left[use] = self._left.get(use, 0) + 1
        for node in graph.nodes:
            if node.kind == BACKWARD:
                for point in node.target.inputs:
                    self._named[_key(point)] = None
                    self._watch_for(point)
            elif isinstance(node.target, GradPoint) and plan.live[node.index]:
                if node.kind == WRITE and graph.writes.get((node.invoke, node.target)) is not node:
                    continue
                point = node.target
                found = self._points.setdefault(
                    (_key(point), graph.backward_of(point).index), ([], [])
                )
                found[node.kind == WRITE].append(node)
                self._watch_for(point)
        super().__init__(graph, plan, call_module, parameter)

    def _watch_for(self, point: GradPoint) -> None:
        self._watched.setdefault(point.node.index, {})[point.parts] = point

    # ---------------------------------------------------------------- the forward

    def _bind(self, node: Node, value: Any) -> None:
        points = self._watched.get(node.index)
        if points is not None:
            for point in points.values():
                value = self._watch(node, point, value)
        super()._bind(node, value)

    def _watch(self, node: Node, point: GradPoint, value: Any) -> Any:
        """Hook the tensor of `point`; gives the value with that tensor in it."""
        tensor = _tensor_of(node, point, value)
        if node.kind == PARAMETER:
            if not tensor.requires_grad:
                return value  # the model uses the frozen parameter itself
        elif node.kind == READ or not tensor.requires_grad:
            with torch.enable_grad():
                anchor = None if tensor.requires_grad else torch.zeros((), requires_grad=True)
                tensor = _Same.apply(tensor, anchor)  # type: ignore[no-untyped-call]
            value = _put(value, point.parts, tensor)
        key = _key(point)
        if key in self._named:
            self._named[key] = tensor
        hook = functools.partial(self._arrive, key)
        self._handles.append(tensor.register_hook(hook))  # type: ignore[no-untyped-call]
        return value

    def _apart(self, write: Node, before: Any, after: Any) -> Any:
        source = write.args[0]
        if source.kind == READ and source.target == write.target:
            return after  # what arrived, watched
        return super()._apart(write, before, after)

    # ---------------------------------------------------------------- a backward

    def _evaluate(self, node: Node) -> None:
        if node.kind != BACKWARD:
            super()._evaluate(node)
        elif self._running is not None:
            self._postponed.append(node.index)
        else:
            self._interpreter.backward = self._go_back
            self._interpreter.evaluate(node)
            self._used(arguments(node))
            self._used(self.plan.waits.get(node.index, ()))
            self._done[node.index] = 1

    def _go_back(
        self,
        node: Node,
        outputs: Any,
        gradients: Any = None,
        inputs: Any = (),
        retain_graph: bool | None = None,
        create_graph: bool = False,
        **options: Any,
    ) -> None:
        for use in self._uses[node.index]:
            self._left[use] -= 1
        if retain_graph is None:
            retain_graph = create_graph or any(self._left[use] for use in self._uses[node.index])
        wanted = [self._named[_key(point)] for point in node.target.inputs]
        if any(tensor is None for tensor in wanted):
            point = node.target.inputs[wanted.index(None)]
            raise BlockError(
                f"`{point.path}` is an input of the backward at {node.location}, but the loss was "
                "there before it, so it does not depend on it."
            )
        wanted += inputs
        self._began = True
        self._running = node
        try:
            if node.target.name == "grad":
                self._unheard(
                    torch.autograd.grad,
                    outputs, wanted, gradients, retain_graph, create_graph, **options,
                )  # fmt: skip
            else:
                self._unheard(
                    torch.autograd.backward,
                    outputs, gradients, retain_graph, create_graph, inputs=wanted or None,
                )  # fmt: skip
        finally:
            self._running = None
        while self._postponed:
            heappush(self._ready, self._postponed.pop())

    def _arrive(self, key: Key, gradient: torch.Tensor) -> torch.Tensor | None:
        """Take in a gradient; return its replacement, or None to leave it."""
        running = self._running
        if running is None:
            return None  # another backward of the user's
        found = self._points.get((key, running.index))
        if found is None:
            return None
        reads, writes = found
        with self._lock, torch.enable_grad():
            outer, self._ready = self._ready, []
            try:
                for node in reads:
                    self._bind(node, gradient)
                self._drain()
            finally:
                self._ready = outer
        result = None
        for write in writes:
            result = self._replaced(write, gradient if result is None else result)
        if result is not None and not torch.is_grad_enabled():
            result = result.detach()
        return result

    def _replaced(self, write: Node, gradient: torch.Tensor) -> Any:
        if not self._done[write.index]:
            raise self._too_late(write)
        after = self.values[write.index]
        self.values[write.index] = None
        self._unwritten.discard(write.index)
        try:
            return fit(gradient, after)
        except Misfit as misfit:
            raise self._misfit(write, misfit) from None

    # ---------------------------------------------------------------- around a pass

    @property
    def restorable(self) -> bool:
        return not self._began

    def checkpoint(self) -> tuple[Any, ...]:
        self._began = False
        return super().checkpoint()

    def _reason(self, read: Node) -> str:
        if not isinstance(read.target, GradPoint):
            return super()._reason(read)
        backward = self.graph.backward_of(read.target)
        if self._done[backward.index]:
            return f"the loss at {backward.location} does not depend on it"
        missing = self._missing(backward)
        if missing is None or missing is read:
            return f"the backward at {backward.location} did not run"
        return f"the backward at {backward.location} did not run: {super()._reason(missing)}"

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._named.clear()
        super().close()


def _key(point: GradPoint) -> Key:
    return point.node.index, point.parts


def _put(value: Any, parts: tuple[tuple[Any, tuple[Any, ...]], ...], tensor: torch.Tensor) -> Any:
    """A structure with the tensor at the end of the way `parts` replaced."""
    if not parts:
        return tensor
    (operation, args), rest = parts[0], parts[1:]
    part = _put(operation.function(value, *args), rest, tensor)
    return operation.inverse(value, part, *args)


def _tensor_of(node: Node, point: GradPoint, value: Any) -> torch.Tensor:
    try:
        tensor = point.tensor(value)
    except Exception as error:
        add_note(error, f"graftwork: in `{point}`, of the value recorded at {node.location}")
        raise
    if isinstance(tensor, torch.Tensor) and (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    found = str(tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
    raise OperationError(
        f"`{point}`: only a floating point tensor has a gradient, and this is {found}. "
        f"Recorded at {node.location}"
    )


def _uses(graph: Graph, plan: Plan) -> dict[int, set[Any]]:
    """For each backward, by node index, the parts of the computation that it may go through: nodes,
    and passes. Its graph is kept as long as another one needs any of them."""
    if len(graph.backwards) == 1:
        return {graph.backwards[0].index: set()}
    pass_of = {
        invoke: number
        for number, one in enumerate(plan.passes)
        for invoke in (*one.invokes, *one.shared)
    }
    written: dict[int, list[Node]] = {}
    for (invoke, place), node in graph.writes.items():
        if type(place) is HookPoint:
            written.setdefault(pass_of.get(invoke, 0), []).append(node)
    found = {}
    for backward in graph.backwards:
        seen: set[Any] = set()
        stack = [backward]
        while stack:
            for argument in arguments(stack.pop()):
                if argument.index in seen or argument.kind == PARAMETER:
                    continue
                seen.add(argument.index)
                stack.append(argument)
                if argument.kind == READ:
                    number = pass_of.get(argument.invoke, 0)
                    if ("pass", number) not in seen:
                        seen.add(("pass", number))
                        stack += written.get(number, ())
        found[backward.index] = seen
    return found
