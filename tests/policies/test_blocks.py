"""Policies in blocks: beside the user's own operations and edits, planned, trained, sent, threaded."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graftwork
from graftwork import LanguageModel
from graftwork.policies import functions
from graftwork.tracing.errors import InputError, ShapeError, WireError
from graftwork.tracing.wire import pack, unpack

from ..models.conftest import build, random_prompts
from .conftest import POINTS, close, fresh, hooked, module, numbers, plain, seen, size

IDS, LONG = random_prompts(5, 7)
POINT = "mlp_pre_out"
D = 24  # of llama

# -------------------------------------------------------------------- with what the user writes


def test_policies_come_before_the_user() -> None:
    model, vector = fresh("llama"), numbers(D)
    model.hooks[POINT][1]["replace"].add_token(2, vector)
    with model.trace(IDS) as tracer:
        there = model.layers[1].mlp_post.save()
        model.layers[1].mlp_post[:, 2] *= 2
        logits = tracer.output.logits.save()
    assert torch.equal(there.value[0, 2], vector)

    def function(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, 2] = 2 * vector
        return x

    close(logits, plain("llama", IDS, {(POINT, 1): function}))


def test_policies_then_edits_then_the_user() -> None:
    model, vector = fresh("llama"), numbers(D)
    with model.edit() as edited:
        model.layers[1].mlp_post = model.layers[1].mlp_post * 3
    # On either side of the edit: views share the policies that were there.
    model.hooks[POINT][1]["postbias"].set_bias(vector)
    with model.edit() as again:
        model.layers[1].mlp_post = model.layers[1].mlp_post * 3
    with again.trace(IDS) as tracer:
        again.layers[1].mlp_post = again.layers[1].mlp_post + 1
        logits = tracer.output.logits.save()
    close(logits, plain("llama", IDS, {(POINT, 1): lambda x: (x + vector) * 3 + 1}))
    # The model has no edit, and its policies.
    close(model.get_logits(IDS), plain("llama", IDS, {(POINT, 1): lambda x: x + vector}))
    model.hooks.reset()
    close(again.get_logits(IDS), plain("llama", IDS, {(POINT, 1): lambda x: x * 3}))
    close(edited.get_logits(IDS), plain("llama", IDS, {(POINT, 1): lambda x: x * 3}))


def test_edits_in_place_and_policies() -> None:
    model, vector = fresh("gpt2"), numbers(64)
    model.hooks[POINT][1]["replace"].add_token(0, vector)
    with model.edit(inplace=True):
        model.layers[1].mlp_post = model.layers[1].mlp_post * 0.5

    def function(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, 0] = vector
        return x * 0.5

    close(model.get_logits(IDS), plain("gpt2", IDS, {(POINT, 1): function}))
    model.clear_edits()
    model.hooks.reset()
    assert torch.equal(model.get_logits(IDS), plain("gpt2", IDS))


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gpt_neox", "gemma2", "bert"])
def test_functions_inside_blocks(name: str) -> None:
    model, d = fresh(name), size(name, POINT)
    vector, other = numbers(*d, seed=1), numbers(*d, seed=2)
    keep = (numbers(*d, seed=3) > 0).float()
    with model.trace() as tracer:
        boxes = []
        for ids in (IDS, LONG):  # of different lengths: the first is padded
            with tracer.invoke(ids):
                layer = model.layers[1]
                layer.mlp_post = graftwork.policies.replace(layer.mlp_post, {3: vector, 6: other})
                layer.mlp_post = functions.mask(layer.mlp_post, keep, other)
                layer.mlp_post = functions.actadd(layer.mlp_post, torch.stack([vector, other]))
                boxes.append((functions.collect(layer.mlp_post), model.logits.save()))

    def function(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, 3] = vector
        if x.shape[1] > 6:
            x[:, 6] = other
        x = x * keep + other * (1 - keep)
        x[:, :2] += torch.stack([vector, other])
        return x

    for ids, (kept, logits) in zip((IDS, LONG), boxes, strict=True):
        close(logits, plain(name, ids, {(POINT, 1): function}))
        close(kept, seen(name, ids, [(POINT, 1)], {(POINT, 1): function})[0])


def test_functions_take_values_of_other_prompts() -> None:
    model = fresh("llama")
    with model.trace() as tracer:
        with tracer.invoke(LONG):
            source = model.layers[1].mlp_post[0, 4]
        with tracer.invoke(IDS):
            layer = model.layers[1]
            layer.mlp_post = functions.replace(layer.mlp_post, {2: source})
            logits = model.logits.save()
    (there,) = seen("llama", LONG, [(POINT, 1)])

    def function(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, 2] = there[0, 4]
        return x

    close(logits, plain("llama", IDS, {(POINT, 1): function}))


def test_functions_of_steps() -> None:
    model, vector = fresh("llama"), numbers(D)
    with model.generate(IDS, max_new_tokens=4) as generator:
        with generator.iter[:]:
            layer = model.layers[1]
            layer.mlp_post = functions.replace(layer.mlp_post, {1: vector, 6: vector})
            kept = layer.mlp_post.save()
    found = torch.cat(kept.value, 1)[0]
    assert [torch.equal(row, vector) for row in found] == [i in (1, 6) for i in range(8)]


def test_functions_of_tensors() -> None:
    x, v, w = numbers(2, 4, 3), numbers(3, seed=1), numbers(3, seed=2)
    close(functions.offset(x, v), x + v)
    close(functions.unoffset(x, v), x - v)
    close(functions.postbias(x, v), x + v)
    close(functions.mask(x, v), x * (v > 0))
    close(functions.mask(x, v, w, "sigmoid"), x * v.sigmoid() + w * (1 - v.sigmoid()))
    close(functions.mask(x, v, kind=torch.tanh), x * v.tanh())
    close(functions.replace(x, {"1": v, 9: w})[:, 1], v.expand(2, 3))
    close(functions.replace(x, {"1": v, 9: w})[:, 2:], x[:, 2:])
    close(functions.actadd(x, w.expand(6, 3)), x + w)
    close(functions.actadd(x, torch.stack([v, w]), 1)[:, 0], x[:, 0] + w)
    rotate = torch.linalg.qr(numbers(3, 3, seed=4)).Q
    white = functions.whiten(x, v, rotate, w.abs() + 1)
    close(white, (x + v) @ rotate.T * (w.abs() + 1))
    close(functions.unwhiten(white, v, rotate.T, w.abs() + 1), x)
    assert torch.equal(x, numbers(2, 4, 3))  # nothing in place
    with pytest.raises(graftwork.GraftworkError, match="counted from the first one"):
        functions.replace(x, {-1: v})
    with pytest.raises(graftwork.GraftworkError, match=r"no mask is called `stp`.*step"):
        functions.mask(x, v, kind="stp")


# -------------------------------------------------------------------- planned or not

POLICIES = st.lists(
    st.tuples(
        st.sampled_from(POINTS),
        st.integers(0, 2),
        st.sampled_from(["mask", "actadd", "replace", "postbias", "offset", "whiten"]),
        st.integers(0, 7),
    ),
    max_size=5,
)


def put(model: Any, name: str, chosen: list[tuple[str, int, str, int]]) -> None:
    for number, (point, layer, kind, token) in enumerate(chosen):
        policy, d = model.hooks[point][layer][kind], size(name, point)
        vector, count = numbers(*d, seed=number), torch.Size(d).numel()
        if kind == "mask":
            policy.set_mask(vector)
        elif kind == "actadd" or kind == "replace":
            policy.add_token(token, vector)
        elif kind == "whiten":
            policy.set_whitening(vector, torch.eye(count), vector.flatten().abs() + 0.5)
        else:
            policy.set_offset(vector)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gpt_neox", "gemma2"])
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(chosen=POLICIES, shared=st.integers(0, 4), user=st.integers(0, 2), generates=st.booleans())
def test_the_planner_changes_nothing(
    name: str, chosen: Any, shared: int, user: int, generates: bool
) -> None:
    """Prompts with a common beginning, policies everywhere, a change of the user's."""
    model = fresh(name)
    put(model, name, chosen)
    model.hooks["post_mlp"][1]["collect"].enable()
    prompts = [torch.cat([LONG[:shared], p]) for p in random_prompts(2, 4, 4, 6, seed=3)]
    results = []
    for plan in (None, False):
        options: dict[str, Any] = {"plan": plan}
        boxes = []
        with (
            model.generate(max_new_tokens=3, **options) if generates else model.trace(**options)
        ) as tracer:
            for number, ids in enumerate(prompts):
                with tracer.invoke(ids) as invoker:
                    if number == 1:
                        model.layers[user].mlp_post[:, -1] *= 0.5
                    boxes.append(invoker if generates else model.logits[:, -1].save())
        kept = model.hooks["post_mlp"][1]["collect"].activation
        results.append(([b.output if generates else b.value for b in boxes], kept))
    (found, kept), (expected, naive) = results
    for one, other in zip([*found, *kept], [*expected, *naive], strict=True):
        close(one, other, rtol=1e-3, atol=1e-3)


def test_equal_beginnings_with_replacements_in_them() -> None:
    """What prompts share is computed once, with the policies."""
    model, vector = fresh("llama"), numbers(D)
    model.hooks[POINT][0]["replace"].add_token(1, vector)
    model.hooks[POINT][2]["replace"].add_token(6, vector)
    start = random_prompts(5, seed=8)[0]
    prompts = [torch.cat([start, end]) for end in random_prompts(2, 3, 2, seed=9)]
    with model.trace() as tracer:
        boxes = []
        for ids in prompts:
            with tracer.invoke(ids):
                boxes.append(model.logits.save())

    def change(token: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def function(x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[:, token] = vector
            return x

        return function

    for ids, box in zip(prompts, boxes, strict=True):
        close(box, plain("llama", ids, {(POINT, 0): change(1), (POINT, 2): change(6)}))


# -------------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_gradients_are_those_of_autograd(name: str) -> None:
    model, d = fresh(name), size(name, POINT)
    here = model.hooks[POINT][1]
    here["mask"].mask_fn = "sigmoid"
    here["mask"].set_mask(numbers(*d, seed=1))
    here["mask"].set_offset(numbers(*d, seed=2))
    here.set_actadd(numbers(3, *d, seed=3))
    here["replace"].add_token(4, numbers(*d, seed=4))
    here["postbias"].set_bias(numbers(*d, seed=5))
    here["offset"].set_offset(numbers(*d, seed=6))
    parameters = list(model.hooks.parameters())
    assert len(parameters) == 6
    for parameter in parameters:
        parameter.requires_grad_()
    with model.trace(IDS):
        loss = model.logits.float().logsumexp(-1).sum().save()
    loss.value.backward()
    found = [parameter.grad.clone() for parameter in parameters]

    p, m_off, adds, vector, bias, o = [
        t.detach().clone().requires_grad_()
        for t in (
            here["mask"].param,
            here["mask"].offset,
            here["actadd"].param,
            here["replace"].param["4"],
            here["postbias"].param,
            here["offset"].param,
        )
    ]

    def function(x: torch.Tensor) -> torch.Tensor:
        m = p.sigmoid()
        x = (x + o) * m + m_off * (1 - m)
        x = torch.cat([x[:, :4], vector.expand(1, 1, *d), x[:, 5:]], 1) - o
        x = torch.cat([x[:, :3] + adds, x[:, 3:]], 1)
        return x + bias

    with hooked(name, {(POINT, 1): function}):
        module(name)(IDS[None]).logits.float().logsumexp(-1).sum().backward()
    by_value = {id(t): t for t in parameters}
    assert len(by_value) == 6
    expected = {
        id(here["mask"].param): p.grad,
        id(here["mask"].offset): m_off.grad,
        id(here["actadd"].param): adds.grad,
        id(here["replace"].param["4"]): vector.grad,
        id(here["postbias"].param): bias.grad,
        id(here["offset"].param): o.grad,
    }
    for parameter, gradient in zip(parameters, found, strict=True):
        close(gradient, expected[id(parameter)], rtol=1e-3, atol=1e-4)
    assert (
        all(weight.grad is None for weight in module(name).parameters())
        or not module(name).zero_grad()
    )


def test_a_trained_vector_converges() -> None:
    model = fresh("gpt2")
    policy = model.hooks[POINT][1]["replace"]
    policy.add_token(4, torch.zeros(64))
    vector = policy.param["4"].requires_grad_()
    optimizer = torch.optim.Adam([vector], lr=0.3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with model.trace(IDS):
            loss = (-model.logits[0, -1].log_softmax(-1)[7]).save()
        loss.value.backward()
        optimizer.step()
        losses.append(loss.value.item())
    assert losses[-1] < 0.3 * losses[0]
    assert model.get_logits(IDS)[0, -1].argmax() == 7
    assert not model.get_logits(IDS).requires_grad


def test_a_trained_mask_finds_the_neurons() -> None:
    model = fresh("gpt2")
    (there,) = seen("gpt2", IDS, [(POINT, 1)])
    wanted = torch.zeros(64)
    wanted[::4] = 1
    target = plain("gpt2", IDS, {(POINT, 1): lambda x: x * wanted})
    mask = model.hooks[POINT][1]["mask"]
    mask.mask_fn = "sigmoid"
    mask.set_mask(torch.zeros(64))
    mask.param.requires_grad_()
    optimizer = torch.optim.Adam([mask.param], lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        with model.trace(IDS):
            loss = ((model.logits - target) ** 2).mean().save()
        loss.value.backward()
        optimizer.step()
    size_of = there.abs().amax((0, 1))
    sure = size_of > size_of.median()
    assert torch.equal((mask.mask > 0.5)[sure], wanted.bool()[sure])
    # As a mask that is one.
    mask.mask_fn = "step"
    mask.param.requires_grad_(False)
    close(model.get_logits(IDS), plain("gpt2", IDS, {(POINT, 1): lambda x: x * (mask.param > 0)}))


def test_two_backward_passes_without_a_step_add_up() -> None:
    model = fresh("gpt2")
    mask = model.hooks[POINT][1]["mask"]
    mask.mask_fn = lambda parameter: parameter.sigmoid() ** 2
    parameter = mask.param.requires_grad_()
    gradients = []
    for _ in range(2):
        with model.trace(IDS):
            loss = model.logits.sum().save()
        loss.value.backward()
        gradients.append(parameter.grad.clone())
    close(gradients[1], 2 * gradients[0], rtol=1e-3, atol=1e-3)


def test_a_mask_may_be_a_module() -> None:
    model = fresh("gpt2")
    mask = model.hooks[POINT][1]["mask"]
    slope = torch.nn.PReLU()
    mask.mask_fn = slope
    mask.set_mask(numbers(64))
    with model.trace(IDS):
        loss = (model.logits**2).sum().save()
    loss.value.backward()
    found = slope.weight.grad.clone()
    assert slope.weight in set(model.hooks.parameters())
    slope.zero_grad()
    with hooked("gpt2", {(POINT, 1): lambda x: x * slope(numbers(64))}):
        (module("gpt2")(IDS[None]).logits ** 2).sum().backward()
    close(found, slope.weight.grad, rtol=1e-3, atol=1e-3)
    model.hooks.reset()
    assert mask.mask_fn == "step" and torch.equal(model.get_logits(IDS), plain("gpt2", IDS))


def test_values_of_an_older_block_do_not_come_late() -> None:
    """Two threads may have a block each."""
    collect = fresh("llama").hooks[POINT][1]["collect"]
    boxes = [collect.parts.part(n, block, 0) for n, block in enumerate((4, 5, 4, 5))]
    for number, box in enumerate(boxes):
        box.value, box.full = torch.full((1, 1, 2), float(number)), True
    collect.concat = True
    assert torch.equal(collect.activation, torch.tensor([[[1.0, 1.0], [3.0, 3.0]]]))


def test_the_next_block_sees_changes() -> None:
    model, d = fresh("llama"), (D,)
    here = model.hooks[POINT][1]

    def check(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        close(model.get_logits(IDS), plain("llama", IDS, {(POINT, 1): function}))

    keep = (numbers(*d) > 0).float()
    here["mask"].set_mask(keep)
    check(lambda x: x * keep)
    here["mask"].param.data[:12] = 0  # torch keeps no count of this
    keep = (here["mask"].param > 0).float()
    check(lambda x: x * keep)
    here["mask"].mask_fn = "sigmoid"
    check(lambda x: x * here["mask"].param.detach().sigmoid())
    here["mask"].mask_fn = "step"
    check(lambda x: x * keep)
    here["mask"].param.data = torch.ones(d)
    here["mask"].offset.data += 3
    check(lambda x: x)
    for number in range(20):  # a new one may be where an old one was
        keep = (numbers(*d, seed=number) > 0).float()
        here["mask"].param = torch.nn.Parameter(keep, requires_grad=False)
        here["mask"].offset = torch.nn.Parameter(torch.zeros(d), requires_grad=False)
        check(lambda x, m=keep: x * m)
    model.hooks.reset()
    here["postbias"].set_bias(torch.ones(d))
    check(lambda x: x + 1)
    with torch.no_grad():
        here["postbias"].param.mul_(2)
    check(lambda x: x + 2)
    here["postbias"].param.data.mul_(2)
    check(lambda x: x + 4)


def test_a_change_while_a_block_is_open() -> None:
    """Which policies there are, is known when the prompt is; their numbers are those of the run."""
    model, vector = fresh("llama"), numbers(D)
    here = model.hooks[POINT][1]
    here["replace"].add_token(2, vector)
    here["mask"].set_mask(torch.zeros(D))
    with model.trace(IDS):
        box = model.layers[1].mlp_post.save()
        here["replace"].param["2"].data *= 2
        here["replace"].add_token(3, vector)
        here["mask"].set_mask(torch.ones(D))
    (x,) = seen("llama", IDS, [(POINT, 1)])
    expected = x.clone()
    expected[:, 2] = 2 * vector
    close(box, expected)
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            first = model.layers[1].mlp_post.save()
        here["replace"].reset()
        with tracer.invoke(IDS):
            second = model.layers[1].mlp_post.save()
    expected[:, 3] = vector
    close(first, expected)
    close(second, x)


# -------------------------------------------------------------------- other ways to run


def everything(model: Any, d: tuple[int, ...]) -> None:
    here = model.hooks[POINT][1]
    here["offset"].set_offset(numbers(*d, seed=1))
    here["mask"].set_mask(numbers(*d, seed=2))
    here["replace"].add_token(1, numbers(*d, seed=3))
    here.set_actadd(numbers(3, *d, seed=4))
    here["postbias"].set_bias(numbers(*d, seed=5))


def test_scan_knows_shapes_and_runs_nothing() -> None:
    model = fresh("llama")
    everything(model, (D,))
    with model.scan(IDS):
        box = model.layers[2].resid_post.save()
    assert box.value.is_meta and box.value.shape == (1, 5, 16)
    model.hooks[POINT][1]["replace"].param["3"] = torch.nn.Parameter(torch.ones(5))
    with pytest.raises(ShapeError, match=r"replacement of token 3 is \[5\].*\[24\]"):
        model.get_logits(IDS)


def test_sessions() -> None:
    model = fresh("llama")
    everything(model, (D,))
    model.hooks[POINT][1]["collect"].enable()
    alone = [model.get_logits(ids) for ids in (IDS, LONG)]
    with model.session():
        with model.trace(IDS):
            first, passed = model.logits.save(), model.layers[0].mlp_post[0, 0]
        with model.trace(LONG):
            second = model.logits.save()
        with model.trace(LONG):
            model.layers[1].mlp_post = functions.replace(model.layers[1].mlp_post, {0: passed})
            third = model.layers[1].mlp_post[0, 0].save()
    close(first, alone[0])
    close(second, alone[1])
    close(third, seen("llama", IDS, [(POINT, 0)])[0][0, 0])
    assert model.hooks[POINT][1]["collect"].activation.shape == (1, 7, D)


def test_compiled_blocks() -> None:
    model = fresh("llama")
    everything(model, (D,))
    model.hooks[POINT][1]["collect"].enable()
    with model.trace(IDS) as tracer:
        logits = model.logits.save()
    experiment = tracer.compile()
    close(experiment()[logits], logits.value)
    (other,) = random_prompts(5, seed=4)
    close(experiment(other)[logits], model.get_logits(other))
    # With the numbers that the policies have then.
    model.hooks[POINT][1]["postbias"].set_bias(numbers(D, seed=9))
    close(experiment(other)[logits], model.get_logits(other))


def test_graphs_are_printed_and_drawn() -> None:
    model = fresh("llama")
    everything(model, (D,))
    here = model.hooks[POINT][1]
    here["whiten"].set_whitening(torch.zeros(D), torch.eye(D), torch.ones(D))
    here["unwhiten"]
    with model.trace(IDS) as tracer:
        model.logits.save()
        text = str(tracer.graph)
        for name in "shift mask replace_tokens add_tokens whiten unwhiten".split():
            assert f"{name}(" in text
        assert "1 prompt in 1 pass" in str(tracer.explain())
        tracer.graph.lint()
        drawing = tracer.graph.draw()
    assert text.count("test_blocks.py") >= 8
    for drawn in (drawing.dot, drawing.mermaid, str(drawing)):
        assert "replace_tokens" in drawn and "unwhiten" in drawn


@pytest.mark.parametrize("kind", ["step", "sigmoid", "tanh", "relu", torch.sigmoid])
def test_graphs_with_policies_are_sent(kind: Any) -> None:
    model = fresh("llama")
    everything(model, (D,))
    here = model.hooks[POINT][1]
    here["mask"].mask_fn = kind
    here["whiten"].set_whitening(torch.zeros(D), torch.eye(D), torch.ones(D))
    here["unwhiten"]
    here["replace"].autorestart = False
    with model.trace(IDS) as tracer:
        logits = model.logits.save()
    data = pack(tracer.graph)
    graph = unpack(data).graph
    graph.lint()
    assert pack(graph) == data
    experiment = tracer.compile()
    experiment.graph = graph
    close(experiment()[-1], logits.value)


def test_functions_of_python_are_not_sent() -> None:
    model = fresh("llama")
    model.hooks[POINT][1]["mask"].mask_fn = lambda parameter: parameter
    with model.trace(IDS) as tracer:
        model.logits.save()
    with pytest.raises(WireError, match="Python function"):
        pack(tracer.graph)


def test_threads() -> None:
    """Each has its own block; policies that are made at the same time are there."""
    model = fresh("llama")
    everything(model, (D,))
    model.hooks[POINT][1]["collect"].enable(concat=True)
    expected = {n: model.get_logits(ids) for n, ids in enumerate((IDS, LONG))}
    wrong: list[Any] = []

    def work(number: int) -> None:
        ids = (IDS, LONG)[number]
        try:
            for turn in range(12):
                model.hooks["post_mlp"][turn % 3]["mask"].set_mask(torch.ones(16))
                close(model.get_logits(ids), expected[number])
                found = model.hooks[POINT][1]["collect"].activation
                assert found is None or found.shape in ((1, 5, D), (1, 7, D))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


@pytest.mark.slow
def test_memory_is_flat() -> None:
    model = fresh("llama")
    everything(model, (D,))
    model.hooks.enable_collect_hooks(concat=True)
    policy = model.hooks[POINT][1]["replace"]
    policy.autorestart = False
    counts = []
    for turn in range(300):
        model.get_logits(IDS if turn % 2 else LONG)
        policy.restart()
        if turn % 50 == 49:
            gc.collect()
            kinds = [type(one) for one in gc.get_objects()]
            counts.append((sum(issubclass(k, torch.Tensor) for k in kinds), len(kinds)))
    tensors, objects = zip(*counts[1:], strict=True)
    assert max(tensors) == min(tensors)
    assert max(objects) - min(objects) < 200, counts


@pytest.mark.parametrize(
    "name", ["gpt2", "opt", "llama", "gpt_neox", "gemma2", "roberta", "mistral"]
)
def test_nothing_is_left_after_reset(name: str) -> None:
    model = fresh(name)
    before = model.get_logits(IDS)
    weights = {n: p.clone() for n, p in module(name).named_parameters()}
    chosen = [
        (point, 1, kind, 2)
        for point in POINTS
        for kind in ("mask", "actadd", "replace", "postbias", "offset", "whiten")
    ]
    put(model, name, chosen)
    for *_, mask in model.hooks.every("mask"):
        mask.mask_fn = "sigmoid"
        mask.param.requires_grad_()
    model.hooks.enable_collect_hooks()
    assert not torch.equal(model.get_logits(IDS), before)
    model.hooks.reset()
    assert torch.equal(model.get_logits(IDS), before)
    assert torch.equal(before, plain(name, IDS))
    with model.trace(IDS) as tracer:
        model.logits.save()
    assert len(tracer.graph) <= 2  # not a node of a policy
    assert all(torch.equal(p, weights[n]) for n, p in module(name).named_parameters())
    assert not any(p.requires_grad for p in model.hooks.parameters())


def test_a_compiled_block_with_counted_tokens_keeps_its_lengths() -> None:
    model = LanguageModel(build("gpt2"))
    model.hooks["mlp_pre_out"][1]["replace"].add_token(7, torch.ones(model.cfg.d_mlp))
    with model.trace([1, 2, 3, 4, 5]) as tracer:
        model.layers[1].mlp_post.save()
    experiment = tracer.compile()
    with pytest.raises(InputError, match="same lengths"):
        experiment([1, 2, 3, 4, 5, 6, 7, 8, 9])


def test_an_edited_view_has_the_policies_of_its_model() -> None:
    model = LanguageModel(build("gpt2"))
    with model.edit() as edited:
        model.layers[0].z[:, :, 0] = 0
    model.hooks["mlp_pre_out"][1].delete_neurons(remove_indices=torch.ones(model.cfg.d_mlp))
    with edited.trace([1, 2, 3]):
        neurons, heads = edited.layers[1].mlp_post.save(), edited.layers[0].z.save()
    assert neurons.value.abs().max() == 0 and heads.value[:, :, 0].abs().max() == 0
