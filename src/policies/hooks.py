"""Owns `model.hooks`: the policies of a model, and the template that puts them into every block."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from typing import Any

import torch

from ..envoy.names import write_name
from ..tracing.context import Tracer, current_block
from ..tracing.edit import Edit
from ..tracing.errors import InputError, UnavailableNameError, near
from ..tracing.proxy import Proxy, current_node
from ..tracing.template import Template
from . import operations as ops
from .config import POINTS, HookConfig, default
from .policy import (
    INVERSE_OF,
    KINDS,
    ActAdd,
    Collect,
    Counted,
    Mask,
    Paired,
    Policy,
    Replace,
)


class Hooks:
    """The policies of a model: `model.hooks["mlp_pre_out"][2]["mask"]`.

    They are recorded into every block before the user's own operations, so they batch, plan, draw and
    take gradients like these. A policy that changes nothing is not recorded.

    Attributes:
        config: which policies are where.
    """

    def __init__(self, model: Any, config: HookConfig | None = None) -> None:
        self._model = model
        self.config = default() if config is None else config
        self._policies: dict[tuple[str, int], dict[str, Policy]] = {}
        self._template: tuple[Any, Any, Template | None] | None = None
        self._lock = threading.RLock()
        for point, layers in self.config.hooks.items():
            for layer in layers:
                if layer != "all" and not int(layer) < self.layers():
                    error = UnavailableNameError.no_layer(int(layer), self.layers())
                    raise InputError(f"`{point}: {layer}` of the hook configuration: {error}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_template": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    # ---------------------------------------------------------------- finding

    def __getitem__(self, point: str) -> Point:
        if point not in POINTS:
            raise InputError(f"no point is called `{point}`. It is one of {', '.join(POINTS)}.")
        return Point(self, point)

    def __iter__(self) -> Any:
        return iter(POINTS)

    def __len__(self) -> int:
        return len(POINTS)

    def layers(self) -> int:
        return len(self._vocabulary)

    @property
    def _vocabulary(self) -> Any:
        return self._model.policy_names()

    def kinds(self, point: str, layer: int) -> list[str]:
        """The policies at a point of a layer, in the order in which they are applied."""
        kinds = self.config.at(point, layer)
        return kinds + [k for k in self._policies.get((point, layer), {}) if k not in kinds]

    def policy(self, point: str, layer: int, kind: str) -> Policy:
        """One policy, made when it is first asked for.

        Raises:
            InputError: it is no kind of policy.
            UnavailableNameError: the architecture has no such place.
        """
        if kind not in KINDS:
            raise InputError(f"no policy is called `{kind}`. {near(kind, KINDS)}")
        count = self.layers()
        if not -count <= layer < count:
            raise UnavailableNameError.no_layer(layer, count)
        layer %= count
        config = getattr(self._model.module_tree(), "config", None)
        if kind in ("actadd", "replace") and getattr(config, "is_encoder_decoder", False):
            raise UnavailableNameError(
                f"`{kind}` counts the tokens of a prompt, and in this decoder other tokens "
                "pass: edit `model.decoder_layers[i]` in a block."
            )
        with self._lock:
            found = self._policies.get((point, layer), {})
            if kind not in found:
                shape = self._vocabulary.shape_of(POINTS[point], layer)
                made: Policy = KINDS[kind](shape).to(self._model.device, self._dtype())
                if isinstance(made, Paired):
                    made.share(self.policy(point, layer, made.inverse_of))
                self._policies.setdefault((point, layer), {})[kind] = made
            return self._policies[point, layer][kind]

    def _dtype(self) -> torch.dtype:
        """Of the parameters: single precision, or double if the model has that."""
        first = next(iter(self._model.module_tree().parameters()), None)
        return (
            torch.float64 if first is not None and first.dtype == torch.float64 else torch.float32
        )

    def every(self, kind: str) -> Iterable[tuple[str, int, Policy]]:
        """All policies of a kind that were made: point, layer, policy."""
        with self._lock:
            found = list(self._policies.items())
        for (point, layer), kinds in found:
            if kind in kinds:
                yield point, layer, kinds[kind]

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        """The parameters of all policies."""
        seen: set[int] = set()
        for kinds in self._policies.values():
            for policy in kinds.values():
                for parameter in policy.parameters():
                    if id(parameter) not in seen:
                        seen.add(id(parameter))
                        yield parameter

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The parameters by name: "mlp_pre_out.2.mask.param"."""
        return {
            f"{point}.{layer}.{kind}.{name}": value
            for (point, layer), kinds in self._policies.items()
            for kind, policy in kinds.items()
            for name, value in policy.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Set the parameters from what `state_dict` gave."""
        for name, value in state.items():
            parts = name.split(".", 3)
            if len(parts) < 4 or parts[0] not in POINTS or not parts[1].isdecimal():
                raise InputError(
                    f"`{name}` is no parameter of a policy, as `mlp_pre_out.2.mask.param` is"
                )
            policy, rest = self.policy(parts[0], int(parts[1]), parts[2]), parts[3]
            key = rest.removeprefix("param.")
            if isinstance(policy, Replace) and key != rest and key.isdecimal():
                policy.add_token(int(key), value)
            elif isinstance(policy, ActAdd) and rest == "param":
                policy.set_actadd(value)
            elif rest in dict(policy.named_parameters()):
                policy.load(rest, value)
            else:
                raise InputError(f"`{parts[2]}` has no parameter `{rest}`: {name}")

    # ---------------------------------------------------------------- by name

    @property
    def neuron_replace(self) -> ByName:
        """`["layer_2_mlp_pre_out"]`: the replacements at a point of a layer."""
        return ByName(self, "replace")

    @property
    def neuron_actadd(self) -> ByName:
        """`["layer_2_mlp_pre_out"]`: the additions at a point of a layer."""
        return ByName(self, "actadd")

    @property
    def neuron_masks(self) -> ByName:
        """`["layer_2_mlp_pre_out"]`: the mask at a point of a layer."""
        return ByName(self, "mask")

    @property
    def neuron_offsets(self) -> ByName:
        """`["layer_2_mlp_pre_out"]`: the offset at a point of a layer."""
        return ByName(self, "offset")

    # ---------------------------------------------------------------- all at once

    def delete_mlp_neurons(self, remove_indices: Any) -> None:
        """Mask MLP neurons beside those that are masked already; true for each that goes,
        [layer, d_mlp]."""
        self._delete("mlp_pre_out", remove_indices)

    def delete_attn_neurons(self, remove_indices: Any) -> None:
        """The same for what heads give, [layer, head · d_head] or [layer, head, d_head]."""
        self._delete("attn_pre_out", remove_indices)

    def _delete(self, point: str, remove: Any) -> None:
        rows = torch.as_tensor(remove)
        if not rows.ndim or rows.shape[0] != self.layers():
            raise InputError(
                f"{list(rows.shape)} was given, which is not one row for each of the model's "
                f"{self.layers()} layers"
            )
        masks = [self.policy(point, layer, "mask") for layer in range(self.layers())]
        for mask, row in zip(masks, rows, strict=True):
            if bool(row.any()):
                assert isinstance(mask, Mask)
                mask.delete_neurons(remove_indices=row)

    def enable_collect_hooks(
        self,
        components: Iterable[str] | None = None,
        layers: Iterable[int] | None = None,
        concat: bool = False,
    ) -> None:
        """Keep the values at points of layers in every block from here on.

        Args:
            components: points; all that the layers have if it is not given.
            layers: all if it is not given.
            concat: join the values of a generation's steps along the token axis.
        """
        points = [components] if isinstance(components, str) else list(components or ())
        for point in points:
            self[point]  # refuses a name that is none
        found = []
        for layer in range(self.layers()) if layers is None else layers:
            for point in POINTS if components is None else points:
                try:
                    found.append(self.policy(point, layer, "collect"))
                except UnavailableNameError:
                    if components is not None or not -self.layers() <= layer < self.layers():
                        raise
        for policy in found:
            assert isinstance(policy, Collect)
            policy.enable(concat)

    def disable_all_collect_hooks(self) -> None:
        """Keep nothing any more; what was kept stays."""
        for _, _, policy in self.every("collect"):
            assert isinstance(policy, Collect)
            policy.disable()

    def reset_neuron_replace(self) -> None:
        """Take all replacements away."""
        for _, _, policy in self.every("replace"):
            policy.reset()

    def reset(self) -> None:
        """Take everything back: the model computes as without hooks."""
        for kinds in self._policies.values():
            for policy in kinds.values():
                policy.reset()

    # ---------------------------------------------------------------- in a block

    def template(self) -> Template | None:
        """What is to be recorded into a block; None if nothing changes or is kept."""
        with self._lock:
            if not self._policies or self._vocabulary._verifying:
                return None  # whether names hold, the model itself tells
            every = [p for kinds in self._policies.values() for p in kinds.values()]
            places = [(*place, self.kinds(*place)) for place in self._policies]
            key = (places, [policy.state_key() for policy in every])
            if self._template is None or self._template[0] != key:
                # What the key has by number must not make room for another.
                kept = [list(policy.parameters()) for policy in every]
                self._template = (key, kept, self._record())
            return self._template[2]

    def _record(self) -> Template | None:
        places = [
            (layer, point)
            for layer in range(self.layers())
            for point in POINTS
            if any(p.active for p in self._policies.get((point, layer), {}).values())
        ]
        if not places:
            return None
        model, found = self._model, list[Template]()

        def done(tracer: Tracer, template: Template) -> None:
            found.append(template)

        # A prompt may be opened inside a block: what is recorded here is none of it.
        token = current_block.set(None)
        try:
            with Edit(model, model, model.sample_prompt(), None, None, done) as _:
                saves = [save for layer, point in places for save in self._place(layer, point)]
        finally:
            current_block.reset(token)
        found[0].saves = saves
        return found[0]

    def _place(self, layer: int, point: str) -> list[Any]:
        """Record the policies of one point; gives what is to be kept."""
        vocabulary = self._vocabulary
        before = value = vocabulary.read(layer, POINTS[point])
        saves: list[tuple[Any, Any]] = []
        for kind in self.kinds(point, layer):
            policy = self._policies[point, layer].get(kind)
            if policy is None and INVERSE_OF.get(kind) in self._policies[point, layer]:
                # It is in the configuration: what it takes back may be the only one that was set.
                policy = self.policy(point, layer, kind)
            if policy is None or not policy.active:
                continue
            if isinstance(policy, Collect):
                assert isinstance(value, Proxy)
                saves.append((current_node(value), policy.parts))
                continue
            if isinstance(policy, Counted) and not policy.autorestart:
                counted = ops.perform(ops.COUNT_TOKENS, value, counted=True)
                saves.append((current_node(counted), policy.counts))
            value = policy(value)
        if value is not before:
            write_name(self._model, vocabulary, layer, POINTS[point], value)
        return saves

    def __repr__(self) -> str:
        lines = [
            f"  {point} {layer}: {', '.join(k for k in self.kinds(point, layer))}"
            for (point, layer) in sorted(self._policies)
        ]
        return "\n".join(["hooks", *lines])


class ByName:
    """Policies of one kind by `layer_{i}_{point}`."""

    def __init__(self, hooks: Hooks, kind: str) -> None:
        self._hooks = hooks
        self._kind = kind

    def __getitem__(self, name: str) -> Any:
        found = re.fullmatch(r"layer_(\d+)_(\w+)", name)
        if found is None or found[2] not in POINTS:
            raise InputError(
                f"`{name}` is no place: write layer_2_mlp_pre_out, with a point of {', '.join(POINTS)}"
            )
        return self._hooks.policy(found[2], int(found[1]), self._kind)

    def __contains__(self, name: object) -> bool:
        found = re.fullmatch(r"layer_(\d+)_(\w+)", str(name))
        return found is not None and found[2] in POINTS and int(found[1]) < self._hooks.layers()

    def keys(self) -> list[str]:
        """The names of those that were made."""
        return [f"layer_{layer}_{point}" for point, layer, _ in self._hooks.every(self._kind)]


class Point:
    """The policies at one point of all layers."""

    def __init__(self, hooks: Hooks, point: str) -> None:
        self._hooks = hooks
        self._point = point

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            if key == "collect":
                return self._collected()
            return [self[layer][key] for layer in range(len(self))]
        count = len(self)
        if not -count <= key < count:
            raise UnavailableNameError.no_layer(key, count)
        return AtLayer(self._hooks, self._point, key % count)

    def __len__(self) -> int:
        return self._hooks.layers()

    def __iter__(self) -> Any:
        return (self[layer] for layer in range(len(self)))

    def _collected(self) -> Any:
        """What was kept of each layer: [layer, batch, token, *d], or a list if shapes differ."""
        values = []
        for point, _, policy in sorted(self._hooks.every("collect"), key=lambda one: one[1]):
            assert isinstance(policy, Collect)
            if point == self._point and policy.activation is not None:
                values.append(policy.activation)
        if values and all(
            isinstance(v, torch.Tensor) and v.shape == values[0].shape for v in values
        ):
            return torch.stack([value.to(values[0].device) for value in values])
        return values

    def set_offsets(self, offsets: Any) -> None:
        """The offset of each layer, [layer, *d]."""
        rows = torch.as_tensor(offsets)
        if not rows.ndim or rows.shape[0] != len(self):
            raise InputError(
                f"{list(rows.shape)} was given, which is not one row for each of the model's "
                f"{len(self)} layers"
            )
        for layer, row in enumerate(rows):
            self[layer]["offset"].set_offset(row)

    def __repr__(self) -> str:
        return f"<{self._point} of {len(self)} layers>"


class AtLayer:
    """The policies at one point of one layer; `["mask"]` is one of them.

    What only one of them can do, may be asked here: `add_token`, `set_actadd`, `restart` and `reset`
    of the additions, `delete_neurons`, `set_mask` of the mask, `set_offset` of the offset.
    """

    def __init__(self, hooks: Hooks, point: str, layer: int) -> None:
        self._hooks = hooks
        self._point = point
        self._layer = layer

    def __getitem__(self, kind: str) -> Any:
        return self._hooks.policy(self._point, self._layer, kind)

    def __contains__(self, kind: object) -> bool:
        return kind in self._hooks.kinds(self._point, self._layer)

    def __iter__(self) -> Any:
        return iter(self._hooks.kinds(self._point, self._layer))

    def add_token(self, token_index: int, value: Any) -> None:
        """Add a vector to a token; see `ActAdd`."""
        self["actadd"].add_token(token_index, value)

    def set_actadd(self, additions: Any) -> None:
        """All additions, [token, *d]."""
        self["actadd"].set_actadd(additions)

    def restart(self) -> None:
        """Count tokens from 0 again."""
        for kind in ("actadd", "replace"):
            found = self._hooks._policies.get((self._point, self._layer), {}).get(kind)
            if isinstance(found, (ActAdd, Replace)):
                found.restart()

    def reset(self) -> None:
        """Take the additions and replacements away."""
        for kind in ("actadd", "replace"):
            found = self._hooks._policies.get((self._point, self._layer), {}).get(kind)
            if found is not None:
                found.reset()

    def delete_neurons(self, remove_indices: Any = None, keep_indices: Any = None) -> None:
        """Mask neurons; see `Mask`."""
        self["mask"].delete_neurons(remove_indices, keep_indices)

    def set_mask(self, mask: Any) -> None:
        self["mask"].set_mask(mask)

    def set_offset(self, offset: Any) -> None:
        self["offset"].set_offset(offset)

    def __repr__(self) -> str:
        kinds = ", ".join(self._hooks.kinds(self._point, self._layer))
        return f"<{self._point} of layer {self._layer}: {kinds}>"
