"""Owns `ActivationCache`: the activations of one run under TransformerLens' names, and the ways to take
the residual stream apart into what each layer, head and neuron adds.

How activations are collected is not decided here, and neither is what a name means on a model.

Shapes: `[*batch, *pos, d_model]` stands for activations whose batch dimension may have been removed and
whose position dimension is gone where `pos_slice` is a number. A stack has one more dimension in front,
the component.

The stream is x = Σ components. A norm reads it as gain · C x / scale + bias, where C subtracts the mean
(LN) or is the identity (RMS). Given the scale of the run, all but the bias is linear in x, so it splits
into the same components; a projection behind it is folded into the same linear map, `_Reading`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import ItemsView, Iterator, KeysView, Sequence, ValuesView
from typing import Any, Literal, TypeAlias

import torch

from ..envoy.spellings import lens_names, no_lens_name
from ..models.base import Model
from ..models.vocabulary import Vocabulary, epsilon
from ..tracing.errors import InputError, ShapeError, UnavailableNameError, near
from .functions import Slice, SliceInput
from .names import get_act_name

logger = logging.getLogger("graftwork")

Key: TypeAlias = "str | tuple[Any, ...]"
#: A stack [component, *batch, *pos, d_model], with the labels of its components if they are asked for.
Stack: TypeAlias = "torch.Tensor | tuple[torch.Tensor, list[str]]"
#: Ids, texts of one token each, or a tensor of ids.
Tokens: TypeAlias = "int | str | torch.Tensor | Sequence[Any]"
AnySlice: TypeAlias = "Slice | SliceInput"

_ALL = Slice()
_EVERY_LAYER = -1


@dataclasses.dataclass(frozen=True)
class _Reading:
    """A linear map of vectors of the residual stream: a norm whose scale is known, then a projection.

    Attributes:
        centers: the mean is subtracted.
        scale: what is divided by, [*batch, *pos, 1]; None for nothing.
        gain: [d_model]; None for ones.
        projection: [d_model, output]; None for none.
    """

    centers: bool = False
    scale: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    projection: torch.Tensor | None = None

    def rows(self, vectors: torch.Tensor) -> torch.Tensor:
        """All but the division: [..., d_model] → [..., output]."""
        if self.centers:
            vectors = vectors - vectors.mean(-1, keepdim=True)
        if self.gain is not None:
            vectors = vectors * self.gain.to(vectors)
        if self.projection is not None:
            vectors = vectors @ self.projection.to(vectors)
        return vectors

    def divided(self, values: torch.Tensor, heads: bool = False) -> torch.Tensor:
        """The division: of [..., *batch, *pos, n], or [*batch, *pos, head, n] with `heads`."""
        if self.scale is None:
            return values
        scale = self.scale.to(values.device)
        return values / (scale.unsqueeze(-2) if heads else scale)

    def __call__(self, stack: torch.Tensor) -> torch.Tensor:
        """[component, *batch, *pos, d_model] → [component, *batch, *pos, output]."""
        return self.divided(self.rows(stack))


class ActivationCache:
    """The activations of one run by name, and what follows from them.

    `cache["blocks.0.hook_resid_pre"]`, `cache["k1"]`, `cache["pattern", -1]` and
    `cache["normalized", 0, "ln2"]` are activations; see `get_act_name` for the short names. A layer
    counts from the end if it is negative in such a key. The `layer` of a method is where the residual
    stream is read: before that layer, from 0; the number of layers, -1 and None mean behind the last.

    Weights are read from the model when a method needs them, onto the device of the activations.

    Attributes:
        cache_dict: activations by full name, not copied.
        model: a `LanguageModel` or `HookedTransformer`; None if the cache is a dictionary only.
        has_batch_dim: whether activations have a batch dimension, always their first.
        has_embed, has_pos_embed: whether embeddings of tokens and of positions were cached.

    Source: TransformerLens, ActivationCache.py, for the names, arguments, shapes and labels.
    """

    def __init__(
        self, cache_dict: dict[str, torch.Tensor], model: Any, has_batch_dim: bool = True
    ) -> None:
        self.cache_dict = cache_dict
        self.model = model
        self.has_batch_dim = has_batch_dim
        self.has_embed = "hook_embed" in cache_dict
        self.has_pos_embed = "hook_pos_embed" in cache_dict

    # ---------------------------------------------------------------- as a dictionary

    def __getitem__(self, key: Key) -> torch.Tensor:
        """The activation of a full or short name.

        Raises:
            UnavailableNameError: there is no such name, the model does not have it, or it was not
                cached.
            InputError: a key of another kind.
        """
        name = self._full_name(key)
        if name not in self.cache_dict:
            raise self._absent(name)
        return self.cache_dict[name]

    def __contains__(self, key: object) -> bool:
        try:
            return self._full_name(key) in self.cache_dict
        except InputError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __repr__(self) -> str:
        return f"ActivationCache with keys {list(self.cache_dict)}"

    def keys(self) -> KeysView[str]:
        """The full names."""
        return self.cache_dict.keys()

    def values(self) -> ValuesView[torch.Tensor]:
        """The activations."""
        return self.cache_dict.values()

    def items(self) -> ItemsView[str, torch.Tensor]:
        """Pairs of full name and activation."""
        return self.cache_dict.items()

    def _full_name(self, key: object) -> str:
        if isinstance(key, str):
            return key if key in self.cache_dict else get_act_name(key)
        if not (isinstance(key, tuple) and 1 <= len(key) <= 3 and isinstance(key[0], str)):
            raise InputError(
                f"`{key!r}` is no key: write a name, or (name, layer) or (name, layer, part): "
                '`cache["normalized", 0, "ln2"]`.'
            )
        name, layer, part = (*key, None, None)[:3]
        if isinstance(layer, int) and layer < 0:
            layer += self._n_layers
        return get_act_name(name, layer, part)

    def _absent(self, name: str) -> UnavailableNameError:
        """The error for a name that is not in the cache."""
        if self.model is None:
            return UnavailableNameError(
                f"`{name}` is not in the cache. {near(name, self.cache_dict)}"
            )
        names = self._names
        exist = lens_names(names)
        if name.removesuffix("_grad") in exist:
            return UnavailableNameError(
                f"`{name}` is a name of {names.kind}, but it was not cached, as {len(self)} others "
                "were: cache it, too."
            )
        return no_lens_name(names, name, sorted({*self.cache_dict, *exist}))

    # ---------------------------------------------------------------- all activations at once

    def to(self, device: str | torch.device, move_model: bool = False) -> ActivationCache:
        """Move the activations to a device, in this cache.

        Args:
            device: where to.
            move_model: the model, too. Methods work without: they bring weights to the activations.

        Returns:
            This cache.
        """
        self.cache_dict = {name: value.to(device) for name, value in self.cache_dict.items()}
        if move_model:
            mover = self.model.load() if isinstance(self.model, Model) else self.model
            mover.to(device)
        return self

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Turn torch's gradients on or off for the whole program, not for this cache alone.

        `with torch.no_grad():` does the same for a part of the program.
        """
        logger.warning("gradients are now %s in the whole program", "on" if mode else "off")
        torch.set_grad_enabled(mode)

    def remove_batch_dim(self) -> ActivationCache:
        """Remove the batch dimension of all activations, in this cache; again, nothing happens.

        Returns:
            This cache.

        Raises:
            InputError: there are several prompts.
        """
        if not self.has_batch_dim:
            return self
        size = self._batch_size()
        if size != 1:
            raise InputError(
                f"The cache has {size} prompts, so its batch dimension cannot be removed: choose one "
                "by `cache.apply_slice_to_batch_dim(0)`."
            )
        for name, value in self.cache_dict.items():
            if value.ndim and len(value) == 1:
                self.cache_dict[name] = value[0]
        self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: AnySlice) -> ActivationCache:
        """A new cache of some of the prompts; a number removes the batch dimension.

        Activations that are the same for all prompts, with a batch of 1, are so again.

        Raises:
            InputError: there is no batch dimension.
        """
        taken = _slice(batch_slice)
        if not self.has_batch_dim:
            if taken.mode == "identity":
                return ActivationCache(dict(self.cache_dict), self.model, False)
            raise InputError("The cache has no batch dimension, so no prompts can be chosen.")
        size = self._batch_size()
        found = {}
        for name, value in self.cache_dict.items():
            if value.ndim and len(value) == 1:
                value = value.expand(size, *value.shape[1:])
            found[name] = taken.apply(value) if value.ndim and len(value) == size else value
        return ActivationCache(found, self.model, taken.mode != "int")

    def _batch_size(self) -> int:
        """The first dimension that most activations have: a few may be the same for all prompts."""
        counts = Counter(len(value) for value in self.cache_dict.values() if value.ndim)
        return counts.most_common(1)[0][0] if counts else 1

    # ---------------------------------------------------------------- the stream and its parts

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: AnySlice = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Stack:
        """The residual stream before each layer up to one: what the logit lens looks at.

        Args:
            layer: up to where; see the class.
            incl_mid: with the streams between attention and MLP.
            apply_ln: behind the norm. Behind the last layer that is the final norm with its gain and
                bias, computed for each stream by itself, so that `@ W_U + b_U` are logits; before
                another layer it is that layer's norm as `apply_ln_to_stack` has it.
            pos_slice: positions.
            mlp_input: as the MLP of that layer reads it, so with `layer`'s stream in the middle. In a
                parallel block that is the stream before the layer.
            return_labels: with labels "0_pre", "0_mid", …, "final_post".

        Returns:
            [stream, *batch, *pos, d_model].

        Raises:
            UnavailableNameError: a stream was not cached; or `incl_mid` in parallel blocks, where
                there is nothing between attention and MLP.
        """
        last = self._up_to(layer, mlp_input)
        keys: list[tuple[Key, str]] = []
        for index in range(last):
            keys.append((("resid_pre", index), f"{index}_pre"))
            if incl_mid:
                keys.append((("resid_mid", index), f"{index}_mid"))
        if last == self._n_layers:
            keys.append((("resid_post", last - 1), "final_post"))
        else:
            keys.append((("resid_pre", last), f"{last}_pre"))
            if mlp_input and not self._is_parallel(last):
                keys.append((("resid_mid", last), f"{last}_mid"))
        positions = _slice(pos_slice)
        stack = _stacked([positions.apply(self[key], -2) for key, _ in keys])
        if apply_ln:
            stack = self.apply_ln_to_stack(
                stack, last, mlp_input, positions, recompute_ln=last == self._n_layers
            )
        return _given(stack, [label for _, label in keys], return_labels)

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: AnySlice = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Stack:
        """The residual stream as a sum: embeddings, and what each attention and each MLP adds.

        Args:
            layer: the stream before which layer; see the class.
            mlp_input: as the MLP of that layer reads it, so with that layer's attention. In a parallel
                block that is the stream before the layer.
            mode: "attn" or "mlp" for those alone.
            apply_ln: behind the norm, by the scale of the run: see `apply_ln_to_stack`.
            pos_slice: positions.
            incl_embeds: with embeddings of tokens and positions.
            return_labels: with labels "embed", "pos_embed", "0_attn_out", "0_mlp_out", ….

        Returns:
            [component, *batch, *pos, d_model]; "all" with embeddings sums to the stream.

        Raises:
            UnavailableNameError: a component was not cached, or the layers are of another kind.
            InputError: an unknown mode, nothing to stack, or sums that are normalized (BERT).
        """
        stack, labels = self._decompose(layer, mlp_input, mode, pos_slice, incl_embeds)
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos_slice)
        return _given(stack, labels, return_labels)

    def _decompose(
        self, layer: int | None, mlp_input: bool, mode: str, pos_slice: AnySlice, incl_embeds: bool
    ) -> tuple[torch.Tensor, list[str]]:
        if mode not in ("all", "mlp", "attn"):
            raise InputError(f'The mode is "all", "mlp" or "attn", found {mode!r}.')
        last = self._sum_up_to(layer, mlp_input)
        keys: list[tuple[Key, str]] = self._embeddings() if incl_embeds else []
        for index in range(last):
            if mode != "mlp":
                keys.append((("attn_out", index), f"{index}_attn_out"))
            if mode != "attn" and self._has_mlp:
                keys.append((("mlp_out", index), f"{index}_mlp_out"))
        if mlp_input and mode != "mlp" and not self._is_parallel(last):
            keys.append((("attn_out", last), f"{last}_attn_out"))
        if not keys:
            raise InputError(f"Before layer {last} nothing was added but embeddings.")
        positions = _slice(pos_slice)
        stack = _stacked([positions.apply(self[key], -2) for key, _ in keys])
        return stack, [label for _, label in keys]

    def _embeddings(self) -> list[tuple[Key, str]]:
        """Keys and labels of those that the model has; that they were cached is found out later."""
        names = lens_names(self._names)
        return [
            (name, name.removeprefix("hook_"))
            for name in ("hook_embed", "hook_pos_embed")
            if name in names or name in self.cache_dict
        ]

    # ---------------------------------------------------------------- heads

    def compute_head_results(self) -> None:
        """Put what each head gives into the cache, `blocks.0.attn.hook_result` and so on.

        [*batch, pos, head, d_model] each: z W_O, whose sum over heads and b_O are what attention's
        output projection gives. The other methods compute these where they are not cached.

        Raises:
            UnavailableNameError: z was not cached.
        """
        for index in range(self._n_layers):
            self.cache_dict[f"blocks.{index}.attn.hook_result"] = self._head_results(index, _ALL)

    def _head_results(self, layer: int, positions: Slice) -> torch.Tensor:
        """z W_O, [*batch, *pos, head, d_model]."""
        name = f"blocks.{layer}.attn.hook_result"
        if name in self.cache_dict:
            return positions.apply(self.cache_dict[name], -3)
        z = positions.apply(self["z", layer], -3)
        weight = self._weight(layer, "attn.W_O", z)
        return torch.einsum("...he,hed->...hd", z, weight)

    def stack_head_results(
        self,
        layer: int | None = _EVERY_LAYER,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: AnySlice = None,
        apply_ln: bool = False,
    ) -> Stack:
        """What each head of the layers before one adds to the residual stream.

        Where a norm stands between attention and the stream (Gemma 2, OLMo 2), this is behind that
        norm, by its scale in the run; its bias belongs to no head.

        Args:
            layer: see the class.
            return_labels: with labels "L0H0", "L0H1", …, "remainder".
            incl_remainder: with one component more, all else that is in the stream.
            pos_slice: positions.
            apply_ln: behind the norm of that layer: see `apply_ln_to_stack`.

        Returns:
            [layer * head, *batch, *pos, d_model].

        Raises:
            UnavailableNameError: z, the scale of such a norm, or the stream was not cached.
        """
        last = self._sum_up_to(layer)
        stack, labels = self._heads(last, _slice(pos_slice))
        if incl_remainder:
            rest = _slice(pos_slice).apply(self._stream(last), -2) - stack.sum(0)
            stack, labels = torch.cat([stack, rest[None]]), [*labels, "remainder"]
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, last, pos_slice=pos_slice)
        return _given(stack, labels, return_labels)

    def _heads(self, count: int, positions: Slice) -> tuple[torch.Tensor, list[str]]:
        """Contributions of the heads of the first layers."""
        parts, labels = [], []
        for index in range(count):
            results = self._head_results(index, positions)
            behind = self._norm_behind(index, "ln1_post", positions)
            parts.append(behind.divided(behind.rows(results), heads=True).movedim(-2, 0))
            labels += [f"L{index}H{head}" for head in range(results.shape[-2])]
        return _joined(parts) if parts else self._no_components(positions), labels

    # ---------------------------------------------------------------- neurons

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: AnySlice = None,
        pos_slice: AnySlice = None,
        project_output_onto: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What each neuron of a layer adds to the residual stream; not kept, because it is large.

        Where a norm stands between the MLP and the stream, this is behind that norm, as for heads.

        Args:
            layer: which, also counted from the end.
            neuron_slice: neurons; a number removes their dimension.
            pos_slice: positions.
            project_output_onto: [d_model] or [d_model, output]: only the parts along these vectors
                are computed, without the memory for the others.

        Returns:
            [*batch, *pos, neuron, d_model]; with a projection [..., neuron] or [..., neuron, output].

        Raises:
            UnavailableNameError: `mlp.hook_post` was not cached or is not that of one MLP (experts).
            ShapeError: a projection of another shape.
        """
        index = layer + self._n_layers if layer < 0 else layer
        neurons = _slice(neuron_slice)
        reading = _Reading(projection=self._columns(project_output_onto))
        found = self._neurons(index, neurons, _slice(pos_slice), reading)
        found = found.squeeze(-2) if neurons.mode == "int" else found
        return _as_projected(found, project_output_onto)

    def _neurons(
        self, layer: int, neurons: Slice, positions: Slice, reading: _Reading
    ) -> torch.Tensor:
        """Contributions of neurons as they are read, [*batch, *pos, neuron, output]."""
        kept = _kept(neurons)
        acts = kept.apply(positions.apply(self["post", layer], -2), -1)
        weight = kept.apply(self._weight(layer, "mlp.W_out", acts), 0)
        behind = self._norm_behind(layer, "ln2_post", positions)
        acts = reading.divided(behind.divided(acts))
        return acts.unsqueeze(-1) * reading.rows(behind.rows(weight))

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: AnySlice = None,
        neuron_slice: AnySlice = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: torch.Tensor | None = None,
    ) -> Stack:
        """What each neuron of the layers before one adds to the residual stream.

        All neurons of a large model are more than fits into memory: take some, some positions, or a
        projection.

        Args:
            layer: see the class.
            pos_slice: positions.
            neuron_slice: neurons of each layer.
            return_labels: with labels "L0N0", "L0N1", …, "remainder".
            incl_remainder: with one component more, all else that is in the stream.
            apply_ln: behind the norm of that layer: see `apply_ln_to_stack`.
            project_output_onto: as for `get_neuron_results`; behind the norm, if there is one.

        Returns:
            [layer * neuron, *batch, *pos, d_model]; with a projection [..., output], or without that
            dimension.

        Raises:
            UnavailableNameError: `mlp.hook_post` was not cached or is not that of one MLP (experts).
            ShapeError: a projection of another shape.
        """
        last, positions = self._sum_up_to(layer), _slice(pos_slice)
        reading = self._reading(last, False, positions, apply_ln, project_output_onto)
        stack, labels = self._all_neurons(last, _slice(neuron_slice), positions, reading)
        if incl_remainder:
            whole = reading(positions.apply(self._stream(last), -2)[None])
            stack, labels = torch.cat([stack, whole - stack.sum(0)]), [*labels, "remainder"]
        return _given(_as_projected(stack, project_output_onto), labels, return_labels)

    def _all_neurons(
        self, count: int, neurons: Slice, positions: Slice, reading: _Reading
    ) -> tuple[torch.Tensor, list[str]]:
        """Contributions of neurons of the first layers, as they are read."""
        parts = [self._neurons(i, neurons, positions, reading).movedim(-2, 0) for i in range(count)]
        taken = _kept(neurons).indices(self._source.cfg.d_mlp) if count else ()
        labels = [f"L{i}N{neuron}" for i in range(count) for neuron in taken]
        return _joined(parts) if parts else reading(self._no_components(positions)), labels

    # ---------------------------------------------------------------- everything

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: AnySlice = None,
        return_labels: bool = False,
        project_output_onto: torch.Tensor | None = None,
    ) -> Stack:
        """The residual stream as a sum of heads, neurons, embeddings and biases, in this order.

        Args:
            layer: the stream before which layer; see the class.
            mlp_input: as the MLP of that layer reads it, so with that layer's heads. In a parallel
                block that is the stream before the layer.
            expand_neurons: each neuron, instead of each MLP with its bias.
            apply_ln: behind the norm, by the scale of the run: see `apply_ln_to_stack`.
            pos_slice: positions.
            return_labels: with labels "L0H0", …, "L0N0", … (or "0_mlp_out", …), "embed", "pos_embed",
                "bias".
            project_output_onto: [d_model] or [d_model, output]: the parts along these vectors, behind
                the norm if there is one.

        Returns:
            [component, *batch, *pos, d_model], which sums to the stream; with a projection
            [..., output], or without that dimension.

        Raises:
            UnavailableNameError: a component was not cached, or the layers are of another kind.
            InputError: sums are normalized (BERT).
            ShapeError: a projection of another shape.
        """
        last, positions = self._sum_up_to(layer, mlp_input), _slice(pos_slice)
        attentions = last + (mlp_input and not self._is_parallel(last))
        reading = self._reading(last, mlp_input, positions, apply_ln, project_output_onto)
        heads, labels = self._heads(attentions, positions)
        parts, like = [reading(heads)], heads.new_zeros(heads.shape[1:])
        expand_neurons = expand_neurons and self._has_mlp
        if last and expand_neurons:
            neurons, more = self._all_neurons(last, _ALL, positions, reading)
            parts, labels = [*parts, neurons], [*labels, *more]
        elif last and self._has_mlp:
            outputs, more = self._decompose(last, False, "mlp", positions, False)
            parts, labels = [*parts, reading(outputs)], [*labels, *more]
        for key, label in self._embeddings():
            embedding = positions.apply(self[key], -2).to(like.device)
            parts.append(reading(embedding.expand_as(like)[None]))
            labels.append(label)
        bias = self._biases(attentions, last if expand_neurons else 0, positions, like)
        stack = _joined([*parts, reading(bias[None])])
        return _given(_as_projected(stack, project_output_onto), [*labels, "bias"], return_labels)

    def _biases(
        self, attentions: int, mlps: int, positions: Slice, like: torch.Tensor
    ) -> torch.Tensor:
        """What biases of the first attentions and MLPs add to the stream, of the shape of `like`."""
        total = like
        for bias, norm, count in (
            ("attn.b_O", "ln1_post", attentions),
            ("mlp.b_out", "ln2_post", mlps),
        ):
            for index in range(count):
                weights = self._source.layers[index]
                if bias in weights:
                    behind = self._norm_behind(index, norm, positions)
                    total = total + behind(self._weight(index, bias, like).expand_as(like))
                if norm in self._names.architecture.block(index).norms and f"{norm}.b" in weights:
                    total = total + self._weight(index, f"{norm}.b", like)
        return total

    def stack_activation(
        self,
        activation_name: str,
        layer: int | None = _EVERY_LAYER,
        sublayer_type: str | None = None,
    ) -> torch.Tensor:
        """The activations of one name in all layers before one.

        Args:
            activation_name: short, as for `get_act_name`.
            layer: see the class.
            sublayer_type: the part of the block, where a name is in several: "ln1".

        Returns:
            [layer, …].

        Raises:
            UnavailableNameError: one was not cached.
            InputError: no layer.
        """
        count = self._up_to(layer)
        if not count:
            raise InputError("There is no layer before layer 0, so nothing to stack.")
        return _stacked([self[activation_name, index, sublayer_type] for index in range(count)])

    # ---------------------------------------------------------------- norms and logits

    def apply_ln_to_stack(
        self,
        residual_stack: torch.Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: AnySlice = None,
        batch_slice: AnySlice = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> torch.Tensor:
        """Components as a norm passes them on, before its gain and bias: centered (LN) and divided by
        the scale that the whole stream had in the run.

        Where the model has no norm there, the stack is returned as it is.

        Args:
            residual_stack: [component, *batch, *pos, d_model], of the positions of `pos_slice`.
            layer: the norm before that layer, or the final one; see the class.
            mlp_input: the norm before that layer's MLP.
            pos_slice: the positions of the stack.
            batch_slice: the prompts that are taken of the stack and of the scale.
            has_batch_dim: whether the stack has a batch dimension.
            recompute_ln: the final norm with its gain and bias, computed for each component as if it
                were the whole stream; before another layer, without effect.

        Returns:
            [component, *batch, *pos, d_model].

        Raises:
            UnavailableNameError: the scale was not cached.
            InputError: `batch_slice` where there is no batch dimension; sums that are normalized.
        """
        last, prompts = self._up_to(layer, mlp_input), _slice(batch_slice)
        if prompts.mode != "identity" and not self.has_batch_dim:
            raise InputError("The cache has no batch dimension, so `batch_slice` has no meaning.")
        if has_batch_dim and prompts.mode != "identity":
            residual_stack = prompts.apply(residual_stack, 1)
        if recompute_ln and last == self._n_layers:
            return self._final_norm(residual_stack)
        return self._norm_before(last, mlp_input, _slice(pos_slice), prompts)(residual_stack)

    def logit_attrs(
        self,
        residual_stack: torch.Tensor,
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        pos_slice: AnySlice = None,
        batch_slice: AnySlice = None,
        has_batch_dim: bool = True,
    ) -> torch.Tensor:
        """What each component adds to the logit of a token, or to the difference of two logits.

        Exact for any model: the attributions of all components of the stream and `logit_bias` sum to
        the logit, as the unembedding gives it (`unembed.hook_out`; some models cap or scale that). The
        final norm's gain is applied here; its bias and that of the unembedding belong to no component.

        Args:
            residual_stack: [component, *batch, *pos, d_model], not normalized, of the positions of
                `pos_slice`.
            tokens: one token, or one for each prompt [batch], or each position [batch, pos]. If the
                stack has no batch dimension, or several positions and these do not fit prompts: [pos].
            incorrect_tokens: their logits are subtracted; of the shape of `tokens`.
            pos_slice, batch_slice, has_batch_dim: as for `apply_ln_to_stack`.

        Returns:
            [component, *batch, *pos].

        Raises:
            InputError: texts of several tokens, or shapes of tokens that differ.
            ShapeError: tokens that do not fit the stack.
            UnavailableNameError: the final norm's scale was not cached.

        Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits, "direct path".
        """
        stack = self.apply_ln_to_stack(
            residual_stack, None, False, pos_slice, batch_slice, has_batch_dim
        )
        directions = self._directions(tokens, incorrect_tokens).to(stack)
        gain = self._final_gain(stack)
        directions = directions if gain is None else directions * gain
        fitting = _fitted(directions, stack.shape[1:-1])
        return torch.einsum("c...d,...d->c...", stack, fitting)

    def logit_bias(self, tokens: Tokens, incorrect_tokens: Tokens | None = None) -> torch.Tensor:
        """The part of a logit, or of the difference of two, that is the same for all prompts.

        It comes from the biases of the final norm and of the unembedding: b · W_U[:, token] +
        b_U[token]. With `logit_attrs` of all components it sums to the logit.

        Returns:
            Of the shape of `tokens`, on the device of the activations.

        Raises:
            InputError: texts of several tokens, or shapes of tokens that differ.
        """
        directions = self._directions(tokens, incorrect_tokens)
        found = directions.new_zeros(directions.shape[:-1])
        if "ln_final.b" in self._source:
            found = directions @ _plain(self._source["ln_final.b"], directions)
        b_U = _plain(self._source.weights.b_U, directions)
        found = found + b_U[self._ids(tokens).to(b_U.device)]
        if incorrect_tokens is not None:
            found = found - b_U[self._ids(incorrect_tokens).to(b_U.device)]
        # The cache may have been moved away from the model.
        where = next((value.device for value in self.cache_dict.values()), found.device)
        return found.to(where)

    def _directions(self, tokens: Tokens, incorrect: Tokens | None) -> torch.Tensor:
        """Columns of the unembedding, [*tokens, d_model], or their differences."""
        W_U = self._source.weights.W_U
        W_U = _plain(W_U, W_U)
        ids = self._ids(tokens).to(W_U.device)
        found = W_U.T[ids]
        if incorrect is None:
            return found
        others = self._ids(incorrect).to(W_U.device)
        if others.shape != ids.shape:
            raise InputError(
                f"`tokens` has shape {list(ids.shape)} and `incorrect_tokens` {list(others.shape)}: "
                "they must be the same."
            )
        return found - W_U.T[others]

    def _ids(self, tokens: Any) -> torch.Tensor:
        """Tokens as ids."""
        if isinstance(tokens, str):
            return torch.tensor(self._single_token(tokens))
        if isinstance(tokens, list | tuple):
            return torch.stack([self._ids(token) for token in tokens])
        ids = torch.as_tensor(tokens)
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise InputError(f"Tokens are whole numbers or texts, found {ids.dtype}.")
        return ids

    def _single_token(self, text: str) -> int:
        if not isinstance(self.model, Model):
            return int(self.model.to_single_token(text))
        tokenizer = getattr(self.model, "tokenizer", None)
        if tokenizer is None:
            raise InputError(f"The model has no tokenizer: give the id of {text!r} instead.")
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise InputError(f"{text!r} is {len(ids)} tokens, not one: {ids}.")
        return int(ids[0])

    # ---------------------------------------------------------------- the model

    @property
    def _source(self) -> Model:
        """What has the weights and unified names: the model itself, or the one it is a surface of."""
        found: Model = self.model if isinstance(self.model, Model) else self.model.model
        return found

    @property
    def _names(self) -> Vocabulary:
        return self._source._model_names()

    @property
    def _n_layers(self) -> int:
        return int(self._source.cfg.n_layers)

    @property
    def _has_mlp(self) -> bool:
        return self._source.cfg.d_mlp is not None

    def _is_parallel(self, layer: int) -> bool:
        return bool(self._names.architecture.block(layer).parallel)

    def _up_to(self, layer: int | None, mlp_input: bool = False) -> int:
        """Where the stream is read: 0 to the number of layers.

        Raises:
            InputError: there is no such layer, or `mlp_input` behind the last.
        """
        count = self._n_layers
        found = count if layer is None or layer == _EVERY_LAYER else layer
        if not 0 <= found <= count:
            raise InputError(
                f"layer {layer}: the stream is read before layers 0 to {count - 1}, or behind the "
                f"last: {count}, -1 or None."
            )
        if mlp_input and found == count:
            raise InputError("`mlp_input` needs a layer: behind the last one there is no MLP.")
        return found

    def _sum_up_to(self, layer: int | None, mlp_input: bool = False) -> int:
        """The same, where the stream must be a sum."""
        if self._source.cfg.post_norm:
            raise InputError(
                f"The residual stream of {self._names.kind} is normalized behind each attention and "
                "MLP, so it is no sum of what they add."
            )
        return self._up_to(layer, mlp_input)

    def _weight(self, layer: int, name: str, like: torch.Tensor) -> torch.Tensor:
        return _plain(self._source.layers[layer][name], like)

    def _stream(self, layer: int) -> torch.Tensor:
        """The residual stream before a layer, [*batch, pos, d_model]."""
        if layer and (layer == self._n_layers or ("resid_post", layer - 1) in self):
            return self["resid_post", layer - 1]
        return self["resid_pre", layer]

    def _no_components(self, positions: Slice) -> torch.Tensor:
        """[0, *batch, *pos, d_model]."""
        like = self["hook_embed"] if self.has_embed else self._stream(0)
        like = positions.apply(like, -2)
        return like.new_zeros(0, *like.shape)

    # ---------------------------------------------------------------- norms as linear maps

    def _norm_before(
        self, layer: int, mlp_input: bool, positions: Slice, prompts: Slice = _ALL
    ) -> _Reading:
        """The norm before a layer, or its MLP, or the unembedding, without its gain."""
        if layer == self._n_layers:
            norm, name = self._names.architecture.norm, "ln_final"
        else:
            self._sum_up_to(layer)
            norms = self._names.architecture.block(layer).norms
            shared = self._is_parallel(layer) and "ln2" not in norms
            name = "ln2" if mlp_input and not shared else "ln1"
            norm = norms.get(name)
            name = f"blocks.{layer}.{name}"
        if norm is None:
            return _Reading()
        scale = positions.apply(self[f"{name}.hook_scale"], -2)
        return _Reading(norm.kind == "LN", scale if prompts is _ALL else prompts.apply(scale))

    def _norm_behind(self, layer: int, name: str, positions: Slice) -> _Reading:
        """The norm between attention or MLP and the stream, with its gain; mostly there is none."""
        norm = self._names.architecture.block(layer).norms.get(name)
        if norm is None:
            return _Reading()
        scale = positions.apply(self[f"blocks.{layer}.{name}.hook_scale"], -2)
        gain = None
        if f"{name}.w" in self._source.layers[layer]:
            gain = self._weight(layer, f"{name}.w", scale) + norm.offset
        return _Reading(norm.kind == "LN", scale, gain)

    def _reading(
        self,
        layer: int,
        mlp_input: bool,
        positions: Slice,
        apply_ln: bool,
        projection: torch.Tensor | None,
    ) -> _Reading:
        """The norm before a layer, if it is wanted, then a projection."""
        norm = self._norm_before(layer, mlp_input, positions) if apply_ln else _Reading()
        return dataclasses.replace(norm, projection=self._columns(projection))

    def _columns(self, projection: torch.Tensor | None) -> torch.Tensor | None:
        """[d_model] or [d_model, output] → [d_model, output]."""
        if projection is None:
            return None
        if projection.ndim not in (1, 2) or len(projection) != self._source.cfg.d_model:
            raise ShapeError(
                f"`project_output_onto` has shape {list(projection.shape)}; it is [d_model] or "
                f"[d_model, output], with d_model={self._source.cfg.d_model}."
            )
        return projection.unsqueeze(-1) if projection.ndim == 1 else projection

    def _final_gain(self, like: torch.Tensor) -> torch.Tensor | None:
        """The gain of the final norm, [d_model]; None for ones."""
        norm = self._names.architecture.norm
        if norm is None or "ln_final.w" not in self._source:
            return None
        # Gemma's parameter is the gain minus 1.
        return _plain(self._source["ln_final.w"], like) + float(norm.offset)

    def _final_norm(self, stack: torch.Tensor) -> torch.Tensor:
        """The final norm of each vector by itself: the same formula as the model's module."""
        norm = self._names.architecture.norm
        if norm is None:
            return stack
        wide = stack.float() if stack.dtype in (torch.float16, torch.bfloat16) else stack
        wide = wide - wide.mean(-1, keepdim=True) if norm.kind == "LN" else wide
        eps = epsilon(self._source.module_tree().get_submodule(norm.path))
        wide = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
        gain = self._final_gain(wide)
        wide = wide if gain is None else wide * gain
        if "ln_final.b" in self._source:
            wide = wide + _plain(self._source["ln_final.b"], wide)
        return wide.to(stack.dtype)


def _plain(weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A weight as an ordinary tensor, of the device and dtype of `like`.

    What is read of a model may be a copy that writes itself back and takes no part in gradients.
    """
    with torch._C.DisableTorchFunctionSubclass():
        return weight.detach().as_subclass(torch.Tensor).to(like.device, like.dtype)


def _slice(given: AnySlice) -> Slice:
    return given if isinstance(given, Slice) else Slice(given)


def _kept(one: Slice) -> Slice:
    """The same entries, where a number keeps its dimension."""
    return Slice([one.slice]) if one.mode == "int" else one


def _stacked(parts: list[torch.Tensor]) -> torch.Tensor:
    """Activations in one tensor on the first one's device; some have a batch of 1 for all prompts."""
    shape = torch.Size(map(max, *[part.shape for part in parts])) if parts[1:] else parts[0].shape
    return torch.stack([part.to(parts[0].device).expand(shape) for part in parts])


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Stacks in one."""
    return torch.cat([part.to(parts[0].device) for part in parts])


def _given(stack: torch.Tensor, labels: list[str], return_labels: bool) -> Stack:
    return (stack, labels) if return_labels else stack


def _as_projected(stack: torch.Tensor, projection: torch.Tensor | None) -> torch.Tensor:
    """Without the last dimension if the projection was one vector."""
    return stack.squeeze(-1) if projection is not None and projection.ndim == 1 else stack


def _fitted(directions: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Directions [*tokens, d_model] with dimensions for [*batch, *pos], in that order.

    Raises:
        ShapeError: they do not fit.
    """
    given = directions.shape[:-1]
    missing = len(shape) - len(given)
    for ones in ((*given, *[1] * missing), (*[1] * missing, *given)) if missing >= 0 else ():
        if all(a in (1, b) for a, b in zip(ones, shape, strict=True)):
            return directions.reshape(*ones, directions.shape[-1])
    raise ShapeError(
        f"Tokens of shape {list(given)} do not fit a stack whose batch and positions are {list(shape)}."
    )
