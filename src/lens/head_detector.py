"""Owns `detect_head`: how much each head attends as a kind of head would.

Patterns of the kinds, and how one head's attention is compared with one, are in `functions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from ..tracing.errors import InputError, ShapeError, UnavailableNameError, near
from ..tracing.proxy import apply
from .functions import (
    HEAD_DETECTION_PATTERNS,
    ErrorMeasure,
    compute_head_attention_similarity_score,
    is_lower_triangular,
)
from .names import get_act_name
from .patching import record_hooks
from .tokens import is_text

#: (layer, head) of each; or heads by layer.
Heads: TypeAlias = "Sequence[tuple[int, int]] | Mapping[int, int | Sequence[int]] | None"


def detect_head(
    model: Any,
    seq: Any,
    detection_pattern: torch.Tensor | str,
    heads: Heads = None,
    cache: Any = None,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    error_measure: ErrorMeasure = "mul",
) -> torch.Tensor:
    """How well the attention of each head matches a pattern.

    Args:
        model: a HookedTransformer.
        seq: a text, or a list of texts whose scores are averaged; or ids [pos] or [1, pos].
        detection_pattern: "previous_token_head", "duplicate_token_head" or "induction_head"; or
            [query, key], lower triangular, for "mul" of zeros and ones.
        heads: the heads to look at, pairs (layer, head) or a dictionary from layer to one head or
            several; default all.
        cache: the patterns of a run on `seq`, one text. They are not changed.
        exclude_bos: leave out attention to the first token.
        exclude_current_token: leave out attention of each token to itself.
        error_measure: "mul", the part of the attention that lies on the pattern, 0 to 1; or "abs", one
            minus the absolute differences, summed over keys and averaged over queries, -1 to 1.

    Returns:
        [layer, head], float32; -1 for heads that are not in `heads`.

    Raises:
        InputError: an unknown kind of head, a prompt of one token, a cache with several texts, or heads
            that do not exist.
        ShapeError: a pattern that does not fit the prompt.
        UnavailableNameError: the cache has no patterns of a layer.

    Source: TransformerLens, head_detector.py. The kinds: Olsson et al. 2022, In-context Learning and
    Induction Heads; Wang et al. 2022, Interpretability in the Wild.
    """
    if error_measure not in ("mul", "abs"):
        raise InputError(f"The error measure is 'mul' or 'abs', found {error_measure!r}.")
    wanted = _by_layer(model, heads)
    prompts = [_tokens(model, one) for one in (seq if _is_several(seq) else [seq])]
    if cache is not None and len(prompts) > 1:
        raise InputError("A cache is that of one prompt: give one text, or no cache.")
    if not prompts:
        raise InputError("There is no prompt: give a text or several.")
    patterns = [_pattern(one, detection_pattern) for one in prompts]
    options = {
        "exclude_bos": exclude_bos,
        "exclude_current_token": exclude_current_token,
        "error_measure": error_measure,
    }
    if cache is not None:
        cached = {layer: _cached(cache, layer, prompts[0]) for layer in wanted}
        scores = [
            {layer: _scores(cached[layer], patterns[0], wanted[layer], options) for layer in wanted}
        ]
    else:
        found = []
        with torch.no_grad(), model.model.trace() as tracer:
            for ids, pattern in zip(prompts, patterns, strict=True):
                with tracer.invoke(input_ids=ids, attention_mask=torch.ones_like(ids)):
                    record_hooks(model)
                    found.append(
                        {
                            layer: apply(
                                _scores,
                                model._vocabulary.read(layer, "pattern")[0],
                                pattern,
                                wanted[layer],
                                options,
                            ).save()
                            for layer in wanted
                        }
                    )
        scores = [{layer: box.value for layer, box in one.items()} for one in found]
    cfg = model.model.cfg
    result = torch.full((cfg.n_layers, cfg.n_heads), -1.0)
    for layer, some in wanted.items():
        result[layer, some] = torch.stack([one[layer] for one in scores]).mean(0)
    return result


def _is_several(seq: Any) -> bool:
    return isinstance(seq, list | tuple) and (is_text(seq) or isinstance(seq[0], torch.Tensor))


def _tokens(model: Any, given: Any) -> torch.Tensor:
    """Ids [1, pos]."""
    ids = model.to_tokens(given) if isinstance(given, str) else torch.as_tensor(given)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or len(ids) != 1:
        raise InputError(f"A prompt is one text or ids [pos], found ids of {list(ids.shape)}.")
    if ids.shape[1] < 2:
        raise InputError("A prompt of one token has no attention to detect a head by.")
    return ids.long()


def _pattern(ids: torch.Tensor, given: torch.Tensor | str) -> torch.Tensor:
    if isinstance(given, str):
        if given not in HEAD_DETECTION_PATTERNS:
            hint = near(given, HEAD_DETECTION_PATTERNS)
            raise InputError(f"No kind of head is called {given!r}. {hint}")
        return HEAD_DETECTION_PATTERNS[given](ids.cpu())
    if not is_lower_triangular(given) or len(given) != ids.shape[1]:
        raise ShapeError(
            f"The detection pattern is a lower triangular matrix of one row for each token: the "
            f"prompt has {ids.shape[1]}, and the pattern's shape is {list(given.shape)}."
        )
    return given.cpu()


def _by_layer(model: Any, heads: Heads) -> dict[int, list[int]]:
    cfg = model.model.cfg
    if heads is None:
        return {layer: list(range(cfg.n_heads)) for layer in range(cfg.n_layers)}
    if isinstance(heads, Mapping):
        pairs = [
            (layer, head)
            for layer, some in heads.items()
            for head in ([some] if isinstance(some, int) else some)
        ]
    else:
        pairs = [(layer, head) for layer, head in heads]
    found: dict[int, list[int]] = {}
    for layer, head in pairs:
        if not (0 <= layer < cfg.n_layers and 0 <= head < cfg.n_heads):
            raise InputError(
                f"There is no head ({layer}, {head}): the model has {cfg.n_layers} layers of "
                f"{cfg.n_heads} heads."
            )
        found.setdefault(layer, []).append(head)
    return {layer: list(dict.fromkeys(some)) for layer, some in found.items()}


def _cached(cache: Any, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """Patterns [head, query, key] of a layer."""
    name = get_act_name("pattern", layer)
    if name not in cache:
        raise UnavailableNameError(f"the cache has no `{name}`: it was left out when it was made")
    found: torch.Tensor = cache[name]
    if found.ndim == 4:
        if len(found) != 1:
            raise InputError(f"The cache has {len(found)} prompts: give that of one.")
        found = found[0]
    if found.shape[-1] != ids.shape[1]:
        raise ShapeError(
            f"The cache is of a prompt of {found.shape[-1]} tokens, and this one has {ids.shape[1]}."
        )
    return found


def _scores(
    patterns: torch.Tensor, detection: torch.Tensor, heads: Sequence[int], options: dict[str, Any]
) -> torch.Tensor:
    """The scores of some heads, [head], of patterns [head, query, key]."""
    patterns = patterns.detach().float().cpu()
    return torch.tensor(
        [
            compute_head_attention_similarity_score(patterns[head], detection, **options)
            for head in heads
        ]
    )
