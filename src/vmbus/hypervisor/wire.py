"""Inputs and outputs of hypercalls, and hypervisor messages, as they lie in memory.

Each is described under its hypercall's name in the TLFS; Linux's ``hvhdk.h`` has the same layouts.
"""

from typing import Annotated

from vmbus.wire import I64, U8, U16, U32, U64, Fixed, Structure, wire

__all__ = [
    "ApicEoiMessage",
    "AssertVirtualInterrupt",
    "ClusterIpi",
    "ClusterIpiEx",
    "ConnectPort",
    "CpuidInterceptMessage",
    "CreatePartition",
    "CreatePort",
    "CreateVp",
    "FlushVirtualAddressSpace",
    "FlushVirtualAddressSpaceEx",
    "GetPortProperty",
    "InitialVpContext",
    "InstallIntercept",
    "InterceptMessageHeader",
    "IoPortInterceptMessage",
    "MapGpaPages",
    "MemoryBalance",
    "MsrInterceptMessage",
    "NextChild",
    "PartitionPropertyInput",
    "PartitionReference",
    "PortReference",
    "PostMessageHeader",
    "ReadGpa",
    "ReferenceTscPage",
    "SegmentRegister",
    "SetPartitionPropertyInput",
    "SetVpRegister",
    "SignalEvent",
    "StartVirtualProcessor",
    "TableRegister",
    "TimerMessage",
    "TranslateVirtualAddress",
    "TranslateVirtualAddressOutput",
    "VpReference",
    "WriteGpa",
]


@wire(size=16)
class PostMessageHeader(Structure):
    """HvCallPostMessage before its 240 payload bytes."""

    connection_id: U32
    reserved: U32
    message_type: U32
    payload_size: U32


@wire(size=8)
class SignalEvent(Structure):
    """HvCallSignalEvent."""

    connection_id: U32
    flag_number: U16
    reserved: U16


@wire(size=56, offsets={"connection_partition_id": 16, "port_type": 24, "port_info_low": 32})
class CreatePort(Structure):
    """HvCallCreatePort.

    `port_info_low` and `port_info_high` hold, by type: SINT and VP, nothing (message); SINT and VP, base flag and
    flag count (event); the monitor page's address, nothing (monitor).
    """

    port_partition_id: U64
    port_id: U32
    port_vtl: U8
    min_connection_vtl: U8
    reserved: U16
    connection_partition_id: U64
    port_type: U32
    reserved2: U32
    port_info_low: U64
    port_info_high: U64
    proximity_domain: U64


@wire(size=72, offsets={"port_partition_id": 16, "port_type": 32, "proximity_domain": 64})
class ConnectPort(Structure):
    """HvCallConnectPort."""

    connection_partition_id: U64
    connection_id: U32
    connection_vtl: U8
    reserved: U8
    reserved2: U16
    port_partition_id: U64
    port_id: U32
    reserved3: U32
    port_type: U32
    reserved4: U32
    connection_info: Annotated[bytes, Fixed(24)]
    proximity_domain: U64


@wire(size=16)
class PortReference(Structure):
    """HvCallDeletePort and HvCallDisconnectPort: a partition and one of its ports or connections."""

    partition_id: U64
    id: U32
    reserved: U32


@wire(size=24)
class GetPortProperty(Structure):
    """HvCallGetPortProperty."""

    partition_id: U64
    port_id: U32
    reserved: U32
    property_code: U32
    reserved2: U32


@wire(size=56, offsets={"compatibility_version": 16, "disabled_xsave_features": 40})
class CreatePartition(Structure):
    """HvCallCreatePartition."""

    flags: U64
    proximity_domain: U64
    compatibility_version: U32
    reserved: U32
    disabled_features: Annotated[bytes, Fixed(16)]
    disabled_xsave_features: U64
    reserved2: U64


@wire(size=8)
class PartitionReference(Structure):
    """A partition id alone: initialise, finalise, delete, memory balance, and the output of create."""

    partition_id: U64


@wire(size=16)
class PartitionPropertyInput(Structure):
    """HvCallGetPartitionProperty."""

    partition_id: U64
    property_code: U32
    reserved: U32


@wire(size=24)
class SetPartitionPropertyInput(Structure):
    """HvCallSetPartitionProperty."""

    partition_id: U64
    property_code: U32
    reserved: U32
    value: U64


@wire(size=16)
class NextChild(Structure):
    """HvCallGetNextChildPartition."""

    parent_id: U64
    previous_child_id: U64


@wire(size=16)
class MemoryBalance(Structure):
    """Output of HvCallGetMemoryBalance, in pages."""

    pages_available: U64
    pages_in_use: U64


@wire(size=24)
class MapGpaPages(Structure):
    """Header of HvCallMapGpaPages and HvCallUnmapGpaPages; the base is a page number."""

    target_partition_id: U64
    target_gpa_base: U64
    map_flags: U32
    reserved: U32


@wire(size=32)
class ReadGpa(Structure):
    """HvCallReadGpa."""

    partition_id: U64
    vp_index: U32
    byte_count: U32
    gpa: U64
    control_flags: U64


@wire(size=48)
class WriteGpa(Structure):
    """HvCallWriteGpa."""

    partition_id: U64
    vp_index: U32
    byte_count: U32
    gpa: U64
    control_flags: U64
    data: Annotated[bytes, Fixed(16)]


@wire(size=40, offsets={"subnode_type": 15, "flags": 32})
class CreateVp(Structure):
    """HvCallCreateVp."""

    partition_id: U64
    vp_index: U32
    reserved: Annotated[bytes, Fixed(3)]
    subnode_type: U8
    subnode_id: U64
    proximity_domain: U64
    flags: U64


@wire(size=16)
class VpReference(Structure):
    """A processor of a partition: HvCallDeleteVp, and the header of the register calls."""

    partition_id: U64
    vp_index: U32
    target_vtl: U8
    reserved: Annotated[bytes, Fixed(3)]


@wire(size=32)
class SetVpRegister(Structure):
    """One element of HvCallSetVpRegisters."""

    name: U32
    reserved: U32
    reserved2: U64
    value_low: U64
    value_high: U64


@wire(size=32)
class TranslateVirtualAddress(Structure):
    """HvCallTranslateVirtualAddress; `gva_page` is a page number."""

    partition_id: U64
    vp_index: U32
    reserved: U32
    control_flags: U64
    gva_page: U64


@wire(size=16)
class TranslateVirtualAddressOutput(Structure):
    """Output of HvCallTranslateVirtualAddress; `gpa_page` is a page number."""

    result_code: U32
    cache_type_and_overlay: U32
    gpa_page: U64


@wire(size=24)
class InstallIntercept(Structure):
    """HvCallInstallIntercept."""

    partition_id: U64
    access_type: U32
    intercept_type: U32
    parameter: U64


@wire(size=32)
class AssertVirtualInterrupt(Structure):
    """HvCallAssertVirtualInterrupt."""

    partition_id: U64
    interrupt_control: U64
    destination: U64
    vector: U32
    target_vtl: U8
    reserved: U8
    reserved2: U16


@wire(size=16)
class ClusterIpi(Structure):
    """HvCallSendSyntheticClusterIpi."""

    vector: U32
    target_vtl: U8
    reserved: Annotated[bytes, Fixed(3)]
    processor_mask: U64


@wire(size=24)
class ClusterIpiEx(Structure):
    """HvCallSendSyntheticClusterIpiEx; the variable header holds the banks of the processor set (HV_VP_SET)."""

    vector: U32
    target_vtl: U8
    reserved: Annotated[bytes, Fixed(3)]
    set_format: U64
    valid_bank_mask: U64


@wire(size=32)
class FlushVirtualAddressSpaceEx(Structure):
    """HvCallFlushVirtualAddressSpaceEx; the variable header holds the banks of the processor set (HV_VP_SET)."""

    address_space: U64
    flags: U64
    set_format: U64
    valid_bank_mask: U64


@wire(size=24)
class FlushVirtualAddressSpace(Structure):
    """HvCallFlushVirtualAddressSpace, and the header of the list form."""

    address_space: U64
    flags: U64
    processor_mask: U64


@wire(size=24)
class TimerMessage(Structure):
    """Payload of a timer expiration message; times in 100 ns units."""

    timer_index: U32
    reserved: U32
    expiration_time: U64
    delivery_time: U64


@wire(size=24)
class ReferenceTscPage(Structure):
    """The used part of the reference TSC page: time = (TSC * scale >> 64) + offset, if the sequence is not 0."""

    sequence: U32
    reserved: U32
    scale: U64
    offset: I64


@wire(size=16)
class SegmentRegister(Structure):
    """HV_X64_SEGMENT_REGISTER."""

    base: U64
    limit: U32
    selector: U16
    attributes: U16


@wire(size=16, offsets={"limit": 6, "base": 8})
class TableRegister(Structure):
    """HV_X64_TABLE_REGISTER: IDTR and GDTR."""

    reserved: Annotated[bytes, Fixed(6)]
    limit: U16
    base: U64


@wire(size=224, offsets={"cs": 24, "idtr": 152, "efer": 184, "pat": 216})
class InitialVpContext(Structure):
    """HV_INITIAL_VP_CONTEXT: the registers that a processor is started with."""

    rip: U64
    rsp: U64
    rflags: U64
    cs: SegmentRegister
    ds: SegmentRegister
    es: SegmentRegister
    fs: SegmentRegister
    gs: SegmentRegister
    ss: SegmentRegister
    tr: SegmentRegister
    ldtr: SegmentRegister
    idtr: TableRegister
    gdtr: TableRegister
    efer: U64
    cr0: U64
    cr3: U64
    cr4: U64
    pat: U64


@wire(size=240, offsets={"target_vtl": 12, "context": 16})
class StartVirtualProcessor(Structure):
    """HvCallStartVirtualProcessor."""

    partition_id: U64
    vp_index: U32
    target_vtl: U8
    reserved: U8
    reserved2: U16
    context: InitialVpContext


@wire(size=8)
class ApicEoiMessage(Structure):
    """HV_X64_APIC_EOI_MESSAGE."""

    vp_index: U32
    interrupt_vector: U32


@wire(size=40, offsets={"access_type": 5, "cs": 8, "rip": 24})
class InterceptMessageHeader(Structure):
    """What every intercept message begins with."""

    vp_index: U32
    instruction_length: U8
    access_type: U8
    execution_state: U16
    cs: SegmentRegister
    rip: U64
    rflags: U64


@wire(size=128, offsets={"port_number": 40, "rax": 48, "rcx": 104})
class IoPortInterceptMessage(Structure):
    """HV_X64_IO_PORT_INTERCEPT_MESSAGE; bits 2:0 of `access_info` are the size in bytes."""

    header: InterceptMessageHeader
    port_number: U16
    access_info: U8
    instruction_byte_count: U8
    reserved: U32
    rax: U64
    instruction_bytes: Annotated[bytes, Fixed(16)]
    ds: SegmentRegister
    es: SegmentRegister
    rcx: U64
    rsi: U64
    rdi: U64


@wire(size=64, offsets={"rdx": 48})
class MsrInterceptMessage(Structure):
    """HV_X64_MSR_INTERCEPT_MESSAGE."""

    header: InterceptMessageHeader
    msr_number: U32
    reserved: U32
    rdx: U64
    rax: U64


@wire(size=104)
class CpuidInterceptMessage(Structure):
    """HV_X64_CPUID_INTERCEPT_MESSAGE: the registers, and what the hypervisor would answer."""

    header: InterceptMessageHeader
    rax: U64
    rcx: U64
    rdx: U64
    rbx: U64
    default_rax: U64
    default_rcx: U64
    default_rdx: U64
    default_rbx: U64
