"""What a differencing image names as its parent: looked at before it is opened, and only where the user allows it."""

import logging
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from reference.disk_model import fast_folder

from vmbus.storage.disk import Disk, DiskError
from vmbus.storage.images import Parents, create_vhd, create_vhdx, open_disk
from vmbus.storage.images import vhdx_wire as w

MIB = 1 << 20
tmp_path = pytest.fixture(fast_folder, name="tmp_path")


def name_parent(child: Path, name: str) -> None:
    """Make a VHDX name this path, and no other, as its parent."""
    raw = bytearray(child.read_bytes())
    metadata = 2 * MIB  # where our own images have it
    (at,) = [
        metadata + 32 + 32 * i
        for i in range(6)
        if raw[metadata + 32 + 32 * i :][:16] == w.PARENT_LOCATOR.bytes_le
    ]
    item = metadata + struct.unpack_from("<I", raw, at + 16)[0]
    linkage = next(
        raw[item + value : item + value + length]
        for key, value, size, length in struct.iter_unpack("<IIHH", raw[item + 20 : item + 20 + 36])
        if raw[item + key : item + key + size].decode("utf-16-le") == "parent_linkage"
    )
    texts = [
        "parent_linkage".encode("utf-16-le"),
        bytes(linkage),
        "relative_path".encode("utf-16-le"),
        name.encode("utf-16-le"),
    ]
    places, end = [], 20 + 24
    for text in texts:
        places.append(end)
        end += len(text)
    locator = w.PARENT_LOCATOR_VHDX.bytes_le + struct.pack("<HH", 0, 2)
    for i in (0, 2):
        locator += struct.pack("<IIHH", places[i], places[i + 1], len(texts[i]), len(texts[i + 1]))
    locator += b"".join(texts)
    raw[item : item + len(locator)] = locator
    struct.pack_into("<I", raw, at + 20, len(locator))
    child.write_bytes(raw)


@pytest.fixture
def child(tmp_path: Path) -> Path:
    """A VHDX with a parent beside it."""
    create_vhdx(tmp_path / "base.vhdx", 4 * MIB).close()
    path = tmp_path / "child.vhdx"
    create_vhdx(path, parent=tmp_path / "base.vhdx").close()
    return path


def test_a_fifo_is_not_opened(child: Path, tmp_path: Path) -> None:
    """Whoever waits at its other end is let through by that alone."""
    fifo = tmp_path / "elsewhere"
    os.mkfifo(fifo)
    name_parent(child, str(fifo))
    passed = threading.Event()

    def wait() -> None:
        os.close(os.open(fifo, os.O_WRONLY))
        passed.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    try:
        with pytest.raises(DiskError, match="no regular file"):
            open_disk(child, read_only=True)
        with pytest.raises(DiskError, match="neither a file"):  # nor when the user names it
            open_disk(fifo, read_only=True, format="vhdx")
        assert not passed.wait(0.2)
    finally:
        os.close(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK))
        waiting.join()


@pytest.mark.parametrize(
    "name", ["/dev/null", "/dev/zero", "/dev/tty", "/proc/self/environ", "/proc/version", "/"]
)
def test_devices_and_what_the_kernel_makes_up_are_not_opened(
    child: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name_parent(child, name)
    opened: list[str] = []
    real = os.open

    def watched(path: str, flags: int, *more: int) -> int:
        if not flags & os.O_PATH:
            opened.append(os.path.realpath(path))
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", watched)
    with pytest.raises(DiskError, match="no regular file, or an empty one"):
        open_disk(child, read_only=True)
    assert opened == [str(child)]


@pytest.mark.parametrize("make", [create_vhd, create_vhdx])
@pytest.mark.parametrize("parents", ["allow", "same-folder", "deny"])
@pytest.mark.parametrize("place", ["beside", "below", "above", "link"])
def test_where_parents_may_be(
    make: Callable[..., Disk], parents: Parents, place: str, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    base = {"beside": folder, "below": folder / "below", "above": tmp_path, "link": tmp_path}[place] / "base"
    make(base, 4 * MIB).close()
    named = base
    if place == "link":
        named = folder / "link"
        named.symlink_to(base)
    with make(folder / "child", parent=named) as disk:
        disk.write(512, b"x" * 512)
    make(folder / "grandchild", parent=folder / "child").close()
    for image in ("child", "grandchild"):
        if parents == "allow" or (parents == "same-folder" and place == "beside"):
            with open_disk(folder / image, read_only=True, parents=parents) as disk:
                assert disk.read(0, 1024) == bytes(512) + b"x" * 512
        else:
            sentence = "parents are not allowed" if parents == "deny" else "others are not allowed"
            with pytest.raises(DiskError, match=sentence):
                open_disk(folder / image, read_only=True, parents=parents)


def test_images_without_a_parent_do_not_care(tmp_path: Path) -> None:
    create_vhdx(tmp_path / "image", 4 * MIB).close()
    open_disk(tmp_path / "image", parents="deny").close()
    with pytest.raises(DiskError, match="'nobody' is no rule for parents"):
        open_disk(tmp_path / "image", parents="nobody")  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["vhd", "vhdx"])
def test_the_names_of_parents_cannot_command_a_terminal(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither when the file is missing, nor when it is there and wrong."""
    caplog.set_level(logging.DEBUG)
    make = create_vhdx if suffix == "vhdx" else create_vhd
    evil = "\x1b]0;x\x07\u202e\r\n"
    base, child = tmp_path / f"base.{suffix}", tmp_path / f"child.{suffix}"
    make(base, 4 * MIB).close()
    base.rename(tmp_path / f"{evil}")
    make(child, parent=tmp_path / evil).close()
    os.truncate(tmp_path / evil, 1000)
    sentences = []
    for _ in range(2):
        with pytest.raises(DiskError) as caught:
            open_disk(child)
        sentences.append(str(caught.value))
        (tmp_path / evil).unlink(missing_ok=True)
    for sentence in [*sentences, *caplog.messages]:
        assert sentence.isprintable()
        assert len(sentence) < 1100
    assert all(r"\x1b]0;x\x07\u202e\r\n" in sentence for sentence in sentences)


def test_a_name_of_any_length_makes_a_short_message(child: Path, tmp_path: Path) -> None:
    name_parent(child, "\\".join(["x" * 100] * 100))
    (tmp_path / "base.vhdx").unlink()
    with pytest.raises(DiskError, match="was not found") as caught:
        open_disk(child)
    assert len(str(caught.value)) < 600
