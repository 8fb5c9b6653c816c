"""Owns `probe`: the vocabulary of a model that nobody declared, found by looking at one forward of it.

The residual stream is followed through a block: what is added to it, in which order, tells attention
from MLP and where each name is. Nothing is concluded from the name of a module but what it is called
in messages. What was not seen is `Missing`, with the reason; what was seen is still to be checked on
the loaded weights, which `Vocabulary` does when a block first uses a name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...envoy.names import Missing, Place, Spot
from ...tracing.errors import GraftworkError, UnavailableNameError
from ..sizes import Sizes, sizes_of
from .architecture import Architecture, Block, Norm, Weight, norm_places
from .probe_attention import CALL, core_of, eager_operations, inner_operations, softmax_of
from .probe_block import BlockProbe
from .probe_layouts import norm_of
from .trial import Key, Trial, run_trial

_LINEAR = ("Linear", "Conv1D")


@dataclasses.dataclass(frozen=True)
class Probed(Architecture):
    """An architecture that was found by looking at a model.

    Attributes:
        measured: sizes that were seen where the configuration tells none, or others.
    """

    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def sizes(self, config: Any, module: torch.nn.Module, n_layers: int) -> Sizes:
        """As `sizes_of`, with what was seen."""
        found = sizes_of(_Silent(config), module, self, n_layers)
        return dataclasses.replace(found, **self.measured)


class _Silent:
    """A configuration that tells nothing of what it has for each layer separately."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def get_text_config(self) -> _Silent:
        return _Silent(text_config(self._config))

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self._config, name)
        except RuntimeError as error:  # transformers' "ambiguous per-layer attribute"
            raise AttributeError(name) from error


def text_config(config: Any) -> Any:
    """The part of a configuration that is about text."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def probe(model: Any) -> Architecture:
    """The vocabulary of a language model, found by looking at it.

    Args:
        model: a `LanguageModel`; its weights are not loaded for it.

    Raises:
        UnavailableNameError: it has no list of blocks that hand a residual stream on, or its forward
            cannot be run on values without numbers.
    """
    return _Probe(model).architecture()


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
        self.tokens = self.size[1]
        self.trial = self._try(())
        self.layers, self.paths = self._blocks()
        self.groups = self._groups()
        # Some models put tokens of their own before those of the prompt.
        begin = self.stream_in(self.paths[0])
        assert begin is not None
        self.tokens = self.trial.shape(begin)[1]
        told = [
            path
            for block in self.groups
            for path, child in self.tree.named_modules()
            if path == block or path.startswith(f"{block}.")
            if not (self.is_linear(child) or type(child).__module__.startswith("torch."))
        ]
        self.trial = self._try(told)
        for inner in (self._inner(), self._eager()):
            # A function that cannot be looked into: what is inside has no places.
            if inner:
                with contextlib.suppress(GraftworkError):
                    self.trial = self._try(told, inner)

    def _inner(self) -> list[tuple[str, str]]:
        """The operations of functions that attention calls, where it has no interface."""
        found = []
        for block in self.groups:
            inside = (e for e in self.trial.events if e.path.startswith(f"{block}."))
            pattern = softmax_of(self.trial, block)
            if pattern is not None and not any(e.port == f"{CALL}.inputs" for e in inside):
                found += inner_operations(self.trial, core_of(self.tree, block, pattern[1]))
        return found

    def _eager(self) -> list[tuple[str, str]]:
        """The operations of the eager functions behind transformers' attention interface."""
        cores = dict.fromkeys(e.path for e in self.trial.events if e.port == f"{CALL}.inputs")
        found = [one for core in cores for one in eager_operations(self.tree, core)]
        return found and [*found, *self._inner()]

    def _trial_size(self) -> tuple[int, int]:
        """Batch and tokens, which no other size of the model equals."""
        text = text_config(self.model.config)
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
            found = run_trial(self.tree, inputs, self.size, told, inner, fake=not self.real)
            found.tokens = self.tokens
            return found
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
                self._hands(before[1], after[0]) for before, after in itertools.pairwise(ends)
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

    def _hands(self, left: Key | None, taken: Key | None) -> bool:
        """True if what a module gave is what the next took, and nothing was multiplied with it."""
        if left is None or taken is None:
            return False
        way = self.trial.between(taken, [left])
        return way is not None and not {"mm", "addmm", "bmm"} & set(way)

    def stream_in(self, path: str) -> Key | None:
        key = self.trial.first(path)
        if key is None or len(self.trial.shape(key)) != 3:
            return None
        return key

    def _groups(self) -> dict[str, list[int]]:
        """Layers that are built alike, by the path of the first of them."""
        text = text_config(self.model.config)
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
        seen = {path: BlockProbe(self, path) for path in self.groups}
        attends = any(one.attention is not None for one in seen.values())
        bare = Probed(
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
        bare = dataclasses.replace(bare, measured=self._measured(bare, seen))
        sizes = bare.sizes(self.model.config, self.tree, len(self.paths))
        for path, indices in self.groups.items():
            found = seen[path].block(sizes, attends, positional)
            for index in indices:
                blocks[index] = found
        whole = tuple(block for block in blocks if block is not None)
        if len(self.groups) == 1:
            whole = whole[:1]
        return dataclasses.replace(bare, blocks=whole)

    def _measured(self, bare: Probed, seen: dict[str, BlockProbe]) -> dict[str, int]:
        """Sizes that were seen and are not those of the configuration."""
        told = bare.sizes(self.model.config, self.tree, len(self.paths))
        found: dict[str, int] = {}
        first = next((one for one in seen.values() if one.attention is not None), None)
        if first is not None:
            measured = first.measured()
            for name in ("n_heads", "d_head"):
                if name in measured and measured[name] != getattr(told, name):
                    found[name] = measured[name]
            text = _Silent(text_config(self.model.config))
            names = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
            shared = any(getattr(text, name, None) is not None for name in names)
            if "n_kv_heads" in measured and not shared:
                found["n_kv_heads"] = measured["n_kv_heads"]
        widths = [one.measured().get("d_mlp") for one in seen.values()]
        known = [width for width in widths if width is not None]
        if known and known[0] != told.d_mlp:
            found["d_mlp"] = known[0]
        return found

    def _in_order(self, seen: dict[str, BlockProbe]) -> Iterator[BlockProbe]:
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
        if head and not isinstance(getattr(tree.get_submodule(head), "weight", None), torch.Tensor):
            head = None
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
            config = _Silent(text_config(self.model.config))
            rows = getattr(config, "max_position_embeddings", None)
            if not isinstance(rows, int) or not rows <= weight.shape[0] <= rows + 4:
                continue
            way = trial.between(begin, [out])
            if way is not None and not {"mm", "addmm", "bmm"} & set(way):
                return "standard", path
        names = {made.name for made in trial.ledger.made.values()}
        kinds = " ".join(type(child).__name__ for child in self.tree.modules()).lower()
        text = inspect.getsource(inspect.getmodule(type(self.tree)) or type(self.tree)).lower()
        told = getattr(_Silent(text_config(self.model.config)), "alibi", None)
        if told is True or ("alibi" in text and "rotary" not in kinds):
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
