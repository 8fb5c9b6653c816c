"""Losses and accuracies against formulas written by hand, on runs of each row alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from graftwork import LanguageModel
from graftwork.pruning import Document, PruningError, TokenBatch, evaluate, token_batches
from graftwork.pruning.evaluation import Evaluation, frequent_tokens, token_measures

from .test_statistics import MODELS, batches, build

TEXTS = ["She counted 1, 2, 3 and 4.", "The old dog saw the cat in the park.", "Big Ben is in"]


def expected(module: Any, data: list[TokenBatch], k: int, skip: int) -> dict[str, float]:
    """In numpy, each row alone and without padding."""
    losses, ranks, targets = [], [], []
    for batch in data:
        for ids, mask, scored in zip(batch.ids, batch.mask, batch.scored, strict=True):
            own, asked = ids[mask], scored[mask]
            with torch.no_grad():
                logits = module(input_ids=own[None]).logits[0].double().numpy()
            for place in range(1, len(own)):
                if asked[place]:
                    row, target = logits[place - 1], int(own[place])
                    losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[target])
                    ranks.append(int((row > row[target]).sum()))
                    targets.append(target)
    often = sorted(Counter(targets).items(), key=lambda pair: (-pair[1], pair[0]))[:skip]
    rare = [r for r, t in zip(ranks, targets, strict=True) if t not in dict(often)]
    return {
        "loss": float(np.mean(losses)),
        "base": float(np.mean([r == 0 for r in ranks])),
        "topk": float(np.mean([r < k for r in ranks])),
        "skip": float(np.mean([r == 0 for r in rare])),
        "topk_skip": float(np.mean([r < k for r in rare])),
        "tokens": len(ranks),
        "skip_tokens": len(rare),
    }


@pytest.mark.parametrize("rows", [10, 10_000])
def test_evaluation_is_that_of_rows_alone(rows: int) -> None:
    model = LanguageModel("graftwork/tiny")
    documents = [*map(Document, TEXTS), Document("The capital of France is", " Paris")]
    data = list(token_batches(model, documents, batch_tokens=rows))
    found = evaluate(model, data, k=3, skip_frequent=2)
    for name, value in expected(model.load(), data, 3, 2).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4), name
    assert found.perplexity == pytest.approx(math.exp(found.loss or 0))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != "roberta"])
def test_padding_is_not_counted(name: str) -> None:
    module, model = build(name)
    data = batches([[9, 4], [7, 7], [11]])
    for batch in data:  # the first token of a row has nothing before it
        first = batch.mask.int().argmax(1)
        batch.scored[range(len(first)), first] = False
    found = evaluate(model, data, k=5, skip_frequent=4)
    for key, value in expected(module, data, 5, 4).items():
        assert getattr(found, key) == pytest.approx(value, rel=1e-4), key


class Masks:
    """What an evaluation asks of the tokenizer of a masked language model."""

    mask_token_id = 3
    all_special_ids = (0, 1, 2, 3)


def test_a_masked_model_finds_hidden_tokens() -> None:
    module, _ = build("roberta")
    data = batches([[30] * 8] * 4)
    model = LanguageModel(module, tokenizer=Masks())
    one, same, other = (evaluate(model, data, seed=seed) for seed in (1, 1, 2))
    assert one == same and one != other
    assert 0.1 < one.tokens / (30 * 32) < 0.2
    # Nothing was learned: about as good as a guess.
    assert one.loss == pytest.approx(math.log(61), rel=0.1)
    with pytest.raises(PruningError, match="tokenizer that has a mask"):
        evaluate(LanguageModel(module), data)


def test_equal_logits_are_ranked_by_id() -> None:
    loss, first, among = token_measures(torch.zeros(3, 8), torch.tensor([0, 1, 7]), 2)
    assert first.tolist() == [1, 0, 0] and among.tolist() == [1, 1, 0]
    assert loss.tolist() == pytest.approx([math.log(8)] * 3)


def test_frequent_tokens_are_counted_where_they_are_scored() -> None:
    ids = torch.tensor([[5, 5, 5, 7, 7, 9, 8]])
    scored = torch.tensor([[False, False, True, True, True, True, True]])
    batch = TokenBatch(ids, torch.ones_like(scored), scored)
    assert frequent_tokens([batch], 3).tolist() == [7, 5, 8]
    assert frequent_tokens([], 3).tolist() == []


def test_without_scored_tokens_nothing_is_known() -> None:
    model = LanguageModel("graftwork/tiny")
    (batch,) = token_batches(model, [Document(" Paris")])
    found = evaluate(model, [batch])
    assert found == Evaluation(0, None, None, None, None, None, 0) and found.perplexity is None
    assert Evaluation(1, 1e6, 0, 0, None, None, 0).perplexity == math.inf
