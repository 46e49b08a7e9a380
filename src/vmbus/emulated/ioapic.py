"""The I/O APIC: turns interrupt lines into interrupts of a partition's processors.

Twenty-four lines, edge or level triggered, fixed and lowest-priority delivery. A level-triggered line that is still
asserted when the guest ends its interrupt is delivered again.
Registers: Intel 82093AA data sheet; destinations as in the SDM, section 11.5.
"""

from enum import IntEnum

from vmbus.hypervisor import Partition

__all__ = ["IO_APIC_ADDRESS", "IO_APIC_SIZE", "IoApic"]

IO_APIC_ADDRESS = 0xFEC0_0000
IO_APIC_SIZE = 0x1000
LINES = 24
VERSION = 0x11

SELECT = 0x00
WINDOW = 0x10


class Register(IntEnum):
    """Indices behind the window."""

    ID = 0
    VERSION = 1
    ARBITRATION = 2
    REDIRECTION = 0x10


VECTOR = 0xFF
DELIVERY_MODE = 7 << 8
LOGICAL = 1 << 11
REMOTE_IRR = 1 << 14
LEVEL = 1 << 15
MASKED = 1 << 16
READ_ONLY = 1 << 12 | REMOTE_IRR
FIXED, LOWEST_PRIORITY = 0, 1


class IoApic:
    """An I/O APIC whose lines are those of the partition's `DeviceBus`.

    Args:
        partition: whose processors it interrupts; it becomes the controller of the partition's lines.
    """

    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self.reset()
        partition.devices.add_mmio(IO_APIC_ADDRESS, IO_APIC_SIZE, self)
        partition.devices.set_line = self.set_line
        partition.on_eoi = self.end_of_interrupt
        partition.on_apic_enabled = self._apic_enabled

    def reset(self) -> None:
        """As at power-on: all lines masked, and released until their devices say otherwise."""
        self._select = 0
        self._id = 0
        self._entries = [MASKED] * LINES
        self._levels = [False] * LINES

    def mmio_read(self, offset: int, size: int) -> int:
        """Read the selector or, through the window, the selected register."""
        if offset == SELECT:
            return self._select
        if offset != WINDOW:
            return 0
        index = self._select
        if index in (Register.ID, Register.ARBITRATION):
            return self._id << 24
        if index == Register.VERSION:
            return VERSION | (LINES - 1) << 16
        line, high = divmod(index - Register.REDIRECTION, 2)
        if 0 <= line < LINES:
            return self._entries[line] >> 32 * high & 0xFFFF_FFFF
        return 0

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """Select a register or, through the window, write the selected one."""
        if offset == SELECT:
            self._select = value & 0xFF
            return
        if offset != WINDOW:
            return
        if self._select == Register.ID:
            self._id = value >> 24 & 0x0F
            return
        line, high = divmod(self._select - Register.REDIRECTION, 2)
        if not 0 <= line < LINES:
            return
        entry = self._entries[line]
        if high:
            self._entries[line] = entry & 0xFFFF_FFFF | (value & 0xFFFF_FFFF) << 32
            return
        entry = entry & ~0xFFFF_FFFF | value & 0xFFFF_FFFF & ~READ_ONLY | entry & READ_ONLY
        if not entry & LEVEL:
            entry &= ~REMOTE_IRR
        self._entries[line] = entry
        if self._levels[line] and entry & LEVEL:
            self._raise(line)

    def set_line(self, line: int, level: bool) -> None:
        """Assert or release a line; lines that do not exist are ignored."""
        if not 0 <= line < LINES:
            return
        rising = level and not self._levels[line]
        self._levels[line] = level
        if rising:
            self._raise(line)

    def end_of_interrupt(self, vector: int) -> None:
        """A processor ended `vector`: level-triggered lines that are still asserted come again."""
        for line, entry in enumerate(self._entries):
            if entry & REMOTE_IRR and entry & VECTOR == vector:
                self._entries[line] = entry & ~REMOTE_IRR
                if self._levels[line]:
                    self._raise(line)

    def _apic_enabled(self) -> None:
        """A processor takes interrupts now: level-triggered lines that nobody took come again."""
        for line, entry in enumerate(self._entries):
            if self._levels[line] and entry & LEVEL:
                self._raise(line)

    def _raise(self, line: int) -> None:
        entry = self._entries[line]
        if entry & (MASKED | REMOTE_IRR) or (entry & DELIVERY_MODE) >> 8 not in (FIXED, LOWEST_PRIORITY):
            return
        vector = entry & VECTOR
        if vector < 16:
            return
        if entry & LEVEL:
            self._entries[line] |= REMOTE_IRR
        taken = False
        for vp in self._partition.vps:
            if vp.apic.matches(entry >> 56, bool(entry & LOGICAL)):
                taken |= vp.request_interrupt(vector, level=bool(entry & LEVEL))  # shows in the TMR
                if taken and entry & DELIVERY_MODE:
                    return
        if not taken:
            self._entries[line] &= ~REMOTE_IRR  # nobody will end it
