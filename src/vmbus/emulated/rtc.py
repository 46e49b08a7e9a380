"""The real-time clock of a PC: an MC146818 with its time registers and the battery-backed bytes behind them.

It shows the time of whatever clock it is given (the hypervisor's from a fixed start where runs have to repeat, or the
host's); a guest can set it, which moves it from there on. It raises no interrupts: Linux's rtc_cmos has no alarm then,
and hwclock polls. Register numbers and bits: Motorola MC146818A data sheet.
"""

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from enum import IntEnum

__all__ = ["CENTURY", "DEFAULT_START", "EPOCH", "RTC_PORT", "RealTimeClock"]

RTC_PORT = 0x70
"""Index port; the data port follows."""

DEFAULT_START = datetime(2024, 1, 1, tzinfo=UTC)
LATEST = datetime.max.replace(tzinfo=UTC)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
"""The start that belongs to `time.time_ns`."""

STATUS_A_DIVIDER = 0x26
"""32.768 kHz time base, 1024 Hz periodic rate: what PC firmware sets. Bit 7, update in progress, is never set."""
STATUS_B_24_HOURS = 0x02
STATUS_B_BINARY = 0x04
STATUS_B_SET = 0x80
STATUS_D_VALID = 0x80
AFTERNOON = 0x80
"""Bit of the hours register in 12-hour mode."""


class Register(IntEnum):
    """Indices of the clock's own registers."""

    SECONDS = 0
    MINUTES = 2
    HOURS = 4
    DAY_OF_WEEK = 6
    DAY_OF_MONTH = 7
    MONTH = 8
    YEAR = 9
    STATUS_A = 10
    STATUS_B = 11
    STATUS_C = 12
    STATUS_D = 13
    CENTURY = 0x32


CENTURY = Register.CENTURY
"""Which byte holds the century is a convention: the FADT names it."""
TIME = frozenset((*range(Register.YEAR + 1), CENTURY)) - {1, 3, 5}
"""The registers that count; 1, 3 and 5 hold an alarm."""


class RealTimeClock:
    """The two ports of the clock.

    Args:
        now: nanoseconds since `start`.
        start: a date and time, with a time zone.
    """

    def __init__(self, now: Callable[[], int], start: datetime = DEFAULT_START) -> None:
        self._now = now
        self._start = start.astimezone(UTC)
        self._index = 0
        self._bytes = bytearray(128)
        self._bytes[Register.STATUS_B] = STATUS_B_24_HOURS

    @property
    def time(self) -> datetime:
        """What it shows (UTC); a guest that sets it to the end of the year 9999 lets it stand still there."""
        try:
            return self._start + self._passed
        except OverflowError:
            return LATEST

    @property
    def _passed(self) -> timedelta:
        return timedelta(microseconds=self._now() // 1000)

    def io_read(self, port: int, size: int) -> int:
        """Read the data port (the index port reads as all ones)."""
        if not port & 1:
            return (1 << 8 * size) - 1
        return self._read(self._index)

    def io_write(self, port: int, size: int, value: int) -> None:
        """Choose a register (bit 7 would mask NMIs) or write one.

        The time is set as drivers do it: the SET bit of register B stops the registers, and they go on from what was
        written when it is cleared. While they count, they take nothing.
        """
        if not port & 1:
            self._index = value & 0x7F
            return
        index, value = self._index, value & 0xFF
        if index == Register.STATUS_B:
            before, self._bytes[index] = self._bytes[index], value
            if value & ~before & STATUS_B_SET:
                self._latch()
            elif before & ~value & STATUS_B_SET:
                self._go_on()
        elif index in TIME:
            if self._bytes[Register.STATUS_B] & STATUS_B_SET:
                self._bytes[index] = value
        elif index > Register.STATUS_D or index < Register.STATUS_A:
            self._bytes[index] = value

    def _read(self, index: int) -> int:
        if index == Register.STATUS_A:
            return STATUS_A_DIVIDER
        if index == Register.STATUS_D:
            return STATUS_D_VALID
        if index in TIME and not self._bytes[Register.STATUS_B] & STATUS_B_SET:
            self._latch()
        return self._bytes[index]

    def _latch(self) -> None:
        """Put the time that is shown now into the registers."""
        time = self.time
        values: dict[int, int] = {
            Register.SECONDS: time.second,
            Register.MINUTES: time.minute,
            Register.HOURS: time.hour,
            Register.DAY_OF_WEEK: time.isoweekday() % 7 + 1,
            Register.DAY_OF_MONTH: time.day,
            Register.MONTH: time.month,
            Register.YEAR: time.year % 100,
            Register.CENTURY: time.year // 100,
        }
        afternoon = 0
        if not self._bytes[Register.STATUS_B] & STATUS_B_24_HOURS:
            afternoon = AFTERNOON if time.hour >= 12 else 0
            values[Register.HOURS] = time.hour % 12 or 12
        for index, value in values.items():
            if not self._bytes[Register.STATUS_B] & STATUS_B_BINARY:
                value = value // 10 << 4 | value % 10
            self._bytes[index] = value | (afternoon if index == Register.HOURS else 0)

    def _go_on(self) -> None:
        """Count from what the registers hold; what is no date leaves the clock as it was."""
        held = {index: self._bytes[index] for index in TIME}
        hours = held[Register.HOURS]
        twelve = not self._bytes[Register.STATUS_B] & STATUS_B_24_HOURS
        if twelve:
            held[Register.HOURS] = hours & ~AFTERNOON
        if not self._bytes[Register.STATUS_B] & STATUS_B_BINARY:
            held = {index: (value >> 4) * 10 + (value & 0x0F) for index, value in held.items()}
        if twelve:
            held[Register.HOURS] = held[Register.HOURS] % 12 + (12 if hours & AFTERNOON else 0)
        passed = self._passed
        with suppress(ValueError, OverflowError):
            shown = datetime(
                held[Register.CENTURY] * 100 + held[Register.YEAR],
                held[Register.MONTH],
                held[Register.DAY_OF_MONTH],
                held[Register.HOURS],
                held[Register.MINUTES],
                held[Register.SECONDS],
                self.time.microsecond,
                tzinfo=UTC,
            )
            self._start = shown - passed
