"""CPUID as a virtual processor shows it: a plain processor and the hypervisor leaves (TLFS chapter 2).

It is what the engine of unmodified kernels executes, no more: x86-64-v2 with AES, PCLMULQDQ, MOVBE, BMI and RDRAND.
`docs/engine.md` has the list, and why other bits are not shown. It says that it does not have the leaks of speculative
processors, so that a kernel spares itself separate page tables for user space and the like: an engine executes nothing
ahead of time.

Under a hypervisor there is neither the TSC-deadline mode of the local APIC's timer nor the promise that it never stops
(ARAT), as with Hyper-V: its guests have synthetic timers, and Linux takes the local APIC's for a replacement only so.
"""

from typing import Final, TypeAlias

from vmbus.hypervisor.personality import Personality
from vmbus.hypervisor.tlfs import MAX_VPS

__all__ = [
    "ARCH_CAPABILITIES",
    "CACHES_LEAF",
    "FEATURES_LEAF",
    "TOPOLOGY_LEAF",
    "CpuidResult",
    "caches",
    "leaves",
    "topology",
]

CpuidResult: TypeAlias = tuple[int, int, int, int]
"""EAX, EBX, ECX, EDX."""

MAX_BASIC_LEAF: Final = 0x16
CACHES_LEAF: Final = 0x04
"""Deterministic cache parameters, one cache a subleaf."""
FEATURES_LEAF: Final = 0x07
"""Structured extended features; there is only its subleaf 0."""
TOPOLOGY_LEAF: Final = 0x0B
"""Extended topology enumeration, which tells the x2APIC id (SDM 11.12.8)."""
MAX_EXTENDED_LEAF: Final = 0x8000_0008
PHYSICAL_ADDRESS_BITS: Final = 40
LINEAR_ADDRESS_BITS: Final = 48

ARCH_CAPABILITIES: Final = sum(1 << n for n in (0, 4, 5, 6, 8, 13, 14, 15, 20, 24, 26, 27, 62))
"""What IA32_ARCH_CAPABILITIES denies (SDM volume 4, table 2-2): RDCL (Meltdown), SSB, MDS, machine checks on page size
changes, TAA, SBDR and SSDP, FBSDP, PSDP, BHI, PBRSB, GDS, RFDS, ITS."""
_ARCH_CAPABILITIES_PRESENT: Final = 1 << 29

# SSE3 PCLMULQDQ SSSE3 CMPXCHG16B SSE4.1 SSE4.2 MOVBE POPCNT AES RDRAND
_FEATURES_ECX: Final = sum(1 << n for n in (0, 1, 9, 13, 19, 20, 22, 23, 25, 30))
_TSC_DEADLINE: Final = 1 << 24
_X2APIC: Final = 1 << 21
_HYPERVISOR_PRESENT: Final = 1 << 31
# FPU PSE TSC MSR PAE CX8 APIC SEP PGE CMOV PAT PSE36 CLFLUSH MMX FXSR SSE SSE2; and DE
_FEATURES_EDX: Final = sum(1 << n for n in (0, 2, 3, 4, 5, 6, 8, 9, 11, 13, 15, 16, 17, 19, 23, 24, 25, 26))
_STRUCTURED_EBX: Final = 1 << 3 | 1 << 8  # BMI1 BMI2
_EXTENDED_ECX: Final = sum(1 << n for n in (0, 5, 8))  # LAHF LZCNT PREFETCHW
_ALWAYS_RUNNING_TIMER: Final = 1 << 2
_BRAND: Final = b"vmbus virtual processor".ljust(48, b"\0")


def _words(text: bytes) -> tuple[int, ...]:
    return tuple(int.from_bytes(text[at : at + 4], "little") for at in range(0, len(text), 4))


def _vendor(eax: int, vendor: bytes, order: tuple[int, int, int]) -> CpuidResult:
    words = _words(vendor)
    return eax, words[order[0]], words[order[1]], words[order[2]]


def leaves(
    personality: Personality, privileges: int, apic_id: int, vp_count: int, tsc_frequency: int
) -> dict[int, CpuidResult]:
    """All leaves of one virtual processor."""
    brand = _words(_BRAND)
    megahertz = tsc_frequency // 1_000_000
    table: dict[int, CpuidResult] = {
        0x00: _vendor(MAX_BASIC_LEAF, b"GenuineIntel", (0, 2, 1)),
        # Family 15 model 6; CLFLUSH line 8 * 8 bytes, logical processors, initial APIC id.
        0x01: (
            0x0000_0F65,
            8 << 8 | min(vp_count, 255) << 16 | apic_id << 24,
            _FEATURES_ECX
            | (_X2APIC if personality.x2apic else 0)
            | (_HYPERVISOR_PRESENT if personality.hypervisor_present else _TSC_DEADLINE),
            _FEATURES_EDX | (1 << 28 if vp_count > 1 else 0),
        ),
        0x02: (0x00FF_FF01, 0, 0, 0),  # the caches are in leaf 4
        0x06: (0 if personality.hypervisor_present else _ALWAYS_RUNNING_TIMER, 0, 0, 0),
        FEATURES_LEAF: (0, _STRUCTURED_EBX, 0, _ARCH_CAPABILITIES_PRESENT),
        0x15: (1, 1, tsc_frequency, 0),
        0x16: (megahertz, megahertz, 100, 0),
        0x8000_0000: (MAX_EXTENDED_LEAF, 0, 0, 0),
        0x8000_0001: (0, 0, _EXTENDED_ECX, 1 << 11 | 1 << 20 | 1 << 29),  # EDX: SYSCALL, NX, long mode
        0x8000_0002: (brand[0], brand[1], brand[2], brand[3]),
        0x8000_0003: (brand[4], brand[5], brand[6], brand[7]),
        0x8000_0004: (brand[8], brand[9], brand[10], brand[11]),
        0x8000_0007: (0, 0, 0, 1 << 8),  # invariant TSC
        0x8000_0008: (LINEAR_ADDRESS_BITS << 8 | PHYSICAL_ADDRESS_BITS, 0, 0, 0),
    }
    if personality.hypervisor_present:
        build, major, minor = personality.hypervisor_build
        hypervisor: dict[int, CpuidResult] = {
            0x4000_0000: _vendor(personality.max_leaf, b"Microsoft Hv", (0, 1, 2)),
            0x4000_0001: (0x3123_7648, 0, 0, 0),  # "Hv#1"
            0x4000_0002: (build, major << 16 | minor, 0, 0),
            0x4000_0003: (privileges & 0xFFFF_FFFF, privileges >> 32, 0, personality.features),
            0x4000_0004: (personality.recommendations, 0xFFFF_FFFF, PHYSICAL_ADDRESS_BITS, 0),
            0x4000_0005: (MAX_VPS, MAX_VPS, 0, 0),
            # MSR bitmaps and second level address translation are in use.
            0x4000_0006: (1 << 1 | 1 << 3, 0, 0, 0),
            0x4000_0007: (0, 0, 0, 0),
            0x4000_0008: (0, 0, 0, 0),
            0x4000_0009: (0, 0, 0, 0),
            0x4000_000A: (0, 0, 0, 0),
        }
        table |= {leaf: result for leaf, result in hypervisor.items() if leaf <= personality.max_leaf}
    return table


def topology(subleaf: int, apic_id: int, vp_count: int) -> CpuidResult:
    """Leaf 0x0B: one thread a core (level 1), all processors in one package (level 2), and the x2APIC id."""
    kind = (1, 2)[subleaf] if subleaf < 2 else 0
    shift = (vp_count - 1).bit_length() if subleaf == 1 else 0
    count = (1, vp_count)[subleaf] if subleaf < 2 else 0
    return shift, count, kind << 8 | subleaf & 0xFF, apic_id


_CACHES: Final = (
    # type (1 data, 2 instructions, 3 both), level, ways, sets, shared by all processors
    (1, 1, 8, 64, False),
    (2, 1, 8, 64, False),
    (3, 2, 16, 1024, False),
    (3, 3, 16, 16384, True),
)
"""32 KiB for data and as much for instructions, 1 MiB, and 16 MiB for all processors; lines of 64 bytes. No engine has
a cache that a guest could measure: they are those of a common server, for programs that cut their work to fit."""


def caches(subleaf: int, vp_count: int) -> CpuidResult:
    """Leaf 0x04 (SDM volume 2, CPUID); type 0, "no more caches", from the fourth subleaf on."""
    if subleaf >= len(_CACHES):
        return 0, 0, 0, 0
    kind, level, ways, sets, shared = _CACHES[subleaf]
    ids = (1 << (vp_count - 1).bit_length()) - 1  # APIC ids of the package, minus one
    self_initializing = 1 << 8
    eax = kind | level << 5 | self_initializing | (ids if shared else 0) << 14 | min(ids, 63) << 26
    return eax, (ways - 1) << 22 | 63, sets - 1, 0
