"""Owns `Model`: the root of a module tree, its blocks, and how a recorded block is run on it."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import threading
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..envoy import Alias, Envoy
from ..intervention import Pass, Plan, Run, Schedule, Shapes, at_path, measure, no_grad, plan
from ..intervention.rows import bytes_each
from ..tracing.context import Tracer
from ..tracing.errors import BlockError, LoadError, ScheduleError, UnknownModuleError
from ..tracing.structure import ATOMS, leaves, map_leaves
from .execution import Execution, free_memory, settings_of
from .explain import Explanation, explain
from .facts import BlockFacts
from .loading import meta_copy

logger = logging.getLogger("graftwork")


@dataclasses.dataclass(slots=True)
class TensorPrompt:
    """The arguments of one invoke of a plain module. Tensors have their batch on axis 0.

    Attributes:
        alone: the tensors have no common batch, so this prompt cannot be batched.
        needs_grad: a tensor asks for gradients.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    lengths: list[int]
    width: int = 0
    alone: bool = False
    needs_grad: bool = False

    @property
    def spans(self) -> list[tuple[int, int]]:
        return [(0, 0)] * len(self.lengths)


class Model(Envoy):
    """Any `torch.nn.Module` with tensor inputs, ready for blocks.

    Args:
        module: used as it is; nothing in it is replaced. Where several invokes are in one block, its
            tensor inputs have their batch on axis 0 and rows do not see each other.

    Example:
        with model.trace(x):
            hidden = model.layer1.output.save()
    """

    def __init__(self, module: torch.nn.Module) -> None:
        if not isinstance(module, torch.nn.Module):
            raise LoadError(
                f"Model takes a torch.nn.Module, not {type(module).__name__}. For a hub id or folder "
                "use LanguageModel."
            )
        super().__init__(self, "")
        self._module: torch.nn.Module | None = module
        self._skeleton: torch.nn.Module | None = None
        self._set_up()

    def _set_up(self) -> None:
        for name in self.tree()._modules:
            if hasattr(type(self), name):
                logger.warning(
                    "the submodule `%s` has the name of something that every model has here: write "
                    '`model.get("%s")` for it',
                    name,
                    name,
                )
        self._envoys: dict[str, Envoy] = {}
        self._schedules: dict[str, Schedule | ScheduleError] = {}
        # One run at a time: hooks of two runs on one module would see each other's forwards.
        self._lock = threading.RLock()

    # ---------------------------------------------------------------- the module

    @property
    def loaded(self) -> bool:
        """True once the weights are there."""
        return self._module is not None

    def load(self) -> torch.nn.Module:
        """Load the weights now instead of at the exit of the first block; gives the module."""
        assert self._module is not None
        return self._module

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is, or will be."""
        return self.planned_device()

    def planned_device(self) -> torch.device:
        first = next(iter(self.tree().parameters()), None)
        return torch.device("cpu") if first is None else first.device

    def tree(self) -> torch.nn.Module:
        """The real module if it is loaded, else its skeleton."""
        return self._module if self._module is not None else self.skeleton()

    def skeleton(self) -> torch.nn.Module:
        """The module tree on the meta device."""
        if self._skeleton is None:
            assert self._module is not None
            self._skeleton = meta_copy(self._module)
        return self._skeleton

    def submodule(self, path: str) -> torch.nn.Module:
        module = self._module if self._module is not None else self.skeleton()
        return at_path(module, path) if path else module

    def is_block(self, module: torch.nn.Module) -> bool:
        return False

    def alias(self, module: torch.nn.Module, name: str) -> Alias | None:
        return None

    # ---------------------------------------------------------------- structure, for shapes

    def keeps_cache(self, tracer: Tracer) -> bool:
        return True

    def schedule(self, prompt: Any = None, tracer: Tracer | None = None) -> Schedule:
        """What the forward does, measured once for each kind of prompt, without weights.

        Args:
            prompt: one of that kind.
            tracer: the block, whose options may change what the forward returns.

        Raises:
            ScheduleError: the model cannot be run on fake tensors.
        """
        with self._lock:
            options = self._trial_options(tracer) if tracer is not None else {}
            kind = self._kind_of(prompt) + (repr(options) if options else "")
            found = self._schedules.get(kind)
            if found is None:
                try:
                    found = measure(
                        self._skeleton_to_measure(),
                        lambda batch, tokens: self._trial_inputs(batch, tokens, prompt, options),
                        self._sorts_tokens,
                    )
                except ScheduleError as error:
                    found = error
                self._schedules[kind] = found
            if isinstance(found, ScheduleError):
                raise found
            return found

    def _skeleton_to_measure(self) -> torch.nn.Module:
        try:
            return self.skeleton()
        except Exception as error:  # whatever keeps a module from being copied
            raise ScheduleError.no_schedule("This block", f"it has no skeleton: {error}") from error

    def _trial_options(self, tracer: Tracer) -> dict[str, Any]:
        """Keywords of the block that belong to the forward."""
        return {}

    def _kind_of(self, prompt: Any) -> str:
        """Prompts of one kind have one schedule."""
        return repr(self._shape_class(prompt)) if prompt is not None else ""

    def _sorts_tokens(self, module: torch.nn.Module) -> bool:
        """True if what is inside `module` has the batch's tokens in an order that depends on them."""
        return False

    def _trial_inputs(
        self, batch: int, tokens: int, prompt: Any, options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Fake inputs like `prompt` for the given sizes."""
        if prompt is None:
            raise ScheduleError.no_schedule("This block", "it has no prompt yet")

        def resize(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0:
                return leaf
            return torch.empty((batch, *leaf.shape[1:]), dtype=leaf.dtype, device="meta")

        return map_leaves(resize, prompt.args), map_leaves(resize, prompt.kwargs)

    def meta_parameter(self, path: str) -> torch.Tensor:
        return _tensor_at(self.skeleton(), path)

    # ---------------------------------------------------------------- blocks

    def trace(self, *args: Any, **kwargs: Any) -> Tracer:
        """One forward. With a prompt, the block is about it; without, open invokes inside.

        Args:
            *args, **kwargs: the arguments of the module's forward.

        Raises:
            InputError: the prompt cannot be read.
        """
        settings = kwargs.pop("plan", None)
        settings_of(settings)
        return Tracer(
            self,
            self,
            generates=False,
            args=args,
            prompt_kwargs=kwargs,
            kwargs={},
            settings=settings,
        )

    def invoke(self, *args: Any, **kwargs: Any) -> Tracer:
        """The same as `trace` with a prompt."""
        return self.trace(*args, **kwargs)

    def oracle(self, tracer: Tracer) -> Shapes:
        return Shapes(tracer, self)

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        rows = {tensor.shape[0] for tensor in tensors if tensor.ndim}
        # Tensors whose first axes differ have no common batch: such a prompt runs alone.
        common = len(rows) == 1
        return TensorPrompt(
            args,
            kwargs,
            [0] * (rows.pop() if common else 1),
            alone=not common,
            needs_grad=any(tensor.requires_grad for tensor in tensors),
        )

    def execute(self, tracer: Tracer) -> Any:
        """Plan a finished block, load the weights if they are not loaded, and run it."""
        graph = tracer.recording.graph
        if any(i.prompt is not None and i.prompt.needs_grad for i in tracer.invokes):
            graph.needs_grad = True
        work = self.plan(tracer)
        module = self.load()
        if graph.backwards and module.training and _checkpoints(module):
            raise BlockError.checkpointing(graph.backwards[0].location)
        if any(one.cut for one in work.passes) and not self.is_causal():
            work = self.plan(tracer, causal=False)
        with self._lock, no_grad(graph):
            return Execution(self, tracer, work, module).run()

    def explain(self, tracer: Tracer) -> Explanation:
        """The plan of a block as text."""
        return explain(self, tracer)

    def plan(self, tracer: Tracer, causal: bool = True) -> Plan:
        """The work of a block: its passes, batches and what is left out.

        Raises:
            BlockError: the block has no prompt.
            OrderError: it cannot be put in an order.
        """
        prompted = [i.index for i in tracer.invokes if i.prompt is not None]
        if not prompted:
            raise BlockError.empty()
        settings = settings_of(tracer.settings)
        if not causal:
            settings = dataclasses.replace(settings, causal=False)
        return plan(tracer.recording.graph, prompted, BlockFacts(self, tracer), settings)

    def parts(self, tracer: Tracer, prompts: dict[int, Any], result: Any) -> dict[int, Any]:
        """What the entry point returned for each prompt of a pass."""
        raise AssertionError("only a generation has a result, and a plain module has none")

    def around(
        self, tracer: Tracer, run: Run, module: torch.nn.Module, prompts: list[Any]
    ) -> AbstractContextManager[Any]:
        """What else has to be in place while a pass runs."""
        return nullcontext()

    def may_stop(self, tracer: Tracer, module: torch.nn.Module) -> bool:
        if tracer.generates or tracer.uses_output:
            return False
        # Offloaded weights go back after a module's forward; leaving one half-way would keep them.
        places = getattr(module, "hf_device_map", {}).values()
        return not any(str(place) in ("cpu", "disk") for place in places) or set(places) == {"cpu"}

    def batch_class(self, tracer: Tracer, invoke: int) -> Hashable:
        """Prompts of one class can be batched."""
        kind: Hashable = self._shape_class(tracer.invokes[invoke].prompt)
        return kind

    def mixes_rows(self) -> bool:
        """True if a module computes a row from other rows too, or has its batch on another axis."""
        return any(
            getattr(child, "batch_first", True) is False
            or (child.training and isinstance(child, torch.nn.modules.batchnorm._BatchNorm))
            for child in self.tree().modules()
        )

    def _shape_class(self, prompt: Any) -> Any:
        """Prompts of one class can be batched."""

        def part(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return (tuple(leaf.shape[1:]), leaf.dtype) if leaf.ndim else leaf.item()
            return leaf if type(leaf) in ATOMS else id(leaf)

        kind = repr((map_leaves(part, prompt.args), map_leaves(part, prompt.kwargs)))
        return (kind, id(prompt)) if prompt.alone else kind

    def identity(self, tracer: Tracer, prompt: Any) -> Hashable:
        """Equal for equal inputs; None where they are not compared."""
        return None

    def budget(self, tracer: Tracer, all_logits: bool) -> int:
        """Rows (for a language model, tokens) that fit into one forward.

        A quarter of the free memory, for what is alive at once: the outputs of the modules of one
        block, of all blocks where gradients flow, and the logits three times.
        """
        schedule = BlockFacts(self, tracer).schedule()
        each = self._bytes_each(schedule, all_logits, tracer.graph.needs_grad)
        return max(1, free_memory(self.planned_device()) // 4 // each)

    def _bytes_each(self, schedule: Schedule, all_logits: bool, keeps: bool) -> int:
        head = self.head()
        blocks: dict[str, int] = {}
        for (path, port, _), visit in schedule.visits.items():
            if port == "output" and path != head and path:
                size = bytes_each(visit.axes)
                block = next((b for b in schedule.chain if path.startswith(f"{b}.")), path)
                blocks[block] = blocks.get(block, 0) + size
        largest = sum(blocks.values()) if keeps else max(blocks.values(), default=1)
        if head is not None and all_logits:
            largest += 3 * bytes_each(schedule.visits[head, "output", 0].axes)
        return max(1, largest)

    def may_share(self, tracer: Tracer) -> bool:
        """True if what prompts share may be computed once."""
        return False

    def may_be_causal(self) -> bool:
        """False if the model cannot continue from keys and values of earlier tokens."""
        return False

    def make_cache(self, layers: list[tuple[torch.Tensor, torch.Tensor]] | None) -> Any:
        raise AssertionError("only passes with a cut have a cache, and plain modules have none")

    def read_cache(self, cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        raise AssertionError("only passes with a cut have a cache, and plain modules have none")

    def is_causal(self) -> bool:
        """True if the loaded model's first tokens do not depend on later ones."""
        return False

    def head(self) -> str | None:
        """Path of the unembedding, if the forward can apply it to the last positions alone."""
        return None

    def forward(
        self,
        tracer: Tracer,
        module: torch.nn.Module,
        one: Pass,
        prompts: list[Any],
        cache: Any = None,
    ) -> Any:
        """Run the entry point on a batch."""
        first = prompts[0]
        if len(prompts) == 1:
            return module(*first.args, **first.kwargs)
        every = [list(leaves((p.args, p.kwargs))) for p in prompts]
        joined = iter(
            [
                torch.cat(parts)
                if isinstance(parts[0], torch.Tensor) and parts[0].ndim
                else parts[0]
                for parts in zip(*every, strict=True)
            ]
        )
        args, kwargs = map_leaves(lambda _: next(joined), (first.args, first.kwargs))
        return module(*args, **kwargs)

    def join(self, tracer: Tracer, passes: list[Pass], results: list[Any]) -> Any:
        """The entry point's result for the whole block."""
        if len(results) == 1:
            return results[0]
        return None

    # ---------------------------------------------------------------- nodes that need the module

    def apply_module(self, path: str, *args: Any, **kwargs: Any) -> Any:
        module = self.submodule(path)
        if any(getattr(child, "inplace", False) for child in module.modules()):
            args, kwargs = map_leaves(_clone, args), map_leaves(_clone, kwargs)
        # `forward`, past our own hooks; where accelerate moves weights, it does so in `forward`.
        return module.forward(*args, **kwargs)

    def parameter(self, path: str) -> torch.Tensor:
        found = _tensor_at(self.load(), path)
        if not found.is_meta:
            return found
        # Offloaded: the weights are on the meta device except while the module runs.
        from accelerate.utils import align_module_device

        place, _, name = path.rpartition(".")
        owner = self.submodule(place)
        with align_module_device(owner):
            return getattr(owner, name).detach().clone()  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return repr(self.tree())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


def _checkpoints(module: torch.nn.Module) -> bool:
    return any(getattr(child, "gradient_checkpointing", False) for child in module.modules())


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _tensor_at(module: torch.nn.Module, path: str) -> torch.Tensor:
    place, _, name = path.rpartition(".")
    owner = at_path(module, place)
    found = getattr(owner, name, None)
    if not isinstance(found, torch.Tensor):
        raise UnknownModuleError.child(place, type(owner).__name__, name, owner._parameters)
    return found


def accepts(function: Callable[..., Any], name: str) -> bool:
    """True if `function` has a parameter of that name."""
    return name in inspect.signature(function).parameters
