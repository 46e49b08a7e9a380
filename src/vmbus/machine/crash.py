"""What a guest's crash means for its run: a report is an event, and the end is what the guest does next.

A kernel that panics says so on its console and, with enlightenments, in the crash registers. Then it may start a crash
kernel (kdump), restart the machine (``panic=SECONDS``), or wait for ever. Only the last is an end by itself: it is
known by the line that Linux prints then, or by a time without any new kernel.
"""

import math
import re
from collections.abc import Callable
from typing import Final

from vmbus.hypervisor import CrashReport, VirtualClock
from vmbus.hypervisor.clock import Timer

__all__ = ["PANIC_SECONDS", "CrashWatch"]

PANIC_SECONDS: Final = 60.0
"""Seconds of the guest's time that it has after a crash report to start a crash kernel or to restart."""
_LINE: Final = rb"[\r\n](?:\[[ .\d]{1,20}\](?:\[[ A-Z\d]{1,12}\]){0,2} )?"
"""The beginning of a line of the kernel's: a time, and a processor or a thread, unless it is told not to print them."""
PANIC_BEGINS: Final = re.compile(_LINE + rb"Kernel panic - not syncing")
PANIC_ENDS: Final = re.compile(_LINE + re.escape(b"---[ end Kernel panic"))
"""What every Linux kernel prints first when it panics, and last when it will do nothing more but wait."""
TAIL: Final = 80
"""Bytes of earlier output that may be the beginning of such a line."""


class CrashWatch:
    """Follows a guest from its crash to what comes of it.

    Args:
        clock: the guest's.
        seconds: how long after a report it may take until a new kernel identifies itself; None for ever.
        on_panic: called when the guest has crashed and will do nothing more.

    Attributes:
        report: what the guest reported last, None if it never did.
    """

    def __init__(self, clock: VirtualClock, seconds: float | None, on_panic: Callable[[], None]) -> None:
        self.report: CrashReport | None = None
        self._clock = clock
        self._seconds = None if seconds == math.inf else seconds
        self._on_panic = on_panic
        self._deadline: Timer | None = None
        self._tail = b"\n"  # output begins with a line
        self._printed = False
        self._reported = False

    @property
    def crashed(self) -> bool:
        """Whether the kernel that runs has crashed, by its console or by its report."""
        return self._printed or self._reported

    @property
    def panicked(self) -> bool:
        """Whether the kernel that runs has said on its console that it panics: a restart is part of that then."""
        return self._printed

    def read(self, data: bytes) -> None:
        """Take a piece of the guest's console output."""
        seen = self._tail + data
        self._tail = seen[-TAIL:]
        if b"K" not in seen:
            return
        if PANIC_BEGINS.search(seen):
            self._printed = True
        if self.crashed and PANIC_ENDS.search(seen):  # else somebody reads an old log
            self._tail = b""
            self._on_panic()

    def take_report(self, report: CrashReport) -> None:
        """The guest wrote its crash registers."""
        self._forget_deadline()
        self.report = report
        self._reported = True
        if self._seconds is not None:
            due = self._clock.now() + int(self._seconds * 1_000_000_000)
            self._deadline = self._clock.schedule(due, self._on_panic)

    def new_kernel(self) -> None:
        """A kernel has started: after a restart, or one that has identified itself to the hypervisor.

        Linux takes its identity back before it starts a crash kernel, so whoever identifies itself after a report is
        another one.
        """
        self._forget_deadline()
        self._printed = self._reported = False
        self._tail = self._tail[-1:]

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
