"""What was asked: the recorded graph, the proxies that record it, the blocks they are written in.

This room knows torch tensors and no modules. Nothing here runs a model.
"""

from . import einops_backend as einops_backend
from .context import Invoker, Tracer, current_tracer, reset
from .errors import GraftworkError
from .graph import Graph
from .node import HookPoint, Node
from .proxy import BlockOutput, Proxy, SavedTensor, apply
from .save import save

__all__ = [
    "BlockOutput",
    "GraftworkError",
    "Graph",
    "HookPoint",
    "Invoker",
    "Node",
    "Proxy",
    "SavedTensor",
    "Tracer",
    "apply",
    "current_tracer",
    "reset",
    "save",
]
