"""INQUIRY: who the unit is, and its vital product data (SPC-4 6.6 and 7.8, SBC-3 6.5)."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from vmbus.storage.disk import Disk
from vmbus.storage.scsi.cdb import allocation_length
from vmbus.storage.scsi.codes import DeviceType
from vmbus.storage.scsi.sense import invalid_field
from vmbus.storage.scsi.task import Task

__all__ = ["Identity", "Limits", "absent_inquiry", "cdrom_pages", "disk_pages", "inquiry"]

_SPC4 = 0x06
_RESPONSE_FORMAT = 0x02
_COMMAND_QUEUING = 0x02
_REMOVABLE = 0x80
_VERSIONS = {DeviceType.DISK: (0x00A0, 0x0460, 0x04C0), DeviceType.CD_ROM: (0x00A0, 0x0460, 0x04E0)}
"""Version descriptors (SPC-4 table 142): SAM-5 and SPC-4, then SBC-3 for a disk and MMC-6 for a CD-ROM."""

MAX_COMPARE_BLOCKS = 128
MAX_ATOMIC_BLOCKS = 2048
MAX_UNMAP_BLOCKS = 0xFFFFFFFF
MAX_UNMAP_DESCRIPTORS = 256


@dataclass(frozen=True)
class Identity:
    """The names of a unit.

    Attributes:
        serial: unique for each unit of a machine; the designators and the serial number come from it.
        vendor: up to 8 ASCII characters. The default and that of `product` are those of Hyper-V's disks,
            which guests recognise.
        product: up to 16 ASCII characters.
        revision: up to 4 ASCII characters.
    """

    serial: UUID
    vendor: str = "Msft"
    product: str = "Virtual Disk"
    revision: str = "1.0"

    def text(self) -> bytes:
        """Vendor, product and revision as in the standard data."""
        return f"{self.vendor[:8]:<8}{self.product[:16]:<16}{self.revision[:4]:<4}".encode("ascii", "replace")

    def naa(self) -> bytes:
        """A 16-byte NAA 6 name, made as Hyper-V makes it: Microsoft's OUI 00-22-48, then the serial's ends."""
        return bytes.fromhex("60022480") + self.serial.bytes_le[:6] + self.serial.bytes_le[10:]


@dataclass(frozen=True)
class Limits:
    """What one command may ask for; counts of blocks.

    Attributes:
        max_transfer: of reads, writes and comparisons, 0 for no limit.
        max_write_same: of WRITE SAME.
        write_same_to_end: a WRITE SAME of 0 blocks goes on to the end of the disk (WSNZ 0), as far as
            `max_write_same` allows; else it is an error (WSNZ 1).
    """

    max_transfer: int = 0
    max_write_same: int = 0x20000
    write_same_to_end: bool = False

    @property
    def max_atomic(self) -> int:
        """Blocks of WRITE ATOMIC."""
        return min(self.max_transfer or MAX_ATOMIC_BLOCKS, MAX_ATOMIC_BLOCKS)


def standard_data(identity: Identity, device_type: int, *, removable: bool) -> bytes:
    """The standard INQUIRY data up to and including the version descriptors used: 64 bytes."""
    descriptors = _VERSIONS[DeviceType(device_type)]
    head = bytes([device_type, _REMOVABLE if removable else 0, _SPC4, _RESPONSE_FORMAT])
    tail = bytes([0, 0, _COMMAND_QUEUING]) + identity.text() + bytes(22) + struct.pack(">3H", *descriptors)
    return head + bytes([len(tail)]) + tail


def absent_inquiry() -> bytes:
    """What an address without a unit answers: peripheral qualifier 3, so that guests look no further there.

    Guests find the units of a target by sending REPORT LUNS to LUN 0, for which LUN 0 must answer INQUIRY
    even when no disk is there (so do Hyper-V and OpenVMM).
    """
    return bytes([DeviceType.NOT_PRESENT, 0, _SPC4, _RESPONSE_FORMAT, 31]) + bytes(31)


def inquiry(
    task: Task,
    identity: Identity,
    device_type: int,
    pages: dict[int, Callable[[], bytes]],
    *,
    removable: bool = False,
) -> int:
    """Answer INQUIRY with the standard data or one of the vital product data `pages`.

    Raises:
        CheckCondition: a page that does not exist, or a page code without EVPD.
    """
    cdb = task.cdb
    if not cdb[1] & 1:
        if cdb[2]:
            raise invalid_field(2)
        return task.reply(standard_data(identity, device_type, removable=removable), allocation_length(cdb))
    code = cdb[2]
    if code == 0:
        body = bytes(sorted([0, *pages]))
    elif code in pages:
        body = pages[code]()
    else:
        raise invalid_field(2)
    return task.reply(struct.pack(">BBH", device_type, code, len(body)) + body, allocation_length(cdb))


def serial_number(identity: Identity) -> bytes:
    """Page 80h: 32 hexadecimal digits."""
    return identity.serial.hex.encode()


def identification(identity: Identity) -> bytes:
    """Page 83h: a T10 vendor designator and an NAA name, both of the logical unit."""
    t10 = f"{identity.vendor[:8]:<8}{identity.serial.hex}".encode("ascii", "replace")
    naa = identity.naa()
    ascii_t10 = bytes([0x02, 0x01, 0, len(t10)]) + t10
    binary_naa = bytes([0x01, 0x03, 0, len(naa)]) + naa
    return ascii_t10 + binary_naa


def block_limits(disk: Disk, limits: Limits, *, unmap: bool) -> bytes:
    """Page B0h (SBC-3 6.5.3)."""
    granularity = max(disk.unmap_granularity // disk.sector_size, 1) if unmap else 0
    return struct.pack(
        ">BBHIIIIIIIQIIIII",
        0x00 if limits.write_same_to_end else 0x01,  # WSNZ
        MAX_COMPARE_BLOCKS,
        max(disk.physical_sector_size // disk.sector_size, 1),
        limits.max_transfer,
        0,
        0,
        MAX_UNMAP_BLOCKS if unmap else 0,
        MAX_UNMAP_DESCRIPTORS if unmap else 0,
        granularity,
        0x80000000 if unmap else 0,  # UGAVALID, alignment 0
        limits.max_write_same,
        limits.max_atomic,
        1,  # atomic alignment and granularity; no atomic boundaries
        1,
        0,
        0,
    )


def block_characteristics() -> bytes:
    """Page B1h: a medium that does not rotate."""
    return struct.pack(">HBB56x", 1, 0, 0)


def logical_block_provisioning(*, unmap: bool) -> bytes:
    """Page B2h: thin with UNMAP, WRITE SAME (16) and (10), unmapped blocks read as zeros; or fully provisioned."""
    return struct.pack(">BBBB", 0, 0xE4 if unmap else 0, 2 if unmap else 0, 0)


def disk_pages(
    disk: Disk, identity: Identity, limits: Limits, *, unmap: bool
) -> dict[int, Callable[[], bytes]]:
    """The vital product data of a disk by page code."""
    return {
        0x80: lambda: serial_number(identity),
        0x83: lambda: identification(identity),
        0xB0: lambda: block_limits(disk, limits, unmap=unmap),
        0xB1: block_characteristics,
        0xB2: lambda: logical_block_provisioning(unmap=unmap),
    }


def cdrom_pages(identity: Identity) -> dict[int, Callable[[], bytes]]:
    """The vital product data of a CD-ROM drive by page code."""
    return {0x80: lambda: serial_number(identity), 0x83: lambda: identification(identity)}
