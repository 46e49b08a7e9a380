"""The engine that interprets machine code: one virtual processor on `vmbus.core.x86`.

It executes driver routines of guests without enlightenments, instruction by instruction, in flat memory and
ring 0. `run` is the plain `Engine`; `execute` runs against the virtual processor itself, which answers every exit
and supplies the interrupts.
"""

from vmbus.core import x86
from vmbus.engine import (
    Cpuid,
    CpuidResult,
    Exit,
    Halt,
    Hypercall,
    InterruptWindow,
    IoPort,
    Limit,
    Mmio,
    Rdmsr,
    Wrmsr,
)
from vmbus.errors import LocalProtocolError
from vmbus.hypervisor import GuestFault, VirtualProcessor, VpSuspended
from vmbus.hypervisor.tlfs import PartitionState

__all__ = ["SLICE", "X86Engine"]

SLICE = 1 << 20
"""Steps after which `X86Engine.execute` looks for interrupts from other threads: some ten milliseconds."""

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 = range(9)


class X86Engine:
    """Executes machine code in a partition's memory for one of its virtual processors.

    Args:
        vp: answers the exits; its partition's memory is the guest's. Its account gets the instructions retired.
        bits: 64 for long mode, 32 for protected mode.
        string_elements: the most elements of one INS or OUTS exit; 1 makes every element an exit, as of a hypervisor
            that does not use what the processor tells about string instructions.

    Attributes:
        cpu: the compiled processor: registers, RIP, flags, IDT.
        vp: the virtual processor.
    """

    def __init__(
        self, vp: VirtualProcessor, *, bits: int = 64, string_elements: int = x86.STRING_ELEMENTS
    ) -> None:
        self.vp = vp
        self.cpu = x86.Cpu(vp.partition.memory, bits=bits, string_elements=string_elements)
        self._wanted = True

    @property
    def instructions(self) -> int:
        """Instructions retired since the engine was made."""
        return self.cpu.instructions

    # the plain engine

    def run(self, limit: int = SLICE) -> Exit:
        """Execute to the next exit, or for `limit` instructions or iterations of repeated ones.

        Raises:
            EngineError: the guest's code cannot be executed.
            LocalProtocolError: the last exit is not completed.
        """
        cpu = self.cpu
        before = cpu.instructions
        reason = cpu.run(limit)
        if reason == x86.IO:
            data = cpu.string_data() if cpu.string and cpu.write else b""
            return IoPort(cpu.port, cpu.size, cpu.write, cpu.value, cpu.count, data, cpu.string)
        if reason == x86.MMIO:
            return Mmio(cpu.address, cpu.size, cpu.write, cpu.value)
        if reason == x86.RDMSR:
            return Rdmsr(cpu.register(RCX) & 0xFFFFFFFF)
        if reason == x86.WRMSR:
            return Wrmsr(cpu.register(RCX) & 0xFFFFFFFF, self._edx_eax())
        if reason == x86.CPUID:
            return Cpuid(cpu.register(RAX) & 0xFFFFFFFF, cpu.register(RCX) & 0xFFFFFFFF)
        if reason == x86.HYPERCALL:
            return Hypercall(*self._hypercall())
        if reason == x86.HALT:
            return Halt(cpu.interruptible)
        if reason == x86.WINDOW:
            cpu.window = False
            return InterruptWindow()
        return Limit(cpu.instructions - before)

    def complete(self, answer: int | bytes | CpuidResult = 0) -> None:
        """Answer the last exit.

        Raises:
            LocalProtocolError: there is none, or the answer is not of its kind.
            GuestMemoryError: the guest lost access to the destination of an INS.
        """
        if isinstance(answer, int):
            self.cpu.complete(answer)
        elif isinstance(answer, bytes):
            self.cpu.complete_string(answer)
        else:
            self.cpu.complete_cpuid(*answer)

    def inject(self, vector: int) -> bool:
        """Deliver an external interrupt; False if the guest cannot take it now."""
        if self.cpu.inject(vector):
            return True
        self.cpu.window = True
        return False

    def fault(self, vector: int, error_code: int = 0) -> None:
        """End the exiting instruction with an exception instead of completing it."""
        self.cpu.fault(vector, error_code)

    # against the virtual processor

    def execute(self, limit: int = 1 << 40) -> Halt | Limit:
        """Run until the guest halts with no interrupt to wake it, or `limit` instructions are used up.

        An exit that ends no instruction, such as one element of a repeated one, is taken from the limit as well: there
        may be 2**64 of them in one instruction.

        Every exit is answered by `vp`, which counts it; interrupts that `vp` has pending are delivered
        as soon as the guest takes them.

        Raises:
            EngineError: the guest's code cannot be executed.
            LocalProtocolError: the partition has been torn down.
            VpSuspended: the processor is suspended; executed again when it runs, it goes on where it was.
        """
        cpu, vp = self.cpu, self.vp
        if vp.partition.state is PartitionState.DELETED:
            raise LocalProtocolError(f"the machine is closed: {vp.partition!r}")
        account = vp.account
        before = cpu.instructions
        end = before + limit
        last = -1
        previous = vp.on_interrupt
        vp.on_interrupt = self._wake
        self._wanted = True
        try:
            while True:
                if vp.suspended:
                    raise VpSuspended(
                        f"processor {vp.index} of {vp.partition.name} is suspended by its parent"
                    )
                if self._wanted:
                    self._deliver()
                if cpu.instructions == last:
                    end -= 1
                last = cpu.instructions
                left = end - last
                if left <= 0:
                    return Limit(last - before)
                reason = cpu.run(left if left < SLICE else SLICE)
                if reason == x86.IO:
                    self._port()
                elif reason == x86.HALT:
                    account.exits["halt"] += 1
                    if not (vp.nmi_pending or (cpu.interruptible and vp.interrupt_pending)):
                        return Halt(cpu.interruptible)
                    self._wanted = True
                elif reason == x86.WINDOW:
                    cpu.window = cpu.nmi_window = False
                    self._wanted = True
                elif reason != x86.LIMIT:
                    self._answer(reason)
        except VpSuspended:
            cpu.rip = cpu.rip  # forgets the exit: its instruction is executed again
            raise
        finally:
            vp.on_interrupt = previous
            account.instructions += cpu.instructions - before

    def _wake(self) -> None:
        self._wanted = True

    def _deliver(self) -> None:
        """Hand over the next pending interrupt, or ask for the moment when the guest takes it."""
        cpu, vp = self.cpu, self.vp
        self._wanted = False
        if vp.nmi_pending:
            if not cpu.inject_nmi():
                cpu.nmi_window = True
            elif vp.take_nmi():
                self._wanted = True
                return
        if not vp.interrupt_pending:
            cpu.window = False
        elif not cpu.interruptible:
            cpu.window = True
        else:
            vector = vp.pop_interrupt()
            if vector is not None:
                cpu.inject(vector)
                self._wanted = vp.interrupt_pending

    def _port(self) -> None:
        cpu, vp = self.cpu, self.vp
        if cpu.string:
            if cpu.write:
                vp.io_write_string(cpu.port, cpu.size, cpu.string_data())
                cpu.complete()
            else:
                cpu.complete_string(vp.io_read_string(cpu.port, cpu.size, cpu.count))
        elif cpu.write:
            vp.io_write(cpu.port, cpu.size, cpu.value)
            cpu.complete()
        else:
            cpu.complete(vp.io_read(cpu.port, cpu.size))

    def _answer(self, reason: int) -> None:
        cpu, vp = self.cpu, self.vp
        try:
            if reason == x86.MMIO:
                if cpu.write:
                    vp.mmio_write(cpu.address, cpu.size, cpu.value)
                    cpu.complete()
                else:
                    cpu.complete(vp.mmio_read(cpu.address, cpu.size))
            elif reason == x86.RDMSR:
                cpu.complete(vp.rdmsr(cpu.register(RCX) & 0xFFFFFFFF))
            elif reason == x86.WRMSR:
                vp.wrmsr(cpu.register(RCX) & 0xFFFFFFFF, self._edx_eax())
                cpu.complete()
            elif reason == x86.CPUID:
                cpu.complete_cpuid(*vp.cpuid(cpu.register(RAX) & 0xFFFFFFFF, cpu.register(RCX) & 0xFFFFFFFF))
            else:
                cpu.complete(vp.hypercall(*self._hypercall()))
        except GuestFault as fault:
            cpu.fault(fault.vector)

    def _edx_eax(self) -> int:
        return self._pair(RDX, RAX)

    def _pair(self, high: int, low: int) -> int:
        return (self.cpu.register(high) & 0xFFFFFFFF) << 32 | self.cpu.register(low) & 0xFFFFFFFF

    def _hypercall(self) -> tuple[int, int, int]:
        """Control, input and output of a hypercall, from the registers of its mode (TLFS, hypercall interface)."""
        if self.cpu.bits == 32:
            return self._edx_eax(), self._pair(RBX, RCX), self._pair(RDI, RSI)
        return self.cpu.register(RCX), self.cpu.register(RDX), self.cpu.register(R8)
