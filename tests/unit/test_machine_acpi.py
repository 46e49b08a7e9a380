"""ACPI tables: checksums, what the DSDT disassembles to, and the power ports behind them."""

import re
import struct
import subprocess
from pathlib import Path

import pytest
from reference.disk_model import tool

from vmbus.machine import aml
from vmbus.machine.acpi import PowerAction, PowerPorts, build_tables

BASE = 0xE_0000


def table(data: bytes, address: int) -> bytes:
    start = address - BASE
    (length,) = struct.unpack_from("<I", data, start + 4)
    return data[start : start + length]


def tables(**options: object) -> dict[bytes, bytes]:
    """All tables by signature, found as a guest finds them, checksums verified."""
    built = build_tables(BASE, **options)  # type: ignore[arg-type]
    root = built.data[:36]
    assert root[:8] == b"RSD PTR "
    assert sum(root[:20]) % 256 == 0
    assert sum(root) % 256 == 0
    (xsdt_address,) = struct.unpack_from("<Q", root, 24)
    xsdt = table(built.data, xsdt_address)
    found = {b"XSDT": xsdt}
    for (address,) in struct.iter_unpack("<Q", xsdt[36:]):
        one = table(built.data, address)
        found[one[:4]] = one
    (dsdt_address,) = struct.unpack_from("<Q", found[b"FACP"], 140)
    found[b"DSDT"] = table(built.data, dsdt_address)
    for one in found.values():
        assert sum(one) % 256 == 0
        assert len(one) == struct.unpack_from("<I", one, 4)[0]
    return found


def test_tables_are_linked_and_their_checksums_hold() -> None:
    found = tables(processors=3, io_apic=True)
    assert set(found) == {b"XSDT", b"FACP", b"APIC", b"DSDT"}
    (flags,) = struct.unpack_from("<I", found[b"FACP"], 112)
    assert flags >> 20 & 1, "hardware-reduced"
    madt = found[b"APIC"][44:]
    kinds = []
    while madt:
        kinds.append(madt[0])
        madt = madt[madt[1] :]
    assert kinds == [0, 0, 0, 1]


def test_misplaced_tables_are_refused() -> None:
    for base in (0xE_0001, 1 << 32):
        with pytest.raises(ValueError, match="cannot lie"):
            build_tables(base)


def test_the_dsdt_disassembles_to_what_was_meant(tmp_path: Path) -> None:
    tool("iasl")
    found = tables(com1=(0x3F8, 4), vmbus=(0xF800_0000, 0x400_0000), pci={7: 16})
    path = tmp_path / "dsdt.aml"
    path.write_bytes(found[b"DSDT"])
    done = subprocess.run(["iasl", "-d", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    source = (tmp_path / "dsdt.dsl").read_text()
    assert re.search(r'Name \(_HID, "VMBUS"\)', source)
    assert re.search(r'Name \(_HID, "ACPI0004"', source)
    assert re.search(r'EisaId \("PNP0501"\)', source)
    assert re.search(r"0x03F8, +// Range Minimum", source)
    assert re.search(r"0xF8000000, +// Range Minimum\s+0xFBFFFFFF, +// Range Maximum", source)
    assert re.search(
        r"Interrupt \(ResourceConsumer, Edge, ActiveHigh, Exclusive.*\)\s+\{\s+0x00000004", source
    )
    assert re.search(r"Name \(\\?_S5, Package", source)
    assert re.search(r'EisaId \("PNP0A03"\)', source)
    assert re.search(r"WordBusNumber \(ResourceProducer, MinFixed, MaxFixed", source)
    assert re.search(
        r"WordIO \(ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange,\s+0x0000, .*\s+0x1000, .*\s+0xFFFF, "
        r".*\s+0x0000, .*\s+0xF000,",
        source,
    )
    assert re.search(r"0x0CF8, +// Range Minimum", source)
    assert re.search(
        r"Name \(_PRT, Package.*\s+\{\s+Package.*\s+\{\s+0x0007FFFF,\s+Zero,\s+Zero,\s+0x10\s", source
    )
    for signature in (b"FACP", b"APIC", b"XSDT"):
        path = tmp_path / f"{signature.decode().lower()}.dat"
        path.write_bytes(found[signature])
        done = subprocess.run(["iasl", "-d", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0
        assert "Error" not in done.stdout + done.stderr


def test_aml_lengths_at_every_boundary() -> None:
    for size in (0, 1, 59, 60, 61, 62, 63, 64, 4090, 4093, 4096, 5000, 1 << 17, 1 << 20):
        term = aml.buffer(bytes(size))
        lead = term[1]
        extra = lead >> 6
        length = (
            (lead & 0x3F) if extra == 0 else (lead & 15) | int.from_bytes(term[2 : 2 + extra], "little") << 4
        )
        assert length == len(term) - 1, size
    with pytest.raises(ValueError, match="too long"):
        aml.buffer(bytes(1 << 28))


def test_aml_constants_and_names() -> None:
    assert [aml.integer(n) for n in (0, 1, 2, 0x100, 0x10000)] == [
        b"\x00", b"\x01", b"\x0a\x02", b"\x0b\x00\x01", b"\x0c\x00\x00\x01\x00",
    ]  # fmt: skip
    assert aml.integer(1 << 40) == b"\x0e" + (1 << 40).to_bytes(8, "little")
    assert aml.path("\\_SB") == b"\\_SB_"
    assert aml.path("_SB.COM1") == b"\x2e_SB_COM1"
    assert aml.path("A.B.C") == b"\x2f\x03A___B___C___"
    for wrong in ("", "\\", "TOOLONG"):
        with pytest.raises(ValueError, match="not an ACPI path"):
            aml.path(wrong)
    assert aml.eisa_id("PNP0501") == b"\x0c\x41\xd0\x05\x01"
    with pytest.raises(ValueError, match="64 bits"):
        aml.integer(1 << 64)


def test_power_ports() -> None:
    seen: list[PowerAction] = []
    ports = PowerPorts(seen.append)
    assert ports.io_read(0x600, 1) == 0
    for port, value in ((0x600, 5 << 2), (0x600, 1 << 5), (0x601, 0xFF), (0x604, 0), (0x607, 0x34)):
        ports.io_write(port, 1, value)
    assert seen == []
    ports.io_write(0x600, 1, 5 << 2 | 1 << 5)
    ports.io_write(0x604, 1, 1)
    assert seen == [PowerAction.POWER_OFF, PowerAction.REBOOT]
