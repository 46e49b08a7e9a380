"""Fuzz targets: VHD and VHDX files that somebody damaged, with right checksums or wrong ones."""

import random
import re
import struct
from contextlib import suppress
from pathlib import Path
from uuid import UUID

import pytest
from reference.disk_model import fast_folder
from reference.disk_user import use
from reference.fuzz import Fuzz
from reference.mutation import WORDS
from reference.vhd_writer import scattered, write_vhd

from vmbus.core.crc32c import crc32c
from vmbus.storage.disk import DiskError
from vmbus.storage.images import Format, create_vhd, create_vhdx, open_disk
from vmbus.storage.images.hostfile import HostFile
from vmbus.storage.images.vhdx_log import LogWriter
from vmbus.trace.ledger import Account

MIB = 1 << 20
KIB64 = 64 << 10
METADATA, BAT = 2 * MIB, 3 * MIB  # where our own VHDX images have them
tmp_path = pytest.fixture(fast_folder, name="tmp_path")

Areas = list[tuple[int, int]]


def vhd_sum(raw: bytearray, start: int, length: int, at: int) -> None:
    raw[start + at : start + at + 4] = bytes(4)
    struct.pack_into(">I", raw, start + at, ~sum(raw[start : start + length]) & 0xFFFFFFFF)


def vhdx_sum(raw: bytearray, start: int, length: int) -> None:
    raw[start + 4 : start + 8] = bytes(4)
    struct.pack_into("<I", raw, start + 4, crc32c(raw[start : start + length]))


def damage(rng: random.Random, raw: bytearray, areas: Areas, order: str) -> None:
    """Bits and whole fields of what describes the image."""
    for _ in range(rng.choice([1, 1, 2, 8])):
        start, length = rng.choice(areas)
        at = start + rng.randrange(length)
        if rng.random() < 0.5:
            raw[at] ^= 1 << rng.randrange(8)
        else:
            size = rng.choice([2, 4, 8])
            at -= at % size
            value = rng.choice([*WORDS, rng.getrandbits(64), len(raw), rng.randrange(len(raw)), 1 << 63])
            value = value if rng.random() < 0.7 else value // MIB * MIB | rng.randrange(8)
            raw[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, order)  # type: ignore[arg-type]
    if rng.random() < 0.05:
        del raw[rng.randrange(len(raw)) :]


def judge(rng: random.Random, victim: Path, raw: bytearray, image_format: Format) -> None:
    """One clear sentence and an untouched file, or a disk that works; never another exception."""
    victim.write_bytes(raw)
    sentence = ""
    try:
        disk = open_disk(victim, read_only=True, format=image_format)
    except DiskError as error:
        sentence = str(error)
    if sentence:
        assert re.fullmatch(r"[^\n]{10,1010}", sentence)
        with pytest.raises(DiskError):
            open_disk(victim, format=image_format)
        assert victim.read_bytes() == raw
        return
    with disk:
        use(rng, disk, 10)
    assert victim.read_bytes() == raw
    try:
        disk = open_disk(victim, format=image_format)
    except DiskError as error:
        sentence = str(error)
    if sentence:  # only this one can be read and not be written
        assert "leaves no room for changes" in sentence
        assert victim.read_bytes() == raw
        return
    with disk, suppress(DiskError):  # a full host disk, for instance
        use(rng, disk, 10)


def test_vhd(fuzz: Fuzz, tmp_path: Path) -> None:
    path, parent, child, fixed = (tmp_path / name for name in ("dynamic", "parent", "child", "fixed"))
    with create_vhd(path, 4 * MIB, block_size=512 << 10) as disk:
        for block in (0, 2, 5):
            disk.write(block * (512 << 10), b"x" * 512)
    create_vhd(parent, 4 * MIB, block_size=512 << 10).close()
    with create_vhd(child, parent=parent, block_size=512 << 10) as disk:
        disk.write(MIB, b"y" * 512)
    create_vhd(fixed, MIB, variant="fixed").close()
    others = tmp_path / "others"  # sectors that nobody wrote, and a table that the format does not know
    blocks = scattered(1, 4 * MIB, 512 << 10)
    write_vhd(others, 4 * MIB, 512 << 10, blocks, batmap=True)
    originals = [path.read_bytes(), child.read_bytes(), fixed.read_bytes(), others.read_bytes()]
    victim = tmp_path / "victim"

    def case(rng: random.Random) -> None:
        raw = bytearray(rng.choice(originals))
        size = len(raw)
        dynamic = raw[:8] == b"conectix"
        damage(
            rng,
            raw,
            [(0, 2048), (0, 512), (1536, 1536), (size - 512, 512)] if dynamic else [(size - 512, 512)],
            "big",
        )
        if rng.random() < 0.8 and len(raw) == size:  # somebody who knows the checksums
            vhd_sum(raw, size - 512, 512, 64)
            if dynamic:
                vhd_sum(raw, 0, 512, 64)
                vhd_sum(raw, 512, 1024, 36)
        judge(rng, victim, raw, "vhd")

    fuzz.run(case, cases=7000)


def with_a_log(path: Path) -> tuple[bytes, Areas]:
    """The same image with an entry in its log that was not replayed; and where that lies."""
    host = HostFile(path, read_only=False, account=Account())
    guid = bytes(range(16, 32))
    LogWriter(host, UUID(bytes_le=guid), MIB, MIB).write({BAT: path.read_bytes()[BAT : BAT + 4096]})
    host.close()
    raw = bytearray(path.read_bytes())
    for start in (KIB64, 2 * KIB64):
        raw[start + 48 : start + 64] = guid
        vhdx_sum(raw, start, 4096)
    return bytes(raw), [(MIB, 128)] * 8


def test_vhdx(fuzz: Fuzz, tmp_path: Path) -> None:
    path, parent, child = (tmp_path / name for name in ("dynamic", "parent", "child"))
    with create_vhdx(path, 8 * MIB, block_size=MIB) as disk:
        for block in (0, 2, 5):
            disk.write(block * MIB, b"x" * 512)
    create_vhdx(parent, 8 * MIB, block_size=MIB).close()
    with create_vhdx(child, parent=parent, block_size=MIB) as disk:
        disk.write(MIB, b"y" * 512)
    table, metadata = 16 + 64, 32 + 32 * 6
    areas = [(KIB64, 80), (2 * KIB64, 80), (3 * KIB64, table), (4 * KIB64, table)]
    areas += [(METADATA, metadata), (METADATA + KIB64, 64), (BAT, 64), (BAT, 64)]
    originals: list[tuple[bytes, Areas]] = [(path.read_bytes(), areas), (child.read_bytes(), areas)]
    logged, more = with_a_log(path)
    originals.append((logged, areas + more))
    victim = tmp_path / "victim"

    def case(rng: random.Random) -> None:
        original, places = rng.choice(originals)
        raw = bytearray(original)
        damage(rng, raw, places, "little")
        if rng.random() < 0.8 and len(raw) == len(original):  # somebody who knows the checksums
            for start, length in ((KIB64, 4096), (2 * KIB64, 4096), (3 * KIB64, KIB64), (4 * KIB64, KIB64)):
                vhdx_sum(raw, start, length)
            if original is logged:
                vhdx_sum(raw, MIB, 2 * 4096)
        judge(rng, victim, raw, "vhdx")

    fuzz.run(case, cases=5000)
