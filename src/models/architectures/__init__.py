"""One file an architecture, and the registry that finds them."""

from .registry import alias_of, pads_without_positions

__all__ = ["alias_of", "pads_without_positions"]
