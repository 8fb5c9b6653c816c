"""What one weight of a 70B-shaped model costs before the model is loaded: bytes, time and memory.

The checkpoint has the shapes and shards of Llama 3 70B and holds zeros only, as sparse files that take
no space on the disk. Bytes are those that the process asks the system for (Linux); what a disk reads
ahead of them is not counted. Each weight is read in a process of its own.

    OMP_NUM_THREADS=1 python benchmarks/context.py
"""

from __future__ import annotations

import argparse
import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig

from graftwork.lens.model_context import ModelContext

HIDDEN, INNER, LAYERS, VOCABULARY, KEYS = 8192, 28672, 80, 128256, 1024
SHARD = 5_000_000_000
LOCATIONS = ("attn.to_key", "attn.to_query", "mlp.to_hidden")
MB = 1e6


def tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each stored tensor."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        attention = {"q": HIDDEN, "k": KEYS, "v": KEYS, "o": HIDDEN}
        for name, rows in attention.items():
            yield f"{block}.self_attn.{name}_proj.weight", (rows, HIDDEN)
        yield f"{block}.mlp.gate_proj.weight", (INNER, HIDDEN)
        yield f"{block}.mlp.up_proj.weight", (INNER, HIDDEN)
        yield f"{block}.mlp.down_proj.weight", (HIDDEN, INNER)
        yield f"{block}.input_layernorm.weight", (HIDDEN,)
        yield f"{block}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def write_checkpoint(folder: Path) -> int:
    """A sparse checkpoint; gives the bytes that it stands for."""
    LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        dtype="bfloat16",
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    shards: list[dict[str, tuple[tuple[int, ...], int]]] = []
    used = SHARD
    for name, shape in tensors():
        size = 2 * torch.Size(shape).numel()
        if used + size > SHARD:
            shards.append({})
            used = 0
        shards[-1][name] = shape, used
        used += size
    index, total = {}, 0
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        entries = {}
        for name, (shape, start) in shard.items():
            stop = start + 2 * torch.Size(shape).numel()
            entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, stop]}
            index[name] = file
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        with open(folder / file, "wb") as handle:
            handle.write(struct.pack("<Q", len(header)) + header)
            handle.truncate(8 + len(header) + stop)
        total += stop
    listing = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(listing)
    return total


def bytes_read() -> int:
    """What this process has asked for so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def peak() -> float:
    """Peak memory of this process, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_one(folder: str, location: str) -> None:
    """Read a weight and print its figures as JSON."""
    context = ModelContext(folder, device="cpu")
    context.get_weight("layer_norm_gain.pre_attn", 0)  # transformers' rules for names are imported
    read, memory, start = bytes_read(), peak(), time.perf_counter()
    weight = context.get_weight(location, LAYERS // 2)
    seconds = time.perf_counter() - start
    own = weight.nbytes
    if location in ("attn.to_key", "attn.to_value"):
        own = own * context.model.cfg.n_kv_heads // context.n_attention_heads
    figures = {
        "weight": own,
        "read": bytes_read() - read,
        "seconds": seconds,
        "memory": peak() - memory,
        "loaded": context.model.loaded,
    }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "LOCATION"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        read_one(*given.one)
        return
    with tempfile.TemporaryDirectory() as folder:
        total = write_checkpoint(Path(folder))
        disk = sum(512 * file.stat().st_blocks for file in Path(folder).iterdir())
        print(f"checkpoint of {total / 1e9:.1f} GB, {disk / 1e6:.1f} MB on the disk")
        for location in LOCATIONS:
            command = [sys.executable, __file__, "--one", folder, location]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            one = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{location}: {one['weight'] / MB:.1f} MB, read {one['read'] / one['weight']:.4f} x "
                f"(at most 1.1 x), {one['seconds']:.2f} s, {one['memory'] / MB:.0f} MB more memory"
                + (", and the model was loaded" if one["loaded"] else "")
            )


if __name__ == "__main__":
    main()
