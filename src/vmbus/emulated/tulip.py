"""The DEC 21140 "Tulip", the legacy network adapter of Hyper-V's generation 1 machines.

Sixteen 32-bit registers (CSR0–CSR15, eight bytes apart), descriptor rings in guest memory, address filters given by a
setup frame, and a serial ROM with the Ethernet address. The numbers are those of Digital's 21140A hardware
reference manual (EC-QN7NG-TE), chapters 3 and 4. Everything in guest memory is copied once and then checked; a
descriptor or buffer outside of it is a bus error of the chip, as on hardware, and never more.
"""

import struct
from binascii import crc32
from collections.abc import Callable
from enum import IntEnum

from vmbus.core.memory import GuestMemory
from vmbus.emulated.srom import LINK_PIN, SerialRom, tulip_rom
from vmbus.errors import GuestMemoryError, LocalProtocolError
from vmbus.trace.ledger import Account

__all__ = ["DEVICE_ID", "REGISTERS_SIZE", "VENDOR_ID", "Csr", "Descriptor", "Mode", "Status", "Tulip"]

VENDOR_ID = 0x1011
DEVICE_ID = 0x0009
REGISTERS_SIZE = 128
MOST_FRAME = 1518
"""Bytes of the longest frame with its VLAN tag, without the check sequence."""
LEAST_FRAME = 60
HEADER_SIZE = 14
BURST = 1024
"""Descriptors handled for one poll demand; the rest waits for the next."""
SETUP_SIZE = 192


class Csr(IntEnum):
    """Register numbers."""

    BUS_MODE = 0
    TRANSMIT_POLL = 1
    RECEIVE_POLL = 2
    RECEIVE_LIST = 3
    TRANSMIT_LIST = 4
    STATUS = 5
    OPERATION_MODE = 6
    INTERRUPT_ENABLE = 7
    MISSED_FRAMES = 8
    SERIAL_ROM = 9
    TIMER = 11
    GENERAL_PURPOSE = 12
    WATCHDOG = 15


class Status(IntEnum):
    """Bits of CSR5; CSR7 enables the same ones."""

    TRANSMITTED = 1 << 0
    TRANSMIT_STOPPED = 1 << 1
    TRANSMIT_NO_BUFFER = 1 << 2
    JABBER = 1 << 3
    RECEIVED = 1 << 6
    RECEIVE_NO_BUFFER = 1 << 7
    RECEIVE_STOPPED = 1 << 8
    BUS_ERROR = 1 << 13
    ABNORMAL = 1 << 15
    NORMAL = 1 << 16


class Mode(IntEnum):
    """Bits of CSR6."""

    HASH_PERFECT = 1 << 0
    RECEIVE = 1 << 1
    HASH_ONLY = 1 << 2
    INVERSE = 1 << 4
    PROMISCUOUS = 1 << 6
    ALL_MULTICAST = 1 << 7
    LOOPBACK = 3 << 10
    TRANSMIT = 1 << 13


class Descriptor(IntEnum):
    """Bits of descriptors: words 0 and 1 of either kind."""

    OWN = 1 << 31
    ERROR_SUMMARY = 1 << 15
    RX_TOO_SMALL = 1 << 14
    RX_MULTICAST = 1 << 10
    RX_FIRST = 1 << 9
    RX_LAST = 1 << 8
    RX_ETHERNET = 1 << 5
    TX_INTERRUPT = 1 << 31
    TX_LAST = 1 << 30
    TX_FIRST = 1 << 29
    TX_FILTER1 = 1 << 28
    TX_SETUP = 1 << 27
    END_OF_RING = 1 << 25
    CHAINED = 1 << 24
    TX_NO_PADDING = 1 << 23
    TX_FILTER0 = 1 << 22


NORMAL_BITS = Status.TRANSMITTED | Status.TRANSMIT_NO_BUFFER | Status.RECEIVED
ABNORMAL_BITS = (
    Status.TRANSMIT_STOPPED
    | Status.JABBER
    | Status.RECEIVE_NO_BUFFER
    | Status.RECEIVE_STOPPED
    | Status.BUS_ERROR
)
STOPPED, SUSPENDED, RUNNING = 0, 6, 3
"""Process states in CSR5: stopped; suspended for want of a descriptor (receive: 4); at work."""
RECEIVE_SUSPENDED = 4
FILTER_MODES = (0, Mode.HASH_PERFECT, Mode.INVERSE, Mode.HASH_PERFECT | Mode.HASH_ONLY)
PROGRESS = (Csr.RECEIVE_POLL, Csr.STATUS, Csr.INTERRUPT_ENABLE)
"""What drivers write after they have emptied receive descriptors."""
RESET_MODE = 0x32000000
"""Reserved bits that read as ones."""


class Tulip:
    """A 21140.

    Args:
        memory: the guest's memory, for descriptors and buffers.
        address: the Ethernet address in the serial ROM.
        transmit: called with each frame that the guest sends, without check sequence.
        interrupt: called with the new level whenever INTA# changes.
        account: counts frames as packets, and the bytes that the adapter copies.

    Attributes:
        bus_master: the guest allows it to access memory (PCI command register).
        link_up: whether the cable is connected; the guest sees it on a general-purpose pin.
        on_progress: called when the guest may have made room for frames, as `has_room` says.
        on_stop: called when the guest has stopped reception, or reset the chip.
    """

    def __init__(
        self,
        memory: GuestMemory,
        address: bytes,
        transmit: Callable[[bytes], None],
        *,
        interrupt: Callable[[bool], None] | None = None,
        account: Account | None = None,
    ) -> None:
        if len(address) != 6 or address[0] & 1:
            raise LocalProtocolError(f"{address.hex(':')} is not the address of one station")
        self.address = address
        self.bus_master = True
        self.link_up = True
        self.on_progress: Callable[[], None] | None = None
        self.on_stop: Callable[[], None] | None = None
        self._memory = memory
        self._transmit = transmit
        self._interrupt = interrupt
        self._account = Account() if account is None else account
        self._rom = SerialRom(tulip_rom(address))
        self._level = False
        self._busy = False
        self.reset()

    def reset(self) -> None:
        """What a software reset and a restart of the machine leave; the cable stays."""
        self._csr = [0] * 16
        self._csr[Csr.BUS_MODE] = 0xFE000000
        self._csr[Csr.OPERATION_MODE] = RESET_MODE
        self._rx = self._tx = 0
        self._rx_state = self._tx_state = STOPPED
        self._frame = bytearray()
        self._filter: frozenset[bytes] = frozenset()
        self._hash = 0
        self._update()
        self._stopped()

    # registers

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """Read a register; both of the chip's ranges show the same ones."""
        number, at = divmod(offset, 8)
        if at >= 4:
            return 0
        value = self._read(number) >> (8 * at)
        return value & (1 << 8 * min(size, 4 - at)) - 1

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Write a register; the chip takes only whole ones."""
        if offset % 8 == 0 and size >= 4:
            self._write(offset // 8, value & 0xFFFFFFFF)
            if offset // 8 in PROGRESS and self.on_progress is not None:
                self.on_progress()

    def _read(self, number: int) -> int:
        if number == Csr.STATUS:
            states = self._rx_state << 17 | self._tx_state << 20
            return self._csr[Csr.STATUS] | states | self._summary()
        if number == Csr.SERIAL_ROM:
            return self._csr[number] & ~0x8 | self._rom.output << 3 | 0x80000  # MII data: nobody there
        if number == Csr.GENERAL_PURPOSE:
            return self._csr[number] & ~LINK_PIN | (0 if self.link_up else LINK_PIN)
        value = self._csr[number]
        if number == Csr.MISSED_FRAMES:
            self._csr[number] = 0
        return value

    def _write(self, number: int, value: int) -> None:
        if number == Csr.BUS_MODE and value & 1:
            self.reset()
        elif number == Csr.STATUS:
            self._csr[number] &= ~value
            self._update()
        elif number == Csr.TRANSMIT_POLL:
            self._poll_transmit()
        elif number == Csr.RECEIVE_POLL:
            if self._rx_state == RECEIVE_SUSPENDED:
                self._rx_state = RUNNING
        elif number == Csr.OPERATION_MODE:
            self._write_mode(value)
        elif number in (Csr.RECEIVE_LIST, Csr.TRANSMIT_LIST):
            self._csr[number] = value & ~3
            if number == Csr.RECEIVE_LIST:
                self._rx = value & ~3
            else:
                self._tx = value & ~3
        elif number == Csr.SERIAL_ROM:
            self._csr[number] = value
            if value & 0x800:  # the serial ROM is selected
                self._rom.lines(value & 1, value & 2, value & 4)
        elif number != Csr.MISSED_FRAMES:
            self._csr[number] = value
            self._update()

    def _write_mode(self, value: int) -> None:
        filters = FILTER_MODES[3]
        filters |= Mode.INVERSE
        before = self._csr[Csr.OPERATION_MODE]
        self._csr[Csr.OPERATION_MODE] = value & ~filters | before & filters  # these follow the setup frame
        if value & Mode.RECEIVE and self._rx_state == STOPPED:
            self._rx_state = RUNNING
        elif not value & Mode.RECEIVE and self._rx_state != STOPPED:
            self._rx_state = STOPPED
            self._raise(Status.RECEIVE_STOPPED)
            self._stopped()
        if value & Mode.TRANSMIT:
            self._poll_transmit(start=True)
        elif self._tx_state != STOPPED:
            self._tx_state = STOPPED
            self._raise(Status.TRANSMIT_STOPPED)

    def _stopped(self) -> None:
        if self.on_stop is not None:
            self.on_stop()

    def _summary(self) -> int:
        shown = self._csr[Csr.STATUS] & self._csr[Csr.INTERRUPT_ENABLE]
        return (Status.NORMAL if shown & NORMAL_BITS else 0) | (
            Status.ABNORMAL if shown & ABNORMAL_BITS else 0
        )

    def _raise(self, bits: int) -> None:
        self._csr[Csr.STATUS] |= bits
        self._update()

    def _update(self) -> None:
        level = bool(self._summary() & self._csr[Csr.INTERRUPT_ENABLE])
        if level != self._level:
            self._level = level
            if self._interrupt is not None:
                self._interrupt(level)

    # descriptors

    def _load(self, at: int) -> tuple[int, int, int, int]:
        word0, word1, word2, word3 = struct.unpack("<4I", self._memory.read(at, 16))
        return word0, word1, word2, word3

    def _next(self, at: int, base: int, control: int, link: int) -> int:
        if control & Descriptor.END_OF_RING:
            return base
        if control & Descriptor.CHAINED:
            return link & ~3
        return at + 16 + 4 * (self._csr[Csr.BUS_MODE] >> 2 & 0x1F) & 0xFFFFFFFF

    def _bus_error(self) -> None:
        """Stop both processes; only a reset helps."""
        self._rx_state = self._tx_state = STOPPED
        self._csr[Csr.OPERATION_MODE] &= ~(Mode.RECEIVE | Mode.TRANSMIT)
        self._raise(Status.BUS_ERROR)
        self._stopped()

    # transmission

    def _poll_transmit(self, start: bool = False) -> None:
        if not self._csr[Csr.OPERATION_MODE] & Mode.TRANSMIT or (self._tx_state == STOPPED and not start):
            return
        if self._busy or not self.bus_master:  # a handler of `transmit` came back here
            return
        self._busy = True
        self._tx_state = RUNNING
        try:
            for _ in range(BURST):
                if self._tx_state != RUNNING or not self._transmit_one():
                    break
        except GuestMemoryError:
            self._bus_error()
        finally:
            self._busy = False

    def _transmit_one(self) -> bool:
        at = self._tx
        status, control, buffer1, buffer2 = self._load(at)
        if not status & Descriptor.OWN:
            self._tx_state = SUSPENDED
            self._raise(Status.TRANSMIT_NO_BUFFER)
            return False
        size1, size2 = control & 0x7FF, control >> 11 & 0x7FF
        result = 0
        if control & Descriptor.TX_SETUP:
            if size1 == SETUP_SIZE:
                self._set_filter(self._memory.read(buffer1, SETUP_SIZE), control)
            result = 0x7FFFFFFF
        else:
            if control & Descriptor.TX_FIRST:
                self._frame.clear()
            self._frame += self._memory.read(buffer1, size1)
            if size2 and not control & Descriptor.CHAINED:
                self._frame += self._memory.read(buffer2, size2)
            if len(self._frame) > MOST_FRAME:
                self._frame.clear()
                result = Descriptor.ERROR_SUMMARY | 1 << 14  # jabber time-out
                self._raise(Status.JABBER)
        self._memory.write(at, struct.pack("<I", result))
        self._tx = self._next(at, self._csr[Csr.TRANSMIT_LIST], control, buffer2)
        if control & Descriptor.TX_LAST and self._frame and not control & Descriptor.TX_SETUP:
            frame = bytes(self._frame)
            self._frame.clear()
            if not control & Descriptor.TX_NO_PADDING:
                frame = frame.ljust(LEAST_FRAME, b"\0")
            self._send(frame)
        if control & Descriptor.TX_INTERRUPT:
            self._raise(Status.TRANSMITTED)
        return True

    def _send(self, frame: bytes) -> None:
        if len(frame) < HEADER_SIZE:  # not a frame that anybody could receive
            return
        self._account.packets_sent += 1
        self._account.bytes_copied += len(frame)
        if self._csr[Csr.OPERATION_MODE] & Mode.LOOPBACK:
            self.receive(frame)
        else:
            self._transmit(frame)

    def _set_filter(self, setup: bytes, control: int) -> None:
        """Take over a setup frame: 16 bits in each 32-bit word."""
        halves = b"".join(setup[i : i + 2] for i in range(0, SETUP_SIZE, 4))
        kind = (2 if control & Descriptor.TX_FILTER1 else 0) | (1 if control & Descriptor.TX_FILTER0 else 0)
        mode = self._csr[Csr.OPERATION_MODE] & ~(FILTER_MODES[3] | Mode.INVERSE)
        self._csr[Csr.OPERATION_MODE] = mode | FILTER_MODES[kind]
        if kind in (0, 2):
            self._filter = frozenset(halves[i : i + 6] for i in range(0, 96, 6))
            self._hash = 0
        else:
            self._hash = int.from_bytes(halves[:64], "little")
            self._filter = frozenset((halves[78:84],))

    # reception

    def accepts(self, destination: bytes) -> bool:
        """Whether frames to this address pass the filters that the guest has set."""
        mode = self._csr[Csr.OPERATION_MODE]
        if mode & Mode.PROMISCUOUS or (mode & Mode.ALL_MULTICAST and destination[0] & 1):
            return True
        hashed = bool(self._hash >> (~crc32(destination) & 0x1FF) & 1)
        if mode & Mode.HASH_ONLY:
            return hashed
        if mode & Mode.HASH_PERFECT:
            return hashed if destination[0] & 1 else destination in self._filter
        return (destination in self._filter) != bool(mode & Mode.INVERSE)

    @property
    def is_receiving(self) -> bool:
        """Whether the guest has started reception."""
        return self._rx_state != STOPPED and self.bus_master

    @property
    def has_room(self) -> bool:
        """Whether the guest receives, and the next descriptor is the chip's."""
        if not self.is_receiving:
            return False
        try:
            return bool(self._load(self._rx)[0] & Descriptor.OWN)
        except GuestMemoryError:
            return True  # `receive` will say that it is a bus error

    def receive(self, frame: bytes) -> bool:
        """A frame from the network, without check sequence; False if the guest did not get it."""
        if not HEADER_SIZE <= len(frame) <= MOST_FRAME or self._rx_state == STOPPED or not self.bus_master:
            return False
        if not self.accepts(frame[:6]):
            return False
        frame = frame.ljust(LEAST_FRAME, b"\0")
        frame += struct.pack("<I", crc32(frame))
        try:
            done = self._receive(frame)
        except GuestMemoryError:
            self._bus_error()
            return False
        if not done:
            missed = self._csr[Csr.MISSED_FRAMES]
            self._csr[Csr.MISSED_FRAMES] = missed + 1 if missed & 0xFFFF < 0xFFFF else 0x10000
            return False
        self._account.packets_received += 1
        self._account.bytes_copied += len(frame)
        self._raise(Status.RECEIVED)
        return True

    def _receive(self, frame: bytes) -> bool:
        """Put a frame into as many descriptors as it needs."""
        at, done = self._rx, 0
        first: int = Descriptor.RX_FIRST
        while True:
            status, control, buffer1, buffer2 = self._load(at)
            if not status & Descriptor.OWN:
                self._rx_state = RECEIVE_SUSPENDED
                self._raise(Status.RECEIVE_NO_BUFFER)
                if done:  # the rest of it is lost
                    self._rx = at
                return False
            self._rx_state = RUNNING
            size1 = control & 0x7FC
            size2 = 0 if control & Descriptor.CHAINED else control >> 11 & 0x7FC
            for buffer, size in ((buffer1, size1), (buffer2, size2)):
                part = frame[done : done + size]
                if part:
                    self._memory.write(buffer, part)
                    done += len(part)
            last = done == len(frame)
            result = first | Descriptor.RX_ETHERNET
            if frame[0] & 1:
                result |= Descriptor.RX_MULTICAST
            if last:
                result |= Descriptor.RX_LAST | len(frame) << 16
            self._memory.write(at, struct.pack("<I", result))
            at = self._next(at, self._csr[Csr.RECEIVE_LIST], control, buffer2)
            if last:
                self._rx = at
                return True
            if not size1 and not size2:  # such a descriptor takes nothing, and a ring of them would never end
                self._rx = at
                return False
            first = 0
