"""Owns data sets: texts by name, from files or as they are given, and token batches made of them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..models import LanguageModel
from ..models.architectures import IDS, padding_of
from .errors import PruningError
from .tiny_facts import RELATIONS, questions, sentences


class Document(NamedTuple):
    """A text; if it has an answer, only the answer's tokens are scored by an evaluation."""

    text: str
    answer: str = ""


class Hub(NamedTuple):
    """A data set of the Hugging Face hub, read as a stream through the package `datasets`.

    Attributes:
        repo, subset: on the hub.
        field: of a row that holds the text.
        split: statistics are collected over it.
        held_out: split that is evaluated; None where there is none: then every tenth row of `split`
            is evaluated and the others are collected over.
        keep: rows that belong to it; None for all.
    """

    repo: str
    subset: str | None = None
    field: str = "text"
    split: str = "train"
    held_out: str | None = None
    keep: Callable[[dict[str, Any]], bool] | None = None


def _no_code(row: dict[str, Any]) -> bool:
    return row["meta"]["pile_set_name"] != "Github"  # type: ignore[no-any-return]


#: Names of data sets on the hub. Any other hub id can be had as `hub:owner/name`.
HUB: dict[str, Hub] = {
    "pile": Hub("monology/pile-uncopyrighted", held_out="test"),
    "pile_codeless": Hub("monology/pile-uncopyrighted", held_out="test", keep=_no_code),
    "code": Hub("codeparrot/codeparrot-clean", field="content"),
    "wiki": Hub("Salesforce/wikitext", "wikitext-103-raw-v1", held_out="test"),
    "c4": Hub("allenai/c4", "en", held_out="validation"),
    "stories": Hub("roneneldan/TinyStories", held_out="validation"),
    "civil": Hub(
        "google/civil_comments", held_out="test", keep=lambda row: bool(row["toxicity"] <= 0.2)
    ),
    "toxic": Hub(
        "google/civil_comments", held_out="test", keep=lambda row: bool(row["toxicity"] >= 0.8)
    ),
    "bio": Hub("camel-ai/biology", field="message_2"),
}
_TINY = "tiny/"


def name_of(data: Any, other: str = "texts") -> str:
    """What a data set is called in a history.

    Args:
        other: for texts that have no name.
    """
    if not isinstance(data, (str, os.PathLike)):
        return other
    name = os.fspath(data)
    return name if name in HUB or name.startswith((_TINY, "hub:")) else Path(name).stem


def load_documents(data: Any, held_out: bool = False) -> Iterable[Document]:
    """The documents of a data set.

    Args:
        data: one of these:
            a name: pile, pile_codeless (the pile without GitHub), code (codeparrot), wiki, c4, stories
                (TinyStories), civil and toxic (civil comments), bio, or `hub:owner/name`; they are
                read as streams through the package `datasets`;
            "tiny/capitals", "tiny/capitals+languages", "tiny/all", "tiny/all-sports": facts that the
                packaged model knows, by family;
            a file: `.jsonl` with a field "text" (and perhaps "answer") in each line, else plain text,
                one document a paragraph, or one a line if there are no empty lines;
            a list of strings or of `Document`s.
        held_out: for evaluation: the held-out split of a named data set, and the facts of the packaged
            model as questions. Files and lists have the same documents for both.

    Raises:
        PruningError: there is no such data set or file, or `datasets` is not installed.
    """
    if isinstance(data, (str, os.PathLike)):
        return _named(os.fspath(data), held_out)
    if isinstance(data, Sequence):
        if not data:
            raise PruningError("the list of texts is empty.")
        return [_document(one) for one in data]
    raise PruningError(
        f"data of type {type(data).__name__} cannot be read: give a name, a file, or a list of strings."
    )


def _document(given: Any) -> Document:
    if isinstance(given, str):
        return Document(given)
    if isinstance(given, tuple) and 1 <= len(given) <= 2 and all(isinstance(x, str) for x in given):
        return Document(*given)
    raise PruningError(f"a text is a string or a Document, not {type(given).__name__}.")


def _named(name: str, held_out: bool) -> Iterable[Document]:
    if name in HUB:
        return _from_hub(HUB[name], held_out)
    if name.startswith("hub:"):
        return _from_hub(Hub(name.removeprefix("hub:")), held_out)
    if name.startswith(_TINY):
        return list(_facts(name.removeprefix(_TINY), held_out))
    path = Path(name)
    if not path.is_file():
        known = [*HUB, *(_TINY + family for family in (*RELATIONS, "all"))]
        raise PruningError.unknown("data set or file", name, known)
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        return _json_lines(path)
    return _paragraphs(path)


def _facts(families: str, held_out: bool) -> Iterator[Document]:
    without = families.removeprefix("all-").split("-") if families.startswith("all-") else []
    names = list(RELATIONS) if without or families == "all" else families.split("+")
    for name in (*names, *without):
        if name not in RELATIONS:
            raise PruningError.unknown("family of facts of graftwork/tiny", name, RELATIONS)
    for name in (name for name in names if name not in without):
        yield from (Document(*fact) for fact in (questions if held_out else sentences)(name))


def _paragraphs(path: Path) -> list[Document]:
    text = path.read_text(encoding="utf-8").strip()
    parts = re.split(r"\n\s*\n", text)
    if len(parts) == 1:
        parts = text.splitlines()
    documents = [Document(part.strip()) for part in parts if part.strip()]
    if not documents:
        raise PruningError(f"`{path}` holds no text.")
    return documents


def _json_lines(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                yield Document(str(row["text"]), str(row.get("answer", "")))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise PruningError(
                    f'{path}:{number} is no JSON object with a field "text" ({error!r}).'
                ) from error


def _from_hub(hub: Hub, held_out: bool) -> Iterator[Document]:
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise PruningError.missing_package("datasets", f"the data set {hub.repo}") from None
    split = hub.held_out if held_out and hub.held_out else hub.split
    rows = datasets.load_dataset(hub.repo, hub.subset, split=split, streaming=True)
    return _rows(rows, hub, held_out)


def _rows(rows: Iterable[dict[str, Any]], hub: Hub, held_out: bool) -> Iterator[Document]:
    """The documents of a split."""
    for number, row in enumerate(rows):
        if hub.held_out is None and (number % 10 == 9) is not held_out:
            continue
        if (hub.keep is None or hub.keep(row)) and row[hub.field].strip():
            yield Document(row[hub.field])


# -------------------------------------------------------------------------------------- tokens


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens, padded on the left.

    Attributes:
        ids: [row, token].
        mask: bool [row, token], False for padding.
        scored: bool [row, token], True for tokens whose prediction an evaluation scores.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    scored: torch.Tensor

    @property
    def tokens(self) -> int:
        """Without padding."""
        return int(self.mask.sum())

    def inputs(self) -> dict[str, torch.Tensor]:
        """As a prompt of a block."""
        return {"input_ids": self.ids, "attention_mask": self.mask.long()}


class _Row(NamedTuple):
    ids: list[int]
    answer: int  # tokens of the answer at the end; 0 without one


def context_of(model: LanguageModel) -> int | None:
    """Most tokens of a row that the model's configuration allows; None where it names none."""
    limit = model.cfg.n_ctx
    if limit is not None and padding_of(model.config) == IDS:
        limit -= (model.config.pad_token_id or 0) + 1  # RoBERTa counts positions from there
    return limit


def token_batches(
    model: LanguageModel,
    documents: Iterable[Document],
    *,
    total: int | None = None,
    token_limit: int | None = None,
    batch_tokens: int = 2048,
    window: int = 1024,
) -> Iterator[TokenBatch]:
    """Documents as batches of rows, one document a row. Rows of like lengths share a batch.

    Args:
        model: its tokenizer reads the texts.
        total: stop when there are that many tokens, padding not counted; the last document is cut to
            fit. None: all.
        token_limit: longest row; a longer document is cut at its end, one with an answer at its start.
            None, or more than the model holds: what the model holds.
        batch_tokens: tokens of one batch, padding included; a longer row is a batch of its own.
        window: documents that are read ahead and sorted by length; memory grows with it.

    Raises:
        PruningError: the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise PruningError(
            "the model has no tokenizer, so texts cannot be read: give PruningConfig(tokenizer=...) "
            "or LanguageModel(..., tokenizer=...)."
        )
    limits = [limit for limit in (token_limit, context_of(model)) if limit is not None]
    pads = padding_of(model.config) is not None
    fill = model.tokenizer.pad_token_id
    if fill is None or padding_of(model.config) == IDS:
        fill = model.config.pad_token_id
    rows = _tokenized(model.tokenizer, documents, min(limits, default=None), total)
    while ahead := list(islice(rows, window)):
        ahead.sort(key=lambda row: -len(row.ids))
        start = 0
        while start < len(ahead):
            width = len(ahead[start].ids)
            left = len(ahead) - start
            if not pads:
                left = sum(len(row.ids) == width for row in ahead[start:])
            # Powers of two: what was recorded for a shape runs again.
            count = 1 << (max(1, min(left, batch_tokens // width)).bit_length() - 1)
            yield _padded(ahead[start : start + count], fill or 0)
            start += count


def _tokenized(
    tokenizer: Any, documents: Iterable[Document], limit: int | None, total: int | None
) -> Iterator[_Row]:
    left = total
    for document in documents:
        if left is not None and left <= 0:
            return
        ids = list(tokenizer(document.text, verbose=False)["input_ids"])
        answer: list[int] = []
        if document.answer:
            answer = list(tokenizer(document.answer, add_special_tokens=False)["input_ids"])
        room = min((n for n in (limit, left) if n is not None), default=None)
        row = ids + answer
        if room is not None and len(row) > room:
            if answer and left is not None and room == left and room != limit:
                return  # an answer without its question says nothing
            row = row[-room:] if answer else row[:room]
        if not row:
            continue
        if left is not None:
            left -= len(row)
        yield _Row(row, min(len(answer), len(row)))


def _padded(rows: list[_Row], fill: int) -> TokenBatch:
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    scored = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        start = width - len(row.ids)
        ids[number, start:] = torch.tensor(row.ids)
        mask[number, start:] = True
        # Nothing comes before the first token that could predict it.
        scored[number, max(start + 1, width - row.answer if row.answer else 0) :] = True
    return TokenBatch(ids, mask, scored)
