"""Monitored notifications: polled at the latency hint, armed and pending, counted."""

import struct
from uuid import UUID

import pytest

from vmbus.bus import Channel, Inline, Offer, Threads, Version, VmbusGuest, VmbusHost
from vmbus.bus.actions import MonitorPages
from vmbus.bus.monitor import LATENCIES, PARAMETERS, HostMonitor, armed_bit, pending_bit
from vmbus.core.dispatch import EventFlags
from vmbus.core.memory import GuestMemory
from vmbus.errors import RemoteProtocolError
from vmbus.hypervisor import Hypervisor, VirtualClock

PAGE = 0x5000
LATENCY = 100_000


class Rig:
    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.memory = GuestMemory(1 << 20)
        self.signals: list[tuple[int, int]] = []
        self.monitor = HostMonitor(
            self.clock, self.memory, lambda connection: self.signals.append((self.clock.now(), connection))
        )
        self.monitor.use(MonitorPages(0x4000, PAGE))
        self.bits = EventFlags(self.memory, PAGE, 0)

    def is_set(self, bit: int) -> bool:
        return bool(self.memory.read(PAGE + bit // 8, 1)[0] >> bit % 8 & 1)


def test_layout_is_the_one_of_the_tlfs() -> None:
    # struct hv_monitor_page: trigger state 8 bytes, then groups of (pending u32, armed u32)
    assert pending_bit(0) == 8 * 8
    assert armed_bit(0) == 12 * 8
    assert pending_bit(33) == 16 * 8 + 1
    assert armed_bit(127) == 36 * 8 + 31
    assert (LATENCIES, PARAMETERS) == (0x240, 0x440)


def test_clear_is_atomic_and_says_what_was() -> None:
    rig = Rig()
    assert rig.bits.set(77)
    assert rig.bits.clear(77)
    assert not rig.bits.clear(77)
    with pytest.raises(ValueError, match="2048"):
        rig.bits.clear(2048)


@pytest.mark.parametrize("monitor_id", [0, 31, 32, 127])
def test_pending_is_armed_then_signalled_after_the_latency(monitor_id: int) -> None:
    rig = Rig()
    rig.monitor.watch(monitor_id, LATENCY, 0x2001)
    page = rig.memory.read(PAGE, 4096)
    assert struct.unpack_from("<I", page)[0] == 1 << monitor_id // 32, "the group is enabled"
    assert struct.unpack_from("<H", page, LATENCIES + 2 * monitor_id)[0] == LATENCY // 100
    assert struct.unpack_from("<IHH", page, PARAMETERS + 8 * monitor_id) == (0x2001, 0, 0)
    rig.clock.advance(LATENCY // 2)
    rig.bits.set(pending_bit(monitor_id))
    rig.clock.advance(LATENCY // 2)
    assert rig.is_set(armed_bit(monitor_id)), "seen at the first poll"
    assert rig.signals == []
    rig.clock.advance(LATENCY)
    assert rig.signals == [(2 * LATENCY, 0x2001)]
    assert not rig.is_set(armed_bit(monitor_id))
    assert not rig.is_set(pending_bit(monitor_id))
    rig.clock.advance(10 * LATENCY)
    assert len(rig.signals) == 1
    assert rig.monitor.notifications == 1
    assert rig.monitor.polls == 12


def test_many_rings_are_one_notification() -> None:
    rig = Rig()
    rig.monitor.watch(5, LATENCY, 0x2005)
    for _ in range(50):
        rig.bits.set(pending_bit(5))
        rig.bits.clear(armed_bit(5))  # as the TLFS asks of guests; Linux leaves it alone
    rig.clock.advance(2 * LATENCY)
    assert len(rig.signals) == 1


def test_a_guest_that_disarms_for_ever_is_signalled_all_the_same() -> None:
    rig = Rig()
    rig.monitor.watch(5, LATENCY, 0x2005)
    for _ in range(40):
        rig.bits.set(pending_bit(5))
        rig.bits.clear(armed_bit(5))
        rig.clock.advance(LATENCY)
    assert 15 <= len(rig.signals) <= 20


def test_withdrawn_before_it_was_due() -> None:
    rig = Rig()
    rig.monitor.watch(5, LATENCY, 0x2005)
    rig.bits.set(pending_bit(5))
    rig.clock.advance(LATENCY)
    rig.bits.clear(pending_bit(5))
    rig.clock.advance(5 * LATENCY)
    assert rig.signals == []


def test_the_most_impatient_trigger_sets_the_pace() -> None:
    rig = Rig()
    rig.monitor.watch(1, 1_000_000, 1)
    rig.monitor.watch(2, 50_000, 2)
    rig.clock.advance(1_000_000)
    assert rig.monitor.polls >= 10
    rig.monitor.unwatch(2)
    before = rig.monitor.polls
    rig.clock.advance(4_000_000)
    assert rig.monitor.polls - before <= 5


def test_not_watched_not_signalled() -> None:
    rig = Rig()
    rig.monitor.watch(1, LATENCY, 1)
    rig.bits.set(pending_bit(2))
    rig.monitor.unwatch(1)
    rig.bits.set(pending_bit(1))
    rig.clock.advance(10 * LATENCY)
    assert rig.signals == []
    assert rig.clock.next_deadline() is None, "no polls without triggers"


def echo(channel: Channel) -> None:
    channel.serve(lambda packets: [channel.send(p.payload, p.transaction_id) for p in packets])


@pytest.mark.parametrize("version", [Version.V0_13, Version.V2_4, Version.V6_0])
def test_monitored_channel_makes_no_hypercalls(version: int) -> None:
    hv = Hypervisor(clock=VirtualClock())
    root = hv.create_root()
    child = hv.create_child(root, name="c0", memory_size=8 << 20)
    host = VmbusHost(hv, child, hosting=Inline())
    host.offer(Offer(UUID(int=1), UUID(int=2), monitor_latency=LATENCY), echo)
    guest = VmbusGuest(child.vps[0], versions=[version])
    guest.connect()
    channel = guest.open(guest.offers[0])
    got: list[bytes] = []
    channel.serve(lambda packets: got.extend(p.payload for p in packets))
    before = child.account.copy()
    started = hv.clock.now()
    for number in range(10):
        channel.send(number.to_bytes(8, "little"))
    assert channel.wait(lambda: len(got) == 10)
    waited = hv.clock.now() - started
    assert LATENCY <= waited <= 2 * LATENCY
    assert not (child.account - before).hypercalls, "not one"
    assert channel.account.hypercalls_saved == channel.account.doorbells_sent >= 1
    assert host.monitor.notifications == 1
    guest.close()
    assert hv.clock.next_deadline() is None


def test_a_guest_without_monitor_pages_rings_itself() -> None:
    hv = Hypervisor(clock=VirtualClock())
    child = hv.create_child(hv.create_root(), memory_size=8 << 20)
    host = VmbusHost(hv, child)
    host.offer(Offer(UUID(int=1), UUID(int=2), monitor_latency=LATENCY), echo)
    guest = VmbusGuest(child.vps[0], monitored=False)
    guest.connect()
    channel = guest.open(guest.offers[0])
    channel.send(b"x" * 8)
    assert channel.account.hypercalls_saved == 0
    assert child.account.hypercalls[0x5D] == 1
    guest.close()


def test_polled_in_real_time_by_threads() -> None:
    hv = Hypervisor()
    child = hv.create_child(hv.create_root(), memory_size=8 << 20)
    hosting = Threads(workers=1)
    host = VmbusHost(hv, child, hosting=hosting)
    host.offer(Offer(UUID(int=1), UUID(int=2), monitor_latency=LATENCY), echo)
    guest = VmbusGuest(child.vps[0])
    guest.connect()
    channel = guest.open(guest.offers[0])
    got: list[bytes] = []
    channel.serve(lambda packets: got.extend(p.payload for p in packets))
    channel.send(b"in time!")
    assert channel.wait(lambda: bool(got), 5)
    assert child.account.hypercalls[0x5D] == 0
    guest.close()
    hosting.close()


def test_monitor_page_taken_from_the_guest() -> None:
    """The parent unmaps the page under a monitored channel: nothing is signalled, nothing breaks."""
    hv = Hypervisor(clock=VirtualClock())
    child = hv.create_child(hv.create_root(), memory_size=8 << 20)
    host = VmbusHost(hv, child)
    closed: list[Channel] = []
    offered = host.offer(Offer(UUID(int=1), UUID(int=2), monitor_latency=LATENCY), echo, closed.append)
    guest = VmbusGuest(child.vps[0])
    guest.connect()
    channel = guest.open(guest.offers[0])
    pages = host.machine.monitor_pages
    assert pages is not None
    channel.send(b"unheard!")
    child.memory.unmap(pages.child_to_parent, 4096)
    hv.clock.advance(10 * LATENCY)  # type: ignore[attr-defined]
    assert host.monitor.notifications == 0
    channel.close()
    assert len(closed) == 1
    assert offered.channel is None
    with pytest.raises(RemoteProtocolError, match="refused"):
        guest.open(guest.offers[0])
    host.machine.check()
    guest.disconnect()
    assert host.version == 0
    guest.connect()
    assert host.version == Version.V5_3, "a connection without the page it names still serves"
    guest.close()


def test_a_guest_that_waits_is_not_kept_waiting_for_polls_that_find_nothing() -> None:
    """An idle guest's time goes on at its next timer; what is pending is signalled in time all the same."""
    rig = Rig()
    rig.monitor.watch(3, LATENCY, 0x2001)
    assert rig.clock.next_deadline() == LATENCY
    assert rig.clock.next_deadline(idle=True) is None
    assert not rig.clock.advance_to_next()
    fired: list[int] = []
    rig.clock.schedule(5_000_000_000, lambda: fired.append(rig.clock.now()))
    before = rig.monitor.polls
    assert rig.clock.next_deadline(idle=True) == 5_000_000_000
    assert rig.clock.advance_to_next()
    assert fired == [5_000_000_000]
    assert rig.monitor.polls <= before + 1, "not one for each 100 µs of five seconds"
    rig.bits.set(pending_bit(4))  # of nobody
    assert rig.clock.next_deadline(idle=True) is None
    rig.bits.set(pending_bit(3))
    rang = rig.clock.now()
    while rig.clock.advance_to_next():
        pass
    ((when, connection),) = rig.signals
    assert connection == 0x2001
    assert when - rang <= 2 * LATENCY
    assert rig.clock.next_deadline(idle=True) is None


def test_a_page_without_triggers_is_looked_at_half_as_often_and_none_waits_longer_for_it() -> None:
    rig = Rig()
    rig.monitor.watch(3, LATENCY, 0x2001)
    rig.clock.advance(1_000_000_000)
    assert 4_000 < rig.monitor.polls < 6_000
    for offset in range(0, 400_000, 37_000):
        rig.signals.clear()
        rig.clock.advance(20_000_000 + offset)  # quiet again, and at another place between two polls
        rig.bits.set(pending_bit(3))
        rang = rig.clock.now()
        rig.clock.advance(10 * LATENCY)
        ((when, _),) = rig.signals
        assert when - rang <= 2 * LATENCY
        assert not rig.is_set(pending_bit(3))
        assert not rig.is_set(armed_bit(3))
    # A guest that rings all the time is looked at all the time.
    before = rig.monitor.polls
    for _ in range(100):
        rig.bits.set(pending_bit(3))
        rig.clock.advance(2 * LATENCY)
    assert rig.monitor.polls - before >= 190


@pytest.mark.parametrize("fault", [KeyError("a defect"), KeyboardInterrupt()], ids=repr)
def test_a_defect_behind_one_notification_loses_no_other(fault: BaseException) -> None:
    clock, memory = VirtualClock(), GuestMemory(1 << 20)
    signals: list[int] = []
    faults = [fault]

    def signal(connection: int) -> None:
        signals.append(connection)
        if connection == 1 and faults:
            raise faults.pop()

    monitor = HostMonitor(clock, memory, signal)
    monitor.use(MonitorPages(0x4000, PAGE))
    bits = EventFlags(memory, PAGE, 0)
    for number in (1, 2):
        monitor.watch(number, LATENCY, number)
        bits.set(pending_bit(number))
    with pytest.raises(type(fault)):
        clock.advance(3 * LATENCY)
    assert signals == [1, 2]
    bits.set(pending_bit(1))
    clock.advance(3 * LATENCY)
    assert signals == [1, 2, 1], "it goes on looking"
