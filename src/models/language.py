"""Owns `LanguageModel`: a Hugging Face language model with its tokenizer, loaded when a block runs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..envoy import Alias
from ..envoy.attached import open_recording
from ..inputs.changing import changed_in
from ..inputs.generation import (
    ALONE,
    GUESSES,
    LENGTH,
    LOOP,
    OPTIONS,
    RETURNED,
    SAVES,
    Clock,
    Options,
    StoppingClock,
    check_counts,
    looks_at_steps,
)
from ..inputs.prompts import DECODED, PER_TOKEN, Reader, TextPrompt, batch
from ..intervention import Pass, Run, Task, add_hook, own_draws, remove_hooks, unharmed
from ..intervention.fingerprint import fingerprint
from ..intervention.interrupts import put_back, uninterrupted
from ..intervention.locks import turn_of
from ..intervention.plan import settings_of
from ..intervention.schedule import TARGETS
from ..tracing.context import Tracer
from ..tracing.errors import BlockError, InputError, LoadError, ScheduleError, near
from ..tracing.frames import entry
from ..tracing.job import Entry, Job, Outcome, Recorded
from ..tracing.node import READ, WRITE
from ..tracing.structure import ATOMS
from . import calls
from .architectures import IDS, POSITIONS, alias_of, padding_of, pads, pads_right
from .base import Model, accepts
from .loading import Checkpoint, placement, takes_images, what_loading_replaces

logger = logging.getLogger("graftwork")

_REMOTE = ("remote", "server")
#: Options of `generate` that leave the shapes of its forwards as they are.
_SAME_SHAPES = frozenset(
    "max_new_tokens min_new_tokens max_length do_sample temperature top_k top_p use_cache "
    "eos_token_id pad_token_id repetition_penalty".split()
)
#: What models call their cache, as an input and in what they return.
_CACHES = ("past_key_values", "cache_params", "state", "mems")
#: Names of `cache_implementation` under which a layer keeps the tokens that there are, and no more.
_GROWING = (None, "dynamic", "offloaded", "quantized")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class LanguageModel(Model):
    """A language model, by hub id, folder or module.

    From a name, only the configuration and the tokenizer are read now. The weights are loaded when
    the first block that runs exits, or by `load()`.

    Args:
        source: hub id, folder, "graftwork/tiny" (in the package), or a transformers module.
        tokenizer: instead of the checkpoint's own; needed for text with a module.
        dtype: fp32, fp16, bf16, fp64 (or float32 …), int8, int4, nf4 or a torch.dtype; default the
            checkpoint's.
        device_map: as in transformers: "auto", "cpu", "cuda:0", or a mapping of modules.
        rename: further names for modules, as for `Model`.
        hook_config: which policies `model.hooks` has where, as for `Model`.
        **options: go to `from_pretrained`, but for these: `automodel`, a class of transformers or its
            name, instead of the one that the checkpoint was saved as; `task`, the same by what it is
            for, such as "text-classification"; `allow_missing`, patterns of weights that may be random
            or left out, such as ["score.*"]; `dispatch=True` loads now.

    Raises:
        LoadError: there is no such model, or the options do not fit. When the weights are loaded: the
            files are damaged, or are not those of this model.

    Example:
        model = LanguageModel("graftwork/tiny")
        with model.trace("The Eiffel Tower is in the city of"):
            hidden = model.transformer.h[-1].output.save()   # [batch, token, d_model]
    """

    @entry
    def __init__(
        self,
        source: Any,
        tokenizer: Any = None,
        *,
        dtype: Any = None,
        device_map: Any = None,
        rename: Mapping[Any, Any] | None = None,
        hook_config: Any = None,
        **options: Any,
    ) -> None:
        if "torch_dtype" in options:
            dtype = options.pop("torch_dtype")
        device_map = placement(options, device_map)
        dispatch = options.pop("dispatch", False)
        self._checkpoint: Checkpoint | None = None
        self.config: Any
        if isinstance(source, torch.nn.Module):
            if dtype is not None or device_map is not None or options:
                given = [
                    *options,
                    *(["dtype"] if dtype else []),
                    *(["device_map"] if device_map else []),
                ]
                raise LoadError(
                    f"{', '.join(sorted(given))} only apply to a model that is loaded by name; this "
                    "module exists already. Use `module.to(...)` before wrapping it."
                )
            if not hasattr(source, "config"):
                raise LoadError(
                    f"LanguageModel needs a transformers model, which has a `config`; "
                    f"{type(source).__name__} has none. Use `Model(module)`."
                )
            super().__init__(source, rename=rename)
            self.config = source.config
            name = type(source).__name__
        elif isinstance(source, str) or hasattr(source, "__fspath__"):
            name = str(source)
            self._checkpoint = Checkpoint(name, dtype, device_map, options)
            self.config = self._checkpoint.config
            self._start(uninterrupted(self._checkpoint.skeleton), rename)
            if takes_images(self.module_tree()):
                self.__class__ = ImageModel  # by its name alone nobody could tell
            elif tokenizer is None:
                tokenizer = self._checkpoint.tokenizer()
        else:
            raise LoadError(
                f"LanguageModel takes a hub id, a folder or a module, not {type(source).__name__}."
            )
        self.tokenizer = tokenizer
        forward = self.module_tree().forward
        self._takes_mask = accepts(forward, "attention_mask")
        self._padding = padding_of(self.config) if self._takes_mask else None
        self._takes_positions = self._padding == POSITIONS and accepts(forward, "position_ids")
        self._reader = Reader(
            tokenizer,
            self._context(),
            self._vocabulary(),
            name,
            pad=self.config.pad_token_id if self._padding == IDS else None,
            pads=self._pads,
            right=pads_right(self.config),
            decodes=self.config.is_encoder_decoder,
        )
        self._keeps_logits = accepts(forward, "logits_to_keep")
        self._takes_cache = accepts(forward, "use_cache")
        self._cache_name = next((name for name in _CACHES if accepts(forward, name)), None)
        self._clock: Clock | None = None
        self._encoder: str | None = None
        self._head: str | None = None
        self._causal: bool | None = None
        if hook_config is not None:
            self.set_hook_config(hook_config)
        if dispatch:
            self.load()

    def _start(self, skeleton: torch.nn.Module, rename: Mapping[Any, Any] | None) -> None:
        super().__init__(skeleton, rename=rename)
        self._skeleton, self._module = skeleton, None

    # ---------------------------------------------------------------- the module

    @entry
    def load(self) -> torch.nn.Module:
        return self._lock.during(self._loaded)

    def _loaded(self) -> torch.nn.Module:
        if self._module is None:
            assert self._checkpoint is not None
            module = unharmed(self._checkpoint.load, put_back(what_loading_replaces()))
            self._held.fingerprint = fingerprint(module)
            turn_of(module, self._lock)
            self._module = module
        return self._module

    def planned_device(self) -> torch.device:
        if self._module is not None:
            return super().planned_device()
        device_map = self._checkpoint.device_map if self._checkpoint else None
        if device_map == "auto" and torch.cuda.is_available():
            return torch.device("cuda", 0)
        if isinstance(device_map, torch.device):
            return device_map
        if isinstance(device_map, str) and device_map.split(":")[0] in (
            "cpu",
            "cuda",
            "mps",
            "xpu",
        ):
            return torch.device(device_map)
        return torch.device("cpu")

    def is_block(self, module: torch.nn.Module) -> bool:
        # Every decoder layer of transformers, and nothing else, derives from this class.
        from transformers.modeling_layers import GradientCheckpointingLayer

        return isinstance(module, GradientCheckpointingLayer)

    def alias_at(self, module: torch.nn.Module, name: str) -> Alias | None:
        return alias_of(module, name)

    def _context(self) -> int | None:
        """Longest prompt of a model whose positions are rows of a learned table."""
        config = self.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        if not isinstance(limit, int):
            return None
        tables = [
            child.num_embeddings
            for child in self.module_tree().modules()
            if isinstance(child, torch.nn.Embedding)
        ]
        # OPT and RoBERTa keep rows for two positions that no token has.
        learned = any(size in (limit, limit + 2) and size != config.vocab_size for size in tables)
        if not learned:
            return None
        offset = 2 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
        return limit - offset

    def _embedding(self) -> Any:
        try:
            return self.module_tree().get_input_embeddings()  # type: ignore[operator]
        except NotImplementedError:  # several inputs, as of CLIP, or one that is no token
            return None

    def _vocabulary(self) -> int | None:
        return getattr(self._embedding(), "num_embeddings", None)

    # ---------------------------------------------------------------- structure

    def skeleton(self) -> torch.nn.Module:
        fresh = self._skeleton is None
        skeleton = super().skeleton()
        if fresh and any(hasattr(self.config, name) for name in _EXPERTS):
            # The other implementations have shapes that depend on data, or fake kernels for bf16 only.
            skeleton.set_experts_implementation("batched_mm")  # type: ignore[operator]
        return skeleton

    def _pads(self) -> bool:
        module: Any = self.module_tree()
        # PEFT puts tokens of its own before the rows, and drops the positions that padding needs.
        learned = getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False)
        return not learned and pads(self.config, module)

    @property
    def pads_right(self) -> bool:
        return self._reader.right

    def _forget(self) -> None:
        super()._forget()
        self._head = self._causal = self._encoder = None
        self._reader.limit = self._context()

    def _kind_of(self, prompt: Any) -> str:
        return ""

    def mixes_rows(self) -> bool:
        return False

    def _trial_inputs(
        self, batch: int, tokens: int, prompt: Any, options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def whole() -> torch.Tensor:
            return torch.zeros(batch, tokens, dtype=torch.long, device="meta")

        inputs = {"input_ids": whole()}
        if self._takes_mask:
            inputs["attention_mask"] = torch.ones_like(whole())
        if self._takes_positions:
            inputs["position_ids"] = whole()
        if self.config.is_encoder_decoder:
            size = (batch, TARGETS.get(tokens, tokens))
            inputs["decoder_input_ids"] = torch.zeros(size, dtype=torch.long, device="meta")
        return (), {**inputs, **options}

    def _continued_inputs(
        self, batch: int, tokens: int, past: int, prompt: Any, options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        module, name = self._skeleton_to_measure(), self._cache_name
        _, inputs = self._trial_inputs(batch, tokens, prompt, options)
        decodes = self.config.is_encoder_decoder
        cut = ("decoder_input_ids",) if decodes else PER_TOKEN
        first = {k: v[:, :1] if k in cut else v for k, v in inputs.items()}
        cache = self._own_cache()
        if cache is not None and name is not None:
            first[name] = cache
        seen = module(**{**first, "use_cache": True, "return_dict": True})
        if cache is None:
            cache = getattr(seen, name or "", None)
        if cache is None or name is None:
            raise ScheduleError.no_schedule("A forward behind a cache", "this model returns none")
        for layer in getattr(getattr(cache, "self_attention_cache", cache), "layers", ()):
            kept = [getattr(layer, name, None) for name in ("keys", "values")]
            more = [k.expand(-1, -1, past - 1, -1) for k in kept if isinstance(k, torch.Tensor)]
            if past > 1 and len(more) == 2:
                # As if it had seen them: what it keeps of them is its own affair.
                layer.update(*more)
        if decodes:
            inputs["encoder_outputs"] = (seen.encoder_last_hidden_state,)
            del inputs["input_ids"]
        elif self._takes_mask:
            mask = inputs.pop("attention_mask")
            if name == _CACHES[0]:  # a state alone has no place for it
                inputs["attention_mask"] = torch.cat([mask.new_ones(batch, past), mask], 1)
        return (), {**inputs, name: cache}

    def _most_tokens(self) -> int | None:
        return self._reader.limit

    def _own_cache(self) -> Any:
        """The cache that a generation begins with; None where the model makes its own kind."""
        module: Any = self.module_tree()
        if self._cache_name not in _CACHES[:2] or not module._supports_default_dynamic_cache():
            return None
        from transformers import DynamicCache, EncoderDecoderCache

        config = self.config.get_text_config(decoder=True)
        cache = DynamicCache(config=config)
        if not self.config.is_encoder_decoder:
            return cache
        return EncoderDecoderCache(cache, DynamicCache(config=config))

    def gives_tensor(self, entry: Entry) -> bool:
        given = entry.options.get("generation_config") or getattr(
            self.module_tree(), "generation_config", None
        )
        name = "return_dict_in_generate"
        return entry.generates and not entry.options.get(name, getattr(given, name, False))

    def return_options(self, entry: Entry) -> Hashable:
        ids = not entry.generates or self.gives_tensor(entry)
        return super().return_options(entry), entry.generates, ids

    def _trial_options(self, entry: Entry) -> dict[str, Any]:
        return {
            name: value
            for name, value in entry.options.items()
            if type(value) in ATOMS and (not entry.generates or name in RETURNED)
        }

    def _is_like_trial(self, written: Recorded) -> bool:
        prompts = [p for p in written.prompts if p is not None]
        if any(getattr(prompt, "other", None) for prompt in prompts):
            return False  # a cache, or what a decoder is given
        if written.entry.generates:
            plain = (
                written.entry.options.keys() <= _SAME_SHAPES and not self.config.is_encoder_decoder
            )
            return plain and self._options(written.entry).repeats == 1
        return all(type(value) in ATOMS for value in written.entry.options.values())

    def _unlike_trial(self, entry: Entry) -> frozenset[str]:
        # Of a prompt, a generation unembeds the last token alone.
        return frozenset({"", self.unembedding_path() or ""} if entry.generates else ())

    def targets(self, entry: Entry, prompt: Any) -> int | None:
        if not self.config.is_encoder_decoder:
            return None
        for given in (getattr(prompt, "other", {}), entry.options):
            for name in DECODED:
                if isinstance(given.get(name), torch.Tensor):
                    return int(given[name].shape[-1 if name != "decoder_inputs_embeds" else -2])
        # Else a generation begins with one token, and a forward with the prompt's own, shifted.
        return 1 if entry.generates else prompt.width if prompt is not None else None

    def keeps_cache(self, entry: Entry) -> bool:
        return self._cache_name is not None and self._options(entry).get("use_cache") is not False

    def rows_each(self, entry: Entry, path: str) -> int:
        # Encoders run before transformers repeats the rows of the prompts.
        if not entry.generates or (path and self._in_encoder(path)):
            return 1
        return self._options(entry).repeats

    def cached(self, entry: Entry, prompt: Any) -> int:
        cache = self._given_cache(entry, prompt)
        return 0 if cache is None else int(cache.get_seq_length())

    def grows_cache(self, entry: Entry, prompt: Any) -> bool:
        cache = self._given_cache(entry, prompt)
        if cache is None:
            return (
                not entry.generates or self._options(entry).get("cache_implementation") in _GROWING
            )
        kinds, own = (
            [type(layer) for layer in getattr(one, "layers", ())]
            for one in (cache, self._own_cache())
        )
        # One without a configuration keeps all tokens where the model's own keeps the last.
        return not cache.is_compileable and kinds == own[: len(kinds)]

    def _given_cache(self, entry: Entry, prompt: Any) -> Any:
        """The user's own cache in what a block or an invoke was given."""
        given = {**entry.options, **(getattr(prompt, "other", None) or {})}
        return given.get("past_key_values")

    def _in_encoder(self, path: str) -> bool:
        if not self.config.is_encoder_decoder:
            return False
        if self._encoder is None:
            tree = self.module_tree()
            encoder = tree.get_encoder()  # type: ignore[operator]
            paths = (name for name, child in tree.named_modules() if child is encoder)
            self._encoder = next(paths, "")
        return path == self._encoder or path.startswith(f"{self._encoder}.")

    def _options(self, entry: Entry) -> Options:
        return Options(entry.options, getattr(self.module_tree(), "generation_config", None))

    def _sorts_tokens(self, module: torch.nn.Module) -> bool:
        # Every class of experts that transformers can switch between implementations has this mark.
        return hasattr(module, "_is_expert_parallel")

    # ---------------------------------------------------------------- blocks

    @entry
    def trace(self, *args: Any, **kwargs: Any) -> Tracer:
        """One forward. With a prompt, the block is about it; without, open invokes inside.

        Args:
            *args: a string, list of strings, token ids, tensor or mapping with `input_ids`.
            **kwargs: model inputs that belong to the prompt, such as `input_ids` or
                `attention_mask`, and other keywords of the model's forward.

        Raises:
            InputError: the prompt cannot be read.
        """
        return self._open(args, kwargs, generates=False)  # type: ignore[no-any-return]

    @entry
    def generate(self, *args: Any, num: int | None = None, **kwargs: Any) -> Any:
        """A generation; `generator.output` has the token ids [prompt, token].

        Args:
            *args: as in `trace`.
            num: generate so many tokens now, without a block: gives the prompt and its continuation as
                text, or a list of texts for several prompts.
            **kwargs: `max_new_tokens` and all that transformers' `generate` takes.

        Raises:
            InputError: the prompt cannot be read, or would grow past the model's positions.
        """
        if num is not None:
            return calls.generate_text(self, args, num, kwargs)
        if not hasattr(self.module_tree(), "generate"):
            raise InputError(
                f"{type(self.module_tree()).__name__} generates nothing: `trace` is one forward of it. "
                "The checkpoint may have a class that generates: `automodel=`."
            )
        return self._open(args, kwargs, generates=True)

    @entry
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The plain forward: `model(ids)`, `model(**encoding)`, `model("text")`; in a block, the model
        applied to a value.

        An edited view, and a model with policies, runs with them. Gradients are recorded as in torch.
        """
        if not args and not kwargs:
            raise InputError(
                "the model was called without an input: give it one, `model(prompt)`, or open a block, "
                "`with model.trace(prompt):`."
            )
        read = bool(args) and not isinstance(args[0], torch.Tensor)
        if open_recording(args, kwargs) is not None or not (read or self.lasting_edits()):
            return super().__call__(*args, **kwargs)
        with self.trace(*args, **kwargs) as tracer:
            tracer.graph.needs_grad = True
            tracer.uses_output = True  # as it is: a save would copy it, cache and all
        return tracer.output

    # ---------------------------------------------------------------- values without a block

    def get_logits(self, prompt: Any) -> torch.Tensor:
        """The logits of a prompt, [batch, token, d_vocab]."""
        return calls.logits(self, prompt)

    def get_residual_stream(self, prompt: Any) -> torch.Tensor:
        """The residual stream before the first layer and behind each attention and MLP of one prompt,
        [2 · layer + 1, token, d_model]."""
        return calls.residual_stream(self, prompt)

    def get_residual_stream_decoder(self, prompt: Any) -> torch.Tensor:
        """The residual stream before the first layer and behind each, [layer + 1, token, d_model]."""
        return calls.residual_stream_of_layers(self, prompt)

    def get_residual_diffs(self, prompt: Any) -> torch.Tensor:
        """What each attention and MLP adds to the stream, [2 · layer, token, d_model]."""
        return calls.residual_diffs(self, prompt)

    def get_midlayer_activations(self, prompt: Any) -> dict[str, torch.Tensor]:
        """The neurons of each MLP, "mlp" [batch, layer, token, d_mlp], and what each head gives, "attn"
        [batch, layer, token, head, d_head]."""
        return calls.midlayer_activations(self, prompt)

    def get_attn_weights(self, prompt: Any) -> torch.Tensor:
        """The patterns of one prompt, [layer, head, query, key]."""
        return calls.attention_weights(self, prompt)

    def _open(self, args: tuple[Any, ...], kwargs: dict[str, Any], generates: bool) -> Any:
        for name in _REMOTE:
            if kwargs.pop(name, False):
                raise InputError(f"`{name}=`: running on a server is not in this release.")
        settings = kwargs.pop("plan", None)
        settings_of(settings)
        now = kwargs.pop("trace", True) is False
        inputs = {key: kwargs.pop(key) for key in PER_TOKEN if key in kwargs}
        if args or inputs:  # what a decoder is given belongs to the prompt
            inputs.update({key: kwargs.pop(key) for key in DECODED if key in kwargs})
        if kwargs and not generates:
            self._check_keywords(kwargs)
        if generates:
            check_counts(kwargs)
            self._check_options(kwargs)
        tracer = Tracer(
            self,
            self,
            generates=generates,
            args=args,
            prompt_kwargs=inputs,
            kwargs=kwargs,
            settings=settings,
        )
        return tracer.output if now else tracer

    def _check_keywords(self, given: Iterable[str]) -> None:
        """Refuse what the forward does not know: transformers ignores it, and a typo has no effect."""
        module = self.module_tree()
        if not _is_of_transformers(module):
            return
        known = _inputs_of(module)
        for name in given:
            if name not in known:
                kind = type(module).__name__
                raise InputError(
                    f"the forward of {kind} has no input `{name}`. {near(name, known)}"
                )

    def _check_inputs(self, names: Iterable[str], given: Mapping[str, Any]) -> None:
        """Refuse what an invoke cannot give to the forward, which would ignore it."""
        own, taken = list[str](), inspect.signature(self.module_tree().forward).parameters
        for name in names:
            option = name in OPTIONS and name not in taken
            if option and not isinstance(given[name], torch.Tensor):
                raise InputError(
                    f"`{name}` is an option of the whole block: give it to `model.generate(…)`, not to "
                    "an invoke."
                )
            own += [] if option else [name]
        self._check_keywords(own)

    def _check_options(self, given: Mapping[str, Any]) -> None:
        """Refuse what a generation does not know, before the weights are loaded for it."""
        module: Any = self.module_tree()
        unknown = [name for name in given if name not in OPTIONS]
        if not unknown or "custom_generate" in given or not _is_of_transformers(module):
            return
        own = inspect.signature(module.generate).parameters
        for name in unknown:
            if name in own or hasattr(module.generation_config, name):
                continue
            try:
                module._validate_model_kwargs({name: True})  # what else reaches the forward
            except ValueError:
                known = dict.fromkeys([*OPTIONS, *own, *_inputs_of(module)])
                raise InputError(
                    f"`generate` of {type(module).__name__} has no option `{name}`. {near(name, known)}"
                ) from None

    def sample_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rows = self._vocabulary() or 100
        ids = [(7 * i + 5) % rows for i in range(6)]
        if self.config.is_encoder_decoder:
            return (ids,), {"decoder_input_ids": torch.tensor([[(3 * i) % rows for i in range(4)]])}
        return (ids,), {}

    def sample_prompt(self) -> TextPrompt:
        # Long, so that it has the tokens that an edit names.
        return self.prepare(([0] * min(self._reader.limit or 997, 997),), {})

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TextPrompt:
        further = [name for name in kwargs if name not in PER_TOKEN and name not in DECODED]
        if further:
            self._check_inputs(further, kwargs)
        embedding, reader = self._embedding(), self._reader  # it may have been resized
        reader.vocabulary = getattr(embedding, "num_embeddings", None)
        reader.channels = getattr(embedding, "embedding_dim", None)
        return self._reader.read(args, kwargs)

    def run_block(self, task: Task) -> Outcome:
        if task.job.entry.generates:
            if self._reader.limit is not None:
                self._check_length(task.job, self._reader.limit)
            option = self._options(task.job.entry).without_steps()
            if option is not None and looks_at_steps(task.job.graph):
                raise BlockError.no_steps(option, task.job.location)
        return super().run_block(task)

    def _check_length(self, job: Job, limit: int) -> None:
        options = self._options(job.entry)
        for prompt, location in zip(job.prompts, job.lines, strict=True):
            if prompt is None:
                continue
            first = self._continued(job.entry, prompt)
            new, total = options.get("max_new_tokens"), options.get("max_length")
            if new is None and total is not None:
                new = int(total) - first
            # The last token is not fed to the model.
            if first + int(new or 0) - 1 > limit:
                raise InputError(
                    f"the prompt of {first} tokens ({location}) and {new} new ones "
                    f"pass the {limit} positions of the model."
                )

    def _continued(self, entry: Entry, prompt: TextPrompt | None) -> int:
        """How many tokens a generation continues: the prompt's, or those that a decoder begins with."""
        if not self.config.is_encoder_decoder:
            return 0 if prompt is None else prompt.width
        given = {} if prompt is None else prompt.other
        begins = given.get("decoder_input_ids", entry.options.get("decoder_input_ids"))
        return 1 if begins is None else int(begins.shape[1])

    def most_steps(self, entry: Entry, prompt: Any) -> int:
        options = self._options(entry)
        new = options.get("max_new_tokens")
        if new is not None:
            return int(new)
        total, first = options.get("max_length"), self._continued(entry, prompt)
        if total is None:
            # transformers' own default: 20 new tokens, or as many as there are positions.
            limit = getattr(self.config, "max_position_embeddings", None)
            if prompt is not None and "input_ids" not in prompt.inputs:
                first = 0
            total = first + 20 if limit is None else min(first + 20, limit)
        return max(1, int(total) - first)

    def may_end(self, entry: Entry) -> bool:
        return self._options(entry).may_end()

    def _draws_early(self, task: Task) -> bool:
        """True if values were asked for while a block was written that samples: then each prompt draws
        by itself, so that all runs of the block draw the same for it."""
        return task.known is not None and bool(self._options(task.job.entry).get("do_sample"))

    def batch_class(self, task: Task, invoke: int) -> Hashable:
        alike: Hashable = super().batch_class(task, invoke)
        # The rows of a cache that somebody gives are those of one invoke, or of all of them.
        past = task.job.entry.options.get("past_key_values")
        if past is not None and _rows_of(past) == task.job.prompts[invoke].rows:
            return invoke
        if not task.job.entry.generates:
            return alike
        options, graph = self._options(task.job.entry), task.job.graph
        # Architectures that are not known may mix the states of rows of one length, too: RWKV does.
        if self._padding is None or options.asks(ALONE) or self._draws_early(task):
            return invoke
        if options.asks(SAVES, GUESSES, LOOP) and not looks_at_steps(graph):
            return invoke
        if any(isinstance(value, torch.Tensor) for value in task.job.entry.options.values()):
            return invoke  # it has the rows of one prompt
        # Only the beam search itself knows at which step it is done with a prompt.
        if (
            options.number("num_beams") > 1
            and options.endings() is not None
            and any(node.kind in (READ, WRITE) and node.target.step for node in graph.nodes)
        ):
            return invoke
        if options.asks(LENGTH) or options.get("max_new_tokens") is None:
            return alike, task.job.prompts[invoke].width
        return alike

    def prompt_identity(self, prompt: Any) -> Hashable:
        if prompt.other:
            return None
        if any(tensor.is_floating_point() for tensor in prompt.inputs.values()):
            return None
        return tuple(
            (name, tuple(tensor.shape), tensor.cpu().numpy().tobytes())
            for name, tensor in sorted(prompt.inputs.items())
        )

    def unembedding_path(self) -> str | None:
        if self._head is None and self._keeps_logits:
            head = self.module_tree().get_output_embeddings()  # type: ignore[operator]
            several = isinstance(head, torch.nn.ModuleList)  # musicgen has one for each codebook
            paths = [
                name
                for name, child in self.module_tree().named_modules()
                if child is head and not several
            ]
            self._head = paths[0] if paths else None
        return self._head

    def _shape_class(self, prompt: Any) -> Any:
        def kind(name: str, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            # Of other tensors nobody knows which rows they are for.
            return tuple(value.shape[1:]) if name in DECODED else (id(value), id(prompt))

        other = {name: kind(name, value) for name, value in prompt.other.items()}
        kinds = (*sorted(prompt.inputs), repr(other))
        # Without ids there is nothing to count positions from but the places in the batch.
        labelled = "labels" in prompt.inputs or "labels" in prompt.other
        if labelled or changed_in(prompt.other):
            # A loss is the mean over all prompts of a batch; a cache has the rows of its prompt.
            return kinds, id(prompt)
        counted = self._padding == IDS and "inputs_embeds" in prompt.inputs
        if not counted and self._pads():
            return kinds
        return kinds, prompt.width, any(n != prompt.width for n in prompt.lengths)

    def may_share(self, job: Job) -> bool:
        # Options of the forward may ask for what skipped blocks would have given; with dropout, the
        # same input is not the same computation.
        module, config = self.module_tree(), self.config.get_text_config()
        asked = any(getattr(config, f"output_{n}", False) for n in ("hidden_states", "attentions"))
        prompts = (p for p in job.prompts if p is not None)
        changed = any(changed_in(p.other) for p in prompts if p.other)
        return not (job.entry.options or module.training or asked or changed)

    def may_be_causal(self) -> bool:
        config = self.config.get_text_config()
        window, layers = (
            getattr(config, "sliding_window", None),
            getattr(config, "layer_types", None),
        )
        kinds = set(layers or ())
        return (
            self._takes_cache
            and self._takes_positions
            and accepts(self.module_tree().forward, "past_key_values")
            and not self.config.is_encoder_decoder
            and not kinds - {"full_attention"}
            and (window is None or bool(kinds))
        )

    def is_causal(self) -> bool:
        # Asked of the model itself, once: does another last token change what comes before it?
        if self._causal is None:
            module = self.load()
            ids = torch.arange(6, device=self._input_device(module)).repeat(2, 1)
            ids[1, -1] += 1

            def first() -> torch.Tensor:
                with torch.no_grad():
                    mask = torch.ones_like(ids)
                    output = module(input_ids=ids, attention_mask=mask, use_cache=False)
                    return output.logits[:, :-1]  # type: ignore[no-any-return]

            logits = self._lock.during(lambda: unharmed(first))
            self._causal = not module.training and torch.allclose(
                logits[0], logits[1], rtol=1e-4, atol=1e-4 * float(logits.abs().max())
            )
        return self._causal

    def make_cache(self, layers: list[tuple[torch.Tensor, torch.Tensor]] | None) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        for number, (keys, values) in enumerate(layers or ()):
            cache.update(keys, values, number)
        return cache

    def read_cache(self, cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(layer.keys, layer.values) for layer in cache.layers]

    def forward(
        self,
        task: Task,
        module: torch.nn.Module,
        one: Pass,
        prompts: list[TextPrompt],
        cache: Any = None,
    ) -> Any:
        positions = self._takes_positions and not task.job.entry.generates
        device, right = self._input_device(module), self.pads_right
        inputs = batch(prompts, self._reader.pad, positions, device, right)
        if not self._takes_mask:
            inputs.pop("attention_mask")
        options = dict(task.job.entry.options)
        past = options.get("past_key_values", inputs.get("past_key_values"))
        if not task.job.entry.generates:
            if one.positions and "labels" not in inputs:
                options.setdefault("logits_to_keep", one.positions)
            if cache is not None:
                options["past_key_values"], options["use_cache"] = cache, True
                if one.cut:
                    inputs = _from_token(inputs, one.cut)
            elif past is not None:
                inputs = _behind(inputs, past)
            elif one.starts or (
                (len(prompts) > 1 or one.touches("skip")) and not self._sees_output(one)
            ):
                # Skipped blocks would leave gaps in a cache; and nobody sees it.
                options.setdefault("use_cache", False)
            return module(**inputs, **options)
        settings = self._options(task.job.entry)
        if len(one.invokes) == 1 and self._draws_early(task):
            first = next(i for i, p in enumerate(task.job.prompts) if p is not None)
            assert task.known is not None, "it draws early"
            own_draws(task.known, one.invokes[0], one.invokes[0] == first)
        if self._keeps_logits and one.positions != 1 and self._touches_head(one):
            # Else transformers computes the prompt's last logits alone.
            options.setdefault("logits_to_keep", one.positions)
        if self._clock is not None:
            for name in settings.asking(SAVES, GUESSES):
                logger.warning("`%s` is left out: each step of the block has its forward", name)
                options[name] = None
            options["disable_compile"] = True  # hooks are not compiled
            given = options.get("stopping_criteria") or ()
            options["stopping_criteria"] = [*given, self._clock]
        if task.part is not None and not task.part.whole:
            options.pop("streamer", None)  # it hears of the block's last run alone
        if settings.get("pad_token_id") is None:
            options["pad_token_id"] = self._reader.pad
        return module.generate(**inputs, **options)  # type: ignore[operator]

    def _sees_output(self, one: Pass) -> bool:
        if not self._takes_cache:
            return True
        return any(point.path == "" and point.port == "output" for point in one.arrivals)

    def _input_device(self, module: torch.nn.Module) -> torch.device:
        weight = module.get_input_embeddings().weight  # type: ignore[operator]
        if weight.is_meta:  # offloaded: accelerate brings it, and the inputs, to its own device
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return weight.device  # type: ignore[no-any-return]

    def _touches_head(self, one: Pass) -> bool:
        """True if a pass looks at the logits, or into what makes them."""
        tree = self.module_tree()
        head = tree.get_output_embeddings()  # type: ignore[operator]
        paths = [name for name, child in tree.named_modules() if child is head]
        touched = {point.path for point in one.arrivals if point.port != "result"}
        return "" in touched or any(
            path == head or path.startswith(f"{head}.") for path in touched for head in paths
        )

    # ---------------------------------------------------------------- generation

    @contextmanager
    def around(
        self,
        task: Task,
        run: Run,
        module: torch.nn.Module,
        prompts: list[TextPrompt],
        outcome: Outcome,
    ) -> Iterator[None]:
        part = task.part
        counts = part is not None and part.counts
        rounds = bool(task.job.graph.rounds)
        watched = bool(run.sites or run.stopped or counts or rounds)
        if not task.job.entry.generates or not (watched or self.config.is_encoder_decoder):
            yield
            return
        stops = bool(task.job.graph.stops)
        endings = self._options(task.job.entry).endings()
        later = counts or rounds or any(site.wanted_after_first() for site in run.sites)
        watches = later and (endings is not None or stops)
        kind = StoppingClock if stops else Clock
        until = part.until if part is not None and counts else None
        clock = kind(run, sum(prompt.rows for prompt in prompts), endings, watches, until)
        # Before the hooks on the model itself, which belong to the step that begins.
        handles: list[RemovableHandle] = []

        def over() -> None:
            remove_hooks(handles)
            self._clock = None

        run.undo.append(over)
        add_hook(handles, module, clock.begins, inputs=True, first=True)
        add_hook(handles, module, clock.ends, always=True)
        self._clock = clock if watched else None
        try:
            yield
        finally:
            over()
            for invoke in {*run.extents, *run.stopped}:
                at = run.stopped.get(invoke)
                outcome.stopped[invoke] = None if at is None else at[0]
            if part is not None and counts:
                part.reached.update(run.reached)
            if self.config.is_encoder_decoder:
                for invoke in run.extents:
                    if clock.begins_with is not None:
                        outcome.begins_with[invoke] = clock.begins_with

    def _sequences(
        self, job: Job, outcome: Outcome, prompts: dict[int, TextPrompt], result: Any
    ) -> dict[int, torch.Tensor]:
        """Each prompt's own token ids [row, token] of a generated batch, as if it had run alone."""
        ids = result if isinstance(result, torch.Tensor) else result.sequences
        endings = self._options(job.entry).endings()
        before = {index: self._before(outcome, index, prompt) for index, prompt in prompts.items()}
        width = max(before.values())
        each = ids.shape[0] // sum(prompt.rows for prompt in prompts.values())
        found, start = {}, 0
        for index, prompt in prompts.items():
            own = ids[start : start + prompt.rows * each, width - before[index] :]
            start += prompt.rows * each
            stopped = outcome.stopped.get(index)
            if stopped is not None:
                own = own[:, : before[index] + stopped + 1]
            found[index] = _until_end(own, before[index], endings)
        return found

    def _before(self, outcome: Outcome, invoke: int, prompt: TextPrompt) -> int:
        """How many tokens the generated ids of an invoke begin with: its prompt, or what its decoder
        began with."""
        if self.config.is_encoder_decoder:
            return outcome.begins_with[invoke]
        return prompt.width if "input_ids" in prompt.inputs else 0

    def results_by_invoke(
        self, job: Job, outcome: Outcome, prompts: dict[int, Any], result: Any
    ) -> dict[int, Any]:
        if len(prompts) == 1:
            return dict.fromkeys(prompts, result)
        found = self._sequences(job, outcome, prompts, result)
        if isinstance(result, torch.Tensor):
            return found
        return {index: type(result)(sequences=own) for index, own in found.items()}

    def join_results(
        self, job: Job, outcome: Outcome, passes: list[Pass], results: list[Any]
    ) -> None:
        if not (job.entry.generates and results) or any(result is None for result in results):
            super().join_results(job, outcome, passes, results)
            return
        parts: dict[int, tuple[Any, int]] = {}
        for one, result in zip(passes, results, strict=True):
            prompts = {index: job.prompts[index] for index in one.invokes}
            for index, own in self._sequences(job, outcome, prompts, result).items():
                parts[index] = (own, self._before(outcome, index, prompts[index]))
        for index, (own, _) in parts.items():
            outcome.outputs[index] = own
        if len(results) == 1:
            outcome.result = results[0]
            return
        if not all(isinstance(result, torch.Tensor) for result in results):
            outcome.result = tuple(results)
            return
        before = max(width for _, width in parts.values())
        after = max(own.shape[1] - width for own, width in parts.values())
        pad = self._options(job.entry).get("pad_token_id")
        pad = self._reader.pad if pad is None else int(pad)
        rows = [
            torch.nn.functional.pad(own, (before - width, after - own.shape[1] + width), value=pad)
            for _, (own, width) in sorted(parts.items())
        ]
        outcome.result = torch.cat(rows)


def _is_of_transformers(module: torch.nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")


def _inputs_of(module: torch.nn.Module) -> dict[str, None]:
    """The names of what a forward of transformers takes, in the order in which a message lists them."""
    from transformers.utils.generic import TransformersKwargs

    known = dict.fromkeys(inspect.signature(module.forward).parameters)
    known.pop("kwargs", None)
    known.update(dict.fromkeys((*TransformersKwargs.__annotations__, "return_dict")))
    return known


class ImageModel(LanguageModel):
    """A model of images by name: its prompts are pixels [image, channel, height, width], given as to
    any module."""

    trace = Model.trace
    prepare = Model.prepare
    sample_prompt = Model.sample_prompt
    batch_class = Model.batch_class
    prompt_identity = Model.prompt_identity
    may_share = Model.may_share
    may_be_causal = Model.may_be_causal
    is_causal = Model.is_causal
    unembedding_path = Model.unembedding_path
    forward = Model.forward
    _kind_of = Model._kind_of
    _shape_class = Model._shape_class
    _trial_inputs = Model._trial_inputs
    _continued_inputs = Model._continued_inputs
    _trial_options = Model._trial_options

    def sample_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        config = self.config
        sizes = (1, config.num_channels, config.image_size, config.image_size)
        count = torch.Size(sizes).numel()
        return (torch.linspace(-1, 1, count).reshape(sizes),), {}

    def generate(self, *args: Any, num: int | None = None, **kwargs: Any) -> Any:
        raise InputError(f"{type(self.module_tree()).__name__} takes images, it has no text.")


Model._loads = LanguageModel


def _from_token(inputs: dict[str, Any], cut: int) -> dict[str, Any]:
    """Model inputs without the first tokens, which a cache stands for; the mask covers all."""
    mask = inputs["attention_mask"]
    positions = inputs.get("position_ids")
    if positions is None:
        positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    rest = {name: tensor[:, cut:] for name, tensor in inputs.items() if name in PER_TOKEN}
    return {**inputs, **rest, "attention_mask": mask, "position_ids": positions[:, cut:]}


def _rows_of(cache: Any) -> int | None:
    """Rows that a cache of transformers holds; None for an empty one, or another object."""
    for layer in getattr(cache, "layers", ()):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, torch.Tensor) and keys.numel():
            return keys.shape[0]
    return None


def _behind(inputs: dict[str, Any], cache: Any) -> dict[str, Any]:
    """Model inputs that follow the tokens that the user's own cache holds.

    `past_mask` of the cache, where there is one, tells which of them are padding.
    """
    mask, past = inputs.get("attention_mask"), cache.get_seq_length()
    if mask is None or not past:
        return inputs
    before = getattr(cache, "past_mask", None)
    before = mask.new_ones(mask.shape[0], past) if before is None else before.to(mask)
    whole = torch.cat([before, mask], 1)
    positions = torch.cumsum(whole, 1).sub(1).clamp_min(0)[:, past:]
    found = {**inputs, "attention_mask": whole}
    if "position_ids" in inputs:
        found["position_ids"] = positions
    return found


def _until_end(ids: torch.Tensor, prompt: int, endings: torch.Tensor | None) -> torch.Tensor:
    """`ids` [row, token] without the padding that follows the end of the longest row."""
    if endings is None or ids.shape[1] <= prompt:
        return ids
    over = torch.isin(ids[:, prompt:], endings.to(ids.device))
    ended = over.any(1)
    if not bool(ended.all()):
        return ids
    last = int(over.int().argmax(1).max())
    return ids[:, : prompt + last + 1]
