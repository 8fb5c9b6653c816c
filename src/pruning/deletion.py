"""Owns the deletion of neurons from a model, as lasting edits that set them to zero."""

from __future__ import annotations

import torch

from ..models import LanguageModel
from .errors import PruningError


def delete(
    model: LanguageModel, mlp: torch.Tensor | None = None, attn: torch.Tensor | None = None
) -> None:
    """Delete neurons: from now on they are 0 in every block of the model. Deletions accumulate, and
    `model.clear_edits()` takes them back.

    Args:
        model: changed in place, by edits; its weights stay as they are.
        mlp: bool [layer, d_mlp], True for neurons of `mlp_post` that go.
        attn: bool [layer, n_heads · d_head], True for channels of `z` that go.

    Raises:
        PruningError: a tensor has another shape.
    """
    sizes = model.cfg
    width = sizes.n_heads * sizes.d_head
    for name, given, expected in (("mlp", mlp, sizes.d_mlp), ("attn", attn, width)):
        if given is not None and tuple(given.shape) != (sizes.n_layers, expected):
            raise PruningError(
                f"`{name}` has the shape {list(given.shape)}; [{sizes.n_layers}, {expected}] is "
                "wanted, True for each neuron that goes."
            )
    if not any(given is not None and bool(given.any()) for given in (mlp, attn)):
        return
    module = model.load()
    like = next(p for p in module.parameters() if p.is_floating_point())
    with model.edit(inplace=True):
        for number, layer in enumerate(model.layers):
            if mlp is not None and bool(mlp[number].any()):
                keep = (~mlp[number].bool()).to(like.device, like.dtype)
                layer.mlp_post = layer.mlp_post * keep
            if attn is not None and bool(attn[number].any()):
                keep = (~attn[number].bool()).to(like.device, like.dtype)
                layer.z = layer.z * keep.view(sizes.n_heads, sizes.d_head)
