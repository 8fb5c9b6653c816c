"""HookedTransformer against plain forwards, hooks and gradients of transformers and torch.

Nothing here compares the class with itself, but for the form of an answer.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

from graftwork import GraftworkError, LanguageModel
from graftwork.envoy.spellings import LENS_METHODS
from graftwork.lens.activation_cache import ActivationCache
from graftwork.lens.cache import KeyValueCache
from graftwork.lens.config import ConfigError, HookedTransformerConfig
from graftwork.lens.hooked_transformer import HookedTransformer
from graftwork.tracing.errors import InputError, LoadError, UnavailableNameError


def tiny_models() -> types.ModuleType:
    """The tiny models of the tests of models."""
    path = Path(__file__).parents[1] / "models" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_models", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TINY = tiny_models()
KINDS = ["gpt2", "llama", "gpt_neox", "gemma2"]
COMMON: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 16,
    "n_ctx": 16,
    "d_head": 4,
    "d_vocab": 29,
    "act_fn": "gelu_new",
    "seed": 1,
    "device": "cpu",
}
close = functools.partial(torch.testing.assert_close, atol=2e-5, rtol=2e-5)


@functools.cache
def lens(name: str) -> HookedTransformer:
    """For tests that leave nothing behind."""
    return HookedTransformer(TINY.build(name), TINY.word_tokenizer())


def fresh(name: str) -> HookedTransformer:
    """A model of the test's own."""
    return HookedTransformer(copy.deepcopy(TINY.build(name)), TINY.word_tokenizer())


def ids_of(rows: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.stack(TINY.random_prompts(*[length] * rows, seed=seed))


def plain_logits(module: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = module(input_ids=ids, use_cache=False, **options).logits
    return found


def plain_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """−log p of each next token, [batch, pos - 1]."""
    logp = logits.double().log_softmax(-1)[:, :-1]
    return -logp.gather(-1, ids[:, 1:, None])[..., 0].to(logits.dtype)


@contextmanager
def plain_hooks(module: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    """torch's own forward hooks; `.` in a path is written `__`."""
    handles = [
        module.get_submodule(path.replace("__", ".")).register_forward_hook(function)
        for path, function in functions.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def counted(module: torch.nn.Module, *paths: str) -> Iterator[dict[str, int]]:
    """How often each submodule is called."""
    calls = dict.fromkeys(paths, 0)

    def count(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[path] += 1

        return hook

    handles = [module.get_submodule(path).register_forward_pre_hook(count(path)) for path in paths]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def blocks(name: str, module: Any) -> list[str]:
    start = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(name, "model.layers")
    return [f"{start}.{i}" for i in range(len(module.get_submodule(start)))]


@pytest.fixture(params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -------------------------------------------------------------------- construction


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "positional_embedding_type": "rotary",
            "normalization_type": "RMS",
            "gated_mlp": True,
            "act_fn": "silu",
            "n_key_value_heads": 2,
        },
        {"positional_embedding_type": "rotary"},
    ],
    ids=["gpt2", "llama", "gpt_neox"],
)
def test_a_configuration_or_a_dictionary_builds_a_model(options: dict[str, Any]) -> None:
    fields = {**COMMON, **options}
    models = [HookedTransformer(fields), HookedTransformer(HookedTransformerConfig(**fields))]
    ids = torch.arange(10).reshape(2, 5)
    for model in models:
        close(model(ids), plain_logits(model.module, ids))
        assert model.cfg.n_layers == 2 and model.cfg.d_mlp == 64 and model.cfg.n_heads == 4
        assert not model.module.training
        assert model(ids).shape == (2, 5, 29)
    assert torch.equal(models[0](ids), models[1](ids))  # by the seed
    assert not torch.equal(models[0](ids), HookedTransformer({**fields, "seed": 2})(ids))


def test_a_configuration_is_not_changed_by_the_models_made_of_it() -> None:
    cfg = HookedTransformerConfig(**{**COMMON, "d_vocab": -1})
    first = HookedTransformer(cfg, TINY.word_tokenizer(), default_prepend_bos=False)
    second = HookedTransformer(cfg, TINY.word_tokenizer())
    first.to(torch.float64)
    assert (cfg.d_vocab, cfg.dtype, cfg.default_prepend_bos) == (-1, torch.float32, True)
    assert first.cfg.dtype == torch.float64 and second.cfg.dtype == torch.float32
    assert (first.cfg.d_vocab, first.cfg.d_vocab_out) == (61, 61)
    assert not first.cfg.default_prepend_bos and second.cfg.default_prepend_bos


def test_a_vocabulary_that_nobody_says_is_refused() -> None:
    with pytest.raises(ConfigError, match="d_vocab"):
        HookedTransformer({**COMMON, "d_vocab": -1})


def test_the_tokenizer_that_a_configuration_names_is_loaded(tmp_path: Path) -> None:
    TINY.word_tokenizer().save_pretrained(tmp_path)
    model = HookedTransformer({**COMMON, "d_vocab": 61, "tokenizer_name": str(tmp_path)})
    assert model.to_tokens("w5 w6", prepend_bos=False).tolist() == [[5, 6]]
    own = HookedTransformer({**COMMON, "tokenizer_name": "nowhere"}, TINY.word_tokenizer())
    assert own.tokenizer is TINY.word_tokenizer()
    with pytest.raises(LoadError, match="tokenizer_name"):
        HookedTransformer({**COMMON, "tokenizer_name": str(tmp_path / "nothing")})


def test_default_prepend_bos_of_a_configuration_counts() -> None:
    tokenizer = TINY.word_tokenizer()
    model = HookedTransformer({**COMMON, "d_vocab": 61, "default_prepend_bos": False}, tokenizer)
    assert model.to_tokens("w5 w6").tolist() == [[5, 6]]
    bloom = HookedTransformer(TINY.build("bloom"), tokenizer)
    assert bloom.to_tokens("w5 w6").tolist() == [[5, 6]]
    named = HookedTransformer(TINY.build("bloom"), tokenizer, default_prepend_bos=True)
    assert named.to_tokens("w5 w6").tolist() == [[2, 5, 6]]


#: What TransformerLens 3.9 has for the models of its loader (`cfg.default_prepend_bos`).
PREPENDS = {
    **dict.fromkeys("gpt2 gpt_neo gptj opt llama mistral mixtral gemma gemma2".split(), True),
    **dict.fromkeys("gemma3_text phi3 olmo2 gpt_oss".split(), True),
    **dict.fromkeys("gpt_neox bloom qwen2 qwen3 phi".split(), False),
}


@pytest.mark.parametrize("kind", PREPENDS)
def test_texts_begin_as_the_architecture_has_it(kind: str) -> None:
    model = HookedTransformer(TINY.build(kind), TINY.word_tokenizer())
    front = [2] if PREPENDS[kind] else []
    assert model.cfg.default_prepend_bos is PREPENDS[kind]
    assert model.to_tokens("w5 w6").tolist() == [[*front, 5, 6]]
    assert model.to_str_tokens("w5") == [*(["<eos>"] if front else []), "w5"]
    assert model.to_tokens("w5", prepend_bos=True).tolist() == [[2, 5]]
    close(model("w5 w6 w7"), plain_logits(model.module, torch.tensor([[*front, 5, 6, 7]])))


def test_a_module_and_a_language_model_are_taken_as_they_are(name: str) -> None:
    module = TINY.build(name)
    ids = ids_of()
    for source in (module, LanguageModel(module)):
        model = HookedTransformer(source)
        assert model.module is module
        assert torch.equal(model(ids), plain_logits(module, ids))


def test_a_name_is_refused_with_the_way_to_load_it() -> None:
    with pytest.raises(LoadError, match="from_pretrained"):
        HookedTransformer("gpt2")
    with pytest.raises((LoadError, ConfigError)):
        HookedTransformer(3)
    with pytest.raises(ConfigError, match="n_layer"):
        HookedTransformer({**COMMON, "n_layer": 2})


@functools.cache
def shipped() -> Any:
    from graftwork.models.loading import folder_of

    return transformers.AutoModelForCausalLM.from_pretrained(folder_of("graftwork/tiny")).eval()


def test_the_shipped_model_loads_by_name_with_and_without_processing() -> None:
    text, module = "The Eiffel Tower is in the city of", shipped()
    raw = HookedTransformer.from_pretrained_no_processing("graftwork/tiny")
    ids = raw.to_tokens(text)
    expected = plain_logits(module, ids)
    assert torch.equal(raw(text).detach(), expected)
    done = HookedTransformer.from_pretrained("graftwork/tiny")
    close(done(text).log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=1e-4)
    close(done(text), expected - expected.mean(-1, keepdim=True), atol=1e-4, rtol=1e-4)
    assert done.W_U.mean(-1).abs().max() < 1e-6 < raw.W_U.mean(-1).abs().max()


def test_a_checkpoints_own_padding_side_is_kept(tmp_path: Path) -> None:
    TINY.build("gpt2").save_pretrained(tmp_path)
    inner = TINY.word_tokenizer().backend_tokenizer
    for side in ("left", "right"):
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side=side
        ).save_pretrained(tmp_path)
        model = HookedTransformer.from_pretrained_no_processing(str(tmp_path))
        found = model.to_tokens(["w5 w6", "w7"], prepend_bos=False)
        assert found.tolist() == [[5, 6], [7, 0] if side == "right" else [0, 7]]
        assert model.tokenizer.padding_side == side


@pytest.mark.slow
def test_a_given_module_needs_no_network_and_stays_as_it_was(name: str) -> None:
    module, tokenizer = copy.deepcopy(TINY.build(name)), TINY.word_tokenizer()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    kinds = [type(child) for child in module.modules()]
    ids = ids_of()
    expected = plain_logits(module, ids)
    assert not tokenizer.name_or_path
    model = HookedTransformer.from_pretrained(hf_model=module, tokenizer=tokenizer)
    close(model(ids).log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=1e-4)
    # The user's model: same weights, same classes, same keys, same results, no hooks.
    assert [type(child) for child in module.modules()] == kinds
    after = module.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    model.run_with_hooks(ids, fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: x * 0)])
    model.run_with_cache(ids)
    assert torch.equal(plain_logits(module, ids), expected) and TINY.count_hooks(module) == 0
    assert model.tokenizer is tokenizer


def test_a_model_that_is_not_processed_shares_the_weights() -> None:
    module = copy.deepcopy(TINY.build("gpt2"))
    model = HookedTransformer.from_pretrained_no_processing(hf_model=module)
    assert model.module is module


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_first_layers_compute_what_they_did(name: str, count: int) -> None:
    module = TINY.build(name)
    ids = ids_of()
    model = HookedTransformer.from_pretrained_no_processing(hf_model=module, first_n_layers=count)
    assert model.cfg.n_layers == count and len(model.blocks) == count
    seen = TINY.run_plainly(module, input_ids=ids, use_cache=False)
    last = TINY.tensors(seen[blocks(name, module)[count - 1], "output"])[0]
    _, cache = model.run_with_cache(ids)
    close(cache["resid_post", count - 1], last)
    assert f"blocks.{count}.hook_resid_pre" not in cache
    inner = module.get_submodule(blocks(name, module)[0].rpartition(".")[0])
    assert len(inner) == 3 and module.config.num_hidden_layers == 3  # the given one is whole
    close(plain_logits(module, ids), plain_logits(TINY.build(name), ids))
    processed = HookedTransformer.from_pretrained(hf_model=module, first_n_layers=count)
    close(processed(ids).log_softmax(-1), model(ids).log_softmax(-1), atol=1e-4, rtol=1e-4)
    text = model.generate(ids[:1], max_new_tokens=3, stop_at_eos=False, verbose=False)
    assert text.shape == (1, 10)


@pytest.mark.parametrize("count", [0, 4, -1])
def test_a_count_of_layers_that_are_not_there_is_refused(count: int) -> None:
    with pytest.raises(InputError, match="3 layers"):
        HookedTransformer.from_pretrained_no_processing(
            hf_model=TINY.build("gpt2"), first_n_layers=count
        )


def test_a_shorter_context_cuts_texts_and_refuses_ids() -> None:
    for kind in ("gpt2", "llama"):
        model = HookedTransformer.from_pretrained_no_processing(
            hf_model=TINY.build(kind), tokenizer=TINY.word_tokenizer(), n_ctx=5
        )
        assert model.cfg.n_ctx == 5
        assert model.to_tokens("w3 w4 w5 w6 w7 w8 w9").tolist() == [[2, 3, 4, 5, 6]]
        assert model(ids_of(length=5)).shape == (2, 5, 61)
        with pytest.raises(InputError, match="5"):
            model(ids_of(length=6))
        model.process_weights_()
        assert model.to_tokens("w3 w4 w5 w6 w7 w8 w9").shape == (1, 5)
    with pytest.raises(InputError, match="32"):
        HookedTransformer.from_pretrained_no_processing(hf_model=TINY.build("gpt2"), n_ctx=64)


def test_checkpoints_of_training_are_revisions_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from graftwork.lens import hooked_transformer

    class Asked(Exception):
        pass

    seen: dict[str, Any] = {}

    def ask(*_: Any, **options: Any) -> Any:
        seen.update(options)
        raise Asked

    monkeypatch.setattr(hooked_transformer, "LanguageModel", ask)
    load = HookedTransformer.from_pretrained
    for model, options, revision in (
        ("EleutherAI/pythia-70m", {"checkpoint_value": 512}, "step512"),
        ("EleutherAI/pythia-70m", {"checkpoint_label": 1000}, "step1000"),
        ("EleutherAI/pythia-70m", {"checkpoint_index": 0}, "step0"),
        ("EleutherAI/pythia-70m", {"checkpoint_index": 10}, "step512"),
        ("EleutherAI/pythia-70m", {"checkpoint_index": 11}, "step1000"),
        ("EleutherAI/pythia-70m", {"checkpoint_index": -1}, "step143000"),
        ("stanford-crfm/alias-gpt2-small-x21", {"checkpoint_value": 400}, "checkpoint-400"),
    ):
        with pytest.raises(Asked):
            load(model, **options)
        assert seen.pop("revision") == revision
    with pytest.raises(LoadError, match="not both"):
        load("EleutherAI/pythia-70m", checkpoint_label=1, checkpoint_value=1)
    with pytest.raises(LoadError, match="no checkpoints"):
        load("gpt2", checkpoint_value=1)
    with pytest.raises(LoadError, match="checkpoint_value"):
        load("stanford-crfm/alias-gpt2-small-x21", checkpoint_index=1)
    with pytest.raises(LoadError, match="checkpoint_index=154"):
        load("EleutherAI/pythia-70m", checkpoint_index=154)
    with pytest.raises(LoadError, match="name of a model"):
        load()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, "fp64", torch.bfloat16])
def test_a_model_is_loaded_in_the_dtype_that_is_asked_for(dtype: Any) -> None:
    model = HookedTransformer.from_pretrained("graftwork/tiny", dtype=dtype)
    wanted = torch.float64 if dtype == "fp64" else dtype
    assert model.cfg.dtype == wanted and model.W_E.dtype == wanted
    logits, cache = model.run_with_cache("The Eiffel Tower")
    assert logits.dtype == wanted and cache["resid_post", -1].dtype == wanted
    if wanted == torch.float64:  # processed in double precision, too
        exact = copy.deepcopy(shipped()).double()
        ids = model.to_tokens("The Eiffel Tower")
        expected = plain_logits(exact, ids).log_softmax(-1)
        close(logits.log_softmax(-1), expected, atol=1e-12, rtol=0)


@pytest.mark.slow
def test_names_of_dtypes_as_torch_spells_them() -> None:
    for given in ("float32", "float64", "torch.float64"):
        model = HookedTransformer.from_pretrained_no_processing("graftwork/tiny", dtype=given)
        assert model.cfg.dtype == getattr(torch, given.removeprefix("torch."))


def test_processing_later_keeps_hooks_flags_and_tokens() -> None:
    model, ids, calls = fresh("gpt2"), ids_of(), []
    module = model.module
    model.set_use_attn_result(True)
    model.cfg.default_prepend_bos = False
    model.add_hook("blocks.0.hook_resid_pre", lambda x, hook: calls.append(1))
    point = model.hook_dict["blocks.0.hook_resid_pre"]
    expected = plain_logits(module, ids)
    model.run_with_cache(ids)
    model.process_weights_()
    assert model.module is not module and torch.equal(plain_logits(module, ids), expected)
    calls.clear()
    close(model(ids), expected - expected.mean(-1, keepdim=True), atol=1e-4, rtol=1e-4)
    assert calls == [1] and model.hook_dict["blocks.0.hook_resid_pre"] is point
    assert model.cfg.use_attn_result and model.to_tokens("w5").tolist() == [[5]]
    model.reset_hooks()
    logits, cache = model.run_with_cache(ids)
    close(logits, expected - expected.mean(-1, keepdim=True), atol=1e-4, rtol=1e-4)
    assert "blocks.0.attn.hook_result" in cache


# -------------------------------------------------------------------- forward


def test_logits_loss_both_and_none(name: str) -> None:
    model, ids = lens(name), ids_of()
    logits = plain_logits(model.module, ids)
    losses = plain_loss(logits, ids)
    assert torch.equal(model(ids).detach(), logits)
    close(model(ids, return_type="loss"), losses.mean())
    close(model(ids, return_type="loss", loss_per_token=True), losses)
    both = model(ids, return_type="both")
    assert torch.equal(both.logits, both[0]) and both.loss is both[1]
    close(both.logits, logits)
    close(both.loss, losses.mean())
    close(model(ids, return_type="both", loss_per_token=True)[1], losses)
    assert model(ids, return_type=None) is None
    with pytest.raises(InputError, match="return_type"):
        model(ids, return_type="logit")
    hf = model.module(input_ids=ids, labels=ids).loss
    close(model(ids, return_type="loss"), hf)


def test_forms_of_ids() -> None:
    model, ids = lens("llama"), ids_of(1)
    expected = plain_logits(model.module, ids)
    for form in (ids, ids[0], ids[0].tolist(), ids.tolist(), ids.numpy(), ids.int()):
        assert torch.equal(model(form).detach(), expected)
    with pytest.raises(InputError, match="floating"):
        model(torch.randn(2, 3))
    with pytest.raises(InputError, match=r"\[batch, pos\]"):
        model(ids[None])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "own", "given"),
    [
        ("left", "right", "texts"),
        ("left", "right", "ids"),
        ("left", "right", "mask"),
        ("right", "left", "ids"),
        ("right", "right", "texts"),
        ("left", "left", "texts"),
    ],
)
def test_padding_changes_nothing_and_is_not_counted(
    name: str, side: str, own: str, given: str
) -> None:
    model = lens(name)
    module = model.module
    model = HookedTransformer(module, TINY.word_tokenizer(), default_padding_side=own)
    rows = TINY.random_prompts(3, 7, 5)
    texts = [" ".join(f"w{i}" for i in row.tolist()) for row in rows]
    tokens = model._tokens.to_tokens(texts, False, side)
    options: dict[str, Any] = {"prepend_bos": False}
    prompt: Any = tokens.ids
    if given == "texts":
        prompt, options["padding_side"] = texts, side
    if given == "mask":
        options["attention_mask"] = tokens.mask
    logits, loss = model(prompt, return_type="both", **options)
    each = model(prompt, return_type="loss", loss_per_token=True, **options)
    found, means = [], []
    for number, row in enumerate(rows):
        alone = plain_logits(module, row[None])
        real = tokens.mask[number].bool()
        close(logits[number][real], alone[0])
        losses = plain_loss(alone, row[None])[0]
        counts = real[1:] & real[:-1]
        close(each[number][counts], losses)
        assert not each[number][~counts].any()
        found.append(losses)
        means.append(losses.mean())
    close(loss, torch.cat(found).mean())
    # The same with everything cached.
    (again, again_loss), cache = model.run_with_cache(prompt, return_type="both", **options)
    close(again[tokens.mask.bool()], logits[tokens.mask.bool()])
    close(again_loss, loss)
    for number, row in enumerate(rows):
        _, alone_cache = model.run_with_cache(row[None])
        real = tokens.mask[number].bool()
        for key in ("blocks.1.hook_resid_mid", "blocks.2.attn.hook_v", "ln_final.hook_scale"):
            if key in cache:
                close(cache[key][number][real], alone_cache[key][0])
        pattern = cache["pattern", 1][number][:, real][:, :, real]
        close(pattern, alone_cache["pattern", 1][0])


def test_a_token_that_is_padding_elsewhere_counts_where_the_mask_says_so() -> None:
    model = lens("gpt2")
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 0]])
    expected = plain_logits(model.module, ids)
    full = torch.ones_like(ids)
    assert torch.equal(model(ids, attention_mask=full).detach(), expected)
    loss = model(ids, return_type="loss", attention_mask=full)
    close(loss, plain_loss(expected, ids).mean())


def test_batches_that_all_end_with_the_end_of_text() -> None:
    """Where the end is padding, too, results up to it are the model's own."""
    tokenizer = copy.deepcopy(TINY.word_tokenizer())
    tokenizer.pad_token = tokenizer.eos_token
    model = HookedTransformer(TINY.build("llama"), tokenizer)
    ids = torch.tensor([[5, 6, 7, 2], [8, 9, 10, 2]])
    expected = plain_logits(model.module, ids)
    close(model(ids)[:, :-1], expected[:, :-1])
    close(model(ids), expected)
    begin = torch.tensor([[2, 6, 7], [2, 9, 10]])
    close(model(begin), plain_logits(model.module, begin))
    _, cache = model.run_with_cache(ids)
    close(cache["unembed.hook_out"], expected)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match="attention_mask"):
        lens("gpt2")(ids_of(), attention_mask=torch.ones(2, 3))


def test_prompts_that_are_too_long_are_refused() -> None:
    for call in (lens("gpt2").forward, lens("gpt2").run_with_cache):
        with pytest.raises(InputError, match=r"33 tokens.* 32"):
            call(ids_of(length=33))


def test_arguments_of_forward_may_stand_in_their_order() -> None:
    model, ids = lens("gpt2"), ids_of()
    close(model(ids, "loss", True), plain_loss(plain_logits(model.module, ids), ids))
    loss, _ = model.run_with_cache(ids, "loss", True)
    assert loss.shape == (2, 6)
    with pytest.raises(InputError, match="return_typ"):
        model.run_with_cache(ids, return_typ="loss")
    with pytest.raises(InputError, match="twice"):
        model.run_with_cache(ids, "loss", return_type="loss")
    with pytest.raises(InputError, match="no input"):
        model.run_with_cache()
    close(model.run_with_cache(input=ids)[0], plain_logits(model.module, ids))


# -------------------------------------------------------------------- start and stop inside


def test_a_stop_gives_the_residual_stream_and_saves_the_rest(name: str) -> None:
    model, ids = lens(name), ids_of()
    module = model.module
    paths = blocks(name, module)
    seen = TINY.run_plainly(module, input_ids=ids, use_cache=False)
    for stop in range(4):
        with counted(module, *(f"{path}.mlp" for path in paths)) as calls:
            found = model(ids, stop_at_layer=stop)
        place = (paths[stop], "input") if stop < 3 else (paths[2], "output")
        close(found, TINY.tensors(seen[place])[0], atol=0, rtol=0)
        assert list(calls.values()) == [1] * stop + [0] * (3 - stop)
    for stop in (-1, -2, -3):
        assert torch.equal(model(ids, stop_at_layer=stop), model(ids, stop_at_layer=3 + stop))
    for stop in (4, -4):
        with pytest.raises(InputError, match="3 layers"):
            model(ids, stop_at_layer=stop)


def test_a_start_gives_the_same_logits_and_saves_what_is_before(name: str) -> None:
    model, ids = lens(name), ids_of()
    module = model.module
    paths = blocks(name, module)
    expected = plain_logits(module, ids)
    seen = TINY.run_plainly(module, input_ids=ids, use_cache=False)
    for start in range(4):
        place = (paths[start], "input") if start < 3 else (paths[2], "output")
        resid = TINY.tensors(seen[place])[0]
        with counted(module, *(f"{path}.mlp" for path in paths)) as calls:
            found = model(resid, start_at_layer=start)
        assert torch.equal(found.detach(), expected), start
        assert list(calls.values()) == [0] * start + [1] * (3 - start)
        loss = model(resid, start_at_layer=start, return_type="loss", tokens=ids)
        close(loss, plain_loss(expected, ids).mean())
        with pytest.raises(InputError, match="tokens"):
            model(resid, start_at_layer=start, return_type="loss")
    resid = TINY.tensors(seen[paths[1], "input"])[0]
    assert torch.equal(model(resid, start_at_layer=-2), model(resid, start_at_layer=1))
    close(
        model(resid, start_at_layer=1, stop_at_layer=2),
        TINY.tensors(seen[paths[1], "output"])[0],
    )
    assert torch.equal(model(resid, start_at_layer=1, stop_at_layer=1), resid)


def test_a_start_takes_another_residual_stream_and_its_gradient(name: str) -> None:
    """Any numbers, as those of steering or of an optimized prompt."""
    model, module = lens(name), TINY.build(name)
    torch.manual_seed(0)
    resid = torch.randn(2, 5, 16)
    reached: dict[str, torch.Tensor] = {}

    def enter(_: Any, given: tuple[Any, ...], options: Any = None) -> Any:
        return (reached["in"], *given[1:])

    block = module.get_submodule(blocks(name, module)[1])
    grads = []
    for run in ("plain", "lens"):
        leaf = resid.clone().requires_grad_()
        if run == "plain":
            reached["in"] = leaf
            handle = block.register_forward_pre_hook(enter)
            logits = module(input_ids=ids_of(2, 5), use_cache=False).logits
            handle.remove()
        else:
            logits = model(leaf, start_at_layer=1)
        (grad,) = torch.autograd.grad(logits.square().sum(), leaf)
        grads.append((logits.detach(), grad))
    close(grads[1][0], grads[0][0])
    close(grads[1][1], grads[0][1], atol=1e-3, rtol=1e-4)


def test_a_start_with_padding_sees_the_mask() -> None:
    for name in ("gpt2", "llama"):
        model = lens(name)
        rows = TINY.random_prompts(3, 6)
        ids = torch.zeros(2, 6, dtype=torch.long)
        ids[0, 3:], ids[1] = rows[0], rows[1]
        mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
        resid = model(ids, attention_mask=mask, stop_at_layer=1)
        logits = model(resid, start_at_layer=1, attention_mask=mask)
        close(logits[0, 3:], plain_logits(model.module, rows[0][None])[0])
        loss = model(resid, "loss", True, start_at_layer=1, attention_mask=mask, tokens=ids)
        assert not loss[0, :3].any() and loss[0, 3:].all()


def test_what_is_no_residual_stream_is_refused() -> None:
    model = lens("gpt2")
    for wrong in (ids_of(), torch.randn(3, 16), "w5"):
        with pytest.raises((InputError, TypeError), match=r"residual stream|w5|str"):
            model(wrong, start_at_layer=1)
    with pytest.raises(InputError, match="behind"):
        model(torch.randn(1, 3, 16), start_at_layer=2, stop_at_layer=1)


def test_caches_and_hooks_between_a_start_and_a_stop(name: str) -> None:
    model, ids = lens(name), ids_of()
    seen = TINY.run_plainly(model.module, input_ids=ids, use_cache=False)
    paths = blocks(name, model.module)
    resid = TINY.tensors(seen[paths[1], "input"])[0]
    found, cache = model.run_with_cache(resid, start_at_layer=1, stop_at_layer=2)
    assert {key.split(".")[1] for key in cache} == {"1"}
    close(cache["resid_post", 1], TINY.tensors(seen[paths[1], "output"])[0])
    close(found, cache["resid_post", 1])
    doubled = model.run_with_hooks(
        resid, start_at_layer=1, fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: 2 * x)]
    )
    close(doubled, model(2 * resid, start_at_layer=1))
    first = model.run_with_hooks(
        ids, stop_at_layer=1, fwd_hooks=[("hook_embed", lambda x, hook: x * 0)]
    )
    assert not torch.equal(first, resid)


# -------------------------------------------------------------------- keys and values


@pytest.mark.parametrize("split", [1, 3, 6])
def test_a_forward_in_parts_is_the_whole(name: str, split: int) -> None:
    model, ids = lens(name), ids_of()
    expected = plain_logits(model.module, ids)
    with torch.no_grad():
        cache = KeyValueCache.init_cache(model.cfg, model.device, 2)
        first = model(ids[:, :split], past_kv_cache=cache)
        assert cache.length == split and len(cache) == 3
        assert cache[0].past_keys.shape == (
            2,
            split,
            model.cfg.n_key_value_heads or 4,
            model.cfg.d_head,
        )
        second = model(ids[:, split:], past_kv_cache=cache)
    close(torch.cat([first, second], 1), expected)
    assert cache.length == 7


@pytest.mark.parametrize("hooked", [False, True])
def test_parts_of_padded_rows_are_the_rows(name: str, hooked: bool) -> None:
    model = lens(name)
    rows = TINY.random_prompts(4, 7)
    ids = torch.zeros(2, 7, dtype=torch.long)
    ids[0, 3:], ids[1] = rows[0], rows[1]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    calls: list[Any] = []
    hooks: list[Any] = []
    if hooked:
        hooks = [("blocks.1.hook_resid_post", lambda x, hook: calls.append(x.shape))]
    with torch.no_grad(), model.hooks(hooks):
        cache = KeyValueCache.init_cache()
        parts = [
            model(ids[:, :5], attention_mask=mask[:, :5], past_kv_cache=cache),
            model(ids[:, 5:6], past_kv_cache=cache),
            model(ids[:, 6:], past_kv_cache=cache),
        ]
    logits = torch.cat(parts, 1)
    close(logits[0, 3:], plain_logits(model.module, rows[0][None])[0])
    close(logits[1], plain_logits(model.module, rows[1][None])[0])
    assert cache.mask is not None and cache.mask.tolist() == mask.tolist()
    assert [shape[1] for shape in calls] == ([5, 1, 1] if hooked else [])


def test_a_frozen_cache_serves_many_continuations(name: str) -> None:
    model, ids = lens(name), ids_of()
    with torch.no_grad():
        cache = KeyValueCache.init_cache()
        model(ids[:, :4], past_kv_cache=cache)
        cache.freeze()
        for seed in range(3):
            tail = ids_of(length=3, seed=seed + 5)
            expected = plain_logits(model.module, torch.cat([ids[:, :4], tail], 1))[:, 4:]
            close(model(tail, past_kv_cache=cache), expected)
            found, kept = model.run_with_cache(tail, past_kv_cache=cache)
            close(found, expected)
            assert kept["pattern", 0].shape == (2, 4, 3, 7)
            assert cache.length == 4
        cache.unfreeze()
        model(ids[:, 4:], past_kv_cache=cache)
        assert cache.length == 7


def test_gradients_go_through_a_frozen_cache(name: str) -> None:
    model, ids = lens(name), ids_of()
    tail = ids_of(length=3, seed=5)
    weight = model.module.get_input_embeddings().weight
    expected = model.module(torch.cat([ids[:, :4], tail], 1)).logits[:, 4:]
    (wanted,) = torch.autograd.grad(expected.sum(), weight)
    for hooks in ([], [("blocks.1.hook_resid_post", lambda value, hook: None)]):
        cache = KeyValueCache.init_cache()
        model(ids[:, :4], past_kv_cache=cache)
        cache.freeze()
        for _ in range(2):
            with model.hooks(hooks):
                found = model(tail, past_kv_cache=cache)
            close(found, expected)
            (mine,) = torch.autograd.grad(found.sum(), weight, retain_graph=True)
            close(mine, wanted)
        assert cache.length == 4


def test_hooks_in_parts_edit_what_they_see(name: str) -> None:
    model, ids = lens(name), ids_of()
    module, path = model.module, blocks(name, model.module)[1]

    def double(_: Any, __: Any, output: Any) -> Any:
        return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

    with plain_hooks(module, **{path.replace(".", "__"): double}):
        expected = plain_logits(module, ids)
    with torch.no_grad(), model.hooks([("blocks.1.hook_resid_post", lambda x, hook: x * 2)]):
        cache = KeyValueCache.init_cache()
        parts = [model(ids[:, :4], past_kv_cache=cache), model(ids[:, 4:], past_kv_cache=cache)]
    close(torch.cat(parts, 1), expected)


# -------------------------------------------------------------------- hooks


def plain_edit(name: str, layer: int, edit: Callable[[Any], Any], ids: torch.Tensor) -> Any:
    """Logits with the output of a layer edited by torch's own hook."""
    module = TINY.build(name)

    def hook(_: Any, __: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    with plain_hooks(module, **{blocks(name, module)[layer].replace(".", "__"): hook}):
        return plain_logits(module, ids)


@pytest.mark.parametrize(
    ("kind", "first", "second", "path"),
    [
        ("bloom", "attn.hook_result", "hook_attn_out", "transformer.h.1.self_attention.dense"),
        ("gpt2", "attn.hook_result", "hook_attn_out", "transformer.h.1.attn.c_proj"),
        (
            "gemma2",
            "ln1_post.hook_normalized",
            "hook_attn_out",
            "model.layers.1.post_attention_layernorm",
        ),
        (
            "gemma2",
            "ln2_post.hook_normalized",
            "hook_mlp_out",
            "model.layers.1.post_feedforward_layernorm",
        ),
    ],
)
def test_a_sum_has_what_hooks_did_to_its_parts(
    kind: str, first: str, second: str, path: str
) -> None:
    """Also where both are at one place, as in Bloom and, of norms, in Gemma 2."""
    model, ids, calls = lens(kind), ids_of(), []
    module = model.module
    heads = "result" in first
    added = 4.0 if heads else 1 + module.get_submodule(path).weight.detach()

    def add(value: torch.Tensor, hook: Any) -> torch.Tensor:
        calls.append((hook.name, value.clone()))
        return value + 1

    with plain_hooks(module, **{path.replace(".", "__"): lambda _m, _a, output: output + added}):
        expected = plain_logits(module, ids)
    names = [f"blocks.1.{second}", f"blocks.1.{first}"]
    with torch.no_grad(), model.hooks([(names[1], add)]):
        found, kept = model.run_with_cache(ids, names_filter=names)
    close(found, expected)
    with torch.no_grad():
        plain = model.run_with_cache(ids, names_filter=names)[1]
    close(kept[names[0]], plain[names[0]] + added)
    close(kept[names[1]], plain[names[1]] + 1)
    calls.clear()
    with torch.no_grad():
        model.run_with_hooks(ids, fwd_hooks=[(names[0], add), (names[1], add)])
    assert [name for name, _ in calls] == names[::-1]
    close(calls[1][1], kept[names[0]])


def test_places_of_the_model_are_attributes() -> None:
    model, ids = fresh("gpt2"), ids_of()
    seen: list[str] = []
    for point in (model.hook_embed, model.hook_pos_embed, model.blocks[1].hook_resid_mid):
        point.add_hook(lambda value, hook: seen.append(hook.name))
    model(ids)
    assert seen == ["hook_embed", "hook_pos_embed", "blocks.1.hook_resid_mid"]
    assert model.hook_embed is model.hook_dict["hook_embed"]
    rotary = lens("llama")
    assert not hasattr(rotary, "hook_pos_embed")
    with pytest.raises(UnavailableNameError, match=r"`hook_pos_embed` does not exist .* rotary"):
        _ = rotary.hook_pos_embed
    with pytest.raises(UnavailableNameError, match=r"parallel"):
        lens("gpt_neox").add_hook("blocks.0.hook_resid_mid", print)
    with pytest.raises(UnavailableNameError, match=r"no name of a place .* `hook_embed`"):
        _ = rotary.hook_embde


def zero_second(value: torch.Tensor, hook: Any = None) -> None:
    value[:, 1] = 0


def zeroed(value: torch.Tensor, hook: Any = None) -> torch.Tensor:
    value = value.clone()
    value[:, 1] = 0
    return value


@pytest.mark.parametrize("grad", [True, False])
def test_in_place_edits_returned_values_and_none(name: str, grad: bool) -> None:
    model, ids = lens(name), ids_of()
    expected = plain_edit(name, 0, zeroed, ids)
    with torch.set_grad_enabled(grad):
        for place in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"):
            for function in (zero_second, zeroed):
                close(model.run_with_hooks(ids, fwd_hooks=[(place, function)]), expected)
        seen: list[torch.Tensor] = []
        looked = model.run_with_hooks(
            ids, fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: seen.append(x))]
        )
    assert torch.equal(looked.detach(), plain_logits(model.module, ids)) and len(seen) == 1
    assert TINY.count_hooks(model.module) == 0


def test_two_hooks_of_one_place_run_in_order() -> None:
    model, ids = lens("gpt2"), ids_of()
    place = "blocks.0.hook_resid_post"
    found = model.run_with_hooks(
        ids, fwd_hooks=[(place, lambda x, hook: x + 1), (place, lambda x, hook: x * 2)]
    )
    close(found, plain_edit("gpt2", 0, lambda x: (x + 1) * 2, ids))
    model.add_hook(place, lambda x, hook: x + 1)
    model.add_hook(place, lambda x, hook: x * 2, prepend=True)
    close(model(ids), plain_edit("gpt2", 0, lambda x: x * 2 + 1, ids))
    model.reset_hooks()


def test_two_places_that_are_one_value_are_edited_in_order() -> None:
    model, ids = lens("gpt2"), ids_of()
    for order in (1, -1):
        hooks = [
            ("blocks.0.hook_resid_post", lambda x, hook: x + 1),
            ("blocks.1.hook_resid_pre", lambda x, hook: x * 2),
        ][::order]
        found = model.run_with_hooks(ids, fwd_hooks=hooks)
        close(found, plain_edit("gpt2", 0, lambda x: (x + 1) * 2, ids))


def test_names_predicates_and_lists() -> None:
    model, ids = lens("llama"), ids_of()
    calls: list[str] = []

    def note(value: torch.Tensor, hook: Any) -> None:
        calls.append(hook.name)

    posts = [f"blocks.{i}.hook_resid_post" for i in range(3)]
    for wanted in (posts, tuple(posts), lambda name: name.endswith("resid_post")):
        calls.clear()
        model.run_with_hooks(ids, fwd_hooks=[(wanted, note)])
        assert calls == posts
    calls.clear()
    model.run_with_hooks(ids, fwd_hooks=[(lambda name: True, note)])
    # Rotated queries exist with rotary positions alone; what flags ask for is a place for hooks.
    assert set(calls) == set(model.hook_dict)


@pytest.mark.slow
def test_a_hook_is_called_once_a_run_with_real_values(name: str) -> None:
    """Names are checked with values that are none, the first time; hooks must not see these."""
    model, ids, calls = fresh(name), ids_of(), []

    def note(value: torch.Tensor, hook: Any) -> None:
        calls.append((hook.name, value.flatten()[0].item()))

    for _ in range(2):
        calls.clear()
        with model.hooks([(lambda _: True, note)]):
            model(ids)
        assert sorted(call[0] for call in calls) == sorted(model.hook_dict)


def test_hooks_are_called_in_the_order_of_the_forward(name: str) -> None:
    model, ids = lens(name), ids_of()
    calls: list[str] = []
    with model.hooks([(lambda _: True, lambda x, hook: calls.append(hook.name))]):
        model(ids)

    def place(short: str) -> int:
        return calls.index(f"blocks.1.{short}")

    chain = [
        "hook_resid_pre", "ln1.hook_normalized", "attn.hook_q", "attn.hook_attn_scores",
        "attn.hook_pattern", "attn.hook_z", "hook_attn_out",
    ]  # fmt: skip
    assert [place(one) for one in chain] == sorted(place(one) for one in chain)
    chain = [
        "ln2.hook_normalized",
        "mlp.hook_pre",
        "mlp.hook_post",
        "hook_mlp_out",
        "hook_resid_post",
    ]
    assert [place(one) for one in chain] == sorted(place(one) for one in chain)
    assert calls[0] == "hook_embed" and calls[-1] == "unembed.hook_out"


def test_a_hook_sees_what_hooks_before_it_made(name: str) -> None:
    model, ids = lens(name), ids_of()
    seen: dict[str, torch.Tensor] = {}

    def keep(value: torch.Tensor, hook: Any) -> None:
        seen[hook.name] = value.clone()

    before = "blocks.1.hook_resid_pre"
    after = [
        "blocks.1.hook_resid_post",
        *(["blocks.1.hook_resid_mid"] if name != "gpt_neox" else []),
    ]
    off = [
        ("blocks.1.hook_attn_out", lambda x, hook: x * 0),
        ("blocks.1.hook_mlp_out", lambda x, hook: x * 0),
    ]
    model.run_with_hooks(ids, fwd_hooks=[([before, *after], keep), *off])
    for place in after:  # without attention and MLP, the stream is as it was
        close(seen[place], seen[before])
    with model.hooks(off):
        _, cache = model.run_with_cache(ids)
    for place in after:
        close(cache[place], cache[before])
    assert not cache["attn_out", 1].any() and not cache["mlp_out", 1].any()


def test_edits_deep_in_attention_have_the_effect_that_torch_gives_them(name: str) -> None:
    model, ids = lens(name), ids_of()
    module = model.module
    path = blocks(name, module)[1]
    out = {"gpt2": "attn.c_proj", "gpt_neox": "attention.dense"}.get(name, "self_attn.o_proj")
    width = model.cfg.d_head

    def cut(_: Any, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        value = given[0].clone()
        value[..., 2 * width : 3 * width] = 0
        return (value,)

    handle = module.get_submodule(f"{path}.{out}").register_forward_pre_hook(cut)
    expected = plain_logits(module, ids)
    handle.remove()

    def ablate(z: torch.Tensor, hook: Any) -> None:
        z[:, :, 2] = 0

    close(model.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_z", ablate)]), expected)
    close(model.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_result", ablate)]), expected)

    def last_only(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.eye(pattern.shape[-1]).expand_as(pattern)

    def own_value(z: torch.Tensor, hook: Any) -> torch.Tensor:
        value = hook.ctx["v"]
        return value.repeat_interleave(z.shape[2] // value.shape[2], 2)

    def keep_value(v: torch.Tensor, hook: Any) -> None:
        model.hook_dict["blocks.1.attn.hook_z"].ctx["v"] = v.clone()

    diagonal = model.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_pattern", last_only)])
    values = model.run_with_hooks(
        ids,
        fwd_hooks=[("blocks.1.attn.hook_v", keep_value), ("blocks.1.attn.hook_z", own_value)],
        clear_contexts=True,
    )
    close(diagonal, values)
    assert model.hook_dict["blocks.1.attn.hook_z"].ctx == {}


def test_contexts_nest_by_level() -> None:
    model, ids = lens("gpt2"), ids_of()
    place = "blocks.0.hook_resid_post"
    raw = plain_logits(model.module, ids)
    one = plain_edit("gpt2", 0, lambda x: x + 1, ids)
    two = plain_edit("gpt2", 0, lambda x: (x + 1) * 2, ids)
    with model.hooks([(place, lambda x, hook: x + 1)]) as same:
        assert same is model
        close(model(ids), one)
        with model.hooks([(place, lambda x, hook: x * 2)]):
            close(model(ids), two)
            close(model.run_with_hooks(ids, fwd_hooks=[(place, lambda x, hook: x * 0.5)]), one)
            close(model(ids), two)
        close(model(ids), one)
        model.add_hook(place, lambda x, hook: x * 2)
    close(model(ids), plain_edit("gpt2", 0, lambda x: x * 2, ids))  # what add_hook added stays
    model.reset_hooks()
    assert torch.equal(model(ids).detach(), raw)
    assert model.list_hooks() == {}


def test_hooks_that_stay_after_their_context() -> None:
    model, ids = fresh("gpt2"), ids_of()
    place = "blocks.0.hook_resid_post"
    doubled = plain_edit("gpt2", 0, lambda x: x * 2, ids)
    model.run_with_hooks(ids, fwd_hooks=[(place, lambda x, hook: x * 2)], reset_hooks_end=False)
    close(model(ids), doubled)
    model.reset_hooks()
    assert torch.equal(model(ids), model(ids)) and not model.list_hooks()


def test_permanent_hooks_survive_resets_alone() -> None:
    model, ids = fresh("gpt2"), ids_of()
    place = "blocks.0.hook_resid_post"
    model.add_perma_hook(place, lambda x, hook: x * 2)
    model.add_hook(place, lambda x, hook: x + 1)
    assert list(model.list_hooks()) == [place] and len(model.list_hooks()[place]) == 2
    model.reset_hooks()
    close(model(ids), plain_edit("gpt2", 0, lambda x: x * 2, ids))
    assert model.list_hooks(including_permanent=False) == {}
    model.reset_hooks(including_permanent=True)
    close(model(ids), plain_logits(model.module, ids))
    model.hook_dict[place].add_hook(lambda x, hook: x * 2, is_permanent=True)
    model.remove_all_hook_fns(including_permanent=True)
    close(model(ids), plain_logits(model.module, ids))


def test_resets_by_direction_and_contexts() -> None:
    model = fresh("gpt2")
    place = "blocks.0.hook_resid_post"
    model.add_hook(place, lambda x, hook: None)
    model.add_hook(place, lambda x, hook: None, dir="bwd")
    model.hook_dict[place].ctx["a"] = 1
    model.reset_hooks(direction="bwd", clear_contexts=False)
    assert [one.direction for one in model.list_hooks()[place]] == ["fwd"]
    assert model.hook_dict[place].ctx == {"a": 1}
    model.clear_contexts()
    assert model.hook_dict[place].ctx == {}
    with pytest.raises(InputError, match="dir"):
        model.add_hook(place, lambda x, hook: None, dir="back")


def test_points_tell_where_they_are() -> None:
    model, ids = lens("gpt2"), ids_of()
    seen: list[Any] = []

    def look(value: torch.Tensor, hook: Any) -> None:
        hook.ctx["count"] = hook.ctx.get("count", 0) + 1
        seen.append((hook.name, hook.layer(), hook.ctx["count"]))

    for _ in range(2):
        model.run_with_hooks(ids, fwd_hooks=[("blocks.2.attn.hook_q", look)])
    assert seen == [("blocks.2.attn.hook_q", 2, 1), ("blocks.2.attn.hook_q", 2, 2)]
    model.clear_contexts()
    with pytest.raises(InputError, match="no layer"):
        model.hook_dict["hook_embed"].layer()
    assert model.blocks[2].attn.hook_q is model.hook_dict["blocks.2.attn.hook_q"]


def test_an_error_in_a_hook_leaves_no_hook_behind(name: str) -> None:
    model, ids = lens(name), ids_of()

    def fail(value: torch.Tensor, hook: Any) -> None:
        raise KeyError("mine")

    for call in (
        lambda: model.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_z", fail)]),
        lambda: model.run_with_hooks(
            ids, fwd_hooks=[("blocks.1.attn.hook_z", fail)], past_kv_cache=KeyValueCache()
        ),
    ):
        with pytest.raises(KeyError, match="mine"):
            call()
        assert model.list_hooks() == {} and TINY.count_hooks(model.module) == 0
        assert torch.equal(model(ids).detach(), plain_logits(model.module, ids))
    with pytest.raises(ValueError, match="outside"):
        with model.hooks([("blocks.1.attn.hook_z", fail)]):
            raise ValueError("outside")
    assert model.list_hooks() == {}
    with model.hooks([("blocks.1.attn.hook_z", lambda x, hook: None)]):
        assert [one.level for one in model.list_hooks()["blocks.1.attn.hook_z"]] == [1]


def test_unknown_names_and_empty_filters_are_refused_with_near_names() -> None:
    model, ids = lens("gpt2"), ids_of()
    nothing = lambda x, hook: None  # noqa: E731
    for wrong in ("blocks.0.hook_resid_pst", ["hook_embed", "blocks.0.hook_resid_pst"]):
        for call in (
            lambda w=wrong: model.add_hook(w, nothing),
            lambda w=wrong: model.run_with_hooks(ids, fwd_hooks=[(w, nothing)]),
            lambda w=wrong: model.run_with_hooks(ids, bwd_hooks=[(w, nothing)]),
            lambda w=wrong: model.run_with_cache(ids, names_filter=w),
        ):
            with pytest.raises(UnavailableNameError, match="hook_resid_post"):
                call()
    for call in (
        lambda: model.add_hook(lambda name: False, nothing),
        lambda: model.run_with_hooks(ids, fwd_hooks=[(lambda name: False, nothing)]),
        lambda: model.run_with_cache(ids, names_filter=lambda name: "blocks.7" in name),
    ):
        with pytest.raises(UnavailableNameError, match="none of"):
            call()
    with pytest.raises(InputError, match="filter"):
        model.add_hook(3, nothing)
    assert model.list_hooks() == {}
    with pytest.raises(UnavailableNameError):
        model.run_with_hooks(
            ids, fwd_hooks=[("hook_embed", nothing), ("blocks.9.hook_resid_pre", nothing)]
        )
    assert model.list_hooks() == {}


def test_a_value_of_another_shape_is_the_users_error() -> None:
    model, ids = lens("gpt2"), ids_of()
    with pytest.raises((GraftworkError, RuntimeError)):
        model.run_with_hooks(
            ids, fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: x[..., :-1])]
        )
    assert model.list_hooks() == {} and TINY.count_hooks(model.module) == 0
    close(model(ids), plain_logits(model.module, ids))


# -------------------------------------------------------------------- gradients


def plain_gradients(name: str, module: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Gradients of the mean loss: of each layer's output and of all parameters."""
    kept: dict[str, Any] = {}
    paths = blocks(name, module)

    def keep(index: int) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            value.retain_grad()
            kept[f"blocks.{index}.hook_resid_post"] = value

        return hook

    functions = {path.replace(".", "__"): keep(i) for i, path in enumerate(paths)}
    with plain_hooks(module, **functions):
        logits = module(input_ids=ids, use_cache=False).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return {key: value.grad for key, value in kept.items()}


def test_hooks_of_gradients_see_what_autograd_computes(name: str) -> None:
    ids = ids_of()
    reference = copy.deepcopy(TINY.build(name))
    expected = plain_gradients(name, reference, ids)
    model, seen = fresh(name), {}

    def keep(gradient: torch.Tensor, hook: Any) -> None:
        seen[hook.name] = gradient.clone()

    with model.hooks(bwd_hooks=[(list(expected), keep)]):
        model(ids, return_type="loss").backward()
    assert set(seen) == set(expected)
    for key, value in expected.items():
        close(seen[key], value)
    theirs = dict(reference.named_parameters())
    for key, parameter in model.module.named_parameters():
        close(parameter.grad, theirs[key].grad)


def test_hooks_of_gradients_of_frozen_models() -> None:
    ids, model, seen = ids_of(), fresh("gpt2"), {}
    expected = plain_gradients("gpt2", copy.deepcopy(TINY.build("gpt2")), ids)
    model.module.requires_grad_(False)

    def keep(gradient: torch.Tensor, hook: Any) -> None:
        seen[hook.name] = gradient.clone()

    with model.hooks(bwd_hooks=[(list(expected), keep)]):
        model(ids, return_type="loss").backward()
    for key, value in expected.items():
        close(seen[key], value)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_a_replaced_gradient_reaches_earlier_parameters(name: str, as_tuple: bool) -> None:
    ids = ids_of()
    reference = copy.deepcopy(TINY.build(name))
    path = blocks(name, reference)[1]

    def triple(_: Any, __: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        value.register_hook(lambda g: 3 * g)

    with plain_hooks(reference, **{path.replace(".", "__"): triple}):
        logits = reference(input_ids=ids, use_cache=False).logits
    functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    model = fresh(name)

    def replace(gradient: torch.Tensor, hook: Any) -> Any:
        return (3 * gradient,) if as_tuple else 3 * gradient

    with model.hooks(bwd_hooks=[("blocks.1.hook_resid_post", replace)]):
        model(ids, return_type="loss").backward()
    theirs = dict(reference.named_parameters())
    for key, parameter in model.module.named_parameters():
        close(parameter.grad, theirs[key].grad)


def test_forward_and_backward_hooks_at_one_place() -> None:
    ids, model, seen = ids_of(), fresh("gpt2"), []
    place = "blocks.1.hook_resid_post"
    with model.hooks(
        [(place, lambda x, hook: x * 2)], [(place, lambda g, hook: seen.append(g.clone()))]
    ):
        model(ids, return_type="loss").backward()
    reference = copy.deepcopy(TINY.build("gpt2"))
    kept: list[torch.Tensor] = []

    def hook(_: Any, __: Any, output: Any) -> Any:
        doubled = output * 2
        doubled.retain_grad()
        kept.append(doubled)
        return doubled

    with plain_hooks(reference, transformer__h__1=hook):
        logits = reference(input_ids=ids, use_cache=False).logits
    functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    close(seen[0], kept[0].grad)
    close(model.module.transformer.wte.weight.grad, reference.transformer.wte.weight.grad)


def test_a_cache_with_gradients_has_those_of_autograd(name: str) -> None:
    ids, model = ids_of(), fresh(name)
    expected = plain_gradients(name, copy.deepcopy(TINY.build(name)), ids)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            loss, cache = model.run_with_cache(ids, return_type="loss", incl_bwd=True)
        close(loss, plain_loss(plain_logits(model.module, ids), ids).mean())
        for key, value in expected.items():
            close(cache[f"{key}_grad"], value)
            assert not cache[f"{key}_grad"].requires_grad
        for key in list(cache):
            if not key.endswith("_grad"):
                assert cache[f"{key}_grad"].shape == cache[key].shape, key
    _, plain = model.run_with_cache(ids)
    for key in plain:
        close(cache[key], plain[key])


def test_gradients_with_a_filter_and_positions() -> None:
    ids, model = ids_of(), fresh("gpt2")
    expected = plain_gradients("gpt2", copy.deepcopy(TINY.build("gpt2")), ids)
    place = "blocks.1.hook_resid_post"
    _, cache = model.run_with_cache(
        ids, return_type="loss", incl_bwd=True, names_filter=place, pos_slice=(2, 4)
    )
    assert list(cache) == [place, f"{place}_grad"]
    close(cache[f"{place}_grad"], expected[place][:, 2:4])
    with pytest.raises(InputError, match="incl_bwd"):
        model.run_with_cache(ids, incl_bwd=True)
    assert model.list_hooks() == {}


def test_gradients_of_a_mixture_of_experts_leave_out_its_indices() -> None:
    ids, model = ids_of(), fresh("mixtral")
    _, cache = model.run_with_cache(ids, return_type="loss", incl_bwd=True)
    expected = plain_gradients("mixtral", copy.deepcopy(TINY.build("mixtral")), ids)
    for key, value in expected.items():
        close(cache[f"{key}_grad"], value)
    assert "blocks.0.mlp.hook_expert_indices" in cache
    assert "blocks.0.mlp.hook_expert_indices_grad" not in cache


@pytest.mark.slow
@pytest.mark.parametrize("hooked", [False, True])
def test_training_moves_parameters_as_plain_torch_does(name: str, hooked: bool) -> None:
    ids = ids_of(4, 6)
    reference, model = copy.deepcopy(TINY.build(name)), fresh(name)
    ours = torch.optim.SGD(model.parameters(), lr=0.05)
    theirs = torch.optim.SGD(reference.parameters(), lr=0.05)
    hooks: list[Any] = [("blocks.0.hook_resid_post", lambda x, hook: None)] if hooked else []
    for _ in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        with model.hooks(hooks):
            model(ids, return_type="loss").backward()
        logits = reference(input_ids=ids, use_cache=False).logits
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        ours.step()
        theirs.step()
    other = dict(reference.named_parameters())
    for key, parameter in model.module.named_parameters():
        close(parameter, other[key], atol=1e-4, rtol=1e-4)
    close(model.run_with_cache(ids)[0], plain_logits(reference, ids), atol=1e-3, rtol=1e-3)
    _, cache = model.run_with_cache(ids)
    close(cache["unembed.hook_out"], plain_logits(model.module, ids)) if name != "gemma2" else None


def test_a_forward_follows_grad_mode() -> None:
    model, ids = lens("llama"), ids_of()
    for run in (lambda: model(ids), lambda: model.run_with_cache(ids)[0]):
        for _ in range(2):  # recorded, then remembered
            with torch.no_grad():
                assert not run().requires_grad
            with torch.enable_grad():
                assert run().requires_grad
            with torch.inference_mode():
                run()
            with torch.enable_grad():
                run().square().sum().backward()
    model.module.zero_grad()
    _, cache = model.run_with_cache(ids)
    assert not any(value.requires_grad for value in cache.values())


# -------------------------------------------------------------------- caches


def attention(scores: torch.Tensor, window: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal scores and pattern, [batch, head, query, key]."""
    n = scores.shape[-1]
    query, key = torch.arange(n)[:, None], torch.arange(n)[None]
    seen = key <= query
    if window is not None:
        seen = seen & (key > query - window)
    scores = scores.masked_fill(~seen, -torch.inf)
    return scores, scores.softmax(-1)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[batch, pos, head, d_head] with the first channels turned, halves as pairs."""
    size = cos.shape[-1]
    turn, rest = x[..., :size], x[..., size:]
    half = torch.cat([-turn[..., size // 2 :], turn[..., : size // 2]], -1)
    return torch.cat([turn * cos[:, :, None] + half * sin[:, :, None], rest], -1)


def normed(found: dict[str, Any], at: str, x: torch.Tensor, eps: float, mean: bool) -> None:
    x = x - x.mean(-1, keepdim=True) if mean else x
    scale = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    found[f"{at}.hook_scale"], found[f"{at}.hook_normalized"] = scale, x / scale


def expected_cache(name: str, module: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every value of every name, from plain hooks and formulas."""
    seen, config = TINY.run_plainly(module, input_ids=ids, use_cache=False), module.config
    found: dict[str, torch.Tensor] = {}

    def at(path: str, port: str = "output") -> torch.Tensor:
        value: torch.Tensor = TINY.tensors(seen[path, port])[0]
        return value

    def heads(value: torch.Tensor, count: int) -> torch.Tensor:
        return value.reshape(*value.shape[:2], count, -1)

    layers = blocks(name, module)
    kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    count, mean = config.num_attention_heads, name in ("gpt2", "gpt_neox")
    eps = {"gpt2": "layer_norm_epsilon", "gpt_neox": "layer_norm_eps"}.get(name, "rms_norm_eps")
    eps = getattr(config, eps)
    found["hook_embed"] = at(layers[0], "input")
    if name == "gpt2":
        found["hook_embed"] = at("transformer.wte")
        found["hook_pos_embed"] = at("transformer.wpe").expand(ids.shape[0], -1, -1)
    for i, layer in enumerate(layers):
        b = f"blocks.{i}."
        found[f"{b}hook_resid_pre"] = at(layer, "input")
        found[f"{b}hook_resid_post"] = at(layer)
        if name == "gpt2":
            q, k, v = (heads(x, count) for x in at(f"{layer}.attn.c_attn").split(16, -1))
            names = ("ln_1", "ln_2", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "mlp")
        elif name == "gpt_neox":
            q, k, v = heads(at(f"{layer}.attention.query_key_value"), count).chunk(3, -1)
            names = (
                "input_layernorm", "post_attention_layernorm", "attention.dense",
                "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp",
            )  # fmt: skip
        else:
            q, k, v = (
                heads(at(f"{layer}.self_attn.{one}_proj"), n)
                for one, n in (("q", count), ("k", kv), ("v", kv))
            )
            second = "pre_feedforward_layernorm" if name == "gemma2" else "post_attention_layernorm"
            names = (
                "input_layernorm", second, "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "mlp",
            )  # fmt: skip
            found[f"{b}mlp.hook_pre_linear"] = at(f"{layer}.mlp.up_proj")
        ln1, ln2, out, pre, post, mlp = (f"{layer}.{one}" for one in names)
        if name != "gpt_neox":  # whose blocks are parallel
            found[f"{b}hook_resid_mid"] = at(ln2, "input")
        found[f"{b}hook_attn_out"], found[f"{b}hook_mlp_out"] = at(out), at(mlp)
        found[f"{b}mlp.hook_pre"], found[f"{b}mlp.hook_post"] = at(pre), at(post, "input")
        normed(found, f"{b}ln1", at(ln1, "input"), eps, mean)
        normed(found, f"{b}ln2", at(ln2, "input"), eps, mean)
        if name == "gemma2":
            after = (f"{layer}.post_attention_layernorm", f"{layer}.post_feedforward_layernorm")
            normed(found, f"{b}ln1_post", at(after[0], "input"), eps, mean)
            normed(found, f"{b}ln2_post", at(after[1], "input"), eps, mean)
            found[f"{b}hook_attn_out"], found[f"{b}hook_mlp_out"] = at(after[0]), at(after[1])
        found[f"{b}attn.hook_q"], found[f"{b}attn.hook_k"], found[f"{b}attn.hook_v"] = q, k, v
        if name != "gpt2":
            rotary = "gpt_neox.rotary_emb" if name == "gpt_neox" else "model.rotary_emb"
            cos, sin = seen[rotary, "output"]
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
            found[f"{b}attn.hook_rot_q"], found[f"{b}attn.hook_rot_k"] = q, k
        k, v = (x.repeat_interleave(count // kv, 2) for x in (k, v))
        size = config.query_pre_attn_scalar if name == "gemma2" else q.shape[-1]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / size**0.5
        window = None
        if name == "gemma2":
            cap = config.attn_logit_softcapping
            scores = cap * torch.tanh(scores / cap)
            sliding = config.layer_types[i] == "sliding_attention"
            window = config.sliding_window if sliding else None
        scores, pattern = attention(scores, window)
        found[f"{b}attn.hook_attn_scores"], found[f"{b}attn.hook_pattern"] = scores, pattern
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
        close(z, heads(at(out, "input"), count), atol=1e-4, rtol=1e-4)  # the formulas are right
        found[f"{b}attn.hook_z"] = z
    final = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}.get(
        name, "model.norm"
    )
    normed(found, "ln_final", at(final, "input"), eps, mean)
    head = "embed_out" if name == "gpt_neox" and ("embed_out", "output") in seen else "lm_head"
    found["unembed.hook_in"], found["unembed.hook_out"] = at(head, "input"), at(head)
    return found


def test_every_value_of_every_name(name: str) -> None:
    model, ids = lens(name), ids_of()
    expected = expected_cache(name, model.module, ids)
    logits, cache = model.run_with_cache(ids)
    assert isinstance(cache, ActivationCache)
    assert set(cache) == set(expected)
    for key, value in expected.items():
        close(cache[key], value, atol=1e-4, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
        assert not cache[key].requires_grad
    close(logits, plain_logits(model.module, ids))


def test_every_value_of_padded_rows_is_that_of_the_row_alone(name: str) -> None:
    model = lens(name)
    rows = TINY.random_prompts(4, 7)
    ids = torch.zeros(2, 7, dtype=torch.long)
    ids[0, 3:], ids[1] = rows[0], rows[1]
    _, cache = model.run_with_cache(ids)
    for number, row in enumerate(rows):
        gap = 7 - len(row)
        for key, value in expected_cache(name, model.module, row[None]).items():
            found = cache[key][number]
            square = key.endswith(("scores", "pattern"))
            found = found[:, gap:, gap:] if square else found[gap:]
            close(found, value[0], atol=1e-4, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.slow
def test_values_that_flags_ask_for() -> None:
    for name in ("gpt2", "llama"):
        model, ids = fresh(name), ids_of()
        module, layer = model.module, blocks(name, model.module)[1]
        gated = ["attn.hook_result", "hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in"]
        gated = [f"blocks.1.{one}" for one in gated]
        _, cache = model.run_with_cache(ids)
        assert not set(gated) & set(cache)
        _, named = model.run_with_cache(ids, names_filter=gated)
        assert set(named) == set(gated)
        model.set_use_attn_result(True)
        model.set_use_split_qkv_input(True)
        model.set_use_hook_mlp_in(True)
        _, cache = model.run_with_cache(ids)
        assert set(gated) <= set(cache)
        seen = TINY.run_plainly(module, input_ids=ids, use_cache=False)
        out = "attn.c_proj" if name == "gpt2" else "self_attn.o_proj"
        weight = module.get_submodule(f"{layer}.{out}").weight
        weight = weight if name == "gpt2" else weight.T  # [head d_head, d_model]
        z = seen[f"{layer}.{out}", "input"].reshape(2, 7, 4, 4)
        result = torch.einsum("bphe,hed->bphd", z, weight.reshape(4, 4, 16))
        close(cache["result", 1], result)
        close(named["blocks.1.attn.hook_result"], result)
        resid = TINY.tensors(seen[layer, "input"])[0]
        for one, count in (("q", 4), ("k", model.cfg.n_key_value_heads or 4)):
            value = cache[f"blocks.1.hook_{one}_input"]
            close(value, resid[:, :, None].expand(2, 7, count, 16))
        close(cache["blocks.1.hook_mlp_in"], cache["resid_mid", 1])
        with pytest.raises(UnavailableNameError, match="hook_q_input"):
            model.set_use_attn_in(True)
        with pytest.raises(UnavailableNameError, match="group"):
            model.set_ungroup_grouped_query_attention(True)


def test_forms_of_filters() -> None:
    model, ids = lens("gpt2"), ids_of()
    _, whole = model.run_with_cache(ids)
    place, other = "blocks.0.hook_resid_post", "blocks.1.attn.hook_z"
    for wanted, names in 2 * (
        (place, [place]),
        ([place, other], [place, other]),
        ([other, place, other], [place, other]),
        (lambda name: name.endswith("hook_z"), [f"blocks.{i}.attn.hook_z" for i in range(3)]),
        ([lambda name: name == other, place], [place, other]),
    ):
        _, cache = model.run_with_cache(ids, names_filter=wanted)
        assert set(cache) == set(names)
        for key in cache:
            close(cache[key], whole[key])
    logits, empty = model.run_with_cache(ids, names_filter=[])
    assert len(empty) == 0 and torch.equal(logits.detach(), plain_logits(model.module, ids))


def test_forms_of_caches() -> None:
    model, ids = lens("gpt2"), ids_of(1)
    _, cache = model.run_with_cache(ids, device="cpu", return_cache_object=False)
    assert isinstance(cache, dict)
    _, flat = model.run_with_cache(ids, remove_batch_dim=True)
    _, plain = model.run_with_cache(ids, remove_batch_dim=True, return_cache_object=False)
    for key, value in cache.items():
        assert torch.equal(flat[key], value[0]) and torch.equal(plain[key], value[0])
    assert not flat.has_batch_dim
    _, meta = model.run_with_cache(ids, device="meta")
    assert {value.device.type for value in meta.values()} == {"meta"}
    for as_object in (True, False):
        with pytest.raises((GraftworkError, AssertionError), match=r"batch|2"):
            model.run_with_cache(ids_of(2), remove_batch_dim=True, return_cache_object=as_object)


@pytest.mark.slow
@pytest.mark.parametrize("given", [0, 3, -1, (2,), (1, 4), (0, 7, 2), [0, 5], slice(2, 5)])
def test_positions_of_a_cache(name: str, given: Any) -> None:
    model, ids = lens(name), ids_of()
    model_all = {**expected_cache(name, model.module, ids)}
    index: Any = slice(*given) if isinstance(given, tuple) else given
    if isinstance(given, int):
        index = [given]  # the dimension stays
    for _ in range(2):
        _, cache = model.run_with_cache(ids, pos_slice=given)
        assert set(cache) == set(model_all)
        for key, value in model_all.items():
            axis = 2 if key.endswith(("scores", "pattern")) else 1
            rows = value[:, :, index] if axis == 2 else value[:, index]
            close(cache[key], rows, atol=1e-4, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


def test_positions_given_as_an_array_or_tensor_are_not_mixed_up() -> None:
    """A remembered form must know which positions it was made for."""
    model, ids = lens("gpt2"), ids_of(1, 20)
    place = "blocks.0.hook_resid_post"
    _, whole = model.run_with_cache(ids, names_filter=place)
    for positions in ([0, 1], [2, 3], [0, 1], list(range(0, 20, 2)), list(range(1, 20, 2))):
        for make in (list, np.array, torch.tensor):
            _, cache = model.run_with_cache(ids, names_filter=place, pos_slice=make(positions))
            assert torch.equal(cache[place], whole[place][:, positions])


def test_a_cached_value_is_not_changed_by_hooks_behind_it(name: str) -> None:
    model, ids = lens(name), ids_of()
    expected = expected_cache(name, model.module, ids)

    def wipe(value: torch.Tensor, hook: Any) -> None:
        value[:] = 0

    # One tensor in the model stands at both places.
    with model.hooks([("blocks.1.hook_resid_pre", wipe)]):
        _, cache = model.run_with_cache(ids)
    close(cache["blocks.0.hook_resid_post"], expected["blocks.0.hook_resid_post"])
    assert not cache["blocks.1.hook_resid_pre"].any()
    with model.hooks([("ln_final.hook_normalized", wipe)]):
        _, cache = model.run_with_cache(ids)
    for key in expected:
        if not key.startswith(("ln_final", "unembed")):
            close(cache[key], expected[key], atol=1e-4, rtol=1e-4)


def test_what_was_returned_is_not_changed_by_later_runs() -> None:
    model, ids = lens("gpt2"), ids_of()
    logits, cache = model.run_with_cache(ids)
    before = {key: value.clone() for key, value in cache.items()}
    kept = logits.clone()
    for seed in range(3):
        model.run_with_cache(ids_of(seed=seed + 1))
    assert all(torch.equal(before[key], cache[key]) for key in before)
    assert torch.equal(kept, logits)
    cache["blocks.0.hook_resid_post"].zero_()  # the user's own
    again, other = model.run_with_cache(ids)
    assert torch.equal(again, kept)
    assert torch.equal(other["blocks.0.hook_resid_post"], before["blocks.0.hook_resid_post"])


def test_hooks_act_inside_a_cached_run() -> None:
    model, ids = lens("llama"), ids_of()
    expected = plain_edit("llama", 0, lambda x: x * 2, ids)
    raw = plain_logits(model.module, ids)
    model.run_with_cache(ids)
    with model.hooks([("blocks.0.hook_resid_post", lambda x, hook: x * 2)]):
        logits, cache = model.run_with_cache(ids)
        close(logits, expected)
    again, plain = model.run_with_cache(ids)
    close(again, raw)
    close(cache["blocks.0.hook_resid_post"], 2 * plain["blocks.0.hook_resid_post"])
    model.add_hook("blocks.0.hook_resid_post", lambda x, hook: x * 2)
    close(model.run_with_cache(ids)[0], expected)
    model.reset_hooks()
    close(model.run_with_cache(ids)[0], raw)


# -------------------------------------------------------------------- remembered forms


@pytest.mark.slow
def test_repeated_runs_are_of_their_own_prompt(name: str) -> None:
    model = lens(name)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for seed, (rows, length) in enumerate(
                [(2, 7), (2, 7), (2, 4), (1, 7), (2, 7), (3, 9), (1, 1), (2, 7), (7, 2)]
            ):
                ids = ids_of(rows, length, seed)
                seen = TINY.run_plainly(model.module, input_ids=ids, use_cache=False)
                logits, cache = model.run_with_cache(ids)
                close(logits, plain_logits(model.module, ids))
                for i, path in enumerate(blocks(name, model.module)):
                    close(cache["resid_post", i], TINY.tensors(seen[path, "output"])[0])
                assert cache["pattern", 1].shape == (rows, 4, length, length)


def test_repeated_runs_with_and_without_padding(name: str) -> None:
    model = lens(name)
    row = TINY.random_prompts(4)[0]
    alone = plain_logits(model.module, row[None])[0]
    left, right = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    full = ids_of(2, 7, seed=3)
    left[0], left[1, 3:] = full[0], row
    right[0], right[1, :4] = full[0], row
    shorter = left.clone()
    shorter[0, 0] = 0
    for _ in range(2):
        close(model.run_with_cache(full)[0], plain_logits(model.module, full))
        close(model.run_with_cache(left)[0][1, 3:], alone)
        close(model.run_with_cache(right)[0][1, :4], alone)
        close(model.run_with_cache(shorter)[0][1, 3:], alone)
        close(model.run_with_cache(shorter)[0][0, 1:], plain_logits(model.module, full[:1, 1:])[0])


@pytest.mark.slow
def test_remembered_forms_follow_the_weights() -> None:
    model, ids = fresh("llama"), ids_of()
    module = model.module

    def check() -> None:
        for _ in range(2):
            logits, cache = model.run_with_cache(ids)
            close(logits, plain_logits(module, ids), atol=1e-4, rtol=1e-4)
            seen = TINY.run_plainly(module, input_ids=ids, use_cache=False)
            close(
                cache["resid_post", 2], TINY.tensors(seen["model.layers.2", "output"])[0],
                atol=1e-4, rtol=1e-4,
            )  # fmt: skip
            assert cache["resid_post", 2].dtype == logits.dtype
            result = model.run_with_cache(ids, names_filter="blocks.1.attn.hook_result")[1]
            weight = module.model.layers[1].self_attn.o_proj.weight.T.reshape(4, 4, 16)
            z = cache["z", 1]
            close(
                result["result", 1], torch.einsum("bphe,hed->bphd", z, weight), atol=1e-4, rtol=1e-4
            )

    check()
    with torch.no_grad():
        module.model.layers[1].mlp.up_proj.weight.mul_(1.5)  # in place
        module.model.layers[1].self_attn.o_proj.weight.add_(0.1)
    check()
    new = torch.nn.Parameter(torch.randn(16, 24))
    module.model.layers[0].mlp.down_proj.weight = new  # another parameter
    check()
    model.blocks[1].attn.W_O = torch.randn(4, 4, 16)  # by its name
    check()
    module.load_state_dict(TINY.build("llama").state_dict())
    check()
    model.to(torch.float64)
    assert model.cfg.dtype == torch.float64
    check()
    module.float()  # behind our back
    check()
    module.model.layers[1].mlp = copy.deepcopy(module.model.layers[0].mlp)  # another module
    check()


def test_remembered_forms_follow_hooks_of_torch_and_train_mode() -> None:
    model, ids = fresh("gpt2"), ids_of()
    module = model.module
    place = "blocks.1.hook_resid_post"
    raw = model.run_with_cache(ids, names_filter=place)[0]
    with plain_hooks(module, transformer__h__0=lambda m, i, o: o * 2):
        expected = plain_logits(module, ids)
        close(model.run_with_cache(ids, names_filter=place)[0], expected)
    assert not torch.allclose(raw, expected)
    model.train()
    assert module.training
    torch.manual_seed(0)
    one = model.run_with_cache(ids, names_filter=place)[0]
    two = model.run_with_cache(ids, names_filter=place)[0]
    assert not torch.equal(one, two)  # dropout
    model.eval()
    assert torch.equal(model.run_with_cache(ids, names_filter=place)[0], raw)


def test_remembered_forms_follow_lasting_edits() -> None:
    model, ids = fresh("gpt2"), ids_of()
    raw = plain_logits(model.module, ids)
    place = "blocks.2.hook_resid_post"
    close(model.run_with_cache(ids, names_filter=place)[0], raw)
    with model.model.edit(inplace=True):
        model.model.transformer.h[0].output = model.model.transformer.h[0].output * 2
    expected = plain_edit("gpt2", 0, lambda x: x * 2, ids)
    for _ in range(2):
        close(model(ids), expected)
        close(model.run_with_cache(ids, names_filter=place)[0], expected)
    model.model.clear_edits()
    for _ in range(2):
        close(model(ids), raw)
        close(model.run_with_cache(ids, names_filter=place)[0], raw)


def test_repeated_runs_that_stop_inside(name: str) -> None:
    model, ids = lens(name), ids_of()
    seen = TINY.run_plainly(model.module, input_ids=ids, use_cache=False)
    path = blocks(name, model.module)[1]
    resid = TINY.tensors(seen[path, "input"])[0]
    for _ in range(3):
        found, cache = model.run_with_cache(ids, stop_at_layer=1)
        close(found, resid)
        assert {key.split(".")[1] for key in cache if key.startswith("blocks")} == {"0"}
        assert not any(key.startswith(("ln_final", "unembed")) for key in cache)
        close(cache["resid_post", 0], resid)
        found, cache = model.run_with_cache(
            ids,
            stop_at_layer=1,
            names_filter=["blocks.2.hook_resid_pre", "blocks.0.hook_resid_post"],
        )
        assert list(cache) == ["blocks.0.hook_resid_post"]
        close(cache["resid_post", 0], resid)


def test_many_forms_in_turn() -> None:
    """More of them than are remembered."""
    model, ids = lens("gpt2"), ids_of()
    _, whole = model.run_with_cache(ids)
    names = list(whole)
    for _ in range(2):
        for start in range(12):
            wanted = names[start : start + 3]
            _, cache = model.run_with_cache(ids, names_filter=wanted, pos_slice=start % 5)
            assert set(cache) == set(wanted)
            for key in wanted:
                axis = 2 if key.endswith(("scores", "pattern")) else 1
                close(cache[key], whole[key].narrow(axis, start % 5, 1))


@pytest.mark.slow
def test_threads_get_their_own_values() -> None:
    model = lens("llama")
    wrong: list[Any] = []
    prompts = [ids_of(2, 3 + number % 4, seed=number) for number in range(8)]
    expected = [expected_cache("llama", model.module, ids) for ids in prompts]
    keys = list(expected[0])

    def work(number: int) -> None:
        try:
            for turn in range(12):
                wanted = None if turn % 3 == 0 else keys[turn :: 7 + number]
                with torch.set_grad_enabled(turn % 2 == 0):
                    _, cache = model.run_with_cache(prompts[number], names_filter=wanted)
                for key in cache:
                    close(cache[key], expected[number][key], atol=1e-4, rtol=1e-4)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong, wrong[0]


# -------------------------------------------------------------------- the rest of the surface


def test_names_of_modules_weights_and_points(name: str) -> None:
    model = lens(name)
    assert len(model.blocks) == 3 and len(list(model.blocks)) == 3
    assert model.blocks[-1].hook_resid_post is model.hook_dict["blocks.2.hook_resid_post"]
    assert model.blocks[1].attn.W_Q.shape == (4, 16, model.cfg.d_head)
    assert torch.equal(model.W_Q[1], model.blocks[1].attn.W_Q)
    assert torch.equal(model.embed.W_E, model.W_E) and torch.equal(model.unembed.W_U, model.W_U)
    head = model.module.get_output_embeddings().weight
    assert torch.equal(model.W_U, head.T) and model.W_U.shape == (16, 61)
    assert [point.name for point in model.hook_points()] == list(model.hook_dict)
    with pytest.raises(UnavailableNameError, match="3 layers"):
        model.blocks[3]
    with pytest.raises(AttributeError):
        model.blocks[0].attn.W_Z
    with pytest.raises(AttributeError):
        model.nothing
    assert not hasattr(model, "W_nothing")


def test_the_model_moves_with_its_configuration() -> None:
    model = fresh("gpt2")
    assert model.to(torch.float64) is model and model.cfg.dtype == torch.float64
    assert model(ids_of()).dtype == torch.float64
    assert model.to("cpu").cfg.device == "cpu" == model.cpu().cfg.device
    for method, dtype in (
        (model.float, torch.float32),
        (model.half, torch.float16),
        (model.bfloat16, torch.bfloat16),
        (model.double, torch.float64),
    ):
        assert method() is model and model.cfg.dtype == model.W_E.dtype == dtype
    assert model.requires_grad_(False) is model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.eval() is model and model.train() is model and model.module.training
    assert "HookedTransformer" in repr(model)


def test_parts_of_the_model_can_be_called(name: str) -> None:
    """The logit lens of many notebooks: `model.unembed(model.ln_final(resid))`."""
    model, ids = lens(name), ids_of()
    module = model.module
    seen = TINY.run_plainly(module, input_ids=ids, use_cache=False)
    paths = blocks(name, module)
    resid = TINY.tensors(seen[paths[2], "output"])[0]
    head = next(path for path in ("lm_head", "embed_out") if (path, "output") in seen)
    close(model.unembed(model.ln_final(resid)), seen[head, "output"])
    if name != "gpt2":  # which adds positions
        close(model.embed(ids), TINY.tensors(seen[paths[0], "input"])[0])
    for index, path in enumerate(paths):
        found = model.blocks[index](TINY.tensors(seen[path, "input"])[0])
        close(found, TINY.tensors(seen[path, "output"])[0])
    with pytest.raises(InputError, match="cannot be called"):
        model.blocks[0].attn(resid)


def test_lost_and_unknown_options_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "graftwork"):
        HookedTransformer.from_pretrained(hf_model=TINY.build("gpt2"), dtype=torch.float64)
    assert "own dtype" in caplog.text


def test_the_state_of_random_numbers_is_left_alone() -> None:
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    HookedTransformer(COMMON)
    lens("gpt2").run_with_cache(ids_of())
    assert torch.equal(torch.rand(1), first)


# -------------------------------------------------------------------- TransformerLens itself

PEER = importlib.util.find_spec("transformer_lens")


@pytest.mark.skipif(PEER is None, reason="transformer-lens 3.9 is not installed")
def test_peer_has_the_same_names_and_values() -> None:
    import transformer_lens

    theirs = transformer_lens.HookedTransformer(transformer_lens.HookedTransformerConfig(**COMMON))
    ours = HookedTransformer(COMMON)
    for layer in range(2):
        for key in "W_Q W_K W_V W_O b_Q b_K b_V b_O".split():
            value = getattr(theirs.blocks[layer].attn, key).detach()
            setattr(ours.blocks[layer].attn, key, value)
        for key in "W_in b_in W_out b_out".split():
            setattr(ours.blocks[layer].mlp, key, getattr(theirs.blocks[layer].mlp, key).detach())
    ours.embed.W_E = theirs.embed.W_E.detach()
    ours.pos_embed.W_pos = theirs.pos_embed.W_pos.detach()
    ours.unembed.W_U = theirs.unembed.W_U.detach()
    ids = torch.arange(12).reshape(2, 6)
    mine, cache = ours.run_with_cache(ids)
    logits, expected = theirs.run_with_cache(ids)
    close(mine, logits, atol=1e-4, rtol=1e-4)
    common = set(cache) & set(expected)
    assert len(common) > 30
    for key in common:
        close(cache[key], expected[key], atol=1e-4, rtol=1e-4)


def test_what_a_model_says_of_these_names_is_true() -> None:
    lens = HookedTransformer(LanguageModel("graftwork/tiny"))
    has_not = {"W_gate"}  # of its MLPs, which are not gated
    for name in set(LENS_METHODS) - has_not:
        assert hasattr(lens, name), name
