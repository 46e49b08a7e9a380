"""SMBIOS tables: what the machine says that it is, as Hyper-V's firmware says it (DMTF DSP0134, version 3.1).

Linux prints it at boot ("DMI: Microsoft Corporation Virtual Machine/Virtual Machine, BIOS Hyper-V UEFI …"), and
distributions tell by it where they run. Without EFI, kernels look for the entry point in the last 64 KiB below 1 MiB.
"""

import struct
from dataclasses import dataclass
from typing import Final
from uuid import UUID, uuid5

from vmbus.core.memory import GuestMemory

__all__ = ["SMBIOS_ADDRESS", "Identity", "build_smbios", "load_smbios"]

SMBIOS_ADDRESS: Final = 0xF_0000
"""Where the entry point lies: paragraphs of F0000–FFFFF are searched for it (DSP0134 section 5.2.2)."""
_TABLE_OFFSET: Final = 0x20
_VERSION: Final = (3, 1, 0)
_NAMESPACE: Final = UUID("5b1a3c57-0d5c-4a39-9b0e-53b7a8a5f0d3")

_VENDOR: Final = "Microsoft Corporation"
_PRODUCT: Final = "Virtual Machine"
_FIRMWARE: Final = "Hyper-V UEFI Release v4.1"
_FIRMWARE_DATE: Final = "09/28/2024"
_NONE: Final = "None"

_NO_CHARACTERISTICS: Final = 1 << 3
_IN_VM: Final = 1 << 4
"""Bits of the BIOS characteristics (7.1.1), and of their second extension byte (7.1.2.2)."""
_POWER_SWITCH: Final = 6
_HOSTING_BOARD: Final = 0x09
_MOTHERBOARD: Final = 0x0A
_DESKTOP: Final = 3
_SAFE: Final = 3


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells one virtual machine from another.

    Attributes:
        uuid: of the system; Hyper-V's "BIOS GUID".
        serial: of system, base board and chassis.
        asset_tag: of the chassis, another number of the same form.
    """

    uuid: UUID
    serial: str
    asset_tag: str

    @classmethod
    def of(cls, name: str) -> "Identity":
        """The identity of the machine called `name`: always the same, so that runs repeat."""
        uuid = uuid5(_NAMESPACE, name)
        return cls(uuid, _number(uuid), _number(uuid5(uuid, "asset tag")))


def _number(uuid: UUID) -> str:
    """26 decimal digits in the form in which Hyper-V writes its random serial numbers."""
    digits = str(uuid.int % 10**26).zfill(26)
    return "-".join(digits[at : at + 4] for at in range(0, 26, 4))


def _structure(kind: int, handle: int, fields: bytes, *strings: str) -> bytes:
    """One structure: header, formatted area, and the strings that its fields name by number, from 1 on."""
    header = struct.pack("<BBH", kind, 4 + len(fields), handle)
    return header + fields + (b"".join(text.encode() + b"\0" for text in strings) or b"\0") + b"\0"


def build_smbios(base: int, identity: Identity) -> bytes:
    """Entry point and structures, to be put at guest physical address `base`, a multiple of 16 below 4 GiB."""
    structures = (
        # BIOS information (7.1): vendor, version, segment, date, ROM size; release 4.1, no embedded controller
        _structure(
            0, 0,
            struct.pack("<BBHBBQBBBBBBH", 1, 2, 0, 3, 0, _NO_CHARACTERISTICS, 0, _IN_VM, 4, 1, 0xFF, 0xFF, 0),
            _VENDOR, _FIRMWARE, _FIRMWARE_DATE,
        ),
        # System information (7.2): manufacturer, product, version, serial, UUID, wake-up, SKU, family
        _structure(
            1, 1,
            struct.pack("<BBBB16sBBB", 1, 2, 3, 4, identity.uuid.bytes_le, _POWER_SWITCH, 5, 2),
            _VENDOR, _PRODUCT, _FIRMWARE, identity.serial, _NONE,
        ),
        # Base board (7.3): manufacturer, product, version, serial, asset tag, flags, location, chassis, type
        _structure(
            2, 2,
            struct.pack("<BBBBBBBHBB", 1, 2, 3, 4, 5, _HOSTING_BOARD, 2, 3, _MOTHERBOARD, 0),
            _VENDOR, _PRODUCT, _FIRMWARE, identity.serial, _NONE,
        ),
        # Chassis (7.4): manufacturer, type, version, serial, asset tag, states, OEM, height, power cords, SKU
        _structure(
            3, 3,
            struct.pack("<BBBBBBBBBIBBBBB", 1, _DESKTOP, 2, 3, 4, _SAFE, _SAFE, _SAFE, _SAFE, 0, 0, 1, 0, 0, 5),
            _VENDOR, _FIRMWARE, identity.serial, identity.asset_tag, _PRODUCT,
        ),
        _structure(127, 4, b""),
    )  # fmt: skip
    table = b"".join(structures)
    # The 64-bit entry point (5.2.2).
    entry = bytearray(
        struct.pack("<5sBBBBBBBIQ", b"_SM3_", 0, 24, *_VERSION, 1, 0, len(table), base + _TABLE_OFFSET)
    )
    entry[5] = -sum(entry) & 0xFF
    return bytes(entry).ljust(_TABLE_OFFSET, b"\0") + table


def load_smbios(memory: GuestMemory, name: str) -> None:
    """Put the tables of the machine called `name` where a kernel looks for them."""
    memory.write(SMBIOS_ADDRESS, build_smbios(SMBIOS_ADDRESS, Identity.of(name)))
