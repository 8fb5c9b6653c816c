"""Owns path patching: what one head changes in others directly, with all between them held still.

`patching.get_act_patch_direct_path` is the same for one head at a time and pairs of heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from ..tracing.errors import InputError, ShapeError
from ..tracing.proxy import apply
from .patching import Head, Metric, can_record, number_of, prompt_of, record_hooks

#: (layer, head, "q" | "k" | "v"), (layer, "mlp") or "logits".
Receiver: TypeAlias = "tuple[int, int, str] | tuple[int, str] | str"


def path_patch(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    receivers: Sequence[Receiver] | Receiver,
    senders: Sequence[Head] | None = None,
    freeze_mlps: bool = True,
) -> torch.Tensor:
    """The metric of the corrupted run in which receivers read the stream as if one head were clean.

    For each sender there are two runs of the corrupted prompt. In the first, the sender's z is that of
    the clean prompt, and all that comes behind it gives what it gave in the corrupted run; what the
    receivers compute of the stream there is kept: queries, keys and values (before rotary embeddings),
    the input of an MLP behind its norm, the final stream. In the second, the receivers get these, and
    the rest follows.

    Args:
        model: a HookedTransformer.
        clean, corrupted: text, texts or ids, of one shape. To put noise into a clean run, swap them.
        metric: from logits [batch, pos, d_vocab] to one number.
        receivers: one or several, patched together: (layer, head, "q"), "k" or "v"; (layer, "mlp");
            "logits". Heads count as query heads, also where they share keys and values.
        senders: (layer, head) of each; default all.
        freeze_mlps: also hold the MLPs between still. Without, paths through MLPs are patched, too,
            as in the paper.

    Returns:
        [sender]; for all senders [layer, head], with NaN for those that are behind every receiver.

    Raises:
        InputError: receivers or senders that do not exist, or a sender behind every receiver.
        ShapeError: prompts of two shapes.

    Source: Wang et al. 2022, Interpretability in the Wild, section 3.1 and appendix B; Goldowsky-Dill
    et al. 2023, Localizing Model Behavior with Path Patching.
    """
    cfg, names = model.model.cfg, model._vocabulary
    wanted = _receivers(model, receivers)
    every = list(itertools.product(range(cfg.n_layers), range(cfg.n_heads)))
    chosen = every if senders is None else [(int(i), int(h)) for i, h in senders]
    for one in chosen:
        if one not in every:
            raise InputError(
                f"there is no head {one}: {cfg.n_layers} layers of {cfg.n_heads} heads"
            )
        if senders is not None and not any(_is_before(model, one[0], to) for to in wanted):
            raise InputError(f"no receiver is behind the sender {one}")
    chosen = [one for one in chosen if any(_is_before(model, one[0], to) for to in wanted)]
    source, base = prompt_of(model, clean), prompt_of(model, corrupted)
    if source["input_ids"].shape != base["input_ids"].shape:
        raise ShapeError("The clean and the corrupted prompt must have the same shape.")
    recorded = can_record(model, base, lambda tracer: metric(tracer.output.logits).save())
    values = []
    with torch.no_grad(), model.model.trace() as tracer:
        with tracer.invoke(**source):
            record_hooks(model)
            theirs = {i: names.read(i, "z") for i in dict.fromkeys(layer for layer, _ in chosen)}
        with tracer.invoke(**base):
            record_hooks(model)
            own = [(names.read(i, "z"), names.read(i, "mlp_out")) for i in range(cfg.n_layers)]
        for layer, head in chosen:
            with tracer.invoke(**base):
                record_hooks(model)
                names.read(layer, "z")[:, :, head] = theirs[layer][:, :, head]
                for i in range(layer, cfg.n_layers):
                    if i > layer:
                        names.read(i, "z")[:] = own[i][0]
                    if freeze_mlps:
                        # What is read here stands before the MLP in the forward, whatever it writes.
                        names.read(i, "mlp_out")[:] = own[i][1]
                changed = [(to, _read(model, to)) for to in wanted if _is_before(model, layer, to)]
            with tracer.invoke(**base):
                record_hooks(model)
                for (i, name, place), value in changed:
                    found = names.read(i, name)
                    if place is None:
                        found[:] = value
                    else:
                        found[:, :, place] = value
                logits = tracer.output.logits
                value = metric(logits) if recorded else apply(metric, logits)
                values.append(value.save())
    numbers = [number_of(one.value) for one in values]
    if senders is not None:
        return torch.stack(numbers) if numbers else torch.zeros(0)
    result = torch.full((cfg.n_layers, cfg.n_heads), float("nan"))
    result = result.to(numbers[0]) if numbers else result
    for (layer, head), number in zip(chosen, numbers, strict=True):
        result[layer, head] = number
    return result


#: Layer, unified name, and which head of it; None for all of it.
_Place = tuple[int, str, "int | None"]


def _receivers(model: Any, given: Any) -> list[_Place]:
    cfg = model.model.cfg
    single = isinstance(given, str) or (isinstance(given, tuple) and isinstance(given[0], int))
    found: list[_Place] = []
    for one in [given] if single else given:
        if one == "logits":
            found.append((cfg.n_layers - 1, "resid_post", None))
            continue
        parts = tuple(one)
        layer, kind = parts[0], parts[-1]
        fits = isinstance(layer, int) and 0 <= layer < cfg.n_layers
        if fits and len(parts) == 2 and kind == "mlp":
            found.append((layer, "mlp_in", None))
        elif fits and len(parts) == 3 and kind in ("q", "k", "v") and 0 <= parts[1] < cfg.n_heads:
            shared = 1 if kind == "q" else cfg.n_heads // cfg.n_kv_heads
            found.append((layer, f"{kind}_pre", parts[1] // shared))
        else:
            raise InputError(
                f'{one!r} is no receiver: (layer, head, "q" | "k" | "v"), (layer, "mlp") or "logits"'
            )
    if not found:
        raise InputError("there is no receiver: give one or several")
    return list(dict.fromkeys(found))


def _is_before(model: Any, layer: int, to: _Place) -> bool:
    """Whether what heads of a layer add is read at a place."""
    if to[1] == "resid_post":
        return True
    inside = to[1] == "mlp_in" and not model._vocabulary.architecture.block(layer).parallel
    return layer < to[0] or (inside and layer == to[0])


def _read(model: Any, place: _Place) -> Any:
    layer, name, head = place
    found = model._vocabulary.read(layer, name)
    return found.clone() if head is None else found[:, :, head].clone()
