"""The host's end of the control plane as a state machine without I/O.

Messages of the guest go into `HostMachine.receive`; what comes out is a list of actions, to be carried out in
order by whoever runs the machine (`vmbus.bus.VmbusHost` over a hypervisor, a plain list in a test).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import UUID

from vmbus.bus import actions as act
from vmbus.bus import wire
from vmbus.bus.codec import Sender, message_number, parse
from vmbus.bus.gpadl import GpadlPhase
from vmbus.bus.host_channels import ChannelMessages
from vmbus.bus.host_state import EVENT_FLAG_COUNT, NO_GUID, PAGE_NUMBER_SIZE, HostChannel, Link
from vmbus.bus.offer import Offer
from vmbus.bus.transitions import CHANNEL, CONNECTION, ChannelState, GpadlState, LinkState, allowed, step
from vmbus.bus.versions import SUPPORTED_FEATURES, FeatureFlags, Version, features_of
from vmbus.bus.wire import ConnectionState, MessageType, OfferFlags, Status
from vmbus.errors import LocalProtocolError, RemoteProtocolError
from vmbus.hypervisor.budget import Meter

__all__ = ["HostMachine"]

_TAKEN_WHILE_PAUSED = (
    MessageType.RESUME,
    MessageType.UNLOAD,
    MessageType.INITIATE_CONTACT,
    MessageType.CLOSE_RESERVED_CHANNEL,  # reserved channels do not depend on the connection
)


class HostMachine(ChannelMessages):
    """One guest's VMBus as its host sees it.

    Args:
        page_count: 4 KiB pages in the guest's address space; pages beyond it are refused.
        vp_count: virtual processors of the guest.
        versions: the versions granted; others are refused, so that a guest tries its next one.
        features: the feature flags granted with `Version.V6_0`.
        message_connection_id: where guests from version 5.0 on send what follows INITIATE_CONTACT.
        meter: what GPADLs are charged to; one with `Budget`'s defaults if None.
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
        super().__init__(
            page_count,
            vp_count,
            versions=versions,
            features=features,
            message_connection_id=message_connection_id,
            meter=meter,
        )
        self._handlers: dict[MessageType, Callable[[Any, bytes], None]] = {
            MessageType.REQUEST_OFFERS: self._on_request_offers,
            MessageType.OPEN_CHANNEL: self._on_open,
            MessageType.CLOSE_CHANNEL: self._on_close,
            MessageType.GPADL_HEADER: self._on_gpadl_header,
            MessageType.GPADL_BODY: self._on_gpadl_body,
            MessageType.GPADL_TEARDOWN: self._on_gpadl_teardown,
            MessageType.REL_ID_RELEASED: self._on_release,
            MessageType.UNLOAD: self._on_unload,
            MessageType.OPEN_RESERVED_CHANNEL: self._on_open_reserved,
            MessageType.CLOSE_RESERVED_CHANNEL: self._on_close_reserved,
            MessageType.TL_CONNECT_REQUEST: self._on_tl_connect,
            MessageType.MODIFY_CHANNEL: self._on_modify_channel,
            MessageType.MODIFY_CONNECTION: self._on_modify_connection,
            MessageType.PAUSE: self._on_pause,
            MessageType.RESUME: self._on_resume,
        }

    # -- what the provider's side does -----------------------------------------------------------------------

    def offer(self, offer: Offer) -> tuple[int, list[act.HostAction]]:
        """Offer a channel, now or as soon as a guest asks for offers; its `offer_id`.

        If the same offer (interface, instance, sub-channel index) was rescinded and is not released by the
        guest yet, the new one is announced after that: guests tell offers by these ids and would mistake it.

        Raises:
            LocalProtocolError: that offer exists already, or all 2047 channel ids are in use.
        """
        present = self._by_key.get(offer.key)
        if present is not None and (
            present.state is not ChannelState.RESCINDED or present.successor is not None
        ):
            raise LocalProtocolError(f"{offer.instance_id} is offered already")
        if len(self._offers) >= EVENT_FLAG_COUNT - 1:
            raise LocalProtocolError(f"{EVENT_FLAG_COUNT - 1} channels are offered already")
        channel = HostChannel(next(self._offer_ids), offer)
        if present is None:
            self._add(channel)
            self._announce_late(channel)
        else:
            present.successor = channel
            self._predecessors[channel.offer_id] = present
        return channel.offer_id, self._take()

    def rescind(self, offer_id: int) -> list[act.HostAction]:
        """Take an offer back, and a primary channel's sub-channels before it; unknown or rescinded ones:
        nothing."""
        predecessor = self._predecessors.pop(offer_id, None)
        if predecessor is not None:
            predecessor.successor = None
            return [act.OfferGone(offer_id)]
        chosen = self._offers.get(offer_id)
        if chosen is None:
            return []
        if not chosen.offer.is_subchannel:
            # A guest frees the device with its primary channel: sub-channels that still run would use it
            # freed.
            for channel in list(self._offers.values()):
                if channel.offer.is_subchannel and channel.offer.key[:2] == chosen.offer.key[:2]:
                    self._rescind(channel)
        self._rescind(chosen)
        return self._take()

    def _rescind(self, channel: HostChannel) -> None:
        if channel.state is ChannelState.RESCINDED:
            return
        if channel.state is ChannelState.ABSENT:
            del self._offers[channel.offer_id], self._by_key[channel.offer.key]
            self._out.append(act.OfferGone(channel.offer_id))
            return
        request, state = channel.request, channel.state
        self._close_device(channel)
        if state in (ChannelState.OPENING, ChannelState.OPENING_RESERVED) and request is not None:
            self._answer_open(channel, request, ok=False)
        for gpadl in [g for g in self._gpadls.values() if g.offer_id == channel.offer_id]:
            if gpadl.phase is GpadlPhase.MAPPING:
                self._unmap(gpadl)
                self._answer_gpadl(channel, gpadl, ok=False)
            else:
                self._unmap(gpadl)
        if channel.reserved_gpadl is not None:
            gpadl, channel.reserved_gpadl = channel.reserved_gpadl, None
            self._unmap(gpadl)
            if channel.epoch == self._link.epoch and gpadl.gpadl_id not in self._gpadls:
                self._gpadls[gpadl.gpadl_id] = gpadl  # the guest may still tear it down
            else:
                self._free_gpadl(gpadl)
        channel.state = step(CHANNEL, state, MessageType.RESCIND_CHANNEL_OFFER, LocalProtocolError)
        if channel.epoch == self._link.epoch:
            self._send(wire.RescindChannelOffer(channel.channel_id))
        else:  # a reserved channel of a connection that is over: nobody would release it
            self._send(wire.RescindChannelOffer(channel.channel_id), channel.reserved_target)
            self._release(channel)

    def complete_open(self, serial: int, ok: bool) -> list[act.HostAction]:
        """The device's side answers `OpenDevice`: it uses the rings, or cannot. Too late an answer does
        nothing."""
        channel = self._opening.pop(serial, None)
        if channel is not None and channel.request is not None:
            request, was_reserved = channel.request, channel.is_reserved
            channel.state = step(
                CHANNEL, channel.state, MessageType.OPEN_CHANNEL_RESULT, LocalProtocolError, ok=ok
            )
            self._answer_open(channel, request, ok=ok)
            if not ok:
                channel.device_open = False
                channel.request = None
                if was_reserved:
                    self._end_reserved(channel)
        return self._take()

    def _answer_open(self, channel: HostChannel, request: act.OpenRequest, *, ok: bool) -> None:
        """OPEN_CHANNEL_RESULT; a reserved channel's goes where its guest wants its messages."""
        status = Status.SUCCESS if ok else Status.UNSUCCESSFUL
        target = channel.reserved_target if request.reserved else None
        self._send(wire.OpenChannelResult(channel.channel_id, request.open_id, status), target)

    def complete_gpadl(self, serial: int, ok: bool) -> list[act.HostAction]:
        """The device's side answers `MapGpadl`: the guest has those pages, or not. Too late does nothing."""
        gpadl = self._gpadl_serials.get(serial)
        if gpadl is not None and gpadl.phase is GpadlPhase.MAPPING:
            if not ok:
                gpadl.phase = GpadlPhase.UNUSED  # there is nothing to unmap
            self._answer_gpadl(self._offers[gpadl.offer_id], gpadl, ok=ok)
        return self._take()

    def refuse_connection(self) -> list[act.HostAction]:
        """The host cannot do what an `Established` connection needs: it ends, and the guest is told so instead."""
        version, features = self._link.version, self._link.features
        self._disconnect()
        supported = int(version >= Version.V2_4)  # before, there is no way to say more
        self._answer_contact(version, features, supported, ConnectionState.FAILED_UNKNOWN_FAILURE)
        return self._take()

    def refuse_monitor_pages(self, previous: act.MonitorPages | None) -> list[act.HostAction]:
        """The host cannot use the pages of `UseMonitorPages`: those before stay, and the guest is told so instead."""
        self._link.monitor_pages = previous
        self._send(wire.ModifyConnectionResponse(ConnectionState.FAILED_UNKNOWN_FAILURE))
        return self._take()

    def refuse_tl_connect(self, endpoint_id: UUID, service_id: UUID) -> list[act.HostAction]:
        """Tell the guest that nobody serves that service; versions before 4.1 are not told."""
        if self._link.version >= Version.V4_1 and allowed(
            CONNECTION, self._link.state, MessageType.TL_CONNECT_REQUEST_RESULT
        ):
            self._send(wire.TlConnectResult(endpoint_id, service_id, Status.CONNECTION_REFUSED.signed))
        return self._take()

    def reset(self) -> list[act.HostAction]:
        """The guest is gone or starts anew: everything closes, reserved channels too; offers stay."""
        for channel in list(self._offers.values()):
            if channel.is_reserved:
                channel.state = ChannelState.OPEN
        self._disconnect()
        return self._take()

    # -- what the guest says ---------------------------------------------------------------------------------

    def receive(
        self, payload: bytes, connection_id: int = wire.MESSAGE_CONNECTION_ID_V5
    ) -> list[act.HostAction]:
        """Take one message of the guest, from the connection it was posted to.

        Raises:
            RemoteProtocolError: malformed, unknown, or not allowed now; nothing has changed.
        """
        link = self._link
        if link.state is LinkState.IDLE and message_number(payload) == MessageType.REL_ID_RELEASED:
            # Linux unloads first and takes its devices apart after that. UNLOAD has released every id already.
            parse(payload, Sender.GUEST, Version.V0_13)
            return []
        message, tail = parse(payload, Sender.GUEST, link.version, link.features)
        if link.paused and message.TYPE not in _TAKEN_WHILE_PAUSED:
            raise RemoteProtocolError(f"{message.TYPE.name} while the guest has paused the connection")
        if isinstance(message, wire.InitiateContact | wire.InitiateContact2):
            self._on_initiate_contact(message, connection_id)
        else:
            self._handlers[message.TYPE](message, tail)
        return self._take()

    def _on_initiate_contact(
        self, message: wire.InitiateContact | wire.InitiateContact2, connection_id: int
    ) -> None:
        version = message.version_requested
        info = message.interrupt_page_or_target_info
        # From 5.0 on the field holds a target, but only on the connection that was made for it.
        targeted = version >= Version.V5_0 and connection_id == wire.MESSAGE_CONNECTION_ID_V5
        sint, vtl = (info & 0xFF, info >> 8 & 0xFF) if targeted else (wire.VMBUS_SINT, 0)
        asked = info >> 32 if version >= Version.V6_0 else 0
        # Guests before 3.0 left the field unset; later ones crash on any processor and reconnect from there.
        vp = message.target_message_vp if version >= Version.V3_0 else 0
        if sint >= 16 or vp >= self.vp_count:
            raise RemoteProtocolError(f"INITIATE_CONTACT wants messages on SINT {sint} of VP {vp}")
        client_id = NO_GUID
        if asked & FeatureFlags.CLIENT_ID:
            if not isinstance(message, wire.InitiateContact2):
                raise RemoteProtocolError("INITIATE_CONTACT promises a client id and has none")
            client_id = message.client_id
        step(CONNECTION, self._link.state, MessageType.INITIATE_CONTACT, RemoteProtocolError)
        if sint != wire.VMBUS_SINT or vtl != 0:
            # Another client of another SINT or VTL: this bus serves one, and the connection it has stays.
            self._send(wire.VersionResponse(0, 0, 0, 0), (vp, sint))
            return
        self._disconnect()
        self._link.message_vp = vp
        if version not in self._versions:
            self._send(wire.VersionResponse(0, ConnectionState.SUCCESSFUL, 0, 0))
            return
        features = features_of(version, asked, self._features)
        pages, valid = self._monitor_pages(
            message.parent_to_child_monitor_page_gpa, message.child_to_parent_monitor_page_gpa
        )
        # From 2.4 on every channel has its own event flag: hosts ignore the interrupt page that guests
        # still send.
        interrupt_page = info if version < Version.V2_4 and info else None
        if not valid or (interrupt_page is not None and not self._is_page(interrupt_page)):
            # Before 2.4 there is no way to say more than that the version is not supported.
            supported = int(version >= Version.V2_4)
            self._answer_contact(version, features, supported, ConnectionState.FAILED_UNKNOWN_FAILURE)
            return
        self._link = Link(
            LinkState.CONNECTED,
            next(self._serials),
            version,
            features,
            vp,
            sint,
            client_id,
            interrupt_page,
            pages,
        )
        self._out.append(act.Established(version, features, client_id, vp, interrupt_page, pages))
        self._answer_contact(version, features, 1, ConnectionState.SUCCESSFUL)

    def _answer_contact(self, version: int, features: int, supported: int, state: int) -> None:
        selected = self._message_connection_id if version >= Version.V5_0 else version
        if not supported:
            self._send(wire.VersionResponse(0, ConnectionState.SUCCESSFUL, 0, 0))
        elif version >= Version.V6_0:
            self._send(wire.VersionResponse2(supported, state, 0, selected, features))
        else:
            self._send(wire.VersionResponse(supported, state, 0, selected))

    def _monitor_pages(self, down: int, up: int) -> tuple[act.MonitorPages | None, bool]:
        """The pages of a request, and whether it is valid: both or neither, each a page of the guest."""
        if not down and not up:
            return None, True
        if not self._is_page(down) or not self._is_page(up):
            return None, False
        return act.MonitorPages(down, up), True

    def _disconnect(self, *, unloaded: bool = False) -> None:
        """Release every channel except reserved ones, and end the connection."""
        if self._link.state is LinkState.IDLE and not self._by_id:
            return
        self._link.paused = False
        for channel in list(self._by_id.values()):
            if not channel.is_reserved:
                self._release_quietly(channel)
        for gpadl in list(self._gpadls.values()):
            self._free_gpadl(gpadl)
        if self._link.state is not LinkState.IDLE:
            self._out.append(act.Disconnected(unloaded))
        vp, sint = self._link.message_vp, self._link.sint
        self._link = Link(message_vp=vp, sint=sint)

    def _release_quietly(self, channel: HostChannel) -> None:
        """Release without announcing a successor: the guest that would hear of it is leaving."""
        state, self._link.state = self._link.state, LinkState.IDLE
        self._release(channel)
        self._link.state = state

    def _on_unload(self, message: wire.Unload, tail: bytes) -> None:
        step(CONNECTION, self._link.state, MessageType.UNLOAD, RemoteProtocolError, "the connection")
        self._disconnect(unloaded=True)
        # In every version: a new host's guest may speak an old one and wait for this all the same (iPXE does).
        self._send(wire.UnloadComplete())

    def _on_request_offers(self, message: wire.RequestOffers, tail: bytes) -> None:
        link = self._link
        link.state = step(
            CONNECTION, link.state, MessageType.REQUEST_OFFERS, RemoteProtocolError, "the connection"
        )
        # Guests that hibernate expect to find the same ids again: order by what does not change.
        for channel in sorted(
            self._offers.values(), key=lambda c: (c.offer.key[0].int, c.offer.key[2], c.offer_id)
        ):
            if channel.state is ChannelState.ABSENT:
                self._announce(channel)
        self._send(wire.AllOffersDelivered())
        link.state = step(CONNECTION, link.state, MessageType.ALL_OFFERS_DELIVERED, LocalProtocolError)

    def _announce_late(self, channel: HostChannel) -> None:
        """Offer a channel that was not there at REQUEST_OFFERS; before that, it waits."""
        if allowed(CONNECTION, self._link.state, MessageType.OFFER_CHANNEL):
            self._announce(channel)

    def _announce(self, channel: HostChannel) -> None:
        if channel.offer.is_subchannel and self._link.version < Version.V2_4:
            return  # sub-channels came with 2.4; an older guest would take it for a second device
        self._give_ids(channel)
        channel.epoch = self._link.epoch
        channel.state = step(CHANNEL, channel.state, MessageType.OFFER_CHANNEL, LocalProtocolError)
        flags = channel.offer.flags
        if not self._link.features & FeatureFlags.CONFIDENTIAL_CHANNELS:
            flags &= ~(OfferFlags.CONFIDENTIAL_RING_BUFFER | OfferFlags.CONFIDENTIAL_EXTERNAL_MEMORY)
        if not self._link.features & FeatureFlags.GPA_PINNING:
            flags &= ~OfferFlags.REQUIRE_PINNED_EXTERNAL_MEMORY
        offer = replace(
            channel.offer,
            flags=flags,
            channel_id=channel.channel_id,
            connection_id=self.default_connection_id(channel.channel_id),
            is_dedicated=self._link.version >= Version.V1_1,
            monitor_id=channel.monitor_id,
        )
        self._send(offer.to_message())

    def _on_tl_connect(self, message: wire.TlConnectRequest | wire.TlConnectRequest2, tail: bytes) -> None:
        step(
            CONNECTION,
            self._link.state,
            MessageType.TL_CONNECT_REQUEST,
            RemoteProtocolError,
            "the connection",
        )
        silo = message.silo_id if isinstance(message, wire.TlConnectRequest2) else NO_GUID
        self._out.append(act.TlConnect(message.endpoint_id, message.service_id, silo))

    def _on_modify_connection(self, message: wire.ModifyConnection, tail: bytes) -> None:
        pages, ok = self._monitor_pages(
            message.parent_to_child_monitor_page_gpa, message.child_to_parent_monitor_page_gpa
        )
        if pages != self._link.monitor_pages and any(c.is_monitored for c in self._by_id.values()):
            ok = False  # an open channel is being rung through the old pages
        if ok:
            self._out.append(act.UseMonitorPages(pages, self._link.monitor_pages))
            self._link.monitor_pages = pages
        state = ConnectionState.SUCCESSFUL if ok else ConnectionState.FAILED_UNKNOWN_FAILURE
        self._send(wire.ModifyConnectionResponse(state))

    def _on_pause(self, message: wire.Pause, tail: bytes) -> None:
        self._send(wire.PauseResponse())
        self._link.paused = True

    def _on_resume(self, message: wire.Resume, tail: bytes) -> None:
        if not self._link.paused:
            raise RemoteProtocolError("RESUME of a connection that is not paused")
        self._link.paused = False
        self._out += self._link.held
        self._link.held = []

    # -- what must always hold -------------------------------------------------------------------------------

    def check(self) -> None:
        """Check the machine's invariants; tests call it after every step.

        Raises:
            AssertionError: one does not hold.
        """
        assert not self._out, "every action was handed out"
        for channel_id, channel in self._by_id.items():
            assert 0 < channel_id < EVENT_FLAG_COUNT
            assert channel.channel_id == channel_id
            assert channel.state is not ChannelState.ABSENT
            assert self._offers.get(channel.offer_id) is channel
        for channel in self._offers.values():
            known = channel.state is not ChannelState.ABSENT
            assert known == (channel.channel_id in self._by_id), "an id exactly while the guest knows it"
            running = channel.is_reserved or channel.state in (ChannelState.OPENING, ChannelState.OPEN)
            assert running == channel.device_open == (channel.request is not None)
            opening = channel.state in (ChannelState.OPENING, ChannelState.OPENING_RESERVED)
            assert opening == (self._opening.get(channel.serial) is channel), "an open is answered once"
            assert channel.is_reserved == (channel.reserved_gpadl is not None)
            assert channel.successor is None or channel.state is ChannelState.RESCINDED
            if channel.epoch != self._link.epoch:
                assert not known or channel.is_reserved, "only a reserved channel outlives its connection"
            if channel.request is not None and not channel.is_reserved:
                ring = self._gpadls[channel.request.gpadl_id]
                assert ring.phase is GpadlPhase.MAPPED, "an open channel has its ring"
        total = 0
        for gpadl_id, gpadl in self._gpadls.items():
            assert gpadl.gpadl_id == gpadl_id
            assert gpadl.offer_id in self._offers
            assert gpadl.state in (GpadlState.BUILDING, GpadlState.CREATED)
            assert len(gpadl.data) <= gpadl.length
            total += gpadl.length // PAGE_NUMBER_SIZE * PAGE_NUMBER_SIZE
        total += sum(c.reserved_gpadl.length for c in self._offers.values() if c.reserved_gpadl)
        charged = self._meter.gpadls.used, self._meter.gpadl_pages.used * PAGE_NUMBER_SIZE
        assert self._shared_meter or charged == (len(self._gpadl_serials), total)
        monitors = [c.monitor_id for c in self._offers.values() if c.monitor_id is not None]
        assert sorted(monitors) == sorted(self._monitors)
        assert self._by_key == {c.offer.key: c for c in self._offers.values()}
        assert {c.successor.offer_id: c for c in self._offers.values() if c.successor} == self._predecessors
        assert len(self._free_ids) + len(self._by_id) == EVENT_FLAG_COUNT - 1
        assert len(self._gpadl_serials) == len(self._gpadls) + sum(
            c.reserved_gpadl is not None for c in self._offers.values()
        )
        for serial, channel in self._opening.items():
            assert channel.serial == serial
            assert channel.device_open
