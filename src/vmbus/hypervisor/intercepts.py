"""Intercepts that a parent installs on its child by hypercall, and the messages that tell it of them (TLFS).

The processor that hits an intercept is suspended; the hypervisor posts an intercept message to SINT0 of the parent's
first processor. The parent emulates the access, sets the child's registers (the result in RAX, RIP past the
instruction) and clears the intercept suspension. If it does so at once, from its message handler, the exit is answered
in place; otherwise the exit raises `VpSuspended` and is made again when the processor runs again.
"""

from contextlib import suppress
from typing import TYPE_CHECKING, Final

from vmbus.errors import HypercallError
from vmbus.hypervisor.faults import VpSuspended
from vmbus.hypervisor.tlfs import (
    InterceptAccess,
    InterceptType,
    MessageType,
    RegisterName,
    Status,
)
from vmbus.hypervisor.wire import (
    ApicEoiMessage,
    CpuidInterceptMessage,
    InterceptMessageHeader,
    IoPortInterceptMessage,
    MsrInterceptMessage,
    SegmentRegister,
)

if TYPE_CHECKING:
    from vmbus.hypervisor.vp import VirtualProcessor

__all__ = ["Intercepts"]

INTERCEPT_SINT: Final = 0
"""Intercept messages go to SINT0 (TLFS, SynIC)."""
MAX_MSR_INTERCEPTS: Final = 4096
"""Single MSRs, and CPUID leaves, that one partition's parent may intercept."""
_MASK32: Final = 0xFFFF_FFFF
_NO_SEGMENT: Final = SegmentRegister(0, 0, 0, 0)

_ALLOWED: Final = {
    InterceptType.X64_IO_PORT: InterceptAccess.READ | InterceptAccess.WRITE,
    InterceptType.X64_MSR: InterceptAccess.READ | InterceptAccess.WRITE,
    InterceptType.X64_MSR_INDEX: InterceptAccess.READ | InterceptAccess.WRITE,
    InterceptType.X64_CPUID: InterceptAccess.EXECUTE,
}
"""Intercept types and the kinds of access that they exist for."""


class Intercepts:
    """What is intercepted in one partition."""

    def __init__(self) -> None:
        self.ports: dict[int, int] = {}
        self.msrs: dict[int, int] = {}
        self.all_msrs = 0
        self.cpuid: set[int] = set()

    def install(self, kind: int, access: int, parameter: int) -> None:
        """Install an intercept, or remove it with an access mask of 0.

        Raises:
            HypercallError: INVALID_PARAMETER for a type that does not exist here, an access that it does not have or a
                port above 0xFFFF.
        """
        if kind not in _ALLOWED or access & ~_ALLOWED[InterceptType(kind)]:
            raise HypercallError(Status.INVALID_PARAMETER)
        if kind == InterceptType.X64_IO_PORT:
            if parameter > 0xFFFF:
                raise HypercallError(Status.INVALID_PARAMETER)
            _put(self.ports, parameter, access)
        elif kind == InterceptType.X64_MSR:
            self.all_msrs = access
        elif parameter > _MASK32:
            raise HypercallError(Status.INVALID_PARAMETER)
        elif kind == InterceptType.X64_MSR_INDEX:
            if len(self.msrs) >= MAX_MSR_INTERCEPTS and parameter not in self.msrs:
                raise HypercallError(Status.INSUFFICIENT_MEMORY)
            _put(self.msrs, parameter, access)
        elif access:
            if len(self.cpuid) >= MAX_MSR_INTERCEPTS:
                raise HypercallError(Status.INSUFFICIENT_MEMORY)
            self.cpuid.add(parameter)
        else:
            self.cpuid.discard(parameter)

    def clear(self) -> None:
        """Remove all intercepts."""
        self.ports.clear()
        self.msrs.clear()
        self.cpuid.clear()
        self.all_msrs = 0


def _put(table: dict[int, int], key: int, access: int) -> None:
    if access:
        table[key] = access
    else:
        table.pop(key, None)


def io_port(vp: "VirtualProcessor", port: int, size: int, value: int | None) -> int:
    """An intercepted IN (`value` None; gives what the parent left in RAX) or OUT."""
    registers = vp.register_file
    message = IoPortInterceptMessage(
        header=_header(vp, InterceptAccess.READ if value is None else InterceptAccess.WRITE),
        port_number=port,
        access_info=size,
        instruction_byte_count=0,
        reserved=0,
        rax=registers.get(RegisterName.RAX, 0) if value is None else value,
        instruction_bytes=b"",
        ds=_segment(vp, RegisterName.DS),
        es=_segment(vp, RegisterName.ES),
        rcx=registers.get(RegisterName.RCX, 0),
        rsi=registers.get(RegisterName.RSI, 0),
        rdi=registers.get(RegisterName.RDI, 0),
    )
    _ask(vp, MessageType.X64_IO_PORT_INTERCEPT, message.pack())
    return registers.get(RegisterName.RAX, 0) & (1 << 8 * size) - 1


def msr(vp: "VirtualProcessor", index: int, value: int | None) -> int:
    """An intercepted RDMSR (`value` None; gives EDX:EAX as the parent left them) or WRMSR."""
    given = value or 0
    message = MsrInterceptMessage(
        header=_header(vp, InterceptAccess.READ if value is None else InterceptAccess.WRITE),
        msr_number=index,
        reserved=0,
        rdx=given >> 32,
        rax=given & _MASK32,
    )
    _ask(vp, MessageType.X64_MSR_INTERCEPT, message.pack())
    get = vp.register_file.get
    return (get(RegisterName.RDX, 0) & _MASK32) << 32 | get(RegisterName.RAX, 0) & _MASK32


def cpuid(
    vp: "VirtualProcessor", leaf: int, subleaf: int, default: tuple[int, int, int, int]
) -> tuple[int, int, int, int]:
    """An intercepted CPUID; the registers as the parent left them."""
    eax, ebx, ecx, edx = default
    message = CpuidInterceptMessage(
        header=_header(vp, InterceptAccess.EXECUTE),
        rax=leaf,
        rcx=subleaf,
        rdx=0,
        rbx=0,
        default_rax=eax,
        default_rcx=ecx,
        default_rdx=edx,
        default_rbx=ebx,
    )
    _ask(vp, MessageType.X64_CPUID_INTERCEPT, message.pack())
    get = vp.register_file.get
    names = (RegisterName.RAX, RegisterName.RBX, RegisterName.RCX, RegisterName.RDX)
    a, b, c, d = (get(name, 0) & _MASK32 for name in names)
    return a, b, c, d


def apic_eoi(vp: "VirtualProcessor", vector: int) -> None:
    """The guest ended a level-triggered interrupt: its parent is told, and asserts it again while the level is high."""
    parent = vp.partition.parent
    if parent is None:
        return
    payload = ApicEoiMessage(vp.index, vector).pack()
    with suppress(HypercallError):  # a parent without a processor or message page has asked for no answers
        parent.vp(0).synic.post_message(INTERCEPT_SINT, MessageType.X64_APIC_EOI, vp.partition.id, payload)


def _segment(vp: "VirtualProcessor", name: RegisterName) -> SegmentRegister:
    value = vp.register_file.get(name, 0)
    return SegmentRegister.unpack(value.to_bytes(16, "little")) if value else _NO_SEGMENT


def _header(vp: "VirtualProcessor", access: InterceptAccess) -> InterceptMessageHeader:
    get = vp.register_file.get
    return InterceptMessageHeader(
        vp_index=vp.index,
        instruction_length=vp.apic.tpr >> 4 << 4,  # low nibble: length, not known here; high nibble: CR8
        # HV_INTERCEPT_ACCESS_TYPE counts (read 0, write 1, execute 2) where the mask has bits.
        access_type=int(access) >> 1,
        execution_state=0,
        cs=_segment(vp, RegisterName.CS),
        rip=get(RegisterName.RIP, 0),
        rflags=get(RegisterName.RFLAGS, 2),
    )


def _ask(vp: "VirtualProcessor", message_type: MessageType, payload: bytes) -> None:
    parent = vp.partition.parent
    if parent is None:
        raise VpSuspended("intercepted, and there is no parent to answer")
    if not vp.intercept_suspended:
        vp.intercept_suspended = True
        try:
            parent.vp(0).synic.post_message(INTERCEPT_SINT, message_type, vp.partition.id, payload)
        except HypercallError as error:
            vp.intercept_suspended = False
            raise VpSuspended(f"the parent takes no intercept messages ({error})") from None
    if vp.intercept_suspended:
        raise VpSuspended(f"processor {vp.index} waits for its parent to answer an intercept")
