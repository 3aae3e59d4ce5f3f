"""The examples run as their first lines say, and give the same numbers on any number of ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def output(command):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path)
    environment |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
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


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
@pytest.mark.parametrize("name", ["trainer.py", "accelerate_loop.py"])
def test_trainer_and_a_loop_with_accelerate_are_the_same_on_one_rank_and_on_two(name):
    example = str(ROOT / "examples" / name)
    alone = output([sys.executable, example])
    two = output([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", example])
    assert len(alone) == 2
    assert alone[-1] < alone[0] - 0.3
    assert two == pytest.approx(alone, abs=2e-5)


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_a_hugging_face_model_is_the_same_on_one_rank_and_on_two():
    example = str(ROOT / "examples" / "hf_finetune.py")
    alone = output([sys.executable, example])
    two = output([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", example])
    assert len(alone) == 3
    assert alone[-1] < alone[0] - 1.0
    assert two == pytest.approx(alone, abs=2e-5)


def test_the_readmes_python_runs():
    code = (ROOT / "README.md").read_text().split("<!-- ten lines -->\n```python\n")[1].split("```")[0]
    report = "print(sum(p.grad.double().square().sum() for p in model.parameters()).item())\n"
    one = output([sys.executable, "-c", code + report])
    assert len(one) == 1
    assert one[0] > 0
