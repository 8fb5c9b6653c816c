"""Owns `run_pruning`: rounds of collecting, scoring, deleting and evaluating, and how they resume."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..models import LanguageModel
from .config import PruningConfig
from .data import TokenBatch, load_documents, name_of, token_batches
from .deletion import delete
from .errors import PruningError
from .evaluation import evaluate
from .history import History
from .scoring import SCORINGS, top_fraction
from .statistics import Collected, Statistics, collect

logger = logging.getLogger("graftwork")

_STATE, _TABLE = "state.safetensors", "history.csv"


def run_pruning(config: PruningConfig) -> tuple[LanguageModel, History]:
    """Delete the neurons that serve `cripple` and not `focus`.

    Each step collects statistics of both data sets, scores the neurons of all layers, deletes the top
    `ff_frac` of the MLPs' and the top `attn_frac` of the attention heads' channels, and evaluates.
    With an output folder, what is known is written there after each step; a run that was stopped goes
    on after its last whole step, and gives what it would have given. More steps can be asked for later.

    Args:
        config: what to do. A `LanguageModel` given in it is changed in place, by its hooks; a model
            that is named in it is loaded for this run.

    Returns:
        The model, without the neurons, and the history.

    Raises:
        PruningError: data or configuration cannot be used, or the folder holds another run.
    """
    run = _Run(config)
    run.restore()
    board = _Board(config)
    for row in run.history:
        board.log(row)
    if not run.begun and config.run_pre_test:
        board.log(run.finish(0, {"ff_threshold": None, "attn_threshold": None}))
    steps = range(run.step + 1, config.n_steps + 1)
    for step in tqdm(steps, "pruning", disable=not config.progress, delay=2):
        board.log(run.finish(step, run.prune(step)))
    board.close()
    return run.model, run.history


@dataclasses.dataclass(frozen=True)
class _Group:
    """Neurons of one kind: of MLPs ("ff") or of attention heads ("attn")."""

    name: str
    scoring: str
    fraction: float
    eps: float


class _Run:
    """The state of one run.

    Attributes:
        step: the last whole step.
        begun: something was written before, or evaluated.
        deleted: bool [layer, neuron] by kind, all that have been deleted.
    """

    def __init__(self, config: PruningConfig) -> None:
        self.config = config
        self.model = _model(config)
        self.history = History()
        self.step = 0
        self.begun = False
        sizes = self.model.cfg
        widths = {"ff": sizes.d_mlp or 0, "attn": sizes.n_heads * sizes.d_head}
        self.deleted = {
            name: torch.zeros(sizes.n_layers, width, dtype=torch.bool)
            for name, width in widths.items()
        }
        self.groups = [
            _Group(
                kind, *(getattr(config, f"{kind}_{field}") for field in ("scoring", "frac", "eps"))
            )
            for kind in ("ff", "attn")
        ]
        self._evaluated: dict[str, list[TokenBatch]] | None = None

    # ---------------------------------------------------------------- a step

    def prune(self, step: int) -> dict[str, float | None]:
        """Delete what scores highest now; gives the lowest score deleted, by kind."""
        wanted = [group for group in self.groups if group.fraction > 0]
        measured = [group.name for group in wanted if group.scoring != "random"]
        focus, cripple = (self._collect(data, measured) for data in ("focus", "cripple"))
        thresholds: dict[str, float | None] = {"ff_threshold": None, "attn_threshold": None}
        new: dict[str, torch.Tensor] = {}
        for number, group in enumerate(self.groups):
            if group not in wanted:
                continue
            # A draw of its own for each step and kind.
            seed = (self.config.seed * 1_000_003 + step) * 2 + number
            before = self.deleted[group.name]
            scores = SCORINGS[group.scoring](
                self._of(focus, group.name), self._of(cripple, group.name), group.eps, seed
            )
            chosen, threshold = top_fraction(scores, group.fraction, before)
            thresholds[f"{group.name}_threshold"] = threshold
            new[group.name] = chosen
            self.deleted[group.name] = before | chosen
        delete(self.model, new.get("ff"), new.get("attn"))
        return thresholds

    def _collect(self, which: str, kinds: list[str]) -> Collected:
        if not kinds:
            return Collected(None, None)
        config = self.config
        documents = load_documents(getattr(config, which))
        batches = token_batches(
            self.model,
            documents,
            total=config.collection_sample_size,
            token_limit=config.token_limit,
            batch_tokens=config.batch_tokens,
        )
        return collect(
            self.model, batches, mlp="ff" in kinds, attn="attn" in kinds, progress=config.progress
        )

    def _of(self, found: Collected, kind: str) -> Statistics:
        statistics = found.mlp if kind == "ff" else found.attn
        if statistics is None:  # a random score asks for the shape alone
            nothing = torch.zeros(self.deleted[kind].shape, dtype=torch.float64)
            return Statistics(0, *[nothing] * 6)
        return statistics

    def finish(self, step: int, thresholds: dict[str, float | None]) -> dict[str, Any]:
        """Evaluate, note the row, and write what is known."""
        row: dict[str, Any] = {"step": step}
        row |= {f"{name}_del": int(mask.sum()) for name, mask in self.deleted.items()}
        row |= thresholds
        config = self.config
        for name, batches in self._batches().items():
            found = evaluate(
                self.model,
                batches,
                k=config.topk,
                skip_frequent=config.skip_frequent,
                seed=config.seed,
                progress=config.progress,
                name=name,
            )
            row |= {f"{name}_{key}": value for key, value in found.row().items()}
        self.history.add(row)
        self.step, self.begun = step, True
        self._write()
        return row

    def _batches(self) -> dict[str, list[TokenBatch]]:
        """The data to evaluate, by name."""
        if self._evaluated is None:
            config, self._evaluated = self.config, {}
            for number, data in enumerate(config.evaluated):
                other = f"texts_{number}"
                for field in ("focus", "cripple"):
                    other = field if data is getattr(config, field) else other
                batches = token_batches(
                    self.model,
                    load_documents(data, held_out=True),
                    total=config.eval_sample_size,
                    token_limit=config.token_limit,
                    batch_tokens=config.batch_tokens,
                )
                name = name_of(data, other)
                if name in self._evaluated:
                    name = f"{name}_{number}"
                bar = tqdm(
                    batches, f"reading {name}", disable=not config.progress, delay=2, leave=False
                )
                self._evaluated[name] = list(bar)
        return self._evaluated

    # ---------------------------------------------------------------- the folder

    def _write(self) -> None:
        """State and history, in one file that is replaced at once, and the table beside it."""
        if self.config.output_folder is None:
            return
        from safetensors.torch import save_file

        folder = Path(self.config.output_folder)
        folder.mkdir(parents=True, exist_ok=True)
        known = {
            "step": self.step,
            "config": self.config.fingerprint(),
            "history": self.history.rows,
        }
        draft = folder / f"{_STATE}.new"
        save_file(dict(self.deleted), draft, {"run": json.dumps(known)})
        os.replace(draft, folder / _STATE)
        self.history.to_csv(folder / _TABLE)

    def restore(self) -> None:
        """Take up what a stopped run has written.

        Raises:
            PruningError: it was a run of another configuration.
        """
        if self.config.output_folder is None:
            return
        file = Path(self.config.output_folder) / _STATE
        if not file.is_file():
            return
        from safetensors import safe_open

        with safe_open(file, "pt") as state:
            known = json.loads(state.metadata()["run"])
            deleted = {name: state.get_tensor(name) for name in self.deleted}
        mine = self.config.fingerprint()
        other = {name for name in mine if known["config"].get(name) != mine[name]}
        if other:
            raise PruningError.other_run(file.parent, other)
        rows = [row for row in known["history"] if row["step"] <= self.config.n_steps]
        if known["step"] > self.config.n_steps:
            raise PruningError(
                f"`{file.parent}` holds {known['step']} steps and n_steps is {self.config.n_steps}: "
                "what was deleted is not taken back. Give another output_folder."
            )
        self.history, self.step, self.begun = History(rows), known["step"], True
        self.deleted = deleted
        delete(self.model, deleted["ff"], deleted["attn"])
        logger.info("going on after step %d of %s", self.step, file.parent)


def _model(config: PruningConfig) -> LanguageModel:
    if config.model is None:
        return LanguageModel(
            config.model_repo, config.tokenizer, dtype=config.dtype, device_map=config.device_map
        )
    if isinstance(config.model, LanguageModel):
        model = config.model
        if config.tokenizer is not None and config.tokenizer is not model.tokenizer:
            raise PruningError(
                "the model has a tokenizer: give another one with a bare module only."
            )
        return model
    return LanguageModel(config.model, config.tokenizer)


class _Board:
    """Weights & Biases, if it is asked for and installed."""

    def __init__(self, config: PruningConfig) -> None:
        self._run: Any = None
        if not config.wandb_project:
            return
        try:
            import wandb  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            logger.warning(
                "wandb_project is %r and Weights & Biases is not installed: the history is in what "
                "run_pruning returns (pip install wandb)",
                config.wandb_project,
            )
            return
        self._run = wandb.init(project=config.wandb_project, config=config.fingerprint())

    def log(self, row: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.log({k: v for k, v in row.items() if v is not None}, step=row["step"])

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
