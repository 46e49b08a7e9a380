"""Ctrl-C, or any other exception from outside, at every point of the clients: no data may end in a wrong place.

The host answers late, from threads of its own, so that requests are under way when the exception comes.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from reference.eventually import eventually
from reference.interruption import Interrupted, interrupted_at
from reference.netpair import frame, mac, make_pair, receive_all

from vmbus.bus.channel import loopback
from vmbus.core.memory import GuestMemory
from vmbus.network.vsc_protocol import GuestConfig
from vmbus.storage.disk import Buffer, Disk, MemoryDisk
from vmbus.storage.guest_disk import StorageDisk
from vmbus.storage.redirect import RedirectDisk
from vmbus.storage.vsc import StorageVsc
from vmbus.storage.vsp import StorageVsp

BLOCK = 4096
PAGES = 12
COUNT = 8
STORAGE_CLIENT = (
    "storage/vsc.py",
    "storage/requests.py",
    "storage/guest_disk.py",
    "storage/lent_pages.py",
    "bus/taking.py",
)
STORAGE_PROVIDER = ("storage/vsp.py", "scsi/unit.py", "scsi/block.py")
NETWORK_CLIENT = ("network/vsc.py", "network/vsc_send.py", "bus/taking.py")


class Late(Disk):
    """A disk in Python that takes its time."""

    def __init__(self, size: int) -> None:
        self.inner = MemoryDisk(size)
        self.sector_size, self.sector_count = 512, self.inner.sector_count
        self.physical_sector_size, self.read_only = 4096, False

    def read(self, offset: int, length: int) -> bytes:
        time.sleep(0.0002)
        return self.inner.read(offset, length)

    def write(self, offset: int, data: Buffer) -> None:
        time.sleep(0.0002)
        self.inner.write(offset, data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.inner.close()


class World:
    """A client with few pages, and a host that answers late, or on the client's own thread."""

    def __init__(self, workers: int = 2) -> None:
        self.disk = Late(1 << 20)
        guest, host = loopback(GuestMemory(1 << 20), 16, 16)
        self.provider = StorageVsp({(0, 0): self.disk}, workers=workers)
        self.provider.open(host)
        self.client = StorageVsc(guest, range(PAGES), timeout=30)
        self.client.connect()
        self.device = self.client.disk()

    def blocks(self, first: int, count: int) -> list[bytes]:
        return [self.disk.inner.read((first + index) * BLOCK, BLOCK) for index in range(count)]


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.provider.shutdown()


def offsets(first: int) -> list[int]:
    return [(first + index) * BLOCK for index in range(COUNT)]


def write_batch(device: StorageDisk, content: list[bytes]) -> None:
    device.write_batch(offsets(0), content)


def read_batch(device: StorageDisk, content: list[bytes]) -> None:
    del content
    device.read_batch(offsets(0), BLOCK)


def write_one(device: StorageDisk, content: list[bytes]) -> None:
    device.write(0, b"".join(content))


def read_one(device: StorageDisk, content: list[bytes]) -> None:
    del content
    device.read(0, COUNT * BLOCK)


def check_after_interruption(
    world: World,
    work: Callable[..., None],
    point: int,
    files: tuple[str, ...] = STORAGE_CLIENT,
    opcodes: bool = False,
) -> bool:
    """One round; whether the work was interrupted at all."""
    rng = random.Random(point)
    old = world.blocks(0, COUNT)
    new = [rng.randbytes(BLOCK) for _ in range(COUNT)]
    other = [rng.randbytes(BLOCK) for _ in range(COUNT)]
    interrupted = False
    try:
        with interrupted_at(point, *files, opcodes=opcodes):
            work(world.device, new)
    except Interrupted:
        interrupted = True
    # Straight on, while the host is still at it: other data to other places, by every way.
    world.device.write(COUNT * BLOCK, other[0])
    world.device.write_batch(offsets(COUNT)[1:], other[1:])
    assert world.device.read(COUNT * BLOCK, COUNT * BLOCK) == b"".join(other), point
    world.client.settle()
    writes = work in (write_batch, write_one)
    for index, found in enumerate(world.blocks(0, COUNT)):
        assert found in ((old[index], new[index]) if writes else (old[index],)), (point, index)
    if writes and not interrupted:
        assert world.blocks(0, COUNT) == new
    assert world.blocks(COUNT, COUNT) == other, point
    assert world.device.read_batch(offsets(0), BLOCK) == world.blocks(0, COUNT)
    return interrupted


STRIDES = [5, pytest.param(1, marks=pytest.mark.slow)]
"""Every line where there is time, else some."""


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("work", [write_batch, read_batch, write_one, read_one])
def test_no_data_end_elsewhere(world: World, work: Callable[..., None], stride: int) -> None:
    point = 0
    while check_after_interruption(world, work, point):
        point += stride
    assert point > 50
    # No page was lost on the way.
    assert len(world.device.read(0, world.client.max_transfer)) == PAGES * BLOCK


@pytest.mark.parametrize("work", [write_batch, read_batch, write_one, read_one])
def test_not_between_two_bytecodes_either(world: World, work: Callable[..., None]) -> None:
    rng = random.Random(8)
    hits = sum(check_after_interruption(world, work, rng.randrange(3000), opcodes=True) for _ in range(25))
    assert hits > 5


@pytest.mark.parametrize("stride", [31, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("work", [write_batch, read_batch, write_one, read_one])
@pytest.mark.parametrize("short_cut", [True, False])
def test_a_provider_on_the_same_thread_answers_all_the_same(
    work: Callable[..., None], short_cut: bool, stride: int
) -> None:
    """Then it is the provider, more often than not, that the exception comes to."""
    world = World(workers=0)
    if not short_cut:  # the write cache is off: compiled code leaves all to Python
        page = bytes.fromhex("0812 0000 0000 0000 0000 0000 0000 0000 0000 0000")
        world.client.check(0, 0, bytes([0x15, 0x10, 0, 0, 24]), data_out=bytes(4) + page)
    point = 0
    while check_after_interruption(world, work, point, files=STORAGE_CLIENT + STORAGE_PROVIDER):
        point += stride
    assert point > 50
    world.provider.shutdown()


def test_a_redirected_batch_waits_for_what_an_interrupted_one_left(world: World) -> None:
    """The pages are the redirected disk's own; the batch of its children that comes next must not find them in use."""
    redirected = RedirectDisk(world.device, range(PAGES, 3 * PAGES))
    guest, host = loopback(GuestMemory(1 << 20), 16, 16)
    provider = StorageVsp({(0, 0): redirected})
    provider.open(host)
    client = StorageVsc(guest, range(64), timeout=30)
    client.connect()
    device = client.disk()
    point = 0
    interrupted = True
    while interrupted:
        rng = random.Random(point)
        old = world.blocks(0, COUNT)
        new = [rng.randbytes(BLOCK) for _ in range(COUNT)]
        other = [rng.randbytes(BLOCK) for _ in range(COUNT)]
        interrupted = False
        try:
            with interrupted_at(point, *STORAGE_CLIENT, "storage/redirect.py"):
                device.write_batch(offsets(0), new)
        except Interrupted:
            interrupted = True
        device.write_batch(offsets(COUNT), other)
        client.settle()
        world.client.settle()
        assert world.blocks(COUNT, COUNT) == other, point
        for index, found in enumerate(world.blocks(0, COUNT)):
            assert found in (old[index], new[index]), (point, index)
        point += 23
    provider.shutdown()


def test_the_negotiation_goes_on_where_it_was_interrupted() -> None:
    point, interrupted = 0, True
    while interrupted:
        guest, host = loopback(GuestMemory(1 << 20), 16, 16)
        provider = StorageVsp({(0, 0): MemoryDisk(1 << 20)})
        provider.open(host)
        client = StorageVsc(guest, range(PAGES), timeout=30)
        interrupted = False
        try:
            with interrupted_at(point, *STORAGE_CLIENT):
                client.connect()
        except Interrupted:
            interrupted = True
        client.connect()
        assert client.disk().read(0, 512) == bytes(512)
        provider.shutdown()
        point += 1
    assert point > 50


# The network client


def frames_of(rng: random.Random, count: int, size: int) -> list[bytes]:
    return [frame(mac(2), mac(1), rng.randbytes(size)) for _ in range(count)]


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("size", [100, 1400, 9000])
def test_no_frame_carries_the_data_of_another(compiled: bool, size: int, stride: int) -> None:
    """The largest ones are too long for a section: they stay in guest pages of which there are few."""
    _, one, two = make_pair(GuestConfig(mtu=9200))
    one.nic.use_compiled_path = two.nic.use_compiled_path = compiled
    point, interrupted = 0, True
    while interrupted:
        rng = random.Random(point)
        first, second = frames_of(rng, 6, size), frames_of(rng, 6, size)
        interrupted = False
        try:
            with interrupted_at(point, *NETWORK_CLIENT):
                one.nic.send_batch(first)
        except Interrupted:
            interrupted = True
        assert one.nic.send_batch(second) == len(second), point
        one.nic.receive()
        got = receive_all(two.nic)
        assert got[-len(second) :] == second, point
        assert got[: -len(second)] == first[: len(got) - len(second)], point
        if not interrupted:
            assert got == first + second
        point += stride
    assert point > 20


@pytest.mark.parametrize("compiled", [True, False])
def test_an_interrupted_receive_keeps_no_section(compiled: bool) -> None:
    """More rounds than the receive buffer has sections, each with packets that must be completed."""
    _, one, two = make_pair(GuestConfig())
    two.nic.use_compiled_path = compiled
    point, interrupted, round_ = 0, True, 0
    while interrupted or round_ < 400:
        rng = random.Random(round_)
        sent = frames_of(rng, 4, 200)
        point = point + 1 if interrupted else 0
        interrupted = False
        try:
            with interrupted_at(point, *NETWORK_CLIENT):
                assert one.nic.send_batch(sent) == len(sent)
                two.nic.receive()
        except Interrupted:
            interrupted = True
        receive_all(two.nic)
        more = frames_of(rng, 4, 200)
        assert eventually(lambda more=more: one.nic.send_batch(more) == len(more), 5)  # type: ignore[misc]
        assert receive_all(two.nic)[-len(more) :] == more
        round_ += 1
    assert one.vsp.statistics.violations == two.vsp.statistics.violations == 0


def test_a_question_that_was_interrupted_can_be_asked_again() -> None:
    _, one, _ = make_pair(GuestConfig())
    point, interrupted = 0, True
    while interrupted:
        interrupted = False
        try:
            with interrupted_at(point, *NETWORK_CLIENT):
                one.nic.query(0x00010106)
        except Interrupted:
            interrupted = True
        assert len(one.nic.query(0x00010106)) == 4
        point += 1
    assert point > 20


def test_another_thread_may_go_on(world: World) -> None:
    """The lock of an interrupted call is free."""
    for point in range(0, 120, 5):
        try:
            with interrupted_at(point, *STORAGE_CLIENT):
                world.device.write_batch(offsets(0), [bytes(BLOCK)] * COUNT)
        except Interrupted:
            pass
        done = threading.Thread(target=lambda: world.device.read(0, BLOCK), daemon=True)
        done.start()
        done.join(30)
        assert not done.is_alive()
