"""What is typed of inner operations: listing, names, suggestions, and what may not be assigned."""

from __future__ import annotations

import inspect

import pytest
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from graftwork import LanguageModel
from graftwork.tracing.errors import BlockError, OperationError, SourceError


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("graftwork/tiny")


def test_the_listing_has_the_lines_of_the_file(model: LanguageModel) -> None:
    shown = str(model.transformer.h[0].mlp.source)
    lines, first = inspect.getsourcelines(GPT2MLP.forward)
    number = first + next(i for i, line in enumerate(lines) if "self.act(" in line)
    assert f"modeling_gpt2.py:{first}" in shown.splitlines()[0]
    assert any(line.split()[:3] == ["self_act_0", "→", str(number)] for line in shown.splitlines())


def test_operations_are_listed_in_the_order_of_the_text(model: LanguageModel) -> None:
    source = model.transformer.h[0].mlp.source
    names = ["self_c_fc_0", "self_act_0", "self_c_proj_0", "self_dropout_0"]
    assert [operation.name for operation in source] == names
    assert dir(source) == sorted(names)
    assert len(source) == 4 and bool(source)
    assert "self_act_0" in repr(source.self_act_0)


def test_an_inner_function_is_listed(model: LanguageModel) -> None:
    inner = model.transformer.h[0].attn.source.attention_interface_0.source
    assert "scaled_dot_product_attention_0" in dir(inner)
    assert "softmax_0" not in dir(inner) and not model.loaded
    assert "scaled_dot_product_attention_0" in dir(model.transformer.h[0].attn.functions)


def test_a_wrong_name_is_suggested(model: LanguageModel) -> None:
    with pytest.raises(SourceError, match="Did you mean `self_act_0`"):
        model.transformer.h[0].mlp.source.self_akt_0
    with pytest.raises(AttributeError):
        model.transformer.h[0].mlp.source.__wrapped__


def test_outside_a_block_and_wrong_assignments(model: LanguageModel) -> None:
    operation = model.transformer.h[0].mlp.source.self_act_0
    with pytest.raises(BlockError, match="only known inside a block"):
        operation.output
    with pytest.raises(OperationError, match="cannot be assigned"):
        operation.scores = 1
    with pytest.raises(OperationError, match="counted from 0"):
        operation.calls[-1]
