"""T5: the encoder's tokens are the prompt's, the decoder has its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from graftwork import LanguageModel
from graftwork.tracing.errors import InputError


@pytest.fixture(scope="module")
def module() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=61, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def model(module: Any) -> Any:
    return LanguageModel(module)


def prompt(tokens: int, targets: int, shift: int = 0) -> dict[str, torch.Tensor]:
    ids = (torch.arange(tokens)[None] * 5 + 3 + shift) % 61
    return {"input_ids": ids, "decoder_input_ids": (torch.arange(targets)[None] * 7 + shift) % 61}


def test_shapes_of_encoder_and_decoder(model: Any) -> None:
    with model.trace(**prompt(8, 12)):
        places = [
            model.decoder.final_layer_norm.output,
            model.lm_head.output,
            model.encoder.final_layer_norm.output,
            model.decoder.block[0].layer[1].EncDecAttention.k.output,
            model.decoder_layers[0].cross_pattern,
            model.decoder_layers[0].pattern,
            model.encoder_layers[0].mlp_pre,
        ]
        shapes = [tuple(place.shape) for place in places]
        saved = [place.save() for place in places]
    assert shapes == [tuple(value.value.shape) for value in saved]
    assert shapes[0] == (1, 12, 16) and shapes[4] == (1, 4, 12, 8)


def test_tokens_of_the_decoder_are_counted_in_the_decoder(module: Any, model: Any) -> None:
    given = prompt(2, 4)
    with model.trace(**given):
        model.decoder_layers[0].mlp_pre.t[-4] = 0
        first = (model.decoder_layers[0].mlp_pre * 1).t[0].save()
        last = model.decoder_layers[0].mlp_pre.t[-1].save()
        encoded = model.encoder_layers[0].mlp_pre.t[-1].save()
        logits = model.output.logits.save()
    seen = {}

    def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, -4] = 0
        seen["decoder"] = output
        return output

    def keep(_: Any, __: Any, output: torch.Tensor) -> None:
        seen["encoder"] = output

    handles = [
        module.decoder.block[0].layer[2].DenseReluDense.wi.register_forward_hook(hook),
        module.encoder.block[0].layer[1].DenseReluDense.wi.register_forward_hook(keep),
    ]
    with torch.no_grad():
        expected = module(**given).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(logits.value, expected)
    torch.testing.assert_close(first.value, seen["decoder"][:, 0])
    torch.testing.assert_close(last.value, seen["decoder"][:, -1])
    torch.testing.assert_close(encoded.value, seen["encoder"][:, -1])
    with pytest.raises(InputError, match="has 4 tokens"), model.trace(**given):
        model.decoder_layers[0].mlp_pre.t[4].save()


@pytest.mark.parametrize("targets", [(6, 6), (6, 9)])
@pytest.mark.parametrize("same", [True, False])
def test_prompts_of_a_batch_have_their_own_decoder_tokens(
    module: Any, model: Any, targets: tuple[int, int], same: bool
) -> None:
    one = prompt(5, targets[0])
    prompts = [one, one if same else prompt(5, targets[1], 2)]
    saved = []
    with model.trace() as tracer:
        for given in prompts:
            with tracer.invoke(**given):
                saved.append((model.decoder_layers[1].mlp_out.save(), model.output.logits.save()))
    for given, (out, logits) in zip(prompts, saved, strict=True):
        with torch.no_grad():
            expected = module(**given).logits
        torch.testing.assert_close(logits.value, expected)
        assert out.value.shape[:2] == given["decoder_input_ids"].shape


def test_labels_are_the_decoders(module: Any, model: Any) -> None:
    ids, labels = prompt(8, 5)["input_ids"], torch.tensor([[4, 8, 15, 16, 23]])
    with model.trace(ids, labels=labels):
        shape = tuple(model.decoder.final_layer_norm.output.shape)
        loss = model.output.loss.save()
    with torch.no_grad():
        torch.testing.assert_close(loss.value, module(input_ids=ids, labels=labels).loss)
    assert shape == (1, 5, 16)


def test_a_generation_begins_with_one_token_of_the_decoder(model: Any) -> None:
    with model.generate(prompt(8, 1)["input_ids"], max_new_tokens=3) as generator:
        with generator.iter[1:2]:
            place = model.decoder.final_layer_norm.output
            tokens = model.decoder_layers[0].mlp_in.shape[1].save()
            later = place.t[-1].save()
        first = model.decoder.final_layer_norm.output
        shape, first = tuple(first.shape), first.save()
    assert shape == tuple(first.value.shape) == (1, 1, 16)
    assert later.value[0].shape == (1, 16) and tokens.value == [1]
