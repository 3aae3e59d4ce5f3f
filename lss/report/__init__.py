"""Pages made from runs' files: JSON and JSONL in, one self-contained HTML out."""

from lss.report.page import build_report

__all__ = ["build_report"]
