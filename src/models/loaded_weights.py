"""Owns that a loaded model has the weights of its files: what would be random or left out fails."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from ..tracing.errors import LoadError

#: How many names a message lists.
_LISTED = 6
#: Counters of batches that older files do not have; they are in no result.
_COUNTERS = ("num_batches_tracked",)


def check_weights(
    module: torch.nn.Module, info: Mapping[str, Any], name: str, allowed: Sequence[str]
) -> None:
    """Refuse a model that is not what its files hold.

    Args:
        module: the loaded model.
        info: what `from_pretrained(output_loading_info=True)` tells.
        name: of the checkpoint.
        allowed: patterns of names that may differ, such as "score.*".

    Raises:
        LoadError: weights are missing in the files, have another shape there, or are of a stack of
            blocks that the model has, but without a place in it.
    """

    def rest(names: Iterable[str]) -> list[str]:
        return sorted(
            one for one in names if not any(fnmatchcase(one, pattern) for pattern in allowed)
        )

    kind = type(module).__name__
    shapes = {one: (there, here) for one, there, here in info.get("mismatched_keys") or ()}
    differ = rest(shapes)
    if differ:
        listed = [
            f"`{one}` {list(shapes[one][0])} there and {list(shapes[one][1])} here"
            for one in differ
        ]
        raise LoadError(
            f"{len(differ)} of the weights of {name!r} have other shapes than in a {kind} of its "
            f"configuration: {_list(listed)}. {_remedy(differ)}"
        )
    lacks = rest(one for one in info.get("missing_keys") or () if not one.endswith(_COUNTERS))
    if lacks:
        raise LoadError(
            f"{name!r} has no weights for {len(lacks)} of those of a {kind}, which would be random: "
            f"{_list(f'`{one}`' for one in lacks)}. {_remedy(lacks)}"
        )
    left = rest(one for one in info.get("unexpected_keys") or () if _is_cut_off(module, one))
    if left:
        raise LoadError(
            f"{name!r} has {len(left)} weights in the blocks of a {kind} for which its configuration "
            f"has no place: {_list(f'`{one}`' for one in left)}. Without them it is another model. "
            f"{_remedy(left)}"
        )


def _list(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _LISTED} more" if len(every) > _LISTED else ""
    return ", ".join(every[:_LISTED]) + more


def _remedy(names: Sequence[str]) -> str:
    first = names[0].rpartition(".")[0]
    pattern = f"{first}.*" if first else names[0]
    return (
        "Check `config.json`, or choose the class that was saved by `automodel=`; if it is meant, say "
        f'so: allow_missing=["{pattern}"].'
    )


def _is_cut_off(module: torch.nn.Module, name: str) -> bool:
    """True for a stored weight of a stack of blocks that the model has, but which it does not use.

    A block too many, a bias or a norm that the configuration has switched off. Not the masks and
    tables that older files hold beside their weights, nor another head.
    """
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    return any(
        _has_no_place(module, one.split("."))
        for one in (name, f"{prefix}{name}", name.removeprefix(prefix))
    )


def _has_no_place(module: torch.nn.Module, names: list[str]) -> bool:
    owner, inside = module, False
    while names and names[0] in owner._modules and owner._modules[names[0]] is not None:
        owner = owner._modules[names[0]]  # type: ignore[assignment]
        names = names[1:]
        inside = inside or isinstance(owner, torch.nn.ModuleList)
    if not inside or not names:
        return False
    if isinstance(owner, torch.nn.ModuleList):
        return names[0].isdigit()
    if len(names) == 1:
        return bool(owner._parameters) and names[0] in ("weight", "bias")
    return names[-1] in ("weight", "bias")
