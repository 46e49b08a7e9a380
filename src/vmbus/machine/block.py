"""What every guest-side disk offers, whatever is below it."""

from collections.abc import Sequence
from typing import Protocol

__all__ = ["BlockDevice"]


class BlockDevice(Protocol):
    """A disk as a guest's applications see it; enlightened and emulated disks are used alike.

    Attributes:
        sector_size: bytes of a logical sector; offsets and lengths are multiples of it.
        size: capacity in bytes.
    """

    @property
    def sector_size(self) -> int: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`.

        Raises:
            DeviceError: out of range, or the disk reported an error.
        """
        ...

    def write(self, offset: int, data: bytes) -> None:
        """Write all of `data` at `offset`; it may be lost in a crash until `flush`.

        Raises:
            DeviceError: out of range, read-only, or the disk reported an error.
        """
        ...

    def flush(self) -> None:
        """Return when everything written is on stable storage."""
        ...

    def read_batch(self, offsets: Sequence[int], length: int) -> list[bytes]:
        """`length` bytes at each offset, as many requests under way at once as the path can have."""
        ...

    def write_batch(self, offsets: Sequence[int], data: Sequence[bytes]) -> None:
        """Write ``data[i]`` at ``offsets[i]``, as many requests under way at once as the path can have."""
        ...
