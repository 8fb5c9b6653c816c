"""The demo as a user meets it, and its numbers against plain transformers with torch's hooks."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import graftwork
from graftwork import LanguageModel, __main__, demo

TINY = Path(graftwork.__file__).parent / "models" / "tiny"


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "graftwork", *arguments],
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


def table(printed: str, number: int) -> dict[int, list[str]]:
    """The cells of the demo's heat map with that number, by layer, without their shades."""
    part = printed.split(f"── {number}. ")[1].split("\n──")[0]
    rows = re.findall(r"^layer (\d+) (.*)$", part, re.MULTILINE)
    return {int(layer): re.findall(r"[^\s░▒▓█]+", cells) for layer, cells in rows}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("graftwork/tiny")


class Plain:
    """The same model without graftwork."""

    def __init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(TINY).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(TINY)

    def id(self, word: str) -> int:
        return self.tokenizer.encode(word)[0]

    def logits(self, prompt: str) -> torch.Tensor:
        """At the last token, [vocabulary]."""
        with torch.no_grad():
            return self.model(torch.tensor([self.tokenizer.encode(prompt)])).logits[0, -1]

    def lead(self, logits: torch.Tensor, right: str, wrong: str) -> float:
        return float(logits[self.id(right)] - logits[self.id(wrong)])

    @contextmanager
    def hook(self, module: torch.nn.Module, function: Callable[..., Any]) -> Iterator[None]:
        handle = module.register_forward_hook(function)
        yield
        handle.remove()

    def patched(self, layer: int, token: int) -> float:
        """One cell of the patching experiment, by two forwards with hooks."""
        block = self.model.transformer.h[layer]
        taken: list[torch.Tensor] = []

        def take(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            taken.append(output[:, token].clone())

        def put(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[:, token] = taken[0]
            return output

        def difference(logits: torch.Tensor) -> float:
            return self.lead(logits, demo.TOWER_CITY, demo.NEEDLE_CITY)

        with self.hook(block, take):
            best = difference(self.logits(demo.TOWER))
        worst = difference(self.logits(demo.NEEDLE))
        with self.hook(block, put):
            moved = difference(self.logits(demo.NEEDLE))
        return (moved - worst) / (best - worst)

    def ablated(self, layer: int, head: int) -> float:
        """The receiver's lead with one head's values set to zero."""
        width = self.model.config.n_embd
        size = width // self.model.config.n_head
        first = 2 * width + head * size

        def silence(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[..., first : first + size] = 0
            return output

        with self.hook(self.model.transformer.h[layer].attn.c_attn, silence):
            return self.lead(self.logits(demo.GIFT), demo.RECEIVER, demo.GIVER)


@pytest.fixture(scope="module")
def plain() -> Plain:
    return Plain()


@pytest.fixture(scope="module")
def printed() -> str:
    """What the command prints."""
    done = command("demo", COLUMNS="100")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


# ------------------------------------------------------------------ the command


@pytest.mark.slow
def test_demo_shows_three_experiments(printed: str) -> None:
    assert printed.startswith("graftwork/tiny: 4 layers of 8 heads, ")
    for line in (
        "── 1. What would each layer say? ─",
        "the model goes on: “New York City”",
        "── 2. Which attention heads matter? ─",
        "── 3. Where is the fact, and when? ─",
        "the model leans to “Paris” as if the whole prompt had been replaced",
        "── Next ─",
    ):
        assert line in printed
    assert [sorted(table(printed, number)) for number in (1, 2, 3)] == [[0, 1, 2, 3]] * 3
    assert "\033" not in printed, "colours in a pipe"


@pytest.mark.slow
def test_demo_puts_the_tokens_under_the_map(printed: str) -> None:
    tokens, source = printed.split("── 3. ")[1].split("\nlayer 0 ")[1].splitlines()[1:3]
    assert tokens.split() == demo.NEEDLE.split()
    assert source.split() == ["Eiffel", "Tower"]
    assert tokens.index("Space") - source.index("Eiffel") in (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "token"), [(1, 2), (2, 7)])
def test_printed_patch_is_what_plain_hooks_give(
    printed: str, plain: Plain, layer: int, token: int
) -> None:
    share = plain.patched(layer, token)
    assert int(table(printed, 3)[layer][token]) == pytest.approx(100 * share, abs=0.6)


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "head"), [(0, 4), (2, 3)])
def test_printed_ablation_is_what_plain_hooks_give(
    printed: str, plain: Plain, layer: int, head: int
) -> None:
    normal = plain.lead(plain.logits(demo.GIFT), demo.RECEIVER, demo.GIVER)
    assert float(table(printed, 2)[layer][head]) == pytest.approx(
        plain.ablated(layer, head) - normal, abs=0.06
    )


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_command_without_a_command_explains(arguments: tuple[str, ...]) -> None:
    done = command(*arguments)
    assert done.returncode == 0
    assert "usage: python -m graftwork" in done.stdout
    assert "demo" in done.stdout and "README.md" in done.stdout


def test_unknown_command_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        __main__.main(["dmeo"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "graftwork: there is no command 'dmeo', there is `demo`. "
        "`python -m graftwork --help` explains.\n"
    )


def test_model_that_is_not_there_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a" / "b"
    assert __main__.main(["demo", "--model", str(folder)]) == 2
    assert capsys.readouterr() == ("", f"graftwork: There is no folder {str(folder)!r}.\n")


def test_model_of_another_architecture_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, '
        '"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}'
    )
    assert __main__.main(["demo", "--model", str(tmp_path)]) == 2
    assert "The demo uses the module names of GPT-2" in capsys.readouterr().err


# ------------------------------------------------------------------ the experiments


def test_logit_lens_ends_in_what_is_said(model: LanguageModel) -> None:
    lens = demo.logit_lens(model, demo.CITY, steps=3)
    assert lens.text == demo.CITY + "".join(column[-1][0] for column in lens.columns)
    count, width = len(demo.tokens_of(model, demo.CITY)), model.config.n_embd
    assert lens.shapes == [(1, count, width), (1, 1, width), (1, 1, width)]


def test_every_patch_and_ablation_is_what_plain_hooks_give(
    model: LanguageModel, plain: Plain
) -> None:
    effect = demo.patch(model, demo.TOWER, demo.NEEDLE, demo.TOWER_CITY, demo.NEEDLE_CITY)
    for layer, token in ((0, 1), (1, 2), (2, 3), (3, 7)):
        assert effect[layer, token].item() == pytest.approx(plain.patched(layer, token), abs=1e-4)
    normal, leads = demo.ablate_heads(model, demo.GIFT, demo.RECEIVER, demo.GIVER)
    expected = plain.lead(plain.logits(demo.GIFT), demo.RECEIVER, demo.GIVER)
    assert normal == pytest.approx(expected, abs=1e-3)
    for layer, head in ((0, 0), (1, 7), (3, 4)):
        assert leads[layer, head].item() == pytest.approx(plain.ablated(layer, head), abs=1e-3)


def test_the_experiments_show_something(model: LanguageModel) -> None:
    """A place where the fact is early, another where it is late; heads for and against."""
    effect = demo.patch(model, demo.TOWER, demo.NEEDLE, demo.TOWER_CITY, demo.NEEDLE_CITY)
    assert effect[-1, -1] == pytest.approx(1.0, abs=1e-4)
    assert effect[0, 1:3].max() > 0.5 and effect[0, -1] < 0.2
    normal, leads = demo.ablate_heads(model, demo.GIFT, demo.RECEIVER, demo.GIVER)
    assert leads.min() < 0.6 * normal and leads.max() > 1.4 * normal


# ------------------------------------------------------------------ drawing


class Screen(io.StringIO):
    """A terminal that somebody looks at."""

    def isatty(self) -> bool:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("columns", [100, 60, 40, 24])
def test_demo_fits_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    demo.main()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns


@pytest.mark.parametrize(
    ("screen", "no_color", "coloured"),
    [(Screen, "", True), (Screen, "1", False), (io.StringIO, "", False)],
)
def test_colour_is_for_eyes_that_want_it(
    screen: type[io.StringIO], no_color: str, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdout", screen())
    terminal = demo.Terminal()
    terminal.title("a title")
    terminal.heat_map([[("low", 0.1), ("high", 0.9)]], [["one", "two"]])
    shown = sys.stdout.getvalue()
    assert ("\033[" in shown) == coloured
    assert ("█" in shown) != coloured
    assert "low" in shown and "high" in shown


def test_cells_are_fuller_the_stronger_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    cells = [("·", 0.0), ("30", 0.3), ("50", 0.5), ("70", 0.7), ("100", 1.0)]
    demo.Terminal().heat_map([cells, cells[::-1]], [["a", "b", "c", "d", "e"]])
    above, below, words = capsys.readouterr().out.splitlines()[1:4]
    assert above.split() == "layer 1 █ 100 █ ▓ 70 ▓ ▒ 50 ▒ ░ 30 ░ ·".split()
    assert below.split() == "layer 0 · ░ 30 ░ ▒ 50 ▒ ▓ 70 ▓ █ 100 █".split()
    assert words.split() == ["a", "b", "c", "d", "e"]


def test_words_stand_upright_where_there_is_no_room(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "15")
    demo.Terminal().heat_map([[("100", 1.0), ("50", 0.5), ("·", 0.0)]], [["The", "city", "of"]])
    assert capsys.readouterr().out.splitlines()[1:-1] == [
        "layer 0  ██▒▒",
        "         T c o",
        "         h i f",
        "         e t",
        "           y",
    ]
