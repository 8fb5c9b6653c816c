"""Scores and the choice of the highest, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graftwork.pruning import SCORINGS, PruningError, Statistics, top_fraction

EPS = 0.01


def stacked(values: torch.Tensor) -> Statistics:
    """Of values [layer, token, neuron]."""
    every = [Statistics.of(layer) for layer in values]
    names = ("mean", "squares", "roots", "positive", "negative", "active")
    rows = {name: torch.stack([getattr(one, name) for one in every]) for name in names}
    return Statistics(values.shape[1], **rows)


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    focus = torch.randn(3, 50, 7, generator=generator, dtype=torch.float64)
    cripple = torch.randn(3, 80, 7, generator=generator, dtype=torch.float64) * 2 + 0.3
    return focus, cripple


EXPECTED = {
    "abs": lambda f, c: np.abs(c).mean(1) / (np.abs(f).mean(1) + EPS),
    "sqrt": lambda f, c: np.sqrt(np.abs(c)).mean(1) / (np.sqrt(np.abs(f)).mean(1) + EPS),
    "freq": lambda f, c: (c > 0).mean(1) / ((f > 0).mean(1) + EPS),
    "std": lambda f, c: c.std(1) / (f.std(1) + EPS),
    "rms": lambda f, c: np.sqrt((c**2).mean(1)) / (np.sqrt((f**2).mean(1)) + EPS),
    "mean": lambda f, c: np.abs(c.mean(1) - f.mean(1)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_score_is_its_formula(name: str, data: tuple[torch.Tensor, torch.Tensor]) -> None:
    focus, cripple = data
    found = SCORINGS[name](stacked(focus), stacked(cripple), EPS, 0)
    assert found.shape == (3, 7) and found.dtype == torch.float64
    np.testing.assert_allclose(found, EXPECTED[name](focus.numpy(), cripple.numpy()), rtol=1e-10)


def test_every_score_has_a_formula_here() -> None:
    assert set(SCORINGS) == {*EXPECTED, "random"}


def test_random_scores_repeat_by_seed(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    focus, cripple = map(stacked, data)
    one, same, other = (SCORINGS["random"](focus, cripple, EPS, seed) for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.shape == (3, 7) and float(one.min()) >= 0 and float(one.max()) < 1


def test_the_top_is_taken_over_all_layers() -> None:
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 3.0, 10.0]])
    chosen, threshold = top_fraction(scores, 0.5)
    assert chosen.tolist() == [[True, True, True, False], [False, False, False, True]]
    assert threshold == 7.0


def test_ties_go_to_lower_layers_and_neurons() -> None:
    chosen, _ = top_fraction(torch.ones(2, 4), 0.625)
    assert chosen.flatten().tolist() == [True] * 5 + [False] * 3


def test_deleted_neurons_and_numberless_scores_are_not_chosen() -> None:
    scores = torch.tensor([[5.0, float("nan"), 3.0, -float("inf")]])
    excluded = torch.tensor([[True, False, False, False]])
    chosen, threshold = top_fraction(scores, 0.25, excluded)
    assert chosen.tolist() == [[False, False, True, False]] and threshold == 3.0
    everything, _ = top_fraction(scores, 1.0, excluded)
    assert everything.tolist() == [[False, False, True, True]]


def test_nothing_chosen_has_no_threshold() -> None:
    chosen, threshold = top_fraction(torch.ones(2, 4), 0.0)
    assert not chosen.any() and threshold is None
    with pytest.raises(PruningError, match="give 0 to 1"):
        top_fraction(torch.ones(2, 4), 1.5)
