"""Policies: interventions that stay, and the same functions for any value of a block."""

from .config import POINTS, HookConfig
from .functions import (
    actadd,
    collect,
    mask,
    offset,
    postbias,
    replace,
    unoffset,
    unwhiten,
    whiten,
)
from .hooks import Hooks
from .policy import KINDS, Policy

__all__ = [
    "KINDS",
    "POINTS",
    "HookConfig",
    "Hooks",
    "Policy",
    "actadd",
    "collect",
    "mask",
    "offset",
    "postbias",
    "replace",
    "unoffset",
    "unwhiten",
    "whiten",
]
