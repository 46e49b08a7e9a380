"""Frames that a guest has no room for stay where their sender sees that it has to wait."""

import socket
from collections.abc import Iterator

import pytest
from reference.netpair import frame, mac

from vmbus.bus import VmbusGuest, VmbusHost
from vmbus.emulated.ports import attach_pci
from vmbus.hypervisor import Hypervisor, VirtualClock
from vmbus.hypervisor.personality import WINDOWS_2000
from vmbus.machine.network import GuestNetwork
from vmbus.machine.nic import TulipAdapter
from vmbus.machine.tulip_guest import TulipNic
from vmbus.network.oid import Oid, PacketFilter
from vmbus.network.switch import Mirror, Switch, SwitchKind
from vmbus.network.uplink import LoopbackUplink, StreamUplink, attach
from vmbus.network.vsc import NetworkVsc, default_page_count

ADDRESS = bytes.fromhex("00155d000001")
TOTAL = 6000


def test_a_synthetic_adapter_that_nobody_reads_takes_what_it_has_room_for() -> None:
    clock = VirtualClock()
    hypervisor = Hypervisor(clock=clock)
    root = hypervisor.create_root()
    child = hypervisor.create_child(root, "c", memory_size=32 << 20, vps=2)
    host = VmbusHost(hypervisor, child)
    outside, ours = LoopbackUplink.pair()
    ours._capacity = outside._capacity = TOTAL
    with GuestNetwork(host) as network:
        adapter = network.add(ours).adapter
        guest = VmbusGuest(child.vps[0])
        guest.connect()
        nic = NetworkVsc(guest.open(guest.offers[0], 16, 16), guest.pages.allocate(default_page_count()))
        channel = nic._channels[0]
        handler, channel.on_signal = channel.on_signal, None
        sent = [frame(ADDRESS, mac(9), n.to_bytes(4, "big") * 15) for n in range(TOTAL)]
        outside.send(sent)
        for _ in range(100):
            network.poll()
        assert 0 < len(ours._queue) < TOTAL, "some wait at the guest's adapter, the rest outside"
        assert adapter.room == 0
        channel.on_signal = handler
        got: list[bytes] = []
        for _ in range(200):
            got += nic.receive(512)
            clock.advance(200_000)  # the guest rings by the monitor page
            network.poll()
        assert got == sent
        assert adapter.statistics.received_no_buffer == 0
        assert adapter.account.dropped == {}
        # A guest that has said that it takes nothing keeps nobody waiting.
        nic.set_filter(PacketFilter(0))
        outside.send(sent[:100])
        network.poll()
        assert len(ours._queue) == 0
        assert int.from_bytes(nic.query(Oid.GEN_RCV_NO_BUFFER), "little") == 0
    host.close()
    root.destroy()


def test_an_idle_guest_is_not_woken_by_what_it_has_no_room_for() -> None:
    hypervisor = Hypervisor(clock=VirtualClock())
    root = hypervisor.create_root()
    child = hypervisor.create_child(root, "c", memory_size=32 << 20, vps=1)
    host = VmbusHost(hypervisor, child)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with GuestNetwork(host) as network, theirs:
        interface = network.add(StreamUplink(ours))
        interface.device.port.room = lambda: 0
        theirs.sendall(b"\0\0\0\x3c" + bytes(60))
        assert network.idle(30_000_000) is False, "its timer is what it waits for"
        interface.device.port.room = lambda: 5
        assert network.idle(1_900_000_000) is True
    host.close()
    root.destroy()


@pytest.fixture
def emulated() -> Iterator[tuple[TulipAdapter, TulipNic, Switch]]:
    hypervisor = Hypervisor(clock=VirtualClock())
    root = hypervisor.create_root()
    child = hypervisor.create_child(root, "c0", memory_size=16 << 20, personality=WINDOWS_2000)
    switch = Switch(SwitchKind.EXTERNAL)
    adapter = TulipAdapter(child, attach_pci(child), switch.connect("guest"), ADDRESS, backlog=100)
    yield adapter, TulipNic(child.vps[0]), switch
    root.destroy()


def test_the_emulated_adapter_takes_what_it_has_room_for(
    emulated: tuple[TulipAdapter, TulipNic, Switch],
) -> None:
    adapter, nic, switch = emulated
    outside, ours = LoopbackUplink.pair()
    uplink = attach(switch, ours)
    sent = [frame(ADDRESS, mac(9), n.to_bytes(4, "big") * 15) for n in range(1000)]
    outside.send(sent)
    for _ in range(50):
        uplink.poll()
    assert len(ours._queue) > 500
    got: list[bytes] = []
    while batch := nic.receive(64):
        got += batch
        uplink.poll()
    assert [data[14:18] for data in got] == [data[14:18] for data in sent]
    assert adapter.dropped == 0


def test_what_is_lost_all_the_same_is_in_the_ledger(
    emulated: tuple[TulipAdapter, TulipNic, Switch],
) -> None:
    adapter, nic, switch = emulated
    peer = switch.connect("peer")  # on a switch nobody waits for anybody
    peer.send([frame(ADDRESS, mac(9))] * 1000)
    assert adapter.account.dropped["guest has no buffer"] == adapter.dropped > 500
    adapter.set_link(False)
    peer.send([frame(ADDRESS, mac(9))] * 5)
    assert adapter.account.dropped["link is down"] == 100
    assert adapter.account.dropped["guest receives nothing"] == 5
    adapter.set_link(True)
    assert nic.send(frame(b"\x01\x80\xc2\0\0\x01", ADDRESS))
    assert adapter.account.dropped["for the bridge itself"] == 1


def test_a_driver_that_starts_again_gets_nothing_of_what_came_before(
    emulated: tuple[TulipAdapter, TulipNic, Switch],
) -> None:
    adapter, nic, switch = emulated
    switch.connect("peer").send([frame(ADDRESS, mac(9), b"old" * 20)] * 100)
    assert adapter.account.dropped == {}
    again = TulipNic(nic._vp)  # which resets the chip first
    waited = sum(adapter.account.dropped.values())
    assert adapter.account.dropped == {"guest receives nothing": waited}
    assert waited > 0
    switch.ports[1].send([frame(ADDRESS, mac(9), b"new" * 20)])
    assert [data[14:17] for data in again.receive()] == [b"new"]


def test_a_port_that_takes_nothing_keeps_nothing_from_the_others() -> None:
    switch = Switch(SwitchKind.EXTERNAL)
    outside, ours = LoopbackUplink.pair()
    uplink = attach(switch, ours)
    full, other, seen = switch.connect("full"), switch.connect("other"), switch.connect("capture")
    switch.set_mirror(seen, Mirror.DESTINATION)
    outside.send([frame(b"\xff" * 6, mac(9))] * 20)
    full.room = lambda: 0
    other.room = lambda: 0
    assert uplink.poll() == 0
    other.room = lambda: 3
    assert uplink.poll(8) == 8, "as often as there is room again"
    other.room = None
    assert uplink.poll() == 12


def test_what_an_uplink_does_not_take_is_in_the_guests_account() -> None:
    hypervisor = Hypervisor(clock=VirtualClock())
    root = hypervisor.create_root()
    child = hypervisor.create_child(root, "c", memory_size=16 << 20, vps=1)
    host = VmbusHost(hypervisor, child)
    outside, ours = LoopbackUplink.pair()
    with GuestNetwork(host) as network:
        interface = network.add(ours)
        for _ in range(5):
            interface.adapter.port.send([frame(b"\xff" * 6, ADDRESS)] * 1000)
        assert ours.dropped == 5000 - outside._capacity
        account = hypervisor.ledger.account("root", "c/net1")
        assert account.dropped == {"uplink takes no more": ours.dropped}
    host.close()
    root.destroy()
