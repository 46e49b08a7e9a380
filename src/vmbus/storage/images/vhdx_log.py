"""The log of a VHDX file (MS-VHDX 2.3): finding what has to be replayed, and writing new entries."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from vmbus.storage.images.hostfile import HostFile, bad_image
from vmbus.storage.images.vhdx_wire import (
    PAGE,
    REGION_TABLE_OFFSETS,
    LogDataDescriptor,
    LogDataSector,
    LogEntryHeader,
    LogZeroDescriptor,
    checksum,
    with_checksum,
)

__all__ = ["LogWriter", "Replay", "find_replay"]

_DESCRIPTOR = 32
_MAX_LOG = 256 << 20
_MAX_FILE = 1 << 47
_MAX_GROWTH = 256 << 30  # between two flushes; a hole, but no reason to make it as large as anyone says
_MAX_PAGES = 1 << 20


@dataclass(frozen=True)
class Replay:
    """What a log says the file should hold.

    Attributes:
        pages: content by file offset, 4096 bytes each.
        file_size: the file has at least this size afterwards, bytes.
    """

    pages: Mapping[int, bytes]
    file_size: int


def find_replay(host: HostFile, log_guid: UUID, offset: int, length: int) -> Replay:
    """Read the active sequence of a log, the newest complete chain of entries (2.3.3).

    Args:
        host: the file.
        log_guid: only entries of this log count.
        offset: the log's place in the file.
        length: the log's size in bytes.

    Raises:
        DiskError: there are entries but no complete sequence, or what they say is impossible.
    """
    if length > _MAX_LOG:
        raise bad_image(host.path, f"a log of {length} bytes is absurd")
    return _Reader(host.path, host.read(offset, length), log_guid, host.size).replay()


class _Reader:
    def __init__(self, path: Path, log: bytes, log_guid: UUID, file_size: int) -> None:
        self._path = path
        self._log = log
        self._guid = log_guid
        self._file_size = file_size
        # A hostile log can make its entries overlap so that checking them all takes time quadratic in its size.
        self._budget = 16 * len(log) + (1 << 20)
        self._valid: dict[int, LogEntryHeader | None] = {}

    def replay(self) -> Replay:
        candidates = []
        for at in range(0, len(self._log), PAGE):
            header = self._peek(at)
            if header is not None:
                candidates.append((header.sequence_number, at))
        if not candidates:  # the log was announced in the header, but nothing was written to it yet
            return Replay({}, 0)
        for _, at in sorted(candidates, reverse=True):
            chain = self._chain(at)
            if chain:
                return self._collect(chain)
        raise bad_image(self._path, "the log has no complete entry left: the image is corrupt")

    def _peek(self, at: int) -> LogEntryHeader | None:
        """A header that could be one of ours, its entry unchecked."""
        if self._log[at : at + 4] != LogEntryHeader.SIGNATURE:
            return None
        header = LogEntryHeader.unpack(self._log, at)
        good = (
            header.log_guid == self._guid
            and PAGE <= header.entry_length <= len(self._log)
            and not header.entry_length % PAGE
            and not header.tail % PAGE
            and header.tail < len(self._log)
            and header.sequence_number > 0
            and header.descriptor_count * _DESCRIPTOR + LogEntryHeader.SIZE <= header.entry_length
        )
        return header if good else None

    def _entry(self, at: int) -> LogEntryHeader | None:
        """The header at `at` if the whole entry is intact."""
        if at not in self._valid:
            header = self._peek(at)
            if header is not None:
                self._budget -= header.entry_length
                if self._budget < 0:
                    raise bad_image(self._path, "the log's entries overlap: the image is corrupt")
                if checksum(self._bytes(at, header.entry_length)) != header.checksum:
                    header = None
            self._valid[at] = header
        return self._valid[at]

    def _bytes(self, at: int, length: int) -> bytes:
        """A stretch of the circular log."""
        part = self._log[at : at + length]
        return part if len(part) == length else part + self._log[: length - len(part)]

    def _chain(self, head: int) -> list[int]:
        """Where the entries from the tail that the entry at `head` names up to itself are; empty if broken."""
        last = self._entry(head)
        if last is None:
            return []
        at, chain, total = last.tail, [], 0
        while True:
            header = self._entry(at)
            if header is None:
                return []
            chain.append(at)
            total += header.entry_length
            if total > len(self._log):
                return []
            if at == head:
                break
            following = (at + header.entry_length) % len(self._log)
            after = self._entry(following)
            if after is None or after.sequence_number != header.sequence_number + 1:
                return []
            at = following
        return chain

    def _collect(self, chain: list[int]) -> Replay:
        pages: dict[int, bytes] = {}
        size = 0
        for at in chain:
            header = self._valid[at]
            assert header is not None
            if header.flushed_file_offset > self._file_size:
                raise bad_image(
                    self._path,
                    f"the file is cut short: {self._file_size} bytes, the log needs {header.flushed_file_offset}",
                )
            if header.last_file_offset > self._file_size + _MAX_GROWTH:
                raise bad_image(self._path, f"the log asks for a file of {header.last_file_offset} bytes")
            size = max(size, header.last_file_offset)
            for offset, content in self._changes(self._bytes(at, header.entry_length), header):
                pages[offset] = content
                if len(pages) > _MAX_PAGES:
                    raise bad_image(self._path, "the log changes an absurd number of pages")
        if pages and max(pages) + PAGE > max(size, self._file_size):
            raise bad_image(self._path, "the log writes behind the end of the file")
        return Replay(pages, size)

    def _changes(self, entry: bytes, header: LogEntryHeader) -> Iterator[tuple[int, bytes]]:
        broken = bad_image(self._path, f"log entry {header.sequence_number} contradicts itself")
        data_at = -(-(LogEntryHeader.SIZE + header.descriptor_count * _DESCRIPTOR) // PAGE) * PAGE
        zero_page = bytes(PAGE)
        for index in range(header.descriptor_count):
            at = LogEntryHeader.SIZE + index * _DESCRIPTOR
            signature = entry[at : at + 4]
            if signature == LogZeroDescriptor.SIGNATURE:
                zero = LogZeroDescriptor.unpack(entry, at)
                self._check_place(zero.file_offset, zero.zero_length, zero.sequence_number, header, broken)
                if zero.zero_length > _MAX_PAGES * PAGE:
                    raise bad_image(self._path, "the log changes an absurd number of pages")
                for offset in range(zero.file_offset, zero.file_offset + zero.zero_length, PAGE):
                    yield offset, zero_page
            elif signature == LogDataDescriptor.SIGNATURE:
                data = LogDataDescriptor.unpack(entry, at)
                self._check_place(data.file_offset, PAGE, data.sequence_number, header, broken)
                if data_at + PAGE > len(entry):
                    raise broken
                sector = LogDataSector.unpack(entry, data_at)
                sequence = sector.sequence_high << 32 | sector.sequence_low
                if sector.signature != LogDataSector.SIGNATURE or sequence != header.sequence_number:
                    raise broken
                data_at += PAGE
                yield data.file_offset, data.leading_bytes + sector.data + data.trailing_bytes
            else:
                raise broken

    def _check_place(
        self, offset: int, length: int, sequence: int, header: LogEntryHeader, broken: Exception
    ) -> None:
        if sequence != header.sequence_number or offset % PAGE or length % PAGE:
            raise broken
        # Neither the identifier nor the headers are ever logged (2.3): a log must not be able to change itself.
        if offset < REGION_TABLE_OFFSETS[0] or offset + length > _MAX_FILE:
            raise broken


class LogWriter:
    """Writes log entries, each a sequence of its own: all earlier ones have been applied and synced by then.

    No entry is longer than a third of the log, and none runs around its end. So an entry never overwrites the one
    before, and a torn entry leaves that one as the active sequence, whose replay changes nothing.

    Attributes:
        capacity: pages that fit one entry.
    """

    def __init__(self, host: HostFile, log_guid: UUID, offset: int, length: int) -> None:
        self._host = host
        self._guid = log_guid
        self._offset = offset
        self._length = length
        self._head = 0
        self._sequence = 0
        pages = length // 3 // PAGE
        self.capacity = pages - -(-(LogEntryHeader.SIZE + pages * _DESCRIPTOR) // PAGE)

    def write(self, pages: Mapping[int, bytes]) -> None:
        """Write one entry that changes `pages`, 4096 bytes each by file offset; the caller syncs.

        Raises:
            DiskError: the host's disk failed; the log is as good as before.
        """
        sequence = self._sequence + 1
        descriptors, sectors = [], []
        for offset, content in sorted(pages.items()):
            descriptors.append(
                LogDataDescriptor(
                    LogDataDescriptor.SIGNATURE, content[-4:], content[:8], offset, sequence
                ).pack()
            )
            sectors.append(
                LogDataSector(
                    LogDataSector.SIGNATURE, sequence >> 32, content[8:-4], sequence & 0xFFFFFFFF
                ).pack()
            )
        head_length = -(-(LogEntryHeader.SIZE + len(pages) * _DESCRIPTOR) // PAGE) * PAGE
        length = head_length + len(pages) * PAGE
        assert length <= self._length // 3
        start = self._head if self._head + length <= self._length else 0
        file_size = self._host.size
        header = LogEntryHeader(
            LogEntryHeader.SIGNATURE,
            0,
            length,
            start,
            sequence,
            len(pages),
            0,
            self._guid,
            file_size,
            file_size,
        )
        entry = (header.pack() + b"".join(descriptors)).ljust(head_length, b"\0") + b"".join(sectors)
        self._host.write(self._offset + start, with_checksum(entry))
        self._head, self._sequence = start + length, sequence
