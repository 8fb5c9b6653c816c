"""Values in a notebook: what is said of them, that it is cheap, and that it is well-formed HTML."""

import sys
import time
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from graftwork import Model
from graftwork.tracing.display import value_html


class Page(HTMLParser):
    """The text and tags of a page whose tags are all closed, in order."""

    EMPTY = frozenset({"rect", "br", "input", "link", "meta"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if treescope were not installed."""
    monkeypatch.setitem(sys.modules, "treescope", None)


VALUES: list[Any] = [
    torch.randn(3, 4),
    torch.randn(2, 3, 4, 5),
    torch.zeros(0, 3),
    torch.tensor(3.0),
    torch.ones(3, 4, dtype=torch.bfloat16),
    torch.ones(3, 3).to(torch.float8_e4m3fn),
    torch.ones(2, dtype=torch.complex64),
    torch.tensor([True, False]),
    torch.ones(4, dtype=torch.uint16),
    torch.tensor([2**62, -1]),
    torch.empty(2, device="meta"),
    torch.full((2, 2), float("nan")),
    torch.full((2, 2), float("-inf")),
    nn.Parameter(torch.ones(2, 2)),
    torch.ones(3, 4).T,
    torch.ones(1).expand(3, 4),
    torch.ones(4, 2).max(0),
    (torch.ones(2), None, {"<a>": [1, "<b>x</b>"]}),
    BaseModelOutput(last_hidden_state=torch.ones(2)),
    DynamicCache(),
    [torch.ones(2)] * 100,
    [],
    {},
    slice(1, 2),
    "<script>alert(1)</script>",
    3,
    None,
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_any_value_gives_well_formed_html(value: Any, plain: None) -> None:
    page = Page(value_html(value))
    assert "script" not in page.tags and "b" not in page.tags


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_any_value_is_shown_by_treescope(value: Any) -> None:
    pytest.importorskip("treescope", reason="the extra `notebook` is not installed")
    text = value_html(value)
    assert "treescope" in text and "alert(1)</script>" not in text


def test_sparse_values_are_named(plain: None) -> None:
    assert "torch.sparse_coo" in value_html(torch.eye(2).to_sparse())


def test_treescope_is_given_the_numbers() -> None:
    pytest.importorskip("treescope", reason="the extra `notebook` is not installed")
    text = value_html(torch.arange(12.0).reshape(3, 4))
    assert "Tensor [3, 4] float32 cpu" in text and "mean 5.5" in text
    assert "the first values" not in text
    assert "the first values" in value_html(torch.zeros(1000, 3))


def test_title_and_statistics(plain: None) -> None:
    value = torch.tensor([[1.0, 2.0], [float("nan"), 6.0], [float("inf"), -1.0]])
    page = Page(value_html(value))
    finite = np.array([1.0, 2.0, 6.0, -1.0])
    assert "Tensor [3, 2] float32 cpu" in page.text
    assert f"min -1, mean 2, max 6, std {finite.std(ddof=1):.4g}, 1 NaN, 1 inf" in page.text
    assert "2 of 3 true" in Page(value_html(torch.tensor([True, True, False]))).text
    assert "requires_grad" in Page(value_html(nn.Parameter(torch.ones(1)))).text
    assert "empty" in value_html(torch.zeros(0)) and "no data" in value_html(VALUES[10])


def test_picture_has_a_square_for_each_of_the_first_values(plain: None) -> None:
    page = Page(value_html(torch.tensor([[1.0, -2.0], [0.0, float("nan")]])))
    assert page.tags.count("rect") == 4
    text = value_html(torch.tensor([[1.0, -2.0], [0.0, float("nan")]]))
    assert 'fill="#d6604d" fill-opacity="0.50"' in text and 'fill-opacity="1.00"' in text
    assert "<title>nan</title>" in text
    assert Page(value_html(torch.randn(4, 300, 300))).tags.count("rect") == 8 * 32


def test_numbers_of_a_corner(plain: None) -> None:
    page = Page(value_html(torch.arange(1000.0).reshape(10, 100)))
    numbers = page.text.partition("numbers")[2]
    rest = numbers.index("… 976 more values")
    expected = [float(100 * row + column) for row in range(4) for column in range(6)]
    assert [float(number) for number in numbers[:rest].split()] == expected


@pytest.mark.parametrize("shape", [(20_000_000,), (2000, 10_000), (1, 1, 20_000_000)])
def test_a_huge_value_is_cheap(shape: tuple[int, ...], plain: None) -> None:
    value = torch.zeros(shape)
    for tensor in (value, value.mT if value.ndim > 1 else value[::2]):
        start = time.perf_counter()
        text = value_html(tensor)
        assert time.perf_counter() - start < 0.5
        assert len(text) < 50_000
        assert "of every" in text or "of the first" in text


def test_structures_are_folded_and_cut(plain: None) -> None:
    page = Page(value_html({"hidden": torch.ones(2, 3), "many": list(range(500))}))
    assert "'hidden'" in page.text and "dict of 2" in page.text and "… and 450 more" in page.text
    deep: Any = 1
    for _ in range(200):
        deep = (deep,)
    assert Page(value_html(deep)).tags.count("details") < 10


def test_saved_value_shows_itself_after_the_run(toy: Model, x: torch.Tensor, plain: None) -> None:
    with toy.trace(x) as tracer:
        unsaved = toy.mid.output
        saved = unsaved.save()
        before = len(tracer.graph)
        text = saved._repr_html_()
        assert "<code>&lt;proxy of `mid.output`, saved, recorded at" in text
        assert Page(unsaved._repr_html_()).text.startswith("<proxy of `mid.output`")
        assert len(tracer.graph) == before
    assert "Tensor [2, 5, 8] float32 cpu" in saved._repr_html_()
    with toy.trace(x):
        other = toy.mid.output
    assert "proxy of `mid.output`" in other._repr_html_()


def test_saved_tuple_shows_its_parts(toy: Model, x: torch.Tensor, plain: None) -> None:
    with toy.trace(x):
        saved = toy.nes.output.save()
    page = Page(saved._repr_html_())
    assert "tuple of 2" in page.text and "'deep'" in page.text
    assert page.text.count("Tensor [2, 5, 8]") == 2
