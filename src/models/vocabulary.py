"""Owns `Vocabulary`: the unified names, sizes and weights of one model."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..envoy.names import Derived, Layers, Missing, Place, Spot, read_name
from ..tracing.context import current_tracer
from ..tracing.errors import GraftworkError, ShapeError, UnavailableNameError
from ..tracing.node import PARAMETER
from ..tracing.proxy import Proxy, measured, record_node
from .architectures import Architecture, Norm, architecture_of, stacks_of
from .architectures.probe import Probed, probe
from .sizes import Sizes, sizes_of
from .weights import Weights, is_linear

logger = logging.getLogger("graftwork")

#: Shapes of the names, axes from the left; numbers and sizes of the model are checked.
SHAPES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        "resid_pre resid_mid resid_post attn_in attn_out mlp_in mlp_out ln1_in ln1_out ln2_in ln2_out "
        "ln1_normalized ln2_normalized o_out embed ln_final unembed_in experts_in experts_out "
        "cross_attn_in cross_attn_out resid_mid_cross mixer_in mixer_out".split(),
        ("batch", "token", "d_model"),
    ),
    **dict.fromkeys(
        ("q", "z", "q_pre", "cross_q", "cross_z"), ("batch", "token", "n_heads", "d_head")
    ),
    **dict.fromkeys(
        ("k", "v", "k_pre", "v_pre", "cross_k", "cross_v"),
        ("batch", "token", "n_kv_heads", "d_head"),
    ),
    **dict.fromkeys(
        ("scores", "pattern", "cross_scores", "cross_pattern"), ("batch", "n_heads", "query", "key")
    ),
    **dict.fromkeys(("head_out", "q_input"), ("batch", "token", "n_heads", "d_model")),
    **dict.fromkeys(("k_input", "v_input"), ("batch", "token", "n_kv_heads", "d_model")),
    **dict.fromkeys(("mlp_pre", "mlp_post", "mlp_up"), ("batch", "token", "d_mlp")),
    **dict.fromkeys(
        ("ln1_scale", "ln2_scale", "ln1_post_scale", "ln2_post_scale", "ln_final_scale"),
        ("batch", "token", "1"),
    ),
    "router_logits": ("batch", "token", "num_experts"),
    "expert_weights": ("batch", "token", "experts_per_token"),
    "expert_indices": ("batch", "token", "experts_per_token"),
    "expert_out": ("batch", "token", "experts_per_token", "d_model"),
    "logits": ("batch", "token", "d_vocab_out"),
    "unembed_out": ("batch", "token", "d_vocab_out"),
}
_FREE = frozenset({"batch", "token", "patch", "query", "key"})


class Vocabulary:
    """The unified names of a stack of blocks.

    Attributes:
        root: the model.
        architecture: what is declared for it, or was found by looking at it.
        kind: the class of the model, for messages.
        prefix: where in the tree the model is that the names are declared for: "" unless it is wrapped,
            as PEFT does.
        sizes: see `Sizes`.
    """

    def __init__(self, root: Any, architecture: Architecture, stack: str = "layers") -> None:
        tree = root.module_tree()
        self.root = root
        self.architecture = architecture
        self.stack = stack
        self.kind = type(tree).__name__
        self.prefix = _inside(root, tree, architecture.layers)
        tree = tree.get_submodule(self.prefix)
        try:
            blocks = tree.get_submodule(architecture.layers)
        except AttributeError:
            raise UnavailableNameError(
                f"{self.kind} has no `{architecture.layers}`, where its blocks are declared to be: the "
                "unified names are for the model with its head."
            ) from None
        above = f"{self.prefix}." if self.prefix else ""
        self._paths = [f"{above}{architecture.layers}.{name}" for name in blocks._modules]
        self.sizes: Sizes = (
            architecture.sizes(root.config, tree, len(self._paths))
            if isinstance(architecture, Probed)
            else sizes_of(root.config, tree, architecture, len(self._paths))
        )
        self._checked: set[tuple[int, str]] = set()
        self._unverified: set[tuple[int, str]] = set()
        self._verified: set[tuple[int, str]] = set()
        self._verifying = False

    def __len__(self) -> int:
        return len(self._paths)

    def layer_path(self, index: int) -> str:
        return self._paths[index]

    def layer_places(self, index: int) -> Mapping[str, Place]:
        return self.architecture.block(index).places

    def model_places(self) -> Mapping[str, Place]:
        return self.architecture.places

    def layer_module(self, index: int, name: str) -> torch.nn.Module | None:
        """The module of a layer that a name means: "attn", "mlp", "ln1" or "attn.ln_in", ….

        None if the name means none.
        """
        block = self.architecture.block(index)
        other = {"attn.ln_in": "ln1", "mlp.ln_in": "ln2", "attn.ln_out": "ln1_post"}
        norm = block.norms.get({**other, "mlp.ln_out": "ln2_post"}.get(name, name))
        if norm is None:
            return None
        return self.root.load().get_submodule(f"{self._paths[index]}.{norm.path}")  # type: ignore[no-any-return]

    def layer_weights(self, index: int) -> Weights:
        table = self.architecture.block(index).weights
        return Weights(self.root, table, self._paths[index], self.kind)

    def model_weights(self) -> Weights:
        return Weights(self.root, self.architecture.weights, self.prefix, self.kind)

    def find(self, name: str) -> Any:
        """A weight, or a module of the model by what it is: embed, pos_embed, ln_final, unembed."""
        modules = {one.split(".")[0]: weight for one, weight in self.architecture.weights.items()}
        if name in modules:
            place = ".".join(part for part in (self.prefix, modules[name].path) if part)
            return self.root.load().get_submodule(place)
        if name in self.architecture.weights:
            return self.model_weights()[name]
        tree = self.root.module_tree()
        if name.split(".")[0] in tree._modules:
            return self.root.get(name)
        raise UnavailableNameError.weight(name, self.kind, [*self.architecture.weights, *modules])

    @property
    def layers(self) -> Layers:
        return Layers(self.root, self)

    def read(self, layer: int, name: str) -> Any:
        return read_name(self.root, self, layer, name)

    # ---------------------------------------------------------------- inner operations

    @functools.cached_property
    def inner_operations(self) -> frozenset[tuple[str, str]]:
        """The operations inside forwards that names refer to: measured together, once."""
        found: set[tuple[str, str]] = set()
        for index, path in enumerate(self._paths):
            for place in self.layer_places(index).values():
                if isinstance(place, Spot) and "." in place.port:
                    below = f"{path}.{place.path}" if place.path else path
                    found.add((below, f"{place.port.rpartition('.')[0]}.output"))
        return frozenset(found)

    # ---------------------------------------------------------------- in a block

    def check(self, layer: int, name: str, value: Any) -> None:
        """Compare the shape of a name with what is promised, the first time that it is used.

        Raises:
            ShapeError: it is another one; then nothing has run.
        """
        if self.architecture.probed and not self._verifying and (layer, name) not in self._verified:
            self._unverified.add((layer, name))
        expected = self.shape(name)
        if (layer, name) in self._checked or expected is None or not isinstance(value, Proxy):
            return
        self._checked.add((layer, name))
        try:
            shape = tuple(measured(value).shape)
        except GraftworkError:
            return  # the model cannot be measured: what is wrong then shows when it runs
        if len(shape) != len(expected) or any(
            size != self.size(axis)
            for size, axis in zip(shape, expected, strict=True)
            if self.size(axis) is not None
        ):
            wanted = ", ".join(
                axis if axis in _FREE else f"{axis}={self.size(axis)}" for axis in expected
            )
            raise ShapeError(
                f"`{name}` of {self.kind} would have the shape {list(shape)}, and the name promises "
                f"[{wanted}]. Its declaration does not fit this model; please report it."
            )

    @contextlib.contextmanager
    def verifying(self) -> Iterator[None]:
        """What is used inside is not to be checked: it is the check."""
        before, self._verifying = self._verifying, True
        try:
            yield
        finally:
            self._verifying = before

    def verify_used(self, verify: Callable[..., Any]) -> None:
        """Check the names of a probed architecture that blocks used since the last time, once each.

        Args:
            verify: gives the report of what does not hold, see `graftwork.models.verify`.

        Raises:
            UnavailableNameError: one of them is not what it promises. It is refused from then on, too.
        """
        used = self._unverified
        if not used or self._verifying:
            return
        self._unverified = set()
        self._verified |= used
        # On a view without edits and policies: another thread may open a block of the model meanwhile.
        root, names = copy.copy(self.root), copy.copy(self)
        root._root, root._envoys, root._edits, root._hooks = root, {}, None, None
        root._vocabularies, names.root = {self.stack: names}, root
        args, kwargs = root.sample_inputs()
        layers = sorted({layer for layer, _ in used if layer >= 0})
        # In a context of its own, as a block may be open.
        report = contextvars.Context().run(
            verify, names, args, kwargs, layers, strict=False, edited=used
        )
        wrong = [one for one in report.wrong if (one.layer, one.name) in used]
        if wrong:
            self._verified -= {(one.layer, one.name) for one in wrong}
            raise UnavailableNameError(
                f"nothing is declared for `{root.config.model_type}`, and a name that was found by "
                f"looking at it is wrong: use modules instead, or `register` a declaration, see "
                f"graftwork.models.architectures.\n{type(report)(self.kind, wrong, {})}"
            )

    def shape(self, name: str) -> tuple[str, ...] | None:
        """What each axis of a name counts; None where nothing is promised."""
        return self.architecture.shapes.get(name, SHAPES.get(name))

    def shape_of(self, name: str, layer: int) -> tuple[int, ...]:
        """The sizes of a name behind batch and token.

        Raises:
            UnavailableNameError: the layer has no such name.
        """
        place = self.layer_places(layer).get(name)
        if place is None or isinstance(place, Missing):
            reason = "it has no such place" if place is None else place.reason
            raise UnavailableNameError.missing(name, self.kind, reason)
        axes = self.shape(name) or ("batch", "token", "d_model")
        return tuple(self.size(axis) or 0 for axis in axes[2:])

    def size(self, axis: str) -> int | None:
        """How many there are of what an axis counts; None where it depends on the prompt."""
        if axis in _FREE:
            return None
        return int(axis) if axis.isdigit() else getattr(self.sizes, axis)

    def recorded_weight(self, here: Any, name: str) -> Any:
        """A weight as a value of the open block; None where there is none."""
        weights = self.layer_weights(here.layer) if here.layer >= 0 else self.model_weights()
        if name not in weights:
            return None
        weight = weights._table[name]
        path = weights.path(name)
        value: Any = self._parameter(f"{path}.{weight.parameter}")
        if weight.parameter == "weight" and is_linear(self.root.submodule(path)):
            value = value.T
        return value if weight.view is None else weight.view(value, self.sizes)

    def _parameter(self, path: str) -> Any:
        tracer = current_tracer()
        assert tracer is not None
        recording = tracer.recording
        if recording.loop is not None or recording.graph.guard is not None:
            return record_node(recording, PARAMETER, path, (), {})
        place = (recording.invoke, path)
        found = recording.parameters.get(place)
        if found is None:
            found = recording.parameters[place] = record_node(recording, PARAMETER, path, (), {})
        return found

    def norm_values(self, norm: Norm, here: Any) -> tuple[Any, Any, float]:
        """Gain and bias of a norm as values of the open block, and its epsilon."""
        path = here.path(norm.path)
        module = self.root.submodule(path)
        gain = self._parameter(f"{path}.weight") if _has(module, "weight") else None
        if gain is not None and norm.offset:
            gain = gain + norm.offset
        bias = self._parameter(f"{path}.bias") if _has(module, "bias") else None
        return gain, bias, epsilon(module)

    def module(self, here: Any, path: str) -> Any:
        """A module to be applied in the block."""
        return self.root.get(here.path(path))

    # ---------------------------------------------------------------- what there is

    def support(self, index: int) -> Support:
        """Which names a layer has."""
        return Support(self.kind, index, self.layer_places(index), self.architecture.probed)


def _inside(root: Any, tree: torch.nn.Module, layers: str) -> str:
    """The path of the model of `root.config` that has the blocks, in a wrapper that keeps it whole."""
    for path, child in tree.named_modules():
        own = getattr(child, "config", None)
        if getattr(own, "model_type", None) != root.config.model_type:
            continue
        try:
            child.get_submodule(layers)
        except AttributeError:
            continue
        return str(path)
    return ""


def _has(module: torch.nn.Module, name: str) -> bool:
    return getattr(module, name, None) is not None


def epsilon(module: Any) -> float:
    """What a norm adds to the variance."""
    for name in ("eps", "variance_epsilon", "epsilon"):
        found = getattr(module, name, None)
        if found is not None:
            return float(found)
    return 0.0


class Support:
    """The names of a layer as a table: where each is, or why it does not exist.

    Attributes:
        names: those that exist.
        missing: the others, with the reason.
    """

    def __init__(self, kind: str, index: int, places: Mapping[str, Place], probed: bool) -> None:
        self.kind = kind
        self.index = index
        self.names = [name for name, place in places.items() if not isinstance(place, Missing)]
        self.missing = {n: p.reason for n, p in places.items() if isinstance(p, Missing)}
        self._places = places
        self._probed = probed

    def rows(self) -> list[tuple[str, str, str]]:
        """Name, shape, and place or reason."""
        found = []
        for name, place in self._places.items():
            shape = SHAPES.get(name)
            text = f"[{', '.join(shape)}]" if shape else ""
            if isinstance(place, Missing):
                found.append((name, "-", place.reason))
            elif isinstance(place, Derived):
                found.append((name, text, f"computed from {', '.join(place.needs)}"))
            else:
                assert isinstance(place, Spot)
                where = f"{place.path}.{place.port}" if place.path else place.port
                found.append((name, text, where))
        return found

    def __str__(self) -> str:
        how = "found by looking at it" if self._probed else "declared"
        lines = [f"layer {self.index} of {self.kind}, {how}"]
        rows = self.rows()
        first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
        lines += [f"  {name:<{first}}  {shape:<{second}}  {place}" for name, shape, place in rows]
        return "\n".join(lines)

    __repr__ = __str__


def find_vocabulary(root: Any, stack: str = "layers") -> Vocabulary:
    """The vocabulary of a model.

    Raises:
        UnavailableNameError: it is no transformers model, or nothing is declared for it and what could
            be found by looking at it is no stack of blocks.
    """
    config = getattr(root, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise UnavailableNameError(
            "unified names are for models of transformers, which say in `config.model_type` what they "
            "are."
        )
    stacks = stacks_of(config)
    if stacks is None:
        if stack != "layers":
            raise UnavailableNameError(
                f"nothing is declared for `{config.model_type}`, so that only `model.layers` is known."
            )
        found = Vocabulary(root, probe(root))
        logger.warning(
            "nothing is declared for `%s`: its names were found by looking at it, and are checked when "
            "a block first uses them. `print(model.layers[0].support())` shows them",
            config.model_type,
        )
        return found
    if stack not in stacks:
        named = " and ".join(f"`model.{one}_layers`" for one in stacks)
        raise UnavailableNameError(f"this model has several stacks of layers: use {named}.")
    architecture = architecture_of(config, stack)
    assert architecture is not None
    return Vocabulary(root, architecture, stack)
