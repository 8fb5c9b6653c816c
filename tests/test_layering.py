"""Rules on the source that no type checker enforces, held by walking its syntax trees.

A rule is a function (tree, path inside src) → complaints. Each one is also shown bad source, so
that it is known to bite.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

SRC = Path(__file__).parents[1] / "src"
FILES = sorted(PurePosixPath(path.relative_to(SRC).as_posix()) for path in SRC.rglob("*.py"))

# room → the other rooms it may import. Files directly in src (None) may import every room.
ROOMS: dict[str, set[str]] = {
    "tracing": set(),
    "intervention": {"tracing"},
    "envoy": {"tracing"},
    "policies": {"tracing", "envoy"},
    "inputs": {"tracing", "intervention", "envoy"},
    "engines": {"tracing", "intervention", "envoy", "inputs"},
    "models": {"tracing", "intervention", "envoy", "policies", "inputs", "engines"},
    "lens": {"tracing", "intervention", "envoy", "models", "policies", "inputs", "engines"},
    "pruning": {"tracing", "intervention", "envoy", "models", "policies", "inputs", "engines"},
}
HEAVY = ("transformers", "accelerate", "bitsandbytes", "diffusers")
VAGUE_NAMES = {"util", "utils", "helper", "helpers", "common", "misc"}
MAY_PRINT = {PurePosixPath("demo.py"), PurePosixPath("__main__.py")}

Import = ast.Import | ast.ImportFrom
Rule = Callable[[ast.Module, PurePosixPath], list[str]]


def room_of(path: PurePosixPath) -> str | None:
    return path.parts[0] if len(path.parts) > 1 else None


def is_own(name: str) -> bool:
    return name.split(".")[0] in {"graftwork", "src"}


def imports(tree: ast.Module) -> Iterator[Import]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))


def relative_targets(node: Import, path: PurePosixPath) -> list[tuple[str, ...]]:
    """The own modules, as parts below src, that a relative import in `path` names."""
    if not isinstance(node, ast.ImportFrom) or node.level == 0:
        return []
    above = node.level - 1
    package = path.parent.parts
    base = package[: len(package) - above]
    if node.module:
        return [(*base, *node.module.split("."))]
    return [(*base, alias.name) for alias in node.names]


def is_own_import(node: Import) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.level > 0 or is_own(node.module or "")
    return any(is_own(alias.name) for alias in node.names)


def imports_run_one_way(tree: ast.Module, path: PurePosixPath) -> list[str]:
    room = room_of(path)
    if room is None:
        return []
    if room not in ROOMS:
        return [f"1: {room} is a new room: say in ROOMS what it may import"]
    complaints = []
    for node in imports(tree):
        for target in relative_targets(node, path):
            if target[0] not in ROOMS:
                complaints.append(f"{node.lineno}: {room} imports from the top of the package")
            elif target[0] != room and target[0] not in ROOMS[room]:
                complaints.append(f"{node.lineno}: {room} imports {target[0]}")
    return complaints


def own_imports_stand_at_the_top(tree: ast.Module, path: PurePosixPath) -> list[str]:
    complaints = [
        f"{node.lineno}: own import inside another statement"
        for node in imports(tree)
        if is_own_import(node) and node not in tree.body
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        called, name = ast.unparse(node.func).split(".")[-1], node.args[0]
        if (
            called in {"import_module", "__import__"}
            and isinstance(name, ast.Constant)
            and isinstance(name.value, str)
            and (name.value.startswith(".") or is_own(name.value))
        ):
            complaints.append(f"{node.lineno}: own import by a call")
    return complaints


def own_imports_are_relative(tree: ast.Module, path: PurePosixPath) -> list[str]:
    return [
        f"{node.lineno}: own import by its full name"
        for node in imports(tree)
        if is_own_import(node) and not (isinstance(node, ast.ImportFrom) and node.level)
    ]


def tracing_knows_no_modules(tree: ast.Module, path: PurePosixPath) -> list[str]:
    """torch.nn.functional (functions of tensors) and Parameter (a tensor) are not meant."""
    if room_of(path) != "tracing":
        return []
    allowed = ("torch.nn.functional", "torch.nn.Parameter")
    names: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.count(".") == 2:
                names.append((node.lineno, name))
    return [
        f"{line}: {name} in tracing"
        for line, name in names
        if f"{name}.".startswith("torch.nn.") and not name.startswith(allowed)
    ]


def init_only_reexports(tree: ast.Module, path: PurePosixPath) -> list[str]:
    if path.name != "__init__.py":
        return []

    def plain(node: ast.stmt) -> bool:
        if isinstance(node, ast.Expr):
            return isinstance(node.value, ast.Constant)
        if isinstance(node, ast.Assign):
            return all(ast.unparse(target).startswith("__") for target in node.targets)
        return isinstance(node, ast.Import | ast.ImportFrom)

    return [f"{node.lineno}: code in __init__" for node in tree.body if not plain(node)]


def no_bare_except(tree: ast.Module, path: PurePosixPath) -> list[str]:
    return [
        f"{node.lineno}: bare except"
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]


def no_raise_of_exception(tree: ast.Module, path: PurePosixPath) -> list[str]:
    complaints = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(raised, ast.Name) and raised.id in {"Exception", "BaseException"}:
                complaints.append(f"{node.lineno}: raise {raised.id}")
    return complaints


def no_print(tree: ast.Module, path: PurePosixPath) -> list[str]:
    if path in MAY_PRINT:
        return []
    return [
        f"{node.lineno}: print"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]


def files_are_named_for_what_they_define(tree: ast.Module, path: PurePosixPath) -> list[str]:
    return [f"1: vague name {part}" for part in path.with_suffix("").parts if part in VAGUE_NAMES]


def below_the_face_are_jobs(tree: ast.Module, path: PurePosixPath) -> list[str]:
    """What runs knows blocks as `Job`s, which can come from elsewhere, and never the `Tracer`."""
    if room_of(path) not in {"intervention", "inputs", "engines"}:
        return []
    complaints = [
        f"{node.lineno}: imports tracing.context"
        for node in imports(tree)
        if any(target[:2] == ("tracing", "context") for target in relative_targets(node, path))
    ]
    for node in ast.walk(tree):
        name = getattr(node, "id", getattr(node, "attr", None))
        if name == "Tracer":
            complaints.append(f"{node.lineno}: Tracer")  # type: ignore[attr-defined]
    return complaints


RULES: list[Rule] = [
    below_the_face_are_jobs,
    imports_run_one_way,
    own_imports_stand_at_the_top,
    own_imports_are_relative,
    tracing_knows_no_modules,
    init_only_reexports,
    no_bare_except,
    no_raise_of_exception,
    no_print,
    files_are_named_for_what_they_define,
]

BAD: list[tuple[Rule, str, str]] = [
    (imports_run_one_way, "tracing/a.py", "from ..envoy.envoy import Envoy"),
    (imports_run_one_way, "tracing/a.py", "from ..models import base"),
    (imports_run_one_way, "tracing/a.py", "from .. import intervention"),
    (imports_run_one_way, "tracing/a.py", "from .. import Model"),
    (imports_run_one_way, "tracing/a.py", "from ..demo import main"),
    (imports_run_one_way, "intervention/a.py", "from ..envoy import names"),
    (imports_run_one_way, "intervention/a.py", "from ..models.base import Model"),
    (imports_run_one_way, "intervention/deep/a.py", "from ...envoy import names"),
    (imports_run_one_way, "envoy/__init__.py", "from ..intervention.run import Run"),
    (imports_run_one_way, "envoy/a.py", "def f():\n    from ..models import base"),
    (imports_run_one_way, "models/architectures/a.py", "from ...demo import main"),
    (imports_run_one_way, "cellar/a.py", ""),
    (own_imports_stand_at_the_top, "models/a.py", "def f():\n    from ..tracing import node"),
    (own_imports_stand_at_the_top, "models/a.py", "class A:\n    import graftwork"),
    (own_imports_stand_at_the_top, "models/a.py", "if TYPE_CHECKING:\n    from . import base"),
    (own_imports_stand_at_the_top, "models/a.py", "try:\n    from . import b\nexcept E: ..."),
    (own_imports_stand_at_the_top, "models/a.py", "importlib.import_module('..envoy', 'x')"),
    (own_imports_stand_at_the_top, "models/a.py", "__import__('graftwork.envoy')"),
    (own_imports_are_relative, "models/a.py", "import graftwork.tracing as t"),
    (own_imports_are_relative, "models/a.py", "from graftwork.tracing import node"),
    (own_imports_are_relative, "models/a.py", "from src.tracing import node"),
    (tracing_knows_no_modules, "tracing/a.py", "import torch.nn as nn"),
    (tracing_knows_no_modules, "tracing/a.py", "from torch import nn"),
    (tracing_knows_no_modules, "tracing/a.py", "from torch.nn import Module"),
    (tracing_knows_no_modules, "tracing/a.py", "from torch.nn.modules.linear import Linear"),
    (tracing_knows_no_modules, "tracing/a.py", "isinstance(x, torch.nn.Module)"),
    (below_the_face_are_jobs, "engines/a.py", "from ..tracing.context import open_block"),
    (below_the_face_are_jobs, "inputs/a.py", "def f(block: Tracer): ..."),
    (below_the_face_are_jobs, "intervention/a.py", "isinstance(x, context.Tracer)"),
    (init_only_reexports, "__init__.py", "def f(): ..."),
    (init_only_reexports, "models/__init__.py", "table = {}"),
    (no_bare_except, "models/a.py", "try: ...\nexcept: ..."),
    (no_raise_of_exception, "models/a.py", "raise Exception"),
    (no_raise_of_exception, "models/a.py", "raise Exception('no')"),
    (no_raise_of_exception, "models/a.py", "def f():\n    raise BaseException() from None"),
    (no_print, "models/a.py", "print(1)"),
    (no_print, "models/demo.py", "def f():\n    print(1)"),
    (files_are_named_for_what_they_define, "models/utils.py", ""),
    (files_are_named_for_what_they_define, "common/graph.py", ""),
]

GOOD: list[tuple[str, str]] = [
    ("__init__.py", '"""Doc."""\nfrom .models.base import Model\n__all__ = ["Model"]'),
    ("demo.py", "from .models import LanguageModel\nprint(1)"),
    ("tracing/a.py", "import torch\nfrom torch.nn import functional\ntorch.nn.functional.relu"),
    ("tracing/a.py", "from . import node\nfrom .graph import Graph"),
    ("intervention/a.py", "from torch import nn\nfrom ..tracing.node import Node"),
    ("models/architectures/a.py", "from ...envoy.names import N\nfrom ..base import Model"),
    ("models/a.py", "def f():\n    import transformers\n    from accelerate import big_modeling"),
    ("models/a.py", "try: ...\nexcept Exception:\n    raise"),
]


@functools.cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def check(rule: Rule, source: str, path: PurePosixPath) -> list[str]:
    return [f"src/{path}:{complaint}" for complaint in rule(parsed(source), path)]


def test_all_rooms_are_seen() -> None:
    assert {room_of(path) for path in FILES} >= {None, *ROOMS}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_keeps(rule: Rule) -> None:
    found = [check(rule, (SRC / path).read_text(encoding="utf-8"), path) for path in FILES]
    assert [complaint for complaints in found for complaint in complaints] == []


@pytest.mark.parametrize(("rule", "path", "source"), BAD)
def test_rule_bites(rule: Rule, path: str, source: str) -> None:
    assert len(check(rule, source, PurePosixPath(path))) == 1


def test_every_rule_is_shown_bad_source() -> None:
    assert {rule for rule, _, _ in BAD} == set(RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize(("path", "source"), GOOD)
def test_rule_lets_good_source_pass(rule: Rule, path: str, source: str) -> None:
    assert check(rule, source, PurePosixPath(path)) == []


@pytest.mark.slow
def test_importing_the_package_delays_the_heavy_libraries() -> None:
    code = f"import sys, graftwork; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
