"""Owns a question about the text of forwards: may a module be called more than once in one run?

It is asked where a run would leave the forward after a module's first call, and so never see the
second. A wrong yes costs the rest of that forward; the answer is remembered for each class.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import torch

_LOOPS = (ast.For, ast.While, ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp)


def may_repeat(root: torch.nn.Module, path: str) -> bool:
    """True if the text of a forward above calls the module at `path`, or what it is in, repeatedly."""
    owner = module = root
    listed = ""  # the name of the list or dict that `module` is
    for name in path.split(".") if path else ():
        if type(module).forward is not torch.nn.Module.forward:
            owner, listed = module, ""
        kind: Any = type(owner)
        if (listed or name) in _repeated(kind):
            return True
        listed = listed or name
        module = module._modules[name]  # type: ignore[assignment]
    return False


@functools.cache
def _repeated(kind: Any) -> frozenset[str]:
    """Names of submodules that the forward of a class of modules calls twice, or in a loop."""
    try:
        forward = inspect.unwrap(kind.forward)
        own = forward.__code__.co_varnames[0]
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError, AttributeError, IndexError):
        return frozenset()  # made by `exec` or written in C
    once, found = set[str](), set[str]()
    for name, item, in_loop in _calls(tree, own, False):
        if in_loop or (name in once and not item):
            found.add(name)
        once.add(name)
    return frozenset(found)


def _calls(node: ast.AST, own: str, in_loop: bool) -> Iterator[tuple[str, bool, bool]]:
    """The calls of `self.name` and `self.name[…]`: name, whether it is the second, and in a loop.

    Args:
        own: what the function calls `self`.
    """
    if isinstance(node, ast.Call):
        function = node.func
        item = isinstance(function, ast.Subscript)
        function = function.value if isinstance(function, ast.Subscript) else function
        if (
            isinstance(function, ast.Attribute)
            and isinstance(function.value, ast.Name)
            and function.value.id == own
        ):
            yield function.attr, item, in_loop
    for child in ast.iter_child_nodes(node):
        for found in _calls(child, own, in_loop or isinstance(node, _LOOPS)):
            # One of several ways is no second call: GPT-2 embeds token types where they are given.
            if found[2] or not isinstance(node, ast.If):
                yield found
