"""One ATA disk: its task file, commands, and the PIO transfers between the data port and the medium."""

import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from vmbus.emulated.ata import (
    HEADS,
    LBA28_SECTORS,
    MULTIPLE_AT_POWER_ON,
    MULTIPLE_MOST,
    SECTOR,
    SECTORS_PER_TRACK,
    Backend,
    Command,
    Device,
    Error,
    Feature,
    Register,
    Status,
    identify,
)
from vmbus.errors import DeviceError
from vmbus.trace.guest_log import GuestLog, new_scope
from vmbus.trace.ledger import Account

__all__ = ["CHUNK", "AtaDrive"]

_log = logging.getLogger(__name__)
guest_log = GuestLog(_log)

CHUNK = 128 * SECTOR
"""Bytes read ahead or written behind in one backend call."""
READY = Status.DRDY | Status.DSC
T = TypeVar("T")
EXTENDED = frozenset(c for c in Command if c.name.endswith("_EXT"))
"""Commands with 48-bit addresses."""


class AtaDrive:
    """A disk on an IDE channel.

    Args:
        disk: the medium.
        number: 0 or 1, as in the device register.
        account: counts backend calls and bytes copied.
        update: called when `pending` may have changed.

    Attributes:
        status: the status register.
        device: the device register as last written.
        pending: an interrupt is pending; reading the status register ends it.

    Raises:
        DeviceError: the medium has sectors of other than 512 bytes, or none.
    """

    def __init__(self, disk: Backend, number: int, account: Account, update: Callable[[], None]) -> None:
        if disk.sector_size != SECTOR:
            raise DeviceError(f"an ATA disk has sectors of {SECTOR} bytes, this one has {disk.sector_size}")
        if disk.sector_count < 1:
            raise DeviceError("an ATA disk needs at least one sector")
        self.disk = disk
        self.number = number
        self._log_scope = new_scope()
        self.device = 0
        self.pending = False
        self._account = account
        self._update = update
        self._commands = self._table()
        self._buffer = memoryview(b"")
        self._extended = self._lba_mode = False
        self._lba = self._block = 0
        self.power_on()

    def power_on(self) -> None:
        """The settings that a disk has when the machine starts, and a reset."""
        self.device = 0
        self._heads = HEADS
        self._sectors = SECTORS_PER_TRACK
        self._multiple = MULTIPLE_AT_POWER_ON
        self._write_cache = True
        self.reset()

    def reset(self) -> None:
        """Software reset: the signature of an ATA disk in the task file, no transfer."""
        self.status = READY
        self.pending = False
        self._error = 0x01  # passed the diagnostic
        # count, LBA low, mid, high: current and previous contents (ATA-7, 48-bit addresses)
        self._now = [1, 1, 0, 0]
        self._previous = [0, 0, 0, 0]
        self._features = 0
        self._stop()

    def diagnose(self) -> None:
        """EXECUTE DEVICE DIAGNOSTIC: like a reset, and passed."""
        self.reset()

    def interrupt(self) -> None:
        """Request an interrupt."""
        self.pending = True
        self._update()

    # task file

    def read_register(self, register: int, previous: bool) -> int:
        """One of the registers 1 to 5; `previous` as chosen by HOB."""
        if register == Register.ERROR_FEATURES:
            return self._error
        return (self._previous if previous else self._now)[register - Register.COUNT]

    def write_register(self, register: int, value: int) -> None:
        """Write one of the registers 1 to 5; the contents before are kept for 48-bit commands."""
        if self.status & Status.DRQ:  # the host may not, and a transfer must not be led astray
            return
        if register == Register.ERROR_FEATURES:
            self._features = value
        else:
            at = register - Register.COUNT
            self._previous[at] = self._now[at]
            self._now[at] = value

    # commands

    def _table(self) -> dict[int, Callable[[int], None]]:
        table: dict[int, Callable[[int], None]] = {
            Command.INITIALIZE_PARAMETERS: self._initialize_parameters,
            Command.SET_MULTIPLE: self._set_multiple,
            Command.CHECK_POWER_MODE: self._check_power_mode,
            Command.IDENTIFY_DEVICE: self._identify,
            Command.SET_FEATURES: self._set_features,
            Command.READ_NATIVE_MAX: self._read_native_max,
            Command.READ_NATIVE_MAX_EXT: self._read_native_max,
        }
        for c in (Command.READ_SECTORS, Command.READ_SECTORS_NO_RETRY, Command.READ_SECTORS_EXT):
            table[c] = self._read_sectors
        for c in (Command.WRITE_SECTORS, Command.WRITE_SECTORS_NO_RETRY, Command.WRITE_SECTORS_EXT):
            table[c] = self._write_sectors
        table[Command.READ_MULTIPLE] = table[Command.READ_MULTIPLE_EXT] = self._read_sectors
        table[Command.WRITE_MULTIPLE] = table[Command.WRITE_MULTIPLE_EXT] = self._write_sectors
        for c in (Command.READ_VERIFY, Command.READ_VERIFY_NO_RETRY, Command.READ_VERIFY_EXT):
            table[c] = self._verify
        for c in (Command.FLUSH_CACHE, Command.FLUSH_CACHE_EXT):
            table[c] = self._flush
        for c in (
            Command.STANDBY_IMMEDIATE,
            Command.IDLE_IMMEDIATE,
            Command.STANDBY,
            Command.IDLE,
            Command.SLEEP,
        ):
            table[c] = self._succeed
        for code in range(16):
            table[Command.RECALIBRATE + code] = self._succeed
            table[Command.SEEK + code] = self._seek
        return table

    def execute(self, command: int) -> None:
        """Execute a command; a transfer that another one left unfinished is given up."""
        self._stop()
        self.status = READY
        self._error = 0
        self.pending = False
        handler = self._commands.get(command)
        if handler is None:
            _log.debug("ATA command 0x%02x is not implemented", command)
            self._fail(Error.ABRT)
        else:
            handler(command)

    def _succeed(self, command: int = 0) -> None:
        self.status = READY
        self.interrupt()

    def _fail(self, error: int, fault: bool = False) -> None:
        self._stop()
        self._error = error
        self.status = READY | Status.ERR | (Status.DF if fault else 0)
        self.interrupt()

    def _initialize_parameters(self, command: int) -> None:
        heads, sectors = (self.device & 0x0F) + 1, self._now[0]
        if sectors == 0:
            self._fail(Error.ABRT)
            return
        self._heads, self._sectors = heads, sectors
        self._succeed()

    def _set_multiple(self, command: int) -> None:
        count = self._now[0]
        if count > MULTIPLE_MOST or count & (count - 1):
            self._multiple = 0
            self._fail(Error.ABRT)
            return
        self._multiple = count
        self._succeed()

    def _check_power_mode(self, command: int) -> None:
        self._now[0] = 0xFF  # active
        self._succeed()

    def _set_features(self, command: int) -> None:
        if self._features in (Feature.ENABLE_WRITE_CACHE, Feature.DISABLE_WRITE_CACHE):
            if self._features == Feature.DISABLE_WRITE_CACHE and not self._flushed():
                self._fail(Error.ABRT, fault=True)
                return
            self._write_cache = self._features == Feature.ENABLE_WRITE_CACHE
        elif self._features == Feature.SET_TRANSFER_MODE:
            if self._now[0] >> 3 > 1 or self._now[0] & 7 > 4:  # PIO modes up to 4; there is no DMA
                self._fail(Error.ABRT)
                return
        elif self._features not in (
            Feature.ENABLE_LOOK_AHEAD,
            Feature.DISABLE_LOOK_AHEAD,
            Feature.KEEP_OVER_RESET,
            Feature.REVERT_ON_RESET,
        ):
            self._fail(Error.ABRT)
            return
        self._succeed()

    def _read_native_max(self, command: int) -> None:
        extended = command == Command.READ_NATIVE_MAX_EXT
        last = self.disk.sector_count - 1
        self._set_address(last if extended else min(last, LBA28_SECTORS - 1), extended, lba_mode=True)
        self._succeed()

    def _seek(self, command: int) -> None:
        if self._address(extended=False, count=1) is None:
            self._fail(Error.IDNF)
        else:
            self._succeed()

    def _flush(self, command: int) -> None:
        if self._flushed():
            self._succeed()
        else:
            self._fail(Error.ABRT, fault=True)

    def _identify(self, command: int) -> None:
        data = identify(
            self.disk,
            heads=self._heads,
            sectors_per_track=self._sectors,
            multiple=self._multiple,
            write_cache=self._write_cache,
            serial=f"VMBUS-IDE-{self.number}",
            model="VMBUS EMULATED DISK",
        )
        self._buffer, self._at = memoryview(data.pack()), 0
        self._block = SECTOR
        self._begin_block()
        self.interrupt()

    # addresses

    def _count(self, extended: bool) -> int:
        if extended:
            return self._previous[0] << 8 | self._now[0] or 0x10000
        return self._now[0] or 0x100

    def _address(self, extended: bool, count: int) -> int | None:
        """The first sector that the task file names; None if it and the next ones are not all on the disk."""
        low, mid, high = self._now[1:]
        if extended:
            hob = self._previous
            lba = hob[3] << 40 | hob[2] << 32 | hob[1] << 24 | high << 16 | mid << 8 | low
        elif self.device & Device.LBA:
            lba = (self.device & 0x0F) << 24 | high << 16 | mid << 8 | low
        else:
            head = self.device & 0x0F
            if not 1 <= low <= self._sectors or head >= self._heads:
                return None
            lba = ((high << 8 | mid) * self._heads + head) * self._sectors + low - 1
        return lba if lba + count <= self.disk.sector_count else None

    def _set_address(self, lba: int, extended: bool, lba_mode: bool) -> None:
        """Put the address of a sector into the task file."""
        if lba_mode:
            self._now[1:] = [lba & 0xFF, lba >> 8 & 0xFF, lba >> 16 & 0xFF]
            if extended:
                self._previous[1:] = [lba >> 24 & 0xFF, lba >> 32 & 0xFF, lba >> 40 & 0xFF]
            else:
                self.device = self.device & 0xF0 | lba >> 24 & 0x0F
            return
        track, sector = divmod(lba, self._sectors)
        cylinder, head = divmod(track, self._heads)
        self._now[1:] = [sector + 1, cylinder & 0xFF, cylinder >> 8 & 0xFF]
        self.device = self.device & 0xF0 | head

    # transfers

    def _stop(self) -> None:
        """No transfer."""
        self.status &= ~Status.DRQ
        self._buffer = memoryview(b"")
        self._writing = False
        self._at = self._end = 0
        self._left = 0

    def _prepare(self, command: int, multiple: bool) -> bool:
        """Take the address and count of a command from the task file; False if it has failed already."""
        extended = command in EXTENDED
        count = self._count(extended)
        lba = self._address(extended, count)
        if multiple and not self._multiple:
            self._fail(Error.ABRT)
            return False
        if lba is None:
            self._fail(Error.IDNF)
            return False
        self._extended = extended
        self._lba_mode = extended or bool(self.device & Device.LBA)
        self._lba, self._left = lba, count
        self._block = SECTOR * (self._multiple if multiple else 1)
        return True

    def _begin_block(self) -> None:
        """Offer the next block of the buffer to the data port."""
        self._end = min(self._at + self._block, len(self._buffer))
        self.status = READY | Status.DRQ

    def _try(self, call: Callable[[], T]) -> T | None:
        """Call the backend; None, and a line in the log, if it failed."""
        self._account.backend_calls += 1
        try:
            return call()
        except DeviceError as error:
            guest_log.warning(f"IDE disk {self.number}", "%s", error, scope=self._log_scope)
            return None

    def _write(self, lba: int, data: bytes) -> bool:
        def write() -> bool:
            self.disk.write(lba * SECTOR, data)
            return True

        return self._try(write) is not None

    def _flushed(self) -> bool:
        def flush() -> bool:
            self.disk.flush()
            return True

        return self._try(flush) is not None

    def _fail_at(self, lba: int, error: int, fault: bool = False) -> None:
        self._set_address(lba, self._extended, self._lba_mode)
        self._fail(error, fault)

    def _read_chunk(self) -> bytes | None:
        """Read ahead; None if the next sector cannot be read."""
        count = min(self._left, CHUNK // SECTOR)
        # if a piece fails, its first sector alone says whether the fault is there or further on
        for n in dict.fromkeys((count, 1)):
            data = self._try(partial(self.disk.read, self._lba * SECTOR, n * SECTOR))
            if data is not None:
                self._lba += n
                self._left -= n
                return data
        return None

    def _read_sectors(self, command: int) -> None:
        if self._prepare(command, command in (Command.READ_MULTIPLE, Command.READ_MULTIPLE_EXT)):
            self._next_chunk()

    def _next_chunk(self) -> None:
        chunk = self._read_chunk()
        if chunk is None:
            self._fail_at(self._lba, Error.UNC)
            return
        self._buffer, self._at = memoryview(chunk), 0
        self._begin_block()
        self.interrupt()

    def _verify(self, command: int) -> None:
        if not self._prepare(command, multiple=False):
            return
        while self._left:
            if self._read_chunk() is None:
                self._fail_at(self._lba, Error.UNC)
                return
        self._succeed()

    def _write_sectors(self, command: int) -> None:
        if self._prepare(command, command in (Command.WRITE_MULTIPLE, Command.WRITE_MULTIPLE_EXT)):
            if self.disk.read_only:
                self._fail(Error.ABRT)
                return
            self._writing = True
            self._await_chunk()  # without an interrupt: the host polls for the first block

    def _await_chunk(self) -> None:
        self._buffer, self._at = memoryview(bytearray(min(self._left * SECTOR, CHUNK))), 0
        self._begin_block()

    def _write_chunk(self) -> bool:
        data = bytes(self._buffer)
        count = len(data) // SECTOR
        if not self._write(self._lba, data):
            for n in range(count):  # which one is it?
                if not self._write(self._lba + n, data[n * SECTOR : (n + 1) * SECTOR]):
                    self._fail_at(self._lba + n, Error.ABRT, fault=True)
                    return False
        if not self._write_cache and not self._flushed():
            self._fail_at(self._lba, Error.ABRT, fault=True)
            return False
        self._lba += count
        self._left -= count
        return True

    def _end_block(self) -> None:
        """The data port has moved a whole block."""
        if self._at < len(self._buffer):
            self._begin_block()
            self.interrupt()
        elif self._writing:
            if not self._write_chunk():
                return
            if self._left:
                self._await_chunk()
            else:
                self._stop()
            self.interrupt()
        elif self._left:
            self._next_chunk()
        else:
            self._stop()  # the last block of a read ends without an interrupt

    def read_data(self, count: int) -> bytes:
        """`count` bytes from the data port; zeros where no transfer gives any."""
        parts: list[memoryview | bytes] = []
        while count:
            take = min(count, self._end - self._at)
            if take <= 0 or self._writing:
                parts.append(bytes(count))
                break
            parts.append(self._buffer[self._at : self._at + take])
            self._account.bytes_copied += take
            self._at += take
            count -= take
            if self._at == self._end:
                self._end_block()
        return b"".join(parts)

    def write_data(self, data: bytes) -> None:
        """Bytes to the data port; those that no transfer takes are lost."""
        done = 0
        while done < len(data) and self._writing:
            take = min(len(data) - done, self._end - self._at)
            self._buffer[self._at : self._at + take] = data[done : done + take]
            self._account.bytes_copied += take
            self._at += take
            done += take
            if self._at == self._end:
                self._end_block()
