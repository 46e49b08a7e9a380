"""The host file under an image: exact reads and writes, holes, counting, and a lock for many readers."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from vmbus.storage.disk import _NO_HOLES, _PUNCH_HOLE, Buffer, DiskError, _fallocate, open_host_file
from vmbus.storage.images.overlay import Overlay
from vmbus.trace.ledger import Account

__all__ = ["Buffer", "HostFile", "SharedLock", "bad_image"]

_ZEROS = bytes(1 << 20)


def bad_image(path: Path, sentence: str) -> DiskError:
    """The error for an image whose content cannot be right."""
    return DiskError(f"{path}: {sentence}", errno.EINVAL)


class HostFile:
    """An image file, opened and locked; every system call that moves data or syncs counts as a backend call.

    Writers hold the file alone and readers share it (`open_host_file`), so that two processes never write one image and
    nobody writes the parent of an open differencing image.

    Args:
        path: an existing regular file or block device.
        read_only: open without write access.
        account: where backend calls are counted.

    Attributes:
        overlay: what reads see in place of the file's own content: how a read-only image looks as if its log had
            been replayed; None: nothing.
        sync_failed: a `sync` failed: what was written before may be lost for good.

    Raises:
        DiskError: missing, unreadable, neither file nor block device, or in use.
    """

    def __init__(self, path: Path, *, read_only: bool, account: Account) -> None:
        self.path = path
        self.read_only = read_only
        self.account = account
        self.overlay: Overlay | None = None
        self.sync_failed = False
        self.fd = open_host_file(path, read_only=read_only)

    @property
    def size(self) -> int:
        """Bytes in the file now."""
        size = os.lseek(self.fd, 0, os.SEEK_END)
        return size if self.overlay is None else max(size, self.overlay.size)

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: the same for two names of one file."""
        status = os.fstat(self.fd)
        return status.st_dev, status.st_ino

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`.

        Raises:
            DiskError: the file ends before, or the host's disk failed.
        """
        if self.overlay is None:
            try:
                self.account.backend_calls += 1
                data = os.pread(self.fd, length, offset)
            except OSError as error:
                raise self._failed("read", offset, error) from error
            except OverflowError as error:
                raise DiskError(f"{self.path}: no file has a byte {offset}", errno.EINVAL) from error
            if len(data) == length:
                return data
        out = bytearray(length)
        self.read_into(offset, memoryview(out))
        return bytes(out)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`.

        Raises:
            DiskError: the file ends before, or the host's disk failed.
        """
        end = offset + len(out)
        real_end = os.lseek(self.fd, 0, os.SEEK_END) if self.overlay is not None else end
        at = offset
        try:
            while at < min(end, real_end):
                self.account.backend_calls += 1
                done = os.preadv(self.fd, [out[at - offset : min(end, real_end) - offset]], at)
                if not done:
                    raise DiskError(f"{self.path}: the file ends at byte {at}, before byte {end}", errno.EIO)
                at += done
        except OSError as error:
            raise self._failed("read", at, error) from error
        if self.overlay is not None:
            if end > max(real_end, self.overlay.size):
                raise DiskError(f"{self.path}: the file ends before byte {end}", errno.EIO)
            self.overlay.lay_over(offset, out)

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at `offset`.

        Raises:
            DiskError: the host's disk failed or is full.
        """
        rest = memoryview(data).cast("B")
        try:
            while rest:
                self.account.backend_calls += 1
                done = os.pwrite(self.fd, rest, offset)
                offset += done
                rest = rest[done:]
        except OSError as error:
            raise self._failed("write", offset, error) from error

    def set_size(self, size: int) -> None:
        """Cut the file, or let it grow by a hole.

        Raises:
            DiskError: the host's disk refused.
        """
        try:
            self.account.backend_calls += 1
            os.ftruncate(self.fd, size)
        except OSError as error:
            raise self._failed("resize", size, error) from error

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros, as a hole where the host's file system can.

        Raises:
            DiskError: the host's disk failed.
        """
        if length <= 0:
            return
        self.account.backend_calls += 1
        number = _fallocate(self.fd, _PUNCH_HOLE, offset, length)
        if not number:
            return
        if number not in _NO_HOLES:
            raise self._failed("unmap", offset, OSError(number, os.strerror(number)))
        end = min(offset + length, self.size)
        for at in range(offset, end, len(_ZEROS)):
            self.write(at, memoryview(_ZEROS)[: min(len(_ZEROS), end - at)])

    def sync(self) -> None:
        """Return when everything written, and the file's size, is on stable storage.

        Raises:
            DiskError: the host could not promise it.
        """
        if self.sync_failed:  # the kernel reports a lost page once, and then no more
            raise DiskError(f"{self.path}: an earlier flush failed, what was written may be lost", errno.EIO)
        try:
            self.account.backend_calls += 1
            os.fsync(self.fd)
        except OSError as error:
            self.sync_failed = True
            raise self._failed("flush", 0, error) from error

    def data_runs(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Stretches (offset, length, has data) of the file; a host that knows no holes says data everywhere."""
        end = offset + length
        while offset < end:
            data = self._seek(offset, os.SEEK_DATA, end)
            if data > offset:
                yield offset, data - offset, False
                offset = data
            if offset < end:
                hole = self._seek(offset, os.SEEK_HOLE, end)
                yield offset, hole - offset, True
                offset = hole

    def _seek(self, offset: int, whence: int, end: int) -> int:
        try:
            return min(max(os.lseek(self.fd, offset, whence), offset), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no more data
                return end
            raise self._failed("query", offset, error) from error

    def release(self) -> int:
        """Hand the descriptor over, with its lock."""
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        """Close the file and give up its lock. Closing twice is allowed."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _failed(self, what: str, offset: int, error: OSError) -> DiskError:
        return DiskError(
            f"{self.path}: {what} at byte {offset} failed: {error.strerror}", error.errno or errno.EIO
        )


class SharedLock:
    """Many at once may hold `shared`, or one alone `exclusive`; who waits for the latter goes before later readers.

    Neither side may be taken again by the thread that holds one.
    """

    def __init__(self) -> None:
        self._gate = threading.Lock()  # held by the exclusive owner, and by who waits to become it
        self._room = threading.Lock()  # held by the readers together, or by the exclusive owner
        self._count_lock = threading.Lock()
        self._readers = 0
        self.shared = _Shared(self)
        self.exclusive = _Exclusive(self)

    def _enter_shared(self) -> None:
        with self._gate, self._count_lock:
            self._readers += 1
            if self._readers == 1:
                self._room.acquire()

    def _leave_shared(self) -> None:
        with self._count_lock:
            self._readers -= 1
            if not self._readers:
                self._room.release()

    def _enter_exclusive(self) -> None:
        self._gate.acquire()
        self._room.acquire()

    def _leave_exclusive(self) -> None:
        self._room.release()
        self._gate.release()


class _Shared:
    __slots__ = ("_lock",)

    def __init__(self, lock: SharedLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock._enter_shared()

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._lock._leave_shared()


class _Exclusive:
    __slots__ = ("_lock",)

    def __init__(self, lock: SharedLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock._enter_exclusive()

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._lock._leave_exclusive()
