"""Who is to blame where ranks stop answering: pure judgement over what each of them last told.

Times are those of the observer while it was awake: it counts its own rounds of reading, so that a process that was itself
stopped, or kept from running for seconds, does not take the others' silence for death.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# A rank beats each second from a thread of its own, which its process can hold up only by keeping Python's lock (how long it
# does is measured in docs/reliability.md). Five missed beats leave half of the ten seconds in which all must be gone.
SILENCE = 5.0
# Where the process can be seen on this host and is neither gone nor stopped, something does hold Python's lock.
SILENCE_OF_THE_LIVING = 60.0
# A process that is seen to be gone may have said why; its last beat, and the others' first failed transfers, come in first.
GRACE = 2.0


@dataclass(frozen=True)
class Beat:
    """What a rank tells each second.

    Attributes:
        number: counts its beats.
        step, phase: where it is; 0 before step 1.
        begun: collectives that it has issued so far.
        waits: the one that it waits in, as "all_gather of kv"; empty where it waits in none.
        state: "on"; "done" (left in order), "stopped" (told to), "failed"; `why` and `code` (exit status) say more.
        pid, host: the process, and what tells whether another process can see it.
        node: the first rank of its host.
    """

    number: int = 0
    step: int = 0
    phase: str = ""
    begun: int = 0
    waits: str = ""
    state: str = "on"
    why: str = ""
    code: int = 0
    pid: int = 0
    host: str = ""
    node: int = 0

    def to_text(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str | bytes) -> Beat:
        """The inverse."""
        return cls(**json.loads(text))

    @property
    def place(self) -> str:
        """Where the rank is, in words."""
        return f"in step {self.step}" if self.step else f"before step 1 ({self.phase})"


@dataclass
class Peer:
    """A rank as another sees it: its last beat, and when it last beat, got on and came to its present state."""

    beat: Beat
    heard: float = 0.0
    moved: float = 0.0
    turned: float = 0.0

    def update(self, beat: Beat, now: float) -> None:
        """Take in what was read."""
        if beat.number != self.beat.number:
            self.heard = now
        if (beat.step, beat.phase, beat.begun) != (self.beat.step, self.beat.phase, self.beat.begun):
            self.moved = now
        if beat.state != self.beat.state:
            self.turned = now
        self.beat = beat


@dataclass(frozen=True)
class Verdict:
    """Why the run ends, in one sentence without the full stop, and the exit status."""

    text: str
    code: int = 1
    rank: int = -1


def process_state(pid: int) -> str | None:
    """"gone", "stopped" or "alive"; None where this system does not tell."""
    if not Path("/proc/self/stat").exists():
        return None
    try:
        # the name before the state may hold spaces and brackets
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "gone"
    return "gone" if state in "ZX" else "stopped" if state in "Tt" else "alive"


def host_identity() -> str:
    """Two processes can see each other by their ids where this is the same: this boot, and the space of process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def judge(
    peers: Sequence[Peer],
    me: int,
    now: float,
    *,
    timeout: float,
    unreached: Callable[[int], str] = lambda begun: "",
    look: Callable[[int], str | None] = process_state,
) -> Verdict | None:
    """The verdict of rank `me`, or None while nothing is wrong.

    Args:
        peers: all ranks, `me` included.
        now: on the clock of the peers' times.
        timeout: seconds without progress after which a rank that others wait for is stuck.
        unreached: the collective that follows so many of them, as this rank has issued it; empty where it is not known.
        look: the state of a process of this host.
    """
    for rank, peer in enumerate(peers):
        if rank == me or peer.beat.state == "done":
            continue
        found = _left(rank, peer, now) or _silent(rank, peers, me, now, look, unreached)
        if found is not None:
            return found
    return _stuck(peers, me, now, timeout, unreached)


def _left(rank: int, peer: Peer, now: float) -> Verdict | None:
    beat = peer.beat
    if beat.state == "on" or now - peer.turned < GRACE:
        return None
    if beat.state == "stopped":
        return Verdict(f"rank {rank} was told to stop {beat.place}: {beat.why}", beat.code, rank)
    return Verdict(f"rank {rank} failed {beat.place}: {beat.why}", beat.code or 1, rank)


def _silent(
    rank: int, peers: Sequence[Peer], me: int, now: float, look: Callable[[int], str | None], unreached: Callable[[int], str]
) -> Verdict | None:
    peer = peers[rank]
    silence = now - peer.heard
    if peer.beat.state != "on" or silence < GRACE:
        return None
    seen = look(peer.beat.pid) if peer.beat.host and peer.beat.host == peers[me].beat.host else None
    if seen == "gone":
        how = f"is gone: its process {peer.beat.pid} was killed or crashed"
    elif silence >= (SILENCE_OF_THE_LIVING if seen == "alive" else SILENCE):
        what = {"stopped": "its process is stopped", "alive": "its process lives but answers nothing"}
        how = f"has not been heard of for {silence:.0f} s: {what.get(seen or '', 'killed, stopped or cut off')}"
    else:
        return None
    return Verdict(f"rank {rank} {how}; last seen {peer.beat.place}{_waited_for(rank, peers, me, unreached)}", 1, rank)


def _waited_for(rank: int, peers: Sequence[Peer], me: int, unreached: Callable[[int], str]) -> str:
    """Which collective others wait in for this rank."""
    waiting = {r: p.beat.waits for r, p in enumerate(peers) if r != rank and p.beat.waits and p.beat.state == "on"}
    if not waiting:
        label = unreached(peers[rank].beat.begun)
        return f", before the {label}" if label else ""
    # groups of other ranks may wait elsewhere, for ranks that wait for this one
    label = Counter(waiting.values()).most_common(1)[0][0]
    ranks = [r for r, waits in waiting.items() if waits == label]
    step = max(peers[r].beat.step for r in ranks)
    of = f" of step {step}" if step != peers[rank].beat.step else ""
    return f", before the {label}{of} that {name_ranks(ranks)}"


def name_ranks(ranks: Sequence[int]) -> str:
    """Ranks and the verb: "rank 1 waits in", "ranks 0, 2, 3 wait in"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} waits in"
    shown = ", ".join(str(r) for r in ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"ranks {shown} wait in"


def _stuck(
    peers: Sequence[Peer], me: int, now: float, timeout: float, unreached: Callable[[int], str]
) -> Verdict | None:
    """Somebody waits, and nobody has got on for `timeout`: the one that is least far holds up the rest."""
    on = {rank: peer for rank, peer in enumerate(peers) if peer.beat.state == "on"}
    waiting = [rank for rank, peer in on.items() if peer.beat.waits]
    if not waiting or any(now - peer.moved < timeout for peer in on.values()):
        return None
    least = min(peer.beat.begun for peer in on.values())
    behind = [rank for rank, peer in on.items() if peer.beat.begun == least and not peer.beat.waits]
    behind = behind or [rank for rank, peer in on.items() if peer.beat.begun == least]
    rank = behind[0]
    if set(waiting) <= {rank} or (rank in waiting and len(behind) == len(on)):
        label, ranks = peers[rank].beat.waits, sorted(waiting)
        place = peers[rank].beat.place
        return Verdict(f"nothing has moved for {timeout:g} s {place}: {name_ranks(ranks)} the {label}", 1)
    if rank == me:  # what it has not reached only the others can tell
        return None
    label = unreached(least) or Counter(on[r].beat.waits for r in waiting if r != rank).most_common(1)[0][0]
    ranks = [r for r in waiting if r != rank]
    where = f"{peers[rank].beat.place}" + (f" ({peers[rank].beat.phase})" if peers[rank].beat.step else "")
    text = f"rank {rank} is stuck: for {timeout:g} s it has not moved {where}, and never reached the {label} that"
    return Verdict(f"{text} {name_ranks(ranks)}", 1, rank)
