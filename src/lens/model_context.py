"""Owns `ModelContext`: a model's weights by location, its sizes and its tokens, before it is loaded.

The locations, dimensions and their names are those of transformer-debugger, on every architecture that
has unified names. Activations are listed here with their shapes, and read with `model.hook`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.nn import functional

from ..models.checkpoint_weights import read_weight
from ..models.language import LanguageModel
from ..tracing.errors import InputError, LoadError, ShapeError, UnavailableNameError, near

#: None for what a model has once.
LayerIndex: TypeAlias = int | None


class InvalidTokenException(InputError):
    """A text that is not exactly one token."""


class InferenceEngineType(str, enum.Enum):
    """How a model is run. There is one way here."""

    STANDARD = "standard"


class Dimension(str, enum.Enum):
    """An axis of a weight or an activation."""

    SEQUENCE_TOKENS = "sequence_tokens"
    ATTENDED_TO_SEQUENCE_TOKENS = "attended_to_sequence_tokens"
    MAX_CONTEXT_LENGTH = "max_context_length"
    RESIDUAL_STREAM_CHANNELS = "residual_stream_channels"
    VOCAB_SIZE = "vocab_size"
    ATTN_HEADS = "attn_heads"
    QUERY_AND_KEY_CHANNELS = "query_and_key_channels"
    VALUE_CHANNELS = "value_channels"
    MLP_ACTS = "mlp_acts"
    LAYERS = "layers"
    SINGLETON = "singleton"
    AUTOENCODER_LATENTS = "autoencoder_latents"

    @property
    def is_model_intrinsic(self) -> bool:
        """True for sizes that follow from the model alone, not from a prompt or an autoencoder."""
        return self not in _NOT_OF_THE_MODEL


_NOT_OF_THE_MODEL = (
    Dimension.SEQUENCE_TOKENS,
    Dimension.ATTENDED_TO_SEQUENCE_TOKENS,
    Dimension.AUTOENCODER_LATENTS,
)


class WeightLocationType(str, enum.Enum):
    """A weight, by what it does in the model."""

    MLP_TO_HIDDEN = "mlp.to_hidden"
    MLP_TO_RESIDUAL = "mlp.to_residual"
    EMBEDDING = "embedding"
    UNEMBEDDING = "unembedding"
    POSITION_EMBEDDING = "position_embedding"
    ATTN_TO_QUERY = "attn.to_query"
    ATTN_TO_KEY = "attn.to_key"
    ATTN_TO_VALUE = "attn.to_value"
    ATTN_TO_RESIDUAL = "attn.to_residual"
    LAYER_NORM_GAIN_FINAL = "layer_norm_gain.final"
    LAYER_NORM_BIAS_FINAL = "layer_norm_bias.final"
    LAYER_NORM_GAIN_PRE_ATTN = "layer_norm_gain.pre_attn"
    LAYER_NORM_GAIN_PRE_MLP = "layer_norm_gain.pre_mlp"

    @property
    def has_no_layers(self) -> bool:
        """True for weights that a model has once."""
        return self in _OWN_WEIGHTS

    @property
    def shape_spec(self) -> tuple[Dimension, ...]:
        """The axes, in order."""
        return weight_shape_by_location_type[self]


class ActivationLocationType(str, enum.Enum):
    """An activation, by where it is in the model."""

    RESID_POST_EMBEDDING = "resid.post_emb"
    RESID_DELTA_ATTN = "resid.delta_attn"
    RESID_POST_ATTN = "resid.post_attn"
    RESID_DELTA_MLP = "resid.delta_mlp"
    RESID_POST_MLP = "resid.post_mlp"
    RESID_POST_FINAL_LAYER_NORM = "resid.post_ln_f"
    MLP_INPUT_LAYER_NORM_SCALE = "mlp_ln.scale"
    ATTN_INPUT_LAYER_NORM_SCALE = "attn_ln.scale"
    RESID_FINAL_LAYER_NORM_SCALE = "resid.ln_f.scale"
    ATTN_QUERY = "attn.q"
    ATTN_KEY = "attn.k"
    ATTN_VALUE = "attn.v"
    ATTN_QK_LOGITS = "attn.qk_logits"
    ATTN_QK_PROBS = "attn.qk_probs"
    ATTN_WEIGHTED_SUM_OF_VALUES = "attn.v_out"
    MLP_PRE_ACT = "mlp.pre_act"
    MLP_POST_ACT = "mlp.post_act"
    LOGITS = "logits"

    @property
    def has_no_layers(self) -> bool:
        """True for activations that a forward has once."""
        return self in _OWN_ACTIVATIONS

    @property
    def shape_spec_per_token_sequence(self) -> tuple[Dimension, ...]:
        """The axes for one prompt, in order."""
        return activation_shape_by_location_type[self]


_T, _A, _C = (
    Dimension.SEQUENCE_TOKENS,
    Dimension.ATTENDED_TO_SEQUENCE_TOKENS,
    Dimension.MAX_CONTEXT_LENGTH,
)
_R, _V, _M = Dimension.RESIDUAL_STREAM_CHANNELS, Dimension.VOCAB_SIZE, Dimension.MLP_ACTS
_H, _Q, _U = Dimension.ATTN_HEADS, Dimension.QUERY_AND_KEY_CHANNELS, Dimension.VALUE_CHANNELS
_ONE = Dimension.SINGLETON

#: The axes of each weight.
weight_shape_by_location_type: dict[WeightLocationType, tuple[Dimension, ...]] = {
    WeightLocationType.MLP_TO_HIDDEN: (_R, _M),
    WeightLocationType.MLP_TO_RESIDUAL: (_M, _R),
    WeightLocationType.EMBEDDING: (_V, _R),
    WeightLocationType.UNEMBEDDING: (_R, _V),
    WeightLocationType.POSITION_EMBEDDING: (_C, _R),
    WeightLocationType.ATTN_TO_QUERY: (_H, _R, _Q),
    WeightLocationType.ATTN_TO_KEY: (_H, _R, _Q),
    WeightLocationType.ATTN_TO_VALUE: (_H, _R, _U),
    WeightLocationType.ATTN_TO_RESIDUAL: (_H, _U, _R),
    WeightLocationType.LAYER_NORM_GAIN_FINAL: (_R,),
    WeightLocationType.LAYER_NORM_BIAS_FINAL: (_R,),
    WeightLocationType.LAYER_NORM_GAIN_PRE_ATTN: (_R,),
    WeightLocationType.LAYER_NORM_GAIN_PRE_MLP: (_R,),
}

#: The axes of each activation, for one prompt.
activation_shape_by_location_type: dict[ActivationLocationType, tuple[Dimension, ...]] = {
    ActivationLocationType.RESID_POST_EMBEDDING: (_T, _R),
    ActivationLocationType.RESID_DELTA_ATTN: (_T, _R),
    ActivationLocationType.RESID_POST_ATTN: (_T, _R),
    ActivationLocationType.RESID_DELTA_MLP: (_T, _R),
    ActivationLocationType.RESID_POST_MLP: (_T, _R),
    ActivationLocationType.RESID_POST_FINAL_LAYER_NORM: (_T, _R),
    ActivationLocationType.MLP_INPUT_LAYER_NORM_SCALE: (_T, _ONE),
    ActivationLocationType.ATTN_INPUT_LAYER_NORM_SCALE: (_T, _ONE),
    ActivationLocationType.RESID_FINAL_LAYER_NORM_SCALE: (_T, _ONE),
    ActivationLocationType.ATTN_QUERY: (_T, _H, _Q),
    ActivationLocationType.ATTN_KEY: (_A, _H, _Q),
    ActivationLocationType.ATTN_VALUE: (_A, _H, _U),
    ActivationLocationType.ATTN_QK_LOGITS: (_T, _A, _H),
    ActivationLocationType.ATTN_QK_PROBS: (_T, _A, _H),
    ActivationLocationType.ATTN_WEIGHTED_SUM_OF_VALUES: (_T, _H, _U),
    ActivationLocationType.MLP_PRE_ACT: (_T, _M),
    ActivationLocationType.MLP_POST_ACT: (_T, _M),
    ActivationLocationType.LOGITS: (_T, _V),
}

_OWN_ACTIVATIONS = (
    ActivationLocationType.RESID_POST_EMBEDDING,
    ActivationLocationType.RESID_POST_FINAL_LAYER_NORM,
    ActivationLocationType.RESID_FINAL_LAYER_NORM_SCALE,
    ActivationLocationType.LOGITS,
)
_OWN_WEIGHTS = {
    WeightLocationType.EMBEDDING: "embed.W_E",
    WeightLocationType.UNEMBEDDING: "unembed.W_U",
    WeightLocationType.POSITION_EMBEDDING: "pos_embed.W_pos",
    WeightLocationType.LAYER_NORM_GAIN_FINAL: "ln_final.w",
    WeightLocationType.LAYER_NORM_BIAS_FINAL: "ln_final.b",
}
_LAYER_WEIGHTS = {
    WeightLocationType.MLP_TO_HIDDEN: "mlp.W_in",
    WeightLocationType.MLP_TO_RESIDUAL: "mlp.W_out",
    WeightLocationType.ATTN_TO_QUERY: "attn.W_Q",
    WeightLocationType.ATTN_TO_KEY: "attn.W_K",
    WeightLocationType.ATTN_TO_VALUE: "attn.W_V",
    WeightLocationType.ATTN_TO_RESIDUAL: "attn.W_O",
    WeightLocationType.LAYER_NORM_GAIN_PRE_ATTN: "ln1.w",
    WeightLocationType.LAYER_NORM_GAIN_PRE_MLP: "ln2.w",
}
_GAINS = (
    WeightLocationType.LAYER_NORM_GAIN_FINAL,
    WeightLocationType.LAYER_NORM_GAIN_PRE_ATTN,
    WeightLocationType.LAYER_NORM_GAIN_PRE_MLP,
)


class Encoding:
    """A tokenizer, with the calls of a tiktoken encoding.

    Attributes:
        name: of the checkpoint.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer = tokenizer
        self.name = name

    @property
    def n_vocab(self) -> int:
        """Tokens, special ones included. The embedding may have more rows."""
        return len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. None are added; special tokens in the text become one token each."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids. Bytes that are no character become U+FFFD."""
        text: str = self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        return text

    def __repr__(self) -> str:
        return f"<encoding of {self.name}, {self.n_vocab} tokens>"


class ModelContext:
    """What a model is, before and after its weights are loaded.

    Until `get_or_create_model` is called, the model is a skeleton, and `get_weight` reads single
    weights from its checkpoint. Nothing here runs a forward.

    Args:
        model: hub id, folder, or a model of graftwork.
        device: where weights are given and the model is loaded; default, of a name, the accelerator if
            there is one (`get_default_device`), and of a model where that is.
        **options: go to `LanguageModel`.

    Raises:
        LoadError: there is no such model, or options are given for one that exists.

    Attributes:
        model_name: as it was given; of a model, its class.
        device: see above.

    Example:
        context = ModelContext("graftwork/tiny")
        W_Q = context.get_weight(WeightLocationType.ATTN_TO_QUERY, layer=2)   # [H, R, Q]
        normed = context.get_weight("mlp.to_hidden", 2, normalize_dim="residual_stream_channels")
    """

    def __init__(
        self, model: Any, device: torch.device | str | None = None, **options: Any
    ) -> None:
        if isinstance(model, str) or hasattr(model, "__fspath__"):
            self.device = get_default_device() if device is None else torch.device(device)
            if self.device.type != "cpu":
                options.setdefault("device_map", str(self.device))
            self.model_name, self._model = str(model), LanguageModel(model, **options)
        else:
            if options:
                raise LoadError(
                    f"{', '.join(sorted(options))} only apply to a model that is loaded by name; this "
                    "one exists already."
                )
            self.device = model.device if device is None else torch.device(device)
            self.model_name, self._model = type(model.module_tree()).__name__, model

    @classmethod
    def from_model_type(
        cls,
        model_type: str,
        inference_engine_type: InferenceEngineType | str = InferenceEngineType.STANDARD,
        **options: Any,
    ) -> ModelContext:
        """The context of a model by name.

        Args:
            model_type: hub id or folder.
            inference_engine_type: "standard"; there is no other.
            **options: `device`, and what `LanguageModel` takes.

        Raises:
            InputError: another engine is asked for.
            LoadError: there is no such model.
        """
        if inference_engine_type not in tuple(InferenceEngineType):
            raise InputError(
                f"inference_engine_type={inference_engine_type!r}: models run in one way here, "
                f"{InferenceEngineType.STANDARD.value!r}."
            )
        return cls(model_type, **options)

    # ---------------------------------------------------------------- the model

    @property
    def model(self) -> Any:
        """The model as it is: a skeleton until its weights are loaded."""
        return self._model

    def get_or_create_model(self) -> Any:
        """The model, a `LanguageModel` if it was given by name, with its weights loaded.

        The first call loads them; all calls give the same model.

        Raises:
            LoadError: they cannot be loaded.
        """
        self._model.load()
        return self._model

    def get_model_config_as_dict(self) -> dict[str, Any]:
        """The configuration of the checkpoint, and the sizes of `model.cfg`, which have the last word.

        All can be written as JSON.
        """
        sizes = self._model.cfg.to_dict()
        sizes["dtype"] = str(sizes["dtype"]).removeprefix("torch.")
        return {**self._model.config.to_dict(), **sizes}

    # ---------------------------------------------------------------- weights

    def get_weight(
        self,
        location_type: WeightLocationType | str,
        layer: LayerIndex = None,
        normalize_dim: Dimension | str | None = None,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """A weight, in the shape that its location promises, on every architecture.

        Of a loaded model it is the model's own memory: do not write into it. A copy are weights on
        another device, normalized weights, gains of norms that add 1 to their parameter (Gemma), and
        keys and values of grouped-query models, which are repeated for the query heads that share them,
        since their locations promise [H, R, Q]. The weights of a model that is not loaded are read from
        its checkpoint, see `read_weight`, and the model stays unloaded.

        `mlp.to_hidden` of a gated MLP is its up-projection. Where attention and MLP read the residual
        stream through one norm, both `layer_norm_gain.pre_…` are that norm's.

        Args:
            location_type: see `weight_shape_by_location_type`.
            layer: from 0; not used where the model has one weight for all layers.
            normalize_dim: an axis along which the weight is divided by its L2 norm.
            device: default the context's.

        Returns:
            The weight without gradients, in the shape of the location.

        Raises:
            InputError: there is no such location; the layer is missing; or the location does not have
                `normalize_dim` exactly once.
            UnavailableNameError: there is no such layer, or this model has no such weight.
            ShapeError: the weight has another shape than its location promises.
        """
        location = _location(location_type)
        axis = None if normalize_dim is None else _axis_of(location, normalize_dim)
        if location.has_no_layers:
            layer = None
        elif layer is None:
            raise InputError(
                f"`{location.value}` is in every layer: give one, 0 to {self.n_layers - 1}."
            )
        elif isinstance(layer, bool) or not 0 <= layer < self.n_layers:
            raise UnavailableNameError.no_layer(layer, self.n_layers)
        weight = self._get_weight_helper(location, layer)
        expected = self.get_shape_from_spec(location.shape_spec)
        if tuple(weight.shape) != expected:
            axes = ", ".join(f"{one.value}={self.get_dim_size(one)}" for one in location.shape_spec)
            raise ShapeError(
                f"`{location.value}` of {self.model_name} has the shape {list(weight.shape)}, and the "
                f"location promises [{axes}]."
            )
        weight = weight.to(self.device if device is None else torch.device(device))
        if axis is not None:
            weight = functional.normalize(weight, dim=axis)
        return weight.detach()

    def _get_weight_helper(self, location: WeightLocationType, layer: LayerIndex) -> torch.Tensor:
        """A weight in the shape of its location.

        Raises:
            UnavailableNameError: the model has none.
        """
        vocabulary = self._model._model_names()
        architecture = vocabulary.architecture
        name = _OWN_WEIGHTS[location] if layer is None else _LAYER_WEIGHTS[location]
        norms = {"ln_final": architecture.norm}
        if layer is not None:
            block = architecture.block(layer)
            norms = dict(block.norms)
            if name == "ln2.w" and block.parallel and "ln2" not in norms:
                name = "ln1.w"
        table = vocabulary.model_weights() if layer is None else vocabulary.layer_weights(layer)
        if name not in table:
            raise UnavailableNameError.missing(
                location.value, vocabulary.kind, f"it has no weight `{name}`. {near(name, table)}"
            )
        weight = read_weight(self._model, layer, name)
        if location in _GAINS:
            norm = norms.get(name.split(".")[0])
            return weight + norm.offset if norm is not None and norm.offset else weight
        if location in (WeightLocationType.ATTN_TO_KEY, WeightLocationType.ATTN_TO_VALUE):
            shared = self.n_attention_heads // weight.shape[0]
            return weight.repeat_interleave(shared, 0) if shared > 1 else weight
        if location is WeightLocationType.POSITION_EMBEDDING:
            # OPT keeps rows before the first position.
            return weight[max(0, weight.shape[0] - self.n_context) :]
        return weight

    # ---------------------------------------------------------------- tokens

    def get_encoding(self) -> Encoding:
        """The tokenizer.

        Raises:
            InputError: the model has none.
        """
        tokenizer = getattr(self._model, "tokenizer", None)
        if tokenizer is None:
            raise InputError(
                f"{self.model_name} has no tokenizer, so texts mean nothing to it: give it one, "
                "`LanguageModel(…, tokenizer=…)`."
            )
        return Encoding(tokenizer, self.model_name)

    def encode(self, string: str) -> list[int]:
        """Token ids of a text, without a token at its beginning that it does not have."""
        return self.get_encoding().encode(string)

    def decode(self, token_list: Sequence[int]) -> str:
        """The text of token ids."""
        return self.get_encoding().decode(token_list)

    def decode_token(self, token: int) -> str:
        """The text of one token id. Tokenizers that drop the space before a text drop this one's."""
        return self.get_encoding().decode([token])

    def decode_token_list(self, token_list: Iterable[int]) -> list[str]:
        """The text of each token id."""
        return [self.decode_token(token) for token in token_list]

    def encode_token_str(self, token_str: str) -> int:
        """The id of a text that is one token.

        Raises:
            InvalidTokenException: it is none, or several.
        """
        found = self.encode(token_str)
        if len(found) != 1:
            parts = ", ".join(f"{one} {self.decode_token(one)!r}" for one in found) or "none"
            raise InvalidTokenException(
                f"{token_str!r} is not exactly one token of {self.model_name}. It is {len(found)}: "
                f"{parts}."
            )
        return found[0]

    def encode_token_str_list(self, token_str_list: Iterable[str]) -> list[int]:
        """The id of each text.

        Raises:
            InvalidTokenException: one of them is not exactly one token.
        """
        return [self.encode_token_str(token_str) for token_str in token_str_list]

    # ---------------------------------------------------------------- sizes

    def get_dim_size(self, model_dimension_spec: Dimension | str) -> int:
        """The size of a dimension.

        Raises:
            InputError: there is no such dimension, or it is not one of the model.
            UnavailableNameError: this model does not have it.
        """
        dimension = _dimension(model_dimension_spec)
        if not dimension.is_model_intrinsic:
            raise InputError(
                f"`{dimension.value}` is not a size of the model: it follows from a prompt or from an "
                "autoencoder."
            )
        size = self._size(dimension)
        if size is None:
            raise UnavailableNameError.missing(
                dimension.value, self.model_name, "its configuration names no such size"
            )
        return size

    def _size(self, dimension: Dimension) -> int | None:
        cfg = self._model.cfg
        sizes: dict[Dimension, int | None] = {
            Dimension.MAX_CONTEXT_LENGTH: cfg.n_ctx,
            Dimension.RESIDUAL_STREAM_CHANNELS: cfg.d_model,
            Dimension.VOCAB_SIZE: cfg.d_vocab,
            Dimension.ATTN_HEADS: cfg.n_heads,
            Dimension.QUERY_AND_KEY_CHANNELS: cfg.d_head,
            Dimension.VALUE_CHANNELS: cfg.d_head,
            Dimension.MLP_ACTS: cfg.d_mlp,
            Dimension.LAYERS: cfg.n_layers,
            Dimension.SINGLETON: 1,
        }
        return sizes[dimension]

    def get_shape_from_spec(self, shape_spec: Iterable[Dimension | str]) -> tuple[int, ...]:
        """The sizes of dimensions.

        Raises:
            InputError, UnavailableNameError: see `get_dim_size`.
        """
        return tuple(self.get_dim_size(dimension) for dimension in shape_spec)

    @property
    def n_neurons(self) -> int:
        """Of one MLP."""
        return self.get_dim_size(Dimension.MLP_ACTS)

    @property
    def n_attention_heads(self) -> int:
        """Query heads of one layer."""
        return self.get_dim_size(Dimension.ATTN_HEADS)

    @property
    def n_layers(self) -> int:
        """Blocks."""
        return self.get_dim_size(Dimension.LAYERS)

    @property
    def n_residual_stream_channels(self) -> int:
        """d_model."""
        return self.get_dim_size(Dimension.RESIDUAL_STREAM_CHANNELS)

    @property
    def n_vocab(self) -> int:
        """Rows of the embedding; at least the tokens of the tokenizer."""
        return self.get_dim_size(Dimension.VOCAB_SIZE)

    @property
    def n_context(self) -> int:
        """Positions that the configuration names."""
        return self.get_dim_size(Dimension.MAX_CONTEXT_LENGTH)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.model_name} on {self.device}>"


#: The name of the one kind of context that has a model.
StandardModelContext = ModelContext


class StubModelContext(ModelContext):
    """A context that holds sizes and nothing else, for tests.

    Args:
        size_by_model_dimension_spec: the size of each dimension that there is.
    """

    def __init__(self, size_by_model_dimension_spec: Mapping[Dimension, int]) -> None:
        self.model_name, self.device = "stub", torch.device("cpu")
        self._sizes = {_dimension(one): size for one, size in size_by_model_dimension_spec.items()}

    def _nothing(self, what: str) -> UnavailableNameError:
        return UnavailableNameError(f"a StubModelContext holds sizes only: it has no {what}")

    def _size(self, dimension: Dimension) -> int | None:
        return 1 if dimension is Dimension.SINGLETON else self._sizes.get(dimension)

    def _get_weight_helper(self, location: WeightLocationType, layer: LayerIndex) -> torch.Tensor:
        raise self._nothing("weights")

    @property
    def model(self) -> Any:
        raise self._nothing("model")

    def get_or_create_model(self) -> Any:
        raise self._nothing("model")

    def get_model_config_as_dict(self) -> dict[str, Any]:
        raise self._nothing("configuration")

    def get_encoding(self) -> Encoding:
        raise self._nothing("tokenizer")


# -------------------------------------------------------------------- functions


def get_default_device() -> torch.device:
    """The first CUDA device, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    return torch.device("mps", 0) if torch.backends.mps.is_available() else torch.device("cpu")


def get_embedding(model_context: ModelContext) -> torch.Tensor:
    """The embedding, [V, R], as the checkpoint has it: without Gemma's factor, `cfg.embed_scale`."""
    return model_context.get_weight(WeightLocationType.EMBEDDING)


def get_unembedding_with_ln_gain(model_context: ModelContext) -> torch.Tensor:
    """The unembedding times the gain of the final norm, [R, V].

    Its product with a normalized residual stream is that stream's logits, up to what the biases of norm
    and unembedding add.

    Raises:
        UnavailableNameError: the model has no final norm, or one without a gain.
    """
    unembedding = model_context.get_weight(WeightLocationType.UNEMBEDDING)
    gain = model_context.get_weight(WeightLocationType.LAYER_NORM_GAIN_FINAL)
    return unembedding * gain[:, None]


def _location(given: WeightLocationType | str) -> WeightLocationType:
    try:
        return WeightLocationType(given)
    except ValueError:
        known = [one.value for one in WeightLocationType]
        raise InputError(
            f"{given!r} is no location of a weight. {near(str(given), known)}"
        ) from None


def _dimension(given: Dimension | str) -> Dimension:
    try:
        return Dimension(given)
    except ValueError:
        known = [one.value for one in Dimension]
        raise InputError(f"{given!r} is no dimension. {near(str(given), known)}") from None


def _axis_of(location: WeightLocationType, given: Dimension | str) -> int:
    """Which axis of a weight a dimension is.

    Raises:
        InputError: none, or several.
    """
    dimension, spec = _dimension(given), location.shape_spec
    if spec.count(dimension) != 1:
        axes = ", ".join(one.value for one in spec)
        raise InputError(
            f"`{location.value}` is [{axes}] and has `{dimension.value}` {spec.count(dimension)} "
            "times, so it cannot be normalized along it."
        )
    return spec.index(dimension)
