"""The real-time clock of a PC: an MC146818 with its time registers and the battery-backed bytes behind them.

It keeps the hypervisor's time from a given start, so that repeatable runs repeat; it raises no interrupts.
Register numbers and bits: Motorola MC146818A data sheet.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import IntEnum

__all__ = ["RTC_PORT", "RealTimeClock"]

RTC_PORT = 0x70
"""Index port; the data port follows."""

DEFAULT_START = datetime(2024, 1, 1, tzinfo=UTC)

STATUS_A_DIVIDER = 0x26
"""32.768 kHz time base, 1024 Hz periodic rate: what PC firmware sets. Bit 7, update in progress, is never set."""
STATUS_B_24_HOURS = 0x02
STATUS_B_BINARY = 0x04
STATUS_D_VALID = 0x80


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


class RealTimeClock:
    """The two ports of the clock.

    Args:
        now: nanoseconds since the machine was started.
        start: the date and time at that moment, with a time zone.
    """

    def __init__(self, now: Callable[[], int], start: datetime = DEFAULT_START) -> None:
        self._now = now
        self._start = start
        self._index = 0
        self._bytes = bytearray(128)
        self._bytes[Register.STATUS_B] = STATUS_B_24_HOURS

    def io_read(self, port: int, size: int) -> int:
        """Read the data port (the index port reads as all ones)."""
        if not port & 1:
            return (1 << 8 * size) - 1
        return self._read(self._index)

    def io_write(self, port: int, size: int, value: int) -> None:
        """Choose a register (bit 7 would mask NMIs) or write one; time registers do not take a new time."""
        if not port & 1:
            self._index = value & 0x7F
        elif self._index == Register.STATUS_B or self._index > Register.STATUS_D:
            self._bytes[self._index] = value & 0xFF

    def _read(self, index: int) -> int:
        if index == Register.STATUS_A:
            return STATUS_A_DIVIDER
        if index == Register.STATUS_D:
            return STATUS_D_VALID
        time = self._start + timedelta(microseconds=self._now() // 1000)
        hours = time.hour
        afternoon = 0
        if not self._bytes[Register.STATUS_B] & STATUS_B_24_HOURS:
            afternoon = 0x80 if hours >= 12 else 0
            hours = hours % 12 or 12
        values: dict[int, int] = {
            Register.SECONDS: time.second,
            Register.MINUTES: time.minute,
            Register.HOURS: hours,
            Register.DAY_OF_WEEK: time.isoweekday() % 7 + 1,
            Register.DAY_OF_MONTH: time.day,
            Register.MONTH: time.month,
            Register.YEAR: time.year % 100,
            Register.CENTURY: time.year // 100,
        }
        if index not in values:
            return self._bytes[index]
        value = values[index]
        if not self._bytes[Register.STATUS_B] & STATUS_B_BINARY:
            value = value // 10 << 4 | value % 10
        return value | (afternoon if index == Register.HOURS else 0)
