"""Tiny models with random weights, one for each architecture that the tests of models know."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from graftwork import LanguageModel

VOCABULARY = 61

_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_HEAD_DIM = {**_GROUPED, "head_dim": 8}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_positions": 32,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}

#: Name → prefix of the transformers classes, config options.
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", _GPT),
    "gpt_neo": (
        "GPTNeo",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 4,
            "max_position_embeddings": 32,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    "gptj": ("GPTJ", {**_GPT, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoX", _DECODER),
    "opt": (
        "OPT",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 16,
            "pad_token_id": 1,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    "llama": ("Llama", _GROUPED),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": 4}),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", _HEAD_DIM),
    "gemma": ("Gemma", _HEAD_DIM),
    "gemma2": ("Gemma2", {**_HEAD_DIM, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3", {**_HEAD_DIM, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "phi": ("Phi", _DECODER),
    "phi3": ("Phi3", _GROUPED),
    "falcon": (
        "Falcon",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "alibi": False,
            "max_position_embeddings": 32,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    "falcon_alibi": (
        "Falcon",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "alibi": True,
            "multi_query": False,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    "bloom": (
        "Bloom",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "n_layer": 3,
            "n_head": 4,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    "olmo2": ("Olmo2", _GROUPED),
    "mixtral": ("Mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOss",
        {
            **_HEAD_DIM,
            "sliding_window": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "mamba": (
        "Mamba",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "state_size": 4,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        },
    ),
}
_ENCODER = {**_DECODER, "type_vocab_size": 2, "pad_token_id": 0}
MASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _ENCODER),
    "roberta": ("Roberta", {**_ENCODER, "max_position_embeddings": 34, "pad_token_id": 1}),
}
ARCHITECTURES = [*CAUSAL, *MASKED]


@functools.cache
def build(name: str) -> Any:
    """A tiny model of an architecture: the same module for every test, in evaluation mode."""
    prefix, options = {**CAUSAL, **MASKED}[name]
    config_name = "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    head = "ForMaskedLM" if name in MASKED else "LMHeadModel" if prefix == "GPT2" else "ForCausalLM"
    config = getattr(transformers, config_name)(**options)
    torch.manual_seed(0)
    module = getattr(transformers, f"{prefix}{head}")(config).eval()
    with torch.no_grad():
        # The usual start values are so small that a wrong position or mask would hardly show.
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module


@functools.cache
def wrap(name: str) -> LanguageModel:
    return LanguageModel(build(name))


Places = dict[tuple[str, str], Any]
Edit = Callable[[Any], Any]


def run_plainly(
    module: torch.nn.Module,
    *args: Any,
    edits: dict[tuple[str, str], Edit] | None = None,
    **kwargs: Any,
) -> Places:
    """One forward with torch's own hooks alone: what goes in and comes out of every module.

    Args:
        edits: by (path, port), functions of the value that give the new value.

    Returns:
        First arguments as (path, "input") and results as (path, "output"), of the first call.
    """
    seen: Places = {}
    edits = edits or {}

    def keep(place: tuple[str, str], value: Any) -> None:
        seen.setdefault(place, copy_of(value))

    def before(path: str) -> Callable[..., Any]:
        def hook(_: Any, given: Any, options: Any) -> Any:
            given, options = list(given), dict(options)
            name = None if given else next(iter(options), None)
            first = given[0] if given else options.get(name)
            if (path, "input") in edits:
                first = edits[path, "input"](first)
                if name is None:
                    given[0] = first
                else:
                    options[name] = first
            keep((path, "input"), first)
            return tuple(given), options

        return hook

    def after(path: str) -> Callable[..., Any]:
        def hook(_: Any, given: Any, output: Any) -> Any:
            if (path, "output") in edits:
                output = edits[path, "output"](output)
            keep((path, "output"), output)
            return output

        return hook

    handles = []
    for path, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(before(path), with_kwargs=True))
        handles.append(child.register_forward_hook(after(path)))
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def copy_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(copy_of(part) for part in value)
    return value


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in a value, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in tensors(part)] if isinstance(value, (tuple, list)) else []


def difference(value: Any, expected: Any) -> str | None:
    """What differs between two values beyond rounding; None if nothing does."""
    mine, theirs = tensors(value), tensors(expected)
    if len(mine) != len(theirs):
        return f"{len(mine)} tensors instead of {len(theirs)}"
    for a, b in zip(mine, theirs, strict=True):
        if a.shape != b.shape:
            return f"shape {list(a.shape)} instead of {list(b.shape)}"
        if not torch.allclose(a.double(), b.double(), atol=1e-5, rtol=1e-5):
            return f"off by {(a.double() - b.double()).abs().max():.2g}"
    return None


def count_hooks(module: torch.nn.Module) -> int:
    return sum(
        len(child._forward_hooks) + len(child._forward_pre_hooks) + len(child._backward_hooks)
        for child in module.modules()
    )


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(CAUSAL))
def causal(request: pytest.FixtureRequest) -> str:
    """An architecture that generates."""
    return str(request.param)


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """What tests of models share: tiny modules, and plain torch as the reference."""
    return SimpleNamespace(
        module=build,
        model=wrap,
        plain=run_plainly,
        difference=difference,
        tensors=tensors,
        hooks=count_hooks,
        vocabulary=VOCABULARY,
        prompts=random_prompts,
        tokenizer=word_tokenizer,
    )


def random_prompts(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    """Prompts of random ids [token]; no id has a meaning to a tokenizer or padding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]


@functools.cache
def word_tokenizer() -> Any:
    """One token for each of the words w3 … w60; padding is on the right, as in most tokenizers."""
    words = {"<pad>": 0, "<unk>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )
