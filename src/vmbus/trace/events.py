"""An event trace: what happened, in order, as lines of text that compare byte by byte.

Two deterministic runs with the same seed give the same `EventTrace.dump`; so events carry only what is itself
repeatable: virtual time, names, numbers.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Event", "EventTrace"]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        time: the hypervisor's clock, in nanoseconds.
        source: who did it.
        target: whom it concerns; the same as `source` for what concerns nobody else.
        kind: what it was: ``"message"``, ``"doorbell"``, ``"open"`` …
        text: the particulars.
    """

    time: int
    source: str
    target: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.time:>12} {self.kind:<9} {self.source} > {self.target}: {self.text}"


class EventTrace:
    """Collects events; keeps the last `limit` of them.

    Args:
        limit: events kept; older ones are dropped, and `dropped` counts them.
    """

    def __init__(self, limit: int = 1 << 20) -> None:
        self._events: deque[Event] = deque(maxlen=limit)
        self.dropped = 0

    def record(self, time: int, source: str, target: str, kind: str, **particulars: Any) -> None:
        """Add an event; the particulars are kept as ``name=value`` in the order given."""
        if len(self._events) == self._events.maxlen:
            self.dropped += 1
        text = " ".join(f"{name}={value}" for name, value in particulars.items())
        self._events.append(Event(time, source, target, kind, text))

    def __len__(self) -> int:
        return len(self._events)

    def __iter__(self) -> Iterator[Event]:
        return iter(list(self._events))

    def clear(self) -> None:
        """Forget everything."""
        self._events.clear()
        self.dropped = 0

    def dump(self) -> bytes:
        """All events as UTF-8 lines."""
        return "".join(f"{event}\n" for event in self._events).encode()
