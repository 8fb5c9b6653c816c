"""Tiny models with random weights, and the reference of the planner's tests: one plain forward with
plain torch hooks for each variant."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from graftwork import LanguageModel

VOCABULARY = 61
_NO_IDS = {"bos_token_id": None, "eos_token_id": None}
_GPT = {"n_positions": 64, "n_embd": 16, "n_layer": 4, "n_head": 4, **_NO_IDS}
_BASE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    **_NO_IDS,
}
_GROUPED = {**_BASE, "num_key_value_heads": 2}
_HEAD_DIM = {**_GROUPED, "head_dim": 8}
_WINDOWS = {**_HEAD_DIM, "sliding_window": 4, "query_pre_attn_scalar": 8}
_NEO = {
    "hidden_size": 16,
    "num_layers": 4,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 2]],
    "window_size": 4,
    "max_position_embeddings": 64,
    **_NO_IDS,
}
_OPT = {
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 16,
    "pad_token_id": 1,
    **_NO_IDS,
}
_FALCON = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, **_NO_IDS}
_BLOOM = {"hidden_size": 16, "n_layer": 4, "n_head": 4, **_NO_IDS}
_MAMBA = {"hidden_size": 16, "num_hidden_layers": 4, "state_size": 4, "pad_token_id": None}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SHARED = {
    **_WINDOWS,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 4,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0] * 4,
}

#: Name → model type of transformers and its options. Four blocks each.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4}),
    "gpt_neo": ("gpt_neo", _NEO),
    "gpt_neox": ("gpt_neox", _BASE),
    "opt": ("opt", _OPT),
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 4}),
    "gemma2": ("gemma2", _WINDOWS),
    "gemma3_text": ("gemma3_text", _WINDOWS),
    "gemma3n_text": ("gemma3n_text", _SHARED),
    "falcon": ("falcon", {**_FALCON, "alibi": False}),
    "falcon_alibi": ("falcon", {**_FALCON, "alibi": True, "multi_query": False}),
    "bloom": ("bloom", _BLOOM),
    "mamba": ("mamba", {**_MAMBA, **_NO_IDS}),
    "mixtral": ("mixtral", {**_GROUPED, **_EXPERTS}),
}


def fresh(name: str, **how: Any) -> Any:
    """A new tiny model in evaluation mode."""
    kind, options = MODELS[name]
    config = transformers.CONFIG_MAPPING[kind](vocab_size=VOCABULARY, **options)
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config, **how).eval()
    with torch.no_grad():
        # The usual start values are so small that a wrong position or mask would hardly show.
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module


_BUILT: dict[str, Any] = {}


def build(name: str) -> Any:
    """A tiny model: the same module for every test."""
    if name not in _BUILT:
        _BUILT[name] = fresh(name)
    return _BUILT[name]


@functools.cache
def wrap(name: str) -> LanguageModel:
    return LanguageModel(build(name))


def blocks_path(module: torch.nn.Module) -> str:
    """The path of the list of blocks."""
    lists = [p for p, c in module.named_modules() if isinstance(c, torch.nn.ModuleList)]
    return min(lists, key=len)


def first_tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else first_tensor(value[0])


def with_first(value: Any, new: torch.Tensor) -> Any:
    if isinstance(value, torch.Tensor):
        return new
    return type(value)([with_first(value[0], new), *value[1:]])


Edit = Callable[[torch.Tensor], torch.Tensor]
Place = tuple[str, str]


def plain(
    module: torch.nn.Module, ids: torch.Tensor, edits: list[tuple[Place, Edit]] | None = None
) -> dict[Place, torch.Tensor]:
    """One forward of one prompt with torch's own hooks alone.

    Args:
        ids: [token] or [row, token].
        edits: functions of the first tensor of what goes in ("input") or comes out ("output").

    Returns:
        The first tensors in and out of every module, after the edits there.
    """
    seen: dict[Place, torch.Tensor] = {}
    edits = edits or []

    def change(place: Place, value: torch.Tensor) -> torch.Tensor:
        for where, edit in edits:
            if where == place:
                value = edit(value.clone())
        seen.setdefault(place, value.clone())
        return value

    def before(path: str) -> Callable[..., Any]:
        def hook(_: Any, args: Any, kwargs: Any) -> Any:
            if args and isinstance(args[0], torch.Tensor):
                return (change((path, "input"), args[0]), *args[1:]), kwargs
            name = next((n for n, v in kwargs.items() if isinstance(v, torch.Tensor)), None)
            if args or name is None:
                return None
            return args, {**kwargs, name: change((path, "input"), kwargs[name])}

        return hook

    def after(path: str) -> Callable[..., Any]:
        def hook(_: Any, args: Any, output: Any) -> Any:
            several = type(output) in (tuple, list) and torch.is_tensor(output[0])
            if not several and not torch.is_tensor(output):
                return None
            return with_first(output, change((path, "output"), first_tensor(output)))

        return hook

    handles = []
    for path, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(before(path), with_kwargs=True))
        handles.append(child.register_forward_hook(after(path)))
    try:
        with torch.no_grad():
            module(input_ids=ids if ids.ndim == 2 else ids[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def close(value: Any, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Equal within a relative tolerance of the largest entry."""
    value = value.value if hasattr(value, "value") else value
    if value.shape != expected.shape:
        return False
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    return bool(((value - expected).abs() <= tolerance * scale).all())


@contextmanager
def block_rows(module: torch.nn.Module) -> Iterator[Counter[int]]:
    """Counts the rows that run through each block: for one that is skipped, no part of it runs."""
    counts: Counter[int] = Counter()
    handles = []
    for i, block in enumerate(module.get_submodule(blocks_path(module))):
        inner = next(block.children())

        def hook(_: Any, args: Any, kwargs: Any, i: int = i) -> None:
            first = args[0] if args else next(v for v in kwargs.values() if torch.is_tensor(v))
            counts[i] += first.shape[0]

        handles.append(inner.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def batches_of(module: torch.nn.Module, path: str = "") -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what a module takes first, for each of its forwards."""
    shapes: list[tuple[int, ...]] = []

    def hook(_: Any, args: Any, kwargs: Any) -> None:
        first = args[0] if args else next(v for v in kwargs.values() if torch.is_tensor(v))
        shapes.append(tuple(first.shape))

    handle = module.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


def prompts(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    """Prompts of random ids [token]; no id has a meaning to a tokenizer or padding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]


def left_behind(module: torch.nn.Module) -> list[str]:
    """Modules with hooks or a replaced forward."""
    return [
        path
        for path, child in module.named_modules()
        if child._forward_hooks or child._forward_pre_hooks or "forward" in child.__dict__
    ]


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """What the tests of this room share."""
    return SimpleNamespace(
        module=build,
        fresh=fresh,
        model=wrap,
        blocks=blocks_path,
        plain=plain,
        close=close,
        block_rows=block_rows,
        batches_of=batches_of,
        prompts=prompts,
        left_behind=left_behind,
        vocabulary=VOCABULARY,
    )


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Every test leaves the shared models without hooks and with their own forwards."""
    yield
    assert [path for module in _BUILT.values() for path in left_behind(module)] == []
