"""Tiny modules and the reference that blocks are compared with: plain torch hooks."""

import dataclasses
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from graftwork import LanguageModel, Model

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Record:
    hidden: torch.Tensor
    note: str


class Parts(nn.Module):
    """Returns its input in every kind of container."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> Any:
        other = x * 2 + 1
        if self.kind == "tuple":
            return x.clone(), other
        if self.kind == "list":
            return [x.clone(), other]
        if self.kind == "dict":
            return {"hidden": x.clone(), "other": other}
        if self.kind == "named":
            return Pair(x.clone(), other)
        if self.kind == "nested":
            return x.clone(), {"deep": [other, None]}
        return Record(x.clone(), "as it is")


def first_part(value: Any) -> torch.Tensor:
    if isinstance(value, dict):
        return value["hidden"]
    return value.hidden if isinstance(value, Record) else value[0]


class Toy(nn.Module):
    """[batch, 5, 8] → [batch, 5, 8] through layers that return tensors and containers."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(8, 8)
        self.tup = Parts("tuple")
        self.lis = Parts("list")
        self.dic = Parts("dict")
        self.nam = Parts("named")
        self.nes = Parts("nested")
        self.rec = Parts("record")
        self.mid = nn.Linear(8, 8)
        self.act = nn.ReLU(inplace=True)
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for name in ("tup", "lis", "dic", "nam", "nes", "rec"):
            x = first_part(getattr(self, name)(x))
        hidden = self.mid(x)
        return self.out(self.act(hidden)) + x


def hooked(
    module: nn.Module,
    inputs: tuple[Any, ...],
    hooks: dict[str, Callable[[Any], Any]],
    kwargs: dict[str, Any] | None = None,
) -> Any:
    """The module's result with plain forward hooks; a hook edits in place or returns a value."""
    handles = [
        module.get_submodule(path).register_forward_hook(lambda _m, _a, out, f=f: f(out))
        for path, f in hooks.items()
    ]
    try:
        with torch.no_grad():
            return module(*inputs, **(kwargs or {}))
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture
def reference() -> Callable[..., Any]:
    return hooked


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def toy() -> Iterator[Model]:
    torch.manual_seed(0)
    module = Toy()
    yield Model(module)
    left = [m for m in module.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert left == [], "hooks were left behind"


@pytest.fixture(scope="session")
def gpt2_module() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=3,
        n_embd=64,
        n_head=8,
        vocab_size=300,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def gpt2(gpt2_module: GPT2LMHeadModel) -> Iterator[LanguageModel]:
    yield LanguageModel(gpt2_module)
    left = [m for m in gpt2_module.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert left == [], "hooks were left behind"


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 300, (2, 7), generator=torch.Generator().manual_seed(2))
