"""Owns the evaluation of a model over data: loss, perplexity, and accuracies of the next token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..models import LanguageModel
from ..tracing.proxy import apply
from .data import TokenBatch
from .errors import PruningError
from .forwards import Forwards

#: Share of the tokens that a masked language model has to find, and what stands in their place:
#: the mask, another token, or (the rest) themselves. Source: Devlin et al., "BERT", 2018, section 3.1.
_MASKED, _BY_MASK, _BY_OTHER = 0.15, 0.8, 0.1
#: Predictions that are measured at once.
_PART = 256


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model makes of data. Shares are 0 to 1; None where no token is scored.

    Attributes:
        tokens: tokens that were predicted.
        loss: mean cross-entropy of a token, in nats.
        base: top-1 accuracy.
        topk: top-k accuracy.
        skip, topk_skip: both over the tokens that are not among the most frequent ones.
        skip_tokens: how many those are.
    """

    tokens: int
    loss: float | None
    base: float | None
    topk: float | None
    skip: float | None
    topk_skip: float | None
    skip_tokens: int

    @property
    def perplexity(self) -> float | None:
        """exp(loss); infinite where that is larger than a float."""
        if self.loss is None:
            return None
        return math.exp(self.loss) if self.loss < 709 else math.inf

    def row(self) -> dict[str, float | None]:
        """For a history."""
        names = "loss", "perplexity", "base", "topk", "skip", "topk_skip"
        return {name: getattr(self, name) for name in names}


def token_measures(logits: torch.Tensor, targets: torch.Tensor, k: int) -> torch.Tensor:
    """Of predictions, the loss in nats, and whether the target is first and among the first k.

    The rank of a target counts larger logits, and equal ones of a smaller id, as `argmax` does.

    Args:
        logits: [prediction, vocabulary].
        targets: token ids [prediction].
        k: 1 or more.

    Returns:
        float64 [3, prediction].
    """
    logits = logits.float()
    own = logits.gather(1, targets[:, None])
    loss = (logits.logsumexp(1) - own[:, 0]).double()
    ids = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > own) | ((logits == own) & (ids < targets[:, None]))
    rank = before.sum(1)
    return torch.stack([loss, (rank < 1).double(), (rank < k).double()])


def frequent_tokens(batches: Iterable[TokenBatch], count: int) -> torch.Tensor:
    """The `count` most frequent tokens among those that are scored; ties go to smaller ids.

    Returns:
        ids [token], the most frequent first; fewer where there are fewer.
    """
    counts: dict[int, int] = {}
    for batch in batches:
        ids, times = torch.unique(batch.ids[batch.scored], return_counts=True)
        for token, often in zip(ids.tolist(), times.tolist(), strict=True):
            counts[token] = counts.get(token, 0) + often
    ranked = sorted(counts, key=lambda token: (-counts[token], token))
    return torch.tensor(ranked[:count], dtype=torch.long)


class Evaluator:
    """Sums of measures, batch by batch.

    Args:
        skip: token ids that the second accuracies leave out.
        k: of the top-k accuracy.
        seed: of the tokens that a masked language model has to find.
    """

    def __init__(self, model: LanguageModel, skip: torch.Tensor, k: int, seed: int) -> None:
        if model.config.is_encoder_decoder:
            raise PruningError("encoder-decoder models predict no next token of a text.")
        self._model = model
        self._skip = skip
        self._k = k
        self._masked = type(model.module_tree()).__name__.endswith("ForMaskedLM")
        self._generator = torch.Generator().manual_seed(seed)
        self._forwards = Forwards(model, self._record)
        # Where predictions of the present batch are read, and what they should be: both flat.
        self._places = self._targets = torch.empty(0, dtype=torch.long)
        self._sums = torch.zeros(7, dtype=torch.float64)

    def add(self, batch: TokenBatch) -> None:
        """Run the model on a batch and add what it makes of the scored tokens."""
        scored, inputs = batch.scored, batch.inputs()
        if self._masked:
            scored, inputs["input_ids"] = self._hide(batch)
        if not bool(scored.any()):
            return
        self._targets = batch.ids[scored]
        self._places = scored.flatten().nonzero().flatten() - (0 if self._masked else 1)
        (measures,) = self._forwards(inputs)
        measures = measures.cpu()
        rare = ~torch.isin(self._targets, self._skip)
        self._sums += torch.cat(
            [
                torch.tensor([measures.shape[1]]),
                measures.sum(1),
                torch.tensor([int(rare.sum())]),
                measures[1:, rare].sum(1),
            ]
        )

    def _record(self) -> list[Any]:
        return [apply(self._measure, self._model.logits).save()]

    def _measure(self, logits: torch.Tensor) -> torch.Tensor:
        """Of logits [batch, token, vocabulary], the measures of what is scored [3, prediction]."""
        places, targets = self._places.to(logits.device), self._targets.to(logits.device)
        rows = logits.flatten(0, 1)
        # In parts: of a large vocabulary, each further copy of the logits would be felt.
        parts = zip(torch.split(places, _PART), torch.split(targets, _PART), strict=True)
        return torch.cat([token_measures(rows[p], t, self._k) for p, t in parts], 1)

    def _hide(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens a masked language model has to find, bool [row, token], and what it sees."""
        tokenizer, ids = self._model.tokenizer, batch.ids.clone()
        mask = getattr(tokenizer, "mask_token_id", None)
        if mask is None:
            raise PruningError(
                "a masked language model is evaluated with a tokenizer that has a mask."
            )
        draw, how = torch.rand(2, *ids.shape, generator=self._generator)
        other = torch.randint(self._model.cfg.d_vocab, ids.shape, generator=self._generator)
        special = torch.tensor(sorted(set(getattr(tokenizer, "all_special_ids", ()))))
        chosen = (draw < _MASKED) & batch.mask & ~torch.isin(ids, special)
        ids[chosen & (how < _BY_MASK)] = mask
        swapped = chosen & (how >= _BY_MASK) & (how < _BY_MASK + _BY_OTHER)
        ids[swapped] = other[swapped]
        return chosen, ids

    def result(self) -> Evaluation:
        """The means of all that was added."""
        tokens, *of_all, rare, skip, topk_skip = self._sums.tolist()
        loss, base, topk = (total / tokens if tokens else None for total in of_all)
        return Evaluation(
            tokens=int(tokens),
            loss=loss,
            base=base,
            topk=topk,
            skip=skip / rare if rare else None,
            topk_skip=topk_skip / rare if rare else None,
            skip_tokens=int(rare),
        )


def evaluate(
    model: LanguageModel,
    batches: Sequence[TokenBatch],
    *,
    k: int = 10,
    skip_frequent: int = 50,
    seed: int = 0,
    progress: bool = True,
    name: str = "",
) -> Evaluation:
    """Loss and accuracies over data; padding is not counted.

    A causal model predicts each token from those before it, so the first of a row is not scored; of a
    document with an answer, the answer alone is. A masked language model finds 15 % of the tokens.

    Args:
        model: with a head; its edits are in effect.
        batches: token batches; kept, as they are gone through twice.
        k: of the top-k accuracy.
        skip_frequent: the second accuracies leave out that many of the most frequent scored tokens.
        seed: of the tokens that a masked language model has to find.
        progress: show a bar if it takes longer than two seconds.
        name: in the bar.
    """
    evaluator = Evaluator(model, frequent_tokens(batches, skip_frequent), k, seed)
    bar = tqdm(batches, f"evaluating {name}".strip(), disable=not progress, delay=2, leave=False)
    for batch in bar:
        evaluator.add(batch)
    return evaluator.result()
