"""What travels on the hypercall socket between a child process and its parent.

One datagram a request, one a reply (``SOCK_SEQPACKET`` keeps their bounds). A request names a processor and what its
guest did; the reply carries the answer, or the exception that the processor raises in the guest. Requests with
`POSTED` set get no reply.
"""

from enum import IntEnum
from typing import Annotated, Final

from vmbus.wire import U8, U16, U32, U64, Fixed, Structure, wire

__all__ = ["MAX_DATAGRAM", "Answer", "Operation", "Reply", "Request"]

MAX_DATAGRAM: Final = 256
"""Bytes of the longest datagram; a longer one is a violation."""
POSTED: Final = 1


class Operation(IntEnum):
    """What the guest's processor did."""

    HYPERCALL = 1
    RDMSR = 2
    WRMSR = 3
    CPUID = 4
    IO_READ = 5
    IO_WRITE = 6
    MMIO_READ = 7
    MMIO_WRITE = 8
    POP_INTERRUPT = 9


class Answer(IntEnum):
    """How the request ended."""

    DONE = 0
    FAULT = 1
    """An exception of the guest; the first value is its vector."""
    SUSPENDED = 2
    """The processor waits for its parent to answer an intercept."""
    STALLED = 3
    """Its parent has suspended the processor: to be asked again."""


@wire(size=136, offsets={"a": 8, "xmm": 32, "reserved": 128})
class Request(Structure):
    """A request; the meaning of `a`, `b`, `c` and `size` follows from the operation's method of the processor."""

    operation: U8
    flags: U8
    vp_index: U16
    size: U32
    a: U64
    b: U64
    c: U64
    xmm: Annotated[bytes, Fixed(96)]
    reserved: U64


@wire(size=40, offsets={"a": 8})
class Reply(Structure):
    """A reply; `more` says that another interrupt may wait (POP_INTERRUPT). Register output follows it."""

    answer: U8
    more: U8
    reserved: U16
    output_size: U32
    a: U64
    b: U64
    c: U64
    d: U64
