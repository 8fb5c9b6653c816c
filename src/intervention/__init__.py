"""When and where it happens: schedule, shapes, plan, run, hooks. It knows modules, not models."""

from .demand import (
    Known,
    Part,
    Places,
    Task,
    gradients_as_asked,
    gradients_untouched,
    own_draws,
    resume,
    same_draws,
)
from .interrupts import add_hook, remove_hooks, unharmed
from .padding import warn_of_padding
from .patcher import Patcher, at_path
from .plan import Facts, Pass, Plan, Settings
from .planner import plan
from .prefix import Prefix
from .run import Run, Stop, no_grad
from .schedule import Schedule, measure
from .shape_check import ShapeCheck
from .shapes import Shapes, Structure
from .source import Listing, forward_name, listing

__all__ = [
    "Facts",
    "Known",
    "Listing",
    "Part",
    "Pass",
    "Patcher",
    "Places",
    "Plan",
    "Prefix",
    "Run",
    "Schedule",
    "Settings",
    "ShapeCheck",
    "Shapes",
    "Stop",
    "Structure",
    "Task",
    "add_hook",
    "at_path",
    "forward_name",
    "gradients_as_asked",
    "gradients_untouched",
    "listing",
    "measure",
    "no_grad",
    "own_draws",
    "plan",
    "remove_hooks",
    "resume",
    "same_draws",
    "unharmed",
    "warn_of_padding",
]
