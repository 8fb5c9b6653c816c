"""What the lens costs and saves, as ratios to plain PyTorch hooks that store the same values.

OMP_NUM_THREADS=1 python benchmarks/lens.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel

from graftwork.lens import patching
from graftwork.lens.hooked_transformer import HookedTransformer


def gpt2_small(layers: int = 12) -> GPT2LMHeadModel:
    """GPT-2 small's shape with random weights."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, bos_token_id=0, eos_token_id=0)).eval()


def ratio(ours: Callable[[], Any], plain: Callable[[], Any], times: int) -> tuple[float, ...]:
    """Median of the ratios of neighbours, and both medians in ms."""
    ours(), plain()
    mine, theirs = [], []
    for _ in range(times):
        for function, into in ((plain, theirs), (ours, mine)):
            start = time.perf_counter()
            function()
            into.append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    return (
        statistics.median(ratios),
        statistics.median(theirs) * 1e3,
        statistics.median(mine) * 1e3,
    )


class Everything:
    """Plain hooks that store what `run_with_cache` stores: the same 17 values of each layer."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        self.model = model
        self.kept: dict[str, torch.Tensor] = {}
        self.layer = 0
        AttentionInterface.register("stores_pattern", self.attention)
        self.before = model.config._attn_implementation

    def attention(
        self, module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: Any = None, **_: Any
    ) -> Any:
        scores = torch.matmul(q, k.transpose(-1, -2)) * scaling
        width = q.shape[2]
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        scores = scores.masked_fill(~causal, float("-inf"))
        pattern = torch.softmax(scores, -1)
        self.kept[f"{self.layer}.scores"] = scores
        self.kept[f"{self.layer}.pattern"] = pattern
        return torch.matmul(pattern, v).transpose(1, 2), None

    def keep(self, name: str, part: Callable[[Any, Any], Any]) -> Callable[..., None]:
        def hook(_: Any, args: Any, output: Any) -> None:
            self.kept[name] = part(args, output)

        return hook

    def norm(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            x = args[0] - args[0].mean(-1, keepdim=True)
            scale = (x.pow(2).mean(-1, keepdim=True) + module.eps).sqrt()
            self.kept[f"{name}.scale"], self.kept[f"{name}.normalized"] = scale, x / scale

        return hook

    def __call__(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        model, handles = self.model, []
        self.kept = {}
        model.config._attn_implementation_internal = "stores_pattern"

        def at(module: Any, name: str, part: Callable[[Any, Any], Any]) -> None:
            handles.append(module.register_forward_hook(self.keep(name, part)))

        def begin(index: int) -> Callable[..., None]:
            def hook(_: Any, args: Any) -> None:
                self.layer = index
                self.kept[f"{index}.resid_pre"] = args[0]

            return hook

        at(model.transformer.wte, "embed", lambda a, o: o)
        at(model.transformer.wpe, "pos_embed", lambda a, o: o)
        for i, block in enumerate(model.transformer.h):
            handles.append(block.register_forward_pre_hook(begin(i)))
            handles.append(block.ln_1.register_forward_hook(self.norm(f"{i}.ln1")))
            handles.append(block.ln_2.register_forward_hook(self.norm(f"{i}.ln2")))
            at(block.ln_2, f"{i}.resid_mid", lambda a, o: a[0])
            at(block.attn.c_attn, f"{i}.qkv", lambda a, o: o.split(768, -1))
            at(block.attn.c_proj, f"{i}.z", lambda a, o: a[0])
            at(block.attn, f"{i}.attn_out", lambda a, o: o[0])
            at(block.mlp.c_fc, f"{i}.pre", lambda a, o: o)
            at(block.mlp.c_proj, f"{i}.post", lambda a, o: a[0])
            at(block.mlp, f"{i}.mlp_out", lambda a, o: o)
            at(block, f"{i}.resid_post", lambda a, o: o)
        handles.append(model.transformer.ln_f.register_forward_hook(self.norm("final")))
        at(model.lm_head, "logits", lambda a, o: o)
        try:
            model(ids, use_cache=False)
        finally:
            model.config._attn_implementation_internal = self.before
            for handle in handles:
                handle.remove()
        return self.kept


def resid_post(model: GPT2LMHeadModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Plain hooks that store the output of each block."""
    kept: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda m, a, o: kept.append(o)) for block in model.transformer.h
    ]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return kept


def cells_by_hand(model: GPT2LMHeadModel, ids: Any, clean: dict[int, Any], positions: int) -> None:
    """One forward for each layer and position, with a hook that patches one residual vector."""
    for layer, block in enumerate(model.transformer.h):
        for position in range(positions):

            def patch(_: Any, args: Any, layer: int = layer, position: int = position) -> Any:
                hidden = args[0].clone()
                hidden[:, position] = clean[layer][:, position]
                return (hidden, *args[1:])

            handle = block.register_forward_pre_hook(patch)
            model(ids, use_cache=False).logits[0, -1, 5].item()
            handle.remove()


def heads_by_hand(model: GPT2LMHeadModel, ids: Any, clean: dict[int, Any], port: str) -> None:
    """One forward for each layer and head, with a hook that patches z of one head."""
    for layer, block in enumerate(model.transformer.h):
        for head in range(12):

            def patch(_: Any, args: Any, layer: int = layer, head: int = head) -> Any:
                z = args[0].clone()
                z[..., head * 64 : head * 64 + 64] = clean[layer][:, :, head]
                return (z, *args[1:])

            handle = block.attn.c_proj.register_forward_pre_hook(patch)
            model(ids, use_cache=False).logits[0, -1, 5].item()
            handle.remove()


def overhead(
    lens: HookedTransformer,
    module: GPT2LMHeadModel,
    everything: Everything,
    ids: torch.Tensor,
    times: int,
) -> None:
    """Forward and caches against plain hooks that store the same."""

    def some() -> Any:
        return lens.run_with_cache(ids, names_filter=lambda n: n.endswith("hook_resid_post"))

    cases: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "forward": (lambda: lens(ids), lambda: module(ids, use_cache=False)),
        "run_with_cache, everything": (
            lambda: lens.run_with_cache(ids, return_cache_object=False),
            lambda: everything(ids),
        ),
        "run_with_cache, resid_post": (some, lambda: resid_post(module, ids)),
    }
    for name, (ours, plain) in cases.items():
        found, theirs, mine = ratio(ours, plain, times)
        size = f"{ids.shape[0]} × {ids.shape[1]}"
        print(f"{name}, {size}: {found:.3f} × ({theirs:.1f} → {mine:.1f} ms)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="without the sweeps")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    module = gpt2_small()
    lens = HookedTransformer(module)
    everything = Everything(module)
    for batch, tokens in ((1, 32), (8, 128)):
        ids = torch.randint(0, 50257, (batch, tokens))
        overhead(lens, module, everything, ids, given.times if batch > 1 else 3 * given.times)
    if given.quick:
        return
    prompt, other = torch.randint(0, 50257, (1, 16)), torch.randint(0, 50257, (1, 16))
    _, cache = lens.run_with_cache(other)
    resid = {i: cache["resid_pre", i] for i in range(12)}
    z = {i: cache["z", i] for i in range(12)}

    def metric(logits: Any) -> Any:
        return logits[0, -1, 5] - logits[0, -1, 6]

    for name, sweep, plain in (
        (
            "192 residual patches",
            lambda: patching.get_act_patch_resid_pre(lens, prompt, cache, metric),
            lambda: cells_by_hand(module, prompt, resid, 16),
        ),
        (
            "144 head patches (z)",
            lambda: patching.get_act_patch_attn_head_out_all_pos(lens, prompt, cache, metric),
            lambda: heads_by_hand(module, prompt, z, "z"),
        ),
        (
            "144 pattern patches, against as many z patches by hand",
            lambda: patching.get_act_patch_attn_head_pattern_all_pos(lens, prompt, cache, metric),
            lambda: heads_by_hand(module, prompt, z, "z"),
        ),
    ):
        found, theirs, mine = ratio(sweep, plain, 2)
        print(f"{name}: {1 / found:.2f} × faster ({theirs / 1e3:.2f} → {mine / 1e3:.2f} s)")


if __name__ == "__main__":
    main()
