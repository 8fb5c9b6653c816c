"""Owns `probe`: the vocabulary of a model that nobody declared, found by looking at one forward of it.

The residual stream is followed through a block: what is added to it, in which order, tells attention
from MLP and where each name is. Nothing is concluded from the name of a module but what it is called
in messages. What was not seen is `Missing`, with the reason; what was seen is still to be checked on
the loaded weights, which `Vocabulary` does when a block first uses a name.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...envoy.derived import HEAD_OUT, derive
from ...envoy.names import Derived, Missing, Place, Spot
from ...intervention.source import listing
from ...tracing.errors import GraftworkError, UnavailableNameError
from ..sizes import Sizes, sizes_of
from .architecture import (
    Architecture,
    Block,
    Features,
    Norm,
    Weight,
    expert_output,
    grouped,
    head_first,
    head_input,
    heads,
    in_heads,
    kv_heads,
    norm_places,
    third,
    third_of_head,
    unflattened,
)
from .trial import SAME, Event, Key, Trial, run_trial

CORE = (
    "resid_pre resid_mid resid_post attn_in attn_out q k v q_pre k_pre v_pre scores pattern z head_out "
    "o_out mlp_in mlp_out mlp_pre mlp_post mlp_up"
).split()
_LINEAR = ("Linear", "Conv1D")
_SCALES = frozenset({"mul", "div"})


def probe(model: Any) -> Architecture:
    """The vocabulary of a language model, found by looking at it.

    Args:
        model: a `LanguageModel`; its weights are not loaded for it.

    Raises:
        UnavailableNameError: it has no list of blocks that hand a residual stream on, or its forward
            cannot be run on values without numbers.
    """
    return _Probe(model).architecture()


# -------------------------------------------------------------------- layouts


def by_head(value: Any, sizes: Any, here: Any) -> Any:
    """[(batch head), token, d_head] → [batch, token, head, d_head]."""
    return value.unflatten(0, (here("resid_pre").shape[0], -1)).transpose(1, 2)


def keys_by_head(value: Any, sizes: Any, here: Any) -> Any:
    """[(batch head), d_head, token] → [batch, token, head, d_head]."""
    return value.unflatten(0, (here("resid_pre").shape[0], -1)).permute(0, 3, 1, 2)


def keys_head_first(value: Any, sizes: Any, here: Any) -> Any:
    """[batch, head, d_head, token] → [batch, token, head, d_head]."""
    return value.permute(0, 3, 1, 2)


def split_heads(value: Any, sizes: Any, here: Any) -> Any:
    """[(batch head), query, key] → [batch, head, query, key]."""
    return value.unflatten(0, (here("resid_pre").shape[0], -1))


def strided(offset: int, count: int, stride: int, width: int) -> Features:
    """Heads that lie at a distance in the outputs of a module: [..., all] → [..., head, d_head]."""

    def features(value: Any, sizes: Any) -> Any:
        if stride == width:
            return value[..., offset : offset + count * width].unflatten(-1, (count, width))
        rows = value.shape[-1] // stride
        inside = offset % stride
        first = offset // stride
        whole = value[..., : rows * stride].unflatten(-1, (rows, stride))
        return whole[..., first : first + count, inside : inside + width]

    return features


def _shaped(features: Features, flat: bool) -> Any:
    def layout(value: Any, sizes: Any, here: Any) -> Any:
        return features(unflattened(value, sizes, here) if flat else value, sizes)

    return layout


def _by_head_weight(features: Features) -> Features:
    return lambda value, sizes: features(value, sizes).permute(1, 0, 2)


def _out_heads(value: Any, sizes: Any) -> Any:
    return value.unflatten(0, (sizes.n_heads, sizes.d_head))


def _half(offset: int, width: int) -> Features:
    return lambda value, sizes: value[..., offset : offset + width]


def _every_other(start: int) -> Features:
    return lambda value, sizes: value[..., start::2]


# -------------------------------------------------------------------- norms


def norm_of(module: torch.nn.Module, path: str) -> Norm | None:
    """What kind of normalization a module is, by trying it on numbers; None if it is another one."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = next(
        (
            float(getattr(module, name))
            for name in ("eps", "variance_epsilon", "epsilon")
            if isinstance(getattr(module, name, None), (int, float))
        ),
        0.0,
    )
    given = [p for p in module.parameters()]
    known = [p for p in (weight, bias) if p is not None]
    if len(given) != len(known) or any(p.ndim != 1 for p in given):
        return None
    with torch.no_grad():
        try:
            one = copy.deepcopy(module).to_empty(device="cpu").float()
        except (RuntimeError, TypeError, NotImplementedError):
            return None
        generator = torch.Generator().manual_seed(0)
        gain = shift = None
        width = 24
        for name, parameter in one.named_parameters():
            width = parameter.shape[0]
            parameter.copy_(torch.rand(width, generator=generator) + 0.5)
            if name == "weight":
                gain = parameter
            else:
                shift = parameter
        for size in (1.0, max(eps, 1e-8) ** 0.5):
            x = torch.randn(3, width, generator=generator) * size + 0.3 * size
            try:
                out = one(x)
            except Exception:  # whatever it wants besides
                return None
            if not isinstance(out, torch.Tensor) or out.shape != x.shape:
                return None
            fits = [
                (kind, offset)
                for kind in ("LN", "RMS")
                for offset in (0.0, 1.0)
                if torch.allclose(_normed(x, kind, offset, gain, shift, eps), out, 1e-3, 1e-4)
            ]
            if not fits:
                return None
    return Norm(path, *fits[0])


def _normed(x: Any, kind: str, offset: float, gain: Any, shift: Any, eps: float) -> Any:
    centered = x - x.mean(-1, keepdim=True) if kind == "LN" else x
    found = centered / (centered.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    if gain is not None:
        found = found * (gain + offset)
    return found if shift is None else found + shift


# -------------------------------------------------------------------- the model


class _Probe:
    """Looks at one model.

    Attributes:
        model, tree: the model, and its skeleton or module.
        layers, paths: of the list of blocks, and of each block.
        trial: what a forward of it did.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tree: torch.nn.Module = model.skeleton()
        self.kind = type(self.tree).__name__
        self.real = False
        self.size = self._trial_size()
        self.trial = self._try(())
        self.layers, self.paths = self._blocks()
        self.groups = self._groups()
        told = [
            path
            for block in self.groups
            for path, child in self.tree.named_modules()
            if path == block or path.startswith(f"{block}.")
            if not (self.is_linear(child) or type(child).__module__.startswith("torch."))
        ]
        self.trial = self._try(told)

    def _trial_size(self) -> tuple[int, int]:
        """Batch and tokens, which no other size of the model equals."""
        config = self.model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        used = {value for value in text.to_dict().values() if type(value) is int}
        batch = next(n for n in (3, 2, 5, 7, 9) if n not in used)
        tokens = next(n for n in (13, 17, 19, 11, 23, 29, 31) if n not in used and n < 60)
        return batch, tokens

    def _try(self, told: Any, inner: Any = ()) -> Trial:
        def inputs(batch: int, tokens: int) -> Any:
            args, kwargs = self.model._trial_inputs(batch, tokens, None, {"use_cache": False})
            if not self.real:
                return args, kwargs
            device = next(self.tree.parameters()).device
            return args, {
                name: torch.ones(v.shape, dtype=v.dtype, device=device)
                if isinstance(v, torch.Tensor)
                else v
                for name, v in kwargs.items()
            }

        try:
            return run_trial(self.tree, inputs, self.size, told, inner, fake=not self.real)
        except GraftworkError:
            raise
        except Exception as error:
            if not self.real and self.model.loaded:
                self.real, self.tree = True, self.model.load()
                return self._try(told, inner)
            reason = f"{type(error).__name__}: {error}".split("\n", 1)[0]
            raise UnavailableNameError(
                f"nothing is declared for `{self.model.config.model_type}`, and {self.kind} cannot be "
                f"looked at without numbers ({reason}): call `model.load()` before, or `register` a "
                "declaration, see graftwork.models.architectures."
            ) from error

    def is_linear(self, module: torch.nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return (
            not module._modules
            and isinstance(weight, torch.Tensor)
            and weight.ndim == 2
            and any(kind in type(module).__name__ for kind in _LINEAR)
        )

    def _blocks(self) -> tuple[str, list[str]]:
        """The longest list of modules of which each hands a tensor on to the next."""
        found: list[tuple[int, int, str, list[str]]] = []
        for path, parent in self.tree.named_modules():
            if not isinstance(parent, (torch.nn.ModuleList, torch.nn.ModuleDict)):
                continue
            paths = [f"{path}.{name}" for name in parent._modules]
            ends = [(self.stream_in(p), self.trial.first(p, "output")) for p in paths]
            if not paths or any(a is None or b is None for a, b in ends):
                continue
            handed = all(
                self.trial.between(after[0], [before[1]]) is not None  # type: ignore[arg-type, list-item]
                for before, after in itertools.pairwise(ends)
            )
            if handed:
                whole = sum(p.numel() for p in parent.parameters())
                found.append((whole, len(paths), path, paths))
        if not found:
            raise UnavailableNameError(
                f"nothing is declared for `{self.model.config.model_type}`, and {self.kind} has no "
                "list of blocks that hand a residual stream on: `register` a declaration of it, see "
                "graftwork.models.architectures."
            )
        _, _, path, paths = max(found)
        return path, paths

    def stream_in(self, path: str) -> Key | None:
        key = self.trial.first(path)
        if key is None or len(self.trial.shape(key)) != 3:
            return None
        return key

    def _groups(self) -> dict[str, list[int]]:
        """Layers that are built alike, by the path of the first of them."""
        config = self.model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        per_layer = {
            name: value
            for name, value in text.to_dict().items()
            if isinstance(value, (list, tuple)) and len(value) == len(self.paths) > 1
        }
        kinds: dict[Any, list[int]] = {}
        for index, path in enumerate(self.paths):
            block = self.tree.get_submodule(path)
            built = tuple(
                (name, type(child).__name__, tuple(tuple(p.shape) for p in child.parameters(False)))
                for name, child in block.named_modules()
            )
            kinds.setdefault(
                (built, repr([value[index] for value in per_layer.values()])), []
            ).append(index)
        return {self.paths[indices[0]]: indices for indices in kinds.values()}

    # ---------------------------------------------------------------- the whole

    def architecture(self) -> Architecture:
        own, weights, last, positional, head, scale = self._own()
        blocks: list[Block | None] = [None] * len(self.paths)
        seen = {path: _BlockProbe(self, path) for path in self.groups}
        attends = any(one.core is not None for one in seen.values())
        bare = Architecture(
            self.layers,
            tuple(one.bare(attends) for one in self._in_order(seen)),
            own,
            weights,
            last,
            positional,
            head,
            scale,
            True,
        )
        sizes = sizes_of(self.model.config, self.tree, bare, len(self.paths))
        for path, indices in self.groups.items():
            found = seen[path].block(sizes, attends, positional)
            for index in indices:
                blocks[index] = found
        whole = tuple(block for block in blocks if block is not None)
        if len(self.groups) == 1:
            whole = whole[:1]
        return dataclasses.replace(bare, blocks=whole)

    def _in_order(self, seen: dict[str, _BlockProbe]) -> Iterator[_BlockProbe]:
        first = {index: seen[path] for path, indices in self.groups.items() for index in indices}
        return (first[index] for index in range(len(self.paths)))

    def _path_of(self, module: Any) -> str | None:
        return next((path for path, one in self.tree.named_modules() if one is module), None)

    def _own(self) -> tuple[dict[str, Place], dict[str, Weight], Norm | None, str, str, float]:
        trial, tree = self.trial, self.tree
        places: dict[str, Place] = {}
        weights: dict[str, Weight] = {}
        embed = self._path_of(tree.get_input_embeddings())  # type: ignore[operator]
        head = self._path_of(tree.get_output_embeddings())  # type: ignore[operator]
        embedded = trial.first(embed, "output") if embed else None
        if embed and embedded and len(trial.shape(embedded)) == 3:
            places["embed"] = Spot(embed)
            weights["embed.W_E"] = Weight(embed)
        else:
            places["embed"] = Missing("its input embedding was not called in a trial")
        begin = self.stream_in(self.paths[0])
        positional, table = self._positions(embed, begin)
        if table is not None:
            weights["pos_embed.W_pos"] = Weight(table)
            places["pos_embed"] = Spot(table)
        else:
            places["pos_embed"] = Missing(
                f"its positions are {positional}: no vector of a position is added"
            )
        scale = self._scale(embedded, begin)
        places["logits"] = Spot("", "output", ("logits",))
        entered = trial.first(head) if head else None
        if head and entered:
            places["unembed_in"] = Spot(head, "input")
            places["unembed_out"] = Spot(head)
            weights["unembed.W_U"] = Weight(head)
            weights["unembed.b_U"] = Weight(head, "bias")
        else:
            gone = Missing("its unembedding was not called as a module in a trial")
            places["unembed_in"] = places["unembed_out"] = gone
        last = None
        left = trial.first(self.paths[-1], "output")
        if left and entered:
            for path, child in tree.named_modules():
                if not any(path.startswith(f"{one}.") for one in self.paths):
                    key, out = trial.first(path), trial.first(path, "output")
                    if key and out and trial.source_of(key) == trial.source_of(left):
                        way = trial.between(entered, [out])
                        found = norm_of(child, path) if way is not None and path else None
                        last = found or last
        if last is not None:
            places["ln_final"] = Spot(last.path)
            places.update(norm_places("ln_final", last))
            weights["ln_final.w"] = Weight(last.path)
            weights["ln_final.b"] = Weight(last.path, "bias")
        else:
            places["ln_final"] = Missing(
                "no norm of a known kind was found between the last block and the unembedding"
            )
        return places, weights, last, positional, head or "lm_head", scale

    def _positions(self, embed: str | None, begin: Key | None) -> tuple[str, str | None]:
        trial = self.trial
        for path, child in self.tree.named_modules():
            weight = getattr(child, "weight", None)
            out = trial.first(path, "output") if path and path != embed else None
            inside = any(path.startswith(f"{one}.") for one in self.paths)
            table = isinstance(weight, torch.Tensor) and weight.ndim == 2 and not inside
            if not table or out is None or begin is None or self.is_linear(child):
                continue
            assert isinstance(weight, torch.Tensor)
            config = self.model.config.get_text_config()
            rows = getattr(config, "max_position_embeddings", None)
            if not isinstance(rows, int) or not rows <= weight.shape[0] <= rows + 4:
                continue
            way = trial.between(begin, [out])
            if way is not None and not {"mm", "addmm", "bmm"} & set(way):
                return "standard", path
        names = {made.name for made in trial.ledger.made.values()}
        kinds = " ".join(type(child).__name__ for child in self.tree.modules()).lower()
        text = inspect.getsource(inspect.getmodule(type(self.tree)) or type(self.tree)).lower()
        if "alibi" in text and "rotary" not in kinds:
            return "alibi", None
        if "cos" in names and "sin" in names:
            return "rotary", None
        if "relative" in text or "rel_pos" in text:
            return "relative", None
        if "rotary" in text:
            return "rotary", None
        return "none", None

    def _scale(self, embedded: Key | None, begin: Key | None) -> float:
        """What embeddings are multiplied by before the first block, where a number says it."""
        if embedded is None or begin is None:
            return 1.0
        module = self.tree.get_input_embeddings()  # type: ignore[operator]
        own = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
        scale = float(own) if isinstance(own, (int, float)) else 1.0
        key = begin
        while key != embedded:
            made = self.trial.made(key)
            if made is None or not made.takes:
                return 1.0
            if made.name == "mul" and self.trial.between(made.takes[0], [embedded]) is not None:
                factor = next((n for n in made.numbers if type(n) is float), None)
                if factor is None and len(made.takes) > 1:
                    constant = getattr(self.trial.tensor(made.takes[1]), "constant", None)
                    factor = None if constant is None else float(constant)
                scale *= factor if factor is not None else 1.0
            follows = [k for k in made.takes if self.trial.between(k, [embedded]) is not None]
            if not follows:
                return scale
            key = follows[0]
        return scale


# -------------------------------------------------------------------- a block


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


class _BlockProbe:
    """Looks at one block.

    Attributes:
        core: the module that computes attention; None where there is none.
        places, weights, norms: what is found.
    """

    def __init__(self, whole: _Probe, path: str) -> None:
        self.whole, self.path, self.trial = whole, path, whole.trial
        self.module = whole.tree.get_submodule(path)
        self.events = [e for e in self.trial.events if self._inside(e.path)]
        self.places: dict[str, Place] = {}
        self.weights: dict[str, Weight] = {}
        self.norms: dict[str, Norm] = {}
        self.parallel = self.post_norm = self.gated = False
        self.reasons: dict[str, str] = {}
        self.mlp_seen = self._looked = False
        self.attn_in: Key | None = None
        self.o: tuple[str, Key, Key] | None = None
        self.parts: dict[str, tuple[str, Key, Key]] = {}
        self.linears = {
            e.tensors[()]: e.path
            for e in self.events
            if e.port == "output" and () in e.tensors and whole.is_linear(self._module(e.path))
        }
        self.core, self.call = self._attention()
        self.pre = whole.stream_in(path)
        self.post = self.trial.first(path, "output")
        self.steps = self._stream()

    def _inside(self, path: str) -> bool:
        return path == self.path or path.startswith(f"{self.path}.")

    def _module(self, path: str) -> torch.nn.Module:
        return self.whole.tree.get_submodule(path)

    def below(self, path: str) -> str:
        return path[len(self.path) + 1 :]

    # ---------------------------------------------------------------- what is there

    def _attention(self) -> tuple[str | None, Event | None]:
        for event in self.events:
            if event.port == "source.attention_interface_0.inputs":
                return event.path, event
        return None, None

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
                if port == "output" and way == () and self._inside(path) and self._is_norm(path)
            ),
            None,
        )
        if norm is not None:
            before = self.trial.first(norm)
            if before is not None and before != self.pre and self._is_stream(before, memo):
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

    def _is_norm(self, path: str) -> bool:
        module = self._module(path)
        names = type(module).__name__
        return not module._modules and ("Norm" in names or names.startswith("LN"))

    def norm(self, path: str) -> Norm | None:
        found = norm_of(self._module(path), self.below(path))
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

    def bare(self, attends: bool) -> Block:
        """What the sizes need to know."""
        self._look()
        return Block(
            {}, self.weights, self.norms, self.parallel, self.post_norm, self.gated, attends
        )

    def block(self, sizes: Sizes, attends: bool, positional: str) -> Block:
        self.sizes = sizes
        self._attention_places()
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
        if self.core is None and name in (
            "attn_in attn_out q k v q_pre k_pre v_pre scores pattern z head_out o_out".split()
        ):
            if "mixer_out" in self.places:
                return "this block has a mixer and no attention: use mixer_in and mixer_out"
            return "no attention that is known was seen in this block"
        if name.startswith("mlp") and not self.mlp_seen:
            return "no MLP was seen in this block"
        return self.reasons.get(name, "it was not found in a trial forward of this block")

    def _look(self) -> None:
        """Follow the stream: which part of the block adds what."""
        if self._looked:
            return
        self._looked = True
        places = self.places
        if self.pre is not None:
            places["resid_pre"] = Spot("", "input")
        if self.post is not None:
            places["resid_post"] = Spot("", "output")
        adds = [step for step in self.steps if step.kind == "add"]
        scaled = any(step.kind == "scale" for step in self.steps)
        self.post_norm = any(step.kind == "norm" for step in self.steps)
        if not self.steps:
            why = "what leaves this block is not what entered it with parts added"
            for name in ("resid_mid", "attn_out", "mlp_out"):
                self.reasons[name] = why
            self._core_parts(None)
            return
        branches = [(step, self._branches(step.other)) for step in adds if step.other]
        flat = [(step, key) for step, keys in branches for key in keys]
        attention = [(s, k) for s, k in flat if self._from_attention(k)]
        others = [(s, k) for s, k in flat if not self._from_attention(k)]
        if len(flat) > 2:
            why = f"this block adds {len(flat)} parts to the stream"
            for name in ("resid_mid", "attn_out", "mlp_out"):
                self.reasons[name] = why
            self._core_parts(None)
            return
        if len(attention) == 1:
            step, key = attention[0]
            place = self.spot(key)
            if place is not None and not scaled:
                places["attn_out"] = place
            self._core_parts(key)
            self._after("ln1_post", key, step)
            rest = others
        elif len(flat) == 2 or (flat and not self._linears_of(flat[0][1])[1]):
            step, key = flat[0]
            rest = flat[1:]
            self._mixer(step, key, bool(scaled))
            self._core_parts(None)
        else:
            rest = flat
            self._core_parts(None)
        if len(flat) == 1 and not rest:
            self.reasons["resid_mid"] = "this block adds once, so nothing is in its middle"
        if len(flat) == 1 and rest:
            step, key = rest[0]
            self._mixer(step, key, bool(scaled))
            self.reasons["resid_mid"] = "this block adds once, so nothing is in its middle"
            return
        if rest:
            step, key = rest[0]
            self.mlp_seen = True
            self._mlp(step, key, bool(scaled))
            first = flat[0][1] if flat[0][1] != key else None
            self._middle(adds, attention, key, first, bool(scaled))

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

    def _outputs_of_attention(self) -> set[Key]:
        if self.core is None:
            return set()
        event = next(
            (
                e
                for e in self.events
                if e.path == self.core and e.port == "source.attention_interface_0.output"
            ),
            None,
        )
        if event is not None:
            return set(event.tensors.values())
        out = self.trial.first(self.core, "output")
        return {out} if out else set()

    def _streams(self) -> set[Key]:
        found = {step.before for step in self.steps} | {step.after for step in self.steps}
        return found if self.pre is None else found | {self.pre}

    def _from_attention(self, key: Key) -> bool:
        ends = self._outputs_of_attention()
        streams = self._streams()
        return any(k in ends for k in self.trial.back(key, lambda k: k in ends or k in streams))

    def _linears_of(self, key: Key, skip: bool = False) -> tuple[list[Key], bool]:
        """The nearest outputs of linear modules that a tensor was made of; false if the stream, too."""
        streams = self._streams()
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

    def _middle(
        self, adds: list[_Step], attention: Any, mlp: Key, first: Key | None, scaled: bool
    ) -> None:
        places = self.places
        reads = self._reads_of(mlp)
        if self.pre in reads and not any(k != self.pre and k in self._streams() for k in reads):
            self.parallel = True
            self.reasons["resid_mid"] = (
                "attention and MLP are parallel here: both read resid_pre, and nothing is between them"
            )
            return
        if scaled:
            why = "the stream itself is scaled in this block, so its parts do not sum to it"
            self.reasons.update(resid_mid=why, attn_out=why, mlp_out=why)
            for name in ("attn_out", "mlp_out"):
                places.pop(name, None)
            return
        middle = adds[0].after
        for step in self.steps:
            if step.kind == "norm" and step.before == middle and step is not self.steps[-1]:
                middle = step.after
        place = self.spot(middle)
        if place is not None:
            places["resid_mid"] = place
        for name, key in (("ln1_post", adds[0].after), ("ln2_post", adds[-1].after)):
            for step in self.steps:
                if step.kind == "norm" and step.before == key:
                    found = self.norm(step.path)
                    if found is not None:
                        self._add_norm(name, found)

    def _reads_of(self, key: Key) -> set[Key]:
        """The states of the stream that a part is made of."""
        streams = self._streams()
        ends = self._outputs_of_attention()
        return set(self.trial.back(key, lambda k: k in streams or k in ends))

    def _add_norm(self, name: str, norm: Norm) -> None:
        self.norms[name] = norm
        self.weights[f"{name}.w"] = Weight(norm.path)
        self.weights[f"{name}.b"] = Weight(norm.path, "bias")

    def _norm_places(self) -> None:
        for name, norm in self.norms.items():
            self.places.update(norm_places(name, norm))

    def _norm_before(self, key: Key) -> str | None:
        """The norm that makes a tensor of the stream."""
        source = self.trial.source_of(key)
        streams = self._streams()
        for path, port, way in [*self.trial.places(key), *self.trial.places(source)]:
            if port == "output" and way == () and self._inside(path) and self._is_norm(path):
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
                    if port == "output" and way == () and self._inside(path) and self._is_norm(path)
                ),
                None,
            )
            if norm is not None:
                found = self.norm(norm)
                if found is not None:
                    self._add_norm(name, found)
                return
            made = self.trial.made(seen)
            if made is None or made.name not in SAME | _SCALES or seen in self.linears:
                return
            seen = made.takes[0]

    def _mixer(self, step: _Step, key: Key, scaled: bool) -> None:
        place = self.spot(key)
        if place is None:
            return
        if not scaled:
            self.places["mixer_out"] = place
        entered = self._mixer_input(key)
        if entered is not None:
            path, norm = entered
            self.places["mixer_in"] = self.entered(path)
            if norm is not None:
                found = self.norm(norm)
                if found is not None:
                    self._add_norm("ln1", found)

    def _mixer_input(self, key: Key) -> tuple[str, str | None] | None:
        """The outermost module that takes the (normed) stream and whose output leads to a part."""
        streams = self._streams()
        for event in self.events:
            if event.port != "inputs" or event.path == self.path or self._is_norm(event.path):
                continue
            took = self.trial.first(event.path)
            out = self.trial.first(event.path, "output")
            if took is None or out is None or self.trial.between(key, [out]) is None:
                continue
            norm = self._norm_before(took)
            if took in streams or norm is not None:
                return event.path, norm
        return None

    def _core_parts(self, key: Key | None) -> None:
        """Around attention: what it takes, its projections and its out-projection."""
        if self.core is None or self.call is None:
            return
        args = self.call.value[0]
        given = {
            name: self.call.tensors.get((0, index))
            for index, name in ((1, "q"), (2, "k"), (3, "v"))
            if len(args) > index
        }
        for name, one in given.items():
            if one is None:
                continue
            linears, _ = self._linears_of(one)
            if len(linears) == 1:
                self.parts[name] = (self.linears[linears[0]], linears[0], one)
            elif len(linears) > 1:
                self.reasons[f"{name}_pre"] = "it is made of several projections: " + ", ".join(
                    f"`{self.below(self.linears[k])}`" for k in linears
                )
        entered = None
        if "q" in self.parts:
            entered = self.trial.first(self.parts["q"][0])
        took = self.trial.first(self.core)
        if entered is not None and took is not None and took != entered:
            norm = self._norm_before(took)
            if norm is not None or took in self._streams():
                entered = took
        elif entered is None:
            entered = took
        if entered is not None:
            self._attn_input(entered)
        ends = self._outputs_of_attention()
        for out, path in self.linears.items():
            took = self.trial.first(path)
            if took is not None and self._inside(path):
                reads = self.trial.back(took, lambda k: k in ends or k in self.linears)
                if any(k in ends for k in reads):
                    self.o = (path, took, out)
                    break

    def _attn_input(self, entered: Key) -> None:
        assert self.core is not None
        self.attn_in = entered
        if self.trial.first(self.core) == entered:
            self.places["attn_in"] = self.entered(self.core)
        else:
            around = next(
                (
                    path
                    for path in _above(self.core, self.path)
                    if self.trial.first(path) == entered
                ),
                None,
            )
            place = self.entered(around) if around else self.spot(entered)
            if place is not None:
                self.places["attn_in"] = place
        norm = self._norm_before(entered)
        if norm is not None:
            found = self.norm(norm)
            if found is not None:
                self._add_norm("ln1", found)

    def _mlp(self, step: _Step, key: Key, scaled: bool) -> None:
        places = self.places
        place = self.spot(key)
        if place is not None and not scaled:
            if len(self.trial.shape(key)) == 2:
                place = dataclasses.replace(place, layout=unflattened)
            places["mlp_out"] = place
        self._after("ln2_post", key, step)
        experts = self._experts(key)
        if experts is not None:
            self._mixture(experts)
            reason = "its neurons are those of experts, each of which sees some tokens"
            self.reasons.update(mlp_pre=reason, mlp_post=reason, mlp_up=reason)
            return
        downs, alone = self._linears_of(key)
        if len(downs) != 1 or not alone:
            why = "its MLP is not one down-projection of what one or two up-projections make"
            self.reasons.update(mlp_pre=why, mlp_post=why, mlp_up=why)
            entered = self._mixer_input(key)
            if entered is not None:
                self._mlp_input(entered[0], self.trial.first(entered[0]))
            return
        down = self.linears[downs[0]]
        inner = self.trial.first(down)
        assert inner is not None
        ups, alone = self._linears_of(inner)
        taken = {self.trial.first(self.linears[one]) for one in ups}
        if not ups or len(ups) > 2 or len(taken) != 1 or not alone:
            why = "its MLP is not one down-projection of what one or two up-projections make"
            self.reasons.update(mlp_pre=why, mlp_post=why, mlp_up=why)
            entered = self._mixer_input(key)
            if entered is not None:
                self._mlp_input(entered[0], self.trial.first(entered[0]))
            return
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
            return
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
            shaped = layout if features is None else _shaped(features, flat)
            places[name] = Spot(below, "output", (), shaped)
            self.weights[weight] = Weight(below, "weight", features)
            self.weights[bias] = Weight(below, "bias", features)
        if gate is None:
            self.reasons["mlp_up"] = "its MLP has no gate"

    def _mlp_input(self, path: str, key: Key | None) -> None:
        if key is None:
            return
        flat = len(self.trial.shape(key)) == 2
        self.places["mlp_in"] = self.entered(path, unflattened if flat else None)
        norm = self._norm_before(key)
        if norm is not None:
            found = self.norm(norm)
            if found is not None and self.norms.get("ln1") != found:
                self._add_norm("ln2", found)

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
                found.append(_every_other(offset))
            elif step == 1 and offset in (0, width) and part.shape[-1] == width:
                found.append(_half(offset, width))
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
            module = self._module(event.path)
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
        tensors = [event.tensors.get((0, i)) for i in range(3)]
        took = trial.first(experts)
        streams = self._streams()
        container = None
        for path in reversed(list(_above(experts, self.path))):
            key = trial.first(path)
            if key is not None and (key in streams or self._norm_before(key) is not None):
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
        streams = self._streams()
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

    # ---------------------------------------------------------------- attention

    def _attention_places(self) -> None:
        if self.core is None or self.call is None:
            return
        sizes, trial, below = self.sizes, self.trial, self.below(self.core)
        call = "source.attention_interface_0"
        for name, index in (("q", 1), ("k", 2), ("v", 3)):
            key = self.call.tensors.get((0, index))
            if key is not None and len(trial.shape(key)) == 4:
                self.places[name] = Spot(below, f"{call}.inputs", (0, index), head_first)
        self._patterns(below)
        self._projections()
        ends = self._outputs_of_attention()
        result = trial.first(self.core, f"{call}.output")
        straight = False
        if self.o is not None:
            path, took, _ = self.o
            place = self.below(path)
            self.places["o_out"] = Spot(place, "output")
            straight = trial.between(took, ends) == [] and not self._normed(took, ends)
            whole = trial.shape(took)[-1] == sizes.n_heads * sizes.d_head
            if whole:
                self.weights["attn.W_O"] = Weight(place, "weight", _out_heads)
                self.weights["attn.b_O"] = Weight(place, "bias")
                self.places["head_out"] = _head_output(place)
                if straight:
                    self.places["z"] = self.entered(path, in_heads)
        if "z" not in self.places and result is not None and len(trial.shape(result)) == 4:
            shape = trial.shape(result)
            if shape[1] == trial.tokens:
                self.places["z"] = Spot(below, f"{call}.output", (0,))
        norm = self.norms.get("ln1")
        for name in "qkv":
            if f"{name}_pre" in self.places and f"attn.W_{name.upper()}" in self.weights:
                self.places[f"{name}_input"] = head_input(name, norm)

    def _normed(self, key: Key, ends: set[Key]) -> bool:
        return any(
            self._is_norm(path) and self._inside(path)
            for path, port, _ in self.trial.places(key)
            if port == "output"
        )

    def _patterns(self, below: str) -> None:
        """Scores and pattern, in the eager function of the model's file."""
        assert self.core is not None
        forward = inspect.unwrap(type(self._module(self.core)).forward)
        eager = getattr(forward, "__globals__", {}).get("eager_attention_forward")
        names: list[str] = []
        if eager is not None:
            try:
                names = listing(eager, "eager attention").names
            except GraftworkError:
                names = []
        inner = "eager.attention_interface_0.source"
        softmax = [name for name in names if name.startswith("softmax")]
        if len(softmax) != 1:
            reason = "the eager attention of its file has no softmax in its text"
            self.reasons.update(scores=reason, pattern=reason)
            return
        if "cat_0" in names and "dropout_0" in names:
            self.places["scores"] = Spot(below, f"{inner}.cat_0.input", (0,))
            self.places["pattern"] = Spot(below, f"{inner}.dropout_0.input")
            self.weights["attn.sinks"] = Weight(below, "sinks")
            return
        self.places["scores"] = Spot(below, f"{inner}.softmax_0.input")
        self.places["pattern"] = Spot(below, f"{inner}.softmax_0.output")

    def _projections(self) -> None:
        sizes, trial = self.sizes, self.trial
        entered = self.attn_in
        for name, (path, out, used) in self.parts.items():
            count = sizes.n_heads if name == "q" else sizes.n_kv_heads
            width = count * sizes.d_head
            below = self.below(path)
            features: Features | None = None
            if trial.shape(out)[-1] == width:
                features = heads if name == "q" else kv_heads
            else:
                features = self._found_layout(name, out, used, count)
            if features is None:
                self.reasons.setdefault(
                    f"{name}_pre",
                    f"how `{below}` holds its heads was not seen",
                )
                continue
            flat = len(trial.shape(out)) == 2
            self.places[f"{name}_pre"] = Spot(below, "output", (), _shaped(features, flat))
            if trial.first(path) == entered:
                letter = name.upper()
                self.weights[f"attn.W_{letter}"] = Weight(
                    below, "weight", _by_head_weight(features)
                )
                self.weights[f"attn.b_{letter}"] = Weight(below, "bias", features)

    def _found_layout(self, name: str, out: Key, used: Key, count: int) -> Features | None:
        """Where the heads lie in the output of a fused projection: from the strides of views of it."""
        trial, sizes = self.trial, self.sizes
        storage = trial.tensor(out).untyped_storage()._cdata
        base = trial.tensor(out).storage_offset()

        def is_heads(key: Key) -> bool:
            tensor = trial.tensor(key)
            if tensor.untyped_storage()._cdata != storage:
                return False
            shape = list(tensor.shape)
            return len(shape) == 4 and shape[-1] == sizes.d_head and count in shape[1:3]

        for key in trial.back(used, is_heads):
            tensor = trial.tensor(key)
            axis = 1 if tensor.shape[1] == count and tensor.shape[2] == trial.tokens else 2
            if tensor.shape[axis] != count or tensor.stride(-1) != 1:
                continue
            offset, stride = int(tensor.storage_offset() - base), int(tensor.stride(axis))
            if count == 1:
                stride = sizes.d_head
            if stride < sizes.d_head or offset % stride + sizes.d_head > stride:
                continue
            return strided(offset, count, stride, sizes.d_head)
        total = trial.shape(out)[-1]
        q, k = sizes.n_heads * sizes.d_head, sizes.n_kv_heads * sizes.d_head
        number = "qkv".index(name)
        fits: list[Features] = []
        if total == 3 * q and q == k:
            fits = [third(number), third_of_head(number)]
        elif total == q + 2 * k:
            fits = [grouped(name)]
        return fits[0] if len(fits) == 1 else None

    # ---------------------------------------------------------------- shapes

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
                shown = ", ".join(map(str, found[2:] if found[:2] == (b, t) else found))
                self.places[name] = Missing(
                    f"its shape would be [batch, token, {shown}], and the name promises "
                    f"[batch, token, {', '.join(map(str, shape[2:]))}]"
                )
        if isinstance(self.places.get("z"), Missing):
            self.places["head_out"] = self.places.get("head_out", Missing("there is no z"))

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


def _head_output(o: str) -> Derived:
    """What each head adds: what the out-projection takes, by head, through its rows of W_O."""

    def read(here: Any, vocabulary: Any) -> Any:
        sizes: Callable[[Any], Any] = lambda value: in_heads(value, vocabulary.sizes, here)  # noqa: E731
        entered = vocabulary.root.get(here.path(o)).input
        return derive(
            HEAD_OUT, here("o_out"), sizes(entered), vocabulary.recorded_weight(here, "attn.W_O")
        )

    return Derived(read, ("o_out",))
