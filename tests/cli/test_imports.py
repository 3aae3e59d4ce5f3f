"""What a command imports: users wait for it at every start, and each started rank pays for it again."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.cli.test_cli import variables_of
from tests.faults.ranks import SMALL

# in a process of its own: this one has imported all
CHILD = """
import json, sys
import lss.launch
from lss.cli import main
lss.launch.launch_local = lambda *_, **__: 0
said = [main(line) for line in json.loads(sys.argv[1])]
print(json.dumps([said, sorted(sys.modules)]))
"""
EXTRAS = {"transformers", "torch.utils.tensorboard", "torchao", "pyarrow", "peft", "accelerate"}
LAUNCHED = ["train", *SMALL, "train.steps=1", "--nproc", "2"]


@pytest.mark.parametrize("lines, status, absent", [
    # what needs no torch does not wait for it
    ([["train", "optim.lrr=1"], ["train", "absent.toml"], ["check", "train.steps=x"], ["plan", "x=y"],
      ["bench", "text"], ["trian"]], 2, EXTRAS | {"torch", "numpy", "rich"}),
    # whoever starts ranks looks at the config and the data, and leaves the model to them
    ([LAUNCHED], 0, EXTRAS | {"torch.distributed.fsdp", "torch._dynamo", "matplotlib.figure"}),
    ([["plan", *SMALL, "--gpus", "2"]], 0, EXTRAS | {"rich", "matplotlib.figure"}),
], ids=["refused", "launcher", "plan"])  # fmt: skip
def test_commands_import_what_they_need(tmp_path, lines, status, absent):
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(lines)], cwd=tmp_path, env=variables_of(),
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, modules = json.loads(done.stdout.splitlines()[-1])
    assert said == [status] * len(lines), done.stderr
    assert absent & set(modules) == set()
