"""A guest that asks a disk for whatever a guest may ask, and looks at what it gets."""

import random
from contextlib import suppress

from vmbus.storage.disk import Disk

MIB = 1 << 20


def use(
    rng: random.Random, disk: Disk, requests: int, *, may_raise: tuple[type[Exception], ...] = ()
) -> None:
    """Some requests; what is written is read back, what is unmapped reads as zeros, the map covers what was asked for.

    Args:
        rng: chooses.
        disk: the disk.
        requests: how many.
        may_raise: errors that are one request's business: the disk is full, say, or the end of its file torn off.
    """
    for _ in range(requests):
        with suppress(*may_raise):
            _request(rng, disk)


def _request(rng: random.Random, disk: Disk) -> None:
    size = disk.sector_size
    at = rng.randrange(disk.sector_count) * size
    length = min(rng.choice([size, 8 * size, MIB]), disk.size - at)
    what = rng.randrange(5)
    if what == 0:
        assert len(disk.read(at, length)) == length
    elif what == 1 and not disk.read_only:
        data = rng.randbytes(length)
        disk.write(at, data)
        assert disk.read(at, length) == data
    elif what == 2 and not disk.read_only:
        disk.unmap(at, length)
        assert not any(disk.read(at, length))
    elif what == 3:
        disk.flush()
    else:
        assert sum(extent.length for extent in disk.extents(at, length)) == length
