"""Owns what is particular to an architecture: declared aliases, and how its positions behave."""

from __future__ import annotations

from typing import Any

import torch

from ...envoy import Alias
from . import gpt2

#: Aliases by the name of the module's class.
ALIASES: dict[str, dict[str, Alias]] = {**gpt2.ALIASES}

#: Architectures that take no position ids and still compute the same for a prompt with left padding:
#: their positions are relative (alibi), or padded inputs are zeroed before the recurrence.
_PADS_WITHOUT_POSITIONS = frozenset({"bloom", "mpt", "mamba", "mamba2"})


def alias_of(module: torch.nn.Module, name: str) -> Alias | None:
    """What the architecture declares under `name` on a module of that class."""
    return ALIASES.get(type(module).__name__, {}).get(name)


def pads_without_positions(config: Any) -> bool:
    """True if a left-padded prompt needs no position ids on this architecture."""
    return config.model_type in _PADS_WITHOUT_POSITIONS
