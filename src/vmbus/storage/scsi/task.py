"""One SCSI command on its way through a logical unit: the command, its data buffer and its outcome."""

import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from vmbus.storage.disk import Buffer
from vmbus.storage.scsi.codes import ScsiStatus
from vmbus.storage.scsi.sense import invalid_field
from vmbus.trace.ledger import Account

__all__ = ["BytesBuffer", "DataBuffer", "Outcome", "Task"]


class DataBuffer(Protocol):
    """The initiator's data buffer, of which a command reads (data-out) or writes (data-in) a part.

    Accesses outside the buffer are programming errors; accesses that the initiator's memory refuses raise
    `GuestMemoryError`.
    """

    @property
    def length(self) -> int:
        """Bytes of the buffer."""

    def fetch(self, offset: int, length: int) -> bytes:
        """A copy of the initiator's data."""

    def store(self, offset: int, data: Buffer) -> None:
        """Give data to the initiator."""

    def read_file(self, fd: int, file_offset: int, offset: int, length: int) -> int:
        """Fill part of the buffer from a host file; returns the bytes moved, 0 at its end. Raises OSError."""

    def write_file(self, fd: int, file_offset: int, offset: int, length: int) -> int:
        """Write part of the buffer to a host file; returns the bytes moved. Raises OSError."""


class BytesBuffer:
    """A data buffer in host memory."""

    def __init__(self, content: Buffer | int = b"") -> None:
        self.content = bytearray(content)

    @property
    def length(self) -> int:
        """Bytes of the buffer."""
        return len(self.content)

    def fetch(self, offset: int, length: int) -> bytes:
        """A copy of part of the content."""
        return bytes(self.content[offset : offset + length])

    def store(self, offset: int, data: Buffer) -> None:
        """Overwrite part of the content."""
        self.content[offset : offset + len(data)] = data

    def read_file(self, fd: int, file_offset: int, offset: int, length: int) -> int:
        """``preadv`` into part of the content."""
        return os.preadv(fd, [memoryview(self.content)[offset : offset + length]], file_offset)

    def write_file(self, fd: int, file_offset: int, offset: int, length: int) -> int:
        """``pwritev`` of part of the content."""
        return os.pwritev(fd, [memoryview(self.content)[offset : offset + length]], file_offset)


@dataclass(slots=True, eq=False)
class Task:
    """A command to be executed.

    Attributes:
        cdb: the command, padded to 16 bytes.
        data: the data buffer.
        nexus: which initiator sent it; reservations and unit attentions are kept per nexus.
        account: where backend calls and copied bytes are counted.
        aborted: task management has ended it: it may not begin, and what is left of it need not be done.
        on_abort: called when it was aborted before it was begun, by whichever thread did that.
    """

    cdb: bytes
    data: DataBuffer
    nexus: Hashable = None
    account: Account = field(default_factory=Account)
    aborted: bool = False
    on_abort: Callable[[], object] | None = None

    def reply(self, data: Buffer, allocation_length: int) -> int:
        """Give `data` to the initiator, cut to what it asked for; returns the bytes moved (SPC-4 4.2.5.6)."""
        length = min(len(data), allocation_length, self.data.length)
        if length:
            self.data.store(0, memoryview(data)[:length])
            self.account.bytes_copied += length
        return length

    def parameters(self, length: int, length_field: int) -> bytes:
        """The parameter list of `length` bytes that the command announces at byte `length_field`.

        Raises:
            CheckCondition: the initiator gave fewer bytes.
        """
        if length > self.data.length:
            raise invalid_field(length_field, overrun=True)
        return self.data.fetch(0, length) if length else b""


class Outcome(NamedTuple):
    """How a command ended.

    Attributes:
        status: `ScsiStatus`.
        transferred: data bytes moved.
        sense: sense data if the status is CHECK CONDITION.
        overrun: the command wanted more data than the buffer holds.
    """

    status: int = ScsiStatus.GOOD
    transferred: int = 0
    sense: bytes = b""
    overrun: bool = False
