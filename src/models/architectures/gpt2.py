"""GPT-2: `c_attn` computes query, key and value side by side on the last axis.

Source: transformers, models/gpt2/modeling_gpt2.py, GPT2Attention.forward.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ...tracing import Proxy
from .architecture import Architecture, Part, decoder, third
from .registry import declare_aliases, register


@dataclasses.dataclass(frozen=True)
class HeadVectors:
    """One third of `c_attn`, by head: [batch, head, token, d_head].

    Attributes:
        third: 0 query, 1 key, 2 value.
    """

    third: int
    source: str = "c_attn"

    def view(self, value: Proxy, module: torch.nn.Module) -> Proxy:
        width: int = module.split_size  # type: ignore[assignment]
        heads: int = module.num_heads  # type: ignore[assignment]
        part = value[..., self.third * width : (self.third + 1) * width]
        return part.unflatten(-1, (heads, width // heads)).transpose(1, 2)  # type: ignore[no-any-return]


declare_aliases(
    "GPT2Attention",
    {"query": HeadVectors(0), "key": HeadVectors(1), "value": HeadVectors(2)},
)


@register("gpt2")
def gpt2(config: Any) -> Architecture:
    return decoder(
        layers="transformer.h",
        embed="transformer.wte",
        pos_embed="transformer.wpe",
        positional="standard",
        ln_final="transformer.ln_f",
        norm="LN",
        ln1="ln_1",
        attn="attn",
        q=Part("c_attn", third(0)),
        k=Part("c_attn", third(1)),
        v=Part("c_attn", third(2)),
        o="c_proj",
        ln2="ln_2",
        w_in="c_fc",
        w_out="c_proj",
    )
