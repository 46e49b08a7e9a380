"""What the control-plane state machines ask of whoever runs them.

The machines do no I/O: they return these, to be carried out in order.
"""

from dataclasses import dataclass, field
from typing import TypeAlias
from uuid import UUID

from vmbus.bus.offer import Offer
from vmbus.bus.versions import FeatureFlags

__all__ = [
    "AllOffersSeen",
    "ChannelRescinded",
    "ChannelRetargeted",
    "CloseDevice",
    "Connected",
    "ConnectionRefused",
    "Disconnected",
    "Established",
    "GpadlAnswered",
    "GpadlGone",
    "GuestEvent",
    "HostAction",
    "MapGpadl",
    "MonitorPages",
    "MonitorPagesAnswered",
    "OfferGone",
    "OfferSeen",
    "OpenAnswered",
    "OpenDevice",
    "OpenRequest",
    "Paused",
    "Post",
    "ReservedClosed",
    "Retarget",
    "Send",
    "TlConnect",
    "TlConnectAnswered",
    "Unloaded",
    "UnmapGpadl",
    "UseMonitorPages",
]


@dataclass(frozen=True, slots=True)
class MonitorPages:
    """The guest physical addresses of the two monitor pages."""

    parent_to_child: int
    child_to_parent: int


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """What a guest wants when it opens a channel.

    Attributes:
        open_id: the guest's number of the request.
        gpadl_id: the ring GPADL.
        downstream_page: index of the host-to-guest ring's control page in the GPADL.
        target_vp: the VP to interrupt, or None for no interrupts.
        user_data: 120 bytes for the device's protocol.
        connection_id: what the guest will signal to ring the host.
        event_flag: the event flag (or, in old versions, the bit of the interrupt page) by which the host
            rings.
        reserved: open as a reserved channel.
    """

    open_id: int
    gpadl_id: int
    downstream_page: int
    target_vp: int | None
    user_data: bytes
    connection_id: int
    event_flag: int
    reserved: bool = False


# -- the host's machine
# ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Post a control message to the guest's message slot."""

    payload: bytes
    vp: int
    sint: int


@dataclass(frozen=True, slots=True)
class Established:
    """A connection holds from now on (before the answer that says so is sent)."""

    version: int
    features: FeatureFlags
    client_id: UUID
    message_vp: int
    interrupt_page: int | None
    monitor_pages: MonitorPages | None


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is over: no page of the guest may be used any more.

    Attributes:
        unloaded: the guest said so (UNLOAD); otherwise it contacts anew without, or its machine restarts or ends.
    """

    unloaded: bool = False


@dataclass(frozen=True, slots=True)
class OpenDevice:
    """A guest opens a channel: answer with `HostMachine.complete_open(serial, …)`, or get `CloseDevice`
    before."""

    offer_id: int
    serial: int
    channel_id: int
    request: OpenRequest


@dataclass(frozen=True, slots=True)
class CloseDevice:
    """Stop using the channel's rings, now."""

    offer_id: int
    channel_id: int


@dataclass(frozen=True, slots=True)
class MapGpadl:
    """The guest described memory: answer with `HostMachine.complete_gpadl`, or get `UnmapGpadl` before.

    `data` holds `count` GPA ranges whose structure was checked, but not whether the guest has those pages.
    """

    offer_id: int
    channel_id: int
    gpadl_id: int
    serial: int
    count: int
    data: bytes


@dataclass(frozen=True, slots=True)
class UnmapGpadl:
    """Stop using that memory, now."""

    serial: int


@dataclass(frozen=True, slots=True)
class Retarget:
    """Interrupt another VP from now on."""

    offer_id: int
    target_vp: int


@dataclass(frozen=True, slots=True)
class UseMonitorPages:
    """The guest changed its monitor pages.

    Attributes:
        pages: those to use from now on.
        previous: those until now, should it not be possible.
    """

    pages: MonitorPages | None
    previous: MonitorPages | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class TlConnect:
    """hv_sock: a guest wants a connection to a service: offer a channel, or
    `HostMachine.refuse_tl_connect`."""

    endpoint_id: UUID
    service_id: UUID
    silo_id: UUID


@dataclass(frozen=True, slots=True)
class OfferGone:
    """A rescinded offer was released by the guest; its id is free."""

    offer_id: int


HostAction: TypeAlias = (
    Send
    | Established
    | Disconnected
    | OpenDevice
    | CloseDevice
    | MapGpadl
    | UnmapGpadl
    | Retarget
    | UseMonitorPages
    | TlConnect
    | OfferGone
)


# -- the guest's machine
# --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Post:
    """HvPostMessage of type 1 to that connection."""

    connection_id: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Connected:
    """The host took a version."""

    version: int
    features: FeatureFlags


@dataclass(frozen=True, slots=True)
class ConnectionRefused:
    """The host takes none of the versions that this guest speaks, or cannot serve the connection."""

    reason: str


@dataclass(frozen=True, slots=True)
class OfferSeen:
    """A channel was offered."""

    offer: Offer


@dataclass(frozen=True, slots=True)
class AllOffersSeen:
    """Every offer of the time of REQUEST_OFFERS has been seen."""


@dataclass(frozen=True, slots=True)
class OpenAnswered:
    """An open request succeeded (status 0) or not."""

    channel_id: int
    status: int


@dataclass(frozen=True, slots=True)
class GpadlAnswered:
    """The host took a GPADL (status 0) or not."""

    channel_id: int
    gpadl_id: int
    status: int


@dataclass(frozen=True, slots=True)
class GpadlGone:
    """The host no longer uses that memory."""

    gpadl_id: int


@dataclass(frozen=True, slots=True)
class ChannelRescinded:
    """The host took the offer back: close, tear down, then `GuestMachine.release`."""

    channel_id: int
    was_open: bool


@dataclass(frozen=True, slots=True)
class ChannelRetargeted:
    """The host's answer to MODIFY_CHANNEL (from version 5.3 on)."""

    channel_id: int
    status: int


@dataclass(frozen=True, slots=True)
class ReservedClosed:
    """A reserved channel is closed."""

    channel_id: int


@dataclass(frozen=True, slots=True)
class TlConnectAnswered:
    """hv_sock: how a connection attempt ended."""

    endpoint_id: UUID
    service_id: UUID
    status: int


@dataclass(frozen=True, slots=True)
class MonitorPagesAnswered:
    """Whether the host uses the other monitor pages."""

    ok: bool


@dataclass(frozen=True, slots=True)
class Paused:
    """The host sends nothing more until `GuestMachine.resume`."""


@dataclass(frozen=True, slots=True)
class Unloaded:
    """The connection is over; the host uses nothing of this guest any more."""


GuestEvent: TypeAlias = (
    Post
    | Connected
    | ConnectionRefused
    | OfferSeen
    | AllOffersSeen
    | OpenAnswered
    | GpadlAnswered
    | GpadlGone
    | ChannelRescinded
    | ChannelRetargeted
    | ReservedClosed
    | TlConnectAnswered
    | MonitorPagesAnswered
    | Paused
    | Unloaded
)
