"""Time: one clock for a hypervisor instance, virtual (repeatable) or the host's.

All times are integer nanoseconds since the clock was made. Timers (`schedule`) fire from inside `run_due`, in the
order of their due times, ties in the order in which they were set, so that a run on a `VirtualClock`
repeats exactly. The guest's clocks derive from this one: reference time counts 100 ns units (TLFS, timers).
"""

import heapq
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

__all__ = ["Clock", "HostClock", "ReferenceTime", "Timer", "VirtualClock"]

REFERENCE_UNIT: Final = 100
"""Nanoseconds of one unit of partition reference time (TLFS, timers)."""
UNITS_PER_SECOND: Final = 1_000_000_000 // REFERENCE_UNIT


class Timer:
    """One scheduled call; `cancel` withdraws it."""

    __slots__ = ("callback", "due", "quiet")

    def __init__(
        self, due: int, callback: Callable[[], None], quiet: Callable[[], bool] | None = None
    ) -> None:
        self.due = due
        self.callback: Callable[[], None] | None = callback
        self.quiet = quiet

    def cancel(self) -> None:
        """Do not fire; cheap, and harmless after the timer fired."""
        self.callback = None


class Clock(ABC):
    """A source of time and the timers that wait on it. Safe to use from several threads."""

    def __init__(self) -> None:
        self._timers: list[tuple[int, int, Timer]] = []
        self._sequence = 0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.now()} ns>"

    @abstractmethod
    def now(self) -> int:
        """Nanoseconds since the clock was made; never decreases."""

    def schedule(
        self, due: int, callback: Callable[[], None], *, quiet: Callable[[], bool] | None = None
    ) -> Timer:
        """Have `run_due` call `callback` once the clock has reached `due` (absolute, in ns).

        With `quiet`, the timer looks for work that a running guest may make at any time. While that says True there
        is none, so that a guest that waits need not be kept waiting for it: `next_deadline(idle=True)` leaves it out.
        """
        timer = Timer(due, callback, quiet)
        with self._lock:
            self._sequence += 1
            heapq.heappush(self._timers, (due, self._sequence, timer))
            if len(self._timers) > 64 and self._sequence % 64 == 0:
                self._drop_cancelled()
        return timer

    def _drop_cancelled(self) -> None:
        # A guest that re-arms one timer in a loop leaves a cancelled entry each time: keep the heap small.
        self._timers = [entry for entry in self._timers if entry[2].callback is not None]
        heapq.heapify(self._timers)

    @property
    def revision(self) -> int:
        """Counts the timers that were ever set: while it stays, no deadline has come nearer."""
        return self._sequence

    def next_deadline(self, *, idle: bool = False) -> int | None:
        """When the next timer is due (absolute, in ns), or None; with `idle`, the next that has anything to do."""
        with self._lock:
            while self._timers and self._timers[0][2].callback is None:
                heapq.heappop(self._timers)
            if not idle:
                return self._timers[0][0] if self._timers else None
            timers = [timer for _, _, timer in self._timers if timer.callback is not None]
        # Asked without the lock: who is asked may be setting a timer.
        return min((t.due for t in timers if t.quiet is None or not t.quiet()), default=None)

    def run_due(self) -> int:
        """Fire every timer that is due now; how many fired. A timer may schedule others."""
        fired = 0
        # Only what was due when we came in: a callback that re-arms itself in the past cannot hold us here.
        limit = self.now()
        last = self._sequence
        while (callback := self._take(limit, last)) is not None:
            callback()
            fired += 1
        return fired

    def _take(self, limit: int, last: int) -> Callable[[], None] | None:
        with self._lock:
            while self._timers and self._timers[0][0] <= limit:
                if self._timers[0][1] > last and self._timers[0][2].callback is not None:
                    return None
                _, _, timer = heapq.heappop(self._timers)
                callback, timer.callback = timer.callback, None
                if callback is not None:
                    return callback
            return None


class ReferenceTime:
    """A partition's reference time: units of 100 ns since it was created, counted by the guest's TSC.

    The reference counter MSR, the reference TSC page and the synthetic timers must agree to the unit, because guests
    mix them: a counter that lags behind the page runs backwards for them. So all of them use the
    page's own formula (TLFS, timers): TSC × scale, upper 64 bits, plus an offset.

    Args:
        clock: the instance's.
        tsc_frequency: Hz of the guest's TSC.

    Attributes:
        scale: TscScale of the reference TSC page, rounded up so that whole units are not lost.
        offset: TscOffset of that page for a TSC that counts from the clock's beginning.
    """

    __slots__ = ("_clock", "_frequency", "offset", "scale")

    def __init__(self, clock: Clock, tsc_frequency: int) -> None:
        self._clock = clock
        self._frequency = tsc_frequency
        self.scale = -(-(UNITS_PER_SECOND << 64) // tsc_frequency)
        self.offset = 0
        self.offset = -self.now()

    def now(self) -> int:
        """Reference time now."""
        ticks = self._clock.now() * self._frequency // 1_000_000_000
        return (ticks * self.scale >> 64) + self.offset

    def when(self, reference: int) -> int:
        """The first time of the clock (in ns) at which reference time has reached `reference`."""
        ticks = -((self.offset - reference << 64) // self.scale)
        return -(-ticks * 1_000_000_000 // self._frequency)

    def page_offset(self, tsc_offset: int) -> int:
        """TscOffset of the page for a guest that has moved its TSC by `tsc_offset`; never ahead of the counter."""
        return self.offset + (-tsc_offset * self.scale >> 64)


class VirtualClock(Clock):
    """A clock that moves only when told: runs repeat exactly, and idle time costs nothing."""

    def __init__(self, start: int = 0) -> None:
        super().__init__()
        self._now = start

    def now(self) -> int:
        """Nanoseconds; moves only through `advance` and `advance_to`."""
        return self._now

    def advance(self, nanoseconds: int) -> int:
        """Move on by `nanoseconds` and fire what becomes due, each timer at its own due time; how many fired."""
        return self.advance_to(self._now + nanoseconds)

    def move_to(self, when: int) -> None:
        """Move on to `when` (absolute, in ns); for a caller that knows that no timer is due until then."""
        self._now = max(self._now, when)

    def advance_to(self, when: int) -> int:
        """Move on to `when` (absolute, in ns) and fire what becomes due; going back is ignored.

        Returns:
            How many timers fired.
        """
        fired = 0
        while (due := self.next_deadline()) is not None and due <= when:
            self._now = max(self._now, due)
            ran = self.run_due()
            fired += ran
        self._now = max(self._now, when)
        return fired

    def advance_to_next(self) -> bool:
        """Skip to the next timer and fire it (what a halted processor does); False if none has anything to do."""
        due = self.next_deadline(idle=True)
        if due is None:
            return False
        self.skip_to(due)
        return True

    def skip_to(self, when: int) -> None:
        """Move on to `when`, `next_deadline(idle=True)` or earlier: timers with nothing to do until then fire once."""
        self.move_to(when)
        self.advance_to(when)


class HostClock(Clock):
    """The host's monotonic clock."""

    def __init__(self) -> None:
        super().__init__()
        self._origin = time.monotonic_ns()

    def now(self) -> int:
        """Nanoseconds since this object was made."""
        return time.monotonic_ns() - self._origin
