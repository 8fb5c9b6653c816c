"""Owns activation patching: values of a clean run put into a corrupted one, cell by cell of a sweep.

Each sweep is one block, so that the planner computes once what its cells share.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ..envoy.names import Missing, write_name
from ..envoy.spellings import LENS
from ..tracing.errors import InputError, UnavailableNameError
from ..tracing.proxy import apply
from .names import get_act_name

#: Cells of one block: what a block records for each of them is kept until it runs.
BLOCK = 4096

Setter = Callable[[Any, Sequence[int], Any], Any]
Metric = Callable[[Any], Any]
Head = tuple[int, int]


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
        shared = get_act_name(activation, 0).rpartition("hook_")[2] in ("k", "v", "rot_k")
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
        patch_setter: from the corrupted value, an index and the clean value to the patched value. It
            may change the corrupted value in place and return that, or nothing.
        activation_name: "resid_pre", "z", "pattern", …, as `get_act_name` takes it.
        index_axis_names: axes of the result: "layer", "pos", "head_index", "dest_pos", "src_pos".
        index_df: instead, a table with one row for each cell, a layer first.
        return_index_df: give the table of indices, too.

    Hook functions that the model has stay in force, before the patch.

    Returns:
        The metric of each cell, with one axis for each name; [cell] with `index_df`.

    Raises:
        InputError: neither axes nor a table, or both; a metric that gives several numbers.
        UnavailableNameError: the cache has no such value, or the model no such place.
    """
    prompt = prompt_of(model, corrupted_tokens)
    tokens = prompt["input_ids"]
    if (index_df is None) == (index_axis_names is None):
        raise InputError("give index_axis_names or index_df, one of them")
    shape: list[int] | None = None
    if index_axis_names is not None:
        shape = [_axis_size(model, name, activation_name, tokens) for name in index_axis_names]
        cells = list(itertools.product(*(range(size) for size in shape)))
    else:
        cells = [tuple(int(i) for i in row) for row in _rows(index_df)]
    given = (model, prompt, clean_cache, patching_metric, patch_setter, activation_name)
    blocks = [cells[start : start + BLOCK] for start in range(0, len(cells), BLOCK)]
    found = torch.cat([_run_cells(*given, block) for block in blocks] or [torch.zeros(0)])
    result = found if shape is None else found.reshape(shape)
    if not return_index_df:
        return result
    if index_df is None:
        assert shape is not None and index_axis_names is not None
        index_df = make_df_from_ranges(shape, index_axis_names)
    return result, index_df


def _rows(table: Any) -> Iterator[Any]:
    rows = table.itertuples(index=False) if hasattr(table, "itertuples") else table
    return iter(rows)


def prompt_of(model: Any, given: Any) -> dict[str, torch.Tensor]:
    """What an invoke is given for text, texts or ids: ids and mask [batch, pos], as in `forward`."""
    prompt = model._prompt(given, None, None, None, None, None, True)
    return {"input_ids": prompt.ids, "attention_mask": prompt.attended}


def check_name(model: Any, name: str, cache: Any = None) -> None:
    """Refuse a full name that the model, or the cache, does not have."""
    if name not in model._meant:
        _, layer, rest = [*name.split(".", 2), "", ""][:3]
        vocabulary = model._vocabulary
        if layer.isdigit() and int(layer) >= len(vocabulary):
            raise UnavailableNameError.no_layer(int(layer), len(vocabulary))
        places = vocabulary.layer_places(int(layer)) if layer.isdigit() else {}
        place = places.get(LENS.get(rest, ""))
        if isinstance(place, Missing):
            raise UnavailableNameError.missing(name, vocabulary.kind, place.reason)
        raise UnavailableNameError.unknown(name, vocabulary.kind, model._meant)
    if cache is not None and name not in cache:
        raise UnavailableNameError(
            f"the clean cache has no `{name}`: it was left out by a filter when it was made"
        )


def _run_cells(
    model: Any,
    prompt: dict[str, torch.Tensor],
    cache: Any,
    metric: Metric,
    setter: Setter,
    activation: str,
    cells: Sequence[tuple[int, ...]],
) -> torch.Tensor:
    names = {cell[0]: get_act_name(activation, cell[0]) for cell in cells}
    for name in names.values():
        check_name(model, name, cache)

    def patch(cell: tuple[int, ...], recorded: bool) -> None:
        _patch(model, cache, setter, names[cell[0]], cell, recorded)

    recorded = can_record(model, prompt, lambda _: patch(cells[0], True))
    values = _measured(model, prompt, metric, [partial(patch, one, recorded) for one in cells])
    return torch.stack(values)


def _measured(
    model: Any,
    prompt: dict[str, torch.Tensor],
    metric: Metric,
    changes: Sequence[Callable[[], None]],
) -> list[torch.Tensor]:
    """The metric of a prompt with each of several changes: one block."""
    recorded = can_record(model, prompt, lambda tracer: metric(tracer.output.logits).save())
    unembedded = model.unembeds_last
    values = []
    with torch.no_grad(), model.model.trace() as tracer:
        for change in changes:
            with tracer.invoke(**prompt):
                record_hooks(model)
                change()
                # Of the unembedding alone, the planner can compute the positions that are used.
                read = model._vocabulary.read
                logits = read(-1, "unembed_out") if unembedded else tracer.output.logits
                value = metric(logits) if recorded else apply(metric, logits)
                values.append(value.save())
    return [number_of(one.value) for one in values]


def number_of(value: Any) -> torch.Tensor:
    """What a metric gave, as a number: a tensor without dimensions."""
    found = torch.as_tensor(value)
    if found.numel() != 1:
        raise InputError(f"the metric gives one number for each run, not {list(found.shape)}")
    found = found.detach().reshape(())
    return found if found.is_floating_point() else found.float()


def record_hooks(model: Any) -> None:
    """Record the hook functions that the model has at present, first in an invoke."""
    active = {point.name: point for point in model._hooks.active()}
    for name, (layer, own) in model._meant.items() if active else ():
        if name in active:
            value = model._hooked(model._vocabulary.read(layer, own), active[name])
            write_name(model.model, model._vocabulary, layer, own, value)


def _patch(
    model: Any, cache: Any, setter: Setter, name: str, cell: tuple[int, ...], recorded: bool
) -> None:
    """Record the patch of one cell."""
    layer, own = model._meant[name]
    value = model._vocabulary.read(layer, own)
    clean = cache[name].to(model.device)
    if own == "scores":  # what is masked has the lowest number in the model
        clean = clean.clamp_min(torch.finfo(clean.dtype).min)
    given = (setter, value, cell, clean)
    patched = setter(value, cell, clean) if recorded else apply(_patched, *given)
    if patched is not None and patched is not value:
        write_name(model.model, model._vocabulary, layer, own, patched)


def _patched(setter: Setter, value: torch.Tensor, cell: tuple[int, ...], clean: Any) -> Any:
    value = value.clone()
    found = setter(value, cell, clean)
    return value if found is None else found  # it may have changed the value in place


def can_record(model: Any, prompt: dict[str, torch.Tensor], record: Callable[[Any], Any]) -> bool:
    """Whether a user's function is made of operations that can be recorded: asked of shapes alone."""
    try:
        with model.model.scan(**prompt) as tracer:
            record(tracer)
    except Exception:  # a user's function may raise anything on values without numbers
        return False
    return True


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
    cfg = model.model.cfg
    every = [(i, h) for i in range(sender_layer + 1, cfg.n_layers) for h in range(cfg.n_heads)]
    cells = list(every if receivers is None else receivers)
    for layer, _ in cells:
        if layer <= sender_layer:
            raise InputError(f"layer {layer} is not behind the sender's layer {sender_layer}")
    paths = [((sender_layer, sender_head), one) for one in cells]
    given = (model, corrupted_tokens, clean_cache, patching_metric, receiver_input)
    return _direct_paths(*given, paths)[sender_layer, sender_head]


def get_act_patch_direct_path_all_sources(
    model: Any,
    corrupted_tokens: Any,
    clean_cache: Any,
    patching_metric: Metric,
    receiver_input: str = "q",
) -> torch.Tensor:
    """The direct path from every head to every later one, [layer, head, layer, head]; else NaN."""
    cfg = model.model.cfg
    heads = list(itertools.product(range(cfg.n_layers), range(cfg.n_heads)))
    paths = [(one, other) for one in heads for other in heads if one[0] < other[0]]
    given = (model, corrupted_tokens, clean_cache, patching_metric, receiver_input)
    return _direct_paths(*given, paths)


def _direct_paths(
    model: Any,
    corrupted_tokens: Any,
    cache: Any,
    metric: Metric,
    receiver_input: str,
    paths: Sequence[tuple[Head, Head]],
) -> torch.Tensor:
    """The metric of each path from head to head, [layer, head, layer, head]; elsewhere NaN."""
    if receiver_input not in ("q", "k", "v"):
        raise InputError(f'receiver_input is "q", "k" or "v", not {receiver_input!r}')
    cfg, layers = model.model.cfg, model.model.layers
    check_name(model, get_act_name("z", 0))
    # Heads that share keys and values read them once.
    shared = cfg.n_heads // (cfg.n_heads if receiver_input == "q" else cfg.n_kv_heads)
    clean = {}
    for layer, head in dict.fromkeys(sender for sender, _ in paths):
        name = get_act_name("z", layer)
        check_name(model, name, cache)
        block = model._vocabulary.architecture.block(layer)
        if block.post_norm or "ln1_post" in block.norms:
            raise UnavailableNameError(
                f"what a head of {model._vocabulary.kind} gives is normalized before or after it is "
                "added to the stream, so that it has no direct path."
            )
        z = cache[name][:, :, head].to(model.device)
        clean[layer, head] = z @ layers[layer]["attn.W_O"][head].to(z)

    def patch(sender: Head, layer: int, head: int) -> None:
        own = model._vocabulary.read(sender[0], "head_out")[:, :, sender[1]]
        entered = model._vocabulary.read(layer, f"{receiver_input}_input")
        entered[:, :, head] += clean[sender] - own

    cells = dict.fromkeys((sender, (i, head // shared)) for sender, (i, head) in paths)
    changes = [partial(patch, sender, *receiver) for sender, receiver in cells]
    prompt, values = prompt_of(model, corrupted_tokens), list[torch.Tensor]()
    for start in range(0, len(changes), BLOCK):
        values += _measured(model, prompt, metric, changes[start : start + BLOCK])
    found = dict(zip(cells, values, strict=True))
    heads = (cfg.n_layers, cfg.n_heads)
    result = torch.full((*heads, *heads), float("nan"))
    if values:
        result = result.to(values[0])
    for sender, (layer, head) in paths:
        place = (*sender, layer, head)
        result[place] = found[sender, (layer, head // shared)]
    return result
