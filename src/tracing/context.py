"""Owns the blocks: `Tracer` (the outer `with`), `Invoker` (the inner one) and the current block.

The current block is a ContextVar, the package's only global state: threads and asyncio tasks do
not see each other's blocks.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import MethodType, TracebackType
from typing import Any, Protocol

import torch

from .branches import Cond, record_stop
from .cache import Cache
from .errors import (
    BlockAttributeError,
    BlockError,
    Location,
    NotRunError,
    OperationError,
    ScheduleError,
    near,
)
from .experiment import Experiment
from .frames import entry
from .graph import Graph
from .job import Entry, Job, Outcome, Recorded
from .node import READ, HookPoint, Later, Node, user_line
from .operations import STOP
from .proxy import Handle, Proxy, save_all
from .recording import ABANDONED, DONE, FAILED, OPEN, RUNNING, Oracle, Recording
from .steps import Iter, Steps
from .structure import columns_of, leaves, map_leaves
from .template import Template


class Exit:
    """`__exit__` of a block, which notes on which `with` statement the block is open.

    A `with` looks its `__exit__` up before it enters and keeps what it got to its end, so the block
    knows that it was left also where a Ctrl-C came before the first line of `__exit__`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __get__(self, block: Block | None, owner: Any = None) -> Any:
        if block is None:
            return self._function
        method = MethodType(self._function, block)
        if not block.entered:
            block.statement = weakref.ref(method)
        return method


class Block:
    """What may be open in a thread: a block or a session of blocks.

    Attributes:
        location: the user's line.
        outer: the session that it was opened in.
        entered: it is or was open.
        left: it has ended.
        statement: what its `with` holds to its end; None where there is no such statement.
    """

    model: Any
    recording: Recording
    location: Location
    outer: Block | None = None
    entered = left = False
    statement: weakref.ref[Any] | None = None

    def open(self) -> None:
        """Make this the block that is open in this thread and task."""
        self.outer = open_block()
        self.entered = True
        current_block.set(self)

    def close(self) -> None:
        """Make the block around this one the open one, and end what is left open inside this one."""
        self.left = True
        chain = _chain()
        if self in chain:
            for inner in chain[: chain.index(self)]:
                inner.abandon()
            current_block.set(self.outer)

    def is_open(self) -> bool:
        # A task that was started in a block, or a generator that was closed elsewhere, still has it.
        return not self.left and (self.statement is None or self.statement() is not None)

    def abandon(self) -> None:
        """End it without running it."""
        self.left = True

    def admit(self, tracer: Tracer) -> Block | None:
        """Who runs a block that opens inside this one; None if it runs by itself.

        Raises:
            BlockError: no block may open here.
        """
        raise BlockError.block_in_block(self.location)

    def leave(self, tracer: Tracer, abandoned: bool) -> None:
        """A block that was taken in ends."""


#: The block that is open in this thread and task.
current_block: ContextVar[Block | None] = ContextVar("graftwork_block", default=None)


def _chain() -> list[Block]:
    """The innermost block of this thread and task, and those that it was opened in."""
    found, block = list[Block](), current_block.get()
    while block is not None:
        found.append(block)
        block = block.outer
    return found


def open_block() -> Block | None:
    """The block that is open in this thread and task. Those that were left are forgotten, with what
    is inside them."""
    chain = _chain()
    over = [number for number, block in enumerate(chain) if not block.is_open()]
    if not over:
        return current_block.get()
    for block in chain[: over[-1] + 1]:
        block.abandon()
    outer = chain[over[-1]].outer
    current_block.set(outer)
    return outer


def reset() -> None:
    """Close what is open in this thread and task, without running it.

    For a block whose `with` cannot be left: of a generator that waits, of a bare `__enter__`, of a
    notebook cell that was killed. Does nothing where no block is open.
    """
    for block in _chain():
        block.abandon()
    current_block.set(None)


def current_tracer() -> Tracer | None:
    """The block that is open in this thread and task."""
    block = current_block.get()
    return block if isinstance(block, Tracer) and block.is_open() else None


class Backend(Protocol):
    """What a block needs of the model: reading prompts, and running the finished block."""

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Turn an invoke's arguments into a prompt. Raises InputError."""

    def run(self, job: Job, known: Any = None) -> Outcome:
        """Run a job.

        Args:
            known: what runs of the block, while it was written, have found.
        """

    def remember(self) -> Any:
        """What the runs of a block that is still written will have found."""

    def demand(self, job: Job, node: Node, known: Any) -> Any:
        """Run what is recorded so far as far as the value of `node` needs it, and return that."""

    def module_paths(self, modules: Any) -> list[str]:
        """The paths of the modules that a cache names; None names all. Raises UnknownModuleError."""

    def most_steps(self, entry: Entry, prompt: Any) -> int:
        """How many forwards a generation can have at most."""

    def may_end(self, entry: Entry) -> bool:
        """True if a generation may end before it has had its most steps."""

    def reaches(self, job: Job, invoke: int, step: int, known: Any) -> bool:
        """True if the generation of an invoke has that step, by what is recorded so far."""

    def check_repeats(self, job: Job) -> None:
        """Raises BlockError for a block that cannot run again."""

    def lasting_edits(self) -> list[Template]:
        """The lasting changes of the model, for every prompt, in the order in which they apply."""

    def early_check(self, written: Recording) -> Callable[[], None] | None:
        """What checks the operations of the block at their lines; None if that can wait."""

    def explain(self, job: Job) -> Any:
        """A text about the plan of the block."""

    def oracle(self, written: Recorded) -> Oracle:
        """Answers about shapes for this block."""


class Invoker:
    """One prompt (or several) in a block; `with tracer.invoke(prompt) as invoker:`.

    Attributes:
        index: position among the block's invokes.
        prompt: what the model read from the arguments; None sees the whole batch.
        location: the user's line.
        stopped: after a generation that `stop()` ended, the step after which it did.
        output: after a generation, this invoke's own rows of the result, without padding.
        begins_with: after a generation of a decoder, how many tokens it began with.
    """

    def __init__(
        self, recording: Recording, generates: bool, index: int, prompt: Any, location: Location
    ) -> None:
        self._recording = recording
        self._generates = generates
        self.index = index
        self.prompt = prompt
        self.location = location
        self.output: Any = None
        self.stopped: int | None = None
        self.begins_with: int | None = None
        self._step = 0

    def __enter__(self) -> Invoker:
        recording = self._recording
        if recording.state is not OPEN:
            raise BlockError.closed("invoke")
        if recording.invoke >= 0:
            raise BlockError.nested()
        recording.invoke, recording.step = self.index, self._step
        return self

    def __exit__(self, *exception: Any) -> None:
        recording = self._recording
        if recording.caches:
            pending = recording.caches.copy()
            recording.caches.clear()
            for cache, steps in pending if exception[0] is None else ():
                recording.step = 0
                cache.record(steps)
        self._step = recording.step
        recording.invoke, recording.step = -1, 0

    @property
    def mask(self) -> torch.Tensor:
        """Which entries of a value [row, token, …] are own tokens of the prompt: bool [row, token].

        In a generation it is that of the open step. Of an invoke without input it is the whole batch's,
        and known while that invoke is open.

        Raises:
            BlockError: the rows are not known here.
        """
        recording = self._recording
        if recording.state is OPEN and recording.invoke == self.index:
            recording.asked.add(self.index)
            if recording.loop is not None:
                raise BlockError(
                    "`mask` was asked for in what is recorded once for several steps or prompts: use "
                    "`.t.mean()` and the like there, or record each step, `for step in tracer.iter[…]`."
                )
            return recording.ask().mask(self.index, recording.step)
        if self.prompt is None:
            raise BlockError(
                "the mask of an invoke without input is that of the whole batch: ask for it inside."
            )
        return columns_of(self.prompt.spans, self.prompt.width)

    def next(self, steps: int = 1) -> Invoker:
        """What follows applies to the next generated token (or the one `steps` further on)."""
        recording = self._recording
        if recording.state is not OPEN or recording.invoke != self.index:
            raise BlockError.closed("invoker.next()")
        if not self._generates:
            raise BlockError(
                "`next()` was called in a trace, which is one forward. Use `model.generate(...)`."
            )
        if type(steps) is bool or not hasattr(steps, "__index__") or steps < 0:
            raise BlockError(
                f"`next({steps!r:.60})`: it takes how many steps to go on, a whole number: steps only "
                "go forward."
            )
        recording.step += steps.__index__()
        return self


class Tracer(Block):
    """A block: `with model.trace(...) as tracer:` or `with model.generate(...) as generator:`.

    Attributes:
        model: the root of the module tree that the block is about.
        generates: True for `generate`.
        kwargs: passed to `forward` or to `generate`.
        invokes: in the order they were opened.
        uses_output: `output` was used inside the block, so the forward must not stop early.
        settings: which passes of the planner run.
        recording: the graph and its state.
    """

    def __init__(
        self,
        model: Any,
        backend: Backend,
        *,
        generates: bool,
        args: tuple[Any, ...],
        prompt_kwargs: dict[str, Any],
        kwargs: dict[str, Any],
        settings: Any = None,
    ) -> None:
        self.model = model
        self.generates = generates
        self.kwargs = kwargs
        self.settings = settings
        self.invokes: list[Invoker] = []
        self._backend = backend
        self._result: Any = None
        self.uses_output = False
        self._session: Block | None = None
        self.location = user_line(3)
        self._is_alone = False
        self._edits: tuple[Template, ...] = ()
        self.recording = Recording(Entry(generates, kwargs))
        self.recording.oracle = backend.oracle(self.recording)
        self.recording.compute = self._compute
        self.recording.early = backend.early_check(self.recording)
        if generates:
            self.recording.reaches = self._reaches
            self.recording.no_gradients = "transformers generates without gradients: use `trace`"
        self._implicit: Invoker | None = None
        if args or prompt_kwargs:
            prompt = backend.prepare(args, prompt_kwargs)
            self._implicit = self._append(prompt, self.location)
            self._place_edits(self._implicit)

    def _append(self, prompt: Any, location: Location) -> Invoker:
        invoker = Invoker(self.recording, self.generates, len(self.invokes), prompt, location)
        self.invokes.append(invoker)
        self.recording.prompts.append(prompt)
        return invoker

    def job(self) -> Job:
        """What is recorded, as data."""
        recording = self.recording
        return Job(
            recording.graph,
            tuple(recording.prompts),
            tuple(invoker.location for invoker in self.invokes),
            recording.entry,
            self.location,
            self.settings,
            self.uses_output,
            self._edits,
            recording.seen,
        )

    @property
    def graph(self) -> Graph:
        """The recorded operations; `print(tracer.graph)` shows one a line."""
        return self.recording.graph

    @entry
    def invoke(self, *args: Any, **kwargs: Any) -> Invoker:
        """Open a prompt in this block.

        Args:
            *args: a string, a list of strings, token ids (list or tensor [token] or
                [batch, token]), or a mapping with `input_ids`. Nothing: the invoke sees the whole
                batch of the others, with its padding.
            **kwargs: model inputs by name, such as `input_ids` and `attention_mask`.

        Raises:
            InputError: the prompt cannot be read.
            BlockError: the block is closed or already has its prompt.
        """
        if self.recording.state is not OPEN or (self.recording.session and not self._session):
            raise BlockError.closed("invoke")
        if self.recording.invoke >= 0:
            raise BlockError.has_input() if self._implicit else BlockError.nested()
        if not args and not kwargs:
            return self._append(None, user_line(2))
        asked = self.recording.asked
        early = next((i for i in self.invokes if i.prompt is None and i.index in asked), None)
        if early is not None:
            raise BlockError.late_prompt(early.location)
        invoker = self._append(self._backend.prepare(args, kwargs), user_line(2))
        self._place_edits(invoker)
        return invoker

    def _place_edits(self, invoker: Invoker) -> None:
        """Record the lasting changes of the model for a new prompt."""
        edits = self._backend.lasting_edits()
        if edits:
            self._edits = tuple(edits)
            entry = self.recording.entry
            most = self._backend.most_steps(entry, invoker.prompt) if self.generates else 1
            for step in range(most):
                for template in edits:
                    template.place(self.recording, step, invoker.index)

    @property
    def output(self) -> Any:
        """What the entry point returns: token ids [prompt, token] of a generation, or the forward's
        own output. A trace stops early unless this is used inside the block.

        Inside an invoke it is that prompt's part, elsewhere the whole batch's.

        Raises:
            NotRunError: after a trace in which it was not used.
        """
        recording = self.recording
        if recording.state is OPEN and not self.entered:
            return self._alone()
        if recording.state is OPEN:
            port = "result" if self.generates else "output"
            invoke = recording.invoke
            if invoke < 0:
                invoke = self._whole_batch()
            self.uses_output = True
            return read_in(recording, invoke, HookPoint("", port))
        if recording.state is ABANDONED:
            raise NotRunError.abandoned("The block's output")
        if recording.state is FAILED:
            raise NotRunError.failed("The block's output", self.location)
        if not self.generates and not self.uses_output:
            raise NotRunError.output()
        return self._result

    def _alone(self) -> Any:
        """What the entry point returns, of a call without `with`: the block runs with nothing in it."""
        if self.recording.state is OPEN and not self.entered:
            if self._implicit is None:
                raise BlockError.empty()
            with self:
                _ = self.output  # as it is: a save would copy it
            self._is_alone = True
        if not self._is_alone:
            name = "generator" if self.generates else "tracer"
            raise OperationError(
                f"a block is no value: what it returns is `{name}.output`, and what a module returns "
                "is saved in it, `module.output.save()`."
            )
        return self._result

    # A plain call, `model.generate(prompt, max_new_tokens=2)[0]`, is its result.

    @entry
    def __getitem__(self, key: Any) -> Any:
        return self._alone()[key]

    @entry
    def __len__(self) -> int:
        return len(self._alone())

    @entry
    def __iter__(self) -> Iterator[Any]:
        return iter(self._alone())

    def __bool__(self) -> bool:
        return True

    @entry
    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if self.entered and not self._is_alone:
            known = [known for known in dir(type(self)) if not known.startswith("_")]
            raise BlockAttributeError(f"a block has no `{name}`. {near(name, known)}")
        if self._implicit is None:
            raise BlockAttributeError(
                f"`.{name}` of a block that is not open: write `with model.trace(...) as tracer:`."
            )
        found = self._alone()
        if not hasattr(found, name):
            known = [known for known in dir(found) if not known.startswith("_")]
            raise BlockAttributeError(
                f"what this block returns ({type(found).__name__}) has no `{name}`. {near(name, known)}"
            )
        return getattr(found, name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def plain(leaf: Any) -> Any:
            return leaf._alone() if isinstance(leaf, Tracer) else leaf

        return function(*map_leaves(plain, args), **map_leaves(plain, kwargs or {}))

    @property
    def result(self) -> Any:
        """The same as `output`."""
        return self.output

    def barrier(self, count: int) -> Callable[[], None]:
        """Accepted from code that lets invokes wait for each other. Here the order in which they are
        written does not matter: a value of one may be used in any other."""
        return lambda: None

    def _whole_batch(self) -> int:
        for invoker in self.invokes:
            if invoker.prompt is None:
                return invoker.index
        return self._append(None, user_line(3)).index

    @entry
    def explain(self) -> Any:
        """What the planner makes of the block: passes, batches, what is skipped, estimated work.

        Returns:
            Text that shows itself in a notebook; `print(tracer.explain())` elsewhere.
        """
        self._settle()
        return self._backend.explain(self.job())

    def _settle(self) -> None:
        if settle(self.graph):
            self.recording.known = None  # by numbers that the nodes no longer have

    def scans(self, backend: Backend) -> None:
        """Let another backend end this block, which has no values."""
        self._backend = backend
        self.location = user_line(3)
        self.recording.no_values = "inside `scan` there are no values"

    def _compute(self, node: Node) -> Any:
        backend = self._backend
        return self._run_early([node], lambda: backend.demand(self.job(), node, self._known()))

    def _known(self) -> Any:
        recording = self.recording
        if recording.known is None:
            recording.known = self._backend.remember()
        return recording.known

    def _reaches(self, step: int) -> bool:
        invoke, stops = self.recording.invoke, self.graph.stops
        if any(invoker.prompt is not None for invoker in self.invokes):
            self.recording.asked.add(invoke)
        ends = (node for node in stops if node.invoke == invoke and node.target is STOP)
        if any(node.args[0] < step for node in ends):
            return False
        backend = self._backend
        if not stops and not backend.may_end(self.recording.entry):
            return True
        if all(prompt is None for prompt in self.recording.prompts):
            return True  # its prompts come later
        found: bool = self._run_early(
            stops, lambda: backend.reaches(self.job(), invoke, step, self._known())
        )
        return found

    def _run_early(self, roots: list[Node], run: Callable[[], Any]) -> Any:
        """Run something of the block while it is written."""
        # What a function of the user does in this run is not written in the block.
        token = current_block.set(None)
        try:
            if self.recording.session is not None:
                _compute_earlier(self.graph, roots)
            self._settle()
            return run()
        finally:
            current_block.reset(token)

    def compile(self) -> Experiment:
        """The block as an experiment that runs again on other prompts. See `Experiment`."""
        first = [invoker.prompt for invoker in self.invokes if invoker.prompt is not None]
        if not first:
            raise BlockError.empty()
        if self.recording.looped:
            raise BlockError(
                "a block with `with tracer.iter[…]` cannot be compiled; use a `for` loop."
            )
        backend, recorded = self._backend, self.job()
        backend.check_repeats(recorded)

        def run(graph: Graph, prompts: tuple[Any, ...]) -> None:
            new = [backend.prepare((prompt,), {}) for prompt in prompts] or first
            experiment.check(new)
            rest = iter(new)
            own = tuple(None if one is None else next(rest) for one in recorded.prompts)
            settle(graph)
            job = dataclasses.replace(recorded, graph=graph, prompts=own, seen=object())
            try:
                backend.run(job)
            finally:
                graph.release()

        experiment = Experiment(self.graph, first, run, self._sized())
        return experiment

    def _sized(self) -> Node | None:
        """A value whose size was told in the block and is another one for other prompts."""
        if not self.recording.sized:
            return None
        oracle = self._backend.oracle(self.recording)
        for node in dict.fromkeys(self.recording.sized):
            try:
                if None in oracle.sizes(node):
                    return node
            except ScheduleError:
                return node
        return None

    @property
    def iter(self) -> Iter:
        """Steps of the generation, for the open invoke: `with tracer.iter[0:3] as step:` is recorded
        once and its saved values become lists; `for step in tracer.iter[0:3]:` records each step.

        Raises:
            BlockError: the block is a trace, which is one forward.
        """
        if not self.generates:
            raise BlockError.forward()
        return Iter(self.recording, self._most_steps)

    def all(self) -> Steps:
        """All steps of the generation: `iter[:]`."""
        return self.iter[:]

    def cond(self, condition: Any) -> Cond:
        """A branch: what is written in it happens where `condition` holds, for the open invoke.

        Both branches are recorded, so nothing has to be known while the block is written. What was
        saved in a branch that was not taken has no value; in a loop over steps it is left out.

        Args:
            condition: a value of one element.

        Raises:
            BlockError: no invoke is open.
        """
        return Cond(self.recording, condition, True)

    def otherwise(self) -> Cond:
        """The other branch of the `cond` that ended directly before.

        Raises:
            BlockError: there is none.
        """
        return Cond(self.recording, None, False)

    def stop(self) -> None:
        """End the run of the open invoke here, when what it has recorded so far has been computed.

        A trace leaves the forward. A generation ends with the token of this step, for this invoke's
        prompts alone; with `cond`, at the step where a condition holds. What is recorded after it for
        later modules or steps has no value.

        Raises:
            BlockError: no invoke is open.
        """
        if self.recording.state is not OPEN or self.recording.invoke < 0:
            raise BlockError.no_invoke("tracer.stop()")
        record_stop(self.recording)

    def cache(
        self,
        modules: Any = None,
        device: Any = None,
        dtype: Any = None,
        include_inputs: bool = False,
    ) -> Cache:
        """Keep what many modules return, as it is after all edits of this invoke.

        Args:
            modules: modules, their paths, or patterns such as "transformer.h.*"; None for all.
            device: where the values go as they arrive; None leaves them where they are.
            dtype: what floating values become.
            include_inputs: keep what the modules are called with, too.

        Raises:
            BlockError: no invoke is open.
            UnknownModuleError: there is no such module.
        """
        recording = self.recording
        if recording.state is not OPEN or recording.invoke < 0:
            raise BlockError.no_invoke("tracer.cache()")
        paths = self._backend.module_paths(modules)
        cache = Cache(recording, paths, device, dtype, include_inputs)
        recording.caches.append((cache, self.all() if self.generates else None))
        return cache

    def _most_steps(self) -> int:
        prompt = self.invokes[max(self.recording.invoke, 0)].prompt
        return self._backend.most_steps(self.recording.entry, prompt)

    @property
    def mask(self) -> torch.Tensor:
        """As `Invoker.mask`, for a block that was given its prompt directly."""
        if self._implicit is None:
            raise BlockError("`mask` belongs to an invoke: write `invoker.mask`.")
        return self._implicit.mask

    def next(self, steps: int = 1) -> Invoker:
        """As `Invoker.next`, for a block that was given its prompt directly."""
        if self._implicit is None:
            raise BlockError("`next()` belongs to an invoke: write `invoker.next()`.")
        return self._implicit.next(steps)

    def __repr__(self) -> str:
        name = "generate" if self.generates else "trace"
        if self.recording.state is OPEN and not self.entered:
            return f"<{name} block that is not open: write `with model.{name}(...) as tracer:`>"
        prompts = sum(invoker.prompt is not None for invoker in self.invokes)
        state = self.recording.state
        return f"<{name} block, {state}: {prompts} prompts, {len(self.graph)} operations>"

    def __enter__(self) -> Tracer:
        if self.recording.state is not OPEN or self.entered:
            raise BlockError.closed("with")
        outer = open_block()
        if outer is not None:
            self._session = outer.admit(self)
        if self._implicit is not None:
            self._implicit.__enter__()
        self.open()
        return self

    @Exit
    @entry
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        recording = self.recording
        if self.left:
            if kind is None:
                raise BlockError.was_reset(self.location)
            return
        self.close()
        for container in recording.containers if kind is None else ():
            save_all(container)
        if self._implicit is not None and recording.caches:
            self._implicit.__exit__(kind, error, traceback)
        session, self._session = self._session, None
        if session is not None:
            session.leave(self, kind is not None)
        if kind is not None:
            recording.close(ABANDONED)
        elif session is None:
            self.run()

    def abandon(self) -> None:
        super().abandon()
        session, self._session = self._session, None
        if session is not None:
            session.leave(self, True)
        if self.recording.state is OPEN:
            self.recording.close(ABANDONED)

    def run(self) -> None:
        """End the block: run it, once its `with` has ended."""
        recording = self.recording
        recording.invoke = -1
        recording.state = RUNNING
        try:
            self._settle()
            outcome = self._backend.run(self.job(), recording.known)
            self._result = outcome.result
            for invoker in self.invokes:
                invoker.output = outcome.outputs.get(invoker.index)
                invoker.stopped = outcome.stopped.get(invoker.index)
                invoker.begins_with = outcome.begins_with.get(invoker.index)
            recording.close(DONE)
        finally:
            if recording.state is RUNNING:
                recording.close(FAILED)


def settle(graph: Graph) -> bool:
    """Complete a graph before it runs. True if its nodes have other numbers then."""
    if graph.stops:
        graph.extend_stops()
    return bool(graph.passed) and graph.settle()


def _compute_earlier(graph: Graph, roots: list[Node]) -> None:
    """Compute the values of earlier blocks that a value on demand may need."""
    stack, seen = [*roots, *graph.writes.values()], set[int]()
    while stack:
        one = stack.pop()
        if one.index in seen:
            continue
        seen.add(one.index)
        for leaf in leaves((one.args, one.kwargs)):
            if type(leaf) is Node:
                stack.append(leaf)
            elif type(leaf) is Later and not leaf.ready:
                source = leaf.source
                assert source is not None
                leaf.found = source.demand(leaf.node, "a value of an earlier block")
                leaf.ready = True


def read_in(
    recording: Recording, invoke: int, hook_point: HookPoint, kind: type[Handle] = Handle
) -> Proxy:
    """The proxy of what is at `hook_point` for `invoke`: what arrives there, or the last write."""
    place = (invoke, hook_point)
    proxy: Proxy | None = recording.current.get(place)
    if proxy is None:
        node = recording.graph.append(READ, hook_point, (), None, invoke)
        proxy = recording.current[place] = kind(recording, node, place)
    return proxy
