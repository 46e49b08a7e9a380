"""Storage controllers on real buses: hypercalls, SynIC and sub-channels, on one thread and on several."""

import os
import threading
import time
from collections.abc import Iterator

import pytest

from vmbus.bus import Hosting, Inline, Threads, VmbusGuest, VmbusHost
from vmbus.errors import DeviceError, VmbusError
from vmbus.hypervisor import Hypervisor, VirtualClock
from vmbus.storage.disk import Disk, MemoryDisk
from vmbus.storage.guest_disk import StorageDisk
from vmbus.storage.vsc import CommandError, StorageVsc
from vmbus.storage.vsp import StorageVsp
from vmbus.storage.wire import SrbStatus

MIB = 1 << 20
CONTENT = os.urandom(4 * MIB)


class World:
    def __init__(self, kind: str) -> None:
        inline = kind == "inline"
        self.hv = Hypervisor(clock=VirtualClock() if inline else None)
        root = self.hv.create_root()
        self.hosting: Hosting = Inline(seed=5) if inline else Threads(workers=2)
        self.child = self.hv.create_child(root, name="c", memory_size=32 * MIB, vps=2)
        self.host = VmbusHost(self.hv, self.child, hosting=self.hosting)
        self.guest: VmbusGuest | None = None
        self.providers: list[StorageVsp] = []

    def provide(self, disk: Disk, **options: int) -> StorageVsp:
        provider = StorageVsp({(0, 0): disk}, **options)  # type: ignore[arg-type]
        self.providers.append(provider)
        self.offered = provider.offer_on(self.host)
        return provider

    def connect(self, provider: StorageVsp, sub_channels: int = 0) -> StorageVsc:
        if self.guest is None:
            self.guest = VmbusGuest(self.child.vps[0])
            self.guest.connect()
        guest = self.guest
        mine = [o for o in guest.offers if o.instance_id == provider.offer.instance_id]
        (offer,) = [o for o in mine if not o.is_subchannel]
        client = StorageVsc(guest.open(offer, 16, 16), guest.pages.allocate(256), sub_channels=sub_channels)
        client.connect()
        if sub_channels:
            assert guest.hosting.wait_for(lambda: len(self.subs(provider)) == client.negotiation.sub_channels)
            for sub in self.subs(provider):
                client.add_channel(guest.open(sub, 16, 16, target_vp=1))
        return client

    def subs(self, provider: StorageVsp) -> list[object]:
        assert self.guest is not None
        mine = [o for o in self.guest.offers if o.instance_id == provider.offer.instance_id]
        return [o for o in mine if o.is_subchannel]

    def close(self) -> None:
        for provider in self.providers:
            provider.shutdown()
        self.hosting.close()
        self.child.destroy()


@pytest.fixture(params=["inline", "threads"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(request.param)
    yield made
    made.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_requests_on_every_channel(world: World, workers: int) -> None:
    disk = MemoryDisk(4 * MIB, content=CONTENT)
    provider = world.provide(disk, max_sub_channels=3, workers=workers)
    client = world.connect(provider, sub_channels=3)
    assert len(client.channels) == 4
    device = client.disk()
    for turn in range(12):
        assert device.read(turn * 4096, 4096) == CONTENT[turn * 4096 : (turn + 1) * 4096]
        offsets = range(turn * 512, 2 * MIB, 65536)
        assert device.read_batch(offsets, 512) == [CONTENT[at : at + 512] for at in offsets]
    device.write_batch(range(0, MIB, 4096), [bytes([n]) * 4096 for n in range(256)])
    device.flush()
    assert disk.read(0, MIB) == b"".join(bytes([n]) * 4096 for n in range(256))
    for channel in client.channels:  # each carried its share, completed where it came from
        assert channel.account.packets_received == channel.account.packets_sent > 0


def test_a_controller_opened_again_starts_anew(world: World) -> None:
    provider = world.provide(MemoryDisk(4 * MIB, content=CONTENT), max_sub_channels=2)
    for _ in range(3):
        client = world.connect(provider, sub_channels=2)
        assert client.disk().read(0, MIB) == CONTENT[:MIB]
        client.close()
        assert world.guest is not None
        assert world.guest.hosting.wait_for(lambda: not world.subs(provider))
        assert not provider.ready


def test_a_controller_taken_away_is_an_error_not_a_hang(world: World) -> None:
    provider = world.provide(MemoryDisk(MIB))
    client = world.connect(provider)
    device = client.disk()
    client.timeout = 0.5
    world.offered.rescind()
    with pytest.raises(VmbusError):
        device.read(0, 4096)
    with pytest.raises(DeviceError):
        device.read_batch([0, 4096], 4096)


def test_disks_come_and_go_while_the_guest_runs(world: World) -> None:
    provider = world.provide(MemoryDisk(MIB))
    client = world.connect(provider)
    told: list[bool] = []
    client.on_change = lambda: told.append(True)
    provider.add_disk((0, 7), MemoryDisk(2 * MIB))
    client.poll()
    device = client.disk(0, 7)
    assert device.size == 2 * MIB
    provider.remove_disk((0, 7))
    client.poll()
    assert len(told) == 2
    with pytest.raises(CommandError) as caught:
        device.write(0, bytes(512))
    assert caught.value.srb_status == SrbStatus.INVALID_LUN


def test_two_controllers_share_a_reserved_disk(world: World) -> None:
    """A unit behind two controllers sees two initiators; only one may write what it has reserved."""
    shared = MemoryDisk(MIB)
    first = world.provide(shared)
    unit = first.units[0, 0]
    second = StorageVsp({(0, 0): unit})
    world.providers.append(second)
    second.offer_on(world.host, name="second")
    one, two = world.connect(first), world.connect(second)
    key = (0x1111).to_bytes(8, "big")
    one.check(0, 0, bytes([0x5F, 0, 0, 0, 0, 0, 0, 0, 24, 0]), data_out=bytes(8) + key + bytes(8))
    one.check(0, 0, bytes([0x5F, 1, 3, 0, 0, 0, 0, 0, 24, 0]), data_out=key + bytes(16))
    one.disk().write(0, b"\1" * 512)
    with pytest.raises(CommandError) as caught:
        two.check(0, 0, bytes([0x2A, 0, 0, 0, 0, 0, 0, 0, 1, 0]), data_out=bytes(512))
    assert caught.value.scsi_status == 0x18
    assert shared.read(0, 512) == b"\1" * 512
    one.check(0, 0, bytes([0x5F, 2, 3, 0, 0, 0, 0, 0, 24, 0]), data_out=key + bytes(16))
    two.disk().write(0, b"\2" * 512)
    assert one.disk().read(0, 512) == b"\2" * 512


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_and_taking_away_in_the_middle_of_requests(world: World, workers: int) -> None:
    """Whatever ends first - channel, disk or offer - nobody hangs, and the next client finds everything in order."""
    disk = MemoryDisk(4 * MIB, content=CONTENT)
    provider = world.provide(disk, max_sub_channels=2, workers=workers)
    for turn in range(6):
        client = world.connect(provider, sub_channels=2 if turn % 2 else 0)
        device = client.disk()
        client.timeout = 2
        ended: list[object] = []

        def work(device: StorageDisk = device, ended: list[object] = ended) -> None:
            try:
                while True:
                    device.read_batch(range(0, MIB, 4096), 4096)
            except VmbusError as error:
                ended.append(error)

        if world.hosting.kind == "inline":  # there is one thread, so the cut comes between two batches
            assert device.read_batch(range(0, MIB, 4096), 4096)[0] == CONTENT[:4096]
            client.close()
        else:
            thread = threading.Thread(target=work)
            thread.start()
            time.sleep(0.02 * (turn + 1))
            if turn % 3 == 2:
                provider.remove_disk((0, 0))
                provider.add_disk((0, 0), disk)
            client.close()
            thread.join(20)
            assert not thread.is_alive(), "a deadlock"
            assert ended
        assert world.guest is not None
        assert world.guest.hosting.wait_for(lambda: not world.subs(provider))
    assert world.connect(provider).disk().read(0, 4096) == CONTENT[:4096]
