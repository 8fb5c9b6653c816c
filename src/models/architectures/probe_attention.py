"""Owns `AttentionProbe`: what one forward tells of the attention in a block. It goes either through
transformers' attention interface, or computes a softmax of its own, which is found among the torch
operations and then by the operation in the text that gave it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from ...envoy.derived import HEAD_OUT, derive
from ...envoy.names import Derived, Place, Spot
from ...intervention.source import listing
from ...tracing.errors import GraftworkError
from ..sizes import Sizes
from .architecture import (
    Features,
    Weight,
    head_first,
    head_input,
    heads,
    in_heads,
    kv_heads,
)
from .probe_layouts import (
    by_head_weight,
    found_layout,
    out_heads,
    shaped,
    split_heads,
    strided,
)
from .trial import SAME, Key, Trial

CALL = "source.attention_interface_0"
EAGER = "eager.attention_interface_0"
_SOFTMAX = ("_softmax", "_safe_softmax", "softmax")
_PRODUCTS = ("bmm", "baddbmm")


def softmax_of(trial: Trial, block: str) -> tuple[Key, str] | None:
    """The first pattern in a block, [..., token, token], and the module that computes it."""
    for key, made in trial.ledger.made.items():
        inside = [m for m in made.modules if m == block or m.startswith(f"{block}.")]
        if made.name in _SOFTMAX and inside:
            shape = trial.shape(key)
            if len(shape) in (3, 4) and shape[-2:] == (trial.tokens, trial.tokens):
                return key, inside[-1]
    return None


def core_of(tree: torch.nn.Module, block: str, path: str) -> str:
    """The innermost module around one that has linear modules below it: attention."""
    for above in _above(path, block):
        module = tree.get_submodule(above)
        weights = [getattr(child, "weight", None) for child in module.children()]
        if any(isinstance(w, torch.Tensor) and w.ndim == 2 for w in weights):
            return above
    return block


def inner_operations(trial: Trial, core: str) -> list[tuple[str, str]]:
    """What is written in the functions that a forward calls."""
    found: list[tuple[str, str]] = []
    for (path, prefix), function in trial.functions.items():
        if path == core:
            found.extend((path, f"{prefix}.source.{name}") for name in _names(function))
    return found


def eager_operations(tree: torch.nn.Module, core: str) -> list[tuple[str, str]]:
    """What is written in the eager attention of a module's file."""
    forward = inspect.unwrap(type(tree.get_submodule(core)).forward)
    eager = getattr(forward, "__globals__", {}).get("eager_attention_forward")
    return [(core, f"{EAGER}.source.{name}") for name in _names(eager)]


def _names(function: Any) -> list[str]:
    """The operations of a function that is not torch's."""
    plain = inspect.isfunction(function) or inspect.ismethod(function)
    if not plain or str(getattr(function, "__module__", "")).split(".")[0] == "torch":
        return []
    try:
        return listing(function, function.__name__).names
    except GraftworkError:
        return []


def find_attention(block: Any) -> AttentionProbe | None:
    """The attention of a block that a forward went through."""
    trial: Trial = block.trial
    for event in block.events:
        if event.port == f"{CALL}.inputs":
            out = trial.event(event.path, f"{CALL}.output")
            ends = set() if out is None else set(out.tensors.values())
            operands = {
                name: event.tensors[0, index]
                for index, name in enumerate("qkv", 1)
                if (0, index) in event.tensors
            }
            found = AttentionProbe(block, event.path, ends, operands)
            found.by_interface()
            return found
    pattern = softmax_of(trial, block.path)
    if pattern is None:
        return None
    core = core_of(block.whole.tree, block.path, pattern[1])
    return _own_attention(block, core, pattern[0])


def _own_attention(block: Any, core: str, pattern: Key) -> AttentionProbe | None:
    """Attention whose products and softmax are in the text of its module."""
    trial: Trial = block.trial
    made = trial.made(pattern)
    assert made is not None
    scores = made.takes[0]
    operands: dict[str, Key] = {}
    products = trial.back(scores, lambda k: _name(trial, k) in _PRODUCTS)
    if len(products) == 1:
        operation = trial.made(products[0])
        assert operation is not None
        operands["q"], operands["k"] = operation.takes[-2:]
    ends: set[Key] = set()
    for key, one in trial.ledger.made.items():
        if one.name == "bmm" and set(one.modules) & {core}:
            way = trial.between(one.takes[0], [pattern])
            if way is not None and not set(way) & {"bmm", "mm", "addmm"}:
                ends.add(key)
                operands.setdefault("v", one.takes[1])
    if not ends:
        return None
    found = AttentionProbe(block, core, ends, operands)
    found.by_softmax(pattern)
    return found


def _name(trial: Trial, key: Key) -> str:
    made = trial.made(key)
    return "" if made is None else made.name


class AttentionProbe:
    """The attention of one block.

    Attributes:
        core: the module that computes it.
        ends: its result, before the out-projection.
        operands: queries, keys and values as they are multiplied.
        parts: for each, the module that projects it, that module's output, and the operand.
        entered: what it takes.
        o: the out-projection: its path, what it takes and gives.
        places, weights, reasons: what is found, and why not what is not.
    """

    def __init__(self, block: Any, core: str, ends: set[Key], operands: dict[str, Key]) -> None:
        self.block, self.trial = block, block.trial
        self.core, self.ends, self.operands = core, ends, operands
        self.parts: dict[str, tuple[str, Key, Key]] = {}
        self.entered: Key | None = None
        self.o: tuple[str, Key, Key] | None = None
        self.places: dict[str, Place] = {}
        self.weights: dict[str, Weight] = {}
        self.reasons: dict[str, str] = {}
        self.interface = False

    # ---------------------------------------------------------------- where it is computed

    def by_interface(self) -> None:
        """Names of what goes through transformers' interface; scores are in the eager function."""
        self.interface = True
        below = self.block.below(self.core)
        for index, name in enumerate("qkv", 1):
            key = self.operands.get(name)
            if key is not None and len(self.trial.shape(key)) == 4:
                self.places[name] = Spot(below, f"{CALL}.inputs", (0, index), head_first)
        inner = f"{EAGER}.source"
        seen = {
            name: self.trial.first(self.core, f"{inner}.{name}.output")
            for name in ("softmax_0", "cat_0", "dropout_0")
        }
        softmax, joined, dropped = seen.values()
        if softmax is None or len(self.trial.shape(softmax)) != 4:
            reason = "no softmax was seen in its eager attention"
            self.reasons.update(scores=reason, pattern=reason)
        elif joined is not None and self.trial.between(softmax, [joined]) is not None:
            # A learned score is beside those of the keys: the last before the softmax.
            if dropped is not None:
                self.places["scores"] = Spot(below, f"{inner}.cat_0.input", (0,))
                self.places["pattern"] = Spot(below, f"{inner}.dropout_0.input")
                self.weights["attn.sinks"] = Weight(below, "sinks")
        else:
            self.places["scores"] = Spot(below, f"{inner}.softmax_0.input")
            self.places["pattern"] = Spot(below, f"{inner}.softmax_0.output")

    def by_softmax(self, pattern: Key) -> None:
        """Names in the text of the module's own attention."""
        trial = self.trial
        layout = split_heads if len(trial.shape(pattern)) == 3 else None
        softmax = trial.made(pattern)
        assert softmax is not None
        outputs = [
            (path, port)
            for path, port, way in trial.places(pattern)
            if self._inside(path) and port.endswith("output") and way == ()
        ]
        outputs.sort(key=lambda one: "softmax" not in one[1])
        if not outputs:
            reason = "its attention is computed by a fused function, which has no pattern"
            self.reasons.update(dict.fromkeys(("scores", "pattern"), reason))
        else:
            path, port = outputs[0]
            self.places["pattern"] = Spot(self.block.below(path), port, (), layout)
            before = trial.first(path, port.replace("output", "inputs"))
            if before is not None and trial.between(softmax.takes[0], [before]) == []:
                port = port[: -len("output")] + "input"
                self.places["scores"] = Spot(self.block.below(path), port, (), layout)

    def _inside(self, path: str) -> bool:
        return path == self.core or path.startswith(f"{self.core}.")

    def _operand_places(self, sizes: Sizes) -> None:
        """Operands of the products, as near to them as they have a place and all of their heads."""
        if self.interface:
            return
        b, t = self.trial.batch, self.trial.tokens
        for name, key in self.operands.items():
            count = sizes.n_heads if name == "q" else sizes.n_kv_heads
            shape = (b, t, count, sizes.d_head)
            found = None
            for one in self._chain(key):
                for path, port, way in self.trial.places(one):
                    fits, layout = found_layout(self.trial.tensor(one), shape)
                    plain = all(type(part) is int for part in way)
                    operation = port.startswith("source.")
                    if fits and plain and operation and self._inside(path) and found is None:
                        found = Spot(self.block.below(path), port, way, layout)
            if found is not None:
                self.places[name] = found
            else:
                self.reasons[name] = (
                    "what its attention multiplies has no place in the text of its module"
                )

    def _chain(self, key: Key) -> Iterator[Key]:
        while True:
            yield key
            made = self.trial.made(key)
            if made is None or made.name not in SAME or not made.takes:
                return
            key = made.takes[0]

    # ---------------------------------------------------------------- around it

    def look(self) -> None:
        """What it takes, its projections and its out-projection."""
        block, trial = self.block, self.trial
        for name, one in self.operands.items():
            linears, _ = block.linears_of(one)
            if len(linears) == 1:
                self.parts[name] = (block.linears[linears[0]], linears[0], one)
            elif len(linears) > 1:
                self.reasons[f"{name}_pre"] = "it is made of several projections: " + ", ".join(
                    f"`{block.below(block.linears[k])}`" for k in linears
                )
        entered = trial.first(self.parts["q"][0]) if "q" in self.parts else None
        took = trial.first(self.core)
        if entered is not None and took is not None and took != entered:
            if block.norm_before(took) is not None or took in block.streams():
                entered = took
        elif entered is None:
            entered = took
        if entered is not None:
            self._took(entered)
        for out, path in block.linears.items():
            given = trial.first(path)
            if given is not None:
                reads = trial.back(given, lambda k: k in self.ends or k in block.linears)
                if any(k in self.ends for k in reads):
                    self.o = (path, given, out)
                    break

    def _took(self, entered: Key) -> None:
        block = self.block
        self.entered = entered
        around = next(
            (p for p in _above(self.core, block.path) if self.trial.first(p) == entered), None
        )
        place = block.entered(around) if around else block.spot(entered)
        if place is not None:
            self.places["attn_in"] = place
        norm = block.norm_before(entered)
        if norm is not None:
            found = block.norm(norm)
            if found is not None:
                block.add_norm("ln1", found)

    def measured(self) -> dict[str, int]:
        """How many heads there are, and how many channels a head of the result has."""
        found: dict[str, int] = {}
        q, k, v = (self.operands.get(name) for name in "qkv")
        if v is not None and len(self.trial.shape(v)) in (3, 4):
            found["d_head"] = self.trial.shape(v)[-1]
        for name, key in (("n_heads", q), ("n_kv_heads", k)):
            shape: tuple[int, ...] = () if key is None else self.trial.shape(key)
            if len(shape) == 4:
                found[name] = shape[1]
            elif len(shape) == 3:
                found[name] = shape[0] // self.trial.batch
        return found

    # ---------------------------------------------------------------- with the sizes known

    def finish(self, sizes: Sizes) -> None:
        """Places that depend on how many heads there are."""
        block, trial = self.block, self.trial
        self._operand_places(sizes)
        self._projections(sizes)
        if self.o is not None:
            path, took, _ = self.o
            place = block.below(path)
            self.places["o_out"] = Spot(place, "output")
            if trial.shape(took)[-1] == sizes.n_heads * sizes.d_head:
                self.weights["attn.W_O"] = Weight(place, "weight", out_heads)
                self.weights["attn.b_O"] = Weight(place, "bias")
                self.places["head_out"] = _head_output(place)
                if trial.between(took, self.ends) == []:
                    self.places["z"] = block.entered(path, in_heads)
        if "z" not in self.places:
            self._result(sizes)
        norm = block.norms.get("ln1")
        for name in "qkv":
            if f"{name}_pre" in self.places and f"attn.W_{name.upper()}" in self.weights:
                self.places[f"{name}_input"] = head_input(name, norm)

    def _result(self, sizes: Sizes) -> None:
        """The result of each head where something is done to it before the out-projection."""
        shape = (self.trial.batch, self.trial.tokens, sizes.n_heads, sizes.d_head)
        if self.interface:
            result = self.trial.first(self.core, f"{CALL}.output")
            if result is not None and self.trial.shape(result) == shape:
                self.places["z"] = Spot(self.block.below(self.core), f"{CALL}.output", (0,))
            return
        for end in self.ends:
            for path, port, way in self.trial.places(end):
                fits, layout = found_layout(self.trial.tensor(end), shape)
                if fits and port.endswith(".output") and self._inside(path) and way == ():
                    self.places["z"] = Spot(self.block.below(path), port, (), layout)
                    return

    def _projections(self, sizes: Sizes) -> None:
        trial, block = self.trial, self.block
        for name, (path, out, used) in self.parts.items():
            count = sizes.n_heads if name == "q" else sizes.n_kv_heads
            below = block.below(path)
            features: Features | None = None
            if trial.shape(out)[-1] == count * sizes.d_head:
                features = heads if name == "q" else kv_heads
            else:
                features = self._strides(out, used, count, sizes.d_head)
            if features is None:
                why = f"how `{below}` holds its heads was not seen"
                self.reasons.setdefault(f"{name}_pre", why)
                continue
            flat = len(trial.shape(out)) == 2
            self.places[f"{name}_pre"] = Spot(below, "output", (), shaped(features, flat))
            if trial.first(path) == self.entered:
                letter = name.upper()
                self.weights[f"attn.W_{letter}"] = Weight(below, "weight", by_head_weight(features))
                self.weights[f"attn.b_{letter}"] = Weight(below, "bias", features)

    def _strides(self, out: Key, used: Key, count: int, d_head: int) -> Features | None:
        """Where the heads lie in the output of a fused projection: from the strides of views of it."""
        trial = self.trial
        whole = trial.tensor(out)
        storage, base = whole.untyped_storage()._cdata, whole.storage_offset()

        def is_heads(key: Key) -> bool:
            tensor = trial.tensor(key)
            if tensor.untyped_storage()._cdata != storage:
                return False
            shape = list(tensor.shape)
            return len(shape) == 4 and shape[-1] == d_head and count in shape[1:3]

        for key in trial.back(used, is_heads):
            tensor = trial.tensor(key)
            axis = 1 if tensor.shape[1] == count and tensor.shape[2] == trial.tokens else 2
            if tensor.shape[axis] != count or tensor.stride(-1) != 1:
                continue
            offset = int(tensor.storage_offset() - base)
            stride = d_head if count == 1 else int(tensor.stride(axis))
            if stride >= d_head and (stride == d_head or offset % stride + d_head <= stride):
                return strided(offset, count, stride, d_head)
        return None


def _above(path: str, top: str) -> Iterator[str]:
    """A path and those of the modules around it, up to `top`, which is left out."""
    while path != top and path.startswith(f"{top}."):
        yield path
        path = path.rpartition(".")[0]


def _head_output(o: str) -> Derived:
    """What each head adds: what the out-projection takes, by head, through its rows of W_O."""

    def read(here: Any, vocabulary: Any) -> Any:
        entered = in_heads(vocabulary.root.get(here.path(o)).input, vocabulary.sizes, here)
        weight = vocabulary.recorded_weight(here, "attn.W_O")
        return derive(HEAD_OUT, here("o_out"), entered, weight)

    return Derived(read, ("o_out",))
