"""A SCSI data buffer in guest memory, as the GPA ranges of a request describe it."""

from vmbus.core.memory import GpaRanges, GuestMemory
from vmbus.storage.disk import Buffer

__all__ = ["GuestBuffer"]


class GuestBuffer:
    """The first `length` bytes of the guest's ranges; file transfers go to guest pages without a copy.

    Args:
        memory: the guest's memory.
        ranges: the ranges, already copied out of the ring; None if the request has no data.
        length: bytes of them that the request uses, at most their total.
    """

    __slots__ = ("_memory", "_ranges", "length")

    def __init__(self, memory: GuestMemory, ranges: GpaRanges | None, length: int) -> None:
        self._memory = memory
        self._ranges = ranges
        self.length = length if ranges is not None else 0

    def fetch(self, offset: int, length: int) -> bytes:
        """A copy of the guest's data."""
        if self._ranges is None or not length:
            return b""
        return self._ranges.read(self._memory, offset, length)

    def store(self, offset: int, data: Buffer) -> None:
        """Copy data to the guest."""
        if self._ranges is not None and len(data):
            self._ranges.write(self._memory, data, offset)

    def read_file(self, fd: int, file_offset: int, offset: int, length: int) -> int:
        """``preadv`` from a host file into guest pages."""
        assert self._ranges is not None
        return self._ranges.preadv(self._memory, fd, file_offset, offset, length)

    def write_file(self, fd: int, file_offset: int, offset: int, length: int) -> int:
        """``pwritev`` from guest pages into a host file."""
        assert self._ranges is not None
        return self._ranges.pwritev(self._memory, fd, file_offset, offset, length)
