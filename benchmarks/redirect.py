"""What a hop of the redirect chain costs: the same reads of the same raw image through one, two, four and eight hops.

The first hop is the whole way to a disk: client, rings, doorbells, provider, ``preadv``. Every further one adds a
partition whose provider sends what its child asks for on to the provider it is itself a client of.
"""

from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.harness import Case, Comparison, Row, Target, rows_of
from benchmarks.storage import DEPTH, RANDOM_4K, RING_PAGES, SEQUENTIAL_64K, Offsets, Work, opened
from vmbus.bus.channel import loopback
from vmbus.core.memory import GuestMemory
from vmbus.storage.disk import Disk
from vmbus.storage.redirect import RedirectDisk
from vmbus.storage.vsc import StorageVsc
from vmbus.storage.vsp import StorageVsp

MEMORY = 16 << 20
"""Bytes of a partition in the middle."""


def through_hops(work: Work, *, hops: int) -> Callable[[Offsets], object]:
    """Reads by the last of `hops` partitions; each but the first has its disk from the one before."""
    backend: Disk = work.disk
    for hop in range(hops):
        last = hop == hops - 1
        memory = work.memory if last else GuestMemory(MEMORY)
        guest, host = loopback(memory, RING_PAGES, RING_PAGES)
        StorageVsp({(0, 0): backend}, max_transfer=1 << 20).open(host)
        client = StorageVsc(guest, range(8192, 8448) if last else range(16, 272))
        client.connect()
        device = client.disk()
        device.queue_depth = DEPTH
        if not last:
            backend = RedirectDisk(device, range(1024, 1024 + DEPTH * work.length // 4096))

    def read(offsets: Offsets) -> None:
        if device.transfer_batch(offsets, work.pfns, work.length, write=False):
            raise AssertionError("a read failed")

    return read


def _comparison(what: str, make: Callable[[], Work], hops: int) -> Comparison:
    def case(number: int) -> Case:
        name = f"{number} hops" if number > 1 else "1 hop"
        return Case(name, partial(opened, make, partial(through_hops, hops=number)))

    return Comparison(
        f"{what}, QD {DEPTH}, redirected",
        case(hops),
        [(case(1), Target(f"≤ {hops} × its time: no hop costs more than the first", speedup=1 / hops))],
    )


COMPARISONS = [
    *(_comparison("4 KiB random read", RANDOM_4K, hops) for hops in (2, 4, 8)),
    _comparison("64 KiB sequential read", SEQUENTIAL_64K, 2),
]


def rows(quick: bool) -> Iterator[Row]:
    """The rows of the redirect chain."""
    return rows_of(COMPARISONS, quick)
