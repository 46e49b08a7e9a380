"""The virtual switch in the parent partition: a learning Ethernet bridge with VLANs and per-port rules.

Three kinds, as in Hyper-V: *external* switches have an uplink to the world, *internal* ones a port for the
parent itself, *private* ones join guests only. Frames inside the switch are whole Ethernet frames; a VLAN tag
is in the frame. Frames of one call of `Port.send` that go to the same port are delivered in one call.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Final, Protocol

from vmbus.core.netswitch import MacTable
from vmbus.errors import LocalProtocolError
from vmbus.trace.ledger import Account

__all__ = [
    "BROADCAST",
    "Access",
    "MacTable",
    "Mirror",
    "Port",
    "PortCounters",
    "PortKind",
    "Switch",
    "SwitchKind",
    "Trunk",
    "Vlan",
    "strip_tag",
    "tag_frame",
]

BROADCAST: Final = b"\xff" * 6
MIN_FRAME: Final = 14
TAG_TYPE: Final = b"\x81\x00"
MAX_VLAN: Final = 4094
RESERVED_PREFIX: Final = b"\x01\x80\xc2\x00\x00"
"""01-80-C2-00-00-00 to -0F are for the bridge itself (IEEE 802.1D 7.12.6) and never forwarded."""


class SwitchKind(Enum):
    """Who may be connected to a switch."""

    EXTERNAL = "external"
    INTERNAL = "internal"
    PRIVATE = "private"


class PortKind(Enum):
    """What is behind a port."""

    GUEST = "guest"
    HOST = "host"
    UPLINK = "uplink"


class Mirror(Enum):
    """Port mirroring: `DESTINATION` ports get a copy of all that passes `SOURCE` ports."""

    NONE = "none"
    SOURCE = "source"
    DESTINATION = "destination"


@dataclass(frozen=True, slots=True)
class Access:
    """A port in one VLAN that sees untagged frames only; id 0 stands for "no VLAN"."""

    vlan: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.vlan <= MAX_VLAN:
            raise ValueError(f"VLAN id {self.vlan} is not in 0 to {MAX_VLAN}")


@dataclass(frozen=True, slots=True)
class Trunk:
    """A port that sees tagged frames of the `allowed` VLANs, and those of `native` untagged."""

    allowed: frozenset[int]
    native: int = 0

    def __post_init__(self) -> None:
        if not all(1 <= vlan <= MAX_VLAN for vlan in self.allowed) or not 0 <= self.native <= MAX_VLAN:
            raise ValueError(f"VLAN ids must be in 1 to {MAX_VLAN}")


Vlan = Access | Trunk


class Receiver(Protocol):
    """What gets the frames that leave the switch through a port."""

    def __call__(self, frames: list[bytes], /) -> None:
        """Take frames; must not keep the list."""


def _discard(frames: list[bytes], /) -> None:
    del frames


@dataclass(slots=True)
class PortCounters:
    """Frames and bytes from and to the owner of a port, and why frames were not forwarded.

    Attributes:
        received_frames: from the owner into the switch.
        sent_frames: from the switch to the owner, copies for mirroring not counted.
        mirrored_frames: copies given to a mirror destination.
        dropped_malformed: shorter than an Ethernet header, too long, or from an impossible address.
        dropped_spoofed: source address not the port's own.
        dropped_vlan: VLAN not allowed on the port.
        dropped_reserved: destination addresses that bridges do not forward.
        dropped_no_target: nobody else is there, or the only target is the port itself.
    """

    received_frames: int = 0
    received_bytes: int = 0
    received_multicast: int = 0
    received_broadcast: int = 0
    sent_frames: int = 0
    sent_bytes: int = 0
    mirrored_frames: int = 0
    dropped_malformed: int = 0
    dropped_spoofed: int = 0
    dropped_vlan: int = 0
    dropped_reserved: int = 0
    dropped_no_target: int = 0

    def to_dict(self) -> dict[str, int]:
        """All counts by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


_REASONS: Final = {
    "malformed": "malformed",
    "spoofed": "source address is another's",
    "vlan": "VLAN not allowed",
    "reserved": "for the bridge itself",
    "no_target": "nobody there",
}
"""How the ledger calls what `PortCounters` counts."""


class Port:
    """A port of a switch.

    Attributes:
        switch: the switch it belongs to.
        name: unique in the switch.
        kind: what is behind it.
        index: its number in the switch's table of addresses.
        mirror: its part in port mirroring; see `Switch.set_mirror`.
        receiver: gets frames that leave through this port; the owner sets it.
        room: says how many frames the owner takes now without dropping any, or None if it takes any number; the owner
            sets it.
        account: where frames are counted that the switch drops, if not None: those that the owner sent.
        counters: what happened.
        connected: a port that is not connected neither sends nor receives.
    """

    def __init__(
        self,
        switch: "Switch",
        name: str,
        kind: PortKind,
        index: int,
        *,
        vlan: Vlan,
        addresses: frozenset[bytes] | None,
        mirror: Mirror,
        max_frame: int,
        receiver: Receiver,
    ) -> None:
        """Made by `Switch.connect`."""
        self.switch = switch
        self.name = name
        self.kind = kind
        self.index = index
        self.mirror = mirror
        self.receiver = receiver
        self.room: Callable[[], int] | None = None
        self.account: Account | None = None
        self.counters = PortCounters()
        self.connected = True
        self._vlan = vlan
        self._addresses = addresses
        self._max_frame = max_frame
        self._update()

    def __repr__(self) -> str:
        state = "" if self.connected else ", not connected"
        return f"<Port {self.name!r} of {self.switch.name!r}{state}>"

    @property
    def vlan(self) -> Vlan:
        """`Access` or `Trunk`."""
        return self._vlan

    @vlan.setter
    def vlan(self, vlan: Vlan) -> None:
        self._vlan = vlan
        self._update()

    @property
    def addresses(self) -> frozenset[bytes] | None:
        """If not None, the spoof guard: the only source addresses that the owner may use."""
        return self._addresses

    @addresses.setter
    def addresses(self, addresses: frozenset[bytes] | None) -> None:
        self._addresses = addresses
        self._update()

    @property
    def max_frame(self) -> int:
        """Longest frame in bytes, tag not counted."""
        return self._max_frame

    @max_frame.setter
    def max_frame(self, size: int) -> None:
        self._max_frame = size
        self._update()

    def _update(self) -> None:
        """What the compiled path may do: untagged frames of one VLAN, from any or from one address."""
        vlan = self._vlan.vlan if isinstance(self._vlan, Access) else -1
        self.plain_vlan = vlan if self._addresses is None or len(self._addresses) == 1 else -1
        self.guard = int.from_bytes(next(iter(self._addresses)), "big") if self._addresses else None
        self.switch.table.set_port(self.index, vlan, self._max_frame)

    def send(self, frames: Sequence[bytes]) -> None:
        """Frames from the owner of this port into the switch."""
        self.switch.forward(self, frames)

    def drop(self, reason: str) -> None:
        """Count a frame that is not forwarded: `PortCounters.dropped_…`, and the ledger."""
        name = f"dropped_{reason}"
        setattr(self.counters, name, getattr(self.counters, name) + 1)
        if self.account is not None:
            self.account.dropped[_REASONS[reason]] += 1

    def disconnect(self) -> None:
        """Leave the switch."""
        self.switch.disconnect(self)


def tag_frame(frame: bytes, tci: int) -> bytes:
    """`frame` with an 802.1Q tag."""
    return frame[:12] + TAG_TYPE + tci.to_bytes(2, "big") + frame[12:]


def strip_tag(frame: bytes) -> tuple[bytes, int | None]:
    """The frame without its 802.1Q tag, and the tag's TCI or None if there was no tag."""
    if frame[12:14] != TAG_TYPE or len(frame) < MIN_FRAME + 4:
        return frame, None
    return frame[:12] + frame[16:], frame[14] << 8 | frame[15]


class Switch:
    """A virtual switch.

    Calls may come from several threads. Deliveries happen in the caller's thread, after the switch's lock is
    released, so a receiver may send again.
    """

    def __init__(
        self,
        kind: SwitchKind = SwitchKind.PRIVATE,
        *,
        name: str = "switch",
        clock: Callable[[], float] = time.monotonic,
        table: MacTable | None = None,
        max_ports: int = 1024,
    ) -> None:
        """`clock` gives seconds, for the ageing of addresses."""
        self.kind = kind
        self.name = name
        self.clock = clock
        self.table = MacTable() if table is None else table
        self.max_ports = max_ports
        self._ports: dict[str, Port] = {}
        self._by_index: dict[int, Port] = {}
        self._mirrors: tuple[Port, ...] = ()
        self._mirrored = False
        self._last_ageing = clock()
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"<Switch {self.name!r}, {self.kind.value}: {len(self._ports)} ports>"

    @property
    def ports(self) -> list[Port]:
        """All connected ports."""
        return list(self._ports.values())

    def connect(
        self,
        name: str,
        kind: PortKind = PortKind.GUEST,
        *,
        vlan: Vlan | None = None,
        addresses: Sequence[bytes] | None = None,
        mirror: Mirror = Mirror.NONE,
        max_frame: int = 9216,
        receiver: Receiver = _discard,
    ) -> Port:
        """A new port; see `Port` for the arguments.

        Raises:
            LocalProtocolError: the name is taken, the switch is full, or its kind does not allow such a port.
        """
        with self._lock:
            if name in self._ports:
                raise LocalProtocolError(f"switch {self.name} has a port {name} already")
            if len(self._ports) >= self.max_ports:
                raise LocalProtocolError(f"switch {self.name} has no more than {self.max_ports} ports")
            if kind is PortKind.HOST and self.kind is SwitchKind.PRIVATE:
                raise LocalProtocolError("a private switch has no port for the parent")
            if kind is PortKind.UPLINK and self.kind is not SwitchKind.EXTERNAL:
                raise LocalProtocolError(f"an {self.kind.value} switch has no uplink")
            if kind is PortKind.UPLINK and any(p.kind is PortKind.UPLINK for p in self._ports.values()):
                raise LocalProtocolError("an external switch has one uplink")
            port = Port(
                self,
                name,
                kind,
                next(index for index in range(self.max_ports) if index not in self._by_index),
                vlan=vlan or Access(),
                addresses=None if addresses is None else frozenset(addresses),
                mirror=mirror,
                max_frame=max_frame,
                receiver=receiver,
            )
            self._ports[name] = self._by_index[port.index] = port
            self._update_mirrors()
            return port

    def disconnect(self, port: Port) -> None:
        """Remove a port; a second call does nothing."""
        with self._lock:
            port.connected = False
            if self._ports.get(port.name) is port:
                del self._ports[port.name], self._by_index[port.index]
                self.table.forget(port.index)
                self._update_mirrors()

    def set_mirror(self, port: Port, mirror: Mirror) -> None:
        """Change a port's part in port mirroring."""
        with self._lock:
            port.mirror = mirror
            self._update_mirrors()

    def _update_mirrors(self) -> None:
        self._mirrors = tuple(p for p in self._ports.values() if p.mirror is Mirror.DESTINATION)
        self._mirrored = bool(self._mirrors) and any(p.mirror is Mirror.SOURCE for p in self._ports.values())

    def forward(self, source: Port, frames: Sequence[bytes]) -> None:
        """Take frames from the owner of `source` and deliver them where they belong."""
        outgoing: dict[int, list[bytes]] = {}
        batch = frames if type(frames) is list else list(frames)
        with self._lock:
            if not source.connected:
                return
            now = self.clock()
            if now - self._last_ageing > self.table.max_age:
                self.table.age(now)
                self._last_ageing = now
            at = 0
            while at < len(batch):
                if not self._mirrored:
                    at = self._forward_plain(source, batch, at, now, outgoing)
                    if at == len(batch):
                        break
                self._forward_one(source, batch[at], now, outgoing)
                at += 1
            deliveries = [(self._by_index[index], out) for index, out in outgoing.items()]
        for port, out in deliveries:
            port.receiver(out)

    def _forward_plain(
        self, source: Port, frames: list[bytes], at: int, now: float, outgoing: dict[int, list[bytes]]
    ) -> int:
        """Forward the frames that the compiled path can, from `at` on; where it stopped."""
        first = at
        at, size = self.table.plan(frames, at, source.index, source.plain_vlan, source.guard, now, outgoing)
        source.counters.received_frames += at - first
        source.counters.received_bytes += size
        for index, count, octets in self.table.collect():
            counters = self._by_index[index].counters
            counters.sent_frames += count
            counters.sent_bytes += octets
        return at

    def _forward_one(self, source: Port, frame: bytes, now: float, outgoing: dict[int, list[bytes]]) -> None:
        counters = source.counters
        counters.received_frames += 1
        counters.received_bytes += len(frame)
        address, sender = frame[:6], frame[6:12]
        if len(frame) < MIN_FRAME or sender[0] & 1 or not any(sender):
            source.drop("malformed")
            return
        plain, tci = strip_tag(frame)
        if len(plain) > source.max_frame:
            source.drop("malformed")
            return
        if source.addresses is not None and sender not in source.addresses:
            source.drop("spoofed")
            return
        vlan = _ingress_vlan(source.vlan, tci)
        if vlan is None:
            source.drop("vlan")
            return
        priority = 0 if tci is None else tci & 0xF000
        if address[0] & 1:
            if address == BROADCAST:
                counters.received_broadcast += 1
            else:
                counters.received_multicast += 1
                if address[:5] == RESERVED_PREFIX and address[5] < 16:
                    source.drop("reserved")
                    return
        self.table.learn(vlan, sender, source.index, now)
        known = -1 if address[0] & 1 else self.table.find(vlan, address, now)
        if known >= 0:
            targets = [self._by_index[known]] if known != source.index else []
        else:
            targets = [
                p for p in self._ports.values() if p is not source and p.mirror is not Mirror.DESTINATION
            ]
        delivered = False
        for port in targets:
            out = _egress(port.vlan, vlan, priority, plain)
            if out is None or len(plain) > port.max_frame:
                continue
            delivered = True
            port.counters.sent_frames += 1
            port.counters.sent_bytes += len(out)
            outgoing.setdefault(port.index, []).append(out)
        if not delivered:
            source.drop("no_target")
        if self._mirrored:
            self._copy(source, targets, frame, outgoing)

    def _copy(
        self, source: Port, targets: list[Port], frame: bytes, outgoing: dict[int, list[bytes]]
    ) -> None:
        """Mirror destinations get the frame as it came in, once, whatever their VLAN."""
        if source.mirror is not Mirror.SOURCE and all(p.mirror is not Mirror.SOURCE for p in targets):
            return
        for port in self._mirrors:
            if port is not source:
                port.counters.mirrored_frames += 1
                outgoing.setdefault(port.index, []).append(frame)


def _ingress_vlan(vlan: Vlan, tci: int | None) -> int | None:
    """The VLAN of a frame that comes in, None if the port does not allow it."""
    tag = 0 if tci is None else tci & 0xFFF
    if isinstance(vlan, Access):
        # An access port belongs to its VLAN; a guest must not choose another by tagging. Priority tags are fine.
        return vlan.vlan if tag == 0 else None
    if tag == 0:
        return vlan.native
    return tag if tag in vlan.allowed else None


def _egress(port: Vlan, vlan: int, priority: int, plain: bytes) -> bytes | None:
    """The frame as it leaves through a port, None if the VLAN is not the port's."""
    if isinstance(port, Access):
        return plain if port.vlan == vlan else None
    if vlan == port.native:
        return plain
    return tag_frame(plain, priority | vlan) if vlan in port.allowed else None
