"""The redirect chain through real partitions: each is a child of the one before, with VMBus between every two."""

import random
import struct
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from vmbus.bus import Hosting, Inline, Threads, VmbusGuest, VmbusHost, loopback
from vmbus.core.memory import GpaRanges, GuestMemory
from vmbus.errors import DeviceError, VmbusError
from vmbus.hypervisor import Hypervisor, Partition, VirtualClock
from vmbus.machine.model import ModelMachine
from vmbus.storage.disk import Disk, MemoryDisk
from vmbus.storage.guest_disk import StorageDisk
from vmbus.storage.lent_pages import Loan
from vmbus.storage.redirect import RedirectDisk
from vmbus.storage.requests import request_packet
from vmbus.storage.scsi.codes import ScsiStatus
from vmbus.storage.vsc import StorageVsc
from vmbus.storage.vsp import StorageVsp
from vmbus.storage.wire import DataDirection, PacketHeader, ScsiRequest

MIB = 1 << 20
SIZE = 4 * MIB


class Level(NamedTuple):
    partition: Partition
    host: VmbusHost
    provider: StorageVsp
    device: StorageDisk


class Nest:
    def __init__(self, kind: str, depth: int, disk: Disk) -> None:
        self.hv = Hypervisor(clock=VirtualClock() if kind == "inline" else None)
        parent = self.hv.create_root()
        hosting: Hosting = Inline(seed=5) if kind == "inline" else Threads(workers=depth)
        self.hosting = hosting
        self.levels: list[Level] = []
        for number in range(depth):
            child = self.hv.create_child(parent, name=f"level{number}", memory_size=16 * MIB)
            host = VmbusHost(self.hv, child, hosting=hosting)
            provider = StorageVsp({(0, 0): disk})
            provider.offer_on(host)
            guest = VmbusGuest(child.vps[0])
            guest.connect()
            (offer,) = guest.offers
            client = StorageVsc(guest.open(offer, 16, 16), guest.pages.allocate(512), timeout=60)
            client.connect()
            self.levels.append(Level(child, host, provider, client.disk()))
            disk = RedirectDisk(client.disk(), guest.pages.allocate(256))
            parent = child

    @property
    def device(self) -> StorageDisk:
        return self.levels[-1].device

    def close(self) -> None:
        for level in reversed(self.levels):
            level.provider.shutdown()
        self.hosting.close()
        assert self.hv.root is not None
        self.hv.root.destroy()


@pytest.fixture(params=["inline", "threads"])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    return request.param


@pytest.mark.parametrize("depth", [2, 4])
def test_data_are_the_same(kind: str, depth: int) -> None:
    disk = MemoryDisk(SIZE)
    nest = Nest(kind, depth, disk)
    rnd = random.Random(depth)
    offsets = rnd.sample(range(0, SIZE, 4096), 300)
    pieces = [rnd.randbytes(4096) for _ in offsets]
    before = nest.hv.ledger.total().copy()
    nest.device.write_batch(offsets, pieces)
    assert nest.device.read_batch(offsets, 4096) == pieces
    counts = nest.hv.ledger.total() - before
    assert counts.hypercalls  # doorbells of real partitions
    big = rnd.randbytes(MIB)
    nest.device.write(MIB, big)
    nest.device.flush()
    assert disk.read(MIB, MIB) == big
    for offset, piece in zip(offsets, pieces, strict=True):
        if not MIB <= offset < 2 * MIB:
            assert disk.read(offset, 4096) == piece
    nest.close()


@pytest.mark.parametrize("dead", [0, 1])
def test_a_provider_taken_away_is_an_error_for_all_behind_it(kind: str, dead: int) -> None:
    nest = Nest(kind, 3, MemoryDisk(SIZE))
    assert nest.device.read(0, 4096) == bytes(4096)
    level = nest.levels[dead]
    level.provider.shutdown()
    for client in (each.device.vsc for each in nest.levels):
        client.timeout = 0.5  # nobody answers any more
    for _ in range(3):
        with pytest.raises(VmbusError):
            nest.device.read_batch([0, 4096, 8192], 4096)
        with pytest.raises(DeviceError):
            nest.device.write(0, bytes(4096))
    nest.close()


def test_a_partition_that_has_only_emulated_hardware_gives_an_enlightened_disk() -> None:
    """The middle partition reaches its disk by port instructions, its child by VMBus: a hop is a hop."""
    disk = MemoryDisk(SIZE, content=random.Random(1).randbytes(SIZE))
    with ModelMachine(memory_size=16 * MIB) as machine:
        redirect = RedirectDisk(machine.add_emulated_disk(disk))
        guest, host = loopback(GuestMemory(8 * MIB), 16, 16)
        provider = StorageVsp({(0, 0): redirect})
        provider.open(host)
        client = StorageVsc(guest, range(16, 512))
        client.connect()
        device = client.disk()
        assert device.size == SIZE
        exits = machine.ledger.total().exits.total()
        assert device.read(MIB, 65536) == disk.read(MIB, 65536)
        assert machine.ledger.total().exits.total() > exits
        device.write_batch([0, 8192], [b"a" * 4096, b"b" * 4096])
        device.flush()
        assert disk.read(0, 4096) + disk.read(8192, 4096) == b"a" * 4096 + b"b" * 4096
        provider.shutdown()
        host.close()


def test_on_one_thread_a_batch_beneath_another_one_is_busy_and_not_waited_for() -> None:
    """Two guests share a redirected disk; while it waits for the one's batch, the thread begins the other's."""
    hv = Hypervisor(clock=VirtualClock())
    root = hv.create_root()
    hosting = Inline(eager=True)

    def client(name: str, provider: StorageVsp) -> tuple[StorageVsc, VmbusGuest]:
        child = hv.create_child(root, name=name, memory_size=16 * MIB)
        provider.offer_on(VmbusHost(hv, child, hosting=hosting))
        guest = VmbusGuest(child.vps[0])
        guest.connect()
        (offer,) = guest.offers
        made = StorageVsc(guest.open(offer, 16, 16), guest.pages.allocate(64), timeout=60)
        made.connect()
        return made, guest

    disk = MemoryDisk(MIB)
    disk.write(0, b"".join(bytes([number]) * 4096 for number in range(8)))
    middle, guest = client("middle", StorageVsp({(0, 0): disk}))
    first = StorageVsp()
    unit = first.add_disk((0, 0), RedirectDisk(middle.disk(), guest.pages.allocate(64)))
    providers = first, StorageVsp({(0, 0): unit})
    guests = [client(name, provider)[0] for name, provider in zip("ab", providers, strict=True)]
    for each in guests:
        each.check(0, 0, bytes(6))
    wanted: list[list[tuple[Loan, bytes]]] = [[], []]
    with hosting.held():  # both have rung before anybody is served
        for number, each in enumerate(guests):
            channel = each.channels[0]
            for block in range(4 * number, 4 * number + 4):
                loan = each._take(4096)
                packet = request_packet(
                    each._rules, (0, 0), struct.pack(">BBQIxx", 0x88, 0, 8 * block, 8), DataDirection.IN, 4096
                )
                channel.outgoing.send_gpa_direct(packet, GpaRanges([(4096, 0, loan.pages)]), block)
                wanted[number].append((loan, bytes([block]) * 4096))
            channel.signal()
    hosting.run()
    statuses: set[int] = set()
    for each, blocks in zip(guests, wanted, strict=True):
        packets = each.channels[0].incoming.recv_packets(8)
        assert len(packets) == len(blocks)
        for packet, (loan, content) in zip(packets, blocks, strict=True):
            status = ScsiRequest.unpack(packet.payload[PacketHeader.SIZE :]).scsi_status
            statuses.add(status)
            if status == ScsiStatus.GOOD:
                assert GpaRanges([(4096, 0, loan.pages)]).read(each._memory) == content
            loan.close()
    assert statuses == {ScsiStatus.GOOD, ScsiStatus.BUSY}
    for each in guests:  # and whoever asks again gets it
        assert each.disk().read_batch([4096], 4096) == [bytes([1]) * 4096]
    root.destroy()
