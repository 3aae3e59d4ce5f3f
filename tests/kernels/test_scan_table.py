"""Which kernel computes a recurrence, and why another does not."""

from __future__ import annotations

import pytest
import torch

from lss.config import Refused, load_config
from lss.config.support import SCAN_KERNEL_CHOICES
from lss.kernels import scan_fla
from lss.kernels.scan import single_scan
from lss.kernels.scan_table import SCAN_KERNELS, pick_scan_kernel

QV = torch.zeros(1, 8, 1, 16), torch.zeros(1, 8, 2, 16)


def test_choices_are_the_tables():
    assert ("auto", *SCAN_KERNELS) == SCAN_KERNEL_CHOICES


def test_plain_torch_is_what_the_cpu_takes():
    assert pick_scan_kernel("auto", *QV).name == "blocks"
    assert pick_scan_kernel("blocks", *(x.double() for x in QV)).name == "blocks"


def test_what_does_not_fit_is_said():
    with pytest.raises(Refused, match=r"scan_kernel=fla: does not fit \(fla: it runs on CUDA only\); use 'auto'"):
        pick_scan_kernel("fla", *QV)
    with pytest.raises(Refused, match="it runs on CUDA only"):
        pick_scan_kernel("fla", *QV, by_channel=True)
    with pytest.raises(Refused, match="unknown kernel; use one of auto, fla, blocks"):
        pick_scan_kernel("flash", *QV)
    with pytest.raises(Refused, match="it runs on CUDA only"):
        single_scan(QV[0], QV[0], QV[1], QV[1][..., 0], kernel="fla")


FOUND = [(None, "pip install"), ("0.7.1", "fla-core 0.6, which the installed 0.7.1"), ("0.6.3", None)]


@pytest.mark.parametrize("found, told", FOUND)
def test_only_the_version_whose_functions_are_called(found, told, monkeypatch):
    monkeypatch.setattr(scan_fla, "installed", lambda: found)
    reason = scan_fla.why_not()
    assert reason is None if told is None else told in str(reason)


def test_a_model_without_scans_refuses_the_setting():
    with pytest.raises(Refused, match=r'parallel\.scan_kernel="blocks"'):
        load_config(overrides=["parallel.scan_kernel=blocks"])
