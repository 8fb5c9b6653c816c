"""Every way to give a prompt is the same prompt; what cannot be one is refused by its cause."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from graftwork import GraftworkError, LanguageModel
from graftwork.tracing.errors import InputError

IDS = [5, 9, 12, 7]
TEXT = "w5 w9 w12 w7"


@pytest.fixture(scope="module")
def module(tools: Any) -> Any:
    return tools.module("gpt2")


@pytest.fixture(scope="module")
def model(module: Any, tools: Any) -> LanguageModel:
    return LanguageModel(module, tokenizer=tools.tokenizer())


def logits_of(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    with model.trace() as tracer:
        with tracer.invoke(*args, **kwargs):
            logits = model.output.logits.save()
    return logits.value


def plain(module: Any, ids: list[int], **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.tensor([ids]), **kwargs).logits


FORMS = {
    "string": lambda tok: TEXT,
    "list of one string": lambda tok: [TEXT],
    "list of ids": lambda tok: IDS,
    "list of lists": lambda tok: [IDS],
    "tuple of ids": lambda tok: tuple(IDS),
    "1-D tensor": lambda tok: torch.tensor(IDS),
    "2-D tensor": lambda tok: torch.tensor([IDS]),
    "int32 tensor": lambda tok: torch.tensor([IDS], dtype=torch.int32),
    "list of tensors": lambda tok: [torch.tensor(IDS)],
    "numpy": lambda tok: torch.tensor(IDS).numpy(),
    "dict of lists": lambda tok: {"input_ids": IDS},
    "BatchEncoding": lambda tok: tok(TEXT, return_tensors="pt"),
    "BatchEncoding of lists": lambda tok: tok(TEXT),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_prompt_is_the_same_prompt(
    form: str, module: Any, model: Any, tools: Any
) -> None:
    prompt = FORMS[form](tools.tokenizer())
    expected = plain(module, IDS)
    assert tools.difference(logits_of(model, prompt), expected) is None
    with model.trace() as tracer:
        with tracer.invoke("w4 w5 w6 w7 w8 w9"):
            model.output.logits.save()
        with tracer.invoke(prompt):
            batched = model.output.logits.save()
    assert tools.difference(batched.value, expected) is None
    with model.trace(prompt) as tracer:
        direct = model.output.logits.save()
    assert tools.difference(direct.value, expected) is None


@pytest.mark.parametrize("opener", ["trace", "invoke"])
def test_keywords_give_a_prompt(opener: str, module: Any, model: Any, tools: Any) -> None:
    mask = [1, 1, 0, 1]
    expected = plain(module, IDS, attention_mask=torch.tensor([mask]))
    open_block = getattr(model, opener)
    with open_block(input_ids=IDS, attention_mask=mask):
        logits = model.output.logits.save()
    assert tools.difference(logits.value, expected) is None


def test_keyword_mask_next_to_a_positional_prompt(module: Any, model: Any, tools: Any) -> None:
    mask = torch.tensor([[1, 1, 0, 1]])
    expected = plain(module, IDS, attention_mask=mask)
    assert tools.difference(logits_of(model, IDS, attention_mask=mask), expected) is None


def test_embeddings_give_a_prompt(module: Any, model: Any, tools: Any) -> None:
    embeddings = torch.randn(1, 5, 16)
    with torch.no_grad():
        expected = module(inputs_embeds=embeddings).logits
    assert tools.difference(logits_of(model, inputs_embeds=embeddings), expected) is None
    with model.trace() as tracer:
        with tracer.invoke(inputs_embeds=embeddings[0]):
            first = model.output.logits.save()
        with tracer.invoke(inputs_embeds=torch.randn(1, 8, 16)):
            model.output.logits.save()
        with tracer.invoke(IDS):
            third = model.output.logits.save()
    assert tools.difference(first.value, expected) is None
    assert tools.difference(third.value, plain(module, IDS)) is None


def test_gradients_of_embeddings_that_ask_for_them(model: Any) -> None:
    embeddings = torch.randn(1, 5, 16, requires_grad=True)
    with model.trace(inputs_embeds=embeddings):
        logits = model.output.logits.save()
    logits.value.sum().backward()
    assert embeddings.grad is not None and embeddings.grad.abs().sum() > 0


def test_embeddings_start_a_generation(module: Any, model: Any) -> None:
    prompts = [torch.randn(1, n, 16) for n in (3, 6)]
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    own = []
    with model.generate(**options) as generator:
        for prompt in prompts:
            with generator.invoke(inputs_embeds=prompt) as invoker:
                invoker.next()
                model.lm_head.output.save()
            own.append(invoker)
    for i, prompt in enumerate(prompts):
        mask = torch.ones(prompt.shape[:2], dtype=torch.long)
        expected = module.generate(inputs_embeds=prompt, attention_mask=mask, **options)
        assert generator.output[i].tolist() == expected[0].tolist()
        assert own[i].output.tolist() == expected.tolist()


def test_the_loss_of_labels_is_each_prompts_own(module: Any, model: Any, tools: Any) -> None:
    prompts = tools.prompts(3, 6)
    saved = []
    with model.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt, labels=prompt):
                saved.append(model.output.loss.save())
    for prompt, loss in zip(prompts, saved, strict=True):
        with torch.no_grad():
            expected = module(prompt[None], labels=prompt[None]).loss
        assert tools.difference(loss.value, expected) is None


@pytest.mark.parametrize("generates", [False, True])
def test_hidden_states_and_attentions_of_each_prompt(generates: bool, tools: Any) -> None:
    module = copy.deepcopy(tools.module("llama"))
    module.set_attn_implementation("eager")
    model: Any = LanguageModel(module)
    prompts = tools.prompts(3, 6)
    flags = {"output_hidden_states": True, "output_attentions": True}
    options = {"max_new_tokens": 1, "pad_token_id": 0, "do_sample": False, **flags}
    saved = []
    with model.generate(**options) if generates else model.trace(**flags) as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                output = model.output
                saved.append((output.hidden_states.save(), output.attentions[1].save()))
    for prompt, (states, attention) in zip(prompts, saved, strict=True):
        with torch.no_grad():
            expected = module(prompt[None], **flags)
        assert tools.difference(states.value, expected.hidden_states) is None
        assert tools.difference(attention.value, expected.attentions[1]) is None


def test_prompts_that_read_a_cache_run_apart(model: Any, module: Any, tools: Any) -> None:
    """A cache of the batch would hold the tokens of every prompt."""
    prompts, saved = tools.prompts(3, 6), []
    with model.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                saved.append((model.output.past_key_values.save(), model.output.logits.save()))
    for prompt, (cache, logits) in zip(prompts, saved, strict=True):
        with torch.no_grad():
            expected = module(input_ids=prompt[None])
        assert cache.value.get_seq_length() == len(prompt)
        keys = [layer.keys for layer in cache.value.layers]
        for found, plain in zip(keys, expected.past_key_values.layers, strict=True):
            assert tools.difference(found, plain.keys) is None
        assert tools.difference(logits.value, expected.logits) is None


def test_embeddings_of_different_lengths_on_a_model_that_counts_ids(tools: Any) -> None:
    module, model = tools.module("roberta"), tools.model("roberta")
    prompts = [torch.randn(1, n, 16) for n in (3, 6)]
    saved = []
    with model.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(inputs_embeds=prompt):
                saved.append(model.output.logits.save())
    for prompt, logits in zip(prompts, saved, strict=True):
        with torch.no_grad():
            expected = module(inputs_embeds=prompt).logits
        assert tools.difference(logits.value, expected) is None


def test_token_types_are_the_prompts_own(tools: Any) -> None:
    module, model = tools.module("bert"), tools.model("bert")
    prompts = tools.prompts(4, 7)
    types = [torch.tensor([[0, 1, 1, 0]]), torch.tensor([[1, 1, 0, 0, 0, 1, 1]])]
    saved = []
    with model.trace() as tracer:
        for prompt, kind in zip(prompts, types, strict=True):
            with tracer.invoke(prompt, token_type_ids=kind):
                saved.append(model.output.logits.save())
    for prompt, kind, logits in zip(prompts, types, saved, strict=True):
        with torch.no_grad():
            expected = module(prompt[None], token_type_ids=kind).logits
        assert tools.difference(logits.value, expected) is None


MASKS = {
    "interior zeros": [1, 0, 1, 0, 1],
    "zeros at the end": [1, 1, 1, 0, 0],
    "all ones": [1, 1, 1, 1, 1],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "bloom", "falcon_alibi", "bert", "mamba"])
def test_a_mask_means_what_it_means_to_the_model(mask: str, name: str, tools: Any) -> None:
    module, model = tools.module(name), tools.model(name)
    (prompt,) = tools.prompts(5)
    own = torch.tensor([MASKS[mask]])
    with torch.no_grad():
        expected = module(prompt[None], attention_mask=own).logits
    longer = tools.prompts(9, seed=1)[0]
    with model.trace() as tracer:
        with tracer.invoke(prompt, attention_mask=own):
            batched = model.output.logits.save()
        with tracer.invoke(longer):
            model.output.logits.save()
    seen = own[0].bool()
    assert batched.shape == expected.shape
    assert tools.difference(logits_of(model, prompt, attention_mask=own), expected) is None
    assert tools.difference(batched.value[:, seen], expected[:, seen]) is None


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "bert"])
def test_left_zeros_of_a_mask_are_padding(name: str, tools: Any) -> None:
    module, model = tools.module(name), tools.model(name)
    prompt, longer = tools.prompts(4, 9)
    padded = torch.cat([torch.tensor([0, 0]), prompt])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        expected = module(prompt[None]).logits
    with model.trace() as tracer:
        with tracer.invoke({"input_ids": padded, "attention_mask": mask}):
            batched = model.output.logits.save()
            first = model.output.logits.t[0].save()
        with tracer.invoke(longer):
            model.output.logits.save()
    assert tools.difference(batched.value[:, 2:], expected) is None
    assert tools.difference(first.value, expected[:, 0]) is None
    alone = logits_of(model, padded, attention_mask=mask)
    assert tools.difference(alone[:, 2:], expected) is None


def test_right_padding_counts_as_no_token(tools: Any, module: Any, model: Any) -> None:
    encoded = tools.tokenizer()(["w5 w9", TEXT], return_tensors="pt", padding=True)
    assert encoded["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    with model.trace(encoded):
        last = model.output.logits.t[-1].save()
        first = model.output.logits.t[0].save()
    for i, ids in enumerate(([5, 9], IDS)):
        expected = plain(module, ids)[0]
        assert tools.difference(last.value[i], expected[-1]) is None
        assert tools.difference(first.value[i], expected[0]) is None


def test_strings_of_different_lengths_in_one_invoke(module: Any, model: Any, tools: Any) -> None:
    with model.trace(["w5 w9", TEXT, "w8"]):
        last = model.output.logits.t[-1].save()
    for i, ids in enumerate(([5, 9], IDS, [8])):
        assert tools.difference(last.value[i], plain(module, ids)[0, -1]) is None


def test_lists_of_ids_of_different_lengths_in_one_invoke(
    module: Any, model: Any, tools: Any
) -> None:
    with model.trace([[5, 9], IDS]):
        last = model.output.logits.t[-1].save()
    assert tools.difference(last.value[0], plain(module, [5, 9])[0, -1]) is None


def test_strings_are_read_whatever_side_the_tokenizer_pads(module: Any, tools: Any) -> None:
    tokenizer = tools.tokenizer()
    assert tokenizer.padding_side == "right"
    model = LanguageModel(module, tokenizer=tokenizer)
    with model.generate(max_new_tokens=2, do_sample=False) as generator:
        with generator.invoke("w5 w9"):
            pass
        with generator.invoke(TEXT):
            pass
    assert tokenizer.padding_side == "right"
    for row, ids in zip(generator.output, ([5, 9], IDS), strict=True):
        prompt = torch.tensor([ids])
        expected = module.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        assert row[-2:].tolist() == expected[0, -2:].tolist()


def test_further_inputs_may_differ_between_prompts(module: Any, model: Any, tools: Any) -> None:
    """Inputs that are not per token, such as a flag in a mapping, separate the passes."""
    with model.trace() as tracer:
        with tracer.invoke({"input_ids": IDS, "use_cache": False}):
            first = model.output.past_key_values.save()
            logits = model.output.logits.save()
        with tracer.invoke({"input_ids": [5, 9], "use_cache": True}):
            other = model.output.logits.save()
    assert first.value is None
    assert tools.difference(logits.value, plain(module, IDS)) is None
    assert tools.difference(other.value, plain(module, [5, 9])) is None


# ---------------------------------------------------------------- what is refused


BAD: dict[str, tuple[Any, str]] = {
    "empty string": ("", "empty"),
    "empty list": ([], "empty"),
    "list with an empty string": (["w5", ""], "empty"),
    "list with an empty list": ([[5], []], "empty"),
    "empty tensor": (torch.zeros(0, dtype=torch.long), "empty"),
    "empty batch": (torch.zeros(0, 4, dtype=torch.long), "empty"),
    "float ids": (torch.tensor([1.0, 2.0]), "whole numbers"),
    "list of floats": ([1.5, 2.5], "whole numbers"),
    "list of lists of floats": ([[1.5, 2.5]], "whole numbers"),
    "boolean tensor": (torch.tensor([True, False]), "whole numbers"),
    "3-D tensor": (torch.zeros(1, 2, 3, dtype=torch.long), r"\[token\] or \[row, token\]"),
    "0-D tensor": (torch.tensor(4), r"\[token\] or \[row, token\]"),
    "id above the vocabulary": ([5, 61], "61 is outside the vocabulary of 61"),
    "negative id": ([5, -1], "-1 is outside the vocabulary"),
    "too long": ([5] * 33, "33 tokens.*positions for 32"),
    "a number": (7, "type int"),
    "mixed list": (["w5", 7], "type list"),
    "mapping without ids": ({"attention_mask": [1, 1]}, "neither `input_ids` nor"),
    "mask of another length": (
        {"input_ids": [5, 9], "attention_mask": [1, 1, 1]},
        "`attention_mask` has shape",
    ),
    "nested too deep": ([[5], [[9, 4], [3, 3]]], "a prompt of the list has shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_a_prompt_is_refused(case: str, model: Any) -> None:
    prompt, message = BAD[case]
    with pytest.raises(InputError, match=f"(?s){message}"):
        with model.trace() as tracer:
            with tracer.invoke(prompt):
                pass


def test_nothing_as_a_prompt_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match="type NoneType"), model.trace() as tracer:
        with tracer.invoke(None):
            pass


def test_a_mask_without_any_token_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match="masks every token"):
        with model.trace(input_ids=IDS, attention_mask=[0, 0, 0, 0]):
            pass


def test_text_without_a_tokenizer_is_refused(tools: Any) -> None:
    with pytest.raises(InputError, match="no tokenizer, so it cannot read text"):
        with tools.model("gpt2").trace("some text"):
            pass


def test_opt_knows_its_context(tools: Any) -> None:
    with pytest.raises(InputError, match="33 tokens"):
        with tools.model("opt").trace([5] * 33):
            pass
    with tools.model("opt").trace([5] * 32):
        logits = tools.model("opt").output.logits.save()
    assert logits.shape == (1, 32, tools.vocabulary)


def test_roberta_knows_its_context(tools: Any) -> None:
    with pytest.raises(InputError, match="33 tokens"):
        with tools.model("roberta").trace([5] * 33):
            pass
    with tools.model("roberta").trace([5] * 32):
        logits = tools.model("roberta").output.logits.save()
    assert logits.shape == (1, 32, tools.vocabulary)


def test_rotary_models_have_no_hard_context(tools: Any) -> None:
    with tools.model("llama").trace([5] * 40):
        logits = tools.model("llama").output.logits.save()
    assert logits.shape == (1, 40, tools.vocabulary)


@pytest.mark.parametrize("name", ["remote", "server"])
def test_running_elsewhere_is_refused(name: str, model: Any) -> None:
    with pytest.raises(InputError, match=f"{name}=.*not in this release"):
        with model.trace(IDS, **{name: True}):
            pass


def test_several_positional_prompts_are_refused(model: Any) -> None:
    with pytest.raises(InputError, match="takes one prompt, 2 were given; use a list"):
        with model.trace(IDS, IDS):
            pass


def test_ids_given_twice_are_refused(model: Any) -> None:
    with pytest.raises(InputError, match="`input_ids` was given twice"):
        with model.trace(IDS, input_ids=IDS):
            pass


def test_no_block_is_left_open_after_a_refused_prompt(model: Any) -> None:
    with pytest.raises(GraftworkError):
        with model.trace() as tracer:
            with tracer.invoke(""):
                pass
    with model.trace(IDS):
        logits = model.output.logits.save()
    assert logits.shape == (1, 4, 61)


def unpaddable() -> Any:
    """RWKV: a recurrence that takes no mask, so padding would run through it."""
    torch.manual_seed(0)
    config = transformers.RwkvConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=2, context_length=32,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.RwkvForCausalLM(config).eval()


def test_prompts_of_a_model_that_cannot_be_padded_run_apart(tools: Any) -> None:
    module = unpaddable()
    model = LanguageModel(module)
    prompts = tools.prompts(3, 6, 3)
    saved = []
    with model.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                saved.append(model.rwkv.blocks[1].output[0].save())
                saved.append(model.output.logits.save())
    for prompt, hidden, logits in zip(prompts, saved[::2], saved[1::2], strict=True):
        expected = tools.plain(module, prompt[None])
        block = expected["rwkv.blocks.1", "output"][0]
        assert tools.difference(hidden.value, block) is None
        assert tools.difference(logits.value, expected["", "output"].logits) is None


def test_generations_of_a_model_that_cannot_be_padded_are_joined_in_order(tools: Any) -> None:
    module = unpaddable()
    model = LanguageModel(module)
    prompts = tools.prompts(3, 6, 3)
    with model.generate(max_new_tokens=3, do_sample=False, pad_token_id=0) as generator:
        for prompt in prompts:
            with generator.invoke(prompt):
                pass
    assert generator.output.shape == (3, 9)
    for row, prompt in zip(generator.output, prompts, strict=True):
        expected = module.generate(prompt[None], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert row[-3:].tolist() == expected[0, -3:].tolist()
        assert row[6 - len(prompt) : 6].tolist() == prompt.tolist()


def test_rows_that_would_need_padding_are_refused_where_padding_is_not_known(tools: Any) -> None:
    model = LanguageModel(unpaddable())
    with pytest.raises(InputError, match="Give each prompt an invoke"):
        with model.trace([[3, 4], [5]]):
            pass
    with model.trace([[3, 4], [5, 6]]):
        logits = model.output.logits.save()
    assert logits.shape == (2, 2, 61)


@pytest.mark.slow
def test_an_architecture_that_was_not_verified_is_not_padded(tools: Any) -> None:
    """RecurrentGemma takes mask and positions, but its convolution sees the padding."""
    torch.manual_seed(0)
    config = transformers.RecurrentGemmaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, lru_width=16, attention_window_size=8, conv1d_width=4,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    module = transformers.RecurrentGemmaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model = LanguageModel(module)
    prompts = tools.prompts(3, 7)
    saved = []
    with model.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                saved.append(model.output.logits.save())
    for prompt, logits in zip(prompts, saved, strict=True):
        with torch.no_grad():
            expected = module(prompt[None]).logits
        assert tools.difference(logits.value, expected) is None
