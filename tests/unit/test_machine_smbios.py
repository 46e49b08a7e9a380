"""SMBIOS tables: found as a kernel finds them, taken apart, and read by dmidecode."""

import os
import shutil
import struct
import subprocess
from pathlib import Path
from uuid import UUID

import pytest

from vmbus.machine.smbios import SMBIOS_ADDRESS, Identity, build_smbios

IDENTITY = Identity(UUID("00112233-4455-6677-8899-aabbccddeeff"), "1111-2222", "3333-4444")


def structures(image: bytes) -> dict[int, tuple[bytes, list[str]]]:
    """Formatted area and strings of each structure by its type, with what must hold for all of them."""
    entry = image[:24]
    assert entry[:5] == b"_SM3_"
    assert entry[6] == 24
    assert sum(entry) & 0xFF == 0
    length, address = struct.unpack_from("<IQ", entry, 12)
    table = image[address - SMBIOS_ADDRESS :]
    assert len(table) == length
    found = {}
    handles = set()
    at = 0
    while at < length:
        kind, size, handle = struct.unpack_from("<BBH", table, at)
        end = table.index(b"\0\0", at + size)
        strings = table[at + size : end].split(b"\0") if end > at + size else []
        assert handle not in handles
        handles.add(handle)
        found[kind] = table[at : at + size], [text.decode("ascii") for text in strings]
        at = end + 2
    assert list(found)[-1] == 127
    return found


def test_what_hyper_v_says_and_who_this_machine_is() -> None:
    found = structures(build_smbios(SMBIOS_ADDRESS, IDENTITY))
    assert set(found) == {0, 1, 2, 3, 127}
    sizes = {kind: len(area) for kind, (area, _) in found.items()}
    assert sizes == {0: 26, 1: 27, 2: 15, 3: 22, 127: 4}  # DSP0134 3.1

    def text(kind: int, offset: int) -> str:
        area, strings = found[kind]
        return strings[area[offset] - 1]

    assert text(0, 4) == text(1, 4) == text(2, 4) == text(3, 4) == "Microsoft Corporation"
    assert text(1, 5) == text(2, 5) == text(1, 0x1A) == "Virtual Machine"
    assert text(0, 5) == text(1, 6) == text(2, 6) == text(3, 6) == "Hyper-V UEFI Release v4.1"
    assert text(1, 7) == text(2, 7) == text(3, 7) == "1111-2222"
    assert text(3, 8) == "3333-4444"
    assert (
        found[1][0][8:24].hex() == "33221100554477668899aabbccddeeff"
    )  # the first three fields little-endian


def test_the_identity_follows_from_the_name() -> None:
    assert Identity.of("a") == Identity.of("a")
    assert Identity.of("a") != Identity.of("b")
    one = Identity.of("a")
    assert one.serial != one.asset_tag
    for number in (one.serial, one.asset_tag):
        assert [len(part) for part in number.split("-")] == [4] * 6 + [2]
        assert number.replace("-", "").isdigit()
        assert number != "7783-7084-3265-9085-8269-3286-77", "that one means Azure"


def test_dmidecode_reads_them(tmp_path: Path) -> None:
    dmidecode = shutil.which("dmidecode", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if dmidecode is None:
        assert not os.environ.get("CI"), "CI needs dmidecode"
        pytest.skip("no dmidecode")
    dump = tmp_path / "dump"
    dump.write_bytes(build_smbios(0, IDENTITY))  # where its own dumps have the tables
    said = subprocess.run([dmidecode, "--from-dump", dump], capture_output=True, text=True, check=True).stdout
    assert "Product Name: Virtual Machine" in said
    assert "UUID: 00112233-4455-6677-8899-aabbccddeeff" in said
    assert "System is a virtual machine" in said
    assert "<BAD" not in said
