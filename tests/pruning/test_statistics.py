"""Statistics of neurons, against numpy and plain hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork import LanguageModel
from graftwork.pruning import Statistics, TokenBatch, collect, load_documents, token_batches
from graftwork.pruning.errors import PruningError
from graftwork.pruning.statistics import _CHUNK

FIELDS = ("mean", "squares", "roots", "positive", "negative", "active")


def check(found: Statistics, values: np.ndarray, rtol: float = 1e-7) -> None:
    """Against values [token, neuron] in numpy's float64."""
    x = values.astype(np.float64)
    scale = np.abs(x).max(initial=1e-30)
    expected = {
        "mean": x.mean(0),
        "std": x.std(0),
        "rms": np.sqrt((x**2).mean(0)),
        "sqrt": np.sqrt(np.abs(x)).mean(0),
        "positive_mass": np.maximum(x, 0).mean(0),
        "negative_mass": np.minimum(x, 0).mean(0),
        "mass": np.abs(x).mean(0),
        "frequency": (x > 0).mean(0),
    }
    assert found.count == len(x)
    for name, value in expected.items():
        np.testing.assert_allclose(
            getattr(found, name), value, rtol=rtol, atol=rtol * scale, err_msg=name
        )


@pytest.mark.parametrize("tokens", [1, 2, 300, _CHUNK // 64 + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_statistics_are_those_of_numpy(tokens: int, dtype: torch.dtype) -> None:
    values = torch.randn(tokens, 64, dtype=torch.float64).to(dtype) * 3 + 1
    rtol = 1e-12 if dtype == torch.float64 else 1e-7
    check(Statistics.of(values), values.double().numpy(), rtol)


def test_a_small_spread_about_a_large_mean_is_kept() -> None:
    values = torch.randn(5000, 8, dtype=torch.float64) * 1e-3 + 1e6
    found = Statistics.of(values)
    np.testing.assert_allclose(found.std, values.numpy().std(0), rtol=1e-6)


def test_neurons_of_one_sign_have_no_mass_of_the_other() -> None:
    values = torch.rand(500, 8) + 0.1
    assert not Statistics.of(values).negative.any()
    assert not Statistics.of(-values).positive.any()
    assert Statistics.of(-values).frequency.sum() == 0


def test_no_tokens_count_nothing() -> None:
    nothing, some = Statistics.of(torch.zeros(0, 3)), Statistics.of(torch.randn(4, 3))
    assert nothing.count == 0 and not nothing.std.any()
    for one in (nothing.merge(some), some.merge(nothing)):
        assert one.count == 4
        torch.testing.assert_close(one.std, some.std)
    assert nothing.merge(nothing).count == 0


numbers = st.floats(-1e3, 1e3, allow_nan=False, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=40), st.data())
def test_merged_parts_are_the_whole(rows: list[tuple[float, float]], data: Any) -> None:
    values = torch.tensor(rows, dtype=torch.float64)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    parts = [Statistics.of(part) for part in torch.tensor_split(values, cuts)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    check(merged, values.numpy(), 1e-9)
    back = parts[-1]
    for part in reversed(parts[:-1]):
        back = part.merge(back)
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(merged, name), getattr(back, name), rtol=1e-9, atol=1e-6, msg=name
        )


# ------------------------------------------------------------------------------ on models

SIZE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 1,
}
GROUPED = {**SIZE, "num_key_value_heads": 2, "head_dim": 8}
GPT = {"vocab_size": 61, "n_positions": 40, "n_embd": 16, "n_layer": 2, "n_head": 4}
#: Class of the model, its configuration, and what goes into its down projection and its `W_O`.
MODELS: dict[str, tuple[Any, Any, str, str]] = {
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(**GPT, bos_token_id=None, eos_token_id=None, pad_token_id=1),
        "transformer.h.{}.mlp.c_proj",
        "transformer.h.{}.attn.c_proj",
    ),
    "opt": (
        transformers.OPTForCausalLM,
        transformers.OPTConfig(**SIZE, ffn_dim=24, word_embed_proj_dim=16),
        "model.decoder.layers.{}.fc2",
        "model.decoder.layers.{}.self_attn.out_proj",
    ),
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**GROUPED),
        "model.layers.{}.mlp.down_proj",
        "model.layers.{}.self_attn.o_proj",
    ),
    "gpt_neox": (
        transformers.GPTNeoXForCausalLM,
        transformers.GPTNeoXConfig(**SIZE),
        "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "gpt_neox.layers.{}.attention.dense",
    ),
    "gemma": (
        transformers.GemmaForCausalLM,
        transformers.GemmaConfig(**GROUPED),
        "model.layers.{}.mlp.down_proj",
        "model.layers.{}.self_attn.o_proj",
    ),
    "roberta": (
        transformers.RobertaForMaskedLM,
        transformers.RobertaConfig(**SIZE),
        "roberta.encoder.layer.{}.output.dense",
        "roberta.encoder.layer.{}.attention.output.dense",
    ),
}


def build(name: str) -> tuple[Any, LanguageModel]:
    torch.manual_seed(0)
    kind, config, _, _ = MODELS[name]
    module = kind(config).eval()
    return module, LanguageModel(module)


def batches(lengths: list[list[int]]) -> list[TokenBatch]:
    """Random tokens, rows of these lengths, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for rows in lengths:
        ids = torch.full((len(rows), max(rows)), 1)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for number, length in enumerate(rows):
            ids[number, -length:] = torch.randint(5, 60, (length,), generator=generator)
            mask[number, -length:] = True
        found.append(TokenBatch(ids, mask, mask.clone()))
    return found


@torch.no_grad()
def inputs_of(module: Any, paths: list[str], data: list[TokenBatch]) -> list[np.ndarray]:
    """What arrives at modules, [token, channel], each row run alone without padding."""
    kept: list[list[torch.Tensor]] = [[] for _ in paths]
    handles = [
        module.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, rows=rows: rows.append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for path, rows in zip(paths, kept, strict=True)
    ]
    for batch in data:
        for ids, mask in zip(batch.ids, batch.mask, strict=True):
            own = ids[mask][None]
            module(input_ids=own, attention_mask=torch.ones_like(own))
    for handle in handles:
        handle.remove()
    return [torch.cat(rows).numpy() for rows in kept]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_collected_are_the_statistics_of_plain_hooks(name: str) -> None:
    module, model = build(name)
    data = batches([[9, 9], [7, 3], [12], [8, 8], [5, 2]])
    found = collect(model, data)
    _, _, mlp, attn = MODELS[name]
    assert found.mlp is not None and found.attn is not None
    for kind, path in ((found.mlp, mlp), (found.attn, attn)):
        expected = inputs_of(module, [path.format(0), path.format(1)], data)
        for layer, values in enumerate(expected):
            rows = {field: getattr(kind, field)[layer] for field in FIELDS}
            check(Statistics(kind.count, **rows), values, 1e-4)
    assert found.mlp.count == sum(batch.tokens for batch in data) == 63


def test_one_kind_alone_and_the_same_as_with_the_other() -> None:
    _, model = build("gpt2")
    data = batches([[6, 4], [5, 5]])
    both, mlp, attn = collect(model, data), collect(model, data, attn=False), None
    attn = collect(model, data, mlp=False)
    assert mlp.attn is None and attn.mlp is None
    assert both.mlp and both.attn and mlp.mlp and attn.attn
    torch.testing.assert_close(both.mlp.mean, mlp.mlp.mean)
    torch.testing.assert_close(both.attn.mean, attn.attn.mean)
    assert both.attn.mean.shape == (2, 16)
    with pytest.raises(PruningError, match="nothing to collect"):
        collect(model, data, mlp=False, attn=False)
    with pytest.raises(PruningError, match="has no tokens"):
        collect(model, [])


def test_data_in_two_parts_merge_to_the_whole() -> None:
    _, model = build("gpt2")
    data = batches([[6, 4], [5, 5], [9]])
    whole, parts = collect(model, data), collect(model, data[:1]).merge(collect(model, data[1:]))
    assert whole.mlp and parts.mlp
    for name in FIELDS:
        torch.testing.assert_close(getattr(whole.mlp, name), getattr(parts.mlp, name))


def test_batches_are_not_kept() -> None:
    model = LanguageModel("graftwork/tiny")
    alive = 0

    def stream() -> Any:
        nonlocal alive
        for batch in token_batches(model, load_documents("tiny/young"), batch_tokens=64):
            alive += 1
            yield batch

    found = collect(model, stream(), attn=False)
    assert found.mlp is not None and alive > 5
    assert found.mlp.mean.shape == (4, 512) and found.mlp.mean.dtype == torch.float64
