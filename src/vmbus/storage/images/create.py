"""Making new images. Every function refuses to touch a file that exists."""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias
from uuid import UUID, uuid4

from vmbus.storage.disk import DiskError
from vmbus.storage.images.blocks import ImageDisk
from vmbus.storage.images.opening import open_image
from vmbus.storage.images.parents import windows_relative
from vmbus.storage.images.vhd_wire import (
    FORMAT_VERSION,
    MAX_FIXED_SIZE,
    MAX_SIZE,
    NO_OFFSET,
    SECTOR,
    DiskType,
    DynamicHeader,
    ParentLocator,
    Platform,
    new_footer,
    sealed,
    timestamp,
)
from vmbus.storage.images.vhdx_create import VhdxLayout, write_vhdx
from vmbus.trace.ledger import Account

__all__ = ["Variant", "create_vhd", "create_vhdx"]

Variant: TypeAlias = Literal["fixed", "dynamic", "differencing"]


def create_vhd(
    path: str | os.PathLike[str],
    size: int = 0,
    *,
    variant: Variant = "dynamic",
    block_size: int = 2 << 20,
    parent: str | os.PathLike[str] | None = None,
    preallocate: bool = False,
    unique_id: UUID | None = None,
) -> ImageDisk:
    """Make a VHD and open it for writing.

    Args:
        path: the new file.
        size: the disk in bytes, whole 512-byte sectors, at most 2040 GiB, a fixed one at most 64 TiB (which QEMU
            refuses, Azure does not); 0 with a `parent` means the parent's.
        variant: ``"differencing"`` is meant whenever a `parent` is given.
        block_size: bytes of a block, a power of two from 4 KiB to 256 MiB; other software expects 2 MiB or 512 KiB.
        parent: the VHD that a differencing image is based on; it must not change any more.
        preallocate: reserve the space of a fixed image instead of leaving a hole.
        unique_id: the disk's name for good; by default random.

    Raises:
        DiskError: the file exists, an argument is not possible, or the host's disk refused.
    """
    target, base = Path(path), _open_parent(parent, "vhd")
    try:
        if base is not None:
            variant, size = "differencing", size or base.size
        elif variant == "differencing":
            raise DiskError(f"{target}: a differencing image needs a parent", errno.EINVAL)
        if not 0 < size <= (MAX_FIXED_SIZE if variant == "fixed" else MAX_SIZE) or size % SECTOR:
            raise DiskError(f"{target}: a disk of {size} bytes is not possible in a VHD", errno.EINVAL)
        if block_size & (block_size - 1) or not 4096 <= block_size <= 256 << 20:
            raise DiskError(f"{target}: a block size of {block_size} bytes is not possible", errno.EINVAL)
        if variant != "fixed" and size > block_size << 24:
            raise DiskError(f"{target}: blocks of {block_size} bytes are too many", errno.EINVAL)
        disk_type = {
            "fixed": DiskType.FIXED,
            "dynamic": DiskType.DYNAMIC,
            "differencing": DiskType.DIFFERENCING,
        }[variant]
        footer = new_footer(size, disk_type, unique_id or uuid4())

        def fill(file: BinaryIO) -> None:
            if disk_type == DiskType.FIXED:
                if preallocate:
                    os.posix_fallocate(file.fileno(), 0, size)
                file.seek(size)
                file.write(footer.pack())
                return
            entries = -(-size // block_size)
            header, extra = _vhd_header(target, base, entries, block_size)
            file.write(footer.pack() + header.pack())
            file.write(b"\xff" * (-(-4 * entries // SECTOR) * SECTOR))
            file.write(extra + footer.pack())

        _make(target, fill)
    finally:
        if base is not None:
            base.close()
    return open_image(target, read_only=False, account=Account(), format="vhd")


def _vhd_header(
    target: Path, base: ImageDisk | None, entries: int, block_size: int
) -> tuple[DynamicHeader, bytes]:
    """The header, and the parent locators' content that follows the table."""
    unused = ParentLocator(0, 0, 0, 0, 0)
    header = DynamicHeader(
        DynamicHeader.COOKIE,
        NO_OFFSET,
        3 * SECTOR,
        FORMAT_VERSION,
        entries,
        block_size,
        0,
        UUID(int=0),
        0,
        0,
        b"",
        unused,
        unused,
        unused,
        unused,
        unused,
        unused,
        unused,
        unused,
    )
    if base is None:
        return sealed(header), b""
    offset = header.table_offset + -(-4 * entries // SECTOR) * SECTOR
    extra, locators = b"", []
    names = {
        Platform.W2RU: windows_relative(target, base.path),
        Platform.W2KU: str(base.path.resolve()),
    }
    for platform, text in names.items():
        raw = text.encode("utf-16-le")
        space = -(-len(raw) // SECTOR) * SECTOR
        locators.append(ParentLocator(platform, space, len(raw), 0, offset + len(extra)))
        extra += raw.ljust(space, b"\0")
    name = base.path.name.encode("utf-16-be")[:510]
    modified = timestamp(base.path.stat().st_mtime)
    assert base.identifier is not None
    return sealed(
        replace(
            header,
            parent_unique_id=base.identifier,
            parent_timestamp=modified,
            parent_name=name,
            locator0=locators[0],
            locator1=locators[1],
        )
    ), extra


def create_vhdx(
    path: str | os.PathLike[str],
    size: int = 0,
    *,
    variant: Variant = "dynamic",
    block_size: int = 0,
    sector_size: int = 0,
    physical_sector_size: int = 4096,
    parent: str | os.PathLike[str] | None = None,
    preallocate: bool = False,
    unique_id: UUID | None = None,
    log_size: int = 1 << 20,
) -> ImageDisk:
    """Make a VHDX and open it for writing.

    Args:
        path: the new file.
        size: the disk in bytes, whole sectors, at most 64 TiB; 0 with a `parent` means the parent's.
        variant: ``"differencing"`` is meant whenever a `parent` is given.
        block_size: bytes of a block, a power of two from 1 MiB to 256 MiB; 0 chooses Hyper-V's usual size:
            2 MiB for differencing images, else 32 MiB.
        sector_size: logical sector, 512 or 4096 bytes; 0 means the parent's or 512.
        physical_sector_size: 512 or 4096 bytes.
        parent: the VHDX that a differencing image is based on; it must not change any more.
        preallocate: reserve the space of a fixed image instead of leaving holes.
        unique_id: the disk's name for good (SCSI page 83h); by default random.
        log_size: bytes of the log, whole MiB.

    Raises:
        DiskError: the file exists, an argument is not possible, or the host's disk refused.
    """
    target, base = Path(path), _open_parent(parent, "vhdx")
    try:
        if base is not None:
            variant, size, sector_size = "differencing", size or base.size, sector_size or base.sector_size
            if sector_size != base.sector_size:
                raise DiskError(f"{target}: the parent has sectors of {base.sector_size} bytes", errno.EINVAL)
        elif variant == "differencing":
            raise DiskError(f"{target}: a differencing image needs a parent", errno.EINVAL)
        layout = VhdxLayout(
            target,
            size,
            fixed=variant == "fixed",
            block_size=block_size or (2 << 20 if base is not None else 32 << 20),
            sector_size=sector_size or 512,
            physical_sector_size=physical_sector_size,
            unique_id=unique_id or uuid4(),
            log_size=log_size,
            parent=base,
        )
        _make(target, lambda file: write_vhdx(file, layout, preallocate=preallocate))
    finally:
        if base is not None:
            base.close()
    return open_image(target, read_only=False, account=Account(), format="vhdx")


def _open_parent(parent: str | os.PathLike[str] | None, format: str) -> ImageDisk | None:
    if parent is None:
        return None
    return open_image(Path(parent), read_only=True, account=Account(), format=format)


def _make(path: Path, fill: Callable[[BinaryIO], None]) -> None:
    """Make the file with `fill`, durably, or leave nothing behind."""
    try:
        with open(path, "xb") as file:
            try:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise DiskError(f"{path}: cannot make the image: {error.strerror}", error.errno or 0) from error
