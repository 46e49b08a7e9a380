"""The four synthetic timers of one virtual processor (TLFS, timers), on its partition's reference time."""

from collections.abc import Callable
from functools import partial
from typing import Final

from vmbus.hypervisor.clock import Clock, ReferenceTime, Timer
from vmbus.hypervisor.faults import GeneralProtectionFault
from vmbus.hypervisor.synic import Synic
from vmbus.hypervisor.tlfs import STIMER_COUNT, MessageType
from vmbus.hypervisor.wire import TimerMessage

__all__ = ["DIRECT_MODE", "MIN_PERIOD", "SyntheticTimers"]

ENABLED: Final = 1 << 0
PERIODIC: Final = 1 << 1
LAZY: Final = 1 << 2
AUTO_ENABLE: Final = 1 << 3
DIRECT_MODE: Final = 1 << 12
_CONFIG_BITS: Final = 0xF_1FFF

MIN_PERIOD: Final = 100
"""Shortest time, in 100 ns units, between two expirations of a periodic timer, so that a guest cannot keep its host
busy with ticks alone (shorter periods are granted at this rate)."""
MIN_DELAY: Final = 1_000
"""A one-shot timer set in the past fires this many ns later: virtual time goes on even if a guest re-arms forever."""


class _Timer:
    __slots__ = ("config", "count", "due", "pending", "timer")

    def __init__(self) -> None:
        self.config = 0
        self.count = 0
        self.due = 0  # reference time of the expiration that is armed or undelivered
        self.timer: Timer | None = None
        self.pending = False  # expired, but the message slot was occupied


class SyntheticTimers:
    """Periodic, one-shot, lazy, auto-enabled and direct-mode timers.

    An expiration whose message slot is occupied stays pending until the guest frees the slot, as the TLFS says; a
    periodic timer does not pile up further ones meanwhile. Lazy timers may be late in real
    hypervisors; here they only coalesce: while one waits for its slot, its later periods are skipped.
    """

    def __init__(
        self, clock: Clock, time: ReferenceTime, synic: Synic, raise_direct: Callable[[int, bool], None]
    ) -> None:
        self._clock = clock
        self._time = time
        self._synic = synic
        self._raise = raise_direct
        self._timers = [_Timer() for _ in range(STIMER_COUNT)]
        synic.slot_free = self._retry

    def reset(self) -> None:
        """Disarm all four."""
        for timer in self._timers:
            self._disarm(timer)
            timer.config = timer.count = 0

    def config(self, index: int) -> int:
        """The configuration register of timer `index` (0-3)."""
        return self._timers[index].config

    def count(self, index: int) -> int:
        """The count register: an expiration time (one-shot) or a period, in 100 ns units."""
        return self._timers[index].count

    def set_config(self, index: int, value: int) -> None:
        """Write a configuration register.

        Raises:
            GeneralProtectionFault: reserved bits are set, or direct mode names one of the vectors 0-15.
        """
        if value & ~_CONFIG_BITS:
            raise GeneralProtectionFault(f"STIMER{index}_CONFIG reserved bits in 0x{value:x}")
        if value & DIRECT_MODE and value & ENABLED and value >> 4 & 0xFF < 16:
            raise GeneralProtectionFault(f"STIMER{index} direct mode vector {value >> 4 & 0xFF} is below 16")
        timer = self._timers[index]
        self._disarm(timer)
        # SINT0 carries intercepts: a message-mode timer on it stays disabled (TLFS, timers).
        if not value & DIRECT_MODE and not value >> 16 & 15:
            value &= ~ENABLED
        timer.config = value
        self._arm(index, timer)

    def set_count(self, index: int, value: int) -> None:
        """Write a count register: 0 stops the timer, another value starts it if auto-enable is set."""
        timer = self._timers[index]
        self._disarm(timer)
        timer.count = value
        if not value:
            timer.config &= ~ENABLED
        elif timer.config & AUTO_ENABLE and (timer.config & DIRECT_MODE or timer.config >> 16 & 15):
            timer.config |= ENABLED
        self._arm(index, timer)

    def _disarm(self, timer: _Timer) -> None:
        timer.pending = False
        if timer.timer is not None:
            timer.timer.cancel()
            timer.timer = None

    def _arm(self, index: int, timer: _Timer, after: int | None = None) -> None:
        if not timer.config & ENABLED or not timer.count:
            return
        if timer.config & PERIODIC:
            timer.due = self._next_period(timer, after)
        else:
            timer.due = timer.count
        due = max(self._time.when(timer.due), self._clock.now() + MIN_DELAY)
        timer.timer = self._clock.schedule(due, partial(self._expire, index))

    def _next_period(self, timer: _Timer, after: int | None) -> int:
        """The expiration that follows `after`, in step with it: a late one does not delay the others."""
        now = self._time.now()
        period = max(timer.count, MIN_PERIOD)
        return now + period - (0 if after is None else (now - after) % period)

    def _expire(self, index: int) -> None:
        timer = self._timers[index]
        timer.timer = None
        expired = timer.due
        config = timer.config
        if not config & PERIODIC:
            timer.config &= ~ENABLED
        if config & DIRECT_MODE:
            if config & PERIODIC:
                self._arm(index, timer, expired)
            self._raise(config >> 4 & 0xFF, False)
            return
        timer.pending = True
        delivered = self._deliver(index, timer, expired)
        # The guest may have written this timer's registers from the interrupt that was just delivered.
        if delivered and timer.config & PERIODIC and timer.timer is None and timer.due == expired:
            self._arm(index, timer, expired)

    def _deliver(self, index: int, timer: _Timer, expired: int) -> bool:
        payload = TimerMessage(index, 0, expired, self._time.now()).pack()
        timer.pending = False
        if not self._synic.try_post(timer.config >> 16 & 15, MessageType.TIMER_EXPIRED, 0, payload):
            timer.pending = True
            return False
        return True

    def _retry(self, _sint: int) -> None:
        for index, timer in enumerate(self._timers):
            if timer.pending:
                due = timer.due
                if self._deliver(index, timer, due) and timer.config & PERIODIC and timer.timer is None:
                    self._arm(index, timer, due)
