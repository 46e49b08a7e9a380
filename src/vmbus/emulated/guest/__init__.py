"""Machine code that runs inside guests: the driver routines of the emulated path, and what they are told.

The assembler sources are beside the bytes; no assembler is needed to run them.
"""

from enum import IntEnum, IntFlag

from vmbus.wire import U8, U16, U32, U64, Structure, wire

__all__ = [
    "BAD_REQUEST",
    "FAILED",
    "TIMEOUT",
    "Flag",
    "FrameBuffer",
    "Nic",
    "Operation",
    "Request",
    "interrupt_table",
]

CODE_SELECTOR = 0x10
GATE_SIZE = 16
INTERRUPT_GATE = 0x8E
EXTERNAL = 32
"""The first vector that is not an exception."""

TIMEOUT = 0x10000
FAILED = 0x20000
BAD_REQUEST = 0x40000
"""Bits of `Request.result`; with `FAILED` bits 15:8 are the status register, 7:0 the error register."""


class Operation(IntEnum):
    """What a request asks the ATA driver to do."""

    IDENTIFY = 0
    READ = 1
    WRITE = 2
    FLUSH = 3
    SET_MULTIPLE = 4
    RESET = 5


class Flag(IntFlag):
    """How it is to be done."""

    EXTENDED = 1
    """Commands with 48-bit addresses."""
    MULTIPLE = 2
    """READ and WRITE MULTIPLE."""
    INTERRUPT = 4
    """Wait for interrupts; otherwise poll."""
    LOOP = 8
    """Move each word with its own IN or OUT; otherwise REP INSW and OUTSW."""


@wire(size=32, offsets={"lba": 8, "sectors": 16, "operation": 20, "block": 22, "result": 24})
class Request(Structure):
    """One request to the ATA driver, in the guest's memory.

    Attributes:
        buffer: guest physical address of the data.
        lba: first sector.
        sectors: how many, 1 to 256, or to 65536 with `Flag.EXTENDED`.
        operation: an `Operation`.
        flags: `Flag` bits.
        block: sectors per DRQ block: 1, or what SET MULTIPLE MODE has set.
        result: written by the driver: 0, or see `FAILED`.
        reserved: 0.
    """

    buffer: U64
    lba: U64
    sectors: U32
    operation: U8
    flags: U8
    block: U16
    result: U32
    reserved: U32


@wire(size=64, offsets={"tx_ring": 16, "tx_head": 32, "status": 40, "result": 48})
class Nic(Structure):
    """The state of the network driver, in the guest's memory.

    Attributes:
        registers: guest physical address, or port, of CSR0.
        ports: 1 if the registers are reached through ports.
        entries: descriptors of each ring, a power of two.
        tx_ring: guest physical address of the transmit ring.
        rx_ring: guest physical address of the receive ring.
        tx_head: frames queued since the start.
        rx_head: frames taken since the start.
        status: status bits that interrupts have shown.
        interrupts: interrupts taken.
        result: frames handled by the last call.
        dropped: received frames that had errors or did not fit into one buffer.
        reserved: 0.
    """

    registers: U64
    ports: U32
    entries: U32
    tx_ring: U64
    rx_ring: U64
    tx_head: U32
    rx_head: U32
    status: U32
    interrupts: U32
    result: U32
    dropped: U32
    reserved: U64


@wire(size=16)
class FrameBuffer(Structure):
    """A frame to send, or room for one to receive: 2048 bytes.

    Attributes:
        buffer: guest physical address; below 4 GB for frames to send.
        length: bytes.
        reserved: 0.
    """

    buffer: U64
    length: U32
    reserved: U32


def interrupt_table(code: int, spurious: int, handlers: dict[int, int]) -> bytes:
    """A 64-bit IDT of interrupt gates (SDM volume 3, figure 6-8).

    Args:
        code: guest physical address of the code.
        spurious: offset of the handler of all external interrupts that have none.
        handlers: offset by vector.
    """
    table = bytearray()
    for vector in range(256):
        handler = code + handlers.get(vector, spurious)
        low = handler & 0xFFFF | CODE_SELECTOR << 16 | INTERRUPT_GATE << 40 | (handler >> 16 & 0xFFFF) << 48
        gate = low.to_bytes(8, "little") + (handler >> 32).to_bytes(8, "little")
        table += gate if vector >= EXTERNAL else bytes(GATE_SIZE)
    return bytes(table)
