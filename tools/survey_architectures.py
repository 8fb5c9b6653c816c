"""Which unified names hold on which causal language models: writes docs/architectures.md.

Every type of `tiny_models` is built small with random weights, and `verify_names` checks each name
against what it promises. Names that do not keep it are taken out, and the rest is checked again, until
all that remains holds. Each type runs in a process of its own, with a time limit.

    python tools/survey_architectures.py                  # all types, writes the page
    python tools/survey_architectures.py granite stablelm # these types, prints what was found
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import dataclasses
import json
import logging
import queue
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
SECONDS = 240
PROCESSES = 2

NAMES = (
    "resid_pre resid_mid resid_post attn_in attn_out mlp_in mlp_out q k v scores pattern z head_out"
    " mlp_pre mlp_post"
).split()

#: Parts of the reasons why an architecture cannot have a name; then its absence does not count.
#: The last two are for what is there, but is not what the name promises.
CANNOT = (
    "parallel here",
    "adds once",
    "its neurons are those of experts",
    "has a mixer and no",
    "has no MLP",
    "no MLP was seen",
    "so its parts do not sum to it",
    "channels here, and the name promises",
)


# -------------------------------------------------------------------- one type


def survey(model_type: str) -> dict[str, Any]:
    """What holds on a tiny model of a type."""
    import torch
    import transformers
    from tiny_models import tiny

    from graftwork import LanguageModel
    from graftwork.envoy.names import Missing
    from graftwork.models.vocabulary import Vocabulary

    transformers.logging.set_verbosity_error()
    logging.getLogger("graftwork").setLevel(logging.ERROR)
    torch.manual_seed(0)
    module = tiny(model_type)
    model = LanguageModel(module)
    vocabulary = model.vocabulary()
    dropped: dict[str, str] = {}
    for _ in range(12):
        report = model.verify_names(strict=False)
        if report.ok:
            break
        wrong: dict[str, str] = {}
        for one in report.wrong:
            wrong.setdefault(one.name, f"{one.promise}: {one.reason}")
        dropped.update({name: why for name, why in wrong.items() if name not in dropped})
        gone = {
            name: Missing(f"it was found, but this did not hold: {why}")
            for name, why in wrong.items()
        }
        old = vocabulary.architecture
        blocks = tuple(
            dataclasses.replace(block, places={**block.places, **_only(gone, block.places)})
            for block in old.blocks
        )
        places = {**old.places, **_only(gone, old.places)}
        vocabulary = Vocabulary(model, dataclasses.replace(old, blocks=blocks, places=places))
        model._vocabularies = {"layers": vocabulary}
    else:
        raise RuntimeError(f"names are wrong again and again: {report}")
    found: dict[str, str] = {}
    kinds = []
    for index in range(len(vocabulary)):
        block = vocabulary.architecture.block(index)
        reasons = {
            name: place.reason
            for name, place in block.places.items()
            if name in NAMES and isinstance(place, Missing)
        }
        reasons.update({n: "it is not declared" for n in NAMES if n not in block.places})
        if reasons not in kinds:
            kinds.append(reasons)
    for name in NAMES:
        missing = [reasons[name] for reasons in kinds if name in reasons]
        if len(missing) == len(kinds):
            found[name] = missing[0]
        elif missing:
            found[name] = f"in some layers: {missing[0]}"
    return {
        "type": model_type,
        "class": type(module).__name__,
        "probed": vocabulary.architecture.probed,
        "missing": found,
        "kinds": kinds,
        "dropped": dropped,
        "names": report.names,
        "checks": len(report.findings),
    }


def _only(gone: dict[str, Any], places: Any) -> dict[str, Any]:
    return {name: place for name, place in gone.items() if name in places}


def lacks(result: dict[str, Any], cannot: tuple[str, ...] = CANNOT) -> dict[str, str]:
    """Names that the architecture could have and that do not hold, with the reason."""
    found: dict[str, str] = {}
    for reasons in result["kinds"]:
        for name, reason in reasons.items():
            if not any(part in reason for part in cannot):
                found.setdefault(name, reason)
    return found


# -------------------------------------------------------------------- the page

INTRODUCTION = """# Architectures

Unified names (`model.layers[i].resid_mid`, `.pattern`, `.z`, …) are there for every model of
transformers that is a stack of blocks. For {declared} of the {all} types of causal language models
below, a file in `src/models/architectures` declares where each name is. For the others the library
looks at one forward of the model, on values without numbers, and follows the residual stream through
each kind of block; it says once that it did, and the first block that uses such a name checks it on
the loaded weights and refuses it if it is wrong. A name that is not there says why:
`print(model.layers[0].support())`.

This page is written by `tools/survey_architectures.py` with transformers {version}. Each type is built
small, with random weights, and every name is checked against what it promises: its shape, the
identities between names (what is added gives the stream, pattern · v = z, a weight makes one name of
another, …), and that an edit of it changes the logits. A name that did not keep a promise was taken out
and all others were checked again, so what the table shows as verified is what a model of that type
gives. Random weights cannot show everything: a checkpoint may have settings that its type's defaults do
not have. `model.verify_names()` does the same checks on any loaded model.

**{full} of {all} types are verified in full**: every name holds that the architecture can have. Names
that cannot be there do not count against a type: nothing lies between attention and MLP where they are
parallel, a mixture of experts has no neurons that see all tokens, and a recurrent block has no pattern.
{strict} of them have all the rest. In the other {limited}, more names are not there, as what they
promise does not fit: a name by head has the one number and size of heads that is told for the whole
model (latent attention has other sizes for queries and keys than for values), or the stream itself is
scaled, so that what is added does not sum to it.

In the table ● is verified in every layer, ◐ in some kinds of layers (in the others it is not there),
and · is not there.
"""
SHORT = {
    "resid_pre": "pre", "resid_mid": "mid", "resid_post": "post", "attn_in": "attn in",
    "attn_out": "attn out", "mlp_in": "mlp in", "mlp_out": "mlp out", "head_out": "head out",
    "mlp_pre": "mlp pre", "mlp_post": "mlp post",
}  # fmt: skip


def page(results: list[dict[str, Any]]) -> str:
    """The text of docs/architectures.md."""
    import transformers

    good = [r for r in results if "error" not in r]
    full = [r for r in good if not lacks(r)]
    strict = [r for r in full if not lacks(r, CANNOT[:-2])]
    text = INTRODUCTION.format(
        strict=len(strict),
        limited=len(full) - len(strict),
        declared=len([r for r in good if not r["probed"]]),
        all=len(results),
        full=len(full),
        version=transformers.__version__,
    )
    heads = ["type", "class", "", *(SHORT.get(name, name) for name in NAMES), "in full"]
    rows = [heads, ["---"] * 3 + [":-:"] * (len(NAMES) + 1)]
    for result in good:
        kinds = result["kinds"]
        marks = []
        for name in NAMES:
            gone = len([reasons for reasons in kinds if name in reasons])
            marks.append("●" if not gone else "·" if gone == len(kinds) else "◐")
        how = "probed" if result["probed"] else "declared"
        whole = "" if lacks(result) else "yes"
        rows.append([f"`{result['type']}`", result["class"], how, *marks, whole])
    lines = [text, *("| " + " | ".join(row) + " |" for row in rows), ""]
    lines += ["## What is missing, and why", ""]
    for result in good:
        if lacks(result):
            lines.append(f"- `{result['type']}`: {_reasons(lacks(result))}.")
    lines += ["", "## Names that cannot be there", ""]
    cannot: dict[tuple[str, str], list[str]] = {}
    for result in good:
        gone: dict[str, list[str]] = {}
        for reasons in result["kinds"]:
            for name, reason in reasons.items():
                if name not in lacks(result) and name not in gone.setdefault(reason, []):
                    gone[reason].append(name)
        for reason, names in gone.items():
            ordered = ", ".join(f"`{name}`" for name in NAMES if name in names)
            cannot.setdefault((_clean(reason), ordered), []).append(f"`{result['type']}`")
    for (reason, ordered), types in sorted(cannot.items()):
        lines.append(f"- {ordered}: {reason} ({', '.join(types)}).")
    failed = [r for r in results if "error" in r]
    if failed:
        lines += ["", "## Types without unified names", ""]
        lines += [f"- `{r['type']}`: {_clean(r['error'])}." for r in failed]
    return "\n".join(lines) + "\n"


def _reasons(gaps: dict[str, str]) -> str:
    """Names with the same reason together."""
    found: dict[str, list[str]] = {}
    for name, reason in gaps.items():
        found.setdefault(_clean(reason), []).append(f"`{name}`")
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in found.items())


def _clean(reason: str) -> str:
    """A reason in one line, without places in files of this machine."""
    reason = " ".join(reason.split()).split(" Recorded at ")[0]
    reason = reason.replace("|", "\\|").rstrip(". ")
    return reason if len(reason) < 300 else f"{reason[:297]}…"


# -------------------------------------------------------------------- all types


class Worker:
    """A process that surveys one type after the other; begun again after a crash or a time-out."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def attempt(self, model_type: str) -> dict[str, Any]:
        """The survey of a type, or what kept it from being one."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        late = threading.Timer(SECONDS, process.kill)
        late.start()
        try:
            process.stdin.write(model_type + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            while line and not line.startswith("{"):
                line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            late.cancel()
        if line:
            return dict(json.loads(line))
        code = process.wait()
        why = f"it took more than {SECONDS} s" if code == -9 else f"its process ended with {code}"
        return {"type": model_type, "error": why}

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()


def work() -> None:
    """Survey the types that are read, one a line."""
    for line in sys.stdin:
        model_type = line.strip()
        try:
            result = survey(model_type)
        except Exception as error:
            reason = " ".join(str(error).split())[:400]
            result = {"type": model_type, "error": f"{type(error).__name__}: {reason}"}
        print(json.dumps(result), flush=True)


def main(arguments: list[str]) -> int:
    if arguments == ["--worker"]:
        work()
        return 0
    from tiny_models import causal_types

    file = next((a.partition("=")[2] for a in arguments if a.startswith("--json=")), None)
    types = [a for a in arguments if not a.startswith("-")] or causal_types()
    results: list[dict[str, Any]] = []
    workers: queue.Queue[Worker] = queue.Queue()
    for _ in range(PROCESSES):
        workers.put(Worker())

    def attempt(model_type: str) -> dict[str, Any]:
        worker = workers.get()
        try:
            return worker.attempt(model_type)
        finally:
            workers.put(worker)

    with ThreadPoolExecutor(PROCESSES) as pool:
        for result in pool.map(attempt, types):
            results.append(result)
            gaps = {} if "error" in result else lacks(result)
            shown = result.get("error") or ("in full" if not gaps else json.dumps(gaps))
            print(result["type"], shown, flush=True)
            if file:
                Path(file).write_text(json.dumps(results))
    while not workers.empty():
        workers.get().end()
    if len(results) == len(causal_types()):
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(results), encoding="utf-8")
    full = [r for r in results if "error" not in r and not lacks(r)]
    print(f"{len(full)} of {len(results)} in full")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
