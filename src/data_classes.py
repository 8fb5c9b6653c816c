"""Owns `graftwork.data_classes`: where the configuration of pruning is found under taker's name."""

from .pruning import PruningConfig

__all__ = ["PruningConfig"]
