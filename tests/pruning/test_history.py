"""The table of a run."""

from __future__ import annotations

import csv
import importlib.util
import io
from pathlib import Path

import pytest

from graftwork.pruning import History, PruningError

ROWS = [
    {"step": 0, "ff_del": 0, "attn_del": 0, "ff_threshold": None, "attn_threshold": None},
    {"step": 1, "ff_del": 41, "attn_del": 0, "ff_threshold": 2.5, "attn_threshold": None},
]


def history() -> History:
    scores = ({"code_loss": 1.5, "code_base": 0.5}, {"code_loss": 3.25, "code_base": 0.25})
    return History([row | more for row, more in zip(ROWS, scores, strict=True)])


def test_it_reads_as_a_table() -> None:
    assert str(history()).split("\n") == [
        "                                      code",
        "step  ff_del  attn_del  ff_threshold  loss    base",
        "   0       0         0             –   1.5  50.0 %",
        "   1      41         0           2.5  3.25  25.0 %",
    ]


def test_a_long_name_is_cut_above_its_columns() -> None:
    first = str(History([{"step": 0, "x" * 40 + "_base": 0.5, "y_base": 0.5}])).split("\n")[0]
    assert first == "      xxxxx…  y"


def test_a_repr_counts_rows() -> None:
    assert "History of 2 rows" in repr(history())


def test_csv_is_exact(tmp_path: Path) -> None:
    text = history().to_csv(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert rows[0]["ff_threshold"] == "" and float(rows[1]["code_loss"]) == 3.25


def test_columns_and_rows() -> None:
    found = history()
    assert found.column("code_base") == [0.5, 0.25] and len(found) == 2 and found[1]["step"] == 1
    assert found == history() and found != History(ROWS)
    with pytest.raises(PruningError, match="Did you mean `code_loss`"):
        found.column("code_los")


def test_a_plot_needs_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib"):
        (axes,) = history().plot().axes
        assert len(axes.lines) == 1
    else:
        with pytest.raises(PruningError, match="pip install matplotlib"):
            history().plot()
