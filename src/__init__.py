"""graftwork: a compiler for interventions on neural networks."""

from .models import LanguageModel, Model
from .tracing import GraftworkError, apply, reset, save

__version__ = "0.1.0"

__all__ = ["GraftworkError", "LanguageModel", "Model", "__version__", "apply", "reset", "save"]
