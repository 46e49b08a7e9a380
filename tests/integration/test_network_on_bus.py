"""Adapters on real buses: hypercalls, SynIC and channels under provider and client, on one thread and on several."""

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from uuid import UUID

import pytest
from reference.netpair import frame, mac

from vmbus.bus import Hosting, Inline, Offer, Threads, VmbusGuest, VmbusHost
from vmbus.hypervisor import Hypervisor, Partition, VirtualClock
from vmbus.network.adapter import NetworkAdapter
from vmbus.network.oid import Offloads, PacketFilter
from vmbus.network.switch import BROADCAST, Switch
from vmbus.network.vsc import NetworkVsc, default_page_count
from vmbus.network.vsc_protocol import GuestConfig
from vmbus.network.vsp_oid import AdapterConfig
from vmbus.network.wire import INTERFACE_ID, Capabilities, Version


@dataclass
class Child:
    partition: Partition
    host: VmbusHost
    adapter: NetworkAdapter
    guest: VmbusGuest
    nic: NetworkVsc
    pages: list[int]

    def collect(self, count: int) -> list[bytes]:
        frames: list[bytes] = []

        def enough() -> bool:
            frames.extend(self.nic.receive(256))
            return len(frames) >= count

        self.nic._channels[0].wait(enough, 10)
        return frames

    def reopen(self) -> None:
        self.nic.close()
        self.guest.pages.free(self.pages)
        (offer,) = [o for o in self.guest.offers if o.interface_id == INTERFACE_ID and not o.is_subchannel]
        channel = self.guest.open(offer, 16, 16)
        self.pages = self.guest.pages.allocate(default_page_count())
        self.nic = NetworkVsc(channel, self.pages, GuestConfig())


class World:
    def __init__(self, kind: str) -> None:
        inline = kind == "inline"
        self.hv = Hypervisor(clock=VirtualClock() if inline else None)
        self.root = self.hv.create_root()
        self.hosting: Hosting = Inline(seed=3) if inline else Threads(workers=2)
        self.switch = Switch()
        self.children: list[Child] = []

    def add(self, number: int, config: GuestConfig | None = None, **adapter: object) -> Child:
        partition = self.hv.create_child(self.root, name=f"c{number}", memory_size=16 << 20, vps=2)
        host = VmbusHost(self.hv, partition, hosting=self.hosting)
        port = self.switch.connect(f"c{number}")
        nic_config = AdapterConfig(mac(number), **adapter)  # type: ignore[arg-type]
        device = NetworkAdapter(host, port, nic_config, instance_id=UUID(int=number), name="nic")
        guest = VmbusGuest(partition.vps[0])
        guest.connect()
        channel = guest.open(guest.offers[0], 16, 16)
        pages = guest.pages.allocate(default_page_count())
        child = Child(partition, host, device, guest, NetworkVsc(channel, pages, config), pages)
        self.children.append(child)
        return child

    def close(self) -> None:
        self.hosting.close()
        for child in self.children:
            child.partition.destroy()
        self.root.destroy()


@pytest.fixture(params=["inline", "threads"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(request.param)
    yield world
    world.close()


def test_frames_cross_the_switch(world: World) -> None:
    a, b = world.add(1), world.add(2)
    assert (a.nic.mac, a.nic.link_up, a.nic.protocol.version) == (mac(1), True, Version.V6_1)
    for size in (1, 64, 1500):
        frames = [frame(mac(2), mac(1), bytes([n]) * size) for n in range(30)]
        assert a.nic.send_batch(frames) == 30
        assert b.collect(30) == frames
    assert a.adapter.statistics.sent == 90
    assert a.adapter.statistics.violations == 0


def test_the_ledger_counts_what_passed(world: World) -> None:
    a, b = world.add(1), world.add(2)
    before = world.hv.ledger.account("root", "c1/nic").copy()
    a.nic.send_batch([frame(mac(2), mac(1), bytes(60))] * 32)
    assert len(b.collect(32)) == 32
    spent = world.hv.ledger.account("root", "c1/nic") - before
    assert spent.packets_received == 4  # eight frames to a VMBus packet
    assert spent.bytes_copied >= 32 * 74


def test_close_and_open_again(world: World) -> None:
    a, b = world.add(1), world.add(2)
    for _ in range(3):
        a.reopen()
        assert a.nic.send(frame(mac(2), mac(1)))
        assert b.collect(1) == [frame(mac(2), mac(1))]
        assert b.nic.send(frame(mac(1), mac(2)))
        assert a.collect(1) == [frame(mac(1), mac(2))]
    assert a.adapter.statistics.sent == 3


def test_link_and_vf_outlive_the_channel(world: World) -> None:
    config = GuestConfig(capabilities=Capabilities.SRIOV)
    a = world.add(1, config)
    a.adapter.set_link(False)
    assert a.nic._channels[0].wait(lambda: not a.nic.link_up)
    a.reopen()
    assert not a.nic.link_up
    a.adapter.set_link(True)
    assert a.nic._channels[0].wait(lambda: a.nic.link_up)
    paths: list[bool] = []
    a.adapter.on_data_path = paths.append
    b = world.add(2, config)
    b.adapter.on_data_path = paths.append
    b.adapter.associate_vf(9)
    assert b.nic._channels[0].wait(lambda: b.nic.protocol.vf_serial == 9)
    b.nic.switch_data_path(True)
    assert paths == [True]


def test_subchannels_are_offered_opened_and_used(world: World) -> None:
    every = GuestConfig(offloads=Offloads.everything())
    a, b = world.add(1, every, max_queues=3), world.add(2)
    for _ in range(2):
        assert a.nic.request_subchannels(2) == 2

        def there() -> list[Offer]:
            return [offer for offer in a.guest.offers if offer.is_subchannel]

        assert a.nic._channels[0].wait(lambda: len(there()) == 2)
        for offer in sorted(there(), key=lambda o: o.subchannel_index):
            a.nic.add_subchannel(offer.subchannel_index, a.guest.open(offer, 4, 4))
        assert a.nic._channels[0].wait(lambda: a.nic.protocol.send_table[:4] == (0, 1, 2, 0))
        a.nic.set_rss([0, 1, 2, 1])
        a.nic.set_filter(PacketFilter.PROMISCUOUS)
        frames = [udp(number) for number in range(60)]
        assert b.nic.send_batch(frames) == 60
        assert sorted(a.collect(60)) == sorted(frames)
        assert a.nic.send_batch([frame(BROADCAST, mac(1))]) == 1
        assert len(b.collect(1)) == 1
        a.nic.close()
        a.guest.pages.free(a.pages)
        assert a.adapter.vsp is None
        (primary,) = [o for o in a.guest.offers if not o.is_subchannel]
        channel = a.guest.open(primary, 16, 16)
        assert channel.wait(lambda: not there())
        a.pages = a.guest.pages.allocate(default_page_count())
        a.nic = NetworkVsc(channel, a.pages, every)


def udp(number: int) -> bytes:
    header = bytes.fromhex("450000200000400040110000") + bytes([10, 0, 0, 1, 10, 0, 0, 2 + number % 5])
    return frame(mac(1), mac(2), header + number.to_bytes(2, "big") + bytes(10), 0x0800)


def test_unplugged_while_busy(world: World) -> None:
    a, b = world.add(1), world.add(2)
    a.nic.send_batch([frame(mac(2), mac(1))] * 50)
    a.adapter.remove()
    assert b.nic._channels[0].wait(lambda: not a.nic.is_open)
    assert not a.nic.link_up
    assert a.adapter.vsp is None
    assert [port.name for port in world.switch.ports] == ["c2"]
    assert b.nic.send(frame(mac(1), mac(2)))


def test_everything_at_once() -> None:
    """Threads everywhere: frames both ways while links go down and up, guests reopen, one is unplugged."""
    world = World("threads")
    a, b, c = world.add(1), world.add(2), world.add(3)
    stop = threading.Event()
    errors: list[str] = []
    counts = {"a": 0, "b": 0, "link": 0, "reopen": 0}

    def worker(work: Callable[[], None]) -> threading.Thread:
        def loop() -> None:
            try:
                while not stop.wait(0.002):
                    work()
            except Exception:
                errors.append(traceback.format_exc())

        thread = threading.Thread(target=loop)
        thread.start()
        return thread

    def pump(me: Child, name: str, other: int, own: int) -> None:
        me.nic.send_batch([frame(mac(other), mac(own), bytes(60)), frame(BROADCAST, mac(own))] * 8)
        counts[name] += len(me.nic.receive(256))

    def flap() -> None:
        for up in (False, True):
            a.adapter.set_link(up)
            b.adapter.network_changed()
        counts["link"] += 1

    def reopen() -> None:
        c.reopen()
        c.nic.send_batch([frame(BROADCAST, mac(3))] * 20)
        c.nic.receive(64)
        counts["reopen"] += 1

    threads = [
        worker(lambda: pump(a, "a", 2, 1)),
        worker(lambda: pump(b, "b", 1, 2)),
        worker(flap),
        worker(reopen),
    ]
    deadline = time.monotonic() + 60
    while min(counts.values()) < 10 and not errors and time.monotonic() < deadline:
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join(20)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)
    assert min(counts.values()) >= 10
    a.adapter.set_link(True)
    assert a.nic._channels[0].wait(lambda: a.nic.link_up)
    a.nic.receive(1 << 20)
    b.nic.receive(1 << 20)
    assert b.nic._channels[0].wait(lambda: b.nic.send(frame(mac(1), mac(2), b"last")))
    seen: list[bytes] = []  # broadcasts that were still under way come before it

    def arrived() -> bool:
        seen.extend(a.nic.receive(256))
        return frame(mac(1), mac(2), b"last") in seen

    assert a.nic._channels[0].wait(arrived, 10)
    assert [child.adapter.statistics.violations for child in (a, b, c)] == [0, 0, 0]
    world.close()
