"""The network provider: one adapter of a guest, between its VMBus channels and a port of the virtual switch.

`NetworkVsp` carries out what `vmbus.network.vsp_protocol` decides, and moves frames:

* guest to switch: an RNDIS message is copied once out of the send buffer and the GPA ranges, validated, its
  offloads are done, and its frames go to the port as plain Ethernet frames;
* switch to guest: frames are coalesced if the guest wants that, written as RNDIS messages into sections of the
  receive buffer, and announced with one transfer-page packet for many; the sections are free again when the
  guest completes that packet.

A guest that does not read its ring, does not complete, or completes what it was not given loses its own frames
and nothing else. Everything that waits is bounded.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Final

from vmbus.bus.channel import TURN, Channel
from vmbus.core.memory import Window
from vmbus.core.netio import DONE, FULL, HostQueue, ReceivePool
from vmbus.core.ring import COMPLETION, COMPLETION_REQUESTED, GPA_DIRECT, IN_BAND, Packet
from vmbus.errors import GuestMemoryError, RemoteProtocolError, RingError, VmbusError
from vmbus.network import rndis
from vmbus.network.offload import complete, segment
from vmbus.network.rndis import Frame, LargeSend, RndisType, TransmitChecksum
from vmbus.network.switch import Port, tag_frame
from vmbus.network.vsp_delivery import BATCH, MAX_BACKLOG, Delivery, Queue, ring_peer
from vmbus.network.vsp_oid import AdapterConfig, AdapterState
from vmbus.network.vsp_protocol import (
    CONTROL_SECTIONS,
    PACKETS_PER_MESSAGE,
    Action,
    BuffersRevoked,
    Complete,
    DataPathSwitched,
    FilterChanged,
    HostProtocol,
    HostState,
    InBand,
    OfferSubchannels,
    ReceiveBufferGranted,
    RndisControl,
    SendBufferGranted,
)
from vmbus.network.wire import (
    NO_SECTION,
    ChannelType,
    MessageType,
    NvspStatus,
    SendRndisPacket,
)
from vmbus.trace.guest_log import GuestLog

__all__ = ["NetworkVsp"]

log = logging.getLogger(__name__)
guest_log = GuestLog(log)

SLOW_BATCH: Final = 16
"""Packets taken in Python before the compiled path gets its turn again."""
MAX_MESSAGE: Final = 128 << 10
"""Longest RNDIS message: 64 KiB of an LSO frame, headers, and room for several packets in one message."""
MAX_CONTROL_BACKLOG: Final = 64


@dataclass(slots=True)
class _SendBuffer:
    window: Window
    view: memoryview
    section_size: int
    section_count: int


class NetworkVsp(Delivery):
    """Serves one open adapter; a guest that closes and opens the channel again gets a new one.

    Attributes:
        protocol: the control state; read-only for others.
        statistics: what passed.
        port: the port of the switch.
        on_data_path: called with True when the guest switches to its virtual function, False for back.
        use_compiled_path: False leaves all to Python, for comparison.
    """

    def __init__(
        self,
        channel: Channel,
        port: Port,
        config: AdapterConfig,
        *,
        offer_subchannels: Callable[[int], None] | None = None,
        adapter: AdapterState | None = None,
    ) -> None:
        """Serve `channel`, the primary one, from now on.

        Args:
            channel: the host's end.
            port: where the guest's frames go; its receiver is this provider until the channel closes.
            config: the adapter.
            offer_subchannels: called with a number of sub-channels to offer; hand each to `add_subchannel`
                when the guest opened it. Without it the adapter has one queue.
            adapter: what earlier connections of this adapter left.
        """
        super().__init__(channel, port, HostProtocol(config, adapter))
        self._log_scope = channel.log_scope
        self.on_data_path: Callable[[bool], None] | None = None
        self._offer_subchannels = offer_subchannels
        self._send: _SendBuffer | None = None
        self._receive_window: Window | None = None
        self._candidate: Window | None = None
        channel.on_signal = lambda: self._drain(0)
        channel.on_closed = self._close
        port.receiver = self.deliver

    @property
    def is_open(self) -> bool:
        """Whether the primary channel still serves."""
        return 0 in self._queues

    def add_subchannel(self, index: int, channel: Channel) -> None:
        """Serve a sub-channel that the guest opened.

        Raises:
            RemoteProtocolError: no such sub-channel was granted, or it is open already.
        """
        with self._lock:
            if not 0 < index <= self.protocol.subchannels or index in self._queues:
                raise RemoteProtocolError(f"sub-channel {index} of {self.protocol.subchannels}")
            self._queues[index] = Queue(channel, index)
            self._make_plain(self._queues[index])
            channel.on_signal = lambda: self._drain(index)
            channel.on_closed = lambda: self._drop_queue(index)
            all_open = len(self._queues) == self.protocol.subchannels + 1
        if all_open:
            self._act(lambda: self.protocol.send_table(len(self._queues)))
        self._drain(index)

    def set_link(self, up: bool) -> None:
        """Connect or disconnect the adapter's cable; frames that wait when it is pulled are lost."""
        if not up:
            with self._lock:
                for queue in self._queues.values():
                    self._give_up(queue, "link is down")
        self._act(lambda: self.protocol.set_link(up))

    def set_link_speed(self, bits_per_second: int) -> None:
        """Change the reported speed."""
        self._act(lambda: self.protocol.set_link_speed(bits_per_second))

    def network_changed(self) -> None:
        """Make the guest renew its addresses."""
        self._act(self.protocol.network_changed)

    def associate_vf(self, serial: int | None) -> None:
        """Announce a virtual function, or with None its removal."""
        self._act(lambda: self.protocol.associate_vf(serial))

    def _act(self, make: Callable[[], list[Action]]) -> None:
        with self._lock:
            actions = make()
            if not self.is_open:
                return
            queue = self._queues[0]
            try:
                self._perform(actions, queue, None)
                needed = self._flush(queue)
            except RingError as error:
                self._fail(0, error)
                return
        if needed:
            ring_peer(queue.channel)
        if self._deferred:
            self._run_deferred()

    # ---- from the guest

    def _drain(self, index: int) -> None:
        """Read a channel's ring until it is empty, until its completions find no room, or for a turn."""
        turn = TURN
        while (queue := self._queues.get(index)) is not None:
            channel, needed, more = queue.channel, False, False
            frames: list[bytes] = []
            others: list[Channel] = []
            try:
                with self._lock:
                    if not channel.is_open:
                        return
                    queue.blocked = False
                    needed = self._flush(queue)
                    # A guest that does not read its completions gets no further until it does.
                    if not queue.completions:
                        channel.incoming.mask()
                        taken, ring, queue.blocked = self._take(queue, frames)
                        channel.account.packets_received += taken
                        needed |= ring | channel.incoming.take_signal()
                        more = not queue.blocked and (taken > 0 or channel.incoming.unmask())
                        needed |= self._flush_all(queue, others)
            except RingError as error:
                self._fail(index, error)
                return
            if needed:
                ring_peer(channel)
            for other in others:
                ring_peer(other)
            if self._deferred:
                self._run_deferred()
            if frames:
                self.port.send(frames)
            if not more:
                return
            turn -= 1
            if turn <= 0:
                channel.again()
                return

    def _take(self, queue: Queue, frames: list[bytes]) -> tuple[int, bool, bool]:
        """Take packets from the ring: how many, whether to ring the guest, whether to wait for it."""
        taken, ring = 0, False
        plain = queue.plain if self.use_compiled_path else None
        if plain is not None and self.protocol.oids.link_up:
            violations, copied = plain.violations, plain.bytes_copied
            taken, reason, ring = plain.drain(frames, BATCH)
            self.statistics.violations += plain.violations - violations
            queue.channel.account.bytes_copied += plain.bytes_copied - copied
            queue.channel.account.packets_sent += taken
            self.statistics.add_sent(plain.take_sent())
            if reason == FULL:
                # Not even room for completions: the guest rings when there is, unless there is by now.
                return taken, ring, not queue.channel.outgoing.want_space(40)
            if reason == DONE:
                return taken, ring, False
        packets = queue.channel.incoming.recv_packets(BATCH if plain is None else SLOW_BATCH)
        for packet in packets:
            self._receive_packet(queue.index, queue, packet, frames)
        return taken + len(packets), ring, False

    def _receive_packet(self, index: int, queue: Queue, packet: Packet, frames: list[bytes]) -> None:
        payload = packet.payload
        if packet.type == COMPLETION:
            self._release(queue, packet.transaction_id)
            return
        wanted = bool(packet.flags & COMPLETION_REQUESTED)
        try:
            if packet.type not in (IN_BAND, GPA_DIRECT):
                raise RemoteProtocolError(f"packet of type {packet.type} from a guest")
            if payload[:4] == _RNDIS_PACKET:
                status = self._receive_rndis(index, packet, frames)
                if wanted:
                    queue.complete(packet.transaction_id, self.protocol.rndis_completion(status))
                return
            if index:
                raise RemoteProtocolError("control message on a sub-channel")
            self._perform(self.protocol.receive_nvsp(payload, self._buffer_size), queue, packet)
        except RemoteProtocolError as error:
            self.statistics.violations += 1
            log.debug("%s: %s", self.port.name, error)
            if wanted:
                queue.complete(packet.transaction_id, self.protocol.refusal(payload))
        finally:
            if self._candidate is not None:  # made for a buffer that was refused
                self._candidate.close()
                self._candidate = None

    def _receive_rndis(self, index: int, packet: Packet, frames: list[bytes]) -> int:
        """The NVSP status of a `SEND_RNDIS_PACKET`; frames that are fit to be sent are added to `frames`."""
        try:
            state = self.protocol.state
            if state not in (HostState.READY, HostState.REVOKED):
                raise RemoteProtocolError(f"RNDIS message in state {state.name}")
            message = self._rndis_message(packet)
            if (
                state == HostState.REVOKED and message[:4] != _HALT_MESSAGE
            ):  # DPDK halts after it took its buffers
                raise RemoteProtocolError("RNDIS message after a buffer was revoked")
            if message[:4] != _PACKET_MESSAGE:
                if index:
                    raise RemoteProtocolError("RNDIS control message on a sub-channel")
                if len(self._control) >= MAX_CONTROL_BACKLOG:
                    return NvspStatus.BUSY
                self._perform(self.protocol.receive_rndis(message), self._queues[0], packet)
                return NvspStatus.SUCCESS
            received = rndis.unpack_packets(message, 4 * PACKETS_PER_MESSAGE)
        except (RemoteProtocolError, GuestMemoryError) as error:
            self.statistics.violations += 1
            log.debug("%s: %s", self.port.name, error)
            return (
                NvspStatus.FAILURE
            )  # as OpenVMM; `INVALID_RNDIS_PACKET` is known to guests, but no host sends it
        status = NvspStatus.SUCCESS
        for frame in received:
            try:
                ready = self._prepare(frame)
            except RemoteProtocolError as error:
                log.debug("%s: %s", self.port.name, error)
                self.statistics.sent_errors += 1
                self._queues[0].channel.account.dropped["impossible for an adapter"] += 1
                status = NvspStatus.FAILURE
                continue
            for data in ready:
                self.statistics.count_sent(data)
            frames += ready
        return status

    def _rndis_message(self, packet: Packet) -> bytes:
        """A private copy of the message: the section's part, then that of the GPA ranges."""
        body = SendRndisPacket.unpack(packet.payload, 4)
        message = b""
        if body.send_buffer_section_index != NO_SECTION:
            buffer = self._send
            if (
                buffer is None
                or body.send_buffer_section_size > buffer.section_size
                or (start := body.send_buffer_section_index * buffer.section_size)
                + body.send_buffer_section_size
                > len(buffer.view)
            ):
                raise RemoteProtocolError(
                    f"send section {body.send_buffer_section_index} of {body.send_buffer_section_size} bytes"
                )
            message = bytes(buffer.view[start : start + body.send_buffer_section_size])
        ranges = packet.ranges
        if ranges is not None:
            if ranges.total + len(message) > MAX_MESSAGE:
                raise RemoteProtocolError(f"RNDIS message of {ranges.total + len(message)} bytes")
            message += ranges.read(self._queues[0].channel.memory)
        self._queues[0].channel.account.bytes_copied += len(message)
        return message

    def _prepare(self, frame: Frame) -> list[bytes]:
        """Do what the guest left to the adapter: the frames as they go on the wire."""
        data = frame.data
        if len(data) < 14:
            raise RemoteProtocolError(f"Ethernet frame of {len(data)} bytes")
        if not self.protocol.oids.link_up:
            self._queues[0].channel.account.dropped["link is down"] += 1
            return []
        if frame.large_send is not None:
            result = segment(data, LargeSend.unpack(frame.large_send))
        elif frame.checksum is not None:
            result = [complete(data, TransmitChecksum.unpack(frame.checksum))]
        else:
            result = [data]
        limit = self.protocol.frame_size + 4  # a tag may be in the frame
        if any(len(part) > limit for part in result):
            raise RemoteProtocolError(f"Ethernet frame longer than {limit} bytes")
        if frame.vlan is not None:
            tci = rndis.unpack_vlan(frame.vlan)
            result = [tag_frame(part, tci) for part in result]
        return result

    def _buffer_size(self, gpadl_id: int) -> int:
        """Map a GPADL as a buffer-to-be, so that nothing can fail once the protocol granted it."""
        channel = self._queues[0].channel
        gpadl = channel.gpadl(gpadl_id)
        parts = list(gpadl.ranges)
        if len(parts) != 1 or parts[0].byte_offset or parts[0].byte_count % 4096:
            raise RemoteProtocolError(f"GPADL {gpadl_id:#x} is not one run of whole pages")
        try:
            self._candidate = gpadl.window()
        except (VmbusError, OSError, MemoryError) as error:
            raise RemoteProtocolError(f"GPADL {gpadl_id:#x} cannot be mapped: {error}") from error
        return self._candidate.size

    # ---- actions of the protocol

    def _perform(self, actions: Iterable[Action], queue: Queue, packet: Packet | None) -> None:
        for action in actions:
            match action:
                case Complete(payload):
                    if packet is not None and packet.flags & COMPLETION_REQUESTED:
                        queue.complete(packet.transaction_id, payload)
                case RndisControl(message):
                    if len(self._control) < MAX_CONTROL_BACKLOG:
                        self._control.append(message)
                    else:
                        self.statistics.received_no_buffer += 1
                case InBand(payload, transaction_id):
                    flags = 0 if transaction_id is None else COMPLETION_REQUESTED
                    queue.completions.append((transaction_id or 0, payload, IN_BAND, flags))
                    self._unanswered += transaction_id is not None
                case ReceiveBufferGranted():
                    self._grant_receive(action)
                case SendBufferGranted():
                    self._grant_send(action)
                case BuffersRevoked(receive):
                    self._revoke(receive)
                case OfferSubchannels(count):
                    if self._offer_subchannels is not None:
                        self._deferred.append(partial(self._offer_subchannels, count))
                case FilterChanged():
                    self._refilter()
                case DataPathSwitched(to_vf):
                    if self.on_data_path is not None:
                        self._deferred.append(partial(self.on_data_path, to_vf))

    def _take_candidate(self) -> Window:
        window, self._candidate = self._candidate, None
        assert window is not None
        return window

    def _grant_receive(self, granted: ReceiveBufferGranted) -> None:
        window = self._take_candidate()
        self._receive = ReceivePool(window, granted.section_size, granted.section_count)
        self._receive_window = window
        self._set_id = granted.set_id
        for queue in self._queues.values():
            self._make_plain(queue)

    def _make_plain(self, queue: Queue) -> None:
        """Let the compiled path serve a channel."""
        if self._receive is None:
            return
        protocol = self.protocol
        plain = queue.plain = HostQueue(
            queue.channel.incoming,
            queue.channel.outgoing,
            self._receive,
            queue.index,
            self._set_id,
            protocol.rndis_completion(NvspStatus.SUCCESS),
            protocol.rndis_packet(ChannelType.DATA),
        )
        plain.frame_limit = protocol.frame_size
        plain.reserve = CONTROL_SECTIONS
        if self._send is not None:
            plain.use_send_buffer(self._send.window, self._send.section_size, self._send.section_count)

    def _grant_send(self, granted: SendBufferGranted) -> None:
        window = self._take_candidate()
        self._send = _SendBuffer(window, window.view(), granted.section_size, granted.section_count)
        for queue in self._queues.values():
            if queue.plain is not None:
                queue.plain.use_send_buffer(window, granted.section_size, granted.section_count)

    def _revoke(self, receive: bool) -> None:
        for queue in self._queues.values():
            if queue.plain is not None:
                queue.plain.use_send_buffer(None, 0, 0)
            if receive:
                self._give_up(queue, "adapter closed")
                queue.plain = None
        if receive and self._receive is not None:
            self._revoked = set(self._receive.in_flight())
            self._receive.close()
            self._receive = None
            if self._receive_window is not None:
                self._receive_window.close()
            self._control.clear()
        elif not receive and self._send is not None:
            self._send.view.release()
            self._send.window.close()
            self._send = None

    # ---- the end

    def _drop_queue(self, index: int) -> None:
        with self._lock:
            queue = self._queues.pop(index, None)
            if queue is None:
                return
            if queue.plain is not None:
                queue.plain.use_send_buffer(None, 0, 0)
            if self._receive is not None:
                self._receive.drop(index)
            primary = self._queues.get(0)
            if primary is not None:  # its frames come over the primary channel, from their sections too
                room = MAX_BACKLOG - len(primary.backlog)
                primary.backlog.extend(islice(queue.backlog, room))
                dropped = max(0, len(queue.backlog) - room)
                if dropped:
                    primary.channel.account.dropped["guest has no buffer"] += dropped
                    self.statistics.received_no_buffer += dropped
        if primary is not None:
            primary.channel.again()

    def _fail(self, index: int, error: RingError) -> None:
        """A ring cannot be trusted any more: close that channel."""
        guest_log.warning(self.port.name, "channel %d closed: %s", index, error, scope=self._log_scope)
        self.statistics.violations += 1
        queue = self._queues.get(index)
        if queue is not None:
            queue.channel.close()

    def _close(self) -> None:
        with self._lock:
            if self.is_open:
                self._perform(self.protocol.close(), self._queues[0], None)
            self._revoke(True)
            self._revoke(False)
            self._queues.clear()
        if self._deferred:
            self._run_deferred()
        if self.port.receiver == self.deliver:
            self.port.receiver = _discard


def _discard(frames: list[bytes]) -> None:
    del frames


_RNDIS_PACKET: Final = int(MessageType.SEND_RNDIS_PACKET).to_bytes(4, "little")
_PACKET_MESSAGE: Final = int(RndisType.PACKET).to_bytes(4, "little")
_HALT_MESSAGE: Final = int(RndisType.HALT).to_bytes(4, "little")
