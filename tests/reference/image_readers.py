"""Reading VHD and VHDX images the slow and obvious way, straight from the specifications' tables.

Shares no code with the package. Trusts the image: no checks, no log (images must be closed cleanly).
"""

import struct
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID


def read_vhd(chain: Sequence[Path]) -> bytes:
    """The whole disk of the first image; the others are its parents, nearest first."""
    raw = chain[0].read_bytes()
    footer = raw[-512:]
    assert footer[:8] == b"conectix"
    size, kind = struct.unpack_from(">Q", footer, 48)[0], struct.unpack_from(">I", footer, 60)[0]
    if kind == 2:
        return raw[:size]
    assert raw[:512] == footer
    header = raw[512 : 512 + 1024]
    assert header[:8] == b"cxsparse"
    (table,) = struct.unpack_from(">Q", header, 16)
    (block_size,) = struct.unpack_from(">I", header, 32)
    disk = bytearray(read_vhd(chain[1:]).ljust(size, b"\0")[:size] if kind == 4 else bytes(size))
    bitmap_bytes = (block_size // 512 // 8 + 511) // 512 * 512
    for sector in range(size // 512):
        block, inside = divmod(sector * 512, block_size)
        (entry,) = struct.unpack_from(">I", raw, table + 4 * block)
        if entry == 0xFFFFFFFF:
            continue
        number = inside // 512
        if raw[entry * 512 + number // 8] & (0x80 >> number % 8):
            at = entry * 512 + bitmap_bytes + inside
            disk[sector * 512 : sector * 512 + 512] = raw[at : at + 512]
    return bytes(disk)


def read_vhdx(chain: Sequence[Path]) -> bytes:
    """The whole disk of the first image; the others are its parents, nearest first."""
    raw = chain[0].read_bytes()
    assert raw[:8] == b"vhdxfile"
    headers = [raw[at : at + 4096] for at in (65536, 131072)]
    newest = max(headers, key=lambda header: struct.unpack_from("<Q", header, 8)[0])
    assert newest[48:64] == bytes(16), "the log is not empty"
    regions = {}
    for index in range(struct.unpack_from("<I", raw, 196608 + 8)[0]):
        at = 196608 + 16 + 32 * index
        regions[UUID(bytes_le=raw[at : at + 16])] = struct.unpack_from("<Q", raw, at + 16)[0]
    table = regions[UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")]
    metadata = regions[UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")]
    items = {}
    for index in range(struct.unpack_from("<H", raw, metadata + 10)[0]):
        at = metadata + 32 + 32 * index
        offset, length = struct.unpack_from("<II", raw, at + 16)
        items[UUID(bytes_le=raw[at : at + 16])] = raw[metadata + offset : metadata + offset + length]
    block_size, flags = struct.unpack("<II", items[UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")])
    (size,) = struct.unpack("<Q", items[UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")])
    (sector_size,) = struct.unpack("<I", items[UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")])
    ratio = (1 << 23) * sector_size // block_size
    disk = bytearray(read_vhdx(chain[1:]).ljust(size, b"\0")[:size] if flags & 2 else bytes(size))
    for sector in range(size // sector_size):
        block, inside = divmod(sector * sector_size, block_size)
        chunk, index = divmod(block, ratio)
        (entry,) = struct.unpack_from("<Q", raw, table + 8 * (chunk * (ratio + 1) + index))
        state, place = entry & 7, entry >> 20 << 20
        here = slice(sector * sector_size, (sector + 1) * sector_size)
        if state in (2, 3):
            disk[here] = bytes(sector_size)
        elif state == 7:
            (bitmap,) = struct.unpack_from("<Q", raw, table + 8 * (chunk * (ratio + 1) + ratio))
            bit = index * (block_size // sector_size) + inside // sector_size
            if not raw[(bitmap >> 20 << 20) + bit // 8] & 1 << bit % 8:
                continue
        if state in (6, 7):
            disk[here] = raw[place + inside : place + inside + sector_size]
    return bytes(disk)
