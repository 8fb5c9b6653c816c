"""Owns the policies that stay: each one class, its parameters, and the function that it applies."""

from __future__ import annotations

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
        """Another one whenever something has changed."""
        found = tuple((id(p), p._version, p.requires_grad) for p in self.parameters())
        return (id(self), self.active, found)

    def reset(self) -> None:
        """Back to what changes nothing."""
        raise NotImplementedError

    def _fit(self, value: Any, *before: int) -> torch.Tensor:
        """A tensor in the shape of a parameter; flattened heads are unflattened."""
        tensor = torch.as_tensor(value).detach().float()
        wanted = (*before, *self.shape)
        if tensor.numel() != torch.Size(wanted).numel():
            raise ShapeError(
                f"`{self.kind}` takes {list(wanted)}, and {list(tensor.shape)} was given"
            )
        return tensor.reshape(wanted)

    def _set(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(value.to(parameter))

    def extra_repr(self) -> str:
        return f"shape={list(self.shape)}, active={self.active}"


class Mask(Policy):
    """value · m + offset · (1 − m), m = step(param > 0)."""

    kind = "mask"

    def __init__(self, shape: tuple[int, ...], mask_fn: Any = "step") -> None:
        super().__init__(shape)
        self.mask_fn = mask_fn
        functions.mask_function(mask_fn)
        self.param = nn.Parameter(torch.ones(shape), requires_grad=False)
        self.offset = nn.Parameter(torch.zeros(shape), requires_grad=False)

    @property
    def active(self) -> bool:
        if self.param.requires_grad or self.offset.requires_grad or self.mask_fn != "step":
            return True
        return not bool((self.param > 0).all())

    @property
    def mask(self) -> torch.Tensor:
        """What values are multiplied by, [*d]."""
        found: torch.Tensor = functions.mask_function(self.mask_fn)(self.param)
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
        self._set(self.param, torch.ones(self.shape))
        self._set(self.offset, torch.zeros(self.shape))


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


class Offset(Shift):
    """value + param."""

    kind = "offset"


class Unoffset(Shift):
    """value − the parameter of the `offset` of the same place."""

    kind = "unoffset"

    def share(self, other: Shift) -> None:
        self.param = other.param

    def forward(self, value: Any) -> Any:
        return functions.unoffset(value, self.param)


class Counted(Policy):
    """A policy of single tokens.

    Attributes:
        tokens_seen: the number of a block's first token. With `autorestart`, each block begins with 0.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.tokens_seen = 0
        self.autorestart = True

    def restart(self) -> None:
        """Count from 0 again."""
        self.tokens_seen = 0

    def _first(self) -> int:
        if self.autorestart:
            self.tokens_seen = 0
        return self.tokens_seen

    def state_key(self) -> tuple[Any, ...]:
        return (*super().state_key(), self._first())

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
        return functions.actadd(value, self.param[self._first() :])

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
        self._set_up = False
        size = torch.Size(shape).numel()
        self.offset = nn.Parameter(torch.zeros(shape), requires_grad=False)
        # The identity is only made when there is something to rotate.
        self.rotate = nn.Parameter(torch.zeros(0, size), requires_grad=False)
        self.rotate_inv = nn.Parameter(torch.zeros(0, size), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(size), requires_grad=False)

    @property
    def active(self) -> bool:
        return self._set_up

    def set_whitening(self, offset: Any, rotate: Any, scale: Any, rotate_inv: Any = None) -> None:
        """Set what is added [*d], the rotation [n, n] and the scale [n]; the inverse of the rotation is
        computed where it is not given."""
        size = torch.Size(self.shape).numel()
        rotate, scale = torch.as_tensor(rotate).float(), torch.as_tensor(scale).float()
        if tuple(rotate.shape) != (size, size) or tuple(scale.shape) != (size,):
            raise ShapeError(
                f"whitening {list(self.shape)} takes a rotation [{size}, {size}] and a scale [{size}], "
                f"not {list(rotate.shape)} and {list(scale.shape)}"
            )
        inverse = torch.linalg.pinv(rotate) if rotate_inv is None else torch.as_tensor(rotate_inv)
        self._set(self.offset, self._fit(offset))
        self._set(self.scale, scale)
        self.rotate = nn.Parameter(rotate.detach().clone(), requires_grad=False)
        self.rotate_inv = nn.Parameter(inverse.detach().float().clone(), requires_grad=False)
        self._set_up = True

    def forward(self, value: Any) -> Any:
        return functions.whiten(value, self.offset, self.rotate, self.scale)

    def reset(self) -> None:
        self._set_up = False


class Unwhiten(Policy):
    """The inverse of the `whiten` of the same place."""

    kind = "unwhiten"

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self._of: list[Whiten] = []  # a list, so that it is no submodule

    def share(self, other: Whiten) -> None:
        self._of = [other]

    @property
    def active(self) -> bool:
        return bool(self._of) and self._of[0].active

    def state_key(self) -> tuple[Any, ...]:
        return (*super().state_key(), *(one.state_key() for one in self._of))

    def forward(self, value: Any) -> Any:
        if not self._of:
            raise OperationError("`unwhiten` needs a `whiten` at the same place")
        of = self._of[0]
        return functions.unwhiten(value, of.offset, of.rotate_inv, of.scale)

    def reset(self) -> None:
        pass


class Collected(Series):
    """Where the values of the last block arrive, with the prompt that each is of."""

    __slots__ = ("_block", "invokes")

    def __init__(self) -> None:
        super().__init__()
        self.invokes: list[int] = []
        self._block = -1

    def part(self, number: int, block: int, invoke: int | None) -> Box:
        if block != self._block:
            self.clear()
            self._block = block
        self.invokes.append(invoke or 0)
        return super().part(number, block, invoke)

    def clear(self) -> None:
        """Let go of what was kept."""
        self.parts.clear()
        self.invokes.clear()


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
        for box, invoke in zip(self.parts.parts, self.parts.invokes, strict=True):
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
