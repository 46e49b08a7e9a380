"""The plain disks: geometry, refusals, holes, and that a flush reaches the host's fsync."""

import errno
import mmap
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from vmbus.errors import DeviceError
from vmbus.storage.disk import Disk, DiskError, Extent, MemoryDisk, RawDisk

MIB = 1 << 20


def make_raw(tmp_path: Path, size: int, **geometry: int) -> Disk:
    return RawDisk.create(tmp_path / "disk.img", size, **geometry)


def make_memory(_: Path, size: int, **geometry: int) -> Disk:
    return MemoryDisk(size, **geometry)


both = pytest.mark.parametrize("make", [make_raw, make_memory])
Make = Callable[..., Disk]


@both
@pytest.mark.parametrize("sector_size", [512, 2048, 4096])
def test_reads_back_what_was_written_and_zeros_elsewhere(
    make: Make, tmp_path: Path, sector_size: int
) -> None:
    with make(tmp_path, MIB, sector_size=sector_size) as disk:
        assert (disk.sector_count, disk.size) == (MIB // sector_size, MIB)
        data = os.urandom(3 * sector_size)
        disk.write(sector_size, data)
        disk.write_through(MIB - sector_size, data[:sector_size])
        assert disk.read(0, 5 * sector_size) == bytes(sector_size) + data + bytes(sector_size)
        assert disk.read(MIB - sector_size, sector_size) == data[:sector_size]


@both
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 100), (100, 512), (MIB, 512), (MIB - 512, 1024), (-512, 512), (1 << 70, 512), (0, 1 << 70)],
)
def test_a_range_that_is_not_whole_sectors_inside_is_refused(
    make: Make, tmp_path: Path, offset: int, length: int
) -> None:
    with make(tmp_path, MIB) as disk:
        for operation in (disk.read, disk.unmap, disk.write_zeros, lambda o, n: list(disk.extents(o, n))):
            with pytest.raises(DiskError) as caught:
                operation(offset, length)
            assert caught.value.errno == errno.EINVAL
        if length < MIB:
            with pytest.raises(DiskError):
                disk.write(offset, bytes(length))
        assert disk.read(0, MIB) == bytes(MIB)


@both
def test_unmap_makes_a_hole_that_reads_as_zeros(make: Make, tmp_path: Path) -> None:
    with make(tmp_path, MIB) as disk:
        disk.write(0, b"\xaa" * MIB)
        disk.unmap(64 << 10, 128 << 10)
        assert disk.read(0, MIB) == b"\xaa" * (64 << 10) + bytes(128 << 10) + b"\xaa" * (832 << 10)
        holes = [extent for extent in disk.extents(0, MIB) if not extent.allocated]
        assert holes == [Extent(64 << 10, 128 << 10, False)]


def test_holes_stay_holes(tmp_path: Path) -> None:
    with RawDisk.create(tmp_path / "sparse", 64 * MIB) as disk:
        disk.write(32 * MIB, bytes(4096))
        disk.flush()
        assert os.fstat(disk.fd).st_blocks * 512 < MIB
        assert list(disk.extents(0, 64 * MIB)) == [
            Extent(0, 32 * MIB, False),
            Extent(32 * MIB, 4096, True),
            Extent(32 * MIB + 4096, 32 * MIB - 4096, False),
        ]


def test_flush_is_fsync_and_write_through_is_dsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    pwritev = os.pwritev
    with RawDisk.create(tmp_path / "disk", MIB) as disk:
        monkeypatch.setattr(os, "fsync", lambda fd: calls.append(("fsync", fd)))
        monkeypatch.setattr(os, "pwritev", lambda *a: calls.append(("pwritev", a[3])) or pwritev(*a))
        disk.write(0, bytes(512))
        disk.write_through(512, bytes(512))
        disk.flush()
        assert calls == [("pwritev", 0), ("pwritev", os.RWF_DSYNC), ("fsync", disk.fd)]


def test_read_only_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x" * MIB)
    with RawDisk(path, read_only=True) as disk:
        for refused in (
            lambda: disk.write(0, bytes(512)),
            lambda: disk.write_through(0, bytes(512)),
            lambda: disk.unmap(0, 512),
            lambda: disk.write_zeros(0, 512),
        ):
            with pytest.raises(DiskError) as caught:
                refused()
            assert caught.value.errno == errno.EROFS
        disk.flush()
        assert disk.read(0, 512) == b"x" * 512
    assert path.read_bytes() == b"x" * MIB


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (bytes(1000), "1000 bytes are not a whole number of 512-byte"),
    ],
)
def test_an_unusable_image_gets_one_sentence(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "image"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DeviceError, match=message) as caught:
        RawDisk(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_or_pipe_is_not_an_image(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="Is a directory"):
        RawDisk(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DeviceError, match="neither a file nor a block device"):
        RawDisk(tmp_path / "pipe")


def test_geometry() -> None:
    with MemoryDisk(MIB, physical_sector_size=4096) as disk:
        assert (disk.sector_size, disk.physical_sector_size) == (512, 4096)
    for wrong in (
        {"sector_size": 520},
        {"sector_size": 4096, "physical_sector_size": 512},
        {"size": MIB + 1},
    ):
        with pytest.raises(DiskError):
            MemoryDisk(**{"size": MIB, **wrong})


def test_create_does_not_touch_an_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_bytes(b"data")
    with pytest.raises(DiskError, match="File exists"):
        RawDisk.create(path, MIB)
    assert path.read_bytes() == b"data"


def test_a_full_host_disk_is_told_by_errno() -> None:
    # A file with a size limit stands in for a full file system: both fail inside pwritev.
    import resource

    fd_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MemoryDisk(MIB) as disk:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, fd_limit[1]))
        import signal

        old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            with pytest.raises(DiskError) as caught:
                disk.write(8192, bytes(512))
        finally:
            signal.signal(signal.SIGXFSZ, old)
            resource.setrlimit(resource.RLIMIT_FSIZE, fd_limit)
        assert caught.value.errno == errno.EFBIG


def test_memory_disk_takes_content_and_shows_its_memory() -> None:
    disk = MemoryDisk(MIB, content=b"boot" * 128, read_only=True)
    assert disk.mapping is not None
    assert bytes(disk.mapping[:4]) == disk.read(0, 512)[:4] == b"boot"
    disk.close()
    disk.close()
    assert disk.fd == -1
    assert disk.mapping is None


def test_a_grown_file_is_seen_after_refresh(tmp_path: Path) -> None:
    with RawDisk.create(tmp_path / "disk", MIB) as disk:
        os.truncate(tmp_path / "disk", 2 * MIB)
        disk.refresh()
        assert disk.size == 2 * MIB


def test_a_large_memory_disk_costs_what_is_used() -> None:
    """Neither making it nor giving all of it back takes memory in proportion to its size."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    with MemoryDisk(1 << 38) as disk:
        disk.write(1 << 30, b"x" * 512)
        tracemalloc.start()
        try:
            disk.unmap(0, disk.size)
            assert tracemalloc.get_traced_memory()[1] < MIB
        finally:
            tracemalloc.stop()
        assert resident() - before < 16 * MIB
        assert disk.read(1 << 30, 512) == bytes(512)
