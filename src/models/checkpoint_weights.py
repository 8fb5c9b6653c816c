"""Owns reading one weight from the files of a checkpoint, without loading the model.

What is read is the weight's part of one safetensors file, and that file's header. Which part it is, and
how it is turned, follows from the skeleton. The weights of a loaded model are `Weights`, not here.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..tracing.errors import InputError, LoadError, UnavailableNameError
from .architectures import Weight
from .checkpoint_files import opened
from .loading import Checkpoint
from .weights import Weights, oriented, shares

logger = logging.getLogger("graftwork")

#: Options of `from_pretrained` with which a model has other weights than its safetensors files.
_OTHER_WEIGHTS = ("gguf_file", "quantization_config")
#: Rows between those of a weight are read with them where they are at most this part of all.
_BETWEEN = 0.05


class _NotAsStoredError(Exception):
    """The files do not hold a weight as the model has it; the text says why."""


def read_weight(model: Any, layer: int | None, name: str) -> torch.Tensor:
    """A weight by unified name; of a model that is not loaded, from its checkpoint's files.

    A loaded model gives its own memory, as `model.layers[layer][name]` does. One that is not stays so
    (`model.loaded` remains False), and the result is a copy. Of fused projections, the columns or rows
    of the weight are read; of a checkpoint on the hub, only the file that holds it is fetched.

    Where the files do not hold the weight as the model has it (other formats than safetensors, weights
    that are quantized, merged or split while they are loaded), the model is loaded, with a warning.

    Args:
        model: a `LanguageModel`, or another model that has unified names.
        layer: from 0; None for the model's own weights, such as "embed.W_E".
        name: such as "attn.W_Q".

    Returns:
        The weight in the orientation of its name, such as [head, d_model, d_head], on the CPU if it was
        read, in the dtype that it has when the model is loaded; without gradients.

    Raises:
        UnavailableNameError: there is no such weight, or no such layer.
        InputError: the weight is one of a layer, and none is given.
        LoadError: the files are damaged or incomplete, or do not fit the configuration.

    Example:
        model = LanguageModel("meta-llama/Llama-3.1-70B")
        W_in = read_weight(model, 40, "mlp.W_in")        # [d_model, d_mlp], 470 MB of 141 GB
    """
    weights, weight = _find(model, layer, name)
    if not model.loaded and name in weights:
        try:
            return _read(model, weights.path(name), weight)
        except _NotAsStoredError as reason:
            logger.warning(
                "reading `%s` loads the whole of %r: %s", name, model._checkpoint.name, reason
            )
    return weights[name]


def _find(model: Any, layer: int | None, name: str) -> tuple[Weights, Weight]:
    """The table that has a weight, and where the weight is."""
    vocabulary = model._model_names()
    architecture, count = vocabulary.architecture, len(vocabulary)
    if layer is None:
        weights, table = vocabulary.model_weights(), architecture.weights
        if name not in table and name in architecture.block(0).weights:
            raise InputError(f"`{name}` is in every layer: give one, 0 to {count - 1}.")
    else:
        if isinstance(layer, bool) or not 0 <= layer < count:
            raise UnavailableNameError.no_layer(layer, count)
        weights, table = vocabulary.layer_weights(layer), architecture.block(layer).weights
    if name not in table:
        raise UnavailableNameError.weight(name, vocabulary.kind, weights)
    return weights, table[name]


# -------------------------------------------------------------------- files


def _read(model: Any, path: str, weight: Weight) -> torch.Tensor:
    """A weight of the module at `path`, oriented.

    Raises:
        _NotAsStoredError: see there.
    """
    checkpoint, skeleton, sizes = model._checkpoint, model.module_tree(), model.cfg
    module = skeleton.get_submodule(path)
    parameter = getattr(module, weight.parameter)
    files = _files(checkpoint)
    key = _key(model, parameter, files)
    file = checkpoint.files.path(files[key])
    if file is None:
        raise LoadError(
            f"{checkpoint.name!r} has no file {files[key]!r}, which its index names for `{key}`: the "
            "checkpoint is incomplete."
        )
    meta = torch.empty(parameter.shape, device="meta")
    view = oriented(module, weight, meta, sizes)
    with opened(file) as handle:
        shape = handle.get_slice(key).get_shape()
        if tuple(shape) != tuple(meta.shape):
            raise LoadError(
                f"`{key}` has the shape {list(shape)} in {files[key]!r}, and by the configuration it "
                f"is {list(meta.shape)}."
            )
        if view.numel() == meta.numel() or not shares(view, meta) or meta.ndim > 2:
            whole = handle.get_tensor(key)
            whole = whole.to(_dtype(checkpoint, skeleton, path, whole.dtype))
            found: torch.Tensor = oriented(module, weight, whole, sizes)
            return found
    # Slices are views of a mapped file: bytes are read where they are copied, and theirs alone.
    with opened(file, mapped=True) as handle:
        part = _part(
            handle.get_slice(key), meta.shape, view.shape, view.stride(), view.storage_offset()
        )
        return part.to(_dtype(checkpoint, skeleton, path, part.dtype), copy=True)


def _files(checkpoint: Checkpoint) -> dict[str, str]:
    """The name of the file that has each stored tensor.

    Raises:
        _NotAsStoredError: there are none to be read, or the model does not have what is in them.
    """
    options, config = {**checkpoint._options, **checkpoint._dtype}, checkpoint.config
    changed = any(options.get(one) is not None for one in _OTHER_WEIGHTS)
    if changed or getattr(config, "quantization_config", None) is not None:
        raise _NotAsStoredError("its weights are not those of its files, but made from them")
    found = None
    if options.get("use_safetensors") is not False:
        named = getattr(config, "transformers_weights", None)
        found = checkpoint.files.tensors(options.get("variant"), named)
    if found is None:
        raise _NotAsStoredError("it has no safetensors files, and others cannot be read in parts")
    return found


# -------------------------------------------------------------------- names


def _key(model: Any, parameter: torch.Tensor, keys: Iterable[str]) -> str:
    """The name in the files of a parameter of the skeleton, by the rules that transformers loads with.

    They add or leave out the prefix of the base model and know older names. A tied parameter may be
    stored under any of its names.

    Raises:
        _NotAsStoredError: it is made of others, or others are made of it.
        LoadError: it is not in the files.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    checkpoint, skeleton = model._checkpoint, model.module_tree()
    own = dict(skeleton.named_parameters(remove_duplicate=False))
    names = [name for name, one in own.items() if one is parameter]
    rules = get_model_conversion_mapping(skeleton, checkpoint._options.get("key_mapping"))
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings: list[Any] = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    found: dict[str, str] = {}
    for key in keys:
        name, converted = rename_source_key(
            key, renamings, converters, skeleton.base_model_prefix, own
        )
        if name in names:
            if converted is not None:
                raise _NotAsStoredError(f"transformers converts `{key}` while it loads")
            found.setdefault(name, key)
    for name in names:
        if name in found:
            return found[name]
    if converters:
        raise _NotAsStoredError(f"`{names[0]}` is not in its files under this name")
    raise LoadError(
        f"{checkpoint.name!r} has no tensor for `{names[0]}`: loading the model would be refused."
    )


def _dtype(checkpoint: Checkpoint, skeleton: Any, path: str, stored: torch.dtype) -> torch.dtype:
    """The dtype that a weight has once the model is loaded."""
    given = checkpoint._dtype.get("dtype")
    wanted = given if isinstance(given, torch.dtype) else getattr(checkpoint.config, "dtype", None)
    if not isinstance(wanted, torch.dtype) or not stored.is_floating_point:
        return stored
    # Modules that transformers keeps in single precision, such as `wo` of T5.
    single: list[str] = list(getattr(skeleton, "_keep_in_fp32_modules_strict", None) or ())
    if wanted == torch.float16:
        single += getattr(skeleton, "_keep_in_fp32_modules", None) or ()
    if wanted.itemsize == 2 and any(re.search(rf"(^|\.){one}($|\.)", path) for one in single):
        return torch.float32
    return wanted


# -------------------------------------------------------------------- parts of a tensor


def _part(
    stored: Any, whole: Sequence[int], shape: Sequence[int], stride: Sequence[int], offset: int
) -> torch.Tensor:
    """The view of a stored tensor that `shape`, `stride` and `offset` describe.

    Args:
        stored: what `get_slice` gives, of one or two axes.
        whole: its shape.
        stride, offset: in elements, as if the stored tensor were contiguous.
    """
    # A step along an axis of the view is a number of rows or a number of columns.
    width = whole[1] if len(whole) > 1 else 1
    axes = [(n, step) if n > 1 else (1, 0) for n, step in zip(shape, stride, strict=True)]
    row, column = divmod(offset, width)
    rows = [(n, step // width) for n, step in axes if step and step % width == 0]
    columns = [(n, step) for n, step in axes if step % width]
    height, breadth = (1 + sum((n - 1) * step for n, step in one) for one in (rows, columns))
    if column + breadth > width:  # steps that change both, such as a diagonal's
        return torch.as_strided(stored[:].contiguous(), shape, stride, offset)
    wanted = math.prod(n for n, _ in rows)
    if height > wanted * (1 + _BETWEEN) and len(rows) > 1:
        axis = max(range(len(axes)), key=lambda one: axes[one][1])
        n, step = axes[axis]
        fewer, steps = ([*one[:axis], *one[axis + 1 :]] for one in (shape, stride))
        parts = (_part(stored, whole, fewer, steps, offset + i * step) for i in range(n))
        return torch.stack(list(parts), axis)
    block: torch.Tensor
    if len(whole) == 1:
        block = stored[row : row + height].unsqueeze(1)
    elif breadth == width:
        block = stored[row : row + height]
    else:
        block = stored[row : row + height, column : column + breadth]
    down, along = block.stride(0), block.stride(1)
    own = [step // width * down if step % width == 0 else step * along for _, step in axes]
    return block.as_strided(shape, own, block.storage_offset())
