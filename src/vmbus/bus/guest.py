"""The guest's end of the control plane as a state machine without I/O.

Calls return the messages to post; messages of the host go into `GuestMachine.receive`, which returns events and,
where the protocol goes on by itself (the next version, the request for offers), messages to post.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final
from uuid import UUID

from vmbus.bus import actions as act
from vmbus.bus import wire
from vmbus.bus.codec import Sender, encode, parse
from vmbus.bus.gpadl import cut
from vmbus.bus.guest_state import NO_GUID, GuestChannel, GuestState
from vmbus.bus.offer import Offer
from vmbus.bus.transitions import CONNECTION, GPADL, ChannelState, GpadlState, LinkState, step
from vmbus.bus.versions import SUPPORTED_FEATURES, FeatureFlags, Version, version_name
from vmbus.bus.wire import ConnectionState, MessageType, Status
from vmbus.errors import LocalProtocolError, RemoteProtocolError

__all__ = ["GuestChannel", "GuestMachine"]

MAX_CHANNEL_ID: Final = 2047
"""Highest relid: event flags of a SINT, less flag 0 (Linux: MAX_CHANNEL_RELIDS)."""

_RESERVED_MESSAGES: Final = (
    MessageType.OPEN_CHANNEL_RESULT,
    MessageType.CLOSE_RESERVED_RESPONSE,
    MessageType.RESCIND_CHANNEL_OFFER,
)
"""What concerns reserved channels even without a connection."""
_LISTENS_TO: Final = {
    LinkState.IDLE: _RESERVED_MESSAGES,
    LinkState.CONTACTING: (MessageType.VERSION_RESPONSE, *_RESERVED_MESSAGES),
    LinkState.UNLOADING: (MessageType.UNLOAD_COMPLETE, *_RESERVED_MESSAGES),
}
"""All that a guest without a connection listens to; the rest was sent before the host learnt that it is over."""


class GuestMachine(GuestState):
    """One host's VMBus as its guest sees it.

    Args:
        versions: what to ask for, best first; hosts that know none refuse the connection.
        features: feature flags to ask for with `Version.V6_0`.
        client_id: who this driver is, with `FeatureFlags.CLIENT_ID`.
        message_vp: the VP whose message slot receives the host's messages.
        interrupt_page: GPA of the shared interrupt page, which hosts before 2.4 need.
        monitor_pages: GPAs of the monitor pages, or None for no monitored notifications.
    """

    def __init__(
        self,
        versions: Sequence[int] = tuple(sorted(Version, reverse=True)),
        *,
        features: int = SUPPORTED_FEATURES,
        client_id: UUID = NO_GUID,
        message_vp: int = 0,
        interrupt_page: int = 0,
        monitor_pages: act.MonitorPages | None = None,
    ) -> None:
        super().__init__(
            versions,
            features=features,
            client_id=client_id,
            message_vp=message_vp,
            interrupt_page=interrupt_page,
            monitor_pages=monitor_pages,
        )
        self._handlers: dict[MessageType, Callable[[Any], list[act.GuestEvent]]] = {
            MessageType.VERSION_RESPONSE: self._on_version_response,
            MessageType.OFFER_CHANNEL: self._on_offer,
            MessageType.ALL_OFFERS_DELIVERED: self._on_all_offers,
            MessageType.RESCIND_CHANNEL_OFFER: self._on_rescind,
            MessageType.OPEN_CHANNEL_RESULT: self._on_open_result,
            MessageType.GPADL_CREATED: self._on_gpadl_created,
            MessageType.GPADL_TORNDOWN: self._on_gpadl_torndown,
            MessageType.UNLOAD_COMPLETE: self._on_unload_complete,
            MessageType.CLOSE_RESERVED_RESPONSE: self._on_reserved_closed,
            MessageType.MODIFY_CHANNEL_RESPONSE: self._on_modify_response,
            MessageType.TL_CONNECT_REQUEST_RESULT: self._on_tl_result,
            MessageType.MODIFY_CONNECTION_RESPONSE: self._on_modify_connection_response,
            MessageType.PAUSE_RESPONSE: self._on_pause_response,
        }

    # -- the connection --------------------------------------------------------------------------------------

    def connect(self, versions: Sequence[int] | None = None) -> list[act.GuestEvent]:
        """Contact the host, or contact it anew: with the best version first, or with other versions than before.

        A connection that exists ends with this, without UNLOAD, as when a new kernel replaces a crashed one.
        """
        if versions is not None:
            if not versions:
                raise ValueError("a guest must speak at least one version")
            self._versions = tuple(versions)
        self._forget()
        self._trying = 0
        return self._contact()

    def _contact(self) -> list[act.GuestEvent]:
        self._state = step(CONNECTION, self._state, MessageType.INITIATE_CONTACT, LocalProtocolError)
        self._contacts += 1
        version = self._versions[self._trying]
        pages = self._wanted_pages or act.MonitorPages(0, 0)
        info, connection_id = self._interrupt_page, wire.MESSAGE_CONNECTION_ID
        if version >= Version.V5_0:
            info, connection_id = wire.VMBUS_SINT, wire.MESSAGE_CONNECTION_ID_V5
        fields = version, self._message_vp, info, pages.parent_to_child, pages.child_to_parent
        message: wire.Message = wire.InitiateContact(*fields)
        if version >= Version.V6_0:
            info |= self._asked_features << 32
            fields = version, self._message_vp, info, pages.parent_to_child, pages.child_to_parent
            message = wire.InitiateContact(*fields)
            if self._asked_features & FeatureFlags.CLIENT_ID:
                message = wire.InitiateContact2(*fields, self._client_id)
        return [act.Post(connection_id, encode(message))]

    def contact_failed(self) -> list[act.GuestEvent]:
        """The hypervisor knows no connection of that id: the host is older than version 5.0; try the next."""
        if self._state is not LinkState.CONTACTING:
            raise LocalProtocolError("no contact is being made")
        self._contacts -= 1
        return self._refused("the host has no such connection")

    def _refused(self, reason: str) -> list[act.GuestEvent]:
        self._state = LinkState.IDLE
        self._trying += 1
        if self._trying < len(self._versions):
            return self._contact()
        self._forget()
        tried = ", ".join(version_name(v) for v in self._versions)
        return [act.ConnectionRefused(f"{reason} (tried {tried})")]

    def request_offers(self) -> list[act.GuestEvent]:
        """Ask for the offers of now and of later."""
        self._state = self._step_link(MessageType.REQUEST_OFFERS)
        return self._post(wire.RequestOffers())

    def unload(self) -> list[act.GuestEvent]:
        """End the connection. Before version 1.1 there is no answer, so that this ends it at once."""
        state = self._step_link(MessageType.UNLOAD)
        posts = self._post(wire.Unload())
        self._paused = False
        if self._version < Version.V1_1:
            self._forget()
            return [*posts, act.Unloaded()]
        self._state = state
        return posts

    def modify_connection(self, pages: act.MonitorPages | None) -> list[act.GuestEvent]:
        """Use other monitor pages, or none; no channel that uses them may be open."""
        self._need(FeatureFlags.MODIFY_CONNECTION)
        self._step_link(MessageType.MODIFY_CONNECTION)
        self._wanted_pages = pages
        values = pages or act.MonitorPages(0, 0)
        return self._post(wire.ModifyConnection(values.parent_to_child, values.child_to_parent))

    def pause(self) -> list[act.GuestEvent]:
        """Have the host send nothing after PAUSE_RESPONSE until `resume`."""
        self._need(FeatureFlags.PAUSE_RESUME)
        self._step_link(MessageType.PAUSE)
        posts = self._post(wire.Pause())
        self._paused = True
        return posts

    def resume(self) -> list[act.GuestEvent]:
        """Let the host's messages flow again."""
        if not self._paused:
            raise LocalProtocolError("the connection is not paused")
        self._step_link(MessageType.RESUME)
        self._paused = False
        return self._post(wire.Resume())

    def tl_connect(
        self, endpoint_id: UUID, service_id: UUID, silo_id: UUID = NO_GUID
    ) -> list[act.GuestEvent]:
        """hv_sock: connect to a service of the host; success is an offer, failure (from 4.1 on) an event."""
        if self._version < Version.V4_0:
            raise LocalProtocolError("hv_sock came with version 4.0")
        self._step_link(MessageType.TL_CONNECT_REQUEST)
        if self._version >= Version.V5_2:
            return self._post(wire.TlConnectRequest2(endpoint_id, service_id, silo_id))
        return self._post(wire.TlConnectRequest(endpoint_id, service_id))

    # -- channels --------------------------------------------------------------------------------------------

    def create_gpadl(
        self, channel_id: int, packed: bytes, ranges: int = 1
    ) -> tuple[int, list[act.GuestEvent]]:
        """Describe memory: `ranges` GPA ranges as `GpaRanges.pack` gives them. The id, and what to post."""
        channel = self._channel(channel_id)
        self._may_post()
        self._step_channel(channel, MessageType.GPADL_HEADER)
        gpadl_id = next(n for n in self._gpadl_ids if n & 0xFFFF_FFFF not in self._gpadls) & 0xFFFF_FFFF
        messages = cut(channel_id, gpadl_id, packed, ranges)
        channel.gpadls[gpadl_id] = step(
            GPADL, GpadlState.ABSENT, MessageType.GPADL_HEADER, LocalProtocolError
        )
        self._gpadls[gpadl_id] = channel_id
        return gpadl_id, [act.Post(self._connection_id, m) for m in messages]

    def teardown_gpadl(self, channel_id: int, gpadl_id: int) -> list[act.GuestEvent]:
        """Ask for the memory back; until `GpadlGone` the host may still use it."""
        channel = self._channel(channel_id)
        self._may_post()
        self._step_channel(channel, MessageType.GPADL_TEARDOWN)
        if channel.ring_gpadl == gpadl_id and channel.state in (ChannelState.OPENING, ChannelState.OPEN):
            raise LocalProtocolError(f"GPADL {gpadl_id:#x} is the ring of an open channel")
        state = channel.gpadls.get(gpadl_id, GpadlState.ABSENT)
        channel.gpadls[gpadl_id] = step(
            GPADL, state, MessageType.GPADL_TEARDOWN, LocalProtocolError, f"GPADL {gpadl_id:#x}"
        )
        return self._post(wire.GpadlTeardown(channel_id, gpadl_id))

    def open(
        self,
        channel_id: int,
        gpadl_id: int,
        downstream_page: int,
        *,
        target_vp: int = 0,
        user_data: bytes = b"",
        connection_id: int | None = None,
        event_flag: int | None = None,
    ) -> list[act.GuestEvent]:
        """Open a channel over a ring GPADL.

        Args:
            channel_id: the offer's channel.
            gpadl_id: a GPADL made for this channel, of whole pages: this guest's ring, then the host's.
            downstream_page: the index of the host's control page.
            target_vp: the VP to interrupt, or `wire.VP_INDEX_DISABLE_INTERRUPT`.
            user_data: at most 120 bytes.
            connection_id: how this guest will ring, instead of as offered.
            event_flag: how the host shall ring, instead of by the channel's id.
        """
        channel = self._channel(channel_id)
        self._may_post()
        state = self._step_channel(channel, MessageType.OPEN_CHANNEL)
        if channel.gpadls.get(gpadl_id) is not GpadlState.CREATED:
            raise LocalProtocolError(f"channel {channel_id} has no GPADL {gpadl_id:#x}")
        if len(user_data) > 120:
            raise LocalProtocolError(f"user data of {len(user_data)} bytes")
        chooses = bool(self._features & FeatureFlags.GUEST_SPECIFIED_SIGNAL_PARAMETERS)
        if (connection_id is not None or event_flag is not None) and not chooses:
            raise LocalProtocolError("the host does not let guests choose their signal parameters")
        channel.connection_id = channel.offer.connection_id if connection_id is None else connection_id
        channel.event_flag = channel_id if event_flag is None else event_flag
        channel.state = state
        channel.ring_gpadl, channel.target_vp = gpadl_id, target_vp
        channel.open_id = next(self._open_ids) & 0xFFFF_FFFF
        channel.unanswered += 1
        fields = (
            channel_id,
            channel.open_id,
            gpadl_id,
            target_vp,
            downstream_page,
            user_data.ljust(120, b"\0"),
        )
        if chooses:
            return self._post(wire.OpenChannel2(*fields, channel.connection_id, channel.event_flag, 0))
        return self._post(wire.OpenChannel(*fields))

    def close(self, channel_id: int) -> list[act.GuestEvent]:
        """Close an open channel; its ring GPADL may be torn down then."""
        channel = self._channel(channel_id)
        self._may_post()
        channel.state = self._step_channel(channel, MessageType.CLOSE_CHANNEL)
        return self._post(wire.CloseChannel(channel_id))

    def modify_channel(self, channel_id: int, target_vp: int) -> list[act.GuestEvent]:
        """Have the host interrupt another VP; answered from version 5.3 on."""
        if self._version < Version.V4_1:
            raise LocalProtocolError("MODIFY_CHANNEL came with version 4.1")
        channel = self._channel(channel_id)
        self._may_post()
        channel.state = self._step_channel(channel, MessageType.MODIFY_CHANNEL)
        channel.target_vp = target_vp
        channel.unanswered += self._version >= Version.V5_3
        return self._post(wire.ModifyChannel(channel_id, target_vp))

    def release(self, channel_id: int) -> list[act.GuestEvent]:
        """Give a channel's id back, when it was rescinded or there is no use for it. Its GPADLs are forgotten.

        Raises:
            LocalProtocolError: the channel is in use, or the host still owes an answer about it or its GPADLs,
                which would come for an id that may mean another channel by then.
        """
        channel = self._channel(channel_id)
        self._may_post()
        self._step_channel(channel, MessageType.REL_ID_RELEASED)
        if channel.unanswered or any(s is not GpadlState.CREATED for s in channel.gpadls.values()):
            raise LocalProtocolError(f"the host owes an answer about channel {channel_id}")
        self._drop(channel)
        return self._post(wire.RelIdReleased(channel_id))

    def open_reserved(
        self, channel_id: int, gpadl_id: int, downstream_page: int, *, target_vp: int = 0
    ) -> list[act.GuestEvent]:
        """Open a channel that outlives the connection, and whose host's end does not interrupt."""
        if self._version < Version.V4_0:
            raise LocalProtocolError("reserved channels came with version 4.0")
        channel = self._channel(channel_id)
        self._may_post()
        state = self._step_channel(channel, MessageType.OPEN_RESERVED_CHANNEL)
        if channel.gpadls.get(gpadl_id) is not GpadlState.CREATED:
            raise LocalProtocolError(f"channel {channel_id} has no GPADL {gpadl_id:#x}")
        channel.state = state
        channel.ring_gpadl = gpadl_id
        channel.open_id = 0
        channel.unanswered += 1
        channel.connection_id = channel.offer.connection_id
        channel.event_flag = channel_id
        return self._post(
            wire.OpenReservedChannel(channel_id, target_vp, wire.VMBUS_SINT, gpadl_id, downstream_page)
        )

    def close_reserved(self, channel_id: int, *, target_vp: int = 0) -> list[act.GuestEvent]:
        """Close a reserved channel, in any state of the connection."""
        channel = self._channel(channel_id)
        channel.state = self._step_channel(channel, MessageType.CLOSE_RESERVED_CHANNEL)
        channel.unanswered += 1
        return self._post(wire.CloseReservedChannel(channel_id, target_vp, wire.VMBUS_SINT))

    # -- what the host says ----------------------------------------------------------------------------------

    def receive(self, payload: bytes) -> list[act.GuestEvent]:
        """Take one message of the host.

        Raises:
            RemoteProtocolError: malformed, unknown, or not allowed now; nothing has changed.
        """
        kind = int.from_bytes(payload[:4], "little")
        if kind not in _LISTENS_TO.get(self._state, (kind,)):
            return []
        message, _ = parse(payload, Sender.HOST, self._version or Version.V0_13, self._features)
        return self._handlers[message.TYPE](message)

    def _on_version_response(
        self, message: wire.VersionResponse | wire.VersionResponse2 | wire.VersionResponse3
    ) -> list[act.GuestEvent]:
        if self._contacts > 1:
            self._contacts -= 1
            return []  # the answer to a contact that was given up for another
        supported = bool(message.version_supported)
        good = supported and message.connection_state == ConnectionState.SUCCESSFUL
        state = self._step_link(MessageType.VERSION_RESPONSE, RemoteProtocolError, ok=good)
        version = self._versions[self._trying]
        features = FeatureFlags.NONE
        if good and version >= Version.V6_0:
            if isinstance(message, wire.VersionResponse):
                raise RemoteProtocolError("VERSION_RESPONSE without feature flags")
            features = FeatureFlags(message.supported_features)
            if features & ~self._asked_features:
                raise RemoteProtocolError(f"the host grants features not asked for: {features!r}")
        self._contacts = 0
        if not supported:
            return self._refused("the host supports no common version")
        if not good:
            # The version is right, so that an older one would not help.
            self._forget()
            return [act.ConnectionRefused(f"the host failed with state {message.connection_state}")]
        self._state, self._version, self._features = state, version, features
        self._monitor_pages = self._wanted_pages
        self._connection_id = wire.MESSAGE_CONNECTION_ID
        if version >= Version.V5_0:
            self._connection_id = message.selected_version_or_connection_id
        return [act.Connected(version, features)]

    def _on_offer(self, message: wire.OfferChannel) -> list[act.GuestEvent]:
        self._step_link(MessageType.OFFER_CHANNEL, RemoteProtocolError)
        offer = Offer.from_message(message)
        if not 0 < offer.channel_id <= MAX_CHANNEL_ID:
            raise RemoteProtocolError(f"an offer of channel {offer.channel_id}")
        if offer.channel_id in self._channels:
            raise RemoteProtocolError(f"channel {offer.channel_id} is offered a second time")
        if offer.key in self._keys:
            raise RemoteProtocolError(f"{offer.instance_id} is offered a second time")
        self._channels[offer.channel_id] = GuestChannel(offer)
        self._keys.add(offer.key)
        return [act.OfferSeen(offer)]

    def _on_all_offers(self, message: wire.AllOffersDelivered) -> list[act.GuestEvent]:
        self._state = self._step_link(MessageType.ALL_OFFERS_DELIVERED, RemoteProtocolError)
        return [act.AllOffersSeen()]

    def _on_rescind(self, message: wire.RescindChannelOffer) -> list[act.GuestEvent]:
        channel = self._channels.get(message.channel_id)
        if channel is None:
            return []  # we released it before the host took it back
        if channel.foreign:
            self._drop(channel)  # there is no connection left through which to release it
            return [act.ChannelRescinded(message.channel_id, True)]
        old = channel.state
        channel.state = self._step_channel(channel, MessageType.RESCIND_CHANNEL_OFFER, RemoteProtocolError)
        was_open = old in (ChannelState.OPEN, ChannelState.RESERVED)
        return [act.ChannelRescinded(message.channel_id, was_open)]

    def _on_open_result(self, message: wire.OpenChannelResult) -> list[act.GuestEvent]:
        if self._state in _LISTENS_TO:
            late = self._channels.get(message.channel_id)
            if late is None or late.state is not ChannelState.OPENING_RESERVED:
                return []
        channel = self._named(message.channel_id)
        if channel.open_id != message.open_id:
            raise RemoteProtocolError(f"an answer to open request {message.open_id}, which was not made")
        ok = message.status == Status.SUCCESS
        state = self._step_channel(channel, MessageType.OPEN_CHANNEL_RESULT, RemoteProtocolError, ok=ok)
        self._answered(channel)
        channel.state = state
        if state is ChannelState.OFFERED:
            self._end_reserved(channel)
        return [act.OpenAnswered(message.channel_id, message.status)]

    def _on_gpadl_created(self, message: wire.GpadlCreated) -> list[act.GuestEvent]:
        channel = self._named(message.channel_id)
        state = channel.gpadls.get(message.gpadl_id, GpadlState.ABSENT)
        ok = message.status == Status.SUCCESS
        state = step(GPADL, state, MessageType.GPADL_CREATED, RemoteProtocolError, "the GPADL", ok=ok)
        self._set_gpadl(channel, message.gpadl_id, state)
        return [act.GpadlAnswered(message.channel_id, message.gpadl_id, message.status)]

    def _on_gpadl_torndown(self, message: wire.GpadlTorndown) -> list[act.GuestEvent]:
        channel_id = self._gpadls.get(message.gpadl_id)
        if channel_id is None:
            raise RemoteProtocolError(f"GPADL_TORNDOWN of {message.gpadl_id:#x}, which does not exist")
        channel = self._channels[channel_id]
        state = channel.gpadls[message.gpadl_id]
        state = step(GPADL, state, MessageType.GPADL_TORNDOWN, RemoteProtocolError, "the GPADL")
        self._set_gpadl(channel, message.gpadl_id, state)
        return [act.GpadlGone(message.gpadl_id)]

    def _on_unload_complete(self, message: wire.UnloadComplete) -> list[act.GuestEvent]:
        self._step_link(MessageType.UNLOAD_COMPLETE, RemoteProtocolError)
        self._forget()
        return [act.Unloaded()]

    def _on_reserved_closed(self, message: wire.CloseReservedResponse) -> list[act.GuestEvent]:
        channel = self._named(message.channel_id)
        state = self._step_channel(channel, MessageType.CLOSE_RESERVED_RESPONSE, RemoteProtocolError)
        self._answered(channel)
        channel.state = state
        self._end_reserved(channel)
        return [act.ReservedClosed(message.channel_id)]

    def _on_modify_response(self, message: wire.ModifyChannelResponse) -> list[act.GuestEvent]:
        channel = self._named(message.channel_id)
        self._step_channel(channel, MessageType.MODIFY_CHANNEL_RESPONSE, RemoteProtocolError)
        self._answered(channel)
        return [act.ChannelRetargeted(message.channel_id, message.status)]

    def _on_tl_result(self, message: wire.TlConnectResult) -> list[act.GuestEvent]:
        self._step_link(MessageType.TL_CONNECT_REQUEST_RESULT, RemoteProtocolError)
        return [act.TlConnectAnswered(message.endpoint_id, message.service_id, message.status)]

    def _on_modify_connection_response(self, message: wire.ModifyConnectionResponse) -> list[act.GuestEvent]:
        self._step_link(MessageType.MODIFY_CONNECTION_RESPONSE, RemoteProtocolError)
        ok = message.connection_state == ConnectionState.SUCCESSFUL
        if ok:
            self._monitor_pages = self._wanted_pages
        else:
            self._wanted_pages = self._monitor_pages
        return [act.MonitorPagesAnswered(ok)]

    def _on_pause_response(self, message: wire.PauseResponse) -> list[act.GuestEvent]:
        self._step_link(MessageType.PAUSE_RESPONSE, RemoteProtocolError)
        return [act.Paused()]
