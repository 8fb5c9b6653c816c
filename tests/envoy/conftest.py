"""Tiny models, and the reference that blocks are compared with: plain torch hooks."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from graftwork import LanguageModel


def without_hooks(module: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def hooked(
    module: nn.Module,
    inputs: tuple[Any, ...],
    outputs: dict[str, Callable[[Any], Any]] | None = None,
    arguments: dict[str, Callable[[Any, Any], Any]] | None = None,
) -> Any:
    """The module's result with plain hooks on outputs and on arguments."""
    handles = [
        module.get_submodule(path).register_forward_hook(lambda _m, _a, out, f=f: f(out))
        for path, f in (outputs or {}).items()
    ]
    handles += [
        module.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, kwargs, f=f: f(args, kwargs), with_kwargs=True
        )
        for path, f in (arguments or {}).items()
    ]
    try:
        with torch.no_grad():
            return module(*inputs)
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture
def reference() -> Callable[..., Any]:
    return hooked


@pytest.fixture(scope="session")
def gpt2_module() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=3,
        n_embd=64,
        n_head=8,
        vocab_size=300,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def gpt2(gpt2_module: GPT2LMHeadModel) -> Iterator[LanguageModel]:
    yield LanguageModel(gpt2_module)
    assert without_hooks(gpt2_module)


@pytest.fixture(scope="session")
def llama_module() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def llama(llama_module: LlamaForCausalLM) -> Iterator[LanguageModel]:
    yield LanguageModel(llama_module)
    assert without_hooks(llama_module)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 300, (2, 7), generator=torch.Generator().manual_seed(2))
