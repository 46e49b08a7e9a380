"""A virtual processor as its guest sees it: hypercalls, MSRs, CPUID, interrupts, port and memory-mapped I/O.

Whoever executes the guest - a model guest in Python, the instruction interpreter, an engine running an unmodified
kernel - calls exactly these methods on its exits; nothing here depends on who calls.
"""

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from vmbus.errors import GuestMemoryError
from vmbus.hypervisor import intercepts
from vmbus.hypervisor.apic import (
    APIC_BASE,
    APIC_SIZE,
    NMI_VECTOR,
    ApicMode,
    DeliveryMode,
    Ipi,
    LocalApic,
    Register,
)
from vmbus.hypervisor.cpuid import (
    CACHES_LEAF,
    FEATURES_LEAF,
    TOPOLOGY_LEAF,
    CpuidResult,
    caches,
    leaves,
    topology,
)
from vmbus.hypervisor.faults import (
    GeneralProtectionFault,
    PageFault,
    UndefinedOpcodeFault,
    VpStalled,
    VpSuspended,
)
from vmbus.hypervisor.hypercalls import dispatch
from vmbus.hypervisor.msrs import MSR_READ, MSR_WRITE
from vmbus.hypervisor.overlay import OverlayPage
from vmbus.hypervisor.registers import RegisterFile, paging_state
from vmbus.hypervisor.stimer import SyntheticTimers
from vmbus.hypervisor.synic import Synic
from vmbus.hypervisor.tlfs import TranslateResult
from vmbus.hypervisor.translate import READ_ACCESS, Access, walk
from vmbus.trace.names import hypercall_name

if TYPE_CHECKING:
    from vmbus.hypervisor.partition import Partition

__all__ = ["VirtualProcessor"]

log = logging.getLogger(__name__)

DEFAULT_PAT: Final = 0x0007_0406_0007_0406
"""IA32_PAT at reset (SDM 12.12.4)."""
APIC_MODE_SHIFT: Final = 10
CPUID_APIC: Final = 1 << 9
"""CPUID 1 EDX: there is a local APIC, and it is not disabled."""
APIC_BASE_BSP: Final = 1 << 8
"""Bits of IA32_APIC_BASE: the mode (`ApicMode`), and that this is the boot processor (SDM 11.4.4)."""
_MASK64: Final = 0xFFFF_FFFF_FFFF_FFFF
_XAPIC: Final = ApicMode.XAPIC


class VirtualProcessor:
    """One virtual processor of a partition.

    Attributes:
        partition: whose processor it is.
        index: its VP index, also its APIC id.
        apic: its local APIC.
        synic: its synthetic interrupt controller.
        timers: its four synthetic timers.
        registers: architectural registers by `RegisterName`, as far as somebody set them.
        interrupt_handler: a model guest's handler, ``handler(vector)``, called inline when an interrupt is
            delivered; it ends the interrupt with the EOI MSR unless the SINT has auto-EOI. Vector 2 is an NMI, which
            comes whatever `interrupts_enabled` says and is not ended.
        on_interrupt: called (without an argument) when an interrupt becomes pending and there is no
            `interrupt_handler`: an engine's or thread's wake-up; it then takes `pop_interrupt` and `take_nmi`.
        halted: the guest has halted and waits for an interrupt.
        started: it runs since power-on (the boot processor), a STARTUP IPI or HvCallStartVirtualProcessor. Engines of
            application processors wait for it.
        suspended: its parent has suspended it (`suspend`, or its partition's suspend property): its exits raise
            `VpSuspended`, and it takes no interrupts.
        nmi_pending: an NMI waits.
        deleted: the processor is gone (HvCallDeleteVp, or with its partition); whoever still executes it gets
            `VpSuspended` for every exit, for good.
    """

    def __init__(self, partition: "Partition", index: int) -> None:
        hypervisor = partition.hypervisor
        self.partition = partition
        self.index = index
        self.account = partition.account
        self._clock = hypervisor.clock
        self._lock = threading.Lock()
        self._interrupts_enabled = True
        self._delivering = False
        self._in_nmi = False
        self.halted = False
        self.started = index == 0
        self.suspended = False
        self.deleted = False
        self.nmi_pending = False
        self.interrupt_handler: Callable[[int], None] | None = None
        self.on_interrupt: Callable[[], None] | None = None
        self.on_startup: Callable[[Ipi], None] | None = None
        """Called with INIT and STARTUP IPIs to this processor; an engine starts it at the page named."""
        self.on_start: Callable[[], None] | None = None
        """Called when HvCallStartVirtualProcessor has set the registers; an engine starts it as they say."""
        self.on_resume: Callable[[], None] | None = None
        """Called when the processor is suspended no longer: whoever runs its guest goes on."""
        self.on_stall: Callable[[Callable[[], bool]], bool] | None = None
        """A model guest's: ``on_stall(runs)`` waits, in the thread of an exit, until ``runs()``; whether it does."""
        self.apic = LocalApic(
            index,
            hypervisor.clock,
            hypervisor.tsc_frequency,
            hypervisor.apic_frequency,
            self.request_interrupt,
            self._send_ipi,
        )
        self.synic = Synic(partition.memory, self.request_interrupt, hypervisor.map_lock)
        self.timers = SyntheticTimers(hypervisor.clock, partition.time, self.synic, self.request_interrupt)
        self.assist_page = OverlayPage(partition.memory)
        self.assist_msr = 0
        self.pat = DEFAULT_PAT
        self._shown: tuple[int, int] | None = None  # what the CPUID leaves below were made for
        self._leaves: dict[int, CpuidResult] = {}
        self.registers: dict[int, int] = {}
        self.register_file: RegisterFile = self.registers
        """Where architectural registers are kept: `registers`, unless an engine puts its own in front."""
        self.intercept_suspended = False
        self.explicitly_suspended = False
        self.fast_output = b""
        """What the last fast hypercall returns in registers, after those that carried its input."""

    def __repr__(self) -> str:
        state = (
            "suspended"
            if self.suspended
            else "halted"
            if self.halted
            else "running"
            if self.started
            else "off"
        )
        return f"<VirtualProcessor {self.index} of {self.partition.name!r}, {state}>"

    # Time

    @property
    def tsc(self) -> int:
        """The time stamp counter (64 bits)."""
        return (
            self._clock.now() * self.partition.hypervisor.tsc_frequency // 1_000_000_000
            + self.apic.tsc_offset
            & _MASK64
        )

    @property
    def tsc_offset(self) -> int:
        """IA32_TSC_ADJUST, signed: what the guest has added to its TSC."""
        return self.apic.tsc_offset

    @tsc_offset.setter
    def tsc_offset(self, value: int) -> None:
        self.apic.tsc_offset = value
        self.partition.update_reference_tsc()

    @property
    def reference_time(self) -> int:
        """Partition reference time in 100 ns units (TLFS, timers)."""
        return self.partition.reference_time

    # Exits

    def hypercall(self, control: int, input: int, output: int, xmm: bytes = b"") -> int:
        """A hypercall in the 64-bit convention (TLFS, hypercall interface).

        Args:
            control: RCX: code, fast bit 16, variable header size, rep count and rep start.
            input: RDX: the input page's GPA, or the first 8 input bytes of a fast call.
            output: R8: the output page's GPA, or the next 8 input bytes of a fast call.
            xmm: XMM0-XMM5 (96 bytes) of an extended fast call.

        Returns:
            RAX: the HV_STATUS, and the number of reps done in bits 43:32.

        Raises:
            UndefinedOpcodeFault: the guest has not enabled its hypercall page.
        """
        if self.suspended:
            self._stall()
        account = self.account
        account.exits["hypercall"] += 1
        account.hypercalls[control & 0xFFFF] += 1
        if not self.partition.hypercalls_enabled:
            raise UndefinedOpcodeFault(
                f"{hypercall_name(control & 0xFFFF)}: hypercalls are not enabled: "
                "write HV_X64_MSR_GUEST_OS_ID, then HV_X64_MSR_HYPERCALL with bit 0"
            )
        return dispatch(self, control, input, output, xmm)

    def rdmsr(self, index: int) -> int:
        """RDMSR.

        Raises:
            GeneralProtectionFault: no such MSR, or not for this partition.
        """
        if self.suspended:
            self._stall()
        self.account.exits["rdmsr"] += 1
        watched = self.partition.intercepts
        if watched.msrs and watched.msrs.get(index, 0) & 1:
            return intercepts.msr(self, index, None)
        entry = MSR_READ.get(index)
        if entry is None and watched.all_msrs & 1:
            return intercepts.msr(self, index, None)
        if entry is None or entry[0] & ~self.partition.privileges:
            raise GeneralProtectionFault(f"RDMSR 0x{index:x}")
        return entry[1](self)

    def wrmsr(self, index: int, value: int) -> None:
        """WRMSR.

        Raises:
            GeneralProtectionFault: no such MSR, not for this partition, read-only, or an illegal value.
        """
        if self.suspended:
            self._stall()
        self.account.exits["wrmsr"] += 1
        watched = self.partition.intercepts
        if watched.msrs and watched.msrs.get(index, 0) & 2:
            intercepts.msr(self, index, value)
            return
        entry = MSR_WRITE.get(index)
        if entry is None and watched.all_msrs & 2:
            intercepts.msr(self, index, value)
            return
        if entry is None or entry[0] & ~self.partition.privileges:
            raise GeneralProtectionFault(f"WRMSR 0x{index:x}")
        entry[1](self, value)

    def cpuid(self, leaf: int, subleaf: int = 0) -> CpuidResult:
        """CPUID: (EAX, EBX, ECX, EDX); leaves that do not exist give zeros."""
        if self.suspended:
            self._stall()
        self.account.exits["cpuid"] += 1
        partition = self.partition
        shown = (partition.privileges, len(partition.vps))
        if shown != self._shown:
            frequency = partition.hypervisor.tsc_frequency
            self._leaves = leaves(partition.personality, shown[0], self.index, shown[1], frequency)
            self._shown = shown
        result = self._leaves.get(leaf, (0, 0, 0, 0))
        if leaf == 1 and self.apic.mode == ApicMode.DISABLED:
            result = (*result[:3], result[3] & ~CPUID_APIC)  # SDM 11.4.3
        if leaf == TOPOLOGY_LEAF and partition.personality.x2apic:
            result = topology(subleaf, self.index, shown[1])
        elif leaf == CACHES_LEAF:
            result = caches(subleaf, shown[1])
        elif leaf == FEATURES_LEAF and subleaf:
            result = (0, 0, 0, 0)
        if leaf in partition.intercepts.cpuid:
            return intercepts.cpuid(self, leaf, subleaf, result)
        return result

    def io_read(self, port: int, size: int) -> int:
        """An intercepted IN of `size` (1, 2 or 4) bytes."""
        if self.suspended:
            self._stall()
        self.account.exits["io_port"] += 1
        watched = self.partition.intercepts.ports
        if watched and watched.get(port, 0) & 1:
            return intercepts.io_port(self, port, size, None)
        return self.partition.devices.io_read(port, size)

    def io_write(self, port: int, size: int, value: int) -> None:
        """An intercepted OUT of `size` (1, 2 or 4) bytes."""
        if self.suspended:
            self._stall()
        self.account.exits["io_port"] += 1
        watched = self.partition.intercepts.ports
        if watched and watched.get(port, 0) & 2:
            intercepts.io_port(self, port, size, value)
            return
        self.partition.devices.io_write(port, size, value)

    def io_read_string(self, port: int, size: int, count: int) -> bytes:
        """An intercepted INS of `count` elements: one exit.

        The intercept message of a string instruction (HV_X64_IO_PORT_INTERCEPT_MESSAGE with StringOp and RepPrefix,
        TLFS, intercepts) tells its receiver the whole repetition, and it emulates as many elements as it can before it
        resumes. A port that the parent intercepts by hypercall takes an exit for every element: `io_read`.
        """
        watched = self.partition.intercepts.ports
        if watched and port in watched:
            return b"".join(self.io_read(port, size).to_bytes(size, "little") for _ in range(count))
        if self.suspended:
            self._stall()
        self.account.exits["io_port"] += 1
        return self.partition.devices.io_read_string(port, size, count)

    def io_write_string(self, port: int, size: int, data: bytes) -> None:
        """An intercepted OUTS: one exit, see `io_read_string`."""
        watched = self.partition.intercepts.ports
        if watched and port in watched:
            for at in range(0, len(data), size):
                self.io_write(port, size, int.from_bytes(data[at : at + size], "little"))
            return
        if self.suspended:
            self._stall()
        self.account.exits["io_port"] += 1
        self.partition.devices.io_write_string(port, size, data)

    def mmio_read(self, gpa: int, size: int) -> int:
        """An intercepted load of `size` bytes from unmapped physical memory (the local APIC among it)."""
        if self.suspended:
            self._stall()
        self.account.exits["mmio"] += 1
        if APIC_BASE <= gpa < APIC_BASE + APIC_SIZE and self.apic.mode == _XAPIC:
            return self.read_apic(gpa - APIC_BASE & ~15)
        return self.partition.devices.mmio_read(gpa, size)

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """An intercepted store of `size` bytes to unmapped physical memory (the local APIC among it)."""
        if self.suspended:
            self._stall()
        self.account.exits["mmio"] += 1
        if APIC_BASE <= gpa < APIC_BASE + APIC_SIZE and self.apic.mode == _XAPIC:
            self.write_apic(gpa - APIC_BASE & ~15, value)
        else:
            self.partition.devices.mmio_write(gpa, size, value)

    # Addresses

    def translate(self, gva: int, access: Access = READ_ACCESS) -> int:
        """The guest physical address of guest virtual address `gva`, as this processor's page tables map it now.

        Raises:
            PageFault: the guest's tables do not allow the access.
            GuestMemoryError: the guest physical address, or a page table, is not the partition's.
        """
        found = walk(self.partition.memory, paging_state(self), gva, access)
        if found.result is TranslateResult.SUCCESS:
            return found.gpa
        if found.result in (
            TranslateResult.PAGE_NOT_PRESENT,
            TranslateResult.PRIVILEGE_VIOLATION,
            TranslateResult.INVALID_PAGE_TABLE_FLAGS,
        ):
            raise PageFault(gva, found.error_code)
        raise GuestMemoryError(f"0x{gva:x} leads to guest physical 0x{found.gpa:x}: {found.result.name}")

    def translate_to_system(self, gva: int, access: Access = READ_ACCESS) -> tuple[int, int]:
        """Both translations, guest virtual to guest physical to system physical (`GuestMemory.backing`).

        Raises:
            PageFault: the guest's tables do not allow the access.
            GuestMemoryError: the guest physical address, or a page table, is not the partition's.
        """
        return self.partition.memory.backing(self.translate(gva, access))

    # Interrupts

    @property
    def apic_base(self) -> int:
        """IA32_APIC_BASE. Writing it switches between xAPIC, x2APIC and disabled; the page stays where it is.

        Raises:
            GeneralProtectionFault: another address, a reserved bit, or a change of mode that there is not.
        """
        return APIC_BASE | self.apic.mode << APIC_MODE_SHIFT | (APIC_BASE_BSP if self.index == 0 else 0)

    @apic_base.setter
    def apic_base(self, value: int) -> None:
        mode = value >> APIC_MODE_SHIFT & 3
        if value & ~(3 << APIC_MODE_SHIFT | APIC_BASE_BSP) != APIC_BASE or (
            mode == ApicMode.X2APIC and not self.partition.personality.x2apic
        ):
            raise GeneralProtectionFault(f"IA32_APIC_BASE 0x{value:x}")
        with self._lock:
            before = self.apic.enabled
            if not self.apic.switch(mode):
                raise GeneralProtectionFault(f"IA32_APIC_BASE 0x{value:x}: no such change of mode")
        if not before:
            self._apic_enabled()

    @property
    def interrupts_enabled(self) -> bool:
        """A model guest's RFLAGS.IF: while clear, interrupts stay pending. Setting it delivers them."""
        return self._interrupts_enabled

    @interrupts_enabled.setter
    def interrupts_enabled(self, value: bool) -> None:
        self._interrupts_enabled = value
        if value:
            self._deliver()

    @property
    def interrupt_pending(self) -> bool:
        """Whether `pop_interrupt` would give a vector."""
        return self.apic.deliverable and not self.suspended

    def request_interrupt(self, vector: int, auto_eoi: bool = False, level: bool = False) -> bool:
        """Request a fixed interrupt of this processor and deliver it if its priority allows it now.

        Returns:
            Whether the local APIC took the request. While it is disabled it takes none, and whoever asked for the
            interrupt has to see that it is not lost, or let it be, as other hardware does (SDM 11.4.7.2).
        """
        handler = self.interrupt_handler
        with self._lock:
            if not self.apic.request(vector, auto_eoi, level):
                return False
            if self.suspended:
                return True
            if handler is not None:
                if self._delivering or not self._interrupts_enabled:
                    return True
                self._delivering = True
        if handler is not None:
            self._run(handler)
        elif self.on_interrupt is not None and self.apic.deliverable:
            self.on_interrupt()
        return True

    def request_external(self, vector: int) -> bool:
        """Request an external interrupt (ExtINT); False while the last one is acknowledged and not cleared."""
        with self._lock:
            if self.apic.external_acknowledged:
                return False
            self.apic.external = vector
        self._deliver()
        return True

    def clear_external(self) -> bool:
        """Let another external interrupt come; False if none was acknowledged."""
        with self._lock:
            acknowledged, self.apic.external_acknowledged = self.apic.external_acknowledged, False
        return acknowledged

    def request_nmi(self) -> None:
        """Request a non-maskable interrupt; one more while one waits changes nothing (SDM 6.7.1)."""
        self.nmi_pending = True
        if self.interrupt_handler is not None:
            self._deliver_nmi(self.interrupt_handler)
        elif self.on_interrupt is not None and not self.suspended:
            self.on_interrupt()

    def take_nmi(self) -> bool:
        """Take the NMI that waits, for delivery through vector 2 now; False if none does."""
        with self._lock:
            taken = self.nmi_pending and not self.suspended
            if taken:
                self.nmi_pending = False
                self.halted = False
        if taken:
            self.account.interrupts[NMI_VECTOR] += 1
        return taken

    def receive_ipi(self, mode: int, vector: int, *, level: bool = False) -> None:
        """What another processor's ICR, or the parent, sends in a `DeliveryMode` (SMI is ignored: there is no SMM)."""
        if mode in (DeliveryMode.FIXED, DeliveryMode.LOWEST_PRIORITY):
            self.request_interrupt(vector, level=level)
        elif mode == DeliveryMode.NMI:
            self.request_nmi()
        elif mode in (DeliveryMode.INIT, DeliveryMode.STARTUP):
            self.started = mode == DeliveryMode.STARTUP
            log.debug(
                "%s: processor %d gets %s 0x%x",
                self.partition.name,
                self.index,
                DeliveryMode(mode).name,
                vector,
            )
            if self.on_startup is not None:
                self.on_startup(Ipi(mode, vector, 0, False, self.index))

    # Suspension

    def suspend(self, suspended: bool) -> None:
        """Stop or resume the processor (HvRegisterExplicitSuspend). What it is asked for meanwhile waits."""
        self.explicitly_suspended = suspended
        self.update_suspension()

    def update_suspension(self) -> None:
        """Its partition's suspend property, or its own register, has changed."""
        before = self.suspended
        with self._lock:
            self.suspended = self.explicitly_suspended or self.partition.suspended or self.deleted
        if before == self.suspended:
            return
        changed = self.partition.on_suspension
        if changed is not None:
            changed(self)
        if self.suspended:
            return
        if self.nmi_pending and self.interrupt_handler is not None:
            self._deliver_nmi(self.interrupt_handler)
        self._deliver()
        if self.on_resume is not None:
            self.on_resume()

    def _stall(self) -> None:
        """The exit of a suspended processor: it takes place when the processor runs again, or is made again then.

        Raises:
            VpSuspended: nobody waits for that in this thread, or the processor is gone.
        """
        if self.deleted:
            raise VpStalled(f"processor {self.index} of {self.partition.name} is gone")
        if (
            self._delivering
        ):  # a model guest's interrupt handler, in a provider's thread: what has begun is finished
            return
        if self.on_stall is not None and self.on_stall(lambda: self.deleted or not self.suspended):
            if self.deleted:
                raise VpStalled(f"processor {self.index} of {self.partition.name} was taken away")
            return
        raise VpStalled(f"processor {self.index} of {self.partition.name} is suspended by its parent")

    # Delivery

    def pop_interrupt(self) -> int | None:
        """Take the next interrupt that can be delivered into service (an INTA cycle); None if there is none."""
        with self._lock:
            vector = None if self.suspended else self.apic.accept()
        if vector is not None:
            self.account.interrupts[vector] += 1
        return vector

    def end_of_interrupt(self) -> None:
        """EOI: end the highest interrupt in service and deliver what waited behind it."""
        with self._lock:
            vector = self.apic.eoi()
        self._ended(vector)

    def read_apic(self, offset: int) -> int:
        """Read the local APIC register at `offset` (SDM table 11-1)."""
        with self._lock:
            return self.apic.read(offset)

    def write_apic(self, offset: int, value: int) -> None:
        """Write the local APIC register at `offset` (SDM table 11-1)."""
        if offset == Register.ICR_LOW:
            self.apic.write(
                offset, value
            )  # may request interrupts of this very processor: not under its lock
            return
        with self._lock:
            before = self.apic.enabled
            ended = self.apic.write(offset, value)
        if offset == Register.EOI:
            self._ended(ended)
        elif offset == Register.TPR:
            self._deliver()
        elif not before:
            self._apic_enabled()

    def _apic_enabled(self) -> None:
        """The local APIC may have been enabled: what the hypervisor has for it, and lines that are high, come now."""
        if self.apic.enabled:
            self.synic.apic_enabled()
            self.timers.retry()
            on_apic_enabled = self.partition.on_apic_enabled
            if on_apic_enabled is not None:
                on_apic_enabled()

    def _ended(self, vector: int | None) -> None:
        if vector is not None:
            self.synic.end_of_interrupt(vector)
            if self.apic.tmr >> vector & 1:
                intercepts.apic_eoi(self, vector)
            on_eoi = self.partition.on_eoi
            if on_eoi is not None:
                on_eoi(vector)
        self._deliver()

    def _deliver(self) -> None:
        """Run the model guest's handler for what is deliverable, in this thread, one at a time."""
        if not self.apic.irr and self.apic.external is None:  # whoever adds to it comes here afterwards
            return
        handler = self.interrupt_handler
        if handler is None:
            wake = self.on_interrupt
            if wake is not None and self.interrupt_pending:
                wake()
            return
        with self._lock:
            if self._delivering or not self._interrupts_enabled:
                return
            self._delivering = True
        self._run(handler)

    def _run(self, handler: Callable[[int], None]) -> None:
        """Hand interrupts to the handler while there are any; `_delivering` is ours.

        A handler that runs already picks up what is requested meanwhile, after it returns: like real ones, it runs
        with interrupts disabled.
        """
        lock, accept, counts = self._lock, self.apic.accept, self.account.interrupts
        try:
            while True:
                with lock:
                    vector = accept() if self._interrupts_enabled and not self.suspended else None
                    if vector is None:
                        self._delivering = False
                        return
                self.halted = False
                counts[vector] += 1
                handler(vector)
        except VpSuspended:
            self._delivering = False
            if not self.deleted:
                raise
            # Else its handler was stopped in the middle: nothing that whoever interrupted it has to know.
        except BaseException:
            self._delivering = False
            raise

    def _deliver_nmi(self, handler: Callable[[int], None]) -> None:
        """Run the model guest's handler for an NMI, in the middle of whatever else it handles; not one in another."""
        with self._lock:
            if self._in_nmi:
                return
            self._in_nmi = True
        try:
            while self.take_nmi():
                handler(NMI_VECTOR)
        finally:
            self._in_nmi = False

    def _send_ipi(self, ipi: Ipi) -> None:
        for vp in list(self.partition.vps):
            if ipi.shorthand == 1:
                chosen = vp is self
            elif ipi.shorthand == 0:
                chosen = vp.apic.matches(ipi.destination, ipi.logical)
            else:
                chosen = ipi.shorthand == 2 or vp is not self
            if not chosen:
                continue
            vp.receive_ipi(ipi.mode, ipi.vector)
            if ipi.mode == DeliveryMode.LOWEST_PRIORITY:
                return

    def reset(self) -> None:
        """Back to the state at power-on."""
        with self._lock:
            self.apic.reset()
        self.timers.reset()
        self.synic.reset()
        with self.partition.hypervisor.map_lock:
            self.assist_page.remove()
        self.assist_msr = 0
        self.pat = DEFAULT_PAT
        self.apic.tsc_offset = 0
        self.registers.clear()
        self.intercept_suspended = False
        self.halted = False
        self.nmi_pending = False
        self.started = self.index == 0
        self.suspend(False)

    def delete(self) -> None:
        """The processor goes away: it makes no exits and takes no interrupts any more, and its timers stay silent."""
        self.deleted = True
        self.timers.closed = self.apic.closed = True
        self.suspend(True)
        self.reset()
        if self.on_resume is not None:
            self.on_resume()  # whoever waits for it to run waits in vain
