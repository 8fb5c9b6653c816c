"""Loops over the steps of a generation, against plain transformers and plain hooks."""

import pytest
import torch

from graftwork import LanguageModel
from graftwork.tracing.errors import BlockError, NotRunError

PROMPT = "The Eiffel Tower is in the city of"
OTHER = "Big Ben is in the city of"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("graftwork/tiny")


def forwards(model, prompt, new, edit=None, **options):
    """Ids of a plain generation, and what a block returns in each of its forwards."""
    module, seen = model.load(), []

    def hook(_module, _args, output):
        changed = None if edit is None else edit(len(seen), output)
        seen.append((output if changed is None else changed).clone())
        return changed

    handle = module.transformer.h[1].register_forward_hook(hook)
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    result = module.generate(ids, max_new_tokens=new, do_sample=False, **options)
    handle.remove()
    return result, seen


def test_a_loop_recorded_once_saves_each_step(model) -> None:
    with model.generate(PROMPT, max_new_tokens=4) as tracer:
        with tracer.iter[0:3]:
            hidden = model.transformer.h[1].output.save()
        with tracer.all():
            token = model.lm_head.output[:, -1].argmax(-1).save()
        after = model.transformer.h[0].output.save()
    ids, seen = forwards(model, PROMPT, 4)
    assert torch.equal(tracer.output, ids)
    assert len(hidden) == 3
    for found, wanted in zip(hidden.value, seen, strict=False):
        torch.testing.assert_close(found, wanted)
    new = ids.shape[1] - len(model.tokenizer(PROMPT)["input_ids"])
    assert [int(t) for t in token.value] == ids[0, -new:].tolist()
    assert after.shape[1] == ids.shape[1] - new


def test_a_value_from_before_a_loop_is_saved_in_each_of_its_steps(model) -> None:
    with model.generate(PROMPT, max_new_tokens=3) as tracer:
        before = model.transformer.h[1].output
        with tracer.iter[1:3]:
            kept = before.save()
            moved = (model.transformer.h[1].output - before[:, -1:]).save()
    _, seen = forwards(model, PROMPT, 3)
    assert len(kept) == len(moved) == 2
    for one, other, later in zip(kept.value, moved.value, seen[1:], strict=True):
        torch.testing.assert_close(one, seen[0])
        torch.testing.assert_close(other, later - seen[0][:, -1:])


def test_edits_in_a_loop_use_the_step_and_touch_those_steps_alone(model) -> None:
    vector = torch.ones(128)
    with model.generate(PROMPT, max_new_tokens=4) as tracer:
        with tracer.iter[[0, 2]] as step:
            model.transformer.h[1].output[:] += vector * (step + 1)
        with tracer.all():
            hidden = model.transformer.h[1].output.save()
    ids, seen = forwards(
        model, PROMPT, 4, lambda i, out: out + vector * (i + 1) if i in (0, 2) else None
    )
    assert torch.equal(tracer.output, ids) and len(hidden) == len(seen)
    for found, wanted in zip(hidden.value, seen, strict=True):
        torch.testing.assert_close(found, wanted)


def test_each_prompt_has_its_own_steps(model) -> None:
    with model.generate(max_new_tokens=3) as tracer:
        with tracer.invoke(PROMPT):
            with tracer.iter[1:3]:
                first = model.transformer.h[1].output.save()
        with tracer.invoke(OTHER):
            with tracer.iter[:]:
                model.transformer.h[1].output[:, -1] = 0
                second = model.transformer.h[1].output.save()
            last = model.lm_head.output.save()

    def zero(_step, output):
        output = output.clone()
        output[:, -1] = 0
        return output

    _, plain = forwards(model, PROMPT, 3)
    _, edited = forwards(model, OTHER, 3, zero)
    assert [v.shape for v in first.value] == [v.shape for v in plain[1:3]]
    for found, wanted in zip((*first.value, *second.value), (*plain[1:3], *edited), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert last.value.shape[0] == 1


def test_steps_that_never_come_leave_a_shorter_list(model) -> None:
    ids, _ = forwards(model, PROMPT, 4)
    width = len(model.tokenizer(PROMPT)["input_ids"])
    stop = int(ids[0, width + 1])
    new = 1 + ids[0, width:].tolist().index(stop)
    with model.generate(PROMPT, max_new_tokens=8, eos_token_id=stop) as tracer:
        with tracer.all() as step:
            hidden = model.transformer.h[1].output.save()
            number = (step * 1).save()
        singles = []
        for _ in tracer.iter[:]:
            singles.append(model.transformer.h[1].output.save())
    assert len(hidden) == new < 8
    assert number.value == list(range(new))
    assert len(singles) == new
    assert singles[new - 1].value.shape[0] == 1


def ending(model, prompt, at):
    """Options under which the generation of a prompt ends with the token of a step."""
    ids, _ = forwards(model, prompt, at + 1)
    token = int(ids[0, -1])
    width = len(model.tokenizer(prompt)["input_ids"])
    return {"eos_token_id": token}, 1 + ids[0, width:].tolist().index(token)


@pytest.mark.parametrize("stops", [True, False])
def test_what_does_not_depend_on_the_step_is_saved_for_steps_that_come(model, stops) -> None:
    """Of each prompt for its own steps, as in a loop around plain forwards."""
    options, new = ({}, 3) if stops else ending(model, PROMPT, 2)
    _, seen = forwards(model, PROMPT, 8, **options)
    _, others = forwards(model, OTHER, 8, **options)
    with model.generate(max_new_tokens=8, **options) as tracer:
        with tracer.invoke(PROMPT):
            hidden = model.transformer.h[1].output[0]
            with tracer.all() as step:
                mine, numbers = (hidden * 1).save(), step.save()
                if stops:
                    with tracer.cond(step == new - 1):
                        tracer.stop()
        with tracer.invoke(OTHER), tracer.iter[1:]:
            other = (model.transformer.h[1].output[0].mean() * 0).save()
            constant = (hidden * 2).save()
        with tracer.invoke(), tracer.all() as step:
            every = step.save()
    assert numbers.value == list(range(new)) and 1 < new < 8
    assert every.value == list(range(max(new, len(others))))
    assert len(constant) == len(other) == len(others) - 1
    for value in mine:
        torch.testing.assert_close(value, seen[0], atol=1e-5, rtol=1e-4)


def test_a_loop_that_saves_nothing_of_its_steps_has_one_value_for_each(model) -> None:
    options, new = ending(model, PROMPT, 2)
    with model.generate(PROMPT, max_new_tokens=8, **options) as tracer:
        hidden = model.transformer.h[1].output[0]
        with tracer.all():
            found = (hidden * 1).save()
    assert len(found) == new < 8


def test_a_for_loop_has_as_many_rounds_as_the_generation_has_steps(model) -> None:
    options, new = ending(model, PROMPT, 2)
    ids, seen = forwards(model, PROMPT, 8, **options)
    saved, tokens = [], []
    with model.generate(PROMPT, max_new_tokens=8, **options) as tracer:
        for _ in tracer.iter[:]:
            saved.append(model.transformer.h[1].output.save())
            tokens.append(model.lm_head.output[:, -1].argmax(-1).item())
    assert tracer.output.tolist() == ids.tolist()
    assert tokens == ids[0, -new:].tolist() and 1 < new < 8
    for found, wanted in zip(saved, seen, strict=True):
        torch.testing.assert_close(found.value, wanted, atol=1e-5, rtol=1e-4)


def test_rounds_follow_what_earlier_rounds_write(model) -> None:
    options, new = ending(model, PROMPT, 2)
    rounds = {}
    for most in (0, 5):
        with model.generate(PROMPT, max_new_tokens=8, **options) as tracer:
            rounds[most] = 0
            for step in tracer.iter[:]:
                rounds[most] += 1
                if step < most:
                    model.lm_head.output[:, -1, options["eos_token_id"]] = -1e9
        width = len(model.tokenizer(PROMPT)["input_ids"])
        assert tracer.output.shape[1] - width == rounds[most]
    assert rounds[0] == new < 5 < rounds[5]


def test_rounds_of_each_prompt_of_a_batch(model) -> None:
    options, new = ending(model, PROMPT, 2)
    _, other = forwards(model, OTHER, 8, **options)
    counts = []
    with model.generate(max_new_tokens=8, **options) as tracer:
        for prompt in (PROMPT, OTHER, [PROMPT, OTHER]):
            with tracer.invoke(prompt):
                counts.append(sum(1 for _ in tracer.iter[:]))
        with tracer.invoke():
            counts.append(sum(1 for _ in tracer.iter[1:]) + 1)
    most = max(new, len(other))
    assert counts == [new, len(other), most, most]


def test_rounds_after_a_stop_do_not_come(model) -> None:
    ids, _ = forwards(model, PROMPT, 3)
    token, seen, conditions = int(ids[0, -1]), [], []
    with model.generate(PROMPT, max_new_tokens=8, eos_token_id=None) as tracer:
        for _ in tracer.iter[:]:
            tok = model.lm_head.output[:, -1].argmax(-1)
            seen.append(tok.save())
            if tok.item() == token:
                tracer.stop()
    assert [int(one.value) for one in seen] == ids[0, -len(seen) :].tolist()
    assert int(seen[-1].value) == token
    with model.generate(PROMPT, max_new_tokens=8, eos_token_id=None) as tracer:
        for step in tracer.iter[:]:
            conditions.append(step)
            with tracer.cond(model.lm_head.output[:, -1].argmax(-1) == token):
                tracer.stop()
    assert conditions == list(range(len(seen)))


def test_a_stop_of_one_prompt_leaves_the_rounds_of_another(model) -> None:
    options, new = ending(model, OTHER, 3)
    counts = []
    with model.generate(max_new_tokens=8, **options) as tracer:
        with tracer.invoke(PROMPT) as first:
            for step in tracer.iter[:]:
                if step == 1:
                    tracer.stop()
        with tracer.invoke(OTHER) as second:
            for _ in tracer.iter[:]:
                counts.append(float(model.lm_head.output[0, -1].max()))
    assert len(counts) == new > 2
    expected, _ = forwards(model, OTHER, 8, **options)
    assert second.output.tolist() == expected.tolist()
    assert first.output.shape[1] == len(model.tokenizer(PROMPT)["input_ids"]) + 2


def test_a_loop_in_a_session_uses_values_of_an_earlier_block(model) -> None:
    options, new = ending(model, PROMPT, 2)
    with model.session():
        with model.generate(OTHER, max_new_tokens=2):
            before = model.transformer.h[1].output
        saved = []
        with model.generate(PROMPT, max_new_tokens=8, **options) as tracer:
            for _ in tracer.iter[:]:
                model.transformer.h[1].output[:] += 0 * before.sum()
                saved.append(model.transformer.h[2].output.save())
    assert len(saved) == new


def test_a_loop_over_a_sampled_generation_sees_the_tokens_that_come(model) -> None:
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 3.0, "top_k": 50}
    torch.manual_seed(3)
    tokens, invokers = {}, []
    with model.generate(**options) as tracer:
        for number, prompt in enumerate((PROMPT, OTHER, PROMPT)):
            with tracer.invoke(prompt) as invoker:
                tokens[number] = []
                for _ in tracer.iter[:]:
                    hidden = model.transformer.h[1].output[0, -1]
                    tokens[number].append((float(hidden.sum()), hidden.sum().save()))
            invokers.append(invoker)
    for number, invoker in enumerate(invokers):
        width = len(model.tokenizer((PROMPT, OTHER, PROMPT)[number])["input_ids"])
        assert invoker.output.shape[1] - width == len(tokens[number])
        for early, late in tokens[number]:
            assert abs(early - float(late.value)) < 1e-3
    assert invokers[0].output.tolist() != invokers[2].output.tolist()
    torch.manual_seed(3)
    expected = model.load().generate(**model.tokenizer(PROMPT, return_tensors="pt"), **options)
    assert invokers[0].output.tolist() == expected.tolist()


def test_a_for_loop_records_each_step(model) -> None:
    saved = []
    with model.generate(PROMPT, max_new_tokens=3) as tracer:
        for step in tracer.iter[0:3]:
            if step == 1:
                continue
            saved.append(model.transformer.h[1].output.save())
        with tracer.iter[1]:
            middle = model.transformer.h[1].output.save()
    _, seen = forwards(model, PROMPT, 3)
    for found, wanted in zip((saved[0], middle, saved[1]), seen, strict=True):
        torch.testing.assert_close(found.value, wanted)


def test_beams_are_edited_with_their_own_prompt(model) -> None:
    with model.generate(max_new_tokens=3, num_beams=2, eos_token_id=None) as tracer:
        with tracer.invoke(PROMPT):
            with tracer.all():
                model.transformer.h[1].output[:] = 0
        with tracer.invoke(OTHER):
            with tracer.all():
                hidden = model.transformer.h[1].output.save()
    _, seen = forwards(model, OTHER, 3, num_beams=2, eos_token_id=None)
    for found, wanted in zip(hidden.value, seen, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_what_a_loop_cannot_do_is_said(model) -> None:
    with pytest.raises(BlockError, match="one forward"), model.trace(PROMPT) as tracer:
        tracer.iter[0:2]
    for bad in (slice(-2, None), -1, [2, 0], "x"):
        with pytest.raises(BlockError, match="rising order"):
            with model.generate(PROMPT, max_new_tokens=2) as tracer:
                tracer.iter[bad]
    with pytest.raises(NotRunError, match="recorded once"):
        with model.generate(PROMPT, max_new_tokens=2) as tracer, tracer.all() as step:
            if step == 1:
                pass
    with pytest.raises(BlockError, match="inside another"):
        with model.generate(PROMPT, max_new_tokens=2) as tracer, tracer.all(), tracer.all():
            pass
    with pytest.raises(BlockError, match="one value for each"):
        with model.generate(PROMPT, max_new_tokens=2) as tracer:
            with tracer.all():
                hidden = model.transformer.h[1].output
            hidden.save()
    with pytest.raises(BlockError, match="from before"):
        with model.generate(PROMPT, max_new_tokens=2) as tracer:
            total = model.transformer.h[1].output.sum()
            with tracer.all():
                total += 1


@pytest.mark.parametrize("steps", ["a", 1.5, -1, True, None])
def test_next_takes_a_count(model, steps) -> None:
    with pytest.raises(BlockError, match=r"`next\(.*\)`: it takes how many steps to go on"):
        with model.generate(PROMPT, max_new_tokens=3) as tracer:
            tracer.next(steps)


def test_iter_without_an_index_is_refused(model) -> None:
    for use in (lambda it: it(), lambda it: it(0, 3), iter, lambda it: it.__enter__()):
        with pytest.raises(BlockError, match=r"`iter` is indexed, as a list is: `iter\[0:3\]`"):
            with model.generate(PROMPT, max_new_tokens=3) as tracer:
                use(tracer.iter)


def test_iter_in_a_trace_names_the_calls_of_a_module(model) -> None:
    with pytest.raises(BlockError, match=r"a trace is one forward.*`module\.calls\[1\]\.output`"):
        with model.trace(PROMPT) as tracer:
            tracer.iter[0:2]
