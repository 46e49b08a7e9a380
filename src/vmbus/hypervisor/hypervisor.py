"""One hypervisor instance: its partitions, and what providers in this process use to reach their children."""

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable
from typing import Final, Self

from vmbus.core.memory import GuestMemory
from vmbus.errors import HypercallError, LocalProtocolError
from vmbus.hypervisor.budget import Budget, Meter
from vmbus.hypervisor.calls_ipc import connect, delete_port
from vmbus.hypervisor.clock import Clock, HostClock
from vmbus.hypervisor.partition import Partition
from vmbus.hypervisor.personality import CHILD_PRIVILEGES, ROOT_PRIVILEGES, SERVER_2022, Personality
from vmbus.hypervisor.pool import VP_PAGES, MemoryPool
from vmbus.hypervisor.ports import EventHandler, MessageHandler, Port
from vmbus.hypervisor.tlfs import (
    EVENT_FLAGS_PER_SINT,
    MAX_VPS,
    PARTITION_ID_SELF,
    PartitionState,
    PortType,
    Status,
)
from vmbus.sizes import byte_count
from vmbus.trace.guest_log import new_scope
from vmbus.trace.ledger import Ledger

__all__ = ["Hypervisor"]

log = logging.getLogger(__name__)

DEFAULT_TSC_FREQUENCY: Final = 1_000_000_000
"""Hz; one tick a nanosecond, so that virtual time and TSC agree."""
DEFAULT_APIC_FREQUENCY: Final = 200_000_000
"""Hz of the local APIC timer's input, as Hyper-V and OpenVMM report it."""
MAX_PARTITIONS: Final = 1024
"""Partitions of one instance that hypercalls may make."""
MAX_DEPTH: Final = 8
"""How deep partitions may nest (HV_STATUS_PARTITION_TOO_DEEP beyond)."""
GPA_SPACE: Final = 1 << 30
"""Bytes of guest physical address space of a partition that was made by hypercall."""


PARTITION_COST: Final = 5 << 20
"""Bytes of the host's memory that a partition made by hypercall costs before anything is deposited for it: 16 for each
page of its address space, and its objects."""


class Hypervisor:
    """A hypervisor: one root partition, created first, and a tree of children.

    Args:
        ledger: where everything is counted; a new one by default.
        clock: the time of all partitions; the host's by default, a `VirtualClock` for repeatable runs.
        tsc_frequency: Hz of the guests' time stamp counters.
        apic_frequency: Hz of the guests' local APIC timers.

    Raises:
        ValueError: a frequency that is no positive number of 64 bits.
    """

    def __init__(
        self,
        ledger: Ledger | None = None,
        clock: Clock | None = None,
        *,
        tsc_frequency: int = DEFAULT_TSC_FREQUENCY,
        apic_frequency: int = DEFAULT_APIC_FREQUENCY,
    ) -> None:
        for what, frequency in (("TSC", tsc_frequency), ("APIC", apic_frequency)):
            if not 0 < frequency < 1 << 64:
                raise ValueError(f"a {what} frequency of {frequency} Hz")
        self.ledger = ledger if ledger is not None else Ledger()
        self.clock = clock if clock is not None else HostClock()
        self.tsc_frequency = tsc_frequency
        self.apic_frequency = apic_frequency
        self.root: Partition | None = None
        self.partitions: dict[int, Partition] = {}
        """All partitions that are not deleted, by id."""
        self.log_scope = new_scope()
        """In which its partitions' names are unique, for log lines about them (`vmbus.trace.guest_log`)."""
        self.hosting: object = None
        """Where the work of its buses runs (`vmbus.bus.hosting`): kept here, so that it goes when the instance goes."""
        self.on_closed: list[Callable[[], None]] = []
        """Called, without a lock held, when the root partition is gone; each once."""
        self._next_id = 1
        self._lock = threading.RLock()  # of the tree: partitions come and go in any thread
        self.map_lock = threading.RLock()
        """Held while a partition's memory map changes, and while a hypervisor page is laid over guest memory. Nothing
        that can wait for a guest or a provider runs under it."""

    def __repr__(self) -> str:
        return f"<Hypervisor with {len(self.partitions)} partitions>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Tear down the root partition, and with it all others; what was counted stays."""
        if self.root is not None:
            self.root.destroy()

    # Partitions

    def create_root(
        self,
        name: str = "root",
        *,
        memory_size: int = 16 << 20,
        vps: int = 1,
        personality: Personality = SERVER_2022,
        budget: Budget | None = None,
    ) -> Partition:
        """Create the root partition, which holds every privilege.

        Args:
            name: of its ledger account.
            memory_size: bytes of its memory.
            vps: how many virtual processors.
            personality: what it presents itself to.
            budget: what it may make the host spend; without limit by default, since it is who runs the experiment.

        Raises:
            LocalProtocolError: there is one already, or the number of processors is none that a partition can have.
            ValueError, OSError: as of `GuestMemory`.
        """
        if self.root is not None:
            raise LocalProtocolError("a hypervisor has exactly one root partition")
        if not 1 <= vps <= MAX_VPS:
            raise LocalProtocolError(f"{vps} processors: a partition has 1 to {MAX_VPS}")
        meter = Meter(Budget.unlimited() if budget is None else budget, name)
        memory = GuestMemory(byte_count(memory_size, "memory"))
        self.root = self._create(None, name, memory, vps, personality, ROOT_PRIVILEGES, meter=meter)
        self.root.state = PartitionState.ACTIVE
        return self.root

    def create_child(
        self,
        parent: Partition,
        name: str = "",
        *,
        memory_size: int = 64 << 20,
        vps: int = 1,
        personality: Personality = SERVER_2022,
        privileges: int | None = None,
        memory: GuestMemory | None = None,
        budget: Budget | None = None,
    ) -> Partition:
        """Create a running child of `parent` with memory of its own.

        Args:
            parent: any partition that is not being torn down; children may have children.
            name: unique among accounts; made up from the id when empty.
            memory_size: bytes of guest physical memory, mapped with all rights from address 0.
            vps: how many virtual processors.
            personality: the guest operating system to present the partition to.
            privileges: its privilege mask; the personality's by default.
            memory: an existing memory object instead of a new one.
            budget: what its guest may make the host spend; `Budget`'s defaults if None.

        Raises:
            LocalProtocolError: the parent is not active, the nesting too deep, the number of processors or the
                privileges are none that a partition can have, or `memory` is closed.
            ValueError, OSError: as of `GuestMemory`.
        """
        if parent.state is not PartitionState.ACTIVE or self.partitions.get(parent.id) is not parent:
            raise LocalProtocolError(f"{parent!r} cannot have children now")
        if parent.depth + 1 > MAX_DEPTH or not 1 <= vps <= MAX_VPS:
            raise LocalProtocolError(f"nesting depth {parent.depth + 1} or {vps} processors: too many")
        if privileges is not None and not 0 <= privileges < 1 << 64:
            raise LocalProtocolError(f"a privilege mask of {privileges:#x}: it has 64 bits")
        if memory is not None and not memory.size:
            raise LocalProtocolError(f"{memory!r} cannot be a partition's")
        child = self._create(
            parent,
            name,
            memory if memory is not None else GuestMemory(byte_count(memory_size, "memory")),
            vps,
            personality,
            personality.privileges if privileges is None else privileges,
            meter=Meter(Budget() if budget is None else budget, name),
        )
        child.state = PartitionState.ACTIVE
        return child

    def _create(
        self,
        parent: Partition | None,
        name: str,
        memory: GuestMemory,
        vps: int,
        personality: Personality,
        privileges: int,
        pool: MemoryPool | None = None,
        *,
        meter: Meter,
    ) -> Partition:
        with self._lock:
            if parent is not None and (parent.ending or parent.state is not PartitionState.ACTIVE):
                raise HypercallError(Status.INVALID_PARTITION_STATE)  # it was torn down meanwhile
            partition = Partition(
                self,
                self._next_id,
                name or self._free_name(parent),
                parent,
                memory,
                personality,
                privileges,
                pool if pool is not None else MemoryPool(limited=False),
                meter,
            )
            self._next_id += 1
            for _ in range(vps):
                partition.add_vp()
            self.partitions[partition.id] = partition
            if parent is not None:
                parent.children[partition.id] = partition
        log.debug("%r: %d processors, %d MiB", partition, vps, memory.size >> 20)
        return partition

    @staticmethod
    def _free_name(parent: Partition | None) -> str:
        """A name after the parent's that no child of it has now; names come again, so ledgers stay small."""
        if parent is None:
            return "root"
        taken = {child.name for child in parent.children.values()}
        return next(name for n in itertools.count() if (name := f"{parent.name}.{n}") not in taken)

    def create_uninitialized(self, parent: Partition) -> Partition:
        """HvCallCreatePartition: a child without memory or processors, still to be initialised.

        Its guest spends the budget of the `parent`; only that of a root without limits gets a budget of its own.

        Raises:
            HypercallError: PARTITION_TOO_DEEP, INSUFFICIENT_MEMORY.
            BudgetExceeded: the parent's guest has made too many.
        """
        if parent.depth + 1 > MAX_DEPTH:
            raise HypercallError(Status.PARTITION_TOO_DEEP)
        if len(self.partitions) >= MAX_PARTITIONS:
            raise HypercallError(Status.INSUFFICIENT_MEMORY)
        meter = parent.meter if parent.meter.budget != Budget.unlimited() else Meter(Budget())
        privileges = CHILD_PRIVILEGES & parent.privileges
        parent.meter.host_memory.charge(PARTITION_COST)
        try:
            memory = GuestMemory(GPA_SPACE, mapped=False)
            pool = MemoryPool(limited=True)
            child = self._create(parent, "", memory, 0, SERVER_2022, privileges, pool, meter=meter)
        except BaseException:
            parent.meter.host_memory.release(PARTITION_COST)
            raise
        child.cost = PARTITION_COST
        return child

    def initialize(self, partition: Partition, pages: int) -> None:
        """HvCallInitializePartition: `partition` may run, for `pages` of its deposited pages.

        Raises:
            HypercallError: INVALID_PARTITION_STATE, INSUFFICIENT_MEMORY.
        """
        with self._lock:
            if partition.ending or partition.state is not PartitionState.CREATED:
                raise HypercallError(Status.INVALID_PARTITION_STATE)
            partition.pool.take(pages)
            partition.state = PartitionState.ACTIVE

    def create_vp(self, partition: Partition, index: int) -> None:
        """HvCallCreateVp: processors are numbered without holes here, so only the next index can be created.

        Raises:
            HypercallError: INVALID_PARTITION_STATE, INVALID_VP_INDEX, INSUFFICIENT_MEMORY.
        """
        with self._lock:
            if partition.ending or partition.state is not PartitionState.ACTIVE:
                raise HypercallError(Status.INVALID_PARTITION_STATE)
            if index != len(partition.vps) or index >= MAX_VPS:
                raise HypercallError(Status.INVALID_VP_INDEX)
            partition.add_vp()

    def delete_vp(self, partition: Partition, index: int) -> None:
        """HvCallDeleteVp: only the last processor can be deleted.

        Raises:
            HypercallError: INVALID_VP_INDEX.
        """
        with self._lock:
            if partition.ending or not partition.vps or index != len(partition.vps) - 1:
                raise HypercallError(Status.INVALID_VP_INDEX)
            gone = partition.vps.pop()
            partition.pool.give(VP_PAGES)
        gone.delete()

    def finalize(self, partition: Partition) -> bool:
        """Stop `partition` for good, its children first (HvCallFinalizePartition); False if that was done already."""
        self._stop(partition)
        with self._lock:
            if partition.ending:
                return False
            partition.ending = True
        partition.finalize()
        return True

    def destroy(self, partition: Partition) -> None:
        """Tear `partition` down, its children first; harmless when it is gone already.

        A call while another thread tears it down returns at once. That thread holds no lock while it does: it waits
        for providers, which may be waiting for this very call.
        """
        self._stop(partition)
        with self._lock:
            if partition.deleting:
                return
            partition.ending = partition.deleting = True
        try:
            partition.finalize()
            partition.state = PartitionState.DELETED
            log.debug("%r is destroyed", partition)
            partition.notify("destroyed", None)
        finally:
            partition.state = PartitionState.DELETED
            partition.on_event = partition.on_eoi = partition.on_tlb_flush = None
            partition.on_apic_enabled = partition.on_identity = None
            with self.map_lock:
                partition.pool.release()
                partition.loans.end()
                with contextlib.suppress(
                    BufferError
                ):  # somebody still holds views: the memory goes when they do
                    partition.memory.close()
            with self._lock:
                del self.partitions[partition.id]
                if partition.parent is not None:
                    partition.parent.meter.host_memory.release(partition.cost)
                    partition.parent.children.pop(partition.id, None)
                else:
                    self.root = None
            if partition.parent is None:
                closed, self.on_closed = self.on_closed, []
                for call in closed:
                    call()

    def _stop(self, partition: Partition) -> None:
        """Stop what executes `partition` and everything below it.

        Without the lock: it waits for threads that may be destroying a partition themselves.
        """
        for child in list(partition.children.values()):
            self._stop(child)
        stop = partition.stop  # whoever runs it takes this away when it has ended by itself
        if stop is not None:
            stop()

    # Who may name whom

    def visible(self, caller: Partition, partition_id: int) -> Partition:
        """The partition that `caller` names as a peer: itself, its parent, its children.

        Raises:
            HypercallError: INVALID_PARTITION_ID; partitions elsewhere cannot even be probed for.
        """
        if partition_id in (PARTITION_ID_SELF, caller.id):
            return caller
        found = self.partitions.get(partition_id)
        if found is None or (found.parent is not caller and found is not caller.parent):
            raise HypercallError(Status.INVALID_PARTITION_ID)
        return found

    def controlled(self, caller: Partition, partition_id: int) -> Partition:
        """The partition that `caller` names to change it: itself or its child.

        Raises:
            HypercallError: INVALID_PARTITION_ID, or ACCESS_DENIED if it is not the caller's to change.
        """
        found = self.visible(caller, partition_id)
        if found is not caller and found.parent is not caller:
            raise HypercallError(Status.ACCESS_DENIED)
        return found

    def child(self, caller: Partition, partition_id: int) -> Partition:
        """The child that `caller` names.

        Raises:
            HypercallError: INVALID_PARTITION_ID, or ACCESS_DENIED if it is not a child of the caller.
        """
        found = self.visible(caller, partition_id)
        if found.parent is not caller:
            raise HypercallError(Status.ACCESS_DENIED)
        return found

    # For providers in this process

    def create_message_port(self, child: Partition, connection_id: int, handler: MessageHandler) -> None:
        """Let `handler(vp_index, message_type, payload)` take what `child` posts to `connection_id`.

        The handler runs on the posting processor's thread. A `VmbusError` that it raises becomes an event
        about the child; a `HypercallError` becomes the status of the child's hypercall.

        Raises:
            HypercallError: INVALID_CONNECTION_ID if the id is out of range or in use.
        """
        port = Port(self._owner(child), 0, PortType.MESSAGE, 0, 0, child, on_message=handler)
        connect(child, connection_id, port, PortType.MESSAGE)

    def create_event_port(self, child: Partition, connection_id: int, handler: EventHandler) -> None:
        """Let `handler(flag)` take the events that `child` signals to `connection_id`; else as `create_message_port`.

        Raises:
            HypercallError: INVALID_CONNECTION_ID if the id is out of range or in use.
        """
        port = Port(
            self._owner(child),
            0,
            PortType.EVENT,
            0,
            0,
            child,
            flag_count=EVENT_FLAGS_PER_SINT,
            on_event=handler,
        )
        connect(child, connection_id, port, PortType.EVENT)

    def delete_port(self, child: Partition, connection_id: int) -> None:
        """Delete the port behind `child`'s `connection_id`; the child's next use gives HV_STATUS_INVALID_CONNECTION_ID.

        Raises:
            HypercallError: INVALID_CONNECTION_ID if there is none.
        """
        connection = child.connections.pop(connection_id, None)
        if connection is None:
            raise HypercallError(Status.INVALID_CONNECTION_ID)
        child.meter.host_memory.release(connection.cost)
        delete_port(connection.port)

    @staticmethod
    def _owner(child: Partition) -> Partition:
        return child.parent if child.parent is not None else child

    def post_message(
        self, child: Partition, vp_index: int, sint: int, message_type: int, sender: int, payload: bytes
    ) -> None:
        """Post a message to the slot of `sint` of the child's processor `vp_index`; queued while the slot is full.

        Raises:
            HypercallError: INVALID_VP_INDEX, INVALID_PARAMETER, INVALID_SYNIC_STATE (the guest has no message page),
                INSUFFICIENT_BUFFERS (the guest does not take its messages).
        """
        child.vp(vp_index).synic.post_message(sint, message_type, sender, payload)

    def signal_event(self, child: Partition, vp_index: int, sint: int, flag: int) -> bool:
        """Set event flag `flag` of `sint` of the child's processor `vp_index`, with its interrupt if newly set.

        Returns:
            Whether the flag was clear before.

        Raises:
            HypercallError: INVALID_VP_INDEX, INVALID_PARAMETER (flag above 2047), INVALID_SYNIC_STATE.
        """
        return child.vp(vp_index).synic.signal_event(sint, flag)
