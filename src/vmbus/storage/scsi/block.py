"""Commands that move, compare or give back blocks of a disk (SBC-3 chapter 5)."""

import errno
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice

from vmbus.errors import GuestMemoryError
from vmbus.storage.disk import Buffer, Disk, DiskError
from vmbus.storage.scsi.cdb import BlockFields, allocation_length, block_fields
from vmbus.storage.scsi.codes import AdditionalSense, Opcode, SenseKey
from vmbus.storage.scsi.inquiry import MAX_COMPARE_BLOCKS, MAX_UNMAP_DESCRIPTORS, Limits
from vmbus.storage.scsi.sense import (
    CheckCondition,
    disk_failure,
    invalid_field,
    invalid_parameter,
    parameter_list_length_error,
)
from vmbus.storage.scsi.task import Task
from vmbus.storage.scsi.task_set import TaskAborted, TaskSetBusy

__all__ = ["BlockAccess"]

_CHUNK = 1 << 20
_BYTCHK_NONE, _BYTCHK_ALL, _BYTCHK_ONE = 0, 1, 3
_DESCRIPTOR = 16
_MAX_STATUS_DESCRIPTORS = 4096
_ERASE_STEP = 64 << 20
_PATTERN_HEAD = 4


class _WriteGate:
    """Lets writes overlap each other, but none overlap a COMPARE AND WRITE, which has to be atomic.

    Where one thread serves several guests, a command may begin beneath another one that waits for its disk. What would
    have to wait for the one beneath which it runs is BUSY.
    """

    def __init__(self) -> None:
        self._lock = (
            threading.RLock()
        )  # taken by itself: what `Condition.__enter__` took, a signal handler could lose
        self._condition = threading.Condition(self._lock)
        self._writers: Counter[int] = Counter()  # by thread
        self._exclusive = 0  # the thread

    @contextmanager
    def shared(self) -> Iterator[None]:
        here, entered = threading.get_ident(), False
        try:
            with self._lock:
                self._not_beneath(self._exclusive == here)
                self._condition.wait_for(lambda: not self._exclusive)
                entered = True
                self._writers[here] += 1
            yield
        finally:
            if entered:
                with self._lock:
                    self._writers -= Counter({here: 1})
                    self._condition.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        here, entered = threading.get_ident(), False
        try:
            with self._lock:
                self._not_beneath(self._exclusive == here or here in self._writers)
                self._condition.wait_for(lambda: not self._exclusive)
                entered = True
                self._exclusive = here
                self._condition.wait_for(lambda: not self._writers)
            yield
        finally:
            if entered:
                with self._lock:
                    self._exclusive = 0
                    self._condition.notify_all()

    @staticmethod
    def _not_beneath(beneath: bool) -> None:
        if beneath:
            raise TaskSetBusy("beneath a command that it would have to wait for")


def _steps(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges in parts between which a command can be aborted: where there are no holes, each is written with zeros."""
    for offset, length in ranges:
        at, end = offset, offset + length
        while at < end:
            # On borders, so that blocks of images stay whole.
            part = min(end, (at // _ERASE_STEP + 1) * _ERASE_STEP) - at
            yield at, part
            at += part


def _go_on(task: Task) -> None:
    """Between two steps of a command that may take long: task management waits for it.

    Raises:
        TaskAborted: what is left of it need not be done.
    """
    if task.aborted:
        raise TaskAborted("aborted while it ran")


class BlockAccess:
    """Executes the block commands of one disk. Every method takes the task and returns the bytes moved.

    Args:
        disk: the backend.
        limits: what one command may ask for.

    All methods raise `CheckCondition` with the sense data that the standard prescribes.
    """

    def __init__(self, disk: Disk, limits: Limits) -> None:
        self.disk = disk
        self.limits = limits
        self.write_cache = True
        """Off: every write is durable before it is acknowledged."""
        self.exclusive = False
        """A COMPARE AND WRITE is under way; nothing else may write, compiled code included."""
        self.on_exclusive: Callable[[], None] = lambda: None
        """Called after `exclusive` changed; on return all who watch it have heard of it."""
        self.gate = _WriteGate()
        """What every write has to pass."""

    def read(self, task: Task) -> int:
        """READ (6), (10), (12) and (16)."""
        fields = block_fields(task.cdb)
        self._short_enough(fields)
        offset, length = self._extent(fields)
        self._fits(task, length, fields)
        disk = self.disk
        done = 0
        try:
            if disk.fd >= 0:
                while done < length:
                    moved = task.data.read_file(disk.fd, offset + done, done, length - done)
                    task.account.backend_calls += 1
                    if not moved:
                        raise DiskError("the file ends inside the disk")
                    done += moved
            else:
                while done < length:
                    part = disk.read(offset + done, min(length - done, _CHUNK))
                    task.data.store(done, part)
                    task.account.backend_calls += 1
                    task.account.bytes_copied += len(part)
                    done += len(part)
        except (DiskError, OSError) as error:
            raise self._failure(error, offset + done, writing=False) from error
        return length

    def write(self, task: Task) -> int:
        """WRITE (6), (10), (12) and (16)."""
        fields = block_fields(task.cdb)
        self._short_enough(fields)
        offset, length = self._extent(fields, writing=True)
        self._fits(task, length, fields)
        with self.gate.shared():
            self._write(task, offset, length, through=fields.fua or not self.write_cache)
        return length

    def _write(
        self, task: Task, offset: int, length: int, *, through: bool, skip: int = 0, whole: bool = False
    ) -> None:
        """Write `length` bytes of the data buffer after its first `skip`; if `whole`, all of them once it began."""
        disk = self.disk
        done = 0
        try:
            while done < length:
                if not (whole and done):
                    _go_on(task)
                if disk.fd >= 0 and not through:
                    moved = task.data.write_file(disk.fd, offset + done, skip + done, length - done)
                    if not moved:
                        raise DiskError("the file takes no more data")
                else:
                    part = task.data.fetch(skip + done, min(length - done, _CHUNK))
                    (disk.write_through if through else disk.write)(offset + done, part)
                    task.account.bytes_copied += len(part)
                    moved = len(part)
                task.account.backend_calls += 1
                done += moved
        except (DiskError, OSError) as error:
            raise self._failure(error, offset + done, writing=True) from error

    def verify(self, task: Task) -> int:
        """VERIFY (10), (12) and (16): read the medium, and compare if BYTCHK asks for it."""
        fields = block_fields(task.cdb)
        offset, length = self._extent(fields)
        mode = fields.flags >> 1 & 3
        if mode == _BYTCHK_ALL:
            self._short_enough(fields)
        if mode == _BYTCHK_NONE:
            self._read_what_is_there(task, offset, length)
            return 0
        if mode not in (_BYTCHK_ALL, _BYTCHK_ONE):
            raise invalid_field(1, 2)
        size = self.disk.sector_size
        wanted = length if mode == _BYTCHK_ALL else min(length, size)
        self._fits(task, wanted, fields)
        if mode == _BYTCHK_ALL:
            self._compare(task, offset, length, 0)
        else:
            one = task.data.fetch(0, wanted)
            for at in range(0, length, size):
                _go_on(task)
                self._match(one, self._read_disk(task, offset + at, size), 0)
        return wanted

    def write_and_verify(self, task: Task) -> int:
        """WRITE AND VERIFY (10), (12) and (16): durable, and read back (and compared with BYTCHK 1)."""
        fields = block_fields(task.cdb)
        self._short_enough(fields)
        offset, length = self._extent(fields, writing=True)
        mode = fields.flags >> 1 & 3
        if mode not in (_BYTCHK_NONE, _BYTCHK_ALL):
            raise invalid_field(1, 2)
        self._fits(task, length, fields)
        with self.gate.shared():
            self._write(task, offset, length, through=True)
        self._compare(task, offset, length, 0 if mode == _BYTCHK_ALL else None)
        return length

    def compare_and_write(self, task: Task) -> int:
        """COMPARE AND WRITE: one atomic test-and-set of up to 128 blocks."""
        fields = block_fields(task.cdb)
        if fields.blocks > MAX_COMPARE_BLOCKS:
            raise invalid_field(fields.count_field)
        offset, length = self._extent(fields, writing=True)
        self._fits(task, 2 * length, fields, exactly=True)
        with self._alone():
            self._compare(task, offset, length, 0)
            through = fields.fua or not self.write_cache
            self._write(task, offset, length, through=through, skip=length, whole=True)
        return 2 * length

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nothing else writes meanwhile, compiled code included."""
        with self.gate.exclusive():
            self.exclusive = True
            self.on_exclusive()
            try:
                yield
            finally:
                self.exclusive = False
                self.on_exclusive()

    def or_write(self, task: Task) -> int:
        """ORWRITE (16): set the bits that are set in the data, atomically."""
        fields = block_fields(task.cdb)
        self._short_enough(fields)
        offset, length = self._extent(fields, writing=True)
        self._fits(task, length, fields)
        through = fields.fua or not self.write_cache
        with self._alone():
            for at in range(0, length, _CHUNK):
                size = min(_CHUNK, length - at)
                ours = int.from_bytes(self._read_disk(task, offset + at, size), "little")
                theirs = int.from_bytes(task.data.fetch(at, size), "little")
                self._put(task, offset + at, (ours | theirs).to_bytes(size, "little"), through=through)
        return length

    def write_atomic(self, task: Task) -> int:
        """WRITE ATOMIC (16): no other write is seen in the middle of it."""
        fields = block_fields(task.cdb)
        if task.cdb[10] or task.cdb[11]:
            raise invalid_field(10)  # no atomic boundaries
        if fields.blocks > self.limits.max_atomic:
            raise invalid_field(fields.count_field)
        offset, length = self._extent(fields, writing=True)
        self._fits(task, length, fields)
        with self._alone():
            self._write(task, offset, length, through=fields.fua or not self.write_cache, whole=True)
        return length

    def prefetch(self, task: Task) -> int:
        """PRE-FETCH (10) and (16): the host caches as it thinks best, so GOOD and never CONDITION MET (SBC-3 5.8)."""
        fields = block_fields(task.cdb)
        self._extent(fields)
        return 0

    def erase(self, task: Task) -> Callable[[], int]:
        """SANITIZE, BLOCK ERASE: all blocks read as zeros, and their space is given back where that can be.

        Returns:
            what does it, now that the command is known to be right.
        """
        if allocation_length(task.cdb):
            raise invalid_field(7)
        self._writable()
        return partial(self._erase, task)

    def _erase(self, task: Task) -> int:
        disk = self.disk
        for at, part in _steps([(0, disk.size)]):
            _go_on(task)
            try:
                (disk.unmap if disk.unmap_granularity else disk.write_zeros)(at, part)
                task.account.backend_calls += 1
            except DiskError as error:
                raise self._failure(error, at, writing=True) from error
        self._flush(task)
        return 0

    def overwrite(self, task: Task) -> Callable[[], int]:
        """SANITIZE, OVERWRITE: a pattern in all blocks, the wanted number of times, inverted each time if so wanted.

        Returns:
            what does it, now that the command is known to be right.
        """
        size = self.disk.sector_size
        length = allocation_length(task.cdb)
        if not _PATTERN_HEAD < length <= size + _PATTERN_HEAD:
            raise invalid_field(7)
        parameters = task.parameters(length, 7)
        count, pattern_length = parameters[0] & 0x1F, int.from_bytes(parameters[2:4], "big")
        if not count or not 0 < pattern_length <= min(size, length - _PATTERN_HEAD):
            raise invalid_field(7)
        self._writable()
        pattern = parameters[_PATTERN_HEAD : _PATTERN_HEAD + pattern_length]
        block = (pattern * (size // pattern_length + 1))[:size]
        inverted = bytes(byte ^ 0xFF for byte in block)
        turns = [block, inverted if parameters[0] & 0x80 else block] * count
        return partial(self._overwrite, task, turns[:count], length)

    def _overwrite(self, task: Task, turns: list[bytes], length: int) -> int:
        for block in turns:
            chunk = block * max(1, _CHUNK // self.disk.sector_size)
            for at in range(0, self.disk.size, len(chunk)):
                _go_on(task)
                self._put(task, at, memoryview(chunk)[: self.disk.size - at], through=False)
            self._flush(task)
        return length

    def _put(self, task: Task, offset: int, data: Buffer, *, through: bool) -> None:
        """Write data of our own."""
        try:
            (self.disk.write_through if through else self.disk.write)(offset, data)
            task.account.backend_calls += 1
            task.account.bytes_copied += len(data)
        except DiskError as error:
            raise self._failure(error, offset, writing=True) from error

    def write_same(self, task: Task) -> int:
        """WRITE SAME (10) and (16), with UNMAP and, in the long form, NDOB."""
        fields = block_fields(task.cdb)
        flags = fields.flags
        if flags & 0x10:
            raise invalid_field(1, 4)  # ANCHOR: no anchored blocks
        if flags & 0x06:
            raise invalid_field(1, 2)  # PBDATA, LBDATA: obsolete
        if flags & 0x08 and not self.disk.unmap_granularity:
            raise invalid_field(1, 3)  # UNMAP of a unit that is not thin
        no_data = task.cdb[0] == Opcode.WRITE_SAME_16 and bool(flags & 0x01)
        if not fields.blocks:
            if not self.limits.write_same_to_end:
                raise invalid_field(fields.count_field)
            self._extent(fields)
            fields = fields._replace(blocks=self.disk.sector_count - fields.lba)
        if fields.blocks > self.limits.max_write_same:
            raise invalid_field(fields.count_field)
        offset, length = self._extent(fields, writing=True)
        size = self.disk.sector_size
        if not no_data:
            self._fits(task, size, fields, exactly=True)
        pattern = bytes(size) if no_data else task.data.fetch(0, size)
        disk = self.disk
        with self.gate.shared():
            try:
                if any(pattern):
                    repeated = pattern * (min(length, _CHUNK) // size)
                    for at in range(0, length, _CHUNK):
                        _go_on(task)
                        disk.write(offset + at, memoryview(repeated)[: min(_CHUNK, length - at)])
                        task.account.backend_calls += 1
                        task.account.bytes_copied += min(_CHUNK, length - at)
                else:
                    for at, part in _steps([(offset, length)]):
                        _go_on(task)
                        (disk.unmap if flags & 0x08 else disk.write_zeros)(at, part)
                        task.account.backend_calls += 1
                if not self.write_cache:
                    disk.flush()
            except DiskError as error:
                raise self._failure(error, offset, writing=True) from error
        return 0 if no_data else size

    def unmap(self, task: Task) -> int:
        """UNMAP: nothing is given back unless every descriptor is right."""
        if task.cdb[1] & 0x01:
            raise invalid_field(1, 0)  # ANCHOR
        length = allocation_length(task.cdb)
        if not length:
            return 0
        data = task.parameters(length, 7)
        if length < 8:
            raise parameter_list_length_error()
        self._writable()
        listed = min(int.from_bytes(data[2:4], "big"), length - 8) // _DESCRIPTOR
        if listed > MAX_UNMAP_DESCRIPTORS:
            raise invalid_parameter(2)
        ranges = []
        for index in range(listed):
            lba, count = struct.unpack_from(">QI", data, 8 + index * _DESCRIPTOR)
            if count:
                ranges.append(self._extent(BlockFields(lba, count, 0, 8 + index * _DESCRIPTOR), writing=True))
        with self.gate.shared():
            for offset, size in _steps(ranges):
                _go_on(task)
                try:
                    self.disk.unmap(offset, size)
                    task.account.backend_calls += 1
                except DiskError as error:
                    raise self._failure(error, offset, writing=True) from error
            if ranges and not self.write_cache:
                self._flush(task)
        return length

    def synchronize_cache(self, task: Task) -> int:
        """SYNCHRONIZE CACHE (10) and (16): the whole disk, whatever the range; IMMED waits all the same."""
        self._extent(block_fields(task.cdb))
        self._flush(task)
        return 0

    def flush(self, task: Task) -> None:
        """Make everything durable (for START STOP UNIT)."""
        self._flush(task)

    def get_lba_status(self, task: Task) -> int:
        """GET LBA STATUS: mapped and deallocated stretches from the given block on."""
        allocation = allocation_length(task.cdb)
        size = self.disk.sector_size
        offset = int.from_bytes(task.cdb[2:10], "big") * size
        if offset >= self.disk.size:
            raise self._out_of_range()
        most = max(1, min((min(allocation, task.data.length) - 8) // _DESCRIPTOR, _MAX_STATUS_DESCRIPTORS))
        try:
            stretches = self._stretches(offset, self.disk.size - offset)
            body = b"".join(islice(stretches, most))
        except DiskError as error:
            raise self._failure(error, offset, writing=False) from error
        task.account.backend_calls += 1
        return task.reply(struct.pack(">I4x", len(body) + 4) + body, allocation)

    def _stretches(self, offset: int, length: int) -> Iterator[bytes]:
        size = self.disk.sector_size
        most = 0xFFFFFFFF // 8 * 8 * size  # blocks of a descriptor are 32 bits
        for extent in self.disk.extents(offset, length):
            for at in range(extent.offset, extent.offset + extent.length, most):
                part = min(most, extent.offset + extent.length - at)
                yield struct.pack(">QIB3x", at // size, part // size, 0 if extent.allocated else 1)

    def _extent(self, fields: BlockFields, *, writing: bool = False) -> tuple[int, int]:
        """Offset and length in bytes, checked against the disk. No blocks at all are no error (SBC-3 4.5)."""
        if writing:
            self._writable()
        disk = self.disk
        if fields.lba + fields.blocks > disk.sector_count or fields.lba >= disk.sector_count:
            raise self._out_of_range()
        return fields.lba * disk.sector_size, fields.blocks * disk.sector_size

    def _short_enough(self, fields: BlockFields) -> None:
        """Refuse more blocks than MAXIMUM TRANSFER LENGTH of the block limits page allows (SBC-3 6.5.3)."""
        if self.limits.max_transfer and fields.blocks > self.limits.max_transfer:
            raise invalid_field(fields.count_field)

    def _writable(self) -> None:
        if self.disk.read_only:
            raise CheckCondition.of(SenseKey.DATA_PROTECT, AdditionalSense.WRITE_PROTECTED)

    @staticmethod
    def _fits(task: Task, length: int, fields: BlockFields, *, exactly: bool = False) -> None:
        """Refuse a data buffer that is too small; with `exactly` also a larger one: it is laid out otherwise."""
        if length > task.data.length or (exactly and length != task.data.length):
            raise invalid_field(fields.count_field, overrun=length > task.data.length)

    @staticmethod
    def _out_of_range() -> CheckCondition:
        return CheckCondition.of(SenseKey.ILLEGAL_REQUEST, AdditionalSense.LBA_OUT_OF_RANGE)

    def _read_what_is_there(self, task: Task, offset: int, length: int) -> None:
        """Holes have nothing that could not be read: one command may name 2^32 blocks of them."""
        try:
            for extent in self.disk.extents(offset, length):
                _go_on(task)
                if extent.allocated:
                    self._compare(task, extent.offset, extent.length, None)
        except DiskError as error:
            raise self._failure(error, offset, writing=False) from error

    def _compare(self, task: Task, offset: int, length: int, skip: int | None) -> None:
        """Read the blocks; unless `skip` is None compare them with the data buffer from there on."""
        for at in range(0, length, _CHUNK):
            _go_on(task)
            size = min(_CHUNK, length - at)
            data = self._read_disk(task, offset + at, size)
            if skip is not None:
                self._match(task.data.fetch(skip + at, size), data, at)

    def _read_disk(self, task: Task, offset: int, length: int) -> bytes:
        try:
            task.account.backend_calls += 1
            task.account.bytes_copied += length
            return self.disk.read(offset, length)
        except DiskError as error:
            raise self._failure(error, offset, writing=False) from error

    @staticmethod
    def _match(expected: bytes, found: bytes, base: int) -> None:
        if expected != found:
            at = next(i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
            raise CheckCondition.of(SenseKey.MISCOMPARE, AdditionalSense.MISCOMPARE_DURING_VERIFY, base + at)

    def _flush(self, task: Task) -> None:
        try:
            task.account.backend_calls += 1
            self.disk.flush()
        except DiskError as error:
            raise self._failure(error, 0, writing=True) from error

    def _failure(self, error: Exception, offset: int, *, writing: bool) -> Exception:
        if isinstance(error, GuestMemoryError):
            return error
        if isinstance(error, OSError):
            error = DiskError(str(error), error.errno or 0)
        assert isinstance(error, DiskError)
        if error.errno == errno.EBUSY:
            return TaskSetBusy(str(error))
        return disk_failure(error, writing=writing, lba=offset // self.disk.sector_size)
