"""A row's own tokens in an invoke of rows of different lengths: as each row gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graftwork import LanguageModel
from graftwork.tracing.errors import BlockError, InputError, OperationError
from graftwork.tracing.wire import pack, unpack

LENGTHS = (3, 6, 4)
#: What `.t` reduces with, in torch.
REDUCTIONS = {
    "mean": lambda value: value.mean(1),
    "sum": lambda value: value.sum(1),
    "max": lambda value: value.max(1).values,
    "min": lambda value: value.min(1).values,
}


def alone(tools: Any, name: str, place: tuple[str, str]) -> list[torch.Tensor]:
    """What each of the prompts has at a place in a plain forward of its own: [1, token, …]."""
    module = tools.module(name)
    return [tools.plain(module, ids)[place] for ids in tools.prompts(*LENGTHS)]


def ids(tools: Any) -> list[list[int]]:
    return [prompt.tolist() for prompt in tools.prompts(*LENGTHS)]


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_reduction_is_over_each_rows_own_tokens(name: str, reduction: str, tools: Any) -> None:
    model = tools.model(name)
    path = f"{tools.blocks(tools.module(name))}.1"
    with model.trace(ids(tools)):
        hidden = model.get(path).output[0]
        found = getattr(hidden.t, reduction)().save()
        computed = getattr((hidden * 2).t, reduction)(keepdim=True).save()
        given = getattr(model.get(path).input.t, reduction)().save()
    for row, value in enumerate(alone(tools, name, (path, "output"))):
        expected = REDUCTIONS[reduction](value)[0]
        assert tools.close(found.value[row], expected)
        assert tools.close(computed.value[row], 2 * expected[None])
    for row, value in enumerate(alone(tools, name, (path, "input"))):
        assert tools.close(given.value[row], REDUCTIONS[reduction](value)[0])


def test_padding_is_not_looked_at(tools: Any) -> None:
    model = tools.model("gpt2")
    with model.trace(ids(tools)) as tracer:
        hidden = model.transformer.h[1].output
        holes = hidden.masked_fill(~tracer.mask[..., None], torch.nan)
        found = [getattr(holes.t, name)().save() for name in REDUCTIONS]
    assert not any(torch.isnan(value.value).any() for value in found)


def test_reductions_keep_and_change_dtypes_as_torch_does(tools: Any) -> None:
    model = tools.model("gpt2")
    with model.trace(ids(tools)):
        hidden = model.transformer.h[1].output
        double = hidden.t.mean(dtype=torch.float64).save()
        counted = (hidden > 0).t.sum().save()
        largest = (hidden * 10).long().t.max().save()
        some = (hidden > 3).t.max().save()
    values = alone(tools, "gpt2", ("transformer.h.1", "output"))
    assert double.value.dtype == torch.float64 and some.value.dtype == torch.bool
    assert counted.value.dtype == largest.value.dtype == torch.int64
    for row, value in enumerate(values):
        assert tools.close(double.value[row], value.mean(1, dtype=torch.float64)[0])
        assert torch.equal(counted.value[row], (value > 0).sum(1)[0])
        assert torch.equal(largest.value[row], (value * 10).long().max(1).values[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_a_reduction_reach_own_tokens_alone(reduction: str, tools: Any) -> None:
    model, module = tools.model("gpt2"), tools.module("gpt2")
    with model.trace(ids(tools)):
        hidden = model.transformer.h[1].output
        loss = getattr(model.transformer.h[2].output.t, reduction)().pow(2).sum()
        loss.backward()
        gradient = hidden.grad.save()
    for row, prompt in enumerate(tools.prompts(*LENGTHS)):
        kept: list[torch.Tensor] = []

        def keep(_: Any, __: Any, output: torch.Tensor, kept: Any = kept) -> torch.Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[0]

        last: list[torch.Tensor] = []
        handles = [
            module.transformer.h[1].register_forward_hook(keep),
            module.transformer.h[2].register_forward_hook(
                lambda _, __, out, last=last: last.append(out)
            ),
        ]
        try:
            module(prompt[None])
        finally:
            for handle in handles:
                handle.remove()
        loss = REDUCTIONS[reduction](last[0]).pow(2).sum()
        (expected,) = torch.autograd.grad(loss, kept)
        own = gradient.value[row, -len(prompt) :]
        assert tools.close(own, expected[0], 1e-4)
        assert not gradient.value[row, : -len(prompt)].any()


def test_tokens_on_other_axes(tools: Any) -> None:
    model = LanguageModel(tools.module("gpt2"))
    heads, each = 4, 4
    with model.trace(ids(tools)):
        z = model.layers[1].z
        z_mean = z.t.mean().save()
        pattern = model.layers[1].pattern
        first, part = pattern.t[0].save(), pattern.t[1:3].save()
        mean = pattern.t.mean().save()
        turned = model.layers[1].resid_post.transpose(0, 1)
        turned_part, turned_max = turned.t[1:3].save(), turned.t.max().save()
    values = alone(tools, "gpt2", ("transformer.h.1.attn.c_proj", "input"))
    for row, value in enumerate(values):
        assert tools.close(z_mean.value[row], value.mean(1)[0].unflatten(-1, (heads, each)))
    for row, value in enumerate(alone(tools, "gpt2", ("transformer.h.1", "output"))):
        assert tools.close(turned_part.value[:, row], value[0, 1:3])
        assert tools.close(turned_max.value[row], value.max(1).values[0])
    for row, prompt in enumerate(tools.prompts(*LENGTHS)):
        with torch.no_grad():
            output = tools.fresh("gpt2", attn_implementation="eager")(
                prompt[None], output_attentions=True
            )
        expected, own = output.attentions[1][0], len(prompt)
        assert tools.close(first.value[row, :, -own:], expected[:, 0])
        assert tools.close(part.value[row, :, :, -own:], expected[:, 1:3])
        assert tools.close(mean.value[row, :, -own:], expected.mean(1))


def test_rows_and_tokens_on_one_axis(tools: Any) -> None:
    model = tools.model("opt")
    place = ("model.decoder.layers.1.fc1", "output")
    with model.trace(ids(tools)):
        output = model.get(place[0]).output
        mean, largest = output.t.mean().save(), (output * 2).t.max().save()
    for row, value in enumerate(alone(tools, "opt", place)):
        assert tools.close(mean.value[row], value.mean(0))
        assert tools.close(largest.value[row], 2 * value.max(0).values)


def test_what_is_written_by_position_reaches_rows_of_different_lengths(tools: Any) -> None:
    model, module = tools.model("gpt2"), tools.module("gpt2")
    with model.trace(ids(tools)):
        hidden = model.transformer.h[0].output
        hidden.t[0][:, :8] *= -1  # a part of a part is written through, as in a row without padding
        hidden.t[1:3].mul_(2)
        last = model.lm_head.output.t[-1].save()
        logits = model.lm_head.output.t.max().save()

    def change(value: torch.Tensor) -> torch.Tensor:
        value[:, 0, :8] *= -1
        value[:, 1:3] *= 2
        return value

    for row, prompt in enumerate(tools.prompts(*LENGTHS)):
        expected = tools.plain(module, prompt, [(("transformer.h.0", "output"), change)])
        expected = expected["lm_head", "output"][0]
        assert tools.close(last.value[row], expected[-1])
        assert tools.close(logits.value[row], expected.max(0).values)


def test_the_own_tokens_of_another_invokes_value(tools: Any) -> None:
    model = tools.model("gpt2")
    with model.trace() as tracer:
        with tracer.invoke(ids(tools)):
            hidden = model.transformer.h[1].output
        with tracer.invoke([5, 6]):
            first = (hidden * 1).t[0].save()
            mean = (hidden * 1).t.mean().save()
    for row, value in enumerate(alone(tools, "gpt2", ("transformer.h.1", "output"))):
        assert tools.close(first.value[row], value[0, 0])
        assert tools.close(mean.value[row], value.mean(1)[0])


def test_the_whole_batch_is_reduced_row_by_row(tools: Any) -> None:
    model = tools.model("gpt2")
    with model.trace() as tracer:
        for prompt in tools.prompts(*LENGTHS):
            with tracer.invoke(prompt):
                pass
        with tracer.invoke() as whole:
            hidden = model.transformer.h[1].output
            mean, first = hidden.t.mean().save(), hidden.t[0].save()
            mask = whole.mask
    assert mask.sum(1).tolist() == list(LENGTHS)
    for row, value in enumerate(alone(tools, "gpt2", ("transformer.h.1", "output"))):
        assert tools.close(mean.value[row], value.mean(1)[0])
        assert tools.close(first.value[row], value[0, 0])


# ------------------------------------------------------------------ steps, edits, other runs


def test_steps_of_a_generation(tools: Any) -> None:
    model, module = tools.model("gpt2"), tools.module("gpt2")
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with model.generate(**options) as generator:
        with generator.invoke(ids(tools)) as invoker:
            masks, recorded = [], []
            for _ in generator.iter[:]:
                recorded.append(model.transformer.h[1].output.t.mean().save())
                masks.append(invoker.mask)
        with generator.invoke(ids(tools)):
            with generator.all() as step:
                hidden = model.transformer.h[1].output
                means = hidden.t.mean().save()
                with generator.cond(step < 1):
                    firsts = hidden.t[0].save()
                    smallest = hidden.t.min().save()
    assert masks[0].sum(1).tolist() == list(LENGTHS) and masks[0].shape == (3, 6)
    assert masks[1].tolist() == [[True]] * 3
    for row, prompt in enumerate(tools.prompts(*LENGTHS)):
        seen: list[torch.Tensor] = []
        handle = module.transformer.h[1].register_forward_hook(
            lambda _, __, out, seen=seen: seen.append(out)
        )
        with torch.no_grad():
            module.generate(prompt[None], **options)
        handle.remove()
        for step, value in enumerate(seen):
            expected = value.mean(1)[0]
            assert tools.close(recorded[step].value[row], expected)
            assert tools.close(means.value[step][row], expected)
        assert tools.close(firsts.value[0][row], seen[0][0, 0])
        assert tools.close(smallest.value[0][row], seen[0].min(1).values[0])


def test_edits_reduce_over_the_tokens_of_the_prompts_that_come(tools: Any) -> None:
    model, module = LanguageModel(tools.module("gpt2")), tools.module("gpt2")
    with model.edit() as edited:
        hidden = model.transformer.h[1].output
        hidden += hidden.t.mean(keepdim=True)
    with edited.trace(ids(tools)):
        last = edited.lm_head.output.t[-1].save()
    with edited.trace() as tracer:
        separate = []
        for prompt in tools.prompts(*LENGTHS):
            with tracer.invoke(prompt):
                separate.append(edited.lm_head.output[:, -1].save())

    def change(value: torch.Tensor) -> torch.Tensor:
        return value + value.mean(1, keepdim=True)

    for row, prompt in enumerate(tools.prompts(*LENGTHS)):
        expected = tools.plain(module, prompt, [(("transformer.h.1", "output"), change)])
        assert tools.close(last.value[row], expected["lm_head", "output"][0, -1])
        assert tools.close(separate[row].value, expected["lm_head", "output"][:, -1])


def test_what_was_sent_reduces_as_before(tools: Any) -> None:
    model = tools.model("gpt2")
    with model.trace(ids(tools)) as tracer:
        hidden = model.transformer.h[1].output
        saved = [getattr(hidden.t, name)().save() for name in REDUCTIONS]
        saved.append(hidden.t.mean(keepdim=True, dtype=torch.float64).save())
    data = pack(tracer.graph)
    experiment = tracer.compile()
    experiment.graph = unpack(data).graph
    assert pack(experiment.graph) == data
    for one, other in zip(experiment(), saved, strict=True):
        assert torch.equal(one, other.value)


def test_a_compiled_block_does_not_take_padding_for_tokens(tools: Any) -> None:
    model = tools.model("gpt2")
    same = [[3, 4, 5], [6, 7, 8]]
    with model.trace(same) as tracer:
        mean = model.transformer.wte.output.t.mean().save()
    experiment = tracer.compile()
    weight = tools.module("gpt2").transformer.wte.weight
    assert tools.close(experiment([[3, 4], [5, 6]])[mean][1], weight[[5, 6]].mean(0).detach())
    with pytest.raises(InputError, match="prompts without padding alone"):
        experiment([[3, 4, 5], [6, 7]])
    with model.trace(ids(tools)) as tracer:
        model.transformer.wte.output.t.mean().save()
    with pytest.raises(InputError, match="of the same lengths alone"):
        tracer.compile()([[3, 4, 5], [6, 7, 8], [9, 10, 11]])


# ------------------------------------------------------------------ the mask, and what is refused


def test_the_mask_tells_own_tokens_inside_and_after_the_block(tools: Any) -> None:
    model = tools.model("gpt2")
    expected = torch.arange(6) >= 6 - torch.tensor(LENGTHS)[:, None]
    with model.trace(ids(tools)) as tracer:
        inside = tracer.mask
        hidden = model.transformer.h[1].output
        total = (hidden * tracer.mask[..., None]).t.sum().save()
        picked = hidden[tracer.mask].save()
    assert torch.equal(inside, expected) and torch.equal(tracer.mask, expected)
    values = alone(tools, "gpt2", ("transformer.h.1", "output"))
    assert tools.close(picked.value, torch.cat([value[0] for value in values]))
    assert tools.close(total.value, torch.stack([value.sum(1)[0] for value in values]))
    with model.trace() as tracer:
        with tracer.invoke([3, 4, 5]) as first:
            pass
        with tracer.invoke() as whole:
            pass
    assert first.mask.tolist() == [[True, True, True]]
    with pytest.raises(BlockError, match="ask for it inside"):
        _ = whole.mask
    with pytest.raises(BlockError, match="belongs to an invoke"):
        _ = tracer.mask


def test_what_has_no_mask_says_so(tools: Any) -> None:
    model = tools.model("gpt2")
    with pytest.raises(BlockError, match="recorded once for several steps"):
        with model.generate(ids(tools), max_new_tokens=2) as generator:
            with generator.all():
                _ = generator.mask


def test_other_reductions_name_those_that_there_are(tools: Any) -> None:
    model = tools.model("gpt2")
    with pytest.raises(
        AttributeError, match=r"`\.t` has no `median`.*`\.t\.mean\(\)`.*invoker\.mask"
    ):
        with model.trace(ids(tools)):
            model.transformer.h[1].output.t.median()


def test_columns_that_cannot_be_told_are_refused(tools: Any) -> None:
    model = tools.model("gpt2")
    with pytest.raises(
        OperationError, match="has 5 columns where the rows with their padding have 6"
    ):
        with model.trace(ids(tools)):
            model.transformer.h[1].output[:, :-1].t.mean()
    with pytest.raises(OperationError, match="needs an axis that counts rows"):
        with model.trace(ids(tools)):
            _ = model.transformer.h[1].output[0, :].t[0]
