"""What every guest-side network interface offers, whatever is below it."""

from collections.abc import Sequence
from typing import Protocol

__all__ = ["NetworkDevice"]


class NetworkDevice(Protocol):
    """A network interface as a guest's applications see it; enlightened and emulated adapters are used alike.

    Frames are Ethernet frames without check sequence.

    Attributes:
        mac: its address, six bytes.
        mtu: bytes of the longest payload of a frame.
    """

    @property
    def mac(self) -> bytes: ...  # noqa: D102
    @property
    def mtu(self) -> int: ...  # noqa: D102

    def send(self, frame: bytes) -> bool:
        """Send a frame; False if there is no room for it now.

        Raises:
            DeviceError: the adapter does not work any more.
        """
        ...

    def send_batch(self, frames: Sequence[bytes]) -> int:
        """Send frames in order, with as little notification as the path needs; how many found room."""
        ...

    def receive(self, limit: int = 64) -> list[bytes]:
        """Frames that have arrived, at most `limit`."""
        ...
