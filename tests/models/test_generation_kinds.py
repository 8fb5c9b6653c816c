"""Blocks inside every way in which transformers generates: sampling, beams, streamed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import TextStreamer

from graftwork import LanguageModel

PROMPTS = ["The capital of France is", "hello there"]

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "beams": {"num_beams": 3, "do_sample": False},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("graftwork/tiny")


def plainly(model: LanguageModel, prompt: str, edit: bool, **options: Any) -> tuple[Any, list[Any]]:
    """`generate` of transformers with torch's own hooks: the ids, and block 1's output at each step."""
    module, seen = model.load(), []

    def hook(_module: Any, _args: Any, output: torch.Tensor) -> Any:
        if edit:
            output = output.clone()
            output[:, -1] += 1.0
        seen.append(output.clone())
        return output

    inputs = model.tokenizer(prompt, return_tensors="pt")
    handle = module.get_submodule("transformer.h.1").register_forward_hook(hook)
    torch.manual_seed(0)
    try:
        ids = module.generate(**inputs, max_new_tokens=5, **options)
    finally:
        handle.remove()
    return ids, seen


@pytest.mark.parametrize("edit", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_loop_over_the_steps_is_in_each_of_them(
    model: LanguageModel, way: str, edit: bool
) -> None:
    ids, seen = plainly(model, PROMPTS[0], edit, **WAYS[way])
    torch.manual_seed(0)
    with model.generate(PROMPTS[0], max_new_tokens=5, **WAYS[way]) as generator, generator.all():
        hidden = model.transformer.h[1].output
        if edit:
            hidden[:, -1] += 1.0
        hidden.save()
    assert torch.equal(generator.output, ids)
    assert len(hidden.value) == len(seen)
    for mine, theirs in zip(hidden.value, seen, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_text_is_streamed_while_a_block_edits(model: LanguageModel) -> None:
    class Kept(TextStreamer):  # type: ignore[no-untyped-call]
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text

    mine = Kept(model.tokenizer, skip_prompt=True)  # type: ignore[no-untyped-call]
    theirs = Kept(model.tokenizer, skip_prompt=True)  # type: ignore[no-untyped-call]
    plainly(model, PROMPTS[0], True, do_sample=False, streamer=theirs)
    with (
        model.generate(PROMPTS[0], max_new_tokens=5, do_sample=False, streamer=mine) as generator,
        generator.all(),
    ):
        model.transformer.h[1].output[:, -1] += 1.0
    assert mine.text == theirs.text != ""


def test_a_batch_of_sampled_prompts_ends_as_transformers_ends_it(model: LanguageModel) -> None:
    model.tokenizer.padding_side = "left"
    inputs = model.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    torch.manual_seed(3)
    expected = model.load().generate(**inputs, max_new_tokens=4, do_sample=True, top_k=5)
    torch.manual_seed(3)
    with model.generate(max_new_tokens=4, do_sample=True, top_k=5) as generator:
        for prompt in PROMPTS:
            with generator.invoke(prompt), generator.all():
                model.transformer.h[0].output.save()
    assert torch.equal(generator.output, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_pattern_over_a_cache_of_fixed_length_is_that_of_eager_attention(
    name: str, tools: Any
) -> None:
    ids = torch.arange(1, 8).unsqueeze(0)
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    plain = copy.deepcopy(tools.module(name))
    plain.set_attn_implementation("eager")
    expected = plain.generate(
        ids, output_attentions=True, return_dict_in_generate=True, eos_token_id=None, **options
    )
    module = copy.deepcopy(tools.module(name))
    module.set_attn_implementation("sdpa")
    model = LanguageModel(module)
    with model.generate(ids, eos_token_id=None, **options) as generator, generator.all():
        pattern = model.layers[1].pattern.save()
    assert torch.equal(generator.output, expected.sequences)
    assert [one.shape for one in pattern] == [step[1].shape for step in expected.attentions]
    for found, step in zip(pattern, expected.attentions, strict=True):
        torch.testing.assert_close(found, step[1], atol=1e-5, rtol=1e-4)
