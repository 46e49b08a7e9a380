"""The content of a new VHDX file."""

import errno
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import UUID, uuid4

import numpy as np

from vmbus.storage.disk import DiskError
from vmbus.storage.images.blocks import ImageDisk
from vmbus.storage.images.parents import windows_relative
from vmbus.storage.images.vhdx_wire import (
    BAT_REGION,
    FILE_PARAMETERS,
    FILE_SIGNATURE,
    HEADER_OFFSETS,
    LOGICAL_SECTOR_SIZE,
    MAX_SIZE,
    METADATA_REGION,
    METADATA_TABLE_SIZE,
    MIB,
    NO_GUID,
    PAGE83,
    PARENT_LOCATOR,
    PARENT_LOCATOR_VHDX,
    PHYSICAL_SECTOR_SIZE,
    REGION_TABLE_OFFSETS,
    REGION_TABLE_SIZE,
    VIRTUAL_DISK_SIZE,
    BatState,
    FileParameters,
    Header,
    MetadataEntry,
    MetadataFlags,
    MetadataTableHeader,
    ParameterFlags,
    ParentLocatorEntry,
    ParentLocatorHeader,
    RegionEntry,
    RegionTableHeader,
    chunk_ratio,
    table_entries,
    with_checksum,
)

__all__ = ["VhdxLayout", "write_vhdx"]


@dataclass(frozen=True)
class VhdxLayout:
    """What a new VHDX shall be; see `create_vhdx`.

    Raises:
        DiskError: a value is not possible.
    """

    path: Path
    size: int
    fixed: bool
    block_size: int
    sector_size: int
    physical_sector_size: int
    unique_id: UUID
    log_size: int
    parent: ImageDisk | None

    def __post_init__(self) -> None:
        def refuse(what: str) -> DiskError:
            return DiskError(f"{self.path}: {what} is not possible in a VHDX", errno.EINVAL)

        if self.sector_size not in (512, 4096):
            raise refuse(f"a sector size of {self.sector_size} bytes")
        if self.physical_sector_size not in (512, 4096):
            raise refuse(f"a physical sector size of {self.physical_sector_size} bytes")
        if not 0 < self.size <= MAX_SIZE or self.size % self.sector_size:
            raise refuse(f"a disk of {self.size} bytes")
        if self.block_size & (self.block_size - 1) or not MIB <= self.block_size <= 256 * MIB:
            raise refuse(f"a block size of {self.block_size} bytes")
        if not MIB <= self.log_size <= 256 * MIB or self.log_size % MIB:
            raise refuse(f"a log of {self.log_size} bytes")

    @property
    def entries(self) -> int:
        """Entries of the block allocation table."""
        return table_entries(
            self.size, self.block_size, self.sector_size, differencing=self.parent is not None
        )


def write_vhdx(file: BinaryIO, layout: VhdxLayout, *, preallocate: bool) -> None:
    """Write a new VHDX; the identifier at the start comes last, so that half a file is no image."""
    log_offset = MIB
    metadata_offset = log_offset + layout.log_size
    bat_offset = metadata_offset + MIB
    bat_length = -(-8 * layout.entries // MIB) * MIB
    payload = bat_offset + bat_length
    blocks = -(-layout.size // layout.block_size)
    end = payload + blocks * layout.block_size if layout.fixed else payload
    os.ftruncate(file.fileno(), end)
    # The log and the tables always have their space: a full host disk cannot tear a commit apart.
    os.posix_fallocate(file.fileno(), 0, min(payload, bat_offset + 16 * MIB))
    if preallocate and layout.fixed:
        os.posix_fallocate(file.fileno(), payload, end - payload)

    regions = [(BAT_REGION, bat_offset, bat_length), (METADATA_REGION, metadata_offset, MIB)]
    table = RegionTableHeader(RegionTableHeader.SIGNATURE, 0, len(regions), 0).pack()
    table += b"".join(RegionEntry(guid, offset, length, 1).pack() for guid, offset, length in regions)
    for offset in REGION_TABLE_OFFSETS:
        _put(file, offset, with_checksum(table.ljust(REGION_TABLE_SIZE, b"\0")))

    write_guid, data_guid = uuid4(), uuid4()
    for number, offset in enumerate(HEADER_OFFSETS):
        header = Header(
            Header.SIGNATURE,
            0,
            number + 1,
            write_guid,
            data_guid,
            NO_GUID,
            0,
            1,
            layout.log_size,
            log_offset,
        )
        _put(file, offset, with_checksum(header.pack().ljust(Header.AREA, b"\0")))
    _put(file, metadata_offset, _metadata(layout))
    if layout.fixed:
        ratio = chunk_ratio(layout.block_size, layout.sector_size)
        numbers = np.arange(blocks, dtype=np.uint64)
        bat = np.zeros(layout.entries, dtype="<u8")
        places = numbers + numbers // np.uint64(ratio)
        bat[places] = (numbers * np.uint64(layout.block_size) + np.uint64(payload)) | np.uint64(
            BatState.FULLY_PRESENT
        )
        _put(file, bat_offset, bat.tobytes())
    file.flush()
    os.fsync(file.fileno())
    _put(file, 0, FILE_SIGNATURE + "vmbus".encode("utf-16-le"))


def _put(file: BinaryIO, offset: int, data: bytes) -> None:
    file.seek(offset)
    file.write(data)


def _metadata(layout: VhdxLayout) -> bytes:
    flags = (ParameterFlags.LEAVE_BLOCKS_ALLOCATED if layout.fixed else 0) | (
        ParameterFlags.HAS_PARENT if layout.parent is not None else 0
    )
    disk, required = MetadataFlags.IS_VIRTUAL_DISK, MetadataFlags.IS_REQUIRED
    items = [
        (FILE_PARAMETERS, required, FileParameters(layout.block_size, flags).pack()),
        (VIRTUAL_DISK_SIZE, required | disk, struct.pack("<Q", layout.size)),
        (PAGE83, required | disk, layout.unique_id.bytes_le),
        (LOGICAL_SECTOR_SIZE, required | disk, struct.pack("<I", layout.sector_size)),
        (PHYSICAL_SECTOR_SIZE, required | disk, struct.pack("<I", layout.physical_sector_size)),
    ]
    if layout.parent is not None:
        items.append((PARENT_LOCATOR, required, _parent_locator(layout.path, layout.parent)))
    table = MetadataTableHeader(MetadataTableHeader.SIGNATURE, 0, len(items)).pack()
    content, offset = b"", METADATA_TABLE_SIZE
    for item_id, item_flags, data in items:
        table += MetadataEntry(item_id, offset + len(content), len(data), item_flags, 0).pack()
        content += data
    return table.ljust(METADATA_TABLE_SIZE, b"\0") + content


def _parent_locator(path: Path, parent: ImageDisk) -> bytes:
    from vmbus.storage.images.vhdx import Vhdx

    assert isinstance(parent, Vhdx)
    pairs = {
        "parent_linkage": f"{{{parent.data_write_guid}}}",
        "relative_path": windows_relative(path, parent.path),
        "absolute_win32_path": str(parent.path.resolve()),
    }
    table = ParentLocatorHeader(PARENT_LOCATOR_VHDX, 0, len(pairs)).pack()
    at = len(table) + ParentLocatorEntry.SIZE * len(pairs)
    text = b""
    for key, value in pairs.items():
        raw_key, raw_value = key.encode("utf-16-le"), value.encode("utf-16-le")
        table += ParentLocatorEntry(
            at + len(text), at + len(text) + len(raw_key), len(raw_key), len(raw_value)
        ).pack()
        text += raw_key + raw_value
    return table + text
