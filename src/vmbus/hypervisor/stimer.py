"""The four synthetic timers of one virtual processor (TLFS, timers), on its partition's reference time."""

import threading
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
    __slots__ = ("again", "armed", "config", "count", "delivering", "due", "pending", "timer")

    def __init__(self) -> None:
        self.config = 0
        self.count = 0
        self.due = 0  # reference time of the expiration that is armed or undelivered
        self.timer: Timer | None = None
        self.armed = 0  # counts how often it was disarmed: what began before that is void
        self.pending = False  # expired, and not delivered yet: the guest takes nothing now
        self.delivering = False  # a thread is about to post the message
        self.again = False  # a slot was freed meanwhile: it has to try once more


class SyntheticTimers:
    """Periodic, one-shot, lazy, auto-enabled and direct-mode timers.

    An expiration whose message slot is occupied stays pending until the guest frees the slot, as the TLFS says, and
    one that comes while the message page, the SynIC or (in direct mode) the local APIC is disabled until that is
    enabled, as in KVM and OpenVMM; a periodic timer does not pile up further ones meanwhile. Lazy timers may be late in
    real hypervisors; here they only coalesce: while one waits for its slot, its later periods are skipped.

    Args:
        clock: the hypervisor's.
        time: the partition's reference time.
        synic: where messages go; its `Synic.slot_free` is set.
        raise_direct: ``raise_direct(vector, auto_eoi)`` requests an interrupt; False if the local APIC is disabled.
    """

    def __init__(
        self, clock: Clock, time: ReferenceTime, synic: Synic, raise_direct: Callable[[int, bool], bool]
    ) -> None:
        self._clock = clock
        self._time = time
        self._synic = synic
        self._raise = raise_direct
        self._lock = threading.Lock()  # of the timers' states; nothing is delivered under it
        self.closed = False
        """The processor is gone: no timer is armed any more."""
        self._timers = [_Timer() for _ in range(STIMER_COUNT)]
        synic.slot_free = self.retry

    def reset(self) -> None:
        """Disarm all four."""
        with self._lock:
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
        # SINT0 carries intercepts: a message-mode timer on it stays disabled (TLFS, timers).
        if not value & DIRECT_MODE and not value >> 16 & 15:
            value &= ~ENABLED
        timer = self._timers[index]
        with self._lock:
            self._disarm(timer)
            timer.config = value
            self._arm(index, timer)

    def set_count(self, index: int, value: int) -> None:
        """Write a count register: 0 stops the timer, another value starts it if auto-enable is set."""
        timer = self._timers[index]
        with self._lock:
            self._disarm(timer)
            timer.count = value
            if not value:
                timer.config &= ~ENABLED
            elif timer.config & AUTO_ENABLE and (timer.config & DIRECT_MODE or timer.config >> 16 & 15):
                timer.config |= ENABLED
            self._arm(index, timer)

    def _disarm(self, timer: _Timer) -> None:
        timer.armed += 1
        timer.pending = False
        if timer.timer is not None:
            timer.timer.cancel()
            timer.timer = None

    def _arm(self, index: int, timer: _Timer, after: int | None = None) -> None:
        if not timer.config & ENABLED or not timer.count or self.closed:
            return
        if timer.config & PERIODIC:
            timer.due = self._next_period(timer, after)
        else:
            timer.due = timer.count
        due = max(self._time.when(timer.due), self._clock.now() + MIN_DELAY)
        timer.timer = self._clock.schedule(due, partial(self._expire, index, timer.armed))

    def _next_period(self, timer: _Timer, after: int | None) -> int:
        """The expiration that follows `after`, in step with it: a late one does not delay the others."""
        now = self._time.now()
        period = max(timer.count, MIN_PERIOD)
        return now + period - (0 if after is None else (now - after) % period)

    def _expire(self, index: int, armed: int) -> None:
        timer = self._timers[index]
        with self._lock:
            if timer.armed != armed:
                return  # disarmed since the clock took it out to fire
            timer.timer = None
            config = timer.config
            if not config & PERIODIC:
                timer.config &= ~ENABLED
            direct = config & DIRECT_MODE
            if not direct:
                timer.pending = True
            elif config & PERIODIC:
                self._arm(index, timer, timer.due)
        if direct:
            self._interrupt(timer, armed, config)
        else:
            self._deliver(index, timer)

    def _interrupt(self, timer: _Timer, armed: int, config: int) -> None:
        """Raise a direct-mode timer's interrupt; while the local APIC is disabled it waits."""
        vector = config >> 4 & 0xFF
        if self._raise(vector, False):
            return
        with self._lock:
            if timer.armed != armed:
                return
            timer.pending = True
        if self._raise(vector, False):  # the APIC was enabled meanwhile, by another thread
            with self._lock:
                if timer.armed == armed:
                    timer.pending = False

    def _deliver(self, index: int, timer: _Timer) -> None:
        """Post the message of an expired timer; a periodic one is armed again when that has succeeded."""
        with self._lock:
            if timer.delivering:
                timer.again = True  # in another thread, or further down this one's stack
                return
            if not timer.pending:
                return
            timer.delivering = True
        try:
            while self._try(index, timer):
                pass
        except BaseException:
            timer.delivering = False
            raise

    def _try(self, index: int, timer: _Timer) -> bool:
        """One attempt to deliver; whether there has to be another one."""
        with self._lock:
            timer.again = False
            if not timer.pending:
                timer.delivering = False
                return False
            armed, due, sint = timer.armed, timer.due, timer.config >> 16 & 15
        payload = TimerMessage(index, 0, due, self._time.now()).pack()
        posted = self._synic.try_post(sint, MessageType.TIMER_EXPIRED, 0, payload)
        with self._lock:
            # The guest may have written this timer's registers from the interrupt that was just delivered.
            if posted and timer.armed == armed:
                timer.pending = False
                if timer.config & PERIODIC:
                    self._arm(index, timer, due)
            again = timer.again and timer.pending
            timer.delivering = again
            return again

    def retry(self, _sint: int = -1) -> None:
        """The guest takes again what it took not before: deliver what waits."""
        for index, timer in enumerate(self._timers):
            if not timer.pending:
                continue
            with self._lock:
                armed, config = timer.armed, timer.config
                direct = timer.pending and config & DIRECT_MODE
                if direct:
                    timer.pending = False
            if direct:
                self._interrupt(timer, armed, config)
            else:
                self._deliver(index, timer)
