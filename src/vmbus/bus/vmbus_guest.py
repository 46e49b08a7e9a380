"""A guest's VMBus driver over a virtual processor: what Linux's ``hv_vmbus`` does, for model guests.

It uses only what a real processor offers - hypercalls, MSRs, interrupts, its own memory - so that it runs against
any host that keeps to the protocol, in the same process or through a socket.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Self, TypeVar
from uuid import UUID

from vmbus.bus import actions as act
from vmbus.bus import wire
from vmbus.bus.channel import Channel, Gpadl
from vmbus.bus.guest import GuestChannel, GuestMachine
from vmbus.bus.guest_processor import VECTOR, GuestProcessor, ProcessorPort, spoken_versions, surroundings
from vmbus.bus.hosting import Hosting
from vmbus.bus.monitor import pending_bit
from vmbus.bus.offer import Offer
from vmbus.bus.pages import PageAllocator
from vmbus.bus.transitions import ChannelState, GpadlState, LinkState
from vmbus.bus.versions import SUPPORTED_FEATURES, FeatureFlags, Version
from vmbus.core.dispatch import EventFlags
from vmbus.core.memory import PAGE_SIZE, GpaRanges, GuestMemory, Window
from vmbus.core.ring import RingReader, RingWriter
from vmbus.errors import HypercallError, LocalProtocolError, RemoteProtocolError, RingCorrupt
from vmbus.hypervisor import GuestFault, VirtualProcessor, VpSuspended
from vmbus.hypervisor.tlfs import LINUX_GUEST_OS_ID, CallCode, Msr, Status
from vmbus.trace.guest_log import GuestLog, new_scope
from vmbus.trace.ledger import Account

__all__ = ["GuestProcessor", "VmbusGuest"]

log = logging.getLogger(__name__)
guest_log = GuestLog(log)

T = TypeVar("T")

NO_GUID: Final = UUID(int=0)
SUSPENSION_LIMIT: Final = 3600.0
"""Seconds that an exit waits, where time is the host's, for its suspended processor to run again."""
SIGNAL_EVENT: Final = int(CallCode.SIGNAL_EVENT) | 1 << 16
"""Hypercall control of HvSignalEvent with its input in registers (bit 16: fast, TLFS 4.7)."""
FROM_HOST_SINT: Final = 0
FROM_GUEST_SINT: Final = 8
"""The halves of the shared interrupt page, as event-flag pages count them."""


class VmbusGuest:
    """The VMBus driver of one model guest.

    Args:
        processors: its virtual processors, or the first one (a `VirtualProcessor`, whose partition has the rest).
        memory: the guest's memory; a `VirtualProcessor` knows it.
        versions: what to ask for, best first; by default what the partition's personality speaks, or else everything
            from 6.0 down.
        features: feature flags to ask for with 6.0.
        client_id: who this driver is, with 6.0.
        monitored: ring by monitored notification where the host offers it.
        hosting: where the interrupt handler runs; that of the hypervisor by default.
        pages: where the driver takes its pages from; by default the guest's memory above 1 MiB.
        account: where channels count; the partition's ledger account ``vmbus`` by default.

    Attributes:
        machine: the control plane's state.
        pages: the page allocator, which device drivers of the model guest use too.
        violations: messages of the host that were refused.
        killed: whoever runs the guest has given it up; it waits for nothing any more.
        on_offer: called with each `Offer` that comes.
        on_rescind: called with an `Offer` that the host took back, after its channel (if open) has closed.
        on_tl_result: called with a `vmbus.bus.actions.TlConnectAnswered`.

    Raises:
        LocalProtocolError: the partition's guest operating system has no VMBus driver.
        ValueError: no versions.
        TypeError: processors of another process come without memory and hosting.
        MemoryError: the guest has too few pages.
    """

    def __init__(
        self,
        processors: GuestProcessor | Sequence[GuestProcessor],
        memory: GuestMemory | None = None,
        *,
        versions: Sequence[int] | None = None,
        features: int = SUPPORTED_FEATURES,
        client_id: UUID = NO_GUID,
        monitored: bool = True,
        hosting: Hosting | None = None,
        pages: PageAllocator | None = None,
        account: Account | None = None,
    ) -> None:
        if versions is None:
            versions = spoken_versions(processors)
        vps, memory, hosting, account = surroundings(processors, memory, hosting, account)
        self.memory = memory
        self.hosting = hosting
        self._partition = vps[0].partition if isinstance(vps[0], VirtualProcessor) else None
        self.killed = False
        self.account = account
        self.pages = pages or PageAllocator.above(memory, 1 << 20)
        self.violations = 0
        self._log_scope = new_scope()
        self.on_offer: Callable[[Offer], None] | None = None
        self.on_rescind: Callable[[Offer], None] | None = None
        self.on_tl_result: Callable[[act.TlConnectAnswered], None] | None = None
        self._lock = threading.RLock()
        self._ports: list[ProcessorPort] = []
        self._channels: dict[int, Channel] = {}
        self._by_flag: dict[int, Channel] = {}
        self._rings: dict[int, tuple[list[int], Window, Window]] = {}
        self._winding_up: set[int] = set()
        self._answers: dict[tuple[str, int], int] = {}
        self._refused: str | None = None
        self._unfinished: deque[Channel] = deque()
        self._busy: dict[
            Channel, bool
        ] = {}  # channels whose drivers run now, and whether they were rung meanwhile
        self._gate = threading.Lock()
        self._calls: deque[Callable[[], None]] = deque()
        self._calling = threading.Lock()
        self._driver_pages = self.pages.allocate(5)
        hypercall, self._input, interrupts, down, up = (pfn * PAGE_SIZE for pfn in self._driver_pages)
        for gpa in (interrupts, down, up):
            memory.write(gpa, bytes(PAGE_SIZE))
        self._from_host = EventFlags(memory, interrupts, FROM_HOST_SINT)
        self._from_guest = EventFlags(memory, interrupts, FROM_GUEST_SINT)
        self._monitor = EventFlags(memory, up, 0)
        self.machine = GuestMachine(
            versions,
            features=features,
            client_id=client_id,
            interrupt_page=interrupts,
            monitor_pages=act.MonitorPages(down, up) if monitored else None,
        )
        if not vps[0].rdmsr(Msr.HYPERCALL) & 1:
            vps[0].wrmsr(Msr.GUEST_OS_ID, LINUX_GUEST_OS_ID)
            vps[0].wrmsr(Msr.HYPERCALL, hypercall | 1)
        for vp in vps:
            port = ProcessorPort(vp, memory, self.pages)
            port.task = hosting.task(f"guest vp{vp.index}", lambda port=port: self._on_interrupt(port))  # type: ignore[misc]
            vp.on_interrupt = lambda task=port.task: hosting.ring(task)
            if isinstance(vp, VirtualProcessor):  # its exits wait here while its parent has suspended it
                vp.on_stall = lambda runs: hosting.wait_for(runs, SUSPENSION_LIMIT)
                vp.on_resume = hosting.progressed
            self._ports.append(port)

    # -- the connection ------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The version agreed on, 0 if none."""
        return self.machine.version

    @property
    def features(self) -> FeatureFlags:
        """The feature flags that hold."""
        return self.machine.features

    @property
    def offers(self) -> list[Offer]:
        """The offers that can be opened now, by channel id."""
        known = self.machine.channels
        return [known[n].offer for n in sorted(known) if known[n].state is not ChannelState.RESCINDED]

    def __repr__(self) -> str:
        version = self.machine.version
        spoken = f"version {version >> 16}.{version & 0xFFFF}" if version else "not connected"
        return f"<VmbusGuest: {spoken}, {len(self.offers)} offers, {len(self._channels)} channels open>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self, versions: Sequence[int] | None = None) -> int:
        """Agree on a version and learn the offers. A connection that exists ends, as when a crash kernel takes over.

        Returns:
            the version.

        Raises:
            RemoteProtocolError: the host refuses, or does not answer.
        """
        with self._lock:
            self._refused = None
            self._abandon_channels()
            self._post(self.machine.connect(versions))
        self._await(lambda: self._refused is not None or self.machine.version != 0, "INITIATE_CONTACT")
        if self._refused is not None:
            raise RemoteProtocolError(self._refused)
        with self._lock:
            self._post(self.machine.request_offers())
        self._await(lambda: self.machine.state is LinkState.READY, "REQUEST_OFFERS")
        return self.machine.version

    def disconnect(self) -> None:
        """Close every channel and unload.

        Raises:
            RemoteProtocolError: the host does not answer.
        """
        for channel in list(self._channels.values()):
            channel.close()
        with self._lock:
            if self.machine.version == 0:
                return
            self._post(self.machine.unload())
        self._await(lambda: self.machine.state is LinkState.IDLE, "UNLOAD")

    @property
    def lost(self) -> bool:
        """The guest was killed, or its partition was reset or destroyed under it: nobody answers it any more."""
        return self.killed or (self._partition is not None and not self._partition.hypercalls_enabled)

    def close(self) -> None:
        """Unload and let go of processors and memory."""
        with suppress(RemoteProtocolError, HypercallError):
            self.disconnect()
        self.abandon()

    def abandon(self) -> None:
        """Let go of processors and memory without a word to the host, as a guest that is killed does."""
        with self._lock:
            self._abandon_channels()
        for port in self._ports:
            if port.task is not None:
                self.hosting.drop(port.task)
            port.close()
            self.pages.free(port.pages)
        self._ports.clear()
        self._from_host = self._from_guest = self._monitor = None  # type: ignore[assignment]
        self.pages.free(self._driver_pages)
        self._driver_pages = []

    def _abandon_channels(self) -> None:
        for channel in list(self._channels.values()):
            channel.ended()
        for channel_id in list(self._rings):
            self._free_ring(channel_id)
        self._channels.clear()
        self._by_flag.clear()
        self._winding_up.clear()
        self._answers.clear()

    def tl_connect(self, endpoint_id: UUID, service_id: UUID, silo_id: UUID = NO_GUID) -> None:
        """hv_sock: ask for a connection; it comes as an offer, or as `on_tl_result` with a failure (from 4.1 on)."""
        with self._lock:
            self._post(self.machine.tl_connect(endpoint_id, service_id, silo_id))

    def pause(self) -> None:
        """Have the host send no control messages until `resume` (6.0)."""
        with self._lock:
            self._answers.pop(("pause", 0), None)
            self._post(self.machine.pause())
        self._await(lambda: ("pause", 0) in self._answers, "PAUSE")

    def resume(self) -> None:
        """Let the host's control messages flow again."""
        with self._lock:
            self._post(self.machine.resume())

    # -- channels ------------------------------------------------------------------------------------------

    def open(
        self,
        offer: Offer,
        outgoing_pages: int = 4,
        incoming_pages: int = 4,
        user_data: bytes = b"",
        *,
        target_vp: int = 0,
        account: Account | None = None,
    ) -> Channel:
        """Open an offered channel.

        Args:
            offer: one of `offers`.
            outgoing_pages: data pages of the guest-to-host ring; its control page is extra.
            incoming_pages: data pages of the host-to-guest ring.
            user_data: up to 120 bytes for the device's protocol.
            target_vp: the VP that takes the host's interrupts.
            account: where the channel counts.

        Raises:
            LocalProtocolError: no such offer, or it is open.
            RemoteProtocolError: the host refuses, takes the offer back, or does not answer.
            MemoryError: the guest has no free pages.
        """
        channel_id = offer.channel_id
        known = self.machine.channel(channel_id)
        if known is None or known.offer.key != offer.key or known.state is not ChannelState.OFFERED:
            raise LocalProtocolError(f"channel {channel_id} cannot be opened")
        up_count = outgoing_pages + 1
        pfns = self.pages.allocate(up_count + incoming_pages + 1)
        try:
            for pfn in (pfns[0], pfns[up_count]):
                self.memory.write(pfn * PAGE_SIZE, bytes(PAGE_SIZE))
            up, down = self.memory.window(pfns[:up_count]), self.memory.window(pfns[up_count:])
        except BaseException:
            self.pages.free(pfns)
            raise
        channel = Channel(
            self,
            offer,
            RingWriter(up),
            RingReader(down),
            memory=self.memory,
            account=account or self.account,
            channel_id=channel_id,
            user_data=user_data,
            target_vp=target_vp,
        )
        self._rings[channel_id] = (pfns, up, down)  # from now on the host's rescinding it frees them
        try:
            gpadl_id = self._make_gpadl(channel_id, GpaRanges([(len(pfns) * PAGE_SIZE, 0, pfns)]))
            with self._lock:
                # Known before the host is asked: it may ring as soon as it has opened its end.
                self._by_flag[channel_id] = self._channels[channel_id] = channel
                self._answers.pop(("open", channel_id), None)
                self._post(
                    self.machine.open(
                        channel_id, gpadl_id, up_count, target_vp=target_vp, user_data=user_data
                    )
                )
            status = self._answer("open", channel_id)
        except BaseException:
            self._give_up(channel_id)
            raise
        if status or channel_id not in self._channels:
            self._give_up(channel_id)
            raise RemoteProtocolError(f"the host refused to open channel {channel_id}: status {status:#x}")
        return channel

    def _give_up(self, channel_id: int) -> None:
        """An open failed: undo what it did as far as the host lets us."""
        channel = self._channels.pop(channel_id, None)
        self._by_flag.pop(channel_id, None)
        if channel is not None:
            channel.ended()
        known = self.machine.channel(channel_id)
        if known is not None and known.state is ChannelState.OFFERED:
            with suppress(RemoteProtocolError, HypercallError):
                self._teardown_all(known)
        self._free_ring(channel_id)

    def release(self, offer: Offer) -> None:
        """Give back an offer that there is no use for; the host may offer something else under its id."""
        with self._lock:
            self._post(self.machine.release(offer.channel_id))

    def retarget(self, channel: Channel, target_vp: int) -> None:
        """Have the host interrupt another VP for the channel (from version 4.1 on).

        Raises:
            RemoteProtocolError: the host refuses (from 5.3 on it says so).
        """
        channel_id = channel.channel_id
        with self._lock:
            self._answers.pop(("modify", channel_id), None)
            self._post(self.machine.modify_channel(channel_id, target_vp))
        if self.version >= Version.V5_3 and (status := self._answer("modify", channel_id)):
            raise RemoteProtocolError(f"the host refused to interrupt VP {target_vp}: status {status:#x}")
        channel.target_vp = target_vp

    def _make_gpadl(self, channel_id: int, ranges: GpaRanges) -> int:
        with self._lock:
            gpadl_id, posts = self.machine.create_gpadl(channel_id, ranges.pack(), len(ranges))
            self._post(posts)
        if status := self._answer("gpadl", gpadl_id):
            raise RemoteProtocolError(f"the host refused GPADL {gpadl_id:#x}: status {status:#x}")
        return gpadl_id

    def _drop_gpadl(self, channel_id: int, gpadl_id: int) -> None:
        with self._lock:
            self._post(self.machine.teardown_gpadl(channel_id, gpadl_id))
        self._await(lambda: not self.machine.has_gpadl(gpadl_id), "GPADL_TEARDOWN")

    def _teardown_all(self, known: GuestChannel) -> None:
        channel_id = known.offer.channel_id
        for gpadl_id in [n for n, s in known.gpadls.items() if s is GpadlState.CREATED]:
            self._drop_gpadl(channel_id, gpadl_id)

    def _free_ring(self, channel_id: int) -> None:
        ring = self._rings.pop(channel_id, None)
        if ring is None:
            return
        pfns, *windows = ring
        for window in windows:
            with suppress(BufferError):  # the channel's rings still refer to it; it goes with them
                window.close()
        self.pages.free(pfns)

    # -- ChannelOwner --------------------------------------------------------------------------------------

    def ring(self, channel: Channel) -> None:
        """Ring the host: by a bit in the monitor page if the channel has one, else by HvSignalEvent."""
        offer = channel.offer
        if offer.monitor_id is not None and self.machine.monitor_pages is not None:
            if (monitor := self._monitor) is not None:
                monitor.set(pending_bit(offer.monitor_id))
            channel.account.hypercalls_saved += 1
            return
        known = self.machine.channel(channel.channel_id)
        connection_id = known.connection_id if known is not None else offer.connection_id
        if self.version < Version.V1_1 or not offer.is_dedicated:
            flags = self._from_guest
            if flags is not None:
                flags.set(channel.channel_id)
            connection_id = wire.EVENT_CONNECTION_ID
        port = next(iter(self._ports), None)  # none once the guest is abandoned, in another thread
        if port is not None:
            try:
                with self.hosting.held():
                    port.vp.hypercall(SIGNAL_EVENT, connection_id, 0)
            except (GuestFault, VpSuspended):
                if (
                    not self.lost
                ):  # else it was reset or destroyed just now: nobody hears it, whoever waits is told
                    raise

    def again(self, channel: Channel) -> None:
        """Call the channel's driver once more, as if another interrupt had come."""
        self._unfinished.append(channel)
        task = next((port.task for port in self._ports), None)  # none once the guest is abandoned
        if task is not None:
            self.hosting.ring(task)

    def wait(self, channel: Channel, condition: Callable[[], bool], timeout: float) -> bool:
        """Let others work until the condition holds, or never will because the guest is lost."""
        return self.hosting.wait_for(lambda: condition() or self.lost, timeout) and condition()

    def close_channel(self, channel: Channel) -> None:
        """Close, tear every GPADL down, free the ring."""
        channel_id = channel.channel_id
        with self._lock:
            if self._channels.get(channel_id) is not channel:
                return  # rescinded, perhaps just now
            known = self.machine.channel(channel_id)
            del self._channels[channel_id]
            self._by_flag.pop(channel_id, None)
            if known is not None and known.state is ChannelState.OPEN:
                self._post(self.machine.close(channel_id))
        channel.ended()
        if known is not None:
            self._teardown_all(known)
        self._free_ring(channel_id)

    def find_gpadl(self, channel: Channel, gpadl_id: int) -> Gpadl:
        """Only the host looks into GPADLs."""
        raise NotImplementedError("GPADLs are looked into by the host's end")

    def make_gpadl(self, channel: Channel, ranges: GpaRanges) -> int:
        """Describe memory to the host."""
        return self._make_gpadl(channel.channel_id, ranges)

    def drop_gpadl(self, channel: Channel, gpadl_id: int) -> None:
        """Take memory back from the host."""
        self._drop_gpadl(channel.channel_id, gpadl_id)

    # -- messages ------------------------------------------------------------------------------------------

    def _post(self, events: list[act.GuestEvent]) -> None:
        """Post what is to be posted; take the rest as if it had been received."""
        with self.hosting.held():
            for event in events:
                if isinstance(event, act.Post):
                    self._post_message(event)
                    continue
                try:
                    self._take(event)
                except (OSError, MemoryError) as error:
                    log.warning("%s cannot be taken: %s", type(event).__name__, error)
                    self._not_taken(event)

    def _post_message(self, post: act.Post) -> None:
        header = post.connection_id.to_bytes(4, "little") + bytes(4)
        header += wire.VMBUS_MESSAGE_TYPE.to_bytes(4, "little") + len(post.payload).to_bytes(4, "little")
        self.memory.write(self._input, header + post.payload.ljust(wire.MAX_MESSAGE_SIZE, b"\0"))
        status = self._ports[0].vp.hypercall(CallCode.POST_MESSAGE, self._input, 0) & 0xFFFF
        if status == Status.INVALID_CONNECTION_ID and self.machine.state is LinkState.CONTACTING:
            # A host older than 5.0 has no connection 4: ask for what it may know.
            self._post(self.machine.contact_failed())
        elif status:
            known = status in Status.__members__.values()
            raise HypercallError(
                status, f"HvCallPostMessage: {HypercallError(Status(status) if known else status)}"
            )

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        if not self.hosting.wait_for(lambda: self._poll() and (condition() or self.lost)) or not condition():
            raise RemoteProtocolError(f"the host does not answer {what}")

    def _answer(self, kind: str, number: int) -> int:
        key = kind, number
        self._await(lambda: key in self._answers, kind)
        return self._answers.pop(key)

    def _poll(self) -> bool:
        """Take messages that are there even if our interrupt handler is busy: it may be what waits for them."""
        for port in self._ports:
            self._take_messages(port)
        return True

    def _on_interrupt(self, port: ProcessorPort) -> None:
        """The interrupt handler: messages, then event flags, until no interrupt waits."""
        try:
            self._handle(port)
        except (GuestFault, VpSuspended):
            if not self.lost:  # else it was reset or destroyed in the middle: there is nobody to handle it
                raise

    def _handle(self, port: ProcessorPort) -> None:
        for _ in range(len(self._unfinished)):
            try:
                channel = self._unfinished.popleft()
            except IndexError:
                break  # another processor's handler was faster
            self._deliver(channel)
        while (vector := port.vp.pop_interrupt()) is not None:
            if not (port.auto_eoi and vector == VECTOR):
                port.vp.wrmsr(Msr.EOI, 0)
            if vector == VECTOR:
                self._take_messages(port)
                self._take_flags(port)
        self._call()

    def _take_messages(self, port: ProcessorPort) -> None:
        with self._lock:
            slot = port.slot
            while slot is not None and (message := slot.take()) is not None:
                if slot.end():
                    with self.hosting.held():
                        port.vp.wrmsr(Msr.EOM, 0)  # more messages wait for the slot
                if message.type != wire.VMBUS_MESSAGE_TYPE:
                    continue
                try:
                    self._post(self.machine.receive(message.payload))
                except RemoteProtocolError as error:
                    self.violations += 1
                    log.debug("the host's message is ignored: %s", error)
                except (OSError, MemoryError) as error:
                    log.warning("an answer to the host is lost: %s", error)
                slot = port.slot

    def _take_flags(self, port: ProcessorPort) -> None:
        flags = port.flags.take() if port.flags is not None else []
        if self.version < Version.V2_4 and 0 in flags:
            flags += self._from_host.take()
        for flag in flags:
            channel = self._by_flag.get(flag)
            if channel is not None:
                self._deliver(channel)

    def _deliver(self, channel: Channel) -> None:
        """Run the channel's driver, on one processor at a time; while it runs on another, that one goes round again.

        A channel that moves to another processor, or whose turn was too long, is rung on two of them at once.
        """
        with self._gate:
            if channel in self._busy:
                self._busy[channel] = True
                return
            self._busy[channel] = False
        more = True
        while more:
            try:
                channel.deliver_signal()
            except RingCorrupt as error:
                guest_log.warning(
                    "the host",
                    "channel %d is closed: %s",
                    channel.channel_id,
                    error,
                    scope=self._log_scope,
                )
                self._calls.append(channel.close)
            except (GuestFault, VpSuspended):
                del self._busy[channel]
                raise
            except Exception as error:
                # A defect of the driver. Its channel would wait for it for ever, with the host's doorbells masked.
                del self._busy[channel]
                guest_log.warning(
                    "the host",
                    "channel %d is closed: its driver failed: %s",
                    channel.channel_id,
                    repr(error),
                    scope=self._log_scope,
                )
                self._calls.append(channel.close)
                raise
            except BaseException:
                del self._busy[channel]
                channel.again()  # Ctrl-C ends what its user does, not what the host does
                raise
            with self._gate:
                more = self._busy[channel]
                if more:
                    self._busy[channel] = False
                else:
                    del self._busy[channel]

    def _take(self, event: act.GuestEvent) -> None:
        match event:
            case act.ConnectionRefused():
                self._refused = event.reason
            case act.OfferSeen():
                self._later(self.on_offer, event.offer)
            case act.OpenAnswered():
                self._answers["open", event.channel_id] = event.status
            case act.GpadlAnswered():
                self._answers["gpadl", event.gpadl_id] = event.status
            case act.ChannelRetargeted():
                self._answers["modify", event.channel_id] = event.status
            case act.TlConnectAnswered():
                self._later(self.on_tl_result, event)
            case act.Paused():
                self._answers["pause", 0] = 0
            case act.ChannelRescinded():
                self._rescinded(event.channel_id)
        if isinstance(event, act.ChannelRescinded | act.GpadlGone | act.GpadlAnswered | act.OpenAnswered):
            self._release_rescinded()

    def _not_taken(self, event: act.GuestEvent) -> None:
        """There was no memory for an event: whoever waits for it is refused, and what was to end ends later."""
        refused = wire.Status.UNSUCCESSFUL
        match event:
            case act.OpenAnswered():
                self._answers["open", event.channel_id] = event.status or refused
                if not event.status:
                    self._post(self.machine.close(event.channel_id))
            case act.GpadlAnswered():
                self._answers["gpadl", event.gpadl_id] = event.status or refused
            case act.ChannelRetargeted():
                self._answers["modify", event.channel_id] = event.status or refused
            case act.ChannelRescinded():
                self._calls.append(lambda: self._rescinded_late(event.channel_id))
            case act.ConnectionRefused():
                self._refused = event.reason
            case _:
                pass  # a notice

    def _rescinded_late(self, channel_id: int) -> None:
        with self._lock:
            if self.machine.channel(channel_id) is not None:
                self._rescinded(channel_id)
                self._release_rescinded()

    def _rescinded(self, channel_id: int) -> None:
        known = self.machine.channel(channel_id)
        assert known is not None
        self._winding_up.add(channel_id)
        channel = self._channels.pop(channel_id, None)
        self._by_flag.pop(channel_id, None)
        # Closed before its pages are anybody else's: callbacks may come later, whoever still has it must not write.
        if channel is not None and channel.cut() and channel.on_closed is not None:
            self._calls.append(channel.on_closed)
        self._later(self.on_rescind, known.offer)
        for gpadl_id in [n for n, s in known.gpadls.items() if s is GpadlState.CREATED]:
            self._post(self.machine.teardown_gpadl(channel_id, gpadl_id))

    def _release_rescinded(self) -> None:
        """Give back rescinded channels about which the host owes no more answers."""
        for channel_id in list(self._winding_up):
            known = self.machine.channel(channel_id)
            if known is None or known.state is not ChannelState.RESCINDED:
                self._winding_up.discard(channel_id)
                continue
            with suppress(LocalProtocolError):
                for gpadl_id in [n for n, s in known.gpadls.items() if s is GpadlState.CREATED]:
                    self._post(self.machine.teardown_gpadl(channel_id, gpadl_id))
                if self.machine.channel(channel_id) is known:
                    self._post(self.machine.release(channel_id))
                    self._winding_up.discard(channel_id)
                    self._free_ring(channel_id)

    def _later(self, callback: Callable[[T], None] | None, argument: T) -> None:
        if callback is not None:
            self._calls.append(lambda: callback(argument))

    def _call(self) -> None:
        """Run callbacks, outside of the lock and never nested."""
        while self._calls:
            if not self._calling.acquire(blocking=False):
                return  # whoever calls back now takes ours as well: it looks again after it has let go
            try:
                while self._calls:
                    self._calls.popleft()()
            finally:
                self._calling.release()
