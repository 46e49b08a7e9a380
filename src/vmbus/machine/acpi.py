"""ACPI tables of a machine without legacy hardware, and the ports behind them.

A hardware-reduced platform (ACPI 6.4, section 4.1): no power management timer, no SCI. Power-off and reset are
two ports that the FADT names. The DSDT describes the serial port, the real-time clock and, under a module device
(``ACPI0004``) with the range of addresses that VMBus devices may use for their memory, the VMBus itself
(``_HID "VMBUS"``), as Hyper-V does.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from vmbus.machine import aml

__all__ = ["AcpiTables", "PowerAction", "PowerPorts", "build_tables"]

OEM_ID = b"VMBUS\0"
OEM_TABLE_ID = b"MACHINE\0"
CREATOR_ID = b"VMBS"

SLEEP_CONTROL_PORT = 0x600
SLEEP_STATUS_PORT = 0x601
RESET_PORT = 0x604
RESET_VALUE = 1
POWER_PORTS = 8
"""Ports from `SLEEP_CONTROL_PORT` on that the power device occupies."""

SLEEP_ENABLE = 1 << 5
SLEEP_TYPE_SHIFT = 2
SOFT_OFF = 5
"""The sleep type that the DSDT's ``_S5`` gives for soft-off."""

LOCAL_APIC_ADDRESS = 0xFEE0_0000
IO_APIC_ADDRESS = 0xFEC0_0000

PCI_CONFIG_PORT = 0xCF8
PCI_PORTS = (0x1000, 0xFFFF)
"""The ports, first and last, that a guest may give to PCI functions."""

FADT_SIZE = 276
FADT_WBINVD = 1 << 0
FADT_RESET_REGISTER = 1 << 10
FADT_HARDWARE_REDUCED = 1 << 20
BOOT_NO_VGA = 1 << 2
BOOT_NO_CMOS_RTC = 1 << 5
"""Without this flag Linux takes its time from the clock at ports 0x70 and 0x71 before it has looked for devices."""
PROFILE_ENTERPRISE_SERVER = 4


class PowerAction(Enum):
    """What the guest asked of the machine."""

    POWER_OFF = "power-off"
    REBOOT = "reboot"


class PowerPorts:
    """The sleep and reset registers.

    Args:
        on_action: called when the guest turns the machine off or resets it.
    """

    def __init__(self, on_action: Callable[[PowerAction], None]) -> None:
        self._on_action = on_action

    def io_read(self, port: int, size: int) -> int:
        """Read: nothing ever wakes the machine, so all registers are zero."""
        return 0

    def io_write(self, port: int, size: int, value: int) -> None:
        """Write: soft-off by the sleep control register, reset by the reset register."""
        if port == SLEEP_CONTROL_PORT and value & SLEEP_ENABLE and value >> SLEEP_TYPE_SHIFT & 7 == SOFT_OFF:
            self._on_action(PowerAction.POWER_OFF)
        elif port == RESET_PORT and value & 0xFF == RESET_VALUE:
            self._on_action(PowerAction.REBOOT)


@dataclass(frozen=True)
class AcpiTables:
    """Tables laid out for one place in guest memory.

    Attributes:
        base: guest physical address of `data`; the root pointer (RSDP) is its start.
        data: the bytes.
    """

    base: int
    data: bytes


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A system description table: header with checksum (ACPI 6.4, section 5.2.6), then `body`."""
    header = struct.pack(
        "<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, OEM_ID, OEM_TABLE_ID, 1, CREATOR_ID, 1
    )
    whole = bytearray(header + body)
    whole[9] = -sum(whole) & 0xFF
    return bytes(whole)


def _io_register(port: int) -> bytes:
    """Generic address structure of a byte-wide port."""
    return struct.pack("<BBBBQ", 1, 8, 0, 1, port)


def _fadt(dsdt: int, century: int | None) -> bytes:
    table = bytearray(FADT_SIZE - 36)

    def put(offset: int, data: bytes) -> None:
        table[offset - 36 : offset - 36 + len(data)] = data

    put(40, dsdt.to_bytes(4, "little"))
    put(45, bytes([PROFILE_ENTERPRISE_SERVER]))
    put(108, bytes([century or 0]))
    put(109, (BOOT_NO_VGA | (BOOT_NO_CMOS_RTC if century is None else 0)).to_bytes(2, "little"))
    put(112, (FADT_WBINVD | FADT_RESET_REGISTER | FADT_HARDWARE_REDUCED).to_bytes(4, "little"))
    put(116, _io_register(RESET_PORT))
    put(128, bytes([RESET_VALUE]))
    put(131, bytes([4]))  # minor version of FADT 6.4
    put(140, dsdt.to_bytes(8, "little"))
    put(244, _io_register(SLEEP_CONTROL_PORT))
    put(256, _io_register(SLEEP_STATUS_PORT))
    return _table(b"FACP", 6, bytes(table))


def _madt(processors: int, io_apic: bool) -> bytes:
    entries = b"".join(struct.pack("<BBBBI", 0, 8, n, n, 1) for n in range(processors))
    if io_apic:
        entries += struct.pack("<BBBBII", 1, 12, processors, 0, IO_APIC_ADDRESS, 0)
    return _table(b"APIC", 4, struct.pack("<II", LOCAL_APIC_ADDRESS, 0) + entries)


def _host_bridge(interrupts: Mapping[int, int]) -> bytes:
    """PCI bus 0: its configuration ports, the ports that it passes on, and where INTA# of each slot goes."""
    resources = (
        aml.word_range(aml.BUS_NUMBERS, 0, 0)
        + aml.io_ports(PCI_CONFIG_PORT, 8)
        + aml.word_range(aml.PORTS, *PCI_PORTS)
        + aml.end_tag()
    )
    zero = aml.integer(0)
    routes = [
        aml.package(aml.integer(slot << 16 | 0xFFFF), zero, zero, aml.integer(line))
        for slot, line in sorted(interrupts.items())
    ]
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", zero),
        aml.name("_ADR", zero),
        aml.name("_BBN", zero),
        aml.name("_STA", aml.integer(0x0F)),
        aml.name("_CRS", aml.buffer(resources)),
        aml.name("_PRT", aml.package(*routes)),
    )


def _dsdt(
    com1: tuple[int, int | None] | None,
    rtc: int | None,
    vmbus: tuple[int, int] | None,
    pci: Mapping[int, int] | None,
) -> bytes:
    devices = _host_bridge(pci) if pci is not None else b""
    if com1 is not None:
        port, line = com1
        resources = (
            aml.io_ports(port, 8) + (aml.interrupt([line]) if line is not None else b"") + aml.end_tag()
        )
        devices += aml.device(
            "COM1",
            aml.name("_HID", aml.eisa_id("PNP0501")),
            aml.name("_UID", aml.integer(1)),
            aml.name("_STA", aml.integer(0x0F)),
            aml.name("_CRS", aml.buffer(resources)),
        )
    if rtc is not None:
        devices += aml.device(
            "RTC0",
            aml.name("_HID", aml.eisa_id("PNP0B00")),
            aml.name("_UID", aml.integer(0)),
            aml.name("_STA", aml.integer(0x0F)),
            aml.name("_CRS", aml.buffer(aml.io_ports(rtc, 2) + aml.end_tag())),
        )
    if vmbus is not None:
        devices += aml.device(
            "VMOD",
            aml.name("_HID", aml.string("ACPI0004")),
            aml.name("_UID", aml.integer(0)),
            aml.name("_STA", aml.integer(0x0F)),
            aml.name("_CRS", aml.buffer(aml.dword_memory(*vmbus) + aml.end_tag())),
            aml.device(
                "VMBS",
                aml.name("_HID", aml.string("VMBUS")),
                aml.name("_UID", aml.integer(0)),
                aml.name("_STA", aml.integer(0x0F)),
                aml.name("_CRS", aml.buffer(aml.end_tag())),
            ),
        )
    terms = aml.scope("\\_SB", devices)
    zero = aml.integer(0)
    terms += aml.name("\\_S5", aml.package(aml.integer(SOFT_OFF), aml.integer(SOFT_OFF), zero, zero))
    return _table(b"DSDT", 2, terms)


def build_tables(
    base: int,
    *,
    processors: int = 1,
    com1: tuple[int, int | None] | None = (0x3F8, None),
    rtc: tuple[int, int] | None = None,
    vmbus: tuple[int, int] | None = (0xF800_0000, 0x0400_0000),
    io_apic: bool = False,
    pci: Mapping[int, int] | None = None,
) -> AcpiTables:
    """Build all tables for guest physical address `base`.

    Args:
        base: where they will lie; a multiple of 16 below 4 GiB.
        processors: virtual processors, with APIC ids from 0.
        com1: first port and interrupt line (None: polled) of the serial port, or no serial port.
        rtc: first port of the real-time clock, and the index of its byte for the century; or no clock.
        vmbus: first address and length of the memory that VMBus devices may use, or no VMBus.
        io_apic: an I/O APIC with the ISA lines is there.
        pci: PCI bus 0 is there; the interrupt line of each slot that has one.

    Raises:
        ValueError: `base` is misaligned or too high.
    """
    if base % 16 or base >= 1 << 32:
        raise ValueError(f"ACPI tables cannot lie at {base:#x}")
    parts: list[bytes] = [bytes(64)]  # the root pointer, filled in at the end

    def add(table: bytes) -> int:
        address = base + sum(len(part) for part in parts)
        parts.append(table.ljust(-(-len(table) // 16) * 16, b"\0"))
        return address

    port, century = rtc if rtc is not None else (None, None)
    fadt = add(_fadt(add(_dsdt(com1, port, vmbus, pci)), century))
    madt = add(_madt(processors, io_apic))
    xsdt = add(_table(b"XSDT", 1, struct.pack("<QQ", fadt, madt)))
    root = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, 0, 36, xsdt, 0))
    root[8] = -sum(root[:20]) & 0xFF
    root[32] = -sum(root) & 0xFF
    parts[0] = bytes(root).ljust(64, b"\0")
    return AcpiTables(base, b"".join(parts))
