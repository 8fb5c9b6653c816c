"""README.md cannot rot: examples run, the picture is what the demo draws, links lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest

from graftwork import LanguageModel, demo

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
# The heading that an example stands under, and its code.
EXAMPLES = re.findall(r"^### ([^\n]+)\n(?:(?!^#).)*?^```python\n(.*?)^```$", TEXT, re.M | re.S)
NEEDS = {"Quantized weights": "bitsandbytes"}


def test_every_python_block_is_an_example() -> None:
    assert len(EXAMPLES) == TEXT.count("```python\n") >= 10


@pytest.mark.parametrize(
    ("heading", "code"),
    [
        pytest.param(heading, code, id=heading, marks=[pytest.mark.slow] * (heading in NEEDS))
        for heading, code in EXAMPLES
    ],
)
def test_example_runs(
    heading: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = NEEDS.get(heading)
    if needs and importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs}, of the extra `quant`, is not installed")
    assert "assert" in code, "an example states its result"
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"README.md, {heading}", "exec"), {"__name__": "readme"})


def test_examples_leave_nothing_in_the_checkout() -> None:
    written = re.findall(r'"([\w-]+\.(?:edits|json|safetensors|svg|png|pt|html|mmd|dot))"', TEXT)
    assert "coder.edits" in written
    assert [name for name in written if (README.parent / name).exists()] == []


def test_picture_is_what_the_demo_draws() -> None:
    """Within a percentage point, since another processor may round another way."""
    effect = demo.patch(
        LanguageModel("graftwork/tiny"),
        demo.TOWER,
        demo.NEEDLE,
        demo.TOWER_CITY,
        demo.NEEDLE_CITY,
    )
    rows = re.findall(r"^layer (\d) (.*)$", TEXT, re.M)
    assert [int(layer) for layer, _ in rows] == [3, 2, 1, 0]
    for layer, cells in rows:
        shown = [0 if cell == "·" else int(cell) for cell in re.findall(r"-?\d+|·", cells)]
        assert shown == pytest.approx((100 * effect[int(layer)]).tolist(), abs=1.01)
    assert re.search(r"^ +The +Space +Needle +is +in +the +city +of\n +Eiffel +Tower$", TEXT, re.M)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (README.parent / target).exists(), target


def test_make_targets_exist() -> None:
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", TEXT, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
