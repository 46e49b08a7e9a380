"""What all images made of blocks have in common: splitting requests, parents, holes, and when to commit."""

import errno
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from vmbus.storage.disk import Disk, DiskError, Extent, merged
from vmbus.storage.images.chain import Chain
from vmbus.storage.images.hostfile import Buffer, HostFile, SharedLock
from vmbus.storage.images.space import SpaceMap
from vmbus.trace.ledger import Account

if TYPE_CHECKING:
    from vmbus.core.blockio import Requests

__all__ = ["BlockImage", "BlockState", "ImageDisk", "OpenParent"]

_log = logging.getLogger(__name__)

_MAX_PENDING = 64 << 20
_LOOK_AHEAD = 1 << 16
"""Blocks of the map that are searched at once."""
_CLEAR_STEPS = 64
_CLEAR_BYTES = 16 << 20
_CLEAR_BLOCKS = 512
"""What clearing a range does at most while it holds the image: steps, bytes of zeros that it writes; and blocks that it
marks between two looks at what has to be committed."""
_BREATH = 1e-4
"""Seconds between two holds: without, Python's locks would give the image back to the same thread again and again."""


class BlockState(IntEnum):
    """Where the content of a block is."""

    ABSENT = 0  # in the parent, or zeros without one
    ZERO = 1  # zeros, whatever the parent has
    FULL = 2  # in this file
    PARTIAL = 3  # sector by sector: in this file where the bitmap says so, else in the parent


class ImageDisk(Disk):
    """A disk in an image file.

    Attributes:
        format: the format's name, as `open_disk` takes it.
        variant: ``"fixed"``, ``"dynamic"`` or ``"differencing"``.
        host: the image file.
        account: counts the backend calls of this image and its parents.
        parent: the image that a differencing image is based on.
    """

    format: ClassVar[str]
    variant: str
    host: HostFile
    account: Account
    parent: "ImageDisk | None" = None

    @property
    def path(self) -> Path:
        """The image file's path."""
        return self.host.path

    def close(self) -> None:
        """Close the image and its parents."""
        self.host.close()
        if self.parent is not None:
            self.parent.close()


_Extents = Callable[[int, int], Iterator[Extent]]
OpenParent = Callable[[Path, Chain, Account], ImageDisk]
"""Opens the parent of an image read-only: its path, the way to it, the account."""


class BlockImage(ImageDisk):
    """An image whose disk is cut into equal blocks, each somewhere in the file or nowhere.

    Data is written in place or into space that the file does not refer to yet. What refers to it (tables and
    bitmaps) stays in memory until `_commit` writes it, behind the data: a process or a machine that stops at any
    point leaves the state of the last commit, plus whatever in-place writes came after it.

    Reads and in-place writes run side by side; everything that changes the block map runs alone.
    """

    block_size: int
    _space: SpaceMap

    def __init__(self) -> None:
        self._lock = SharedLock()
        self._writing = False
        self._failure: DiskError | None = None
        self.serve_batch = self._serve_batch

    # What a format provides. All of it is called with the lock held.

    @abstractmethod
    def _locate(self, block: int) -> tuple[int, int]:
        """The `BlockState` of a block, and the file offset of its data if it has any."""

    @abstractmethod
    def _locate_full(self, blocks: NDArray[np.uint64]) -> tuple[NDArray[np.bool_], NDArray[np.uint64]]:
        """For many blocks: which are `BlockState.FULL`, and the file offsets of their data."""

    @abstractmethod
    def _runs(self, block: int, first: int, count: int) -> Iterator[tuple[int, int, bool]]:
        """Stretches (first sector in the block, number, in this file) of a partial block."""

    @abstractmethod
    def _mark(self, block: int, first: int, count: int) -> None:
        """Sectors of a partial block are in this file from now on."""

    @abstractmethod
    def _new_space(self) -> int:
        """Space for the data of one block, all zeros, that nothing refers to: its file offset."""

    @abstractmethod
    def _cancel_space(self, offset: int) -> None:
        """Space from `_new_space` is not needed after all."""

    @abstractmethod
    def _record(self, block: int, state: BlockState, offset: int) -> None:
        """A block that had no space has it now; a partial one starts with no sector in this file.

        If this fails, the block is as before and the space still free.
        """

    @abstractmethod
    def _discard(self, block: int) -> bool:
        """Let a whole block read as zeros and free its space; False if the format cannot say so."""

    @abstractmethod
    def _begin(self) -> None:
        """The first change since the image was opened is about to be made."""

    @abstractmethod
    def _dirty_pages(self) -> int:
        """How many pages of metadata the next commit has to write."""

    @abstractmethod
    def _commit(self) -> None:
        """Make the data, and then the metadata that refers to it, durable."""

    def _discard_run(self, block: int, count: int) -> int:
        """`_discard` for absent blocks that follow each other; how many were done, 0 if the format cannot say so."""
        return int(self._discard(block))

    @abstractmethod
    def _like(self, block: int, end: int) -> int:
        """How many blocks from `block` up to `end` are as the first: absent, zero, or with data (full or partial)."""

    @property
    def _dirty_limit(self) -> int:
        """Pages of metadata that may be dirty before a commit is made without being asked for."""
        return 64

    def _must_commit(self) -> bool:
        """Too much hangs on the next commit: pages in memory, or freed space that cannot be used again before."""
        return (
            self._dirty_pages() >= self._dirty_limit
            or self._space.pending >= _MAX_PENDING + 4 * self.block_size
        )

    # Requests.

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """The parts of a range: block, offset in the block, offset in the request, length."""
        at = 0
        while at < length:
            block, start = divmod(offset + at, self.block_size)
            part = min(self.block_size - start, length - at)
            yield block, start, at, part
            at += part

    def read(self, offset: int, length: int) -> bytes:
        """See `Disk.read`."""
        self.check(offset, length)
        block, start = divmod(offset, self.block_size)
        with self._lock.shared:
            if 0 < length <= self.block_size - start:
                state, at = self._locate(block)
                if state == BlockState.FULL:
                    return self.host.read(at + start, length)
                if state == BlockState.ABSENT and (parent := self.parent) is None:
                    return bytes(length)
                if state == BlockState.ABSENT and parent is not None and offset + length <= parent.size:
                    return parent.read(offset, length)
            out = bytearray(length)
            self._read_into(offset, memoryview(out))
        return bytes(out)

    def _serve_batch(self, requests: "Requests") -> int:
        """See `Disk.serve_batch`: what is in this file goes straight between it and the guest's pages."""
        self._check_failure()
        offsets = np.frombuffer(requests.offsets, np.uint64)
        blocks, starts = np.divmod(offsets, np.uint64(self.block_size))
        inside = starts + np.uint64(requests.length) <= self.block_size
        with self._lock.shared:
            if self.host.overlay is not None or (requests.write and (self.read_only or not self._writing)):
                return 0
            full, places = self._locate_full(blocks)
            fit = full & inside
            count = len(fit) if fit.all() else int(fit.argmin())
            done = requests.transfer_file(self.host.fd, places + starts, count) if count else 0
            self.account.backend_calls += done
        return done

    def _read_into(self, offset: int, out: memoryview) -> None:
        """Fill the zeroed `out`."""
        for block, start, at, length in self._pieces(offset, len(out)):
            state, data = self._locate(block)
            part = out[at : at + length]
            if state == BlockState.FULL:
                self.host.read_into(data + start, part)
            elif state == BlockState.PARTIAL:
                sector = self.sector_size
                for first, count, here in self._runs(block, start // sector, length // sector):
                    low = first * sector - start
                    run = part[low : low + count * sector]
                    if here:
                        self.host.read_into(data + first * sector, run)
                    else:
                        self._read_parent(block * self.block_size + first * sector, run)
            elif state == BlockState.ABSENT:
                self._read_parent(offset + at, part)

    def _read_parent(self, offset: int, out: memoryview) -> None:
        """Fill the zeroed `out` from the parent; a smaller parent ends in zeros."""
        parent = self.parent
        if parent is None:
            return
        length = min(len(out), parent.size - offset)
        if length <= 0:
            return
        if isinstance(parent, BlockImage):
            with parent._lock.shared:
                parent._read_into(offset, out[:length])
        else:
            out[:length] = parent.read(offset, length)

    def write(self, offset: int, data: Buffer) -> None:
        """See `Disk.write`."""
        view = memoryview(data).cast("B")
        self.check(offset, len(view), writing=True)
        self._check_failure()
        with self._lock.shared:
            if self._writing:
                places = [
                    (self._locate(block), start, at, length)
                    for block, start, at, length in self._pieces(offset, len(view))
                ]
                if all(place[0][0] == BlockState.FULL for place in places):
                    for (_, base), start, at, length in places:
                        self.host.write(base + start, view[at : at + length])
                    return
        with self._changing():
            for block, start, at, length in self._pieces(offset, len(view)):
                self._write_piece(block, start, view[at : at + length])
                if self._must_commit():
                    self._or_fail(self._commit)

    def _write_piece(self, block: int, start: int, data: memoryview | None, length: int = 0) -> None:
        """Write into one block; `data` None means `length` zeros."""
        state, base = self._locate(block)
        length = length if data is None else len(data)
        sectors = start // self.sector_size, length // self.sector_size
        if state in (BlockState.FULL, BlockState.PARTIAL):
            if data is None:
                self.host.zero(base + start, length)
            else:
                self.host.write(base + start, data)
            if state == BlockState.PARTIAL:
                self._mark(block, *sectors)
            return
        base = self._new_space()
        whole = length == min(self.block_size, self.size - block * self.block_size)
        partial = self.parent is not None and state == BlockState.ABSENT and not whole
        try:
            if data is not None:
                self.host.write(base + start, data)
            self._record(block, BlockState.PARTIAL if partial else BlockState.FULL, base)
        except DiskError:
            self._cancel_space(base)
            raise
        if partial:
            self._mark(block, *sectors)

    def unmap(self, offset: int, length: int) -> None:
        """See `Disk.unmap`; whole blocks give their space back, parts of blocks become holes of the file."""
        self._clear(offset, length, keep_space=False)

    def write_zeros(self, offset: int, length: int) -> None:
        """See `Disk.write_zeros`; blocks that have no space do not get any."""
        self._clear(offset, length, keep_space=True)

    def _clear(self, offset: int, length: int, *, keep_space: bool) -> None:
        self.check(offset, length, writing=True)
        end = offset + length
        while True:
            self._check_failure()
            with self._changing():
                offset = self._clear_some(offset, end, keep_space)
            if offset >= end:
                return
            time.sleep(_BREATH)  # a range may have millions of blocks: others get their turn

    def _clear_some(self, offset: int, end: int, keep_space: bool) -> int:
        """Clear the beginning of a range, as much as takes little time; where the rest begins."""
        size, written = self.block_size, 0
        for _ in range(_CLEAR_STEPS):
            if offset >= end or written >= _CLEAR_BYTES:
                break
            block = offset // size
            stop = min((block + 1) * size, end)
            state, base = self._locate(block)
            if state in (BlockState.FULL, BlockState.PARTIAL):
                whole = stop - offset == min(size, self.size - block * size)
                if keep_space or not (whole and self._discard(block)):
                    if keep_space:
                        stop = min(stop, offset + _CLEAR_BYTES)
                        written += stop - offset
                    self._clear_data(state, base, offset, stop, keep_space)
            else:
                stop = min((block + self._run(block, -(-end // size))) * size, end)
                if state == BlockState.ABSENT:
                    stop = self._clear_absent(offset, stop)
            offset = stop
            if self._must_commit():
                self._or_fail(self._commit)
                break
        return offset

    def _clear_data(self, state: int, base: int, offset: int, stop: int, keep_space: bool) -> None:
        """Clear a part of a block that is in this file."""
        block, start = divmod(offset, self.block_size)
        sectors = start // self.sector_size, (stop - offset) // self.sector_size
        # Without a parent, sectors that are not in this file read as zeros as they are.
        marked = state == BlockState.PARTIAL and self.parent is not None
        if state == BlockState.FULL or marked or any(here for _, _, here in self._runs(block, *sectors)):
            (self._zero_in_place if keep_space else self.host.zero)(base + start, stop - offset)
        if marked:
            self._mark(block, *sectors)

    def _clear_absent(self, offset: int, stop: int) -> int:
        """Clear the beginning of a range of absent blocks; where the rest begins. Free where no parent has data."""
        size = self.block_size
        changed, vacant = self._parent_stretch(offset, stop)
        if changed >= stop and vacant:
            return stop
        block, start = divmod(offset, size)
        if vacant and changed // size > block:
            return changed // size * size
        wanted = min(stop, -(-changed // size) * size)
        if stop < self.size:
            whole = wanted // size - block
        else:
            whole = -(-wanted // size) - block
        done = 0
        while not start and done < whole and not self._must_commit():
            more = self._discard_run(block + done, min(whole - done, _CLEAR_BLOCKS))
            if not more:
                break
            done += more
        if done:
            return min((block + done) * size, stop)
        part = min(size - start, stop - offset)
        self._write_piece(block, start, None, part)
        return offset + part

    def _run(self, block: int, end: int) -> int:
        """`_like`, with a search that costs in proportion to what it finds; at most `_LOOK_AHEAD` blocks."""
        span = 64
        while True:
            limit = min(end, block + span)
            found = self._like(block, limit)
            if block + found < limit or limit == end or span >= _LOOK_AHEAD:
                return found
            span *= 4

    def _stretch(self, offset: int, end: int) -> tuple[int, bool]:
        """Where the part of the range ends that is of one kind, and whether it is zeros because nobody wrote there.

        Goes by the block maps of this image and its parents, not by what the blocks hold.
        """
        with self._lock.shared:
            block = offset // self.block_size
            state, _ = self._locate(block)
            run = self._run(block, -(-end // self.block_size))
            stop = min((block + run) * self.block_size, end)
            if state == BlockState.ABSENT:
                return self._parent_stretch(offset, stop)
            return stop, state == BlockState.ZERO

    def _parent_stretch(self, offset: int, end: int) -> tuple[int, bool]:
        """`_stretch` of the parent; behind its end, and without one, there are zeros."""
        parent = self.parent
        if parent is None or offset >= parent.size:
            return end, True
        end = min(end, parent.size)
        if isinstance(parent, BlockImage):
            return parent._stretch(offset, end)
        first = next(parent.extents(offset, end - offset))
        return first.offset + first.length, not first.allocated

    def _zero_in_place(self, offset: int, length: int) -> None:
        zeros = bytes(min(length, 1 << 20))
        for at in range(offset, offset + length, len(zeros)):
            self.host.write(at, memoryview(zeros)[: min(len(zeros), offset + length - at)])

    def flush(self) -> None:
        """See `Disk.flush`."""
        self._check_failure()
        if self.read_only or not self._writing:
            return
        with self._lock.shared:
            if not self._dirty_pages():
                self._or_fail(self.host.sync)
                return
        with self._lock.exclusive:
            self._or_fail(self._commit)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """See `Disk.extents`; holes inside the host file count as not allocated."""
        self.check(offset, length)
        return merged(self._all_extents(offset, length, self._parent_extents))

    def own_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """See `Disk.own_extents`."""
        self.check(offset, length)
        return merged(self._all_extents(offset, length, _not_here))

    def _all_extents(self, offset: int, length: int, elsewhere: _Extents) -> Iterator[Extent]:
        """The extents of a range; `elsewhere` tells those of what is not in this file."""
        end = offset + length
        while offset < end:
            block, start = divmod(offset, self.block_size)
            part = min(self.block_size - start, end - offset)
            with self._lock.shared:
                state, base = self._locate(block)
                if state in (BlockState.ABSENT, BlockState.ZERO):
                    run = self._run(block, -(-end // self.block_size))
                    part = min(run * self.block_size - start, end - offset)
                parts = list(self._block_extents(block, start, part, (state, base), elsewhere))
            yield from parts
            offset += part

    def _block_extents(
        self, block: int, start: int, length: int, place: tuple[int, int], elsewhere: _Extents
    ) -> Iterator[Extent]:
        (state, base), sector = place, self.sector_size
        offset = block * self.block_size + start
        if state == BlockState.FULL:
            yield from self._host_extents(offset, base + start, length)
        elif state == BlockState.PARTIAL:
            for first, count, here in self._runs(block, start // sector, length // sector):
                at = block * self.block_size + first * sector
                if here:
                    yield from self._host_extents(at, base + first * sector, count * sector)
                else:
                    yield from elsewhere(at, count * sector)
        elif state == BlockState.ABSENT:
            yield from elsewhere(offset, length)
        else:
            yield Extent(offset, length, False)

    def _host_extents(self, offset: int, at: int, length: int) -> Iterator[Extent]:
        """The file's holes, rounded to sectors in favour of data."""
        if self.host.overlay is not None:  # what a log holds does not show in the file's holes
            yield Extent(offset, length, True)
            return
        sector, done, end = self.sector_size, 0, length
        for run_at, run_length, allocated in self.host.data_runs(at, length):
            stop = run_at + run_length - at
            stop = min(stop + -stop % sector, end) if allocated else stop - stop % sector
            if stop > done:
                yield Extent(offset + done, stop - done, allocated)
                done = stop
        if done < end:
            yield Extent(offset + done, end - done, True)

    def _parent_extents(self, offset: int, length: int) -> Iterator[Extent]:
        there = 0 if self.parent is None else max(0, min(length, self.parent.size - offset))
        if there and self.parent is not None:
            yield from self.parent.extents(offset, there)
        if there < length:
            yield Extent(offset + there, length - there, False)

    # Changes.

    def _changing(self) -> "_Change":
        return _Change(self)

    def _check_failure(self) -> None:
        if self._failure is not None:
            raise DiskError(
                f"{self.path}: an earlier write-back failed, the image is closed to writes", errno.EIO
            )

    def _or_fail(self, action: Callable[[], None]) -> None:
        try:
            action()
        except DiskError as error:
            # A full disk may be tried again, everything is still in memory. After any other error, and above all
            # after a failed fsync, nobody knows what the file holds: no later flush may claim success.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or self.host.sync_failed:
                self._failure = error
            raise

    def close(self) -> None:
        """Write back what refers to the data written so far, and close.

        Raises:
            DiskError: it could not be written; the image is closed and holds the state of the last flush.
        """
        try:
            if self.host.fd >= 0 and self._writing and self._failure is None:
                with self._lock.exclusive:
                    self._finish()
        finally:
            super().close()

    def _finish(self) -> None:
        """What closing an image that was changed takes."""
        self._commit()

    def __enter__(self) -> Self:
        return self


def _not_here(offset: int, length: int) -> Iterator[Extent]:
    yield Extent(offset, length, False)


class _Change:
    """Holds the image alone, after the format has noted that it is being changed."""

    def __init__(self, image: BlockImage) -> None:
        self._image = image

    def __enter__(self) -> None:
        self._image._lock.exclusive.__enter__()
        try:
            if not self._image._writing:
                self._image._begin()
                self._image._writing = True
        except BaseException:
            self._image._lock.exclusive.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self._image._lock.exclusive.__exit__()
