"""Values of a cache lie in the forward's own memory only where nothing writes there later."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from graftwork import Model
from graftwork.lens import HookedTransformer

from ..models.conftest import ARCHITECTURES, build


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in ("mamba",)])
def test_cached_values_are_those_that_hooks_copied(name: str) -> None:
    module = build(name)
    lens = HookedTransformer(module)
    ids = torch.tensor([[5, 9, 2, 7, 11]])
    block = module.get_submodule(lens._vocabulary.layer_path(1))
    seen: dict[str, torch.Tensor] = {}

    def after(_module: Any, _args: Any, output: Any) -> None:
        seen["resid_post"] = (output if isinstance(output, torch.Tensor) else output[0]).clone()

    handles = [block.register_forward_hook(after)]
    mlp = lens._vocabulary.layer_places(1)["mlp_out"]
    if not mlp.parts:  # type: ignore[union-attr]
        handles.append(
            block.get_submodule(mlp.path).register_forward_hook(  # type: ignore[union-attr]
                lambda m, a, o: seen.__setitem__("mlp_out", o.clone())
            )
        )
    with torch.no_grad():
        module(ids, use_cache=False) if name not in ("bert", "roberta") else module(ids)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        for _ in range(2):  # recorded, and run again
            _, cache = lens.run_with_cache(ids, return_cache_object=False)
            for key, value in seen.items():
                found = cache[f"blocks.1.hook_{key}"]
                torch.testing.assert_close(
                    found, value.reshape(found.shape), atol=1e-4, rtol=1e-4, msg=f"{name} {key}"
                )


class Changes(torch.nn.Module):
    """Writes into what its first part gave."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y = self.second(x)
        y += x
        x.mul_(3)
        return x + y


def test_what_a_forward_writes_again_is_copied() -> None:
    module = Changes()
    model, x = Model(module), torch.randn(2, 4)
    with torch.no_grad(), model.trace(x, plan={"share_memory": True}):
        first, second = model.first.output.save(), model.second.output.save()
        whole = model.output.save()
    with torch.no_grad():
        expected = module.first(x)
        torch.testing.assert_close(first.value, expected)
        torch.testing.assert_close(second.value, module.second(expected))
        torch.testing.assert_close(whole.value, module(x))


class Remembers(torch.nn.LayerNorm):
    """Keeps what it was given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.given = [x]
        return super().forward(x)


class Doubles(torch.nn.Module):
    """Writes into what a norm was given, when nothing of the forward reads it any more."""

    def __init__(self, inner: torch.nn.Module, norm: Remembers) -> None:
        super().__init__()
        self.inner, self.norm = inner, [norm]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.norm[0].given.pop().mul_(2)
        return self.inner(x)  # type: ignore[no-any-return]


def test_inputs_by_head_do_not_share_a_stream_that_is_written_again() -> None:
    module = copy.deepcopy(build("gpt2"))
    block, ids = module.transformer.h[1], torch.tensor([[5, 9, 2, 7]])
    norm = Remembers(block.ln_1.normalized_shape)
    norm.load_state_dict(block.ln_1.state_dict())
    block.ln_1, block.mlp = norm, Doubles(block.mlp, norm)
    with torch.no_grad():
        # A copy: transformers leaves hooks of its own on the module.
        expected = copy.deepcopy(build("gpt2"))(ids, output_hidden_states=True).hidden_states[1]
        lens = HookedTransformer(module)
        for _ in range(2):
            _, cache = lens.run_with_cache(
                ids, names_filter=["blocks.1.hook_q_input", "blocks.1.hook_resid_pre"]
            )
            torch.testing.assert_close(cache["blocks.1.hook_resid_pre"], expected)
            found = cache["blocks.1.hook_q_input"]
            torch.testing.assert_close(found, expected.unsqueeze(2).expand_as(found))
