"""An edit in a block reaches the model exactly as the same code in a plain forward hook does.

Each edit is a function of the module's output, run by both. What the model returns must be equal,
and so must the values that are read before and after the edit.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import graftwork
from graftwork import LanguageModel, Model
from graftwork.tracing.operations import FRESH, MAYBE_VIEWS, METHODS, VIEWS

Edit = Callable[[Any], Any]

MASK = torch.tensor([True, False, True, False, True])
INDEX = torch.tensor([0, 3])
V = torch.randn(8, generator=torch.Generator().manual_seed(3))
WHOLE = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4))


def put(*key: Any, value: Any) -> Edit:
    def edit(h: Any) -> None:
        h[key if len(key) != 1 else key[0]] = value

    return edit


def add_to(*key: Any, value: Any) -> Edit:
    def edit(h: Any) -> None:
        h[key if len(key) != 1 else key[0]] += value

    return edit


def seeded(edit: Edit) -> Edit:
    def again(h: Any) -> None:
        torch.manual_seed(0)
        edit(h)

    return again


def in_place_operator(name: str, value: Any) -> Edit:
    return lambda h: getattr(h, f"__{name}__")(value)


IN_PLACE: dict[str, Edit] = {
    "+=": in_place_operator("iadd", V),
    "-=": in_place_operator("isub", 1),
    "*=": in_place_operator("imul", WHOLE),
    "/=": in_place_operator("itruediv", 2.5),
    "//=": in_place_operator("ifloordiv", 0.5),
    "%=": in_place_operator("imod", 0.5),
    "**=": in_place_operator("ipow", 2),
    "add_": lambda h: h.add_(1),
    "add_ with alpha": lambda h: h.add_(V, alpha=0.5),
    "sub_ mul_ div_": lambda h: h.sub_(1).mul_(V).div_(3),
    "zero_": lambda h: h.zero_(),
    "fill_": lambda h: h.fill_(2),
    "copy_": lambda h: h.copy_(WHOLE),
    "copy_ broadcast": lambda h: h.copy_(V),
    "copy_ of itself": lambda h: h.copy_(torch.where(h > 0, h, 0)),
    "clamp_": lambda h: h.clamp_(min=0),
    "relu_": lambda h: h.relu_(),
    "pow_": lambda h: h.pow_(3),
    "neg_": lambda h: h.neg_(),
    "sign_": lambda h: h.sign_(),
    "triu_": lambda h: h.triu_(),
    "lerp_": lambda h: h.lerp_(WHOLE, 0.5),
    "addcmul_": lambda h: h.addcmul_(WHOLE, WHOLE, value=2),
    "addmm_ of a row": lambda h: h[0].addmm_(WHOLE[0], torch.eye(8)),
    "masked_fill_": lambda h: h.masked_fill_(h > 0, -1),
    "masked_scatter_": lambda h: h.masked_scatter_(h > 0, WHOLE),
    "index_fill_": lambda h: h.index_fill_(1, INDEX, 0.5),
    "index_add_": lambda h: h.index_add_(1, INDEX, torch.ones(2, 2, 8)),
    "index_copy_": lambda h: h.index_copy_(1, INDEX, torch.ones(2, 2, 8)),
    "index_put_": lambda h: h.index_put_((INDEX[:1],), V),
    "scatter_": lambda h: h.scatter_(-1, h.argmax(-1, keepdim=True), 0.0),
    "put_": lambda h: h.put_(torch.tensor([1, 2]), torch.tensor([9.0, 8.0])),
    "fill_diagonal_": lambda h: h[0].fill_diagonal_(3),
    "renorm_": lambda h: h.renorm_(2, 0, 1.0),
    "normal_": seeded(lambda h: h.normal_()),
    "uniform_ of a slice": seeded(lambda h: h[:, 1].uniform_()),
    "torch.relu_": lambda h: torch.relu_(h),
    "F.relu": lambda h: F.relu(h, inplace=True),
    "F.relu by position": lambda h: F.relu(h, True),
    "nn.ReLU": lambda h: nn.ReLU(inplace=True)(h),
    "nn.LeakyReLU": lambda h: nn.LeakyReLU(0.1, True)(h),
    "nn.ELU": lambda h: nn.ELU(1.0, True)(h),
    "nn.Hardtanh": lambda h: nn.Hardtanh(inplace=True)(h),
    "nn.SiLU": lambda h: nn.SiLU(inplace=True)(h),
    "nn.Dropout": seeded(lambda h: nn.Dropout(0.5, inplace=True)(h)),
    "nn.init": lambda h: nn.init.constant_(h[0], 2),
    "chained": lambda h: h.add_(1).mul_(2)[0].zero_(),
}

SETITEM: dict[str, Edit] = {
    "integer": put(0, value=V),
    "negative": put(slice(None), -1, value=V),
    "slice": put(slice(None), slice(1, 3), value=V),
    "stepped slice": put(slice(None), slice(None, None, 2), value=1.5),
    "everything": put(slice(None), value=WHOLE),
    "ellipsis": put(..., value=3),
    "ellipsis and integer": put(..., 0, value=3),
    "new axis": put(slice(None), None, 0, value=1.0),
    "mask": put(slice(None), MASK, value=0),
    "mask of values": lambda h: h.__setitem__(h > 0, 0.0),
    "mask of rows": lambda h: h.__setitem__(h.sum(-1) > 0, V),
    "list": put(slice(None), [0, 2], value=1),
    "two lists": put([0, 1], [2, 3], value=V),
    "captured index": put(slice(None), INDEX, value=-V),
    "array index": put(slice(None), np.array([1, 4]), value=V),
    "index of values": lambda h: h.__setitem__((0, h[0].sum(-1).argmax()), 0),
    "scalar tensor": put(slice(None), torch.tensor(2), value=V),
    "numpy integer": put(slice(None), np.int64(2), value=V),
    "another dtype": put(0, value=V.double()),
    "a value of itself": lambda h: h.__setitem__((slice(None), 0), h[:, 1] * 2),
    "its own number": lambda h: h.__setitem__((0, 1), h[0, 1, 2]),
    "by a tensor, another part": lambda h: h.__setitem__(
        (0, slice(torch.tensor(3), None)), h[0, slice(torch.tensor(0), 2)]
    ),
    "its own part": lambda h: h.__setitem__((slice(None), 0), h[:, 1]),
    "+= slice": add_to(slice(None), -1, value=V),
    "+= nested": lambda h: add_to(0, value=V)(h[:, 1:]),
    "+= mask": add_to(slice(None), MASK, value=1),
    "+= list": add_to(slice(None), [1, 1, 2], value=V),
    "+= mask of values": lambda h: add_to(h > 0, value=5)(h),
    "+= with slices in a chain": lambda h: add_to(slice(None), 2, value=V)(h[:1]),
}

VIEW_EDITS: dict[str, Edit] = {
    "view": lambda h: h.view(-1)[:11].zero_(),
    "view_as": lambda h: h.view_as(WHOLE.view(10, 8))[0].zero_(),
    "view of a dtype": lambda h: h.view(torch.int32)[0].zero_(),
    "reshape": lambda h: h.reshape(10, 8)[2].fill_(7),
    "reshape that copies": lambda h: h.transpose(0, 1).reshape(-1)[3:9].zero_(),
    "flatten": lambda h: h.flatten(1)[:, 3].add_(1),
    "ravel": lambda h: h.ravel()[3:9].zero_(),
    "unflatten": lambda h: h.unflatten(-1, (2, 4))[..., 1, :].zero_(),
    "transpose": lambda h: h.transpose(0, 1)[1].add_(V),
    "permute": lambda h: h.permute(2, 0, 1)[0].fill_(1),
    "movedim": lambda h: torch.movedim(h, 0, 1)[0].zero_(),
    "swapaxes": lambda h: h.swapaxes(1, 2)[:, 0].zero_(),
    "mT": lambda h: h.mT[:, 0].zero_(),
    "T": lambda h: h[0].T[0].zero_(),
    "t()": lambda h: h[1].t()[:, 1].zero_(),
    "unsqueeze": lambda h: h.unsqueeze(1)[:, :, 0].zero_(),
    "squeeze": lambda h: h[:1].squeeze(0)[0].zero_(),
    "expand": lambda h: h[:, :1].expand(-1, 1, -1).zero_(),
    "broadcast_to": lambda h: torch.broadcast_to(h, (2, 5, 8))[0].zero_(),
    "narrow": lambda h: h.narrow(1, 1, 2).zero_(),
    "select": lambda h: h.select(1, -1).mul_(3),
    "torch.select": lambda h: torch.select(h, 1, 0).zero_(),
    "diagonal": lambda h: h[0, :5, :5].diagonal().fill_(9),
    "torch.diagonal": lambda h: torch.diagonal(h, dim1=1, dim2=2).zero_(),
    "chunk": lambda h: torch.chunk(h, 2, -1)[1].zero_(),
    "split": lambda h: h.split([3, 5], -1)[0].zero_(),
    "tensor_split": lambda h: h.tensor_split(3, -1)[1].zero_(),
    "hsplit": lambda h: h.hsplit([2])[0].zero_(),
    "unbind": lambda h: h.unbind(1)[2].zero_(),
    "unfold": lambda h: h.unfold(1, 2, 2)[:, 0].zero_(),
    "detach": lambda h: h.detach().zero_(),
    "data": lambda h: h.data.zero_(),
    "real": lambda h: h.real[0].zero_(),
    "atleast_3d": lambda h: torch.atleast_3d(h)[0].zero_(),
    "contiguous": lambda h: h.contiguous()[0].zero_(),
    "contiguous that copies": lambda h: h.mT.contiguous().zero_(),
    "double, a copy": lambda h: h.double().zero_(),
    "positive": lambda h: (+h)[0].zero_(),
    "clone": lambda h: h.clone().zero_(),
    "arithmetic": lambda h: (h + 0).zero_(),
    "list index, a copy": lambda h: h[:, [1]].zero_(),
    "mask, a copy": lambda h: h[h > 0].zero_(),
    "numpy integer": lambda h: h[:, np.int64(1)].zero_(),
    "scalar tensor": lambda h: h[:, torch.tensor(1)].zero_(),
    "slice of scalar tensors": lambda h: h[:, : torch.tensor(2)].zero_(),
    "sorted values": lambda h: h.sort(-1).values.zero_(),
    "einops split": lambda h: rearrange(h, "b t (a d) -> b t a d", a=2)[:, :, 1].zero_(),
    "einops transpose": lambda h: rearrange(h, "b t d -> t b d")[0].zero_(),
    "einops heads": lambda h: rearrange(h, "b t (a d) -> b a t d", a=2)[:, 1, 0].add_(1),
    "einops that copies": lambda h: rearrange(h, "b t d -> t (b d)")[0].zero_(),
}


def view_of_view(h: Any) -> None:
    a = h[0]
    b = a[1:3]
    b[:, 2] = 5
    a[2] *= 2
    b += 1


def view_before_a_write(h: Any) -> None:
    a = h[0]
    h[:] = 1
    a += 1
    h[0, 0] = a[1] * 3


def copy_before_a_write(h: Any) -> None:
    rows = h.transpose(0, 1).reshape(-1, 8)
    h[:] = 1
    h[0] = rows[0]


def conversion_before_a_write(h: Any) -> None:
    other = h.double()
    h.add_(1)
    h[0] = other[1]


def copy_of_a_part_with_gaps(h: Any) -> None:
    left = h[..., :4]
    before = left.reshape(-1)
    left.add_(1)
    after = left.reshape(-1)
    left[:] = 0
    h[0, 0, 4:] = before[:4]
    h[0, 1, 4:] = after[:4]
    after.fill_(9)


def overlapping_views(h: Any) -> None:
    a, b = h.transpose(0, 1), h.view(10, 8)
    a[2] = 0
    b[3:5] += 1
    a[0, 1] += b[4]


def halves(h: Any) -> None:
    a, b = h.split(4, -1)
    a *= 0
    b += 1


def chunks(h: Any) -> None:
    for i, c in enumerate(h.chunk(4, -1)):
        c.mul_(i)


def rows(h: Any) -> None:
    for row in h:
        row.div_(row.norm())


def swap(h: Any) -> None:
    h[:, 0], h[:, 1] = h[:, 1].clone(), h[:, 0].clone()


def swap_by_view(h: Any) -> None:
    h[:, 0], h[:, 1] = h[:, 1], h[:, 0]


def swap_by_copy(h: Any) -> None:
    kept = h[:, 0].clone()
    h[:, 0] = h[:, 1]
    h[:, 1] = kept


def source_edited_after(h: Any) -> None:
    h[:, 0] = h[:, 1]
    h[:, 1] = 9


def normalize(h: Any) -> None:
    h -= h.mean(-1, keepdim=True)
    h /= h.norm(dim=-1, keepdim=True)


def rebinding(h: Any) -> None:
    h = h + 1
    h[:] = 0


def matmul_rebinds(h: Any) -> None:
    h @= torch.eye(8) * 2
    h[0] = 0


def sum_into_slice(h: Any) -> None:
    h[:, -1] = h[:, :-1].sum(1)
    h[:, :-1] -= h[:, -1:].mean(-1, keepdim=True)


def loop(h: Any) -> None:
    for i in range(4):
        h[:, i + 1] += h[:, i] * 0.5


def written_argument_is_edited_later(h: Any) -> None:
    value = h[:, 0] * 2
    h[:, 1] = value
    value.zero_()
    h[:, 2] = value


PROGRAMS = [
    view_of_view,
    view_before_a_write,
    copy_before_a_write,
    conversion_before_a_write,
    copy_of_a_part_with_gaps,
    overlapping_views,
    halves,
    chunks,
    rows,
    swap,
    swap_by_view,
    swap_by_copy,
    source_edited_after,
    normalize,
    rebinding,
    matmul_rebinds,
    sum_into_slice,
    loop,
    written_argument_is_edited_later,
]

EDITS: dict[str, Edit] = {
    **{f"in place: {name}": edit for name, edit in IN_PLACE.items()},
    **{f"setitem: {name}": edit for name, edit in SETITEM.items()},
    **{f"view: {name}": edit for name, edit in VIEW_EDITS.items()},
    **{f"program: {edit.__name__}": edit for edit in PROGRAMS},
}


@pytest.mark.parametrize("name", EDITS)
def test_edit_reaches_the_model_as_in_a_hook(
    toy: Model, x: torch.Tensor, reference: Any, name: str
) -> None:
    edit = EDITS[name]
    seen: dict[str, torch.Tensor] = {}

    def hook(output: torch.Tensor) -> None:
        seen["before"] = output.clone()
        edit(output)
        seen["after"] = output.clone()

    expected = reference(toy.load(), (x.clone(),), {"mid": hook})
    with toy.trace(x):
        before = toy.mid.output.save()
        edit(toy.mid.output)
        after = toy.mid.output.save()
        result = toy.output.save()
    assert torch.equal(before.value, seen["before"])
    assert torch.equal(after.value, seen["after"])
    assert torch.equal(result.value, expected)


# These fill or view memory that a part of a wider value does not have in one piece.
NEEDS_CONTIGUOUS = {
    "in place: put_",
    "in place: normal_",
    "view: view of a dtype",
    "view: view",
    "view: view_as",
    "program: overlapping_views",
}


@pytest.mark.parametrize("name", [name for name in EDITS if name not in NEEDS_CONTIGUOUS])
def test_edit_of_a_part_of_a_language_model(
    gpt2: LanguageModel, ids: torch.Tensor, reference: Any, name: str
) -> None:
    edit = EDITS[name]

    def part(output: Any) -> Any:
        return output[0][:, :5, 8:16]

    def hook(output: Any) -> None:
        edit(part(output))

    expected = reference(gpt2.load(), (ids,), {"transformer.h.1.attn": hook}).logits
    with gpt2.trace(ids) as tracer:
        edit(part(gpt2.transformer.h[1].attn.output))
        logits = tracer.output.logits.save()
    torch.testing.assert_close(logits.value, expected, rtol=0, atol=1e-6)


def test_saved_values_are_those_of_their_line(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x):
        h = toy.mid.output
        first = h.save()
        part = h[:, 0].save()
        h[:, 0] = 1
        second = h.save()
        h += 1
        third = h.save()
    assert not torch.equal(first.value, second.value)
    assert torch.equal(part.value, first.value[:, 0])
    assert torch.equal(second.value[:, 0], torch.ones(2, 8))
    assert torch.equal(third.value, second.value + 1)


def test_value_read_before_a_write_keeps_its_old_value(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x):
        old = toy.mid.output * 1
        toy.mid.output[:] = 0
        kept, now = old.save(), toy.mid.output.save()
    assert float(now.abs().sum()) == 0 and float(kept.abs().sum()) > 0


def test_writing_the_output_to_itself_changes_nothing(toy: Model, x: torch.Tensor) -> None:
    with toy.trace(x) as tracer:
        toy.mid.output = toy.mid.output
        toy.tup.output = toy.tup.output
        toy.tup.output[0][:] = toy.tup.output[0]
        result = tracer.output.save()
    assert torch.equal(result.value, toy.load()(x))
    assert not [node for node in tracer.graph.nodes if node.kind == "write" and "mid" in str(node)]


def test_value_edited_after_it_was_assigned(toy: Model, x: torch.Tensor, reference: Any) -> None:
    expected = reference(toy.load(), (x,), {"mid": lambda h: h * 2})
    with toy.trace(x):
        doubled = toy.mid.output * 2
        toy.mid.output = doubled
        doubled[:] = 0
        result = toy.output.save()
        zero = doubled.save()
    assert torch.equal(result.value, expected) and not zero.value.any()


def test_old_handle_edited_after_an_assignment(toy: Model, x: torch.Tensor, reference: Any) -> None:
    expected = reference(toy.load(), (x,), {"mid": lambda h: h * 2})
    with toy.trace(x):
        h = toy.mid.output
        toy.mid.output = h * 2
        h[:] = 0
        result = toy.output.save()
    assert torch.equal(result.value, expected)


def test_output_assigned_several_times(toy: Model, x: torch.Tensor, reference: Any) -> None:
    expected = reference(toy.load(), (x,), {"mid": lambda h: (h * 2 + 1) * 3})
    with toy.trace(x):
        toy.mid.output = toy.mid.output * 2
        one = toy.mid.output.save()
        toy.mid.output += 1
        toy.mid.output *= 3
        result = toy.output.save()
        last = toy.mid.output.save()
    assert torch.equal(result.value, expected)
    assert torch.equal(last.value, (one.value + 1) * 3)


@pytest.mark.parametrize(
    "value", [0, 1.5, True, V, V.double(), V.numpy(), torch.nn.Parameter(V.clone())], ids=str
)
def test_constant_written_to_a_slice(
    toy: Model, x: torch.Tensor, reference: Any, value: Any
) -> None:
    def hook(h: torch.Tensor) -> None:
        h[:, 1] = torch.as_tensor(value)

    expected = reference(toy.load(), (x,), {"mid": hook})
    with toy.trace(x):
        toy.mid.output[:, 1] = value
        result = toy.output.save()
    assert torch.equal(result.value, expected)


@pytest.mark.parametrize("kind", ["tensor", "array", "double", "proxy of another block"])
def test_constant_assigned_to_an_output(
    toy: Model, x: torch.Tensor, reference: Any, kind: str
) -> None:
    expected = reference(toy.load(), (x,), {"mid": lambda h: WHOLE})
    with toy.trace(x):
        other = (toy.mid.output * 0 + WHOLE).save()
    value = {
        "tensor": WHOLE,
        "array": WHOLE.numpy(),
        "double": WHOLE.double(),
        "proxy of another block": other,
    }[kind]
    with toy.trace(x):
        toy.mid.output = value
        result = toy.output.save()
    assert torch.equal(result.value, expected)


def test_parts_of_every_container_are_written(toy: Model, x: torch.Tensor, reference: Any) -> None:
    def replace_named(out: Any) -> Any:
        return out._replace(first=out.first * 2)

    def record(out: Any) -> Any:
        out.hidden = out.hidden + 3
        return out

    def listed(out: Any) -> Any:
        out[0] = out[0] * 2
        return out

    def keyed(out: Any) -> Any:
        out["hidden"] = out["hidden"] - V
        return out

    hooks = {
        "tup": lambda out: (out[0] * 2, out[1]),
        "lis": listed,
        "dic": keyed,
        "nam": replace_named,
        "nes": lambda out: (out[0] * 3, out[1]),
        "rec": record,
    }
    expected = reference(toy.load(), (x,), hooks)
    with toy.trace(x):
        toy.tup.output[0] = toy.tup.output[0] * 2
        toy.lis.output[0] *= 2
        toy.dic.output["hidden"] -= V
        toy.nam.output.first[:] = toy.nam.output.first * 2
        toy.nes.output[0][:] = toy.nes.output[0] * 3
        toy.rec.output.hidden.add_(3)
        result = toy.output.save()
        types = [toy.nam.output.save(), toy.rec.output.save(), toy.lis.output.save()]
    assert torch.equal(result.value, expected)
    assert [type(t.value).__name__ for t in types] == ["Pair", "Record", "list"]


def test_whole_container_is_assigned(toy: Model, x: torch.Tensor, reference: Any) -> None:
    expected = reference(toy.load(), (x,), {"tup": lambda out: (out[1], out[0])})
    with toy.trace(x):
        a, b = toy.tup.output
        toy.tup.output = (b, a)
        result = toy.output.save()
        swapped = toy.tup.output.save()
    assert torch.equal(result.value, expected)
    assert torch.equal(swapped.value[1], toy_part(toy, x))


def toy_part(toy: Model, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return toy.load().inp(x)


def test_bfloat16_model_with_float32_vectors(x: torch.Tensor, reference: Any) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).bfloat16()
    model = Model(module)
    x = x.bfloat16()

    def add(h: torch.Tensor) -> None:
        h[:, -1] += V
        h += V

    expected = reference(module, (x,), {"0": add})
    with model.trace(x):
        h = model[0].output
        h[:, -1] += V
        h += V
        kept, result = h.save(), model.output.save()
        promoted = (h + WHOLE).save()
    assert kept.value.dtype == torch.bfloat16 and promoted.value.dtype == torch.float32
    assert torch.equal(result.value, expected)
    expected = reference(module, (x,), {"0": lambda h: (h + V).bfloat16()})
    with model.trace(x):
        model[0].output = model[0].output + V  # float32, cast to the model's dtype
        result = model.output.save()
    assert torch.equal(result.value, expected)


def test_conversion_of_a_bfloat16_value_is_a_copy(x: torch.Tensor, reference: Any) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).bfloat16()

    def edit(h: Any) -> None:
        wide = h.float()
        wide[:, 0] = 5
        h[:, 1] = 2
        h[:, 2] = wide[:, 1]

    expected = reference(module, (x.bfloat16(),), {"0": edit})
    model = Model(module)
    with model.trace(x.bfloat16()):
        edit(model[0].output)
        result = model.output.save()
    assert torch.equal(result.value, expected)


def test_conversion_is_a_copy_whatever_the_dtype(toy: Model, x: torch.Tensor) -> None:
    """In torch, `float()` shows the memory of a float32 model and copies that of a bfloat16 one."""
    with toy.trace(x):
        total = toy.inp.output.float()
        first = toy.inp.output.save()
        total += toy.out.output  # no write: else the earlier module would need a later value
        total = total.save()
        last, result = toy.out.output.save(), toy.output.save()
    assert torch.equal(total.value, first.value + last.value)
    with torch.no_grad():
        assert torch.equal(result.value, toy.load()(x))


def test_outside_tensor_is_not_written_while_recording(toy: Model, x: torch.Tensor) -> None:
    buffer = torch.zeros(5, 8)
    with toy.trace(x):
        for write in (
            lambda h: buffer.__setitem__(0, h[0, 0]),
            lambda h: buffer.copy_(h[0]),
            lambda h: buffer.add_(h[0]),
        ):
            with pytest.raises(
                graftwork.GraftworkError, match="would change a tensor from outside"
            ):
                write(toy.mid.output)
        with pytest.raises(graftwork.GraftworkError, match="`out=` cannot be recorded"):
            torch.add(toy.mid.output, 1, out=buffer)
    assert not buffer.any()


def test_adding_to_an_outside_name_binds_it_anew(toy: Model, x: torch.Tensor) -> None:
    start = torch.ones(2, 5, 8)
    with toy.trace(x):
        plain = toy.mid.output.save()
        total = start
        total += toy.mid.output
        total = total.save()
    assert torch.equal(total.value, 1 + plain.value) and torch.equal(start, torch.ones(2, 5, 8))


def test_names_of_the_tables_exist_in_torch() -> None:
    assert sorted(n for n in VIEWS | MAYBE_VIEWS if not hasattr(torch.Tensor, n)) == [
        "atleast_1d",
        "atleast_2d",
        "atleast_3d",
    ]
    known = {*dir(torch.Tensor), *dir(torch), *dir(F)}
    assert sorted(FRESH - known) == []
    assert "add_" in METHODS and "__add__" not in METHODS
