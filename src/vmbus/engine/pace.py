"""How fast a guest's time goes while it waits for the outside world: as fast as the host's.

A guest on a virtual clock skips idle time. Where the outside world answers it must not, because answers take real
time. A wait then lasts until the host's clock has come as far as the guest's next timer, and a wait that ends early (a
frame came) moves the guest's clock by what has passed. While the guest executes, its time is what its code is,
which is less than the host's, so it falls behind. It makes up for that while it waits:

* at once for the last tenth of a second: a loop that sleeps keeps its period, also where a busy host lets it wait;
* slowly for the rest: its clock goes half as fast again as the host's until nothing is owed. Skipping all at once
  would let its timeouts run out before the world could answer.
"""

import time
from collections.abc import Callable
from typing import Final

__all__ = ["Pace"]

PROMPT: Final = 100_000_000
"""Nanoseconds that are made up for at once."""


class Pace:
    """The relation of one guest's clock to the host's; all times in nanoseconds.

    Args:
        now: the host's clock.
    """

    def __init__(self, now: Callable[[], int] = time.monotonic_ns) -> None:
        self._now = now
        self._host = self._guest = 0
        self._prompt = self._owed = 0

    def start(self, guest: int) -> None:
        """The guest's clock stood still or was not held until now, when it shows `guest`."""
        self._host, self._guest = self._now(), guest
        self._prompt = self._owed = 0

    def wait(self, guest: int, due: int | None) -> int | None:
        """The guest waits, its clock at `guest`: how long on the host's clock until it shows `due`.

        What is None for ever stays so.
        """
        host = self._now()
        # A clock that is ahead of the host's has been moved by somebody: from there on they go together.
        self._fall_behind((host - self._host) - (guest - self._guest))
        self._host, self._guest = host, guest
        if due is None:
            return None
        left = max(0, due - guest - self._prompt)
        return max(left - left // 3, left - self._owed)

    def reached(self, due: int | None) -> int:
        """What the guest's clock shows now, at the end of a wait: at most `due`."""
        host = self._now()
        passed = host - self._host
        guest = self._guest + passed + self._prompt + min(self._owed, passed // 2)
        if due is not None:
            guest = min(guest, max(due, self._guest))
        self._fall_behind(passed - (guest - self._guest))
        self._host, self._guest = host, guest
        return guest

    def _fall_behind(self, time: int) -> None:
        """The guest has fallen behind the host by `time` more, or made up for so much where it is negative."""
        prompt = self._prompt + time
        self._prompt = min(max(0, prompt), PROMPT)
        self._owed = max(0, self._owed + prompt - self._prompt)
