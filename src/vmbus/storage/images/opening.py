"""Finding out what a file is, and opening it."""

import errno
import logging
from functools import partial
from pathlib import Path

from vmbus.errors import DeviceError, printable
from vmbus.storage.disk import DiskError, RawDisk
from vmbus.storage.images.blocks import ImageDisk
from vmbus.storage.images.chain import Chain, Parents
from vmbus.storage.images.foreign import HEAD_SIZE, foreign_content
from vmbus.storage.images.hostfile import HostFile, bad_image
from vmbus.storage.images.vhd import find_footer, open_vhd
from vmbus.storage.images.vhdx import Vhdx
from vmbus.storage.images.vhdx_wire import FILE_SIGNATURE
from vmbus.trace.ledger import Account

__all__ = ["open_any", "open_image"]

_log = logging.getLogger(__name__)

_RAW_SUFFIXES = {".raw", ".img", ".dd", ".bin", ".iso"}


def open_any(
    path: Path, *, read_only: bool, account: Account, parents: Parents, sector_size: int
) -> ImageDisk | RawDisk:
    """Open an image of whatever format its content says; a file of none is a raw disk.

    Raises:
        DiskError: it is of a format that is not served, or packed, or damaged, in use, or cannot be opened.
    """
    host = HostFile(path, read_only=read_only, account=account)
    image = _image_in(host, Chain(parents))
    if image is not None:
        if path.suffix.lower() in _RAW_SUFFIXES:
            _log.warning(
                "%s: its name is that of a raw disk, its content a %s image: if a guest has had it, "
                "say format=raw or format=%s",
                printable(str(path)),
                image.format,
                image.format,
            )
        return image
    try:
        if (found := _foreign(host)) is not None:
            name, advice = found
            raise DiskError(
                f"{path}: {name}, which is not served as a disk: {advice}, or say format=raw if the file's own bytes "
                "are meant to be the disk's",
                errno.EINVAL,
            )
    except BaseException:
        host.close()
        raise
    return RawDisk.from_descriptor(host.release(), str(path), sector_size=sector_size, read_only=read_only)


def open_image(
    path: Path, *, read_only: bool, account: Account, format: str, parents: Parents = "allow"
) -> ImageDisk:
    """Open a file that must be an image of the format.

    Raises:
        DiskError: it is something else, damaged, in use, or cannot be opened.
    """
    host = HostFile(path, read_only=read_only, account=account)
    image = _image_in(host, Chain(parents), format)
    if image is not None:
        return image
    raise DiskError(f"{path}: expected a {format} image, found {_described(host)}", errno.EINVAL)


def _image_in(host: HostFile, chain: Chain, format: str | None = None) -> ImageDisk | None:
    """The image in an open file; None if it is of no known format, or not of `format`. Closes the file if it fails."""
    try:
        is_vhdx = _is_vhdx(host)
        if is_vhdx and format is None and _has_footer(host):
            raise bad_image(
                host.path,
                "it is a VHDX by its start and a VHD by its end, one of which may be its guest's work: "
                "say format=vhd or format=vhdx, whichever it was made as",
            )
        if is_vhdx and format in (None, "vhdx"):
            return Vhdx(host, partial(_open_parent, "vhdx"), chain)
        wanted = format == "vhd" or (format is None and not is_vhdx)
        if wanted and (footer := find_footer(host)) is not None:
            return open_vhd(host, footer, partial(_open_parent, "vhd"), chain)
    except DiskError:
        host.close()
        raise
    except DeviceError as error:
        host.close()
        raise DiskError(f"{host.path}: {error}") from error
    except BaseException:
        host.close()
        raise
    return None


def _is_vhdx(host: HostFile) -> bool:
    return host.size >= len(FILE_SIGNATURE) and host.read(0, len(FILE_SIGNATURE)) == FILE_SIGNATURE


def _has_footer(host: HostFile) -> bool:
    try:
        return find_footer(host) is not None
    except DiskError:
        return False


def _described(host: HostFile) -> str:
    """What an open file is, with its article; closes the file."""
    try:
        if _is_vhdx(host):
            return "a vhdx image"
        if _has_footer(host):
            return "a vhd image"
        return (_foreign(host) or ("no image of a known format",))[0]
    finally:
        host.close()


def _foreign(host: HostFile) -> tuple[str, str] | None:
    size = host.size
    length = min(size, HEAD_SIZE)
    return foreign_content(host.read(0, length), host.read(size - length, length))


def _open_parent(format: str, path: Path, chain: Chain, account: Account) -> ImageDisk:
    """Open the parent of an image of the format, which it has to have as well."""
    host = HostFile(path, read_only=True, account=account)
    image = _image_in(host, chain, format)
    if image is None:
        raise DiskError(f"{path}: the parent is {_described(host)}", errno.EINVAL)
    return image
