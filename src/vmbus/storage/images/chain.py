"""What an image may have as its parents."""

from dataclasses import dataclass, replace
from typing import Literal, Self, TypeAlias

__all__ = ["PARENTS", "Chain", "Parents"]

Parents: TypeAlias = Literal["allow", "same-folder", "deny"]
"""Which files a differencing image may name as its parent: any, those in its own folder, none."""

PARENTS: tuple[Parents, ...] = ("allow", "same-folder", "deny")


@dataclass(frozen=True)
class Chain:
    """The way from the image that the user named to the one that is being opened.

    Attributes:
        parents: what the user allows.
        files: device and inode of all files on the way.
    """

    parents: Parents = "allow"
    files: frozenset[tuple[int, int]] = frozenset()

    def through(self, file: tuple[int, int]) -> Self:
        """The way on, through one file more."""
        return replace(self, files=self.files | {file})
