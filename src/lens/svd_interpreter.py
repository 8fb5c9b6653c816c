"""Owns `SVDInterpreter`: what the singular vectors of weights mean in words."""

from __future__ import annotations

from typing import Any

import torch

from ..models.factored_matrix import FactoredMatrix, at_least_single
from ..tracing.errors import InputError


class SVDInterpreter:
    """Singular vectors of weights, unembedded.

    Args:
        model: a HookedTransformer. Its weights are read when they are asked for.

    Source: Millidge and Black 2022, The Singular Value Decompositions of Transformer Weight Matrices
    are Highly Interpretable; TransformerLens, SVDInterpreter.py.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def get_singular_vectors(
        self,
        vector_type: str,
        layer_index: int,
        num_vectors: int = 10,
        head_index: int | None = None,
    ) -> torch.Tensor:
        """The logits of the singular vectors of a matrix in the residual stream, largest value first.

        Args:
            vector_type: "OV", what a head writes (right singular vectors of W_V W_O); "w_in", what the
                MLP reads (of W_inᵀ, times the gain of the norm before it); "w_out", what it writes.
            layer_index: from 0.
            num_vectors: how many, at most the rank that the matrix can have.
            head_index: for "OV".

        Returns:
            [d_vocab, 1, num_vectors]; each vector's sign is arbitrary.

        Raises:
            InputError: an unknown type, layer or head, a missing head, or too many vectors.
            UnavailableNameError: the layer has no such weight.
        """
        if vector_type not in ("OV", "w_in", "w_out"):
            raise InputError(f'vector_type is "OV", "w_in" or "w_out", not {vector_type!r}')
        if (vector_type == "OV") != (head_index is not None):
            raise InputError("head_index is for OV, and only for OV: a matrix of one head")
        vectors = self._vectors(vector_type, layer_index, head_index)
        if not 0 < num_vectors <= vectors.shape[1]:
            raise InputError(
                f"num_vectors={num_vectors}: this matrix has 1 to {vectors.shape[1]} singular vectors"
            )
        unembedding = at_least_single(self._plain(self.model.model.weights.W_U))
        return (unembedding.T @ vectors[:, :num_vectors].to(unembedding)).unsqueeze(1)

    def _vectors(self, kind: str, index: int, head: int | None) -> torch.Tensor:
        """Right singular vectors as columns, [d_model, rank]."""
        layer, cfg = self.model.model.layers[index], self.model.model.cfg
        if kind == "w_out":
            return self._right(self._plain(layer["mlp.W_out"]))
        if kind == "w_in":
            matrix = self._plain(layer["mlp.W_in"]).T
            norms = self.model._vocabulary.architecture.block(index % cfg.n_layers).norms
            norm = "ln2" if "ln2" in norms else "ln1"
            if norm in norms and f"{norm}.w" in layer:
                matrix = matrix * (self._plain(layer[f"{norm}.w"]) + norms[norm].offset)
            return self._right(matrix)
        assert head is not None
        if not 0 <= head < cfg.n_heads:
            raise InputError(f"head_index={head}: the model has {cfg.n_heads} heads")
        W_O = self._plain(layer["attn.W_O"][head])
        W_V = self._plain(layer["attn.W_V"][head // (cfg.n_heads // cfg.n_kv_heads)])
        return FactoredMatrix(at_least_single(W_V), at_least_single(W_O)).V

    @staticmethod
    def _right(matrix: torch.Tensor) -> torch.Tensor:
        Vh: torch.Tensor = torch.linalg.svd(at_least_single(matrix), full_matrices=False).Vh
        return Vh.T

    @staticmethod
    def _plain(weight: torch.Tensor) -> torch.Tensor:
        """An ordinary tensor: what is read of a model may be a copy that writes itself back."""
        with torch._C.DisableTorchFunctionSubclass():
            found: torch.Tensor = weight.detach().as_subclass(torch.Tensor)
        return found
