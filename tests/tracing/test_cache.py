"""A cache of many modules, against plain hooks."""

import pytest
import torch

from graftwork import LanguageModel
from graftwork.tracing.errors import BlockError, UnknownModuleError

PROMPT = "The Eiffel Tower is in the city of"
OTHER = "Big Ben is in"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("graftwork/tiny")


def hooked(model, prompt, path, new=1):
    """What a module returns in each forward of a plain generation."""
    module, seen = model.load(), []
    handle = module.get_submodule(path).register_forward_hook(
        lambda m, a, output: seen.append(output) and None
    )
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    module.generate(ids, max_new_tokens=new, do_sample=False)
    handle.remove()
    return seen


def test_a_cache_holds_every_module_that_ran_for_its_prompt(model) -> None:
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            everything = tracer.cache()
        with tracer.invoke(OTHER):
            blocks = tracer.cache(["transformer.h.*", model.transformer.ln_f], dtype=torch.float64)
    assert blocks.keys() == [*(f"transformer.h.{i}" for i in range(4)), "transformer.ln_f"]
    assert {"lm_head", "transformer.h.0.attn.c_attn"} <= set(everything)
    assert "transformer.h" not in everything
    for cache, prompt, path in (
        (everything, PROMPT, "transformer.h.1"),
        (everything, PROMPT, "transformer.h.3.mlp.c_proj"),
        (blocks, OTHER, "transformer.h.2"),
    ):
        found = cache[path].output
        wanted = hooked(model, prompt, path)[0].to(found.dtype)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert blocks.transformer.h[2].output.dtype == torch.float64


def test_a_cache_holds_what_edits_leave(model) -> None:
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache("transformer.h.*", include_inputs=True)
        model.transformer.h[1].output[:] = 0
    assert not cache["transformer.h.1"].output.any()
    assert not cache["transformer.h.2"].inputs[0][0].any()
    assert len(cache) == 4


def test_a_cache_of_a_generation_has_each_step(model) -> None:
    with model.generate(PROMPT, max_new_tokens=3) as tracer:
        cache = tracer.cache([model.transformer.h[2]])
        model.transformer.h[0].output.save()
    wanted = hooked(model, PROMPT, "transformer.h.2", 3)
    for found, expected in zip(cache["transformer.h.2"].output, wanted, strict=True):
        torch.testing.assert_close(found, expected)


def test_what_a_cache_cannot_do_is_said(model) -> None:
    with pytest.raises(UnknownModuleError, match="transformer"):
        with model.trace(PROMPT) as tracer:
            tracer.cache("transformer.g.*")
    with pytest.raises(BlockError, match="no invoke"), model.trace() as tracer:
        tracer.cache()
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache("transformer.h.*")
        with pytest.raises(BlockError, match="has run"):
            _ = cache["transformer.h.0"].output
    with pytest.raises(KeyError, match="Did you mean"):
        _ = cache["transformer.h.9"]
    with pytest.raises(BlockError, match="include_inputs"):
        _ = cache["transformer.h.0"].inputs
