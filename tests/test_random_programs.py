"""Random programs over traces, generations and unified names mean what plain hooks make of them.

`tools/random_programs.py` writes and runs them, and is the large form: `--seconds 3600 --seed 1`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def _tool() -> ModuleType:
    path = Path(__file__).parents[1] / "tools" / "random_programs.py"
    spec = importlib.util.spec_from_file_location("random_programs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


PROGRAMS = _tool()


#: Of each architecture. Others were run by the large form.
SEEDS = (5000, 5001)


def check(seed: int, kinds: list[str] | None = None) -> None:
    """One program: nothing differs, and nothing is left on the model."""
    try:
        program = PROGRAMS.write(seed, kinds)
        message = PROGRAMS.compare(program)
    except PROGRAMS.Invalid:  # drawn lines that have no meaning in plain torch either
        return
    assert not message, PROGRAMS.shown(program, message)
    module = PROGRAMS.wrapped(program.kind, program.dtype).load()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROGRAMS.KINDS)
def test_programs_of_an_architecture(kind: str) -> None:
    for seed in SEEDS:
        check(seed, [kind])


@pytest.mark.slow
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10_000))
def test_programs_of_any_architecture(seed: int) -> None:
    check(seed)


def test_what_is_written_in_place_is_seen_by_the_plain_interpreter() -> None:
    """The reference itself: an edit of a place is in what comes after it, and in no saved value."""
    program = PROGRAMS.Program(
        "llama", torch.float64, False, 1, {}, None, "single", [PROGRAMS.Invoke([[3, 4, 5]])], {}
    )
    segment = PROGRAMS.Segment("next", [0])
    segment.lines = {
        "resid_post 1": ["v1 = @resid_post 1@", "save(s1, v1)", "v1[:, -1] = 0.0", "save(s2, v1)"],
        "resid_pre 2": ["save(s3, @resid_pre 2@)"],
    }
    segment.order = list(segment.lines)
    program.invokes[0].segments = [segment]
    program.saves = {"s1": "token", "s2": "token", "s3": "token"}
    ((one,),) = PROGRAMS.run_plain(program)
    first, second, third = (one.saved[name][0] for name in ("s1", "s2", "s3"))
    assert first[:, -1].abs().min() > 0 and not second[:, -1].any()
    assert torch.equal(second, third) and torch.equal(first[:, :-1], second[:, :-1])
    assert not PROGRAMS.compare(program)
