"""The world: loading, tokenizing, batching of inputs, architectures, running a block."""

from .base import Model
from .language import LanguageModel

__all__ = ["LanguageModel", "Model"]
