"""Writes the simplest ISO 9660 image (ECMA-119, interchange level 1) of a few files in its root directory."""

import struct
from collections.abc import Mapping

SECTOR = 2048
DATE = bytes([124, 1, 1, 0, 0, 0, 0])
"""2024-01-01, as directory records have it (ECMA-119 9.1.5)."""
LONG_DATE = b"2024010100000000\0"


def both(value: int, size: int = 4) -> bytes:
    """A number in both byte orders."""
    return value.to_bytes(size, "little") + value.to_bytes(size, "big")


def record(name: bytes, sector: int, length: int, flags: int = 0) -> bytes:
    """A directory record (ECMA-119 9.1)."""
    body = struct.pack(
        "<B8s8s7sBBB4sB", 0, both(sector), both(length), DATE, flags, 0, 0, both(1, 2), len(name)
    )
    body += name + (b"" if len(name) % 2 else b"\0")
    return bytes([len(body) + 1]) + body


def iso_image(files: Mapping[str, bytes], label: str = "VMBUS") -> bytes:
    """An image with `files`: names such as ``README.TXT``; Linux shows them in lower case."""
    root, tables, first = 20, (18, 19), 21
    place, records = first, b""
    for name, data in sorted(files.items()):
        records += record(name.encode() + b";1", place, len(data))
        place += -(-len(data) // SECTOR)
    directory = record(b"\0", root, SECTOR, 2) + record(b"\1", root, SECTOR, 2) + records
    assert len(directory) <= SECTOR
    text = lambda value, size: value.encode().ljust(size)  # noqa: E731
    descriptor = b"".join(
        (
            *(b"\1CD001\1\0", text("", 32), text(label, 32), bytes(8), both(place), bytes(32)),
            *(both(1, 2), both(1, 2), both(SECTOR, 2), both(10)),
            *(struct.pack("<II", tables[0], 0), struct.pack(">II", tables[1], 0)),
            *(record(b"\0", root, SECTOR, 2), text("", 128 * 4 + 37 * 3)),
            *(LONG_DATE, LONG_DATE, b"0" * 16 + b"\0", LONG_DATE, b"\1"),
        )
    )
    parts = [
        bytes(16 * SECTOR),
        descriptor.ljust(SECTOR, b"\0"),
        b"\xffCD001\1".ljust(SECTOR, b"\0"),
        struct.pack("<BBIHBB", 1, 0, root, 1, 0, 0).ljust(SECTOR, b"\0"),
        struct.pack(">BBIHBB", 1, 0, root, 1, 0, 0).ljust(SECTOR, b"\0"),
        bytes(0),
    ]
    image = b"".join(parts)
    assert len(image) == root * SECTOR
    image += directory.ljust(SECTOR, b"\0")
    for _, data in sorted(files.items()):
        image += data.ljust(-(-len(data) // SECTOR) * SECTOR, b"\0")
    return image
