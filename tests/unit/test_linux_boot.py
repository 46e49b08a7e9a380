"""The Linux boot protocol: what is refused, and where things end up in memory."""

import bz2
import gzip
import lzma
import resource
import struct
from itertools import pairwise
from pathlib import Path

import pytest
from reference.tiny_guest import LOAD_ADDRESS, elf

from vmbus.core.memory import GuestMemory
from vmbus.machine.acpi import build_tables
from vmbus.machine.kernel_payload import unpack_kernel
from vmbus.machine.linux import (
    ACPI_ADDRESS,
    MOST_MEMORY,
    BootError,
    KernelError,
    SizeError,
    load_linux,
    parse_kernel,
)

MIB = 1 << 20


def bzimage(
    payload: bytes = bytes(64),
    *,
    version: int = 0x20F,
    flags: int = 1,
    preferred: int = 16 * MIB,
    cut: int = 0,
) -> bytes:
    setup = bytearray(1024)
    setup[0x1F1] = 1
    struct.pack_into("<I", setup, 0x1F4, -(-(0x400 + len(payload)) // 16))
    setup[0x1FE:0x200] = b"\x55\xaa"
    setup[0x201] = 0x66
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, version)
    struct.pack_into("<I", setup, 0x22C, 0x7FFF_FFFF)
    struct.pack_into("<HI", setup, 0x236, flags, 2047)
    struct.pack_into("<II", setup, 0x248, 0x400, len(payload))
    struct.pack_into("<QI", setup, 0x258, preferred, 4 * MIB)
    image = bytes(setup) + bytes(0x400) + payload + bytes(-len(payload) % 16) + bytes(0x1000)
    return image[: len(image) - 0x1000 - cut] if cut else image


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "not a Linux kernel"),
        (b"#!/bin/sh\n" * 1000, "not a Linux kernel"),
        (b"\x7fELF", "not a 64-bit ELF"),
        (b"\x7fELF\x01" + bytes(100), "not a 64-bit ELF"),
        (bzimage(version=0x204), "boot protocol 2.04"),
        (bzimage(flags=0), "no 64-bit entry"),
        (bzimage(bytes(4096), cut=16), "truncated"),
        (bzimage(preferred=0), "asks for address"),
        (bzimage(preferred=MOST_MEMORY), "asks for address"),
        (elf(b"\x90", entry=0x20_0000), "entry point"),
        (elf(bytes(100))[:-1], "truncated"),
        (elf(b"\x90")[:70], "truncated"),
    ],
)
def test_what_is_not_a_kernel_is_refused_in_one_sentence(image: bytes, message: str) -> None:
    with pytest.raises(BootError, match=message) as caught:
        parse_kernel(image)
    assert "\n" not in str(caught.value)


def test_every_truncation_of_a_kernel_is_refused_or_harmless() -> None:
    image = bzimage(bytes(range(256)) * 8)
    whole = parse_kernel(image)
    needed = 1024 + 16 * struct.unpack_from("<I", image, 0x1F4)[0]
    for length in range(0, len(image), 7):
        if length >= needed:
            assert parse_kernel(image[:length]) == whole
        else:
            with pytest.raises(BootError):
                parse_kernel(image[:length])


def test_layout_in_memory() -> None:
    memory = GuestMemory(32 * MIB)
    kernel = parse_kernel(bzimage(b"kernel code"))
    acpi = build_tables(ACPI_ADDRESS)
    initrd = b"initrd" * 1000
    entry = load_linux(memory, kernel, command_line="console=ttyS0", initrd=initrd, acpi=acpi)
    assert entry.rip == 16 * MIB + 0x200
    zero_page = memory.read(entry.rsi, 4096)
    assert zero_page[0x202:0x206] == b"HdrS"
    address, size = struct.unpack_from("<II", zero_page, 0x218)
    assert memory.read(address, size) == initrd
    assert address % 4096 == 0
    assert address + size > 32 * MIB - 8192
    (command_line,) = struct.unpack_from("<I", zero_page, 0x228)
    assert memory.read(command_line, 14) == b"console=ttyS0\0"
    assert struct.unpack_from("<Q", zero_page, 0x70)[0] == ACPI_ADDRESS
    regions = [struct.unpack_from("<QQI", zero_page, 0x2D0 + 20 * n) for n in range(zero_page[0x1E8])]
    assert all(a + b <= c for (a, b, _), (c, _, _) in pairwise(regions))
    assert regions[-1][0] + regions[-1][1] == memory.size
    assert any(start <= ACPI_ADDRESS < start + length and kind == 2 for start, length, kind in regions)
    # the page tables map every 2 MiB page below 4 GiB onto itself
    for target in (0, 16 * MIB, 0xFEE0_0000):
        table = entry.cr3
        for shift in (39, 30, 21):
            (item,) = struct.unpack("<Q", memory.read(table + (target >> shift & 511) * 8, 8))
            assert item & 3 == 3
            table = item & ~0xFFF
        assert item & ~0x1F_FFFF == target & ~0x1F_FFFF
        assert item & 0x80


def test_sizes_that_do_not_fit() -> None:
    kernel = parse_kernel(bzimage())
    with pytest.raises(BootError, match="needs 20 MiB"):
        load_linux(GuestMemory(8 * MIB), kernel)
    with pytest.raises(BootError, match="initrd of 16"):
        load_linux(GuestMemory(32 * MIB), kernel, initrd=bytes(16 * MIB))
    with pytest.raises(BootError, match="initrd of 64"):
        load_linux(GuestMemory(32 * MIB), kernel, initrd=bytes(64 * MIB))
    with pytest.raises(BootError, match="command line"):
        load_linux(GuestMemory(32 * MIB), kernel, command_line="x" * 5000)
    with pytest.raises(BootError, match="NUL"):
        load_linux(GuestMemory(32 * MIB), kernel, command_line="a\0b")
    with pytest.raises(BootError, match="too much"):
        load_linux(GuestMemory(MOST_MEMORY + 4096), kernel)


def test_payloads_are_unpacked() -> None:
    wanted = elf(b"\x90" * 1000)
    assert unpack_kernel(bzimage(gzip.compress(wanted))) == wanted
    assert unpack_kernel(bzimage(lzma.compress(wanted))) == wanted
    with pytest.raises(BootError, match="no ELF"):
        unpack_kernel(bzimage(gzip.compress(b"something else")))
    with pytest.raises(BootError, match="not known"):
        unpack_kernel(bzimage(b"?" * 100))
    damaged = bytearray(lzma.compress(wanted))
    damaged[20:40] = bytes(20)
    with pytest.raises(BootError, match="damaged"):
        unpack_kernel(bzimage(bytes(damaged)))


def test_legacy_lz4_payload() -> None:
    block = pytest.importorskip("lz4.block")
    wanted = elf(bytes(9 << 20))
    payload = b"\x02\x21\x4c\x18"
    for at in range(0, len(wanted), 8 << 20):
        packed = block.compress(wanted[at : at + (8 << 20)], store_size=False)
        payload += len(packed).to_bytes(4, "little") + packed
    assert unpack_kernel(bzimage(payload + len(wanted).to_bytes(4, "little"))) == wanted


def bomb(kind: str, size: int) -> bytes:
    """A payload that unpacks to an ELF file's first bytes and `size` zeros."""
    if kind == "gzip":
        return gzip.compress(elf(b"\x90") + bytes(size), 9)
    if kind == "xz":
        return lzma.compress(elf(b"\x90") + bytes(size))
    if kind == "lzma":
        return lzma.compress(elf(b"\x90") + bytes(size), lzma.FORMAT_ALONE)
    if kind == "bzip2":
        return bz2.compress(elf(b"\x90") + bytes(size))
    if kind == "zstd":
        return bytes(pytest.importorskip("zstandard").compress(elf(b"\x90") + bytes(size)))
    block = pytest.importorskip("lz4.block")
    packed = block.compress(bytes(8 << 20), store_size=False)
    return b"\x02\x21\x4c\x18" + (len(packed).to_bytes(4, "little") + packed) * (size >> 23)


KINDS = ["gzip", "xz", "lzma", "bzip2", "zstd", "lz4"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_file_does_not_unpack_to_more_than_a_kernel_has(kind: str) -> None:
    size = 1200 * MIB if kind == "lz4" else 48 * MIB  # LZ4 packs to 1/255 at best
    payload = bomb(kind, size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(KernelError, match="unpacks to more than"):
        unpack_kernel(bzimage(payload))
    most = max(16 * MIB, 64 * len(payload)) + 8 * MIB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3 * most >> 10


@pytest.mark.parametrize("kind", KINDS)
def test_what_fits_a_kernel_and_not_the_memory_is_said(kind: str) -> None:
    with pytest.raises(SizeError, match="more than 4 MiB, all of the memory"):
        unpack_kernel(bzimage(bomb(kind, 8 * MIB)), 4 * MIB)


def test_a_format_that_wants_a_gigabyte_to_unpack_is_refused() -> None:
    packed = bytearray(lzma.compress(elf(b"\x90"), lzma.FORMAT_ALONE, preset=0))
    packed[1:5] = (1 << 30).to_bytes(4, "little")
    with pytest.raises(KernelError, match="damaged"):
        unpack_kernel(bzimage(bytes(packed)))


def elf_of(headers: list[tuple[int, int, int, int]], contents: bytes) -> bytes:
    """An ELF64 file with program headers (offset in the contents, address, bytes in the file, bytes in memory)."""
    one = elf(b"")
    start = 64 + 56 * len(headers)
    table = b"".join(
        struct.pack("<IIQQQQQQ", 1, 7, start + offset, address, address, in_file, in_memory, 0x1000)
        for offset, address, in_file, in_memory in headers
    )
    return one[:56] + struct.pack("<H", len(headers)) + one[58:64] + table + contents


def test_overlapping_program_headers_are_refused() -> None:
    contents = b"\xf4" * 4096
    same = [(0, LOAD_ADDRESS, 4096, 4096)] * 4000
    with pytest.raises(KernelError, match="loads twice"):
        parse_kernel(elf_of(same, contents))
    nested = [(0, LOAD_ADDRESS, 4096, 4096), (0, LOAD_ADDRESS + 64, 8, 8)]
    with pytest.raises(KernelError, match="loads twice"):
        parse_kernel(elf_of(nested, contents))
    with pytest.raises(KernelError, match="for 8 bytes of memory"):
        parse_kernel(elf_of([(0, LOAD_ADDRESS, 4096, 8)], contents))


def test_program_headers_that_share_the_files_bytes_are_kernels() -> None:
    apart = [(0, LOAD_ADDRESS + 4096 * n, 4096, 4096) for n in reversed(range(8))]
    empty = [(0, LOAD_ADDRESS, 0, 65536)] * 3
    kernel = parse_kernel(elf_of(apart + empty, b"\xf4" * 4096))
    assert sum(len(data) for _, data in kernel.segments) == 8 * 4096


@pytest.mark.parametrize("what", ["kernel", "initrd"])
def test_a_file_without_an_end_is_not_read_for_ever(what: str, tmp_path: Path) -> None:
    guest = pytest.importorskip("vmbus.machine.guest")
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(1 << 40)
    files = {"kernel": elf(b"\xf4"), "initrd": b"", what: sparse}
    with pytest.raises(SizeError, match="has more than"):
        guest.Machine(files["kernel"], initrd=files["initrd"], memory=16 * MIB)


def test_disks_and_files_that_are_missing(tmp_path: Path) -> None:
    guest = pytest.importorskip("vmbus.machine.guest")
    with pytest.raises(OSError, match="No such file"):
        guest.Machine(tmp_path / "vmlinuz")
    with pytest.raises(BootError, match="memory"):
        guest.Machine(elf(b"\xf4"), memory=1000)
