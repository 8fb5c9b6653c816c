"""Evaluations against loops over the model, and against what the package's own model is known to do."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

from graftwork import LanguageModel
from graftwork.lens.evals import IOIDataset, induction_loss, ioi_eval
from graftwork.lens.hooked_transformer import HookedTransformer
from graftwork.tracing.errors import InputError

from ..models.conftest import build, word_tokenizer


@functools.cache
def tiny() -> HookedTransformer:
    return HookedTransformer.from_pretrained_no_processing("graftwork/tiny")


def own_tokenizer() -> Any:
    return tiny().tokenizer


# -------------------------------------------------------------------- indirect objects


def test_the_same_seed_gives_the_same_sentences() -> None:
    one, again, other = (IOIDataset(own_tokenizer(), 20, seed=seed) for seed in (1, 1, 2))
    assert len(one) == 20 and [s["text"] for s in one] == [s["text"] for s in again]
    assert [s["text"] for s in one] != [s["text"] for s in other]


def test_sentences() -> None:
    for sample in IOIDataset(own_tokenizer(), 30):
        indirect, subject = (own_tokenizer().decode(sample[key]).strip() for key in ("IO", "S"))  # type: ignore[literal-required]
        words = sample["text"].replace(",", "").replace(".", "").split()
        assert words.count(indirect) == 2 and words.count(subject) == 2
        assert words[-1] == indirect and "[" not in sample["text"]
        assert sample["prompt"][0] == own_tokenizer().bos_token_id
        assert own_tokenizer().decode(sample["prompt"][1:]) == sample["text"]


def test_symmetric_sentences_come_in_pairs() -> None:
    dataset = IOIDataset(own_tokenizer(), 11, symmetric=True)
    assert len(dataset) == 11
    for number in range(0, 10, 2):
        one, other = dataset[number], dataset[number + 1]
        assert torch.equal(one["IO"], other["S"]) and torch.equal(one["S"], other["IO"])


def test_sentences_of_the_user() -> None:
    dataset = IOIDataset(
        own_tokenizer(),
        3,
        templates=["[B] and [A] saw a [ANIMAL]. [B] showed it to [A]"],
        names=["Mary", "Zebediah"],
        nouns={"ANIMAL": ["cat"]},
        prepend_bos=False,
    )
    for sample in dataset:
        assert sample["text"].endswith("showed it to Mary") or len(sample["IO"]) > 1
        assert own_tokenizer().decode(sample["prompt"]) == sample["text"]
        assert "saw a cat." in sample["text"]


def test_the_own_model_names_indirect_objects() -> None:
    found = ioi_eval(tiny(), IOIDataset(tiny().tokenizer, 100))
    assert list(found) == ["Logit Difference", "Accuracy"]
    assert found["Accuracy"] > 0.98 and found["Logit Difference"] > 5


@pytest.mark.parametrize("batch_size", [1, 4])
def test_differences_are_those_of_each_sentence_alone(batch_size: int) -> None:
    """Names of several tokens count at the first token that differs."""
    dataset = IOIDataset(tiny().tokenizer, 10, names=["Mary", "Zebediah", "Zebulon", "John"])
    differences = []
    for sample in dataset:
        logits = tiny()(sample["prompt"])[0].detach()
        right, wrong = sample["IO"].tolist(), sample["S"].tolist()
        first = next(i for i, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b)
        place = logits[len(sample["prompt"]) - len(right) + first - 1]
        differences.append(float(place[right[first]] - place[wrong[first]]))
    found = ioi_eval(tiny(), dataset, batch_size=batch_size)
    assert found["Logit Difference"] == pytest.approx(sum(differences) / 10, abs=1e-4)
    assert found["Accuracy"] == pytest.approx(sum(d > 0 for d in differences) / 10)


def test_default_sentences() -> None:
    found = ioi_eval(tiny(), num_samples=12, symmetric=True, seed=3)
    assert found == ioi_eval(tiny(), IOIDataset(tiny().tokenizer, 12, symmetric=True, seed=3))


def test_sentences_that_cannot_be_made() -> None:
    with pytest.raises(InputError, match="two names"):
        IOIDataset(own_tokenizer(), 5, names=["Mary", "Mary"])
    with pytest.raises(InputError, match=r"ends with ` \[A\]`"):
        IOIDataset(own_tokenizer(), 5, templates=["[A] gave a book to [B]"])
    with pytest.raises(InputError, match="no sentences"):
        ioi_eval(tiny(), IOIDataset(own_tokenizer(), 0))


# -------------------------------------------------------------------- induction


def test_the_own_model_repeats() -> None:
    random = HookedTransformer(LanguageModel(build("gpt2"), word_tokenizer()))
    assert induction_loss(tiny(), 32) < 0.1
    assert induction_loss(random, 12) > 3  # log(61) = 4.1


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_induction_loss_by_hand(prepend_bos: bool) -> None:
    model, seen = tiny(), []
    handle = model.module.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True
    )
    found = induction_loss(model, 16, 3, prepend_bos, seed=5)
    again, other = (induction_loss(model, 16, 3, prepend_bos, seed=seed) for seed in (5, 6))
    handle.remove()
    assert found == again != other
    ids = seen[0]
    start = int(prepend_bos)
    assert ids.shape == (3, 32 + start)
    assert torch.equal(ids[:, start : start + 16], ids[:, start + 16 :])
    special = own_tokenizer().eos_token_id
    assert not (ids[:, start:] == special).any()
    assert not prepend_bos or (ids[:, 0] == special).all()
    with torch.no_grad():
        logits = model.module(ids).logits.log_softmax(-1)
    losses = [
        -float(logits[row, place - 1, ids[row, place]])
        for row, place in itertools.product(range(3), range(start + 17, start + 32))
    ]
    assert found == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_induction_needs_room() -> None:
    with pytest.raises(InputError, match="256"):
        induction_loss(tiny(), 200)
    with pytest.raises(InputError, match="2 tokens is the least"):
        induction_loss(tiny(), 1)
    without = HookedTransformer(LanguageModel(build("gpt2")))
    with pytest.raises(InputError, match="prepend_bos=False"):
        induction_loss(without, 8)
    assert induction_loss(without, 8, prepend_bos=False) > 3
