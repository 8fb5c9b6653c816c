"""Owns which part of an open block has to run for one value, and what such runs have found.

A *part* is a graph of its own that shares the block's nodes. Nodes whose value is known stand in it as
constants, and a node that keeps a copy is added for each value that may be asked for again. So the
planner and the run need to know nothing of it. What is known holds until a write is recorded that
comes before it in the order of the forward. The hidden states at the last block of the chain that a
part has completed are kept, too: the next run of that prompt starts there.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..tracing.errors import ScheduleError
from ..tracing.graph import Box, Graph, arguments
from ..tracing.job import Job
from ..tracing.node import CALL, PARAMETER, READ, WRITE, Captured, GradPoint, HookPoint, Node
from ..tracing.operations import APPLY, GUARDED, PUT, SELECT, VIEW, Operation
from ..tracing.structure import ATOMS, leaves, map_leaves
from ..tracing.template import is_stop
from .order import Position, position
from .plan import Plan, Resume
from .rows import Opaque, tensors_in
from .schedule import Schedule

_FIRST: Position = (-1, -1)
_LAST: Position = (1 << 61, 0)

Place = tuple[int, HookPoint]


class Cell:
    """Holds one value between two runs."""

    __slots__ = ("full", "value")

    def __init__(self, value: Any = None, full: bool = False) -> None:
        self.value = value
        self.full = full


def _copy(value: Any) -> Any:
    return map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, value)


def _keep(value: Any, cell: Cell) -> None:
    cell.value, cell.full = _copy(value), True


KNOWN = Operation("known value", lambda cell: cell.value)
KEEP = Operation("keep", _keep)


@dataclasses.dataclass(slots=True)
class Part:
    """One run of a part of a block.

    Attributes:
        graph: what runs.
        only: the invokes that run; None for all.
        whole: the block's last run, which gives what the entry point returns.
        resume: the hidden states that it starts from, and those that it keeps.
        counts: it runs to tell how many steps a generation has.
        until: the step at whose beginning such a run may be left.
        reached: what it found, for each invoke that ran.
        cells: where the values arrive that are kept, by node index.
        writes: the places that are written in it.
    """

    graph: Graph
    only: frozenset[int] | None
    whole: bool
    resume: Resume = dataclasses.field(default_factory=Resume)
    counts: bool = False
    until: int | None = None
    reached: dict[int, int] = dataclasses.field(default_factory=dict)
    cells: dict[int, Cell] = dataclasses.field(default_factory=dict)
    writes: dict[Place, Node] = dataclasses.field(default_factory=dict)

    def value(self, node: Node) -> Any:
        """The value that this part was run for.

        Raises:
            StepError: the forward never reached it.
            ScheduleError: it belongs to no prompt.
        """
        cell = self.cells[node.index]
        for keep, box in self.graph.saves:
            if keep.args[1] is cell and box.error is not None:
                raise box.error
        if isinstance(cell.value, Opaque):
            raise ScheduleError.shared(node.describe(), node.location, cell.value.reason)
        return cell.value


class Places:
    """Where hook points come in a run of one block.

    Attributes:
        chain: positions of the outputs of the blocks that a run may start after; none if it must
            start at the beginning.
    """

    def __init__(self, schedule: Callable[[], Schedule], may_start: bool) -> None:
        self._ask = schedule
        self._may_start = may_start
        self._known: Schedule | None = None
        self._failed = False
        self._chain: list[Position] | None = None

    def chain_names(self) -> tuple[str, ...]:
        known = self.schedule() if self._may_start else None
        if known is None:
            return ()
        # Of what a block returns, the hidden states alone are kept.
        more = (tensors_in(known.visits[name, "output", 0].axes) > 1 for name in known.chain)
        return () if any(more) else known.chain

    def schedule(self) -> Schedule | None:
        """None if the model cannot be measured."""
        if self._known is None and not self._failed:
            try:
                self._known = self._ask()
            except ScheduleError:
                self._failed = True
        return self._known

    def of(self, point: HookPoint) -> Position | None:
        if point.port in ("result", "grad"):
            return position(point, self._known or Schedule({}))
        known = self.schedule()
        return None if known is None else position(point, known)

    @property
    def chain(self) -> list[Position]:
        if self._chain is None:
            ends = (self.of(HookPoint(name, "output")) for name in self.chain_names())
            self._chain = [end for end in ends if end is not None]
        return self._chain


class Known:
    """What the runs of one open block have found.

    Attributes:
        values: by node index.
        hidden: for each invoke, the hidden states that its next run may start from.
        writes: the last writes for which all this holds.
        applied: those of them that a run has carried out.
        random: the generators' states at the first run, for runs that draw.
        steps: for each invoke, how many steps its generation has, and whether it then ends.
        put_back: modules in training mode had counted a run, which was put back.
    """

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}
        self.hidden: dict[int, tuple[int, torch.Tensor]] = {}
        self.writes: dict[Place, Node] = {}
        self.applied: dict[Place, Node] = {}
        self.random: list[torch.Tensor] | None = None
        self.steps: dict[int, tuple[int, bool]] = {}
        self.put_back = False
        self._counted = False
        self._prompts = 0

    def forget(self) -> None:
        """Know nothing of the block but what it draws and puts back."""
        random, put_back = self.random, self.put_back
        self.__init__()  # type: ignore[misc]
        self.random, self.put_back = random, put_back

    # ---------------------------------------------------------------- what still holds

    def update(self, job: Job, places: Places) -> None:
        """Forget what was changed by writes, and by prompts of the batch, recorded since."""
        graph = job.graph
        whole = {i for i, p in enumerate(job.prompts) if p is None}
        prompts = len(job.prompts) - len(whole)
        grown = prompts != self._prompts and bool(whole)
        changed = [p for p, node in graph.writes.items() if self.writes.get(p) is not node]
        self.writes, self._prompts = dict(graph.writes), prompts
        if changed or grown:
            self.steps.clear()
        if not self.values and not self.hidden and not self.applied:
            return
        if not changed and not grown:
            return
        dirty: dict[int, Position] = {}

        def mark(place: Place) -> bool:
            # What sees the whole batch ties all of its prompts together.
            key = -1 if whole else place[0]
            at = places.of(place[1]) or _FIRST
            before = dirty.get(key)
            if before is None or at < before:
                dirty[key] = at
                return True
            return False

        def stale(invoke: int, point: HookPoint) -> bool:
            if grown and invoke in whole:
                return True
            first = dirty.get(-1 if whole else invoke)
            if first is None:
                return False
            at = places.of(point)
            # What sees the whole batch sees what prompts have written at that place.
            return at is None or at > first or (at == first and invoke in whole)

        for place in changed:
            mark(place)
        while True:
            bad = bytearray(len(graph.nodes))
            for node in graph.nodes:
                if node.kind == READ:
                    bad[node.index] = stale(node.invoke, node.target)
                elif any(bad[argument.index] for argument in arguments(node)):
                    bad[node.index] = 1
            spread = [mark(place) for place, node in graph.writes.items() if bad[node.index]]
            if not any(spread):
                break
        self.values = {i: value for i, value in self.values.items() if not bad[i]}
        self.applied = {
            place: node
            for place, node in self.applied.items()
            if graph.writes.get(place) is node and not bad[node.index] and not stale(*place)
        }
        for invoke, (block, _) in list(self.hidden.items()):
            first = dirty.get(-1 if whole else invoke)
            if first is not None and first < places.chain[block]:
                del self.hidden[invoke]

    # ---------------------------------------------------------------- what has to run

    def part(self, job: Job, node: Node, places: Places) -> Part:
        """What has to run for the value of `node`."""
        graph = job.graph
        need = _Need(self, job, places, [node])
        part = Part(self._graph(graph), frozenset(need.prompted), False)
        self._carry_out(part, graph, need)
        wanted = [i for i in sorted(need.nodes) if _is_worth_keeping(graph.nodes[i])]
        wanted += need.others()
        for index in dict.fromkeys((*wanted, node.index)):
            cell = part.cells[index] = Cell()
            keep = part.graph.append(CALL, KEEP, (graph.nodes[index], cell))
            part.graph.saves.append((keep, Box(len(part.graph.saves))))
        for invoke, stop in need.stops.items():
            ends = [block for block, end in enumerate(places.chain) if end <= stop]
            start = part.resume.starts[invoke][0] if invoke in part.resume.starts else -1
            if ends and ends[-1] > start and invoke in need.prompted and stop[0] == 0:
                part.resume.keeps[invoke] = ends[-1]
        return part

    def count(self, job: Job, invoke: int, step: int, places: Places) -> Part:
        """What has to run to tell whether the generation of an invoke has a step.

        The first time that is all of it: where a loop only reads, no other run is needed. Where it
        writes, how far the next round's step.
        """
        need = _Need(self, job, places, job.graph.stops)
        need.pass_by(invoke, HookPoint("", "result"))
        need.close()
        part = Part(self._graph(job.graph), frozenset(need.prompted), False, counts=True)
        part.until = step if self._counted else None
        self._counted = True
        self._carry_out(part, job.graph, need)
        return part

    def rest(self, job: Job, places: Places) -> Part:
        """What has to run at the block's exit."""
        graph = job.graph
        rest = Part(self._graph(graph), None, True, writes=graph.writes)
        rest.graph.saves, rest.graph.rounds = graph.saves, graph.rounds
        rest.graph.writes = graph.writes
        if job.entry.generates or job.uses_output:
            _read_again(rest, graph)
            return rest
        roots = [node for node, _ in graph.saves]
        roots += [n for place, n in graph.writes.items() if self.applied.get(place) is not n]
        need = _Need(self, job, places, roots)
        for place, write in graph.writes.items():
            if self.applied.get(place) is not write:
                need.pass_by(*place)
        need.close()
        rest.only = frozenset(need.prompted)
        rest.graph.writes, rest.writes = {}, {}
        self._carry_out(rest, graph, need)
        return rest

    def _graph(self, graph: Graph) -> Graph:
        part = graph.again()
        part.nodes = list(graph.nodes)
        part.saves.clear()
        for index, value in self.values.items():
            node = graph.nodes[index]
            held = (Cell(value, True),)
            part.nodes[index] = Node(
                index, CALL, KNOWN, held, {}, node.invoke, node.file, node.line
            )
        return part

    def _carry_out(self, part: Part, graph: Graph, need: _Need) -> None:
        part.resume.starts = {i: self.hidden[i] for i in need.floors if i in need.prompted}
        part.graph.stops = need.ends()
        part.writes = part.graph.writes = {
            place: node for place, node in graph.writes.items() if place in need.writes
        }
        _read_again(part, graph)

    def learn(self, part: Part) -> None:
        """Remember what a run has found."""
        for index, cell in part.cells.items():
            if cell.full and _may_be_kept(part.graph.nodes[index], cell.value):
                self.values[index] = cell.value
        self.hidden.update(part.resume.found)
        self.applied.update(part.writes)


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One run: of a job, or of a part of it.

    Attributes:
        job: what runs; of a part, with its graph.
        part: None for the whole.
        known: what earlier runs of the same block have found; None where there are none.
    """

    job: Job
    part: Part | None = None
    known: Known | None = None


class _Need:
    """What the values of some nodes need of the forward.

    Attributes:
        nodes: the indices of the nodes to compute; known ones are none of them.
        reads: those that are reads.
        stops: for each invoke that runs, the position of the last read.
        writes: the places whose writes have to be carried out.
        floors: for each invoke that starts later, where.
        whole: the invokes that see the whole batch.
    """

    def __init__(self, known: Known, job: Job, places: Places, roots: Iterable[Node]) -> None:
        self._known = known
        self._job = job
        self._graph = job.graph
        self._places = places
        self._roots = list(roots)
        self._passed: list[Place] = []
        self.whole = {i for i, p in enumerate(job.prompts) if p is None}
        written = any(place[0] in self.whole for place in self._graph.writes)
        self._mixed = written
        self.floors: dict[int, Position] = {}
        if not job.entry.generates and not self._mixed:
            self.floors = {i: places.chain[block] for i, (block, _) in known.hidden.items()}
        several = len(job.prompts) - len(self.whole) > 1
        if self.floors and several and self._looks_inside():
            self.floors.clear()
        self.close()

    def pass_by(self, invoke: int, point: HookPoint) -> None:
        """The forward of an invoke has to get to a place."""
        self._passed.append((invoke, point))

    def close(self) -> None:
        while not self._closed():
            pass

    def _closed(self) -> bool:
        """Find all that is needed; False if something lies before where an invoke starts."""
        self.nodes: set[int] = set()
        self.reads: set[int] = set()
        self.stops: dict[int, Position] = {}
        self.writes: set[Place] = set()
        stack = list(self._roots)
        for invoke, point in self._passed:
            if not self._reach(invoke, point):
                return False
        while True:
            while stack:
                node = stack.pop()
                if node.index in self.nodes or node.index in self._known.values:
                    continue
                self.nodes.add(node.index)
                if node.kind != READ:
                    stack.extend(arguments(node))
                    continue
                self.reads.add(node.index)
                if not self._reach(node.invoke, node.target):
                    return False
            for place, write in self._graph.writes.items():
                if place not in self.writes and self._comes_by(*place):
                    self.writes.add(place)
                    stack.append(write)
            # A stop waits for what was recorded before it, which may be other prompts'.
            stack += [node for node in self.ends() if node.index not in self.nodes]
            if not stack:
                return True

    def _reach(self, invoke: int, point: HookPoint) -> bool:
        """Let an invoke run up to a place; False if it then has to start earlier than thought."""
        at = self._places.of(point)
        if invoke in self.whole and not self._mixed:
            self._mixed = True
            self.floors.clear()
            return False
        floor = self.floors.get(invoke)
        if floor is not None and (at is None or not _is_after(at, floor, point)):
            del self.floors[invoke]
            return False
        key = -1 if self._mixed else invoke
        self.stops[key] = max(self.stops.get(key, _FIRST), at or _LAST)
        return True

    def _comes_by(self, invoke: int, point: HookPoint) -> bool:
        """True if an invoke, on its way, comes by a place that is written."""
        stop = self.stops.get(-1 if self._mixed else invoke)
        if stop is None:
            return False
        at = self._places.of(point)
        if at is None:
            return True
        if at < self.floors.get(invoke, _FIRST):
            return False
        # What sees the whole batch sees what prompts have written at that place.
        return at < stop or (at == stop and (self._mixed or (invoke, point) in self._passed))

    def _looks_inside(self) -> bool:
        """True if a place where rows may not join others is looked at anywhere in the block."""
        schedule = self._places.schedule()
        assert schedule is not None
        points = {
            HookPoint(path, port)
            for path in schedule.chain
            for port in ("inputs", "output")
            if tensors_in(schedule.visits[path, port, 0].axes) > 1
        }
        return any(node.kind == READ and node.target in points for node in self._graph.nodes)

    @property
    def prompted(self) -> set[int]:
        """The prompts that run."""
        if self._mixed and self.stops:
            return {i for i, p in enumerate(self._job.prompts) if p is not None}
        return set(self.stops)

    def ends(self) -> list[Node]:
        """The stops that count. Those of prompts that do not run would end the others."""
        if not self._graph.stops:
            return []
        runs = self.prompted | self.whole
        return [node for node in self._graph.stops if node.invoke in runs]

    def others(self) -> Iterator[int]:
        """Further reads that this run comes by, and that may be asked for later."""
        for node in self._graph.nodes:
            if (
                node.kind != READ
                or node.index in self.nodes
                or node.index in self._known.values
                or (node.invoke in self.whole and not self._mixed)
            ):
                continue
            stop = self.stops.get(-1 if self._mixed else node.invoke)
            at = self._places.of(node.target)
            floor = self.floors.get(node.invoke)
            if stop is None or at is None or at > stop:
                continue
            if floor is None or _is_after(at, floor, node.target):
                yield node.index


def _is_after(at: Position, floor: Position, point: HookPoint) -> bool:
    # The forward's own output holds what skipped blocks would have given.
    return at >= floor and bool(point.path)


def _is_worth_keeping(node: Node) -> bool:
    """Views are taken again at no cost, and a stop stops each run."""
    if is_stop(node):
        return False
    if node.kind == CALL:
        return node.target is not PUT and node.target.effect is not VIEW
    return node.kind not in (PARAMETER, WRITE)


def _read_again(part: Part, graph: Graph) -> None:
    """Let what is written back stand in what this run brings: beside the part that is changed, a
    module takes what depends on the batch, as a mask does. The run comes by the place in any case."""
    stack = [write.args[0] for write in part.writes.values()]
    while stack:
        node = stack.pop()
        if type(node) is not Node:
            continue
        known = part.graph.nodes[node.index]
        if known.target is KNOWN and not isinstance(known.args[0].value, torch.Tensor):
            part.graph.nodes[node.index] = node
        does = node.guarded if node.target is GUARDED else node
        if does.target is PUT:
            stack.append(does.args[0])
        elif does.target is SELECT:
            stack += does.args[2:]


def _may_be_kept(node: Node, value: Any) -> bool:
    """False for what belongs to one run, as a cache that the model goes on filling does."""
    if node.kind == CALL and node.target is APPLY:
        return True
    return all(isinstance(leaf, torch.Tensor) or type(leaf) in ATOMS for leaf in leaves(value))


def resume(work: Plan, part: Part, chain: tuple[str, ...]) -> None:
    """Let a planned part start from the hidden states of earlier runs, and keep its own."""
    for one in work.passes:
        shares = one.base or one.cut > 0
        starts = {i: part.resume.starts[i][0] + 1 for i in one.invokes if i in part.resume.starts}
        assert not (shares and starts), "what was computed before is planned again"
        if starts:
            one.starts.update(starts)
            before = list(one.invokes)
            one.invokes.sort(key=lambda i: one.starts.get(i, 0))
            if one.seams is not None and one.invokes != before:
                one.seams = []
        if not shares:
            # Before the last start, not all rows have joined.
            last = max(one.starts.values(), default=0)
            wanted = {part.resume.keeps[i] for i in one.invokes if i in part.resume.keeps}
            one.keep.update(block for block in wanted if block >= last)
    work.chain, work.resume = chain, part.resume


def _generators() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states += torch.cuda.get_rng_state_all()
    return states


def _set_generators(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


@contextmanager
def same_draws(known: Known, last: bool) -> Iterator[None]:
    """Let all runs of a block draw the same random numbers.

    What the user draws between them is left alone.
    """
    before = _generators()
    if known.random is None:
        known.random = before
    first = known.random
    _set_generators(first)
    try:
        yield
    finally:
        if not last or not torch.equal(before[0], first[0]):
            _set_generators(before)


def own_draws(known: Known, invoke: int, first: bool) -> None:
    """Let a pass draw what its only prompt draws in each run of its block, whoever runs before it."""
    if known.random is None:
        return
    if first:
        _set_generators(known.random)
    else:
        torch.manual_seed(zlib.crc32(known.random[0].numpy().tobytes()) + invoke)


@contextmanager
def gradients_untouched(graph: Graph, parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Let a run leave no gradients behind: the block's last run leaves them."""
    with _without_gradients((*parameters, *_captured(graph))):
        yield


@contextmanager
def gradients_as_asked(graph: Graph, module: torch.nn.Module) -> Iterator[None]:
    """Let the backwards of a run leave the gradients of a model's parameters as they were.

    But for those that are asked for: those that the block names, as in `loss.backward(inputs=…)` or by
    their `.grad`, and all that are trained where the user has frozen others, as for an adapter.
    """
    parameters = list(module.parameters())
    # Tables of positions are frozen in some classes of models, and nobody chose that.
    tables = {
        id(parameter)
        for child in module.modules()
        if isinstance(child, torch.nn.Embedding)
        for parameter in child._parameters.values()
    }
    chosen = any(
        not one.requires_grad and type(one) is torch.nn.Parameter and id(one) not in tables
        for one in parameters
        if one.is_floating_point()
    )
    named = {id(tensor) for tensor in _captured(graph)}
    places = {node.target.node for node in graph.nodes if type(node.target) is GradPoint}
    places.update(one for node in graph.backwards for one in arguments(node))
    own = dict(module.named_parameters(remove_duplicate=False))
    named |= {id(own.get(str(one.target))) for one in places if one.kind == PARAMETER}
    with _without_gradients(
        one for one in parameters if id(one) not in named and not (chosen and one.requires_grad)
    ):
        yield


def _captured(graph: Graph) -> Iterator[torch.Tensor]:
    """The tensors from outside that a block uses."""
    for node in graph.nodes:
        for leaf in leaves((node.args, node.kwargs)):
            if type(leaf) is Captured:
                yield leaf.tensor


@contextmanager
def _without_gradients(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Give the gradients of leaves back as they were."""
    held = [(tensor, tensor.grad) for tensor in tensors if tensor.is_leaf]
    for tensor, _ in held:
        tensor.grad = None
    try:
        yield
    finally:
        for tensor, grad in held:
            tensor.grad = grad
