"""What graftwork costs, as a ratio to plain PyTorch hooks that save the same values, in one process.

Each case runs both sides in turn (A B A B …) after a warm-up and reports the median of the ratios of
neighbours and the medians of both times. Run on one thread so that the figures hold still:

    OMP_NUM_THREADS=1 python benchmarks/bench.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, logging

import graftwork

MICRO = 1e6


def gpt2(layers: int, width: int, heads: int, vocabulary: int) -> GPT2LMHeadModel:
    """A GPT-2 with random weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


class Toy(torch.nn.Module):
    """32 blocks of two small linears: almost nothing but the cost of hooks."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(self.Block() for _ in range(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleave(
    sides: dict[str, Callable[[], Any]], runs: int, warm: int = 3
) -> dict[str, list[float]]:
    """Seconds of each side in each of `runs` rounds, after `warm` rounds of warm-up."""
    for _ in range(warm):
        for function in sides.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, function in sides.items():
            times[name].append(timed(function))
    return times


def ratio(ours: list[float], plain: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, plain, strict=True))


def hooked(modules: list[torch.nn.Module], run: Callable[[], Any]) -> list[Any]:
    """What one writes by hand: a hook on each module that keeps its output."""
    saved: list[Any] = []
    handles = [
        module.register_forward_hook(lambda _m, _a, output: saved.append(output))
        for module in modules
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return saved


def trace_case(name: str, module: GPT2LMHeadModel, runs: int, limit: float) -> list[str]:
    """All block outputs of one forward of 32 tokens."""
    model = graftwork.LanguageModel(module)
    ids = torch.arange(32).unsqueeze(0) + 1
    mask = torch.ones_like(ids)

    def plain() -> Any:
        return hooked(
            list(module.transformer.h), lambda: module(input_ids=ids, attention_mask=mask)
        )

    def ours() -> Any:
        with model.trace(ids) as tracer:
            saved = [block.output.save() for block in model.transformer.h]
            _ = tracer.output  # as the plain side: no early stop
        return saved

    def stopped() -> Any:
        with model.trace(ids):
            return [block.output.save() for block in model.transformer.h]

    for mine, theirs in zip(ours(), plain(), strict=True):
        assert torch.equal(mine.value, theirs)
    times = interleave({"plain": plain, "ours": ours, "stopped": stopped}, runs)
    return [
        row(name, times["ours"], times["plain"], limit),
        row(f"{name}, stopping after the last block", times["stopped"], times["plain"], None),
    ]


def generate_case(runs: int) -> str:
    """20 generated tokens, the last block's output at each step."""
    module = gpt2(2, 64, 4, 1000)
    model = graftwork.LanguageModel(module)
    ids = torch.arange(8).unsqueeze(0) + 1
    mask = torch.ones_like(ids)
    tokens = 20

    def plain() -> Any:
        return hooked(
            [module.transformer.h[-1]],
            lambda: module.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False
            ),
        )

    def ours() -> Any:
        saved = []
        with (
            model.generate(max_new_tokens=tokens, do_sample=False) as generator,
            generator.invoke(ids) as invoker,
        ):
            for _ in range(tokens):
                saved.append(model.transformer.h[-1].output.save())
                invoker.next()
        return saved

    for mine, theirs in zip(ours(), plain(), strict=True):
        assert torch.equal(mine.value, theirs)
    times = interleave({"plain": plain, "ours": ours}, runs)
    return row("2 layers, 20 generated tokens, one hidden state a step", *_pair(times), 1.08)


def _pair(times: dict[str, list[float]]) -> tuple[list[float], list[float]]:
    return times["ours"], times["plain"]


def toy_case(runs: int) -> list[str]:
    """The fixed cost of a block, and the cost of each further saved output."""
    module = Toy().eval()
    model = graftwork.Model(module)
    x = torch.randn(1, 8)

    def plain(count: int) -> Callable[[], Any]:
        return lambda: hooked(list(module.blocks[:count]), lambda: module(x))

    def ours(count: int) -> Callable[[], Any]:
        def run() -> Any:
            with model.trace(x) as tracer:
                _ = tracer.output
                return [model.blocks[i].output.save() for i in range(count)]

        return run

    def bare() -> None:
        with torch.no_grad():
            module(x)

    sides = {"bare": bare, "plain1": plain(1), "plain32": plain(32), "ours1": ours(1)}
    times = interleave({**sides, "ours32": ours(32)}, runs)
    middle = {name: statistics.median(values) * MICRO for name, values in times.items()}
    each = (middle["ours32"] - middle["ours1"]) / 31
    fixed = middle["ours1"] - middle["bare"] - each
    each_plain = (middle["plain32"] - middle["plain1"]) / 31
    return [
        f"| 32-block toy, fixed cost of a block | {fixed / 1000:.3f} ms | 0.12 ms |",
        f"| 32-block toy, each further saved output (plain hook {each_plain:.1f} µs) "
        f"| {each:.1f} µs | 9 µs |",
    ]


def training_case(name: str, module: GPT2LMHeadModel, runs: int) -> str:
    """One step of training a steering vector: a block with a backward, against a plain hook."""
    module.requires_grad_(False)
    model = graftwork.LanguageModel(module)
    ids = torch.arange(32).unsqueeze(0)
    vector = torch.nn.Parameter(torch.zeros(module.config.n_embd))
    optimizer = torch.optim.Adam([vector], lr=1e-3)
    block = module.transformer.h[0]

    def plain() -> None:
        handle = block.register_forward_hook(lambda m, a, output: output + vector)
        # A block unembeds the last position alone, so this does, too.
        logits = module(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        handle.remove()
        (-torch.log_softmax(logits, -1)[7]).backward()
        optimizer.step()
        optimizer.zero_grad()

    def ours() -> None:
        with model.trace(ids):
            model.transformer.h[0].output[:] += vector
            logits = model.lm_head.output[0, -1]
            (-torch.log_softmax(logits, -1)[7]).backward()
        optimizer.step()
        optimizer.zero_grad()

    times = interleave({"plain": plain, "ours": ours}, runs)
    module.requires_grad_(True)
    return row(f"training a steering vector, {name}", times["ours"], times["plain"], 1.1)


def row(name: str, ours: list[float], plain: list[float], limit: float | None) -> str:
    a, b = statistics.median(ours) * 1000, statistics.median(plain) * 1000
    bound = f"{limit} ×" if limit else ""
    return f"| {name} ({b:.2f} → {a:.2f} ms) | {ratio(ours, plain):.3f} × | {bound} |"


def python(code: str) -> list[float]:
    """The numbers that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def import_case(runs: int) -> str:
    code = (
        "import time, torch; a = time.perf_counter(); import graftwork; "
        "print(time.perf_counter() - a)"
    )
    seconds = statistics.median(python(code)[0] for _ in range(runs))
    return f"| `import graftwork` over `import torch` | {seconds:.3f} s | 0.3 s |"


def big_case(runs: int) -> str:
    """A configuration of 70 B parameters to a model that can be printed, in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128256,
        ).save_pretrained(folder)
        code = f"""
import time
import torch
def peak():
    # The high-water mark of this process; what getrusage gives may be its parent's.
    lines = open("/proc/self/status").read().split("\\n")
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
before = peak()
start = time.perf_counter()
import graftwork
text = repr(graftwork.LanguageModel({folder!r}))
assert "LlamaDecoderLayer" in text
print(time.perf_counter() - start)
print((peak() - before) / 1024)
"""
        found = [python(code) for _ in range(runs)]
    seconds = statistics.median(f[0] for f in found)
    memory = statistics.median(f[1] for f in found)
    return (
        f"| 70B-shaped Llama configuration to a printed model, transformers' import included "
        f"| {seconds:.2f} s, {memory:.0f} MB | 3 s, 300 MB |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=60, help="rounds of the short cases")
    runs = parser.parse_args().runs
    logging.set_verbosity_error()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {runs} rounds\n")
    print("| case | measured | at most |\n|---|---|---|")
    small = gpt2(2, 64, 4, 1000)
    for line in trace_case("GPT-2, 2 layers, d_model 64, 32 tokens", small, 5 * runs, 1.3):
        print(line, flush=True)
    full = gpt2(12, 768, 12, 50257)
    for line in trace_case("GPT-2 small shape, 12 block outputs, 32 tokens", full, runs, 1.02):
        print(line, flush=True)
    print(training_case("GPT-2 small shape, 32 tokens", full, runs), flush=True)
    tiny = gpt2(2, 128, 4, 1000)
    print(training_case("2 layers, d_model 128, 32 tokens", tiny, runs), flush=True)
    print(generate_case(runs), flush=True)
    for line in toy_case(5 * runs):
        print(line, flush=True)
    print(import_case(5), flush=True)
    print(big_case(3), flush=True)


if __name__ == "__main__":
    main()
