"""The examples run as their first lines say, and give the same numbers on any number of ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def output(command):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [float(line.split()[-1]) for line in done.stdout.splitlines()]


def test_own_model_is_the_same_on_one_rank_and_on_three():
    example = str(ROOT / "examples" / "own_model.py")
    alone = output([sys.executable, example])
    three = output([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", example])
    assert len(alone) == 3
    assert alone[-1] < alone[0] - 0.5
    assert three == pytest.approx(alone, abs=2e-5)


def test_the_readmes_python_runs():
    code = (ROOT / "README.md").read_text().split("<!-- ten lines -->\n```python\n")[1].split("```")[0]
    report = "print(sum(p.grad.double().square().sum() for p in model.parameters()).item())\n"
    one = output([sys.executable, "-c", code + report])
    assert len(one) == 1
    assert one[0] > 0
