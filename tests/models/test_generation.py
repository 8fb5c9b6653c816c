"""What a step is, and what the options of `generate` ask of a batch, against plain transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, WatermarkingConfig

from graftwork import LanguageModel
from graftwork.inputs.generation import LENGTH, OPTIONS, ROWS, Options
from graftwork.tracing.errors import BlockError

LONG, SHORT, ONE = [11, 3, 40, 22, 8, 3, 40], [5, 17, 9], [17]
PLAIN: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def module() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=48, n_embd=16, n_layer=3, n_head=4, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def model(module: Any) -> LanguageModel:
    return LanguageModel(module)


def plain(module: Any, ids: list[int], **options: Any) -> list[list[int]]:
    found = module.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **{**PLAIN, **options}
    )
    return found.tolist()


def steps(module: Any, ids: list[int], path: str, edit: Any = None, **options: Any) -> Any:
    """The ids of transformers, and what plain hooks see at a module in each forward."""
    seen: list[torch.Tensor] = []

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        if edit is not None:
            value = edit(value.clone())
        seen.append(value.clone())
        return (value, *output[1:]) if isinstance(output, tuple) else value

    handle = module.get_submodule(path).register_forward_hook(hook)
    try:
        return plain(module, ids, **options), seen
    finally:
        handle.remove()


# ---------------------------------------------------------------- the table of options


def test_every_option_of_transformers_is_in_the_table() -> None:
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    signature = inspect.signature(transformers.GenerationMixin.generate).parameters
    known |= {name for name in signature if name not in ("self", "inputs", "kwargs")}
    assert known - set(OPTIONS) == set()


@pytest.mark.parametrize("name", [name for name, one in OPTIONS.items() if one.kind != ROWS])
def test_the_defaults_ask_for_nothing(name: str) -> None:
    default = GenerationConfig._get_default_generation_params().get(name)
    assert OPTIONS[name].is_neutral(None)
    assert OPTIONS[name].is_neutral(default)


def test_one_is_neutral_for_factors_alone() -> None:
    for name in ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length"):
        assert list(Options({name: 1}, None).asking(LENGTH)) == [name]
    for name in ("repetition_penalty", "guidance_scale"):
        assert list(Options({name: 0}, None).asking(LENGTH)) == [name]
        assert list(Options({name: 1.0}, None).asking(LENGTH)) == []


def test_a_given_configuration_leaves_the_rest_to_the_model() -> None:
    own = GenerationConfig(eos_token_id=5, num_beams=2)
    options = Options({"generation_config": GenerationConfig(num_beams=3), "top_k": None}, own)
    assert options.get("num_beams") == 3 and options.get("eos_token_id") == 5
    assert Options({"eos_token_id": None}, own).get("eos_token_id") is None


class Mixes(LogitsProcessor):
    """Makes each row's scores depend on the others."""

    def __call__(self, ids: Any, scores: Any) -> Any:
        return scores - 3 * scores.roll(1, -1).mean(0, keepdim=True)


class Counts(LogitsProcessor):
    """Has a state: another token at each call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, ids: Any, scores: Any) -> Any:
        self.calls += 1
        scores = scores.clone()
        scores[:, self.calls + 10] = 1e4
        return scores


class Long(StoppingCriteria):
    def __call__(self, ids: Any, scores: Any, **options: Any) -> Any:
        return torch.full((len(ids),), ids.shape[1] >= 8)


#: Options that look at the ids, at their number, or at other rows; each with something to ask.
ASKED: dict[str, Callable[[], dict[str, Any]]] = {
    "no_repeat_ngram_size": lambda: {"no_repeat_ngram_size": 1},
    "no_repeat_ngram_size of 2": lambda: {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": lambda: {"encoder_no_repeat_ngram_size": 1},
    "repetition_penalty": lambda: {"repetition_penalty": 5.0},
    "encoder_repetition_penalty": lambda: {"encoder_repetition_penalty": 5.0},
    "min_length": lambda: {"min_length": 6, "eos_token_id": list(range(1, 58))},
    "max_length": lambda: {"max_length": 9, "max_new_tokens": None},
    "bad_words_ids": lambda: {"bad_words_ids": [[0, *SHORT, k] for k in range(1, 58)]},
    "sequence_bias": lambda: {"sequence_bias": {(0, *SHORT, 33): 1e4}},
    "guidance_scale": lambda: {"guidance_scale": 3.0},
    "guidance_scale of 0": lambda: {"guidance_scale": 0.0},
    "watermarking_config": lambda: {
        "watermarking_config": WatermarkingConfig(bias=9.0, context_width=4, seeding_scheme="lefthash")
    },
    "forced_bos_token_id": lambda: {"forced_bos_token_id": 33},
    "begin_suppress_tokens": lambda: {
        "begin_suppress_tokens": list(range(1, 50)), "forced_bos_token_id": 33
    },
    "prefix_allowed_tokens_fn": lambda: {
        "prefix_allowed_tokens_fn": lambda row, ids: [row + 1, row + 2]
    },
    "logits_processor": lambda: {"logits_processor": [Mixes()]},
    "stopping_criteria": lambda: {"stopping_criteria": [Long()]},
    "prompt_lookup_num_tokens": lambda: {"prompt_lookup_num_tokens": 1},
    "prefill_chunk_size": lambda: {"prefill_chunk_size": 2},
    "cache_implementation": lambda: {"cache_implementation": "static"},
    "generation_config": lambda: {
        "generation_config": GenerationConfig(
            max_new_tokens=6, no_repeat_ngram_size=1, do_sample=False, pad_token_id=0
        ),
        "max_new_tokens": 6,
    },
}  # fmt: skip


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("name", ASKED)
def test_an_option_asks_the_same_of_a_prompt_in_a_batch_and_alone(
    name: str, looks: bool, module: Any, model: Any
) -> None:
    prompts = [LONG, SHORT, ONE, list(reversed(SHORT))]
    invokers = []
    with model.generate(**{**PLAIN, **ASKED[name]()}) as generator:
        for prompt in prompts:
            with generator.invoke(prompt) as invoker:
                if looks:
                    model.transformer.h[1].output.save()
            invokers.append(invoker)
    for prompt, invoker in zip(prompts, invokers, strict=True):
        assert invoker.output.tolist() == plain(module, prompt, **ASKED[name]())


@pytest.mark.parametrize("name", ["bad_words_ids", "forced_bos_token_id"])
def test_those_options_would_feel_the_padding(name: str, module: Any) -> None:
    """That the test above can fail: transformers' own padded batch gives something else."""
    prompt = ONE if name == "forced_bos_token_id" else SHORT
    pad = len(LONG) - len(prompt)
    ids = torch.tensor([LONG, [0] * pad + prompt])
    mask = torch.tensor([[1] * len(LONG), [0] * pad + [1] * len(prompt)])
    padded = module.generate(ids, attention_mask=mask, **{**PLAIN, **ASKED[name]()})
    alone = plain(module, prompt, **ASKED[name]())
    assert padded[1, len(LONG) :].tolist() != alone[0][len(prompt) :]


# ---------------------------------------------------------------- what a step is


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 3},
        {"prompt_lookup_num_tokens": 1},
        {"prompt_lookup_num_tokens": 4},
        {"generation_config": GenerationConfig(prefill_chunk_size=3, pad_token_id=0)},
        {"assistant_early_exit": 1},
    ],
    ids=str,
)
def test_a_step_is_the_prompt_and_then_one_token(
    options: dict[str, Any], module: Any, model: Any
) -> None:
    def edit(value: torch.Tensor) -> torch.Tensor:
        value[:, -1] *= -2
        return value

    ids, seen = steps(module, LONG, "transformer.h.1", edit)
    with model.generate(LONG, **{**PLAIN, **options}) as generator, generator.all():
        hidden = model.transformer.h[1].output
        hidden[:, -1] *= -2
        hidden.save()
    assert generator.output.tolist() == ids
    assert len(hidden.value) == 6
    for mine, theirs in zip(hidden.value, seen, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("looks", [False, True])
def test_an_assistant_changes_no_step(looks: bool, module: Any, model: Any) -> None:
    torch.manual_seed(1)
    assistant = transformers.GPT2LMHeadModel(module.config).eval()
    ids, seen = steps(module, LONG, "transformer.h.1")
    with model.generate(LONG, assistant_model=assistant, **PLAIN) as generator:
        if looks:
            with generator.all():
                hidden = model.transformer.h[1].output.save()
    assert generator.output.tolist() == ids
    if looks:
        for mine, theirs in zip(hidden.value, seen, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompt_lookup_num_tokens": 2, "do_sample": True}, "prompt_lookup_num_tokens"),
        ({"custom_generate": lambda *_, **__: None}, "custom_generate"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged'"),
        ({"token_healing": True}, "token_healing"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_where_forwards_are_no_steps_a_block_that_looks_at_them_is_refused(
    options: dict[str, Any], named: str, model: Any
) -> None:
    with (
        pytest.raises(
            BlockError, match=rf"test_generation\.py:\d+.*inside a generation.*`{named}`"
        ),
        model.generate(LONG, **{**PLAIN, **options}),
    ):
        model.transformer.h[1].output.save()


def test_forwards_of_logits_processors_are_no_steps(module: Any, model: Any) -> None:
    def edit(value: torch.Tensor) -> torch.Tensor:
        value[:, -1] = 0
        return value

    class Asks(LogitsProcessor):
        """Runs the model by itself between two steps."""

        def __call__(self, ids: Any, scores: Any) -> Any:
            return scores + module(ids.flip(1)).logits[:, -1].detach()

    for options in ({"guidance_scale": 2.0}, {"logits_processor": [Asks()]}):
        with model.generate(LONG, **PLAIN, **options) as generator, generator.all():
            root = model.input.save()
            hidden = model.transformer.h[1].output.save()
        assert generator.output.tolist() == plain(module, LONG, **options)
        assert [one.shape[1] for one in hidden.value] == [len(LONG), 1, 1, 1, 1, 1]
        whole = generator.output[:, :-1]
        assert torch.cat(list(root.value), 1).tolist() == whole.tolist()
        with torch.no_grad():
            expected = module(whole, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(torch.cat(list(hidden.value), 1), expected, atol=1e-5, rtol=1e-4)
        # An edit is in the steps alone: guidance runs on the model as it is.
        with model.generate(LONG, **PLAIN, **options) as generator:
            model.transformer.h[1].output[:, -1] = 0
        assert generator.output.tolist() == first_step_edited(module, edit, **options)


def first_step_edited(module: Any, edit: Any, **options: Any) -> Any:
    calls = 0

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        return edit(output.clone()) if calls == 1 else output

    handle = module.transformer.h[1].register_forward_hook(hook)
    try:
        return plain(module, LONG, **options)
    finally:
        handle.remove()


# ---------------------------------------------------------------- rows of beams and sequences


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"generation_config": GenerationConfig(num_beams=2, pad_token_id=0)},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_of_a_ragged_list_have_each_rows_own_tokens(
    options: dict[str, Any], use_cache: bool, module: Any, model: Any
) -> None:
    options = {**PLAIN, "use_cache": use_cache, **options, "max_new_tokens": 3}

    def edit(value: torch.Tensor) -> torch.Tensor:
        if value.shape[1] != 1:
            value[:, 1] *= 2.5
        return value

    alone = [steps(module, ids, "transformer.h.1", edit, **options) for ids in (SHORT, LONG)]
    with model.generate(**options) as generator, generator.invoke([SHORT, LONG]):
        for step in range(3 if not use_cache else 1):
            with generator.iter[step]:
                hidden = model.transformer.h[1].output
                shape = hidden.shape
                hidden.t[1] *= 2.5
                first, last = hidden.t[0].save(), hidden.t[-1].save()
        with generator.iter[2]:
            later = model.transformer.h[1].output.t[-1].save()
            shape_later = model.transformer.h[1].output.shape
    seen = [one[1] for one in alone]
    at = 2 if not use_cache else 0
    for mine, column in ((first, 0), (last, -1)):
        expected = torch.cat([values[at][:, column] for values in seen])
        torch.testing.assert_close(mine.value, expected, atol=1e-5, rtol=1e-4)
    expected = torch.cat([values[2][:, -1] for values in seen])
    torch.testing.assert_close(later.value, expected, atol=1e-5, rtol=1e-4)
    each = max(options.get("num_beams", 2), 2)
    assert shape[0] == shape_later[0] == 2 * each
    width = len(LONG)
    assert [row[width:] for row in generator.output.tolist()] == [
        row[len(ids) :] for (rows, _), ids in zip(alone, (SHORT, LONG), strict=True) for row in rows
    ]


def test_an_encoder_has_no_beams() -> None:
    torch.manual_seed(0)
    t5 = seq2seq("t5")
    model: Any = LanguageModel(t5)
    with model.generate([5, 6, 7, 8], max_new_tokens=3, num_beams=2, do_sample=False):
        inside = model.encoder.final_layer_norm.output
        shape, encoded = inside.shape, inside.t[-1].save()
    with torch.no_grad():
        expected = t5.encoder(torch.tensor([[5, 6, 7, 8]])).last_hidden_state
    assert tuple(shape) == tuple(expected.shape)
    torch.testing.assert_close(encoded.value, expected[:, -1], atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- where a decoder begins


def seq2seq(kind: str) -> Any:
    common: dict[str, Any] = {"vocab_size": 61, "d_model": 16, "pad_token_id": 1}
    if kind == "t5":
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                **{**common, "pad_token_id": 0}, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
                decoder_start_token_id=0, eos_token_id=1,
            )
        ).eval()  # fmt: skip
    config = transformers.BartConfig(
        **common, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, bos_token_id=0,
        eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
        max_position_embeddings=32, init_std=1.0,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "looks", "options"),
    [
        ("bart", False, {}),
        ("bart", True, {"num_beams": 2}),
        ("bart", True, {"max_length": 6, "max_new_tokens": None}),
        ("t5", True, {}),
    ],
)
def test_a_start_token_that_ends_texts_ends_no_text(
    kind: str, looks: bool, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    module = seq2seq(kind)
    model: Any = LanguageModel(module)
    decoder = model.model.decoder.layers[1] if kind == "bart" else model.decoder.block[1]
    options = {"max_new_tokens": 5, "do_sample": False, **options}
    prompts, invokers = [[5, 6, 7, 8], [9, 10], [30, 31, 32]], []
    with model.generate(**options) as generator:
        for prompt in prompts:
            with generator.invoke(prompt) as invoker:
                if looks:
                    decoder.output.save()
            invokers.append(invoker)
    for prompt, invoker in zip(prompts, invokers, strict=True):
        expected = module.generate(torch.tensor([prompt]), **options).tolist()
        assert invoker.output.tolist() == expected
        assert len(expected[0]) > 1
    assert generator.output[:, 0].tolist() == [module.generation_config.decoder_start_token_id] * 3


# ---------------------------------------------------------------- graphs that run without recording


def test_a_compiled_generation_has_the_logits_of_all_positions(module: Any, model: Any) -> None:
    with model.generate(LONG, **{**PLAIN, "max_new_tokens": 2}) as generator:
        first = model.lm_head.output[:, 0].save()
        inside = model.lm_head.input[:, 0].save()
    again = generator.compile()
    with torch.no_grad():
        for ids, found in ((LONG, again()), (SHORT, again(SHORT))):
            logits = module(torch.tensor([ids])).logits[:, 0]
            torch.testing.assert_close(found[0], logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again()[0], first.value)
    torch.testing.assert_close(again()[1], inside.value)


def test_logits_of_all_positions_in_an_edited_view(module: Any, model: Any) -> None:
    with model.edit() as edited:
        model.lm_head.output[:, 0] *= 2
    with edited.generate(LONG, **PLAIN):
        found = edited.lm_head.output[:, 0].save()
    with torch.no_grad():
        expected = 2 * module(torch.tensor([LONG])).logits[:, 0]
    torch.testing.assert_close(found.value, expected, atol=1e-5, rtol=1e-4)


def test_rows_stand_in_the_order_of_the_prompts_where_one_uses_another(
    module: Any, model: Any
) -> None:
    """Batches are ordered by what waits for what; what the user sees of a whole batch is not."""
    prompts = [LONG, SHORT, [7, 7, 31]]
    with model.generate(max_new_tokens=1, pad_token_id=0) as generator:
        with generator.invoke(prompts[0]):
            used = model.transformer.h[0].output[0].mean()
        with generator.invoke(prompts[1]):
            model.transformer.h[1].output[0][:, -1, 0] += used * 0
        with generator.invoke(prompts[2]):
            pass
    with model.trace() as tracer:
        with tracer.invoke(prompts[0]):
            used = model.transformer.h[0].output[0].mean()
        with tracer.invoke(prompts[1]):
            model.transformer.h[1].output[0][:, -1, 0] += used * 0
        with tracer.invoke(prompts[2]):
            pass
        with tracer.invoke():
            logits = model.lm_head.output[:, -1].save()
    for row, ids in enumerate(prompts):
        wanted = plain(module, ids, max_new_tokens=1)[0]
        assert generator.output[row, -len(wanted) :].tolist() == wanted
        with torch.no_grad():
            alone = module(torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(logits[row], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("most", [1e-9, 1000.0])
def test_a_limit_of_time_ends_each_prompt_as_alone(module: Any, model: Any, most: float) -> None:
    with model.generate(**PLAIN, max_time=most) as generator:
        with generator.invoke(LONG) as one:
            pass
        with generator.invoke(SHORT) as other:
            pass
    assert one.output.tolist() == plain(module, LONG, max_time=most)
    assert other.output.tolist() == plain(module, SHORT, max_time=most)


def test_a_start_token_for_each_row_of_a_decoder() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=61, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=None,
    )  # fmt: skip
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    ids, other = torch.tensor([[5, 17, 9], [3, 4, 8]]), torch.tensor([[7, 2], [9, 6]])
    options = {**PLAIN, "decoder_start_token_id": [11, 3]}
    with LanguageModel(t5).generate(**options) as generator:
        with generator.invoke(ids) as one:
            pass
        with generator.invoke(other) as two:
            pass
    assert torch.equal(one.output, t5.generate(ids, **options))
    assert torch.equal(two.output, t5.generate(other, **options))
