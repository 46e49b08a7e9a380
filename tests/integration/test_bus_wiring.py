"""Both ends of the bus over a real hypervisor: hypercalls, SynIC, mapped rings, in every version and hosting."""

import threading
import time
from collections.abc import Iterator
from uuid import UUID

import pytest

from vmbus.bus import Channel, Inline, Offer, Threads, Version, VmbusGuest, VmbusHost
from vmbus.bus.versions import version_name
from vmbus.errors import LocalProtocolError, RemoteProtocolError
from vmbus.hypervisor import GuestFault, Hypervisor, Personality, VirtualClock, VpSuspended
from vmbus.hypervisor.personality import (
    DOS,
    LINUX,
    OLD_BSD,
    SERVER_2008,
    SERVER_2022,
    SUSE_LINUX,
    VISTA,
    WINDOWS_10,
    WINDOWS_2000,
)
from vmbus.hypervisor.tlfs import Msr
from vmbus.trace.events import EventTrace

KIND = UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f")
ALL_VERSIONS = pytest.mark.parametrize("version", Version, ids=version_name)


class World:
    """One hypervisor, one child with a bus."""

    def __init__(self, hosting: str = "inline", *, vps: int = 2, **host: object) -> None:
        inline = hosting == "inline"
        self.hv = Hypervisor(clock=VirtualClock() if inline else None)
        self.root = self.hv.create_root()
        self.child = self.hv.create_child(self.root, name="c0", memory_size=16 << 20, vps=vps)
        self.hosting = Inline(seed=1) if inline else Threads(workers=2)
        self.host = VmbusHost(self.hv, self.child, hosting=self.hosting, **host)  # type: ignore[arg-type]

    def guest(self, *versions: int, **more: object) -> VmbusGuest:
        return VmbusGuest(self.child.vps[0], versions=versions or None, **more)  # type: ignore[arg-type]

    def close(self) -> None:
        self.hosting.close()
        self.child.destroy()
        self.root.destroy()


@pytest.fixture(params=["inline", "threads"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(request.param)
    yield world
    world.close()


def an_offer(number: int = 1, **more: object) -> Offer:
    return Offer(KIND, UUID(int=number), **more)  # type: ignore[arg-type]


def echo(channel: Channel) -> None:
    """A provider that answers every packet with its payload reversed."""

    def answer(packets: list) -> None:
        for packet in packets:
            channel.send(packet.payload[::-1], packet.transaction_id)

    channel.serve(answer)


def ask(channel: Channel, payload: bytes) -> bytes:
    """A client that waits for the answer to one packet; rings carry whole 8 bytes."""
    assert len(payload) % 8 == 0
    answers: list[bytes] = []
    channel.serve(lambda packets: answers.extend(p.payload for p in packets))
    channel.send(payload)
    assert channel.wait(lambda: bool(answers))
    return answers[0]


def test_processors_that_came_after_the_bus(world: World) -> None:
    world.host.offer(an_offer(), echo)
    world.child.add_vp()
    guest = world.guest(Version.V5_3)
    guest.connect()
    channel = guest.open(guest.offers[0], target_vp=2)
    got: list[bytes] = []
    channel.serve(lambda packets: got.extend(p.payload for p in packets))
    channel.send(b"forwards")
    assert channel.wait(lambda: bool(got))
    assert got == [b"sdrawrof"]
    guest.retarget(channel, 1)
    guest.close()


@ALL_VERSIONS
def test_connect_open_talk_close(world: World, version: Version) -> None:
    closed: list[Channel] = []
    offered = world.host.offer(an_offer(), echo, closed.append, name="echo")
    guest = world.guest(version)
    assert guest.connect() == version == world.host.version
    (offer,) = guest.offers
    for _ in range(3):
        channel = guest.open(offer, 2, 3, b"hello")
        assert offered.channel is not None
        assert offered.channel.user_data.rstrip(b"\0") == b"hello"
        for size in (8, 64, 1000):
            payload = bytes(n & 0xFF for n in range(size))
            assert ask(channel, payload) == payload[::-1]
        channel.close()
        assert offered.channel is None
    assert len(closed) == 3
    guest.disconnect()
    assert world.host.version == 0
    guest.close()
    assert guest.pages.in_use == 0
    assert world.host.violations == guest.violations == 0


@ALL_VERSIONS
def test_interrupts_go_the_way_of_the_version(version: Version) -> None:
    world = World()
    world.host.offer(an_offer(), echo)
    guest = world.guest(version, monitored=False)
    guest.connect()
    channel = guest.open(guest.offers[0], target_vp=1)
    before = world.child.account.copy()
    ask(channel, b"x" * 16)
    spent = world.child.account - before
    assert spent.hypercalls == {0x5D: 1}, "one HvSignalEvent"
    connections = set(world.child.connections)
    if version < Version.V2_4:
        assert 2 in connections, "the shared event"
    assert 0x2001 in connections, "one of the channel's own"
    channel.close()
    assert 0x2001 not in world.child.connections
    guest.close()
    world.close()


def test_retarget(world: World) -> None:
    world.host.offer(an_offer(), echo)
    guest = world.guest(Version.V5_3)
    guest.connect()
    channel = guest.open(guest.offers[0])
    guest.retarget(channel, 1)
    assert world.host.channels[0].target_vp == 1
    assert ask(channel, b"after...") == b"...retfa"
    with pytest.raises(RemoteProtocolError, match="VP 9"):
        guest.retarget(channel, 9)
    guest.close()


def test_provider_refuses(world: World) -> None:
    def refuse(channel: Channel) -> None:
        raise LocalProtocolError("not today")

    offered = world.host.offer(an_offer(), refuse)
    guest = world.guest()
    guest.connect()
    used = guest.pages.in_use
    for _ in range(3):
        with pytest.raises(RemoteProtocolError, match="refused"):
            guest.open(guest.offers[0])
    assert offered.channel is None
    assert guest.pages.in_use == used
    assert not world.host.machine.gpadls
    guest.close()


def test_gpadl_reaches_the_guests_pages(world: World) -> None:
    offered = world.host.offer(an_offer())
    guest = world.guest()
    guest.connect()
    channel = guest.open(guest.offers[0])
    pfns = guest.pages.allocate(300)
    gpadl_id = channel.create_gpadl(pfns[::-1])
    host_end = offered.channel
    assert host_end is not None
    gpadl = host_end.gpadl(gpadl_id)
    assert len(gpadl) == 300 * 4096
    assert gpadl.pfns == tuple(pfns[::-1])
    gpadl.write(4090, b"across pages")
    assert world.child.memory.read(pfns[-1] * 4096 + 4090, 6) == b"across"
    assert world.child.memory.read(pfns[-2] * 4096, 6) == b" pages"
    with gpadl.window().view() as view:
        assert bytes(view[4090:4102]) == b"across pages"
    channel.teardown_gpadl(gpadl_id)
    with pytest.raises(RemoteProtocolError, match="no GPADL"):
        host_end.gpadl(gpadl_id)
    outside = (16 << 20) // 4096
    with pytest.raises(RemoteProtocolError, match="refused GPADL"):
        channel.create_gpadl([outside])
    guest.close()


def test_rescind_of_an_open_channel(world: World) -> None:
    closed: list[Channel] = []
    gone: list[Offer] = []
    offered = world.host.offer(an_offer(), echo, closed.append)
    guest = world.guest()
    guest.on_rescind = gone.append
    guest.connect()
    used = guest.pages.in_use
    offer = guest.offers[0]
    channel = guest.open(offer)
    channel.create_gpadl(guest.pages.allocate(4))
    offered.rescind()
    assert len(closed) == 1
    assert world.hosting.wait_for(lambda: bool(gone) and not offered.is_present)
    assert not channel.is_open
    assert gone == [offer]
    assert guest.offers == []
    assert not world.host.machine.gpadls
    with pytest.raises(LocalProtocolError):
        channel.send(b"too late")
    with pytest.raises(LocalProtocolError):
        guest.open(offer)
    assert guest.pages.in_use == used + 4, "the ring's pages are back"
    guest.close()


def test_offers_come_and_go(world: World) -> None:
    guest = world.guest()
    seen: list[Offer] = []
    guest.on_offer = seen.append
    guest.connect()
    offers = [world.host.offer(an_offer(n)) for n in range(1, 40)]
    assert world.hosting.wait_for(lambda: len(seen) == 39)
    for offered in offers[::2]:
        offered.rescind()
    assert world.hosting.wait_for(lambda: len(world.host.offered) == 19)
    assert len(guest.offers) == 19
    guest.close()


def test_crash_kernel_takes_over(world: World) -> None:
    """A second driver contacts the host without an UNLOAD of the first."""
    offered = world.host.offer(an_offer(), echo)
    first = world.guest(Version.V5_3)
    first.connect()
    old = first.open(first.offers[0])
    first.abandon()
    assert not old.is_open
    second = world.guest(Version.V3_0)
    assert second.connect() == Version.V3_0
    assert offered.channel is None
    assert ask(second.open(second.offers[0]), b"abc.....") == b".....cba"
    second.close()


def test_destroyed_child_closes_its_channels(world: World) -> None:
    closed: list[Channel] = []
    other = world.hv.create_child(world.root, name="c1", memory_size=8 << 20)
    other_host = VmbusHost(world.hv, other)
    other_host.offer(an_offer(2), echo)
    other_guest = VmbusGuest(other.vps[0])
    other_guest.connect()
    channel = other_guest.open(other_guest.offers[0])
    world.host.offer(an_offer(), echo, closed.append)
    guest = world.guest()
    guest.connect()
    guest.open(guest.offers[0])
    guest.abandon()
    world.child.destroy()
    assert len(closed) == 1
    assert world.host.channels == []
    assert world.host.offered == {}
    assert ask(channel, b"undisturbed.....") == b".....debrutsidnu"
    other_guest.close()
    other_host.close()


def test_reset_of_the_partition_closes_all(world: World) -> None:
    closed: list[Channel] = []
    offered = world.host.offer(an_offer(), echo, closed.append)
    guest = world.guest()
    guest.connect()
    guest.open(guest.offers[0])
    world.host.reset()
    assert len(closed) == 1
    assert offered.is_present
    assert world.host.version == 0
    guest.abandon()
    again = world.guest()
    again.connect()
    assert ask(again.open(again.offers[0]), b"again...") == b"...niaga"
    again.close()


@pytest.mark.parametrize("end", ["destroyed", "reset", "killed"])
def test_a_guest_that_is_lost_waits_for_nothing(end: str) -> None:
    world = World("threads")
    world.host.offer(an_offer(), echo)
    guest = world.guest()
    guest.connect()
    channel = guest.open(guest.offers[0])
    answers: list[bool] = []
    waiter = threading.Thread(target=lambda: answers.append(channel.wait(lambda: False, 60)))
    waiter.start()
    time.sleep(0.05)
    assert not guest.lost
    if end == "destroyed":
        world.child.destroy()
    elif end == "reset":
        world.child.reset()
        world.child.notify("reset", 0)
    else:
        guest.killed = True
        world.hosting.progressed()
    waiter.join(10)
    assert answers == [False]
    assert guest.lost
    if end != "killed":
        with pytest.raises((RemoteProtocolError, GuestFault, VpSuspended)):
            guest.connect()
    world.close()


def test_hv_sock(world: World) -> None:
    asked: list[tuple[UUID, UUID, UUID]] = []

    def connect(endpoint: UUID, service: UUID, silo: UUID) -> bool:
        asked.append((endpoint, service, silo))
        if service != UUID(int=50):
            return False
        world.host.offer(Offer(service, endpoint, flags=0x2000), echo)
        return True

    world.host.on_tl_connect = connect
    guest = world.guest()
    seen: list[Offer] = []
    refused: list[object] = []
    guest.on_offer = seen.append
    guest.on_tl_result = refused.append
    guest.connect()
    guest.tl_connect(UUID(int=60), UUID(int=50), UUID(int=70))
    assert world.hosting.wait_for(lambda: bool(seen))
    assert ask(guest.open(seen[0]), b"sock....") == b"....kcos"
    guest.tl_connect(UUID(int=61), UUID(int=51))
    assert world.hosting.wait_for(lambda: bool(refused))
    assert asked[0] == (UUID(int=60), UUID(int=50), UUID(int=70))
    guest.close()


def test_pause_holds_messages_back(world: World) -> None:
    guest = world.guest(Version.V6_0)
    seen: list[Offer] = []
    guest.on_offer = seen.append
    guest.connect()
    guest.pause()
    world.host.offer(an_offer())
    assert not world.hosting.wait_for(lambda: bool(seen), 0.05)
    guest.resume()
    assert world.hosting.wait_for(lambda: bool(seen))
    guest.close()


def test_two_thousand_offers_through_one_slot(world: World) -> None:
    """More messages than the hypervisor queues for a SINT: the rest waits in the host."""
    for number in range(1, 2048):
        world.host.offer(an_offer(number))
    guest = world.guest()
    guest.connect()
    assert len(guest.offers) == 2047
    assert guest.violations == 0
    guest.close()


def test_opening_from_a_callback(world: World) -> None:
    """A driver opens its channel as soon as it hears of the offer, inside the interrupt handler's callbacks."""
    guest = world.guest()
    opened: list[Channel] = []
    guest.on_offer = lambda offer: opened.append(guest.open(offer))
    world.host.offer(an_offer(1), echo)
    world.host.offer(an_offer(2), echo)
    guest.connect()
    assert world.hosting.wait_for(lambda: len(opened) == 2)
    for channel in opened:
        assert ask(channel, b"early...") == b"...ylrae"
    guest.close()


@pytest.mark.parametrize(
    ("personality", "version"),
    [
        (SERVER_2008, Version.V0_13),
        (VISTA, Version.V0_13),
        (SUSE_LINUX, Version.V0_13),
        (WINDOWS_10, Version.V5_2),
        (SERVER_2022, Version.V5_3),
        (LINUX, Version.V5_3),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_personalities_negotiate_what_they_speak(personality: Personality, version: Version) -> None:
    hv = Hypervisor(clock=VirtualClock())
    child = hv.create_child(hv.create_root(), memory_size=8 << 20, personality=personality)
    host = VmbusHost(hv, child)
    host.offer(an_offer(), echo)
    guest = VmbusGuest(child.vps[0])
    assert guest.connect() == version
    assert ask(guest.open(guest.offers[0]), b"personal") == b"lanosrep"
    guest.close()


@pytest.mark.parametrize("personality", [SERVER_2008, SERVER_2022], ids=lambda p: p.name)
def test_interrupts_end_by_themselves_unless_that_is_deprecated(personality: Personality) -> None:
    hv = Hypervisor(clock=VirtualClock())
    child = hv.create_child(hv.create_root(), memory_size=8 << 20, personality=personality)
    host = VmbusHost(hv, child)
    host.offer(an_offer(), echo)
    guest = VmbusGuest(child.vps[0])
    guest.connect()
    channel = guest.open(guest.offers[0])
    vp = child.vps[0]
    assert bool(vp.rdmsr(Msr.SINT0 + 2) >> 17 & 1) == personality.auto_eoi
    interrupts, writes = child.account.interrupts.total(), child.account.exits["wrmsr"]
    for number in range(10):
        assert ask(channel, bytes([number]) * 8) == bytes([number]) * 8
    assert child.account.interrupts.total() == interrupts + 10
    assert child.account.exits["wrmsr"] == writes + (0 if personality.auto_eoi else 10)
    assert vp.apic.isr == 0
    guest.close()


@pytest.mark.parametrize("personality", [DOS, WINDOWS_2000, OLD_BSD], ids=lambda p: p.name)
def test_personalities_without_drivers_have_no_bus(personality: Personality) -> None:
    hv = Hypervisor()
    child = hv.create_child(hv.create_root(), memory_size=8 << 20, personality=personality)
    with pytest.raises(LocalProtocolError, match="emulated hardware"):
        VmbusGuest(child.vps[0])


def test_a_corrupt_ring_of_the_host_closes_the_guests_channel(world: World) -> None:
    offered = world.host.offer(an_offer(), echo)
    guest = world.guest()
    guest.connect()
    channel = guest.open(guest.offers[0])
    channel.serve(lambda packets: None)
    host_end = offered.channel
    assert host_end is not None
    with host_end.outgoing.window.view() as control:
        control[0:4] = (0xDEAD_BEE8).to_bytes(4, "little")
    host_end.signal()
    assert world.hosting.wait_for(lambda: not channel.is_open)
    assert world.hosting.wait_for(lambda: offered.channel is None)
    guest.close()


@pytest.mark.parametrize("register", [Msr.SIMP, Msr.SCONTROL])
def test_messages_wait_while_the_guest_has_its_message_page_disabled(register: int) -> None:
    world = World()
    guest = world.guest()
    guest.connect()
    vp = world.child.vps[0]
    enabled = vp.rdmsr(register)
    vp.wrmsr(register, enabled & ~1)
    for number in range(1, 4):
        world.host.offer(an_offer(number))
    assert guest.offers == []
    vp.wrmsr(register, enabled)
    assert [offer.instance_id.int for offer in guest.offers] == [1, 2, 3]
    world.close()


@pytest.mark.parametrize("register", [Msr.SIEFP, Msr.SCONTROL])
def test_an_interrupt_waits_while_the_guest_has_its_event_flags_page_disabled(register: int) -> None:
    world = World()
    ends: list[Channel] = []
    world.host.offer(an_offer(), ends.append)
    guest = world.guest()
    guest.connect()
    channel = guest.open(guest.offers[0], 2, 2)
    got: list[bytes] = []
    channel.serve(lambda packets: got.extend(p.payload for p in packets))
    vp = world.child.vps[0]
    enabled = vp.rdmsr(register)
    vp.wrmsr(register, enabled & ~1)
    ends[0].send(b"for later")
    assert got == []
    vp.wrmsr(register, enabled)
    assert world.hosting.wait_for(lambda: bool(got))
    assert got == [b"for later".ljust(16, b"\0")]
    world.close()


def test_interrupts_that_wait_for_one_processor_do_not_wait_for_another() -> None:
    world = World(vps=2)
    ends: list[Channel] = []
    for number in range(1, 9):
        world.host.offer(an_offer(number), ends.append)
    guest = world.guest()
    guest.connect()
    got: list[int] = []
    for number, offer in enumerate(guest.offers):
        channel = guest.open(offer, 2, 2, target_vp=number % 2)
        channel.serve(lambda packets, number=number: got.append(number))
    enabled = [vp.rdmsr(Msr.SIEFP) for vp in world.child.vps]
    for vp, page in zip(world.child.vps, enabled, strict=True):
        vp.wrmsr(Msr.SIEFP, page & ~1)
    for end in ends:
        end.send(b"for later")
    world.child.vps[1].wrmsr(Msr.SIEFP, enabled[1])
    assert world.hosting.wait_for(lambda: sorted(got) == [1, 3, 5, 7])
    world.child.vps[0].wrmsr(Msr.SIEFP, enabled[0])
    assert world.hosting.wait_for(lambda: sorted(got) == [0, 1, 2, 3, 4, 5, 6, 7])
    world.close()


def test_a_guest_that_is_gone_leaves_its_messages_to_nobody() -> None:
    """A kernel that started anew, without UNLOAD, is not told what was for the one before it."""
    world = World()
    guest = world.guest(Version.V5_2)
    guest.connect()
    vp = world.child.vps[0]
    page = vp.rdmsr(Msr.SIMP)
    vp.wrmsr(Msr.SIMP, page & ~1)
    world.host.offer(an_offer())
    world.host.reset()
    vp.wrmsr(Msr.SIMP, page)
    assert guest.offers == []
    world.close()


def test_a_trace_tells_an_unload_from_other_ends() -> None:
    trace = EventTrace()
    world = World(trace=trace)

    def ends() -> list[str]:
        found = [event.kind for event in trace if event.kind in ("unload", "disconnect")]
        trace.clear()
        return found

    world.guest().connect()
    assert ends() == []
    world.guest().connect()  # a crash kernel: it contacts anew
    assert ends() == ["disconnect"]
    guest = world.guest()
    guest.connect()
    ends()
    guest.disconnect()
    assert ends() == ["unload"]
    world.guest().connect()
    world.host.reset()
    assert ends() == ["disconnect"]
    world.guest().connect()
    world.host.close()
    assert ends() == ["disconnect"]
    world.close()


@pytest.mark.parametrize("named", [None, "threads"])
def test_a_bus_after_the_hosting_was_closed(named: str | None) -> None:
    """What is closed runs nothing any more: a bus that is made later has another one."""
    with Hypervisor() as hv:
        root = hv.create_root()
        first, second = (hv.create_child(root, name, memory_size=8 << 20) for name in ("a", "b"))
        hosting = Threads(workers=1)
        VmbusHost(hv, first, hosting=hosting)
        hosting.close()
        host = VmbusHost(hv, second, hosting=named)
        host.offer(an_offer(), echo)
        guest = VmbusGuest(second.vps[0])
        guest.connect()
        assert ask(guest.open(guest.offers[0]), b"question") == b"noitseuq"


def test_an_interrupt_that_waits_moves_with_its_channel() -> None:
    """The processor that could not be interrupted may never be again."""
    hv = Hypervisor(clock=VirtualClock())
    child = hv.create_child(hv.create_root(), "c", memory_size=8 << 20, vps=2)
    host = VmbusHost(hv, child)
    offered = host.offer(an_offer())
    guest = VmbusGuest(child.vps[0])
    guest.connect()
    channel = guest.open(guest.offers[0], 2, 2, target_vp=1)
    got: list[bytes] = []
    channel.serve(lambda packets: got.extend(p.payload for p in packets))
    page = child.vps[1].rdmsr(Msr.SIEFP)
    child.vps[1].wrmsr(Msr.SIEFP, 0)
    assert offered.channel is not None
    offered.channel.send(b"waiting.")
    assert got == []
    guest.retarget(channel, 0)
    assert got == [b"waiting."]
    assert page & 1
    hv.close()
