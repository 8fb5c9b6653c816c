"""One weight from the files of a checkpoint: the same numbers as the loaded model's, and few bytes."""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from graftwork import LanguageModel
from graftwork.models import checkpoint_files
from graftwork.models.checkpoint_weights import read_weight
from graftwork.tracing.errors import InputError, LoadError, UnavailableNameError

_DECODER: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GPT: dict[str, Any] = {
    "vocab_size": 61,
    "n_positions": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_FALCON = {k: v for k, v in _DECODER.items() if k not in ("intermediate_size", "pad_token_id")}
_BERT = {k: v for k, v in _DECODER.items() if k not in ("bos_token_id", "eos_token_id")}
_T5: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "llama_tied": ("LlamaConfig", "LlamaForCausalLM", {**_GROUPED, "tie_word_embeddings": True}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _DECODER),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_GROUPED, "head_dim": 8}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _GROUPED),
    "bloom": ("BloomConfig", "BloomForCausalLM", {k: v for k, v in _GPT.items() if k[0] != "n"}),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "opt": ("OPTConfig", "OPTForCausalLM", {**_DECODER, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "mamba": ("MambaConfig", "MambaForCausalLM", {**_DECODER, "state_size": 4}),
    "bert": ("BertConfig", "BertForMaskedLM", _BERT),
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5),
}
MODELS["bloom"][2].update(hidden_size=16, n_layer=2, n_head=4)
MODELS["opt"][2].update(pad_token_id=1)
MODELS["opt"][2].pop("intermediate_size", None)


def build(kind: str, **changes: Any) -> torch.nn.Module:
    """A tiny model whose parameters are all different."""
    config, model, options = MODELS[kind]
    torch.manual_seed(0)
    module = getattr(transformers, model)(
        getattr(transformers, config)(**{**options, **changes})
    ).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module  # type: ignore[no-any-return]


def save(module: Any, folder: Path, **options: Any) -> Path:
    module.save_pretrained(folder, **options)
    return folder


def every(model: LanguageModel) -> Iterator[tuple[int | None, str]]:
    """Layer and name of all weights."""
    vocabulary = model._model_names()
    yield from ((None, name) for name in vocabulary.model_weights())
    for layer in range(len(vocabulary)):
        yield from ((layer, name) for name in vocabulary.layer_weights(layer))


def loaded_weight(model: LanguageModel, layer: int | None, name: str) -> torch.Tensor:
    names = model._model_names()
    weights = names.model_weights() if layer is None else names.layer_weights(layer)
    return weights[name]


def assert_all_equal(folder: Path, **options: Any) -> None:
    lazy, loaded = LanguageModel(str(folder), **options), LanguageModel(str(folder), **options)
    loaded.load()
    names = list(every(loaded))
    assert len(names) > 10
    assert names == list(every(lazy))
    for layer, name in names:
        found, wanted = read_weight(lazy, layer, name), loaded_weight(loaded, layer, name)
        assert found.dtype == wanted.dtype, (layer, name)
        assert torch.equal(found, wanted), (layer, name)
        assert not found.requires_grad
    assert not lazy.loaded


# -------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("shard", ["1GB", "5KB"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_every_weight_is_that_of_the_loaded_model(tmp_path: Path, kind: str, shard: str) -> None:
    save(build(kind), tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "5KB")
    assert_all_equal(tmp_path)


def test_weights_are_those_of_the_module_by_formula(tmp_path: Path) -> None:
    module: Any = build("gpt2")
    model = LanguageModel(str(save(module, tmp_path)))
    attn = module.transformer.h[1].attn
    for third, name in enumerate("QKV"):
        columns = attn.c_attn.weight[:, 16 * third : 16 * (third + 1)]
        by_head = torch.stack([columns[:, 4 * head : 4 * head + 4] for head in range(4)])
        assert torch.equal(read_weight(model, 1, f"attn.W_{name}"), by_head)
    rows = torch.stack([attn.c_proj.weight[4 * head : 4 * head + 4] for head in range(4)])
    assert torch.equal(read_weight(model, 1, "attn.W_O"), rows)
    assert torch.equal(read_weight(model, None, "unembed.W_U"), module.transformer.wte.weight.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_half_precision_is_kept(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    save(build(kind).to(dtype), tmp_path)
    assert_all_equal(tmp_path)
    assert read_weight(LanguageModel(str(tmp_path)), 0, "attn.W_Q").dtype == dtype


@pytest.mark.parametrize("kind", ["gpt_neox", "t5"])
def test_a_dtype_that_is_asked_for_is_given(tmp_path: Path, kind: str) -> None:
    save(build(kind), tmp_path)
    assert_all_equal(tmp_path, dtype="fp16")
    assert (
        read_weight(LanguageModel(str(tmp_path), dtype="fp16"), 0, "attn.W_Q").dtype == torch.half
    )


def test_files_without_a_dtype_in_the_configuration_keep_theirs(tmp_path: Path) -> None:
    save(build("llama").to(torch.bfloat16), tmp_path)
    edit_config(tmp_path, dtype=None)
    assert_all_equal(tmp_path)


def test_names_without_the_prefix_of_the_base_model_are_found(tmp_path: Path) -> None:
    module: Any = build("gpt2")
    save(module.transformer, tmp_path)
    edit_config(tmp_path, architectures=["GPT2LMHeadModel"])
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as handle:
        assert "wte.weight" in handle.keys()  # noqa: SIM118
    assert_all_equal(tmp_path)


def test_older_names_that_transformers_knows_are_found(tmp_path: Path) -> None:
    save(build("bert"), tmp_path)
    rewrite(tmp_path, lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma"))
    assert_all_equal(tmp_path)


def test_a_tied_weight_is_found_under_either_name(tmp_path: Path) -> None:
    module: Any = build("llama_tied")
    save(module, tmp_path)
    model = LanguageModel(str(tmp_path))
    assert torch.equal(read_weight(model, None, "unembed.W_U"), module.lm_head.weight.T)
    rewrite(tmp_path, lambda name: name.replace("model.embed_tokens.weight", "lm_head.weight"))
    assert torch.equal(read_weight(model, None, "embed.W_E"), module.lm_head.weight)
    assert not model.loaded


def test_variants_and_subfolders_are_read(tmp_path: Path) -> None:
    save(build("llama"), tmp_path / "inner", variant="half", max_shard_size="5KB")
    assert (tmp_path / "inner" / "model.safetensors.index.half.json").exists()
    assert_all_equal(tmp_path / "inner", variant="half")
    save(build("llama"), tmp_path / "single", variant="half")
    assert_all_equal(tmp_path / "single", variant="half")


@pytest.mark.parametrize("shard", ["1GB", "5KB"])
def test_checkpoints_of_the_hub_are_read_from_its_cache(tmp_path: Path, shard: str) -> None:
    stored = tmp_path / "models--someone--llama"
    save(build("llama"), stored / "snapshots" / "0123456", max_shard_size=shard)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("0123456")
    model = LanguageModel("someone/llama", cache_dir=str(tmp_path), local_files_only=True)
    found = read_weight(model, 1, "attn.W_K")
    assert not model.loaded
    assert torch.equal(found, loaded_weight(model, 1, "attn.W_K"))
    assert model.loaded


def test_a_loaded_model_gives_its_own_memory(tmp_path: Path) -> None:
    model = LanguageModel(str(save(build("gpt_neox"), tmp_path)))
    module: Any = model.load()
    parameter = module.gpt_neox.layers[0].attention.query_key_value.weight
    found = read_weight(model, 0, "attn.W_K")
    assert found.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()


def test_a_module_without_a_checkpoint_gives_its_own_memory() -> None:
    module: Any = build("llama")
    found = read_weight(LanguageModel(module), None, "embed.W_E")
    assert found.data_ptr() == module.model.embed_tokens.weight.data_ptr()


def test_what_is_read_is_not_the_file(tmp_path: Path) -> None:
    model = LanguageModel(str(save(build("gpt2"), tmp_path)))
    for layer, name in ((None, "embed.W_E"), (0, "attn.W_Q"), (0, "attn.b_Q")):
        before = read_weight(model, layer, name)
        kept = before.clone()
        before.zero_()
        assert torch.equal(read_weight(model, layer, name), kept)


def test_older_safetensors_that_always_map_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def always_maps(path: str, framework: str) -> Any:
        return safetensors.safe_open(path, framework)

    monkeypatch.setattr(checkpoint_files, "safe_open", always_maps)
    assert_all_equal(save(build("gpt_neox"), tmp_path))


# -------------------------------------------------------------------- loading instead


def test_other_formats_are_loaded_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module: Any = build("llama")
    save(module, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    model = LanguageModel(str(tmp_path))
    with caplog.at_level(logging.WARNING, "graftwork"):
        found = read_weight(model, 1, "mlp.W_in")
    assert torch.equal(found, module.model.layers[1].mlp.up_proj.weight.T)
    assert model.loaded
    assert "reading `mlp.W_in` loads the whole of" in caplog.text
    assert "no safetensors files" in caplog.text


def test_merged_weights_are_loaded_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    MODELS["mixtral"] = (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1},
    )
    module: Any = build("mixtral")
    model = LanguageModel(str(save(module, tmp_path)))
    read_weight(model, 0, "attn.W_Q")
    read_weight(model, 0, "mlp.router.W")
    assert not model.loaded
    with caplog.at_level(logging.WARNING, "graftwork"):
        found = read_weight(model, 0, "mlp.experts.W_out")
    assert torch.equal(found, module.model.layers[0].mlp.experts.down_proj.transpose(1, 2))
    assert model.loaded
    assert "converts" in caplog.text


@pytest.mark.slow
def test_weights_that_are_quantized_while_loading_are_loaded_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("bitsandbytes")
    save(build("llama", hidden_size=64), tmp_path)
    model, loaded = (LanguageModel(str(tmp_path), dtype="nf4") for _ in range(2))
    loaded.load()
    with caplog.at_level(logging.WARNING, "graftwork"):
        found = read_weight(model, 0, "mlp.W_in")
    assert torch.equal(found, loaded_weight(loaded, 0, "mlp.W_in"))
    assert model.loaded
    assert "made from them" in caplog.text


# -------------------------------------------------------------------- errors


@pytest.fixture
def llama(tmp_path: Path) -> LanguageModel:
    return LanguageModel(str(save(build("llama"), tmp_path, max_shard_size="5KB")))


def test_an_unknown_weight_is_refused_with_near_names(llama: LanguageModel) -> None:
    with pytest.raises(UnavailableNameError, match=r"no weight of LlamaForCausalLM.*attn\.W_Q"):
        read_weight(llama, 0, "attn.W_QQ")
    with pytest.raises(UnavailableNameError, match="no weight of"):
        read_weight(llama, None, "unembedding")
    assert not llama.loaded


def test_a_bias_that_the_model_does_not_have_is_refused(llama: LanguageModel) -> None:
    with pytest.raises(UnavailableNameError, match=r"`attn\.b_Q` does not exist"):
        read_weight(llama, 0, "attn.b_Q")
    assert not llama.loaded


@pytest.mark.parametrize("layer", [2, -1, True])
def test_a_layer_that_does_not_exist_is_refused(llama: LanguageModel, layer: int) -> None:
    with pytest.raises(UnavailableNameError, match="there are 2 layers"):
        read_weight(llama, layer, "attn.W_Q")


def test_a_weight_of_a_layer_without_a_layer_is_refused(llama: LanguageModel) -> None:
    with pytest.raises(InputError, match=r"`attn\.W_Q` is in every layer: give one, 0 to 1"):
        read_weight(llama, None, "attn.W_Q")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    model = LanguageModel(str(save(build("llama"), tmp_path, max_shard_size="5KB")))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shard = index["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / shard).unlink()
    with pytest.raises(LoadError, match=f"no file '{shard}'.*incomplete"):
        read_weight(model, 1, "mlp.W_in")


def test_a_tensor_that_is_not_stored_is_named(tmp_path: Path) -> None:
    model = LanguageModel(str(save(build("llama"), tmp_path)))
    rewrite(tmp_path, lambda name: None if "layers.1.mlp.up" in name else name)
    with pytest.raises(LoadError, match=r"no tensor for `model\.layers\.1\.mlp\.up_proj\.weight`"):
        read_weight(model, 1, "mlp.W_in")


def test_a_shape_that_does_not_fit_is_named(tmp_path: Path) -> None:
    save(build("llama"), tmp_path)
    edit_config(tmp_path, intermediate_size=32)
    with pytest.raises(LoadError, match=r"\[24, 16\].*by the configuration it is \[32, 16\]"):
        read_weight(LanguageModel(str(tmp_path)), 1, "mlp.W_in")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    model = LanguageModel(str(save(build("llama"), tmp_path)))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoadError, match=r"model\.safetensors \(\d+ bytes\) cannot be read"):
        read_weight(model, 0, "attn.W_Q")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(LoadError, match="no index of weights"):
        read_weight(model, 0, "attn.W_Q")


# -------------------------------------------------------------------- few bytes


class CountingSlice:
    def __init__(self, of: Any, counter: list[int]) -> None:
        self._of, self._counter = of, counter

    def get_shape(self) -> list[int]:
        return self._of.get_shape()  # type: ignore[no-any-return]

    def __getitem__(self, index: Any) -> torch.Tensor:
        found: torch.Tensor = self._of[index]
        self._counter.append(found.numel())
        return found


class CountingFile:
    """An opened file that counts the numbers that are taken from it."""

    def __init__(self, of: Any, counter: list[int]) -> None:
        self._of, self._counter = of, counter

    def __enter__(self) -> CountingFile:
        self._of.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._of.__exit__(*args)

    def keys(self) -> list[str]:
        return self._of.keys()  # type: ignore[no-any-return]

    def get_slice(self, key: str) -> CountingSlice:
        return CountingSlice(self._of.get_slice(key), self._counter)

    def get_tensor(self, key: str) -> torch.Tensor:
        found: torch.Tensor = self._of.get_tensor(key)
        self._counter.append(found.numel())
        return found


@pytest.mark.parametrize("kind", list(MODELS))
def test_no_numbers_but_those_of_the_weight_are_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter: list[int] = []
    monkeypatch.setattr(
        checkpoint_files,
        "safe_open",
        lambda *args, **options: CountingFile(safetensors.safe_open(*args, **options), counter),
    )
    model = LanguageModel(str(save(build(kind), tmp_path, max_shard_size="5KB")))
    for layer, name in every(model):
        counter.clear()
        found = read_weight(model, layer, name)
        # Queries of Falcon's groups are apart in their module: it is read whole.
        fused = 2 if kind == "falcon" and name == "attn.W_Q" else 1
        assert sum(counter) == fused * found.numel(), (layer, name)


HIDDEN, INNER, LAYERS, VOCABULARY = 8192, 28672, 80, 128256


def tensors_of_70b() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        for name in ("q", "o"):
            yield f"{block}.self_attn.{name}_proj.weight", (HIDDEN, HIDDEN)
        for name in ("k", "v"):
            yield f"{block}.self_attn.{name}_proj.weight", (1024, HIDDEN)
        for name in ("gate", "up"):
            yield f"{block}.mlp.{name}_proj.weight", (INNER, HIDDEN)
        yield f"{block}.mlp.down_proj.weight", (HIDDEN, INNER)
        for name in ("input", "post_attention"):
            yield f"{block}.{name}_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def sparse_checkpoint(folder: Path, tensors: Any, shard_size: float) -> None:
    """A sharded bf16 checkpoint of zeros that takes no space on the disk."""
    shards: list[dict[str, Any]] = []
    used = shard_size
    for name, shape in tensors:
        size = 2 * torch.Size(shape).numel()
        if used + size > shard_size:
            shards.append({})
            used = 0
        shards[-1][name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [int(used), int(used) + size],
        }
        used += size
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        header = json.dumps(shard).encode()
        header += b" " * (-len(header) % 8)
        with open(folder / file, "wb") as handle:
            handle.write(struct.pack("<Q", len(header)) + header)
            last = max(one["data_offsets"][1] for one in shard.values())
            handle.truncate(8 + len(header) + last)
    index = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def bytes_read() -> int:
    """What this process has read so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts the bytes")
def test_a_weight_of_70b_is_read_without_the_other_140_gb(tmp_path: Path) -> None:
    transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype="bfloat16",
        bos_token_id=None,
        eos_token_id=None,
    ).save_pretrained(tmp_path)
    try:
        sparse_checkpoint(tmp_path, tensors_of_70b(), 5e9)
    except OSError as error:
        pytest.skip(f"this file system has no sparse files of 5 GB: {error}")
    stored = list(tmp_path.glob("*.safetensors"))
    assert sum(one.stat().st_size for one in stored) > 141e9
    assert sum(one.stat().st_blocks for one in stored) * 512 < 1e6
    model = LanguageModel(str(tmp_path))
    before = bytes_read()
    found = read_weight(model, 40, "attn.W_K")
    ratio = (bytes_read() - before) / found.nbytes
    assert found.shape == (8, HIDDEN, 128)
    assert found.dtype == torch.bfloat16
    assert 1 <= ratio <= 1.1
    assert not model.loaded


# -------------------------------------------------------------------- changed files


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder: Path, rename: Any) -> None:
    """Store the tensors under other names; None leaves one out."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    renamed = {rename(name): tensor.clone() for name, tensor in tensors.items()}
    renamed.pop(None, None)
    os.unlink(path)
    safetensors.torch.save_file(renamed, path, {"format": "pt"})
