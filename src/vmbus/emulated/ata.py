"""ATA: registers, commands and the data that IDENTIFY DEVICE gives.

Names and numbers are those of ATA/ATAPI-7 (INCITS 397-2005) volume 1, clauses 6 and 7; obsolete commands
that guests still send are from ATA-2.
"""

from enum import IntEnum
from typing import Annotated, Protocol

from vmbus.wire import U16, U32, U64, Fixed, Structure, wire

__all__ = [
    "MULTIPLE_AT_POWER_ON",
    "SECTOR",
    "Backend",
    "Command",
    "Control",
    "Device",
    "Error",
    "Feature",
    "IdentifyDevice",
    "Register",
    "Status",
    "identify",
]

SECTOR = 512
"""Bytes of a logical sector of an ATA disk as emulated here."""
HEADS = 16
SECTORS_PER_TRACK = 63
MOST_CYLINDERS = 16383
"""The default translation of every disk above 8 GB (ATA-7, 6.2.1)."""
LBA28_SECTORS = 0x0FFFFFFF
MULTIPLE_MOST = 128
"""The most sectors of one DRQ block of READ and WRITE MULTIPLE; what Hyper-V's disks announce (OpenVMM)."""
MULTIPLE_AT_POWER_ON = 16
"""Sectors of a DRQ block that a disk is set to when a guest finds it, as firmware leaves real ones: a driver that does
not choose itself (Linux's libata) takes word 59's value, and without one an interrupt for each sector."""


class Backend(Protocol):
    """What an emulated disk stores its sectors in; every `vmbus.storage.disk.Disk` is one."""

    sector_size: int
    sector_count: int
    read_only: bool

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at byte `offset`."""

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` at byte `offset`."""

    def flush(self) -> None:
        """Put everything written on stable storage."""


class Register(IntEnum):
    """The command block, by offset from the first port; some mean something else when they are written."""

    DATA = 0
    ERROR_FEATURES = 1
    COUNT = 2
    LBA_LOW = 3
    LBA_MID = 4
    LBA_HIGH = 5
    DEVICE = 6
    STATUS_COMMAND = 7


class Status(IntEnum):
    """Bits of the status register."""

    ERR = 0x01
    DRQ = 0x08
    DSC = 0x10
    DF = 0x20
    DRDY = 0x40
    BSY = 0x80


class Error(IntEnum):
    """Bits of the error register."""

    ABRT = 0x04
    IDNF = 0x10
    UNC = 0x40


class Device(IntEnum):
    """Bits of the device register; the low four bits are the head or LBA bits 27:24."""

    DEV = 0x10
    LBA = 0x40
    OBSOLETE = 0xA0


class Control(IntEnum):
    """Bits of the device control register."""

    NIEN = 0x02
    SRST = 0x04
    HOB = 0x80


class Command(IntEnum):
    """Command register."""

    RECALIBRATE = 0x10
    READ_SECTORS = 0x20
    READ_SECTORS_NO_RETRY = 0x21
    READ_SECTORS_EXT = 0x24
    READ_NATIVE_MAX_EXT = 0x27
    READ_MULTIPLE_EXT = 0x29
    WRITE_SECTORS = 0x30
    WRITE_SECTORS_NO_RETRY = 0x31
    WRITE_SECTORS_EXT = 0x34
    WRITE_MULTIPLE_EXT = 0x39
    READ_VERIFY = 0x40
    READ_VERIFY_NO_RETRY = 0x41
    READ_VERIFY_EXT = 0x42
    SEEK = 0x70
    EXECUTE_DIAGNOSTIC = 0x90
    INITIALIZE_PARAMETERS = 0x91
    READ_MULTIPLE = 0xC4
    WRITE_MULTIPLE = 0xC5
    SET_MULTIPLE = 0xC6
    STANDBY_IMMEDIATE = 0xE0
    IDLE_IMMEDIATE = 0xE1
    STANDBY = 0xE2
    IDLE = 0xE3
    CHECK_POWER_MODE = 0xE5
    SLEEP = 0xE6
    FLUSH_CACHE = 0xE7
    FLUSH_CACHE_EXT = 0xEA
    IDENTIFY_DEVICE = 0xEC
    SET_FEATURES = 0xEF
    READ_NATIVE_MAX = 0xF8


class Feature(IntEnum):
    """Subcommands of SET FEATURES."""

    ENABLE_WRITE_CACHE = 0x02
    SET_TRANSFER_MODE = 0x03
    DISABLE_LOOK_AHEAD = 0x55
    KEEP_OVER_RESET = 0x66
    DISABLE_WRITE_CACHE = 0x82
    ENABLE_LOOK_AHEAD = 0xAA
    REVERT_ON_RESET = 0xCC


@wire(
    size=SECTOR,
    offsets={"serial": 20, "model": 54, "capabilities": 98, "lba28_sectors": 120, "lba48_sectors": 200},
)
class IdentifyDevice(Structure):
    """The 256 words of IDENTIFY DEVICE (ATA-7 table 24); strings have the bytes of each word swapped."""

    general: U16
    cylinders: U16
    specific: U16
    heads: U16
    retired4: U16
    retired5: U16
    sectors_per_track: U16
    reserved7: Annotated[bytes, Fixed(6)]
    serial: Annotated[bytes, Fixed(20)]
    retired20: U16
    retired21: U16
    obsolete22: U16
    firmware: Annotated[bytes, Fixed(8)]
    model: Annotated[bytes, Fixed(40)]
    multiple_most: U16
    reserved48: U16
    capabilities: U16
    capabilities2: U16
    pio_mode: U16
    obsolete52: U16
    validity: U16
    current_cylinders: U16
    current_heads: U16
    current_sectors_per_track: U16
    current_capacity: U32
    multiple_current: U16
    lba28_sectors: U32
    obsolete62: U16
    multiword_dma: U16
    pio_modes: U16
    reserved65: Annotated[bytes, Fixed(30)]
    major_version: U16
    minor_version: U16
    supported82: U16
    supported83: U16
    supported84: U16
    enabled85: U16
    enabled86: U16
    default87: U16
    reserved88: Annotated[bytes, Fixed(24)]
    lba48_sectors: U64
    reserved104: Annotated[bytes, Fixed(4)]
    sector_size: U16
    reserved107: Annotated[bytes, Fixed(298)]


def _swapped(text: str, length: int) -> bytes:
    """An ATA string: padded with spaces, the two characters of each word swapped."""
    raw = text.encode("ascii").ljust(length)[:length]
    return bytes(raw[i ^ 1] for i in range(length))


def identify(
    disk: Backend,
    *,
    heads: int,
    sectors_per_track: int,
    multiple: int,
    write_cache: bool,
    serial: str,
    model: str,
) -> IdentifyDevice:
    """What a PIO-only disk with the 48-bit feature set says of itself.

    Args:
        disk: gives the capacity.
        heads: heads of the current translation (INITIALIZE DEVICE PARAMETERS).
        sectors_per_track: sectors of the current translation.
        multiple: sectors per block set by SET MULTIPLE MODE, 0 if none are.
        write_cache: it is enabled.
        serial: at most 20 ASCII characters.
        model: at most 40 ASCII characters.
    """
    sectors = disk.sector_count
    default_cylinders = min(MOST_CYLINDERS, sectors // (HEADS * SECTORS_PER_TRACK))
    cylinders = min(MOST_CYLINDERS, sectors // (heads * sectors_per_track))
    physical = getattr(disk, "physical_sector_size", SECTOR)
    per_physical = max(0, (physical // SECTOR).bit_length() - 1)
    enabled = 0x0020 if write_cache else 0
    return IdentifyDevice(
        general=0x0040,  # a fixed ATA device
        cylinders=default_cylinders,
        specific=0,
        heads=HEADS,
        retired4=0,
        retired5=0,
        sectors_per_track=SECTORS_PER_TRACK,
        reserved7=b"",
        serial=_swapped(serial, 20),
        retired20=0,
        retired21=0,
        obsolete22=0,
        firmware=_swapped("1.0", 8),
        model=_swapped(model, 40),
        multiple_most=0x8000 | MULTIPLE_MOST,
        reserved48=0,
        capabilities=0x0A00,  # LBA, IORDY; no DMA
        capabilities2=0x4000,
        pio_mode=0x0200,
        obsolete52=0,
        validity=0x0003,  # words 54-58 and 64-70
        current_cylinders=cylinders,
        current_heads=heads,
        current_sectors_per_track=sectors_per_track,
        current_capacity=cylinders * heads * sectors_per_track,
        multiple_current=0x0100 | multiple if multiple else 0,
        lba28_sectors=min(sectors, LBA28_SECTORS),
        obsolete62=0,
        multiword_dma=0,
        pio_modes=0x0003,  # modes 3 and 4
        reserved65=bytes(4) + (120).to_bytes(2, "little") * 2,  # words 67, 68: PIO cycle time in ns
        major_version=0x00FE,  # ATA-1 … ATA/ATAPI-7
        minor_version=0,
        supported82=0x0068,  # power management, write cache, look-ahead
        supported83=0x7400,  # FLUSH CACHE, FLUSH CACHE EXT, 48-bit addresses
        supported84=0x4000,
        enabled85=0x0048 | enabled,
        enabled86=0x3400,
        default87=0x4000,
        reserved88=b"",
        lba48_sectors=sectors,
        reserved104=b"",
        sector_size=0x6000 | per_physical
        if per_physical
        else 0x4000,  # word 106: logical per physical sectors
        reserved107=b"",
    )
