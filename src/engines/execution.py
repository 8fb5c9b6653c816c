"""Owns one execution of a planned block on a loaded model: its passes, one after the other."""

from __future__ import annotations

import dataclasses
import logging
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Protocol

import torch
from tqdm import tqdm

from ..inputs.changing import Changing
from ..intervention import Pass, Patcher, Plan, Prefix, Run, Schedule, Stop, Task, at_path
from ..intervention.repeats import may_repeat
from ..tracing.errors import ScheduleError
from ..tracing.job import Job, Outcome, Recorded
from .memory import free_memory, is_out_of_memory

logger = logging.getLogger("graftwork")


class Host(Protocol):
    """How a kind of model is entered, and what it makes of the result."""

    @property
    def pads_right(self) -> bool:
        """True if the shorter rows of a batch are padded on the right."""

    def schedule(self, prompt: Any = None, block: Recorded | None = None) -> Schedule: ...

    def apply_module(self, path: str, *args: Any, **kwargs: Any) -> Any: ...

    def parameter(self, path: str) -> torch.Tensor: ...

    def may_stop(self, task: Task, module: torch.nn.Module) -> bool: ...

    def around(
        self,
        task: Task,
        run: Run,
        module: torch.nn.Module,
        prompts: list[Any],
        outcome: Outcome,
    ) -> AbstractContextManager[Any]:
        """What else has to be in place while a pass runs; tells in `outcome` where it ended."""

    def forward(
        self,
        task: Task,
        module: torch.nn.Module,
        one: Pass,
        prompts: list[Any],
        cache: Any,
    ) -> Any:
        """Run the entry point on a batch, with a cache of `make_cache` or None."""

    def make_cache(self, layers: list[tuple[torch.Tensor, torch.Tensor]] | None) -> Any:
        """A cache for the forward, empty or with keys and values of each layer."""

    def read_cache(self, cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer of a cache."""

    def results_by_invoke(
        self, job: Job, outcome: Outcome, prompts: dict[int, Any], result: Any
    ) -> dict[int, Any]:
        """What the entry point returned for each prompt of a pass."""

    def join_results(
        self, job: Job, outcome: Outcome, passes: list[Pass], results: list[Any]
    ) -> None:
        """Put the entry point's result for the whole block into `outcome`."""


class Execution:
    """One execution. The model's lock is held while it runs."""

    def __init__(self, host: Host, task: Task, work: Plan, module: torch.nn.Module) -> None:
        self._host = host
        self._task = task
        self.outcome = Outcome()
        self._plan = work
        self._module = module
        graph = task.job.graph
        self._run = Run(graph, work, host.apply_module, host.parameter)
        shares = any(one.base or one.starts or one.keep for one in work.passes)
        self._run.generates = task.job.entry.generates
        self._run.pads_right = host.pads_right
        if work.settings.share_memory and len(work.passes) == 1:
            self._run.lend(self._schedule(work.passes[0]))
        if graph.backwards and work.passes:
            # Of what cannot be measured, nothing is known to be written.
            with suppress(ScheduleError):
                self._run.keep_apart(self._schedule(work.passes[0]))
        self._changing = Changing(task.job)
        # The smallest batch that did not fit into memory, in tokens.
        self._too_much: int | None = None
        self._prefix = Prefix(work, self._schedule(work.passes[0])) if shares else None

    def run(self) -> Outcome:
        """Run all passes."""
        try:
            return self._run_passes()
        finally:
            self._run.close()

    def undo(self) -> None:
        """Take back what is left on the model, after an interrupt; may be called again."""
        for undo in self._run.undo:
            undo()

    def _run_passes(self) -> Outcome:
        passes = self._plan.passes
        done: list[tuple[Pass, Any]] = []
        if len(passes) == 1:
            done.extend(self._run_or_halve(passes[0]))
        else:
            quiet = not self._plan.settings.progress
            for one in tqdm(passes, "graftwork", disable=quiet, delay=2, leave=False):
                done.extend(self._run_or_halve(one))
        ran, results = [one for one, _ in done], [result for _, result in done]
        self._host.join_results(self._task.job, self.outcome, ran, results)
        self._run.conclude(self.outcome.result)
        self._run.finish()
        return self.outcome

    def _run_or_halve(self, one: Pass) -> list[tuple[Pass, Any]]:
        """Run a pass; if the memory does not hold it, its halves one after the other."""
        size = self._size(one)
        if self._too_much is not None and size >= self._too_much and one.halves():
            return [pair for half in one.halves() for pair in self._run_or_halve(half)]
        state = self._run.checkpoint() if len(one.invokes) > 1 else None
        try:
            result = self._run_pass(one)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            halves = [] if self._changing else one.halves()
            if not halves:
                raise self._too_large(one, error) from error
        else:
            if self._prefix is not None:
                self._prefix.release(one)
            return [(one, result)]
        assert state is not None
        self._run.restore(state)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self._too_much is None:
            logger.warning(
                "%d prompts did not fit into memory together: such batches run in halves",
                len(one.invokes),
            )
        self._too_much = min(size, self._too_much or size)
        return [pair for half in halves for pair in self._run_or_halve(half)]

    def _size(self, one: Pass) -> int:
        """Tokens of the batch of a pass, padding included; rows where there are no tokens."""
        prompts = [self._task.job.prompts[invoke] for invoke in one.invokes]
        width: int = max(prompt.width for prompt in prompts)
        return sum(len(prompt.lengths) for prompt in prompts) * max(1, width)

    def _too_large(self, one: Pass, error: BaseException) -> MemoryError:
        prompts = [self._task.job.prompts[invoke] for invoke in one.invokes]
        rows, width = sum(len(p.lengths) for p in prompts), max(p.width for p in prompts)
        which = "One prompt"
        if len(prompts) > 1:
            which = f"A batch of {len(prompts)} prompts that use each other's values, with"
        free = free_memory(self._module_device()) >> 20
        return MemoryError(
            f"{which} {'of ' if len(prompts) == 1 else ''}{rows} rows of {width} tokens does not fit "
            f"into the free memory of {free} MiB. Shorten it, or use a smaller dtype. ({error})"
        )

    def _module_device(self) -> torch.device:
        first = next(iter(self._module.parameters()), None)
        return torch.device("cpu") if first is None else first.device

    def _schedule(self, one: Pass) -> Schedule:
        """The schedule of the prompts of a pass."""
        return self._host.schedule(self._task.job.prompts[one.invokes[0]], self._task.job)

    def _is_last(self, one: Pass) -> bool:
        """True for the last forward of the block, behind which nothing is computed any more."""
        part = self._task.part
        return one is self._plan.passes[-1] and (part is None or part.whole)

    def _run_pass(self, one: Pass) -> Any:
        host, task, run, prefix = self._host, self._task, self._run, self._prefix
        prompts = {index: task.job.prompts[index] for index in one.invokes}
        arguments = task
        if self._changing and not self._is_last(one):
            again = self._changing.again()
            prompts = {i: p.with_arguments(again(p.arguments)) for i, p in prompts.items()}
            own = dataclasses.replace(task.job.entry, options=again(task.job.entry.options))
            arguments = dataclasses.replace(task, job=dataclasses.replace(task.job, entry=own))
        # What a forward changes among its arguments would be left half-way.
        may_stop = self._plan.settings.stop and not self._changing
        may_stop = may_stop and host.may_stop(task, self._module)
        # A value of a module that is called again is refused; so the second call has to come.
        may_stop = may_stop and not any(
            may_repeat(self._module, path) for path in one.paths_of_first_calls()
        )
        extents = {i: (len(p.lengths), p.width) for i, p in prompts.items()}
        whole = any(p is None for p in task.job.prompts)
        run.begin(one, extents, lambda: self._schedule(one), may_stop, whole)
        if may_stop and not (run.sites or one.keep or run.wants_result):
            return None
        skipping: AbstractContextManager[Any] = nullcontext()
        if prefix is not None:
            skipping = prefix.skipping(self._module, one, run, at_path)
        batch = list(prompts.values())
        cache = None
        if prefix is not None and (one.caches or one.cut):
            cache = host.make_cache(prefix.cache(one) if one.cut else None)
        try:
            with (
                Patcher(self._module, run, one, prefix),
                skipping,
                host.around(task, run, self._module, batch, self.outcome),
            ):
                result = host.forward(arguments, self._module, one, batch, cache)
        except Stop:
            result = None
        run.undo.clear()
        if prefix is not None and one.caches:
            prefix.keep_cache(one, host.read_cache(cache), run)
        if result is None:
            return None
        if run.wants_result:
            run.result(host.results_by_invoke(task.job, self.outcome, prompts, result))
        return result
