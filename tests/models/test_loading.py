"""Where models come from: lazily, in every dtype, from good and from bad places."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from graftwork import LanguageModel
from graftwork.models.loading import meta_copy
from graftwork.tracing.errors import InputError, LoadError, UnknownModuleError

IDS = [3, 4, 5, 6, 7]


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=200,
        )
    )


def opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            ffn_dim=128,
            vocab_size=200,
            word_embed_proj_dim=64,
            max_position_embeddings=64,
        )
    )


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=3,
            n_embd=64,
            n_head=8,
            vocab_size=200,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


BLOCKS = {"llama": "model.layers", "opt": "model.decoder.layers", "gpt2": "transformer.h"}
BUILD = {"llama": llama, "opt": opt, "gpt2": gpt2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("checkpoints")
    for name, build in BUILD.items():
        torch.manual_seed(0)
        build().save_pretrained(root / name)
    return {name: str(root / name) for name in BUILD}


def plain_block(folder: str, path: str, **options: object) -> torch.Tensor:
    """Output of the second block, by a plain hook on a plainly loaded model."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder, **options)
    found = {}
    block = module.get_submodule(f"{path}.1")
    block.register_forward_hook(lambda _m, _a, output: found.update(x=output))
    with torch.no_grad():
        module(torch.tensor([IDS]))
    return found["x"] if isinstance(found["x"], torch.Tensor) else found["x"][0]


# -------------------------------------------------------------------- lazily


def test_a_name_reads_no_weights_until_a_block_exits(folders: dict[str, str]) -> None:
    model = LanguageModel(folders["gpt2"])
    assert not model.loaded
    assert all(p.is_meta for p in model.module_tree().parameters())
    with model.trace(IDS):
        hidden = model.transformer.h[1].output.save()
        assert not model.loaded
    assert model.loaded
    assert torch.equal(hidden.value, plain_block(folders["gpt2"], "transformer.h"))


def test_a_folder_without_weights_prints_and_then_says_what_is_missing(tmp_path: Path) -> None:
    gpt2().config.save_pretrained(tmp_path)
    model = LanguageModel(str(tmp_path))
    assert "GPT2Block" in repr(model)
    with pytest.raises(LoadError, match="cannot be read as a model"), model.trace(IDS):
        model.transformer.h[0].output.save()


def test_the_tree_prints_as_torch_prints_it(folders: dict[str, str]) -> None:
    for name, folder in folders.items():
        model = LanguageModel(folder)
        expected = repr(BUILD[name]())
        assert repr(model) == expected
        model.load()
        assert repr(model) == expected


def test_load_gives_the_module_and_is_done_once(folders: dict[str, str]) -> None:
    model = LanguageModel(folders["gpt2"])
    module = model.load()
    assert model.load() is module
    assert model.loaded
    assert not module.training


def test_an_envoy_taken_before_loading_serves_after_it(folders: dict[str, str]) -> None:
    model = LanguageModel(folders["llama"])
    block = model.model.layers[1]
    model.load()
    with model.trace(IDS):
        hidden = block.output.save()
    assert torch.equal(hidden.value, plain_block(folders["llama"], "model.layers"))


def test_a_misspelt_submodule_fails_at_its_line_before_loading(folders: dict[str, str]) -> None:
    model = LanguageModel(folders["gpt2"])
    with (
        pytest.raises(UnknownModuleError, match=r"no submodule or attribute `ouptut`|`attn`"),
        model.trace(IDS),
    ):
        model.transformer.h[0].atn.output.save()
    with pytest.raises(UnknownModuleError, match=r"has 3 modules, so index 7 does not exist"):
        _ = model.transformer.h[7]
    assert not model.loaded


def test_shape_and_order_need_no_weights(folders: dict[str, str]) -> None:
    model = LanguageModel(folders["llama"])
    with pytest.raises(ZeroDivisionError), model.trace(IDS):
        assert model.model.layers[0].output.shape == (1, 5, 64)
        assert model.lm_head.output.shape == (1, 5, 200)
        raise ZeroDivisionError
    assert not model.loaded


@pytest.mark.slow
def test_a_70b_configuration_needs_neither_time_nor_memory(tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ).save_pretrained(tmp_path)
    model = LanguageModel(str(tmp_path))
    assert sum(p.numel() for p in model.module_tree().parameters()) > 70e9
    assert all(p.is_meta for p in model.module_tree().parameters())
    with pytest.raises(ZeroDivisionError), model.trace(IDS):
        assert model.model.layers[79].output.shape == (1, 5, 8192)
        raise ZeroDivisionError


@pytest.mark.slow
def test_a_mixture_of_experts_can_be_measured(tmp_path: Path) -> None:
    MixtralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
    ).save_pretrained(tmp_path)
    model = LanguageModel(str(tmp_path))
    with pytest.raises(ZeroDivisionError), model.trace(IDS):
        assert model.model.layers[1].mlp.output.shape == (1, 5, 64)
        raise ZeroDivisionError


def test_a_meta_copy_shares_no_memory_and_keeps_ties() -> None:
    module = gpt2()
    module.transformer.h[0].register_forward_hook(lambda *_: None)
    copied = meta_copy(module)
    assert all(p.is_meta for p in copied.parameters())
    assert not any(p.is_meta for p in module.parameters())
    assert copied.lm_head.weight is copied.transformer.wte.weight
    assert not copied.transformer.h[0]._forward_hooks


# -------------------------------------------------------------------- dtypes and devices

TORCH = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}


@pytest.mark.parametrize("name", [*TORCH, "torch.bfloat16"])
@pytest.mark.parametrize("architecture", BUILD)
def test_dtypes_by_name(folders: dict[str, str], architecture: str, name: str) -> None:
    dtype = TORCH.get(name, torch.bfloat16)
    path = BLOCKS[architecture]
    model = LanguageModel(folders[architecture], dtype=dtype if "torch" in name else name)
    with model.trace(IDS):
        block = model.get(path)[1]
        assert block.output[0].dtype == dtype
        hidden = block.output[0].save()
        block.output[0][:, -1] += torch.ones(64)
        edited = block.output[0].save()
    expected = plain_block(folders[architecture], path, dtype=dtype)
    assert hidden.dtype == edited.dtype == dtype
    assert torch.equal(hidden.value, expected)
    assert torch.equal(edited.value[:, -1], expected[:, -1] + torch.ones(64, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "close"), [("int8", 0.999), ("int4", 0.95), ("nf4", 0.97)])
@pytest.mark.parametrize("architecture", BUILD)
def test_quantized_by_name_on_a_cpu(
    folders: dict[str, str], architecture: str, name: str, close: float
) -> None:
    path = BLOCKS[architecture]
    model = LanguageModel(folders[architecture], dtype=name)
    assert not model.loaded
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            hidden = model.get(path)[1].output[0].save()
            assert not model.loaded
        with tracer.invoke(IDS[:3]):
            before = model.get(path)[1].output[0].save()
            model.get(path)[1].output[0][:, -1] += torch.ones(64)
            after = model.get(path)[2].input.save()
    kinds = {type(child).__name__ for child in model.load().modules()}
    assert kinds & {"Linear8bitLt", "Linear4bit"}
    expected = plain_block(folders[architecture], path)
    cosine = torch.cosine_similarity(hidden.value.float().flatten(), expected.flatten(), dim=0)
    assert cosine > close
    change = torch.zeros(1, 3, 64)
    change[:, -1] = 1
    assert torch.allclose(after.value - before.value, change, atol=1e-5)
    with model.generate(IDS, max_new_tokens=3, do_sample=False) as generator:
        pass
    ids = torch.tensor([IDS])
    plain = model.load().generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    assert torch.equal(generator.output, plain)


@pytest.mark.slow
def test_int8_says_once_that_it_casts(
    folders: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    model = LanguageModel(folders["llama"], dtype="int8")
    with caplog.at_level(logging.WARNING), model.trace(IDS):
        model.lm_head.output.save()
    assert sum("MatMul8bitLt" in record.message for record in caplog.records) <= 1


@pytest.mark.parametrize("name", ["hqq8", "hqq4", "float7", "int5"])
def test_unknown_dtypes_are_refused_with_a_sentence(folders: dict[str, str], name: str) -> None:
    with pytest.raises(LoadError, match=rf"dtype='{name}' is not supported.*Known: fp64, fp32"):
        LanguageModel(folders["gpt2"], dtype=name)


def test_quantizing_without_bitsandbytes_names_the_extra(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LoadError, match=r"pip install \"graftwork\[quant\]\""):
        LanguageModel(folders["gpt2"], dtype="nf4")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no CUDA")
def test_cuda_without_cuda_loads_on_the_cpu_and_says_so(
    folders: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="graftwork"):
        model = LanguageModel(folders["gpt2"], device_map="cuda")
    assert "no CUDA device" in caplog.text
    model.load()
    assert model.device == torch.device("cpu")


@pytest.mark.slow
def test_offloaded_weights_are_read_edited_and_used(
    folders: dict[str, str], tmp_path: Path
) -> None:
    places = dict.fromkeys(
        ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0"), "cpu"
    )
    device_map = {**places, "model.layers.1": "disk", "model.layers.2": "cpu"}
    model = LanguageModel(
        folders["llama"], device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    with model.trace(IDS):
        block = model.model.layers[1]
        hidden = block.output.save()
        down = block.mlp.down_proj
        product = (down.output @ down.weight).save()
        applied = model.model.layers[1].mlp(hidden).save()
    module = llama()
    module.load_state_dict(LlamaForCausalLM.from_pretrained(folders["llama"]).state_dict())
    module.eval()
    found = {}
    plain = module.model.layers[1]
    plain.mlp.down_proj.register_forward_hook(lambda m, _a, o: found.update(y=o @ m.weight))
    plain.register_forward_hook(lambda _m, _a, o: found.update(x=o))
    with torch.no_grad():
        module(torch.tensor([IDS]))
        expected = plain.mlp.forward(found["x"])
    assert torch.allclose(hidden.value, found["x"], atol=1e-6)
    assert torch.allclose(applied.value, expected, atol=1e-6)
    with torch.no_grad():
        module(torch.tensor([IDS]))
    assert torch.allclose(product.value, found["y"], atol=1e-6)


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        ("float16", torch.float16),
        ("half", torch.float16),
        ("torch.bfloat16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("FP16", torch.float16),
        ("float32", torch.float32),
        ("double", torch.float64),
    ],
)
def test_dtypes_as_others_spell_them(
    folders: dict[str, str], spelling: str, dtype: torch.dtype
) -> None:
    model = LanguageModel(folders["gpt2"], dtype=spelling)
    assert model.transformer.wte.weight.dtype == dtype
    assert model.load().get_parameter("transformer.wte.weight").dtype == dtype


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"devicemap": "cpu"}])
def test_a_device_as_others_spell_it(folders: dict[str, str], options: Any) -> None:
    model = LanguageModel(folders["gpt2"], **options)
    assert model.device == torch.device("cpu")
    assert all(p.device.type == "cpu" for p in model.load().parameters())
    with pytest.raises(LoadError, match="say the same thing"):
        LanguageModel(folders["gpt2"], device_map="cpu", **options)


def test_dispatch_loads_now(folders: dict[str, str]) -> None:
    assert LanguageModel(folders["gpt2"], dispatch=True).loaded
    assert not LanguageModel(folders["gpt2"], dispatch=False).loaded
    assert LanguageModel(gpt2(), dispatch=True).loaded


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no CUDA")
@pytest.mark.parametrize("place", ["cuda:0", torch.device("cuda"), 0])
def test_a_mapping_to_cuda_without_one_is_the_cpu(
    folders: dict[str, str], place: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = LanguageModel(folders["gpt2"], device_map={"": place})
    assert "there is no CUDA device" in caplog.text
    with model.trace(IDS):
        hidden = model.transformer.h[1].output[0].save()
    assert torch.equal(hidden.value, plain_block(folders["gpt2"], "transformer.h"))


def test_an_option_that_nobody_knows_is_one_sentence(folders: dict[str, str]) -> None:
    with pytest.raises(LoadError, match=r"`atn_implementation=` is no option.*attn_implementation"):
        LanguageModel(folders["gpt2"], atn_implementation="eager")
    # What transformers still takes, though it does nothing with it, is none of our business.
    LanguageModel(folders["gpt2"], low_cpu_mem_usage=True, offload_buffers=False).load()


def test_further_keywords_go_to_from_pretrained(folders: dict[str, str]) -> None:
    model = LanguageModel(folders["llama"], attn_implementation="eager")
    with model.trace(IDS):
        weights = model.model.layers[0].self_attn.output[1].save()
    assert weights.shape == (1, 4, 5, 5)
    assert torch.allclose(weights.value.sum(-1), torch.ones(1, 4, 5), atol=1e-5)


# -------------------------------------------------------------------- bad places


def test_an_unknown_model_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        LoadError, match=r"There is no model 'nobody/no-such-model'.*graftwork/tiny"
    ):
        LanguageModel("nobody/no-such-model")


def test_a_folder_without_configuration_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"has no config.json, so it holds no model"):
        LanguageModel(str(tmp_path))


def test_a_folder_that_does_not_exist_is_one_sentence() -> None:
    with pytest.raises(LoadError, match=r"There is no folder '/no/such/folder/here'"):
        LanguageModel("/no/such/folder/here")


def test_a_broken_configuration_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(LoadError, match="cannot be read as a model"):
        LanguageModel(str(tmp_path))


def test_text_without_a_tokenizer_says_what_to_give(folders: dict[str, str]) -> None:
    model = LanguageModel(folders["gpt2"])
    assert model.tokenizer is None
    with pytest.raises(InputError, match=r"has no tokenizer.*tokenizer="):
        model.trace("some text")


@pytest.mark.parametrize("source", [3, None, ["gpt2"]])
def test_other_sources_are_refused(source: object) -> None:
    with pytest.raises(LoadError, match="takes a hub id, a folder or a module"):
        LanguageModel(source)


def test_loading_options_on_a_module_are_refused() -> None:
    with pytest.raises(LoadError, match="dtype only apply to a model that is loaded by name"):
        LanguageModel(gpt2(), dtype="bf16")


def test_a_plain_module_is_sent_to_model() -> None:
    with pytest.raises(LoadError, match=r"Use `Model\(module\)`"):
        LanguageModel(torch.nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_gradients_pass_through_quantized_weights(folders: dict[str, str], name: str) -> None:
    model = LanguageModel(folders["llama"], dtype=name)
    with model.trace(IDS) as tracer:
        hidden = model.model.layers[1].output
        gradient = hidden.grad.save()
        tracer.output.logits[:, -1].float().logsumexp(-1).sum().backward()
    module, kept = model.load(), {}

    def leaf(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        kept["leaf"] = output.detach().requires_grad_()
        return kept["leaf"]

    handle = module.get_submodule("model.layers.1").register_forward_hook(leaf)
    module(torch.tensor([IDS])).logits[:, -1].float().logsumexp(-1).sum().backward()
    handle.remove()
    assert kept["leaf"].grad is not None
    assert gradient.value.abs().max() > 0
    torch.testing.assert_close(gradient.value, kept["leaf"].grad)
