"""The best settings for a model and a cluster, the longest sequence, or the smallest cluster: plans tried in a good order.

Nothing here computes a time or a byte of its own: every candidate is a `Plan`. What is left out, and why:

- Settings that lessen memory cost time, each more than the one before (`RUNGS`, then sharding). For a number of ranks that
  share a sequence they are tried in this order until one fits; what comes behind it could only be slower.
- More ranks a sequence exchange more keys for the same work, but leave more room. So once the fastest rung fits, `cp` grows
  until two in a row were slower.
- A rung that was far from fitting with fewer ranks a sequence, half as many sequences, or weights that are not sharded, is
  not traced again where its activations, divided among more, doubled or as they are, still leave it far from that.
- What cannot be as fast as a plan that fits is not traced: the time of attention is known without, and that of matrix
  products is as of plans that compute as much again, or less, token for token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from lss.config import Config
from lss.config.errors import Refused
from lss.planner.drawn import Traces
from lss.planner.hardware import Hardware
from lss.planner.plan import Plan, attention_seconds, make_plan
from lss.planner.remedies import size
from lss.planner.tracers import Tracers
from lss.train.memory import host_state_bytes, state_bytes

# (memory.checkpointing, memory.offload), the fastest first.
RUNGS = (("none", "none"), ("attention", "none"), ("attention", "host"), ("full", "none"), ("full", "host"))
# Tokens of a rank at least; shorter segments would be kernels of next to nothing.
LEAST_SEGMENT = 128
# Numbers of ranks a sequence that are looked at, at most.
MOST_CP = 12
# Tokens of a tile where nothing fits with those that "auto" makes: a product of so many still fills a device.
SMALL_TILES = 2048
# How far above the room a rung must be drawn out to be passed over without a trace.
FAR = 1.25
# Lengths are found to this part of themselves.
CLOSE = 0.02
# Ranks that share a sequence at most: a trace takes time in proportion to them, seconds at this number.
MOST_SHARING = 4096

Build = Callable[[Sequence[str], int], Config]
Settings = tuple[str, ...]


@dataclass(frozen=True)
class Tried:
    """One candidate: its settings as overrides, its plan (None where none was needed or it was refused), and why it lost.

    `slower`: it was not planned, since it could not be as fast as one that fits.
    """

    settings: Settings
    plan: Plan | None
    why: str = ""
    slower: bool = False

    @property
    def fits(self) -> bool:
        """Whether there is a plan that fits."""
        return self.plan is not None and self.plan.fits

    @property
    def cost(self) -> float:
        """Seconds a token of the whole cluster."""
        assert self.plan is not None
        return self.plan.step / self.plan.tokens


class Search:
    """Searches over what the user has not fixed.

    Args:
        build: makes a config of overrides, resolved for a number of ranks (0: as it is read); may raise Refused.
        hardware: to plan for.
        fixed: names of keys that stay as they are.
        on_try: called with each candidate as it is done.
        tracers: processes that take the plans' traces; by default this one does.
    """

    def __init__(
        self, build: Build, hardware: Hardware, fixed: Iterable[str], on_try: Callable[[Tried], None] = lambda tried: None,
        tracers: Tracers | None = None,
    ) -> None:  # fmt: skip
        self._build, self._hardware, self._fixed, self._on_try = build, hardware, frozenset(fixed), on_try
        self._traces = Traces(tracers)
        # kind -> (ranks a sequence, bytes beside the state) of the latest that did not fit
        self._far: dict[tuple[Settings, int], tuple[int, int]] = {}
        # (kind, ranks a sequence) -> bytes beside the state, and of the host
        self._beside: dict[tuple[tuple[Settings, int], int], tuple[int, int]] = {}
        # checkpointing -> seconds of matrix products for each token of a rank
        self._matrices: dict[str, float] = {}
        self._least = math.inf  # seconds a token of the fastest that fits, where the fastest is looked for

    # -- the three questions -------------------------------------------------------------------------------------------

    def best(self, ranks: int) -> list[Tried]:
        """All candidates for so many ranks, the fastest first, those that do not fit last; each but the first says why."""
        tried: list[Tried] = []
        worse = 0
        for cp in self._cps(ranks):
            before = self._least
            here = self._at_cp(cp, ranks)
            tried += here
            now = min((t.cost for t in here if t.fits), default=None)
            fastest = any(t.fits and set(self._rungs()[0]) <= set(t.settings) for t in tried)
            if fastest and before < math.inf and (now is not None or any(t.slower for t in here)):
                worse = worse + 1 if now is None or now >= before else 0
                if worse == 2:
                    break
        fitting = sorted((t for t in tried if t.fits), key=lambda t: t.cost)
        if fitting:
            fitting = self._varied(fitting, ranks)
        elif "memory.tiles" not in self._fixed:  # what is left to give up: large products
            tried += [self._try((*settings, f"memory.tiles={SMALL_TILES}"), ranks) for settings in self._frugal(ranks)[-1:]]
            fitting = [t for t in tried if t.fits]
        losers = [replace(t, why=t.why or _slower(t, fitting[0])) for t in fitting[1:]]
        return fitting[:1] + losers + [t for t in tried if not t.fits]

    def longest(self, ranks: int) -> tuple[Tried | None, int]:
        """The most frugal settings at the longest sequence that they fit, and its tokens; (None, 0) where none does."""
        found: tuple[Tried | None, int] = None, 0
        for settings in self._frugal(ranks):
            tried, tokens = self._longest_of(settings, ranks)
            if tokens > found[1]:
                found = tried, tokens
        return found

    def fewest(self) -> tuple[Tried | None, int]:
        """The most frugal settings on the fewest ranks that they fit, powers of two up to `MOST_SHARING`; or (None, 0)."""
        ranks = 1
        while ranks <= MOST_SHARING:
            for settings in self._frugal(ranks):
                tried = self._try(settings, ranks)
                if tried.fits:
                    return tried, ranks
            ranks *= 2
        return None, 0

    # -- candidates ----------------------------------------------------------------------------------------------------

    def _cps(self, ranks: int) -> list[int]:
        config, divisors = self._build((), 0), [n for n in range(1, ranks + 1) if ranks % n == 0]
        for key, kept in (("parallel.cp", "cp"), ("parallel.dp", "dp")):
            if key in self._fixed:
                given = getattr(config.parallel, kept)
                divisors = [n for n in divisors if given in ("auto", n if kept == "cp" else ranks // n)]
        if "train.batch_size" in self._fixed:
            divisors = [n for n in divisors if config.train.batch_size % (ranks // n) == 0]
        divisors = [n for n in divisors if config.data.seq_len // n >= LEAST_SEGMENT and n <= MOST_SHARING] or divisors[:1]
        if len(divisors) > MOST_CP:
            powers = [divisors[-1] ** (step / (MOST_CP - 1)) for step in range(MOST_CP)]
            divisors = sorted({min(divisors, key=lambda n: abs(n / power - 1)) for power in powers})
        return divisors

    def _at_cp(self, cp: int, ranks: int, rows: int = 1) -> list[Tried]:
        """Candidates of so many ranks a sequence, without and with sharding, each down to the first rung that fits."""
        tried: list[Tried] = []
        layout = self._free({"parallel.cp": cp, "parallel.dp": ranks // cp})
        if "train.batch_size" not in self._fixed:
            layout += (f"train.batch_size={rows * ranks // cp}",)
        sharding: list[str | None] = ["false", "true"] if ranks > 1 and "parallel.fsdp" not in self._fixed else [None]
        for number, rung in enumerate(self._rungs()):
            for sharded in list(sharding):
                base = layout if sharded is None else (*layout, f"parallel.fsdp={sharded}")
                tried.append(self._try((*base, *rung), ranks, cp, seek=True))
                if tried[-1].fits or tried[-1].slower:  # what comes behind it could only be slower
                    sharding.remove(sharded)
                if tried[-1].fits and number == 0:  # sharding could only be slower
                    return tried
        return tried

    def _rungs(self) -> list[Settings]:
        rungs = [self._free({"memory.checkpointing": kept, "memory.offload": where}) for kept, where in RUNGS]
        return list(dict.fromkeys(rungs))

    def _frugal(self, ranks: int) -> list[Settings]:
        """Settings that take least of the device: all ranks, or as many as may, share a sequence."""
        cp = max(n for n in range(1, min(ranks, MOST_SHARING) + 1) if ranks % n == 0)
        layout = self._free({"parallel.cp": cp, "parallel.dp": ranks // cp, "train.batch_size": ranks // cp})
        layout += self._free({"parallel.fsdp": "true"}) if ranks > 1 else ()
        rungs = [self._free({"memory.checkpointing": kept, "memory.offload": "host"}) for kept in ("attention", "full")]
        return [(*layout, *rung) for rung in dict.fromkeys(rungs)]

    def _free(self, settings: dict[str, object]) -> Settings:
        return tuple(f"{key}={value}" for key, value in settings.items() if key not in self._fixed)

    def _varied(self, fitting: list[Tried], ranks: int) -> list[Tried]:
        """With what may be faster still than the best: twice the rows, keys that are kept instead of gathered again, another
        order, and all heads' keys in one gather or each key head's in its own, where "auto" chooses by bytes.
        """

        def ranked(more: list[Tried]) -> list[Tried]:
            return sorted([*fitting, *more], key=lambda t: t.cost if t.fits else float("inf"))

        if "train.batch_size" not in self._fixed:
            assert fitting[0].plan is not None
            config = self._build(fitting[0].settings, ranks)
            assert isinstance(config.parallel.cp, int)
            fitting = ranked(self._at_cp(config.parallel.cp, ranks, rows=2))
        config = self._build(fitting[0].settings, ranks)
        parallel = config.parallel
        if parallel.cp == 1 or not parallel.strategy.startswith("lss"):
            return fitting
        other = "contiguous" if parallel.order == "head_tail" else "head_tail"
        for key, values in (("regather", {"false"}), ("order", {other}), ("head_chunks", {1, config.model.n_kv_heads})):
            best, more = fitting[0].settings, [self._free({f"parallel.{key}": value}) for value in sorted(values)]
            fitting = ranked([self._try((*best, *setting), ranks) for setting in more if setting])
        return fitting

    # -- one candidate -------------------------------------------------------------------------------------------------

    def _try(self, settings: Settings, ranks: int, cp: int | None = None, *, seek: bool = False) -> Tried:
        """A candidate, planned or passed over; where the fastest is sought, with its number of ranks a sequence."""
        try:
            config = self._build(settings, ranks)
            tried = self._passed_over(settings, config, cp)
            if tried is None and seek:
                tried = self._too_slow(settings, config)
            tried = tried or self._planned(settings, config, cp)
        except Refused as refusal:
            tried = Tried(settings, None, f"refused: {refusal}")
        if seek and tried.fits:
            self._least = min(self._least, tried.cost)
        self._on_try(tried)
        return tried

    def _passed_over(self, settings: Settings, config: Config, cp: int | None) -> Tried | None:
        """Without a trace, where a rough count is enough to say that it does not fit."""
        room, held = self._hardware.memory, state_bytes(config)
        if held > room:
            return Tried(settings, None, f"does not fit: weights, gradients and optimizer alone take {size(held)}")
        if host_state_bytes(config) > self._hardware.host:
            return Tried(settings, None, f"does not fit: the host would keep {size(host_state_bytes(config))}")
        if cp is None:
            return None
        rung, rows = self._kind(settings, config)
        if (rung, rows) in self._far:
            fewer, rest = self._far[rung, rows]
            if held + rest * fewer / cp > FAR * room:
                return Tried(settings, None, f"does not fit: far from it with cp={fewer}, as activations shrink with cp")
        whole = tuple(s.replace("parallel.fsdp=true", "parallel.fsdp=false") for s in rung)
        rest, _ = self._beside.get(((whole, rows), cp), (0, 0))
        if whole != rung and held + rest > FAR * room:
            return Tried(settings, None, f"does not fit: far from it, with {size(rest)} beside the weights that are sharded")
        rest, host = self._beside.get(((rung, rows // 2), cp), (0, 0)) if rows % 2 == 0 else (0, 0)
        if held + 2 * rest > FAR * room or 2 * host > FAR * self._hardware.host:
            what = f"{size(2 * host)} of the host" if held + 2 * rest <= FAR * room else size(held + 2 * rest)
            return Tried(settings, None, f"does not fit: by half as many sequences, {what}")
        return None

    def _too_slow(self, settings: Settings, config: Config) -> Tried | None:
        """Without a trace, where what it must compute takes longer than all of a plan that fits."""
        if self._least == math.inf:
            return None
        again = [kept for kept, _ in RUNGS]
        as_much = again[: len(again) - again[::-1].index(config.memory.checkpointing)]
        matrices = max((self._matrices.get(kept, 0.0) for kept in as_much), default=0.0)
        least = attention_seconds(config, self._hardware) + matrices * _tokens_of_a_rank(config)
        ratio = least / (config.train.batch_size * config.data.seq_len) / self._least
        return Tried(settings, None, f"at least {ratio:.3f}x the time", slower=True) if ratio > 1 else None

    def _planned(self, settings: Settings, config: Config, cp: int | None) -> Tried:
        plan = make_plan(config, self._hardware, self._traces)
        kept, each = config.memory.checkpointing, plan.seconds["matrices"] / _tokens_of_a_rank(config)
        self._matrices[kept] = min(each, self._matrices.get(kept, each))
        rest = plan.peak.bytes - state_bytes(config)
        if cp is not None:
            self._beside[self._kind(settings, config), cp] = rest, plan.peak.host
        if plan.fits:
            return Tried(settings, plan)
        if plan.peak.bytes <= plan.room:
            return Tried(settings, plan, f"does not fit: the host would keep {size(plan.peak.host)}")
        if cp is not None:
            self._far[self._kind(settings, config)] = cp, rest
        label = max(plan.peak.classes, key=plan.peak.classes.__getitem__)
        why = f"does not fit: {size(plan.peak.bytes)}, {label} {size(plan.peak.classes[label])}"
        return Tried(settings, plan, why)

    def _kind(self, settings: Settings, config: Config) -> tuple[Settings, int]:
        """What is alike but for the number of ranks a sequence: the rung, and the rows of a rank."""
        rung = tuple(s for s in settings if s.startswith(("memory.", "parallel.fsdp")))
        return rung, config.train.batch_size // config.parallel.dp

    # -- lengths -------------------------------------------------------------------------------------------------------

    def _longest_of(self, settings: Settings, ranks: int) -> tuple[Tried | None, int]:
        """By straight lines through lengths that fit; then what is between one that does and one that does not is halved."""
        granule, high = 1024 * ranks, 0
        fitting: list[tuple[int, Tried]] = []
        guess = granule
        while True:
            tried = self._try((*settings, f"data.seq_len={guess}"), ranks)
            if tried.fits:
                fitting.append((guess, tried))
            else:
                high = guess
            if not fitting:
                return None, 0
            low = fitting[-1][0]
            if high and (high - low) / low <= CLOSE:
                break
            guess = (low + high) // 2 if high else self._drawn_out(fitting)
            guess = guess // granule * granule
            if guess <= low:
                break
        return fitting[-1][1], fitting[-1][0]

    def _drawn_out(self, fitting: Sequence[tuple[int, Tried]]) -> int:
        """A length a little beyond the one at which memory runs out, if it goes on growing as between the last two."""
        if len(fitting) == 1:
            return 16 * fitting[0][0]
        (less, first), (tokens, second) = fitting[-2:]
        assert first.plan is not None
        assert second.plan is not None
        lengths = []
        for a, b, room in ((first.plan.peak.bytes, second.plan.peak.bytes, self._hardware.memory),
                           (first.plan.peak.host, second.plan.peak.host, self._hardware.host)):  # fmt: skip
            slope = (b - a) / (tokens - less)
            if slope > 0:
                lengths.append(tokens + (room - b) / slope)
        return int(min(min(lengths, default=16.0 * tokens) * (1 + CLOSE), 64.0 * tokens))


def _tokens_of_a_rank(config: Config) -> int:
    assert isinstance(config.parallel.cp, int)
    return config.train.batch_size // config.parallel.dp * -(-config.data.seq_len // config.parallel.cp)


def _slower(loser: Tried, best: Tried) -> str:
    """How much longer it takes for a token, and the part that costs most of it."""
    assert loser.plan is not None
    assert best.plan is not None
    more = {name: seconds / loser.plan.tokens - best.plan.seconds[name] / best.plan.tokens
            for name, seconds in loser.plan.seconds.items()}  # fmt: skip
    name = max(more, key=more.__getitem__)
    return f"{loser.cost / best.cost:.3f}x the time: {name} takes {100 * more[name] / best.cost:.1f} % of a step more"
