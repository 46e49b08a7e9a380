"""The 16550A serial port: eight byte-wide registers, two FIFOs, prioritised interrupts.

Transmission takes no time: a byte written to THR is at the host before the instruction ends, so the
transmitter is always empty again, and its interrupt is pending again whenever the guest enabled it. What the host sends
waits on the host's side of the wire (as with flow control) and never overruns the receiver.

Register numbers and bits: National Semiconductor PC16550D data sheet, table 2.
"""

from collections import deque
from collections.abc import Callable
from enum import IntEnum

from vmbus.trace.ledger import Account

__all__ = ["COM1_IRQ", "COM1_PORT", "Uart16550"]

COM1_PORT = 0x3F8
"""First of the eight ports of a PC's first serial port."""
COM1_IRQ = 4
"""Its interrupt line."""

FIFO_SIZE = 16


class Register(IntEnum):
    """Offsets from the first port."""

    RBR_THR_DLL = 0
    IER_DLM = 1
    IIR_FCR = 2
    LCR = 3
    MCR = 4
    LSR = 5
    MSR = 6
    SCR = 7


class Ier(IntEnum):
    """Bits of the interrupt enable register."""

    RECEIVED = 1
    TRANSMITTER_EMPTY = 2
    LINE_STATUS = 4
    MODEM_STATUS = 8


class Iir(IntEnum):
    """Interrupt identification register, bits 0 to 3, from the highest priority to the lowest."""

    LINE_STATUS = 0x6
    RECEIVED = 0x4
    CHARACTER_TIMEOUT = 0xC
    TRANSMITTER_EMPTY = 0x2
    MODEM_STATUS = 0x0
    NONE = 0x1


class Fcr(IntEnum):
    """Bits of the FIFO control register, bits 0 to 2; bits 6 and 7 choose the trigger level."""

    ENABLE = 1
    CLEAR_RECEIVER = 2
    CLEAR_TRANSMITTER = 4


class Mcr(IntEnum):
    """Bits of the modem control register."""

    DTR = 0x01
    RTS = 0x02
    OUT1 = 0x04
    OUT2 = 0x08
    LOOPBACK = 0x10


class Lsr(IntEnum):
    """Bits of the line status register."""

    DATA_READY = 0x01
    OVERRUN = 0x02
    THR_EMPTY = 0x20
    TRANSMITTER_IDLE = 0x40


class Msr(IntEnum):
    """Bits of the modem status register."""

    DELTA_CTS = 0x01
    DELTA_DSR = 0x02
    TRAILING_RI = 0x04
    DELTA_DCD = 0x08
    CTS = 0x10
    DSR = 0x20
    RI = 0x40
    DCD = 0x80


LCR_DIVISOR_LATCH = 0x80
FIFOS_ENABLED = 0xC0
TRIGGER_LEVELS = (1, 4, 8, 14)
CONNECTED = Msr.CTS | Msr.DSR | Msr.DCD
"""Modem lines that a connected terminal holds up."""
ERROR_BITS = 0x1E
DELTA_BITS = 0x0F


class Uart16550:
    """A 16550A between a guest's eight ports and two host-side byte streams.

    Args:
        output: called with each byte (or bytes) that the guest sends.
        interrupt: called with the new level whenever the interrupt output changes; gated by OUT2 as on a PC.
        account: counts the bytes that pass; the exits are counted by the virtual processor.

    Attributes:
        divisor: the divisor latch; baud rate is 115200 / divisor. It does not change the speed.
    """

    def __init__(
        self,
        output: Callable[[bytes], None],
        interrupt: Callable[[bool], None] | None = None,
        account: Account | None = None,
    ) -> None:
        self._output = output
        self._interrupt = interrupt
        self._account = account
        self._level = False
        self.reset()

    def reset(self) -> None:
        """As at power-on; what the host sent and the guest has not read is lost."""
        self.divisor = 12  # 9600 baud, what firmware commonly leaves
        self._ier = 0
        self._fcr = 0
        self._lcr = 0
        self._mcr = 0
        self._msr = int(CONNECTED)
        self._scratch = 0
        self._errors = 0
        self._fifo: deque[int] = deque()
        self._wire: deque[int] = deque()
        self._thr_interrupt = False
        self._update()

    # host side

    def receive(self, data: bytes) -> None:
        """Send `data` to the guest; what its FIFO cannot hold yet follows when it reads."""
        self._wire.extend(data)
        self._fill()
        self._update()

    @property
    def pending(self) -> int:
        """Bytes sent by the host that the guest has not read yet."""
        return len(self._wire) + len(self._fifo)

    @property
    def is_listening(self) -> bool:
        """Whether the guest would be interrupted by what the host sends."""
        return bool(self._ier & Ier.RECEIVED and self._mcr & Mcr.OUT2)

    # guest side

    def io_read(self, port: int, size: int) -> int:
        """Read `size` registers from `port` (its low three bits choose the first); each is one byte."""
        value = self._read(port & 7)
        for i in range(1, size):  # an 8-bit ISA device sees a wide access as single bytes
            value |= self._read((port + i) & 7) << (8 * i)
        return value

    def io_write(self, port: int, size: int, value: int) -> None:
        """Write `size` registers from `port` on."""
        for i in range(size):
            self._write((port + i) & 7, value >> (8 * i) & 0xFF)

    def _read(self, register: int) -> int:
        match register:
            case Register.RBR_THR_DLL:
                return self.divisor & 0xFF if self._lcr & LCR_DIVISOR_LATCH else self._read_data()
            case Register.IER_DLM:
                return self.divisor >> 8 if self._lcr & LCR_DIVISOR_LATCH else self._ier
            case Register.IIR_FCR:
                return self._read_identification()
            case Register.LCR:
                return self._lcr
            case Register.MCR:
                return self._mcr
            case Register.LSR:
                status = (
                    self._errors
                    | Lsr.THR_EMPTY
                    | Lsr.TRANSMITTER_IDLE
                    | (Lsr.DATA_READY if self._fifo else 0)
                )
                self._errors = 0
                self._update()
                return int(status)
            case Register.MSR:
                value = self._msr
                self._msr &= ~DELTA_BITS
                self._update()
                return value
            case _:
                return self._scratch

    def _write(self, register: int, value: int) -> None:
        match register:
            case Register.RBR_THR_DLL:
                if self._lcr & LCR_DIVISOR_LATCH:
                    self.divisor = self.divisor & 0xFF00 | value
                else:
                    self._transmit(value)
            case Register.IER_DLM:
                if self._lcr & LCR_DIVISOR_LATCH:
                    self.divisor = self.divisor & 0xFF | value << 8
                else:
                    if value & ~self._ier & Ier.TRANSMITTER_EMPTY:  # enabling it while THR is empty raises it
                        self._thr_interrupt = True
                    self._ier = value & 0x0F
            case Register.IIR_FCR:
                self._write_fifo_control(value)
            case Register.LCR:
                self._lcr = value
            case Register.MCR:
                self._mcr = value & 0x1F
                self._set_modem_lines()
            case Register.SCR:
                self._scratch = value
            case _:  # LSR and MSR are for factory tests only
                pass
        self._update()

    # behind the registers

    def _capacity(self) -> int:
        return FIFO_SIZE if self._fcr & Fcr.ENABLE else 1

    def _fill(self) -> None:
        if self._mcr & Mcr.LOOPBACK:  # the receiver is cut off from the wire
            return
        while self._wire and len(self._fifo) < self._capacity():
            self._fifo.append(self._wire.popleft())
            if self._account is not None:
                self._account.bytes_copied += 1

    def _read_data(self) -> int:
        value = self._fifo.popleft() if self._fifo else 0
        self._fill()
        self._update()
        return value

    def _transmit(self, value: int) -> None:
        self._thr_interrupt = False  # full for an instant: an edge-triggered interrupt controller must see it
        self._update()
        self._thr_interrupt = True
        if self._mcr & Mcr.LOOPBACK:
            if len(self._fifo) < self._capacity():
                self._fifo.append(value)
            else:
                self._errors |= Lsr.OVERRUN
            return
        if self._account is not None:
            self._account.bytes_copied += 1
        self._output(bytes((value,)))

    def _write_fifo_control(self, value: int) -> None:
        if (value ^ self._fcr) & Fcr.ENABLE:  # both FIFOs are emptied when the mode changes
            value |= Fcr.CLEAR_RECEIVER
        if value & Fcr.CLEAR_RECEIVER:
            self._fifo.clear()
        if value & Fcr.CLEAR_TRANSMITTER:
            self._thr_interrupt = True
        self._fcr = value & (FIFOS_ENABLED | Fcr.ENABLE) if value & Fcr.ENABLE else 0
        self._fill()

    def _set_modem_lines(self) -> None:
        if self._mcr & Mcr.LOOPBACK:  # the four outputs are wired to the four inputs
            lines = (
                (Msr.CTS if self._mcr & Mcr.RTS else 0)
                | (Msr.DSR if self._mcr & Mcr.DTR else 0)
                | (Msr.RI if self._mcr & Mcr.OUT1 else 0)
                | (Msr.DCD if self._mcr & Mcr.OUT2 else 0)
            )
        else:
            lines = CONNECTED
            self._fill()
        changed = (lines ^ self._msr) & 0xF0
        delta = changed >> 4
        if not (changed & Msr.RI and self._msr & Msr.RI):  # only the trailing edge of RI counts
            delta &= ~int(Msr.TRAILING_RI)
        self._msr = int(lines | self._msr & DELTA_BITS | delta)

    def _identify(self) -> Iir:
        if self._ier & Ier.LINE_STATUS and self._errors & ERROR_BITS:
            return Iir.LINE_STATUS
        if self._ier & Ier.RECEIVED and self._fifo:
            if not self._fcr & Fcr.ENABLE or len(self._fifo) >= TRIGGER_LEVELS[self._fcr >> 6]:
                return Iir.RECEIVED
            return Iir.CHARACTER_TIMEOUT  # there is no more to wait for: the wire is as fast as the reader
        if self._ier & Ier.TRANSMITTER_EMPTY and self._thr_interrupt:
            return Iir.TRANSMITTER_EMPTY
        if self._ier & Ier.MODEM_STATUS and self._msr & DELTA_BITS:
            return Iir.MODEM_STATUS
        return Iir.NONE

    def _read_identification(self) -> int:
        source = self._identify()
        if source == Iir.TRANSMITTER_EMPTY:  # reading it here acknowledges it
            self._thr_interrupt = False
            self._update()
        return int(source) | (FIFOS_ENABLED if self._fcr & Fcr.ENABLE else 0)

    def _update(self) -> None:
        level = self._identify() != Iir.NONE and bool(self._mcr & Mcr.OUT2) and not self._mcr & Mcr.LOOPBACK
        if level != self._level:
            self._level = level
            if self._interrupt is not None:
                self._interrupt(level)
