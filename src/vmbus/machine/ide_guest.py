"""A guest's block device on emulated hardware: machine-code driver routines, executed instruction by instruction.

`IdeDisk` has the block interface of the enlightened path, so that the same work can be done, and counted, on both.
Behind each call the x86 engine runs the ATA PIO driver of `vmbus.emulated.guest` in the child's memory; every
port access of it leaves to the hypervisor, which asks the emulated IDE channel.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vmbus.core import x86
from vmbus.emulated.ata import SECTOR, IdentifyDevice, Status
from vmbus.emulated.guest import TIMEOUT, Flag, Operation, Request, ata_pio, interrupt_table
from vmbus.emulated.ide import PRIMARY_IRQ
from vmbus.engine import Halt
from vmbus.engine.x86 import X86Engine
from vmbus.errors import DeviceError, LocalProtocolError
from vmbus.hypervisor import VirtualProcessor

__all__ = ["IdeDisk"]

RSP, RSI, RDI = 4, 6, 7
PAGE = 4096
MOST_SECTORS = 256
"""Sectors of one command: the most of a 28-bit command, and what Linux asks of a PIO disk."""
LBA28_END = 0x0FFFFFFF
REQUESTS = PAGE // Request.SIZE
"""Requests that one entry into the guest executes."""
STEPS = 1 << 32
"""Instructions after which one entry is given up: the driver's own polls end long before."""


class _Piece(NamedTuple):
    """Part of a transfer that one command moves."""

    lba: int
    sectors: int


class IdeDisk:
    """A disk on the child's primary IDE channel, driven by machine code.

    The driver owns `memory_size` bytes of the child's memory from `base` on: a page each of code, stack, IDT and
    requests, then the data buffer.

    Args:
        vp: the virtual processor that executes the driver.
        base: guest physical address of the driver's memory, page-aligned.
        buffer_size: bytes of the data buffer, a multiple of 128 KiB.
        interrupts: wait for line 14; otherwise poll the status register.
        string: move data with REP INSW and OUTSW; otherwise with a loop of IN and OUT.
        multiple: sectors per DRQ block: 1 for READ SECTORS, a power of two up to 128 for READ MULTIPLE.
        extended: use 48-bit commands always, never (False), or where an address needs them (None).
        string_elements: see `X86Engine`.

    Attributes:
        sector_size: bytes, 512.
        size: capacity in bytes.
        identity: what the disk says of itself.
        engine: the engine that executes the driver.

    Raises:
        DeviceError: there is no disk, or it does not understand the driver.
        LocalProtocolError: the arguments do not fit.
    """

    sector_size = SECTOR

    def __init__(
        self,
        vp: VirtualProcessor,
        *,
        base: int = 0x10000,
        buffer_size: int = 1 << 20,
        interrupts: bool = True,
        string: bool = True,
        multiple: int = 1,
        extended: bool | None = None,
        string_elements: int = x86.STRING_ELEMENTS,
    ) -> None:
        if base % PAGE or buffer_size < MOST_SECTORS * SECTOR or buffer_size % (MOST_SECTORS * SECTOR):
            raise LocalProtocolError("the driver wants whole pages and a buffer of a multiple of 128 KiB")
        if not 1 <= multiple <= 128 or multiple & (multiple - 1):
            raise LocalProtocolError(f"a block has 1, 2, 4 … 128 sectors, not {multiple}")
        self._memory = vp.partition.memory
        self._stack, self._idt, self._requests = base + 2 * PAGE, base + 2 * PAGE, base + 3 * PAGE
        self._buffer, self._buffer_size = base + 4 * PAGE, buffer_size
        self._extended = extended
        self._multiple = multiple
        self._flags = (Flag.INTERRUPT if interrupts else 0) | (0 if string else Flag.LOOP)
        self._transfer_flags = self._flags | (Flag.MULTIPLE if multiple > 1 else 0)
        self.engine = X86Engine(vp, string_elements=string_elements)
        self._code = base
        self._memory.write(base, ata_pio.CODE)
        vector = vp.partition.devices.irq_base + PRIMARY_IRQ
        table = interrupt_table(base, ata_pio.SPURIOUS, {vector: ata_pio.ISR})
        self._memory.write(self._idt, table)
        self.engine.cpu.idt = (self._idt, PAGE - 1)
        self.identity = self._start()
        self.size = (self.identity.lba48_sectors or self.identity.lba28_sectors) * SECTOR

    def __repr__(self) -> str:
        return f"<IdeDisk: {self.size:,} bytes>"

    def _start(self) -> IdentifyDevice:
        self._run([self._request(Operation.RESET)])
        self._run([self._request(Operation.IDENTIFY, buffer=self._buffer)])
        if self._multiple > 1:
            self._run([self._request(Operation.SET_MULTIPLE, sectors=self._multiple)])
        return IdentifyDevice.unpack(self._memory.read(self._buffer, SECTOR))

    # the block device

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at byte `offset`, both multiples of `sector_size`.

        Raises:
            DeviceError: the disk cannot read them.
            LocalProtocolError: the range is not on the disk, or not whole sectors.
        """
        return self.read_batch([offset], length)[0]

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` at byte `offset`; it may stay in the disk's cache until `flush`.

        Raises:
            DeviceError: the disk cannot write them.
            LocalProtocolError: the range is not on the disk, or not whole sectors.
        """
        self.write_batch([offset], [data])

    def flush(self) -> None:
        """Have everything written before put on stable storage.

        Raises:
            DeviceError: the disk could not.
        """
        flags = 0 if self._extended is False else Flag.EXTENDED
        self._run([self._request(Operation.FLUSH, flags=flags | self._flags, sectors=1)])

    def read_batch(self, offsets: Sequence[int], length: int) -> list[bytes]:
        """`length` bytes at each of `offsets`: one after the other, since the hardware takes one command at a time.

        Raises:
            DeviceError: the disk cannot read them.
            LocalProtocolError: a range is not on the disk, or not whole sectors.
        """
        results = [bytearray() for _ in offsets]
        work = [
            (index, piece) for index, offset in enumerate(offsets) for piece in self._pieces(offset, length)
        ]
        for part in self._rounds(work):
            requests, at = [], self._buffer
            for _, piece in part:
                requests.append(self._transfer(Operation.READ, piece, at))
                at += piece.sectors * SECTOR
            self._run(requests)
            at = self._buffer
            for index, piece in part:
                results[index] += self._memory.read(at, piece.sectors * SECTOR)
                at += piece.sectors * SECTOR
        return [bytes(result) for result in results]

    def write_batch(self, offsets: Sequence[int], data: Sequence[bytes]) -> None:
        """Write each of `data` at the offset with the same index.

        Raises:
            DeviceError: the disk cannot write them.
            LocalProtocolError: a range is not on the disk, or not whole sectors.
        """
        if len(offsets) != len(data):
            raise LocalProtocolError(f"{len(offsets)} offsets for {len(data)} pieces of data")
        work = [
            (index, piece)
            for index, offset in enumerate(offsets)
            for piece in self._pieces(offset, len(data[index]))
        ]
        for part in self._rounds(work):
            requests, at = [], self._buffer
            for index, piece in part:
                start = piece.lba * SECTOR - offsets[index]
                self._memory.write(at, data[index][start : start + piece.sectors * SECTOR])
                requests.append(self._transfer(Operation.WRITE, piece, at))
                at += piece.sectors * SECTOR
            self._run(requests)

    # below

    def _pieces(self, offset: int, length: int) -> Iterator[_Piece]:
        if offset % SECTOR or length % SECTOR or offset < 0 or length < 0 or offset + length > self.size:
            raise LocalProtocolError(
                f"{length} bytes at {offset} are not whole sectors of a disk of {self.size} bytes"
            )
        lba, left = offset // SECTOR, length // SECTOR
        while left:
            count = min(left, MOST_SECTORS)
            yield _Piece(lba, count)
            lba += count
            left -= count

    def _rounds(self, work: list[tuple[int, _Piece]]) -> Iterator[list[tuple[int, _Piece]]]:
        """Split work into parts that fit into the buffer and the page of requests."""
        part: list[tuple[int, _Piece]] = []
        used = 0
        for item in work:
            length = item[1].sectors * SECTOR
            if part and (used + length > self._buffer_size or len(part) == REQUESTS):
                yield part
                part, used = [], 0
            part.append(item)
            used += length
        if part:
            yield part

    def _request(
        self,
        operation: Operation,
        *,
        flags: int | None = None,
        sectors: int = 1,
        lba: int = 0,
        buffer: int = 0,
    ) -> Request:
        return Request(
            buffer=buffer,
            lba=lba,
            sectors=sectors,
            operation=operation,
            flags=self._flags if flags is None else flags,
            block=self._multiple,
            result=0,
            reserved=0,
        )

    def _transfer(self, operation: Operation, piece: _Piece, buffer: int) -> Request:
        flags = self._transfer_flags
        if self._extended or (self._extended is None and piece.lba + piece.sectors > LBA28_END):
            flags |= Flag.EXTENDED
        return self._request(operation, flags=flags, sectors=piece.sectors, lba=piece.lba, buffer=buffer)

    def _run(self, requests: Sequence[Request]) -> None:
        """Have the driver execute requests, and raise for the first that failed."""
        memory, cpu = self._memory, self.engine.cpu
        memory.write(self._requests, b"".join(request.pack() for request in requests))
        cpu.rip = self._code + ata_pio.START
        cpu.set_register(RDI, self._requests)
        cpu.set_register(RSI, len(requests))
        cpu.set_register(RSP, self._stack)
        cpu.rflags = 0x202 if self._flags & Flag.INTERRUPT else 0x002
        exit = self.engine.execute(STEPS)
        if exit != Halt(interruptible=False):
            raise DeviceError(f"the ATA driver did not finish: {exit} at {cpu.rip:#x}")
        raw = memory.read(self._requests, len(requests) * Request.SIZE)
        for at in range(0, len(raw), Request.SIZE):
            done = Request.unpack(raw, at)
            if done.result:
                raise DeviceError(_explain(done))


def _explain(request: Request) -> str:
    operation = Operation(request.operation).name
    if request.result & TIMEOUT:
        return f"there is no IDE disk, or it stayed busy during {operation} at sector {request.lba}"
    status, error = request.result >> 8 & 0xFF, request.result & 0xFF
    if not status & (Status.ERR | Status.DF):
        return (
            f"the IDE disk offered no data during {operation} at sector {request.lba}: status 0x{status:02x}"
        )
    return f"IDE {operation} at sector {request.lba} failed: status 0x{status:02x}, error 0x{error:02x}"
