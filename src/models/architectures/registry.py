"""Owns the registry: which file knows an architecture, and what is declared of a module's class."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import torch

from ...envoy import Alias
from .architecture import Architecture

_DECLARED: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {}
_ALIASES: dict[str, dict[str, Alias]] = {}
_read = False


def register(
    *model_types: str, stacks: tuple[str, ...] = ("layers",)
) -> Callable[[Callable[..., Architecture]], Callable[..., Architecture]]:
    """Declare the vocabulary of model types: the decorated function gives it for a configuration.

    Args:
        *model_types: as in `config.model_type`. The last declaration of one counts.
        stacks: of an encoder-decoder model, what its stacks are called; the function gets the name.
    """

    def declare(function: Callable[..., Architecture]) -> Callable[..., Architecture]:
        for model_type in model_types:
            _DECLARED[model_type] = (function, stacks)
        return function

    return declare


def declare_aliases(kind: str, aliases: dict[str, Alias]) -> None:
    """Declare further names on every module of a class."""
    _ALIASES.setdefault(kind, {}).update(aliases)


def _all() -> dict[str, tuple[Callable[..., Any], tuple[str, ...]]]:
    """Every declaration, those of this folder read first."""
    global _read
    if not _read:
        _read = True
        own = dict(_DECLARED)
        for module in pkgutil.iter_modules(_folder()):
            importlib.import_module(f"{__package__}.{module.name}")
        _DECLARED.update(own)
    return _DECLARED


def _folder() -> list[str]:
    return list(importlib.import_module(__package__ or "").__path__)


def declared() -> list[str]:
    """The model types that have a file."""
    return sorted(_all())


def stacks_of(config: Any) -> tuple[str, ...] | None:
    """The stacks of blocks that are declared for a configuration; None for unknown ones."""
    found = _all().get(config.model_type)
    return None if found is None else found[1]


def architecture_of(config: Any, stack: str = "layers") -> Architecture | None:
    """What is declared for a configuration."""
    found = _all().get(config.model_type)
    if found is None:
        return None
    function, stacks = found
    result: Architecture = function(config) if stacks == ("layers",) else function(config, stack)
    return result


def alias_of(module: torch.nn.Module, name: str) -> Alias | None:
    """What the architecture declares under `name` on a module of that class."""
    _all()
    return _ALIASES.get(type(module).__name__, {}).get(name)
