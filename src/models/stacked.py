"""Owns `model.weights`: the weights of all layers stacked, and what is computed of them."""

from __future__ import annotations

from typing import Any

import torch

from ..tracing.errors import InputError, UnavailableNameError
from .factored_matrix import FactoredMatrix, composition_scores

_BY_HEAD = {
    "W_Q": "attn.W_Q",
    "W_O": "attn.W_O",
    "b_Q": "attn.b_Q",
    "_W_K": "attn.W_K",
    "_W_V": "attn.W_V",
    "_b_K": "attn.b_K",
    "_b_V": "attn.b_V",
}
_SHARED = ("W_K", "W_V", "b_K", "b_V")
_PLAIN = {
    "b_O": "attn.b_O",
    "W_in": "mlp.W_in",
    "W_gate": "mlp.W_gate",
    "W_out": "mlp.W_out",
    "b_in": "mlp.b_in",
    "b_gate": "mlp.b_gate",
    "b_out": "mlp.b_out",
}
_OWN = {"W_E": "embed.W_E", "W_pos": "pos_embed.W_pos", "b_U": "unembed.b_U"}


class StackedWeights:
    """Copies of the weights of all layers: `W_Q` [layer, head, d_model, d_head] and so on.

    `W_K`, `W_V`, `b_K`, `b_V` are repeated for the query heads that share them; `_W_K` and the others
    with an underscore are not. Biases that a model does not have are zeros; `W_gate` is None without a
    gate. `W_E` [d_vocab, d_model], `W_pos` [n_ctx, d_model], `W_U` [d_model, d_vocab_out] and `b_U` are
    not stacked, and are the model's own memory.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._names = model._model_names()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        cfg = self._model.cfg
        if name in _SHARED:
            return self._each(f"_{name}").repeat_interleave(cfg.n_heads // cfg.n_kv_heads, 1)
        if name in _BY_HEAD or name in _PLAIN:
            return self._each(name)
        if name == "W_U":
            return self._own("unembed.W_U")
        if name in _OWN:
            return self._own(_OWN[name])
        known = [*_BY_HEAD, *_SHARED, *_PLAIN, *_OWN, "W_U", "QK", "OV"]
        raise UnavailableNameError.weight(name, self._names.kind, known)

    def _own(self, name: str) -> torch.Tensor:
        weights = self._names.model_weights()
        if name == "unembed.b_U" and name not in weights:
            return torch.zeros(self._model.cfg.d_vocab_out, device=self._model.device)
        found: torch.Tensor = weights[name]
        return found

    def _each(self, name: str) -> Any:
        key = {**_BY_HEAD, **_PLAIN}[name]
        cfg, found = self._model.cfg, []
        for index in range(len(self._names)):
            weights = self._names.layer_weights(index)
            if key in weights:
                found.append(weights[key])
            elif name in ("W_gate", "b_gate"):
                return None
            elif "b_" in name:
                found.append(self._zeros(name, cfg))
            else:
                found.append(weights[key])  # says what is missing
        if len({tuple(one.shape) for one in found}) > 1:
            raise UnavailableNameError(
                f"`{name}` has other shapes in other layers of {self._names.kind}, so it cannot be "
                f'stacked: take `model.layers[i]["{key}"]`.'
            )
        device = found[0].device
        return torch.stack([torch.as_tensor(one.to(device)) for one in found])

    def _zeros(self, name: str, cfg: Any) -> torch.Tensor:
        shape = {
            "b_Q": (cfg.n_heads, cfg.d_head),
            "_b_K": (cfg.n_kv_heads, cfg.d_head),
            "_b_V": (cfg.n_kv_heads, cfg.d_head),
            "b_in": (cfg.d_mlp,),
        }.get(name, (cfg.d_model,))
        return torch.zeros(shape, dtype=cfg.dtype, device=self._model.device)

    @property
    def W_E_pos(self) -> torch.Tensor:
        """Embeddings and positions, [d_vocab + n_ctx, d_model]."""
        return torch.cat([self.W_E, self.W_pos])

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_Kᵀ of each head, [layer, head, d_model, d_model]."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O of each head, [layer, head, d_model, d_model]."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def n_params_total(self) -> int:
        """Parameters of the model, each counted once."""
        return sum(p.numel() for p in self._model.module_tree().parameters())

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> torch.Tensor:
        """The sum of all biases that reach the residual stream before a layer, [d_model].

        Args:
            layer: from 0; the number of layers means behind the last.
            mlp_input: before the MLP of that layer instead.
            include_mlp_biases: False leaves those of MLPs out.
        """
        count = self._model.cfg.n_layers
        if not 0 <= layer <= count or (mlp_input and layer == count):
            raise InputError(f"layer {layer}: the model has layers 0 to {count - 1}")
        b_O, b_out = self.b_O, self.b_out if include_mlp_biases else None
        total: torch.Tensor = b_O[: layer + mlp_input].sum(0)
        return total if b_out is None else total + b_out[:layer].sum(0)

    def all_composition_scores(self, mode: str) -> torch.Tensor:
        """How much each head reads of what each earlier head writes, [layer, head, layer, head].

        ‖M_L M_R‖ / (‖M_L‖ ‖M_R‖) in Frobenius norms: M_L is OV of the earlier head, M_R is QK, QKᵀ or
        OV of the later one. Zero unless the first layer is before the second.
        Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.

        Args:
            mode: "Q", "K" or "V".
        """
        if mode not in ("Q", "K", "V"):
            raise InputError(f'mode is "Q", "K" or "V", not {mode!r}')
        left = self.OV
        right = {"Q": lambda: self.QK, "K": lambda: self.QK.T, "V": lambda: self.OV}[mode]()
        layers = left.A.shape[0]
        before = torch.ones(layers, layers, dtype=torch.bool, device=left.A.device).triu(1)
        return composition_scores(left, right) * before[:, None, :, None]

    def all_head_labels(self) -> list[str]:
        """["L0H0", "L0H1", …]"""
        cfg = self._model.cfg
        return [f"L{i}H{h}" for i in range(cfg.n_layers) for h in range(cfg.n_heads)]
