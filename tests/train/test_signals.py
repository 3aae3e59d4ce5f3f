"""Hearing signals, and the exit status that a launcher makes of its ranks'."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lss.launch import status
from lss.train.signals import Signals, is_first_rank


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def test_signals_are_noted_and_the_first_counts():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        signals.begin()
        assert signals.stop == 0
        assert not signals.take_save()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert until(lambda: signals._save)
        assert signals.take_save()
        assert not signals.take_save()
        os.kill(os.getpid(), signal.SIGINT)
        assert until(lambda: signals.stop)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        assert signals.stop == signal.SIGINT
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert not any(thread.name == "lss signals" for thread in threading.enumerate())


def test_another_thread_than_the_main_one_hears_nothing():
    def inside():
        with Signals() as signals:
            signals.begin()

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_it_begins_a_process_that_waits_in_a_call_ends_at_once(number):
    """Python's own handlers would wait for the call to return."""
    code = (
        "import ctypes, time\nfrom lss.train.signals import Signals\n"
        "with Signals() as signals:\n    print('ready', flush=True)\n"
        "    libc = ctypes.CDLL(None)\n    end = time.monotonic() + 60\n"
        "    while time.monotonic() < end: libc.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    started = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert time.monotonic() - started < 5
    assert said == f"lss: stopped by {number.name} before the first step: nothing was trained yet.\n"


def test_the_command_hears_signals_before_it_imports_torch():
    code = "import sys, lss.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_first_rank_is_known_from_any_launcher():
    assert is_first_rank({})
    assert is_first_rank({"RANK": "0", "SLURM_PROCID": "3"})
    assert not is_first_rank({"OMPI_COMM_WORLD_RANK": "1"})


@pytest.mark.parametrize(
    "codes, told, expected",
    [
        ([143, -9], 0, 143), ([1, 143], 15, 1), ([2, 1], 0, 2), ([1, 2], 15, 2), ([-9], 0, 1), ([-15, -15], 0, 143),
        ([-2], 0, 130), ([-9, -15], 0, 1), ([-9], 15, 143), ([130], 0, 130), ([], 2, 130), ([], 0, 1),
    ],
)  # fmt: skip
def test_one_status_of_many(codes, told, expected):
    assert status(codes, told) == expected
