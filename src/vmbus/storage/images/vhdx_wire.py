"""The structures of a VHDX file (MS-VHDX). All are little-endian."""

from enum import IntEnum
from typing import Annotated
from uuid import UUID

from vmbus.core.crc32c import crc32c
from vmbus.wire import U16, U32, U64, Fixed, Guid, Structure, wire

__all__ = [
    "BAT_REGION",
    "FILE_PARAMETERS",
    "FILE_SIGNATURE",
    "HEADER_OFFSETS",
    "LOGICAL_SECTOR_SIZE",
    "MAX_SIZE",
    "METADATA_REGION",
    "MIB",
    "NO_GUID",
    "PAGE83",
    "PARENT_LOCATOR",
    "PARENT_LOCATOR_VHDX",
    "PHYSICAL_SECTOR_SIZE",
    "REGION_TABLE_OFFSETS",
    "VIRTUAL_DISK_SIZE",
    "BatState",
    "FileParameters",
    "Header",
    "LogDataDescriptor",
    "LogDataSector",
    "LogEntryHeader",
    "LogZeroDescriptor",
    "MetadataEntry",
    "MetadataFlags",
    "MetadataTableHeader",
    "ParameterFlags",
    "ParentLocatorEntry",
    "ParentLocatorHeader",
    "RegionEntry",
    "RegionTableHeader",
    "checksum",
    "chunk_ratio",
    "table_entries",
    "with_checksum",
]

MIB = 1 << 20
KIB64 = 64 << 10
PAGE = 4096
MAX_SIZE = 64 << 40
"""The largest disk, bytes (2.6.2.2)."""
FILE_SIGNATURE = b"vhdxfile"
HEADER_OFFSETS = (KIB64, 2 * KIB64)
REGION_TABLE_OFFSETS = (3 * KIB64, 4 * KIB64)
REGION_TABLE_SIZE = KIB64
METADATA_TABLE_SIZE = KIB64
MAX_REGIONS = 2047
MAX_METADATA_ITEMS = 2047
BITMAP_BLOCK = MIB
"""A sector bitmap block is 1 MiB and covers 2^23 sectors, one chunk (2.4)."""
SECTORS_PER_CHUNK = 1 << 23

NO_GUID = UUID(int=0)
BAT_REGION = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA_REGION = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
FILE_PARAMETERS = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
VIRTUAL_DISK_SIZE = UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
PAGE83 = UUID("beca12ab-b2e6-4523-93ef-c309e000c746")
LOGICAL_SECTOR_SIZE = UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PHYSICAL_SECTOR_SIZE = UUID("cda348c7-445d-4471-9cc9-e9885251c556")
PARENT_LOCATOR = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
PARENT_LOCATOR_VHDX = UUID("b04aefb7-d19e-4a81-b789-25b8e9445913")


class BatState(IntEnum):
    """The low three bits of a block allocation table entry (2.5.1.1).

    UNMAPPED was 5 in version 1.00 of the specification, of Windows Server 2012's time; QEMU knows it as that.
    """

    NOT_PRESENT = 0
    UNDEFINED = 1
    ZERO = 2
    UNMAPPED = 3
    UNMAPPED_1_00 = 5
    FULLY_PRESENT = 6
    PARTIALLY_PRESENT = 7


class MetadataFlags(IntEnum):
    """Bits of a metadata table entry (2.6.1.2)."""

    IS_USER = 1
    IS_VIRTUAL_DISK = 2
    IS_REQUIRED = 4


class ParameterFlags(IntEnum):
    """Bits of the file parameters item (2.6.2.1)."""

    LEAVE_BLOCKS_ALLOCATED = 1
    HAS_PARENT = 2


@wire(size=80, offsets={"log_guid": 48, "log_offset": 72})
class Header(Structure):
    """One of the two headers (2.2.2); 4 KiB in the file, the rest zero."""

    signature: Annotated[bytes, Fixed(4)]
    checksum: U32
    sequence_number: U64
    file_write_guid: Guid
    data_write_guid: Guid
    log_guid: Guid
    log_version: U16
    version: U16
    log_length: U32
    log_offset: U64

    SIGNATURE = b"head"
    AREA = PAGE


@wire(size=16)
class RegionTableHeader(Structure):
    """The head of a region table (2.2.3.1)."""

    signature: Annotated[bytes, Fixed(4)]
    checksum: U32
    entry_count: U32
    reserved: U32

    SIGNATURE = b"regi"


@wire(size=32)
class RegionEntry(Structure):
    """A region of the file (2.2.3.2)."""

    guid: Guid
    file_offset: U64
    length: U32
    required: U32


@wire(size=32)
class MetadataTableHeader(Structure):
    """The head of the metadata table (2.6.1.1)."""

    signature: Annotated[bytes, Fixed(8)]
    reserved: U16
    entry_count: U16
    reserved2: Annotated[bytes, Fixed(20)] = b""

    SIGNATURE = b"metadata"


@wire(size=32)
class MetadataEntry(Structure):
    """A metadata item: where it is in the metadata region (2.6.1.2)."""

    item_id: Guid
    offset: U32
    length: U32
    flags: U32
    reserved: U32


@wire(size=8)
class FileParameters(Structure):
    """The file parameters item (2.6.2.1)."""

    block_size: U32
    flags: U32


@wire(size=20)
class ParentLocatorHeader(Structure):
    """The head of the parent locator item (2.6.2.6.1)."""

    locator_type: Guid
    reserved: U16
    key_value_count: U16


@wire(size=12)
class ParentLocatorEntry(Structure):
    """One key and value, both UTF-16LE, by offset in the item (2.6.2.6.2)."""

    key_offset: U32
    value_offset: U32
    key_length: U16
    value_length: U16


@wire(size=64, offsets={"log_guid": 32, "last_file_offset": 56})
class LogEntryHeader(Structure):
    """The head of a log entry (2.3.1.1)."""

    signature: Annotated[bytes, Fixed(4)]
    checksum: U32
    entry_length: U32
    tail: U32
    sequence_number: U64
    descriptor_count: U32
    reserved: U32
    log_guid: Guid
    flushed_file_offset: U64
    last_file_offset: U64

    SIGNATURE = b"loge"


@wire(size=32)
class LogZeroDescriptor(Structure):
    """A stretch of the file to be zeroed (2.3.1.2)."""

    signature: Annotated[bytes, Fixed(4)]
    reserved: U32
    zero_length: U64
    file_offset: U64
    sequence_number: U64

    SIGNATURE = b"zero"


@wire(size=32)
class LogDataDescriptor(Structure):
    """A page of the file to be written: its last 4 and first 8 bytes are here, the rest in a data sector (2.3.1.3)."""

    signature: Annotated[bytes, Fixed(4)]
    trailing_bytes: Annotated[bytes, Fixed(4)]
    leading_bytes: Annotated[bytes, Fixed(8)]
    file_offset: U64
    sequence_number: U64

    SIGNATURE = b"desc"


@wire(size=4096)
class LogDataSector(Structure):
    """The middle of a page to be written (2.3.1.4)."""

    signature: Annotated[bytes, Fixed(4)]
    sequence_high: U32
    data: Annotated[bytes, Fixed(4084)]
    sequence_low: U32

    SIGNATURE = b"data"


def checksum(structure: bytes | bytearray | memoryview) -> int:
    """The CRC-32C of a structure whose checksum field, at bytes 4 to 8, is taken as zero (2.2.2)."""
    view = memoryview(structure)
    return crc32c(view[8:], crc32c(bytes(4), crc32c(view[:4])))


def with_checksum(structure: bytes) -> bytes:
    """The structure with the right checksum at bytes 4 to 8."""
    return structure[:4] + checksum(structure).to_bytes(4, "little") + structure[8:]


def chunk_ratio(block_size: int, sector_size: int) -> int:
    """Payload blocks of one chunk, that is of one sector bitmap block (2.5)."""
    return SECTORS_PER_CHUNK * sector_size // block_size


def table_entries(size: int, block_size: int, sector_size: int, *, differencing: bool) -> int:
    """Entries of the block allocation table of a disk of `size` bytes (2.5)."""
    blocks = -(-size // block_size)
    ratio = chunk_ratio(block_size, sector_size)
    if differencing:
        return -(-blocks // ratio) * (ratio + 1)
    return blocks + (blocks - 1) // ratio
