"""What is saved is a tensor: compared with the same value taken by a plain hook."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import graftwork
from graftwork import LanguageModel, Model
from graftwork.tracing import SavedTensor
from graftwork.tracing.errors import NotSavedError, OperationError

PROMPT = "The Eiffel Tower is in the city of"


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("graftwork/tiny")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.pair = Pair()
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.pair(self.first(x))[0])


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.tanh(), x


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


def hooked(net: nn.Module, module: nn.Module) -> Any:
    """What a module gives, by a plain hook."""
    found = []
    handle = module.register_forward_hook(lambda _m, _i, out: found.append(out))
    with torch.no_grad():
        net(X)
    handle.remove()
    return found[0]


@pytest.fixture
def pair(net: Net) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A saved value, and the plain tensor that it has to be."""
    with Model(net).trace(X):
        value = net_model_first(net)
    yield value, hooked(net, net.first)


def net_model_first(net: Net) -> Any:
    from graftwork.tracing import current_tracer

    tracer = current_tracer()
    assert tracer is not None
    return tracer.model.first.output.save()


USES: dict[str, Callable[[torch.Tensor], Any]] = {
    "list of scalars": lambda h: torch.tensor([h[0, 0], h[1, 1]]),
    "as_tensor": lambda h: torch.as_tensor(h),
    "tensor": lambda h: torch.tensor(h.tolist()),
    "numpy": lambda h: torch.from_numpy(h.numpy()),
    "asarray": lambda h: torch.from_numpy(np.asarray(h).copy()),
    "mean of numpy scalars": lambda h: torch.tensor(np.mean([float(h[0, 0]), float(h[0, 1])])),
    "round": lambda h: torch.tensor(round(h[0, 0].item(), 2)),
    "parameter": lambda h: nn.Parameter(h).data,
    "loader": lambda h: next(iter(torch.utils.data.DataLoader([h, h], batch_size=2))),
    "deepcopy": lambda h: copy.deepcopy(h),
    "copy": lambda h: copy.copy(h),
    "pickle": lambda h: pickle.loads(pickle.dumps(h)),
    "safetensors": lambda h: load(save({"h": h}))["h"],
    "dlpack": lambda h: torch.from_dlpack(h.detach()),
    "stack": lambda h: torch.stack([h, h]),
    "method": lambda h: h.softmax(-1),
    "transpose": lambda h: h.t(),
    "rows": lambda h: torch.stack(list(h)),
    "reversed operator": lambda h: 1 - h,
    "functional": lambda h: nn.functional.linear(h, torch.ones(3, 6)),
    "vmap": lambda h: torch.func.vmap(lambda row: row * 2)(h),
    "data of another": lambda h: _assigned(h),
    "index of a list": lambda h: torch.tensor([10, 20, 30][h.argmax().remainder(3)]),
    "equality": lambda h: h == h,
    "contains": lambda h: torch.tensor(h in [h]),
    "bool": lambda h: torch.tensor(bool(h[0, 0] > 0)),
    "in place": lambda h: h.clone().add_(1),
    "format": lambda h: torch.tensor(float(f"{h[0, 0]:.4f}")),
}


def _assigned(h: torch.Tensor) -> torch.Tensor:
    other = torch.zeros(1)
    other.data = h
    return other


@pytest.mark.parametrize("use", USES, ids=list(USES))
def test_saved_value_is_used_as_a_tensor(use: str, pair: tuple[Any, torch.Tensor]) -> None:
    value, plain = pair
    assert isinstance(value, torch.Tensor)
    torch.testing.assert_close(value, plain)
    found = USES[use](value)
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(USES[use](plain)))


def test_file_holds_a_plain_tensor(pair: tuple[Any, torch.Tensor]) -> None:
    value, plain = pair
    file = io.BytesIO()
    torch.save({"h": value}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["h"]
    assert type(loaded) is torch.Tensor and torch.equal(loaded, plain)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_every_type_of_numbers(dtype: torch.dtype, net: Net) -> None:
    with Model(net).trace(X):
        value = net_model_first(net)
        cast = value.to(dtype).save()
        scalar = value.to(dtype)[0, 0].save()
    plain = hooked(net, net.first).to(dtype)
    assert isinstance(cast, torch.Tensor) and cast.dtype is dtype
    assert torch.equal(torch.as_tensor(cast), plain)
    assert torch.equal(torch.tensor([scalar]), torch.tensor([plain[0, 0]]))


def test_structure_stays_one_and_its_parts_are_tensors(net: Net) -> None:
    model = Model(net)
    with model.trace(X):
        whole = model.pair.output.save()
        part = model.pair.output[0].save()
        best = model.first.output.max(-1).save()
    assert not isinstance(whole, torch.Tensor) and isinstance(whole.value, tuple)
    assert isinstance(part, torch.Tensor)
    assert torch.equal(part, hooked(net, net.pair)[0])
    assert not isinstance(best, torch.Tensor)
    assert torch.equal(best.indices, hooked(net, net.first).max(-1).indices)


def test_number_and_result_of_a_function_keep_a_proxy(net: Net) -> None:
    model = Model(net)
    calls = []

    def function(x: torch.Tensor) -> float:
        calls.append(x)
        return float(x.sum())

    with model.trace(X):
        total = graftwork.apply(function, model.first.output).save()
        assert not calls  # the function is not called to see what it gives
    assert len(calls) == 1
    assert not isinstance(total, torch.Tensor)
    assert float(total) == pytest.approx(float(hooked(net, net.first).sum()))


def test_saved_value_records_while_its_block_is_open(net: Net) -> None:
    model = Model(net)
    with model.trace(X):
        before = model.first.output.save()
        before[:, 0] = 0
        before[:, 1] += 2
        after = before.save()
        mean = before.mean(-1, keepdim=True).save()
        top = torch.softmax(before, -1)[0].save()
        assert before.shape == (2, 6) and before.dtype is torch.float32
        assert before[0, 0].item() == 0
        result = model.last.output.save()
    plain = hooked(net, net.first)
    changed = plain.clone()
    changed[:, 0] = 0
    changed[:, 1] += 2
    assert torch.equal(before, plain) and torch.equal(after, changed)
    assert torch.equal(mean, changed.mean(-1, keepdim=True))
    assert torch.equal(top, changed.softmax(-1)[0])
    with torch.no_grad():
        assert torch.equal(result, net.last(changed.tanh()))


def test_in_the_block_no_numbers_can_be_had_past_the_recording(net: Net) -> None:
    model = Model(net)
    with model.trace(X):
        value = model.first.output.save()
        # What reads it in C finds a tensor that has no numbers.
        with pytest.raises(RuntimeError, match="incompatible tensor type"):
            torch.zeros(1).data = value
        with pytest.warns(UserWarning, match="copy construct"):
            assert torch.tensor(value).is_meta
        with pytest.raises(OperationError, match="cannot be recorded"):
            value.requires_grad = True
        with pytest.raises(OperationError, match="cannot be recorded"):
            value.data = torch.zeros(2, 6)


def test_changes_after_the_block_reach_every_view_of_it(pair: tuple[Any, torch.Tensor]) -> None:
    value, plain = pair
    same = value
    value += 1
    assert value is same
    value[0] = 0
    value.unsqueeze_(0)
    wanted = plain + 1
    wanted[0] = 0
    assert torch.equal(value.value, wanted[None])
    assert torch.equal(torch.as_tensor(value), wanted[None])


def test_saved_values_become_parameters_that_are_trained(net: Net) -> None:
    model = Model(net)
    with model.trace(X):
        row = model.first.output[0].save()
    plain = nn.Parameter(hooked(net, net.first)[0].clone())
    layer = nn.Module()
    layer.weight = nn.Parameter(row)
    assert isinstance(layer.weight, nn.Parameter) and list(layer.parameters())
    for parameter in (layer.weight, plain):
        optimizer = torch.optim.Adam([parameter], lr=0.1)
        (parameter**2).sum().backward()
        optimizer.step()
    assert torch.equal(layer.weight, plain) and torch.equal(layer.weight.grad, plain.grad)
    assert isinstance(copy.deepcopy(layer).weight, nn.Parameter)
    assert torch.equal(layer.state_dict()["weight"], plain)
    assert layer.double().weight.dtype is torch.float64


def test_gradient_hangs_on_what_was_captured(net: Net) -> None:
    model = Model(net)
    vector = nn.Parameter(torch.randn(6))
    with model.trace(X):
        model.first.output += vector
        out = model.last.output.save()
    assert out.requires_grad
    out.sum().backward()
    found = vector.grad
    vector.grad = None
    net.last(net.pair(net.first(X) + vector)[0]).sum().backward()
    torch.testing.assert_close(found, vector.grad)


def test_retained_gradient_is_there_after_the_block(net: Net) -> None:
    model = Model(net)
    with model.trace(X):
        hidden = model.first.output.save()
        hidden.retain_grad()
        double = (hidden * 2).save()
        model.last.output.sum().backward(retain_graph=True)
        model.last.output.pow(2).sum().backward()
        double.retain_grad()
    plain = net.first(X)
    plain.retain_grad()
    out = net.last(net.pair(plain)[0])
    (out.sum() + out.pow(2).sum()).backward()
    torch.testing.assert_close(hidden.grad, plain.grad)
    assert double.grad is None  # no backward followed


def test_retained_gradient_of_a_value_that_is_saved_elsewhere(net: Net) -> None:
    model = Model(net)
    with model.trace(X):
        output = model.first.output
        output.retain_grad()
        hidden = output.save()
        model.last.output.sum().backward()
    plain = net.first(X)
    plain.retain_grad()
    net.last(net.pair(plain)[0]).sum().backward()
    torch.testing.assert_close(hidden.grad, plain.grad)


def test_no_block_is_kept_by_a_result(pair: tuple[Any, torch.Tensor]) -> None:
    value, _ = pair
    assert type(value * 2) is torch.Tensor and type(value[0]) is torch.Tensor
    assert type(value.value) is torch.Tensor
    assert value.untyped_storage().data_ptr() == value.value.untyped_storage().data_ptr()


def test_tokenizers_take_saved_ids(tiny: LanguageModel) -> None:
    with tiny.generate(PROMPT, max_new_tokens=2) as generator:
        ids = generator.output.save()
        first = tiny.lm_head.output[:, -1].argmax(-1).save()
        block = tiny.transformer.h[1].output.save()
        hidden = tiny.transformer.h[1].output[0].save()
    module, tokenizer = tiny.load(), tiny.tokenizer
    inputs = tokenizer(PROMPT, return_tensors="pt")
    plain = module.generate(**inputs, max_new_tokens=2)
    assert isinstance(ids, torch.Tensor) and torch.equal(ids, plain)
    assert tokenizer.batch_decode(ids) == tokenizer.batch_decode(plain)
    assert tokenizer.decode(first) == tokenizer.decode(plain[0, -2])
    assert isinstance(block, torch.Tensor) and torch.equal(block, hidden)


def test_lists_keep_what_is_put_into_them(net: Net) -> None:
    model = Model(net)
    with model.trace(X):
        found = graftwork.save([])
        named = graftwork.save({"first": model.first.output})
        early = model.first.output.save()
        found.append(early)
        model.first.output[:] = 0
        found.append(model.first.output)
        named["last"] = [model.last.output, 3]
        one = graftwork.save((model.last.output, "x"))
    plain = hooked(net, net.first)
    assert found[0] is early and torch.equal(torch.stack(found), torch.stack([plain, plain * 0]))
    assert torch.equal(named["first"], plain)
    assert torch.equal(named["last"][0], one[0]) and named["last"][1] == 3
    assert graftwork.save(5) == 5


def test_unsaved_value_has_none(net: Net) -> None:
    model = Model(net)
    with model.trace(X):
        unsaved = model.first.output
        model.last.output.save()
    with pytest.raises(NotSavedError):
        torch.as_tensor(unsaved.value)


def test_scan_gives_tensors_without_numbers(tiny: LanguageModel) -> None:
    with tiny.scan(PROMPT):
        hidden = tiny.transformer.h[0].output[0].save()
    assert isinstance(hidden, SavedTensor) and hidden.is_meta and hidden.shape == (1, 8, 128)


def test_whole_output_is_saved_where_gradients_are_recorded(tiny: LanguageModel) -> None:
    vector = torch.zeros(128, requires_grad=True)
    with tiny.trace(PROMPT) as tracer:
        tiny.transformer.h[0].output[0][:, -1] += vector
        result = tracer.output.save()  # with the cache of keys and values, which autograd recorded
    result.logits[0, -1, 0].backward()
    found = vector.grad

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        changed = torch.cat([hidden[:, :-1], hidden[:, -1:] + plain], 1)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    plain = torch.zeros(128, requires_grad=True)
    handle = tiny.load().transformer.h[0].register_forward_hook(hook)
    logits = tiny.load()(**tiny.tokenizer(PROMPT, return_tensors="pt")).logits
    handle.remove()
    (wanted,) = torch.autograd.grad(logits[0, -1, 0], plain)
    torch.testing.assert_close(found, wanted)
