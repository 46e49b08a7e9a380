"""A disk at the end of a chain of partitions, each of which only has what its parent gives it."""

import errno
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from reference.disk_model import apply, operations

from vmbus.bus.channel import Channel, loopback
from vmbus.core.memory import GuestMemory
from vmbus.errors import DeviceError, LocalProtocolError
from vmbus.storage.disk import Buffer, Disk, DiskError, MemoryDisk, RawDisk
from vmbus.storage.guest_disk import StorageDisk
from vmbus.storage.images import create_vhdx, open_disk
from vmbus.storage.redirect import RedirectDisk
from vmbus.storage.scsi.codes import AdditionalSense, SenseKey
from vmbus.storage.vsc import CommandError, StorageVsc
from vmbus.storage.vsp import StorageVsp
from vmbus.trace.ledger import Account

MIB = 1 << 20
SIZE = 4 * MIB


class Hop(NamedTuple):
    """One partition of the chain: its device, and the host's end of its channel."""

    device: StorageDisk
    provider: StorageVsp
    host: Channel
    accounts: tuple[Account, Account]
    redirect: RedirectDisk | None


PATIENCE = 60.0
"""Seconds that a client waits in tests of what must come at once, however busy the machine is."""


class Chain:
    """Partitions that get their disk from each other; `hops[0]` is the child of the one that owns the disk."""

    def __init__(
        self, disk: Disk, depth: int, *, batches: bool = True, timeout: float = 5.0, workers: int = 0
    ) -> None:
        self.hops: list[Hop] = []
        backend, redirect = disk, None
        for _ in range(depth):
            guest_account, host_account = Account(), Account()
            guest, host = loopback(
                GuestMemory(8 * MIB), 16, 16, guest_account=guest_account, host_account=host_account
            )
            provider = StorageVsp({(0, 0): backend}, workers=workers)
            provider.open(host)
            client = StorageVsc(guest, range(16, 1024), timeout=timeout)
            client.connect()
            hop = Hop(client.disk(), provider, host, (guest_account, host_account), redirect)
            self.hops.append(hop)
            backend = redirect = RedirectDisk(hop.device, range(1024, 1280) if batches else ())

    @property
    def device(self) -> StorageDisk:
        return self.hops[-1].device

    def close(self) -> None:
        for hop in reversed(self.hops):
            hop.provider.shutdown()
            if hop.host.is_open:
                hop.host.close()


@pytest.fixture
def chains() -> Iterator[list[Chain]]:
    made: list[Chain] = []
    yield made
    for chain in made:
        chain.close()


@pytest.mark.parametrize("batches", [True, False], ids=["batches", "single"])
@pytest.mark.parametrize("depth", [1, 2, 3, 8])
def test_data_are_the_same_at_every_depth(chains: list[Chain], depth: int, batches: bool) -> None:
    disk = MemoryDisk(SIZE, physical_sector_size=4096)
    chain = Chain(disk, depth, batches=batches)
    chains.append(chain)
    device, rnd = chain.device, random.Random(depth)
    assert (device.size, device.sector_size, device.physical_sector_size) == (SIZE, 512, 4096)
    model = bytearray(rnd.randbytes(SIZE))
    for at in range(0, SIZE, MIB):
        device.write(at, model[at : at + MIB])
    for length in (512, 4096, 24 * 512):
        offsets = rnd.sample(range(0, SIZE - length, 24 * 512), 100)
        pieces = [rnd.randbytes(length) for _ in offsets]
        device.write_batch(offsets, pieces)
        for offset, piece in zip(offsets, pieces, strict=True):
            model[offset : offset + length] = piece
        assert device.read_batch(offsets, length) == pieces
    device.unmap(8192, 65536)
    model[8192 : 8192 + 65536] = bytes(65536)
    device.flush()
    assert disk.read(0, SIZE) == model
    assert b"".join(device.read(at, MIB) for at in range(0, SIZE, MIB)) == model


@settings(max_examples=8, deadline=None)
@given(operations(2048, 64))
def test_random_work_over_three_hops(work: list[tuple[str, int, int, int]]) -> None:
    chain = Chain(MemoryDisk(MIB), 3)
    last = RedirectDisk(chain.device)  # so that it can be asked like any disk
    model = bytearray(MIB)
    for operation in work:
        apply(last, model, operation)
    assert last.read(0, MIB) == model
    chain.close()


@pytest.mark.parametrize("kind", ["raw", "vhdx"])
def test_holes_are_seen_and_made_through_three_hops(chains: list[Chain], tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image"
    disk = RawDisk.create(path, SIZE) if kind == "raw" else create_vhdx(path, SIZE, block_size=MIB)
    chain = Chain(disk, 3)
    chains.append(chain)
    last = RedirectDisk(chain.device)
    assert [tuple(extent) for extent in last.extents(0, SIZE)] == [(0, SIZE, False)]
    for at in range(3):
        chain.device.write(at * MIB, b"\xcd" * MIB)
    chain.device.flush()
    before = path.stat().st_blocks
    assert list(last.extents(0, SIZE)) == list(disk.extents(0, SIZE)) == list(chain.device.extents(0, SIZE))
    assert [extent.allocated for extent in last.extents(0, SIZE)] == [True, False]
    chain.device.unmap(MIB, MIB)
    chain.device.flush()
    assert [tuple(extent) for extent in last.extents(512, SIZE - 1024)] == [
        (512, MIB - 512, True),
        (MIB, MIB, False),
        (2 * MIB, MIB, True),
        (3 * MIB, MIB - 512, False),
    ]
    assert path.stat().st_blocks <= before - MIB // 512
    # What the last hop's own child would be told.
    assert [tuple(extent) for extent in chain.hops[0].device.lba_status(0, SIZE)][:2] == [
        (0, MIB, True),
        (MIB, MIB, False),
    ]


def test_more_holes_than_one_answer_tells_of(chains: list[Chain]) -> None:
    disk = MemoryDisk(SIZE)
    chain = Chain(disk, 2)
    chains.append(chain)
    for at in range(0, SIZE, 8192):
        chain.device.write(at, b"\x01" * 4096)
    holes = list(RedirectDisk(chain.device).extents(0, SIZE))
    assert holes == list(disk.extents(0, SIZE))
    assert len(holes) == SIZE // 4096 > 2 * 255


def test_forced_unit_access_reaches_the_disk_as_such(chains: list[Chain]) -> None:
    class Recording(MemoryDisk):
        def __init__(self) -> None:
            super().__init__(SIZE)
            self.calls: list[str] = []

        def write_through(self, offset: int, data: Buffer) -> None:
            self.calls.append("write through")
            super().write_through(offset, data)

        def flush(self) -> None:
            self.calls.append("flush")

    disk = Recording()
    chain = Chain(disk, 3)
    chains.append(chain)
    chain.device.write(4096, b"\x05" * 512, fua=True)
    assert disk.calls == ["write through"]
    assert disk.read(4096, 512) == b"\x05" * 512


def test_a_vhdx_behind_three_hops_keeps_what_was_flushed(chains: list[Chain], tmp_path: Path) -> None:
    path = tmp_path / "image.vhdx"
    with create_vhdx(path, SIZE, block_size=MIB) as image:
        chain = Chain(image, 3)
        chains.append(chain)
        chain.device.write(3 * MIB - 4096, b"\xab" * 8192)
        chain.device.unmap(0, MIB)
        chain.device.flush()
        chain.close()
    with open_disk(path, read_only=True) as image:
        assert image.read(3 * MIB - 4096, 8192) == b"\xab" * 8192
        assert [extent.allocated for extent in image.extents(0, SIZE)] == [False, True, False]


def test_every_hop_counts_its_own_part(chains: list[Chain], tmp_path: Path) -> None:
    disk = RawDisk.create(tmp_path / "image", SIZE)
    chain = Chain(disk, 3)
    chains.append(chain)
    before = [(hop.accounts[0].copy(), hop.accounts[1].copy()) for hop in chain.hops]
    sent = [hop.redirect.account.copy() for hop in chain.hops if hop.redirect is not None]
    chain.device.read_batch([at * 4096 for at in range(200)], 4096)
    for hop, (guest, host) in zip(chain.hops, before, strict=True):
        assert (hop.accounts[0] - guest).packets_sent == 200
        assert (hop.accounts[0] - guest).packets_received == 200
        assert (hop.accounts[1] - host).backend_calls == 200
    copied = [
        (hop.accounts[1] - host).bytes_copied for hop, (_, host) in zip(chain.hops, before, strict=True)
    ]
    assert copied == [
        0,
        200 * 4096,
        200 * 4096,
    ]  # the owner of the disk reads straight into its child's pages
    redirects = [hop.redirect for hop in chain.hops if hop.redirect is not None]
    assert [(r.account - s).backend_calls for r, s in zip(redirects, sent, strict=True)] == [200, 200]


class Failing(Disk):
    """Fails where it is told to; has no file descriptor, so that nobody goes round its methods."""

    def __init__(self) -> None:
        self.content = bytearray(random.Random(1).randbytes(SIZE))
        self.sector_size = self.physical_sector_size = 512
        self.sector_count = SIZE // 512
        self.read_only = False
        self.bad = range(0)
        self.error = errno.EIO

    def _check_bad(self, offset: int, length: int) -> None:
        if offset < self.bad.stop and offset + length > self.bad.start:
            raise DiskError("no luck here", self.error)

    def read(self, offset: int, length: int) -> bytes:
        self._check_bad(offset, length)
        return bytes(self.content[offset : offset + length])

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._check_bad(offset, len(data))
        self.content[offset : offset + len(data)] = data

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("batches", [True, False], ids=["batches", "single"])
def test_an_error_of_the_medium_arrives_as_one(chains: list[Chain], batches: bool) -> None:
    disk = Failing()
    content = bytes(disk.content)
    chain = Chain(disk, 3, batches=batches)
    chains.append(chain)
    disk.bad = range(40960, 45056)
    with pytest.raises(CommandError) as caught:
        chain.device.read(40960, 4096)
    assert caught.value.sense is not None
    assert (caught.value.sense.key, caught.value.sense.additional) == (
        SenseKey.MEDIUM_ERROR,
        AdditionalSense.UNRECOVERED_READ_ERROR,
    )
    with pytest.raises(CommandError):
        chain.device.read_batch([at * 4096 for at in range(20)], 4096)
    good = [at * 4096 for at in range(20) if at != 10]
    assert chain.device.read_batch(good, 4096) == [content[at : at + 4096] for at in good]


def test_a_full_disk_at_the_end_of_the_chain_is_a_full_disk_at_its_start(chains: list[Chain]) -> None:
    disk = Failing()
    chain = Chain(disk, 3)
    chains.append(chain)
    disk.bad, disk.error = range(8192, 12288), errno.ENOSPC
    with pytest.raises(CommandError) as caught:
        chain.device.write(8192, bytes(4096))
    assert caught.value.sense is not None
    assert (caught.value.sense.key, caught.value.sense.additional) == (
        SenseKey.DATA_PROTECT,
        AdditionalSense.SPACE_ALLOCATION_FAILED,
    )
    chain.device.write(0, bytes(4096))


def test_a_read_only_disk_is_read_only_through_the_chain(chains: list[Chain]) -> None:
    chain = Chain(MemoryDisk(SIZE, read_only=True), 2)
    chains.append(chain)
    with pytest.raises(CommandError) as caught:
        chain.device.write(0, bytes(512))
    assert caught.value.sense is not None
    assert caught.value.sense.key == SenseKey.DATA_PROTECT
    assert chain.device.read(0, 512) == bytes(512)


@pytest.mark.parametrize("batches", [True, False], ids=["batches", "single"])
@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_hop_that_closes_its_channel_gives_errors_at_once(
    chains: list[Chain], dead: int, batches: bool
) -> None:
    chain = Chain(MemoryDisk(SIZE), 3, batches=batches, timeout=PATIENCE)
    chains.append(chain)
    assert chain.device.read_batch([0, 4096], 4096) == [bytes(4096)] * 2
    chain.hops[dead].host.close()
    # To use one's own closed channel is a mistake of one's own, to which a client says so.
    gone = DeviceError if dead < 2 else (DeviceError, LocalProtocolError)
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(gone):
            chain.device.read(0, 4096)
        with pytest.raises(gone):
            chain.device.write_batch([0, 8192], [bytes(4096)] * 2)
        with pytest.raises(gone):
            chain.device.flush()
        with pytest.raises(gone):
            list(chain.device.extents(0, SIZE))
    assert time.monotonic() - began < PATIENCE, "a client waited"


@pytest.mark.parametrize("batches", [True, False], ids=["batches", "single"])
def test_a_hop_that_falls_silent_is_given_up_once(chains: list[Chain], batches: bool) -> None:
    chain = Chain(MemoryDisk(SIZE), 3, batches=batches, timeout=0.3)
    chains.append(chain)
    chain.hops[0].host.on_signal = None  # the provider next to the disk serves nobody any more
    with pytest.raises(DeviceError):
        chain.device.read_batch([0, 4096, 8192], 4096)
    for hop in chain.hops:
        hop.device.vsc.timeout = PATIENCE
    began = time.monotonic()
    for device in (chain.hops[2].device, chain.hops[1].device):
        with pytest.raises(DeviceError) as caught:
            device.read(0, 4096)
        if isinstance(caught.value, CommandError):  # else this client itself has waited too long
            assert caught.value.sense is not None
            assert (caught.value.sense.key, caught.value.sense.additional) == (
                SenseKey.HARDWARE_ERROR,
                AdditionalSense.LOGICAL_UNIT_COMMUNICATION_FAILURE,
            )
    assert time.monotonic() - began < PATIENCE, "a client waited again"


def test_several_children_share_the_redirected_disk() -> None:
    """Two children of the partition in the middle, each with its own channel and thread."""
    disk = MemoryDisk(SIZE)
    middle = Chain(disk, 1)
    shared = RedirectDisk(middle.device, range(1024, 1280))
    ends = []
    for number in range(2):
        guest, host = loopback(GuestMemory(8 * MIB), 16, 16)
        provider = StorageVsp({(0, 0): shared})
        provider.open(host)
        client = StorageVsc(guest, range(16, 1024))
        client.connect()
        ends.append((client.disk(), host, number))
    failures: list[BaseException] = []

    def work(device: StorageDisk, number: int) -> None:
        rnd = random.Random(number)
        half = range(number * SIZE // 2, (number + 1) * SIZE // 2, 4096)
        try:
            for _ in range(15):
                offsets = rnd.sample(half, 40)
                pieces = [rnd.randbytes(4096) for _ in offsets]
                device.write_batch(offsets, pieces)
                assert device.read_batch(offsets, 4096) == pieces
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(device, number)) for device, _, number in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    for _, host, _ in ends:
        host.close()
    middle.close()


def test_random_lengths_mixed_in_one_batch_queue(chains: list[Chain]) -> None:
    """Reads and writes of different lengths wait in the ring together; each run of equal ones is one batch."""
    chain = Chain(MemoryDisk(SIZE), 2, workers=0)
    chains.append(chain)
    device, rnd = chain.device, random.Random(3)
    model = bytearray(SIZE)
    for _ in range(60):
        length = rnd.choice([512, 1024, 4096, 12288])
        offsets = rnd.sample(range(0, SIZE - 12288, 12288), rnd.randrange(1, 90))
        if rnd.random() < 0.5:
            pieces = [rnd.randbytes(length) for _ in offsets]
            device.write_batch(offsets, pieces)
            for offset, piece in zip(offsets, pieces, strict=True):
                model[offset : offset + length] = piece
        else:
            assert device.read_batch(offsets, length) == [bytes(model[at : at + length]) for at in offsets]


def test_a_redirected_disk_of_any_other_device() -> None:
    """Whatever has the interface of a guest's block device will do; here one without `unmap`."""

    class Plain:
        sector_size, size = 512, MIB

        def __init__(self) -> None:
            self.data = bytearray(MIB)

        def read(self, offset: int, length: int) -> bytes:
            return bytes(self.data[offset : offset + length])

        def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
            self.data[offset : offset + len(data)] = data

        def flush(self) -> None:
            pass

    disk = RedirectDisk(Plain())
    disk.write(512, b"x" * 1024)
    disk.unmap(1024, 512)
    disk.write_through(4096, b"y" * 512)
    assert disk.unmap_granularity == 0
    assert [tuple(extent) for extent in disk.extents(512, MIB - 512)] == [(512, MIB - 512, True)]
    assert disk.read(0, 2048) == bytes(512) + b"x" * 512 + bytes(1024)
    with pytest.raises(DiskError, match="past the end"):
        disk.read(MIB - 512, 1024)
    disk.close()
    with pytest.raises(DiskError, match="closed"):
        disk.read(0, 512)
