"""Writing VHD images the slow and obvious way, straight from the specification's tables.

Shares no code with the package. Makes what other writers leave: blocks of which a few sectors were written, parent
locators of every kind, tables of their own between the standard ones.
"""

import random
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

SECTOR = 512
UNUSED = 0xFFFFFFFF


def _sum(raw: bytes, at: int) -> bytes:
    blank = raw[:at] + bytes(4) + raw[at + 4 :]
    return raw[:at] + struct.pack(">I", ~sum(blank) & 0xFFFFFFFF) + raw[at + 4 :]


def _padded(raw: bytes, fill: bytes = b"\0") -> bytes:
    return raw + fill * (-len(raw) % SECTOR)


def footer(size: int, disk_type: int, unique_id: bytes = b"\x11" * 16) -> bytes:
    """The footer: type 2 is fixed, 3 dynamic, 4 differencing."""
    offset = (1 << 64) - 1 if disk_type == 2 else SECTOR
    head = struct.pack(
        ">8sIIQI4sI4sQQ", b"conectix", 2, 0x10000, offset, 0, b"tst\0", 0x10000, b"Wi2k", size, size
    )
    rest = struct.pack(">HBBII16s", 65535, 16, 255, disk_type, 0, unique_id)
    return _sum((head + rest).ljust(SECTOR, b"\0"), 64)


def bitmap_bytes(block_size: int) -> int:
    return -(-block_size // SECTOR // 8 // SECTOR) * SECTOR


def write_vhd(
    path: Path,
    size: int,
    block_size: int,
    blocks: Mapping[int, tuple[bytes, bytes]],
    *,
    unique_id: bytes = b"\x11" * 16,
    parent_id: bytes = b"",
    parent_name: str = "",
    locators: Sequence[tuple[bytes, bytes]] = (),
    batmap: bool = False,
) -> None:
    """Make an image; with a `parent_id` it is a differencing one.

    Args:
        blocks: by number the sector bitmap and the data, each padded with zeros.
        locators: platform code and content of each parent locator.
        batmap: XenServer's table behind the block table: a bit for each block, set where all its sectors are there.
    """
    entries = -(-size // block_size)
    table_bytes = -(-4 * entries // SECTOR) * SECTOR
    between, places = b"", b""
    if batmap:
        bits = bytearray(-(-entries // 8))
        for number, (present, _) in blocks.items():
            if present == b"\xff" * (block_size // SECTOR // 8):
                bits[number // 8] |= 0x80 >> number % 8
        at = 1536 + table_bytes + SECTOR
        head = struct.pack(
            ">8sQIII", b"tdbatmap", at, -(-len(bits) // SECTOR), 0x10002, ~sum(bits) & 0xFFFFFFFF
        )
        between = _padded(head) + _padded(bytes(bits))
    for platform, content in locators:
        at = 1536 + table_bytes + len(between)
        places += struct.pack(">4sIIIQ", platform, len(_padded(content)), len(content), 0, at)
        between += _padded(content)
    table, body = [UNUSED] * entries, b""
    for number, (present, data) in blocks.items():
        table[number] = (1536 + table_bytes + len(between) + len(body)) // SECTOR
        body += present.ljust(bitmap_bytes(block_size), b"\0") + data.ljust(block_size, b"\0")
    end = footer(size, 4 if parent_id else 3, unique_id)
    head = struct.pack(">8sQQIII", b"cxsparse", (1 << 64) - 1, 1536, 0x10000, entries, block_size)
    head += (
        bytes(4) + parent_id.ljust(16, b"\0") + bytes(8) + parent_name.encode("utf-16-be").ljust(512, b"\0")
    )
    head = _sum((head + places).ljust(1024, b"\0"), 36)
    packed = _padded(b"".join(struct.pack(">I", entry) for entry in table), b"\xff")
    path.write_bytes(end + head + packed + between + body + end)


def scattered(seed: int, size: int, block_size: int) -> dict[int, tuple[bytes, bytes]]:
    """Blocks as other writers leave them: some absent, some whole, most with a few sectors. Garbage in all others."""
    rnd = random.Random(seed)
    blocks = {}
    for number in range(-(-size // block_size)):
        bits = block_size // SECTOR
        kind = rnd.randrange(4)
        if kind == 0:
            continue
        if kind == 1:
            present = b"\xff" * (bits // 8)
        else:
            first, last = sorted((rnd.randrange(bits), rnd.randrange(bits)))
            flags = [first <= bit <= last or rnd.random() < 0.1 for bit in range(bits)]
            present = bytes(sum(0x80 >> i for i in range(8) if flags[at + i]) for at in range(0, bits, 8))
        blocks[number] = present, rnd.randbytes(block_size).replace(b"\0", b"\1")
    return blocks
