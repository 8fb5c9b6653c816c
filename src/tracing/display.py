"""Owns how values look in a notebook: shape, statistics, a small picture, the first numbers.

Only a corner of a large tensor is formatted, and its statistics are of a sample. Colours are mixed
with the background, so that they fit light and dark pages. `treescope` shows the numbers where it is
installed.
"""

from __future__ import annotations

import html
import math
import warnings
from typing import Any

import torch

from .structure import ATOMS, children, leaves, map_leaves, summary

#: Values whose statistics are taken; of larger tensors, every nth value.
_SAMPLE = 1 << 20
#: Rows and columns of the picture, and of the numbers.
_PICTURE = (8, 32)
_FIRST = (4, 6)
#: Parts of a container, containers in containers, and letters of anything else.
_PARTS = 50
_DEPTH = 8
_LETTERS = 200
# What treescope is given of a tensor: on each of its last two axes, and on the others.
_SHOWN = 64
_LEADING = 4


def value_html(value: Any) -> str:
    """A saved value as HTML."""
    try:
        import treescope
    except ImportError:  # optional
        return _html(value, 0)
    with warnings.catch_warnings():
        # Numpy warns of means of nothing where all numbers are NaN.
        warnings.simplefilter("ignore")
        shown = treescope.render_to_html(map_leaves(_array, value), ignore_exceptions=True)
    title = _title(value) if isinstance(value, torch.Tensor) else _code(summary(value))
    cut = any(_limits(leaf) != list(leaf.shape) for leaf in leaves(value) if _is_tensor(leaf))
    return f"<div>{title}{'<div>the first values:</div>' if cut else ''}{shown}</div>"


def _code(text: str) -> str:
    return f"<code>{html.escape(_short(text))}</code>"


def _array(leaf: Any) -> Any:
    """What treescope is given: numpy arrays of corners, and no objects that it would walk into.

    Arrays, as it asks tensors for the names of their axes, which new versions of torch dropped.
    """
    if type(leaf) in ATOMS:
        return leaf
    if not isinstance(leaf, torch.Tensor) or not _has_numbers(leaf):
        return summary(leaf)
    corner = leaf.detach()
    for axis, length in enumerate(_limits(leaf)):
        corner = corner.narrow(axis, 0, length)
    return _readable(corner).numpy()


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _limits(tensor: torch.Tensor) -> list[int]:
    """How much of each axis treescope is given: no more than a few thousand numbers."""
    leading = max(0, tensor.ndim - 2)
    return [min(n, _LEADING if i < leading else _SHOWN) for i, n in enumerate(tensor.shape)]


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, in a dtype that numpy knows: bfloat16 and float8 are none."""
    if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    return tensor.resolve_conj().resolve_neg().cpu()


def _corner(tensor: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The first rows and columns [row, column] of the first matrix of a tensor."""
    corner = tensor.detach()
    while corner.ndim > 2:
        corner = corner[0]
    while corner.ndim < 2:
        corner = corner[None]
    return _readable(corner[: size[0], : size[1]])


def _html(value: Any, depth: int) -> str:
    if isinstance(value, torch.Tensor):
        return _tensor_html(value)
    parts = None if type(value) in ATOMS else children(value)
    if parts is None:
        text = repr(value) if type(value) in ATOMS else f"<{type(value).__name__}>"
        return _code(text)
    title = html.escape(f"{type(value).__name__} of {len(parts)}")
    if depth >= _DEPTH:
        return f"<code>{title}</code>"
    rows = []
    for name, part in zip(_names(value, len(parts)), parts[:_PARTS], strict=False):
        inner = _html(part, depth + 1)
        rows.append(f"<li>{_code(name)}: {inner}</li>")
    if len(parts) > _PARTS:
        rows.append(f"<li>… and {len(parts) - _PARTS} more</li>")
    opened = " open" if depth < 2 else ""
    return f"<details{opened}><summary>{title}</summary><ul>{''.join(rows)}</ul></details>"


def _names(value: Any, count: int) -> list[str]:
    if isinstance(value, dict):
        return [repr(key) for key in value]
    if isinstance(value, slice):
        return ["start", "stop", "step"]
    fields = getattr(value, "_fields", None) or getattr(value, "__dataclass_fields__", None)
    return list(map(str, fields)) if fields else [str(i) for i in range(count)]


def _short(text: str) -> str:
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"


def _tensor_html(tensor: torch.Tensor) -> str:
    title = _title(tensor)
    if not _has_numbers(tensor):
        return title
    return f"<div>{title}<div>{_picture(tensor)}</div>{_numbers(tensor)}</div>"


def _has_numbers(tensor: torch.Tensor) -> bool:
    return bool(tensor.numel()) and not tensor.is_meta and tensor.layout is torch.strided


def _title(tensor: torch.Tensor) -> str:
    """Shape, dtype and device, and the statistics."""
    title = f"{type(tensor).__name__} {summary(tensor)} {tensor.device}"
    if tensor.requires_grad:
        title += " requires_grad"
    if _has_numbers(tensor):
        note = _statistics(tensor)
    else:
        note = (
            "no data" if tensor.is_meta else "empty" if not tensor.numel() else str(tensor.layout)
        )
    return f"{_code(title)} <small>{html.escape(note)}</small>"


def _statistics(tensor: torch.Tensor) -> str:
    flat = tensor.detach()
    step = -(-flat.numel() // _SAMPLE)
    if step > 1 and not flat.is_contiguous():
        # Without a copy of the whole: the first part of the first axes.
        while flat.numel() > _SAMPLE and flat.ndim > 1:
            flat = flat[: max(1, flat.shape[0] * _SAMPLE // flat.numel())]
            flat = flat if flat.shape[0] > 1 else flat[0]
        flat = flat.reshape(-1)[:_SAMPLE]
        note = f" (of the first {flat.numel():,} values)"
    else:
        flat = flat.reshape(-1)[::step]
        note = f" (of every {step:,}th value)" if step > 1 else ""
    if flat.dtype == torch.bool:
        return f"{int(flat.sum()):,} of {flat.numel():,} true{note}"
    if flat.is_complex():
        flat, note = flat.abs(), note + " (absolute values)"
    values = flat.double()
    finite = values[torch.isfinite(values)]
    nans = int(torch.isnan(values).sum())
    texts = []
    if finite.numel():
        names = {"min": finite.min(), "mean": finite.mean(), "max": finite.max()}
        if finite.numel() > 1:
            names["std"] = finite.std()
        texts = [f"{name} {float(number):.4g}" for name, number in names.items()]
    if nans:
        texts.append(f"{nans:,} NaN")
    infinite = values.numel() - finite.numel() - nans
    if infinite:
        texts.append(f"{infinite:,} inf")
    return ", ".join(texts) + note


def _picture(tensor: torch.Tensor) -> str:
    """The first values as coloured squares: blue below zero, red above, by opacity."""
    corner = _corner(tensor, _PICTURE)
    values: list[list[float]] = (corner.abs() if corner.is_complex() else corner).double().tolist()
    largest = max((abs(x) for row in values for x in row if math.isfinite(x)), default=0.0) or 1.0
    squares = []
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if math.isnan(value):
                paint = 'fill="none" stroke="#888" stroke-dasharray="2 1"'
            else:
                share = min(1.0, abs(value) / largest)
                paint = f'fill="{"#d6604d" if value > 0 else "#4393c3"}" fill-opacity="{share:.2f}"'
            squares.append(
                f'<rect x="{x * 10}" y="{y * 10}" width="9" height="9" {paint}>'
                f"<title>{value:.4g}</title></rect>"
            )
    width, height = 10 * max(len(values[0]), 1), 10 * len(values)
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">'
        f"{''.join(squares)}</svg>"
    )


def _numbers(tensor: torch.Tensor) -> str:
    corner = _corner(tensor, _FIRST)
    rows = ["".join(f"{_number(value):>12}" for value in row) for row in corner.tolist()]
    shown = corner.numel()
    rest = f"\n… {tensor.numel() - shown:,} more values" if tensor.numel() > shown else ""
    text = html.escape("\n".join(rows) + rest)
    return f'<details><summary>numbers</summary><pre style="margin:0">{text}</pre></details>'


def _number(value: Any) -> str:
    return str(value) if isinstance(value, (int, bool)) else f"{value:.4g}"
