"""An x86-64 processor executed by the Unicorn library, with every exit that a hypervisor needs.

Unicorn is QEMU's translator without its devices. It raises no interrupts and delivers no exceptions by itself, and
it has hooks for a few instructions only. Two things make a whole operating system run on it unchanged:

* Its translator implements AMD's SVM. With the "in a guest" bit set in a saved state and a control block in memory,
  RDMSR, WRMSR, HLT and every exception become intercepts, and Unicorn hands an intercept to its interrupt hook. No
  world switch ever happens; the hook edits the state and execution goes on.
* A hook on every translated block counts executed code bytes, which is the processor's time (one tick each), and
  is where interrupts are delivered: through the guest's own IDT, by code in this file.

The library comes from the ``unicorn`` package and is opened at run time; nothing of it is needed to build this
module. `src/vmbus/core/unicorn_x86.h` holds the layout of its state; `docs/engine.md` explains how it all works. The code is in the files of `ext/unicorn/`, by subject.
"""

cimport cython
from cpython.ref cimport PyObject
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from vmbus.core.memory cimport CODE_TRANSLATED, CODE_WRITTEN, GuestMemory
from vmbus.core.unicorn_x86 cimport *

from vmbus.errors import EngineError

cdef extern from "<dlfcn.h>" nogil:
    enum:
        RTLD_NOW
        RTLD_LOCAL
    void *dlopen(const char *path, int flags)
    void *dlsym(void *handle, const char *name)
    char *dlerror()

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef extern from "<time.h>" nogil:
    enum:
        CLOCK_MONOTONIC_COARSE
    ctypedef long time_t
    struct timespec:
        time_t tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec *now)

cdef extern from "<sys/mman.h>" nogil:
    int mincore(void *address, size_t length, unsigned char *vector)

cdef extern from *:
    """
    /* The processor (cpu_t) that runs on this thread: the library's TLB asks without saying for whom. */
    static _Thread_local void *vmbus_running;
    """
    void *vmbus_running

VERSION = (2, 1)
"""Major and minor version of the library whose state layout is known; the patch level shows in the calibration."""

cdef enum:
    PAGE = 4096
    PAGE_PRESENT = 1
    PAGE_WRITABLE = 2
    PAGE_USER = 4
    PAGE_ACCESSED = 0x20
    PAGE_DIRTY = 0x40
    PAGE_LARGE = 0x80
    RDTSC_TICKS = 20            # what reading the time costs, so that a loop that waits for it ends
    EXCEPTION_TICKS = 20        # what an exception costs, so that a loop of nothing else ends
    LOOK_TICKS = 4096           # how often the host's clock is looked at: some 20 us, or 0.1 s of code that changes itself
    LOOKS_EXITS = 16            # the same in exits, each of which may take the host long
    HOST_DUE_NS = 20_000_000    # how often such a look calls Python
    MOST_TRANSLATIONS = 1 << 20     # of which the library keeps notes, about 100 bytes each
    MOST_PROCESSORS = 16
    CONTROL_SIZE = 0x10000

cdef enum:                      # bits of RFLAGS
    FLAG_TRAP = 1 << 8
    FLAG_INTERRUPT = 1 << 9
    FLAG_DIRECTION = 1 << 10
    FLAG_NESTED = 1 << 14
    FLAG_RESUME = 1 << 16
    FLAG_VM = 1 << 17
    FLAGS_ARITHMETIC = 0x8d5    # OF SF ZF AF PF CF: kept lazily, in cc_src and its like

cdef enum:                      # bits of CR0 (as a shift), CR4 and EFER that decide how a page is found
    PAGING_SHIFT = 31
    WRITE_PROTECT_SHIFT = 16
    CR4_LA57 = 1 << 12
    CR4_SMEP = 1 << 20
    CR4_PKE = 1 << 22
    EFER_SCE = 1
    EFER_NXE = 1 << 11

cdef enum:                      # exceptions
    VECTOR_DEBUG = 1
    VECTOR_BREAKPOINT = 3
    VECTOR_INVALID_OPCODE = 6
    VECTOR_DOUBLE_FAULT = 8
    VECTOR_INVALID_TSS = 10
    VECTOR_GENERAL_PROTECTION = 13
    VECTOR_PAGE_FAULT = 14
    VECTOR_ALIGNMENT = 17

cdef enum:                      # the second word of a descriptor, for the segments that events load
    CODE64_FLAGS = 0x00AF9B00
    DATA_FLAGS = 0x00CF9300
    STACK_FLAGS = 0x00C09300
    REAL_CODE_FLAGS = 0x00009B00
    REAL_DATA_FLAGS = 0x00009300
    REAL_LDT_FLAGS = 0x00008200
    REAL_TSS_FLAGS = 0x00008B00

cdef enum:                      # what a processor finds when it starts
    CR0_EXTENSION_TYPE = 1 << 4
    STARTUP_RDX = 0xF60         # family 15, model 6

cdef uint64_t CONTROL_GPA = <uint64_t>1 << 41
"""Where the library finds the control block: above the 40 address bits that guests can put into a page table."""
cdef uint64_t MASK32 = 0xFFFF_FFFF
cdef uint64_t MMIO_END = <uint64_t>1 << 40
cdef uint64_t FRAME_MASK = 0x000F_FFFF_FFFF_F000
cdef uint64_t FRAME_RESERVED = 0x000F_FF00_0000_0000
"""Address bits of a page table entry that the library's processor, with its 40 address bits, has reserved."""
cdef uint64_t NO_EXECUTE = <uint64_t>1 << 63

STOP_REQUESTED = 0
STOP_TRIPLE_FAULT = 1

cdef struct cpu_t:
    const unicorn_t *lib
    void *uc
    void *cpu                   # the live processor …
    x86_head_t *live            # … its state, and where it and the library keep functions that are ours meanwhile
    size_t *tlb_fill_slot
    size_t *memory_mapping_slot
    void *ram                   # what the library calls guest memory
    void *context
    x86_head_t *head            # these three point into the saved context
    x86_syscall_t *syscall
    x86_intercept_t *icpt
    uint8_t *control            # the control block, MSR and I/O bitmaps
    uint8_t *memory
    uint64_t memory_size
    uint64_t ticks
    uint64_t next_event         # in ticks: the next moment at which anything is to be done, the smaller one of …
    uint64_t wanted_event       # … when Python wants to be called
    uint64_t next_look          # … and when the host's clock is looked at
    int64_t host_due            # host time, in ns, from which on such a look calls Python
    uint64_t tsc_offset
    uint64_t blocks
    bint interrupt              # an interrupt waits that the guest can take as soon as it enables them, or an NMI
    bint nmi                    # an NMI waits
    bint stopping
    bint renewing               # the library is to be left for a moment, see `Cpu._renew`
    bint given_up               # the library cannot go on
    void (*attend)(cpu_t *m, uint64_t address, uint32_t size) noexcept nogil
    uint64_t block_address      # of the block that was counted last
    uint64_t block_size
    uint64_t random             # state of the generator behind RDRAND
    uint64_t exceptions
    uint64_t interrupts
    uint64_t syscalls
    uint64_t time_reads
    uint64_t pages_forgotten
    uint64_t translations
    uint64_t renewed            # `translations` when the library's notes about them were thrown away
    size_t block_hook
    int stop_reason
    uint8_t *code               # CODE_… per guest page, and one byte more: some page is CODE_WRITTEN
    uint32_t *stored            # per guest page: the flush since which a TLB entry may let stores through
    uint32_t flush
    int processor               # whose state is live
    int next_processor          # whose state becomes live at the next opportunity
    int processors
    void *states[MOST_PROCESSORS]   # saved ones; that of the live processor is stale
    uint64_t switches
    PyObject *owner

cdef unicorn_t library
cdef str library_path = ""

include "unicorn/giving_up.pxi"
include "unicorn/library.pxi"
include "unicorn/events.pxi"
include "unicorn/hooks.pxi"
include "unicorn/code.pxi"
include "unicorn/refused.pxi"
include "unicorn/tlb.pxi"
include "unicorn/processors.pxi"
include "unicorn/exits.pxi"


@cython.no_gc_clear
cdef class Cpu:
    """One or more processors over a partition's memory, of which one at a time executes.

    Their exits call the methods of `processors` (those of `vmbus.engine.Processor`, and `pop_interrupt`) from inside
    `run`. An exception of such a call ends `run` and is raised there, except `fault`, which the guest gets.

    Args:
        memory: guest physical memory, from address 0.
        processors: answer the exits, each its own. The first one runs, until `switch`.
        fault: exception class with a `vector`: what the guest's own instruction raises.
        before: called with the time in ticks before an exit is answered.
        after: called without argument when it was answered.
        after_port: the same for port I/O, the most frequent exits.
        on_event: called with the time in ticks once that has reached `next_event`.
        on_look: called with the time in ticks every 20 ms of the host's time or so, whatever the guest does.
        on_halt: called with the time and RFLAGS.IF when the guest executes HLT; returns when it may go on.
        translation_cache: bytes for translated code.

    Raises:
        EngineError: `load` was not called, or the library refuses.

    Attributes:
        next_event: time in ticks at which `on_event` is called next.
        interrupt: an interrupt waits for the running processor; `processor.pop_interrupt` is called once the guest can take it.
        nmi: an NMI waits; `processor.take_nmi` is called once the guest handles no other one.
    """

    cdef cpu_t m
    cdef GuestMemory memory
    cdef object fault, before, after, after_port, on_event, on_look, on_halt
    cdef object io_read, io_write, mmio_read, mmio_write, rdmsr, wrmsr, cpuid_answer, hypercall, pop_interrupt, take_nmi, cpuid
    cdef object error
    cdef bint running, holds_memory
    cdef tuple processors

    def __cinit__(self, GuestMemory memory, processors, *, fault, before, after, after_port, on_event, on_look, on_halt,
                  uint32_t translation_cache=256 << 20):
        cdef cpu_t *m = &self.m
        if not library_path:
            raise EngineError("the unicorn library is not loaded")
        self.memory = memory
        self.fault, self.before, self.after, self.after_port = fault, before, after, after_port
        self.on_event, self.on_look, self.on_halt = on_event, on_look, on_halt
        self.processors = tuple(processors)
        if not 0 < len(self.processors) <= MOST_PROCESSORS:
            raise EngineError(f"the engine runs 1 to {MOST_PROCESSORS} processors, not {len(self.processors)}")
        m.processors = len(self.processors)
        self._bind(self.processors[0])
        m.owner = <PyObject *>self
        m.memory = memory.c.base
        m.memory_size = memory.c.size
        m.attend = _attend
        _open(m, translation_cache)
        if memory.c.code != NULL:
            raise EngineError("another engine runs code of this partition")
        m.code = <uint8_t *>calloc((m.memory_size >> 12) + 1, 1)
        m.stored = <uint32_t *>calloc(m.memory_size >> 12, sizeof(uint32_t))
        m.flush = 1
        if m.code == NULL or m.stored == NULL:
            raise MemoryError()
        memory.c.code = m.code
        _check(m.lib, m.lib.mem_map_ptr(m.uc, 0, m.memory_size, UC_PROT_ALL, m.memory), "mapping guest memory")
        memory.exports += 1                         # the library holds the address: no close() under it
        self.holds_memory = True
        _check(m.lib, m.lib.mmio_map(m.uc, m.memory_size, MMIO_END - m.memory_size, _on_mmio_read, m, _on_mmio_write, m),
               "mapping device memory")
        self._hook(UC_HOOK_INTR, <void *>_on_interrupt)
        self._hook(UC_HOOK_INSN_INVALID, <void *>_on_interrupt_6)
        m.block_hook = self._hook(UC_HOOK_BLOCK, <void *>_on_block)
        self._hook(UC_HOOK_EDGE_GENERATED, <void *>_on_translation)
        self._hook(UC_HOOK_INSN, <void *>_on_in, UC_X86_INS_IN)
        self._hook(UC_HOOK_INSN, <void *>_on_out, UC_X86_INS_OUT)
        self._hook(UC_HOOK_INSN, <void *>_on_rdtsc, UC_X86_INS_RDTSC)
        self._hook(UC_HOOK_INSN, <void *>_on_cpuid, UC_X86_INS_CPUID)
        self._hook(UC_HOOK_INSN, <void *>_on_syscall, UC_X86_INS_SYSCALL)
        _serve_tlb(m)
        _watch_translation(m)
        # Under a memory hook a TLB entry never comes to let stores through by itself (see code.pxi). This one never fires: all
        # memory may be fetched from.
        self._hook(UC_HOOK_MEM_FETCH_PROT, <void *>_never)

    def __dealloc__(self):
        self._release()
        free(self.m.code)
        free(self.m.stored)

    cdef void _release(self) noexcept:
        _close(&self.m)
        if self.m.code != NULL and self.memory.c.code == self.m.code:
            self.memory.c.code = NULL
        if self.holds_memory:
            self.holds_memory = False
            self.memory.exports -= 1

    def close(self) -> None:
        """Give back the library's memory and let go of the guest's; the counts stay.

        Raises:
            EngineError: it runs.
        """
        if self.running:
            raise EngineError("the processor runs")
        self._release()

    cdef size_t _hook(self, int kind, void *callback, int instruction=0) except 0:
        cdef size_t hook
        _check(self.m.lib, self.m.lib.hook_add(self.m.uc, &hook, kind, callback, &self.m, <uint64_t>1, <uint64_t>0,
                                               instruction), "adding a hook")
        return hook

    cdef int _renew(self) except -1:
        """Throw away all translations, and what the library keeps of each even when it has dropped it: where a hook was put in."""
        cdef cpu_t *m = &self.m
        _check(m.lib, m.lib.ctl(m.uc, UC_CTL_TB_FLUSH), "dropping translations")
        _check(m.lib, m.lib.hook_del(m.uc, m.block_hook), "removing a hook")
        m.block_hook = self._hook(UC_HOOK_BLOCK, <void *>_on_block)
        m.renewed = m.translations
        m.renewing = False
        return 0

    cdef int _bind(self, processor) except -1:
        self.io_read, self.io_write = processor.io_read, processor.io_write
        self.mmio_read, self.mmio_write = processor.mmio_read, processor.mmio_write
        self.rdmsr, self.wrmsr, self.cpuid = processor.rdmsr, processor.wrmsr, processor.cpuid
        self.hypercall, self.pop_interrupt = processor.hypercall, processor.pop_interrupt
        self.take_nmi = processor.take_nmi
        return 0

    cdef int _fail(self, error) except -1:
        """Keep the first exception of an exit for `run` to raise, and leave."""
        if self.error is None:
            self.error = error
        _halt_with(&self.m, 0)
        return 0

    def enter_long_mode(self, uint64_t rip, uint64_t rsi, uint64_t rsp, uint64_t cr3, uint64_t gdt, uint16_t code,
                        uint16_t data) -> None:
        """Set the state in which a 64-bit kernel is entered: paging on, flat segments, interrupts off."""
        cdef cpu_t *m = &self.m
        cdef uint64_t value = 2
        if m.uc == NULL:
            raise EngineError("the processor is closed")
        _long_mode(m, cr3, gdt, code, data)
        m.lib.reg_write(m.uc, UC_X86_REG_RIP, &rip)
        m.lib.reg_write(m.uc, UC_X86_REG_RSI, &rsi)
        m.lib.reg_write(m.uc, UC_X86_REG_RSP, &rsp)
        m.lib.reg_write(m.uc, UC_X86_REG_EFLAGS, &value)
        _intercepts(m)
        _make_states(m)

    def switch(self, int index) -> None:
        """Let processor `index` execute from the next block on; for calls from `on_event` and `on_halt`.

        Raises:
            EngineError: there is no such processor.
        """
        if not 0 <= index < self.m.processors:
            raise EngineError(f"there is no processor {index}")
        self._bind(self.processors[index])
        self.m.next_processor = index

    def start(self, int index, int page) -> None:
        """Put a processor other than the executing one into the state that a STARTUP IPI leaves: real mode, at `page`.

        Raises:
            EngineError: there is no such processor, or it executes.
        """
        cdef cpu_t *m = &self.m
        if not 0 <= index < m.processors or index == m.processor or index == m.next_processor:
            raise EngineError(f"processor {index} cannot be started")
        if m.states[index] == NULL:
            raise EngineError("the boot processor has not been started")
        _start(m, index, page & 0xFF)

    def run(self) -> int:
        """Execute until `stop`, a triple fault or an exception of an exit.

        Returns:
            One of the `STOP_…` numbers.

        Raises:
            EngineError: the library cannot go on.
            Exception: whatever an exit raised.
        """
        cdef cpu_t *m = &self.m
        cdef uint64_t rip = 0
        cdef int code
        if self.running or m.uc == NULL:
            raise EngineError("the processor runs already" if self.running else "the processor is closed")
        m.stopping = False
        m.stop_reason = 0
        m.next_event = m.wanted_event = 0
        m.next_look = m.ticks + LOOK_TICKS
        m.host_due = 0
        self.error = None
        self.running = True
        try:
            while True:
                if m.given_up:
                    raise EngineError(f"the unicorn library gave up on this guest's code ({self.describe()})")
                if m.renewing:
                    self._renew()
                m.lib.reg_read(m.uc, UC_X86_REG_RIP, &rip)
                if not m.blocks:
                    _note_code(m, rip, rip + PAGE)  # the library does not tell of the first translation
                with nogil:
                    code = _emulate(m, rip)
                if code or m.stopping and not m.given_up or not (m.renewing or m.given_up):
                    break
        finally:
            self.running = False
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        if code or not m.stopping:
            what = m.lib.strerror(code).decode() if code else "without a reason"
            raise EngineError(f"the unicorn library stopped: {what} ({self.describe()})")
        return m.stop_reason

    def stop(self) -> None:
        """Make `run` return; for calls from inside an exit."""
        if self.running:
            _halt_with(&self.m, 0)

    def advance_to(self, uint64_t ticks) -> None:
        """Let time pass while the processor is halted; going back is ignored."""
        if ticks > self.m.ticks:
            self.m.ticks = ticks

    def describe(self) -> str:
        """The processor's registers, for error messages."""
        cdef cpu_t *m = &self.m
        if m.uc == NULL:
            return "closed"
        cdef uint64_t flags = _flags(m)
        m.lib.context_save(m.uc, m.context)
        names = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
        registers = " ".join(f"{name}={m.head.regs[n]:x}" for n, name in enumerate(names))
        return (f"rip={m.head.rip:x} {registers} flags={flags:x} cr0={m.head.cr[0]:x} cr2={m.head.cr[2]:x} "
                f"cr3={m.head.cr[3]:x} cr4={m.head.cr[4]:x} cpl={m.head.hflags & HF_CPL_MASK}")

    @property
    def rip(self) -> int:
        """The instruction pointer."""
        cdef uint64_t rip = 0
        if self.m.uc != NULL:
            self.m.lib.reg_read(self.m.uc, UC_X86_REG_RIP, &rip)
        return rip

    @property
    def ticks(self) -> int:
        """Time: bytes of code executed, plus what reading the time costs and what passed while halted."""
        return self.m.ticks

    @property
    def next_event(self) -> int:
        return self.m.wanted_event

    @next_event.setter
    def next_event(self, uint64_t ticks):
        self.m.wanted_event = ticks
        _arm(&self.m)

    @property
    def interrupt(self) -> bool:
        return self.m.interrupt

    @interrupt.setter
    def interrupt(self, bint value):
        self.m.interrupt = value or self.m.nmi

    @property
    def nmi(self) -> bool:
        return self.m.nmi

    @nmi.setter
    def nmi(self, bint value):
        self.m.nmi = value
        self.m.interrupt = self.m.interrupt or value

    @property
    def tsc_offset(self) -> int:
        """What RDTSC adds to the ticks, modulo 2**64."""
        return self.m.tsc_offset

    @tsc_offset.setter
    def tsc_offset(self, value):
        self.m.tsc_offset = value & 0xFFFF_FFFF_FFFF_FFFF

    @property
    def counts(self) -> dict:
        """What happened so far: blocks, exceptions, interrupts, syscalls, and pages with translated code."""
        cdef uint64_t page, pages = 0
        for page in range(self.m.memory_size >> 12):
            pages += self.m.code[page] == CODE_TRANSLATED
        return {"blocks": self.m.blocks, "exceptions": self.m.exceptions, "interrupts": self.m.interrupts,
                "syscalls": self.m.syscalls, "time_reads": self.m.time_reads,
                "code_pages": pages, "pages_forgotten": self.m.pages_forgotten, "switches": self.m.switches}
