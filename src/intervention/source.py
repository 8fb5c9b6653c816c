"""Owns inner operations: the calls and operators in the text of a forward, named, and how a run gets at
their values.

A function is instrumented for one call or one pass alone: its text is parsed again, the operations that
are wanted are handed to a tap, and the result is compiled with its own file and lines, in its own
globals and closure. What decorators made of it is made again around the new function. Neither the class
nor the module that the function was written in changes.

Where there is no text, `Functions` counts the torch functions that a forward calls.
"""

from __future__ import annotations
import __future__

import ast
import dataclasses
import functools
import inspect
import operator
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..tracing.errors import SourceError
from .attention import EAGER, with_eager_attention

_OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.MatMult: "matmul", ast.Div: "truediv",
    ast.FloorDiv: "floordiv", ast.Mod: "mod", ast.Pow: "pow", ast.BitAnd: "and_", ast.BitOr: "or_",
    ast.BitXor: "xor", ast.LShift: "lshift", ast.RShift: "rshift", ast.USub: "neg",
    ast.Invert: "invert",
}  # fmt: skip
_NAMES = {"truediv": "div"}
# They look at the frame that calls them.
_FRAMES = frozenset({"super", "locals", "globals", "vars", "dir", "eval", "exec"})
_NEVER_RETURNS_ONCE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_FUTURE = functools.reduce(
    operator.or_, (getattr(__future__, n).compiler_flag for n in __future__.all_feature_names)
)
_DOOR = "_graftwork_operation"


@dataclasses.dataclass(frozen=True, slots=True)
class InnerOperation:
    """A call or an operator in the text of a function.

    Attributes:
        name: of the function or method, with its number in the text: "self_c_proj_0".
        full: the same with all that stands before a dot: "nn_functional_softmax_0".
        line: in the file.
    """

    name: str
    full: str
    line: int


@dataclasses.dataclass(frozen=True)
class Listing:
    """The operations that can be reached at one place, as they are shown.

    Attributes:
        title: what it is, with file and line.
        rows: line number and text; 0 where there is no text.
    """

    title: str
    operations: tuple[InnerOperation, ...]
    rows: tuple[tuple[int, str], ...] = ()

    def find(self, name: str) -> str | None:
        """The name of an operation that is called `name`, in full or in short."""
        for one in self.operations:
            if name in (one.name, one.full):
                return one.name
        return None

    @property
    def names(self) -> list[str]:
        return [one.name for one in self.operations]

    def __str__(self) -> str:
        width = max((len(name) for name in self.names), default=0)
        if not self.rows:
            return "\n".join([self.title, *(f"  {name}" for name in self.names)])
        lines = [self.title]
        for number, text in self.rows:
            here = [one.name for one in self.operations if one.line == number]
            first = f"{here[0]:<{width}} →" if here else " " * (width + 2)
            lines.append(f"  {first} {number:>5}  {text}".rstrip())
            lines.extend(f"  {name:<{width}} +" for name in here[1:])
        return "\n".join(lines)


# -------------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True, slots=True)
class _Text:
    """A function as it is written, in the lines of its file."""

    file: str
    first: int
    lines: tuple[str, ...]

    def tree(self) -> tuple[ast.Module, ast.FunctionDef]:
        text, shift = "".join(self.lines), self.first - 1
        if self.lines[0][:1].isspace():
            # Not dedented: strings over several lines and the columns of errors stay right.
            text, shift = "if 1:\n" + text, shift - 1
        tree = ast.parse(text)
        ast.increment_lineno(tree, shift)
        body: list[ast.stmt] = tree.body
        if isinstance(body[0], ast.If):
            body = body[0].body
        found = body[0]
        if not isinstance(found, ast.FunctionDef):
            raise SyntaxError("no function")
        return tree, found


@functools.lru_cache(maxsize=512)
def _text(code: types.CodeType) -> _Text:
    what = f"`{code.co_name}` ({code.co_filename}:{code.co_firstlineno})"
    if code.co_flags & _NEVER_RETURNS_ONCE:
        raise SourceError.not_plain(what, "a generator or a coroutine")
    try:
        lines, first = inspect.getsourcelines(code)
        text = _Text(code.co_filename, first, tuple(lines))
        text.tree()
    except (OSError, TypeError, SyntaxError, IndexError) as error:
        raise SourceError.no_text(what) from error
    return text


def _operations(function: ast.FunctionDef) -> list[tuple[ast.AST, InnerOperation]]:
    """The operations of a function in the order in which they are written."""
    found: list[tuple[tuple[int, int], ast.AST, str, str]] = []
    for node in _walk(function.body):
        if isinstance(node, ast.Call):
            names = _called(node.func)
            if names is not None:
                found.append((_end(node.func), node, *names))
        elif isinstance(node, (ast.BinOp, ast.AugAssign)):
            if isinstance(node, ast.AugAssign) and not isinstance(node.target, ast.Name):
                continue
            kind = _OPERATORS[type(node.op)]
            name = _NAMES.get(kind, kind).strip("_")
            left = node.left if isinstance(node, ast.BinOp) else node.target
            found.append((_end(left), node, name, name))
        elif (
            isinstance(node, ast.UnaryOp)
            and type(node.op) in _OPERATORS
            and not isinstance(node.operand, ast.Constant)
        ):
            name = _OPERATORS[type(node.op)]
            found.append(((node.lineno, node.col_offset), node, name, name))
    found.sort(key=lambda item: item[0])
    counts: dict[tuple[bool, str], int] = {}
    result = []
    for (line, _), node, short, full in found:
        numbers = [counts.get((long, n), 0) for long, n in ((False, short), (True, full))]
        counts[False, short], counts[True, full] = numbers[0] + 1, numbers[1] + 1
        one = InnerOperation(f"{short}_{numbers[0]}", f"{full}_{numbers[1]}", line)
        result.append((node, one))
    return result


def _walk(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Every node that runs when the function is called; not what functions inside it do."""
    for node in body:
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            continue
        if isinstance(node, ast.AnnAssign):  # its annotation is no operation
            yield from _walk([node.target, *([node.value] if node.value else [])])
            continue
        yield from _walk(ast.iter_child_nodes(node))


def _end(node: ast.AST) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]


def _called(function: ast.expr) -> tuple[str, str] | None:
    """The name of a called function, in short and in full."""
    if isinstance(function, ast.Name):
        return None if function.id in _FRAMES else (function.id, function.id)
    if not isinstance(function, ast.Attribute):
        full = re.sub(r"\W+", "_", ast.unparse(function)).strip("_")[:40]
        return full, full
    parts = [function.attr]
    inner: ast.expr = function.value
    while isinstance(inner, ast.Attribute):
        parts.append(inner.attr)
        inner = inner.value
    if not isinstance(inner, ast.Name):
        super_call = isinstance(inner, ast.Call) and ast.unparse(inner.func) == "super"
        name = f"super_{function.attr}" if super_call else function.attr
        return name, name
    full = "_".join([inner.id, *reversed(parts)])
    return (full if inner.id == "self" else function.attr), full


def listing(function: Any, what: str) -> Listing:
    """What is written in a function.

    Raises:
        SourceError: it has no text that can be had.
    """
    inner = innermost(function, what)
    text = _text(inner.__code__)
    operations = tuple(one for _, one in _operations(text.tree()[1]))
    rows = tuple((text.first + number, line.rstrip("\n")) for number, line in enumerate(text.lines))
    return Listing(f"{inner.__qualname__}  {text.file}:{text.first}", operations, rows)


def innermost(function: Any, what: str) -> types.FunctionType:
    """The function as it was written, below methods, partials and decorators."""
    while True:
        if isinstance(function, torch.nn.Module):
            raise SourceError.module(what)
        if hasattr(function, "_torchdynamo_orig_callable"):
            raise SourceError.not_plain(what, "compiled")
        if isinstance(function, types.MethodType):
            function = function.__func__
        elif isinstance(function, functools.partial):
            function = function.func
        elif isinstance(function, types.FunctionType):
            wrapped = function.__dict__.get("__wrapped__")
            if wrapped is None:
                return function
            function = wrapped
        else:
            raise SourceError.no_text(what)


# -------------------------------------------------------------------- instrumenting


class Tap:
    """What is wanted of one operation.

    Attributes:
        inputs, output: take in a value and return its replacement, or None to leave it.
        skip: takes the computation and its inputs, and gives the result.
        found: takes the function that is called.
        inner: taps in the function that is called.
    """

    __slots__ = ("found", "inner", "inputs", "output", "skip")

    def __init__(self) -> None:
        self.inputs: Callable[[Any], Any] | None = None
        self.output: Callable[[Any], Any] | None = None
        self.skip: Callable[[Callable[[], Any], Any], Any] | None = None
        self.found: Callable[[Any], None] | None = None
        self.inner: dict[str, Tap] = {}

    def perform(self, name: str, function: Any, args: Any, kwargs: Any) -> Any:
        """Call the function of an operation."""
        if self.found is not None:
            self.found(function)
        if self.inputs is not None:
            changed = self.inputs((args, kwargs))
            if changed is not None:
                args, kwargs = changed
        called = instrumented(function, self.inner, f"`{name}`") if self.inner else function
        if self.skip is None:
            result = called(*args, **kwargs)
        else:
            result = self.skip(lambda: called(*args, **kwargs), (args, kwargs))
        if self.output is not None:
            changed = self.output(result)
            if changed is not None:
                if _changes_its_own(function, result):
                    # Its result is used by the name of what it changed.
                    return result.copy_(changed)
                return changed
        return result


def _changes_its_own(function: Any, result: Any) -> bool:
    name = getattr(function, "__name__", "")
    own = name.endswith("_") and not name.endswith("__")
    return (
        own and isinstance(result, torch.Tensor) and result is getattr(function, "__self__", None)
    )


Taps = dict[str, Tap]


def taps_of(ports: Mapping[str, Any], *kinds: str) -> Taps:
    """The taps for ports such as "source.attention_interface_0.source.softmax_0.output".

    Args:
        ports: what takes in the values of each.
        kinds: "source", "eager" or "functions"; the others are left out.
    """
    taps: Taps = {}
    for port, handler in ports.items():
        parts = port.split(".")
        if parts[0] not in kinds:
            continue
        level, tap = taps, Tap()
        for name in parts[1:-1:2]:
            tap = level.setdefault(name, Tap())
            level = tap.inner
        before = getattr(tap, parts[-1])
        setattr(tap, parts[-1], handler if before is None else _both(before, handler))
    return taps


def _both(first: Any, second: Any) -> Callable[[Any], Any]:
    """Two names of one place."""

    def handler(value: Any) -> Any:
        changed = first(value)
        again = second(value if changed is None else changed)
        return changed if again is None else again

    return handler


def instrumented(function: Any, taps: Taps, what: str) -> Any:
    """`function` with taps at some of its operations, and everything around it as it was.

    Raises:
        SourceError: it has no text, or no such operations.
    """
    if isinstance(function, types.MethodType):
        return types.MethodType(instrumented(function.__func__, taps, what), function.__self__)
    if isinstance(function, functools.partial):
        inner = instrumented(function.func, taps, what)
        return functools.partial(inner, *function.args, **function.keywords)
    inner = innermost(function, what)
    return _around(function, inner, _compiled(inner, taps), what)


def _around(function: Any, inner: types.FunctionType, new: Any, what: str) -> Any:
    """The decorators of `function` around `new` instead of `inner`."""
    if function is inner:
        return new
    if isinstance(function, types.MethodType):
        return types.MethodType(_around(function.__func__, inner, new, what), function.__self__)
    if not isinstance(function, types.FunctionType):
        raise SourceError.not_plain(what, "behind a decorator that is no function")
    wrapped = function.__dict__["__wrapped__"]
    below = _around(wrapped, inner, new, what)
    cells = function.__closure__ or ()
    closure = tuple(types.CellType(below) if _holds(cell, wrapped) else cell for cell in cells)
    if all(one is other for one, other in zip(closure, cells, strict=True)):
        raise SourceError.not_plain(what, "behind a decorator that hides it")
    return _like(function, function.__code__, closure)


def _holds(cell: types.CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty cell
        return False


def _like(function: types.FunctionType, code: types.CodeType, closure: Any) -> types.FunctionType:
    new = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure
    )
    new.__kwdefaults__ = function.__kwdefaults__
    # Others look at the signature: `generate` checks its keywords against the forward's.
    functools.update_wrapper(new, function)
    return new


def _compiled(function: types.FunctionType, taps: Taps) -> types.FunctionType:
    code = _code(function.__code__, function.__qualname__, frozenset(taps))

    def operation(name: str, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        if type(called) is str:
            called = getattr(operator, called)
        return taps[name].perform(name, called, args, kwargs)

    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells[_DOOR] = types.CellType(operation)
    return _like(function, code, tuple(cells[name] for name in code.co_freevars))


@functools.lru_cache(maxsize=512)
def _code(code: types.CodeType, qualname: str, names: frozenset[str]) -> types.CodeType:
    """The code of a function whose operations of these names go through the door."""
    text = _text(code)
    _, function = text.tree()
    operations = _operations(function)
    known = [one.name for _, one in operations]
    for name in names:
        if name not in known:
            raise SourceError.operation(qualname, name, known)
    wanted = {id(node): one.name for node, one in operations if one.name in names}
    function.body = [_Doors(wanted).visit(statement) for statement in function.body]
    function.decorator_list = []
    # Inside a class of the same name, for names with two underscores and for `super()`.
    owner = qualname.split(".")[-2:-1]
    known_class = bool(owner) and owner[0].isidentifier()
    free = [name for name in code.co_freevars if name != "__class__" or not known_class]
    head = f"def factory({', '.join((_DOOR, *free))}):\n"
    tree = ast.parse(head + (f" class {owner[0]}:\n  pass" if known_class else " pass"))
    factory: Any = tree.body[0]
    (factory.body[0] if known_class else factory).body = [function]
    ast.fix_missing_locations(tree)
    whole = compile(tree, text.file, "exec", code.co_flags & _FUTURE, dont_inherit=True)
    return next(found for found in _inside(whole) if found.co_name == code.co_name)


def _inside(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code objects below one, outer ones first."""
    below = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    for one in below:
        if one.co_name != "factory" or one.co_freevars:
            yield one
    for one in below:
        yield from _inside(one)


class _Doors(ast.NodeTransformer):
    """Hands the wanted operations to the door: `f(x)` becomes `door("f_0", f, x)`."""

    def __init__(self, wanted: dict[int, str]) -> None:
        self._wanted = wanted

    def visit(self, node: ast.AST) -> Any:
        name = self._wanted.get(id(node))
        self.generic_visit(node)
        if name is None:
            return node
        if isinstance(node, ast.Call):
            first, rest, keywords = node.func, node.args, node.keywords
        else:
            assert isinstance(node, (ast.BinOp, ast.AugAssign, ast.UnaryOp))
            keywords, kind = [], _OPERATORS[type(node.op)]
            if isinstance(node, ast.BinOp):
                rest = [node.left, node.right]
            elif isinstance(node, ast.UnaryOp):
                rest = [node.operand]
            else:
                assert isinstance(node.target, ast.Name)
                kind = f"i{kind.strip('_')}"
                rest = [ast.copy_location(ast.Name(node.target.id, ast.Load()), node), node.value]
            first = ast.copy_location(ast.Constant(kind), node)
        door = ast.copy_location(ast.Name(_DOOR, ast.Load()), node)
        label = ast.copy_location(ast.Constant(name), node)
        call = ast.copy_location(ast.Call(door, [label, first, *rest], keywords), node)
        if isinstance(node, ast.AugAssign):
            return ast.copy_location(ast.Assign([node.target], call), node)
        return call


# -------------------------------------------------------------------- torch functions


class Functions(TorchFunctionMode):
    """Counts the torch functions that are called, by name, and gives taps what they want.

    Attributes:
        seen: the name of every function with its number, in the order of the calls.
    """

    def __init__(self, taps: Taps) -> None:
        super().__init__()
        self.seen: list[str] = []
        self._taps = taps
        self._counts: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if not name or name in ("get", "set", "delete"):  # properties of tensors
            return func(*args, **kwargs)
        number = self._counts.get(name, 0)
        self._counts[name] = number + 1
        label = f"{name}_{number}"
        self.seen.append(label)
        tap = self._taps.get(label)
        return func(*args, **kwargs) if tap is None else tap.perform(label, func, args, kwargs)


# -------------------------------------------------------------------- a module


def is_inner(port: str) -> bool:
    """True for the port of an inner operation."""
    return port.startswith(("source.", "functions.", f"{EAGER}."))


def forward_name(module: torch.nn.Module) -> str:
    """Where the module's own forward is; accelerate puts one before it and keeps it."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def put_back(replaced: list[tuple[torch.nn.Module, str, Any]]) -> None:
    """Undo replacements of forwards on instances, the last one first.

    Args:
        replaced: the module, the attribute, and what the instance itself had there or None.
    """
    # A second Ctrl-C may arrive half-way: what it left is put back by the next call.
    while replaced:
        module, name, before = replaced[-1]
        if before is not None:
            setattr(module, name, before)
        else:
            module.__dict__.pop(name, None)
        replaced.pop()


def tapped_forward(
    module: torch.nn.Module,
    path: str,
    ports: Mapping[str, Any],
    listens: Callable[[], bool],
    seen: Callable[[list[str]], None] | None = None,
) -> Any:
    """The forward of a module with taps at its inner operations.

    Args:
        ports: what takes in the values of each port.
        listens: false for calls that are not the run's.
        seen: takes the names of the torch functions that the forward called.
    """
    forward = original = getattr(module, forward_name(module))
    what = f"the forward of `{path}` ({type(module).__name__})"
    taps, functions = taps_of(ports, "source", EAGER), taps_of(ports, "functions")
    if taps:
        forward = instrumented(original, taps, what)
    if any(port.startswith(f"{EAGER}.") for port in ports):
        forward = with_eager_attention(module, forward, listens)
    if not functions and seen is None:
        return forward
    inside = forward

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        if not listens():
            return original(*args, **kwargs)
        with Functions(functions) as mode:
            result = inside(*args, **kwargs)
        if seen is not None:
            seen(mode.seen)
        return result

    return counted
