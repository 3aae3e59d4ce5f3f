"""What a run will take, read from a trace of the product's own code under tensors without data."""

from lss.planner.estimate import estimate, warning
from lss.planner.ledger import CLASSES, Ledger, Peak
from lss.planner.meter import Meter
from lss.planner.trace import StepTrace, trace_step

__all__ = ["CLASSES", "Ledger", "Meter", "Peak", "StepTrace", "estimate", "trace_step", "warning"]
