"""The compressed kernel inside a bzImage, unpacked on the host.

A bzImage unpacks itself when it is started, which is true to life and slow under emulation. Here the same payload
is unpacked with a host library; the kernel then starts at its own uncompressed entry point, without having been
moved to a random address. gzip, xz, bzip2 and lzma need only the standard library, LZ4 and zstd the packages of
those names.
"""

import bz2
import importlib
import lzma
import struct
import zlib
from typing import Any, Final

from vmbus.machine.linux import SETUP_SECTS, BootError, KernelError

__all__ = ["unpack_kernel"]

PAYLOAD_OFFSET: Final = 0x248
PAYLOAD_LENGTH: Final = 0x24C
LZ4_LEGACY_MAGIC: Final = b"\x02\x21\x4c\x18"
LZ4_LEGACY_BLOCK: Final = 8 << 20
"""Uncompressed size of every block but the last of the legacy format that the kernel's build uses."""
MOST_UNPACKED: Final = 512 << 20


def _library(name: str, kind: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise BootError(
            f"unpacking this kernel ({kind}) on the host needs a package: pip install {name.partition('.')[0]}"
        ) from None


def _lz4(payload: bytes) -> bytes:
    block = _library("lz4.block", "LZ4")
    parts, at = [], len(LZ4_LEGACY_MAGIC)
    while at + 4 <= len(payload):
        (size,) = struct.unpack_from("<I", payload, at)
        if at + 4 + size > len(payload):
            break  # the uncompressed size that the kernel's build appends
        parts.append(block.decompress(payload[at + 4 : at + 4 + size], uncompressed_size=LZ4_LEGACY_BLOCK))
        at += 4 + size
    return b"".join(parts)


def _zstd(payload: bytes) -> bytes:
    stream = _library("zstandard", "zstd").ZstdDecompressor().decompressobj()
    result: bytes = stream.decompress(payload)
    return result


def unpack_kernel(image: bytes) -> bytes:
    """The ELF kernel inside the bzImage `image`.

    Raises:
        KernelError: there is none, or it is damaged.
        BootError: its compression is not known, or the package for its compression is not installed.
    """
    start = ((image[SETUP_SECTS] or 4) + 1) * 512
    offset, length = struct.unpack_from("<II", image, PAYLOAD_OFFSET)
    payload = image[start + offset : start + offset + length]
    if len(payload) < length or length < 16:
        raise KernelError("the kernel is truncated: its compressed part is not all there")
    try:
        if payload[:4] == LZ4_LEGACY_MAGIC:
            unpacked = _lz4(payload)
        elif payload[:4] == b"\x28\xb5\x2f\xfd":
            unpacked = _zstd(payload)
        elif payload[:2] == b"\x1f\x8b":
            unpacked = zlib.decompressobj(wbits=31).decompress(payload, MOST_UNPACKED)
        elif payload[:6] == b"\xfd7zXZ\0":
            unpacked = lzma.LZMADecompressor().decompress(payload, MOST_UNPACKED)
        elif payload[:3] == b"BZh":
            unpacked = bz2.BZ2Decompressor().decompress(payload, MOST_UNPACKED)
        elif payload[:3] == b"\x5d\0\0":
            unpacked = lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(payload, MOST_UNPACKED)
        else:
            raise BootError("the kernel's compression is not known: let it unpack itself")
    except BootError:
        raise
    except Exception as error:  # each library has an exception of its own for damaged data
        raise KernelError(f"the kernel's compressed part is damaged: {error}") from error
    if unpacked[:4] != b"\x7fELF":
        raise KernelError("the kernel's compressed part holds no ELF file")
    return unpacked
