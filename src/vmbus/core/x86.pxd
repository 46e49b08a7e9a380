"""C interface of the x86 interpreter: one processor's state, and `x86_run`, which executes it without the GIL."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from vmbus.core.memory cimport GuestMemory, guest_memory_t

cdef enum:
    X86_CACHE = 2048            # decoded instructions kept, a power of two
    X86_REPLAYS = 64            # accesses outside RAM that one instruction can make
    X86_STRING_MOST = 1024      # elements of one string exit: what OpenVMM's emulator does in one go

cdef enum x86_exit_t:
    X86_LIMIT = 0
    X86_IO = 1
    X86_MMIO = 2
    X86_RDMSR = 3
    X86_WRMSR = 4
    X86_CPUID = 5
    X86_HYPERCALL = 6
    X86_HALT = 7
    X86_WINDOW = 8              # the guest can take an interrupt now
    # not exits to the hypervisor but the end of the road
    X86_UNKNOWN = 16            # an instruction that this interpreter does not have
    X86_FETCH = 17              # code outside of executable RAM
    X86_SHUTDOWN = 18           # an exception that the guest has no working gate for

cdef struct x86_insn_t:
    uint64_t rip                # tag of the cache line
    uint64_t raw0, raw1         # its bytes, and which of them count
    uint64_t mask0, mask1
    int64_t imm, disp
    uint16_t op                 # opcode; 0x100 + second byte for 0F xx
    uint8_t kind                # what to do
    uint8_t sub                 # which of a group: ALU operation, condition, shift …
    uint8_t form                # where its operands are
    uint8_t size, address_size  # bytes
    uint8_t length
    uint8_t rep, lock           # 0, 0xF2 or 0xF3; 0 or 1
    uint8_t segment
    uint8_t memory              # the r/m operand is in memory
    uint8_t base, index, scale  # registers of its address; 16 is a register that is always 0
    uint8_t reg, rm             # register numbers
    uint8_t reg_at, rm_at       # and their places in the register file, for byte registers AH … BH too

cdef struct x86_state_t:
    uint64_t regs[17]           # RAX RCX RDX RBX RSP RBP RSI RDI R8 … R15, and the zero
    uint64_t rip
    uint64_t next               # address of the following instruction, or where a branch goes
    uint64_t eflags             # without CF, and without PF AF ZF SF OF while `lazy`
    uint64_t carry              # CF
    uint64_t lazy_result        # the result that PF, ZF and SF follow from …
    uint64_t lazy_carries       # … the carry out of each of its bits, for AF and OF …
    uint32_t lazy               # … and its width in bits; 0: the flags are in eflags
    uint32_t attention          # something to look at between two instructions
    uint32_t shadow             # instructions that STI or MOV SS still shields from interrupts
    uint32_t window             # leave when an interrupt can be taken
    uint32_t nmi_window         # leave when an NMI can be taken
    uint32_t nmi_masked         # an NMI is being handled: no other one before IRET
    uint64_t segment_base[6]    # ES CS SS DS FS GS
    uint16_t selector[6]
    uint64_t idt_base
    uint32_t idt_limit
    uint32_t long_mode
    const guest_memory_t *memory
    x86_insn_t *cache
    uint64_t retired
    uint64_t budget             # steps that this run may still take
    uint64_t tsc_offset
    uint32_t string_most
    # the last exit
    uint32_t reason
    uint32_t pending            # it waits for an answer
    uint32_t io_port, io_size, io_write, io_string, count
    uint64_t address, value
    uint32_t size, write
    uint32_t vector
    uint64_t element            # bytes from one element of a string exit to the next, modulo 2**64
    uint32_t io_replay          # the answer is one for `replay`, the instruction goes on from its start
    uint32_t string_rep, string_width, string_index     # REP, bytes of the address registers, RSI (6) or RDI (7)
    uint32_t failed             # bytes of the instruction that could not be decoded
    # accesses outside RAM that the current instruction has made already
    uint32_t replays, replayed
    uint64_t replay[X86_REPLAYS]

cdef uint32_t x86_run(x86_state_t *c, uint64_t limit) noexcept nogil

cdef class Cpu:
    cdef x86_state_t c
    cdef readonly GuestMemory memory
    cdef bint running
    cdef int _failed(self) except -1
    cdef int _retire(self) except -1
    cdef int _string_done(self) except -1
