"""An IDE channel: the ports 0x1F0–0x1F7 and 0x3F6, interrupt line 14, and one or two ATA disks.

PIO only, as guests without a driver for anything newer use it: every word of data passes the data port. The behaviour
is that of ATA/ATAPI-7 volume 2 (registers, clause 7; PIO protocols, clause 11). The media are read ahead and
written behind in pieces of up to `CHUNK` bytes within one command, as a disk's own buffer does.
"""

from collections.abc import Callable

from vmbus.emulated.ata import Backend, Command, Control, Device, Register, Status
from vmbus.emulated.drive import AtaDrive
from vmbus.trace.ledger import Account

__all__ = ["PRIMARY_CONTROL", "PRIMARY_IRQ", "PRIMARY_PORT", "IdeChannel"]

PRIMARY_PORT = 0x1F0
"""First port of the command block of a PC's primary channel."""
PRIMARY_CONTROL = 0x3F6
"""Its control block: device control, and alternate status."""
PRIMARY_IRQ = 14


class IdeChannel:
    """Two drives behind one set of registers.

    Args:
        master: the medium of device 0.
        slave: the medium of device 1, if there is one.
        interrupt: called with the new level whenever INTRQ changes.
        account: counts backend calls and the bytes that pass the data port.

    Attributes:
        drives: the two drives, None where there is none.

    Raises:
        DeviceError: a medium has sectors of other than 512 bytes, or none.
    """

    def __init__(
        self,
        master: Backend,
        slave: Backend | None = None,
        *,
        interrupt: Callable[[bool], None] | None = None,
        account: Account | None = None,
    ) -> None:
        self.account = Account() if account is None else account
        self.drives: list[AtaDrive | None] = [
            AtaDrive(master, 0, self.account, self._update),
            AtaDrive(slave, 1, self.account, self._update) if slave is not None else None,
        ]
        self._interrupt = interrupt
        self._level = False
        self._control = 0
        self._device = 0
        self._selected: AtaDrive | None = self.drives[0]

    def reset(self) -> None:
        """The machine restarts: both drives and the registers are as at power-on."""
        for drive in self.drives:
            if drive is not None:
                drive.power_on()
        self._control = 0
        self._select_first()
        self._update()

    # ports

    def io_read(self, port: int, size: int) -> int:
        """IN; wide reads of other registers than DATA are reads of several registers."""
        if port == PRIMARY_CONTROL:
            return self._status() | (0 if size == 1 else (1 << 8 * size) - 0x100)
        register = port - PRIMARY_PORT
        if register == Register.DATA:
            drive = self._selected
            return int.from_bytes(drive.read_data(size), "little") if drive is not None else 0
        value = 0
        for i in range(size):
            value |= (self._read(register + i) if register + i <= Register.STATUS_COMMAND else 0xFF) << (
                8 * i
            )
        return value

    def io_write(self, port: int, size: int, value: int) -> None:
        """OUT; see `io_read`."""
        if port == PRIMARY_CONTROL:
            self._write_control(value & 0xFF)
            return
        register = port - PRIMARY_PORT
        if register == Register.DATA:
            if self._selected is not None:
                self._selected.write_data(value.to_bytes(size, "little"))
            return
        for i in range(size):
            if register + i <= Register.STATUS_COMMAND:
                self._write(register + i, value >> (8 * i) & 0xFF)

    def io_read_string(self, port: int, size: int, count: int) -> bytes:
        """INS of `count` elements."""
        if port == PRIMARY_PORT and self._selected is not None:
            return self._selected.read_data(size * count)
        return b"".join(self.io_read(port, size).to_bytes(size, "little") for _ in range(count))

    def io_write_string(self, port: int, size: int, data: bytes) -> None:
        """OUTS."""
        if port == PRIMARY_PORT and self._selected is not None:
            self._selected.write_data(data)
            return
        for at in range(0, len(data), size):
            self.io_write(port, size, int.from_bytes(data[at : at + size], "little"))

    # registers

    def _status(self) -> int:
        if self._control & Control.SRST:
            return Status.BSY
        return self._selected.status if self._selected is not None else 0

    def _read(self, register: int) -> int:
        drive = self._selected
        if register == Register.STATUS_COMMAND:
            status = self._status()
            if drive is not None:
                drive.pending = False
                self._update()
            return status
        if register == Register.DEVICE:
            return (self._device if drive is None else drive.device) | Device.OBSOLETE
        if drive is None:  # device 0 answers for a device 1 that is not there, with its own task file
            drive = self.drives[0]
            if drive is None or register == Register.ERROR_FEATURES:
                return 0
        return drive.read_register(register, bool(self._control & Control.HOB))

    def _write(self, register: int, value: int) -> None:
        self._control &= ~Control.HOB
        if self._control & Control.SRST:
            return
        if register == Register.STATUS_COMMAND:
            self._command(value)
        elif register == Register.DEVICE:
            self._device = value
            self._selected = self.drives[1 if value & Device.DEV else 0]
            for drive in self.drives:
                if drive is not None:
                    drive.device = value
            self._update()
        else:  # both drives see every write
            for drive in self.drives:
                if drive is not None:
                    drive.write_register(register, value)

    def _command(self, command: int) -> None:
        if command == Command.EXECUTE_DIAGNOSTIC:  # both drives execute it, device 0 answers
            for drive in self.drives:
                if drive is not None:
                    drive.diagnose()
            self._select_first()
            first = self.drives[0]
            if first is not None:
                first.interrupt()
        elif self._selected is not None:
            self._selected.execute(command)

    def _write_control(self, value: int) -> None:
        released = self._control & Control.SRST and not value & Control.SRST
        self._control = value & (Control.NIEN | Control.SRST | Control.HOB)
        if value & Control.SRST or released:
            for drive in self.drives:
                if drive is not None:
                    drive.reset()
            self._select_first()
        self._update()

    def _select_first(self) -> None:
        self._device = 0
        self._selected = self.drives[0]

    def _update(self) -> None:
        """Drive INTRQ: the selected drive's, unless nIEN disconnects it."""
        drive = self._selected
        level = drive is not None and drive.pending and not self._control & (Control.NIEN | Control.SRST)
        if level != self._level:
            self._level = level
            if self._interrupt is not None:
                self._interrupt(level)
