"""What a proxy records is what torch computes: each expression is evaluated by both.

The reference is the same expression on the tensor that a plain forward hook sees.
"""

import operator
from collections.abc import Callable
from typing import Any

import einops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce, repeat
from einops.layers.torch import Rearrange as EinopsLayer
from torch import nn

import graftwork
from graftwork import LanguageModel, Model

Expression = Callable[[Any], Any]

W = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
V = torch.randn(8, generator=torch.Generator().manual_seed(4))
ARRAY = V.numpy().copy()
NUMBERS = [0.5, -1.0, 2.0, 0.0, 1.5, -0.25, 3.0, 1.0]


def capture(toy: Model, x: torch.Tensor, path: str = "mid") -> torch.Tensor:
    """The output of a module, by a plain hook."""
    found: list[torch.Tensor] = []
    module = toy.submodule(path)
    handle = module.register_forward_hook(lambda _m, _a, out: found.append(out.clone()))
    with torch.no_grad():
        toy.load()(x)
    handle.remove()
    return found[0]


def same(found: Any, expected: Any) -> None:
    """Equal values of the same type, dtype and structure."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert torch.equal(found, expected) or torch.allclose(
            found, expected, atol=0, rtol=0, equal_nan=True
        )
    elif isinstance(expected, (tuple, list)):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            same(a, b)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            same(found[key], expected[key])
    else:
        assert found == expected


def check(toy: Model, x: torch.Tensor, expression: Expression, path: str = "mid") -> None:
    with torch.no_grad():
        expected = expression(capture(toy, x, path))
    with toy.trace(x):
        recorded = expression(getattr(toy, path).output)
        assert isinstance(recorded, graftwork.tracing.Proxy)
        recorded = recorded.save()
    same(recorded.value, expected)


ARITHMETIC = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow"]
COMPARISONS = ["eq", "ne", "lt", "le", "gt", "ge"]


@pytest.mark.parametrize("name", [*ARITHMETIC, *COMPARISONS])
@pytest.mark.parametrize("other", ["int", "float", "tensor", "scalar tensor", "proxy"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_operator(toy: Model, x: torch.Tensor, name: str, other: str, side: str) -> None:
    f = getattr(operator, name)

    def expression(h: Any) -> Any:
        h = h.abs() + 0.5
        operands = {
            "int": 2,
            "float": 1.5,
            "tensor": V.abs(),
            "scalar tensor": torch.tensor(1.25),
            "proxy": h[:, :1],
        }
        return f(h, operands[other]) if side == "left" else f(operands[other], h)

    check(toy, x, expression)


@pytest.mark.parametrize("name", ["and_", "or_", "xor", "lshift", "rshift"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_bit_operator(toy: Model, x: torch.Tensor, name: str, side: str) -> None:
    f = getattr(operator, name)
    bits = torch.tensor([1, 2, 3, 0, 1, 2, 3, 0])

    def expression(h: Any) -> Any:
        h = (h * 4).abs().long()
        return f(h, bits) if side == "left" else f(bits, h)

    check(toy, x, expression)


@pytest.mark.parametrize("name", [*ARITHMETIC, *COMPARISONS])
@pytest.mark.parametrize("side", ["left", "right"])
def test_operator_with_an_array(toy: Model, x: torch.Tensor, name: str, side: str) -> None:
    f = getattr(operator, name)
    h = capture(toy, x).abs() + 0.5
    tensor = torch.from_numpy(np.abs(ARRAY))
    expected = f(h, tensor) if side == "left" else f(tensor, h)
    with toy.trace(x):
        recorded = toy.mid.output.abs() + 0.5
        array = np.abs(ARRAY)
        recorded = (f(recorded, array) if side == "left" else f(array, recorded)).save()
    same(recorded.value, expected)


EXPRESSIONS: dict[str, Expression] = {
    "matmul": lambda h: h @ W,
    "rmatmul": lambda h: W @ h.transpose(-1, -2),
    "functions by keyword": lambda h: torch.softmax(input=h, dim=-1),
    "a method's own keyword": lambda h: h.addcdiv(h, h.abs() + 1, value=0.5),
    "matmul of proxies": lambda h: h @ h.mT,
    "array matmul": lambda h: h @ torch.as_tensor(ARRAY),
    "neg": lambda h: -h,
    "pos": lambda h: +h,
    "abs": lambda h: abs(h),
    "invert": lambda h: ~(h > 0),
    "and": lambda h: (h > 0) & (h < 1),
    "or": lambda h: (h > 0) | (h < -1),
    "xor": lambda h: (h > 0) ^ (h > 1),
    "float pow": lambda h: 2.0**h,
    "divmod parts": lambda h: (h // 2) * 2 + h % 2,
    "chain": lambda h: ((h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1e-5)) * V,
    # methods
    "norm": lambda h: h.norm(),
    "norm of an axis": lambda h: h.norm(dim=-1, keepdim=True),
    "mean": lambda h: h.mean(dim=(0, 1)),
    "sum": lambda h: h.sum(-1),
    "std": lambda h: h.std(1),
    "var": lambda h: h.var(1, unbiased=False),
    "max of all": lambda h: h.max(),
    "max of an axis": lambda h: h.max(-1),
    "max values": lambda h: h.max(-1).values,
    "max indices": lambda h: h.max(dim=-1).indices,
    "max first": lambda h: h.max(-1)[0],
    "min": lambda h: h.min(dim=1)[1],
    "amax": lambda h: h.amax(-1),
    "argmax": lambda h: h.argmax(-1),
    "topk": lambda h: h.topk(3).values,
    "topk indices": lambda h: h.topk(3, dim=-1).indices,
    "sort": lambda h: h.sort(-1, descending=True).values,
    "argsort": lambda h: h.argsort(-1),
    "softmax": lambda h: h.softmax(-1),
    "log_softmax": lambda h: h.log_softmax(dim=-1),
    "exp log": lambda h: h.exp().log(),
    "clamp": lambda h: h.clamp(min=0),
    "clamp both": lambda h: h.clamp(-0.1, 0.1),
    "relu": lambda h: h.relu(),
    "sigmoid": lambda h: h.sigmoid().tanh().sqrt(),
    "float": lambda h: h.double().float().half(),
    "to dtype": lambda h: h.to(torch.float64),
    "to like": lambda h: h.to(W),
    "to device": lambda h: h.to("cpu"),
    "type": lambda h: h.type(torch.float16),
    "bool": lambda h: h.bool().any(-1),
    "all": lambda h: (h > -10).all(),
    "long": lambda h: (h * 3).long(),
    "view": lambda h: h.view(2, -1),
    "reshape": lambda h: h.reshape(-1, 8),
    "view of a dtype": lambda h: h.view(torch.int32),
    "permute": lambda h: h.permute(2, 0, 1).contiguous(),
    "transpose": lambda h: h.transpose(0, 1),
    "T of a matrix": lambda h: h[0].T,
    "t of a matrix": lambda h: h[0].t(),
    "mT": lambda h: h.mT,
    "unsqueeze": lambda h: h.unsqueeze(1).squeeze(1),
    "expand": lambda h: h[:, :1].expand(-1, 4, -1),
    "repeat": lambda h: h.repeat(1, 2, 1),
    "repeat_interleave": lambda h: h.repeat_interleave(2, dim=0),
    "flatten": lambda h: h.flatten(1),
    "unflatten": lambda h: h.unflatten(-1, (2, 4)),
    "split": lambda h: h.split(4, dim=-1)[1],
    "chunk": lambda h: h.chunk(2, -1)[0],
    "unbind": lambda h: h.unbind(1)[2],
    "narrow": lambda h: h.narrow(1, 1, 2),
    "select": lambda h: h.select(1, -1),
    "index_select": lambda h: h.index_select(1, torch.tensor([0, 2])),
    "gather": lambda h: h.gather(-1, h.argmax(-1, keepdim=True)),
    "scatter": lambda h: h.scatter(-1, h.argmax(-1, keepdim=True), 0.0),
    "masked_fill": lambda h: h.masked_fill(h > 0, -1.0),
    "masked_select": lambda h: h.masked_select(h > 0),
    "where method": lambda h: h.where(h > 0, 0.0),
    "cumsum": lambda h: h.cumsum(1),
    "diff": lambda h: h.diff(dim=1),
    "flip": lambda h: h.flip(1),
    "roll": lambda h: h.roll(1, 1),
    "tril": lambda h: (h @ h.mT).tril(),
    "diagonal": lambda h: (h @ h.mT).diagonal(dim1=-2, dim2=-1),
    "clone": lambda h: h.clone(),
    "detach": lambda h: h.detach(),
    "new_zeros": lambda h: h.new_zeros(3, 2) + h.mean(),
    "new_full": lambda h: h.new_full((8,), 2.0) * h,
    "new_tensor": lambda h: h.new_tensor(NUMBERS) * h,
    "data": lambda h: h.data,
    "bmm": lambda h: h.bmm(h.transpose(1, 2)),
    "lerp": lambda h: h.lerp(h.flip(0), 0.25),
    "addcmul": lambda h: h.addcmul(h, h, value=0.5),
    "nonzero": lambda h: (h > 0).nonzero(),
    "unique": lambda h: (h > 0).long().unique(),
    "kthvalue": lambda h: h.kthvalue(2).values,
    "isnan": lambda h: h.isnan(),
    "size used as number": lambda h: h / h.size(-1),
    "dim used as number": lambda h: h * h.dim(),
    "numel used as number": lambda h: h * h.numel(),
    "shape used as number": lambda h: h.view(h.shape[0] * h.shape[1], h.shape[-1]),
    # torch functions
    "torch.cat": lambda h: torch.cat([h, h * 2], dim=1),
    "torch.stack": lambda h: torch.stack((h[:, 0], h[:, 1]), 1),
    "torch.cat with a tensor": lambda h: torch.cat([W[None].expand(2, -1, -1), h], dim=1),
    "torch.einsum": lambda h: torch.einsum("btd,de->bte", h, W),
    "torch.einsum tensor first": lambda h: torch.einsum("de,btd->bte", W, h),
    "torch.where": lambda h: torch.where(h > 0, h, torch.zeros_like(h)),
    "torch.where scalar": lambda h: torch.where(h > 0, h, 0.0),
    "torch.softmax": lambda h: torch.softmax(h, -1),
    "torch.topk": lambda h: torch.topk(h, 2),
    "torch.topk values": lambda h: torch.topk(h, 2).values,
    "torch.topk indices": lambda h: torch.topk(h, k=2, dim=-1).indices,
    "torch.max": lambda h: torch.max(h, dim=1).indices,
    "torch.maximum": lambda h: torch.maximum(h, V),
    "torch.sum": lambda h: torch.sum(h, dim=-1),
    "torch.norm": lambda h: torch.norm(h, dim=-1),
    "torch.linalg.norm": lambda h: torch.linalg.norm(h, dim=-1),
    "torch.linalg.vector_norm": lambda h: torch.linalg.vector_norm(h, dim=-1),
    "torch.linalg.svd": lambda h: torch.linalg.svdvals(h),
    "torch.outer": lambda h: torch.outer(h[0, 0], V),
    "torch.dot": lambda h: torch.dot(h[0, 0], V),
    "torch.matmul": lambda h: torch.matmul(h, W),
    "torch.tensordot": lambda h: torch.tensordot(h, W, dims=1),
    "torch.exp": lambda h: torch.exp(-h),
    "torch.split": lambda h: torch.split(h, 2, dim=-1)[3],
    "torch.chunk": lambda h: torch.chunk(h, 2, dim=-1)[1],
    "torch.unbind": lambda h: torch.unbind(h)[1],
    "torch.logsumexp": lambda h: torch.logsumexp(h, -1),
    "torch.allclose": lambda h: torch.isclose(h, h + 1e-9),
    "torch.gather": lambda h: torch.gather(h, 1, torch.zeros(2, 1, 8, dtype=torch.long)),
    "torch.sort": lambda h: torch.sort(h, dim=-1)[1],
    "torch.tril": lambda h: torch.tril(h),
    "torch.clamp": lambda h: torch.clamp(h, max=0.5),
    "torch.nn.init": lambda h: nn.init.ones_(h.clone()),
    "cosine similarity": lambda h: F.cosine_similarity(h, V, dim=-1),
    "F.layer_norm": lambda h: F.layer_norm(h, (8,), V, V),
    "F.gelu": lambda h: F.gelu(h, approximate="tanh"),
    "F.normalize": lambda h: F.normalize(h, dim=-1),
    "F.linear": lambda h: F.linear(h, W, bias=V),
    "F.one_hot": lambda h: F.one_hot(h.argmax(-1), 8),
    "F.pad": lambda h: F.pad(h, (1, 1)),
    "F.kl_div": lambda h: F.kl_div(h.log_softmax(-1), h.softmax(-1), reduction="batchmean"),
    "F.cross_entropy": lambda h: F.cross_entropy(h.flatten(0, 1), torch.arange(10) % 8),
    "F.mse_loss": lambda h: F.mse_loss(h, torch.zeros(2, 5, 8)),
    "F.scaled_dot_product": lambda h: F.scaled_dot_product_attention(h, h, h),
    "F.dropout": lambda h: F.dropout(h, 0.5, training=False),
    "F.embedding": lambda h: F.embedding(h.argmax(-1), W),
    # factories
    "zeros of the shape": lambda h: h + torch.zeros(h.shape),
    "ones of sizes": lambda h: h + torch.ones(h.shape[0], 1, h.shape[-1]),
    "ones of size()": lambda h: h + torch.ones(h.size()),
    "full": lambda h: h * torch.full(h.shape[-1:], 2.0),
    "arange": lambda h: h[:, torch.arange(h.shape[1] - 1)],
    "zeros_like": lambda h: torch.zeros_like(h) + h,
    "ones_like": lambda h: torch.ones_like(h[:, :1]) * h,
    "full_like": lambda h: torch.full_like(h, 7),
    "empty of dtype and device": lambda h: torch.zeros(3, dtype=h.dtype, device=h.device) + h.sum(),
    "dtype": lambda h: (h * 2).double().to(h.dtype),
    # indexing
    "integer": lambda h: h[0],
    "tuple": lambda h: h[0, -1, 3],
    "slices": lambda h: h[:, 1:-1:2, ::3],
    "ellipsis": lambda h: h[..., 0],
    "new axis": lambda h: h[:, None],
    "list": lambda h: h[:, [0, 2, 2]],
    "two lists": lambda h: h[[0, 1], [2, 3]],
    "mask": lambda h: h[h > 0],
    "captured mask": lambda h: h[:, torch.tensor([True, False, True, False, True])],
    "captured index": lambda h: h[:, torch.tensor([3, 1])],
    "scalar tensor index": lambda h: h[:, torch.tensor(2)],
    "numpy integer": lambda h: h[:, np.int64(2)],
    "numpy integer in a slice": lambda h: h[:, : np.int64(2)],
    "numpy index": lambda h: h[:, np.array([1, 0])],
    "proxy index": lambda h: h[torch.arange(2), h.sum(-1).argmax(-1)],
    "tensor indexed by proxy": lambda h: W[h.argmax(-1), :],
    "boolean True": lambda h: h[True],
    "range": lambda h: h[:, range(0, 5, 2)],
    "chained": lambda h: h[0][1:][..., ::2][-1],
    "size in index": lambda h: h[:, h.shape[1] - 1],
    # python over proxies
    "sum over chunks": lambda h: sum(c * i for i, c in enumerate(h.chunk(4, -1))),
    "unpack": lambda h: (lambda a, b: a - b)(*h.split(4, -1)),
    "unpack topk": lambda h: (lambda v, i: v * i)(*h.topk(2)),
    "unpack rows": lambda h: (lambda a, b: torch.cat([b, a]))(*h),
    "zip": lambda h: torch.stack([a @ b for a, b in zip(h[0], h[1], strict=True)]),
    "len": lambda h: h * len(h),
    "comprehension": lambda h: torch.cat([row[None] * 2 for row in h]),
    "reversed": lambda h: torch.stack(list(reversed(list(h)))),
    "sorted by position": lambda h: torch.stack(sorted(h, key=lambda _: 0)),
    "star in cat": lambda h: torch.cat([*h.unbind(1)], dim=0),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expression(toy: Model, x: torch.Tensor, name: str) -> None:
    check(toy, x, EXPRESSIONS[name])


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # torch asks a proxy for its rows
def test_tensor_is_indexed_by_proxy(toy: Model, x: torch.Tensor) -> None:
    check(toy, x, lambda h: W[h.argmax(-1)])


@pytest.mark.parametrize("side", ["left", "right"])
def test_matmul_with_an_array(toy: Model, x: torch.Tensor, side: str) -> None:
    expected = capture(toy, x)[0, :, :] @ W
    with toy.trace(x):
        h = toy.mid.output[0]
        found = (h @ W.numpy() if side == "left" else W.numpy().T @ h.T).save()
    torch.testing.assert_close(found.value, expected if side == "left" else expected.T)


def test_numbers_of_numpy(toy: Model, x: torch.Tensor) -> None:
    h = capture(toy, x)
    with toy.trace(x):
        left = (np.float32(2) * toy.mid.output - np.float64(1)).save()
        right = (toy.mid.output ** np.int64(2) > np.float32(0.5)).save()
    assert torch.equal(left.value, 2 * h - 1) and torch.equal(right.value, h**2 > 0.5)


def test_long_loop_in_a_block(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x):
        h = total = toy.mid.output
        for _ in range(1100):
            total = total + 1
        for _ in range(300):
            h[:, 0] += 1
        assert total.shape == h.shape == (2, 5, 8)
        total = total.save()
    torch.testing.assert_close(total.value, capture(toy, x) + 1100)


class SparseAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.randn(8, 16))
        self.b_enc = nn.Parameter(torch.zeros(16))
        self.W_dec = nn.Parameter(torch.randn(16, 8))
        self.register_buffer("scale", torch.tensor(2.0))

    def encode(self, h: torch.Tensor) -> torch.Tensor:
        features = F.relu((h / self.scale) @ self.W_enc + self.b_enc)
        kept = features.topk(3, dim=-1)
        return torch.zeros_like(features).scatter(-1, kept.indices, kept.values)

    def forward(self, h: torch.Tensor, *, gain: float = 1.0) -> dict[str, Any]:
        features = self.encode(h)
        return {"features": features, "out": gain * features @ self.W_dec}


def modules() -> dict[str, Callable[[Any], Any]]:
    torch.manual_seed(5)
    sae = SparseAutoencoder()
    embedding = nn.Embedding(8, 3)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    return {
        "Linear": nn.Linear(8, 3),
        "Linear without bias": nn.Linear(8, 3, bias=False),
        "LayerNorm": nn.LayerNorm(8),
        "RMSNorm": nn.RMSNorm(8),
        "GroupNorm": nn.GroupNorm(1, 5),
        "BatchNorm in eval": nn.BatchNorm1d(5).eval(),
        "Sequential": nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 8), nn.Softmax(-1)),
        "Dropout in eval": nn.Dropout(0.5).eval(),
        "Conv1d": nn.Conv1d(5, 3, 2),
        "Embedding": lambda h: embedding(h.argmax(-1)),
        "LSTM": lambda h: lstm(h)[0],
        "MultiheadAttention": lambda h: attention(h, h, h)[0],
        "TransformerEncoderLayer": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(),
        "Identity": nn.Identity(),
        "Flatten": nn.Flatten(),
        "CrossEntropyLoss": lambda h: nn.CrossEntropyLoss()(h[:, 0], torch.tensor([1, 2])),
        "ModuleList": lambda h: sum(layer(h) for layer in layers),
        "SAE": sae,
        "SAE part": lambda h: sae(h, gain=2.0)["out"],
        "SAE encode": sae.encode,
        "ReLU in place on a copy": lambda h: nn.ReLU(inplace=True)(h.clone()),
        "LayerNorm of a dtype": lambda h: nn.LayerNorm(8, dtype=torch.float64)(h.double()),
    }


torch.manual_seed(6)
lstm = nn.LSTM(8, 4, batch_first=True)
layers = nn.ModuleList([nn.Linear(8, 2) for _ in range(3)])
MODULES = modules()


@pytest.mark.parametrize("name", MODULES)
def test_foreign_module_called_on_a_proxy(toy: Model, x: torch.Tensor, name: str) -> None:
    module = MODULES[name]
    with torch.no_grad():
        expected = module(capture(toy, x))
    with toy.trace(x):
        out = module(toy.mid.output)
        found = {k: v.save() for k, v in out.items()} if isinstance(out, dict) else out.save()
    if isinstance(expected, dict):
        for key, value in expected.items():
            torch.testing.assert_close(found[key].value.detach(), value)
    else:
        torch.testing.assert_close(found.value.detach(), expected)


EINOPS: dict[str, Expression] = {
    "rearrange": lambda h: rearrange(h, "b t (head d) -> b head t d", head=2),
    "rearrange to a matrix": lambda h: rearrange(h, "b t d -> (b t) d"),
    "rearrange a copy": lambda h: rearrange(h, "b t d -> t (b d)"),
    "rearrange a list": lambda h: rearrange([h, h * 2], "n b t d -> b t n d"),
    "rearrange new axis": lambda h: rearrange(h, "b t d -> b 1 t d"),
    "reduce": lambda h: reduce(h, "b t d -> b d", "mean"),
    "reduce pairs": lambda h: reduce(h, "b t (d two) -> b t d", "max", two=2),
    "reduce prod": lambda h: reduce(h, "b t d -> t", "prod"),
    "repeat": lambda h: repeat(h, "b t d -> b t n d", n=3),
    "repeat merged": lambda h: repeat(h, "b t d -> b (n t) d", n=2),
    "einsum": lambda h: einsum(h, W, "b t d, d e -> b t e"),
    "einsum tensor first": lambda h: einsum(W, h, "d e, b t d -> b t e"),
    "pack": lambda h: einops.pack([h, h[:, 0]], "b * d")[0],
    "parse_shape": lambda h: h * einops.parse_shape(h, "b t _")["t"],
    "layer": lambda h: EinopsLayer("b t (n d) -> b n t d", n=2)(h),
    "asnumpy free": lambda h: einops.rearrange(h[0], "t d -> d t") @ h[0],
}


@pytest.mark.parametrize("name", EINOPS)
def test_einops(toy: Model, x: torch.Tensor, name: str) -> None:
    check(toy, x, EINOPS[name])


def test_einops_of_a_block_output(gpt2: LanguageModel, ids: torch.Tensor) -> None:
    with gpt2.trace(ids):
        plain = gpt2.transformer.h[1].output[0].save()
        found = rearrange(gpt2.transformer.h[1].output, "b t d -> d (b t)").save()
    assert torch.equal(found.value, plain.value.reshape(-1, 64).T)


def test_einops_of_a_saved_value_after_the_block(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x):
        h = toy.mid.output.save()
    assert torch.equal(rearrange(h, "b t d -> b (t d)"), h.value.reshape(2, -1))


@pytest.mark.parametrize("factory", ["randn", "rand", "randn_like", "new_empty"])
def test_random_factory_fed_by_a_shape(toy: Model, x: torch.Tensor, factory: str) -> None:
    with toy.trace(x):
        h = toy.mid.output
        if factory == "randn_like":
            noise = torch.randn_like(h)
        elif factory == "new_empty":
            noise = h.new_empty(h.shape).normal_()
        else:
            noise = getattr(torch, factory)(h.shape)
        toy.mid.output = h + 0 * noise
        drawn = (h * 0 + noise).save()
    assert drawn.shape == (2, 5, 8) and float(drawn.std()) > 0.1


def test_nested_containers_as_arguments_and_as_values(toy: Model, x: torch.Tensor) -> None:
    def mix(parts: Any, *, more: Any) -> Any:
        return {"sum": parts[0] + parts[1]["b"][0], "more": (more, None, 3)}

    h = capture(toy, x)
    with toy.trace(x):
        p = toy.mid.output
        out = graftwork.apply(mix, (p, {"b": [p * 2]}), more=[p[0], "text"]).save()
        total = out["sum"].sum().save()
    assert torch.equal(out.value["sum"], h + h * 2)
    assert torch.equal(out["more"][0][0], h[0]) and out["more"][0][1] == "text"
    assert out["more"][1:] == (None, 3)
    assert torch.equal(total.value, (h + h * 2).sum())


def test_keyword_called_function_belongs_to_the_user(toy: Model, x: torch.Tensor) -> None:
    def by(function: str, h: Any, value: float) -> Any:
        return h * value if function == "times" else h

    with toy.trace(x):
        found = graftwork.apply(by, function="times", h=toy.mid.output, value=2.0).save()
    assert torch.equal(found.value, capture(toy, x) * 2)


def test_parts_of_every_container_can_be_read(toy: Model, x: torch.Tensor) -> None:
    paths = ("tup", "lis", "dic", "nam", "nes", "rec")
    whole = {path: capture_any(toy, x, path) for path in paths}
    with toy.trace(x):
        a, b = toy.tup.output
        saved = {
            "tup": (a.save(), b.save()),
            "lis": [toy.lis.output[0].save(), toy.lis.output[-1].save()],
            "dic": {
                "hidden": toy.dic.output["hidden"].save(),
                "other": toy.dic.output.get("other").save(),
            },
            "nam": (toy.nam.output.first.save(), toy.nam.output[1].save()),
            "nes": toy.nes.output[1]["deep"][0].save(),
            "rec": toy.rec.output.hidden.save(),
        }
        entire = toy.nes.output.save()
        keys = list(toy.dic.output.keys())
        items = {key: value.save() for key, value in toy.dic.output.items()}
        unpacked = {**toy.dic.output}
        member = ("hidden" in toy.dic.output, "nope" in toy.dic.output)
        lengths = (len(toy.tup.output), len(toy.dic.output), len(toy.nam.output))
    assert lengths == (2, 2, 2)
    for found, expected in zip(saved["tup"], whole["tup"], strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(saved["lis"], whole["lis"], strict=True):
        assert torch.equal(found, expected)
    assert keys == list(unpacked) == ["hidden", "other"] and member == (True, False)
    for key, expected in whole["dic"].items():
        assert torch.equal(saved["dic"][key], expected)
        assert torch.equal(items[key], expected)
    assert torch.equal(saved["nam"][0], whole["nam"].first)
    assert torch.equal(saved["nam"][1], whole["nam"].second)
    assert torch.equal(saved["nes"], whole["nes"][1]["deep"][0])
    assert torch.equal(saved["rec"], whole["rec"].hidden)
    assert entire.value[1]["deep"][1] is None


def capture_any(toy: Model, x: torch.Tensor, path: str) -> Any:
    found: list[Any] = []
    handle = toy.submodule(path).register_forward_hook(lambda _m, _a, out: found.append(out))
    with torch.no_grad():
        toy.load()(x)
    handle.remove()
    return found[0]


def test_shape_dtype_and_device_are_known_while_recording(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x):
        h = toy.mid.output
        assert h.shape == (2, 5, 8) and isinstance(h.shape, torch.Size)
        assert h.dtype == torch.float32 and h.device == torch.device("cpu")
        assert (h.ndim, h.dim(), h.size(1), h.numel(), len(h)) == (3, 3, 5, 80, 2)
        assert torch.numel(h) == 80 and torch.is_floating_point(h) and not h.is_complex()
        assert h[0, 1:].T.shape == (8, 4)
        assert (h @ W[:, :3]).shape == (2, 5, 3)
        assert (h > 0).dtype == torch.bool
        assert toy.tup.output.shape == (torch.Size([2, 5, 8]),) * 2
        with pytest.raises(graftwork.GraftworkError, match=r"len\(\) of a scalar"):
            len(h.sum())
        with pytest.raises(
            graftwork.GraftworkError, match=r"`shape` needs the real value.*test_pro"
        ):
            h[h > 0].shape  # how many there are, only the values tell
