"""Every sweep against a loop of plain forwards of transformers with plain hooks, one for each cell."""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from graftwork import LanguageModel
from graftwork.lens import patching
from graftwork.lens.hooked_transformer import HookedTransformer
from graftwork.tracing.errors import InputError, UnavailableNameError

from ..models.conftest import build, random_prompts, word_tokenizer

LAYERS, HEADS, WIDTH = 3, 4, 16
MODELS = ["gpt2", "llama", "gpt_neox"]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
Edit = Callable[[torch.Tensor], torch.Tensor]

#: Block list, attention, its out-projection, MLP.
PATHS = {
    "gpt2": ("transformer.h", "attn", "c_proj", "mlp"),
    "llama": ("model.layers", "self_attn", "o_proj", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention", "dense", "mlp"),
}


# -------------------------------------------------------------------- plain hooks


class Plain:
    """Forwards of a model of transformers with hooks of torch, and attention written by hand.

    Names and shapes are those of TransformerLens; q, k and v are before rotary embeddings.
    """

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module
        blocks, self.attn, self.out, self.mlp = PATHS[name]
        self.blocks = module.get_submodule(blocks)
        self.calls = 0

    def __call__(
        self,
        ids: torch.Tensor,
        edits: dict[tuple[str, int], Edit] | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[tuple[str, int], torch.Tensor]]:
        edits, seen, handles = edits or {}, {}, []
        mask = torch.ones_like(ids) if mask is None else mask
        resid: dict[int, torch.Tensor] = {}

        def at(name: str, layer: int, value: torch.Tensor) -> torch.Tensor:
            if (name, layer) in edits:
                value = edits[name, layer](value)
            seen[name, layer] = value
            return value

        def attention(
            module: Any, q: Any, k: Any, v: Any, _: Any, scaling: Any = None, **__: Any
        ) -> tuple[torch.Tensor, None]:
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            scores = q @ k.transpose(-1, -2) * scaling
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
            allowed = allowed & mask.bool()[:, None, None]
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
            pattern = at("pattern", module.layer_idx, scores.softmax(-1))
            return (pattern @ v).transpose(1, 2).contiguous(), None

        def block(i: int) -> None:
            module, attn = self.blocks[i], self.blocks[i].get_submodule(self.attn)

            def before(_: Any, args: Any, options: Any) -> Any:
                resid[i] = at("resid_pre", i, args[0])
                return (resid[i], *args[1:]), options

            def after(_: Any, args: Any, output: Any) -> Any:
                return at("resid_post", i, output)

            def attended(_: Any, args: Any, output: Any) -> Any:
                first = at("attn_out", i, output[0])
                if self.name != "gpt_neox":
                    first = at("resid_mid", i, resid[i] + first) - resid[i]
                return (first, *output[1:])

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
            handles.append(attn.register_forward_hook(attended))
            handles.append(
                module.get_submodule(self.mlp).register_forward_pre_hook(
                    lambda m, a: (at("mlp_in", i, a[0]),)
                )
            )
            handles.append(
                module.get_submodule(self.mlp).register_forward_hook(
                    lambda m, a, o: at("mlp_out", i, o)
                )
            )
            handles.append(
                attn.get_submodule(self.out).register_forward_pre_hook(
                    lambda m, a: (at("z", i, a[0].unflatten(-1, (HEADS, -1))).flatten(-2),)
                )
            )

            def fused(_: Any, args: Any, output: Any) -> Any:
                thirds = self.name == "gpt2"
                parts = output.unflatten(-1, (3, HEADS, -1) if thirds else (HEADS, 3, -1))
                axis = -3 if thirds else -2
                new = [at(n, i, parts.select(axis, j)) for j, n in enumerate("qkv")]
                return torch.stack(new, axis).flatten(-3)

            def alone(which: str) -> Callable[..., Any]:
                return lambda m, a, o: at(which, i, o.unflatten(-1, (-1, 4))).flatten(-2)

            if self.name == "llama":
                for one in "qkv":
                    child = attn.get_submodule(f"{one}_proj")
                    handles.append(child.register_forward_hook(alone(one)))
            else:
                child = attn.c_attn if self.name == "gpt2" else attn.query_key_value
                handles.append(child.register_forward_hook(fused))

        for i in range(LAYERS):
            block(i)
        AttentionInterface.register("by_hand", attention)
        self.module.config._attn_implementation_internal = "by_hand"
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        try:
            logits = self.module(ids, position_ids=positions, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        self.calls += 1
        return logits, seen

    def patch(
        self,
        ids: torch.Tensor,
        name: str,
        layer: int,
        where: tuple[Any, ...],
        clean: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of a run with `value[where] = clean[where]`."""

        def edit(value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            value[where] = clean[where]
            return value

        return self(ids, {(name, layer): edit}, mask)[0]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@functools.cache
def plain(name: str) -> Plain:
    return Plain(name, copy.deepcopy(build(name)))


@functools.cache
def lens(name: str) -> HookedTransformer:
    return HookedTransformer(LanguageModel(copy.deepcopy(build(name)), word_tokenizer()))


@functools.cache
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Clean and corrupted ids, [2, 5] each."""
    ids = torch.stack(random_prompts(5, 5, 5, 5, seed=7))
    return ids[:2], ids[2:]


@functools.cache
def clean_cache(name: str) -> Any:
    return lens(name).run_with_cache(prompts()[0])[1]


@functools.cache
def clean_values(name: str) -> dict[tuple[str, int], torch.Tensor]:
    return plain(name)(prompts()[0])[1]


def metric(logits: Any) -> Any:
    """A number made of several positions and of both prompts."""
    return (logits[:, -1, 5] - logits[:, -1, 9]).sum() + logits[0, 2].softmax(-1)[7]


def brute(
    name: str, activation: str, where: Callable[..., tuple[Any, ...]], *sizes: int
) -> torch.Tensor:
    """The metric of each cell [layer, *sizes]; `where` gives the indices in the activation."""
    run, clean, corrupted = plain(name), clean_values(name), prompts()[1]
    found = [
        metric(run.patch(corrupted, activation, layer, where(*rest), clean[activation, layer]))
        for layer, *rest in itertools.product(range(LAYERS), *map(range, sizes))
    ]
    return torch.stack(found).reshape(LAYERS, *sizes)


ALL = slice(None)


def at_pos(pos: int) -> tuple[Any, ...]:
    return ALL, pos


def at_pos_head(pos: int, head: int) -> tuple[Any, ...]:
    return ALL, pos, head


def at_head(head: int) -> tuple[Any, ...]:
    return ALL, ALL, head


def in_pattern(head: int, *where: int) -> tuple[Any, ...]:
    return ALL, head, *where


def test_plain_forward_is_that_of_transformers() -> None:
    for name in MODELS:
        expected = build(name)(prompts()[0]).logits
        torch.testing.assert_close(plain(name)(prompts()[0])[0], expected, **CLOSE)


# -------------------------------------------------------------------- sweeps


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("activation", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_sweeps_over_positions(name: str, activation: str) -> None:
    if (name, activation) == ("gpt_neox", "resid_mid"):
        pytest.skip("parallel blocks have nothing between attention and MLP")
    sweep = getattr(patching, f"get_act_patch_{activation}")
    found = sweep(lens(name), prompts()[1], clean_cache(name), metric)
    assert found.std() > 1e-3
    torch.testing.assert_close(found, brute(name, activation, at_pos, 5), **CLOSE)


def kv(name: str) -> int:
    return 2 if name == "llama" else HEADS


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("sweep", "activation"), [("out", "z"), *((x, x) for x in "qkv")])
def test_sweeps_over_heads(name: str, sweep: str, activation: str) -> None:
    heads = kv(name) if activation in "kv" else HEADS
    given = (lens(name), prompts()[1], clean_cache(name), metric)
    found = getattr(patching, f"get_act_patch_attn_head_{sweep}_all_pos")(*given)
    torch.testing.assert_close(found, brute(name, activation, at_head, heads), **CLOSE)
    found = getattr(patching, f"get_act_patch_attn_head_{sweep}_by_pos")(*given)
    torch.testing.assert_close(found, brute(name, activation, at_pos_head, 5, heads), **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_sweeps_over_patterns(name: str) -> None:
    given = (lens(name), prompts()[1], clean_cache(name), metric)
    found = patching.get_act_patch_attn_head_pattern_all_pos(*given)
    torch.testing.assert_close(found, brute(name, "pattern", in_pattern, HEADS), **CLOSE)
    found = patching.get_act_patch_attn_head_pattern_by_pos(*given)
    torch.testing.assert_close(found, brute(name, "pattern", in_pattern, HEADS, 5), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sweep_over_entries_of_patterns(name: str) -> None:
    given = (lens(name), prompts()[1], clean_cache(name), metric)
    found = patching.get_act_patch_attn_head_pattern_dest_src_pos(*given)
    torch.testing.assert_close(found, brute(name, "pattern", in_pattern, HEADS, 5, 5), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sweeps_of_everything_stack_the_others(name: str) -> None:
    given = (lens(name), prompts()[1], clean_cache(name), metric)
    shared = HEADS // kv(name)
    every = patching.get_act_patch_attn_head_all_pos_every(*given)
    parts = [
        brute(name, one, at_head, kv(name) if one in "kv" else HEADS).repeat_interleave(
            shared if one in "kv" else 1, -1
        )
        for one in "zqkv"
    ]
    parts.append(brute(name, "pattern", in_pattern, HEADS))
    torch.testing.assert_close(every, torch.stack(parts), **CLOSE)
    every = patching.get_act_patch_attn_head_by_pos_every(*given)
    assert every.shape == (5, LAYERS, 5, HEADS)
    pattern = brute(name, "pattern", in_pattern, HEADS, 5).transpose(1, 2)
    torch.testing.assert_close(every[4], pattern, **CLOSE)
    torch.testing.assert_close(every[0], brute(name, "z", at_pos_head, 5, HEADS), **CLOSE)
    every = patching.get_act_patch_block_every(*given)
    parts = [brute(name, one, at_pos, 5) for one in ("resid_pre", "attn_out", "mlp_out")]
    torch.testing.assert_close(every, torch.stack(parts), **CLOSE)


def test_prompts_may_be_texts() -> None:
    model = lens("gpt2")
    clean, corrupted = "w3 w9 w27 w50", "w8 w9 w33 w50"
    cache = model.run_with_cache(clean)[1]
    found = patching.get_act_patch_resid_pre(model, corrupted, cache, metric_of_one)
    ids = model.to_tokens(corrupted)
    assert ids[0, 0] == 2 and found.shape == (
        LAYERS,
        5,
    )  # text begins with a beginning-of-text token
    values = plain("gpt2")(model.to_tokens(clean))[1]
    expected = plain("gpt2").patch(ids, "resid_pre", 1, (ALL, 3), values["resid_pre", 1])
    torch.testing.assert_close(found[1, 3], metric_of_one(expected), **CLOSE)


def metric_of_one(logits: Any) -> Any:
    return logits[0, -1, 5] - logits[0, -1, 9]


def test_texts_of_several_lengths_are_padded() -> None:
    model = lens("llama")
    clean, corrupted = ["w3 w9 w27 w50", "w5 w8"], ["w8 w9 w33 w50", "w11 w8"]
    cache = model.run_with_cache(clean)[1]

    def last(logits: Any) -> Any:
        return logits[0, 4, 5] + logits[1, 2, 9]

    found = patching.get_act_patch_attn_head_out_by_pos(model, corrupted, cache, last)
    ids, mask = model._tokens.to_tokens(corrupted)
    clean_ids, clean_mask = model._tokens.to_tokens(clean)
    assert mask.tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    values = plain("llama")(clean_ids, mask=clean_mask)[1]
    for layer, pos, head in ((0, 1, 0), (1, 2, 3), (2, 4, 1)):
        logits = plain("llama").patch(
            ids, "z", layer, (ALL, pos, head), values["z", layer], mask=mask
        )
        torch.testing.assert_close(found[layer, pos, head], last(logits), **CLOSE)


# -------------------------------------------------------------------- setters, metrics, tables


def returns_new(corrupted: Any, index: Sequence[int], clean: Any) -> Any:
    _, pos = index
    keep = torch.arange(5)[None, :, None] != pos
    return torch.where(keep, corrupted, clean)


def returns_nothing(corrupted: Any, index: Sequence[int], clean: Any) -> None:
    corrupted[:, index[1]] = clean[:, index[1]]


def by_numbers(corrupted: Any, index: Sequence[int], clean: Any) -> Any:
    """Needs real values."""
    if float(corrupted.norm()) >= 0:
        array = corrupted.numpy()
        array[:, index[1]] = clean[:, index[1]].numpy()
    return corrupted


def in_place_by_numbers(corrupted: Any, index: Sequence[int], clean: Any) -> None:
    by_numbers(corrupted, index, clean)


@pytest.mark.parametrize(
    "setter",
    [returns_new, returns_nothing, by_numbers, in_place_by_numbers],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_setters_of_users(name: str, setter: Any) -> None:
    found = patching.generic_activation_patch(
        lens(name), prompts()[1], clean_cache(name), metric, setter, "resid_pre", ("layer", "pos")
    )
    torch.testing.assert_close(found, brute(name, "resid_pre", at_pos, 5), **CLOSE)


def test_a_setter_may_change_only_some_cells() -> None:
    def second(corrupted: Any, index: Sequence[int], clean: Any) -> Any:
        return corrupted if index[0] != 1 else clean * 0.5 + corrupted * 0.5

    found = patching.generic_activation_patch(
        lens("gpt2"), prompts()[1], clean_cache("gpt2"), metric, second, "z", ("layer",)
    )
    normal = metric(plain("gpt2")(prompts()[1])[0])
    half = clean_values("gpt2")["z", 1] * 0.5
    patched = plain("gpt2")(prompts()[1], {("z", 1): lambda z: z * 0.5 + half})[0]
    torch.testing.assert_close(found, torch.stack([normal, metric(patched), normal]), **CLOSE)


def as_item(logits: Any) -> Any:
    return metric(logits).item()


def as_numpy(logits: Any) -> Any:
    array = logits.numpy()
    shifted = np.exp(array[0, 2] - array[0, 2].max())
    differences = array[:, -1, 5] - array[:, -1, 9]
    return differences.sum() + (shifted / shifted.sum())[7]


def as_decision(logits: Any) -> Any:
    return metric(logits) if logits[0, 0, 0] == logits[0, 0, 0] else torch.zeros(())


def as_one_element(logits: Any) -> Any:
    return metric(logits)[None]


@pytest.mark.parametrize(
    "given", [as_item, as_numpy, as_decision, as_one_element], ids=lambda f: f.__name__
)
def test_metrics_of_users(given: Any) -> None:
    found = patching.get_act_patch_mlp_out(lens("gpt2"), prompts()[1], clean_cache("gpt2"), given)
    torch.testing.assert_close(found, brute("gpt2", "mlp_out", at_pos, 5), **CLOSE)


def test_double_precision_stays() -> None:
    module = copy.deepcopy(build("gpt2")).double()
    model, reference = (
        HookedTransformer(LanguageModel(module)),
        Plain("gpt2", copy.deepcopy(module)),
    )
    cache = model.run_with_cache(prompts()[0])[1]
    found = patching.get_act_patch_attn_out(model, prompts()[1], cache, metric)
    values = reference(prompts()[0])[1]
    logits = reference.patch(prompts()[1], "attn_out", 1, (ALL, 2), values["attn_out", 1])
    assert found.dtype == torch.float64
    torch.testing.assert_close(found[1, 2], metric(logits), atol=1e-12, rtol=1e-12)


class Table:
    """What is used of a table of pandas."""

    def __init__(self, rows: list[tuple[int, ...]]) -> None:
        self.rows = rows

    def itertuples(self, index: bool = True) -> Iterator[tuple[int, ...]]:
        assert not index
        return iter(self.rows)


def test_cells_may_be_given_as_a_table() -> None:
    rows = [(2, 1), (0, 4), (1, 0)]
    given = (lens("gpt2"), prompts()[1], clean_cache("gpt2"), metric)
    setter = patching.layer_pos_patch_setter
    expected = brute("gpt2", "resid_pre", at_pos, 5)
    expected = torch.stack([expected[row] for row in rows])
    for table in (Table(rows), rows, torch.tensor(rows)):
        found = patching.generic_activation_patch(*given, setter, "resid_pre", index_df=table)
        torch.testing.assert_close(found, expected, **CLOSE)
    nothing = patching.generic_activation_patch(*given, setter, "resid_pre", index_df=[])
    assert nothing.shape == (0,)


def test_table_of_pandas() -> None:
    if importlib.util.find_spec("pandas") is None:
        with pytest.raises(InputError, match="pip install pandas"):
            patching.make_df_from_ranges([2, 3], ["layer", "pos"])
        return
    frame = patching.make_df_from_ranges([2, 3], ["layer", "pos"])
    assert frame.values.tolist() == [list(row) for row in itertools.product(range(2), range(3))]
    found, table = patching.generic_activation_patch(
        lens("gpt2"),
        prompts()[1],
        clean_cache("gpt2"),
        metric,
        patching.layer_pos_patch_setter,
        "resid_pre",
        index_df=frame,
        return_index_df=True,
    )
    assert table is frame
    expected = brute("gpt2", "resid_pre", at_pos, 5)[:2, :3]
    torch.testing.assert_close(found, expected.flatten(), **CLOSE)


def test_hooks_that_are_there_stay_in_force() -> None:
    model, run = lens("gpt2"), plain("gpt2")
    hook = ("blocks.0.hook_mlp_out", lambda value, hook: value * 0.5)
    with model.hooks([hook]):
        found = patching.get_act_patch_resid_pre(model, prompts()[1], clean_cache("gpt2"), metric)
        same = patching.get_act_patch_mlp_out(model, prompts()[1], clean_cache("gpt2"), metric)
    clean = clean_values("gpt2")

    def patched(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, 2] = clean["resid_pre", 1][:, 2]
        return value

    def put(value: torch.Tensor) -> torch.Tensor:
        value = value * 0.5  # the hook was there first
        value[:, 2] = clean["mlp_out", 0][:, 2]
        return value

    edits = {("mlp_out", 0): lambda value: value * 0.5, ("resid_pre", 1): patched}
    torch.testing.assert_close(found[1, 2], metric(run(prompts()[1], edits)[0]), **CLOSE)
    logits = run(prompts()[1], {("mlp_out", 0): put})[0]
    torch.testing.assert_close(same[0, 2], metric(logits), **CLOSE)


# -------------------------------------------------------------------- cost


def test_a_sweep_takes_fewer_forwards_than_cells() -> None:
    model = lens("gpt2")
    rows = []
    inner = model.module.transformer.h[0].attn.c_attn
    handle = inner.register_forward_hook(lambda m, a, o: rows.append(len(a[0])))
    try:
        patching.get_act_patch_attn_head_out_by_pos(
            model, prompts()[1], clean_cache("gpt2"), metric
        )
    finally:
        handle.remove()
    patched_there = 5 * HEADS
    assert len(rows) <= 2  # the shared beginning, then all cells at once
    assert sum(rows) <= 2 * (patched_there + 1)  # of two prompts; the others start further on


def test_a_sweep_leaves_the_model_as_it_was() -> None:
    model = lens("gpt2")
    before = model(prompts()[1])
    patching.get_act_patch_resid_pre(model, prompts()[1], clean_cache("gpt2"), metric)
    assert torch.equal(model(prompts()[1]), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


# -------------------------------------------------------------------- errors


def test_a_name_that_was_not_cached() -> None:
    cache = lens("gpt2").run_with_cache(prompts()[0], names_filter="blocks.0.attn.hook_z")[1]
    with pytest.raises(UnavailableNameError, match=r"no `blocks\.1\.attn\.hook_z`.*filter"):
        patching.get_act_patch_attn_head_out_all_pos(lens("gpt2"), prompts()[1], cache, metric)


def test_an_unknown_name() -> None:
    given = (lens("gpt2"), prompts()[1], clean_cache("gpt2"), metric)
    setter = patching.layer_pos_patch_setter
    with pytest.raises(UnavailableNameError, match="hook_resid_pree"):
        patching.generic_activation_patch(*given, setter, "resid_pree", ("layer", "pos"))


def test_parallel_blocks_have_no_middle() -> None:
    given = (lens("gpt_neox"), prompts()[1], clean_cache("gpt_neox"), metric)
    with pytest.raises(UnavailableNameError, match="parallel"):
        patching.get_act_patch_resid_mid(*given)


def test_axes_or_a_table() -> None:
    given = (lens("gpt2"), prompts()[1], clean_cache("gpt2"), metric)
    setter = patching.layer_pos_patch_setter
    with pytest.raises(InputError, match="one of them"):
        patching.generic_activation_patch(*given, setter, "resid_pre")
    with pytest.raises(InputError, match="`position` is no axis"):
        patching.generic_activation_patch(*given, setter, "resid_pre", ("layer", "position"))


def test_a_metric_gives_one_number() -> None:
    given = (lens("gpt2"), prompts()[1], clean_cache("gpt2"))
    with pytest.raises(InputError, match=r"metric.*\[2\]"):
        patching.get_act_patch_resid_pre(*given, lambda logits: logits[:, -1, 5])


# -------------------------------------------------------------------- direct paths


def norm_of(name: str, block: Any, resid: torch.Tensor) -> torch.Tensor:
    module = {"gpt2": "ln_1", "llama": "input_layernorm", "gpt_neox": "input_layernorm"}[name]
    return block.get_submodule(module)(resid)


def head_output(name: str, layer: int, head: int, z: torch.Tensor) -> torch.Tensor:
    """z W_O of one head, from the module's own weight."""
    module = plain(name).blocks[layer].get_submodule(plain(name).attn)
    weight = module.get_submodule(plain(name).out).weight
    weight = weight if name == "gpt2" else weight.T
    return z[:, :, head] @ weight.unflatten(0, (HEADS, -1))[head]


def by_direct_path(
    name: str, sender: tuple[int, int], receiver: tuple[int, int], which: str
) -> torch.Tensor:
    """The metric of a run in which one head's query (key, value) reads the stream with the sender's
    clean output in it."""
    run, clean, corrupted = plain(name), clean_values(name), prompts()[1]
    own = run(corrupted)[1]
    change = head_output(name, *sender, clean["z", sender[0]]) - head_output(
        name, *sender, own["z", sender[0]]
    )
    layer, head = receiver
    head = head // (HEADS // kv(name)) if which in "kv" else head
    block = run.blocks[layer]
    normed = norm_of(name, block, own["resid_pre", layer] + change)
    attn = block.get_submodule(run.attn)
    if name == "llama":
        new = attn.get_submodule(f"{which}_proj")(normed).unflatten(-1, (-1, 4))
    else:
        module = attn.c_attn if name == "gpt2" else attn.query_key_value
        shape, axis = ((3, HEADS, -1), -3) if name == "gpt2" else ((HEADS, 3, -1), -2)
        new = module(normed).unflatten(-1, shape).select(axis, "qkv".index(which))

    def put(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, :, head] = new[:, :, head]
        return value

    return metric(run(corrupted, {(which, layer): put})[0])


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("name", MODELS)
def test_direct_paths(name: str, which: str) -> None:
    found = patching.get_act_patch_direct_path(
        lens(name), prompts()[1], clean_cache(name), metric, 0, 2, receiver_input=which
    )
    assert found[0].isnan().all() and not found[1:].isnan().any()
    for receiver in ((1, 0), (1, 3), (2, 1)):
        expected = by_direct_path(name, (0, 2), receiver, which)
        torch.testing.assert_close(found[receiver], expected, **CLOSE)


def test_direct_paths_to_some_receivers() -> None:
    found = patching.get_act_patch_direct_path(
        lens("gpt2"), prompts()[1], clean_cache("gpt2"), as_numpy, 1, 0, receivers=[(2, 3)]
    )
    assert (~found.isnan()).nonzero().tolist() == [[2, 3]]
    torch.testing.assert_close(found[2, 3], by_direct_path("gpt2", (1, 0), (2, 3), "q"), **CLOSE)
    with pytest.raises(InputError, match="layer 1 is not behind"):
        patching.get_act_patch_direct_path(
            lens("gpt2"), prompts()[1], clean_cache("gpt2"), metric, 1, 0, receivers=[(1, 3)]
        )
    with pytest.raises(InputError, match="receiver_input"):
        patching.get_act_patch_direct_path(
            lens("gpt2"), prompts()[1], clean_cache("gpt2"), metric, 1, 0, receiver_input="z"
        )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_direct_paths_from_all_heads(name: str) -> None:
    found = patching.get_act_patch_direct_path_all_sources(
        lens(name), prompts()[1], clean_cache(name), metric, receiver_input="v"
    )
    assert found.shape == (LAYERS, HEADS, LAYERS, HEADS)
    behind = torch.ones(LAYERS, LAYERS).triu(1).bool()
    expected = ~behind[:, None, :, None].expand_as(found)
    assert torch.equal(found.isnan(), expected)
    for sender, receiver in (((0, 1), (1, 2)), ((1, 3), (2, 0)), ((0, 0), (2, 3))):
        one = by_direct_path(name, sender, receiver, "v")
        torch.testing.assert_close(found[sender][receiver], one, **CLOSE)


def test_direct_paths_need_outputs_that_add_up() -> None:
    model = HookedTransformer(LanguageModel(build("gemma2")))
    ids, other = prompts()
    cache = model.run_with_cache(ids)[1]
    with pytest.raises(UnavailableNameError, match="normalized before"):
        patching.get_act_patch_direct_path(model, other, cache, metric, 0, 0)
