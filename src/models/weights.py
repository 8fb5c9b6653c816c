"""Owns weights under unified names, in one orientation everywhere, read and written in place.

A weight is a view of its parameter: `layer["attn.W_Q"][:, :10] = 0` changes the model. Where a layout
has no view (queries of grouped projections), the copy that is given writes itself back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch

from ..tracing.errors import OperationError, ShapeError, UnavailableNameError
from .architectures import Weight


class CopiedWeight(torch.Tensor):
    """A copy of a part of a parameter: what is written into it, or a view of it, is written there.

    Attributes:
        home: the whole copy, the parameter, and the position in it of each of the copy's elements;
            None for weights that cannot be written.
        reason: why they cannot.
    """

    home: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    reason: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        writes = name == "__setitem__" or (
            name.endswith("_") and not name.endswith("__") and not name.startswith("_")
        )
        given = [*args, *kwargs.values()]
        written = given[0] if writes and given else kwargs.get("out")
        held = next((a for a in given if isinstance(a, CopiedWeight)), None)
        if isinstance(written, CopiedWeight) and written.home is None:
            raise OperationError(written.reason)

        def plain(value: Any) -> Any:
            return value.as_subclass(torch.Tensor) if isinstance(value, cls) else value

        with torch._C.DisableTorchFunctionSubclass():
            options = {key: plain(value) for key, value in kwargs.items()}
            if not isinstance(written, CopiedWeight):
                result = func(*map(plain, args), **options)
                return result if held is None or writes else _views(result, held)
            with torch.no_grad():
                func(*map(plain, args), **options)
                assert written.home is not None
                copy, parameter, positions = written.home
                parameter.view(-1)[positions.reshape(-1)] = copy.reshape(-1)
        return written


def _augmented(method: str) -> Any:
    def change(self: CopiedWeight, other: Any) -> Any:
        return getattr(self, method)(other)

    return change


# Torch's own take any TypeError for "not implemented", and `w += 1` would then make a new tensor.
for _operator, _method in (
    ("__iadd__", "add_"),
    ("__isub__", "sub_"),
    ("__imul__", "mul_"),
    ("__itruediv__", "div_"),
    ("__ifloordiv__", "floor_divide_"),
    ("__imod__", "remainder_"),
    ("__ipow__", "pow_"),
):
    setattr(CopiedWeight, _operator, _augmented(_method))


def _views(result: Any, held: CopiedWeight) -> Any:
    """What shows the memory of a copy is as bound to its home as the copy."""
    if isinstance(result, (tuple, list)) and type(result) in (tuple, list):
        return type(result)(_views(part, held) for part in result)
    if isinstance(result, torch.Tensor) and shares(result, held):
        return _held(result, held.home, held.reason)
    return result


def shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if both show the same memory."""
    return torch._C._is_alias_of(one, other)  # type: ignore[attr-defined, no-any-return]


def _held(tensor: torch.Tensor, home: Any, reason: str) -> CopiedWeight:
    found: CopiedWeight = tensor.as_subclass(CopiedWeight)
    found.home, found.reason = home, reason
    return found


def is_linear(module: torch.nn.Module) -> bool:
    """True for modules whose weight is [d_out, d_in]."""
    return isinstance(module, torch.nn.Linear) or type(module).__name__ in (
        "Linear4bit",
        "Linear8bitLt",
    )


def dequantized(module: torch.nn.Module, name: str = "weight") -> torch.Tensor | None:
    """The numbers of a quantized weight; None for one that is not quantized."""
    parameter: Any = getattr(module, name, None)
    kind = type(parameter).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        if parameter.quant_state is not None:
            found: torch.Tensor = dequantize_4bit(parameter.data, parameter.quant_state)
            return found
    if kind == "Int8Params":
        state: Any = getattr(module, "state", None)
        scale = parameter.SCB if parameter.SCB is not None else getattr(state, "SCB", None)
        rows = parameter.data if parameter.dtype == torch.int8 else getattr(state, "CB", None)
        if scale is not None and rows is not None:
            result: torch.Tensor = rows.float() * (scale.float() / 127.0).unsqueeze(1)
            return result
    return None


def oriented(module: torch.nn.Module, weight: Weight, parameter: Any, sizes: Any) -> Any:
    """A parameter in the orientation of its unified name."""
    if weight.parameter == "weight" and is_linear(module):
        parameter = parameter.T
    return parameter if weight.view is None else weight.view(parameter, sizes)


class Weights(MutableMapping[str, torch.Tensor]):
    """Weights by unified name: of a layer, or the model's own.

    Args:
        model: the model, which is loaded when a weight is read.
        table: where each is.
        prefix: of the paths in the table.
    """

    def __init__(self, model: Any, table: Mapping[str, Weight], prefix: str, kind: str) -> None:
        self._model = model
        self._table = table
        self._prefix = prefix
        self._kind = kind

    def path(self, name: str) -> str:
        """Path of the module that has a weight."""
        weight = self._table[name]
        return ".".join(part for part in (self._prefix, weight.path) if part)

    def _module(self, name: str, tree: torch.nn.Module) -> torch.nn.Module | None:
        try:
            return tree.get_submodule(self.path(name))
        except AttributeError:
            return None

    def has(self, name: str, tree: torch.nn.Module) -> bool:
        module = self._module(name, tree)
        return module is not None and getattr(module, self._table[name].parameter, None) is not None

    def __contains__(self, name: object) -> bool:
        return name in self._table and self.has(str(name), self._model.module_tree())

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._table if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self:
            if name in self._table:
                raise UnavailableNameError.missing(
                    name, self._kind, "the module that would hold it has no such parameter"
                )
            raise UnavailableNameError.weight(name, self._kind, self)
        root = self._model.load()
        module = self._module(name, root)
        assert module is not None
        weight, sizes = self._table[name], self._model.cfg
        numbers = dequantized(module, weight.parameter)
        if numbers is not None:
            reason = f"`{name}` is quantized: what is read is a copy, and it cannot be written."
            return _held(oriented(module, weight, numbers, sizes), None, reason)
        parameter = getattr(module, weight.parameter).detach()
        if parameter.is_meta:
            place = f"{self.path(name)}.{weight.parameter}"
            reason = f"`{name}` is offloaded: what is read is a copy, and it cannot be written."
            return _held(
                oriented(module, weight, self._model.parameter(place), sizes), None, reason
            )
        found: torch.Tensor = oriented(module, weight, parameter, sizes)
        if shares(found, parameter):
            return found
        positions = torch.arange(parameter.numel(), device=parameter.device)
        positions = oriented(module, weight, positions.view(parameter.shape), sizes)
        copy = found.clone()
        return _held(copy, (copy, parameter, positions), "")

    def __setitem__(self, name: str, value: Any) -> None:
        found = self[name]
        value = torch.as_tensor(value)
        if value.ndim and tuple(value.shape) != tuple(found.shape):
            raise ShapeError(
                f"`{name}` has the shape {list(found.shape)}, and {list(value.shape)} was given"
            )
        found[...] = value.to(found.device, found.dtype)

    def __delitem__(self, name: str) -> None:
        raise OperationError(f"`{name}` cannot be taken out of the model: set it to 0.")

    def __repr__(self) -> str:
        return f"<weights of {self._prefix or self._kind}: {', '.join(self)}>"
