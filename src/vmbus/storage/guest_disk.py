"""A disk of the host as a block device of the guest, over a `StorageVsc`."""

import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vmbus.bus.channel import Channel
from vmbus.core.blockio import BlockClient
from vmbus.core.memory import PAGE_SIZE, GpaRanges
from vmbus.errors import DeviceError, LocalProtocolError, RemoteProtocolError
from vmbus.storage.disk import Buffer, Extent, merged
from vmbus.storage.scsi.codes import AdditionalSense, Opcode, ServiceIn16

if TYPE_CHECKING:
    from vmbus.storage.lent_pages import Loan
    from vmbus.storage.vsc import StorageVsc

__all__ = ["Integers", "StorageDisk"]

Integers: TypeAlias = "array[int] | NDArray[np.uint64]"
"""A one-dimensional run of unsigned 64-bit integers."""

_UNKNOWN = (AdditionalSense.INVALID_OPERATION_CODE, AdditionalSense.INVALID_FIELD_IN_CDB)
"""What is said of a command that is not known, or of an unknown service action of one that is (SPC-4 4.5.6)."""

_DEALLOCATED = 1  # provisioning status: mapped 0, deallocated 1, anchored 2 (SBC-3 5.6.2)


def _sense_code(error: DeviceError) -> int | None:
    """The additional sense code of a command's failure, if the host gave one."""
    sense = getattr(error, "sense", None)
    return sense.additional if sense is not None else None


class StorageDisk:
    """A disk of the host as a block device of the guest.

    Offsets and lengths are bytes and multiples of `sector_size`.

    Args:
        vsc: a connected client.
        target: SCSI target.
        lun: logical unit.

    Attributes:
        sector_size: bytes of a sector.
        physical_sector_size: bytes the medium writes at once.
        size: capacity in bytes.
        thin: unmapped blocks can be given back.
        queue_depth: requests of a batch that are outstanding at once.

    Raises:
        DeviceError: there is no such unit, or the host does not answer.
        LocalProtocolError: the client is not connected.
    """

    def __init__(self, vsc: "StorageVsc", target: int = 0, lun: int = 0) -> None:
        self.vsc = vsc
        self.target = target
        self.lun = lun
        self.queue_depth = 32
        self._clients: dict[Channel, BlockClient] = {}
        self._short = False  # the unit knows no commands of 16 bytes; batches are of those
        self._check(bytes([Opcode.TEST_UNIT_READY]))
        self.refresh()

    def __repr__(self) -> str:
        return f"<StorageDisk at target {self.target}, LUN {self.lun}: {self.size:,} bytes>"

    def refresh(self) -> None:
        """Ask for the capacity again."""
        cdb = struct.pack(">BB8xIxx", Opcode.SERVICE_ACTION_IN_16, ServiceIn16.READ_CAPACITY_16, 32)
        try:
            data = self._check(cdb, data_in=32)
        except DeviceError as error:
            if _sense_code(error) not in _UNKNOWN:
                raise
            self._short = True
        if self._short:  # a CD-ROM drive, or a disk of an old host
            data = self._check(bytes([Opcode.READ_CAPACITY_10]) + bytes(9), data_in=8)
            if len(data) >= 8:
                data = struct.pack(">Q", int.from_bytes(data[:4], "big")) + data[4:8] + bytes(4)
        if len(data) < 16:
            raise RemoteProtocolError(f"READ CAPACITY gave {len(data)} bytes")
        last, self.sector_size, _, exponent, thin = struct.unpack(">QIBBH", data[:16])
        if (
            self.sector_size < 512
            or self.sector_size & (self.sector_size - 1)
            or self.sector_size > PAGE_SIZE
        ):
            raise RemoteProtocolError(f"sectors of {self.sector_size} bytes")
        self.physical_sector_size = self.sector_size << (exponent & 0xF)
        self.thin = bool(thin & 0x8000)
        self.size = (last + 1) * self.sector_size

    def inquiry(self, page: int | None = None) -> bytes:
        """Standard INQUIRY data, or a page of vital product data."""
        cdb = struct.pack(">BBBHx", Opcode.INQUIRY, page is not None, page or 0, 255)
        return self._check(cdb, data_in=255)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes.

        Raises:
            CommandError: the disk refused or failed.
        """
        parts = []
        for at in range(offset, offset + length, self._most):
            size = min(self._most, offset + length - at)
            data = self._check(self._cdb(at, size, write=False), data_in=size)
            if len(data) != size:
                raise RemoteProtocolError(f"the host read {len(data)} of {size} bytes")
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Write all of `data`; with `fua` it is durable on return.

        Raises:
            CommandError: the disk refused or failed.
        """
        view = memoryview(data).cast("B")
        for at in range(0, len(view), self._most):
            part = view[at : at + self._most]
            cdb = bytearray(self._cdb(offset + at, len(part), write=True))
            cdb[1] |= 0x08 if fua else 0
            self._check(bytes(cdb), data_out=part)

    def write_through(self, offset: int, data: Buffer) -> None:
        """Write all of `data`; it is durable on return.

        Raises:
            CommandError: the disk refused or failed.
        """
        self.write(offset, data, fua=True)

    def flush(self) -> None:
        """Return when everything written before is durable."""
        self._check(bytes([Opcode.SYNCHRONIZE_CACHE_10]) + bytes(9))

    def unmap(self, offset: int, length: int) -> None:
        """Give the range back; it reads as zeros."""
        most = 0xFFFF_FFFF // 8 * 8 * self.sector_size
        for at in range(offset, offset + length, most):
            size = min(most, offset + length - at)
            data = struct.pack(">HH4xQI4x", 22, 16, at // self.sector_size, size // self.sector_size)
            self._check(struct.pack(">B6xHx", Opcode.UNMAP, len(data)), data_out=data)

    def lba_status(self, offset: int, length: int) -> list[Extent]:
        """The states of allocation from `offset` on, as far as one GET LBA STATUS tells: a part of the range, or all.

        Everything is allocated on a disk that is not thin, and on one that does not know the command.

        Raises:
            CommandError: the disk failed.
            RemoteProtocolError: the answer makes no sense.
        """
        everything = [Extent(offset, length, True)]
        if not self.thin:
            return everything
        size = self.sector_size
        cdb = struct.pack(
            ">BBQIxx", Opcode.SERVICE_ACTION_IN_16, ServiceIn16.GET_LBA_STATUS, offset // size, PAGE_SIZE
        )
        try:
            data = self._check(cdb, data_in=PAGE_SIZE)
        except DeviceError as error:
            if _sense_code(error) in _UNKNOWN:
                return everything
            raise
        told = int.from_bytes(data[:4], "big") + 4
        found: list[Extent] = []
        at, end = offset, offset + length
        for place in range(8, min(told, len(data)) - 15, 16):
            lba, blocks, state = struct.unpack_from(">QIB", data, place)
            if lba * size != at or not blocks:
                raise RemoteProtocolError(
                    f"GET LBA STATUS tells of {blocks} blocks at {lba}, not from {at // size}"
                )
            found.append(Extent(at, min(blocks * size, end - at), state & 0xF != _DEALLOCATED))
            at += blocks * size
            if at >= end:
                break
        if not found:
            raise RemoteProtocolError("GET LBA STATUS tells nothing of the block asked for")
        return found

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The states of allocation within the range, in order, adjacent ones different.

        Raises:
            CommandError: the disk failed.
            RemoteProtocolError: an answer makes no sense.
        """
        return merged(self._states(offset, length))

    def _states(self, offset: int, length: int) -> Iterator[Extent]:
        at, end = offset, offset + length
        while at < end:
            for extent in self.lba_status(at, end - at):
                yield extent
                at = extent.offset + extent.length

    def read_batch(self, offsets: Sequence[int], length: int) -> list[bytes]:
        """`length` bytes at each of the offsets, `queue_depth` requests at once.

        Raises:
            CommandError: a read failed.
        """
        made: list[bytes] = []
        failed: list[int] = []
        if self._short:
            return [self.read(offset, length) for offset in offsets]
        with self._batch(length) as batch:
            for start in range(0, len(offsets), batch.most):
                client = batch.run(offsets[start : start + batch.most])
                made += client.results()
                failed += [start + index for index in client.failures()]
        for index in failed:
            made[index] = self.read(offsets[index], length)
        return made

    def write_batch(self, offsets: Sequence[int], data: Sequence[Buffer]) -> None:
        """Write each piece of data at its offset, `queue_depth` requests at once; all pieces have one length.

        Raises:
            CommandError: a write failed.
        """
        lengths = {len(piece) for piece in data}
        if len(offsets) != len(data) or len(lengths) > 1:
            raise LocalProtocolError("a batch of writes needs one piece for each offset, all of one length")
        failed: list[int] = []
        if self._short:
            for offset, piece in zip(offsets, data, strict=True):
                self.write(offset, piece)
            return
        for length in lengths:
            with self._batch(length) as batch:
                for start in range(0, len(offsets), batch.most):
                    part = slice(start, start + batch.most)
                    failed += [start + index for index in batch.run(offsets[part], data[part]).failures()]
        for index in failed:
            self.write(offsets[index], data[index])

    def transfer_batch(self, offsets: Integers, pfns: Integers, length: int, *, write: bool) -> list[int]:
        """Move data between the disk and guest pages of the caller's, as a guest's page cache does.

        Args:
            offsets: byte offsets, 64-bit integers.
            pfns: page numbers for each request, as many as `length` needs; 64-bit integers.
            length: bytes of each request, at most `StorageVsc.max_transfer`.
            write: from the pages to the disk.

        After any exception the host may still use the pages, until `StorageVsc.settle` returns.

        Returns:
            the indices of requests that failed; send them one by one to learn why. All of them, if the unit does
            not know the commands of 16 bytes that a batch consists of.
        """
        if self._short:
            return list(range(len(offsets)))
        with self.vsc.exclusive() as channel, self.vsc.borrow_pages(0) as loan:
            return self._drive(channel, loan, offsets, pfns, length, write).failures()

    @contextmanager
    def _batch(self, length: int) -> Iterator["_Batch"]:
        if length % self.sector_size or not 0 < length <= self.vsc.max_transfer:
            raise LocalProtocolError(f"requests of {length} bytes, {self.vsc.max_transfer} at most")
        with self.vsc.exclusive() as channel, self.vsc.borrow_pages() as loan:
            yield _Batch(self, channel, loan, length)

    def _drive(
        self, channel: Channel, loan: "Loan", offsets: Integers, pfns: Integers, length: int, write: bool
    ) -> BlockClient:
        client = self._clients.get(channel)
        if (
            client is None or client.busy
        ):  # an exception ended its last batch, and what comes of that is not for it
            client = self._clients[channel] = BlockClient(
                channel.outgoing,
                channel.incoming,
                channel.memory,
                self.target,
                self.lun,
                self.sector_size,
                self.vsc.packet_size,
            )
        first = self.vsc.new_ids(len(offsets))
        loan.watch(client.pending)
        client.begin(offsets, pfns, length, first, write, self.queue_depth)
        self.vsc.drive(channel, client)
        return client

    @property
    def _most(self) -> int:
        """Bytes of one read or write."""
        most = self.vsc.max_transfer
        return min(most, 0x8000 * self.sector_size) if self._short else most

    def _cdb(self, offset: int, length: int, *, write: bool) -> bytes:
        if offset % self.sector_size or length % self.sector_size:
            raise LocalProtocolError(f"bytes {offset}+{length} are not whole {self.sector_size}-byte sectors")
        lba, blocks = offset // self.sector_size, length // self.sector_size
        if self._short:
            if lba >> 32:
                raise LocalProtocolError(f"sector {lba} is beyond the 32 bits of this unit's commands")
            opcode = Opcode.WRITE_10 if write else Opcode.READ_10
            return struct.pack(">BxIxHx", opcode, lba, blocks)
        return struct.pack(">BxQIxx", Opcode.WRITE_16 if write else Opcode.READ_16, lba, blocks)

    def _check(self, cdb: bytes, *, data_out: Buffer = b"", data_in: int = 0) -> bytes:
        return self.vsc.check(self.target, self.lun, cdb, data_out=data_out, data_in=data_in)


class _Batch:
    """Runs requests of one length through the client's own buffer pages."""

    def __init__(self, disk: StorageDisk, channel: Channel, loan: "Loan", length: int) -> None:
        self.most = len(loan.pages) // -(-length // PAGE_SIZE)
        if not self.most:
            raise DeviceError(f"{length} bytes of data exceed the {len(loan.pages)} free buffer pages")
        self._disk = disk
        self._channel = channel
        self._loan = loan
        self._pages = loan.pages
        self._numbers = array("Q", loan.pages)
        self._length = length

    def run(self, offsets: Sequence[int], data: Sequence[Buffer] | None = None) -> BlockClient:
        """Read at the offsets, or write `data` there; at most `most` of them."""
        each = -(-self._length // PAGE_SIZE)
        for index, piece in enumerate(data or ()):
            pages = self._pages[index * each : (index + 1) * each]
            GpaRanges([(self._length, 0, pages)]).write(self._channel.memory, piece)
        write = data is not None
        return self._disk._drive(
            self._channel, self._loan, array("Q", offsets), self._numbers, self._length, write
        )
