"""VHD images: fixed, dynamic and differencing."""

import errno
import logging
from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vmbus.errors import printable
from vmbus.storage.disk import DiskError, Extent
from vmbus.storage.images.blocks import BlockImage, BlockState, ImageDisk, OpenParent
from vmbus.storage.images.chain import Chain
from vmbus.storage.images.hostfile import Buffer, HostFile, bad_image
from vmbus.storage.images.parents import open_parent
from vmbus.storage.images.space import SectorBits, SpaceMap
from vmbus.storage.images.vhd_wire import (
    DISK_TYPES,
    MAX_FIXED_SIZE,
    MAX_SIZE,
    SECTOR,
    UNUSED,
    BatmapHeader,
    DiskType,
    DynamicHeader,
    Footer,
    Platform,
    checksum,
    file_url_paths,
)

__all__ = ["DynamicVhd", "FixedVhd", "find_footer", "open_vhd"]

_log = logging.getLogger(__name__)

_OLD_FOOTER = 511
_MAX_LOCATOR = 64 << 10
_MAX_BLOCK = 256 << 20
_MAX_ENTRIES = 1 << 24  # enough for 2040 GiB in blocks of 128 KiB, a quarter of the smallest in use


def find_footer(host: HostFile) -> Footer | None:
    """The footer of a VHD, at the file's end or the copy at its start; None if the file is no VHD at all.

    Versions before Virtual PC 2004 wrote footers of 511 bytes (specification, "Hard Disk Footer Format"); the missing
    byte is a zero.

    A guest can write what looks like a footer: into the first sector of a fixed image, or into the last one of a
    dynamic image that lost its footer in a crash. So the copy at the start counts where there is one, and neither does
    where the end says that the start is the guest's.

    Raises:
        DiskError: it is a VHD, but no footer is intact, or the two contradict each other.
    """
    size = host.size
    if size < SECTOR:
        return None
    first = _footer_at(host, 0)
    last = _footer_at(host, size - SECTOR)
    if last is None and size % SECTOR == _OLD_FOOTER:
        last = _footer_at(host, size - _OLD_FOOTER)
    damaged = first is not None or last is not None
    first = first if first is not None and first.checksum == checksum(first) else None
    last = last if last is not None and last.checksum == checksum(last) else None
    if first is not None and first.disk_type != DiskType.FIXED:
        if last is not None and last.disk_type == DiskType.FIXED:
            raise bad_image(
                host.path,
                "it is a fixed image by its end and a dynamic one by its start, which may be its guest's work",
            )
        if last is None:
            _log.info("%s: no footer at the end, using the copy at the start", printable(str(host.path)))
        return first
    if last is not None:
        return last
    if first is not None:
        raise bad_image(host.path, "the file is cut short: a fixed image ends with its footer")
    if damaged:
        raise bad_image(host.path, "the footer's checksum is wrong and there is no intact copy")
    return None


def _footer_at(host: HostFile, offset: int) -> Footer | None:
    raw = host.read(offset, min(SECTOR, host.size - offset)).ljust(SECTOR, b"\0")
    return Footer.unpack(raw) if raw.startswith(Footer.COOKIE) else None


def open_vhd(host: HostFile, footer: Footer, opener: OpenParent, chain: Chain) -> "FixedVhd | DynamicVhd":
    """The image in an open file whose footer was found.

    Raises:
        DiskError: the image is damaged, unsupported, or its parent cannot be opened.
    """
    path = host.path
    if footer.format_version >> 16 != 1:
        raise bad_image(path, f"VHD version {footer.format_version >> 16} is not known")
    if footer.disk_type not in DISK_TYPES:
        raise bad_image(path, f"VHD disk type {footer.disk_type} is not known")
    most = MAX_FIXED_SIZE if footer.disk_type == DiskType.FIXED else MAX_SIZE
    if not 0 < footer.current_size <= most or footer.current_size % SECTOR:
        raise bad_image(path, f"a disk of {footer.current_size} bytes is not possible in a VHD")
    if footer.disk_type == DiskType.FIXED:
        return FixedVhd(host, footer)
    return DynamicVhd(host, footer, opener, chain)


class FixedVhd(ImageDisk):
    """A fixed VHD: the sectors in order, then the footer. Served like a raw file."""

    format = "vhd"
    variant = "fixed"
    sector_size = SECTOR
    physical_sector_size = SECTOR
    unmap_granularity = 4096

    def __init__(self, host: HostFile, footer: Footer) -> None:
        if host.size < footer.current_size + _OLD_FOOTER:
            raise bad_image(
                host.path, f"the file is cut short: {host.size} bytes for a disk of {footer.current_size}"
            )
        self.host = host
        self.account = host.account
        self.read_only = host.read_only
        self.sector_count = footer.current_size // SECTOR
        self.identifier = footer.unique_id
        self.fd = host.fd

    def read(self, offset: int, length: int) -> bytes:
        """See `Disk.read`."""
        self.check(offset, length)
        return self.host.read(offset, length)

    def write(self, offset: int, data: Buffer) -> None:
        """See `Disk.write`."""
        view = memoryview(data).cast("B")
        self.check(offset, len(view), writing=True)
        self.host.write(offset, view)

    def flush(self) -> None:
        """See `Disk.flush`."""
        if not self.read_only:
            self.host.sync()

    def unmap(self, offset: int, length: int) -> None:
        """See `Disk.unmap`; the range becomes a hole of the file."""
        self.check(offset, length, writing=True)
        self.host.zero(offset, length)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """See `Disk.extents`; the holes are the file's."""
        self.check(offset, length)
        at = offset
        for run_at, run_length, allocated in self.host.data_runs(offset, length):
            stop = run_at + run_length
            stop = min(stop + -stop % SECTOR, offset + length) if allocated else stop - stop % SECTOR
            if stop > at:
                yield Extent(at, stop - at, allocated)
                at = stop

    def close(self) -> None:
        """See `Disk.close`."""
        self.fd = -1
        super().close()


class DynamicVhd(BlockImage):
    """A dynamic or differencing VHD: a table of blocks, each with a bitmap of its sectors in front.

    A sector whose bit is clear was never written: it reads as zeros, or as the parent has it, whatever the file holds
    in its place (specification, "Block Allocation Table and Data Blocks"). A write sets the bits of its sectors. Blocks
    that are added here have all bits set in dynamic images; other writers add them with a few.

    There is no log. New blocks are made durable before the table refers to them, and both the table and the bitmaps
    change in units of one sector, which a disk writes whole or not at all. While blocks are being added the copy of
    the footer at the file's start is the only one, as it is after a crash; every commit puts one at the end again.
    """

    format = "vhd"
    sector_size = SECTOR
    physical_sector_size = SECTOR

    def __init__(self, host: HostFile, footer: Footer, opener: OpenParent, chain: Chain) -> None:
        super().__init__()
        self.host = host
        self.account = host.account
        self.read_only = host.read_only
        self.variant = DISK_TYPES[DiskType(footer.disk_type)]
        self.identifier = footer.unique_id
        self.sector_count = footer.current_size // SECTOR
        self._footer = footer
        self._header = self._read_header()
        self.block_size = self._header.block_size
        self.unmap_granularity = 4096 if footer.disk_type == DiskType.DIFFERENCING else self.block_size
        self._bitmap_size = -(-self.block_size // SECTOR // 8 // SECTOR) * SECTOR
        self._table = np.frombuffer(self._read_table(), dtype=">u4").astype(np.uint32)
        self._space = self._map_space()
        self._bits = SectorBits(host, SECTOR, most_significant_first=True)
        # By block: 0 = its bitmap was not looked at yet, else 1 + its sectors that are not in this file. Memory is
        # only taken for the blocks that are used.
        self._gaps = np.zeros(len(self._table), np.uint32)
        self._dirty_table: set[int] = set()
        self._fresh: set[int] = set()  # file offsets of blocks that the table on disk does not have yet
        self._grown = False
        self._tail_written = host.read(host.size - SECTOR, SECTOR) == footer.pack()
        if footer.disk_type == DiskType.DIFFERENCING:
            self.parent = open_parent(host, self._parent_names(), opener, chain, host.account)
            self._check_parent(self.parent)

    # Opening.

    def _read_header(self) -> DynamicHeader:
        path, offset = self.host.path, self._footer.data_offset
        if offset % SECTOR or offset + DynamicHeader.SIZE > self.host.size:
            raise bad_image(path, f"the dynamic disk header at byte {offset} is not in the file")
        header = DynamicHeader.unpack(self.host.read(offset, DynamicHeader.SIZE))
        if header.cookie != DynamicHeader.COOKIE:
            raise bad_image(path, "the dynamic disk header has no cookie")
        if header.checksum != checksum(header):
            raise bad_image(path, "the dynamic disk header's checksum is wrong")
        if header.header_version >> 16 != 1:
            raise bad_image(path, f"dynamic disk header version {header.header_version >> 16} is not known")
        block_size = header.block_size
        if block_size & (block_size - 1) or not 8 * SECTOR <= block_size <= _MAX_BLOCK:
            raise bad_image(path, f"a block size of {block_size} bytes is not possible")
        return header

    def _read_table(self) -> bytes:
        path, header = self.host.path, self._header
        blocks = -(-self.size // header.block_size)
        if header.max_table_entries < blocks:
            raise bad_image(
                path, f"the block table has {header.max_table_entries} entries for {blocks} blocks"
            )
        if blocks > _MAX_ENTRIES:
            raise bad_image(path, f"a block table of {blocks} entries is absurd")
        self._table_size = -(-4 * header.max_table_entries // SECTOR) * SECTOR
        if header.table_offset % SECTOR or header.table_offset + 4 * blocks > self.host.size:
            raise bad_image(path, f"the block table at byte {header.table_offset} is not in the file")
        return self.host.read(header.table_offset, 4 * blocks)

    def _map_space(self) -> SpaceMap:
        length = self._bitmap_size + self.block_size
        present = np.flatnonzero(self._table != UNUSED)
        used = [
            (0, SECTOR),
            (self._footer.data_offset, DynamicHeader.SIZE),
            (self._header.table_offset, self._table_size),
        ]
        if self._footer.disk_type == DiskType.DIFFERENCING:
            used += [
                (locator.data_offset, -(-locator.data_length // SECTOR) * SECTOR)
                for locator in self._header.locators()
                if locator.platform and locator.data_length
            ]
        if any(offset + size > 1 << 63 for offset, size in used):
            raise bad_image(self.host.path, "a structure lies outside the file")
        rows = np.empty((len(present) + len(used), 2), np.uint64)
        rows[: len(used)] = used
        rows[len(used) :, 0] = self._table[present].astype(np.uint64) * SECTOR
        rows[len(used) :, 1] = length
        # Behind the last block come the footer and, after a crash, blocks that never were referred to: all free.
        stops = rows[:, 0] + rows[:, 1]
        end, file_size = int(stops.max()), self.host.size
        if len(present) and int(stops[len(used) :].max()) > file_size:
            block = int(present[stops[len(used) :].argmax()])
            raise bad_image(self.host.path, f"block {block} reaches past the end of the file at {file_size}")
        if end - self._table_size > file_size:
            raise bad_image(self.host.path, "a structure lies outside the file")
        for offset, size in self._foreign_tables():
            if not ((rows[:, 0] < offset + size) & (rows[:, 0] + rows[:, 1] > offset)).any():
                rows = np.concatenate([rows, np.array([(offset, size)], np.uint64)])
                end = max(end, offset + size)
        return SpaceMap(self.host.path, rows, end, alignment=4096, lead=self._bitmap_size)

    def _foreign_tables(self) -> Iterator[tuple[int, int]]:
        """The places (offset, length) of XenServer's map and its header, if the file has them."""
        at, file_size = self._header.table_offset + self._table_size, self.host.size
        if at + SECTOR <= file_size:
            head = BatmapHeader.unpack(self.host.read(at, BatmapHeader.SIZE))
            if head.cookie == BatmapHeader.COOKIE:
                yield at, SECTOR
                if 0 < head.sectors * SECTOR <= file_size - head.data_offset:
                    yield head.data_offset, head.sectors * SECTOR

    def _parent_names(self) -> Iterator[str]:
        order = (Platform.W2RU, Platform.W2KU, Platform.MACX)
        locators = [one for one in self._header.locators() if one.platform in order]
        for locator in sorted(locators, key=lambda one: order.index(Platform(one.platform))):
            if not locator.data_length:
                continue
            if locator.data_length > _MAX_LOCATOR:
                raise bad_image(self.host.path, f"a parent locator of {locator.data_length} bytes is absurd")
            raw = self.host.read(locator.data_offset, locator.data_length)
            if locator.platform == Platform.MACX:
                yield from file_url_paths(raw.decode("utf-8", errors="replace").rstrip("\0"))
            else:
                yield raw.decode("utf-16-le", errors="replace").rstrip("\0")
        yield self._header.parent_name.decode("utf-16-be", errors="replace").split("\0")[0]

    def _check_parent(self, parent: ImageDisk) -> None:
        try:
            if parent.identifier != self._header.parent_unique_id:
                raise bad_image(
                    self.host.path, f"{parent.path} is not the parent that this image was made from"
                )
        except DiskError:
            parent.close()
            raise

    # The block map.

    def _locate(self, block: int) -> tuple[int, int]:
        sector = self._table.item(block)
        if sector == UNUSED:
            return BlockState.ABSENT, 0
        gaps = self._gaps.item(block) or self._find_gaps(block)
        return (BlockState.FULL if gaps == 1 else BlockState.PARTIAL), sector * SECTOR + self._bitmap_size

    def _locate_full(self, blocks: NDArray[np.uint64]) -> tuple[NDArray[np.bool_], NDArray[np.uint64]]:
        sectors = self._table[blocks]
        offsets = sectors.astype(np.uint64) * np.uint64(SECTOR) + np.uint64(self._bitmap_size)
        present = sectors != UNUSED
        gaps = self._gaps[blocks]
        unknown = present & (gaps == 0)
        if unknown.any():
            for block in set(blocks[unknown].tolist()):
                self._find_gaps(block)
            gaps = self._gaps[blocks]
        return present & (gaps == 1), offsets

    def _find_gaps(self, block: int) -> int:
        """Look at the bitmap of a block that is in the file; the new entry of `_gaps`."""
        sectors = self._sectors(block)
        gaps = 1 + sectors - self._bits.count(int(self._table[block]) * SECTOR, sectors)
        self._gaps[block] = gaps
        return gaps

    def _sectors(self, block: int) -> int:
        """Sectors of the disk in a block: the last one may reach past the disk's end, where its bits mean nothing."""
        per_block = self.block_size // SECTOR
        return min(per_block, self.sector_count - block * per_block)

    def _like(self, block: int, end: int) -> int:
        present = self._table[block:end] != UNUSED
        other = np.flatnonzero(present != present[0])
        return int(other[0]) if len(other) else end - block

    def _runs(self, block: int, first: int, count: int) -> Iterator[tuple[int, int, bool]]:
        return self._bits.runs(int(self._table[block]) * SECTOR, first, count)

    def _mark(self, block: int, first: int, count: int) -> None:
        gaps = self._gaps.item(block) or self._find_gaps(block)
        self._gaps[block] = gaps - self._bits.fill(int(self._table[block]) * SECTOR, first, count, True)

    def _new_space(self) -> int:
        offset, behind = self._space.allocate(self._bitmap_size + self.block_size)
        stop = offset + self._bitmap_size + self.block_size
        if stop // SECTOR > UNUSED - 1:
            self._space.cancel(offset, stop - offset)
            raise DiskError(f"{self.path}: the file cannot grow any further", errno.EFBIG)
        try:
            if stop > self._data_end:
                if not self._grown:
                    # What follows the last block (the footer, or what a crash left there) must not show through.
                    self.host.set_size(self._data_end)
                    self._grown = True
                self._tail_written = False
                if self.host.size < stop:
                    self.host.set_size(stop)
            if not behind:
                self.host.zero(offset, stop - offset)
        except DiskError:
            self._space.cancel(offset, stop - offset)
            raise
        return offset + self._bitmap_size

    def _cancel_space(self, offset: int) -> None:
        self._space.cancel(offset - self._bitmap_size, self._bitmap_size + self.block_size)

    def _record(self, block: int, state: BlockState, offset: int) -> None:
        start = offset - self._bitmap_size
        gaps = self._sectors(block)
        if state == BlockState.FULL:
            # Readers may go by the bitmap in dynamic images too: every sector of the block is in the file.
            self.host.write(start, b"\xff" * (self.block_size // SECTOR // 8))
            gaps = 0
        self._bits.forget(start, self._bitmap_size)  # of a block that was here before
        self._gaps[block] = 1 + gaps
        self._table[block] = start // SECTOR
        self._dirty_table.add(block // 128)
        self._fresh.add(start)

    def _discard(self, block: int) -> bool:
        if self.parent is not None:
            return False
        start = int(self._table[block]) * SECTOR
        self._bits.forget(start, self._bitmap_size)
        self._gaps[block] = 0
        self._table[block] = UNUSED
        self._dirty_table.add(block // 128)
        self._fresh.discard(start)
        self._space.release(start, self._bitmap_size + self.block_size)
        return True

    # Commit.

    def _begin(self) -> None:
        self._data_end = self._space.end

    def _dirty_pages(self) -> int:
        return len(self._dirty_table) + len(self._bits.dirty) + (not self._tail_written)

    def _commit(self) -> None:
        if not self._dirty_pages():
            self.host.sync()
            return
        fresh: list[int] = []
        old: list[int] = []
        starts = sorted(self._fresh)
        for page in sorted(self._bits.dirty):
            index = bisect_right(starts, page) - 1
            in_fresh = index >= 0 and page < starts[index] + self._bitmap_size
            (fresh if in_fresh else old).append(page)
        for page in fresh:
            self.host.write(page, self._bits.content(page))
        if not self._tail_written:
            if self.host.size > self._space.end:
                self.host.set_size(self._space.end)
            self.host.write(self._space.end, self._footer.pack())
        self.host.sync()  # what the table and the older blocks' bitmaps are about to refer to
        for page in old:
            self.host.write(page, self._bits.content(page))
        for index in sorted(self._dirty_table):
            entries = self._table[index * 128 : (index + 1) * 128].astype(">u4").tobytes()
            self.host.write(self._header.table_offset + index * SECTOR, entries)
        self.host.sync()
        self._bits.dirty.clear()
        self._dirty_table.clear()
        self._fresh.clear()
        if not self._tail_written:
            # The next growth has to clear this footer away, and nothing else.
            self._tail_written, self._grown, self._data_end = True, False, self._space.end
        for offset, length in self._space.settle():
            self.host.zero(offset, length)
