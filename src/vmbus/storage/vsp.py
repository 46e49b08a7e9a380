"""The storage provider: serves the disks of the parent to one guest over storage channels.

One `StorageVsp` is one synthetic SCSI controller (or one IDE accelerator). Its primary channel carries the
negotiation; requests may come on any of its channels and are completed where they came from, in the order in
which the backend finishes them.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import NamedTuple, Self, TypeAlias
from uuid import UUID, uuid4, uuid5

from vmbus.bus.channel import TURN, Channel
from vmbus.bus.offer import Offer
from vmbus.bus.taking import take_packets
from vmbus.bus.vmbus_host import Offered, VmbusHost
from vmbus.core.blockio import FULL, MORE
from vmbus.core.ring import GPA_DIRECT, IN_BAND, Packet
from vmbus.errors import GuestMemoryError, LocalProtocolError, RemoteProtocolError, RingCorrupt
from vmbus.storage.buffers import GuestBuffer
from vmbus.storage.channel_server import ChannelServer
from vmbus.storage.disk import Disk
from vmbus.storage.negotiation import HostNegotiation, State
from vmbus.storage.scsi.cdb import allocation_length
from vmbus.storage.scsi.codes import AdditionalSense, Opcode, ScsiStatus
from vmbus.storage.scsi.inquiry import Limits, absent_inquiry
from vmbus.storage.scsi.sense import CheckCondition, invalid_field
from vmbus.storage.scsi.task import Outcome, Task
from vmbus.storage.scsi.task_set import TaskSetBusy
from vmbus.storage.scsi.unit import DiskUnit, LogicalUnit
from vmbus.storage.srb import NO_UNIT, completion_size, nt_status, srb_status, too_long, without_lun
from vmbus.storage.wire import (
    CDB_SIZE,
    IDE_ACCELERATOR_INTERFACE,
    MAX_REQUEST_SIZE,
    MAX_TRANSFER,
    SCSI_INTERFACE,
    NtStatus,
    OfferProperties,
    Operation,
    PacketHeader,
    ScsiRequest,
    SrbFlags,
    SrbStatus,
    Version,
    ide_instance,
    parse_scsi_request,
)
from vmbus.trace.guest_log import GuestLog

__all__ = ["Address", "StorageVsp"]

guest_log = GuestLog(logging.getLogger(__name__))

Address: TypeAlias = tuple[int, int]
"""(target, lun) on path 0, each below 256."""

MAX_OUTSTANDING = 1024
"""Requests of one channel that are read before any of them is completed."""

_BATCH = 64
_RESETS = {
    Operation.RESET_LUN: AdditionalSense.DEVICE_RESET_OCCURRED,
    Operation.RESET_ADAPTER: AdditionalSense.POWER_ON_OR_RESET,
    Operation.RESET_BUS: AdditionalSense.BUS_RESET_OCCURRED,
}
_ABORTED = Outcome(ScsiStatus.TASK_ABORTED)
_BAD_BUFFER = invalid_field(0).sense.pack()


class _Request(NamedTuple):
    """One SCSI request of the guest; `size` is that of its payload area, and of its completion's."""

    packet: Packet
    size: int
    scsi: ScsiRequest


class StorageVsp:
    """One storage controller.

    Args:
        disks: what is attached, by (target, lun); a `Disk`, or a `LogicalUnit` that may be shared with other
            controllers.
        instance_id: the device's instance; a random one if not given. Serial numbers of disks that have no
            identifier come from it, so fix it where runs have to repeat.
        max_sub_channels: sub-channels the guest may open beside the primary one.
        max_transfer: bytes of one request, announced to the guest.
        workers: threads that execute requests; 0 executes them on the thread that rings, one after another.
        versions: protocol versions that are accepted.

    Attributes:
        offer: what to offer on the bus, with `open` and `close` as its callbacks; `offer_on` does it.
        create_sub_channels: called with a number when the guest asks for sub-channels; whoever offers
            `offer` sets it to offer ``offer.subchannel(1)`` to ``offer.subchannel(number)``.

    Raises:
        LocalProtocolError: an address of a disk is none that a unit can have.
        TypeError: what is attached is no disk.
        ValueError: a negative number of `workers`.
    """

    def __init__(
        self,
        disks: Mapping[Address, Disk | LogicalUnit] | None = None,
        *,
        instance_id: UUID | None = None,
        max_sub_channels: int = 0,
        max_transfer: int = MAX_TRANSFER,
        workers: int = 0,
        versions: Sequence[int] = tuple(Version),
    ) -> None:
        self.offer = Offer(SCSI_INTERFACE, instance_id or uuid4())
        self.create_sub_channels: Callable[[int], None] | None = None
        self._path: int | None = None  # of an IDE accelerator, whatever the guest says
        self._max_sub_channels = max_sub_channels
        self._max_transfer = max_transfer
        self._versions = versions
        self._units: dict[Address, LogicalUnit] = {}
        self._watchers: dict[Address, Callable[[], None]] = {}
        self._servers: dict[int, ChannelServer] = {}
        self._closing: list[ChannelServer] = []  # requests may still run
        self._closing_lock = threading.Lock()
        self._negotiation = self._new_negotiation()
        self._pool = ThreadPoolExecutor(workers, "storvsp") if workers else None
        # A reset waits for commands of other controllers; meanwhile the channel goes on.
        self._management = ThreadPoolExecutor(1, "storvsp-management") if workers else None
        # Moving packets may end in closing the channel, which waits for its requests and resets. So a thread in the
        # middle of one, or that others wait for, leaves it to this one.
        self._pump = ThreadPoolExecutor(1, "storvsp-pump") if workers else None
        for address, disk in (disks or {}).items():
            self.add_disk(address, disk)

    @classmethod
    def ide_accelerator(cls, disk: Disk | LogicalUnit, *, path: int, target: int) -> "StorageVsp":
        """The controller that gives a guest its emulated IDE disk over VMBus: one disk, one channel.

        Args:
            disk: the same disk that the emulated controller serves.
            path: IDE channel, 0 or 1.
            target: 0 for the master, 1 for the slave.
        """
        vsp = cls({(target, 0): disk}, instance_id=ide_instance(path, target))
        user_defined = OfferProperties(path_id=path, target_id=target).pack()
        vsp.offer = Offer(IDE_ACCELERATOR_INTERFACE, ide_instance(path, target), user_defined=user_defined)
        vsp._path = path
        return vsp

    def __repr__(self) -> str:
        spoken = f"version {self.version >> 8}.{self.version & 0xFF}" if self.version else "no client"
        return f"<StorageVsp {self.offer.instance_id}: {len(self._units)} units, {spoken}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    @property
    def units(self) -> dict[Address, LogicalUnit]:
        """The attached units by (target, lun)."""
        return dict(self._units)

    @property
    def version(self) -> Version | None:
        """The negotiated protocol version, None before."""
        rules = self._negotiation.rules
        return rules.version if rules is not None else None

    @property
    def ready(self) -> bool:
        """Whether the guest has finished the negotiation."""
        return self._negotiation.state is State.READY

    @property
    def violations(self) -> int:
        """Packets on the open channels that broke the protocol."""
        return sum(server.violations for server in list(self._servers.values()))

    def add_disk(self, address: Address, disk: Disk | LogicalUnit) -> LogicalUnit:
        """Attach a disk, also while the guest runs: it is told to look.

        Raises:
            LocalProtocolError: the address is taken or impossible.
            TypeError: it is neither a disk nor a unit.
        """
        if not isinstance(disk, Disk | LogicalUnit):
            raise TypeError(
                f"a storage controller has disks and units, not {disk!r}: open images with open_disk"
            )
        target, lun = address
        if not (0 <= target < 256 and 0 <= lun < 256):
            raise LocalProtocolError(f"target {target}, LUN {lun}: each must be below 256")
        if address in self._units:
            raise LocalProtocolError(f"target {target}, LUN {lun} is taken")
        if isinstance(disk, Disk):
            limits = Limits(max_transfer=self._max_transfer // disk.sector_size)
            serial = uuid5(self.offer.instance_id, f"{target}:{lun}")
            unit: LogicalUnit = DiskUnit(disk, serial, limits=limits)
        else:
            unit = disk
        unit.attach(self.offer.instance_id)
        watcher = partial(self._unit_changed, address)
        unit.watchers.append(watcher)
        self._watchers[address] = watcher
        self._units[address] = unit
        watcher()
        self._notify(Operation.ENUMERATE_BUS)
        return unit

    def remove_disk(self, address: Address) -> LogicalUnit:
        """Detach a disk; on return no request is in it any more. The guest is told to look.

        Raises:
            LocalProtocolError: nothing is attached there.
        """
        unit = self._units.pop(address, None)
        if unit is None:
            raise LocalProtocolError(f"no disk is attached at target {address[0]}, LUN {address[1]}")
        watcher = self._watchers.pop(address)
        unit.watchers.remove(watcher)
        watcher()
        for server in [*self._servers.values(), *self._closing]:
            server.abort(address)
            server.settle()
            server.wait_idle(address)
        unit.detach(self.offer.instance_id)
        # Not REMOVE_DEVICE: the BSDs do nothing about it, and Linux looks for the same changes on both.
        self._notify(Operation.ENUMERATE_BUS)
        return unit

    def open(self, channel: Channel) -> None:
        """Serve a channel that the guest opened; its sub-channel index comes from its offer."""
        server = ChannelServer(channel, self._path)
        if server.index == 0:
            self._negotiation = self._new_negotiation()
        self._servers[server.index] = server
        channel.on_signal = lambda: server.kick(self._run)
        server.kick(self._run)  # packets may have come before we listened

    def close(self, channel: Channel) -> None:
        """Stop serving a channel; on return no request of it is in any disk."""
        index = channel.offer.subchannel_index
        with self._closing_lock:
            server = self._servers.get(index)
            others = [each for each in self._closing if each.channel is channel]
            if server is not None and server.channel is channel:
                self._closing.append(self._servers.pop(index))
            else:
                server = None
        for other in others:  # somebody closes it already
            other.settle()
            other.wait_idle()
        if server is not None:
            try:
                self._end(server)
            finally:
                self._closing.remove(server)

    def _end(self, server: ChannelServer) -> None:
        server.channel.on_signal = None
        server.cancel()
        server.abort()  # a loss of the connection ends its commands (SAM-5 6.3.4)
        server.settle()
        server.cancel()  # what came from its last turn
        server.abort()
        server.wait_idle()
        server.completions.clear()
        if server.index == 0:
            self._negotiation = self._new_negotiation()
            for unit in list(self._units.values()):
                unit.lose(self.offer.instance_id)

    def offer_on(self, host: VmbusHost, *, name: str = "storage") -> Offered:
        """Offer the controller on a child's bus, and its sub-channels when the guest asks for them.

        Args:
            host: the child's bus.
            name: of the device, in the ledger.

        Returns:
            the primary channel's offer; rescind it to take the controller away.
        """
        subs: list[Offered] = []
        wanted = 0
        connection = of_subs = (
            0  # how often the primary channel has closed: now, and when `subs` were offered
        )

        def offer_wanted() -> None:
            nonlocal of_subs
            if of_subs != connection:  # a guest that is back, however soon, is offered all of them anew
                of_subs = connection
                while subs:
                    subs.pop().rescind()
            while len(subs) < wanted:
                subs.append(
                    host.offer(self.offer.subchannel(len(subs) + 1), self.open, self.close, name=name)
                )

        # As a task of its own: the bus must not be asked for anything from inside of serving a channel, because
        # the bus may just be closing that channel and wait for its service to end.
        task = host.hosting.task(f"{name} sub-channels", offer_wanted)

        def create(count: int) -> None:
            nonlocal wanted
            wanted = max(wanted, count)
            host.hosting.ring(task)

        def closed(channel: Channel) -> None:
            nonlocal wanted, connection
            self.close(channel)
            wanted = 0  # a guest that opens the controller again asks for them again
            connection += 1
            host.hosting.ring(task)

        self.create_sub_channels = create
        return host.offer(self.offer, self.open, closed, name=name)

    def shutdown(self) -> None:
        """Close all channels' service and end the worker threads. The disks stay open."""
        for server in list(self._servers.values()):
            self.close(server.channel)
        for pool in (self._management, self._pool, self._pump):
            if pool is not None:
                pool.shutdown()

    def _new_negotiation(self) -> HostNegotiation:
        return HostNegotiation(
            max_sub_channels=self._max_sub_channels,
            max_transfer=self._max_transfer,
            create=self._create if self._max_sub_channels else None,
            versions=self._versions,
        )

    def _create(self, count: int) -> None:
        if self.create_sub_channels is not None:
            self.create_sub_channels(count)

    def _notify(self, notice: Operation) -> None:
        """Send an unsolicited packet (transaction id 0) on the primary channel, once the guest understands it."""
        server = self._servers.get(0)
        rules = self._negotiation.rules
        # Before the negotiation is over the guest has not scanned anything that could have changed.
        if server is not None and self.ready and rules is not None and rules.notifications:
            server.notices.add(notice)
            server.kick(self._run)

    def _run(self, server: ChannelServer) -> None:
        """Move packets until there is nothing to do, or for a turn; called with the server's lock held."""
        channel = server.channel
        incoming = channel.incoming
        turn = TURN
        if server.arrived and server.arrived[0] is server.current:
            self._cancel_begun(server)
        try:
            while channel.is_open and self._servers.get(server.index) is server:
                if turn <= 0:
                    channel.again()
                    return
                turn -= 1
                if not server.flush():
                    return  # the guest's ring is full: it rings when it has made room
                room = MAX_OUTSTANDING - len(server.running)
                if room <= 0:
                    return  # a finishing request comes back here
                incoming.mask()
                if not server.arrived and self._serve_fast(server):
                    continue
                take_packets(
                    incoming.recv_packets, 1 if server.fast_useful else min(_BATCH, room), server.arrived
                )
                taken = len(server.arrived)  # more than those if an exception from outside came the last time
                while server.arrived:
                    server.current = server.arrived[0]
                    self._packet(server, server.current)
                    del server.arrived[0]
                channel.account.packets_received += taken
                if taken:
                    channel.notify(incoming.take_signal())
                elif not incoming.unmask():
                    return
        except RingCorrupt as error:
            guest_log.warning(
                channel.name, "it is corrupt and gets closed: %s", error, scope=channel.log_scope
            )
            self.close(channel)
            channel.close()
        except LocalProtocolError:
            if channel.is_open:
                raise
            # Closed between two of our steps; `close` comes, or has come.

    def _kick_elsewhere(self, server: ChannelServer) -> None:
        """Have packets moved by a thread that has nothing else to do."""
        assert self._pump is not None
        with suppress(RuntimeError):  # shut down: the channel is closed, too
            self._pump.submit(self._kick, server)

    def _kick(self, server: ChannelServer) -> None:
        """Move packets on a thread of our own: nobody else would hear of a defect, so that it ends the channel."""
        try:
            server.kick(self._run)
        except Exception:
            channel = server.channel
            guest_log.exception(
                channel.name, "its server failed; the channel is closed", scope=channel.log_scope
            )
            self.close(channel)
            channel.close()

    def _serve_fast(self, server: ChannelServer) -> bool:
        """Let compiled code serve plain reads and writes; True to come round again, False if a packet is left."""
        if server.fast_stale and self.ready and self._pool is None:
            self._tell_fast(server)
        if not server.fast_useful:
            return False
        fast, channel = server.fast, server.channel
        packets, copied, calls = fast.packets, fast.bytes_copied, fast.backend_calls
        code = fast.serve(_BATCH)
        served = fast.packets - packets
        account = channel.account
        account.packets_received += served
        account.packets_sent += served
        account.bytes_copied += fast.bytes_copied - copied
        account.backend_calls += fast.backend_calls - calls
        if fast.signal:
            fast.signal = False
            channel.signal()
        elif served:
            account.doorbells_suppressed += 1
        if code == FULL:
            # The completion of the packet that waits in our ring does not fit; `flush` goes on from there.
            return channel.outgoing.want_space(PacketHeader.SIZE + MAX_REQUEST_SIZE) and served > 0
        return code == MORE

    def _tell_fast(self, server: ChannelServer) -> None:
        """Tell the compiled server which units it may serve."""
        server.fast_stale = False
        server.fast_useful = False
        for (target, lun), unit in list(self._units.items()):
            if not isinstance(unit, DiskUnit) or not _plain(unit):
                server.fast.disable(target, lun)
                continue
            disk = unit.disk
            access = unit.plain_access(self.offer.instance_id)
            server.fast_useful |= server.fast.enable(
                target,
                lun,
                disk.sector_size,
                disk.sector_count,
                not disk.read_only,
                fd=disk.fd,
                mapping=disk.mapping,
                present=disk.present,
                handler=access.serve,
                batch=access.serve_batch if disk.serve_batch is not None else None,
                most=min(
                    self._max_transfer, unit.limits.max_transfer * disk.sector_size or self._max_transfer
                ),
            )
            if not _plain(
                unit
            ):  # it changed while we were at it, and whoever did that found nothing to disable
                server.fast.disable(target, lun)

    def _unit_changed(self, address: Address) -> None:
        """A unit is no longer what it was: compiled code must not serve it until it is told anew."""
        for server in list(self._servers.values()):
            server.fast.disable(*address)
            server.fast_stale = True

    def _cancel_begun(self, server: ChannelServer) -> None:
        """An exception from outside, as Ctrl-C on this thread, came in the middle of a packet: the guest is told so."""
        packet = server.arrived[0]
        if self._pool is None and not server.answered(packet):
            server.complete(packet, completion_size(packet), NtStatus.CANCELLED, b"")
        del server.arrived[0]

    def _packet(self, server: ChannelServer, packet: Packet) -> None:
        """Take one packet of the guest. A wrong one is answered, never fatal."""
        if packet.type not in (IN_BAND, GPA_DIRECT):
            server.violation(f"a packet of type {packet.type}")
            return
        payload = packet.payload
        size = completion_size(packet)
        try:
            header = PacketHeader.unpack(payload)
            if header.operation == Operation.EXECUTE_SRB and self.ready:
                self._execute_srb(server, packet, _Request(packet, size, parse_scsi_request(payload)))
                return
            server.packet_size = PacketHeader.SIZE + size
            if header.operation in _RESETS and self.ready and not server.index:
                self._manage(server, packet, size, Operation(header.operation))
                return
            status, body = self._control(server, header.operation, payload[PacketHeader.SIZE :])
        except RemoteProtocolError as error:
            server.violation(str(error))
            status, body = NtStatus.INVALID_PARAMETER, b""
        server.complete(packet, size, status, body)

    def _manage(self, server: ChannelServer, packet: Packet, size: int, operation: Operation) -> None:
        """Carry out a reset, on a thread of its own where requests have such threads."""
        address: Address | None = None
        if operation is Operation.RESET_LUN:
            request = ScsiRequest.unpack(packet.payload[PacketHeader.SIZE :].ljust(MAX_REQUEST_SIZE, b"\0"))
            address = request.target_id, request.lun
        if self._management is None:
            server.complete(packet, size, self._reset(operation, address), b"")
            return
        future = self._management.submit(self._reset, operation, address)

        def finished(future: Future[NtStatus]) -> None:
            status = NtStatus.CANCELLED if future.cancelled() else future.result()
            server.complete(packet, size, status, b"")
            server.finished(future)
            self._kick_elsewhere(server)

        server.begun(future, None)
        future.add_done_callback(finished)

    def _control(self, server: ChannelServer, operation: int, payload: bytes) -> tuple[NtStatus, bytes]:
        if server.index:
            return NtStatus.INVALID_DEVICE_STATE, b""  # only the primary channel is for anything but requests
        if operation in _RESETS:
            return NtStatus.INVALID_DEVICE_STATE, b""
        if operation not in list(Operation):
            server.violation(f"operation {operation}, which there is none of")
            return NtStatus.INVALID_DEVICE_REQUEST, b""
        return self._negotiation.receive(operation, payload)

    def _reset(self, operation: Operation, address: Address | None) -> NtStatus:
        """End all commands of one unit or of all of them, whoever sent them, and give the unit attentions."""
        units = dict(self._units)
        if address is not None:
            if address not in units:
                return NtStatus.DEVICE_DOES_NOT_EXIST
            units = {address: units[address]}
        for server in list(self._servers.values()):
            server.cancel(address)
        try:
            for unit in units.values():
                unit.reset(_RESETS[operation])
        except TaskSetBusy:
            return NtStatus.DEVICE_BUSY
        return NtStatus.SUCCESS

    def _execute_srb(self, server: ChannelServer, packet: Packet, request: _Request) -> None:
        scsi = request.scsi
        ranges = packet.ranges
        if scsi.data_transfer_length > (ranges.total if ranges is not None else 0):
            # The data buffer is not there; without it not even an error of the command itself would be right.
            self._respond(server, request, Outcome(ScsiStatus.CHECK_CONDITION, 0, _BAD_BUFFER))
            return
        if scsi.data_transfer_length > self._max_transfer:  # more than the properties of the channel allow
            self._respond(server, request, Outcome(ScsiStatus.CHECK_CONDITION, 0, too_long(scsi)))
            return
        buffer = GuestBuffer(server.channel.memory, ranges, scsi.data_transfer_length)
        cdb = without_lun(scsi.payload[:CDB_SIZE], scsi.lun)
        task = Task(cdb, buffer, self.offer.instance_id, server.channel.account)
        if self._pool is None:
            outcome = Outcome(
                ScsiStatus.TASK_ABORTED
            )  # if an exception from outside comes, as Ctrl-C on this thread
            server.here = (scsi.target_id, scsi.lun), task
            if self._servers.get(server.index) is not server:
                task.aborted = True  # who closes it has looked for requests already
            try:
                outcome = self._carry_out(scsi, task)
            finally:
                server.here = None
                self._respond(server, request, outcome)
            return
        unit = self._unit(scsi)
        if unit is not None:
            unit.tasks.admit(task)
        future = self._pool.submit(self._carry_out, scsi, task)
        task.on_abort = future.cancel
        server.begun(future, ((scsi.target_id, scsi.lun), task))

        def finished(future: Future[Outcome]) -> None:
            if unit is not None:
                unit.tasks.end(task)
            outcome = _ABORTED if future.cancelled() else future.result()
            self._respond(server, request, outcome)
            server.finished(future)
            if (
                future.cancelled()
            ):  # by a command or a reset, perhaps of another controller, that is under way
                self._kick_elsewhere(server)
            else:
                self._kick(server)

        future.add_done_callback(finished)

    def _unit(self, scsi: ScsiRequest) -> LogicalUnit | None:
        """The unit that a request is for; of an IDE accelerator whatever path the guest gave."""
        if self._path is None and scsi.path_id:
            return None
        return self._units.get((scsi.target_id, scsi.lun))

    def _carry_out(self, scsi: ScsiRequest, task: Task) -> Outcome:
        """Find the unit and let it execute the command. Never raises."""
        unit = self._unit(scsi)
        cdb = task.cdb
        try:
            if cdb[0] == Opcode.REPORT_LUNS:
                return Outcome(transferred=self._report_luns(scsi, task))
            if unit is not None:
                return unit.execute(task)
            if cdb[0] == Opcode.INQUIRY and not cdb[1] & 1 and not cdb[2]:
                return Outcome(transferred=task.reply(absent_inquiry(), allocation_length(cdb)))
        except CheckCondition as condition:
            return Outcome(ScsiStatus.CHECK_CONDITION, 0, condition.sense.pack())
        except GuestMemoryError:
            return Outcome(ScsiStatus.CHECK_CONDITION, 0, _BAD_BUFFER)
        return NO_UNIT

    def _report_luns(self, scsi: ScsiRequest, task: Task) -> int:
        """REPORT LUNS for the target that is addressed; single-level addresses (SAM-5 4.7.7.5)."""
        select = task.cdb[2]
        if select > 2:
            raise invalid_field(2)
        # Microsoft's UEFI firmware leaves the allocation length 0 and takes the list all the same, as Hyper-V gives it.
        allocation = allocation_length(task.cdb) or task.data.length
        path = 0 if self._path is None else self._path
        luns = sorted(lun for target, lun in list(self._units) if target == scsi.target_id)
        if select == 1 or scsi.path_id != path:  # well-known units only, of which there are none
            luns = []
        body = b"".join(bytes([0, lun, 0, 0, 0, 0, 0, 0]) for lun in luns)
        return task.reply(len(body).to_bytes(4, "big") + bytes(4) + body, allocation)

    def _respond(self, server: ChannelServer, request: _Request, outcome: Outcome) -> None:
        """Queue the completion of a SCSI request."""
        scsi = request.scsi
        rules = self._negotiation.rules
        sense = outcome.sense
        if sense and scsi.srb_flags & SrbFlags.DISABLE_AUTOSENSE:
            sense, unit = b"", self._unit(scsi)
            if unit is not None:
                unit.retain(self.offer.instance_id, outcome.sense)
        sense = sense[: rules.sense_size if rules is not None else 0]
        status = srb_status(outcome)
        response = ScsiRequest(
            length=request.size,
            srb_status=status | (SrbStatus.AUTOSENSE_VALID if sense else 0),
            scsi_status=outcome.status,
            path_id=scsi.path_id,
            target_id=scsi.target_id,
            lun=scsi.lun,
            cdb_length=CDB_SIZE,
            sense_info_length=len(sense),
            data_in=scsi.data_in,
            data_transfer_length=outcome.transferred,
            payload=sense,
        )
        server.complete(request.packet, request.size, nt_status(status), response.pack())


def _plain(unit: LogicalUnit) -> bool:
    """`LogicalUnit.plain`, which other threads change at any time."""
    return unit.plain
