"""What the guest says of channels and GPADLs: the half of the host's state machine that serves an open
connection."""

from contextlib import suppress

from vmbus.bus import actions as act
from vmbus.bus import wire
from vmbus.bus.gpadl import GpadlPhase, HostGpadl, ring_pages
from vmbus.bus.host_state import EVENT_FLAG_COUNT, PAGE_NUMBER_SIZE, HostChannel, HostState
from vmbus.bus.transitions import CHANNEL, GPADL, ChannelState, LinkState, allowed, step
from vmbus.bus.versions import FeatureFlags, Version
from vmbus.bus.wire import MessageType, Status
from vmbus.errors import BudgetExceeded, RemoteProtocolError

__all__ = ["ChannelMessages"]

_FIRST_CHANNEL_CONNECTION = 16
"""Guests may choose connection ids for their channels, but none of the bus's own."""


class ChannelMessages(HostState):
    """Handlers of the messages about channels and GPADLs; each validates first and changes after."""

    def _step(self, channel: HostChannel, message: MessageType) -> ChannelState:
        """The channel's state after a message of the guest."""
        return step(CHANNEL, channel.state, message, RemoteProtocolError, f"channel {channel.channel_id}")

    # -- GPADLs ----------------------------------------------------------------------------------------------

    def _on_gpadl_header(self, message: wire.GpadlHeader, tail: bytes) -> None:
        channel = self._by_id.get(message.channel_id)
        gpadl_id, length = message.gpadl_id, message.length & ~7
        if channel is not None and self._may_add_gpadl(channel, gpadl_id):
            gpadl = HostGpadl(gpadl_id, channel.offer_id, next(self._serials), message.count, length)
            with suppress(RemoteProtocolError, BudgetExceeded):
                complete = gpadl.append(tail)
                self._charge_gpadl(length)
                self._gpadls[gpadl_id] = self._gpadl_serials[gpadl.serial] = gpadl
                if complete:
                    self._gpadl_complete(channel, gpadl)
                return
        # The guest waits for an answer, whatever is wrong with its request.
        self._send(wire.GpadlCreated(message.channel_id, gpadl_id, Status.UNSUCCESSFUL.signed))

    def _may_add_gpadl(self, channel: HostChannel, gpadl_id: int) -> bool:
        return allowed(CHANNEL, channel.state, MessageType.GPADL_HEADER) and gpadl_id not in self._gpadls

    def _charge_gpadl(self, length: int) -> None:
        """Charge a GPADL of `length` bytes of ranges to the guest's budget.

        Raises:
            BudgetExceeded: it holds too many, or too large ones; nothing was charged.
        """
        self._meter.gpadls.charge()
        try:
            self._meter.gpadl_pages.charge(length // PAGE_NUMBER_SIZE)
        except BudgetExceeded:
            self._meter.gpadls.release()
            raise

    def _on_gpadl_body(self, message: wire.GpadlBody, tail: bytes) -> None:
        gpadl = self._gpadls.get(message.gpadl_id)
        if gpadl is None or gpadl.phase is not GpadlPhase.COLLECTING:
            raise RemoteProtocolError(f"GPADL_BODY for {message.gpadl_id:#x}, which waits for none")
        channel = self._offers[gpadl.offer_id]
        try:
            complete = gpadl.append(tail)
        except RemoteProtocolError:
            self._answer_gpadl(channel, gpadl, ok=False)
            return
        if complete:
            self._gpadl_complete(channel, gpadl)

    def _gpadl_complete(self, channel: HostChannel, gpadl: HostGpadl) -> None:
        if channel.state is ChannelState.RESCINDED:
            # Nobody is left to map it, but the guest did nothing wrong: hosts that refused here broke guests.
            self._answer_gpadl(channel, gpadl, ok=True)
            return
        gpadl.phase = GpadlPhase.MAPPING
        self._out.append(
            act.MapGpadl(
                channel.offer_id,
                channel.channel_id,
                gpadl.gpadl_id,
                gpadl.serial,
                gpadl.count,
                bytes(gpadl.data),
            )
        )

    def _answer_gpadl(self, channel: HostChannel, gpadl: HostGpadl, *, ok: bool) -> None:
        gpadl.state = step(GPADL, gpadl.state, MessageType.GPADL_CREATED, AssertionError, ok=ok)
        if not ok:
            gpadl.phase = GpadlPhase.UNUSED
            self._free_gpadl(gpadl)
        elif gpadl.phase is GpadlPhase.COLLECTING:
            gpadl.phase = GpadlPhase.UNUSED
        else:
            gpadl.phase = GpadlPhase.MAPPED
        status = Status.SUCCESS if ok else Status.UNSUCCESSFUL
        self._send(wire.GpadlCreated(channel.channel_id, gpadl.gpadl_id, status.signed))

    def _on_gpadl_teardown(self, message: wire.GpadlTeardown, tail: bytes) -> None:
        channel = self._known(message.channel_id)
        gpadl = self._gpadls.get(message.gpadl_id)
        if gpadl is None or gpadl.offer_id != channel.offer_id:
            raise RemoteProtocolError(f"channel {message.channel_id} has no GPADL {message.gpadl_id:#x}")
        gpadl.state = step(GPADL, gpadl.state, MessageType.GPADL_TEARDOWN, RemoteProtocolError, "the GPADL")
        request = channel.request
        if request is not None and request.gpadl_id == gpadl.gpadl_id:
            # The ring of an open channel: the guest takes it away under the device, so the channel ends here.
            if channel.state is ChannelState.OPENING:
                self._send(wire.OpenChannelResult(channel.channel_id, request.open_id, Status.UNSUCCESSFUL))
            channel.state = ChannelState.OFFERED
            self._close_device(channel)
        self._free_gpadl(gpadl)
        self._send(wire.GpadlTorndown(gpadl.gpadl_id))

    # -- open and close --------------------------------------------------------------------------------------

    def _on_open(self, message: wire.OpenChannel | wire.OpenChannel2, tail: bytes) -> None:
        channel = self._by_id.get(message.channel_id)
        if channel is None or channel.state is ChannelState.RESCINDED:
            self._send(wire.OpenChannelResult(message.channel_id, message.open_id, Status.UNSUCCESSFUL))
            return
        state = self._step(channel, MessageType.OPEN_CHANNEL)
        connection_id, event_flag = self.default_connection_id(channel.channel_id), channel.channel_id
        if (
            isinstance(message, wire.OpenChannel2)
            and FeatureFlags.GUEST_SPECIFIED_SIGNAL_PARAMETERS & self._link.features
        ):
            connection_id, event_flag = message.connection_id, message.event_flag
        vp: int | None = message.target_vp
        if vp == wire.VP_INDEX_DISABLE_INTERRUPT:
            vp = None
        if self._link.version < Version.V2_4:
            vp = 0  # the field held something else then, and every interrupt went to VP 0
        request = act.OpenRequest(
            message.open_id,
            message.ring_buffer_gpadl_id,
            message.downstream_ring_buffer_page_offset,
            vp,
            message.user_data,
            connection_id,
            event_flag,
        )
        if not self._can_open(channel, request):
            self._send(wire.OpenChannelResult(channel.channel_id, message.open_id, Status.UNSUCCESSFUL))
            return
        channel.state = state
        self._open_device(channel, request)

    def _can_open(self, channel: HostChannel, request: act.OpenRequest) -> bool:
        gpadl = self._gpadls.get(request.gpadl_id)
        if gpadl is None or gpadl.offer_id != channel.offer_id or gpadl.phase is not GpadlPhase.MAPPED:
            return False
        pages = ring_pages(bytes(gpadl.data))
        # Each ring is a control page and at least one page of data.
        if not 2 <= request.downstream_page <= pages - 2:
            return False
        if request.target_vp is not None and request.target_vp >= self.vp_count:
            return False
        if not 0 < request.event_flag < EVENT_FLAG_COUNT:
            return False
        if request.connection_id < _FIRST_CHANNEL_CONNECTION:
            return False
        return all(
            other is channel or other.request is None or other.request.connection_id != request.connection_id
            for other in self._offers.values()
        )

    def _open_device(self, channel: HostChannel, request: act.OpenRequest) -> None:
        channel.request = request
        channel.serial = next(self._serials)
        channel.device_open = True
        self._opening[channel.serial] = channel
        self._out.append(act.OpenDevice(channel.offer_id, channel.serial, channel.channel_id, request))

    def _on_close(self, message: wire.CloseChannel, tail: bytes) -> None:
        channel = self._known(message.channel_id)
        channel.state = self._step(channel, MessageType.CLOSE_CHANNEL)
        self._close_device(channel)

    def _on_modify_channel(self, message: wire.ModifyChannel, tail: bytes) -> None:
        channel = self._by_id.get(message.channel_id)
        ok = (
            channel is not None
            and channel.state is ChannelState.OPEN
            and channel.request is not None
            and channel.request.target_vp is not None
            and message.target_vp < self.vp_count
        )
        if ok:
            assert channel is not None
            self._out.append(act.Retarget(channel.offer_id, message.target_vp))
        if self._link.version >= Version.V5_3:
            status = Status.SUCCESS if ok else Status.UNSUCCESSFUL
            self._send(wire.ModifyChannelResponse(message.channel_id, status.signed))
        elif not ok and (channel is None or channel.state is not ChannelState.RESCINDED):
            raise RemoteProtocolError(f"channel {message.channel_id} cannot interrupt VP {message.target_vp}")

    # -- reserved channels -----------------------------------------------------------------------------------

    def _on_open_reserved(self, message: wire.OpenReservedChannel, tail: bytes) -> None:
        channel = self._known(message.channel_id)
        state = self._step(channel, MessageType.OPEN_RESERVED_CHANNEL)
        if message.target_sint >= 16 or message.target_vp >= self.vp_count:
            raise RemoteProtocolError(f"no SINT {message.target_sint} of VP {message.target_vp}")
        target = message.target_vp, message.target_sint
        request = act.OpenRequest(
            open_id=0,
            gpadl_id=message.ring_buffer_gpadl_id,
            downstream_page=message.downstream_ring_buffer_page_offset,
            target_vp=None,
            user_data=bytes(120),
            connection_id=self.default_connection_id(channel.channel_id),
            event_flag=channel.channel_id,
            reserved=True,
        )
        if state is ChannelState.RESCINDED or not self._can_open(channel, request):
            self._send(wire.OpenChannelResult(channel.channel_id, 0, Status.UNSUCCESSFUL), target)
            return
        channel.state = state
        channel.reserved_gpadl = self._gpadls.pop(message.ring_buffer_gpadl_id)
        channel.reserved_target = target
        self._open_device(channel, request)

    def _end_reserved(self, channel: HostChannel) -> None:
        """The channel is not reserved any more: the guest has closed it, or its device could not be opened."""
        gpadl, channel.reserved_gpadl = channel.reserved_gpadl, None
        assert gpadl is not None
        if self._link.state is LinkState.IDLE:
            self._free_gpadl(gpadl)
            self._release(channel)
            return
        # Opened through an earlier connection perhaps: who closes it still knows it, and what belongs to it (OpenVMM).
        channel.epoch = self._link.epoch
        if gpadl.gpadl_id not in self._gpadls:
            self._gpadls[gpadl.gpadl_id] = gpadl  # back among those that the guest may tear down
        else:
            self._free_gpadl(gpadl)

    def _on_close_reserved(self, message: wire.CloseReservedChannel, tail: bytes) -> None:
        if message.target_sint >= 16 or message.target_vp >= self.vp_count:
            raise RemoteProtocolError(f"no SINT {message.target_sint} of VP {message.target_vp}")
        channel = self._by_id.get(message.channel_id)
        if channel is None or channel.state is ChannelState.OFFERED:
            return  # it crossed the rescind of a reserved channel whose connection is over; that was its end
        state = self._step(channel, MessageType.CLOSE_RESERVED_CHANNEL)
        target = message.target_vp, message.target_sint
        if state is ChannelState.RESCINDED:
            self._send(wire.CloseReservedResponse(channel.channel_id), target)
            return
        channel.state = step(CHANNEL, state, MessageType.CLOSE_RESERVED_RESPONSE, AssertionError)
        self._close_device(channel)
        self._send(wire.CloseReservedResponse(channel.channel_id), target)
        self._end_reserved(channel)

    # -- the end of a channel --------------------------------------------------------------------------------

    def _on_release(self, message: wire.RelIdReleased, tail: bytes) -> None:
        channel = self._known(message.channel_id)
        self._step(channel, MessageType.REL_ID_RELEASED)
        self._release(channel)

    def _release(self, channel: HostChannel) -> None:
        """The guest forgets the channel and all that it made for it."""
        rescinded = channel.state is ChannelState.RESCINDED
        self._close_device(channel)
        for gpadl in [g for g in self._gpadls.values() if g.offer_id == channel.offer_id]:
            self._free_gpadl(gpadl)
        if channel.reserved_gpadl is not None:
            gpadl, channel.reserved_gpadl = channel.reserved_gpadl, None
            self._free_gpadl(gpadl)
        self._take_ids(channel)
        if rescinded:
            del self._offers[channel.offer_id], self._by_key[channel.offer.key]
            self._out.append(act.OfferGone(channel.offer_id))
            if channel.successor is not None:
                del self._predecessors[channel.successor.offer_id]
                self._add(channel.successor)
                self._announce_late(channel.successor)

    def _add(self, channel: HostChannel) -> None:
        self._offers[channel.offer_id] = self._by_key[channel.offer.key] = channel

    def _announce_late(self, channel: HostChannel) -> None:
        raise NotImplementedError

    def default_connection_id(self, channel_id: int) -> int:
        """The connection of a channel that the guest chose none for: id, SINT (bits 12–15) and VTL 0
        (OpenVMM)."""
        return channel_id | wire.VMBUS_SINT << 12
