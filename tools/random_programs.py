"""Random experiment programs, each run twice: by graftwork's blocks, and by plain hooks.

A program is text. Lines that belong to one place of the forward (a *section*) are run by the plain
interpreter inside a hook at that place, on the plain transformers model, one prompt alone at a time;
graftwork gets the same lines in a block, all prompts together, sections in an order of its own.
`@resid_post 1@` stands for a place, `~[…]` for positions in the prompt's own tokens, and `save(…)`
for what is compared. Programs are written while the plain interpreter runs, so every shape is known.

    python tools/random_programs.py --seconds 600 --seed 0
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import copy
import dataclasses
import functools
import linecache
import logging
import random
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from graftwork import LanguageModel
from graftwork.tracing.errors import GraftworkError

VOCABULARY = 61
LAYERS = 3
WIDTH = 16
HEADS = 4

# -------------------------------------------------------------------- the models

_IDS: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 32,
    **_IDS,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_HEAD_DIM = {**_GROUPED, "head_dim": 8}
_GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 32,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    **_IDS,
}
_LIKE_LLAMA = {
    "blocks": "model.layers",
    "attn": "self_attn",
    "o": "self_attn.o_proj",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "up": "mlp.gate_proj",
    "down": "mlp.down_proj",
    "mlp": "mlp",
    "mid": "post_attention_layernorm",
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "interface": True,
}
_LIKE_GEMMA = {
    **_LIKE_LLAMA,
    "mid": "pre_feedforward_layernorm",
    "attn_out": "post_attention_layernorm",
    "mlp_out": "post_feedforward_layernorm",
}
_LIKE_GPTJ = {
    "blocks": "transformer.h",
    "mlp": "mlp",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """An architecture: the options of its configuration, and where its parts are."""

    prefix: str
    options: dict[str, Any]
    parts: dict[str, Any]


KINDS: dict[str, Kind] = {
    "gpt2": Kind(
        "gpt2",
        _GPT,
        {
            **_LIKE_GPTJ,
            "attn": "attn",
            "o": "attn.c_proj",
            "fused": ("attn.c_attn", "third"),
            "up": "mlp.c_fc",
            "down": "mlp.c_proj",
            "mid": "ln_2",
            "embed": "transformer.wte",
            "interface": True,
        },
    ),
    "llama": Kind("llama", _GROUPED, _LIKE_LLAMA),
    "mistral": Kind("mistral", {**_GROUPED, "sliding_window": 4}, _LIKE_LLAMA),
    "qwen2": Kind("qwen2", _GROUPED, _LIKE_LLAMA),
    "qwen3": Kind("qwen3", _HEAD_DIM, _LIKE_LLAMA),
    "gemma2": Kind(
        "gemma2", {**_HEAD_DIM, "sliding_window": 4, "query_pre_attn_scalar": 8}, _LIKE_GEMMA
    ),
    "gemma3": Kind(
        "gemma3_text", {**_HEAD_DIM, "sliding_window": 4, "query_pre_attn_scalar": 8}, _LIKE_GEMMA
    ),
    "gpt_neox": Kind(
        "gpt_neox",
        _DECODER,
        {
            "blocks": "gpt_neox.layers",
            "attn": "attention",
            "o": "attention.dense",
            "fused": ("attention.query_key_value", "third_of_head"),
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
            "mlp": "mlp",
            "embed": "gpt_neox.embed_in",
            "norm": "gpt_neox.final_layer_norm",
            "head": "lm_head",
            "interface": True,
        },
    ),
    "opt": Kind(
        "opt",
        {
            **_DECODER,
            "ffn_dim": 24,
            "word_embed_proj_dim": WIDTH,
            "pad_token_id": 1,
        },
        {
            "blocks": "model.decoder.layers",
            "attn": "self_attn",
            "o": "self_attn.out_proj",
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "up": "fc1",
            "down": "fc2",
            "flat": True,
            "embed": "model.decoder.embed_tokens",
            "norm": "model.decoder.final_layer_norm",
            "head": "lm_head",
            "interface": True,
        },
    ),
    "bloom": Kind(
        "bloom",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            **_IDS,
        },
        {
            **_LIKE_GPTJ,
            "attn": "self_attention",
            "o": "self_attention.dense",
            "fused": ("self_attention.query_key_value", "third_of_head"),
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
            "mlp_out": "mlp.dense_4h_to_h",
            "mid_out": "self_attention",
            "embed": "transformer.word_embeddings_layernorm",
        },
    ),
    "falcon": Kind(
        "falcon",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "alibi": False,
            "max_position_embeddings": 32,
            **_IDS,
        },
        {
            **_LIKE_GPTJ,
            "attn": "self_attention",
            "o": "self_attention.dense",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
            "embed": "transformer.word_embeddings",
        },
    ),
    "phi": Kind(
        "phi",
        _DECODER,
        {
            **_LIKE_LLAMA,
            "o": "self_attn.dense",
            "up": "mlp.fc1",
            "down": "mlp.fc2",
            "mid": None,
            "norm": "model.final_layernorm",
        },
    ),
    "gptj": Kind(
        "gptj",
        {**_GPT, "rotary_dim": 4},
        {
            **_LIKE_GPTJ,
            "attn": "attn",
            "o": "attn.out_proj",
            "q": "attn.q_proj",
            "k": "attn.k_proj",
            "v": "attn.v_proj",
            "up": "mlp.fc_in",
            "down": "mlp.fc_out",
            "embed": "transformer.wte",
        },
    ),
    "mamba": Kind(
        "mamba",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "state_size": 4,
            **_IDS,
        },
        {
            "blocks": "backbone.layers",
            "mixer": "mixer",
            "embed": "backbone.embeddings",
            "norm": "backbone.norm_f",
            "head": "lm_head",
        },
    ),
}


def _built(name: str, dtype: torch.dtype) -> Any:
    kind = KINDS[name]
    config = transformers.AutoConfig.for_model(kind.prefix, **kind.options)
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        # The usual start values are so small that a wrong position or mask would hardly show.
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module.to(dtype)


@functools.cache
def wrapped(name: str, dtype: torch.dtype) -> LanguageModel:
    """The model as graftwork has it."""
    return LanguageModel(_built(name, dtype))


@functools.cache
def plain(name: str, dtype: torch.dtype) -> Any:
    """Another copy, for plain hooks, whose attention calls the running interpreter."""
    module = copy.deepcopy(_built(name, dtype))
    if KINDS[name].parts.get("interface"):
        module.config._attn_implementation = "programs"
    return module


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by its formula, with the interpreter's sections at q, k, v and the pattern."""
    at = _RUNNING[-1]
    layer = module.layer_idx
    query = at.inside(layer, "q", query, "head_first")
    key = at.inside(layer, "k", key, "head_first")
    value = at.inside(layer, "v", value, "head_first")
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    pattern = at.inside(layer, "pattern", scores.softmax(-1), None)
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


_RUNNING: list[Plain] = []
ALL_ATTENTION_FUNCTIONS.register("programs", _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("programs", ALL_MASK_ATTENTION_FUNCTIONS["eager"])

# -------------------------------------------------------------------- the places


@dataclasses.dataclass(frozen=True)
class Site:
    """A place: where plain hooks find it, and how graftwork's names call it.

    Attributes:
        rank: order in the forward.
        path: of the module; "" is the model. None for what attention's interface has.
        port: "input" or "output".
        layout: how its tensor is seen.
        text: in a block.
        axes: "token" for [batch, token, …], "pattern" for [batch, head, query, key].
        in_place: the tensor goes on to be used beside this module, so it is edited in place.
    """

    name: str
    rank: int
    path: str | None
    port: str
    layout: str | None
    text: str
    axes: str = "token"
    in_place: bool = False


@functools.cache
def sites(name: str) -> dict[str, Site]:
    """All places of an architecture by name: "resid_post 1"."""
    parts = KINDS[name].parts
    heads = f"heads {KINDS[name].options.get('head_dim', WIDTH // HEADS)}"
    found: list[Site] = [
        Site("embed", 0, parts["embed"], "output", None, "model.embed"),
        Site("ln_final", 10_000, parts["norm"], "output", None, "model.{raw}"),
        Site("unembed_out", 10_001, parts["head"], "output", None, "model.unembed_out"),
        Site("logits", 10_002, "", "logits", None, "model.logits"),
    ]
    flat = "flat" if parts.get("flat") else None
    for i in range(LAYERS):
        block = f"{parts['blocks']}.{i}"

        def add(
            own: str,
            rank: int,
            path: str | None,
            port: str,
            layout: str | None = None,
            axes: str = "token",
            in_place: bool = False,
            text: str | None = None,
            block: str = block,
            i: int = i,
        ) -> None:
            whole = None if path is None else f"{block}.{path}" if path else block
            text = text or f"model.layers[{i}].{own}"
            rank += 100 * (i + 1)
            found.append(Site(f"{own} {i}", rank, whole, port, layout, text, axes, in_place))

        add("resid_pre", 0, "", "input")
        add("resid_post", 90, "", "output")
        if "attn" in parts:
            add("attn_in", 5, parts["attn"], "input", text="model.{raw}")
        if "mlp" in parts and not parts.get("flat"):
            add("mlp_in", 55, parts["mlp"], "input", text="model.{raw}")
        if "mixer" in parts:
            add("mixer_in", 10, parts["mixer"], "input")
            add("mixer_out", 20, parts["mixer"], "output")
            continue
        if "fused" in parts:
            path, layout = parts["fused"]
            for j, own in enumerate(("q_pre", "k_pre", "v_pre")):
                add(own, 10 + j, path, "output", f"{layout} {j}")
        elif "q" in parts:
            for j, own in enumerate("qkv"):
                add(f"{own}_pre", 10 + j, parts[own], "output", heads)
        if parts.get("interface"):
            for j, own in enumerate("qkv"):
                add(own, 20 + j, None, own, "head_first", "token" if own == "q" else "keys")
            add("pattern", 24, None, "pattern", None, "pattern")
        add("z", 30, parts["o"], "input", heads)
        add("head_out", 31, parts["o"], "heads_out", None)
        if name != "bloom":  # there it is the place of head_out
            add("attn_out", 40, parts.get("attn_out", parts["attn"]), "output")
        if parts.get("mid"):
            add("resid_mid", 50, parts["mid"], "input", None, in_place=True)
        if "mid_out" in parts:
            add("resid_mid", 50, parts["mid_out"], "output")
        add("mlp_pre", 60, parts["up"], "output", flat)
        add("mlp_post", 70, parts["down"], "input", flat)
        add("mlp_out", 80, parts.get("mlp_out", parts.get("mlp", parts["down"])), "output", flat)
    return {site.name: site for site in found}


#: At whose places a module may be left out.
_SKIPS = ("resid_pre", "attn_in", "mlp_in", "mixer_in")


def _is_inside(site: Site, path: str, kind: str) -> bool:
    """Whether a place is within what a skipped module computes."""
    if site.path is None:
        block = f"{KINDS[kind].parts['blocks']}.{site.name.split(' ')[1]}"
        return path == block or path == f"{block}.{KINDS[kind].parts['attn']}"
    return site.path.startswith(f"{path}.")


def _raw(path: str) -> str:
    """ "transformer.h.1.mlp" as it is typed: transformer.h[1].mlp."""
    return re.sub(r"\.(\d+)", r"[\1]", path)


def _seen(value: torch.Tensor, layout: str | None, rows: int) -> torch.Tensor:
    """A view of a tensor as a name has it."""
    if layout is None:
        return value
    kind, _, index = layout.partition(" ")
    if kind == "head_first":
        return value.transpose(1, 2)
    if kind == "flat":
        return value.view(rows, -1, value.shape[-1]) if value.ndim == 2 else value
    if kind == "heads":
        return value.unflatten(-1, (-1, int(index)))
    if kind == "third":
        return value.unflatten(-1, (3, HEADS, -1))[..., int(index), :, :]
    return value.unflatten(-1, (HEADS, 3, -1))[..., int(index), :]


# -------------------------------------------------------------------- programs


@dataclasses.dataclass
class Segment:
    """Lines for some steps: of one (`next`), of a loop that is recorded once (`with`), or of a loop in
    Python (`for`).

    Attributes:
        lines: by place.
    """

    form: str
    steps: list[int]
    lines: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    order: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Invoke:
    """A prompt's, or several prompts', lines.

    Attributes:
        stop: the step after which its run is stopped.
        stop_form: "first" (a loop before all lines), "cond" (decided there), "last" (a straight line).
    """

    rows: list[list[int]]
    segments: list[Segment] = dataclasses.field(default_factory=list)
    stop: int | None = None
    stop_form: str = "last"

    @property
    def ragged(self) -> bool:
        return len(self.rows) > 1


@dataclasses.dataclass
class Program:
    kind: str
    dtype: torch.dtype
    generates: bool
    steps: int
    options: dict[str, Any]
    plan: dict[str, bool] | None
    form: str
    invokes: list[Invoke]
    template: dict[str, list[str]]
    gradients: bool = False
    saves: dict[str, str] = dataclasses.field(default_factory=dict)
    loss: list[str] = dataclasses.field(default_factory=list)
    again: list[list[list[int]]] | None = None

    # ------------------------------------------------------------ as text

    def text(self) -> str:
        """As a user would type it."""
        known = sites(self.kind)
        out: list[str] = []
        if self.template:
            out.append("with model.edit() as edited:")
            body = [line for lines in self.template.values() for line in lines]
            out += self._indented(body, known, 1)
            out.append("model = edited")
        options = [f"{k}={v!r}" for k, v in self.options.items()]
        if self.generates:
            options.insert(0, f"max_new_tokens={self.steps}")
        if self.plan is not None:
            options.append(f"plan={self.plan!r}")
        call = "model.generate" if self.generates else "model.trace"
        if self.form == "session":
            out.append("with model.session():")
            for i, invoke in enumerate(self.invokes):
                out.append(f"    with {call}({', '.join([self._prompt(invoke), *options])}) as g:")
                out += self._body(i, invoke, known, 2, "g")
                out += self._ending(i, 2)
        elif self.form == "single":
            out.append(f"with {call}({', '.join([self._prompt(self.invokes[0]), *options])}) as g:")
            out += self._body(0, self.invokes[0], known, 1, "g")
            out += self._ending(0, 1)
        else:
            out.append(f"with {call}({', '.join(options)}) as g:")
            for i, invoke in enumerate(self.invokes):
                out.append(f"    with g.invoke({self._prompt(invoke)}) as invoker{i}:")
                out += self._body(i, invoke, known, 2, f"invoker{i}")
                out += self._ending(i, 2)
        if self.again is not None:
            prompts = ", ".join(repr(rows[0]) for rows in self.again)
            out.append(f"again = list(g.compile()({prompts}))")
        return "\n".join(out)

    def _ending(self, number: int, depth: int) -> list[str]:
        if number != len(self.invokes) - 1:
            return []
        return self._indented(self.loss, sites(self.kind), depth)

    @staticmethod
    def _prompt(invoke: Invoke) -> str:
        return repr(invoke.rows if invoke.ragged else invoke.rows[0])

    def _indented(self, lines: list[str], known: dict[str, Site], depth: int) -> list[str]:
        def place(match: re.Match[str]) -> str:
            name, raw = match[1].removesuffix("!"), match[1].endswith("!")
            site = known[name]
            if "{raw}" in site.text or raw:
                tail = "output" if site.port == "output" else "input"
                first = "[0]" if is_tuple(self.kind, site) else ""
                return f"model.{_raw(site.path or '')}.{tail}{first}"
            return site.text

        out = []
        for line in lines:
            line = re.sub(r"@([^@]+)@", place, line).replace("~[", ".t[")
            line = re.sub(r"~(\w+)\(\)", r".t.\1()", line)
            line = line.replace("with COND(", "with g.cond(").replace(
                "OTHERWISE()", "g.otherwise()"
            )
            line = re.sub(r"SKIP\('([^']+)', ", lambda m: f"model.{_raw(m[1])}.skip(", line)
            line = re.sub(
                r"CALL\((\w+), ", lambda m: f"model.{_raw(_PART(self.kind, m[1]))}(", line
            )
            line = re.sub(r"^(\s*)save\((\w+), (.*)\)$", r"\1\2 = (\3).save()", line, flags=re.M)
            line = re.sub(
                r"^(\s*)append\((\w+), (.*)\)$", r"\1\2.append((\3).save())", line, flags=re.M
            )
            out += ["    " * depth + one for one in line.split("\n")]
        return out

    def _body(
        self, number: int, invoke: Invoke, known: dict[str, Site], depth: int, invoker: str
    ) -> list[str]:
        out: list[str] = []
        step = 0
        if invoke.stop is not None and invoke.stop_form == "first":
            out.append("    " * depth + f"with g.iter[{invoke.stop}:{invoke.stop + 1}]:")
            out.append("    " * (depth + 1) + "g.stop()")
        if invoke.stop is not None and invoke.stop_form == "cond":
            out.append("    " * depth + "with g.all() as step:")
            out.append("    " * (depth + 1) + f"with g.cond(step == {invoke.stop}):")
            out.append("    " * (depth + 2) + "g.stop()")
        for segment in invoke.segments:
            if segment.form == "next" and not segment.order:
                continue
            lines = [line for name in segment.order for line in segment.lines.get(name, [])]
            if segment.form == "next":
                while step < segment.steps[0]:
                    out.append("    " * depth + f"{invoker}.next()")
                    step += 1
                out += self._indented(lines, known, depth)
                continue
            if not lines:
                continue
            first, last = segment.steps[0], segment.steps[-1] + 1
            loop = "all()" if len(segment.steps) == self.steps else f"iter[{first}:{last}]"
            if segment.form == "for":
                lists = sorted({m for one in lines for m in re.findall(r"append\((\w+),", one)})
                out += ["    " * depth + f"{one} = []" for one in lists]
                out.append("    " * depth + f"for _ in g.iter[{first}:{last}]:")
            else:
                out.append("    " * depth + f"with g.{loop}:")
            out += self._indented(lines, known, depth + 1)
        if invoke.stop is not None and invoke.stop_form == "last":
            out += ["    " * depth + f"{invoker}.next()"] * (invoke.stop - step)
            out.append("    " * depth + "g.stop()")
        return out or ["    " * depth + "pass"]


def _PART(kind: str, name: str) -> str:
    parts = KINDS[kind].parts
    return str({"ln_final": parts["norm"], "head": parts["head"]}[name])


@functools.cache
def is_tuple(kind: str, site: Site) -> bool:
    """Whether a module gives its tensor as the first of several."""
    if site.port != "output" or not site.path:
        return False
    seen: list[bool] = []
    module = _built(kind, torch.float32)
    module.get_submodule(site.path).register_forward_hook(
        lambda _m, _a, output: seen.append(isinstance(output, tuple))
    )
    with torch.no_grad():
        module(input_ids=torch.tensor([[3, 4]]))
    return seen[0]


# -------------------------------------------------------------------- the plain interpreter


class Holder:
    """What `@…@` stands for in the plain interpreter: read and assigned as `.value`."""

    def __init__(self, value: torch.Tensor, layout: str | None, rows: int) -> None:
        self._now, self._layout, self._rows = value, layout, rows

    @property
    def whole(self) -> torch.Tensor:
        return self._now

    @property
    def value(self) -> torch.Tensor:
        return _seen(self._now, self._layout, self._rows)

    @value.setter
    def value(self, new: torch.Tensor) -> None:
        if new is self._now:
            return
        here = self.value
        if (
            self._layout is not None
            and new.data_ptr() == here.data_ptr()
            and new.shape == here.shape
        ):
            return  # `x += 1`, which wrote in place
        if self._layout is None:
            self._now = new.clone()  # an assigned value is that of this line
        else:
            self._now = self._now.clone()
            self.value.copy_(new)


class Plain:
    """One prompt alone, by hooks on the plain model.

    Attributes:
        names: what lines have bound.
        saved: what they saved, [value, …] by name.
    """

    def __init__(
        self,
        program: Program,
        number: int,
        row: list[int],
        names: dict[str, Any],
        writer: Writer | None = None,
    ) -> None:
        self.program, self.number, self.row = program, number, row
        self.invoke = program.invokes[number]
        self.names = names
        self.writer = writer
        self.saved: dict[str, list[torch.Tensor]] = {}
        self.step = -1
        self.module = plain(program.kind, program.dtype)
        self.local: dict[int, dict[str, Any]] = {}
        self.watched: dict[str, tuple[torch.Tensor, str | None]] = {}
        #: What modules give in this step instead of what they compute.
        self.skipped: dict[str, torch.Tensor] = {}
        self.sites = sites(program.kind)
        self.output: torch.Tensor | None = None

    def run(self) -> None:
        handles = []
        by_path: dict[str, list[Site]] = {}
        for site in sorted(self.sites.values(), key=lambda one: one.rank):
            if site.path is not None:
                by_path.setdefault(site.path, []).append(site)
        for path in {site.path for site in self.sites.values() if site.name.startswith(_SKIPS)}:
            assert path is not None
            module = self.module.get_submodule(path)
            handles.append(module.register_forward_hook(functools.partial(self._skip, path)))
        for path, every in by_path.items():
            module = self.module.get_submodule(path) if path else self.module
            before = [site for site in every if site.port == "input"]
            after = [site for site in every if site.port != "input"]
            if before:
                handles.append(
                    module.register_forward_pre_hook(self._before(before), with_kwargs=True)
                )
            if any(site.port == "heads_out" for site in after):
                handles.append(module.register_forward_pre_hook(self._keep_z))
            if after:
                handles.append(module.register_forward_hook(self._after(after)))
        first = self.module.register_forward_pre_hook(self._next)
        handles.insert(0, first)
        _RUNNING.append(self)
        ids = torch.tensor([self.row])
        stop = self.invoke.stop
        steps = self.program.steps if stop is None else stop + 1
        try:
            with torch.set_grad_enabled(self.program.gradients):
                if self.program.generates:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        self.output = self.module.generate(
                            ids,
                            attention_mask=torch.ones_like(ids),
                            max_new_tokens=steps,
                            do_sample=False,
                            pad_token_id=0,
                            logits_to_keep=0,  # all of the prompt, as blocks that read logits have it
                            **self.program.options,
                        )
                else:
                    self.module(input_ids=ids, use_cache=False)
                if self.program.loss and self.number == len(self.program.invokes) - 1:
                    self._derive()
        finally:
            _RUNNING.pop()
            for handle in handles:
                handle.remove()

    def _next(self, _module: Any, _args: Any) -> None:
        self.step += 1
        self.local = {}
        self.skipped = {}

    def _skip(self, path: str, _module: Any, _args: Any, output: Any) -> Any:
        value = self.skipped.get(path)
        if value is None:
            return None
        return (value, *output[1:]) if isinstance(output, tuple) else value

    def _before(self, every: list[Site]) -> Callable[..., Any]:
        def hook(_module: Any, args: Any, options: Any) -> Any:
            args, options = list(args), dict(options)
            name = None if args else next(iter(options))
            value = args[0] if name is None else options[name]
            for site in every:
                value = self.at(site, value)
            if name is None:
                args[0] = value
            else:
                options[name] = value
            return tuple(args), options

        return hook

    def _keep_z(self, _module: Any, args: Any) -> None:
        self._z = args[0]

    def _after(self, every: list[Site]) -> Callable[..., Any]:
        def hook(module: Any, _args: Any, output: Any) -> Any:
            for site in every:
                if site.port == "logits":
                    output.logits = self.at(site, output.logits)
                elif site.port == "heads_out":
                    output = self._heads(site, module, output)
                elif isinstance(output, tuple):
                    output = (self.at(site, output[0]), *output[1:])
                else:
                    output = self.at(site, output)
            return output

        return hook

    def _heads(self, site: Site, module: Any, output: torch.Tensor) -> torch.Tensor:
        if not self.wanted(site):
            return output
        weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
        z = _seen(self._z, self.sites["z 0"].layout, 1)
        terms = torch.einsum("bthe,hed->bthd", z, weight.unflatten(0, (z.shape[2], -1)))
        edited = self.at(site, terms.clone())
        same = torch.equal(edited, terms) and not self.program.gradients
        return output if same else output + (edited - terms).sum(2)

    def inside(self, layer: int, own: str, value: torch.Tensor, layout: str | None) -> torch.Tensor:
        return self.at(self.sites[f"{own} {layer}"], value)

    def wanted(self, site: Site) -> bool:
        if self.writer is not None and self.writer.wants(site, self.step):
            return True
        return site.name in self.program.template or any(
            site.name in segment.lines and self.step in segment.steps
            for segment in self.invoke.segments
        )

    def at(self, site: Site, live: torch.Tensor) -> torch.Tensor:
        """Run the sections of a place."""
        if self.step < 0 or not self.wanted(site):
            return live
        rows = 1 if live.ndim < 3 else live.shape[0]
        grads = self.program.gradients
        # Names of the same memory are places of their own: each has a copy, which goes on.
        holder = Holder(live.clone(), site.layout, self.rows(live, rows))
        before = holder.whole
        version = before._version
        for line in self.program.template.get(site.name, []):
            self._line(line, holder, self.names, site)
        for segment in self.invoke.segments:
            if self.step not in segment.steps:
                continue
            names = self.names
            if segment.form != "next":
                names = self.local.setdefault(id(segment), {**self.names})
            if self.writer is not None:
                self.writer.write(self, segment, site, holder, names)
            else:
                for line in segment.lines.get(site.name, []):
                    self._line(line, holder, names, site)
            if not grads:
                self._settle()  # the text of the next segment stands below
        changed = holder.whole is not before or before._version != version
        if not changed and not grads:
            return live
        if site.in_place:
            live.copy_(holder.whole)
            return live
        # The model may write into what goes on; for a backward, what was read stays as it was.
        return holder.whole.clone() if grads else holder.whole

    def rows(self, live: torch.Tensor, rows: int) -> int:
        return int(self.program.options.get("num_beams", 1)) if live.ndim < 3 else rows

    def _settle(self) -> None:
        """The model goes on to change this memory; a block's values stay what they were."""
        for names in (self.names, *self.local.values()):
            for name, value in names.items():
                if isinstance(value, torch.Tensor) and name[0] == "v":
                    names[name] = value.clone()

    def _line(self, line: str, holder: Holder, names: dict[str, Any], site: Site) -> None:
        scope = {
            "torch": torch,
            "HERE": holder,
            "save": lambda name, value: self.saved.setdefault(name, []).append(
                value.detach().clone()
            ),
            "append": lambda name, value: self.saved.setdefault(name, []).append(
                value.detach().clone()
            ),
            "CALL": lambda part, value: self.module.get_submodule(part).forward(value),
            "SKIP": lambda path, value: self.skipped.__setitem__(path, value.clone()),
            **CONSTANTS(self.program.dtype),
        }
        text = re.sub(r"@[^@]+@", "HERE.value", line).replace("~[", "[:, ")
        text = re.sub(r"~(max|min)\(\)", r".\1(1).values", text)
        text = re.sub(r"~(\w+)\(\)", r".\1(1)", text)
        text = text.replace("with COND(", "if bool(").replace("with OTHERWISE()", "else")
        text = re.sub(
            r"CALL\((\w+), ", lambda m: f"CALL({_PART(self.program.kind, m[1])!r}, ", text
        )
        text = re.sub(r"(save|append)\((\w+), ", r"\1('\2', ", text)
        scope.update(names)
        keys = set(scope)
        exec(compile(text, "<plain>", "exec"), scope)
        for key, value in scope.items():
            if key[0] == "v" and (key not in keys or names.get(key) is not value):
                names[key] = value
                if self.program.gradients and "HERE.value" in text and key not in self.watched:
                    base = holder.whole
                    if base.requires_grad:
                        self.watched[key] = (base, site.layout)

    def _derive(self) -> None:
        lines: dict[str, list[str]] = {}
        for line in self.program.loss:
            name = re.search(r"(v\d+)\.grad", line)
            if name is not None:
                lines.setdefault(name[1], []).append(line)
        for name, every in lines.items():
            base, layout = self.watched[name]
            base.register_hook(functools.partial(self._gradient, every, name, layout))
        for line in self.program.loss:
            if ".grad" not in line:
                scope = {"torch": torch, **CONSTANTS(self.program.dtype), **self.names}
                exec(compile(line, "<plain>", "exec"), scope)
                self.names.update({k: v for k, v in scope.items() if k[0] == "v"})

    def _gradient(
        self, lines: list[str], name: str, layout: str | None, gradient: torch.Tensor
    ) -> torch.Tensor:
        """Save and edit a gradient when it arrives."""
        gradient = gradient.clone()
        seen = _seen(gradient, layout, 1)
        for line in lines:
            found = re.fullmatch(r"save\((\w+), .*\)", line)
            if found is not None:
                self.saved[found[1]] = [seen.clone()]
            else:
                text = re.sub("^GRAD = ", "GRAD[:] = ", line.replace(f"{name}.grad", "GRAD"))
                exec(compile(text, "<plain>", "exec"), {"GRAD": seen, "torch": torch})
        return gradient


@functools.cache
def CONSTANTS(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of the user's own."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 0.3

    return {
        **{f"V{n}": draw(n) for n in (4, 8, 16, 24, 61, 64)},
        **{f"W{n}": draw(n, n) for n in (4, 8, 16, 24)},
    }


# -------------------------------------------------------------------- the writer


@dataclasses.dataclass
class Variable:
    name: str
    axes: str  # "token", "pattern", "keys" or "none"
    site: str | None  # that it is a view of, while it may be edited
    raw: bool = False  # what a module gives: `[0]` of it is all of it
    shows: bool = False  # the memory of a place, which later lines may change


#: What lines there are, and how often.
_LINES = {
    "view": 3,
    "pure": 3,
    "binary": 2,
    "edit": 5,
    "assign": 1,
    "save": 3,
    "if": 0.4,
    "item": 0.3,
    "cond": 0.8,
    "skip": 0.8,
    "read": 0.7,
    "call": 0.6,
    "other": 1,
}


class Writer:
    """Draws the lines of a prompt's sections while the plain interpreter runs it."""

    def __init__(self, program: Program, rng: random.Random, number: int, past: list[str]) -> None:
        self.program, self.rng = program, rng
        self.number = number
        self.invoke = program.invokes[number]
        self.scopes: dict[int, list[Variable]] = {}
        #: Variables of earlier prompts.
        self.past = past
        self.busy: dict[tuple[int, str], bool] = {}
        self.plain: Plain
        self.density = rng.choice((0.05, 0.1, 0.2))

    def wants(self, site: Site, step: int) -> bool:
        if any(_is_inside(site, path, self.program.kind) for path in self.plain.skipped):
            return False
        known = self.busy.get((step, site.name))
        if known is None:
            covers = any(step in segment.steps for segment in self.invoke.segments)
            known = covers and (
                self.rng.random() < self.density
                or any(site.name in s.lines for s in self.invoke.segments if s.form != "next")
            )
            if site.name == "head_out" and step > 0 and self.rng.random() < 0.5:
                known = False
            if site.in_place and self.program.gradients:
                known = False
            self.busy[step, site.name] = known
        return known

    def write(
        self, at: Plain, segment: Segment, site: Site, holder: Holder, names: dict[str, Any]
    ) -> None:
        """Draw and run a section; in a loop that has one, run it again."""
        if segment.form != "next" and at.step > segment.steps[0]:
            for line in segment.lines.get(site.name, []):
                at._line(line, holder, names, site)
            return
        if len(self.invoke.segments) > 1 and self.rng.random() < 0.4:
            return
        if segment.form != "next" and site.axes in ("pattern", "keys"):
            return
        if self.is_too_late(segment, site):
            return
        self.segment, self.at, self.site, self.holder, self.names = segment, at, site, holder, names
        self.loop = segment.form != "next"
        self.careful = self.loop or self.invoke.ragged
        mine = self.scopes.setdefault(id(segment), [])
        # The text of a segment knows what stands above it.
        place = next(i for i, one in enumerate(self.invoke.segments) if one is segment)
        # Lines of a loop between them may change in place what was read above, at its step.
        loops = [i for i, one in enumerate(self.invoke.segments[:place]) if one.form != "next"]
        above = [
            one
            for i, other in enumerate(self.invoke.segments[:place])
            if other.form == "next" and i > max(loops, default=-1)
            for one in self.scopes.get(id(other), [])
        ]
        if segment.form != "next":
            # A loop may change in place what was read above, at its step.
            above = [one for one in above if not one.shows]
        visible = [*above, *mine]
        lines = segment.lines.setdefault(site.name, [])
        segment.order.append(site.name)
        own: list[Variable] = []

        def emit(line: str) -> bool:
            try:
                at._line(line, holder, names, site)
            except (RuntimeError, IndexError, ValueError, TypeError):
                return False
            lines.append(line)
            return True

        def bind(
            expression: str, axes: str, edits: str | None, raw: bool = False, shows: bool = True
        ) -> None:
            name = f"v{next(_COUNTER)}"
            if emit(f"{name} = {expression}"):
                if not names[name].numel() or not names[name].isfinite().all():
                    lines.pop()
                    return
                one = Variable(name, axes, edits, raw, shows)
                own.append(one)
                mine.append(one)
                visible.append(one)

        # The name resid_mid is the stream; what a module takes is its own argument alone.
        raw = site.layout is None and site.port in ("input", "output") and not site.in_place
        raw = raw and self.rng.random() < 0.3
        here = f"@{site.name}{'!' if raw and site.path else ''}@"
        bind(here, site.axes, site.name, "!" in here)
        for _ in range(self.rng.randint(1, 4)):
            kind = self.rng.choices(tuple(_LINES), tuple(_LINES.values()))[0]
            if not own:
                break
            one = self.rng.choice(own if self.rng.random() < 0.7 else visible or own)
            value = names.get(one.name)
            if not isinstance(value, torch.Tensor):
                continue
            if not value.ndim:
                kind = "save"
            if kind == "view":
                index = self.index(value, one.axes)
                if index == "[0]" and one.raw:
                    continue
                if self.invoke.ragged and one.axes == "pattern":
                    continue  # its last axis has the keys of the longest row
                axes = one.axes if index.startswith("[..., ") and value.ndim > 2 else "none"
                if self.invoke.ragged and axes == "none" and not index.startswith("~"):
                    continue
                edits = one.site if one in own else None
                bind(f"{one.name}{index}", axes, edits)
            elif kind == "read":
                bind(here, site.axes, site.name, "!" in here)
            elif kind == "pure":
                text, axes = self.pure(one, value)
                bind(text, axes, None, shows=axes == "none")
            elif kind == "binary":
                other = self.rng.choice(visible)
                text = self.binary(one, value, other, names.get(other.name))
                if text:
                    bind(text, one.axes, None, shows=False)
            elif kind == "call" and value.shape[-1] == WIDTH and value.ndim >= 2:
                bind(f"CALL(ln_final, {one.name})", one.axes, None)
            elif kind == "other" and self.past and not self.invoke.ragged:
                name = self.rng.choice(self.past)
                other_value = names.get(name)
                if isinstance(other_value, torch.Tensor) and one.site == site.name:
                    if other_value.shape == value.shape:
                        emit(f"{one.name}[:] = {name}")
                    elif other_value.ndim and other_value.shape[-1] == value.shape[-1]:
                        emit(f"{one.name}[..., :] += {name}.reshape(-1, {value.shape[-1]})[-1]")
                    else:
                        emit(f"{one.name}[:] *= {name}.mean().tanh()")
            elif kind == "save":
                self.save(one, emit)
            elif kind == "item" and self.may_ask():
                name = self.rng.choice(visible).name
                bind(
                    self.rng.choice(
                        (
                            f"{one.name} * {name}.mean().item()",
                            f"{one.name} + float({name}.abs().max() > 1)",
                            f"{one.name}[..., int({name}.reshape(-1)[:3].argmax()) :]",
                        )
                    ),
                    "none",
                    None,
                )
            elif kind == "cond" and not self.invoke.ragged and not self.program.gradients:
                if one.site == site.name and one in own:
                    self.branch(one, value, here, own, visible, emit)
            elif kind == "skip" and site.name.startswith(_SKIPS) and self.may_skip(segment, site):
                if value.shape == holder.value.shape and one.axes == site.axes:
                    scale = self.rng.choice(("", " * 0.5", " + 0.25"))
                    emit(f"SKIP('{site.path}', {one.name}{scale})")
            elif kind in ("edit", "if"):
                if one.site != site.name or one not in own or self.no_edits():
                    continue
                line = self.edit(one, value, here, visible, names)
                # A condition is asked at its line, so nothing above it may be recorded below.
                if kind == "if" and self.may_ask():
                    number = self.rng.choice(own)
                    condition = (
                        f"{number.name}.float().mean().item() > {self.rng.choice((-0.1, 0.1))}"
                    )
                    line = f"if {condition}:\n    {line}"
                if line and not (one.raw and "[0] =" in line):
                    emit(line)
            elif kind == "assign":
                fits = value.shape == holder.value.shape and one.axes == site.axes
                if fits and not self.no_edits():
                    scale = self.rng.choice(("* 0.5", "+ 0.25", "* -1.0"))
                    if self.invoke.ragged and one.axes == "pattern":
                        scale = "* 0.5"
                    if emit(f"{here} = {one.name} {scale}"):
                        # They stand for the old value: edits of them reach nothing else.
                        for old in own:
                            if self.rng.random() < 0.5:
                                old.site = None
        if own and self.rng.random() < 0.6:
            self.save(self.rng.choice(own), emit)
        for one in own:
            one.site = None
        if not lines:
            segment.lines.pop(site.name)
            segment.order.remove(site.name)

    def is_too_late(self, segment: Segment, site: Site) -> bool:
        """Whether what a computed name is computed from would be written below it in the text, and so
        does not belong to it, though it is there first in the forward."""
        own, _, layer = site.name.partition(" ")
        every = self.invoke.segments
        place = next(i for i, one in enumerate(every) if one is segment)
        above, below = every[:place], every[place + 1 :]
        others = {"z": above, "head_out": below}.get(own, [])
        near = f"{'head_out' if own == 'z' else 'z'} {layer}"
        return any(near in one.lines and set(one.steps) & set(segment.steps) for one in others)

    def may_ask(self) -> bool:
        """Whether a value may be asked for at a line: nothing above it may be recorded below."""
        straight = all(segment.form == "next" for segment in self.invoke.segments)
        return straight and not self.careful and self.program.again is None

    def may_skip(self, segment: Segment, site: Site) -> bool:
        """Whether nothing is read or written in what is left out."""
        assert site.path is not None
        known = sites(self.program.kind)
        used = list(self.program.template)
        for other in self.invoke.segments:
            if set(other.steps) & set(segment.steps):
                used += other.lines
        return not any(_is_inside(known[one], site.path, self.program.kind) for one in used)

    def branch(
        self,
        one: Variable,
        value: torch.Tensor,
        here: str,
        own: list[Variable],
        visible: list[Variable],
        emit: Callable[[str], bool],
    ) -> None:
        """Lines that depend on a value, recorded for both answers."""
        limit = self.rng.choice((-0.1, 0.1, 0.3))
        lines = [f"with COND({self.rng.choice(own).name}.float().mean() > {limit}):"]
        for other in (False, True):
            if other and self.rng.random() < 0.5:
                continue
            if other:
                lines.append("with OTHERWISE():")
            lines.append(f"    {self.edit(one, value, here, visible, self.names)}")
            # A compiled block gives its values by their order, so all of them must be there.
            saves = self.segment.form != "for" and self.program.again is None
            if saves and self.rng.random() < 0.4:
                name = f"s{next(_COUNTER)}"
                self.program.saves[name] = one.axes
                lines.append(f"    save({name}, {one.name})")
        emit("\n".join(lines))

    def no_edits(self) -> bool:
        return self.program.gradients and self.rng.random() < 0.7

    def save(self, one: Variable, emit: Callable[[str], bool]) -> None:
        name = f"s{next(_COUNTER)}"
        verb = "append" if self.segment.form == "for" else "save"
        if emit(f"{verb}({name}, {one.name})"):
            self.program.saves[name] = one.axes

    def index(self, value: torch.Tensor, axes: str) -> str:
        last = value.shape[-1]
        a = self.rng.randrange(last)
        b = self.rng.randint(a + 1, last)
        options = [f"[..., {a}:{b}]"]
        if self.careful:
            if axes == "token":
                options += ["~[-1]"] * 2
                if not self.loop and self.invoke.ragged:
                    least = min(map(len, self.invoke.rows))
                    if self.at.step == 0 and value.shape[1] > 1:
                        options += [f"~[{self.rng.randrange(least)}]", f"~[{-least}]"]
            return self.rng.choice(options)
        if value.ndim > 1 and axes == "token":
            size = value.shape[1]
            t = self.rng.randrange(-size, size)
            u = self.rng.randrange(size)
            w = self.rng.randint(u + 1, size)
            options += [f"[:, {t}]", f"~[{t}]", f"[:, {u}:{w}]", f"~[{u}:{w}]", f"~[[{u}, {t}]]"]
        if value.ndim > 2:
            options += ["[0]", f"[:, :, {self.rng.randrange(value.shape[2])}]"]
        if value.ndim > 3:
            options += [f"[:, {self.rng.randrange(value.shape[1])}, :]"]
        return self.rng.choice(options)

    def pure(self, one: Variable, value: torch.Tensor) -> tuple[str, str]:
        v, last = one.name, value.shape[-1]
        keep = [
            f"{v} * 0.5",
            f"{v}.tanh()",
            f"torch.sigmoid({v})",
            f"{v}.abs() + 0.1",
            f"-{v} + 1",
            # To another dtype: to its own one it is the same tensor in torch, and a copy here.
            f"{v}.{'float' if self.program.dtype == torch.float64 else 'double'}().to({v}.dtype)",
            f"torch.where({v} > 0, {v}, 0.1 * {v})",
        ]
        if one.axes != "pattern":
            keep += [f"{v}.softmax(-1)", f"{v} - {v}.mean(-1, keepdim=True)", f"{v}.flip(-1)"]
            if last in (4, 8, 16, 24):
                keep += [f"{v} @ W{last}", f"torch.nn.functional.linear({v}, W{last})"]
            if last in (4, 8, 16, 24, 61, 64):
                keep += [f"{v} * V{last}"]
        if one.axes == "token" and self.rng.random() < 0.15:
            return f"{v}~{self.rng.choice(('mean', 'sum', 'max', 'min'))}()", "none"
        if self.careful or self.rng.random() < 0.6:
            return self.rng.choice(keep), one.axes
        whole = [f"{v}.sum()", f"{v}.mean()", f"{v}.norm()", f"{v}.reshape(-1)", f"{v}.max()"]
        if value.ndim > 1:
            whole += [
                f"{v}.mean(1)",
                f"{v}.sum(0)",
                f"{v}.cumsum(1)",
                f"{v}.transpose(0, 1)",
                f"torch.cat([{v}, {v} * 2])",
                f"{v}.amax(-1)",
                f"{v}.unsqueeze(-1)",
                f"torch.stack([{v}.sum(), {v}.mean()])",
            ]
            whole.append(f"{v}.sum(1) / {v}.shape[1]")
        return self.rng.choice(whole), "none"

    def binary(self, one: Variable, value: torch.Tensor, other: Variable, second: Any) -> str:
        if not isinstance(second, torch.Tensor):
            return ""
        if second.shape == value.shape and second.dtype == value.dtype:
            sign = self.rng.choice("+-*")
            if self.careful and one.axes != other.axes:
                return ""
            return f"{one.name} {sign} {other.name}"
        if self.careful:
            return ""
        return self.rng.choice(
            (f"{one.name} + {other.name}.mean()", f"{one.name} * {other.name}.norm().tanh()")
        )

    def edit(
        self,
        one: Variable,
        value: torch.Tensor,
        here: str,
        visible: list[Variable],
        names: dict[str, Any],
    ) -> str:
        v, last = one.name, value.shape[-1]
        a = self.rng.randrange(last)
        numbers = ("0.0", "0.5", "-1.0", "0.25")
        n = self.rng.choice(numbers)
        options = [
            f"{v} *= {n}",
            f"{v}[..., {a}] = {n}",
            f"{v}[..., {a}:] += {n}",
            f"{v}.mul_(0.5)",
            f"{v}.add_(0.25)",
            f"{v}[:] = {v} * 0.5",
            f"{v}.clamp_(min=-0.5)",
        ]
        if last in (4, 8, 16, 24, 61, 64):
            options += [f"{v} += V{last}", f"{v}[..., :] = {v} * V{last}"]
        if one.axes == "token":
            options += [f"{v}~[-1] = {n}", f"{v}~[-1] += {n}", f"{here}~[-1] *= {n}"] * 2
            # Not the whole of a stream: a norm of equal numbers is noise.
            options += [f"{here}[..., 1:] = {n}", f"{here} *= 0.5", f"{here}[..., {a}] += {n}"]
        if not self.careful and value.ndim > 1:
            size = value.shape[1]
            t = self.rng.randrange(size)
            options += [
                f"{v}[:, {t}] = {n}",
                f"{v}[:, {t}:] *= 0.5",
                f"{v}[0] = {n}",
                f"{v}[{v} > 0] = {n}",
                f"{v}[:, [{t}, 0]] = {n}",
                f"{v}.copy_({v}.flip(0))",
            ]
            for other in self.rng.sample(visible, min(3, len(visible))):
                second = names.get(other.name)
                if isinstance(second, torch.Tensor):
                    if second.shape == value.shape:
                        options.append(f"{v}[:] = {other.name}")
                    if second.numel() == 1:
                        options.append(f"{v}[:, {t}] = {other.name}.reshape(())")
                    options.append(f"{v} += {other.name}.mean().tanh()")
        if self.invoke.ragged and one.axes == "pattern":
            # What is added to every entry is added to those of padding, too.
            options = [f"{v} *= {n}", f"{v}.mul_(0.5)", f"{v}[:] = {v} * 0.5"]
        return self.rng.choice(options)


def _counter() -> Iterator[int]:
    n = 0
    while True:
        n += 1
        yield n


_COUNTER = _counter()


def ordered(program: Program, segment: Segment, rng: random.Random) -> None:
    """Another order of sections in the text, in which everything is bound before it is used."""
    known = sites(program.kind)
    left = list(segment.order)
    bound = {
        name: {m for line in segment.lines[name] for m in re.findall(r"^\s*(v\d+) = ", line, re.M)}
        for name in left
    }
    used = {
        name: {m for line in segment.lines[name] for m in re.findall(r"v\d+", line)}
        for name in left
    }
    order: list[str] = []
    while left:

        def free(name: str) -> bool:
            site = known[name]
            for other in left:
                if other == name:
                    continue
                if used[name] & bound[other]:
                    return False
                place = known[other]
                near = place.rank // 100 == site.rank // 100 and place.rank < site.rank
                # What is computed from another place, or lies in the same tensor, keeps its order.
                if near and (site.name.startswith("head_out") or place.path == site.path):
                    return False
            return True

        order.append(rng.choice([name for name in left if free(name)]))
        left.remove(order[-1])
    segment.order = order


def write(seed: int, kinds: list[str] | None = None, small: bool = False) -> Program:
    """A random program, with what the plain interpreter found left in `program.found`."""
    rng = random.Random(seed)
    kind = rng.choice(kinds or list(KINDS))
    dtype = rng.choice((torch.float64, torch.float64, torch.float32))
    generates = rng.random() < 0.5
    steps = rng.randint(1, 4) if generates else 1
    options: dict[str, Any] = {}
    if generates and rng.random() < 0.15:
        options["num_beams"] = 2
    form = rng.choice(("invokes", "invokes", "invokes", "single", "session"))
    gradients = not generates and form != "session" and rng.random() < 0.2
    count = 1 if form == "single" else rng.randint(1, 2 if gradients or small else 4)
    shared = rng.random() < 0.4
    invokes: list[Invoke] = []
    for _ in range(count):
        rows = [[rng.randrange(3, VOCABULARY) for _ in range(rng.randint(2, 7))]]
        if shared and invokes and rng.random() < 0.8:
            rows = [invokes[0].rows[0]]
        # Gemma 2 in float64 has an eager softmax in float32: its rows of padding are NaN.
        if rng.random() < 0.15 and not gradients and (kind, dtype) != ("gemma2", torch.float64):
            rows = [
                [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(2, 6))]
                for _ in range(rng.randint(2, 3))
            ]
        segments: list[Segment] = []
        if generates:
            for step in range(steps):
                if rng.random() < 0.5:
                    segments.append(Segment("next", [step]))
            if rng.random() < 0.5 or not segments:
                first = rng.randrange(steps) if rng.random() < 0.5 else 0
                last = steps if rng.random() < 0.5 else rng.randint(first + 1, steps)
                loop = Segment(rng.choice(("with", "with", "for")), list(range(first, last)))
                segments.insert(rng.randint(0, len(segments)), loop)
            if rng.random() < 0.2:
                segments.append(Segment("with", list(range(steps))))
        else:
            segments.append(Segment("next", [0]))
        invokes.append(Invoke(rows, segments))
    for one in invokes:
        if rng.random() < 0.15 and not gradients and not options:
            last = max(step for segment in one.segments for step in segment.steps)
            one.stop, one.stop_form = rng.choice(((last, "last"), (rng.randrange(steps), "first")))
            if one.stop_form == "first" and generates:
                one.stop_form = rng.choice(("first", "cond"))
            elif not generates:
                one.stop, one.stop_form = 0, "last"
    plan = None
    if rng.random() < 0.5:
        names = "dead_code micro_batches prefix_reuse causal less_head stop memory".split()
        off = names if rng.random() < 0.3 else rng.sample(names, rng.randint(1, 3))
        plan = dict.fromkeys(off, False)
    program = Program(
        kind, dtype, generates, steps, options, plan, form, invokes, {}, gradients=gradients
    )
    if rng.random() < 0.15 and not gradients:
        known = [
            s
            for s in sites(kind).values()
            if s.axes == "token" and s.port not in ("logits", "heads_out")
        ]
        for site in sorted(rng.sample(known, rng.randint(1, 2)), key=lambda s: s.rank):
            program.template[site.name] = [
                rng.choice(
                    (
                        f"@{site.name}@ *= 0.5",
                        f"@{site.name}@[..., 1] = 0.25",
                        f"@{site.name}@~[-1] += 0.5",
                        f"@{site.name}@[:] = @{site.name}@ * 0.5 + 0.1",
                    )
                )
            ]
    if (
        not generates
        and form != "session"
        and not gradients
        and rng.random() < 0.15
        and not any(one.ragged for one in invokes)
    ):
        program.again = [
            [[rng.randrange(3, VOCABULARY) for _ in row] for row in one.rows] for one in invokes
        ]
    names: dict[str, Any] = {}
    past: list[str] = []
    found: list[list[Plain]] = []
    for number, invoke in enumerate(invokes):
        writer = Writer(program, rng, number, past)
        first = writer.plain = Plain(program, number, invoke.rows[0], names, writer)
        try:
            first.run()
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            # What was written at a loop's first step has no meaning at a later one.
            raise Invalid(f"{type(error).__name__}: {error}") from error
        for segment in invoke.segments:
            segment.order = list(dict.fromkeys(segment.order))
        found.append([first])
        if not invoke.ragged:
            for segment in invoke.segments:
                if segment.form == "next":
                    own = writer.scopes.get(id(segment), [])
                    # Lines of a loop may change in place what was read above.
                    loops = any(one.form != "next" for one in invoke.segments)
                    past += [one.name for one in own if not loops or not one.shows]
    if gradients:
        _write_loss(program, rng, names, found[-1][0])
    for invoke in invokes:
        for segment in invoke.segments:
            asks = any(
                re.search(r"^if |\.item\(|float\(v|int\(v", line)
                for one in segment.lines.values()
                for line in one
            )
            if rng.random() < 0.35 and not asks:
                ordered(program, segment, rng)
    return program


def _write_loss(program: Program, rng: random.Random, names: dict[str, Any], last: Plain) -> None:
    own = [
        name
        for section in last.invoke.segments[0].lines.values()
        for line in section
        for name in re.findall(r"^(v\d+) = ", line)
        if isinstance(names.get(name), torch.Tensor) and names[name].requires_grad
    ]
    if not own:
        program.gradients = False
        return
    sections = last.invoke.segments[0].lines
    end = own[-1]
    weight = rng.choice(("", ".tanh()", " * 0.3"))
    program.loss = [f"v{next(_COUNTER)} = ({end}{weight}).sum()"]
    program.loss.append(f"{program.loss[0].split(' ')[0]}.backward()")
    known = sites(program.kind)
    bases = {name: last.watched[name][0] for name in own if name in last.watched}
    found = torch.autograd.grad(
        names[end].sum(), list(bases.values()), retain_graph=True, allow_unused=True
    )
    reached = {name for name, one in zip(bases, found, strict=True) if one is not None}
    for name, lines in sections.items():
        read = re.fullmatch(r"(v\d+) = @[^@]+@", lines[0])
        assigned = any(re.search(r"^\s*@[^@]+@ = ", line, re.M) for line in lines)
        if not read or assigned or known[name].in_place or rng.random() < 0.5:
            continue
        if read[1] not in reached:
            continue
        for _ in range(rng.choice((1, 1, 2, 3))):
            gradient = f"{read[1]}.grad"
            line = rng.choice(
                (
                    f"{gradient} *= 0.5",
                    f"{gradient}[..., 0] = 0.25",
                    f"{gradient}[:] = {gradient} * -1.0",
                    f"{gradient} = {gradient} + 0.1",
                )
            )
            if rng.random() < 0.6:
                save = f"s{next(_COUNTER)}"
                program.saves[save] = "none"
                line = f"save({save}, {gradient})"
            program.loss.append(line)


# -------------------------------------------------------------------- both executions


class Invalid(Exception):
    """A program without meaning."""


def run_plain(program: Program, prompts: list[list[list[int]]] | None = None) -> list[list[Plain]]:
    """One prompt after the other, each row alone."""
    names: dict[str, Any] = {}
    found: list[list[Plain]] = []
    for number, invoke in enumerate(program.invokes):
        rows = invoke.rows if prompts is None else prompts[number]
        every = []
        for row in rows:
            one = Plain(program, number, row, dict(names) if invoke.ragged else names)
            try:
                one.run()
            except Exception as error:
                raise Invalid(f"{type(error).__name__}: {error}") from error
            every.append(one)
        found.append(every)
    return found


def run_block(program: Program) -> dict[str, Any]:
    """The program's text, run with graftwork."""
    text = program.text()
    name = f"<program {next(_COUNTER)}>"
    linecache.cache[name] = (len(text), None, [one + "\n" for one in text.split("\n")], name)
    scope: dict[str, Any] = {
        "torch": torch,
        "model": wrapped(program.kind, program.dtype),
        **CONSTANTS(program.dtype),
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(text, name, "exec"), scope)
    finally:
        linecache.cache.pop(name, None)
    return scope


def _plain_value(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain_value(one) for one in value]
    if not isinstance(value, torch.Tensor) and hasattr(value, "value"):
        return _plain_value(value.value)
    return value


def _off(mine: Any, theirs: torch.Tensor, dtype: torch.dtype) -> str:
    """How two values differ, or nothing."""
    if not isinstance(mine, torch.Tensor):
        return f"{type(mine).__name__} instead of a tensor"
    if mine.shape != theirs.shape:
        return f"shape {list(mine.shape)} instead of {list(theirs.shape)}"
    if mine.dtype != theirs.dtype and not mine.is_floating_point():
        return f"{mine.dtype} instead of {theirs.dtype}"
    if not mine.is_floating_point():
        return "" if torch.equal(mine, theirs) else f"{mine.tolist()} instead of {theirs.tolist()}"
    mine, theirs = mine.detach().double(), theirs.double()
    size = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
    off = float((mine - theirs).abs().max()) if theirs.numel() else 0.0
    allowed = 2e-5 if dtype == torch.float64 else 5e-3
    return "" if off <= allowed * size else f"off by {off:.3g} of {size:.3g}"


def _row(
    value: torch.Tensor, row: int, axes: str, theirs: torch.Tensor, beams: int
) -> torch.Tensor:
    """A prompt's own part of what an invoke of several rows gave."""
    part = value[row * beams : (row + 1) * beams]
    if axes == "token":
        return part[:, part.shape[1] - theirs.shape[1] :]
    if axes == "keys":
        return part[:, part.shape[1] - theirs.shape[1] :]
    if axes == "pattern":
        return part[..., part.shape[-2] - theirs.shape[-2] :, part.shape[-1] - theirs.shape[-1] :]
    return part


def compare(program: Program) -> str:
    """Run a program twice and say what differs; nothing where all is equal.

    Raises:
        Invalid: the program has no meaning.
    """
    expected = run_plain(program)
    try:
        scope = run_block(program)
    except NameError as error:
        raise Invalid(str(error)) from error
    except GraftworkError as error:
        said = ("would need padding", "counts the tokens of several rows together")
        if any(one in str(error) for one in said):
            raise Invalid(str(error)) from error
        return f"refused: {type(error).__name__}: {error}"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"crash: {type(error).__name__}: {error} ({last.filename}:{last.lineno})"
    found = _compare_saves(program, expected, scope)
    if found:
        return found
    if program.again is not None:
        values = dict(zip(_save_order(program), scope["again"], strict=False))
        found = _compare_saves(program, run_plain(program, program.again), values)
        if found:
            return f"compiled: {found}"
    return ""


def _save_order(program: Program) -> list[str]:
    return re.findall(r"^\s*(s\d+) = ", program.text(), re.M)


def _compare_saves(program: Program, expected: list[list[Plain]], scope: dict[str, Any]) -> str:
    beams = int(program.options.get("num_beams", 1))
    number = 0
    for at, (every, invoke) in enumerate(zip(expected, program.invokes, strict=True)):
        for row, one in enumerate(every):
            for name, values in one.saved.items():
                if name not in scope:
                    return f"{name} was not recorded"
                try:
                    mine = _plain_value(scope[name])
                    _ = [one.shape for one in mine] if isinstance(mine, list) else mine.shape
                except GraftworkError as error:
                    return f"{name} has no value: {type(error).__name__}: {error}"
                looped = isinstance(mine, list)
                mine = mine if looped else [mine]
                if looped and invoke.stop is not None:
                    # What does not depend on the step is there for steps that never come, too.
                    mine = mine[: len(values)]
                if len(mine) != len(values):
                    return f"{name} has {len(mine)} values instead of {len(values)}"
                for step, (value, wanted) in enumerate(zip(mine, values, strict=True)):
                    if invoke.ragged and isinstance(value, torch.Tensor):
                        value = _row(value, row, program.saves[name], wanted, beams)
                    off = _off(value, wanted, program.dtype)
                    if off:
                        where = f" (row {row})" if invoke.ragged else ""
                        return f"{name}{f'[{step}]' if looped else ''}{where} {off}"
            if program.generates and one.output is not None and program.form != "session":
                wanted = one.output[0]
                output = scope["g"].output
                mine = output[number][-len(wanted) :]
                if invoke.stop is not None:
                    holder = "g" if program.form == "single" else f"invoker{at}"
                    mine = scope[holder].output[row][-len(wanted) :]
                if not torch.equal(mine, wanted):
                    return f"ids of prompt {number}: {mine.tolist()} instead of {wanted.tolist()}"
            number += 1
    return ""


# -------------------------------------------------------------------- smaller programs


def _kind_of(message: str) -> str:
    """What must stay the same while a program is made smaller."""
    if message.startswith(("refused", "crash")):
        return re.sub(r"[\d\W]+", " ", message)[:60]
    return "value" if "off by" in message else re.sub(r"[\ds\[\]]+", " ", message)[:25]


def _fails(program: Program, kind: str) -> bool:
    try:
        message = compare(program)
    except Exception:  # a program without meaning is no smaller one
        return False
    return bool(message) and _kind_of(message) == kind


def reduced(program: Program, message: str, seconds: float = 60.0) -> Program:
    """A smaller program that fails in the same way."""
    kind = _kind_of(message)
    until = time.monotonic() + seconds
    changed = True
    while changed and time.monotonic() < until:
        changed = False
        for smaller in _smaller(program):
            if time.monotonic() > until:
                break
            if _fails(smaller, kind):
                program, changed = smaller, True
                break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    def copied() -> Program:
        return copy.deepcopy(program)

    if len(program.invokes) > 1:
        for i in reversed(range(len(program.invokes))):
            one = copied()
            del one.invokes[i]
            if one.again is not None:
                del one.again[i]
            yield one
    if program.template:
        for name in program.template:
            one = copied()
            del one.template[name]
            yield one
    if program.again is not None:
        one = copied()
        one.again = None
        yield one
    if program.plan is not None:
        one = copied()
        one.plan = None
        yield one
    if program.options:
        one = copied()
        one.options = {}
        yield one
    for i, invoke in enumerate(program.invokes):
        for r in range(len(invoke.rows)):
            if invoke.ragged:
                one = copied()
                del one.invokes[i].rows[r]
                yield one
        for j, segment in enumerate(invoke.segments):
            if len(invoke.segments) > 1:
                one = copied()
                del one.invokes[i].segments[j]
                yield one
            for name in segment.lines:
                one = copied()
                del one.invokes[i].segments[j].lines[name]
                one.invokes[i].segments[j].order.remove(name)
                yield one
    for i, invoke in enumerate(program.invokes):
        for j, segment in enumerate(invoke.segments):
            for name, lines in segment.lines.items():
                for k in reversed(range(len(lines))):
                    one = copied()
                    del one.invokes[i].segments[j].lines[name][k]
                    yield one
    for k in reversed(range(len(program.loss))):
        if program.loss[k].startswith("save"):
            one = copied()
            del one.loss[k]
            yield one
    if program.form == "session" and len(program.invokes) == 1:
        one = copied()
        one.form = "single"
        yield one
    if program.form == "invokes" and len(program.invokes) == 1:
        one = copied()
        one.form = "single"
        yield one
    for i, invoke in enumerate(program.invokes):
        if invoke.stop is not None:
            one = copied()
            one.invokes[i].stop = None
            yield one
    if program.steps > 1 and not any(
        program.steps - 1 in s.steps for invoke in program.invokes for s in invoke.segments
    ):
        one = copied()
        one.steps -= 1
        yield one


def shown(program: Program, message: str) -> str:
    head = f"model = LanguageModel(tiny {program.kind}, {program.dtype})"
    return f"{head}\n{program.text()}\n→ {message}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=None)
    parser.add_argument("--only", type=int, default=None, help="one seed, as it is")
    parser.add_argument("--reduce", type=float, default=60, help="seconds for making one smaller")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.getLogger("graftwork").setLevel(logging.ERROR)
    start, counts, seen = time.monotonic(), {"ran": 0, "invalid": 0, "wrong": 0}, {}
    seed = given.seed if given.only is None else given.only
    while time.monotonic() - start < given.seconds:
        try:
            program = write(seed, given.kinds)
            message = compare(program)
        except Invalid:
            counts["invalid"] += 1
            if given.only is not None:
                raise
            message = ""
        except Exception:
            print(f"seed {seed}: the writer failed\n{traceback.format_exc()}", flush=True)
            counts["invalid"] += 1
            message = ""
        else:
            counts["ran"] += 1
        if message:
            counts["wrong"] += 1
            kind = f"{program.kind if 'off by' in message else ''}{_kind_of(message)}"
            seen[kind] = seen.get(kind, 0) + 1
            if seen[kind] <= 3:
                small = reduced(program, message, given.reduce)
                try:
                    message = compare(small)
                except Exception as error:
                    message = f"{message} (now {error})"
                print(f"--- seed {seed}\n{shown(small, message)}\n", flush=True)
            else:
                print(f"--- seed {seed}: again {kind}", flush=True)
        if given.only is not None:
            print(shown(program, message))
            break
        seed += 1
        if counts["ran"] and counts["ran"] % 200 == 0:
            print(f"... {counts} up to seed {seed}", flush=True)
    for kind, count in sorted(seen.items()):
        print(f"{count} times: {kind}")
    print(f"{counts}, seeds {given.seed} to {seed - 1}", flush=True)
    sys.exit(1 if counts["wrong"] else 0)


if __name__ == "__main__":
    main()
