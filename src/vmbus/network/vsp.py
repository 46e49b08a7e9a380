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

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from vmbus.bus.channel import Channel
from vmbus.core.memory import Window
from vmbus.core.netio import DONE, FULL, HostQueue, ReceivePool
from vmbus.core.ring import COMPLETION, COMPLETION_REQUESTED, GPA_DIRECT, IN_BAND, Packet
from vmbus.errors import GuestMemoryError, LocalProtocolError, RemoteProtocolError, RingError, RingFull
from vmbus.network import rndis
from vmbus.network.offload import check, coalesce, complete, segment
from vmbus.network.rndis import Frame, LargeSend, PacketIdFlags, ReceiveChecksum, RndisType, TransmitChecksum
from vmbus.network.switch import Port, strip_tag, tag_frame
from vmbus.network.vsp_oid import AdapterConfig, AdapterStatistics
from vmbus.network.vsp_protocol import (
    CONTROL_SECTIONS,
    PACKETS_PER_MESSAGE,
    Action,
    BuffersRevoked,
    Complete,
    DataPathSwitched,
    HostProtocol,
    HostState,
    InBand,
    OfferSubchannels,
    ReceiveBufferGranted,
    RndisControl,
    SendBufferGranted,
)
from vmbus.network.wire import (
    MAX_RSC_RANGES,
    NO_SECTION,
    ChannelType,
    MessageType,
    NvspStatus,
    SendRndisPacket,
)

__all__ = ["NetworkVsp"]

log = logging.getLogger(__name__)

BATCH: Final = 64
"""Ring packets taken at once, and frames announced in one transfer-page packet."""
SLOW_BATCH: Final = 16
"""Packets taken in Python before the compiled path gets its turn again."""
MAX_MESSAGE: Final = 128 << 10
"""Longest RNDIS message: 64 KiB of an LSO frame, headers, and room for several packets in one message."""
MAX_BACKLOG: Final = 2048
"""Frames that wait for receive sections or ring space, per channel."""
MAX_CONTROL_BACKLOG: Final = 64


@dataclass(slots=True)
class _Queue:
    """One open channel and what waits for it.

    Attributes:
        completions: (transaction id, payload); without an id it is a message of our own.
        backlog: packets for the guest, each a list of one RNDIS message a fragment.
        plain: the compiled path, once there is a receive buffer.
        wanted: payload size of the packet that did not fit into the ring.
    """

    channel: Channel
    index: int
    completions: deque[tuple[int | None, bytes]] = field(default_factory=deque)
    backlog: deque[list[bytes]] = field(default_factory=deque)
    plain: HostQueue | None = None
    wanted: int = 0


@dataclass(slots=True)
class _SendBuffer:
    window: Window
    view: memoryview
    section_size: int
    section_count: int


class NetworkVsp:
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
        statistics: AdapterStatistics | None = None,
    ) -> None:
        """Serve `channel`, the primary one, from now on.

        Args:
            channel: the host's end.
            port: where the guest's frames go; its receiver is this provider until the channel closes.
            config: the adapter.
            offer_subchannels: called with a number of sub-channels to offer; hand each to `add_subchannel`
                when the guest opened it. Without it the adapter has one queue.
            statistics: counters to go on with.
        """
        self.statistics = statistics or AdapterStatistics()
        self.protocol = HostProtocol(config, self.statistics)
        self.port = port
        self.on_data_path: Callable[[bool], None] | None = None
        self.use_compiled_path = True
        self._offer_subchannels = offer_subchannels
        self._queues: dict[int, _Queue] = {0: _Queue(channel, 0)}
        self._send: _SendBuffer | None = None
        self._receive_window: Window | None = None
        self._receive: ReceivePool | None = None
        self._set_id = 0
        self._candidate: Window | None = None
        self._control: deque[bytes] = deque()
        self._next_packet_id = 0
        self._deferred: list[Callable[[], None]] = []
        self._lock = threading.RLock()
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
            self._queues[index] = _Queue(channel, index)
            self._make_plain(self._queues[index])
            channel.on_signal = lambda: self._drain(index)
            channel.on_closed = lambda: self._drop_queue(index)
            all_open = len(self._queues) == self.protocol.subchannels + 1
        if all_open:
            self._act(lambda: self.protocol.send_table(len(self._queues)))
        self._drain(index)

    def set_link(self, up: bool) -> None:
        """Connect or disconnect the adapter's cable."""
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
            _ring(queue.channel)

    def _run_deferred(self) -> None:
        """Call others, now that the lock is free: they have locks of their own."""
        with self._lock:
            calls, self._deferred = self._deferred, []
        for call in calls:
            call()

    # ---- from the guest

    def _drain(self, index: int) -> None:
        """Read a channel's ring until it is empty, or until its completions find no room."""
        while (queue := self._queues.get(index)) is not None:
            channel, needed, more = queue.channel, False, False
            frames: list[bytes] = []
            try:
                with self._lock:
                    if not channel.is_open:
                        return
                    needed = self._flush(queue)
                    # A guest that does not read its completions gets no further until it does.
                    if not queue.completions:
                        channel.incoming.mask()
                        taken, ring, blocked = self._take(queue, frames)
                        channel.account.packets_received += taken
                        needed |= ring | channel.incoming.take_signal()
                        more = not blocked and (taken > 0 or channel.incoming.unmask())
                        needed |= self._flush(queue)
            except RingError as error:
                self._fail(index, error)
                return
            if needed:
                _ring(channel)
            if self._deferred:
                self._run_deferred()
            if frames:
                self.port.send(frames)
            if not more:
                return

    def _take(self, queue: _Queue, frames: list[bytes]) -> tuple[int, bool, bool]:
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

    def _receive_packet(self, index: int, queue: _Queue, packet: Packet, frames: list[bytes]) -> None:
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
                    queue.completions.append((packet.transaction_id, self.protocol.rndis_completion(status)))
                return
            if index:
                raise RemoteProtocolError("control message on a sub-channel")
            self._perform(self.protocol.receive_nvsp(payload, self._buffer_size), queue, packet)
        except RemoteProtocolError as error:
            self.statistics.violations += 1
            log.debug("%s: %s", self.port.name, error)
            if wanted:
                queue.completions.append((packet.transaction_id, self.protocol.refusal(payload)))
        finally:
            if self._candidate is not None:  # made for a buffer that was refused
                self._candidate.close()
                self._candidate = None

    def _receive_rndis(self, index: int, packet: Packet, frames: list[bytes]) -> int:
        """The NVSP status of a `SEND_RNDIS_PACKET`; frames that are fit to be sent are added to `frames`."""
        try:
            if self.protocol.state != HostState.READY:
                raise RemoteProtocolError(f"RNDIS message in state {self.protocol.state.name}")
            message = self._rndis_message(packet)
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
            return NvspStatus.INVALID_RNDIS_PACKET
        status = NvspStatus.SUCCESS
        for frame in received:
            try:
                ready = self._prepare(frame)
            except RemoteProtocolError as error:
                log.debug("%s: %s", self.port.name, error)
                self.statistics.sent_errors += 1
                status = NvspStatus.INVALID_RNDIS_PACKET
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
                or body.send_buffer_section_index >= buffer.section_count
                or body.send_buffer_section_size > buffer.section_size
            ):
                raise RemoteProtocolError(
                    f"send section {body.send_buffer_section_index} of {body.send_buffer_section_size} bytes"
                )
            start = body.send_buffer_section_index * buffer.section_size
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
            return []
        if frame.large_send is not None:
            result = segment(data, LargeSend.unpack(frame.large_send))
        elif frame.checksum is not None:
            wanted = TransmitChecksum.unpack(frame.checksum)
            result = [complete(data, wanted) if wanted.tcp or wanted.udp or wanted.ip_header else data]
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
            self._candidate = channel.memory.window(parts[0].pfns, mirrored=False)
        except (GuestMemoryError, OSError, ValueError) as error:
            raise RemoteProtocolError(f"GPADL {gpadl_id:#x} cannot be mapped: {error}") from error
        return self._candidate.size

    # ---- actions of the protocol

    def _perform(self, actions: Iterable[Action], queue: _Queue, packet: Packet | None) -> None:
        for action in actions:
            match action:
                case Complete(payload):
                    if packet is not None and packet.flags & COMPLETION_REQUESTED:
                        queue.completions.append((packet.transaction_id, payload))
                case RndisControl(message):
                    if len(self._control) < MAX_CONTROL_BACKLOG:
                        self._control.append(message)
                    else:
                        self.statistics.received_no_buffer += 1
                case InBand(payload):
                    queue.completions.append((None, payload))
                case ReceiveBufferGranted():
                    self._grant_receive(action)
                case SendBufferGranted():
                    self._grant_send(action)
                case BuffersRevoked(receive):
                    self._revoke(receive)
                case OfferSubchannels(count):
                    if self._offer_subchannels is not None:
                        self._deferred.append(partial(self._offer_subchannels, count))
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

    def _make_plain(self, queue: _Queue) -> None:
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
                queue.backlog.clear()
                queue.plain = None
        if receive and self._receive is not None:
            self._receive.close()
            self._receive = None
            if self._receive_window is not None:
                self._receive_window.close()
            self._control.clear()
        elif not receive and self._send is not None:
            self._send.view.release()
            self._send.window.close()
            self._send = None

    # ---- to the guest

    def deliver(self, frames: list[bytes]) -> None:
        """Give frames of the switch to the guest: the receiver of the port."""
        with self._lock:
            if not self.protocol.can_receive or self._receive is None:
                self.statistics.received_filtered += len(frames)
                return
            signals: list[Channel] = []
            at = 0
            while at < len(frames):
                at = self._deliver_plain(frames, at, signals)
                if at < len(frames):
                    # One at a time as long as the compiled path may go on behind it, else all of them.
                    end = at + 1 if self._can_deliver_plain() else len(frames)
                    self._deliver_slowly(frames[at:end], signals)
                    at = end
        if self._deferred:
            self._run_deferred()
        for channel in signals:
            _ring(channel)

    def _can_deliver_plain(self) -> bool:
        oids, queue = self.protocol.oids, self._queues.get(0)
        wanted = oids.offloads.receive
        return (
            self.use_compiled_path
            and queue is not None
            and queue.plain is not None
            and oids.rss is None
            and not (queue.backlog or queue.completions or self._control)
            and not any(self.protocol.rsc)
            and not (wanted.tcp4 or wanted.tcp6 or wanted.udp4 or wanted.udp6 or wanted.ipv4_header)
        )

    def _deliver_plain(self, frames: list[bytes], at: int, signals: list[Channel]) -> int:
        """Deliver the frames that the compiled path can, from `at` on; where it stopped."""
        if not self._can_deliver_plain():
            return at
        queue, oids = self._queues[0], self.protocol.oids
        plain = queue.plain
        assert plain is not None
        filtered, copied, packets = plain.filtered, plain.bytes_copied, queue.channel.outgoing.packets
        mac = int.from_bytes(oids.current_mac, "big")
        try:
            at, _, ring = plain.deliver(frames, at, mac, oids.packet_filter)
        except RingError as error:
            self._deferred.append(partial(self._fail, 0, error))
            return len(frames)
        self.statistics.received_filtered += plain.filtered - filtered
        self.statistics.add_received(plain.take_received())
        account = queue.channel.account
        account.bytes_copied += plain.bytes_copied - copied
        account.packets_sent += queue.channel.outgoing.packets - packets
        if ring:
            signals.append(queue.channel)
        else:
            account.doorbells_suppressed += 1
        return at

    def _deliver_slowly(self, frames: list[bytes], signals: list[Channel]) -> None:
        for index, batch in self._spread(frames).items():
            queue = self._queues.get(index) or self._queues[0]
            self._enqueue(queue, batch)
            try:
                if self._flush(queue):
                    signals.append(queue.channel)
            except RingError as error:
                self._deferred.append(partial(self._fail, index, error))

    def _spread(self, frames: list[bytes]) -> dict[int, list[tuple[bytes, int | None]]]:
        """Frames that pass the filter, by queue, with their hashes."""
        result: dict[int, list[tuple[bytes, int | None]]] = {}
        oids, limit = self.protocol.oids, self.protocol.frame_size
        for frame in frames:
            if not oids.accepts(frame[:6]) or len(frame) > limit + 4 * (frame[12:14] == b"\x81\x00"):
                self.statistics.received_filtered += 1
                continue
            value = None if oids.rss is None else oids.rss.hash(frame)
            index = 0 if oids.rss is None else oids.rss.queue(value)
            result.setdefault(index, []).append((frame, value))
        return result

    def _enqueue(self, queue: _Queue, batch: list[tuple[bytes, int | None]]) -> None:
        """Make the RNDIS messages of frames; those that overflow the backlog are dropped."""
        ipv4, ipv6 = self.protocol.rsc
        hashes = dict(batch)
        frames = [frame for frame, _ in batch]
        groups = coalesce(frames, ipv4=ipv4, ipv6=ipv6) if ipv4 or ipv6 else [[frame] for frame in frames]
        assert self._receive is not None
        most = min(
            self._receive.count - CONTROL_SECTIONS, MAX_RSC_RANGES, queue.channel.outgoing.capacity // 8 - 16
        )
        position = 0
        for group in groups:
            first = frames[position]
            position += len(group)
            if len(queue.backlog) >= MAX_BACKLOG or len(group) > most:
                self.statistics.received_no_buffer += len(group)
                continue
            for frame in frames[position - len(group) : position]:
                self.statistics.count_received(frame)
            queue.backlog.append(self._messages(group, first, hashes[first]))

    def _messages(self, group: list[bytes], original: bytes, hash_value: int | None) -> list[bytes]:
        """The RNDIS messages of one packet: one a fragment."""
        plain, tci = strip_tag(group[0])
        vlan = None if tci is None else rndis.pack_vlan(tci)
        checksum = self._checksum_of(original, len(group) > 1)
        if len(group) == 1:
            return [rndis.pack_packet(Frame(plain, checksum, None, vlan, hash_value))]
        self._next_packet_id = self._next_packet_id + 1 & 0xFFFF
        messages = []
        for number, part in enumerate(group):
            flags = PacketIdFlags.SUB_ALLOCATION
            if number == 0:
                flags |= PacketIdFlags.FIRST
            if number == len(group) - 1:
                flags |= PacketIdFlags.LAST
            identity = 1 | flags << 8 | self._next_packet_id << 16
            data = plain if number == 0 else part
            messages.append(rndis.pack_packet(Frame(data, checksum, None, vlan, hash_value, identity)))
        return messages

    def _checksum_of(self, frame: bytes, coalesced: bool) -> int | None:
        """What the guest is told of the checksums, as far as it asked for it."""
        wanted = self.protocol.oids.offloads.receive
        if not (wanted.tcp4 or wanted.tcp6 or wanted.udp4 or wanted.udp6 or wanted.ipv4_header or coalesced):
            return None
        found = check(frame)
        if coalesced:
            found |= ReceiveChecksum.TCP_VALUE_INVALID
        return int(found) or None

    def _flush(self, queue: _Queue) -> bool:
        """Send what waits for `queue`: completions, control messages, frames. Whether to ring the guest."""
        outgoing = queue.channel.outgoing
        needed = False
        for _ in range(_ATTEMPTS):
            try:
                needed |= self._flush_completions(queue)
                needed |= self._flush_sections(queue)
                outgoing.stop_waiting()
                break
            except RingFull:
                # The guest is to ring when there is room; if there is by now, try again instead.
                if not outgoing.want_space(queue.wanted):
                    break
        if not needed:
            queue.channel.account.doorbells_suppressed += 1
        return needed

    def _flush_completions(self, queue: _Queue) -> bool:
        outgoing, needed = queue.channel.outgoing, False
        while queue.completions:
            transaction_id, payload = queue.completions[0]
            queue.wanted = len(payload)
            if transaction_id is None:
                needed |= outgoing.send(payload)
            else:
                needed |= outgoing.send(payload, transaction_id, COMPLETION)
            queue.completions.popleft()
            queue.channel.account.packets_sent += 1
        return needed

    def _flush_sections(self, queue: _Queue) -> bool:
        needed = False
        while self._receive is not None and self._control and queue is self._queues.get(0):
            if not self._receive.available:
                return needed
            needed |= self._send_sections(queue, [self._control[0]], ChannelType.CONTROL)
            self._control.popleft()
        while self._receive is not None and queue.backlog:
            packets = self._next_batch(queue)
            if not packets:
                break
            messages = [message for packet in packets for message in packet]
            needed |= self._send_sections(queue, messages, ChannelType.DATA)
            for _ in packets:
                queue.backlog.popleft()
        return needed

    def _next_batch(self, queue: _Queue) -> list[list[bytes]]:
        """Packets from the backlog that fit into free sections now; fragments of a packet stay together."""
        assert self._receive is not None
        room = self._receive.available - CONTROL_SECTIONS
        result: list[list[bytes]] = []
        count = 0
        for group in queue.backlog:
            if count + len(group) > room or (result and count + len(group) > BATCH):
                break
            result.append(group)
            count += len(group)
        return result

    def _send_sections(self, queue: _Queue, messages: list[bytes], kind: int) -> bool:
        """Announce messages with one packet; the caller made sure that there are sections for them."""
        pool = self._receive
        assert pool is not None
        sections = [pool.take() for _ in messages]
        ranges = [
            (len(message), pool.write(section, message))
            for section, message in zip(sections, messages, strict=True)
        ]
        transaction_id = pool.commit(sections, queue.index)
        queue.wanted = 8 + 8 * len(ranges) + 40  # rest of the header, ranges, NVSP message
        try:
            needed = queue.channel.outgoing.send_transfer_pages(
                self.protocol.rndis_packet(kind), self._set_id, ranges, transaction_id
            )
        except RingError:
            pool.release(transaction_id, queue.index)
            raise
        queue.channel.account.packets_sent += 1
        queue.channel.account.bytes_copied += sum(map(len, messages))
        return needed

    def _release(self, queue: _Queue, transaction_id: int) -> None:
        """The guest completed one of our packets; of others it is told nothing, they are counted."""
        if self._receive is None or not self._receive.release(transaction_id, queue.index):
            self.statistics.violations += 1

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

    def _fail(self, index: int, error: RingError) -> None:
        """A ring cannot be trusted any more: close that channel."""
        log.warning("%s: channel %d closed: %s", self.port.name, index, error)
        self.statistics.violations += 1
        queue = self._queues.get(index)
        if queue is not None:
            queue.channel.close()

    def _close(self) -> None:
        with self._lock:
            self._revoke(True)
            self._revoke(False)
            self._queues.clear()
        if self.port.receiver == self.deliver:
            self.port.receiver = _discard


def _ring(channel: Channel) -> None:
    """Ring the peer, unless the channel closed between two of our steps."""
    with contextlib.suppress(LocalProtocolError):
        channel.signal()


def _discard(frames: list[bytes]) -> None:
    del frames


_RNDIS_PACKET: Final = int(MessageType.SEND_RNDIS_PACKET).to_bytes(4, "little")
_PACKET_MESSAGE: Final = int(RndisType.PACKET).to_bytes(4, "little")
_ATTEMPTS: Final = 4
"""How often a full ring is tried again when the guest made room just then."""
