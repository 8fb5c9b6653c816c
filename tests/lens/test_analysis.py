"""Answers, logit lens, direct attributions, head detection and singular vectors against formulas on
what plain hooks see."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import graftwork.lens
from graftwork import LanguageModel
from graftwork.lens import analysis
from graftwork.lens.analysis import direct_logit_attribution, logit_lens
from graftwork.lens.head_detector import detect_head
from graftwork.lens.hooked_transformer import HookedTransformer
from graftwork.lens.svd_interpreter import SVDInterpreter
from graftwork.tracing.errors import GraftworkError, InputError, ShapeError, UnavailableNameError

from ..models.conftest import build, random_prompts, word_tokenizer
from .test_patching import Plain

LAYERS, HEADS = 3, 4
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
#: Final norm and unembedding.
ENDS = {
    "gpt2": ("transformer.ln_f", "lm_head"),
    "llama": ("model.norm", "lm_head"),
    "gpt_neox": ("gpt_neox.final_layer_norm", "lm_head"),
    "gemma2": ("model.norm", "lm_head"),
}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def varied(name: str) -> Any:
    """A tiny model whose gains and biases are random, too."""
    module = copy.deepcopy(build(name))
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
    return module


@functools.cache
def lens(name: str) -> HookedTransformer:
    with torch.no_grad():
        return HookedTransformer(LanguageModel(varied(name), word_tokenizer()))


@functools.cache
def plain(name: str) -> Plain:
    with torch.no_grad():
        return Plain(name, varied(name))


@functools.cache
def tiny() -> HookedTransformer:
    return HookedTransformer.from_pretrained("graftwork/tiny")


@functools.cache
def ids() -> torch.Tensor:
    return torch.stack(random_prompts(6, 6, seed=3))


def end_of(name: str, resid: torch.Tensor) -> torch.Tensor:
    norm, head = ENDS[name]
    found: torch.Tensor = plain(name).module.get_submodule(head)(
        plain(name).module.get_submodule(norm)(resid)
    )
    return found


def test_public_names_exist() -> None:
    assert [one for one in graftwork.lens.__all__ if not hasattr(graftwork.lens, one)] == []
    assert sorted(graftwork.lens.__all__) == graftwork.lens.__all__


# -------------------------------------------------------------------- answers


def test_answer_of_a_prompt() -> None:
    model = lens("gpt2")
    found = analysis.test_prompt("w5 w9 w20", "w7", model, prepend_space_to_answer=False, top_k=4)
    logits = plain("gpt2")(torch.tensor([[2, 5, 9, 20]]))[0][0, -1]
    (answer,) = found.answers
    order = logits.argsort(descending=True)
    assert answer.tokens.tolist() == [7] and answer.words == ["w7"] == [answer.text]
    assert answer.ranks == [order.tolist().index(7)]
    torch.testing.assert_close(answer.logits, logits[7:8], **CLOSE)
    torch.testing.assert_close(answer.probabilities, logits.softmax(-1)[7:8], **CLOSE)
    assert [text for text, *_ in answer.top[0]] == [f"w{int(i)}" for i in order[:4]]
    assert answer.top[0][2][2] == pytest.approx(float(logits.softmax(-1)[order[2]]), abs=1e-6)


def test_answers_of_several_tokens() -> None:
    model = lens("llama")
    answers = ["w7 w8 w9", "w30"]
    found = analysis.test_prompt("w5 w9", answers, model, prepend_bos=False)
    ids = torch.tensor([[5, 9, 7, 8, 9]])
    logits = plain("llama")(ids)[0][0].log_softmax(-1)
    expected = logits[1, 7] + logits[2, 8] + logits[3, 9]
    assert [len(one.ranks) for one in found.answers] == [3, 1]
    assert found.answers[0].log_probability == pytest.approx(float(expected), abs=1e-4)
    assert found.answers[1].log_probability == pytest.approx(float(logits[1, 30]), abs=1e-4)


def test_table_of_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "The Eiffel Tower is in the city of"
    found = analysis.test_prompt(prompt, "Paris", tiny(), top_k=3)
    assert capsys.readouterr().out == ""
    assert found.words[0] == "<|endoftext|>" and found.answers[0].words == [" Paris"]
    text = str(found)
    assert "' Paris': rank 0" in text and "probability  99" in text
    assert text.endswith("Ranks of the answer tokens: [(' Paris', 0)]")
    analysis.test_prompt(prompt, "Paris", tiny(), top_k=3, print_details=True)
    assert capsys.readouterr().out == f"{text}\n"


def test_no_answer() -> None:
    with pytest.raises(InputError, match="no answer"):
        analysis.test_prompt("w5", [], lens("gpt2"))
    with pytest.raises(InputError, match="without tokens"):
        analysis.test_prompt("w5", "", lens("gpt2"), prepend_space_to_answer=False)


# -------------------------------------------------------------------- logit lens


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_logit_lens(name: str) -> None:
    found = logit_lens(lens(name), ids())
    logits, seen = plain(name)(ids())
    streams = [seen["resid_pre", i] for i in range(LAYERS)] + [seen["resid_post", LAYERS - 1]]
    assert found.labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    torch.testing.assert_close(found.logits, end_of(name, torch.stack(streams)), **CLOSE)
    torch.testing.assert_close(found.logits[-1], logits, **CLOSE)
    best = found.logits.topk(2).indices
    assert torch.equal(found.top_ids(2), best)
    assert found.top_tokens(2)[1][0][3] == [f"w{int(i)}" for i in best[1, 0, 3]]
    expected = (found.logits[1, 0, 3] > found.logits[1, 0, 3, 9]).sum()
    assert found.ranks("w9")[1, 0, 3] == expected


def test_logit_lens_of_some_layers_and_the_middle() -> None:
    _, seen = plain("gpt2")(ids())
    found = logit_lens(lens("gpt2"), ids(), layers=[1, -1], mid=True)
    assert found.labels == ["1_pre", "1_mid", "2_pre", "2_mid"]
    streams = [
        seen["resid_pre", 1],
        seen["resid_mid", 1],
        seen["resid_pre", 2],
        seen["resid_mid", 2],
    ]
    torch.testing.assert_close(found.logits, end_of("gpt2", torch.stack(streams)), **CLOSE)
    with pytest.raises(InputError, match="layers 0 to 2, or 3"):
        logit_lens(lens("gpt2"), ids(), layers=[4])
    with pytest.raises(UnavailableNameError, match="parallel"):
        logit_lens(lens("gpt_neox"), ids(), mid=True)


def test_logit_lens_caps_logits_as_the_model_does() -> None:
    module = varied("gemma2")
    module.config.final_logit_softcapping = 2.0
    found = logit_lens(HookedTransformer(LanguageModel(module)), ids())
    kept = []
    handle = module.model.layers[1].register_forward_pre_hook(lambda m, a: kept.append(a[0]))
    module(ids())
    handle.remove()
    logits = module.lm_head(module.model.norm(kept[0]))
    torch.testing.assert_close(found.logits[1], (logits / 2).tanh() * 2, **CLOSE)
    assert found.logits.abs().max() <= 2


def test_logit_lens_runs_each_layer_once() -> None:
    model = lens("gpt2")
    rows: list[int] = []
    handles = [
        block.mlp.c_fc.register_forward_hook(lambda m, a, o: rows.append(len(a[0])))
        for block in model.module.transformer.h
    ]
    logit_lens(model, ids(), mid=True)
    for handle in handles:
        handle.remove()
    assert rows == [2] * LAYERS


def test_logit_lens_as_text() -> None:
    text = str(logit_lens(tiny(), "The Eiffel Tower is in the city of", layers=[3, 4]))
    first, last = text.splitlines()
    assert first.startswith("3_pre") and last.startswith("final_post")
    assert last.endswith("' Paris'")


def test_hooks_that_are_there_stay_in_force() -> None:
    model = lens("gpt2")
    hook = ("blocks.0.hook_mlp_out", lambda value, hook: value * 0.5)
    logits, seen = plain("gpt2")(ids(), {("mlp_out", 0): lambda value: value * 0.5})
    with model.hooks([hook]):
        found = logit_lens(model, ids())
        scores = detect_head(model, ids()[:1], "previous_token_head")
        answer = analysis.test_prompt("w5 w9", "w7", model, prepend_space_to_answer=False)
    torch.testing.assert_close(found.logits[-1], logits, **CLOSE)
    torch.testing.assert_close(found.logits[2], end_of("gpt2", seen["resid_pre", 2]), **CLOSE)
    expected = seen["pattern", 2][0, 1].diagonal(-1).sum() / 6
    torch.testing.assert_close(scores[2, 1], expected, **CLOSE)
    halved = plain("gpt2")(torch.tensor([[2, 5, 9]]), {("mlp_out", 0): lambda value: value * 0.5})
    torch.testing.assert_close(answer.answers[0].logits[0], halved[0][0, -1, 7], **CLOSE)


# -------------------------------------------------------------------- direct attributions


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_direct_attributions_sum_to_the_logit(name: str) -> None:
    logits, seen = plain(name)(ids())
    one, other = torch.tensor([5, 9]), torch.tensor([7, 11])
    found = direct_logit_attribution(lens(name), ids(), one, other)
    expected = logits[range(2), -1, one] - logits[range(2), -1, other]
    torch.testing.assert_close(found.total, expected, atol=1e-4, rtol=1e-4)
    single = direct_logit_attribution(lens(name), ids(), 5, pos_slice=2)
    torch.testing.assert_close(single.total, logits[:, 2, 5], atol=1e-4, rtol=1e-4)
    assert found.heads().shape == (LAYERS, HEADS, 2) and found.mlps().shape == (LAYERS, 2)
    # One head, by the formula.
    run = plain(name)
    norm, unembed = (run.module.get_submodule(one) for one in ENDS[name])
    attn = run.blocks[1].get_submodule(run.attn).get_submodule(run.out)
    weight = attn.weight if name == "gpt2" else attn.weight.T
    adds = seen["z", 1][:, -1, 2] @ weight.unflatten(0, (HEADS, -1))[2]
    final = seen["resid_post", LAYERS - 1][:, -1]
    if name == "llama":
        scale = (final.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    else:
        adds = adds - adds.mean(-1, keepdim=True)
        scale = (final.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    directions = unembed.weight[one] - unembed.weight[other]
    by_hand = (adds / scale * norm.weight * directions).sum(-1)
    torch.testing.assert_close(found["L1H2"], by_hand, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.heads()[1, 2], by_hand, atol=1e-4, rtol=1e-4)


def test_direct_attributions_of_texts() -> None:
    prompt = "The Eiffel Tower is in the city of"
    found = direct_logit_attribution(tiny(), prompt, " Paris", " Rome")
    logits = tiny()(prompt)[0, -1]
    paris, rome = (tiny().to_single_token(one) for one in (" Paris", " Rome"))
    torch.testing.assert_close(found.total[0], logits[paris] - logits[rome], atol=1e-3, rtol=1e-4)
    with pytest.raises(InputError, match="no component"):
        found["L9H0"]


# -------------------------------------------------------------------- detection of heads


def expected_score(
    attention: torch.Tensor, pattern: torch.Tensor, bos: bool, current: bool, measure: str
) -> float:
    size = len(pattern)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    kept = ~((bos & (columns == 0)) | (current & (rows == columns)))
    if measure == "mul":
        return float((attention * pattern * kept).sum() / (attention * kept).sum())
    return 1 - float(((attention - pattern) * kept).abs().sum() / size)


def kinds(tokens: list[int]) -> dict[str, torch.Tensor]:
    size = len(tokens)
    found = {}
    for name, matches in {
        "previous_token_head": lambda i, j: j == i - 1,
        "duplicate_token_head": lambda i, j: j < i and tokens[i] == tokens[j],
        "induction_head": lambda i, j: j <= i and j > 0 and tokens[j - 1] == tokens[i],
    }.items():
        found[name] = torch.tensor(
            [[float(matches(i, j)) for j in range(size)] for i in range(size)]
        )
    return found


@pytest.mark.parametrize("measure", ["mul", "abs"])
@pytest.mark.parametrize("kind", ["previous_token_head", "duplicate_token_head", "induction_head"])
def test_scores_of_heads(kind: str, measure: str) -> None:
    tokens = [5, 9, 20, 9, 5, 9, 20]
    prompt = torch.tensor([tokens])
    _, seen = plain("llama")(prompt)
    pattern = kinds(tokens)[kind]
    for bos, current in ((False, False), (True, False), (True, True)):
        found = detect_head(
            lens("llama"),
            prompt,
            kind,
            exclude_bos=bos,
            exclude_current_token=current,
            error_measure=measure,  # type: ignore[arg-type]
        )
        for layer in range(LAYERS):
            for head in range(HEADS):
                attention = seen["pattern", layer][0, head]
                expected = expected_score(attention, pattern, bos, current, measure)
                assert float(found[layer, head]) == pytest.approx(expected, abs=6e-4)


def test_heads_of_repeats_are_where_the_card_of_the_model_says() -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(300, 2000, (40,), generator=generator)
    scores = detect_head(tiny(), torch.cat([half, half]), "induction_head")
    best = scores.flatten().topk(3).indices
    assert {divmod(int(i), 8)[0] for i in best} == {2}  # layer 2
    assert scores.max() > 0.4


def test_texts_are_averaged_and_options_hold_for_each() -> None:
    model = lens("gpt2")
    texts = ["w5 w9 w20 w9", "w7 w7 w30 w8 w7"]
    options: dict[str, Any] = {"heads": {1: [0, 2], 2: 3}, "exclude_bos": True}
    each = [detect_head(model, one, "previous_token_head", **options) for one in texts]
    found = detect_head(model, texts, "previous_token_head", **options)
    torch.testing.assert_close(found, torch.stack(each).mean(0))
    asked = {(1, 0), (1, 2), (2, 3)}
    assert {tuple(i) for i in (found != -1).nonzero().tolist()} == asked
    pairs = detect_head(model, texts, "previous_token_head", list(asked), exclude_bos=True)
    assert torch.equal(found, pairs)


def test_a_cache_is_used_and_stays_as_it_is() -> None:
    model = lens("gpt2")
    text = "w5 w9 w20 w9"
    pattern = torch.ones(5, 5).tril()
    for without_batch in (False, True):
        cache = model.run_with_cache(text, remove_batch_dim=without_batch)[1]
        before = {name: value.clone() for name, value in cache.items()}
        found = detect_head(
            model, text, pattern, cache=cache, exclude_bos=True, exclude_current_token=True
        )
        assert all(torch.equal(value, cache[name]) for name, value in before.items())
        alone = detect_head(model, text, pattern, exclude_bos=True, exclude_current_token=True)
        torch.testing.assert_close(found, alone)


def test_what_cannot_be_detected() -> None:
    model = lens("gpt2")
    with pytest.raises(InputError, match="Did you mean `induction_head`"):
        detect_head(model, "w5 w9", "inductive_head")
    with pytest.raises(ShapeError, match="the prompt has 3"):
        detect_head(model, "w5 w9", torch.ones(4, 4).tril())
    with pytest.raises(ShapeError, match="lower triangular"):
        detect_head(model, "w5 w9", torch.ones(3, 3))
    with pytest.raises(InputError, match=r"no head \(1, 4\)"):
        detect_head(model, "w5 w9", "induction_head", heads=[(1, 4)])
    with pytest.raises(InputError, match="'mul' or 'abs'"):
        detect_head(model, "w5 w9", "induction_head", error_measure="dot")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one token"):
        detect_head(model, torch.tensor([5]), "induction_head")
    cache = model.run_with_cache(["w5 w9", "w8 w7"], names_filter="blocks.0.attn.hook_pattern")[1]
    with pytest.raises(InputError, match="2 prompts"):
        detect_head(model, "w5 w9", "induction_head", heads={0: 1}, cache=cache)
    with pytest.raises(UnavailableNameError, match=r"blocks\.1\.attn\.hook_pattern"):
        detect_head(model, "w5 w9", "induction_head", heads={1: 1}, cache=cache)
    with pytest.raises(InputError, match="one prompt"):
        detect_head(model, ["w5 w9", "w8 w7"], "induction_head", cache=cache)


# -------------------------------------------------------------------- singular vectors


def same_but_for_signs(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Columns of [d_vocab, n]; compared where singular values differ."""
    signs = (found * expected).sum(0).sign()
    torch.testing.assert_close(found, expected * signs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_singular_vectors(name: str) -> None:
    model = lens(name)
    module = model.module
    unembed = module.get_submodule(ENDS[name][1]).weight
    found = SVDInterpreter(model).get_singular_vectors("w_out", 1, 5)
    assert found.shape == (len(unembed), 1, 5)
    if name == "gpt2":
        block = module.transformer.h[1]
        w_out, w_in, gain = block.mlp.c_proj.weight, block.mlp.c_fc.weight.T, block.ln_2.weight
        W_V = block.attn.c_attn.weight[:, 32:].unflatten(1, (HEADS, 4))[:, 3]
        W_O = block.attn.c_proj.weight.unflatten(0, (HEADS, 4))[3]
    else:
        block = module.model.layers[1]
        norm = "post_attention_layernorm" if name == "llama" else "pre_feedforward_layernorm"
        w_out, w_in = block.mlp.down_proj.weight.T, block.mlp.up_proj.weight
        gain = block.get_submodule(norm).weight + float(name == "gemma2")
        W_V = block.self_attn.v_proj.weight.unflatten(0, (2, -1))[1].T  # heads 2 and 3 share it
        W_O = block.self_attn.o_proj.weight.T.unflatten(0, (HEADS, -1))[3]
    same_but_for_signs(found[:, 0], unembed @ torch.linalg.svd(w_out).Vh[:5].T)
    found = SVDInterpreter(model).get_singular_vectors("w_in", 1, 5)
    same_but_for_signs(found[:, 0], unembed @ torch.linalg.svd(w_in * gain).Vh[:5].T)
    found = SVDInterpreter(model).get_singular_vectors("OV", 1, 4, head_index=3)
    same_but_for_signs(found[:, 0], unembed @ torch.linalg.svd(W_V @ W_O).Vh[:4].T)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("QK", 0, 3, 0), "vector_type"),
        (("OV", 0, 3), "head_index is for OV"),
        (("w_in", 0, 3, 1), "head_index is for OV"),
        (("OV", 0, 5, 1), "1 to 4"),
        (("OV", 0, 3, 4), "4 heads"),
        (("w_in", 5, 3), "layer"),
    ],
)
def test_singular_vectors_that_do_not_exist(given: Any, message: str) -> None:
    with pytest.raises(GraftworkError, match=message):
        SVDInterpreter(lens("gpt2")).get_singular_vectors(*given)
