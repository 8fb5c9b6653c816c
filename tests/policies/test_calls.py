"""Values that are asked for without a block, against torch's own hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graftwork import LanguageModel, Model
from graftwork.tracing.errors import GraftworkError, InputError

from ..models.conftest import build, random_prompts, word_tokenizer
from .conftest import (
    CAUSAL,
    HEADS,
    LAYERS,
    POINTS,
    TEXT,
    close,
    fresh,
    module,
    numbers,
    plain,
    seen,
)

IDS = random_prompts(6)[0]


def at(name: str, point: str, ids: torch.Tensor = IDS) -> list[torch.Tensor]:
    return seen(name, ids, [(point, layer) for layer in range(LAYERS)])


@pytest.mark.parametrize("name", TEXT)
def test_logits(name: str) -> None:
    """Those of the model: Gemma 2 ends with a softcap."""
    model = fresh(name)
    close(model.get_logits(IDS), plain(name, IDS))
    close(model.get_logits([IDS.tolist()] * 2), plain(name, IDS).expand(2, -1, -1))
    if name == "gemma2":
        assert module(name).config.final_logit_softcapping


@pytest.mark.parametrize("name", TEXT)
def test_residual_stream(name: str) -> None:
    model = fresh(name)
    found, decoder = model.get_residual_stream(IDS), model.get_residual_stream_decoder(IDS)
    before, after = at(name, "pre_decoder"), at(name, "post_decoder")
    states = torch.cat([before[0], *after])
    assert found.shape == (2 * LAYERS + 1, 6, 16)
    close(decoder, states)
    close(found[::2], states)
    # Between attention and MLP: what attention has added; normalized where the block does that there.
    attn = at(name, "post_attn")
    for layer in range(LAYERS):
        middle = attn[layer] if name in ("bert", "roberta") else before[layer] + attn[layer]
        close(found[2 * layer + 1], middle[0])


@pytest.mark.parametrize("name", [n for n in TEXT if n not in ("bert", "roberta")])
def test_residual_diffs(name: str) -> None:
    model = fresh(name)
    diffs, stream = model.get_residual_diffs(IDS), model.get_residual_stream(IDS)
    assert diffs.shape == (2 * LAYERS, 6, 16)
    close(diffs[::2], torch.cat(at(name, "post_attn")))
    close(diffs[1::2], torch.cat(at(name, "post_mlp")))
    close(stream[1:] - stream[:-1], diffs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", TEXT)
def test_neurons_and_heads(name: str) -> None:
    model = fresh(name)
    ids = torch.stack(random_prompts(5, 5))
    found = model.get_midlayer_activations(ids)
    close(found["mlp"], torch.stack(at(name, "mlp_pre_out", ids), 1))
    close(found["attn"], torch.stack(at(name, "attn_pre_out", ids), 1))
    assert found["attn"].shape[:4] == (2, LAYERS, 5, HEADS)


@pytest.mark.parametrize("name", TEXT)
def test_patterns(name: str) -> None:
    import copy

    eager = copy.deepcopy(build(name))
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        expected = eager(IDS[None], output_attentions=True).attentions
    close(fresh(name).get_attn_weights(IDS), torch.cat(expected))


@pytest.mark.parametrize("name", CAUSAL)
def test_policies_are_in_them(name: str) -> None:
    model, vector = fresh(name), numbers(16)
    model.hooks["post_mlp"][0]["postbias"].set_bias(vector)
    functions: Any = {("post_mlp", 0): lambda x: x + vector}
    close(model.get_logits(IDS), plain(name, IDS, functions))
    spots = [(point, 1) for point in ("pre_decoder", "post_decoder")]
    before, after = seen(name, IDS, spots, functions)
    found = model.get_residual_stream(IDS)
    close(found[2], before[0])
    close(found[4], after[0])


def test_nothing_hangs_on_a_gradient() -> None:
    model = fresh("llama")
    model.hooks["mlp_pre_out"][0]["mask"].param.requires_grad_()
    for found in (
        model.get_logits(IDS),
        model.get_residual_stream(IDS),
        model.get_residual_stream_decoder(IDS),
        model.get_residual_diffs(IDS),
        model.get_midlayer_activations(IDS)["mlp"],
        model.get_attn_weights(IDS),
    ):
        assert not found.requires_grad


def test_what_is_refused() -> None:
    model = fresh("llama")
    several = [IDS.tolist(), IDS.tolist()]
    for ask in (model.get_residual_stream, model.get_residual_diffs, model.get_attn_weights):
        with pytest.raises(InputError, match="takes one prompt, and 2 were given"):
            ask(several)
    with pytest.raises(InputError, match="has no tokenizer"):
        LanguageModel(module("llama")).generate(IDS, num=3)
    with pytest.raises(InputError, match="does not generate text"):
        fresh("roberta").generate(IDS, num=3)


# -------------------------------------------------------------------- models by name


def test_a_text_model_by_name(tmp_path: Any) -> None:
    module("opt").save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    model: Any = Model(str(tmp_path), hook_config="mlp_pre_out: collect")
    assert type(model) is LanguageModel
    ids = model.tokenizer("w3 w9 w5", return_tensors="pt")["input_ids"]
    close(model.get_logits("w3 w9 w5"), plain("opt", ids))
    assert model.get_residual_stream("w3 w9 w5").shape == (7, 3, 16)
    with torch.no_grad():
        expected = module("opt").generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
        )
    assert model.generate("w3 w9 w5", num=5) == model.tokenizer.decode(
        expected[0], skip_special_tokens=True
    )
    assert list(model.hooks["mlp_pre_out"][0]) == ["collect"]


def test_an_image_model_by_name(tmp_path: Any) -> None:
    module("vit").save_pretrained(tmp_path)
    model: Any = Model(str(tmp_path))
    pixels = numbers(3, 3, 8, 8)
    assert not model.loaded
    with model.scan(pixels):
        box = model.layers[1].z.save()
    assert box.value.shape == (3, 5, HEADS, 4) and not model.loaded
    close(model.get_logits(pixels), plain("vit", pixels))
    one = pixels[:1]
    states = [seen("vit", one, [("pre_decoder", 0)])[0], *at("vit", "post_decoder", one)]
    close(model.get_residual_stream_decoder(one), torch.cat(states))
    close(model.get_residual_stream(one)[::2], torch.cat(states))
    model.hooks["mlp_pre_out"][1]["replace"].add_token(2, torch.ones(24))
    model.hooks.enable_collect_hooks()
    with model.trace() as tracer:
        boxes = []
        for image in pixels:
            with tracer.invoke(image[None]):
                boxes.append(model.logits.save())

    def function(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, 2] = 1
        return x

    expected = plain("vit", pixels, {("mlp_pre_out", 1): function})
    close(torch.cat([one.value for one in boxes]), expected)
    assert len(model.hooks[POINTS[0]]["collect"]) == LAYERS
    model.hooks.reset()
    with model.edit() as edited:
        model.layers[1].mlp_post[:] = 0
    close(
        edited.get_logits(pixels),
        plain("vit", pixels, {("mlp_pre_out", 1): torch.zeros_like}),
    )
    assert model.verify_names().ok
    with pytest.raises(GraftworkError, match="takes images"):
        model.generate(pixels, num=3)
