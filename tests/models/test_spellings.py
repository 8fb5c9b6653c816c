"""What users of other libraries write, and what has a plain meaning without a block."""

import copy
import json
import traceback
from typing import Any

import numpy as np
import pytest
import torch

import graftwork
from graftwork import GraftworkError, LanguageModel
from graftwork.tracing.errors import (
    BlockError,
    InputError,
    OperationError,
    UnavailableNameError,
    UnknownModuleError,
)

PROMPT = "The Eiffel Tower is in the city of"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def model() -> Any:
    found = LanguageModel("graftwork/tiny")
    found.load()
    return found


@pytest.fixture(scope="module")
def plain(model: Any) -> Any:
    return model.load()


@pytest.fixture
def ids(model: Any) -> torch.Tensor:
    return model.tokenizer(PROMPT, return_tensors="pt").input_ids


def test_a_text_is_the_plain_forward(model: Any, plain: Any, ids: torch.Tensor) -> None:
    expected = plain(ids).logits
    torch.testing.assert_close(model(PROMPT).logits, expected)
    torch.testing.assert_close(model([PROMPT]).logits, expected)
    torch.testing.assert_close(model(ids.tolist()).logits, expected)
    torch.testing.assert_close(model(ids).logits, expected)
    encoding = model.tokenizer(PROMPT, return_tensors="pt")
    torch.testing.assert_close(model(**encoding).logits, expected)
    torch.testing.assert_close(model(PROMPT, labels=ids).loss, plain(ids, labels=ids).loss)


def test_a_plain_call_takes_gradients(model: Any, plain: Any) -> None:
    weight = plain.transformer.h[0].mlp.c_fc.weight
    weight.grad = None
    model(PROMPT).logits[:, -1].sum().backward()
    assert weight.grad is not None
    weight.grad = None
    with torch.no_grad():
        assert not model(PROMPT).logits.requires_grad


def test_a_plain_call_of_an_edited_view_has_its_edits(
    model: Any, plain: Any, ids: torch.Tensor
) -> None:
    with model.edit() as edited:
        edited.transformer.h[1].mlp.output[:] = 0
    handle = plain.transformer.h[1].mlp.register_forward_hook(lambda m, i, o: o * 0)
    expected = plain(ids).logits
    handle.remove()
    for given in (ids, PROMPT):
        torch.testing.assert_close(edited(given).logits, expected)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)


def test_generate_without_with_is_its_ids(model: Any, plain: Any, ids: torch.Tensor) -> None:
    expected = plain.generate(ids, max_new_tokens=2, do_sample=False)
    found = model.generate(PROMPT, max_new_tokens=2)
    assert torch.equal(found[0], expected[0])
    assert found.shape == expected.shape and len(found) == 1
    assert found.tolist() == expected.tolist()
    assert [row.tolist() for row in found] == expected.tolist()
    assert torch.equal(torch.cat([found, found]), torch.cat([expected, expected]))
    assert torch.equal(model.generate(PROMPT, max_new_tokens=2).output, expected)
    assert model.tokenizer.decode(found[0]) == model.tokenizer.decode(expected[0])


def test_trace_without_with_is_its_output(model: Any, plain: Any, ids: torch.Tensor) -> None:
    torch.testing.assert_close(model.trace(PROMPT).output.logits, plain(ids).logits)
    torch.testing.assert_close(model.trace(PROMPT).logits, plain(ids).logits)


def test_a_block_is_no_value(model: Any) -> None:
    with model.trace(PROMPT) as tracer:
        with pytest.raises(OperationError, match=r"a block is no value.*tracer\.output"):
            tracer[0]
        with pytest.raises(BlockError, match=r"has no `invok`. Did you mean `invoke`"):
            tracer.invok
        model.transformer.h[0].output.save()
    with pytest.raises(OperationError, match="a block is no value"):
        len(tracer)
    with pytest.raises(BlockError, match="has no prompt"):
        model.generate(max_new_tokens=2)[0]
    assert not hasattr(tracer, "nothing_like_it") and copy.copy(tracer) is not tracer


@pytest.fixture
def chatting(model: Any) -> Any:
    before = model.tokenizer.chat_template
    model.tokenizer.chat_template = TEMPLATE
    yield model
    model.tokenizer.chat_template = before


def test_chat_messages(chatting: Any, plain: Any) -> None:
    tokenizer = chatting.tokenizer
    one = [{"role": "user", "content": "Big Ben is in"}]
    own = [*one, {"role": "assistant", "content": "the city of"}]

    def written(talk: Any, asks: bool) -> torch.Tensor:
        text = tokenizer.apply_chat_template(
            talk, tokenize=False, add_generation_prompt=asks, continue_final_message=not asks
        )
        return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    for given, asks in ((one, True), (own, False), (one[0], True)):
        talk = given if isinstance(given, list) else [given]
        with chatting.trace(given) as tracer:
            logits = tracer.output.logits.save()
        torch.testing.assert_close(logits.value, plain(written(talk, asks)).logits)
    with chatting.trace() as tracer:
        with tracer.invoke([one, own]):
            last = chatting.lm_head.output[:, -1].save()
    expected = [plain(written(one, True)).logits[0, -1], plain(written(own, False)).logits[0, -1]]
    torch.testing.assert_close(last.value, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_chat_messages_that_cannot_be_read(model: Any) -> None:
    message = [{"role": "user", "content": "Big Ben is in"}]
    with pytest.raises(InputError, match=r"has no chat template.*Give the text"):
        model.trace(message)
    without = LanguageModel(model.load())
    with pytest.raises(InputError, match="has no tokenizer, so it cannot read messages"):
        without.trace(message)
    with pytest.raises(GraftworkError, match="neither `input_ids`"):
        model.trace({"role": "user"})


OUTSIDE = [
    "m.transfomer",
    "m.transformer.h[99]",
    "m.transformer.h[-9]",
    'm.transformer.h["x"]',
    "m.transformer.h[1.5]",
    "m.transformer.h[None]",
    'm.get("transformer.h.77")',
    'm.get("")',
    "m.layers[77]",
    'm.layers["a"]',
    "m.layers[0].nope",
    'm.layers[0]["attn.W_X"]',
    'm.hook("")',
    "m.transformer.h[1].output",
    "b.output",
    "b.output = 3",
    "b.output.save()",
    "b.input",
    "b.output[0]",
    "m.layers[0].z",
    "b.output.save",
    "b.skip(0)",
    "b.source.nope",
    "m.output",
    'm.trace("")',
    "m.trace([])",
    "m.trace([[]])",
    "m.trace(None)",
    "m.trace(3)",
    "m.trace(3.5)",
    "m.trace(True)",
    "m.trace([True, False])",
    "m.trace([1.5, 2.0])",
    "m.trace([99999999])",
    "m.trace([-1])",
    "m.trace(torch.tensor([1.5]))",
    "m.trace(torch.tensor([True]))",
    "m.trace(torch.zeros(2,3,4))",
    "m.trace(torch.tensor(3))",
    'm.trace(["a", 3])',
    'm.trace(["a", None])',
    'm.trace(["a", ""])',
    "m.trace({})",
    'm.trace(b"abc")',
    'm.trace({"input_ids": None})',
    'm.trace([[1, 2], ["a"]])',
    "m.get(3)",
    "m.hook(5)",
    "m.set_hook_config(3)",
    "graftwork.apply(3)",
    "m.trace().output",
    "m.trace(P).outputs",
]
INSIDE = [
    "h = b.output[0]; h.nope()",
    "h = b.output[0]; h.summ()",
    "b.output = None",
    'b.output = "a"',
    "b.output = 3",
    "b.output[0] = torch.zeros(2)",
    "b.output.value",
    "v = b.output[0].save(); v.value",
    "np.array(b.output[0].shape); np.linalg.norm(b.nope)",
    "b.outptu",
    "b.Output",
    "b.outputs",
    "b.save()",
    "m.save()",
    "t.save()",
    "t.nope",
    't.invoke("x")',
    "t.next()",
    "t.iter[0]",
    "t.all()",
    't.cache("nope")',
    "t.cache(modules=[None])",
    "with m.trace(P): pass",
    "with m.session(): pass",
    "with m.edit(): pass",
    "with m.scan(P): pass",
]


def names(model: Any) -> dict[str, Any]:
    block = model.transformer.h[1]
    return {
        "m": model,
        "b": block,
        "P": PROMPT,
        "W": torch.zeros(3, 4),
        "torch": torch,
        "np": np,
        "graftwork": graftwork,
        "json": json,
    }


def check(error: BaseException, most: int) -> None:
    """A sentence of ours, and few frames below the user's line."""
    assert len(str(error)) > 15
    frames = traceback.extract_tb(error.__traceback__)
    own = [i for i, frame in enumerate(frames) if frame.filename == "<mistake>"]
    assert len(frames) - own[0] <= most, frames


@pytest.mark.parametrize("mistake", OUTSIDE)
def test_a_mistake_outside_a_block(model: Any, mistake: str) -> None:
    with pytest.raises(GraftworkError) as caught:
        exec(compile(mistake, "<mistake>", "exec"), names(model))
    check(caught.value, 5)


@pytest.mark.parametrize("mistake", INSIDE)
def test_a_mistake_in_a_block(model: Any, mistake: str) -> None:
    with pytest.raises(GraftworkError) as caught:
        with model.trace(PROMPT) as tracer:
            exec(compile(mistake, "<mistake>", "exec"), {**names(model), "t": tracer})
    if any(f.filename == "<mistake>" for f in traceback.extract_tb(caught.value.__traceback__)):
        check(caught.value, 5)
    else:
        assert "<mistake>:1" in str(caught.value).splitlines()[0]


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("run_with_cache", r"`cache = tracer\.cache\(\)`.*HookedTransformer\(model\)"),
        ("to_tokens", r"`model\.tokenizer\(text"),
        ("blocks", r"`model\.layers`"),
        ("run_with_hooks", r"`model\.layers\[3\]\.resid_post = value`"),
        ("W_Q", r"`model\.weights\.W_Q`"),
        ("hook_embed", r'`model\.hook\("hook_embed"\)`'),
        ("hook_resid_pre", r'`model\.hook\("blocks\.3\.hook_resid_pre"\)`'),
        ("layers_output", r"`model\.layers\[3\]\.resid_post`"),
    ],
)
def test_names_of_other_libraries_say_what_is_written_here(
    model: Any, name: str, here: str
) -> None:
    with pytest.raises(UnknownModuleError, match=here):
        getattr(model, name)
    assert not hasattr(model, name)  # as code that asks for it expects


def test_a_size_that_there_is_not_names_those_near_it(model: Any) -> None:
    with pytest.raises(UnavailableNameError, match=r"`n_layer_s` is no size.*`n_layers`"):
        _ = model.cfg.n_layer_s
    assert copy.deepcopy(model.cfg) == model.cfg and not hasattr(model.cfg, "nope")


def test_get_gives_a_default_for_a_module_that_there_is_not(model: Any) -> None:
    assert model.get("transformer.nope", None) is None and model.get("nope", 3) == 3
    assert model.transformer.get("h.1", None) is model.transformer.h[1]
    with pytest.raises(UnknownModuleError, match="`nope`"):
        model.get("transformer.nope")
