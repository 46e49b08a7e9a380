"""The way of frames to the guest: from the switch's port into sections of the guest's receive buffer.

`Delivery` holds the channels of an adapter and what waits for each: completions, control messages, frames. It is
the half of `vmbus.network.vsp.NetworkVsp` that writes to the guest.

All channels share the sections of one receive buffer. Frames wait as frames: their messages are made when there are
sections and ring space for them, with the settings of that moment, so that what a guest has switched off (a packet
filter, coalescing) has ended when it hears that it has.
"""

import contextlib
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Final, TypeAlias

from vmbus.bus.channel import Channel
from vmbus.core.netio import HostQueue, ReceivePool
from vmbus.core.ring import COMPLETION
from vmbus.errors import LocalProtocolError, RingError, RingFull
from vmbus.network import rndis
from vmbus.network.offload import check, coalesce
from vmbus.network.rndis import Frame, PacketIdFlags
from vmbus.network.switch import Port, strip_tag
from vmbus.network.vsp_protocol import CONTROL_SECTIONS, SWITCH_DATA_PATH_ID, VF_ASSOCIATION_ID, HostProtocol
from vmbus.network.wire import MAX_RSC_RANGES, ChannelType

__all__ = ["BATCH", "MAX_BACKLOG", "Delivery", "Queue", "ring_peer"]

BATCH: Final = 64
"""Ring packets taken at once, and frames announced in one transfer-page packet."""
MAX_BACKLOG: Final = 2048
"""Frames that wait for receive sections or ring space, per channel."""
Hashed: TypeAlias = tuple[int, int]
"""The RSS hash of a frame, and which hash it is."""
Waiting: TypeAlias = tuple[bytes, Hashed | None]
"""A frame for the guest, with its hash."""
_FRAGMENT: Final = int(PacketIdFlags.SUB_ALLOCATION)
_FIRST: Final = int(PacketIdFlags.FIRST)
_LAST: Final = int(PacketIdFlags.LAST)
_ATTEMPTS: Final = 4
"""How often a full ring is tried again when the guest made room just then."""


@dataclass(slots=True)
class Queue:
    """One open channel and what waits for it.

    Attributes:
        completions: (transaction id, payload, packet type, flags) of completions and of messages of our own.
        backlog: frames for the guest.
        plain: the compiled path, once there is a receive buffer.
        wanted: payload size of the packet that did not fit into the ring.
        blocked: the guest's ring is not read until there is room for completions; the guest rings then.
    """

    channel: Channel
    index: int
    completions: deque[tuple[int, bytes, int, int]] = field(default_factory=deque)
    backlog: deque[Waiting] = field(default_factory=deque)
    plain: HostQueue | None = None
    wanted: int = 0
    blocked: bool = False

    def complete(self, transaction_id: int, payload: bytes) -> None:
        """Let a packet of the guest be completed."""
        self.completions.append((transaction_id, payload, COMPLETION, 0))


class Delivery(ABC):
    """What an adapter sends its guest.

    Attributes:
        protocol: the control state; read-only for others.
        statistics: what passed.
        port: the port of the switch.
        use_compiled_path: False leaves all to Python, for comparison.
    """

    def __init__(self, channel: Channel, port: Port, protocol: HostProtocol) -> None:
        self.statistics = protocol.adapter.statistics
        self.protocol = protocol
        self.port = port
        self.use_compiled_path = True
        self._queues: dict[int, Queue] = {0: Queue(channel, 0)}
        self._receive: ReceivePool | None = None
        self._revoked: set[int] = set()  # packets still out when the guest took its buffer back
        self._turn = 0  # the channel that gets sections first next time
        self._set_id = 0
        self._control: deque[bytes] = deque()
        self._next_packet_id = 0
        self._unanswered = 0
        self._deferred: list[Callable[[], None]] = []
        self._lock = threading.RLock()

    @abstractmethod
    def _fail(self, index: int, error: RingError) -> None:
        """A channel's ring cannot be trusted any more."""

    def _run_deferred(self) -> None:
        """Call others, now that the lock is free: they have locks of their own."""
        with self._lock:
            calls, self._deferred = self._deferred, []
        for call in calls:
            call()

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
            ring_peer(channel)

    def _can_deliver_plain(self) -> bool:
        oids, queue = self.protocol.oids, self._queues.get(0)
        wanted = oids.offloads.receive
        return (
            self.use_compiled_path
            and queue is not None
            and queue.plain is not None
            and oids.rss is None
            and len(oids.adapter.addresses) == 1
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
        mac = int.from_bytes(oids.adapter.mac, "big")
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

    def _spread(self, frames: list[bytes]) -> dict[int, list[Waiting]]:
        """Frames that pass the filter, by queue, with their hashes."""
        result: dict[int, list[Waiting]] = {}
        oids, limit = self.protocol.oids, self.protocol.frame_size
        for frame in frames:
            if not oids.accepts(frame[:6]) or len(frame) > limit + 4 * (frame[12:14] == b"\x81\x00"):
                self.statistics.received_filtered += 1
                continue
            hashed = None if oids.rss is None else oids.rss.hash_and_type(frame)
            index = 0 if oids.rss is None else oids.rss.queue(None if hashed is None else hashed[0])
            result.setdefault(index, []).append((frame, hashed))
        return result

    def _enqueue(self, queue: Queue, batch: Sequence[Waiting]) -> None:
        """Let frames wait for sections; those that overflow the backlog are dropped."""
        taken = batch[: MAX_BACKLOG - len(queue.backlog)]
        for frame, _ in taken:
            self.statistics.count_received(frame)
        queue.backlog.extend(taken)
        if len(taken) < len(batch):
            self.statistics.received_no_buffer += len(batch) - len(taken)
            queue.channel.account.dropped["guest has no buffer"] += len(batch) - len(taken)

    @property
    def room(self) -> int:
        """How many frames surely find room: what comes in more is dropped while the guest completes none.

        Any number for a guest that takes none: they are filtered, as by every adapter whose driver is not there.
        """
        if not self.protocol.can_receive:
            return MAX_BACKLOG
        return MAX_BACKLOG - max((len(queue.backlog) for queue in list(self._queues.values())), default=0)

    def _refilter(self) -> None:
        """The guest wants other frames from now on: those that wait and that it does not want any more go."""
        accepts = self.protocol.oids.accepts
        for queue in self._queues.values():
            if not queue.backlog:
                continue
            kept = [item for item in queue.backlog if accepts(item[0][:6])]
            self.statistics.received_filtered += len(queue.backlog) - len(kept)
            queue.backlog = deque(kept)

    def _give_up(self, queue: Queue, reason: str) -> None:
        """What waits for this channel will not be sent."""
        if queue.backlog:
            queue.channel.account.dropped[reason] += len(queue.backlog)
            queue.backlog.clear()

    def _groups(self, queue: Queue, frames: list[bytes]) -> list[list[bytes]]:
        """Frames as packets, each a list of fragments: one a frame, as every frame fits a section."""
        ipv4, ipv6 = self.protocol.rsc
        if not (ipv4 or ipv6):
            return [[frame] for frame in frames]
        assert self._receive is not None
        # Half of the buffer at most, so that there is room for the next packet while the guest reads this one.
        usable = self._receive.count - CONTROL_SECTIONS
        most = max(1, min(usable // 2, MAX_RSC_RANGES, queue.channel.outgoing.capacity // 8 - 16))
        return coalesce(frames, ipv4=ipv4, ipv6=ipv6, most=most)

    def _messages(self, group: list[bytes], original: bytes, hashed: Hashed | None) -> list[bytes]:
        """The RNDIS messages of one packet, one a fragment; `original` is its first frame as it came."""
        plain, tci = strip_tag(group[0])
        vlan = None if tci is None else rndis.pack_vlan(tci)
        checksum = self._checksum_of(original, len(group) > 1)
        value, kind = (None, None) if hashed is None else hashed
        if len(group) == 1:
            return [rndis.pack_packet(Frame(plain, checksum, None, vlan, value, hash_info=kind))]
        self._next_packet_id = self._next_packet_id + 1 & 0xFFFF
        messages = []
        for number, part in enumerate(group):
            flags = _FRAGMENT
            if number == 0:
                flags |= _FIRST
            if number == len(group) - 1:
                flags |= _LAST
            identity = 1 | flags << 8 | self._next_packet_id << 16
            data = plain if number == 0 else part
            messages.append(rndis.pack_packet(Frame(data, checksum, None, vlan, value, identity, kind)))
        return messages

    def _checksum_of(self, frame: bytes, coalesced: bool) -> int | None:
        """What the guest is told of the checksums, as far as it asked for it."""
        wanted = self.protocol.oids.offloads.receive
        if not (wanted.tcp4 or wanted.tcp6 or wanted.udp4 or wanted.udp6 or wanted.ipv4_header or coalesced):
            return None
        return check(frame) or None

    def _flush(self, queue: Queue) -> bool:
        """Send what waits for `queue`: completions, control messages, frames. Whether to ring the guest."""
        outgoing = queue.channel.outgoing
        needed = False
        for _ in range(_ATTEMPTS):
            try:
                needed |= self._flush_completions(queue)
                needed |= self._flush_sections(queue)
                if not queue.blocked:
                    outgoing.stop_waiting()
                break
            except RingFull:
                # The guest is to ring when there is room; if there is by now, try again instead.
                if not outgoing.want_space(queue.wanted):
                    break
        if not needed:
            queue.channel.account.doorbells_suppressed += 1
        return needed

    def _flush_completions(self, queue: Queue) -> bool:
        outgoing, needed = queue.channel.outgoing, False
        while queue.completions:
            transaction_id, payload, kind, flags = queue.completions[0]
            queue.wanted = len(payload)
            needed |= outgoing.send(payload, transaction_id, kind, flags)
            queue.completions.popleft()
            queue.channel.account.packets_sent += 1
        return needed

    def _flush_sections(self, queue: Queue) -> bool:
        needed = False
        while self._receive is not None and self._control and queue is self._queues.get(0):
            if not self._receive.available:
                return needed
            needed |= self._send_sections(queue, [self._control[0]], ChannelType.CONTROL)
            self._control.popleft()
        while (
            self._receive is not None
            and queue.backlog
            and (room := self._receive.available - CONTROL_SECTIONS) > 0
        ):
            needed |= self._flush_frames(queue, list(islice(queue.backlog, min(room, MAX_RSC_RANGES))))
        return needed

    def _flush_frames(self, queue: Queue, waiting: list[Waiting]) -> bool:
        """Send the frames at the head of the backlog, for which there are sections."""
        needed, position = False, 0
        for packets in _batches(self._groups(queue, [frame for frame, _ in waiting])):
            messages: list[bytes] = []
            for group in packets:
                messages += self._messages(group, *waiting[position + len(messages)])
            needed |= self._send_sections(queue, messages, ChannelType.DATA)
            position += len(messages)
            for _ in messages:
                queue.backlog.popleft()
        return needed

    def _flush_all(self, queue: Queue, signals: list[Channel]) -> bool:
        """Send what waits for `queue`, and what waits on other channels for sections that it may have given back.

        The channels take turns in being the first, so that none of them gets all the sections for ever.

        Returns:
            whether to ring the guest on `queue`; the others that need it are added to `signals`.
        """
        waiting = [
            q
            for q in self._queues.values()
            if q is not queue and (q.backlog or (self._control and q.index == 0))
        ]
        if not waiting or self._receive is None:
            return self._flush(queue)
        self._turn += 1
        turns, needed = sorted([queue, *waiting], key=lambda q: q.index), False
        first = self._turn % len(turns)
        for other in turns[first:] + turns[:first]:
            if other is queue:
                needed = self._flush(queue)
                continue
            try:
                if self._flush(other):
                    signals.append(other.channel)
            except RingError as error:
                self._deferred.append(partial(self._fail, other.index, error))
        return needed

    def _send_sections(self, queue: Queue, messages: list[bytes], kind: int) -> bool:
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

    def _release(self, queue: Queue, transaction_id: int) -> None:
        """The guest completed one of our packets; of others it is told nothing, they are counted."""
        if transaction_id in (VF_ASSOCIATION_ID, SWITCH_DATA_PATH_ID) and self._unanswered:
            self._unanswered -= 1
        elif self._receive is None and transaction_id in self._revoked:
            # Drivers take their buffer back first and end what they do with its frames then (Linux).
            self._revoked.remove(transaction_id)
        elif self._receive is None or not self._receive.release(transaction_id, queue.index):
            self.statistics.violations += 1


def _batches(packets: list[list[bytes]]) -> Iterator[list[list[bytes]]]:
    """Packets that are announced together: up to `BATCH` sections, or one that has more."""
    batch: list[list[bytes]] = []
    size = 0
    for packet in packets:
        if batch and size + len(packet) > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(packet)
        size += len(packet)
    if batch:
        yield batch


def ring_peer(channel: Channel) -> None:
    """Ring the peer, unless the channel closed between two of our steps."""
    with contextlib.suppress(LocalProtocolError):
        channel.signal()
