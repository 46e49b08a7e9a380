"""Sector bitmaps of VHDs that other programs wrote: a clear bit is a sector that nobody wrote."""

import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from integration.test_images_model import examples
from reference.disk_model import FAST, apply, check_extents, fast_folder, library, operations, pattern
from reference.image_readers import read_vhd
from reference.vhd_writer import scattered, write_vhd

from vmbus.bus.channel import loopback
from vmbus.core.memory import GuestMemory
from vmbus.storage.disk import Disk
from vmbus.storage.images import create_vhd, open_disk
from vmbus.storage.vsc import StorageVsc
from vmbus.storage.vsp import StorageVsp

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 64 * KIB
SIZE = 5 * BLOCK + 3 * 512
PARENT_ID = b"\x22" * 16
tmp_path = pytest.fixture(fast_folder, name="tmp_path")


def make(kind: str, seed: int, folder: Path) -> list[Path]:
    """An image with a few sectors in most blocks, and its parent, if it is of the kind that has one."""
    path, parent = folder / "image.vhd", folder / "parent.vhd"
    if kind == "dynamic":
        write_vhd(path, SIZE, BLOCK, scattered(seed, SIZE, BLOCK))
        return [path]
    write_vhd(parent, SIZE, BLOCK, scattered(seed + 1, SIZE, BLOCK), unique_id=PARENT_ID)
    blocks = scattered(seed, SIZE, BLOCK)
    write_vhd(path, SIZE, BLOCK, blocks, parent_id=PARENT_ID, parent_name="parent.vhd")
    return [path, parent]


both = pytest.mark.parametrize("kind", ["dynamic", "differencing"])


@both
@given(data=st.data())
@examples(10)
def test_sectors_that_nobody_wrote(kind: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        chain = make(kind, data.draw(st.integers(0, 1 << 32)), Path(folder))
        model = bytearray(read_vhd(chain))
        disk = open_disk(chain[0])
        check_extents(disk, model, 0, SIZE)
        assert disk.read(0, SIZE) == model
        for operation in data.draw(operations(SIZE // 512, BLOCK // 512)):
            if operation[0] == "reopen":
                disk.close()
                disk = open_disk(chain[0])
            apply(disk, model, operation)
        assert disk.read(0, SIZE) == model
        check_extents(disk, model, 0, SIZE)
        disk.close()
        assert read_vhd(chain) == model
        with open_disk(chain[0], read_only=True) as disk:
            assert disk.read(0, SIZE) == model


def test_libvhdi_finds_what_was_written_between_the_sectors_of_others(tmp_path: Path) -> None:
    """It goes by the bitmap's bytes more than by its bits: what nobody wrote is zeros in this file, as in most."""
    pyvhdi = library("pyvhdi")
    path = tmp_path / "image.vhd"
    write_vhd(path, SIZE, BLOCK, {0: (b"\x80", b"A" * 512), 2: (b"", b""), 4: (bytes(8) + b"\xff", b"")})
    model = bytearray(read_vhd([path]))
    rnd = random.Random(4)
    with open_disk(path) as disk:
        for turn in range(60):
            at = rnd.randrange(SIZE // 512)
            count = min(rnd.randrange(1, 20), SIZE // 512 - at)
            apply(disk, model, ("unmap" if turn % 7 == 6 else "write", at, count, turn + 1))
    file = pyvhdi.file()
    file.open(str(path))
    for at in range(0, SIZE, 512):
        file.seek(at)
        assert file.read_buffer(512) == model[at : at + 512]
    file.close()


def over_vmbus(disk: Disk, model: bytearray, seed: int) -> None:
    """Batches of reads and writes by a guest, beside the model."""
    guest, host = loopback(GuestMemory(8 * MIB), 16, 16)
    provider = StorageVsp({(0, 0): disk})
    provider.open(host)
    client = StorageVsc(guest, range(16, 1024))
    client.connect()
    device, rnd = client.disk(), random.Random(seed)
    for turn in range(40):
        length = rnd.choice([512, 2048, 4096])
        offsets = rnd.sample(range(0, SIZE - length, 4096), 48)
        if turn % 2:
            assert device.read_batch(offsets, length) == [bytes(model[at : at + length]) for at in offsets]
        else:
            pieces = [pattern(turn + 1, at, length) for at in offsets]
            device.write_batch(offsets, pieces)
            for at, piece in zip(offsets, pieces, strict=True):
                model[at : at + length] = piece
        if turn % 10 == 9:
            at = rnd.randrange(SIZE // 512)
            count = min(rnd.randrange(1, 2 * BLOCK // 512), SIZE // 512 - at)
            device.unmap(at * 512, count * 512)
            model[at * 512 : (at + count) * 512] = bytes(count * 512)
    provider.shutdown()
    host.close()


@both
def test_a_guests_batches_go_by_the_bitmap(kind: str, tmp_path: Path) -> None:
    chain = make(kind, 5, tmp_path)
    model = bytearray(read_vhd(chain))
    with open_disk(chain[0]) as disk:
        over_vmbus(disk, model, 6)
    assert read_vhd(chain) == model


@both
def test_a_block_whose_last_sector_was_written_is_served_without_python(kind: str, tmp_path: Path) -> None:
    """The last block reaches past the disk's end, where no bit is ever set."""
    path, parent = tmp_path / "image.vhd", tmp_path / "parent.vhd"
    identity = {"parent_id": PARENT_ID, "parent_name": parent.name} if kind == "differencing" else {}
    write_vhd(parent, SIZE, BLOCK, {}, unique_id=PARENT_ID)
    write_vhd(path, SIZE, BLOCK, {5: (b"\xc0", b"ab" * 512)}, **identity)
    calls: list[int] = []
    with open_disk(path) as disk:
        serve = disk.serve_batch
        assert serve is not None

        def counted(requests: object) -> int:
            calls.append(serve(requests))
            return calls[-1]

        disk.serve_batch = counted
        guest, host = loopback(GuestMemory(8 * MIB), 16, 16)
        provider = StorageVsp({(0, 0): disk})
        provider.open(host)
        client = StorageVsc(guest, range(16, 1024))
        client.connect()
        device, places = client.disk(), [5 * BLOCK, 5 * BLOCK + 512, 5 * BLOCK + 1024]
        assert device.read_batch(places, 512)[2] == bytes(512)
        assert sum(calls) < len(places)
        device.write_batch(places[2:], [b"c" * 512])
        calls.clear()
        assert device.read_batch(places, 512) == [b"ab" * 256, b"ab" * 256, b"c" * 512]
        assert sum(calls) == len(places)
        provider.shutdown()
        host.close()


def test_a_reused_block_has_the_bitmap_of_its_new_owner(tmp_path: Path) -> None:
    """Space of a block with a few sectors is given back and taken by another: no bit of the old one is believed."""
    path = tmp_path / "image.vhd"
    write_vhd(path, SIZE, BLOCK, {0: (b"\xf0", b"A" * BLOCK), 1: (b"\x0f", b"B" * BLOCK)})
    model = bytearray(read_vhd([path]))
    with open_disk(path) as disk:
        for turn in range(6):
            apply(disk, model, ("write", turn % 2 * 128 + 9, 3, turn + 1))
            apply(disk, model, ("unmap", turn % 2 * 128, 128, 0))
            disk.flush()
            apply(disk, model, ("write", (turn % 3 + 2) * 128 + 5, 2, turn + 7))
            assert disk.read(0, SIZE) == model
    assert read_vhd([path]) == model


def test_clearing_what_nobody_wrote_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "image.vhd"
    write_vhd(path, SIZE, BLOCK, {0: (b"\x80", b"A" * BLOCK)})
    before = path.read_bytes()
    with open_disk(path) as disk:
        disk.unmap(512, 8 * 512)
        disk.write_zeros(512, 8 * 512)
        disk.unmap(BLOCK, SIZE - BLOCK)
    assert path.read_bytes() == before


def test_the_table_that_xenserver_adds_is_kept(tmp_path: Path) -> None:
    """Its map lies between the block table and the first block, where the format itself knows of nothing."""
    path, empty = tmp_path / "image.vhd", tmp_path / "empty.vhd"
    whole = b"\xff" * (4096 // 4096)
    write_vhd(path, 64 * 4096, 4096, {3: (whole, b"A" * 4096)}, batmap=True)
    write_vhd(empty, 64 * 4096, 4096, {}, batmap=True)
    for image in (path, empty):
        before = image.read_bytes()
        at = before.index(b"tdbatmap")
        with open_disk(image) as disk:
            disk.write(0, b"B" * (32 * 4096))
            disk.unmap(8 * 4096, 16 * 4096)
            disk.write(40 * 4096, b"C" * 4096)
        assert image.read_bytes()[at : at + 1024] == before[at : at + 1024]
        assert read_vhd([image])[40 * 4096 : 41 * 4096] == b"C" * 4096


FATTOOLS = """
import random, sys
from FATtools import vhdutils
path, action, result = sys.argv[1:]
if action == "make":
    vhdutils.mk_dynamic(path, 8 << 20)
if action == "child":
    vhdutils.mk_diff(path, "parent.vhd")
image = vhdutils.Image(path, "r+b")
rnd = random.Random(action)
for turn in range(int(action != "read") * 40):
    at = rnd.randrange(8 << 11)
    count = min(rnd.randrange(1, 40), (8 << 11) - at)
    image.seek(at * 512)
    image.write(bytes([turn + 1]) * (count * 512))
image.seek(0)
open(result, "wb").write(image.read(8 << 20))
image.close()
"""


def fattools(path: Path, action: str) -> bytes:
    """Do it in a process of its own (the library prints); the disk's content afterwards."""
    result = path.with_name("content")
    command = [sys.executable, "-W", "ignore", "-c", FATTOOLS, path.name, action, str(result)]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    content = result.read_bytes()
    assert len(content) == 8 * MIB
    return content


def test_fattools_and_we_write_one_image_in_turns(tmp_path: Path) -> None:
    """FATtools marks sectors one by one and believes its marks when it reads."""
    library("FATtools")
    path = tmp_path / "image.vhd"
    model = bytearray(fattools(path, "make"))
    rnd = random.Random(8)
    for turn in range(2):
        with open_disk(path) as disk:
            assert disk.read(0, 8 * MIB) == model
            for step in range(30):
                at = rnd.randrange(8 << 11)
                count = min(rnd.randrange(1, 60), (8 << 11) - at)
                kind = "unmap" if step % 10 == 9 else "write"
                apply(disk, model, (kind, at, count, turn * 30 + step + 1))
        assert fattools(path, "read") == model
        assert read_vhd([path]) == model
        theirs = fattools(path, f"write {turn}")
        with open_disk(path, read_only=True) as disk:
            assert disk.read(0, 8 * MIB) == theirs
        model = bytearray(theirs)


def test_fattools_reads_and_writes_what_we_made(tmp_path: Path) -> None:
    library("FATtools")
    path = tmp_path / "image.vhd"
    model = bytearray(8 * MIB)
    with create_vhd(path, 8 * MIB) as disk:
        apply(disk, model, ("write", 77, 500, 3))
        apply(disk, model, ("write", 9000, 5000, 4))
        apply(disk, model, ("unmap", 8192, 4096, 0))
    assert fattools(path, "read") == model
    theirs = fattools(path, "write")
    assert theirs != model
    with open_disk(path, read_only=True) as disk:
        assert disk.read(0, 8 * MIB) == theirs


@pytest.mark.parametrize("maker", ["FATtools", "vmbus"])
def test_fattools_and_we_write_one_child_in_turns(maker: str, tmp_path: Path) -> None:
    library("FATtools")
    parent, child = tmp_path / "parent.vhd", tmp_path / "child.vhd"
    with create_vhd(parent, 8 * MIB) as disk:
        disk.write(MIB, pattern(5, 0, 4 * MIB))
    if maker == "vmbus":
        create_vhd(child, parent=parent).close()
    model = bytearray(fattools(child, "child" if maker == "FATtools" else "read"))
    for step in range(2):
        with open_disk(child) as disk:
            assert disk.read(0, 8 * MIB) == model
            for turn in range(12):
                kind = "unmap" if turn % 4 == 3 else "write"
                apply(disk, model, (kind, 900 * turn + step, 33 + 500 * (turn % 3), turn + 40))
        assert fattools(child, "read") == model
        assert read_vhd([child, parent]) == model
        model = bytearray(fattools(child, f"write {step}"))
    with open_disk(child, read_only=True) as disk:
        assert disk.read(0, 8 * MIB) == model
