"""GPADLs as control messages: cut into a header and bodies by the guest, put together again by the host.

A GPADL is a list of GPA ranges. On the wire each range is one 64-bit value (length in the lower half, byte
offset within its first page in the upper one) and then its page numbers, 64 bits each.
"""

import struct
from dataclasses import dataclass, field
from enum import Enum

from vmbus.bus.codec import encode
from vmbus.bus.transitions import GpadlState
from vmbus.bus.wire import GPADL_BODY_VALUES, GPADL_HEADER_VALUES, GpadlBody, GpadlHeader
from vmbus.errors import LocalProtocolError, RemoteProtocolError

__all__ = ["MAX_GPADL_BYTES", "GpadlPhase", "HostGpadl", "check_ranges", "cut", "ring_pages"]

PAGE_SIZE = 4096
MAX_GPADL_BYTES = 0xFFF8
"""A GPADL's length field has 16 bits: one range of at most 8190 pages, almost 32 MiB."""


def check_ranges(data: bytes, count: int) -> int:
    """Check the structure of `count` GPA ranges; the number of bytes that they take of `data`.

    Raises:
        RemoteProtocolError: no ranges, an offset beyond a page, an empty range, or too few page numbers.
    """
    if count == 0:
        raise RemoteProtocolError("a GPADL without ranges")
    at = 0
    for _ in range(count):
        if at + 8 > len(data):
            raise RemoteProtocolError(f"a GPADL of {len(data)} bytes ends before range header {count}")
        length, offset = struct.unpack_from("<II", data, at)
        if offset >= PAGE_SIZE:
            raise RemoteProtocolError(f"a GPA range that starts {offset} bytes into its first page")
        if length == 0:
            raise RemoteProtocolError("an empty GPA range")
        at += 8 + 8 * -(-(offset + length) // PAGE_SIZE)
        if at > len(data):
            raise RemoteProtocolError(f"a GPA range of {length} bytes has too few page numbers")
    return at


def ring_pages(data: bytes) -> int:
    """The pages of a GPADL that can hold rings: one range of whole pages; else 0."""
    length, offset = struct.unpack_from("<II", data)
    pages = (len(data) - 8) // 8
    return pages if offset == 0 and length == pages * PAGE_SIZE else 0


def cut(channel_id: int, gpadl_id: int, packed: bytes, count: int) -> list[bytes]:
    """The payloads of the GPADL_HEADER and GPADL_BODY messages that describe packed ranges
    (`GpaRanges.pack`).

    Raises:
        LocalProtocolError: more than `MAX_GPADL_BYTES` bytes of ranges.
    """
    if len(packed) > MAX_GPADL_BYTES:
        raise LocalProtocolError(f"GPA ranges of {len(packed)} bytes; a GPADL takes {MAX_GPADL_BYTES}")
    first = packed[: 8 * GPADL_HEADER_VALUES]
    messages = [encode(GpadlHeader(channel_id, gpadl_id, len(packed), count), first)]
    step = 8 * GPADL_BODY_VALUES
    for number, at in enumerate(range(len(first), len(packed), step)):
        messages.append(encode(GpadlBody(number, gpadl_id), packed[at : at + step]))
    return messages


class GpadlPhase(Enum):
    """How far the host is with a GPADL; refines `GpadlState` by who has to act next."""

    COLLECTING = "collecting"
    """The guest owes bodies."""
    MAPPING = "mapping"
    """The device's side has been asked to map it."""
    MAPPED = "mapped"
    UNUSED = "unused"
    """Known to the guest, but nobody here uses it: its channel was rescinded."""


@dataclass(slots=True, eq=False)
class HostGpadl:
    """A GPADL at the host.

    Attributes:
        gpadl_id: the guest's name of it.
        offer_id: whose channel it was made for.
        serial: the host's own number, never used again, so that a late completion meets no successor.
        count: number of ranges.
        length: bytes of ranges announced.
        data: bytes of ranges received.
        state: as messages tell.
        phase: as the device's side tells.
    """

    gpadl_id: int
    offer_id: int
    serial: int
    count: int
    length: int
    data: bytearray = field(default_factory=bytearray)
    state: GpadlState = GpadlState.BUILDING
    phase: GpadlPhase = GpadlPhase.COLLECTING

    @property
    def is_used(self) -> bool:
        """Whether the device's side uses the memory, or is about to."""
        return self.phase in (GpadlPhase.MAPPING, GpadlPhase.MAPPED)

    def append(self, tail: bytes) -> bool:
        """Take the values of a message; whether all are here now.

        Some guests (UEFI) always send messages of full length, so what exceeds the announced length is cut
        off.

        Raises:
            RemoteProtocolError: a message without values, or the ranges are malformed.
        """
        usable = min(len(tail) & ~7, self.length - len(self.data))
        if usable == 0:
            raise RemoteProtocolError(f"a part of GPADL {self.gpadl_id:#x} brings no page numbers")
        self.data += tail[:usable]
        if len(self.data) < self.length:
            return False
        del self.data[check_ranges(bytes(self.data), self.count) :]
        return True
