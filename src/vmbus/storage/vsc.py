"""The storage client: what a guest's driver does to reach disks over storage channels.

`StorageVsc` negotiates, sends SCSI commands and keeps their completions apart; `StorageDisk` is the block
device on top of it. The host is as little trusted as a guest is by `vmbus.storage.vsp`: completions nobody
waits for are dropped, lengths are checked, and a request that is never completed ends with an error.
"""

import logging
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self
from weakref import ReferenceType, ref

from vmbus.bus.channel import Channel
from vmbus.bus.progress import Progress
from vmbus.bus.taking import take_packets
from vmbus.core.blockio import DONE, PROGRESS, RING, STRAY, BlockClient
from vmbus.core.memory import PAGE_SIZE, GpaRanges
from vmbus.core.ring import COMPLETION, COMPLETION_REQUESTED, IN_BAND, Packet
from vmbus.errors import DeviceError, LocalProtocolError, RemoteProtocolError, RingFull, VmbusError
from vmbus.storage.disk import Buffer
from vmbus.storage.guest_disk import StorageDisk
from vmbus.storage.lent_pages import Loan, PagePool
from vmbus.storage.negotiation import GuestNegotiation
from vmbus.storage.requests import CommandError, CommandResult, Pending, request_packet, result_of
from vmbus.storage.scsi.codes import Opcode, ScsiStatus, SenseKey
from vmbus.storage.wire import (
    DataDirection,
    Operation,
    PacketFlags,
    PacketHeader,
    SrbStatus,
    Version,
    VersionRules,
)

__all__ = ["ClientBusy", "CommandError", "CommandResult", "StorageVsc"]

_log = logging.getLogger(__name__)

_CONTROL_ID = 0xFFFF_FFFF_0000_0000
"""Transaction ids of the negotiation and of resets begin here; those of SCSI requests count up from 1."""

_RETRIES = 5
_BATCH = 64
_LEAST_PACKET = 24
"""Bytes of a ring that the shortest packet takes."""


class ClientBusy(LocalProtocolError):
    """The call came from inside of a wait of a batch, on the same thread; it would wait for itself."""


class _Running:
    """Lives as long as the call that runs a batch."""


class StorageVsc:
    """One guest's end of a storage controller.

    Args:
        channel: the open primary channel.
        pages: page frame numbers of guest memory that the client may use for data, in any order. The
            largest transfer and the queue depth are limited by their number.
        versions: protocol versions in order of preference.
        sub_channels: how many sub-channels to ask for; open them and give them to `add_channel`.
        timeout: seconds to wait for the host before giving up.
        on_change: called after the host's notice that disks came or went, outside of any request.

    Raises:
        LocalProtocolError: no pages.
    """

    def __init__(
        self,
        channel: Channel,
        pages: Sequence[int],
        *,
        versions: Sequence[int] = tuple(sorted(Version, reverse=True)),
        sub_channels: int = 0,
        timeout: float = 5.0,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        if not pages:
            raise LocalProtocolError("a storage client needs at least one page for data")
        self.timeout = timeout
        self.on_change = on_change
        self.channels = [channel]
        self.negotiation = GuestNegotiation(versions, sub_channels=sub_channels)
        self.stale_completions = 0
        """Completions that no request waited for."""
        self._page_count = len(pages)
        self._pages = PagePool(pages)
        self._memory = channel.memory
        self._pending: dict[int, Pending] = {}
        self._control: list[bytes] = []
        self._control_id = 0
        self._asked = b""  # the control packet sent last, and how many the ring had taken before
        self._asked_before = 0
        self._next_id = 1
        self._turn = 0
        self._arrived: list[Packet] = []  # taken from a ring, not yet looked at
        self._changed = False
        self._batch: ReferenceType[_Running] | None = None
        self._interrupted = False
        self._failed = ""
        self._rang = False
        self._progress = Progress()
        self._lock = threading.RLock()
        channel.on_signal = self._on_signal

    def __repr__(self) -> str:
        state = self._failed or ("connected" if self.negotiation.done else "not connected")
        return f"<StorageVsc on {len(self.channels)} channels: {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self) -> None:
        """Negotiate; afterwards requests may be sent.

        Raises:
            RemoteProtocolError: the host refuses or answers nonsense.
            DeviceError: the host does not answer in time.
        """
        with self._call():
            while not self.negotiation.done:
                # A call before this one may have been interrupted while it waited.
                asked = self.negotiation.asked
                question = self.negotiation.question if asked else self.negotiation.request()
                self.negotiation.receive(self._ask(question))

    def add_channel(self, channel: Channel) -> None:
        """Use an open sub-channel for requests, too."""
        channel.on_signal = self._on_signal
        with self._lock:
            self.channels.append(channel)

    @property
    def max_transfer(self) -> int:
        """Bytes of one request that host and buffer pages allow, whole pages."""
        most = min(self.negotiation.properties.max_transfer_bytes, self._page_count * PAGE_SIZE)
        return most // PAGE_SIZE * PAGE_SIZE

    def execute(
        self, target: int, lun: int, cdb: bytes, *, data_out: Buffer = b"", data_in: int = 0
    ) -> CommandResult:
        """Send one SCSI command and wait for it.

        Args:
            target: SCSI target.
            lun: logical unit.
            cdb: up to 16 bytes.
            data_out: data for the device, or
            data_in: bytes of room for data from the device.

        Raises:
            DeviceError: the host did not complete it in time, or the data exceed the buffer pages.
            ClientBusy: this thread is in the middle of a batch.
        """
        length = len(data_out) or data_in
        with self._lock:
            if self._interrupted:
                self._recover()
            if (
                self._batch is not None and self._batch() is not None
            ):  # from inside of a wait, on the same thread
                raise ClientBusy("the storage client is in the middle of a batch")
            loan = self._take(length) if length else None
            request_id = self._next_id
            self._next_id += 1
            pending = Pending(cdb, length, request_id, self.channels[self._turn % len(self.channels)])
            self._turn += 1
            try:
                ranges = None
                if loan is not None:
                    loan.watch(pending.outstanding)
                    ranges = GpaRanges([(length, 0, loan.pages)])
                if data_out and ranges is not None:
                    ranges.write(self._memory, data_out)
                direction = (
                    DataDirection.OUT if data_out else DataDirection.IN if data_in else DataDirection.UNKNOWN
                )
                packet = request_packet(self._rules, (target, lun), cdb, direction, length)
                self._pending[request_id] = pending
                if not self._try_send(pending, packet, ranges):
                    self._wait(lambda: self._try_send(pending, packet, ranges))
                self._wait(lambda: pending.result is not None)
                result = pending.result
                assert result is not None
                if data_in and ranges is not None:
                    data = ranges.read(self._memory, 0, result.transferred)
                    result = CommandResult(
                        result.srb_status, result.scsi_status, result.transferred, result.sense, data
                    )
            except VmbusError:
                raise
            except BaseException:
                self._interrupted = True
                raise
            finally:
                if loan is not None:
                    loan.close()
                self._pending.pop(request_id, None)
        self._tell()
        return result

    def check(self, target: int, lun: int, cdb: bytes, *, data_out: Buffer = b"", data_in: int = 0) -> bytes:
        """`execute`, and try again after unit attentions; returns the data.

        Raises:
            CommandError: the command failed.
            DeviceError: as `execute`.
        """
        for _ in range(_RETRIES):
            result = self.execute(target, lun, cdb, data_out=data_out, data_in=data_in)
            if result.good:
                return result.data
            if result.sense is None or result.sense.key != SenseKey.UNIT_ATTENTION:
                break
        raise CommandError(cdb, result.srb_status, result.scsi_status, result.sense)

    def luns(self, target: int = 0) -> list[int]:
        """The logical units of a target, by REPORT LUNS."""
        cdb = struct.pack(">BxBxxxIxx", Opcode.REPORT_LUNS, 0, PAGE_SIZE)
        data = self.check(target, 0, cdb, data_in=PAGE_SIZE)
        if len(data) < 8:
            raise RemoteProtocolError(f"REPORT LUNS gave {len(data)} bytes")
        listed = min(int.from_bytes(data[:4], "big"), len(data) - 8) // 8
        return [int.from_bytes(data[8 + 8 * i : 10 + 8 * i], "big") & 0x3FFF for i in range(listed)]

    def disk(self, target: int = 0, lun: int = 0) -> StorageDisk:
        """The block device at an address.

        Raises:
            CommandError: there is none, or it is not ready.
        """
        return StorageDisk(self, target, lun)

    def reset(self) -> None:
        """Reset the bus: whatever is under way is aborted, and units report a unit attention."""
        with self._call():
            header = PacketHeader(Operation.RESET_BUS, PacketFlags.REQUEST_COMPLETION)
            packet = header.pack().ljust(self.packet_size, b"\0")
            status = PacketHeader.unpack(self._ask(packet)).status
            if status:
                raise DeviceError(f"the host refuses a bus reset with status 0x{status:08x}")

    def poll(self) -> None:
        """Take what the host sent unasked, and call `on_change` if disks came or went."""
        with self._call():
            self._collect()
        self._tell()

    def settle(self) -> None:
        """Wait until the host has completed what an interrupted call had sent, so that nobody's pages are in use.

        Raises:
            DeviceError: the host did not complete it in time.
        """
        with self._call():
            self._wait(lambda: not self._pages.waiting)

    def close(self) -> None:
        """Close all channels, sub-channels first."""
        for channel in reversed(self.channels):
            channel.close()

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Around what uses the channels: one thread at a time, and in order again after an interruption."""
        with self._lock:
            try:
                if self._interrupted:
                    self._recover()
                yield
            except VmbusError:
                raise
            except BaseException:
                self._interrupted = True
                raise

    def _recover(self) -> None:
        """An exception from outside may have come between writing to a ring and ringing, or with signals masked."""
        for channel in self.channels:
            if channel.is_open:
                channel.incoming.unmask()
                channel.signal()
        self._interrupted = False

    @contextmanager
    def exclusive(self) -> Iterator[Channel]:
        """The next channel in turn, for a caller that drives it itself until the context ends.

        Raises:
            DeviceError: the client has given up.
            ClientBusy: this thread is in the middle of a batch.
        """
        with self._call():
            if self._failed:
                raise DeviceError(self._failed)
            if (
                self._batch is not None and self._batch() is not None
            ):  # from inside of a wait, on the same thread
                raise ClientBusy("the storage client is in the middle of a batch")
            batch = _Running()
            self._batch = ref(batch)
            channel = self.channels[self._turn % len(self.channels)]
            self._turn += 1
            try:
                yield channel
            finally:
                self._batch = None
        self._tell()

    @contextmanager
    def borrow_pages(self, count: int | None = None) -> Iterator["Loan"]:
        """Free buffer pages, all of them by default, until the context ends and the host is done with them."""
        if self._pages.waiting:
            self._wait(lambda: not self._pages.waiting)
        loan = self._take((len(self._pages) if count is None else count) * PAGE_SIZE)
        try:
            yield loan
        finally:
            loan.close()

    def new_ids(self, count: int) -> int:
        """Set aside `count` transaction ids; returns the first."""
        first = self._next_id
        self._next_id += count
        return first

    def drive(self, channel: Channel, client: BlockClient) -> None:
        """Step a batch on its channel until it is done.

        Raises:
            DeviceError: the host did not complete a request in time; the client is of no use any more.
        """
        account = channel.account
        sent, received, stale = client.sent, client.received, client.stale
        incoming = channel.incoming
        deadline = 0.0
        try:
            incoming.mask()
            while not (state := client.step()) & DONE:
                if state & RING:
                    channel.signal()
                elif state & PROGRESS:
                    account.doorbells_suppressed += 1
                if state & STRAY:
                    take_packets(incoming.recv_packets, 1, self._arrived)
                    self._look()
                if state & PROGRESS:
                    deadline = 0.0
                elif state & (STRAY | RING):
                    deadline = self._patience(deadline)
                else:
                    self._rang = False
                    more = incoming.unmask()
                    deadline = self._patience(deadline) if more else self._sleep(channel, deadline)
                    incoming.mask()
        finally:
            if channel.is_open:
                incoming.unmask()
            account.packets_sent += client.sent - sent
            account.packets_received += client.received - received
            self.stale_completions += client.stale - stale

    def _sleep(self, channel: Channel, deadline: float) -> float:
        """Let the host work until it rings; returns the time at which to give up.

        Raises:
            DeviceError: that time is over, or a channel is closed.
        """
        deadline = self._patience(deadline)
        # On one thread the first wait ends when nobody has anything to do; other threads may, so wait for those.
        if not channel.wait(self._has_rung, max(0.0, deadline - time.monotonic())):
            self._progress.wait_for(self._has_rung, max(0.0, deadline - time.monotonic()))
        return deadline

    def _on_signal(self) -> None:
        self._rang = True
        self._progress.notify()

    def _has_rung(self) -> bool:
        return self._rang

    def _patience(self, deadline: float) -> float:
        """The time at which to give up; what comes meanwhile and completes nothing does not put it off.

        Raises:
            DeviceError: that time is over, or a channel is closed.
        """
        now = time.monotonic()
        deadline = deadline or now + self.timeout
        if now >= deadline:
            self._failed = f"the host did not complete a request within {self.timeout} s"
        elif not all(channel.is_open for channel in self.channels):
            self._failed = "the storage channel was closed"
        if self._failed:
            raise DeviceError(self._failed)
        return deadline

    @property
    def packet_size(self) -> int:
        """Bytes of a packet in the negotiated version."""
        return self._rules.packet_size

    @property
    def _rules(self) -> VersionRules:
        rules = self.negotiation.rules
        if rules is None:
            raise LocalProtocolError("not connected")
        return rules

    def _tell(self) -> None:
        if self._changed:
            self._changed = False
            if self.on_change is not None:
                self.on_change()

    def _take(self, length: int) -> Loan:
        if self._failed:
            raise DeviceError(self._failed)
        count = -(-length // PAGE_SIZE)
        if count > len(self._pages):
            self._wait(lambda: count <= len(self._pages) or not self._pages.waiting)
        return self._pages.lend(count)

    def _ask(self, packet: bytes) -> bytes:
        """Send a control packet on the primary channel and wait for its completion."""
        channel = self.channels[0]
        if packet is not self._asked or self._asked_before == channel.outgoing.packets:
            self._control.clear()
            self._control_id += 1
            self._asked, self._asked_before = packet, channel.outgoing.packets
            channel.send(packet, _CONTROL_ID + self._control_id, IN_BAND, COMPLETION_REQUESTED)
        self._wait(lambda: bool(self._control))
        return self._control[0]

    @staticmethod
    def _try_send(pending: Pending, packet: bytes, ranges: GpaRanges | None) -> bool:
        channel = pending.channel
        outgoing = channel.outgoing
        try:
            pending.before = outgoing.packets
            if ranges is None:
                signal = outgoing.send(packet, pending.request_id, IN_BAND, COMPLETION_REQUESTED)
            else:
                signal = outgoing.send_gpa_direct(packet, ranges, pending.request_id)
        except RingFull:
            return False
        channel.account.packets_sent += 1
        channel.notify(signal)
        return True

    def _wait(self, done: Callable[[], bool]) -> None:
        """Take completions until `done`.

        Raises:
            DeviceError: the host did not answer within `timeout`. Its later answers could write into
                buffers that were given to other requests, so the client is of no use any more.
        """
        deadline, taken = 0.0, 0
        while not done():
            if taken:  # from a host that sends, but not what is waited for
                deadline = self._patience(deadline)
            self._rang = False
            taken = self._collect()
            if not taken:
                deadline = self._sleep(self.channels[0], deadline)

    def _collect(self) -> int:
        """Take the packets there are, but not those that a host goes on sending; returns their number."""
        taken = len(self._arrived)
        if taken:
            self._look()
        for channel in self.channels:
            if not channel.is_open:
                continue
            incoming = channel.incoming
            most = incoming.available_bytes // _LEAST_PACKET + 1
            while most > 0 and incoming.available_bytes:
                count = take_packets(incoming.recv_packets, _BATCH, self._arrived)
                if not count:
                    break
                most -= count
                taken += count
                channel.account.packets_received += count
                self._look()
                channel.notify(incoming.take_signal())
        return taken

    def _look(self) -> None:
        """Look at the packets that arrived; one leaves the list only when nothing is left to be done with it."""
        for packet in self._arrived:
            self._packet(packet)
        self._arrived.clear()

    def _packet(self, packet: Packet) -> None:
        payload = packet.payload
        if packet.type == IN_BAND and packet.transaction_id == 0:
            if int.from_bytes(payload[:4], "little") in (Operation.ENUMERATE_BUS, Operation.REMOVE_DEVICE):
                self._changed = True
            return
        if (
            packet.type == COMPLETION
            and packet.transaction_id == _CONTROL_ID + self._control_id
            and not self._control  # not twice, nor a thousand times
        ):
            self._control.append(payload)
            return
        pending = self._pending.get(packet.transaction_id) if packet.type == COMPLETION else None
        if self._pages.waiting and packet.type == COMPLETION and self._pages.completed(packet.transaction_id):
            return
        if pending is None or pending.result is not None:
            self.stale_completions += 1
            if self.stale_completions == 1:
                _log.warning(
                    "the host completed request %#x, which is not pending; more of the kind is only counted",
                    packet.transaction_id,
                )
            return
        try:
            pending.result = result_of(payload, pending.length)
        except RemoteProtocolError as error:
            _log.debug("the host completed request %#x with nonsense: %s", packet.transaction_id, error)
            pending.result = CommandResult(SrbStatus.ERROR, ScsiStatus.GOOD, 0, None)
