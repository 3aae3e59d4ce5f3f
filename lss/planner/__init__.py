"""What a run will take, read from a trace of the product's own code under tensors without data."""

from lss.planner.ledger import CLASSES, Ledger, Peak
from lss.planner.trace import StepTrace, trace_step

__all__ = ["CLASSES", "Ledger", "Peak", "StepTrace", "trace_step"]
