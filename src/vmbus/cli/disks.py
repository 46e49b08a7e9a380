"""How a disk is named on the command line: its place, then what to know about it."""

import argparse
from dataclasses import dataclass, replace
from typing import Final, cast, get_args

from vmbus.storage.disk import Disk
from vmbus.storage.images import Format, Parents, open_disk

__all__ = ["FORM", "HELP", "DiskArgument", "disk"]

FORM: Final = "IMAGE[,OPTION...]"
HELP: Final = (
    "a file, a block device or an NBD URI; the format is found by the content: raw, VHD or VHDX. Options: "
    "format=raw (or vhd, vhdx; say it of a disk whose guest is not trusted), read-only, "
    "parents=allow (or same-folder, deny). A comma that belongs to the name and stands before the word of an option is "
    "written twice"
)

_FORMATS: Final = get_args(Format)
_PARENTS: Final = get_args(Parents)
_MISSPELT: Final = {"readonly", "read_only", "ro", "parent", "fmt"}


@dataclass(frozen=True)
class DiskArgument:
    """A disk as somebody typed it.

    Attributes:
        place: a path or an NBD URI.
        format: the only format that is taken; None finds it out.
        read_only: never change it.
        parents: which parents a differencing image may have.
    """

    place: str
    format: Format | None = None
    read_only: bool = False
    parents: Parents = "allow"

    def open(self, *, read_only: bool = False) -> Disk:
        """Open it, read-only if that was typed or is asked for here.

        Raises:
            DiskError: as `open_disk`.
        """
        return open_disk(
            self.place,
            read_only=read_only or self.read_only,
            format=self.format,
            parents=self.parents,
        )


def disk(text: str) -> DiskArgument:
    """A `DiskArgument` of ``root.img,format=raw,read-only``; for argparse's ``type``.

    Only commas before an option's name divide, so that most names with commas can be typed as they are; a doubled one
    never does, and stands for one.

    Raises:
        argparse.ArgumentTypeError: an option has no such value.
    """
    options: list[str] = []
    place = text
    while True:
        before, comma, option = place.rpartition(",")
        commas = len(before) - len(before.rstrip(",")) + 1
        if not comma or not commas % 2 or not _is_option(option):
            break
        options.append(option)
        place = before
    argument = DiskArgument(place.replace(",,", ","))
    if not argument.place:
        raise argparse.ArgumentTypeError(f"{text!r} names no image")
    for option in reversed(options):
        argument = _with_option(argument, option)
    return argument


def _is_option(text: str) -> bool:
    return text.partition("=")[0] in {"format", "read-only", "parents"} | _MISSPELT


def _with_option(argument: DiskArgument, option: str) -> DiskArgument:
    name, equals, value = option.partition("=")
    if name == "format" and value in _FORMATS:
        return replace(argument, format=cast("Format", value))
    if name == "parents" and value in _PARENTS:
        return replace(argument, parents=cast("Parents", value))
    if name == "read-only" and (not equals or value in ("on", "off")):
        return replace(argument, read_only=value != "off")
    known = {
        "format": f"format= is one of {', '.join(_FORMATS)}",
        "parents": f"parents= is one of {', '.join(_PARENTS)}",
        "read-only": "read-only has no value, or on or off",
    }
    why = known.get(name, "the options are format=, read-only and parents=")
    raise argparse.ArgumentTypeError(
        f"{option!r} of {argument.place!r}: {why} (a comma that belongs to the name is written twice)"
    )
