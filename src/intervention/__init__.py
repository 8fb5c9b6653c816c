"""When and where it happens: schedule, shapes, plan, run, hooks. It knows modules, not models."""

from .patcher import Patcher
from .plan import Plan, arrivals, plan
from .rows import splits
from .run import Run, Stop, no_grad
from .schedule import Schedule, measure
from .shapes import Shapes, Structure

__all__ = [
    "Patcher",
    "Plan",
    "Run",
    "Schedule",
    "Shapes",
    "Stop",
    "Structure",
    "arrivals",
    "measure",
    "no_grad",
    "plan",
    "splits",
]
