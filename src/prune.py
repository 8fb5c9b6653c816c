"""Owns `graftwork.prune`: where pruning is found under taker's name."""

from .pruning import run_pruning

__all__ = ["run_pruning"]
