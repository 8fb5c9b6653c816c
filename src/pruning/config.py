"""Owns `PruningConfig`: what a pruning run is told, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from typing import Any

from .errors import PruningError
from .scoring import SCORINGS

#: What does not change the result of a run, so a resumed one may differ in it.
_FREE = frozenset({"wandb_project", "output_folder", "n_steps", "model", "tokenizer", "progress"})


@dataclasses.dataclass
class PruningConfig:
    """A pruning run: which model, which texts, what is deleted and how it is evaluated.

    Attributes:
        wandb_project: Weights & Biases project that the history goes to; None or "" for none.
        model_repo: hub id or folder of the model, or "graftwork/tiny".
        token_limit: longest document in tokens; longer ones are cut. None: what the model holds.
        run_pre_test: evaluate once before anything is deleted.
        ff_scoring: score of MLP neurons, see `graftwork.pruning.scoring`: abs, sqrt, freq, std, rms,
            mean, random.
        ff_frac: share of all MLP neurons of the model that each step deletes, 0 to 1.
        ff_eps: added to the denominator of the score's ratio.
        attn_scoring, attn_frac, attn_eps: the same for the channels of attention heads (`z`).
        focus: what is to be kept: a name, a file, texts or documents, see `load_documents`.
        cripple: what is to be forgotten.
        n_steps: rounds of collecting, scoring, deleting and evaluating.
        datasets: what is evaluated, as for `focus`; default focus and cripple.
        collection_sample_size: tokens of each data set that statistics are collected over.
        eval_sample_size: tokens of each data set that are evaluated.
        topk: k of the top-k accuracy.
        skip_frequent: how many of the most frequent tokens the second accuracies leave out.
        batch_tokens: tokens of one forward, padding included.
        seed: of everything random: scoring "random", the masked tokens of masked language models.
        dtype: fp32, fp16, bf16, fp64, int8, int4, nf4 or a torch.dtype; None the checkpoint's.
        device_map: as for `LanguageModel`.
        model: a `LanguageModel` or transformers module, instead of `model_repo`.
        tokenizer: instead of the model's own.
        output_folder: results are written here after each step, and a run that was stopped goes on
            from here; None writes nothing.
        progress: show progress bars for what takes longer than two seconds.

    Raises:
        PruningError: a value makes no sense; near names are proposed.
    """

    wandb_project: str | None = None
    model_repo: str = ""
    token_limit: int | None = None
    run_pre_test: bool = True
    ff_scoring: str = "abs"
    ff_frac: float = 0.02
    ff_eps: float = 0.001
    attn_scoring: str = "abs"
    attn_frac: float = 0.0
    attn_eps: float = 1e-4
    focus: Any = "pile_codeless"
    cripple: Any = "code"
    n_steps: int = 1
    datasets: tuple[Any, ...] | None = None
    collection_sample_size: int = 100_000
    eval_sample_size: int = 100_000
    topk: int = 10
    skip_frequent: int = 50
    batch_tokens: int = 2048
    seed: int = 0
    dtype: Any = None
    device_map: Any = None
    model: Any = None
    tokenizer: Any = None
    output_folder: str | os.PathLike[str] | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for field in ("ff_scoring", "attn_scoring"):
            name = getattr(self, field)
            if name not in SCORINGS:
                raise PruningError.unknown(f"score of neurons ({field})", name, SCORINGS)
        for field in ("ff_frac", "attn_frac"):
            if not 0 <= getattr(self, field) <= 1:
                raise PruningError.bad_value(field, getattr(self, field), "a share of 0 to 1")
        for field in ("ff_eps", "attn_eps", "n_steps", "skip_frequent"):
            if getattr(self, field) < 0:
                raise PruningError.bad_value(field, getattr(self, field), "0 or more is wanted")
        counts = "collection_sample_size", "eval_sample_size", "topk", "batch_tokens", "token_limit"
        for field in counts:
            value = getattr(self, field)
            if value is not None and value < 1:
                raise PruningError.bad_value(field, value, "at least 1 is wanted")
        if not self.model_repo and self.model is None:
            raise PruningError.bad_value(
                "model_repo", self.model_repo, "name a model, or give model="
            )

    @property
    def evaluated(self) -> tuple[Any, ...]:
        """The data sets to evaluate."""
        return (self.focus, self.cripple) if self.datasets is None else tuple(self.datasets)

    def fingerprint(self) -> dict[str, str]:
        """What the result depends on, as text by field; texts that were given as a digest."""
        found = {}
        for field in dataclasses.fields(self):
            if field.name not in _FREE:
                text = repr(getattr(self, field.name))
                long = len(text) > 200
                found[field.name] = hashlib.sha256(text.encode()).hexdigest() if long else text
        return found
