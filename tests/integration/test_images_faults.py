"""Host disks that are full or fail, threads that share an image, logs that other software left."""

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reference.descriptors import open_descriptors
from reference.disk_model import apply, fast_folder, pattern, qemu_img, tool
from reference.image_readers import read_vhd, read_vhdx
from reference.sector_history import perform, steps

from vmbus.bus.channel import loopback
from vmbus.core.memory import GuestMemory
from vmbus.storage.disk import DiskError
from vmbus.storage.images import create_vhd, create_vhdx, open_disk
from vmbus.storage.images.hostfile import HostFile
from vmbus.storage.vsc import StorageVsc
from vmbus.storage.vsp import StorageVsp
from vmbus.trace.ledger import Account

MIB = 1 << 20
tmp_path = pytest.fixture(fast_folder, name="tmp_path")
SIZE = 8 * MIB
MAKERS: dict[str, Callable[[Path], Any]] = {
    "vhd": lambda path: create_vhd(path, SIZE, block_size=512 << 10),
    "vhdx": lambda path: create_vhdx(path, SIZE, block_size=MIB),
}
READERS = {"vhd": read_vhd, "vhdx": read_vhdx}


class Faults:
    """Lets calls of every `HostFile` fail by chance."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, number: int, names: tuple[str, ...], seed: int
    ) -> None:
        self.active = False
        self.hits = 0
        self._rnd = random.Random(seed)
        for name in names:
            original = getattr(HostFile, name)
            monkeypatch.setattr(HostFile, name, self._failing(original, number))

    def _failing(self, original: Any, number: int) -> Any:
        def call(host: HostFile, *arguments: Any) -> Any:
            if self.active and self._rnd.random() < 0.3:
                self.hits += 1
                if arguments and isinstance(arguments[-1], bytes | bytearray | memoryview):
                    cut = len(arguments[-1]) // 2  # a full disk takes a part of what it is given
                    original(host, *arguments[:-1], memoryview(arguments[-1])[:cut])
                raise DiskError(os.strerror(number), number)
            return original(host, *arguments)

        return call


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("seed", range(3))
def test_a_full_host_disk_is_an_error_and_nothing_worse(
    kind: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests fail while there is no space; those that did not, and all after that, count."""
    path = tmp_path / "image"
    disk = MAKERS[kind](path)
    faults = Faults(monkeypatch, errno.ENOSPC, ("write", "set_size"), seed)
    model = bytearray(SIZE)
    unsure: set[int] = set()
    rnd = random.Random(seed)
    for number in range(150):
        faults.active = rnd.random() < 0.5
        kind_of = rnd.choice(["write", "write", "write", "unmap", "flush"])
        first = rnd.randrange(SIZE // 512)
        count = min(rnd.choice([1, 8, 700, 2048]), SIZE // 512 - first)
        touched = set(range(first, first + count)) if kind_of != "flush" else set()
        numbers = []
        try:
            apply(disk, model, (kind_of, first, count, number % 255 + 1))
        except DiskError as error:
            numbers.append(error.errno)
        assert numbers in ([], [errno.ENOSPC])
        unsure = unsure | touched if numbers else unsure - touched
    faults.active = False
    assert faults.hits
    disk.flush()
    found = disk.read(0, SIZE)
    for sector in sorted(set(range(SIZE // 512)) - unsure):
        assert found[sector * 512 : sector * 512 + 512] == model[sector * 512 : sector * 512 + 512]
    disk.close()
    assert READERS[kind]([path]) == found
    with open_disk(path, read_only=True) as again:
        assert again.read(0, SIZE) == found
    if kind == "vhdx":
        qemu_img("check", "-f", "vhdx", path)


@pytest.mark.parametrize("kind", MAKERS)
def test_after_a_failed_fsync_no_flush_succeeds(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = MAKERS[kind](tmp_path / "image")
    disk.write(0, b"x" * 4096)
    real = os.fsync

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(DiskError, match="flush"):
        disk.flush()
    monkeypatch.setattr(os, "fsync", real)
    for request in (disk.flush, lambda: disk.write(0, bytes(512)), lambda: disk.unmap(0, MIB)):
        with pytest.raises(DiskError, match="earlier write-back failed"):
            request()
    assert disk.read(0, 512) == b"x" * 512
    disk.close()
    open_disk(tmp_path / "image").close()


def test_a_vhd_has_its_footer_again_after_a_write_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image"
    disk = MAKERS["vhd"](path)
    faults = Faults(monkeypatch, errno.ENOSPC, ("write",), 1)
    faults.active = True
    for at in range(0, SIZE, MIB):  # the file grows, which takes the footer away
        with contextlib.suppress(DiskError):
            disk.write(at, bytes(512))
    faults.active = False
    disk.close()
    raw = path.read_bytes()
    assert raw[-512:] == raw[:512]


def test_a_fixed_image_remembers_a_failed_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = create_vhd(tmp_path / "image", MIB, variant="fixed")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: os.close(-1))
        with pytest.raises(DiskError, match="flush"):
            disk.flush()
    with pytest.raises(DiskError, match="earlier flush failed"):
        disk.flush()
    disk.close()


@pytest.mark.parametrize("kind", MAKERS)
def test_threads_work_on_their_own_parts_of_one_image(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    disk = MAKERS[kind](path)
    models = [bytearray(SIZE // 4) for _ in range(4)]
    failures: list[BaseException] = []

    class Part:
        """A quarter of the disk as a disk of its own."""

        def __init__(self, number: int) -> None:
            self.base = number * SIZE // 4
            self.sector_size = 512

        def read(self, offset: int, length: int) -> bytes:
            return bytes(disk.read(self.base + offset, length))

        def write(self, offset: int, data: bytes) -> None:
            disk.write(self.base + offset, data)

        def unmap(self, offset: int, length: int) -> None:
            disk.unmap(self.base + offset, length)

        def flush(self) -> None:
            disk.flush()

    def work(number: int) -> None:
        rnd, part, model = random.Random(number), Part(number), models[number]
        try:
            for turn in range(80):
                first = rnd.randrange(len(model) // 512)
                count = min(rnd.choice([1, 8, 300, 1024]), len(model) // 512 - first)
                kind_of = rnd.choice(["write", "write", "read", "read", "unmap", "flush"])
                apply(part, model, (kind_of, first, count, turn + 1))  # type: ignore[arg-type]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    disk.close()
    assert READERS[kind]([path]) == b"".join(models)


@pytest.mark.parametrize("kind", MAKERS)
def test_unmapped_blocks_give_their_space_back(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    with MAKERS[kind](path) as disk:
        disk.flush()
        empty = os.stat(path).st_blocks
        disk.write(0, b"x" * SIZE)
        disk.flush()
        full, length = os.stat(path).st_blocks, os.stat(path).st_size
        assert (full - empty) * 512 >= SIZE
        disk.unmap(0, SIZE)
        disk.flush()
        assert os.stat(path).st_blocks <= empty + 160  # pages that a VHD's blocks cover only partly stay
        for turn in range(4):  # freed space is used again: the file does not grow any more
            disk.write(0, bytes([turn + 1]) * SIZE)
            disk.unmap(0, SIZE)
            disk.flush()
        assert os.stat(path).st_size <= length + MIB


def test_writing_and_unmapping_without_a_flush_does_not_fill_the_host(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with create_vhdx(path, 64 * MIB, block_size=MIB) as disk:
        for _ in range(20):
            disk.write(0, b"x" * 16 * MIB)
            disk.unmap(0, 16 * MIB)
        assert os.stat(path).st_size < 200 * MIB


@pytest.mark.parametrize("variant", ["fixed", "dynamic"])
@pytest.mark.parametrize("kind", MAKERS)
def test_zeros_and_holes_cost_no_space(kind: str, variant: Any, tmp_path: Path) -> None:
    path = tmp_path / "image"
    make: Any = create_vhd if kind == "vhd" else create_vhdx
    with make(path, 256 * MIB, variant=variant) as disk:
        disk.write_zeros(0, 256 * MIB) if variant == "dynamic" else disk.unmap(0, 256 * MIB)
        disk.flush()
        assert os.stat(path).st_blocks * 512 < 24 * MIB
        assert [extent.allocated for extent in disk.extents(0, 256 * MIB)] == [False]
        disk.write(100 * MIB, b"x" * 4096)
        disk.flush()
        extents = list(disk.extents(0, 256 * MIB))
        assert [extent.allocated for extent in extents] == [False, True, False]
        assert extents[1].length <= 64 << 10


@pytest.mark.parametrize(("fails", "logged"), [(2 * MIB, True), (MIB, False)], ids=["table", "log"])
def test_a_log_that_qemu_left_is_replayed(fails: int, logged: bool, tmp_path: Path) -> None:
    """QEMU's disk fails where the block table is, or already where the log is; then QEMU is aborted."""
    path, copy = tmp_path / "image.vhdx", tmp_path / "copy.vhdx"
    qemu_img("create", "-f", "vhdx", "-o", "block_size=1M", path, str(SIZE))
    rule = {"event": "none", "iotype": "write", "sector": fails // 512, "errno": 5}
    image = {"driver": "file", "filename": str(path)}
    spec = {"driver": "vhdx", "file": {"driver": "blkdebug", "image": image, "inject-error": [rule]}}
    commands = ["-c", "write -P 5 5242880 8192", "-c", "abort"]
    subprocess.run(
        [tool("qemu-io"), *commands, "json:" + json.dumps(spec)],
        capture_output=True,
        check=False,
        cwd=tmp_path,
    )
    before = path.read_bytes()
    assert all(before[at + 48 : at + 64] != bytes(16) for at in (65536, 131072))  # the headers name a log
    model = bytearray(SIZE)
    if logged:
        model[5242880 : 5242880 + 8192] = b"\x05" * 8192
    with open_disk(path, read_only=True) as disk:
        assert disk.read(0, SIZE) == model
    assert path.read_bytes() == before
    shutil.copy(path, copy)
    with open_disk(path) as disk:
        assert disk.read(0, SIZE) == model
        disk.write(0, b"x" * 512)
        model[:512] = b"x" * 512
    qemu_img("check", path)
    qemu_img("check", "-r", "all", copy)
    with open_disk(copy) as disk:
        disk.write(0, b"x" * 512)
    raw = tmp_path / "raw"
    raw.write_bytes(model)
    for judged in (path, copy):
        qemu_img("compare", "-f", "vhdx", "-F", "raw", judged, raw)


def test_backend_calls_are_counted(tmp_path: Path) -> None:
    create_vhdx(tmp_path / "base", SIZE, block_size=MIB).close()
    create_vhdx(tmp_path / "child", parent=tmp_path / "base", block_size=MIB).close()
    account = Account()
    with open_disk(tmp_path / "child", account=account) as disk:
        disk.write(0, b"x" * MIB)
        disk.flush()
        before = account.backend_calls
        disk.read(4096, 4096)
        assert account.backend_calls - before == 1
        disk.write(8192, pattern(1, 0, 4096))
        assert account.backend_calls - before == 2
        disk.flush()
        assert account.backend_calls - before == 3
        disk.read(3 * MIB, MIB)  # a hole
        assert account.backend_calls - before == 3


def test_closing_keeps_what_was_written(tmp_path: Path) -> None:
    """Without a flush nothing is promised for a power cut, but a clean end loses nothing."""
    for kind, make in MAKERS.items():
        path = tmp_path / kind
        with make(path) as disk:
            for version, step in zip(range(1, 40), steps(3, SIZE // 512, 2048), strict=False):
                perform(disk, version, step)
            found = disk.read(0, SIZE)
        with open_disk(path, read_only=True) as disk:
            assert disk.read(0, SIZE) == found
        assert READERS[kind]([path]) == found


def test_nothing_stays_open(tmp_path: Path) -> None:
    create_vhdx(tmp_path / "base", SIZE).close()
    create_vhdx(tmp_path / "child", parent=tmp_path / "base").close()
    before = open_descriptors()
    for _ in range(5):
        open_disk(tmp_path / "child").close()
        with pytest.raises(DiskError):
            open_disk(tmp_path / "child", format="vhd")
        (tmp_path / "base").rename(tmp_path / "gone")
        with pytest.raises(DiskError):
            open_disk(tmp_path / "child")
        (tmp_path / "gone").rename(tmp_path / "base")
    assert open_descriptors() == before


@pytest.mark.parametrize("kind", ["vhd", "vhdx", "vhdx-differencing"])
def test_batches_go_straight_to_the_file(kind: str, tmp_path: Path) -> None:
    """What is in the image's file is neither copied nor touched by Python; the rest goes the usual way."""
    path = tmp_path / "image"
    if kind == "vhdx-differencing":
        with create_vhdx(tmp_path / "base", SIZE, block_size=MIB) as base:
            base.write(0, pattern(200, 0, SIZE))
        disk: Any = create_vhdx(path, parent=tmp_path / "base", block_size=MIB)
        model = bytearray(pattern(200, 0, SIZE))
    else:
        disk, model = MAKERS[kind](path), bytearray(SIZE)
    disk.write(0, pattern(7, 0, 2 * MIB))  # the first blocks are in the file, the others are not
    model[: 2 * MIB] = pattern(7, 0, 2 * MIB)
    account = Account()
    guest, host = loopback(GuestMemory(8 * MIB), 16, 16, host_account=account)
    provider = StorageVsp({(0, 0): disk})
    provider.open(host)
    client = StorageVsc(guest, range(16, 1024))
    client.connect()
    device, rnd = client.disk(), random.Random(1)
    for turn in range(30):
        length = rnd.choice([512, 4096, 12288])
        offsets = rnd.sample(range(0, SIZE - length, 12288), 64)
        if turn % 3:
            assert device.read_batch(offsets, length) == [bytes(model[at : at + length]) for at in offsets]
        else:
            pieces = [pattern(turn + 1, at, length) for at in offsets]
            device.write_batch(offsets, pieces)
            for at, piece in zip(offsets, pieces, strict=True):
                model[at : at + length] = piece
    before = account.copy()
    offsets = list(range(4096, MIB, 16384))
    assert device.read_batch(offsets, 4096) == [bytes(model[at : at + 4096]) for at in offsets]
    device.write_batch(offsets, [pattern(99, 0, 4096)] * len(offsets))
    assert (account - before).bytes_copied == 0
    assert (account - before).backend_calls == 2 * len(offsets)
    for at in offsets:
        model[at : at + 4096] = pattern(99, 0, 4096)
    provider.shutdown()
    host.close()
    disk.close()
    with open_disk(path, read_only=True) as again:
        assert again.read(0, SIZE) == model
