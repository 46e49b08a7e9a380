"""The way of frames from the guest: into sections of the send buffer, or named where they are.

`Sending` owns the guest pages of an adapter and what its packets hold until the host completes them. It is the
half of `vmbus.network.vsc.NetworkVsc` that writes to the host.

An exception from outside (Ctrl-C, a timeout of the caller's) may come between any two steps. What a packet holds is
therefore written down before the packet is sent: used again while the host still reads it, it would carry other data.
"""

import contextlib
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from vmbus.bus.channel import Channel
from vmbus.core.memory import GpaRanges, Window
from vmbus.core.netio import SLOW, GuestQueue, SendPool
from vmbus.core.ring import COMPLETION_REQUESTED, IN_BAND
from vmbus.errors import LocalProtocolError, RingFull
from vmbus.network import rndis
from vmbus.network.oid import HashTypes
from vmbus.network.rndis import Frame
from vmbus.network.rss import DEFAULT_KEY, RssState, Toeplitz
from vmbus.network.switch import strip_tag
from vmbus.network.vsc_protocol import GuestConfig, GuestProtocol
from vmbus.network.wire import SEND_SECTION_SIZE, ChannelType, receive_section_size

__all__ = ["Area", "Sending", "Sent", "as_frame", "default_page_count", "ring_peer"]

PAGE: Final = 4096
CONTROL_PAGES: Final = 4
LARGE_PAGES: Final = 18
"""Pages of one large frame: 64 KiB, and its headers."""
LARGE_BUFFERS: Final = 4
MIN_SEND_PAGES: Final = 3


@dataclass(slots=True)
class Sent:
    """What a packet of ours holds until the host completes it."""

    task: int = 0
    section: int = -1
    control: int = -1
    large: int = -1
    frames: int = 0
    size: int = 0


@dataclass(slots=True)
class Area:
    """Guest pages that this driver owns, mapped in a row."""

    pfns: tuple[int, ...]
    window: Window
    view: memoryview

    def close(self) -> None:
        """Unmap them; they may be used for something else."""
        self.view.release()
        self.window.close()


class Sending(ABC):
    """What an adapter's driver sends.

    Attributes:
        protocol: the control state; read-only for others.
        use_compiled_path: False leaves all to Python, for comparison.
    """

    def __init__(self, channel: Channel, pages: Sequence[int], config: GuestConfig) -> None:
        """`pages` belong to this adapter; see `vmbus.network.vsc.NetworkVsc`."""
        self.protocol = GuestProtocol(config)
        self.use_compiled_path = True
        self._sent_frames = 0
        self._sent_bytes = 0
        self._failed_frames = 0
        self._plain: GuestQueue | None = None
        self._sections: SendPool | None = None
        self._channels: dict[int, Channel] = {0: channel}
        self._sent: dict[tuple[int, int], Sent] = {}
        self._next_id = 0
        self._hash = RssState(
            HashTypes.IPV4 | HashTypes.IPV6 | HashTypes.TCP_IPV4 | HashTypes.TCP_IPV6,
            (0,),
            Toeplitz(DEFAULT_KEY),
        )
        self._lock = threading.RLock()
        self._failure: Exception | None = None
        self._interrupted = False
        self._lay_out(list(pages))

    @abstractmethod
    def _drain(self, index: int) -> bool:
        """Read a channel's ring until it is empty, or for a turn: False if there is more."""

    def _lay_out(self, pages: list[int]) -> None:
        fixed = CONTROL_PAGES + LARGE_BUFFERS * LARGE_PAGES
        section = receive_section_size(self.protocol.config.mtu + 14)
        least = fixed + MIN_SEND_PAGES + -(-18 * section // PAGE)
        if len(pages) < least:
            raise LocalProtocolError(f"a network client needs {least} pages for this MTU, not {len(pages)}")
        rest = len(pages) - fixed
        send = min(256, max(MIN_SEND_PAGES, min(rest // 4, rest - -(-18 * section // PAGE))))
        self._control = self._area(pages[:CONTROL_PAGES])
        self._large = self._area(pages[CONTROL_PAGES:fixed])
        self._send = self._area(pages[fixed : fixed + send])
        self._receive = self._area(pages[fixed + send :])
        self._free_control = deque(range(CONTROL_PAGES))
        self._free_large = deque(range(LARGE_BUFFERS))

    def _area(self, pfns: Sequence[int]) -> Area:
        window = self._channels[0].memory.window(pfns, mirrored=False)
        return Area(tuple(pfns), window, window.view())

    def _put(self, index: int, payload: bytes, transaction_id: int, kind: int, flags: int) -> bool:
        channel = self._channels[index]
        needed = channel.outgoing.send(payload, transaction_id, kind, flags)
        channel.account.packets_sent += 1
        return needed

    def _send_held(self, index: int, sent: Sent, send: Callable[[int], bool]) -> bool:
        """Send a packet that holds something; `send` takes its transaction id. Returns whether the host must be rung.

        Raises:
            RingFull: it does not fit; what it holds is free again.
        """
        self._next_id = self._next_id + 1 & 0xFFFFFFFF or 1
        key = index, self._next_id
        outgoing = self._channels[index].outgoing
        before = outgoing.packets
        try:
            self._sent[key] = sent
            needed = send(self._next_id)
        except BaseException:
            if outgoing.packets == before:  # else it is in the ring, and its completion frees what it holds
                self._let_go(sent)
                self._sent.pop(key, None)
            raise
        self._channels[index].account.packets_sent += 1
        return needed

    def _let_go(self, sent: Sent) -> None:
        """What a packet held is free; saying so twice is harmless."""
        if sent.section >= 0 and self._sections is not None:
            self._sections.give(sent.section)
        if sent.control >= 0 and sent.control not in self._free_control:
            self._free_control.append(sent.control)
        if sent.large >= 0 and sent.large not in self._free_large:
            self._free_large.append(sent.large)

    def _recover(self) -> None:
        """After an interruption: a ring may not have been rung, or be masked."""
        for channel in list(self._channels.values()):
            if channel.is_open:
                channel.incoming.unmask()
                ring_peer(channel)
        self._interrupted = False

    def _spread(self, frames: Sequence[bytes | Frame]) -> list[tuple[int, list[Frame]]]:
        """Runs of consecutive frames for the same channel, chosen by the host's table."""
        runs: list[tuple[int, list[Frame]]] = []
        table = self.protocol.send_table
        for item in frames:
            frame = as_frame(item)
            value = self._hash.hash(frame.data)
            index = 0 if value is None else table[value % len(table)]
            if index not in self._channels:
                index = 0
            if runs and runs[-1][0] == index:
                runs[-1][1].append(frame)
            else:
                runs.append((index, [frame]))
        return runs

    def _send_plain(self, plain: GuestQueue, frames: Sequence[bytes | Frame]) -> int:
        """Send by the compiled path as far as it can, other frames one by one; how many found room."""
        channel, at, retried = self._channels[0], 0, False
        account = channel.account
        items = frames if type(frames) is list else list(frames)
        while at < len(items):
            before, copied, packets = at, plain.bytes_copied, channel.outgoing.packets
            at, reason, ring = plain.send(items, at)
            account.packets_sent += channel.outgoing.packets - packets
            account.bytes_copied += plain.bytes_copied - copied
            if ring:
                ring_peer(channel)
            elif at > before:
                account.doorbells_suppressed += 1
            if reason == SLOW:
                if not self._send_on(0, [as_frame(items[at])]):
                    break
                at += 1
            elif at < len(items):
                # No room: let the host catch up, take its completions, and try again while that helps.
                if at == before and retried:
                    break
                retried = at == before
                self._drain(0)
                if 0 not in self._channels:
                    break
        return at

    def _send_on(self, index: int, frames: Sequence[Frame]) -> int:
        channel = self._channels[index]
        done = 0
        needed = False
        retried = False
        while done < len(frames):
            try:
                count, signal = self._send_some(index, frames, done)
            except RingFull:
                count, signal = 0, False
            needed |= signal
            done += count
            if count == 0:
                # No room: let the host catch up once, take its completions, and try again.
                if needed:
                    ring_peer(channel)
                    needed = False
                elif retried:
                    break
                retried = True
                self._drain(index)
                if index not in self._channels:
                    return done
            else:
                retried = False
        if needed:
            ring_peer(channel)
        elif done:
            channel.account.doorbells_suppressed += 1
        return done

    def _send_some(self, index: int, frames: Sequence[Frame], start: int) -> tuple[int, bool]:
        """Send frames in one VMBus packet: as many as go into a section, or one large one."""
        size, _ = self.protocol.send_section
        first = rndis.pack_packet(frames[start], alignment=self.protocol.alignment)
        if not size or len(first) > size:
            return self._send_large(index, frames[start], first)
        pool = self._sections
        if pool is None or not pool.available:
            return 0, False
        messages, total, count = [first], len(first), 1
        while start + count < len(frames) and count < self.protocol.packets_per_message:
            following = rndis.pack_packet(frames[start + count], alignment=self.protocol.alignment)
            if total + len(following) > size:
                break
            messages.append(following)
            total += len(following)
            count += 1
        octets = sum(len(frame.data) for frame in frames[start : start + count])
        sent = Sent(frames=count, size=octets)

        def send(transaction_id: int) -> bool:
            sent.section = pool.take()
            pool.write(sent.section, b"".join(messages))
            payload = self.protocol.rndis_packet(ChannelType.DATA, sent.section, total)
            return self._channels[index].outgoing.send(payload, transaction_id, IN_BAND, COMPLETION_REQUESTED)

        needed = self._send_held(index, sent, send)
        self._channels[index].account.bytes_copied += total
        return count, needed

    def _send_large(self, index: int, frame: Frame, message: bytes) -> tuple[int, bool]:
        if len(message) > LARGE_PAGES * PAGE:
            raise LocalProtocolError(f"frame of {len(frame.data)} bytes")
        if not self._free_large:
            return 0, False
        channel = self._channels[index]
        sent = Sent(frames=1, size=len(frame.data))

        def send(transaction_id: int) -> bool:
            sent.large = self._free_large[0]
            self._free_large.popleft()
            start = sent.large * LARGE_PAGES
            self._large.view[start * PAGE : start * PAGE + len(message)] = message
            # As Linux's driver does it: a range for the headers, and one for every page of the frame.
            parts = [
                (min(PAGE, len(message) - page * PAGE), 0, [self._large.pfns[start + page]])
                for page in range(-(-len(message) // PAGE))
            ]
            payload = self.protocol.rndis_packet(ChannelType.DATA)
            return channel.outgoing.send_gpa_direct(payload, GpaRanges(parts), transaction_id)

        needed = self._send_held(index, sent, send)
        channel.account.bytes_copied += len(message)
        return 1, needed


def ring_peer(channel: Channel) -> None:
    """Ring the peer, unless the channel closed between two of our steps."""
    with contextlib.suppress(LocalProtocolError):
        channel.signal()


def as_frame(item: bytes | Frame) -> Frame:
    """A frame with its VLAN tag beside it, as Linux's driver sends it."""
    if isinstance(item, Frame):
        return item
    plain, tci = strip_tag(item)
    return Frame(plain, vlan=None if tci is None else rndis.pack_vlan(tci))


def default_page_count(mtu: int = 1500, receive_sections: int = 256, send_sections: int = 64) -> int:
    """Pages to give a `NetworkVsc` for about so many sections of its buffers."""
    receive = -(-receive_sections * receive_section_size(mtu + 14) // PAGE)
    send = -(-send_sections * SEND_SECTION_SIZE // PAGE)
    return CONTROL_PAGES + LARGE_BUFFERS * LARGE_PAGES + max(receive + send, 4 * send)
