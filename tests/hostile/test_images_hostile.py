"""Images that somebody broke, by hand and by chance: one clear sentence, and the file is not touched."""

import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest
from reference.disk_model import fast_folder

from vmbus.core.crc32c import crc32c
from vmbus.storage.disk import DiskError
from vmbus.storage.images import create_vhd, create_vhdx, open_disk
from vmbus.storage.images.hostfile import HostFile
from vmbus.storage.images.vhdx_log import LogWriter
from vmbus.trace.ledger import Account

MIB = 1 << 20
tmp_path = pytest.fixture(fast_folder, name="tmp_path")
KIB64 = 64 << 10


def vhd_sum(raw: bytearray, start: int, length: int, at: int) -> None:
    raw[start + at : start + at + 4] = bytes(4)
    struct.pack_into(">I", raw, start + at, ~sum(raw[start : start + length]) & 0xFFFFFFFF)


def vhdx_sum(raw: bytearray, start: int, length: int) -> None:
    raw[start + 4 : start + 8] = bytes(4)
    struct.pack_into("<I", raw, start + 4, crc32c(raw[start : start + length]))


@pytest.fixture
def dynamic_vhd(tmp_path: Path) -> Path:
    path = tmp_path / "image.vhd"
    with create_vhd(path, 4 * MIB, block_size=512 << 10) as disk:
        for block in (0, 2, 5):
            disk.write(block * (512 << 10), b"x" * 512)
    return path


@pytest.fixture
def dynamic_vhdx(tmp_path: Path) -> Path:
    path = tmp_path / "image.vhdx"
    with create_vhdx(path, 8 * MIB, block_size=MIB) as disk:
        for block in (0, 2, 5):
            disk.write(block * MIB, b"x" * 512)
    return path


def refused(path: Path, sentence: str) -> None:
    """Opening fails with this one sentence, for reading and for writing, and changes nothing."""
    before = path.read_bytes()
    for read_only in (True, False):
        with pytest.raises(DiskError, match=sentence) as caught:
            open_disk(path, read_only=read_only)
        assert str(caught.value).startswith(str(path.parent))
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def edit(path: Path, change: Callable[[bytearray], None]) -> None:
    raw = bytearray(path.read_bytes())
    change(raw)
    path.write_bytes(raw)


def vhd_header(offset: int, layout: str, value: int) -> Callable[[bytearray], None]:
    def change(raw: bytearray) -> None:
        struct.pack_into(layout, raw, 512 + offset, value)
        vhd_sum(raw, 512, 1024, 36)

    return change


def vhd_footer(offset: int, layout: str, value: int) -> Callable[[bytearray], None]:
    def change(raw: bytearray) -> None:
        for start in (0, len(raw) - 512):
            struct.pack_into(layout, raw, start + offset, value)
            vhd_sum(raw, start, 512, 64)

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (vhd_footer(12, ">I", 0x00020000), "version 2 is not known"),
        (vhd_footer(60, ">I", 6), "disk type 6 is not known"),
        (vhd_footer(48, ">Q", 1 << 60), "not possible in a VHD"),
        (vhd_footer(48, ">Q", 0), "not possible in a VHD"),
        (vhd_footer(48, ">Q", 4 * MIB + 1), "not possible in a VHD"),
        (vhd_footer(48, ">Q", 64 * MIB), "block table has 8 entries for 128 blocks"),
        (vhd_footer(16, ">Q", 1 << 62), "header at byte .* is not in the file"),
        (vhd_footer(16, ">Q", 513), "header at byte 513 is not in the file"),
        (vhd_header(0, ">Q", 0), "header has no cookie"),
        (vhd_header(32, ">I", 3 << 19), "block size of 1572864 bytes is not possible"),
        (vhd_header(32, ">I", 0), "block size of 0 bytes is not possible"),
        (vhd_header(32, ">I", 1 << 31), "block size of 2147483648 bytes is not possible"),
        (vhd_header(16, ">Q", 1 << 63), "table at byte .* is not in the file"),
        (vhd_header(24, ">I", 0x00020000), "header version 2 is not known"),
        (lambda raw: struct.pack_into(">I", raw, 512 + 36, 0), "header's checksum is wrong"),
        (lambda raw: struct.pack_into(">I", raw, 1536, 0), "two blocks overlap"),
        (lambda raw: struct.pack_into(">I", raw, 1536, 0xFFFFFFFE), "block 0 reaches past the end"),
        (lambda raw: raw.__setitem__(slice(1536, 1540), raw[1544:1548]), "two blocks overlap"),
        (lambda raw: raw.__delitem__(slice(len(raw) - MIB, None)), "block 5 reaches past the end"),
        (lambda raw: raw.__delitem__(slice(1024, None)), "header at byte 512 is not in the file"),
    ],
)
def test_broken_vhds(dynamic_vhd: Path, change: Callable[[bytearray], None], sentence: str) -> None:
    edit(dynamic_vhd, change)
    refused(dynamic_vhd, sentence)


def test_a_small_file_with_a_huge_table_costs_nothing(tmp_path: Path) -> None:
    """Sparse files can claim anything: what they claim is not allocated, and not gone through."""
    path = tmp_path / "huge.vhd"
    create_vhd(path, 4 * MIB, block_size=4096).close()
    edit(path, vhd_header(28, ">I", 0x1FE00000))
    edit(path, vhd_footer(48, ">Q", 2040 << 30))
    os.truncate(path, 4 << 30)
    with pytest.raises(DiskError, match="entries is absurd"):
        open_disk(path)
    image = tmp_path / "huge.vhdx"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with create_vhdx(image, 64 << 40, block_size=MIB) as disk:
        disk.write(disk.size - 4096, b"x" * 4096)
        disk.flush()
        assert [tuple(extent) for extent in disk.extents(0, disk.size)] == [
            (0, disk.size - 4096, False),
            (disk.size - 4096, 4096, True),
        ]
        disk.unmap(0, disk.size)
    with open_disk(image) as disk:
        assert [extent.allocated for extent in disk.extents(0, disk.size)] == [False]
    assert os.stat(image).st_blocks * 512 < 32 * MIB
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 128 << 10
    )  # in KiB; the table has 512 MiB


@pytest.mark.slow
def test_a_chain_may_be_long_but_not_without_an_end(tmp_path: Path) -> None:
    create_vhd(tmp_path / "0", MIB, block_size=4096).close()
    for number in range(1, 127):
        with create_vhd(tmp_path / str(number), parent=tmp_path / str(number - 1), block_size=4096) as disk:
            disk.write(number * 512, bytes([number]) * 512)
    with open_disk(tmp_path / "126", read_only=True) as disk:
        assert disk.read(0, 127 * 512) == b"".join(bytes([number]) * 512 for number in range(127))
    create_vhd(tmp_path / "127", parent=tmp_path / "126", block_size=4096).close()
    with pytest.raises(DiskError, match="longer than 128"):
        create_vhd(tmp_path / "128", parent=tmp_path / "127", block_size=4096)


def test_a_vhd_without_any_intact_footer(dynamic_vhd: Path) -> None:
    def change(raw: bytearray) -> None:
        raw[100] ^= 1
        raw[-400] ^= 1

    edit(dynamic_vhd, change)
    refused(dynamic_vhd, "footer's checksum is wrong")


def test_a_vhd_survives_the_loss_of_one_footer(dynamic_vhd: Path) -> None:
    edit(dynamic_vhd, lambda raw: raw.__delitem__(slice(len(raw) - 512, None)))
    with open_disk(dynamic_vhd) as disk:
        disk.write(7 * (512 << 10), b"y" * 512)
    assert dynamic_vhd.read_bytes()[-512:] == dynamic_vhd.read_bytes()[:512]


def test_a_fixed_vhd_with_the_511_byte_footer_of_old_virtual_pc(tmp_path: Path) -> None:
    path = tmp_path / "fixed.vhd"
    with create_vhd(path, MIB, variant="fixed") as disk:
        disk.write(MIB - 512, b"last".ljust(512))
    edit(path, lambda raw: raw.__delitem__(slice(len(raw) - 1, None)))
    before = path.read_bytes()
    assert len(before) == MIB + 511
    with open_disk(path) as disk:
        assert disk.size == MIB
        assert disk.read(MIB - 512, 512) == b"last".ljust(512)
        disk.write(MIB - 1024, b"more".ljust(512))
    assert path.read_bytes() == before[: MIB - 1024] + b"more".ljust(512) + before[MIB - 512 :]


def test_a_dynamic_vhd_with_the_511_byte_footer_of_old_virtual_pc(dynamic_vhd: Path) -> None:
    edit(dynamic_vhd, lambda raw: raw.__delitem__(slice(len(raw) - 1, None)))
    edit(dynamic_vhd, lambda raw: raw.__setitem__(slice(0, 8), bytes(8)))  # the copy is of no use
    with open_disk(dynamic_vhd) as disk:
        assert disk.read(2 * (512 << 10), 512) == b"x" * 512
        disk.write(7 * (512 << 10), b"y" * 512)
    assert dynamic_vhd.read_bytes()[-512:-504] == b"conectix"


def test_a_vhdx_of_specification_1_00_numbers_unmapped_blocks_otherwise(dynamic_vhdx: Path) -> None:
    edit(dynamic_vhdx, vhdx_at(BAT, "<Q", 5))
    with open_disk(dynamic_vhdx) as disk:
        assert disk.read(0, MIB) == bytes(MIB)
        assert not next(iter(disk.extents(0, MIB))).allocated
        disk.write(512, b"y" * 512)
    with open_disk(dynamic_vhdx) as disk:
        assert disk.read(0, 2048) == bytes(512) + b"y" * 512 + bytes(1024)


def test_a_fixed_vhd_that_is_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "fixed.vhd"
    create_vhd(path, MIB, variant="fixed").close()
    edit(path, lambda raw: raw.__delitem__(slice(1000, 2024)))
    refused(path, "cut short")


def vhdx_region(index: int, offset: int, layout: str, value: int) -> Callable[[bytearray], None]:
    def change(raw: bytearray) -> None:
        for start in (3 * KIB64, 4 * KIB64):
            struct.pack_into(layout, raw, start + 16 + 32 * index + offset, value)
            vhdx_sum(raw, start, KIB64)

    return change


def vhdx_header(offset: int, layout: str, value: int) -> Callable[[bytearray], None]:
    def change(raw: bytearray) -> None:
        for start in (KIB64, 2 * KIB64):
            struct.pack_into(layout, raw, start + offset, value)
            vhdx_sum(raw, start, 4096)

    return change


def vhdx_header_of(slot: int, offset: int, layout: str, value: int) -> Callable[[bytearray], None]:
    def change(raw: bytearray) -> None:
        struct.pack_into(layout, raw, KIB64 * (1 + slot) + offset, value)
        vhdx_sum(raw, KIB64 * (1 + slot), 4096)

    return change


def vhdx_at(offset: int, layout: str, value: int) -> Callable[[bytearray], None]:
    return lambda raw: struct.pack_into(layout, raw, offset, value)


METADATA, BAT = 2 * MIB, 3 * MIB  # where our own images have them


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda raw: raw.__delitem__(slice(5000, None)), "cut short"),
        (lambda raw: raw.__delitem__(slice(len(raw) - MIB, None)), "entry 5 reaches past the end"),
        (lambda raw: raw.__delitem__(slice(BAT, None)), "not whole MiB inside the file"),
        (lambda raw: [raw.__setitem__(KIB64 * i + 40, 1) for i in (1, 2)], "neither of the two headers"),
        (
            lambda raw: [raw.__setitem__(KIB64 * i + 40, 1) for i in (3, 4)],
            "neither of the two region tables",
        ),
        (vhdx_header(66, "<H", 2), "version 2 is not known"),
        (vhdx_header(68, "<I", 4096), "log's place is not aligned"),
        (vhdx_header(72, "<Q", 1 << 62), "log at byte .* is not in the file"),
        (vhdx_header(8, "<Q", 77), "same sequence number"),
        (vhdx_region(0, 16, "<Q", 1 << 61), "not whole MiB inside the file"),
        (vhdx_region(0, 16, "<Q", 0), "not whole MiB inside the file"),
        (vhdx_region(0, 16, "<Q", METADATA), "impossible state|overlap"),
        (vhdx_region(0, 0, "<Q", 1), "needs the unknown region"),
        (vhdx_at(METADATA, "<Q", 0), "table has no signature"),
        (vhdx_at(METADATA + 10, "<H", 0xFFFF), "65535 entries is not possible"),
        (vhdx_at(METADATA + 32, "<Q", 1), "needs the unknown metadata item"),
        (vhdx_at(METADATA + 32 + 16, "<I", 0xFFFFFFF0), "impossible place"),
        (vhdx_at(METADATA + 32 + 20, "<I", 0), "impossible place or length"),
        (vhdx_at(METADATA + KIB64, "<I", 3 * MIB), "block size of 3145728 bytes"),
        (vhdx_at(METADATA + KIB64, "<I", 0), "block size of 0 bytes"),
        (vhdx_at(METADATA + KIB64 + 4, "<I", 2), "without a parent locator"),
        (vhdx_at(METADATA + KIB64 + 8, "<Q", 1 << 63), "not possible in a VHDX"),
        (vhdx_at(METADATA + KIB64 + 8, "<Q", 60 << 40), "block table has 131072 entries"),
        (vhdx_at(METADATA + KIB64 + 32, "<I", 520), "sector size of 520 bytes"),
        (vhdx_at(BAT, "<Q", 4), "impossible state 4"),
        (vhdx_at(BAT, "<Q", 7 | 4 * MIB), "impossible state 7"),
        (vhdx_at(BAT, "<Q", 6 | METADATA), "overlap"),
        (vhdx_at(BAT, "<Q", 6 | 1 << 60), "entry 0 reaches past the end"),
        (vhdx_at(BAT + 24, "<Q", 6 | (1 << 64) - MIB), "entry 3 reaches past the end"),  # the sum wraps to 0
        (vhdx_at(BAT + 24, "<Q", 6 | (1 << 63)), "entry 3 reaches past the end"),
        (lambda raw: raw.__setitem__(slice(BAT, BAT + 8), raw[BAT + 16 : BAT + 24]), "two blocks overlap"),
    ],
)
def test_broken_vhdxs(dynamic_vhdx: Path, change: Callable[[bytearray], None], sentence: str) -> None:
    edit(dynamic_vhdx, change)
    refused(dynamic_vhdx, sentence)


@pytest.mark.parametrize("number", [1 << 63, (1 << 64) - 1])
def test_a_header_whose_number_has_no_successor_is_only_read(dynamic_vhdx: Path, number: int) -> None:
    edit(dynamic_vhdx, vhdx_header_of(0, 8, "<Q", number))
    before = dynamic_vhdx.read_bytes()
    with pytest.raises(DiskError, match=rf"sequence number {number} leaves no room"):
        open_disk(dynamic_vhdx)
    with open_disk(dynamic_vhdx, read_only=True) as disk:
        assert disk.read(2 * MIB, 512) == b"x" * 512
    assert dynamic_vhdx.read_bytes() == before


def test_a_log_of_an_image_that_cannot_be_changed_is_not_replayed(dynamic_vhdx: Path) -> None:
    log_image(dynamic_vhdx, {BAT: dynamic_vhdx.read_bytes()[BAT : BAT + 4096]}, lambda raw: None)
    edit(dynamic_vhdx, vhdx_header_of(0, 8, "<Q", (1 << 64) - 1))
    before = dynamic_vhdx.read_bytes()
    with pytest.raises(DiskError, match="leaves no room"):
        open_disk(dynamic_vhdx)
    assert dynamic_vhdx.read_bytes() == before


def test_what_older_qemu_left_in_the_entry_of_a_sector_bitmap_means_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In an image without a parent; QEMU up to 7.2.1 moves the first page of the table by one entry."""
    path, ratio = tmp_path / "image.vhdx", 128  # 32 MiB blocks
    with create_vhdx(path, 10 << 30) as disk:
        disk.write(0, b"a" * 4096)
        disk.write(5 << 30, b"b" * 4096)
    for foreign in (2, 3, 7 | 1 << 40, 6 | (1 << 64) - MIB, 6 | METADATA, 4):
        with path.open("r+b") as file:
            file.seek(BAT + 8 * ratio)
            file.write(struct.pack("<Q", foreign))
        caplog.clear()
        with open_disk(path, read_only=True) as disk:
            assert disk.read(0, 8192) == b"a" * 4096 + bytes(4096)
            assert disk.read(5 << 30, 4096) == b"b" * 4096
        # What lies there unnoticed in whole images is not worth a word.
        assert [record.levelname for record in caplog.records] == ["WARNING"] * (foreign & 7 != 6)
    with open_disk(path) as disk:
        disk.write(4 << 30, b"c" * 4096)
        disk.write((4 << 30) - (32 << 20), b"d" * 4096)
    with open_disk(path, read_only=True) as disk:
        assert disk.read(4 << 30, 4096) == b"c" * 4096
        assert disk.read((4 << 30) - (32 << 20), 4096) == b"d" * 4096
    with path.open("rb") as file:
        file.seek(BAT + 8 * ratio)
        assert file.read(8) == bytes(8), "a page of the table that is written is right"


def test_a_parent_locator_in_an_image_without_a_parent_is_not_looked_at(tmp_path: Path) -> None:
    base, child = tmp_path / "base.vhdx", tmp_path / "child.vhdx"
    create_vhdx(base, 4 * MIB).close()
    create_vhdx(child, parent=base).close()

    def change(raw: bytearray) -> None:
        struct.pack_into("<I", raw, METADATA + KIB64 + 4, 0)  # no parent
        struct.pack_into("<II", raw, METADATA + 32 + 32 * 5 + 16, 0, 1 << 31)  # the locator is nowhere

    edit(child, change)
    base.unlink()
    with open_disk(child) as disk:
        assert disk.read(0, 512) == bytes(512)


@pytest.mark.parametrize("suffix", ["vhd", "vhdx"])
def test_chains_that_come_back_to_themselves(suffix: str, tmp_path: Path) -> None:
    make = create_vhdx if suffix == "vhdx" else create_vhd
    base, child = tmp_path / f"base.{suffix}", tmp_path / f"child.{suffix}"
    make(base, 4 * MIB).close()
    make(child, parent=base).close()
    base.unlink()
    os.link(child, base)  # the parent is the image itself, under another name
    refused(child, "chain of parents is a loop")
    base.unlink()
    refused(child, r"parent image was not found, tried .*base")
    make(base, 4 * MIB).close()
    refused(child, "not the parent")
    base.write_bytes(b"something else" * 1000)
    refused(child, "the parent is no image")


def test_a_vhdx_whose_parent_was_written_to(tmp_path: Path) -> None:
    base, child = tmp_path / "base.vhdx", tmp_path / "child.vhdx"
    create_vhdx(base, 4 * MIB).close()
    create_vhdx(child, parent=base).close()
    with open_disk(base) as disk:
        disk.write(0, bytes(512))
    refused(child, "was changed since")


def test_an_image_in_use_is_not_opened_again(dynamic_vhdx: Path) -> None:
    with open_disk(dynamic_vhdx):
        for read_only in (True, False):
            with pytest.raises(DiskError, match="in use"):
                open_disk(dynamic_vhdx, read_only=read_only)
    with (
        open_disk(dynamic_vhdx, read_only=True),
        open_disk(dynamic_vhdx, read_only=True),
        pytest.raises(DiskError, match="in use"),
    ):
        open_disk(dynamic_vhdx)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, sentence in [
        ("fifo", "neither a file|cannot open"),
        (".", "cannot open|neither"),
        ("no", "cannot open"),
    ]:
        with pytest.raises(DiskError, match=sentence):
            open_disk(tmp_path / name, read_only=True)
    (tmp_path / "empty").touch()
    with pytest.raises(DiskError, match="empty"):
        open_disk(tmp_path / "empty")


def log_image(path: Path, pages: dict[int, bytes], change: Callable[[bytearray], None]) -> None:
    """Put an entry with `pages` into the log of a clean image; `change` may break it, before the checksum is made."""
    host = HostFile(path, read_only=False, account=Account())
    guid = os.urandom(16)
    LogWriter(host, UUID(bytes_le=guid), MIB, MIB).write(pages)
    host.close()
    raw = bytearray(path.read_bytes())
    length = struct.unpack_from("<I", raw, MIB + 8)[0]
    change(raw)
    vhdx_sum(raw, MIB, length)
    for start in (KIB64, 2 * KIB64):
        raw[start + 48 : start + 64] = guid
        vhdx_sum(raw, start, 4096)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (vhdx_at(MIB + 64 + 16, "<Q", KIB64), "contradicts itself"),  # the headers are not to be logged
        (vhdx_at(MIB + 64 + 16, "<Q", BAT + 1), "contradicts itself"),
        (vhdx_at(MIB + 64 + 16, "<Q", 1 << 50), "contradicts itself"),
        (vhdx_at(MIB + 64 + 16, "<Q", 1 << 40), "behind the end of the file"),
        (vhdx_at(MIB + 64 + 24, "<Q", 9), "contradicts itself"),
        (vhdx_at(MIB + 64, "<I", 0), "contradicts itself"),
        (vhdx_at(MIB + 4096, "<I", 0), "contradicts itself"),
        (vhdx_at(MIB + 24, "<I", 100), "contradicts itself"),
        (vhdx_at(MIB + 48, "<Q", 1 << 40), "the log needs"),
        (vhdx_at(MIB + 56, "<Q", 1 << 60), "asks for a file"),
        (vhdx_at(MIB + 12, "<I", 4096), "no complete entry"),
        (
            lambda raw: struct.pack_into("<4sIQ", raw, MIB + 64, b"zero", 0, 1 << 44),
            "contradicts|absurd|behind",
        ),
    ],
)
def test_broken_logs(dynamic_vhdx: Path, change: Callable[[bytearray], None], sentence: str) -> None:
    log_image(dynamic_vhdx, {BAT: bytes(4096)}, change)
    refused(dynamic_vhdx, sentence)


def test_a_log_that_leads_to_a_broken_image_is_not_replayed(dynamic_vhdx: Path) -> None:
    log_image(dynamic_vhdx, {BAT: struct.pack("<Q", 6 | 1 << 60).ljust(4096, b"\0")}, lambda raw: None)
    refused(dynamic_vhdx, "entry 0 reaches past the end")


def test_a_torn_log_is_refused(dynamic_vhdx: Path) -> None:
    log_image(dynamic_vhdx, {BAT: bytes(4096)}, lambda raw: None)
    edit(dynamic_vhdx, lambda raw: raw.__setitem__(MIB + 5000, raw[MIB + 5000] ^ 1))
    refused(dynamic_vhdx, "no complete entry")


def test_a_log_full_of_overlapping_entries_ends_in_time(dynamic_vhdx: Path) -> None:
    def change(raw: bytearray) -> None:
        head = bytes(raw[MIB : MIB + 64])
        for at in range(0, MIB, 4096):
            raw[MIB + at : MIB + at + 64] = head
            struct.pack_into("<II", raw, MIB + at + 8, MIB, at)
            struct.pack_into("<Q", raw, MIB + at + 16, 1 + at)

    log_image(dynamic_vhdx, {BAT: bytes(4096)}, change)
    refused(dynamic_vhdx, "overlap|no complete entry")
