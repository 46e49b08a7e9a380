"""A partition: the unit of isolation (TLFS chapter 5)."""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vmbus.core.memory import GuestMemory
from vmbus.errors import GuestMemoryError, HypercallError
from vmbus.hypervisor.budget import Meter
from vmbus.hypervisor.calls_ipc import delete_port
from vmbus.hypervisor.clock import ReferenceTime
from vmbus.hypervisor.devices import DeviceBus
from vmbus.hypervisor.faults import GeneralProtectionFault
from vmbus.hypervisor.intercepts import Intercepts
from vmbus.hypervisor.loans import Loans, tell_watchers
from vmbus.hypervisor.overlay import OverlayPage
from vmbus.hypervisor.personality import Personality
from vmbus.hypervisor.pool import VP_PAGES, Deposit, MemoryPool
from vmbus.hypervisor.ports import Connection, Port
from vmbus.hypervisor.tlfs import HV_PAGE_SIZE, PartitionState, Status
from vmbus.hypervisor.vp import VirtualProcessor
from vmbus.hypervisor.wire import ReferenceTscPage
from vmbus.trace.guest_log import GuestLog

if TYPE_CHECKING:
    from vmbus.hypervisor.hypervisor import Hypervisor

__all__ = ["CrashReport", "Partition", "PartitionEvent"]

log = logging.getLogger(__name__)
guest_log = GuestLog(log)

HYPERCALL_CODE: Final = b"\x0f\x01\xc1\xc3"
"""VMCALL; RET: what the hypercall page holds. The guest may execute it, and nothing else of the page."""
HYPERCALL_LOCKED: Final = 1 << 1
INVALID_TSC_SEQUENCE: Final = 0xFFFF_FFFF
TSC_SEQUENCE_SIZE: Final = 4
"""Bytes of TscSequence, the first field of the reference TSC page."""


class PartitionEvent(NamedTuple):
    """Something that a partition's parent is told about it.

    Attributes:
        kind: ``"crash"`` (detail: `CrashReport`), ``"reset"`` (the processor's index), ``"provider-error"`` (the
            exception that the child's input caused in a provider), ``"stopped"`` (the exit status of the process
            that it ran in, after ``"reset"``), ``"destroyed"`` (None).
        partition: whom it is about.
        detail: see kind.
    """

    kind: str
    partition: "Partition"
    detail: Any


class CrashReport(NamedTuple):
    """What a guest left in its crash registers (TLFS, guest crash registers).

    Attributes:
        parameters: the five crash parameters.
        message: the text at the address in parameter 3, if the guest said that there is one.
    """

    parameters: tuple[int, ...]
    message: bytes


class Partition:
    """A partition and everything in it; made by `Hypervisor.create_root` and `create_child`, or by hypercalls.

    Attributes:
        hypervisor: the instance that it belongs to.
        id: its partition id (unique in the instance, never reused).
        name: for reports and logs.
        parent: None for the root.
        children: partitions that it is the parent of, by id.
        memory: its guest physical memory.
        vps: its virtual processors by index.
        devices: where its intercepted port and memory accesses go.
        personality: the guest operating system that it presents itself to.
        privileges: its privilege mask (`Privilege` bits).
        account: its ledger account.
        meter: what it has made its host spend, and may. Partitions that it makes by hypercall spend from the same.
        state: `PartitionState`.
        connections: what it can send to, by connection id.
        ports: where it receives, by port id.
        on_event: the parent's callback for `PartitionEvent`.
        on_eoi: called with a vector when the guest ends it (level-triggered interrupt controllers).
        on_apic_enabled: called when the guest has enabled a local APIC (level-triggered interrupt controllers).
        on_tlb_flush: an engine's: called with a mask of processors when the guest flushes by hypercall.
        on_identity: called with the guest OS identity when a guest sets one: a kernel has started.
        on_suspension: whoever runs the guest elsewhere: called with a processor whose `suspended` has changed.
        ending: it is being finalized, or was: it gets no children any more.
        deleting: it is being torn down, or was.
        suspended: its parent has set its suspend property: none of its processors runs.
        stop: stops whatever executes the guest; called before the partition is torn down.
        pool: pages deposited for the hypervisor's use on its behalf.
        deposits: its own pages that it has deposited for itself or a child, by address.
        loans: which of its pages its children have, and which it has from its parent.
        page_watchers: called, without any lock held, with the address of a page that was taken from the partition.
        time: its reference time.
        properties: what its parent set by HvCallSetPartitionProperty.
        intercepts: what its parent intercepts.
    """

    def __init__(
        self,
        hypervisor: "Hypervisor",
        partition_id: int,
        name: str,
        parent: "Partition | None",
        memory: GuestMemory,
        personality: Personality,
        privileges: int,
        pool: MemoryPool,
        meter: Meter,
    ) -> None:
        self.hypervisor = hypervisor
        self.id = partition_id
        self.name = name
        self.parent = parent
        self.children: dict[int, Partition] = {}
        self.memory = memory
        self.personality = personality
        self.privileges = int(privileges)  # a plain integer: tested on every exit
        self.account = hypervisor.ledger.account(name)
        self.state = PartitionState.CREATED
        self.pool = pool
        self.meter = meter
        memory.allowance = meter.mappings
        # Its parent maps and unmaps its pages, and pays for it: nobody can keep what is taken from him by being poor.
        memory.map_allowance = (meter if parent is None else parent.meter).mappings
        self.cost = 0
        """Bytes of the host's memory that it was charged for when it was made; its creator pays them."""
        self.deposits: dict[int, Deposit] = {}
        self.loans = Loans(self)
        self.page_watchers: list[Callable[[int], None]] = []
        self.properties: dict[int, int] = {}
        self.intercepts = Intercepts()
        self.connections: dict[int, Connection] = {}
        self.ports: dict[int, Port] = {}
        self.on_event: Callable[[PartitionEvent], None] | None = None
        self.on_eoi: Callable[[int], None] | None = None
        self.on_apic_enabled: Callable[[], None] | None = None
        self.on_tlb_flush: Callable[[int], None] | None = None
        self.on_identity: Callable[[int], None] | None = None
        self.on_suspension: Callable[[VirtualProcessor], None] | None = None
        self.ending = False
        self.deleting = False
        self.suspended = False
        self.stop: Callable[[], None] | None = None
        self.time = ReferenceTime(hypervisor.clock, hypervisor.tsc_frequency)
        self.provider_errors = 0
        """How often a provider refused what this partition sent it."""
        self.guest_os_id = 0
        self.hypercall_msr = 0
        self.hypercalls_enabled = False
        self.reference_tsc_msr = 0
        self.crash_parameters = [0] * 5
        self._hypercall_page = OverlayPage(memory, HYPERCALL_CODE, kept=False)
        self._reference_tsc_page = OverlayPage(memory, kept=False)
        self._tsc_page: ReferenceTscPage | None = None  # what the page says
        self._tsc_sequence = 0
        self.vps: list[VirtualProcessor] = []
        self.devices = DeviceBus(self._raise_vector)

    def __repr__(self) -> str:
        return f"<Partition {self.id} {self.name!r} {self.state.name}>"

    @property
    def depth(self) -> int:
        """How many ancestors it has; 0 for the root."""
        return 0 if self.parent is None else self.parent.depth + 1

    def add_vp(self) -> VirtualProcessor:
        """Create the next virtual processor.

        Raises:
            HypercallError: INSUFFICIENT_MEMORY if its parent has not deposited enough.
        """
        self.pool.take(VP_PAGES)
        vp = VirtualProcessor(self, len(self.vps))
        vp.suspended = self.suspended
        self.vps.append(vp)
        return vp

    def vp(self, index: int) -> VirtualProcessor:
        """The processor `index`; also while another thread tears the partition down.

        Raises:
            HypercallError: INVALID_VP_INDEX if there is none.
        """
        try:
            if index >= 0:
                return self.vps[index]
        except IndexError:
            pass
        raise HypercallError(Status.INVALID_VP_INDEX)

    @property
    def reference_time(self) -> int:
        """Partition reference time: units of 100 ns since it was created."""
        return self.time.now()

    def suspend(self, suspended: bool) -> None:
        """Stop or resume all processors (HvPartitionPropertySuspend); each one's own suspension stays what it is."""
        self.suspended = suspended
        for vp in list(self.vps):
            vp.update_suspension()

    def take_privileges(self, taken: int) -> None:
        """Take privileges from this partition and everybody below it."""
        self.privileges &= ~taken
        for child in list(self.children.values()):
            child.take_privileges(taken)

    def flush_tlb(self, processors: int) -> None:
        """Have the engine, if one caches translations, forget them on the processors of the mask."""
        if self.on_tlb_flush is not None:
            self.on_tlb_flush(processors)

    def _overlays(self) -> list[OverlayPage]:
        return [self._hypercall_page, self._reference_tsc_page, *(vp.assist_page for vp in list(self.vps))]

    def is_overlay(self, gpa: int) -> bool:
        """Whether a hypervisor page lies over the page of `gpa`."""
        page = gpa & ~0xFFF
        return any(overlay.gpa == page for overlay in self._overlays()) or any(
            vp.synic.occupies(page) for vp in self.vps
        )

    def release_pages(self, gpa: int, length: int) -> None:
        """What is mapped at `gpa` is about to change: children that have these pages lose them, hypervisor pages
        there go away with their contents, and pages that were deposited from there no longer come back."""
        gone: list[tuple[Partition, int]] = []
        with self.hypervisor.map_lock:
            for page in range(gpa, gpa + length, HV_PAGE_SIZE):
                self.take_page(page, gone)
        tell_watchers(gone)

    def take_page(self, gpa: int, gone: "list[tuple[Partition, int]]") -> None:
        """`release_pages` for one page, with the map lock held; `tell_watchers` has to follow when it is not.

        Args:
            gpa: the page's address.
            gone: collects the partitions that lost a page, and where.
        """
        self.loans.call_in(gpa, gone)
        for overlay in self._overlays():
            if overlay.gpa == gpa:
                overlay.remove()
        for vp in list(self.vps):
            vp.synic.evict(gpa, HV_PAGE_SIZE)
        self.deposits.pop(gpa, None)
        self.loans.forget(gpa)
        gone.append((self, gpa))

    # Partition-wide registers

    def set_guest_os_id(self, value: int) -> None:
        """HV_X64_MSR_GUEST_OS_ID: identifies the guest; zero takes the hypercall page away (TLFS, hypercall page)."""
        self.guest_os_id = value
        log.info("%s identifies itself as 0x%016x", self.name, value)
        if not value:
            with self.hypervisor.map_lock:
                self._hypercall_page.remove()
            self.hypercall_msr &= ~1
            self.hypercalls_enabled = False
        elif self.on_identity is not None:
            self.on_identity(value)

    def set_hypercall_page(self, value: int) -> None:
        """HV_X64_MSR_HYPERCALL: bit 0 enables, bit 1 locks, bits 63:12 are the page number.

        Raises:
            GeneralProtectionFault: the register is locked or the page lies outside the partition.
        """
        if self.hypercall_msr & HYPERCALL_LOCKED:
            raise GeneralProtectionFault("HV_X64_MSR_HYPERCALL is locked")
        if not self.guest_os_id:
            value &= ~1  # no identity, no hypercalls: the enable bit does not stick
        with self.hypervisor.map_lock:
            self._hypercall_page.place(value)
        self.hypercall_msr = value
        self.hypercalls_enabled = bool(value & 1)
        log.debug("%s: hypercalls are %s", self.name, "enabled" if value & 1 else "disabled")

    def set_reference_tsc(self, value: int) -> None:
        """HV_X64_MSR_REFERENCE_TSC: places the reference TSC page (TLFS, timers).

        Raises:
            GeneralProtectionFault: the page lies outside the partition.
        """
        if value & 1:
            self._write_reference_tsc()  # right from the moment on at which it shows
        with self.hypervisor.map_lock:
            self._reference_tsc_page.place(value)
            self.reference_tsc_msr = value

    def update_reference_tsc(self) -> None:
        """Write the reference TSC page again after a guest has moved a TSC."""
        if self.reference_tsc_msr & 1:
            self._write_reference_tsc()

    def _write_reference_tsc(self) -> None:
        """Have the page say how the TSC leads to reference time now.

        Other processors read it meanwhile: sequence, values, sequence again (TLFS, reference TSC page). So other values
        get another sequence, and while they change it is 0, which sends readers to the reference counter MSR; so it is
        for as long as the processors' TSCs differ, because one page serves them all.
        """
        with self.hypervisor.map_lock:
            offsets = {vp.tsc_offset for vp in list(self.vps)}
            offset = self.time.page_offset(min(offsets, default=0))
            page, known = self._reference_tsc_page, self._tsc_page
            valid = len(offsets) == 1
            if known is not None and (known.offset, bool(known.sequence)) == (offset, valid):
                return
            if valid:
                # Neither 0 nor all ones, which meant "none" in older versions of the TLFS.
                self._tsc_sequence = self._tsc_sequence % (INVALID_TSC_SEQUENCE - 1) + 1
            new = ReferenceTscPage(self._tsc_sequence if valid else 0, 0, self.time.scale, offset)
            content = new.pack()
            page.write(0, bytes(TSC_SEQUENCE_SIZE))
            page.write(TSC_SEQUENCE_SIZE, content[TSC_SEQUENCE_SIZE:])
            page.write(0, content[:TSC_SEQUENCE_SIZE])
            self._tsc_page = new

    def report_crash(self, vp: VirtualProcessor, has_message: bool) -> None:
        """The guest wrote HV_X64_MSR_CRASH_CTL: tell the parent."""
        message = b""
        if has_message:
            try:
                message = self.memory.read(
                    self.crash_parameters[3], min(self.crash_parameters[4], HV_PAGE_SIZE)
                )
            except (GuestMemoryError, OverflowError):
                guest_log.warning(
                    self.name,
                    "it crashed with a message outside of its memory",
                    scope=self.hypervisor.log_scope,
                )
        log.info("%s reports a crash: %s", self.name, ", ".join(f"0x{p:x}" for p in self.crash_parameters))
        self.notify("crash", CrashReport(tuple(self.crash_parameters), message))

    # Events about the partition

    def notify(self, kind: str, detail: Any) -> None:
        """Tell the parent about this partition."""
        if self.on_event is not None:
            self.on_event(PartitionEvent(kind, self, detail))

    def provider_failed(self, error: Exception) -> None:
        """A provider refused this partition's input: an event about the child, never an exception in the parent."""
        self.provider_errors += 1
        guest_log.warning(
            self.name,
            "refused by its provider (%d times): %s",
            self.provider_errors,
            error,
            scope=self.hypervisor.log_scope,
        )
        self.notify("provider-error", error)

    def _raise_vector(self, vector: int) -> None:
        with suppress(HypercallError):  # it has no processor (any more)
            self.vp(0).request_interrupt(vector)

    # Life

    def reset(self) -> None:
        """Restart the guest: processors, overlay pages and partition-wide registers as at power-on; memory stays."""
        log.debug("%s is reset", self.name)
        for vp in list(self.vps):
            vp.reset()
        with self.hypervisor.map_lock:
            self._hypercall_page.remove()
            self._reference_tsc_page.remove()
        self.guest_os_id = self.hypercall_msr = self.reference_tsc_msr = 0
        self.hypercalls_enabled = False
        self.crash_parameters = [0] * 5

    def finalize(self) -> None:
        """Stop for good: children, processors, ports and connections go; only deletion is left to do."""
        for child in list(self.children.values()):
            child.destroy()
        stop = self.stop
        if stop is not None:
            stop()
        self.reset()
        self.state = PartitionState.FINALIZED
        for port in list(self.ports.values()):
            delete_port(port)
        if (
            self.parent is not None
        ):  # ports of its parent and siblings for this partition serve nobody any more
            for owner in (self.parent, *list(self.parent.children.values())):
                for port in [p for p in list(owner.ports.values()) if p.connection_partition is self]:
                    delete_port(port)
        for connection in list(self.connections.values()):
            self.meter.host_memory.release(connection.cost)
            connection.port.connections.discard(connection)
        self.connections.clear()
        self.intercepts.clear()
        for vp in self.vps:
            vp.delete()
        self.vps.clear()

    def destroy(self) -> None:
        """Tear the partition down: its children first, then ports, connections, processors and memory."""
        self.hypervisor.destroy(self)
