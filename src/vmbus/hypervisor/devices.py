"""Where a partition's intercepted port and memory accesses go: its emulated devices and interrupt lines."""

from bisect import bisect_right
from collections.abc import Callable
from typing import Protocol, runtime_checkable

__all__ = ["DeviceBus", "MmioDevice", "PortDevice", "StringPortDevice"]


class PortDevice(Protocol):
    """A device with I/O ports."""

    def io_read(self, port: int, size: int) -> int:
        """Read `size` (1, 2 or 4) bytes at `port`."""
        ...

    def io_write(self, port: int, size: int, value: int) -> None:
        """Write `size` (1, 2 or 4) bytes at `port`."""
        ...


@runtime_checkable
class StringPortDevice(Protocol):
    """A `PortDevice` that can also take all elements of an INS or OUTS at once; others get them one by one."""

    def io_read_string(self, port: int, size: int, count: int) -> bytes:
        """`count` reads of `size` bytes at `port`, one after the other."""
        ...

    def io_write_string(self, port: int, size: int, data: bytes) -> None:
        """Writes of `size` bytes at `port`, one after the other."""
        ...


class MmioDevice(Protocol):
    """A device with memory-mapped registers; offsets count from where it was added."""

    def mmio_read(self, offset: int, size: int) -> int:
        """Read `size` (1, 2, 4 or 8) bytes at `offset`."""
        ...

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """Write `size` (1, 2, 4 or 8) bytes at `offset`."""
        ...


class DeviceBus:
    """The ports, MMIO ranges and interrupt lines of one partition.

    Accesses that no device claims behave as on a PC: reads give all ones, writes vanish.

    Args:
        raise_vector: ``raise_vector(vector)``: requests a fixed interrupt of the partition's first processor.
    """

    def __init__(self, raise_vector: Callable[[int], None]) -> None:
        self._ports: dict[int, PortDevice] = {}
        self._strings: dict[int, StringPortDevice] = {}
        self._mmio: list[tuple[int, int, MmioDevice]] = []
        self._starts: list[int] = []
        self._raise_vector = raise_vector
        self.irq_base = 0x30
        """The vector of line 0 while no interrupt controller is installed (`set_line`)."""
        self.set_line: Callable[[int, bool], None] | None = None
        """``set_line(line, level)`` of the emulated interrupt controller that the lines are wired to."""

    def add_ports(self, first: int, count: int, device: PortDevice) -> None:
        """Give `device` the ports `first` … `first + count - 1`.

        Raises:
            ValueError: a port is taken already or above 0xFFFF.
        """
        wanted = range(first, first + count)
        if first < 0 or first + count > 0x10000 or any(port in self._ports for port in wanted):
            raise ValueError(f"ports 0x{first:x}-0x{first + count - 1:x} are taken or out of range")
        self._ports.update(dict.fromkeys(wanted, device))
        if isinstance(device, StringPortDevice):
            self._strings.update(dict.fromkeys(wanted, device))

    def remove_ports(self, first: int, count: int) -> None:
        """Take ports away again; those without a device are ignored."""
        for port in range(first, first + count):
            self._ports.pop(port, None)
            self._strings.pop(port, None)

    def add_mmio(self, gpa: int, length: int, device: MmioDevice) -> None:
        """Give `device` the guest physical range `gpa` … `gpa + length - 1`.

        Raises:
            ValueError: the range is empty or overlaps another device's.
        """
        if length <= 0 or any(gpa < start + size and start < gpa + length for start, size, _ in self._mmio):
            raise ValueError(f"MMIO range 0x{gpa:x}+0x{length:x} is empty or taken")
        self._mmio.append((gpa, length, device))
        self._mmio.sort(key=lambda entry: entry[0])
        self._starts = [start for start, _, _ in self._mmio]

    def remove_mmio(self, gpa: int) -> None:
        """Take away the range that starts at `gpa`, if there is one."""
        self._mmio = [entry for entry in self._mmio if entry[0] != gpa]
        self._starts = [start for start, _, _ in self._mmio]

    def io_read(self, port: int, size: int) -> int:
        """An IN of `size` bytes."""
        device = self._ports.get(port)
        if device is None:
            return (1 << 8 * size) - 1
        return device.io_read(port, size)

    def io_write(self, port: int, size: int, value: int) -> None:
        """An OUT of `size` bytes."""
        device = self._ports.get(port)
        if device is not None:
            device.io_write(port, size, value)

    def io_read_string(self, port: int, size: int, count: int) -> bytes:
        """An INS of `count` elements of `size` bytes."""
        device = self._strings.get(port)
        if device is not None:
            return device.io_read_string(port, size, count)
        return b"".join(self.io_read(port, size).to_bytes(size, "little") for _ in range(count))

    def io_write_string(self, port: int, size: int, data: bytes) -> None:
        """An OUTS of elements of `size` bytes."""
        device = self._strings.get(port)
        if device is not None:
            device.io_write_string(port, size, data)
            return
        for at in range(0, len(data), size):
            self.io_write(port, size, int.from_bytes(data[at : at + size], "little"))

    def _find(self, gpa: int) -> tuple[int, MmioDevice] | None:
        at = bisect_right(self._starts, gpa) - 1
        if at >= 0:
            start, length, device = self._mmio[at]
            if gpa < start + length:
                return gpa - start, device
        return None

    def has_mmio(self, gpa: int) -> bool:
        """Whether a device answers at `gpa`."""
        return self._find(gpa) is not None

    def mmio_read(self, gpa: int, size: int) -> int:
        """A load of `size` bytes from unmapped guest physical memory."""
        found = self._find(gpa)
        return found[1].mmio_read(found[0], size) if found else (1 << 8 * size) - 1

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """A store of `size` bytes to unmapped guest physical memory."""
        found = self._find(gpa)
        if found:
            found[1].mmio_write(found[0], size, value)

    def raise_irq(self, line: int) -> None:
        """Assert interrupt line `line` (ISA numbering)."""
        if self.set_line is not None:
            self.set_line(line, True)
        else:
            self._raise_vector(self.irq_base + line)

    def lower_irq(self, line: int) -> None:
        """Release interrupt line `line`."""
        if self.set_line is not None:
            self.set_line(line, False)
