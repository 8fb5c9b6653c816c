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
from graftwork.tracing.errors import InputError

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
