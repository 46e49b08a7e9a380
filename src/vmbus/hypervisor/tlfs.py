"""Constants of the Hypervisor Top-Level Functional Specification (TLFS v6.0b), named as the TLFS names them.

The part of it that each table comes from is named there (section numbers change between editions).
Where the public TLFS leaves a value out, the peer that uses it is named
(Linux: ``include/asm-generic/hyperv-tlfs.h`` and ``hvhdk.h``; OpenVMM: ``hvdef``). All enumerations are
`IntEnum`/`IntFlag`, so they compare with the plain integers that come off the wire.
"""

from enum import IntEnum, IntFlag
from typing import Final

__all__ = [
    "ANY_VP",
    "EVENT_FLAGS_PER_SINT",
    "HV_PAGE_SIZE",
    "LINUX_GUEST_OS_ID",
    "MESSAGE_PAYLOAD_SIZE",
    "MESSAGE_SIZE",
    "PARTITION_ID_SELF",
    "SINT_COUNT",
    "STIMER_COUNT",
    "VP_INDEX_SELF",
    "CallCode",
    "InterceptAccess",
    "InterceptType",
    "MapFlags",
    "MessageType",
    "Msr",
    "PartitionProperty",
    "PartitionState",
    "PortProperty",
    "PortType",
    "Privilege",
    "RegisterName",
    "Status",
    "TranslateFlags",
    "TranslateResult",
]

HV_PAGE_SIZE: Final = 4096
PARTITION_ID_SELF: Final = 0xFFFF_FFFF_FFFF_FFFF
"""HV_PARTITION_ID_SELF: the caller's own partition (TLFS, partition identifiers)."""
VP_INDEX_SELF: Final = 0xFFFF_FFFE
"""HV_VP_INDEX_SELF: the calling virtual processor (TLFS, virtual processors)."""
ANY_VP: Final = 0xFFFF_FFFF
"""HV_ANY_VP: a port's target may be any processor of the partition (TLFS, inter-partition communication)."""
MAX_CONNECTION_ID: Final = 0x00FF_FFFF
"""Port and connection ids have 24 bits; the upper 8 are reserved and zero (TLFS, inter-partition communication)."""

SINT_COUNT: Final = 16
"""Synthetic interrupt sources of one virtual processor (TLFS, SynIC)."""
STIMER_COUNT: Final = 4
"""Synthetic timers of one virtual processor (TLFS, timers)."""
MESSAGE_SIZE: Final = 256
"""Bytes of one SIM message slot (TLFS, SynIC)."""
MESSAGE_PAYLOAD_SIZE: Final = 240
"""Payload bytes of one message (TLFS, inter-partition communication)."""
EVENT_FLAGS_PER_SINT: Final = 2048
"""Event flags of one SINT: 256 bytes of the SIEF page (TLFS, SynIC)."""
MAX_VPS: Final = 64
"""Virtual processors of one partition (CPUID 0x40000005 EAX)."""
FIRST_VALID_SINT_VECTOR: Final = 16
"""SINT vectors 0-15 are illegal (TLFS, SynIC)."""
XMM_INPUT_SIZE: Final = 96
"""Six XMM registers extend the input of a fast hypercall (TLFS, hypercall interface)."""
LINUX_GUEST_OS_ID: Final = 0x8100_0000_0000_0000
"""Top bits of the guest OS id of every Linux guest: open source, OS type 1 (TLFS, guest OS identity)."""


class Status(IntEnum):
    """HV_STATUS codes, the low 16 bits of a hypercall's result (TLFS appendix B)."""

    SUCCESS = 0x0000
    INVALID_HYPERCALL_CODE = 0x0002
    INVALID_HYPERCALL_INPUT = 0x0003
    INVALID_ALIGNMENT = 0x0004
    INVALID_PARAMETER = 0x0005
    ACCESS_DENIED = 0x0006
    INVALID_PARTITION_STATE = 0x0007
    OPERATION_DENIED = 0x0008
    UNKNOWN_PROPERTY = 0x0009
    PROPERTY_VALUE_OUT_OF_RANGE = 0x000A
    INSUFFICIENT_MEMORY = 0x000B
    PARTITION_TOO_DEEP = 0x000C
    INVALID_PARTITION_ID = 0x000D
    INVALID_VP_INDEX = 0x000E
    NOT_FOUND = 0x0010
    INVALID_PORT_ID = 0x0011
    INVALID_CONNECTION_ID = 0x0012
    INSUFFICIENT_BUFFERS = 0x0013
    NOT_ACKNOWLEDGED = 0x0014
    INVALID_VP_STATE = 0x0015
    ACKNOWLEDGED = 0x0016
    INVALID_SAVE_RESTORE_STATE = 0x0017
    INVALID_SYNIC_STATE = 0x0018
    OBJECT_IN_USE = 0x0019
    NO_DATA = 0x001B
    INACTIVE = 0x001C
    NO_RESOURCES = 0x001D
    FEATURE_UNAVAILABLE = 0x001E
    PARTIAL_PACKET = 0x001F
    INSUFFICIENT_BUFFER = 0x0033
    INVALID_REGISTER_VALUE = 0x0050
    OPERATION_FAILED = 0x0071
    TIMEOUT = 0x0078
    UNKNOWN_REGISTER_NAME = 0x0087


class CallCode(IntEnum):
    """Hypercall codes (TLFS appendix A; 0x95, 0x96 and 0x99 on: Linux `hvgdk.h`)."""

    FLUSH_VIRTUAL_ADDRESS_SPACE = 0x0002
    FLUSH_VIRTUAL_ADDRESS_LIST = 0x0003
    NOTIFY_LONG_SPIN_WAIT = 0x0008
    SEND_SYNTHETIC_CLUSTER_IPI = 0x000B
    FLUSH_VIRTUAL_ADDRESS_SPACE_EX = 0x0013
    FLUSH_VIRTUAL_ADDRESS_LIST_EX = 0x0014
    SEND_SYNTHETIC_CLUSTER_IPI_EX = 0x0015
    CREATE_PARTITION = 0x0040
    INITIALIZE_PARTITION = 0x0041
    FINALIZE_PARTITION = 0x0042
    DELETE_PARTITION = 0x0043
    GET_PARTITION_PROPERTY = 0x0044
    SET_PARTITION_PROPERTY = 0x0045
    GET_PARTITION_ID = 0x0046
    GET_NEXT_CHILD_PARTITION = 0x0047
    DEPOSIT_MEMORY = 0x0048
    WITHDRAW_MEMORY = 0x0049
    GET_MEMORY_BALANCE = 0x004A
    MAP_GPA_PAGES = 0x004B
    UNMAP_GPA_PAGES = 0x004C
    INSTALL_INTERCEPT = 0x004D
    CREATE_VP = 0x004E
    DELETE_VP = 0x004F
    GET_VP_REGISTERS = 0x0050
    SET_VP_REGISTERS = 0x0051
    TRANSLATE_VIRTUAL_ADDRESS = 0x0052
    READ_GPA = 0x0053
    WRITE_GPA = 0x0054
    CLEAR_VIRTUAL_INTERRUPT = 0x0056
    DELETE_PORT = 0x0058
    GET_PORT_PROPERTY = 0x005A
    DISCONNECT_PORT = 0x005B
    POST_MESSAGE = 0x005C
    SIGNAL_EVENT = 0x005D
    ASSERT_VIRTUAL_INTERRUPT = 0x0094
    CREATE_PORT = 0x0095
    CONNECT_PORT = 0x0096
    START_VIRTUAL_PROCESSOR = 0x0099
    GET_VP_INDEX_FROM_APIC_ID = 0x009A
    EXT_QUERY_CAPABILITIES = 0x8001


class Privilege(IntFlag):
    """HV_PARTITION_PRIVILEGE_MASK; also CPUID 0x40000003 EAX (low half) and EBX (high half)."""

    ACCESS_VP_RUNTIME_MSR = 1 << 0
    ACCESS_PARTITION_REFERENCE_COUNTER = 1 << 1
    ACCESS_SYNIC_MSRS = 1 << 2
    ACCESS_SYNTHETIC_TIMER_MSRS = 1 << 3
    ACCESS_APIC_MSRS = 1 << 4
    ACCESS_HYPERCALL_MSRS = 1 << 5
    ACCESS_VP_INDEX = 1 << 6
    ACCESS_RESET_MSR = 1 << 7
    ACCESS_STATS_MSR = 1 << 8
    ACCESS_PARTITION_REFERENCE_TSC = 1 << 9
    ACCESS_GUEST_IDLE_MSR = 1 << 10
    ACCESS_FREQUENCY_MSRS = 1 << 11
    ACCESS_DEBUG_MSRS = 1 << 12
    CREATE_PARTITIONS = 1 << 32
    ACCESS_PARTITION_ID = 1 << 33
    ACCESS_MEMORY_POOL = 1 << 34
    ADJUST_MESSAGE_BUFFERS = 1 << 35
    POST_MESSAGES = 1 << 36
    SIGNAL_EVENTS = 1 << 37
    CREATE_PORT = 1 << 38
    CONNECT_PORT = 1 << 39
    ACCESS_STATS = 1 << 40
    DEBUGGING = 1 << 43
    CPU_MANAGEMENT = 1 << 44
    ACCESS_VP_REGISTERS = 1 << 49
    EXTENDED_HYPERCALLS = 1 << 52
    START_VIRTUAL_PROCESSOR = 1 << 53


class Msr(IntEnum):
    """Synthetic MSRs (TLFS appendix C) and the architectural ones that the hypervisor answers itself."""

    IA32_TSC = 0x10
    IA32_PLATFORM_ID = 0x17
    IA32_APIC_BASE = 0x1B
    IA32_FEATURE_CONTROL = 0x3A
    IA32_TSC_ADJUST = 0x3B
    IA32_BIOS_SIGN_ID = 0x8B
    IA32_MTRRCAP = 0xFE
    IA32_ARCH_CAPABILITIES = 0x10A
    IA32_MISC_ENABLE = 0x1A0
    IA32_PAT = 0x277
    IA32_TSC_DEADLINE = 0x6E0
    GUEST_OS_ID = 0x4000_0000
    HYPERCALL = 0x4000_0001
    VP_INDEX = 0x4000_0002
    RESET = 0x4000_0003
    VP_RUNTIME = 0x4000_0010
    TIME_REF_COUNT = 0x4000_0020
    REFERENCE_TSC = 0x4000_0021
    TSC_FREQUENCY = 0x4000_0022
    APIC_FREQUENCY = 0x4000_0023
    EOI = 0x4000_0070
    ICR = 0x4000_0071
    TPR = 0x4000_0072
    VP_ASSIST_PAGE = 0x4000_0073
    SCONTROL = 0x4000_0080
    SVERSION = 0x4000_0081
    SIEFP = 0x4000_0082
    SIMP = 0x4000_0083
    EOM = 0x4000_0084
    SINT0 = 0x4000_0090
    SINT15 = 0x4000_009F
    STIMER0_CONFIG = 0x4000_00B0
    STIMER0_COUNT = 0x4000_00B1
    STIMER3_COUNT = 0x4000_00B7
    GUEST_IDLE = 0x4000_00F0
    CRASH_P0 = 0x4000_0100
    CRASH_P4 = 0x4000_0104
    CRASH_CTL = 0x4000_0105


class MessageType(IntEnum):
    """HV_MESSAGE_TYPE; bit 31 is set in messages from the hypervisor, clear in those of partitions."""

    NONE = 0x0000_0000
    UNMAPPED_GPA = 0x8000_0000
    GPA_INTERCEPT = 0x8000_0001
    TIMER_EXPIRED = 0x8000_0010
    INVALID_VP_REGISTER_VALUE = 0x8000_0020
    UNRECOVERABLE_EXCEPTION = 0x8000_0021
    UNSUPPORTED_FEATURE = 0x8000_0022
    X64_IO_PORT_INTERCEPT = 0x8001_0000
    X64_MSR_INTERCEPT = 0x8001_0001
    X64_CPUID_INTERCEPT = 0x8001_0002
    X64_EXCEPTION_INTERCEPT = 0x8001_0003
    X64_APIC_EOI = 0x8001_0004


HYPERVISOR_MESSAGE: Final = 0x8000_0000
"""The bit of a message type that only the hypervisor itself may set."""


class PortType(IntEnum):
    """HV_PORT_TYPE (TLFS, inter-partition communication)."""

    MESSAGE = 1
    EVENT = 2
    MONITOR = 3


class PortProperty(IntEnum):
    """HV_PORT_PROPERTY_CODE (HvCallGetPortProperty)."""

    POST_COUNT = 0
    PREFERRED_TARGET_VP = 1
    MONITOR_ADDRESS = 2
    TARGET_VP = 4


class PartitionState(IntEnum):
    """The life of a partition: created, initialised (running), finalised (only deletion is left), deleted."""

    CREATED = 0
    ACTIVE = 1
    FINALIZED = 2
    DELETED = 3


class PartitionProperty(IntEnum):
    """HV_PARTITION_PROPERTY_CODE (TLFS, partition management)."""

    PRIVILEGE_FLAGS = 0x0001_0000
    SUSPEND = 0x0002_0000
    CPU_RESERVE = 0x0002_0001
    CPU_CAP = 0x0002_0002
    CPU_WEIGHT = 0x0002_0003
    APIC_FREQUENCY = 0x0003_0004
    REFERENCE_TIME = 0x0003_0005
    VIRTUAL_TLB_PAGE_COUNT = 0x0005_0000
    PROCESSOR_VENDOR = 0x0006_0000
    PHYSICAL_ADDRESS_WIDTH = 0x0006_0006
    PROCESSOR_CLOCK_FREQUENCY = 0x0006_0009
    GUEST_OS_ID = 0x0007_0000


class MapFlags(IntFlag):
    """HV_MAP_GPA_FLAGS: the access rights with which a GPA page is mapped (TLFS, guest physical memory)."""

    NONE = 0
    READABLE = 1
    WRITABLE = 2
    KERNEL_EXECUTABLE = 4
    USER_EXECUTABLE = 8
    PERMISSIONS = 15


class InterceptType(IntEnum):
    """HV_INTERCEPT_TYPE (TLFS, intercepts)."""

    X64_IO_PORT = 0
    X64_MSR = 1
    X64_CPUID = 2
    EXCEPTION = 3
    X64_MSR_INDEX = 0x0C


class InterceptAccess(IntFlag):
    """HV_INTERCEPT_ACCESS_TYPE_MASK (TLFS, intercepts)."""

    NONE = 0
    READ = 1
    WRITE = 2
    EXECUTE = 4


class TranslateFlags(IntFlag):
    """HV_TRANSLATE_GVA_CONTROL_FLAGS (TLFS, HvCallTranslateVirtualAddress)."""

    VALIDATE_READ = 1 << 0
    VALIDATE_WRITE = 1 << 1
    VALIDATE_EXECUTE = 1 << 2
    PRIVILEGE_EXEMPT = 1 << 3
    SET_PAGE_TABLE_BITS = 1 << 4
    TLB_FLUSH_INHIBIT = 1 << 5
    SUPERVISOR_ACCESS = 1 << 6
    USER_ACCESS = 1 << 7


class TranslateResult(IntEnum):
    """HV_TRANSLATE_GVA_RESULT_CODE (TLFS, HvCallTranslateVirtualAddress)."""

    SUCCESS = 0
    PAGE_NOT_PRESENT = 1
    PRIVILEGE_VIOLATION = 2
    INVALID_PAGE_TABLE_FLAGS = 3
    GPA_UNMAPPED = 4
    GPA_NO_READ_ACCESS = 5
    GPA_NO_WRITE_ACCESS = 6
    GPA_ILLEGAL_OVERLAY_ACCESS = 7
    INTERCEPT = 8


class RegisterName(IntEnum):
    """HV_REGISTER_NAME (TLFS, virtual processors; values as in OpenVMM's `hvdef`)."""

    EXPLICIT_SUSPEND = 0x0000_0000
    INTERCEPT_SUSPEND = 0x0000_0001
    HYPERVISOR_VERSION = 0x0000_0100
    PRIVILEGES_AND_FEATURES_INFO = 0x0000_0200
    GUEST_CRASH_P0 = 0x0000_0210
    GUEST_CRASH_P4 = 0x0000_0214
    GUEST_CRASH_CTL = 0x0000_0215
    RAX = 0x0002_0000
    RCX = 0x0002_0001
    RDX = 0x0002_0002
    RBX = 0x0002_0003
    RSP = 0x0002_0004
    RBP = 0x0002_0005
    RSI = 0x0002_0006
    RDI = 0x0002_0007
    R8 = 0x0002_0008
    R15 = 0x0002_000F
    RIP = 0x0002_0010
    RFLAGS = 0x0002_0011
    XMM0 = 0x0003_0000
    XMM15 = 0x0003_000F
    CR0 = 0x0004_0000
    CR2 = 0x0004_0001
    CR3 = 0x0004_0002
    CR4 = 0x0004_0003
    CR8 = 0x0004_0004
    DR0 = 0x0005_0000
    DR7 = 0x0005_0005
    ES = 0x0006_0000
    CS = 0x0006_0001
    SS = 0x0006_0002
    DS = 0x0006_0003
    FS = 0x0006_0004
    GS = 0x0006_0005
    LDTR = 0x0006_0006
    TR = 0x0006_0007
    IDTR = 0x0007_0000
    GDTR = 0x0007_0001
    TSC = 0x0008_0000
    EFER = 0x0008_0001
    KERNEL_GS_BASE = 0x0008_0002
    APIC_BASE = 0x0008_0003
    PAT = 0x0008_0004
    SYSENTER_CS = 0x0008_0005
    SYSENTER_EIP = 0x0008_0006
    SYSENTER_ESP = 0x0008_0007
    STAR = 0x0008_0008
    LSTAR = 0x0008_0009
    CSTAR = 0x0008_000A
    SFMASK = 0x0008_000B
    INITIAL_APIC_ID = 0x0008_000C
    TSC_AUX = 0x0008_007B
    VP_RUNTIME = 0x0009_0000
    HYPERCALL = 0x0009_0001
    GUEST_OS_ID = 0x0009_0002
    VP_INDEX = 0x0009_0003
    TIME_REF_COUNT = 0x0009_0004
    VP_ASSIST_PAGE = 0x0009_0013
    REFERENCE_TSC = 0x0009_0017
    SINT0 = 0x000A_0000
    SINT15 = 0x000A_000F
    SCONTROL = 0x000A_0010
    SVERSION = 0x000A_0011
    SIFP = 0x000A_0012
    SIPP = 0x000A_0013
    EOM = 0x000A_0014
    STIMER0_CONFIG = 0x000B_0000
    STIMER3_COUNT = 0x000B_0007
