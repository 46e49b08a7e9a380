"""Monitored notifications: ringing the host by a bit in a shared page instead of a hypercall (TLFS 11.9).

A guest that has nothing urgent to say sets its channel's trigger bit in the child-to-parent monitor page and goes
on. The hypervisor looks at the pages at the rate of the channels' latency hints; a trigger that it finds
pending is armed, and if it is still pending a latency later, the hypervisor signals the channel's event
connection on the guest's behalf. Everything that the guest sends within that time costs no hypercall and no exit.

The page (one each way, both in the guest's memory):

====== ============================================================================================
offset what
====== ============================================================================================
0x000  group enable bits (4)
0x008  four trigger groups: pending (32 bits), armed (32 bits)
0x040  next check times, 4 × 32 × 4 bytes, units of 100 ns
0x240  latencies, 4 × 32 × 2 bytes, units of 100 ns
0x440  parameters, 4 × 32 × (connection id 4 bytes, event flag 2 bytes, 2 reserved)
====== ============================================================================================
"""

import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from vmbus.bus.actions import MonitorPages
from vmbus.core.dispatch import EventFlags
from vmbus.core.memory import GuestMemory
from vmbus.errors import GuestMemoryError
from vmbus.hypervisor import Clock
from vmbus.hypervisor.clock import Timer

__all__ = [
    "LATENCIES",
    "MONITORS",
    "NEXT_CHECK_TIMES",
    "PARAMETERS",
    "TRIGGER_GROUPS",
    "HostMonitor",
    "armed_bit",
    "pending_bit",
]

MONITORS: Final = 128
TRIGGER_GROUPS: Final = 0x008
NEXT_CHECK_TIMES: Final = 0x040
LATENCIES: Final = 0x240
PARAMETERS: Final = 0x440
UNIT: Final = 100
"""Nanoseconds of one unit of latency."""
_NOTHING: Final = bytes(32)
"""The four groups of a page in which nothing is pending or armed."""
PATIENCE: Final = 32
"""After so many polls that found nothing, the next ones come half as often. A trigger that is found pending then has
waited for a latency, or nearly, and is signalled at once: none ever waits for more than two latencies."""
SHORTEST: Final = 10_000
"""The poller looks no more often than every 10 µs, whatever latency is asked for."""


def pending_bit(monitor_id: int) -> int:
    """Number of a trigger's pending bit, from the start of the page."""
    return TRIGGER_GROUPS * 8 + monitor_id // 32 * 64 + monitor_id % 32


def armed_bit(monitor_id: int) -> int:
    """Number of a trigger's armed bit, from the start of the page."""
    return pending_bit(monitor_id) + 32


@dataclass(slots=True)
class _Trigger:
    latency: int
    connection_id: int
    name: str
    deadline: int | None = None


class HostMonitor:
    """Polls one guest's child-to-parent monitor page.

    Args:
        clock: polls happen at its times: in `Clock.run_due`, or when a virtual clock is advanced.
        memory: the guest's memory.
        signal: called with a trigger's connection id when it has been pending for its latency.

    Attributes:
        polls: how often the page was looked at.
        notifications: how many events were signalled on the guest's behalf.
    """

    def __init__(self, clock: Clock, memory: GuestMemory, signal: Callable[[int], None]) -> None:
        self._clock = clock
        self._memory = memory
        self._signal = signal
        self._lock = threading.Lock()
        self._triggers: dict[int, _Trigger] = {}
        self._bits: EventFlags | None = None
        self._page = 0
        self._timer: Timer | None = None
        self._step = SHORTEST
        self._found_nothing = 0  # polls since one found a trigger
        self._armed = False  # a trigger waits for its latency to pass
        self.polls = 0
        self.notifications = 0

    def use(self, pages: MonitorPages | None) -> None:
        """Poll these pages from now on, or none."""
        bits = None if pages is None else EventFlags(self._memory, pages.child_to_parent, 0)
        with self._lock:
            self._bits = bits
            self._page = 0 if pages is None else pages.child_to_parent
            if pages is None:
                self._triggers.clear()
                self._stop()

    def watch(self, monitor_id: int, latency: int, connection_id: int, name: str = "") -> None:
        """Poll a trigger, and tell the guest its latency (in nanoseconds) and parameters through the page."""
        with self._lock:
            if self._bits is None:
                return
            self._triggers[monitor_id] = _Trigger(max(latency, SHORTEST), connection_id, name)
            units = min(latency // UNIT, 0xFFFF)
            self._memory.write(self._page + LATENCIES + 2 * monitor_id, units.to_bytes(2, "little"))
            parameter = struct.pack("<IHH", connection_id, 0, 0)
            self._memory.write(self._page + PARAMETERS + 8 * monitor_id, parameter)
            self._enable_groups()
            if self._timer is None or self._timer.due > self._clock.now() + max(latency, SHORTEST):
                self._stop()
                self._schedule()

    def unwatch(self, monitor_id: int) -> None:
        """Poll a trigger no more; what is pending is dropped."""
        with self._lock:
            if self._triggers.pop(monitor_id, None) is None or self._bits is None:
                return
            if not self._triggers:
                self._stop()
            with suppress(GuestMemoryError):  # the page may have been taken from the guest meanwhile
                self._memory.read(self._page, 1)
                self._bits.clear(pending_bit(monitor_id))
                self._bits.clear(armed_bit(monitor_id))
                self._enable_groups()

    def _enable_groups(self) -> None:
        self._step = min((trigger.latency for trigger in self._triggers.values()), default=SHORTEST)
        groups = 0
        for monitor_id in self._triggers:
            groups |= 1 << monitor_id // 32
        self._memory.write(self._page, groups.to_bytes(4, "little"))

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _schedule(self) -> None:
        # All triggers are looked at as often as the most impatient one asks for, as the TLFS has it.
        step = self._step if self._found_nothing < PATIENCE else 2 * self._step
        self._timer = self._clock.schedule(self._clock.now() + step, self._on_time, quiet=self._is_quiet)

    def _is_quiet(self) -> bool:
        """Whether nothing is pending: only a guest that executes can change that."""
        with self._lock, suppress(GuestMemoryError):
            if self._bits is None:
                return True
            groups = struct.unpack("<8I", self._memory.read(self._page + TRIGGER_GROUPS, 32))
            return not any(groups[m // 32 * 2] & 1 << m % 32 for m in self._triggers)
        return True

    def _on_time(self) -> None:
        # Ten thousand times a second of a guest that executes: no context manager, no search for the step.
        try:
            self.poll()
        except GuestMemoryError:
            pass  # a page that is gone has nothing pending
        finally:  # also after a defect of a provider's, or Ctrl-C in it
            with self._lock:
                self._timer = None
                if self._triggers:
                    self._schedule()

    def poll(self) -> int:
        """Look at the page once: arm what is newly pending, signal what has been pending for its latency.

        Returns:
            how many events were signalled.

        Raises:
            GuestMemoryError: the page was taken from the guest.
        """
        now = self._clock.now()
        due = []
        with self._lock:
            bits = self._bits
            if bits is None:
                return 0
            self.polls += 1
            # One copy: the guest may change the page while we look.
            read = self._memory.read(self._page + TRIGGER_GROUPS, 32)
            if read == _NOTHING and not self._armed:  # as nearly always
                self._found_nothing += 1
                return 0
            waited = self._found_nothing >= PATIENCE
            self._found_nothing = 0
            groups = struct.unpack("<8I", read)
            for monitor_id, trigger in self._triggers.items():
                group, mask = monitor_id // 32, 1 << monitor_id % 32
                if not groups[2 * group] & mask:
                    trigger.deadline = None
                    continue
                if trigger.deadline is None:
                    trigger.deadline = now + trigger.latency
                    units = trigger.deadline // UNIT & 0x7FFF_FFFF
                    self._memory.write(
                        self._page + NEXT_CHECK_TIMES + 4 * monitor_id, units.to_bytes(4, "little")
                    )
                    bits.set(armed_bit(monitor_id))
                    if waited:
                        trigger.deadline = now
                if now >= trigger.deadline:
                    # Disarm before clearing pending: a guest that rings now sets a bit that the next poll sees.
                    trigger.deadline = None
                    bits.clear(armed_bit(monitor_id))
                    bits.clear(pending_bit(monitor_id))
                    due.append(trigger.connection_id)
            self._armed = any(trigger.deadline is not None for trigger in self._triggers.values())
            self.notifications += len(due)
        defect: BaseException | None = None
        for connection_id in due:  # what is signalled is no longer pending: nobody else's defect may lose it
            try:
                self._signal(connection_id)
            except BaseException as error:
                defect = defect or error
        if defect is not None:
            raise defect
        return len(due)
