"""The log of a VHDX file (MS-VHDX 2.3): finding what has to be replayed, and writing new entries."""

from collections.abc import Iterator, Mapping
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from vmbus.storage.images.hostfile import HostFile, bad_image
from vmbus.storage.images.overlay import Overlay
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

__all__ = ["LogWriter", "find_replay"]

_DESCRIPTOR = 32
_MAX_LOG = 256 << 20
_MAX_FILE = 1 << 47
_MAX_GROWTH = 256 << 30  # between two flushes; a hole, but no reason to make it as large as anyone says
_MAX_CHANGES = 1 << 18  # four times what a log of 256 MiB has room for as pages


def find_replay(host: HostFile, log_guid: UUID, offset: int, length: int) -> Overlay:
    """Read the active sequence of a log, the newest complete chain of entries (2.3.3): what the file should hold.

    The work is bounded by the length of the log, whatever its entries say: how long a stretch is that they zero does
    not matter, nor how often they name one place, nor how they refer to each other.

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


class _Change(NamedTuple):
    """A stretch of the file that a descriptor changes: to the content, or to zeros without one."""

    start: int
    stop: int
    content: bytes | None


class _Reader:
    def __init__(self, path: Path, log: bytes, log_guid: UUID, file_size: int) -> None:
        self._path = path
        self._log = log
        self._guid = log_guid
        self._file_size = file_size

    def replay(self) -> Overlay:
        candidates = []
        for at in range(0, len(self._log), PAGE):
            header = self._peek(at)
            if header is not None:
                candidates.append((header.sequence_number, at, header))
        if not candidates:  # the log was announced in the header, but nothing was written to it yet
            return Overlay()
        candidates.sort(key=lambda one: one[:2], reverse=True)
        entries = self._intact(candidates)
        chain = self._active(entries)
        if not chain:
            raise bad_image(self._path, "the log has no complete entry left: the image is corrupt")
        return self._collect([(at, entries[at]) for at in chain])

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

    def _intact(self, candidates: list[tuple[int, int, LogEntryHeader]]) -> dict[int, LogEntryHeader]:
        """The entries whose checksum is right, by their place, the newest first."""
        # A hostile log can make its entries overlap so that checking them all takes time quadratic in its size. What
        # an honest one has of this GUID are its entries, and some of a round before that are cut or whole.
        budget = 4 * len(self._log) + (1 << 20)
        intact = {}
        for _, at, header in candidates:
            budget -= header.entry_length
            if budget < 0:
                raise bad_image(self._path, "the log's entries overlap: the image is corrupt")
            if checksum(self._bytes(at, header.entry_length)) == header.checksum:
                intact[at] = header
        return intact

    def _bytes(self, at: int, length: int) -> bytes:
        """A stretch of the circular log."""
        part = self._log[at : at + length]
        return part if len(part) == length else part + self._log[: length - len(part)]

    def _active(self, entries: dict[int, LogEntryHeader]) -> list[int]:
        """Where the newest entry with a complete sequence is, and those of its sequence, its tail first.

        Entries that follow each other, in the log and in their numbers, are runs; an entry heads a sequence if its
        tail is in its own run, no more than one round of the log before it. Each entry is looked at once: whoever
        walked from every tail to its head could be sent through the same run as often as it has entries.
        """
        before: dict[int, int] = {}
        for at, header in entries.items():
            following = (at + header.entry_length) % len(self._log)
            after = entries.get(following)
            if after is not None and after.sequence_number == header.sequence_number + 1:
                before.setdefault(
                    following, at
                )  # two that end at one place overlap: only hostile logs have such
        run: dict[int, int] = {}
        distance: dict[int, int] = {}  # bytes of the run before an entry
        for at in reversed(entries):  # the oldest first
            previous = before.get(at)
            if previous is None:
                run[at], distance[at] = at, 0
            else:
                run[at], distance[at] = run[previous], distance[previous] + entries[previous].entry_length
        for at, header in entries.items():
            tail = header.tail
            if run.get(tail) != run[at] or distance[tail] > distance[at]:
                continue
            if distance[at] + header.entry_length - distance[tail] > len(self._log):
                continue
            chain = [at]
            while chain[-1] != tail:
                chain.append(before[chain[-1]])
            return chain[::-1]
        return []

    def _collect(self, chain: list[tuple[int, LogEntryHeader]]) -> Overlay:
        if sum(header.descriptor_count for _, header in chain) > _MAX_CHANGES:
            raise bad_image(self._path, "the log makes an absurd number of changes")
        changes: list[_Change] = []
        size = 0
        for at, header in chain:
            if header.flushed_file_offset > self._file_size:
                raise bad_image(
                    self._path,
                    f"the file is cut short: {self._file_size} bytes, the log needs {header.flushed_file_offset}",
                )
            if header.last_file_offset > self._file_size + _MAX_GROWTH:
                raise bad_image(self._path, f"the log asks for a file of {header.last_file_offset} bytes")
            size = max(size, header.last_file_offset)
            changes += self._changes(self._bytes(at, header.entry_length), header)
        pages: dict[int, bytes] = {}
        zeros: list[tuple[int, int]] = []
        for start, stop, content in _last_wins(changes):
            if content is not None:
                pages[start] = content
            elif zeros and zeros[-1][1] == start:
                zeros[-1] = (zeros[-1][0], stop)
            else:
                zeros.append((start, stop))
        if changes and max(change.stop for change in changes) > max(size, self._file_size):
            raise bad_image(self._path, "the log writes behind the end of the file")
        return Overlay(pages, zeros, size if size > self._file_size else 0)

    def _changes(self, entry: bytes, header: LogEntryHeader) -> Iterator[_Change]:
        broken = bad_image(self._path, f"log entry {header.sequence_number} contradicts itself")
        data_at = -(-(LogEntryHeader.SIZE + header.descriptor_count * _DESCRIPTOR) // PAGE) * PAGE
        for index in range(header.descriptor_count):
            at = LogEntryHeader.SIZE + index * _DESCRIPTOR
            signature = entry[at : at + 4]
            if signature == LogZeroDescriptor.SIGNATURE:
                zero = LogZeroDescriptor.unpack(entry, at)
                self._check_place(zero.file_offset, zero.zero_length, zero.sequence_number, header, broken)
                if zero.zero_length:
                    yield _Change(zero.file_offset, zero.file_offset + zero.zero_length, None)
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
                content = data.leading_bytes + sector.data + data.trailing_bytes
                yield _Change(data.file_offset, data.file_offset + PAGE, content)
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


def _last_wins(changes: list[_Change]) -> Iterator[_Change]:
    """What is left of changes made one after the other: pieces apart from each other, ascending."""
    edges = sorted({edge for change in changes for edge in (change.start, change.stop)})
    arriving = sorted(range(len(changes)), key=lambda number: changes[number].start, reverse=True)
    open_here: list[int] = []  # a heap of negated numbers: the latest change comes first
    for start, stop in pairwise(edges):
        while arriving and changes[arriving[-1]].start == start:
            heappush(open_here, -arriving.pop())
        while open_here and changes[-open_here[0]].stop <= start:
            heappop(open_here)
        if open_here:
            yield _Change(start, stop, changes[-open_here[0]].content)


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
