"""OLMo 2 and 3: what attention and MLP add is normalized, and what they take is not."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, decoder
from .llama import COMMON
from .registry import register


@register("olmo2", "olmo3")
def olmo2(config: Any) -> Architecture:
    return decoder(
        **COMMON, ln1_post="post_attention_layernorm", ln2_post="post_feedforward_layernorm"
    )
