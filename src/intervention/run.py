"""Owns `Run`: the values of one execution. Whatever comes from the model enters by `Run.arrive`.

An arrival binds the reads of all invokes, runs what has become ready in recorded order, frees what
has been used for the last time, and returns the value with every invoke's last write in its rows, or
None if nothing was changed. It may re-enter itself, so a node leaves the ready list before it runs.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable
from functools import partial
from heapq import heapify, heappop, heappush
from typing import Any

import torch

from ..tracing.errors import (
    BlockError,
    OrderError,
    ScheduleError,
    ShapeError,
    StepError,
    place_error,
)
from ..tracing.graph import Box, Graph, arguments
from ..tracing.interpreter import BranchInterpreter, Interpreter
from ..tracing.node import CALL, READ, WRITE, GradPoint, HookPoint, Node
from ..tracing.operations import (
    AGAIN,
    APPLY,
    DERIVING,
    ELEMENT,
    FIRST_ARGUMENT,
    GUARDED,
    IN_PLACE,
    PUT,
    SELECT,
    SKIPPED,
    VIEW,
)
from ..tracing.structure import leaves, map_leaves, snapshot
from .causal import complete, trim
from .order import passed_by
from .plan import Arrival, Pass, Plan
from .rows import Change, Misfit, Opaque, Place, fit, narrow, put
from .schedule import Schedule
from .skip import as_result, blank, fills_cache, is_skip, without_blanks
from .source import is_inner

# None outside of `torch.func.vmap`, `grad` and the like, whose tensors stand for others.
_transform_level = torch._C._functorch.maybe_current_level


class Stop(BaseException):
    """Leaves a forward after the last needed arrival. Not an Exception: models may catch those."""


class Site:
    """A hooked port of a module: what is wanted of it by step and call, and where it stands."""

    __slots__ = ("call", "path", "port", "step", "wanted")

    def __init__(self, path: str, port: str) -> None:
        self.path = path
        self.port = port
        self.wanted: dict[tuple[int, int], Arrival] = {}
        self.step = -1
        self.call = 0

    def wanted_after_first(self) -> bool:
        """True if a later step than the first forward is wanted."""
        return any(step > 0 for step, _ in self.wanted)


class Same(torch.autograd.Function):
    """A value as a tensor of its own for autograd, in the same memory.

    No view: operations in place on a view go past the hooks of the view. With an anchor that requires
    a gradient it requires one, too; so gradients begin in a model with frozen weights.
    """

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, anchor: torch.Tensor | None) -> torch.Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


@dataclasses.dataclass(slots=True)
class Gradient:
    """What is wanted of the gradient of one value in one backward."""

    reads: list[Node] = dataclasses.field(default_factory=list)
    writes: list[Node] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True)
class Front:
    """The first tokens of a pass with a cut, which it does not compute.

    Attributes:
        cut, width: how many they are, of how many.
        hidden: where their hidden states are known, they: [row, cut, d_model].
    """

    cut: int
    width: int
    hidden: dict[HookPoint, torch.Tensor] = dataclasses.field(default_factory=dict)


class Run:
    """One execution of a plan.

    Attributes:
        values: by node index; None before a value is there and after its last use.
        step: which forward of the root is running, from 0.
        sites: the ports to hook in the current pass.
        undo: what takes back what the current pass has changed on the model; again where it was
            interrupted.
        suspended: a module is applied by hand now, so its arrivals are not the forward's.
        generates: the forwards are those of a generation.
        pads_right: shorter rows of a batch begin where it begins, and not end where it ends.
        front: the first tokens of a pass that does not compute them.
        stopped: for each invoke that was stopped, after which step, and by which node.
        places: where each invoke lies in the batch; None if every invoke sees the whole value.
        reached: for each invoke, how many steps of its generation have begun.
    """

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        call_module: Callable[..., Any],
        parameter: Callable[[str], Any],
    ) -> None:
        count = len(graph.nodes)
        self._traced = graph.traced
        self._lent: frozenset[int] = frozenset()
        self.graph = graph
        self.plan = plan
        self.values: list[Any] = [None] * count
        self.sites: list[Site] = []
        self.undo: list[Callable[[], None]] = []
        self.step = 0
        self.suspended = False
        self.places: dict[int, Place] | None = None
        self.front: Front | None = None
        self.generates = self.pads_right = False
        self._schedule: Callable[[], Schedule] | None = None
        self._known: Schedule | None = None
        self._call_module = call_module
        evaluator = BranchInterpreter if graph.branched else Interpreter
        # An adapter's weight is had by applying it.
        weight = partial(self._unheard, parameter)
        self._interpreter = evaluator(self.values, self._apply_module, weight)
        self.thread = threading.get_ident()
        self._done = bytearray(count)
        self._ready: list[int] = []
        self._remaining = [len(users) if users else 0 for users in plan.users]
        self._boxes: dict[int, list[Box]] = {}
        for node, box in graph.saves:
            self._boxes.setdefault(node.index, []).append(box)
        self._waiting = [0] * count
        for node in graph.nodes:
            if node.kind != READ and plan.live[node.index]:
                needed = len(arguments(node))
                self._waiting[node.index] = needed
                if not needed:
                    self._ready.append(node.index)
        self._kept: list[int] = []  # bound since the last arrival, and maybe still needed
        self._unwritten = {n.index for n in graph.writes.values() if plan.live[n.index]}
        self._extents: dict[int, tuple[int, int]] = {}
        self._members: set[int] = set()
        self._shared: dict[int, int] = {}
        self._finished: set[int] = set()
        self._results: list[Arrival] = []
        self._outstanding = 0
        self._may_stop = self._whole = False
        self._rows = self._each = 1
        # Of the nodes whose gradients are wanted: what is, by backward.
        self._gradients: dict[int, dict[int, Gradient]] = {}
        self._backward: int | None = None  # the one that runs
        self._postponed: list[int] = []  # backwards that became ready inside another one
        self._numbered: set[str] | None = None  # paths whose calls the block tells apart
        self._ambiguous: set[int] = (
            set()
        )  # reads of modules with several calls that do not say which
        self._stops = {node.index for node in graph.stops}
        self.stopped: dict[int, tuple[int, Node]] = {}
        self.reached: dict[int, int] = {}
        self._base = False
        self._uses = passed_by(graph, plan) if graph.backwards else []
        # What backwards are to reach: a copy of it is not what the loss was computed from.
        self._named = {one.index for node in graph.backwards for one in arguments(node)}
        self._handles: list[Any] = []
        self._fragile: frozenset[int] = frozenset()
        if graph.traced:
            self._want_gradients()
        self._drain()

    # ---------------------------------------------------------------- a pass

    def begin(
        self,
        one: Pass,
        extents: dict[int, tuple[int, int]],
        schedule: Callable[[], Schedule],
        may_stop: bool,
        whole: bool = False,
    ) -> None:
        """Get ready for one pass.

        Args:
            one: the pass.
            extents: rows and width in tokens of each invoke in it, in the order of the batch.
            schedule: that of its prompts; asked for only where several share the pass.
            may_stop: leave the forward after the last needed arrival.
            whole: other invokes see the whole batch, and what the prompts have written in it.
        """
        sites: dict[tuple[str, str], Site] = {}
        self._results = []
        wanted = 0
        for hook_point, arrival in one.arrivals.items():
            if hook_point.port == "result":
                self._results.append(arrival)
                continue
            wanted += 1
            key = (hook_point.path, hook_point.port)
            site = sites.get(key)
            if site is None:
                site = sites[key] = Site(*key)
            site.wanted[hook_point.step, hook_point.call] = arrival
        self.sites = list(sites.values())
        self.step = 0
        self._finished = set() if self.generates else set(self.stopped)
        self._extents = extents
        self._shared = one.shared
        self._members = {*extents, *one.shared}
        self._outstanding = wanted + len(one.keep)
        self._may_stop = may_stop and not self._results
        self._whole = whole
        self._schedule = schedule
        self._known = None
        self._each = 1
        self._base = one.base
        self.front = None
        self._place()
        if self._finished and self._all_finished():
            self.sites = []

    def _place(self, grown: int = 0) -> None:
        if len(self._extents) <= 1:
            self.places = None
            return
        start, places = 0, {}
        for invoke, (count, width) in self._extents.items():
            places[invoke] = Place(start, count, width + grown, self.pads_right)
            start += count
        for invoke, stands in self._shared.items():
            places[invoke] = places[stands]
        self.places = places
        self._rows = start * self._each

    @property
    def extents(self) -> dict[int, tuple[int, int]]:
        """Rows and tokens of each invoke in the batch of this pass, in its order."""
        return self._extents

    def batch_has(self, rows: int) -> None:
        """The values that arrive now have the first `rows` rows of the batch."""
        self._rows = rows

    def checkpoint(self) -> tuple[Any, ...]:
        """The state between two passes, for `restore`."""
        return (
            list(self.values),
            bytearray(self._done),
            list(self._waiting),
            list(self._remaining),
            set(self._unwritten),
        )

    def restore(self, state: tuple[Any, ...]) -> None:
        """Forget what a pass did that could not be finished."""
        values, done, waiting, remaining, unwritten = state
        self.values[:] = values
        self._done[:] = done
        self._waiting[:] = waiting
        self._remaining[:] = remaining
        self._unwritten = set(unwritten)
        self._ready.clear()
        self._kept.clear()
        self.suspended = False

    def forward_begins(self, step: int, rows: int, grown: int, finished: Iterable[int]) -> None:
        """A forward of the root starts.

        Args:
            step: its number, from 0.
            rows: rows of its batch; several for each prompt with beams.
            grown: tokens that the sequences have gained since the prompts.
            finished: prompts, by position in the batch, whose generation has ended.
        """
        self.step = step
        prompts = sum(count for count, _ in self._extents.values())
        self._each = max(1, rows // prompts)
        self._place(grown)
        self._finished.update(i for i, (at, _) in self.stopped.items() if at < step)
        over, start = set(finished), 0
        for invoke, (count, _) in self._extents.items():
            if over.issuperset(range(start, start + count)):
                self._finished.add(invoke)
            if invoke not in self._finished:
                self.reached[invoke] = step + 1
            start += count

    def listens(self) -> bool:
        """False for arrivals that are another thread's or belong to a module applied by hand."""
        return not self.suspended and threading.get_ident() == self.thread

    # ---------------------------------------------------------------- the one door

    def arrive(self, site: Site, value: Any) -> Any:
        """Take in a value of the model; return its replacement, or None to leave it.

        Raises:
            OrderError: a write needs a value that has not arrived.
            ShapeError: a written value does not fit.
        """
        step = self.step
        if site.step == step:
            site.call += 1
        else:
            site.step, site.call = step, 0
        arrival = site.wanted.get((step, site.call))
        if arrival is None:
            if site.call == 1:
                self._called_again(site)
            return None
        if _transform_level() is not None:
            raise BlockError.transformed(str(arrival.hook_point))
        if self.front is not None:
            result = self._take_rest(arrival, value, self.front)
        elif self.places is None and not self._finished and not self._whole:
            result = self._take(arrival, arrival.reads, arrival.writes, value, None)
        else:
            result = self._take_parts(arrival, value)
        self.arrived()
        return result

    def _called_again(self, site: Site) -> None:
        """A module is called a second time in a forward, and a value at its first call may be wanted by
        one who does not know that.

        Raises:
            StepError: it was written.
        """
        first = site.wanted.get((site.step, 0))
        # In a backward, a checkpoint calls it again for the same values.
        if first is None or is_inner(site.port) or self._backward is not None:
            return
        if self._numbered is None:
            points = (n.target for n in self.graph.nodes if n.kind == READ or n.kind == WRITE)
            self._numbered = {p.path for p in points if type(p) is HookPoint and p.call}
        if site.path in self._numbered:
            return
        for node in first.writes:
            raise StepError.several_calls(node.describe(), site.path, node.location)
        self._ambiguous.update(node.index for node in first.reads)

    def skip(self, site: Site, compute: Callable[[], Any], inputs: Any) -> Any:
        """The result of a module that invokes skip: what they give, and its own for other rows.

        Args:
            compute: the module's own computation, called where it is needed.
            inputs: what the module is called with: (args, kwargs).

        Raises:
            OrderError: a given value has not arrived.
            ShapeError: a given value is no result of this module.
        """
        site.call = site.call + 1 if site.step == self.step else 0
        site.step = self.step
        arrival = site.wanted.get((site.step, site.call))
        if arrival is None:
            if site.call == 1:
                self._called_again(site)
            return compute()
        stand_in = self._stand_in(arrival, inputs)
        before = compute() if stand_in is None else stand_in
        changed = self._take_parts(arrival, before)
        result = before if changed is None else changed
        if stand_in is not None:
            result = without_blanks(result, stand_in)
        self.arrived()
        return result

    def _stand_in(self, arrival: Arrival, inputs: Any) -> Any:
        """What takes the place of a module's result; None if the module has to compute."""
        point = arrival.hook_point
        if self.generates or fills_cache(inputs) or not self._all_skip(arrival):
            return None
        try:
            given = self._axes(point)
        except ScheduleError:
            return None
        assert self._known is not None
        port = point.port.removesuffix("skip")
        visits = self._known.visits
        taken = visits.get((point.path, f"{port}inputs", point.call))
        # Places inside count their calls: another call of the module must not take their numbers.
        if taken is None or (point.path, f"{port}inputs", 1) in visits:
            return None
        rows = None if self.places is None else self._rows
        width = max((width for _, width in self._extents.values()), default=0)
        return blank(given, taken.axes, inputs, rows, width)

    def _all_skip(self, arrival: Arrival) -> bool:
        """True if every row that is in the batch now belongs to an invoke that skips."""
        # The writes of prompts that were stopped are carried out no more.
        by = {node.invoke for node in arrival.writes if self.values[node.index] is not SKIPPED}
        by -= self._finished
        if by - self._members:
            return True  # an invoke that sees the whole batch
        here = self.places or dict.fromkeys(self._extents)
        return all(
            invoke in by or (place is not None and place.start * self._each >= self._rows)
            for invoke, place in here.items()
        )

    def arrived(self) -> None:
        """One thing that this pass waits for is done."""
        self._outstanding -= 1
        if self._outstanding == 0 and self._may_stop:
            raise Stop

    @property
    def rows(self) -> int:
        """Rows of the batch of this pass."""
        return sum(count for count, _ in self._extents.values()) * self._each

    @property
    def wants_result(self) -> bool:
        return bool(self._results)

    def result(self, parts: dict[int, Any]) -> None:
        """Take in what the entry point returned in this pass for each of its invokes."""
        self.suspended = True  # what a module computes from here on is not the forward's
        for arrival in self._results:
            for node in arrival.reads:
                if node.invoke in parts:
                    self._bind(node, parts[node.invoke])
        self._drain()
        self.suspended = False

    def conclude(self, value: Any) -> None:
        """Take in the whole block's result, for invokes that see the whole batch."""
        for one in self.plan.passes:
            for hook_point, arrival in one.arrivals.items():
                if hook_point.port == "result":
                    whole = [n for n in arrival.reads if not self._done[n.index]]
                    self._take(arrival, whole, [], value, None, whole=True)

    def _take_rest(self, arrival: Arrival, value: Any, front: Front) -> Any:
        """An arrival without its first tokens: complete while the graph sees it."""
        point = arrival.hook_point
        axes = self._axes(point)
        known = front.hidden.get(point)
        whole = complete(value, axes, known, front.cut, front.width)
        changed = self._take_parts(arrival, whole)
        return None if changed is None else trim(changed, axes, front.cut, front.width)

    def _take_parts(self, arrival: Arrival, value: Any) -> Any:
        """Prompts first, each in its own rows; then invokes that see the whole batch."""
        alone = [n for n in arrival.reads if n.invoke in self._members]
        whole = [n for n in arrival.reads if n.invoke not in self._members]
        running = [n for n in alone if n.invoke not in self._finished]
        writes = [n for n in arrival.writes if n.invoke in self._members]
        writes = [n for n in writes if n.invoke not in self._finished]
        axes = None
        if self.places is not None and (running or writes):
            axes = self._axes(arrival.hook_point)
        changed = self._take(arrival, running, writes, value, axes)
        rest = [n for n in arrival.writes if n.invoke not in self._members]
        if whole or rest:
            seen = value if changed is None else changed
            again = self._take(arrival, whole, rest, seen, None, whole=True)
            return changed if again is None else again
        return changed

    def _axes(self, hook_point: HookPoint) -> Any:
        if self._known is None:
            assert self._schedule is not None
            self._known = self._schedule()
        return self._known.axes(hook_point)

    def _take(
        self,
        arrival: Arrival,
        reads: list[Node],
        writes: list[Node],
        value: Any,
        axes: Any,
        whole: bool = False,
    ) -> Any:
        places = None if whole else self.places
        parts: dict[int, Any] = {}
        for node in reads:
            part = value
            if places is not None:
                part = narrow(value, axes, places[node.invoke], self._rows, self._each)
            if node.index in self._fragile:
                part = _copied(part)
            if places is not None:
                parts[node.invoke] = part
            self._bind(node, part)
        if self._ready:
            self._drain()
        result = self._written(writes, value, parts, places, axes) if writes else None
        if self._kept:
            self._detach(value)
        return result

    def _written(
        self,
        writes: list[Node],
        value: Any,
        parts: dict[int, Any],
        places: dict[int, Place] | None,
        axes: Any,
    ) -> Any:
        """`value` with the last write of each invoke in its place."""
        changes, result = [], value
        for node in writes:
            if not self._done[node.index]:
                raise self._too_late(node)
            after = self.values[node.index]
            self.values[node.index] = None
            self._unwritten.discard(node.index)
            if after is SKIPPED:
                if node.args[0].target is SELECT:
                    continue
                raise StepError.untaken(f"what is written to `{node.target}`", node.location)
            skips = is_skip(node.target)
            try:
                if places is not None:
                    place = places[node.invoke]
                    before = parts.get(node.invoke)
                    if before is None:
                        before = narrow(value, axes, place, self._rows, self._each)
                    if skips:
                        after = as_result(after, before)
                    changes.append(Change(before, after, place, node))
                    continue
                if skips:
                    after = as_result(after, result)
                result = self._apart(node, result, fit(result, after))
            except Misfit as misfit:
                raise self._misfit(node, misfit) from None
        if places is not None:
            try:
                result = put(value, changes, axes, self._rows, self._each)
            except Misfit as misfit:
                raise self._misfit(misfit.owner, misfit) from None
        return result

    def _apart(self, write: Node, before: Any, after: Any) -> Any:
        """`after` in memory that the model may change: no other value and no user holds it."""
        if isinstance(after, torch.Tensor) and self._is_new(write.args[0]):
            return after
        source = write.args[0]
        if source.kind == READ and source.target == write.target and source.index in self._traced:
            # What arrived, as a tensor of its own.
            return _copied(after) if source.index in self._fragile else after
        arrived = {id(leaf) for leaf in leaves(before)}
        return map_leaves(
            lambda leaf: (
                leaf.clone() if isinstance(leaf, torch.Tensor) and id(leaf) not in arrived else leaf
            ),
            after,
        )

    def _is_new(self, node: Any) -> bool:
        """True if the value of `node`, a tensor, is new memory that one other node uses."""
        users = self.plan.users[node.index]
        node = self.graph.nodes[node.index]  # in a part of a block, a known value stands for it
        if node.kind != CALL or users is None or len(users) != 1:
            return False
        operation = node.target
        if operation is not PUT:
            return bool(operation.fresh or operation.effect is IN_PLACE)
        _, part, view, *_ = node.args
        if view is ELEMENT or view is FIRST_ARGUMENT:
            return type(part) is Node and self._is_new(part)
        return not view.copies

    def _detach(self, value: Any) -> None:
        """Copy what is still needed after this arrival and lies in the model's own memory: the model
        may write there later, and a part would keep the whole batch alive."""
        arrived = {
            place
            for leaf in leaves(value)
            if isinstance(leaf, torch.Tensor)
            for place in _memory(leaf)
        }

        def copy(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor) and not arrived.isdisjoint(_memory(leaf)):
                return leaf.clone()
            return leaf

        for index in self._kept:
            if self.values[index] is not None and index not in self._named:
                self.values[index] = map_leaves(copy, self.values[index])
        self._kept.clear()

    def _bind(self, node: Node, value: Any) -> None:
        index = node.index
        self._done[index] = 1
        if self._traced and index in self._traced:
            value = self._on_path(node, value)
            self._show_again(node, value)
        boxes = self._boxes.get(index)
        if boxes is not None:
            opaque = _opaque(value)
            if value is SKIPPED:
                for box in boxes:
                    box.error = StepError.untaken(node.describe(), node.location)
            elif opaque is not None:
                self._refuse(node, opaque, boxes)
            else:
                # `+` of two tuples is a new tuple of the same tensors.
                keep = type(value) is torch.Tensor and len(boxes) == 1
                keep = keep and (
                    index in self._lent
                    or (node.kind == CALL and _owns(node, self.plan.users[index]))
                )
                for box in boxes:
                    box.value = value if keep else snapshot(value)
                    box.full = True
        users = self.plan.users[index]
        if users:
            self.values[index] = value
            self._kept.append(index)
            waiting = self._waiting
            for user in users:
                waiting[user.index] -= 1
                if not waiting[user.index]:
                    heappush(self._ready, user.index)
        elif node.kind == WRITE:
            self.values[index] = value
            self._kept.append(index)  # the place it goes to may come later

    def lend(self, schedule: Schedule) -> None:
        """Let saved values lie in the forward's memory where nothing writes there later."""
        found = set()
        for node, _ in self.graph.saves:
            root, fresh = node, False
            while root.kind == CALL and root.target.effect is VIEW and not root.target.copies:
                first = root.args[0] if root.args else None
                if type(first) is not Node:
                    break
                fresh = fresh or root.target.fresh
                root = first
            if fresh:  # nobody else has it
                found.add(node.index)
            elif root.kind == READ and type(root.target) is HookPoint:
                visit = schedule.find(root.target)
                if visit is not None and visit.stable:
                    found.add(node.index)
        self._lent = frozenset(found)

    def keep_apart(self, schedule: Schedule) -> None:
        """For a backward: read values into whose memory the forward writes later have their own.

        What is computed of them holds them for the backward, as they were.
        """
        found = set()
        for node in self.graph.nodes:
            if node.kind == READ and type(node.target) is HookPoint:
                visit = schedule.find(node.target)
                if visit is not None and not visit.stable:
                    found.add(node.index)
        self._fragile = frozenset(found)

    def _refuse(self, node: Node, value: Opaque, boxes: list[Box]) -> None:
        for box in boxes:
            box.error = ScheduleError.shared(node.describe(), node.location, value.reason)

    def _drain(self) -> None:
        nodes, values, remaining = self.graph.nodes, self.values, self._remaining
        free, stops = self.plan.settings.memory, self._stops
        while self._ready:
            node = nodes[heappop(self._ready)]
            if node.target is APPLY or node.target is GUARDED:
                value = self._unheard(self._interpreter.evaluate, node)
            elif node.kind == CALL and node.target in DERIVING:
                if self._backward is not None:
                    self._postponed.append(node.index)
                    continue
                value = self._derive(node)
            else:
                value = self._interpreter.evaluate(node)
            if stops and node.index in stops and value is not SKIPPED:
                self._stop(node, value)
            for argument in arguments(node):
                remaining[argument.index] -= 1
                if free and not remaining[argument.index]:
                    values[argument.index] = None
            self._bind(node, value)

    # ---------------------------------------------------------------- stops

    def _stop(self, node: Node, step: int) -> None:
        """An invoke ends after a step."""
        self.stopped.setdefault(node.invoke, (step, node))
        if self.generates:
            return  # transformers ends it when the step has its token: see `ended_rows`
        self._finished.add(node.invoke)
        if self._may_stop and not self._base and self._all_finished():
            self._outstanding = 1  # the arrival that this belongs to is the last one

    def _all_finished(self) -> bool:
        """True if no invoke wants more of this pass."""
        return self._finished >= self._members or self._all_stopped(self.stopped)

    def _all_stopped(self, stopped: Iterable[int]) -> bool:
        """True if an invoke that sees the whole batch is among those that were stopped."""
        prompted = {i for one in self.plan.passes for i in (*one.invokes, *one.shared)}
        return not prompted.issuperset(stopped)

    def ended_rows(self, step: int, rows: int) -> list[bool]:
        """For each row of a generation, whether it was stopped after this step or before."""
        ended = {invoke for invoke, (at, _) in self.stopped.items() if at <= step}
        each = rows // sum(count for count, _ in self._extents.values())
        every = self._all_stopped(ended)
        return [
            every or invoke in ended
            for invoke, (count, _) in self._extents.items()
            for _ in range(count * each)
        ]

    # ---------------------------------------------------------------- gradients

    def _want_gradients(self) -> None:
        """Note which gradients are read and written, and let each backward wait for the values that
        are written into its gradients."""
        graph, users = self.graph, self.plan.users
        for node in graph.nodes:
            point = node.target
            if type(point) is not GradPoint or not self.plan.live[node.index]:
                continue
            wanted = self._gradients.setdefault(point.node.index, {})
            arrival = wanted.setdefault(point.backward, Gradient())
            if node.kind == READ:
                arrival.reads.append(node)
            elif node.index in self._unwritten:
                arrival.writes.append(node)
        for backward, waits in zip(graph.backwards, self.plan.waits, strict=True):
            for node in waits:
                known = users[node.index]
                users[node.index] = [backward] if known is None else [*known, backward]
                self._waiting[backward.index] += 1
                self._remaining[node.index] += 1

    def _on_path(self, node: Node, value: Any) -> Any:
        """`value` in tensors that autograd passes through.

        What arrives may be used elsewhere, too, be the part of a batch, or come from frozen weights.
        It gets tensors of its own in the computation by being written back: see `_gradient`.
        """

        def alias(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
                return leaf
            known = node.kind == READ or (node.kind == CALL and node.target.computed)
            if leaf.requires_grad and not known:
                return leaf
            with torch.enable_grad():
                anchor = None if leaf.requires_grad else torch.zeros((), requires_grad=True)
                return Same.apply(leaf, anchor)  # type: ignore[no-untyped-call]

        value = map_leaves(alias, value)
        wanted = node.index in self._gradients and isinstance(value, torch.Tensor)
        if wanted and value.requires_grad:
            hook = partial(self._gradient_arrives, node.index)
            self._handles.append(value.register_hook(hook))
        return value

    def _show_again(self, node: Node, value: Any) -> None:
        """The part that was changed in place, and is used further on, is a view of `value` for
        autograd, too: what is derived by it is part of the gradient of its whole."""
        while node.kind == CALL and node.target is PUT:
            _, changed, view, *_ = node.args
            origin = changed
            while origin.kind == CALL and (
                origin.target is PUT or origin.target.effect is IN_PLACE
            ):
                origin = origin.args[0]
            again = origin.kind == CALL and origin.target is AGAIN and origin.args[2] is view
            if not again and (origin.kind != CALL or origin.target is not view):
                return  # assigned: a copy of a value that is another one
            if self.values[changed.index] is not None:
                args, _ = self._interpreter.resolve(node)
                value = view.function(value, *args[3], **args[4])
                self.values[changed.index] = value
            node = changed

    def _derive(self, node: Node) -> Any:
        """Run a backward. The memory of the forward is kept while another one may go through it."""
        args, kwargs = self._interpreter.resolve(node)
        number = self._backward = self.graph.backwards.index(node)
        uses = self._uses[number]
        self._uses[number] = frozenset()
        if kwargs["retain_graph"] is None:
            shared = any(not uses.isdisjoint(other) for other in self._uses)
            kwargs["retain_graph"] = shared or kwargs["create_graph"]
        try:
            result = node.target.function(*args, **kwargs)
        except Exception as error:
            place_error(error, node.location, node.describe())
            raise
        finally:
            self._backward = None
        for index in self._postponed:
            heappush(self._ready, index)
        self._postponed.clear()
        for one in self.plan.waits[number]:
            self._remaining[one.index] -= 1
            if self.plan.settings.memory and not self._remaining[one.index]:
                self.values[one.index] = None
        return result

    def _gradient_arrives(self, index: int, gradient: torch.Tensor) -> torch.Tensor | None:
        """Take in the gradient of a node's value; return its replacement, or None to leave it.

        Called by autograd in the middle of a backward. Only what the gradient makes ready runs here,
        and with gradients recorded, as it would outside.
        """
        if self._backward is None:
            return None  # somebody derives a saved value after the run
        arrival = self._gradients[index].get(self._backward)
        if arrival is None:
            return None
        kept, ready = self._kept, self._ready
        self._kept, self._ready = [], []
        try:
            with torch.enable_grad():
                for node in arrival.reads:
                    self._bind(node, gradient)
                self._drain()
            result: torch.Tensor | None = None
            for write in arrival.writes:
                if not self._done[write.index]:
                    raise self._too_late(write)
                after = self.values[write.index]
                self.values[write.index] = None
                self._unwritten.discard(write.index)
                try:
                    result = fit(gradient, after)
                except Misfit as misfit:
                    raise self._misfit(write, misfit) from None
            self._detach(gradient)
            return result
        finally:
            ready += self._ready
            heapify(ready)
            self._kept, self._ready = kept, ready

    def _apply_module(self, path: str, *args: Any, **kwargs: Any) -> Any:
        return self._unheard(self._call_module, path, *args, **kwargs)

    def _unheard(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a function that may run modules of the model, which are not the forward's."""
        before, self.suspended = self.suspended, True
        try:
            return function(*args, **kwargs)
        finally:
            self.suspended = before

    # ---------------------------------------------------------------- what went wrong

    def _missing(self, node: Node) -> Node | None:
        """The first read that `node` depends on and that has not arrived."""
        missing: list[Node] = []
        seen = {node.index}
        stack = [node]
        while stack:
            one = stack.pop()
            if self._done[one.index]:
                continue
            if one.kind == READ:
                missing.append(one)
            for argument in arguments(one):
                if argument.index not in seen:
                    seen.add(argument.index)
                    stack.append(argument)
        return min(missing, key=lambda read: read.index, default=None)

    def _too_late(self, write: Node) -> Exception:
        read = self._missing(write)
        if read is None:
            return BlockError(f"the value written at {write.location} could not be computed")
        if read.target.step < self.step or read.index in self.plan.skipped:
            return StepError.never_ran(read.describe(), read.location, self._reason(read))
        return OrderError.later(write.describe(), write.location, read.describe(), read.location)

    def _misfit(self, write: Node, misfit: Misfit) -> ShapeError:
        place, location = write.describe(), write.location
        value = next(iter(arguments(write)), None)
        if value is not None and value.kind == CALL and value.target is PUT:
            location = value.location
        if misfit.shared:
            return ShapeError.shared(place, location)
        return ShapeError.write(place, location, misfit.expected, misfit.found)

    def _reason(self, read: Node) -> str:
        hook_point: HookPoint | GradPoint = read.target
        if read.invoke in self.stopped:
            return f"the run was stopped at {self.stopped[read.invoke][1].location}"
        skip = self.plan.skipped.get(read.index)
        if skip is not None:
            what = str(skip.target._replace(step=0)).removesuffix(".skip")
            return f"`{hook_point.path}` was not called: `{what}` was skipped at {skip.location}"
        if isinstance(hook_point, GradPoint):
            if hook_point.backward >= len(self.graph.backwards):
                return "no `backward()` of the block gives it"
            loss = self.graph.backwards[hook_point.backward]
            return f"the loss derived at {loss.location} does not depend on it"
        if hook_point.step > 0:
            # `step` is the last forward that ran.
            return (
                f"it belongs to step {hook_point.step} and this prompt's generation ended before "
                f"that step"
            )
        if hook_point.call:
            return f"`{hook_point.path}` was not called {hook_point.call + 1} times in this forward"
        if hook_point.port == "result":
            return "the run gave no result"
        return f"`{hook_point.path}` was not called in this forward"

    def finish(self) -> None:
        """Say for each saved value that was never reached why, and refuse writes without effect.

        Raises:
            StepError: something was written to a module that the forward never called, or that is
                computed from a module's output where it was called several times.
        """
        if self._ambiguous:
            self._refuse_ambiguous()
        for number, (invoke, step) in self.graph.rounds.items():
            if not self._came(invoke, step):
                self._take_back(*self.graph.saves[number], step)
        for index, boxes in self._boxes.items():
            for box in boxes:
                if not box.full and box.error is None:
                    read = self._missing(self.graph.nodes[index]) or self.graph.nodes[index]
                    reason = self._reason(read) if read.kind == READ else "it was not computed"
                    error = StepError.never_ran(read.describe(), read.location, reason)
                    error.ended = read.invoke in self.stopped or (
                        read.kind == READ and read.target.step > 0
                    )
                    box.error = error
        for index in sorted(self._unwritten):
            node = self.graph.nodes[index]
            if node.invoke in self.stopped:
                continue
            if node.target.step == 0 and node.target.port != "result":
                read = self._missing(node) or node
                raise StepError.never_ran(read.describe(), read.location, self._reason(read))

    def _came(self, invoke: int, step: int) -> bool:
        """True if the generation of an invoke, or of any where it sees the whole batch, had a step."""
        known = self.reached.get(invoke)
        most = max(self.reached.values(), default=step + 1) if known is None else known
        return step < most

    def _take_back(self, node: Node, box: Box, step: int) -> None:
        """A value is known that is saved at a step that never came, as it does not depend on it."""
        if box.full:
            reason = f"the generation of its prompt ended before step {step}"
            box.value, box.full = None, False
            box.error = StepError.never_ran(node.describe(), node.location, reason)
            box.error.ended = True

    def _refuse_ambiguous(self) -> None:
        """Take back what came of reads that do not say which of several calls they mean."""
        origin = {index: self.graph.nodes[index] for index in self._ambiguous}
        written = {node.index for node in self.graph.writes.values()}
        for node in self.graph.nodes:
            if node.index not in origin:
                read = next((origin[a.index] for a in arguments(node) if a.index in origin), None)
                if read is None:
                    continue
                origin[node.index] = read
            read = origin[node.index]
            error = StepError.several_calls(read.describe(), read.target.path, read.location)
            if node.index in written:
                raise error
            for box in self._boxes.get(node.index, ()):
                box.value, box.full, box.error = None, False, error

    def close(self) -> None:
        """Break the cycles and let go of what is left, also after a failed run: nothing may wait for
        the garbage collector."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        del self._interpreter
        self._schedule = None
        self.values.clear()


def _copied(value: Any) -> Any:
    return map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, value)


def _opaque(value: Any) -> Opaque | None:
    """The reason why nothing of `value` belongs to one prompt, if that is so."""
    if type(value) is Opaque:
        return value
    if type(value) is tuple and value and all(type(part) is Opaque for part in value):
        return value[0]  # type: ignore[no-any-return]
    return None


def _owns(node: Node, users: list[Node] | None) -> bool:
    """True if the value of `node`, a CALL, is new memory that nothing else will hold or change."""
    if not node.target.fresh:
        return False
    return all(
        user.kind == CALL
        and user.target.fresh
        and user.target not in (APPLY, PUT)
        and user.target.effect != VIEW
        for user in users or ()
    )


def no_grad(graph: Graph) -> Any:
    """Gradients are recorded only if the block or a prompt has a tensor that asks for them."""
    wanted = bool(graph.backwards) or (torch.is_grad_enabled() and graph.needs_grad)
    return torch.set_grad_enabled(wanted)


def _memory(tensor: torch.Tensor) -> tuple[int, ...]:
    """Where the numbers of a tensor lie."""
    if tensor.layout is torch.strided:
        return (tensor.untyped_storage().data_ptr(),)
    if tensor.layout is torch.sparse_coo:
        return (*_memory(tensor._indices()), *_memory(tensor._values()))
    if tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        return _memory(tensor.values())
    return (id(tensor),)
