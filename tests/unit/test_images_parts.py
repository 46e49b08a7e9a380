"""The pieces of the image formats: free space, sector bitmaps, geometry, checksums, the log."""

import random
import struct
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote
from uuid import UUID, uuid4

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.disk_model import fast_folder, qemu_img
from reference.vhd_writer import write_vhd
from reference.work import bounded

from vmbus.core.crc32c import crc32c
from vmbus.storage.disk import DiskError
from vmbus.storage.images import create_vhd, create_vhdx, open_disk
from vmbus.storage.images.hostfile import HostFile, SharedLock
from vmbus.storage.images.parents import windows_relative
from vmbus.storage.images.space import SectorBits, SpaceMap
from vmbus.storage.images.vhd_wire import file_url_paths, geometry
from vmbus.storage.images.vhdx_log import LogWriter, find_replay
from vmbus.storage.images.vhdx_wire import chunk_ratio, table_entries
from vmbus.trace.ledger import Account

MIB = 1 << 20
tmp_path = pytest.fixture(fast_folder, name="tmp_path")
PAGE = 4096


@pytest.mark.parametrize(
    ("data", "checksum"),
    [  # RFC 3720 B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_crc32c(data: bytes, checksum: int) -> None:
    assert crc32c(data) == checksum
    for cut in range(len(data)):
        assert crc32c(data[cut:], crc32c(data[:cut])) == checksum


@given(st.integers(1, 1 << 34))
def test_vhd_geometry_stays_inside_what_ata_can_say(sectors: int) -> None:
    cylinders, heads, per_track = geometry(sectors)
    assert cylinders <= 65535
    assert heads <= 16
    assert per_track in (17, 31, 63, 255)
    assert cylinders * heads * per_track <= sectors


@pytest.mark.parametrize("size", [MIB, 33 * MIB, 700 * MIB, 100 << 30])
def test_vhd_geometry_is_that_of_qemu(size: int, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs.vhd", tmp_path / "ours.vhd"
    qemu_img("create", "-f", "vpc", theirs, str(size))  # rounds the size up to whole cylinders
    create_vhd(ours, int.from_bytes(theirs.read_bytes()[48:56], "big")).close()
    assert theirs.read_bytes()[56:60] == ours.read_bytes()[56:60]


@pytest.mark.parametrize(
    ("block", "sector", "ratio"), [(MIB, 512, 4096), (32 * MIB, 512, 128), (MIB, 4096, 32768)]
)
def test_vhdx_chunks(block: int, sector: int, ratio: int) -> None:
    assert chunk_ratio(block, sector) == ratio
    assert table_entries(ratio * block, block, sector, differencing=False) == ratio
    assert table_entries(ratio * block + 1, block, sector, differencing=False) == ratio + 2
    assert table_entries(1, block, sector, differencing=True) == ratio + 1
    assert table_entries(ratio * block + 1, block, sector, differencing=True) == 2 * (ratio + 1)


def space(*used: tuple[int, int], end: int = 100, alignment: int = 1, lead: int = 0) -> SpaceMap:
    rows = np.array(used, dtype=np.uint64).reshape(-1, 2)
    return SpaceMap(Path("image"), rows, end, alignment=alignment, lead=lead)


def test_space_is_found_in_gaps_first() -> None:
    free = space((0, 10), (20, 30), (60, 40))
    assert free.allocate(10) == (10, False)
    assert free.allocate(11) == (100, True)
    assert free.allocate(10) == (50, False)
    assert free.allocate(1) == (111, True)


def test_space_that_was_freed_waits_for_the_commit() -> None:
    free = space((0, 100))
    free.release(20, 30)
    assert free.pending == 30
    assert free.allocate(30) == (100, True)
    assert free.settle() == [(20, 30)]
    assert free.pending == 0
    assert free.allocate(30) == (20, False)
    free.cancel(20, 30)
    assert free.allocate(30) == (20, False)


def test_space_is_aligned_as_asked() -> None:
    free = space((0, 3), end=3, alignment=8, lead=1)
    assert free.allocate(10) == (7, True)
    assert free.allocate(2) == (23, True)
    assert free.allocate(4) == (31, True)  # the gaps have room, but not at the right places


def test_overlaps_and_ends_are_refused() -> None:
    with pytest.raises(DiskError, match="overlap at byte 9"):
        space((0, 10), (9, 2))
    with pytest.raises(DiskError, match="past the end"):
        space((90, 11))


@given(st.lists(st.tuples(st.sampled_from(["allocate", "cancel", "release", "settle"]), st.integers(1, 20))))
def test_no_byte_is_handed_out_twice(work: list[tuple[str, int]]) -> None:
    free, held = space((0, 7), (40, 13), end=80, alignment=4), [(0, 7), (40, 13)]
    waiting: list[tuple[int, int]] = []
    for what, number in work:
        if what == "allocate":
            at, _ = free.allocate(number)
            assert at % 4 == 0
            for start, length in held + waiting:
                assert at + number <= start or at >= start + length
            held.append((at, number))
        elif what == "settle":
            assert free.settle() == waiting
            waiting = []
        elif held:
            stretch = held.pop(number % len(held))
            if what == "release":
                free.release(*stretch)
                waiting.append(stretch)
            else:
                free.cancel(*stretch)


def test_gaps_that_are_too_small_are_looked_at_once() -> None:
    """However many there are: a writer of images chooses where the blocks lie."""
    gaps, block = 5000, 64 * PAGE
    rows = np.empty((gaps, 2), np.uint64)
    rows[:, 0] = np.arange(gaps, dtype=np.uint64) * np.uint64(block + PAGE)
    rows[:, 1] = block
    space = SpaceMap(Path("image"), rows, gaps * (block + PAGE), alignment=PAGE)
    with bounded(lines=gaps * 60, read=0):
        places = [space.allocate(block)[0] for _ in range(gaps)]
        assert space.allocate(PAGE) == (block, False)  # what fits is still found
    assert places == [gaps * (block + PAGE) + number * block for number in range(gaps)]
    space.cancel(places[7], block)
    assert space.allocate(block) == (places[7], False)
    space.release(0, block)
    assert space.allocate(block)[1]
    space.settle()
    assert space.allocate(block) == (0, False)


@pytest.fixture
def host(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(bytes(MIB))
    made = HostFile(path, read_only=False, account=Account())
    yield made
    made.close()


@pytest.mark.parametrize("big", [True, False])
@settings(deadline=None)  # the machine may be busy
@given(work=st.lists(st.tuples(st.integers(0, 9999), st.integers(1, 9000), st.booleans()), max_size=12))
def test_sector_bits_are_a_list_of_booleans(
    big: bool, work: list[tuple[int, int, bool]], tmp_path_factory
) -> None:
    path = tmp_path_factory.mktemp("bits") / "file"
    path.write_bytes(bytes(8192))
    host = HostFile(path, read_only=False, account=Account())
    bits, model = SectorBits(host, 512, most_significant_first=big), [False] * 20000
    for first, count, value in work:
        bits.fill(1024, first, count, value)
        model[first : first + count] = [value] * count
    runs = list(bits.runs(1024, 5, 19000))
    assert [value for _, count, value in runs for _ in range(count)] == model[5:19005]
    assert all(one[2] != two[2] for one, two in pairwise(runs))
    for at in bits.dirty:
        host.write(at, bits.content(at))
    raw = np.frombuffer(host.read(1024, 2500), np.uint8)
    assert np.unpackbits(raw, bitorder="big" if big else "little").astype(bool).tolist() == model
    host.close()


def test_shared_locks_share_and_exclude() -> None:
    import threading

    lock, seen, failures = SharedLock(), [0], []

    def work(seed: int) -> None:
        rnd = random.Random(seed)
        for _ in range(200):
            if rnd.random() < 0.3:
                with lock.exclusive:
                    before = seen[0]
                    seen[0] = before + 1
                    if seen[0] != before + 1:
                        failures.append(before)
            else:
                with lock.shared:
                    first = seen[0]
                    if seen[0] != first:
                        failures.append(first)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    with lock.shared, lock.shared:
        assert not lock._room.acquire(blocking=False)
    with lock.exclusive:
        pass


def test_the_parent_is_named_relative_to_the_child(tmp_path: Path) -> None:
    assert windows_relative(tmp_path / "child", tmp_path / "parent") == ".\\parent"
    assert windows_relative(tmp_path / "a" / "child", tmp_path / "b" / "parent") == "..\\b\\parent"


@pytest.mark.parametrize("make", [create_vhd, create_vhdx])
def test_a_moved_chain_is_found_again(make, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "bases").mkdir(parents=True)
    with make(old / "bases" / "base", 4 * MIB) as base:
        base.write(0, b"x" * 512)
    make(old / "child", parent=old / "bases" / "base").close()
    old.rename(new)
    with open_disk(new / "child", read_only=True) as child:
        assert child.read(0, 512) == b"x" * 512
    (new / "bases" / "base").rename(new / "base")  # not where it is said to be, but beside the child
    with open_disk(new / "child", read_only=True) as child:
        assert child.read(0, 512) == b"x" * 512


@pytest.mark.parametrize("make", [create_vhd, create_vhdx])
def test_a_child_may_be_larger_than_its_parent(make, tmp_path: Path) -> None:
    with make(tmp_path / "base", 3 * MIB) as base:
        base.write(0, b"x" * 3 * MIB)
    with make(tmp_path / "child", 8 * MIB, parent=tmp_path / "base") as child:
        child.write(3 * MIB, b"y" * 512)
        assert child.read(0, 8 * MIB) == b"x" * 3 * MIB + b"y" * 512 + bytes(5 * MIB - 512)


@pytest.mark.parametrize("make", [create_vhd, create_vhdx])
def test_what_cannot_be_created(make, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_bytes(b"mine")
    with pytest.raises(DiskError, match="File exists"):
        make(taken, MIB)
    assert taken.read_bytes() == b"mine"
    for arguments, sentence in [
        ({"size": 0}, "a disk of 0 bytes"),
        ({"size": 1000}, "a disk of 1000 bytes"),
        ({"size": 1 << 50}, "is not possible"),
        ({"size": MIB, "block_size": 3 * MIB}, "block size of 3145728"),
        ({"size": MIB, "variant": "differencing"}, "needs a parent"),
        ({"parent": tmp_path / "nothing"}, "cannot open"),
        ({"parent": taken}, "no image of a known format"),
    ]:
        with pytest.raises(DiskError, match=sentence):
            make(tmp_path / "new", **arguments)
        assert not (tmp_path / "new").exists()


def entry(sequence: int, tail: int, guid: UUID, pages: dict[int, bytes], size: int) -> bytes:
    """A log entry put together by hand, as other software writes them: part of a longer sequence."""
    descriptors = b"".join(
        struct.pack("<4s4s8sQQ", b"desc", page[-4:], page[:8], at, sequence) for at, page in pages.items()
    )
    sectors = b"".join(
        struct.pack("<4sI4084sI", b"data", sequence >> 32, page[8:-4], sequence & 0xFFFFFFFF)
        for page in pages.values()
    )
    head = -(-(64 + len(descriptors)) // PAGE) * PAGE
    length = head + len(sectors)
    raw = struct.pack(
        "<4sIIIQII16sQQ", b"loge", 0, length, tail, sequence, len(pages), 0, guid.bytes_le, size, size
    )
    raw = (raw + descriptors).ljust(head, b"\0") + sectors
    return raw[:4] + struct.pack("<I", crc32c(raw)) + raw[8:]


def put(host: HostFile, offset: int, length: int, at: int, raw: bytes) -> int:
    """Write into the circular log; where the next entry goes."""
    first = min(len(raw), length - at)
    host.write(offset + at, raw[:first])
    host.write(offset, raw[first:])
    return (at + len(raw)) % length


@pytest.mark.parametrize("start", [0, 64 << 10, (256 << 10) - PAGE])
def test_a_sequence_of_entries_is_replayed_in_order_even_around_the_end(host: HostFile, start: int) -> None:
    offset, length, guid = 256 << 10, 256 << 10, uuid4()
    base = 3 * 65536 + 0
    old = {base + PAGE * i: bytes([i + 1]) * PAGE for i in range(5)}
    at = put(host, offset, length, start, entry(41, start, guid, old, MIB))
    at = put(
        host, offset, length, at, entry(42, start, guid, {base: b"n" * PAGE, base + PAGE: b"m" * PAGE}, MIB)
    )
    put(host, offset, length, at, entry(43, start, uuid4(), {base: b"f" * PAGE}, MIB))  # of another log
    replay = find_replay(host, guid, offset, length)
    assert replay.size == 0  # the file is that large already
    assert dict(replay.pages) == old | {base: b"n" * PAGE, base + PAGE: b"m" * PAGE}


def test_a_torn_end_of_a_sequence_leaves_the_rest(host: HostFile) -> None:
    offset, length, guid, base = 256 << 10, 256 << 10, uuid4(), 3 * 65536
    at = put(host, offset, length, 0, entry(1, 0, guid, {base: b"a" * PAGE}, MIB))
    torn = bytearray(entry(2, 0, guid, {base: b"b" * PAGE}, MIB))
    torn[-100] ^= 1
    put(host, offset, length, at, bytes(torn))
    assert dict(find_replay(host, guid, offset, length).pages) == {base: b"a" * PAGE}


def test_zero_descriptors(host: HostFile) -> None:
    offset, length, guid, base = 256 << 10, 256 << 10, uuid4(), 3 * 65536
    raw = struct.pack("<4sIIIQII16sQQ", b"loge", 0, PAGE, 0, 9, 1, 0, guid.bytes_le, MIB, MIB)
    raw = (raw + struct.pack("<4sIQQQ", b"zero", 0, 3 * PAGE, base, 9)).ljust(PAGE, b"\0")
    host.write(offset, raw[:4] + struct.pack("<I", crc32c(raw)) + raw[8:])
    replay = find_replay(host, guid, offset, length)
    assert list(replay.zeros) == [(base, base + 3 * PAGE)]
    assert not replay.pages
    host.write(base - 512, b"x" * 4 * PAGE)
    host.overlay = replay
    assert host.read(base - 512, 4 * PAGE) == b"x" * 512 + bytes(3 * PAGE) + b"x" * (PAGE - 512)


def test_a_log_that_was_announced_but_never_written_is_empty(host: HostFile) -> None:
    assert dict(find_replay(host, uuid4(), 256 << 10, 256 << 10).pages) == {}


def test_our_log_never_overwrites_the_entry_before(host: HostFile) -> None:
    offset, length, guid = 512 << 10, 512 << 10, uuid4()
    writer, rnd = LogWriter(host, guid, offset, length), random.Random(4)
    before: dict[int, bytes] = {}
    for number in range(60):
        pages = {
            3 * 65536 + PAGE * page: bytes([number + 1]) * PAGE
            for page in rnd.sample(range(60), rnd.randrange(1, min(60, writer.capacity + 1)))
        }
        raw = host.read(offset, length)
        writer.write(pages)
        assert dict(find_replay(host, guid, offset, length).pages) == pages
        if before:  # the new entry torn, in any of its sectors: the one before still counts
            new = bytearray(host.read(offset, length))
            changed = [at for at in range(0, length, 512) if new[at : at + 512] != raw[at : at + 512]]
            at = rnd.choice(changed)
            host.write(offset, bytes(new[:at]) + raw[at : at + 512] + bytes(new[at + 512 :]))
            found = dict(find_replay(host, guid, offset, length).pages)
            assert found in (
                before,
                pages,
            )  # the sector may have been padding with the same checksum only if equal
            assert found == before
            host.write(offset, bytes(new))
        before = pages


@pytest.mark.parametrize(
    ("url", "paths"),
    [
        ("file:///disks/base.vhd", ["/disks/base.vhd"]),
        ("file:///My%20Disks/b%C3%A4se.vhd", ["/My Disks/bäse.vhd", "/My%20Disks/b%C3%A4se.vhd"]),
        ("file://localhost/My%20Disks/b.vhd", ["/My Disks/b.vhd", "/My%20Disks/b.vhd"]),
        ("FILE://LocalHost/b.vhd", ["/b.vhd"]),
        ("file:/disks/base.vhd", ["/disks/base.vhd"]),
        ("file://./more/base%25one.vhd", ["./more/base%one.vhd", "./more/base%25one.vhd"]),
        ("file://server/share/base.vhd", ["base.vhd"]),
        ("/plain/path with 100%.vhd", ["/plain/path with 100%.vhd"]),
        ("file:///not escaped/100%.vhd", ["/not escaped/100%.vhd", "/not escaped/100%.vhd"]),
    ],
)
def test_paths_of_file_urls(url: str, paths: list[str]) -> None:
    assert list(file_url_paths(url)) == paths


@pytest.mark.parametrize("form", ["file://{}", "file://localhost{}", "file:{}"])
@pytest.mark.parametrize("name", ["My Disks/base one.vhd", "100%/ä+b#c?.vhd"])
def test_a_parent_that_is_named_by_a_file_url(form: str, name: str, tmp_path: Path) -> None:
    parent, child = tmp_path / name, tmp_path / "elsewhere" / "child.vhd"
    parent.parent.mkdir()
    child.parent.mkdir()
    write_vhd(parent, MIB, MIB, {0: (b"\xff" * 256, b"P" * MIB)}, unique_id=b"\x22" * 16)
    url = form.format(quote(str(parent))).encode()
    write_vhd(child, MIB, MIB, {}, parent_id=b"\x22" * 16, locators=[(b"MacX", url)])
    with open_disk(child, read_only=True) as disk:
        assert disk.read(0, MIB) == b"P" * MIB


def test_a_parent_that_is_named_by_a_url_relative_to_the_image(tmp_path: Path) -> None:
    parent, child = tmp_path / "My Disks" / "base one.vhd", tmp_path / "child.vhd"
    parent.parent.mkdir()
    write_vhd(parent, MIB, MIB, {0: (b"\xff" * 256, b"P" * MIB)}, unique_id=b"\x22" * 16)
    url = b"file://./My%20Disks/base%20one.vhd"
    write_vhd(child, MIB, MIB, {}, parent_id=b"\x22" * 16, locators=[(b"MacX", url)])
    with open_disk(child, read_only=True) as disk:
        assert disk.read(0, MIB) == b"P" * MIB


@pytest.mark.parametrize("size", [3 << 40, 32 << 40, 64 << 40])
def test_fixed_vhds_have_no_table_to_limit_them(size: int, tmp_path: Path) -> None:
    with create_vhd(tmp_path / "disk", size, variant="fixed") as disk:
        disk.write(size - 512, b"Z" * 512)
    with open_disk(tmp_path / "disk", read_only=True) as disk:
        assert (disk.size, disk.read(size - 512, 512)) == (size, b"Z" * 512)
    for arguments in ({"variant": "fixed", "size": (64 << 40) + 512}, {"size": size}):
        with pytest.raises(DiskError, match="not possible in a VHD"):
            create_vhd(tmp_path / "none", **arguments)
