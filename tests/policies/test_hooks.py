"""`model.hooks`: how policies are found, configured, kept and refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork import GraftworkError, LanguageModel
from graftwork.policies import KINDS, POINTS, HookConfig
from graftwork.tracing.errors import InputError, ShapeError, UnavailableNameError

from ..models.conftest import random_prompts, wrap
from .conftest import CAUSAL, HEADS, LAYERS, close, fresh, numbers, plain, size

IDS = random_prompts(5)[0]
POINT = "mlp_pre_out"
D = 24

# -------------------------------------------------------------------- the configuration

LINES = st.dictionaries(
    st.sampled_from(sorted(POINTS)),
    st.dictionaries(
        st.one_of(st.just("all"), st.integers(0, 40)),
        st.lists(st.sampled_from(sorted(KINDS)), unique=True, max_size=6),
        min_size=1,
        max_size=4,
    ),
)


@settings(deadline=None)
@given(hooks=LINES)
def test_what_is_written_is_read_again(hooks: Any) -> None:
    config = HookConfig(hooks)
    text = config.to_string()
    again = HookConfig().from_string(text)
    assert again == config and again.hooks == hooks
    assert again.to_string() == text == str(config)
    for point in POINTS:
        for layer in (0, 3, 40):
            layers = hooks.get(point, {})
            expected = layers[layer] if layer in layers else layers.get("all", [])
            assert config.at(point, layer) == expected


@settings(deadline=None)
@given(
    text=st.text(alphabet="pre_attn: mask,offset\n#all0123²٣-", max_size=60) | st.text(max_size=60)
)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        config = HookConfig().from_string(text)
    except InputError as error:
        assert "line" in str(error)
    else:
        assert HookConfig().from_string(config.to_string()) == config


def test_spaces_and_comments() -> None:
    config = HookConfig().from_string(
        """
        # all of it
        mlp_pre_out :mask,  offset   # two
          mlp_pre_out:2:  collect
        pre_mlp: all: postbias
        post_mlp:
        """
    )
    assert config.hooks == {
        "mlp_pre_out": {"all": ["mask", "offset"], 2: ["collect"]},
        "pre_mlp": {"all": ["postbias"]},
        "post_mlp": {"all": []},
    }
    assert "mlp_pre_out: 2: collect" in repr(config) or "collect" in repr(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mlp_pre: mask", r"line 1.*no point is called `mlp_pre`.*mlp_pre_out.*post_decoder"),
        ("\nmlp_pre_out: mast", r"line 2.*no policy is called `mast`.*mask"),
        ("mlp_pre_out mask", r"line 1.*'mlp_pre_out mask', is neither"),
        ("mlp_pre_out: 1: 2: mask", r"line 1.*is neither"),
        ("mlp_pre_out: two: mask", r"line 1: 'two' is no number of a layer"),
        ("mlp_pre_out: -1: mask", r"'-1' is no number of a layer"),
        ("mlp_pre_out: ²: mask", r"'²' is no number of a layer"),
        ("mlp_pre_out: mask, collect, mask", r"`mask` is twice at `mlp_pre_out`"),
        ("mlp_pre_out: 2", r"no policy is called `2`"),
    ],
)
def test_lines_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        HookConfig().from_string(text)
    with pytest.raises(InputError, match=f"(?s){message}"):
        fresh("gpt2", hook_config=text)


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(InputError, match=r"`mlp_pre_out: 3`.*3 layers"):
        fresh("gpt2", hook_config="mlp_pre_out: 3: mask")
    model = fresh("gpt2")
    with pytest.raises(InputError, match="mlp_pre_out: 7"):
        model.set_hook_config("mlp_pre_out: 7: mask")
    with pytest.raises(InputError, match=r"-1 is no number of a layer"):
        HookConfig().set("mlp_pre_out", -1, ["mask"])
    with pytest.raises(InputError, match=r"'some' is no number of a layer"):
        HookConfig({"mlp_pre_out": {"some": ["mask"]}})


def test_a_new_configuration_takes_all_hooks_away() -> None:
    model = fresh("gpt2")
    model.hooks[POINT][1]["postbias"].set_bias(torch.ones(64))
    assert not torch.equal(model.get_logits(IDS), plain("gpt2", IDS))
    given = HookConfig().from_string("mlp_pre_out: 1: collect")
    model.set_hook_config(given)
    assert torch.equal(model.get_logits(IDS), plain("gpt2", IDS))
    assert list(model.hooks[POINT][1]) == ["collect"] and list(model.hooks[POINT][0]) == []
    assert "collect" in model.hooks[POINT][1] and "mask" not in model.hooks[POINT][1]
    # What is not in it is made when it is asked for, and comes last.
    model.hooks[POINT][1]["mask"]
    assert list(model.hooks[POINT][1]) == ["collect", "mask"]


def test_names_of_what_there_is() -> None:
    model = fresh("gpt2")
    hooks = model.hooks
    assert list(hooks) == list(POINTS) and len(hooks) == 8
    assert len(hooks[POINT]) == LAYERS and len(list(hooks[POINT])) == LAYERS
    assert hooks[POINT][-1]["mask"] is hooks[POINT][2]["mask"]
    assert hooks.neuron_masks["layer_2_mlp_pre_out"] is hooks[POINT][2]["mask"]
    assert hooks.neuron_actadd["layer_0_pre_attn"] is hooks["pre_attn"][0]["actadd"]
    assert hooks.neuron_offsets["layer_0_pre_attn"] is hooks["pre_attn"][0]["offset"]
    assert hooks.neuron_replace["layer_0_pre_attn"] is hooks["pre_attn"][0]["replace"]
    assert "layer_2_mlp_pre_out" in hooks.neuron_replace
    assert "layer_3_mlp_pre_out" not in hooks.neuron_replace
    assert "layer_0_middle" not in hooks.neuron_replace and 3 not in hooks.neuron_replace
    assert hooks.neuron_masks.keys() == ["layer_2_mlp_pre_out"]
    assert hooks[POINT]["mask"] == [hooks[POINT][layer]["mask"] for layer in range(LAYERS)]
    assert "mlp_pre_out" in repr(hooks) and "3 layers" in repr(hooks[POINT])
    assert "layer 2" in repr(hooks[POINT][2]) and "active=False" in repr(hooks[POINT][2]["mask"])
    # Nothing of this does anything.
    assert torch.equal(model.get_logits(IDS), plain("gpt2", IDS))


@pytest.mark.parametrize(
    ("ask", "kind", "message"),
    [
        (lambda h: h["mlp"], InputError, r"no point is called `mlp`.*mlp_pre_out"),
        (lambda h: h[POINT][3], UnavailableNameError, "3"),
        (lambda h: h[POINT][-4], UnavailableNameError, "-4"),
        (lambda h: h[POINT][1]["musk"], InputError, r"no policy is called `musk`.*mask"),
        (lambda h: h.neuron_replace["layer_2"], InputError, r"`layer_2` is no place.*layer_2_mlp"),
        (lambda h: h.neuron_replace["layer_2_x"], InputError, "is no place"),
        (lambda h: h.neuron_replace["layer_9_pre_attn"], UnavailableNameError, "9"),
        (lambda h: h[POINT][1].add_token(-1, torch.ones(64)), InputError, "counted from the first"),
        (
            lambda h: h[POINT][1]["replace"].add_token(-1, torch.ones(64)),
            InputError,
            "token -1",
        ),
        (
            lambda h: h[POINT][1].add_token(0, torch.ones(5)),
            ShapeError,
            r"`actadd` takes \[64\], and \[5\] was given",
        ),
        (
            lambda h: h[POINT][1].set_actadd(torch.ones(3, 5)),
            ShapeError,
            r"takes \[3, 64\], and \[3, 5\]",
        ),
        (lambda h: h[POINT][1].set_mask(torch.ones(65)), ShapeError, r"`mask` takes \[64\]"),
        (lambda h: h[POINT][1].delete_neurons(), InputError, "one of them"),
        (
            lambda h: h[POINT][1].delete_neurons(torch.ones(64), torch.ones(64)),
            InputError,
            "one of them",
        ),
        (
            lambda h: h[POINT].set_offsets(torch.ones(2, 64)),
            InputError,
            r"\[2, 64\].*3 layers",
        ),
        (lambda h: h[POINT].set_offsets(torch.ones(())), InputError, "3 layers"),
        (lambda h: h.delete_mlp_neurons(torch.ones(2, 64)), InputError, r"\[2, 64\].*3 layers"),
        (lambda h: h.delete_attn_neurons(torch.ones(3, 15)), ShapeError, r"`mask` takes \[4, 4\]"),
        (lambda h: h.enable_collect_hooks(["mlp_pre"]), InputError, "no point is called"),
        (lambda h: h.enable_collect_hooks(layers=[3]), UnavailableNameError, "3"),
        (
            lambda h: h[POINT][1]["whiten"].set_whitening(
                torch.ones(64), torch.eye(5), torch.ones(64)
            ),
            ShapeError,
            r"a rotation \[64, 64\] and a scale \[64\], not \[5, 5\]",
        ),
        (
            lambda h: h[POINT][1]["whiten"].set_whitening(
                torch.ones(64), torch.eye(64), torch.ones(64), torch.eye(5)
            ),
            ShapeError,
            r"the inverse of a rotation \[64, 64\] is \[5, 5\]",
        ),
        (
            lambda h: KINDS["unoffset"]((3,))(torch.ones(1, 1, 3)),
            GraftworkError,
            "needs a `offset`",
        ),
        (lambda h: KINDS["mask"]((3,), "stp"), InputError, r"no mask is called `stp`"),
        (lambda h: h.load_state_dict({"mask": torch.ones(1)}), InputError, "is no parameter"),
        (
            lambda h: h.load_state_dict({"mlp_pre_out.1.mask.weight": torch.ones(1)}),
            InputError,
            "`mask` has no parameter `weight`",
        ),
        (
            lambda h: h.load_state_dict({"mlp_pre_out.1.mask.param": torch.ones(3)}),
            ShapeError,
            r"`param` of `mask` is \[64\], and \[3\]",
        ),
        (
            lambda h: h.load_state_dict({"mlp_pre_out.1.replace.param.x": torch.ones(64)}),
            InputError,
            "no parameter",
        ),
    ],
)
def test_what_is_refused(ask: Any, kind: type[Exception], message: str) -> None:
    model = fresh("gpt2")
    with pytest.raises(kind, match=f"(?s){message}"):
        ask(model.hooks)
    assert torch.equal(model.get_logits(IDS), plain("gpt2", IDS))


def test_a_mask_of_no_kind_is_refused_by_the_block() -> None:
    model = fresh("gpt2")
    model.hooks[POINT][1]["mask"].mask_fn = "sigmoyd"
    with pytest.raises(InputError, match=r"no mask is called `sigmoyd`.*sigmoid"):
        model.get_logits(IDS)


@pytest.mark.parametrize("name", ["mixtral", "mamba"])
def test_points_that_an_architecture_has_not(name: str) -> None:
    """Where all are collected, those that there are; one that is asked for is refused."""
    model = LanguageModel(wrap(name).load())
    missing = []
    for point in POINTS:
        try:
            model.hooks[point][0]["collect"]
        except UnavailableNameError:
            missing.append(point)
    assert missing
    with pytest.raises(UnavailableNameError):
        model.hooks.enable_collect_hooks([POINT, *missing])
    assert not any(policy.enabled for *_, policy in model.hooks.every("collect"))
    model.hooks.enable_collect_hooks()
    model.get_logits(IDS)
    for point in POINTS:
        found = model.hooks[point]["collect"]
        assert len(found) == (0 if point in missing else len(model.layers))


def test_names_that_are_checked_when_they_are_used() -> None:
    """Of an architecture that is not declared: the check sees the model without its policies."""
    config = transformers.StableLmConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    tree = transformers.StableLmForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in tree.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model = LanguageModel(tree)
    # Behind a mask of everything, nothing that happens before it is seen.
    model.hooks[POINT][0]["mask"].set_mask(torch.zeros(D))
    model.hooks[POINT][0]["collect"].enable()
    with model.trace(IDS):
        box = model.layers[0].pre_mlp.save()
    assert box.value.shape == (1, 5, 16)
    assert model.hooks[POINT][0]["collect"].activation.shape == (1, 5, D)
    assert model.verify_names(strict=False).ok
    assert model.hooks[POINT][0]["collect"].activation.shape == (1, 5, D)


def test_one_component_may_be_named_alone() -> None:
    model = fresh("gpt2")
    model.hooks.enable_collect_hooks("pre_mlp", layers=range(2))
    model.get_logits(IDS)
    assert model.hooks["pre_mlp"]["collect"].shape == (2, 1, 5, 16)
    assert model.hooks[POINT]["collect"] == []


# -------------------------------------------------------------------- what is deleted


@pytest.mark.parametrize("name", CAUSAL)
def test_deletions_add_up(name: str) -> None:
    model = fresh(name)
    d, heads = size(name, POINT), size(name, "attn_pre_out")
    gone = [
        torch.rand(LAYERS, *d, generator=torch.Generator().manual_seed(n)) < 0.2 for n in (1, 2)
    ]
    flat = torch.rand(LAYERS, heads[0] * heads[1]) < 0.3
    apart = torch.rand(LAYERS, *heads) < 0.3
    model.hooks.delete_mlp_neurons(gone[0])
    model.hooks.delete_mlp_neurons(gone[1].tolist())
    model.hooks.delete_attn_neurons(flat)
    model.hooks.delete_attn_neurons(apart)
    functions: Any = {}
    for layer in range(LAYERS):
        keep = ~(gone[0] | gone[1])[layer]
        stays = ~(flat.reshape(LAYERS, *heads) | apart)[layer]
        functions[POINT, layer] = lambda x, m=keep: x * m
        functions["attn_pre_out", layer] = lambda x, m=stays: x * m
    close(model.get_logits(IDS), plain(name, IDS, functions))
    here = model.hooks[POINT][1]
    here.delete_neurons(keep_indices=torch.arange(d[0]) < 3)
    here.delete_neurons(remove_indices=torch.arange(d[0]) == 1)
    keep = ~(gone[0] | gone[1])[1] & (torch.arange(d[0]) < 3) & (torch.arange(d[0]) != 1)
    functions[POINT, 1] = lambda x: x * keep
    close(model.get_logits(IDS), plain(name, IDS, functions))
    assert torch.equal(here["mask"].mask, keep.float())
    # `set_mask` does not add up.
    here.set_mask(torch.ones(d))
    del functions[POINT, 1]
    close(model.get_logits(IDS), plain(name, IDS, functions))


def test_offsets_of_all_layers() -> None:
    model = fresh("llama", hook_config="mlp_pre_out: offset\nattn_pre_out: offset")
    neurons, heads = numbers(LAYERS, D), numbers(LAYERS, HEADS, 4, seed=1)
    model.hooks[POINT].set_offsets(neurons)
    model.hooks["attn_pre_out"].set_offsets(heads.flatten(1))
    functions: Any = {}
    for layer in range(LAYERS):
        functions[POINT, layer] = lambda x, o=neurons[layer]: x + o
        functions["attn_pre_out", layer] = lambda x, o=heads[layer]: x + o
    close(model.get_logits(IDS), plain("llama", IDS, functions))


# -------------------------------------------------------------------- what is kept


def filled() -> Any:
    model = fresh("llama")
    for layer in range(LAYERS):
        here = model.hooks[POINT][layer]
        here["mask"].set_mask(numbers(D, seed=layer))
        here["mask"].set_offset(numbers(D, seed=10 + layer))
        here["offset"].set_offset(numbers(D, seed=20 + layer))
        here["replace"].add_token(3 + layer, numbers(D, seed=30 + layer))
        here.set_actadd(numbers(2 + layer, D, seed=40 + layer))
        model.hooks["attn_pre_out"][layer]["postbias"].set_bias(numbers(HEADS, 4, seed=layer))
    rotate = torch.linalg.qr(numbers(16, 16)).Q
    model.hooks["post_mlp"][1]["whiten"].set_whitening(numbers(16), rotate, numbers(16).abs() + 1)
    return model


def test_state_goes_round(tmp_path: Any) -> None:
    model = filled()
    expected = model.get_logits(IDS)
    state = model.hooks.state_dict()
    assert f"{POINT}.2.mask.param" in state and f"{POINT}.2.replace.param.5" in state
    torch.save(state, tmp_path / "policies.pt")
    other = fresh("llama")
    other.hooks.load_state_dict(torch.load(tmp_path / "policies.pt"))
    assert torch.equal(other.get_logits(IDS), expected)
    again = other.hooks.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())
    assert other.hooks[POINT][2]["replace"].max_tokens == 6
    # They are copies.
    other.hooks[POINT][2]["mask"].param.data.zero_()
    assert torch.equal(model.get_logits(IDS), expected)
    # And on top of others.
    other.hooks.load_state_dict(state)
    assert torch.equal(other.get_logits(IDS), expected)


def test_state_after_a_reset_changes_nothing() -> None:
    model = filled()
    model.hooks.reset()
    other = fresh("llama")
    other.hooks.load_state_dict(model.hooks.state_dict())
    assert torch.equal(other.get_logits(IDS), plain("llama", IDS))


def test_parameters_are_each_there_once() -> None:
    model = fresh("llama", hook_config="mlp_pre_out: offset, whiten, unwhiten, unoffset")
    here = model.hooks[POINT][1]
    for kind in ("offset", "whiten", "unwhiten", "unoffset"):
        here[kind]
    parameters = list(model.hooks.parameters())
    assert len({id(p) for p in parameters}) == len(parameters) == 1 + 4
    assert here["unoffset"].param is here["offset"].param
    # Also after it was given another one.
    here["offset"].param = torch.nn.Parameter(numbers(D), requires_grad=False)
    close(model.get_logits(IDS), plain("llama", IDS))


def test_replacements_alone_are_taken_away() -> None:
    model = fresh("llama")
    for layer in range(LAYERS):
        model.hooks.neuron_replace[f"layer_{layer}_mlp_pre_out"].add_token(0, numbers(D))
    model.hooks[POINT][1]["postbias"].set_bias(numbers(D))
    model.hooks.reset_neuron_replace()
    expected = plain("llama", IDS, {(POINT, 1): lambda x: x + numbers(D)})
    close(model.get_logits(IDS), expected)
    # At one place, additions and replacements.
    here = model.hooks[POINT][2]
    here.add_token(0, numbers(D))
    here["replace"].add_token(0, numbers(D))
    here["replace"].tokens_seen = 3
    here.restart()
    assert here["replace"].tokens_seen == 0
    here.reset()
    close(model.get_logits(IDS), expected)


def test_tokens_are_added_up_and_set() -> None:
    model = fresh("llama")
    here = model.hooks[POINT][1]
    here.add_token(2, numbers(D, seed=1))
    here.add_token(2, numbers(D, seed=2))
    here.add_token(0, [1.0] * D)
    param = here["actadd"].param
    close(param.detach(), torch.stack([torch.ones(D), torch.zeros(D), sum2()]))
    here.set_actadd([[2] * D])
    assert here["actadd"].param.shape == (1, D) and float(here["actadd"].param.sum()) == 2 * D
    replace = here["replace"]
    replace.add_token(4, numbers(D))
    replace.add_token(1, numbers(D))
    assert replace.max_tokens == 5 and set(replace.param) == {"1", "4"}


def sum2() -> torch.Tensor:
    return numbers(D, seed=1) + numbers(D, seed=2)


def test_two_models_of_a_module_have_their_own() -> None:
    one, other = fresh("llama"), fresh("llama")
    one.hooks[POINT][1]["postbias"].set_bias(numbers(D))
    assert torch.equal(other.get_logits(IDS), plain("llama", IDS))
    assert not torch.equal(one.get_logits(IDS), plain("llama", IDS))


def test_hooks_move_with_the_dtype_of_the_model() -> None:
    model = LanguageModel(copy.deepcopy(wrap("llama").load()).half())
    assert model.hooks[POINT][1]["mask"].param.dtype == torch.float32
    model = LanguageModel(copy.deepcopy(wrap("llama").load()).double())
    assert model.hooks[POINT][1]["mask"].param.dtype == torch.float64


def test_tokens_of_a_decoder_are_not_counted_as_the_prompts() -> None:
    config = transformers.T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    model = LanguageModel(transformers.T5ForConditionalGeneration(config).eval())
    with pytest.raises(UnavailableNameError, match="counts the tokens of a prompt"):
        model.hooks["mlp_pre_out"][1].add_token(0, torch.ones(24))
    model.hooks["mlp_pre_out"][1].delete_neurons(remove_indices=torch.ones(24))
    with model.trace([1, 2, 3], decoder_input_ids=torch.tensor([[0, 5]])):
        neurons = model.decoder_layers[1].mlp_post.save()
    assert neurons.value.abs().max() == 0
