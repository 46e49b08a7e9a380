"""The network client: a guest's adapter over its VMBus channels, with the interface of a simple NIC.

`NetworkVsc` runs `vmbus.network.vsc_protocol` on channels and moves frames: small ones are gathered in sections
of the send buffer, several RNDIS packets to one VMBus packet; large ones stay in guest pages and are named by
GPA-direct ranges. Received ones are copied out of the receive buffer.

The host may be hostile: what it names is checked against what it was given, copied once, then parsed.
"""

import logging
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Final, TypeVar

from vmbus.bus.channel import TURN, Channel
from vmbus.bus.taking import take_packets
from vmbus.core.memory import GpaRanges
from vmbus.core.netio import DONE, GuestQueue, SendPool
from vmbus.core.ring import COMPLETION, COMPLETION_REQUESTED, IN_BAND, TRANSFER_PAGES, Packet
from vmbus.errors import (
    DeviceError,
    LocalProtocolError,
    RemoteProtocolError,
    RingCorrupt,
    RingError,
    RingFull,
    VmbusError,
)
from vmbus.network import rndis
from vmbus.network.offload import complete, parse
from vmbus.network.oid import HashTypes, Offloads, PacketFilter
from vmbus.network.rndis import Frame, PacketIdFlags, ReceiveChecksum, RndisType, TransmitChecksum
from vmbus.network.rss import DEFAULT_KEY
from vmbus.network.switch import tag_frame
from vmbus.network.vsc_protocol import Buffers, GuestConfig, RndisStep, Script, Step
from vmbus.network.vsc_send import PAGE, Sending, Sent, default_page_count, ring_peer
from vmbus.network.wire import (
    MAX_RSC_RANGES,
    RECEIVE_BUFFER_ID,
    ChannelType,
    MessageType,
    NvspStatus,
    packet_size,
)
from vmbus.trace.guest_log import GuestLog

__all__ = ["NetworkVsc", "default_page_count"]

log = logging.getLogger(__name__)
guest_log = GuestLog(log)

T = TypeVar("T")
BATCH: Final = 64
SLOW_BATCH: Final = 16
"""Packets taken in Python before the compiled path gets its turn again."""
MAX_COMPLETIONS: Final = 8192
"""Completions that wait for ring space; more than a receive buffer can have packets is the host's doing."""
MAX_RECEIVED: Final = 16384
"""Frames that wait for `receive`; more are dropped, as by a driver that the stack does not empty."""
MAX_RSC_SIZE: Final = 65535 + 18

_RNDIS_PACKET: Final = int(MessageType.SEND_RNDIS_PACKET).to_bytes(4, "little")
_RNDIS_COMPLETE: Final = int(MessageType.SEND_RNDIS_PACKET_COMPLETE).to_bytes(4, "little")
_PACKET_MESSAGE: Final = int(RndisType.PACKET).to_bytes(4, "little")


class NetworkVsc(Sending):
    """A guest's network adapter.

    Attributes:
        protocol: the control state; read-only for others.
        dropped_frames: received frames that nobody took in time.
        use_compiled_path: False leaves all to Python, for comparison.
    """

    def __init__(
        self,
        channel: Channel,
        pages: Sequence[int],
        config: GuestConfig | None = None,
        *,
        timeout: float = 5.0,
    ) -> None:
        """Bring the adapter up on an open channel.

        Args:
            channel: the guest's end of the primary channel.
            pages: page numbers of guest memory that belong to this adapter, at least about 120: a few for
                control messages, four times 18 for large frames, up to a quarter for the send buffer, the
                rest for the receive buffer.
            config: what to ask for.
            timeout: seconds to wait for each answer of the host.

        Raises:
            LocalProtocolError: too few pages for the MTU.
            DeviceError: the host refuses or does not answer.
            RemoteProtocolError: the host breaks the protocol.
        """
        super().__init__(channel, pages, config or GuestConfig())
        self.timeout = timeout
        self.dropped_frames = 0
        self._received: deque[bytes] = deque()
        self._completions: dict[int, deque[int]] = {0: deque()}
        self._fragments: list[Frame] = []
        self._arrived: dict[int, list[Packet]] = {0: []}  # taken from the rings, not yet done with
        self._begun: Packet | None = None  # the one of them that is looked at
        self._completing: tuple[int, int, int] | None = (
            None  # the same of a completion: channel and transaction id
        )
        self._control_step: tuple[Step, int] | None = None  # on its way, and the packets in the ring before
        channel.on_signal = lambda: self._signalled(0)
        channel.on_closed = self._closed
        try:
            self._gpadls = [channel.create_gpadl(self._receive.pfns), channel.create_gpadl(self._send.pfns)]
            self._run(
                self.protocol.bring_up(
                    Buffers(
                        self._gpadls[0], self._receive.window.size, self._gpadls[1], self._send.window.size
                    )
                )
            )
            self._prepare()
        except BaseException:
            channel.on_signal = None
            self._release()
            raise

    def _prepare(self) -> None:
        """Make ready to send and receive, now that the host said how."""
        protocol, channel = self.protocol, self._channels[0]
        self._sections = SendPool(self._send.window, *protocol.send_section)
        self._plain = GuestQueue(
            channel.incoming,
            channel.outgoing,
            self._sections,
            self._receive.window,
            *protocol.receive_section,
            RECEIVE_BUFFER_ID,
            packet_size(protocol.version),
            protocol.packets_per_message,
            protocol.alignment,
        )

    def __repr__(self) -> str:
        state = f"MTU {self.mtu}, link {'up' if self.link_up else 'down'}"
        return f"<NetworkVsc {self.mac.hex(':')}: {state}>"

    # ---- the interface of a NIC

    @property
    def mac(self) -> bytes:
        """The permanent address, 6 bytes."""
        return self.protocol.mac

    @property
    def mtu(self) -> int:
        """Largest IP packet in bytes."""
        return self.protocol.mtu

    @property
    def link_up(self) -> bool:
        """Whether the cable is connected, as last heard."""
        return self.protocol.link_up

    @property
    def sent_frames(self) -> int:
        """Frames that the host completed with success."""
        return self._sent_frames + (self._plain.sent_frames if self._plain else 0)

    @property
    def sent_bytes(self) -> int:
        """Bytes of those frames."""
        return self._sent_bytes + (self._plain.sent_bytes if self._plain else 0)

    @property
    def failed_frames(self) -> int:
        """Frames that the host completed with an error."""
        return self._failed_frames + (self._plain.failed_frames if self._plain else 0)

    @property
    def is_open(self) -> bool:
        """Whether the adapter still works."""
        return 0 in self._channels

    def send(self, frame: bytes | Frame) -> bool:
        """Send a frame; False if there is no room now. See `send_batch`."""
        return self.send_batch([frame]) == 1

    def send_batch(self, frames: Sequence[bytes | Frame]) -> int:
        """Send frames, with one doorbell for all; how many of them, from the first on, found room.

        A `bytes` frame is complete; an 802.1Q tag in it goes beside it, as in Linux's driver. A `Frame` brings
        per-packet information of its own, for checksums and large sends that the host is to do.

        Raises:
            LocalProtocolError: the adapter is closed, or a frame is longer than can be sent.
        """
        with self._lock:
            self._check()
            try:
                if self._interrupted:
                    self._recover()
                if len(self._channels) == 1 and self._plain is not None and self.use_compiled_path:
                    return self._send_plain(self._plain, frames)
                done = 0
                for index, batch in self._spread(frames):
                    count = self._send_on(index, batch)
                    done += count
                    if count < len(batch):
                        break
                return done
            except VmbusError:
                raise
            except BaseException:
                self._interrupted = True
                raise

    def receive(self, limit: int = 64) -> list[bytes]:
        """Up to `limit` frames that have come in, oldest first; a VLAN tag is in the frame again."""
        if len(self._received) < limit:
            for index in list(self._channels):
                self._drain(index)
        with self._lock:
            waiting = self._received
            if limit >= len(waiting):
                frames = list(waiting)
                waiting.clear()
                return frames
            return [waiting.popleft() for _ in range(limit)]

    def query(self, oid: int, data: bytes = b"") -> bytes:
        """The answer to an OID query; raises DeviceError if the host does not answer with success."""
        return self._run(self.protocol.query(oid, data))

    def set(self, oid: int, data: bytes) -> None:
        """Set an OID; raises DeviceError if the host does not answer with success."""
        self._run(self.protocol.set(oid, data))

    def set_filter(self, wanted: PacketFilter) -> None:
        """Choose which frames to receive."""
        self._run(self.protocol.set_filter(wanted))

    def set_offloads(self, wanted: Offloads) -> None:
        """Ask for these offloads and no others."""
        self._run(self.protocol.set_offloads(wanted))

    def set_rss(self, table: Sequence[int], key: bytes = DEFAULT_KEY, types: HashTypes | None = None) -> None:
        """Set the indirection table, the key and what is hashed (TCP and IP of both versions by default)."""
        self._run(self.protocol.set_rss(table, key, self._hash.hash_types if types is None else types))

    def keepalive(self) -> None:
        """Ask whether the host is there."""
        self._run(self.protocol.keepalive())

    def reset(self) -> None:
        """Reset RNDIS and set the packet filter again."""
        if self._run(self.protocol.reset()):
            self.set_filter(PacketFilter.DIRECTED | PacketFilter.ALL_MULTICAST | PacketFilter.BROADCAST)

    def switch_data_path(self, to_vf: bool) -> None:
        """Use the virtual function, or this adapter again."""
        self._run(self.protocol.switch_data_path(to_vf))

    def request_subchannels(self, count: int) -> int:
        """Ask for `count` sub-channels in all; how many more the host will offer for it.

        Open each and hand it to `add_subchannel`.
        """
        return self._run(self.protocol.open_subchannels(count))

    def add_subchannel(self, index: int, channel: Channel) -> None:
        """Use a sub-channel that was offered and is open now."""
        with self._lock:
            if not 0 < index <= self.protocol.subchannels or index in self._channels:
                raise LocalProtocolError(f"sub-channel {index} of {self.protocol.subchannels}")
            self._channels[index] = channel
            self._completions[index] = deque()
            self._arrived[index] = []
            channel.on_signal = lambda: self._signalled(index)
            channel.on_closed = lambda: self._channel_closed(index)
        self._signalled(index)

    def close(self) -> None:
        """Halt the adapter, take its buffers back and close its channels; a second call does nothing."""
        with self._lock:
            channel = self._channels.get(0)
            if channel is None:
                return
            try:
                for step in self.protocol.shut_down(send_buffer=bool(self.protocol.send_section[1])):
                    self._send_step(0, step)
            except RingError:
                log.debug("no room to say good-bye")
        for index in sorted(self._channels, reverse=True):
            other = self._channels.get(index)
            if other is not None and other.is_open:
                if index == 0:
                    for gpadl_id in self._gpadls:
                        other.teardown_gpadl(gpadl_id)
                other.close()
        self._closed()

    def __enter__(self) -> "NetworkVsc":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- control

    def _check(self) -> None:
        if self._failure is not None:
            raise LocalProtocolError(f"the adapter failed: {self._failure}") from self._failure
        if 0 not in self._channels:
            raise LocalProtocolError("the adapter is closed")

    def _run(self, script: Script[T]) -> T:
        """Run a script to its end."""
        with self._lock:
            self._check()
            task = self.protocol.run(script)
        try:
            deadline = time.monotonic() + self.timeout
            while not self._drain(0) and not task.done and time.monotonic() < deadline:
                continue  # a host that never stops sending must answer in time all the same
            channel = self._channels.get(0)
            if not task.done and channel is not None:
                left = max(0.0, deadline - time.monotonic())
                channel.wait(lambda: task.done or self._failure is not None, left)
            if task.done:
                return task.result
            self._check()
        finally:
            if not task.done:
                with self._lock:
                    self.protocol.abandon(task)
        raise DeviceError(f"the host did not answer within {self.timeout} s")

    def _flush_control(self) -> bool:
        """Send the steps that wait, as far as there are ring space and control pages."""
        needed = False
        outgoing = self._channels[0].outgoing
        if self._control_step is not None:  # the last call was interrupted
            step, before = self._control_step
            if self.protocol.outbox and self.protocol.outbox[0][1] is step and outgoing.packets != before:
                del self.protocol.outbox[0]
            self._control_step = None
        while self.protocol.outbox:
            key, step = self.protocol.outbox[0]
            if isinstance(step, RndisStep) and not self._free_control:
                break
            self._control_step = step, outgoing.packets
            if isinstance(step, RndisStep):
                needed |= self._send_rndis_step(step)
            elif step.wants_answer:
                send = partial(outgoing.send, step.payload, type=IN_BAND, flags=COMPLETION_REQUESTED)
                needed |= self._send_held(0, Sent(task=key), send)
            else:
                self._next_id += 1
                needed |= self._put(0, step.payload, self._next_id, IN_BAND, 0)
            del self.protocol.outbox[0]
            self._control_step = None
        return needed

    def _send_rndis_step(self, step: RndisStep) -> bool:
        length = len(step.message)
        if length > PAGE:
            raise LocalProtocolError(f"RNDIS control message of {length} bytes")
        sent = Sent()

        def send(transaction_id: int) -> bool:
            sent.control = self._free_control[0]
            self._free_control.popleft()
            at = sent.control * PAGE
            self._control.view[at : at + length] = step.message
            ranges = GpaRanges([(length, 0, [self._control.pfns[sent.control]])])
            payload = self.protocol.rndis_packet(ChannelType.CONTROL)
            return self._channels[0].outgoing.send_gpa_direct(payload, ranges, transaction_id)

        return self._send_held(0, sent, send)

    def _send_step(self, key: int, step: Step) -> None:
        self.protocol.outbox.append((key, step))
        if self._flush_control():
            ring_peer(self._channels[0])

    # ---- from the host

    def _signalled(self, index: int) -> None:
        """The host rang."""
        if not self._drain(index) and (channel := self._channels.get(index)) is not None:
            channel.again()

    def _drain(self, index: int) -> bool:
        """Read a channel's ring until it is empty, or for a turn: False if there is more."""
        try:
            return self._read(index)
        except VmbusError:
            raise
        except BaseException:
            self._interrupted = True
            raise

    def _read(self, index: int) -> bool:
        turn = TURN
        while (channel := self._channels.get(index)) is not None:
            needed = False
            try:
                with self._lock:
                    if not channel.is_open:
                        return True
                    if self._interrupted:
                        self._recover()
                    channel.incoming.mask()
                    taken, ring = self._take_packets(index, channel)
                    channel.account.packets_received += taken
                    needed |= ring
                    needed |= channel.incoming.take_signal()
                    try:
                        needed |= self._flush_completions(index)
                        needed |= self._flush_control() if index == 0 else False
                        channel.outgoing.stop_waiting()
                    except RingFull:
                        channel.outgoing.want_space(64)
                    more = taken > 0 or channel.incoming.unmask()
            except RingError as error:
                self._failure = error
                guest_log.warning("the host", "network adapter closed: %s", error)
                channel.close()
                return True
            if needed:
                ring_peer(channel)
            if not more:
                return True
            turn -= 1
            if turn <= 0:
                return False
        return True

    def _take_packets(self, index: int, channel: Channel) -> tuple[int, bool]:
        """Take packets from a ring: how many, and whether to ring the host."""
        taken, ring, plain = 0, False, self._plain
        if index == 0 and plain is not None and self.use_compiled_path:
            frames: list[bytes] = []
            packets, copied = channel.outgoing.packets, plain.bytes_copied
            taken, reason, ring = plain.drain(frames, BATCH)
            channel.account.packets_sent += channel.outgoing.packets - packets
            channel.account.bytes_copied += plain.bytes_copied - copied
            room = max(0, MAX_RECEIVED - len(self._received))
            if len(frames) > room:
                self.dropped_frames += len(frames) - room
                del frames[room:]
            self._received.extend(frames)
            if reason == DONE:
                return taken, ring
            # Also when there is no room for completions: what is taken here waits for it.
        arrived = self._arrived[index]
        received = take_packets(
            channel.incoming.recv_packets, BATCH if plain is None else SLOW_BATCH, arrived
        )
        if len(self._completions[index]) > MAX_COMPLETIONS:
            raise RingCorrupt("the host sends packets but takes no completions")
        while arrived:
            self._receive_packet(index, arrived[0])
            del arrived[0]
        return taken + received, ring

    def _receive_packet(self, index: int, packet: Packet) -> None:
        again, self._begun = packet is self._begun, packet
        try:
            if packet.type == COMPLETION:
                self._completed(index, packet)
            elif again:  # an exception came in the middle of it; the host gets its completion all the same
                owed = packet.type == TRANSFER_PAGES or packet.flags & COMPLETION_REQUESTED
                if owed and packet.transaction_id not in self._completions[index]:
                    self._completions[index].append(packet.transaction_id)
            elif packet.type == TRANSFER_PAGES:
                self._completions[index].append(packet.transaction_id)
                self._receive_ranges(packet)
            elif packet.type == IN_BAND:
                self.protocol.receive_nvsp(packet.payload)
                if packet.flags & COMPLETION_REQUESTED:
                    self._completions[index].append(packet.transaction_id)
            else:
                raise RemoteProtocolError(f"packet of type {packet.type} from a host")
        except RemoteProtocolError as error:
            self.protocol.violations += 1
            log.debug("network adapter: %s", error)

    def _completed(self, index: int, packet: Packet) -> None:
        sent = self._sent.get((index, packet.transaction_id))
        if sent is None:
            # One of the compiled path's that stood behind something else.
            plain = self._plain if index == 0 else None
            if plain is not None and plain.complete(packet.transaction_id, packet.payload):
                return
            raise RemoteProtocolError(f"completion of unknown transaction {packet.transaction_id}")
        # Whatever the host says: what the packet held is ours again.
        self._let_go(sent)
        del self._sent[index, packet.transaction_id]
        if sent.task:
            self.protocol.receive_completion(sent.task, packet.payload)
            return
        if packet.payload[:4] != _RNDIS_COMPLETE or len(packet.payload) < 8:
            self._failed_frames += sent.frames
            raise RemoteProtocolError("completion of an RNDIS packet without status")
        if int.from_bytes(packet.payload[4:8], "little") == NvspStatus.SUCCESS:
            self._sent_frames += sent.frames
            self._sent_bytes += sent.size
        else:
            self._failed_frames += sent.frames

    def _receive_ranges(self, packet: Packet) -> None:
        """The ranges of a transfer-page packet: each holds one RNDIS message."""
        if packet.payload[:4] != _RNDIS_PACKET:
            raise RemoteProtocolError("transfer pages without an RNDIS packet")
        if packet.transfer_set_id != RECEIVE_BUFFER_ID:
            raise RemoteProtocolError(f"transfer-page set {packet.transfer_set_id:#x}")
        if len(packet.transfer_ranges) > MAX_RSC_RANGES:
            raise RemoteProtocolError(f"{len(packet.transfer_ranges)} transfer-page ranges")
        size, count = self.protocol.receive_section
        self._fragments.clear()
        bad: RemoteProtocolError | None = None
        for length, offset in packet.transfer_ranges:
            if length > size or offset + length > size * count:
                bad = RemoteProtocolError(f"transfer-page range of {length} bytes at {offset}")
                continue
            message = bytes(self._receive.view[offset : offset + length])
            try:
                if message[:4] == _PACKET_MESSAGE:
                    self._take(rndis.unpack_first_packet(message))
                else:
                    self.protocol.receive_rndis(message)
            except RemoteProtocolError as error:
                self._fragments.clear()
                bad = error
        if self._fragments:
            self._fragments.clear()
            bad = RemoteProtocolError("a coalesced packet without its end")
        self._channels[0].account.bytes_copied += sum(length for length, _ in packet.transfer_ranges)
        if bad is not None:
            raise bad

    def _take(self, frame: Frame) -> None:
        """A received frame, or a fragment of a coalesced one."""
        flags = 0 if frame.packet_id is None else frame.packet_id >> 8 & 0xFF
        if flags & PacketIdFlags.SUB_ALLOCATION:
            if flags & PacketIdFlags.FIRST:
                self._fragments.clear()
            elif not self._fragments:
                raise RemoteProtocolError("a fragment without its first")
            self._fragments.append(frame)
            if sum(len(part.data) for part in self._fragments) > MAX_RSC_SIZE:
                raise RemoteProtocolError("a coalesced packet longer than IP allows")
            if not flags & PacketIdFlags.LAST:
                return
            first = self._fragments[0]
            first.data = b"".join(part.data for part in self._fragments)
            frame = first
        self._fragments.clear()
        data = frame.data
        if frame.checksum is not None and frame.checksum & ReceiveChecksum.TCP_VALUE_INVALID:
            data = _checksum_again(data)
        if frame.vlan is not None:
            data = tag_frame(data, rndis.unpack_vlan(frame.vlan))
        if len(self._received) < MAX_RECEIVED:
            self._received.append(data)
        else:
            self.dropped_frames += 1

    def _flush_completions(self, index: int) -> bool:
        waiting, needed = self._completions[index], False
        payload = self.protocol.receive_completion_payload
        outgoing = self._channels[index].outgoing
        if self._completing is not None:  # the last call was interrupted: was that one sent?
            channel, transaction_id, before = self._completing
            if channel == index and waiting and waiting[0] == transaction_id and outgoing.packets != before:
                waiting.popleft()
            self._completing = None
        while waiting:
            self._completing = index, waiting[0], outgoing.packets
            needed |= self._put(index, payload, waiting[0], COMPLETION, 0)
            waiting.popleft()
            self._completing = None
        return needed

    # ---- the end

    def _channel_closed(self, index: int) -> None:
        with self._lock:
            self._channels.pop(index, None)
            self._completions.pop(index, None)
            self._arrived.pop(index, None)
            for key in [key for key in self._sent if key[0] == index]:
                self._let_go(self._sent.pop(key))

    def _closed(self) -> None:
        with self._lock:
            if 0 not in self._channels:
                return
            if self._failure is None:
                self._failure = LocalProtocolError("the channel is closed")
            self._release()

    def _release(self) -> None:
        self._channels.pop(0, None)
        self.protocol.link_up = False
        if self._plain is not None:
            self._sent_frames, self._sent_bytes = self.sent_frames, self.sent_bytes
            self._failed_frames = self.failed_frames
            self._plain.close()
            self._plain = None
        if self._sections is not None:
            self._sections.close()
            self._sections = None
        for area in (self._control, self._large, self._send, self._receive):
            area.close()


def _checksum_again(data: bytes) -> bytes:
    """A coalesced packet with a TCP checksum of its own."""
    layers = parse(data)
    if layers is None:
        raise RemoteProtocolError("a coalesced packet that is no IP packet")
    version4 = layers.version == 4
    return complete(data, TransmitChecksum(ipv4=version4, ipv6=not version4, tcp=True))
