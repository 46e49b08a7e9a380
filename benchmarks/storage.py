"""Disk reads through the storage channel, beside preadv loops that read the same blocks into the same guest pages.

The image is on a tmpfs where there is one, so that the path is measured and not a disk. Guest and host run on one
thread; doorbells are rung as usual, except in the loop without the GIL, where both ends poll.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Case, Comparison, Row, Run, Target, faster, rows_of, share, timed
from benchmarks.native import compiled
from vmbus.bus.channel import loopback
from vmbus.core.blockio import BlockClient, BlockServer, run_without_gil
from vmbus.core.memory import PAGE_SIZE, GuestMemory
from vmbus.storage.disk import Buffer, Disk, MemoryDisk, RawDisk
from vmbus.storage.images import create_vhdx
from vmbus.storage.vsc import StorageVsc
from vmbus.storage.vsp import StorageVsp

IMAGE_BYTES = 64 << 20
DEPTH = 32
CHUNK = 1024
"""Requests of one batch of the client; their pages are used again every `DEPTH` requests."""
RING_PAGES = 32

Offsets = NDArray[np.uint64]


class PythonDisk(Disk):
    """A backend in Python: the file behind it is read with ``os.pread`` for every request."""

    def __init__(self, disk: RawDisk) -> None:
        self._fd = disk.fd
        self.sector_size, self.sector_count = disk.sector_size, disk.sector_count
        self.physical_sector_size, self.read_only = disk.physical_sector_size, True

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset)

    def write(self, offset: int, data: Buffer) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class Work:
    """An image, a guest's memory, and which blocks go to which pages."""

    def __init__(self, length: int, *, sequential: bool = False) -> None:
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self._folder = tempfile.TemporaryDirectory(prefix="vmbus-", dir=folder)
        self.folder = self._folder.name
        path = Path(self.folder, "image")
        path.write_bytes(os.urandom(1 << 20) * (IMAGE_BYTES >> 20))
        self.disk = RawDisk(path, read_only=True)
        self.memory = GuestMemory(64 << 20)
        self.length = length
        blocks = IMAGE_BYTES // length
        random = Random(length)
        numbers = list(range(blocks)) if sequential else random.choices(range(blocks), k=8 * CHUNK)
        self.offsets: Offsets = np.array(numbers, dtype=np.uint64) * np.uint64(length)
        each = length // PAGE_SIZE
        first = [16 + index % DEPTH * each for index in range(CHUNK)]
        self.first_pages: Offsets = np.array(first, dtype=np.uint64)
        self.pfns: Offsets = np.array([page + i for page in first for i in range(each)], dtype=np.uint64)

    def close(self) -> None:
        self.disk.close()
        self._folder.cleanup()

    def batches(self, count: int) -> Iterator[Offsets]:
        """`count` offsets in batches of at most `CHUNK`."""
        at = 0
        while count > 0:
            part = self.offsets[at : at + min(CHUNK, count)]
            yield part
            count -= len(part)
            at = at + len(part) if at + len(part) < len(self.offsets) else 0

    def check(self, read: Callable[[Offsets], object]) -> None:
        """Make sure once that `read` brings the image's blocks to the pages."""
        some = self.offsets[:DEPTH]
        self.memory.write(16 << 12, bytes(DEPTH * self.length))
        read(some)
        for index, offset in enumerate(some.tolist()):
            page = int(self.first_pages[index])
            if self.memory.read(page << 12, self.length) != self.disk.read(offset, self.length):
                raise AssertionError("the guest read something else than the image holds")


_shared: dict[Callable[[], Work], tuple[Work, int]] = {}
"""Work that is open, by its maker, with the number of its users."""


@contextmanager
def shared(make: Callable[[], Work]) -> Iterator[Work]:
    """One image and one guest memory for all contestants of a comparison: other pages would be other work."""
    work, users = _shared.get(make) or (make(), 0)
    _shared[make] = work, users + 1
    try:
        yield work
    finally:
        users = _shared[make][1] - 1
        _shared[make] = work, users
        if not users:
            del _shared[make]
            work.close()


@contextmanager
def opened(
    make: Callable[[], Work], contestant: Callable[[Work], Callable[[Offsets], object]]
) -> Iterator[Run]:
    with shared(make) as work:
        read = contestant(work)
        work.check(read)

        def run(count: int) -> None:
            for part in work.batches(count):
                read(part)

        yield timed(run)


def through_channel(work: Work, disk: Callable[[Work], Disk]) -> Callable[[Offsets], object]:
    """The whole path: client, rings, doorbells, provider, disk."""
    guest, host = loopback(work.memory, RING_PAGES, RING_PAGES)
    provider = StorageVsp({(0, 0): disk(work)}, max_transfer=1 << 20)
    provider.open(host)
    client = StorageVsc(guest, range(8192, 8448))
    client.connect()
    device = client.disk()
    device.queue_depth = DEPTH

    def read(offsets: Offsets) -> None:
        if device.transfer_batch(offsets, work.pfns, work.length, write=False):
            raise AssertionError("a read failed")

    return read


def without_gil(work: Work) -> Callable[[Offsets], object]:
    """Client and server in one loop of compiled code; both ends poll."""
    guest, host = loopback(work.memory, RING_PAGES, RING_PAGES)
    server = BlockServer(host.incoming, host.outgoing, work.memory)
    server.enable(0, 0, 512, work.disk.sector_count, False, fd=work.disk.fd)
    client = BlockClient(guest.outgoing, guest.incoming, work.memory, 0, 0, 512, 64)
    first = [1]

    def read(offsets: Offsets) -> None:
        client.begin(offsets, work.pfns, work.length, first[0], False, DEPTH)
        first[0] += len(offsets)
        if run_without_gil(client, server) != len(offsets) or client.failures():
            raise AssertionError("a read failed")

    return read


def bare_c(work: Work) -> Callable[[Offsets], object]:
    """preadv in a C loop."""
    loop = compiled("diskloop").read_all
    fd, base, length, pages = work.disk.fd, work.memory.address, work.length, work.first_pages

    def read(offsets: Offsets) -> None:
        if loop(fd, offsets, pages, base, length) != len(offsets) * length:
            raise AssertionError("a short read")

    return read


def bare_python(work: Work) -> Callable[[Offsets], object]:
    """``os.preadv`` in a Python loop."""
    fd, length = work.disk.fd, work.length
    views = [work.memory.view(int(page) << 12, length) for page in work.first_pages]

    def read(offsets: Offsets) -> None:
        preadv = os.preadv
        for offset, view in zip(offsets.tolist(), views, strict=False):
            preadv(fd, (view,), offset)

    return read


def file_disk(work: Work) -> Disk:
    return work.disk


def memory_disk(work: Work) -> Disk:
    return MemoryDisk(IMAGE_BYTES, content=work.disk.read(0, IMAGE_BYTES), read_only=True)


def vhdx_disk(work: Work) -> Disk:
    disk = create_vhdx(Path(work.folder, "image.vhdx"), IMAGE_BYTES)
    disk.write(0, work.disk.read(0, IMAGE_BYTES))
    return disk


def python_disk(work: Work) -> Disk:
    return PythonDisk(work.disk)


RANDOM_4K = partial(Work, 4096)
SEQUENTIAL_64K = partial(Work, 65536, sequential=True)


def _case(
    name: str, make: Callable[[], Work], contestant: Callable[[Work], Callable[[Offsets], object]]
) -> Case:
    return Case(name, partial(opened, make, contestant))


def _against_preadv(
    what: str,
    make: Callable[[], Work],
    ours: tuple[str, Callable[[Work], Callable[[Offsets], object]]],
    target: Target,
) -> Comparison:
    return Comparison(
        what, _case(ours[0], make, ours[1]), [(_case("os.preadv loop", make, bare_python), target)]
    )


COMPARISONS = [
    Comparison(
        "4 KiB random read, QD 32, nogil",
        _case("client + provider, polled", RANDOM_4K, without_gil),
        [(_case("C preadv loop", RANDOM_4K, bare_c), share(0.75))],
    ),
    _against_preadv(
        "4 KiB random read, QD 32",
        RANDOM_4K,
        ("Python handler", partial(through_channel, disk=python_disk)),
        share(0.60),
    ),
    _against_preadv(
        "4 KiB random read, QD 32",
        RANDOM_4K,
        ("raw image", partial(through_channel, disk=file_disk)),
        share(0.60),
    ),
    _against_preadv(
        "4 KiB random read, QD 32",
        RANDOM_4K,
        ("VHDX image", partial(through_channel, disk=vhdx_disk)),
        share(0.60),
    ),
    _against_preadv(
        "64 KiB sequential read, QD 32",
        SEQUENTIAL_64K,
        ("raw image", partial(through_channel, disk=file_disk)),
        share(0.80),
    ),
    _against_preadv(
        "4 KiB random read, QD 32",
        RANDOM_4K,
        ("memory disk", partial(through_channel, disk=memory_disk)),
        faster(1.5),
    ),
]


def rows(quick: bool) -> Iterator[Row]:
    """The rows of storage."""
    return rows_of(COMPARISONS, quick)
