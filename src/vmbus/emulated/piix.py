"""The IDE controller of an Intel PIIX4 as a PCI function: what a PC without enlightenments has its disks on.

Two channels of two ATA disks, in native mode: their registers are where the guest puts the base address registers, and
both share the function's interrupt pin (PCI IDE Controller Specification 1.0). There is no bus master, so guests use
PIO. Facts: Intel 82371AB data sheet, section 6; Linux's ``ata_piix`` looks at the channels' enable bits first.
"""

from collections.abc import Callable, Sequence

from vmbus.emulated.ata import Backend
from vmbus.emulated.ide import PRIMARY_CONTROL, PRIMARY_PORT, IdeChannel
from vmbus.emulated.pci import Bar, PciFunction
from vmbus.errors import LocalProtocolError
from vmbus.trace.ledger import Account

__all__ = ["MOST_DISKS", "PiixIde"]

MOST_DISKS = 4
CLASS_IDE_NATIVE = 0x01_01_05
"""Mass storage, IDE; both channels in native mode (bits 0 and 2 of the interface)."""
CONTROL_OFFSET = 2
"""Of device control in a channel's second range, of four ports."""
TIMING = 0x40
"""IDETIM of the primary channel, 16 bits; the secondary's follows."""
DECODE_ENABLE = 1 << 15


class PiixIde:
    """The controller with its disks.

    Args:
        disks: up to four media: primary master and slave, secondary master and slave.
        interrupt: called with the new level of INTA#.
        account: counts backend calls and the bytes that pass the data ports.

    Attributes:
        function: to plug into a `PciBus`.
        channels: one or two.

    Raises:
        DeviceError: a medium has sectors of other than 512 bytes, or none.
        LocalProtocolError: no disk, or too many.
    """

    def __init__(
        self, disks: Sequence[Backend], interrupt: Callable[[bool], None], account: Account | None = None
    ) -> None:
        if not 1 <= len(disks) <= MOST_DISKS:
            raise LocalProtocolError(f"an IDE controller takes 1 to {MOST_DISKS} disks, not {len(disks)}")
        self._interrupt = interrupt
        self._levels = [False, False]
        self.channels = [
            IdeChannel(
                disks[first],
                disks[first + 1] if first + 1 < len(disks) else None,
                interrupt=self._line(first // 2),
                account=account,
            )
            for first in range(0, len(disks), 2)
        ]
        timing = {TIMING + 2 * n: DECODE_ENABLE.to_bytes(2, "little") for n in range(len(self.channels))}
        self.function = PciFunction(
            0x8086,
            0x7111,
            CLASS_IDE_NATIVE,
            revision=1,
            bars=(Bar(8, io=True), Bar(4, io=True)) * len(self.channels),
            registers=self,
            interrupt_pin=1,
            fixed=timing,
        )

    def _line(self, channel: int) -> Callable[[bool], None]:
        def set_level(level: bool) -> None:
            before = any(self._levels)
            self._levels[channel] = level
            if any(self._levels) != before:
                self._interrupt(not before)

        return set_level

    def reset(self) -> None:
        """The machine restarts: both channels are as at power-on."""
        for channel in self.channels:
            channel.reset()

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """Read a channel's command block or, in every second range, its alternate status."""
        channel = self.channels[bar // 2]
        if not bar % 2:
            return channel.io_read(PRIMARY_PORT + offset, size)
        return channel.io_read(PRIMARY_CONTROL, size) if offset == CONTROL_OFFSET else (1 << 8 * size) - 1

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Write a channel's command block, or its device control."""
        channel = self.channels[bar // 2]
        if not bar % 2:
            channel.io_write(PRIMARY_PORT + offset, size, value)
        elif offset == CONTROL_OFFSET:
            channel.io_write(PRIMARY_CONTROL, size, value)
