"""Partitions as their parent manages them: life, properties, memory deposits, GPA mappings (TLFS).

All of these act on children of the caller (HvCallGetPartitionId excepted), and take the CreatePartitions privilege,
memory deposits AccessMemoryPool.
"""

from typing import TYPE_CHECKING, Final

from vmbus.core.memory import EXECUTE, READ, WRITE
from vmbus.errors import HypercallError
from vmbus.hypervisor.abi import Call, RepCall, RepStep
from vmbus.hypervisor.loans import LOAN_COST, tell_watchers
from vmbus.hypervisor.personality import ROOT_PRIVILEGES
from vmbus.hypervisor.tlfs import (
    HV_PAGE_SIZE,
    CallCode,
    MapFlags,
    PartitionProperty,
    PartitionState,
    Privilege,
    Status,
)
from vmbus.hypervisor.wire import (
    CreatePartition,
    MapGpaPages,
    MemoryBalance,
    NextChild,
    PartitionPropertyInput,
    PartitionReference,
    SetPartitionPropertyInput,
)

if TYPE_CHECKING:
    from vmbus.hypervisor.partition import Partition
    from vmbus.hypervisor.vp import VirtualProcessor

__all__ = ["CALLS"]

CREATION_FLAGS: Final = 0
"""Flags of HvCallCreatePartition that this hypervisor knows: none; any set one is refused."""

INITIALIZE_PAGES: Final = 2
"""Deposited pages that initialising a partition uses (a cost of this model; real ones vary by version)."""

SPLIT: Final = 2
"""Mappings by which a memory map can grow when one of its pages changes: one becomes three."""

_MANAGE: Final = Privilege.CREATE_PARTITIONS


def _create(vp: "VirtualProcessor", data: bytes) -> bytes:
    call = CreatePartition.unpack(data)
    if call.flags & ~CREATION_FLAGS or call.reserved or call.reserved2:
        raise HypercallError(Status.INVALID_PARAMETER)
    child = vp.partition.hypervisor.create_uninitialized(vp.partition)
    return PartitionReference(child.id).pack()


def _initialize(vp: "VirtualProcessor", data: bytes) -> None:
    vp.partition.hypervisor.initialize(_child(vp, data), INITIALIZE_PAGES)


def _finalize(vp: "VirtualProcessor", data: bytes) -> None:
    child = _child(vp, data)
    if not vp.partition.hypervisor.finalize(child):
        raise HypercallError(Status.INVALID_PARTITION_STATE)


def _delete(vp: "VirtualProcessor", data: bytes) -> None:
    child = _child(vp, data)
    if child.state is PartitionState.ACTIVE:
        raise HypercallError(Status.INVALID_PARTITION_STATE)
    child.destroy()


def _child(vp: "VirtualProcessor", data: bytes) -> "Partition":
    call = PartitionReference.unpack(data)
    return vp.partition.hypervisor.child(vp.partition, call.partition_id)


def _get_id(vp: "VirtualProcessor", data: bytes) -> bytes:
    return PartitionReference(vp.partition.id).pack()


def _next_child(vp: "VirtualProcessor", data: bytes) -> bytes:
    call = NextChild.unpack(data)
    if vp.partition.hypervisor.controlled(vp.partition, call.parent_id) is not vp.partition:
        raise HypercallError(Status.ACCESS_DENIED)  # grandchildren are the child's own affair
    following = (i for i in sorted(vp.partition.children) if i > call.previous_child_id)
    return PartitionReference(next(following, 0)).pack()


# Properties


def _get_property(vp: "VirtualProcessor", data: bytes) -> bytes:
    call = PartitionPropertyInput.unpack(data)
    hypervisor = vp.partition.hypervisor
    target = hypervisor.controlled(vp.partition, call.partition_id)
    code = call.property_code
    if code == PartitionProperty.PRIVILEGE_FLAGS:
        value = target.privileges
    elif code == PartitionProperty.REFERENCE_TIME:
        value = target.reference_time
    elif code == PartitionProperty.GUEST_OS_ID:
        value = target.guest_os_id
    elif code == PartitionProperty.APIC_FREQUENCY:
        value = hypervisor.apic_frequency
    elif code == PartitionProperty.PROCESSOR_CLOCK_FREQUENCY:
        value = hypervisor.tsc_frequency
    elif code in _STORED:
        value = target.properties.get(code, _STORED[PartitionProperty(code)][0])
    else:
        raise HypercallError(Status.UNKNOWN_PROPERTY)
    return value.to_bytes(8, "little")


_STORED: Final = {
    PartitionProperty.SUSPEND: (0, 0, 1),
    PartitionProperty.CPU_RESERVE: (0, 0, 0x1_0000),
    PartitionProperty.CPU_CAP: (0x1_0000, 0, 0x1_0000),
    PartitionProperty.CPU_WEIGHT: (100, 1, 10_000),
}
"""Properties that are kept for the parent: default, least and greatest value (TLFS, partition properties)."""
_READ_ONLY: Final = frozenset(
    {
        PartitionProperty.REFERENCE_TIME,
        PartitionProperty.GUEST_OS_ID,
        PartitionProperty.APIC_FREQUENCY,
        PartitionProperty.PROCESSOR_CLOCK_FREQUENCY,
    }
)


def _set_property(vp: "VirtualProcessor", data: bytes) -> None:
    call = SetPartitionPropertyInput.unpack(data)
    child = vp.partition.hypervisor.child(vp.partition, call.partition_id)
    code = call.property_code
    if code == PartitionProperty.PRIVILEGE_FLAGS:
        if call.value & ~int(ROOT_PRIVILEGES):
            raise HypercallError(Status.PROPERTY_VALUE_OUT_OF_RANGE)
        if call.value & ~vp.partition.privileges:
            raise HypercallError(Status.ACCESS_DENIED)  # nobody gives what he does not have
        taken = child.privileges & ~call.value
        child.privileges = call.value
        child.take_privileges(taken)  # those below lose it too: else it would go on using it through them
    elif code in _STORED:
        _, least, greatest = _STORED[PartitionProperty(code)]
        if not least <= call.value <= greatest:
            raise HypercallError(Status.PROPERTY_VALUE_OUT_OF_RANGE)
        child.properties[code] = call.value
        if code == PartitionProperty.SUSPEND:
            child.suspend(bool(call.value))
    elif code in _READ_ONLY:
        raise HypercallError(Status.OPERATION_DENIED)
    else:
        raise HypercallError(Status.UNKNOWN_PROPERTY)


# Memory that the hypervisor itself works with


def _deposit(vp: "VirtualProcessor", header: bytes) -> RepStep:
    target = _depositable(vp, header)
    giver = vp.partition

    def step(index: int, element: bytes) -> None:
        gone: list[tuple[Partition, int]] = []
        with giver.hypervisor.map_lock:
            if target.state is PartitionState.DELETED:  # meanwhile: nobody would give the page back
                raise HypercallError(Status.INVALID_PARTITION_STATE)
            page = int.from_bytes(element, "little") * HV_PAGE_SIZE
            _check_budget(giver, len(giver.loans.lent.get(page, ())))
            target.pool.deposit(giver, page, gone)
        tell_watchers(gone)

    return step


def _withdraw(vp: "VirtualProcessor", header: bytes) -> RepStep:
    target = _depositable(vp, header)
    giver = vp.partition

    def step(index: int, element: bytes) -> bytes:
        with giver.hypervisor.map_lock:
            return (target.pool.withdraw(giver) // HV_PAGE_SIZE).to_bytes(8, "little")

    return step


def _depositable(vp: "VirtualProcessor", header: bytes) -> "Partition":
    call = PartitionReference.unpack(header)
    target = vp.partition.hypervisor.controlled(vp.partition, call.partition_id)
    if target.state is PartitionState.DELETED:
        raise HypercallError(Status.INVALID_PARTITION_STATE)
    return target


def _balance(vp: "VirtualProcessor", data: bytes) -> bytes:
    target = _depositable(vp, data)
    return MemoryBalance(target.pool.available, target.pool.in_use).pack()


# Guest physical address space


def _rights(flags: int) -> int:
    if flags & ~MapFlags.PERMISSIONS:
        raise HypercallError(Status.INVALID_PARAMETER)
    # No x64 page is writable or executable without being readable.
    if flags and not flags & MapFlags.READABLE:
        raise HypercallError(Status.INVALID_PARAMETER)
    return (
        (READ if flags & MapFlags.READABLE else 0)
        | (WRITE if flags & MapFlags.WRITABLE else 0)
        | (EXECUTE if flags & (MapFlags.KERNEL_EXECUTABLE | MapFlags.USER_EXECUTABLE) else 0)
    )


def _map_target(vp: "VirtualProcessor", call: MapGpaPages) -> "Partition":
    child = vp.partition.hypervisor.child(vp.partition, call.target_partition_id)
    if child.state not in (PartitionState.CREATED, PartitionState.ACTIVE):
        raise HypercallError(Status.INVALID_PARTITION_STATE)
    return child


def _check_budget(partition: "Partition", pages: int, memory: int = 0) -> None:
    """Mappings of so many pages of `partition`'s children are about to change: see whether it can afford that.

    What it really takes is charged where it is taken: by the memories, and by `Loans`.

    Raises:
        BudgetExceeded: it has too many mappings already, or no `memory` of the host's left; nothing changed.
    """
    for allowance, amount in (
        (partition.meter.mappings, SPLIT * pages),
        (partition.meter.host_memory, memory),
    ):
        allowance.charge(amount)
        allowance.release(amount)


def _map(vp: "VirtualProcessor", header: bytes) -> RepStep:
    call = MapGpaPages.unpack(header)
    parent = vp.partition
    child = _map_target(vp, call)
    rights = _rights(call.map_flags)
    base = call.target_gpa_base

    def step(index: int, element: bytes) -> None:
        source = int.from_bytes(element, "little") * HV_PAGE_SIZE
        target = (base + index) * HV_PAGE_SIZE
        gone: list[tuple[Partition, int]] = []
        with vp.partition.hypervisor.map_lock:  # what is checked must still hold when it is mapped
            if target >= child.memory.size or source >= parent.memory.size:
                raise HypercallError(Status.INVALID_PARAMETER)
            have = parent.memory.access(source)
            if not have or rights & ~have:
                raise HypercallError(
                    Status.ACCESS_DENIED
                )  # a page can be passed on with no more than one's own rights
            _check_budget(parent, 1, LOAN_COST)
            child.take_page(target, gone)
            try:
                child.memory.map(target, parent.memory, source, HV_PAGE_SIZE, rights)
                child.loans.borrow(target, source)
            except OSError:  # the host has no room for one more mapping: what was there is gone all the same
                child.memory.unmap(target, HV_PAGE_SIZE)
                raise HypercallError(Status.INSUFFICIENT_MEMORY) from None
        tell_watchers(gone)

    return step


def _unmap(vp: "VirtualProcessor", header: bytes) -> RepStep:
    call = MapGpaPages.unpack(header)
    parent = vp.partition
    child = _map_target(vp, call)
    if call.map_flags:
        raise HypercallError(Status.INVALID_PARAMETER)
    base = call.target_gpa_base

    def step(index: int, element: bytes) -> None:
        target = (base + index) * HV_PAGE_SIZE
        gone: list[tuple[Partition, int]] = []
        with parent.hypervisor.map_lock:
            if target >= child.memory.size:
                raise HypercallError(Status.INVALID_PARAMETER)
            _check_budget(parent, 1)
            child.take_page(target, gone)
            child.memory.unmap(target, HV_PAGE_SIZE)
        tell_watchers(gone)

    return step


CALLS: Final = (
    Call(CallCode.CREATE_PARTITION, _create, CreatePartition.SIZE, PartitionReference.SIZE, _MANAGE),
    Call(CallCode.INITIALIZE_PARTITION, _initialize, PartitionReference.SIZE, privilege=_MANAGE),
    Call(CallCode.FINALIZE_PARTITION, _finalize, PartitionReference.SIZE, privilege=_MANAGE),
    Call(CallCode.DELETE_PARTITION, _delete, PartitionReference.SIZE, privilege=_MANAGE),
    Call(CallCode.GET_PARTITION_PROPERTY, _get_property, PartitionPropertyInput.SIZE, 8, _MANAGE),
    Call(CallCode.SET_PARTITION_PROPERTY, _set_property, SetPartitionPropertyInput.SIZE, privilege=_MANAGE),
    Call(CallCode.GET_PARTITION_ID, _get_id, 0, PartitionReference.SIZE, Privilege.ACCESS_PARTITION_ID),
    Call(CallCode.GET_NEXT_CHILD_PARTITION, _next_child, NextChild.SIZE, PartitionReference.SIZE, _MANAGE),
    RepCall(CallCode.DEPOSIT_MEMORY, _deposit, 8, 8, privilege=Privilege.ACCESS_MEMORY_POOL),
    # The header's second half is a proximity domain hint.
    RepCall(CallCode.WITHDRAW_MEMORY, _withdraw, 16, 0, 8, privilege=Privilege.ACCESS_MEMORY_POOL),
    Call(CallCode.GET_MEMORY_BALANCE, _balance, 16, MemoryBalance.SIZE, Privilege.ACCESS_MEMORY_POOL),
    RepCall(CallCode.MAP_GPA_PAGES, _map, MapGpaPages.SIZE, 8, privilege=_MANAGE),
    RepCall(CallCode.UNMAP_GPA_PAGES, _unmap, MapGpaPages.SIZE, privilege=_MANAGE),
)
"""The hypercalls of this module."""
