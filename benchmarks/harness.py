"""How a comparison is declared and measured: interleaved rounds of equal work, medians of their ratios."""

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TypeAlias

Run: TypeAlias = Callable[[int], float]
"""Does that many operations and returns the seconds they took (set-up and tear-down of a round excluded)."""


@dataclass(frozen=True)
class Rounds:
    """How often everybody has a turn, and how many seconds the fastest then works."""

    number: int
    seconds: float


LONG = Rounds(15, 0.02)
"""For what takes several processes: starting and ending a round does not count."""
SHORT = Rounds(61, 0.001)
"""For one thread: shorter than a scheduler's slice, so that most rounds are undisturbed on a busy machine."""
QUICK = Rounds(3, 0.001)
"""Shows that everything runs, not how fast."""


@dataclass(frozen=True)
class Case:
    """One contestant.

    Attributes:
        name: shown in the table.
        open: makes the contestant ready (processes, rings, files) for as long as the context lasts.
        needs: the module that an optional peer needs; without it the row says "not installed".
        why_not: asked before opening; a sentence when the contestant cannot run here, e.g. on one CPU.
    """

    name: str
    open: Callable[[], AbstractContextManager[Run]]
    needs: str | None = None
    why_not: Callable[[], str | None] = lambda: None

    def missing(self) -> str | None:
        """Why this contestant cannot run here, if so."""
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return "not installed"
        return self.why_not()


@dataclass(frozen=True)
class Target:
    """What a row has to reach.

    Attributes:
        text: in the words of the requirement.
        speedup: the least `Row.speedup` (the peer's time ÷ ours).
        nanoseconds: the most `Row.ours_ns`.
    """

    text: str
    speedup: float | None = None
    nanoseconds: float | None = None

    def met(self, row: "Row") -> bool | None:
        """Whether the row reaches it; None when there is nothing to judge by."""
        if self.speedup is not None:
            return None if row.speedup is None else row.speedup >= self.speedup
        if self.nanoseconds is not None:
            return None if row.ours_ns is None else row.ours_ns <= self.nanoseconds
        return None


def faster(times: float) -> Target:
    """At least that many times faster than the peer."""
    return Target(f"≥ {times:g} × faster", speedup=times)


def at_most_times(times: float) -> Target:
    """At most that many times the peer's time."""
    return Target(f"≤ {times:g} × its time", speedup=1 / times)


def share(fraction: float) -> Target:
    """At least that share of the peer's rate."""
    return Target(f"≥ {fraction:.0%} of its rate", speedup=fraction)


def at_most_ns(nanoseconds: float) -> Target:
    """At most that many nanoseconds an operation, whatever the peer needs."""
    return Target(f"≤ {nanoseconds:g} ns", nanoseconds=nanoseconds)


NO_TARGET = Target("")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: the work of one operation.
        ours: our contestant.
        peer: the other one.
        ours_ns: median nanoseconds an operation; None when not measured.
        peer_ns: likewise, of the peer.
        speedup: the median, over rounds, of the peer's time ÷ ours in the same round.
        target: what is to be reached.
        note: why something was not measured, or what to know about it.
    """

    what: str
    ours: str
    peer: str
    ours_ns: float | None = None
    peer_ns: float | None = None
    speedup: float | None = None
    target: Target = NO_TARGET
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without a target or a measurement."""
        return self.target.met(self)


@dataclass(frozen=True)
class Comparison:
    """Our contestant and its peers, measured together: every round runs each of them once, with the same count."""

    what: str
    ours: Case
    peers: Sequence[tuple[Case, Target]]
    rounds: Rounds = LONG

    def cases(self) -> list[Case]:
        """All contestants, ours first."""
        return [self.ours, *(case for case, _ in self.peers)]


def rows_of(comparisons: Iterable[Comparison], quick: bool) -> Iterator[Row]:
    """Measure the comparisons one after the other."""
    for comparison in comparisons:
        yield from measure(comparison, quick)


def measure(comparison: Comparison, quick: bool) -> Iterator[Row]:
    """The rows of one comparison, a row for each peer."""
    refused = {case.name: reason for case in comparison.cases() if (reason := case.missing()) is not None}
    with ExitStack() as stack:
        runs = {
            case.name: stack.enter_context(case.open())
            for case in comparison.cases()
            if case.name not in refused
        }
        rounds = QUICK if quick else comparison.rounds
        count = calibrate(runs.values(), rounds.seconds)
        times = interleave(runs, count, rounds.number)
    mine = times.get(comparison.ours.name)
    for case, target in comparison.peers:
        theirs = times.get(case.name)
        yield Row(
            what=comparison.what,
            ours=comparison.ours.name,
            peer=case.name,
            ours_ns=median(mine) if mine else None,
            peer_ns=median(theirs) if theirs else None,
            speedup=median(b / a for a, b in zip(mine, theirs, strict=True)) if mine and theirs else None,
            target=target,
            note=refused.get(comparison.ours.name) or refused.get(case.name, ""),
        )


def calibrate(runs: Iterable[Run], seconds: float) -> int:
    """The count with which the fastest contestant works for that long, and the slowest for a hundred times as long at
    most; warms all of them up on the way."""
    counts = []
    for run in runs:
        run(1)
        tried = 64
        while (took := run(tried)) < seconds / 4 and tried < 1 << 26:
            tried *= 4
        counts.append(tried * seconds / max(took, 1e-9))
    return max(1, int(min(max(counts), 100 * min(counts)))) if counts else 1


def interleave(runs: dict[str, Run], count: int, rounds: int) -> dict[str, list[float]]:
    """Nanoseconds an operation, by contestant and round; the order turns round so that none is always first."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            times[name].append(runs[name](count) / count * 1e9)
    return times


def timed(work: Callable[[int], object]) -> Run:
    """A `Run` of a function that does that many operations."""

    def run(count: int) -> float:
        started = perf_counter()
        work(count)
        return perf_counter() - started

    return run
