"""Capture files: a writer and a reader of pcapng with Ethernet frames, as Wireshark, tcpdump and tshark take them.

Only what a capture of one interface needs is written: a section header, an interface description with
nanosecond timestamps, enhanced packet blocks. The reader also takes both byte orders, several interfaces, other
resolutions, simple packet blocks, and skips all other blocks.

Source: IETF draft-ietf-opsawg-pcapng (block types, options).
"""

import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from typing import BinaryIO, Final, NamedTuple

from vmbus.errors import DeviceError

__all__ = ["Capture", "PcapngReader", "PcapngWriter"]

SECTION_HEADER: Final = 0x0A0D0D0A
INTERFACE_DESCRIPTION: Final = 1
SIMPLE_PACKET: Final = 3
ENHANCED_PACKET: Final = 6
BYTE_ORDER_MAGIC: Final = 0x1A2B3C4D
LINK_TYPE_ETHERNET: Final = 1
OPTION_END: Final = 0
OPTION_NAME: Final = 2
OPTION_RESOLUTION: Final = 9
MAX_BLOCK: Final = 16 << 20
SHORTEST: Final = 12
"""Bytes of a block without a body: type, and the length twice."""
SHORTEST_BODY: Final = {SECTION_HEADER: 16, INTERFACE_DESCRIPTION: 8, SIMPLE_PACKET: 4, ENHANCED_PACKET: 20}
"""Bytes of the fixed part of the blocks that are read."""


class Capture(NamedTuple):
    """A captured frame; `timestamp` in nanoseconds since 1970, 0 in simple packet blocks."""

    timestamp: int
    frame: bytes
    interface: int = 0


class PcapngWriter:
    """Writes frames to a pcapng file; use it as the receiver of a mirror port.

    Calls may come from several threads.
    """

    def __init__(
        self,
        path: str | PathLike[str] | BinaryIO,
        *,
        interface: str = "vmbus",
        clock: Callable[[], int] = time.time_ns,
        snap_length: int = 0,
    ) -> None:
        """`clock` gives nanoseconds since 1970; longer frames than `snap_length` (if not 0) are cut."""
        self._owned = isinstance(path, str | PathLike)
        self._file: BinaryIO = open(path, "wb") if isinstance(path, str | PathLike) else path  # noqa: SIM115
        self._clock = clock
        self._snap = snap_length
        self._lock = threading.Lock()
        header = struct.pack("<IHHq", BYTE_ORDER_MAGIC, 1, 0, -1)
        options = _option(OPTION_NAME, interface.encode()) + _option(OPTION_RESOLUTION, b"\x09")
        description = (
            struct.pack("<HHI", LINK_TYPE_ETHERNET, 0, snap_length) + options + _option(OPTION_END, b"")
        )
        self._file.write(_block(SECTION_HEADER, header) + _block(INTERFACE_DESCRIPTION, description))

    def __call__(self, frames: Sequence[bytes], /) -> None:
        """Append frames, all with the time of now."""
        now = self._clock()
        blocks = []
        for frame in frames:
            kept = frame[: self._snap] if self._snap else frame
            head = struct.pack("<IIIII", 0, now >> 32, now & 0xFFFFFFFF, len(kept), len(frame))
            blocks.append(_block(ENHANCED_PACKET, head + kept + bytes(-len(kept) % 4)))
        with self._lock:
            self._file.write(b"".join(blocks))

    def close(self) -> None:
        """Write everything out; closes the file if it was given by name."""
        with self._lock:
            if self._owned:
                self._file.close()
            else:
                self._file.flush()

    def __enter__(self) -> "PcapngWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)


def _block(kind: int, body: bytes) -> bytes:
    length = len(body) + 12
    return struct.pack("<II", kind, length) + body + struct.pack("<I", length)


class PcapngReader:
    """Iterates over the frames of a pcapng file."""

    def __init__(self, path: str | PathLike[str] | BinaryIO) -> None:
        """Open by name or take an open file."""
        self._owned = isinstance(path, str | PathLike)
        self._file: BinaryIO = open(path, "rb") if isinstance(path, str | PathLike) else path  # noqa: SIM115
        self._order = "<"
        self._units: list[int] = []

    def __iter__(self) -> Iterator[Capture]:
        """All frames in order.

        Raises:
            DeviceError: the file is no pcapng or is damaged.
        """
        first = True
        while head := self._file.read(8):
            kind = self._next_kind(head, first)
            first = False
            (length,) = struct.unpack_from(self._order + "I", head, 4)
            if not SHORTEST + SHORTEST_BODY.get(kind, 0) <= length <= MAX_BLOCK or length % 4:
                raise DeviceError(f"pcapng block of type {kind} with {length} bytes")
            already = self._magic if kind == SECTION_HEADER else b""
            body = already + self._file.read(length - SHORTEST - len(already))
            tail = self._file.read(4)
            if len(body) != length - SHORTEST or len(tail) != 4 or tail != head[4:]:
                raise DeviceError("truncated or damaged pcapng block")
            capture = self._parse(kind, body)
            if capture is not None:
                yield capture

    def _next_kind(self, head: bytes, first: bool) -> int:
        if len(head) != 8:
            raise DeviceError("truncated pcapng block")
        if head[:4] == SECTION_HEADER.to_bytes(4, "little"):
            self._magic = self._file.read(4)
            if self._magic == BYTE_ORDER_MAGIC.to_bytes(4, "little"):
                self._order = "<"
            elif self._magic == BYTE_ORDER_MAGIC.to_bytes(4, "big"):
                self._order = ">"
            else:
                raise DeviceError("pcapng section without byte-order magic")
            self._units = []
            return SECTION_HEADER
        if first:
            raise DeviceError("not a pcapng file")
        kind: int = struct.unpack_from(self._order + "I", head)[0]
        return kind

    def _parse(self, kind: int, body: bytes) -> Capture | None:
        if kind == INTERFACE_DESCRIPTION:
            self._units.append(self._resolution(body[8:]))
        elif kind == ENHANCED_PACKET:
            interface, high, low, kept, _ = struct.unpack_from(self._order + "5I", body)
            if interface >= len(self._units) or kept > len(body) - 20:
                raise DeviceError("pcapng packet of an unknown interface, or longer than its block")
            units = self._units[interface]
            return Capture((high << 32 | low) * 1_000_000_000 // units, body[20 : 20 + kept], interface)
        elif kind == SIMPLE_PACKET:
            (length,) = struct.unpack_from(self._order + "I", body)
            return Capture(0, body[4 : 4 + min(length, len(body) - 4)])
        return None

    def _resolution(self, options: bytes) -> int:
        """Time units in a second: a power of ten, or of two if bit 7 is set; microseconds if not said."""
        at = 0
        while len(options) - at >= 4:
            code, length = struct.unpack_from(self._order + "HH", options, at)
            if code == OPTION_END:
                break
            if code == OPTION_RESOLUTION and length == 1 and len(options) - at >= 5:
                value = options[at + 4]
                return 1 << (value & 0x7F) if value & 0x80 else 10 ** min(value, 18)
            at += 4 + (length + 3 & ~3)
        return 1_000_000

    def close(self) -> None:
        """Close the file if it was given by name."""
        if self._owned:
            self._file.close()

    def __enter__(self) -> "PcapngReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
