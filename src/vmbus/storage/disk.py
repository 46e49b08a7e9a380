"""Disks: what a storage provider has behind it, and the two plain ones (a raw file, host memory).

Every backend has the byte interface of `Disk`. A backend that is nothing but a file or a stretch of
memory says so through `Disk.fd` and `Disk.mapping`, and is then served in compiled code without
passing any data through Python.
"""

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self, TypeAlias
from uuid import UUID

from vmbus.errors import DeviceError, printable
from vmbus.sizes import byte_count

if TYPE_CHECKING:
    from vmbus.core.blockio import Requests

__all__ = ["Buffer", "Disk", "DiskError", "Extent", "MemoryDisk", "RawDisk", "merged", "open_host_file"]

_log = logging.getLogger(__name__)

Buffer: TypeAlias = bytes | bytearray | memoryview

SECTOR_SIZES = (512, 2048, 4096)
"""Logical sector sizes: hard disks have 512 or 4096 bytes, CD-ROMs 2048 (MMC-6 4.2.2)."""

_PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE (linux/falloc.h)
_ZERO_CHUNK = 1 << 20
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE (linux/mman.h)
_LONGEST_MESSAGE = 1000
_NO_HOLES = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_NO_LOCKS = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK)


class DiskError(DeviceError):
    """A disk could not do a read, write, flush or unmap.

    The message is one line that a terminal may show, whatever path or sentence of a stranger it quotes.

    Attributes:
        errno: the host's error number (``errno.ENOSPC`` …), or 0 if no system call was involved.
            The SCSI target chooses the sense data by it.
    """

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(printable(message, _LONGEST_MESSAGE))
        self.errno = number


class Extent(NamedTuple):
    """A stretch of a disk with one state of allocation; offsets and lengths in bytes."""

    offset: int
    length: int
    allocated: bool


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Extents that follow each other, with neighbours of one state joined."""
    last: Extent | None = None
    for extent in extents:
        if last is None:
            last = extent
        elif last.allocated == extent.allocated:
            last = Extent(last.offset, last.length + extent.length, last.allocated)
        else:
            yield last
            last = extent
    if last is not None:
        yield last


class Disk(ABC):
    """A random-access store of whole sectors; offsets and lengths are bytes and multiples of `sector_size`.

    Implementations allow calls from several threads at once: requests of one guest overlap.

    Attributes:
        sector_size: bytes of a logical sector: 512, 2048 (CD-ROM) or 4096.
        physical_sector_size: bytes the medium writes at once; 4096 with `sector_size` 512 is a "512e" disk.
        sector_count: number of logical sectors. It may grow or shrink while the disk is in use.
        read_only: writes, unmaps and zeroing are refused.
        fd: a file descriptor on which plain ``preadv``/``pwritev`` at ``lba * sector_size`` is right
            (the whole disk, nothing to translate), else -1.
        mapping: the disk's content as mapped host memory, else None; it cannot shrink while the disk is open.
        present: with `mapping`, a byte for each 4 KiB of it that is not 0 if its memory is known to be allocated; `fd`
            tells of others. None: reading the mapping allocates nothing.
        identifier: 16 bytes that name this disk for good, or None if it has no such name.
        unmap_granularity: bytes of the smallest aligned stretch that `unmap` gives back; 0 if it never does.
        serve_batch: carries out many reads or writes at once, straight from and to a guest's pages; returns how many
            of them, from the first on, went well. None if the disk has nothing better than one after the other.
    """

    sector_size: int
    physical_sector_size: int
    sector_count: int
    read_only: bool
    fd: int = -1
    mapping: memoryview | None = None
    present: mmap.mmap | None = None
    identifier: UUID | None = None
    unmap_granularity: int = 0
    serve_batch: "Callable[[Requests], int] | None" = None

    @property
    def size(self) -> int:
        """The capacity in bytes."""
        return self.sector_count * self.sector_size

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`.

        Raises:
            DiskError: out of range, not sector-aligned, or the backend failed.
        """

    @abstractmethod
    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at `offset`; it may stay in a volatile cache until `flush`.

        Raises:
            DiskError: read-only, out of range, not sector-aligned, or the backend failed.
        """

    @abstractmethod
    def flush(self) -> None:
        """Return when everything written before is on stable storage.

        Raises:
            DiskError: the backend could not promise that; what was written may be lost.
        """

    def write_through(self, offset: int, data: Buffer) -> None:
        """`write`, and return when `data` is on stable storage (SCSI's force unit access)."""
        self.write(offset, data)
        self.flush()

    def unmap(self, offset: int, length: int) -> None:
        """Let the range read as zeros and give its space back where the backend can.

        Raises:
            DiskError: as for `write`.
        """
        self.write_zeros(offset, length)

    def write_zeros(self, offset: int, length: int) -> None:
        """Fill the range with zeros, keeping its space.

        Raises:
            DiskError: as for `write`.
        """
        self.check(offset, length, writing=True)
        zeros = bytes(min(length, _ZERO_CHUNK))
        for at in range(offset, offset + length, _ZERO_CHUNK):
            self.write(at, memoryview(zeros)[: min(_ZERO_CHUNK, offset + length - at)])

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The states of allocation within the range, in order, adjacent ones different."""
        self.check(offset, length)
        yield Extent(offset, length, True)

    def own_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """As `extents`, with what is only in a parent not allocated: a write there takes new space."""
        return self.extents(offset, length)

    @abstractmethod
    def close(self) -> None:
        """Release the backend without an implied flush. Closing twice is allowed."""

    def check(self, offset: int, length: int, *, writing: bool = False) -> None:
        """Refuse a range that is not whole sectors inside the disk, or a write to a read-only disk.

        Raises:
            DiskError: with ``errno.EINVAL`` or ``errno.EROFS``.
        """
        if offset < 0 or length < 0 or offset % self.sector_size or length % self.sector_size:
            raise DiskError(
                f"bytes {offset}+{length} are not whole {self.sector_size}-byte sectors", errno.EINVAL
            )
        if offset + length > self.size:
            raise DiskError(
                f"bytes {offset}+{length} reach past the end of the disk at {self.size}", errno.EINVAL
            )
        if writing and self.read_only:
            raise DiskError("the disk is read-only", errno.EROFS)

    def __repr__(self) -> str:
        where = printable(str(getattr(self, "name", None) or getattr(self, "path", "")))
        kind = type(self).__name__
        return f"<{kind} {where}: {self.size:,} bytes{', read-only' if self.read_only else ''}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _FileDisk(Disk):
    """The common part of the disks that are one file descriptor."""

    fd = -1  # until it is open: `__del__` also runs after a failed construction

    def _open(self, fd: int, name: str, sector_size: int, physical_sector_size: int, read_only: bool) -> None:
        if sector_size not in SECTOR_SIZES:
            raise DiskError(f"{name}: sectors of {sector_size} bytes, must be one of {SECTOR_SIZES}")
        if physical_sector_size < sector_size or physical_sector_size & (physical_sector_size - 1):
            raise DiskError(
                f"{name}: physical sectors of {physical_sector_size} bytes do not fit {sector_size}-byte ones"
            )
        size = os.lseek(fd, 0, os.SEEK_END)
        if not size:
            raise DiskError(f"{name}: the image is empty")
        if size % sector_size:
            raise DiskError(f"{name}: {size} bytes are not a whole number of {sector_size}-byte sectors")
        self.fd = fd
        self.name = name
        self.sector_size = sector_size
        self.physical_sector_size = physical_sector_size
        self.sector_count = size // sector_size
        self.read_only = read_only

    def read(self, offset: int, length: int) -> bytes:
        self.check(offset, length)
        parts: list[bytes] = []
        try:
            while length:
                part = os.pread(self.fd, length, offset)
                if not part:
                    raise DiskError(f"{self.name}: the file ends before byte {offset}", errno.EIO)
                parts.append(part)
                offset += len(part)
                length -= len(part)
        except OSError as error:
            raise self._error("read", offset, error) from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, offset: int, data: Buffer) -> None:
        self._write(offset, data, 0)

    def write_through(self, offset: int, data: Buffer) -> None:
        self._write(offset, data, os.RWF_DSYNC)

    def _write(self, offset: int, data: Buffer, flags: int) -> None:
        rest = memoryview(data).cast("B")
        self.check(offset, len(rest), writing=True)
        try:
            while rest:
                done = os.pwritev(self.fd, [rest], offset, flags)
                rest = rest[done:]
                offset += done
        except OSError as error:
            raise self._error("write", offset, error) from error

    def flush(self) -> None:
        if self.read_only:
            return
        try:
            os.fsync(self.fd)
        except OSError as error:
            raise self._error("flush", 0, error) from error

    def unmap(self, offset: int, length: int) -> None:
        self.check(offset, length, writing=True)
        if not length:
            return
        number = _fallocate(self.fd, _PUNCH_HOLE, offset, length)
        if number in _NO_HOLES:  # this file system cannot: the range must read as zeros all the same
            self.write_zeros(offset, length)
        elif number:
            raise self._error("unmap", offset, OSError(number, os.strerror(number)))

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        self.check(offset, length)
        end = offset + length
        # lseek moves the shared file position, which nothing else uses: threads do not disturb each other.
        while offset < end:
            data = self._seek(offset, os.SEEK_DATA, end)
            if data > offset:
                yield Extent(offset, data - offset, False)
                offset = data
            if offset < end:
                hole = self._seek(offset, os.SEEK_HOLE, end)
                yield Extent(offset, hole - offset, True)
                offset = hole

    def _seek(self, offset: int, whence: int, end: int) -> int:
        """The next data or hole at or after `offset`, on a sector boundary (data grows, holes shrink)."""
        try:
            found = os.lseek(self.fd, offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data up to the end of the file
                return end
            raise self._error("query", offset, error) from error
        if whence == os.SEEK_DATA:
            found -= found % self.sector_size
        else:
            found += -found % self.sector_size
        return min(max(found, offset), end)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()

    def _error(self, what: str, offset: int, error: OSError) -> DiskError:
        why = "the disk is closed" if self.fd < 0 else error.strerror
        return DiskError(f"{self.name}: {what} at byte {offset} failed: {why}", error.errno or errno.EIO)


class RawDisk(_FileDisk):
    """A disk whose sectors are the bytes of a host file or host block device, in order, whatever they are.

    Holes of a sparse file stay holes until they are written; `unmap` makes new ones. The file is locked while the disk
    is open (`open_host_file`).

    Args:
        path: the image.
        sector_size: logical sector, 512, 2048 or 4096 bytes.
        physical_sector_size: 0 means the same as `sector_size`; 4096 with 512 makes a "512e" disk.
        read_only: open without write access; the image is never changed.

    Raises:
        DiskError: missing, unreadable, in use, empty, not a file or block device, or not whole sectors;
            the message is one sentence that names the file.
    """

    unmap_granularity = 4096

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        sector_size: int = 512,
        physical_sector_size: int = 0,
        read_only: bool = False,
    ) -> None:
        name = os.fspath(path)
        self._take(
            open_host_file(name, read_only=read_only), name, sector_size, physical_sector_size, read_only
        )

    @classmethod
    def from_descriptor(cls, fd: int, name: str, *, sector_size: int = 512, read_only: bool = False) -> Self:
        """The disk in a file that `open_host_file` opened; the descriptor is the disk's from now on, also if it fails.

        Raises:
            DiskError: empty, or not whole sectors.
        """
        disk = cls.__new__(cls)
        disk._take(fd, name, sector_size, 0, read_only)
        return disk

    def _take(self, fd: int, name: str, sector_size: int, physical_sector_size: int, read_only: bool) -> None:
        try:
            self._open(fd, name, sector_size, physical_sector_size or sector_size, read_only)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        size: int,
        *,
        sector_size: int = 512,
        physical_sector_size: int = 0,
    ) -> Self:
        """Make a new sparse image of `size` bytes and open it; an existing file is not touched.

        Raises:
            DiskError: the file exists, cannot be made, or the size is not whole sectors.
        """
        size = byte_count(size, "the image")
        if sector_size not in SECTOR_SIZES:
            raise DiskError(f"{Path(path)}: sectors of {sector_size} bytes, must be one of {SECTOR_SIZES}")
        if "\0" in os.fsdecode(path):
            raise DiskError(f"{os.fsdecode(path)!r}: no file can have this name", errno.EINVAL)
        if not 0 < size < 1 << 63 or size % sector_size:
            raise DiskError(
                f"{Path(path)}: {size} bytes are not a whole number of {sector_size}-byte sectors"
            )
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                os.ftruncate(fd, size)
            finally:
                os.close(fd)
        except OSError as error:
            raise DiskError(
                f"{Path(path)}: cannot make the image: {error.strerror}", error.errno or 0
            ) from error
        return cls(path, sector_size=sector_size, physical_sector_size=physical_sector_size)

    def refresh(self) -> None:
        """Take over a size that was changed from outside (`ftruncate`, a grown logical volume)."""
        self.sector_count = os.lseek(self.fd, 0, os.SEEK_END) // self.sector_size


class MemoryDisk(_FileDisk):
    """A disk in anonymous host memory, gone when it is closed; sectors that nobody used are zeros and free.

    The memory is a sealed memfd that is also mapped, so that compiled code may copy to and from it directly:
    its size can never change, therefore no access to the mapping can fault.

    Args:
        size: capacity in bytes, a multiple of `sector_size`.
        sector_size: logical sector, 512, 2048 or 4096 bytes.
        physical_sector_size: 0 means the same as `sector_size`.
        content: initial bytes from offset 0; the rest is zeros.
        read_only: refuse writes after `content` was stored.

    Raises:
        DiskError: the size is 0 or not whole sectors, `content` is longer, or there is no memory.
    """

    unmap_granularity = 4096

    def __init__(
        self,
        size: int,
        *,
        sector_size: int = 512,
        physical_sector_size: int = 0,
        content: Buffer = b"",
        read_only: bool = False,
    ) -> None:
        size = byte_count(size, "a memory disk")
        if not 0 < size < 1 << 63:
            raise DiskError(f"a memory disk of {size} bytes")
        if len(content) > size:
            raise DiskError(f"{len(content)} bytes do not fit a memory disk of {size}")
        fd = os.memfd_create("vmbus-disk", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            _seal_size(fd)
            self._map = mmap.mmap(fd, size)
            # Last: from here on the descriptor is the disk's, which closes it, also when it was never finished.
            self._open(fd, "memory disk", sector_size, physical_sector_size or sector_size, read_only)
        except OSError as error:
            os.close(fd)
            raise DiskError(f"no memory disk of {size} bytes: {error.strerror}", error.errno or 0) from error
        except BaseException:
            os.close(fd)
            raise
        self._map[: len(content)] = bytes(content)
        self.mapping = memoryview(self._map)
        # A byte for 4 KiB, which takes memory itself only where it is set.
        self.present = mmap.mmap(-1, -(-size // 4096), flags=_PRIVATE)

    def unmap(self, offset: int, length: int) -> None:
        """See `Disk.unmap`."""
        super().unmap(offset, length)
        first, end = -(-offset // 4096), (offset + length) // 4096
        marks = self.present
        if marks is None or end <= first:
            return
        low, high = first + -first % mmap.PAGESIZE, end - end % mmap.PAGESIZE
        if low < high:  # as many as the disk may have: whole pages of marks are given back, not written
            marks.madvise(mmap.MADV_DONTNEED, low, high - low)
            marks[first:low], marks[high:end] = bytes(low - first), bytes(end - high)
        else:
            marks[first:end] = bytes(end - first)

    def flush(self) -> None:
        """Nothing to do: the disk ends with the process."""

    def write_through(self, offset: int, data: Buffer) -> None:
        """The same as `write`: there is no cache."""
        self.write(offset, data)

    def close(self) -> None:
        """Give the memory back."""
        if self.mapping is not None:
            try:
                self.mapping.release()
                self._map.close()
            except BufferError:  # a server in compiled code still holds it; unmapped when that lets go
                _log.debug("memory disk closed while still in use")
            self.mapping = None
        super().close()


def _seal_size(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)


def open_host_file(path: str | os.PathLike[str], *, read_only: bool) -> int:
    """Open an image's file and lock it; the descriptor, which holds the lock until it and its copies are closed.

    Writers hold a file alone and readers share it, in this process and across all of the host (``flock``), so that
    two machines never write one disk. Of what is neither a regular file nor a block device nothing but its
    kind is looked at: to open a FIFO or a device is to do something to it, and to whoever waits at its other end.

    Raises:
        DiskError: missing, unreadable, something else, or in use.
    """
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            mode = os.fstat(place).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise DiskError(f"{os.fspath(path)}: neither a file nor a block device")
            by_descriptor = f"/proc/self/fd/{place}"  # the same file, whatever the path means by now
            fd = os.open(by_descriptor if os.path.exists(by_descriptor) else path, flags)
        finally:
            os.close(place)
    except OSError as error:
        raise DiskError(
            f"{os.fspath(path)}: cannot open the image: {error.strerror}", error.errno or 0
        ) from error
    except ValueError as error:  # a NUL in the path
        raise DiskError(f"{os.fspath(path)!r}: no file can have this name", errno.EINVAL) from error
    try:
        _lock(fd, path, fcntl.LOCK_SH if read_only else fcntl.LOCK_EX, patient=stat.S_ISBLK(mode))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock(fd: int, path: str | os.PathLike[str], kind: int, *, patient: bool) -> None:
    """Lock an open file or raise `DiskError`; udev holds a block device for a moment after somebody wrote to it."""
    tries = 20 if patient else 1
    while tries:
        tries -= 1
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in _NO_LOCKS:
                _log.warning(
                    "%s: its file system has no locks; nothing keeps a second writer away",
                    printable(str(path)),
                )
                return
            if error.errno != errno.EWOULDBLOCK:
                raise DiskError(f"{path}: cannot lock: {error.strerror}", error.errno or 0) from error
            if not tries:
                who = "written" if kind == fcntl.LOCK_SH else "open"
                raise DiskError(
                    f"{path}: the image is in use: it is {who} elsewhere, in this process or another",
                    error.errno,
                ) from error
            time.sleep(0.05)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.fallocate.restype = ctypes.c_int


def _fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """``fallocate(2)``, which `os` lacks with its modes; the error number, or 0."""
    while _libc.fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            return number
    return 0
