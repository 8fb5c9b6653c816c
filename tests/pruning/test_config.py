"""What a configuration refuses, and where it is found."""

from __future__ import annotations

from typing import Any

import pytest

from graftwork.data_classes import PruningConfig
from graftwork.prune import run_pruning
from graftwork.pruning import PruningError
from graftwork.tracing.errors import GraftworkError


def test_the_example_of_taker_is_accepted() -> None:
    config = PruningConfig(
        wandb_project="my_project",
        model_repo="facebook/opt-125m",
        token_limit=1000,
        run_pre_test=True,
        ff_scoring="abs",
        ff_frac=0.02,
        ff_eps=0.001,
        attn_scoring="abs",
        attn_frac=0.00,
        attn_eps=1e-4,
        focus="pile_codeless",
        cripple="code",
    )
    assert config.evaluated == ("pile_codeless", "code")
    assert callable(run_pruning)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ff_scoring": "sqr"},
            r"`sqr` is no score of neurons \(ff_scoring\). Did you mean `sqrt`\?",
        ),
        ({"attn_scoring": "zzz"}, "Known are `abs`, `sqrt`"),
        ({"ff_frac": 2}, "ff_frac is 2; a share of 0 to 1"),
        ({"attn_eps": -1}, "attn_eps is -1; 0 or more"),
        ({"topk": 0}, "topk is 0; at least 1"),
        ({"model_repo": ""}, "name a model"),
    ],
)
def test_bad_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PruningError, match=message):
        PruningConfig(**{"model_repo": "graftwork/tiny", **options})
    assert issubclass(PruningError, GraftworkError)


def test_fingerprints_tell_what_the_result_depends_on() -> None:
    one = PruningConfig(model_repo="graftwork/tiny", focus=["a text"] * 100).fingerprint()
    assert "n_steps" not in one and "output_folder" not in one
    other = PruningConfig(model_repo="graftwork/tiny", focus=["another"] * 100).fingerprint()
    assert {name for name in one if one[name] != other[name]} == {"focus"}
