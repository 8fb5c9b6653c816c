"""Attribution and path patching against finite differences and passes written with plain hooks."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from graftwork import LanguageModel
from graftwork.lens import patching
from graftwork.lens.attribution import attribution_patch, edge_attribution_patch
from graftwork.lens.hooked_transformer import HookedTransformer
from graftwork.lens.path_patching import path_patch
from graftwork.tracing.errors import InputError, ShapeError, UnavailableNameError

from ..models.conftest import CAUSAL, build, random_prompts, word_tokenizer
from .test_patching import Plain

LAYERS, HEADS, POSITIONS = 3, 4, 5
MODELS = ["gpt2", "llama", "gpt_neox"]
ALL = slice(None)
#: Models are in double precision, but norms of Llama and some patterns are computed in single.
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
#: For central differences.
EPS = 1e-5


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def double(name: str) -> Any:
    return copy.deepcopy(build(name)).double()


@functools.cache
def plain(name: str) -> Plain:
    return Plain(name, double(name))


@functools.cache
def lens(name: str) -> HookedTransformer:
    return HookedTransformer(LanguageModel(double(name), word_tokenizer()))


@functools.cache
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Clean and corrupted ids, [2, 5] each."""
    ids = torch.stack(random_prompts(5, 5, 5, 5, seed=7))
    return ids[:2], ids[2:]


def metric(logits: Any) -> Any:
    return (logits[:, -1, 5] - logits[:, -1, 9]).sum() + logits[0, 2].softmax(-1)[7]


@functools.cache
def clean(name: str) -> dict[tuple[str, int], torch.Tensor]:
    return plain(name)(prompts()[0])[1]


@functools.cache
def corrupted(name: str) -> dict[tuple[str, int], torch.Tensor]:
    return plain(name)(prompts()[1])[1]


def slope(name: str, of: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """The derivative of a run by the size of a change in it, at 0."""
    if name == "gpt2":
        return (of(EPS) - of(-EPS)) / (2 * EPS)
    size = torch.zeros((), dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():  # differences would be those of rounding in single precision
        (found,) = torch.autograd.grad(of(size), size)
    return found


# -------------------------------------------------------------------- nodes


#: Name of a place, its name in plain hooks, and indices of some of its cells.
NODES: dict[str, tuple[str, list[tuple[Any, ...]]]] = {
    "resid_pre": ("resid_pre", [(0,), (3,)]),
    "resid_mid": ("resid_mid", [(1,), (4,)]),
    "resid_post": ("resid_post", [(1,), (4,)]),
    "attn_out": ("attn_out", [(1,), (4,)]),
    "mlp_out": ("mlp_out", [(0,), (2,)]),
    "z": ("z", [(1, 2), (4, 0)]),
    "q": ("q", [(1, 2), (4, 0)]),
    "k": ("k", [(1, 1), (3, 0)]),
    "v": ("v", [(1, 1), (3, 0)]),
    "pattern": ("pattern", [(2, 3, 1), (0, 4, 4)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_nodes_are_slopes(name: str) -> None:
    names = [one for one in NODES if (name, one) != ("gpt_neox", "resid_mid")]
    found = attribution_patch(lens(name), *prompts(), metric, names)
    assert list(found) == names
    kv = 2 if name == "llama" else HEADS
    assert found["resid_pre"].shape == (LAYERS, POSITIONS)
    assert found["z"].shape == (LAYERS, POSITIONS, HEADS)
    assert found["v"].shape == (LAYERS, POSITIONS, kv)
    assert found["pattern"].shape == (LAYERS, HEADS, POSITIONS, POSITIONS)
    for one in names:
        place, cells = NODES[one]
        for layer, where in itertools.product((0, 2), cells):
            key = (place, layer)
            change = clean(name)[key] - corrupted(name)[key]

            def moved(size: Any, key: Any = key, where: Any = where, change: Any = change) -> Any:
                def edit(value: torch.Tensor) -> torch.Tensor:
                    value = value.clone()
                    value[(ALL, *where)] += size * change[(ALL, *where)]
                    return value

                return metric(plain(name)(prompts()[1], {key: edit})[0])

            score = found[one][(layer, *where)]
            torch.testing.assert_close(score.double(), slope(name, moved), **CLOSE)


def test_neurons() -> None:
    found = attribution_patch(lens("gpt2"), *prompts(), metric, ["post", "mlp_out"])
    assert found["post"].shape == (LAYERS, POSITIONS, 64)
    # Neurons add up to what the MLP adds.
    torch.testing.assert_close(found["post"].sum(-1), found["mlp_out"], **CLOSE)


def linear() -> Any:
    """GPT-2 in which everything is linear: no norms, no activation functions, constant patterns."""
    module = double("gpt2")
    for block in module.transformer.h:
        block.ln_1 = block.ln_2 = nn.Identity()
        block.mlp.act = nn.Identity()
        block.attn.c_attn.weight[:, :32] = 0
        block.attn.c_attn.bias[:32] = 0
    module.transformer.ln_f = nn.Identity()
    return module


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3])
def test_in_a_linear_model_attribution_is_patching(steps: int) -> None:
    model = HookedTransformer(LanguageModel(linear(), word_tokenizer()))
    cache = model.run_with_cache(prompts()[0])[1]

    def difference(logits: Any) -> Any:
        return (logits[:, -1, 5] - logits[:, -1, 9]).sum()

    given = (model, prompts()[1], cache, difference)
    normal = difference(model(prompts()[1]))
    found = attribution_patch(model, *prompts(), difference, steps=steps)
    for name, sweep in {
        "resid_pre": patching.get_act_patch_resid_pre,
        "attn_out": patching.get_act_patch_attn_out,
        "mlp_out": patching.get_act_patch_mlp_out,
        "z": patching.get_act_patch_attn_head_out_by_pos,
    }.items():
        expected = sweep(*given) - normal
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(found[name], expected, atol=1e-9, rtol=1e-9)


def test_integrated_gradients_are_means_of_gradients() -> None:
    found = attribution_patch(lens("llama"), *prompts(), metric, ["z", "mlp_out"], steps=3)
    run = plain("llama")
    for name, layer in (("z", 0), ("z", 1), ("mlp_out", 2)):
        a, b = corrupted("llama")[name, layer], clean("llama")[name, layer]
        gradients = []
        for part in (1 / 6, 3 / 6, 5 / 6):
            point = (a + part * (b - a)).requires_grad_()
            with torch.enable_grad():
                logits = run(prompts()[1], {(name, layer): lambda _, p=point: p})[0]
                gradients += torch.autograd.grad(metric(logits), point)
        expected = ((b - a) * torch.stack(gradients).mean(0)).sum((0, -1))
        torch.testing.assert_close(found[name][layer], expected, atol=1e-9, rtol=1e-9)


@pytest.mark.slow
def test_integrated_gradients_are_complete() -> None:
    """The sum over positions tends to the effect of patching the layer as a whole."""
    found = attribution_patch(lens("gpt2"), *prompts(), metric, ["attn_out", "resid_pre"], steps=40)
    normal, source = metric(plain("gpt2")(prompts()[1])[0]), clean("gpt2")
    for name, layer in itertools.product(found, range(LAYERS)):
        edit = {(name, layer): lambda _, n=name, i=layer: source[n, i]}
        effect = metric(plain("gpt2")(prompts()[1], edit)[0]) - normal
        torch.testing.assert_close(found[name][layer].sum(), effect, atol=0.02, rtol=0.02)


def test_many_runs_are_split_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    given = (lens("gpt2"), *prompts(), metric, ["z", "mlp_out"])
    whole = attribution_patch(*given, steps=2)
    monkeypatch.setattr("graftwork.lens.attribution.RUNS", 4)
    parts = attribution_patch(*given, steps=2)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], atol=1e-10, rtol=1e-10)


def test_metrics_that_are_not_recorded_are_derived_too() -> None:
    def decides(logits: torch.Tensor) -> torch.Tensor:
        return metric(logits) if bool(logits.isfinite().all()) else logits.sum()

    expected = attribution_patch(lens("gpt2"), *prompts(), metric)
    found = attribution_patch(lens("gpt2"), *prompts(), decides)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-10, rtol=1e-10)


def halved(value: torch.Tensor, hook: Any = None) -> torch.Tensor:
    return value * 0.5


def test_hooks_that_are_there_stay_in_force() -> None:
    model, run, place = lens("gpt2"), plain("gpt2"), ("mlp_out", 0)
    edits = {place: halved}
    source, own = (run(one, edits)[1]["attn_out", 1] for one in prompts())
    with model.hooks([("blocks.0.hook_mlp_out", halved)]):
        found = attribution_patch(model, *prompts(), metric, ["attn_out"])["attn_out"][1, 2]
        several = attribution_patch(model, *prompts(), metric, ["attn_out"], 200)["attn_out"][1]
        edges = edge_attribution_patch(model, *prompts(), metric)
        path = path_patch(model, *prompts(), metric, [(2, 1, "q")], [(1, 0)])

    def moved(size: Any) -> torch.Tensor:
        def edit(value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            value[:, 2] += size * (source - own)[:, 2]
            return value

        return metric(run(prompts()[1], {**edits, ("attn_out", 1): edit})[0])

    torch.testing.assert_close(found, slope("gpt2", moved), **CLOSE)
    whole = metric(run(prompts()[1], {**edits, ("attn_out", 1): lambda _: source})[0])
    normal = metric(run(prompts()[1], edits)[0])
    torch.testing.assert_close(several.sum(), whole - normal, atol=0.02, rtol=0.02)
    edge = slope(
        "gpt2",
        lambda e: with_reader_moved(
            "gpt2", edits, "L1MLP", e * (halved(clean("gpt2")[place] - corrupted("gpt2")[place]))
        ),
    )
    assert edges["L0MLP", "L1MLP"] == pytest.approx(float(edge), abs=2e-5, rel=1e-4)
    same = double("gpt2")  # with the hook's effect in its weights
    same.transformer.h[0].mlp.c_proj.weight *= 0.5
    same.transformer.h[0].mlp.c_proj.bias *= 0.5
    other = HookedTransformer(LanguageModel(same))
    expected = path_patch(other, *prompts(), metric, [(2, 1, "q")], [(1, 0)])
    torch.testing.assert_close(path, expected, atol=1e-9, rtol=1e-9)


def test_attribution_leaves_the_model_as_it_was() -> None:
    model = lens("gpt2")
    before = model(prompts()[1])
    attribution_patch(model, *prompts(), metric, steps=2)
    edge_attribution_patch(model, *prompts(), metric)
    assert torch.equal(model(prompts()[1]), before)
    assert all(one.grad is None for one in model.module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_attribution_takes_two_forwards() -> None:
    model = lens("gpt2")
    rows: list[int] = []
    inner = model.module.transformer.h[1].mlp.c_fc
    handle = inner.register_forward_hook(lambda m, a, o: rows.append(len(a[0])))
    attribution_patch(model, *prompts(), metric)
    nodes = list(rows)
    rows.clear()
    edge_attribution_patch(model, *prompts(), metric)
    handle.remove()
    assert sum(nodes) == 4  # two prompts each
    assert sum(rows) <= 6


@pytest.mark.parametrize("attribute", [attribution_patch, edge_attribution_patch])
def test_what_has_no_attribution(attribute: Any) -> None:
    first, second = prompts()
    with pytest.raises(ShapeError, match=r"\[2, 5\].*\[2, 4\]"):
        attribute(lens("gpt2"), first, second[:, :4], metric)
    with pytest.raises(InputError, match="no gradient"):
        attribute(lens("gpt2"), first, second, lambda logits: metric(logits.detach()))
    with pytest.raises(InputError, match="one number as a tensor, not float"):
        attribute(lens("gpt2"), first, second, lambda logits: metric(logits).item())
    with pytest.raises(InputError, match=r"one number as a tensor, not \[2\]"):
        attribute(lens("gpt2"), first, second, lambda logits: logits[:, -1, 5])
    with pytest.raises(InputError, match="steps=0"):
        attribute(lens("gpt2"), first, second, metric, steps=0)


def test_names_without_attribution() -> None:
    with pytest.raises(InputError, match="not 'result'"):
        attribution_patch(lens("gpt2"), *prompts(), metric, ["result"])
    with pytest.raises(UnavailableNameError, match="parallel"):
        attribution_patch(lens("gpt_neox"), *prompts(), metric, ["resid_mid"])


# -------------------------------------------------------------------- edges


NORMS = {
    "gpt2": ("ln_1", "ln_2"),
    "llama": ("input_layernorm", "post_attention_layernorm"),
    "gpt_neox": ("input_layernorm", "post_attention_layernorm"),
}


def head_output(name: str, layer: int, head: int, z: torch.Tensor) -> torch.Tensor:
    run = plain(name)
    weight = run.blocks[layer].get_submodule(run.attn).get_submodule(run.out).weight
    weight = weight if name == "gpt2" else weight.T
    return z[:, :, head] @ weight.unflatten(0, (HEADS, -1))[head]


def sent(name: str, sender: str) -> torch.Tensor:
    """(clean - corrupted) of what a sender adds, [batch, pos, d_model]."""
    a, b = clean(name), corrupted(name)
    if sender == "embed":  # positions are the same in both
        return a["resid_pre", 0] - b["resid_pre", 0]
    layer, head = int(sender[1]), sender[3:]
    if sender.endswith("MLP"):
        return a["mlp_out", layer] - b["mlp_out", layer]
    return head_output(name, layer, int(head), a["z", layer] - b["z", layer])


def projected(name: str, layer: int, which: str, resid: torch.Tensor) -> torch.Tensor:
    """Queries, keys or values of a layer from a residual stream, [batch, pos, head, d_head]."""
    run = plain(name)
    block = run.blocks[layer]
    attn, normed = block.get_submodule(run.attn), block.get_submodule(NORMS[name][0])(resid)
    if name == "llama":
        found: torch.Tensor = attn.get_submodule(f"{which}_proj")(normed).unflatten(-1, (-1, 4))
        return found
    module = attn.c_attn if name == "gpt2" else attn.query_key_value
    shape, axis = ((3, HEADS, -1), -3) if name == "gpt2" else ((HEADS, 3, -1), -2)
    return module(normed).unflatten(-1, shape).select(axis, "qkv".index(which))  # type: ignore[no-any-return]


def with_reader_moved(
    name: str, edits: dict[Any, Any], receiver: str, change: torch.Tensor
) -> torch.Tensor:
    """The metric where one receiver reads the stream with a change in it."""
    run = plain(name)
    own = run(prompts()[1], edits)[1]
    layer = LAYERS - 1 if receiver == "logits" else int(receiver[1])
    if receiver == "logits":
        edit = {("resid_post", layer): lambda value: value + change}
    elif receiver.endswith("MLP"):
        stream = own["resid_pre" if name == "gpt_neox" else "resid_mid", layer]
        new = run.blocks[layer].get_submodule(NORMS[name][1])(stream + change)
        edit = {("mlp_in", layer): lambda _: new}
    else:
        head, which = int(receiver[3]), receiver[-1]
        new = projected(name, layer, which, own["resid_pre", layer] + change)

        def put(value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            value[:, :, head] = new[:, :, head]
            return value

        edit = {(which, layer): put}
    return metric(run(prompts()[1], {**edits, **edit})[0])


EDGES = [
    ("embed", "L0H1.q"),
    ("embed", "L2H0.v"),
    ("embed", "L1MLP"),
    ("embed", "logits"),
    ("L0H2", "L1H1.k"),
    ("L0H2", "L2MLP"),
    ("L0MLP", "L1H3.q"),
    ("L0MLP", "L2H1.v"),
    ("L1MLP", "L2MLP"),
    ("L1H0", "logits"),
    ("L2H3", "logits"),
    ("L2MLP", "logits"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_edges_are_slopes(name: str) -> None:
    found = edge_attribution_patch(lens(name), *prompts(), metric)
    edges = EDGES if name == "gpt_neox" else [*EDGES, ("L1H2", "L1MLP")]
    for sender, receiver in edges:
        change = sent(name, sender)
        expected = slope(
            name, lambda e, c=change, r=receiver: with_reader_moved(name, {}, r, e * c)
        )
        assert found[sender, receiver] == pytest.approx(float(expected), abs=2e-5, rel=1e-4)
    if "pos_embed" in found.senders:
        assert (found.scores[1] == 0).all()


def test_integrated_gradients_of_edges() -> None:
    found = edge_attribution_patch(lens("gpt2"), *prompts(), metric, steps=2)
    a, b = corrupted("gpt2")["resid_pre", 0], clean("gpt2")["resid_pre", 0]
    for sender, receiver in (("embed", "L1H2.q"), ("L0MLP", "L2MLP"), ("L1H0", "logits")):
        change, slopes = sent("gpt2", sender), []
        for part in (0.5, 1.0):
            edits = {("resid_pre", 0): lambda _, p=part: a + p * (b - a)}
            slopes.append(
                slope(
                    "gpt2",
                    lambda e, c=change, r=receiver, d=edits: with_reader_moved("gpt2", d, r, e * c),
                )
            )
        expected = float(torch.stack(slopes).mean())
        assert found[sender, receiver] == pytest.approx(expected, abs=1e-6, rel=1e-4)


def test_edges_run_forward_only() -> None:
    found = edge_attribution_patch(lens("llama"), *prompts(), metric)
    heads = [f"L{i}H{h}" for i in range(LAYERS) for h in range(HEADS)]
    assert found.senders == ["embed"] + [
        one for i in range(LAYERS) for one in (*heads[4 * i : 4 * i + 4], f"L{i}MLP")
    ]
    assert len(found.receivers) == LAYERS * (4 + 2 + 2 + 1) + 1 and found.receivers[4] == "L0H0.k"
    assert found.scores.shape == (len(found.senders), len(found.receivers))
    assert (found.scores[~found.exists] == 0).all() and (found.scores[found.exists] != 0).any()

    def exists(sender: str, receiver: str) -> bool:
        return bool(found.exists[found.senders.index(sender), found.receivers.index(receiver)])

    assert exists("L1H0", "L1MLP") and exists("L1MLP", "L2H0.q") and exists("L2MLP", "logits")
    assert not exists("L1H0", "L1H1.q") and not exists("L1MLP", "L1MLP")
    parallel = edge_attribution_patch(lens("gpt_neox"), *prompts(), metric)
    sender, receiver = parallel.senders.index("L1H0"), parallel.receivers.index("L1MLP")
    assert not parallel.exists[sender, receiver]
    best = found.top(3)
    assert abs(best[0][2]) == found.scores.abs().max() and found[best[1][:2]] == best[1][2]
    with pytest.raises(InputError, match="called 'L9MLP'"):
        found["embed", "L9MLP"]


def test_models_without_edges() -> None:
    for name, reason in (("olmo2", "no norm before attention"), ("mamba", "no attention")):
        model = HookedTransformer(LanguageModel(build(name)))
        with pytest.raises(UnavailableNameError, match=reason):
            edge_attribution_patch(model, *prompts(), metric)


@pytest.mark.slow
@pytest.mark.parametrize("name", [one for one in CAUSAL if one not in ("olmo2", "mamba")])
def test_edges_sum_to_the_attribution_of_the_stream(name: str) -> None:
    """What all senders add is the stream; its gradient is that of all its readers."""
    model = HookedTransformer(LanguageModel(build(name)))
    found = edge_attribution_patch(model, *prompts(), metric)
    nodes = attribution_patch(model, *prompts(), metric, ["resid_pre", "resid_post"])
    last = len(model._vocabulary) - 1
    end = found.scores[:, found.receivers.index("logits")].sum()
    torch.testing.assert_close(end, nodes["resid_post"][last].sum(), atol=1e-4, rtol=1e-4)
    senders = [i for i, one in enumerate(found.senders) if not one.startswith(f"L{last}")]
    readers = [
        i for i, one in enumerate(found.receivers) if one.startswith(f"L{last}") or one == "logits"
    ]
    total = found.scores[senders][:, readers].sum()
    torch.testing.assert_close(total, nodes["resid_pre"][last].sum(), atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------------- paths


def in_two_passes(
    name: str, sender: tuple[int, int], receivers: list[Any], freeze_mlps: bool
) -> torch.Tensor:
    """Wang et al. 2022 by hand: one pass with all behind the sender frozen, one with the receivers'
    values of it."""
    run, own, source = plain(name), corrupted(name), clean(name)
    layer, head = sender

    def put(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, :, head] = source["z", layer][:, :, head]
        return value

    edits: dict[Any, Any] = {("z", layer): put}
    for i in range(layer, LAYERS):
        if i > layer:
            edits["z", i] = lambda _, i=i: own["z", i]
        if freeze_mlps:
            edits["mlp_out", i] = lambda _, i=i: own["mlp_out", i]
    seen = run(prompts()[1], edits)[1]
    second: dict[Any, Any] = {}
    for one in receivers:
        if one == "logits":
            second["resid_post", LAYERS - 1] = lambda _: seen["resid_post", LAYERS - 1]
        elif one[-1] == "mlp":
            second["mlp_in", one[0]] = lambda _, i=one[0]: seen["mlp_in", i]
        else:
            at, place, which = one
            place = place // 2 if name == "llama" and which in "kv" else place
            before = second.get((which, at), lambda value: value)

            def replace(
                value: torch.Tensor, at: Any = at, h: Any = place, w: Any = which, b: Any = before
            ) -> torch.Tensor:
                value = b(value).clone()
                value[:, :, h] = seen[w, at][:, :, h]
                return value

            second[which, at] = replace
    return metric(run(prompts()[1], second)[0])


RECEIVERS: list[list[Any]] = [
    ["logits"],
    [(2, 1, "q")],
    [(1, 0, "k"), (1, 3, "v"), (2, 2, "v")],
    [(2, "mlp")],
    [(1, "mlp"), (2, 0, "q"), (2, 3, "q")],
]


@pytest.mark.parametrize("freeze_mlps", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_paths(name: str, freeze_mlps: bool) -> None:
    for receivers in RECEIVERS:
        found = path_patch(
            lens(name), *prompts(), metric, receivers, [(0, 2), (0, 1)], freeze_mlps=freeze_mlps
        )
        for number, sender in enumerate([(0, 2), (0, 1)]):
            expected = in_two_passes(name, sender, receivers, freeze_mlps)
            torch.testing.assert_close(found[number], expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_paths_from_all_heads(name: str) -> None:
    found = path_patch(lens(name), *prompts(), metric, [(1, "mlp"), (1, 2, "q")])
    assert found.shape == (LAYERS, HEADS)
    reached = [True, name == "gpt2", False]  # heads and MLPs of one layer are parallel in GPT-NeoX
    assert (~found.isnan()).all(1).tolist() == reached and found.isnan().all(1).tolist() == [
        not one for one in reached
    ]
    expected = in_two_passes(name, (0, 3), [(1, "mlp"), (1, 2, "q")], True)
    torch.testing.assert_close(found[0, 3], expected, atol=1e-9, rtol=1e-9)
    if name == "gpt2":
        expected = in_two_passes(name, (1, 3), [(1, "mlp")], True)
        torch.testing.assert_close(found[1, 3], expected, atol=1e-9, rtol=1e-9)


def test_a_frozen_path_is_a_direct_one() -> None:
    cache = lens("llama").run_with_cache(prompts()[0])[1]
    direct = patching.get_act_patch_direct_path(
        lens("llama"), prompts()[1], cache, metric, 0, 2, receiver_input="v"
    )
    for receiver in ((1, 0), (2, 3)):
        path = path_patch(lens("llama"), *prompts(), metric, (*receiver, "v"), [(0, 2)])
        torch.testing.assert_close(path[0], direct[receiver], **CLOSE)


def test_metrics_of_numbers_in_paths() -> None:
    found = path_patch(
        lens("gpt2"), *prompts(), lambda logits: metric(logits).item(), "logits", [(1, 0)]
    )
    expected = in_two_passes("gpt2", (1, 0), ["logits"], True)
    torch.testing.assert_close(found[0].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("receivers", "senders", "message"),
    [
        ([(3, 0, "q")], None, "no receiver: "),
        ([(1, 4, "q")], None, "no receiver: "),
        ([(1, 0, "z")], None, "no receiver: "),
        ([], None, "there is no receiver"),
        ([(1, 0, "q")], [(1, 0)], r"behind the sender \(1, 0\)"),
        ([(1, 0, "q")], [(0, 4)], r"no head \(0, 4\)"),
    ],
)
def test_paths_that_do_not_exist(receivers: Any, senders: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        path_patch(lens("gpt2"), *prompts(), metric, receivers, senders)


def test_paths_between_prompts_of_one_shape() -> None:
    with pytest.raises(ShapeError, match="same shape"):
        path_patch(lens("gpt2"), prompts()[0], prompts()[1][:, :3], metric, "logits")
