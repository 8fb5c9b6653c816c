"""Owns `Proxy`, the handle that the user writes with. It records while its block is open; after the
run it behaves as its saved value.

Aliasing. Graphs are functional, Python's tensors are not: `h = m.output; v = h[0]; v += 1` changes
`h` and the model. So a proxy is either a *root* (a value of its own; if it stands for a hook point,
changing it records a WRITE there) or a *view* of a parent proxy. Changing a view records the change,
then puts the changed part back into its parent, up to the root. A view whose parent was changed
meanwhile takes itself again from the parent's new node. Nodes recorded before a change keep meaning
the value from before it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import html
import logging
import operator
import sys
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any
from weakref import ref

import numpy as np
import torch

from .display import value_html
from .errors import (
    BlockError,
    CapturedTensorError,
    ForeignProxyError,
    Location,
    NotRunError,
    NotSavedError,
    OperationError,
    ScheduleError,
    StepError,
    near,
)
from .frames import entry
from .graph import Box, Graph
from .node import CALL, READ, WRITE, Captured, HookPoint, Node, captured, grad_point, user_line
from .operations import (
    AGAIN,
    APPLY,
    BACKWARD,
    ELEMENT,
    FIELD,
    FIRST_ARGUMENT,
    GETITEM,
    GRAD,
    IN_PLACE,
    ITEM,
    METHODS,
    OPERATORS,
    OVER_TOKENS,
    POSITIONS,
    PUT,
    SETITEM,
    TAKE,
    TENSOR_PROPERTIES,
    TOKENS,
    VIEW,
    Operation,
    function_operation,
    is_in_place,
)
from .recording import ABANDONED, DONE, FAILED, OPEN, RUNNING, Recording
from .structure import ATOMS, children, leaves, map_leaves

logger = logging.getLogger("graftwork")

# Answered at once from the schedule: they return numbers, not values.
_SHAPE_METHODS = frozenset(
    "size dim numel nelement ndimension is_floating_point is_complex is_signed element_size".split()
)
_SIZES = frozenset({"size", "numel", "nelement"})
_COUNTS = _SIZES | {"nbytes", "stride", "storage_offset"}
_SHAPE_PROPERTIES = frozenset("itemsize nbytes layout is_nested is_sparse is_quantized".split())
_DICT_METHODS = frozenset({"keys", "values", "items", "get", "to_tuple"})
_ON_DEMAND = frozenset({"item", "tolist", "numpy"})
# Methods of sparse tensors, and fields of what max, sort and topk return: the fields are meant.
_FIELDS_FIRST = frozenset({"values", "indices"})
_INDEX_DTYPES = frozenset({torch.int64, torch.int32, torch.int16, torch.int8})
# By which a class asks for its attributes.
_ACCESSORS = frozenset({"__get__", "__set__", "__delete__"})
# Leaves that Python code can change: what a node holds is what they were at its line.
_CHANGEABLE = frozenset({set, bytearray, deque})
# What torch calls the argument that a function may show or change.
_FIRST = frozenset({"input", "tensor", "self"})
# `a += b` binds the name `a` anew, so it may give a new value where `a` cannot be changed.
_AUGMENTED = frozenset(op for op in OPERATORS.values() if op.effect is IN_PLACE)
# Ufuncs that Python's operators call under another name.
_UFUNCS = {
    "add": "add",
    "subtract": "sub",
    "multiply": "mul",
    "divide": "truediv",
    "true_divide": "truediv",
    "floor_divide": "floordiv",
    "remainder": "mod",
    "power": "pow",
    "matmul": "matmul",
    "bitwise_and": "and_",
    "bitwise_or": "or_",
    "bitwise_xor": "xor",
    "left_shift": "lshift",
    "right_shift": "rshift",
    "equal": "eq",
    "not_equal": "ne",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "negative": "neg",
    "absolute": "abs",
    "invert": "invert",
}


def _no_port(name: str) -> Any:
    """A value has no port: to read it asks `__getattr__`, and to assign it is refused."""

    def read(proxy: Any) -> Any:
        raise AttributeError(name)

    def write(proxy: Any, value: Any) -> None:
        getattr(proxy, name)  # what it should be, where a submodule has the name of a port
        raise OperationError.attribute(name)

    return property(read, write)


class Proxy:
    """What every handle on a node of a recording does.

    Python lets no class have slots and be a tensor, too: so the attributes are those of the kinds,
    `Handle` and `SavedTensor`.

    Attributes:
        _recording: the block it belongs to.
        _node: the node it stands for.
        _parent, _view: for a view, what it shows and how: an operation with its arguments, or None
            for a second handle on the same value.
        _seen: for a view, the parent's node that `_node` was taken from.
        _place: for the root of a hook point, its invoke and hook point.
        _box: where its saved value arrives.
        _retained: where the gradients arrive that `retain_grad` asks for, one for each backward.
    """

    __slots__ = tuple[str, ...]()
    _recording: Recording
    _node: Node
    _place: tuple[int, HookPoint] | None
    _parent: Proxy | None
    _view: tuple[Operation, tuple[Any, ...], dict[str, Any]] | None
    _seen: Node | None
    _box: Box | None
    _retained: list[Box] | None
    # What `save` makes of it: a tensor, or anything else.
    _kind: type[Handle]
    _tensor_kind: type[SavedTensor]
    output = _no_port("output")
    input = _no_port("input")
    inputs = _no_port("inputs")

    if TYPE_CHECKING:
        # A tensor has C's: with one in Python it is a sequence to C, also where it is a scalar.
        def __getitem__(self, key: Any) -> Any: ...

        def __setitem__(self, key: Any, value: Any) -> None: ...

    # ---------------------------------------------------------------- recording

    def save(self) -> Any:
        """Keep this value, as it is at this line, beyond the run.

        Returns:
            For a tensor, a `torch.Tensor` (`SavedTensor`) that has its numbers, and storage of its own,
            once the block has run. For a structure, a value of Python or what a Python function gives:
            a proxy that behaves as the value. `.value` is the plain value of both. This proxy gets
            it, too.
        """
        recording = self._recording
        if recording.state is not OPEN:
            self._known()
            return self
        node = self._node if self._parent is None else _current(self)
        box = recording.save(node)
        if self._box is None or not _was_saved(self):
            self._box = box
        if type(box) is Box and recording.ask().is_tensor(node):
            saved: Proxy = self._tensor_kind.of(recording, node, self, box)
        else:
            saved = self._kind(recording, node, None, self, None, node, box)
        recording.saved.append(saved)
        return saved

    @property
    def value(self) -> Any:
        """The saved value, after the block.

        Raises:
            NotSavedError: it was not saved.
            NotRunError: the block has not run.
            StepError: the forward never reached it.
        """
        return self._known()

    def _known(self) -> Any:
        box = self._box
        if box is not None:
            if box.full:
                return box.value
            if box.error is not None:
                raise box.error.with_traceback(None)  # read again and again, it would grow
        what, where = self._node.describe(), self._node.location
        state = self._recording.state
        if state is ABANDONED:
            raise NotRunError.abandoned(what)
        if box is None and state is DONE:
            raise NotSavedError.value(what, where)
        if state is FAILED:
            raise NotRunError.failed(what, where)
        if state is RUNNING:
            raise NotRunError.running(what, where)
        if self._recording.session is not None:
            raise NotRunError.session(what, where)
        raise NotRunError.recording(what, where)

    def _end(self) -> None:
        """The block has ended. A saved part must not keep the saved whole alive."""
        if self._recording.retained:
            self._retained = _owner(self)._retained
        self._parent = None

    @property
    def t(self) -> Tokens:
        """Index by position in this prompt's own tokens: `.t[0]`, `.t[-1]`, `.t[2:5]`."""
        return Tokens(self)

    token = t

    @property
    def shape(self) -> Any:
        """Shape of the value; of a structure, the structure of its shapes.

        In an edit, and in a loop that is recorded once, the sizes that are those of the prompt or of
        the step are proxies of numbers.
        """
        if self._recording.loop is not None and self._recording.state is OPEN:
            return _lasting_shape(self)
        if self._recording.state is OPEN:
            self._recording.sized.append(_current(self))
        return _described(self, lambda leaf: leaf.shape)

    @property
    def dtype(self) -> Any:
        return _described(self, lambda leaf: leaf.dtype)

    @property
    def device(self) -> Any:
        if self._recording.state is OPEN:
            return self._recording.ask().device()
        return self._known().device

    @property
    def ndim(self) -> Any:
        return _described(self, lambda leaf: leaf.ndim)

    # ---------------------------------------------------------------- gradients

    def backward(
        self,
        gradient: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> Any:
        """Derive this value at that point of the run, as `Tensor.backward` does.

        The memory of the forward is kept until the last backward of the block has run. The model's
        parameters get gradients where they are named in `inputs`, or used in the block; or where others
        of the model are frozen, so that these are the ones to train.

        Returns:
            A context: inside `with loss.backward():`, `.grad` means the gradients of this backward.
            Elsewhere it means those of the last one written so far, or of the first one to come.

        Raises:
            StepError: the block is a generation, which runs without gradients.
        """
        recording = self._recording
        if recording.state is not OPEN:
            return self._known().backward(gradient, retain_graph, create_graph, inputs)
        if recording.no_gradients is not None:
            raise StepError.no_gradient("backward()", recording.no_gradients, user_line(2))
        graph = recording.graph
        inputs = _as_inputs(recording, inputs)
        args = (_current(self), _lower(recording, gradient), _lower(recording, inputs))
        options = {"retain_graph": retain_graph, "create_graph": create_graph}
        graph.backwards.append(graph.append(CALL, BACKWARD, args, options, recording.invoke))
        graph.needs_grad = True
        number = len(graph.backwards) - 1
        for proxy in recording.retained:
            with Backward(recording, number):
                gradient = _gradient(proxy)
            proxy._retained.append(recording.save(_current(gradient)))
        return Backward(recording, number)

    def retain_grad(self) -> None:
        """Keep the gradient of this value, if it is saved: after the block, `.grad` gives the sum over
        the backwards that follow in it.

        Raises:
            StepError: the block is a generation, which runs without gradients.
        """
        recording = self._recording
        if recording.state is not OPEN:
            self._known().retain_grad()
            return
        if recording.no_gradients is not None:
            raise StepError.no_gradient("retain_grad()", recording.no_gradients, user_line(2))
        owner = _owner(self)
        if owner._retained is None:
            owner._retained = []
            recording.retained.append(owner)

    @property
    def grad(self) -> Any:
        """The gradient of this value in a backward of the block; it may be edited and replaced.

        Of a part, such as `h[:, -1]`, it is that part of the gradient of the whole.
        """
        if self._recording.state is not OPEN:
            value = self._known()
            if self._retained is None:
                return value.grad
            found = [box.value for box in self._retained if box.full]
            return sum(found[1:], found[0]) if found else None
        return _gradient(self)

    @grad.setter
    def grad(self, value: Any) -> None:
        if self._recording.state is not OPEN:
            self._known().grad = _unwrap(value)
            return
        assign(self._recording, _gradient(self), value)

    # ---------------------------------------------------------------- indexing

    def _item(self, key: Any) -> Any:
        if self._view is not None and self._view[0] is ELEMENT:
            _say_row(key)
        return _record(self._recording, _indexing(key), (self, key), {})

    def _set_item(self, key: Any, value: Any) -> None:
        if self._view is not None and self._view[0] is ELEMENT:
            _say_row(key)
        # `p[k] += 1` ends in `p[k] = part`, where the part has already been put back.
        if _is_part(value, self, GETITEM, (key,)):
            return
        if type(key) in (int, str):
            _let_go(self, (*_path(self), key), of_tensors=type(key) is int)
        self._change(SETITEM, (key, value), {})

    def __iter__(self) -> Iterator[Any]:
        if self._recording.state is not OPEN:
            return iter(self._known())
        return iter([self[i] for i in range(self._length("iteration"))])

    def __len__(self) -> int:
        if self._recording.state is not OPEN:
            return len(self._known())
        return self._length("len()")

    def _length(self, use: str) -> int:
        fake = _sized(self)
        recording = self._recording
        recording.sized.append(_current(self))
        if recording.loop is not None and isinstance(fake, torch.Tensor) and fake.ndim:
            size = recording.ask().sizes(_current(self))[0]
            if size is None:
                whose = "the prompts" if recording.lasting else "each step"
                reason = f"its length is that of {whose}"
                raise NotRunError.no_values(use, self._node.describe(), reason, user_line(3))
            return size
        if isinstance(fake, torch.Tensor) and fake.ndim == 0:
            raise OperationError(
                f"{use} of a scalar: {self._node.describe()}. To make one tensor of several values "
                "use `torch.stack`, not `torch.tensor`."
            )
        return len(fake)

    def __contains__(self, item: Any) -> bool:
        if self._recording.state is OPEN and isinstance(item, str):
            return item in self._recording.ask().value(_current(self))
        if isinstance(item, Proxy):
            item = item._on_demand("in")
        return item in self._on_demand("in")

    # ---------------------------------------------------------------- attributes and calls

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        if self._recording.state is not OPEN:
            return getattr(self._known(), name)
        return self._attribute(name)

    def _attribute(self, name: str) -> Any:
        """What `proxy.name` means while the block is open, if this class does not define it."""
        if name in TENSOR_PROPERTIES:
            return _record(self._recording, FIELD, (self, name), {})
        if name in _SIZES and self._recording.loop is not None:
            return functools.partial(_lasting_size, self, name)
        if name in _SHAPE_METHODS or name in _SHAPE_PROPERTIES:
            if name in _COUNTS:
                self._recording.sized.append(_current(self))
            return getattr(_sized(self), name)
        if name in _ON_DEMAND:
            return lambda *args: getattr(self._on_demand(f".{name}()"), name)(*args)
        if name in METHODS and name not in _FIELDS_FIRST:
            return Method(self, name)
        if name.startswith("_"):
            raise AttributeError(f"a proxy has no attribute `{name}`")
        place = self._place
        if place is not None and place[1].port == "output":
            # BERT has submodules called `output`: what the value does not have, they do.
            meant = self._recording.ask().namesake(place[1], name)
            if meant is not None:
                return meant
        return _record(self._recording, FIELD, (self, name), {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        view = self._view
        if view is not None and view[0] is FIELD:
            name, parent = view[1][0], self._parent
            assert parent is not None
            if name in _DICT_METHODS and parent._recording.state is OPEN:
                fake = parent._recording.ask().value(_current(parent))
                if isinstance(fake, dict):
                    return _dict_method(parent, fake, name, *args)
            if name in METHODS:
                return Method(parent, name)(*args, **kwargs)
            raise OperationError(
                f"`{name}` is no method of a tensor. {near(name, METHODS)} Any function can be "
                "recorded with `graftwork.apply(function, proxy)`."
            )
        if self._recording.state is not OPEN:
            return self._known()(*args, **kwargs)
        raise OperationError(
            f"{self._node.describe()} is a value and cannot be called. To apply a module write "
            "`model.path(proxy)`; to run a function, `graftwork.apply(function, proxy)`."
        )

    def _change(self, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record an in-place operation on this proxy."""
        recording = self._recording
        lowered = tuple(_lower(recording, a) for a in args)
        options = {key: _lower(recording, v) for key, v in kwargs.items()} if kwargs else {}
        graph = recording.graph
        _assign(
            self,
            graph.append(CALL, operation, (_current(self), *lowered), options, recording.invoke),
        )
        if recording.early is not None:
            recording.early()

    # ---------------------------------------------------------------- values on demand

    def _on_demand(self, use: str) -> Any:
        """The real value: inside the block, what is recorded so far runs up to it."""
        recording = self._recording
        if recording.state is not OPEN:
            return self._known()
        return recording.demand(_current(self), use)

    def _after(self, use: str) -> Any:
        """The saved value, for what has no meaning inside the block."""
        if self._recording.state is not OPEN:
            return self._known()
        raise NotRunError.on_demand(use, self._node.describe(), user_line(2))

    def __bool__(self) -> bool:
        return bool(self._on_demand("if / bool()"))

    def __int__(self) -> int:
        return int(self._on_demand("int()"))

    def __float__(self) -> float:
        return float(self._on_demand("float()"))

    def __round__(self, digits: int | None = None) -> Any:
        return round(self._on_demand("round()").item(), digits)

    def __complex__(self) -> complex:
        return complex(self._on_demand("complex()"))

    def __index__(self) -> int:
        return self._on_demand("use as an index").__index__()  # type: ignore[no-any-return]

    def __format__(self, spec: str) -> str:
        return format(self._on_demand("format()"), spec)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        array = np.asarray(self._on_demand("numpy"), dtype=dtype)
        return array.copy() if copy else array

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        # `array + proxy` ends here, too.
        operation = _UFUNCS.get(ufunc.__name__)
        if self._recording.state is OPEN and operation and method == "__call__" and not kwargs:
            return getattr(operator, operation)(*map(_tensor, inputs))

        def real(leaf: Any) -> Any:
            if isinstance(leaf, Proxy):
                leaf = leaf._on_demand(f"numpy.{ufunc.__name__}")
            return np.asarray(leaf) if isinstance(leaf, torch.Tensor) else leaf

        arrays, options = map_leaves(real, inputs), map_leaves(real, kwargs)
        return torch.from_numpy(np.asarray(getattr(ufunc, method)(*arrays, **options)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A saved proxy is pickled as its value, so that `torch.load` needs no trust in our names.
        value = self._after("pickle")
        if isinstance(value, torch.Tensor):
            return value.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]
        return _identity, (value,)

    def __copy__(self) -> Any:
        return copy.copy(self._after("copy"))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._after("copy"), memo)

    def __dir__(self) -> list[str]:
        if self._recording.state is OPEN:
            return sorted({"save", "value", "t", "token", "shape", "dtype", "device", *METHODS})
        return sorted({"save", "value", *dir(self._known())})

    def __repr__(self) -> str:
        if self._box is not None and self._box.full:
            return repr(self._box.value)
        saved = ", saved" if self._box is not None else ""
        return f"<proxy of {self._node.describe()}{saved}, recorded at {self._node.location}>"

    def _repr_html_(self) -> str:
        if self._box is not None and self._box.full:
            return value_html(self._box.value)
        return f"<code>{html.escape(repr(self))}</code>"

    __hash__ = object.__hash__

    # ---------------------------------------------------------------- torch functions

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        recording = None
        for leaf in leaves((args, kwargs)):
            if isinstance(leaf, Proxy) and leaf._recording.state is OPEN:
                recording = leaf._recording
                break
        if recording is None:
            return _after_run(function, args, kwargs)
        if kwargs.get("out") is not None:
            raise OperationError("`out=` cannot be recorded; assign the result instead.")
        name = getattr(function, "__name__", "")
        if not args and _FIRST & kwargs.keys():
            key = next(key for key in kwargs if key in _FIRST)
            args, kwargs = (kwargs[key],), {k: v for k, v in kwargs.items() if k != key}
        first = args[0] if args else None
        if name in _ACCESSORS:
            described = getattr(getattr(function, "__self__", None), "__name__", "")
            if name == "__get__" and isinstance(first, Proxy):
                return first._attribute(described)
            raise OperationError.attribute(described)
        if name in _SHAPE_METHODS and isinstance(first, Proxy):
            return first._attribute(name)(*args[1:], **kwargs)
        if name == "__getitem__":
            if isinstance(first, Proxy):
                return first._item(args[1])
            return _record(recording, _indexing(args[1]), args, kwargs)
        if name == "__setitem__" and isinstance(first, Proxy):
            return first._set_item(*args[1:])
        if isinstance(first, SavedTensor) and getattr(torch.Tensor, name, None) is function:
            return first._attribute(name)(*args[1:], **kwargs)
        if function is torch.autograd.grad:
            return _autograd_grad(recording, *args, **kwargs)
        operation = function_operation(function)
        if kwargs.get("inplace") and isinstance(first, Proxy):
            kwargs = {**kwargs, "inplace": False}
            operation = Operation(operation.name, operation.function, IN_PLACE)
        if (operation.effect is IN_PLACE or name == "__setitem__") and not isinstance(first, Proxy):
            if name == "__setitem__" or is_in_place(name):
                raise OperationError.outside_write(name)
            # `tensor += proxy`: a tensor from outside is not changed, the name is bound anew.
            operation = Operation(operation.name, operation.function)
        return _record(recording, operation, args, kwargs)


class Handle(Proxy):
    """The handle of a value that is no `torch.Tensor` to others."""

    __slots__ = (
        "__weakref__",
        "_box",
        "_node",
        "_parent",
        "_place",
        "_recording",
        "_retained",
        "_seen",
        "_view",
    )

    def __init__(
        self,
        recording: Recording,
        node: Node,
        place: tuple[int, HookPoint] | None = None,
        parent: Proxy | None = None,
        view: tuple[Operation, tuple[Any, ...], dict[str, Any]] | None = None,
        seen: Node | None = None,
        box: Box | None = None,
    ) -> None:
        self._recording = recording
        self._node = node
        self._place = place
        self._parent = parent
        self._view = view
        self._seen = seen
        self._box = box
        self._retained = None

    def __getitem__(self, key: Any) -> Any:
        if self._recording.state is not OPEN:
            return self._known()[_unwrap(key)]
        return self._item(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        if self._recording.state is not OPEN:
            self._known()[_unwrap(key)] = _unwrap(value)
            return
        self._set_item(key, value)


class SavedTensor(Proxy, torch.Tensor):  # type: ignore[misc, override]
    """A saved tensor: records while its block is open, and is its value afterwards.

    What is asked of it in Python comes by `__torch_function__` and is answered by the value itself,
    with its autograd history. What reads tensors in C (`torch.tensor(list)`, assigning to `.data`)
    finds its own memory: until the block has run that of a meta tensor, which has no numbers to be
    mistaken for some, then the value's, shared.

    Results of operations are plain tensors, so a value does not keep its block alive further on.
    """

    _place = _view = _retained = None

    @classmethod
    def of(cls, recording: Recording, node: Node, parent: Proxy | None, box: Box) -> SavedTensor:
        """A second handle on the value of `parent`, whose value arrives in `box`."""
        saved: SavedTensor = _make_subclass(cls, _UNKNOWN)
        saved._recording, saved._parent, saved._box = recording, parent, box
        saved._node = saved._seen = node
        return saved

    def _end(self) -> None:
        super()._end()
        self._take_memory()

    def _take_memory(self) -> None:
        """Let what reads this in C find the value."""
        box = self._box
        assert box is not None
        if box.full and isinstance(box.value, torch.Tensor):
            _swap_memory(self, box.value.detach())

    def _like(self, value: torch.Tensor) -> SavedTensor:
        """A value of this kind that nobody records: `nn.Parameter` wants that of `detach`."""
        box = Box(-1)
        box.value, box.full = value, True
        saved = type(self).of(self._recording, self._node, None, box)
        saved._take_memory()
        return saved

    def _plain(self) -> torch.Tensor:
        """The value as what it is to others: a parameter, once `nn.Parameter` has made it one."""
        value: torch.Tensor = self._after("copy")
        if getattr(self, "_is_param", False):
            return torch.nn.Parameter(value.detach(), value.requires_grad)
        return value

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __copy__(self) -> Any:
        return copy.copy(self._plain())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._plain(), memo)


_make_subclass = torch.Tensor._make_subclass
_swap_memory = torch._C._swap_tensor_impl
_UNKNOWN = torch.empty(0, device="meta")


class BlockOutput(Proxy):
    """The output of a transformer block. Part 0 is its hidden states [batch, token, d_model].

    Blocks return their hidden states alone since transformers 5 and returned a tuple before; a few
    still do. `output[0]` means the hidden states in each case, and so does `output` where they
    come alone. A row of the batch is `output[i:i+1]`.
    """

    __slots__ = ()

    def _item(self, key: Any) -> Any:
        if type(key) is int:
            return _record(self._recording, ELEMENT, (self, key), {})
        return super()._item(key)

    def _set_item(self, key: Any, value: Any) -> None:
        if type(key) is int:
            if _is_part(value, self, ELEMENT, (key,)):
                return
            part = _lower(self._recording, value)
            _let_go(self, (*_path(self), key))
            graph = self._recording.graph
            args: tuple[Any, ...] = (_current(self), part, ELEMENT, (key,), {})
            _assign(self, graph.append(CALL, PUT, args, None, self._recording.invoke))
            return
        super()._set_item(key, value)

    def __iter__(self) -> Iterator[Any]:
        if self._recording.state is OPEN:
            fake = self._recording.ask().value(_current(self))
            return iter(
                [self[i] for i in range(1 if isinstance(fake, torch.Tensor) else len(fake))]
            )
        return super().__iter__()


class BlockHandle(BlockOutput, Handle):
    """The handle of a block's output."""

    __slots__ = ()


class SavedBlockOutput(BlockOutput, SavedTensor):  # type: ignore[misc, override]
    """A saved output of a block, where it is a tensor."""


Proxy._kind, Proxy._tensor_kind = Handle, SavedTensor
BlockOutput._kind, BlockOutput._tensor_kind = BlockHandle, SavedBlockOutput


def _say_row(key: Any) -> None:
    """Say once for a line that a number behind a block's `output[0]` is a row of the batch."""
    if type(key) is int:
        _log_row(user_line(3))


@functools.lru_cache(maxsize=1024)
def _log_row(line: Location) -> None:
    logger.warning(
        "%s: `output[0]` of a block is the hidden states of the whole batch [batch, token, d_model], "
        "so a number behind it is a row of the batch; of a module that is no block, as in "
        "`mlp.output[0]`, `[0]` is a row already. For a token write `output[0][:, i]` or "
        "`output[0].t[i]`; for a row that is meant, `output[i:i+1]`.",
        line,
    )


class Backward:
    """One `backward()` of a block; inside `with loss.backward():` `.grad` means its gradients."""

    __slots__ = ("_before", "_number", "_recording")

    def __init__(self, recording: Recording, number: int) -> None:
        self._recording = recording
        self._number = number
        self._before: int | None = None

    def __enter__(self) -> None:
        self._before, self._recording.backward = self._recording.backward, self._number

    def __exit__(self, *exception: Any) -> None:
        self._recording.backward = self._before


class Tokens:
    """`proxy.t`: positions counted in the prompt's own tokens, whatever it is batched with.

    `.t[0]`, `.t[-1]` and `.t[2:5]` are views. `.t.mean()`, `.sum()`, `.max()` and `.min()` reduce over
    each row's own tokens: [batch, token, d_model] becomes [batch, d_model].
    """

    __slots__ = ("_proxy",)

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy

    def _open(self) -> Recording:
        recording = self._proxy._recording
        if recording.state is not OPEN:
            raise OperationError(
                "`.t` counts tokens inside a block. After it, index the value: `h.value[:, i]`."
            )
        return recording

    def _key(self, key: Any) -> Any:
        recording = self._open()
        node = _current(self._proxy)
        if recording.loop is None:
            return recording.ask().token_index(node, key)
        # Where the tokens lie is known when this is placed: see template.py.
        if any(isinstance(leaf, Proxy) for leaf in leaves(key)):
            raise OperationError("`.t` takes numbers here, no values of the block.")
        args = (node, _lower(recording, key), recording.ask().token_axis(node))
        return Handle(recording, recording.graph.append(CALL, TOKENS, args, None, recording.invoke))

    def __getitem__(self, key: Any) -> Any:
        found = self._key(key)
        if type(key) in (int, slice):
            # A view also where rows of different lengths make torch copy: what is written there is
            # put back by the same index.
            return _record(self._proxy._recording, GETITEM, (self._proxy, found), {})
        return Proxy._item(self._proxy, found)

    def __setitem__(self, key: Any, value: Any) -> None:
        proxy, found = self._proxy, self._key(key)
        # `h.t[0] += 1` ends in `h.t[0] = part`, where the part has already been put back.
        if not (type(key) in (int, slice) and _is_part(value, proxy, GETITEM, (found,))):
            proxy._change(SETITEM, (found, value), {})

    def mean(self, keepdim: bool = False, dtype: torch.dtype | None = None) -> Any:
        """The mean over each row's own tokens."""
        return self._reduced("mean", keepdim, dtype)

    def sum(self, keepdim: bool = False, dtype: torch.dtype | None = None) -> Any:
        """The sum over each row's own tokens."""
        return self._reduced("sum", keepdim, dtype)

    def max(self, keepdim: bool = False) -> Any:
        """The largest values over each row's own tokens, without their positions."""
        return self._reduced("max", keepdim, None)

    def min(self, keepdim: bool = False) -> Any:
        """The smallest values over each row's own tokens, without their positions."""
        return self._reduced("min", keepdim, None)

    def _reduced(self, name: str, keepdim: bool, dtype: torch.dtype | None) -> Any:
        recording, proxy = self._open(), self._proxy
        ask, node = recording.ask(), _current(proxy)
        axis, across = ask.own_axes(node)
        rows = ask.own_rows(node) if recording.loop is None else positions_of(proxy)
        args = (proxy, rows, axis, across, keepdim, dtype)
        return _record(recording, OVER_TOKENS[name], args, {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = ", ".join(f"`.t.{one}()`" for one in OVER_TOKENS)
        raise AttributeError(
            f"`.t` has no `{name}`. It has positions (`.t[0]`, `.t[-1]`, `.t[2:5]`) and reductions "
            f"over each row's own tokens: {known}. For others, `invoker.mask` [row, token] tells which "
            "entries are own tokens."
        )

    def __call__(self) -> Any:
        """`Tensor.t()`, the transpose of a matrix."""
        return Method(self._proxy, "t")()


class Method:
    """A tensor method of a proxy, to be called."""

    __slots__ = ("_name", "_proxy")

    def __init__(self, proxy: Proxy, name: str) -> None:
        self._proxy = proxy
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        proxy, operation = self._proxy, METHODS[self._name]
        if proxy._recording.state is not OPEN:
            return getattr(proxy._known(), self._name)(*_unwrap(args), **_unwrap(kwargs))
        return _record(proxy._recording, operation, (proxy, *args), kwargs)

    def __repr__(self) -> str:
        return f"<method `{self._name}` of {self._proxy!r}>"


# -------------------------------------------------------------------- how recording works


def _current(proxy: Proxy) -> Node:
    """The node that the proxy stands for now."""
    parent = proxy._parent
    if parent is None:
        return proxy._node
    node = _current(parent)
    if node is not proxy._seen:
        proxy._seen = node
        if proxy._view is None:
            proxy._node = node
        else:
            operation, args, kwargs = proxy._view
            recording = proxy._recording
            again = (node, *args)
            if operation.copies:
                node = proxy._seen = _laid_out(parent)
                operation, again, kwargs = AGAIN, (node, proxy._node, operation, args, kwargs), {}
            # Not a branch's own: what is outside of it may use it, too.
            proxy._node = Graph.append(
                recording.graph, CALL, operation, again, kwargs, recording.invoke
            )
    return proxy._node


def positions_of(value: Proxy) -> Any:
    """Where the prompt's own tokens lie in a value [batch, token, …]: for each row the first column,
    the column behind the last one, and the number of the first token."""
    recording, node = value._recording, _current(value)
    if recording.loop is not None:
        # Known when this is placed: see template.py.
        graph = recording.graph
        return Handle(recording, graph.append(CALL, POSITIONS, (node,), None, recording.invoke))
    recording.graph.fixed_positions = True
    return recording.ask().positions(node)


def current_node(proxy: Proxy) -> Node:
    """The node that the proxy stands for now."""
    return _current(proxy)


def _laid_out(proxy: Proxy) -> Node:
    """As `_current`, with the strides that torch's tensor would have.

    The result of an in-place operation on a part has memory of its own, without the gaps of the
    part; but whether `reshape` shows memory or copies it depends on the gaps.
    """
    node, parent, view = _current(proxy), proxy._parent, proxy._view
    if parent is None:
        return node
    if view is None:
        return _laid_out(parent)
    operation, args, kwargs = view
    if node.target is not operation and not operation.copies:
        recording = proxy._recording
        args = (_laid_out(parent), *args)
        node = proxy._node = Graph.append(
            recording.graph, CALL, operation, args, kwargs, recording.invoke
        )
    return node


def _assign(proxy: Proxy, node: Node) -> None:
    """Make `node` the value of `proxy`, and of everything that it is a view of."""
    recording = proxy._recording
    parent = proxy._parent
    if parent is not None:
        if proxy._view is None:
            _assign(parent, node)
            proxy._node = proxy._seen = node
            return
        operation, args, kwargs = proxy._view
        whole = recording.graph.append(
            CALL, PUT, (_current(parent), node, operation, args, kwargs), None, recording.invoke
        )
        _assign(parent, whole)
        if operation.copies and recording.graph.guard is not None:
            # Behind the branch it is not taken from its whole again, so it is a choice itself.
            node = recording.graph.select(node, proxy._node, recording.invoke)  # type: ignore[attr-defined]
        proxy._node, proxy._seen = node, whole
        return
    if recording.loop is not None and proxy._node.index < recording.loop:
        raise BlockError.changes_outer(proxy._node.describe(), proxy._node.location)
    if recording.cut:
        _check_cut(proxy)
    if recording.graph.guard is not None:
        node = recording.graph.select(node, proxy._node, recording.invoke)  # type: ignore[attr-defined]
    proxy._node = node
    place = proxy._place
    # A proxy whose hook point was assigned anew since stands for the old value alone.
    if place is not None and recording.current.get(place) is proxy:
        _write(recording, place, node)


def _cut(proxy: Proxy) -> None:
    """What `proxy` stands for is assigned anew; below a branch it may still be there, or not."""
    recording = proxy._recording
    if recording.graph.guard is not None:
        recording.cut[id(proxy)] = (proxy, recording.graph, user_line(4))


def _check_cut(proxy: Proxy) -> None:
    """Refuse to write into what a branch, which is closed by now, may have cut off from its place."""
    recording = proxy._recording
    found = recording.cut.get(id(proxy))
    if found is None:
        return
    _, branch, location = found
    graph: Any = recording.graph
    while graph is not branch:
        if graph.guard is None:
            raise BlockError.cut_in_branch(proxy._node.describe(), proxy._node.location, location)
        graph = graph.around


def _gradient(proxy: Proxy) -> Any:
    """The proxy of the gradient of `proxy`.

    A view shows the memory of its whole, so its gradient is that view of the whole's gradient: the
    one of the topmost tensor among its parents. For autograd to pass through it, what arrived at a
    hook point is written back there.
    """
    recording, graph = proxy._recording, proxy._recording.graph
    if recording.no_gradients is not None:
        raise StepError.no_gradient("grad", recording.no_gradients, user_line(3))
    if isinstance(proxy, BlockOutput):
        proxy = proxy[0]  # the hidden states
    chain = [proxy]
    while chain[-1]._parent is not None and not _is_cut_off(chain[-1]):
        chain.append(chain[-1]._parent)
    root = chain[-1]
    computed = next((i for i, one in enumerate(chain) if one._view and one._view[0].computed), None)
    if computed is not None:
        # The forward goes on from what it is computed of: put back, it goes through it.
        owner = chain[computed]
        node = _current(owner)
        if node.index not in graph.traced:
            graph.traced.add(node.index)
            if node.target.computed:
                _assign(owner, node)
        top: int | None = computed
    else:
        top = next((i for i in reversed(range(len(chain))) if _is_tensor(chain[i])), None)
    if top is None:
        raise OperationError(
            f"`{proxy._node.describe().strip('`')}.grad`: only a floating point tensor has a gradient, "
            "and this has several parts: take that of one, such as `.output[0].grad`."
        )
    node = _current(chain[top])
    number = recording.backward
    if number is None:
        number = _last_backward(graph, recording.invoke, node.invoke)
    point = grad_point(node, number)
    if computed is None:
        _put_on_path(root, node)
    where: Any = (node.invoke, point)
    found = recording.current.get(where)
    if found is None:
        read = graph.append(READ, point, (), None, node.invoke)
        found = recording.current[where] = Handle(recording, read, where)
    for view in reversed(chain[:top]):
        if view._view is not None:
            operation, args, kwargs = view._view
            found = _record(recording, operation, (found, *args), kwargs)
    return found


def _put_on_path(root: Proxy, node: Node) -> None:
    """Let autograd pass through the value of `node`, which is that of `root` or a part of it."""
    recording, graph, place = root._recording, root._recording.graph, root._place
    if place is not None and type(place[1]) is HookPoint:
        arrived = root._node
        while arrived.target is PUT:  # beside the part that was changed, what arrived goes on
            arrived = arrived.args[0]
        if arrived.kind == READ:
            graph.traced.add(arrived.index)
        is_read = root._node.kind == READ
        if is_read and recording.current.get(place) is root and place not in graph.writes:
            _write(recording, place, root._node)
    graph.traced.add(node.index)


def _as_inputs(recording: Recording, inputs: Any) -> Any:
    """What a backward is to reach: values of the block are put on autograd's path."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Proxy) or leaf._recording is not recording:
            return leaf
        if isinstance(leaf, BlockOutput):
            leaf = leaf[0]
        root = leaf
        while root._parent is not None and not _is_cut_off(root):
            root = root._parent
        _put_on_path(root, _current(leaf))
        return leaf

    return map_leaves(one, inputs)


def _autograd_grad(
    recording: Recording,
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    **options: Any,
) -> Any:
    """`torch.autograd.grad` on values of the block: a tuple of gradients."""
    if recording.no_gradients is not None:
        raise StepError.no_gradient("torch.autograd.grad", recording.no_gradients, user_line(4))
    graph = recording.graph
    single = isinstance(inputs, Proxy)
    inputs = _as_inputs(recording, [inputs] if single else list(inputs))
    args = tuple(_lower(recording, value) for value in (outputs, inputs, grad_outputs))
    options = {"retain_graph": retain_graph, "create_graph": create_graph, **options}
    node = graph.append(CALL, GRAD, args, options, recording.invoke)
    graph.backwards.append(node)
    graph.needs_grad = True
    found = Handle(recording, node)
    return tuple(found[i] for i in range(len(inputs)))


def _is_cut_off(proxy: Proxy) -> bool:
    """True for what shows the memory of its whole, or may, but has a gradient of its own."""
    view = proxy._view
    return view is not None and (
        view[0] is METHODS["detach"]
        or view[0] is ITEM
        or (view[0] is FIELD and view[1] == ("data",))
    )


def _owner(proxy: Proxy) -> Proxy:
    """The proxy that this is a second handle of."""
    while proxy._parent is not None and proxy._view is None:
        proxy = proxy._parent
    return proxy


def _last_backward(graph: Graph, *invokes: int) -> int:
    """The last backward written in the first of the invokes that has one; else the next to come."""
    for invoke in invokes:
        for number in reversed(range(len(graph.backwards))):
            one = graph.backwards[number]
            if one.invoke == invoke and one.target is BACKWARD:
                return number
    return len(graph.backwards)


def _is_tensor(proxy: Proxy) -> bool:
    if proxy._view is not None and proxy._view[0] is ELEMENT:
        return True
    try:
        return isinstance(proxy._recording.ask().value(_current(proxy)), torch.Tensor)
    except ScheduleError:
        # The model cannot be measured: a module's inputs are no tensor, other roots may be one.
        target = proxy._node.target
        return not (type(target) is HookPoint and target.port == "inputs")


def _write(recording: Recording, place: tuple[int, HookPoint], node: Node) -> None:
    invoke, hook_point = place
    write = recording.graph.append(WRITE, hook_point, (node,), None, invoke)
    recording.graph.writes[place] = write


def assign(recording: Recording, proxy: Proxy, value: Any) -> None:
    """`module.output = value`: `proxy` is what is at that hook point now."""
    if isinstance(value, Proxy) and (
        value is proxy or (value._parent is proxy and not value._view)
    ):
        return
    place = proxy._place
    if place is None:
        # A port derived from another one, as `input` is from `inputs`, is written through it.
        if proxy._parent is None or proxy._view is None:
            raise OperationError(f"{proxy._node.describe()} is no place that can be assigned")
        operation, args, _ = proxy._view
        if not _is_part(value, proxy._parent, operation, args):
            node = _as_node(recording, value, _current(proxy))
            _bind_anew(proxy)
            _assign(proxy, node)
        return
    before = _current(proxy)
    node = _as_node(recording, value, before)
    if recording.graph.guard is not None:
        node = recording.graph.select(node, before, recording.invoke)  # type: ignore[attr-defined]
    _write(recording, place, node)
    recording.bound.setdefault(place, before)
    _cut(proxy)
    recording.current[place] = proxy._kind(recording, node, place)


# Parts of a container, which can be replaced by others; all other views show memory of a tensor.
_PARTS = frozenset({ELEMENT, FIRST_ARGUMENT, FIELD, GETITEM})


# Among the parts that a recording knows: views that are computed.
_COMPUTED = 0


def _is_container_part(proxy: Proxy) -> bool:
    view = proxy._view
    if (
        view is None
        or view[0] not in _PARTS
        or (view[0] is FIELD and view[1][0] in TENSOR_PROPERTIES)
    ):
        return False
    return view[0] is not GETITEM or type(view[1][0]) in (int, str)


def _path(proxy: Proxy) -> tuple[Any, ...]:
    """The way from the value at a place to a part of it."""
    keys: list[Any] = []
    while proxy._parent is not None:
        if proxy._view is not None:
            operation, args, _ = proxy._view
            keys[:0] = (0, 0) if operation is FIRST_ARGUMENT else args[:1]
        proxy = proxy._parent
    return tuple(keys)


def root_of(proxy: Proxy) -> Proxy:
    while proxy._parent is not None:
        proxy = proxy._parent
    return proxy


def _let_go(
    owner: Proxy, path: tuple[Any, ...], fresh: Proxy | None = None, of_tensors: bool = False
) -> None:
    """A part of a container is about to be replaced: the handles on it keep what it is now.

    Args:
        owner: a handle on the container, or on what it is in.
        path: the way to the part.
        fresh: the handle by which it is replaced, which goes with it.
        of_tensors: it may be a row of a tensor, which is written in place.
    """
    root, recording = root_of(owner), owner._recording
    if (
        recording.loop is not None
        and root._place is not None
        and not (of_tensors and _is_tensor(owner))
    ):
        recording.bound.setdefault(root._place, _current(root))
    known = recording.parts.get(id(root))
    if not known:
        return
    hidden = isinstance(root, BlockOutput) and path == (0,)

    def is_meant(view: Proxy) -> bool:
        if view is fresh or view._parent is None or root_of(view) is not root:
            return False
        if hidden and view._parent is root and not _is_container_part(view):
            return view._view is not None  # `output[:, -1]`: a view of the hidden states
        return _is_container_part(view) and _path(view) == path

    alive = [view for one in known if (view := one()) is not None]
    meant = [view for view in alive if is_meant(view)]
    if not meant or (of_tensors and _is_tensor(owner)):
        return
    nodes = [_current(view) for view in meant]
    parts = [i for i, view in enumerate(meant) if _is_container_part(view)]
    at = nodes[parts[0]] if parts else root._node
    part = Handle(owner._recording, at)
    _cut(part)
    for view, node in zip(meant, nodes, strict=True):
        view._node, view._parent, view._seen = node, part, at
        if _is_container_part(view):
            view._view = None


def _bind_anew(proxy: Proxy) -> None:
    """What is at the place of `proxy` is about to be assigned: older handles keep what it is now."""
    chain = [proxy]
    while chain[-1]._parent is not None:
        chain.append(chain[-1]._parent)
    if any(one._view is not None and one._view[0].computed for one in chain):
        for known in proxy._recording.parts.get(_COMPUTED, ()):
            view = known()
            if view is None or view is proxy or view._parent is None or view._view is None:
                continue
            if _same_view(view, proxy):
                view._node, view._seen = _current(view), None
                view._parent = view._view = None
                _cut(view)
        return
    chain.reverse()
    root, top = chain[0], 0
    while top + 1 < len(chain) and _is_container_part(chain[top + 1]):
        top += 1
    if top:
        _let_go(root, _path(chain[top]), chain[top])
        return
    place, recording = root._place, root._recording
    if place is not None and recording.current.get(place) is root:
        recording.bound.setdefault(place, root._node)
        _cut(root)
        again = recording.current[place] = root._kind(recording, root._node, place)
        chain[1]._parent = again


def node_of(recording: Recording, value: Any) -> Node:
    """A node for any value: that of a proxy, or one that gives a container or a constant."""
    node = _lower(recording, value)
    if type(node) is not Node:
        node = recording.graph.append(CALL, CONSTANT, (node, None), None, recording.invoke)
    return node


def write_in(recording: Recording, hook_point: HookPoint, value: Any) -> None:
    """`module.skip(value)`: what is to be at a place that is only written."""
    node = node_of(recording, value)
    if recording.graph.guard is not None:
        node = recording.graph.select(node, None, recording.invoke)  # type: ignore[attr-defined]
    place = (recording.invoke, hook_point)
    _write(recording, place, node)
    recording.current[place] = Handle(recording, node, place)


def _is_part(value: Any, whole: Proxy, operation: Operation, args: tuple[Any, ...]) -> bool:
    """True if `value` is that view of `whole` already, so that storing it there changes nothing."""
    if type(value) is not Handle or value._view is None or value._parent is None:
        return False
    same = value._view[0] is operation and _same_key(value._view[1], args)
    return same and _same_view(value._parent, whole)


def _same_view(one: Proxy, other: Proxy) -> bool:
    """True if both show the same part of the same value: a name that is asked twice gives two views."""
    while one is not other:
        if one._view is None or other._view is None or one._parent is None or other._parent is None:
            return False
        if one._view[0] is not other._view[0] or not _same_key(one._view[1], other._view[1]):
            return False
        one, other = one._parent, other._parent
    return True


def _same_key(one: Any, other: Any) -> bool:
    # Slices compare by their parts only in newer Pythons.
    first, second = children(one), children(other)
    if first is None or second is None:
        return one is other or (type(one) is type(other) and type(one) in ATOMS and one == other)
    same = type(one) is type(other) and len(first) == len(second)
    return same and all(map(_same_key, first, second))


def _as_node(recording: Recording, value: Any, like: Node) -> Node:
    """A node whose value is `value`, on the device of the value of `like`."""
    lowered = _lower(recording, value)
    if type(lowered) is Node:
        return lowered
    return recording.graph.append(CALL, CONSTANT, (lowered, like), None, recording.invoke)


def _identity(value: Any) -> Any:
    return value


def _constant(value: Any, like: Any) -> Any:
    return value


CONSTANT = Operation("constant", _constant)


def first_argument(inputs: Proxy) -> Proxy:
    """`.input` of what `.inputs` gives: the first positional or else the first keyword argument."""
    result = _record(inputs._recording, FIRST_ARGUMENT, (inputs,), {})
    assert isinstance(result, Proxy)
    return result


def _record(
    recording: Recording, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Record an operation and return the proxy of its result."""
    first = args[0] if args else None
    effect = operation.effect
    if recording.session is not None:
        recording = recording.session.place(recording, (args, kwargs))
        other = isinstance(first, Proxy) and first._recording is not recording
        if other and effect is IN_PLACE and operation not in _AUGMENTED:
            node = _current(first)  # type: ignore[arg-type]
            raise ForeignProxyError.later(node.describe(), node.location)
    if effect is IN_PLACE and isinstance(first, Proxy) and first._recording is recording:
        first._change(operation, args[1:], kwargs)
        return first
    if operation.copies and isinstance(first, Proxy) and first._recording is recording:
        _laid_out(first)
    lowered = tuple(_lower(recording, a) for a in args)
    options = {key: _lower(recording, v) for key, v in kwargs.items()} if kwargs else {}
    node = recording.graph.append(CALL, operation, lowered, options, recording.invoke)
    if recording.early is not None:
        recording.early()
    if effect is VIEW and isinstance(first, Proxy) and first._recording is recording:
        view = Handle(recording, node, None, first, (operation, lowered[1:], options), lowered[0])
        if isinstance(first, BlockOutput) or _is_container_part(view):
            recording.parts.setdefault(id(root_of(first)), []).append(ref(view))
        elif operation.computed:
            recording.parts.setdefault(_COMPUTED, []).append(ref(view))
        return view
    return Handle(recording, node)


record = _record


def record_node(
    recording: Recording, kind: str, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Proxy:
    """Record a MODULE or PARAMETER node and return the proxy of its result."""
    if recording.session is not None:
        recording = recording.session.place(recording, (args, kwargs))
    lowered = tuple(_lower(recording, a) for a in args)
    options = {key: _lower(recording, v) for key, v in kwargs.items()}
    return Handle(
        recording, recording.graph.append(kind, target, lowered, options, recording.invoke)
    )


def _lower(recording: Recording, value: Any) -> Any:
    """What a node stores for an argument: nodes for proxies, `Captured` for tensors."""
    kind = type(value)
    if kind in ATOMS:
        return value
    if isinstance(value, Proxy):
        if value._recording is recording:
            if recording.state is not OPEN:
                raise NotRunError.recording(value._node.describe(), value._node.location)
            node = _current(value)
            if recording.looped:
                recording.check(node)
            return node
        session = recording.session
        if session is not None and value._recording.session is session:
            return session.later(value._recording, _current(value), recording)
        return _lower(recording, _foreign(value))
    if isinstance(value, torch.Tensor):
        return _capture(recording, value)
    if isinstance(value, np.ndarray):
        return _capture(recording, _tensor(value))
    if isinstance(value, (Tokens, Method)):
        raise OperationError(
            f"{value._proxy._node.describe()} is followed by `.t` or a method that was not applied: "
            "index `.t[...]`, call `.method()`."
        )
    if kind in (tuple, list, dict, slice) or isinstance(value, (tuple, list, dict)):
        return map_leaves(lambda leaf: _lower_leaf(recording, leaf), value, own=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Operation)):
        return map_leaves(lambda leaf: _lower_leaf(recording, leaf), value, own=True)
    return copy.copy(value) if kind in _CHANGEABLE else value


def _lower_leaf(recording: Recording, leaf: Any) -> Any:
    return leaf if type(leaf) in ATOMS else _lower(recording, leaf)


def _foreign(proxy: Proxy) -> Any:
    """The value of a proxy of another block."""
    what, where = proxy._node.describe(), proxy._node.location
    if proxy._recording.state is OPEN:
        raise ForeignProxyError.unfinished(what, where)
    try:
        return proxy._known()
    except NotSavedError:
        raise ForeignProxyError.unsaved(what, where) from None


def _capture(recording: Recording, tensor: torch.Tensor) -> Captured:
    name = _name_of(tensor)
    if tensor.is_meta:
        raise CapturedTensorError.meta(name, user_line(3))
    if tensor.requires_grad:
        recording.graph.needs_grad = True
    watched = recording.lent.get(id(tensor))
    if watched is not None and watched.version == tensor._version:
        return watched
    found = captured(tensor, name)
    if found.content is not None:
        recording.lent[id(tensor)] = found
    return found


def _name_of(tensor: torch.Tensor) -> str:
    """The user's variable for a tensor, for error messages."""
    location = user_line(3)
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and (frame.f_code.co_filename, frame.f_lineno) != location:
        frame = frame.f_back
    if frame is not None:
        for name, held in frame.f_locals.items():
            if held is tensor:
                return f"`{name}`"
    return "a captured tensor"


def _unwrap(value: Any) -> Any:
    """`value` with every proxy replaced by its saved value."""
    if isinstance(value, Proxy):
        return value._known()
    if type(value) in ATOMS or isinstance(value, torch.Tensor):
        return value
    return map_leaves(lambda leaf: leaf._known() if isinstance(leaf, Proxy) else leaf, value)


def _indexing(key: Any) -> Operation:
    """What indexing with `key` is."""
    if _is_view_key(key):
        return GETITEM
    return ITEM if any(isinstance(leaf, Proxy) for leaf in leaves(key)) else TAKE


def _is_view_key(key: Any) -> bool:
    """True for indices whose result shares memory: integers, slices, None, Ellipsis, strings."""
    if type(key) is tuple:
        return all(_is_view_key(part) for part in key)
    if type(key) is slice:
        return not any(isinstance(part, Proxy) for part in (key.start, key.stop, key.step))
    if key is None or key is Ellipsis or type(key) in (int, str) or isinstance(key, np.integer):
        return True
    return isinstance(key, torch.Tensor) and key.ndim == 0 and key.dtype in _INDEX_DTYPES


def _dict_method(proxy: Proxy, fake: dict[str, Any], name: str, *args: Any) -> Any:
    """What `proxy.name(*args)` gives for a value that is a dict like `fake`."""
    if name == "keys":
        return list(fake)
    if name == "get":
        key, default = (*args, None)[:2]
        return proxy[key] if key in fake else default
    values = [proxy[key] for key in fake]
    if name == "items":
        return list(zip(fake, values, strict=True))
    return tuple(values) if name == "to_tuple" else values


def _lasting_shape(proxy: Proxy) -> Any:
    """The shape of a value in what is recorded once for prompts or steps of any length."""
    recording = proxy._recording
    if not isinstance(recording.ask().value(_current(proxy)), torch.Tensor):
        raise OperationError(f"{proxy._node.describe()} is no tensor: take the shape of its parts.")
    size = METHODS["size"]
    return tuple(
        _record(recording, size, (proxy, axis), {}) if known is None else known
        for axis, known in enumerate(recording.ask().sizes(_current(proxy)))
    )


def _lasting_size(proxy: Proxy, name: str, dim: int | None = None) -> Any:
    """`size`, `numel` and `nelement` where `_lasting_shape` is the shape."""
    sizes = _lasting_shape(proxy)
    if name == "size":
        return sizes if dim is None else sizes[dim]
    return functools.reduce(operator.mul, sizes, 1)


def measured(proxy: Proxy) -> Any:
    """A value without numbers like that of `proxy` at the first prompt and step that it is for."""
    return proxy._recording.ask().value(_current(proxy))


@entry
def _sized(proxy: Proxy) -> Any:
    """As `measured`, for a user who is told a size of it."""
    node = _current(proxy)
    proxy._recording.asked.add(node.invoke)
    return proxy._recording.ask().value(node)


def _described(proxy: Proxy, part: Callable[[Any], Any]) -> Any:
    if proxy._recording.state is not OPEN:
        return part(proxy._known())
    fake = _sized(proxy)
    return map_leaves(lambda leaf: part(leaf) if isinstance(leaf, torch.Tensor) else leaf, fake)


def save_all(value: Any) -> Any:
    """`value` with every value of a block in it saved; lists and dicts are filled in place."""
    if isinstance(value, list):
        value[:] = [save_all(part) for part in value]
        return value
    if isinstance(value, dict):
        for key in value:
            value[key] = save_all(value[key])
        return value
    return map_leaves(lambda leaf: _once_saved(leaf) if isinstance(leaf, Proxy) else leaf, value)


def _once_saved(proxy: Proxy) -> Any:
    return proxy if _was_saved(proxy) else proxy.save()


def _was_saved(proxy: Proxy) -> bool:
    """True for what `save` gave, which stays what it was at that line."""
    return proxy._box is not None and proxy._parent is not None and proxy._view is None


def _after_run(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A torch function on saved values, once their blocks have run."""
    result = function(*_unwrap(args), **_unwrap(kwargs))
    first = args[0] if args else None
    if not isinstance(first, SavedTensor):
        return result
    name = getattr(function, "__name__", "")
    if is_in_place(name) or name == "__set__":
        first._take_memory()  # it may have another shape or other memory now
    if result is first._known():
        return first
    return first._like(result) if function is torch.Tensor.detach else result


def apply(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run any Python function on the values of proxies, at that point of the run.

    Args:
        function: called with the real values. It returns its result and changes nothing in place.
            A module whose parameters are trained gets gradients.
        *args, **kwargs: proxies, tensors, modules and anything else, nested in plain containers.

    Returns:
        A proxy of the result; outside a block, the result itself.
    """
    if not callable(function):
        raise OperationError(
            f"`apply` takes a function and then its arguments, `graftwork.apply(function, proxy)`; the "
            f"first here is {type(function).__name__}."
        )
    for leaf in leaves((args, kwargs)):
        if isinstance(leaf, Proxy) and leaf._recording.state is OPEN:
            graph = leaf._recording.graph
            graph.needs_grad = graph.needs_grad or any(
                _is_trained(one) for one in leaves((function, args, kwargs))
            )
            return _record(leaf._recording, APPLY, (function, *args), kwargs)
    return function(*_unwrap(args), **_unwrap(kwargs))


def _is_trained(leaf: Any) -> bool:
    """True for a module, or a method of one, with a parameter that requires grad."""
    if isinstance(leaf, Proxy):
        return False
    parameters = getattr(getattr(leaf, "__self__", leaf), "parameters", None)
    return callable(parameters) and any(p.requires_grad for p in parameters())


def _tensor(value: Any) -> Any:
    """A number or tensor for a value of numpy; other values as they are."""
    if isinstance(value, np.generic):
        return value.item()
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def _operator(name: str, operation: Operation) -> Callable[..., Any]:
    python = operation.function

    def method(self: Proxy, *args: Any) -> Any:
        if self._recording.state is OPEN:
            return _record(self._recording, operation, (self, *args), {})
        if operation.effect is IN_PLACE:
            # A saved value is a tensor like any other: `h += 1` after the run changes it.
            value = self._known()
            result = getattr(value, name)(*_unwrap(args))
            return self if result is value else result
        return python(self._known(), *map(_tensor, _unwrap(args)))

    method.__name__ = name
    return method


for _name, _operation in OPERATORS.items():
    setattr(Proxy, _name, _operator(_name, _operation))
