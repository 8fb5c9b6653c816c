"""Owns how rows of different lengths share a forward and still compute what each computes alone."""

from __future__ import annotations

from typing import Any

import torch

#: With padding and its mask, these architectures need position ids:
_BY_POSITIONS = frozenset(
    "albert apertus arcee bert bert-generation biogpt bitnet cohere cohere2 ctrl deberta "
    "deberta-v2 diffllama distilbert electra ernie ernie4_5 exaone4 falcon flex_olmo gemma gemma2 "
    "gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gpt-sw3 "
    "gptj granite granitemoe granitemoeshared llama llama4_text megatron-bert ministral "
    "ministral3 mistral mixtral modernbert modernbert-decoder nemotron olmo olmo2 olmo3 olmoe "
    "openai-gpt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe rembert roc_bert seed_oss "
    "smollm3 squeezebert stablelm starcoder2 vaultgemma xglm".split()
)
#: and these must get none: positions are relative, counted by the model from the mask (OPT), or padded
#: inputs are zeroed before the recurrence.
_BY_MASK = frozenset("bloom falcon_mamba mamba mamba2 mpt opt".split())
#: These count positions from the ids that are not padding, so the padding must be the id they know.
_BY_IDS = frozenset(
    "camembert data2vec-text esm roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl".split()
)
# Each was compared with solo forwards. What is not named is not padded: among transformers'
# architectures that take both mask and position ids, RecurrentGemma, ConvBERT, MobileBERT, MPNet and
# others compute something else for a padded row.

#: Encoders of these: what they make of the whole prompt, they take from its first token. So theirs is
#: the batch's first, and padding is on the right. As decoders (`is_decoder`) they are padded on the
#: left, as all others, whose last token is what counts.
_ENCODERS = frozenset(
    "albert bert camembert data2vec-text deberta deberta-v2 distilbert electra ernie esm megatron-bert "
    "modernbert rembert roberta roberta-prelayernorm roc_bert squeezebert xlm-roberta "
    "xlm-roberta-xl".split()
)

#: Attention that is not fused takes the softmax in float32 but for these. There the lowest float64,
#: which masks, is minus infinity: a padded query, which sees nothing, gives NaN to all behind it.
_SOFTMAX_IN_OWN_TYPE = frozenset("falcon falcon_mamba gpt2 gpt_neo gptj mamba mamba2".split())

POSITIONS, MASK, IDS = "positions", "mask", "ids"


def padding_of(config: Any) -> str | None:
    """What makes a padded row compute what it computes alone: POSITIONS, MASK or IDS.

    None where that is not known: then rows of different lengths must not share a forward.
    """
    for kind, names in ((POSITIONS, _BY_POSITIONS), (MASK, _BY_MASK), (IDS, _BY_IDS)):
        if config.model_type in names:
            return kind
    return None


def pads_right(config: Any) -> bool:
    """True where a row's tokens begin where the batch begins."""
    return config.model_type in _ENCODERS and not getattr(config, "is_decoder", False)


def pads(config: Any, module: torch.nn.Module) -> bool:
    """True if rows of different lengths may share a forward of a model."""
    first = next(module.parameters(), None)
    if padding_of(config) is None or first is None or first.dtype != torch.float64:
        return padding_of(config) is not None
    fused = getattr(config, "_attn_implementation", None) not in (None, "eager")
    fused = fused and bool(getattr(module, "_supports_sdpa", False))
    # On the right, every query sees the first token.
    return fused or pads_right(config) or config.model_type in _SOFTMAX_IN_OWN_TYPE
