"""One file an architecture, and the registry that finds them."""

from ...inputs.padding import IDS, POSITIONS, padding_of, pads, pads_right
from .architecture import Architecture, Block, Norm, Part, Weight, decoder
from .registry import alias_of, architecture_of, declared, register, stacks_of

__all__ = [
    "IDS",
    "POSITIONS",
    "Architecture",
    "Block",
    "Norm",
    "Part",
    "Weight",
    "alias_of",
    "architecture_of",
    "declared",
    "decoder",
    "padding_of",
    "pads",
    "pads_right",
    "register",
    "stacks_of",
]
