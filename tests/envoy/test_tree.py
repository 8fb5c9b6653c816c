"""The module tree as HTML: what it says of a model, without its weights."""

from html.parser import HTMLParser
from typing import Any

import torch
from torch import nn
from transformers import GPT2LMHeadModel

from graftwork import LanguageModel, Model


class Page(HTMLParser):
    """The text and tags of a page whose tags are all closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_tree_names_modules_shapes_and_counts(
    gpt2: LanguageModel, gpt2_module: GPT2LMHeadModel
) -> None:
    page = Page(gpt2._repr_html_())
    total = sum(p.numel() for p in gpt2_module.parameters())
    assert "GPT2LMHeadModel" in page.text and f"{total / 1e3:.1f}K parameters" in page.text
    assert "not loaded" not in page.text
    config = gpt2_module.config
    assert f"{config.n_layer} × GPT2Block" in page.text and f"0 … {config.n_layer - 1}" in page.text
    # The blocks are described once, in full.
    assert page.text.count("c_attn") == 1 and page.text.count("c_fc") == 1
    assert f"weight [{config.vocab_size}, {config.n_embd}] float32" in page.text


def test_tree_of_a_part(gpt2: LanguageModel, gpt2_module: GPT2LMHeadModel) -> None:
    text = Page(gpt2.transformer.h[1].mlp._repr_html_()).text
    assert text.startswith("transformer.h.1.mlp GPT2MLP") and "c_proj" in text
    assert "attn" not in text


def test_tree_is_shown_without_loading_and_without_a_block() -> None:
    model = LanguageModel("graftwork/tiny")
    text = Page(model._repr_html_()).text
    assert "weights not loaded" in text and "1.1M parameters" in text and "4 × GPT2Block" in text
    assert not model.loaded
    with model.trace("The") as tracer:
        model.transformer.h[0]._repr_html_()
        assert len(tracer.graph) == 0
        model.lm_head.output.save()
    assert "not loaded" not in model._repr_html_()


def test_only_numbered_equal_modules_are_counted_together() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(4, 4)
            self.k_proj = nn.Linear(4, 4)
            self.layers = nn.ModuleList(
                [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(4, 4)]
            )
            self.nothing = None
            self.register_module("absent", None)
            self.lazy = nn.LazyLinear(3)
            self.register_buffer("mask", torch.ones(2, dtype=torch.bool))

    text = Page(Model(Attention())._repr_html_()).text
    assert "q_proj" in text and "k_proj" in text and "… k_proj" not in text
    assert "2 × Linear" in text and "0 … 1" in text and "3 × " not in text
    assert "mask [2] bool" in text and "not known yet" in text and "absent" not in text


def test_names_are_escaped() -> None:
    class Odd(nn.Module):
        def extra_repr(self) -> str:
            return "<script>alert(1)</script>"

    module = nn.Module()
    module.add_module("<b>&", Odd())
    page = Page(Model(module)._repr_html_())
    assert "script" not in page.tags and "<b>&" in page.text and page.tags.count("b") == 1
