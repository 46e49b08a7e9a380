"""PCI as a PC has it: configuration mechanism #1 (ports 0xCF8 and 0xCFC) and functions with base address registers.

A function's registers appear in the partition's ports or memory where the guest's writes to its base address
registers put them, and vanish when the guest disables them (PCI Local Bus Specification 2.1, chapters 3.7.4 and 6).
"""

import logging
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import NamedTuple, Protocol

from vmbus.errors import LocalProtocolError
from vmbus.hypervisor.devices import DeviceBus

__all__ = [
    "CONFIG_ADDRESS",
    "CONFIG_DATA",
    "Bar",
    "BarDevice",
    "ConfigOffset",
    "PciBus",
    "PciCommand",
    "PciFunction",
    "host_bridge",
]

_log = logging.getLogger(__name__)

CONFIG_ADDRESS = 0xCF8
CONFIG_DATA = 0xCFC
ENABLE = 0x80000000
CONFIG_SIZE = 256
BARS = 6


class ConfigOffset(IntEnum):
    """Offsets in a type 0 configuration header."""

    VENDOR_ID = 0x00
    DEVICE_ID = 0x02
    COMMAND = 0x04
    STATUS = 0x06
    REVISION_ID = 0x08
    CLASS_CODE = 0x09
    CACHE_LINE_SIZE = 0x0C
    LATENCY_TIMER = 0x0D
    HEADER_TYPE = 0x0E
    BAR0 = 0x10
    SUBSYSTEM_VENDOR_ID = 0x2C
    SUBSYSTEM_ID = 0x2E
    INTERRUPT_LINE = 0x3C
    INTERRUPT_PIN = 0x3D


class PciCommand(IntEnum):
    """Bits of the command register that matter here."""

    IO = 0x0001
    MEMORY = 0x0002
    BUS_MASTER = 0x0004
    INTERRUPT_DISABLE = 0x0400


class BarDevice(Protocol):
    """What is behind a function's base address registers."""

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """Read `size` bytes at `offset` of what base address register `bar` maps."""

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Write them."""


class Bar(NamedTuple):
    """One base address register: a power of two of ports (at least 4) or of bytes (at least 16)."""

    size: int
    io: bool


class _Window:
    """A base address register's range on the device bus."""

    def __init__(self, device: BarDevice, bar: int, base: int) -> None:
        self._device = device
        self._bar = bar
        self._base = base

    def io_read(self, port: int, size: int) -> int:
        return self._device.bar_read(self._bar, port - self._base, size)

    def io_write(self, port: int, size: int, value: int) -> None:
        self._device.bar_write(self._bar, port - self._base, size, value)

    def mmio_read(self, offset: int, size: int) -> int:
        return self._device.bar_read(self._bar, offset, size)

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        self._device.bar_write(self._bar, offset, size, value)


class PciFunction:
    """The configuration space of one function.

    Args:
        vendor: vendor ID.
        device: device ID.
        class_code: base class, subclass and interface: 24 bits.
        revision: revision ID.
        subsystem: subsystem vendor and subsystem ID.
        bars: its base address registers, from BAR0 on.
        registers: what is behind them.
        interrupt_pin: 1 for INTA#, 0 for none.
        fixed: contents of further, read-only configuration registers by offset.

    Attributes:
        on_command: called with the command register after each write to it.
    """

    def __init__(
        self,
        vendor: int,
        device: int,
        class_code: int,
        *,
        revision: int = 0,
        subsystem: tuple[int, int] = (0, 0),
        bars: tuple[Bar, ...] = (),
        registers: BarDevice | None = None,
        interrupt_pin: int = 0,
        fixed: Mapping[int, bytes] | None = None,
    ) -> None:
        if len(bars) > BARS or any(
            bar.size & (bar.size - 1) or bar.size < (4 if bar.io else 16) for bar in bars
        ):
            raise LocalProtocolError("a function has up to six ranges, each a power of two")
        if bars and registers is None:
            raise LocalProtocolError("base address registers need registers behind them")
        self.on_command: Callable[[int], None] | None = None
        self._space = bytearray(CONFIG_SIZE)
        self._writable = bytearray(CONFIG_SIZE)
        self._bars = bars
        self._registers = registers
        self._bus: DeviceBus | None = None
        self._mapped: list[int | None] = [None] * len(bars)
        for offset, length, value in (
            (ConfigOffset.VENDOR_ID, 2, vendor),
            (ConfigOffset.DEVICE_ID, 2, device),
            (ConfigOffset.STATUS, 2, 0x0280),  # medium decoding, fast back-to-back
            (ConfigOffset.REVISION_ID, 1, revision),
            (ConfigOffset.CLASS_CODE, 3, class_code),
            (ConfigOffset.SUBSYSTEM_VENDOR_ID, 2, subsystem[0]),
            (ConfigOffset.SUBSYSTEM_ID, 2, subsystem[1]),
            (ConfigOffset.INTERRUPT_PIN, 1, interrupt_pin),
        ):
            self._space[offset : offset + length] = value.to_bytes(length, "little")
        for start, content in (fixed or {}).items():
            self._space[start : start + len(content)] = content
        command = PciCommand.BUS_MASTER | PciCommand.INTERRUPT_DISABLE
        for number, bar in enumerate(bars):
            at = ConfigOffset.BAR0 + 4 * number
            self._space[at] = 1 if bar.io else 0
            self._writable[at : at + 4] = (-bar.size & (0xFFFFFFFC if bar.io else 0xFFFFFFF0)).to_bytes(
                4, "little"
            )
            command |= PciCommand.IO if bar.io else PciCommand.MEMORY
        self._writable[ConfigOffset.COMMAND : ConfigOffset.COMMAND + 2] = command.to_bytes(2, "little")
        for offset in (ConfigOffset.CACHE_LINE_SIZE, ConfigOffset.LATENCY_TIMER, ConfigOffset.INTERRUPT_LINE):
            self._writable[offset] = 0xFF
        self._at_power_on = bytes(self._space)

    @property
    def command(self) -> int:
        """The command register."""
        return int.from_bytes(self._space[ConfigOffset.COMMAND : ConfigOffset.COMMAND + 2], "little")

    @property
    def interrupt_line(self) -> int:
        """What the guest's firmware wrote there; it has no effect on the hardware."""
        return self._space[ConfigOffset.INTERRUPT_LINE]

    def address(self, bar: int) -> int | None:
        """Where a base address register is decoded now; None if it is not."""
        return self._mapped[bar]

    def attach(self, bus: DeviceBus) -> None:
        """Decode the ranges on `bus` from now on."""
        self._bus = bus
        self._remap()

    def reset(self) -> None:
        """Configuration space as at power-on: nothing is decoded, and the function masters no bus."""
        self._space[:] = self._at_power_on
        self._remap()
        if self.on_command is not None:
            self.on_command(self.command)

    def detach(self) -> None:
        """Stop decoding."""
        for number in range(len(self._bars)):
            self._unmap(number)
        self._bus = None

    def config_read(self, offset: int, size: int) -> int:
        """Read configuration space; beyond its end all bits are 1."""
        return int.from_bytes(self._space[offset : offset + size].ljust(size, b"\xff"), "little")

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Write what is writable of configuration space."""
        for at, byte in enumerate(value.to_bytes(size, "little"), offset):
            if at < CONFIG_SIZE:
                mask = self._writable[at]
                self._space[at] = self._space[at] & ~mask | byte & mask
        if offset < ConfigOffset.BAR0 + 4 * BARS and offset + size > ConfigOffset.COMMAND:
            self._remap()
        if (
            self.on_command is not None
            and offset < ConfigOffset.STATUS
            and offset + size > ConfigOffset.COMMAND
        ):
            self.on_command(self.command)

    def _remap(self) -> None:
        for number, bar in enumerate(self._bars):
            enabled = self.command & (PciCommand.IO if bar.io else PciCommand.MEMORY)
            at = ConfigOffset.BAR0 + 4 * number
            base = int.from_bytes(self._space[at : at + 4], "little") & ~(0x3 if bar.io else 0xF)
            wanted = base if enabled and base else None
            if wanted != self._mapped[number]:
                self._unmap(number)
                if wanted is not None:
                    self._map(number, wanted)

    def _map(self, number: int, base: int) -> None:
        bar = self._bars[number]
        if self._bus is None or self._registers is None:
            return
        window = _Window(self._registers, number, base)
        try:
            if bar.io:
                self._bus.add_ports(base, bar.size, window)
            else:
                self._bus.add_mmio(base, bar.size, window)
        except ValueError as error:  # the guest put it on top of something else: that one stays
            _log.debug("BAR %d is not decoded: %s", number, error)
            return
        self._mapped[number] = base

    def _unmap(self, number: int) -> None:
        base = self._mapped[number]
        if base is None or self._bus is None:
            return
        if self._bars[number].io:
            self._bus.remove_ports(base, self._bars[number].size)
        else:
            self._bus.remove_mmio(base)
        self._mapped[number] = None


class PciBus:
    """Bus 0 of a partition, reached through ports 0xCF8 to 0xCFF.

    Args:
        devices: the partition's device bus, on which functions decode their ranges.

    Raises:
        ValueError: the configuration ports are taken.
    """

    def __init__(self, devices: DeviceBus) -> None:
        self._devices = devices
        self._functions: dict[int, PciFunction] = {}
        self._address = 0
        devices.add_ports(CONFIG_ADDRESS, 8, self)

    def add(self, slot: int, function: PciFunction) -> None:
        """Plug in a single-function device.

        Raises:
            LocalProtocolError: the slot is taken or does not exist.
        """
        if not 0 <= slot < 32 or slot << 3 in self._functions:
            raise LocalProtocolError(f"PCI slot {slot} is taken or does not exist")
        self._functions[slot << 3] = function
        function.attach(self._devices)

    def remove(self, slot: int) -> None:
        """Unplug a device, if there is one."""
        function = self._functions.pop(slot << 3, None)
        if function is not None:
            function.detach()

    def reset(self) -> None:
        """All functions, and the address register, as at power-on."""
        self._address = 0
        for function in self._functions.values():
            function.reset()

    def io_read(self, port: int, size: int) -> int:
        """IN from the configuration ports."""
        if port == CONFIG_ADDRESS and size == 4:
            return self._address
        found = self._target(port, size)
        return (1 << 8 * size) - 1 if found is None else found[0].config_read(found[1], size)

    def io_write(self, port: int, size: int, value: int) -> None:
        """OUT to the configuration ports; the address takes only 32-bit writes."""
        if port == CONFIG_ADDRESS and size == 4:
            self._address = value & 0x80FFFFFC
            return
        found = self._target(port, size)
        if found is not None:
            found[0].config_write(found[1], size, value)

    def _target(self, port: int, size: int) -> tuple[PciFunction, int] | None:
        """The function and offset that an access to the data ports means."""
        if port < CONFIG_DATA or port + size > CONFIG_DATA + 4 or not self._address & ENABLE:
            return None
        function = self._functions.get(self._address >> 8 & 0xFFFF)
        return None if function is None else (function, (self._address & 0xFC) + port - CONFIG_DATA)


def host_bridge() -> PciFunction:
    """The Intel 440BX host bridge, in slot 0 of Hyper-V's generation 1 machines."""
    return PciFunction(0x8086, 0x7192, 0x060000, revision=3)
