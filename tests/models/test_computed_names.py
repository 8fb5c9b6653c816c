"""Changes of computed names that are recorded apart: in edits, loops, single steps and branches.

Each has to go on from those before it, as all would in one block, so each is compared with plain hooks
that do all of them one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwork import LanguageModel
from graftwork.tracing.errors import OperationError

from .conftest import build, random_prompts

PROMPTS = [one.tolist() for one in random_prompts(5, 3)]
IDS = PROMPTS[0]
LAYER = 1

Change = Callable[[torch.Tensor], torch.Tensor]


class Plain:
    """A plain model whose per-head outputs and norm in one layer are changed by hooks."""

    def __init__(self, name: str) -> None:
        self.hf = build(name)
        block = self.hf.model.layers[LAYER]
        self.o, self.norm = block.self_attn.o_proj, block.input_layernorm
        self.heads = self.hf.config.num_attention_heads

    @contextmanager
    def changed(self, heads: Change | None = None, scale: Change | None = None) -> Iterator[Any]:
        """The changed values, by name: a list with one for each forward."""
        seen: dict[str, list[torch.Tensor]] = {
            "head_out": [],
            "ln1_scale": [],
            "ln1_normalized": [],
        }

        def on_heads(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            z = args[0].unflatten(-1, (self.heads, -1))
            weight = module.weight.T.unflatten(0, (self.heads, -1))
            terms = torch.einsum("bthe,hed->bthd", z, weight)
            after = terms.clone() if heads is None else heads(terms.clone())
            seen["head_out"].append(after)
            return output + (after - terms).sum(2)

        def on_norm(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            before = (args[0].pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
            after = before.clone() if scale is None else scale(before.clone())
            seen["ln1_scale"].append(after)
            seen["ln1_normalized"].append(args[0] / after)
            return args[0] / after * module.weight

        handles = [
            self.o.register_forward_hook(on_heads),
            self.norm.register_forward_hook(on_norm),
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def grown(self, ids: Any, count: int, heads: list[Change | None]) -> tuple[Any, list[Any]]:
        """Greedy generation without a cache, whose forwards have changes of their own. The changes of
        a token stay what they were when it was new, as a cache keeps them."""
        ids, first, steps = torch.tensor([ids]), len(ids), list[Any]()
        for step in range(count):

            def all_so_far(terms: torch.Tensor, step: int = step) -> torch.Tensor:
                for i in range(step + 1):
                    change = heads[i]
                    rows = slice(0, first) if i == 0 else slice(first + i - 1, first + i)
                    if change is not None:
                        terms[:, rows] = change(terms[:, rows].clone())
                return terms

            with self.changed(all_so_far) as seen:
                logits = self.hf(ids).logits
            new = slice(0, first) if step == 0 else slice(first + step - 1, first + step)
            steps.append(seen["head_out"][0][:, new])
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        return ids, steps


@pytest.fixture(scope="module")
def plain() -> Plain:
    return Plain("llama")


@pytest.fixture
def model(plain: Plain) -> LanguageModel:
    return LanguageModel(plain.hf)


def same(found: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-4, atol=1e-5)


def no_head(*heads: int) -> Change:
    def change(terms: torch.Tensor) -> torch.Tensor:
        terms[:, :, list(heads)] = 0
        return terms

    return change


def half_and_more(terms: torch.Tensor) -> torch.Tensor:
    return terms * 0.5 + 0.25


def both(*changes: Change) -> Change:
    def change(value: torch.Tensor) -> torch.Tensor:
        for one in changes:
            value = one(value)
        return value

    return change


@pytest.mark.parametrize("inplace", [False, True])
def test_a_block_goes_on_from_an_edit(model: LanguageModel, plain: Plain, inplace: bool) -> None:
    with model.edit(inplace=inplace) as edited:
        edited.layers[LAYER].head_out[:] = edited.layers[LAYER].head_out * 0.5 + 0.25
        edited.layers[LAYER].ln1_scale[:] *= 2.0
    layer = edited.layers[LAYER]
    with edited.trace(IDS):
        read, scale = layer.head_out.save(), layer.ln1_scale.save()
        normalized = layer.ln1_normalized.save()
        layer.head_out[:, :, 2] = 0
        after, out = layer.head_out.save(), layer.attn_out.save()
        logits = edited.lm_head.output.save()
    with torch.no_grad(), plain.changed(half_and_more, lambda old: old * 2) as seen:
        plain.hf(torch.tensor([IDS]))
    same(read, seen["head_out"][0])
    same(scale, seen["ln1_scale"][0])
    same(normalized, seen["ln1_normalized"][0])
    change = both(half_and_more, no_head(2))
    with torch.no_grad(), plain.changed(change, lambda old: old * 2) as seen:
        expected = plain.hf(torch.tensor([IDS])).logits
    same(after, seen["head_out"][0])
    same(out, seen["head_out"][0].sum(2))
    same(logits, expected)


def test_edits_of_edits_and_of_files_add_up(
    model: LanguageModel, plain: Plain, tmp_path: Path
) -> None:
    with model.edit() as once:
        model.layers[LAYER].head_out[:] = half_and_more(model.layers[LAYER].head_out)
    with once.edit() as twice:
        once.layers[LAYER].head_out[:, :, 1] = 0
    twice.save_edits(tmp_path / "edits")
    loaded = LanguageModel(plain.hf)
    loaded.load_edits(tmp_path / "edits")
    change = both(half_and_more, no_head(1), half_and_more)
    for edited in (twice, loaded):
        layer = edited.layers[LAYER]
        with edited.trace() as tracer:
            outs = []
            for ids in PROMPTS:
                with tracer.invoke(ids):
                    layer.head_out[:] = half_and_more(layer.head_out)
                    outs.append((layer.head_out.save(), edited.lm_head.output.save()))
        for ids, (heads, logits) in zip(PROMPTS, outs, strict=True):
            with torch.no_grad(), plain.changed(change) as seen:
                expected = plain.hf(torch.tensor([ids])).logits
            same(heads, seen["head_out"][0])
            same(logits, expected)


def test_loops_go_on_from_loops_steps_and_edits(model: LanguageModel, plain: Plain) -> None:
    with model.edit() as edited:
        edited.layers[LAYER].head_out[:, :, 0] = 0
    layer = edited.layers[LAYER]
    with edited.generate(max_new_tokens=4, do_sample=False) as generator:
        with generator.invoke(IDS) as invoker:
            invoker.next()
            layer.head_out[:] = half_and_more(layer.head_out)
        with generator.invoke(IDS) as invoker:
            with generator.all():
                layer.head_out[:, :, 1] = 0.5
            with generator.iter[1:3]:
                layer.head_out[:] = half_and_more(layer.head_out)
                in_loop = layer.head_out.save()
            invoker.next()
            invoker.next()
            layer.head_out[:, :, 3] = 0
            straight, total = layer.head_out.save(), layer.o_out.save()

    def one(terms: torch.Tensor) -> torch.Tensor:
        terms[:, :, 1] = 0.5
        return terms

    none, add = no_head(0), half_and_more
    ids, _ = plain.grown(IDS, 4, [none, both(none, add), none, none])
    assert torch.equal(generator.output[0], ids[0])
    first = both(none, one)
    more = both(first, add)
    ids, steps = plain.grown(IDS, 4, [first, more, both(more, no_head(3)), first])
    assert torch.equal(generator.output[1], ids[0])
    same(straight, steps[2])
    same(total, steps[2].sum(2))
    same(in_loop[0], steps[1])


def test_a_loop_behind_a_single_step_and_one_before_it(model: LanguageModel, plain: Plain) -> None:
    layer = model.layers[LAYER]
    with model.generate(IDS, max_new_tokens=2, do_sample=False) as generator:
        generator.next()
        layer.head_out[:] = half_and_more(layer.head_out)
        handle = layer.head_out
        with generator.iter[1:2]:
            inside = layer.head_out.save()
            layer.head_out[:, :, 2] = 0
        behind, seen = layer.head_out.save(), handle.save()
    _, steps = plain.grown(IDS, 2, [None, half_and_more])
    same(inside[0], steps[1])
    ids, steps = plain.grown(IDS, 2, [None, both(half_and_more, no_head(2))])
    same(behind, steps[1])
    same(seen, steps[1])  # a handle sees what is written in place
    assert torch.equal(generator.output, ids)


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_behind_a_branch_is_what_it_left(
    model: LanguageModel, plain: Plain, taken: bool, before: bool
) -> None:
    layer = model.layers[LAYER]
    with model.trace(IDS) as tracer:
        if before:
            layer.head_out[:] = half_and_more(layer.head_out)
        with tracer.cond(model.layers[0].z.sum() > (-1e4 if taken else 1e4)):
            layer.head_out[:, :, 1] = 0
            with tracer.cond(model.layers[0].z.sum() > -1e4):
                layer.head_out[:, :, 0] = 0.5
            inside = layer.head_out.save()
        with tracer.otherwise():
            layer.head_out[:, :, 3] = 0
        read = layer.head_out.save()
        layer.head_out[:] = half_and_more(layer.head_out)
        total, logits = layer.o_out.save(), model.lm_head.output.save()

    def in_branch(terms: torch.Tensor) -> torch.Tensor:
        terms[:, :, 1], terms[:, :, 0] = 0, 0.5
        return terms

    changes = [half_and_more] if before else []
    changes.append(in_branch if taken else no_head(3))
    with torch.no_grad(), plain.changed(both(*changes)) as seen:
        plain.hf(torch.tensor([IDS]))
    same(read, seen["head_out"][0])
    if taken:
        same(inside, seen["head_out"][0])
    with torch.no_grad(), plain.changed(both(*changes, half_and_more)) as seen:
        expected = plain.hf(torch.tensor([IDS])).logits
    same(total, seen["head_out"][0].sum(2))
    same(logits, expected)


@pytest.mark.parametrize("taken", [True, False])
def test_handles_from_before_a_branch(model: LanguageModel, plain: Plain, taken: bool) -> None:
    """What a branch changes by them and what it changes by names of its own are one value."""
    layer = model.layers[LAYER]
    with model.trace(IDS) as tracer:
        old = layer.head_out
        part, stream = old[..., :2], layer.resid_post.reshape(-1)
        with tracer.cond(model.layers[0].z.sum() > (-1e4 if taken else 1e4)):
            inner = layer.head_out
            old[:, :, 1] = 0
            first = inner.save()
            inner[:, :, 0] = 0.5
            second = old.save()
            stream[0] = 7
        behind, behind_part, now = old.save(), part.save(), layer.head_out.save()
        old[:, :, 2] += 1
        total, behind_stream = layer.o_out.save(), stream.save()
        resid = layer.resid_post.save()

    def in_branch(terms: torch.Tensor) -> torch.Tensor:
        terms[:, :, 1], terms[:, :, 0] = 0, 0.5
        return terms

    change = in_branch if taken else no_head()
    with torch.no_grad(), plain.changed(change) as seen:
        plain.hf(torch.tensor([IDS]))
    same(behind, seen["head_out"][0])
    same(behind_part, seen["head_out"][0][..., :2])
    same(now, seen["head_out"][0])
    if taken:
        same(second, seen["head_out"][0])
        with torch.no_grad(), plain.changed(no_head(1)) as before:
            plain.hf(torch.tensor([IDS]))
        same(first, before["head_out"][0])
    seen["head_out"][0][:, :, 2] += 1
    same(total, seen["head_out"][0].sum(2))
    assert torch.equal(resid.reshape(-1), behind_stream)
    assert (behind_stream[0] == 7) == taken


def test_a_loop_with_a_branch(model: LanguageModel, plain: Plain) -> None:
    layer = model.layers[LAYER]
    with model.generate(IDS, max_new_tokens=3, do_sample=False) as generator:
        with generator.iter[0:2] as step:
            with generator.cond(step == 1):
                layer.head_out[:, :, 1] = 0
            layer.head_out[:] = half_and_more(layer.head_out)
        with generator.all():
            read = layer.head_out.save()
    changes = [half_and_more, both(no_head(1), half_and_more), None]
    ids, steps = plain.grown(IDS, 3, changes)
    assert torch.equal(generator.output, ids)
    for found, expected in zip(read, steps, strict=True):
        same(found, expected)


def test_names_that_are_inputs_by_head(model: LanguageModel, plain: Plain) -> None:
    with model.edit() as edited:
        edited.layers[LAYER].q_input[:, :, 1] = 0
        edited.layers[LAYER].ln2_normalized[:, 1] = 0
    layer = edited.layers[LAYER]
    with edited.trace(IDS):
        queries = layer.q_input.save()
        layer.q_input[:, :, 2] = 0.5
        after, normalized = layer.q_input.save(), layer.ln2_normalized.save()
        q = layer.q_pre.save()
        resid = layer.resid_pre.save()
    expected = resid.unsqueeze(2).repeat(1, 1, plain.heads, 1)
    expected[:, :, 1] = 0
    same(queries, expected)
    expected[:, :, 2] = 0.5
    same(after, expected)
    assert not normalized[:, 1].any() and normalized[:, 0].any()
    block = plain.hf.model.layers[LAYER]
    weight = block.self_attn.q_proj.weight.unflatten(0, (plain.heads, -1))
    with torch.no_grad():
        same(q, torch.einsum("bthd,hed->bthe", block.input_layernorm(expected), weight))


def test_what_a_changed_name_is_computed_from_is_written_first(model: LanguageModel) -> None:
    layer = model.layers[LAYER]
    with pytest.raises(OperationError, match=r"was changed at .*another"), model.trace(IDS):
        layer.head_out[:, :, 2] = 0
        layer.z[:, :, 1] = 0
        layer.head_out.save()
    with model.trace(IDS):  # only read, it follows
        layer.head_out.save()
        layer.z[:, :, 1] = 0
        after = layer.head_out.save()
    assert not after[:, :, 1].any() and after[:, :, 2].any()


def test_handles_from_before_a_loop(model: LanguageModel, plain: Plain) -> None:
    """They see what the loop writes in place, and nothing that it assigns, as torch's would."""
    block = model.layers[LAYER]
    with model.generate(IDS, max_new_tokens=2, do_sample=False) as generator:
        written, assigned = model.layers[2].resid_mid, block.resid_post
        hidden = model.layers[0].output[0]
        with generator.iter[0:1]:
            model.layers[2].resid_mid[:] = 0
            block.resid_post = block.resid_post * 0
            model.layers[0].output[0] = model.layers[0].output[0] * 2
        found = [written.save(), assigned.save(), hidden.save()]
        now = [
            model.layers[2].resid_mid.save(),
            block.resid_post.save(),
            model.layers[0].output[0].save(),
        ]
    seen: list[torch.Tensor] = []
    handle = plain.hf.model.layers[0].register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        plain.hf(torch.tensor([IDS]))
    handle.remove()
    assert not found[0].any() and not now[0].any()
    assert found[1].any() and not now[1].any()
    same(found[2], seen[0])
    same(now[2], seen[0] * 2)


@pytest.mark.parametrize("name", ["head_out", "ln1_scale", "ln1_normalized"])
def test_an_older_handle_keeps_what_was_there_before_an_assignment(name: str) -> None:
    """As of a tensor: an assignment binds a new value, and the older one is nobody else's."""
    model: Any = LanguageModel(build("llama"))
    with model.trace(IDS):
        layer = model.layers[LAYER]
        old = getattr(layer, name)
        part, before = old[:, :1], old.save()
        setattr(layer, name, old * 0.5)
        kept, kept_part = old.save(), part.save()
        out = layer.attn_out.save()
        old[:] = 7
        changed, now = old.save(), getattr(layer, name).save()
        layer_out = layer.attn_out.save()
        new = getattr(layer, name)
        new += 1
        added, still = getattr(layer, name).save(), old.save()
    plain = Plain("llama")
    with plain.changed() as seen, torch.no_grad():
        plain.hf(torch.tensor([IDS]))
    torch.testing.assert_close(before, seen[name][0].reshape(before.shape))
    assert torch.equal(kept, before) and torch.equal(kept_part, before[:, :1])
    assert (changed == 7).all() and (still == 7).all()
    torch.testing.assert_close(now, before * 0.5)
    torch.testing.assert_close(added, before * 0.5 + 1)
    assert torch.equal(out, layer_out)
