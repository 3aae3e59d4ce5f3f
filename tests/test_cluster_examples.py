"""The scripts of examples/cluster: whole, and run where this machine can stand in for a cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.ranks import SMALL, free_port

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "cluster"
SCRIPTS = sorted(FOLDER.iterdir())
# stands in for the real command: says how it was called
SAYS = '#!/usr/bin/env bash\necho "$(basename "$0") $*"\n'


def environment(**more):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER_", "RANK", "WORLD_SIZE"))}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | more


def commands(folder, **texts):
    """A folder of commands, for the front of PATH."""
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_whole(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


def test_the_page_names_every_script():
    page = (ROOT / "docs" / "clusters.md").read_text()
    assert [script.name for script in SCRIPTS if f"examples/cluster/{script.name}" not in page] == []


def test_two_hosts_on_one(tmp_path):
    variables = environment(RANKS="1", PORT=str(free_port()))
    line = [*SMALL, "train.steps=2", "--out", str(tmp_path / "run")]
    started = [
        subprocess.Popen(["bash", FOLDER / "two-hosts.sh", str(host), "127.0.0.1", *line], cwd=ROOT, env=variables,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for host in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "dp 1 x cp 2" in said[0]
    assert [json.loads(row)["step"] for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_two_hosts_wants_to_know_which():
    done = subprocess.run(["bash", FOLDER / "two-hosts.sh", "0"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage" in done.stderr


@pytest.mark.parametrize(
    "version, hosts, expected",
    [
        ("mpirun (Open MPI) 5.0.8", "", "mpirun -n 4 --bind-to none py -m lss train a.toml x=1"),
        ("mpirun (Open MPI) 5.0.8", "n1:2,n2:2",
         "mpirun -n 4 --bind-to none --host n1:2,n2:2 -x MASTER_ADDR -x MASTER_PORT py -m lss train a.toml x=1"),
        ("HYDRA build details: Version: 4.3.1", "n1:2,n2:2",
         "mpirun -n 4 -hosts n1:2,n2:2 -genvlist MASTER_ADDR,MASTER_PORT py -m lss train a.toml x=1"),
    ],
)  # fmt: skip
def test_mpirun_by_its_kind(tmp_path, version, hosts, expected):
    fake = f'#!/usr/bin/env bash\n[ "$1" = --version ] && echo "{version}" && exit\necho "mpirun $*"; echo "$MASTER_ADDR"\n'
    variables = environment(PATH=commands(tmp_path / "bin", mpirun=fake), RANKS="4", HOSTS=hosts, PYTHON="py")
    script = FOLDER / "mpirun.sh"
    done = subprocess.run(["bash", script, "a.toml", "x=1"], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [expected, "n1" if hosts else ""]


SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo gpu1; echo gpu2; else echo "scontrol $*"; fi
"""
SRUN = """#!/usr/bin/env bash
SLURM_NODEID=1 exec "$@"
"""


def test_slurm_starts_torchrun_on_each_node(tmp_path):
    path = commands(tmp_path / "bin", srun=SRUN, scontrol=SCONTROL, py=SAYS)
    variables = environment(PATH=path, PYTHON="py", RANKS="8", SLURM_JOB_ID="3001", SLURM_JOB_NODELIST="gpu[1-2]",
                            SLURM_NNODES="2")  # fmt: skip
    done = subprocess.run(["bash", FOLDER / "slurm.sbatch", "a.toml", "x=1 2"], env=variables, capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert done.stdout == (
        "py -m torch.distributed.run --nnodes=2 --nproc-per-node=8 --node-rank=1 --master-addr=gpu1 --master-port=29501 "
        "-m lss train a.toml x=1 2\n"
    )


def test_slurm_queues_a_run_again_whose_time_is_up(tmp_path):
    pid = tmp_path / "pid"
    # ranks that take a moment to save when they are told to stop; torchrun above them must not die of USR1
    srun = (f"#!/usr/bin/env bash\ntrap 'sleep 0.3; echo saved; exit 143' TERM\necho $$ > {pid}\n"
            "while true; do sleep 0.05; done\n")  # fmt: skip
    scancel = f'#!/usr/bin/env bash\necho "scancel $*"; kill -TERM "$(cat {pid})"\n'
    path = commands(tmp_path / "bin", srun=srun, scontrol=SCONTROL, scancel=scancel)
    variables = environment(PATH=path, SLURM_JOB_ID="7", SLURM_JOB_NODELIST="gpu[1-2]")
    job = subprocess.Popen(["bash", FOLDER / "slurm.sbatch"], env=variables, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not pid.exists() or not pid.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    said = job.communicate(timeout=60)[0].splitlines()
    assert said == ["scancel --signal=TERM 7", "saved", "scontrol requeue 7"]
    assert job.returncode == 143


def test_torchrun_outlives_the_notice_that_its_ranks_get(tmp_path):
    """The shell in front of torchrun passes on that USR1 is ignored."""
    # the command that srun would start on a node, then a notice to it
    report = '#!/usr/bin/env bash\nkill -USR1 $$; sleep 0.1; echo alive\n'
    path = commands(tmp_path / "bin", srun=SRUN, scontrol=SCONTROL, py=report)
    variables = environment(PATH=path, PYTHON="py", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="gpu[1-2]", SLURM_NNODES="2")
    done = subprocess.run(["bash", FOLDER / "slurm.sbatch"], env=variables, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("alive\n", 0)


def test_slurm_a_rank_each(tmp_path):
    path = commands(tmp_path / "bin", srun=SAYS)
    done = subprocess.run(["bash", FOLDER / "slurm-per-rank.sbatch", "a.toml"], env=environment(PATH=path, PYTHON="py"),
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout == "srun --kill-on-bad-exit=1 py -m lss train a.toml\n"
