"""Tiny models of the tests of models; the reference is torch's own hooks at the points of a layer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers

from graftwork import LanguageModel, Model

from ..models.conftest import build, word_tokenizer

Function = Callable[[torch.Tensor], torch.Tensor]

_LLAMA = {
    "pre_attn": ("input_layernorm", "input"),
    "attn_pre_out": ("self_attn.o_proj", "input"),
    "post_attn": ("self_attn", "output"),
    "pre_mlp": ("post_attention_layernorm", "input"),
    "mlp_pre_out": ("mlp.down_proj", "input"),
    "post_mlp": ("mlp.down_proj", "output"),
}
_BERT = {
    "pre_attn": ("attention", "input"),
    "attn_pre_out": ("attention.output.dense", "input"),
    "post_attn": ("attention.output.LayerNorm", "output"),
    "pre_mlp": ("intermediate.dense", "input"),
    "mlp_pre_out": ("output.dense", "input"),
    "post_mlp": ("output.LayerNorm", "output"),
}
#: Where the points of a layer are: module and port.
PLACES: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "gpt2": (
        "transformer.h",
        {
            "pre_attn": ("ln_1", "input"),
            "attn_pre_out": ("attn.c_proj", "input"),
            "post_attn": ("attn", "output"),
            "pre_mlp": ("ln_2", "input"),
            "mlp_pre_out": ("mlp.c_proj", "input"),
            "post_mlp": ("mlp", "output"),
        },
    ),
    "opt": (
        "model.decoder.layers",
        {
            "pre_attn": ("self_attn_layer_norm", "input"),
            "attn_pre_out": ("self_attn.out_proj", "input"),
            "post_attn": ("self_attn", "output"),
            "pre_mlp": ("final_layer_norm", "input"),
            "mlp_pre_out": ("fc2", "input"),
            "post_mlp": ("fc2", "output"),
        },
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        {
            "pre_attn": ("input_layernorm", "input"),
            "attn_pre_out": ("attention.dense", "input"),
            "post_attn": ("attention", "output"),
            "pre_mlp": ("post_attention_layernorm", "input"),
            "mlp_pre_out": ("mlp.dense_4h_to_h", "input"),
            "post_mlp": ("mlp.dense_4h_to_h", "output"),
        },
    ),
    "llama": ("model.layers", _LLAMA),
    "mistral": ("model.layers", _LLAMA),
    "gemma": ("model.layers", _LLAMA),
    "gemma2": (
        "model.layers",
        {
            **_LLAMA,
            "post_attn": ("post_attention_layernorm", "output"),
            "pre_mlp": ("pre_feedforward_layernorm", "input"),
            "post_mlp": ("post_feedforward_layernorm", "output"),
        },
    ),
    "bert": ("bert.encoder.layer", _BERT),
    "roberta": ("roberta.encoder.layer", _BERT),
    "vit": (
        "vit.layers",
        {
            "pre_attn": ("layernorm_before", "input"),
            "attn_pre_out": ("attention.o_proj", "input"),
            "post_attn": ("attention", "output"),
            "pre_mlp": ("layernorm_after", "input"),
            "mlp_pre_out": ("mlp.fc2", "input"),
            "post_mlp": ("mlp.fc2", "output"),
        },
    ),
}
POINTS = (*_LLAMA, "pre_decoder", "post_decoder")
CAUSAL = ("gpt2", "opt", "gpt_neox", "llama", "mistral", "gemma", "gemma2")
TEXT = (*CAUSAL, "bert", "roberta")
LAYERS, WIDTH, MLP, HEADS, VOCABULARY = 3, 16, 24, 4, 61


@functools.cache
def module(name: str) -> Any:
    if name != "vit":
        return build(name)
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=MLP,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config).eval()


def fresh(name: str, **options: Any) -> Any:
    """A model without policies."""
    if name == "vit":
        return Model(module(name), **options)
    return LanguageModel(module(name), tokenizer=word_tokenizer(), **options)


def place(name: str, point: str, layer: int) -> tuple[str, str]:
    stack, points = PLACES[name]
    if point in ("pre_decoder", "post_decoder"):
        return f"{stack}.{layer}", "input" if point == "pre_decoder" else "output"
    path, port = points[point]
    return f"{stack}.{layer}.{path}", port


def shaped(function: Function, point: str, rows: int) -> Callable[[Any], Any]:
    """`function` of [row, token, *d] as one of what a module takes or gives."""

    def changed(value: Any) -> Any:
        if isinstance(value, tuple):
            return (changed(value[0]), *value[1:])
        x = value if value.ndim == 3 else value.unflatten(0, (rows, -1))
        if point == "attn_pre_out":
            x = x.unflatten(-1, (HEADS, -1))
        return function(x).reshape(value.shape)

    return changed


@contextlib.contextmanager
def hooked(
    name: str,
    functions: dict[tuple[str, int], Function],
    rows: int = 1,
    of: Any = None,
) -> Iterator[None]:
    """Torch's own hooks: functions of [row, token, *d] by point and layer."""
    tree = module(name) if of is None else of
    handles = []
    for (point, layer), function in functions.items():
        path, port = place(name, point, layer)
        child, change = tree.get_submodule(path), shaped(function, point, rows)

        def before(_: Any, args: Any, kwargs: Any, change: Any = change) -> Any:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            first = next(iter(kwargs))
            return args, {**kwargs, first: change(kwargs[first])}

        def after(_: Any, args: Any, output: Any, change: Any = change) -> Any:
            return change(output)

        if port == "input":
            handles.append(child.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(child.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain(
    name: str, inputs: torch.Tensor, functions: dict[tuple[str, int], Function] | None = None
) -> torch.Tensor:
    """Logits of one forward of ids [token] or [row, token], or of pixels, with hooks."""
    inputs = inputs.unsqueeze(0) if inputs.ndim == 1 else inputs
    with torch.no_grad(), hooked(name, functions or {}, inputs.shape[0]):
        found: torch.Tensor = module(name)(inputs).logits
    return found


def seen(
    name: str,
    inputs: torch.Tensor,
    points: list[tuple[str, int]],
    functions: dict[tuple[str, int], Function] | None = None,
) -> list[torch.Tensor]:
    """What is at points, after the hooks there."""
    kept: dict[tuple[str, int], torch.Tensor] = {}
    given = functions or {}

    def watch(spot: tuple[str, int]) -> Function:
        def keep(value: torch.Tensor) -> torch.Tensor:
            value = given[spot](value) if spot in given else value
            kept[spot] = value.clone()
            return value

        return keep

    plain(name, inputs, {spot: watch(spot) for spot in {*points, *given}})
    return [kept[spot] for spot in points]


def size(name: str, point: str) -> tuple[int, ...]:
    """The shape of a value there, without row and token."""
    d_head = 8 if name.startswith("gemma") else WIDTH // HEADS
    d_mlp = 64 if name in ("gpt2",) else MLP
    return {"attn_pre_out": (HEADS, d_head), "mlp_pre_out": (d_mlp,)}.get(point, (WIDTH,))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Any, expected: Any, **tolerance: float) -> None:
    found = getattr(found, "value", found) if not isinstance(found, torch.Tensor) else found
    torch.testing.assert_close(found, expected, **(tolerance or {"rtol": 1e-4, "atol": 1e-4}))


@pytest.fixture(params=TEXT)
def text(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=CAUSAL)
def causal(request: pytest.FixtureRequest) -> str:
    return str(request.param)
