"""Modules of every kind, against plain hooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, ResNetConfig, ResNetModel

from graftwork import LanguageModel, Model
from graftwork.tracing.errors import BlockError


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def hooked(
    module: nn.Module, path: str, change: Callable[[Any], Any], *args: Any, **kwargs: Any
) -> Any:
    def hook(_module: Any, _args: Any, output: Any) -> None:
        change(output)

    handle = module.get_submodule(path).register_forward_hook(hook)
    try:
        with torch.no_grad():
            return module(*args, **kwargs)
    finally:
        handle.remove()


def close(found: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.value.detach(), expected.detach(), rtol=1e-4, atol=1e-5)


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.second = nn.Conv2d(4, 5, 3)
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.pool(self.act(self.norm(self.first(x))))
        return self.head(self.second(hidden).mean((2, 3)))  # type: ignore[no-any-return]


def test_convolutions_in_a_batch_of_two_sizes() -> None:
    module = Pictures().eval()
    model: Any = Model(module)
    x, y, large = torch.randn(2, 3, 8, 8), torch.randn(1, 3, 8, 8), torch.randn(1, 3, 12, 12)
    with model.trace() as tracer:
        with tracer.invoke(x):
            model.first.output[:, 0] = 0
            first = model.head.output.save()
            before = model.norm.output.save()
        with tracer.invoke(y):
            second = model.head.output.save()
        with tracer.invoke(large):
            third = model.head.output.save()

    def change(output: torch.Tensor) -> None:
        output[:, 0] = 0

    close(first, hooked(module, "first", change, x))
    close(second, module(y))
    close(third, module(large))
    assert before.min() < 0  # what the norm gave, not what the activation made of it in place


def test_a_residual_network() -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    module = ResNetModel(config).eval()
    model: Any = Model(module)
    x = torch.randn(2, 3, 32, 32)
    with model.trace(x) as tracer:
        model.encoder.stages[0].output[:, 0] = 0
        found = tracer.output.pooler_output.save()

    def change(output: torch.Tensor) -> None:
        output[:, 0] = 0

    close(found, hooked(module, "encoder.stages.0", change, x).pooler_output)


class Sequence(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.rnn = getattr(nn, kind)(6, 7, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(14, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embed(ids))[0][:, -1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_networks(kind: str) -> None:
    module = Sequence(kind).eval()
    model: Any = Model(module)
    x, y = torch.randint(0, 11, (2, 5)), torch.randint(0, 11, (3, 5))
    with model.trace() as tracer:
        with tracer.invoke(x):
            model.rnn.output[0][:, -1, 3] = 1
            first = model.head.output.save()
        with tracer.invoke(y):
            second = model.head.output.save()
            state = model.rnn.output[1].save()

    def change(output: Any) -> None:
        output[0][:, -1, 3] = 1

    close(first, hooked(module, "rnn", change, x))
    close(second, module(y))
    # Its batch is on axis 1: this prompt's own rows.
    torch.testing.assert_close(state.value, module.rnn(module.embed(y))[1])


def test_attention_and_transformers_of_torch() -> None:
    module = nn.Transformer(8, 2, 1, 1, 16, batch_first=True).eval()
    model: Any = Model(module)
    source, target = torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    with model.trace(source, target) as tracer:
        model.encoder.layers[0].self_attn.output[0].save()
        model.encoder.output[:, 0] = 0
        found = tracer.output.save()

    def change(output: torch.Tensor) -> None:
        output[:, 0] = 0

    close(found, hooked(module, "encoder", change, source, target))


@dataclasses.dataclass
class Result:
    first: torch.Tensor
    parts: dict[str, torch.Tensor]


class Keywords(nn.Module):
    """Keywords alone, a list among them, a dataclass as result, and names of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.output = nn.Linear(4, 4)

    def forward(self, *, x: Any, scale: float = 1.0, parts: Any = ()) -> Result:
        hidden = self.linear(x) * scale + sum(parts)
        return Result(self.output(hidden), {"hidden": hidden})


def test_keywords_and_dataclasses() -> None:
    module = Keywords().eval()
    model: Any = Model(module)
    x = torch.randn(2, 4)
    with model.trace(x=x, scale=2.0, parts=[x, x]) as tracer:
        model.linear.output[:, 0] = 0
        value = tracer.output.first.save()
        hidden = tracer.output.parts["hidden"].save()
        inner = model.get("output").output.save()

    def change(output: torch.Tensor) -> None:
        output[:, 0] = 0

    expected = hooked(module, "linear", change, x=x, scale=2.0, parts=[x, x])
    close(value, expected.first)
    close(hidden, expected.parts["hidden"])
    close(inner, expected.first)


def test_submodules_that_are_called_output() -> None:
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
    )
    module = BertForMaskedLM(config).eval()
    model: Any = LanguageModel(module)
    with model.trace([3, 4, 5]) as tracer:
        layer = model.bert.encoder.layer[0]
        layer.attention.get("output.dense").output[:, -1] = 0
        whole = layer.output.save()  # what the layer gives
        last = layer.get("output").output.save()  # what the module of that name gives
        logits = tracer.output.logits.save()

    def change(output: torch.Tensor) -> None:
        output[:, -1] = 0

    ids = torch.tensor([[3, 4, 5]])
    close(logits, hooked(module, "bert.encoder.layer.0.attention.output.dense", change, ids).logits)
    torch.testing.assert_close(whole.value, last.value)


class Functional(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner, self.head, self.way = nn.Linear(4, 4), nn.Linear(4, 4), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "call":
            weights = {name: p * 2 for name, p in self.inner.named_parameters()}
            hidden = torch.func.functional_call(self.inner, weights, (x,))
        elif self.way == "vmap":
            hidden = torch.func.vmap(self.inner)(x)
        else:
            hidden = torch.func.grad(lambda z: self.inner(z).pow(2).sum())(x)
        return self.head(hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["call", "vmap", "grad"])
def test_torch_func(way: str) -> None:
    module = Functional(way)
    model: Any = Model(module)
    x = torch.randn(2, 4)
    with model.trace(x) as tracer:
        model.head.input[:, 0] = 0
        found = tracer.output.save()

    def first(_module: Any, args: Any) -> Any:
        hidden = args[0].clone()
        hidden[:, 0] = 0
        return (hidden,)

    handle = module.head.register_forward_pre_hook(first)
    close(found, module(x))
    handle.remove()
    if way == "call":
        with model.trace(x):
            inner = model.inner.output.save()
        close(inner, nn.functional.linear(x, module.inner.weight * 2, module.inner.bias * 2))
        return
    for edits in (True, False):
        with pytest.raises(BlockError, match=r"inner\.output.*torch\.func"), model.trace(x):
            if edits:
                model.inner.output[:] = 0
            model.inner.output.save()
    assert not any(child._forward_hooks for child in module.modules())


def test_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    module = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    model: Any = Model(module)
    x, y = torch.randn(2, 3, 8, 8), torch.randn(1, 3, 8, 8)
    with model.trace() as tracer:
        with tracer.invoke(x, 3):
            model.mid_block.output[:, 0] = 0
            first = tracer.output.sample.save()
        with tracer.invoke(y, 3):
            second = tracer.output.sample.save()

    def change(output: torch.Tensor) -> None:
        output[:, 0] = 0

    close(first, hooked(module, "mid_block", change, x, 3).sample)
    with torch.no_grad():
        close(second, module(y, 3).sample)
