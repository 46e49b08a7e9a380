"""Every image is locked while it is open, whatever its format, against this process and all others."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vmbus.storage.disk import DiskError, RawDisk
from vmbus.storage.images import create_vhd, create_vhdx, open_disk

MIB = 1 << 20
OPEN = """
import sys
from vmbus.errors import VmbusError
from vmbus.storage.images import open_disk
for attempt in sys.argv[2:]:
    read_only, format = attempt.split(":")
    try:
        disk = open_disk(sys.argv[1], read_only=bool(read_only), format=format or None)
    except VmbusError as error:
        print("in use" if "in use" in str(error) else error)
    else:
        print("opened", flush=True)
        if attempt is sys.argv[-1]:
            sys.stdin.read()
        disk.close()
"""
WRITE, READ, WRITE_RAW, READ_RAW = ":", "read-only:", ":raw", "read-only:raw"


def make(kind: str, path: Path) -> None:
    if kind == "raw":
        path.write_bytes(bytes(MIB))
    elif kind == "vhdx":
        create_vhdx(path, 4 * MIB).close()
    else:
        create_vhd(path, MIB, variant="fixed" if kind == "vhd-fixed" else "dynamic").close()


KINDS = ["raw", "vhd-fixed", "vhd-dynamic", "vhdx"]


def elsewhere(path: Path, *attempts: str) -> subprocess.Popen[str]:
    """Another process that tries to open the image, and keeps it open if the last attempt went well."""
    command = [sys.executable, "-c", OPEN, str(path), *attempts]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answers(path: Path, *attempts: str) -> list[str]:
    """What another process hears."""
    with elsewhere(path, *attempts) as process:
        return process.communicate()[0].splitlines()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", [None, "raw"])
def test_a_writer_is_alone(kind: str, format: Any, tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(kind, path)
    os.link(path, tmp_path / "other name")
    with open_disk(path, format=format):
        for other in (None, "raw"):
            for read_only in (False, True):
                with pytest.raises(DiskError, match="in use") as caught:
                    open_disk(tmp_path / "other name", format=other, read_only=read_only)
                assert caught.value.errno == errno.EWOULDBLOCK
        with pytest.raises(DiskError, match="in use"):
            RawDisk(path)
        if format is None:
            assert answers(path, WRITE, READ, WRITE_RAW, READ_RAW) == ["in use"] * 4
    open_disk(path, format=format).close()


@pytest.mark.parametrize("kind", KINDS)
def test_readers_share(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(kind, path)
    with open_disk(path, read_only=True), open_disk(path, read_only=True, format="raw"):
        assert answers(path, READ, READ_RAW, WRITE, WRITE_RAW) == ["opened", "opened", "in use", "in use"]
        with pytest.raises(DiskError, match="in use"):
            open_disk(path)
    open_disk(path).close()


def test_a_killed_owner_gives_the_image_back(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make("raw", path)
    with elsewhere(path, WRITE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "opened\n"
        with pytest.raises(DiskError, match="in use"):
            open_disk(path)
        process.kill()
        process.wait()
    open_disk(path).close()


def test_a_disk_that_is_just_made_is_locked_and_one_that_failed_is_not(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with RawDisk.create(path, MIB), pytest.raises(DiskError, match="in use"):
        open_disk(path)
    for _ in range(2):
        with pytest.raises(DiskError, match="sectors of 100 bytes"):
            RawDisk(path, sector_size=100)
    open_disk(path).close()


def test_a_parent_is_not_written_while_a_child_is_open(tmp_path: Path) -> None:
    for make_one in (create_vhd, create_vhdx):
        base, child = tmp_path / f"base{make_one.__name__}", tmp_path / f"child{make_one.__name__}"
        make_one(base, 4 * MIB).close()
        with make_one(child, parent=base):
            for format in (None, "raw"):
                with pytest.raises(DiskError, match="in use"):
                    open_disk(base, format=format)
        with open_disk(base), pytest.raises(DiskError, match="in use"):
            open_disk(child)


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "image"
    make("raw", path)

    def flock(fd: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    open_disk(path).close()
    assert "its file system has no locks" in caplog.text


def test_a_fifo_is_looked_at_and_not_opened(tmp_path: Path) -> None:
    """Opening one lets its writer through."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    script = "import os, sys; os.open(sys.argv[1], os.O_WRONLY); print('through')"
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True) as writer:
        time.sleep(0.2)
        for attempt in (lambda: open_disk(path), lambda: RawDisk(path, read_only=True)):
            with pytest.raises(DiskError, match="neither a file nor a block device"):
                attempt()
        time.sleep(0.2)
        assert writer.poll() is None
        writer.kill()
        assert writer.communicate()[0] == ""


def test_a_uri_that_became_a_path_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DiskError, match="an NBD URI is given as text"):
        open_disk(Path("nbd+unix:///data?socket=nbd.sock"))
    Path("nbd:image").write_bytes(bytes(MIB))
    open_disk(Path("nbd:image")).close()


def test_names_that_no_file_can_have() -> None:
    for attempt in (lambda: open_disk("a\0b"), lambda: RawDisk("a\0b")):
        with pytest.raises(DiskError, match="no file can have this name"):
            attempt()
