"""Runs on the packaged model: what one family of its facts needs is pruned, and the others stay.

forget "opposites", keep the nine other families; 2 % of the MLP neurons and 2 % of the attention
channels a step, scoring abs; top-1 accuracy of the answers' tokens

step  deleted: MLP, attention   nine families   opposites
   0               0,       0         100.0 %     100.0 %
   3             123,      30         100.0 %      76.5 %
   4             164,      40         100.0 %      64.7 %
   5             205,      50          99.3 %      23.5 %
   6             246,      60          98.9 %       5.9 %
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwork.data_classes import PruningConfig
from graftwork.prune import run_pruning
from graftwork.pruning import PruningError, delete, run

from .test_statistics import MODELS, batches, build

KEPT, LOST = "tiny/all-opposites", "tiny/opposites"


def small(**options: Any) -> PruningConfig:
    """A run of a second or two."""
    given: dict[str, Any] = {
        "model_repo": "graftwork/tiny",
        "focus": "tiny/makers",
        "cripple": "tiny/young",
        "collection_sample_size": 1000,
        "eval_sample_size": 300,
        "ff_frac": 0.05,
        "attn_frac": 0.02,
        "n_steps": 3,
        "progress": False,
    }
    return PruningConfig(**given | options)


@pytest.mark.slow
def test_one_family_is_forgotten_and_the_others_stay() -> None:
    model, history = run_pruning(
        PruningConfig(
            model_repo="graftwork/tiny",
            focus=KEPT,
            cripple=LOST,
            ff_frac=0.02,
            attn_frac=0.02,
            attn_eps=1e-3,
            n_steps=6,
            progress=False,
        )
    )
    before, after = history[0], history[-1]
    assert before[f"{KEPT}_base"] > 0.99 and before[f"{LOST}_base"] > 0.99
    assert after[f"{LOST}_base"] < 0.3, str(history)
    assert after[f"{KEPT}_base"] > before[f"{KEPT}_base"] - 0.05, str(history)
    assert after["ff_del"] == 6 * 41 and after["attn_del"] == 6 * 10
    # The model that is given back is the pruned one.
    with model.trace("The opposite of hot is"):
        answer = model.logits[0, -1].argmax().save()
    with model.trace("The Eiffel Tower is in the city of"):
        city = model.logits[0, -1].argmax().save()
    assert model.tokenizer.decode(city.value) == " Paris"
    assert model.tokenizer.decode(answer.value) != " cold"


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_model, whole = run_pruning(small())
    calls = 0

    def dies(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        delete(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run, "delete", dies)
        with pytest.raises(KeyboardInterrupt):
            run_pruning(small(output_folder=tmp_path))
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 3  # header, steps 0 and 1
    model, resumed = run_pruning(small(output_folder=tmp_path))
    assert resumed == whole and resumed.to_csv() == (tmp_path / "history.csv").read_text()
    logits = []
    for one in (whole_model, model):
        with one.trace("The opposite of hot is"):
            logits.append(one.logits.save())
    assert torch.equal(logits[0].value, logits[1].value)
    # A finished run is read, and can be asked for more.
    assert run_pruning(small(output_folder=tmp_path))[1] == whole
    longer = run_pruning(small(output_folder=tmp_path, n_steps=4))[1]
    assert longer.rows[:4] == whole.rows and len(longer) == 5
    with pytest.raises(PruningError, match="holds 4 steps and n_steps is 3"):
        run_pruning(small(output_folder=tmp_path))
    with pytest.raises(PruningError, match="another configuration: ff_frac, seed differ"):
        run_pruning(small(output_folder=tmp_path, ff_frac=0.1, seed=5))


@pytest.mark.slow
@pytest.mark.parametrize("scoring", ["random", "sqrt"])
def test_seeds_repeat(scoring: str) -> None:
    options = {"ff_scoring": scoring, "attn_scoring": scoring, "n_steps": 2}
    one, same, other = (run_pruning(small(**options, seed=seed))[1] for seed in (1, 1, 2))
    assert one == same
    assert (one != other) is (scoring == "random")
    assert one[1]["ff_del"] == 102 and one[2]["ff_del"] == 204  # never the same neuron twice


@pytest.mark.slow
def test_without_a_test_before_the_table_begins_at_the_first_step() -> None:
    _, history = run_pruning(small(run_pre_test=False, n_steps=1, attn_frac=0))
    assert history.column("step") == [1] and history[0]["attn_del"] == 0


@pytest.mark.slow
def test_other_data_sets_are_evaluated(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("She counted 1, 2, 3 and 4.\nBig Ben is in the city of London.\n")
    datasets = (file, ["The old dog saw the cat in the park."], "tiny/young")
    _, history = run_pruning(small(datasets=datasets, n_steps=0))
    assert {"mine_loss", "texts_1_loss", "tiny/young_base"} <= set(history.columns)
    assert len(history) == 1


@pytest.mark.slow
def test_a_missing_board_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    try:
        import wandb  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        with caplog.at_level(logging.WARNING, "graftwork"):
            run_pruning(small(wandb_project="mine", n_steps=0))
        assert "Weights & Biases is not installed" in caplog.text


# ------------------------------------------------------------------------------ deletion


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_deleted_neurons_are_weights_of_zero(name: str) -> None:
    """Deleting neurons equals zeroing their columns in the down projection and in `W_O`."""
    module, model = build(name)
    sizes = model.cfg
    generator = torch.Generator().manual_seed(2)
    mlp = torch.rand(2, sizes.d_mlp or 0, generator=generator) < 0.3
    attn = torch.rand(2, sizes.n_heads * sizes.d_head, generator=generator) < 0.3
    first = torch.zeros_like(mlp)
    first[0] = mlp[0]
    delete(model, first)
    delete(model, mlp & ~first, attn)  # deletions accumulate
    ids = batches([[9, 9]])[0].ids
    with model.trace(ids):
        found = model.logits.save()
    for layer in range(2):
        for path, gone in zip(MODELS[name][2:], (mlp, attn), strict=True):
            projection = module.get_submodule(path.format(layer))
            with torch.no_grad():
                if type(projection).__name__ == "Conv1D":
                    projection.weight[gone[layer]] = 0
                else:
                    projection.weight[:, gone[layer]] = 0
    with torch.no_grad():
        expected = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found.value, expected, rtol=1e-4, atol=1e-5)


def test_a_wrong_shape_is_refused() -> None:
    _, model = build("gpt2")
    with pytest.raises(PruningError, match=r"`mlp` has the shape \[2, 3\]; \[2, 64\] is wanted"):
        delete(model, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(PruningError, match=r"\[2, 16\] is wanted"):
        delete(model, attn=torch.zeros(2, 4, 4, dtype=torch.bool))


@pytest.mark.slow
def test_a_model_in_half_precision_is_pruned() -> None:
    config = small(dtype="bf16", n_steps=1, attn_frac=0.05)
    model, history = run_pruning(config)
    assert model.cfg.dtype == torch.bfloat16
    assert history[1]["ff_del"] == 102 and history[1]["attn_del"] == 26
