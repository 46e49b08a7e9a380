"""Files that are no raw disks, by their first bytes: images of formats that are not served, compressed files, archives.

Taken for raw they would show a guest the container instead of the disk in it, and its first write would destroy them.
What guests themselves put on whole disks (file systems, LUKS, LVM, ISO 9660, squashfs) is not here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

__all__ = ["HEAD_SIZE", "foreign_content"]

HEAD_SIZE: Final = 512
"""Bytes at the beginning of a file that are looked at, and as many at its end."""

_CONVERT: Final = "convert it, with `qemu-img convert -O raw` or `-O vhdx` for instance"
_UNPACK: Final = "unpack it first"
_EXTRACT: Final = "take the disk out of it first"


@dataclass(frozen=True)
class _Kind:
    """Something that a file may be.

    Attributes:
        name: what to call it, with its article.
        advice: what its owner can do.
        magic: its bytes at `offset`.
        check: tells from the head whether it is one, where `magic` alone may be chance.
    """

    name: str
    advice: str
    magic: bytes
    offset: int = 0
    check: Callable[[bytes], bool] = bool


def _is_gzip(head: bytes) -> bool:
    return len(head) > 3 and not head[3] & 0xE0  # RFC 1952: reserved flags are zero


def _is_compress(head: bytes) -> bool:
    return len(head) > 2 and not head[2] & 0x60 and 9 <= head[2] & 0x1F <= 16


def _is_bzip2(head: bytes) -> bool:
    return head[3:4] in b"123456789" and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90")  # π, or √π: an empty file


def _is_lzma(head: bytes) -> bool:
    """The header before xz: 5Dh, a dictionary of 2ⁿ or 3·2ⁿ bytes, the size or all ones."""
    dictionary, size = int.from_bytes(head[1:5], "little"), int.from_bytes(head[5:13], "little")
    usual = (
        dictionary >= 4096 and dictionary.bit_count() <= 2 and dictionary >> (dictionary.bit_length() - 2) > 1
    )
    return len(head) >= 13 and usual and (size == (1 << 64) - 1 or 0 < size < 1 << 40)


def _is_tar(head: bytes) -> bool:
    """A header whose checksum is right, also of archives older than POSIX, which have no magic (pax(1), "ustar")."""
    if len(head) < 512 or not head[0]:
        return False
    digits = head[148:156].strip(b" \0")
    if not digits or digits.strip(b"01234567"):
        return False
    return sum(head[:148]) + 8 * ord(" ") + sum(head[156:512]) == int(digits, 8)


_KINDS: Final = (
    # Disk images.
    _Kind("a QCOW2 image", _CONVERT, b"QFI\xfb\0\0\0\2"),
    _Kind("a QCOW2 image", _CONVERT, b"QFI\xfb\0\0\0\3"),
    _Kind("a QCOW image", _CONVERT, b"QFI\xfb"),
    _Kind("a QED image", _CONVERT, b"QED\0"),
    _Kind("a VMDK image", _CONVERT, b"KDMV"),
    _Kind("a VMDK image", _CONVERT, b"COWD"),
    _Kind("a VMDK image", _CONVERT, b"\xbe\xba\xfe\xca\0\0\0\0"),
    _Kind("the descriptor of a VMDK image", _CONVERT, b"# Disk DescriptorFile"),
    _Kind("a VDI image", _CONVERT, b"\x7f\x10\xda\xbe", 0x40),
    _Kind("a Parallels image", _CONVERT, b"WithoutFreeSpace"),
    _Kind("a Parallels image", _CONVERT, b"WithouFreSpacExt"),
    _Kind("a Bochs image", _CONVERT, b"Bochs Virtual HD Image"),
    _Kind("a cloop image", _CONVERT, b"#!/bin/sh\n#V2.0 Format"),
    _Kind("an Android sparse image", "convert it with simg2img", b"\x3a\xff\x26\xed"),
    _Kind("a CHD image", "convert it with chdman", b"MComprHD"),
    _Kind("an EnCase image", "export it as a raw image", b"EVF\t\r\n\xff\0"),
    _Kind("an EnCase image", "export it as a raw image", b"LVF\t\r\n\xff\0"),
    _Kind("an EnCase image", "export it as a raw image", b"EVF2\r\n\x81\0"),
    _Kind("a partclone image", "restore it to a raw image", b"partclone-image"),
    _Kind("a Partimage image", "restore it to a raw image", b"PaRtImAgE-VoLuMe"),
    _Kind("a compressed ISO image", _UNPACK, b"CISO"),
    _Kind("a Windows image (WIM)", "apply it to a disk", b"MSWIM\0\0\0"),
    _Kind("a Proxmox backup", _EXTRACT, b"VMA\0"),
    # Compressed files.
    _Kind("a gzip-compressed file", _UNPACK, b"\x1f\x8b\x08", check=_is_gzip),
    _Kind("an xz-compressed file", _UNPACK, b"\xfd7zXZ\0"),
    _Kind("a Zstandard-compressed file", _UNPACK, b"\x28\xb5\x2f\xfd"),
    *(
        _Kind("a Zstandard- or LZ4-compressed file", _UNPACK, bytes([0x50 + low, 0x2A, 0x4D, 0x18]))
        for low in range(16)  # a frame that readers skip, in front of the others
    ),
    _Kind("a bzip2-compressed file", _UNPACK, b"BZh", check=_is_bzip2),
    _Kind("an LZ4-compressed file", _UNPACK, b"\x04\x22\x4d\x18"),
    _Kind("an LZ4-compressed file", _UNPACK, b"\x02\x21\x4c\x18"),
    _Kind("an LZMA-compressed file", _UNPACK, b"\x5d", check=_is_lzma),
    _Kind("an lzip-compressed file", _UNPACK, b"LZIP\1"),
    _Kind("an lzop-compressed file", _UNPACK, b"\x89LZO\0\r\n\x1a\n"),
    _Kind("an lrzip-compressed file", _UNPACK, b"LRZI"),
    _Kind("a compressed file (.Z)", _UNPACK, b"\x1f\x9d", check=_is_compress),
    _Kind("a Snappy-compressed file", _UNPACK, b"\xff\6\0\0sNaPpY"),
    # Archives.
    _Kind("a ZIP archive", _EXTRACT, b"PK\3\4"),
    _Kind("a ZIP archive", _EXTRACT, b"PK\5\6"),
    _Kind("a ZIP archive", _EXTRACT, b"PK\7\x08"),
    _Kind("a 7z archive", _EXTRACT, b"7z\xbc\xaf\x27\x1c"),
    _Kind("a RAR archive", _EXTRACT, b"Rar!\x1a\7"),
    _Kind("a tar archive", _EXTRACT, b"", check=_is_tar),
    _Kind("a cpio archive", _EXTRACT, b"070701"),
    _Kind("a cpio archive", _EXTRACT, b"070702"),
    _Kind("a cpio archive", _EXTRACT, b"070707"),
    _Kind("an ar archive", _EXTRACT, b"!<arch>\n"),
    _Kind("a cabinet", _EXTRACT, b"MSCF\0\0\0\0"),
    _Kind("a xar archive", _EXTRACT, b"xar!\0\x1c"),
    _Kind("an RPM package", _EXTRACT, b"\xed\xab\xee\xdb"),
)
_TRAILERS: Final = (
    _Kind("a DMG image", _CONVERT, b"koly\0\0\0\4\0\0\2\0"),
    _Kind("a Nero disc image", "convert it to an ISO image", b"NER5", 500),
    _Kind("a Nero disc image", "convert it to an ISO image", b"NERO", 504),
)


def foreign_content(head: bytes, tail: bytes) -> tuple[str, str] | None:
    """What a file is, with its article, and what its owner can do; None if nothing speaks against a raw disk.

    Args:
        head: the first `HEAD_SIZE` bytes of the file, or all it has.
        tail: the last `HEAD_SIZE` bytes.
    """
    for kinds, content in ((_KINDS, head), (_TRAILERS, tail if len(tail) == HEAD_SIZE else b"")):
        for kind in kinds:
            if content.startswith(kind.magic, kind.offset) and kind.check(content):
                return kind.name, kind.advice
    return None
