"""Owns which operations a graph may name when it is sent, the name of each, and what it may be given.

The rule. A name is allowed if it is public and can be recorded: Python's operators, the operations of
this package, tensor methods and functions of `torch`, `torch.nn.functional`, `torch.linalg`,
`torch.fft` and `torch.special` that torch lets other types override. Of these, all that is not pure
computation is denied: what reaches memory (storages, pointers, uninitialised or foreign memory), hooks
and autograd's state, what takes a Python function, what changes an argument other than the first, and
the kernels of single backends, which check their arguments less. So whoever receives a graph runs
arithmetic and nothing else.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from types import NoneType
from typing import Any, NamedTuple

import torch

from .cache import CACHED
from .limits import POWER
from .node import CALL, MODULE, Captured, HookPoint, Node
from .operations import (
    AGAIN,
    APPLY,
    BACKWARD,
    ELEMENT,
    FIELD,
    FIRST_ARGUMENT,
    GETITEM,
    GRAD,
    GUARDED,
    ITEM,
    KEPT,
    METHODS,
    OPERATORS,
    OVER_TOKENS,
    PASSED,
    POSITIONS,
    PUT,
    SELECT,
    SETITEM,
    STOP,
    TAKE,
    TEST,
    TOKENS,
    VIEW,
    Operation,
    function_operation,
    is_in_place,
)
from .proxy import CONSTANT

#: A name that holds one of these is denied.
DENIED_PARTS = tuple(
    # Polynomials of any degree are computed degree by degree.
    "polynomial "
    "ptr storage hook backward autocast dlpack sparse strided empty resize share pin_ pinned "
    "quantize quantized fake_quant qparams fbgemm miopen cudnn mkldnn batch_norm instance_norm "
    "distributed sym_ q_per_ q_scale q_zero int_repr".split()
)

#: Denied by name.
DENIED = frozenset(
    # Values that leave torch, or the memory of tensors.
    "item tolist numpy set_ is_set_to new as_subclass module_load record_stream qscheme dim_order "
    # Autograd's state.
    "retain_grad reinforce "
    # They call a Python function, which a value of the model may hold.
    "apply_ map_ map2_ lobpcg triplet_margin_with_distance_loss "
    # They change an argument that is not the first.
    "embedding_renorm_ "
    # Other devices than the model's, and formats that only some kernels know.
    "ipu mtia xpu hspmm hsmm dsmm smm spmm saddmm sspaddmm coalesce is_coalesced dense_dim "
    "ccol_indices crow_indices col_indices row_indices ccol_indices_copy crow_indices_copy "
    "col_indices_copy row_indices_copy indices_copy values_copy conv_tbc "
    # Kernels that trust the indices, lengths, pivots or numbers in what they are given: with others the
    # process ends, or runs on for hours. Found by calling every name with arguments that are wrong.
    "ctc_loss embedding_bag histogramdd gru lstm rnn_relu rnn_tanh lu_unpack lu_solve ldl_solve lstsq "
    "eigvals binomial index max_pool1d "
    # The memory that they take is that of the largest number in a tensor.
    "bincount".split()
)

#: Recorded as the others are, but missing from torch's list of what can be overridden.
_ALSO = {
    "Tensor": "new_full new_ones new_tensor new_zeros unflatten".split(),
    "torch": "rand_like randn_like randint_like fill vander".split(),
    "torch.nn.functional": "hardsigmoid hardswish sigmoid tanh".split(),
}
_MODULES = {
    "torch": torch,
    "torch.nn.functional": torch.nn.functional,
    "torch.linalg": torch.linalg,
    "torch.fft": torch.fft,
    "torch.special": torch.special,
}
#: The operations of this package, by the names that they are sent under. A new one is a line here.
_OWN = {
    "getitem": GETITEM,
    "take": TAKE,
    "pick": ITEM,
    "setitem": SETITEM,
    "field": FIELD,
    "element": ELEMENT,
    "first_argument": FIRST_ARGUMENT,
    "constant": CONSTANT,
    "put": PUT,
    "again": AGAIN,
    "apply": APPLY,
    "backward": BACKWARD,
    "grad": GRAD,
    "cached": CACHED,
    "tokens": TOKENS,
    "positions": POSITIONS,
    **{f"tokens_{name}": operation for name, operation in OVER_TOKENS.items()},
    "passed": PASSED,
    "kept": KEPT,
    "test": TEST,
    "stop": STOP,
    "guarded": GUARDED,
    "select": SELECT,
}


#: These and GETITEM differ only in what they say of memory.
_INDEXED = {TAKE: "take", ITEM: "pick"}


def declare(name: str, operation: Operation) -> Operation:
    """Let graphs name an operation that another room owns. Its name must not change: files have it."""
    _OWN[name] = operation
    operations.cache_clear()
    _names.cache_clear()
    return operation


def is_allowed(name: str) -> bool:
    """False for names of torch that are private or denied."""
    return not (
        name.startswith("_") or name in DENIED or any(part in name for part in DENIED_PARTS)
    )


@functools.cache
def functions() -> dict[str, Callable[..., Any]]:
    """Every allowed function and method of torch by name, such as `torch.softmax`, `Tensor.sum`."""
    with warnings.catch_warnings():
        # It looks at every attribute of torch, also at deprecated ones.
        warnings.simplefilter("ignore")
        overridable = torch.overrides.get_overridable_functions()
        known = {function for group in overridable.values() for function in group}
        table = {}
        for place, module in _MODULES.items():
            for name in dir(module):
                if not is_allowed(name):
                    continue
                function = getattr(module, name)
                if not callable(function) or isinstance(function, type):
                    continue
                stem = name.rstrip("_")
                if (
                    function in known
                    or name in _ALSO.get(place, ())
                    or (is_in_place(name) and is_allowed(stem) and hasattr(module, stem))
                ):
                    table[f"{place}.{name}"] = function
        methods = {*(f.__name__ for f in overridable[torch.Tensor]), *_ALSO["Tensor"]}
        for name in sorted(methods & METHODS.keys()):
            if is_allowed(name):
                table[f"Tensor.{name}"] = getattr(torch.Tensor, name)
    return table


@functools.cache
def operations() -> dict[str, Operation]:
    """Every operation that a graph may name."""
    table = dict(_OWN)
    table.update({f"operator.{operation.name}": operation for operation in OPERATORS.values()})
    for name, function in functions().items():
        place, _, short = name.rpartition(".")
        table[name] = METHODS[short] if place == "Tensor" else function_operation(function)
    return table


@functools.cache
def _names() -> dict[int, str]:
    # By what runs: a function called with `inplace=True` is recorded as an operation of its own.
    names: dict[int, str] = {}
    for name, operation in operations().items():
        if operation not in _INDEXED:
            names.setdefault(id(operation.function), name)
    for name, function in functions().items():
        names.setdefault(id(function_operation(function).function), name)
    return names


@functools.cache
def _function_names() -> dict[Callable[..., Any], str]:
    names: dict[Callable[..., Any], str] = {}
    for name, function in functions().items():
        names.setdefault(function, name)
    return names


def name_of(operation: Operation) -> str | None:
    """The name under which an operation is sent, or None if it is not allowed."""
    return _INDEXED.get(operation) or _names().get(id(operation.function))


def function_name(function: Any) -> str | None:
    """The name of a torch function that `apply` was given, or None if it is not allowed."""
    try:
        return _function_names().get(function)
    except TypeError:  # a callable that cannot be hashed
        return None


# -------------------------------------------------------------------- what a call may be given

#: Arguments by which some functions of torch write into what they are given: they must be absent or
#: have this value.
HARMLESS = {"inplace": False, "out": None, "max_norm": None}

#: Arguments that say how long a function works or how much memory it takes, and not by the shapes of
#: what it is given: integers in the graph itself, in these bounds. By position and by name.
COUNTS: dict[str, tuple[int, str, int, int]] = {
    "matrix_power": (1, "n", -POWER, POWER),
    "mvlgamma": (1, "p", 1, POWER),
    "mvlgamma_": (1, "p", 1, POWER),
    "multigammaln": (1, "p", 1, POWER),
    "repeat_interleave": (1, "repeats", 0, POWER),
    "one_hot": (1, "num_classes", 0, 2**31),
}

#: Attributes that lead from objects into running code begin so: generators, coroutines, frames,
#: tracebacks, code objects, classes.
_INTERNALS = ("_", "gi_", "cr_", "ag_", "f_", "tb_", "co_", "func_", "im_", "mro")


def is_public_name(name: Any) -> bool:
    """True for a string that is an attribute of data: no private name, no path."""
    return isinstance(name, str) and name.isidentifier() and not name.startswith(_INTERNALS)


def is_path(path: Any) -> bool:
    """True for a dotted path of modules without private names; "" is the root."""
    if not isinstance(path, str) or len(path) > 1000:
        return False
    return path == "" or _has_public_parts(path)


@functools.lru_cache(maxsize=10_000)
def _has_public_parts(path: str) -> bool:
    return all(
        part and not part.startswith("_") and part.replace("-", "_").replace("_", "a").isalnum()
        for part in path.split(".")
    )


class _Kind(NamedTuple):
    """What an argument has to be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


_VALUE = _Kind("a value", lambda value: not isinstance(value, Operation) and not callable(value))
_NAME = _Kind("the name of a public field", is_public_name)
_NUMBER = _Kind("an integer", lambda value: type(value) is int)
_MAYBE_NUMBER = _Kind("an integer or nothing", lambda value: value is None or type(value) is int)
_VIEW = _Kind("a view", lambda value: isinstance(value, Operation) and value.effect is VIEW)
_PLACE = _Kind("a place of a module", lambda value: type(value) is HookPoint)
_GUARD = _Kind("a condition", lambda value: type(value) is Node)
_FLAG = _Kind("true or false", lambda value: type(value) is bool)
_TUPLE = _Kind("a tuple", lambda value: type(value) is tuple)
_NAMED = _Kind("a dict", lambda value: type(value) is dict)
# What runs for a method that changes its tensor works on a copy; `apply` would run it as it is.
_FUNCTION = _Kind(
    "a function of torch that changes nothing",
    lambda value: not is_in_place(function_name(value) or "_"),
)

_ARGUMENTS: dict[Operation, tuple[_Kind, ...]] = {
    GETITEM: (_VALUE, _VALUE),
    TAKE: (_VALUE, _VALUE),
    ITEM: (_VALUE, _VALUE),
    SETITEM: (_VALUE, _VALUE, _VALUE),
    FIELD: (_VALUE, _NAME),
    ELEMENT: (_VALUE, _NUMBER),
    FIRST_ARGUMENT: (_VALUE,),
    CONSTANT: (_VALUE, _VALUE),
    PUT: (_VALUE, _VALUE, _VIEW, _TUPLE, _NAMED),
    AGAIN: (_VALUE, _VALUE, _VIEW, _TUPLE, _NAMED),
    BACKWARD: (_VALUE, _VALUE, _VALUE),
    GRAD: (_VALUE, _VALUE, _VALUE),
    CACHED: (_VALUE, _VALUE, _VALUE),
    TOKENS: (_VALUE, _VALUE, _NUMBER),
    POSITIONS: (_VALUE,),
    **dict.fromkeys(OVER_TOKENS.values(), (_VALUE, _VALUE, _NUMBER, _MAYBE_NUMBER, _FLAG, _VALUE)),
    PASSED: (_VALUE, _PLACE),
    KEPT: (_VALUE,),
    TEST: (_VALUE,),
    SELECT: (_GUARD, _FLAG, _VALUE, _VALUE),
}
#: Those of them that take further arguments by name.
_OPTIONS = {
    BACKWARD: {"retain_graph", "create_graph"},
    GRAD: {"retain_graph", "create_graph", "allow_unused", "materialize_grads", "is_grads_batched"},
}


def _of_guarded(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[str]:
    """What is wrong with what a branch does."""
    if len(args) < 4 or not _GUARD.holds(args[0]) or not _FLAG.holds(args[1]):
        yield f"it has no {_GUARD.words} that is to be {_FLAG.words}"
        return
    kind, target, rest = args[2], args[3], args[4:]
    if kind == CALL and isinstance(target, Operation) and target is not GUARDED:
        yield from complaints(target, name_of(target) or "", rest, kwargs)
    elif kind != MODULE or not is_path(target) or not all(map(_VALUE.holds, rest)):
        yield "what is guarded is neither an operation nor a module"


@functools.cache
def _takes(operation: Operation, name: str) -> int:
    """How many values an operation takes: -1 for any number, -2 where `complaints` has to be asked."""
    expected = _ARGUMENTS.get(operation)
    if expected is not None:
        return len(expected) if set(expected) == {_VALUE} else -2
    special = operation in (GUARDED, APPLY, STOP) or name.rpartition(".")[2] in COUNTS
    return -2 if special or _positions(name) else -1


#: Types of most arguments, all of them values.
_DATA = frozenset(
    {Node, Captured, NoneType, bool, int, float, str, tuple, list, slice, torch.dtype}
)


def is_good(operation: Operation, name: str, args: list[Any], kwargs: dict[str, Any]) -> bool:
    """True where `complaints` has none, told at once for most calls; False where it has to be asked."""
    count = _takes(operation, name)
    if count != -1 and (kwargs or len(args) != count):
        return False
    if not _DATA.issuperset(map(type, args)):
        return False
    for key, value in kwargs.items():
        if key in HARMLESS or not is_public_name(key) or not _VALUE.holds(value):
            return False
    return True


@functools.cache
def _positions(name: str) -> dict[str, int]:
    """Where a function of torch takes an argument of HARMLESS, for those that say."""
    try:
        parameters = list(inspect.signature(functions()[name]).parameters)
    except (KeyError, ValueError):  # an operator; a function written in C takes them by name
        return {}
    return {key: parameters.index(key) for key in HARMLESS if key in parameters}


def complaints(
    operation: Operation, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[str]:
    """What is wrong with a call of an allowed operation, if anything."""
    if operation is GUARDED:
        yield from _of_guarded(args, kwargs)
        return
    if operation is APPLY:
        if not args or not _FUNCTION.holds(args[0]):
            yield f"argument 0 is not {_FUNCTION.words}"
            return
        operation, name, args = (
            function_operation(args[0]),
            _function_names()[args[0]],
            args[1:],
        )
    if operation is STOP and (not args or not _NUMBER.holds(args[0]) or args[0] < 0):
        yield "it names no step"
        return
    expected = _ARGUMENTS.get(operation)
    if expected is None:
        expected = (_VALUE,) * len(args)
    elif len(args) != len(expected) or not kwargs.keys() <= _OPTIONS.get(operation, set()):
        yield f"{len(args) + len(kwargs)} arguments where {len(expected)} are taken"
        return
    for number, (kind, value) in enumerate(zip(expected, args, strict=True)):
        if not kind.holds(value):
            yield f"argument {number} is not {kind.words}"
            return
    for key, value in kwargs.items():
        if not is_public_name(key) or not _VALUE.holds(value):
            yield f"an argument is named {key!r}" if _VALUE.holds(value) else f"`{key}` is no value"
    count = COUNTS.get(name.rpartition(".")[2])
    if count is not None:
        place, key, least, most = count
        value = args[place] if len(args) > place else kwargs.get(key)
        if type(value) is not int or not least <= value <= most:
            yield f"`{key}` has to be an integer from {least} to {most} that stands in the graph"
    positions = _positions(name)
    for key, harmless in HARMLESS.items():
        place = positions.get(key, len(args))
        for value in [*args[place : place + 1], *([kwargs[key]] if key in kwargs else [])]:
            if value is not harmless:
                yield f"`{key}` would change what is passed in; it has to be {harmless}"
    if operation is PUT or operation is AGAIN:
        view = args[2]
        yield from complaints(view, name_of(view) or "", (args[0], *args[3]), args[4])
