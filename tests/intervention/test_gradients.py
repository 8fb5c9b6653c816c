"""Gradients inside blocks, against autograd with plain hooks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import graftwork
from graftwork import LanguageModel, Model
from graftwork.tracing.errors import BlockError, OrderError, ShapeError, StepError

FIRST, SECOND = [1, 2, 3, 4, 5], [9, 8, 7]


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=3, n_head=4, n_embd=32, vocab_size=50, n_positions=32,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=3, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=50, max_position_embeddings=32,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def autograd(hf, blocks, ids, layer, part=lambda output: output, of=lambda block: block):
    """Gradient of the last logit 7 with respect to what a module returns, by a plain hook."""
    held = {}

    def hook(module, args, output):
        held["value"] = part(output)
        held["value"].retain_grad()

    wanted = [p.requires_grad for p in hf.parameters()]
    hf.requires_grad_(True)
    handle = of(blocks[layer]).register_forward_hook(hook)
    hf(torch.tensor([ids])).logits[0, -1, 7].backward()
    handle.remove()
    hf.zero_grad()
    for parameter, was in zip(hf.parameters(), wanted, strict=True):
        parameter.requires_grad_(was)
    return held["value"].grad


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_gradients_of_a_padded_batch_are_those_of_autograd_alone(make, frozen) -> None:
    hf = make().requires_grad_(not frozen)
    model = LanguageModel(hf)
    inner = hf.transformer.h if make is gpt2 else hf.model.layers
    blocks = model.transformer.h if make is gpt2 else model.model.layers
    saved = []
    with model.trace() as tracer:
        for ids in (FIRST, SECOND):
            with tracer.invoke(ids):
                hidden = blocks[1].output[0]
                before = hidden.grad.save()
                model.lm_head.output[0, -1, 7].backward()
                saved.append((before, blocks[1].output[0].grad.save(), hidden[:, -1].grad.save()))
    for ids, (before, after, last) in zip((FIRST, SECOND), saved, strict=True):
        wanted = autograd(hf, inner, ids, 1)
        torch.testing.assert_close(before.value, wanted)
        torch.testing.assert_close(after.value, wanted)
        torch.testing.assert_close(last.value, wanted[:, -1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())


def test_gradients_of_tuple_outputs_inputs_and_heads() -> None:
    hf = gpt2()
    model = LanguageModel(hf)
    with model.trace(FIRST):
        attention = model.transformer.h[1].attn.output[0].grad.save()
        taken = model.transformer.h[2].input.grad.save()
        head = model.transformer.h[1].attn.c_attn.output[:, :, :8].grad.save()
        model.lm_head.output[0, -1, 7].backward()
    blocks = hf.transformer.h
    wanted = autograd(hf, blocks, FIRST, 1, lambda out: out[0], lambda block: block.attn)
    torch.testing.assert_close(attention.value, wanted)
    torch.testing.assert_close(taken.value, autograd(hf, blocks, FIRST, 1))
    wanted = autograd(hf, blocks, FIRST, 1, of=lambda block: block.attn.c_attn)
    torch.testing.assert_close(head.value, wanted[:, :, :8])


def test_each_backward_has_its_own_gradients() -> None:
    hf = gpt2()
    model = LanguageModel(hf)
    with model.trace(FIRST):
        hidden = model.transformer.h[1].output[0]
        logits = model.lm_head.output[0, -1]
        logits[7].backward()
        first = hidden.grad.save()
        with (3 * logits[7]).backward():
            second = hidden.grad.save()
        later = model.transformer.h[0].output.save()  # a forward read after the backward
    wanted = autograd(hf, hf.transformer.h, FIRST, 1)
    torch.testing.assert_close(first.value, wanted)
    torch.testing.assert_close(second.value, 3 * wanted)
    assert later.shape == (1, 5, 32)


def test_an_edited_gradient_reaches_what_lies_before_it() -> None:
    hf = gpt2()
    model = LanguageModel(hf)
    with model.trace(FIRST):
        hidden = model.transformer.h[1].output[0]
        hidden.grad[:, :-1] = 0
        hidden.grad *= 2
        model.lm_head.output[0, -1, 7].backward(inputs=list(hf.parameters()))
        hidden.grad.save()
    got = {name: p.grad.clone() for name, p in hf.named_parameters() if p.grad is not None}
    hf.zero_grad()

    def edit(gradient: torch.Tensor) -> torch.Tensor:
        gradient = 2 * gradient
        gradient[:, :-1] = 0
        return gradient

    handle = hf.transformer.h[1].register_forward_hook(
        lambda module, args, output: (output.register_hook(edit), None)[1]
    )
    hf(torch.tensor([FIRST])).logits[0, -1, 7].backward()
    handle.remove()
    assert set(got) == {name for name, p in hf.named_parameters() if p.grad is not None}
    for name, parameter in hf.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=name)


def test_a_replaced_gradient_of_one_prompt_leaves_the_other() -> None:
    hf = gpt2()
    model = LanguageModel(hf)
    with model.trace() as tracer:
        with tracer.invoke(FIRST):
            model.transformer.h[1].output.grad = torch.zeros(1, 5, 32)
            model.lm_head.output[0, -1, 7].backward()
            nothing = model.transformer.h[0].output.grad.save()
        with tracer.invoke(SECOND):
            model.lm_head.output[0, -1, 7].backward()
            whole = model.transformer.h[0].output.grad.save()
    assert not nothing.value.any()
    torch.testing.assert_close(whole.value, autograd(hf, hf.transformer.h, SECOND, 0))


def test_the_gradient_of_an_edited_value_is_that_of_the_edit() -> None:
    hf = gpt2()
    model = LanguageModel(hf)
    with model.trace(FIRST):
        hidden = model.transformer.h[1].output
        hidden[:] = hidden * 0.5
        model.lm_head.output[0, -1, 7].backward()
        after = hidden.grad.save()
    held = {}

    def hook(module, args, output):
        held["value"] = (output * 0.5).detach().requires_grad_()
        return held["value"]

    handle = hf.transformer.h[1].register_forward_hook(hook)
    hf(torch.tensor([FIRST])).logits[0, -1, 7].backward()
    handle.remove()
    torch.testing.assert_close(after.value, held["value"].grad)


@pytest.mark.parametrize("edits", [False, True])
def test_the_gradient_of_a_name_counts_its_own_uses_too(edits: bool) -> None:
    """What a block computes of a view that it changed in place is derived by its whole, as in torch."""
    hf = llama()
    model = LanguageModel(hf)
    gradients = []
    for name in ("k_pre", "head_out"):
        with model.trace(FIRST) as tracer:
            value = getattr(model.layers[1], name)
            if edits:
                value += 0.3
                value *= 0.5
            loss = (value * 3).tanh().sum() + tracer.output.logits[0, -1, 7]
            loss.backward()
            gradients.append(value.grad.save())
    for name, path, got in zip(("k_pre", "head_out"), ("k_proj", "o_proj"), gradients, strict=True):
        held = {}

        def hook(module, args, output, name=name, held=held):
            if name == "k_pre":
                before = output.unflatten(-1, (2, 8))
            else:
                weight = module.weight.T.unflatten(0, (4, 8))
                before = torch.einsum("bthe,hed->bthd", args[0].unflatten(-1, (4, 8)), weight)
            held["value"] = (before + 0.3) * 0.5 if edits else before * 1
            held["value"].retain_grad()
            if name == "k_pre":
                return held["value"].flatten(2)
            return output + (held["value"] - before).sum(2)

        module = getattr(hf.model.layers[1].self_attn, path)
        handle = module.register_forward_hook(hook)
        logits = hf(torch.tensor([FIRST])).logits
        handle.remove()
        ((held["value"] * 3).tanh().sum() + logits[0, -1, 7]).backward()
        torch.testing.assert_close(got, held["value"].grad)


def test_the_gradient_of_a_value_that_is_assigned_is_not_that_of_what_was_assigned() -> None:
    hf = llama()
    model = LanguageModel(hf)
    with model.trace(FIRST) as tracer:
        other = model.layers[0].k_pre * 1
        other.mul_(2)
        model.layers[1].k_pre[:] = other
        (other.tanh().sum() + tracer.output.logits[0, -1, 7]).backward()
        got = model.layers[1].k_pre.grad.save()
    held = {}

    def first(module, args, output):
        held["other"] = output * 2

    def second(module, args, output):
        held["value"] = held["other"].clone()
        held["value"].retain_grad()
        return held["value"]

    projections = [hf.model.layers[i].self_attn.k_proj for i in (0, 1)]
    handles = [
        p.register_forward_hook(h) for p, h in zip(projections, (first, second), strict=True)
    ]
    logits = hf(torch.tensor([FIRST])).logits
    for handle in handles:
        handle.remove()
    (held["other"].tanh().sum() + logits[0, -1, 7]).backward()
    torch.testing.assert_close(got, held["value"].grad.unflatten(-1, (2, 8)))


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_what_the_forward_adds_in_place_is_not_in_what_a_backward_needs(watched, several) -> None:
    """Falcon adds attention's result into the memory of the MLP's."""
    torch.manual_seed(0)
    config = FalconConfig(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=50, alibi=False
    )
    hf = FalconForCausalLM(config).eval()
    model = LanguageModel(hf)
    found = []
    with model.trace() as tracer:
        with tracer.invoke(FIRST):
            value = model.transformer.h[0].mlp.output
            loss = value.norm() + model.lm_head.output[0, -1, 7]
            loss.backward()
            found.append((value if watched else model.transformer.h[1].input).grad.save())
            found.append(value.save())
        if several:
            with tracer.invoke(SECOND):
                model.transformer.h[0].mlp.output.save()
    held = {}

    def keep(module, args, output):
        held["mlp"] = output.clone()
        held["mlp"].retain_grad()
        return held["mlp"] * 1

    def take(module, args):
        held["input"] = args[0]
        args[0].retain_grad()

    handles = [
        hf.transformer.h[0].mlp.register_forward_hook(keep),
        hf.transformer.h[1].register_forward_pre_hook(take),
    ]
    logits = hf(torch.tensor([FIRST])).logits
    for handle in handles:
        handle.remove()
    (held["mlp"].norm() + logits[0, -1, 7]).backward()
    torch.testing.assert_close(found[0], held["mlp" if watched else "input"].grad)
    torch.testing.assert_close(found[1], held["mlp"].detach())


def test_a_gradient_edits_a_later_layer_of_the_same_forward() -> None:
    hf = gpt2()
    model = LanguageModel(hf)
    with model.trace(FIRST):
        early = model.transformer.h[0].output
        model.transformer.h[1].output.square().sum().backward()
        model.transformer.h[2].output[:] += early.grad
        logits = model.lm_head.output.save()
    held = {}

    def keep(module, args, output):
        output.retain_grad()
        held["value"] = output

    def derive(module, args, output):
        output.square().sum().backward(retain_graph=True)

    handles = [
        hf.transformer.h[0].register_forward_hook(keep),
        hf.transformer.h[1].register_forward_hook(derive),
        hf.transformer.h[2].register_forward_hook(lambda m, a, out: out + held["value"].grad),
    ]
    wanted = hf(torch.tensor([FIRST])).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(logits.value, wanted)


def test_a_gradient_that_a_write_needs_too_late_names_both_lines() -> None:
    model = LanguageModel(gpt2())
    with pytest.raises(OrderError, match="computed later"):
        with model.trace(FIRST):
            hidden = model.transformer.h[1].output
            model.lm_head.output[0, -1, 7].backward()
            model.transformer.h[2].output[:] += hidden.grad


def test_a_gradient_of_another_prompt_runs_first() -> None:
    hf = gpt2()
    model = LanguageModel(hf)
    with model.trace() as tracer:
        with tracer.invoke(FIRST):
            hidden = model.transformer.h[1].output
            model.lm_head.output[0, -1, 7].backward()
            direction = hidden.grad
        with tracer.invoke(FIRST):
            model.transformer.h[1].output[:] += direction
            raised = model.lm_head.output[0, -1, 7].save()
    gradient = autograd(hf, hf.transformer.h, FIRST, 1)
    handle = hf.transformer.h[1].register_forward_hook(lambda m, a, out: out + gradient)
    wanted = hf(torch.tensor([FIRST])).logits[0, -1, 7]
    handle.remove()
    torch.testing.assert_close(raised.value, wanted)


def test_gradients_that_do_not_exist_say_so() -> None:
    model = LanguageModel(gpt2())
    with model.trace(FIRST):
        model.transformer.h[0].output.sum().backward()
        late = model.transformer.h[2].output.grad.save()
        never = model.transformer.h[0].output.sum().save()
    with pytest.raises(StepError, match=r"derived at .*does not depend on it"):
        _ = late.value
    assert never.value.ndim == 0
    with pytest.raises(BlockError, match=r"no `loss\.backward"), model.trace(FIRST):
        model.transformer.h[0].output.grad.save()
    with pytest.raises(ShapeError, match=r"\[1, 5, 32\]"):
        with model.trace(FIRST):
            model.transformer.h[0].output.grad = torch.zeros(2, 2)
            model.lm_head.output[0, -1, 7].backward()
    with pytest.raises(StepError, match="use `trace`"):
        with model.generate(FIRST, max_new_tokens=2):
            model.lm_head.output[0, -1, 7].backward()
    assert not any(m._forward_hooks for m in model.load().modules())


def test_gradients_are_on_though_the_user_switched_them_off() -> None:
    hf = gpt2()
    model = LanguageModel(hf)
    with torch.no_grad(), model.trace(FIRST):
        model.lm_head.output[0, -1, 7].backward()
        gradient = model.transformer.h[1].output.grad.save()
    torch.testing.assert_close(gradient.value, autograd(hf, hf.transformer.h, FIRST, 1))


def test_attribution_patching_takes_three_passes() -> None:
    """Gradient × difference for all layers: two forwards and one backward.

    Source: Nanda, Attribution Patching (2023).
    """
    hf = gpt2().requires_grad_(False)
    model = LanguageModel(hf)
    calls = []
    counter = hf.register_forward_hook(lambda module, args, output: calls.append(1))
    corrupt = [1, 2, 9, 4, 5]
    with model.trace() as tracer:
        with tracer.invoke(FIRST):
            clean = [block.output for block in model.transformer.h]
        with tracer.invoke(corrupt):
            model.lm_head.output[0, -1, 7].backward()
            scores = [
                ((there - block.output) * block.output.grad).sum(-1).save()
                for there, block in zip(clean, model.transformer.h, strict=True)
            ]
    counter.remove()
    assert len(calls) <= 2
    for layer in range(3):
        values = {}
        for name, ids in (("clean", FIRST), ("corrupt", corrupt)):
            hook = hf.transformer.h[layer].register_forward_hook(
                lambda m, a, out, to=values, name=name: to.__setitem__(name, out)
            )
            hf(torch.tensor([ids]))
            hook.remove()
        gradient = autograd(hf, hf.transformer.h, corrupt, layer)
        wanted = ((values["clean"] - values["corrupt"]) * gradient).sum(-1)
        torch.testing.assert_close(scores[layer].value, wanted.detach())


def test_a_steering_vector_is_trained_as_by_a_plain_hook() -> None:
    hf = gpt2().requires_grad_(False)
    model = LanguageModel(hf)
    ids = torch.tensor([FIRST])

    def train(step):
        vector = torch.nn.Parameter(torch.zeros(32))
        optimizer = torch.optim.Adam([vector], lr=0.1)
        losses = []
        for _ in range(40):
            losses.append(step(vector))
            optimizer.step()
            optimizer.zero_grad()
        return vector.detach(), losses

    def block(vector):
        with model.trace(FIRST):
            model.transformer.h[1].output[:] += vector
            loss = (-torch.log_softmax(model.lm_head.output[0, -1], -1)[7]).save()
            loss.backward()
        return float(loss.value.detach())

    def plain(vector):
        handle = hf.transformer.h[1].register_forward_hook(lambda m, a, out: out + vector)
        loss = -torch.log_softmax(hf(ids).logits[0, -1], -1)[7]
        handle.remove()
        loss.backward()
        return float(loss.detach())

    mine, theirs = train(block), train(plain)
    torch.testing.assert_close(mine[0], theirs[0], atol=1e-4, rtol=1e-3)
    assert mine[1] == pytest.approx(theirs[1], rel=1e-3)
    assert mine[1][-1] < mine[1][0] - 0.3


def test_a_module_and_a_compiled_block_are_trained() -> None:
    hf = gpt2().requires_grad_(False)
    model = LanguageModel(hf)
    probe = torch.nn.Linear(32, 1)
    with model.trace(FIRST) as tracer:
        score = graftwork.apply(probe, model.transformer.h[1].output[0][:, -1])
        loss = ((score - 3.0) ** 2).mean().save()
        loss.backward()
    experiment = tracer.compile()
    probe.zero_grad()
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.1)
    for _ in range(150):
        last = experiment()[loss]
        optimizer.step()
        optimizer.zero_grad()
    assert float(last.detach()) < 1e-3


@settings(max_examples=20, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(1, 49), min_size=1, max_size=6), min_size=1, max_size=4),
    layer=st.integers(0, 2),
)
def test_gradients_in_a_batch_are_those_alone(prompts, layer) -> None:
    hf = gpt2()
    model = LanguageModel(hf)
    saved = []
    with model.trace() as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                model.lm_head.output[0, -1, 7].backward()
                saved.append(model.transformer.h[layer].output.grad.save())
    for ids, gradient in zip(prompts, saved, strict=True):
        wanted = autograd(hf, hf.transformer.h, ids, layer)
        torch.testing.assert_close(gradient.value, wanted, atol=1e-6, rtol=1e-4)


def test_gradients_of_any_module() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    x = torch.randn(2, 3)
    with Model(net).trace(x) as tracer:
        hidden = tracer.model[1].output
        tracer.model[2].output.sum().backward()
        gradient = hidden.grad.save()
    torch.testing.assert_close(gradient.value, net[2].weight.detach().expand(2, 4))


def test_a_demanded_gradient_leaves_the_parameters_one_gradient() -> None:
    hf = gpt2()
    model = LanguageModel(hf)
    with model.trace(FIRST):
        model.lm_head.output[0, -1, 7].backward(inputs=list(hf.parameters()))
        size = model.transformer.h[1].output.grad.norm().item()
    wanted = autograd_of_parameters(hf)
    assert size == pytest.approx(float(autograd(hf, hf.transformer.h, FIRST, 1).norm()), rel=1e-5)
    for got, expected in zip(wanted[0], wanted[1], strict=True):
        torch.testing.assert_close(got, expected)


def autograd_of_parameters(hf):
    got = [p.grad.clone() for p in hf.parameters()]
    hf.zero_grad()
    hf(torch.tensor([FIRST])).logits[0, -1, 7].backward()
    expected = [p.grad.clone() for p in hf.parameters()]
    hf.zero_grad()
    return got, expected


def test_the_gradient_of_keys_beside_values_that_were_assigned() -> None:
    """They are parts of one place, and go on as they came, in a batch of other lengths."""
    module = llama()
    model = LanguageModel(module)
    with model.trace() as tracer:
        with tracer.invoke(FIRST):
            model.layers[1].resid_pre.save()
        with tracer.invoke(SECOND):
            keys = model.layers[1].k
            model.layers[1].v = model.layers[1].v * 0.5
            model.layers[1].resid_post.tanh().sum().backward()
            found = keys.grad.save()
    attention, seen = module.model.layers[1].self_attn, []

    def keep(_module: object, _args: object, output: torch.Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    handles = [
        attention.k_proj.register_forward_hook(keep),
        attention.v_proj.register_forward_hook(lambda _m, _a, output: output * 0.5),
        module.model.layers[1].register_forward_hook(lambda _m, _a, output: seen.append(output)),
    ]
    module(torch.tensor([SECOND]))
    for handle in handles:
        handle.remove()
    before, output = seen
    (output[0] if isinstance(output, tuple) else output).tanh().sum().backward()
    # The keys are turned by their positions behind the projection, which leaves lengths as they are.
    expected = before.grad.unflatten(-1, (2, -1)).norm(dim=-1)
    torch.testing.assert_close(found.norm(dim=-1), expected, rtol=1e-4, atol=1e-5)
