"""Names that hold on every architecture, against plain hooks and attention written by hand."""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from graftwork import LanguageModel, Model
from graftwork.tracing.errors import (
    BlockError,
    GraftworkError,
    InputError,
    OperationError,
    UnavailableNameError,
)

# -------------------------------------------------------------------- models


def _variant(kind: str, **options: Any) -> Any:
    """A tiny model of an option that the shared ones do not have."""
    general = {
        "vocab_size": 61,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = getattr(transformers, f"{kind}Config")(**{**general, **options})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


_LLAMA = {"intermediate_size": 24, "num_key_value_heads": 2, "pad_token_id": None}
VARIANTS: dict[str, Callable[[], Any]] = {
    "falcon_groups": lambda: _variant(
        "Falcon", new_decoder_architecture=True, num_kv_heads=2, alibi=False
    ),
    "falcon_one_norm": lambda: _variant(
        "Falcon",
        new_decoder_architecture=True,
        num_kv_heads=2,
        alibi=False,
        num_ln_in_parallel_attn=1,
    ),
    "falcon_in_turn": lambda: _variant(
        "Falcon", parallel_attn=False, multi_query=False, alibi=False, bias=True
    ),
    "falcon_alibi_in_turn": lambda: _variant(
        "Falcon", parallel_attn=False, multi_query=False, alibi=True, bias=True
    ),
    "falcon_alibi_eager": lambda: _variant(
        "Falcon", multi_query=False, alibi=True, attn_implementation="eager"
    ),
    "neox_in_turn": lambda: _variant("GPTNeoX", intermediate_size=24, use_parallel_residual=False),
    "llama_biases": lambda: _variant("Llama", **_LLAMA, attention_bias=True, mlp_bias=True),
    "gemma2_caps": lambda: _variant(
        "Gemma2",
        **_LLAMA,
        head_dim=8,
        sliding_window=4,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "olmo3": lambda: _variant("Olmo3", **_LLAMA, sliding_window=4),
    "smollm3": lambda: _variant("SmolLM3", **_LLAMA),
    "qwen2_window": lambda: _variant(
        "Qwen2", **_LLAMA, use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
    "falcon_mamba": lambda: _variant("FalconMamba", state_size=4, pad_token_id=None),
}
SHARED = (
    "gpt2 gpt_neo gptj gpt_neox opt llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 falcon "
    "falcon_alibi bloom olmo2 mixtral gpt_oss mamba bert roberta"
).split()
EVERY = [*SHARED, *VARIANTS]
ATTENDING = [name for name in EVERY if "mamba" not in name]


class Zoo:
    """The tiny models of this file, whose gains, biases and sinks are random too."""

    def __init__(self, tools: SimpleNamespace) -> None:
        self.tools = tools
        self.model: Callable[[str], Any] = functools.cache(lambda name: LanguageModel(self(name)))
        self.eager: Callable[[str], Any] = functools.cache(self._eager)
        self._modules: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:
        if name not in self._modules:
            self._modules[name] = self.fresh(name)
        return self._modules[name]

    def fresh(self, name: str) -> Any:
        module = VARIANTS[name]() if name in VARIANTS else copy.deepcopy(self.tools.module(name))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for path, parameter in module.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim > 1 and "A_log" not in path:
                    parameter.copy_(noise * 0.3)
                elif parameter.ndim == 1:
                    parameter.add_(noise * 0.2)
        return module

    def _eager(self, name: str) -> Any:
        """The same weights in a model that transformers runs with eager attention everywhere."""
        module = self(name)
        if name in ("falcon_alibi", "falcon_alibi_in_turn"):
            return module  # transformers' eager attention computes something else here
        config = copy.deepcopy(module.config)
        config._attn_implementation = "eager"
        other = type(module)._from_config(config, attn_implementation="eager").eval()
        other.load_state_dict(module.state_dict())
        return other

    def plain(self, name: str, ids: Any, edits: Any = None) -> Plain:
        return Plain(self.eager(name), TABLE[name], edits).run(ids)


@pytest.fixture(scope="module")
def zoo(tools: SimpleNamespace) -> Zoo:
    return Zoo(tools)


# -------------------------------------------------------------------- where things are, by hand


@dataclasses.dataclass(frozen=True)
class Places:
    """Modules of one architecture; paths below the block, except for those of the model.

    Attributes:
        qkv: one path for three fused projections, or three paths.
        split: how a fused projection is laid out: "thirds", "heads", "groups" or "rows".
        attn_out, mlp_out: modules whose output is added to the residual stream.
        mid: "parallel", or the module whose input is resid_mid, or "post:…": whose output it is.
    """

    blocks: str
    embed: str
    final: str | None
    core: str
    qkv: tuple[str, ...]
    out: str
    attn_out: str
    mid: str
    mlp_in: str
    up: str | None
    down: str | None
    mlp_out: str
    pos: str | None = None
    split: str = ""
    norms: tuple[tuple[str, str], ...] = ()
    head: str = "lm_head"
    kind: str = "RMS"
    offset: float = 0.0
    gate: str | None = None
    router: str | None = None
    experts: str | None = None


def _llama(**changes: Any) -> Places:
    own: dict[str, Any] = {
        "blocks": "model.layers",
        "embed": "model.embed_tokens",
        "final": "model.norm",
        "core": "self_attn",
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out": "self_attn.o_proj",
        "attn_out": "self_attn",
        "mid": "post_attention_layernorm",
        "mlp_in": "mlp",
        "up": "mlp.up_proj",
        "gate": "mlp.gate_proj",
        "down": "mlp.down_proj",
        "mlp_out": "mlp",
        "norms": (("ln1", "input_layernorm"), ("ln2", "post_attention_layernorm")),
    }
    return Places(**{**own, **changes})


def _gpt(**changes: Any) -> Places:
    own: dict[str, Any] = {
        "blocks": "transformer.h",
        "embed": "transformer.wte",
        "pos": "transformer.wpe",
        "final": "transformer.ln_f",
        "core": "attn",
        "qkv": ("attn.c_attn",),
        "split": "thirds",
        "out": "attn.c_proj",
        "attn_out": "attn",
        "mid": "ln_2",
        "mlp_in": "mlp",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
        "mlp_out": "mlp",
        "norms": (("ln1", "ln_1"), ("ln2", "ln_2")),
        "kind": "LN",
    }
    return Places(**{**own, **changes})


_GEMMA2 = _llama(
    attn_out="post_attention_layernorm",
    mid="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
    norms=(
        ("ln1", "input_layernorm"),
        ("ln1_post", "post_attention_layernorm"),
        ("ln2", "pre_feedforward_layernorm"),
        ("ln2_post", "post_feedforward_layernorm"),
    ),
    offset=1.0,
)
_OLMO = _llama(
    attn_out="post_attention_layernorm",
    mid="mlp",
    mlp_out="post_feedforward_layernorm",
    norms=(
        ("ln1_post", "post_attention_layernorm"),
        ("ln2_post", "post_feedforward_layernorm"),
    ),
)
_FALCON = _gpt(
    embed="transformer.word_embeddings",
    pos=None,
    core="self_attention",
    qkv=("self_attention.query_key_value",),
    split="groups",
    out="self_attention.dense",
    attn_out="self_attention",
    mid="parallel",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    norms=(("ln1", "input_layernorm"),),
)
_IN_TURN = {
    "mid": "post_attention_layernorm",
    "norms": (("ln1", "input_layernorm"), ("ln2", "post_attention_layernorm")),
}
_NEOX = _gpt(
    blocks="gpt_neox.layers",
    embed="gpt_neox.embed_in",
    pos=None,
    final="gpt_neox.final_layer_norm",
    core="attention",
    qkv=("attention.query_key_value",),
    split="heads",
    out="attention.dense",
    attn_out="attention",
    mid="parallel",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    norms=(("ln1", "input_layernorm"), ("ln2", "post_attention_layernorm")),
)


def _bert(base: str, head: str) -> Places:
    return Places(
        blocks=f"{base}.encoder.layer",
        embed=f"{base}.embeddings.word_embeddings",
        pos=f"{base}.embeddings.position_embeddings",
        final=None,
        core="attention.self",
        qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
        out="attention.output.dense",
        attn_out="attention.output.dense",
        mid="post:attention.output",
        mlp_in="intermediate.dense",
        up="intermediate.dense",
        down="output.dense",
        mlp_out="output.dense",
        norms=(("ln1_post", "attention.output.LayerNorm"), ("ln2_post", "output.LayerNorm")),
        kind="LN",
        head=head,
    )


_ATTN = "q_proj k_proj v_proj".split()
TABLE: dict[str, Places] = {
    "gpt2": _gpt(),
    "gpt_neo": _gpt(
        core="attn.attention",
        qkv=tuple(f"attn.attention.{one}" for one in _ATTN),
        out="attn.attention.out_proj",
    ),
    "gptj": _gpt(
        pos=None,
        qkv=tuple(f"attn.{one}" for one in _ATTN),
        out="attn.out_proj",
        up="mlp.fc_in",
        down="mlp.fc_out",
        mid="parallel",
        norms=(("ln1", "ln_1"),),
    ),
    "gpt_neox": _NEOX,
    "neox_in_turn": dataclasses.replace(_NEOX, mid="post_attention_layernorm"),
    "opt": _llama(
        blocks="model.decoder.layers",
        embed="model.decoder.embed_tokens",
        pos="model.decoder.embed_positions",
        final="model.decoder.final_layer_norm",
        out="self_attn.out_proj",
        mid="final_layer_norm",
        mlp_in="fc1",
        up="fc1",
        gate=None,
        down="fc2",
        mlp_out="fc2",
        norms=(("ln1", "self_attn_layer_norm"), ("ln2", "final_layer_norm")),
        kind="LN",
    ),
    **dict.fromkeys(
        "llama mistral qwen2 qwen3 llama_biases smollm3 qwen2_window".split(), _llama()
    ),
    "gemma": _llama(offset=1.0),
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma2_caps"), _GEMMA2),
    "phi": _llama(
        final="model.final_layernorm",
        out="self_attn.dense",
        mid="parallel",
        up="mlp.fc1",
        gate=None,
        down="mlp.fc2",
        norms=(("ln1", "input_layernorm"),),
        kind="LN",
    ),
    "phi3": _llama(qkv=("self_attn.qkv_proj",), split="rows", up=None, gate="mlp.gate_up_proj"),
    **dict.fromkeys(("falcon", "falcon_one_norm"), _FALCON),
    **dict.fromkeys(
        ("falcon_alibi", "falcon_alibi_eager"), dataclasses.replace(_FALCON, split="heads")
    ),
    "falcon_groups": dataclasses.replace(_FALCON, norms=(("ln1", "ln_attn"), ("ln2", "ln_mlp"))),
    "falcon_in_turn": dataclasses.replace(_FALCON, split="heads", **_IN_TURN),  # type: ignore[arg-type]
    "falcon_alibi_in_turn": dataclasses.replace(_FALCON, split="heads", **_IN_TURN),  # type: ignore[arg-type]
    "bloom": dataclasses.replace(
        _FALCON,
        embed="transformer.word_embeddings_layernorm",
        split="heads",
        attn_out="self_attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        **_IN_TURN,  # type: ignore[arg-type]
    ),
    **dict.fromkeys(("olmo2", "olmo3"), _OLMO),
    "mixtral": _llama(router="mlp.gate", experts="mlp.experts", up=None, gate=None, down=None),
    "gpt_oss": _llama(router="mlp.router", experts="mlp.experts", up=None, gate=None, down=None),
    "bert": _bert("bert", "cls.predictions.decoder"),
    "roberta": _bert("roberta", "lm_head.decoder"),
}
#: Beside the parts of parallel blocks and mixtures of experts, what the issue of a file is not to have.
NOT_HELD = {
    "falcon_groups": {"k", "v"},
    "falcon_one_norm": {"k", "v"},
}

Change = Callable[[torch.Tensor], torch.Tensor]


class Plain(TorchFunctionMode):
    """One forward of an eager model, watched and edited from outside.

    Modules by torch's own hooks; scores and pattern by the softmax between the two matrix products
    that every eager attention makes, queries and keys by the first of them, values by the second.

    Args:
        edits: by (layer, name), new values from old ones; -1 for the model's own names.

    Attributes:
        seen: what was at each name before its edit.
        logits: the result.
    """

    def __init__(
        self,
        module: Any,
        places: Places,
        edits: dict[tuple[int, str], Change] | None = None,
    ) -> None:
        super().__init__()
        self.module, self.places, self.edits = module, places, edits or {}
        self.seen: dict[tuple[int, str], torch.Tensor] = {}
        self.kept: dict[tuple[int, str], torch.Tensor] = {}
        self.layer: int | None = None
        self.products = 0
        self.handles: list[RemovableHandle] = []
        text = module.config
        blocks = module.get_submodule(places.blocks)
        self.heads: int = text.num_attention_heads
        out = blocks[0].get_submodule(places.out)
        conv = type(out).__name__ == "Conv1D"
        width = out.weight.shape[0] if conv else out.weight.shape[1]
        self.d_head = width // self.heads
        shared = getattr(text, "num_key_value_heads", None)
        if getattr(text, "model_type", "") == "falcon":
            one = 1 if text.multi_query else text.num_attention_heads
            shared = text.num_kv_heads if text.new_decoder_architecture else one
        self.shared: int = shared or self.heads
        self.blocks = blocks

    # ------------------------------------------------------------ values

    def at(self, layer: int, name: str, value: torch.Tensor) -> torch.Tensor:
        self.seen.setdefault((layer, name), value.detach().clone())
        edit = self.edits.get((layer, name))
        return value if edit is None else edit(value.clone())

    def edited(self, layer: int, *names: str) -> bool:
        return any((layer, name) in self.edits for name in names)

    def before(self, module: Any, function: Callable[[torch.Tensor], Any]) -> None:
        def hook(_: Any, args: Any, kwargs: Any) -> Any:
            args, kwargs = list(args), dict(kwargs)
            if args:
                args[0] = function(args[0])
            else:
                name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
                kwargs[name] = function(kwargs[name])
            return tuple(args), kwargs

        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: Any, function: Callable[[torch.Tensor], Any], part: Any = 0) -> None:
        def hook(_: Any, args: Any, output: Any) -> Any:
            if isinstance(output, torch.Tensor):
                return function(output)
            if isinstance(output, tuple):
                return (*output[:part], function(output[part]), *output[part + 1 :])
            output[part] = function(output[part])
            return output

        self.handles.append(module.register_forward_hook(hook))

    def wide(self, value: torch.Tensor) -> torch.Tensor:
        """[batch, token, …] of a value whose batch and token may be in one axis."""
        batch, token = self.shape
        return value.reshape(batch, token, *value.shape[1:]) if value.ndim == 2 else value

    def place(self, layer: int, *names: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def function(value: torch.Tensor) -> torch.Tensor:
            flat = value.ndim == 2
            value = self.wide(value)
            for name in names:
                value = self.at(layer, name, value)
            return value.flatten(0, 1) if flat else value

        return function

    # ------------------------------------------------------------ one forward

    def run(self, *args: Any, **kwargs: Any) -> Plain:
        given = args[0] if args else kwargs["input_ids"]
        self.shape = tuple(given.shape)
        for layer, block in enumerate(self.blocks):
            self._watch(layer, block)
        places, module = self.places, self.module
        self.after(module.get_submodule(places.embed), self.place(-1, "embed"))
        if places.pos:
            self.after(module.get_submodule(places.pos), self.place(-1, "pos_embed"))
        if places.final:
            self._watch_norm(-1, "ln_final", module.get_submodule(places.final))
            self.after(module.get_submodule(places.final), self.place(-1, "ln_final"))
        head = module.get_submodule(places.head)
        self.before(head, self.place(-1, "unembed_in"))
        self.after(head, self.place(-1, "unembed_out"))
        try:
            with torch.no_grad(), self:
                logits = module(*args, **kwargs).logits
        finally:
            for handle in self.handles:
                handle.remove()
        self.logits = self.at(-1, "logits", logits)
        return self

    def _watch(self, layer: int, block: Any) -> None:
        places = self.places
        sub = block.get_submodule

        def enter(value: torch.Tensor) -> torch.Tensor:
            self.layer, self.products = layer, 0
            return value

        def leave(value: torch.Tensor) -> torch.Tensor:
            self.layer = None
            return value

        self.before(block, self.place(layer, "resid_pre"))
        for name, path in places.norms:
            self._watch_norm(layer, name, sub(path))
        self.before(sub(places.core), self.place(layer, "attn_in"))
        self.before(sub(places.core), enter)
        self.after(sub(places.core), leave)
        self._watch_projections(layer, block)
        out = sub(places.out)

        def result(value: torch.Tensor) -> torch.Tensor:
            weight = out.weight if type(out).__name__ == "Conv1D" else out.weight.T
            z = self.kept[layer, "z"]
            each = weight.reshape(self.heads, self.d_head, -1)
            by_head = (z[..., None] * each).sum(-2)
            new = self.at(layer, "head_out", by_head)
            return self.at(layer, "o_out", value + (new - by_head).sum(2))

        def keep_z(value: torch.Tensor) -> torch.Tensor:
            self.layer = None  # the attention is over; what follows is no product of it
            z = self.at(layer, "z", value.unflatten(-1, (self.heads, self.d_head)))
            self.kept[layer, "z"] = z
            return z.flatten(-2)

        self.before(out, keep_z)
        self.after(out, result)
        self.after(sub(places.attn_out), self.place(layer, "attn_out"))
        self._watch_mlp(layer, block)
        if places.mid.startswith("post:"):
            self.after(sub(places.mid[5:]), self.place(layer, "resid_mid"))
        elif places.mid != "parallel":

            def middle(value: torch.Tensor) -> torch.Tensor:
                old = self.wide(value)
                new = self.at(layer, "resid_mid", old)
                self.kept[layer, "moved"] = new - old
                return new.reshape(value.shape)

            # The first of the hooks there: what a norm takes is resid_mid with its edit.
            self.before(sub(places.mid), middle)
            self.handles[-1] = _first(sub(places.mid), self.handles[-1])
            self.after(block, lambda value: value + self.kept[layer, "moved"])
        self.after(block, self.place(layer, "resid_post"))

    def _watch_norm(self, layer: int, name: str, norm: Any) -> None:
        places = self.places

        def enter(value: torch.Tensor) -> torch.Tensor:
            value = self.place(layer, f"{name}_in")(value)
            self.kept[layer, name] = self.wide(value)
            return value

        def leave(value: torch.Tensor) -> torch.Tensor:
            shape, x = value.shape, self.kept[layer, name]
            if places.kind == "LN":
                x = x - x.mean(-1, keepdim=True)
            eps = next(
                getattr(norm, one)
                for one in ("eps", "variance_epsilon", "epsilon")
                if hasattr(norm, one)
            )
            scale = torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps)
            gain, bias = norm.weight + places.offset, getattr(norm, "bias", None)
            new = self.at(layer, f"{name}_scale", scale)
            normalized = self.at(layer, f"{name}_normalized", x / new)
            if self.edited(layer, f"{name}_scale", f"{name}_normalized"):
                value = normalized * gain
                value = value if bias is None else value + bias
            value = value.reshape(shape)
            return value if layer < 0 else self.place(layer, f"{name}_out")(value)

        self.before(norm, enter)
        self.after(norm, leave)

    def _split(self, name: str, fused: torch.Tensor) -> torch.Tensor:
        """Query, key or value heads of a fused projection's output; a view."""
        h, k, d, kind = self.heads, self.shared, self.d_head, self.places.split
        index, lead = "qkv".index(name), fused.shape[:-1]
        if kind == "thirds":
            return fused[..., index * h * d : (index + 1) * h * d].view(*lead, h, d)
        if kind == "heads":
            return fused.view(*lead, h, 3 * d)[..., index * d : (index + 1) * d]
        if kind == "rows":
            start = (0, h * d, (h + k) * d)[index]
            count = (h, k, k)[index]
            return fused[..., start : start + count * d].view(*lead, count, d)
        raise AssertionError(kind)

    def _watch_projections(self, layer: int, block: Any) -> None:
        places = self.places
        norm = dict(places.norms).get("ln1")

        def projected(name: str, module: Any, value: torch.Tensor) -> None:
            """Edit the part `name` of a projection's output, [batch, token, head, d_head]."""
            heads = self._heads_of(name, value)
            if norm is not None:
                resid = self.kept[layer, "ln1"]
                by_head = resid[:, :, None].expand(-1, -1, heads.shape[2], -1)
                new = self.at(layer, f"{name}_input", by_head)
                if self.edited(layer, f"{name}_input"):
                    self.layer = None
                    other = block.get_submodule(norm)
                    made = type(other).forward(other, new)
                    made = type(module).forward(module, made)
                    self.layer = layer
                    for one in range(heads.shape[2]):
                        heads[:, :, one] = self._heads_of(name, made[:, :, one])[:, :, one]
            new = self.at(layer, f"{name}_pre", heads)
            self._put_heads(name, value, new)

        def separate(name: str, module: Any) -> Any:
            def function(value: torch.Tensor) -> torch.Tensor:
                value = value.clone()
                projected(name, module, value)
                return value

            return function

        def fused(module: Any) -> Any:
            def function(value: torch.Tensor) -> torch.Tensor:
                value = value.clone()
                for name in "qkv":
                    projected(name, module, value)
                return value

            return function

        if len(places.qkv) == 3:
            for name, path in zip("qkv", places.qkv, strict=True):
                module = block.get_submodule(path)
                self.after(module, separate(name, module))
        else:
            module = block.get_submodule(places.qkv[0])
            self.after(module, fused(module))

    def _heads_of(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if len(self.places.qkv) == 3:
            return value.unflatten(-1, (-1, self.d_head)).clone()
        if self.places.split == "groups":
            each = self.heads // self.shared
            groups = value.view(*value.shape[:-1], self.shared, each + 2, self.d_head)
            if name == "q":
                parts = [groups[..., g, e, :] for g in range(self.shared) for e in range(each)]
                return torch.stack(parts, -2)
            return groups[..., each if name == "k" else each + 1, :].clone()
        return self._split(name, value).clone()

    def _put_heads(self, name: str, value: torch.Tensor, new: torch.Tensor) -> None:
        if len(self.places.qkv) == 3:
            value.copy_(new.flatten(-2))
        elif self.places.split == "groups":
            each = self.heads // self.shared
            groups = value.view(*value.shape[:-1], self.shared, each + 2, self.d_head)
            if name == "q":
                for one in range(self.heads):
                    groups[..., one // each, one % each, :] = new[..., one, :]
            else:
                groups[..., each if name == "k" else each + 1, :] = new
        else:
            self._split(name, value).copy_(new)

    def _watch_mlp(self, layer: int, block: Any) -> None:
        places, sub = self.places, block.get_submodule
        self.before(sub(places.mlp_in), self.place(layer, "mlp_in"))
        if places.experts is not None:
            self._watch_experts(layer, block)
        elif places.up is None:  # gate and up-projection in one module

            def halves(value: torch.Tensor) -> torch.Tensor:
                gate, up = value.chunk(2, -1)
                pre, other = self.at(layer, "mlp_pre", gate), self.at(layer, "mlp_up", up)
                return torch.cat([pre, other], -1)

            assert places.gate is not None
            self.after(sub(places.gate), halves)
        else:
            gate = places.gate
            self.after(sub(gate or places.up), self.place(layer, "mlp_pre"))
            if gate is not None:
                self.after(sub(places.up), self.place(layer, "mlp_up"))
        if places.down is not None:
            self.before(sub(places.down), self.place(layer, "mlp_post"))
        self.after(sub(places.mlp_out), self.place(layer, "mlp_out"))

    def _watch_experts(self, layer: int, block: Any) -> None:
        places, sub = self.places, block.get_submodule
        assert places.router is not None and places.experts is not None
        router, experts = sub(places.router), sub(places.experts)

        def route(_: Any, args: Any, output: Any) -> Any:
            """The router, written out: transformers' own takes no other logits."""
            logits = self.at(layer, "router_logits", self.wide(output[0])).flatten(0, 1)
            if "Mixtral" in type(router).__name__:
                weights, indices = torch.topk(torch.softmax(logits, -1), 2, -1)
                weights = weights / weights.sum(-1, keepdim=True)
            else:
                values, indices = torch.topk(logits, 2, -1)
                weights = torch.softmax(values, -1)
            weights = self.at(layer, "expert_weights", self.wide(weights)).flatten(0, 1)
            indices = self.at(layer, "expert_indices", self.wide(indices)).flatten(0, 1)
            self.kept[layer, "chosen"], self.kept[layer, "shares"] = indices, weights
            return logits, weights, indices

        def enter(value: torch.Tensor) -> torch.Tensor:
            value = self.place(layer, "experts_in")(value)
            self.kept[layer, "experts_in"] = value
            return value

        def leave(value: torch.Tensor) -> torch.Tensor:
            parts = expert_by_hand(
                experts,
                self.kept[layer, "experts_in"],
                self.kept[layer, "chosen"],
                self.kept[layer, "shares"],
            )
            by_choice = parts.unflatten(0, self.shape)
            new = self.at(layer, "expert_out", by_choice)
            moved = (new - by_choice).sum(2).flatten(0, 1)
            return self.place(layer, "experts_out")(value + moved)

        self.handles.append(router.register_forward_hook(route))
        self.before(experts, enter)
        self.after(experts, leave)

    # ------------------------------------------------------------ inside attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, layer = kwargs or {}, self.layer
        name = getattr(func, "__name__", "")
        if layer is None:
            return func(*args, **kwargs)
        if name == "baddbmm":  # Bloom: [(batch head), token, d_head], [(batch head), d_head, token]
            kwargs["batch1"] = self._flat(layer, "q", kwargs["batch1"])
            kwargs["batch2"] = self._flat(layer, "k", kwargs["batch2"].mT).mT
        elif name == "scaled_dot_product_attention":
            q, k, v = (
                self._rows(layer, one, part) for one, part in zip("qkv", args[:3], strict=True)
            )
            args = (q, k, v, *args[3:])
        elif name == "bmm":
            args = (args[0], self._flat(layer, "v", args[1]))
        elif name in ("matmul", "__matmul__") and args[0].ndim == 4:
            self.products += 1
            if self.products == 1:
                args = (self._rows(layer, "q", args[0]), self._rows(layer, "k", args[1].mT).mT)
            elif self.products == 2:
                args = (args[0], self._rows(layer, "v", args[1]))
        elif name == "cat" and self.products == 1:  # GPT-OSS adds the scores of its sinks
            parts = list(args[0])
            parts[0] = self.at(layer, "scores", parts[0])
            args = (parts, *args[1:])
        elif name == "softmax":
            sinks = (layer, "scores") in self.seen
            if not sinks:
                args = (self.at(layer, "scores", args[0]), *args[1:])
            result = func(*args, **kwargs)
            if not sinks:
                return self.at(layer, "pattern", result)
            return torch.cat([self.at(layer, "pattern", result[..., :-1]), result[..., -1:]], -1)
        return func(*args, **kwargs)

    def _rows(self, layer: int, name: str, value: torch.Tensor) -> torch.Tensor:
        """[batch, head, token, d_head], where keys and values are repeated for their queries."""
        count = self.heads if name == "q" else self.shared
        times = value.shape[1] // count
        new = self.at(layer, name, value[:, ::times].transpose(1, 2)).transpose(1, 2)
        return new.repeat_interleave(times, 1)

    def _flat(self, layer: int, name: str, value: torch.Tensor) -> torch.Tensor:
        rows = value.unflatten(0, (-1, self.heads)).transpose(1, 2)
        return self.at(layer, name, rows).transpose(1, 2).flatten(0, 1)


def _first(module: Any, handle: RemovableHandle) -> RemovableHandle:
    """The hook of a handle, as the first of its module."""
    module._forward_pre_hooks.move_to_end(handle.id, last=False)
    return handle


def expert_by_hand(experts: Any, x: Any, chosen: Any, shares: Any) -> torch.Tensor:
    """What each chosen expert adds: [(batch token), choice, d_model]."""
    rows = []
    for row in range(x.shape[0]):
        each = []
        for expert, share in zip(chosen[row].tolist(), shares[row], strict=True):
            if "Mixtral" in type(experts).__name__:
                both = experts.gate_up_proj[expert] @ x[row]
                gate, up = both[: len(both) // 2], both[len(both) // 2 :]
                out = experts.down_proj[expert] @ (gate * torch.sigmoid(gate) * up)
            else:
                both = x[row] @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
                gate, up = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
                hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
                out = hidden @ experts.down_proj[expert] + experts.down_proj_bias[expert]
            each.append(out * share)
        rows.append(torch.stack(each))
    return torch.stack(rows)


def same(found: Any, expected: Any, what: Any = "", atol: float = 2e-5) -> None:
    found, expected = getattr(found, "value", found).detach(), expected.detach()
    # Masked scores are "very low" in one way or another.
    found, expected = found.clamp_min(-1e9), expected.clamp_min(-1e9)
    torch.testing.assert_close(
        found, expected, rtol=1e-4, atol=atol, msg=lambda text: f"{what}: {text}"
    )


def names_at(model: Any, layer: int) -> list[str]:
    if layer >= 0:
        return list(model.layers[layer].support().names)
    places = model._model_names().model_places()
    # `ln_final` is what comes out of that norm.
    return [n for n, p in places.items() if not hasattr(p, "reason") and n != "ln_final_out"]


def target(model: Any, layer: int) -> Any:
    return model if layer < 0 else model.layers[layer]


IDS = torch.tensor([[5, 17, 3, 44, 29, 8, 12]])
#: Kept for other libraries; each is one of the places above.
POINTS = ("pre_attn", "post_attn", "pre_mlp", "post_mlp")


# -------------------------------------------------------------------- reading


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENDING)
def test_every_name_of_every_layer_reads_as_plain_hooks_do(name: str, zoo: Zoo) -> None:
    model = zoo.model(name)
    expected = zoo.plain(name, IDS)
    boxes = {}
    with model.trace(IDS):
        for layer in (2, 0, -1, 1, len(model.layers) - 1):  # no order of the forward
            for one in reversed(names_at(model, layer)):
                boxes[layer, one] = getattr(target(model, layer), one).save()
    for key, box in boxes.items():
        if key[1] not in POINTS:
            same(box, expected.seen[key], (name, *key))
    if name in ("falcon_alibi", "falcon_alibi_in_turn"):
        assert not {"scores", "pattern"} & {one for _, one in boxes}
    held = {key for key in boxes if key[1] not in POINTS}
    lost = {key[1] for key in set(expected.seen) - held}
    assert lost == NOT_HELD.get(name, set())


@pytest.mark.slow
def test_the_places_of_other_libraries_are_those_that_they_name(zoo: Zoo) -> None:
    for name, (attn_in, attn, mlp_in, mlp) in {
        "gpt2": ("ln_1", "attn", "ln_2", "mlp"),
        "gpt_neox": (
            "input_layernorm",
            "attention",
            "post_attention_layernorm",
            "mlp.dense_4h_to_h",
        ),
        "opt": ("self_attn_layer_norm", "self_attn", "final_layer_norm", "fc2"),
        "llama": ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
        "gemma2": (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
        "roberta": (
            "attention",
            "attention.output.LayerNorm",
            "intermediate.dense",
            "output.LayerNorm",
        ),
    }.items():
        model, block = zoo.model(name), f"{TABLE[name].blocks}.1"
        seen = zoo.tools.plain(zoo(name), IDS)
        with model.trace(IDS):
            found = [getattr(model.layers[1], one).save() for one in POINTS]
        for one, box, (path, port) in zip(
            POINTS,
            found,
            ((attn_in, "input"), (attn, "output"), (mlp_in, "input"), (mlp, "output")),
            strict=True,
        ):
            value = seen[f"{block}.{path}", port]
            value = value[0] if isinstance(value, tuple) else value
            same(box, value.reshape(box.shape), (name, one))


# -------------------------------------------------------------------- writing


def noise(shape: Any, seed: int) -> torch.Tensor:
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed))


def _assign(owner: Any, name: str) -> None:
    setattr(owner, name, getattr(owner, name) * 1.5 + 0.1)


def _assigned(old: torch.Tensor) -> torch.Tensor:
    return old * 1.5 + 0.1


def _index(owner: Any, name: str) -> None:
    place = getattr(owner, name)
    place[:, 1:3] = noise(place[:, 1:3].shape, 3)


def _indexed(old: torch.Tensor) -> torch.Tensor:
    old[:, 1:3] = noise(old[:, 1:3].shape, 3)
    return old


def _last_two(owner: Any, name: str) -> None:
    getattr(owner, name)[..., 0] = 0.7


def _lasted(old: torch.Tensor) -> torch.Tensor:
    old[..., 0] = 0.7
    return old


def _add(owner: Any, name: str) -> None:
    value = getattr(owner, name)
    value += noise(value.shape, 5)
    setattr(owner, name, value)


def _added(old: torch.Tensor) -> torch.Tensor:
    return old + noise(old.shape, 5)


WRITES: tuple[tuple[Callable[[Any, str], None], Change], ...] = (
    (_assign, _assigned),
    (_index, _indexed),
    (_last_two, _lasted),
    (_add, _added),
)


#: Models whose places are those of another one here are read alone.
WRITTEN = [
    name
    for name in ATTENDING
    if name not in ("smollm3", "qwen2_window", "falcon_one_norm", "mistral", "gemma2_caps", "olmo3")
]


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_writes_of_every_name_change_what_plain_hooks_change(name: str, zoo: Zoo) -> None:
    model, boxes = zoo.model(name), {}
    layers = (1, -1) if name in SHARED else (1,)
    for layer in layers:
        for one in names_at(model, layer):
            if one in POINTS or one == "expert_indices":
                continue
            with model.trace() as tracer:
                for number, (write, _) in enumerate(WRITES):
                    with tracer.invoke(IDS):
                        write(target(model, layer), one)
                        boxes[layer, one, number] = tracer.output.logits.save()
    rows, wrong, expected = IDS.expand(len(WRITES), -1), [], {}

    def each(old: torch.Tensor) -> torch.Tensor:
        """Row by row another of the changes."""
        old = old.expand(len(WRITES), *old.shape[1:])
        return torch.cat([change(old[i : i + 1].clone()) for i, (_, change) in enumerate(WRITES)])

    for (layer, one, number), box in boxes.items():
        if (layer, one) not in expected:
            expected[layer, one] = zoo.plain(name, rows, {(layer, one): each}).logits
        try:
            same(box, expected[layer, one][number : number + 1], atol=2e-3)
        except AssertionError as error:
            wrong.append(f"{layer} {one} {WRITES[number][0].__name__}: {error}".replace("\n", " "))
    assert not wrong, "\n".join(wrong)


#: Names that are computed: a second change must not undo or repeat the first.
COMPUTED = (
    "head_out expert_out q_input k_input v_input ln1_scale ln1_normalized ln2_scale ln2_normalized "
    "ln1_post_scale ln1_post_normalized"
).split()


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral", "falcon", "opt"])
def test_two_changes_of_a_computed_name_add_up_and_are_read_again(name: str, zoo: Zoo) -> None:
    model = zoo.model(name)
    for one in COMPUTED:
        if one not in names_at(model, 1):
            continue
        with model.trace(IDS) as tracer:
            layer = model.layers[1]
            getattr(layer, one)[:, 2] = 0.5
            getattr(layer, one)[:, 4] *= 2
            twice = getattr(layer, one)
            twice[:, 0] = 0.5
            twice[:, 1] = 0.5
            getattr(layer, one)[:, 2] = 0.5
            again = getattr(layer, one).save()
            logits = tracer.output.logits.save()

        def change(old: torch.Tensor) -> torch.Tensor:
            old[:, :3], old[:, 4] = 0.5, old[:, 4] * 2
            return old

        expected = zoo.plain(name, IDS, {(1, one): change})
        same(again, change(expected.seen[1, one]), (name, one))
        same(logits, expected.logits, (name, one), atol=2e-3)


def test_a_computed_name_shows_changes_of_what_it_is_computed_from(zoo: Zoo) -> None:
    model = zoo.model("gpt2")
    with model.trace(IDS) as tracer:
        layer = model.layers[1]
        layer.head_out  # read before
        layer.z[:, :, 1] = 0
        heads = layer.head_out.save()
        layer.head_out[:, :, 2] = 0
        layer.ln1_scale[:] = 2.0
        normalized = layer.ln1_normalized.save()
        layer.ln1_normalized[:, 3] = 0
        logits = tracer.output.logits.save()

    def head(index: int) -> Change:
        def change(old: torch.Tensor) -> torch.Tensor:
            old[:, :, index] = 0
            return old

        return change

    def row(old: torch.Tensor) -> torch.Tensor:
        old[:, 3] = 0
        return old

    expected = zoo.plain(
        "gpt2",
        IDS,
        {
            (1, "z"): head(1),
            (1, "head_out"): head(2),
            (1, "ln1_scale"): lambda old: torch.full_like(old, 2.0),
            (1, "ln1_normalized"): row,
        },
    )
    assert heads.value[:, :, 1].abs().max() == 0
    same(heads, expected.seen[1, "head_out"])
    same(normalized, expected.seen[1, "ln1_normalized"])
    same(logits, expected.logits, atol=1e-4)


@pytest.mark.parametrize("one", ["head_out", "ln1_normalized", "q_input"])
def test_a_vector_that_is_zero_yet_added_to_a_computed_name_has_its_gradient(
    one: str, zoo: Zoo
) -> None:
    model, gradients = zoo.model("gpt2"), []
    with model.trace(IDS):
        shape = tuple(getattr(model.layers[1], one).shape)
    for size in (0.0, 1e-4):
        vector = torch.full(shape, size, requires_grad=True)
        with model.trace(IDS) as tracer:
            place = getattr(model.layers[1], one)
            place += vector
            tracer.output.logits[0, -1, 7].backward()
        assert vector.grad is not None and vector.grad.abs().max() > 0
        gradients.append(vector.grad)
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-3)
    # And of finite differences.
    index = tuple(0 if i != 1 else 6 for i in range(len(shape)))
    results = []
    for step in (-1e-2, 1e-2):
        with model.trace(IDS) as tracer:
            getattr(model.layers[1], one)[index] += step
            results.append(tracer.output.logits[0, -1, 7].save())
    slope = (results[1].value - results[0].value) / 2e-2
    torch.testing.assert_close(gradients[0][index], slope, rtol=2e-2, atol=2e-3)


# -------------------------------------------------------------------- batches


READS = "pattern scores q k v z head_out resid_mid ln1_scale mlp_post q_input expert_out".split()


@pytest.mark.slow
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_prompts_of_different_lengths_in_a_batch_are_each_as_alone(data: Any, zoo: Zoo) -> None:
    name = data.draw(st.sampled_from(sorted(set(ATTENDING) - {"falcon_alibi_eager"})))
    model = zoo.model(name)
    lengths = data.draw(st.lists(st.integers(2, 9), min_size=2, max_size=3))
    prompts = zoo.tools.prompts(*lengths, seed=data.draw(st.integers(0, 3)))
    reads = [one for one in READS if one in names_at(model, 1)]
    written = data.draw(st.sampled_from([one for one in reads if one != "scores"]))
    changed = data.draw(st.integers(0, len(prompts) - 1))

    def change(old: torch.Tensor) -> torch.Tensor:
        return old * 1.5 + 0.1

    found = []
    with model.trace() as tracer:
        for number, prompt in enumerate(prompts):
            with tracer.invoke(prompt):
                if number == changed:
                    _assign(model.layers[0], written)
                boxes = {one: getattr(model.layers[1], one).save() for one in reads}
                found.append((boxes, model.logits.save()))
    for number, (prompt, (boxes, logits)) in enumerate(zip(prompts, found, strict=True)):
        edits = {(0, written): change} if number == changed else {}
        expected = zoo.plain(name, prompt[None], edits)
        for one, box in boxes.items():
            same(box, expected.seen[1, one], (name, one), atol=2e-4)
        same(logits, expected.logits, name, atol=2e-3)


@pytest.mark.slow
def test_a_sweep_is_the_same_with_and_without_the_planner(zoo: Zoo) -> None:
    for name in ("gpt2", "llama", "gpt_oss"):
        model, results = zoo.model(name), []
        for options in ({}, {"plan": False}):
            boxes = []
            with model.trace(**options) as tracer:
                for layer in range(3):
                    for head in range(4):
                        with tracer.invoke(IDS):
                            model.layers[layer].z[:, :, head] = 0
                            boxes.append(model.logits.save())
                        with tracer.invoke(IDS):
                            model.layers[layer].pattern[:, head] = 0
                            boxes.append(model.logits.save())
                        with tracer.invoke(IDS):
                            model.layers[layer].head_out[:, :, head] = 0
                            boxes.append(model.logits.save())
            results.append(boxes)
        for number, (one, other) in enumerate(zip(*results, strict=True)):
            same(one, other.value, (name, number))
        zero_z = results[0][0::3]
        for one, other in zip(zero_z, results[0][1::3], strict=True):
            same(one, other.value, name)  # no pattern, no z
        for one, other in zip(zero_z, results[0][2::3], strict=True):
            same(one, other.value, name)  # no z, no output

        def no_head(old: torch.Tensor) -> torch.Tensor:
            old[:, :, 3] = 0
            return old

        expected = zoo.plain(name, IDS, {(1, "z"): no_head}).logits
        same(zero_z[7], expected, name, atol=1e-4)


@pytest.mark.slow
def test_several_names_of_one_layer_are_changed_in_one_block(zoo: Zoo) -> None:
    for name in ("llama", "gpt2", "gemma3_text", "bloom", "bert"):
        model = zoo.model(name)
        with model.trace(IDS) as tracer:
            layer = model.layers[1]
            layer.resid_mid += 0.3
            layer.z[:, :, 1] = 0.5
            layer.pattern[:, 2, :, 0] = 0.25
            layer.q *= 1.25
            layer.v[:, 3] = 0.125
            pattern, z = layer.pattern.save(), layer.z.save()
            logits = tracer.output.logits.save()

        def first(old: torch.Tensor) -> torch.Tensor:
            old[:, 2, :, 0] = 0.25
            return old

        def head(old: torch.Tensor) -> torch.Tensor:
            old[:, :, 1] = 0.5
            return old

        def token(old: torch.Tensor) -> torch.Tensor:
            old[:, 3] = 0.125
            return old

        expected = zoo.plain(
            name,
            IDS,
            {
                (1, "resid_mid"): lambda old: old + 0.3,
                (1, "z"): head,
                (1, "pattern"): first,
                (1, "q"): lambda old: old * 1.25,
                (1, "v"): token,
            },
        )
        same(pattern, first(expected.seen[1, "pattern"]), name)
        same(z, head(expected.seen[1, "z"]), name)
        same(logits, expected.logits, name, atol=1e-4)


@pytest.mark.slow
def test_only_layers_whose_pattern_is_used_leave_fused_attention(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, calls = torch.nn.functional.scaled_dot_product_attention, []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        if not isinstance(args[0], torch._subclasses.FakeTensor) and not args[0].is_meta:
            calls.append(args[0].shape)
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    for name in ("gpt2", "llama", "falcon", "bert", "opt"):
        model = zoo.model(name)
        for read, count in (("pattern", 2), ("scores", 2), ("q", 3), ("z", 3)):
            with model.trace(IDS) as tracer:
                getattr(model.layers[1], read).save()
                tracer.output.logits.save()
            assert len(calls) == count, (name, read)
            calls.clear()
        implementations = {
            child.config._attn_implementation
            for child in zoo(name).modules()
            if hasattr(child, "config")
        }
        assert implementations == {"sdpa"}


@pytest.mark.slow
def test_a_mask_of_the_users_own_is_kept_by_the_eager_layer(zoo: Zoo) -> None:
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 1]])
    for name in ("gpt2", "llama", "mistral", "falcon", "bert"):
        model, module = zoo.model(name), zoo.eager(name)
        with torch.no_grad():
            expected = module(IDS, attention_mask=mask, output_attentions=True)
        with model.trace({"input_ids": IDS, "attention_mask": mask}) as tracer:
            patterns = [layer.pattern.save() for layer in model.layers]
            logits = tracer.output.logits.save()
        for one, other in zip(patterns, expected.attentions, strict=True):
            if one.value.shape == other.shape:
                same(one.value[:, :, 3:], other[:, :, 3:], name)
        same(logits.value[:, 3:], expected.logits[:, 3:], name, atol=1e-4)


# -------------------------------------------------------------------- generation


def _grown(zoo: Zoo, name: str, count: int, edits: Any) -> tuple[torch.Tensor, list[Plain]]:
    """Greedy generation without a cache: whole forwards, each with the edits."""
    ids, passes = IDS, []
    for _ in range(count):
        passes.append(zoo.plain(name, ids, edits))
        ids = torch.cat([ids, passes[-1].logits[:, -1:].argmax(-1)], 1)
    return ids, passes


def _no_head(old: torch.Tensor) -> torch.Tensor:
    old[:, :, 2] = 0
    return old


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "mistral", "gpt_oss", "gemma2", "bloom", "falcon"]
)
def test_names_at_every_step_of_a_generation(name: str, zoo: Zoo) -> None:
    model, count = zoo.model(name), 6
    ids, passes = _grown(zoo, name, count, {(1, "z"): _no_head, (2, "head_out"): _no_head})
    with model.generate(IDS, max_new_tokens=count, do_sample=False) as generator:
        with generator.all():
            model.layers[1].z[:, :, 2] = 0
            model.layers[2].head_out[:, :, 2] = 0
            patterns = model.layers[2].pattern.save()
            middles = model.layers[1].ln1_normalized.save()
    assert torch.equal(generator.output, ids)
    assert len(patterns.value) == len(middles.value) == count
    for step, one in enumerate(passes):
        tokens = IDS.shape[1] if step == 0 else 1
        same(middles.value[step], one.seen[1, "ln1_normalized"][:, -tokens:], (name, step), 1e-4)
        pattern = one.seen[2, "pattern"][:, :, -tokens:]
        found = patterns.value[step]
        same(found, pattern[..., -found.shape[-1] :], (name, step), 1e-4)
        # A window's cache may have let go of keys that are not seen.
        assert pattern[..., : -found.shape[-1]].abs().sum() == 0


def test_names_of_one_step_of_a_generation(zoo: Zoo) -> None:
    model = zoo.model("llama")
    _, passes = _grown(zoo, "llama", 3, {})
    with model.generate(max_new_tokens=3, do_sample=False) as generator:
        with generator.invoke(IDS) as invoker:
            first = model.layers[1].pattern.save()
            invoker.next()
            second = model.layers[1].pattern.save()
            invoker.next()
            z = model.layers[1].z.save()
            model.layers[2].pattern[:, 1] = 0
            after = model.layers[2].z.save()
    same(first, passes[0].seen[1, "pattern"])
    same(second, passes[1].seen[1, "pattern"][:, :, -1:])
    same(z, passes[2].seen[1, "z"][:, -1:])
    assert after.value[:, :, 1].abs().max() == 0


# -------------------------------------------------------------------- gradients, kinds of numbers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral", "bert"])
def test_gradients_of_names_equal_those_of_an_eager_model(name: str, zoo: Zoo) -> None:
    model, module, places = zoo.model(name), zoo.eager(name), TABLE[name]
    block = module.get_submodule(places.blocks)[1]
    kept: dict[str, torch.Tensor] = {}

    def keep(key: str, value: torch.Tensor) -> torch.Tensor:
        kept[key] = value
        value.retain_grad()
        return value

    handles = [
        block.register_forward_pre_hook(
            lambda _, args: (keep("resid_pre", args[0] * 1.0), *args[1:])
        ),
        block.get_submodule(places.out).register_forward_pre_hook(
            lambda _, args: (keep("z", args[0] * 1.0),)
        ),
    ]
    watch = Watch(block.get_submodule(places.core), keep)
    try:
        with watch:
            module(IDS).logits[0, -1].logsumexp(-1).backward()
    finally:
        for handle in (*handles, *watch.handles):
            handle.remove()
        module.zero_grad()
    with model.trace(IDS) as tracer:
        layer = model.layers[1]
        grads = {
            one: getattr(layer, one).grad.save() for one in ("resid_pre", "z", "pattern", "scores")
        }
        tracer.output.logits[0, -1].logsumexp(-1).backward()
    for one, box in grads.items():
        assert kept[one].grad is not None
        same(box, kept[one].grad.reshape(box.value.shape), (name, one), atol=1e-5)  # type: ignore[union-attr]


class Watch(TorchFunctionMode):
    """Keeps input and output of the softmax inside a module."""

    def __init__(self, module: Any, keep: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.keep, self.inside = keep, False
        self.handles = [
            module.register_forward_pre_hook(lambda *_: setattr(self, "inside", True)),
            module.register_forward_hook(lambda *_: setattr(self, "inside", False)),
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside or getattr(func, "__name__", "") != "softmax":
            return func(*args, **(kwargs or {}))
        scores = self.keep("scores", args[0] * 1.0)
        return self.keep("pattern", func(scores, *args[1:], **(kwargs or {})))


def test_a_backward_goes_through_an_edit_of_the_pattern(zoo: Zoo) -> None:
    model = zoo.model("llama")
    share = torch.tensor(0.3, requires_grad=True)
    with model.trace(IDS) as tracer:
        pattern = model.layers[1].pattern
        pattern[:, 1] = pattern[:, 1] * share
        tracer.output.logits[0, -1, 5].backward()

    def result(size: float) -> torch.Tensor:
        def change(old: torch.Tensor) -> torch.Tensor:
            old[:, 1] *= size
            return old

        return zoo.plain("llama", IDS, {(1, "pattern"): change}).logits[0, -1, 5]

    slope = (result(0.31) - result(0.29)) / 0.02
    assert share.grad is not None
    torch.testing.assert_close(share.grad, slope, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3_text", "bert", "mixtral"])
def test_half_precision(name: str, zoo: Zoo) -> None:
    model: Any = LanguageModel(zoo.fresh(name).to(torch.bfloat16))
    expected = zoo.plain(name, IDS)
    assert model.cfg.dtype is torch.bfloat16
    wanted = [one for one in names_at(model, 0) if one != "expert_indices"]
    with model.trace(IDS):
        boxes = {one: getattr(model.layers[0], one).save() for one in wanted}
    for one, box in boxes.items():
        if one not in POINTS and not one.startswith("expert"):
            # The softmax of some files is in single precision, whatever the model is.
            assert one in ("scores", "pattern") or box.value.dtype is torch.bfloat16, one
            value, other = box.value.float(), expected.seen[0, one]
            seen = other > -1e4
            torch.testing.assert_close(value[seen], other[seen], rtol=0.1, atol=0.15)
    with model.trace(IDS) as tracer:
        model.layers[0].head_out[:, :, 1] = 0
        model.layers[1].pattern[:, 0] = 0
        model.layers[2].resid_post += 0
        logits = tracer.output.logits.save()

    def head(axis: int, index: int) -> Change:
        return lambda old: old.index_fill(axis, torch.tensor(index), 0.0)

    other = zoo.plain(name, IDS, {(0, "head_out"): head(2, 1), (1, "pattern"): head(1, 0)}).logits
    error = (logits.value.float() - other).norm() / other.norm()
    assert error < 0.06, error


def test_a_name_that_is_changed_by_an_operator_is_seen_by_its_older_handles(zoo: Zoo) -> None:
    """`layer.k_pre *= 0.5` writes in place, though Python then assigns what it wrote."""
    model, module = zoo.model("gpt2"), zoo("gpt2")
    with model.trace(IDS):
        layer = model.layers[0]
        old = layer.k_pre
        layer.k_pre *= 0.5
        half = old.save()
        old[:, 0] += 1
        layer.k_pre[..., 1:] = 0.25
        now = old.save()
        layer.k_pre = layer.k_pre * 2
        kept, new = old.save(), layer.k_pre.save()
        fused = layer.attn.c_attn.output.save()
    held: list[torch.Tensor] = []
    hook = module.transformer.h[0].attn.c_attn.register_forward_hook(
        lambda _m, _a, output: held.append(output.clone())
    )
    with torch.no_grad():
        module(IDS)
    hook.remove()
    _, keys, _ = held[0].unflatten(-1, (3, half.shape[2], -1)).unbind(2)
    keys = keys * 0.5
    same(half, keys)
    keys[:, 0] += 1
    keys[..., 1:] = 0.25
    same(now, keys)
    same(kept, keys)
    same(new, keys * 2)
    same(fused.unflatten(-1, (3, half.shape[2], -1))[:, :, 1], keys * 2)


def test_gradients_of_computed_names(zoo: Zoo) -> None:
    model, weight = zoo.model("gpt2"), zoo("gpt2").transformer.h[1].ln_1.weight
    with model.trace(IDS) as tracer:
        layer = model.layers[1]
        heads, total = layer.head_out.grad.save(), layer.o_out.grad.save()
        normalized, out = layer.ln1_normalized.grad.save(), layer.ln1_out.grad.save()
        tracer.output.logits[0, -1, 7].backward()
    same(normalized, out.value * weight)
    same(heads, total.value[:, :, None].expand_as(heads.value))


# -------------------------------------------------------------------- other blocks


@pytest.mark.slow
def test_sessions_edits_and_scans_take_names(zoo: Zoo) -> None:
    model = zoo.model("llama")
    with model.session():
        with model.trace(IDS):
            z = model.layers[0].z
            pattern = model.layers[1].pattern
        with model.trace(IDS[:, :7]) as tracer:
            model.layers[1].z = z * 2
            model.layers[2].pattern = pattern
            logits = tracer.output.logits.save()
    base = zoo.plain("llama", IDS).seen
    expected = zoo.plain(
        "llama",
        IDS,
        {(1, "z"): lambda _: base[0, "z"] * 2, (2, "pattern"): lambda _: base[1, "pattern"]},
    )
    same(logits, expected.logits, atol=1e-4)

    with model.edit() as edited:
        model.layers[1].z[:, :, 2] = 0
        model.layers[2].head_out[:, :, 2] = 0
        model.layers[0].ln1_normalized *= 1.5
    expected = zoo.plain(
        "llama",
        IDS,
        {
            (1, "z"): _no_head,
            (2, "head_out"): _no_head,
            (0, "ln1_normalized"): lambda old: old * 1.5,
        },
    )
    with edited.trace(IDS) as tracer:
        logits = tracer.output.logits.save()
    same(logits, expected.logits, atol=1e-4)
    with model.trace(IDS) as tracer:
        logits = tracer.output.logits.save()
    same(logits, zoo.plain("llama", IDS).logits)

    with model.scan(IDS):
        assert tuple(model.layers[1].pattern.shape) == (1, 4, 7, 7)
        assert tuple(model.layers[1].k.shape) == (1, 7, 2, 4)
        assert tuple(model.layers[1].head_out.shape) == (1, 7, 4, 16)
        assert tuple(model.logits.shape) == (1, 7, 61)


def test_an_edit_of_a_pattern_lasts(zoo: Zoo) -> None:
    model = zoo.model("llama")
    with model.edit() as edited:
        model.layers[1].pattern[:, 1] = 0
    with edited.trace(IDS) as tracer:
        logits = tracer.output.logits.save()

    def change(old: torch.Tensor) -> torch.Tensor:
        old[:, 1] = 0
        return old

    same(logits, zoo.plain("llama", IDS, {(1, "pattern"): change}).logits, atol=1e-4)


def test_an_edit_of_a_computed_name_is_saved(zoo: Zoo, tmp_path: Path) -> None:
    model: Any = LanguageModel(zoo("gpt2"))
    with model.edit() as edited:
        model.layers[1].head_out[:, :, 2] = 0
    edited.save_edits(tmp_path / "edits")
    model.load_edits(tmp_path / "edits")
    with model.trace(IDS) as tracer:
        logits = tracer.output.logits.save()
    same(logits, zoo.plain("gpt2", IDS, {(1, "head_out"): _no_head}).logits, atol=1e-4)


def test_an_edit_of_a_pattern_is_saved(zoo: Zoo, tmp_path: Path) -> None:
    model: Any = LanguageModel(zoo("llama"))
    with model.edit() as edited:
        model.layers[1].pattern[:, 2] = 0
        model.layers[0].z[:, :, 2] = 0
    edited.save_edits(tmp_path / "edits")
    model.load_edits(tmp_path / "edits")
    with model.trace(IDS) as tracer:
        logits = tracer.output.logits.save()

    def change(old: torch.Tensor) -> torch.Tensor:
        old[:, 2] = 0
        return old

    edits = {(1, "pattern"): change, (0, "z"): _no_head}
    same(logits, zoo.plain("llama", IDS, edits).logits, atol=1e-4)


@pytest.mark.slow
def test_branches_on_names(zoo: Zoo) -> None:
    model = zoo.model("gpt2")
    for above, wanted in ((-1e3, True), (1e3, False)):
        with model.trace(IDS) as tracer:
            with tracer.cond(model.layers[0].z.sum() > above):
                model.layers[1].head_out[:, :, 2] = 0
                model.layers[1].head_out[:, :, 2] = 0
            with tracer.otherwise():
                model.layers[1].head_out += 0.25
            logits = tracer.output.logits.save()
        change = _no_head if wanted else (lambda old: old + 0.25)
        same(logits, zoo.plain("gpt2", IDS, {(1, "head_out"): change}).logits, wanted, 1e-4)
        # Beside changes before the branch and behind it.
        with model.trace(IDS) as tracer:
            layer = model.layers[1]
            layer.head_out[:, :, 1] = 0.5
            layer.ln1_normalized[:, 1] = 0
            with tracer.cond(model.layers[0].z.sum() > above):
                layer.head_out[:, :, 1] = 0.5
                layer.head_out[:, :, 2] = 0
                layer.ln1_normalized[:, 2] = 0
                layer.ln1_normalized[:, 3] = 0
            layer.head_out[:, :, 3] = 0.25
            layer.ln1_normalized[:, 4] = 0
            logits = tracer.output.logits.save()

        def both(old: torch.Tensor, wanted: bool = wanted) -> torch.Tensor:
            old[:, :, 1], old[:, :, 3] = 0.5, 0.25
            return _no_head(old) if wanted else old

        def rows(old: torch.Tensor, wanted: bool = wanted) -> torch.Tensor:
            old[:, [1, 2, 3, 4] if wanted else [1, 4]] = 0
            return old

        edits = {(1, "head_out"): both, (1, "ln1_normalized"): rows}
        same(logits, zoo.plain("gpt2", IDS, edits).logits, wanted, 1e-4)


def test_two_threads_read_patterns_and_fused_layers_at_once(zoo: Zoo) -> None:
    model, wrong = zoo.model("llama"), []
    expected = {one: zoo.plain("llama", IDS + one) for one in (0, 1)}

    def work(one: int) -> None:
        for number in range(6):
            with model.trace(IDS + one) as tracer:
                if number % 2 == one:
                    pattern = model.layers[1].pattern.save()
                logits = tracer.output.logits.save()
            try:
                same(logits, expected[one].logits)
                if number % 2 == one:
                    same(pattern, expected[one].seen[1, "pattern"])
            except AssertionError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(one,)) for one in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -------------------------------------------------------------------- what there is not


@pytest.mark.slow
def test_names_that_do_not_exist_say_why(zoo: Zoo) -> None:
    parallel, mamba = zoo.model("gptj"), zoo.model("mamba")
    with parallel.trace(IDS):
        with pytest.raises(UnavailableNameError, match=r"layers\[1\]\.resid_mid.*parallel"):
            parallel.layers[1].resid_mid
        with pytest.raises(UnavailableNameError, match="parallel"):
            parallel.layers[1].resid_mid = 0
        assert not hasattr(parallel.layers[1], "resid_mid")
        assert hasattr(parallel.layers[1], "z")
        assert not hasattr(parallel, "pos_embed")
        with pytest.raises(UnavailableNameError, match="rotary"):
            parallel.pos_embed
        parallel.layers[1].z.save()
    with mamba.trace(IDS):
        for one in ("pattern", "z", "mlp_in", "head_out", "q_pre"):
            with pytest.raises(UnavailableNameError, match="mixer_in and mixer_out"):
                getattr(mamba.layers[0], one)
        mamba.layers[0].mixer_out.save()
    with zoo.model("mixtral").trace(IDS):
        with pytest.raises(UnavailableNameError, match="expert_out"):
            zoo.model("mixtral").layers[0].mlp_post
        zoo.model("mixtral").layers[0].z.save()
    with zoo.model("falcon_alibi").trace(IDS):
        with pytest.raises(UnavailableNameError, match="eager"):
            zoo.model("falcon_alibi").layers[0].pattern
        zoo.model("falcon_alibi").layers[0].z.save()


def test_unknown_names_list_near_ones(zoo: Zoo) -> None:
    model = zoo.model("llama")
    with model.trace(IDS):
        with pytest.raises(UnavailableNameError, match=r"patern.*`pattern`"):
            model.layers[0].patern
        with pytest.raises(UnavailableNameError, match="`resid_mid`"):
            model.layers[0].resid_midd
        with pytest.raises(UnavailableNameError, match="hook_z"):
            model.hook("blocks.0.attn.hook_zz")
        with pytest.raises(UnavailableNameError, match="there are 3 layers"):
            model.hook("blocks.3.attn.hook_z")
        with pytest.raises(InputError, match="layer=3"):
            model.hook("z")
        assert not hasattr(model.layers[0], "resid_midd")
        model.layers[0].z.save()


def test_layers_are_indexed_by_number(zoo: Zoo) -> None:
    model = zoo.model("llama")
    assert len(model.layers) == 3
    assert model.layers[-1].index == 2
    assert [layer.index for layer in model.layers[1:]] == [1, 2]
    assert [layer.index for layer in model.layers] == [0, 1, 2]
    for wrong in (3, -4):
        with pytest.raises(UnavailableNameError, match="there are 3 layers"):
            model.layers[wrong]
    with pytest.raises(OperationError, match="by number"):
        model.layers["0"]
    assert model.layers[1].self_attn.path == "model.layers.1.self_attn"
    assert {"z", "self_attn", "support"} <= set(dir(model.layers[1]))


def test_names_are_values_of_a_block_alone(zoo: Zoo) -> None:
    model = zoo.model("llama")
    for read in (
        lambda: model.layers[0].z,
        lambda: model.logits,
        lambda: model.hook("blocks.0.attn.hook_z"),
        lambda: model.layers[0].pattern,
        lambda: model.layers[0].head_out,
    ):
        with pytest.raises(BlockError, match="inside a block"):
            read()
    with pytest.raises(BlockError, match="inside a block"):
        model.layers[0].z = 0
    with model.trace() as tracer:
        with pytest.raises(BlockError):
            model.layers[0].head_out
        with tracer.invoke(IDS):
            model.layers[0].z.save()


def test_a_value_of_another_shape_is_refused(zoo: Zoo) -> None:
    model = zoo.model("llama")
    for one in ("z", "pattern", "head_out", "ln1_normalized"):
        with pytest.raises((GraftworkError, RuntimeError, ValueError)):
            with model.trace(IDS) as tracer:
                setattr(model.layers[1], one, torch.zeros(1, 7, 3))
                tracer.output.logits.save()


def test_support_is_printed(zoo: Zoo) -> None:
    text = str(zoo.model("gptj").layers[1].support())
    assert text.startswith("layer 1 of GPTJForCausalLM, declared")
    rows = {line.split()[0]: line for line in text.splitlines()[1:]}
    assert "[batch, token, n_heads, d_head]" in rows["z"] and "attn.out_proj.input" in rows["z"]
    assert "parallel" in rows["resid_mid"]
    assert "computed from o_out, z" in rows["head_out"]
    support = zoo.model("gptj").layers[1].support()
    assert "resid_mid" in support.missing and "resid_mid" not in support.names
    assert repr(support) == text


# -------------------------------------------------------------------- other libraries' spellings

SPELLINGS = {
    "blocks.1.hook_resid_pre": "resid_pre",
    "blocks.1.hook_resid_mid": "resid_mid",
    "blocks.1.hook_resid_post": "resid_post",
    "blocks.1.hook_attn_out": "attn_out",
    "blocks.1.hook_mlp_out": "mlp_out",
    "blocks.1.hook_mlp_in": "ln2_in",
    "blocks.1.hook_q_input": "q_input",
    "blocks.1.hook_k_input": "k_input",
    "blocks.1.hook_v_input": "v_input",
    "blocks.1.attn.hook_q": "q_pre",
    "blocks.1.attn.hook_k": "k_pre",
    "blocks.1.attn.hook_v": "v_pre",
    "blocks.1.attn.hook_rot_q": "q",
    "blocks.1.attn.hook_rot_k": "k",
    "blocks.1.attn.hook_attn_scores": "scores",
    "blocks.1.attn.hook_pattern": "pattern",
    "blocks.1.attn.hook_z": "z",
    "blocks.1.attn.hook_result": "head_out",
    "blocks.1.ln1.hook_scale": "ln1_scale",
    "blocks.1.ln1.hook_normalized": "ln1_normalized",
    "blocks.1.ln2.hook_scale": "ln2_scale",
    "blocks.1.ln2.hook_normalized": "ln2_normalized",
    "blocks.1.mlp.hook_pre": "mlp_pre",
    "blocks.1.mlp.hook_pre_linear": "mlp_up",
    "blocks.1.mlp.hook_post": "mlp_post",
    "layer_1_pre_attn": "resid_pre",
    "layer_1_attn_pre_out": "z",
    "layer_1_post_attn": "attn_out",
    "layer_1_pre_mlp": "resid_mid",
    "layer_1_mlp_pre_out": "mlp_post",
    "layer_1_post_mlp": "mlp_out",
    "layer_1_pre_decoder": "resid_pre",
    "layer_1_post_decoder": "resid_post",
}
WITH_LAYER = {
    "resid.delta_attn": "attn_out",
    "resid.post_attn": "resid_mid",
    "resid.delta_mlp": "mlp_out",
    "resid.post_mlp": "resid_post",
    "attn_ln.scale": "ln1_scale",
    "mlp_ln.scale": "ln2_scale",
    "attn.q": "q",
    "attn.k": "k",
    "attn.v": "v",
    "attn.qk_logits": "scores",
    "attn.qk_probs": "pattern",
    "attn.v_out": "z",
    "mlp.pre_act": "mlp_pre",
    "mlp.post_act": "mlp_post",
    "layers_input": "resid_pre",
    "layers_output": "resid_post",
    "attentions_input": "attn_in",
    "attentions_output": "attn_out",
    "attention_probabilities": "pattern",
    "mlps_input": "mlp_in",
    "mlps_output": "mlp_out",
    "z": "z",
}
OF_MODEL = {
    "hook_embed": "embed",
    "ln_final.hook_scale": "ln_final_scale",
    "ln_final.hook_normalized": "ln_final_normalized",
    "unembed.hook_in": "unembed_in",
    "unembed.hook_out": "unembed_out",
    "resid.post_ln_f": "ln_final",
    "resid.ln_f.scale": "ln_final_scale",
    "logits": "logits",
}


@pytest.mark.slow
def test_spellings_of_other_libraries(zoo: Zoo) -> None:
    model, expected = zoo.model("llama"), zoo.plain("llama", IDS).seen
    with model.trace(IDS):
        boxes = {
            **{(name, (1, own)): model.hook(name).save() for name, own in SPELLINGS.items()},
            **{(n, (1, own)): model.hook(n, layer=1).save() for n, own in WITH_LAYER.items()},
            **{(name, (-1, own)): model.hook(name).save() for name, own in OF_MODEL.items()},
            ("resid.post_emb", (0, "resid_pre")): model.hook("resid.post_emb").save(),
            ("z", (2, "z")): model.hook("z", layer=-1).save(),
        }
    for (name, key), box in boxes.items():
        same(box, expected[key], name)
    with model.trace(IDS) as tracer:
        model.hook("blocks.1.attn.hook_z")[:, :, 2] = 0
        logits = tracer.output.logits.save()
    same(logits, zoo.plain("llama", IDS, {(1, "z"): _no_head}).logits, atol=1e-4)


# -------------------------------------------------------------------- mixtures of experts


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_an_edit_of_router_logits_changes_who_is_chosen(name: str, zoo: Zoo) -> None:
    model = zoo.model(name)
    with model.trace(IDS) as tracer:
        layer = model.layers[1]
        layer.router_logits[..., 3] = 100.0
        indices, weights = layer.expert_indices.save(), layer.expert_weights.save()
        parts, whole = layer.expert_out.save(), layer.experts_out.save()
        logits = tracer.output.logits.save()

    def change(old: torch.Tensor) -> torch.Tensor:
        old[..., 3] = 100.0
        return old

    expected = zoo.plain(name, IDS, {(1, "router_logits"): change})
    assert (indices.value[..., 0] == 3).all()
    torch.testing.assert_close(weights.value[..., 0], torch.ones(1, 7))
    assert torch.equal(indices.value, expected.seen[1, "expert_indices"])
    same(parts.value.sum(2), whole.value, name)
    same(logits, expected.logits, name, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_an_expert_is_ablated(name: str, zoo: Zoo) -> None:
    model = zoo.model(name)
    base = zoo.plain(name, IDS).seen
    gone = int(base[1, "expert_indices"][0, 2, 0])
    with model.trace(IDS) as tracer:
        layer = model.layers[1]
        layer.expert_out[:] = layer.expert_out * (layer.expert_indices != gone)[..., None]
        logits = tracer.output.logits.save()

    def change(old: torch.Tensor) -> torch.Tensor:
        return old * (base[1, "expert_indices"] != gone)[..., None]

    expected = zoo.plain(name, IDS, {(1, "expert_out"): change})
    same(logits, expected.logits, name, atol=1e-4)
    # The same, by weights that are zero.
    with model.trace(IDS) as tracer:
        layer = model.layers[1]
        layer.expert_weights *= layer.expert_indices != gone
        logits = tracer.output.logits.save()
    same(logits, expected.logits, name, atol=1e-4)


def test_other_experts_are_chosen_by_hand(zoo: Zoo) -> None:
    model = zoo.model("mixtral")

    def change(old: torch.Tensor) -> torch.Tensor:
        return (old + 1) % 4

    with model.trace(IDS) as tracer:
        model.layers[1].expert_indices = (model.layers[1].expert_indices + 1) % 4
        logits = tracer.output.logits.save()
    expected = zoo.plain("mixtral", IDS, {(1, "expert_indices"): change})
    same(logits, expected.logits, atol=1e-4)


# -------------------------------------------------------------------- other kinds of models


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
def test_names_of_mamba(name: str, zoo: Zoo) -> None:
    model, module = zoo.model(name), zoo(name)
    seen = zoo.tools.plain(module, IDS)
    block = "backbone.layers.1"
    expected = {
        "resid_pre": seen[block, "input"],
        "resid_post": seen[block, "output"],
        "mixer_in": seen[f"{block}.mixer", "input"],
        "mixer_out": seen[f"{block}.mixer", "output"],
        "ln1_in": seen[f"{block}.norm", "input"],
        "ln1_out": seen[f"{block}.norm", "output"],
    }
    x = expected["ln1_in"]
    expected["ln1_scale"] = (
        x.pow(2).mean(-1, keepdim=True) + module.config.layer_norm_epsilon
    ).sqrt()
    expected["ln1_normalized"] = x / expected["ln1_scale"]
    with model.trace(IDS):
        assert set(model.layers[1].support().names) >= set(expected)
        boxes = {one: getattr(model.layers[1], one).save() for one in expected}
        own = {
            one: getattr(model, one).save() for one in ("embed", "ln_final", "unembed_in", "logits")
        }
    for one, box in boxes.items():
        same(box, expected[one], one)
    same(own["embed"], seen["backbone.embeddings", "output"])
    same(own["ln_final"], seen["backbone.norm_f", "output"])
    same(own["logits"], seen["lm_head", "output"])
    for one, place in (
        ("mixer_out", (f"{block}.mixer", "output")),
        ("ln1_out", (f"{block}.norm", "output")),
        ("resid_post", (block, "output")),
    ):
        with model.trace(IDS) as tracer:
            _add(model.layers[1], one)
            logits = tracer.output.logits.save()
        other = zoo.tools.plain(module, IDS, edits={place: _added})
        same(logits, other["lm_head", "output"], one, atol=1e-4)


@pytest.fixture(scope="module")
def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=61,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    module = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    return module


STARTED = torch.tensor([[0, 5, 6, 9]])


def _t5_eager(t5: Any) -> Any:
    config = copy.deepcopy(t5.config)
    config._attn_implementation = "eager"
    other = type(t5)._from_config(config, attn_implementation="eager").eval()
    other.load_state_dict(t5.state_dict())
    return other


@pytest.mark.slow
def test_names_of_t5(t5: Any, tools: SimpleNamespace) -> None:
    model: Any = LanguageModel(t5)
    with pytest.raises(UnavailableNameError, match=r"encoder_layers.*decoder_layers"):
        model.layers
    assert (len(model.encoder_layers), len(model.decoder_layers)) == (2, 3)
    eager = _t5_eager(t5)
    with torch.no_grad():
        result = eager(IDS, decoder_input_ids=STARTED, output_attentions=True)
    seen = tools.plain(eager, IDS, decoder_input_ids=STARTED)
    with model.trace(IDS, decoder_input_ids=STARTED) as tracer:
        patterns = [layer.pattern.save() for layer in model.encoder_layers]
        own = [layer.pattern.save() for layer in model.decoder_layers]
        crossed = [layer.cross_pattern.save() for layer in model.decoder_layers]
        layer = model.decoder_layers[1]
        places = {
            ("decoder.block.1.layer.0.SelfAttention.o", "input"): layer.z.save(),
            ("decoder.block.1.layer.1.EncDecAttention.o", "input"): layer.cross_z.save(),
            ("decoder.block.1.layer.0", "output"): layer.resid_mid.save(),
            ("decoder.block.1.layer.1", "output"): layer.resid_mid_cross.save(),
            ("decoder.block.1", "output"): layer.resid_post.save(),
            ("decoder.block.1.layer.2.DenseReluDense.wi_0", "output"): layer.mlp_pre.save(),
            ("decoder.block.1.layer.2.DenseReluDense.wi_1", "output"): layer.mlp_up.save(),
            ("decoder.block.1.layer.2.DenseReluDense.wo", "input"): layer.mlp_post.save(),
            ("decoder.block.1.layer.1.EncDecAttention", "output"): layer.cross_attn_out.save(),
            ("encoder.block.1.layer.0.SelfAttention.q", "output"): model.encoder_layers[
                1
            ].q_pre.save(),
            ("decoder.final_layer_norm", "output"): model.ln_final.save(),
        }
        logits = tracer.output.logits.save()
    for found, expected in (
        (patterns, result.encoder_attentions),
        (own, result.decoder_attentions),
        (crossed, result.cross_attentions),
    ):
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    for place, box in places.items():
        value = seen[place]
        value = value[0] if isinstance(value, tuple) else value
        same(box, value.reshape(box.value.shape), place, atol=1e-4)
    same(logits, result.logits, atol=1e-4)


@pytest.mark.slow
def test_edits_of_t5(t5: Any, tools: SimpleNamespace) -> None:
    model: Any = LanguageModel(t5)
    with model.trace(IDS, decoder_input_ids=STARTED) as tracer:
        model.encoder_layers[0].z[:, :, 2] = 0
        model.decoder_layers[1].cross_z[:, :, 1] = 0.5
        model.decoder_layers[2].head_out[:, :, 3] = 0
        logits = tracer.output.logits.save()

    def head(index: int, value: float) -> Change:
        def change(old: torch.Tensor) -> torch.Tensor:
            old[..., 8 * index : 8 * index + 8] = value
            return old

        return change

    expected = tools.plain(
        t5,
        IDS,
        decoder_input_ids=STARTED,
        edits={
            ("encoder.block.0.layer.0.SelfAttention.o", "input"): head(2, 0),
            ("decoder.block.1.layer.1.EncDecAttention.o", "input"): head(1, 0.5),
            ("decoder.block.2.layer.0.SelfAttention.o", "input"): head(3, 0),
        },
    )
    same(logits, expected["lm_head", "output"], atol=1e-4)
    # Without the pattern of a head there is nothing of it.
    with model.trace(IDS, decoder_input_ids=STARTED) as tracer:
        model.decoder_layers[1].cross_pattern[:, 1] = 0
        model.encoder_layers[0].pattern[:, 2] = 0
        logits = tracer.output.logits.save()
    expected = tools.plain(
        t5,
        IDS,
        decoder_input_ids=STARTED,
        edits={
            ("encoder.block.0.layer.0.SelfAttention.o", "input"): head(2, 0),
            ("decoder.block.1.layer.1.EncDecAttention.o", "input"): head(1, 0),
        },
    )
    same(logits, expected["lm_head", "output"], atol=1e-4)
    assert model.verify_names(IDS, decoder_input_ids=STARTED).ok


@pytest.mark.slow
def test_names_of_vit(tools: SimpleNamespace) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    module = transformers.ViTForImageClassification(config).eval()
    model: Any = Model(module)
    pixels = torch.randn(2, 3, 8, 8)
    eager = type(module)._from_config(config, attn_implementation="eager").eval()
    eager.load_state_dict(module.state_dict())
    with torch.no_grad():
        result = eager(pixel_values=pixels, output_attentions=True)
    seen = tools.plain(module, pixel_values=pixels)
    with model.trace(pixel_values=pixels):
        patterns = [layer.pattern.save() for layer in model.layers]
        layer = model.layers[1]
        boxes = {
            ("vit.layers.1", "output"): layer.resid_post.save(),
            ("vit.layers.1.layernorm_after", "input"): layer.resid_mid.save(),
            ("vit.layers.1.attention.o_proj", "input"): layer.z.save(),
            ("vit.layers.1.mlp.fc2", "input"): layer.mlp_post.save(),
            ("vit.layernorm", "output"): model.ln_final.save(),
            ("classifier", "output"): model.logits.save(),
        }
    for one, other in zip(patterns, result.attentions, strict=True):
        same(one, other)
    for place, box in boxes.items():
        same(box, seen[place].reshape(box.value.shape), place)

    def head(old: torch.Tensor) -> torch.Tensor:
        old[..., 8:12] = 0
        return old

    with model.trace(pixel_values=pixels) as tracer:
        model.layers[1].z[:, :, 2] = 0
        logits = tracer.output.logits.save()
    edits = {("vit.layers.1.attention.o_proj", "input"): head}
    same(logits, tools.plain(module, pixel_values=pixels, edits=edits)["classifier", "output"])
    assert model.verify_names(pixel_values=pixels[:1]).ok


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bert", "mamba", "gpt_oss", "falcon_groups"])
def test_every_promise_holds_by_its_own_check(name: str, zoo: Zoo) -> None:
    report = zoo.model(name).verify_names(IDS, strict=False)
    assert report.ok, str(report)
