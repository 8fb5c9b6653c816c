"""Names for places: reading and writing what goes into a module and what comes out."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from graftwork import GraftworkError, LanguageModel, Model
from graftwork.tracing.errors import OperationError

V = torch.randn(64, generator=torch.Generator().manual_seed(3))


def seen(model: Model, path: str, *inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a module is called with, by a plain hook."""
    found: list[Any] = []
    handle = model.submodule(path).register_forward_pre_hook(
        lambda _m, args, kwargs: found.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model.load()(*inputs)
    handle.remove()
    return found[0]


# ------------------------------------------------------------------ inputs


def test_input_and_inputs_are_what_the_module_is_called_with(
    gpt2: LanguageModel, ids: torch.Tensor
) -> None:
    args, _ = seen(gpt2, "transformer.h.1", ids)
    with gpt2.trace(ids):
        block = gpt2.transformer.h[1]
        first, inputs = block.input.save(), block.inputs.save()
        part = block.inputs[0][0][:, -1].save()
        ln = block.ln_1.input.save()
    assert torch.equal(first.value, args[0]) and torch.equal(ln.value, args[0])
    assert torch.equal(inputs.value[0][0], args[0]) and torch.equal(part.value, args[0][:, -1])
    assert set(inputs.value[1]) == set(seen(gpt2, "transformer.h.1", ids)[1])


def test_input_of_a_module_called_by_keyword(llama: LanguageModel, ids: torch.Tensor) -> None:
    args, kwargs = seen(llama, "model.layers.0.self_attn", ids)
    assert args == () and "hidden_states" in kwargs
    with llama.trace(ids):
        attention = llama.model.layers[0].self_attn
        first = attention.input.save()
        named = attention.inputs[1]["hidden_states"].save()
        names = list(attention.inputs[1].keys())
    assert torch.equal(first.value, kwargs["hidden_states"])
    assert torch.equal(named.value, kwargs["hidden_states"])
    assert names == list(kwargs)


def edited_args(change: Any) -> Any:
    return lambda args, kwargs: ((change(args[0]), *args[1:]), kwargs)


def add_in_place(h: Any) -> Any:
    h[:, -1] += V
    return h


INPUT_WRITES: dict[str, tuple[Any, Any]] = {
    "assigned": (lambda b: setattr(b, "input", b.input * 2), edited_args(lambda h: h * 2)),
    "assigned a constant": (
        lambda b: setattr(b, "input", torch.ones(2, 7, 64)),
        edited_args(lambda h: torch.ones(2, 7, 64)),
    ),
    "augmented": (
        lambda b: setattr(b, "input", b.input.__iadd__(1)),
        edited_args(lambda h: h + 1),
    ),
    "slice in place": (lambda b: add_in_place(b.input), edited_args(lambda h: add_in_place(h))),
    "inputs, nested": (
        lambda b: b.inputs[0][0].mul_(3),
        edited_args(lambda h: h * 3),
    ),
    "inputs, slice": (lambda b: add_in_place(b.inputs[0][0]), edited_args(add_in_place)),
    "inputs, item": (
        lambda b: b.inputs[0].__setitem__(0, b.input * 2),
        edited_args(lambda h: h * 2),
    ),
    "inputs, whole": (
        lambda b: setattr(b, "inputs", ((b.inputs[0][0] * 2, *b.inputs[0][1:]), b.inputs[1])),
        edited_args(lambda h: h * 2),
    ),
    "a view": (
        lambda b: b.input.view(2, 7, 8, 8)[:, :, 3].zero_(),
        edited_args(lambda h: (h.view(2, 7, 8, 8)[:, :, 3].zero_(), h)[1]),
    ),
}


@pytest.mark.parametrize("name", INPUT_WRITES)
def test_write_to_the_input_reaches_the_module(
    gpt2: LanguageModel, ids: torch.Tensor, reference: Any, name: str
) -> None:
    write, hook = INPUT_WRITES[name]
    # The residual stream is the caller's: the reference edits a copy, as an edited input is.
    expected = reference(
        gpt2.load(),
        (ids,),
        arguments={"transformer.h.1.attn.c_attn": lambda a, k: hook((a[0].clone(), *a[1:]), k)},
    ).logits
    with gpt2.trace(ids) as tracer:
        before = gpt2.transformer.h[1].attn.c_attn.input.save()
        write(gpt2.transformer.h[1].attn.c_attn)
        after = gpt2.transformer.h[1].attn.c_attn.input.save()
        logits = tracer.output.logits.save()
    torch.testing.assert_close(logits.value, expected, rtol=0, atol=1e-6)
    assert torch.equal(before.value, seen(gpt2, "transformer.h.1.attn.c_attn", ids)[0][0])
    assert not torch.equal(before.value, after.value)


@pytest.mark.parametrize("how", ["assign", "in place", "by name", "item"])
def test_write_to_the_input_of_a_module_called_by_keyword(
    llama: LanguageModel, ids: torch.Tensor, reference: Any, how: str
) -> None:
    def hook(args: Any, kwargs: Any) -> Any:
        h = kwargs["hidden_states"].clone()
        h[:, -1] = 0
        return args, {**kwargs, "hidden_states": h}

    path = "model.layers.1.self_attn"
    expected = reference(llama.load(), (ids,), arguments={path: hook}).logits
    with llama.trace(ids) as tracer:
        attention = llama.model.layers[1].self_attn
        if how == "assign":
            changed = attention.input.clone()
            changed[:, -1] = 0
            attention.input = changed
        elif how == "in place":
            attention.input[:, -1] = 0
        elif how == "by name":
            attention.inputs[1]["hidden_states"][:, -1] = 0
        else:
            changed = attention.input.clone()
            changed[:, -1] = 0
            attention.inputs[1]["hidden_states"] = changed
        logits = tracer.output.logits.save()
    torch.testing.assert_close(logits.value, expected, rtol=0, atol=1e-6)


def test_edited_input_is_seen_by_the_module_alone(gpt2: LanguageModel, ids: torch.Tensor) -> None:
    """`inputs` of a module, not its caller's variable: what the caller uses later is as it was."""
    args, _ = seen(gpt2, "transformer.h.1.ln_1", ids)
    with gpt2.trace(ids):
        block = gpt2.transformer.h[1]
        block.ln_1.input[:] = 0
        normed = block.ln_1.output.save()
        residual = block.input.save()
    assert torch.equal(residual.value, args[0])
    assert torch.equal(normed.value, gpt2.load().transformer.h[1].ln_1.bias.expand(2, 7, 64))


def test_input_and_output_of_one_module_are_written_in_one_block(
    gpt2: LanguageModel, ids: torch.Tensor, reference: Any
) -> None:
    path = "transformer.h.1.mlp"
    expected = reference(
        gpt2.load(),
        (ids,),
        {path: lambda out: out * 0.5},
        {path: lambda args, kwargs: ((args[0] + V,), kwargs)},
    ).logits
    with gpt2.trace(ids) as tracer:
        mlp = gpt2.transformer.h[1].mlp
        mlp.output *= 0.5
        mlp.input += V
        logits = tracer.output.logits.save()
    torch.testing.assert_close(logits.value, expected, rtol=0, atol=1e-6)


# ------------------------------------------------------------------ outputs of blocks


@pytest.mark.parametrize("how", ["output", "output[0]", "whole", "augmented"])
def test_hidden_states_of_a_block_are_written_either_way(
    gpt2: LanguageModel, ids: torch.Tensor, reference: Any, how: str
) -> None:
    expected = reference(gpt2.load(), (ids,), {"transformer.h.1": lambda h: h + V}).logits
    with gpt2.trace(ids) as tracer:
        block = gpt2.transformer.h[1]
        if how == "output":
            block.output[:] = block.output + V
        elif how == "output[0]":
            block.output[0][:] = block.output[0] + V
        elif how == "whole":
            block.output = block.output[0] + V
        else:
            block.output[0] += V
        after = block.output[0].save()
        entire = block.output.save()
        logits = tracer.output.logits.save()
    assert torch.equal(logits.value, expected)
    assert after.value.shape == (2, 7, 64) and torch.equal(after.value, entire.value)


def test_seed_examples_of_slices(gpt2: LanguageModel, ids: torch.Tensor, reference: Any) -> None:
    def hook(h: torch.Tensor) -> None:
        h[:, -1] += V
        h[:, 2] = V * 2
        h[:, 0, :8] = 0
        h[1, 1:3] *= -1

    expected = reference(gpt2.load(), (ids,), {"transformer.h.2": hook}).logits
    with gpt2.trace(ids) as tracer:
        block = gpt2.transformer.h[-1]
        block.output[0][:, -1] += V
        block.output[0][:, 2] = V * 2
        block.output[0][:, 0, :8] = 0
        block.output[0][1, 1:3] *= -1
        logits = tracer.output.logits.save()
    assert torch.equal(logits.value, expected)


def test_part_that_a_bare_block_output_does_not_have(
    gpt2: LanguageModel, ids: torch.Tensor
) -> None:
    with pytest.raises(IndexError, match=r"hidden states .* alone.*output\[1:2\]"):
        with gpt2.trace(ids):
            gpt2.transformer.h[0].output[1].save()


def test_heads_are_read_and_ablated(gpt2: LanguageModel, ids: torch.Tensor, reference: Any) -> None:
    def hook(qkv: torch.Tensor) -> None:
        qkv[..., 128:].view(2, 7, 8, 8)[:, :, 3] = 0

    expected = reference(gpt2.load(), (ids,), {"transformer.h.1.attn.c_attn": hook}).logits
    with gpt2.trace(ids) as tracer:
        value = gpt2.transformer.h[1].attn.value
        value.output[:, 3] = 0
        heads = value.output.save()
        logits = tracer.output.logits.save()
    assert heads.value.shape == (2, 8, 7, 8) and not heads.value[:, 3].any()
    assert torch.equal(logits.value, expected)


# ------------------------------------------------------------------ the tree


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            lambda m: m.transfomer,
            r"the model \(GPT2LMHeadModel\) has no .*`transfomer`.*`transformer`",
        ),
        (lambda m: m.transformer.hh, r"`transformer` \(GPT2Model\) has no .*`hh`.*`h`"),
        (lambda m: m.transformer.h[0].mpl, r"`transformer\.h\.0` .*`mpl`.*`mlp`"),
        (lambda m: m.transformer.h[0].mlp.ouput, r"`ouput`.*`output`"),
        (lambda m: m.transformer.h[5], r"has 3 modules, so index 5 does not exist; use -3 to 2"),
        (lambda m: m.transformer.h[-4], r"index -4 does not exist"),
        (lambda m: m["transformer.h.0.atn"], r"`atn`.*`attn`"),
        (lambda m: m.get("transformer.g"), r"`transformer` .*`g`"),
        (lambda m: m.transformer.h[0][:, 1], r"indexed by number or name.*output\[\.\.\.\]"),
        (lambda m: m.transformer.h[1.5], r"indexed by number or name"),
        (lambda m: m.transformer.h[0].attn.value.otput, r"`otput`.*`output`"),
        (
            lambda m: setattr(m.transformer.h[0], "ouptut", 1),
            r"`ouptut` of `transformer\.h\.0` cannot",
        ),
        (lambda m: setattr(m.transformer, "h", 1), r"`h` of `transformer` cannot be assigned"),
        (lambda m: m.transformer.h[0].calls[-1], r"counted from 0"),
    ],
    ids=range(14),
)
def test_misspelt_place(gpt2: LanguageModel, use: Any, message: str) -> None:
    with pytest.raises(GraftworkError, match=message):
        use(gpt2)


def test_misspelt_place_fails_at_its_line_in_a_block(
    gpt2: LanguageModel, ids: torch.Tensor
) -> None:
    with pytest.raises(AttributeError, match="Did you mean `mlp`"):
        with gpt2.trace(ids):
            gpt2.transformer.h[0].mpl.output.save()


def test_tree_is_walked_as_torch_walks_it(gpt2: LanguageModel) -> None:
    module = gpt2.load()
    h = gpt2.transformer.h
    assert len(h) == 3 and [e.path for e in h] == [f"transformer.h.{i}" for i in range(3)]
    assert [e.path for e in h[1:]] == ["transformer.h.1", "transformer.h.2"]
    assert h[-1].path == "transformer.h.2" and h[-1] is gpt2.transformer.h[2]
    assert gpt2["transformer.h.1.mlp"] is h[1].mlp and gpt2.get("lm_head").path == "lm_head"
    assert repr(gpt2) == repr(module) and repr(h[0].mlp) == repr(module.transformer.h[0].mlp)
    assert h[0].mlp.c_fc.weight is module.transformer.h[0].mlp.c_fc.weight
    assert h[0].ln_1.eps == module.transformer.h[0].ln_1.eps and gpt2.config is module.config
    assert bool(h) and "mlp" in dir(h[0]) and "output" in dir(h[0])
    assert hasattr(h[0], "mlp") and not hasattr(h[0], "nothing")
    assert h[-1:][0].path == "transformer.h.2"


def test_module_is_called_with_tensors_outside_a_block(gpt2: LanguageModel) -> None:
    h = torch.randn(1, 3, 64)
    with torch.no_grad():
        expected = gpt2.load().transformer.h[0].mlp(h)
        assert torch.equal(gpt2.transformer.h[0].mlp(h), expected)


def test_module_called_with_captured_tensors_in_a_block(
    gpt2: LanguageModel, ids: torch.Tensor
) -> None:
    h = torch.randn(1, 3, 64)
    with gpt2.trace(ids):
        found = gpt2.transformer.ln_f(h).save()
    with torch.no_grad():
        assert torch.equal(found.value, gpt2.load().transformer.ln_f(h))


def test_saved_value_goes_through_a_module_after_the_block(
    gpt2: LanguageModel, ids: torch.Tensor
) -> None:
    with gpt2.trace(ids) as tracer:
        h = gpt2.transformer.ln_f.output.save()
        logits = tracer.output.logits.save()
    with torch.no_grad():
        assert torch.equal(gpt2.lm_head(h.value), logits.value)
        assert torch.equal(gpt2.lm_head(h), logits.value)


class Names(nn.Module):
    """Submodules that are called like an envoy's own attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(4, 4)
        self.input = nn.Linear(4, 4)
        self.get = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get(self.output(self.input(x)))


def test_submodule_called_like_a_port_is_reached_by_its_path() -> None:
    model = Model(Names())
    x = torch.randn(2, 4)
    with model.trace(x):
        inner = model["output"].output.save()
        whole = model.output.save()
        before = model["input"].input.save()
    module = model.load()
    with torch.no_grad():
        assert torch.equal(inner.value, module.output(module.input(x)))
        assert torch.equal(whole.value, module(x)) and torch.equal(before.value, x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(x).relu())


def test_calls_of_a_module_that_runs_twice_are_told_apart() -> None:
    model = Model(Twice())
    x = torch.randn(2, 4)
    with model.trace(x):
        first = model.layer.output.save()
        second = model.layer.calls[1].output.save()
        model.layer.calls[1].input[:] = 0
        result = model.output.save()
    layer = model.load().layer
    with torch.no_grad():
        assert torch.equal(first.value, layer(x))
        assert torch.equal(second.value, layer(x * 0)) and torch.equal(result.value, second.value)


def test_call_that_never_happened_is_an_error_of_that_value_alone() -> None:
    model = Model(Twice())
    with model.trace(torch.randn(2, 4)):
        first = model.layer.output.save()
        third = model.layer.calls[2].output.save()
    assert first.value.shape == (2, 4)
    with pytest.raises(GraftworkError, match=r"(?s)test_envoy\.py.*`layer` was not called 3 times"):
        third.value


def test_module_without_arguments() -> None:
    class Constant(nn.Module):
        def forward(self) -> torch.Tensor:
            return torch.ones(2, 4)

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constant = Constant()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.constant()

    model = Model(Adds())
    with pytest.raises(IndexError, match="called without arguments"):
        with model.trace(torch.zeros(2, 4)):
            model.constant.input.save()
    with model.trace(torch.zeros(2, 4)):
        model.constant.output = model.constant.output * 5
        result = model.output.save()
    assert torch.equal(result.value, torch.full((2, 4), 5.0))


def test_weights_are_read_in_a_block_and_outside(gpt2: LanguageModel, ids: torch.Tensor) -> None:
    head = gpt2.load().lm_head.weight
    with gpt2.trace(ids):
        rows = gpt2.lm_head.weight[:3].save()
        product = (gpt2.transformer.ln_f.output @ gpt2.lm_head.weight.T).save()
        logits = gpt2.lm_head.output.save()
    assert torch.equal(rows.value, head[:3]) and gpt2.lm_head.weight is head
    torch.testing.assert_close(product.value, logits.value)


# ------------------------------------------------------------------ a submodule called `output`


@pytest.fixture(scope="session")
def bert_module() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=61,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    return BertModel(config, add_pooling_layer=False).eval()


def test_a_submodule_called_output_is_reached_as_torch_writes_it(bert_module: BertModel) -> None:
    model = LanguageModel(bert_module)
    layer = model.encoder.layer[1]
    assert layer.output.path == "encoder.layer.1.output"
    assert layer.output.dense.weight is bert_module.encoder.layer[1].output.dense.weight
    assert layer.attention.output.LayerNorm.path == "encoder.layer.1.attention.output.LayerNorm"
    found: dict[str, Any] = {}
    places = {"layer": bert_module.encoder.layer[1]}
    places["dense"] = places["layer"].output.dense
    handles = [
        one.register_forward_hook(lambda _m, _a, out, name=name: found.update({name: out}))
        for name, one in places.items()
    ]
    with torch.no_grad():
        bert_module(torch.tensor([[3, 4, 5]]))
    for handle in handles:
        handle.remove()
    with model.trace([3, 4, 5]):
        dense = layer.output.dense.output.save()
        weight = layer.output.dense.weight.save()
        whole, hidden = layer.output.save(), layer.output[0].save()
        named = layer["output"].output.save()
    assert torch.equal(dense.value, found["dense"])
    assert torch.equal(weight.value, places["dense"].weight)
    for value in (whole, hidden, named):  # the layer gives what its `output` gives
        assert torch.equal(value.value, found["layer"])


def test_a_port_of_a_submodule_called_output_has_another_spelling(bert_module: BertModel) -> None:
    model = LanguageModel(bert_module)
    with pytest.raises(OperationError, match=r'`encoder.layer.0\["output"\].input`'):
        with model.trace([3, 4, 5]):
            model.encoder.layer[0].output.input.save()


def test_a_name_is_proposed_once(bert_module: BertModel) -> None:
    with pytest.raises(GraftworkError, match="Did you mean `output`\\?"):
        _ = LanguageModel(bert_module).encoder.layer[0].outpu


def test_assigning_through_a_submodule_called_output_says_what_to_write() -> None:
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    model: Any = LanguageModel(BertModel(config).eval())
    ids, layer = torch.tensor([[1, 2, 3]]), model.encoder.layer[0]
    with pytest.raises(OperationError, match=r'write `encoder\.layer\.0\["output"\]\.output`'):
        with model.trace(ids):
            layer.output.output = torch.zeros(1, 3, 16)
    with pytest.raises(OperationError, match=r"`\.output = …` of a value of the block"):
        with model.trace(ids):
            layer.attention.self.key.output.output = 3
    with model.trace(ids):
        layer["output"].output = torch.ones(1, 3, 16)
        after = layer.output.save()
    assert torch.equal(after.value, torch.ones(1, 3, 16))
