"""Finding out what a file is, and opening it."""

from pathlib import Path

from vmbus.errors import DeviceError
from vmbus.storage.disk import DiskError
from vmbus.storage.images.blocks import ImageDisk
from vmbus.storage.images.chain import Chain, Parents
from vmbus.storage.images.hostfile import HostFile
from vmbus.storage.images.vhd import find_footer, open_vhd
from vmbus.storage.images.vhdx import Vhdx
from vmbus.storage.images.vhdx_wire import FILE_SIGNATURE
from vmbus.trace.ledger import Account

__all__ = ["open_image", "open_image_or_none"]


def open_image(
    path: Path, *, read_only: bool, account: Account, format: str, parents: Parents = "allow"
) -> ImageDisk:
    """Open a file that must be an image of the format.

    Raises:
        DiskError: it is something else, damaged, in use, or cannot be opened.
    """
    image = _open(path, read_only, account, Chain(parents))
    if image is None or image.format != format:
        found = "no image of a known format" if image is None else f"a {image.format} image"
        if image is not None:
            image.close()
        raise DiskError(f"{path}: expected a {format} image, found {found}")
    return image


def open_image_or_none(
    path: Path, *, read_only: bool, account: Account, parents: Parents = "allow"
) -> ImageDisk | None:
    """Open an image, or None if the file is of no known format.

    Raises:
        DiskError: it is damaged, in use, or cannot be opened.
    """
    return _open(path, read_only, account, Chain(parents))


def _open(path: Path, read_only: bool, account: Account, chain: Chain) -> ImageDisk | None:
    host = HostFile(path, read_only=read_only, account=account)
    try:
        if host.size >= len(FILE_SIGNATURE) and host.read(0, len(FILE_SIGNATURE)) == FILE_SIGNATURE:
            return Vhdx(host, _open_parent, chain)
        footer = find_footer(host)
        if footer is not None:
            return open_vhd(host, footer, _open_parent, chain)
    except DiskError:
        host.close()
        raise
    except DeviceError as error:
        host.close()
        raise DiskError(f"{path}: {error}") from error
    except BaseException:
        host.close()
        raise
    host.close()
    return None


def _open_parent(path: Path, chain: Chain, account: Account) -> ImageDisk:
    image = _open(path, True, account, chain)
    if image is None:
        raise DiskError(f"{path}: the parent is no image of a known format")
    return image
