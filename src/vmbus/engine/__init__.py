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

from vmbus.errors import EngineError, VmbusError

__all__ = [
    "Cpuid",
    "CpuidResult",
    "Engine",
    "Exit",
    "Halt",
    "Hypercall",
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

GENERAL_PROTECTION = 13
"""Vector of #GP, which a virtual processor raises for an MSR that does not exist."""


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
    """VMCALL or VMMCALL with the registers of the x64 calling convention; completed with RAX.

    Attributes:
        control: RCX.
        input: RDX: GPA of the input, or the first 8 bytes of a fast call.
        output: R8: GPA of the output, or the second 8 bytes of a fast call.
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


Exit: TypeAlias = IoPort | Mmio | Rdmsr | Wrmsr | Cpuid | Hypercall | Halt | Limit


class Engine(Protocol):
    """Executes one virtual processor."""

    @property
    def instructions(self) -> int:
        """Instructions retired since the engine was made."""

    def run(self, limit: int = ...) -> Exit:
        """Execute up to `limit` instructions, or to the next exit.

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
        """Deliver an external interrupt; False if the guest cannot take it now (RFLAGS.IF, STI shadow)."""

    def fault(self, vector: int, error_code: int = 0) -> None:
        """End the exiting instruction with an exception of the guest instead of completing it."""


class Processor(Protocol):
    """What a virtual processor of the hypervisor answers; `vmbus.hypervisor.VirtualProcessor` is one."""

    def io_read(self, port: int, size: int) -> int:
        """Read `size` bytes from a port."""

    def io_write(self, port: int, size: int, value: int) -> None:
        """Write `size` bytes to a port."""

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
    """Let `vp` answer `exit`. Returns False for `Halt` and `Limit`, which only the caller can decide about.

    A string instruction is one exit and `count` port accesses: what Hyper-V's string intercept is (TLFS,
    HV_X64_IO_PORT_INTERCEPT_MESSAGE with StringOp), whose receiver emulates all elements that it can reach.
    """
    match exit:
        case IoPort(port=port, size=size, write=False):
            if not exit.string:
                engine.complete(vp.io_read(port, size))
            else:
                read = vp.io_read
                engine.complete(
                    b"".join([read(port, size).to_bytes(size, "little") for _ in range(exit.count)])
                )
        case IoPort(port=port, size=size):
            if not exit.string:
                vp.io_write(port, size, exit.value)
            else:
                for at in range(0, exit.count * size, size):
                    vp.io_write(port, size, int.from_bytes(exit.data[at : at + size], "little"))
            engine.complete()
        case Mmio(gpa=gpa, size=size, write=False):
            engine.complete(vp.mmio_read(gpa, size))
        case Mmio(gpa=gpa, size=size):
            vp.mmio_write(gpa, size, exit.value)
            engine.complete()
        case Rdmsr(index=index):
            try:
                value = vp.rdmsr(index)
            except VmbusError as error:
                _general_protection(engine, error)
            else:
                engine.complete(value)
        case Wrmsr(index=index):
            try:
                vp.wrmsr(index, exit.value)
            except VmbusError as error:
                _general_protection(engine, error)
            else:
                engine.complete()
        case Cpuid():
            engine.complete(vp.cpuid(exit.leaf, exit.subleaf))
        case Hypercall():
            engine.complete(vp.hypercall(exit.control, exit.input, exit.output, exit.xmm))
        case _:
            return False
    return True


def _general_protection(engine: Engine, error: VmbusError) -> None:
    """Turn the virtual processor's refusal of an MSR into the #GP that the guest sees."""
    if isinstance(error, EngineError):
        raise error
    engine.fault(GENERAL_PROTECTION)
