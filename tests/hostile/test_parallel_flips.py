"""A guest whose other processor changes rings and buffers while they are read: copied once, checked, and used.

The changes come from another process, at the same time as everything here. Both ends are attacked, since the model
guest shares the pages. Whatever they find wrong ends in an error of ours and costs that channel; neighbours go on, on
the same switch and on disks beside. Worth the most under the sanitizers. Seeded; ``VMBUS_SEED`` repeats a run.
"""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from reference.flipper import Flipper
from reference.netpair import frame, mac
from reference.seeds import chosen_seed

from vmbus.bus import Channel, Offer, VmbusGuest, VmbusHost
from vmbus.bus.pages import PageAllocator
from vmbus.errors import VmbusError
from vmbus.hypervisor import Hypervisor, VirtualClock
from vmbus.network.adapter import NetworkAdapter
from vmbus.network.switch import Switch
from vmbus.network.vsc import NetworkVsc, default_page_count
from vmbus.network.vsp_oid import AdapterConfig
from vmbus.storage.disk import Buffer, Disk, MemoryDisk, RawDisk
from vmbus.storage.vsc import StorageVsc
from vmbus.storage.vsp import StorageVsp

SEED = chosen_seed()
ROUNDS = pytest.mark.parametrize("rounds", [5, pytest.param(60, marks=pytest.mark.slow)])
MIB = 1 << 20
CONTENT = random.Random(1).randbytes(MIB)
ECHO = Offer(UUID(int=0xEC40), UUID(int=1))
FRAMES = [frame(mac(2), mac(1), bytes([n]) * (60 + 40 * n)) for n in range(30)]


class Pages(PageAllocator):
    """Remembers what was taken since it was last asked: where rings and buffers lie."""

    def __init__(self, first: int, end: int) -> None:
        super().__init__(first, end)
        self.recent: list[int] = []

    def allocate(self, count: int) -> list[int]:
        taken = super().allocate(count)
        self.recent += taken
        return taken

    def since(self) -> list[int]:
        taken, self.recent = self.recent, []
        return taken


class Guest:
    """One partition with its bus; it connects anew for each round, as what it wrote may have ended the connection."""

    def __init__(self, hv: Hypervisor, name: str) -> None:
        assert hv.root is not None
        self.partition = hv.create_child(hv.root, name, memory_size=32 * MIB)
        self.host = VmbusHost(hv, self.partition)

    def start(self) -> None:
        self.host.reset()
        self.pages = Pages(256, 32 * MIB >> 12)
        self.driver = VmbusGuest(self.partition.vps[0], pages=self.pages)
        self.driver.connect()
        self.pages.since()

    def open(self, offer: Offer) -> Channel:
        """Open an offer, which is made anew if the host took it back."""
        found = next(o for o in self.driver.offers if o.interface_id == offer.interface_id)
        return self.driver.open(found, 16, 16)


@pytest.fixture
def world(capsys: pytest.CaptureFixture[str]) -> Iterator[tuple[Hypervisor, Guest, Guest, Flipper]]:
    print(f"VMBUS_SEED={SEED}")
    with Hypervisor(clock=VirtualClock()) as hv:
        hv.create_root()
        guests = Guest(hv, "attacked"), Guest(hv, "neighbour")
        with Flipper(guests[0].partition.memory.fd, SEED) as flipper:
            yield hv, *guests, flipper


def echo(channel: Channel) -> None:
    channel.serve(lambda packets: [channel.send(packet.payload) for packet in packets] and None)


@ROUNDS
def test_a_ring(world: tuple[Hypervisor, Guest, Guest, Flipper], rounds: int) -> None:
    _, guest, neighbour, flipper = world
    neighbour.host.offer(ECHO, echo)
    neighbour.start()
    other = neighbour.open(ECHO)
    choice = random.Random(SEED)
    for _ in range(rounds):
        offered = guest.host.offer(ECHO, echo)
        guest.start()
        channel = guest.open(ECHO)
        flipper.attack(guest.pages.since())
        with contextlib.suppress(VmbusError):
            for _ in range(3000):
                channel.send(choice.randbytes(choice.randrange(1, 300)))
                if choice.random() < 0.1:
                    channel.incoming.recv_packets(64)
                if not channel.is_open:
                    break
        flipper.rest()
        offered.rescind()
        guest.host.machine.check()
        other.send(b"how are you?....")
        assert other.incoming.recv() == b"how are you?...."
    assert flipper.changes > 10_000


class Plain(Disk):
    """A disk that is served by Python."""

    sector_size = physical_sector_size = 512
    read_only = False

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.sector_count = len(content) // 512

    def read(self, offset: int, length: int) -> bytes:
        self.check(offset, length)
        return bytes(self.content[offset : offset + length])

    def write(self, offset: int, data: Buffer) -> None:
        size = memoryview(data).nbytes
        self.check(offset, size, writing=True)
        self.content[offset : offset + size] = data

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


@ROUNDS
@pytest.mark.parametrize("kind", ["memory", "file", "Python"])
def test_a_storage_controller(
    world: tuple[Hypervisor, Guest, Guest, Flipper], tmp_path: Path, kind: str, rounds: int
) -> None:
    _, guest, neighbour, flipper = world
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    disk: Disk = MemoryDisk(MIB, content=CONTENT)
    if kind == "file":
        disk = RawDisk(path)
    elif kind == "Python":
        disk = Plain(CONTENT)
    beside = MemoryDisk(MIB, content=CONTENT)
    provider = StorageVsp({(0, 0): beside})
    provider.offer_on(neighbour.host)
    neighbour.start()
    other = StorageVsc(neighbour.open(provider.offer), neighbour.pages.allocate(64), timeout=5)
    other.connect()
    kept = other.disk()
    for number in range(rounds):
        attacked = StorageVsp({(0, 0): disk})
        offered = attacked.offer_on(guest.host)
        guest.start()
        client = StorageVsc(guest.open(attacked.offer), guest.pages.allocate(256), timeout=0.2)
        client.connect()
        seen = client.disk()
        flipper.attack(guest.pages.since())
        with contextlib.suppress(VmbusError):
            for turn in range(40):
                seen.read_batch(range(0, 64 * 4096, 4096), 4096)
                seen.write_batch(range(0, 32 * 8192, 8192), [bytes([turn]) * 8192] * 32)
                seen.read(512 * turn, 512 * 9)
        flipper.rest()
        offered.rescind()
        attacked.shutdown()
        guest.host.machine.check()
        at = number % 16 * 4096
        kept.write(at, CONTENT[at : at + 4096])
        assert kept.read(0, 65536) == CONTENT[:65536]
    assert flipper.changes > 10_000
    provider.shutdown()
    for each in (disk, beside):
        each.close()


@ROUNDS
def test_a_network_adapter(world: tuple[Hypervisor, Guest, Guest, Flipper], rounds: int) -> None:
    _, guest, neighbour, flipper = world
    switch = Switch()
    NetworkAdapter(neighbour.host, switch.connect("neighbour"), AdapterConfig(mac(2)))
    neighbour.start()
    nic = adapter_of(neighbour)
    observer = switch.connect("observer")
    answers: list[bytes] = []
    observer.receiver = answers.extend
    for number in range(rounds):
        adapter = NetworkAdapter(guest.host, switch.connect(f"attacked{number}"), AdapterConfig(mac(1)))
        guest.start()
        attacked = adapter_of(guest)
        flipper.attack(guest.pages.since())
        with contextlib.suppress(VmbusError):
            for _ in range(60):
                attacked.send_batch(FRAMES)
                nic.send_batch([frame(mac(1), mac(2), bytes(n)) for n in range(0, 1400, 100)])
                attacked.receive(256)
                nic.receive(256)
        flipper.rest()
        adapter.remove()
        guest.host.machine.check()
        while nic.receive(256):
            pass
        hello = frame(b"\xff" * 6, mac(3), b"hello, neighbour")
        observer.send([hello])
        assert nic.receive(8) == [hello]
    assert flipper.changes > 10_000


def adapter_of(guest: Guest) -> NetworkVsc:
    (offer,) = [o for o in guest.driver.offers if not o.is_subchannel]
    return NetworkVsc(
        guest.driver.open(offer, 16, 16), guest.pages.allocate(default_page_count()), timeout=0.5
    )
