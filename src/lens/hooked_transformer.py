"""Owns `HookedTransformer`: TransformerLens' surface over an unmodified Hugging Face model.

The model underneath stays a `LanguageModel`. A forward without hooks is the model's own; one with
hooks, or one that starts or stops inside, is a block of it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch

from ..envoy.names import Missing, write_name
from ..envoy.spellings import lens_names, no_lens_name
from ..intervention import unharmed
from ..models.base import accepts
from ..models.factored_matrix import FactoredMatrix
from ..models.language import LanguageModel
from ..models.loading import folder_of
from ..tracing.errors import InputError, LoadError, UnavailableNameError
from ..tracing.proxy import apply
from .activation_cache import ActivationCache
from .cache import KeyValueCache
from .config import HookedTransformerConfig, build, config_of, init_weights
from .data import sample_dataset
from .functions import Slice, lm_cross_entropy_loss
from .generation import Generation
from .hooks import HookFunction, HookPoint, Hooks, backward_function, call_forward, watch_gradient
from .processing import process
from .tokens import Tokenization, is_text

logger = logging.getLogger("graftwork")

#: Places that TransformerLens computes only when a flag of the configuration asks for them.
_FLAGGED = {
    "hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
}
_WEIGHTS = frozenset(
    "W_E W_pos W_E_pos W_U b_U W_Q W_K W_V W_O b_Q b_K b_V b_O W_in W_gate W_out b_in b_out".split()
)
#: Checkpoints that were kept while a model was trained, by the beginning of its name.
_STEPS = {"EleutherAI/pythia": "step", "stanford-crfm": "checkpoint-"}


class Output(NamedTuple):
    """Logits and loss of one forward."""

    logits: torch.Tensor
    loss: torch.Tensor


#: Forms of forwards that are remembered, so that they need not be recorded again.
_REMEMBERED = 8


@dataclasses.dataclass
class Prompt:
    """What a forward gets.

    Attributes:
        ids: [batch, pos]; of the shape alone where a residual stream is given.
        mask: [batch, pos], zeros for padding.
        resid: [batch, pos, d_model] for a start inside the model.
        attended: [batch, pos], zeros for what no token may attend to. Behind a row's last token that
            is nothing in a causal model, and where the token that pads also ends a text, a row that
            ends with it has the model's own logits.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    attended: torch.Tensor
    resid: torch.Tensor | None = None


class HookedTransformer:
    """A language model with TransformerLens' names, hooks, caches, weights and generation.

    Args:
        cfg: a `HookedTransformerConfig` or dictionary, for random weights; or a `LanguageModel` or
            transformers module that exists.
        tokenizer: for text; without one, only token ids are taken.
        default_prepend_bos: whether texts begin with the beginning-of-text token; default yes.
        default_padding_side: "left" or "right"; default the tokenizer's.

    Example:
        model = HookedTransformer.from_pretrained("graftwork/tiny")
        logits, cache = model.run_with_cache("The Eiffel Tower is in")
        cache["pattern", 0].shape                                   # [batch, head, query, key]

    Source: the surface of TransformerLens (Nanda and Bloom 2022), as of its version 3.
    """

    def __init__(
        self,
        cfg: Any,
        tokenizer: Any = None,
        move_to_device: bool = True,
        default_padding_side: str | None = None,
        default_prepend_bos: bool | None = None,
    ) -> None:
        if isinstance(cfg, str):
            raise LoadError(
                "HookedTransformer takes a configuration or a model; for a name, use "
                "HookedTransformer.from_pretrained(name)."
            )
        fresh: HookedTransformerConfig | None = None
        if isinstance(cfg, LanguageModel):
            model = cfg
        elif isinstance(cfg, torch.nn.Module):
            model = LanguageModel(cfg, tokenizer)
        else:
            fresh = copy.copy(HookedTransformerConfig.unwrap(cfg))
            if tokenizer is None and fresh.tokenizer_name is not None:
                tokenizer = _tokenizer(fresh)
            if fresh.d_vocab == -1 and tokenizer is not None:
                fresh.d_vocab = max(tokenizer.get_vocab().values()) + 1
                if fresh.d_vocab_out == -1:
                    fresh.d_vocab_out = fresh.d_vocab
            module = build(fresh)
            if move_to_device and fresh.device is not None:
                module = module.to(fresh.device)
            model = LanguageModel(module, tokenizer)
            if fresh.init_weights:
                init_weights(model, fresh)
        self.model = model
        self.cfg = config_of(model) if fresh is None else fresh
        if default_prepend_bos is not None:
            self.cfg.default_prepend_bos = default_prepend_bos
        self._n_ctx: int | None = model._reader.limit
        self._vocabulary = model.vocabulary()
        self._meant = lens_names(self._vocabulary)
        self._hooks = Hooks(self._meant, self._vocabulary)
        self._experiments: dict[Any, Any] = {}
        self.dataset: Any = None
        self._tokenization = Tokenization(
            tokenizer if tokenizer is not None else model.tokenizer,
            self._n_ctx or self.cfg.n_ctx,
            self.cfg.default_prepend_bos,
            default_padding_side,
        )

    # ---------------------------------------------------------------- construction

    @classmethod
    def from_pretrained(
        cls,
        model_name: Any = None,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
        checkpoint_index: int | None = None,
        checkpoint_value: int | None = None,
        checkpoint_label: Any = None,
        hf_model: Any = None,
        device: Any = None,
        n_devices: int = 1,
        tokenizer: Any = None,
        move_to_device: bool = True,
        fold_value_biases: bool = True,
        default_prepend_bos: bool | None = None,
        default_padding_side: str | None = None,
        dtype: Any = None,
        first_n_layers: int | None = None,
        n_ctx: int | None = None,
        **options: Any,
    ) -> HookedTransformer:
        """Load a model and process a copy of its weights.

        Args:
            model_name: hub id, folder or "graftwork/tiny"; not needed with `hf_model`.
            fold_ln, center_writing_weights, center_unembed, fold_value_biases,
                refactor_factored_attn_matrices: weight processing that leaves what the model computes
                the same; those that do not fit the architecture are left out, with a warning.
            checkpoint_index, checkpoint_value: a checkpoint of training (Pythia, stanford-crfm).
            hf_model: a transformers model that exists; it is not changed, and nothing is downloaded.
            n_devices: spread the layers over so many devices.
            first_n_layers: keep only these.
            n_ctx: the longest prompt, shorter than the model's.
            **options: of `LanguageModel`, such as `device_map`.

        Raises:
            LoadError: it cannot be found, or the options do not fit.
        """
        if checkpoint_label is not None and checkpoint_value is not None:
            raise LoadError("give checkpoint_value or its other name checkpoint_label, not both.")
        value = checkpoint_value if checkpoint_value is not None else checkpoint_label
        if "torch_dtype" in options:
            dtype = options.pop("torch_dtype")
        if isinstance(dtype, str):  # "float32", as torch and TransformerLens spell it
            named = getattr(torch, dtype.removeprefix("torch."), None)
            dtype = named if isinstance(named, torch.dtype) else dtype
        for flag, name in (("load_in_4bit", "nf4"), ("load_in_8bit", "int8")):
            if options.pop(flag, False):
                dtype = name
        if hf_model is not None:
            model = LanguageModel(hf_model, tokenizer)
            if dtype is not None or device is not None:
                logger.warning("hf_model stays in its own dtype and on its own device")
        else:
            if model_name is None:
                raise LoadError("give the name of a model, or `hf_model`.")
            if value is not None or checkpoint_index is not None:
                options["revision"] = _revision(str(model_name), checkpoint_index, value)
            if n_devices > 1:
                options.setdefault("device_map", "auto")
            elif device is not None:
                options.setdefault("device_map", device)
            model = LanguageModel(model_name, tokenizer, dtype=dtype, **options)
            if tokenizer is None and model.tokenizer is not None:
                hub = {} if model._checkpoint is None else model._checkpoint.hub
                model.tokenizer.padding_side = _own_padding_side(model.tokenizer, hub)
        flags = {
            "fold_ln": fold_ln,
            "center_writing_weights": center_writing_weights,
            "center_unembed": center_unembed,
            "fold_value_biases": fold_value_biases,
            "refactor_factored_attn_matrices": refactor_factored_attn_matrices,
        }
        if first_n_layers is not None:
            model = _first_layers(model, first_n_layers)
        if any(flags.values()):
            model = process(model, **flags)
        found = cls(model, tokenizer, move_to_device, default_padding_side, default_prepend_bos)
        if n_ctx is not None:
            found._limit(n_ctx)
        return found

    @classmethod
    def from_pretrained_no_processing(
        cls, model_name: Any = None, **options: Any
    ) -> HookedTransformer:
        """As `from_pretrained`, with the weights as they are."""
        off = dict.fromkeys(
            ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False
        )
        off["refactor_factored_attn_matrices"] = False
        return cls.from_pretrained(model_name, **{**off, **options})

    def _limit(self, n_ctx: int) -> None:
        known = self._n_ctx
        if known is not None and n_ctx > known:
            raise InputError(f"n_ctx={n_ctx}: the model has positions for {known} tokens.")
        self._n_ctx = self._tokens.n_ctx = self.cfg.n_ctx = n_ctx

    def process_weights_(self, **flags: bool) -> None:
        """Process the weights of this model: from now on it is over a processed copy."""
        self.model = process(self.model, **flags)
        self._vocabulary = self.model.vocabulary()
        self._meant = lens_names(self._vocabulary)
        self._experiments = {}

    def init_weights(self) -> None:
        """Fill the weights with random numbers, by `cfg.init_mode` and `cfg.seed`."""
        init_weights(self.model, self.cfg)

    # ---------------------------------------------------------------- the module

    @property
    def module(self) -> torch.nn.Module:
        """The Hugging Face model, loaded."""
        return self.model.load()

    @property
    def _tokens(self) -> Tokenization:
        # `cfg.default_prepend_bos` may be set at any time.
        self._tokenization.prepend_bos = self.cfg.default_prepend_bos
        return self._tokenization

    @property
    def tokenizer(self) -> Any:
        return self._tokenization.tokenizer

    def set_tokenizer(self, tokenizer: Any, default_padding_side: str | None = None) -> None:
        """Use another tokenizer; it is not changed, and nothing is loaded."""
        self._tokenization = Tokenization(
            tokenizer,
            self._n_ctx or self.cfg.n_ctx,
            self.cfg.default_prepend_bos,
            default_padding_side,
        )

    @property
    def keeps_keys(self) -> bool:
        """Whether a forward takes keys and values of earlier tokens; models of states do not."""
        return accepts(self.model.module_tree().forward, "past_key_values")

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, device_or_dtype: Any, print_details: bool = True) -> HookedTransformer:
        """Move the model, or change its dtype; `cfg` follows."""
        self.module.to(device_or_dtype)
        first = next(self.module.parameters())
        self.cfg.device, self.cfg.dtype = str(first.device), first.dtype
        self.model._vocabularies.clear()
        self._vocabulary = self.model.vocabulary()
        return self

    def cuda(self, device: Any = None) -> HookedTransformer:
        return self.to("cuda" if device is None else torch.device("cuda", device))

    def cpu(self) -> HookedTransformer:
        return self.to("cpu")

    def mps(self) -> HookedTransformer:
        return self.to("mps")

    def float(self) -> HookedTransformer:
        return self.to(torch.float32)

    def double(self) -> HookedTransformer:
        return self.to(torch.float64)

    def half(self) -> HookedTransformer:
        return self.to(torch.float16)

    def bfloat16(self) -> HookedTransformer:
        return self.to(torch.bfloat16)

    def requires_grad_(self, requires_grad: bool = True) -> HookedTransformer:
        self.module.requires_grad_(requires_grad)
        return self

    def train(self, mode: bool = True) -> HookedTransformer:
        self.module.train(mode)
        return self

    def eval(self) -> HookedTransformer:
        return self.train(False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("model", "_meant", "_hooks", "_experiments"):
            raise AttributeError(name)
        if name in _WEIGHTS:
            return getattr(self.model.weights, name)
        if name.startswith("hook_"):
            return self._hooks.find(name)[0]
        view = Nested(self, name)
        if view._exists():
            return view
        try:
            return getattr(self.model, name)
        except UnavailableNameError as error:
            raise AttributeError(str(error)) from error

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *_WEIGHTS, "blocks", "embed", "unembed", "ln_final"})

    def __repr__(self) -> str:
        return f"HookedTransformer over {self.model!r}"

    # ---------------------------------------------------------------- weights

    @property
    def QK(self) -> FactoredMatrix:
        return self.model.weights.QK

    @property
    def OV(self) -> FactoredMatrix:
        return self.model.weights.OV

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> torch.Tensor:
        """The sum of all biases before a layer, [d_model]; see `StackedWeights`."""
        return self.model.weights.accumulated_bias(layer, mlp_input, include_mlp_biases)

    def all_composition_scores(self, mode: str) -> torch.Tensor:
        """[layer, head, layer, head]; see `StackedWeights`."""
        return self.model.weights.all_composition_scores(mode)

    def all_head_labels(self) -> list[str]:
        """["L0H0", "L0H1", …]"""
        return self.model.weights.all_head_labels()

    @property
    def n_params_total(self) -> int:
        return self.model.weights.n_params_total

    # ---------------------------------------------------------------- tokens

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> torch.Tensor:
        """Token ids of one or several texts, [batch, pos]."""
        ids = self._tokens.to_tokens(input, prepend_bos, padding_side, truncate).ids
        return ids.to(self.device) if move_to_device else ids

    def to_string(self, tokens: Any) -> Any:
        """The text of ids; a list of texts for [batch, pos]."""
        return self._tokens.to_string(tokens)

    def to_str_tokens(
        self, input: Any, prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> Any:
        """Each token as text."""
        return self._tokens.to_str_tokens(input, prepend_bos, padding_side)

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token."""
        return self._tokens.to_single_token(string)

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one id."""
        return self._tokens.to_single_str_token(int_token)

    def get_token_position(
        self,
        single_token: str | int,
        input: Any,
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> int:
        """Where a token stands."""
        return self._tokens.get_token_position(single_token, input, mode, prepend_bos)

    def tokens_to_residual_directions(self, tokens: Any) -> torch.Tensor:
        """The columns of W_U for tokens: [..., d_model] for ids [...]."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        ids = torch.as_tensor(tokens, device=self.device)
        table: torch.Tensor = self.W_U
        return table.T[ids]

    # ---------------------------------------------------------------- forward

    def _prompt(
        self,
        input: Any,
        prepend_bos: bool | None,
        padding_side: str | None,
        attention_mask: Any,
        start_at_layer: int | None,
        tokens: Any,
        keeps_end: bool,
    ) -> Prompt:
        if start_at_layer is not None:
            resid = torch.as_tensor(input)
            if resid.ndim != 3 or not resid.is_floating_point():
                raise InputError(
                    "with start_at_layer the input is a residual stream [batch, pos, d_model]"
                )
            ids = torch.zeros(resid.shape[:2], dtype=torch.long) if tokens is None else tokens
            mask = torch.ones_like(ids) if attention_mask is None else attention_mask
            return Prompt(ids, torch.as_tensor(mask), torch.as_tensor(mask), resid)
        if is_text(input):
            text = input if isinstance(input, str) else list(input)
            ids, mask = self._tokens.to_tokens(text, prepend_bos, padding_side)
        else:
            ids = torch.as_tensor(input)
            if ids.is_floating_point():
                raise InputError(
                    "the input has floating point numbers: for a residual stream give start_at_layer"
                )
            ids = ids.long()
            ids = ids[None] if ids.ndim == 1 else ids
            if ids.ndim != 2:
                raise InputError(f"token ids are [batch, pos] or [pos], not {list(ids.shape)}")
            mask = self._tokens.mask_of(ids, prepend_bos)
        attended = mask
        if keeps_end and self.cfg.attention_dir == "causal":
            attended = (mask.cumsum(1) > 0).long()
        if attention_mask is not None:
            attended = mask = torch.as_tensor(attention_mask).long().to(ids.device)
            if mask.shape != ids.shape:
                raise InputError(
                    f"attention_mask is {list(mask.shape)}, and the tokens are {list(ids.shape)}"
                )
        if self._n_ctx is not None and ids.shape[1] > self._n_ctx:
            raise InputError(
                f"the prompt has {ids.shape[1]} tokens, and the model takes {self._n_ctx}"
            )
        return Prompt(ids, mask, attended)

    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        start_at_layer: int | None = None,
        tokens: torch.Tensor | None = None,
        shortformer_pos_embed: Any = None,
        attention_mask: torch.Tensor | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: KeyValueCache | None = None,
    ) -> Any:
        """One forward.

        Args:
            input: text, texts, token ids [batch, pos] or [pos]; with `start_at_layer` a residual stream
                [batch, pos, d_model].
            return_type: "logits", "loss", "both" (an `Output`) or None.
            loss_per_token: the loss of each position, [batch, pos - 1], 0 for padding.
            start_at_layer: enter before this layer; those before it are not computed.
            tokens: the ids, for the loss of a forward that starts inside.
            attention_mask: [batch, pos], 0 for padding. Padding of texts is known.
            stop_at_layer: give the residual stream before this layer; the rest is not computed.
                Negative numbers count from the last layer.
            past_kv_cache: keys and values of the tokens before these.

        Returns:
            What `return_type` says; with `stop_at_layer`, the residual stream [batch, pos, d_model].

        Raises:
            InputError: arguments that do not fit each other.
        """
        result, _ = self._forward(
            input,
            return_type,
            loss_per_token,
            prepend_bos,
            padding_side,
            start_at_layer,
            tokens,
            shortformer_pos_embed,
            attention_mask,
            stop_at_layer,
            past_kv_cache,
            (),
            None,
        )
        return result

    __call__ = forward

    def _forward(
        self,
        input: Any,
        return_type: str | None,
        loss_per_token: bool,
        prepend_bos: bool | None,
        padding_side: str | None,
        start_at_layer: int | None,
        tokens: torch.Tensor | None,
        shortformer_pos_embed: Any,
        attention_mask: torch.Tensor | None,
        stop_at_layer: int | None,
        past_kv_cache: KeyValueCache | None,
        names: Sequence[str],
        slice: Slice | None,
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        if return_type not in ("logits", "loss", "both", None):
            raise InputError(
                f'return_type is "logits", "loss", "both" or None, not {return_type!r}'
            )
        if shortformer_pos_embed is not None:
            raise InputError("shortformer_pos_embed: no model of transformers has such positions")
        if past_kv_cache is not None and not self.keeps_keys:
            raise InputError(
                f"past_kv_cache: {self._vocabulary.kind} keeps no keys and values, but a state"
            )
        prompt = self._prompt(
            input,
            prepend_bos,
            padding_side,
            attention_mask,
            start_at_layer,
            tokens,
            past_kv_cache is None,
        )
        stop = self._layer(stop_at_layer, "stop_at_layer")
        start = self._layer(start_at_layer, "start_at_layer")
        if start is not None and stop is not None and start > stop:
            raise InputError(f"start_at_layer={start} is behind stop_at_layer={stop}")
        plain = not names and stop is None and start is None and not self._hooks.active()
        if plain and not self.model.lasting_edits():
            result, kept = self._plain(prompt, past_kv_cache), dict[str, torch.Tensor]()
        else:
            result, kept = self._block(prompt, past_kv_cache, start, stop, names, slice)
        if stop is not None or return_type is None:
            return (result if stop is not None else None), kept
        if return_type == "logits":
            return result, kept
        if start is not None and tokens is None:
            raise InputError("the loss of a forward that starts inside needs `tokens`")
        loss = self.loss_fn(result, prompt.ids, prompt.mask, loss_per_token)
        return (loss if return_type == "loss" else Output(result, loss)), kept

    @functools.cached_property
    def unembeds_last(self) -> bool:
        """The logits are what the unembedding gives, without a cap or a factor. Asked of the model."""
        own = self._vocabulary.model_places().get("unembed_out")
        if own is None or isinstance(own, Missing):
            return False
        with torch.no_grad(), self.model.trace([0, 1]) as tracer:
            given = self._vocabulary.read(-1, "unembed_out").save()
            logits = tracer.output.logits.save()
        return torch.equal(given.value, logits.value)

    def _layer(self, index: int | None, what: str) -> int | None:
        if index is None:
            return None
        count = self.cfg.n_layers
        if not -count <= index <= count:
            raise InputError(f"{what}={index}: the model has {count} layers")
        return index + count if index < 0 else index

    def _plain(self, prompt: Prompt, cache: KeyValueCache | None) -> torch.Tensor:
        """The model's own forward."""
        module, device = self.module, self.model._input_device(self.module)
        ids, mask = prompt.ids.to(device), prompt.attended.to(device)
        options: dict[str, Any] = {"use_cache": False} if self.model._takes_cache else {}
        if cache is not None:
            options = {"past_key_values": cache.for_forward(), "use_cache": True}
        before = None if cache is None else cache.mask
        if cache is not None and cache.length and before is None:
            before = mask.new_ones(mask.shape[0], cache.length)
        whole = mask if before is None else torch.cat([before.to(mask), mask], 1)
        inputs = {"input_ids": ids}
        if self.model._takes_mask:
            inputs["attention_mask"] = whole
            if self.model._takes_positions and not bool(whole.all()):
                counted = torch.cumsum(whole, 1).sub(1).clamp_min(0)
                inputs["position_ids"] = counted[:, whole.shape[1] - ids.shape[1] :]
        logits: torch.Tensor = self.model._lock.during(
            lambda: unharmed(lambda: module(**inputs, **options).logits)
        )
        if cache is not None:
            cache.add_mask(mask)
        return logits

    def _block(
        self,
        prompt: Prompt,
        cache: KeyValueCache | None,
        start: int | None,
        stop: int | None,
        names: Sequence[str],
        slice: Slice | None,
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """A forward with hooks, caches, a start or a stop: a block of the model."""
        inputs = {"input_ids": prompt.ids, "attention_mask": prompt.attended}
        repeats = start is None and cache is None and not self._hooks.active()
        key = (
            tuple(names),
            repr(slice),
            stop,
            torch.is_grad_enabled(),
            bool(prompt.attended.all()),
        )
        if repeats and not self.model.lasting_edits():
            known = self._experiments.get(key)
            if known is not None and known[0] == prompt.ids.shape:
                *values, last = known[1](inputs)
                return last, {n: _shown(n, v) for n, v in zip(known[2], values, strict=True)}
        options: dict[str, Any] = {"use_cache": False} if self.model._takes_cache else {}
        if cache is not None:
            options = {"past_key_values": cache.for_forward(), "use_cache": True}
        layers = self._vocabulary
        kept: dict[str, Any] = {}
        active = {point.name: point for point in self._hooks.active()}
        wanted = dict.fromkeys([*active, *names])
        result: Any
        # Hooks may change values in place; without them, nothing of a forward changes any more.
        plan = None if active else {"share_memory": True}
        with self.model.trace(**inputs, plan=plan, **options) as tracer:
            tracer.graph.needs_grad = torch.is_grad_enabled()
            if start is not None and prompt.resid is not None:
                self._enter(prompt.resid, start)
            for name in self._meant:
                if name not in wanted or self._outside(name, start, stop):
                    continue
                layer, own = self._meant[name]
                value = layers.read(layer, own)
                point = active.get(name)
                if point is not None:
                    value = self._hooked(value, point)
                    write_name(self.model, layers, layer, own, value)
                if name in names:
                    kept[name] = (value if slice is None else _sliced(value, name, slice)).save()
            if stop is None:
                result = tracer.output.logits.save()
            elif stop == len(layers):
                result = layers.read(stop - 1, "resid_post").save()
            else:
                result = layers.read(stop, "resid_pre").save()
        if cache is not None:
            cache.add_mask(prompt.mask)
        if repeats and not self.model.lasting_edits():
            # The next forward of this form need not be recorded.
            self.model._lock.during(
                lambda: self._remember(key, prompt.ids.shape, tracer, list(kept))
            )
        return result.value, {name: _shown(name, box.value) for name, box in kept.items()}

    def _remember(self, key: Any, shape: torch.Size, tracer: Any, kept: list[str]) -> None:
        while len(self._experiments) >= _REMEMBERED:
            self._experiments.pop(next(iter(self._experiments)))
        self._experiments[key] = (shape, tracer.compile(), kept)

    def _outside(self, name: str, start: int | None, stop: int | None) -> bool:
        """True for a place that a forward between two layers does not reach."""
        layer, _ = self._meant[name]
        if layer >= 0:
            return (start is not None and layer < start) or (stop is not None and layer >= stop)
        begins = name in ("hook_embed", "hook_pos_embed")
        return start is not None if begins else stop is not None

    def _enter(self, resid: torch.Tensor, start: int) -> None:
        for index in range(start):
            layer = self.model.layers[index]
            layer._envoy.skip(self._vocabulary.read(index, "resid_pre"))
        given = resid.to(self.device)
        if start == len(self._vocabulary):
            write_name(self.model, self._vocabulary, start - 1, "resid_post", given)
        else:
            write_name(self.model, self._vocabulary, start, "resid_pre", given)

    def _hooked(self, value: Any, point: HookPoint) -> Any:
        heard = [one for one in point.hooks if one.heard]
        forward = [one for one in heard if one.direction == "fwd"]
        backward = [one for one in heard if one.direction == "bwd"]
        if forward:
            value = apply(call_forward, value, point, forward)
        if backward:
            functions = [backward_function(point, one) for one in backward]
            value = apply(watch_gradient, value, functions)
        return value

    def loss_fn(
        self,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        per_token: bool = False,
    ) -> torch.Tensor:
        """Mean cross entropy of the next token in nats; padding is not counted."""
        ids = torch.as_tensor(tokens).to(logits.device)
        mask = None if attention_mask is None else attention_mask.to(logits.device)
        return lm_cross_entropy_loss(logits, ids, mask, per_token)

    # ---------------------------------------------------------------- hooks

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every hook point by name."""
        return self._hooks.points

    def hook_points(self) -> list[HookPoint]:
        """Every hook point, in the order in which a forward passes them."""
        return list(self._hooks.points.values())

    def add_hook(
        self,
        name: Any,
        hook: HookFunction,
        dir: str = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Call a function at a place in every forward, until it is removed.

        Args:
            name: of the place, a list of names, or a function of a name.
            hook: called as `hook(tensor, hook=point)`; what it returns replaces the tensor.
            dir: "fwd", or "bwd" for the gradient.
            is_permanent: it stays when hooks are reset.

        Raises:
            UnavailableNameError: no place is meant.
        """
        for point in self._hooks.find(name):
            point.add_hook(hook, dir, is_permanent, level, prepend)

    def add_perma_hook(self, name: Any, hook: HookFunction, dir: str = "fwd") -> None:
        """As `add_hook`; stays when hooks are reset."""
        self.add_hook(name, hook, dir, is_permanent=True)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: str = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Take hook functions away."""
        self._hooks.reset(clear_contexts, direction, including_permanent, level)

    def remove_all_hook_fns(
        self, direction: str = "both", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """As `reset_hooks`; contexts stay."""
        self._hooks.reset(False, direction, including_permanent, level)

    def clear_contexts(self) -> None:
        """Empty the `ctx` of every hook point."""
        for point in self._hooks.points.values():
            point.clear_context()

    def list_hooks(
        self, name_filter: Any = None, dir: str = "both", including_permanent: bool = True
    ) -> dict[str, list[Any]]:
        """The functions that are there, by place."""
        points = self._hooks.active() if name_filter is None else self._hooks.find(name_filter)
        found = {}
        for point in points:
            hooks = [
                one
                for one in point.hooks
                if dir in ("both", one.direction) and (including_permanent or not one.permanent)
            ]
            if hooks:
                found[point.name] = hooks
        return found

    def hooks(
        self,
        fwd_hooks: Iterable[tuple[Any, HookFunction]] = (),
        bwd_hooks: Iterable[tuple[Any, HookFunction]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> AbstractContextManager[HookedTransformer]:
        """Hook functions that are there while the context is open."""

        @contextmanager
        def context() -> Iterator[HookedTransformer]:
            with self._hooks.added(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
                yield self

        return context()

    def run_with_hooks(
        self,
        *args: Any,
        fwd_hooks: Iterable[tuple[Any, HookFunction]] = (),
        bwd_hooks: Iterable[tuple[Any, HookFunction]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> Any:
        """One forward with hook functions."""
        if bwd_hooks and reset_hooks_end:
            logger.warning(
                "hooks of the gradient stay on the tensors of this forward; the contexts are reset now"
            )
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self.forward(*args, **kwargs)

    # ---------------------------------------------------------------- caches

    def _names(self, names_filter: Any) -> list[str]:
        if names_filter is not None:
            return [point.name for point in self._hooks.find(names_filter)]
        rotary = self._vocabulary.sizes.positional_embedding_type == "rotary"
        found = []
        for name in self._meant:
            end = name.rpartition(".")[2]
            flag = _FLAGGED.get(end)
            if flag is not None and not getattr(self.cfg, flag, False):
                continue
            if not rotary and end in ("hook_rot_q", "hook_rot_k"):
                continue
            found.append(name)
        return found

    def run_with_cache(
        self,
        *args: Any,
        names_filter: Any = None,
        device: Any = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Any = None,
        return_cache_object: bool = True,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """One forward, and the values at its places.

        Without hook functions, values lie in the memory in which the forward made them: those that are
        one tensor there (`hook_resid_post` and the next `hook_resid_pre`, the logits and
        `unembed.hook_out`) are one here. Clone what you change in place.

        Args:
            *args, **kwargs: of `forward`.
            names_filter: a name, names, or a function of a name; None for all places. Those that
                TransformerLens computes only when a flag is set (`hook_result`, …) are there when they
                are named, or their flag is set.
            device: where the values go; default where they are.
            remove_batch_dim: for one row.
            incl_bwd: also derive the result, a scalar such as `return_type="loss"`, and add the
                gradient of each place under its name with `_grad`.
            pos_slice: only these positions.
            return_cache_object: an `ActivationCache`; else a dictionary.

        Raises:
            UnavailableNameError: the filter matches nothing.
        """
        names = self._names(names_filter)
        slice = None if pos_slice is None else Slice.unwrap(pos_slice)
        gradients: dict[str, torch.Tensor] = {}
        backward: list[tuple[Any, HookFunction]] = []
        if incl_bwd:
            backward = [
                (name, functools.partial(_keep_gradient, gradients, slice)) for name in names
            ]
        bound = _bind_forward(args, kwargs)
        with self.hooks((), backward, reset_hooks_end, clear_contexts):
            if incl_bwd:
                with torch.enable_grad():
                    result, kept = self._forward(**bound, names=names, slice=slice)
            else:
                result, kept = self._forward(**bound, names=names, slice=slice)
        if incl_bwd:
            if not isinstance(result, torch.Tensor) or result.numel() != 1:
                raise InputError('incl_bwd derives the result: ask for return_type="loss"')
            result.backward()  # type: ignore[no-untyped-call]
            kept.update({f"{name}_grad": gradients[name] for name in names if name in gradients})
        found = {name: value.detach() for name, value in kept.items()}
        for name in ("hook_pos_embed",):
            if name in found and "hook_embed" in found:
                found[name] = found[name].expand_as(found["hook_embed"])
        if device is not None:
            found = {name: value.to(device) for name, value in found.items()}
        if not return_cache_object:
            if remove_batch_dim:
                rows = {len(value) for value in found.values()} - {1}
                if rows:
                    raise InputError(
                        f"remove_batch_dim is for one row, and the prompt has {max(rows)}"
                    )
                found = {name: value[0] for name, value in found.items()}
            return result, found
        cache = ActivationCache(found, self)
        if remove_batch_dim:
            cache.remove_batch_dim()
        return result, cache

    # ---------------------------------------------------------------- flags

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether caches of everything have `hook_result`, per-head outputs."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether caches of everything have the inputs of each head."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Whether caches of everything have `hook_mlp_in`."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Refused: edit `hook_q_input`, `hook_k_input` and `hook_v_input` instead."""
        if use_attn_in:
            raise UnavailableNameError(
                "`hook_attn_in` is one place in front of three projections: use `hook_q_input`, "
                "`hook_k_input` and `hook_v_input`, which are always there."
            )

    def set_ungroup_grouped_query_attention(self, ungroup: bool) -> None:
        """Refused: keys and values have as many heads as the model has."""
        if ungroup:
            raise UnavailableNameError(
                "keys and values are computed once for each group of heads; `W_K` and `W_V` are "
                "repeated for every head."
            )

    # ---------------------------------------------------------------- text

    def generate(self, input: Any = "", max_new_tokens: int = 10, **options: Any) -> Any:
        """Continue a prompt; see `Generation.run` for the arguments."""
        return Generation(self, options).run(input, max_new_tokens)

    def generate_stream(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        max_tokens_per_yield: int = 25,
        **options: Any,
    ) -> Iterator[Any]:
        """As `generate`, in parts: text for text, ids for ids. The first part has the prompt."""
        return Generation(self, options).stream(input, max_new_tokens, max_tokens_per_yield)

    # ---------------------------------------------------------------- sample data

    def load_sample_training_dataset(self, **kwargs: Any) -> Any:
        """A few thousand texts like those that the model was trained on, from the hub."""
        self.dataset = sample_dataset(self.model.config.model_type, **kwargs)
        return self.dataset

    def sample_datapoint(
        self,
        tokenize: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> Any:
        """One random text of that data, or its ids."""
        if self.dataset is None:
            self.load_sample_training_dataset()
        index = int(torch.randint(len(self.dataset), ()))
        text = self.dataset[index]["text"]
        if not tokenize:
            return text
        return self.to_tokens(text, prepend_bos=prepend_bos, padding_side=padding_side)


def _keep_gradient(
    gradients: dict[str, torch.Tensor],
    slice: Slice | None,
    gradient: torch.Tensor,
    hook: HookPoint,
) -> None:
    value = gradient.detach()
    gradients[hook.name] = value if slice is None else _sliced(value, hook.name, slice)


def _shown(name: str, value: torch.Tensor) -> torch.Tensor:
    if name.endswith("hook_attn_scores"):  # what is masked has the lowest number in transformers
        return value.masked_fill_(value <= torch.finfo(value.dtype).min / 2, float("-inf"))
    return value


def _sliced(value: Any, name: str, slice: Slice) -> Any:
    """The positions of a value: before heads where there are heads."""
    end = name.rpartition(".")[2]
    by_head = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_result", "hook_rot_q", "hook_rot_k")
    headed = end in by_head or end.endswith("_input")
    axis = -3 if headed else -2
    return slice.apply(value, dim=axis)


_FORWARD = (
    "input return_type loss_per_token prepend_bos padding_side start_at_layer tokens "
    "shortformer_pos_embed attention_mask stop_at_layer past_kv_cache"
).split()


def _bind_forward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = dict(zip(_FORWARD, args, strict=False))
    for name, value in kwargs.items():
        if name not in _FORWARD or name in bound:
            raise InputError(
                f"`{name}` was given twice" if name in bound else f"forward takes no `{name}`"
            )
        bound[name] = value
    defaults: dict[str, Any] = dict.fromkeys(_FORWARD)
    defaults.update(return_type="logits", loss_per_token=False)
    if "input" not in bound:
        raise InputError("no input was given")
    return {**defaults, **bound}


def _tokenizer(cfg: HookedTransformerConfig) -> Any:
    """The tokenizer that a configuration names.

    Raises:
        LoadError: there is none.
    """
    from transformers import AutoTokenizer

    name = str(cfg.tokenizer_name)
    try:
        return AutoTokenizer.from_pretrained(
            folder_of(name), trust_remote_code=cfg.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(
            f"cfg.tokenizer_name={name!r} gave no tokenizer: {error}. Give `tokenizer`, or "
            "tokenizer_name=None for a model of ids alone."
        ) from error


def _own_padding_side(tokenizer: Any, hub: dict[str, Any]) -> str:
    """The side that a checkpoint says, which `LanguageModel` sets to "left"."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    known = ("revision", "cache_dir", "token", "local_files_only", "subfolder")
    options = {name: value for name, value in hub.items() if name in known}
    said = get_tokenizer_config(tokenizer.name_or_path, **options).get("padding_side")
    return str(said or type(tokenizer).padding_side)


def _revision(name: str, index: int | None, value: Any) -> str:
    for start, revision in _STEPS.items():
        if name.startswith(start):
            if value is None:
                steps = _pythia_steps() if "pythia" in start else None
                if steps is None or index is None:
                    raise LoadError(f"give checkpoint_value, the step, for {name}")
                if not -len(steps) <= index < len(steps):
                    raise LoadError(
                        f"checkpoint_index={index}: {name} has {len(steps)} checkpoints"
                    )
                value = steps[index]
            return f"{revision}{value}"
    raise LoadError(f"no checkpoints of the training of `{name}` are known")


def _pythia_steps() -> list[int]:
    """The steps at which Pythia was saved: 0, powers of two to 512, every thousandth."""
    return [0, *(2**i for i in range(10)), *range(1000, 143001, 1000)]


def _first_layers(model: LanguageModel, count: int) -> LanguageModel:
    """A model of the first layers of another, which shares their weights and stays as it is."""
    vocabulary = model.vocabulary()
    if not 0 < count <= len(vocabulary):
        raise InputError(f"first_n_layers={count}: the model has {len(vocabulary)} layers")
    module = model.load()
    blocks = module.get_submodule(vocabulary.architecture.layers)
    kept = torch.nn.ModuleList(list(blocks.children())[:count])
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    memo[id(blocks)] = kept
    shorter = copy.deepcopy(module, memo)
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if hasattr(shorter.config, name):
            setattr(shorter.config, name, count)
    return LanguageModel(shorter, model.tokenizer)


class Nested:
    """`model.blocks[0].attn.W_Q`, `model.blocks[0].attn.hook_z`, `model.embed.W_E`: TransformerLens'
    modules, as names of weights and hook points."""

    __slots__ = ("_lens", "_path")
    _lens: HookedTransformer
    _path: str

    def __init__(self, lens: HookedTransformer, path: str) -> None:
        object.__setattr__(self, "_lens", lens)
        object.__setattr__(self, "_path", path)

    def _names(self) -> Iterator[str]:
        lens = self._lens
        yield from lens._meant
        yield from lens._vocabulary.model_weights()._table
        for index in range(lens.cfg.n_layers):
            for name in lens._vocabulary.layer_weights(index)._table:
                yield f"blocks.{index}.{name}"

    def _exists(self) -> bool:
        return any(
            name == self._path or name.startswith(f"{self._path}.") for name in self._names()
        )

    def __getitem__(self, index: int) -> Nested:
        if self._path != "blocks":
            raise TypeError(f"`{self._path}` is not indexed")
        count = self._lens.cfg.n_layers
        if not -count <= index < count:
            raise UnavailableNameError.no_layer(index, count)
        return Nested(self._lens, f"blocks.{index % count}")

    def __iter__(self) -> Iterator[Nested]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        return self._lens.cfg.n_layers if self._path == "blocks" else 0

    def _weights(self, name: str) -> tuple[Any, str]:
        parts = f"{self._path}.{name}".split(".")
        if parts[0] == "blocks" and len(parts) > 2:
            return self._lens._vocabulary.layer_weights(int(parts[1])), ".".join(parts[2:])
        return self._lens._vocabulary.model_weights(), ".".join(parts)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        path = f"{self._path}.{name}"
        if path in self._lens.hook_dict:
            return self._lens.hook_dict[path]
        weights, own = self._weights(name)
        if own in weights:
            return weights[own]
        found = Nested(self._lens, path)
        if found._exists():
            return found
        raise no_lens_name(self._lens._vocabulary, path, self._names())

    def __call__(self, value: torch.Tensor) -> Any:
        """What the part computes: `embed` of ids, `ln_final`, `unembed` or a block of activations."""
        lens, (first, _, index) = self._lens, self._path.partition(".")
        if self._path in ("embed", "ln_final", "unembed"):
            return lens._vocabulary.find(self._path)(value)
        if first == "blocks" and index.isdigit():
            return lens.forward(value, start_at_layer=int(index), stop_at_layer=int(index) + 1)
        raise InputError(
            f"`{self._path}` cannot be called: `embed`, `ln_final`, `unembed` and blocks can. What it "
            "computes in a forward is in the cache, and its module in `model.module`."
        )

    def __setattr__(self, name: str, value: Any) -> None:
        weights, own = self._weights(name)
        weights[own] = value

    def __repr__(self) -> str:
        return f"<{self._path} of {self._lens._vocabulary.kind}>"
