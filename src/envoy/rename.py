"""Owns names that a user gives to modules: `LanguageModel(..., rename={"transformer": "model"})`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..tracing.errors import LoadError, near

#: Which module a name means, below a path.
Names = dict[tuple[str, str], str]


def names_of(
    tree: torch.nn.Module,
    rename: Mapping[Any, Any],
    taken: Callable[[torch.nn.Module, str], bool],
) -> Names:
    """The module, by path, that each new name means below each path.

    Args:
        tree: the module tree.
        rename: for each module its new name, or a list of them. A module is named by its own name
            ("attn": wherever it occurs, the new one stands beside it), by its path from the root
            ("transformer.h": the new name stands at the root), or by its class (beside each).
        taken: whether a name has a meaning already below a module.

    Raises:
        LoadError: a name is taken, or nothing is called so.
    """
    modules = dict(tree.named_modules())
    found: Names = {}
    for key, given in rename.items():
        places = list(_places(key, modules))
        if not places:
            known = {path.rpartition(".")[2] for path in modules if path}
            known |= set(modules) if isinstance(key, str) and "." in key else set()
            raise LoadError(f"rename=: no module is called {_text(key)}. {near(str(key), known)}")
        for name in list(given) if isinstance(given, (list, tuple)) else [given]:
            new = name.removeprefix(".") if isinstance(name, str) else ""
            if not new.isidentifier():
                raise LoadError(f"rename=: {name!r} for {_text(key)} is no name without dots.")
            for parent, path in places:
                before = found.setdefault((parent, new), path)
                if before != path:
                    raise LoadError(f"rename=: `{new}` would mean `{before}` and `{path}`.")
                if taken(modules[parent], new):
                    where = f"`{parent}`" if parent else "the model"
                    raise LoadError(f"rename=: {where} has a `{new}` already.")
    return found


def _text(key: Any) -> str:
    return f"`{key}`" if isinstance(key, str) else f"of the class {getattr(key, '__name__', key)}"


def _places(key: Any, modules: dict[str, torch.nn.Module]) -> Iterator[tuple[str, str]]:
    """Below which path the new name of a module stands, and its path."""
    if isinstance(key, str) and "." in key:
        path = key.removeprefix(".")
        if path in modules:
            yield "", path
        return
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        if path and (name == key if isinstance(key, str) else type(module) is key):
            yield parent, path
