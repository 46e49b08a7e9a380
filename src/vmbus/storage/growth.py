"""How far a guest may make its disk grow in the host: a disk in front of another that counts what is allocated.

A dynamic image, a sparse file and a memory disk take space when the guest first writes somewhere. By default a guest
may fill its disks; `vmbus.hypervisor.Budget.disk_growth` lets it have less.
"""

import errno
import threading
from collections.abc import Iterator
from typing import TypeVar, overload
from uuid import UUID

from vmbus.errors import BudgetExceeded
from vmbus.hypervisor.budget import Allowance
from vmbus.storage.disk import Buffer, Disk, DiskError, Extent

__all__ = ["LimitedDisk", "limited"]

T = TypeVar("T")


class LimitedDisk(Disk):
    """A disk whose growth is charged to a guest: writes that need more space than it may have are refused.

    What the guest gives back (`unmap`) it may use again. The disk is served through Python: every write is looked at.

    Args:
        disk: the disk itself; closing this one closes it.
        allowance: what bytes of growth are charged to (`Meter.disk_growth`).
    """

    def __init__(self, disk: Disk, allowance: Allowance) -> None:
        self.disk = disk
        self._allowance = allowance
        self._lock = threading.RLock()  # the thread that waits for a redirected disk may begin another write
        self.sector_size = disk.sector_size
        self.physical_sector_size = disk.physical_sector_size
        self.read_only = disk.read_only
        self.unmap_granularity = disk.unmap_granularity
        self.identifier: UUID | None = disk.identifier

    @property
    def sector_count(self) -> int:  # type: ignore[override]
        """Of the disk itself, which may change."""
        return self.disk.sector_count

    def read(self, offset: int, length: int) -> bytes:
        """See `Disk.read`."""
        return self.disk.read(offset, length)

    def write(self, offset: int, data: Buffer) -> None:
        """See `Disk.write`.

        Raises:
            DiskError: with ``errno.ENOSPC``, the guest has no more space; nothing was written.
        """
        with self._growing(offset, memoryview(data).nbytes):
            self.disk.write(offset, data)

    def write_through(self, offset: int, data: Buffer) -> None:
        """See `Disk.write_through`; as `write`."""
        with self._growing(offset, memoryview(data).nbytes):
            self.disk.write_through(offset, data)

    def write_zeros(self, offset: int, length: int) -> None:
        """See `Disk.write_zeros`; as `write`."""
        with self._growing(offset, length):
            self.disk.write_zeros(offset, length)

    def flush(self) -> None:
        """See `Disk.flush`."""
        self.disk.flush()

    def unmap(self, offset: int, length: int) -> None:
        """See `Disk.unmap`."""
        self.check(offset, length, writing=True)
        with self._lock:
            before = self._allocated(offset, length)
            self.disk.unmap(offset, length)
            self._allowance.adjust(self._allocated(offset, length) - before)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """See `Disk.extents`."""
        return self.disk.extents(offset, length)

    def own_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """See `Disk.own_extents`."""
        return self.disk.own_extents(offset, length)

    def close(self) -> None:
        """Close the disk itself."""
        self.disk.close()

    def __repr__(self) -> str:
        return f"<LimitedDisk of {self.disk!r}>"

    def _growing(self, offset: int, length: int) -> "_Growth":
        self.check(offset, length, writing=True)
        return _Growth(self, offset, length)

    def _block(self, offset: int, length: int) -> tuple[int, int]:
        """The whole units of allocation that a range touches."""
        unit = max(self.unmap_granularity, self.sector_size)
        first = offset - offset % unit
        end = min(offset + length + -(offset + length) % unit, self.size)
        return first, end - first

    def _allocated(self, offset: int, length: int) -> int:
        """Bytes of the units of allocation of a range that take space in the host."""
        return sum(e.length for e in self.disk.own_extents(*self._block(offset, length)) if e.allocated)


class _Growth:
    """A write under way: charged before with what it can allocate, settled after by what it did."""

    __slots__ = ("_at", "_before", "_charged", "_disk")

    def __init__(self, disk: LimitedDisk, offset: int, length: int) -> None:
        self._disk = disk
        self._at = disk._block(offset, length)
        self._before = 0
        self._charged = 0

    def __enter__(self) -> None:
        disk = self._disk
        # Two writes to one new block must not both pay for it, and nobody may give back blocks under one that pays
        # nothing.
        disk._lock.acquire()
        try:
            self._before = disk._allocated(*self._at)
            self._charged = self._at[1] - self._before
            if self._charged:
                disk._allowance.charge(self._charged)
        except BudgetExceeded as error:
            disk._lock.release()
            raise DiskError(f"{disk.disk!r}: {error}", errno.ENOSPC) from error
        except BaseException:
            disk._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            if self._charged:
                grown = self._disk._allocated(*self._at) - self._before
                self._disk._allowance.adjust(grown - self._charged)
        finally:
            self._disk._lock.release()


@overload
def limited(disk: Disk, allowance: Allowance) -> Disk: ...
@overload
def limited(disk: T, allowance: Allowance) -> T | Disk: ...
def limited(disk: T, allowance: Allowance) -> T | Disk:
    """`disk` with its growth charged to `allowance`, if that has a limit; else, and what is no `Disk`, as it is."""
    return LimitedDisk(disk, allowance) if isinstance(disk, Disk) and allowance.limit is not None else disk
