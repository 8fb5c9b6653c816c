"""Containers are walked and rebuilt without losing their types."""

import dataclasses
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from graftwork.tracing.structure import children, leaves, map_leaves, rebuild, snapshot, summary

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True)
class Frozen:
    hidden: Any
    text: str = "text"


class Words(list):
    """A list with something of its own."""


T = torch.arange(3.0)

CONTAINERS = [
    (T, 1),
    [T, [T, None]],
    {"a": T, "b": (T,)},
    Pair(T, "x"),
    OrderedDict(a=T),
    defaultdict(list, a=T),
    Frozen(T),
    Words([T]),
    BaseModelOutput(last_hidden_state=T),
    CausalLMOutputWithPast(logits=T, hidden_states=(T, T)),
    slice(None, T, 2),
    torch.return_types.max((T, T.long())),
    T,
    3,
    None,
    "text",
]


@pytest.mark.parametrize("value", CONTAINERS, ids=lambda v: type(v).__name__)
def test_untouched_container_keeps_its_identity(value: Any) -> None:
    assert map_leaves(lambda leaf: leaf, value) is value


@pytest.mark.parametrize("value", CONTAINERS, ids=lambda v: type(v).__name__)
def test_changed_container_keeps_its_type_and_the_original(value: Any) -> None:
    def double(leaf: Any) -> Any:
        return leaf * 2 if isinstance(leaf, torch.Tensor) else leaf

    before = [leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor)]
    changed = map_leaves(double, value)
    after = [leaf for leaf in leaves(changed) if isinstance(leaf, torch.Tensor)]
    assert type(changed) is type(value)
    assert all(torch.equal(a, b * 2) for a, b in zip(after, before, strict=True))
    assert all(
        one is other
        for one, other in zip(
            [leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor)], before, strict=True
        )
    )


@pytest.mark.parametrize("value", CONTAINERS, ids=lambda v: type(v).__name__)
def test_snapshot_shares_no_memory(value: Any) -> None:
    taken = snapshot(value)
    assert type(taken) is type(value)
    for one, other in zip(leaves(taken), leaves(value), strict=True):
        if isinstance(other, torch.Tensor):
            assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()


def test_rebuild_is_the_inverse_of_children() -> None:
    for value in CONTAINERS:
        parts = children(value)
        if parts is not None:
            again = children(rebuild(value, parts))
            assert again is not None
            assert all(a is b for a, b in zip(again, parts, strict=True))


def test_rebuilt_model_output_has_items_and_attributes() -> None:
    output = map_leaves(lambda leaf: leaf + 1, CausalLMOutputWithPast(logits=T))
    assert torch.equal(output.logits, T + 1) and torch.equal(output["logits"], T + 1)
    assert output.to_tuple()[0] is output.logits and output.loss is None


def test_summary_shows_structure_without_numbers() -> None:
    assert summary((T, [None, {"a": T.int()}], "x")) == (
        "([3] float32, [None, dict(a: [3] int32)], str)"
    )
