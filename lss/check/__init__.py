"""Proof on the user's own config: one rank against N."""

from lss.check.hf import check_hf
from lss.check.parity import CheckResult, check_config

__all__ = ["CheckResult", "check_config", "check_hf"]
