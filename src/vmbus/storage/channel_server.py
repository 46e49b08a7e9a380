"""One open channel of a storage provider: what is under way on it, and how its answers get out."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeAlias

from vmbus.bus.channel import Channel
from vmbus.core.blockio import BlockServer
from vmbus.core.ring import COMPLETION, COMPLETION_REQUESTED, IN_BAND, Packet
from vmbus.errors import RingFull
from vmbus.storage.scsi.task import Outcome, Task
from vmbus.storage.wire import MAX_REQUEST_SIZE, NtStatus, Operation, PacketHeader
from vmbus.trace.guest_log import GuestLog

__all__ = ["ChannelServer"]

guest_log = GuestLog(logging.getLogger(__name__))

_MOST_FUTILE = 16

_Work: TypeAlias = Future[Outcome] | Future[NtStatus]
_Running: TypeAlias = tuple[tuple[int, int], Task]  # target and logical unit, command


class ChannelServer:
    """One open channel and what is under way on it.

    Args:
        channel: the host's end.
        path: of an IDE accelerator, else None.

    Attributes:
        index: the sub-channel's number, 0 for the primary channel.
        fast: serves plain reads and writes.
        fast_stale: units have changed since `fast` was told of them.
        fast_useful: `fast` has units to serve.
        arrived: packets that were taken from the ring and come next.
        current: the last of them that was begun with.
        notices: what the guest is to be told unasked.
        packet_size: bytes of the guest's last packet that was no SCSI request. Notices get the same size: Windows
            guests take packets of the version's size only, OpenBSD and NetBSD those of 64 bytes in any version.
        violations: packets of the guest that broke the protocol. Only the first is logged.
        running: what worker threads have to do, with the target, the logical unit and the command of a request.
        here: the request that the thread inside `kick` carries out itself, where there are no worker threads.
    """

    def __init__(self, channel: Channel, path: int | None) -> None:
        self.channel = channel
        self.index = channel.offer.subchannel_index
        self.fast = BlockServer(
            channel.incoming, channel.outgoing, channel.memory, -1 if path is None else path
        )
        self.fast_stale = True
        self.fast_useful = False
        self.arrived: list[Packet] = []
        self.current: Packet | None = None
        self._sending: tuple[Packet, int] | None = None  # on its way, and the packets in the ring before
        self.completions: deque[tuple[Packet, bytes]] = deque()
        self.notices: set[Operation] = set()
        self.packet_size = PacketHeader.SIZE + MAX_REQUEST_SIZE
        self.violations = 0
        self.running: dict[_Work, _Running | None] = {}
        self.here: _Running | None = None
        self._running = (
            threading.RLock()
        )  # taken by itself: what `Condition.__enter__` took, a signal could lose
        self._idle = threading.Condition(self._running)
        self._lock = threading.Lock()
        self._runner = 0
        self._again = False

    def violation(self, what: str) -> None:
        """The guest broke the protocol, without harm to anyone but itself."""
        self.violations += 1
        if self.violations == 1:
            guest_log.warning(
                self.channel.name, "%s; more on it is only counted", what, scope=self.channel.log_scope
            )

    def kick(self, run: Callable[["ChannelServer"], None]) -> None:
        """Run the server unless somebody does so already; then let that one look again.

        So no thread waits for another, a doorbell from inside the loop does not nest, and none is lost.
        """
        self._again = True
        while self._again:
            acquired = False
            try:
                acquired = self._lock.acquire(blocking=False)
                if not acquired:
                    return
                self._runner = threading.get_ident()
                self._again = False
                run(self)
            finally:
                if acquired:
                    self._runner = 0
                    self._lock.release()

    def settle(self) -> None:
        """Wait until no other thread is inside `kick`."""
        if self._runner != threading.get_ident():
            with self._lock:
                pass

    def begun(self, future: _Work, request: _Running | None) -> None:
        """A request, or a reset (`request` is None), waits for a worker thread, or runs on one."""
        with self._running:
            self.running[future] = request

    def finished(self, future: _Work) -> None:
        """It does not any more."""
        with self._running:
            self.running.pop(future, None)
            self._idle.notify_all()

    def cancel(self, address: tuple[int, int] | None = None) -> None:
        """Complete as aborted the requests that wait for a worker thread, for one unit or for all."""
        with self._running:
            waiting = [
                future
                for future, request in self.running.items()
                if request is not None and address in (None, request[0])
            ]
        for future in waiting:
            future.cancel()

    def abort(self, address: tuple[int, int] | None = None) -> None:
        """Let the requests that run end soon, for one unit or for all: nobody waits for what they do any more."""
        with self._running:
            requests = [*self.running.values(), self.here]
        for request in requests:
            if request is not None and address in (None, request[0]):
                request[1].aborted = True

    def wait_idle(self, address: tuple[int, int] | None = None) -> None:
        """Wait until no request, for one unit or for any, and no reset runs on a worker thread."""

        def idle() -> bool:
            return not any(
                request is None or address in (None, request[0]) for request in self.running.values()
            )

        with self._running:
            self._idle.wait_for(idle)

    def complete(self, packet: Packet, size: int, status: int, body: bytes) -> None:
        """Queue a completion of exactly the request's size, as Windows guests insist on it."""
        if packet.flags & COMPLETION_REQUESTED:
            header = PacketHeader(Operation.COMPLETE_IO, 0, status).pack()
            self.completions.append((packet, header + body[:size].ljust(size, b"\0")))

    def answered(self, packet: Packet) -> bool:
        """Whether a packet's completion waits in the queue."""
        return any(each is packet for each, _ in self.completions)

    def flush(self) -> bool:
        """Write completions and notices and ring if needed; False if the ring is full: the guest rings then.

        Raises:
            RingCorrupt: the guest broke the ring.
        """
        outgoing = self.channel.outgoing
        futile = 0
        while self.completions or self.notices:
            sent, signal, full = self._write()
            if sent:
                self.channel.account.packets_sent += sent
                self.channel.notify(signal)
            if not full:
                outgoing.stop_waiting()
                return True
            futile = 0 if sent else futile + 1
            # The guest may have made room just now. Room that comes and goes and lets nothing through is its game.
            if not outgoing.want_space(PacketHeader.SIZE + MAX_REQUEST_SIZE) or futile > _MOST_FUTILE:
                return False
        return True

    def _write(self) -> tuple[int, bool, bool]:
        """Packets written, whether the guest must be rung, whether the ring is full."""
        outgoing = self.channel.outgoing
        sent, signal = 0, False
        if self._sending is not None:  # an exception from outside came the last time: was that one sent?
            packet, before = self._sending
            if outgoing.packets != before and self.completions and self.completions[0][0] is packet:
                self.completions.popleft()
                signal = True
            self._sending = None
        try:
            while self.notices:
                notice = min(self.notices)
                signal |= outgoing.send(
                    PacketHeader(notice).pack().ljust(self.packet_size, b"\0"), 0, IN_BAND
                )
                sent += 1
                self.notices.discard(notice)
            while self.completions:
                packet, payload = self.completions[0]
                self._sending = packet, outgoing.packets
                signal |= outgoing.send(payload, packet.transaction_id, COMPLETION)
                sent += 1
                self.completions.popleft()
                self._sending = None
        except RingFull:
            return sent, signal, True
        return sent, signal, False
