"""Timers that fire in one thread while the guest writes their registers in another, played back in one."""

import pytest

from vmbus.hypervisor import VirtualClock
from vmbus.hypervisor.apic import LocalApic, Register
from vmbus.hypervisor.clock import ReferenceTime
from vmbus.hypervisor.stimer import ENABLED, PERIODIC, SyntheticTimers

ON_SINT2 = ENABLED | 2 << 16
LVT_PERIODIC = 1 << 17 | 0x50


class Slot:
    """A SynIC of one slot; `meanwhile` runs in the middle of an attempt to post, as another thread's action would."""

    def __init__(self):
        self.slot_free = None
        self.full = False
        self.posted = 0
        self.meanwhile = None

    def try_post(self, sint, message_type, sender, payload):
        refused = self.full
        if not refused:
            self.posted += 1
            self.full = True
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return not refused

    def end_of_message(self):
        self.full = False
        self.slot_free(2)


@pytest.fixture
def slot():
    return Slot()


class LateClock(VirtualClock):
    """Something happens after the clock has taken a timer out to fire, and before it does."""

    between = None

    def _take(self, limit, last):
        taken = super()._take(limit, last)
        if taken is not None and self.between is not None:
            between, self.between = self.between, None
            between()
        return taken


@pytest.fixture
def clock():
    return LateClock()


@pytest.fixture
def timers(clock, slot):
    return SyntheticTimers(clock, ReferenceTime(clock, 1_000_000_000), slot, lambda vector, auto_eoi: None)


def test_a_slot_that_is_freed_while_a_timer_finds_it_full(clock, slot, timers):
    """The end of message comes between the look and the note that an expiration waits: it must not be missed."""
    slot.full = True
    slot.meanwhile = slot.end_of_message
    timers.set_count(0, 1000)
    timers.set_config(0, ON_SINT2)
    clock.advance(200_000)
    assert slot.posted == 1


def test_two_ends_of_message_deliver_one_expiration_once(clock, slot, timers):
    slot.full = True
    timers.set_count(0, 1000)
    timers.set_config(0, ON_SINT2)
    clock.advance(200_000)
    slot.meanwhile = slot.end_of_message  # of what was just posted
    slot.end_of_message()
    assert slot.posted == 1


@pytest.mark.parametrize("change", ["disabled", "set anew", "reset"])
def test_a_timer_that_is_written_as_it_fires(clock, slot, timers, change):
    timers.set_count(0, 1000)
    timers.set_config(0, ON_SINT2 | PERIODIC)

    def write():
        if change == "disabled":
            timers.set_config(0, 0)
        elif change == "reset":
            timers.reset()
        else:
            timers.set_count(0, 5000)

    clock.between = write
    clock.advance(150_000)
    assert slot.posted == 0
    clock.advance(550_000)
    assert slot.posted == (change == "set anew")
    timers.reset()
    assert clock.next_deadline() is None


def test_a_periodic_timer_set_anew_as_it_is_delivered_runs_once(clock, slot, timers):
    timers.set_count(0, 1000)
    timers.set_config(0, ON_SINT2 | PERIODIC)
    slot.meanwhile = lambda: timers.set_count(0, 2000)
    clock.advance(100_000)
    assert slot.posted == 1
    for _ in range(10):
        slot.end_of_message()
        clock.advance(200_000)
    assert slot.posted == 11


@pytest.mark.parametrize("change", ["stopped", "set anew"])
def test_a_local_timer_that_is_written_as_it_fires(clock, change):
    fired = []
    apic = LocalApic(0, clock, 1_000_000_000, 200_000_000, fired.append, lambda ipi: None)
    apic.write(Register.LVT_TIMER, LVT_PERIODIC)
    apic.write(Register.DIVIDE, 0xB)
    apic.write(Register.INITIAL_COUNT, 20_000)  # 100 µs
    clock.between = lambda: apic.write(Register.INITIAL_COUNT, 0 if change == "stopped" else 40_000)
    clock.advance(1_000_000)
    assert len(fired) == (0 if change == "stopped" else 4), "one timer, at its new period"
    apic.write(Register.INITIAL_COUNT, 0)
    assert clock.next_deadline() is None
