"""When and where it happens: schedule, shapes, plan, run, hooks. It knows modules, not models."""

from .gradients import DifferentiatedRun
from .patcher import Patcher, at_path
from .plan import Facts, Pass, Plan, Settings
from .planner import plan
from .prefix import Prefix
from .run import Run, Stop, no_grad
from .schedule import Schedule, measure
from .shapes import Shapes, Structure

__all__ = [
    "DifferentiatedRun",
    "Facts",
    "Pass",
    "Patcher",
    "Plan",
    "Prefix",
    "Run",
    "Schedule",
    "Settings",
    "Shapes",
    "Stop",
    "Structure",
    "at_path",
    "measure",
    "no_grad",
    "plan",
]
