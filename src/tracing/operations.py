"""Owns the operations that a graph may name, and what each does to its first argument.

An operation is pure, a view of its first argument, or changes its first argument in place. Graphs
are functional: an in-place operation is recorded as one that returns a changed copy, and a write
into a view is carried back to the whole by `Operation.put`. So a value that was read earlier never
changes, in whatever order things run.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch

from .errors import LimitError, near
from .limits import LEAST, MOST, PARTS
from .structure import children, rebuild

PURE, VIEW, IN_PLACE = "pure", "view", "in place"


def _clone(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        # Keeps the strides: which operations on it are views must not depend on earlier writes.
        return value.clone()
    return list(value) if type(value) is list else value


def _shares(view: Any, whole: Any) -> bool:
    if not isinstance(view, torch.Tensor) or not isinstance(whole, torch.Tensor):
        return view is whole
    alias: bool = torch._C._is_alias_of(view, whole)  # type: ignore[attr-defined]
    return view is whole or alias


class Operation:
    """A named function.

    Attributes:
        name: how it is printed and, later, sent.
        function: what runs; never changes its arguments.
        effect: PURE, VIEW or IN_PLACE, as the user wrote it.
        fresh: the result is new memory, shared with no argument.
        inverse: `inverse(whole, part, *args)` is `whole` with its part replaced. Views without one
            are put back by taking the same view of a copy.
        copies: a view that torch replaces by a copy where it has to, as `reshape` does.
            Which it is, the value tells.
        computed: what it shows is computed, so its gradient is no view of the whole's.
        tensor: of a tensor it gives one tensor.
        mixes: it gives one tensor if any of its arguments is one, as Python's operators do.
    """

    __slots__ = (
        "computed",
        "copies",
        "effect",
        "fresh",
        "function",
        "inverse",
        "mixes",
        "name",
        "tensor",
    )

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        effect: str = PURE,
        fresh: bool = False,
        inverse: Callable[..., Any] | None = None,
        copies: bool = False,
        computed: bool = False,
        tensor: bool = False,
        mixes: bool = False,
    ) -> None:
        self.tensor = tensor
        self.mixes = mixes
        self.computed = computed
        self.name = name
        self.function = function
        self.effect = effect
        self.fresh = fresh
        self.inverse = inverse
        self.copies = copies

    def again(self, whole: Any, part: Any, *args: Any, **kwargs: Any) -> Any:
        """What this view shows after its whole has changed; a copy stays what it was."""
        view = self.function(whole, *args, **kwargs)
        return view if _shares(view, whole) else part

    def put(self, whole: Any, part: Any, *args: Any, **kwargs: Any) -> Any:
        """`whole` with the part that this view shows replaced by `part`."""
        if self.inverse is not None:
            return self.inverse(whole, part, *args, **kwargs)
        if self.copies and not _shares(self.function(whole, *args, **kwargs), whole):
            return whole
        changed = _clone(whole)
        _copy_into(self.function(changed, *args, **kwargs), part)
        return changed


def _copy_into(views: Any, parts: Any) -> None:
    if isinstance(views, torch.Tensor):
        if not isinstance(parts, torch.Tensor) or views.shape != parts.shape:
            found = list(parts.shape) if isinstance(parts, torch.Tensor) else type(parts).__name__
            raise ValueError(f"a part of shape {list(views.shape)} was replaced by {found}")
        views.copy_(parts)
        return
    for view, part in zip(views, parts, strict=True):
        _copy_into(view, part)


def _put_item(whole: Any, part: Any, key: Any) -> Any:
    if isinstance(whole, torch.Tensor):
        changed = _clone(whole)
        changed[key] = part
        return changed
    if isinstance(whole, dict):
        if key not in whole:
            raise KeyError(f"{key!r} is not among {list(whole)}")
        return rebuild(whole, [part if k == key else v for k, v in whole.items()])
    items = list(whole)
    if type(key) is slice and hasattr(part, "__len__") and len(items) + len(part) > PARTS:
        raise LimitError.parts("setitem", PARTS)
    items[key] = part
    return rebuild(whole, items)


def _field(value: Any, name: str) -> Any:
    # Only data: a path through attributes must not lead into Python's internals.
    if name.startswith("_"):
        raise AttributeError(f"`{name}` is private")
    if isinstance(value, dict) and name in value:
        return value[name]
    if isinstance(value, torch.Tensor) and name not in TENSOR_PROPERTIES:
        known = [n for n in dir(torch.Tensor) if not n.startswith("_")]
        raise AttributeError(f"a tensor has no attribute `{name}`. {near(name, known)}")
    found = getattr(value, name)
    if callable(found):
        raise AttributeError(f"`{name}` of {type(value).__name__} is a function, no data")
    return found


def _put_field(whole: Any, part: Any, name: str) -> Any:
    if isinstance(whole, dict):
        return _put_item(whole, part, name)
    if isinstance(whole, torch.Tensor):
        changed = _clone(whole)
        _copy_into(_field(changed, name), part)
        return changed
    if dataclasses.is_dataclass(whole):
        fields = [f.name for f in dataclasses.fields(whole)]
    else:
        fields = list(getattr(whole, "_fields", ()))
    parts = children(whole)
    if name in fields and parts is not None:
        return rebuild(
            whole, [part if f == name else v for f, v in zip(fields, parts, strict=True)]
        )
    raise TypeError(f"the field `{name}` of {type(whole).__name__} cannot be replaced")


def _element(value: Any, index: int) -> Any:
    """Part `index` of what a block returns, whichever way the block returns it.

    Blocks returned a tuple whose first part is the hidden states until transformers 4; most return
    the bare hidden states since. Part 0 is the hidden states in both.
    """
    if not isinstance(value, torch.Tensor):
        return value[index]
    if index == 0:
        return value
    raise IndexError(
        f"this block returns its hidden states {list(value.shape)} alone, no tuple: `output` and "
        f"`output[0]` both mean them, and there is no part {index}. For a row of the batch write "
        f"`output[{index}:{index + 1 or ''}]`"
    )


def _put_element(whole: Any, part: Any, index: int) -> Any:
    if not isinstance(whole, torch.Tensor):
        return _put_item(whole, part, index)
    _element(whole, index)
    return part


def _first_argument(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    args, kwargs = inputs
    if args:
        return args[0]
    if kwargs:
        return next(iter(kwargs.values()))
    raise IndexError("the module was called without arguments")


def _put_first_argument(inputs: Any, part: Any) -> Any:
    args, kwargs = inputs
    if args:
        return (part, *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: part}


def _set_item(value: Any, key: Any, part: Any) -> Any:
    return _put_item(value, part, key)


def _apply(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


GETITEM = Operation("getitem", operator.getitem, VIEW, inverse=_put_item)
TAKE = Operation("getitem", operator.getitem)
#: Indexed with values of the block: numbers show the memory of the whole, others copy it. Which they
#: are, the run tells.
ITEM = Operation("getitem", operator.getitem, VIEW, copies=True)
SETITEM = Operation("setitem", _set_item, IN_PLACE)
FIELD = Operation("field", _field, VIEW, inverse=_put_field)
ELEMENT = Operation("element", _element, VIEW, inverse=_put_element)
FIRST_ARGUMENT = Operation("first argument", _first_argument, VIEW, inverse=_put_first_argument)
APPLY = Operation("apply", _apply)


class Skipped:
    """The value of what a branch that was not taken would have computed."""

    def __repr__(self) -> str:
        return "skipped"


SKIPPED = Skipped()
#: The step for which a template is placed.
STEP = Operation("step", lambda: None)
#: A value that is kept where it is saved, inside a branch.
KEPT = Operation("kept", lambda value: value)


def _stop(step: int, *needed: Any) -> int:
    return step


#: Ends the run of an invoke after a step, once what was recorded before is there.
STOP = Operation("stop", _stop)


def _test(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"a condition is one value, and this has the shape {list(value.shape)}: "
                "use `.any()` or `.all()`"
            )
        return True if value.is_meta else bool(value)
    return bool(value)


#: A condition as True or False.
TEST = Operation("test", _test)


def _guarded(guard: Any, wanted: bool, kind: str, target: Any, *args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the interpreter evaluates what is guarded")


#: What a branch does: condition, whether it is to hold, and the kind, target and arguments of a node.
GUARDED = Operation("guarded", _guarded)


def _select(guard: Any, wanted: bool, new: Any, old: Any) -> Any:
    return new  # without numbers; a run chooses


#: What a branch has changed: condition, whether it is to hold, new and old value.
SELECT = Operation("select", _select)


def _tokens(value: Any, key: Any, axis: int) -> Any:
    return (*(slice(None),) * axis, key)


#: An index of a prompt's own tokens, in what is recorded before the prompt is known.
TOKENS = Operation("tokens", _tokens)


def _positions(value: Any) -> list[Any]:
    return []


#: Where the prompt's own tokens lie in a value, in what is recorded before the prompt is known.
POSITIONS = Operation("positions", _positions)


#: What reduces a tensor over one axis, by the name that `.t` has for it.
_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "mean": lambda value, axis, **how: value.mean(axis, **how),
    "sum": lambda value, axis, **how: value.sum(axis, **how),
    "max": lambda value, axis, **how: value.max(axis, **how).values,
    "min": lambda value, axis, **how: value.min(axis, **how).values,
}


def _over_tokens(reduce: Callable[..., Any]) -> Callable[..., Any]:
    """A reduction over each row's own tokens: padding is not looked at, so that it may hold NaN."""

    def function(
        value: torch.Tensor,
        rows: Any,
        axis: int,
        across: int | None,
        keepdim: bool = False,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        how: dict[str, Any] = {"keepdim": keepdim}
        if dtype is not None:
            how["dtype"] = dtype
        if across == axis:  # rows and tokens are one axis
            value = value.unflatten(axis, (len(rows), -1))  # type: ignore[no-untyped-call]
            axis += 1
        # An image has no tokens that are known: the row is taken as it is.
        spans = [row[:2] if row[0] < row[1] else (0, value.shape[axis]) for row in rows]
        if len(set(spans)) <= 1:
            start, stop = spans[0] if spans else (0, value.shape[axis])
            return reduce(value.narrow(axis, start, stop - start), axis, **how)  # type: ignore[no-any-return]
        if across is None or value.shape[across] % len(spans):
            raise ValueError(
                f"{list(value.shape)} has no axis with {len(spans)} rows, whose tokens are reduced"
            )
        each = value.shape[across] // len(spans)  # beams repeat the rows of a prompt
        parts = [
            reduce(
                value.narrow(across, row * each, each).narrow(axis, start, stop - start),
                axis,
                **how,
            )
            for row, (start, stop) in enumerate(spans)
        ]
        return torch.cat(parts, across if keepdim or across < axis else across - 1)

    return function


#: Reductions over each row's own tokens: value, where they lie (as POSITIONS; nothing where there is no
#: padding), the axes of tokens and of rows, and what the reduction takes.
OVER_TOKENS = {
    name: Operation(f"t.{name}", _over_tokens(reduce), fresh=True)
    for name, reduce in _REDUCTIONS.items()
}


def _passed(value: Any, point: Any) -> Any:
    return value


#: What is at a place of an attached module, once it has been read and written there.
PASSED = Operation("passed", _passed)


def _backward(loss: Any, gradient: Any, inputs: Any, **options: Any) -> None:
    # Without numbers there is nothing to derive.
    if not loss.is_meta:
        loss.backward(gradient, inputs=inputs, **options)


BACKWARD = Operation("backward", _backward)


def _grad(outputs: Any, inputs: Any, gradients: Any, **options: Any) -> Any:
    given = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    if given[0].is_meta:
        return tuple(torch.empty_like(one) for one in given)
    return torch.autograd.grad(outputs, given, gradients, **options)


GRAD = Operation("grad", _grad)
#: Operations that go back through what was computed.
DERIVING = frozenset({BACKWARD, GRAD})


def _put(whole: Any, part: Any, view: Operation, args: Any, kwargs: Any) -> Any:
    return view.put(whole, part, *args, **kwargs)


PUT = Operation("put", _put)


def _again(whole: Any, part: Any, view: Operation, args: Any, kwargs: Any) -> Any:
    return view.again(whole, part, *args, **kwargs)


AGAIN = Operation("again", _again)

#: Attributes of a tensor that are data, not methods.
TENSOR_PROPERTIES = frozenset({"T", "H", "mT", "mH", "real", "imag", "data"})

#: Tensor methods and torch functions whose result shows the memory of their first argument.
VIEWS = frozenset(
    "view view_as transpose permute unsqueeze squeeze unflatten split split_with_sizes chunk unbind "
    "tensor_split narrow select diagonal movedim moveaxis swapaxes swapdims expand expand_as t "
    "adjoint hsplit vsplit dsplit unsafe_chunk unsafe_split detach unfold broadcast_to".split()
)

#: Those that copy where they must, see `Operation.copies`. Conversions (`to`, `float`, `cpu`) are not
#: among them: whether they copy depends on the model's dtype and device, so here they always do.
MAYBE_VIEWS = frozenset(
    "reshape reshape_as flatten ravel contiguous atleast_1d atleast_2d atleast_3d positive".split()
)

#: Functions whose result is new memory, so that saving it needs no copy.
FRESH = frozenset(
    "add sub mul div matmul mm bmm softmax log_softmax sum mean std var norm exp log abs neg argmax "
    "argmin cos sin sqrt rsqrt pow relu gelu silu tanh sigmoid linear layer_norm cat stack "
    "logsumexp cross_entropy clone eq ne lt le gt ge cosine_similarity topk max min".split()
)

#: Functions that give one tensor of a tensor, whatever their other arguments are.
ONE_TENSOR = frozenset(
    [
        *(FRESH - {"topk", "max", "min"}),
        *(
            VIEWS
            - set("split split_with_sizes chunk unbind tensor_split".split())
            - set("hsplit vsplit dsplit unsafe_chunk unsafe_split".split())
        ),
        *MAYBE_VIEWS,
        *"to float double half bfloat16 int long bool cpu cuda type_as any all prod cumsum cumprod "
        "amax amin clamp clip where masked_fill gather index_select scatter roll flip repeat "
        "repeat_interleave tril triu sign square round floor ceil isnan isfinite nan_to_num outer dot "
        "mv matmul einsum dropout embedding silu softplus erf log2 log1p expm1 sinh cosh tan".split(),
    ]
)

BINARY = "add sub mul truediv floordiv mod pow matmul and_ or_ xor lshift rshift".split()
COMPARE = "eq ne lt le gt ge".split()
UNARY = "neg pos abs invert".split()


def _reflect(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda right, left: function(left, right)


_SIZED = (str, bytes, list, tuple, dict)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator of Python whose results are bounded, and refused before they are made.

    Tensors have sizes that are known and integers of 64 bits; Python's own values have neither, so ten
    squarings or thirty doublings would keep a machine busy, whoever asks for them.
    """

    def run(left: Any, *rest: Any) -> Any:
        if type(left) is torch.Tensor:  # nearly always
            return function(left, *rest)
        right = rest[0] if rest else None
        if isinstance(left, _SIZED) or isinstance(right, _SIZED):
            _check_size(name, left, right)
        elif isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
            return function(left, *rest)
        elif isinstance(left, int) and isinstance(right, int):
            much = abs(left) > 1 if name == "pow" else name in ("lshift", "ilshift")
            if (much or (name == "ipow" and abs(left) > 1)) and right > 64:
                raise LimitError.integer(name)
        result = function(left, *rest)
        if type(result) is int and not LEAST <= result <= MOST:
            raise LimitError.integer(name)
        return result

    return run


def _check_size(name: str, left: Any, right: Any) -> None:
    """Refuse what would make too large a container, or a text of any length."""
    operation = name.lstrip("i") if name.startswith("i") else name
    if operation == "mod" and isinstance(left, (str, bytes)):
        raise TypeError("`%` of a text formats it, which no operation of a graph does")
    if operation == "mul":
        whole, times = (left, right) if isinstance(left, _SIZED) else (right, left)
        if hasattr(times, "__index__") and len(whole) * operator.index(times) > PARTS:
            raise LimitError.parts(name, PARTS)
    elif operation in ("add", "or_", "or"):
        sizes = [len(one) for one in (left, right) if isinstance(one, _SIZED)]
        other = right if isinstance(left, _SIZED) else left
        if isinstance(other, torch.Tensor) and other.ndim:
            sizes.append(len(other))
        if sum(sizes) > PARTS:
            raise LimitError.parts(name, PARTS)


#: Functions that give a tuple of tensors, of as many as an axis is long or an argument says.
SPLITS = frozenset(
    "split unbind chunk tensor_split hsplit vsplit dsplit unsafe_chunk unsafe_split split_copy "
    "unbind_copy".split()
)


def _split(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that splits a tensor into a bounded number of parts."""

    def run(value: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(value, torch.Tensor):
            counts = list(value.shape)
            for one in (*args, *kwargs.values()) if name.endswith("split") else ():
                if isinstance(one, torch.Tensor) and not one.is_floating_point():
                    counts.append(one.numel() if one.ndim or one.is_meta else int(one))
                elif type(one) is int and name not in ("split", "unsafe_split"):
                    counts.append(one)
            if max(counts, default=0) > PARTS:
                raise LimitError.parts(name, PARTS)
        return function(value, *args, **kwargs)

    return run


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda value, /, *args, **kwargs: function(_clone(value), *args, **kwargs)


def operators() -> dict[str, Operation]:
    """Python's operators, by the name of the method that each calls."""
    table: dict[str, Operation] = {}
    for name in BINARY:
        word = name.strip("_")
        function = _bounded(word, getattr(operator, name))
        table[f"__{word}__"] = Operation(word, function, fresh=True, mixes=True)
        table[f"__r{word}__"] = Operation(f"r{word}", _reflect(function), fresh=True, mixes=True)
        # `h @= w` has no in-place form: Python binds the name anew.
        if hasattr(torch.Tensor, f"__i{word}__"):
            in_place = _bounded(f"i{word}", getattr(operator, f"i{word}"))
            table[f"__i{word}__"] = Operation(f"i{word}", _in_place(in_place), IN_PLACE, mixes=True)
    for name in COMPARE + UNARY:
        function = getattr(operator, name)
        if name in UNARY:
            function = _bounded(name, function)
        table[f"__{name}__"] = Operation(name, function, fresh=True, mixes=True)
    table["__pos__"] = Operation("pos", operator.pos, VIEW, copies=True, mixes=True)
    return table


OPERATORS = operators()


def is_in_place(name: str) -> bool:
    """Torch's convention: a trailing underscore."""
    return name.endswith("_") and not name.endswith("__")


def _named(name: str, function: Callable[..., Any]) -> Operation:
    """The operation of a torch method or function, by what its name says that it does."""
    if is_in_place(name):
        return Operation(name, _in_place(function), IN_PLACE, tensor=True)
    if name in SPLITS:
        function = _split(name, function)
    copies = name in MAYBE_VIEWS
    effect = VIEW if copies or name in VIEWS else PURE
    one = name in ONE_TENSOR
    return Operation(name, function, effect, name in FRESH, copies=copies, tensor=one)


def _method(name: str) -> Callable[..., Any]:
    # The name is no argument: a graph that was sent must not choose another one.
    def function(value: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(value, name, None)
        if method is None or callable(value):
            raise AttributeError(f"{type(value).__name__} has no method `{name}`")
        return method(*args, **kwargs)

    return function


def _methods() -> dict[str, Operation]:
    table: dict[str, Operation] = {}
    for name in dir(torch.Tensor):
        if name.startswith("_") or not callable(getattr(torch.Tensor, name)):
            continue

        table[name] = _named(name, _method(name))
    return table


#: Tensor methods by name.
METHODS = _methods()

_functions: dict[Any, Operation] = {}


def function_operation(function: Callable[..., Any]) -> Operation:
    """The operation of a torch function or method that was called with a proxy."""
    known = _functions.get(function)
    if known is None:
        name = getattr(function, "__name__", str(function))
        # A method of a tensor that is asked of its class means what the proxy's own means.
        method = METHODS.get(name) if getattr(torch.Tensor, name, None) is function else None
        known = OPERATORS.get(name) or method or _named(name, function)
        _functions[function] = known
    return known
