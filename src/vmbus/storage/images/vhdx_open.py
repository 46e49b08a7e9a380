"""Reading and checking what describes a VHDX file: headers, regions, metadata, the block allocation table."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from vmbus.storage.images.hostfile import HostFile, bad_image
from vmbus.storage.images.vhdx_wire import (
    BAT_REGION,
    FILE_PARAMETERS,
    HEADER_OFFSETS,
    LOGICAL_SECTOR_SIZE,
    MAX_METADATA_ITEMS,
    MAX_REGIONS,
    MAX_SIZE,
    METADATA_REGION,
    METADATA_TABLE_SIZE,
    MIB,
    PAGE,
    PAGE83,
    PARENT_LOCATOR,
    PARENT_LOCATOR_VHDX,
    PHYSICAL_SECTOR_SIZE,
    REGION_TABLE_OFFSETS,
    REGION_TABLE_SIZE,
    VIRTUAL_DISK_SIZE,
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
    checksum,
    table_entries,
)

__all__ = ["VhdxStructure", "read_header", "read_structure"]

_KNOWN_ITEMS = {
    FILE_PARAMETERS: 8,
    VIRTUAL_DISK_SIZE: 8,
    PAGE83: 16,
    LOGICAL_SECTOR_SIZE: 4,
    PHYSICAL_SECTOR_SIZE: 4,
    PARENT_LOCATOR: 0,
}
_MAX_PAIRS = 256
_LINKAGE_KEYS = ("parent_linkage", "parent_linkage2")
_PATH_KEYS = ("relative_path", "volume_path", "absolute_win32_path")
_LOCATOR_KEYS = (*_LINKAGE_KEYS, *_PATH_KEYS)


@dataclass(frozen=True)
class VhdxStructure:
    """What an open VHDX is.

    Attributes:
        size: the disk in bytes.
        regions: (offset, length) of everything in the file that is no block.
        bat: the block allocation table, native byte order.
        parent: keys and values of the parent locator, None without a parent.
        dirty_limit: pages of metadata that may be changed before a commit, so that they fit one log entry.
    """

    size: int
    block_size: int
    sector_size: int
    physical_sector_size: int
    identifier: UUID
    variant: str
    regions: list[tuple[int, int]]
    bat_offset: int
    bat: NDArray[np.uint64]
    parent: dict[str, str] | None
    dirty_limit: int

    @property
    def parent_linkage(self) -> set[UUID]:
        """The data write GUIDs that the parent may have."""
        found = set()
        for key in _LINKAGE_KEYS:
            try:
                found.add(UUID((self.parent or {}).get(key, "")))
            except ValueError:
                continue
        return found

    def parent_names(self) -> Iterator[str]:
        """Paths of the parent, in the order in which they are to be tried (2.6.2.6.3)."""
        for key in _PATH_KEYS:
            if self.parent is not None and key in self.parent:
                yield self.parent[key]


def read_header(host: HostFile) -> tuple[Header, int]:
    """The current header and which of the two it is.

    Raises:
        DiskError: neither is intact, or it says something impossible.
    """
    path, found = host.path, []
    if host.size < MIB:
        raise bad_image(path, f"the file is cut short: {host.size} bytes")
    for slot, offset in enumerate(HEADER_OFFSETS):
        raw = host.read(offset, Header.AREA)
        header = Header.unpack(raw)
        if header.signature == Header.SIGNATURE and header.checksum == checksum(raw):
            found.append((header.sequence_number, slot, header))
    if not found:
        raise bad_image(path, "neither of the two headers is intact")
    if len(found) == 2 and found[0][0] == found[1][0] and found[0][2] != found[1][2]:
        raise bad_image(path, "the two headers have the same sequence number")
    _, slot, header = max(found, key=lambda one: one[:2])
    if header.version != 1:
        raise bad_image(path, f"VHDX version {header.version} is not known")
    if header.log_version != 0 and header.log_guid.int:
        raise bad_image(path, f"log version {header.log_version} is not known")
    if (
        header.log_offset % MIB
        or header.log_length % MIB
        or header.log_length < MIB
        or header.log_offset < MIB
    ):
        raise bad_image(path, "the log's place is not aligned to 1 MiB")
    if header.log_offset + header.log_length > host.size:
        raise bad_image(path, f"the log at byte {header.log_offset} is not in the file")
    return header, slot


def read_structure(host: HostFile, header: Header) -> VhdxStructure:
    """Read and check everything but the content of the blocks.

    Raises:
        DiskError: something is damaged, missing, unsupported or impossible.
    """
    path = host.path
    regions = _regions(host)
    metadata_offset, metadata_length = regions[METADATA_REGION]
    bat_offset, bat_length = regions[BAT_REGION]
    items = _metadata_items(host, metadata_offset, metadata_length)
    parameters = FileParameters.unpack(items[FILE_PARAMETERS])
    (size,) = struct.unpack("<Q", items[VIRTUAL_DISK_SIZE])
    (sector_size,) = struct.unpack("<I", items[LOGICAL_SECTOR_SIZE])
    (physical_sector_size,) = struct.unpack("<I", items[PHYSICAL_SECTOR_SIZE])
    block_size = parameters.block_size
    if block_size & (block_size - 1) or not MIB <= block_size <= 256 * MIB:
        raise bad_image(path, f"a block size of {block_size} bytes is not possible")
    for each in (sector_size, physical_sector_size):
        if each not in (512, 4096):
            raise bad_image(path, f"a sector size of {each} bytes is not possible")
    if not 0 < size <= MAX_SIZE or size % sector_size:
        raise bad_image(path, f"a disk of {size} bytes is not possible in a VHDX")

    parent, variant = None, "dynamic"
    if _has_parent(items):
        if PARENT_LOCATOR not in items:
            raise bad_image(path, "it is a differencing image without a parent locator")
        parent, variant = _parent_locator(host, items[PARENT_LOCATOR]), "differencing"
    elif parameters.flags & ParameterFlags.LEAVE_BLOCKS_ALLOCATED:
        variant = "fixed"

    entries = table_entries(size, block_size, sector_size, differencing=parent is not None)
    if entries * 8 > bat_length:
        raise bad_image(path, f"the block table has {bat_length // 8} entries, {entries} are needed")
    capacity = header.log_length // 3 // PAGE
    # One request may touch two table pages and the bitmap pages of one block more before it looks at the limit.
    reserve = 4 + block_size // sector_size // 8 // PAGE
    return VhdxStructure(
        size=size,
        block_size=block_size,
        sector_size=sector_size,
        physical_sector_size=physical_sector_size,
        identifier=UUID(bytes_le=items[PAGE83]),
        variant=variant,
        regions=[(0, MIB), (header.log_offset, header.log_length), *regions.values()],
        bat_offset=bat_offset,
        bat=_read_table(host, bat_offset, entries),
        parent=parent,
        dirty_limit=capacity - 2 - capacity // 128 - reserve,
    )


def _read_table(host: HostFile, offset: int, entries: int) -> NDArray[np.uint64]:
    """The table; holes of the file cost neither time nor memory."""
    table = np.zeros(entries, dtype="<u8")
    view = table.view(np.uint8).data
    for at, length, has_data in host.data_runs(offset, entries * 8):
        if has_data:
            host.read_into(at, view[at - offset : at - offset + length])
    changed = () if host.overlay is None else host.overlay.pages_in(offset, offset + entries * 8)
    for page in changed:  # in the holes, too
        start, stop = max(page, offset), min(page + PAGE, offset + entries * 8)
        host.read_into(start, view[start - offset : stop - offset])
    return table.astype(np.uint64, copy=False)


def _regions(host: HostFile) -> dict[UUID, tuple[int, int]]:
    path = host.path
    for table_offset in REGION_TABLE_OFFSETS:
        raw = host.read(table_offset, REGION_TABLE_SIZE)
        table = RegionTableHeader.unpack(raw)
        if table.signature == RegionTableHeader.SIGNATURE and table.checksum == checksum(raw):
            break
    else:
        raise bad_image(path, "neither of the two region tables is intact")
    if table.entry_count > MAX_REGIONS:
        raise bad_image(path, f"a region table with {table.entry_count} entries is not possible")
    regions: dict[UUID, tuple[int, int]] = {}
    for index in range(table.entry_count):
        entry = RegionEntry.unpack(raw, RegionTableHeader.SIZE + index * RegionEntry.SIZE)
        if entry.guid in regions:
            raise bad_image(path, f"region {entry.guid} is there twice")
        if entry.required & 1 and entry.guid not in (BAT_REGION, METADATA_REGION):
            raise bad_image(path, f"it needs the unknown region {entry.guid}")
        aligned = not entry.file_offset % MIB and not entry.length % MIB and entry.length
        if not aligned or entry.file_offset < MIB or entry.file_offset + entry.length > host.size:
            raise bad_image(path, f"the region at byte {entry.file_offset} is not whole MiB inside the file")
        regions[entry.guid] = (entry.file_offset, entry.length)
    for guid, name in ((BAT_REGION, "block table"), (METADATA_REGION, "metadata")):
        if guid not in regions:
            raise bad_image(path, f"it has no {name} region")
    return regions


def _metadata_items(host: HostFile, offset: int, length: int) -> dict[UUID, bytes]:
    path = host.path
    raw = host.read(offset, METADATA_TABLE_SIZE)
    table = MetadataTableHeader.unpack(raw)
    if table.signature != MetadataTableHeader.SIGNATURE:
        raise bad_image(path, "the metadata table has no signature")
    if table.entry_count > MAX_METADATA_ITEMS:
        raise bad_image(path, f"a metadata table with {table.entry_count} entries is not possible")
    places: dict[UUID, MetadataEntry] = {}
    for index in range(table.entry_count):
        entry = MetadataEntry.unpack(raw, MetadataTableHeader.SIZE + index * MetadataEntry.SIZE)
        known = entry.item_id in _KNOWN_ITEMS and not entry.flags & MetadataFlags.IS_USER
        if not known:
            if entry.flags & MetadataFlags.IS_REQUIRED:
                raise bad_image(path, f"it needs the unknown metadata item {entry.item_id}")
            continue
        if entry.item_id in places:
            raise bad_image(path, f"metadata item {entry.item_id} is there twice")
        places[entry.item_id] = entry
    items: dict[UUID, bytes] = {}
    for item_id, size in _KNOWN_ITEMS.items():
        if item_id == PARENT_LOCATOR and not _has_parent(items):
            continue  # nobody looks at it then
        place = places.get(item_id)
        if place is None:
            if size:
                raise bad_image(path, f"metadata item {item_id} is missing")
            continue
        wrong_place = place.offset < METADATA_TABLE_SIZE or place.offset + place.length > length
        if wrong_place or place.length > MIB or (size and place.length != size) or not place.length:
            raise bad_image(path, f"metadata item {item_id} has an impossible place or length")
        items[item_id] = host.read(offset + place.offset, place.length)
    return items


def _has_parent(items: dict[UUID, bytes]) -> bool:
    return bool(FileParameters.unpack(items[FILE_PARAMETERS]).flags & ParameterFlags.HAS_PARENT)


def _parent_locator(host: HostFile, raw: bytes) -> dict[str, str]:
    path = host.path
    if len(raw) < ParentLocatorHeader.SIZE:
        raise bad_image(path, "the parent locator is cut short")
    head = ParentLocatorHeader.unpack(raw)
    if head.locator_type != PARENT_LOCATOR_VHDX:
        raise bad_image(path, f"parent locators of type {head.locator_type} are not known")
    end = ParentLocatorHeader.SIZE + head.key_value_count * ParentLocatorEntry.SIZE
    if head.key_value_count > _MAX_PAIRS or end > len(raw):
        raise bad_image(path, "the parent locator is cut short")
    pairs: dict[str, str] = {}
    wanted = {key.encode("utf-16-le"): key for key in _LOCATOR_KEYS}
    for at in range(ParentLocatorHeader.SIZE, end, ParentLocatorEntry.SIZE):
        entry = ParentLocatorEntry.unpack(raw, at)
        for offset, length in (
            (entry.key_offset, entry.key_length),
            (entry.value_offset, entry.value_length),
        ):
            if offset < end or offset + length > len(raw):
                raise bad_image(path, "a key of the parent locator lies outside of it")
        key = wanted.get(raw[entry.key_offset : entry.key_offset + entry.key_length])
        if key is not None:
            value = raw[entry.value_offset : entry.value_offset + entry.value_length]
            pairs[key] = value.decode("utf-16-le", "replace")
    return pairs
