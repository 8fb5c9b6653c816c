"""Owns the answers that a block gives while it is written: shapes, dtypes, positions of tokens.

It evaluates the recorded nodes on fake tensors; where a model's own values come in, the schedule
says their structure. Nothing here needs weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from ..tracing.errors import (
    BlockError,
    InputError,
    NotRunError,
    OperationError,
    ScheduleError,
    UnmeasuredError,
    UnreachedError,
)
from ..tracing.frames import entry
from ..tracing.graph import arguments
from ..tracing.interpreter import Interpreter
from ..tracing.job import Entry, Recorded
from ..tracing.node import CALL, READ, Captured, GradPoint, HookPoint, Later, Node
from ..tracing.operations import AGAIN, ELEMENT, GETITEM, ITEM, PUT, SETITEM, TAKE
from ..tracing.structure import columns_of, map_leaves
from .interrupts import uninterrupted
from .rows import (
    BATCH,
    BATCH_TARGET,
    BATCH_TOKEN,
    KEY,
    TARGET,
    TOKEN,
    UNKNOWN,
    Axis,
    Opaque,
    TensorAxes,
    map_axes,
)
from .schedule import SIZES, Schedule, quiet
from .tensors import Tensors

#: What torch raises where a recorded operation does not fit other sizes than the prompt's own.
UNFIT = (RuntimeError, IndexError, ValueError, TypeError)
#: What a module has under these names is no submodule.
_PORTS = frozenset({"output", "input", "inputs", "skip", "source", "functions", "calls"})


class Prompt(Protocol):
    """What a model made of the arguments of one invoke.

    Attributes:
        spans: where the tokens of each of its rows begin and end; outside is padding. Zeros where
            the model has no tokens.
        width: tokens of a row with its padding.
    """

    @property
    def spans(self) -> list[tuple[int, int]]: ...

    @property
    def width(self) -> int: ...


class Structure(Protocol):
    """What is known of a model without its weights."""

    def schedule(self, prompt: Any, block: Recorded | None, *, continued: bool = False) -> Schedule:
        """What the forward does; `continued`, behind a cache that holds tokens."""

    def meta_module(self, path: str) -> torch.nn.Module: ...

    def meta_parameter(self, path: str) -> torch.Tensor: ...

    def planned_device(self) -> torch.device: ...

    def refresh(self) -> None:
        """Forget what was learned of the model, if it has changed since."""

    @property
    def pads_right(self) -> bool:
        """True if the shorter rows of a batch are padded on the right."""

    def submodule(self, path: str) -> torch.nn.Module: ...

    def get(self, path: str) -> Any:
        """What a user finds at a path."""

    @property
    def tensor_places(self) -> dict[Hashable, bool]:
        """Which places hold one tensor, as far as it was asked."""

    def gives_tensor(self, entry: Entry) -> bool:
        """True if the entry point of the block returns one tensor, and no structure."""

    def return_options(self, entry: Entry) -> Hashable:
        """Options of the block that change what modules return."""

    def targets(self, entry: Entry, prompt: Any) -> int | None:
        """How many tokens a decoder sees in the first forward; None where the prompt has no others."""

    def keeps_cache(self, entry: Entry) -> bool:
        """False if every forward of the generation sees all tokens so far."""

    def rows_each(self, entry: Entry, path: str) -> int:
        """Rows that a module of a generation has for each row of a prompt: beams, say."""

    def cached(self, entry: Entry, prompt: Any) -> int:
        """Tokens that the user's own cache holds before the first forward."""

    def grows_cache(self, entry: Entry, prompt: Any) -> bool:
        """False if a cache has other entries than the tokens so far, as a static one has, so that only
        the run tells how many keys there are."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """What the axes of a value count.

    Attributes:
        tokens: the axes that count tokens; of an attention pattern, those of queries and of keys.
        rows: the one that counts rows, where it is known.
        flat: the first of `tokens` counts the tokens of several rows together.
        keys: those of `tokens` that count keys, where a cache holds some of them.
    """

    tokens: tuple[int, ...]
    rows: int | None
    flat: bool = False
    keys: tuple[int, ...] = ()


class Size(NamedTuple):
    """The sizes of one forward.

    Attributes:
        batch: rows.
        tokens: of a row, with its padding; where an encoder reads the prompt, the encoder's.
        targets: as many as `tokens`; of a decoder, its own.
        past: tokens that the cache has seen before; None where that does not tell what it holds.
    """

    batch: int
    tokens: int
    targets: int
    past: int | None


#: Why the sizes of keys are not known.
_ROOM = "it has the keys of a cache whose room is not the tokens so far"


class Shapes:
    """The oracle of one block."""

    def __init__(self, written: Recorded, structure: Structure) -> None:
        self._written = written
        self._structure = structure
        self._fakes: Fakes | None = None
        self._tensors: Tensors | None = None
        self._trials: list[Fakes] | None = None
        self._open: dict[int, list[Fakes]] = {}
        self._layouts: dict[int, tuple[Node, Layout]] = {}
        self._continued: dict[tuple[bool, int], bool] = {}

    @entry
    def value(self, node: Node) -> Any:
        """A fake value of `node`.

        Raises:
            ScheduleError: the model cannot be run fake.
            UnmeasuredError: only the run tells the sizes of this value.
        """
        if self._fakes is None:
            self._structure.refresh()
            self._fakes = Fakes(self._structure, self._size, self._schedule)
        found = self._fakes.value(node)
        if type(found) is Opaque:
            raise UnmeasuredError.unknown(node.describe(), found.reason)
        return found

    def is_tensor(self, node: Node) -> bool:
        """True if the value of `node` is known to be one tensor."""
        if self._tensors is None:
            structure = self._structure
            options = structure.return_options(self._written.entry)
            result = options, "", "result"
            if result not in structure.tensor_places:
                structure.tensor_places[result] = structure.gives_tensor(self._written.entry)
            self._tensors = Tensors(
                structure.submodule, structure.tensor_places, options, self.value
            )
        return self._tensors.holds(node)

    def device(self) -> torch.device:
        return self._structure.planned_device()

    def namesake(self, point: HookPoint, name: str) -> Any:
        """What `name` is in a submodule that is called as the port of `point` is.

        Raises:
            OperationError: it is a port of that submodule, which is named otherwise.
        """
        path = f"{point.path}.{point.port}" if point.path else point.port
        model = self._structure
        below = model.submodule(point.path)._modules.get(point.port)
        if below is None:
            return None
        if name in _PORTS:
            raise OperationError(
                f"`{path}` in a block is what `{point.path}` gives. The submodule that is called "
                f'`{point.port}`, too, is `["{point.port}"]` of it: write '
                f'`{point.path}["{point.port}"].{name}`.'
            )
        known = (below._modules, below._parameters, below._buffers)
        return getattr(model.get(path), name) if any(name in one for one in known) else None

    def _prompts(self, node: Node) -> list[Prompt]:
        """What the invoke of `node` sees: its own prompt, or those of the whole batch."""
        source = _source(node)  # of another invoke, it may be
        invoke = max((node if source is None else source).invoke, 0)
        prompts = self._written.prompts
        prompt = prompts[invoke] if invoke < len(prompts) else None
        return [prompt] if prompt is not None else [p for p in prompts if p is not None]

    def _schedule(self, node: Node) -> Schedule:
        first = next(iter(self._prompts(node)), None)
        continued = self._continues(first, _step(node))
        return self._structure.schedule(first, self._written, continued=continued)

    def _continues(self, prompt: Prompt | None, step: int) -> bool:
        """True if a forward finds keys of earlier tokens in a cache."""
        at = step > 0, id(prompt)
        found = self._continued.get(at)
        if found is None:
            structure, entry = self._structure, self._written.entry
            if step:
                found = structure.keeps_cache(entry)
            else:
                held = structure.cached(entry, prompt)
                found = held > 0 or not structure.grows_cache(entry, prompt)
            self._continued[at] = found
        return found

    def _held(self, prompts: list[Prompt], step: int) -> int | None:
        """Tokens in the cache before the forward of a step; None where only the run tells what it
        holds."""
        structure, entry, first = self._structure, self._written.entry, next(iter(prompts), None)
        if not structure.grows_cache(entry, first):
            return None
        if not step:
            return structure.cached(entry, first)
        begun = structure.targets(entry, first)
        return (max(p.width for p in prompts) if begun is None else begun) + step - 1

    def _targets(self, prompts: list[Prompt], step: int) -> int | None:
        """Tokens of a decoder in the forward of a step; None where it has none of its own."""
        first = self._structure.targets(self._written.entry, next(iter(prompts), None))
        if first is None or not step:
            return first
        return 1 if self._structure.keeps_cache(self._written.entry) else first + step

    def _spans(
        self, node: Node, step: int, keys: bool = False
    ) -> tuple[list[tuple[int, int]], int]:
        """Where the tokens of each row that the invoke of `node` sees lie, and the width of a row.

        Args:
            keys: of the axis that counts keys, where a cache holds some of them.
        """
        prompts, each = self._prompts(node), self._each(node)
        rows = sum(len(p.spans) * each for p in prompts)
        targets = self._targets(prompts, step)
        if targets is not None:
            if self._counts_targets(node):
                width = targets + (self._held(prompts, step) or 0) * keys
                return [(0, width)] * rows, width
            step = 0  # an encoder reads the prompt once
        if step and not keys and self._structure.keeps_cache(self._written.entry):
            return [(0, 1)] * rows, 1
        width = max((p.width for p in prompts), default=0)
        right = self._structure.pads_right
        before = [0 if right else width - p.width for p in prompts]
        spans = [
            (start + shift, stop + shift + step)
            for p, shift in zip(prompts, before, strict=True)
            for start, stop in p.spans
            for _ in range(each)
        ]
        unseen = self._unseen(node, step, keys)
        if unseen:
            spans = [(max(0, start - unseen), max(0, stop - unseen)) for start, stop in spans]
        return spans, width + step - unseen

    def _unseen(self, node: Node, step: int, keys: bool = False) -> int:
        """Tokens of the prompt that are not on the axis of tokens: a cache stands for them, or does not
        hold their keys any more. Less than none where keys come before the prompt's own."""
        prompts, generates = self._prompts(node), self._written.entry.generates
        held = self._held(prompts, step)
        if not keys:
            return held or 0 if generates and not step else 0
        if held is None:
            raise UnmeasuredError.unknown(node.describe(), _ROOM)
        kept = next((axis.kept(held) for axis in self._key_axes(node)), held)
        return held - kept if generates else -kept

    def _key_axes(self, node: Node) -> list[Axis]:
        """The axes of keys where `node` comes from."""
        point, found = _origin(node), list[Axis]()
        if isinstance(point, HookPoint):
            axes = self._schedule(node).axes(point)
            map_axes(lambda one: found.extend(a for a in one.axes if a.role == KEY), axes)
        return found

    def _each(self, node: Node) -> int:
        """Rows for each row of a prompt, where `node` comes from."""
        if not self._written.entry.generates:
            return 1
        origin = _origin(node)
        return self._structure.rows_each(
            self._written.entry, origin.path if origin is not None else ""
        )

    def _counts_targets(self, node: Node) -> bool:
        """True if a value comes from a place whose first axis of tokens is the decoder's."""
        point = _origin(node)
        if point is None or not isinstance(point, HookPoint):
            return False
        roles: list[str] = []
        map_axes(
            lambda axes: roles.extend(a.role for a in axes.axes), self._schedule(node).axes(point)
        )
        return next((role for role in roles if role in (TOKEN, TARGET, KEY)), TOKEN) != TOKEN

    def _size(self, node: Node) -> Size:
        hook_point: HookPoint = node.target
        prompts = self._prompts(node)
        targets = self._targets(prompts, hook_point.step)
        spans, tokens = self._spans(node, hook_point.step)
        held = self._held(prompts, hook_point.step)
        if targets is None:
            return Size(len(spans), tokens, tokens, held)
        return Size(len(spans), max((p.width for p in prompts), default=0), targets, held)

    def token_axis(self, node: Node) -> int:
        """Which axis of the value of `node` counts tokens.

        Raises:
            OperationError: none does, or several do.
        """
        layout = self.layout(node)
        if layout.flat:
            raise _no_rows(node, layout.tokens[0])
        return layout.tokens[0]

    def own_axes(self, node: Node) -> tuple[int, int | None]:
        """Which axes of the value of `node` count tokens and rows; the same one where it counts both.

        Raises:
            OperationError: none counts tokens.
        """
        layout = self.layout(node)
        if layout.flat and self._written.loop is not None:
            raise _no_rows(node, layout.tokens[0])
        return layout.tokens[0], layout.tokens[0] if layout.flat else layout.rows

    def layout(self, node: Node) -> Layout:
        """Which axes of the value of `node` count tokens and rows.

        Raises:
            OperationError: none counts tokens.
        """
        found = self._layouts.get(node.index)
        if found is None or found[0] is not node:
            found = self._layouts[node.index] = node, self._layout(node)
        return found[1]

    def _layout(self, node: Node) -> Layout:
        rows_seen = len(self._spans(node, _step(node))[0])
        axes, several = self._measured(node), rows_seen > 1
        if isinstance(axes, TensorAxes):
            roles = [axis.role for axis in axes.axes]
            counted = next((role for role in roles if role in (TOKEN, TARGET)), TOKEN)
            tokens = tuple(
                i for i, a in enumerate(axes.axes) if a.role in (counted, KEY) and a.factor == 1
            )
            keys = tuple(i for i in tokens if roles[i] == KEY)
            rows = roles.index(BATCH) if BATCH in roles else None
            flat = next((i for i, r in enumerate(roles) if r in (BATCH_TOKEN, BATCH_TARGET)), None)
            if not tokens and flat is not None:
                return Layout((flat,), None, several)
            if tokens:
                return Layout(tokens, rows, keys=keys)
        if self._trials is None:
            # No shorter than the prompts, whose tokens may be named.
            width = max((p.width for p in self._written.prompts if p), default=0)
            first, second = (width + tokens for _, tokens in SIZES)
            batch = 7 * rows_seen + 1  # no multiple of the rows that there are
            trials = ((None, first, 0), (None, second, 0), (batch, first, 0), (None, first, 1))
            self._trials = [self._sized(*size) for size in trials]
        try:
            one, longer, behind = (self._trials[i].value(node) for i in (0, 1, 3))
        except ScheduleError:
            raise
        except UNFIT:
            # A captured tensor fits this prompt's own length alone: find that length instead.
            axis, counts = self._axis_of_length(node)
            return Layout((axis,), self._axis_of_rows(node), keys=(axis,) if counts else ())
        if type(one) is Opaque:
            raise UnmeasuredError.unknown(node.describe(), one.reason)
        if isinstance(one, torch.Tensor) and one.ndim == longer.ndim:
            pairs = zip(one.shape, longer.shape, strict=True)
            found = tuple(i for i, (a, b) in enumerate(pairs) if a != b)
            if found:
                rows = self._row_axis(node, one.shape) if several else None
                flat = several and rows == found[0]
                grown = longer.shape[found[0]] - one.shape[found[0]]
                each = rows_seen if flat else 1
                if grown != each * (SIZES[1][1] - SIZES[0][1]):
                    raise _no_rows(node, found[0])
                keys = tuple(i for i in found if behind.shape[i] != one.shape[i])
                return Layout(found, None if flat else rows, flat, keys)
        raise OperationError(f"`.t`: {node.describe()} has no axis that counts tokens.")

    def _row_axis(self, node: Node, shape: torch.Size) -> int | None:
        """Which axis of a computed value counts rows: the one that a larger batch makes longer."""
        assert self._trials is not None
        try:
            other = self._trials[2].value(node)
        except UNFIT:  # a captured tensor fits this batch alone
            return self._axis_of_rows(node)
        if not isinstance(other, torch.Tensor) or other.ndim != len(shape):
            return None
        found = [i for i, (a, b) in enumerate(zip(shape, other.shape, strict=True)) if a != b]
        return found[0] if len(found) == 1 else self._axis_of_rows(node)

    def _axis_of_rows(self, node: Node) -> int | None:
        value, (spans, width) = self.value(node), self._spans(node, _step(node))
        if not isinstance(value, torch.Tensor) or len(spans) == width:
            return None
        found = [i for i, size in enumerate(value.shape) if size == len(spans)]
        return found[0] if len(found) == 1 else None

    def sizes(self, node: Node) -> list[int | None]:
        """The sizes of a tensor; None where they are those of the prompts, or of the step.

        What an edit records is for prompts of any number of rows; a loop is for those of its invoke.
        """
        invoke = -1 if self._written.lasting else node.invoke
        trials = self._open.get(invoke)
        if trials is None:
            # No shorter than the prompts, whose tokens may be named.
            width = max((p.width for p in self._prompts(node)), default=0)
            trials = self._open[invoke] = [
                self._sized(batch if invoke < 0 else None, width + tokens, 0)
                for batch, tokens in SIZES
            ]
        first, second = (trial.value(node).shape for trial in trials)
        return [a if a == b else None for a, b in zip(first, second, strict=True)]

    def _sized(self, batch: int | None, tokens: int, past: int) -> Fakes:
        """Fake values for other prompts."""

        def size(node: Node) -> Size:
            own = self._size(node)
            rows = own.batch if batch is None else batch
            return Size(rows, tokens, tokens, None if own.past is None else past)

        return Fakes(self._structure, size, self._schedule)

    def _measured(self, node: Node) -> Any:
        """Axes of a value that is a hook point's, or a part of its structure; None for others."""
        if node.kind == READ:
            if isinstance(node.target, GradPoint):
                return self._measured(node.target.node)
            return self._schedule(node).axes(node.target)
        if (
            node.kind != CALL
            or node.target not in (ELEMENT, GETITEM)
            or type(node.args[1]) is not int
        ):
            return None
        whole = self._measured(node.args[0])
        if isinstance(whole, TensorAxes):
            return whole if node.target is ELEMENT and node.args[1] == 0 else None
        parts = whole if isinstance(whole, (tuple, list)) else ()
        return parts[node.args[1]] if node.args[1] < len(parts) else None

    def _axis_of_length(self, node: Node) -> tuple[int, bool]:
        """The axis of a value that is as long as its tokens are many, and whether these are keys."""
        value, keys = self.value(node), bool(self._key_axes(node))
        _, tokens = self._spans(node, _step(node), keys)
        if isinstance(value, torch.Tensor):
            found = [i for i, size in enumerate(value.shape) if size == tokens]
            if len(found) == 1:
                return found[0], keys
        raise OperationError(
            f"`.t`: which axis of {node.describe()} counts tokens cannot be told; index that axis."
        )

    def positions(self, node: Node) -> list[tuple[int, int, int]]:
        """Where the own tokens of each row lie on the token axis of the value of `node`: first column,
        the column behind the last, and the number of the first among the prompt's own tokens."""
        step, keys = _step(node), self._counts_keys(node)
        spans, width = self._spans(node, step, keys)
        if keys or not step or width > 1:
            unseen = max(0, self._unseen(node, step, keys))
            return [(start, stop, unseen) for start, stop in spans]
        each = range(self._each(node))
        lengths = [stop - start for p in self._prompts(node) for start, stop in p.spans]
        return [(0, 1, length + step - 1) for length in lengths for _ in each]

    def _counts_keys(self, node: Node) -> bool:
        """True if the first axis of tokens counts keys, of which a cache holds some."""
        if not self._continues(next(iter(self._prompts(node)), None), _step(node)):
            return False
        try:
            layout = self.layout(node)
        except OperationError:
            return False  # no axis counts tokens
        return layout.tokens[0] in layout.keys

    def own_rows(self, node: Node) -> list[tuple[int, int, int]]:
        """As `positions`; nothing where the rows have no padding, and are told apart by an axis."""
        self._refuse_past(node, "")
        spans, width = self.spans(node)
        if spans == [(0, width)] * len(spans) and not self.layout(node).flat:
            self._written.graph.counts_tokens = True
            return []
        self._counted(node, width)
        return self.positions(node)

    def _refuse_past(self, node: Node, key: str) -> None:
        """Raise InputError where the first tokens are not there: a cache of the user's stands for them,
        or no longer holds them."""
        keys = self._counts_keys(node)
        unseen = self._unseen(node, _step(node), keys)
        if unseen > 0:
            reason = (
                f"the cache of this layer no longer holds the keys of the first {unseen} tokens"
                if keys
                else f"a cache stands for the prompt's first {unseen} tokens, which no forward sees"
            )
            raise InputError(f"`.t{key}`: {reason}. Count from the end, `.t[-1]`.")

    def _counted(self, node: Node, width: int) -> None:
        """Note that positions of the tokens of these prompts are in the graph.

        Raises:
            OperationError: some of the columns are missing, so that which they are is not known.
        """
        self._written.graph.fixed_positions = True
        layout, value = self.layout(node), self.value(node)
        columns = value.shape[layout.tokens[0]]
        if not layout.flat and columns != width:
            raise OperationError(
                f"`.t`: {node.describe()} has {columns} columns where the rows with their padding have "
                f"{width}, so which are own tokens cannot be told. Use `.t` before it."
            )

    def source(self, node: Node) -> Node | None:
        """What a value comes from, along first arguments; None if it is no value of the model."""
        return _source(node)

    def spans(self, node: Node) -> tuple[list[tuple[int, int]], int]:
        """Where the own tokens of each row lie in the value of `node`, and the width of a row."""
        return self._spans(node, _step(node), self._counts_keys(node))

    def spans_of_keys(self, node: Node) -> tuple[list[tuple[int, int]], int]:
        """As `spans`, on an axis that counts keys."""
        return self._spans(node, _step(node), keys=True)

    def mask(self, invoke: int, step: int) -> torch.Tensor:
        """Which columns of each row of an invoke are own tokens: [row, token]."""
        root = Node(-1, READ, HookPoint("", "output", step), (), {}, invoke, "", 0)
        spans, width = self._spans(root, step)
        if not width:
            raise BlockError("what this model takes has no tokens, so there is no mask of them.")
        self._written.graph.fixed_positions = True
        return columns_of(spans, width)

    def token_index(self, node: Node, key: Any) -> Any:
        """The index that takes `key` of each row's own tokens out of the value of `node`.

        Raises:
            InputError: a prompt has no such token.
            OperationError: rows of different lengths would give different numbers of tokens.
        """
        axis, graph = self.token_axis(node), self._written.graph
        spans, width = self.spans(node)
        if not (type(key) is int and key < 0):
            self._refuse_past(node, f"[{key}]")
        if type(key) is int:
            for start, stop in spans:
                if not start - stop <= key < stop - start:
                    raise InputError(f"`.t[{key}]`: the prompt has {stop - start} tokens.")
        plain = (*(slice(None),) * axis, key)
        if spans == [(0, width)] * len(spans):
            graph.counts_tokens = True
            return plain
        self._counted(node, width)
        if not isinstance(key, (int, slice)):
            raise OperationError("`.t` on a prompt with padding takes a position or a slice.")
        if all(_taken(range(width), key) == _taken(range(*span), key) for span in spans):
            return plain
        rows = self.layout(node).rows
        if rows is None:
            if len(set(spans)) > 1:
                raise OperationError(
                    f"`.t` on prompts of different lengths needs an axis that counts rows, and "
                    f"{node.describe()} has none: use `.t` before it."
                )
            return (*plain[:-1], _shifted(key, *spans[0], width))
        places: list[Any] = [list(range(start, stop))[key] for start, stop in spans]
        if isinstance(key, slice):
            counts = sorted({len(taken) for taken in places})
            if len(counts) > 1:
                lengths = sorted({stop - start for start, stop in spans})
                raise OperationError(
                    f"`.t[{_written(key)}]` takes {counts} tokens from prompts of lengths {lengths}; "
                    "give each prompt an invoke of its own."
                )
        shape = self.value(node).shape
        each = max(1, shape[rows] // len(places))  # beams repeat the rows of a prompt
        return _in_rows(shape, rows, axis, [taken for taken in places for _ in range(each)])


def is_own(key: Any, span: tuple[int, int], width: int) -> bool:
    """True if an index of all columns of a row takes what it takes of the row's own tokens alone, and
    nothing of the padding, unless it goes on to where that ends."""
    try:
        seen = _taken(range(width), key)
    except IndexError:  # no matter of padding
        return True
    if seen in (list(range(width)), list(range(*span))):
        return True
    own = [column for column in seen if column in range(*span)]
    grows = isinstance(key, slice) and len(_taken(range(width + 1), key)) > len(seen)
    try:
        return own == _taken(range(*span), key) and (grows or own == seen)
    except IndexError:
        return False


def _taken(columns: range, key: Any) -> list[int]:
    if isinstance(key, slice):
        return list(columns[key])
    return [columns[i] for i in ([key] if isinstance(key, int) else key)]


def _in_rows(shape: torch.Size, rows: int, axis: int, places: list[Any]) -> tuple[Any, ...]:
    """The index that takes other places of an axis in each row. It names all axes up to the later one
    of the two, so that torch leaves their order alone."""
    single = isinstance(places[0], int)
    if (rows, axis) == (0, 1):
        each: list[Any] = list(range(len(places))) if single else [[i] for i in range(len(places))]
        return each, places
    kept = [i for i in range(max(rows, axis) + 1) if not (single and i == axis)]

    def along(i: int, entries: list[int]) -> Any:
        sizes = [-1 if other == i else 1 for other in kept]
        return torch.tensor(entries).reshape(sizes).tolist()

    index = [along(i, list(range(len(places) if i == rows else shape[i]))) for i in kept]
    table = torch.tensor(places)  # [row], or [row, place]
    if not single and axis < rows:
        table = table.T
    sizes = [len(places) if i == rows else -1 if i == axis else 1 for i in kept]
    index.insert(axis, table.reshape(sizes).tolist())
    if not single:
        del index[axis + 1]
    return tuple(index)


def _written(key: slice) -> str:
    parts = ["" if part is None else str(part) for part in (key.start, key.stop)]
    return ":".join(parts if key.step is None else [*parts, str(key.step)])


def _no_rows(node: Node, axis: int) -> OperationError:
    return OperationError(
        f"`.t`: axis {axis} of {node.describe()} counts the tokens of several rows together; give each "
        "row an invoke of its own."
    )


def _shifted(key: Any, start: int, stop: int, width: int) -> Any:
    """`key` of the tokens from `start` to `stop` as a key of the whole row, counted from its end where
    the tokens end there."""
    end = width if stop == width else 0
    if isinstance(key, int):
        return start + key % (stop - start) - end
    taken = range(start, stop)[key]
    if not taken:
        return slice(0, 0)
    last = None if taken.stop < 0 or taken.stop == end else taken.stop - end
    return slice(taken.start - end, last, taken.step)


def _source(node: Node) -> Node | None:
    """What a value comes from, along first arguments: what is at a place of the model."""
    while node.kind != READ:
        first = next(iter(arguments(node)), None)
        if first is None:
            return None
        node = first
    return node


def _origin(node: Node) -> HookPoint | None:
    """The hook point that a value comes from."""
    source = _source(node)
    return None if source is None else source.target


def _step(node: Node) -> int:
    """The forward that a value comes from."""
    point = _origin(node)
    return 0 if point is None else point.step


class Fakes:
    """Values of the nodes of one block without numbers: right structures, shapes and dtypes.

    They live on the meta device, where the skeleton is.
    """

    def __init__(
        self,
        structure: Structure,
        size: Callable[[Node], Size],
        schedule: Callable[[Node], Schedule],
    ) -> None:
        self._structure = structure
        self._size = size
        self._schedule = schedule
        self._values: dict[int, Any] = {}
        # Whose value each is: a loop's nodes make way for others when it ends, which take their
        # numbers.
        self._owners: dict[int, Node] = {}
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._interpreter = _MetaInterpreter(
            self._values,  # type: ignore[arg-type]
            self._call,
            structure.meta_parameter,
        )

    def _has(self, node: Node) -> bool:
        return self._owners.get(node.index) is node

    def value(self, node: Node) -> Any:
        """The fake value of `node`.

        Raises:
            ScheduleError: the model cannot be run fake, or never reaches that place.
        """
        waiting = [node]  # not recursive: a loop in a block makes a chain of thousands of nodes
        while waiting:
            last = waiting[-1]
            if self._has(last):
                waiting.pop()
                continue
            missing = [a for a in arguments(last) if not self._has(a)]
            if missing:
                waiting += missing
                continue
            waiting.pop()
            value = self._read(last) if last.kind == READ else self._evaluate(last)
            self._values[last.index], self._owners[last.index] = value, last
        return self._values[node.index]

    def _evaluate(self, node: Node) -> Any:
        given = (self._values[a.index] for a in arguments(node))
        unknown = next((value for value in given if type(value) is Opaque), None)
        if unknown is not None:
            return unknown  # what is computed of it has no sizes, either

        def evaluate() -> Any:
            with torch.no_grad(), self._mode:
                return self._interpreter.evaluate(node)

        try:
            with quiet():
                return uninterrupted(evaluate)
        except DynamicOutputShapeException:
            raise NotRunError.on_demand("shape", node.describe(), node.location) from None

    def _call(self, path: str, *args: Any, **kwargs: Any) -> Any:
        return self._structure.meta_module(path).forward(*args, **kwargs)

    def _read(self, node: Node) -> Any:
        hook_point: HookPoint | GradPoint = node.target
        if isinstance(hook_point, GradPoint):
            return self.value(hook_point.node)
        axes = self._schedule(node).axes(hook_point)
        if axes is None:
            raise UnreachedError.place(str(hook_point))
        batch, tokens, targets, past = self._size(node)

        def make(tensor: TensorAxes) -> Any:
            if any(axis.role == UNKNOWN for axis in tensor.axes):
                return Opaque("its axes are neither batch nor token nor fixed")
            if past is None and any(axis.role == KEY for axis in tensor.axes):
                return Opaque(_ROOM)
            sizes = [axis.size(batch, tokens, targets, past or 0) for axis in tensor.axes]
            return torch.empty(sizes, dtype=tensor.dtype, device="meta")

        def read() -> Any:
            with self._mode:
                return map_axes(make, axes)

        return uninterrupted(read)


#: Which argument of an operation is an index.
_KEYS = {GETITEM: 1, TAKE: 1, ITEM: 1, SETITEM: 1, PUT: 3, AGAIN: 3}


def _any_index(key: Any) -> Any:
    """A key with numbers in place of those that only the run tells: what they pick has the same shape.

    The ends of a slice are no such numbers.
    """
    if type(key) is tuple:
        return tuple(map(_any_index, key))
    if not isinstance(key, torch.Tensor) or key.ndim or key.is_floating_point():
        return key
    return key if key.dtype == torch.bool else 0


class _MetaInterpreter(Interpreter):
    """Evaluates on the meta device; captured tensors join it there."""

    __slots__ = ()

    def resolve(self, node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().resolve(node)
        at = _KEYS.get(node.target) if node.kind == CALL else None
        if at is None:
            return args, kwargs
        return (*args[:at], _any_index(args[at]), *args[at + 1 :]), kwargs

    def _captured(self, node: Node, captured: Captured) -> torch.Tensor:
        return torch.empty_like(captured.tensor, device="meta")

    def _later(self, node: Node, later: Later) -> Any:
        source = later.source
        value = later.value() if source is None or source.oracle is None else None
        if value is None:
            value = source.ask().value(later.node)  # fake, and of another mode

        def shape(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return torch.empty(tuple(leaf.shape), dtype=leaf.dtype, device="meta")

        return map_leaves(shape, value)
