"""The host's VMBus of one child: the control-plane machine wired to a hypervisor.

Messages come in through message ports, go out through the child's SynIC; GPADLs are mapped, rings opened, event
ports made. All of it runs in whatever thread the guest's hypercall or the provider's call came from, under one
lock per child; what rings a channel runs as a task of the hosting.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, Self
from uuid import UUID

from vmbus.bus import actions as act
from vmbus.bus import wire
from vmbus.bus.channel import Channel, Gpadl
from vmbus.bus.codec import message_name, message_number
from vmbus.bus.held_pages import HeldPages
from vmbus.bus.host import HostMachine
from vmbus.bus.hosting import Hosting, Task, hosting_of
from vmbus.bus.monitor import HostMonitor
from vmbus.bus.offer import Offer
from vmbus.bus.outbox import Outbox
from vmbus.bus.versions import SUPPORTED_FEATURES, FeatureFlags, Version, version_name
from vmbus.bus.wire import MessageType
from vmbus.core.dispatch import EventFlags
from vmbus.core.memory import PAGE_SIZE, READ, WRITE, GpaRanges, Window
from vmbus.core.ring import RingReader, RingWriter
from vmbus.errors import BudgetExceeded, GuestMemoryError, HypercallError, RemoteProtocolError, VmbusError
from vmbus.hypervisor import GuestFault, Hypervisor, Partition, PartitionEvent, VpSuspended
from vmbus.trace.events import EventTrace
from vmbus.trace.guest_log import GuestLog
from vmbus.trace.ledger import Account

__all__ = ["Offered", "VmbusHost"]

log = logging.getLogger(__name__)
guest_log = GuestLog(log)

FAILURES: Final = (VmbusError, OSError, MemoryError)
"""What the work for one guest may end in, its own fault or the host's lack of something: that guest has the loss."""
FROM_HOST_SINT: Final = 0
FROM_GUEST_SINT: Final = 8
"""The halves of the shared interrupt page, as event-flag pages count them: 2 KiB are eight SINTs of 256 bytes."""


class Offered:
    """An offer as its provider holds it.

    Attributes:
        offer: what was offered.
        offer_id: the host's number of it.
        name: the device's name in the ledger.
        channel: the open channel, or None.
    """

    def __init__(
        self,
        host: "VmbusHost",
        offer: Offer,
        name: str,
        on_open: Callable[[Channel], None] | None,
        on_close: Callable[[Channel], None] | None,
    ) -> None:
        self._host = host
        self.offer = offer
        self.name = name
        self.on_open = on_open
        self.on_close = on_close
        self.offer_id = 0
        self.channel: Channel | None = None
        self.task: Task | None = None
        self.unfinished = (
            False  # the task runs again because the provider asked for it, not because the guest rang
        )
        self.request: act.OpenRequest | None = None
        self.windows: tuple[Window, ...] = ()
        self.told = False  # `on_open` was called for the channel: so `on_close` has to be
        self.ring_serial = 0
        """The host's number of the GPADL that the rings of the open channel are in."""

    @property
    def is_present(self) -> bool:
        """Whether it is offered: not rescinded, or not released by the guest since."""
        return self._host.offered.get(self.offer_id) is self

    @property
    def account(self) -> Account:
        """Where the device counts in the ledger."""
        return self._host._account(self)

    def rescind(self) -> None:
        """Take the offer back (a primary channel's sub-channels first); an open channel closes now."""
        self._host.rescind(self)


class VmbusHost:
    """One child's VMBus, in its parent.

    Args:
        hypervisor: the instance.
        child: whose bus this is; a child has one.
        versions: the versions that this host speaks.
        features: the feature flags that it grants.
        hosting: ``"inline"`` (the default), ``"threads"``, ``"processes"`` or a `Hosting`; one for all buses of an
            instance.
        trace: where to record messages, doorbells, opens and closes.
        on_tl_connect: hv_sock: ``on_tl_connect(endpoint_id, service_id, silo_id)`` offers a channel and returns True,
            or refuses with False.

    Raises:
        HypercallError: the child has a bus already (INVALID_CONNECTION_ID), or is gone.
        ValueError: no such hosting, or the instance's buses have another one.

    Attributes:
        machine: the control plane's state.
        violations: messages of the guest that were refused.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        child: Partition,
        *,
        versions: frozenset[int] = frozenset(Version),
        features: int = SUPPORTED_FEATURES,
        hosting: Hosting | str | None = None,
        trace: EventTrace | None = None,
        on_tl_connect: Callable[[UUID, UUID, UUID], bool] | None = None,
    ) -> None:
        self.hypervisor = hypervisor
        self.child = child
        self.hosting = hosting_of(hypervisor, hosting)
        self.machine = HostMachine(
            child.memory.size >> 12,
            len(child.vps),
            versions=versions,
            features=features,
            meter=child.meter,
        )
        self.offered: dict[int, Offered] = {}
        self.violations = 0
        self.on_tl_connect = on_tl_connect
        self._trace = trace
        self._parent_name = child.parent.name if child.parent is not None else "root"
        self._lock = threading.RLock()
        self._todo: deque[act.HostAction] = deque()
        self._performing = False
        self._outbox = Outbox(
            hypervisor, child, self._lock, self.hosting, is_read=self._is_read, on_room=self._interrupt_again
        )
        self._unrung: set[Channel] = set()
        """Channels whose guest could not be interrupted."""
        self._gpadls: dict[int, Gpadl] = {}
        self._held = HeldPages(child.memory.size >> 12)
        self._by_flag: dict[int, Offered] = {}
        self._event_ports: set[int] = set()
        self._to_guest_flags: EventFlags | None = None
        self._from_guest_flags: EventFlags | None = None
        self.monitor = HostMonitor(hypervisor.clock, child.memory, self._monitored)
        self._closed = False
        for connection_id in (wire.MESSAGE_CONNECTION_ID, wire.MESSAGE_CONNECTION_ID_V5):
            hypervisor.create_message_port(child, connection_id, self._taker(connection_id))
        self._previous_on_event = child.on_event
        child.on_event = self._on_partition_event
        child.page_watchers.append(self._on_page_taken)

    def __repr__(self) -> str:
        spoken = f"version {self.version >> 16}.{self.version & 0xFFFF}" if self.version else "not connected"
        return f"<VmbusHost of {self.child.name!r}: {spoken}, {len(self.offered)} offers>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the provider's side -------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The version agreed on with the guest, 0 if none."""
        return self.machine.version

    @property
    def features(self) -> FeatureFlags:
        """The feature flags that hold."""
        return self.machine.features

    @property
    def channels(self) -> list[Channel]:
        """The channels that are open now."""
        return [o.channel for o in list(self.offered.values()) if o.channel is not None]

    def offer(
        self,
        offer: Offer,
        on_open: Callable[[Channel], None] | None = None,
        on_close: Callable[[Channel], None] | None = None,
        *,
        name: str = "",
    ) -> Offered:
        """Offer a channel to the guest.

        Args:
            offer: the channel.
            on_open: called with the host's end when the guest opens it; a `VmbusError` from it refuses the open.
                It sets `Channel.on_signal`.
            on_close: called with that end when it has closed, for whatever reason. Its rings are not used by the
                guest any more then; work in other threads must have ended when this returns.
            name: of the device, in the ledger.

        Raises:
            LocalProtocolError: it is offered already, or there are 2047.
        """
        offered = Offered(self, offer, name or f"device-{offer.instance_id}", on_open, on_close)
        with self._lock:
            offered.offer_id, actions = self.machine.offer(offer)
            self.offered[offered.offer_id] = offered
            log.info("%s is offered %s: %r", self.child.name, offered.name, offer)
            self._perform(actions)
        return offered

    def rescind(self, offered: Offered) -> None:
        """Take an offer back; `Offered.rescind`."""
        with self._lock:
            log.info("%s: the offer of %s is taken back", self.child.name, offered.name)
            self._perform(self.machine.rescind(offered.offer_id))

    def reset(self) -> None:
        """The guest restarts: every channel closes, its memory is let go; the offers stay."""
        with self._lock:
            self._outbox.clear()
            self._perform(self.machine.reset())

    def close(self) -> None:
        """Rescind everything and leave the bus: the child can reach it no more."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            defect: BaseException | None = None
            ends: list[Callable[[], list[act.HostAction]]] = [self.machine.reset]
            ends += [partial(self.machine.rescind, offer_id) for offer_id in self.offered]
            for end in ends:
                try:
                    self._perform(end())
                except (
                    BaseException
                ) as error:  # a provider's, in `on_close`: the rest has to end all the same
                    defect = defect or error
            self._outbox.close()
            for connection_id in (wire.MESSAGE_CONNECTION_ID, wire.MESSAGE_CONNECTION_ID_V5):
                with suppress(HypercallError):  # gone with the child
                    self.hypervisor.delete_port(self.child, connection_id)
            self.child.on_event = self._previous_on_event
            self.child.page_watchers.remove(self._on_page_taken)
            if defect is not None:
                raise defect

    def _on_partition_event(self, event: PartitionEvent) -> None:
        try:
            if event.kind == "destroyed":
                self.close()
            elif event.kind == "reset":
                self.reset()
        finally:
            self.hosting.progressed()  # a guest in this process that waits for an answer gets none any more
            if self._previous_on_event is not None:
                self._previous_on_event(event)

    def _on_page_taken(self, gpa: int) -> None:
        """A page of the child's is not its own any more: channels whose rings or windows hold on to it end.

        What goes by guest physical addresses - GPA-direct packets, GPADLs without a window - finds what lies there
        now, with the rights that the child has now.
        """
        with self._lock:
            for serial in self._held.holders(gpa // PAGE_SIZE):
                gpadl = self._gpadls.get(serial)
                owner = self.machine.gpadl_owner(serial)
                offered = self.offered.get(owner) if owner is not None else None
                if gpadl is None or offered is None:
                    continue  # it ended with the one before
                if gpadl.is_mapped or (offered.channel is not None and offered.ring_serial == serial):
                    self._warn("%s loses page 0x%x and ends", offered.name, gpa)
                    self.rescind(offered)
                    gpadl.close()

    # -- the guest's side ----------------------------------------------------------------------------------

    def _taker(self, connection_id: int) -> Callable[[int, int, bytes], None]:
        def take(vp_index: int, message_type: int, payload: bytes) -> None:
            self._on_message(connection_id, message_type, payload)

        return take

    def _on_message(self, connection_id: int, message_type: int, payload: bytes) -> None:
        if self._trace is not None:
            self._record_message(self.child.name, self._parent_name, payload)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s says %s", self.child.name, message_name(int.from_bytes(payload[:4], "little")))
        with self._lock:
            try:
                if message_type != wire.VMBUS_MESSAGE_TYPE:
                    raise RemoteProtocolError(f"a message of type {message_type} on the bus")
                self.machine.vp_count = len(
                    self.child.vps
                )  # its parent may have made some since (HvCallCreateVp)
                actions = self.machine.receive(payload, connection_id)
            except RemoteProtocolError:
                self.violations += 1
                raise
            self._perform(actions)

    def _perform(self, actions: list[act.HostAction]) -> None:
        """Carry out actions in order; those that come up meanwhile (a provider that rescinds in `on_open`) after."""
        self._todo += actions
        if self._performing:
            return
        defect: BaseException | None = None
        with self.hosting.held():
            self._performing = True
            try:
                while self._todo:
                    action = self._todo.popleft()
                    try:
                        self._do(action)
                    except FAILURES as error:
                        # One thing that fails (a provider's, or pages that are gone) must not stop the others.
                        self._warn("%s: %s", type(action).__name__, error)
                    except BaseException as error:
                        # A defect of the provider, or Ctrl-C in it: that is for our caller, when all is done. The
                        # guest gets its answer in any case.
                        defect = defect or error
                    else:
                        continue
                    try:
                        self._failed(action)
                    except BaseException as error:  # a second one, of the same provider's end
                        defect = defect or error
            finally:
                self._performing = False
        if defect is not None:
            raise defect

    def _failed(self, action: act.HostAction) -> None:
        """An action could not be carried out: whoever waits for it is refused, and a channel that needs it ends."""
        machine = self.machine
        match action:
            case act.MapGpadl():
                self._todo += machine.complete_gpadl(action.serial, False)
            case act.OpenDevice():
                self._todo += machine.complete_open(action.serial, False)
                with suppress(*FAILURES):
                    self._close(self.offered[action.offer_id])
            case act.Retarget():
                self._todo += machine.rescind(action.offer_id)
            case act.Established():
                self._unsay(MessageType.VERSION_RESPONSE)
                self._todo += machine.refuse_connection()
            case act.UseMonitorPages():
                self._unsay(MessageType.MODIFY_CONNECTION_RESPONSE)
                self._todo += machine.refuse_monitor_pages(action.previous)
            case act.TlConnect():
                self._todo += machine.refuse_tl_connect(action.endpoint_id, action.service_id)
            case act.CloseDevice() | act.UnmapGpadl() | act.OfferGone() | act.Disconnected():
                with suppress(*FAILURES):
                    self._do(action)  # the end of something: what of it has not been done is done now
            case act.Send():
                pass  # the outbox keeps what cannot be sent

    def _unsay(self, kind: MessageType) -> None:
        """Take back the message of that type that was about to be sent."""
        for action in self._todo:
            if isinstance(action, act.Send) and int.from_bytes(action.payload[:4], "little") == kind:
                self._todo.remove(action)
                return

    def _do(self, action: act.HostAction) -> None:
        match action:
            case act.Send():
                self._send(action)
            case act.OpenDevice():
                self._open(action)
            case act.CloseDevice():
                self._close(self.offered[action.offer_id])
            case act.MapGpadl():
                self._map(action)
            case act.UnmapGpadl():
                gpadl = self._gpadls.pop(action.serial, None)
                if gpadl is not None:
                    gpadl.close()
            case act.Established():
                self._established(action)
            case act.Disconnected():
                self._disconnected(action)
            case act.UseMonitorPages():
                self.monitor.use(action.pages)
            case act.Retarget():
                channel = self.offered[action.offer_id].channel
                if channel is not None:
                    channel.target_vp = action.target_vp
                    if channel in self._unrung:  # the old processor could not be interrupted
                        self._unrung.discard(channel)
                        self.ring(channel)
            case act.OfferGone():
                self.offered.pop(action.offer_id, None)
            case act.TlConnect():
                connect = self.on_tl_connect
                if connect is None or not connect(action.endpoint_id, action.service_id, action.silo_id):
                    self._todo += self.machine.refuse_tl_connect(action.endpoint_id, action.service_id)

    # -- messages ------------------------------------------------------------------------------------------

    def _send(self, action: act.Send) -> None:
        if self._trace is not None:
            self._record_message(self._parent_name, self.child.name, action.payload)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s is told %s", self.child.name, message_name(message_number(action.payload)))
        try:
            self._outbox.send(action)
        except BudgetExceeded as error:
            self._warn("it does not read its messages; its connection is reset: %s", error)
            self._outbox.clear()
            self._todo += self.machine.reset()

    def _is_read(self, vp: int, sint: int) -> bool:
        return bool(self.machine.version) and (vp, sint) == self.machine.message_target

    def _interrupt_again(self) -> None:
        """Ring the channels whose guest could not be interrupted before; several processors may make room at once.

        One that is refused again waits for the next time. The others may be another processor's.
        """
        for channel in list(self._unrung):
            self._unrung.discard(channel)
            self.ring(channel)

    def _warn(self, message: str, *args: object) -> None:
        guest_log.warning(self.child.name, message, *args, scope=self.hypervisor.log_scope)

    def _record_message(self, source: str, target: str, payload: bytes) -> None:
        assert self._trace is not None
        kind = message_name(int.from_bytes(payload[:4], "little"))
        self._record("message", source, target, type=kind, bytes=payload[8:].hex() or "-")

    def _record(self, kind: str, source: str, target: str, **particulars: object) -> None:
        if self._trace is not None:
            with suppress(
                OSError, MemoryError
            ):  # then it is not in the trace; what it tells of happens all the same
                self._trace.record(self.hypervisor.clock.now(), source, target, kind, **particulars)

    # -- the connection ------------------------------------------------------------------------------------

    def _established(self, action: act.Established) -> None:
        self._record("connect", self.child.name, self._parent_name, version=version_name(action.version))
        log.info("%s speaks VMBus %s", self.child.name, version_name(action.version))
        if action.version < Version.V2_4:
            self._make_event_port(wire.EVENT_CONNECTION_ID, self._on_shared_event)
        if action.interrupt_page is not None:
            memory, page = self.child.memory, action.interrupt_page
            self._to_guest_flags = EventFlags(memory, page, FROM_HOST_SINT)
            self._from_guest_flags = EventFlags(memory, page, FROM_GUEST_SINT)
        try:
            self.monitor.use(action.monitor_pages)
        except GuestMemoryError as error:  # taken from it: what rings by hypercall is served all the same
            self._warn("its monitor pages cannot be used: %s", error)
            self.monitor.use(None)

    def _disconnected(self, action: act.Disconnected) -> None:
        # What was said to somebody who is gone; reserved channels outlive the connection.
        self._outbox.clear(keep=frozenset({MessageType.CLOSE_RESERVED_RESPONSE}))
        kind = "unload" if action.unloaded else "disconnect"
        self._record(kind, self.child.name, self._parent_name)
        log.info("%s: its connection is over (%s)", self.child.name, kind)
        self._delete_event_port(wire.EVENT_CONNECTION_ID)
        self._to_guest_flags = self._from_guest_flags = None
        self.monitor.use(None)

    def _make_event_port(self, connection_id: int, handler: Callable[[int], None]) -> None:
        self.hypervisor.create_event_port(self.child, connection_id, handler)
        self._event_ports.add(connection_id)

    def _delete_event_port(self, connection_id: int) -> None:
        if connection_id in self._event_ports:
            with suppress(HypercallError):  # gone with the child
                self.hypervisor.delete_port(self.child, connection_id)
            self._event_ports.discard(connection_id)

    # -- channels ------------------------------------------------------------------------------------------

    def _map(self, action: act.MapGpadl) -> None:
        memory = self.child.memory
        try:
            ranges = GpaRanges.parse(action.data, action.count)
            for part in ranges:
                for pfn in part.pfns:
                    if pfn >= memory.size >> 12 or memory.access(pfn << 12) & (READ | WRITE) != READ | WRITE:
                        raise RemoteProtocolError(f"GPADL {action.gpadl_id:#x} names page {pfn:#x}")
        except (VmbusError, OverflowError) as error:
            log.debug("%s: %s", self.child.name, error)
            self._todo += self.machine.complete_gpadl(action.serial, False)
            return
        self._gpadls[action.serial] = Gpadl(action.gpadl_id, ranges, memory, self._held, action.serial)
        self._todo += self.machine.complete_gpadl(action.serial, True)

    def _open(self, action: act.OpenDevice) -> None:
        offered, request = self.offered[action.offer_id], action.request
        try:
            self._open_rings(offered, action.channel_id, request)
            channel = offered.channel
            assert channel is not None
            offered.told = True
            if offered.on_open is not None:
                offered.on_open(channel)
        except FAILURES as error:
            self._warn("%s cannot be opened: %s", offered.name, error)
            self._todo += self.machine.complete_open(action.serial, False)
            self._close(offered)
            return
        self._record(
            "open", self.child.name, self._parent_name, device=offered.name, channel=action.channel_id
        )
        log.info("%s opened channel %d to %s", self.child.name, action.channel_id, offered.name)
        self._todo += self.machine.complete_open(action.serial, True)

    def _open_rings(self, offered: Offered, channel_id: int, request: act.OpenRequest) -> None:
        known = self.machine.offered(offered.offer_id)
        assert known is not None
        ring = known.reserved_gpadl or self.machine.gpadl(request.gpadl_id)
        assert ring is not None
        pfns = self._gpadls[ring.serial].pfns
        # Before they are mapped: should a page be taken from the guest meanwhile, the channel is found and ends.
        self._held.hold(ring.serial, pfns)
        try:
            channel = self._rings(offered, channel_id, request, pfns)
        except BaseException:
            self._held.let_go(ring.serial)
            raise
        offered.channel, offered.request, offered.ring_serial = channel, request, ring.serial
        task = offered.task = self.hosting.task(
            f"{self.child.name}/{offered.name}", lambda: self._serve(offered, channel)
        )
        self._by_flag[channel_id] = offered
        # The port exists before the guest learns that the channel is open: a guest may ring at once, and hosts that
        # were slower than that have lost its first interrupt.
        self._make_event_port(request.connection_id, lambda flag: self.hosting.ring(task))
        if known.is_monitored and known.monitor_id is not None:
            self.hosting.keep_time(self.hypervisor.clock)
            self.monitor.watch(
                known.monitor_id, offered.offer.monitor_latency or 0, request.connection_id, task.name
            )

    def _rings(
        self, offered: Offered, channel_id: int, request: act.OpenRequest, pfns: Sequence[int]
    ) -> Channel:
        """Map the two rings; the channel over them."""
        memory = self.child.memory
        up = memory.window(pfns[: request.downstream_page])
        down = memory.window(pfns[request.downstream_page :])
        channel = Channel(
            self,
            offered.offer,
            RingWriter(down),
            RingReader(up),
            memory=memory,
            account=self._account(offered),
            channel_id=channel_id,
            user_data=request.user_data,
            target_vp=request.target_vp if request.target_vp is not None else -1,
            name=f"{self.child.name}/{offered.name}",
            log_scope=self.hypervisor.log_scope,
        )
        offered.windows = (up, down)
        return channel

    def _account(self, offered: Offered) -> Account:
        return self.hypervisor.ledger.account(self._parent_name, f"{self.child.name}/{offered.name}")

    def _close(self, offered: Offered) -> None:
        channel, request = offered.channel, offered.request
        if channel is None or request is None:
            return
        known = self.machine.offered(offered.offer_id)
        if known is not None and known.monitor_id is not None:
            self.monitor.unwatch(known.monitor_id)
        self._delete_event_port(request.connection_id)
        self._by_flag.pop(channel.channel_id, None)
        self._unrung.discard(channel)
        if offered.task is not None:
            self.hosting.drop(offered.task)
        offered.channel = offered.request = offered.task = None
        self._record(
            "close", self._parent_name, self.child.name, device=offered.name, channel=channel.channel_id
        )
        log.info("%s: channel %d to %s is closed", self.child.name, channel.channel_id, offered.name)
        told, offered.told = offered.told, False
        windows, offered.windows = offered.windows, ()
        try:  # whatever of it fails, the rest is done
            channel.ended()
        finally:
            try:
                if offered.on_close is not None and told:
                    offered.on_close(channel)
            finally:
                self._held.let_go(offered.ring_serial)
                for window in windows:
                    with suppress(BufferError):  # its rings are still referred to; it goes with them
                        window.close()

    def _serve(self, offered: Offered, channel: Channel) -> None:
        """A channel was rung: its provider reads it. What the guest gets wrong there costs this channel only."""
        if offered.unfinished:
            offered.unfinished = False
        else:
            self._record("doorbell", self.child.name, self._parent_name, channel=channel.channel_id)
        try:
            channel.deliver_signal()
        except (GuestFault, VpSuspended):
            self.again(channel)  # on one thread the guest's handler runs inside of ours: it was stopped there
            raise
        except FAILURES as error:
            self._warn("%s is taken away: %s", offered.name, error)
            self.rescind(offered)
        except Exception as error:
            # A defect of the provider. Its channel would wait for it for ever, with the guest's doorbells masked.
            self._warn("%s is taken away: its provider failed: %s", offered.name, repr(error))
            self.rescind(offered)
            raise
        except BaseException:
            self.again(channel)  # Ctrl-C ends what its user does, not what the guest does
            raise

    def _on_shared_event(self, flag: int) -> None:
        """Before 2.4: the guest's half of the interrupt page says which channels it rang."""
        flags = self._from_guest_flags
        if flags is None:
            return
        for channel_id in flags.take():
            self._rung(channel_id)

    def _rung(self, channel_id: int) -> None:
        offered = self._by_flag.get(channel_id)
        task = offered.task if offered is not None else None
        if task is not None:
            self.hosting.ring(task)

    def _monitored(self, connection_id: int) -> None:
        """A monitored notification came due: as if the guest had signalled that connection itself."""
        for offered in list(self._by_flag.values()):
            channel, request = offered.channel, offered.request
            if channel is not None and request is not None and request.connection_id == connection_id:
                self._rung(channel.channel_id)

    # -- ChannelOwner --------------------------------------------------------------------------------------

    def ring(self, channel: Channel) -> None:
        """Interrupt the guest for this channel. Takes no lock: the channel may be closing on another thread."""
        offered = self._by_flag.get(channel.channel_id)
        request = offered.request if offered is not None else None
        if request is None or channel.target_vp < 0:
            return
        self._record("doorbell", self._parent_name, self.child.name, channel=channel.channel_id)
        vp, flag = channel.target_vp, request.event_flag
        if self.machine.version < Version.V2_4:
            flags = self._to_guest_flags
            if flags is None:
                return
            flags.set(flag)
            vp, flag = 0, 0
        try:
            self.hypervisor.signal_event(self.child, vp, wire.VMBUS_SINT, flag)
        except (
            HypercallError
        ):  # the guest has disabled its event flags page or the SynIC: it hears of it afterwards
            if channel not in self._unrung:
                self._unrung.add(channel)
                self._outbox.watch(vp)
                with suppress(HypercallError):  # it may have done so in between
                    self.hypervisor.signal_event(self.child, vp, wire.VMBUS_SINT, flag)
                    self._unrung.discard(channel)

    def again(self, channel: Channel) -> None:
        """Run the channel's task once more; nobody rang."""
        offered = self._by_flag.get(channel.channel_id)
        task = offered.task if offered is not None and offered.channel is channel else None
        if offered is not None and task is not None:
            offered.unfinished = True
            self.hosting.ring(task)

    def wait(self, channel: Channel, condition: Callable[[], bool], timeout: float) -> bool:
        """Let others work until the condition holds."""
        return self.hosting.wait_for(condition, timeout)

    def close_channel(self, channel: Channel) -> None:
        """The provider gives the channel up: the offer is rescinded, which closes it."""
        offered = self._by_flag.get(channel.channel_id)
        if offered is not None and offered.channel is channel:
            self.rescind(offered)

    def find_gpadl(self, channel: Channel, gpadl_id: int) -> Gpadl:
        """A GPADL of this channel; takes no lock, since providers call it from their own threads."""
        known = self.machine.gpadl(gpadl_id)
        offered = self._by_flag.get(channel.channel_id)
        gpadl = None
        if known is not None and offered is not None and known.offer_id == offered.offer_id:
            gpadl = self._gpadls.get(known.serial)
        if gpadl is None:
            raise RemoteProtocolError(f"channel {channel.channel_id} has no GPADL {gpadl_id:#x}")
        return gpadl

    def make_gpadl(self, channel: Channel, ranges: GpaRanges) -> int:
        """Only guests describe memory."""
        raise NotImplementedError("GPADLs are made by the guest's end")

    def drop_gpadl(self, channel: Channel, gpadl_id: int) -> None:
        """Only guests take memory back."""
        raise NotImplementedError("GPADLs are torn down by the guest's end")
