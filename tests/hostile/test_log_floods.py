"""A guest cannot fill its host's log, however often it does something wrong."""

import itertools
import logging
import struct
from uuid import UUID

import pytest

from vmbus.bus import Offer, VmbusGuest, VmbusHost, wire
from vmbus.bus.codec import encode
from vmbus.core.memory import GpaRanges
from vmbus.errors import HypercallError
from vmbus.hypervisor import Hypervisor, VirtualClock
from vmbus.hypervisor.tlfs import Msr
from vmbus.storage.disk import MemoryDisk
from vmbus.storage.vsp import StorageVsp

NUMBERS = itertools.count()  # each guest has a name of its own: what one said silences no other
ROUNDS = 300
FEW = 25


class World:
    def __init__(self) -> None:
        self.hv = Hypervisor(clock=VirtualClock())
        self.child = self.hv.create_child(self.hv.create_root(), f"loud {next(NUMBERS)}", memory_size=8 << 20)
        self.host = VmbusHost(self.hv, self.child)
        self.vsp = StorageVsp({(0, 0): MemoryDisk(1 << 20)})
        self.vsp.offer_on(self.host)
        self.guest = VmbusGuest(self.child.vps[0])
        self.guest.connect()


@pytest.fixture
def world():
    world = World()
    yield world
    world.hv.close()


def open_over_a_broken_ring(world: World) -> None:
    guest, offer = world.guest, world.guest.offers[0]
    pages = guest.pages.allocate(4)
    world.child.memory.write(pages[0] * 4096, b"\xff" * 4096)
    ring = guest._make_gpadl(offer.channel_id, GpaRanges([(4 * 4096, 0, pages)]))
    for _ in range(ROUNDS):
        with guest._lock:
            guest._answers.pop(("open", offer.channel_id), None)
            guest._post(guest.machine.open(offer.channel_id, ring, 2))
        assert guest._answer("open", offer.channel_id) != 0


def post(world: World, payload: bytes) -> None:
    try:
        world.host._on_message(wire.MESSAGE_CONNECTION_ID_V5, wire.VMBUS_MESSAGE_TYPE, payload)
    except Exception as error:
        world.child.provider_failed(error)


def send_nonsense(world: World) -> None:
    for number in range(ROUNDS):
        post(world, struct.pack("<II", number % 40, 0) + bytes(number % 8))


def break_the_storage_protocol(world: World) -> None:
    for _ in range(ROUNDS // 10):
        channel = world.guest.open(world.guest.offers[0], 2, 2)
        for _ in range(10):
            channel.send(b"no such request\0", 7)
        channel.close()


def crash_with_a_message_that_is_not_there(world: World) -> None:
    vp = world.child.vps[0]
    vp.wrmsr(Msr.CRASH_P0 + 3, 1 << 60)
    vp.wrmsr(Msr.CRASH_P0 + 4, 100)
    for _ in range(ROUNDS):
        vp.wrmsr(Msr.CRASH_CTL, 3 << 62)


def close_over_and_over(world: World) -> None:
    for _ in range(ROUNDS):
        post(world, encode(wire.CloseChannel(1)))


@pytest.mark.parametrize(
    "attack",
    [
        open_over_a_broken_ring,
        send_nonsense,
        break_the_storage_protocol,
        crash_with_a_message_that_is_not_there,
        close_over_and_over,
    ],
)
def test_a_flood(world: World, attack, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    attack(world)
    assert 0 < len(caplog.records) <= FEW, [record.getMessage() for record in caplog.records]
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_the_neighbour_is_heard(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    send_nonsense(world)
    other = world.hv.create_child(world.hv.root, f"quiet {next(NUMBERS)}", memory_size=8 << 20)
    host = VmbusHost(world.hv, other)
    host.offer(Offer(UUID(int=1), UUID(int=2)))
    caplog.clear()
    other.provider_failed(HypercallError(5))
    (record,) = caplog.records
    assert "quiet" in record.getMessage()
