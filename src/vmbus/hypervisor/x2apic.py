"""The local APIC's registers as MSRs 0x800-0x83F, which exist once the guest has switched to x2APIC mode (SDM 11.12).

The registers are those of the xAPIC page, one MSR for each 16 bytes of it. What differs: the ICR is one 64-bit
register, there is a register for an interrupt of this very processor, the logical id follows from the id, and where
the page ignores nonsense an MSR raises #GP.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from vmbus.hypervisor.apic import FIRST_VALID_VECTOR, ApicMode, Register
from vmbus.hypervisor.faults import GeneralProtectionFault

if TYPE_CHECKING:
    from vmbus.hypervisor.vp import VirtualProcessor

__all__ = ["FIRST_MSR", "READERS", "WRITERS", "msr_of"]

Reader: TypeAlias = "Callable[[VirtualProcessor], int]"
Writer: TypeAlias = "Callable[[VirtualProcessor, int], None]"

FIRST_MSR: Final = 0x800
SELF_IPI: Final = 0x83F
_MASK32: Final = 0xFFFF_FFFF


def msr_of(offset: int) -> int:
    """The MSR of the register at `offset` of the xAPIC page."""
    return FIRST_MSR | offset >> 4


_READABLE: Final = (
    Register.ID,
    Register.VERSION,
    Register.TPR,
    Register.PPR,
    Register.LDR,
    Register.SPURIOUS,
    *range(Register.ISR, Register.ESR, 16),
    Register.ESR,
    Register.LVT_TIMER,
    Register.LVT_THERMAL,
    Register.LVT_PERFMON,
    Register.LVT_LINT0,
    Register.LVT_LINT1,
    Register.LVT_ERROR,
    Register.INITIAL_COUNT,
    Register.CURRENT_COUNT,
    Register.DIVIDE,
)
"""Readable registers besides the ICR (SDM table 11-6)."""

_WRITABLE_BITS: Final[dict[int, int]] = {
    Register.TPR: 0xFF,
    Register.EOI: 0,
    Register.SPURIOUS: 0x11FF,
    Register.ESR: 0,
    Register.LVT_TIMER: 0x0007_10FF,
    Register.LVT_THERMAL: 0x0001_17FF,
    Register.LVT_PERFMON: 0x0001_17FF,
    Register.LVT_LINT0: 0x0001_F7FF,
    Register.LVT_LINT1: 0x0001_F7FF,
    Register.LVT_ERROR: 0x0001_10FF,
    Register.INITIAL_COUNT: _MASK32,
    Register.DIVIDE: 0xB,
}
"""Writable registers besides the ICR, and the bits that are not reserved; any other bit raises #GP (SDM 11.12.1.3)."""

_ICR_BITS: Final = _MASK32 << 32 | 0x000C_DFFF


def _check(vp: "VirtualProcessor", offset: int) -> None:
    if vp.apic.mode != ApicMode.X2APIC:
        raise GeneralProtectionFault(f"MSR 0x{msr_of(offset):x} outside of x2APIC mode")


def _reader(offset: int) -> Reader:
    def read(vp: "VirtualProcessor") -> int:
        _check(vp, offset)
        return vp.read_apic(offset)

    return read


def _writer(offset: int, bits: int) -> Writer:
    def write(vp: "VirtualProcessor", value: int) -> None:
        _check(vp, offset)
        if value & ~bits:
            raise GeneralProtectionFault(f"reserved bits in 0x{value:x} for MSR 0x{msr_of(offset):x}")
        vp.write_apic(offset, value)

    return write


def _read_icr(vp: "VirtualProcessor") -> int:
    _check(vp, Register.ICR_LOW)
    return vp.apic.icr


def _write_icr(vp: "VirtualProcessor", value: int) -> None:
    _check(vp, Register.ICR_LOW)
    if value & ~_ICR_BITS:
        raise GeneralProtectionFault(f"reserved bits in ICR 0x{value:x}")
    vp.apic.write_icr(value)


def _write_self_ipi(vp: "VirtualProcessor", value: int) -> None:
    _check(vp, Register.DIVIDE + 16)
    if value & ~0xFF:
        raise GeneralProtectionFault(f"reserved bits in SELF IPI 0x{value:x}")
    if value >= FIRST_VALID_VECTOR:
        vp.request_interrupt(value)


READERS: Final[dict[int, Reader]] = {
    **{msr_of(offset): _reader(offset) for offset in _READABLE},
    msr_of(Register.ICR_LOW): _read_icr,
}
"""MSR index → how it is read."""

WRITERS: Final[dict[int, Writer]] = {
    **{msr_of(offset): _writer(offset, bits) for offset, bits in _WRITABLE_BITS.items()},
    msr_of(Register.ICR_LOW): _write_icr,
    SELF_IPI: _write_self_ipi,
}
"""MSR index → how it is written."""
