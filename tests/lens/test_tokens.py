"""Tokens against the tokenizers of transformers: small ones of each kind, made here."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from graftwork.lens.hooked_transformer import HookedTransformer
from graftwork.lens.tokens import Tokenization
from graftwork.tracing.errors import InputError

CORPUS = [
    "The Eiffel Tower is in the city of Paris. When Mary and John went to the store, John gave",
    "a drink to Mary. The quick brown fox jumps over the lazy dog; naïve cafés cost 3.14 euros!",
    "  two spaces, a\ttab and a\nnewline. The the The the cat sat on the mat with the hat.",
    *["the the the", "the cat"] * 5,
] * 3
TEXTS = ["The cat sat", "the", "When Mary and John went to the store, John gave a drink to"]


def _wrapped(inner: Any, **special: str) -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def _byte_level(special: list[str]) -> Any:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(CORPUS, trainer)
    return inner


def _template(inner: Any, single: str, *names: str) -> None:
    inner.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, inner.token_to_id(name)) for name in names]
    )


def gpt2_like() -> Any:
    """One token for the begin, the end and nothing else; none for padding; nothing is added."""
    end = "<|endoftext|>"
    return _wrapped(_byte_level([end]), bos_token=end, eos_token=end, unk_token=end)


def neo_like() -> Any:
    """As GPT-NeoX: begin and end are one token, padding is another."""
    end = "<|endoftext|>"
    inner = _byte_level([end, "<|padding|>"])
    return _wrapped(inner, bos_token=end, eos_token=end, pad_token="<|padding|>")


def llama3_like() -> Any:
    """Byte-level, and the begin is added by the tokenizer itself."""
    inner = _byte_level(["<s>", "</s>", "<pad>"])
    _template(inner, "<s> $A", "<s>")
    return _wrapped(inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def llama2_like() -> Any:
    """As SentencePiece: words begin with ▁, the begin is added, and there is no padding token."""
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=special, show_progress=False)
    inner.train_from_iterator(CORPUS, trainer)
    _template(inner, "<s> $A", "<s>")
    return _wrapped(inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def qwen_like() -> Any:
    """No begin token at all; the end is padding, too."""
    return _wrapped(
        _byte_level(["<|endoftext|>"]), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def opt_like() -> Any:
    """Begin and end are one token, which the tokenizer adds, and padding has its own."""
    inner = _byte_level(["</s>", "<pad>"])
    _template(inner, "</s> $A", "</s>")
    return _wrapped(inner, bos_token="</s>", eos_token="</s>", pad_token="<pad>")


KINDS: dict[str, Callable[[], Any]] = {
    one.__name__: functools.cache(one)
    for one in (gpt2_like, neo_like, llama3_like, llama2_like, qwen_like, opt_like)
}


@pytest.fixture(params=list(KINDS))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def row_of(tokenizer: Any, text: str, begin: bool) -> list[int]:
    """What transformers says: ids without special tokens, with the begin (or end) in front."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [first, *ids] if begin else ids


def pad_of(tokenizer: Any) -> int:
    found = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if found is None else found)


def lens(tokenizer: Any, **options: Any) -> HookedTransformer:
    torch.manual_seed(0)
    module = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=24,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    return HookedTransformer(module, tokenizer, **options)


def test_the_kinds_differ_as_they_should() -> None:
    adds = {name: len(make()("")["input_ids"]) for name, make in KINDS.items()}
    assert {name for name, count in adds.items() if count} == {
        "llama3_like",
        "llama2_like",
        "opt_like",
    }


# -------------------------------------------------------------------- to_tokens


@pytest.mark.parametrize("prepend_bos", [None, True, False])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_rows_and_padding_are_those_of_transformers(
    tokenizer: Any, prepend_bos: bool | None, side: str | None
) -> None:
    rules = Tokenization(tokenizer, None)
    begin = prepend_bos is not False
    rows = [row_of(tokenizer, text, begin) for text in TEXTS]
    found = rules.to_tokens(TEXTS, prepend_bos, side)
    width = max(map(len, rows))
    assert found.ids.shape == found.mask.shape == (3, width) and found.ids.dtype == torch.long
    for row, ids, mask in zip(rows, found.ids.tolist(), found.mask.tolist(), strict=True):
        gap = [pad_of(tokenizer)] * (width - len(row))
        none, ones = [0] * len(gap), [1] * len(row)
        assert ids == (gap + row if side == "left" else row + gap)
        assert mask == (none + ones if side == "left" else ones + none)


@pytest.mark.parametrize("prepend_bos", [None, True, False])
def test_one_text_is_a_batch_of_one(tokenizer: Any, prepend_bos: bool | None) -> None:
    for text in TEXTS:
        found = Tokenization(tokenizer, None).to_tokens(text, prepend_bos)
        assert found.ids.tolist() == [row_of(tokenizer, text, prepend_bos is not False)]
        assert found.mask.all()


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("given", [None, True, False])
def test_an_argument_wins_over_the_models_default(
    tokenizer: Any, default: bool, given: bool | None
) -> None:
    model = lens(tokenizer, default_prepend_bos=default)
    begin = default if given is None else given
    assert model.to_tokens("The cat", prepend_bos=given).tolist() == [
        row_of(tokenizer, "The cat", begin)
    ]
    assert len(model.to_str_tokens("The cat", prepend_bos=given)) == len(
        row_of(tokenizer, "The cat", begin)
    )


def test_the_default_may_be_set_in_the_configuration_later() -> None:
    model = lens(gpt2_like())
    assert model.cfg.default_prepend_bos is True
    model.cfg.default_prepend_bos = False
    assert model.to_tokens("The cat").tolist() == [row_of(model.tokenizer, "The cat", False)]
    lengths = [model("The cat").shape[1], model("The cat", prepend_bos=True).shape[1]]
    assert lengths[1] == lengths[0] + 1


def test_the_padding_side_of_the_tokenizer_may_be_set_later() -> None:
    tokenizer = gpt2_like()
    model = lens(tokenizer)
    assert model.to_tokens(TEXTS)[1, -1] == pad_of(tokenizer)
    model.tokenizer.padding_side = "left"
    found = model.to_tokens(TEXTS)
    assert found[1, 0] == pad_of(tokenizer)
    assert found[1, -1] == row_of(tokenizer, TEXTS[1], True)[-1]


def test_the_models_own_padding_side_wins_over_the_tokenizers() -> None:
    tokenizer = neo_like()
    tokenizer.padding_side = "right"
    model = lens(tokenizer, default_padding_side="left")
    assert model.to_tokens(TEXTS)[1, 0] == tokenizer.pad_token_id
    assert tokenizer.padding_side == "right"  # which is not changed
    assert model.to_tokens(TEXTS, padding_side="right")[1, -1] == tokenizer.pad_token_id


def test_no_tokenizer_is_changed_or_loaded_again(tokenizer: Any) -> None:
    before = tokenizer.padding_side, tokenizer.pad_token, tokenizer.bos_token, len(tokenizer)
    assert not tokenizer.name_or_path  # which TransformerLens needs
    model = lens(tokenizer)
    for side, begin in itertools.product(("left", "right"), (True, False)):
        model.to_tokens(TEXTS, padding_side=side, prepend_bos=begin)
    model.set_tokenizer(tokenizer, "left")
    assert before == (
        tokenizer.padding_side,
        tokenizer.pad_token,
        tokenizer.bos_token,
        len(tokenizer),
    )
    assert model.tokenizer is tokenizer


def test_text_is_cut_at_the_positions_of_the_model_unless_it_is_not(tokenizer: Any) -> None:
    model, long = lens(tokenizer), " the cat" * 40
    row = row_of(tokenizer, long, True)
    assert len(row) > 24
    assert model.to_tokens(long).tolist() == [row[:24]]
    assert model.to_tokens(long, truncate=False).tolist() == [row]
    found = model.to_tokens([long, "the"], padding_side="left")
    short = row_of(tokenizer, "the", True)
    assert found.shape == (2, 24) and found[1].tolist()[-len(short) :] == short
    assert model(long).shape[1] == 24
    with pytest.raises(InputError, match="24"):
        model(torch.tensor([row]))


def test_empty_texts() -> None:
    tokenizer = gpt2_like()
    model = lens(tokenizer)
    assert model.to_tokens("").tolist() == [[tokenizer.bos_token_id]]
    assert model.to_tokens(["", "the"], padding_side="right").shape[0] == 2
    assert model.to_tokens("", prepend_bos=False).shape == (1, 0)
    assert model("").shape == (1, 1, len(tokenizer))


def test_texts_that_name_special_tokens() -> None:
    tokenizer = llama3_like()
    rules = Tokenization(tokenizer, None)
    text = "<s>The cat"
    assert rules.encode(text, prepend_bos=True) == tokenizer(text)["input_ids"]
    assert rules.encode(text, prepend_bos=False) == row_of(tokenizer, text, False)


@pytest.mark.parametrize("wrong", [3, ["a", 1], None, [["a"]], torch.tensor([1])])
def test_what_is_no_text_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match="text"):
        lens(gpt2_like()).to_tokens(wrong)


def test_a_wrong_side_is_refused() -> None:
    with pytest.raises(InputError, match="middle"):
        lens(gpt2_like()).to_tokens(TEXTS, padding_side="middle")
    with pytest.raises(InputError, match="middle"):
        lens(gpt2_like(), default_padding_side="middle")


def test_a_model_without_tokenizer_says_so_for_text_alone() -> None:
    module = lens(gpt2_like()).module
    model = HookedTransformer(module)
    assert model(torch.tensor([[1, 2, 3]])).shape[:2] == (1, 3)
    for ask in (model.to_tokens, model, model.to_str_tokens, model.to_single_token, model.generate):
        with pytest.raises(InputError, match="tokenizer"):
            ask("The cat")
    model.set_tokenizer(gpt2_like())
    assert model("The cat").ndim == 3


def test_tokenizers_that_close_texts_keep_what_stands_in_front() -> None:
    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat"])}
    inner = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    _template(inner, "[CLS] $A [SEP]", "[CLS]", "[SEP]")
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    rules = Tokenization(_wrapped(inner, unk_token="[UNK]", **special), None)
    assert rules.encode("the cat") == [2, 4, 5, 3]
    assert rules.to_tokens(["the cat", "cat"]).mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert rules.to_single_token("cat") == 5


# -------------------------------------------------------------------- masks of ids


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_ids_is_seen_on_both_sides_whatever_the_tokenizers_side(
    tokenizer: Any, side: str
) -> None:
    for own in ("left", "right"):
        rules = Tokenization(tokenizer, None, padding_side=own)
        found = rules.to_tokens(TEXTS, True, side)
        assert rules.mask_of(found.ids).tolist() == found.mask.tolist()


def test_one_row_of_a_padded_batch_is_padded_where_nothing_else_can_be_meant() -> None:
    for make in KINDS.values():
        rules = Tokenization(make(), None)
        found = rules.to_tokens(TEXTS, True, "left")
        mask = rules.mask_of(found.ids[1:2])
        own = rules.pad not in (rules.bos, rules.tokenizer.eos_token_id)
        assert mask.tolist() == (found.mask[1:2] if own else torch.ones_like(mask)).tolist()


def test_ids_without_padding_are_whole() -> None:
    rules = Tokenization(llama3_like(), None)
    ids = torch.tensor([[5, 2, 2, 6], [7, 8, 9, 10]])  # a padding token inside a row is a token
    assert rules.mask_of(ids).all()


# -------------------------------------------------------------------- ids to text


def test_to_string_of_every_form_of_ids(tokenizer: Any) -> None:
    model = lens(tokenizer)
    rows = [row_of(tokenizer, text, False) for text in TEXTS]
    plain = [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in rows]
    for row, text in zip(rows, plain, strict=True):
        for form in (row, torch.tensor(row), np.array(row), tuple(row)):
            assert model.to_string(form) == text
        assert model.to_string(torch.tensor([row])) == [text]
        assert model.to_string([row]) == [text]
    one = rows[0][0]
    assert model.to_string(one) == model.to_string(torch.tensor(one)) == tokenizer.decode([one])
    same = [torch.tensor(row[:1]) for row in rows]
    assert model.to_string(same) == [tokenizer.decode(row[:1]) for row in rows]


def test_to_string_of_rows_of_different_lengths(tokenizer: Any) -> None:
    rows = [row_of(tokenizer, text, False) for text in TEXTS]
    model = lens(tokenizer)
    plain = [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in rows]
    assert model.to_string([torch.tensor(row) for row in rows]) == plain


def test_to_string_leaves_spaces_as_they_are() -> None:
    model, text = lens(gpt2_like()), "the cat , the dog . do n't"
    ids = model.to_tokens(text, prepend_bos=False)
    assert model.to_string(ids) == [text] and model.to_string(ids[0]) == text


def test_to_str_tokens_of_every_form(tokenizer: Any) -> None:
    model = lens(tokenizer)
    for text in TEXTS:
        row = row_of(tokenizer, text, True)
        parts = [tokenizer.decode([one]) for one in row]
        for form in (text, torch.tensor(row), torch.tensor([row]), np.array(row), row):
            assert model.to_str_tokens(form) == parts
    assert model.to_str_tokens(TEXTS) == [model.to_str_tokens(text) for text in TEXTS]
    assert model.to_str_tokens(torch.tensor(row_of(tokenizer, "the", False)[0])) == [
        tokenizer.decode(row_of(tokenizer, "the", False)[:1])
    ]
    with pytest.raises(InputError, match="one row"):
        model.to_str_tokens(torch.ones(2, 3, dtype=torch.long))


def test_single_tokens_go_both_ways() -> None:
    tokenizer = gpt2_like()
    model = lens(tokenizer)
    for text in (" the", "the", " T"):
        ids = tokenizer(text)["input_ids"]
        if len(ids) == 1:
            assert model.to_single_token(text) == ids[0]
            assert model.to_single_str_token(ids[0]) == text
    assert model.to_single_str_token(np.int64(7)) == tokenizer.decode([7])
    with pytest.raises(InputError, match="tokens, not one"):
        model.to_single_token(" the cat sat")
    with pytest.raises(InputError, match="one id"):
        model.to_single_str_token("the")  # type: ignore[arg-type]


def test_a_single_token_does_not_count_the_begin(tokenizer: Any) -> None:
    ids = tokenizer("the", add_special_tokens=False)["input_ids"]
    assert len(ids) == 1
    assert lens(tokenizer).to_single_token("the") == ids[0]


def test_positions_of_tokens() -> None:
    tokenizer = gpt2_like()
    model = lens(tokenizer)
    text = "the the cat the"
    row = row_of(tokenizer, text, True)
    token = tokenizer(" the")["input_ids"]
    assert len(token) == 1
    places = [i for i, one in enumerate(row) if one == token[0]]
    assert len(places) == 2
    for given in (text, torch.tensor(row), torch.tensor([row]), row):
        for wanted in (" the", token[0], torch.tensor(token[0])):
            assert model.get_token_position(wanted, given) == places[0]
            assert model.get_token_position(wanted, given, mode="last") == places[1]
    assert model.get_token_position(" the", text, prepend_bos=False) == places[0] - 1
    with pytest.raises(InputError, match="does not occur"):
        model.get_token_position(" the", "cat")
    with pytest.raises(InputError, match="first"):
        model.get_token_position(" the", text, mode="middle")
    with pytest.raises(InputError, match="one row"):  # which of them?
        model.get_token_position(" the", torch.tensor([row, row]))


def test_residual_directions_of_any_shape() -> None:
    tokenizer = gpt2_like()
    model = lens(tokenizer)
    head = model.module.lm_head.weight  # [d_vocab, d_model]
    id_ = tokenizer("the")["input_ids"][0]
    for one in ("the", id_, torch.tensor(id_), np.int64(id_)):
        assert torch.equal(model.tokens_to_residual_directions(one), head[id_])
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    assert torch.equal(model.tokens_to_residual_directions(ids), head[ids])
    assert torch.equal(model.tokens_to_residual_directions(ids[0]), head[ids[0]])


def test_threads_may_ask_for_different_sides() -> None:
    tokenizer = llama3_like()
    model, wrong = lens(tokenizer), []

    def work(side: str, begin: bool) -> None:
        expected = Tokenization(tokenizer, 24).to_tokens(TEXTS, begin, side).ids
        for _ in range(20):
            if not torch.equal(
                model.to_tokens(TEXTS, prepend_bos=begin, padding_side=side), expected
            ):
                wrong.append((side, begin))

    options = list(itertools.product(("left", "right"), (True, False))) * 2
    threads = [threading.Thread(target=work, args=one) for one in options]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong
