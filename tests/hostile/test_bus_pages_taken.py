"""Pages that rings, windows, monitor and interrupt pages stand on are taken from a guest while its bus uses them."""

import struct
import sys
import threading
from uuid import UUID

import pytest
from reference.raw_guest import RawGuest

from vmbus.bus import Offer, Threads, Version, VmbusGuest, VmbusHost, wire
from vmbus.bus import actions as act
from vmbus.bus.codec import encode
from vmbus.core.memory import GpaRanges
from vmbus.errors import VmbusError
from vmbus.hypervisor import Hypervisor, VirtualClock
from vmbus.hypervisor.tlfs import CallCode, MapFlags, PartitionState, Status
from vmbus.hypervisor.wire import MapGpaPages

KIND = UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f")
RWX = MapFlags.READABLE | MapFlags.WRITABLE | MapFlags.KERNEL_EXECUTABLE
PAGES = 512
ROOT_AREA = 0x100  # the root's pages from here on are the child's memory


def q(*values):
    return struct.pack(f"<{len(values)}Q", *values)


class World:
    """A child with a bus, all of whose memory is lent by the root."""

    def __init__(self):
        self.hv = Hypervisor(clock=VirtualClock())
        self.root = RawGuest(self.hv.create_root(memory_size=4 << 20).vps[0])
        self.child = self.hv.create_child(self.root.vp.partition, "c", memory_size=PAGES << 12)
        for first in range(0, PAGES, 256):
            elements = [q(ROOT_AREA + n) for n in range(first, first + 256)]
            header = MapGpaPages(self.child.id, first, RWX, 0).pack()
            assert self.root.rep(CallCode.MAP_GPA_PAGES, header, elements)[:2] == (Status.SUCCESS, 256)
        self.host = VmbusHost(self.hv, self.child)
        self.opened, self.closed = [], []
        self.offered = [
            self.host.offer(
                Offer(KIND, UUID(int=n + 1)), self.opened.append, self.closed.append, name=f"d{n}"
            )
            for n in range(2)
        ]
        self.guest = VmbusGuest(self.child.vps[0])
        self.guest.connect()

    def take(self, pfn, how):
        if how == "unmapped":
            header = MapGpaPages(self.child.id, pfn, 0, 0).pack()
            status = self.root.rep(CallCode.UNMAP_GPA_PAGES, header, [], count=1)[0]
        else:
            flags = MapFlags.READABLE if how == "read-only" else RWX
            source = ROOT_AREA + pfn if how == "read-only" else 1
            header = MapGpaPages(self.child.id, pfn, flags, 0).pack()
            status = self.root.rep(CallCode.MAP_GPA_PAGES, header, [q(source)])[0]
        assert status == Status.SUCCESS


@pytest.fixture
def world():
    world = World()
    yield world
    world.hv.root.destroy()


def ring_pfns(world, channel):
    (gpadl,) = [
        g for g in world.host._gpadls.values() if g.gpadl_id == channel_request(world, channel).gpadl_id
    ]
    return gpadl.pfns


def channel_request(world, channel):
    return next(o for o in world.offered if o.channel is channel).request


@pytest.mark.parametrize("how", ["unmapped", "read-only", "replaced"])
@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_page_of_a_ring(world, how, which):
    """The host's window would go on reading and writing what is not the guest's any more."""
    _, second = (world.guest.open(offer, 2, 2) for offer in world.guest.offers)
    mine, other = world.opened
    pfn = ring_pfns(world, mine)[which]
    world.take(pfn, how)
    assert world.closed == [mine]
    assert not mine.is_open
    assert world.host.channels == [other]
    got = []
    other.serve(lambda packets: got.extend(p.payload for p in packets))
    second.send(b"sixteen bytes...")
    assert got == [b"sixteen bytes..."], "the other channel goes on"
    with pytest.raises(VmbusError):
        mine.send(b"12345678")


@pytest.mark.parametrize("how", ["unmapped", "read-only", "replaced"])
def test_a_page_of_a_mapped_gpadl(world, how):
    channel = world.guest.open(world.guest.offers[0], 2, 2)
    pages = world.guest.pages.allocate(3)
    gpadl_id = channel.create_gpadl(pages)
    gpadl = world.opened[0].gpadl(gpadl_id)
    window = gpadl.window()
    world.take(pages[1], how)
    assert world.closed == [world.opened[0]]
    assert not gpadl.is_mapped
    assert window.address == 0


def test_a_page_of_a_gpadl_without_a_window_is_found_out_when_it_is_used(world):
    channel = world.guest.open(world.guest.offers[0], 2, 2)
    pages = world.guest.pages.allocate(2)
    gpadl = world.opened[0].gpadl(channel.create_gpadl(pages))
    world.take(pages[0], "read-only")
    assert world.closed == []
    with pytest.raises(VmbusError):
        gpadl.write(0, b"x")
    gpadl.write(4096, b"x")


def test_a_page_that_no_channel_uses(world):
    channel = world.guest.open(world.guest.offers[0], 2, 2)
    pages = world.guest.pages.allocate(1)
    world.take(pages[0], "unmapped")
    assert world.closed == []
    channel.send(b"12345678")
    assert channel.is_open
    assert world.opened[0].incoming.recv_packets(8)[0].payload == b"12345678"


def calls_of(action):
    """How many calls of functions, Python's and C's, an action takes."""
    calls = [0]

    def count(frame, event, argument):
        calls[0] += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return calls[0]


def test_taking_a_page_costs_the_same_however_many_gpadls_there_are(world):
    """The guest has the choice of its GPADLs, its parent has to take pages with the bus's lock held."""
    channel = world.guest.open(world.guest.offers[0], 2, 2)
    free = world.guest.pages.allocate(3)
    costs = [calls_of(lambda: world.take(free[0], "replaced"))]
    for pages in (free[1:2] * 50, free[1:2] * 400):
        for _ in range(40):
            gpadl_id = channel.create_gpadl(pages)
        world.opened[0].gpadl(gpadl_id).window()
        costs.append(calls_of(lambda: world.take(free[2], "replaced")))
    assert max(costs) - min(costs) < 30, costs
    assert world.closed == []
    world.take(free[1], "unmapped")
    assert world.closed == world.opened, "what stands on the page is found"


def test_windows_that_come_and_go_are_found_while_they_exist(world):
    channel = world.guest.open(world.guest.offers[0], 2, 2)
    pages = world.guest.pages.allocate(2)
    gpadl = world.opened[0].gpadl(channel.create_gpadl(pages))
    gpadl.window().close()
    assert not gpadl.is_mapped
    world.take(pages[1], "read-only")
    assert world.closed == [], "nobody has it mapped any more"
    world.take(pages[1], "replaced")
    window = gpadl.window()
    assert window.address
    world.take(pages[0], "unmapped")
    assert world.closed == world.opened
    assert window.address == 0
    with pytest.raises(VmbusError, match="torn down"):
        gpadl.window()


def test_a_page_of_a_reserved_channels_ring(world):
    """It outlives the connection that it was opened in; its ring is looked up all the same."""
    guest = VmbusGuest(world.child.vps[0], versions=[Version.V5_3])
    guest.connect()
    offer = guest.offers[0]
    pfns = guest.pages.allocate(6)
    for pfn in pfns:
        world.child.memory.write(pfn << 12, bytes(4096))
    gpadl_id = guest._make_gpadl(offer.channel_id, GpaRanges([(6 * 4096, 0, pfns)]))
    message = wire.OpenReservedChannel(offer.channel_id, 0, 2, gpadl_id, 3)
    guest._post([act.Post(wire.MESSAGE_CONNECTION_ID_V5, encode(message))])
    assert len(world.opened) == 1
    world.take(pfns[4], "unmapped")
    assert world.closed == world.opened


def test_the_ring_of_a_channel_that_was_closed(world):
    channel = world.guest.open(world.guest.offers[0], 2, 2)
    pfns = ring_pfns(world, world.opened[0])
    channel.close()
    assert len(world.closed) == 1
    for pfn in pfns:
        world.take(pfn, "unmapped")
    assert [o.is_present for o in world.offered] == [True, True]


def test_a_provider_destroys_its_child_while_its_parent_does():
    """Each holds what the other waits for, unless tearing down holds no lock."""
    hv = Hypervisor()
    root = hv.create_root()
    child = hv.create_child(root, "c", memory_size=4 << 20)
    hosting = Threads(workers=2)
    host = VmbusHost(hv, child, hosting=hosting)
    inside, outside = threading.Event(), threading.Event()

    def on_open(channel):
        inside.set()
        outside.wait(30)
        child.destroy()  # under the bus's lock

    host.offer(Offer(KIND, UUID(int=1)), on_open)
    guest = VmbusGuest(child.vps[0], hosting=hosting)
    guest.connect()

    def open_it():
        with pytest.raises(VmbusError):
            guest.open(guest.offers[0], 2, 2)

    opener = threading.Thread(target=open_it)
    opener.start()
    assert inside.wait(30)
    original = child.finalize

    def finalize():
        outside.set()
        original()

    child.finalize = finalize
    destroyer = threading.Thread(target=child.destroy)
    destroyer.start()
    destroyer.join(30)
    opener.join(30)
    stuck = destroyer.is_alive() or opener.is_alive()
    assert not stuck
    assert child.state is PartitionState.DELETED
    hosting.close()
    root.destroy()
