"""Owns the lasting edits of a model: recording them, checking that they fit, keeping them in a file."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any, Protocol

import torch

from ..engines.scan import check
from ..envoy import Envoy
from ..intervention import at_path
from ..tracing.context import Tracer
from ..tracing.edit import Edit, name_kinds
from ..tracing.errors import (
    EditError,
    GraftworkError,
    LimitError,
    OperationError,
    ScheduleError,
    near,
)
from ..tracing.graph import Graph
from ..tracing.limits import LIMITS, Limits
from ..tracing.node import MODULE, PARAMETER, READ, WRITE
from ..tracing.proxy import BlockHandle, Handle
from ..tracing.states import Kept
from ..tracing.structure import leaves
from ..tracing.template import Template
from ..tracing.wire import pack, unpack

_KIND = "edits of a model"


class Held:
    """What a model and its edited views share.

    Attributes:
        module: the model itself; None until it is loaded.
        skeleton: its tree on the meta device; None until it is needed.
        attached: the modules that were attached, by path.
        fingerprint: of the module that the skeleton stands for; None until there are both.
        changes: how often the module was found to be another than that.
    """

    def __init__(self) -> None:
        self.module: torch.nn.Module | None = None
        self.skeleton: torch.nn.Module | None = None
        self.attached: dict[str, torch.nn.Module] = {}
        self.fingerprint: int | None = None
        self.changes = 0

    def find(self, path: str) -> torch.nn.Module | None:
        """The attached module at a path, or the module inside an attached one."""
        for place, module in self.attached.items():
            if path == place:
                return module
            if path.startswith(f"{place}."):
                inner: Any = module
                for name in path[len(place) + 1 :].split("."):
                    inner = inner._modules.get(name)
                    if inner is None:
                        break
                if inner is not None:
                    return inner  # type: ignore[no-any-return]
        return None


class Absent(torch.nn.Module):
    """Stands for an attached module whose edits come from a file: its places have names, no more."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise EditError(
            "This module was attached when its edits were saved. The file has what it did in them, not "
            "the module: attach it again to call it anew."
        )


class Editable(Protocol):
    """What edits ask of a model."""

    _envoys: dict[str, Envoy]
    _edits: Template | None
    _held: Held
    _root: Any

    def module_tree(self) -> torch.nn.Module: ...

    def sample_prompt(self) -> Any: ...

    def is_block(self, module: torch.nn.Module) -> bool: ...

    def submodule(self, path: str) -> torch.nn.Module: ...


def record(model: Any, inplace: bool) -> Edit:
    """A block that records edits, on top of those that there are."""
    target = model
    if not inplace:
        _ = model.hooks  # a view has the policies of its model
        target = copy.copy(model)
        target._root, target._envoys = target, {}

        model.lasting_edits()  # refused on a view whose own edits were never recorded

    def done(tracer: Tracer, template: Template) -> None:
        _check(tracer)
        target._edits = template
        if not inplace:
            target._unfinished = None

    edit = Edit(model, model, model.sample_prompt(), target, model._edits, done)
    if not inplace:
        target._unfinished = edit.location
    return edit


def _check(tracer: Tracer, most: int | None = None) -> None:
    """Refuse edits whose shapes do not fit, where the model can be measured.

    Args:
        most: numbers in a tensor that they compute; None for those of the user's own edit.
    """
    oracle: Any = tracer.recording.oracle
    try:
        for node, value, _ in check(tracer.graph, oracle):
            if most is None:
                continue
            for leaf in leaves(value):
                if isinstance(leaf, torch.Tensor) and leaf.numel() > most:
                    raise LimitError.elements(node.describe(), node.location, leaf.shape, most)
    except ScheduleError:
        return  # then the run will tell


def attach(model: Editable, path: str, name: str, module: torch.nn.Module | None) -> None:
    """Attach a module below a path; None takes it away."""
    place = f"{path}.{name}" if path else name
    held = model._held
    if module is None:
        if held.attached.pop(place, None) is None:
            raise OperationError(f"nothing is attached at `{place}`. {near(place, held.attached)}")
        model._envoys.pop(place, None)
        return
    owner = model.submodule(path)
    own = type(model) if not path else Envoy
    if name in owner._modules or name in owner._parameters or hasattr(owner, name):
        raise OperationError(
            f"`{place}` is part of the model, which stays as it is: attach the module under another "
            "name, or edit what the model's own module gives."
        )
    if hasattr(own, name):
        raise OperationError(f"`{name}` has a meaning here: attach the module under another name.")
    held.attached[place] = module


def save(model: Editable, file: str | os.PathLike[str]) -> None:
    """Write the edits of a model to one file."""
    if model._edits is None:
        raise EditError("This model has no edits to save: record some with `model.edit()`.")
    template, graph = model._edits, Graph()
    graph.nodes, graph.writes = template.nodes, template.writes
    description = {
        "kind": _KIND,
        "model": type(model.module_tree()).__name__,
        "states": json.dumps([kept.written() for kept in template.states]),
    }
    packed = pack(graph, extra=description)
    try:
        Path(file).write_bytes(packed)
    except OSError as error:
        raise EditError.file("written to", str(file), error) from error


def load(model: Any, file: str | os.PathLike[str], limits: Limits = LIMITS) -> None:
    """Add the edits of a file to those of a model."""
    try:
        packed = Path(file).read_bytes()
    except OSError as error:
        raise EditError.file("read from", str(file), error) from error
    package = unpack(packed, limits)
    if package.extra.get("kind") != _KIND:
        raise EditError(
            f"`{file}` holds a graph, but no edits: it was not written by `save_edits`."
        )
    graph, of = package.graph, package.extra.get("model", "another model")
    if any(node.invoke != 0 for node in graph.nodes) or graph.saves or graph.backwards:
        raise EditError(f"`{file}` holds operations that no edit has.")
    attached = _places(graph, model, str(file), of)

    def kind(path: str) -> type[Handle]:
        if any(path == one or path.startswith(f"{one}.") for one in attached):
            return Handle
        return BlockHandle if model.is_block(model.submodule(path)) else Handle

    template = Template(graph.nodes, graph.writes, {}, needs_grad=graph.needs_grad, lasting=True)
    name_kinds(template, kind)
    edit = record(model, inplace=True)
    try:
        states = json.loads(package.extra.get("states", "[]"))
        template.states = [Kept.read(one, graph.nodes) for one in states]
        template.place(edit.recording, 0)
        taken = edit.take()
        _check(edit, limits.elements)
    except GraftworkError as error:
        raise EditError.misfit(str(file), of, _own(model), str(error)) from error
    except Exception as error:  # whatever torch says of shapes that do not fit
        raise EditError.misfit(str(file), of, _own(model), str(error)) from error
    finally:
        edit.recording.close("abandoned")
    for place, module in attached.items():
        model._held.attached.setdefault(place, module)
    model._edits = taken


def _own(model: Editable) -> str:
    return type(model.module_tree()).__name__


def _places(graph: Graph, model: Editable, file: str, of: str) -> dict[str, torch.nn.Module]:
    """Stand-ins for the attached modules of a file, by path.

    Raises:
        EditError: the model has no such module.
    """
    inside = {point.path for _, point in graph.passed}
    tree, attached = model.module_tree(), dict[str, torch.nn.Module]()
    known = {name for name, _ in tree.named_modules() if name}
    # Numbers in their order: a sequence is indexed by position.
    for path in sorted(inside, key=lambda p: [(len(name), name) for name in p.split(".")]):
        if path in known:
            raise EditError.misfit(
                file,
                of,
                _own(model),
                f"`{path}`, where a module was attached, is one of the model's",
            )
        place = next((p for p in attached if path.startswith(f"{p}.")), None)
        if place is None:
            attached[path] = Absent()
            continue
        owner: torch.nn.Module = attached[place]
        for name in path[len(place) + 1 :].split("."):
            if name not in owner._modules:
                owner.add_module(name, Absent())
            owner = owner._modules[name]  # type: ignore[assignment]
    for node in graph.nodes:
        if node.kind in (READ, WRITE):
            path = node.target.path
        elif node.kind == MODULE:
            path = node.target
        elif node.kind == PARAMETER:
            path, _, name = node.target.rpartition(".")
            if (path in known or not path) and name not in (
                *at_path(tree, path)._parameters,
                *at_path(tree, path)._buffers,
            ):
                raise EditError.misfit(file, of, _own(model), f"it has no `{node.target}`")
        else:
            continue
        if path and path not in known and path not in inside:
            raise EditError.misfit(
                file, of, _own(model), f"it has no module `{path}`. {near(path, known)}"
            )
    return attached
