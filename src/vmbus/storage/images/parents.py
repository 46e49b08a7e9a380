"""How a differencing image finds its parent's file, and names it for others."""

import os
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath

from vmbus.storage.disk import DiskError
from vmbus.storage.images.blocks import ImageDisk, OpenParent
from vmbus.storage.images.hostfile import HostFile, bad_image
from vmbus.trace.ledger import Account

__all__ = ["MAX_CHAIN", "open_parent", "windows_relative"]

MAX_CHAIN = 128
"""Images in one chain: more are a mistake, and each holds a file descriptor."""


def open_parent(
    host: HostFile,
    names: Iterable[str],
    opener: OpenParent,
    chain: frozenset[tuple[int, int]],
    account: Account,
) -> ImageDisk:
    """Open the first of the files that a differencing image names which exists.

    Args:
        host: the differencing image's file.
        names: paths as stored in the image, relative or absolute, Windows or POSIX.
        opener: opens an image of the same format.
        chain: files of the chain below, without `host`.
        account: counts the parents' backend calls.

    Raises:
        DiskError: none exists, or it cannot be opened, or the chain comes back to one of its own files.
    """
    chain |= {host.identity}
    if len(chain) >= MAX_CHAIN:
        raise bad_image(host.path, f"the chain of parents is longer than {MAX_CHAIN} images")
    tried = []
    for candidate in _candidates(host.path, names):
        try:
            status = os.stat(candidate)
        except (OSError, ValueError):
            tried.append(str(candidate))
            continue
        if (status.st_dev, status.st_ino) in chain:
            raise bad_image(host.path, f"its chain of parents is a loop, through {candidate}")
        return opener(candidate, chain, account)
    raise DiskError(f"{host.path}: the parent image was not found, tried {', '.join(tried) or 'no path'}")


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
