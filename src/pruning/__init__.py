"""pruning: which neurons serve one kind of text and not another, and a model without them."""

from .config import PruningConfig
from .data import Document, TokenBatch, load_documents, token_batches
from .deletion import delete
from .errors import PruningError
from .evaluation import Evaluation, evaluate
from .history import History
from .run import run_pruning
from .scoring import SCORINGS, top_fraction
from .statistics import Collected, Statistics, collect

__all__ = [
    "SCORINGS",
    "Collected",
    "Document",
    "Evaluation",
    "History",
    "PruningConfig",
    "PruningError",
    "Statistics",
    "TokenBatch",
    "collect",
    "delete",
    "evaluate",
    "load_documents",
    "run_pruning",
    "token_batches",
    "top_fraction",
]
