"""Owns `Forwards`: one block of a model that runs batch after batch, recorded once for each shape."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..models import LanguageModel

#: Recorded blocks that are kept; those of other shapes are recorded anew.
_KEPT = 32


class Forwards:
    """Runs a block on batches of tokens.

    A recorded block could run on rows of any length, but in an MLP that joins rows and tokens, as
    OPT's, a name takes them apart by the shape for which it was recorded. So each shape has its own.

    Args:
        model: what runs.
        record: called in the open block; gives the saved values.
    """

    def __init__(self, model: LanguageModel, record: Callable[[], list[Any]]) -> None:
        self._model = model
        self._record = record
        takes = inspect.signature(model.module_tree().forward).parameters
        # Whole texts are never continued, so a cache would be for nobody.
        self._options: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        self._experiments: dict[torch.Size, Any] = {}

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The saved values for `input_ids` and `attention_mask` [row, token]."""
        shape = inputs["input_ids"].shape
        experiment = self._experiments.get(shape)
        if experiment is not None:
            return list(experiment(inputs))
        with self._model.trace(inputs, plan={"progress": False}, **self._options) as tracer:
            saved = self._record()
        if len(self._experiments) >= _KEPT:
            del self._experiments[next(iter(self._experiments))]
        self._experiments[shape] = tracer.compile()
        return [one.value for one in saved]
