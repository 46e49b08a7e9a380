"""What belongs to an adapter and what to a connection: a guest that closes its channel and opens it again."""

import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

import pytest
from reference.netpair import frame, mac

from vmbus.bus import Hosting, Inline, Offer, Offered, Threads, VmbusGuest, VmbusHost
from vmbus.hypervisor import Hypervisor, Partition, VirtualClock
from vmbus.network.adapter import NetworkAdapter
from vmbus.network.oid import Offloads, Oid, PacketFilter
from vmbus.network.switch import BROADCAST, Port, Switch
from vmbus.network.vsc import NetworkVsc, default_page_count
from vmbus.network.vsc_protocol import GuestConfig
from vmbus.network.vsp_oid import AdapterConfig
from vmbus.network.wire import Capabilities, Version

NEW = bytes.fromhex("021122334455")
GROUP = b"\x33\x33\0\0\0\1"


def network_address(mac: bytes) -> bytes:
    """The configuration parameter that Linux sets for ``ip link set eth0 address``."""
    name, value = "NetworkAddress".encode("utf-16-le"), mac.hex().encode("utf-16-le")
    return struct.pack("<5I", 20, len(name), 2, 20 + len(name), len(value)) + name + value


@dataclass
class Reopening:
    """A guest with one adapter, and somebody else on its switch."""

    guest: VmbusGuest
    adapter: NetworkAdapter
    hosting: Hosting
    peer: Port
    partition: Partition
    nic: NetworkVsc | None = None
    pages: list[int] | None = None

    def open(self, config: GuestConfig | None = None) -> NetworkVsc:
        if self.nic is not None and self.pages is not None:
            self.nic.close()
            self.guest.pages.free(self.pages)
        (offer,) = [offer for offer in self.guest.offers if not offer.is_subchannel]
        channel = self.guest.open(offer, 16, 16)
        self.pages = self.guest.pages.allocate(default_page_count(9000))
        self.nic = NetworkVsc(channel, self.pages, config or GuestConfig())
        return self.nic

    def gets(self, *destinations: bytes) -> list[bytes]:
        """To which of these addresses frames reach the guest; the last must be one that does."""
        assert self.nic is not None
        self.peer.send([frame(to, mac(9)) for to in destinations])
        got: list[bytes] = []

        def last_came() -> bool:
            assert self.nic is not None
            got.extend(data[:6] for data in self.nic.receive(64))
            return destinations[-1] in got

        assert self.nic._channels[0].wait(last_came)
        return got

    def subchannels(self) -> list[Offer]:
        return sorted((o for o in self.guest.offers if o.is_subchannel), key=lambda o: o.subchannel_index)


@pytest.fixture(params=["inline", "threads"])
def world(request: pytest.FixtureRequest) -> Iterator[Reopening]:
    inline = request.param == "inline"
    hypervisor = Hypervisor(clock=VirtualClock() if inline else None)
    root = hypervisor.create_root()
    partition = hypervisor.create_child(root, name="c", memory_size=32 << 20, vps=2)
    hosting: Hosting = Inline(seed=11) if inline else Threads(workers=2)
    host, switch = VmbusHost(hypervisor, partition, hosting=hosting), Switch()
    config = AdapterConfig(mac(1), max_queues=3, allow_mac_change=True)
    adapter = NetworkAdapter(host, switch.connect("c"), config, instance_id=UUID(int=1))
    guest = VmbusGuest(partition.vps[0])
    guest.connect()
    yield Reopening(guest, adapter, hosting, switch.connect("peer"), partition)
    hosting.close()
    partition.destroy()
    root.destroy()


def test_an_address_that_the_guest_set_is_the_adapters(world: Reopening) -> None:
    nic = world.open()
    assert world.gets(NEW, mac(1)) == [mac(1)]
    nic.set(Oid.GEN_RNDIS_CONFIG_PARAMETER, network_address(NEW))
    assert world.gets(mac(1), NEW) == [NEW]
    for _ in range(2):  # another MTU: Linux reopens the channel and goes on with the address that it set
        nic = world.open(GuestConfig(mtu=9000))
        assert nic.query(Oid.ETHERNET_CURRENT_ADDRESS) == NEW
        assert nic.query(Oid.ETHERNET_PERMANENT_ADDRESS) == mac(1)
        # A driver that was loaded anew goes on with the permanent one: it gets its frames too.
        assert world.gets(mac(2), mac(1), NEW) == [mac(1), NEW]
    nic.set(Oid.GEN_RNDIS_CONFIG_PARAMETER, network_address(mac(1)))
    assert world.gets(NEW, mac(1)) == [mac(1)]
    world.open()
    assert world.gets(NEW, mac(1)) == [mac(1)]


def test_link_speed_and_virtual_function_are_the_adapters(world: Reopening) -> None:
    config = GuestConfig(capabilities=Capabilities.SRIOV)
    for opened in (True, False):
        nic = world.open(config) if opened else None
        if not opened and world.nic is not None:
            world.nic.close()
            world.nic = None
        number = 5 + opened
        world.adapter.set_link_speed(number * 1_000_000_000)
        world.adapter.associate_vf(number)
        world.adapter.set_link(False)
        nic = world.open(config)
        assert nic.protocol.link_speed == number * 1_000_000_000
        assert nic._channels[0].wait(lambda nic=nic, number=number: nic.protocol.vf_serial == number)  # type: ignore[misc]
        assert not nic.link_up
        world.adapter.set_link(True)
    assert world.adapter.statistics.violations == 0


def test_the_data_path_is_the_connections(world: Reopening) -> None:
    """The parent hears when the guest leaves its virtual function, also when it does so by closing the channel."""
    config, heard = GuestConfig(capabilities=Capabilities.SRIOV), []
    world.adapter.on_data_path = heard.append
    world.adapter.associate_vf(7)
    for round_ in range(1, 3):
        nic = world.open(config)
        assert nic._channels[0].wait(lambda nic=nic: nic.protocol.vf_serial == 7)  # type: ignore[misc]
        assert heard == [True, False] * (round_ - 1)
        nic.switch_data_path(True)
        assert heard == [True, False] * (round_ - 1) + [True]
    world.open(config)
    world.adapter.associate_vf(None)
    assert heard == [True, False] * 2
    world.open(config).close()
    world.nic = None
    assert heard == [True, False] * 2, "a guest that did not use it leaves nothing"


def test_settings_are_the_connections(world: Reopening) -> None:
    every = GuestConfig(mtu=9000, offloads=Offloads.everything(), capabilities=Capabilities.RSC)
    nic = world.open(every)
    nic.set(Oid.ETHERNET_MULTICAST_LIST, GROUP)
    nic.set_filter(PacketFilter.MULTICAST | PacketFilter.PROMISCUOUS)
    nic.set_rss([0, 0])
    used = world.adapter.vsp
    assert used is not None
    before = used.protocol
    assert before.oids.rss is not None
    assert before.oids.offloads.lso4
    assert before.frame_size == 9014
    assert world.gets(mac(5), GROUP) == [mac(5), GROUP]
    world.open(GuestConfig(versions=(Version.V2,)))
    fresh = world.adapter.vsp
    assert fresh is not None
    after = fresh.protocol
    assert (after.version, after.frame_size, after.subchannels) == (Version.V2, 1514, 0)
    assert after.oids.rss is None
    assert after.oids.multicast == frozenset()
    assert after.rsc == (False, False)
    assert not after.oids.offloads.lso4
    assert world.gets(mac(5), mac(1), BROADCAST) == [mac(1), BROADCAST]


def test_statistics_are_the_adapters(world: Reopening) -> None:
    for opened in range(1, 4):
        nic = world.open()
        assert world.gets(mac(1)) == [mac(1)]
        assert nic.query(Oid.GEN_RCV_OK) == opened.to_bytes(8, "little")


def test_sub_channels_are_the_connections_however_late_the_hosts_worker_is() -> None:
    """It finds a closed and reopened channel that wants as many sub-channels as the one before."""
    hypervisor = Hypervisor()
    root = hypervisor.create_root()
    partition = hypervisor.create_child(root, name="c", memory_size=32 << 20, vps=2)
    hosting = Threads(workers=2)
    host = VmbusHost(hypervisor, partition, hosting=hosting)
    port = Switch().connect("c")
    adapter = NetworkAdapter(host, port, AdapterConfig(mac(1), max_queues=3), instance_id=UUID(int=1))
    guest = VmbusGuest(partition.vps[0])
    guest.connect()
    world = Reopening(guest, adapter, hosting, port, partition)
    nic = world.open()
    assert nic.request_subchannels(2) == 2
    assert nic._channels[0].wait(lambda: len(world.subchannels()) == 2)
    old = {offer.channel_id for offer in world.subchannels()}
    for offer in world.subchannels():
        nic.add_subchannel(offer.subchannel_index, guest.open(offer, 4, 4))
    news: list[Offer] = []
    gone: list[object] = []
    guest.on_offer, guest.on_rescind = news.append, gone.append
    entered, go = threading.Event(), threading.Event()

    def busy() -> None:
        entered.set()
        go.wait(20)

    task = hosting.task("busy", busy)
    task.home = adapter._offerer.home  # that worker serves something else for a while
    hosting.ring(task)
    assert entered.wait(20)
    nic = world.open()
    assert nic.request_subchannels(2) == 2
    go.set()
    assert nic._channels[0].wait(lambda: len(news) == 2 and len(gone) == 2)
    assert {offer.subchannel_index for offer in world.subchannels()} == {1, 2}
    for offer in world.subchannels():
        nic.add_subchannel(offer.subchannel_index, guest.open(offer, 4, 4))
    assert nic._channels[0].wait(lambda: nic.protocol.send_table[:4] == (0, 1, 2, 0))
    assert adapter.statistics.violations == 0
    assert old
    hosting.close()
    partition.destroy()
    root.destroy()


def test_sub_channels_that_nobody_asks_for_again_go(world: Reopening) -> None:
    nic = world.open()
    nic.request_subchannels(1)
    assert nic._channels[0].wait(lambda: len(world.subchannels()) == 1)
    ((_, offered),) = world.adapter._subchannels
    assert isinstance(offered, Offered)
    nic = world.open()
    assert nic._channels[0].wait(lambda: not world.subchannels())
    assert not offered.is_present
