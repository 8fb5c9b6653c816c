"""What a user sees of an error: few frames, and their own line first."""

import linecache
import os
import pdb
import subprocess
import sys
import threading
import traceback
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graftwork
from graftwork import GraftworkError, LanguageModel, Model
from graftwork.tracing.errors import Location, ShapeError

PROMPT = "The Eiffel Tower is in the city of"


def frames(error: BaseException) -> list[tuple[str, str]]:
    """File and source line of each frame."""
    found = traceback.extract_tb(error.__traceback__)
    return [(Path(one.filename).name, one.line or "") for one in found]


def in_a_helper(value: Any) -> Any:
    return value @ torch.zeros(3, 3)  # in the helper


@pytest.fixture(scope="module")
def tiny() -> Any:
    return LanguageModel("graftwork/tiny")


def test_an_error_of_torch_has_the_users_line_first_and_last(toy: Model, x: torch.Tensor) -> None:
    with pytest.raises(RuntimeError) as caught:
        with toy.trace(x):
            (toy.mid.output @ torch.zeros(3, 3)).save()  # the line
    error = caught.value
    assert type(error) is RuntimeError
    first, second = str(error).splitlines()
    assert first.startswith(__file__) and "# the line`" in first
    assert second == (
        "in the result of `matmul`: mat1 and mat2 shapes cannot be multiplied (10x8 and 3x3)"
    )
    seen = frames(error)
    assert len(seen) == 3
    assert seen[0][1] == "with toy.trace(x):" and "# the line" in seen[2][1]
    # The real frame, with its variables.
    last = traceback.walk_tb(error.__traceback__)
    assert [frame for frame, _ in last][-1] is sys._getframe()
    assert len(error.full_traceback) > 8
    assert any("interpreter.py" in one.filename for one in error.full_traceback)


def test_the_line_of_a_function_that_has_returned(toy: Model, x: torch.Tensor) -> None:
    with pytest.raises(RuntimeError) as caught:
        with toy.trace(x):
            in_a_helper(toy.mid.output).save()
    assert "# in the helper`" in str(caught.value).splitlines()[0]
    assert "# in the helper" in frames(caught.value)[-1][1]
    assert len(frames(caught.value)) == 3


def test_our_own_refusals(toy: Model, x: torch.Tensor) -> None:
    with pytest.raises(ShapeError) as caught:
        with toy.trace(x):
            toy.mid.output = torch.zeros(7, 7)  # the line
            toy.output.save()
    assert "# the line" in str(caught.value).splitlines()[0]
    assert "# the line" in frames(caught.value)[-1][1] and len(frames(caught.value)) == 3


def test_frames_of_the_users_own_function_stay(toy: Model, x: torch.Tensor) -> None:
    def outer(value: Any) -> Any:
        return inner(value)

    def inner(value: Any) -> Any:
        raise LookupError("mine")  # where it is

    with pytest.raises(LookupError) as caught:
        with toy.trace(x):
            graftwork.apply(outer, toy.mid.output).save()  # the line
    assert caught.value.args == ("mine",)
    lines = [line for _, line in frames(caught.value)]
    assert len(lines) == 5 and "# the line" in lines[2]
    assert "inner(value)" in lines[3] and "# where it is" in lines[4]


def test_a_model_that_fails_by_itself_shows_its_line(tiny: Any) -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ torch.zeros(2, 2)  # of the module

    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
        with Model(nn.Sequential(nn.Linear(3, 3), Fails())).trace(torch.zeros(1, 3)) as tracer:
            tracer.output.save()
    assert "# of the module" in frames(caught.value)[-1][1] and len(frames(caught.value)) <= 4
    with pytest.raises(ValueError, match="cross-attention") as caught_too:
        with tiny.trace(PROMPT, encoder_hidden_states=torch.zeros(1, 3, 128)) as tracer:
            tracer.output.save()
    assert len(frames(caught_too.value)) <= 4
    assert "modeling_gpt2" in frames(caught_too.value)[-1][0]


def test_values_on_demand_and_shapes(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x):
        wrong = toy.mid.output @ torch.zeros(3, 3)  # the line
        for use in (bool, float, lambda p: p.item(), lambda p: p.shape, len):
            with pytest.raises(RuntimeError) as caught:
                use(wrong)
            assert "# the line`" in str(caught.value).splitlines()[0]
            assert len(frames(caught.value)) <= 6  # one is of this test


def test_scan_edit_session_and_compiled(tiny: Any, toy: Model, x: torch.Tensor) -> None:
    found = []
    with pytest.raises(RuntimeError) as caught:
        with tiny.scan(PROMPT):
            tiny.transformer.h[0].output @ torch.zeros(3, 3)  # the line
    found.append(caught.value)
    with pytest.raises(RuntimeError) as caught:
        with tiny.edit():
            tiny.transformer.h[0].output[0][:] += torch.zeros(7)  # the line
    found.append(caught.value)
    with pytest.raises(RuntimeError) as caught:
        with toy.session():
            with toy.trace(x):
                (toy.mid.output @ torch.zeros(3, 3)).save()  # the line
    found.append(caught.value)
    with toy.trace(x) as tracer:
        (toy.mid.output + torch.zeros(2, 5, 8)).save()  # the line
    experiment = tracer.compile()
    with pytest.raises(RuntimeError) as caught:
        experiment(torch.zeros(3, 4, 8)[:2])
    found.append(caught.value)
    for error in found:
        assert "# the line" in str(error).splitlines()[0]
        assert len(frames(error)) <= 4 and "# the line" in frames(error)[-1][1]


def test_what_an_error_came_from_is_cut_too(toy: Model, x: torch.Tensor) -> None:
    def fails(value: Any) -> Any:
        try:
            raise KeyError("first")  # inside
        except KeyError as error:
            raise OSError("second") from error

    try:
        raise ZeroDivisionError("handled")
    except ZeroDivisionError:
        handled = sys.exc_info()[1]
        assert handled is not None
        before = handled.__traceback__
        with pytest.raises(OSError, match="second") as caught:
            with toy.trace(x):
                graftwork.apply(fails, toy.mid.output).save()
        cause = caught.value.__cause__
        assert isinstance(cause, KeyError)
        assert [line for _, line in frames(cause)] == ['raise KeyError("first")  # inside']
        assert cause.__context__ is handled and handled.__traceback__ is before


def test_all_frames_on_request(
    toy: Model, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTWORK_TRACEBACK", "full")
    with pytest.raises(RuntimeError) as caught:
        with toy.trace(x):
            (toy.mid.output @ torch.zeros(3, 3)).save()  # the line
    assert len(frames(caught.value)) > 8 and "interpreter.py" in str(frames(caught.value))
    assert "# the line" in str(caught.value).splitlines()[0]


def test_in_a_thread_and_in_a_debugger(toy: Model, x: torch.Tensor) -> None:
    found: list[BaseException] = []

    def work() -> None:
        a_variable = 7
        try:
            with toy.trace(x):
                (toy.mid.output @ torch.zeros(3, 3)).save()  # the line
        except RuntimeError as error:
            found.append(error)
        assert a_variable

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    debugger = pdb.Pdb()
    debugger.reset()
    debugger.setup(None, found[0].__traceback__)
    assert debugger.curframe.f_locals["a_variable"] == 7  # where `pdb.pm()` stands
    stack, at = debugger.get_stack(None, found[0].__traceback__)
    frame, line = stack[at]
    assert "# the line" in linecache.getline(frame.f_code.co_filename, line)


def test_dropped_values_are_let_go_of(toy: Model, x: torch.Tensor) -> None:
    """What failed does not keep the model's values, as long as the error is kept."""
    with pytest.raises(RuntimeError) as caught:
        with toy.trace(x):
            (toy.mid.output @ torch.zeros(3, 3)).save()
    for frame, _ in traceback.walk_tb(caught.value.__traceback__):
        assert "interpreter" not in frame.f_code.co_filename
        assert "/torch/" not in frame.f_code.co_filename


def test_a_cell_has_its_notebooks_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"/tmp/ipykernel_12/345.py": ("Cell", "In[3]")}
    shell = types.SimpleNamespace(compile=types.SimpleNamespace(format_code_name=names.get))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    source = "with model.trace(prompt):\n    h = model.layer.output @ W\n"
    cache = (len(source), None, source.splitlines(True), "/tmp/ipykernel_12/345.py")
    monkeypatch.setitem(linecache.cache, "/tmp/ipykernel_12/345.py", cache)
    cell = Location("/tmp/ipykernel_12/345.py", 2)
    assert str(cell) == "Cell In[3], line 2  `h = model.layer.output @ W`"
    assert str(Location("/home/me/own.py", 2)) == "/home/me/own.py:2"
    monkeypatch.delitem(sys.modules, "IPython")
    assert str(Location("<ipython-input-7-0af3>", 2)) == "Cell In[7], line 2"


@pytest.mark.slow
def test_what_python_prints(tmp_path: Path) -> None:
    """The interpreter's own printing, which reads the frames in C before Python 3.13."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from torch import nn\n"
        "from graftwork import Model\n"
        "def helper(value):\n"
        "    return value @ torch.zeros(3, 3)\n"
        "model = Model(nn.Sequential(nn.Linear(4, 4)))\n"
        "with model.trace(torch.zeros(2, 4)):\n"
        "    helper(model[0].output).save()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=dict(os.environ)
    )
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    assert sum(line.startswith("File ") for line in lines) == 3
    assert lines[-4:] == [
        f'File "{script}", line 5, in recorded here',
        "return value @ torch.zeros(3, 3)",
        f"RuntimeError: {script}:5  `return value @ torch.zeros(3, 3)`",
        "in the result of `matmul`: mat1 and mat2 shapes cannot be multiplied (2x4 and 3x3)",
    ]


def test_errors_of_the_package_can_be_pickled(toy: Model, x: torch.Tensor) -> None:
    import pickle

    with pytest.raises(GraftworkError) as caught:
        with toy.trace(x):
            toy.mid.output = torch.zeros(7, 7)
            toy.output.save()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
