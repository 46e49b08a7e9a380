"""A disk that is itself virtual: the backend of a provider in a partition that owns no disk.

The partition got a virtual disk from its own parent. What its children ask of the disk it gives them is sent on, as
new requests of its own, through the client in that partition; hop by hop, until a partition is reached that owns
the physical device. Nothing in a hop knows how many follow.

    child = StorageVsp({(0, 0): RedirectDisk(vsc.disk(), pages)})      # in the partition in the middle
"""

import errno
import threading
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from vmbus.core.memory import PAGE_SIZE
from vmbus.errors import DeviceError, LocalProtocolError, RingError, VmbusError
from vmbus.storage.disk import Buffer, Disk, DiskError, Extent, merged
from vmbus.storage.scsi.codes import AdditionalSense, SenseKey
from vmbus.storage.vsc import ClientBusy
from vmbus.trace.ledger import Account

if TYPE_CHECKING:
    from vmbus.core.blockio import Requests
    from vmbus.storage.guest_disk import StorageDisk

__all__ = ["BlockDevice", "RedirectDisk"]


@runtime_checkable
class BlockDevice(Protocol):
    """A guest's block device, whatever it is reached through: enlightened storage or an emulated controller.

    A device may also have ``physical_sector_size``, ``write_through(offset, data)``, ``unmap(offset, length)`` (which
    must leave zeros) and ``lba_status(offset, length)``: the first states of allocation within a range.
    """

    sector_size: int
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`."""

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at `offset`."""

    def flush(self) -> None:
        """Return when everything written before is durable."""


class RedirectDisk(Disk):
    """A block device of this partition as the disk of a child of it.

    When the way to the physical disk is gone (a host that does not answer, a closed channel), the request that
    notices fails after the client's timeout, and all later ones fail at once: a chain never hangs.

    Args:
        device: a block device of this partition, usually a `vmbus.storage.StorageDisk`.
        pages: page numbers of this partition's own memory, used by nobody else, that a `StorageDisk` may move data
            through. With them a child's requests are sent on as batches in compiled code, with data copied once
            a hop; without them each is sent on by itself.
        read_only: refuse writes here already.
        account: counts the requests sent on as backend calls.

    Raises:
        LocalProtocolError: the device's geometry is not one that a disk can have.
    """

    def __init__(
        self,
        device: "BlockDevice | StorageDisk",
        pages: Sequence[int] = (),
        *,
        read_only: bool = False,
        account: Account | None = None,
    ) -> None:
        if (
            device.sector_size not in (512, 2048, 4096)
            or device.size <= 0
            or device.size % device.sector_size
        ):
            raise LocalProtocolError(f"a device of {device.size} bytes in sectors of {device.sector_size}")
        self.device = device
        self.account = Account() if account is None else account
        self.sector_size = device.sector_size
        self.physical_sector_size = getattr(device, "physical_sector_size", device.sector_size)
        self.sector_count = device.size // device.sector_size
        self.read_only = read_only
        thin = getattr(device, "thin", True)
        self._unmap = getattr(device, "unmap", None) if thin else None
        self._status = getattr(device, "lba_status", None) if thin else None
        self._write_through = getattr(device, "write_through", None)
        if self._unmap is not None:
            self.unmap_granularity = max(PAGE_SIZE, self.physical_sector_size)
        self._failure: DiskError | None = None
        self._pages = array("Q", pages)
        self._pages_lock = threading.Lock()
        self._batching = 0  # the thread that has the lock
        self._pages_in_use = False  # by the host, after an exception
        if pages and hasattr(device, "transfer_batch"):
            self.serve_batch = self._serve_batch

    def read(self, offset: int, length: int) -> bytes:
        """See `Disk.read`."""
        self.check(offset, length)
        with _Hop(self, "read", offset):
            data = self.device.read(offset, length)
        if len(data) != length:
            raise DiskError(f"the device behind gave {len(data)} of {length} bytes", errno.EIO)
        return data

    def write(self, offset: int, data: Buffer) -> None:
        """See `Disk.write`."""
        self.check(offset, len(data), writing=True)
        with _Hop(self, "write", offset):
            self.device.write(offset, data)

    def write_through(self, offset: int, data: Buffer) -> None:
        """See `Disk.write_through`; a device that knows forced unit access is asked for it."""
        if self._write_through is None:
            super().write_through(offset, data)
            return
        self.check(offset, len(data), writing=True)
        with _Hop(self, "write", offset):
            self._write_through(offset, data)

    def flush(self) -> None:
        """See `Disk.flush`; it is the physical disk that is flushed."""
        with _Hop(self, "flush", 0):
            self.device.flush()

    def unmap(self, offset: int, length: int) -> None:
        """See `Disk.unmap`."""
        if self._unmap is None:
            self.write_zeros(offset, length)
            return
        self.check(offset, length, writing=True)
        if length:
            with _Hop(self, "unmap", offset):
                self._unmap(offset, length)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """See `Disk.extents`; the holes are those of the physical disk."""
        self.check(offset, length)
        return merged(self._states(offset, length))

    def _states(self, offset: int, length: int) -> Iterator[Extent]:
        at, end = offset, offset + length
        while at < end:
            found = [Extent(at, end - at, True)]
            if self._status is not None:
                with _Hop(self, "query", at):
                    found = self._status(at, end - at)
            yield from found
            at = found[-1].offset + found[-1].length

    def close(self) -> None:
        """Refuse all further requests; the device belongs to the partition and stays open."""
        self._failure = self._failure or DiskError("the redirected disk is closed", errno.EBADF)

    def _serve_batch(self, requests: "Requests") -> int:
        """See `Disk.serve_batch`."""
        device: StorageDisk = self.device  # type: ignore[assignment]  # it has `transfer_batch`
        if self._failure is not None:
            raise self._failure
        length = requests.length
        each = -(-length // PAGE_SIZE)
        most = len(self._pages) // each
        here = threading.get_ident()
        if length > device.vsc.max_transfer or not most or self._batching == here:
            return 0  # (a thread that waits for one guest's batch may begin another's: that one goes without pages)
        with self._pages_lock, _Hop(self, "batch", requests.offsets[0]) as hop:
            self._batching = here
            try:
                return self._send_on(requests, hop, most, each)
            finally:
                self._batching = 0

    def _send_on(self, requests: "Requests", hop: "_Hop", most: int, each: int) -> int:
        """Send requests on, at most `most` at once with `each` pages of ours for their data; how many were done."""
        device: StorageDisk = self.device  # type: ignore[assignment]  # it has `transfer_batch`
        memory = device.vsc.channels[0].memory
        offsets, length, count, done = requests.offsets, requests.length, len(requests), 0
        if self._pages_in_use:
            device.vsc.settle()
        self._pages_in_use = True
        while done < count:
            part = min(most, count - done)
            pfns = self._pages[: part * each]
            if requests.write:
                requests.transfer(memory, pfns, done, part)
            hop.requests = part
            failed = device.transfer_batch(offsets[done : done + part], pfns, length, write=requests.write)
            good = failed[0] if failed else part
            if good and not requests.write:
                requests.transfer(memory, pfns, done, good)
            done += good
            if failed:
                break
        self._pages_in_use = False
        return done


class _Hop:
    """Around a use of the device behind: counts it, and turns every failure into a `DiskError`."""

    def __init__(self, disk: RedirectDisk, what: str, offset: int) -> None:
        self._disk = disk
        self._what = what
        self._offset = offset
        self.requests = 1

    def __enter__(self) -> "_Hop":
        if self._disk._failure is not None:
            raise self._disk._failure
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._disk.account.backend_calls += self.requests
        if error is None or not isinstance(error, VmbusError) or isinstance(error, DiskError):
            return
        # Not this request failed, but the way to the disk.
        lost = isinstance(error, RingError) or (
            isinstance(error, DeviceError) and not hasattr(error, "sense")
        )
        number = errno.ENOTCONN if lost else _error_number(error)
        failure = DiskError(f"redirected {self._what} at byte {self._offset} failed: {error}", number)
        if lost:
            self._disk._failure = failure
        raise failure from error


def _error_number(error: VmbusError) -> int:
    """The host error number that leads to the status and sense data which the hop behind reported."""
    sense = getattr(error, "sense", None)
    if isinstance(error, ClientBusy):
        return errno.EBUSY
    if sense is None:
        return errno.EIO
    if sense.key == SenseKey.DATA_PROTECT:
        if sense.additional == AdditionalSense.SPACE_ALLOCATION_FAILED:
            return errno.ENOSPC
        return errno.EROFS
    if sense.additional == AdditionalSense.LOGICAL_UNIT_COMMUNICATION_FAILURE:
        return errno.ENOTCONN
    return errno.EIO
