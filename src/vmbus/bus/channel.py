"""An open channel: two rings, a doorbell, and the memory that the guest lends the host beside them.

Both ends hold a `Channel` of the same shape, so that a device protocol, its tests and its benchmarks run
equally over a real control plane (`vmbus.bus.VmbusHost`, `vmbus.bus.VmbusGuest`) and over `loopback`.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from threading import Lock
from typing import Protocol, Self
from uuid import UUID

from vmbus.bus.held_pages import HeldPages
from vmbus.bus.offer import Offer
from vmbus.core.memory import PAGE_SIZE, Buffer, GpaRanges, GuestMemory, Window
from vmbus.core.ring import IN_BAND, Packet, RingReader, RingWriter
from vmbus.errors import LocalProtocolError, RemoteProtocolError
from vmbus.trace.guest_log import new_scope
from vmbus.trace.ledger import Account

__all__ = ["TURN", "Channel", "ChannelOwner", "Gpadl", "loopback"]

TURN = 64
"""Batches of packets that a provider takes from one channel before others that its thread serves get their turn."""


class Gpadl:
    """Guest memory that the guest described to the host under an id (GPA descriptor list).

    Attributes:
        gpadl_id: the guest's name for it.
        ranges: the guest physical ranges; no page content is copied until asked for.
        memory: the guest's memory.

    Args:
        held: the bus's index of pages that windows stand on.
        key: the GPADL's there.
    """

    __slots__ = ("_closed", "_held", "_key", "_lock", "_window", "gpadl_id", "memory", "ranges")

    def __init__(
        self,
        gpadl_id: int,
        ranges: GpaRanges,
        memory: GuestMemory,
        held: HeldPages | None = None,
        key: int = 0,
    ) -> None:
        self.gpadl_id = gpadl_id
        self.ranges = ranges
        self.memory = memory
        self._held = held
        self._key = key
        self._window: Window | None = None
        self._closed = False
        self._lock = Lock()

    def __len__(self) -> int:
        return self.ranges.total

    @property
    def pfns(self) -> tuple[int, ...]:
        """The page numbers of all ranges, in order."""
        return tuple(pfn for part in self.ranges for pfn in part.pfns)

    @property
    def is_mapped(self) -> bool:
        """Whether a window of it exists, which keeps the pages that were there when it was made.

        One that is just being made is waited for: it may have looked at the pages already.
        """
        with self._lock:
            return self._window is not None and self._window.address != 0

    def window(self) -> Window:
        """The pages mapped as one contiguous `Window`: the same until it is closed, at the latest with the GPADL.

        Raises:
            GuestMemoryError: a page is outside the partition.
            BudgetExceeded: the guest has used up its mappings.
            RemoteProtocolError: the guest has torn the GPADL down.
            OSError: the host cannot map it.
        """
        with self._lock:
            if self._closed:
                raise RemoteProtocolError(f"GPADL {self.gpadl_id:#x} is torn down")
            if self._window is None or not self._window.address:
                pfns = self.pfns
                if self._held is not None and self._window is None:
                    # Before: should a page be taken from the guest meanwhile, the window is found and ends.
                    self._held.hold(self._key, pfns)
                try:
                    self._window = self.memory.window(pfns, mirrored=False)
                except BaseException:
                    if self._held is not None and self._window is None:
                        self._held.let_go(self._key)
                    raise
            return self._window

    def read(self, offset: int, length: int) -> bytes:
        """Copy `length` bytes at `offset` out of the described memory."""
        return self.ranges.read(self.memory, offset, length)

    def write(self, offset: int, data: Buffer) -> None:
        """Copy `data` into the described memory at `offset`."""
        self.ranges.write(self.memory, data, offset)

    def close(self) -> None:
        """Drop the mapping; the guest may use its pages for something else."""
        with self._lock:
            self._closed = True
            window, self._window = self._window, None
        if window is not None:
            if self._held is not None:
                self._held.let_go(self._key)
            with suppress(BufferError):  # somebody still looks at it; it goes with the last view
                window.close()


class ChannelOwner(Protocol):
    """What a `Channel` needs of the bus that it belongs to."""

    def ring(self, channel: "Channel") -> None:
        """Signal the peer."""

    def again(self, channel: "Channel") -> None:
        """Deliver the peer's signal once more, after whatever else waits."""

    def close_channel(self, channel: "Channel") -> None:
        """Close the channel and free what belongs to it."""

    def wait(self, channel: "Channel", condition: Callable[[], bool], timeout: float) -> bool:
        """Let the other side work until `condition` holds."""

    def find_gpadl(self, channel: "Channel", gpadl_id: int) -> Gpadl:
        """The GPADL that the guest made for this channel."""

    def make_gpadl(self, channel: "Channel", ranges: GpaRanges) -> int:
        """Describe memory to the host; its id."""

    def drop_gpadl(self, channel: "Channel", gpadl_id: int) -> None:
        """Take memory back from the host."""


class Channel:
    """One end of an open channel.

    Attributes:
        channel_id: the relid; names the channel in control messages and, by default, its event flag.
        offer: what was opened.
        outgoing: the ring this end writes.
        incoming: the ring this end reads.
        memory: the guest's memory, for GPA-direct packets and GPADLs.
        account: where this end counts packets and doorbells.
        user_data: the 120 bytes that the guest gave when opening (empty at the guest's end of older calls).
        target_vp: the guest VP that the host interrupts.
        name: for logs: the guest's and the device's, where they are known.
        log_scope: in which that name is unique (`vmbus.trace.guest_log`).
        on_signal: called whenever the peer rang. It must read `incoming` until empty, or else ask again. A ring that
            came before there was a callback is delivered when one is set.
        on_closed: called once when the channel ends for any reason: closed by either end, rescinded,
            unloaded.
    """

    __slots__ = (
        "_missed",
        "_on_signal",
        "_open",
        "_owner",
        "account",
        "channel_id",
        "incoming",
        "log_scope",
        "memory",
        "name",
        "offer",
        "on_closed",
        "outgoing",
        "target_vp",
        "user_data",
    )

    def __init__(
        self,
        owner: ChannelOwner,
        offer: Offer,
        outgoing: RingWriter,
        incoming: RingReader,
        *,
        memory: GuestMemory,
        account: Account | None = None,
        channel_id: int = 0,
        user_data: bytes = b"",
        target_vp: int = 0,
        name: str = "",
        log_scope: int = 0,
    ) -> None:
        self._owner = owner
        self.name = name or f"channel {channel_id}"
        self.log_scope = log_scope or new_scope()
        self._open = True
        self.offer = offer
        self.channel_id = channel_id
        self.outgoing = outgoing
        self.incoming = incoming
        self.memory = memory
        self.account = Account() if account is None else account
        self.user_data = user_data
        self.target_vp = target_vp
        self._on_signal: Callable[[], None] | None = None
        self._missed = False
        self.on_closed: Callable[[], None] | None = None

    def __repr__(self) -> str:
        state = "open" if self._open else "closed"
        return f"<Channel {self.channel_id} {state}: {self.offer!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_open(self) -> bool:
        """Whether rings and doorbell may still be used."""
        return self._open

    @property
    def on_signal(self) -> Callable[[], None] | None:
        """Called whenever the peer rang."""
        return self._on_signal

    @on_signal.setter
    def on_signal(self, callback: Callable[[], None] | None) -> None:
        self._on_signal = callback
        if callback is not None and self._missed:
            self._missed = False
            self.again()  # by the bus, which never runs it twice at the same time

    def wait(self, condition: Callable[[], bool], timeout: float = 10.0) -> bool:
        """Let the peer work until `condition` holds: how a synchronous client waits for its answer in any hosting.

        Args:
            condition: cheap and without side effects, for instance whether `on_signal` has seen the completion.
            timeout: seconds of real time. On one thread the wait ends as soon as nobody has anything left to do.

        Returns:
            whether the condition holds.
        """
        return self._owner.wait(self, condition, timeout)

    def signal(self) -> None:
        """Ring the peer, and count it. Only for when a ring call said that it is needed."""
        self._check()
        self.account.doorbells_sent += 1
        self._owner.ring(self)

    def again(self) -> None:
        """Have `on_signal` called once more, after whatever else waits: for a handler that left packets in the ring.

        A peer that fills its ring as fast as it is read must not keep the others that one thread serves waiting.
        """
        if self._open:
            self._owner.again(self)

    def notify(self, needed: bool) -> None:
        """Ring the peer if a ring call said so: ``channel.notify(channel.outgoing.send(…))``; count either
        way."""
        if needed:
            self.signal()
        else:
            self.account.doorbells_suppressed += 1

    def send(self, payload: Buffer, transaction_id: int = 0, type: int = IN_BAND, flags: int = 0) -> None:
        """Write one packet and ring the peer if it needs that.

        Raises:
            RingFull: no room now.
            LocalProtocolError: the channel is closed.
        """
        self._check()
        self.account.packets_sent += 1
        self.notify(self.outgoing.send(payload, transaction_id, type, flags))

    def serve(self, handler: Callable[[list[Packet]], None], batch: int = 64) -> None:
        """Make `on_signal` read the ring in batches until it is empty and hand each to `handler`.

        Interrupts from the peer stay masked meanwhile, and a writer that waits for space is rung once a
        batch. After `TURN` batches others get their turn.
        """

        def drain() -> None:
            incoming, turn = self.incoming, TURN
            while self._open:
                incoming.mask()
                while self._open and (packets := incoming.recv_packets(batch)):
                    self.account.packets_received += len(packets)
                    self.notify(incoming.take_signal())
                    handler(packets)
                    turn -= 1
                    if turn <= 0:
                        self.again()
                        return
                if not self._open or not incoming.unmask():
                    return

        self.on_signal = drain

    def deliver_signal(self) -> None:
        """The bus says that the peer rang."""
        callback = self._on_signal
        if callback is None:
            self._missed = True
            if self._on_signal is not None:  # just now, by a thread that saw nothing missed yet
                self.again()
        elif self._open:
            callback()

    def gpadl(self, gpadl_id: int) -> Gpadl:
        """The memory that the guest described for this channel (host end).

        Raises:
            RemoteProtocolError: there is no such GPADL on this channel.
        """
        self._check()
        return self._owner.find_gpadl(self, gpadl_id)

    def create_gpadl(self, pfns: Sequence[int], byte_count: int | None = None, byte_offset: int = 0) -> int:
        """Describe whole pages (or `byte_count` bytes from `byte_offset` on) to the host; its id (guest end).

        Raises:
            ProtocolError: the host refused it.
        """
        self._check()
        size = len(pfns) * PAGE_SIZE - byte_offset if byte_count is None else byte_count
        return self._owner.make_gpadl(self, GpaRanges([(size, byte_offset, pfns)]))

    def teardown_gpadl(self, gpadl_id: int) -> None:
        """Take the pages of a GPADL back; on return the host no longer reaches them (guest end)."""
        self._check()
        self._owner.drop_gpadl(self, gpadl_id)

    def close(self) -> None:
        """Close the channel; a second call does nothing.

        The host's end cannot end a channel by the protocol: there it stops serving, and the offer is
        rescinded.
        """
        if self._open:
            self._owner.close_channel(self)
            self.ended()

    def ended(self) -> None:
        """The bus says that the channel is closed: no more signals; `on_closed` is called once."""
        if self.cut() and self.on_closed is not None:
            self.on_closed()

    def cut(self) -> bool:
        """Close this end now, and leave the call of `on_closed` to the caller; whether it was open."""
        was, self._open = self._open, False
        # What reads the rings mostly refers to the channel: without it, they are unmapped with the last reference.
        self._on_signal = None
        return was

    def _check(self) -> None:
        if not self._open:
            raise LocalProtocolError(f"channel {self.channel_id} is closed")


class _Loop:
    """Joins two ends without a control plane; GPADLs live in a table of their own."""

    def __init__(self, memory: GuestMemory, windows: tuple[Window, ...]) -> None:
        self._memory = memory
        self._windows: tuple[Window, ...] = windows
        self._peer: dict[int, Channel] = {}
        self._due: deque[Channel] = deque()
        self._delivering = False
        self._lock = Lock()  # providers with worker threads ring and close from any of them
        self._gpadls: dict[int, Gpadl] = {}
        self._ids = count(1)

    def join(self, guest: Channel, host: Channel) -> None:
        self._peer = {id(guest): host, id(host): guest}

    def ring(self, channel: Channel) -> None:
        """Deliver at once, but never nested: a ring from inside a handler waits until that handler
        returns."""
        peer = self._peer.get(id(channel))
        if peer is not None:  # else another thread has just closed the channel
            self.again(peer)

    def again(self, channel: Channel) -> None:
        """As `ring`, to the channel itself."""
        with self._lock:
            # A doorbell is one bit: rung twice before it is looked at, it was rung once.
            if channel not in self._due:
                self._due.append(channel)
            if self._delivering:
                return
            self._delivering = True
        try:
            while (due := self._next()) is not None:
                due.deliver_signal()
        except BaseException:
            self._delivering = False
            raise

    def _next(self) -> Channel | None:
        """Whom to signal next; None ends the turn of the thread that delivers."""
        with self._lock:
            self._delivering = bool(self._due)
            return self._due.popleft() if self._due else None

    def wait(self, channel: Channel, condition: Callable[[], bool], timeout: float) -> bool:
        while not condition():
            try:
                due = self._due.popleft()
            except IndexError:
                return False
            due.deliver_signal()
        return True

    def close_channel(self, channel: Channel) -> None:
        with self._lock:
            peer = self._peer.get(id(channel))
            self._peer = {}
            self._due.clear()
        if peer is None:
            return
        channel.ended()
        peer.ended()
        gpadls, self._gpadls = self._gpadls, {}
        for gpadl in gpadls.values():
            gpadl.close()
        self._windows = ()  # the rings over them may still be held by the ends; the last one unmaps them

    def find_gpadl(self, channel: Channel, gpadl_id: int) -> Gpadl:
        try:
            return self._gpadls[gpadl_id]
        except KeyError:
            raise RemoteProtocolError(f"no GPADL {gpadl_id:#x} on channel {channel.channel_id}") from None

    def make_gpadl(self, channel: Channel, ranges: GpaRanges) -> int:
        gpadl_id = next(self._ids)
        self._gpadls[gpadl_id] = Gpadl(gpadl_id, ranges, self._memory)
        return gpadl_id

    def drop_gpadl(self, channel: Channel, gpadl_id: int) -> None:
        self.find_gpadl(channel, gpadl_id).close()
        del self._gpadls[gpadl_id]


def loopback(
    memory: GuestMemory,
    outgoing_pages: int = 4,
    incoming_pages: int = 4,
    *,
    offer: Offer | None = None,
    user_data: bytes = b"",
    guest_account: Account | None = None,
    host_account: Account | None = None,
) -> tuple[Channel, Channel]:
    """Two directly joined ends, for tests and benchmarks of device protocols on one thread.

    A ring of the doorbell is delivered before `Channel.signal` returns, except when it is rung from inside a
    handler, or from another thread while a handler runs: then it is delivered after that handler, so that two busy
    ends do not grow the stack.

    Args:
        memory: the guest's memory, for GPA-direct ranges and GPADLs; the rings themselves lie outside of it.
        outgoing_pages: data pages of the guest-to-host ring (its control page is extra).
        incoming_pages: data pages of the host-to-guest ring.
        offer: what the ends call their offer; anything if not given.
        user_data: what the guest passed when opening.
        guest_account: where the guest's end counts.
        host_account: where the host's end counts.

    Returns:
        (guest's end, host's end). Closing either closes both.

    Raises:
        ValueError: a ring without pages, or too many.
        OSError: the host has no memory for them.
    """
    offer = offer or Offer(UUID(int=0), UUID(int=0))
    windows = Window.allocate(outgoing_pages), Window.allocate(incoming_pages)
    loop = _Loop(memory, windows)
    up, down = windows
    user_data = user_data.ljust(120, b"\0")
    guest = Channel(
        loop,
        offer,
        RingWriter(up),
        RingReader(down),
        memory=memory,
        account=guest_account,
        user_data=user_data,
    )
    host = Channel(
        loop,
        offer,
        RingWriter(down),
        RingReader(up),
        memory=memory,
        account=host_account,
        user_data=user_data,
    )
    loop.join(guest, host)
    return guest, host
