"""Owns the deletion of neurons from a model, by the masks of its hooks."""

from __future__ import annotations

import torch

from ..models import LanguageModel
from .errors import PruningError


def delete(
    model: LanguageModel, mlp: torch.Tensor | None = None, attn: torch.Tensor | None = None
) -> None:
    """Delete neurons: from now on they are 0 in every block of the model. Deletions accumulate; they
    are the masks of `model.hooks`, and its `reset()` takes them back.

    Args:
        model: changed in place, by its hooks; its weights stay as they are.
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
    if mlp is not None and bool(mlp.any()):
        model.hooks.delete_mlp_neurons(mlp.bool().cpu())
    if attn is not None and bool(attn.any()):
        model.hooks.delete_attn_neurons(attn.bool().cpu())
