"""Graphs as bytes: they come back as they were, and bytes from anyone do no harm."""

import contextlib
import json
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import einops
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import graftwork
from graftwork import GraftworkError, LanguageModel, Model
from graftwork.tracing import Graph, Tracer
from graftwork.tracing.errors import CapturedTensorError, WireError
from graftwork.tracing.limits import LIMITS, Limits
from graftwork.tracing.node import Captured, Node
from graftwork.tracing.wire import FORMAT, pack, unpack


def sent(tracer: Tracer) -> list[Any]:
    """The saved values of a block, from a run of its graph that has been bytes."""
    data = pack(tracer.graph)
    graph = unpack(data).graph
    graph.lint()
    assert pack(graph) == data
    experiment = tracer.compile()
    experiment.graph = graph
    return list(experiment())


# ---------------------------------------------------------------- what comes back


def test_reads_writes_modules_and_parameters(
    toy: Model, x: torch.Tensor, reference: Callable[..., Any]
) -> None:
    module = toy.module_tree()
    with toy.trace(x) as tracer:
        toy.inp.output[:, 0] += 1
        toy.mid.output = toy.mid.output * 2 - toy.out.bias
        toy.out(toy.mid.output).save()
        tracer.output.save()
    found = sent(tracer)
    with torch.no_grad():
        mid = {}

        def first(out: torch.Tensor) -> None:
            out[:, 0] += 1

        def second(out: torch.Tensor) -> torch.Tensor:
            mid["value"] = out * 2 - module.out.bias
            return mid["value"].clone()

        expected = reference(module, (x,), {"inp": first, "mid": second})
        torch.testing.assert_close(found, [module.out(mid["value"]), expected])


def test_containers_fields_and_first_arguments(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x) as tracer:
        toy.tup.output[0].add_(1)
        toy.dic.output["hidden"][:, 1] = 0
        toy.nam.output.first.mul_(2)
        toy.rec.output.hidden.save()
        toy.mid.input.save()
        toy.mid.inputs[0][0].save()
    module = toy.module_tree()
    with torch.no_grad():
        h = module.inp(x) + 1
        h[:, 1] = 0
        h = h * 2
    torch.testing.assert_close(sent(tracer), [h, h, h])


OPERATIONS: list[Callable[[Any], Any]] = [
    lambda h: 2 / h,
    lambda h: 1 - h,
    lambda h: torch.ones(8) - h,
    lambda h: 2 ** h.clamp(-1, 1),
    lambda h: h.__iadd__(1) @ torch.eye(8),
    lambda h: torch.eye(8) @ h[0, 0],
    lambda h: torch.nn.functional.relu(h, inplace=True),
    lambda h: torch.nn.functional.gelu(h, approximate="tanh"),
    lambda h: torch.linalg.norm(h, dim=-1),
    lambda h: torch.linalg.svd(h)[1],
    lambda h: torch.fft.rfft(h).abs(),
    lambda h: torch.special.expit(h),
    lambda h: torch.einsum("bth,bsh->bts", h, h),
    lambda h: torch.relu_(h),
    lambda h: torch.ones(8).sub(h),
    lambda h: torch.add(input=h, other=h, alpha=2),
    lambda h: torch.where(h > 0, h, float("-inf")),
    lambda h: h.masked_fill(h > 0, float("nan")).nan_to_num(3.0),
    lambda h: h.to(torch.float64).to("cpu"),
    lambda h: h.to(dtype=torch.bfloat16, memory_format=torch.contiguous_format),
    lambda h: h.topk(3, dim=-1).values,
    lambda h: h.max(-1).indices,
    lambda h: h[..., None, 1:7:2],
    lambda h: h[:, [0, 2]][:, torch.tensor([1])],
    lambda h: h[h > 0],
    lambda h: h[:, np.int64(1)],
    lambda h: h[(slice(None), -1)],
    lambda h: h.sum(dim=(0, 1)),
    lambda h: h.new_zeros(torch.Size([2, 3])),
    lambda h: h * np.float32(0.5),
    lambda h: torch.cat([h, torch.zeros(2, 1, 8)], dim=1),
    lambda h: torch.view_as_complex(h.unflatten(-1, (4, 2)).contiguous()).mul(2j).abs(),
    lambda h: einops.rearrange(h, "b t (n d) -> b n t d", n=2),
    lambda h: einops.reduce(h, "b t d -> b d", "mean"),
    lambda h: torch.nn.functional.scaled_dot_product_attention(h, h, h, is_causal=True),
    lambda h: torch.nn.functional.layer_norm(h, (8,), torch.ones(8), None, eps=1e-5),
    lambda h: graftwork.apply(torch.softmax, h, -1),
    lambda h: graftwork.apply(torch.Tensor.flip, h, dims=(0,)),
    lambda h: divmod_by_hand(h),
]


def divmod_by_hand(h: Any) -> Any:
    q = h // 0.5
    q -= h % 0.5
    q[0] = -q[0]
    view = q.reshape(-1)
    view[::2] = 9
    return q.T.contiguous() if isinstance(q, torch.Tensor) and q.ndim == 2 else q + view[0]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_means_the_same_after_it_was_sent(
    operation: Callable[[Any], Any], toy: Model, x: torch.Tensor
) -> None:
    with toy.trace(x) as tracer:
        operation(toy.mid.output).save()
    with torch.no_grad():
        module = toy.module_tree()
        expected = operation(module.mid(module.inp(x)))
    (found,) = sent(tracer)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_head_alias_and_generation_steps(gpt2: LanguageModel, ids: torch.Tensor) -> None:
    with gpt2.trace(ids) as tracer:
        gpt2.transformer.h[1].attn.value.output[:, 2] = 0
        gpt2.lm_head.output[:, -1].save()
    module = gpt2.module_tree()

    def ablate(out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[..., 128 + 16 : 128 + 24] = 0
        return out

    handle = module.transformer.h[1].attn.c_attn.register_forward_hook(lambda m, a, o: ablate(o))
    with torch.no_grad():
        expected = module(ids).logits[:, -1]
    handle.remove()
    torch.testing.assert_close(sent(tracer), [expected])

    with gpt2.generate(ids[:1], max_new_tokens=3, do_sample=False) as generator:
        gpt2.transformer.h[0].output[0][:, -1] += 3.0
        generator.next(2)
        gpt2.lm_head.output[:, -1].save()
    graph = unpack(pack(generator.graph)).graph
    assert [n.target for n in graph.nodes if n.kind == "read"] == [
        n.target for n in generator.graph.nodes if n.kind == "read"
    ]
    assert {n.target.step for n in graph.nodes if n.kind == "read"} == {0, 2}


def test_invokes_saves_and_last_writes_are_kept(
    toy: Model, x: torch.Tensor, reference: Callable[..., Any]
) -> None:
    with toy.trace() as tracer:
        with tracer.invoke(x):
            donor = toy.mid.output[:, 0]
            toy.inp.output[:] = 1
            toy.inp.output[:] = 0
            toy.out.output.save()
        with tracer.invoke(x + 1):
            toy.mid.output[:, 0] = donor
            again = toy.out.output.save()
            again.save()
    graph = unpack(pack(tracer.graph)).graph
    assert graph.saved_in_order() == tracer.graph.saved_in_order()
    assert [(k, n.index) for k, n in graph.writes.items()] == [
        (k, n.index) for k, n in tracer.graph.writes.items()
    ]
    assert [n.invoke for n in graph.nodes] == [n.invoke for n in tracer.graph.nodes]
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[torch.Tensor], None]:
        return lambda out: seen.update({name: out.clone()})

    def put_donor(out: torch.Tensor) -> None:
        out[:, 0] = seen["donor"][:, 0]

    hooks = {"inp": torch.Tensor.zero_, "mid": keep("donor"), "out": keep("first")}
    reference(toy.module_tree(), (x,), hooks)
    reference(toy.module_tree(), (x + 1,), {"mid": put_donor, "out": keep("second")})
    torch.testing.assert_close(sent(tracer), [seen["first"], seen["second"], seen["second"]])
    assert str(graph).count("invoke 1") == str(tracer.graph).count("invoke 1") > 0


def test_the_users_line_is_kept_but_no_file_of_the_receiver_is_opened(
    toy: Model, x: torch.Tensor
) -> None:
    with toy.trace(x) as tracer:
        toy.mid.output.view(3).save() if False else toy.mid.output.sum().save()
    graph = unpack(pack(tracer.graph)).graph
    for before, after in zip(tracer.graph.nodes, graph.nodes, strict=True):
        assert after.line == before.line and after.file == f"<sent: {__file__}>"
        # The real file has this line; a file of that name must not be read where it was received.
        assert "toy.mid" in str(before.location) and "toy.mid" not in str(after.location)


# ---------------------------------------------------------------- tensors


def tensors_of(graph: Graph) -> list[torch.Tensor]:
    found = []
    for node in graph.nodes:
        for argument in node.args:
            if isinstance(argument, Captured):
                found.append(argument.tensor)
    return found


DTYPES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 bool"
)


@pytest.mark.parametrize("name", DTYPES.split())
def test_a_captured_tensor_of_every_dtype(name: str, toy: Model, x: torch.Tensor) -> None:
    dtype = getattr(torch, name)
    values = torch.arange(6).reshape(2, 3).to(torch.float32).to(dtype)
    empty, one = torch.empty(0, 3, dtype=dtype), torch.ones((), dtype=torch.float32).to(dtype)
    with toy.trace(x) as tracer:
        for tensor in (values, values.T, empty, one):
            torch.add(toy.mid.output, tensor)
    found = tensors_of(unpack(pack(tracer.graph)).graph)
    for before, after in zip((values, values.T, empty, one), found, strict=True):
        assert after.dtype == dtype and after.shape == before.shape
        assert after.stride() == before.stride()
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (before, after)]
        assert torch.equal(*raw)


def test_bits_of_a_tensor_are_kept(toy: Model, x: torch.Tensor) -> None:
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 3.4e38])
    with toy.trace(x) as tracer:
        torch.add(toy.mid.output, odd)
    (found,) = tensors_of(unpack(pack(tracer.graph)).graph)
    assert torch.equal(found.view(torch.int32), odd.view(torch.int32))


def test_layouts_of_tensors(toy: Model, x: torch.Tensor) -> None:
    base = torch.arange(48.0).reshape(2, 4, 6)
    kinds = [
        base.permute(2, 0, 1),
        base[:, ::2],
        base[1:],
        torch.ones(3, 1).expand(3, 4),
        base[0].T,
    ]
    with toy.trace(x) as tracer:
        for tensor in kinds:
            torch.add(toy.mid.output, tensor)
    data = pack(tracer.graph)
    for before, after in zip(kinds, tensors_of(unpack(data).graph), strict=True):
        assert torch.equal(before, after)
        assert after.stride() == before.clone().stride()
        assert after.untyped_storage().nbytes() == after.numel() * 4


def test_one_tensor_is_sent_once_however_often_it_is_used(toy: Model, x: torch.Tensor) -> None:
    big = torch.randn(100, 8)
    weight = nn.Parameter(big)  # the same memory
    with toy.trace(x) as tracer:
        for _ in range(5):
            (toy.mid.output @ big.T).save()
            toy.mid.output @ weight.T
            torch.matmul(toy.mid.output, weight)
            torch.matmul(toy.mid.output, big)
    data = pack(tracer.graph)
    stored = safetensors.torch.load(data)
    # `big.T` is made anew each time: one view of one memory.
    assert sum(tensor.numel() for tensor in stored.values()) <= 2 * big.numel()
    found = tensors_of(unpack(data).graph)
    pointers = {t.untyped_storage().data_ptr() for t in found if t.shape == big.shape}
    assert len(pointers) == 1
    assert {type(t) for t in found} == {torch.Tensor, nn.Parameter}


def test_parameters_stay_parameters(toy: Model, x: torch.Tensor) -> None:
    trained = nn.Parameter(torch.ones(8))
    frozen = nn.Parameter(torch.ones(8) * 2, requires_grad=False)
    leaf = torch.ones(8, requires_grad=True)
    with toy.trace(x) as tracer:
        for tensor in (trained, frozen, leaf, leaf * 2):
            torch.add(toy.mid.output, tensor).save()
    graph = unpack(pack(tracer.graph)).graph
    found = tensors_of(graph)
    assert [type(t) for t in found] == [nn.Parameter] * 2 + [torch.Tensor] * 2
    assert [t.requires_grad for t in found] == [True, False, True, True]
    assert all(t.is_leaf for t in found) and graph.needs_grad
    experiment = tracer.compile()
    experiment.graph = graph
    experiment()[0].sum().backward()
    assert torch.equal(found[0].grad, torch.full((8,), 10.0))
    assert trained.grad is None


def test_a_tensor_changed_after_recording_is_refused(toy: Model, x: torch.Tensor) -> None:
    v = torch.ones(8)
    with toy.trace(x) as tracer:
        (toy.mid.output + v).save()
    graph = unpack(pack(tracer.graph)).graph
    v.add_(1)
    with pytest.raises(CapturedTensorError, match=r"(?s)test_wire.py.*`v`.*changed in place"):
        pack(tracer.graph)
    # And the check goes on where it was received.
    experiment = tracer.compile()
    experiment.graph = graph
    experiment()
    tensors_of(graph)[0].add_(1)
    with pytest.raises(CapturedTensorError, match="changed in place"):
        experiment()


def test_extra_strings_and_tensors(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x) as tracer:
        toy.mid.output.save()
    extra = {"model": '{"name": "a"}', "": '\ud7ff \x00 "', "graftwork": "b"}
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": shared, "b": shared.T, "tensor.0": shared[0], "": torch.zeros(0)}
    package = unpack(pack(tracer.graph, extra=extra, tensors=tensors))
    assert package.extra == extra and package.library == graftwork.__version__
    assert list(package.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(package.tensors[name], tensor)


def test_a_file_is_read_by_safetensors(toy: Model, x: torch.Tensor, tmp_path: Path) -> None:
    with toy.trace(x) as tracer:
        (toy.mid.output + torch.arange(8.0)).save()
    file = tmp_path / "graph.safetensors"
    file.write_bytes(pack(tracer.graph))
    with safetensors.safe_open(file, "pt") as opened:
        assert list(opened.keys()) == ["tensor.0"] and set(opened.metadata()) == {"graftwork"}
        assert torch.equal(opened.get_tensor("tensor.0"), torch.arange(8.0))


# ---------------------------------------------------------------- what cannot be sent


def test_a_python_function_is_refused_at_the_users_line(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x) as tracer:
        graftwork.apply(lambda h: h * 2, toy.mid.output).save()  # the user's line
    with pytest.raises(WireError, match=r"(?s)lambda.*holds no code.*the user's line.*torch"):
        pack(tracer.graph)


class Wrapped(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (lambda h: graftwork.apply(torch.relu_, h), "no code|Python function|changes nothing"),
        (lambda h: h.bernoulli(0.5, generator=torch.Generator()), "of type Generator"),
        (lambda h: h + torch.ones(8).to_sparse(), "sparse"),
        (lambda h: h + torch.ones(8).as_subclass(Wrapped), "Wrapped"),
        (lambda h: h + torch.ones(8, dtype=torch.complex128), "complex128"),
        (lambda h: h.view(dtype=torch.int32).add(2**70), "64 bits"),
        (lambda h: h.as_strided((2,), (1,)), "`as_strided` is not among"),
        (lambda h: torch.empty_like(h), "`empty_like` is not among"),
        (lambda h: h.type_as(b"bytes"), "of type bytes"),
        (lambda h: h.to(nested(LIMITS.depth + 1)), "nested deeper"),
    ],
)
def test_what_has_no_form_is_refused_with_the_line(
    record: Callable[[Any], Any], reason: str, toy: Model, x: torch.Tensor
) -> None:
    with toy.trace(x) as tracer:
        record(toy.mid.output)
    with pytest.raises(WireError, match=reason) as refused:
        pack(tracer.graph)
    assert "test_wire.py" in str(refused.value)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


# ---------------------------------------------------------------- bytes from anyone


@pytest.fixture(scope="module")
def good() -> bytes:
    model = Model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    with model.trace(torch.ones(1, 4)) as tracer:
        h = model[0].output
        h[:, 0] = torch.ones(1)
        (h.sum(dim=-1, keepdim=True) * 2).save()
        model[0].inputs.save()
        h.mT.add_(1)
        model[1](h) + model[1].bias
    return pack(tracer.graph, extra={"a": "b"}, tensors={"t": torch.ones(2)})


def parts(data: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return json.loads(header["__metadata__"]["graftwork"]), safetensors.torch.load(data)


def changed(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    document, tensors = parts(data)
    change(document)
    return safetensors.torch.save(tensors, {"graftwork": json.dumps(document)})


def test_the_good_bytes_are_good(good: bytes) -> None:
    kinds = [node.kind for node in unpack(good).graph.nodes]
    assert set(kinds) == {"read", "call", "write", "module", "parameter"}
    assert unpack(changed(good, lambda d: None)).extra == {"a": "b"}


def test_every_cut_is_refused(good: bytes) -> None:
    for length in range(0, len(good), 7):
        with pytest.raises(WireError):
            unpack(good[:length])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 8,
        b"\xff" * 64,
        pickle.dumps({"a": 1}),
        (2).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (17).to_bytes(8, "little") + b'{"a":1,"a":2,    }'[:17],
        safetensors.torch.save({"a": torch.ones(1)}),
        safetensors.torch.save({}, {"graftwork": "[]"}),
        safetensors.torch.save({}, {"graftwork": "{"}),
        safetensors.torch.save({}, {"graftwork": "[" * 100_000}),
        safetensors.torch.save({}, {"graftwork": '{"format": 1, "format": 1}'}),
        safetensors.torch.save({}, {"graftwork": '{"format": NaN}'}),
        safetensors.torch.save({}, {"graftwork": '{"format": 1e999}'}),
        safetensors.torch.save({}, {"graftwork": '{"format": ' + "9" * 9999 + "}"}),
        safetensors.torch.save({}, {"graftwork": '{"format": Infinity}'}),
    ],
)
def test_what_is_no_graph_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        unpack(data)


@pytest.mark.parametrize("found", [0, FORMAT + 1, "1", None, True, 1.0])
def test_another_format_says_so(good: bytes, found: Any) -> None:
    with pytest.raises(WireError, match=r"(?s)has format .*Install the same version"):
        unpack(changed(good, lambda d: d.update(format=found)))


def node(document: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(node for node in document["graph"]["nodes"] if node["kind"] == kind)


def call(document: dict[str, Any], name: str, *args: Any, **kwargs: Any) -> None:
    document["graph"]["nodes"].append(
        {"kind": "call", "target": name, "args": list(args), "kwargs": kwargs, "file": 0, "line": 1}
    )


N0 = {"node": 0}
T0 = {"tensor": 0}
HOSTILE: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    # Names.
    (lambda d: call(d, "torch.nothing", N0), "not allowed.*or not"),
    (lambda d: call(d, "os.system", "true"), "not allowed"),
    (lambda d: call(d, "builtins.eval", "1"), "not allowed"),
    (lambda d: call(d, "Tensor.numpy", N0), "not allowed"),
    (lambda d: call(d, "Tensor.__reduce_ex__", N0, 2), "not allowed"),
    (lambda d: call(d, "torch.load", "file"), "not allowed"),
    (lambda d: call(d, ["torch.add"], N0), "not allowed"),
    (lambda d: d["graph"]["nodes"][0].update(kind="eval"), "kind of node"),
    (lambda d: d["graph"]["nodes"][0].update(kind=3), "kind"),
    # Arguments.
    (lambda d: call(d, "torch.add", {"node": 99}), "does not come before"),
    (lambda d: call(d, "torch.add", {"node": len(d["graph"]["nodes"])}), "does not come before"),
    (lambda d: call(d, "torch.add", {"node": -1}), "does not come before"),
    (lambda d: call(d, "torch.add", {"node": True}), "does not come before"),
    (lambda d: call(d, "torch.add", {"node": "0"}), "does not come before"),
    (lambda d: node(d, "write").update(args=[{"node": 50}]), "does not come before"),
    (lambda d: call(d, "torch.add", {"tensor": 99}), "list of tensors"),
    (lambda d: call(d, "torch.add", {"pickle": "gASV"}), "no value has the tag"),
    (lambda d: call(d, "torch.add", {"node": 0, "tensor": 0}), "no tagged value"),
    (lambda d: call(d, "torch.add", {}), "no tagged value"),
    (lambda d: call(d, "torch.add", {"tuple": 3}), "no list"),
    (lambda d: call(d, "torch.add", {"slice": [1]}), "right length"),
    (lambda d: call(d, "torch.add", {"dict": [["a", 1], ["a", 2]]}), "twice"),
    (lambda d: call(d, "torch.add", {"dict": [[N0, 1]]}), "key"),
    (lambda d: call(d, "torch.add", {"dict": [[[], 1]]}), "key"),
    (lambda d: call(d, "torch.add", {"size": ["a"]}), "integers"),
    (lambda d: call(d, "torch.add", {"size": [2**63]}), "64 bits"),
    (lambda d: call(d, "torch.add", {"size": [-1]}), "negative"),
    (lambda d: call(d, "torch.add", {"dtype": "load"}), "no dtype"),
    (lambda d: call(d, "torch.add", {"dtype": []}), "no dtype"),
    (lambda d: call(d, "torch.add", {"device": "cpu; rm"}), "no device"),
    (lambda d: call(d, "torch.add", {"device": "cuda:99999999999999"}), "no device"),
    (lambda d: call(d, "torch.add", {"float": "1e5"}), "no value has the tag"),
    (lambda d: call(d, "torch.add", {"complex": ["a", 1.0]}), "complex"),
    (lambda d: call(d, "torch.add", 2**64), "64 bits"),
    (lambda d: call(d, "torch.add", nested(LIMITS.depth + 1)), "nested deeper"),
    (lambda d: call(d, "torch.add", {"operation": "torch.add"}), "argument 0 is not a value"),
    (lambda d: call(d, "torch.add", [{"operation": "torch.add"}]), "inside a container"),
    (lambda d: call(d, "torch.add", N0, out=T0), "would change"),
    (lambda d: call(d, "torch.nn.functional.relu", N0, True), "would change"),
    (lambda d: call(d, "Tensor.sum", N0, _name="data_ptr"), "named '_name'"),
    (lambda d: call(d, "Tensor.sum", N0, **{"a b": 1}), "named 'a b'"),
    (lambda d: call(d, "getitem", N0), "arguments"),
    (lambda d: call(d, "getitem", N0, 0, more=1), "arguments"),
    (lambda d: call(d, "element", N0, "0"), "an integer"),
    # Ways into Python.
    (lambda d: call(d, "field", N0, "__class__"), "public field"),
    (lambda d: call(d, "field", N0, "gi_frame"), "public field"),
    (lambda d: call(d, "field", N0, N0), "public field"),
    (
        lambda d: call(
            d,
            "put",
            N0,
            N0,
            {"operation": "field"},
            {"tuple": ["__dict__"]},
            {"dict": []},
        ),
        "public field",
    ),
    (
        lambda d: call(d, "put", N0, N0, {"operation": "apply"}, {"tuple": []}, {"dict": []}),
        "a view",
    ),
    (lambda d: call(d, "put", N0, N0, "field", {"tuple": ["a"]}, {"dict": []}), "a view"),
    (lambda d: call(d, "apply", N0), "names no function"),
    (lambda d: call(d, "apply"), "names no function"),
    (lambda d: call(d, "apply", {"function": "os.system"}, "true"), "not allowed"),
    (lambda d: call(d, "apply", {"function": ["torch.add"]}), "not allowed"),
    (lambda d: call(d, "apply", {"function": "torch.relu_"}, N0), "changes nothing"),
    (lambda d: call(d, "torch.add", {"function": "torch.add"}), "no value has the tag"),
    (lambda d: node(d, "module").update(target="0.__class__"), "no path"),
    (lambda d: node(d, "module").update(target="_private"), "no path"),
    (lambda d: node(d, "module").update(args=[{"operation": "getitem"}]), "no value"),
    (lambda d: node(d, "module").update(kwargs={"a b": 1}), "Python does not know"),
    (lambda d: node(d, "parameter").update(target="__dict__"), "no path"),
    (lambda d: node(d, "parameter").update(target=["weight"]), "no path"),
    # Places.
    (
        lambda d: node(d, "read").update(target={"hook_point": ["__class__", "output", 0, 0]}),
        "path",
    ),
    (lambda d: node(d, "read").update(target={"hook_point": ["0", "__call__", 0, 0]}), "port"),
    (lambda d: node(d, "read").update(target={"hook_point": ["0", "output", -1, 0]}), "step"),
    (lambda d: node(d, "read").update(target={"hook_point": ["0", "output", 10**9, 0]}), "step"),
    (lambda d: node(d, "read").update(target={"hook_point": ["0", "output", True, 0]}), "step"),
    (lambda d: node(d, "read").update(target={"hook_point": ["0", "output"]}), "length"),
    (lambda d: node(d, "read").update(target={"other": []}), "no place"),
    (lambda d: node(d, "read").update(target="0.output"), "no place"),
    (lambda d: node(d, "read").update(args=[1]), "1 arguments, not 0"),
    (lambda d: node(d, "write").update(args=[]), "0 arguments, not 1"),
    (lambda d: node(d, "write").update(args=["text"]), "no node"),
    (lambda d: node(d, "write").update(args=[{"operation": "getitem"}]), "no node"),
    (lambda d: node(d, "write").update(kwargs={"a": 1}), "2 arguments, not 1"),
    # Records.
    (lambda d: d.update(more=1), "more"),
    (lambda d: d.update({"\x1b[2J": 1}), "refused|Extra inputs"),
    (lambda d: d.update(format=2, library="\x1b[2J"), "Install the same version"),
    (lambda d: call(d, "\x1b[2J", N0), "not allowed"),
    (lambda d: d.pop("graph"), "graph"),
    (lambda d: d.update(extra={"a": 1}), "extra"),
    (lambda d: d.update(named=["t", "t"]), "tensors"),
    (lambda d: d.update(named=["other"]), "tensors"),
    (lambda d: d.update(named=[]), "tensors"),
    (lambda d: node(d, "read").update(invoke=10**12), "invoke"),
    (lambda d: node(d, "read").update(invoke=-2), "invoke"),
    (lambda d: node(d, "read").update(file=10), "list of files"),
    (lambda d: node(d, "read").update(line=2**40), "line"),
    (lambda d: node(d, "read").update(line=1.0), "line"),
    (lambda d: node(d, "read").update(guard="x"), "guard"),
    (lambda d: d["graph"].update(saves=[99]), "no value"),
    (lambda d: d["graph"].update(saves=[-1]), "no value"),
    (lambda d: d["graph"].update(writes=[0]), "not the last write"),
    (lambda d: d["graph"].update(writes=d["graph"]["writes"] * 2), "not the last write"),
    (lambda d: d["graph"]["tensors"][0].update(data="named.t"), "not in the file"),
    (lambda d: d["graph"]["tensors"][0].update(data="tensor.9"), "not in the file"),
    (lambda d: d["graph"]["tensors"][0].update(order=[5]), "order"),
    (lambda d: d["graph"]["tensors"][0].update(order=[0] * 2), "order"),
    (lambda d: d["graph"]["tensors"][0].update(name="x" * 10**6), "too long"),
    (lambda d: d["graph"]["tensors"][0].update(name="\x1b[2J"), "printed"),
    (lambda d: d["graph"].update(files=["a\nb"]), "printed"),
    (lambda d: d["graph"].update(nodes={}), "nodes"),
]


@pytest.mark.parametrize(("change", "reason"), HOSTILE)
def test_hostile_content_is_refused(
    good: bytes, change: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    with pytest.raises(WireError, match=f"(?s){reason}") as refused:
        unpack(changed(good, change))
    message = str(refused.value)
    assert len(message) < 1000 and message.replace("\n", "").isprintable()


def test_json_that_python_would_mend_is_refused(good: bytes) -> None:
    document, tensors = parts(good)
    text = json.dumps(document)
    for old, new in [
        ('"keepdim": true', '"keepdim": true, "keepdim": false'),
        ('{"node": 0}', '{"node": 0, "node": 1}'),
        ('"keepdim": true', '"keepdim": NaN'),
        ('"keepdim": true', '"keepdim": -Infinity'),
        ('"keepdim": true', '"keepdim": 1e400'),
    ]:
        assert old in text
        data = safetensors.torch.save(tensors, {"graftwork": text.replace(old, new, 1)})
        with pytest.raises(WireError, match="JSON cannot be read"):
            unpack(data)


def test_a_header_that_lies_about_its_tensors_is_refused(good: bytes) -> None:
    size = int.from_bytes(good[:8], "little")
    header = good[8 : 8 + size]
    for change in (
        lambda h: h.replace(b'"shape":[2]', b'"shape":[9]'),
        lambda h: re.sub(rb'"dtype":"F32"', b'"dtype":"F64"', h),
        lambda h: h.replace(b'"data_offsets":[0,', b'"data_offsets":[4,'),
        lambda h: h.replace(b'"named.t"', b'"tensor.0"'),
    ):
        assert change(header) != header
        new = change(header)
        with pytest.raises(WireError):
            unpack(len(new).to_bytes(8, "little") + new + good[8 + size :])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from("node tensor tuple dict slice operation function dtype size".split())
            | st.text(max_size=4),
            inner,
            max_size=2,
        )
    ),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_change_of_the_json_gives_another_error(good: bytes, data: st.DataObject) -> None:
    def change(document: dict[str, Any]) -> None:
        place: Any = document
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = data.draw(st.sampled_from(keys))
            deeper = isinstance(place[key], (dict, list)) and len(place[key]) > 0
            if deeper and data.draw(st.integers(0, 4)):
                place = place[key]
                continue
            place[key] = data.draw(json_values)
            return

    with contextlib.suppress(WireError):
        unpack(changed(good, change)).graph.lint()


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.integers(0, 10**6), byte=st.integers(0, 255))
@example(place=0, byte=255)
@example(place=7, byte=255)
def test_no_change_of_a_byte_gives_another_error(good: bytes, place: int, byte: int) -> None:
    data = bytearray(good)
    data[place % len(data)] = byte
    with contextlib.suppress(WireError):
        unpack(bytes(data)).graph.lint()


@pytest.mark.slow
def test_reading_a_graph_loads_nothing_and_runs_nothing(good: bytes, tmp_path: Path) -> None:
    file = tmp_path / "graph"
    file.write_bytes(good)
    code = (
        "import sys, torch\n"
        "from graftwork.tracing.wire import unpack\n"
        f"data = open({str(file)!r}, 'rb').read()\n"
        "events = []\n"
        "sys.addaudithook(lambda name, args: events.append(name))\n"
        "unpack(data)\n"
        "bad = ('exec', 'compile', 'open', 'subprocess', 'os.system', 'pickle', 'marshal', 'socket')\n"
        "print([e for e in events if e.startswith(bad)])\n"
    )
    code = code.replace("events = []", "unpack(data); events = []")  # imports are done before
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_a_sent_graph_runs_on_other_prompts_of_another_length() -> None:
    model = LanguageModel("graftwork/tiny")
    with model.trace("The capital of France is") as tracer:
        model.transformer.h[1].output[0][:, -1] *= 2
        model.lm_head.output[:, -1].save()
    experiment = tracer.compile()
    experiment.graph = unpack(pack(tracer.graph)).graph
    (found,) = experiment("One")
    module, ids = model.load(), model.tokenizer("One", return_tensors="pt").input_ids

    def double(_m: Any, _a: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, -1] *= 2
        return output

    handle = module.transformer.h[1].register_forward_hook(double)
    with torch.no_grad():
        expected = module(ids).logits[:, -1]
    handle.remove()
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_a_long_graph_is_packed_in_linear_time(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x) as tracer:
        h = toy.mid.output
        for _ in range(20_000):
            h = h + 1
        h.save()
    graph = unpack(pack(tracer.graph)).graph
    assert len(graph) == 20_001
    assert all(type(n) is Node for n in graph.nodes)


# ---------------------------------------------------------------- gradients and caches


def test_gradients_and_their_edits(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x) as tracer:
        toy.out.output.grad[:, 0] *= 3
        toy.inp.output[:, 1].grad.save()
        loss = tracer.output.pow(2).sum()
        loss.backward()
        torch.autograd.grad(loss, tracer.output)[0].save()
    module = toy.module_tree()
    kept: list[torch.Tensor] = []

    def scaled(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[:, 0] *= 3
        return gradient

    def keep(_: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    def scale(_: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(scaled)

    handles = [
        module.inp.register_forward_hook(keep),
        module.out.register_forward_hook(scale),
    ]
    try:
        module(x).pow(2).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    found = sent(tracer)
    module.zero_grad()
    assert kept[0].grad is not None
    with torch.no_grad():
        of_out = 2 * module(x)
    torch.testing.assert_close(found, [kept[0].grad[:, 1], of_out])


def test_a_cache(toy: Model, x: torch.Tensor) -> None:
    with toy.trace() as tracer, tracer.invoke(x) as invoker:
        del invoker
        tracer.cache(modules=["inp"], dtype=torch.float64)
    with torch.no_grad():
        expected = toy.module_tree().inp(x).double()
    torch.testing.assert_close(sent(tracer), [expected])


@pytest.mark.parametrize("written", [[0, -1], [0, 10**9], [10**6, 0], ["a", 0], [0], [True, 0]])
def test_a_gradient_of_nothing_is_refused(toy: Model, x: torch.Tensor, written: Any) -> None:
    with toy.trace(x) as tracer:
        toy.inp.output.grad.save()
        tracer.output.sum().backward()

    def change(document: dict[str, Any]) -> None:
        for one in document["graph"]["nodes"]:
            if one["kind"] == "read" and "gradient" in one["target"]:
                one["target"]["gradient"] = written

    with pytest.raises(WireError):
        unpack(changed(pack(tracer.graph), change))


# ------------------------------------------------------------------ limits, all in one table


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(header=100), "header"),
        (Limits(count=2), "more than 2"),
        (Limits(depth=1), "nested deeper than 1"),
        (Limits(parts=3), "more than 3 parts"),
        (Limits(text=1), "too long"),
    ],
)
def test_each_limit_of_reading_is_an_argument(
    toy: Model, x: torch.Tensor, limits: Limits, reason: str
) -> None:
    with toy.trace(x) as tracer:
        torch.stack([toy.mid.output, toy.mid.output[0, [0, 1, 2, 3]].sum() + toy.mid.output]).save()
    data = pack(tracer.graph)
    unpack(data)
    with pytest.raises(GraftworkError, match=reason):
        unpack(data, limits)


@pytest.mark.slow
def test_unpacking_takes_time_in_proportion(toy: Model, x: torch.Tensor) -> None:
    def seconds(count: int) -> float:
        tracer = toy.trace(x)
        tracer.__enter__()
        h = toy.mid.output
        for _ in range(count // 3):
            h = torch.cat([(h + 1)[:, :2], h], dim=-1)
        data = pack(tracer.graph)
        graftwork.reset()
        begun = time.process_time()
        assert len(unpack(data).graph.nodes) > count - 3
        return time.process_time() - begun

    small, large = seconds(10_000), seconds(60_000)
    # 300,000 nodes take 2 s on a machine that is not busy; here it is the growth that is held.
    assert large < 12 * small, (small, large)
