"""Owns `Model`: the root of a module tree, its blocks, and how a recorded block is run on it."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch

from ..engines.execution import Execution
from ..engines.explain import Explanation, explain
from ..engines.facts import BlockFacts
from ..engines.memory import free_memory
from ..engines.scan import Scan
from ..envoy import Alias, Envoy, Names, names_of
from ..envoy.names import write_name
from ..envoy.spellings import resolve
from ..inputs.changing import Changing, Statistics, changed_in
from ..intervention import (
    Known,
    Listing,
    Part,
    Pass,
    Places,
    Plan,
    Run,
    Schedule,
    ShapeCheck,
    Shapes,
    Task,
    at_path,
    forward_name,
    gradients_as_asked,
    gradients_untouched,
    listing,
    measure,
    no_grad,
    plan,
    resume,
    same_draws,
    unharmed,
    warn_of_padding,
)
from ..intervention.fingerprint import fingerprint
from ..intervention.locks import turn_of
from ..intervention.plan import settings_of
from ..intervention.rows import bytes_each
from ..intervention.schedule import SIZES, behind_cache
from ..intervention.source import InnerOperation
from ..policies import HookConfig, Hooks
from ..tracing.context import Tracer, current_tracer
from ..tracing.edit import Edit
from ..tracing.errors import (
    BlockError,
    EditError,
    InputError,
    LoadError,
    Location,
    ScheduleError,
    SourceError,
    UnknownModuleError,
)
from ..tracing.frames import entry
from ..tracing.job import Entry, Job, Outcome, Recorded
from ..tracing.limits import LIMITS, Limits
from ..tracing.node import Node
from ..tracing.recording import Recording
from ..tracing.session import Session
from ..tracing.structure import ATOMS, leaves, map_leaves
from ..tracing.template import Template
from . import edits
from .architectures import stacks_of
from .edits import Held
from .loading import meta_copy
from .sizes import Sizes
from .stacked import StackedWeights
from .verify import NamesReport, verify
from .vocabulary import Vocabulary, find_vocabulary
from .weights import used_weight

logger = logging.getLogger("graftwork")

#: Attributes of a model that its copies make anew.
_FOUND_AGAIN = frozenset({"_vocabularies", "_envoys", "_schedules", "_measured", "_lock"})
#: More operations than a template has.
_MANY = 1 << 32
#: Unified names of the model itself. A submodule of that name is meant first.
_UNIFIED = frozenset(
    "layers embed pos_embed ln_final ln_final_in ln_final_out ln_final_scale ln_final_normalized "
    "logits unembed_in unembed_out".split()
)


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

    @property
    def arguments(self) -> Any:
        """What it gives the forward."""
        return self.args, self.kwargs

    def with_arguments(self, arguments: Any) -> TensorPrompt:
        args, kwargs = arguments
        return dataclasses.replace(self, args=args, kwargs=kwargs)


class Model(Envoy):
    """Any `torch.nn.Module` with tensor inputs, ready for blocks.

    Args:
        module: used as it is; nothing in it is replaced. Where several invokes are in one block, its
            tensor inputs have their batch on axis 0 and rows do not see each other.
        rename: further names for modules: `{"attn": "attention"}` beside each module of that name,
            `{"transformer.h": "layers"}` at the root for the module at that path, `{nn.Linear: …}`
            beside each of a class. Several names are a list.
        hook_config: which policies `model.hooks` has where; see `set_hook_config`.

    With a hub id or folder instead of a module, it is a `LanguageModel`.

    Example:
        with model.trace(x):
            hidden = model.layer1.output.save()
    """

    #: What loads a model by name: set by the room's LanguageModel.
    _loads: type[Model] | None = None

    def __new__(cls, module: Any = None, *args: Any, **kwargs: Any) -> Any:
        named = isinstance(module, str) or hasattr(module, "__fspath__")
        if cls is Model and named and cls._loads is not None:
            return object.__new__(cls._loads)  # whose __init__ Python calls next
        return object.__new__(cls)

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        rename: Mapping[Any, Any] | None = None,
        hook_config: str | HookConfig | None = None,
    ) -> None:
        if not isinstance(module, torch.nn.Module):
            raise LoadError(
                f"Model takes a torch.nn.Module, not {type(module).__name__}. For a hub id or folder "
                "use LanguageModel."
            )
        compiled = compiled_in(module)
        if compiled is not None:
            raise LoadError.compiled(compiled)
        super().__init__(self, "")
        self._held = Held()
        self._module = module
        self._edits: Template | None = None
        self._unfinished: Location | None = None  # a view whose edits were not recorded to the end
        self._vocabularies: dict[str, Vocabulary] = {}
        self._hooks: Hooks | None = None
        self._set_up()
        self._names: Names = {}
        if rename:
            self._names = names_of(self.module_tree(), rename, self._is_taken)
        if hook_config is not None:
            self.set_hook_config(hook_config)

    def _is_taken(self, module: torch.nn.Module, name: str) -> bool:
        """True for a name that has a meaning below a module."""
        own = type(self) if module is self.module_tree() else Envoy
        return name in module._modules or hasattr(module, name) or hasattr(own, name)

    def _set_up(self) -> None:
        for name in self.module_tree()._modules:
            if hasattr(type(self), name):
                logger.warning(
                    "the submodule `%s` has the name of something that every model has here: write "
                    '`model.get("%s")` for it',
                    name,
                    name,
                )
        self._envoys: dict[str, Envoy] = {}
        self.tensor_places: dict[Hashable, bool] = {}
        self._schedules: dict[Any, Schedule | ScheduleError] = {}
        self._measured: dict[frozenset[tuple[str, str]], frozenset[tuple[str, str]]] = {}
        self._changes = self._held.changes
        self._seen: Hashable = None
        assert self._module is not None
        self._lock = turn_of(self._module)

    # ---------------------------------------------------------------- copies

    def __copy__(self) -> Model:
        """Another view of the same module."""
        view: Model = object.__new__(type(self))
        for name in Envoy.__slots__:
            object.__setattr__(view, name, getattr(self, name))
        view.__dict__.update(self.__dict__)
        return view

    def __deepcopy__(self, memo: dict[int, Any]) -> Model:
        """A model with weights of its own. Operations of edits are data that nobody changes: both have
        them."""
        copied: Model = object.__new__(type(self))
        memo[id(self)] = copied
        memo[id(self._edits)] = self._edits
        copied.__setstate__(copy.deepcopy(self._state(), memo))
        return copied

    def __reduce__(self) -> Any:
        if self._edits is not None:
            raise EditError(
                "A model with edits cannot be pickled, as no block can: write them with `save_edits`, "
                "and pickle the model itself."
            )
        return object.__new__, (type(self),), self._state()

    def _state(self) -> dict[str, Any]:
        # The rest is found again when it is asked for; a lock is this object's own.
        return {name: value for name, value in self.__dict__.items() if name not in _FOUND_AGAIN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Envoy.__init__(self, self, "")
        self.__dict__.update(state)
        self._vocabularies = {}
        self._envoys, self._schedules, self._measured = {}, {}, {}
        self._lock = turn_of(self.module_tree())

    def to(self, *args: Any, **kwargs: Any) -> Model:
        """Move or cast the module, as `torch.nn.Module.to` does, loaded if need be; gives the model."""

        return self._changed("to", *args, **kwargs)

    def _changed(self, name: str, *args: Any, **kwargs: Any) -> Model:
        """The model, after a method of its module that changes it and returns it."""

        def change() -> None:
            getattr(self.load(), name)(*args, **kwargs)
            self.refresh(changed=name not in ("eval", "train", "requires_grad_"))

        self._lock.during(change)
        return self

    def half(self) -> Model:
        """As `to(torch.float16)`."""
        return self._changed("half")

    def float(self) -> Model:
        """As `to(torch.float32)`."""
        return self._changed("float")

    def double(self) -> Model:
        """As `to(torch.float64)`."""
        return self._changed("double")

    def bfloat16(self) -> Model:
        """As `to(torch.bfloat16)`."""
        return self._changed("bfloat16")

    def cpu(self) -> Model:
        """As `to("cpu")`."""
        return self._changed("cpu")

    def cuda(self, device: Any = None) -> Model:
        """As `to("cuda")`."""
        return self._changed("cuda", device)

    def eval(self) -> Model:
        """As that of the module; gives the model."""
        return self._changed("eval")

    def train(self, mode: bool = True) -> Model:
        """As that of the module; gives the model."""
        return self._changed("train", mode)

    def requires_grad_(self, requires_grad: bool = True) -> Model:
        """As that of the module; gives the model."""
        return self._changed("requires_grad_", requires_grad)

    # ---------------------------------------------------------------- the module

    @property
    def _module(self) -> torch.nn.Module | None:
        return self._held.module

    @_module.setter
    def _module(self, module: torch.nn.Module | None) -> None:
        self._held.module = module

    @property
    def _skeleton(self) -> torch.nn.Module | None:
        return self._held.skeleton

    @_skeleton.setter
    def _skeleton(self, module: torch.nn.Module | None) -> None:
        self._held.skeleton = module

    @property
    def loaded(self) -> bool:
        """True once the weights are there."""
        return self._module is not None

    @entry
    def load(self) -> torch.nn.Module:
        """Load the weights now instead of at the exit of the first block; gives the module."""
        assert self._module is not None
        return self._module

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is, or will be."""
        return self.planned_device()

    def planned_device(self) -> torch.device:
        first = next(iter(self.module_tree().parameters()), None)
        return torch.device("cpu") if first is None else first.device

    def module_tree(self) -> torch.nn.Module:
        """The real module if it is loaded, else its skeleton."""
        return self._module if self._module is not None else self.skeleton()

    def skeleton(self) -> torch.nn.Module:
        """The module tree on the meta device."""
        if self._skeleton is None:
            assert self._module is not None
            self._held.fingerprint = fingerprint(self._module)
            self._skeleton = meta_copy(self._module)
        return self._skeleton

    def refresh(self, changed: bool = False) -> None:
        """Forget what was learned of the module's structure, if the user has changed it since.

        Args:
            changed: it is known to have changed, also where the fingerprint does not show it.
        """
        held = self._held
        if held.module is not None and (changed or held.fingerprint is not None):
            found = fingerprint(held.module)
            if changed or found != held.fingerprint:
                held.fingerprint, held.skeleton = found, None
                held.changes += 1
        if self._changes != held.changes:
            self._forget()

    def _forget(self) -> None:
        self._changes = self._held.changes
        self._envoys, self._schedules, self._measured, self._vocabularies = {}, {}, {}, {}
        self.tensor_places = {}

    def submodule(self, path: str) -> torch.nn.Module:
        module = self._module if self._module is not None else self.skeleton()
        if path and self._held.attached:
            found = self._held.find(path)
            if found is not None:
                return found
        return at_path(module, path) if path else module

    def is_block(self, module: torch.nn.Module) -> bool:
        return False

    def alias_at(self, module: torch.nn.Module, name: str) -> Alias | None:
        return None

    # ---------------------------------------------------------------- edits

    def edit(self, inplace: bool = False) -> Edit:
        """Record lasting changes: `with model.edit() as edited:`. Blocks of `edited` have them, for
        each of their prompts and, in a generation, at every step; the model itself stays as it is.

        Args:
            inplace: change this model; `clear_edits` takes the changes back.

        Raises:
            ShapeError: something written does not fit; the message names the line.
        """
        return edits.record(self, inplace)

    def clear_edits(self) -> None:
        """Take all edits of this model back. Other views keep theirs."""
        self._edits = None

    def save_edits(self, file: str | os.PathLike[str]) -> None:
        """Write the edits to one file: operations and tensors, no code.

        Raises:
            EditError: there are none.
            WireError: they hold a Python function, which cannot be sent.
        """
        edits.save(self, file)

    def load_edits(self, file: str | os.PathLike[str], *, limits: Limits = LIMITS) -> None:
        """Add the edits of a file to this model's own. The file may come from anyone.

        Args:
            limits: of what is read.

        Raises:
            EditError: they do not fit this model; it is left as it was.
            WireError: the file is damaged, or holds what no graph may hold.
        """
        edits.load(self, file, limits)

    def lasting_edits(self) -> list[Template]:
        """Policies and edits, as they are placed for each prompt.

        Raises:
            BlockError: this is a view whose edits were not recorded to the end.
        """
        if self._unfinished is not None:
            raise BlockError.unfinished_edit(self._unfinished)
        policies = None if self._hooks is None else self._hooks.template()
        found = [one for one in (policies, self._edits) if one is not None]
        for number, template in enumerate(found):
            template.number = number * _MANY
        return found

    def policy_names(self) -> Vocabulary:
        """The names of the layers that policies are at."""
        return self._model_names()

    @property
    def hooks(self) -> Hooks:
        """The policies of this model, which apply in every block: `model.hooks["mlp_pre_out"][2]`."""
        if self._hooks is None:
            self._hooks = Hooks(self)
        return self._hooks

    def set_hook_config(self, config: str | HookConfig) -> None:
        """Which policies are where; what hooks there were is gone.

        Args:
            config: lines such as `mlp_pre_out: offset, mask, replace, collect, unoffset`, or with a
                layer, `mlp_pre_out: 2: mask`.
        """
        given = HookConfig().from_string(config) if isinstance(config, str) else config
        if not isinstance(given, HookConfig):
            raise InputError(
                f"a hook config is text, such as `mlp_pre_out: mask`, or HookConfig, not {given!r:.60}."
            )
        self._hooks = Hooks(self, given)

    def sample_prompt(self) -> Any:
        """A prompt by which an edit knows shapes, if one can be had without an example."""
        return None

    def attached(self, path: str) -> torch.nn.Module | None:
        return self._held.find(path) if self._held.attached else None

    def attach(self, path: str, name: str, module: torch.nn.Module | None) -> None:
        edits.attach(self, path, name, module)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, torch.nn.Module) and not name.startswith("_"):
            self.attach("", name, value)
        elif name in _UNIFIED and name not in self.module_tree()._modules:
            write_name(self, self._model_names(), -1, name, value)
        else:
            object.__setattr__(self, name, value)

    # ---------------------------------------------------------------- unified names

    def vocabulary(self, stack: str = "layers") -> Vocabulary:
        """The unified names of this model.

        Raises:
            UnavailableNameError: its architecture is not known.
        """
        found = self._vocabularies.get(stack)
        if found is None or found.root is not self:
            found = find_vocabulary(self, stack)
            self._vocabularies = {**self._vocabularies, stack: found}
        return found

    def unified(self, path: str, name: str) -> Any:
        """`layers`, `embed`, `logits` and the others that every architecture has."""
        if path or not (name in _UNIFIED or name.endswith("_layers")):
            return None
        if getattr(self.module_tree(), "config", None) is None:
            return None
        if name == "layers":
            return self.vocabulary().layers
        if name.endswith("_layers"):
            stack = name.removesuffix("_layers")
            known = stacks_of(self.config) or ()
            return self.vocabulary(stack).layers if stack in known else None
        return self._model_names().read(-1, name)

    def _model_names(self) -> Vocabulary:
        stacks = stacks_of(self.config) or ("layers",)
        return self.vocabulary(stacks[-1])

    @property
    def cfg(self) -> Sizes:
        """Sizes and kinds of the model, in the same words on every architecture."""
        return self._model_names().sizes

    def verify_names(self, *args: Any, strict: bool = True, **kwargs: Any) -> NamesReport:
        """Check every unified name on this model: existence, shape, the identities that hold among
        them, the weights, and that an edit of each changes the logits.

        Args:
            *args, **kwargs: a prompt of one row, as for `trace`.
            strict: raise for what does not hold; else the report tells.

        Raises:
            UnavailableNameError: a promise does not hold.
        """
        if not args and not kwargs:
            args, kwargs = self.sample_inputs()
        reports = [
            verify(self.vocabulary(stack), args, kwargs, strict=strict)
            for stack in stacks_of(self.config) or ("layers",)
        ]
        return reports[0] if len(reports) == 1 else reports[0].and_also(reports[1:])

    def sample_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A small prompt for trials."""
        raise InputError("give a prompt as for `trace`: what this module takes is not known")

    @property
    def weights(self) -> StackedWeights:
        """The weights of all layers stacked: `model.weights.W_Q` [layer, head, d_model, d_head]."""
        return StackedWeights(self)

    def hook(self, name: str, layer: int | None = None) -> Any:
        """A place by the name that another library has for it, as a value of the open block.

        Args:
            name: of TransformerLens ("blocks.3.attn.hook_z"), taker ("layer_3_attn_pre_out"),
                transformer-debugger ("attn.q", with `layer`), nnterp, or the unified one ("z").
            layer: where the name has none.

        Raises:
            UnavailableNameError: there is no such name, or not on this architecture.
        """
        if not isinstance(name, str):
            raise InputError(
                f'`hook` takes a name, such as "blocks.0.hook_resid_pre", not {name!r:.60}.'
            )
        vocabulary = self._model_names()
        number, own = resolve(name, layer, vocabulary)
        return vocabulary.read(number, own)

    def __getitem__(self, index: Any) -> Any:
        """A weight or module by unified name, `model["embed.W_E"]`; else as for any module."""
        tree = self.module_tree()
        known = hasattr(getattr(tree, "config", None), "model_type")
        if known and isinstance(index, str) and index not in tree._modules:
            return self._model_names().find(index)
        return super().__getitem__(index)

    def __setitem__(self, name: str, value: Any) -> None:
        """Write a weight for good: a tensor of its shape, or one number, which fills it."""
        self._model_names().model_weights()[name] = value

    def __contains__(self, name: object) -> bool:
        return name in self._model_names().model_weights()

    # ---------------------------------------------------------------- structure, for shapes

    @property
    def pads_right(self) -> bool:
        return False

    def targets(self, entry: Entry, prompt: Any) -> int | None:
        return None

    def keeps_cache(self, entry: Entry) -> bool:
        return True

    def rows_each(self, entry: Entry, path: str) -> int:
        return 1

    def cached(self, entry: Entry, prompt: Any) -> int:
        return 0

    def grows_cache(self, entry: Entry, prompt: Any) -> bool:
        return True

    def schedule(
        self,
        prompt: Any = None,
        block: Recorded | None = None,
        inner: frozenset[tuple[str, str]] = frozenset(),
        continued: bool = False,
    ) -> Schedule:
        """What the forward does, measured once for each kind of prompt, without weights.

        Args:
            prompt: one of that kind.
            block: the block, whose options may change what the forward returns.
            inner: operations inside forwards that are measured beside those of the block.
            continued: the forward has a cache with tokens before its own.

        Raises:
            ScheduleError: the model cannot be run on fake tensors.
        """
        return self._lock.during(lambda: self._measure(prompt, block, inner, continued))

    def _measure(
        self,
        prompt: Any,
        block: Recorded | None,
        inner: frozenset[tuple[str, str]],
        continued: bool,
    ) -> Schedule:
        seen = None if block is None else block.seen
        if seen is None or seen != self._seen:  # once while a block is written and once it runs
            self.refresh()
            self._seen = seen
        options = self._trial_options(block.entry) if block is not None else {}
        kind = self._kind_of(prompt) + (repr(options) if options else "")
        if block is not None:
            inner |= block.graph.inner_operations()
        if inner:
            inner = self._measured_with(inner)
        key = (kind, inner, continued)
        found = self._schedules.get(key)
        if found is None:
            make: Callable[..., Any] = self._continued_inputs if continued else self._trial_inputs
            sizes = behind_cache(self._most_tokens()) if continued else SIZES
            try:
                found = measure(
                    self._skeleton_to_measure(),
                    lambda *size: make(*size, prompt, options),
                    self._sorts_tokens,
                    inner,
                    sizes,
                )
            except ScheduleError as error:
                found = error
            self._schedules[key] = found
        if isinstance(found, ScheduleError):
            raise found
        return found

    def _measured_with(self, inner: frozenset[tuple[str, str]]) -> frozenset[tuple[str, str]]:
        """The operations that are measured where some are asked for: those of all unified names with
        one of them, and else the same one in all modules of a class. So a sweep measures once."""
        found = self._measured.get(inner)
        if found is not None:
            return found
        asked = {(path, f"{port.rpartition('.')[0]}.output") for path, port in inner}
        every: set[tuple[str, str]] = set()
        for vocabulary in self._vocabularies.values():
            if not asked.isdisjoint(vocabulary.inner_operations):
                every |= vocabulary.inner_operations
        tree = self.module_tree()
        for path, port in asked - every:
            kind = type(at_path(tree, path))
            every.update(
                (p, port)
                for p, child in tree.named_modules(remove_duplicate=False)
                if type(child) is kind
            )
        found = self._measured[inner] = frozenset(every)
        return found

    def operations(self, path: str, prefix: str) -> Listing:
        """The operations inside the forward of a module.

        Args:
            prefix: of their ports: "source", "functions", or that of an operation and "source".

        Raises:
            SourceError: they cannot be had.
        """
        module = self.submodule(path)
        if prefix == "source":
            what = f"the forward of `{path}` ({type(module).__name__})"
            return listing(getattr(module, forward_name(module)), what)
        functions = prefix == "functions"
        place = prefix if functions else prefix.removesuffix(".source")
        tracer = current_tracer()
        prompts = [i.prompt for i in tracer.invokes if i.prompt is not None] if tracer else []
        try:
            schedule = self.schedule(
                next(iter(prompts), None), inner=frozenset({(path, f"{place}.output")})
            )
        except ScheduleError as error:
            raise SourceError.never_called(path, place, f"there is none: {error}") from error
        called = schedule.callees.get((path, place))
        if called is None:
            raise SourceError.never_called(path, place, "that run did not reach it")
        if functions:
            rows = tuple(InnerOperation(name, name, 0) for name in called)
            return Listing(f"torch functions that `{path}` calls, as in a trial run", rows)
        return listing(called, f"`{place}` of `{path}`")

    def _skeleton_to_measure(self) -> torch.nn.Module:
        try:
            return self.skeleton()
        except Exception as error:  # whatever keeps a module from being copied
            raise ScheduleError.no_schedule("This block", f"it has no skeleton: {error}") from error

    def gives_tensor(self, entry: Entry) -> bool:
        """True if the entry point of the block returns one tensor, and no structure."""
        return False

    def return_options(self, entry: Entry) -> Hashable:
        """Options of the block that change what modules return."""
        options = self._trial_options(entry)
        return repr(options) if options else ""

    def _trial_options(self, entry: Entry) -> dict[str, Any]:
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

    def _most_tokens(self) -> int | None:
        """Tokens that a forward can have with those in its cache; None where nothing limits them."""
        return None

    def _continued_inputs(
        self, batch: int, tokens: int, past: int, prompt: Any, options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As `_trial_inputs`, behind a cache that has seen `past` tokens."""
        raise ScheduleError.no_schedule(
            "A forward behind a cache", "this model is known to have none"
        )

    def meta_module(self, path: str) -> torch.nn.Module:
        """A module that can be applied to values without numbers."""
        # A loaded one may choose kernels by its dtype, which the meta device does not have.
        attached = self._held.find(path) if self._held.attached else None
        return attached if attached is not None else at_path(self.skeleton(), path)

    def meta_parameter(self, path: str) -> torch.Tensor:
        return _tensor_at(self.skeleton(), path)

    # ---------------------------------------------------------------- blocks

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """One forward. With a prompt, the block is about it; without, open invokes inside.

        Args:
            *args, **kwargs: the arguments of the module's forward. `trace=False` runs it now, with the
                edits of this model, and gives what it returns.

        Raises:
            InputError: the prompt cannot be read.
        """
        settings = kwargs.pop("plan", None)
        settings_of(settings)
        now = kwargs.pop("trace", True) is False
        tracer = Tracer(
            self,
            self,
            generates=False,
            args=args,
            prompt_kwargs=kwargs,
            kwargs={},
            settings=settings,
        )
        return tracer.output if now else tracer

    def scan(self, *args: Any, **kwargs: Any) -> Tracer:
        """As `trace`, on values without numbers: no weights are loaded and nothing runs.

        At the exit, shapes, order and names are checked; saved values are meta tensors.

        Raises:
            InputError: the prompt cannot be read.
        """
        tracer: Tracer = self.trace(*args, **kwargs)
        tracer.scans(Scan(self))
        return tracer

    def session(self) -> Session:
        """Blocks opened inside run when the session ends; values flow between them unsaved."""
        return Session()

    def invoke(self, *args: Any, **kwargs: Any) -> Tracer:
        """The same as `trace` with a prompt."""
        return self.trace(*args, **kwargs)  # type: ignore[no-any-return]

    def oracle(self, written: Recorded) -> Shapes:
        return Shapes(written, self)

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        rows = {tensor.shape[0] for tensor in tensors if tensor.ndim}
        # Tensors whose first axes differ have no common batch: such a prompt runs alone.
        common = len(rows) == 1

        def own(leaf: Any) -> Any:
            # What the user changes later is for a later prompt; a leaf of autograd is itself.
            return leaf.clone() if type(leaf) is torch.Tensor and not leaf.requires_grad else leaf

        return TensorPrompt(
            map_leaves(own, args, own=True),
            map_leaves(own, kwargs, own=True),
            [0] * (rows.pop() if common else 1),
            alone=not common or bool(changed_in((args, kwargs))),
            needs_grad=any(tensor.requires_grad for tensor in tensors),
        )

    def remember(self) -> Known:
        """What the runs of a block that is still written will have found."""
        return Known()

    def run(self, job: Job, known: Known | None = None) -> Outcome:
        """Plan a finished block, load the weights if they are not loaded, and run it."""
        self._check_shapes(job, job.graph.live())
        warn_of_padding(job, self.oracle(job))
        if known is None:
            return self.run_block(Task(job))
        if job.graph.backwards or job.graph.stops or known.put_back or Changing(job):
            # Autograd must see how values came to be, and the run where it is to stop; and arguments
            # and statistics that a forward changes are to be as one forward leaves them.
            with self._draws(job, known, True):
                return self.run_block(Task(job, known=known))
        places = self._places(job)
        known.update(job, places)
        return self._run_part(job, known, known.rest(job, places))

    def _check_shapes(self, written: Recorded, live: bytearray | None = None) -> None:
        """Refuse shapes that do not fit, while the weights are still to be loaded. Afterwards the run
        tells as soon, and a sweep need not pay for it."""
        if not self.loaded and self._is_like_trial(written):
            ShapeCheck(
                written.graph, self.oracle(written), self._unlike_trial(written.entry)
            ).go_on(live)

    def early_check(self, written: Recording) -> Callable[[], None] | None:
        """What checks operations at their lines: where the weights are not loaded, and the forward has
        been measured before."""
        if self.loaded or not self._schedules or not self._is_like_trial(written):
            return None
        found: list[ShapeCheck] = []

        def check() -> None:
            if written.loop is not None or written.session is not None:
                return  # what is put in place later is checked there
            if not found:
                shapes = self.oracle(written)
                found.append(ShapeCheck(written.graph, shapes, self._unlike_trial(written.entry)))
            found[0].go_on()

        return check

    def _is_like_trial(self, written: Recorded) -> bool:
        """False where something besides the prompts may change the shapes that a trial has."""
        return False

    def _unlike_trial(self, entry: Entry) -> frozenset[str]:
        """Modules whose values have other shapes in this block than in a trial."""
        return frozenset()

    def demand(self, job: Job, node: Node, known: Known) -> Any:
        """The value of a node of a block that is still open: runs what it needs."""
        self._check_shapes(job)
        if job.graph.backwards or job.graph.stops:
            known.forget()  # as in `run`
        places = self._places(job)
        known.update(job, places)
        if node.index not in known.values:
            part = known.part(job, node, places)
            untouched: AbstractContextManager[None] = nullcontext()
            if job.graph.backwards:
                untouched = gradients_untouched(job.graph, self.load().parameters())
            with untouched:
                self._run_part(job, known, part)
            value = part.value(node)
        else:
            value = known.values[node.index]
        return map_leaves(_own, value)

    def may_end(self, entry: Entry) -> bool:
        return False

    def reaches(self, job: Job, invoke: int, step: int, known: Known) -> bool:
        """True if the generation of an invoke has that step, by what is recorded so far."""
        if job.graph.stops:
            known.forget()  # as in `run`
        places = self._places(job)
        known.update(job, places)
        steps, ends = known.steps.get(invoke, (0, False))
        if step >= steps and not ends:
            part = known.count(job, invoke, step, places)
            self._run_part(job, known, part)
            own = job.prompts[invoke] is not None
            steps = part.reached.get(invoke, 0) if own else max(part.reached.values(), default=0)
            known.steps[invoke] = steps, part.until is None or steps <= step
        return step < steps

    def _places(self, job: Job) -> Places:
        may_start = not job.entry.generates and settings_of(job.settings).prefix_reuse
        return Places(BlockFacts(self, Task(job)).schedule, may_start and self.may_share(job))

    def _run_part(self, job: Job, known: Known, part: Part) -> Outcome:
        settings = dataclasses.replace(settings_of(job.settings), dead_code=True)
        own = dataclasses.replace(job, graph=part.graph, settings=settings)
        kept = None if part.whole else Statistics(self.module_tree())
        try:
            with self._draws(job, known, part.whole):
                outcome = self.run_block(Task(own, part, known))
        finally:
            known.put_back |= kept is not None and kept.put_back()
        known.learn(part)
        return outcome

    def _draws(self, job: Job, known: Known, last: bool) -> AbstractContextManager[None]:
        """In it, a run draws the random numbers that all runs of its block draw."""
        if job.entry.generates or any(child.training for child in self.module_tree().modules()):
            return same_draws(known, last)
        return nullcontext()

    def check_repeats(self, job: Job) -> None:
        """Refuse a block that would compute something else if it ran again.

        Raises:
            BlockError: a forward changes one of its arguments.
        """
        changing = Changing(job)
        if changing:
            raise BlockError.used_up(changing.kind, job.location)

    def run_block(self, task: Task) -> Outcome:
        """Plan and run a block, or a part of one."""
        graph = task.job.graph
        if any(p is not None and p.needs_grad for p in task.job.prompts):
            graph.needs_grad = True
        if graph.stops and task.job.uses_output and not task.job.entry.generates:
            raise BlockError.stopped_output(graph.stops[0].location)
        work = self.plan_task(task)
        module = self.load()
        for vocabulary in self._vocabularies.values():
            vocabulary.verify_used(verify)
        if graph.backwards and any(
            child.training and getattr(child, "gradient_checkpointing", False)
            for child in module.modules()
        ):
            raise BlockError.checkpointing()
        if any(one.cut for one in work.passes) and not self.is_causal():
            work = self.plan_task(task, causal=False)
        return self._lock.during(lambda: self._run_planned(task, work, module))

    def _run_planned(self, task: Task, work: Plan, module: torch.nn.Module) -> Outcome:
        graph = task.job.graph
        gradients: AbstractContextManager[None] = nullcontext()
        if graph.backwards:
            gradients = gradients_as_asked(graph, module)
        execution: Execution | None = None

        def run() -> Outcome:
            nonlocal execution
            with gradients, no_grad(graph):
                execution = Execution(self, task, work, module)
                return execution.run()

        return unharmed(run, lambda: None if execution is None else execution.undo())

    def module_paths(self, modules: Any) -> list[str]:
        # Containers such as ModuleList have no forward, so nothing arrives there.
        known = [
            name
            for name, child in self.module_tree().named_modules(remove_duplicate=False)
            if name and type(child).forward is not torch.nn.Module.forward
        ]
        if modules is None:
            return known
        found: dict[str, None] = {}
        if not isinstance(modules, (str, Envoy, Iterable)):
            raise InputError(
                f"`modules` are modules, their paths or patterns, in a list, not {modules!r:.60}."
            )
        for module in [modules] if isinstance(modules, (str, Envoy)) else modules:
            pattern = module.path if isinstance(module, Envoy) else str(module)
            named = [name for name in known if fnmatchcase(name, pattern)]
            if "*" in pattern:  # a star is one name, as in a path of files
                named = [name for name in named if name.count(".") == pattern.count(".")]
            if not named and self._names and "*" not in pattern:
                named = [self.get(pattern).path]
            if not named:
                kind = type(self.module_tree()).__name__
                raise UnknownModuleError.child("", kind, pattern, known)
            found.update(dict.fromkeys(named))
        return list(found)

    def most_steps(self, entry: Entry, prompt: Any) -> int:
        return 1

    def explain(self, job: Job) -> Explanation:
        """The plan of a block as text."""
        return explain(self, job)

    def plan_block(self, block: Tracer) -> Plan:
        """The work of a block, planned and not run."""
        return self.plan_task(Task(block.job()))

    def plan_task(self, task: Task, causal: bool = True) -> Plan:
        """The work of a block: its passes, batches and what is left out.

        Raises:
            BlockError: the block has no prompt.
            OrderError: it cannot be put in an order.
        """
        prompted = [i for i, p in enumerate(task.job.prompts) if p is not None]
        part: Part | None = task.part
        if part is not None and part.only is not None:
            prompted = [index for index in prompted if index in part.only]
        elif not prompted:
            raise BlockError.empty()
        settings = settings_of(task.job.settings)
        if not causal:
            settings = dataclasses.replace(settings, causal=False)
        facts = BlockFacts(self, task)
        graph = task.job.graph
        # A graph that runs again on one prompt of the same size has the same plan.
        plans = graph.plans if len(prompted) == 1 and part is None else None
        key = (facts.extent(prompted[0]), settings) if plans is not None else None
        if plans is not None and key in plans:
            known: Plan = plans[key]
            return known
        work = plan(graph, prompted, facts, settings)
        if plans is not None and len(work.passes) == 1 and not work.passes[0].base:
            plans[key] = work
        if part is not None and (part.resume.starts or part.resume.keeps):
            resume(work, part, facts.schedule().chain)
        return work

    def results_by_invoke(
        self, job: Job, outcome: Outcome, prompts: dict[int, Any], result: Any
    ) -> dict[int, Any]:
        """What the entry point returned for each prompt of a pass."""
        raise AssertionError("only a generation has a result, and a plain module has none")

    def around(
        self,
        task: Task,
        run: Run,
        module: torch.nn.Module,
        prompts: list[Any],
        outcome: Outcome,
    ) -> AbstractContextManager[Any]:
        """What else has to be in place while a pass runs."""
        return nullcontext()

    def may_stop(self, task: Task, module: torch.nn.Module) -> bool:
        if (task.part is None or task.part.whole) and (
            task.job.entry.generates or task.job.uses_output
        ):
            return False
        if task.part is not None and task.part.counts:
            return False
        # Offloaded weights go back after a module's forward; leaving one half-way would keep them.
        places = getattr(module, "hf_device_map", {}).values()
        return not any(str(place) in ("cpu", "disk") for place in places) or set(places) == {"cpu"}

    def batch_class(self, task: Task, invoke: int) -> Hashable:
        """Prompts of one class can be batched."""
        kind: Hashable = self._shape_class(task.job.prompts[invoke])
        return kind

    def mixes_rows(self) -> bool:
        """True if a module computes a row from other rows too, or has its batch on another axis."""
        return any(
            getattr(child, "batch_first", True) is False
            or (child.training and isinstance(child, torch.nn.modules.batchnorm._BatchNorm))
            for child in self.module_tree().modules()
        )

    def _shape_class(self, prompt: Any) -> Any:
        """Prompts of one class can be batched."""

        def part(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return (tuple(leaf.shape[1:]), leaf.dtype) if leaf.ndim else leaf.item()
            return leaf if type(leaf) in ATOMS else id(leaf)

        kind = repr((map_leaves(part, prompt.args), map_leaves(part, prompt.kwargs)))
        return (kind, id(prompt)) if prompt.alone else kind

    def prompt_identity(self, prompt: Any) -> Hashable:
        """Equal for equal inputs; None where they are not compared."""
        return None

    def budget(self, schedule: Schedule, all_logits: bool) -> int:
        """Rows (for a language model, tokens) that fit into one forward.

        A quarter of the free memory, for what is alive at once: the outputs of the modules of one
        block, and the logits three times.
        """
        each = self._bytes_each(schedule, all_logits)
        return max(1, free_memory(self.planned_device()) // 4 // each)

    def _bytes_each(self, schedule: Schedule, all_logits: bool) -> int:
        head = self.unembedding_path()
        blocks: dict[str, int] = {}
        for (path, port, _), visit in schedule.visits.items():
            if port == "output" and path != head and path:
                size = bytes_each(visit.axes)
                block = next((b for b in schedule.chain if path.startswith(f"{b}.")), path)
                blocks[block] = blocks.get(block, 0) + size
        largest = max(blocks.values(), default=1)
        if head is not None and all_logits:
            largest += 3 * bytes_each(schedule.visits[head, "output", 0].axes)
        return max(1, largest)

    def may_share(self, job: Job) -> bool:
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

    def unembedding_path(self) -> str | None:
        """Path of the unembedding, if the forward can apply it to the last positions alone."""
        return None

    def forward(
        self,
        task: Task,
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

    def join_results(
        self, job: Job, outcome: Outcome, passes: list[Pass], results: list[Any]
    ) -> None:
        """Put the entry point's result for the whole block into `outcome`."""
        if len(results) == 1:
            outcome.result = results[0]

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
            place, _, name = path.rpartition(".")
            return used_weight(self.submodule(place), name)[0]
        # Offloaded: the weights are on the meta device except while the module runs.
        from accelerate.utils import align_module_device

        place, _, name = path.rpartition(".")
        owner = self.submodule(place)
        with align_module_device(owner):
            return getattr(owner, name).detach().clone()  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return repr(self.module_tree())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


def compiled_in(module: torch.nn.Module) -> str | None:
    """What in `module` is compiled, so that hooks on it would be compiled with it, or not run."""
    for path, child in module.named_modules():
        kinds = [kind.__name__ for kind in type(child).__mro__]
        if "OptimizedModule" in kinds or getattr(child, "_compiled_call_impl", None) is not None:
            return f"`{path}` is compiled by torch.compile" if path else "it is compiled"
        if isinstance(child, torch.jit.ScriptModule):
            return f"`{path}` is a TorchScript module" if path else "it is a TorchScript module"
    return None


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _own(leaf: Any) -> Any:
    """A tensor for the user: no other holds its memory, and no gradient hangs on it."""
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


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
