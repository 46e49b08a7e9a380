"""The initramfs, its modules and the package cache."""

import hashlib
import json
import lzma
import struct
import subprocess
from pathlib import Path

import pytest
from reference.disk_model import tool

from vmbus.machine import packages
from vmbus.machine.initramfs import build_initramfs, cpio, module_info, resolve_modules
from vmbus.machine.linux import BootError
from vmbus.machine.packages import load_guest, make_root_disk, prepare_guest


def module(depends: str) -> bytes:
    """A minimal ELF object with a .modinfo section."""
    names = b"\0.modinfo\0.shstrtab\0"
    info = b"license=GPL\0depends=" + depends.encode() + b"\0"
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, 64, 0, 64, 0, 0, 64, 3, 2
    )
    body = 64 + 3 * 64
    sections = [
        (0, 0, 0, 0, 0, 0),
        (1, 1, 0, 0, body, len(info)),
        (10, 3, 0, 0, body + len(info), len(names)),
    ]
    return header + b"".join(struct.pack("<IIQQQQIIQQ", *s, 0, 0, 1, 0) for s in sections) + info + names


def test_modules_come_after_what_they_depend_on(tmp_path: Path) -> None:
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel/top.ko").write_bytes(module("middle,other-one"))
    (tmp_path / "kernel/middle.ko.xz").write_bytes(lzma.compress(module("base,inside")))
    (tmp_path / "kernel/base.ko").write_bytes(module(""))
    (tmp_path / "kernel/other-one.ko").write_bytes(module("base"))
    (tmp_path / "modules.builtin").write_text("kernel/fs/inside.ko\n")
    assert list(resolve_modules(tmp_path, ["top", "inside"])) == ["base", "middle", "other_one", "top"]
    with pytest.raises(BootError, match="no module absent"):
        resolve_modules(tmp_path, ["absent"])


@pytest.mark.parametrize(
    "data", [b"", b"text", b"\x7fELF\x02", b"\x7fELF\x02" + b"\xff" * 100, module("x")[:100]]
)
def test_what_is_no_module(data: bytes) -> None:
    with pytest.raises(BootError, match="not a kernel module"):
        module_info(data)


def test_the_archive_unpacks(tmp_path: Path) -> None:
    tool("cpio")
    archive = build_initramfs(b"\x7fELFbusybox", {"a": b"module"}, files={"etc/deep/hello": b"hi"})
    subprocess.run(
        ["cpio", "-id", "--quiet", "--no-preserve-owner"], input=archive, cwd=tmp_path, check=False
    )
    assert (tmp_path / "bin/busybox").read_bytes() == b"\x7fELFbusybox"
    assert (tmp_path / "lib/modules/a.ko").read_bytes() == b"module"
    assert (tmp_path / "lib/modules/order").read_text() == "a\n"
    assert (tmp_path / "etc/deep/hello").read_bytes() == b"hi"
    assert (tmp_path / "init").stat().st_mode & 0o111


def test_the_same_files_give_the_same_archive() -> None:
    assert build_initramfs(b"\x7fELF", {"m": b"1"}) == build_initramfs(b"\x7fELF", {"m": b"1"})
    archive = cpio([("a", 0o100644, b"123")])
    assert archive.startswith(b"070701")
    assert len(archive) % 4 == 0
    with pytest.raises(BootError, match="busybox"):
        build_initramfs(b"#!/bin/sh", {})


def cache(folder: Path, **more: object) -> None:
    files = {"vmlinuz": b"kernel", "initramfs.cpio": b"archive", "busybox": b"busybox"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    manifest = {
        "format": packages.MANIFEST_FORMAT,
        "recipe": packages.RECIPE,
        "version": "6.1.0",
        "packages": {},
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        **more,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_the_cache_is_used_only_while_every_checksum_holds(tmp_path: Path) -> None:
    assert load_guest(tmp_path) is None
    cache(tmp_path)
    guest = load_guest(tmp_path)
    assert guest is not None
    assert guest.version == "6.1.0"
    assert prepare_guest(tmp_path) == guest
    (tmp_path / "vmlinuz").write_bytes(b"Kernel")
    assert load_guest(tmp_path) is None
    cache(tmp_path)
    (tmp_path / "manifest.json").write_text("[1, 2]")
    assert load_guest(tmp_path) is None


def test_a_guest_with_another_kernel_than_the_named_one_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = "linux-image-6.1.0-50-cloud-amd64"
    cache(tmp_path, wanted="linux-image-cloud-amd64", packages={f"{image}_6.1.192-2_amd64.deb": "…"})
    guest = load_guest(tmp_path)
    for same in (None, "linux-image-cloud-amd64", image):
        assert prepare_guest(tmp_path, package=same) == guest
    monkeypatch.setenv("PATH", "")  # building one fails at once here
    for other in ("linux-image-amd64", "linux-image-6.1.0-50"):
        with pytest.raises(BootError, match="apt-get"):
            prepare_guest(tmp_path, package=other)


def test_a_guest_of_another_recipe_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache(tmp_path)
    assert load_guest(tmp_path) is not None
    monkeypatch.setattr(packages, "RECIPE", "of another init")
    assert load_guest(tmp_path) is None
    monkeypatch.undo()
    monkeypatch.setattr(packages, "MANIFEST_FORMAT", packages.MANIFEST_FORMAT + 1)
    assert load_guest(tmp_path) is None


def test_without_apt_it_says_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BootError, match=r"apt-get.*vmbus boot"):
        prepare_guest(tmp_path / "cache")


def test_root_disk_needs_its_tool_and_spares_existing_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "root.img"
    path.write_bytes(b"precious")
    with pytest.raises(BootError, match="exists already"):
        make_root_disk(path, 1 << 20, b"\x7fELF")
    assert path.read_bytes() == b"precious"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BootError, match="e2fsprogs"):
        make_root_disk(tmp_path / "other.img", 1 << 20, b"\x7fELF")


def test_root_disk_that_is_too_small_leaves_nothing(tmp_path: Path) -> None:
    tool("mke2fs")
    with pytest.raises(BootError, match="mke2fs"):
        make_root_disk(tmp_path / "small.img", 64 << 10, b"\x7fELF" + bytes(1 << 20))
    assert not (tmp_path / "small.img").exists()
