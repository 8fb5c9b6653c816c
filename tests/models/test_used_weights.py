"""Weights by name are those that the forward computes with: adapters, quantized, pruned, others."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch.nn.utils import parametrize, prune

from graftwork import LanguageModel
from graftwork.models.weights import is_linear, used_weight
from graftwork.tracing.errors import OperationError, UnavailableNameError

IDS = torch.tensor([[5, 17, 3, 44, 29, 8, 12]])
W_Q, W_O = "attn.W_Q", "attn.W_O"


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        **options,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=61, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def adapted(module: Any, *targets: str, **options: Any) -> Any:
    import peft

    config = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **options)
    with warnings.catch_warnings():  # it asks transformers by an older name
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(module, config).eval()


def heads(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with model.trace(IDS):
        each, whole = model.layers[0].head_out.save(), model.layers[0].attn_out.save()
    total = each.value.sum(2)
    if "attn.b_O" in model.layers[0]:
        total = total + model.layers[0]["attn.b_O"]
    return total, whole.value


# -------------------------------------------------------------------- adapters


@pytest.mark.parametrize(
    ("module", "targets", "options"),
    [
        (llama, ("q_proj", "o_proj"), {}),
        (lambda: llama(attention_bias=True), ("q_proj", "o_proj"), {"use_dora": True}),
        (gpt2, ("c_attn", "c_proj"), {"fan_in_fan_out": True}),
    ],
    ids=["lora", "dora", "conv1d"],
)
def test_a_weight_with_an_adapter_is_what_the_forward_uses(
    module: Any, targets: tuple[str, ...], options: Any
) -> None:
    wrapped = adapted(module(), *targets, **options)
    model: Any = LanguageModel(wrapped.base_model.model)
    merged: Any = LanguageModel(copy.deepcopy(wrapped).merge_and_unload())
    for name in (W_Q, W_O):
        found, expected = model.layers[0][name], merged.layers[0][name]
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=1e-5)
    total, whole = heads(model)
    assert torch.allclose(total, whole, atol=1e-5)
    with pytest.raises(
        OperationError, match=r"has an adapter that is not merged.*cannot be written"
    ):
        model.layers[0][W_Q][:] = 0


def test_an_adapter_that_is_merged_or_off_is_the_parameter_and_written() -> None:
    wrapped = adapted(llama(), "q_proj")
    model: Any = LanguageModel(wrapped.base_model.model)
    base = wrapped.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    with wrapped.disable_adapter():
        assert torch.equal(model.layers[0][W_Q].reshape(4, 64, 16)[0], base[:16].T)
    wrapped.merge_adapter()
    model.layers[0][W_Q][:, :10] = 0
    assert base[:, :10].abs().max() == 0 and base[:, 10:].abs().max() > 0


def test_dropout_in_training_has_no_one_weight() -> None:
    wrapped = adapted(llama(), "q_proj", lora_dropout=0.5).train()
    model: Any = LanguageModel(wrapped.base_model.model)
    with pytest.raises(UnavailableNameError, match="no linear map"):
        _ = model.layers[0][W_Q]


# -------------------------------------------------------------------- computed anew


def test_a_pruned_weight_is_read_fresh_and_not_written() -> None:
    module = llama()
    projection = module.model.layers[0].self_attn.q_proj
    prune.l1_unstructured(projection, "weight", 0.5)
    model: Any = LanguageModel(module)
    with torch.no_grad():
        projection.weight_orig *= 2  # the attribute is computed at the next forward
    expected = projection.weight_orig * projection.weight_mask
    assert torch.equal(model.layers[0][W_Q][1], expected[16:32].T)
    with pytest.raises(OperationError, match="computed anew for each forward"):
        model.layers[0][W_Q][:, 0] = 0


def test_a_parametrized_weight_is_not_written() -> None:
    class Doubled(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2

    module = llama()
    projection = module.model.layers[0].self_attn.o_proj
    parametrize.register_parametrization(projection, "weight", Doubled())
    model: Any = LanguageModel(module)
    assert torch.equal(model.layers[0][W_O][1], projection.weight.detach()[:, 16:32].T)
    total, whole = heads(model)
    assert torch.allclose(total, whole, atol=1e-5)
    with pytest.raises(OperationError, match="computed anew for each forward"):
        model.layers[0][W_O] *= 0


class Packed(torch.Tensor):
    """As quanto's and torchao's: numbers that are not the memory."""

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor) * 3


def test_a_tensor_that_dequantizes_itself_is_a_copy() -> None:
    linear = torch.nn.Linear(4, 4, bias=False)
    expected = linear.weight.detach() * 3
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Packed))
    numbers, reason = used_weight(linear, "weight")
    assert torch.equal(numbers.detach(), expected)
    assert reason == "is quantized"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_read_alike_before_and_after_they_are_packed(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit

    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(
        128, 64, bias=False, quant_type=kind, compress_statistics=kind == "nf4"
    ).to("cpu")
    linear.support_avx512bf16_for_cpu = True  # as where the forward packs
    exact = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    before, _ = used_weight(linear, "weight")
    assert torch.allclose(before, exact, rtol=2**-8, atol=0)
    packed, _ = _convert_weight_packed_for_cpu(linear.weight.data, linear.weight.quant_state)
    linear.weight.data = packed
    after, reason = used_weight(linear, "weight")
    assert torch.equal(after, before) and after.dtype == before.dtype
    assert reason == "is quantized"


# -------------------------------------------------------------------- what a linear is


class Turned(torch.nn.Module):
    """Computes as `torch.nn.Linear`, under a name of its own."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(rows, columns))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class Plain(Turned):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_a_linear_is_told_by_what_it_does() -> None:
    assert is_linear(torch.nn.Linear(4, 4))
    assert is_linear(Turned(4, 4)) and is_linear(Turned(4, 6).to("meta"))
    assert not is_linear(Plain(4, 4))
    assert not is_linear(transformers.pytorch_utils.Conv1D(4, 4))
    assert not is_linear(torch.nn.Embedding(4, 4))
    assert not is_linear(torch.nn.LayerNorm(4))


def test_a_projection_of_an_own_class_is_oriented() -> None:
    module = llama()
    expected: Any = LanguageModel(copy.deepcopy(module))
    own = Turned(64, 64)
    own.weight = module.model.layers[0].self_attn.q_proj.weight
    module.model.layers[0].self_attn.q_proj = own
    model: Any = LanguageModel(module)
    assert torch.equal(model.layers[0][W_Q], expected.layers[0][W_Q])


# -------------------------------------------------------------------- the skeleton of quantized modules


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_shapes_of_a_wrapped_quantized_model(kind: str, tmp_path: Any) -> None:
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(tmp_path)
    options: Any = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True}
    module = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.BitsAndBytesConfig(**options), device_map="cpu"
    )
    model: Any = LanguageModel(module)
    with model.trace(IDS):
        assert model.model.layers[0].mlp.up_proj.output.shape == (1, 7, 96)
        assert model.layers[0].z.shape == (1, 7, 4, 16)
        z = model.layers[0].z.save()
        hidden = model.model.layers[1].output.save()
    assert z.value.shape == (1, 7, 4, 16)
    found: list[torch.Tensor] = []
    handle = module.model.layers[1].register_forward_hook(lambda _m, _a, o: found.append(o))
    with torch.no_grad():
        module(IDS)
    handle.remove()
    assert torch.equal(hidden.value, found[0])


# -------------------------------------------------------------------- a model in a wrapper


def test_names_of_a_peft_model_are_those_of_the_model_in_it() -> None:
    wrapped = adapted(llama(), "q_proj", "o_proj")
    model: Any = LanguageModel(wrapped)
    inner: Any = LanguageModel(wrapped.base_model.model)
    total, whole = heads(model)
    assert torch.allclose(total, whole, atol=1e-5)
    assert torch.equal(model.layers[1][W_Q], inner.layers[1][W_Q])
    assert torch.equal(model["embed.W_E"], wrapped.base_model.model.model.embed_tokens.weight)
    assert model.cfg == inner.cfg
    with model.trace(IDS):
        logits, last = model.logits.save(), model.ln_final.save()
        block = model.model.model.layers[1].output.save()  # as on the module
    with torch.no_grad():
        expected = wrapped(input_ids=IDS).logits
    assert torch.allclose(logits.value, expected, atol=1e-6)
    assert last.value.shape == block.value.shape == (1, 7, 64)
    assert model.verify_names(strict=False).ok
