"""Owns activation patching: values of a clean run put into a corrupted one, cell by cell of a sweep.

Each sweep is one block, so that the planner computes once what its cells share.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ..envoy.names import write_name
from ..tracing.errors import InputError, UnavailableNameError
from ..tracing.proxy import apply
from .names import get_act_name

#: Cells of one block: what a block records for each of them is kept until it runs.
BLOCK = 4096

Setter = Callable[[Any, Sequence[int], Any], Any]
Metric = Callable[[Any], Any]


# -------------------------------------------------------------------- what a cell puts where


def layer_pos_patch_setter(corrupted: Any, index: Sequence[int], clean: Any) -> Any:
    """One position of [batch, pos, ...]; the index is (layer, pos)."""
    _layer, pos = index
    corrupted[:, pos] = clean[:, pos]
    return corrupted


def layer_pos_head_vector_patch_setter(corrupted: Any, index: Sequence[int], clean: Any) -> Any:
    """One head at one position of [batch, pos, head, d_head]; (layer, pos, head)."""
    _layer, pos, head = index
    corrupted[:, pos, head] = clean[:, pos, head]
    return corrupted


def layer_head_vector_patch_setter(corrupted: Any, index: Sequence[int], clean: Any) -> Any:
    """One head at all positions; (layer, head)."""
    _layer, head = index
    corrupted[:, :, head] = clean[:, :, head]
    return corrupted


def layer_head_pattern_patch_setter(corrupted: Any, index: Sequence[int], clean: Any) -> Any:
    """The whole pattern of a head, of [batch, head, query, key]; (layer, head)."""
    _layer, head = index
    corrupted[:, head] = clean[:, head]
    return corrupted


def layer_head_pos_pattern_patch_setter(corrupted: Any, index: Sequence[int], clean: Any) -> Any:
    """One row of a head's pattern; (layer, head, query)."""
    _layer, head, dest = index
    corrupted[:, head, dest] = clean[:, head, dest]
    return corrupted


def layer_head_dest_src_pos_pattern_patch_setter(
    corrupted: Any, index: Sequence[int], clean: Any
) -> Any:
    """One entry of a head's pattern; (layer, head, query, key)."""
    _layer, head, dest, src = index
    corrupted[:, head, dest, src] = clean[:, head, dest, src]
    return corrupted


# -------------------------------------------------------------------- sweeps


def make_df_from_ranges(column_max_ranges: Sequence[int], column_names: Sequence[str]) -> Any:
    """All combinations of indices as a table with one row each. Needs pandas."""
    try:
        import pandas  # type: ignore[import-untyped]
    except ImportError:
        raise InputError("make_df_from_ranges gives a pandas table: pip install pandas") from None
    rows = list(itertools.product(*(range(one) for one in column_max_ranges)))
    return pandas.DataFrame(rows, columns=list(column_names))


def _axis_size(model: Any, name: str, activation: str, tokens: torch.Tensor) -> int:
    if name == "layer":
        return int(model.cfg.n_layers)
    if name in ("pos", "src_pos", "dest_pos"):
        return int(tokens.shape[-1])
    if name in ("head", "head_index"):
        shared = activation.rpartition(".")[2] in ("k", "v", "hook_k", "hook_v")
        return int(model.model.cfg.n_kv_heads if shared else model.model.cfg.n_heads)
    raise InputError(f"`{name}` is no axis of a sweep: layer, pos, head, src_pos or dest_pos")


def generic_activation_patch(
    model: Any,
    corrupted_tokens: Any,
    clean_cache: Any,
    patching_metric: Metric,
    patch_setter: Setter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: Any = None,
    return_index_df: bool = False,
) -> Any:
    """A sweep: for each index, the corrupted run with one part of the clean one, and its metric.

    Args:
        model: a HookedTransformer.
        corrupted_tokens: ids [batch, pos], or text.
        clean_cache: the values of the clean run, with those of `activation_name` in it.
        patching_metric: from logits [batch, pos, d_vocab] to one number. It is recorded, if it is made
            of torch's functions; then only the positions are unembedded that it looks at.
        patch_setter: from the corrupted value, an index and the clean value to the patched value.
        activation_name: "resid_pre", "z", "pattern", …, as `get_act_name` takes it.
        index_axis_names: axes of the result: "layer", "pos", "head_index", "dest_pos", "src_pos".
        index_df: instead, a table with one row for each cell, a layer first.
        return_index_df: give the table of indices, too.

    Returns:
        The metric of each cell, with one axis for each name; [cell] with `index_df`.

    Raises:
        InputError: neither axes nor a table, or both.
        UnavailableNameError: the cache has no such value, or the model no such place.
    """
    tokens = _ids(model, corrupted_tokens)
    if (index_df is None) == (index_axis_names is None):
        raise InputError("give index_axis_names or index_df, one of them")
    shape: list[int] | None = None
    if index_axis_names is not None:
        shape = [_axis_size(model, name, activation_name, tokens) for name in index_axis_names]
        cells = list(itertools.product(*(range(size) for size in shape)))
    else:
        cells = [tuple(int(i) for i in row) for row in _rows(index_df)]
    found = torch.cat(
        [
            _run_cells(
                model,
                tokens,
                clean_cache,
                patching_metric,
                patch_setter,
                activation_name,
                cells[start : start + BLOCK],
            )
            for start in range(0, len(cells), BLOCK)
        ]
    )
    result = found if shape is None else found.reshape(shape)
    if not return_index_df:
        return result
    if index_df is None:
        assert shape is not None and index_axis_names is not None
        index_df = make_df_from_ranges(shape, index_axis_names)
    return result, index_df


def _ids(model: Any, given: Any) -> torch.Tensor:
    ids = model.to_tokens(given) if isinstance(given, (str, list)) else torch.as_tensor(given)
    return ids[None] if ids.ndim == 1 else ids


def _rows(table: Any) -> Iterator[Any]:
    rows = table.itertuples(index=False) if hasattr(table, "itertuples") else table
    return iter(rows)


def _run_cells(
    model: Any,
    tokens: torch.Tensor,
    cache: Any,
    metric: Metric,
    setter: Setter,
    activation: str,
    cells: Sequence[tuple[int, ...]],
) -> torch.Tensor:
    names = {cell[0]: get_act_name(activation, cell[0]) for cell in cells}
    for name in names.values():
        if name not in model._meant:
            raise UnavailableNameError.unknown(name, model._vocabulary.kind, model._meant)
        if name not in cache:
            raise UnavailableNameError(
                f"the clean cache has no `{name}`: it was left out by a filter when it was made"
            )
    prompt = {"input_ids": tokens, "attention_mask": model._tokens.mask_of(tokens)}
    recorded = _records(model, prompt, cache, metric, setter, names, cells[0])
    values = []
    with torch.no_grad(), model.model.trace() as tracer:
        for cell in cells:
            with tracer.invoke(**prompt):
                logits = _cell(model, tracer, cache, setter, names, cell, recorded[0])
                value = metric(logits) if recorded[1] else apply(metric, logits)
                values.append(value.save())
    return torch.stack([torch.as_tensor(one.value).reshape(()).float() for one in values])


def _cell(
    model: Any,
    tracer: Any,
    cache: Any,
    setter: Setter,
    names: dict[int, str],
    cell: tuple[int, ...],
    recorded: bool,
) -> Any:
    """Record the patch of one cell; gives the logits behind it."""
    layer, own = model._meant[names[cell[0]]]
    value = model._vocabulary.read(layer, own)
    clean = cache[names[cell[0]]].to(model.device)
    if own == "scores":  # what is masked has the lowest number in the model
        clean = clean.clamp_min(torch.finfo(clean.dtype).min)
    given = (setter, value, cell, clean)
    patched = setter(value, cell, clean) if recorded else apply(_patched, *given)
    if patched is not value:
        write_name(model.model, model._vocabulary, layer, own, patched)
    return tracer.output.logits


def _patched(setter: Setter, value: torch.Tensor, cell: tuple[int, ...], clean: Any) -> Any:
    return setter(value.clone(), cell, clean)


def _records(
    model: Any,
    prompt: dict[str, Any],
    cache: Any,
    metric: Metric,
    setter: Setter,
    names: dict[int, str],
    cell: tuple[int, ...],
) -> tuple[bool, bool]:
    """Whether setter and metric are made of operations that can be recorded: asked of shapes alone."""

    def works(record: Callable[[Any], None]) -> bool:
        try:
            with model.model.scan(**prompt) as tracer:
                record(tracer)
        except Exception:  # a user's function may raise anything on values without numbers
            return False
        return True

    if not works(lambda tracer: _cell(model, tracer, cache, setter, names, cell, True) and None):
        return False, works(lambda tracer: metric(tracer.output.logits).save() and None)
    return True, works(lambda tracer: metric(tracer.output.logits).save() and None)


def _sweep(activation: str, setter: Setter, *axes: str) -> Callable[..., Any]:
    return partial(
        generic_activation_patch,
        patch_setter=setter,
        activation_name=activation,
        index_axis_names=axes,
    )


get_act_patch_resid_pre = _sweep("resid_pre", layer_pos_patch_setter, "layer", "pos")
get_act_patch_resid_mid = _sweep("resid_mid", layer_pos_patch_setter, "layer", "pos")
get_act_patch_attn_out = _sweep("attn_out", layer_pos_patch_setter, "layer", "pos")
get_act_patch_mlp_out = _sweep("mlp_out", layer_pos_patch_setter, "layer", "pos")

_BY_POS = (layer_pos_head_vector_patch_setter, "layer", "pos", "head")
get_act_patch_attn_head_out_by_pos = _sweep("z", *_BY_POS)
get_act_patch_attn_head_q_by_pos = _sweep("q", *_BY_POS)
get_act_patch_attn_head_k_by_pos = _sweep("k", *_BY_POS)
get_act_patch_attn_head_v_by_pos = _sweep("v", *_BY_POS)
get_act_patch_attn_head_pattern_by_pos = _sweep(
    "pattern", layer_head_pos_pattern_patch_setter, "layer", "head_index", "dest_pos"
)
get_act_patch_attn_head_pattern_dest_src_pos = _sweep(
    "pattern",
    layer_head_dest_src_pos_pattern_patch_setter,
    "layer",
    "head_index",
    "dest_pos",
    "src_pos",
)

_ALL_POS = (layer_head_vector_patch_setter, "layer", "head")
get_act_patch_attn_head_out_all_pos = _sweep("z", *_ALL_POS)
get_act_patch_attn_head_q_all_pos = _sweep("q", *_ALL_POS)
get_act_patch_attn_head_k_all_pos = _sweep("k", *_ALL_POS)
get_act_patch_attn_head_v_all_pos = _sweep("v", *_ALL_POS)
get_act_patch_attn_head_pattern_all_pos = _sweep(
    "pattern", layer_head_pattern_patch_setter, "layer", "head_index"
)


def _widened(parts: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """Sweeps over heads stacked; those of shared keys and values are repeated for each query head."""
    heads = max(part.shape[axis] for part in parts)
    return torch.stack(
        [
            part
            if part.shape[axis] == heads
            else part.repeat_interleave(heads // part.shape[axis], axis)
            for part in parts
        ]
    )


def get_act_patch_attn_head_all_pos_every(
    model: Any, corrupted_tokens: Any, clean_cache: Any, metric: Metric
) -> torch.Tensor:
    """Output, q, k, v and pattern of each head at all positions, [5, layer, head]."""
    sweeps = (
        get_act_patch_attn_head_out_all_pos,
        get_act_patch_attn_head_q_all_pos,
        get_act_patch_attn_head_k_all_pos,
        get_act_patch_attn_head_v_all_pos,
        get_act_patch_attn_head_pattern_all_pos,
    )
    return _widened([s(model, corrupted_tokens, clean_cache, metric) for s in sweeps], -1)


def get_act_patch_attn_head_by_pos_every(
    model: Any, corrupted_tokens: Any, clean_cache: Any, metric: Metric
) -> torch.Tensor:
    """The same at each position, [5, layer, pos, head]."""
    sweeps = (
        get_act_patch_attn_head_out_by_pos,
        get_act_patch_attn_head_q_by_pos,
        get_act_patch_attn_head_k_by_pos,
        get_act_patch_attn_head_v_by_pos,
    )
    found = [s(model, corrupted_tokens, clean_cache, metric) for s in sweeps]
    pattern = get_act_patch_attn_head_pattern_by_pos(model, corrupted_tokens, clean_cache, metric)
    return _widened([*found, pattern.transpose(1, 2)], -1)


def get_act_patch_block_every(
    model: Any, corrupted_tokens: Any, clean_cache: Any, metric: Metric
) -> torch.Tensor:
    """Residual stream, attention and MLP outputs of each layer and position, [3, layer, pos]."""
    sweeps = (get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out)
    return torch.stack([s(model, corrupted_tokens, clean_cache, metric) for s in sweeps])


# -------------------------------------------------------------------- paths


def get_act_patch_direct_path(
    model: Any,
    corrupted_tokens: Any,
    clean_cache: Any,
    patching_metric: Metric,
    sender_layer: int,
    sender_head: int,
    receivers: Sequence[tuple[int, int]] | None = None,
    receiver_input: str = "q",
) -> torch.Tensor:
    """What a head does through the direct path into the queries (keys, values) of later heads.

    In the corrupted run, what one head takes in for its query is changed by the difference that the
    sender makes there; nothing else between them changes.

    Args:
        clean_cache: with "z" of the sender's layer.
        receivers: (layer, head) of each; default all heads of later layers.
        receiver_input: "q", "k" or "v".

    Returns:
        The metric for each receiver, [layer, head]; where nothing was patched, NaN.

    Source: Wang et al. 2022, Interpretability in the Wild.
    """
    if receiver_input not in ("q", "k", "v"):
        raise InputError(f'receiver_input is "q", "k" or "v", not {receiver_input!r}')
    cfg = model.model.cfg
    shared = cfg.n_heads // (cfg.n_heads if receiver_input == "q" else cfg.n_kv_heads)
    every = [(i, h) for i in range(sender_layer + 1, cfg.n_layers) for h in range(cfg.n_heads)]
    cells = list(every if receivers is None else receivers)
    for layer, _ in cells:
        if layer <= sender_layer:
            raise InputError(f"layer {layer} is not behind the sender's layer {sender_layer}")
    tokens = _ids(model, corrupted_tokens)
    prompt = {"input_ids": tokens, "attention_mask": model._tokens.mask_of(tokens)}
    name = get_act_name("z", sender_layer)
    if name not in clean_cache:
        raise UnavailableNameError(f"the clean cache has no `{name}`")
    weight = model.model.layers[sender_layer]["attn.W_O"][sender_head]
    clean = clean_cache[name][:, :, sender_head].to(model.device) @ weight
    result = torch.full((cfg.n_layers, cfg.n_heads), float("nan"))
    if not cells:
        return result
    values = {}
    with torch.no_grad(), model.model.trace() as tracer:
        for layer, head in cells:
            with tracer.invoke(**prompt):
                own = model._vocabulary.read(sender_layer, "head_out")[:, :, sender_head]
                entered = model._vocabulary.read(layer, f"{receiver_input}_input")
                entered[:, :, head // shared] += clean - own
                values[layer, head] = apply(patching_metric, tracer.output.logits).save()
    for (layer, head), value in values.items():
        result[layer, head] = float(value.value)
    return result


def get_act_patch_direct_path_all_sources(
    model: Any,
    corrupted_tokens: Any,
    clean_cache: Any,
    patching_metric: Metric,
    receiver_input: str = "q",
) -> torch.Tensor:
    """The direct path from every head to every later one, [layer, head, layer, head]."""
    cfg = model.model.cfg
    return torch.stack(
        [
            torch.stack(
                [
                    get_act_patch_direct_path(
                        model,
                        corrupted_tokens,
                        clean_cache,
                        patching_metric,
                        layer,
                        head,
                        receiver_input=receiver_input,
                    )
                    for head in range(cfg.n_heads)
                ]
            )
            for layer in range(cfg.n_layers)
        ]
    )
