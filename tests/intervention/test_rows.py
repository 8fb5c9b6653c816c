"""One invoke's part of a batched value, against plain slicing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.intervention.rows import (
    BATCH,
    BATCH_TOKEN,
    FIXED,
    TOKEN,
    UNKNOWN,
    Axis,
    Misfit,
    Opaque,
    Place,
    TensorAxes,
    fit,
    narrow,
    splits,
)


def axes(*roles: tuple[str, int]) -> TensorAxes:
    return TensorAxes(tuple(Axis(*role) for role in roles), torch.float32)


HIDDEN = axes((BATCH, 1), (TOKEN, 1), (FIXED, 4))


@settings(deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    each=st.integers(1, 3),
    data=st.data(),
)
def test_a_part_is_the_slice_of_its_rows_and_its_last_tokens(
    counts: list[int], each: int, data: st.DataObject
) -> None:
    width = data.draw(st.integers(1, 6))
    lengths = [data.draw(st.integers(1, width)) for _ in counts]
    rows = sum(counts) * each
    value = torch.randn(rows, width, 4)
    flat = value.reshape(rows * width, 4)
    scores = torch.randn(rows, 2, width, width)
    start = 0
    for count, own in zip(counts, lengths, strict=True):
        place = Place(start, count, own)
        mine = value[start * each : (start + count) * each, width - own :]
        assert torch.equal(narrow(value, HIDDEN, place, rows, each), mine)
        part = narrow(flat, axes((BATCH_TOKEN, 1), (FIXED, 4)), place, rows, each)
        assert torch.equal(part, mine.reshape(-1, 4))
        square = axes((BATCH, 1), (FIXED, 2), (TOKEN, 1), (TOKEN, 1))
        expected = scores[start * each : (start + count) * each, :, width - own :, width - own :]
        assert torch.equal(narrow(scores, square, place, rows, each), expected)
        start += count


def test_an_axis_of_several_entries_a_row() -> None:
    value = torch.arange(12.0).reshape(6, 2)  # three heads for each of two rows
    part = narrow(value, axes((BATCH, 3), (FIXED, 2)), Place(1, 1, 9), 2, 1)
    assert torch.equal(part, value[3:])


def test_a_part_of_a_contiguous_value_is_contiguous() -> None:
    value = torch.randn(3, 5, 4)
    part = narrow(value, HIDDEN, Place(0, 2, 3), 3, 1)
    assert part.is_contiguous()
    assert part.view(-1).shape == (24,)


def test_structures_keep_their_types() -> None:
    value = {"a": (torch.randn(2, 3), None), "b": [torch.randn(2, 5, 4), "text", 7]}
    known = {"a": (axes((BATCH, 1), (FIXED, 3)), None), "b": [HIDDEN, "text", 7]}
    part = narrow(value, known, Place(1, 1, 2), 2, 1)
    assert type(part) is dict and type(part["a"]) is tuple and type(part["b"]) is list
    assert torch.equal(part["a"][0], value["a"][0][1:])
    assert torch.equal(part["b"][0], value["b"][0][1:, -2:])
    assert part["b"][1:] == ["text", 7] and part["a"][1] is None


@pytest.mark.parametrize(
    ("value", "known"),
    [
        (torch.randn(2, 3), None),
        (torch.randn(2, 3), HIDDEN),
        (torch.randn(2, 3), axes((UNKNOWN, 2), (FIXED, 3))),
        (torch.randn(1, 3, 4), HIDDEN),
        (object(), None),
    ],
    ids=["unseen", "other rank", "unknown axis", "other rows", "an object"],
)
def test_what_cannot_be_split_is_opaque(value: Any, known: Any) -> None:
    assert isinstance(narrow(value, known, Place(0, 1, 2), 2, 1), Opaque)


@pytest.mark.parametrize(
    ("known", "padded", "expected"),
    [
        (HIDDEN, True, True),
        (axes((FIXED, 3)), False, False),
        (axes((TOKEN, 1), (FIXED, 3)), True, False),
        (axes((TOKEN, 1), (FIXED, 3)), False, False),
        (axes((BATCH, 1), (TOKEN, 2)), True, False),
        (axes((BATCH, 1), (UNKNOWN, 2)), False, False),
        ((HIDDEN, (None, axes((UNKNOWN, 5)))), False, False),
        ((HIDDEN, {"a": None, "b": 3}), True, True),
    ],
)
def test_which_values_can_be_split(known: Any, padded: bool, expected: bool) -> None:
    assert splits(known, padded) is expected


def test_a_written_value_takes_the_dtype_of_the_place() -> None:
    before = (torch.zeros(2, dtype=torch.float16), None)
    after = (torch.ones(2, dtype=torch.float64), None)
    fitted = fit(before, after)
    assert fitted[0].dtype == torch.float16
    assert fitted[0].tolist() == [1, 1]


@pytest.mark.parametrize(
    "after", [(torch.zeros(3), None), (1.0, None), torch.zeros(2), (torch.zeros(2),)]
)
def test_a_written_value_of_another_structure_is_a_misfit(after: Any) -> None:
    with pytest.raises(Misfit):
        fit((torch.zeros(2), None), after)
