"""The code of one more document of an older library runs as written, with the import renamed.

The document is the description (README) of taker. Here is its code alone: `from taker` has become
`from graftwork`, comments are gone, and two long lines are broken. What its blocks leave behind is
compared with torch's own hooks. `'facebook/opt-125m'` and `'nickypro/tinyllama-15m'` are folders of
these names in the current directory, with a tiny model of each architecture that the document names.

Supplied by the tests, because the document does not import it: `HookConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from graftwork.models.language import ImageModel, LanguageModel
from graftwork.policies import HookConfig

LOADING = """
from graftwork import Model

dtype = "fp16"
model = Model("facebook/opt-125m", dtype=dtype)

print(f"Number of layers: {model.cfg.n_layer}")
print(f"Model width: {model.cfg.d_model}")
print(f"MLP width: {model.cfg.d_mlp}")
print(f"Number of heads: {model.cfg.n_heads}")
print(f"Head size: {model.cfg.d_head}")
print(f"Vocabulary size: {model.cfg.d_vocab}")
"""

TEXT_BLOCK = """
prompt = "I am hungry and want to"
output = model.generate(prompt, num=10)
print(output)
"""

STREAMS = """
residual_stream = model.get_residual_stream("I am hungry")
print(residual_stream.shape)

residual_stream_decoder = model.get_residual_stream_decoder("I am hungry")
print(residual_stream_decoder.shape)
"""

MAPS = """
from graftwork import Model

model = Model("facebook/opt-125m")

embedding = model["embed"]
unembed = model["unembed"]
ln_final = model["ln_final"]

layer_0 = model.layers[0]
layer_1 = model.layers[1]

attn_weights_q = layer_0["attn.W_Q"]
attn_weights_k = layer_0["attn.W_K"]
attn_weights_v = layer_0["attn.W_V"]
attn_weights_o = layer_0["attn.W_O"]

mlp_in_weights = layer_0["mlp.W_in"]
mlp_out_weights = layer_0["mlp.W_out"]

attn_ln = layer_0["attn.ln_in"]
mlp_ln = layer_0["mlp.ln_in"]

import torch

model["embed.W_E"][1000] = torch.randn_like(model["embed.W_E"][1000])

layer_0["attn.W_Q"][:, :10] = 0

print(f"Model has {len(model.layers)} layers")
print(f"Hidden size: {model.cfg.d_model}")
print(f"Number of attention heads: {model.cfg.n_heads}")

if "attn.b_Q" in layer_0:
    attn_bias_q = layer_0["attn.b_Q"]
    layer_0["attn.b_Q"] += 0.1

for i, layer in enumerate(model.layers):
    print(f"Layer {i} attention output shape: {layer['attn.W_O'].shape}")
"""

CONFIGURATION = '''
config_string = """
pre_decoder: collect
post_decoder: collect
pre_attn: collect
attn_pre_out: offset, mask, replace, collect, unoffset
post_attn: collect
pre_mlp: collect
mlp_pre_out: offset, mask, replace, collect, unoffset
post_mlp: collect
"""
hook_config = HookConfig().from_string(config_string)
'''

CONFIGURED = """
model = Model("nickypro/tinyllama-15m", hook_config=config_string)
model.set_hook_config(config_string)
"""

REPLACED = """
from graftwork import Model
import torch

model = Model("facebook/opt-125m")

replacement_activation = torch.randn(model.cfg.d_mlp)
model.hooks.neuron_replace["layer_2_mlp_pre_out"].add_token(token_index=1, value=replacement_activation)

neuron_replace_hook = model.hooks.neuron_replace["layer_2_mlp_pre_out"]

print(neuron_replace_hook.param)

token_index = 3
new_replacement = torch.randn(model.cfg.d_mlp)
neuron_replace_hook.param[str(token_index)] = torch.nn.Parameter(new_replacement)

del neuron_replace_hook.param[str(token_index)]

existing_index = "1"
if existing_index in neuron_replace_hook.param:
    neuron_replace_hook.param[existing_index].data += 0.1

neuron_replace_hook.param.clear()

replacements = {
    "0": torch.randn(model.cfg.d_mlp),
    "2": torch.randn(model.cfg.d_mlp),
    "4": torch.randn(model.cfg.d_mlp)
}
for idx, replacement in replacements.items():
    neuron_replace_hook.param[idx] = torch.nn.Parameter(replacement)

neuron_replace_hook.max_tokens = max(
    neuron_replace_hook.max_tokens, max(int(idx) for idx in neuron_replace_hook.param.keys()) + 1)

neuron_replace_hook.reset()

neuron_replace_hook.restart()

for layer in range(model.cfg.n_layers):
    hook_name = f"layer_{layer}_mlp_pre_out"
    model.hooks.neuron_replace[hook_name].add_token(token_index=0, value=torch.randn(model.cfg.d_mlp))

model.hooks.reset_neuron_replace()
"""

CHANGED = """
if existing_index in neuron_replace_hook.param:
    neuron_replace_hook.param[existing_index].data += 0.1
"""

ADDED = """
from graftwork import Model
import torch

model = Model("facebook/opt-125m")

custom_activation = torch.randn(model.cfg.d_mlp)
model.hooks["mlp_pre_out"][2].add_token(token_index=0, value=custom_activation)

token_activations = torch.randn(5, model.cfg.d_mlp)
for i in range(5):
    model.hooks["mlp_pre_out"][2].add_token(token_index=i, value=token_activations[i])

model.hooks["mlp_pre_out"][2].reset()

all_token_activations = torch.randn(10, model.cfg.d_mlp)
model.hooks["mlp_pre_out"][2].set_actadd(all_token_activations)

model.hooks["mlp_pre_out"][2].restart()
"""

MASKED = """
neurons_to_keep = torch.ones(model.cfg.d_mlp)
neurons_to_keep[:10] = 0

model.hooks["mlp_pre_out"][2].delete_neurons(keep_indices=neurons_to_keep)

new_mask = torch.randint(0, 2, (model.cfg.d_mlp,)).float()
model.hooks["mlp_pre_out"][2]["mask"].set_mask(new_mask)

offset = torch.randn(model.cfg.d_mlp)
model.hooks["mlp_pre_out"][2]["mask"].set_offset(offset)
"""

OFFSET = """
offset = torch.randn(model.cfg.d_mlp)
model.hooks["mlp_pre_out"][2]["offset"].set_offset(offset)

all_layer_offsets = torch.randn(model.cfg.n_layers, model.cfg.d_mlp)
model.hooks["mlp_pre_out"].set_offsets(all_layer_offsets)
"""

COLLECTED = """
model.hooks.enable_collect_hooks(components=["mlp_pre_out", "attn_pre_out"], layers=[0, 1, 2])

_ = model.get_logits("Hello, world!")

mlp_activations = model.hooks["mlp_pre_out"]["collect"]
attn_activations = model.hooks["attn_pre_out"]["collect"]

model.hooks.disable_all_collect_hooks()
"""

DELETED = """
remove_indices = torch.randint(0, 2, (model.cfg.n_layers, model.cfg.d_mlp)).bool()
model.hooks.delete_mlp_neurons(remove_indices)

attn_remove_indices = torch.randint(
    0, 2, (model.cfg.n_layers, model.cfg.n_heads * model.cfg.d_head)).bool()
model.hooks.delete_attn_neurons(attn_remove_indices)
"""


# -------------------------------------------------------------------- the models

ROWS, LAYERS, WIDTH, MLP, HEADS = 1100, 3, 32, 48, 4
_DECODER: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8}
#: Name → class of transformers, its options, where the layers are, modules whose inputs are the neurons
#: and the heads.
MODELS: dict[str, tuple[str, dict[str, Any], str, str, str]] = {
    "pythia": (
        "GPTNeoXForCausalLM",
        _DECODER,
        "gpt_neox.layers",
        "mlp.dense_4h_to_h",
        "attention.dense",
    ),
    "opt": (
        "OPTForCausalLM",
        {
            "vocab_size": ROWS,
            "hidden_size": WIDTH,
            "ffn_dim": MLP,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": WIDTH,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        "model.decoder.layers",
        "fc2",
        "self_attn.out_proj",
    ),
    "llama": ("LlamaForCausalLM", _GROUPED, "model.layers", "mlp.down_proj", "self_attn.o_proj"),
    "mistral": (
        "MistralForCausalLM",
        {**_GROUPED, "sliding_window": 8},
        "model.layers",
        "mlp.down_proj",
        "self_attn.o_proj",
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": ROWS,
            "n_positions": 64,
            "n_embd": WIDTH,
            "n_inner": MLP,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "transformer.h",
        "mlp.c_proj",
        "attn.c_proj",
    ),
    "gemma": ("GemmaForCausalLM", _GEMMA, "model.layers", "mlp.down_proj", "self_attn.o_proj"),
    "gemma2": (
        "Gemma2ForCausalLM",
        {**_GEMMA, "sliding_window": 8, "query_pre_attn_scalar": 8},
        "model.layers",
        "mlp.down_proj",
        "self_attn.o_proj",
    ),
    "roberta": (
        "RobertaForMaskedLM",
        {**_DECODER, "max_position_embeddings": 66, "type_vocab_size": 1},
        "roberta.encoder.layer",
        "output.dense",
        "attention.output.dense",
    ),
    "vit": (
        "ViTForImageClassification",
        {
            "hidden_size": WIDTH,
            "intermediate_size": MLP,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "image_size": 8,
            "patch_size": 4,
            "num_labels": 5,
        },
        "vit.layers",
        "mlp.fc2",
        "attention.o_proj",
    ),
}
# Galactica's are the classes of OPT with another activation function and without biases.
MODELS["galactica"] = (
    MODELS["opt"][0],
    {**MODELS["opt"][1], "activation_function": "gelu", "enable_bias": False},
    *MODELS["opt"][2:],
)
GENERATING = [name for name in MODELS if name not in ("roberta", "vit")]
TEXT = [name for name in MODELS if name != "vit"]
PIXELS = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)


def byte_tokenizer() -> Any:
    """A token for each byte."""
    level = tokenizers.pre_tokenizers.ByteLevel
    names = ["<pad>", "<s>", "</s>", "<unk>", *sorted(level.alphabet())]
    vocabulary = {name: number for number, name in enumerate(names)}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    found.pre_tokenizer = level(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=found,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


class Plain:
    """The model in the folder without graftwork."""

    def __init__(self, name: str) -> None:
        kind, options, self.layers, self.neurons, self.heads = MODELS[name]
        cls = getattr(transformers, kind)
        torch.manual_seed(0)
        self.model = cls(cls.config_class(**options)).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.ndim > 1:  # so that everything shows
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
        self.tokenizer = None if name == "vit" else byte_tokenizer()

    def save(self) -> None:
        for folder in ("facebook/opt-125m", "nickypro/tinyllama-15m"):
            self.model.save_pretrained(folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)

    def given(self, text: str) -> torch.Tensor:
        """What a forward takes: ids [1, token] of the text, or pixels."""
        if self.tokenizer is None:
            return PIXELS
        found: torch.Tensor = self.tokenizer(text, return_tensors="pt")["input_ids"]
        return found

    def logits(self, text: str, *changes: tuple[int, str, Callable[[Any], Any]]) -> torch.Tensor:
        """With functions of what goes into modules of layers, [1, token, …]."""
        handles = []
        for layer, path, function in changes:

            def before(_: Any, args: Any, function: Any = function) -> Any:
                x = args[0]
                whole = x if x.ndim == 3 else x[None]
                return (function(whole).reshape(x.shape), *args[1:])

            child = self.model.get_submodule(f"{self.layers}.{layer}.{path}")
            handles.append(child.register_forward_pre_hook(before))
        try:
            with torch.no_grad():
                found: torch.Tensor = self.model(self.given(text)).logits
        finally:
            for handle in handles:
                handle.remove()
        return found

    def states(self, text: str) -> list[torch.Tensor]:
        """What goes into each layer, and what comes out of the last, [token, d_model]."""
        found: list[torch.Tensor] = []
        blocks = list(self.model.get_submodule(self.layers))
        handles = []

        def keep(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            if not found:
                found.append((args[0] if args else kwargs["hidden_states"])[0].clone())
            found.append((output[0] if isinstance(output, tuple) else output)[0].clone())

        for block in blocks:
            handles.append(block.register_forward_hook(keep, with_kwargs=True))
        try:
            self.logits(text)
        finally:
            for handle in handles:
                handle.remove()
        return found


@pytest.fixture(params=list(MODELS))
def plain(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Any) -> Plain:
    """Of every architecture."""
    monkeypatch.chdir(tmp_path)
    found = Plain(str(request.param))
    found.save()
    return found


only = pytest.mark.parametrize  # the architectures of a test: @only("plain", NAMES, indirect=True)


def run(code: str, **names: Any) -> dict[str, Any]:
    """Run a block as a program, or go on with the variables of others."""
    found = {"__name__": "document", "torch": torch, "HookConfig": HookConfig, **names}
    exec(compile(code, "<document>", "exec"), found)
    return found


def model_of(plain: Plain) -> Any:
    return run('from graftwork import Model\nmodel = Model("facebook/opt-125m")')["model"]


def logits(model: Any, plain: Plain, text: str = "Hello, world!") -> torch.Tensor:
    found: torch.Tensor = model.get_logits(PIXELS if plain.tokenizer is None else text)
    return found


def close(found: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------- the blocks


def test_loading_prints_the_sizes(plain: Plain, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(LOADING)
    said = dict(line.split(": ") for line in capsys.readouterr().out.splitlines() if ": " in line)
    heads = 8 if isinstance(plain.model.config.__dict__.get("head_dim"), int) else WIDTH // HEADS
    assert said["Number of layers"] == str(LAYERS)
    assert said["Model width"] == str(WIDTH)
    assert said["MLP width"] == str(MLP)
    assert said["Number of heads"] == str(HEADS)
    assert said["Head size"] == str(heads)
    if plain.tokenizer is not None:
        assert said["Vocabulary size"] == str(ROWS)
    kind = ImageModel if plain.tokenizer is None else LanguageModel
    assert type(names["model"]) is kind
    assert names["model"].load().dtype == torch.float16


@only("plain", GENERATING, indirect=True)
def test_text_goes_on_as_transformers_writes_it(plain: Plain) -> None:
    names = run(TEXT_BLOCK, model=model_of(plain))
    ids = plain.given(names["prompt"])
    with torch.no_grad():
        expected = plain.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=0,
        )
    assert names["output"] == plain.tokenizer.decode(expected[0], skip_special_tokens=True)
    assert names["output"].startswith(names["prompt"])


@only("plain", TEXT, indirect=True)
def test_streams(plain: Plain) -> None:
    names = run(STREAMS, model=model_of(plain))
    states = torch.stack(plain.states("I am hungry"))
    close(names["residual_stream_decoder"], states)
    assert states.shape == (LAYERS + 1, len("I am hungry"), WIDTH)
    assert names["residual_stream"].shape == (2 * LAYERS + 1, *states.shape[1:])
    close(names["residual_stream"][::2], states)


@only("plain", [name for name in TEXT if name != "roberta"], indirect=True)
def test_maps_read_and_change_weights(plain: Plain, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(MAPS)
    model, tree = names["model"], names["model"].load()
    assert names["embedding"] is tree.get_input_embeddings()
    assert names["unembed"] is tree.get_output_embeddings()
    table = plain.model.get_input_embeddings().weight
    changed = (names["embedding"].weight != table).any(1)
    assert changed.nonzero().flatten().tolist() == [1000]
    assert model["embed.W_E"].shape == (ROWS, WIDTH)
    assert bool((model.layers[0]["attn.W_Q"][:, :10] == 0).all())
    assert bool((model.layers[1]["attn.W_Q"] != 0).any())
    assert names["mlp_in_weights"].shape == (WIDTH, MLP)
    assert names["mlp_out_weights"].shape == (MLP, WIDTH)
    said = capsys.readouterr().out
    assert f"Model has {LAYERS} layers" in said and "Layer 2 attention output shape" in said
    # The forward has it.
    with model.trace(torch.tensor([[1000, 5]])):
        embedded = model.embed.save()
    close(
        embedded.value[0, 0] / embedded.value[0, 0].norm(), _unit(names["embedding"].weight[1000])
    )


def _unit(vector: torch.Tensor) -> torch.Tensor:
    return vector.detach() / vector.detach().norm()


def test_configurations(plain: Plain) -> None:
    names = run(CONFIGURATION)
    names = run(CONFIGURED, **names, Model=run("from graftwork import Model")["Model"])
    assert names["model"].hooks.config == names["hook_config"]
    assert names["hook_config"].at("mlp_pre_out", 1) == [
        "offset",
        "mask",
        "replace",
        "collect",
        "unoffset",
    ]
    close(logits(names["model"], plain), plain.logits("Hello, world!"))


def test_replacements(plain: Plain) -> None:
    before, last = REPLACED.split("neuron_replace_hook.reset()")
    names = run(before)
    hook, vectors = names["neuron_replace_hook"], names["replacements"]
    assert set(hook.param) == {"0", "2", "4"} and hook.max_tokens == 5

    def put(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        for token, vector in vectors.items():
            x[:, int(token)] = vector
        return x

    close(logits(names["model"], plain), plain.logits("Hello, world!", (2, plain.neurons, put)))
    names = run("neuron_replace_hook.reset()" + last, **names)
    assert len(hook.param) == 0 and hook.max_tokens == hook.tokens_seen == 0
    close(logits(names["model"], plain), plain.logits("Hello, world!"))


def test_changes_of_a_replacement_are_seen(plain: Plain) -> None:
    """Of its `data`, of which torch keeps no count."""
    first, rest = REPLACED.split("existing_index")[:2]
    names = run(first)
    close(logits(names["model"], plain), plain.logits("Hello, world!", *_first(names, 0.0, plain)))
    names = run('existing_index = "1"\n' + CHANGED, **names)
    close(logits(names["model"], plain), plain.logits("Hello, world!", *_first(names, 0.1, plain)))
    assert '= "1"' in rest


def _first(names: dict[str, Any], more: float, plain: Plain) -> list[Any]:
    vector = names["replacement_activation"] + more
    return [
        (2, plain.neurons, lambda x: torch.cat([x[:, :1], vector.expand(1, 1, -1), x[:, 2:]], 1))
    ]


def test_additions(plain: Plain) -> None:
    before, last = ADDED.split('model.hooks["mlp_pre_out"][2].reset()')
    names = run(before)
    given = names["token_activations"].clone()
    given[0] += names["custom_activation"]

    def add(vectors: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        def function(x: torch.Tensor) -> torch.Tensor:
            count = min(x.shape[1], len(vectors))
            return torch.cat([x[:, :count] + vectors[:count], x[:, count:]], 1)

        return function

    close(
        logits(names["model"], plain), plain.logits("Hello, world!", (2, plain.neurons, add(given)))
    )
    names = run('model.hooks["mlp_pre_out"][2].reset()' + last, **names)
    given = names["all_token_activations"]
    close(
        logits(names["model"], plain), plain.logits("Hello, world!", (2, plain.neurons, add(given)))
    )


def test_masks(plain: Plain) -> None:
    deleted, last = MASKED.split("new_mask =")
    names = run(deleted, model=model_of(plain))
    kept = names["neurons_to_keep"]
    change = (2, plain.neurons, lambda x: x * kept)
    close(logits(names["model"], plain), plain.logits("Hello, world!", change))
    names = run("new_mask =" + last, **names)
    mask, offset = names["new_mask"], names["offset"]
    change = (2, plain.neurons, lambda x: x * mask + offset * (1 - mask))
    close(logits(names["model"], plain), plain.logits("Hello, world!", change))


def test_offsets_are_taken_back(plain: Plain) -> None:
    names = run(OFFSET, model=model_of(plain))
    model, offsets = names["model"], names["all_layer_offsets"]
    close(logits(model, plain), plain.logits("Hello, world!"))
    model.hooks["mlp_pre_out"][1]["mask"].set_mask(torch.zeros(MLP))
    change = (1, plain.neurons, lambda x: -offsets[1].expand_as(x))
    close(logits(model, plain), plain.logits("Hello, world!", change))


@only("plain", TEXT, indirect=True)
def test_collections(plain: Plain) -> None:
    names = run(COLLECTED, model=model_of(plain))
    kept: dict[tuple[str, int], torch.Tensor] = {}

    def keep(path: str, layer: int) -> tuple[int, str, Callable[[Any], Any]]:
        def function(x: torch.Tensor) -> torch.Tensor:
            kept[path, layer] = x.clone()
            return x

        return layer, path, function

    plain.logits(
        "Hello, world!",
        *(keep(path, layer) for path in (plain.neurons, plain.heads) for layer in range(LAYERS)),
    )
    neurons = torch.stack([kept[plain.neurons, layer] for layer in range(LAYERS)])
    heads = torch.stack([kept[plain.heads, layer] for layer in range(LAYERS)])
    close(names["mlp_activations"], neurons)
    close(names["attn_activations"], heads.unflatten(-1, (HEADS, -1)))
    # Nothing is kept any more.
    names["model"].get_logits("Another prompt")
    close(names["model"].hooks["mlp_pre_out"]["collect"], neurons)


def test_deletions(plain: Plain) -> None:
    names = run(DELETED, model=model_of(plain))
    neurons, heads = names["remove_indices"], names["attn_remove_indices"]
    changes: list[Any] = []
    for layer in range(LAYERS):
        changes.append((layer, plain.neurons, lambda x, m=~neurons[layer]: x * m))
        changes.append((layer, plain.heads, lambda x, m=~heads[layer]: x * m))
    close(logits(names["model"], plain), plain.logits("Hello, world!", *changes))
    # What goes later goes beside it.
    names = run(DELETED, model=names["model"])
    neurons, heads = neurons | names["remove_indices"], heads | names["attn_remove_indices"]
    changes = []
    for layer in range(LAYERS):
        changes.append((layer, plain.neurons, lambda x, m=~neurons[layer]: x * m))
        changes.append((layer, plain.heads, lambda x, m=~heads[layer]: x * m))
    close(logits(names["model"], plain), plain.logits("Hello, world!", *changes))
    names["model"].hooks.reset()
    close(logits(names["model"], plain), plain.logits("Hello, world!"))
