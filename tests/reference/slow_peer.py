"""A peer at the other end of a socket whose speed is a script, on a clock that only its delays move.

So a transfer of minutes is over at once, and a busy machine changes nothing.
"""

import select
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from vmbus.storage.images import nbd_link

__all__ = ["Script", "SlowPeer"]

Script = Iterator[tuple[float, Callable[[socket.socket], object]]]
"""Delays in seconds, and what the peer does after each of them."""


class SlowPeer:
    """Takes the place of time and of waiting in `vmbus.storage.images.nbd_link`.

    Attributes:
        ours: the client's end of the connection.
        now: seconds that have passed.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self.now = 0.0
        self._script: Script = iter(())
        self._next: tuple[float, Callable[[socket.socket], object]] | None = None
        patch.setattr(nbd_link, "time", SimpleNamespace(monotonic=lambda: self.now))
        patch.setattr(nbd_link, "select", SimpleNamespace(poll=lambda: _Poll(self), POLLIN=1, POLLOUT=4))

    def play(self, script: Script) -> None:
        self._script, self._next = script, None

    def pass_time(self, seconds: float, ready: Callable[[], bool]) -> bool:
        """Let the script go on until something is ready; whether it became so within that time."""
        ends = self.now + seconds
        while not ready():
            if self._next is None:
                delay, action = next(self._script, (float("inf"), lambda _: None))
                self._next = self.now + delay, action
            if self._next[0] > ends:
                self.now = ends
                return False
            (self.now, action), self._next = self._next, None
            action(self._theirs)
        return True

    def close(self) -> None:
        self.ours.close()
        self._theirs.close()


class _Poll:
    def __init__(self, peer: SlowPeer) -> None:
        self._peer = peer

    def register(self, connection: socket.socket, event: int) -> None:
        self._connection, self._event = connection, event

    def poll(self, milliseconds: float) -> list[int]:
        def ready() -> bool:
            one = [self._connection]
            found = select.select(one if self._event == 1 else [], one if self._event == 4 else [], [], 0)
            return any(found)

        return [1] if self._peer.pass_time(milliseconds / 1000, ready) else []
