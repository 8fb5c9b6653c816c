"""Owns the blocks: `Tracer` (the outer `with`), `Invoker` (the inner one) and the current block.

The current block is a ContextVar, the package's only global state: threads and asyncio tasks do
not see each other's blocks.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Protocol

from .errors import BlockError, Location, NotRunError
from .experiment import Experiment
from .graph import Graph
from .node import READ, HookPoint, user_line
from .proxy import Proxy
from .recording import ABANDONED, DONE, FAILED, OPEN, RUNNING, Oracle, Recording

#: The block that is open in this thread and task.
current_block: ContextVar[Tracer | None] = ContextVar("graftwork_block", default=None)


def current_tracer() -> Tracer | None:
    """The block that is open in this thread and task."""
    return current_block.get()


class Backend(Protocol):
    """What a block needs of the model: reading prompts, and running the finished block."""

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Turn an invoke's arguments into a prompt. Raises InputError."""

    def execute(self, tracer: Tracer) -> Any:
        """Run the block and return what the entry point returned, or None if it stopped early."""

    def explain(self, tracer: Tracer) -> Any:
        """A text about the plan of the block."""

    def oracle(self, tracer: Tracer) -> Oracle:
        """Answers about shapes for this block."""


class Invoker:
    """One prompt (or several) in a block; `with tracer.invoke(prompt) as invoker:`.

    Attributes:
        index: position among the block's invokes.
        prompt: what the model read from the arguments; None sees the whole batch.
        location: the user's line.
        output: after a generation, this invoke's own rows of the result, without padding.
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
        self._step = recording.step
        recording.invoke, recording.step = -1, 0

    def next(self, steps: int = 1) -> Invoker:
        """What follows applies to the next generated token (or the one `steps` further on)."""
        recording = self._recording
        if recording.state is not OPEN or recording.invoke != self.index:
            raise BlockError.closed("invoker.next()")
        if not self._generates:
            raise BlockError(
                "`next()` was called in a trace, which is one forward. Use `model.generate(...)`."
            )
        if steps < 0:
            raise BlockError(f"`next({steps})`: steps only go forward.")
        recording.step += steps
        return self


class Tracer:
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
        self._token: Token[Tracer | None] | None = None
        self.location = user_line(3)
        self.recording = Recording(backend.oracle(self), generates)
        self._implicit: Invoker | None = None
        if args or prompt_kwargs:
            prompt = backend.prepare(args, prompt_kwargs)
            self._implicit = self._append(prompt, self.location)

    def _append(self, prompt: Any, location: Location) -> Invoker:
        invoker = Invoker(self.recording, self.generates, len(self.invokes), prompt, location)
        self.invokes.append(invoker)
        return invoker

    @property
    def graph(self) -> Graph:
        """The recorded operations; `print(tracer.graph)` shows one a line."""
        return self.recording.graph

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
        if self.recording.state is not OPEN:
            raise BlockError.closed("invoke")
        if self.recording.invoke >= 0:
            raise BlockError.has_input() if self._implicit else BlockError.nested()
        prompt = self._backend.prepare(args, kwargs) if args or kwargs else None
        return self._append(prompt, user_line(2))

    @property
    def output(self) -> Any:
        """What the entry point returns: token ids [prompt, token] of a generation, or the forward's
        own output. A trace stops early unless this is used inside the block.

        Inside an invoke it is that prompt's part, elsewhere the whole batch's.

        Raises:
            NotRunError: after a trace in which it was not used.
        """
        recording = self.recording
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

    def _whole_batch(self) -> int:
        for invoker in self.invokes:
            if invoker.prompt is None:
                return invoker.index
        return self._append(None, user_line(3)).index

    def explain(self) -> Any:
        """What the planner makes of the block: passes, batches, what is skipped, estimated work.

        Returns:
            Text that shows itself in a notebook; `print(tracer.explain())` elsewhere.
        """
        return self._backend.explain(self)

    def compile(self) -> Experiment:
        """The block as an experiment that runs again on other prompts. See `Experiment`."""
        first = [invoker.prompt for invoker in self.invokes if invoker.prompt is not None]
        if not first:
            raise BlockError.empty()

        def run(graph: Graph, prompts: tuple[Any, ...]) -> None:
            again = Tracer(
                self.model,
                self._backend,
                generates=self.generates,
                args=(),
                prompt_kwargs={},
                kwargs=self.kwargs,
                settings=self.settings,
            )
            new = [self._backend.prepare((prompt,), {}) for prompt in prompts] or first
            experiment.check(new)
            rest = iter(new)
            for invoker in self.invokes:
                prompt = None if invoker.prompt is None else next(rest)
                again._append(prompt, invoker.location)
            again.uses_output = self.uses_output
            again.recording.graph = graph
            again._execute()

        experiment = Experiment(self.graph, first, run)
        return experiment

    def next(self, steps: int = 1) -> Invoker:
        """As `Invoker.next`, for a block that was given its prompt directly."""
        if self._implicit is None:
            raise BlockError("`next()` belongs to an invoke: write `invoker.next()`.")
        return self._implicit.next(steps)

    def __repr__(self) -> str:
        name = "generate" if self.generates else "trace"
        if self.recording.state is OPEN and self._token is None:
            return f"<{name} block that is not open: write `with model.{name}(...) as tracer:`>"
        prompts = sum(invoker.prompt is not None for invoker in self.invokes)
        state = self.recording.state
        return f"<{name} block, {state}: {prompts} prompts, {len(self.graph)} operations>"

    def __enter__(self) -> Tracer:
        if self.recording.state is not OPEN or self._token is not None:
            raise BlockError.closed("with")
        if current_block.get() is not None:
            raise BlockError.block_in_block()
        self._token = current_block.set(self)
        if self._implicit is not None:
            self._implicit.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._token is not None
        current_block.reset(self._token)
        recording = self.recording
        if kind is not None:
            recording.close(ABANDONED)
            return
        self._execute()

    def _execute(self) -> None:
        recording = self.recording
        recording.invoke = -1
        recording.state = RUNNING
        try:
            self._result = self._backend.execute(self)
            recording.close(DONE)
        finally:
            if recording.state is RUNNING:
                recording.close(FAILED)


def read_in(
    recording: Recording, invoke: int, hook_point: HookPoint, kind: type[Proxy] = Proxy
) -> Proxy:
    """The proxy of what is at `hook_point` for `invoke`: what arrives there, or the last write."""
    place = (invoke, hook_point)
    proxy: Proxy | None = recording.current.get(place)
    if proxy is None:
        node = recording.graph.append(READ, hook_point, (), None, invoke)
        proxy = recording.current[place] = kind(recording, node, place)
    return proxy
