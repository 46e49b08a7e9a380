"""What the host's end of the control plane knows: the connection, the offers, the GPADLs, and who has which
id.

`vmbus.bus.host` and `vmbus.bus.host_channels` hold what changes it.
"""

from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Final, TypeAlias
from uuid import UUID

from vmbus.bus import actions as act
from vmbus.bus import wire
from vmbus.bus.codec import encode
from vmbus.bus.gpadl import HostGpadl
from vmbus.bus.offer import Offer
from vmbus.bus.transitions import RESERVED_STATES, ChannelState, LinkState
from vmbus.bus.versions import SUPPORTED_FEATURES, FeatureFlags, Version
from vmbus.errors import RemoteProtocolError
from vmbus.hypervisor.budget import Budget, Meter

__all__ = ["EVENT_FLAG_COUNT", "HostChannel", "HostState", "Link"]

EVENT_FLAG_COUNT: Final = 2048
"""Event flags of a SINT (TLFS 11.3); flag 0 means the shared interrupt page, the others name channels."""
PAGE_NUMBER_SIZE: Final = 8
"""Bytes of a page number, and of a range's header, in a GPADL."""
MONITORS: Final = 128
"""Triggers of a monitor page: four groups of 32 (TLFS 11.9)."""
NO_GUID: Final = UUID(int=0)
OfferKey: TypeAlias = tuple[UUID, UUID, int]


@dataclass(slots=True, eq=False)
class HostChannel:
    """What the host knows of one offer.

    Attributes:
        offer_id: the host's own number of the offer, never used again.
        offer: what the provider offered.
        channel_id: the relid while the guest knows of it, else 0.
        monitor_id: the bit in the monitor pages while the guest knows of it.
        state: as messages tell.
        device_open: the device's side was asked to open and not to close since.
        request: the guest's open request while opening or open.
        serial: counts open requests, so that a late completion is told from a current one.
        successor: an offer of the same key that waits for the guest to release this rescinded one.
        reserved_gpadl: the ring of a channel opened as reserved; it outlives the connection.
        reserved_target: VP and SINT that a reserved channel was opened for.
        epoch: the connection through which the channel was offered.
    """

    offer_id: int
    offer: Offer
    channel_id: int = 0
    monitor_id: int | None = None
    state: ChannelState = ChannelState.ABSENT
    device_open: bool = False
    request: act.OpenRequest | None = None
    serial: int = 0
    successor: "HostChannel | None" = None
    reserved_gpadl: HostGpadl | None = None
    reserved_target: tuple[int, int] = (0, wire.VMBUS_SINT)
    epoch: int = 0

    @property
    def is_monitored(self) -> bool:
        """Whether the guest may ring it through the monitor pages now.

        A guest that wants no interrupts of an open channel (a reserved one among them) rings it by hypercall only.
        """
        return self.monitor_id is not None and self.request is not None and self.request.target_vp is not None

    @property
    def is_reserved(self) -> bool:
        """Whether it is open as a reserved channel, or about to be."""
        return self.state in RESERVED_STATES


@dataclass(slots=True)
class Link:
    """The connection; a fresh one stands for none."""

    state: LinkState = LinkState.IDLE
    epoch: int = 0
    version: int = 0
    features: FeatureFlags = FeatureFlags.NONE
    message_vp: int = 0
    sint: int = wire.VMBUS_SINT
    client_id: UUID = NO_GUID
    interrupt_page: int | None = None
    monitor_pages: act.MonitorPages | None = None
    paused: bool = False
    held: list[act.Send] = field(default_factory=list)


class HostState:
    """State and small helpers of `vmbus.bus.host.HostMachine`; see there for the arguments.

    Attributes:
        vp_count: virtual processors of the guest now.
    """

    def __init__(
        self,
        page_count: int,
        vp_count: int = 1,
        *,
        versions: frozenset[int] = frozenset(Version),
        features: int = SUPPORTED_FEATURES,
        message_connection_id: int = wire.MESSAGE_CONNECTION_ID_V5,
        meter: Meter | None = None,
    ) -> None:
        self._shared_meter = meter is not None
        self._meter = Meter(Budget()) if meter is None else meter
        self._page_count = page_count
        self.vp_count = vp_count
        self._versions = versions
        self._features = features & SUPPORTED_FEATURES
        self._message_connection_id = message_connection_id
        self._link = Link()
        self._offers: dict[int, HostChannel] = {}
        self._by_id: dict[int, HostChannel] = {}
        self._gpadls: dict[int, HostGpadl] = {}
        self._gpadl_serials: dict[int, HostGpadl] = {}
        self._by_key: dict[OfferKey, HostChannel] = {}
        self._opening: dict[int, HostChannel] = {}
        self._predecessors: dict[int, HostChannel] = {}
        self._free_ids = list(range(1, EVENT_FLAG_COUNT))
        self._monitors: set[int] = set()
        self._offer_ids = count(1)
        self._serials = count(1)
        self._out: list[act.HostAction] = []

    # -- what is so ------------------------------------------------------------------------------------------

    @property
    def state(self) -> LinkState:
        """The connection's state."""
        return self._link.state

    @property
    def version(self) -> int:
        """The version agreed on, 0 if none."""
        return self._link.version

    @property
    def features(self) -> FeatureFlags:
        """The feature flags that hold."""
        return self._link.features

    @property
    def client_id(self) -> UUID:
        """Who the guest's driver says it is; zero if it does not."""
        return self._link.client_id

    @property
    def interrupt_page(self) -> int | None:
        """GPA of the shared interrupt page, in versions before 2.4."""
        return self._link.interrupt_page

    @property
    def monitor_pages(self) -> act.MonitorPages | None:
        """The monitor pages in use."""
        return self._link.monitor_pages

    @property
    def channels(self) -> dict[int, HostChannel]:
        """Every offer by its `offer_id`."""
        return dict(self._offers)

    @property
    def gpadls(self) -> dict[int, HostGpadl]:
        """Every GPADL that the guest may name, by id; not those of reserved channels."""
        return dict(self._gpadls)

    def offered(self, offer_id: int) -> HostChannel | None:
        """An offer by its `offer_id`."""
        return self._offers.get(offer_id)

    def gpadl(self, gpadl_id: int) -> HostGpadl | None:
        """A GPADL that the guest may name."""
        return self._gpadls.get(gpadl_id)

    def gpadl_owner(self, serial: int) -> int | None:
        """The `offer_id` of the channel that a GPADL was made for, by the host's number of it; reserved ones, too."""
        gpadl = self._gpadl_serials.get(serial)
        return None if gpadl is None else gpadl.offer_id

    def channel(self, channel_id: int) -> HostChannel | None:
        """The channel that the guest knows by this id."""
        return self._by_id.get(channel_id)

    @property
    def message_target(self) -> tuple[int, int]:
        """VP and SINT that the guest wants its messages on."""
        return self._link.message_vp, self._link.sint

    # -- for the handlers ------------------------------------------------------------------------------------

    def _take(self) -> list[act.HostAction]:
        out, self._out = self._out, []
        return out

    def _send(self, message: wire.Message, target: tuple[int, int] | None = None) -> None:
        """Answer to the connection's VP and SINT, or to `target`; held back while the guest has paused."""
        vp, sint = target or (self._link.message_vp, self._link.sint)
        sending = act.Send(encode(message), vp, sint)
        if self._link.paused and target is None:
            self._link.held.append(sending)
        else:
            self._out.append(sending)

    def _known(self, channel_id: int) -> HostChannel:
        """The channel that a message of the guest names."""
        channel = self._by_id.get(channel_id)
        if channel is None:
            raise RemoteProtocolError(f"no channel {channel_id}")
        return channel

    def _is_page(self, gpa: int) -> bool:
        """Whether `gpa` is the address of a whole page inside the guest's address space, and not page 0."""
        return 0 < gpa < self._page_count << 12 and gpa & 0xFFF == 0

    def _free_gpadl(self, gpadl: HostGpadl) -> None:
        """Forget a GPADL, and have it unmapped if it was to be mapped."""
        if self._gpadls.get(gpadl.gpadl_id) is gpadl:
            del self._gpadls[gpadl.gpadl_id]
        del self._gpadl_serials[gpadl.serial]
        self._meter.gpadls.release()
        self._meter.gpadl_pages.release(gpadl.length // PAGE_NUMBER_SIZE)
        self._unmap(gpadl)

    def _unmap(self, gpadl: HostGpadl) -> None:
        if gpadl.is_used:
            gpadl.phase = gpadl.phase.UNUSED
            self._out.append(act.UnmapGpadl(gpadl.serial))

    def _close_device(self, channel: HostChannel) -> None:
        """Have the device's side stop, if it was asked to start."""
        channel.request = None
        self._opening.pop(channel.serial, None)
        if channel.device_open:
            channel.device_open = False
            self._out.append(act.CloseDevice(channel.offer_id, channel.channel_id))

    def _give_ids(self, channel: HostChannel) -> None:
        """A relid, the lowest free one, and a bit in the monitor pages if the offer and the guest want
        that."""
        channel.channel_id = heappop(self._free_ids)
        self._by_id[channel.channel_id] = channel
        if channel.offer.monitor_latency is not None and self._link.monitor_pages is not None:
            channel.monitor_id = next((n for n in range(MONITORS) if n not in self._monitors), None)
            if channel.monitor_id is not None:
                self._monitors.add(channel.monitor_id)

    def _take_ids(self, channel: HostChannel) -> None:
        """The guest no longer knows the channel."""
        if self._by_id.pop(channel.channel_id, None) is not None:
            heappush(self._free_ids, channel.channel_id)
        channel.channel_id = 0
        if channel.monitor_id is not None:
            self._monitors.discard(channel.monitor_id)
            channel.monitor_id = None
        channel.state = ChannelState.ABSENT
