"""An interpreter of real x86 machine code for guests that have no enlightenments: the instruction-level path.

It executes flat 32-bit protected mode and flat 64-bit long mode in ring 0 (linear addresses are guest physical addresses),
the integer instruction set with exact flags. What only a hypervisor can answer leaves `Cpu.run` as an exit and is
finished by `Cpu.complete`: ports, memory that is not RAM, MSRs, CPUID, hypercalls, HLT. Anything that is not there (x87,
SSE, far branches, control registers, single-stepping) is a clear error with the bytes and the address.

The sources of the rules are the Intel SDM and AMD APM, volumes 2 and 3. The parts are in `ext/x86/`:
`flags.pxi`, `access.pxi`, `decode.pxi`, `arithmetic.pxi`, `execute.pxi`, `strings.pxi`.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from vmbus.core.copy cimport copy_from_shared
from vmbus.core.memory cimport (
    ACCESS_EXECUTE,
    ACCESS_READ,
    ACCESS_WRITE,
    GuestMemory,
    guest_memory_t,
    guest_pointer,
)

from vmbus.errors import EngineError, GuestMemoryError, LocalProtocolError

cdef enum:
    TURN = 1 << 22              # steps after which signals (Ctrl-C) are looked at

include "x86/flags.pxi"
include "x86/access.pxi"
include "x86/decode.pxi"
include "x86/arithmetic.pxi"
include "x86/execute.pxi"
include "x86/strings.pxi"

STRING_ELEMENTS = X86_STRING_MOST
LIMIT = X86_LIMIT
IO = X86_IO
MMIO = X86_MMIO
RDMSR = X86_RDMSR
WRMSR = X86_WRMSR
CPUID = X86_CPUID
HYPERCALL = X86_HYPERCALL
HALT = X86_HALT
WINDOW = X86_WINDOW

VECTOR_NAMES = {DE: "#DE", DB: "#DB", BP: "#BP", OVERFLOW_TRAP: "#OF", UD: "#UD", SS_FAULT: "#SS", GP: "#GP"}


@cython.no_gc_clear     # the destructor needs what it refers to: cleared references are None, not memory
@cython.final
cdef class Cpu:
    """Cpu(memory, *, bits=64, string_elements=1024)\n--\n\nOne virtual processor: registers, and `run`.

    Args:
        memory: the guest physical address space; accesses that its pages do not allow are exits.
        bits: 64 for long mode, 32 for protected mode.
        string_elements: the most elements of one INS or OUTS exit; 1 makes every element an exit of its own.
    """

    def __cinit__(self, GuestMemory memory not None, *, int bits=64, uint32_t string_elements=X86_STRING_MOST):
        cdef int n
        if bits != 64 and bits != 32:
            raise LocalProtocolError(f"a processor has 32 or 64 bits, not {bits}")
        if not 1 <= string_elements <= 1 << 20:
            raise LocalProtocolError("a string exit carries 1 to 1048576 elements")
        self.c.cache = <x86_insn_t *>calloc(X86_CACHE, sizeof(x86_insn_t))
        if self.c.cache == NULL:
            raise MemoryError
        for n in range(X86_CACHE):
            self.c.cache[n].rip = <uint64_t>-1
        self.memory = memory
        self.c.memory = &memory.c
        memory.exports += 1         # the mapping stays while the processor may run
        self.c.long_mode = bits == 64
        self.c.string_most = string_elements
        self.c.eflags = 2
        self.c.selector[1] = 0x10   # what a boot loader's flat descriptors commonly are
        self.c.selector[0] = self.c.selector[2] = self.c.selector[3] = 0x18
        self.c.selector[4] = self.c.selector[5] = 0x18

    def __dealloc__(self):
        free(self.c.cache)
        if self.memory is not None and self.c.memory != NULL:
            self.memory.exports -= 1

    # registers

    @property
    def bits(self) -> int:
        """64 or 32."""
        return 64 if self.c.long_mode else 32

    def register(self, uint32_t number) -> int:
        """A general register: 0 to 15 for RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 … R15."""
        if number > 15:
            raise LocalProtocolError(f"there is no register {number}")
        return self.c.regs[number]

    def set_register(self, uint32_t number, uint64_t value) -> None:
        """Change a general register."""
        if number > 15 or (number > 7 and not self.c.long_mode):
            raise LocalProtocolError(f"there is no register {number}")
        self.c.regs[number] = linear(&self.c, value)

    @property
    def registers(self) -> list[int]:
        """All 16 general registers."""
        cdef int n
        return [self.c.regs[n] for n in range(16)]

    @property
    def rip(self) -> int:
        """Address of the next instruction. Changing it forgets an exit that is not completed."""
        return self.c.rip

    @rip.setter
    def rip(self, uint64_t value) -> None:
        self.c.pending = 0
        self.c.rip = linear(&self.c, value)
        self.c.replays = 0

    @property
    def rflags(self) -> int:
        """RFLAGS."""
        return flags_read(&self.c)

    @rflags.setter
    def rflags(self, uint64_t value) -> None:
        if value & F_TF:
            raise LocalProtocolError("there is no single-stepping")
        flags_write(&self.c, (value & (F_CF | ARITHMETIC | LOADABLE)) | 2)

    @property
    def fs_base(self) -> int:
        """Base of FS; the other segments but GS begin at 0."""
        return self.c.segment_base[4]

    @fs_base.setter
    def fs_base(self, uint64_t value) -> None:
        self.c.segment_base[4] = value

    @property
    def gs_base(self) -> int:
        """Base of GS."""
        return self.c.segment_base[5]

    @gs_base.setter
    def gs_base(self, uint64_t value) -> None:
        self.c.segment_base[5] = value

    @property
    def idt(self) -> tuple[int, int]:
        """Base and limit of the interrupt descriptor table."""
        return self.c.idt_base, self.c.idt_limit

    @idt.setter
    def idt(self, value: tuple[int, int]) -> None:
        base, limit = value
        self.c.idt_base = base
        self.c.idt_limit = <uint16_t>limit

    @property
    def instructions(self) -> int:
        """Instructions retired; a repeated string instruction is one."""
        return self.c.retired

    @property
    def interruptible(self) -> bool:
        """The guest can take an interrupt now: IF is set, and STI was not the last instruction."""
        return self.c.eflags & F_IF != 0 and self.c.shadow == 0 and not self.c.pending

    @property
    def window(self) -> bool:
        """Leave `run` with `WINDOW` as soon as the guest can take an interrupt."""
        return self.c.window != 0

    @window.setter
    def window(self, bint value) -> None:
        self.c.window = value

    @property
    def nmi_window(self) -> bool:
        """Leave `run` with `WINDOW` as soon as the guest can take an NMI."""
        return self.c.nmi_window != 0

    @nmi_window.setter
    def nmi_window(self, bint value) -> None:
        self.c.nmi_window = value

    # the last exit

    @property
    def port(self) -> int:
        """First port of an `IO` exit."""
        return self.c.io_port

    @property
    def size(self) -> int:
        """Bytes of an access, or of one element."""
        return self.c.io_size if self.c.reason == X86_IO else self.c.size

    @property
    def write(self) -> bool:
        """The access writes."""
        return (self.c.io_write if self.c.reason == X86_IO else self.c.write) != 0

    @property
    def string(self) -> bool:
        """The `IO` exit is one of INS or OUTS over RAM: answered by `complete_string`."""
        return self.c.io_string != 0

    @property
    def count(self) -> int:
        """Elements of a string exit."""
        return self.c.count

    @property
    def value(self) -> int:
        """What a write writes."""
        return self.c.value

    @property
    def address(self) -> int:
        """Guest physical address of an `MMIO` exit."""
        return self.c.address

    def string_data(self) -> bytes:
        """What OUTS writes, element after element.

        Raises:
            GuestMemoryError: the guest lost access to it since the exit.
        """
        cdef uint32_t size = self.c.io_size, n
        cdef const uint8_t *p
        if self.c.reason != X86_IO or not self.c.io_string or not self.c.io_write:
            raise LocalProtocolError("the last exit is no OUTS")
        data = PyBytes_FromStringAndSize(NULL, self.c.count * size)
        cdef char *to = PyBytes_AS_STRING(data)
        for n in range(self.c.count):
            p = guest_pointer(self.c.memory, linear(&self.c, self.c.address + n * self.c.element), size, ACCESS_READ)
            if p == NULL:
                raise GuestMemoryError(f"the source of OUTS at {self.c.address:#x} is gone")
            memcpy(to + n * size, p, size)
        return data

    # execution

    cdef int _failed(self) except -1:
        """Raise the error of the instruction at RIP."""
        cdef uint8_t code[16]
        cdef uint32_t reason = self.c.reason, have = fetch(&self.c, self.c.rip, code)
        where = f"at {self.c.rip:#x}"
        if reason == X86_SHUTDOWN:
            name = VECTOR_NAMES.get(self.c.vector, f"vector {self.c.vector}")
            raise EngineError(f"{name} {where}, and the guest has no gate for it: {code[:min(have, 15)].hex(' ')}")
        if reason == X86_FETCH:
            raise EngineError(f"code {where} is outside of executable memory after {have} bytes: {code[:have].hex(' ')}")
        shown = code[:min(have, 15)].hex(" ")
        raise EngineError(f"unknown or unsupported instruction {where}: {shown}")

    def run(self, uint64_t limit=<uint64_t>-1) -> int:
        """Execute until an exit, or for `limit` steps: instructions, or iterations of repeated string instructions.

        Returns:
            `LIMIT`, `IO`, `MMIO`, `RDMSR`, `WRMSR`, `CPUID`, `HYPERCALL`, `HALT` or `WINDOW`.

        Raises:
            EngineError: an instruction that is unknown, that is not in executable RAM, or that faults without a handler.
            LocalProtocolError: the last exit is not completed, or another thread runs this processor.
        """
        cdef uint32_t reason
        if self.c.pending:
            raise LocalProtocolError("the last exit is not completed")
        if self.running:
            raise LocalProtocolError("the processor runs already, in another thread")
        cdef uint64_t turn
        self.running = True
        try:
            while True:
                turn = limit if limit < TURN else TURN
                with nogil:
                    reason = x86_run(&self.c, turn)
                if limit != <uint64_t>-1:
                    limit -= turn
                if reason != X86_LIMIT or limit == 0:
                    break
                PyErr_CheckSignals()    # a guest that never exits must not keep Ctrl-C from its user
        finally:
            self.running = False
        if X86_IO <= reason <= X86_HYPERCALL:
            self.c.pending = 1
        elif reason >= X86_UNKNOWN:
            self._failed()
        return reason

    cdef int _retire(self) except -1:
        self.c.pending = 0
        self.c.rip = self.c.next
        self.c.retired += 1
        self.c.replays = 0
        if self.c.shadow:
            self.c.shadow -= 1
        return 0

    def complete(self, uint64_t value=0) -> None:
        """Finish the exiting instruction: `value` is what it reads, a hypercall's result, the 64 bits of an MSR."""
        cdef x86_state_t *c = &self.c
        if not c.pending:
            raise LocalProtocolError("there is no exit to complete")
        if c.reason == X86_MMIO or (c.reason == X86_IO and c.io_replay):
            c.replay[c.replays] = value & mask_of(c.io_size if c.reason == X86_IO else c.size)
            c.replays += 1
            c.pending = 0
            return
        if c.reason == X86_IO:
            if c.io_string:
                if not c.io_write:
                    raise LocalProtocolError("INS is completed with complete_string()")
                self._string_done()
                return
            if not c.io_write:
                reg_set(c, 0, c.io_size, value)
        elif c.reason == X86_RDMSR:
            c.regs[0] = <uint32_t>value
            c.regs[2] = value >> 32
        elif c.reason == X86_HYPERCALL:
            c.regs[0] = linear(c, value)
            if not c.long_mode:     # EDX:EAX
                c.regs[2] = value >> 32
        elif c.reason == X86_CPUID:
            raise LocalProtocolError("CPUID is completed with complete_cpuid()")
        self._retire()

    def complete_string(self, bytes data not None) -> None:
        """Finish an INS exit with `size` × `count` bytes.

        Raises:
            GuestMemoryError: the guest lost access to the destination since the exit.
        """
        cdef x86_state_t *c = &self.c
        cdef uint32_t n, size = c.io_size
        cdef uint8_t *p
        cdef const char *source
        if not c.pending or c.reason != X86_IO or not c.io_string or c.io_write:
            raise LocalProtocolError("the last exit is no INS")
        if PyBytes_GET_SIZE(data) != <Py_ssize_t>c.count * size:
            raise LocalProtocolError(f"INS wants {c.count * size} bytes, not {len(data)}")
        source = PyBytes_AS_STRING(data)
        if c.element == size:               # forwards and in one piece
            p = guest_pointer(c.memory, c.address, <uint64_t>c.count * size, ACCESS_WRITE)
            if p != NULL:
                memcpy(p, source, <size_t>c.count * size)
                self._string_done()
                return
        for n in range(c.count):
            p = guest_pointer(c.memory, linear(c, c.address + n * c.element), size, ACCESS_WRITE)
            if p == NULL:
                raise GuestMemoryError(f"the destination of INS at {c.address:#x} is gone")
            memcpy(p, source + n * size, size)
        self._string_done()

    cdef int _string_done(self) except -1:
        cdef x86_state_t *c = &self.c
        if string_advance(c, c.string_index, c.string_width, c.element, c.count, c.string_rep) == DONE:
            self._retire()
        else:
            c.pending = 0
        return 0

    def complete_cpuid(self, uint32_t eax, uint32_t ebx, uint32_t ecx, uint32_t edx) -> None:
        """Finish CPUID."""
        if not self.c.pending or self.c.reason != X86_CPUID:
            raise LocalProtocolError("the last exit is no CPUID")
        self.c.regs[0] = eax
        self.c.regs[3] = ebx
        self.c.regs[1] = ecx
        self.c.regs[2] = edx
        self._retire()

    def inject(self, uint32_t vector) -> bool:
        """Enter the guest's handler of an external interrupt; False if it cannot take one now.

        Raises:
            EngineError: the guest has no gate or no stack for it.
        """
        if vector > 255:
            raise LocalProtocolError(f"there is no vector {vector}")
        if not self.interruptible:
            return False
        if deliver(&self.c, vector, False, 0, self.c.rip):
            self._failed()
        self.c.rip = self.c.next
        self.c.replays = 0
        return True

    def inject_nmi(self) -> bool:
        """Enter the guest's NMI handler; False if it cannot take one now: it handles one, or MOV SS was the last
        instruction (SDM 6.7.1).

        Raises:
            EngineError: the guest has no gate or no stack for it.
        """
        if self.c.nmi_masked or self.c.shadow or self.c.pending:
            return False
        if deliver(&self.c, 2, False, 0, self.c.rip):
            self._failed()
        self.c.nmi_masked = 1
        self.c.rip = self.c.next
        self.c.replays = 0
        return True

    def fault(self, uint32_t vector, uint32_t error_code=0) -> None:
        """End the exiting instruction with an exception instead of completing it.

        Raises:
            EngineError: the guest has no gate or no stack for it.
        """
        if not self.c.pending:
            raise LocalProtocolError("there is no exit to end with a fault")
        self.c.pending = 0
        self.c.replays = 0
        if deliver(&self.c, vector, vector in (8, 10, 11, 12, 13, 14, 17, 21), error_code, self.c.rip):
            self._failed()
        self.c.rip = self.c.next
