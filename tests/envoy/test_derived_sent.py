"""Graphs with computed names as bytes: they compute what they computed, and bad ones do no harm."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from graftwork import GraftworkError, LanguageModel
from graftwork.envoy import derived
from graftwork.tracing.allow_list import declare, name_of, operations
from graftwork.tracing.operations import Operation
from graftwork.tracing.wire import pack, unpack

from ..models.conftest import build, random_prompts

IDS = random_prompts(5)[0]
NAMES = ["head_out", "q_input", "k_input", "v_input", "ln1_scale", "ln1_normalized", "ln2_scale"]
ALL = [
    one
    for derivation in vars(derived).values()
    if isinstance(derivation, derived.Derivation)
    for one in (derivation.state, derivation.part)
]


def sent(tracer: Any) -> tuple[Any, bytes]:
    """The values of a block from a run of its graph that has been bytes."""
    data = pack(tracer.graph)
    graph = unpack(data).graph
    graph.lint()
    assert pack(graph) == data
    experiment = tracer.compile()
    experiment.graph = graph
    return list(experiment()), data


def test_all_of_them_have_names() -> None:
    names = {name_of(one) for one in ALL}
    assert None not in names and len(names) == len({id(one) for one in ALL})
    for one in ALL:
        name = name_of(one)
        assert name is not None and name.startswith("derived.") and " " not in name
        assert operations()[name] is one


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_names_that_are_read(architecture: str) -> None:
    model = LanguageModel(build(architecture))
    names = [name for name in NAMES if name in model.layers[1].support().names]
    assert "ln1_scale" in names and "head_out" in names
    with model.trace(IDS) as tracer:
        boxes = [getattr(model.layers[1], name).save() for name in names]
        boxes.append(model.ln_final_scale.save())
    found, data = sent(tracer)
    assert b"derived.head_out" in data
    for one, box in zip(found, boxes, strict=True):
        torch.testing.assert_close(one, box.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_names_that_are_changed(architecture: str, name: str) -> None:
    model = LanguageModel(build(architecture))
    with model.trace(IDS) as tracer:
        value = getattr(model.layers[1], name)
        value[:, 1] = value[:, 1] * 2 + torch.linspace(0, 1, value.shape[-1])
        boxes = [value.save(), model.logits.save()]
    before = model.get_logits(IDS)
    found, _ = sent(tracer)
    for one, box in zip(found, boxes, strict=True):
        torch.testing.assert_close(one, box.value)
    assert not torch.allclose(found[1], before)


def test_edits_of_computed_names_are_kept(tmp_path: Any) -> None:
    model = LanguageModel(build("llama"))
    with model.edit(inplace=True):
        model.layers[1].head_out[:, :, 2] = 0
    changed = model.get_logits(IDS)
    model.save_edits(tmp_path / "edits")
    other = LanguageModel(build("llama"))
    other.load_edits(tmp_path / "edits")
    torch.testing.assert_close(other.get_logits(IDS), changed)


def test_experts() -> None:
    model = LanguageModel(build("mixtral"))
    with model.trace(IDS) as tracer:
        box = model.layers[1].expert_out.save()
    found, data = sent(tracer)
    assert b"derived.expert_out" in data
    torch.testing.assert_close(found[0], box.value)


def rewritten(data: bytes, change: Any) -> bytes:
    """The same file with other JSON."""
    from safetensors.torch import load, save

    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    (key,) = metadata
    document = json.loads(metadata[key])
    change(document)
    return save(load(data), {key: json.dumps(document)})


def test_bytes_of_strangers() -> None:
    model = LanguageModel(build("llama"))
    with model.trace(IDS) as tracer:
        model.layers[1].ln1_scale.save()
    data = pack(tracer.graph)
    written = json.dumps(str(data))
    assert "derived.with_norm" in written

    def unknown(document: Any) -> None:
        for node in document["graph"]["nodes"]:
            if node["target"] == "derived.with_norm":
                node["target"] = "derived.with_harm"

    with pytest.raises(GraftworkError, match=r"derived\.with_harm"):
        unpack(rewritten(data, unknown))

    def function(document: Any) -> None:
        for node in document["graph"]["nodes"]:
            if node["target"] == "derived.with_norm":
                node["args"][-1] = {"operation": "operator.add"}

    with pytest.raises(GraftworkError, match="is not a value"):
        unpack(rewritten(data, function))
    with pytest.raises(GraftworkError):
        unpack(data[:50])


def test_a_declared_operation_can_be_sent() -> None:
    operation = declare("test.double", Operation("double", lambda value: value * 2))
    try:
        assert name_of(operation) == "test.double" and operations()["test.double"] is operation
    finally:
        from graftwork.tracing import allow_list

        del allow_list._OWN["test.double"]
        allow_list.operations.cache_clear()
        allow_list._names.cache_clear()
    assert name_of(operation) is None
