"""Random small programs mean what they mean in plain torch.

A program is a list of steps: reads, operations, views, in-place edits, writes and saves at the three
hook points of a toy. Plain torch runs it in forward hooks, one hook a layer, cloning what is saved;
graftwork runs it in a block. Saved values and the model's output must be equal to the bit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from graftwork import Model
from graftwork.tracing.wire import pack, unpack

SHAPE = (2, 3, 4)
LAYERS = 3


class Layers(nn.Module):
    """Three layers [2, 3, 4] → [2, 3, 4]; the model edits the last one's output in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(LAYERS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            y = x * 0.5
            x.add_(1)  # after the hooks: what they saved must not feel it
        return x + y


torch.manual_seed(0)
MODULE = Layers()
MODEL = Model(MODULE)
X = torch.randn(SHAPE)


@dataclasses.dataclass(frozen=True)
class Step:
    kind: str
    function: int = 0
    first: int = 0
    second: int = 0


VIEWS: list[Callable[[Any], Any]] = [
    lambda a: a[0],
    lambda a: a[-1:],
    lambda a: a[..., 0],
    lambda a: a[..., 1:],
    lambda a: a[None],
    lambda a: a.transpose(0, -1),
    lambda a: a.reshape(-1),
    lambda a: a.flatten(),
    lambda a: a.unsqueeze(-1),
    lambda a: a.unbind(0)[-1],
    lambda a: a.chunk(2, -1)[0],
    lambda a: a.detach(),
    # Torch may return `a` itself here; the index makes a second handle of it, as in a block.
    lambda a: a.contiguous()[...],
    lambda a: a.mT,
    lambda a: a.narrow(0, 0, 1),
    lambda a: a.movedim(0, -1),
]
PURE: list[Callable[[Any], Any]] = [
    lambda a: a * 2,
    lambda a: a + 0,
    lambda a: a.clone(),
    lambda a: a.tanh(),
    lambda a: a[[0]],
    lambda a: a.flip(0),
    lambda a: a.double().float(),
    lambda a: a.sum(0, keepdim=True),
    lambda a: torch.cat([a, a]),
    lambda a: a.cumsum(-1),
]
BINARY: list[Callable[[Any, Any], Any]] = [
    lambda a, b: a + b.sum(),
    lambda a, b: torch.where(a > b.mean(), a, -a),
    lambda a, b: torch.stack([a.sum(), b.max()]),
]
EDITS: list[Callable[[Any], Any]] = [
    lambda a: a.add_(1),
    lambda a: a.mul_(2),
    lambda a: a.zero_(),
    lambda a: a.clamp_(min=0),
    lambda a: a.__setitem__(0, 3),
    lambda a: a.__setitem__(..., a * 0.5),
    lambda a: a.__setitem__(a > 0, 0.25),
    lambda a: a.__setitem__([0], 1.5),
    lambda a: a.__iadd__(torch.tensor(2.0)),
    lambda a: a.copy_(a.flip(0)),
    lambda a: a.__setitem__((..., 0), a[..., -1]),
]
MERGES: list[Callable[[Any, Any], Any]] = [
    lambda a, b: a.add_(b.mean()),
    lambda a, b: a.__setitem__(0, b.sum()),
    lambda a, b: a.__setitem__(..., b.max() - b.min()),
    lambda a, b: a.mul_(b.reshape(-1)[0].clone()),
]

TABLES: dict[str, list[Any]] = {
    "view": VIEWS,
    "pure": PURE,
    "binary": BINARY,
    "edit": EDITS,
    "merge": MERGES,
}

steps = st.builds(
    Step,
    kind=st.sampled_from(
        [*["view", "edit"] * 3, *["merge", "save"] * 2, "pure", "binary", "read", "assign"]
    ),
    function=st.integers(0, 30),
    first=st.integers(0, 30),
    second=st.integers(0, 30),
)
programs = st.lists(st.lists(steps, max_size=7), min_size=LAYERS, max_size=LAYERS)


class World:
    """What the two executions differ in: a hook point's value, its replacement, saving."""

    def read(self, layer: int) -> Any: ...

    def assign(self, layer: int, value: Any) -> None: ...

    def save(self, value: Any) -> Any: ...


def shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape)


def execute(world: World, layer: int, program: list[Step], values: list[Any]) -> list[Any]:
    """One layer's steps. Steps that torch would refuse are left out, by shape alone."""
    saved = []
    # In a hook it is too late to edit what an earlier layer returned; in a block it is not.
    editable = [False] * len(values)
    values.append(world.read(layer))
    for step in program:
        editable += [True] * (len(values) - len(editable))
        place = len(values) - 1 - step.first % len(values)
        first = values[place]
        second = values[-1 - step.second % len(values)]
        if step.kind == "read":
            values.append(world.read(layer))
        elif step.kind == "save":
            saved.append(world.save(first))
        elif step.kind == "assign":
            if shape(first) == SHAPE:
                world.assign(layer, first)
        elif not 2 <= len(shape(first)) <= 5 or 0 in (*shape(first), *shape(second)):
            continue
        else:
            table = TABLES[step.kind]
            function = table[step.function % len(table)]
            if step.kind == "pure":
                values.append(function(first))
            elif step.kind == "view":
                values.append(function(first))
                editable.append(editable[place])
            elif step.kind == "binary":
                values.append(function(first, second))
            elif not editable[place]:
                continue
            elif step.kind == "edit":
                function(first)
            else:
                function(first, second)
    return saved


class Plain(World):
    def __init__(self) -> None:
        self.now: torch.Tensor | None = None

    def read(self, layer: int) -> Any:
        return self.now

    def assign(self, layer: int, value: Any) -> None:
        # An assigned value is that of this line: what is edited later is what is read again.
        if value is not self.now:
            self.now = value.clone()

    def save(self, value: Any) -> Any:
        return value.clone()


def run_plain(program: list[list[Step]]) -> tuple[list[torch.Tensor], torch.Tensor]:
    world, values, saved = Plain(), [], []

    def hook(layer: int) -> Callable[..., Any]:
        def run(_m: Any, _a: Any, output: torch.Tensor) -> torch.Tensor:
            world.now = output
            saved.extend(execute(world, layer, program[layer], values))
            # The model goes on to change this memory; a block's values stay what they were.
            values[:] = [value.clone() for value in values]
            return world.now

        return run

    handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(MODULE.layers)]
    try:
        with torch.no_grad():
            result = MODULE(X)
    finally:
        for handle in handles:
            handle.remove()
    return saved, result


class Block(World):
    def read(self, layer: int) -> Any:
        return MODEL.layers[layer].output

    def assign(self, layer: int, value: Any) -> None:
        MODEL.layers[layer].output = value

    def save(self, value: Any) -> Any:
        return value.save()


def run_block(program: list[list[Step]]) -> tuple[list[torch.Tensor], torch.Tensor]:
    world, values, saved = Block(), [], []
    with MODEL.trace(X) as tracer:
        for layer, part in enumerate(program):
            saved.extend(execute(world, layer, part, values))
        result = tracer.output.save()
    tracer.graph.lint()
    return [handle.value for handle in saved], result.value


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs)
def test_program_means_what_it_means_in_plain_torch(program: list[list[Step]]) -> None:
    expected, output = run_plain(program)
    found, result = run_block(program)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, equal_nan=True)
        assert one.untyped_storage().nbytes() == one.numel() * one.element_size()
    torch.testing.assert_close(result, output, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in MODULE.modules())


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs)
def test_program_that_was_sent_means_what_it_means_in_plain_torch(
    program: list[list[Step]],
) -> None:
    expected, output = run_plain(program)
    world, values, saved = Block(), [], []
    with MODEL.trace(X) as tracer:
        for layer, part in enumerate(program):
            saved.extend(execute(world, layer, part, values))
        tracer.output.save()
    data = pack(tracer.graph)
    graph = unpack(data).graph
    graph.lint()
    assert pack(graph) == data
    experiment = tracer.compile()
    experiment.graph = graph
    found = list(experiment())
    assert len(found) == len(expected) + 1
    for one, other in zip(found, [*expected, output], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, equal_nan=True)
