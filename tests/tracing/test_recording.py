"""What a recording means: arguments are taken at their line. Against plain hooks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import graftwork
from graftwork import LanguageModel, Model
from graftwork.tracing.errors import BlockError, CapturedTensorError

Hook = Callable[..., Any]


def changed(toy: Model, x: torch.Tensor, reference: Hook, change: Callable[[Any], Any]) -> Any:
    """The model's result with a plain hook that changes what `mid` gives, in place."""

    def hook(out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        change(out)
        return out

    return reference(toy.load(), (x,), {"mid": hook})


def test_a_list_that_is_used_again_in_a_sweep(toy: Model, x: torch.Tensor, reference: Hook) -> None:
    place, found = [0], []
    with toy.trace() as tracer:
        for number in range(3):
            place[0] = number
            with tracer.invoke(x):
                toy.mid.output[:, place] = 0
                found.append(tracer.output.save())
    for number, one in enumerate(found):

        def change(out: torch.Tensor, number: int = number) -> None:
            out[:, [number]] = 0

        torch.testing.assert_close(one.value, changed(toy, x, reference, change))


KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], None], Callable[[Any, Any], Any]]] = {
    # what is made, how it is changed afterwards, and how a value uses it
    "list in a key": (
        lambda: [0, 2],
        lambda made: made.append(1),
        lambda h, made: h[:, made].sum(1),
    ),
    "list in a list": (
        lambda: [[0], [2]],
        lambda made: made[0].__setitem__(0, 4),
        lambda h, made: h[:, made].sum(1),
    ),
    "shape": (
        lambda: [2, 5, 4, 2],
        lambda made: made.__setitem__(slice(2, None), [2, 4]),
        lambda h, made: h.reshape(made),
    ),
    "size": (
        lambda: torch.Size([2, 5, 4, 2]),
        lambda made: None,
        lambda h, made: h.reshape(made),
    ),
    "dict": (
        lambda: {"dim": 1, "keepdim": True},
        lambda made: made.update(dim=0, keepdim=False),
        lambda h, made: graftwork.apply(lambda v, given: v.sum(**given), h, made),
    ),
    "list in a dict in a tuple": (
        lambda: ({"dims": [1, 2]},),
        lambda made: made[0]["dims"].pop(),
        lambda h, made: graftwork.apply(lambda v, given: v.sum(given[0]["dims"]), h, made),
    ),
    "set": (
        lambda: {1, 3},
        lambda made: made.clear(),
        lambda h, made: graftwork.apply(lambda v, given: v[:, sorted(given)], h, made),
    ),
    "deque": (
        lambda: deque([1, 3]),
        lambda made: made.clear(),
        lambda h, made: graftwork.apply(lambda v, given: v[:, list(given)], h, made),
    ),
    "array": (
        lambda: np.arange(8, dtype=np.float32),
        lambda made: made.fill(9),
        lambda h, made: h * made,
    ),
    "array of places": (
        lambda: np.array([0, 2]),
        lambda made: made.fill(4),
        lambda h, made: h[:, made],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_changed_after_its_line_was_what_it_was_there(
    toy: Model, x: torch.Tensor, reference: Hook, kind: str
) -> None:
    make, change, use = KINDS[kind]
    made, same = make(), make()
    if isinstance(same, np.ndarray):
        same = torch.from_numpy(same)
    seen: list[torch.Tensor] = []
    reference(toy.load(), (x,), {"inp": lambda out: seen.append(use(out, same))})
    with toy.trace(x):
        found = use(toy.inp.output, made).save()
        change(made)
    torch.testing.assert_close(found.value, seen[0])


@pytest.mark.parametrize("shared", ["from_numpy", "numpy"])
def test_small_memory_that_numpy_writes_to_is_taken_at_its_line(
    toy: Model, x: torch.Tensor, shared: str
) -> None:
    if shared == "from_numpy":
        array = np.zeros(8, dtype=np.float32)
        vector = torch.from_numpy(array)
    else:
        vector = torch.zeros(8)
        array = vector.numpy()
    found = []
    with toy.trace() as tracer:
        for number in range(3):
            array[:] = number
            with tracer.invoke(x):
                found.append((toy.inp.output + vector).save())
    plain = toy.load().inp(x)
    for number, one in enumerate(found):
        torch.testing.assert_close(one.value, plain + number)


def test_large_memory_that_numpy_writes_to_is_watched(toy: Model, x: torch.Tensor) -> None:
    array = np.ones((8, 4096), dtype=np.float32)
    weight = torch.from_numpy(array)
    with toy.trace(x):
        found = (toy.inp.output @ weight).save()
        again = (toy.mid.output @ weight).save()
    torch.testing.assert_close(found.value, toy.load().inp(x) @ torch.ones(8, 4096))
    assert again.value.shape == found.value.shape
    with pytest.raises(CapturedTensorError, match=r"(?s)`weight`.*changed in place.*clone"):
        with toy.trace(x):
            (toy.inp.output @ weight).save()
            array[3, 7] = 2


def test_a_leaf_of_autograd_in_shared_memory_keeps_its_gradient(
    toy: Model, x: torch.Tensor
) -> None:
    vector = torch.from_numpy(np.ones(8, dtype=np.float32)).requires_grad_()
    with toy.trace(x):
        toy.inp.output[:] = toy.inp.output * vector
        toy.output.sum().backward()
    assert vector.grad is not None and vector.grad.abs().sum() > 0


def test_a_prompt_is_what_it_was_when_it_was_given(toy: Model, x: torch.Tensor) -> None:
    given, found = x.clone(), []
    with toy.trace() as tracer:
        for number in range(3):
            given[0, 0] = number
            with tracer.invoke(given):
                found.append(toy.inp.output.save())
    for number, one in enumerate(found):
        wanted = x.clone()
        wanted[0, 0] = number
        torch.testing.assert_close(one.value, toy.load().inp(wanted))


def test_token_ids_are_what_they_were_when_they_were_given(
    gpt2: LanguageModel, ids: torch.Tensor
) -> None:
    for make in (lambda: ids.clone(), lambda: ids.numpy().copy(), lambda: ids.tolist()):
        given, found = make(), []
        with gpt2.trace() as tracer:
            for number in range(3):
                given[0][1] = number
                with tracer.invoke(given):
                    found.append(gpt2.lm_head.output.save())
        for number, one in enumerate(found):
            wanted = ids.clone()
            wanted[0, 1] = number
            with torch.no_grad():
                torch.testing.assert_close(one.value, gpt2.load()(wanted).logits)


def test_positions_of_tokens_in_a_loop(gpt2: LanguageModel, ids: torch.Tensor) -> None:
    def run(change: bool) -> Any:
        places = [0, 2]
        with gpt2.generate(ids[:1], max_new_tokens=1) as generator:
            with generator.all():
                found = gpt2.transformer.h[0].output[0].t[places].save()
                places[0] = 3 if change else 0
        return found.value

    torch.testing.assert_close(run(True), run(False))


# ---------------------------------------------------------------- assigning binds a new value

ASSIGNED: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], None]]] = {
    "output[0]": (lambda b: b.output[0], lambda b, v: b.output.__setitem__(0, v)),
    "output": (lambda b: b.output, lambda b, v: setattr(b, "output", v)),
    "input": (lambda b: b.input, lambda b, v: setattr(b, "input", v)),
    "inputs[0][0]": (lambda b: b.inputs[0][0], lambda b, v: setattr(b, "input", v)),
    "attn.output[0]": (
        lambda b: b.attn.output[0],
        lambda b, v: b.attn.output.__setitem__(0, v),
    ),
}


@pytest.mark.parametrize("name", ASSIGNED)
@pytest.mark.parametrize("branch", [False, True])
def test_assigning_binds_a_new_value(
    gpt2: LanguageModel, ids: torch.Tensor, name: str, branch: bool
) -> None:
    read, write = ASSIGNED[name]
    model: Any = gpt2
    block = model.transformer.h[1]
    with model.trace(ids):
        plain = read(block).save()
    with model.trace(ids) as tracer:
        old, same = read(block), read(block)
        if branch:
            with tracer.cond(old.sum() > -1e9):
                write(block, old * 2)
        else:
            write(block, old * 2)
        before, after = old.save(), read(block).save()
        if branch:  # where it is not taken, this would have to reach the model
            with pytest.raises(BlockError, match="was assigned"):
                old += 7
        else:
            old += 7  # reaches the other handle on it, and not the model
        shared, untouched = (same - old).abs().max().save(), read(block).save()
    torch.testing.assert_close(before.value, plain.value)
    torch.testing.assert_close(after.value, plain.value * 2)
    torch.testing.assert_close(untouched.value, plain.value * 2)
    assert float(shared) == 0


def test_older_views_see_writes_in_place(gpt2: LanguageModel, ids: torch.Tensor) -> None:
    model: Any = gpt2
    block = model.transformer.h[1]
    with model.trace(ids):
        rows, row = block.mlp.output, block.mlp.output[0]
        rows[0] = 0  # a row of a tensor
        hidden, part = block.output[0], block.output[0][:, -1]
        block.output[0][:] = 1
        container = block.attn.output
        container[0] = container[0] * 0
        seen = [one.save() for one in (row, hidden, part, container[0], block.attn.output[0])]
    for one, value in zip(seen, (0, 1, 1, 0, 0), strict=True):
        assert float(one.value.min()) == float(one.value.max()) == value


@pytest.mark.parametrize("name", ["resid_post", "z", "q", "mlp_out", "attn_out"])
def test_assigning_a_unified_name_binds_a_new_value(
    gpt2: LanguageModel, ids: torch.Tensor, name: str
) -> None:
    model: Any = gpt2
    layer = model.layers[1]
    with model.trace(ids):
        plain = getattr(layer, name).save()
    with model.trace(ids):
        old = getattr(layer, name)
        setattr(layer, name, old * 2)
        before, after = old.save(), getattr(layer, name).save()
        changed = model.logits.save()
    torch.testing.assert_close(before.value, plain.value)
    torch.testing.assert_close(after.value, plain.value * 2)
    with model.trace(ids):
        getattr(layer, name)[:] *= 2
        in_place = model.logits.save()
    torch.testing.assert_close(changed.value, in_place.value)


def test_a_slice_of_the_hidden_states_stays_when_they_are_assigned(
    gpt2: LanguageModel, ids: torch.Tensor
) -> None:
    block = gpt2.transformer.h[1]
    with gpt2.trace(ids):
        plain = block.output[0][:, -1].save()
    with gpt2.trace(ids):
        last, hidden = block.output[:, -1], block.output[0]
        block.output[0] = hidden * 2
        before = last.save()
        hidden += 1
        shifted = last.save()
    torch.testing.assert_close(before.value, plain.value)
    torch.testing.assert_close(shifted.value, plain.value + 1)
