"""Owns values of a model that are asked for without a block: logits, streams, neurons, text."""

from __future__ import annotations

from typing import Any

import torch

from ..envoy.names import Missing
from ..tracing.errors import InputError


def _values(model: Any, prompt: Any, *names: str) -> list[dict[str, torch.Tensor]]:
    """Names of every layer for a prompt, by layer."""
    found = []
    with torch.no_grad(), model.trace(prompt):
        for layer in model.layers:
            found.append({name: getattr(layer, name).save() for name in names})
    return [{name: box.value.detach() for name, box in one.items()} for one in found]


def _one(value: torch.Tensor) -> torch.Tensor:
    """The only row."""
    if value.shape[0] != 1:
        raise InputError(f"this takes one prompt, and {value.shape[0]} were given")
    return value[0]


def _stack(values: list[torch.Tensor]) -> torch.Tensor:
    """Values of layers, which may be on several devices."""
    return torch.stack([value.to(values[0].device) for value in values])


def logits(model: Any, prompt: Any) -> torch.Tensor:
    """[batch, token, d_vocab]."""
    with torch.no_grad(), model.trace(prompt) as tracer:
        found = tracer.output.logits.save()
    value: torch.Tensor = found.value
    return value.detach()  # a policy may have parameters that are trained


def residual_stream(model: Any, prompt: Any) -> torch.Tensor:
    """[2 · layer + 1, token, d_model]."""
    places = model.vocabulary().layer_places(0)
    has_middle = not isinstance(places["resid_mid"], Missing)
    names = ("resid_pre", "resid_mid" if has_middle else "attn_out", "resid_post")
    found: list[torch.Tensor] = []
    for index, one in enumerate(_values(model, prompt, *names)):
        start, middle, end = (_one(one[name]) for name in names)
        if not index:
            found.append(start)
        # In parallel blocks nothing is between them: the sum is what attention alone would give.
        found += [middle if has_middle else start + middle, end]
    return _stack(found)


def residual_stream_of_layers(model: Any, prompt: Any) -> torch.Tensor:
    """[layer + 1, token, d_model]."""
    values = _values(model, prompt, "resid_pre", "resid_post")
    return _stack([_one(values[0]["resid_pre"]), *(_one(one["resid_post"]) for one in values)])


def residual_diffs(model: Any, prompt: Any) -> torch.Tensor:
    """[2 · layer, token, d_model]."""
    values = _values(model, prompt, "attn_out", "mlp_out")
    return _stack([_one(one[name]) for one in values for name in ("attn_out", "mlp_out")])


def midlayer_activations(model: Any, prompt: Any) -> dict[str, torch.Tensor]:
    """MLPs [batch, layer, token, d_mlp] and heads [batch, layer, token, head, d_head]."""
    values = _values(model, prompt, "mlp_post", "z")
    return {
        "mlp": _stack([one["mlp_post"] for one in values]).transpose(0, 1),
        "attn": _stack([one["z"] for one in values]).transpose(0, 1),
    }


def attention_weights(model: Any, prompt: Any) -> torch.Tensor:
    """[layer, head, query, key]."""
    return _stack([_one(one["pattern"]) for one in _values(model, prompt, "pattern")])


def generate_text(model: Any, args: tuple[Any, ...], num: int, options: dict[str, Any]) -> Any:
    """The prompt and its continuation as text."""
    if not hasattr(model.module_tree(), "generation_config"):
        raise InputError(f"{type(model.module_tree()).__name__} does not generate text.")
    if model.tokenizer is None:
        raise InputError("this model has no tokenizer: write `with model.generate(...)`")
    with model.generate(*args, max_new_tokens=num, **options) as generator:
        pass
    texts = model.tokenizer.batch_decode(generator.output, skip_special_tokens=True)
    several = len(args) > 1 or (bool(args) and isinstance(args[0], (list, tuple)))
    return texts if several and len(texts) > 1 else texts[0]
