"""VHDX images: dynamic, fixed and differencing, with 512-byte and 4096-byte sectors."""

import errno
import logging
from collections.abc import Iterator
from dataclasses import replace
from uuid import UUID, uuid4

import numpy as np
from numpy.typing import NDArray

from vmbus.errors import printable
from vmbus.storage.disk import DiskError
from vmbus.storage.images.blocks import BlockImage, BlockState, ImageDisk, OpenParent
from vmbus.storage.images.chain import Chain
from vmbus.storage.images.hostfile import HostFile, bad_image
from vmbus.storage.images.overlay import Overlay
from vmbus.storage.images.parents import open_parent
from vmbus.storage.images.space import SectorBits, SpaceMap
from vmbus.storage.images.vhdx_log import LogWriter, find_replay
from vmbus.storage.images.vhdx_open import read_header, read_structure
from vmbus.storage.images.vhdx_wire import (
    BITMAP_BLOCK,
    HEADER_OFFSETS,
    MIB,
    NO_GUID,
    PAGE,
    BatState,
    Header,
    chunk_ratio,
    with_checksum,
)

__all__ = ["Vhdx"]

_log = logging.getLogger(__name__)

_ENTRIES_PER_PAGE = PAGE // 8
_LAST_SEQUENCE = 1 << 63
"""Every change of the header takes the next of 2⁶⁴ sequence numbers: no image has had half of them."""
_STATE = np.uint64(7)
_OFFSET_MASK = ((1 << 44) - 1) << 20
_OFFSET = np.uint64(_OFFSET_MASK)
_STATES = (
    BlockState.ABSENT,  # NOT_PRESENT
    BlockState.ABSENT,  # UNDEFINED
    BlockState.ZERO,
    BlockState.ZERO,  # UNMAPPED
    BlockState.ABSENT,  # 4 is reserved; no image that has it is opened
    BlockState.ZERO,  # UNMAPPED_1_00
    BlockState.FULL,
    BlockState.PARTIAL,
)
"""What each `BatState` means."""
_KINDS = np.array([min(state, BlockState.FULL) for state in _STATES], np.uint8)
"""The same, full and partial blocks taken for one kind."""


class Vhdx(BlockImage):
    """A VHDX image.

    Data goes straight to its place. The block allocation table and the sector bitmaps are changed in memory and
    reach the file by a commit: first the data is synced, then all changed pages go into one log entry, which is
    synced, then to their places. A log left by a crash is replayed when the image is opened for writing; opened
    read-only, the image looks replayed and the file stays as it is.

    Attributes:
        data_write_guid: changes whenever the disk's content may have changed; what differencing images go by.
    """

    format = "vhdx"

    def __init__(self, host: HostFile, opener: OpenParent, chain: Chain) -> None:
        super().__init__()
        self.host = host
        self.account = host.account
        self.read_only = host.read_only
        self._header, self._slot = read_header(host)
        if not host.read_only and self._header.sequence_number >= _LAST_SEQUENCE:
            raise bad_image(
                host.path,
                f"the header's sequence number {self._header.sequence_number} leaves no room for changes, open it "
                "read-only",
            )
        self._replay_into_memory()
        structure = read_structure(host, self._header)
        self._structure = structure
        self.block_size = structure.block_size
        self.sector_size = structure.sector_size
        self.physical_sector_size = max(structure.physical_sector_size, structure.sector_size)
        self.sector_count = structure.size // structure.sector_size
        self.identifier = structure.identifier
        self.variant = structure.variant
        self._ratio = chunk_ratio(structure.block_size, structure.sector_size)
        self._sectors_per_block = structure.block_size // structure.sector_size
        self.unmap_granularity = 4096
        self._bat = structure.bat
        self._space = self._map_space()
        self._bits = SectorBits(host, PAGE, most_significant_first=False)
        self._dirty_bat: set[int] = set()
        self._log: LogWriter | None = None
        if structure.parent is not None:
            self.parent = open_parent(host, structure.parent_names(), opener, chain, host.account)
            self._check_parent(self.parent)
        if not self.read_only:
            try:
                self._apply_replay()
            except BaseException:
                if self.parent is not None:
                    self.parent.close()
                raise

    @property
    def data_write_guid(self) -> UUID:
        """See the class."""
        return self._header.data_write_guid

    # Opening.

    def _replay_into_memory(self) -> None:
        header, host = self._header, self.host
        if header.log_guid == NO_GUID:
            return
        host.overlay = find_replay(host, header.log_guid, header.log_offset, header.log_length) or None

    def _apply_replay(self) -> None:
        """Make the replay real, now that everything it leads to has been checked."""
        host = self.host
        if self._header.log_guid == NO_GUID:
            return
        replay, host.overlay = host.overlay or Overlay(), None
        size = host.size
        if replay.size > size:
            host.set_size(replay.size)
        for offset, content in sorted(replay.pages.items()):
            host.write(offset, content)
        for start, stop in replay.zeros:
            host.zero(start, min(stop, size) - start)  # behind the old end there is a hole
        host.sync()
        self._write_header(log_guid=NO_GUID)
        _log.info("%s: replayed %d changes from the log", printable(str(self.path)), len(replay))

    def _map_space(self) -> SpaceMap:
        structure, bat, host = self._structure, self._bat, self.host
        file_size = host.size
        # Only what is not zero is looked at: the table of an empty 64 TiB disk has half a GiB, all of it holes.
        entries = np.flatnonzero(bat)
        is_bitmap = entries % (self._ratio + 1) == self._ratio
        if structure.parent is None:
            self._ignore_bitmaps(entries[is_bitmap])
            entries = entries[~is_bitmap]
            is_bitmap = np.zeros(len(entries), np.bool_)
        states = (bat[entries] & _STATE).astype(np.uint8)
        valid = np.isin(states, [state.value for state in BatState])
        valid[is_bitmap] = np.isin(states[is_bitmap], [BatState.NOT_PRESENT, BatState.FULLY_PRESENT])
        if structure.parent is None:
            valid &= states != BatState.PARTIALLY_PRESENT
        if not valid.all():
            wrong = int(np.flatnonzero(~valid)[0])
            raise bad_image(
                host.path, f"block table entry {entries[wrong]} has the impossible state {states[wrong]}"
            )
        if structure.parent is not None:
            partial = entries[states == BatState.PARTIALLY_PRESENT]
            bitmaps = partial // (self._ratio + 1) * (self._ratio + 1) + self._ratio
            without = partial[(bat[bitmaps] & _STATE) != BatState.FULLY_PRESENT]
            if len(without):
                raise bad_image(
                    host.path, f"block table entry {without[0]} is partial but has no sector bitmap"
                )
        present = (states == BatState.FULLY_PRESENT) | (states == BatState.PARTIALLY_PRESENT)
        rows = np.empty((int(present.sum()), 2), np.uint64)
        rows[:, 0] = bat[entries[present]] & _OFFSET
        rows[:, 1] = np.where(is_bitmap[present], np.uint64(BITMAP_BLOCK), np.uint64(self.block_size))
        outside = (rows[:, 0] > file_size) | (
            rows[:, 0] + rows[:, 1] > file_size
        )  # the sum alone may wrap to 0
        if outside.any():
            at = entries[present][outside.argmax()]
            raise bad_image(
                host.path, f"block table entry {at} reaches past the end of the file at {file_size}"
            )
        fixed = np.array(structure.regions, dtype=np.uint64).reshape(-1, 2)
        end = -(-file_size // MIB) * MIB
        return SpaceMap(host.path, np.concatenate([fixed, rows]), end, alignment=MIB)

    def _ignore_bitmaps(self, entries: NDArray[np.intp]) -> None:
        """Forget the sector bitmaps of an image without a parent, whose entries nobody reads (2.5.1.2).

        QEMU up to 7.2.1 moved the entries of a table page by one when it wrote the first block of an image, so that
        the bitmap's entry got the state of its neighbour.
        """
        strange = int(
            np.isin(self._bat[entries] & _STATE, [0, int(BatState.FULLY_PRESENT)], invert=True).sum()
        )
        if strange:
            _log.warning(
                "%s: %d sector bitmaps in the block table have impossible states; without a parent they mean nothing",
                printable(str(self.path)),
                strange,
            )
        self._bat[entries] = 0

    def _check_parent(self, parent: ImageDisk) -> None:
        try:
            if not isinstance(parent, Vhdx):
                raise bad_image(self.path, f"its parent {parent.path} is a {parent.format} image")
            if parent.sector_size != self.sector_size:
                raise bad_image(self.path, f"its parent has sectors of {parent.sector_size} bytes")
            if parent.data_write_guid not in self._structure.parent_linkage:
                raise bad_image(
                    self.path, f"{parent.path} is not the parent it was made from, or was changed since"
                )
        except DiskError:
            parent.close()
            raise

    # The block map.

    def _entry(self, block: int) -> int:
        return block + block // self._ratio

    def _locate(self, block: int) -> tuple[int, int]:
        entry = self._bat.item(block + block // self._ratio)
        return _STATES[entry & 7], entry & _OFFSET_MASK

    def _locate_full(self, blocks: NDArray[np.uint64]) -> tuple[NDArray[np.bool_], NDArray[np.uint64]]:
        entries = self._bat[blocks + blocks // np.uint64(self._ratio)]
        return (entries & _STATE) == BatState.FULLY_PRESENT, entries & _OFFSET

    def _like(self, block: int, end: int) -> int:
        entries = np.arange(block, end, dtype=np.int64)
        kinds = _KINDS[(self._bat[entries + entries // self._ratio] & _STATE).astype(np.uint8)]
        other = np.flatnonzero(kinds != kinds[0])
        return int(other[0]) if len(other) else end - block

    def _bitmap(self, block: int) -> tuple[int, int]:
        """The file offset of the bitmap of a block's chunk, and the block's first bit there."""
        chunk, index = divmod(block, self._ratio)
        offset = int(self._bat[chunk * (self._ratio + 1) + self._ratio]) & _OFFSET_MASK
        return offset, index * self._sectors_per_block

    def _runs(self, block: int, first: int, count: int) -> Iterator[tuple[int, int, bool]]:
        base, lead = self._bitmap(block)
        for at, length, here in self._bits.runs(base, lead + first, count):
            yield at - lead, length, here

    def _mark(self, block: int, first: int, count: int) -> None:
        base, lead = self._bitmap(block)
        self._bits.fill(base, lead + first, count, True)

    def _new_space(self) -> int:
        return self._allocate(self.block_size)

    def _allocate(self, length: int) -> int:
        offset, behind = self._space.allocate(length)
        try:
            if offset + length > _OFFSET_MASK:
                raise DiskError(f"{self.path}: the file cannot grow any further", errno.EFBIG)
            if not behind:
                self.host.zero(offset, length)
            if self.host.size < offset + length:
                self.host.set_size(offset + length)
        except DiskError:
            self._space.cancel(offset, length)
            raise
        return offset

    def _cancel_space(self, offset: int) -> None:
        self._space.cancel(offset, self.block_size)

    def _record(self, block: int, state: BlockState, offset: int) -> None:
        if state == BlockState.PARTIAL:
            chunk = block // self._ratio
            entry = chunk * (self._ratio + 1) + self._ratio
            if int(self._bat[entry]) & 7 != BatState.FULLY_PRESENT:
                self._set(entry, BatState.FULLY_PRESENT, self._allocate(BITMAP_BLOCK))
            base, lead = self._bitmap(block)
            self._bits.fill(base, lead, self._sectors_per_block, False)
            self._set(self._entry(block), BatState.PARTIALLY_PRESENT, offset)
        else:
            self._set(self._entry(block), BatState.FULLY_PRESENT, offset)

    def _set(self, entry: int, state: BatState, offset: int) -> None:
        self._bat[entry] = offset | state
        self._dirty_bat.add(entry // _ENTRIES_PER_PAGE)

    def _discard(self, block: int) -> bool:
        if self.variant == "fixed":
            return False
        state, offset = self._locate(block)
        self._set(self._entry(block), BatState.ZERO, 0)
        if state in (BlockState.FULL, BlockState.PARTIAL):
            self._space.release(offset, self.block_size)
        return True

    def _discard_run(self, block: int, count: int) -> int:
        if self.variant == "fixed":
            return 0
        blocks = np.arange(block, block + count, dtype=np.int64)
        entries = blocks + blocks // self._ratio
        self._bat[entries] = np.uint64(BatState.ZERO)
        self._dirty_bat.update(
            range(int(entries[0]) // _ENTRIES_PER_PAGE, int(entries[-1]) // _ENTRIES_PER_PAGE + 1)
        )
        return count

    # Commit.

    def _begin(self) -> None:
        self._write_header(
            log_guid=NO_GUID, file_write_guid=uuid4(), data_write_guid=uuid4()
        )  # 2.2.2: before the first change

    def _write_header(
        self, *, log_guid: UUID, file_write_guid: UUID | None = None, data_write_guid: UUID | None = None
    ) -> None:
        """Make a new header current: written over the older of the two and synced (2.2.2.1)."""
        header = replace(
            self._header,
            sequence_number=self._header.sequence_number + 1,
            log_guid=log_guid,
            file_write_guid=file_write_guid or self._header.file_write_guid,
            data_write_guid=data_write_guid or self._header.data_write_guid,
        )
        slot = 1 - self._slot
        self.host.write(HEADER_OFFSETS[slot], with_checksum(header.pack().ljust(Header.AREA, b"\0")))
        self.host.sync()
        self._header, self._slot = header, slot

    @property
    def _dirty_limit(self) -> int:
        return self._structure.dirty_limit

    def _dirty_pages(self) -> int:
        return len(self._dirty_bat) + len(self._bits.dirty)

    def _commit(self) -> None:
        self.host.sync()
        if not self._dirty_pages():
            return
        pages = {offset: self._bits.content(offset) for offset in self._bits.dirty}
        for index in self._dirty_bat:
            entries = self._bat[index * _ENTRIES_PER_PAGE : (index + 1) * _ENTRIES_PER_PAGE]
            offset = self._structure.bat_offset + index * PAGE
            pages[offset] = entries.astype("<u8").tobytes().ljust(PAGE, b"\0")
        log, guid = self._log, self._header.log_guid
        if log is None:
            guid = uuid4()
            log = LogWriter(self.host, guid, self._header.log_offset, self._header.log_length)
        log.write(pages)
        self.host.sync()
        if self._log is None:
            # Only now that it holds a whole entry does the log exist: no crash finds it announced and empty.
            self._write_header(log_guid=guid)
            self._log = log
        for offset, content in sorted(pages.items()):
            self.host.write(offset, content)
        self._bits.dirty.clear()
        self._dirty_bat.clear()
        for offset, length in self._space.settle():
            self.host.zero(offset, length)

    def _finish(self) -> None:
        self._commit()
        if self._log is not None:
            self.host.sync()
            self._write_header(log_guid=NO_GUID)
            self._log = None
