"""What executes a guest: runs a virtual processor until it exits to the hypervisor.

An engine knows instructions and guest memory, nothing about devices. `Engine.run` executes until the guest
does something that only the hypervisor can answer, and says what in an exit; the caller finds the answer,
gives it back with `Engine.complete`, and runs on. `serve` is that answer for every exit that a `Processor` has a
method for:

    exit = engine.run(limit=1_000_000)
    serve(engine, vp, exit)
"""

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from vmbus.hypervisor import GuestFault

__all__ = [
    "Cpuid",
    "CpuidResult",
    "Engine",
    "Exit",
    "Halt",
    "Hypercall",
    "InterruptWindow",
    "IoPort",
    "Limit",
    "Mmio",
    "Processor",
    "Rdmsr",
    "Wrmsr",
    "serve",
]

CpuidResult: TypeAlias = tuple[int, int, int, int]
"""EAX, EBX, ECX, EDX."""


@dataclass(slots=True)
class IoPort:
    """IN, OUT, INS or OUTS. A read is completed with the value, a string read with the bytes.

    Attributes:
        port: first I/O port.
        size: bytes per element: 1, 2 or 4.
        write: OUT or OUTS.
        value: what OUT writes.
        count: elements; 1 unless it is a string instruction.
        data: what OUTS writes, `size` × `count` bytes.
        string: INS or OUTS, with or without REP.
    """

    port: int
    size: int
    write: bool
    value: int = 0
    count: int = 1
    data: bytes = b""
    string: bool = False


@dataclass(slots=True)
class Mmio:
    """A load or store outside of the RAM that the guest may access so. A read is completed with the value.

    Attributes:
        gpa: guest physical address.
        size: bytes, 1 to 8.
        write: a store.
        value: what is stored.
    """

    gpa: int
    size: int
    write: bool
    value: int = 0


@dataclass(slots=True)
class Rdmsr:
    """RDMSR of MSR `index`; completed with the 64-bit value."""

    index: int


@dataclass(slots=True)
class Wrmsr:
    """WRMSR of the 64-bit `value` to MSR `index`."""

    index: int
    value: int


@dataclass(slots=True)
class Cpuid:
    """CPUID; completed with four registers."""

    leaf: int
    subleaf: int


@dataclass(slots=True)
class Hypercall:
    """VMCALL or VMMCALL; completed with the result, which goes to RAX (EDX:EAX in protected mode).

    Attributes:
        control: RCX; EDX:EAX in protected mode.
        input: RDX (EBX:ECX): GPA of the input, or the first 8 bytes of a fast call.
        output: R8 (EDI:ESI): GPA of the output, or the second 8 bytes of a fast call.
        xmm: XMM0–XMM5, 96 bytes, if the engine has them.
    """

    control: int
    input: int
    output: int
    xmm: bytes = b""


@dataclass(slots=True)
class Halt:
    """HLT. The guest goes on behind it after the next interrupt.

    Attributes:
        interruptible: RFLAGS.IF was set. If not, nothing but a reset can wake the processor.
    """

    interruptible: bool = True


@dataclass(slots=True)
class Limit:
    """Nothing to answer: the instruction limit given to `Engine.run` is used up.

    Attributes:
        instructions: retired by this run.
    """

    instructions: int = 0


@dataclass(slots=True)
class InterruptWindow:
    """Nothing to answer: the guest can take the interrupt that `Engine.inject` refused before."""


Exit: TypeAlias = IoPort | Mmio | Rdmsr | Wrmsr | Cpuid | Hypercall | Halt | InterruptWindow | Limit


class Engine(Protocol):
    """Executes one virtual processor."""

    @property
    def instructions(self) -> int:
        """Instructions retired since the engine was made."""

    def run(self, limit: int = ...) -> Exit:
        """Execute up to `limit` instructions (or iterations of repeated ones), or to the next exit.

        Raises:
            EngineError: the guest's code cannot be executed, or the last exit is not completed yet.
        """

    def complete(self, answer: int | bytes | CpuidResult = 0) -> None:
        """Answer the last exit; its instruction is finished with this by the next `run`.

        Args:
            answer: the value read (`IoPort`, `Mmio`, `Rdmsr`), RAX (`Hypercall`), the bytes of a string
                read, or four registers (`Cpuid`). Writes need none.
        """

    def inject(self, vector: int) -> bool:
        """Deliver an external interrupt.

        Returns:
            False if the guest cannot take it now (RFLAGS.IF, STI shadow); `run` then exits when it can.
        """

    def fault(self, vector: int, error_code: int = 0) -> None:
        """End the exiting instruction with an exception of the guest instead of completing it."""


class Processor(Protocol):
    """What a virtual processor of the hypervisor answers; `vmbus.hypervisor.VirtualProcessor` is one."""

    def io_read(self, port: int, size: int) -> int:
        """Read `size` bytes from a port."""

    def io_write(self, port: int, size: int, value: int) -> None:
        """Write `size` bytes to a port."""

    def io_read_string(self, port: int, size: int, count: int) -> bytes:
        """Read `count` elements of `size` bytes from a port: one exit."""

    def io_write_string(self, port: int, size: int, data: bytes) -> None:
        """Write elements of `size` bytes to a port: one exit."""

    def mmio_read(self, gpa: int, size: int) -> int:
        """Read from a device's memory."""

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """Write to a device's memory."""

    def rdmsr(self, index: int) -> int:
        """Read an MSR."""

    def wrmsr(self, index: int, value: int) -> None:
        """Write an MSR."""

    def cpuid(self, leaf: int, subleaf: int) -> CpuidResult:
        """Execute CPUID."""

    def hypercall(self, control: int, input: int, output: int, xmm: bytes = ...) -> int:
        """Execute a hypercall; returns RAX."""


def serve(engine: Engine, vp: Processor, exit: Exit) -> bool:
    """Let `vp` answer `exit`. Returns False for `Halt`, `InterruptWindow` and `Limit`, which its caller decides about.

    An exception that the virtual processor raises for its guest ends the instruction instead.
    """
    try:
        answer = _answer(vp, exit)
    except GuestFault as fault:
        engine.fault(fault.vector)
        return True
    if answer is None:
        return False
    engine.complete(answer)
    return True


def _answer(vp: Processor, exit: Exit) -> int | bytes | CpuidResult | None:
    match exit:
        case IoPort(write=False):
            if exit.string:
                return vp.io_read_string(exit.port, exit.size, exit.count)
            return vp.io_read(exit.port, exit.size)
        case IoPort():
            if exit.string:
                vp.io_write_string(exit.port, exit.size, exit.data)
            else:
                vp.io_write(exit.port, exit.size, exit.value)
            return 0
        case Mmio(write=False):
            return vp.mmio_read(exit.gpa, exit.size)
        case Mmio():
            vp.mmio_write(exit.gpa, exit.size, exit.value)
            return 0
        case Rdmsr():
            return vp.rdmsr(exit.index)
        case Wrmsr():
            vp.wrmsr(exit.index, exit.value)
            return 0
        case Cpuid():
            return vp.cpuid(exit.leaf, exit.subleaf)
        case Hypercall():
            return vp.hypercall(exit.control, exit.input, exit.output, exit.xmm)
        case _:
            return None
