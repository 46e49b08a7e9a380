"""Log lines that a guest can cause: few of each kind in a time, and safe for a terminal.

A guest that does something wrong without end must not fill its host's log. Everything that one can cause goes through
a `GuestLog`, which says each kind of line of each guest a few times and counts the others; the next line that is said
tells how many were not.
"""

import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from vmbus.errors import printable

__all__ = ["BURST", "PERIOD", "GuestLog", "new_scope"]

BURST: Final = 5
"""Lines of one kind about one guest that are said in a `PERIOD`."""
PERIOD: Final = 10.0
"""Seconds."""
MAX_KINDS: Final = 1024
"""Kinds of lines, times guests, that are remembered; the one that was not said for longest is forgotten."""


_SCOPES: Final = itertools.count(1)


def new_scope() -> int:
    """A number for something in which guests' names are unique, never given twice."""
    return next(_SCOPES)


class _Kind:
    __slots__ = ("since", "spoken", "unsaid")

    def __init__(self, since: float) -> None:
        self.since = since
        self.spoken = 0
        self.unsaid = 0


class GuestLog:
    """A logger for what guests cause. Thread-safe.

    Args:
        logger: where lines go.
        clock: seconds, never running backwards.

    Attributes:
        suppressed: lines that were not said so far, all guests and kinds.
    """

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._lock = threading.Lock()
        self._kinds: OrderedDict[tuple[int, str, str], _Kind] = OrderedDict()
        self.suppressed = 0

    def warning(self, guest: str, message: str, *args: object, scope: int = 0) -> None:
        """Say ``guest: message % args``, unless the same message was said of this guest too often just now.

        Args:
            guest: whom it is about.
            message: the format, which is what makes a kind: whatever differs from line to line goes into `args`.
            args: numbers stay what they are; the text of anything else is made safe for terminals (`printable`).
            scope: where names are unique, from `new_scope`: guests of two hypervisors may have the same name.
        """
        self._say(logging.WARNING, guest, message, args, scope)

    def exception(self, guest: str, message: str, *args: object, scope: int = 0) -> None:
        """As `warning`, for a fault of ours: an error with the traceback of the exception that is being handled."""
        self._say(logging.ERROR, guest, message, args, scope, traceback=True)

    def _say(
        self,
        level: int,
        guest: str,
        message: str,
        args: tuple[object, ...],
        scope: int,
        *,
        traceback: bool = False,
    ) -> None:
        if not self._logger.isEnabledFor(level):
            return
        more = self._admit((scope, guest, message))
        if more is None:
            return
        shown = [arg if isinstance(arg, int | float) else printable(str(arg)) for arg in args]
        self._logger.log(level, f"%s: {message}%s", printable(guest), *shown, more, exc_info=traceback)

    def _admit(self, key: tuple[int, str, str]) -> str | None:
        """What to add to the line, or None if it is not to be said."""
        now = self._clock()
        with self._lock:
            kind = self._kinds.get(key)
            if kind is None:
                kind = self._kinds[key] = _Kind(now)
                if len(self._kinds) > MAX_KINDS:
                    self._kinds.popitem(last=False)
            elif now - kind.since >= PERIOD:
                kind.since, kind.spoken = now, 0
            if kind.spoken == BURST:
                kind.unsaid += 1
                self.suppressed += 1
                return None
            self._kinds.move_to_end(key)
            kind.spoken += 1
            unsaid, kind.unsaid = kind.unsaid, 0
            more = f" ({unsaid} more like this were not logged)" if unsaid else ""
            if kind.spoken == BURST:
                more += f"; more like this in the next {PERIOD:g} s are only counted"
            return more
