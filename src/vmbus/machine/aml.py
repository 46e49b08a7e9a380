"""Writes ACPI Machine Language: just the terms that a machine description made of static data needs.

Every function returns the bytes of one term (ACPI 6.4, chapter 20); terms nest by concatenation.
Names are paths such as ``"\\\\_SB_"`` or ``"COM1"``, segments are padded to four characters.
"""

import struct
from collections.abc import Iterable

__all__ = [
    "buffer",
    "device",
    "dword_memory",
    "eisa_id",
    "end_tag",
    "integer",
    "interrupt",
    "io_ports",
    "name",
    "package",
    "path",
    "scope",
    "string",
    "word_range",
]

MEMORY_READ_WRITE = 1
PORTS = 1
BUS_NUMBERS = 2


def path(text: str) -> bytes:
    """A name string: an optional root character, then segments joined by dots.

    Raises:
        ValueError: a segment is empty or longer than four characters.
    """
    root = b"\\" if text.startswith("\\") else b""
    segments = [segment for segment in text.removeprefix("\\").split(".") if segment]
    if not segments or any(len(segment) > 4 for segment in segments):
        raise ValueError(f"{text!r} is not an ACPI path")
    encoded = b"".join(segment.ljust(4, "_").encode("ascii") for segment in segments)
    if len(segments) == 1:
        return root + encoded
    if len(segments) == 2:
        return root + b"\x2e" + encoded
    return root + b"\x2f" + bytes([len(segments)]) + encoded


def _sized(content: bytes) -> bytes:
    """A package length, which counts itself, and then `content`."""
    if len(content) + 1 < 0x40:
        return bytes([len(content) + 1]) + content
    for extra in (1, 2, 3):
        total = len(content) + 1 + extra
        if total < 1 << 4 + 8 * extra:
            return bytes([extra << 6 | total & 15]) + (total >> 4).to_bytes(extra, "little") + content
    raise ValueError(f"a term of {len(content)} bytes is too long")


def integer(value: int) -> bytes:
    """An integer constant in its shortest form."""
    if value in (0, 1):
        return bytes([value])
    for size, opcode in ((1, 0x0A), (2, 0x0B), (4, 0x0C), (8, 0x0E)):
        if value < 1 << 8 * size:
            return bytes([opcode]) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} has more than 64 bits")


def string(text: str) -> bytes:
    """A string constant."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """A compressed identifier such as ``PNP0501``: three letters of five bits, four hexadecimal digits."""
    letters = [ord(letter) - 0x40 for letter in text[:3]]
    value = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return b"\x0c" + value.to_bytes(4, "big")


def buffer(content: bytes) -> bytes:
    """A buffer with initial contents."""
    return b"\x11" + _sized(integer(len(content)) + content)


def package(*elements: bytes) -> bytes:
    """A package of terms."""
    return b"\x12" + _sized(bytes([len(elements)]) + b"".join(elements))


def name(text: str, value: bytes) -> bytes:
    """A named object."""
    return b"\x08" + path(text) + value


def scope(text: str, *terms: bytes) -> bytes:
    """Terms inside the scope of an existing name."""
    return b"\x10" + _sized(path(text) + b"".join(terms))


def device(text: str, *terms: bytes) -> bytes:
    """A device."""
    return b"\x5b\x82" + _sized(path(text) + b"".join(terms))


# Resource descriptors (ACPI 6.4, section 6.4): the contents of a _CRS buffer


def io_ports(first: int, count: int) -> bytes:
    """`count` fixed I/O ports, 16 address bits decoded."""
    return struct.pack("<BBHHBB", 0x47, 1, first, first, 1, count)


def interrupt(lines: Iterable[int], *, level: bool = False) -> bytes:
    """Global system interrupts, active high, edge triggered unless `level`; not shared."""
    numbers = list(lines)
    flags = 1 | (0 if level else 1 << 1)
    return struct.pack(f"<BHBB{len(numbers)}I", 0x89, 2 + 4 * len(numbers), flags, len(numbers), *numbers)


def dword_memory(first: int, length: int) -> bytes:
    """A fixed range of memory addresses below 4 GiB that the device passes on to what lies under it."""
    general = 1 << 2 | 1 << 3  # minimum and maximum fixed
    return struct.pack(
        "<BHBBBIIIII", 0x87, 23, 0, general, MEMORY_READ_WRITE, 0, first, first + length - 1, 0, length
    )


def word_range(kind: int, first: int, last: int) -> bytes:
    """A fixed range of bus numbers or ports (`BUS_NUMBERS`, `PORTS`) that a bridge passes on to what lies under it."""
    general = 1 << 2 | 1 << 3  # minimum and maximum fixed
    specific = 3 if kind == PORTS else 0  # the entire range
    return struct.pack("<BHBBBHHHHH", 0x88, 13, kind, general, specific, 0, first, last, 0, last - first + 1)


def end_tag() -> bytes:
    """Ends a list of resource descriptors; a checksum of 0 means none."""
    return b"\x79\0"
