"""One file an architecture, and the registry that finds them."""

from .registry import IDS, POSITIONS, alias_of, padding_of

__all__ = ["IDS", "POSITIONS", "alias_of", "padding_of"]
