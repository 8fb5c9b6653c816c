"""The explanation of a plan says what runs; counted here by hand and by plain hooks."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from graftwork import LanguageModel, Model

LAYERS, WIDTH, VOCABULARY = 4, 64, 300


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=8, vocab_size=VOCABULARY, n_positions=64,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LanguageModel(GPT2LMHeadModel(config).eval())


def work(text: str) -> tuple[float, float]:
    """Estimated and naive work, in operations."""
    found = re.search(r"([\d.]+) (\w)FLOP of ([\d.]+) (\w)FLOP", text)
    assert found is not None, text
    units = {"k": 1e3, "M": 1e6, "G": 1e9}
    return float(found[1]) * units[found[2]], float(found[3]) * units[found[4]]


def test_work_of_one_whole_forward(model: LanguageModel) -> None:
    with model.trace([1, 2, 3, 4, 5]) as tracer:
        model.lm_head.output.save()
    found, naive = work(tracer.explain())
    # Attention 4 d², MLP 8 d² for each block, unembedding d·V; two operations each, five tokens.
    expected = 2 * 5 * (LAYERS * 12 * WIDTH**2 + WIDTH * VOCABULARY)
    assert found == naive == pytest.approx(expected, rel=0.05)


def test_early_stop_and_last_position_are_counted(model: LanguageModel) -> None:
    with model.trace([1, 2, 3, 4, 5]) as tracer:
        model.transformer.h[1].output.save()
    found, _ = work(tracer.explain())
    assert found == pytest.approx(2 * 5 * 2 * 12 * WIDTH**2, rel=0.05)
    assert "0–1 of 4" in tracer.explain()
    assert "transformer.h.1.output" in tracer.explain()
    with model.trace([1, 2, 3, 4, 5]) as tracer:
        model.lm_head.output[:, -1].save()
    found, _ = work(tracer.explain())
    assert found == pytest.approx(2 * (5 * LAYERS * 12 * WIDTH**2 + WIDTH * VOCABULARY), rel=0.05)
    assert "last 1" in tracer.explain()


def test_a_sweep_names_its_passes(model: LanguageModel) -> None:
    ids = [1, 2, 3, 4, 5]
    with model.trace() as tracer:
        for layer in range(LAYERS):
            with tracer.invoke(ids):
                model.transformer.h[layer].output[:, -1] += 1.0
                model.lm_head.output[:, -1].save()
    text = tracer.explain()
    assert text.startswith("4 prompts in 2 passes")
    assert "1 for 4" in text
    found, naive = work(text)
    # The base pass runs all four blocks once; variants run 3 + 2 + 1 + 0 of them.
    block, head = 2 * 5 * 12 * WIDTH**2, 2 * WIDTH * VOCABULARY
    assert found == pytest.approx((4 + 6) * block + 4 * head, rel=0.05)
    assert naive == pytest.approx(4 * (4 * block + 5 * head), rel=0.05)
    assert f"4 values saved, {4 * VOCABULARY * 4 / 1024:.1f} KiB" in text


def test_it_can_be_asked_inside_the_block_and_needs_no_weights(tmp_path: object) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=64, n_head=8, vocab_size=300, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    lazy = LanguageModel(str(tmp_path))
    with pytest.raises(ZeroDivisionError), lazy.trace([1, 2, 3]) as tracer:
        lazy.transformer.h[0].output.save()
        assert "0–0 of 2" in tracer.explain()
        raise ZeroDivisionError
    assert not lazy.loaded


def test_it_shows_itself_in_a_notebook(model: LanguageModel) -> None:
    with model.trace([1, 2]) as tracer:
        model.lm_head.output.save()
    explanation = tracer.explain()
    assert repr(explanation) == str(explanation)
    assert explanation._repr_html_().startswith("<pre>")


def test_a_model_that_cannot_be_measured_says_so() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) if float(x.sum()) > 0 else self.a(x) * 2

    model = Model(Odd())
    with model.trace(torch.ones(2, 3)) as tracer:
        model.a.output.save()
    assert "cannot be measured" in tracer.explain()
