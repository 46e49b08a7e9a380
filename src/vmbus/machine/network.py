"""Network adapters of a booted guest: a switch in the parent, uplinks to the world, and the host's part of the loop.

machine = Machine(kernel, …)
with GuestNetwork(machine.bus) as network:
    network.add("tap:vmbus0", mac=bytes.fromhex("00155d000001"))
    machine.run(until="# ", idle=network.idle, poll=network.poll)

A guest on a virtual clock skips idle time. With a network it must not: what the world answers takes real time. So
`GuestNetwork.idle` lets a guest that waits for its next timer wait as long in real time, unless a frame comes.
"""

import os
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID, uuid5

from vmbus.bus import VmbusHost
from vmbus.errors import DeviceError
from vmbus.network.adapter import NetworkAdapter
from vmbus.network.oid import Offloads
from vmbus.network.pcapng import PcapngWriter
from vmbus.network.switch import Mirror, Switch, SwitchKind
from vmbus.network.uplink import StreamUplink, TapUplink, Uplink, UplinkPort, attach
from vmbus.network.vsp_oid import AdapterConfig

__all__ = ["GuestNetwork", "Interface", "open_uplink", "parse_mac"]

NAMESPACE: Final = UUID("5d0b0b6c-3f0e-4a53-9f4e-8b6a3f1f0d11")
"""Instance ids of adapters come from their address, so that runs repeat."""
LONGEST_IDLE: Final = 2.0
"""Seconds that an idle guest is held back for its next timer; what is longer is skipped."""
LONGEST_WAIT: Final = 0.1
"""Seconds that a guest without a timer waits before limits are looked at again."""
MICROSOFT_PREFIX: Final = b"\x00\x15\x5d"


@dataclass(slots=True)
class Interface:
    """One adapter of the guest and what it is connected to.

    Attributes:
        adapter: the adapter.
        switch: a switch of its own.
        uplink: None for an adapter on a private switch.
        capture: where its traffic is recorded, or None.
    """

    adapter: NetworkAdapter
    switch: Switch
    uplink: UplinkPort | None
    capture: PcapngWriter | None

    def close(self) -> None:
        """Leave the switch and close uplink and capture; the adapter itself goes with the guest's bus."""
        self.adapter.port.disconnect()
        if self.uplink is not None:
            self.uplink.close()
        if self.capture is not None:
            self.capture.close()


def open_uplink(text: str) -> Uplink | None:
    """The uplink that ``tap``, ``tap:NAME``, ``stream:PATH`` or ``none`` names.

    Raises:
        DeviceError: it cannot be opened, or the text names none.
    """
    kind, _, name = text.partition(":")
    if kind == "tap":
        return TapUplink(name, up=True)
    if kind == "stream" and name:
        return StreamUplink.connect(name)
    if text == "none":
        return None
    raise DeviceError(f"no network called {text!r}: give tap, tap:NAME, stream:PATH or none")


def parse_mac(text: str) -> bytes:
    """A MAC address from ``00:15:5d:00:00:01`` or ``00-15-5D-00-00-01``.

    Raises:
        ValueError: it is none, or not one that an adapter can have.
    """
    mac = bytes.fromhex(text.replace(":", "").replace("-", ""))
    AdapterConfig(mac)
    return mac


class GuestNetwork:
    """All adapters of one guest.

    Attributes:
        interfaces: in the order of `add`.
    """

    def __init__(self, bus: VmbusHost | None) -> None:
        """`bus` is the guest's; a machine without one has no adapters.

        Raises:
            DeviceError: there is no bus.
        """
        if bus is None:
            raise DeviceError("a machine without enlightenments has no synthetic network adapter")
        self._bus = bus
        self.interfaces: list[Interface] = []

    def add(
        self,
        uplink: str | Uplink | None = None,
        *,
        mac: bytes | None = None,
        offloads: Offloads | None = None,
        capture: str | os.PathLike[str] | None = None,
        queues: int = 1,
    ) -> Interface:
        """Give the guest an adapter.

        Args:
            uplink: what it is connected to; text as `open_uplink` takes it.
            mac: its address; 00-15-5D-00-00-01 and so on if not given.
            offloads: what it offers; everything if not given.
            capture: pcapng file that gets a copy of all frames.
            queues: channels that the guest may open.

        Raises:
            DeviceError: the uplink cannot be opened.
            OSError: the capture file cannot be written.
        """
        opened = open_uplink(uplink) if isinstance(uplink, str) else uplink
        number = len(self.interfaces) + 1
        address = mac or MICROSOFT_PREFIX + number.to_bytes(3, "big")
        switch = Switch(
            SwitchKind.EXTERNAL if opened is not None else SwitchKind.PRIVATE, name=f"net{number}"
        )
        recorder = None
        if capture is not None:
            recorder = PcapngWriter(Path(capture), interface=f"net{number}")
            switch.connect("capture", mirror=Mirror.DESTINATION, receiver=recorder)
        port = switch.connect("guest", mirror=Mirror.SOURCE if recorder else Mirror.NONE)
        config = AdapterConfig(address, offloads=offloads or Offloads.everything(), max_queues=queues)
        adapter = NetworkAdapter(
            self._bus, port, config, instance_id=uuid5(NAMESPACE, address.hex()), name=f"net{number}"
        )
        joined = None if opened is None else attach(switch, opened)
        interface = Interface(adapter, switch, joined, recorder)
        self.interfaces.append(interface)
        return interface

    def poll(self) -> None:
        """Bring in what has come from the uplinks.

        Raises:
            DeviceError: an uplink is gone.
        """
        for interface in self.interfaces:
            if interface.uplink is not None:
                interface.uplink.poll()

    def idle(self, until_timer: int | None, also: Sequence[int] = ()) -> bool:
        """The guest waits: for a frame, or for its next timer in `until_timer` virtual nanoseconds.

        Args:
            until_timer: as the engine gives it.
            also: descriptors that end the wait as well, such as a keyboard's.

        Returns:
            whether something came, or may still come; see `vmbus.engine.unicorn.UnicornEngine`.
        """
        wait = LONGEST_WAIT if until_timer is None else min(until_timer / 1e9, LONGEST_IDLE)
        sources = [i.uplink.uplink for i in self.interfaces if i.uplink is not None]
        readers: list[int] = [u.fileno() for u in sources if u.fileno() >= 0]
        writers = [u.fileno() for u in sources if isinstance(u, StreamUplink) and u.pending]
        end = time.monotonic() + wait
        while True:
            left = max(0.0, end - time.monotonic())
            came, writable, _ = select.select([*readers, *also], writers, [], left)
            for uplink in sources:
                if isinstance(uplink, StreamUplink) and uplink.fileno() in writable:
                    uplink.flush()
            if came:
                self.poll()
                return True
            if left == 0.0 or not writable:
                return until_timer is None
            writers = []

    def close(self) -> None:
        """Close all uplinks and captures."""
        interfaces, self.interfaces = self.interfaces, []
        for interface in interfaces:
            interface.close()

    def __enter__(self) -> "GuestNetwork":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
