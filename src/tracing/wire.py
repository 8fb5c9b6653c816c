"""Owns the form in which a graph is sent and kept: `pack` makes bytes of it, `unpack` a graph of them.

The bytes are a safetensors file. Its tensors are the captured ones; its metadata is JSON: the nodes,
which of them are saved, the last writes, and the user's lines. Nothing in it is code, and reading it
runs nothing: operations are names of `allow_list`, everything else is a number, a string or a plain
container. What is not exactly as it has to be is refused with a `WireError`, whoever wrote it.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Mapping
from importlib.metadata import version
from types import NoneType
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from .allow_list import (
    complaints,
    function_name,
    functions,
    is_good,
    is_path,
    name_of,
    operations,
)
from .errors import CapturedTensorError, Location, WireError
from .graph import Box, Graph
from .limits import LEAST, LIMITS, MOST, Limits
from .node import (
    CALL,
    MODULE,
    PARAMETER,
    READ,
    WRITE,
    Captured,
    GradPoint,
    HookPoint,
    Node,
    grad_point,
)
from .operations import APPLY, DERIVING, GUARDED, PASSED, SELECT, STOP, Operation
from .template import is_stop

#: Format of what `pack` writes. `unpack` reads this one alone.
FORMAT = 1
#: Numbers of steps, calls, invokes and backwards.
MAX_COUNT = 1_000_000

_KEY = "graftwork"
# In front of a file of another machine: it must never be looked up on this one.
_SENT = "<sent: "


# -------------------------------------------------------------------- records, as they are in the JSON


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TensorRecord(_Record):
    """A captured tensor.

    Attributes:
        data: the safetensors tensor with its numbers; several records may have one.
        order: how the axes of the data are to be put to give the tensor, whose strides then are the
            user's; None if they lie in order.
    """

    name: str
    data: str
    order: list[int] | None = None
    parameter: bool = False
    requires_grad: bool = False


#: What a node is written as; `target`, `args` and `kwargs` are read by `_KINDS` and `_CODECS`. What may
#: be missing has its default here. What else a node may have is a line here, in `_Writer.node` and in
#: `_Reader.append`, which takes the fields in this order.
_NODE: dict[str, Any] = {
    "kind": None,
    "target": None,
    "args": [],
    "kwargs": {},
    "invoke": -1,
    "file": None,
    "line": None,
}
#: The types of all of them but the target.
_TYPES = (str, list, dict, int, int, int)


class GraphRecord(_Record):
    """A graph: indices in `saves`, `writes` and `traced` are those of nodes, `file` of a node that of
    `files`."""

    files: list[str]
    tensors: list[TensorRecord]
    nodes: list[Any]
    saves: list[int]
    writes: list[int]
    traced: list[int] = []
    fixed_positions: bool = False
    counts_tokens: bool = False


class Document(_Record):
    """All of the JSON. `named` are tensors beside the graph, by the name that they were given."""

    format: int
    library: str
    graph: GraphRecord
    extra: dict[str, str] = {}
    named: list[str] = []


class Package(NamedTuple):
    """What `unpack` gives.

    Attributes:
        graph: ready to be planned and run; its tensors are on the CPU.
        extra: the strings that were packed with it.
        tensors: the tensors that were packed with it, by name.
        library: the version of graftwork that wrote it.
    """

    graph: Graph
    extra: dict[str, str]
    tensors: dict[str, torch.Tensor]
    library: str


# -------------------------------------------------------------------- values in arguments


class Codec(NamedTuple):
    """How values of one type are written, as `{tag: written}`, and read."""

    tag: str
    type: type
    write: Callable[[_Writer, Any], Any]
    read: Callable[[_Reader, Any], Any]


class _Refused(Exception):
    """Why a value is refused; whoever catches it knows where it stands."""


def _refuse(reason: str) -> NoReturn:
    raise _Refused(reason)


def _write_complex(writer: _Writer, value: complex) -> Any:
    return [writer.value(value.real), writer.value(value.imag)]


def _read_complex(reader: _Reader, written: Any) -> complex:
    parts = reader.values(_list(written, 2))
    if any(type(part) is not float for part in parts):
        _refuse("a complex number of something that is no number")
    return complex(*parts)


def _list(written: Any, length: int | None = None) -> list[Any]:
    if type(written) is not list or (length is not None and len(written) != length):
        _refuse("a container that is no list of the right length")
    return written


def _write_dict(writer: _Writer, value: dict[Any, Any]) -> Any:
    return [[writer.value(key), writer.value(part)] for key, part in value.items()]


def _read_dict(reader: _Reader, written: Any) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for pair in _list(written):
        key, part = reader.values(_list(pair, 2))
        if type(key) not in (str, int, float, bool, type(None)) or key in found:
            _refuse("a dict with a key that is twice in it or no string or number")
        found[key] = part
    return found


def _read_size(reader: _Reader, written: Any) -> torch.Size:
    parts = reader.values(_list(written))
    if any(type(part) is not int for part in parts):
        _refuse("a size that holds something else than integers")
    if any(not 0 <= part < 2**63 for part in parts):
        _refuse("a size that is negative or does not fit into 64 bits")
    return torch.Size(parts)


#: Torch's constants by name. Only these: a name is never looked up as an attribute.
_CONSTANTS: dict[Any, dict[str, Any]] = {
    kind: {
        str(value).removeprefix("torch."): value
        for name in dir(torch)
        if isinstance(value := getattr(torch, name), kind)
    }
    for kind in (torch.dtype, torch.layout, torch.memory_format)
}


def _constant(tag: str, kind: Any) -> Codec:
    def write(writer: _Writer, value: Any) -> str:
        return str(value).removeprefix("torch.")

    def read(reader: _Reader, written: Any) -> Any:
        if not isinstance(written, str) or written not in _CONSTANTS[kind]:
            _refuse(f"no {tag} of torch: {written!r:.80}")
        return _CONSTANTS[kind][written]

    return Codec(tag, kind, write, read)


def _read_device(reader: _Reader, written: Any) -> torch.device:
    kind, _, index = written.partition(":") if isinstance(written, str) else ("", "", "")
    if not kind.isalpha() or not kind.isascii() or (index and not index.isdecimal()):
        _refuse(f"no device: {written!r:.80}")
    try:
        return torch.device(written)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise _Refused(f"no device: {written!r:.80}") from error


def _items(writer: _Writer, value: Any) -> Any:
    return [writer.value(part) for part in value]


#: Numbers, strings, None and lists are written as JSON has them; the others with their tag.
_CODECS = (
    Codec("node", Node, lambda w, v: v.index, lambda r, v: r.node(v)),
    Codec("tensor", Captured, lambda w, v: w.tensor(v), lambda r, v: r.tensor(v)),
    Codec("tuple", tuple, _items, lambda r, v: tuple(r.values(_list(v)))),
    Codec("size", torch.Size, _items, _read_size),
    Codec("dict", dict, _write_dict, _read_dict),
    Codec(
        "slice",
        slice,
        lambda w, v: _items(w, (v.start, v.stop, v.step)),
        lambda r, v: slice(*r.values(_list(v, 3))),
    ),
    Codec("complex", complex, _write_complex, _read_complex),
    Codec("ellipsis", type(...), lambda w, v: True, lambda r, v: ...),
    Codec("device", torch.device, lambda w, v: str(v), _read_device),
    _constant("dtype", torch.dtype),
    _constant("layout", torch.layout),
    _constant("memory_format", torch.memory_format),
    Codec(
        "operation", Operation, lambda w, v: w.operation(v), lambda r, v: r.operation(v, alone=True)
    ),
    Codec("place", HookPoint, lambda w, v: _write_place(v), lambda r, v: _read_place(r, v)),
)
_BY_TYPE = {codec.type: codec for codec in _CODECS}
_BY_TAG = {codec.tag: codec for codec in _CODECS}
#: Types of JSON that are values as they are.
_PLAIN = frozenset({NoneType, bool, str, float})
_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _write_place(place: Any) -> Any:
    if type(place) is GradPoint:
        return {"gradient": [place.node.index, place.backward]}
    _check_hook_point(place)
    return {"hook_point": list(place)}


def _read_place(reader: _Reader, written: Any) -> Any:
    """A place, whose strings are paths without private names and whose numbers are small."""
    if type(written) is not dict or len(written) != 1:
        _refuse("no place of a model")
    ((name, fields),) = written.items()
    if name == "gradient":
        index, backward = _list(fields, 2)
        if type(backward) is not int or not 0 <= backward <= MAX_COUNT:
            _refuse(f"{backward!r:.80} is no number of a backward pass")
        return grad_point(reader.node(index), backward)
    if name != "hook_point":
        _refuse("no place of a model")
    point = HookPoint(*_list(fields, len(HookPoint._fields)))
    _check_hook_point(point)
    return point


def _check_hook_point(point: HookPoint) -> None:
    path, port, step, call = point
    if not is_path(path) or not is_path(port):
        field, part = ("port", port) if is_path(path) else ("path", path)
        _refuse(f"{part!r:.80} is no {field} of a place in a model")
    for name, number in (("step", step), ("call", call)):
        if type(number) is not int or not 0 <= number <= MAX_COUNT:
            _refuse(f"{number!r:.80} is no {name} of a place in a model")


def _check_path(path: Any) -> str:
    if not is_path(path):
        _refuse(f"{path!r:.80} is no path of a module or parameter without private names")
    return path  # type: ignore[no-any-return]


class _Kind(NamedTuple):
    """How the target of one kind of node is written and read, and how many arguments it takes."""

    write: Callable[[_Writer, Any], Any]
    read: Callable[[_Reader, Any], Any]
    arguments: int | None


def _place(arguments: int) -> _Kind:
    return _Kind(lambda w, v: _write_place(v), _read_place, arguments)


_KINDS = {
    READ: _place(0),
    WRITE: _place(1),
    CALL: _Kind(lambda w, v: w.operation(v), lambda r, v: r.operation(v), None),
    MODULE: _Kind(lambda w, v: _check_path(v), lambda r, v: _check_path(v), None),
    PARAMETER: _Kind(lambda w, v: _check_path(v), lambda r, v: _check_path(v), 0),
}


# -------------------------------------------------------------------- writing


def _own_file(file: str) -> str:
    return file[len(_SENT) : -1] if file.startswith(_SENT) else file


class _Writer:
    """The tensors and files met so far, and the node that is being written."""

    def __init__(self) -> None:
        self.data: dict[str, torch.Tensor] = {}
        self.records: list[TensorRecord] = []
        self.files: dict[str, int] = {}
        self._seen: dict[int, int] = {}
        self._shared: dict[Any, tuple[str, list[int] | None]] = {}
        self._location = Location("", 0)
        self._depth = 0

    def node(self, node: Node) -> dict[str, Any]:
        self._location = node.location
        try:
            kind = _KINDS.get(node.kind)
            if kind is None:
                _refuse(f"nodes of kind {node.kind!r} have no form to be sent in")
            if node.target is APPLY and function_name(node.args[0]) is None:
                name = getattr(node.args[0], "__qualname__", repr(node.args[0]))
                raise WireError.python_function(name, node.location)
            args = list(node.args)
            written = []
            if node.target is APPLY:
                written.append({"function": function_name(args.pop(0))})
            record = {
                "kind": node.kind,
                "target": kind.write(self, node.target),
                "args": [*written, *(self.value(argument) for argument in args)],
                "kwargs": {key: self.value(value) for key, value in node.kwargs.items()},
                "invoke": node.invoke,
                "file": self.files.setdefault(_own_file(node.file), len(self.files)),
                "line": node.line,
            }
            if node.kind == CALL:
                name = name_of(node.target) or ""
                for complaint in complaints(node.target, name, node.args, node.kwargs):
                    _refuse(complaint)
            return {key: part for key, part in record.items() if part != _NODE[key]}
        except _Refused as refused:
            raise WireError.unsendable(node.describe(), str(refused), node.location) from None

    def value(self, value: Any) -> Any:
        """`value` as JSON."""
        kind = type(value)
        if kind is str or kind is bool or value is None:
            return value
        if isinstance(value, np.generic):
            return self.value(value.item())
        codec = _BY_TYPE.get(Operation if isinstance(value, Operation) else kind)
        if codec is None and kind is not list:
            return _write_number(value)
        self._depth += 1
        try:
            if self._depth > LIMITS.depth:
                _refuse(f"an argument is nested deeper than {LIMITS.depth} containers")
            return _items(self, value) if codec is None else {codec.tag: codec.write(self, value)}
        finally:
            self._depth -= 1

    def operation(self, operation: Operation) -> str:
        name = name_of(operation)
        if name is None:
            _refuse(
                f"`{operation.name}` is not among the operations that a graph may name when it is "
                "sent: pure functions of torch"
            )
        return name

    def tensor(self, captured: Captured) -> int:
        """Index of the record of a captured tensor; one tensor has one record."""
        tensor = captured.tensor
        found = self._seen.get(id(tensor))
        if captured.is_changed():
            raise CapturedTensorError.changed(captured.name, tensor.shape, self._location)
        if found is None:
            found = self._seen[id(tensor)] = len(self.records)
            data, order = self._data_of(tensor, captured.name)
            self.records.append(
                TensorRecord(
                    name=captured.name,
                    data=data,
                    order=order,
                    parameter=isinstance(tensor, torch.nn.Parameter),
                    requires_grad=tensor.requires_grad,
                )
            )
        return found

    def _data_of(self, tensor: torch.Tensor, name: str) -> tuple[str, list[int] | None]:
        check_tensor(tensor, name)
        key = (
            tensor.untyped_storage()._cdata,
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            tensor.is_conj(),
            tensor.is_neg(),
        )
        found = self._shared.get(key)
        if found is None:
            # A clone keeps the strides where they are those of some order of the axes.
            copy = tensor.detach().resolve_conj().resolve_neg().cpu().clone()
            strides = copy.stride()
            order = sorted(range(copy.ndim), key=lambda axis: -strides[axis])
            name = f"tensor.{len(self._shared)}"
            self.data[name] = copy.permute(order).contiguous()
            back = [order.index(axis) for axis in range(copy.ndim)]
            found = name, back if back != list(range(copy.ndim)) else None
            self._shared[key] = found
        return found


def _write_number(value: Any) -> Any:
    if isinstance(value, int):
        if not LEAST <= value <= MOST:
            _refuse("an integer does not fit into 64 bits")
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    name = getattr(value, "__qualname__", "") if callable(value) else ""
    _refuse(
        f"an argument is of type {type(value).__name__}{f' (`{name}`)' if name else ''}; numbers, "
        "strings, slices, dtypes, devices, tensors and tuples, lists and dicts of them can be sent"
    )


#: dtypes that a safetensors file holds, in every version that we support.
DTYPES = frozenset(
    getattr(torch, name)
    for name in (
        "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 "
        "uint16 uint32 uint64 bool"
    ).split()
)


def check_tensor(tensor: torch.Tensor, name: str) -> None:
    """Refuse a tensor whose numbers a safetensors file cannot hold."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        _refuse(f"{name} is a {type(tensor).__name__}; plain tensors can be sent")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        _refuse(f"{name} is sparse, quantized or without data")
    if tensor.dtype not in DTYPES:
        _refuse(f"{name} has the dtype {tensor.dtype}, which safetensors does not hold")


def pack(
    graph: Graph,
    *,
    extra: Mapping[str, str] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> bytes:
    """A graph as bytes: one safetensors file, without code.

    Args:
        graph: of a finished block.
        extra: strings that go with it, such as a description of the model that it fits.
        tensors: further tensors, by name. A view keeps its shape but not its strides.

    Raises:
        WireError: it holds something that cannot be sent, such as a Python function given to
            `graftwork.apply`. The message names the user's line.
        CapturedTensorError: a captured tensor was changed since it was recorded.
    """
    import safetensors.torch

    writer = _Writer()
    nodes = [writer.node(node) for node in graph.nodes]
    named = dict(tensors or {})
    for name, tensor in named.items():
        try:
            check_tensor(tensor, f"`{name}`")
        except _Refused as refused:
            raise WireError(f"The tensor cannot be sent: {refused}.") from None
        # A copy of each: a safetensors file does not hold tensors that share memory.
        data = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        writer.data[f"named.{name}"] = data
    document = Document(
        format=FORMAT,
        library=version("graftwork"),
        graph=GraphRecord(
            files=list(writer.files),
            tensors=writer.records,
            nodes=nodes,
            saves=list(graph.saved_in_order()),
            writes=[node.index for node in graph.writes.values()],
            traced=sorted(graph.traced),
            fixed_positions=graph.fixed_positions,
            counts_tokens=graph.counts_tokens,
        ),
        extra=dict(extra or {}),
        named=list(named),
    )
    text = json.dumps(
        document.model_dump(exclude_defaults=True), allow_nan=False, separators=(",", ":")
    )
    return safetensors.torch.save(writer.data, {_KEY: text})


# -------------------------------------------------------------------- reading


class _Reader:
    """What of a graph has been read so far."""

    def __init__(
        self, record: GraphRecord, data: Mapping[str, torch.Tensor], limits: Limits
    ) -> None:
        for text in (*record.files, *(one.name for one in record.tensors)):
            # They stand in messages, which may end in a terminal or a log.
            if not text.isprintable() or len(text) > limits.text:
                raise WireError.content("A name", "it is too long or cannot be printed")
        self.files = [f"{_SENT}{file}>" for file in record.files]
        tensors = record.tensors
        self.tensors = [
            Captured(_read_tensor(i, one, data), one.name) for i, one in enumerate(tensors)
        ]
        self.nodes: list[Node] = []
        self._limits = limits
        self._depth = self._parts = 0

    # `append`, `values` and `value` see every node of a graph, which may have a million of them, and
    # every argument: words are made where something is refused, and nothing is called for most.

    def append(self, record: Any) -> None:
        fields = {**_NODE, **record} if type(record) is dict else _NODE
        if len(fields) != len(_NODE):
            raise WireError.damaged(f"'nodes.{len(self.nodes)}': {_flaw(record)}")
        name, written, args, kwargs, invoke, file, line = fields.values()
        types = (type(name), type(args), type(kwargs), type(invoke), type(file), type(line))
        if types != _TYPES or not (-1 <= invoke <= MAX_COUNT and 0 <= line < 2**31 and file >= 0):
            raise WireError.damaged(f"'nodes.{len(self.nodes)}': {_flaw(record)}")
        kind = _KINDS.get(name)
        if kind is None:
            raise WireError.unknown("kind of node", name[:80], self._where(name), _KINDS)
        if file >= len(self.files):
            where = self._where(name)
            raise WireError.content(where, "it names a file that is not in the list of files")
        self._parts = 0
        try:
            target = kind.read(self, written)
            if target is APPLY:  # it has its function in front of the values
                args = [_read_function(args), *self.values(args[1:])]
            else:
                args = self.values(args)
            kwargs = {key: self.value(one) for key, one in kwargs.items()} if kwargs else {}
            if name == CALL:
                if not is_good(target, written, args, kwargs):
                    for complaint in complaints(target, written, tuple(args), kwargs):
                        _refuse(complaint)
            elif kind.arguments is not None:
                if len(args) != kind.arguments or kwargs:
                    _refuse(f"it has {len(args) + len(kwargs)} arguments, not {kind.arguments}")
                if name == WRITE and type(args[0]) is not Node:
                    _refuse("what is written is no node")
            elif any(isinstance(a, Operation) for a in (*args, *kwargs.values())):
                _refuse("an operation is no value")
            elif not all(key.isidentifier() for key in kwargs):
                _refuse("an argument has a name that Python does not know")
        except _Refused as refused:
            raise WireError.content(self._where(name), str(refused)) from None
        index, path = len(self.nodes), self.files[file]
        self.nodes.append(Node(index, name, target, tuple(args), kwargs, invoke, path, line))

    def _where(self, kind: str) -> str:
        return f"Node {len(self.nodes)} ({kind[:40]!r})"

    def values(self, written: list[Any]) -> list[Any]:
        nodes, found = self.nodes, []
        for one in written:
            kind = type(one)
            if kind is dict and len(one) == 1:
                index = one.get("node")  # most arguments are nodes
                if type(index) is int and 0 <= index < len(nodes):
                    found.append(nodes[index])
                    continue
            elif kind in _PLAIN or (kind is int and LEAST <= one <= MOST):
                found.append(one)
                continue
            found.append(self.value(one))
        return found

    def value(self, written: Any) -> Any:
        kind = type(written)
        if kind in _PLAIN:
            return written
        if kind is int:
            if not LEAST <= written <= MOST:
                _refuse("an integer does not fit into 64 bits")
            return written
        self._depth += 1
        if self._depth > self._limits.depth:
            _refuse(f"an argument is nested deeper than {self._limits.depth} containers")
        if kind is list:
            self._count(len(written))
            found: Any = self.values(written)
        elif kind is not dict or len(written) != 1:
            _refuse("an argument is no tagged value")
        else:
            ((tag, inner),) = written.items()
            self._count(len(inner) if type(inner) is list else 1)
            codec = _BY_TAG.get(tag)
            if tag == "float" and isinstance(inner, str) and inner in _NUMBERS:
                found = _NUMBERS[inner]
            elif codec is None:
                _refuse(f"no value has the tag {tag[:80]!r}")
            else:
                found = codec.read(self, inner)
        self._depth -= 1
        return found

    def _count(self, parts: int) -> None:
        self._parts += parts
        if self._parts > self._limits.parts:
            _refuse(f"its arguments have more than {self._limits.parts} parts")

    def node(self, index: Any) -> Node:
        if type(index) is not int or not 0 <= index < len(self.nodes):
            _refuse(f"an argument is node {index!r:.80}, which does not come before it")
        return self.nodes[index]

    def tensor(self, index: Any) -> Captured:
        if type(index) is not int or not 0 <= index < len(self.tensors):
            _refuse(f"an argument is tensor {index!r:.80}, which is not in the list of tensors")
        return self.tensors[index]

    def operation(self, name: Any, alone: bool = False) -> Operation:
        """An allowed operation; as an argument (`alone`) only beside the values, not in containers."""
        if alone and self._depth != 1:
            _refuse("an operation stands inside a container")
        found = operations().get(name) if isinstance(name, str) else None
        if found is None:
            raise WireError.unknown(
                "operation", str(name)[:80], f"Node {len(self.nodes)}", operations()
            )
        return found


def _flaw(record: Any) -> str:
    """What is wrong with the fields of a node, where something is."""
    if type(record) is not dict:
        return "it is no object"
    for name in record:
        if name not in _NODE:
            return f"it has a field {name[:80]!r}"
    if type(record.get("kind")) is not str:
        return "its kind is missing"
    if type(record.get("args", [])) is not list or type(record.get("kwargs", {})) is not dict:
        return "its args or kwargs are no list and object"
    invoke = record.get("invoke", -1)
    if type(invoke) is not int or not -1 <= invoke <= MAX_COUNT:
        return "its invoke is no number of one"
    return "its file or line is no number of one"


def _read_function(args: list[Any]) -> Callable[..., Any]:
    first = args[0] if args else None
    if type(first) is not dict or first.keys() != {"function"}:
        _refuse("`apply` names no function")
    found = functions().get(first["function"]) if isinstance(first["function"], str) else None
    if found is None:
        _refuse(f"`apply` names {first['function']!r:.80}, which is not allowed in a graph")
    return found


def _read_tensor(
    number: int, record: TensorRecord, data: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    tensor = data.get(record.data) if record.data.startswith("tensor.") else None
    where = f"Tensor {number}"
    if tensor is None:
        raise WireError.content(where, "its numbers are not in the file")
    if record.order is not None:
        if sorted(record.order) != list(range(tensor.ndim)):
            raise WireError.content(where, f"its axes cannot be put in the order {record.order}")
        tensor = tensor.permute(record.order)
    if record.requires_grad and not (tensor.is_floating_point() or tensor.is_complex()):
        raise WireError.content(where, f"{tensor.dtype} takes no gradients")
    if record.parameter:
        return torch.nn.Parameter(tensor, requires_grad=record.requires_grad)
    return tensor.detach().requires_grad_(record.requires_grad)


#: Operations that a graph has lists of.
_KNOWN = DERIVING | {GUARDED, SELECT, STOP, PASSED}


def unpack(data: bytes, limits: Limits = LIMITS) -> Package:
    """The graph that `pack` wrote. Nothing of it is run, and the bytes may come from anyone.

    The user's files in it are marked `<sent: …>` and never opened on this machine.

    Args:
        limits: of what is read; it takes time in proportion to the size of the bytes.

    Raises:
        WireError: the bytes are damaged, of another format, or hold what a graph may not hold.
    """
    # Among a million new objects the collector would look for cycles again and again: there are none.
    collects = gc.isenabled()
    gc.disable()
    try:
        return _unpack(data, limits)
    finally:
        if collects:
            gc.enable()


def _unpack(data: bytes, limits: Limits) -> Package:
    document = _document(data, limits)
    tensors = _tensors(data)
    record = document.graph
    for name in ("files", "tensors", "nodes", "saves", "writes", "traced"):
        if len(getattr(record, name)) > limits.count:
            raise WireError.damaged(f"it has more than {limits.count} {name}")
    reader = _Reader(record, tensors, limits)
    for node in record.nodes:
        reader.append(node)
    graph = Graph()
    graph.nodes = reader.nodes
    graph.fixed_positions = record.fixed_positions
    graph.counts_tokens = record.counts_tokens
    known = [node for node in graph.nodes if node.kind == CALL and node.target in _KNOWN]
    graph.backwards = [node for node in known if node.target in DERIVING]
    graph.branched = any(node.target is GUARDED or node.target is SELECT for node in known)
    graph.stops = [node for node in known if is_stop(node)]
    graph.passed = {(one.invoke, one.args[1]): one for one in known if one.target is PASSED}
    graph.needs_grad = bool(graph.backwards) or any(
        one.tensor.requires_grad for one in reader.tensors
    )
    count = len(graph.nodes)
    for index in record.traced:
        if not 0 <= index < count or graph.nodes[index].kind == WRITE:
            raise WireError.content("The list of traced values", f"node {index} is no value")
        graph.traced.add(index)
    for number, index in enumerate(record.saves):
        if not 0 <= index < count or graph.nodes[index].kind == WRITE:
            raise WireError.content("The list of saves", f"node {index} is no value")
        graph.saves.append((graph.nodes[index], Box(number)))
    for index in record.writes:
        write = graph.nodes[index] if 0 <= index < count else None
        if write is None or write.kind != WRITE or (write.invoke, write.target) in graph.writes:
            raise WireError.content("The list of writes", f"node {index} is not the last write")
        graph.writes[write.invoke, write.target] = write
    named = {name: f"named.{name}" for name in document.named}
    used = {*named.values(), *(one.data for one in record.tensors)}
    if len(named) != len(document.named) or used != tensors.keys():
        raise WireError.damaged("the tensors are not those that the graph names")
    found = {name: tensors[key] for name, key in named.items()}
    return Package(graph, document.extra, found, document.library)


def _document(data: bytes, limits: Limits) -> Document:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8 or size > limits.header:
        raise WireError.damaged("the header is longer than the file")
    header = _json(data[8 : 8 + size])
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    text = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise WireError.damaged("it is no safetensors file with a graph in its metadata")
    written = _json(text)
    if not isinstance(written, dict):
        raise WireError.damaged("the graph is no JSON object")
    # The version comes first: another format may look different.
    found = written.get("format")
    if type(found) is not int or found != FORMAT:
        raise WireError.version(str(found)[:40], FORMAT, str(written.get("library"))[:40])
    try:
        return Document.model_validate(written)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:200]
        raise WireError.damaged(f"{place!r}: {first['msg'][:200]}") from None


def _json(text: str | bytes) -> Any:
    """Strict JSON: no key twice, no NaN, no number that a float cannot hold."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) == len(items):
            return found
        raise ValueError("a key stands twice in one object")

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError("a number is too large")
        return value

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number of JSON")

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(
            text, object_pairs_hook=pairs, parse_float=number, parse_constant=constant
        )
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise WireError.damaged(f"its JSON cannot be read ({reason})") from None


def _tensors(data: bytes) -> dict[str, torch.Tensor]:
    import safetensors.torch

    try:
        found = safetensors.torch.load(data)
    except Exception as error:  # it has errors of several kinds for what is not in order
        reason = f"{type(error).__name__}: {str(error)[:200]!r}"
        raise WireError.damaged(f"its tensors cannot be read ({reason})") from error
    for name, tensor in found.items():
        if tensor.dtype not in DTYPES:
            raise WireError.damaged(f"the tensor {name[:80]!r} has the dtype {tensor.dtype}")
    return found
