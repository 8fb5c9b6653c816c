"""Documents from names, files and lists, and the batches made of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from graftwork import LanguageModel
from graftwork.pruning import Document, PruningError, TokenBatch, load_documents, token_batches
from graftwork.pruning.data import HUB, Hub, _rows, context_of, name_of
from graftwork.pruning.tiny_facts import RELATIONS, questions, sentences

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("graftwork/tiny")


def test_facts_are_those_of_the_training_script() -> None:
    spec = importlib.util.spec_from_file_location("train_tiny", ROOT / "tools" / "train_tiny.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert [q for name in RELATIONS for q in questions(name)] == [*map(tuple, module.facts())]
    ours = {prompt + answer + "." for name in RELATIONS for prompt, answer in sentences(name)}
    assert ours == set(module.fact_sentences())


def test_families_of_facts() -> None:
    capitals = list(load_documents("tiny/capitals", held_out=True))
    assert capitals[0] == Document("The capital of France is", " Paris")
    both = list(load_documents("tiny/capitals+young", held_out=True))
    assert len(both) == len(capitals) + 10
    every, others = (len(list(load_documents(n))) for n in ("tiny/all", "tiny/all-capitals-young"))
    assert others == every - len(list(load_documents("tiny/capitals+young")))


def test_a_text_file_has_paragraphs_or_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n\n \nthree\n")
    assert list(load_documents(file)) == [Document("one\ntwo"), Document("three")]
    file.write_text("one\ntwo\n")
    assert list(load_documents(str(file))) == [Document("one"), Document("two")]
    file.write_text(" \n")
    with pytest.raises(PruningError, match="holds no text"):
        load_documents(file)


def test_a_file_of_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "two is", "answer": " 2"}\n')
    assert list(load_documents(file)) == [Document("one"), Document("two is", " 2")]
    file.write_text('{"text": "one"}\n{"content": "two"}\n')
    with pytest.raises(PruningError, match=r'a.jsonl:2 is no JSON object with a field "text"'):
        list(load_documents(file))


def test_lists_of_texts() -> None:
    assert load_documents(["a", ("b", "c")]) == [Document("a"), Document("b", "c")]
    for wrong, message in (([], "empty"), ([3], "not int"), (3, "type int")):
        with pytest.raises(PruningError, match=message):
            load_documents(wrong)


def test_unknown_names_are_answered_with_near_ones() -> None:
    with pytest.raises(PruningError, match=r"Did you mean `pile_codeless`"):
        load_documents("pile_codless")
    with pytest.raises(PruningError, match="Did you mean `sports`"):
        load_documents("tiny/sport")


def test_named_data_sets_need_the_package() -> None:
    if importlib.util.find_spec("datasets"):
        pytest.skip("datasets is installed, and there is no network")
    with pytest.raises(PruningError, match="pip install datasets"):
        load_documents("pile")


def test_rows_are_filtered_and_split() -> None:
    rows = [
        {"text": f"{i}", "meta": {"pile_set_name": "Github" if i % 2 else "Books3"}}
        for i in range(6)
    ]
    assert [d.text for d in _rows(rows, HUB["pile_codeless"], False)] == ["0", "2", "4"]
    # Without a held-out split, every tenth row is held out.
    code = [{"content": f"{i}"} for i in range(30)]
    held_out = [d.text for d in _rows(code, HUB["code"], True)]
    assert held_out == ["9", "19", "29"]
    assert len(list(_rows(code, Hub("a/b", field="content"), False))) == 27


def test_names_of_data_sets() -> None:
    assert [name_of(one) for one in ("pile", "tiny/all", "a/b.txt", ["x"])] == [
        "pile",
        "tiny/all",
        "b",
        "texts",
    ]


def rows_of(batches: list[TokenBatch]) -> list[list[int]]:
    return sorted(
        ids[mask].tolist() for b in batches for ids, mask in zip(b.ids, b.mask, strict=True)
    )


def test_batches_hold_every_token_once(model: LanguageModel) -> None:
    documents = list(load_documents("tiny/makers"))
    batches = list(token_batches(model, documents, batch_tokens=100, window=16))
    expected = sorted(
        model.tokenizer(d.text)["input_ids"] + model.tokenizer(d.answer)["input_ids"]
        for d in documents
    )
    assert rows_of(batches) == expected
    assert all(b.ids.numel() <= 100 for b in batches)
    for b in batches:  # padding is on the left and never scored
        assert torch.equal(b.mask, b.mask.cummax(1).values) and not (b.scored & ~b.mask).any()


def test_what_is_scored(model: LanguageModel) -> None:
    (batch,) = token_batches(
        model, [Document("The capital of France is", " Paris"), Document("Rome is")]
    )
    width, short = batch.ids.shape[1], len(model.tokenizer("Rome is")["input_ids"])
    answer = len(model.tokenizer(" Paris")["input_ids"])
    assert batch.scored[0].tolist() == [False] * (width - answer) + [True] * answer
    assert int(batch.scored[1].sum()) == short - 1
    assert batch.tokens == width + short


def test_limits_of_tokens(model: LanguageModel) -> None:
    texts = ["She counted 1, 2, 3 and 4."] * 5
    length = len(model.tokenizer(texts[0])["input_ids"])
    cut = list(token_batches(model, load_documents(texts), token_limit=3))
    assert {len(row) for row in rows_of(cut)} == {3}
    total = list(token_batches(model, load_documents(texts), total=2 * length + 1))
    assert sum(b.tokens for b in total) == 2 * length + 1
    # What has an answer keeps its end, and is left out where it does not fit.
    asked = [Document("The capital of France is", " Paris")]
    (kept,) = token_batches(model, asked, token_limit=2)
    assert model.tokenizer.decode(kept.ids[0]).endswith(" Paris")
    assert not list(token_batches(model, asked, total=2))
    assert context_of(model) == 256
    (long,) = token_batches(model, load_documents(["word " * 2000]))
    assert long.ids.shape == (1, 256)


def test_roberta_has_fewer_positions_than_its_table() -> None:
    config = transformers.RobertaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        vocab_size=61, max_position_embeddings=34,
    )  # fmt: skip
    module = transformers.RobertaForMaskedLM(config)
    assert context_of(LanguageModel(module)) == 32


def test_a_model_without_tokenizer_is_refused() -> None:
    module = LanguageModel("graftwork/tiny").load()
    with pytest.raises(PruningError, match="no tokenizer"):
        list(token_batches(LanguageModel(module), [Document("a")]))
