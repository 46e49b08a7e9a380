"""Unmapping and zeroing much at once: the work follows what is allocated, and others are not kept out meanwhile."""

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from reference.disk_model import apply, check_extents, fast_folder

from vmbus.storage.disk import Extent
from vmbus.storage.images import create_vhd, create_vhdx, open_disk

MIB, TIB = 1 << 20, 1 << 40
CPU_SECONDS = 20
"""Far more than the work takes, far less than a look at every block."""
tmp_path = pytest.fixture(fast_folder, name="tmp_path")


@pytest.mark.parametrize(("make", "size"), [(create_vhdx, 64 * TIB), (create_vhd, 2040 << 30)])
def test_a_huge_child_is_cleared_at_the_price_of_what_is_allocated(
    make: Any, size: int, tmp_path: Path
) -> None:
    parent, child = tmp_path / "parent", tmp_path / "child"
    with make(parent, size) as disk:
        disk.write(size // 2, b"p" * 4096)
    disk = make(child, parent=parent)
    disk.write(size // 4, b"c" * 4096)
    started = time.process_time()
    for clear in (disk.unmap, disk.write_zeros, disk.unmap):
        clear(0, size)
        assert disk.read(size // 2, 4096) == bytes(4096)
        assert disk.read(size // 4, 4096) == bytes(4096)
    assert not any(extent.allocated for extent in disk.extents(0, size))
    assert time.process_time() - started < CPU_SECONDS
    assert disk.host.size < 600 * MIB  # the table of the larger has half a GiB
    disk.close()
    with open_disk(child, read_only=True) as disk:
        assert disk.read(size // 2, 4096) == bytes(4096)


def test_a_child_of_a_full_parent_is_cleared_in_strides(tmp_path: Path) -> None:
    """Every block has to be marked; while that goes on, others read, and then everything is zeros."""
    parent = tmp_path / "parent"
    create_vhdx(parent, 2 * TIB, variant="fixed", block_size=2 * MIB).close()
    with create_vhdx(tmp_path / "child", parent=parent) as disk:
        started, done, reads = threading.Event(), threading.Event(), 0

        def clear() -> None:
            started.set()
            disk.unmap(0, disk.size)
            done.set()

        thread = threading.Thread(target=clear)
        before = time.process_time()
        thread.start()
        started.wait()
        while not done.is_set():
            disk.read(disk.size - 512, 512)
            reads += not done.is_set()
        thread.join()
        assert time.process_time() - before < CPU_SECONDS
        assert reads > 10
        assert list(disk.extents(0, disk.size)) == [Extent(0, disk.size, False)]


@pytest.mark.parametrize("make", [create_vhd, create_vhdx])
def test_clearing_parts_of_a_child_that_is_larger_than_its_parent(make: Any, tmp_path: Path) -> None:
    """The parent ends inside a block, and has data here and there."""
    block = MIB
    size, small = 8 * block + 2048, 4 * block + 5 * 512
    rnd = random.Random(11)
    for turn in range(4):
        parent, child = tmp_path / f"parent{turn}", tmp_path / f"child{turn}"
        model = bytearray(small)
        with make(parent, small, block_size=block) as disk:
            for step in range(3):
                apply(disk, model, ("write", rnd.randrange(small // 512 - 9), rnd.randrange(1, 9), step + 1))
        model += bytes(size - small)
        with make(child, size, parent=parent, block_size=block) as disk:
            for step in range(25):
                kind = rnd.choice(["unmap", "unmap", "zeros", "write"])
                first = rnd.choice([rnd.randrange(size // 512), rnd.randrange(9) * (block // 512)])
                count = rnd.choice([1, 7, block // 512, 3 * block // 512, size // 512])
                apply(disk, model, (kind, first, min(count, size // 512 - first), step + 9))
                if step % 8 == 0:
                    check_extents(disk, model, 0, size)
            assert disk.read(0, size) == model
        with open_disk(child, read_only=True) as disk:
            assert disk.read(0, size) == model


def test_zeroing_blocks_without_space_takes_none(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    with create_vhdx(parent, 64 * MIB, block_size=2 * MIB) as disk:
        disk.write(0, b"p" * (64 * MIB))
    with create_vhdx(tmp_path / "child", parent=parent) as disk:
        before = disk.host.size
        disk.write_zeros(0, 64 * MIB)
        disk.flush()
        assert disk.host.size == before
        assert disk.read(0, 64 * MIB) == bytes(64 * MIB)
