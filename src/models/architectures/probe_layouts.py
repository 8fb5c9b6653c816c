"""Owns the layouts and the kinds of norm that `probe` tells apart: where heads lie in a value, by its
strides, and what a normalization does, by trying it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from .architecture import Features, Norm, head_first, unflattened

# -------------------------------------------------------------------- layouts


def by_head(value: Any, sizes: Any, here: Any) -> Any:
    """[(batch head), token, d_head] → [batch, token, head, d_head]."""
    return value.unflatten(0, (here("resid_pre").shape[0], -1)).transpose(1, 2)


def keys_by_head(value: Any, sizes: Any, here: Any) -> Any:
    """[(batch head), d_head, token] → [batch, token, head, d_head]."""
    return value.unflatten(0, (here("resid_pre").shape[0], -1)).permute(0, 3, 1, 2)


def keys_head_first(value: Any, sizes: Any, here: Any) -> Any:
    """[batch, head, d_head, token] → [batch, token, head, d_head]."""
    return value.permute(0, 3, 1, 2)


def split_heads(value: Any, sizes: Any, here: Any) -> Any:
    """[(batch head), query, key] → [batch, head, query, key]."""
    return value.unflatten(0, (here("resid_pre").shape[0], -1))


def strided(offset: int, count: int, stride: int, width: int) -> Features:
    """Heads that lie at a distance in the outputs of a module: [..., all] → [..., head, d_head]."""

    def features(value: Any, sizes: Any) -> Any:
        if stride == width:
            return value[..., offset : offset + count * width].unflatten(-1, (count, width))
        rows = value.shape[-1] // stride
        inside = offset % stride
        first = offset // stride
        whole = value[..., : rows * stride].unflatten(-1, (rows, stride))
        return whole[..., first : first + count, inside : inside + width]

    return features


def keys_values(n: int, width: int) -> Any:
    """[..., (head d_head)] → [..., head, d_head]."""
    return lambda value, sizes, here: value.unflatten(-1, (n, width))


def shaped(features: Features, flat: bool) -> Any:
    """A layout from what is done to the last axis."""

    def layout(value: Any, sizes: Any, here: Any) -> Any:
        return features(unflattened(value, sizes, here) if flat else value, sizes)

    return layout


def found_layout(tensor: torch.Tensor, shape: tuple[int, int, int, int]) -> tuple[bool, Any]:
    """Whether a tensor of attention can be shown as [batch, token, head, d_head], and how."""
    b, t, n, d = shape
    known: dict[tuple[int, ...], Any] = {
        (b, t, n, d): None,
        (b, t, n * d): keys_values(n, d),
        (b * n, d, t): keys_by_head,
        (b * n, t, d): by_head,
        (b, n, d, t): keys_head_first,
        (b, n, t, d): head_first,
    }
    found = tuple(tensor.shape)
    return found in known, known.get(found)


def by_head_weight(features: Features) -> Features:
    """[d_in, …] → [head, d_in, d_head]."""
    return lambda value, sizes: features(value, sizes).permute(1, 0, 2)


def out_heads(value: Any, sizes: Any) -> Any:
    """[(head d_head), d_model] → [head, d_head, d_model]."""
    return value.unflatten(0, (sizes.n_heads, sizes.d_head))


def half(offset: int, width: int) -> Features:
    """Some of the outputs of a module."""
    return lambda value, sizes: value[..., offset : offset + width]


def every_other(start: int) -> Features:
    """Gate and up-projection that alternate."""
    return lambda value, sizes: value[..., start::2]


# -------------------------------------------------------------------- norms


def norm_of(module: torch.nn.Module, path: str) -> Norm | None:
    """What kind of normalization a module is, by trying it on numbers; None if it is another one."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = next(
        (
            float(getattr(module, name))
            for name in ("eps", "variance_epsilon", "epsilon")
            if isinstance(getattr(module, name, None), (int, float))
        ),
        0.0,
    )
    given = [p for p in module.parameters()]
    known = [p for p in (weight, bias) if p is not None]
    if len(given) != len(known) or any(p.ndim != 1 for p in given):
        return None
    with torch.no_grad():
        try:
            one = copy.deepcopy(module).to_empty(device="cpu").float()
        except (RuntimeError, TypeError, NotImplementedError):
            return None
        generator = torch.Generator().manual_seed(0)
        gain = shift = None
        width = 24
        for name, parameter in one.named_parameters():
            width = parameter.shape[0]
            parameter.copy_(torch.rand(width, generator=generator) + 0.5)
            if name == "weight":
                gain = parameter
            else:
                shift = parameter
        for size in (1.0, max(eps, 1e-8) ** 0.5):
            x = torch.randn(3, width, generator=generator) * size + 0.3 * size
            try:
                out = one(x)
            except Exception:  # whatever it wants besides
                return None
            if not isinstance(out, torch.Tensor) or out.shape != x.shape:
                return None
            fits = [
                (kind, offset)
                for kind in ("LN", "RMS")
                for offset in (0.0, 1.0)
                if torch.allclose(_normed(x, kind, offset, gain, shift, eps), out, 1e-3, 1e-4)
            ]
            if not fits:
                return None
    return Norm(path, *fits[0])


def _normed(x: Any, kind: str, offset: float, gain: Any, shift: Any, eps: float) -> Any:
    centered = x - x.mean(-1, keepdim=True) if kind == "LN" else x
    found = centered / (centered.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    if gain is not None:
        found = found * (gain + offset)
    return found if shift is None else found + shift
