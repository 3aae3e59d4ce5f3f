"""What a person sees: plain lines in a pipe, a bar on a terminal, nothing on other ranks."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from lss.train.console import SilentConsole, TrainConsole, duration, make_console
from lss.train.metrics import KEYS


def row(step):
    return {key: step if key == "step" else 1.0 for key in KEYS} | {"peak_memory_bytes": 1 << 30, "mfu": None}


def test_plain_lines_are_few_and_hold_the_numbers():
    stream = io.StringIO()
    console = TrainConsole(200, 1, stream=stream)
    console.start([("model", "tiny [4 layers]")])
    for step in range(1, 201):
        console.step(row(step))
    console.evaluation(200, 0.6931471805599453, 1.0)
    console.finish(["held-out: 1.00 bits per byte"])
    lines = stream.getvalue().splitlines()
    steps = [line for line in lines if " loss " in line]
    assert 10 <= len(steps) <= 30
    assert steps[0].startswith("step 1/200  loss 1.0000 (1.443 bits)  1 tokens/s  1.00 GiB")
    assert steps[-1].startswith("step 200/200")
    assert "tiny [4 layers]" in lines[0]
    assert "held-out 0.6931 nats, 1.000 bits per byte" in stream.getvalue()
    assert lines[-1] == "held-out: 1.00 bits per byte"


def test_a_terminal_gets_a_bar_with_loss_speed_memory_and_time():
    stream = io.StringIO()
    console = TrainConsole(3, 2, stream=stream)
    console._console = Console(file=stream, force_terminal=True, width=120)
    console.start([])
    console.step(row(2))
    assert console._progress is not None
    assert console._progress.tasks[0].completed == 2
    assert "tokens/s" in console._progress.tasks[0].description
    console.step(row(3))
    console.finish(["done"])
    assert "3/3" in stream.getvalue()
    assert "GiB" in stream.getvalue()
    assert stream.getvalue().rstrip().endswith("done")


@pytest.mark.parametrize("total", [1, 2, 5, 19, 20, 39, 100, 119, 139, 1000])
def test_every_length_of_run_gets_enough_lines_with_its_first_and_last(total):
    stream = io.StringIO()
    console = TrainConsole(total, 1, stream=stream)
    for step in range(1, total + 1):
        console.step(row(step))
    lines = stream.getvalue().splitlines()
    assert min(total, 10) <= len(lines) <= 40
    assert lines[0].startswith(f"step 1/{total} ")
    assert lines[-1].startswith(f"step {total}/{total} ")
    assert len(set(lines)) == len(lines)


def test_words_are_printed_as_they_are():
    stream = io.StringIO()
    console = TrainConsole(1, 1, stream=stream)
    folder = "/data/[bold]runs[/bold]/:smile:/" + "long" * 60
    console.start([("folder", folder), ("a", "b")])
    console.finish([folder])
    assert stream.getvalue() == f"folder  {folder}\na       b\n{folder}\n"


def test_a_narrow_terminal_keeps_the_step_and_the_time_left():
    stream = io.StringIO()
    console = TrainConsole(30_000, 1, stream=stream)
    console._console = Console(file=stream, force_terminal=True, width=60)
    console.start([])
    console.step(row(12_345))
    console.finish()
    assert "12345/30000" in stream.getvalue()
    assert "loss 1.0000" in stream.getvalue()


def test_a_bar_that_a_failed_run_leaves_gives_the_cursor_back():
    code = """
import sys
from rich.console import Console
from lss.train.console import TrainConsole
console = TrainConsole(3, 1)
console._console = Console(force_terminal=True)
console.start([])
sys.exit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 3, done.stderr
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert hidden in done.stdout
    assert done.stdout.rindex(shown) > done.stdout.rindex(hidden)


def test_durations():
    assert [duration(s) for s in (0, 59.6, 3723, 360_000)] == ["0:00:00", "0:01:00", "1:02:03", "100:00:00"]


def test_other_ranks_are_silent(capsys):
    console = make_console(False, 2, 1)
    assert isinstance(console, SilentConsole)
    console.start([("a", "b")])
    console.step(row(1))
    console.evaluation(1, 1.0, 1.4)
    console.finish(["done"])
    assert capsys.readouterr().out == ""
