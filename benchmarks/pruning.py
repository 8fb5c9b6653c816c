"""What collecting statistics costs: tokens per second against a plain forward over the same batches.

"Plain" is the model's own forward without gradients, logits included. Collecting runs the same batches
as a recorded block that keeps six float64 statistics of every MLP neuron and attention channel; it
stops after the last of them, so it does not compute logits.

    OMP_NUM_THREADS=1 python benchmarks/pruning.py
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from bench import gpt2, interleave
from transformers import logging

import graftwork
from graftwork.pruning import TokenBatch, collect, load_documents, token_batches


def case(name: str, model: Any, batches: list[TokenBatch], runs: int) -> str:
    """One row of the table."""
    module = model.load()
    tokens = sum(batch.tokens for batch in batches)

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                module(**batch.inputs())

    def ours() -> None:
        collect(model, batches, progress=False)

    times = interleave({"plain": plain, "ours": ours}, runs, warm=1)
    rates = {side: tokens / statistics.median(seconds) for side, seconds in times.items()}
    ratio = statistics.median(a / b for a, b in zip(times["plain"], times["ours"], strict=True))
    return (
        f"| {name}, {tokens:,} tokens | {rates['plain']:,.0f} | {rates['ours']:,.0f} "
        f"| {ratio:.2f} × | 0.9 × |"
    )


def random_batches(rows: int, tokens: int, count: int, vocabulary: int) -> list[TokenBatch]:
    """Random tokens without padding."""
    generator = torch.Generator().manual_seed(0)
    every = torch.ones(rows, tokens, dtype=torch.bool)
    return [
        TokenBatch(torch.randint(1, vocabulary, every.shape, generator=generator), every, every)
        for _ in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="What collecting statistics costs.")
    parser.add_argument("--runs", type=int, default=9, help="rounds of each case")
    runs = parser.parse_args().runs
    logging.set_verbosity_error()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {runs} rounds\n")
    print("| case | plain, tokens/s | collecting, tokens/s | ratio | at least |")
    print("|---|---|---|---|---|")
    tiny = graftwork.LanguageModel("graftwork/tiny")
    facts = list(token_batches(tiny, load_documents("tiny/all")))
    print(case("graftwork/tiny, its facts", tiny, facts, runs), flush=True)
    rows = random_batches(8, 256, 4, 2048)
    print(case("graftwork/tiny, rows of 256", tiny, rows, runs), flush=True)
    small = graftwork.LanguageModel(gpt2(12, 768, 12, 50257))
    rows = random_batches(4, 256, 1, 50257)
    print(case("GPT-2 small shape, rows of 256", small, rows, max(3, runs // 2)), flush=True)


if __name__ == "__main__":
    main()
