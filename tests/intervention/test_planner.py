"""The planner as a whole: whatever is switched on, a block gives what one plain forward for each invoke
gives; and what it leaves out."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graftwork import LanguageModel
from graftwork.intervention import Settings

# ---------------------------------------------------------------- a property: planned = plain

#: Name → list of blocks, MLP and attention in a block, embedding, unembedding.
NAMES = {
    "gpt2": ("transformer.h", "mlp", "attn", "transformer.wte", "lm_head"),
    "llama": ("model.layers", "mlp", "self_attn", "model.embed_tokens", "lm_head"),
    "gpt_neox": ("gpt_neox.layers", "mlp", "attention", "gpt_neox.embed_in", "embed_out"),
    "opt": ("model.decoder.layers", "fc2", "self_attn", "model.decoder.embed_tokens", "lm_head"),
}
SWITCHES = [field.name for field in dataclasses.fields(Settings) if field.type == "bool"]
LENGTHS = (3, 9, 14)

Place = tuple[str, str]


@dataclasses.dataclass
class Use:
    """A write: the row of one token is scaled, or taken from another invoke."""

    place: Place
    token: int
    factor: float = 0.0
    source: tuple[int, Place, int] | None = None


@dataclasses.dataclass
class Plan:
    """One random invoke."""

    prompt: int
    edits: list[Use]
    saves: list[Place]
    last: int | None


def places_of(name: str) -> list[Place]:
    blocks, mlp, attention, embedding, head = NAMES[name]
    places = [(embedding, "output"), (head, "output")]
    for i in range(4):
        places += [(f"{blocks}.{i}", "input"), (f"{blocks}.{i}", "output")]
        places += [(f"{blocks}.{i}.{inner}", "output") for inner in (mlp, attention)]
    return places


@st.composite
def programs(draw: st.DrawFn, name: str) -> tuple[list[Plan], list[tuple[int, int, Place]]]:
    """Random invokes, and pairs of them that swap a token's row at one hook point."""
    places = places_of(name)
    head = (NAMES[name][-1], "output")
    prompts = draw(st.integers(1, 3))
    count = draw(st.integers(2, 12))
    hidden = st.sampled_from([place for place in places if place != head])
    anywhere = st.sampled_from(places)
    plans: list[Plan] = []
    for index in range(count):
        edits = []
        prompt = draw(st.integers(0, prompts - 1))
        for _ in range(draw(st.integers(0, 2))):
            source = None
            place = draw(anywhere)
            if index and place != head and draw(st.booleans()):
                other = draw(st.integers(0, index - 1))
                last = LENGTHS[plans[other].prompt] - 1
                source = (other, draw(hidden), draw(st.integers(0, last)))
            token = draw(st.integers(0, LENGTHS[prompt] - 1))
            edits.append(Use(place, token, draw(st.sampled_from((0, 2, -1))), source))
        saves = draw(st.lists(anywhere, max_size=2))
        logits = draw(st.sampled_from((None, 1, 3)))
        if not saves and logits is None:
            logits = 1
        plans.append(Plan(prompt, edits, saves, logits))
    swaps = []
    free = [i for i, one in enumerate(plans) if not any(edit.source for edit in one.edits)]
    if len(free) > 1 and draw(st.booleans()):
        first, second = free[0], free[-1]
        place = draw(hidden)
        written = {edit.place for i in (first, second) for edit in plans[i].edits}
        if place not in written:
            swaps.append((first, second, place))
    return plans, swaps


def expected_values(
    tools: Any, module: Any, head: str, plans: list[Plan], swaps: list[Any], ids: list[Any]
) -> list[list[torch.Tensor]]:
    """What each invoke saves, by one plain forward for each."""
    results: list[dict[Place, torch.Tensor]] = []

    def hooks(one: Plan) -> list[Any]:
        found = []
        for edit in one.edits:

            def change(value: torch.Tensor, edit: Use = edit) -> torch.Tensor:
                if edit.source is None:
                    value[..., edit.token, :] *= edit.factor
                else:
                    other, place, token = edit.source
                    value[..., edit.token, :] = results[other][place][..., token, :]
                return value

            found.append((edit.place, change))
        return found

    for index, one in enumerate(plans):
        edits = hooks(one)
        for pair in swaps:
            if index in pair[:2]:
                other, place = plans[pair[0] if index == pair[1] else pair[1]], pair[2]
                value = tools.plain(module, ids[other.prompt], hooks(other))[place]

                def take(mine: torch.Tensor, value: torch.Tensor = value) -> torch.Tensor:
                    mine[..., 0, :] = value[..., 0, :]
                    return mine

                edits.append((place, take))
        results.append(tools.plain(module, ids[one.prompt], edits))
    values = []
    for one, seen in zip(plans, results, strict=True):
        values.append([seen[place] for place in one.saves])
        if one.last is not None:
            values[-1].append(seen[head, "output"][:, -one.last :])
    return values


def in_block(
    model: Any, head: str, plans: list[Plan], swaps: list[Any], ids: list[Any], plan: Any
) -> list[list[Any]]:
    """The same in one block."""

    def at(place: Place) -> Any:
        envoy = model.get(place[0])
        if place[1] == "input":
            return envoy.input
        leaf = place[0].rpartition(".")[2]
        tuples = leaf.isdigit() or leaf.endswith(("attn", "attention"))
        return envoy.output[0] if tuples else envoy.output

    def put(place: Place, token: int, value: Any) -> None:
        at(place)[..., token, :] = value

    saved: list[list[Any]] = []
    with model.trace(plan=plan) as tracer:
        invokes = [tracer.invoke(ids[one.prompt]) for one in plans]
        for first, second, place in swaps:
            rows = {}
            for i in (first, second):
                with invokes[i]:
                    rows[i] = at(place)[..., 0, :] + 0
            for i, j in ((first, second), (second, first)):
                with invokes[i]:
                    put(place, 0, rows[j])
        for invoke, one in zip(invokes, plans, strict=True):
            for edit in one.edits:
                value = None
                if edit.source is not None:
                    other, place, token = edit.source
                    with invokes[other]:
                        value = at(place)[..., token, :]
                with invoke:
                    if value is None:
                        value = at(edit.place)[..., edit.token, :] * edit.factor
                    put(edit.place, edit.token, value)
            with invoke:
                mine = [at(place).save() for place in one.saves]
                if one.last == 1:
                    mine.append(model.get(head).output[:, -1, None].save())
                elif one.last is not None:
                    mine.append(model.get(head).output[:, -one.last :].save())
                saved.append(mine)
    return saved


@pytest.mark.slow
@pytest.mark.parametrize("name", list(NAMES))
def test_any_subset_of_the_passes_gives_what_plain_forwards_give(
    name: str, tools: SimpleNamespace
) -> None:
    module, model = tools.module(name), tools.model(name)
    head = next(p for p, c in module.named_modules() if c is module.get_output_embeddings())
    NAMES[name] = (*NAMES[name][:-1], head)
    ids = tools.prompts(*LENGTHS)

    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        program=programs(name),
        switches=st.fixed_dictionaries({switch: st.booleans() for switch in SWITCHES}),
        tokens=st.sampled_from((None, 12, 40)),
    )
    def holds(program: Any, switches: dict[str, bool], tokens: int | None) -> None:
        plans, swaps = program
        expected = expected_values(tools, module, head, plans, swaps, ids)
        for plan in ({**switches, "tokens": tokens}, None, False):
            saved = in_block(model, head, plans, swaps, ids, plan)
            wrong = [
                (i, j)
                for i, (mine, theirs) in enumerate(zip(saved, expected, strict=True))
                for j, (a, b) in enumerate(zip(mine, theirs, strict=True))
                if not tools.close(a, b)
            ]
            assert wrong == [], plan

    holds()


# ---------------------------------------------------------------- less head


@pytest.fixture
def model(tools: SimpleNamespace) -> LanguageModel:
    model: LanguageModel = tools.model("gpt2")
    return model


LAST: dict[str, tuple[Any, int]] = {
    "[:, -1]": ((slice(None), -1), 1),
    "[0, -1]": ((0, -1), 1),
    "[:, -1, 7]": ((slice(None), -1, 7), 1),
    "[:, -3:]": ((slice(None), slice(-3, None)), 3),
    "[:, -2]": ((slice(None), -2), 2),
    "[:, -3:-1]": ((slice(None), slice(-3, -1)), 8),
    "[:, 2]": ((slice(None), 2), 8),
    "[:, :, 3]": ((slice(None), slice(None), 3), 8),
    "[..., -1]": ((..., -1), 8),
    "[None, -1]": ((None, -1), 8),
    "[0]": (0, 8),
    "[:, [-1, 0]]": ((slice(None), [-1, 0]), 8),
    "[mask, -1]": ((torch.arange(8)[None] == 2, -1), 8),
}


@pytest.mark.parametrize("name", list(LAST))
def test_only_the_last_positions_that_are_used_are_unembedded(
    name: str, model: Any, tools: SimpleNamespace
) -> None:
    module = tools.module("gpt2")
    (prompt,) = tools.prompts(8)
    key, positions = LAST[name]
    with tools.batches_of(module, "lm_head") as shapes:
        with model.trace(prompt):
            logits = model.lm_head.output[key].save()
    assert shapes == [(1, positions, 16)]
    assert tools.close(logits, tools.plain(module, prompt)["lm_head", "output"][key])


def test_most_positions_that_any_prompt_uses_are_unembedded(
    model: Any, tools: SimpleNamespace
) -> None:
    module, ids = tools.module("gpt2"), tools.prompts(8, 7, 2)
    saved = []
    with tools.batches_of(module, "lm_head") as shapes:
        with model.trace() as tracer:
            for prompt, positions in zip(ids, (1, 3, 5), strict=True):
                with tracer.invoke(prompt):
                    saved.append(model.lm_head.output[:, -positions:].save())
    assert all(shape[1] <= 5 for shape in shapes)
    for prompt, positions, value in zip(ids, (1, 3, 5), saved, strict=True):
        expected = tools.plain(module, prompt)["lm_head", "output"][:, -positions:]
        assert tools.close(value, expected)


def whole(model: Any, tracer: Any) -> Any:
    return model.lm_head.output.save()


def written(model: Any, tracer: Any) -> Any:
    model.lm_head.output[:, -1] *= 2
    return model.lm_head.output[:, -1].save()


def read_by_output(model: Any, tracer: Any) -> Any:
    model.lm_head.output[:, -1].save()
    return tracer.output.logits.save()


def read_at_input(model: Any, tracer: Any) -> Any:
    model.lm_head.output[:, -1].save()
    return model.lm_head.input.save()


@pytest.mark.parametrize("use", [whole, written, read_by_output, read_at_input])
def test_all_positions_are_unembedded_where_all_are_used(
    use: Any, model: Any, tools: SimpleNamespace
) -> None:
    module = tools.module("gpt2")
    (prompt,) = tools.prompts(8)
    with tools.batches_of(module, "lm_head") as shapes:
        with model.trace(prompt) as tracer:
            value = use(model, tracer)
    assert shapes == [(1, 8, 16)]
    assert value.shape[-1] in (61, 16)


def test_all_positions_are_unembedded_for_a_loss(model: Any, tools: SimpleNamespace) -> None:
    (prompt,) = tools.prompts(8)
    with tools.batches_of(tools.module("gpt2"), "lm_head") as shapes:
        with model.trace(prompt, labels=prompt, plan={"stop": False}):
            model.lm_head.output[:, -1].save()
    assert shapes == [(1, 8, 16)]


def test_all_positions_are_unembedded_if_it_is_switched_off(
    model: Any, tools: SimpleNamespace
) -> None:
    module = tools.module("gpt2")
    (prompt,) = tools.prompts(8)
    with tools.batches_of(module, "lm_head") as shapes:
        with model.trace(prompt, plan={"less_head": False}):
            model.lm_head.output[:, -1].save()
    assert shapes == [(1, 8, 16)]


@pytest.mark.parametrize(
    ("key", "first"), [((slice(None), -1), 1), ((slice(None), slice(-3, None)), 3), ((0, 2), 8)]
)
def test_generation_unembeds_what_is_used_of_the_prompt(
    key: Any, first: int, model: Any, tools: SimpleNamespace
) -> None:
    module = tools.module("gpt2")
    (prompt,) = tools.prompts(8)
    saved = []
    with tools.batches_of(module, "lm_head") as shapes:
        with model.generate(prompt, max_new_tokens=3) as generator:
            saved.append(model.lm_head.output[key].save())
            for _ in range(2):
                generator.next()
                saved.append(model.lm_head.output[:, -1].save())
    assert [shape[1] for shape in shapes] == [first, 1, 1]
    assert tools.close(saved[0], tools.plain(module, prompt)["lm_head", "output"][key])
    ids = prompt[None]
    for step in range(3):
        logits = tools.plain(module, ids)["lm_head", "output"][:, -1]
        if step:
            assert tools.close(saved[step], logits)
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)


# ---------------------------------------------------------------- dead code, memory, autograd


@pytest.mark.parametrize("on", [True, False])
def test_what_no_save_needs_does_not_run(on: bool, model: Any, tools: SimpleNamespace) -> None:
    (prompt,) = tools.prompts(5)
    with tools.block_rows(tools.module("gpt2")) as rows:
        with model.trace(prompt, plan={"dead_code": on}):
            (model.transformer.h[3].output * 2).sum()
            first = model.transformer.h[0].output.save()
    assert sum(rows.values()) == (1 if on else 4)
    assert tools.close(
        first, tools.plain(tools.module("gpt2"), prompt)["transformer.h.0", "output"]
    )


@pytest.mark.parametrize("plan", [None, False])
def test_no_graph_of_gradients_without_need(plan: Any, model: Any, tools: SimpleNamespace) -> None:
    ids = tools.prompts(5, 4, 5)
    vector = torch.zeros(16)
    saved = []
    with model.trace(plan=plan) as tracer:
        for prompt in (*ids, ids[0]):
            with tracer.invoke(prompt):
                model.transformer.h[1].output[:, 0] += vector
                saved.append(model.lm_head.output[:, -1].save())
    assert all(value.value.grad_fn is None and not value.value.requires_grad for value in saved)


@pytest.mark.parametrize("plan", [None, False, {"tokens": 5}])
def test_gradients_reach_a_captured_tensor_through_all_variants(
    plan: Any, model: Any, tools: SimpleNamespace
) -> None:
    module = tools.module("gpt2")
    (prompt,) = tools.prompts(5)
    vector = torch.full((16,), 0.1, requires_grad=True)
    saved = []
    with model.trace(plan=plan) as tracer:
        for k in range(4):
            with tracer.invoke(prompt):
                model.transformer.h[k].output[:, 1] += vector
                saved.append(model.lm_head.output[:, -1].save())
    sum(value.value.square().sum() for value in saved).backward()
    mine = vector.grad
    other = torch.full((16,), 0.1, requires_grad=True)
    for k in range(4):

        def plus(_: Any, args: Any, output: Any) -> Any:
            return torch.cat((output[:, :1], output[:, 1:2] + other, output[:, 2:]), 1)

        handle = module.transformer.h[k].register_forward_hook(plus)
        module(prompt[None]).logits[:, -1].square().sum().backward()
        handle.remove()
    for parameter in module.parameters():
        parameter.grad = None
    assert mine is not None and other.grad is not None
    assert tools.close(mine, other.grad, 1e-4)
