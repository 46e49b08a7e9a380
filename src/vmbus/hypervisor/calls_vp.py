"""Virtual processors by hypercall: life, registers, address translation, memory, interrupts, intercepts, TLBs."""

from typing import TYPE_CHECKING, Final

from vmbus.errors import GuestMemoryError, HypercallError
from vmbus.hypervisor.abi import Call, RepCall, RepStep
from vmbus.hypervisor.apic import FIRST_VALID_VECTOR, DeliveryMode
from vmbus.hypervisor.registers import paging_state, read_register, start_with, write_register
from vmbus.hypervisor.tlfs import (
    HV_PAGE_SIZE,
    MAX_VPS,
    VP_INDEX_SELF,
    CallCode,
    PartitionState,
    Privilege,
    Status,
    TranslateFlags,
    TranslateResult,
)
from vmbus.hypervisor.translate import Access, walk
from vmbus.hypervisor.wire import (
    AssertVirtualInterrupt,
    ClusterIpi,
    ClusterIpiEx,
    CreateVp,
    FlushVirtualAddressSpace,
    FlushVirtualAddressSpaceEx,
    InstallIntercept,
    PartitionReference,
    ReadGpa,
    SetVpRegister,
    StartVirtualProcessor,
    TranslateVirtualAddress,
    TranslateVirtualAddressOutput,
    VpReference,
    WriteGpa,
)

if TYPE_CHECKING:
    from vmbus.hypervisor.vp import VirtualProcessor

__all__ = ["CALLS"]

_TRANSLATE_FLAGS: Final = int(sum(TranslateFlags))
SET_SPARSE: Final = 0
SET_ALL: Final = 1
"""HV_GENERIC_SET_FORMAT."""
CACHE_TYPE_WRITE_BACK: Final = 6
MAX_GPA_ACCESS: Final = 16
"""Bytes that HvCallReadGpa and HvCallWriteGpa move at most."""
_MASK32: Final = 0xFFFF_FFFF
_MANAGE: Final = Privilege.CREATE_PARTITIONS


def _vp_of(vp: "VirtualProcessor", partition_id: int, vp_index: int) -> "VirtualProcessor":
    """The processor that a call names, in the caller's partition or one of its children."""
    target = vp.partition.hypervisor.controlled(vp.partition, partition_id)
    if vp_index == VP_INDEX_SELF and target is vp.partition:
        return vp
    return target.vp(vp_index)


def _register_target(vp: "VirtualProcessor", header: bytes) -> "VirtualProcessor":
    call = VpReference.unpack(header)
    target = _vp_of(vp, call.partition_id, call.vp_index)
    if call.target_vtl or any(call.reserved):
        raise HypercallError(Status.INVALID_PARAMETER)
    needed = Privilege.ACCESS_VP_REGISTERS if target.partition is vp.partition else _MANAGE
    if not vp.partition.privileges & needed:
        raise HypercallError(Status.ACCESS_DENIED)
    return target


def _create_vp(vp: "VirtualProcessor", data: bytes) -> None:
    call = CreateVp.unpack(data)
    child = vp.partition.hypervisor.child(vp.partition, call.partition_id)
    if child.state is not PartitionState.ACTIVE:
        raise HypercallError(Status.INVALID_PARTITION_STATE)
    if any(call.reserved) or call.flags:
        raise HypercallError(Status.INVALID_PARAMETER)
    vp.partition.hypervisor.create_vp(child, call.vp_index)


def _delete_vp(vp: "VirtualProcessor", data: bytes) -> None:
    call = VpReference.unpack(data)
    child = vp.partition.hypervisor.child(vp.partition, call.partition_id)
    vp.partition.hypervisor.delete_vp(child, call.vp_index)


def _start_vp(vp: "VirtualProcessor", data: bytes) -> None:
    call = StartVirtualProcessor.unpack(data)
    target = _vp_of(vp, call.partition_id, call.vp_index)
    if target.partition.state is not PartitionState.ACTIVE:
        raise HypercallError(Status.INVALID_PARTITION_STATE)
    if call.target_vtl or call.reserved or call.reserved2:
        raise HypercallError(Status.INVALID_PARAMETER)
    if target.started:
        raise HypercallError(Status.INVALID_VP_STATE)
    start_with(target, call.context)


def _get_registers(vp: "VirtualProcessor", header: bytes) -> RepStep:
    target = _register_target(vp, header)

    def step(index: int, element: bytes) -> bytes:
        return read_register(target, int.from_bytes(element, "little")).to_bytes(16, "little")

    return step


def _set_registers(vp: "VirtualProcessor", header: bytes) -> RepStep:
    target = _register_target(vp, header)

    def step(index: int, element: bytes) -> None:
        register = SetVpRegister.unpack(element)
        if register.reserved or register.reserved2:
            raise HypercallError(Status.INVALID_PARAMETER)
        write_register(target, register.name, register.value_high << 64 | register.value_low)

    return step


def _access(flags: int) -> Access:
    if flags & ~_TRANSLATE_FLAGS or (
        flags & TranslateFlags.USER_ACCESS and flags & TranslateFlags.SUPERVISOR_ACCESS
    ):
        raise HypercallError(Status.INVALID_PARAMETER)
    return Access(
        read=bool(flags & TranslateFlags.VALIDATE_READ),
        write=bool(flags & TranslateFlags.VALIDATE_WRITE),
        execute=bool(flags & TranslateFlags.VALIDATE_EXECUTE),
        user=bool(flags & TranslateFlags.USER_ACCESS),
        exempt=bool(flags & TranslateFlags.PRIVILEGE_EXEMPT),
        set_bits=bool(flags & TranslateFlags.SET_PAGE_TABLE_BITS),
    )


def _translate(vp: "VirtualProcessor", data: bytes) -> bytes:
    call = TranslateVirtualAddress.unpack(data)
    target = _vp_of(vp, call.partition_id, call.vp_index)
    needed = Privilege.ACCESS_VP_REGISTERS if target.partition is vp.partition else _MANAGE
    if not vp.partition.privileges & needed:
        raise HypercallError(Status.ACCESS_DENIED)
    gva = call.gva_page << 12 & 0xFFFF_FFFF_FFFF_FFFF
    found = walk(target.partition.memory, paging_state(target), gva, _access(call.control_flags))
    overlay = found.result is TranslateResult.SUCCESS and target.partition.is_overlay(found.gpa)
    return TranslateVirtualAddressOutput(
        result_code=found.result,
        cache_type_and_overlay=CACHE_TYPE_WRITE_BACK | overlay << 8,
        gpa_page=found.gpa >> 12,
    ).pack()


def _gpa_target(vp: "VirtualProcessor", call: ReadGpa | WriteGpa) -> "VirtualProcessor":
    if call.byte_count > MAX_GPA_ACCESS or call.gpa % HV_PAGE_SIZE + call.byte_count > HV_PAGE_SIZE:
        raise HypercallError(Status.INVALID_PARAMETER)
    child = vp.partition.hypervisor.child(vp.partition, call.partition_id)
    return child.vp(call.vp_index)


def _gpa_result(memory_access: int, wanted: int) -> TranslateResult:
    if not memory_access:
        return TranslateResult.GPA_UNMAPPED
    return TranslateResult.GPA_NO_WRITE_ACCESS if wanted & 2 else TranslateResult.GPA_NO_READ_ACCESS


def _read_gpa(vp: "VirtualProcessor", data: bytes) -> bytes:
    call = ReadGpa.unpack(data)
    memory = _gpa_target(vp, call).partition.memory
    try:
        result, found = TranslateResult.SUCCESS, memory.read(call.gpa, call.byte_count)
    except GuestMemoryError:
        result, found = _gpa_result(memory.access(call.gpa), 1), b""
    return int(result).to_bytes(8, "little") + found.ljust(MAX_GPA_ACCESS, b"\0")


def _write_gpa(vp: "VirtualProcessor", data: bytes) -> bytes:
    call = WriteGpa.unpack(data)
    memory = _gpa_target(vp, call).partition.memory
    try:
        memory.write(call.gpa, call.data[: call.byte_count])
        result = TranslateResult.SUCCESS
    except GuestMemoryError:
        result = _gpa_result(memory.access(call.gpa), 2)
    return int(result).to_bytes(8, "little")


# Interrupts and intercepts

_ASSERTABLE: Final = frozenset(
    {
        DeliveryMode.FIXED,
        DeliveryMode.LOWEST_PRIORITY,
        DeliveryMode.NMI,
        DeliveryMode.INIT,
        DeliveryMode.STARTUP,
        DeliveryMode.EXTINT,
    }
)
"""HV_INTERRUPT_TYPE has the values of `DeliveryMode`; there is no SMM here."""


def _assert_interrupt(vp: "VirtualProcessor", data: bytes) -> None:
    call = AssertVirtualInterrupt.unpack(data)
    child = vp.partition.hypervisor.child(vp.partition, call.partition_id)
    mode = call.interrupt_control & _MASK32
    level, logical = bool(call.interrupt_control >> 32 & 1), bool(call.interrupt_control >> 33 & 1)
    if call.interrupt_control >> 34 or call.target_vtl or call.reserved or call.reserved2:
        raise HypercallError(Status.INVALID_PARAMETER)
    if mode not in _ASSERTABLE or call.vector > 255 or call.destination > _MASK32:
        raise HypercallError(Status.INVALID_PARAMETER)
    addressed = mode in (DeliveryMode.FIXED, DeliveryMode.LOWEST_PRIORITY)
    if (level and not addressed) or (addressed and call.vector < FIRST_VALID_VECTOR):
        raise HypercallError(Status.INVALID_PARAMETER)
    if mode in (DeliveryMode.NMI, DeliveryMode.INIT) and call.vector:
        raise HypercallError(Status.INVALID_PARAMETER)
    if child.state is not PartitionState.ACTIVE:
        raise HypercallError(Status.INVALID_PARTITION_STATE)
    if mode == DeliveryMode.EXTINT:
        if call.destination or logical:  # always the boot processor's
            raise HypercallError(Status.INVALID_PARAMETER)
        if not child.vp(0).request_external(call.vector):
            raise HypercallError(Status.ACKNOWLEDGED)
        return
    for target in list(child.vps):
        if target.apic.matches(call.destination, logical):
            target.receive_ipi(mode, call.vector, level=level)
            if mode == DeliveryMode.LOWEST_PRIORITY:
                break


def _clear_interrupt(vp: "VirtualProcessor", data: bytes) -> None:
    call = PartitionReference.unpack(data)
    child = vp.partition.hypervisor.child(vp.partition, call.partition_id)
    if child.state is not PartitionState.ACTIVE:
        raise HypercallError(Status.INVALID_PARTITION_STATE)
    if not child.vp(0).clear_external():
        raise HypercallError(Status.NOT_ACKNOWLEDGED)


def _cluster_ipi(vp: "VirtualProcessor", data: bytes) -> None:
    call = ClusterIpi.unpack(data)
    if not FIRST_VALID_VECTOR <= call.vector <= 255 or call.target_vtl or any(call.reserved):
        raise HypercallError(Status.INVALID_PARAMETER)
    for target in list(vp.partition.vps):
        if call.processor_mask >> target.index & 1:
            target.request_interrupt(call.vector)


def _processor_set(format: int, valid_bank_mask: int, banks: bytes) -> int:
    """The mask that an HV_VP_SET describes: all processors, or 64-bit banks for the set bits of its bank mask."""
    if format == SET_ALL:
        return (1 << MAX_VPS) - 1
    if format != SET_SPARSE or valid_bank_mask.bit_count() * 8 != len(banks):
        raise HypercallError(Status.INVALID_PARAMETER)
    mask, at = 0, 0
    for bank in range(64):
        if valid_bank_mask >> bank & 1:
            mask |= int.from_bytes(banks[at : at + 8], "little") << 64 * bank
            at += 8
    return mask


def _cluster_ipi_ex(vp: "VirtualProcessor", data: bytes) -> None:
    call = ClusterIpiEx.unpack(data)
    if not FIRST_VALID_VECTOR <= call.vector <= 255 or call.target_vtl or any(call.reserved):
        raise HypercallError(Status.INVALID_PARAMETER)
    mask = _processor_set(call.set_format, call.valid_bank_mask, data[ClusterIpiEx.SIZE :])
    for target in list(vp.partition.vps):
        if mask >> target.index & 1:
            target.request_interrupt(call.vector)


def _apic_ids(vp: "VirtualProcessor", header: bytes) -> RepStep:
    call = VpReference.unpack(header[:8].ljust(VpReference.SIZE, b"\0"))
    target = vp.partition.hypervisor.controlled(vp.partition, call.partition_id)

    def step(index: int, element: bytes) -> bytes:
        apic_id = int.from_bytes(element, "little")
        for candidate in list(target.vps):
            if candidate.apic.apic_id == apic_id:
                return candidate.index.to_bytes(4, "little")
        raise HypercallError(Status.INVALID_PARAMETER)

    return step


def _install_intercept(vp: "VirtualProcessor", data: bytes) -> None:
    call = InstallIntercept.unpack(data)
    child = vp.partition.hypervisor.child(vp.partition, call.partition_id)
    child.intercepts.install(call.intercept_type, call.access_type, call.parameter)


# TLB: there is none to flush here but an engine's, which is told

FLUSH_ALL_PROCESSORS: Final = 1


def _flush_target(vp: "VirtualProcessor", data: bytes) -> int:
    call = FlushVirtualAddressSpace.unpack(data)
    if call.flags & ~0xF:
        raise HypercallError(Status.INVALID_PARAMETER)
    everybody = (1 << len(vp.partition.vps)) - 1
    return everybody if call.flags & FLUSH_ALL_PROCESSORS else call.processor_mask & everybody


def _flush_space(vp: "VirtualProcessor", data: bytes) -> None:
    vp.partition.flush_tlb(_flush_target(vp, data))


def _flush_list(vp: "VirtualProcessor", header: bytes) -> RepStep:
    vp.partition.flush_tlb(_flush_target(vp, header))
    return lambda index, element: None


def _flush_target_ex(vp: "VirtualProcessor", data: bytes) -> int:
    call = FlushVirtualAddressSpaceEx.unpack(data)
    if call.flags & ~0xF:
        raise HypercallError(Status.INVALID_PARAMETER)
    everybody = (1 << len(vp.partition.vps)) - 1
    if call.flags & FLUSH_ALL_PROCESSORS:
        return everybody
    banks = data[FlushVirtualAddressSpaceEx.SIZE :]
    return _processor_set(call.set_format, call.valid_bank_mask, banks) & everybody


def _flush_space_ex(vp: "VirtualProcessor", data: bytes) -> None:
    vp.partition.flush_tlb(_flush_target_ex(vp, data))


def _flush_list_ex(vp: "VirtualProcessor", header: bytes) -> RepStep:
    vp.partition.flush_tlb(_flush_target_ex(vp, header))
    return lambda index, element: None


def _spin_wait(vp: "VirtualProcessor", data: bytes) -> None:
    """HvCallNotifyLongSpinWait: a hint; the processors here are not scheduled against each other."""


def _query_extended(vp: "VirtualProcessor", data: bytes) -> bytes:
    return bytes(8)  # no extended capability


CALLS: Final = (
    Call(CallCode.CREATE_VP, _create_vp, CreateVp.SIZE, privilege=_MANAGE),
    Call(CallCode.DELETE_VP, _delete_vp, VpReference.SIZE, privilege=_MANAGE),
    RepCall(CallCode.GET_VP_REGISTERS, _get_registers, VpReference.SIZE, 4, 16),
    RepCall(CallCode.SET_VP_REGISTERS, _set_registers, VpReference.SIZE, SetVpRegister.SIZE),
    Call(
        CallCode.TRANSLATE_VIRTUAL_ADDRESS,
        _translate,
        TranslateVirtualAddress.SIZE,
        TranslateVirtualAddressOutput.SIZE,
    ),
    Call(CallCode.READ_GPA, _read_gpa, ReadGpa.SIZE, 24, _MANAGE),
    Call(CallCode.WRITE_GPA, _write_gpa, WriteGpa.SIZE, 8, _MANAGE),
    Call(
        CallCode.ASSERT_VIRTUAL_INTERRUPT, _assert_interrupt, AssertVirtualInterrupt.SIZE, privilege=_MANAGE
    ),
    Call(CallCode.CLEAR_VIRTUAL_INTERRUPT, _clear_interrupt, PartitionReference.SIZE, privilege=_MANAGE),
    Call(
        CallCode.START_VIRTUAL_PROCESSOR,
        _start_vp,
        StartVirtualProcessor.SIZE,
        privilege=Privilege.START_VIRTUAL_PROCESSOR,
    ),
    Call(CallCode.SEND_SYNTHETIC_CLUSTER_IPI, _cluster_ipi, ClusterIpi.SIZE),
    RepCall(CallCode.GET_VP_INDEX_FROM_APIC_ID, _apic_ids, 16, 4, 4),
    Call(CallCode.INSTALL_INTERCEPT, _install_intercept, InstallIntercept.SIZE, privilege=_MANAGE),
    Call(CallCode.FLUSH_VIRTUAL_ADDRESS_SPACE, _flush_space, FlushVirtualAddressSpace.SIZE),
    RepCall(CallCode.FLUSH_VIRTUAL_ADDRESS_LIST, _flush_list, FlushVirtualAddressSpace.SIZE, 8),
    Call(CallCode.SEND_SYNTHETIC_CLUSTER_IPI_EX, _cluster_ipi_ex, ClusterIpiEx.SIZE, variable=True),
    Call(
        CallCode.FLUSH_VIRTUAL_ADDRESS_SPACE_EX,
        _flush_space_ex,
        FlushVirtualAddressSpaceEx.SIZE,
        variable=True,
    ),
    RepCall(
        CallCode.FLUSH_VIRTUAL_ADDRESS_LIST_EX,
        _flush_list_ex,
        FlushVirtualAddressSpaceEx.SIZE,
        8,
        variable=True,
    ),
    Call(CallCode.NOTIFY_LONG_SPIN_WAIT, _spin_wait, 8),
    Call(CallCode.EXT_QUERY_CAPABILITIES, _query_extended, 0, 8, Privilege.EXTENDED_HYPERCALLS),
)
"""The hypercalls of this module."""
