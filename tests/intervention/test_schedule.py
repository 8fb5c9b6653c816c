"""What the two trial forwards learn of a module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from graftwork.intervention import measure
from graftwork.intervention.rows import BATCH, BATCH_TOKEN, FIXED, TOKEN, UNKNOWN, Axis, TensorAxes
from graftwork.tracing.errors import ScheduleError
from graftwork.tracing.node import HookPoint


def ids(batch: int, tokens: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    whole = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
    return (), {"input_ids": whole, "attention_mask": torch.ones_like(whole)}


def vectors(batch: int, tokens: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.zeros(batch, tokens, 6),), {}


def roles(found: Any) -> Any:
    if isinstance(found, TensorAxes):
        return [
            axis.role if axis.factor == 1 or axis.role == FIXED else axis for axis in found.axes
        ]
    return type(found)(roles(part) for part in found) if isinstance(found, tuple) else found


def gpt2(**options: Any) -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_positions=32, n_embd=16, n_layer=2, n_head=4, **options)
    )


def skeleton(build: Any) -> Any:
    with torch.device("meta"):
        return build()


def test_roles_of_the_axes_of_gpt2() -> None:
    schedule = measure(skeleton(gpt2), ids)
    hidden = [BATCH, TOKEN, FIXED]
    for path in ("transformer.wte", "transformer.h.0", "transformer.h.1.mlp", "lm_head"):
        assert roles(schedule.axes(HookPoint(path, "output"))) == hidden
    attention = schedule.axes(HookPoint("transformer.h.0.attn", "output"))
    assert roles(attention[0]) == hidden
    assert attention[1] is None
    root = schedule.axes(HookPoint("", "output"))
    assert roles(root["logits"]) == hidden
    (args, kwargs) = schedule.axes(HookPoint("transformer.h.1", "inputs"))
    assert roles(args[0]) == hidden
    assert set(kwargs) >= {"use_cache"}


def test_scores_of_eager_attention_have_two_token_axes() -> None:
    schedule = measure(skeleton(lambda: gpt2(attn_implementation="eager")), ids)
    attention = schedule.axes(HookPoint("transformer.h.0.attn", "output"))
    assert roles(attention[1]) == [BATCH, FIXED, TOKEN, TOKEN]


def test_batch_and_tokens_flattened_into_one() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.reshape(-1, 6)).reshape(*x.shape[:2], 8)

    schedule = measure(Flat(), vectors)
    assert roles(schedule.axes(HookPoint("inner", "output"))) == [BATCH_TOKEN, FIXED]
    assert roles(schedule.axes(HookPoint("", "output"))) == [BATCH, TOKEN, FIXED]


def test_the_mlp_of_opt_flattens_batch_and_tokens() -> None:
    config = OPTConfig(
        vocab_size=61, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, word_embed_proj_dim=16,
    )  # fmt: skip
    schedule = measure(skeleton(lambda: OPTForCausalLM(config)), ids)
    assert roles(schedule.axes(HookPoint("model.decoder.layers.0.fc1", "output"))) == [
        BATCH_TOKEN,
        FIXED,
    ]
    block = HookPoint("model.decoder.layers.0", "output")
    assert roles(schedule.axes(block)) == [BATCH, TOKEN, FIXED]


def test_an_axis_that_is_neither_is_unknown() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x[:, 1:])

    schedule = measure(Odd(), vectors)
    assert roles(schedule.axes(HookPoint("inner", "output"))) == [BATCH, Axis(UNKNOWN, 12), FIXED]


def test_the_order_is_that_of_the_forward() -> None:
    schedule = measure(skeleton(gpt2), ids)
    names = [
        ("", "inputs"),
        ("transformer.wte", "output"),
        ("transformer.h.0", "inputs"),
        ("transformer.h.0.ln_1", "output"),
        ("transformer.h.0.attn", "output"),
        ("transformer.h.0.mlp", "inputs"),
        ("transformer.h.0", "output"),
        ("transformer.h.1.mlp", "output"),
        ("transformer.ln_f", "output"),
        ("lm_head", "output"),
        ("", "output"),
    ]
    visits = [schedule.find(HookPoint(*name)) for name in names]
    orders = [visit.order for visit in visits if visit is not None]
    assert len(orders) == len(names)
    assert orders == sorted(orders)


def test_each_name_of_one_module_is_the_call_by_that_name() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.b = self.a

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    schedule = measure(Twice(), vectors)
    first, second = (schedule.find(HookPoint(path, "output")) for path in ("a", "b"))
    assert first is not None and second is not None and first.order < second.order
    assert schedule.find(HookPoint("b", "output", call=1)) is None


def test_a_module_that_is_not_called_is_not_in_it() -> None:
    class Spare(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 6)
            self.spare = nn.Linear(6, 6)

    assert measure(Spare(), vectors).find(HookPoint("spare", "output")) is None


def test_what_sorts_tokens_hides_what_is_inside() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(x)

    module = nn.Sequential(nn.Linear(6, 6), Experts())
    schedule = measure(module, vectors, lambda child: isinstance(child, Experts))
    assert schedule.find(HookPoint("1.act", "output")) is None
    assert schedule.find(HookPoint("1", "output")) is not None


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_no_hook_and_changes_nothing(training: bool) -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(13), nn.Dropout(0.5)).train(training)
    module[2].train(not training)
    module[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ScheduleError):  # 13 channels do not fit 17 tokens
        measure(module, vectors)
    module[1] = nn.LayerNorm(6).train(training)
    measure(module, vectors)
    assert [child.training for child in module] == [training, training, not training]
    assert module.training is training
    assert not module[0].weight.requires_grad and module[0].bias.requires_grad
    assert torch.equal(before["0.weight"], module[0].weight)
    assert all(
        not child._forward_hooks and not child._forward_pre_hooks for child in module.modules()
    )


@pytest.mark.parametrize(
    "decide",
    [
        lambda x: -x if x.sum() > 0 else x,
        lambda x: x * x.sum().item(),
        lambda x: x * torch.tensor(x.tolist()),
    ],
    ids=["if", "item", "tolist"],
)
def test_data_in_control_flow_is_a_schedule_error(decide: Any) -> None:
    class Deciding(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return decide(super().forward(x))

    with pytest.raises(ScheduleError, match="trial run without weights failed"):
        measure(Deciding(6, 6), vectors)


def test_an_order_that_depends_on_the_size_is_a_schedule_error() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.ReLU(), nn.Tanh()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.b(x)) if len(x) > 2 else self.b(self.a(x))

    with pytest.raises(ScheduleError, match="the order of its modules depends on its input"):
        measure(Sized(), vectors)
