"""Registers of a virtual processor by HV_REGISTER_NAME, for HvCallGetVpRegisters and HvCallSetVpRegisters.

Architectural registers are kept in the processor's register file; an engine that runs the guest puts its own in
front (`VirtualProcessor.register_file`). Synthetic registers are the MSRs under another name.
"""

from typing import TYPE_CHECKING, Final, Protocol

from vmbus.errors import HypercallError
from vmbus.hypervisor.cpuid import PHYSICAL_ADDRESS_BITS
from vmbus.hypervisor.faults import GeneralProtectionFault
from vmbus.hypervisor.msrs import MSR_READ, MSR_WRITE
from vmbus.hypervisor.tlfs import SINT_COUNT, STIMER_COUNT, Msr, RegisterName, Status
from vmbus.hypervisor.translate import PagingState
from vmbus.hypervisor.wire import InitialVpContext

if TYPE_CHECKING:
    from vmbus.hypervisor.vp import VirtualProcessor

__all__ = ["RegisterFile", "paging_state", "read_register", "start_with", "write_register"]


class RegisterFile(Protocol):
    """Where an engine keeps the architectural registers of the guest that it runs; values have up to 128 bits."""

    def get(self, name: int, default: int, /) -> int:
        """The register `name`, or `default` if it is not kept here."""
        ...

    def __setitem__(self, name: int, value: int, /) -> None:
        """Set the register `name`."""
        ...


_R: Final = RegisterName
_RESET: Final[dict[int, int]] = {
    _R.RFLAGS: 0x2,
    _R.RIP: 0xFFF0,
    _R.CR0: 0x6000_0010,
    _R.DR0 + 4: 0xFFFF_0FF0,
    _R.DR7: 0x400,
}
"""Reset values other than zero (SDM table 9-1)."""

_WIDTHS: Final[dict[int, int]] = {
    **dict.fromkeys(range(_R.RAX, _R.RFLAGS + 1), 64),
    **dict.fromkeys(range(_R.XMM0, _R.XMM15 + 1), 128),
    **dict.fromkeys((_R.CR0, _R.CR2, _R.CR3, _R.CR4), 64),
    **dict.fromkeys(range(_R.DR0, _R.DR7 + 1), 64),
    **dict.fromkeys(range(_R.ES, _R.TR + 1), 128),
    **dict.fromkeys((_R.IDTR, _R.GDTR), 128),
    **dict.fromkeys((_R.EFER, _R.KERNEL_GS_BASE), 64),
    **dict.fromkeys(range(_R.SYSENTER_CS, _R.SFMASK + 1), 64),
    _R.TSC_AUX: 64,
}
"""Registers that are kept in the register file, with their size in bits."""

_AS_MSR: Final[dict[int, int]] = {
    _R.TSC: Msr.IA32_TSC,
    _R.APIC_BASE: Msr.IA32_APIC_BASE,
    _R.PAT: Msr.IA32_PAT,
    _R.VP_RUNTIME: Msr.VP_RUNTIME,
    _R.HYPERCALL: Msr.HYPERCALL,
    _R.GUEST_OS_ID: Msr.GUEST_OS_ID,
    _R.VP_INDEX: Msr.VP_INDEX,
    _R.TIME_REF_COUNT: Msr.TIME_REF_COUNT,
    _R.VP_ASSIST_PAGE: Msr.VP_ASSIST_PAGE,
    _R.REFERENCE_TSC: Msr.REFERENCE_TSC,
    _R.SCONTROL: Msr.SCONTROL,
    _R.SVERSION: Msr.SVERSION,
    _R.SIFP: Msr.SIEFP,
    _R.SIPP: Msr.SIMP,
    _R.EOM: Msr.EOM,
    _R.GUEST_CRASH_CTL: Msr.CRASH_CTL,
    **{_R.SINT0 + n: Msr.SINT0 + n for n in range(SINT_COUNT)},
    **{_R.STIMER0_CONFIG + n: Msr.STIMER0_CONFIG + n for n in range(2 * STIMER_COUNT)},
    **{_R.GUEST_CRASH_P0 + n: Msr.CRASH_P0 + n for n in range(5)},
}


def read_register(vp: "VirtualProcessor", name: int) -> int:
    """The value of a register, up to 128 bits.

    Raises:
        HypercallError: INVALID_PARAMETER if there is no such register.
    """
    if name in _WIDTHS:
        return vp.register_file.get(name, _RESET.get(name, 0))
    msr = _AS_MSR.get(name)
    if msr is not None:
        # A parent reads its child's register whatever the child itself is allowed.
        try:
            return MSR_READ[msr][1](vp)
        except GeneralProtectionFault:
            raise HypercallError(Status.INVALID_PARAMETER) from None
    if name == _R.CR8:
        return vp.apic.tpr >> 4
    if name == _R.INTERCEPT_SUSPEND:
        return int(vp.intercept_suspended)
    if name == _R.EXPLICIT_SUSPEND:
        return int(vp.explicitly_suspended)
    if name == _R.INITIAL_APIC_ID:
        return vp.apic.apic_id
    if name == _R.PRIVILEGES_AND_FEATURES_INFO:
        return vp.partition.privileges | vp.partition.personality.features << 96
    raise HypercallError(Status.INVALID_PARAMETER)


def write_register(vp: "VirtualProcessor", name: int, value: int) -> None:
    """Set a register.

    Raises:
        HypercallError: INVALID_PARAMETER if there is no such register or it is read-only, INVALID_REGISTER_VALUE if
            it does not take the value.
    """
    width = _WIDTHS.get(name)
    if width is not None:
        if value >> width:
            raise HypercallError(Status.INVALID_REGISTER_VALUE)
        vp.register_file[name] = value
        return
    msr = _AS_MSR.get(name)
    if msr is not None:
        if value >> 64:
            raise HypercallError(Status.INVALID_REGISTER_VALUE)
        entry = MSR_WRITE.get(msr)
        if entry is None:
            raise HypercallError(Status.INVALID_PARAMETER)
        try:
            entry[1](vp, value)
        except GeneralProtectionFault:
            raise HypercallError(Status.INVALID_REGISTER_VALUE) from None
        return
    if name not in (_R.CR8, _R.INTERCEPT_SUSPEND, _R.EXPLICIT_SUSPEND):
        raise HypercallError(Status.INVALID_PARAMETER)
    if value >> (4 if name == _R.CR8 else 1):
        raise HypercallError(Status.INVALID_REGISTER_VALUE)
    if name == _R.CR8:
        vp.write_apic(0x80, value << 4)
    elif name == _R.INTERCEPT_SUSPEND:
        vp.intercept_suspended = bool(value)
    else:
        vp.suspend(bool(value))


_EFER_BITS: Final = 0xD01
"""SCE, LME, LMA and NXE (SDM table 2-2)."""
_SEGMENTS: Final = {
    _R.CS: "cs",
    _R.DS: "ds",
    _R.ES: "es",
    _R.FS: "fs",
    _R.GS: "gs",
    _R.SS: "ss",
    _R.TR: "tr",
    _R.LDTR: "ldtr",
    _R.IDTR: "idtr",
    _R.GDTR: "gdtr",
}


def start_with(vp: "VirtualProcessor", context: InitialVpContext) -> None:
    """Start a processor with these registers (HvCallStartVirtualProcessor).

    Raises:
        HypercallError: INVALID_REGISTER_VALUE for bits that a control register does not have, with nothing changed.
    """
    if context.cr0 >> 32 or context.efer & ~_EFER_BITS or context.cr3 >> PHYSICAL_ADDRESS_BITS:
        raise HypercallError(Status.INVALID_REGISTER_VALUE)
    write_register(vp, _R.PAT, context.pat)  # the only one of them that can still be refused
    values = {
        _R.RIP: context.rip,
        _R.RSP: context.rsp,
        _R.RFLAGS: context.rflags | 2,
        _R.EFER: context.efer,
        _R.CR0: context.cr0,
        _R.CR3: context.cr3,
        _R.CR4: context.cr4,
    }
    for name, value in values.items():
        write_register(vp, name, value)
    for name, attribute in _SEGMENTS.items():
        write_register(vp, name, int.from_bytes(getattr(context, attribute).pack(), "little"))
    vp.started = True
    if vp.on_start is not None:
        vp.on_start()


def paging_state(vp: "VirtualProcessor") -> PagingState:
    """The registers that steer the processor's address translation."""
    get = vp.register_file.get
    return PagingState(
        get(_R.CR0, _RESET[_R.CR0]), get(_R.CR3, 0), get(_R.CR4, 0), get(_R.EFER, 0), get(_R.RFLAGS, 2)
    )
