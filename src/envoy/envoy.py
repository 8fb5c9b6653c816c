"""Owns `Envoy`: a name for a place in the module tree, and what may be asked of it in a block.

An envoy holds a path and the root it belongs to: no module, no value, no block. So loading and
quantizing a model re-bind nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from ..tracing.context import Tracer, current_block, current_tracer, read_in
from ..tracing.errors import BlockError, OperationError, UnknownModuleError
from ..tracing.node import MODULE, PARAMETER, HookPoint
from ..tracing.proxy import (
    BlockHandle,
    Handle,
    Proxy,
    assign,
    first_argument,
    record_node,
    write_in,
)
from ..tracing.structure import leaves
from .attached import open_recording, record
from .rename import Names
from .source import SourceEnvoy
from .spellings import elsewhere
from .tree import tree_html

#: No default was given.
_REFUSED: Any = object()


class Alias(Protocol):
    """A place that is not a module of its own, made of the value at one that is.

    Attributes:
        source: path of that module, relative to the module that the alias belongs to.
    """

    @property
    def source(self) -> str: ...

    def view(self, value: Proxy, module: torch.nn.Module) -> Proxy:
        """The alias as a view of the source's output, so that writes reach the computation."""


class Root(Protocol):
    """What an envoy needs of the model it belongs to."""

    _envoys: dict[str, Envoy]
    _names: Names
    _held: Any  # the same for a model and its edited views

    def submodule(self, path: str) -> torch.nn.Module:
        """The module at a path: the real one if it is loaded, else its skeleton."""

    def load(self) -> Any:
        """Load the weights if they are not loaded."""

    def operations(self, path: str, prefix: str) -> Any:
        """The operations inside the forward of a module, under a prefix of their ports."""

    def is_block(self, module: torch.nn.Module) -> bool:
        """True for a transformer block, whose `output[0]` is its hidden states."""

    def alias_at(self, module: torch.nn.Module, name: str) -> Alias | None:
        """What the architecture declares under that name on such a module."""

    def get(self, path: str) -> Envoy:
        """The module at a path."""

    def unified(self, path: str, name: str) -> Any:
        """What a unified name means below a path; None if it is none there."""

    def attached(self, path: str) -> torch.nn.Module | None:
        """The attached module at a path, or the module inside an attached one."""

    def attach(self, path: str, name: str, module: torch.nn.Module | None) -> None:
        """Attach a module under a name below a path; None takes it away.

        Raises:
            OperationError: the name is taken, or nothing is attached there.
        """


class Envoy:
    """A module of the model, by path. `model.transformer.h[0].attn` is one.

    Inside a block, `.output`, `.input` and `.inputs` give proxies and may be assigned; calling it
    applies the module to proxies. Any other attribute is the module's own.
    """

    __slots__ = ("_inputs", "_kind", "_output", "_path", "_root")

    def __init__(self, root: Any, path: str, kind: type[Handle] = Handle, call: int = 0) -> None:
        self._root: Root = root
        self._path = path
        self._kind = kind
        self._output = HookPoint(path, "output", 0, call)
        self._inputs = HookPoint(path, "inputs", 0, call)

    # ---------------------------------------------------------------- ports

    def _tracer(self, what: HookPoint) -> Tracer:
        tracer = current_tracer()
        if tracer is None:
            raise BlockError.outside(str(what))
        # In a block of an edited model, the names of the model itself mean the edited one.
        if tracer.model._held is not self._root._held:
            raise BlockError.other_model(self._path)
        return tracer

    def _read(self, point: HookPoint, kind: type[Handle]) -> Proxy:
        """What is at a port for the open invoke, at its step."""
        # Written out, as this runs for every place that a block names.
        tracer = current_block.get()
        if tracer is None or tracer.model is not self._root:
            if tracer is None and point is self._output and self._has_output():
                return self.get("output")  # type: ignore[no-any-return]
            tracer = self._tracer(point)
        recording = tracer.recording
        invoke = recording.invoke
        if invoke < 0:
            self._tracer(point)  # the block may have ended, in a task that was started in it
            raise BlockError.no_invoke(str(point))
        if recording.step:
            point = point._replace(step=recording.step)
        return read_in(recording, invoke, point, kind)

    def _has_output(self) -> bool:
        # BERT has submodules called `output`; outside of blocks there is no value that it could mean.
        return "output" in self._root.submodule(self._path)._modules

    @property
    def output(self) -> Any:
        """What the module returns, for the open invoke's own rows and tokens."""
        return self._read(self._output, self._kind)

    @output.setter
    def output(self, value: Any) -> None:
        assign(self._tracer(self._output).recording, self.output, value)

    @property
    def inputs(self) -> Any:
        """What the module is called with: `(args, kwargs)`."""
        return self._read(self._inputs, Handle)

    @inputs.setter
    def inputs(self, value: Any) -> None:
        assign(self._tracer(self._inputs).recording, self.inputs, value)

    @property
    def input(self) -> Any:
        """The first positional argument, or else the first keyword argument."""
        return first_argument(self.inputs)

    @input.setter
    def input(self, value: Any) -> None:
        assign(self._tracer(self._inputs).recording, self.input, value)

    def skip(self, value: Any) -> None:
        """Leave the module's computation out: `value` is its result, `layer.skip(layer.input)`.

        Args:
            value: what the module would return, for the open invoke's own rows and tokens. For a
                module that returns a tuple, the tuple or its first part alone; the others are None.
        """
        recording = self._tracer(self._output).recording
        if recording.invoke < 0:
            raise BlockError.no_invoke(f"{self._path}.skip")
        port = self._output.port.removesuffix("output") + "skip"
        point = self._output._replace(port=port, step=recording.step)
        write_in(recording, point, value)

    @property
    def source(self) -> SourceEnvoy:
        """The calls and operators inside the module's forward, by name; `print` shows the text.

        `module.source.attention_interface_0.output` is read and edited as a module's output is.

        Raises:
            SourceError: the forward has no text, or no such operation.
        """
        return SourceEnvoy(self, "source")

    @property
    def functions(self) -> SourceEnvoy:
        """The torch functions that the module's forward calls, with what is inside it, by name and
        number: `module.functions.softmax_0.output`. For modules whose source cannot be had."""
        return SourceEnvoy(self, "functions")

    def _listing(self, prefix: str) -> Any:
        return self._root.operations(self._path, prefix)

    def _operation(self, prefix: str, call: int) -> Envoy:
        place = Envoy(self._root, self._path)
        place._output = HookPoint(self._path, f"{prefix}.output", 0, call)
        place._inputs = HookPoint(self._path, f"{prefix}.inputs", 0, call)
        return place

    @property
    def calls(self) -> Calls:
        """The calls of a module that runs several times in one forward: `.calls[1].output` is its
        second. Where a module does, `.output` alone says too little, and is refused by the run. A
        module object that stands at several paths has at each the call by that path."""
        return Calls(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the module: to proxies inside a block, at that point; to tensors otherwise."""
        for leaf in leaves((args, kwargs)):
            if isinstance(leaf, Proxy) and leaf._recording.state == "open":
                return record_node(leaf._recording, MODULE, self._path, args, kwargs)
        tracer = current_tracer()
        if tracer is not None and tracer.model._held is self._root._held:
            return record_node(tracer.recording, MODULE, self._path, args, kwargs)
        self._root.load()
        return self._root.submodule(self._path)(*args, **kwargs)

    # ---------------------------------------------------------------- the tree

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        path = f"{self._path}.{name}" if self._path else name
        envoy = self._root._envoys.get(path)
        return envoy if envoy is not None else self._find(name, path)

    def _find(self, name: str, path: str) -> Any:
        """A child, an alias, or an attribute of the module itself."""
        root = self._root
        module = root.submodule(self._path)
        child = module._modules.get(name)
        if child is not None:
            return self._child(path, child)
        if root.attached(path) is not None:
            return self._attached(path)
        meant = root._names.get((self._path, name)) if root._names else None
        if meant is not None:
            envoy = root._envoys[path] = root.get(meant)
            return envoy
        alias = root.alias_at(module, name)
        if alias is not None:
            return AliasEnvoy(self, alias)
        if name in module._parameters or name in module._buffers:
            tracer = current_tracer()
            if tracer is not None and tracer.model._held is root._held:
                return record_node(tracer.recording, PARAMETER, path, (), {})
        found = root.unified(self._path, name)
        if found is not None:
            return found
        try:
            value = getattr(module, name)
        except AttributeError:
            if name == "next":
                raise OperationError(
                    f"`{self._path}.next()`: steps are those of a prompt, not of a module. Write "
                    "`invoker.next()` (or `tracer.next()` where the block was given its prompt), and "
                    "what follows is about the next token."
                ) from None
            known = [*module._modules, *module._parameters, "output", "input", "inputs"]
            kind = type(module).__name__
            written = elsewhere(name) if not self._path else None
            if written is not None:
                raise UnknownModuleError.elsewhere(kind, name, written) from None
            raise UnknownModuleError.child(self._path, kind, name, known) from None
        if isinstance(value, torch.nn.Module):
            # A wrapper, such as PEFT's, hands on the attributes of what it holds.
            for below, child in module.named_modules():
                if child is value:
                    return root.get(f"{self._path}.{below}" if self._path else below)
        return value

    def _child(self, path: str, module: torch.nn.Module) -> Envoy:
        if self._root.attached(path) is not None:
            return self._attached(path)
        kind = BlockHandle if self._root.is_block(module) else Handle
        envoy = self._root._envoys[path] = Envoy(self._root, path, kind)
        return envoy

    def _attached(self, path: str) -> Envoy:
        envoy = self._root._envoys[path] = AttachedEnvoy(self._root, path)
        return envoy

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            object.__setattr__(self, name, value)
        except AttributeError:
            if isinstance(value, torch.nn.Module):
                self._root.attach(self._path, name, value)
                return
            raise OperationError(
                f"`{name}` of `{self._path or 'the model'}` cannot be assigned: write "
                "`.output`, `.input` or `.inputs` of it inside a block. A module can be attached."
            ) from None

    def __delattr__(self, name: str) -> None:
        self._root.attach(self._path, name, None)

    def get(self, path: str, default: Any = _REFUSED) -> Any:
        """The module at a dotted path below this one, also one that is called `output`.

        Args:
            default: what there is instead of a module that does not exist.

        Raises:
            UnknownModuleError: there is none, and no default.
        """
        if not isinstance(path, str):
            raise OperationError(
                f'`get` takes the path of a module, such as "transformer.h.0", not {path!r:.60}.'
            )
        envoy = self
        for name in path.split("."):
            below = f"{envoy._path}.{name}" if envoy._path else name
            module = self._root.submodule(envoy._path)
            child = module._modules.get(name)
            if child is None and self._root.attached(below) is not None:
                envoy = self._root._envoys.get(below) or envoy._attached(below)
                continue
            meant = self._root._names.get((envoy._path, name))
            if child is None and meant is not None:
                envoy = self._root.get(meant)
                continue
            if child is None:
                if default is not _REFUSED:
                    return default
                raise UnknownModuleError.child(
                    envoy._path, type(module).__name__, name, module._modules
                )
            envoy = self._root._envoys.get(below) or envoy._child(below, child)
        return envoy

    def __getitem__(self, index: Any) -> Any:
        root, path = self._root, self._path
        module = root.submodule(path)
        names = list(module._modules)
        if type(index) is int:
            try:
                name = names[index]
            except IndexError:
                kind = type(module).__name__
                raise UnknownModuleError.index(path, kind, index, len(names)) from None
            envoy = root._envoys.get(f"{path}.{name}" if path else name)
            return envoy if envoy is not None else self.get(name)
        if isinstance(index, str):
            return self.get(index)
        if isinstance(index, slice):
            return [self.get(name) for name in names[index]]
        if hasattr(index, "__index__"):
            return self[index.__index__()]
        raise OperationError(
            f"`{path}` is a module and is indexed by number or name; for its value write "
            f"`{path}.output[...]`."
        )

    def __len__(self) -> int:
        return len(self._root.submodule(self._path)._modules)

    def __iter__(self) -> Iterator[Envoy]:
        return (self.get(name) for name in list(self._root.submodule(self._path)._modules))

    def __bool__(self) -> bool:
        return True

    def __dir__(self) -> list[str]:
        module = self._root.submodule(self._path)
        named = [name for place, name in self._root._names if place == self._path]
        return sorted({*object.__dir__(self), *module._modules, *module._parameters, *named})

    @property
    def path(self) -> str:
        """Dotted path in the module tree; "" for the root."""
        return self._path

    def __repr__(self) -> str:
        return repr(self._root.submodule(self._path))

    def _repr_html_(self) -> str:
        return tree_html(self._root.submodule(self._path), self._path)


class AttachedEnvoy(Envoy):
    """A module that the user attached, `model.transformer.h[0].sae = SAE()`, or one inside it.

    Calling it on values of a block records what it does. From there on, what it and the modules inside
    it take and give is read and edited as everywhere: what is written there goes on through it.
    """

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the module: to proxies inside a block, recorded; to tensors otherwise."""
        module = self._root.submodule(self._path)
        if open_recording(args, kwargs) is None:
            return module(*args, **kwargs)
        return record(module, self._path, args, kwargs)

    def _read(self, point: HookPoint, kind: type[Handle]) -> Proxy:
        recording = self._tracer(point).recording
        place = (recording.invoke, point._replace(step=recording.step))
        found: Proxy | None = recording.current.get(place)
        if found is not None:
            return found
        if place in recording.around:
            return super()._read(point, kind)  # in a loop: what is there at each step
        raise BlockError.not_called(str(point))

    def skip(self, value: Any) -> None:
        """Not for attached modules: what they give can be assigned."""
        raise OperationError(f"`{self._path}` is attached: do not call it, or assign `.output`.")

    @property
    def source(self) -> SourceEnvoy:
        raise OperationError(f"`{self._path}` is attached: its own text tells what it does.")

    functions = source

    def _find(self, name: str, path: str) -> Any:
        module = self._root.submodule(self._path)
        if name in module._parameters or name in module._buffers:
            return getattr(module, name)
        return super()._find(name, path)


class Calls:
    """`module.calls[i]`: the module as it is called for the ith time in one forward."""

    __slots__ = ("_envoy",)

    def __init__(self, envoy: Envoy) -> None:
        self._envoy = envoy

    def __getitem__(self, call: Any) -> Envoy:
        if not isinstance(call, int) or call < 0:
            raise OperationError("calls are counted from 0; how many there will be is not known")
        envoy = self._envoy
        kind = Envoy if call else FirstCallEnvoy
        return kind(envoy._root, envoy._path, envoy._kind, call)


class FirstCallEnvoy(Envoy):
    """`module.calls[0]`: the same place as `module`, by one who knows that there are further calls.

    What says so in the graph is that it names the second call, too; nothing waits for that.
    """

    __slots__ = ()

    def _read(self, point: HookPoint, kind: type[Handle]) -> Proxy:
        found = super()._read(point, kind)
        super()._read(point._replace(call=1), kind)
        return found

    def skip(self, value: Any) -> None:
        """As of any module, for the first call alone."""
        super().skip(value)
        super()._read(self._output._replace(call=1), self._kind)


class AliasEnvoy:
    """A declared name for a part of a module's output, such as the value vectors of each head."""

    __slots__ = ("_alias", "_owner")

    def __init__(self, owner: Envoy, alias: Alias) -> None:
        object.__setattr__(self, "_owner", owner)
        object.__setattr__(self, "_alias", alias)

    @property
    def output(self) -> Any:
        """The part, as a view: writing into it changes the computation."""
        owner, alias = self._owner, self._alias
        source = owner.get(alias.source)
        return alias.view(source.output, owner._root.submodule(owner._path))

    @output.setter
    def output(self, value: Any) -> None:
        part = self.output
        if value is not part:
            part[...] = value

    def __getattr__(self, name: str) -> Any:
        raise UnknownModuleError.child(
            f"{self._owner.path}", type(self._alias).__name__, name, ["output"]
        )

    def __repr__(self) -> str:
        return f"<{self._alias!r} of {self._owner.path}>"
