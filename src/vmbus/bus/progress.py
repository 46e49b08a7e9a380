"""How threads wait for what other threads do, so that an exception out of a signal handler loses nothing.

A `threading.Condition` or `threading.Event` is Python inside: Ctrl-C, or any handler that raises, can come between its
lock's acquisition and whatever would release it. The lock then stays taken, and everybody who waits stays with it. Here
are only locks that one call of C code takes, and none is ever held: a taken one means that nothing has happened yet.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress

__all__ = ["Progress"]


class Progress:
    """Wakes the threads that wait for something when something has happened."""

    __slots__ = ("_gates",)

    def __init__(self) -> None:
        # One a thread, as many as have ever waited at the same time: ids of threads that ended are used again.
        self._gates: dict[int, threading.Lock] = {}

    def notify(self) -> None:
        """Have every thread that waits look at its condition again."""
        for gate in tuple(self._gates.values()):
            if gate.locked():
                with suppress(RuntimeError):  # another thread was faster
                    gate.release()

    def wait_for(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until `condition` holds, at most `timeout` seconds; whether it does.

        The condition may itself wait, for something else.
        """
        end = time.monotonic() + timeout
        me = threading.get_ident()
        gate = self._gates.get(me)
        if gate is None:
            gate = self._gates[me] = threading.Lock()
        try:
            while True:
                gate.acquire(blocking=False)  # what was said before we look is no news
                if condition():
                    return True
                left = end - time.monotonic()
                if left <= 0 or not gate.acquire(timeout=left):
                    return condition()
        finally:
            if gate.locked():
                with suppress(RuntimeError):
                    gate.release()  # a wait further up this thread's stack looks again
