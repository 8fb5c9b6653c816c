"""What the planner saves: blocks of many invokes against plain PyTorch, in one process.

GPT-2 small shape with random weights. "Plain" is one forward with hooks for each variant; "by hand"
is what one writes for this sweep alone: the shared blocks once, all positions of a layer in one batch
from the edited layer on, logits of the last position.

    OMP_NUM_THREADS=1 python benchmarks/sweeps.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from bench import gpt2, interleave, ratio
from transformers import logging

import graftwork

CLEAN, CORRUPTED = list(range(10, 26)), list(range(30, 46))
RIGHT, WRONG = 7, 9
LAYERS, HEADS = 12, 12
Effects = dict[tuple[int, int], Any]


def difference(logits: torch.Tensor) -> Any:
    """Logit difference at the last position, of logits [batch, token, vocabulary]."""
    return logits[:, -1, RIGHT] - logits[:, -1, WRONG]


class Patching:
    """The residual stream of one prompt into another, each layer and position."""

    def __init__(self, module: Any) -> None:
        self.module, self.model = module, graftwork.LanguageModel(module)
        self.blocks = list(module.transformer.h)

    def _streams(self, ids: list[int]) -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        handles = [b.register_forward_hook(lambda _m, _a, o: kept.append(o)) for b in self.blocks]
        try:
            self.module.transformer(torch.tensor([ids]))
        finally:
            for handle in handles:
                handle.remove()
        return kept

    @torch.no_grad()
    def plain(self) -> Effects:
        source, effects = self._streams(CLEAN), {}
        ids = torch.tensor([CORRUPTED])
        for layer in range(LAYERS):
            for position in range(len(CLEAN)):

                def patch(_m: Any, _a: Any, output: Any, p: int = position, k: int = layer) -> Any:
                    output = output.clone()
                    output[:, p] = source[k][:, p]
                    return output

                handle = self.blocks[layer].register_forward_hook(patch)
                effects[layer, position] = difference(self.module(ids).logits)
                handle.remove()
        return effects

    @torch.no_grad()
    def by_hand(self) -> Effects:
        source, base = self._streams(CLEAN), self._streams(CORRUPTED)
        count, effects = len(CLEAN), {}
        body = self.module.transformer
        for layer in range(LAYERS):
            hidden = base[layer].repeat(count, 1, 1)
            for position in range(count):
                hidden[position, position] = source[layer][0, position]
            for block in self.blocks[layer + 1 :]:
                hidden = block(hidden)
            found = difference(self.module.lm_head(body.ln_f(hidden[:, -1:])))
            for position in range(count):
                effects[layer, position] = found[position : position + 1]
        return effects

    def ours(self, **plan: bool) -> Effects:
        model, effects = self.model, {}
        with model.trace(plan={"progress": False, **plan}) as tracer:
            with tracer.invoke(CLEAN):
                source = [block.output for block in model.transformer.h]
            for layer in range(LAYERS):
                for position in range(len(CLEAN)):
                    with tracer.invoke(CORRUPTED):
                        model.transformer.h[layer].output.t[position] = source[layer].t[position]
                        effects[layer, position] = difference(model.lm_head.output).save()
        return {key: value.value for key, value in effects.items()}


class HeadAblation:
    """Each head silenced, one at a time."""

    def __init__(self, module: Any) -> None:
        self.module, self.model = module, graftwork.LanguageModel(module)

    @torch.no_grad()
    def plain(self) -> Effects:
        effects, ids = {}, torch.tensor([CLEAN])
        for layer, block in enumerate(self.module.transformer.h):
            width = block.attn.head_dim
            for head in range(HEADS):

                def ablate(_m: Any, args: Any, h: int = head, w: int = width) -> Any:
                    z = args[0].clone()
                    z[..., h * w : (h + 1) * w] = 0
                    return (z,)

                handle = block.attn.c_proj.register_forward_pre_hook(ablate)
                effects[layer, head] = difference(self.module(ids).logits)
                handle.remove()
        return effects

    def ours(self) -> Effects:
        model, effects = self.model, {}
        with model.trace(plan={"progress": False}) as tracer:
            for layer in range(LAYERS):
                for head in range(HEADS):
                    with tracer.invoke(CLEAN):
                        model.transformer.h[layer].attn.value.output[:, head] = 0
                        effects[layer, head] = difference(model.lm_head.output).save()
        return {key: value.value for key, value in effects.items()}


def same(one: Effects, other: Effects) -> None:
    worst = max(float((one[key] - other[key]).abs().max()) for key in other)
    assert worst < 1e-4, worst


def line(name: str, slow: list[float], fast: list[float], limit: str) -> str:
    a, b = statistics.median(slow), statistics.median(fast)
    return f"| {name} ({a:.2f} → {b:.2f} s) | {ratio(slow, fast):.2f} × | {limit} |"


def sweeps(module: Any, runs: int) -> None:
    patching = Patching(module)
    whole = {"causal": False}
    expected = patching.plain()
    same(patching.by_hand(), expected)
    same(patching.ours(), expected)
    same(patching.ours(**whole), expected)
    sides: dict[str, Callable[[], Any]] = {
        "plain": patching.plain,
        "hand": patching.by_hand,
        "whole": lambda: patching.ours(**whole),
        "ours": patching.ours,
    }
    times = interleave(sides, runs, warm=0)
    print(
        line(
            "192 residual patches, from the edited layer on", times["plain"], times["whole"], "6 ×"
        )
    )
    print(line("the same, time against by hand", times["whole"], times["hand"], "at most 1.15 ×"))
    print(
        line("the same, from the edited token on", times["plain"], times["ours"], "9 ×"), flush=True
    )
    ablation = HeadAblation(module)
    same(ablation.ours(), ablation.plain())
    times = interleave({"plain": ablation.plain, "ours": ablation.ours}, runs, warm=0)
    print(line("144 head ablations", times["plain"], times["ours"], "6 ×"), flush=True)


def depths(module: Any, runs: int) -> None:
    """Reading one layer against a whole forward."""
    model, ids = graftwork.LanguageModel(module), torch.tensor([CLEAN])

    @torch.no_grad()
    def whole() -> Any:
        return module(ids, attention_mask=torch.ones_like(ids))

    def read(layer: int) -> Callable[[], Any]:
        def run() -> Any:
            with model.trace(ids):
                return model.transformer.h[layer].output.save()

        return run

    names = {"whole": whole, **{str(k): read(k) for k in (0, 5, 11)}}
    times = interleave(names, 10 * runs, warm=3)
    for k in (0, 5, 11):
        share = ratio(times[str(k)], times["whole"])
        limit = f"{(k + 1) / LAYERS + 0.08:.2f} ×"
        print(f"| reading block {k} of 12 against a whole forward | {share:.2f} × | {limit} |")


_MEMORY = """
import sys, torch
sys.path.insert(0, {folder!r})
from bench import gpt2
import graftwork
module = gpt2(12, 768, 12, 50257)
model = graftwork.LanguageModel(module)
ids = torch.randint(1, 50000, (8, 128))
def high():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
def now():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) * 1024
loaded = now()
if {ours!r}:
    with model.trace(ids) as tracer:
        saved = [block.output.save() for block in model.transformer.h]
        _ = tracer.output.logits[:, -1].save()
else:
    with torch.no_grad():
        module(ids, attention_mask=torch.ones_like(ids)).logits[:, -1].clone()
print(high() - loaded)
"""


def memory(runs: int) -> None:
    """Peak memory of saving all block outputs of 8 × 128 tokens, over the loaded model."""
    folder = __file__.rsplit("/", 1)[0]

    def peak(ours: bool) -> float:
        code = _MEMORY.format(folder=folder, ours=ours)
        # Freed memory goes back at once, or the high-water mark tells of the allocator's habits.
        habits = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, **habits},
        )
        return float(done.stdout.split()[-1])

    saved = 12 * 8 * 128 * 768 * 4
    plain = statistics.median(peak(False) for _ in range(runs))
    ours = statistics.median(peak(True) for _ in range(runs))
    share = ours / (plain + saved)
    print(
        f"| peak memory, 12 block outputs of 8 × 128 tokens ({plain / 1e6:.0f} MB plain forward, "
        f"{saved / 1e6:.0f} MB saved, {ours / 1e6:.0f} MB ours) | {share:.2f} × | 1.15 × |"
    )


def planning(runs: int) -> None:
    """Recording and planning 200 invokes of 6 nodes each, without a run."""
    module = gpt2(12, 64, 4, 1000)
    model = graftwork.LanguageModel(module)
    model.schedule()

    def record() -> None:
        tracer = model.trace()
        tracer.__enter__()
        try:
            for i in range(200):
                with tracer.invoke(CLEAN):
                    block = model.transformer.h[i % LAYERS]
                    block.output[:, -1] += 1.0
                    model.lm_head.output[:, -1].save()
            model.plan_block(tracer)
        finally:
            tracer.__exit__(RuntimeError, None, None)

    seconds = statistics.median(interleave({"ours": record}, 5 * runs, warm=2)["ours"])
    print(f"| recording and planning 200 invokes of 6 nodes | {seconds * 1000:.1f} ms | 25 ms |")


def main() -> None:
    parser = argparse.ArgumentParser(description="What the planner saves.")
    parser.add_argument("--runs", type=int, default=5, help="rounds of each case")
    runs = parser.parse_args().runs
    logging.set_verbosity_error()
    start = time.perf_counter()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {runs} rounds\n")
    print("| case | measured | wanted |\n|---|---|---|")
    module = gpt2(12, 768, 12, 50257)
    depths(module, runs)
    planning(runs)
    memory(min(runs, 3))
    sweeps(module, runs)
    print(f"\n{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
