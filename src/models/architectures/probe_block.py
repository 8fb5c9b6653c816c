"""Owns `BlockProbe`: what one forward tells of one block. It follows the residual stream from the
block's input to its output, and takes what is added on the way for attention, MLP or mixer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from ...envoy.names import Missing, Place, Spot
from ..sizes import Sizes
from .architecture import (
    Block,
    Features,
    Norm,
    Weight,
    expert_output,
    norm_places,
    unflattened,
)
from .probe_attention import AttentionProbe, find_attention
from .probe_layouts import every_other, half, norm_of, shaped
from .trial import SAME, Event, Key, Trial

CORE = (
    "resid_pre resid_mid resid_post attn_in attn_out q k v q_pre k_pre v_pre scores pattern z head_out "
    "o_out mlp_in mlp_out mlp_pre mlp_post mlp_up"
).split()
_ATTENTION = frozenset(
    "attn_in attn_out q k v q_pre k_pre v_pre scores pattern z head_out o_out".split()
)
_SCALES = frozenset({"mul", "div"})


@dataclasses.dataclass
class _Step:
    """Something that is done to the stream.

    Attributes:
        kind: "add", "norm" or "scale".
        before, after: the stream.
        other: what is added.
        path: the norm.
    """

    kind: str
    before: Key
    after: Key
    other: Key | None = None
    path: str = ""


class BlockProbe:
    """Looks at one block.

    Attributes:
        attention: None where there is none.
        places, weights, norms: what is found.
    """

    def __init__(self, whole: Any, path: str) -> None:
        self.whole, self.path = whole, path
        self.trial: Trial = whole.trial
        self.module = whole.tree.get_submodule(path)
        self.events: list[Event] = [e for e in self.trial.events if self._inside(e.path)]
        self.places: dict[str, Place] = {}
        self.weights: dict[str, Weight] = {}
        self.norms: dict[str, Norm] = {}
        self.parallel = self.post_norm = self.gated = False
        self.reasons: dict[str, str] = {}
        self.mlp_seen = self._looked = False
        self.linears = {
            e.tensors[()]: e.path
            for e in self.events
            if e.port == "output" and () in e.tensors and whole.is_linear(self.module_at(e.path))
        }
        self.attention: AttentionProbe | None = find_attention(self)
        self.pre: Key | None = whole.stream_in(path)
        self.post = self.trial.first(path, "output")
        self.steps = self._stream()

    def _inside(self, path: str) -> bool:
        return path == self.path or path.startswith(f"{self.path}.")

    def module_at(self, path: str) -> torch.nn.Module:
        found: torch.nn.Module = self.whole.tree.get_submodule(path)
        return found

    def below(self, path: str) -> str:
        return path[len(self.path) + 1 :]

    # ---------------------------------------------------------------- what is there

    def _is_stream(self, key: Key, memo: dict[Key, _Step | None]) -> bool:
        """True if a tensor is the stream: what the block took, or that with something added."""
        return key == self.pre or self._step(key, memo) is not None

    def _step(self, key: Key, memo: dict[Key, _Step | None]) -> _Step | None:
        if key in memo:
            return memo[key]
        memo[key] = None
        made = self.trial.made(key)
        if made is None:
            return None
        found = None
        norm = next(
            (
                path
                for path, port, way in self.trial.places(key)
                if port == "output" and way == () and self._inside(path) and self.is_norm(path)
            ),
            None,
        )
        if norm is not None:
            before = self.trial.first(norm)
            if before is not None and self._is_stream(before, memo):
                found = _Step("norm", before, key, None, norm)
        elif made.name == "add" and len(made.takes) == 2:
            one, other = made.takes
            streams = [self._is_stream(one, memo), self._is_stream(other, memo)]
            if streams == [True, False]:
                found = _Step("add", one, key, other)
            elif streams == [False, True]:
                found = _Step("add", other, key, one)
        elif made.name in SAME and made.takes:
            if self._is_stream(made.takes[0], memo):
                found = _Step("same", made.takes[0], key)
        elif made.name in _SCALES and made.takes:
            streams_in = [k for k in made.takes if self._is_stream(k, memo)]
            small = all(
                self.trial.tensor(k).numel() <= self.trial.shape(key)[-1]
                for k in made.takes
                if k not in streams_in
            )
            if len(streams_in) == 1 and small:
                found = _Step("scale", streams_in[0], key)
        memo[key] = found
        return found

    def _stream(self) -> list[_Step]:
        """What is done to the stream from the block's input to its output; empty if unknown."""
        if self.pre is None or self.post is None:
            return []
        memo: dict[Key, _Step | None] = {}
        steps: list[_Step] = []
        key = self.post
        while key != self.pre:
            step = self._step(key, memo)
            if step is None:
                return []
            if step.kind != "same":
                steps.insert(0, step)
            key = step.before
        return steps

    def is_norm(self, path: str) -> bool:
        module = self.module_at(path)
        names = type(module).__name__
        return not module._modules and ("Norm" in names or names.startswith("LN"))

    def norm(self, path: str) -> Norm | None:
        found = norm_of(self.module_at(path), self.below(path))
        if found is None:
            return None
        key = self.trial.first(path)
        flat = key is not None and len(self.trial.shape(key)) == 2
        return dataclasses.replace(found, flat=flat)

    # ---------------------------------------------------------------- places

    def spot(self, key: Key, layout: Any = None) -> Spot | None:
        """Where a tensor is: the output of a module, else of an operation, else what one takes.

        Of modules the outermost, and of those the first.
        """
        outputs: list[tuple[int, int, Spot]] = []
        operations: list[Spot] = []
        inputs: list[Spot] = []
        for number, (path, port, way) in enumerate(self.trial.places(key)):
            if not self._inside(path):
                continue
            below = self.below(path)
            if port == "output":
                if below and all(type(part) is int for part in way):
                    outputs.append((below.count("."), number, Spot(below, port, way, layout)))
            elif port.endswith(".output") and all(type(part) is int for part in way):
                operations.append(Spot(below, port, way, layout))
            elif port.endswith(".inputs") and way[:1] == (0,) and {*map(type, way)} == {int}:
                inputs.append(Spot(below, port, way, layout))
        if outputs:
            return min(outputs, key=lambda one: one[:2])[2]
        return next(iter([*operations, *inputs]), None)

    def entered(self, path: str, layout: Any = None) -> Spot:
        return Spot(self.below(path), "input", (), layout)

    # ---------------------------------------------------------------- the result

    def measured(self) -> dict[str, int]:
        """Sizes of heads and neurons as they are here."""
        found: dict[str, int] = {}
        if self.attention is not None:
            found.update(self.attention.measured())
        place = self.places.get("mlp_post")
        if isinstance(place, Spot):
            key = self.trial.first(f"{self.path}.{place.path}")
            if key is not None:
                found["d_mlp"] = self.trial.shape(key)[-1]
        return found

    def bare(self, attends: bool) -> Block:
        """What the sizes need to know."""
        self._look()
        return Block(
            {}, self.weights, self.norms, self.parallel, self.post_norm, self.gated, attends
        )

    def block(self, sizes: Sizes, attends: bool, positional: str) -> Block:
        self.sizes = sizes
        if self.attention is not None:
            self.attention.finish(sizes)
            self.places.update(self.attention.places)
            self.weights.update(self.attention.weights)
            self.reasons.update(self.attention.reasons)
            self._check_heads()
        self._norm_places()
        for name in CORE:
            self.places.setdefault(name, Missing(self._reason(name)))
        self._check_shapes()
        places = self.places
        for short, names in {
            "pre_attn": ("ln1_in", "attn_in"),
            "post_attn": ("attn_out",),
            "pre_mlp": ("ln2_in", "mlp_in"),
            "post_mlp": ("mlp_out",),
        }.items():
            places[short] = next(
                (places[n] for n in names if not isinstance(places.get(n, Missing("")), Missing)),
                places[names[-1]],
            )
        order = dict.fromkeys([*CORE, *places])
        return Block(
            {name: places[name] for name in order},
            self.weights,
            self.norms,
            self.parallel,
            self.post_norm,
            self.gated,
            attends,
        )

    def _reason(self, name: str) -> str:
        if self.attention is None and name in _ATTENTION:
            if self.steps and not self._weighs():
                return "this block has a mixer and no attention: use mixer_in and mixer_out"
            return "no attention that is known was seen in this block"
        if name.startswith("mlp") and not self.mlp_seen and name not in self.reasons:
            return "no MLP was seen in this block"
        return self.reasons.get(name, "it was not found in a trial forward of this block")

    def _weighs(self) -> bool:
        """True if there is a softmax by head, in whatever form."""
        return any(
            made.name.endswith("softmax") and len(self.trial.shape(key)) > 3
            for key, made in self.trial.ledger.made.items()
            if any(self._inside(path) for path in made.modules)
        )

    def _look(self) -> None:
        """Follow the stream: which part of the block adds what."""
        if self._looked:
            return
        self._looked = True
        places = self.places
        if self.attention is not None:
            self.attention.look()
        if self.pre is not None:
            places["resid_pre"] = Spot("", "input")
        if self.post is not None:
            event = self.trial.event(self.path, "output")
            whole = event is not None and () in event.tensors
            alone = whole or self.whole.model.is_block(self.module)
            places["resid_post"] = Spot("", "output", () if alone else (0,))
        adds = [step for step in self.steps if step.kind == "add"]
        kinds = [step.kind for step in self.steps]
        self.post_norm = "norm" in kinds[kinds.index("add") :] if "add" in kinds else False
        if not adds:
            why = "what leaves this block is not what entered it with parts added"
            self._none(why)
            return
        parts = [[(step, key) for key in self._branches(step.other)] for step in adds]
        if len(adds) == 1 and len(parts[0]) == 1:
            step, key = parts[0][0]
            self.reasons["resid_mid"] = "this block adds once, so nothing is in its middle"
            if self._from_attention(key):
                self._attends(step, key)
            else:
                self._mixer(step, key)
            return
        every = [one for each in parts for one in each]
        start = {self.pre, *self._ends()}
        if len(adds) <= 2 and all(self._reads_of(key) <= start for _, key in every):
            self._side_by_side(every)
        else:
            self._in_sequence(adds, parts)

    def _none(self, why: str) -> None:
        self.reasons.update(
            dict.fromkeys("resid_mid attn_out mlp_in mlp_out mlp_pre mlp_post mlp_up".split(), why)
        )

    def _attends(self, step: _Step, key: Key) -> None:
        place = self.spot(key)
        if place is not None:
            self.places["attn_out"] = place
        self._after("ln1_post", key, step)

    def _side_by_side(self, parts: list[tuple[_Step, Key]]) -> None:
        """Attention and MLP that read the same stream."""
        attention = [one for one in parts if self._from_attention(one[1])]
        others = [one for one in parts if not self._from_attention(one[1])]
        if len(parts) != 2 or len(attention) != 1:
            self._none(f"this block adds {len(parts)} parts to the stream, side by side")
            return
        self.parallel = True
        self.reasons["resid_mid"] = (
            "attention and MLP are parallel here: both read resid_pre, and nothing is between them"
        )
        self._attends(*attention[0])
        self._mlp(*others[0])

    def _in_sequence(self, adds: list[_Step], parts: list[list[tuple[_Step, Key]]]) -> None:
        """Attention or a mixer, or both, and then an MLP that reads what came of it."""
        first = self.steps.index(adds[0])
        scaled = (
            "the stream itself is scaled or normed in this block, so its parts do not sum to it"
        )
        attention = [one for one in parts[0] if self._from_attention(one[1])]
        others = [one for one in parts[0] if not self._from_attention(one[1])]
        if len(attention) > 1 or len(others) > 1:
            self._none(f"this block adds {len(parts[0])} parts to the stream at once")
            return
        if any(step.kind != "add" for step in self.steps[:first]):
            self.reasons.update(dict.fromkeys(("resid_mid", "attn_out", "mixer_out"), scaled))
        else:
            for one in attention:
                self._attends(*one)
            for one in others:
                self._mixer(*one)
            self._middle(adds)
        if len(parts[1]) == 1:
            self._mlp(*parts[1][0])
        end = None
        if any(step.kind == "scale" for step in self.steps[first:]):
            end = scaled
        elif len(parts) > 2 or len(parts[1]) > 1:
            end = "more is added behind the MLP, so resid_post is not resid_mid + mlp_out"
        if end is not None:
            self.places.pop("mlp_out", None)
            self.reasons["mlp_out"] = end

    def _branches(self, key: Key | None) -> list[Key]:
        """The parts that are added together before they are added to the stream."""
        if key is None:
            return []
        made = self.trial.made(key)
        if made is not None and made.name == "add" and len(made.takes) == 2:
            one, other = made.takes
            shapes = {self.trial.shape(k) for k in (one, other, key)}
            if len(shapes) == 1 and self._from_attention(one) != self._from_attention(other):
                return [one, other]
        return [key]

    def _ends(self) -> set[Key]:
        return set() if self.attention is None else self.attention.ends

    def streams(self) -> set[Key]:
        found = {step.before for step in self.steps} | {step.after for step in self.steps}
        return found if self.pre is None else found | {self.pre}

    def _from_attention(self, key: Key) -> bool:
        ends = self._ends()
        streams = self.streams()
        return any(k in ends for k in self.trial.back(key, lambda k: k in ends or k in streams))

    def linears_of(self, key: Key, skip: bool = False) -> tuple[list[Key], bool]:
        """The nearest outputs of linear modules that a tensor was made of; false if the stream, too."""
        streams = self.streams()
        found = self.trial.back(key, lambda k: k in self.linears or k in streams, skip)
        return [k for k in found if k in self.linears], not any(k in streams for k in found)

    def _container(self, entered: Key, inside: str) -> str | None:
        """The outermost module of the block around another that takes a tensor first."""
        parts = self.below(inside).split(".")
        for count in range(1, len(parts) + 1):
            path = ".".join([self.path, *parts[:count]])
            if self.trial.first(path) == entered:
                return path
        return None

    # ---------------------------------------------------------------- parts of the block

    def _middle(self, adds: list[_Step]) -> None:
        """The stream between attention and MLP."""
        middle = adds[0].after
        norms = [step for step in self.steps if step.kind == "norm"]
        for step in norms:
            if step.before == middle and step.after != self.post:
                middle = step.after
        place = self.spot(middle)
        if place is not None:
            self.places["resid_mid"] = place
        for name, key in (("ln1_post", adds[0].after), ("ln2_post", adds[-1].after)):
            for step in norms:
                found = self.norm(step.path) if step.before == key else None
                if found is not None:
                    self.add_norm(name, found)

    def _reads_of(self, key: Key) -> set[Key]:
        """The states of the stream that a part is made of."""
        streams = self.streams()
        ends = self._ends()
        return set(self.trial.back(key, lambda k: k in streams or k in ends))

    def add_norm(self, name: str, norm: Norm) -> None:
        self.norms[name] = norm
        self.weights[f"{name}.w"] = Weight(norm.path)
        self.weights[f"{name}.b"] = Weight(norm.path, "bias")

    def _norm_places(self) -> None:
        for name, norm in self.norms.items():
            self.places.update(norm_places(name, norm))

    def norm_before(self, key: Key) -> str | None:
        """The norm that makes a tensor of the stream."""
        source = self.trial.source_of(key)
        streams = self.streams()
        for path, port, way in [*self.trial.places(key), *self.trial.places(source)]:
            if port == "output" and way == () and self._inside(path) and self.is_norm(path):
                before = self.trial.first(path)
                if before is not None and (
                    before in streams or self.trial.source_of(before) in streams
                ):
                    return path
        return None

    def _after(self, name: str, key: Key, step: _Step) -> None:
        """The norm that a part passes before it is added."""
        seen = key
        while True:
            norm = next(
                (
                    path
                    for path, port, way in self.trial.places(seen)
                    if port == "output" and way == () and self._inside(path) and self.is_norm(path)
                ),
                None,
            )
            if norm is not None:
                found = self.norm(norm)
                if found is not None:
                    self.add_norm(name, found)
                return
            made = self.trial.made(seen)
            if made is None or made.name not in SAME | _SCALES or seen in self.linears:
                return
            seen = made.takes[0]

    def _mixer(self, step: _Step, key: Key) -> None:
        place = self.spot(key)
        if place is None:
            return
        self.places["mixer_out"] = place
        entered = self._mixer_input(key)
        if entered is not None:
            path, norm = entered
            self.places["mixer_in"] = self.entered(path)
            if norm is not None:
                found = self.norm(norm)
                if found is not None:
                    self.add_norm("ln1", found)

    def _mixer_input(self, key: Key) -> tuple[str, str | None] | None:
        """The outermost module that takes the (normed) stream and whose output leads to a part."""
        streams = self.streams()
        for event in self.events:
            if event.port != "inputs" or event.path == self.path or self.is_norm(event.path):
                continue
            took = self.trial.first(event.path)
            out = self.trial.first(event.path, "output")
            if took is None or out is None or self.trial.between(key, [out]) is None:
                continue
            norm = self.norm_before(took)
            if took in streams or norm is not None:
                return event.path, norm
        return None

    def _mlp(self, step: _Step, key: Key) -> None:
        self.mlp_seen = True
        place = self.spot(key)
        if place is not None:
            if len(self.trial.shape(key)) == 2:
                place = dataclasses.replace(place, layout=unflattened)
            self.places["mlp_out"] = place
        self._after("ln2_post", key, step)
        experts = self._experts(key)
        if experts is not None:
            self._mixture(experts)
            reason = "its neurons are those of experts, each of which sees some tokens"
        elif self._neurons(key):
            return
        else:
            reason = "its MLP is not one down-projection of what one or two up-projections make"
        self.reasons.update(mlp_pre=reason, mlp_post=reason, mlp_up=reason)
        if "mlp_in" not in self.places:
            entered = self._mixer_input(key)
            if entered is not None:
                self._mlp_input(entered[0], self.trial.first(entered[0]))
            elif place is not None and place.path and place.port == "output":
                path = f"{self.path}.{place.path}"
                module = self.module_at(path)
                if module._modules and not self.is_norm(path):
                    self._mlp_input(path, self.trial.first(path))

    def _neurons(self, key: Key) -> bool:
        """The projections of an MLP; false if it is no MLP of one down-projection."""
        places = self.places
        downs, alone = self.linears_of(key)
        if len(downs) != 1 or not alone:
            return False
        down = self.linears[downs[0]]
        inner = self.trial.first(down)
        assert inner is not None
        ups, alone = self.linears_of(inner)
        taken = {self.trial.first(self.linears[one]) for one in ups}
        if not ups or len(ups) > 2 or len(taken) != 1 or not alone:
            return False
        (entered_key,) = taken
        assert entered_key is not None
        flat = len(self.trial.shape(entered_key)) == 2
        container = self._container(entered_key, down) or self._container(
            entered_key, self.linears[ups[0]]
        )
        self._mlp_input(container or self.linears[ups[0]], entered_key)
        layout = unflattened if flat else None
        width = self.trial.shape(inner)[-1]
        self.weights["mlp.W_out"] = Weight(self.below(down))
        self.weights["mlp.b_out"] = Weight(self.below(down), "bias")
        places["mlp_post"] = self.entered(down, layout)
        parts = self._gate_and_up(inner, ups, width)
        if parts is None:
            why = "which of its up-projections is the gate was not seen"
            self.reasons.update(mlp_pre=why, mlp_up=why)
            return True
        gate, up = parts
        self.gated = gate is not None
        for one, weight, bias, name in (
            (gate, "mlp.W_gate", "mlp.b_gate", "mlp_pre"),
            (up, "mlp.W_in", "mlp.b_in", "mlp_pre" if gate is None else "mlp_up"),
        ):
            if one is None:
                continue
            path, features = one
            below = self.below(path)
            shown = layout if features is None else shaped(features, flat)
            places[name] = Spot(below, "output", (), shown)
            self.weights[weight] = Weight(below, "weight", features)
            self.weights[bias] = Weight(below, "bias", features)
        if gate is None:
            self.reasons["mlp_up"] = "its MLP has no gate"
        return True

    def _mlp_input(self, path: str, key: Key | None) -> None:
        if key is None:
            return
        flat = len(self.trial.shape(key)) == 2
        self.places["mlp_in"] = self.entered(path, unflattened if flat else None)
        norm = self.norm_before(key)
        if norm is not None:
            found = self.norm(norm)
            if found is not None and self.norms.get("ln1") != found:
                self.add_norm("ln2", found)

    def _gate_and_up(
        self, inner: Key, ups: list[Key], width: int
    ) -> tuple[tuple[str, Features | None] | None, tuple[str, Features | None]] | None:
        """The projection whose output is activated, if it is another, and the one beside it."""
        trial = self.trial
        if len(ups) == 1 and trial.shape(ups[0])[-1] == width:
            return None, (self.linears[ups[0]], None)
        product = self._product(inner, ups)
        if product is None:
            return None
        sides = [
            (bool([n for n in trial.between(k, ups) or []]), trial.back(k, lambda k: k in ups), k)
            for k in product
        ]
        if sides[0][0] == sides[1][0]:
            return None
        active, plain = sorted(sides, key=lambda side: not side[0])
        if len(ups) == 2:
            (gate,), (up,) = active[1], plain[1]
            return (self.linears[gate], None), (self.linears[up], None)
        found = []
        whole = trial.tensor(ups[0])
        for side in (active, plain):
            start = self._part_of(side[2], ups[0])
            if start is None:
                return None
            part = trial.tensor(start)
            offset = int(part.storage_offset() - whole.storage_offset())
            step = int(part.stride()[-1])
            if step == 2 and offset in (0, 1):
                found.append(every_other(offset))
            elif step == 1 and offset in (0, width) and part.shape[-1] == width:
                found.append(half(offset, width))
            else:
                return None
        path = self.linears[ups[0]]
        return (path, found[0]), (path, found[1])

    def _product(self, inner: Key, ups: list[Key]) -> tuple[Key, Key] | None:
        """The two factors of a gated MLP."""
        seen: set[Key] = set()
        waiting = [inner]
        while waiting:
            key = waiting.pop(0)
            made = self.trial.made(key)
            if made is None or key in seen or key in ups:
                continue
            seen.add(key)
            sides = [k for k in made.takes if self.trial.between(k, ups) is not None]
            if made.name == "mul" and len(sides) == 2:
                one, other = (set(self.trial.back(k, lambda k: k in ups)) for k in sides)
                if len(ups) == 1 or (len(one) == len(other) == 1 and one != other):
                    starts = [self._part_of(k, ups[0]) for k in sides]
                    if len(ups) == 2 or (None not in starts and starts[0] != starts[1]):
                        return sides[0], sides[1]
            waiting.extend(sides)
        return None

    def _part_of(self, key: Key, whole: Key) -> Key | None:
        """The view of a module's output that a tensor was made of."""
        storage = self.trial.tensor(whole).untyped_storage()._cdata

        def is_view(one: Key) -> bool:
            tensor = self.trial.tensor(one)
            return tensor.untyped_storage()._cdata == storage and one != whole

        found = [k for k in self.trial.back(key, is_view)]
        return found[0] if len(found) == 1 else None

    # ---------------------------------------------------------------- experts

    def _experts(self, key: Key) -> str | None:
        """The experts that a part was made by."""
        for event in self.events:
            module = self.module_at(event.path)
            outputs = event.tensors.values() if event.port == "output" else ()
            if "Experts" in type(module).__name__ and any(
                self.trial.between(key, [out]) is not None for out in outputs
            ):
                return event.path
        return None

    def _mixture(self, experts: str) -> None:
        places, trial = self.places, self.trial
        event = trial.event(experts, "inputs")
        assert event is not None
        below = self.below(experts)
        self.gated = hasattr(self.module_at(experts), "gate_up_proj")
        tensors = [event.tensors.get((0, i)) for i in range(3)]
        took = trial.first(experts)
        streams = self.streams()
        container = None
        for path in reversed(list(_above(experts, self.path))):
            key = trial.first(path)
            if key is not None and (key in streams or self.norm_before(key) is not None):
                container = container or path
        if container is not None:
            self._mlp_input(container, trial.first(container))
        if took is None or None in tensors:
            return
        n = trial.batch * trial.tokens
        entered, index, weights = (trial.shape(key) for key in tensors if key is not None)
        if len(entered) != 2 or index[:1] != (n,) or len(index) != 2 or weights != index:
            return
        first, second = (trial.tensor(key).dtype for key in tensors[1:] if key is not None)
        if first.is_floating_point or not second.is_floating_point:
            return
        places["experts_in"] = Spot(below, "input", (), unflattened)
        places["experts_out"] = Spot(below, "output", (), unflattened)
        places["expert_indices"] = Spot(below, "inputs", (0, 1), unflattened)
        places["expert_weights"] = Spot(below, "inputs", (0, 2), unflattened)
        places["expert_out"] = expert_output(below)
        self._router(tensors[2])

    def _router(self, weights: Key | None) -> None:
        """The scores of all experts."""
        if weights is None:
            return
        trial = self.trial
        linear = [
            e
            for e in self.events
            if e.port.endswith("linear_0.output") and e.port.startswith("source.")
        ]
        known = {key for e in linear for key in e.tensors.values()} | set(self.linears)
        streams = self.streams()
        found = [k for k in trial.back(weights, lambda k: k in known or k in streams) if k in known]
        if len(found) != 1:
            return
        flat = len(trial.shape(found[0])) == 2
        layout = unflattened if flat else None
        if found[0] in self.linears:
            below = self.below(self.linears[found[0]])
            self.places["router_logits"] = Spot(below, "output", (), layout)
            self.weights["mlp.router.W"] = Weight(below)
            self.weights["mlp.router.b"] = Weight(below, "bias")
            return
        event = next(e for e in linear if found[0] in e.tensors.values())
        self.places["router_logits"] = Spot(self.below(event.path), event.port, (), layout)

    # ---------------------------------------------------------------- shapes

    def _check_heads(self) -> None:
        """Sizes of heads are told once for a model: in layers with others, names are not there."""
        assert self.attention is not None
        seen = self.attention.measured()
        promised = (self.sizes.n_heads, self.sizes.d_head)
        here = (seen.get("n_heads", promised[0]), seen.get("d_head", promised[1]))
        if here == promised:
            return
        names = ["z", "head_out", "q_pre", "k_pre", "v_pre"]
        names += ["scores", "pattern"] if here[0] != promised[0] else []
        for name in names:
            self.places.pop(name, None)
            self.reasons[name] = heads_differ(here, promised)

    def _check_shapes(self) -> None:
        """Names whose shape is not what it promises are not there, and the reason says it."""
        sizes, trial = self.sizes, self.trial
        b, t = trial.batch, trial.tokens
        stream = (b, t, sizes.d_model)
        q, k = (b, t, sizes.n_heads, sizes.d_head), (b, t, sizes.n_kv_heads, sizes.d_head)
        wanted: dict[str, tuple[int | None, ...]] = {
            **dict.fromkeys(
                "resid_pre resid_mid resid_post attn_in attn_out mlp_in mlp_out o_out mixer_in "
                "mixer_out".split(),
                stream,
            ),
            **dict.fromkeys(("q", "q_pre", "z"), q),
            **dict.fromkeys(("k", "v", "k_pre", "v_pre"), k),
            **dict.fromkeys(("mlp_pre", "mlp_post", "mlp_up"), (b, t, sizes.d_mlp)),
        }
        for name, shape in wanted.items():
            place = self.places.get(name)
            if not isinstance(place, Spot):
                continue
            found = self._value(place)
            if found is None:
                self.places[name] = Missing("it was not found in a trial forward of this block")
                continue
            if len(found) != len(shape) or any(
                b is not None and a != b for a, b in zip(found, shape, strict=True)
            ):
                if len(found) == len(shape) == 4 and found[:2] == (b, t):
                    self.places[name] = Missing(heads_differ(found[2:], shape[2:]))
                    continue
                shown = ", ".join(map(str, found[2:] if found[:2] == (b, t) else found))
                self.places[name] = Missing(
                    f"its shape would be [batch, token, {shown}], and the name promises "
                    f"[batch, token, {', '.join(map(str, shape[2:]))}]"
                )
        gone = self.places.get("o_out")
        if isinstance(gone, Missing):
            self.places["head_out"] = gone

    def _value(self, spot: Spot) -> tuple[int, ...] | None:
        """The shape of what is at a place, in its layout."""
        path = f"{self.path}.{spot.path}" if spot.path else self.path
        if spot.port == "input":
            key = self.trial.first(path)
        elif spot.parts or spot.port.endswith("inputs"):
            event = self.trial.event(path, spot.port)
            key = None if event is None else event.tensors.get(spot.parts)
        else:
            key = self.trial.first(path, spot.port)
        if key is None:
            return None
        value = self.trial.tensor(key)
        if spot.layout is not None:
            pre = self.trial.tensor(self.pre) if self.pre is not None else None
            with torch.no_grad(), self.trial.mode:
                try:
                    value = spot.layout(value, self.sizes, lambda name: pre)
                except (RuntimeError, IndexError, ValueError):
                    return tuple(value.shape)
        return tuple(value.shape)


def _above(path: str, top: str) -> Iterator[str]:
    """A path and those of the modules around it, up to `top`, which is left out."""
    while path != top and path.startswith(f"{top}."):
        yield path
        path = path.rpartition(".")[0]


def heads_differ(here: Any, promised: Any) -> str:
    """Why a name by head is not there."""
    return (
        f"there are {here[0]} heads of {here[1]} channels here, and the name promises "
        f"{promised[0]} of {promised[1]}"
    )
