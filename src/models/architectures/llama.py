"""Llama 1 to 3 and all that is built like it: Mistral, Qwen2, Qwen3, OLMo, SmolLM3, StableLM, ….

RMS norms before attention and MLP, gated MLP, separate projections, rotary positions.
"""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, decoder
from .registry import register

COMMON: dict[str, Any] = {
    "layers": "model.layers",
    "embed": "model.embed_tokens",
    "ln_final": "model.norm",
    "norm": "RMS",
    "attn": "self_attn",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "o_proj",
    "w_in": "up_proj",
    "w_gate": "gate_proj",
    "w_out": "down_proj",
}


@register("llama", "mistral", "qwen2", "qwen3", "ministral", "ministral3", "smollm3", "seed_oss")
def llama(config: Any) -> Architecture:
    return decoder(**COMMON, ln1="input_layernorm", ln2="post_attention_layernorm")
