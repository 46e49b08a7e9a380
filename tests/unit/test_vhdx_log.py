"""Replaying the log of a VHDX: what wins where changes meet, and how much work hostile logs make."""

import random
import struct
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from reference.disk_model import fast_folder, qemu_img
from reference.work import bounded

from vmbus.core.crc32c import crc32c
from vmbus.storage.disk import DiskError
from vmbus.storage.images import create_vhdx, open_disk
from vmbus.storage.images.hostfile import HostFile
from vmbus.storage.images.vhdx_log import find_replay
from vmbus.trace.ledger import Account

MIB = 1 << 20
PAGE = 4096
GUID = UUID(int=7)
LOG, LENGTH = MIB, MIB
tmp_path = pytest.fixture(fast_folder, name="tmp_path")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HostFile]:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
    made = HostFile(path, read_only=False, account=Account())
    yield made
    made.close()


def sealed(raw: bytes) -> bytes:
    return raw[:4] + struct.pack("<I", crc32c(raw[:4] + bytes(4) + raw[8:])) + raw[8:]


def entry(sequence: int, tail: int, changes: list[tuple[int, int | bytes]], size: int = 4 * MIB) -> bytes:
    """A log entry of changes in order: an offset with a page's content, or with how many bytes become zeros."""
    descriptors, sectors = b"", b""
    for at, what in changes:
        if isinstance(what, int):
            descriptors += struct.pack("<4sIQQQ", b"zero", 0, what, at, sequence)
        else:
            descriptors += struct.pack("<4s4s8sQQ", b"desc", what[-4:], what[:8], at, sequence)
            sectors += struct.pack("<4sI4084sI", b"data", 0, what[8:-4], sequence)
    head = -(-(64 + len(descriptors)) // PAGE) * PAGE
    length = head + len(sectors)
    raw = struct.pack(
        "<4sIIIQII16sQQ", b"loge", 0, length, tail, sequence, len(changes), 0, GUID.bytes_le, 4 * MIB, size
    )
    return sealed((raw + descriptors).ljust(head, b"\0") + sectors)


@pytest.mark.parametrize("seed", range(30))
def test_the_last_change_wins_where_changes_overlap(host: HostFile, seed: int) -> None:
    """Against a model that makes each change in turn."""
    rnd = random.Random(seed)
    base, pages = 2 * MIB, 12
    model = bytearray(rnd.randbytes(1) * pages * PAGE)
    host.write(base, model)
    at = 0
    for sequence in range(1, rnd.randrange(2, 6)):
        changes: list[tuple[int, int | bytes]] = []
        for _ in range(rnd.randrange(12)):
            page = rnd.randrange(pages)
            if rnd.random() < 0.5:
                length = rnd.randrange(pages - page + 1) * PAGE
                changes.append((base + page * PAGE, length))
                model[page * PAGE : page * PAGE + length] = bytes(length)
            else:
                content = rnd.randbytes(PAGE)
                changes.append((base + page * PAGE, content))
                model[page * PAGE : (page + 1) * PAGE] = content
        raw = entry(sequence, 0, changes)
        host.write(LOG + at, raw)
        at += len(raw)
    host.overlay = find_replay(host, GUID, LOG, LENGTH)
    assert host.read(base, len(model)) == model
    for _ in range(20):
        start = rnd.randrange(len(model))
        length = rnd.randrange(len(model) - start + 1)
        assert host.read(base + start, length) == model[start : start + length]


def test_the_length_of_zeroed_stretches_makes_no_work(host: HostFile) -> None:
    """Stretches of tens of GiB, each named again and again by a log of 1 MiB."""
    count = (LENGTH - PAGE) // 32
    changes: list[tuple[int, int | bytes]] = [(4 * MIB + PAGE * (i % 50), 64 << 30) for i in range(count)]
    host.write(LOG, entry(1, 0, changes, size=100 << 30))
    with bounded(lines=2 * LENGTH, read=2 * LENGTH):
        replay = find_replay(host, GUID, LOG, LENGTH)
    assert list(replay.zeros) == [(4 * MIB, 4 * MIB + 49 * PAGE + (64 << 30))]


def test_entries_that_all_name_one_tail_are_each_looked_at_once(host: HostFile) -> None:
    """A broken entry in the middle; every entry behind it claims a sequence from before it."""
    count = LENGTH // PAGE
    for index in range(count):
        raw = bytearray(entry(index + 1, 0, []))
        raw[100] ^= index == count // 2
        host.write(LOG + index * PAGE, raw)
    with bounded(lines=200 * count, read=2 * LENGTH):
        replay = find_replay(host, GUID, LOG, LENGTH)
    assert not replay
    raw = bytearray(entry(1, 0, []))
    raw[100] ^= 1
    host.write(LOG, raw)  # now none of them has its tail
    for index in range(1, count // 2):
        host.write(LOG + index * PAGE, entry(index + 1, 0, []))
    with (
        bounded(lines=200 * count, read=2 * LENGTH),
        pytest.raises(DiskError, match="no complete entry"),
    ):
        find_replay(host, GUID, LOG, LENGTH)


def test_more_changes_than_any_log_needs_are_refused(tmp_path: Path) -> None:
    """The largest log, filled with descriptors: refused before they are gone through."""
    length = 16 * MIB
    path = tmp_path / "large"
    count = (length - PAGE) // 32
    raw = struct.pack(
        "<4sIIIQII16sQQ", b"loge", 0, length, 0, 1, count, 0, GUID.bytes_le, 4 * MIB, 4 * MIB
    ).ljust(length, b"\0")
    path.write_bytes(bytes(LOG) + sealed(raw))
    host = HostFile(path, read_only=True, account=Account())
    with bounded(lines=200_000, read=2 * length), pytest.raises(DiskError, match="absurd number of changes"):
        find_replay(host, GUID, LOG, length)
    host.close()


def test_a_replay_makes_of_the_file_what_was_seen_before(tmp_path: Path) -> None:
    """Zeros over a block, a page written over them, and zeros behind the end of a file that grows."""
    path = tmp_path / "image.vhdx"
    with create_vhdx(path, 8 * MIB, block_size=MIB) as disk:
        disk.write(0, b"a" * 2 * MIB)
        disk.write(5 * MIB, b"b" * MIB)
    raw = bytearray(path.read_bytes())
    block = len(raw) - 3 * MIB  # the first that was written
    page = bytes(range(1, 129)) * 32
    size = len(raw) + 2 * MIB
    log = entry(3, 0, [(block + PAGE, MIB), (block + 4 * PAGE, page), (len(raw) - PAGE, MIB)], size)
    raw[LOG : LOG + len(log)] = log
    for start in (64 << 10, 128 << 10):
        raw[start + 48 : start + 64] = GUID.bytes_le
        raw[start : start + PAGE] = sealed(bytes(raw[start : start + PAGE]))
    path.write_bytes(raw)
    expected = bytearray(b"a" * 2 * MIB + bytes(3 * MIB) + b"b" * MIB + bytes(2 * MIB))
    expected[PAGE : PAGE + MIB] = bytes(MIB)
    expected[4 * PAGE : 5 * PAGE] = page
    expected[6 * MIB - PAGE : 6 * MIB] = bytes(PAGE)
    with open_disk(path, read_only=True) as disk:
        assert disk.read(0, 8 * MIB) == expected
    assert path.read_bytes() == raw
    with open_disk(path) as disk:
        assert disk.read(0, 8 * MIB) == expected
    assert path.stat().st_size == size
    with open_disk(path, read_only=True) as disk:
        assert disk.read(0, 8 * MIB) == expected
    qemu_img("check", path)
