"""Owns `HookConfig`: which policies are at which point of which layers, as text."""

from __future__ import annotations

from typing import Any

from ..tracing.errors import InputError, near
from .policy import KINDS

#: Points of a layer and the unified names that they are.
POINTS: dict[str, str] = {
    "pre_decoder": "resid_pre",
    "pre_attn": "pre_attn",
    "attn_pre_out": "z",
    "post_attn": "post_attn",
    "pre_mlp": "pre_mlp",
    "mlp_pre_out": "mlp_post",
    "post_mlp": "post_mlp",
    "post_decoder": "resid_post",
}

DEFAULT = """
pre_decoder: collect
post_decoder: collect
pre_attn: collect
attn_pre_out: offset, mask, replace, collect, unoffset
post_attn: collect
pre_mlp: collect
mlp_pre_out: offset, mask, replace, collect, unoffset
post_mlp: collect
"""


class HookConfig:
    """Policies by point, for all layers or for single ones.

    Lines are `point: policy, policy` for all layers, or `point: layer: policy, policy`. Policies of one
    point are applied from left to right.

    Attributes:
        hooks: {point: {layer or "all": [policy, …]}}.
    """

    def __init__(self, hooks: dict[str, dict[int | str, list[str]]] | None = None) -> None:
        self.hooks: dict[str, dict[int | str, list[str]]] = {}
        for point, layers in (hooks or {}).items():
            for layer, kinds in layers.items():
                self.set(point, layer, kinds)

    def from_string(self, text: str) -> HookConfig:
        """Read the lines of a text into this configuration; gives it back.

        Raises:
            InputError: a point, layer or policy that is not known, with its line.
        """
        for number, line in enumerate(text.splitlines(), 1):
            line = line.partition("#")[0].strip()
            if not line:
                continue
            parts = [part.strip() for part in line.split(":")]
            if len(parts) not in (2, 3):
                raise InputError(
                    f"line {number} of the hook configuration, {line!r}, is neither `point: policies` "
                    "nor `point: layer: policies`."
                )
            layer: int | str = "all"
            if len(parts) == 3 and parts[1] != "all":
                if not parts[1].isdecimal():
                    raise InputError(
                        f"line {number}: {parts[1]!r} is no number of a layer, and not all"
                    )
                layer = int(parts[1])
            kinds = [kind.strip() for kind in parts[-1].split(",") if kind.strip()]
            try:
                self.set(parts[0], layer, kinds)
            except InputError as error:
                raise InputError(f"line {number} of the hook configuration: {error}") from None
        return self

    def set(self, point: str, layer: int | str, kinds: list[str]) -> None:
        """Which policies are at a point of a layer, or of "all"."""
        if point not in POINTS:
            raise InputError(f"no point is called `{point}`. It is one of {', '.join(POINTS)}.")
        if layer != "all" and (not isinstance(layer, int) or layer < 0):
            raise InputError(f"{layer!r} is no number of a layer, and not all")
        for kind in kinds:
            if kind not in KINDS:
                raise InputError(f"no policy is called `{kind}`. {near(kind, KINDS)}")
        twice = {kind for kind in kinds if kinds.count(kind) > 1}
        if twice:
            raise InputError(f"`{sorted(twice)[0]}` is twice at `{point}`")
        self.hooks.setdefault(point, {})[layer] = list(kinds)

    def at(self, point: str, layer: int) -> list[str]:
        """The policies at a point of a layer: its own, or else those of all layers."""
        layers = self.hooks.get(point, {})
        return list(layers.get(layer, layers.get("all", [])))

    def to_string(self) -> str:
        """The configuration as text that `from_string` reads."""
        lines = []
        for point, layers in self.hooks.items():
            for layer, kinds in layers.items():
                where = point if layer == "all" else f"{point}: {layer}"
                lines.append(f"{where}: {', '.join(kinds)}")
        return "\n".join(lines) + "\n"

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, HookConfig) and self.hooks == other.hooks

    __hash__ = None  # type: ignore[assignment]

    __str__ = to_string

    def __repr__(self) -> str:
        return f"HookConfig({self.hooks!r})"


def default() -> HookConfig:
    """What a model has where nothing else is said."""
    return HookConfig().from_string(DEFAULT)
