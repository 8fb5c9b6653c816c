"""Owns statistics of neurons over data: collected in one pass, merged, in memory that does not depend
on the data.

A block reads `mlp_post` and `z` of each layer and keeps six numbers a neuron, which one function
computes there; the same recorded block runs for each batch. Everything is computed in float64, but for
the square root of an activation of less precision: it is taken in float32 (a relative error of at most
6e-8, as that of the activation itself, at a quarter of the time) and summed in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from tqdm import tqdm

from ..models import LanguageModel
from ..tracing.proxy import apply
from .data import TokenBatch
from .errors import PruningError
from .forwards import Forwards

#: Numbers that are summarized at once, so that what is computed from them stays in the cache.
_CHUNK = 131072


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of neurons over tokens; each tensor is float64 [layer, neuron] (or any one shape).

    Attributes:
        count: tokens.
        mean: μ = E x.
        squares: Σ (x − μ)².
        roots: Σ √|x|.
        positive: Σ max(x, 0).
        negative: Σ min(x, 0), at most 0.
        active: how many tokens have x > 0.
    """

    count: int
    mean: torch.Tensor
    squares: torch.Tensor
    roots: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor
    active: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor) -> Statistics:
        """Statistics of values [token, neuron]; without tokens, all zero."""
        return cls.from_rows(values.shape[0], summary(values))

    @classmethod
    def from_rows(cls, count: int, rows: torch.Tensor) -> Statistics:
        """Of what `summary` gave, [6, …]."""
        return cls(count, *rows.unbind())

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both data together, by the parallel form of Welford's algorithm.

        Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
        Sample Variances", 1979, equation 2.1.
        """
        count = self.count + other.count
        if not count:
            return self
        share = other.count / count
        difference = other.mean - self.mean
        return Statistics(
            count,
            self.mean + difference * share,
            self.squares + other.squares + difference**2 * (self.count * share),
            self.roots + other.roots,
            self.positive + other.positive,
            self.negative + other.negative,
            self.active + other.active,
        )

    def _per_token(self, total: torch.Tensor) -> torch.Tensor:
        return total / max(1, self.count)

    @property
    def variance(self) -> torch.Tensor:
        """σ² = E (x − μ)², of the data as a whole population."""
        return self._per_token(self.squares)

    @property
    def std(self) -> torch.Tensor:
        """σ."""
        return self.variance.sqrt()

    @property
    def rms(self) -> torch.Tensor:
        """√(σ² + μ²)."""
        return (self.variance + self.mean**2).sqrt()

    @property
    def sqrt(self) -> torch.Tensor:
        """E √|x|."""
        return self._per_token(self.roots)

    @property
    def positive_mass(self) -> torch.Tensor:
        """E max(x, 0)."""
        return self._per_token(self.positive)

    @property
    def negative_mass(self) -> torch.Tensor:
        """E min(x, 0), at most 0."""
        return self._per_token(self.negative)

    @property
    def mass(self) -> torch.Tensor:
        """Positive mass and |negative mass| together: E |x|."""
        return self._per_token(self.positive - self.negative)

    @property
    def frequency(self) -> torch.Tensor:
        """P(x > 0)."""
        return self._per_token(self.active)

    def to(self, device: Any) -> Statistics:
        moved = {
            field.name: getattr(self, field.name).to(device)
            for field in dataclasses.fields(self)
            if field.name != "count"
        }
        return Statistics(self.count, **moved)

    def split(self, width: int) -> tuple[Statistics, Statistics]:
        """Of the first `width` neurons, and of the rest."""
        rows = [
            getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "count"
        ]
        first = Statistics(self.count, *(row[..., :width] for row in rows))
        return first, Statistics(self.count, *(row[..., width:] for row in rows))


class Summarizer:
    """Computes `summary` with buffers that stay.

    Memory that is fresh for each operation costs more than the operation, so the buffers are kept for
    each width, device and type.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, torch.device, torch.dtype], tuple[torch.Tensor, ...]] = {}

    def __call__(self, values: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The six rows of `Statistics` of values [token, neuron], float64 [6, neuron].

        Args:
            rows: which tokens count, by index; None: all.
        """
        if values.device.type == "mps":  # which has no float64
            values = values.cpu()
        width = values.shape[1]
        tokens = len(values) if rows is None else len(rows)
        found = values.new_zeros(6, width, dtype=torch.float64)
        if not tokens or not width:
            return found
        buffers = self._buffers(values)
        parts: list[torch.Tensor] = []
        counts: list[int] = []
        size = len(buffers[0])
        for chunk in torch.split(values if rows is None else rows.to(values.device), size):
            room = [buffer[: len(chunk)] for buffer in buffers]
            given = chunk if rows is None else torch.index_select(values, 0, chunk, out=room.pop())
            parts.append(_chunk(given, *room[:5]))
            counts.append(len(chunk))
        if len(parts) == 1:
            return parts[0]
        every = torch.stack(parts)  # [chunk, 6, neuron]
        weights = every.new_tensor(counts)[:, None]
        torch.sum(every, 0, out=found)
        found[0] = (every[:, 0] * weights).sum(0) / tokens
        found[1] += ((every[:, 0] - found[0]).square() * weights).sum(0)
        return found

    def _buffers(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """For a chunk of [token, neuron]: two of float64 and one of float32, ones of both, and one of
        the values' own type."""
        key = values.shape[1], values.device, values.dtype
        found = self._kept.get(key)
        if found is None:
            limit = _CHUNK if values.device.type == "cpu" else 64 * _CHUNK
            rows = max(32, limit // values.shape[1])
            exact = values.new_empty(rows, values.shape[1], dtype=torch.float64)
            plain = values.new_empty(rows, values.shape[1], dtype=torch.float32)
            one = values.new_ones(rows, dtype=torch.float64)
            own = torch.empty_like(exact, dtype=values.dtype)
            found = exact, torch.empty_like(exact), plain, one, one.float(), own
            if type(values) is torch.Tensor:  # and no stand-in by which shapes are measured
                self._kept[key] = found
        return found


def _chunk(
    values: torch.Tensor,
    exact: torch.Tensor,
    other: torch.Tensor,
    plain: torch.Tensor,
    one: torch.Tensor,
    plain_one: torch.Tensor,
) -> torch.Tensor:
    """The six rows of values [token, neuron]; sums over tokens are products with ones."""
    exact.copy_(values)
    total = one @ exact
    mean = total / len(values)
    torch.sub(exact, mean, out=other)
    squares = one @ other.square_()
    torch.gt(values, 0, out=plain)
    active = (plain_one @ plain).double()
    # Of a neuron with one sign the two sums are the same bits, so the other mass is exactly 0.
    mass = one @ exact.abs_()
    if values.dtype == torch.float64:
        roots = one @ exact.sqrt_()
    else:
        roots = one @ exact.copy_(plain.copy_(values).abs_().sqrt_())
    return torch.stack([mean, squares, roots, (mass + total) / 2, (total - mass) / 2, active])


def summary(values: torch.Tensor) -> torch.Tensor:
    """The six rows of `Statistics` of values [token, neuron], float64 [6, neuron]."""
    return Summarizer()(values)


@dataclasses.dataclass(frozen=True)
class Collected:
    """Statistics of a model over data.

    Attributes:
        mlp: of `mlp_post`, [layer, d_mlp]; None if not asked for.
        attn: of `z`, [layer, n_heads · d_head]; None if not asked for.
    """

    mlp: Statistics | None
    attn: Statistics | None

    def merge(self, other: Collected) -> Collected:
        """Statistics of both data together."""
        return Collected(_merged(self.mlp, other.mlp), _merged(self.attn, other.attn))


def _merged(one: Statistics | None, other: Statistics | None) -> Statistics | None:
    return one.merge(other) if one is not None and other is not None else None


class Collector:
    """Statistics of a model, batch by batch.

    Args:
        model: any with the names `mlp_post` and `z`; its edits are in what is collected.
        mlp, attn: which of the two.
    """

    def __init__(self, model: LanguageModel, mlp: bool = True, attn: bool = True) -> None:
        if not (mlp or attn):
            raise PruningError("nothing to collect: ask for mlp, attn or both.")
        self._model = model
        self._mlp, self._attn = mlp, attn
        self._real: torch.Tensor | None = None
        self._forwards = Forwards(model, self._record)
        self._summarize = Summarizer()
        self._found: Statistics | None = None

    def add(self, batch: TokenBatch) -> None:
        """Run the model on a batch and add the statistics of its tokens; padding is not counted."""
        self._real = None if bool(batch.mask.all()) else batch.mask.flatten().nonzero().flatten()
        found = self._forwards(batch.inputs())
        # Layers may be on different devices.
        rows = torch.stack([row.to(found[0].device) for row in found], 1)
        new = Statistics.from_rows(batch.tokens, rows)
        self._found = new if self._found is None else self._found.merge(new)

    def _record(self) -> list[Any]:
        saved = []
        for layer in self._model.layers:
            read = [layer.mlp_post] if self._mlp else []
            if self._attn:
                read.append(layer.z)
            saved.append(apply(self._summaries, *read).save())
        return saved

    def _summaries(self, *activations: torch.Tensor) -> torch.Tensor:
        """Of activations [batch, token, …], one layer's, the six rows of all their neurons."""
        found = []
        for activation in activations:
            values = activation.flatten(0, 1).flatten(1)
            found.append(self._summarize(values, self._real))
        return torch.cat(found, 1) if len(found) > 1 else found[0]

    def result(self) -> Collected:
        """What has been collected, on the CPU.

        Raises:
            PruningError: no batch was added.
        """
        if self._found is None:
            raise PruningError("there are no statistics: the data has no tokens.")
        found = self._found.to("cpu")
        if not self._attn:
            return Collected(found, None)
        if not self._mlp:
            return Collected(None, found)
        sizes = self._model.cfg
        return Collected(*found.split(found.mean.shape[-1] - sizes.n_heads * sizes.d_head))


def collect(
    model: LanguageModel,
    batches: Iterable[TokenBatch],
    *,
    mlp: bool = True,
    attn: bool = True,
    progress: bool = True,
) -> Collected:
    """Statistics of MLP neurons and attention channels over data, in one pass.

    Args:
        model: edits of it are in what is collected.
        batches: token batches; each runs once and is not kept.
        mlp, attn: collect `mlp_post`, `z`, or both.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        PruningError: the data has no tokens, or nothing was asked for.
        UnavailableNameError: the model has no such activations.
    """
    collector = Collector(model, mlp, attn)
    for batch in tqdm(batches, "statistics", disable=not progress, delay=2, leave=False):
        collector.add(batch)
    return collector.result()
