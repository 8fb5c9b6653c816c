"""Owns the policies that stay: each one class, its parameters, and the function that it applies."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from ..tracing.errors import InputError, OperationError, ShapeError
from ..tracing.graph import Box, Series
from . import functions


class Policy(nn.Module):
    """A function of the value at one place of one layer, applied in every block.

    Its parameters are `nn.Parameter`s: saved, moved and, with `requires_grad_()`, trained.

    Attributes:
        shape: of a value without batch and token, [*d].
    """

    kind = ""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    @property
    def active(self) -> bool:
        """False while it changes nothing."""
        return True

    def state_key(self) -> tuple[Any, ...]:
        """Another one whenever something has changed but the numbers, which a run takes as they are
        then."""
        found = tuple((id(p), p.requires_grad) for p in self.parameters())
        return (id(self), self.active, found)

    def undo(self, value: Any) -> Any:
        """What gives back the value that `forward` was given."""
        raise NotImplementedError

    def reset(self) -> None:
        """Back to what changes nothing."""
        raise NotImplementedError

    def _fit(self, value: Any, *before: int) -> torch.Tensor:
        """A tensor in the shape of a parameter; flattened heads are unflattened."""
        tensor = _numbers(value)
        wanted = (*before, *self.shape)
        if tensor.numel() != torch.Size(wanted).numel():
            raise ShapeError(
                f"`{self.kind}` takes {list(wanted)}, and {list(tensor.shape)} was given"
            )
        return tensor.reshape(wanted)

    def _set(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(value.to(parameter))

    def load(self, name: str, value: torch.Tensor) -> None:
        """Set one of the parameters, which stays the same object."""
        parameter = self.get_parameter(name)
        if parameter.shape != value.shape:
            raise ShapeError(
                f"`{name}` of `{self.kind}` is {list(parameter.shape)}, and {list(value.shape)} was "
                "given"
            )
        self._set(parameter, value)

    def _untrain(self) -> None:
        """No parameter asks for gradients any more."""
        self.requires_grad_(False).zero_grad()

    def extra_repr(self) -> str:
        return f"shape={list(self.shape)}, active={self.active}"


def _numbers(value: Any) -> torch.Tensor:
    """Floating numbers in single precision at least, without a gradient."""
    tensor = torch.as_tensor(value).detach()
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class Mask(Policy):
    """value · m + offset · (1 − m), m = step(param > 0).

    Attributes:
        mask_fn: "step", "sigmoid", "tanh", "relu", or a function of the parameter.
    """

    kind = "mask"

    def __init__(self, shape: tuple[int, ...], mask_fn: Any = "step") -> None:
        super().__init__(shape)
        functions.check_mask(mask_fn)
        self.mask_fn = mask_fn
        self.param = nn.Parameter(torch.ones(shape), requires_grad=False)
        self.offset = nn.Parameter(torch.zeros(shape), requires_grad=False)

    @property
    def active(self) -> bool:
        if self.param.requires_grad or self.offset.requires_grad or self.mask_fn != "step":
            return True
        return not bool((self.param > 0).all())

    def state_key(self) -> tuple[Any, ...]:
        return (*super().state_key(), self.mask_fn)

    @property
    def mask(self) -> torch.Tensor:
        """What values are multiplied by, [*d]."""
        functions.check_mask(self.mask_fn)
        kind = self.mask_fn
        found: torch.Tensor = (
            kind(self.param) if callable(kind) else functions.MASKS[kind](self.param)
        )
        return found

    def forward(self, value: Any) -> Any:
        return functions.mask(value, self.param, self.offset, self.mask_fn)

    def set_mask(self, mask: Any) -> None:
        """Set the parameter: 1 keeps a neuron, 0 masks it."""
        self._set(self.param, self._fit(mask))

    def set_offset(self, offset: Any) -> None:
        """What masked neurons get, [*d]."""
        self._set(self.offset, self._fit(offset))

    def delete_neurons(self, remove_indices: Any = None, keep_indices: Any = None) -> None:
        """Mask neurons, beside those that are masked already.

        Args:
            remove_indices: true for each that goes, [*d].
            keep_indices: instead, true for each that stays.
        """
        if (remove_indices is None) == (keep_indices is None):
            raise InputError("give remove_indices or keep_indices, one of them")
        keep = (
            self._fit(keep_indices) if keep_indices is not None else 1 - self._fit(remove_indices)
        )
        self._set(self.param, self.param * keep.to(self.param))

    def reset(self) -> None:
        self._modules.pop("mask_fn", None)
        self.mask_fn = "step"
        self._set(self.param, torch.ones(self.shape))
        self._set(self.offset, torch.zeros(self.shape))
        self._untrain()


class Shift(Policy):
    """A vector that is added: `postbias` and `offset`; `unoffset` takes that of `offset` away."""

    kind = "postbias"

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.param = nn.Parameter(torch.zeros(shape), requires_grad=False)

    @property
    def active(self) -> bool:
        return self.param.requires_grad or bool((self.param != 0).any())

    def forward(self, value: Any) -> Any:
        return functions.postbias(value, self.param)

    def set_offset(self, offset: Any) -> None:
        """The vector, [*d]."""
        self._set(self.param, self._fit(offset))

    set_bias = set_offset

    def reset(self) -> None:
        self._set(self.param, torch.zeros(self.shape))
        self._untrain()


class Offset(Shift):
    """value + param."""

    kind = "offset"

    def undo(self, value: Any) -> Any:
        return functions.unoffset(value, self.param)


class Paired(Policy):
    """What takes back what another policy of the same place does, with the parameters of that one."""

    #: Whose inverse it is.
    inverse_of = ""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self._of: list[Policy] = []  # a list, so that it is no submodule

    def share(self, other: Policy) -> None:
        """Be the inverse of this one."""
        self._of = [other]

    @property
    def active(self) -> bool:
        return bool(self._of) and self._of[0].active

    def state_key(self) -> tuple[Any, ...]:
        return (*super().state_key(), *(one.state_key() for one in self._of))

    def forward(self, value: Any) -> Any:
        if not self._of:
            raise OperationError(f"`{self.kind}` needs a `{self.inverse_of}` at the same place")
        return self._of[0].undo(value)

    def reset(self) -> None:
        pass


class Unoffset(Paired):
    """value − the parameter of the `offset` of the same place."""

    kind, inverse_of = "unoffset", "offset"

    @property
    def param(self) -> torch.Tensor:
        """That of the `offset`."""
        return self._of[0].get_parameter("param")


class Counts(Series):
    """Where the numbers of tokens of a block arrive."""

    __slots__ = ("_block",)

    def __init__(self) -> None:
        super().__init__()
        self._block = -1

    def part(self, number: int, block: int, invoke: int | None) -> Box:
        if block != self._block:
            self.parts, self._block = [], block
        return super().part(number, block, invoke)

    def take(self) -> int:
        """Those of the longest prompt of a block that has run; the next time, 0."""
        found = max((box.value for box in self.parts if box.full), default=0)
        if found:
            self.parts = []
        return found


class Counted(Policy):
    """A policy of single tokens.

    Attributes:
        autorestart: count the tokens of each block from 0. Else a block goes on where the one before
            it ended, with the tokens of its longest prompt.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self._seen = 0
        self.autorestart = True
        self.counts = Counts()

    @property
    def tokens_seen(self) -> int:
        """The number of the next block's first token."""
        self._seen += self.counts.take()
        return self._seen

    @tokens_seen.setter
    def tokens_seen(self, count: int) -> None:
        self.counts.take()
        self._seen = count

    def restart(self) -> None:
        """Count from 0 again."""
        self.tokens_seen = 0

    def _first(self) -> int:
        if self.autorestart:
            self.tokens_seen = 0
        return self.tokens_seen

    def state_key(self) -> tuple[Any, ...]:
        return (*super().state_key(), self._first(), self.autorestart)

    def _index(self, token_index: int) -> int:
        if token_index < 0:
            raise InputError(f"token {token_index}: tokens are counted from the first one, 0")
        return int(token_index)


class ActAdd(Counted):
    """Vectors that are added to the first tokens of each prompt: `param` [token, *d]."""

    kind = "actadd"

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.param = nn.Parameter(torch.zeros(0, *shape), requires_grad=False)

    @property
    def active(self) -> bool:
        return self.param.shape[0] > 0

    def forward(self, value: Any) -> Any:
        return functions.actadd(value, self.param, self._first())

    def add_token(self, token_index: int, value: Any) -> None:
        """Add a vector [*d] to what this token gets."""
        index, vector = self._index(token_index), self._fit(value)
        param = self.param.detach()
        if index >= param.shape[0]:
            more = param.new_zeros(index + 1 - param.shape[0], *self.shape)
            param = torch.cat([param, more])
        param = param.clone()
        param[index] += vector.to(param)
        self.param = nn.Parameter(param, requires_grad=self.param.requires_grad)

    def set_actadd(self, additions: Any) -> None:
        """All vectors at once, [token, *d]."""
        count = torch.as_tensor(additions).shape[0]
        given = self._fit(additions, count).to(self.param)
        self.param = nn.Parameter(given.clone(), requires_grad=self.param.requires_grad)

    def reset(self) -> None:
        self.param = nn.Parameter(self.param.detach()[:0], requires_grad=False)
        self.restart()


class Replace(Counted):
    """Vectors that take the place of single tokens' values: `param` {"index": [*d]}."""

    kind = "replace"

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.param = nn.ParameterDict()
        self.max_tokens = 0

    @property
    def active(self) -> bool:
        return len(self.param) > 0

    def state_key(self) -> tuple[Any, ...]:
        return (*super().state_key(), tuple(self.param.keys()))

    def forward(self, value: Any) -> Any:
        first = self._first()
        given = {int(key) - first: self._vector(key) for key in self.param if int(key) >= first}
        return functions.replace(value, given) if given else value

    def _vector(self, key: str) -> Any:
        vector = self.param[key]
        if vector.numel() != torch.Size(self.shape).numel():
            raise ShapeError(
                f"the replacement of token {key} is {list(vector.shape)}, and the values there are "
                f"{list(self.shape)}"
            )
        return vector

    def add_token(self, token_index: int, value: Any) -> None:
        """Replace the value of a token by a vector [*d]."""
        index = self._index(token_index)
        self.param[str(index)] = nn.Parameter(self._fit(value).clone(), requires_grad=False)
        self.max_tokens = max(self.max_tokens, index + 1)

    def reset(self) -> None:
        self.param.clear()
        self.max_tokens = 0
        self.restart()


class Whiten(Policy):
    """rotate · flatten(value + offset) · scale."""

    kind = "whiten"

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        size = torch.Size(shape).numel()
        self.offset = nn.Parameter(torch.zeros(shape), requires_grad=False)
        # The identity is only made when there is something to rotate.
        self.rotate = nn.Parameter(torch.zeros(0, size), requires_grad=False)
        self.rotate_inv = nn.Parameter(torch.zeros(0, size), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(size), requires_grad=False)

    @property
    def active(self) -> bool:
        return self.rotate.shape[0] > 0

    def set_whitening(self, offset: Any, rotate: Any, scale: Any, rotate_inv: Any = None) -> None:
        """Set what is added [*d], the rotation [n, n] and the scale [n]; the inverse of the rotation is
        computed where it is not given."""
        size = torch.Size(self.shape).numel()
        rotate, scale = _numbers(rotate), _numbers(scale)
        if tuple(rotate.shape) != (size, size) or tuple(scale.shape) != (size,):
            raise ShapeError(
                f"whitening {list(self.shape)} takes a rotation [{size}, {size}] and a scale [{size}], "
                f"not {list(rotate.shape)} and {list(scale.shape)}"
            )
        inverse = torch.linalg.pinv(rotate) if rotate_inv is None else _numbers(rotate_inv)
        if inverse.shape != rotate.shape:
            raise ShapeError(
                f"the inverse of a rotation {list(rotate.shape)} is {list(inverse.shape)}"
            )
        self._set(self.offset, self._fit(offset))
        self._set(self.scale, scale)
        self._rotate_by(rotate, inverse)

    def load(self, name: str, value: torch.Tensor) -> None:
        size = self.scale.shape[0]
        if name in ("rotate", "rotate_inv") and value.shape in [(size, size), (0, size)]:
            parameter = nn.Parameter(value.detach().clone().to(self.scale), requires_grad=False)
            setattr(self, name, parameter)
        else:
            super().load(name, value)

    def _rotate_by(self, rotate: torch.Tensor, inverse: torch.Tensor) -> None:
        self.rotate = nn.Parameter(rotate.clone().to(self.scale), requires_grad=False)
        self.rotate_inv = nn.Parameter(inverse.clone().to(self.scale), requires_grad=False)

    def forward(self, value: Any) -> Any:
        return functions.whiten(value, self.offset, self.rotate, self.scale)

    def undo(self, value: Any) -> Any:
        return functions.unwhiten(value, self.offset, self.rotate_inv, self.scale)

    def reset(self) -> None:
        self._set(self.offset, torch.zeros(self.shape))
        self._set(self.scale, torch.ones_like(self.scale))
        self._rotate_by(self.rotate[:0].detach(), self.rotate_inv[:0].detach())
        self._untrain()


class Unwhiten(Paired):
    """The inverse of the `whiten` of the same place."""

    kind, inverse_of = "unwhiten", "whiten"


class Collected(Series):
    """Where the values of the last block arrive, with the prompt that each is of."""

    __slots__ = ("_block", "_lock", "found")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, Box]] = []
        self._block = -1
        self._lock = threading.Lock()

    def part(self, number: int, block: int, invoke: int | None) -> Box:
        box = Box(number)
        with self._lock:  # blocks of other threads
            if block > self._block:
                self.found, self._block = [], block
            if block == self._block:
                self.found.append((invoke or 0, box))
        return box

    def clear(self) -> None:
        """Let go of what was kept."""
        self.found = []


class Collect(Policy):
    """Keeps the values of the last block, while it is enabled.

    Attributes:
        concat: join the values of the steps of a generation along the token axis; else the last step's.
    """

    kind = "collect"

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.enabled = False
        self.concat = False
        self.parts = Collected()

    @property
    def active(self) -> bool:
        return self.enabled

    def forward(self, value: Any) -> Any:
        return value

    @property
    def activation(self) -> Any:
        """[batch, token, *d] of the last block; None before the first.

        With several prompts in a block, a list of theirs.
        """
        by_invoke: dict[int, list[Any]] = {}
        for invoke, box in list(self.parts.found):
            if box.full:
                by_invoke.setdefault(invoke, []).append(box.value)
        found = [
            torch.cat(values, 1) if self.concat else values[-1] for values in by_invoke.values()
        ]
        if not found:
            return None
        return found[0] if len(found) == 1 else found

    def enable(self, concat: bool = False) -> None:
        self.enabled, self.concat = True, concat

    def disable(self) -> None:
        self.enabled = False

    def reset(self) -> None:
        self.parts.clear()
        self.disable()


KINDS: dict[str, type[Policy]] = {
    one.kind: one
    for one in (Mask, ActAdd, Shift, Offset, Unoffset, Replace, Collect, Whiten, Unwhiten)
}
#: What takes back what another does.
INVERSE_OF = {one.kind: one.inverse_of for one in (Unoffset, Unwhiten)}
