"""Machine code that runs inside guests: the driver routines of the emulated path, and what they are told.

The assembler sources are beside the bytes; no assembler is needed to run them.
"""

from enum import IntEnum, IntFlag

from vmbus.wire import U8, U16, U32, U64, Structure, wire

__all__ = ["BAD_REQUEST", "FAILED", "TIMEOUT", "Flag", "Operation", "Request"]

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
