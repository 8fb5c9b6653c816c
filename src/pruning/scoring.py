"""Owns the scores of neurons, pure functions of two statistics, and the choice of the highest ones.

A score compares the data to forget (c, cripple) with the data to keep (f, focus): the higher it is, the
more a neuron serves what is to be forgotten alone. Neurons that have been deleted are 0 on both.

    abs     massᶜ / (massᶠ + eps)          mass = E max(x, 0) + E max(−x, 0)
    sqrt    E√|x|ᶜ / (E√|x|ᶠ + eps)
    freq    P(x > 0)ᶜ / (P(x > 0)ᶠ + eps)
    std     σᶜ / (σᶠ + eps)
    rms     √(σ² + μ²)ᶜ / (√(σ² + μ²)ᶠ + eps)
    mean    |μᶜ − μᶠ|
    random  uniform in [0, 1), by seed

Source: taker, src/taker/scoring.py; Pochinkov and Schoots, "Dissecting Language Models: Machine
Unlearning via Selective Pruning", 2024, section 3. There `std` divides variances; here they are
standard deviations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .errors import PruningError
from .statistics import Statistics

#: (focus, cripple, eps, seed) → scores [layer, neuron], float64.
Scoring = Callable[[Statistics, Statistics, float, int], torch.Tensor]


def abs_score(
    focus: Statistics, cripple: Statistics, eps: float = 0.0, seed: int = 0
) -> torch.Tensor:
    """Ratio of the mean |activation|, [layer, neuron]."""
    return cripple.mass / (focus.mass + eps)


def sqrt_score(
    focus: Statistics, cripple: Statistics, eps: float = 0.0, seed: int = 0
) -> torch.Tensor:
    """Ratio of the mean √|activation|, [layer, neuron]."""
    return cripple.sqrt / (focus.sqrt + eps)


def freq_score(
    focus: Statistics, cripple: Statistics, eps: float = 0.0, seed: int = 0
) -> torch.Tensor:
    """Ratio of how often the activation is positive, [layer, neuron]."""
    return cripple.frequency / (focus.frequency + eps)


def std_score(
    focus: Statistics, cripple: Statistics, eps: float = 0.0, seed: int = 0
) -> torch.Tensor:
    """Ratio of standard deviations, [layer, neuron]."""
    return cripple.std / (focus.std + eps)


def rms_score(
    focus: Statistics, cripple: Statistics, eps: float = 0.0, seed: int = 0
) -> torch.Tensor:
    """Ratio of root mean squares, [layer, neuron]."""
    return cripple.rms / (focus.rms + eps)


def mean_score(
    focus: Statistics, cripple: Statistics, eps: float = 0.0, seed: int = 0
) -> torch.Tensor:
    """Distance of means, [layer, neuron]; `eps` has no part in it."""
    return (cripple.mean - focus.mean).abs()


def random_score(
    focus: Statistics, cripple: Statistics, eps: float = 0.0, seed: int = 0
) -> torch.Tensor:
    """Uniform in [0, 1), [layer, neuron]: the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(focus.mean.shape, generator=generator, dtype=torch.float64)


SCORINGS: dict[str, Scoring] = {
    "abs": abs_score,
    "sqrt": sqrt_score,
    "freq": freq_score,
    "std": std_score,
    "rms": rms_score,
    "mean": mean_score,
    "random": random_score,
}


def top_fraction(
    scores: torch.Tensor, fraction: float, excluded: torch.Tensor | None = None
) -> tuple[torch.Tensor, float | None]:
    """The `fraction` of all neurons with the highest scores, over all layers together.

    Ties go to the lower layer, then the lower neuron. A score that is not a number (0 / 0, of a neuron
    that is silent on both data sets, with eps = 0) is never chosen.

    Args:
        scores: [layer, neuron].
        fraction: of layer · neuron, 0 to 1; the number is rounded to the nearest.
        excluded: bool [layer, neuron]; these are not chosen, they have been deleted before.

    Returns:
        bool [layer, neuron], and the lowest score that was chosen; None where nothing was.

    Raises:
        PruningError: the fraction is not in 0 to 1.
    """
    if not 0 <= fraction <= 1:
        raise PruningError(
            f"a fraction of {fraction} of the neurons cannot be chosen: give 0 to 1."
        )
    flat = scores.to("cpu", torch.float64).flatten()
    open_ = ~flat.isnan()
    if excluded is not None:
        open_ &= ~excluded.cpu().flatten()
    ranked = torch.where(open_, flat, -torch.inf)
    order = ranked.sort(descending=True, stable=True).indices
    order = order[open_[order]][: round(fraction * flat.numel())]
    chosen = torch.zeros(flat.shape, dtype=torch.bool)
    chosen[order] = True
    threshold = float(flat[order[-1]]) if order.numel() else None
    return chosen.view(scores.shape), threshold
