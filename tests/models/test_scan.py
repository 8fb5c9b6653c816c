"""`scan`: a block that is checked without weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graftwork
from graftwork import GraftworkError, LanguageModel, Model
from graftwork.tracing.errors import UnreachedError

PROMPT = "The Eiffel Tower is in the city of"


def test_shapes_without_weights() -> None:
    model = LanguageModel("graftwork/tiny")
    with model.scan(PROMPT) as tracer:
        h = model.transformer.h[0].output
        assert h.shape == (1, 8, 128) and h.dtype == torch.float32
        saved = (h @ h.mT).softmax(-1).save()
        model.transformer.h[1].output[:, -1] = 0
        logits = tracer.output.logits.save()
    assert not model.loaded
    assert saved.value.is_meta and saved.shape == (1, 8, 8)
    assert logits.value.is_meta
    with model.trace(PROMPT) as tracer:
        real = tracer.output.logits.save()
    assert real.shape == logits.shape and real.dtype == logits.dtype


def test_each_prompt_has_its_own_length() -> None:
    model = LanguageModel("graftwork/tiny")
    with model.scan() as tracer:
        with tracer.invoke(PROMPT):
            one = model.transformer.h[0].output.save()
        with tracer.invoke(["Big Ben is in the city of", "The Louvre is in"]):
            two = model.transformer.h[0].output.save()
    assert not model.loaded and one.shape == (1, 8, 128)
    ids = model.tokenizer(["Big Ben is in the city of", "The Louvre is in"]).input_ids
    assert two.shape == (2, max(map(len, ids)), 128)


def test_a_value_is_refused() -> None:
    model = LanguageModel("graftwork/tiny")
    with model.scan(PROMPT):
        with pytest.raises(GraftworkError, match=r"inside `scan` there are no values.*test_scan"):
            float(model.transformer.h[0].output.sum())
    assert not model.loaded


def test_a_wrong_operation_is_of_its_line() -> None:
    model = LanguageModel("graftwork/tiny")
    with pytest.raises(RuntimeError) as caught:
        with model.scan(PROMPT):
            model.transformer.h[0].output @ torch.zeros(3, 3)
    assert "test_scan.py" in str(caught.value).splitlines()[0]
    assert not model.loaded


def test_a_write_that_does_not_fit() -> None:
    model = LanguageModel("graftwork/tiny")
    with pytest.raises(GraftworkError, match=r"(?s)test_scan\.py.*does not fit"):
        with model.scan(PROMPT):
            model.transformer.h[0].output = torch.zeros(1, 8, 5)
    assert not model.loaded


def test_a_write_that_needs_a_later_value() -> None:
    model = LanguageModel("graftwork/tiny")
    with pytest.raises(GraftworkError, match="computed later in the same forward"):
        with model.scan(PROMPT):
            model.transformer.h[0].output[:] = model.transformer.h[2].output
    assert not model.loaded


def test_what_the_numbers_decide_is_left_to_the_run() -> None:
    model = LanguageModel("graftwork/tiny")
    with model.scan(PROMPT):
        h = model.transformer.h[0].output
        large = graftwork.apply(lambda t: t.tolist(), h).save()
        known = h.sum().save()
    assert known.shape == ()
    with pytest.raises(GraftworkError, match="real value"):
        large.value


def test_a_plain_module_does_not_run() -> None:
    module, ran = nn.Sequential(nn.Linear(4, 6), nn.ReLU()), []
    with torch.no_grad():
        module(torch.ones(2, 4))
    model = Model(module)
    with model.scan(torch.ones(2, 4)):
        h = model[0].output.save()
        handle = module[0].register_forward_hook(lambda *_: ran.append(1))
    handle.remove()
    assert h.value.is_meta and h.shape == (2, 6) and not ran


def test_a_scan_with_a_cache_has_the_shapes_of_what_the_forward_reaches() -> None:
    class Spare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = torch.nn.Linear(4, 5), torch.nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with Model(Spare()).scan(torch.randn(2, 4)) as tracer:
        cache = tracer.cache()
    assert cache.keys() == ["used"] and cache["used"].output.shape == (2, 5)
    with pytest.raises(UnreachedError, match="never reached this place"):
        _ = cache["spare"].output
