"""The compressed kernel inside a bzImage, unpacked on the host.

A bzImage unpacks itself when it is started, which is true to life and slow under emulation. Here the same payload
is unpacked with a host library; the kernel then starts at its own uncompressed entry point, without having been
moved to a random address. gzip, xz, bzip2 and lzma need only the standard library, LZ4 and zstd the packages of
those names.

A file says nothing reliable about what it unpacks to. So each format is unpacked no further than a kernel of its size
may, no further than the guest's memory goes, and with no more working memory than kernels are built for.
"""

import bz2
import importlib
import lzma
import struct
import zlib
from typing import Any, Final

from vmbus.machine.linux import SETUP_SECTS, BootError, KernelError, SizeError

__all__ = ["unpack_kernel"]

PAYLOAD_OFFSET: Final = 0x248
PAYLOAD_LENGTH: Final = 0x24C
LZ4_LEGACY_MAGIC: Final = b"\x02\x21\x4c\x18"
LZ4_LEGACY_BLOCK: Final = 8 << 20
"""Uncompressed size of every block but the last of the legacy format that the kernel's build uses."""
MOST_UNPACKED: Final = 512 << 20
MOST_EXPANSION: Final = 64
"""Bytes out of each byte in: kernels are built with 3 to 6, and one full of zeros with debugging aids has ten."""
SMALL_KERNEL: Final = 16 << 20
"""What any file may unpack to."""
MOST_WINDOW: Final = 128 << 20
"""How far back a format may refer, which is what unpacking it keeps: `zstd --ultra -22`, the most that kernels use."""


def _library(name: str, kind: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise BootError(
            f"unpacking this kernel ({kind}) on the host needs a package: pip install {name.partition('.')[0]}"
        ) from None


def _lz4(payload: bytes, limit: int) -> bytearray:
    block = _library("lz4.block", "LZ4")
    unpacked, at = bytearray(), len(LZ4_LEGACY_MAGIC)
    while at + 4 <= len(payload) and len(unpacked) <= limit:
        (size,) = struct.unpack_from("<I", payload, at)
        if at + 4 + size > len(payload):
            break  # the uncompressed size that the kernel's build appends
        unpacked += block.decompress(payload[at + 4 : at + 4 + size], uncompressed_size=LZ4_LEGACY_BLOCK)
        at += 4 + size
    return unpacked


def _zstd(payload: bytes, limit: int) -> bytes:
    library = _library("zstandard", "zstd")
    with library.ZstdDecompressor(max_window_size=MOST_WINDOW).stream_reader(payload) as stream:
        result: bytes = stream.read(limit + 1)
        return result


def _lzma(payload: bytes, limit: int, form: int = lzma.FORMAT_AUTO) -> bytes:
    return lzma.LZMADecompressor(form, memlimit=2 * MOST_WINDOW).decompress(payload, limit + 1)


def _limit(packed: int, room: int) -> int:
    """How many bytes a payload of `packed` bytes may unpack to, with `room` bytes of guest memory."""
    return min(room, MOST_UNPACKED, max(SMALL_KERNEL, MOST_EXPANSION * packed))


def unpack_kernel(image: bytes, room: int = MOST_UNPACKED) -> bytes:
    """The ELF kernel inside the bzImage `image`.

    Args:
        image: the bzImage.
        room: bytes of guest memory.

    Raises:
        KernelError: there is none, it is damaged, or unpacks to more than a kernel of its size can.
        SizeError: it unpacks to more than the guest's memory.
        BootError: its compression is not known, or the package for its compression is not installed.
    """
    start = ((image[SETUP_SECTS] or 4) + 1) * 512
    offset, length = struct.unpack_from("<II", image, PAYLOAD_OFFSET)
    payload = image[start + offset : start + offset + length]
    if len(payload) < length or length < 16:
        raise KernelError("the kernel is truncated: its compressed part is not all there")
    limit = _limit(len(payload), room)
    unpacked: bytes | bytearray
    try:
        if payload[:4] == LZ4_LEGACY_MAGIC:
            unpacked = _lz4(payload, limit)
        elif payload[:4] == b"\x28\xb5\x2f\xfd":
            unpacked = _zstd(payload, limit)
        elif payload[:2] == b"\x1f\x8b":
            unpacked = zlib.decompressobj(wbits=31).decompress(payload, limit + 1)
        elif payload[:6] == b"\xfd7zXZ\0":
            unpacked = _lzma(payload, limit)
        elif payload[:3] == b"BZh":
            unpacked = bz2.BZ2Decompressor().decompress(payload, limit + 1)
        elif payload[:3] == b"\x5d\0\0":
            unpacked = _lzma(payload, limit, lzma.FORMAT_ALONE)
        else:
            raise BootError("the kernel's compression is not known: let it unpack itself")
    except BootError:
        raise
    except Exception as error:  # each library has an exception of its own for damaged data
        raise KernelError(f"the kernel's compressed part is damaged: {error}") from error
    if len(unpacked) > limit:
        told = (
            f"the kernel's compressed part of {-(-length >> 10)} KiB unpacks to more than {limit >> 20} MiB"
        )
        if limit == room:
            raise SizeError(f"{told}, all of the memory")
        raise KernelError(f"{told}, which no kernel does")
    if unpacked[:4] != b"\x7fELF":
        raise KernelError("the kernel's compressed part holds no ELF file")
    return bytes(unpacked)
