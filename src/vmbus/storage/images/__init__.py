"""Disk images: VHD and VHDX files, and disks served by an NBD server.

with open_disk("root.vhdx") as disk:
    disk.write(0, bytes(512))
    disk.flush()
"""

import errno
import os
from pathlib import Path
from typing import Literal, TypeAlias

from vmbus.storage.disk import Disk, DiskError, RawDisk
from vmbus.storage.images.blocks import ImageDisk
from vmbus.storage.images.chain import PARENTS, Parents
from vmbus.storage.images.create import Variant, create_vhd, create_vhdx
from vmbus.storage.images.nbd import NbdDisk
from vmbus.storage.images.nbd_uri import is_nbd_uri
from vmbus.storage.images.opening import open_any, open_image
from vmbus.trace.ledger import Account

__all__ = ["Format", "ImageDisk", "NbdDisk", "Parents", "Variant", "create_vhd", "create_vhdx", "open_disk"]

Format: TypeAlias = Literal["raw", "vhd", "vhdx"]


def open_disk(
    path_or_uri: str | os.PathLike[str],
    *,
    read_only: bool = False,
    format: Format | None = None,
    sector_size: int = 512,
    parents: Parents = "allow",
    account: Account | None = None,
) -> Disk:
    """Open a disk image.

    The format is found by the file's content, not its name. A disk image of another kind (QCOW2, VMDK, VDI …), a
    compressed file or an archive is refused: as a raw disk it would show the container instead of the disk in it.

    A guest that writes to a raw image can make its content look like another format, which then would be opened, with
    any file it names as its parent, or refused: say ``format="raw"`` for raw images that an untrusted guest has had.

    The file is locked while it is open, whatever its format: alone for writing, shared for reading, in this process and
    across all of the host.

    Args:
        path_or_uri: a file or block device, or an NBD URI: ``nbd://host[:port]/[export]``,
            ``nbd+unix:///[export]?socket=path``, or with TLS ``nbds:`` and ``nbds+unix:`` (see `NbdDisk`).
        read_only: never change the image, not even by replaying a log that a crash left.
        format: refuse anything else; by default found out. ``"raw"`` takes any file as it is.
        sector_size: logical sector of a raw image, bytes; the other formats know theirs.
        parents: what a differencing image may have as its parent, and that as its own: ``"allow"`` takes the file that
            the image names, ``"same-folder"`` only one in the image's own folder, ``"deny"`` none. Whoever made
            the image chose the path; in any case it must be a regular file with the right identity.
        account: counts the calls into the host's files.

    Raises:
        DiskError: the image is missing, in use, damaged, or of another format, or of one that is not served; one
            sentence that names the file.
    """
    if format not in (None, "raw", "vhd", "vhdx"):
        raise DiskError(f"{path_or_uri}: {format!r} is no format; say 'raw', 'vhd' or 'vhdx'")
    if parents not in PARENTS:
        raise DiskError(
            f"{path_or_uri}: {parents!r} is no rule for parents; say {', '.join(map(repr, PARENTS))}"
        )
    account = Account() if account is None else account
    if isinstance(path_or_uri, str) and is_nbd_uri(path_or_uri):
        if format not in (None, "raw"):
            raise DiskError(f"{path_or_uri}: what an NBD server shows is a raw disk, not {format}")
        return NbdDisk(path_or_uri, read_only=read_only, account=account)
    path = Path(path_or_uri)
    if is_nbd_uri(str(path)) and not path.exists():  # a path has lost slashes of the URI that it was
        raise DiskError(f"{path}: no such file; an NBD URI is given as text, not as a path", errno.ENOENT)
    if format in ("vhd", "vhdx"):
        return open_image(path, read_only=read_only, account=account, format=format, parents=parents)
    if format == "raw":
        return RawDisk(path, read_only=read_only, sector_size=sector_size)
    return open_any(path, read_only=read_only, account=account, parents=parents, sector_size=sector_size)
