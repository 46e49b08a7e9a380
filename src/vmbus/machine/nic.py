"""What every guest-side network interface offers, and the emulated adapter's place on a virtual switch."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from vmbus.emulated.pci import PciBus
from vmbus.emulated.ports import TULIP_IRQ, TULIP_SLOT, attach_tulip
from vmbus.hypervisor import Partition
from vmbus.network.switch import Port

__all__ = ["NetworkDevice", "TulipAdapter"]

ANY_NUMBER: Final = 1 << 16
TULIP_FRAME: Final = 1514
"""The longest frame that the switch gives the emulated adapter, a tag not counted."""


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


class TulipAdapter:
    """A DEC 21140 of a partition on a port of a virtual switch: the emulated counterpart of `NetworkAdapter`.

    Frames come on the thread of whoever sends them, and the chip has no lock: guests on one switch run on one thread.

    Attributes:
        mac: the address in its serial ROM.
        port: its port.
        tulip: the chip.
        dropped: frames that came faster than the guest takes them, or that its filters refuse.
        account: where it counts in the ledger, with what the switch drops of its frames.
    """

    def __init__(
        self,
        partition: Partition,
        bus: PciBus,
        port: Port,
        mac: bytes,
        *,
        slot: int = TULIP_SLOT,
        irq: int = TULIP_IRQ,
        interrupt: Callable[[bool], None] | None = None,
        backlog: int = 0,
    ) -> None:
        """Plug it in; `slot`, `irq` and `interrupt` are those of `attach_tulip`.

        `backlog` frames may wait for the guest's descriptors; somebody then has to call `poll` now and then. Others
        are lost, as on any wire; an uplink holds them back instead (`room`).

        Raises:
            LocalProtocolError: the slot is taken, or `mac` is not the address of one station.
        """
        self.mac = mac
        self.port = port
        self.dropped = 0
        self._backlog: deque[bytes] = deque()
        self._capacity = backlog
        self.tulip, _ = attach_tulip(partition, bus, mac, self._send, slot=slot, irq=irq, interrupt=interrupt)
        self.tulip.on_progress = self.poll
        self.tulip.on_stop = lambda: self._forget("guest receives nothing")
        self.account = port.account = partition.hypervisor.ledger.account(partition.name, "tulip")
        port.max_frame = min(port.max_frame, TULIP_FRAME)
        port.room = lambda: self.room
        port.receiver = self._receive

    def _send(self, frame: bytes) -> None:
        if self.tulip.link_up:
            self.port.send([frame])
        else:
            self.account.dropped["link is down"] += 1

    @property
    def is_listening(self) -> bool:
        """Whether the guest's driver receives."""
        return self.tulip.link_up and self.tulip.is_receiving

    def reset(self) -> None:
        """The machine restarts: the chip is as at power-on, and no frame waits for it."""
        self._backlog.clear()
        self.tulip.reset()

    def set_link(self, up: bool) -> None:
        """Connect or disconnect the cable; the guest's driver looks now and then."""
        self.tulip.link_up = up
        if not up:
            self._forget("link is down")

    def _forget(self, reason: str) -> None:
        """What waits is lost: a guest that starts reception again gets nothing of what came before."""
        self._drop(len(self._backlog), reason)
        self._backlog.clear()

    @property
    def room(self) -> int:
        """How many frames it takes now without losing any; any number while the guest receives nothing."""
        if not (self.tulip.link_up and self.tulip.is_receiving):
            return ANY_NUMBER
        self.poll()
        if self._backlog or not self.tulip.has_room:
            return self._capacity - len(self._backlog)
        return max(1, self._capacity)

    def _drop(self, frames: int, reason: str) -> None:
        if frames:
            self.dropped += frames
            self.account.dropped[reason] += frames

    def _receive(self, frames: list[bytes]) -> None:
        if not (self.tulip.link_up and self.tulip.is_receiving):
            self._drop(len(frames), "guest receives nothing")
            return
        for number, frame in enumerate(frames):
            self.poll()
            if self._backlog or not self.tulip.has_room:
                room = self._capacity - len(self._backlog)
                rest = frames[number:]
                self._backlog.extend(rest[:room])
                self._drop(max(0, len(rest) - room), "guest has no buffer")
                return
            self._give(frame)

    def poll(self) -> None:
        """Give the guest what waits, as far as it has descriptors for it."""
        while self._backlog and self.tulip.has_room:
            self._give(self._backlog.popleft())

    def _give(self, frame: bytes) -> None:
        """A frame into the guest's descriptors; what its filter keeps out is no loss, but counted in `dropped`."""
        if self.tulip.receive(frame):
            return
        if self.tulip.accepts(frame[:6]):
            self._drop(1, "guest has no buffer")
        else:
            self.dropped += 1
