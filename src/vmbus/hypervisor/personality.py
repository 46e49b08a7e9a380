"""What a partition presents to its guest: identity, privileges and CPUID leaves (TLFS chapter 2).

A personality also says which enlightened drivers the guest operating system of that time has, so that a model
guest chooses between VMBus devices and emulated hardware as the real one would.
"""

from dataclasses import dataclass, field, replace
from typing import Final

from vmbus.hypervisor.tlfs import LINUX_GUEST_OS_ID, Privilege

__all__ = [
    "CHILD_PRIVILEGES",
    "DOS",
    "LINUX",
    "OLD_BSD",
    "PERSONALITIES",
    "ROOT_PRIVILEGES",
    "SERVER_2008",
    "SERVER_2008_R2",
    "SERVER_2012",
    "SERVER_2012_R2",
    "SERVER_2016",
    "SERVER_2019",
    "SERVER_2022",
    "SUSE_LINUX",
    "VISTA",
    "WINDOWS_10",
    "WINDOWS_2000",
    "Personality",
]

CHILD_PRIVILEGES: Final = (
    Privilege.ACCESS_VP_RUNTIME_MSR
    | Privilege.ACCESS_PARTITION_REFERENCE_COUNTER
    | Privilege.ACCESS_SYNIC_MSRS
    | Privilege.ACCESS_SYNTHETIC_TIMER_MSRS
    | Privilege.ACCESS_APIC_MSRS
    | Privilege.ACCESS_HYPERCALL_MSRS
    | Privilege.ACCESS_VP_INDEX
    | Privilege.ACCESS_PARTITION_REFERENCE_TSC
    | Privilege.ACCESS_FREQUENCY_MSRS
    | Privilege.POST_MESSAGES
    | Privilege.SIGNAL_EVENTS
)
"""What a child may do unless its parent says otherwise: CPUID 0x40000003 EAX 0xa7f, EBX 0x30."""

ROOT_PRIVILEGES: Final = Privilege(sum(Privilege))
"""The root may do everything that is defined."""

FREQUENCY_MSRS_AVAILABLE: Final = 1 << 8
XMM_INPUT_AVAILABLE: Final = 1 << 4
CRASH_MSRS_AVAILABLE: Final = 1 << 10
XMM_OUTPUT_AVAILABLE: Final = 1 << 15
DIRECT_TIMERS_AVAILABLE: Final = 1 << 19
"""Bits of CPUID 0x40000003 EDX (TLFS, feature discovery)."""

USE_APIC_MSRS: Final = 1 << 3
RELAXED_TIMING: Final = 1 << 5
DEPRECATE_AUTO_EOI: Final = 1 << 9
"""Bits of CPUID 0x40000004 EAX (TLFS, feature discovery)."""


@dataclass(frozen=True, slots=True)
class Personality:
    """A guest operating system as the hypervisor and the bus see it.

    Attributes:
        name: how the command line and reports call it.
        guest_os_id: what the guest writes to HV_X64_MSR_GUEST_OS_ID; 0 for guests that never do.
        vmbus_version: the newest VMBus version that its drivers speak (major << 16 | minor), 0 for none.
        storage_version: the newest storage protocol that they speak (major << 8 | minor), 0 for none.
        network_version: the newest NVSP version that they speak (major << 16 | minor), 0 for none.
        enlightened: device kinds for which it has VMBus drivers: ``storage``, ``network``, ``video``, ``input``,
            ``services``. All others get emulated hardware.
        hypervisor_build: build number and version that CPUID 0x40000002 shows: (build, major, minor).
        features: CPUID 0x40000003 EDX.
        recommendations: CPUID 0x40000004 EAX.
        privileges: the partition's privilege mask.
        hypervisor_present: whether CPUID shows a hypervisor at all.
        max_leaf: the last hypervisor leaf of CPUID.
        x2apic: whether its processors have an x2APIC (CPUID 1 ECX bit 21, leaf 0x0B).
    """

    name: str
    guest_os_id: int = 0
    vmbus_version: int = 0
    storage_version: int = 0
    network_version: int = 0
    enlightened: frozenset[str] = field(default_factory=frozenset)
    hypervisor_build: tuple[int, int, int] = (20348, 10, 0)
    features: int = (
        XMM_INPUT_AVAILABLE
        | FREQUENCY_MSRS_AVAILABLE
        | CRASH_MSRS_AVAILABLE
        | XMM_OUTPUT_AVAILABLE
        | DIRECT_TIMERS_AVAILABLE
    )
    recommendations: int = DEPRECATE_AUTO_EOI
    privileges: int = CHILD_PRIVILEGES
    hypervisor_present: bool = True
    max_leaf: int = 0x4000_000A
    x2apic: bool = False

    def __repr__(self) -> str:
        return f"<Personality {self.name!r}>"

    @property
    def auto_eoi(self) -> bool:
        """Whether auto-EOI is offered, that is not deprecated by CPUID 0x40000004 EAX bit 9."""
        return not self.recommendations & DEPRECATE_AUTO_EOI

    def has_driver(self, kind: str) -> bool:
        """Whether the guest has an enlightened driver for device kind `kind`."""
        return kind in self.enlightened


def _windows(version: int, build: int) -> int:
    # TLFS, guest OS identity: vendor 1 (Microsoft), OS 4 (NT), major, minor, service pack, build number.
    return 1 << 48 | 4 << 40 | (version >> 8) << 32 | (version & 0xFF) << 24 | build


def _linux(version: int) -> int:
    return LINUX_GUEST_OS_ID | version << 16


_ALL: Final = frozenset({"storage", "network", "video", "input", "services"})
_FIRST: Final = frozenset({"storage", "network", "video", "input"})
_NONE: Final = Privilege(0)
_FIRST_HYPERVISOR: Final = Personality(
    "first",
    # Server 2008's hypervisor: no reference TSC page, no frequency MSRs, no XMM input, no crash registers.
    hypervisor_build=(6001, 6, 0),
    recommendations=0,
    features=0,
    privileges=CHILD_PRIVILEGES
    & ~(Privilege.ACCESS_PARTITION_REFERENCE_TSC | Privilege.ACCESS_FREQUENCY_MSRS),
    max_leaf=0x4000_0005,
)

_WINDOWS_7: Final = replace(
    _FIRST_HYPERVISOR,
    name="of 2008 R2",
    hypervisor_build=(7601, 6, 1),
    features=FREQUENCY_MSRS_AVAILABLE,
    privileges=CHILD_PRIVILEGES,
    max_leaf=0x4000_0006,
)
_WINDOWS_8: Final = replace(
    _WINDOWS_7,
    name="of 2012",
    hypervisor_build=(9200, 6, 2),
    features=FREQUENCY_MSRS_AVAILABLE | XMM_INPUT_AVAILABLE | CRASH_MSRS_AVAILABLE,
)

SERVER_2008: Final = replace(
    _FIRST_HYPERVISOR,
    name="server-2008",
    guest_os_id=_windows(0x600, 6001),
    vmbus_version=0x0000_000D,
    storage_version=0x0200,
    network_version=0x0_0002,
    enlightened=_FIRST,
)
VISTA: Final = replace(SERVER_2008, name="vista", guest_os_id=_windows(0x600, 6002))
SUSE_LINUX: Final = replace(
    SERVER_2008,
    name="suse-linux",
    guest_os_id=_linux(0x02_06_10),
    enlightened=frozenset({"storage", "network"}),
)
SERVER_2008_R2: Final = replace(
    _WINDOWS_7,
    name="server-2008-r2",
    guest_os_id=_windows(0x601, 7601),
    vmbus_version=0x0001_0001,
    storage_version=0x0402,
    network_version=0x3_0002,
    enlightened=_ALL,
)
SERVER_2012: Final = replace(
    _WINDOWS_8,
    name="server-2012",
    guest_os_id=_windows(0x602, 9200),
    vmbus_version=0x0002_0004,
    storage_version=0x0501,
    network_version=0x4_0000,
    enlightened=_ALL,
)
SERVER_2012_R2: Final = replace(
    SERVER_2012,
    name="server-2012-r2",
    hypervisor_build=(9600, 6, 3),
    guest_os_id=_windows(0x603, 9600),
    vmbus_version=0x0003_0000,
    storage_version=0x0600,
    network_version=0x5_0000,
)
SERVER_2022: Final = Personality(
    "server-2022",
    _windows(0xA00, 20348),
    vmbus_version=0x0005_0003,
    storage_version=0x0602,
    network_version=0x6_0001,
    enlightened=_ALL,
    x2apic=True,
)
SERVER_2016: Final = replace(
    SERVER_2022,
    name="server-2016",
    hypervisor_build=(14393, 10, 0),
    guest_os_id=_windows(0xA00, 14393),
    vmbus_version=0x0004_0000,
    network_version=0x6_0000,
)
SERVER_2019: Final = replace(
    SERVER_2022,
    name="server-2019",
    hypervisor_build=(17763, 10, 0),
    guest_os_id=_windows(0xA00, 17763),
    vmbus_version=0x0005_0002,
)
WINDOWS_10: Final = replace(
    SERVER_2019,
    name="windows-10",
    hypervisor_build=(19041, 10, 0),
    guest_os_id=_windows(0xA00, 19041),
)
LINUX: Final = replace(SERVER_2022, name="linux", guest_os_id=_linux(0x06_01_00))
WINDOWS_2000: Final = Personality("windows-2000", privileges=_NONE, hypervisor_present=False)
DOS: Final = Personality("dos", privileges=_NONE, hypervisor_present=False)
OLD_BSD: Final = Personality("old-bsd", privileges=_NONE, hypervisor_present=False)

PERSONALITIES: Final = {
    p.name: p
    for p in (
        SERVER_2008,
        VISTA,
        SUSE_LINUX,
        SERVER_2008_R2,
        SERVER_2012,
        SERVER_2012_R2,
        SERVER_2016,
        SERVER_2019,
        WINDOWS_10,
        SERVER_2022,
        LINUX,
        WINDOWS_2000,
        DOS,
        OLD_BSD,
    )
}
"""All personalities by name."""
