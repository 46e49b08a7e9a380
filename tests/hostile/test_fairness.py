"""A guest that fills its ring as fast as it is read does not keep others waiting that the same thread serves."""

from collections.abc import Callable, Iterator
from uuid import UUID

import pytest
from reference.netpair import frame, mac
from reference.storage_attacker import read10, srb

from vmbus.bus import Inline, Offer, VmbusGuest, VmbusHost
from vmbus.bus.channel import TURN, Channel
from vmbus.core.memory import GpaRanges
from vmbus.core.ring import COMPLETION_REQUESTED, IN_BAND
from vmbus.hypervisor import Hypervisor, VirtualClock
from vmbus.network import rndis, wire
from vmbus.network.adapter import NetworkAdapter
from vmbus.network.rndis import Frame
from vmbus.network.switch import BROADCAST, Switch
from vmbus.network.vsc import NetworkVsc, default_page_count
from vmbus.network.vsp_oid import AdapterConfig
from vmbus.network.wire import MessageType, pack_message
from vmbus.storage.disk import MemoryDisk
from vmbus.storage.vsc import StorageVsc
from vmbus.storage.vsp import StorageVsp

MIB = 1 << 20
MOST = 30_000
"""Packets of the greedy guest. Without turns the other one is served after all of them."""
A_TURN = TURN * 64


class World:
    """One thread, a greedy child, and a patient one: it rings once while the other is served for the first time."""

    def __init__(self) -> None:
        self.hv = Hypervisor(clock=VirtualClock())
        self.root = self.hv.create_root()
        self.hosting = Inline(seed=1)
        self.served = 0
        self.waited = -1
        self.refill: Callable[[], None] | None = None
        host, guest = self.child("patient")
        host.offer(Offer(UUID(int=7), UUID(int=8)), self._patient_provider)
        self.patient = guest.open(guest.offers[0], 4, 4)

    def child(self, name: str) -> tuple[VmbusHost, VmbusGuest]:
        partition = self.hv.create_child(self.root, name=name, memory_size=16 * MIB)
        host = VmbusHost(self.hv, partition, hosting=self.hosting)
        guest = VmbusGuest(partition.vps[0])
        guest.connect()
        return host, guest

    def _patient_provider(self, channel: Channel) -> None:
        def note(_: object) -> None:
            self.waited = self.served

        channel.serve(note)

    def take(self) -> None:
        """A provider was given one packet of the greedy guest, which at once sends another."""
        if self.refill is None:
            return
        self.served += 1
        if self.served == 1:
            self.patient.send(bytes(8))
        if self.served < MOST:
            self.refill()

    def close(self) -> None:
        self.root.destroy()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


def judge(world: World) -> None:
    assert world.served == MOST, "everybody is served in the end"
    assert 0 <= world.waited <= A_TURN


def test_a_storage_guest_does_not_starve_others(world: World) -> None:
    class Noticing(MemoryDisk):
        def read(self, offset: int, length: int) -> bytes:
            world.take()
            return bytes(length)

    disk = Noticing(MIB)
    descriptor, disk.fd, disk.mapping = disk.fd, -1, None  # every read comes by
    host, guest = world.child("greedy")
    StorageVsp({(0, 0): disk}).offer_on(host)
    channel = guest.open(guest.offers[0], 16, 16)
    StorageVsc(channel, guest.pages.allocate(16)).connect()
    channel.on_signal = None
    (page,) = guest.pages.allocate(1)

    def another() -> None:
        channel.incoming.recv_packets(64)
        channel.outgoing.send_gpa_direct(srb(read10(0, 1), 512), GpaRanges([(512, 0, [page])]), world.served)

    world.refill = another
    another()
    channel.signal()
    judge(world)
    disk.fd = descriptor
    disk.close()


@pytest.mark.parametrize("compiled", [True, False])
def test_a_network_guest_does_not_starve_others(world: World, compiled: bool) -> None:
    switch = Switch()
    host, guest = world.child("greedy")
    switch.connect("sink", receiver=lambda frames: world.take())
    adapter = NetworkAdapter(host, switch.connect("greedy"), AdapterConfig(mac(1)))
    channel = guest.open(guest.offers[0], 16, 16)
    nic = NetworkVsc(channel, guest.pages.allocate(default_page_count()))
    assert adapter.vsp is not None
    adapter.vsp.use_compiled_path = compiled
    message = rndis.pack_packet(Frame(frame(BROADCAST, mac(1))))
    nic._send.view[: len(message)] = message
    payload = pack_message(MessageType.SEND_RNDIS_PACKET, wire.SendRndisPacket(0, 0, len(message)))
    channel.on_signal = None

    def another() -> None:
        channel.incoming.recv_packets(64)
        channel.outgoing.send(payload, world.served + 1, IN_BAND, COMPLETION_REQUESTED)

    world.refill = another
    another()
    channel.signal()
    judge(world)
    world.refill = None


def test_a_guest_of_any_provider_does_not_starve_others(world: World) -> None:
    host, guest = world.child("greedy")
    host.offer(
        Offer(UUID(int=1), UUID(int=2)),
        lambda channel: channel.serve(lambda packets: [world.take() for _ in packets]),  # type: ignore[arg-type]
    )
    channel = guest.open(guest.offers[0], 4, 4)

    def another() -> None:
        channel.outgoing.send(bytes(8))

    world.refill = another
    another()
    channel.signal()
    judge(world)
