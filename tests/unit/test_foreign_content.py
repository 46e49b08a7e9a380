"""Files that are no raw disks are told by their content, and refused with words, unless somebody says raw."""

import bz2
import gzip
import io
import lzma
import os
import random
import shutil
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from reference.disk_model import fast_folder, qemu_img, tool
from reference.vhd_writer import write_vhd

from vmbus.storage.disk import DiskError, RawDisk
from vmbus.storage.images import create_vhd, create_vhdx, open_disk

MIB = 1 << 20
CONTENT = b"the disk".ljust(512) * 64
tmp_path = pytest.fixture(fast_folder, name="tmp_path")


def tar(format: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        entry = tarfile.TarInfo("disk.img")
        entry.size = len(CONTENT)
        archive.addfile(entry, io.BytesIO(CONTENT))
    return out.getvalue()


def old_tar() -> bytes:
    """Of before POSIX: no magic, and a checksum over it."""
    raw = bytearray(tar(tarfile.USTAR_FORMAT))
    raw[257:345] = bytes(88)
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


def packed_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("disk.img", CONTENT)
    return out.getvalue()


def empty_zip() -> bytes:
    out = io.BytesIO()
    zipfile.ZipFile(out, "w").close()
    return out.getvalue()


LZMA = lzma.compress(CONTENT, lzma.FORMAT_ALONE)
PACKED: dict[str, tuple[Callable[[], bytes], str]] = {
    "gzip": (lambda: gzip.compress(CONTENT), "a gzip-compressed file"),
    "bzip2": (lambda: bz2.compress(CONTENT), "a bzip2-compressed file"),
    "bzip2 of nothing": (lambda: bz2.compress(b""), "a bzip2-compressed file"),
    "xz": (lambda: lzma.compress(CONTENT), "an xz-compressed file"),
    "lzma": (lambda: LZMA, "an LZMA-compressed file"),
    "lzma, size known": (lambda: LZMA[:5] + struct.pack("<Q", 32768) + LZMA[13:], "an LZMA-compressed file"),
    "zip": (packed_zip, "a ZIP archive"),
    "zip of nothing": (empty_zip, "a ZIP archive"),
    "tar": (lambda: tar(tarfile.USTAR_FORMAT), "a tar archive"),
    "tar of GNU": (lambda: tar(tarfile.GNU_FORMAT), "a tar archive"),
    "tar of pax": (lambda: tar(tarfile.PAX_FORMAT), "a tar archive"),
    "tar of old": (old_tar, "a tar archive"),
}
MAGIC = {  # by hand, where no tool is at hand; the numbers are those of file(1)
    "Zstandard": (b"\x28\xb5\x2f\xfd", 0, "a Zstandard-compressed file"),
    "LZ4": (b"\x04\x22\x4d\x18", 0, "an LZ4-compressed file"),
    "LZ4 of the kernel": (b"\x02\x21\x4c\x18", 0, "an LZ4-compressed file"),
    "skippable frame": (b"\x5f\x2a\x4d\x18", 0, "LZ4-compressed"),
    "lzip": (b"LZIP\1", 0, "an lzip-compressed file"),
    "lzop": (b"\x89LZO\0\r\n\x1a\n", 0, "an lzop-compressed file"),
    "compress": (b"\x1f\x9d\x90", 0, "a compressed file"),
    "7z": (b"7z\xbc\xaf\x27\x1c", 0, "a 7z archive"),
    "RAR": (b"Rar!\x1a\7\1\0", 0, "a RAR archive"),
    "cabinet": (b"MSCF\0\0\0\0", 0, "a cabinet"),
    "QCOW": (b"QFI\xfb\0\0\0\1", 0, "a QCOW image"),
    "VMDK of ESX": (b"COWD", 0, "a VMDK image"),
    "VMDK of ESX 6.5": (b"\xbe\xba\xfe\xca\0\0\0\0", 0, "a VMDK image"),
    "VMDK descriptor": (b"# Disk DescriptorFile\nversion=1\n", 0, "the descriptor of a VMDK image"),
    "Bochs": (b"Bochs Virtual HD Image", 0, "a Bochs image"),
    "Android": (b"\x3a\xff\x26\xed", 0, "an Android sparse image"),
    "EnCase": (b"EVF\t\r\n\xff\0", 0, "an EnCase image"),
    "WIM": (b"MSWIM\0\0\0", 0, "a Windows image"),
    "DMG": (b"koly\0\0\0\4\0\0\2\0", -512, "a DMG image"),
}


def refused(path: Path, sentence: str) -> None:
    """Refused with words and untouched; taken as it is for those who say so."""
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(DiskError, match=sentence) as caught:
            open_disk(path, read_only=read_only)
        assert "format=raw" in str(caught.value)
        assert str(path) in str(caught.value)
    with pytest.raises(DiskError, match=f"expected a vhdx image, found .*{sentence}"):
        open_disk(path, format="vhdx")
    assert path.read_bytes() == before
    os.truncate(path, len(before) + -len(before) % 512)
    with open_disk(path, format="raw") as disk:
        assert type(disk) is RawDisk
        assert disk.read(0, 512) == before[:512].ljust(512, b"\0")


@pytest.mark.parametrize("kind", PACKED)
def test_packed_files(kind: str, tmp_path: Path) -> None:
    make, sentence = PACKED[kind]
    (tmp_path / "disk.img").write_bytes(make())
    refused(tmp_path / "disk.img", sentence)


@pytest.mark.parametrize("kind", MAGIC)
def test_signatures(kind: str, tmp_path: Path) -> None:
    magic, at, sentence = MAGIC[kind]
    raw = bytearray(16384)
    at %= len(raw)
    raw[at : at + len(magic)] = magic
    (tmp_path / "disk.img").write_bytes(raw)
    refused(tmp_path / "disk.img", sentence)


@pytest.mark.parametrize(
    ("image_format", "options", "sentence"),
    [
        ("qcow2", "compat=1.1", "a QCOW2 image"),
        ("qcow2", "compat=0.10", "a QCOW2 image"),
        ("qcow", "", "a QCOW image"),
        ("qed", "", "a QED image"),
        ("vmdk", "", "a VMDK image"),
        ("vmdk", "subformat=streamOptimized", "a VMDK image"),
        ("vmdk", "subformat=twoGbMaxExtentFlat", "the descriptor of a VMDK image"),
        ("vdi", "", "a VDI image"),
        ("parallels", "", "a Parallels image"),
    ],
)
def test_images_of_other_formats(image_format: str, options: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", image_format, *(["-o", options] if options else []), path, "1M")
    refused(path, sentence)


def test_a_parent_of_another_format_is_none(tmp_path: Path) -> None:
    parent = tmp_path / "parent.vhd"
    qemu_img("create", "-q", "-f", "qcow2", parent, "1M")
    for make in (create_vhd, create_vhdx):
        with pytest.raises(DiskError, match="a QCOW2 image"):
            make(tmp_path / "child", parent=parent)


def mbr() -> bytes:
    return random.Random(3).randbytes(440) + bytes(70) + b"\x55\xaa"


@pytest.mark.parametrize(
    "head",
    [
        bytes(512),
        mbr(),
        b"\xeb\x63\x90" + mbr()[3:],
        b"LUKS\xba\xbe\0\2",  # what a guest puts on its whole disk stays a raw disk
        b"LABELONE".rjust(520, b"\0"),
        b"hsqs",
        b"-FVE-FS-",
        b"\x1f\x8b\x08\xff",  # like gzip, with flags that there are not
        b"BZh9" + bytes(6),
        b"\x1f\x9d\xff",
        b"PK\0\0",
        b"\x5d\0\0\0\0" + bytes(8),
        b"vhdxfil" + bytes(9),
        b"conecti" + bytes(9),
    ],
)
def test_raw_disks_stay_raw(head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2.gz"  # names say nothing
    path.write_bytes(head.ljust(MIB, b"\0"))
    with open_disk(path) as disk:
        assert type(disk) is RawDisk
        disk.write(4096, b"x" * 512)


def test_noise_is_a_raw_disk(tmp_path: Path) -> None:
    rnd = random.Random(1)
    path = tmp_path / "disk"
    for _ in range(300):
        path.write_bytes(rnd.randbytes(2048))
        open_disk(path).close()


def test_file_systems_are_raw_disks(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    maker = shutil.which("mke2fs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or tool("mke2fs")
    subprocess.run([maker, "-q", "-t", "ext4", str(path)], check=True, stdin=subprocess.DEVNULL)
    with open_disk(path) as disk:
        assert type(disk) is RawDisk


def test_a_raw_disk_with_the_content_of_an_image_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A guest made a VHDX of its raw disk; the next boot says so, and with the format it does not matter."""
    raw, made = tmp_path / "root.img", tmp_path / "made"
    raw.write_bytes(bytes(16 * MIB))
    create_vhdx(made, 1 << 40, block_size=32 * MIB).close()
    with open_disk(raw, format="raw") as disk:
        disk.write(0, made.read_bytes()[: 16 * MIB])
    with open_disk(raw, format="raw") as disk:
        assert (type(disk), disk.size) == (RawDisk, 16 * MIB)
    assert not caplog.messages
    open_disk(raw, read_only=True).close()
    assert "its name is that of a raw disk, its content a vhdx image" in caplog.text
    caplog.clear()
    open_disk(made, read_only=True).close()
    assert not caplog.messages


def test_a_guest_cannot_make_another_format_of_its_fixed_vhd(tmp_path: Path) -> None:
    """Its first sector is the file's first."""
    fixed, made = tmp_path / "disk.vhd", tmp_path / "made"
    create_vhd(fixed, 16 * MIB, variant="fixed").close()
    for make, sentence in (
        (create_vhdx, "a VHDX by its start and a VHD by its end"),
        (create_vhd, "a fixed image"),
    ):
        made.unlink(missing_ok=True)
        make(made, 1 << 40).close()
        with open_disk(fixed, format="vhd") as disk:
            disk.write(0, made.read_bytes()[: 8 * MIB])
        with pytest.raises(DiskError, match=sentence):
            open_disk(fixed)
        if make is create_vhd:
            with pytest.raises(DiskError, match=sentence):
                open_disk(fixed, format="vhd")
        with open_disk(fixed, format="raw") as disk:
            disk.write(0, bytes(8 * MIB))
    with open_disk(fixed) as disk:
        assert disk.size == 16 * MIB


def test_a_guest_cannot_make_another_format_of_its_vhdx(tmp_path: Path) -> None:
    """The last sector of the block that lies last is the file's last."""
    path, made = tmp_path / "disk.vhdx", tmp_path / "made"
    create_vhd(made, MIB, variant="fixed").close()
    with create_vhdx(path, 4 * MIB, block_size=MIB) as disk:
        disk.write(0, bytes(MIB - 512) + made.read_bytes()[-512:])
    with pytest.raises(DiskError, match="a VHDX by its start and a VHD by its end"):
        open_disk(path)
    with create_vhdx(tmp_path / "child", parent=path) as child:  # the parent of a VHDX can only be one
        assert child.read(MIB - 512, 512)[:8] == b"conectix"
    with open_disk(path, format="vhdx") as disk:
        disk.write(MIB - 512, bytes(512))
    open_disk(path).close()


@pytest.mark.parametrize("variant", ["fixed", "dynamic"])
def test_a_crash_does_not_make_a_guests_sector_the_footer(variant: str, tmp_path: Path) -> None:
    """While blocks are added a VHD has no footer at its end; there is the guest's last sector."""
    path, made = tmp_path / "disk.vhd", tmp_path / "made"
    create_vhd(made, 2 * MIB, variant=variant).close()
    write_vhd(path, 4 * MIB, MIB, {0: (b"\xff" * 256, bytes(MIB - 512) + made.read_bytes()[-512:])})
    os.truncate(path, path.stat().st_size - 512)
    if variant == "dynamic":  # the image's own footer at the start counts
        with open_disk(path, read_only=True) as disk:
            assert disk.size == 4 * MIB
            assert disk.read(MIB - 512, 512)[:8] == b"conectix"
    else:
        with pytest.raises(DiskError, match="a fixed image by its end and a dynamic one by its start"):
            open_disk(path)
