"""Owns weight processing: rewriting a model's weights so that they are easier to interpret while its
log-probabilities stay what they are. It changes a copy of the model, in the same class.

The formulas are functions of a state dict under TransformerLens' names, `blocks.0.attn.W_Q` [head,
d_model, d_head]; `process` applies them to a model. With x̂ the normalized residual stream, w and b a
norm's gain and bias:

    fold_ln                  (x̂ ⊙ w + b) W = x̂ (diag(w) W) + b W, so W takes the gain and its bias takes
                             b W. A LayerNorm has subtracted the mean, so x̂ has none, and what a column
                             of W reads of the mean can be taken out of it.
    center_writing_weights   every reader of the stream is a LayerNorm, which subtracts the mean of what
                             it takes, so nothing needs to write a mean.
    center_unembed           softmax does not see what is added to all logits alike.
    fold_value_biases        rows of the pattern sum to 1, so a head adds b_V W_O wherever it attends.
    refactor_factored_attn_matrices
                             scores know only W_Q W_Kᵀ, and the residual stream only W_V W_O: both
                             products get the factors of their singular value decomposition.

Source: TransformerLens, weight_processing.py; Elhage et al. 2021, A Mathematical Framework for
Transformer Circuits.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import torch
from torch.nn import functional

from ..models.architectures import stacks_of
from ..models.factored_matrix import FactoredMatrix, at_least_single
from ..models.language import LanguageModel
from ..models.sizes import Sizes
from ..models.vocabulary import Vocabulary
from ..models.weights import Weights
from ..tracing.errors import GraftworkError, ShapeError, UnavailableNameError

logger = logging.getLogger("graftwork")

#: What heads of grouped-query attention share: TransformerLens marks what is not repeated for them.
_SHARED = ("attn.W_K", "attn.W_V", "attn.b_K", "attn.b_V")
_ATTENTION = ("attn.W_Q", "attn.W_K", "attn.W_V")
_MLP = ("mlp.W_in", "mlp.W_gate")
_WRITERS = ("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out")
_MATRICES = (*_ATTENTION, *_MLP, "attn.W_O", "mlp.W_out", "unembed.W_U")
#: What has a bias in every state dict of TransformerLens.
_BIASED = frozenset("W_Q W_K W_V _W_K _W_V W_O W_in W_out W_U".split())
_ADDED = "what its norms give is also added to the residual stream"
_QUANTIZED = "{} is quantized, so load the model without quantization"

State: TypeAlias = Mapping[str, torch.Tensor]


class ProcessingError(GraftworkError, ValueError):
    """Weights that cannot be processed, or a step that would change what the model computes."""

    @classmethod
    def refused(cls, step: str, reason: str) -> ProcessingError:
        return cls(f"`{step}` would change what this model computes: {reason}.")

    @classmethod
    def model(cls, kind: str, reason: str) -> ProcessingError:
        return cls(f"the weights of {kind} cannot be processed: {reason}.")


# -------------------------------------------------------------------- a model


def process(
    model: LanguageModel,
    *,
    fold_ln: bool = True,
    center_writing_weights: bool = True,
    center_unembed: bool = True,
    fold_value_biases: bool = True,
    refactor_factored_attn_matrices: bool = False,
) -> LanguageModel:
    """A copy of a model with processed weights. Its log-probabilities are the model's.

    The model itself is not touched; its edits and attached modules are not in the copy. Norms stay
    where they are, with gain 1 and bias 0; embedding and unembedding are separate parameters if they
    were one. Linear modules get the biases that they need and did not have: the class does not know
    these, so a checkpoint of the copy loads without them, and is better made anew.

    Args:
        fold_ln: gains and biases of norms go into the weights that read them.
        center_writing_weights: what writes to the residual stream has mean 0 over d_model.
        center_unembed: logits have mean 0 over the vocabulary.
        fold_value_biases: b_O takes what b_V adds.
        refactor_factored_attn_matrices: W_Q, W_K and W_V, W_O become orthogonal factors.

    Steps that do not apply to the architecture are left out with a warning: see `steps_for`.

    Raises:
        ProcessingError: weights are quantized, offloaded or shared; the factors of the attention
            matrices cannot be changed, as with rotary positions; or a step turned out to change what
            a model computes whose architecture is not declared, which is tried on a few tokens.
    """
    steps = steps_for(
        model,
        fold_ln=fold_ln,
        center_writing_weights=center_writing_weights,
        center_unembed=center_unembed,
        fold_value_biases=fold_value_biases,
        refactor_factored_attn_matrices=refactor_factored_attn_matrices,
    )
    root = model.load()
    _refuse(model)
    module = model._lock.during(lambda: copy.deepcopy(root))
    with torch.no_grad():
        result = LanguageModel(module, tokenizer=model.tokenizer)
        result._names = dict(model._names)
        state, cfg = state_dict_of(result), result.cfg
        probed = result.vocabulary().architecture.probed
        expected = _sample(result) if probed else None
        for step, function in _STEPS.items():
            if steps[step]:
                state = function(state, cfg)
                if expected is not None:
                    load_state_dict_into(result, state)
                    _compare(step, expected, _sample(result))
        load_state_dict_into(result, state)
    return result


def _sample(model: LanguageModel) -> torch.Tensor | None:
    """Logits [token, d_vocab_out] of a few tokens; None in half precision, which shows too little."""
    root = model.load()
    training = [module for module in root.modules() if module.training]
    ids = torch.arange(8, device=model["embed.W_E"].device) * 7 % model.cfg.d_vocab
    root.eval()
    try:
        found: torch.Tensor = root(input_ids=ids[None]).logits[0]
    finally:
        for module in training:
            module.training = True
    return found if found.dtype in (torch.float32, torch.float64) else None


def _compare(step: str, expected: torch.Tensor, found: torch.Tensor | None) -> None:
    """Raise if a step has changed log-probabilities: what probing saw of a model need not be all.

    The bound is loose, since matrix products may be in reduced precision: a step that does not fit
    misses it by far.
    """
    assert found is not None
    off = float((expected.log_softmax(-1) - found.log_softmax(-1)).abs().max())
    if not off < 1e-3 * (1 + float(expected.abs().max())):
        raise ProcessingError(
            f"`{step}` changes log-probabilities of this model, which nobody declared, by {off:.2g}: "
            f"leave it out with `{step}=False`."
        )


def steps_for(
    model: LanguageModel,
    *,
    fold_ln: bool = True,
    center_writing_weights: bool = True,
    center_unembed: bool = True,
    fold_value_biases: bool = True,
    refactor_factored_attn_matrices: bool = False,
) -> dict[str, bool]:
    """Which of the steps that are asked for apply to a model, by name.

    A step that would change what the model computes is False, and a logged warning says why. The
    weights are not loaded for this.

    Raises:
        ProcessingError: the weights cannot be processed at all, or not be refactored.
    """
    asked = {
        "fold_ln": fold_ln,
        "center_writing_weights": center_writing_weights,
        "center_unembed": center_unembed,
        "fold_value_biases": fold_value_biases,
        "refactor_factored_attn_matrices": refactor_factored_attn_matrices,
    }
    _refuse(model)
    reasons = _reasons(model)
    name = "refactor_factored_attn_matrices"
    if asked[name] and name in reasons:
        raise ProcessingError.refused(name, reasons[name])
    for step, reason in reasons.items():
        if asked[step]:
            logger.warning("%s is off for %s: %s", step, model.cfg.architecture, reason)
    return {step: wanted and step not in reasons for step, wanted in asked.items()}


def state_dict_of(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Copies of the weights under TransformerLens' names, in float32 or float64.

    Only what the model has: see `fill_missing_keys`. Gains of norms are what the norm multiplies by,
    1 + parameter in Gemma. Heads that share keys and values have `_W_K`, `_W_V` [n_kv_heads, d_model,
    d_head], `_b_K` and `_b_V`.
    """
    tree, found = model.load(), {}
    for key, home in _homes(model).items():
        if home.present(tree):
            found[key] = home.read()
    return found


def load_state_dict_into(model: LanguageModel, state: Mapping[str, torch.Tensor]) -> None:
    """Write weights under TransformerLens' names into the model's module, in its own dtype.

    What is not in `state` stays. Biases that the model lacks are created unless they are zeros, and
    embedding and unembedding are separated if they no longer are the same numbers.

    Raises:
        UnavailableNameError: the model has no such weight.
        ShapeError: a weight has another shape. Then, as above, nothing has been written.
        ProcessingError: weights are quantized, offloaded or shared.
    """
    root, homes = model.load(), _homes(model)
    _refuse(model)
    values: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        home = homes.get(key)
        is_bias = key.rpartition(".")[2].lstrip("_").startswith("b")
        if is_bias and not (home and home.present(root)) and not torch.count_nonzero(value):
            continue
        shape = None if home is None else home.shape(root)
        if home is None or shape is None:
            raise UnavailableNameError.missing(
                key, model.cfg.architecture, "the weight has no module in this model"
            )
        if shape != tuple(value.shape):
            raise ShapeError(
                f"`{key}` has the shape {list(shape)}, and {list(value.shape)} was given"
            )
        values[key] = value

    def write() -> None:
        changed = _untie(model, homes, values)
        for key, value in values.items():
            home = homes[key]
            if not home.present(root):
                home.create(root)
                changed = True
            home.write(value)
        model.refresh(changed)  # what was read of the module's structure is no longer so

    with torch.no_grad():
        model._lock.during(write)


@dataclasses.dataclass(frozen=True)
class _Home:
    """Where a weight is.

    Attributes:
        weights, name: of the layer or model, and the unified name in it.
        offset: what is added to the parameter to give the weight.
    """

    weights: Weights
    name: str
    offset: float

    def present(self, root: torch.nn.Module) -> bool:
        return self.weights.has(self.name, root)

    def module(self, root: torch.nn.Module) -> torch.nn.Module | None:
        try:
            return root.get_submodule(self.weights.path(self.name))
        except AttributeError:
            return None

    @property
    def parameter(self) -> str:
        return self.weights._table[self.name].parameter

    def shape(self, root: torch.nn.Module) -> tuple[int, ...] | None:
        """The shape under the unified name, of a bias that could be created, too; else None."""
        if self.present(root):
            return tuple(self.weights[self.name].shape)
        module, matrix = self.module(root), self.name.replace("b_", "W_")
        if self.parameter != "bias" or module is None or not _is_projection(module):
            return None
        return _bias_shape(matrix, self.weights[matrix])

    def read(self) -> torch.Tensor:
        value = at_least_single(self.weights[self.name].detach().clone())
        return value + self.offset if self.offset else value

    def write(self, value: torch.Tensor) -> None:
        if not self.offset:
            self.weights[self.name] = value
        elif not torch.equal(self.read(), value):  # (w + 1) - 1 would change bits of w
            self.weights[self.name] = value - self.offset

    def create(self, root: torch.nn.Module) -> None:
        """Zeros for the bias of a linear module, which may be that of several weights."""
        module = self.module(root)
        assert module is not None and isinstance(module.weight, torch.Tensor)
        weight = module.weight
        size = weight.shape[0 if isinstance(module, torch.nn.Linear) else 1]
        zeros = torch.zeros(size, dtype=weight.dtype, device=weight.device)
        bias = torch.nn.Parameter(zeros, requires_grad=weight.requires_grad)
        module.register_parameter("bias", bias)


def _bias_shape(matrix: str, weight: torch.Tensor) -> tuple[int, ...]:
    """[…, d_in, d_out] → […, d_out], and [head, d_head, d_model] → [d_model] for W_O."""
    shape = tuple(weight.shape)
    return shape[-1:] if matrix.endswith("W_O") else (*shape[:-2], shape[-1])


def _homes(model: LanguageModel) -> dict[str, _Home]:
    """Every weight that the model has or could get, by its name in TransformerLens."""
    vocabulary = _vocabulary(model)
    architecture, cfg = vocabulary.architecture, vocabulary.sizes
    found: dict[str, _Home] = {}
    for name in architecture.weights:
        offset = architecture.norm.offset if architecture.norm and name == "ln_final.w" else 0.0
        found[name] = _Home(vocabulary.model_weights(), name, offset)
    for index in range(len(vocabulary)):
        block, weights = architecture.block(index), vocabulary.layer_weights(index)
        for name in block.weights:
            norm = block.norms.get(name.removesuffix(".w"))
            found[_key(cfg, index, name)] = _Home(weights, name, norm.offset if norm else 0.0)
    return found


def _vocabulary(model: LanguageModel) -> Vocabulary:
    stacks = stacks_of(model.config)
    if stacks is not None and stacks != ("layers",):
        kind = type(model.module_tree()).__name__
        raise ProcessingError.model(
            kind, "it has an encoder and a decoder, and processing is of one"
        )
    return model.vocabulary()


def _untie(
    model: LanguageModel, homes: Mapping[str, _Home], values: Mapping[str, torch.Tensor]
) -> bool:
    """Give the unembedding its own parameter if it is to differ from the embedding; True then."""
    root = model.load()
    if not _tied(root, homes):
        return False
    embed, unembed = homes["embed.W_E"], homes["unembed.W_U"]
    one = values.get("embed.W_E", embed.weights["embed.W_E"])
    other = values.get("unembed.W_U", unembed.weights["unembed.W_U"])
    if torch.equal(one, other.T.to(one.device, one.dtype)):
        return False
    head = unembed.module(root)
    assert head is not None
    weight = head.weight
    assert isinstance(weight, torch.nn.Parameter)
    head.weight = torch.nn.Parameter(weight.detach().clone(), weight.requires_grad)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    pairs = getattr(root, "all_tied_weights_keys", None)
    if isinstance(pairs, dict):
        path = f"{unembed.weights.path('unembed.W_U')}.weight"
        root.all_tied_weights_keys = {a: b for a, b in pairs.items() if a != path}  # type: ignore[assignment]
    return True


def _tied(root: torch.nn.Module, homes: Mapping[str, _Home]) -> bool:
    pair = [homes[key].module(root) for key in ("embed.W_E", "unembed.W_U") if key in homes]
    weights = [getattr(module, "weight", None) for module in pair]
    return len(weights) == 2 and weights[0] is weights[1] and weights[0] is not None


# -------------------------------------------------------------------- what applies


def _refuse(model: LanguageModel) -> None:
    """Raise for weights that cannot be written, or that are not what the forward multiplies by."""
    root, homes = model.module_tree(), _homes(model)
    kind = type(root).__name__
    if getattr(root, "is_quantized", False) or getattr(model.config, "quantization_config", None):
        raise ProcessingError.model(kind, _QUANTIZED.format("it"))
    if "unembed.W_U" not in homes or not homes["unembed.W_U"].present(root):
        raise ProcessingError.model(kind, "it has no unembedding, so it gives no logits")
    owners: dict[int, str] = {}
    for key, home in homes.items():
        if not home.present(root):
            continue
        module, path = home.module(root), home.weights.path(home.name)
        assert module is not None
        parameter = getattr(module, home.parameter)
        if home.name in _MATRICES:
            if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
                raise ProcessingError.model(kind, _QUANTIZED.format(f"`{path}`"))
            if not _is_projection(module) or home.parameter not in module._parameters:
                raise ProcessingError.model(
                    kind, f"`{path}` is a {type(module).__name__}, which is no plain linear module"
                )
        if model.loaded and parameter.is_meta:
            raise ProcessingError.model(
                kind, f"`{path}` is offloaded, so load the model with all weights on devices"
            )
        layer = ".".join(key.split(".")[:2]) if key.startswith("blocks.") else "the model"
        if owners.setdefault(id(parameter), layer) != layer:
            raise ProcessingError.model(kind, f"`{path}` is shared by several layers")


def _is_projection(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _reasons(model: LanguageModel) -> dict[str, str]:
    """Why steps do not apply, by step."""
    cfg = model.cfg
    tests: dict[str, Iterator[str]] = {
        "fold_ln": _against_fold_ln(model),
        "center_writing_weights": _against_center_writing(model),
        "center_unembed": _never_center_unembed(cfg),
        "fold_value_biases": _against_fold_value_biases(model),
        "refactor_factored_attn_matrices": _never_refactor(cfg),
    }
    first = {step: next(reasons, None) for step, reasons in tests.items()}
    return {step: reason for step, reason in first.items() if reason is not None}


def _against_fold_ln(model: LanguageModel) -> Iterator[str]:
    cfg, vocabulary, root = model.cfg, model.vocabulary(), model.module_tree()
    yield from _never_fold_ln(cfg)
    yield from _adds_what_norms_give(model)
    if len(_kinds(vocabulary)) > 1:
        yield "it has norms of different kinds"
    for index in range(cfg.n_layers):
        weights = vocabulary.layer_weights(index)
        if "ln1.w" not in weights:
            yield f"attention of layer {index} takes what no norm with a gain has given"
        if "ln2.w" not in weights and not cfg.parallel_attn_mlp:
            yield f"the MLP of layer {index} takes what no norm with a gain has given"
    whole = vocabulary.model_weights()
    if "ln_final.w" not in whole:
        yield "it has no final norm with a gain"
    head = root.get_submodule(whole.path("unembed.W_U"))
    if getattr(head, "in_features", cfg.d_model) != cfg.d_model:
        yield "a projection is between the final norm and the unembedding"
    own = {whole.path(name).split(".")[0] for name in whole}
    own.add(vocabulary.architecture.layers.split(".")[0])
    for name, child in root.named_children():
        if name not in own and any(True for _ in child.parameters()):
            yield f"`{name}` reads the final norm, too"


def _against_center_writing(model: LanguageModel) -> Iterator[str]:
    cfg, vocabulary = model.cfg, model.vocabulary()
    yield from _never_center_writing(cfg)
    yield from _adds_what_norms_give(model)
    if _kinds(vocabulary) != {"LN"}:
        yield "it has norms that do not subtract the mean"
    if "ln_final.w" not in vocabulary.model_weights():
        yield "it has no final norm, so logits depend on the mean"
    embedding = model.module_tree().get_submodule(vocabulary.model_weights().path("embed.W_E"))
    if getattr(embedding, "embedding_dim", cfg.d_model) != cfg.d_model:
        yield "a projection is between the embedding and the residual stream"


def _against_fold_value_biases(model: LanguageModel) -> Iterator[str]:
    if any("attn.sinks" in block.weights for block in model.vocabulary().architecture.blocks):
        yield "with attention sinks, rows of the pattern sum to less than 1"
    config = model.config
    # Source: transformers, models/bloom/modeling_bloom.py, BloomAttention.forward.
    if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        yield "with slow_but_exact, this class does not add b_O"


def _adds_what_norms_give(model: LanguageModel) -> Iterator[str]:
    if getattr(model.config, "apply_residual_connection_post_layernorm", False) and (
        model.config.model_type == "bloom"  # Falcon's configurations have the option, without use
    ):
        yield _ADDED


def _kinds(vocabulary: Vocabulary) -> set[str]:
    """The kinds of norm that take the residual stream."""
    architecture = vocabulary.architecture
    norms = [norm for block in architecture.blocks for name, norm in block.norms.items()]
    return {norm.kind for norm in [*norms, *([architecture.norm] if architecture.norm else [])]}


def _never_fold_ln(cfg: Sizes) -> Iterator[str]:
    if cfg.post_norm:
        yield _ADDED
    if cfg.normalization_type is None:
        yield "it has no norms"
    if cfg.num_experts:
        yield "the norm before a mixture of experts is read by its router and by every expert"
    if cfg.n_heads == 0:
        yield "its blocks are not attention and an MLP"


def _never_center_writing(cfg: Sizes) -> Iterator[str]:
    if cfg.post_norm:
        yield _ADDED
    if cfg.normalization_type != "LN":
        yield "only LayerNorm subtracts the mean, and it has none"


def _never_center_unembed(cfg: Sizes) -> Iterator[str]:
    if cfg.output_logits_soft_cap:
        yield "its logits go through a soft cap, which is not linear"


def _never_refactor(cfg: Sizes) -> Iterator[str]:
    if cfg.n_heads == 0:
        yield "it has no attention"
    if cfg.positional_embedding_type == "rotary":
        yield "its rotary positions turn queries and keys, so scores are not of W_Q W_Kᵀ"
    if cfg.n_kv_heads != cfg.n_heads:
        yield "its heads share keys and values, so they have no W_K and W_V of their own"


def _allow(step: str, reasons: Iterator[str]) -> None:
    reason = next(reasons, None)
    if reason is not None:
        raise ProcessingError.refused(step, reason)


# -------------------------------------------------------------------- state dicts


def fill_missing_keys(state: State, cfg: Sizes) -> dict[str, torch.Tensor]:
    """The state dict with zeros for the biases that its projections do not have."""
    found = _exact(state)
    for key, weight in list(found.items()):
        place, _, name = key.rpartition(".")
        bias = f"{place}.{name.replace('W_', 'b_')}"
        plain = place.split(".")[-1] in ("attn", "mlp", "unembed")
        if plain and name in _BIASED and bias not in found:
            found[bias] = weight.new_zeros(_bias_shape(key, weight))
    return found


def fold_layer_norm(
    state: State, cfg: Sizes, fold_biases: bool = True, center_weights: bool = True
) -> dict[str, torch.Tensor]:
    """Gains and biases of the norms before attention, MLP and unembedding, in what reads them.

    b += b_ln W, W ← diag(w_ln) W, w_ln ← 1, b_ln ← 0; behind a LayerNorm, W_Q, W_K, W_V, W_in and W_U
    then have mean 0 over d_model. In parallel blocks with one norm, the MLP reads ln1. Norms of what
    attention and MLP add (ln1_post, ln2_post) stay.

    Args:
        fold_biases: False for norms that have none.
        center_weights: take the mean out; done for LayerNorm only.

    Raises:
        ProcessingError: that would change the model; or norms have biases that are not folded.
    """
    _allow("fold_layer_norm", _never_fold_ln(cfg))
    found = _exact(state)
    center = center_weights and cfg.normalization_type == "LN"
    for index in range(cfg.n_layers):
        attention = [_key(cfg, index, name) for name in _ATTENTION]
        mlp = [_key(cfg, index, name) for name in _MLP]
        before, second = f"blocks.{index}.ln1", f"blocks.{index}.ln2"
        shared = cfg.parallel_attn_mlp and f"{second}.w" not in found
        _fold(found, before, [*attention, *mlp] if shared else attention, fold_biases, center)
        if not shared:
            _fold(found, second, mlp, fold_biases, center)
    _fold(found, "ln_final", ["unembed.W_U"], fold_biases, center)
    return found


def _fold(
    state: dict[str, torch.Tensor], norm: str, readers: list[str], fold_biases: bool, center: bool
) -> None:
    gain, shift = state.get(f"{norm}.w"), state.get(f"{norm}.b")
    if gain is None:
        return
    if not fold_biases and shift is not None and bool(torch.count_nonzero(shift)):
        raise ProcessingError.refused(
            "fold_layer_norm(fold_biases=False)",
            f"`{norm}.b` is not 0 and would meet other weights",
        )
    for key in readers:
        if key not in state:
            continue
        weight = state[key]  # [..., d_model, d_out]
        if shift is not None:
            bias = key.replace("W_", "b_")
            added = shift @ weight
            state[bias] = state[bias] + added if bias in state else added
        weight = gain[:, None] * weight
        if center and not key.endswith("W_gate"):
            weight = weight - weight.mean(-2, keepdim=True)
        state[key] = weight
    state[f"{norm}.w"] = torch.ones_like(gain)
    if shift is not None:
        state[f"{norm}.b"] = torch.zeros_like(shift)


def center_writing_weights(state: State, cfg: Sizes) -> dict[str, torch.Tensor]:
    """Mean 0 over d_model for what writes to the residual stream: W_E, W_pos, W_O, b_O, W_out, b_out.

    Raises:
        ProcessingError: not every norm subtracts the mean, so it would change the model.
    """
    _allow("center_writing_weights", _never_center_writing(cfg))
    found = _exact(state)
    layers = [f"blocks.{index}.{name}" for index in range(cfg.n_layers) for name in _WRITERS]
    for key in ("embed.W_E", "pos_embed.W_pos", *layers):
        if key in found:
            found[key] = found[key] - found[key].mean(-1, keepdim=True)
    return found


def center_unembed(state: State, cfg: Sizes) -> dict[str, torch.Tensor]:
    """Mean 0 over the vocabulary for W_U [d_model, d_vocab_out] and b_U [d_vocab_out].

    Raises:
        ProcessingError: a soft cap follows, so it would change the model.
    """
    _allow("center_unembed", _never_center_unembed(cfg))
    found = _exact(state)
    for key in ("unembed.W_U", "unembed.b_U"):
        if key in found:
            found[key] = found[key] - found[key].mean(-1, keepdim=True)
    return found


def fold_value_biases(state: State, cfg: Sizes) -> dict[str, torch.Tensor]:
    """b_O += Σ_head b_V W_O, b_V ← 0; a b_V that heads share counts for each of them.

    Raises:
        ProcessingError: rows of the pattern do not sum to 1, so it would change the model.
    """
    found = _exact(state)
    for index in range(cfg.n_layers):
        key = _key(cfg, index, "attn.b_V")
        W_O, b_V = found.get(f"blocks.{index}.attn.W_O"), found.get(key)
        if W_O is None or b_V is None:
            continue
        if f"blocks.{index}.attn.sinks" in found:
            raise ProcessingError.refused(
                "fold_value_biases", "with attention sinks, rows of the pattern sum to less than 1"
            )
        each = b_V.repeat_interleave(cfg.n_heads // cfg.n_kv_heads, 0)  # [head, d_head]
        added, b_O = torch.einsum("he,hed->d", each, W_O), f"blocks.{index}.attn.b_O"
        found[b_O] = found[b_O] + added if b_O in found else added
        found[key] = torch.zeros_like(b_V)
    return found


def refactor_factored_attn_matrices(state: State, cfg: Sizes) -> dict[str, torch.Tensor]:
    """Orthogonal factors of the two products that attention knows, largest singular value first.

    [W_Q; b_Q] [W_K; b_K]ᵀ = U S Vᵀ gives U √S and V √S, whose last rows are the biases.
    W_V W_O = U S Vᵀ gives W_V = U S and W_O = Vᵀ, with b_V folded into b_O before.

    Raises:
        ProcessingError: positions are rotary, or heads share keys and values.
    """
    _allow("refactor_factored_attn_matrices", _never_refactor(cfg))
    found = fold_value_biases(state, cfg)
    for index in range(cfg.n_layers):
        at = f"blocks.{index}.attn."
        if f"{at}W_Q" not in found:
            continue
        pair = [_with_bias(found, at, name) for name in "QK"]
        U, S, V = FactoredMatrix(pair[0], pair[1].mT).svd()
        for name, vectors in (("Q", U), ("K", V)):
            joined = _widened(vectors * S.sqrt()[..., None, :], cfg.d_head)
            found[f"{at}W_{name}"] = joined[..., :-1, :].contiguous()
            found[f"{at}b_{name}"] = joined[..., -1, :].contiguous()
        U, S, V = FactoredMatrix(found[f"{at}W_V"], found[f"{at}W_O"]).svd()
        found[f"{at}W_V"] = _widened(U * S[..., None, :], cfg.d_head)
        found[f"{at}W_O"] = _widened(V, cfg.d_head).mT.contiguous()
    return found


def _with_bias(state: State, at: str, name: str) -> torch.Tensor:
    """[head, d_model + 1, d_head]: the bias as a further row."""
    weight = state[f"{at}W_{name}"]
    bias = state.get(f"{at}b_{name}")
    row = torch.zeros_like(weight[:, :1]) if bias is None else bias[:, None]
    return torch.cat([weight, row], 1)


def _widened(factor: torch.Tensor, d_head: int) -> torch.Tensor:
    """Columns of zeros where heads are wider than the residual stream, [..., d_head]."""
    return functional.pad(factor, (0, d_head - factor.shape[-1]))


def _exact(state: State) -> dict[str, torch.Tensor]:
    """A new dict, half precision as float32; what a step leaves alone is the given tensor."""
    return {key: at_least_single(value) for key, value in state.items()}


def _key(cfg: Sizes, layer: int, name: str) -> str:
    """A weight of a layer as TransformerLens names it."""
    if name in _SHARED and cfg.n_kv_heads != cfg.n_heads:
        name = name.replace(".", "._")
    return f"blocks.{layer}.{name}"


_STEPS: dict[str, Callable[[State, Sizes], dict[str, torch.Tensor]]] = {
    "fold_ln": fold_layer_norm,
    "center_writing_weights": center_writing_weights,
    "center_unembed": center_unembed,
    "fold_value_biases": fold_value_biases,
    "refactor_factored_attn_matrices": refactor_factored_attn_matrices,
}
