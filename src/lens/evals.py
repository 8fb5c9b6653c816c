"""Owns evaluations on data that is made on the spot: naming the indirect object, and induction."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import torch

from ..tracing.errors import InputError
from .functions import lm_cross_entropy_loss
from .patching import record_hooks

TEMPLATES = (
    "When [A] and [B] went to the [LOCATION], [B] gave a [OBJECT] to [A]",
    "After [A] and [B] went to the [LOCATION], [B] handed a [OBJECT] to [A]",
    "Then, [A] and [B] went to the [LOCATION]. [B] gave a [OBJECT] to [A]",
    "Then, [A] and [B] had a lot of fun at the [LOCATION]. [B] gave a [OBJECT] to [A]",
    "While [A] and [B] were working at the [LOCATION], [B] gave a [OBJECT] to [A]",
)
#: One token each in GPT-2's vocabulary and in that of the package's own model.
NAMES = tuple("John Mary Tom James Anna Sarah David Paul Mark Jack Emma Laura Robert Kevin".split())
NOUNS: dict[str, tuple[str, ...]] = {
    "LOCATION": ("store", "park", "school", "office", "house", "garden"),
    "OBJECT": ("drink", "book", "ring", "ball", "basket", "necklace"),
}


class Sample(TypedDict):
    """One sentence.

    Attributes:
        text: with the indirect object at its end.
        prompt: its ids, [pos].
        IO, S: ids of the two names as they would end it, [token] each: the right one, and the other.
    """

    text: str
    prompt: torch.Tensor
    IO: torch.Tensor
    S: torch.Tensor


class IOIDataset:
    """Sentences in which one of two people gives something to the other.

    Args:
        tokenizer: of transformers.
        num_samples: how many sentences.
        templates: with [A] for the indirect object, which must be their end, [B] for the subject, and
            the keys of `nouns` in brackets.
        names: at least two.
        nouns: by key, what stands for it.
        symmetric: each sentence is followed by the one with the two names exchanged.
        prepend_bos: put the tokenizer's beginning-of-text token in front, where it does not do so.
        seed: the same seed gives the same sentences.

    Example:
        dataset = IOIDataset(model.tokenizer, 100)
        ioi_eval(model, dataset)  # {"Logit Difference": 5.3, "Accuracy": 1.0}

    Raises:
        InputError: fewer than two names, or a template that does not end with the indirect object.

    Source: Wang et al. 2022, Interpretability in the Wild; TransformerLens, evals.py.
    """

    def __init__(
        self,
        tokenizer: Any,
        num_samples: int = 1000,
        templates: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        nouns: Mapping[str, Sequence[str]] | None = None,
        symmetric: bool = False,
        prepend_bos: bool = True,
        seed: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.prepend_bos = prepend_bos
        self.templates = list(TEMPLATES if templates is None else templates)
        self.names = list(NAMES if names is None else names)
        self.nouns = {key: list(one) for key, one in (NOUNS if nouns is None else nouns).items()}
        if len(set(self.names)) < 2:
            raise InputError("the sentences need two names: give at least two")
        for template in self.templates:
            if not template.endswith(" [A]") or "[B]" not in template:
                raise InputError(f"a template has [B] in it and ends with ` [A]`: {template!r}")
        rng, self.samples = random.Random(seed), list[Sample]()
        while len(self.samples) < num_samples:
            self.samples += self._draw(rng, symmetric)
        del self.samples[num_samples:]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def _draw(self, rng: random.Random, symmetric: bool) -> list[Sample]:
        template = rng.choice(self.templates)
        for key, words in self.nouns.items():
            template = template.replace(f"[{key}]", rng.choice(words))
        first, second = rng.sample(sorted(set(self.names)), 2)
        pairs = [(first, second), (second, first)] if symmetric else [(first, second)]
        return [self._sample(template, *pair) for pair in pairs]

    def _sample(self, template: str, indirect: str, subject: str) -> Sample:
        text = template.replace("[A]", indirect).replace("[B]", subject)
        start = text.removesuffix(f" {indirect}")
        prompt = self._ids(text)
        if self.prepend_bos:
            bos = self.tokenizer.bos_token_id
            bos = self.tokenizer.eos_token_id if bos is None else bos
            if bos is not None and prompt[:1] != [bos]:
                prompt = [bos, *prompt]
        length = len(self._ids(start))
        # Names as they are tokenized behind the sentence, where spaces belong to tokens.
        others = [self._ids(f"{start} {name}")[length:] for name in (indirect, subject)]
        found = [torch.tensor(ids) for ids in (prompt, *others)]
        return Sample(text=text, prompt=found[0], IO=found[1], S=found[2])

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])


def ioi_eval(
    model: Any,
    dataset: IOIDataset | None = None,
    batch_size: int = 32,
    num_samples: int = 1000,
    tokenizer: Any = None,
    symmetric: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """How far a model prefers the indirect object to the subject at the end of a sentence.

    Names of several tokens are compared at the first one in which they differ.

    Args:
        model: a HookedTransformer.
        dataset: the sentences; default `num_samples` of `IOIDataset`, with `symmetric` and `seed`.
        batch_size: rows of one invoke; all run in one block.
        tokenizer: for the default sentences; default the model's.

    Returns:
        "Logit Difference", the mean logit of the indirect object less that of the subject; "Accuracy",
        the share of sentences in which it is above 0.

    Raises:
        InputError: no sentences, or one name that is the beginning of the other.

    Source: Wang et al. 2022, Interpretability in the Wild; TransformerLens, evals.py.
    """
    if dataset is None:
        tokenizer = model.tokenizer if tokenizer is None else tokenizer
        dataset = IOIDataset(tokenizer, num_samples, symmetric=symmetric, seed=seed)
    samples = list(dataset)
    if not samples:
        raise InputError("there are no sentences to evaluate")
    boxes = []
    with torch.no_grad(), model.model.trace() as tracer:
        for start in range(0, len(samples), batch_size):
            rows = samples[start : start + batch_size]
            width = max(len(row["prompt"]) for row in rows)
            ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
            for number, row in enumerate(rows):
                ids[number, : len(row["prompt"])] = row["prompt"]
                mask[number, : len(row["prompt"])] = 1
            positions, right, wrong = torch.tensor([_asked(row) for row in rows]).T
            each = torch.arange(len(rows))
            with tracer.invoke(input_ids=ids, attention_mask=mask):
                record_hooks(model)
                logits = tracer.output.logits[each, positions]
                boxes.append((logits[each, right] - logits[each, wrong]).save())
    differences = torch.cat([box.value.float().cpu() for box in boxes])
    return {
        "Logit Difference": float(differences.mean()),
        "Accuracy": float((differences > 0).float().mean()),
    }


def _asked(row: Sample) -> tuple[int, int, int]:
    """The position before the first token in which the names differ, and both tokens."""
    start = len(row["prompt"]) - len(row["IO"])
    for number, (right, wrong) in enumerate(
        zip(row["IO"].tolist(), row["S"].tolist(), strict=False)
    ):
        if right != wrong:
            return start + number - 1, right, wrong
    raise InputError(f"one name is the beginning of the other: {row['text']!r}")


def induction_loss(
    model: Any,
    subseq_len: int | None = None,
    batch_size: int = 4,
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> float:
    """The loss on the second half of random tokens that repeat once, in nats.

    A model that copies has a loss near 0, one that does not near log d_vocab or above. The first token
    of the second half is left out: nothing says that a repeat begins.

    Args:
        model: a HookedTransformer.
        subseq_len: tokens of one half; default 384, or what fits into the model's positions.
        batch_size: rows.
        prepend_bos: put the beginning-of-text token in front; default the model's.
        seed: the same seed gives the same tokens.

    Raises:
        InputError: a half of one token, more than the model has positions for, or no token to put in
            front.

    Source: Olsson et al. 2022, In-context Learning and Induction Heads; TransformerLens, evals.py.
    """
    wanted = model._tokens.prepend_bos if prepend_bos is None else prepend_bos
    bos = model._tokens.bos
    if wanted and bos is None:
        raise InputError("there is no beginning-of-text token: pass prepend_bos=False")
    room = model._n_ctx
    if subseq_len is None:
        subseq_len = 384 if room is None else min(384, (room - bool(wanted)) // 2)
    if subseq_len < 2:
        raise InputError(f"subseq_len={subseq_len}: a half of 2 tokens is the least")
    generator = torch.Generator().manual_seed(seed)
    special = set(getattr(model.tokenizer, "all_special_ids", None) or ())
    known = torch.tensor([i for i in range(model.model.cfg.d_vocab) if i not in special])
    half = known[torch.randint(len(known), (batch_size, subseq_len), generator=generator)]
    ids = torch.cat([half, half], 1)
    if wanted:
        ids = torch.cat([torch.full((batch_size, 1), bos), ids], 1)
    with torch.no_grad():
        logits = model(ids, attention_mask=torch.ones_like(ids))
    losses = lm_cross_entropy_loss(logits, ids.to(logits.device), per_token=True)
    return float(losses[:, 1 - subseq_len :].mean())
