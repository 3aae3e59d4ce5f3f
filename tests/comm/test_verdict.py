"""Who is to blame: judged over what ranks last told, without any ranks."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from dataclasses import replace

import torch

from lss.comm import Pending, count_collectives
from lss.comm.counter import listening, record
from lss.comm.verdict import Beat, Peer, host_identity, judge, name_ranks, process_state
from lss.comm.watch import _Calls

AT = Beat(step=14, phase="training", begun=50, host="here", pid=1)
WAITS = replace(AT, begun=51, waits="all_gather of kv")


def peers(*beats, heard=100.0, moved=100.0):
    return [Peer(beat, heard=heard, moved=moved) for beat in beats]


def verdict(table, now=100.0, me=0, seen="alive", timeout=600.0):
    return judge(table, me, now, timeout=timeout, unreached=lambda begun: "", look=lambda pid: seen)


def test_nothing_is_wrong_while_all_beat():
    assert verdict(peers(AT, AT, AT)) is None


def test_a_silent_rank_is_dead_after_five_seconds():
    table = peers(WAITS, WAITS, replace(AT, host="elsewhere"), WAITS)
    for peer in (table[0], table[1], table[3]):
        peer.heard = 105.0
    assert verdict(table, now=104.9) is None
    found = verdict(table, now=105.0)
    assert found.rank == 2
    assert found.code == 1
    assert found.text == ("rank 2 has not been heard of for 5 s: killed, stopped or cut off; last seen in step 14, before "
                          "the all_gather of kv that ranks 0, 1, 3 wait in")  # fmt: skip


def test_a_process_that_lives_may_hold_its_lock_for_longer():
    table = peers(WAITS, AT)
    table[0].heard = 130.0
    assert verdict(table, now=130.0, seen="alive") is None
    assert verdict(table, now=130.0, seen="stopped").rank == 1
    assert verdict(table, now=102.5, seen="gone").text.startswith("rank 1 is gone")
    assert verdict(table, now=161.0, seen="alive").rank == 1
    # another host's process ids mean nothing here
    table[1].beat = replace(AT, host="elsewhere")
    assert "killed, stopped or cut off" in verdict(table, now=130.0, seen="alive").text


def test_the_step_of_the_collective_is_told_where_it_is_another():
    table = peers(replace(WAITS, step=15), AT)
    table[0].heard = 110.0
    assert "last seen in step 14, before the all_gather of kv of step 15 that rank 0 waits in" in verdict(
        table, now=110.0, seen="stopped").text  # fmt: skip


def test_a_rank_that_left_in_order_is_not_missed():
    table = peers(AT, replace(AT, state="done"))
    assert verdict(table, now=1000.0, seen="gone") is None


def test_a_rank_says_why_it_goes():
    table = peers(AT, replace(AT, state="failed", why="ValueError: planted", code=1))
    table[1].turned = 100.0
    assert verdict(table, now=101.0) is None  # the others may be about to say the same themselves
    assert verdict(table, now=103.0).text == "rank 1 failed in step 14: ValueError: planted"
    table[1].beat = replace(AT, step=0, phase="building the model", state="stopped", why="SIGTERM", code=143)
    found = verdict(table, now=103.0)
    assert (found.code, found.text) == (143, "rank 1 was told to stop before step 1 (building the model): SIGTERM")


def test_stuck_is_the_one_that_is_least_far():
    table = peers(WAITS, WAITS, AT, WAITS)
    now = 130.0
    for peer in table:
        peer.heard = now
    assert verdict(table, now=129.9, timeout=30) is None
    found = verdict(table, now=now, timeout=30)
    assert found.rank == 2
    assert "rank 2 is stuck: for 30 s it has not moved in step 14 (training)" in found.text
    assert "never reached the all_gather of kv that ranks 0, 1, 3 wait in" in found.text
    # the stuck one leaves the verdict to the others, who know the collective
    assert verdict(table, now=now, me=2, timeout=30) is None
    # one that gets on is slow, not stuck
    table[2].moved = 120.0
    assert verdict(table, now=now, timeout=30) is None


def test_all_at_work_without_collectives_are_not_stuck():
    table = peers(AT, AT)
    for peer in table:
        peer.heard = 10000.0
    assert verdict(table, now=10000.0, timeout=30) is None


def test_all_waiting_in_the_same_place_is_told_as_such():
    table = peers(WAITS, WAITS)
    for peer in table:
        peer.heard = 131.0
    text = verdict(table, now=131.0, timeout=30).text
    assert text == "nothing has moved for 30 s in step 14: ranks 0, 1 wait in the all_gather of kv"


def test_many_ranks_are_not_all_named():
    assert name_ranks([3]) == "rank 3 waits in"
    assert name_ranks(range(12)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4 more wait in"


def test_a_process_is_seen():
    assert process_state(os.getpid()) == "alive"
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert process_state(child.pid) == "gone"
    assert host_identity()


def test_a_beat_survives_its_text():
    assert Beat.from_text(WAITS.to_text()) == WAITS


class Work:
    def __init__(self, calls):
        self.calls, self.seen = calls, None

    def wait(self):
        self.seen = self.calls.waits()


def test_calls_know_what_is_waited_in_and_hold_nothing():
    calls, payload = _Calls(), torch.zeros(3)
    with listening(calls):
        record("all_gather", "kv", payload)
        works = [Work(calls)]
        first = Pending(works, lambda: 1)
        record("all_gather", "kv2", payload)
        second = Pending([Work(calls)], lambda: 2)
        assert calls.waits() == ""
        first.wait()
        assert works[0].seen == "all_gather of kv"
        assert calls.waits() == ""
    record("all_gather", "unheard", payload)
    assert (calls.begun, calls.last) == (2, "all_gather of kv2")
    assert calls.after(0) == "all_gather of kv"
    assert calls.after(1) == "all_gather of kv2"
    assert calls.after(2) == ""
    references = [entry[2] for entry in calls._lately]
    del first, second
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_a_failed_wait_is_still_waited_in():
    class Broken:
        def wait(self):
            raise RuntimeError("Connection closed by peer")

    calls = _Calls()
    with listening(calls):
        record("all_reduce", "labels", torch.zeros(1))
        pending = Pending([Broken()], lambda: 0)
        try:
            pending.wait()
        except RuntimeError:
            assert calls.waits() == "all_reduce of labels"


def test_equal_counters_do_not_stop_each_other():
    with count_collectives() as outer:
        with count_collectives():
            pass
        record("all_reduce", "x", torch.zeros(1))
    assert outer.calls() == 1
