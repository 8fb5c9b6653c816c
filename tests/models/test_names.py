"""Names that hold on every architecture, against plain hooks and attention written by hand."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from graftwork import LanguageModel

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


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENDING)
def test_writes_of_every_name_change_what_plain_hooks_change(name: str, zoo: Zoo) -> None:
    model, boxes = zoo.model(name), {}
    layers = (1, -1)
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
