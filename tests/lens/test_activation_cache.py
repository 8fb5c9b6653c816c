"""The cache against dense formulas on what plain hooks see of the same models.

Labels, shapes and short names are those of TransformerLens 3.9, written out here.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from graftwork import LanguageModel
from graftwork.envoy.spellings import lens_names
from graftwork.lens.activation_cache import ActivationCache
from graftwork.lens.functions import Slice
from graftwork.lens.hooked_transformer import HookedTransformer
from graftwork.lens.names import get_act_name
from graftwork.tracing.errors import InputError, ShapeError, UnavailableNameError

from ..models.conftest import build, random_prompts, run_plainly, word_tokenizer

LAYERS, HEADS = 3, 4
MODELS = ["gpt2", "llama", "gpt_neox", "gemma"]
#: Sums of heads and neurons are made in another order than the model makes them.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@functools.cache
def model_of(name: str) -> LanguageModel:
    """A tiny model whose gains and biases are random, too."""
    module = copy.deepcopy(build(name))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
    return LanguageModel(module, word_tokenizer())


@functools.cache
def ids() -> torch.Tensor:
    return torch.stack(random_prompts(6, 6))


@functools.cache
def activations(name: str) -> dict[str, torch.Tensor]:
    """All that the model has under TransformerLens' names, but for the results of heads."""
    model = model_of(name)
    with model.trace(ids()):
        saved = {one: model.hook(one).save() for one in lens_names(model._model_names())}
    return {
        one: value.value.detach()
        for one, value in saved.items()
        if not one.endswith(("hook_result", "_input"))
    }


def cache_of(name: str, *without: str) -> ActivationCache:
    kept = {one: v for one, v in activations(name).items() if not one.endswith(without)}
    return ActivationCache(kept if without else dict(activations(name)), model_of(name))


@dataclasses.dataclass(frozen=True)
class Paths:
    """Where things are in the modules of an architecture."""

    blocks: str
    embed: str
    positions: str | None
    attn: str
    o: str
    down: str
    norms: tuple[str, str]
    final: str
    centers: bool
    offset: float = 0.0
    parallel: bool = False


_LLAMA = Paths(
    "model.layers",
    "model.embed_tokens",
    None,
    "self_attn",
    "self_attn.o_proj",
    "mlp.down_proj",
    ("input_layernorm", "post_attention_layernorm"),
    "model.norm",
    False,
)
PATHS = {
    "gpt2": Paths(
        "transformer.h",
        "transformer.wte",
        "transformer.wpe",
        "attn",
        "attn.c_proj",
        "mlp.c_proj",
        ("ln_1", "ln_2"),
        "transformer.ln_f",
        True,
    ),
    "llama": _LLAMA,
    "gemma": dataclasses.replace(_LLAMA, offset=1.0),
    "gpt_neox": Paths(
        "gpt_neox.layers",
        "gpt_neox.embed_in",
        None,
        "attention",
        "attention.dense",
        "mlp.dense_4h_to_h",
        ("input_layernorm", "post_attention_layernorm"),
        "gpt_neox.final_layer_norm",
        True,
        parallel=True,
    ),
}


class Plain:
    """One forward of the unwrapped module, and dense formulas of it."""

    def __init__(self, name: str) -> None:
        self.paths = PATHS[name]
        self.module = model_of(name).load()
        self.seen = run_plainly(self.module, ids())
        self.logits = self.seen["", "output"].logits

    def at(self, path: str, port: str = "output") -> torch.Tensor:
        found = self.seen[path, port]
        return found[0] if isinstance(found, tuple) else found

    def block(self, layer: int, below: str = "") -> str:
        return f"{self.paths.blocks}.{layer}" + (f".{below}" if below else "")

    def before(self, layer: int) -> torch.Tensor:
        if layer == LAYERS:
            return self.at(self.paths.final, "input")
        return self.at(self.block(layer), "input")

    def middle(self, layer: int) -> torch.Tensor:
        return self.before(layer) + self.attention(layer)

    def read_by_mlp(self, layer: int) -> torch.Tensor:
        return self.before(layer) if self.paths.parallel else self.middle(layer)

    def attention(self, layer: int) -> torch.Tensor:
        return self.at(self.block(layer, self.paths.attn))

    def mlp(self, layer: int) -> torch.Tensor:
        return self.at(self.block(layer, "mlp"))

    def embeddings(self) -> list[torch.Tensor]:
        paths = [self.paths.embed, self.paths.positions]
        return [self.at(path).expand(2, -1, -1) for path in paths if path]

    def weight(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """[d_in, d_out] and [d_out] of a linear module."""
        module = self.module.get_submodule(path)
        weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
        bias = module.bias if module.bias is not None else torch.zeros(weight.shape[1])
        return weight, bias

    def heads(self, layer: int) -> torch.Tensor:
        """[head, batch, pos, d_model]"""
        path = self.block(layer, self.paths.o)
        z, weight = self.at(path, "input"), self.weight(path)[0]
        size = z.shape[-1] // HEADS
        cut = [slice(h * size, (h + 1) * size) for h in range(HEADS)]
        return torch.stack([z[..., one] @ weight[one] for one in cut])

    def neurons(self, layer: int) -> torch.Tensor:
        """[neuron, batch, pos, d_model]"""
        path = self.block(layer, self.paths.down)
        acts, weight = self.at(path, "input"), self.weight(path)[0]
        return torch.stack([acts[..., n, None] * weight[n] for n in range(len(weight))])

    def bias(self, layer: int, which: str) -> torch.Tensor:
        return self.weight(self.block(layer, getattr(self.paths, which)))[1]

    def scaled(self, stack: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Components of a stream behind a norm, without gain and bias."""
        if self.paths.centers:
            stack = stack - stack.mean(-1, keepdim=True)
            whole = whole - whole.mean(-1, keepdim=True)
        return stack / (whole.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    @property
    def eps(self) -> float:
        norm: Any = self.module.get_submodule(self.paths.final)
        return float(getattr(norm, "eps", None) or norm.variance_epsilon)

    def final(self, stream: torch.Tensor) -> torch.Tensor:
        return self.module.get_submodule(self.paths.final)(stream)


plain = functools.cache(Plain)


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, **CLOSE)


def directions(count: int = 3) -> torch.Tensor:
    return torch.randn(16, count, generator=torch.Generator().manual_seed(2))


# ------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("embed",), "hook_embed"),
        (("k", 6, "a"), "blocks.6.attn.hook_k"),
        (("k6",), "blocks.6.attn.hook_k"),
        (("pre", 2), "blocks.2.mlp.hook_pre"),
        (("pre5",), "blocks.5.mlp.hook_pre"),
        (("normalized", 27, "ln2"), "blocks.27.ln2.hook_normalized"),
        (("scale4ln1",), "blocks.4.ln1.hook_scale"),
        (("scale",), "ln_final.hook_scale"),
        (("normalized",), "ln_final.hook_normalized"),
        (("attn", 1), "blocks.1.attn.hook_pattern"),
        (("attn_logits", 1), "blocks.1.attn.hook_attn_scores"),
        (("key", 0), "blocks.0.attn.hook_k"),
        (("query", 0), "blocks.0.attn.hook_q"),
        (("value", 0), "blocks.0.attn.hook_v"),
        (("rot_q", 0), "blocks.0.attn.hook_rot_q"),
        (("z", "3"), "blocks.3.attn.hook_z"),
        (("result", 0, "mlp"), "blocks.0.attn.hook_result"),
        (("mlp_pre", 0), "blocks.0.mlp.hook_pre"),
        (("mlp_mid", 0), "blocks.0.mlp.hook_mid"),
        (("mlp_post", 0), "blocks.0.mlp.hook_post"),
        (("pre_linear", 0), "blocks.0.mlp.hook_pre_linear"),
        (("expert_weights", 0, "m"), "blocks.0.mlp.hook_expert_weights"),
        (("resid_pre", 0), "blocks.0.hook_resid_pre"),
        (("resid_pre", 0, "block"), "blocks.0.hook_resid_pre"),
        (("resid_pre", 0, "b"), "blocks.0.hook_resid_pre"),
        (("resid_mid4",), "blocks.4.hook_resid_mid"),
        (("attn_out", 0), "blocks.0.hook_attn_out"),
        (("scale", 1, "attention"), "blocks.1.attn.hook_scale"),
        (("scale", None, "ln1"), "ln1.hook_scale"),
        (("value_grad", 0), "blocks.0.attn.hook_v_grad"),
        (("resid_pre_grad", 0), "blocks.0.hook_resid_pre_grad"),
        (("scale_grad",), "ln_final.hook_scale_grad"),
        (("hook_embed",), "hook_embed"),
        (("blocks.3.attn.hook_z",), "blocks.3.attn.hook_z"),
    ],
)
def test_short_names_are_those_of_the_original(given: tuple[Any, ...], expected: str) -> None:
    assert get_act_name(*given) == expected


def test_activations_are_those_of_plain_hooks(name: str) -> None:
    cache, seen = cache_of(name), plain(name)
    for layer in range(LAYERS):
        close(cache["resid_pre", layer], seen.before(layer))
        close(cache[f"attn_out{layer}"], seen.attention(layer))
        close(cache["mlp_out", layer - LAYERS], seen.mlp(layer))
        mid = seen.read_by_mlp(layer)
        close(cache["normalized", layer, "ln2"], seen.scaled(mid, mid))
    assert cache["pattern", -1] is cache["blocks.2.attn.hook_pattern"]
    assert cache["scale"] is cache["ln_final.hook_scale"]
    assert cache["scale1ln1"] is cache["blocks.1.ln1.hook_scale"]
    assert cache[("scale",)] is cache["scale", None]


def test_cache_is_like_a_dictionary() -> None:
    values = activations("gpt2")
    cache = ActivationCache(values, model_of("gpt2"))
    assert cache.cache_dict is values
    assert cache.model is model_of("gpt2")
    assert cache.has_batch_dim
    assert (cache.has_embed, cache.has_pos_embed) == (True, True)
    assert len(cache) == len(values)
    assert list(cache) == list(cache.keys()) == list(values)
    assert all(a is b for a, b in zip(cache.values(), values.values(), strict=True))
    assert [one for one, _ in cache.items()] == list(values)
    assert "hook_embed" in cache and "k1" in cache and ("pattern", -1) in cache
    assert "k7" not in cache and "nothing" not in cache and 3 not in cache
    assert repr(cache) == f"ActivationCache with keys {list(values)}"


def test_cache_without_a_model_is_a_dictionary() -> None:
    cache = ActivationCache({"hook_embed": torch.ones(1, 2, 3)}, None)
    assert cache["embed"].shape == (1, 2, 3)
    with pytest.raises(UnavailableNameError, match=r"not in the cache. Did you mean `hook_embed`"):
        cache["embedd"]


@pytest.mark.parametrize(
    ("kind", "key", "message"),
    [
        ("gpt2", "resid_pree0", r"`blocks.0.hook_resid_pree` is no name .* Did you mean"),
        (
            "gpt2",
            ("resid_pr", 0),
            r"`blocks.0.hook_resid_pr` .* Did you mean `blocks.0.hook_resid_pre`",
        ),
        ("gpt2", ("scale", 0), r"`blocks.0.hook_scale` is no name of a place in GPT2LMHeadModel"),
        (
            "gpt2",
            ("z", 0),
            r"`blocks.0.attn.hook_z` is a name of GPT2LMHeadModel, but it was not cached",
        ),
        ("gpt2", ("k_grad", 0), r"`blocks.0.attn.hook_k_grad` is a name .* was not cached"),
        ("gpt2", ("k", 5), "there are 3 layers, so layer 5 does not exist"),
        ("gpt_neox", ("resid_mid", 0), r"hook_resid_mid` does not exist on GPTNeoX.*parallel"),
        ("llama", "pos_embed", r"`hook_pos_embed` does not exist on Llama.*rotary"),
        ("gpt2", ("pre_linear", 0), r"does not exist on GPT2LMHeadModel: its MLP has no gate"),
    ],
)
def test_absent_names_say_why(kind: str, key: Any, message: str) -> None:
    with pytest.raises(UnavailableNameError, match=f"(?s){message}"):
        cache_of(kind, "hook_z")[key]


@pytest.mark.parametrize("key", [3, (), (3, "k"), ("k", 0, "attn", 1), None])
def test_other_keys_are_refused(key: Any) -> None:
    with pytest.raises(InputError, match="is no key"):
        cache_of("gpt2")[key]


# ------------------------------------------------------------------------ the whole cache


def test_moving_keeps_the_cache_and_may_move_the_model() -> None:
    cache = cache_of("gpt2")
    before = dict(cache.cache_dict)
    assert cache.to("cpu", move_model=True) is cache
    assert cache.cache_dict.keys() == before.keys()
    assert cache.to(torch.device("meta"))["embed"].is_meta
    assert not before["hook_embed"].is_meta


def test_gradients_are_turned_off_and_on_everywhere(caplog: pytest.LogCaptureFixture) -> None:
    with torch.enable_grad(), caplog.at_level(logging.WARNING, "graftwork"):
        cache_of("gpt2").toggle_autodiff()
        assert not torch.is_grad_enabled()
        cache_of("gpt2").toggle_autodiff(True)
        assert torch.is_grad_enabled()
    assert "gradients are now off in the whole program" in caplog.text


def test_batch_dimension_is_removed_of_one_prompt() -> None:
    one = cache_of("gpt2").apply_slice_to_batch_dim([1])
    assert one.has_batch_dim
    assert one.remove_batch_dim() is one
    assert not one.has_batch_dim
    for key, value in activations("gpt2").items():
        assert torch.equal(one[key], value[1])
    assert one.remove_batch_dim()["embed"].shape == (6, 16)
    with pytest.raises(InputError, match="The cache has 2 prompts"):
        cache_of("gpt2").remove_batch_dim()


@pytest.mark.parametrize("batch_slice", [1, (1, 2), [1, 0], None, Slice([1]), torch.tensor([0])])
def test_prompts_are_chosen(batch_slice: Any) -> None:
    found = cache_of("gpt2").apply_slice_to_batch_dim(batch_slice)
    index = batch_slice.slice if isinstance(batch_slice, Slice) else batch_slice
    index = slice(*index) if isinstance(index, tuple) else index
    index = slice(None) if index is None else index
    for key, value in activations("gpt2").items():
        assert torch.equal(found[key], value[index])
    assert found.has_batch_dim is (not isinstance(batch_slice, int))


def test_activations_common_to_all_prompts_are_chosen_with_them() -> None:
    values = {"hook_pos_embed": torch.ones(1, 5, 4), "hook_embed": torch.ones(3, 5, 4)}
    values["blocks.0.hook_resid_pre"] = torch.ones(3, 5, 4)
    chosen = ActivationCache(values, model_of("gpt2")).apply_slice_to_batch_dim(2)
    assert {tuple(value.shape) for value in chosen.values()} == {(5, 4)}


def test_no_prompts_can_be_chosen_without_a_batch_dimension() -> None:
    cache = cache_of("gpt2").apply_slice_to_batch_dim(0)
    assert not cache.apply_slice_to_batch_dim(None).has_batch_dim
    with pytest.raises(InputError, match="no batch dimension, so no prompts"):
        cache.apply_slice_to_batch_dim(0)
    with pytest.raises(InputError, match="`batch_slice` has no meaning"):
        cache.apply_ln_to_stack(cache.decompose_resid(), batch_slice=0)


def test_methods_are_the_same_without_a_batch_dimension(name: str) -> None:
    whole, one = cache_of(name), cache_of(name).apply_slice_to_batch_dim(1)
    close(one.accumulated_resid(apply_ln=True), whole.accumulated_resid(apply_ln=True)[:, 1])
    close(one.decompose_resid(1, apply_ln=True), whole.decompose_resid(1, apply_ln=True)[:, 1])
    close(one.stack_head_results(2), whole.stack_head_results(2)[:, 1])
    full = whole.get_full_resid_decomposition(apply_ln=True)
    close(one.get_full_resid_decomposition(apply_ln=True), full[:, 1])
    last = one.decompose_resid(pos_slice=-1)
    assert last.shape[1:] == (16,)
    attrs = one.logit_attrs(last, 7, pos_slice=-1, has_batch_dim=False)
    close(attrs, whole.logit_attrs(whole.decompose_resid(), 7)[:, 1, -1])


# ------------------------------------------------------------------------ streams


def test_accumulated_streams(name: str) -> None:
    cache, seen = cache_of(name), plain(name)
    stack, labels = cache.accumulated_resid(return_labels=True)
    assert labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    close(stack, torch.stack([seen.before(layer) for layer in range(4)]))
    stack, labels = cache.accumulated_resid(1, pos_slice=[0, 3], return_labels=True)
    assert labels == ["0_pre", "1_pre"]
    close(stack, torch.stack([seen.before(layer)[:, [0, 3]] for layer in range(2)]))
    assert torch.equal(cache.accumulated_resid(-1), cache.accumulated_resid(LAYERS))
    assert cache.accumulated_resid(0, pos_slice=-1).shape == (1, 2, 16)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma"])
def test_streams_between_attention_and_mlp(name: str) -> None:
    cache, seen = cache_of(name), plain(name)
    stack, labels = cache.accumulated_resid(1, incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre"]
    close(stack, torch.stack([seen.before(0), seen.middle(0), seen.before(1)]))
    stack, labels = cache.accumulated_resid(1, mlp_input=True, return_labels=True)
    assert labels == ["0_pre", "1_pre", "1_mid"]
    close(stack[-1], seen.middle(1))
    labels = cache.accumulated_resid(incl_mid=True, return_labels=True)[1]
    assert labels == "0_pre 0_mid 1_pre 1_mid 2_pre 2_mid final_post".split()


def test_parallel_blocks_have_nothing_between_attention_and_mlp() -> None:
    cache = cache_of("gpt_neox")
    with pytest.raises(UnavailableNameError, match="parallel"):
        cache.accumulated_resid(incl_mid=True)
    stack, labels = cache.accumulated_resid(1, mlp_input=True, return_labels=True)
    assert labels == ["0_pre", "1_pre"]
    close(stack[-1], plain("gpt_neox").read_by_mlp(1))


def test_logit_lens_is_the_final_norm_of_each_stream(name: str) -> None:
    cache, seen = cache_of(name), plain(name)
    stack = cache.accumulated_resid(apply_ln=True)
    close(stack, torch.stack([seen.final(seen.before(layer)) for layer in range(4)]))
    weights = model_of(name).weights
    close(stack[-1] @ weights.W_U + weights.b_U, seen.logits)
    last = cache.accumulated_resid(apply_ln=True, pos_slice=-1)
    close(last, stack[:, :, -1])


@pytest.mark.parametrize("mlp_input", [False, True])
def test_streams_behind_the_norm_of_a_layer(name: str, mlp_input: bool) -> None:
    cache, seen = cache_of(name), plain(name)
    stack = cache.accumulated_resid(2, apply_ln=True, mlp_input=mlp_input, pos_slice=(1, 4))
    whole = seen.read_by_mlp(2) if mlp_input else seen.before(2)
    close(stack[-1], seen.scaled(whole, whole)[:, 1:4])
    close(stack[0], seen.scaled(seen.before(0), whole)[:, 1:4])


@pytest.mark.parametrize(
    ("layer", "mlp_input", "message"),
    [
        (4, False, "layer 4: the stream is read before layers 0 to 2"),
        (-2, False, "layer -2: the stream"),
        (None, True, "behind the last one there is no MLP"),
        (3, True, "behind the last one there is no MLP"),
    ],
)
def test_layers_that_do_not_exist(layer: int | None, mlp_input: bool, message: str) -> None:
    cache = cache_of("gpt2")
    for method in (
        cache.accumulated_resid,
        cache.decompose_resid,
        cache.get_full_resid_decomposition,
        functools.partial(cache.apply_ln_to_stack, torch.zeros(1, 2, 6, 16)),
    ):
        with pytest.raises(InputError, match=message):
            method(layer=layer, mlp_input=mlp_input)


# ------------------------------------------------------------------------ layers


def embeds(name: str) -> list[str]:
    return ["embed", "pos_embed"] if PATHS[name].positions else ["embed"]


def test_attentions_and_mlps_sum_to_the_stream(name: str) -> None:
    cache, seen = cache_of(name), plain(name)
    stack, labels = cache.decompose_resid(return_labels=True)
    sublayers = [f"{i}_{kind}_out" for i in range(LAYERS) for kind in ("attn", "mlp")]
    assert labels == embeds(name) + sublayers
    expected = seen.embeddings()
    for layer in range(LAYERS):
        expected += [seen.attention(layer), seen.mlp(layer)]
    close(stack, torch.stack(expected))
    torch.testing.assert_close(stack.sum(0), seen.before(LAYERS), atol=1e-5, rtol=1e-5)
    close(cache.decompose_resid(2, pos_slice=-1).sum(0), seen.before(2)[:, -1])
    close(cache.decompose_resid(0).sum(0), seen.before(0))


def test_stream_that_an_mlp_reads_is_taken_apart(name: str) -> None:
    cache, seen = cache_of(name), plain(name)
    stack, labels = cache.decompose_resid(1, mlp_input=True, return_labels=True)
    own = [] if PATHS[name].parallel else ["1_attn_out"]
    assert labels == [*embeds(name), "0_attn_out", "0_mlp_out", *own]
    close(stack.sum(0), seen.read_by_mlp(1))
    read = cache.decompose_resid(1, mlp_input=True, apply_ln=True)
    close(read, seen.scaled(stack, seen.read_by_mlp(1)))
    close(read.sum(0), cache["normalized", 1, "ln2"])


def test_attentions_or_mlps_alone(name: str) -> None:
    cache, seen = cache_of(name), plain(name)
    stack, labels = cache.decompose_resid(2, mode="attn", return_labels=True)
    assert labels == [*embeds(name), "0_attn_out", "1_attn_out"]
    close(stack[-1], seen.attention(1))
    stack, labels = cache.decompose_resid(
        -1, mode="mlp", incl_embeds=False, pos_slice=2, return_labels=True
    )
    assert labels == ["0_mlp_out", "1_mlp_out", "2_mlp_out"]
    close(stack, torch.stack([seen.mlp(layer)[:, 2] for layer in range(LAYERS)]))


def test_components_behind_norms_sum_to_what_the_norm_gives(name: str) -> None:
    cache = cache_of(name)
    close(cache.decompose_resid(apply_ln=True).sum(0), cache["normalized"])
    close(cache.decompose_resid(1, apply_ln=True).sum(0), cache["normalized", 1, "ln1"])
    some = cache.decompose_resid(1, apply_ln=True, pos_slice=[0, 2])
    close(some.sum(0), cache["normalized", 1, "ln1"][:, [0, 2]])


def test_decompositions_that_have_nothing() -> None:
    cache = cache_of("gpt2")
    with pytest.raises(InputError, match="nothing was added but embeddings"):
        cache.decompose_resid(0, incl_embeds=False)
    with pytest.raises(InputError, match="mode is"):
        cache.decompose_resid(mode="both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="nothing to stack"):
        cache.stack_activation("resid_pre", 0)


@pytest.mark.parametrize("missing", ["hook_pos_embed", "0.hook_mlp_out", "ln_final.hook_scale"])
def test_what_was_not_cached_is_not_left_out_silently(missing: str) -> None:
    with pytest.raises(UnavailableNameError, match=f"{re.escape(missing)}` .* was not cached"):
        cache_of("gpt2", missing).decompose_resid(apply_ln=True)


# ------------------------------------------------------------------------ heads


def test_results_of_heads(name: str) -> None:
    cache, seen = cache_of(name), plain(name)
    stack, labels = cache.stack_head_results(return_labels=True)
    assert labels == [f"L{i}H{h}" for i in range(LAYERS) for h in range(HEADS)]
    close(stack, torch.cat([seen.heads(layer) for layer in range(LAYERS)]))
    assert "result0" not in cache
    cache.compute_head_results()
    for layer in range(LAYERS):
        assert cache["result", layer].shape == (2, 6, HEADS, 16)
        close(cache["result", layer], seen.heads(layer).movedim(0, 2))
        summed = cache["result", layer].sum(2) + seen.bias(layer, "o")
        close(summed, seen.attention(layer))
    close(cache.stack_head_results(1), stack[:HEADS])
    close(cache.stack_head_results(2, pos_slice=(1, 3)), stack[: 2 * HEADS, :, 1:3])


def test_computed_results_are_those_of_the_model(name: str) -> None:
    model, cache = model_of(name), cache_of(name)
    with model.trace(ids()):
        results = model.hook("blocks.1.attn.hook_result").save()
    cache.compute_head_results()
    close(cache["result", 1], results.value)


def test_heads_and_the_remainder_are_the_stream(name: str) -> None:
    cache, seen = cache_of(name), plain(name)
    stack, labels = cache.stack_head_results(2, True, incl_remainder=True)
    assert labels[-2:] == ["L1H3", "remainder"]
    close(stack.sum(0), seen.before(2))
    read = cache.stack_head_results(2, incl_remainder=True, apply_ln=True, pos_slice=-1)
    close(read, seen.scaled(stack, seen.before(2))[:, :, -1])
    alone = cache.stack_head_results(0, incl_remainder=True)
    close(alone, seen.before(0)[None])
    close(cache_of(name, "resid_post").stack_head_results(2, incl_remainder=True), stack)


def test_before_the_first_layer_there_are_no_heads_and_neurons(name: str) -> None:
    cache = cache_of(name)
    assert cache.stack_head_results(0).shape == (0, 2, 6, 16)
    assert cache.stack_head_results(0, pos_slice=1, apply_ln=True).shape == (0, 2, 16)
    stack, labels = cache.stack_neuron_results(0, return_labels=True)
    assert (stack.shape, labels) == ((0, 2, 6, 16), [])
    assert cache.stack_neuron_results(0, project_output_onto=directions()).shape == (0, 2, 6, 3)
    assert cache_of(name, "hook_embed").stack_head_results(0).shape == (0, 2, 6, 16)


# ------------------------------------------------------------------------ neurons


def test_results_of_neurons(name: str) -> None:
    cache, expected = cache_of(name), plain(name).neurons(1).movedim(0, 2)
    close(cache.get_neuron_results(1), expected)
    close(cache.get_neuron_results(-2), expected)
    close(cache.get_neuron_results(1, (2, 7), -1), expected[:, -1, 2:7])
    close(cache.get_neuron_results(1, neuron_slice=3), expected[:, :, 3])
    close(cache.get_neuron_results(1, neuron_slice=3, pos_slice=2), expected[:, 2, 3])
    summed = expected.sum(2) + plain(name).bias(1, "down")
    close(summed, plain(name).mlp(1))


def test_projected_results_of_neurons(name: str) -> None:
    cache, expected = cache_of(name), plain(name).neurons(1).movedim(0, 2)
    many, one = directions(), directions()[:, 0]
    found = cache.get_neuron_results(1, [1, 4], project_output_onto=many)
    close(found, expected[:, :, [1, 4]] @ many)
    close(cache.get_neuron_results(1, project_output_onto=one), expected @ one)
    close(cache.get_neuron_results(1, 3, project_output_onto=many), expected[:, :, 3] @ many)
    close(cache.get_neuron_results(1, 3, project_output_onto=one), expected[:, :, 3] @ one)


def test_stack_of_neurons(name: str) -> None:
    cache, seen = cache_of(name), plain(name)
    expected = torch.cat([seen.neurons(0), seen.neurons(1)])
    count = len(expected) // 2
    stack, labels = cache.stack_neuron_results(2, return_labels=True)
    assert labels == [f"L{i}N{n}" for i in range(2) for n in range(count)]
    close(stack, expected)
    stack, labels = cache.stack_neuron_results(
        2, neuron_slice=[3, 1], pos_slice=1, incl_remainder=True, return_labels=True
    )
    assert labels == ["L0N3", "L0N1", "L1N3", "L1N1", "remainder"]
    close(stack[:-1], expected[[3, 1, count + 3, count + 1], :, 1])
    close(stack.sum(0), seen.before(2)[:, 1])
    stack, labels = cache.stack_neuron_results(2, neuron_slice=3, return_labels=True)
    assert labels == ["L0N3", "L1N3"]
    close(stack, expected[[3, count + 3]])


@pytest.mark.parametrize("apply_ln", [False, True])
def test_projection_of_neurons_comes_behind_the_norm(name: str, apply_ln: bool) -> None:
    cache, many = cache_of(name), directions()
    options: dict[str, Any] = {"apply_ln": apply_ln, "incl_remainder": True, "pos_slice": (0, 3)}
    whole = cache.stack_neuron_results(2, **options)
    if apply_ln:
        close(whole.sum(0), cache["normalized", 2, "ln1"][:, :3])
    close(cache.stack_neuron_results(2, project_output_onto=many, **options), whole @ many)
    one = cache.stack_neuron_results(2, project_output_onto=many[:, 0], **options)
    close(one, whole @ many[:, 0])


@pytest.mark.parametrize("shape", [(3,), (3, 16), (16, 2, 2), ()])
def test_projections_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    cache, projection = cache_of("gpt2"), torch.ones(shape)
    for method in (cache.get_neuron_results, cache.stack_neuron_results):
        with pytest.raises(ShapeError, match="with d_model=16"):
            method(1, project_output_onto=projection)
    with pytest.raises(ShapeError, match="with d_model=16"):
        cache.get_full_resid_decomposition(project_output_onto=projection)


# ------------------------------------------------------------------------ everything


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize(("layer", "mlp_input"), [(0, False), (0, True), (2, True), (None, False)])
def test_full_decomposition_sums_to_the_stream(
    name: str, layer: int | None, mlp_input: bool, expand: bool
) -> None:
    cache, seen = cache_of(name), plain(name)
    stack, labels = cache.get_full_resid_decomposition(layer, mlp_input, expand, return_labels=True)
    last = LAYERS if layer is None else layer
    whole = seen.read_by_mlp(last) if mlp_input else seen.before(last)
    close(stack.sum(0), whole)
    attentions = last + (mlp_input and not PATHS[name].parallel)
    heads = [f"L{i}H{h}" for i in range(attentions) for h in range(HEADS)]
    count = len(seen.neurons(0))
    neurons = [f"L{i}N{n}" for i in range(last) for n in range(count)]
    mlps = neurons if expand else [f"{i}_mlp_out" for i in range(last)]
    assert labels == [*heads, *mlps, *embeds(name), "bias"]
    bias = sum((seen.bias(i, "o") for i in range(attentions)), torch.zeros(16))
    if expand:
        bias = sum((seen.bias(i, "down") for i in range(last)), bias)
    close(stack[-1], bias.expand(2, 6, 16))
    if heads:
        close(stack[len(heads) - 1], seen.heads(attentions - 1)[-1])
    if mlps:
        close(stack[len(heads)], seen.neurons(0)[0] if expand else seen.mlp(0))


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize(("layer", "mlp_input"), [(1, True), (2, False), (None, False)])
def test_full_decomposition_behind_norms_and_projections(
    name: str, layer: int | None, mlp_input: bool, expand: bool
) -> None:
    cache, many = cache_of(name), directions()
    get = functools.partial(cache.get_full_resid_decomposition, layer, mlp_input, expand)
    raw, read = get(pos_slice=-1), get(pos_slice=-1, apply_ln=True)
    norm = "normalized" if layer is None else ("normalized", layer, f"ln{1 + mlp_input}")
    close(read.sum(0), cache[norm][:, -1])
    close(get(pos_slice=-1, project_output_onto=many), raw @ many)
    close(get(pos_slice=-1, project_output_onto=many, apply_ln=True), read @ many)
    close(get(pos_slice=-1, project_output_onto=many[:, 1], apply_ln=True), read @ many[:, 1])


def test_activations_of_all_layers_in_one_tensor(name: str) -> None:
    cache, seen = cache_of(name), plain(name)
    close(cache.stack_activation("resid_pre"), torch.stack([seen.before(i) for i in range(LAYERS)]))
    assert cache.stack_activation("scale", 2, "ln1").shape == (2, 2, 6, 1)
    assert cache.stack_activation("attn", -1).shape == (LAYERS, 2, HEADS, 6, 6)


# ------------------------------------------------------------------------ norms


def test_norm_of_chosen_prompts_and_positions(name: str) -> None:
    cache, seen = cache_of(name), plain(name)
    stack = cache.decompose_resid()
    expected = seen.scaled(stack, seen.before(LAYERS))
    close(cache.apply_ln_to_stack(stack), expected)
    close(cache.apply_ln_to_stack(stack, batch_slice=1), expected[:, 1])
    close(
        cache.apply_ln_to_stack(stack[:, :, 2], pos_slice=2, batch_slice=[1]), expected[:, [1], 2]
    )
    one = cache.apply_ln_to_stack(stack[:, 1], batch_slice=1, has_batch_dim=False)
    close(one, expected[:, 1])
    again = cache.apply_ln_to_stack(stack, recompute_ln=True)
    close(again, torch.stack([seen.final(part) for part in stack]))
    inside = cache.apply_ln_to_stack(stack, 1, recompute_ln=True)
    close(inside, seen.scaled(stack, seen.before(1)))


# ------------------------------------------------------------------------ logits


def logit(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def test_attributions_and_the_bias_sum_to_the_logit(name: str) -> None:
    cache, seen = cache_of(name), plain(name)
    tokens = torch.randint(0, 61, (2, 6), generator=torch.Generator().manual_seed(3))
    for stack in (cache.decompose_resid(), cache.get_full_resid_decomposition()):
        attrs = cache.logit_attrs(stack, tokens)
        assert attrs.shape == stack.shape[:-1]
        summed = attrs.sum(0) + cache.logit_bias(tokens)
        torch.testing.assert_close(summed, logit(seen.logits, tokens), atol=1e-4, rtol=0)


def test_attributions_of_differences_sum_to_the_difference(name: str) -> None:
    cache, seen = cache_of(name), plain(name)
    right, wrong = torch.tensor([4, 9]), torch.tensor([20, 3])
    stack = cache.get_full_resid_decomposition(pos_slice=-1, expand_neurons=False)
    attrs = cache.logit_attrs(stack, right, wrong, pos_slice=-1)
    logits = seen.logits[:, -1]
    difference = logit(logits, right) - logit(logits, wrong)
    summed = attrs.sum(0) + cache.logit_bias(right, wrong)
    torch.testing.assert_close(summed, difference, atol=1e-4, rtol=0)
    close(
        attrs,
        (
            cache.logit_attrs(stack, right, pos_slice=-1)
            - cache.logit_attrs(stack, wrong, pos_slice=-1)
        ),
    )


def test_each_attribution_is_what_the_head_makes_of_the_component(name: str) -> None:
    cache, seen = cache_of(name), plain(name)
    stack = cache.decompose_resid()
    norm: Any = seen.module.get_submodule(seen.paths.final)
    scaled = seen.scaled(stack, seen.before(LAYERS)) * (norm.weight + seen.paths.offset)
    W_U = seen.weight("lm_head")[0]
    close(cache.logit_attrs(stack, 7), scaled @ W_U[:, 7])


def test_ways_to_give_tokens() -> None:
    cache = cache_of("gpt2")
    stack = cache.decompose_resid()
    expected = cache.logit_attrs(stack, 7)
    for one in ("w7", torch.tensor(7), np.int64(7), np.array(7)):
        assert torch.equal(cache.logit_attrs(stack, one), expected)
        assert torch.equal(cache.logit_bias(one), cache.logit_bias(7))
    by_prompt = cache.logit_attrs(stack, ["w7", "w9"])
    close(by_prompt[:, 0], expected[:, 0])
    close(by_prompt[:, 1], cache.logit_attrs(stack, 9)[:, 1])
    assert torch.equal(cache.logit_attrs(stack, [[7], [9]]), by_prompt)
    by_position = cache.logit_attrs(stack, ids()[0])
    close(by_position[:, :, 2], cache.logit_attrs(stack, int(ids()[0, 2]))[:, :, 2])
    some = cache.logit_attrs(stack, [9], batch_slice=[1])
    close(some, by_prompt[:, [1]])


def test_tokens_that_do_not_fit() -> None:
    cache = cache_of("gpt2")
    stack = cache.decompose_resid()
    with pytest.raises(ShapeError, match=r"Tokens of shape \[3\] .* are \[2, 6\]"):
        cache.logit_attrs(stack, [1, 2, 3])
    with pytest.raises(ShapeError, match=r"Tokens of shape \[2, 6, 1\]"):
        cache.logit_attrs(stack, ids()[..., None])
    with pytest.raises(InputError, match=r"shape \[2\] and `incorrect_tokens` \[\]"):
        cache.logit_attrs(stack, [1, 2], 3)
    with pytest.raises(InputError, match="'w1 w2' is 2 tokens, not one"):
        cache.logit_attrs(stack, "w1 w2")
    with pytest.raises(InputError, match="whole numbers or texts"):
        cache.logit_attrs(stack, 1.5)
    bare = ActivationCache(dict(activations("gpt2")), LanguageModel(build("gpt2")))
    with pytest.raises(InputError, match="no tokenizer: give the id"):
        bare.logit_attrs(stack, "w7")


# ------------------------------------------------------------------------ other blocks

#: Blocks with norms behind attention and MLP, with one norm for both, with local attention, experts.
OTHERS = "gpt_neo gptj opt qwen3 gemma2 gemma3_text phi phi3 falcon olmo2 mixtral gpt_oss".split()


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_sums_are_exact_on_other_architectures(name: str) -> None:
    cache, model = cache_of(name), model_of(name)
    expand, count = not model.cfg.num_experts, model.cfg.n_layers
    for layer, mlp_input, key in [
        (1, False, ("resid_pre", 1)),
        (1, True, ("resid_pre" if model.cfg.parallel else "resid_mid", 1)),
        (count, False, ("resid_post", count - 1)),
    ]:
        stack, labels = cache.get_full_resid_decomposition(
            layer, mlp_input, expand, return_labels=True
        )
        assert len(labels) == len(stack)
        close(stack.sum(0), cache[key])
        close(cache.decompose_resid(layer, mlp_input).sum(0), cache[key])
    stack, tokens = cache.get_full_resid_decomposition(expand_neurons=expand), ids().flip(0)
    summed = cache.logit_attrs(stack, tokens).sum(0) + cache.logit_bias(tokens)
    torch.testing.assert_close(summed, logit(cache["unembed.hook_out"], tokens), atol=1e-4, rtol=0)
    some = cache.get_full_resid_decomposition(
        1, True, expand, apply_ln=True, pos_slice=1, project_output_onto=directions()
    )
    whole = cache.get_full_resid_decomposition(1, True, expand, apply_ln=True)
    close(some, whole[:, :, 1] @ directions())


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_heads_and_neurons_pass_the_norm_behind_them(name: str) -> None:
    cache = cache_of(name)
    heads = cache.stack_head_results(1, pos_slice=(0, 4))
    close(heads.sum(0), cache["attn_out", 0][:, :4])
    close(cache.get_neuron_results(0).sum(-2), cache["mlp_out", 0])
    with pytest.raises(UnavailableNameError, match=r"ln1_post.hook_scale` .* was not cached"):
        cache_of(name, "ln1_post.hook_scale").stack_head_results()


def test_norms_that_do_not_exist_leave_the_stack_as_it_is() -> None:
    cache = cache_of("olmo2")
    stack = cache.decompose_resid(1)
    assert torch.equal(cache.apply_ln_to_stack(stack, 1), stack)


def test_one_norm_for_both_is_that_of_the_mlp_too() -> None:
    cache = cache_of("gptj")
    stack = cache.decompose_resid(1, mlp_input=True, apply_ln=True)
    close(stack.sum(0), cache["normalized", 1, "ln1"])


def test_experts_have_no_neurons_of_all_tokens() -> None:
    cache = cache_of("mixtral")
    with pytest.raises(UnavailableNameError, match="neurons are those of experts"):
        cache.get_neuron_results(0)
    with pytest.raises(UnavailableNameError, match="neurons are those of experts"):
        cache.get_full_resid_decomposition()


@pytest.mark.slow
def test_sums_that_are_normalized_are_no_sums() -> None:
    cache = cache_of("bert")
    assert cache.accumulated_resid().shape == (4, 2, 6, 16)
    for method in (
        cache.decompose_resid,
        cache.stack_head_results,
        cache.get_full_resid_decomposition,
        functools.partial(cache.accumulated_resid, 1, apply_ln=True),
    ):
        with pytest.raises(InputError, match="is normalized behind each attention and MLP"):
            method()


@pytest.mark.slow
def test_blocks_without_attention_say_so() -> None:
    with pytest.raises(UnavailableNameError, match="a mixer and no attention"):
        cache_of("mamba").decompose_resid()


@pytest.mark.parametrize("fold_ln", [False, True])
def test_cache_of_a_hooked_transformer(fold_ln: bool) -> None:
    module = copy.deepcopy(model_of("gpt2").load())
    hooked = HookedTransformer.from_pretrained(
        "gpt2", hf_model=module, tokenizer=word_tokenizer(), fold_ln=fold_ln
    )
    logits, cache = hooked.run_with_cache(ids())
    assert cache.model is hooked
    stack = cache.get_full_resid_decomposition(pos_slice=-1)
    summed = cache.logit_attrs(stack, "w7", pos_slice=-1).sum(0) + cache.logit_bias("w7")
    torch.testing.assert_close(summed, logits[:, -1, 7], atol=1e-4, rtol=0)
    assert cache.to("cpu", move_model=True).model is hooked


def test_gradients_flow_through_the_methods() -> None:
    values = {one: value.clone() for one, value in activations("gpt_neox").items()}
    z = values["blocks.1.attn.hook_z"].requires_grad_()
    with torch.enable_grad():
        cache = ActivationCache(values, model_of("gpt_neox"))
        stack = cache.stack_head_results(2, pos_slice=-1)
        cache.logit_attrs(stack, 5, pos_slice=-1).sum().backward()
    assert z.grad is not None and z.grad[:, -1].abs().min() > 0
    assert not z.grad[:, :-1].any()


def test_half_precision_stays() -> None:
    values = {one: value.bfloat16() for one, value in activations("gpt2").items()}
    cache = ActivationCache(values, model_of("gpt2"))
    stack = cache.get_full_resid_decomposition(apply_ln=True, project_output_onto=directions())
    assert stack.dtype == cache.accumulated_resid(apply_ln=True).dtype == torch.bfloat16
    assert cache.logit_attrs(cache.decompose_resid(), 3).dtype == torch.bfloat16
