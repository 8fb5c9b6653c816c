"""Owns `History`: the results of a pruning run as a table, one row a step."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import PruningError

_FIRST = ("step", "ff_del", "attn_del", "ff_threshold", "attn_threshold")
# The longer ones first, as they are looked for at the end of names.
_MEASURES = ("topk_skip", "skip", "topk", "base", "perplexity", "loss")


class History(Sequence[Mapping[str, Any]]):
    """Results after each step; step 0 is before anything was deleted.

    A row has `step`; `ff_del` and `attn_del`, how many neurons have been deleted so far; `ff_threshold`
    and `attn_threshold`, the lowest score that this step deleted; and for each data set what
    `Evaluation` has, as `code_loss`, `code_perplexity`, `code_base`, `code_topk`, `code_skip`,
    `code_topk_skip`. What is not known is None.

    Attributes:
        rows: the table.
    """

    def __init__(self, rows: Sequence[dict[str, Any]] = ()) -> None:
        self.rows: list[dict[str, Any]] = list(rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __eq__(self, other: object) -> bool:
        return self.rows == other.rows if isinstance(other, History) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    @property
    def columns(self) -> list[str]:
        found = dict.fromkeys(_FIRST)
        for row in self.rows:
            found.update(dict.fromkeys(row))
        return list(found)

    def column(self, name: str) -> list[Any]:
        """The values of one column, row by row.

        Raises:
            PruningError: there is no such column.
        """
        if name not in self.columns:
            raise PruningError.unknown("column of this history", name, self.columns)
        return [row.get(name) for row in self.rows]

    def __str__(self) -> str:
        names = [name for name in self.columns if any(r.get(name) is not None for r in self.rows)]
        parts = [_parts(name) for name in names]
        # A data set stands once, above its columns.
        above = [
            part[0] if not number or parts[number - 1][0] != part[0] else ""
            for number, part in enumerate(parts)
        ]
        table = [[part[1] for part in parts]]
        table += [[_text(name, row.get(name)) for name in names] for row in self.rows]
        widths = [max(len(line[i]) for line in table) for i in range(len(names))]
        starts = [sum(widths[:i]) + 2 * i for i in range(len(names) + 1)]
        begins = [i for i, name in enumerate(above) if name]
        first = ""
        for i, after in zip(begins, [*begins[1:], len(names)], strict=True):
            room = starts[after] - starts[i] - 2
            name = above[i] if len(above[i]) <= room else above[i][: room - 1] + "…"
            first = first.ljust(starts[i]) + name
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in table
        ]
        return "\n".join([first, *lines])

    def __repr__(self) -> str:
        return f"History of {len(self.rows)} rows\n{self}"

    def to_csv(self, file: str | os.PathLike[str] | None = None) -> str:
        """The table as CSV, exact; what is not known is empty.

        Args:
            file: also written there.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        if file is not None:
            Path(file).write_text(text.getvalue(), encoding="utf-8")
        return text.getvalue()

    def plot(self, columns: Sequence[str] | None = None) -> Any:
        """Draw columns over the neurons deleted so far, by matplotlib.

        Args:
            columns: default the top-1 accuracies of all data sets.

        Returns:
            The figure.

        Raises:
            PruningError: matplotlib is not installed, or there is no such column.
        """
        try:
            from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            raise PruningError.missing_package("matplotlib", "drawing a history") from None
        deleted = [row["ff_del"] + row["attn_del"] for row in self.rows]
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        for name in columns or [name for name in self.columns if name.endswith("_base")]:
            axes.plot(deleted, [float("nan") if y is None else y for y in self.column(name)], "o-")
            axes.lines[-1].set_label(name)
        axes.set_xlabel("neurons deleted")
        axes.legend()
        return figure


def _parts(name: str) -> tuple[str, str]:
    """The data set of a column, "" for none, and what it says of it."""
    for measure in _MEASURES:
        if name.endswith(f"_{measure}"):
            return name.removesuffix(f"_{measure}"), measure
    return "", name


def _text(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float) and name.endswith(("_base", "_topk", "_skip")):
        return f"{100 * value:.1f} %"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
