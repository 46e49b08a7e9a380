"""How a differencing image finds its parent's file, and names it for others."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath

from vmbus.errors import printable
from vmbus.storage.disk import DiskError
from vmbus.storage.images.blocks import ImageDisk, OpenParent
from vmbus.storage.images.chain import Chain
from vmbus.storage.images.hostfile import HostFile, bad_image
from vmbus.trace.ledger import Account

__all__ = ["MAX_CHAIN", "open_parent", "windows_relative"]

MAX_CHAIN = 128
"""Images in one chain: more are a mistake, and each holds a file descriptor."""
_LEAST = 512
"""Bytes of the smallest image, a VHD's footer; the files of ``/proc`` have 0."""


def open_parent(
    host: HostFile,
    names: Iterable[str],
    opener: OpenParent,
    chain: Chain,
    account: Account,
) -> ImageDisk:
    """Open the first of the files that a differencing image names which exists.

    An image may come from anybody and name anything: what is named is only opened when it is a regular file of at
    least a sector, where the user allows it.

    Args:
        host: the differencing image's file.
        names: paths as stored in the image, relative or absolute, Windows or POSIX.
        opener: opens an image of the same format.
        chain: the way to `host`, without it.
        account: counts the parents' backend calls.

    Raises:
        DiskError: none exists, or it is no file, or it cannot be opened, or the user does not allow it, or the chain
            comes back to one of its own files.
    """
    chain = chain.through(host.identity)
    if len(chain.files) >= MAX_CHAIN:
        raise bad_image(host.path, f"the chain of parents is longer than {MAX_CHAIN} images")
    candidates = list(_candidates(host.path, names))
    if chain.parents == "deny":
        named = _quoted(candidates[0]) if candidates else "none by a path"
        raise DiskError(f"{host.path}: it needs a parent image ({named}), and parents are not allowed")
    folder = host.path.resolve().parent
    tried = []
    for candidate in candidates:
        if chain.parents == "same-folder" and not _is_in(candidate, folder):
            tried.append(f"{_quoted(candidate)} (not in the image's own folder, and others are not allowed)")
            continue
        try:
            status = os.stat(candidate)
        except (OSError, ValueError):
            tried.append(_quoted(candidate))
            continue
        if not stat.S_ISREG(status.st_mode) or status.st_size < _LEAST:
            raise bad_image(host.path, f"its parent {_quoted(candidate)} is no regular file, or an empty one")
        if (status.st_dev, status.st_ino) in chain.files:
            raise bad_image(host.path, f"its chain of parents is a loop, through {_quoted(candidate)}")
        return opener(candidate, chain, account)
    raise DiskError(f"{host.path}: the parent image was not found, tried {', '.join(tried) or 'no path'}")


def _quoted(path: Path) -> str:
    return printable(str(path), 80)


def _is_in(path: Path, folder: Path) -> bool:
    """Whether a path leads to something right in the folder; nothing outside of the folder is looked at to tell."""
    # A link leads elsewhere, or beside itself, where its own name is as good.
    return path.parent == folder and path.name != ".." and not os.path.islink(path)


def _candidates(child: Path, names: Iterable[str]) -> Iterable[Path]:
    """Where the parent may be: as it was named, then under its own name beside the child."""
    folder = child.resolve().parent
    names = [name for name in names if name and "\0" not in name]
    found: dict[Path, None] = {}
    for name in names:
        if name.startswith("/"):
            found[Path(name)] = None
        else:
            windows = PureWindowsPath(name.removeprefix("file://"))
            if not windows.drive and not windows.root:
                found[folder.joinpath(*windows.parts)] = None
    for name in names:
        if base := PureWindowsPath(name).name:
            found[folder / base] = None
    return found


def windows_relative(child: Path, parent: Path) -> str:
    """The parent's path relative to the child's folder, with backslashes, as other implementations expect it."""
    relative = os.path.relpath(parent.resolve(), child.resolve().parent)
    windows = str(PureWindowsPath(relative))
    return windows if windows.startswith("..") else f".\\{windows}"
