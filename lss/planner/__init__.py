"""What a run will take, read from a trace of the product's own code under tensors without data."""

from lss.planner.against import Against, known_hardware, plan_of_run
from lss.planner.curve import Curve
from lss.planner.drawn import Traces
from lss.planner.estimate import estimate, warning
from lss.planner.hardware import HARDWARE, Hardware, find_hardware
from lss.planner.ledger import CLASSES, Ledger, Peak
from lss.planner.meter import Meter
from lss.planner.plan import Plan, make_plan, plan_curve
from lss.planner.search import Search, Tried
from lss.planner.trace import StepTrace, trace_step

__all__ = [
    "Against", "CLASSES", "Curve", "HARDWARE", "Hardware", "Ledger", "Meter", "Peak", "Plan", "Search", "StepTrace",
    "Traces", "Tried", "estimate", "find_hardware", "known_hardware", "make_plan", "plan_curve", "plan_of_run",
    "trace_step", "warning",
]  # fmt: skip
