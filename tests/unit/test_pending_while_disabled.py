"""What the hypervisor has for a guest while the guest has something disabled is delivered once it is enabled again."""

import struct

import pytest
from reference.raw_guest import SIEF, SIM, VECTOR, RawGuest

from vmbus.emulated.ioapic import IoApic
from vmbus.hypervisor import Hypervisor, VirtualClock
from vmbus.hypervisor.apic import APIC_BASE
from vmbus.hypervisor.tlfs import MessageType, Msr
from vmbus.hypervisor.wire import TimerMessage

ENABLED, PERIODIC = 1, 2
DIRECT = 1 << 12 | 0xEC << 4
SINT2 = 2 << 16
MASKED = 1 << 16
MS = 10_000  # 100 ns units
SPURIOUS, LVT_TIMER, INITIAL_COUNT = 0xF0, 0x320, 0x380


@pytest.fixture
def hv():
    hypervisor = Hypervisor(clock=VirtualClock())
    hypervisor.create_root()
    yield hypervisor
    hypervisor.root.destroy()


@pytest.fixture
def guest(hv):
    return RawGuest(hv.create_child(hv.root, "late", memory_size=1 << 20).vps[0])


def apic(vp, offset, value):
    vp.mmio_write(APIC_BASE + offset, 4, value)


def message_page(guest, on):
    guest.vp.wrmsr(Msr.SIMP, SIM | on)


def synic(guest, on):
    guest.vp.wrmsr(Msr.SCONTROL, on)


def sint(guest, on):
    guest.vp.wrmsr(Msr.SINT0 + 2, VECTOR | (0 if on else MASKED))


def by_software(guest, on):
    apic(guest.vp, SPURIOUS, 0x1FF if on else 0xFF)


def by_base(guest, on):
    guest.vp.wrmsr(Msr.IA32_APIC_BASE, APIC_BASE | on << 11 | 0x100)


def arm(guest, flags, *, timer=0, sint=SINT2):
    """A timer that expires in, or every, millisecond."""
    vp = guest.vp
    count = MS if flags & PERIODIC else vp.rdmsr(Msr.TIME_REF_COUNT) + MS
    vp.wrmsr(Msr.STIMER0_COUNT + 2 * timer, count)
    vp.wrmsr(Msr.STIMER0_CONFIG + 2 * timer, ENABLED | flags | sint)
    return vp.rdmsr(Msr.TIME_REF_COUNT) + MS


def expirations(guest):
    found = []
    while (message := guest.take_message(2)) is not None:
        assert message[0] == MessageType.TIMER_EXPIRED
        found.append(TimerMessage.unpack(message[2]).expiration_time)
    return found


SWITCHES = [message_page, synic, sint, by_software, by_base]


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_timer_that_expires_meanwhile(hv, guest, switch):
    switch(guest, 0)
    due = arm(guest, 0)
    hv.clock.advance(5_000_000)
    assert guest.take_interrupts() == []
    switch(guest, 1)
    assert guest.take_interrupts() == [VECTOR]
    assert expirations(guest) == [due]
    hv.clock.advance(5_000_000)
    assert expirations(guest) == []


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_periodic_timer_comes_once_and_goes_on_in_step(hv, guest, switch):
    switch(guest, 0)
    first = arm(guest, PERIODIC)
    hv.clock.advance(5_500_000)
    switch(guest, 1)
    assert guest.take_interrupts() == [VECTOR]
    # Where the page is there, the message lies in its slot already, and the second waits behind it.
    assert expirations(guest) in ([first], [first, first + MS])
    guest.take_interrupts()
    hv.clock.advance(500_000)
    assert expirations(guest) == [first + 5 * MS]
    assert guest.take_interrupts() == [VECTOR]


@pytest.mark.parametrize("periodic", [0, PERIODIC])
@pytest.mark.parametrize("switch", [by_software, by_base])
def test_a_direct_timer_waits_for_the_local_apic(hv, guest, switch, periodic):
    switch(guest, 0)
    arm(guest, DIRECT | periodic, sint=0)
    hv.clock.advance(5_500_000)
    switch(guest, 1)
    assert guest.take_interrupts() == [0xEC]
    hv.clock.advance(1_000_000)
    assert guest.take_interrupts() == ([0xEC] if periodic else [])


def test_a_direct_timer_that_was_written_meanwhile_does_not_come(hv, guest):
    by_software(guest, 0)
    arm(guest, DIRECT, sint=0)
    hv.clock.advance(5_000_000)
    guest.vp.wrmsr(Msr.STIMER0_CONFIG, 0)
    by_software(guest, 1)
    assert guest.take_interrupts() == []


@pytest.mark.parametrize("switch", [message_page, synic])
def test_a_timer_and_a_queue_in_front_of_it(hv, guest, switch):
    child = guest.vp.partition
    for n in range(3):
        hv.post_message(child, 0, 2, 1, 0, bytes([n]))
    switch(guest, 0)
    due = arm(guest, 0)
    hv.clock.advance(5_000_000)
    switch(guest, 1)
    assert [guest.take_message(2)[2] for _ in range(3)] == [b"\0", b"\1", b"\2"]
    assert expirations(guest) == [due]


@pytest.mark.parametrize("switch", [by_software, by_base])
def test_events_and_messages_interrupt_when_the_local_apic_is_enabled(hv, guest, switch):
    child = guest.vp.partition
    guest.vp.wrmsr(Msr.SINT0 + 3, 0x61)
    switch(guest, 0)
    assert hv.signal_event(child, 0, 3, 7)
    hv.post_message(child, 0, 2, 1, 0, b"waits")
    assert guest.take_interrupts() == []
    switch(guest, 1)
    assert sorted(guest.take_interrupts()) == [0x61, VECTOR]
    switch(guest, 0)
    switch(guest, 1)
    assert guest.take_interrupts() == []


def test_masked_and_without_an_apic_it_takes_both(hv, guest):
    sint(guest, 0)
    hv.post_message(guest.vp.partition, 0, 2, 1, 0, b"waits")
    by_software(guest, 0)
    sint(guest, 1)
    assert guest.take_interrupts() == []
    by_software(guest, 1)
    assert guest.take_interrupts() == [VECTOR]


def test_a_timer_behind_a_queue_that_an_end_of_interrupt_empties(hv, guest):
    """The last message of the queue must ask for an end of message: the timer has no other way to come."""
    child, vp = guest.vp.partition, guest.vp
    hv.post_message(child, 0, 2, 1, 0, b"first")
    hv.post_message(child, 0, 2, 1, 0, b"second")
    due = arm(guest, 0)
    hv.clock.advance(1_000_000)
    assert vp.pop_interrupt() == VECTOR
    vp.partition.memory.write(SIM + 2 * 256, bytes(4))  # freed without EOM: the EOI tells as well
    vp.wrmsr(Msr.EOI, 0)
    assert guest.take_message(2)[2] == b"second"
    assert expirations(guest) == [due]


def test_a_timer_comes_with_the_end_of_interrupt(hv, guest):
    vp = guest.vp
    hv.post_message(vp.partition, 0, 2, 1, 0, b"in the way")
    due = arm(guest, 0)
    hv.clock.advance(1_000_000)
    assert vp.pop_interrupt() == VECTOR
    vp.partition.memory.write(SIM + 2 * 256, bytes(4))
    vp.wrmsr(Msr.EOI, 0)
    assert vp.pop_interrupt() == VECTOR
    assert expirations(guest) == [due]


def test_a_reset_forgets_what_waited(hv, guest):
    for switch in (by_software, message_page):
        switch(guest, 0)
    arm(guest, 0)
    arm(guest, DIRECT, timer=1, sint=0)
    hv.signal_event(guest.vp.partition, 0, 2, 1)
    hv.clock.advance(5_000_000)
    guest.vp.partition.reset()
    fresh = RawGuest(guest.vp)
    assert fresh.take_interrupts() == []
    assert fresh.take_message(2) is None


def test_the_local_vector_table_is_masked_while_the_apic_is_disabled(hv, guest):
    """SDM 11.4.7.2: the masks are set, and cannot be cleared until it is enabled again."""
    vp = guest.vp
    apic(vp, LVT_TIMER, 0x42)
    apic(vp, INITIAL_COUNT, 1_000)
    by_software(guest, 0)
    assert vp.mmio_read(APIC_BASE + LVT_TIMER, 4) == 0x42 | MASKED
    apic(vp, LVT_TIMER, 0x43)
    apic(vp, 0x350, 0x44)
    assert vp.mmio_read(APIC_BASE + LVT_TIMER, 4) == 0x43 | MASKED
    assert vp.mmio_read(APIC_BASE + 0x350, 4) == 0x44 | MASKED
    by_software(guest, 1)
    hv.clock.advance(1_000_000)
    assert guest.take_interrupts() == []
    apic(vp, LVT_TIMER, 0x43)
    apic(vp, INITIAL_COUNT, 1_000)
    hv.clock.advance(1_000_000)
    assert guest.take_interrupts() == [0x43]


def test_a_level_that_nobody_took_is_not_stuck(hv, guest):
    vp = guest.vp
    io_apic = IoApic(vp.partition)
    for register, value in ((0x10 + 2 * 5, 0x45 | 1 << 15), (0x11 + 2 * 5, 0)):
        vp.mmio_write(0xFEC0_0000, 4, register)
        vp.mmio_write(0xFEC0_0010, 4, value)
    by_software(guest, 0)
    io_apic.set_line(5, True)
    by_software(guest, 1)
    for _ in range(2):  # still high at the end of the first
        assert vp.pop_interrupt() == 0x45
        assert vp.pop_interrupt() is None
        vp.wrmsr(Msr.EOI, 0)


class TestReferenceTscPage:
    def page(self, guest, gpa=0x9000):
        return struct.unpack("<IIQq", guest.vp.partition.memory.read(gpa, 24))

    def test_other_values_have_another_sequence(self, guest):
        vp = guest.vp
        vp.wrmsr(Msr.REFERENCE_TSC, 0x9001)
        seen = {self.page(guest)}
        for offset in (5_000, 10_000, 5_000, 0):
            vp.wrmsr(Msr.IA32_TSC_ADJUST, offset)
            seen.add(self.page(guest))
        assert len({sequence for sequence, *_ in seen}) == len(seen) == 5
        assert not {0, 0xFFFF_FFFF} & {sequence for sequence, *_ in seen}
        before = self.page(guest)
        vp.wrmsr(Msr.IA32_TSC_ADJUST, 0)
        assert self.page(guest) == before

    def test_it_is_invalid_while_it_changes(self, guest, monkeypatch):
        """What a reader on another processor may find between any two writes to the page."""
        vp = guest.vp
        vp.wrmsr(Msr.REFERENCE_TSC, 0x9001)
        before, found = self.page(guest), []
        overlay = type(vp.partition._reference_tsc_page)
        write = overlay.write

        def looked_at(page, offset, data):
            write(page, offset, data)
            found.append(self.page(guest))

        monkeypatch.setattr(overlay, "write", looked_at)
        vp.wrmsr(Msr.IA32_TSC_ADJUST, 123_456_789)
        after = self.page(guest)
        assert after[3] != before[3]
        assert all(page == after or page[0] == 0 for page in found)

    def test_moved_to_another_page_while_the_tsc_moved(self, guest):
        vp = guest.vp
        vp.wrmsr(Msr.REFERENCE_TSC, 0x9001)
        before = self.page(guest)
        vp.wrmsr(Msr.REFERENCE_TSC, 0x9000)
        vp.wrmsr(Msr.IA32_TSC_ADJUST, 77_777)
        vp.wrmsr(Msr.REFERENCE_TSC, 0xA001)
        after = self.page(guest, 0xA000)
        assert after[0] not in (0, before[0])
        by_page = (vp.rdmsr(Msr.IA32_TSC) * after[2] >> 64) + after[3]
        assert abs(by_page - vp.rdmsr(Msr.TIME_REF_COUNT)) <= 1

    def test_processors_that_differ_and_agree_again(self, hv):
        child = hv.create_child(hv.root, "two", memory_size=1 << 20, vps=2)
        guest = RawGuest(child.vps[0])
        guest.vp.wrmsr(Msr.REFERENCE_TSC, 0x9001)
        first = self.page(guest)[0]
        child.vps[0].wrmsr(Msr.IA32_TSC_ADJUST, 50_000)
        assert self.page(guest)[0] == 0
        child.vps[1].wrmsr(Msr.IA32_TSC_ADJUST, 50_000)
        assert self.page(guest)[0] not in (0, first)


def test_event_flags_page_and_message_page_are_told_apart(hv, guest):
    """A timer does not wait for the event flags page."""
    guest.vp.wrmsr(Msr.SIEFP, SIEF)
    due = arm(guest, 0)
    hv.clock.advance(1_000_000)
    assert expirations(guest) == [due]
