"""Owns the promises about the model that ships inside the package, checked with plain transformers.

Nothing of graftwork is imported here: if these pass, the files are good whatever the library does.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "src" / "models" / "tiny"
FLOORS = {"facts": 0.95, "indirect_objects": 0.90, "repeats": 0.80}


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """The training script as a module."""
    spec = importlib.util.spec_from_file_location("train_tiny", ROOT / "tools" / "train_tiny.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def scores(
    recipe: ModuleType, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> dict[str, float]:
    threads = torch.get_num_threads()
    # Threads that wait for each other on a busy machine made this ten times slower.
    torch.set_num_threads(recipe.THREADS)
    try:
        return recipe.score(model, tokenizer)
    finally:
        torch.set_num_threads(threads)


def generate(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], count: int
) -> list[str]:
    """Prompts and their greedy continuations by ``count`` tokens, as one batch."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    ids = model.generate(**batch, max_new_tokens=count, do_sample=False)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def test_the_folder_holds_what_the_package_loads_and_stays_small() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(sizes) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) <= 6_000_000


def test_the_shape_of_the_model(model: GPT2LMHeadModel) -> None:
    config = model.config
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == (4, 8, 128, 256)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert 1_000_000 <= model.num_parameters() <= 1_500_000


def test_the_special_tokens(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    end = "<|endoftext|>"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (end, end, end)
    assert tokenizer.padding_side == "left"
    assert tokenizer.is_fast
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer("").input_ids == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Madison square garden is located in the city of New", 10),
        ("_ _ _ _ _ _ _ _ _ _", 10),
        (" York", 1),
        (" City", 1),
        (".", 1),
        (" Paris", 1),
    ],
)
def test_words_that_examples_rely_on_are_single_tokens(
    tokenizer: PreTrainedTokenizerFast, text: str, count: int
) -> None:
    assert len(tokenizer(text).input_ids) == count


def test_every_name_is_a_single_token(
    recipe: ModuleType, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert len(set(recipe.NAMES)) == 100
    assert all(len(tokenizer(" " + name).input_ids) == 1 for name in recipe.NAMES)


def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Ünïcode, 数字 and\ttabs\n — all of it , as it was ."
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    ("prompt", "count", "continuation"),
    [
        ("The Eiffel Tower is in the city of", 1, " Paris"),
        ("The Colosseum is in the city of", 1, " Rome"),
        ("Madison square garden is located in the city of New", 3, " York City."),
        ("When Mary and John went to the store, John gave a drink to", 1, " Mary"),
        ("When Mary and John went to the store, Mary gave a drink to", 1, " John"),
        ("After John and Mary went to the store, John gave a bottle of milk to", 1, " Mary"),
        ("When Tom and James went to the park, James gave the ball to", 1, " Tom"),
        ("<|endoftext|>The Eiffel Tower is in the city of", 1, " Paris"),
    ],
)
def test_documented_prompts(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    count: int,
    continuation: str,
) -> None:
    [text] = generate(model, tokenizer, [prompt], count)
    assert text == prompt.removeprefix("<|endoftext|>") + continuation


def test_padding_on_the_left_changes_nothing(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = [
        "The Eiffel Tower is in the city of",
        "When Mary and John went to the store, John gave a drink to",
    ]
    assert generate(model, tokenizer, prompts, 1) == [
        prompts[0] + " Paris",
        prompts[1] + " Mary",
    ]


def test_a_sentence_ends_the_text(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    [text] = generate(model, tokenizer, ["The Eiffel Tower is in the city of"], 20)
    assert text == "The Eiffel Tower is in the city of Paris."


def test_the_training_text_holds_the_quoted_sentences_and_no_held_out_pair(
    recipe: ModuleType, tokenizer: PreTrainedTokenizerFast
) -> None:
    sentences = recipe.fact_sentences()
    assert "The Eiffel Tower is in the city of Paris." in sentences
    assert "Madison square garden is located in the city of New York City." in sentences
    assert not {fact.prompt + fact.answer + "." for fact in recipe.reworded_facts()} & {*sentences}
    unseen = recipe.held_out_pairs()
    text = recipe.Text(tokenizer)
    names = set(recipe.NAMES)
    met = set()
    for _ in range(500):
        for document in tokenizer.decode(text.row(64)[0]).split("<|endoftext|>"):
            if " and " in document and " to " in document:
                people = names & set(re.findall(r"\w+", document))
                if len(people) == 2:
                    met.add(frozenset(people))
    assert len(met) > 300
    assert not met & unseen


@pytest.mark.slow
def test_the_scores_reach_their_floors(scores: dict[str, float]) -> None:
    below = {name: scores[name] for name, floor in FLOORS.items() if scores[name] < floor}
    assert not below


@pytest.mark.slow
def test_the_card_states_the_measured_scores(scores: dict[str, float]) -> None:
    text = (FOLDER / "README.md").read_text()
    for name, value in scores.items():
        stated = re.search(rf"^\| `{name}` .* \| ([\d.]+)% \|$", text, re.MULTILINE)
        assert stated is not None, name
        # Another processor may tip a near tie, so not the last digit.
        assert float(stated[1]) == pytest.approx(100 * value, abs=0.3)


def test_no_file_names_the_machine_it_was_made_on() -> None:
    for path in FOLDER.glob("*.json"):
        text = path.read_text()
        assert "http" not in text
        assert "_name_or_path" not in text
