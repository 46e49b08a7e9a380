"""The structures of a VHD file (Virtual Hard Disk Image Format Specification, version 1.0). All are big-endian."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from enum import IntEnum
from typing import Annotated, TypeVar
from urllib.parse import unquote
from uuid import UUID

from vmbus.wire import U8, U16, U32, U64, Fixed, Guid, Structure, wire

__all__ = [
    "DISK_TYPES",
    "NO_OFFSET",
    "SECTOR",
    "UNUSED",
    "BatmapHeader",
    "DiskType",
    "DynamicHeader",
    "Footer",
    "ParentLocator",
    "Platform",
    "checksum",
    "file_url_paths",
    "geometry",
    "new_footer",
    "sealed",
    "timestamp",
]

SECTOR = 512
UNUSED = 0xFFFFFFFF
"""The table entry of a block that is not in the file."""
NO_OFFSET = (1 << 64) - 1
FORMAT_VERSION = 0x00010000
EPOCH = 946684800
"""Time stamps count seconds from 2000-01-01 00:00 UTC."""
MAX_SIZE = 2040 << 30
"""The largest dynamic or differencing disk, bytes: the block table counts the file's sectors in 32 bits."""
MAX_FIXED_SIZE = 64 << 40
"""The largest fixed disk, bytes: that of VHDX. A fixed image has no table; Azure's have up to 32 TiB."""


class DiskType(IntEnum):
    """The footer's disk type."""

    FIXED = 2
    DYNAMIC = 3
    DIFFERENCING = 4


DISK_TYPES = {DiskType.FIXED: "fixed", DiskType.DYNAMIC: "dynamic", DiskType.DIFFERENCING: "differencing"}


class Platform(IntEnum):
    """Parent locator platform codes."""

    W2RU = 0x57327275  # relative path, UTF-16LE
    W2KU = 0x57326B75  # absolute path, UTF-16LE
    MACX = 0x4D616358  # file URL, UTF-8


@wire(
    size=512, byte_order=">", offsets={"current_size": 48, "disk_type": 60, "checksum": 64, "unique_id": 68}
)
class Footer(Structure):
    """The last 512 bytes of every VHD; a copy is at offset 0 of all but fixed ones."""

    cookie: Annotated[bytes, Fixed(8)]
    features: U32
    format_version: U32
    data_offset: U64
    timestamp: U32
    creator_application: Annotated[bytes, Fixed(4)]
    creator_version: U32
    creator_os: Annotated[bytes, Fixed(4)]
    original_size: U64
    current_size: U64
    cylinders: U16
    heads: U8
    sectors_per_track: U8
    disk_type: U32
    checksum: U32
    unique_id: Guid
    saved_state: U8
    reserved: Annotated[bytes, Fixed(427)] = b""

    COOKIE = b"conectix"


@wire(size=24, byte_order=">")
class ParentLocator(Structure):
    """One of the eight ways in which a differencing image names its parent."""

    platform: U32
    data_space: U32
    data_length: U32
    reserved: U32
    data_offset: U64


@wire(
    size=1024,
    byte_order=">",
    offsets={"checksum": 36, "parent_unique_id": 40, "parent_name": 64, "locator0": 576},
)
class DynamicHeader(Structure):
    """Describes the block allocation table, and the parent of a differencing image."""

    cookie: Annotated[bytes, Fixed(8)]
    data_offset: U64
    table_offset: U64
    header_version: U32
    max_table_entries: U32
    block_size: U32
    checksum: U32
    parent_unique_id: Guid
    parent_timestamp: U32
    reserved1: U32
    parent_name: Annotated[bytes, Fixed(512)]
    locator0: ParentLocator
    locator1: ParentLocator
    locator2: ParentLocator
    locator3: ParentLocator
    locator4: ParentLocator
    locator5: ParentLocator
    locator6: ParentLocator
    locator7: ParentLocator
    reserved2: Annotated[bytes, Fixed(256)] = b""

    COOKIE = b"cxsparse"

    def locators(self) -> list[ParentLocator]:
        """All eight, used or not."""
        return [getattr(self, f"locator{i}") for i in range(8)]


@wire(size=24, byte_order=">")
class BatmapHeader(Structure):
    """What XenServer's tools put behind the block table: a map with a bit for each block that is whole.

    Not in the specification (``vhd.h`` of blktap has it). Its bits stay true whatever we write: a block never loses a
    sector, and new ones are whole.
    """

    cookie: Annotated[bytes, Fixed(8)]
    data_offset: U64
    sectors: U32
    version: U32

    COOKIE = b"tdbatmap"


S = TypeVar("S", Footer, DynamicHeader)


def checksum(structure: Footer | DynamicHeader) -> int:
    """The one's complement of the sum of all bytes, the checksum field taken as zero."""
    return ~sum(replace(structure, checksum=0).pack()) & 0xFFFFFFFF


def sealed(structure: S) -> S:
    """The structure with the right checksum."""
    return replace(structure, checksum=checksum(structure))


def file_url_paths(url: str) -> Iterator[str]:
    """The paths that a `Platform.MACX` locator may mean, the likeliest first.

    It is a file URL (RFC 8089, then RFC 2396), percent-encoded: ``file:///path``, ``file://localhost/path``, or
    ``file://./path`` for one relative to the image. Writers that left characters unescaped, or wrote a plain path, are
    understood as well.
    """
    match = re.fullmatch(r"file:(?://([^/]*))?(.*)", url, re.IGNORECASE | re.DOTALL)
    if match is None:
        yield url
        return
    host, path = match[1] or "", match[2]
    if host in (".", ".."):
        path = host + path
    elif host.lower() not in ("", "localhost", "127.0.0.1"):
        path = path.rpartition("/")[2]  # on another machine: perhaps a copy is beside the image
    yield unquote(path, errors="replace")
    if "%" in path:
        yield path


def timestamp(now: float | None = None) -> int:
    """A VHD time stamp of a Unix time, by default now."""
    return max(0, int(time.time() if now is None else now) - EPOCH) & 0xFFFFFFFF


def geometry(sectors: int) -> tuple[int, int, int]:
    """Cylinders, heads and sectors per track for a disk (the specification's appendix "CHS calculation")."""
    sectors = min(sectors, 65535 * 16 * 255)
    if sectors >= 65535 * 16 * 63:
        return sectors // (255 * 16), 16, 255
    per_track, heads = 17, max((sectors // 17 + 1023) // 1024, 4)
    tracks = sectors // per_track
    if tracks >= heads * 1024 or heads > 16:
        per_track, heads = 31, 16
        tracks = sectors // per_track
    if tracks >= heads * 1024:
        per_track, heads = 63, 16
        tracks = sectors // per_track
    return tracks // heads, heads, per_track


def new_footer(size: int, disk_type: DiskType, unique_id: UUID) -> Footer:
    """The footer of a new image.

    The creator is Hyper-V's own (``"win "``, 6.1): readers that otherwise derive the disk's size from the geometry
    take the exact size for images of this creator, QEMU among them.
    """
    cylinders, heads, per_track = geometry(size // SECTOR)
    return sealed(
        Footer(
            cookie=Footer.COOKIE,
            features=2,  # "reserved", always set
            format_version=FORMAT_VERSION,
            data_offset=NO_OFFSET if disk_type == DiskType.FIXED else SECTOR,
            timestamp=timestamp(),
            creator_application=b"win ",
            creator_version=0x00060001,
            creator_os=b"Wi2k",
            original_size=size,
            current_size=size,
            cylinders=cylinders,
            heads=heads,
            sectors_per_track=per_track,
            disk_type=disk_type,
            checksum=0,
            unique_id=unique_id,
            saved_state=0,
        )
    )
