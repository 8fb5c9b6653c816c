"""Every architecture that the registry lets share a forward is right when it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from graftwork import LanguageModel
from graftwork.inputs import padding
from graftwork.models.architectures import IDS, POSITIONS, padding_of

LISTED = sorted(padding._BY_POSITIONS | padding._BY_MASK | padding._BY_IDS)

#: Small sizes by the names that configurations give them.
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim", "n_inner", "ffn_hidden_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_key_value_heads"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "head_dim"), 8),
    **dict.fromkeys(("state_size", "sliding_window", "rotary_dim"), 4),
    "n_group": 1, "topk_group": 1, "n_groups": 1, "attention_types": [[["global", "local"], 1]],
    "word_embed_proj_dim": 16, "vocab_size": 61, "pad_token_id": 0, "window_size": 4,
}  # fmt: skip
#: What fits an architecture's own rules.
OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 4, "expand": 2},
    "persimmon": {"head_dim": None},
}


def tiny(name: str) -> Any:
    known = transformers.AutoConfig.for_model(name)
    names = {**known.to_dict(), **dict.fromkeys(known.attribute_map)}
    options = {key: value for key, value in SIZES.items() if key in names}
    for alias, target in known.attribute_map.items():
        if alias in options and target in options:
            del options[alias]
    # GPT-J and its like have no separate size of a head, whatever they inherit.
    options |= {k: v for k, v in OWN.get(name, {}).items() if v is not None}
    for key, value in OWN.get(name, {}).items():
        if value is None:
            options.pop(key, None)
    names = {**MODEL_FOR_MASKED_LM_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    kind: Any = names[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **options)
    module = getattr(transformers, kind if isinstance(kind, str) else kind[0])(config)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
            elif not torch.isfinite(parameter).all():
                parameter.zero_()
    return module.eval().float()


@pytest.mark.slow
@pytest.mark.parametrize("name", LISTED)
def test_a_listed_architecture_is_right_with_padding(name: str, tools: Any) -> None:
    module = tiny(name)
    model = LanguageModel(module)
    assert model._padding is not None
    prompts = tools.prompts(3, 9, 1)
    rows: list[int] = []
    counter = module.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    saved = []
    with model.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                saved.append(model.output.logits.save())
    counter.remove()
    assert rows == [3]
    for prompt, logits in zip(prompts, saved, strict=True):
        with torch.no_grad():
            expected = module(prompt[None]).logits
        scale = expected.abs().max()
        assert tools.difference(logits.value / scale, expected / scale) is None


def test_the_lists_do_not_overlap() -> None:
    lists = (padding._BY_POSITIONS, padding._BY_MASK, padding._BY_IDS)
    assert len(LISTED) == sum(len(names) for names in lists)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gpt2", POSITIONS), ("opt", padding.MASK), ("roberta", IDS), ("recurrent_gemma", None)],
)
def test_what_is_known_of_an_architecture(name: str, expected: str | None) -> None:
    assert padding_of(transformers.AutoConfig.for_model(name)) == expected
