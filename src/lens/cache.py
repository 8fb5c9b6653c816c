"""Owns `KeyValueCache`: keys and values of earlier tokens, given to a forward and kept up by it."""

from __future__ import annotations

from typing import Any

import torch

from ..tracing.structure import deep_copy


class KeyValueCacheEntry:
    """Keys and values of one layer, [batch, pos, n_kv_heads, d_head]."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    @property
    def past_keys(self) -> torch.Tensor:
        return self._layer.keys.transpose(1, 2)  # type: ignore[no-any-return]

    @property
    def past_values(self) -> torch.Tensor:
        return self._layer.values.transpose(1, 2)  # type: ignore[no-any-return]


class KeyValueCache:
    """A cache for `forward(..., past_kv_cache=cache)`; it grows with each forward unless it is frozen.

    Attributes:
        cache: of transformers.
        mask: of the tokens in it, [batch, pos]; None while it is empty.
        frozen: forwards use it and leave it as it is.
    """

    def __init__(self, cache: Any = None) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache() if cache is None else cache
        self.mask: torch.Tensor | None = None
        self.frozen = False

    @classmethod
    def init_cache(cls, cfg: Any = None, device: Any = None, batch_size: int = 1) -> KeyValueCache:
        """An empty cache. Sizes and device are those of the first forward that it is given to."""
        return cls()

    @property
    def entries(self) -> list[KeyValueCacheEntry]:
        return [KeyValueCacheEntry(layer) for layer in self.cache.layers]

    def __getitem__(self, layer: int) -> KeyValueCacheEntry:
        return self.entries[layer]

    def __len__(self) -> int:
        return len(self.cache.layers)

    @property
    def length(self) -> int:
        """Tokens in it."""
        return int(self.cache.get_seq_length())

    def freeze(self) -> None:
        self.frozen = True

    def unfreeze(self) -> None:
        self.frozen = False

    def for_forward(self) -> Any:
        """The cache to give to a forward, with the mask of its tokens beside it."""
        found: Any = deep_copy(self.cache) if self.frozen else self.cache
        found.past_mask = self.mask
        return found

    def add_mask(self, mask: torch.Tensor) -> None:
        """The tokens of a forward have joined."""
        if not self.frozen:
            self.mask = (
                mask if self.mask is None else torch.cat([self.mask.to(mask.device), mask], 1)
            )
