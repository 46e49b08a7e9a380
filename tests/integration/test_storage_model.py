"""The whole storage path against a bytearray: random work, threads on one shared disk, a host disk that is full."""

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vmbus.bus.channel import Channel, loopback
from vmbus.core.memory import GuestMemory
from vmbus.storage.disk import Disk, MemoryDisk, RawDisk
from vmbus.storage.scsi.codes import AdditionalSense, SenseKey
from vmbus.storage.vsc import CommandError, StorageVsc
from vmbus.storage.vsp import StorageVsp
from vmbus.storage.wire import SrbStatus, Version

MIB = 1 << 20
SECTORS = 256
SIZE = SECTORS * 512


class Joined:
    """One guest with one controller."""

    def __init__(self, provider: StorageVsp, versions: tuple[int, ...] = (0x0602,)) -> None:
        self.guest, self.host = loopback(GuestMemory(4 * MIB), 16, 16)
        self.provider = provider
        provider.open(self.host)
        self.client = StorageVsc(self.guest, list(range(500, 100, -3)), versions=versions)
        self.client.connect()

    def close(self) -> None:
        self.provider.shutdown()
        self.guest.close()


sectors = st.integers(0, SECTORS - 1)
counts = st.integers(1, 40)
fills = st.integers(0, 255)


class DiskAgainstBytes(RuleBasedStateMachine):
    """A guest's reads, writes, trims, resets and hot plugging, each compared with a bytearray."""

    @initialize(
        version=st.sampled_from(list(Version)),
        memory=st.booleans(),
        workers=st.sampled_from([0, 0, 1]),
    )
    def start(self, version: int, memory: bool, workers: int) -> None:
        self.disk: Disk = MemoryDisk(SIZE)
        self.file = self.disk.fd
        if not memory:  # the short cut by file descriptor instead of the one by mapped memory
            self.disk.mapping = None
        self.joined = Joined(StorageVsp({(0, 0): self.disk}, workers=workers), (version,))
        self.device = self.joined.client.disk()
        self.model = bytearray(SIZE)
        self.plugged = True

    @rule(at=sectors, count=counts)
    def read(self, at: int, count: int) -> None:
        length = min(count, SECTORS - at) * 512
        if self.plugged:
            assert self.device.read(at * 512, length) == self.model[at * 512 : at * 512 + length]
        else:
            with pytest.raises(CommandError) as caught:
                self.device.read(at * 512, length)
            assert caught.value.srb_status == SrbStatus.INVALID_LUN

    @rule(at=sectors, count=counts, fill=fills, fua=st.booleans())
    def write(self, at: int, count: int, fill: int, fua: bool) -> None:
        if self.plugged:
            data = bytes([fill]) * (min(count, SECTORS - at) * 512)
            self.device.write(at * 512, data, fua=fua)
            self.model[at * 512 : at * 512 + len(data)] = data

    @rule(
        places=st.lists(st.integers(0, SECTORS // 8 - 1), min_size=1, max_size=40), depth=st.integers(1, 40)
    )
    def read_batch(self, places: list[int], depth: int) -> None:
        if self.plugged:
            self.device.queue_depth = depth
            found = self.device.read_batch([place * 4096 for place in places], 4096)
            assert found == [self.model[place * 4096 : place * 4096 + 4096] for place in places]

    @rule(
        places=st.lists(st.integers(0, SECTORS // 8 - 1), min_size=1, max_size=32, unique=True),
        fill=fills,
    )
    def write_batch(self, places: list[int], fill: int) -> None:
        if self.plugged:
            data = [bytes([(fill + n) % 256]) * 4096 for n in range(len(places))]
            self.device.write_batch([place * 4096 for place in places], data)
            for place, piece in zip(places, data, strict=True):
                self.model[place * 4096 : place * 4096 + 4096] = piece

    @rule(at=sectors, count=counts)
    def unmap(self, at: int, count: int) -> None:
        if self.plugged:
            length = min(count, SECTORS - at) * 512
            self.device.unmap(at * 512, length)
            self.model[at * 512 : at * 512 + length] = bytes(length)

    @rule(at=sectors)
    def compare_and_write(self, at: int) -> None:
        if self.plugged:
            old = bytes(self.model[at * 512 : at * 512 + 512])
            new = bytes(byte ^ 0xFF for byte in old)
            cdb = b"\x89\0" + at.to_bytes(8, "big") + b"\0\0\0\1\0\0"
            self.joined.client.check(0, 0, cdb, data_out=old + new)
            self.model[at * 512 : at * 512 + 512] = new

    @rule()
    def flush(self) -> None:
        if self.plugged:
            self.device.flush()

    @rule()
    def reset(self) -> None:
        self.joined.client.reset()

    @rule()
    def unplug(self) -> None:
        if self.plugged:
            self.joined.provider.remove_disk((0, 0))
            self.plugged = False

    @rule()
    def plug(self) -> None:
        if not self.plugged:
            self.joined.provider.add_disk((0, 0), self.disk)
            self.plugged = True

    @invariant()
    def the_disk_holds_the_model(self) -> None:
        if hasattr(self, "model"):
            assert self.disk.read(0, SIZE) == self.model

    def teardown(self) -> None:
        if hasattr(self, "joined"):
            self.joined.close()
            self.disk.close()


DiskAgainstBytes.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestDiskAgainstBytes = DiskAgainstBytes.TestCase


@pytest.mark.parametrize("mapped", [False, True])
def test_compare_and_write_is_atomic_beside_compiled_writes(mapped: bool) -> None:
    """Guests count up one block by compare and swap while others write beside it past the interpreter."""
    disk = MemoryDisk(MIB)
    if not mapped:
        disk.mapping = None
    first = StorageVsp({(0, 0): disk})
    unit = first.units[0, 0]
    guests = [Joined(first), *(Joined(StorageVsp({(0, 0): unit})) for _ in range(3))]
    problems: list[BaseException] = []

    def count(joined: Joined, times: int) -> None:
        device = joined.client.disk()
        while times:
            old = device.read(0, 512)
            new = (int.from_bytes(old[:8], "big") + 1).to_bytes(8, "big").ljust(512, b"\0")
            result = joined.client.execute(0, 0, bytes([0x89] + [0] * 12 + [1, 0, 0]), data_out=old + new)
            if result.good:
                times -= 1
            else:
                assert result.sense is not None
                assert result.sense.key == SenseKey.MISCOMPARE

    def scribble(joined: Joined, place: int) -> None:
        device = joined.client.disk()
        for turn in range(40):
            data = bytes([turn % 251]) * 4096
            device.write_batch([place + n * 4096 for n in range(16)], [data] * 16)
            assert device.read_batch([place + n * 4096 for n in range(16)], 4096) == [data] * 16

    def guarded(work: object, *arguments: object) -> None:
        try:
            work(*arguments)  # type: ignore[operator]
        except BaseException as problem:
            problems.append(problem)

    jobs = [
        (count, guests[0], 40),
        (count, guests[1], 40),
        (scribble, guests[2], 65536),
        (scribble, guests[3], 262144),
    ]
    threads = [threading.Thread(target=guarded, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a deadlock"
    assert not problems
    assert int.from_bytes(disk.read(0, 512)[:8], "big") == 80
    for joined in guests:
        joined.close()
    disk.close()


@contextmanager
def full_host_disk(size: int) -> Iterator[None]:
    """Files cannot grow beyond `size` here: what a full file system says, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # the interpreter ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("batch", [False, True])
def test_a_full_host_disk_is_data_protect_and_the_rest_stays_right(tmp_path: Path, batch: bool) -> None:
    with RawDisk.create(tmp_path / "disk", MIB) as disk:
        joined = Joined(StorageVsp({(0, 0): disk}))
        device = joined.client.disk()
        before = os.urandom(MIB)
        device.write(0, before)
        offsets = [0, MIB // 2 + 4096, 4096] if batch else [MIB // 2 + 4096]
        with full_host_disk(MIB // 2), pytest.raises(CommandError) as caught:
            device.write_batch(offsets, [b"\1" * 4096] * len(offsets))
        sense = caught.value.sense
        assert sense is not None
        assert (sense.key, sense.additional) == (
            SenseKey.DATA_PROTECT,
            AdditionalSense.SPACE_ALLOCATION_FAILED,
        )
        assert device.read(MIB // 2, MIB // 2) == before[MIB // 2 :]
        if batch:
            assert device.read(0, 8192) == b"\1" * 8192
        device.write(MIB - 4096, b"\2" * 4096)  # room again
        assert device.read(MIB - 4096, 4096) == b"\2" * 4096
        joined.close()


def test_a_disk_cut_short_behind_our_back_is_a_medium_error(tmp_path: Path) -> None:
    with RawDisk.create(tmp_path / "disk", MIB) as disk:
        joined = Joined(StorageVsp({(0, 0): disk}))
        device = joined.client.disk()
        os.truncate(tmp_path / "disk", MIB // 2)
        assert device.read(0, 4096) == bytes(4096)
        with pytest.raises(CommandError) as caught:
            device.read_batch([0, MIB // 2], 4096)
        assert caught.value.sense is not None
        assert caught.value.sense.key == SenseKey.MEDIUM_ERROR
        disk.refresh()
        with pytest.raises(CommandError) as caught:
            device.read(MIB // 2, 4096)  # after the unit attention of the changed capacity
        assert caught.value.sense is not None
        assert caught.value.sense.additional == AdditionalSense.LBA_OUT_OF_RANGE
        device.refresh()
        assert device.size == MIB // 2
        joined.close()


def test_a_closed_channel_is_not_served_again() -> None:
    memory = GuestMemory(4 * MIB)
    provider = StorageVsp({(0, 0): MemoryDisk(MIB)})
    channels: list[Channel] = []
    for _ in range(5):
        guest, host = loopback(memory, 4, 4)
        provider.open(host)
        client = StorageVsc(guest, range(64))
        client.connect()
        assert client.disk().read(0, 512) == bytes(512)
        provider.close(host)
        channels.append(host)
        assert host.on_signal is None
        assert not provider.ready
    provider.shutdown()
