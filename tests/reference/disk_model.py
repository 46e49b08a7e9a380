"""What a disk does, as operations on a `bytearray`; and the outside tools that judge image files."""

import importlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import strategies as st

from vmbus.storage.disk import Disk

FAST = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where tests of images keep their files: they wait for fsync a thousand times. None is the usual place."""


def fast_folder() -> Iterator[Path]:
    """A fixture: a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="vmbus-", dir=FAST) as folder:
        yield Path(folder)


Operation: TypeAlias = tuple[str, int, int, int]
"""What to do, first sector, sectors, and a number that seeds the data."""

KINDS = ["write"] * 6 + ["read"] * 3 + ["unmap", "zeros", "flush", "extents", "reopen"]


def operations(sectors: int, block_sectors: int) -> st.SearchStrategy[list[Operation]]:
    """Lists of operations; many start or end at a block's edge."""
    edges = st.integers(0, sectors // block_sectors).map(lambda n: n * block_sectors)
    firsts = st.one_of(st.integers(0, sectors - 1), edges.map(lambda at: min(at, sectors - 1)))
    counts = st.one_of(
        st.integers(1, 9), st.just(block_sectors), st.integers(1, block_sectors * 2), st.just(sectors)
    )
    one = st.tuples(st.sampled_from(KINDS), firsts, counts, st.integers(1, 255))
    return st.lists(one.map(lambda o: (o[0], o[1], min(o[2], sectors - o[1]), o[3])), min_size=1, max_size=25)


def pattern(seed: int, sector: int, length: int) -> bytes:
    """Bytes that tell where they were written, and by whom; never zero."""
    step = bytes((seed + sector + i) % 255 + 1 for i in range(255))
    return (step * (length // 255 + 1))[:length]


def apply(disk: Disk, model: bytearray, operation: Operation) -> None:
    """Do it to both and compare what can be seen of it."""
    kind, first, count, seed = operation
    offset, length = first * disk.sector_size, count * disk.sector_size
    if kind == "write":
        data = pattern(seed, first, length)
        disk.write(offset, data)
        model[offset : offset + length] = data
    elif kind == "unmap":
        disk.unmap(offset, length)
        model[offset : offset + length] = bytes(length)
    elif kind == "zeros":
        disk.write_zeros(offset, length)
        model[offset : offset + length] = bytes(length)
    elif kind == "flush":
        disk.flush()
    elif kind == "extents":
        check_extents(disk, model, offset, length)
    else:
        assert disk.read(offset, length) == model[offset : offset + length]


def check_extents(disk: Disk, model: bytes | bytearray, offset: int, length: int) -> None:
    """The extents cover the range without a gap, alternate, and what is not allocated is zeros."""
    extents = list(disk.extents(offset, length))
    assert extents[0].offset == offset
    assert sum(extent.length for extent in extents) == length
    for one, following in itertools.pairwise(extents):
        assert one.offset + one.length == following.offset
        assert one.allocated != following.allocated
    for extent in extents:
        assert extent.length > 0
        assert extent.offset % disk.sector_size == extent.length % disk.sector_size == 0
        if not extent.allocated:
            assert not any(model[extent.offset : extent.offset + extent.length])


def tool(name: str) -> str:
    """The path of an outside program. Tests that need it fail in CI, and are skipped elsewhere, if it is missing."""
    found = shutil.which(name)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"{name} is not installed, and CI must not go without it")
        pytest.skip(f"{name} is not installed")
    return found


def library(name: str) -> Any:
    """A Python library of somebody else; where all extras are promised (CI) its absence is a failure, else a skip."""
    if os.environ.get("VMBUS_ALL_EXTRAS"):
        return importlib.import_module(name)
    return pytest.importorskip(name)


def qemu_img(*arguments: str | os.PathLike[str], ok: Sequence[int] = (0,)) -> str:
    """Run qemu-img and return its output."""
    done = subprocess.run([tool("qemu-img"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode in ok, f"qemu-img {arguments}: {done.stdout}{done.stderr}"
    return done.stdout
