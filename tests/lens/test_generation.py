"""Generation against that of transformers, and against plain forwards one token at a time."""

from __future__ import annotations

import functools
import importlib.util
import logging
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

from graftwork.lens.cache import KeyValueCache
from graftwork.lens.hooked_transformer import HookedTransformer
from graftwork.tracing.errors import InputError


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
GREEDY: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False}
TEXTS = ["w5 w6 w7", "w9", "w10 w11 w12 w13 w14"]
EOS = 2


@functools.cache
def lens(name: str) -> HookedTransformer:
    return HookedTransformer(TINY.build(name), TINY.word_tokenizer())


@pytest.fixture(params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ids_of(rows: int = 2, length: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.stack(TINY.random_prompts(*[length] * rows, seed=seed))


def logits_at_end(module: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = module(input_ids=ids, use_cache=False).logits[:, -1]
    return found


Choose = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def by_hand(module: Any, ids: torch.Tensor, new: int, choose: Choose | None = None) -> torch.Tensor:
    """One plain forward a token; `choose` takes logits and ids so far."""
    for _ in range(new):
        logits = logits_at_end(module, ids)
        token = logits.argmax(-1) if choose is None else choose(logits, ids)
        ids = torch.cat([ids, token[:, None]], 1)
    return ids


# -------------------------------------------------------------------- greedy


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_is_that_of_transformers(name: str, use_cache: bool) -> None:
    model, ids = lens(name), ids_of()
    theirs = model.module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    found = model.generate(ids, 6, use_past_kv_cache=use_cache, **GREEDY)
    assert torch.equal(found, theirs) and torch.equal(found, by_hand(model.module, ids, 6))
    assert not found.requires_grad


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_of_a_batch_are_as_alone(name: str, use_cache: bool) -> None:
    model, tokenizer = lens(name), TINY.word_tokenizer()
    alone = []
    for text in TEXTS:
        first = [EOS] if model.cfg.default_prepend_bos else []
        ids = torch.tensor([[*first, *tokenizer(text)["input_ids"]]])
        whole = by_hand(model.module, ids, 5)
        alone.append(tokenizer.decode(whole[0, len(first) :]))
        one = model.generate(text, 5, return_type="tokens", use_past_kv_cache=use_cache, **GREEDY)
        assert torch.equal(one, whole)
    together = model.generate(TEXTS, 5, use_past_kv_cache=use_cache, **GREEDY)
    assert together == alone
    assert [model.generate(text, 5, **GREEDY) for text in TEXTS] == alone
    # As ids, padded on the left, with a tokenizer that pads on the right.
    padded = model.to_tokens(TEXTS, padding_side="left")
    assert model.tokenizer.padding_side == "right"
    found = model.generate(padded, 5, use_past_kv_cache=use_cache, **GREEDY)
    for row, text in zip(found.tolist(), alone, strict=True):
        first = EOS if model.cfg.default_prepend_bos else tokenizer(text)["input_ids"][0]
        kept = row[row.index(first) + (first == EOS) :]
        assert tokenizer.decode(kept) == text


def test_greedy_by_temperature_zero(name: str) -> None:
    model, ids = lens(name), ids_of()
    expected = by_hand(model.module, ids, 4)
    for options in ({"temperature": 0.0}, {"temperature": 0, "freq_penalty": 5.0}, {"top_k": 1}):
        found = model.generate(ids, 4, stop_at_eos=False, verbose=False, **options)
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore")  # of kernels that are not installed
def test_models_of_states_generate_without_a_cache_of_keys() -> None:
    model, ids = lens("mamba"), ids_of()
    assert torch.equal(model.generate(ids, 4, **GREEDY), by_hand(model.module, ids, 4))
    with pytest.raises(InputError, match="state"):
        model(ids, past_kv_cache=KeyValueCache.init_cache())


def test_no_new_tokens_is_the_prompt() -> None:
    model, ids = lens("gpt2"), ids_of()
    assert torch.equal(model.generate(ids, 0, **GREEDY), ids)
    assert model.generate("w5 w6", 0, **GREEDY) == "w5 w6"
    assert model.generate(TEXTS, 0, **GREEDY) == TEXTS
    assert list(model.generate_stream("w5 w6", 0, **GREEDY)) == ["w5 w6"]
    with pytest.raises(InputError, match="negative"):
        model.generate(ids, -1, **GREEDY)


def test_the_positions_of_the_model_are_the_limit() -> None:
    model, ids = lens("gpt2"), ids_of(1, 30)
    # The last token is never read.
    full = model.generate(ids, 3, **GREEDY)
    assert full.shape == (1, 33) and torch.equal(full, by_hand(model.module, ids, 3))
    for call in (model.generate, model.generate_stream):
        with pytest.raises(InputError, match="32 positions"):
            call(ids, 4, **GREEDY)
    for use_cache in (True, False):
        with pytest.raises(InputError, match="32 positions"):
            model.generate(ids, 40, use_past_kv_cache=use_cache, **GREEDY)
    long = lens("llama").generate(ids, 10, **GREEDY)  # rotary positions have no table
    assert long.shape == (1, 40)


def test_a_prompt_of_nothing() -> None:
    model = lens("gpt2")
    assert model.generate("", 2, return_type="tokens", **GREEDY).shape == (1, 3)
    with pytest.raises(InputError, match="empty"):
        model.generate("", 2, prepend_bos=False, **GREEDY)


def test_a_prompt_of_one_dimension() -> None:
    model, ids = lens("gpt2"), ids_of(1)
    expected = by_hand(model.module, ids, 3)
    for form in (ids[0], ids[0].tolist(), ids.numpy()):
        assert torch.equal(model.generate(form, 3, **GREEDY), expected)


# -------------------------------------------------------------------- the end of text


def ending(model: HookedTransformer, ids: torch.Tensor, step: int) -> int:
    """The token that greedy generation of row 0 gives at a step."""
    return int(by_hand(model.module, ids, step + 1)[0, -1])


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_end_on_their_own_and_are_filled(use_cache: bool) -> None:
    for seed in range(6):
        model, ids = lens("llama"), ids_of(3, 5, seed)
        end = ending(model, ids, 1)
        whole = by_hand(model.module, ids, 6)
        found = model.generate(
            ids, 6, do_sample=False, eos_token_id=end, verbose=False, use_past_kv_cache=use_cache
        )
        lengths = []
        for row, plain in zip(found.tolist(), whole.tolist(), strict=True):
            new = plain[5:]
            stop = 5 + new.index(end) + 1 if end in new else 11
            lengths.append(stop)
            assert row[:stop] == plain[:stop]
            assert set(row[stop:]) <= {end}
        assert found.shape[1] == max(lengths)


def test_several_ends() -> None:
    model, ids = lens("llama"), ids_of(1)
    plain = by_hand(model.module, ids, 6)[0].tolist()
    ends = [plain[8], plain[7]]
    found = model.generate(ids, 6, do_sample=False, eos_token_id=ends, verbose=False)
    first = min(plain[5:].index(end) for end in ends)
    assert found[0].tolist() == plain[: 5 + first + 1]


def test_the_tokenizers_end_is_used_and_its_absence_is_said() -> None:
    model = lens("llama")

    def force(logits: torch.Tensor, hook: Any) -> torch.Tensor:
        logits = torch.zeros_like(logits)
        logits[..., EOS] = 1
        return logits

    with model.hooks([("unembed.hook_out", force)]):
        found = model.generate(ids_of(), 6, do_sample=False, verbose=False)
        assert found.shape == (2, 6) and (found[:, -1] == EOS).all()
        assert model.generate("w5 w6", 6, do_sample=False, verbose=False) == "w5 w6"
        kept = model.generate(ids_of(), 6, **GREEDY)
        assert kept.shape == (2, 11)
    bare = HookedTransformer(TINY.build("llama"))
    with pytest.raises(InputError, match="eos_token_id"):
        bare.generate(ids_of(), 2, verbose=False)
    assert bare.generate(ids_of(), 2, eos_token_id=7, verbose=False).shape[0] == 2
    assert bare.generate(ids_of(), 2, **GREEDY).shape == (2, 7)


# -------------------------------------------------------------------- sampling


def drawn(filtered: Callable[[torch.Tensor], torch.Tensor]) -> Choose:
    def choose(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Categorical(logits=filtered(logits)).sample()

    return choose


def top_k(logits: torch.Tensor) -> torch.Tensor:
    least = logits.sort(-1).values[:, -3:-2]
    return logits.masked_fill(logits < least, -torch.inf)


def top_p(logits: torch.Tensor) -> torch.Tensor:
    found = torch.full_like(logits, -torch.inf)
    for row, values in enumerate(logits):
        order, total = values.argsort(descending=True), 0.0
        for token in order.tolist():
            if total >= 0.6:
                break
            found[row, token] = values[token]
            total += float(values.softmax(-1)[token])
    return found


@pytest.mark.parametrize(
    ("options", "filtered"),
    [
        ({}, lambda logits: logits),
        ({"temperature": 0.5}, lambda logits: logits / 0.5),
        ({"top_k": 3}, top_k),
        ({"top_p": 0.6}, top_p),
        ({"top_k": 3, "top_p": 0.1}, top_k),
        ({"top_p": 0.6, "temperature": 2.0}, lambda logits: top_p(logits / 2)),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "both", "hot_top_p"],
)
def test_samples_are_those_of_the_formula(options: dict[str, Any], filtered: Any) -> None:
    model, ids = lens("llama"), ids_of()
    for seed in range(3):
        torch.manual_seed(seed)
        expected = by_hand(model.module, ids, 5, drawn(filtered))
        for use_cache in (True, False):
            torch.manual_seed(seed)
            found = model.generate(
                ids, 5, stop_at_eos=False, verbose=False, use_past_kv_cache=use_cache, **options
            )
            assert torch.equal(found, expected)


def penalized(penalty: float) -> Choose:
    def choose(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        counts = torch.stack([torch.bincount(row, minlength=61) for row in ids])
        return torch.distributions.Categorical(logits=logits - penalty * counts).sample()

    return choose


def test_a_frequency_penalty_counts_every_token_so_far() -> None:
    model, ids = lens("gpt2"), ids_of()
    torch.manual_seed(0)
    expected = by_hand(model.module, ids, 6, penalized(2.0))
    torch.manual_seed(0)
    found = model.generate(ids, 6, freq_penalty=2.0, stop_at_eos=False, verbose=False)
    assert torch.equal(found, expected)
    # So large that nothing comes twice.
    found = model.generate(ids, 20, freq_penalty=1e4, stop_at_eos=False, verbose=False)
    for row in found.tolist():
        assert len(set(row[5:])) == 20 and not set(row[5:]) & set(row[:5])


def test_padding_is_not_penalized() -> None:
    """Where the end of text pads, a short row could not end."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=TINY.word_tokenizer().backend_tokenizer,
        unk_token="<unk>",
        eos_token="<eos>",
    )
    model = HookedTransformer(TINY.build("llama"), tokenizer)

    def force(logits: torch.Tensor, hook: Any) -> torch.Tensor:
        logits = torch.zeros_like(logits)
        logits[..., EOS] = 30  # less 10 for the one in front, and 10 for each that pads
        return logits

    with model.hooks([("unembed.hook_out", force)]):
        found = model.generate(
            ["w5", "w6 w7 w8 w9 w10 w11"], 1, freq_penalty=10.0, return_type="tokens", verbose=False
        )
    assert found[:, -1].tolist() == [EOS, EOS]


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_p": 0.0}, {"temperature": -1.0}])
def test_samplings_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options)).split("_")[0]):
        lens("gpt2").generate(ids_of(), 2, stop_at_eos=False, verbose=False, **options)


# -------------------------------------------------------------------- hooks


@pytest.mark.parametrize("use_cache", [True, False])
def test_hooks_act_at_every_step(name: str, use_cache: bool) -> None:
    model, ids = lens(name), ids_of()
    module, shapes = model.module, []
    torch.manual_seed(1)
    added = torch.randn(16)
    start = {"gpt2": "transformer.h.1", "gpt_neox": "gpt_neox.layers.1"}.get(name, "model.layers.1")

    def steer(value: torch.Tensor, hook: Any) -> torch.Tensor:
        shapes.append(tuple(value.shape))
        return value + 3 * added

    def plain(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + 3 * added, *output[1:])
        return output + 3 * added

    raw = by_hand(module, ids, 6)
    handle = module.get_submodule(start).register_forward_hook(plain)
    expected = by_hand(module, ids, 6)
    handle.remove()
    assert not torch.equal(raw, expected)
    with model.hooks([("blocks.1.hook_resid_post", steer)]):
        found = model.generate(ids, 6, use_past_kv_cache=use_cache, **GREEDY)
    assert torch.equal(found, expected)
    lengths = [shape[1] for shape in shapes]
    assert lengths == ([5, 1, 1, 1, 1, 1] if use_cache else [5, 6, 7, 8, 9, 10])
    assert torch.equal(model.generate(ids, 6, **GREEDY), raw)
    model.add_hook("blocks.1.hook_resid_post", steer)
    assert torch.equal(model.generate(ids, 6, **GREEDY), expected)
    model.reset_hooks()


def test_an_error_in_a_hook_ends_the_generation_cleanly() -> None:
    model, ids = lens("llama"), ids_of()

    def fail(value: torch.Tensor, hook: Any) -> None:
        hook.ctx["steps"] = hook.ctx.get("steps", 0) + 1
        if hook.ctx["steps"] == 3:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        with model.hooks([("blocks.1.attn.hook_z", fail)], clear_contexts=True):
            model.generate(ids, 6, **GREEDY)
    assert model.list_hooks() == {} and TINY.count_hooks(model.module) == 0
    assert torch.equal(model.generate(ids, 3, **GREEDY), by_hand(model.module, ids, 3))


# -------------------------------------------------------------------- inputs and results


def test_embeddings_as_input_give_the_new_tokens_alone(name: str) -> None:
    model, ids = lens(name), ids_of()
    with torch.no_grad():
        embeds = model.module.get_input_embeddings()(ids)
    expected = by_hand(model.module, ids, 4)[:, 5:]
    assert torch.equal(model.generate(embeds, 4, **GREEDY), expected)
    assert torch.equal(model.generate(embeds[0], 4, **GREEDY), expected[:1])
    text = model.generate(embeds, 4, return_type="str", **GREEDY)
    assert text == [TINY.word_tokenizer().decode(row) for row in expected]


def test_embeddings_with_a_penalty() -> None:
    model = lens("gpt2")
    embeds = model.module.get_input_embeddings()(ids_of()).detach()
    found = model.generate(embeds, 4, freq_penalty=1e4, stop_at_eos=False, verbose=False)
    assert all(len(set(row)) == 4 for row in found.tolist())


def test_kinds_of_results() -> None:
    model, tokenizer = lens("gpt2"), TINY.word_tokenizer()
    text = "w5 w6 w7"
    ids = torch.tensor([[EOS, 5, 6, 7]])
    whole = by_hand(model.module, ids, 4)
    plain = tokenizer.decode(whole[0, 1:])
    assert model.generate(text, 4, **GREEDY) == plain
    assert model.generate(text, 4, return_type="str", **GREEDY) == plain
    assert torch.equal(model.generate(text, 4, return_type="tokens", **GREEDY), whole)
    assert model.generate([text], 4, **GREEDY) == [plain]
    assert model.generate([text, text], 4, **GREEDY) == [plain, plain]
    assert torch.equal(model.generate(ids, 4, **GREEDY), whole)
    embeds = model.generate(ids, 4, return_type="embeds", **GREEDY)
    assert torch.equal(embeds, model.module.get_input_embeddings()(whole))
    assert tokenizer.decode(whole[0]).endswith(model.generate(ids, 4, return_type="str", **GREEDY))
    with pytest.raises(InputError, match="return_type"):
        model.generate(text, 4, return_type="string", **GREEDY)
    assert model.generate(text, 4, prepend_bos=False, **GREEDY) == tokenizer.decode(
        by_hand(model.module, ids[:, 1:], 4)[0]
    )


@pytest.mark.parametrize("use_cache", [True, False])
def test_logits_of_each_step(use_cache: bool) -> None:
    model, ids = lens("llama"), ids_of()
    found = model.generate(ids, 4, output_logits=True, use_past_kv_cache=use_cache, **GREEDY)
    expected = by_hand(model.module, ids, 4)
    assert torch.equal(found.sequences, expected)
    assert len(found.logits) == 4
    for step, logits in enumerate(found.logits):
        torch.testing.assert_close(
            logits, logits_at_end(model.module, expected[:, : 5 + step]), atol=2e-5, rtol=2e-5
        )
    bare = model.generate(ids, 4, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(bare.sequences, expected) and bare.logits is None
    both = model.generate(
        ids, 4, return_dict_in_generate=True, output_logits=True, **{**GREEDY, "do_sample": True},
        top_k=1,
    )  # fmt: skip
    assert torch.equal(both.sequences, expected) and len(both.logits) == 4


def test_unknown_options_warn_and_searches_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = lens("gpt2"), ids_of()
    with caplog.at_level(logging.WARNING, "graftwork"):
        model.generate(ids, 1, no_such_option=3, **GREEDY)
    assert "no_such_option" in caplog.text
    for option in ("num_beams", "num_return_sequences"):
        with pytest.raises(InputError, match=option):
            model.generate(ids, 2, **{option: 3}, **GREEDY)
        with pytest.raises(InputError, match=option):
            model.generate_stream(ids, 2, **{option: 3}, **GREEDY)


def test_a_generation_changes_nothing_of_the_model() -> None:
    model, ids = lens("llama"), ids_of()
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    given = ids.clone()
    with torch.enable_grad():
        model.generate(ids, 3, **GREEDY)
        assert torch.is_grad_enabled()
        stream = model.generate_stream(ids, 3, max_tokens_per_yield=1, **GREEDY)
        next(stream)
        assert torch.is_grad_enabled()  # between two parts
        stream.close()  # type: ignore[attr-defined]
    assert torch.equal(ids, given) and model.tokenizer.padding_side == "right"
    after = model.module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert model(ids).requires_grad


# -------------------------------------------------------------------- streams


@pytest.mark.parametrize("size", [1, 2, 3, 25])
@pytest.mark.parametrize("new", [1, 6])
def test_parts_of_a_stream_are_the_whole(size: int, new: int) -> None:
    model, ids = lens("gpt2"), ids_of()
    whole = by_hand(model.module, ids, new)
    parts = list(model.generate_stream(ids, new, size, **GREEDY))
    assert torch.equal(torch.cat(parts, 1), whole)
    widths = [part.shape[1] for part in parts]
    assert len(widths) == -(-new // size) and widths[0] == 5 + min(size, new)
    assert all(0 < width <= size for width in widths[1:])
    for text in TEXTS:
        pieces = list(model.generate_stream(text, new, size, **GREEDY))
        assert "".join(pieces) == model.generate(text, new, **GREEDY)
        assert pieces[0].startswith(text)
        as_ids = list(model.generate_stream(text, new, size, return_type="tokens", **GREEDY))
        assert torch.equal(
            torch.cat(as_ids, 1), model.generate(text, new, return_type="tokens", **GREEDY)
        )
    rows = list(model.generate_stream(TEXTS, new, size, **GREEDY))
    joined = ["".join(row) for row in zip(*rows, strict=True)]
    assert joined == model.generate(TEXTS, new, **GREEDY)


def test_a_stream_ends_where_the_text_does() -> None:
    model, ids = lens("llama"), ids_of(1)
    end = ending(model, ids, 2)
    options = {"do_sample": False, "eos_token_id": end, "verbose": False}
    whole = model.generate(ids, 8, **options)
    for size in (1, 2, 25):
        parts = list(model.generate_stream(ids, 8, size, **options))
        assert torch.equal(torch.cat(parts, 1), whole)
    text = TINY.word_tokenizer().decode(ids[0])
    for size in (1, 2, 25):
        pieces = list(model.generate_stream(text, 8, size, prepend_bos=False, **options))
        assert "".join(pieces) == model.generate(text, 8, prepend_bos=False, **options)


def test_a_stream_is_checked_when_it_is_made() -> None:
    with pytest.raises(InputError, match="at least one"):
        lens("gpt2").generate_stream(ids_of(), 3, max_tokens_per_yield=0, **GREEDY)


def test_embeddings_stream_their_new_tokens() -> None:
    model, ids = lens("gpt2"), ids_of()
    embeds = model.module.get_input_embeddings()(ids).detach()
    parts = list(model.generate_stream(embeds, 5, 2, **GREEDY))
    assert torch.equal(torch.cat(parts, 1), by_hand(model.module, ids, 5)[:, 5:])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_letters_of_several_tokens_are_given_whole(size: int) -> None:
    """A byte-level token may be a part of a letter, which has no text yet."""
    inner = tokenizers.Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<eos>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = HookedTransformer(transformers.GPT2LMHeadModel(config).eval(), tokenizer)
    answer = tokenizer("é – 日本🙂!")["input_ids"]
    left = list(answer)

    def say(logits: torch.Tensor, hook: Any) -> torch.Tensor:
        logits = torch.zeros_like(logits)
        logits[..., left.pop(0)] = 1
        return logits

    with model.hooks([("unembed.hook_out", say)]):
        parts = list(model.generate_stream("ça: ", len(answer), size, **GREEDY))
    assert "".join(parts) == "ça: é – 日本🙂!"
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


def test_text_that_ends_within_a_letter_is_not_lost() -> None:
    model = HookedTransformer.from_pretrained_no_processing("graftwork/tiny")
    ids = model.tokenizer("é")["input_ids"]
    assert len(ids) == 2

    def say(logits: torch.Tensor, hook: Any) -> torch.Tensor:
        logits = torch.zeros_like(logits)
        logits[..., ids[0]] = 1
        return logits

    with model.hooks([("unembed.hook_out", say)]):
        whole = model.generate("The", 2, **GREEDY)
        parts = list(model.generate_stream("The", 2, 1, **GREEDY))
    assert "".join(parts) == whole


def test_the_shipped_model_answers() -> None:
    model = HookedTransformer.from_pretrained("graftwork/tiny")
    text = "The Eiffel Tower is in the city of"
    found = model.generate(text, 3, do_sample=False, verbose=False)
    assert found.startswith(text + " Paris")
    both = model.generate([text, "Tokyo"], 2, do_sample=False, verbose=False)
    assert both[0].startswith(text + " Paris") and both[1].startswith("Tokyo")
