"""The MSRs that the hypervisor answers (TLFS appendix C), as two tables from index to function.

Each entry carries the privilege it takes; without it the MSR does not exist for the partition (#GP).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from vmbus.hypervisor import x2apic
from vmbus.hypervisor.cpuid import ARCH_CAPABILITIES
from vmbus.hypervisor.faults import GeneralProtectionFault
from vmbus.hypervisor.personality import CRASH_MSRS_AVAILABLE, DIRECT_TIMERS_AVAILABLE
from vmbus.hypervisor.stimer import DIRECT_MODE
from vmbus.hypervisor.tlfs import SINT_COUNT, STIMER_COUNT, Msr, Privilege

if TYPE_CHECKING:
    from vmbus.hypervisor.vp import VirtualProcessor

__all__ = ["MSR_READ", "MSR_WRITE", "ReadEntry", "WriteEntry"]

Reader: TypeAlias = "Callable[[VirtualProcessor], int]"
Writer: TypeAlias = "Callable[[VirtualProcessor, int], None]"
ReadEntry: TypeAlias = tuple[int, Reader]
WriteEntry: TypeAlias = tuple[int, Writer]

CRASH_CTL_NOTIFY: Final = 1 << 63
CRASH_CTL_MESSAGE: Final = 1 << 62
CRASH_CAPABILITIES: Final = CRASH_CTL_NOTIFY | CRASH_CTL_MESSAGE
"""What HV_X64_MSR_CRASH_CTL reads as: notification, and a message by its address (TLFS, guest crash registers)."""
CRASH_PARAMETERS: Final = 5


def _ignore(vp: "VirtualProcessor", value: int) -> None:
    """A register that is accepted and has no effect here."""


def _read_only(vp: "VirtualProcessor", value: int) -> None:
    raise GeneralProtectionFault("write to a read-only MSR")


def _write_hypercall(vp: "VirtualProcessor", value: int) -> None:
    vp.partition.set_hypercall_page(value)


def _write_guest_os_id(vp: "VirtualProcessor", value: int) -> None:
    vp.partition.set_guest_os_id(value)


def _write_reset(vp: "VirtualProcessor", value: int) -> None:
    if value & 1:
        vp.partition.notify("reset", vp.index)


def _write_reference_tsc(vp: "VirtualProcessor", value: int) -> None:
    vp.partition.set_reference_tsc(value)


def _read_tpr(vp: "VirtualProcessor") -> int:
    return vp.apic.tpr


def _write_tpr(vp: "VirtualProcessor", value: int) -> None:
    if value > 0xFF:
        raise GeneralProtectionFault(f"TPR 0x{value:x}")
    vp.write_apic(0x80, value)


def _write_apic_base(vp: "VirtualProcessor", value: int) -> None:
    vp.apic_base = value


def _write_pat(vp: "VirtualProcessor", value: int) -> None:
    if any(kind > 7 or kind in (2, 3) for kind in value.to_bytes(8, "little")):
        raise GeneralProtectionFault(f"reserved memory type in PAT 0x{value:x}")
    vp.pat = value


def _write_tsc(vp: "VirtualProcessor", value: int) -> None:
    vp.tsc_offset += value - vp.tsc


def _write_tsc_adjust(vp: "VirtualProcessor", value: int) -> None:
    vp.tsc_offset = value - (1 << 64) if value >> 63 else value


def _write_eoi(vp: "VirtualProcessor", value: int) -> None:
    vp.end_of_interrupt()


def _write_icr(vp: "VirtualProcessor", value: int) -> None:
    vp.apic.write_icr(value)


def _write_vp_assist(vp: "VirtualProcessor", value: int) -> None:
    with vp.partition.hypervisor.map_lock:
        vp.assist_page.place(value)
    vp.assist_msr = value


def _set_scontrol(vp: "VirtualProcessor", value: int) -> None:
    vp.synic.scontrol = value


def _set_simp(vp: "VirtualProcessor", value: int) -> None:
    vp.synic.simp = value


def _set_siefp(vp: "VirtualProcessor", value: int) -> None:
    vp.synic.siefp = value


def _write_eom(vp: "VirtualProcessor", value: int) -> None:
    vp.synic.end_of_message()


def _set_deadline(vp: "VirtualProcessor", value: int) -> None:
    vp.apic.tsc_deadline = value


def _crash_parameters(vp: "VirtualProcessor") -> list[int]:
    """The crash registers of the partition, if its CPUID offers them (no privilege says so)."""
    personality = vp.partition.personality
    if not (personality.hypervisor_present and personality.features & CRASH_MSRS_AVAILABLE):
        raise GeneralProtectionFault("this partition has no crash registers")
    return vp.partition.crash_parameters


def _read_crash_ctl(vp: "VirtualProcessor") -> int:
    _crash_parameters(vp)
    return CRASH_CAPABILITIES


def _write_crash_ctl(vp: "VirtualProcessor", value: int) -> None:
    _crash_parameters(vp)
    if value & CRASH_CTL_NOTIFY:
        vp.partition.report_crash(vp, bool(value & CRASH_CTL_MESSAGE))


def _read_zero(vp: "VirtualProcessor") -> int:
    return 0


def _read_guest_idle(vp: "VirtualProcessor") -> int:
    vp.halted = True
    return 0


def _set_timer_config(vp: "VirtualProcessor", index: int, value: int) -> None:
    if value & DIRECT_MODE and not vp.partition.personality.features & DIRECT_TIMERS_AVAILABLE:
        raise GeneralProtectionFault(f"STIMER{index}: this partition has no direct mode")
    vp.timers.set_config(index, value)


def _set_crash_parameter(vp: "VirtualProcessor", index: int, value: int) -> None:
    _crash_parameters(vp)[index] = value


def _reader(function: "Callable[[VirtualProcessor, int], int]", index: int) -> Reader:
    return lambda vp: function(vp, index)


def _writer(function: "Callable[[VirtualProcessor, int, int], None]", index: int) -> Writer:
    return lambda vp, value: function(vp, index, value)


def _tables() -> tuple[dict[int, ReadEntry], dict[int, WriteEntry]]:
    p = Privilege
    read: dict[int, ReadEntry] = {
        Msr.IA32_TSC: (0, lambda vp: vp.tsc),
        Msr.IA32_PLATFORM_ID: (0, _read_zero),
        Msr.IA32_APIC_BASE: (0, lambda vp: vp.apic_base),
        Msr.IA32_FEATURE_CONTROL: (0, lambda vp: 1),  # locked, no VMX
        Msr.IA32_TSC_ADJUST: (0, lambda vp: vp.tsc_offset & 0xFFFF_FFFF_FFFF_FFFF),
        Msr.IA32_BIOS_SIGN_ID: (0, _read_zero),
        Msr.IA32_MTRRCAP: (0, _read_zero),
        Msr.IA32_ARCH_CAPABILITIES: (0, lambda vp: ARCH_CAPABILITIES),
        Msr.IA32_MISC_ENABLE: (0, lambda vp: 1),  # fast strings
        Msr.IA32_PAT: (0, lambda vp: vp.pat),
        Msr.IA32_TSC_DEADLINE: (0, lambda vp: vp.apic.tsc_deadline),
        Msr.GUEST_OS_ID: (p.ACCESS_HYPERCALL_MSRS, lambda vp: vp.partition.guest_os_id),
        Msr.HYPERCALL: (p.ACCESS_HYPERCALL_MSRS, lambda vp: vp.partition.hypercall_msr),
        Msr.VP_INDEX: (p.ACCESS_VP_INDEX, lambda vp: vp.index),
        Msr.RESET: (p.ACCESS_RESET_MSR, _read_zero),
        Msr.VP_RUNTIME: (p.ACCESS_VP_RUNTIME_MSR, lambda vp: vp.reference_time),
        Msr.TIME_REF_COUNT: (p.ACCESS_PARTITION_REFERENCE_COUNTER, lambda vp: vp.reference_time),
        Msr.REFERENCE_TSC: (p.ACCESS_PARTITION_REFERENCE_TSC, lambda vp: vp.partition.reference_tsc_msr),
        Msr.TSC_FREQUENCY: (p.ACCESS_FREQUENCY_MSRS, lambda vp: vp.partition.hypervisor.tsc_frequency),
        Msr.APIC_FREQUENCY: (p.ACCESS_FREQUENCY_MSRS, lambda vp: vp.partition.hypervisor.apic_frequency),
        Msr.ICR: (p.ACCESS_APIC_MSRS, lambda vp: vp.apic.icr),
        Msr.TPR: (p.ACCESS_APIC_MSRS, _read_tpr),
        Msr.VP_ASSIST_PAGE: (p.ACCESS_APIC_MSRS, lambda vp: vp.assist_msr),
        Msr.SCONTROL: (p.ACCESS_SYNIC_MSRS, lambda vp: vp.synic.scontrol),
        Msr.SVERSION: (p.ACCESS_SYNIC_MSRS, lambda vp: 1),
        Msr.SIEFP: (p.ACCESS_SYNIC_MSRS, lambda vp: vp.synic.siefp),
        Msr.SIMP: (p.ACCESS_SYNIC_MSRS, lambda vp: vp.synic.simp),
        Msr.EOM: (p.ACCESS_SYNIC_MSRS, _read_zero),
        Msr.GUEST_IDLE: (p.ACCESS_GUEST_IDLE_MSR, _read_guest_idle),
        Msr.CRASH_CTL: (0, _read_crash_ctl),
    }
    write: dict[int, WriteEntry] = {
        Msr.IA32_TSC: (0, _write_tsc),
        Msr.IA32_APIC_BASE: (0, _write_apic_base),
        Msr.IA32_TSC_ADJUST: (0, _write_tsc_adjust),
        Msr.IA32_BIOS_SIGN_ID: (0, _ignore),
        Msr.IA32_MISC_ENABLE: (0, _ignore),
        Msr.IA32_PAT: (0, _write_pat),
        Msr.IA32_TSC_DEADLINE: (0, _set_deadline),
        Msr.GUEST_OS_ID: (p.ACCESS_HYPERCALL_MSRS, _write_guest_os_id),
        Msr.HYPERCALL: (p.ACCESS_HYPERCALL_MSRS, _write_hypercall),
        Msr.RESET: (p.ACCESS_RESET_MSR, _write_reset),
        Msr.REFERENCE_TSC: (p.ACCESS_PARTITION_REFERENCE_TSC, _write_reference_tsc),
        Msr.EOI: (p.ACCESS_APIC_MSRS, _write_eoi),
        Msr.ICR: (p.ACCESS_APIC_MSRS, _write_icr),
        Msr.TPR: (p.ACCESS_APIC_MSRS, _write_tpr),
        Msr.VP_ASSIST_PAGE: (p.ACCESS_APIC_MSRS, _write_vp_assist),
        Msr.SCONTROL: (p.ACCESS_SYNIC_MSRS, _set_scontrol),
        Msr.SVERSION: (p.ACCESS_SYNIC_MSRS, _read_only),
        Msr.SIEFP: (p.ACCESS_SYNIC_MSRS, _set_siefp),
        Msr.SIMP: (p.ACCESS_SYNIC_MSRS, _set_simp),
        Msr.EOM: (p.ACCESS_SYNIC_MSRS, _write_eom),
        Msr.CRASH_CTL: (0, _write_crash_ctl),
    }
    read |= {index: (0, reader) for index, reader in x2apic.READERS.items()}
    write |= {index: (0, writer) for index, writer in x2apic.WRITERS.items()}
    for n in range(SINT_COUNT):
        read[Msr.SINT0 + n] = (p.ACCESS_SYNIC_MSRS, _reader(lambda vp, n: vp.synic.sint(n), n))
        write[Msr.SINT0 + n] = (
            p.ACCESS_SYNIC_MSRS,
            _writer(lambda vp, n, value: vp.synic.set_sint(n, value), n),
        )
    for n in range(STIMER_COUNT):
        config, count = Msr.STIMER0_CONFIG + 2 * n, Msr.STIMER0_COUNT + 2 * n
        timers = p.ACCESS_SYNTHETIC_TIMER_MSRS
        read[config] = (timers, _reader(lambda vp, n: vp.timers.config(n), n))
        read[count] = (timers, _reader(lambda vp, n: vp.timers.count(n), n))
        write[config] = (timers, _writer(_set_timer_config, n))
        write[count] = (timers, _writer(lambda vp, n, value: vp.timers.set_count(n, value), n))
    for n in range(CRASH_PARAMETERS):
        read[Msr.CRASH_P0 + n] = (0, _reader(lambda vp, n: _crash_parameters(vp)[n], n))
        write[Msr.CRASH_P0 + n] = (0, _writer(_set_crash_parameter, n))
    # Plain integers hash and compare faster than enumeration members, and this is on the exit path.
    return {int(i): (int(k), f) for i, (k, f) in read.items()}, {
        int(i): (int(k), f) for i, (k, f) in write.items()
    }


MSR_READ, MSR_WRITE = _tables()
"""MSR index → (privilege bits that it takes, function)."""
