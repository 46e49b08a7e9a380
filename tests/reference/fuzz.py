"""How the fuzz targets are driven: random cases, each from a seed of its own, as many as the target says.

A target is one test. Without settings it runs the same cases each time, however busy the machine is.
`VMBUS_FUZZ_SCALE` multiplies their number (1/50 unless it is said, so that the quick tests try all of them),
`VMBUS_FUZZ_SECONDS` has each target run for a time instead,
`VMBUS_FUZZ_SEED` says where it starts (``random``: somewhere else each time), and `VMBUS_FUZZ_CASE` has only that one
of its cases run. Every failure names both numbers.
"""

import gc
import os
import random
import signal
import threading
import time
from collections.abc import Callable

from reference.seeds import chosen_seed

SECONDS = float(os.environ.get("VMBUS_FUZZ_SECONDS", "0"))
"""Real time that each target runs for; 0: as many cases as it says."""
SCALE = float(os.environ.get("VMBUS_FUZZ_SCALE", "0.02"))
MIN_CASES = 3
SEED = chosen_seed("VMBUS_FUZZ_SEED")
CASE = int(os.environ.get("VMBUS_FUZZ_CASE", "0"))

CASE_SECONDS = 60
"""No case takes a second; one that takes this long hangs."""
MOST_GROWTH = 512 << 20
"""Bytes that a process may grow by after it is warm; the sanitizers keep half of that in quarantine."""


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Fuzz:
    """Runs cases, and judges what they leave behind: threads, descriptors, memory."""

    def __init__(self) -> None:
        self.seed = SEED
        self.cases = 0

    def run(self, case: Callable[[random.Random], None], *, cases: int) -> None:
        """Call `case` with fresh random numbers.

        Args:
            case: one case.
            cases: how many of them are about half a minute's work.
        """
        if CASE:
            self._one(case, CASE)
            return
        self._one(case, 1)
        warm = self._leavings()
        wanted = MIN_CASES if SECONDS else max(round(cases * SCALE), MIN_CASES)
        ends = time.monotonic() + SECONDS
        while self.cases < wanted or (SECONDS and time.monotonic() < ends):
            self._one(case, self.cases + 1)
        threads, descriptors, memory = self._leavings()
        assert threads <= warm[0], "cases leave threads behind"
        assert descriptors <= warm[1] + 8, "cases leave descriptors open"
        assert memory <= warm[2] + MOST_GROWTH, "cases leave memory behind"

    def _one(self, case: Callable[[random.Random], None], number: int) -> None:
        self.cases = number
        signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
        try:
            case(random.Random(f"{self.seed} {number}"))
        except BaseException as error:
            error.add_note(f"VMBUS_FUZZ_SEED={self.seed} VMBUS_FUZZ_CASE={number} repeats this case")
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    @staticmethod
    def _leavings() -> tuple[int, int, int]:
        gc.collect()
        return threading.active_count(), open_descriptors(), resident_bytes()


def hangs(*_: object) -> None:
    raise TimeoutError(f"one case has been running for {CASE_SECONDS} s")
