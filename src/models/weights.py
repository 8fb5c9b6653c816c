"""Owns weights under unified names, in one orientation everywhere, read and written in place.

A weight is a view of its parameter: `layer["attn.W_Q"][:, :10] = 0` changes the model. Where a layout
has no view (queries of grouped projections), the copy that is given writes itself back. A weight that
the forward computes of others (quantized, pruned, with an adapter) is a copy that cannot be written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

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
    """True for modules whose weight is [d_out, d_in].

    Of classes that torch does not have, it is told by what they make of a vector.
    """
    if isinstance(module, torch.nn.Linear):
        return True
    owner = _owner(module, "weight")
    if owner is not None and owner is not module:
        return is_linear(owner)
    if isinstance(module, torch.nn.Embedding) or module._modules or owner is None:
        return False
    if type(module) not in _turned:
        _turned[type(module)] = _turns(module)
    return _turned[type(module)]


#: Of classes that were tried: whether their weight is [d_out, d_in].
_turned: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def _turns(module: torch.nn.Module) -> bool:
    """Try a copy whose weight is 0 but for the row 0 of the column 1: x₁ → y₀ if rows are outputs."""
    weight = module.weight
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or min(weight.shape) < 2:
        return False
    try:
        trial = copy.deepcopy(module).to_empty(device="cpu").float().eval()
        with torch.no_grad():
            for tensor in (*trial.parameters(), *trial.buffers()):
                tensor.zero_()
            trial.weight[0, 1] = 1  # type: ignore[operator]
            given = torch.zeros(1, 1, weight.shape[1])
            given[..., 1] = 1
            result = trial.forward(given)
    except Exception:  # whatever it says to such an input: it is no linear
        return False
    fits = isinstance(result, torch.Tensor) and result.shape == (1, 1, weight.shape[0])
    return bool(fits and result[0, 0, 0] == 1)


def _owner(module: torch.nn.Module, name: str) -> torch.nn.Module | None:
    """The module, this or one inside, that has the parameter which is given as `name` of this one; None
    if no module has it, as it is computed."""
    if name in module._parameters or name in module._buffers:
        return module
    value = getattr(module, name, None)
    return next((c for c in module.modules() if c._parameters.get(name) is value), None)


def used_weight(module: torch.nn.Module, name: str) -> tuple[torch.Tensor, str]:
    """A weight with which a module's forward computes, in the layout of its parameter.

    Returns:
        The parameter itself and ""; or numbers computed of it, and why these cannot be written.

    Raises:
        UnavailableNameError: the module does not compute with one weight.
    """
    owner = _owner(module, name)
    if owner is None:
        _renew(module, name)
        value: Any = getattr(module, name)
        return value, "is computed anew for each forward, by pruning or a parametrization"
    if owner is not module:
        if _does_the_same(module, owner):
            return used_weight(owner, name)
        return _probed(module, owner, name), "has an adapter that is not merged"
    numbers = dequantized(module, name)
    if numbers is not None:
        return numbers, "is quantized"
    return getattr(module, name), ""


def _renew(module: torch.nn.Module, name: str) -> None:
    """Let torch's own hooks (pruning, norms of weights) compute an attribute, as before a forward."""
    if module.training:
        return  # some take a step each time
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            hook(module, ())


def _floating(module: torch.nn.Module) -> tuple[torch.dtype, torch.device]:
    """What to compute with to try a module."""
    every = list(module.parameters())
    dtype = next((p.dtype for p in every if p.is_floating_point()), torch.float32)
    place = next((p.device for p in every if not p.is_meta), torch.device("cpu"))
    return dtype, place


def _width(module: torch.nn.Module, owner: torch.nn.Module) -> int:
    width = getattr(owner, "in_features", None)
    return int(width or owner.weight.shape[1 if is_linear(owner) else 0])  # type: ignore[index]


def _does_the_same(module: torch.nn.Module, owner: torch.nn.Module) -> bool:
    """True for a module that gives what the one inside it gives: an adapter that is merged or off."""
    given = _examples(module, owner)
    with torch.no_grad():
        return torch.equal(module.forward(given), owner.forward(given))


def _examples(module: torch.nn.Module, owner: torch.nn.Module) -> torch.Tensor:
    """Random inputs of a module; the same each time."""
    dtype, device = _floating(module)
    draws = torch.Generator().manual_seed(0)
    if isinstance(owner, torch.nn.Embedding):
        return torch.randint(owner.num_embeddings, (4,), generator=draws).to(device)
    return torch.randn(4, _width(module, owner), generator=draws).to(device, dtype)


def _probed(module: torch.nn.Module, owner: torch.nn.Module, name: str) -> torch.Tensor:
    """Weight or bias of a linear map, from what it makes of unit vectors and of 0; rows of a table."""
    dtype, device = _floating(module)
    if isinstance(owner, torch.nn.Embedding):
        return module.forward(torch.arange(owner.num_embeddings, device=device))  # type: ignore[no-any-return]
    width = _width(module, owner)
    zero = module.forward(torch.zeros(1, width, dtype=dtype, device=device))
    if name == "bias":
        return zero[0]  # type: ignore[no-any-return]
    weight = module.forward(torch.eye(width, dtype=dtype, device=device)) - zero
    with torch.no_grad():
        given = _examples(module, owner)
        result = module.forward(given)
        error = float((given @ weight + zero - result).abs().max())
        size = float(result.abs().max())
    if not error <= size * (1e-3 if dtype.itemsize >= 4 else 5e-2):
        raise UnavailableNameError(
            f"{type(module).__name__} has no one `{name}`: what it gives is no linear map of what it "
            f"takes (off by {error / max(size, 1e-30):.0e} of it), as with dropout while training."
        )
    found: torch.Tensor = weight.T if is_linear(owner) else weight
    return found


def dequantized(module: torch.nn.Module, name: str = "weight") -> torch.Tensor | None:
    """The numbers of a quantized weight; None for one that is not quantized."""
    parameter: Any = getattr(module, name, None)
    kind = type(parameter).__name__
    if kind == "Params4bit":
        return _four_bits(module, parameter)
    if kind == "Int8Params":
        state: Any = getattr(module, "state", None)
        scale = parameter.SCB if parameter.SCB is not None else getattr(state, "SCB", None)
        rows = parameter.data if parameter.dtype == torch.int8 else getattr(state, "CB", None)
        if scale is not None and rows is not None:
            result: torch.Tensor = rows.float() * (scale.float() / 127.0).unsqueeze(1)
            return result
        return None
    own = getattr(type(parameter), "dequantize", None)
    if isinstance(parameter, torch.Tensor) and own is not torch.Tensor.dequantize:
        found: torch.Tensor = parameter.dequantize()  # quanto's and torchao's
        return found
    return None


def _four_bits(module: Any, parameter: Any) -> torch.Tensor | None:
    """The numbers of a weight of bitsandbytes' Linear4bit, the same before and after its first forward.

    On a CPU that computes in bf16, that forward packs the weight anew, for good: 32 rows together, and
    the scales of its blocks rounded to bf16.
    Source: bitsandbytes/functional.py, _convert_weight_packed_for_cpu.
    """
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise

    state = parameter.quant_state
    if state is None:
        return None
    packed = getattr(state, "packing_format_for_cpu", False)
    will_be = parameter.is_cpu and getattr(module, "support_avx512bf16_for_cpu", False)
    if not packed and not will_be:
        found: torch.Tensor = dequantize_4bit(parameter.data, state)
        return found
    rows, columns = state.shape
    codes = parameter.data.view(torch.uint8)
    if packed:
        codes = codes.reshape(-1, 32)
        codes = torch.cat([codes & 0xF, codes >> 4], -1).reshape(rows // 32, columns // 2, 32, 2)
        codes, scales = codes.transpose(-3, -2), state.absmax.T
    else:
        codes, scales = codes.reshape(-1, 1), state.absmax
        codes = torch.cat([codes >> 4, codes & 0xF], -1)
        if state.nested:
            scales = dequantize_blockwise(scales, state.state2) + state.offset
    numbers = state.code[codes.reshape(-1).int()].reshape(-1, state.blocksize)
    numbers = numbers * scales.reshape(-1, 1).to(torch.bfloat16).float()
    result: torch.Tensor = numbers.reshape(rows, columns)
    return result.to(state.original_dtype if packed else state.dtype)


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
        owned: Any = module._parameters.get(weight.parameter)
        if owned is not None and owned.is_meta:
            place = f"{self.path(name)}.{weight.parameter}"
            parameter, reason = self._model.parameter(place), "is offloaded"
        else:
            with torch.no_grad():
                parameter, reason = used_weight(module, weight.parameter)
        parameter = parameter.detach()
        if reason:
            reason = f"`{name}` {reason}: what is read is a copy, and it cannot be written."
            return _held(oriented(module, weight, parameter, sizes).clone(), None, reason)
        found: torch.Tensor = oriented(module, weight, parameter, sizes)
        if shares(found, parameter):
            return found
        positions = torch.arange(parameter.numel(), device=parameter.device)
        positions = oriented(module, weight, positions.view(parameter.shape), sizes)
        own = found.clone()
        return _held(own, (own, parameter, positions), "")

    def __setitem__(self, name: str, value: Any) -> None:
        """Write a whole weight: a tensor of its shape, or one number for all of it, as torch does."""
        found = self[name]
        try:
            given = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            given = None
        if given is None or (given.ndim and tuple(given.shape) != tuple(found.shape)):
            raise ShapeError.weight(name, found.shape, value, given)
        found[...] = given.to(found.device, found.dtype)

    def __delitem__(self, name: str) -> None:
        raise OperationError(f"`{name}` cannot be taken out of the model: set it to 0.")

    def __repr__(self) -> str:
        return f"<weights of {self._prefix or self._kind}: {', '.join(self)}>"
