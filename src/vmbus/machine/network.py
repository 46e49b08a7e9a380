"""Network adapters of a booted guest: a switch in the parent, uplinks to the world, and the host's part of the loop.

with Machine(kernel, initrd=…, append="console=ttyS0 ip=dhcp", networks=["passt,tcp=2222:22"]) as machine:
    lan = machine.network.add("tap:vmbus0", mac=parse_mac("00:15:5d:00:00:01"), mtu=9000)
    machine.run(until="# ")
    lan.adapter.set_link(False)

A guest on a virtual clock skips idle time. With a network it must not: what the world answers takes real time. So
`GuestNetwork.idle` lets a guest that waits for its next timer wait in real time, unless a frame comes; the engine keeps
the guest's clock with the host's meanwhile (`vmbus.engine.pace`).
"""

import logging
import os
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID, uuid5

from vmbus.bus import VmbusHost
from vmbus.errors import DeviceError, VmbusError, printable
from vmbus.machine.nic import TulipAdapter
from vmbus.network.adapter import NetworkAdapter
from vmbus.network.oid import Offloads
from vmbus.network.passt import PasstUplink, passt_network
from vmbus.network.pcapng import PcapngWriter
from vmbus.network.switch import Mirror, Port, Switch, SwitchKind
from vmbus.network.uplink import StreamUplink, TapUplink, Uplink, UplinkPort, attach
from vmbus.network.vsp_oid import AdapterConfig
from vmbus.network.wire import ETHERNET_HEADER

__all__ = ["FORMS", "OPTIONS", "GuestNetwork", "Interface", "Wanted", "parse_mac", "parse_network"]

log = logging.getLogger(__name__)

NAMESPACE: Final = UUID("5d0b0b6c-3f0e-4a53-9f4e-8b6a3f1f0d11")
"""Instance ids of adapters come from their address, so that runs repeat."""
LONGEST_IDLE: Final = 2.0
"""Seconds that a guest waits for its next timer before limits are looked at again."""
LONGEST_WAIT: Final = 0.1
"""Seconds that a guest without a timer waits before limits are looked at again."""
MICROSOFT_PREFIX: Final = b"\x00\x15\x5d"
MTU_RANGE: Final = range(576, 9001)
EMULATED_MTU: Final = 1500
FORMS: Final = "tap, tap:NAME, stream:PATH, passt or none"
OPTIONS: Final = (
    "mac=, mtu=, queues=, offloads=on|off, pcap=FILE and, for passt, address=, gateway=, loopback=on|off, "
    "tcp=HOST:GUEST and udp=HOST:GUEST"
)
MOST_QUEUES: Final = 8
"""Queues that an adapter has by default at most: one for each processor up to that, as Hyper-V's."""
MONITOR_LATENCY: Final = 100_000
"""Nanoseconds: what Hyper-V's adapters say. Drivers in user space ring by the monitor page and by nothing else
(uio_hv_generic takes no channel without it)."""


@dataclass(slots=True)
class Wanted:
    """An adapter as a user describes it in one line of text.

    Attributes:
        kind: ``tap``, ``stream``, ``passt`` or ``none``.
        name: the interface or socket; empty for a new interface.
        mac: None for the next one of 00-15-5D-00-00-01 and so on.
        mtu: None for up to 9000; else what the guest gets at most, and what the uplink is set to.
        queues: channels that the guest may open; None for one for each processor, up to eight.
        offloads: what the adapter offers.
        capture: pcapng file that gets a copy of all frames.
        address, gateway: passt's IPv4 addresses for the guest and its router; None for its own choice.
        loopback: the guest reaches what listens on the host's loopback only, through passt's gateway.
        tcp, udp: ports that passt leads to the guest.
    """

    kind: str
    name: str = ""
    mac: bytes | None = None
    mtu: int | None = None
    queues: int | None = None
    offloads: Offloads | None = None
    capture: Path | None = None
    address: str | None = None
    gateway: str | None = None
    loopback: bool = False
    tcp: tuple[str, ...] = ()
    udp: tuple[str, ...] = ()

    @property
    def fits_emulated(self) -> bool:
        """Whether an emulated adapter can be like this."""
        plain = self.offloads in (None, Offloads.nothing())
        return self.queues in (None, 1) and plain and (self.mtu or 0) <= EMULATED_MTU

    def open(self) -> Uplink | None:
        """The uplink, None for an adapter that is connected to nothing.

        Raises:
            DeviceError: it cannot be opened.
        """
        if self.kind == "tap":
            return TapUplink(self.name, mtu=self.mtu, up=True)
        if self.kind == "stream":
            return StreamUplink.connect(self.name)
        if self.kind == "passt":
            address, gateway = passt_network(self.address, self.gateway)
            return PasstUplink(
                address=address,
                gateway=gateway,
                mtu=self.mtu,
                tcp=self.tcp,
                udp=self.udp,
                loopback=self.loopback,
            )
        return None


def parse_network(text: str) -> Wanted:
    """The adapter that ``UPLINK[,OPTION=VALUE…]`` describes, ``tap:vmbus0,mtu=9000,pcap=/tmp/x.pcapng`` for instance.

    The uplink is ``tap`` (a new interface), ``tap:NAME``, ``stream:PATH`` (a UNIX socket with QEMU's framing),
    ``passt`` (started for it) or ``none``.

    Raises:
        DeviceError: it describes none; says what is possible.
    """
    uplink, *options = text.split(",")
    kind, colon, name = uplink.partition(":")
    if (
        kind not in ("tap", "stream", "passt", "none")
        or (kind == "stream") > bool(name)
        or (kind in ("passt", "none") and colon)
    ):
        raise DeviceError(f"no network called {uplink!r}: give {FORMS}")
    wanted = Wanted(kind, name)
    for option in options:
        key, equals, value = option.partition("=")
        try:
            if not (equals and value and _take_option(wanted, key, value)):
                raise DeviceError(f"network {uplink}: no option {option!r}; there are {OPTIONS}")
        except ValueError as error:
            raise DeviceError(f"network {uplink}: {option}: {error}") from error
    passt_network(wanted.address, wanted.gateway)
    return wanted


def _take_option(wanted: Wanted, key: str, value: str) -> bool:
    """Note one option; False if there is none of that name for this uplink."""
    if key == "mac":
        wanted.mac = parse_mac(value)
    elif key == "mtu":
        wanted.mtu = _number(value, MTU_RANGE)
    elif key == "queues":
        wanted.queues = _number(value, range(1, 65))
    elif key == "offloads" and value in ("on", "off"):
        wanted.offloads = Offloads.everything() if value == "on" else Offloads.nothing()
    elif key == "pcap":
        wanted.capture = Path(value)
    elif key == "tcp" and wanted.kind == "passt":
        wanted.tcp += (value,)
    elif key == "udp" and wanted.kind == "passt":
        wanted.udp += (value,)
    elif key == "address" and wanted.kind == "passt":
        wanted.address = value
    elif key == "gateway" and wanted.kind == "passt":
        wanted.gateway = value
    elif key == "loopback" and wanted.kind == "passt" and value in ("on", "off"):
        wanted.loopback = value == "on"
    else:
        return False
    return True


def _number(text: str, allowed: range) -> int:
    number = int(text)
    if number not in allowed:
        raise ValueError(f"not in {allowed.start} to {allowed.stop - 1}")
    return number


def parse_mac(text: str) -> bytes:
    """A MAC address from ``00:15:5d:00:00:01`` or ``00-15-5D-00-00-01``.

    Raises:
        ValueError: it is none, or not one that an adapter can have.
    """
    mac = bytes.fromhex(text.replace(":", "").replace("-", ""))
    AdapterConfig(mac)
    return mac


@dataclass(slots=True)
class Interface:
    """One adapter of the guest and what it is connected to.

    Attributes:
        device: the adapter; an emulated one in a machine without enlightenments.
        switch: the switch that it is on.
        uplink: None for an adapter on a private switch or on one that somebody else made, and for one whose other
            side is gone.
        capture: where its traffic is recorded, or None.
    """

    device: NetworkAdapter | TulipAdapter
    switch: Switch
    uplink: UplinkPort | None
    capture: "Capture | None"

    @property
    def adapter(self) -> NetworkAdapter:
        """The synthetic adapter: link, statistics, virtual function.

        Raises:
            DeviceError: it is an emulated one.
        """
        if isinstance(self.device, TulipAdapter):
            raise DeviceError("the emulated adapter has none of this")
        return self.device

    @property
    def mac(self) -> bytes:
        """The guest's address."""
        return self.device.mac if isinstance(self.device, TulipAdapter) else self.device.config.mac

    def close(self) -> None:
        """Leave the switch and close uplink and capture; the adapter itself goes with the guest's bus."""
        self.device.port.disconnect()
        if self.uplink is not None:
            self.uplink.close()
        if self.capture is not None:
            self.capture.close()


@dataclass(slots=True)
class Capture:
    """A capture file on a mirror port of a switch."""

    writer: PcapngWriter
    port: Port

    def close(self) -> None:
        """Stop recording."""
        self.port.disconnect()
        self.writer.close()


Plug = Callable[[Port, bytes], TulipAdapter]


class GuestNetwork:
    """All adapters of one guest; `vmbus.machine.guest.Machine.network` is one.

    Attributes:
        interfaces: in the order of `add`.
    """

    def __init__(self, bus: VmbusHost | None, plug: "Plug | None" = None) -> None:
        """`bus` is the guest's; in a machine without one, `plug` makes an emulated adapter of a port and an address."""
        self._bus = bus
        self._plug = plug
        self._queues = 1 if bus is None else min(len(bus.child.vps), MOST_QUEUES)
        self._added = 0
        self.interfaces: list[Interface] = []

    def add(
        self,
        uplink: str | Uplink | Switch | None = None,
        *,
        mac: bytes | None = None,
        mtu: int | None = None,
        offloads: Offloads | None = None,
        capture: str | os.PathLike[str] | None = None,
        queues: int | None = None,
    ) -> Interface:
        """Give the guest an adapter, before it starts or while it runs.

        Args:
            uplink: what it is connected to: text as `parse_network` takes it, an open uplink, or a switch that others
                are on too. None for nothing.
            mac: its address; 00-15-5D-00-00-01 and so on if not given.
            mtu: the largest that the guest may use; 9000 if not given. An uplink made here is set to it.
            offloads: what it offers; everything if not given.
            capture: pcapng file that gets a copy of all frames.
            queues: channels that the guest may open; one for each processor, up to eight, if not given.

        Raises:
            DeviceError: the text describes no adapter, the uplink cannot be opened, or the machine cannot have such an
                adapter (an emulated one has one queue, no offloads and an MTU of 1500, and is not hot-plugged).
            OSError: the capture file cannot be written.
        """
        wanted = parse_network(uplink) if isinstance(uplink, str) else Wanted("none")
        wanted.mac, wanted.mtu = mac or wanted.mac, mtu or wanted.mtu
        wanted.offloads, wanted.queues = offloads or wanted.offloads, queues or wanted.queues
        wanted.capture = Path(capture) if capture is not None else wanted.capture
        number = self._added + 1
        config = AdapterConfig(
            wanted.mac or MICROSOFT_PREFIX + number.to_bytes(3, "big"),
            offloads=wanted.offloads or Offloads.everything(),
            max_queues=wanted.queues or self._queues,
        )
        if wanted.mtu is not None:
            config.max_frame = wanted.mtu + ETHERNET_HEADER
        if self._bus is None and not wanted.fits_emulated:
            raise DeviceError("an emulated adapter has one queue, no offloads, and an MTU of 1500")
        opened = uplink if isinstance(uplink, Uplink) else wanted.open()
        if isinstance(uplink, Switch):
            switch = uplink
        else:
            kind = SwitchKind.PRIVATE if opened is None else SwitchKind.EXTERNAL
            switch = Switch(kind, name=f"net{number}")
        joined = None if opened is None else attach(switch, opened)
        recorder = port = None
        try:
            recorder = None if wanted.capture is None else _record(switch, wanted.capture, config.mac)
            mirror = Mirror.SOURCE if recorder else Mirror.NONE
            port = switch.connect(f"guest {config.mac.hex(':')}", mirror=mirror)
            device = self._make(port, config, f"net{number}")
            if opened is not None:
                opened.account = device.account
        except (OSError, VmbusError):
            for made in (joined, recorder):
                if made is not None:
                    made.close()
            if port is not None:
                port.disconnect()
            raise
        interface = Interface(device, switch, joined, recorder)
        self._added = number
        self.interfaces.append(interface)
        return interface

    def _make(self, port: Port, config: AdapterConfig, name: str) -> NetworkAdapter | TulipAdapter:
        if self._bus is not None:
            identity = uuid5(NAMESPACE, config.mac.hex())
            return NetworkAdapter(
                self._bus,
                port,
                config,
                instance_id=identity,
                name=name,
                monitor_latency=MONITOR_LATENCY,
            )
        if self._plug is None:
            raise DeviceError("this machine has no place for a network adapter")
        return self._plug(port, config.mac)

    def remove(self, interface: Interface) -> None:
        """Unplug an adapter while the guest runs, and close what it was connected to.

        Raises:
            DeviceError: it is an emulated one, which cannot be unplugged.
            ValueError: it is not one of this guest's.
        """
        adapter = interface.adapter
        self.interfaces.remove(interface)
        adapter.remove()
        interface.close()

    @property
    def is_live(self) -> bool:
        """Whether frames may come from outside of this process, so that the guest's idle time has to be real."""
        return any(i.uplink is not None and i.uplink.uplink.fileno() >= 0 for i in self.interfaces)

    @property
    def is_listening(self) -> bool:
        """Whether the guest would take a frame from outside, so that one may wake it."""
        return any(
            i.uplink is not None and i.uplink.uplink.fileno() >= 0 and i.device.is_listening
            for i in self.interfaces
        )

    def reset(self) -> None:
        """The machine restarts: emulated adapters are as at power-on; synthetic ones close with the bus."""
        for interface in self.interfaces:
            if isinstance(interface.device, TulipAdapter):
                interface.device.reset()

    def poll(self) -> None:
        """Bring in what has come from the uplinks; where the other side is gone, the guest's cable is pulled."""
        for interface in self.interfaces:
            if isinstance(interface.device, TulipAdapter):
                interface.device.poll()
            if interface.uplink is None:
                continue
            try:
                interface.uplink.poll()
            except DeviceError as error:
                log.warning("%s: %s; its link is down now", interface.device.port.name, printable(str(error)))
                interface.uplink.close()
                interface.uplink = None
                interface.device.set_link(False)

    def idle(self, until_timer: int | None, also: Sequence[int] = ()) -> bool:
        """The guest waits: for a frame, or for its next timer in `until_timer` virtual nanoseconds.

        Args:
            until_timer: as the engine gives it; None if there is no timer.
            also: descriptors that end the wait as well, such as a keyboard's.

        Returns:
            whether something came, or may still come; see `vmbus.engine.unicorn.UnicornEngine`.
        """
        if not self.is_live and not also:
            return False  # nothing can come: time is skipped
        wait = LONGEST_WAIT if until_timer is None else min(until_timer / 1e9, LONGEST_IDLE)
        ports = [i.uplink for i in self.interfaces if i.uplink is not None]
        sources = [port.uplink for port in ports]
        # What the guest has no room for waits outside, and wakes nobody.
        readers: list[int] = [p.uplink.fileno() for p in ports if p.uplink.fileno() >= 0 and p.room != 0]
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
                return until_timer is None or until_timer > LONGEST_IDLE * 1e9
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


def _record(switch: Switch, path: Path, mac: bytes) -> Capture:
    """Copy what a switch's mirrored ports see into a file."""
    writer = PcapngWriter(path, interface=mac.hex(":"))
    port = switch.connect(f"capture for {mac.hex(':')}", mirror=Mirror.DESTINATION, receiver=writer)
    return Capture(writer, port)
