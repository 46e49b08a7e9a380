"""Clocks, synthetic timers, the reference TSC page and the local APIC's timer."""

import struct

import pytest
from reference.raw_guest import VECTOR, RawGuest

from vmbus.hypervisor import GeneralProtectionFault, HostClock, Hypervisor, VirtualClock
from vmbus.hypervisor.apic import APIC_BASE
from vmbus.hypervisor.personality import SERVER_2008_R2
from vmbus.hypervisor.stimer import MIN_PERIOD
from vmbus.hypervisor.tlfs import MessageType, Msr
from vmbus.hypervisor.wire import TimerMessage

ENABLED, PERIODIC, LAZY, AUTO = 1, 2, 4, 8
SINT2 = 2 << 16
MS = 10_000  # 100 ns units


def direct(vector):
    return 1 << 12 | vector << 4


@pytest.fixture
def hv():
    hypervisor = Hypervisor(clock=VirtualClock())
    hypervisor.create_root()
    yield hypervisor
    hypervisor.root.destroy()


@pytest.fixture
def guest(hv):
    hv.clock.advance(5_000_000)  # partitions are not as old as the hypervisor
    return RawGuest(hv.create_child(hv.root, "timed", memory_size=1 << 20).vps[0])


def expirations(guest):
    """Timer messages that wait: (timer, expiration, delivery)."""
    found = []
    while (message := guest.take_message(2)) is not None:
        assert message[0] == MessageType.TIMER_EXPIRED
        timer = TimerMessage.unpack(message[2])
        found.append((timer.timer_index, timer.expiration_time, timer.delivery_time))
    return found


class TestClock:
    def test_timers_fire_in_order_at_their_own_times(self):
        clock = VirtualClock()
        seen = []
        for due in (30, 10, 20, 10):
            clock.schedule(due, lambda due=due: seen.append((due, clock.now())))
        clock.schedule(15, lambda: clock.schedule(25, lambda: seen.append((25, clock.now()))))
        assert clock.next_deadline() == 10
        assert clock.advance(28) == 5
        assert seen == [(10, 10), (10, 10), (20, 20), (25, 25)]
        assert clock.now() == 28
        assert clock.advance_to_next()
        assert clock.now() == 30
        assert not clock.advance_to_next()

    def test_cancelled_timers_neither_fire_nor_pile_up(self):
        clock = VirtualClock()
        for _ in range(10_000):
            clock.schedule(1_000, lambda: pytest.fail("fired")).cancel()
        assert len(clock._timers) < 200
        assert clock.next_deadline() is None
        assert clock.advance(2_000) == 0

    def test_a_timer_in_the_past_cannot_hold_the_clock(self):
        clock = VirtualClock(100)
        count = 0

        def again():
            nonlocal count
            count += 1
            if count < 1000:
                clock.schedule(0, again)

        clock.schedule(0, again)
        assert clock.run_due() == 1  # what it re-armed waits for the next round

    def test_the_hosts_clock_runs(self):
        clock = HostClock()
        first = clock.now()
        fired = []
        clock.schedule(first, lambda: fired.append(clock.now()))
        while clock.now() == first:
            pass
        assert clock.run_due() == 1
        assert fired[0] > first


class TestSyntheticTimers:
    def test_one_shot_at_an_absolute_time(self, hv, guest):
        vp = guest.vp
        due = vp.rdmsr(Msr.TIME_REF_COUNT) + 3 * MS
        vp.wrmsr(Msr.STIMER0_COUNT, due)
        vp.wrmsr(Msr.STIMER0_CONFIG, ENABLED | SINT2)
        hv.clock.advance(2_999_999)
        assert expirations(guest) == []
        hv.clock.advance(1)
        assert expirations(guest) == [(0, due, due)]
        assert vp.rdmsr(Msr.STIMER0_CONFIG) & ENABLED == 0
        assert guest.take_interrupts() == [VECTOR]
        hv.clock.advance(10_000_000)
        assert expirations(guest) == []

    def test_auto_enable(self, hv, guest):
        vp = guest.vp
        vp.wrmsr(Msr.STIMER0_CONFIG + 2, AUTO | SINT2)
        hv.clock.advance(1_000_000)
        assert expirations(guest) == []
        due = vp.rdmsr(Msr.TIME_REF_COUNT) + MS
        vp.wrmsr(Msr.STIMER0_COUNT + 2, due)
        assert vp.rdmsr(Msr.STIMER0_CONFIG + 2) == AUTO | SINT2 | ENABLED
        hv.clock.advance(1_000_000)
        assert expirations(guest) == [(1, due, due)]
        vp.wrmsr(Msr.STIMER0_COUNT + 2, due + 9 * MS)
        vp.wrmsr(Msr.STIMER0_COUNT + 2, 0)  # a count of zero stops the timer
        assert vp.rdmsr(Msr.STIMER0_CONFIG + 2) == AUTO | SINT2
        hv.clock.advance(100_000_000)
        assert expirations(guest) == []

    def test_periodic(self, hv, guest):
        vp = guest.vp
        start = vp.rdmsr(Msr.TIME_REF_COUNT)
        vp.wrmsr(Msr.STIMER0_CONFIG, PERIODIC | SINT2)
        vp.wrmsr(Msr.STIMER0_COUNT, MS)
        vp.wrmsr(Msr.STIMER0_CONFIG, ENABLED | PERIODIC | SINT2)
        for n in range(1, 6):
            hv.clock.advance(1_000_000)
            assert expirations(guest) == [(0, start + n * MS, start + n * MS)]

    @pytest.mark.parametrize("lazy", [0, LAZY])
    def test_an_expiration_waits_for_the_slot_and_later_ones_do_not_pile_up(self, hv, guest, lazy):
        vp = guest.vp
        start = vp.rdmsr(Msr.TIME_REF_COUNT)
        hv.post_message(vp.partition, 0, 2, 1, 0, b"in the way")
        vp.wrmsr(Msr.STIMER0_COUNT, MS)
        vp.wrmsr(Msr.STIMER0_CONFIG, ENABLED | PERIODIC | lazy | SINT2)
        hv.clock.advance(7_500_000)
        assert guest.take_message(2) == (1, 0, b"in the way")
        assert guest.take_message(2)[2] == TimerMessage(0, 0, start + MS, start + 75 * MS // 10).pack()
        assert guest.take_message(2) is None
        hv.clock.advance(1_000_000)
        assert [timer for timer, *_ in expirations(guest)] == [0]

    def test_direct_mode(self, hv, guest):
        vp = guest.vp
        vp.wrmsr(Msr.STIMER0_COUNT + 6, MS)
        vp.wrmsr(Msr.STIMER0_CONFIG + 6, ENABLED | PERIODIC | direct(0xEC))
        hv.clock.advance(1_000_000)
        assert guest.take_interrupts() == [0xEC]
        hv.clock.advance(1_000_000)
        assert guest.take_interrupts() == [0xEC]
        assert guest.take_message(2) is None

    def test_past_times_fire_at_once(self, hv, guest):
        vp = guest.vp
        vp.wrmsr(Msr.STIMER0_COUNT, 1)
        vp.wrmsr(Msr.STIMER0_CONFIG, ENABLED | direct(0xEC))
        hv.clock.advance(1_000)
        assert guest.take_interrupts() == [0xEC]

    def test_periods_stay_in_step_when_the_host_is_late(self, hv, guest):
        vp = guest.vp
        start = vp.rdmsr(Msr.TIME_REF_COUNT)
        vp.wrmsr(Msr.STIMER0_COUNT, MS)
        vp.wrmsr(Msr.STIMER0_CONFIG, ENABLED | PERIODIC | SINT2)
        at = hv.clock.now()
        for late in (0.3, 0.7, 2.5, 0.0):  # periods; in the third, two of them are missed
            at += 1_000_000
            hv.clock.move_to(at + int(late * 1_000_000))
            assert hv.clock.run_due() == 1
            ((_, due, now),) = expirations(guest)
            assert (due - start) % MS == 0
            assert now - due == int(late * MS)
            at += int(late) * 1_000_000

    def test_direct_mode_exists_only_where_cpuid_has_it(self, hv):
        vp = hv.create_child(hv.root, "older", memory_size=1 << 20, personality=SERVER_2008_R2).vps[0]
        for value in (direct(0), ENABLED | direct(0xEC)):
            with pytest.raises(GeneralProtectionFault):
                vp.wrmsr(Msr.STIMER0_CONFIG, value)
        vp.wrmsr(Msr.STIMER0_CONFIG, AUTO | SINT2)
        assert vp.rdmsr(Msr.STIMER0_CONFIG) == AUTO | SINT2

    def test_illegal_settings(self, guest):
        vp = guest.vp
        for value in (ENABLED | direct(15), 1 << 13, 1 << 20, 1 << 63):
            with pytest.raises(GeneralProtectionFault):
                vp.wrmsr(Msr.STIMER0_CONFIG, value)
        vp.wrmsr(Msr.STIMER0_CONFIG, ENABLED)  # message mode on SINT0
        assert vp.rdmsr(Msr.STIMER0_CONFIG) & ENABLED == 0

    def test_a_guest_cannot_drown_its_host_in_ticks(self, hv, guest):
        vp = guest.vp
        vp.wrmsr(Msr.STIMER0_COUNT, 1)
        vp.wrmsr(Msr.STIMER0_CONFIG, ENABLED | PERIODIC | direct(0xEC))
        assert hv.clock.advance(10_000_000) <= 10_000_000 // (MIN_PERIOD * 100)

    def test_a_handler_that_always_rearms_in_the_past(self, hv, guest):
        vp = guest.vp
        fired = 0

        def handler(vector):
            nonlocal fired
            fired += 1
            vp.wrmsr(Msr.STIMER0_COUNT, 1)
            vp.wrmsr(Msr.EOI, 0)

        vp.interrupt_handler = handler
        vp.wrmsr(Msr.STIMER0_CONFIG, AUTO | direct(0xEC))
        vp.wrmsr(Msr.STIMER0_COUNT, 1)
        hv.clock.advance(100_000)
        assert fired == 100

    def test_a_reset_disarms(self, hv, guest):
        vp = guest.vp
        vp.wrmsr(Msr.STIMER0_COUNT, MS)
        vp.wrmsr(Msr.STIMER0_CONFIG, ENABLED | PERIODIC | direct(0xEC))
        vp.partition.reset()
        assert hv.clock.advance(10_000_000) == 0
        assert vp.pop_interrupt() is None


class TestReferenceTime:
    def test_counter_and_page_agree(self, hv, guest):
        vp = guest.vp
        vp.wrmsr(Msr.REFERENCE_TSC, 0x9000 | 1)
        for step in (0, 1, 99, 12_345_678_901):
            hv.clock.advance(step)
            sequence, _, scale, offset = struct.unpack("<IIQq", vp.partition.memory.read(0x9000, 24))
            assert sequence not in (0, 0xFFFF_FFFF)
            by_page = (vp.rdmsr(Msr.IA32_TSC) * scale >> 64) + offset
            assert abs(by_page - vp.rdmsr(Msr.TIME_REF_COUNT)) <= 1
            vp.wrmsr(
                Msr.IA32_TSC, vp.rdmsr(Msr.IA32_TSC) + 1_000_003
            )  # reference time does not follow the TSC
        vp.wrmsr(Msr.REFERENCE_TSC, 0x9000)
        assert vp.partition.memory.read(0x9000, 24) == bytes(24)

    @pytest.mark.parametrize("created", [0, 777, 12_345, 5_000_050])
    @pytest.mark.parametrize("frequency", [1_000_000_000, 2_593_906_000, 3_333_333_333, 100_000_000])
    def test_a_guest_that_mixes_counter_and_page_sees_time_run_forwards(self, frequency, created):
        hv = Hypervisor(clock=VirtualClock(), tsc_frequency=frequency)
        hv.create_root()
        hv.clock.advance(created)
        vp = hv.create_child(hv.root, "timed", memory_size=1 << 20).vps[0]
        assert vp.rdmsr(Msr.TIME_REF_COUNT) == 0
        vp.wrmsr(Msr.REFERENCE_TSC, 0x9000 | 1)
        _, _, scale, offset = struct.unpack("<IIQq", vp.partition.memory.read(0x9000, 24))
        last = 0
        for step in (0, 1, 99, 23, 50, 977, 1_000_003, 999_999_999) * 20:
            hv.clock.advance(step)
            counter = vp.rdmsr(Msr.TIME_REF_COUNT)
            assert (vp.rdmsr(Msr.IA32_TSC) * scale >> 64) + offset == counter
            assert counter >= last
            last = counter
        hv.root.destroy()

    @pytest.mark.parametrize("frequency", [1_000_000_000, 2_593_906_000, 100_000_000])
    def test_no_timer_is_early_by_the_counter(self, frequency):
        hv = Hypervisor(clock=VirtualClock(), tsc_frequency=frequency)
        hv.create_root()
        hv.clock.advance(12_345)
        guest = RawGuest(hv.create_child(hv.root, "timed", memory_size=1 << 20).vps[0])
        for wait in (20, 21, 33, 10_007, 123_456_789):
            due = guest.vp.rdmsr(Msr.TIME_REF_COUNT) + wait
            guest.vp.wrmsr(Msr.STIMER0_COUNT, due)
            guest.vp.wrmsr(Msr.STIMER0_CONFIG, ENABLED | SINT2)
            assert hv.clock.advance_to_next()
            assert expirations(guest) == [(0, due, due)]
        hv.root.destroy()

    def test_frequencies(self, guest):
        assert guest.vp.rdmsr(Msr.TSC_FREQUENCY) == 1_000_000_000
        assert guest.vp.rdmsr(Msr.APIC_FREQUENCY) == 200_000_000
        assert guest.vp.cpuid(0x15) == (1, 1, 1_000_000_000, 0)

    def test_writing_the_tsc(self, hv, guest):
        vp = guest.vp
        vp.wrmsr(Msr.IA32_TSC, 77)
        assert vp.rdmsr(Msr.IA32_TSC) == 77
        hv.clock.advance(5)
        assert vp.rdmsr(Msr.IA32_TSC) == 82
        vp.wrmsr(Msr.IA32_TSC_ADJUST, 0)
        assert vp.rdmsr(Msr.IA32_TSC) == hv.clock.now()


class TestLocalTimer:
    def lvt(self, vp, value):
        vp.mmio_write(APIC_BASE + 0x320, 4, value)

    def test_one_shot_and_its_count(self, hv, guest):
        vp = guest.vp
        vp.mmio_write(APIC_BASE + 0x3E0, 4, 0xB)  # divide by one
        self.lvt(vp, 0x40)
        vp.mmio_write(APIC_BASE + 0x380, 4, 2_000)  # 10 µs of 200 MHz
        hv.clock.advance(4_000)
        assert vp.mmio_read(APIC_BASE + 0x390, 4) == 1_200
        assert vp.pop_interrupt() is None
        hv.clock.advance(6_000)
        assert vp.pop_interrupt() == 0x40
        assert vp.mmio_read(APIC_BASE + 0x390, 4) == 0
        vp.mmio_write(APIC_BASE + 0xB0, 4, 0)
        hv.clock.advance(1_000_000)
        assert vp.pop_interrupt() is None

    def test_a_change_between_one_shot_and_periodic_keeps_the_count(self, hv, guest):
        vp = guest.vp
        vp.mmio_write(APIC_BASE + 0x3E0, 4, 0xB)
        self.lvt(vp, 0x40)
        vp.mmio_write(APIC_BASE + 0x380, 4, 20_000)  # 100 µs
        hv.clock.advance(70_000)
        self.lvt(vp, 0x40 | 1 << 17)
        assert vp.mmio_read(APIC_BASE + 0x390, 4) == 6_000
        hv.clock.advance(30_000)
        assert guest.take_interrupts() == [0x40]
        hv.clock.advance(40_000)
        assert vp.mmio_read(APIC_BASE + 0x390, 4) == 12_000
        self.lvt(vp, 0x40)  # the period under way is the last one
        hv.clock.advance(60_000)
        assert guest.take_interrupts() == [0x40]
        assert vp.mmio_read(APIC_BASE + 0x390, 4) == 0
        hv.clock.advance(1_000_000)
        assert guest.take_interrupts() == []
        self.lvt(vp, 0x40 | 1 << 17)
        assert vp.mmio_read(APIC_BASE + 0x390, 4) == 0, "a timer that has ended does not start by that"
        vp.mmio_write(APIC_BASE + 0x380, 4, 20_000)
        self.lvt(vp, 0x40 | 2 << 17)  # the deadline is another timer
        hv.clock.advance(1_000_000)
        assert guest.take_interrupts() == []

    def test_periodic_with_a_divisor(self, hv, guest):
        vp = guest.vp
        vp.mmio_write(APIC_BASE + 0x3E0, 4, 0x3)  # divide by 16
        self.lvt(vp, 0x41 | 1 << 17)
        vp.mmio_write(APIC_BASE + 0x380, 4, 1_000)  # 80 µs
        for _ in range(5):
            hv.clock.advance(80_000)
            assert guest.take_interrupts() == [0x41]
        vp.mmio_write(APIC_BASE + 0x380, 4, 0)
        hv.clock.advance(1_000_000)
        assert guest.take_interrupts() == []

    def test_tsc_deadline(self, hv, guest):
        vp = guest.vp
        vp.wrmsr(Msr.IA32_TSC_DEADLINE, 1 << 40)
        assert vp.rdmsr(Msr.IA32_TSC_DEADLINE) == 0  # not in that mode
        self.lvt(vp, 0x42 | 2 << 17)
        deadline = vp.rdmsr(Msr.IA32_TSC) + 1_234
        vp.wrmsr(Msr.IA32_TSC_DEADLINE, deadline)
        assert vp.rdmsr(Msr.IA32_TSC_DEADLINE) == deadline
        hv.clock.advance(1_233)
        assert vp.pop_interrupt() is None
        hv.clock.advance(1)
        assert guest.take_interrupts() == [0x42]
        assert vp.rdmsr(Msr.IA32_TSC_DEADLINE) == 0
        vp.wrmsr(Msr.IA32_TSC_DEADLINE, 1)  # long past
        hv.clock.advance(1)
        assert guest.take_interrupts() == [0x42]

    def test_masked(self, hv, guest):
        self.lvt(guest.vp, 0x42 | 1 << 16)
        guest.vp.mmio_write(APIC_BASE + 0x380, 4, 10)
        hv.clock.advance(1_000_000)
        assert guest.take_interrupts() == []

    def test_a_tsc_that_was_written_moves_the_deadline(self, hv, guest):
        vp = guest.vp
        vp.wrmsr(Msr.IA32_TSC, 0)
        self.lvt(vp, 0x42 | 2 << 17)
        vp.wrmsr(Msr.IA32_TSC_DEADLINE, 10_000)
        hv.clock.advance(9_999)
        assert guest.take_interrupts() == []
        hv.clock.advance(1)
        assert guest.take_interrupts() == [0x42]
