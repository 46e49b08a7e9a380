"""Bookkeeping inside an image file: which stretches are free, and the bitmaps of sectors."""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vmbus.storage.images.hostfile import HostFile, bad_image

__all__ = ["SectorBits", "SpaceMap"]

_CLEAN_PAGES = 4096


class SpaceMap:
    """The free stretches of an image file.

    Space that the file on disk still refers to is only reusable once the change that freed it is durable:
    `release` puts it aside and `settle` makes it available.

    Args:
        path: named in errors.
        used: rows of (offset, length) of everything that the file refers to, in bytes.
        end: the first byte after the file's last used or unusable byte; beyond it the file grows.
        alignment: allocations start at `lead` bytes before a multiple of this.
        lead: see `alignment`.

    Attributes:
        end: the first byte behind all space that was ever handed out.
        pending: bytes that wait for `settle`.

    Raises:
        DiskError: two stretches overlap or one reaches past `end`.
    """

    def __init__(
        self, path: Path, used: NDArray[np.uint64], end: int, *, alignment: int, lead: int = 0
    ) -> None:
        self._alignment = alignment
        self._lead = lead
        self._pending: list[tuple[int, int]] = []
        # By length: the first stretch that may have room. An image may have a gap behind each of a million blocks;
        # nobody looks through all of them for every block that is added.
        self._room: dict[int, int] = {}
        self.pending = 0
        order = used[np.argsort(used[:, 0], kind="stable")]
        starts, stops = order[:, 0], order[:, 0] + order[:, 1]
        clash = np.flatnonzero(stops[:-1] > starts[1:])
        if len(clash):
            at = int(clash[0])
            raise bad_image(path, f"two blocks overlap at byte {int(starts[at + 1])} of the file")
        if len(stops) and int(stops[-1]) > end:
            raise bad_image(
                path, f"a block at byte {int(starts[-1])} reaches past the end of the file at {end}"
            )
        previous = np.concatenate([np.zeros(1, np.uint64), stops])
        following = np.concatenate([starts, np.array([end], np.uint64)])
        gaps = np.flatnonzero(following > previous)
        self._free = [(int(previous[gap]), int(following[gap])) for gap in gaps]
        self.end = end

    def allocate(self, length: int) -> tuple[int, bool]:
        """`length` bytes: their offset, and whether they lie behind the old end of the file.

        Bytes inside the file hold anything, the caller zeroes them.
        """
        for index in range(self._room.get(length, 0), len(self._free)):
            start, stop = self._free[index]
            at = self._align(start)
            if at + length <= stop:
                self._free[index : index + 1] = [
                    piece for piece in ((start, at), (at + length, stop)) if piece[0] < piece[1]
                ]
                self._changed(index)
                self._room[length] = index
                return at, False
        self._room[length] = len(self._free)
        at = self._align(self.end)
        if at > self.end:
            self._insert(self.end, at)
        self.end = at + length
        return at, True

    def _changed(self, index: int) -> None:
        """The stretches from this one on are others now."""
        for length, first in self._room.items():
            self._room[length] = min(first, index)

    def _align(self, offset: int) -> int:
        return offset + -(offset + self._lead) % self._alignment

    def cancel(self, offset: int, length: int) -> None:
        """Take back an allocation that nothing on disk refers to."""
        self._insert(offset, offset + length)

    def release(self, offset: int, length: int) -> None:
        """Free a stretch as soon as the next `settle` says that the file no longer refers to it."""
        self._pending.append((offset, length))
        self.pending += length

    def settle(self) -> list[tuple[int, int]]:
        """All references that were dropped are durably gone; the stretches (offset, length) that became free."""
        freed, self._pending, self.pending = self._pending, [], 0
        for offset, length in freed:
            self._insert(offset, offset + length)
        return freed

    def _insert(self, start: int, stop: int) -> None:
        index = bisect_left(self._free, (start, stop))
        if index < len(self._free) and self._free[index][0] == stop:
            stop = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, stop))
        self._changed(index)


class SectorBits:
    """Sector bitmaps in the file, read by pages and kept until the image's commit writes them back.

    Args:
        host: the image file.
        page_size: bytes read and written at once.
        most_significant_first: the first sector is bit 7 of a byte (VHD), else bit 0 (VHDX).

    Attributes:
        dirty: file offsets of pages that differ from the file.
    """

    def __init__(self, host: HostFile, page_size: int, *, most_significant_first: bool) -> None:
        self._host = host
        self._page_size = page_size
        self._big = most_significant_first
        self._pages: dict[int, bytearray] = {}
        self.dirty: set[int] = set()

    def _page(self, offset: int) -> bytearray:
        page = self._pages.get(offset)
        if page is None:
            if len(self._pages) >= _CLEAN_PAGES:
                # the dirty ones are few: images commit long before. Readers may run at once, each keeps its page.
                self._pages = {at: kept for at, kept in list(self._pages.items()) if at in self.dirty}
            page = self._pages[offset] = bytearray(self._host.read(offset, self._page_size))
        return page

    def _spans(self, base: int, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """The pages of a range of bits: file offset, first bit in the page, number of bits."""
        per_page = self._page_size * 8
        while count:
            index, start = divmod(first, per_page)
            part = min(count, per_page - start)
            yield base + index * self._page_size, start, part
            first += part
            count -= part

    def _unpack(self, page: bytearray, start: int, count: int) -> NDArray[np.uint8]:
        raw = np.frombuffer(bytes(page[start // 8 : (start + count + 7) // 8]), np.uint8)
        bits = np.unpackbits(raw, bitorder="big") if self._big else np.unpackbits(raw, bitorder="little")
        return bits[start % 8 : start % 8 + count]

    def runs(self, base: int, first: int, count: int) -> Iterator[tuple[int, int, bool]]:
        """Stretches (first bit, number, set) of the bitmap at file offset `base`, adjacent ones different."""
        pieces = [
            self._unpack(self._page(at), start, part) for at, start, part in self._spans(base, first, count)
        ]
        bits = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        edges = [0, *(np.flatnonzero(bits[1:] != bits[:-1]) + 1).tolist(), count]
        for start, stop in pairwise(edges):
            yield first + start, stop - start, bool(bits[start])

    def count(self, base: int, length: int) -> int:
        """How many of the first `length` bits of the bitmap at file offset `base` are set; keeps no page."""
        size = -(-length // 8)
        raw = bytearray(self._host.read(base, size))
        for at in range(base, base + size, self._page_size):
            if (page := self._pages.get(at)) is not None:
                raw[at - base : at - base + self._page_size] = page[: base + size - at]
        bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="big" if self._big else "little")
        return int(np.count_nonzero(bits[:length]))

    def fill(self, base: int, first: int, count: int, value: bool) -> int:
        """Set or clear a range of bits of the bitmap at file offset `base`; how many of them were not so before."""
        changed = 0
        for at, start, part in self._spans(base, first, count):
            page = self._page(at)
            low, high = start // 8, (start + part + 7) // 8
            bits = self._unpack(page, low * 8, (high - low) * 8).copy()
            wanted = bits[start - low * 8 : start - low * 8 + part]
            changed += int(np.count_nonzero(wanted != value))
            wanted[:] = value
            packed = np.packbits(bits, bitorder="big") if self._big else np.packbits(bits, bitorder="little")
            page[low:high] = packed.tobytes()
            self.dirty.add(at)
        return changed

    def content(self, offset: int) -> bytes:
        """A dirty page as it has to be written."""
        return bytes(self._pages[offset])

    def forget(self, base: int, length: int) -> None:
        """Drop the pages of a bitmap that is no longer in use."""
        for at in range(base, base + length, self._page_size):
            self._pages.pop(at, None)
            self.dirty.discard(at)
