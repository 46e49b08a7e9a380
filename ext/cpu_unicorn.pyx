"""An x86-64 processor executed by the Unicorn library, with every exit that a hypervisor needs.

Unicorn is QEMU's translator without its devices. It raises no interrupts and delivers no exceptions by itself, and
it has hooks for a few instructions only. Two things make a whole operating system run on it unchanged:

* Its translator implements AMD's SVM. With the "in a guest" bit set in a saved state and a control block in memory,
  RDMSR, WRMSR, HLT and every exception become intercepts, and Unicorn hands an intercept to its interrupt hook. No
  world switch ever happens; the hook edits the state and execution goes on.
* A hook on every translated block counts executed code bytes, which is the processor's time (one tick each), and
  is where interrupts are delivered: through the guest's own IDT, by code in this file.

The library comes from the ``unicorn`` package and is opened at run time; nothing of it is needed to build this
module. `src/vmbus/core/unicorn_x86.h` holds the layout of its state; `docs/engine.md` explains how it all works.
"""

cimport cython
from cpython.ref cimport PyObject
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

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

VERSION = (2, 1)
"""Major and minor version of the library whose state layout is known; the patch level shows in the calibration."""

cdef enum:
    PAGE = 4096
    PAGE_PRESENT = 1
    PAGE_WRITABLE = 2
    PAGE_LARGE = 0x80
    RDTSC_TICKS = 20            # what reading the time costs, so that a loop that waits for it ends
    MOST_CODE_RANGES = 256
    CODE_RANGE_GAP = 8          # pages: closer ranges of translated code become one
    CONTROL_SIZE = 0x10000

cdef enum:                      # bits of RFLAGS
    FLAG_TRAP = 1 << 8
    FLAG_INTERRUPT = 1 << 9
    FLAG_DIRECTION = 1 << 10
    FLAG_NESTED = 1 << 14
    FLAG_RESUME = 1 << 16
    FLAG_VM = 1 << 17
    FLAGS_ARITHMETIC = 0x8d5    # OF SF ZF AF PF CF: kept lazily, in cc_src and its like

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

cdef uint64_t CONTROL_GPA = <uint64_t>1 << 41
"""Where the library finds the control block: above the 40 address bits that guests can put into a page table."""
cdef uint64_t MASK32 = 0xFFFF_FFFF
cdef uint64_t MMIO_END = <uint64_t>1 << 40
cdef uint64_t FRAME_MASK = 0x000F_FFFF_FFFF_F000

STOP_REQUESTED = 0
STOP_TRIPLE_FAULT = 1
STOP_SHUTDOWN = 2

cdef struct code_range_t:
    # Guest physical pages that hold translated code; `hook` keeps the library from treating them as plain data.
    uint64_t begin
    uint64_t end
    uint64_t *bounds            # begin and end of the hook itself, which grow with the range

cdef struct cpu_t:
    const unicorn_t *lib
    void *uc
    void *context
    x86_head_t *head            # these three point into the saved context
    x86_syscall_t *syscall
    x86_intercept_t *icpt
    uint8_t *control            # the control block, MSR and I/O bitmaps
    uint8_t *memory
    uint64_t memory_size
    uint64_t ticks
    uint64_t next_event         # in ticks: when Python wants to be called
    uint64_t tsc_offset
    uint64_t blocks
    uint64_t block_address      # of the block that was counted last
    uint64_t block_size
    uint64_t exceptions
    uint64_t interrupts
    uint64_t syscalls
    uint64_t time_reads
    uint64_t tlb_flushes
    uint64_t pages_forgotten
    bint interrupt              # an interrupt waits that the guest can take as soon as it enables them
    bint stopping
    int stop_reason
    uint8_t *code               # CODE_… per guest page, and one byte more: some page is CODE_WRITTEN
    code_range_t ranges[MOST_CODE_RANGES]
    int range_count
    PyObject *owner

cdef unicorn_t library
cdef str library_path = ""


# The library


cdef int _resolve(void *handle, const char *name, void **target) except -1:
    target[0] = dlsym(handle, name)
    if target[0] == NULL:
        raise EngineError(f"the unicorn library lacks {name.decode()}")
    return 0


def load(str path) -> str:
    """Open the library at `path` and make sure that it is laid out as `unicorn_x86.h` says; once a process.

    Returns:
        The library's path (of the first call).

    Raises:
        EngineError: it cannot be opened, is another version, or keeps its state differently.
    """
    global library_path
    cdef void *handle
    cdef unsigned major = 0, minor = 0
    if library_path:
        return library_path
    handle = dlopen(path.encode(), RTLD_NOW | RTLD_LOCAL)
    if handle == NULL:
        raise EngineError(f"cannot open the unicorn library: {dlerror().decode()}")
    _resolve(handle, b"uc_version", <void **>&library.version)
    _resolve(handle, b"uc_open", <void **>&library.open)
    _resolve(handle, b"uc_close", <void **>&library.close)
    _resolve(handle, b"uc_strerror", <void **>&library.strerror)
    _resolve(handle, b"uc_reg_read", <void **>&library.reg_read)
    _resolve(handle, b"uc_reg_write", <void **>&library.reg_write)
    _resolve(handle, b"uc_mem_map_ptr", <void **>&library.mem_map_ptr)
    _resolve(handle, b"uc_mmio_map", <void **>&library.mmio_map)
    _resolve(handle, b"uc_hook_add", <void **>&library.hook_add)
    _resolve(handle, b"uc_emu_start", <void **>&library.emu_start)
    _resolve(handle, b"uc_emu_stop", <void **>&library.emu_stop)
    _resolve(handle, b"uc_context_size", <void **>&library.context_size)
    _resolve(handle, b"uc_context_alloc", <void **>&library.context_alloc)
    _resolve(handle, b"uc_context_save", <void **>&library.context_save)
    _resolve(handle, b"uc_context_restore", <void **>&library.context_restore)
    _resolve(handle, b"uc_context_free", <void **>&library.context_free)
    _resolve(handle, b"uc_ctl", <void **>&library.ctl)
    library.version(&major, &minor)
    if (major, minor) != VERSION:
        raise EngineError(f"unicorn {major}.{minor} is not supported: install unicorn==2.1.4 (pip install 'vmbus[guest]')")
    _self_test()
    library_path = path
    return path


cdef object _mismatch(str what):
    return EngineError(f"this build of the unicorn library keeps its processor state differently ({what}): "
                       "install unicorn==2.1.4 from PyPI")


cdef int _check(const unicorn_t *lib, int code, str what) except -1:
    if code:
        raise EngineError(f"{what}: {lib.strerror(code).decode()}")
    return 0


cdef int _open(cpu_t *m) except -1:
    """Open an engine and find the parts of its saved state; every place is checked with a value written there."""
    cdef uint8_t *state
    cdef uint64_t value
    cdef uc_msr_t msr
    cdef uc_mmr_t table
    cdef int index, code
    cdef uint64_t mark = 0x1122_3344_5566_7700
    m.lib = &library
    _check(m.lib, m.lib.open(UC_ARCH_X86, UC_MODE_64, &m.uc), "opening an engine")
    if m.lib.context_size(m.uc) != STATE_OFFSET + STATE_SIZE:
        raise _mismatch(f"{m.lib.context_size(m.uc)} bytes instead of {STATE_OFFSET + STATE_SIZE}")
    _check(m.lib, m.lib.context_alloc(m.uc, &m.context), "allocating a saved state")
    state = <uint8_t *>m.context + STATE_OFFSET
    m.head = <x86_head_t *>state
    m.syscall = <x86_syscall_t *>(state + SYSCALL_OFFSET)
    m.icpt = <x86_intercept_t *>(state + INTERCEPT_OFFSET)
    marks = [(UC_X86_REG_RAX, 1), (UC_X86_REG_RCX, 2), (UC_X86_REG_RDX, 3), (UC_X86_REG_RBX, 4), (UC_X86_REG_RSP, 5),
             (UC_X86_REG_R15, 6), (UC_X86_REG_RIP, 7), (UC_X86_REG_DR0, 8), (UC_X86_REG_FS_BASE, 9),
             (UC_X86_REG_GS_BASE, 10)]
    for code, index in marks:
        value = mark | <uint64_t>index
        m.lib.reg_write(m.uc, code, &value)
    memset(&table, 0, sizeof(table))
    table.base = mark | 11
    m.lib.reg_write(m.uc, UC_X86_REG_GDTR, &table)
    table.base = mark | 12
    m.lib.reg_write(m.uc, UC_X86_REG_IDTR, &table)
    for index in range(4):
        msr.rid = 0xC000_0081 + index
        msr.value = mark | <uint64_t>(13 + index)
        m.lib.reg_write(m.uc, UC_X86_REG_MSR, &msr)
    value = FLAG_INTERRUPT | FLAG_DIRECTION | FLAGS_ARITHMETIC | 2
    m.lib.reg_write(m.uc, UC_X86_REG_EFLAGS, &value)
    m.lib.context_save(m.uc, m.context)
    found = {
        "RAX": m.head.regs[RAX], "RCX": m.head.regs[RCX], "RDX": m.head.regs[RDX], "RBX": m.head.regs[RBX],
        "RSP": m.head.regs[RSP], "R15": m.head.regs[15], "RIP": m.head.rip, "DR0": m.icpt.dr[0],
        "FS base": m.head.segs[FS].base, "GS base": m.head.segs[GS].base, "GDTR": m.head.gdt.base,
        "IDTR": m.head.idt.base, "STAR": m.syscall.star, "LSTAR": m.syscall.lstar, "CSTAR": m.syscall.cstar,
        "FMASK": m.syscall.fmask,
    }
    for index, name in enumerate(found):
        if found[name] != mark | <uint64_t>(index + 1):
            raise _mismatch(f"{name} is elsewhere")
    if not m.head.eflags & FLAG_INTERRUPT or m.head.df != -1 or m.head.cc_src & FLAGS_ARITHMETIC != FLAGS_ARITHMETIC:
        raise _mismatch("RFLAGS")
    if m.head.cc_op != CC_OP_EFLAGS or not m.head.hflags & HF_CS64:
        raise _mismatch("translation flags")
    # Back to what a reset leaves.
    value = 0
    for code, index in marks:
        m.lib.reg_write(m.uc, code, &value)
    for index in range(4):
        msr.rid = 0xC000_0081 + index
        msr.value = 0
        m.lib.reg_write(m.uc, UC_X86_REG_MSR, &msr)
    value = 2
    m.lib.reg_write(m.uc, UC_X86_REG_EFLAGS, &value)
    return 0


cdef int _intercepts(cpu_t *m) except -1:
    """Turn the intercepts on: from here on the library takes itself for a processor in an SVM guest."""
    cdef uint32_t msr, bit
    m.control = <uint8_t *>aligned_alloc(PAGE, CONTROL_SIZE)
    if m.control == NULL:
        raise MemoryError()
    memset(m.control, 0, CONTROL_SIZE)
    _check(m.lib, m.lib.mem_map_ptr(m.uc, CONTROL_GPA, CONTROL_SIZE, UC_PROT_ALL, m.control), "mapping the control block")
    (<uint64_t *>(m.control + VMCB_MSRPM))[0] = CONTROL_GPA + 0x2000
    (<uint64_t *>(m.control + VMCB_IOPM))[0] = CONTROL_GPA + 0x4000  # all zeros: port hooks see the accesses
    memset(m.control + 0x2000, 0xFF, 0x1800)
    # MSRs that are nothing but state of the instructions that use them stay with the library: SYSENTER,
    # EFER, STAR, LSTAR, CSTAR, FMASK, the FS, GS and kernel GS bases, and TSC_AUX.
    for msr in (0x174, 0x175, 0x176, 0xC0000080, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000100, 0xC0000101,
                0xC0000102, 0xC0000103):
        bit = msr * 2 if msr < 0x2000 else 0x4000 + (msr - 0xC0000000) * 2
        m.control[0x2000 + bit // 8] &= ~(3 << bit % 8)
    m.lib.context_save(m.uc, m.context)
    m.head.hflags |= HF_GUEST
    m.icpt.vmcb = CONTROL_GPA
    m.icpt.old_exception = -1
    m.icpt.intercept = (<uint64_t>1 << (SVM_EXIT_MSR - SVM_EXIT_FIRST) | <uint64_t>1 << (SVM_EXIT_HLT - SVM_EXIT_FIRST)
                        | <uint64_t>1 << (SVM_EXIT_VMMCALL - SVM_EXIT_FIRST)
                        | <uint64_t>1 << (SVM_EXIT_SHUTDOWN - SVM_EXIT_FIRST))
    m.icpt.intercept_exceptions = <uint32_t>MASK32
    m.lib.context_restore(m.uc, m.context)
    return 0


cdef void _long_mode(cpu_t *m, uint64_t cr3, uint64_t gdt, uint16_t code, uint16_t data) noexcept:
    """64-bit mode at CPL 0 with flat segments, paging on."""
    cdef uint64_t value = cr3
    cdef int index
    cdef uc_mmr_t table
    memset(&table, 0, sizeof(table))
    m.lib.reg_write(m.uc, UC_X86_REG_CR3, &value)
    m.lib.reg_read(m.uc, UC_X86_REG_CR4, &value)
    value |= 1 << 5                                 # PAE
    m.lib.reg_write(m.uc, UC_X86_REG_CR4, &value)
    value = <uint64_t>1 << 31 | 1 << 4 | 1          # PG, ET, PE
    value &= 0xFFFF_FFFF
    m.lib.reg_write(m.uc, UC_X86_REG_CR0, &value)
    table.base = gdt
    table.limit = 0x3F
    m.lib.reg_write(m.uc, UC_X86_REG_GDTR, &table)
    table.base = 0
    table.limit = 0
    m.lib.reg_write(m.uc, UC_X86_REG_IDTR, &table)
    m.lib.context_save(m.uc, m.context)
    for index in range(SEGMENTS):
        m.head.segs[index].selector = code if index == CS else data
        m.head.segs[index].base = 0
        m.head.segs[index].limit = <uint32_t>MASK32
        m.head.segs[index].flags = CODE64_FLAGS if index == CS else DATA_FLAGS
    m.lib.context_restore(m.uc, m.context)


cdef void _close(cpu_t *m) noexcept:
    if m.context != NULL:
        m.lib.context_free(m.context)
        m.context = NULL
    if m.uc != NULL:
        m.lib.close(m.uc)
        m.uc = NULL
    free(m.control)
    m.control = NULL


cdef struct self_test_t:
    cpu_t *cpu
    uint32_t seen[8]
    int32_t errors[8]
    uint64_t address
    int count


cdef void _self_test_hook(void *uc, uint32_t number, void *user) noexcept nogil:
    cdef self_test_t *test = <self_test_t *>user
    cdef cpu_t *m = test.cpu
    m.lib.context_save(uc, m.context)
    if test.count < 8:
        test.seen[test.count] = number
        test.errors[test.count] = m.icpt.error_code
    if number == INTERCEPT + SVM_EXIT_EXCEPTION + VECTOR_PAGE_FAULT:
        test.address = (<uint64_t *>(m.control + VMCB_EXIT_INFO_2))[0]
    test.count += 1
    m.icpt.old_exception = -1
    m.icpt.exception_is_int = 0
    if number == INTERCEPT + SVM_EXIT_HLT or test.count >= 8:
        m.lib.emu_stop(uc)
        return
    if number >= INTERCEPT:
        m.head.rip += 2
    m.lib.context_restore(uc, m.context)


cdef bytes SELF_TEST_CODE = bytes.fromhex(
    "0f32"      # rdmsr
    "0f30"      # wrmsr
    "0f0b"      # ud2
    "cd80"      # int 0x80
    "8b03"      # mov eax, [rbx]: not mapped
    "f4"        # hlt
)


cdef int _self_test() except -1:
    """Run into every kind of intercept once and see that it arrives as the rest of this file expects."""
    cdef cpu_t m
    cdef self_test_t test
    cdef size_t hook
    cdef uint64_t value
    cdef uint64_t unmapped = 0x4000_0000_0000
    cdef uint8_t *memory = <uint8_t *>aligned_alloc(PAGE, 16 * PAGE)
    cdef uint64_t *entries = <uint64_t *>memory
    if memory == NULL:
        raise MemoryError()
    memset(&m, 0, sizeof(m))
    memset(&test, 0, sizeof(test))
    test.cpu = &m
    try:
        _open(&m)
        memset(memory, 0, 16 * PAGE)
        entries[0x1000 // 8] = 0x2003           # one page table path that maps the first 2 MiB onto themselves
        entries[0x2000 // 8] = 0x3003
        entries[0x3000 // 8] = 0x0083
        memcpy(memory + 0x8000, <char *>SELF_TEST_CODE, len(SELF_TEST_CODE))
        _check(m.lib, m.lib.mem_map_ptr(m.uc, 0, 16 * PAGE, UC_PROT_ALL, memory), "mapping memory")
        _long_mode(&m, 0x1000, 0, 0x10, 0x18)
        _intercepts(&m)
        value = 0x174F
        m.lib.reg_write(m.uc, UC_X86_REG_RCX, &value)
        m.lib.reg_write(m.uc, UC_X86_REG_RBX, &unmapped)
        _check(m.lib, m.lib.hook_add(m.uc, &hook, UC_HOOK_INTR, <void *>_self_test_hook, &test,
                                     <uint64_t>1, <uint64_t>0), "hook")
        m.lib.emu_start(m.uc, 0x8000, 0xFFFF_FFFF_FFFF_F000, 0, 0)
        expected = [INTERCEPT + SVM_EXIT_MSR, INTERCEPT + SVM_EXIT_MSR,
                    INTERCEPT + SVM_EXIT_EXCEPTION + VECTOR_INVALID_OPCODE, 0x80,
                    INTERCEPT + SVM_EXIT_EXCEPTION + VECTOR_PAGE_FAULT, INTERCEPT + SVM_EXIT_HLT]
        seen = [test.seen[n] for n in range(min(test.count, 8))]
        if seen != expected or test.errors[0] & 1 != 0 or test.errors[1] & 1 != 1 or test.address != unmapped:
            raise _mismatch("intercepts arrive as " + ", ".join(hex(n) for n in seen))
    finally:
        _close(&m)
        free(memory)
    return 0


# Guest memory, by the guest's own page tables


cdef uint8_t *_walk(const cpu_t *m, uint64_t cr3, uint64_t address, bint write, uint64_t *physical) noexcept nogil:
    """The host address of guest virtual `address`, NULL if it is not mapped (so) or not RAM."""
    cdef uint64_t table = cr3 & FRAME_MASK, entry, offset, page
    cdef int level = 4, shift
    while True:
        level -= 1
        shift = 12 + 9 * level
        offset = table + (address >> shift & 511) * 8
        if offset > m.memory_size - 8:
            return NULL
        entry = (<uint64_t *>(m.memory + offset))[0]
        if not entry & PAGE_PRESENT or (write and not entry & PAGE_WRITABLE):
            return NULL
        if level == 0 or (level < 3 and entry & PAGE_LARGE):
            page = (<uint64_t>1 << shift) - 1
            physical[0] = entry & FRAME_MASK & ~page | address & page
            return m.memory + physical[0] if physical[0] < m.memory_size else NULL
        table = entry & FRAME_MASK


cdef bint _peek(const cpu_t *m, uint64_t address, uint8_t *out, int count) noexcept nogil:
    cdef uint64_t physical = 0
    cdef uint8_t *p
    cdef int n
    for n in range(count):
        p = _walk(m, m.head.cr[3], address + n, False, &physical)
        if p == NULL:
            return False
        out[n] = p[0]
    return True


cdef bint _push(const cpu_t *m, uint64_t address, uint64_t value) noexcept nogil:
    """Store 8 bytes at an 8-byte aligned guest virtual address."""
    cdef uint64_t physical = 0
    cdef uint8_t *p = _walk(m, m.head.cr[3], address, True, &physical)
    if p == NULL:
        return False
    (<uint64_t *>p)[0] = value
    return True


# Exceptions and interrupts


cdef uint64_t _flags(const cpu_t *m) noexcept nogil:
    """RFLAGS, the arithmetic ones worked out. Asks the library: call it while its state is the saved one."""
    cdef uint64_t value = 0
    m.lib.reg_read(m.uc, UC_X86_REG_EFLAGS, &value)
    return value


cdef bint _enter(cpu_t *m, int vector, bint has_error, uint32_t error, uint64_t flags) noexcept nogil:
    """Go through the guest's IDT in the saved state: what a processor does on an event in 64-bit mode (SDM 6.14).

    Returns:
        False if that itself faults, or the processor is not in long mode; the saved state is unchanged then.
    """
    cdef uint8_t gate[16]
    cdef uint64_t stack, target, physical = 0
    cdef uint32_t middle
    cdef int ist, kind, level = m.head.hflags & HF_CPL_MASK
    if (not m.head.hflags & HF_LMA or vector * 16 + 15 > <int64_t>m.head.idt.limit
            or not _peek(m, m.head.idt.base + vector * 16, gate, 16)):
        return False
    middle = (<uint32_t *>gate)[1]
    if not middle >> 15 & 1:
        return False
    target = (<uint32_t *>gate)[0] & 0xFFFF | middle & <uint32_t>0xFFFF0000 | <uint64_t>(<uint32_t *>gate)[2] << 32
    ist = middle & 7
    kind = middle >> 8 & 15
    stack = m.head.regs[RSP]
    if (ist or level) and not _peek(m, m.head.tr.base + (36 + (ist - 1) * 8 if ist else 4), <uint8_t *>&stack, 8):
        return False
    stack &= ~<uint64_t>15
    if not (_push(m, stack - 8, m.head.segs[SS].selector) and _push(m, stack - 16, m.head.regs[RSP])
            and _push(m, stack - 24, flags) and _push(m, stack - 32, m.head.segs[CS].selector)
            and _push(m, stack - 40, m.head.rip)):
        return False
    stack -= 40
    if has_error:
        stack -= 8
        if not _push(m, stack, error):
            return False
    if level:
        m.head.segs[SS].selector = 0
        m.head.segs[SS].base = 0
        m.head.segs[SS].limit = 0
        m.head.segs[SS].flags = STACK_FLAGS
    m.head.segs[CS].selector = (<uint32_t *>gate)[0] >> 16 & ~<uint32_t>3
    m.head.segs[CS].base = 0
    m.head.segs[CS].limit = <uint32_t>MASK32
    m.head.segs[CS].flags = CODE64_FLAGS
    m.head.hflags = m.head.hflags & ~<uint32_t>(HF_CPL_MASK | HF_INHIBIT_IRQ | HF_ADDSEG) | HF_CS64 | HF_CS32 | HF_SS32
    m.head.regs[RSP] = stack
    m.head.rip = target
    m.head.eflags &= ~<uint64_t>(FLAG_TRAP | FLAG_NESTED | FLAG_RESUME | FLAG_VM)
    if kind == 14:                                  # an interrupt gate; a trap gate (15) leaves IF alone
        m.head.eflags &= ~<uint64_t>FLAG_INTERRUPT
    return True


cdef void _halt_with(cpu_t *m, int reason) noexcept nogil:
    m.stopping = True
    m.stop_reason = reason
    m.lib.emu_stop(m.uc)


cdef void _deliver(cpu_t *m, int vector, bint has_error, uint32_t error) noexcept nogil:
    """Raise an exception in the saved state; one that faults becomes a double, then a triple fault."""
    cdef uint64_t flags = _flags(m)
    m.exceptions += 1
    m.icpt.old_exception = -1
    m.icpt.exception_is_int = 0
    if _enter(m, vector, has_error, error, flags):
        return
    if vector == VECTOR_DOUBLE_FAULT or not _enter(m, VECTOR_DOUBLE_FAULT, True, 0, flags):
        _halt_with(m, 1)


cdef bint _has_error(int vector) noexcept nogil:
    return (vector == VECTOR_DOUBLE_FAULT or vector == VECTOR_ALIGNMENT
            or VECTOR_INVALID_TSS <= vector <= VECTOR_PAGE_FAULT)


cdef void _software_interrupt(cpu_t *m, int vector) noexcept nogil:
    """INT n and INT3: RIP is behind the instruction already; the gate's privilege decides (SDM 6.12.1.2)."""
    cdef uint8_t gate[16]
    cdef uint8_t opcode = 0
    cdef bint allowed = (vector * 16 + 15 <= <int64_t>m.head.idt.limit
                         and _peek(m, m.head.idt.base + vector * 16, gate, 16)
                         and (gate[5] >> 5 & 3) >= <int>(m.head.hflags & HF_CPL_MASK))
    if allowed:
        _deliver(m, vector, False, 0)
        return
    m.head.rip -= 1
    if not _peek(m, m.head.rip, &opcode, 1) or opcode != 0xCC:
        m.head.rip -= 1
    _deliver(m, VECTOR_GENERAL_PROTECTION, True, vector * 8 + 2)


# Hooks


cdef void _on_block(void *uc, uint64_t address, uint32_t size, void *user) noexcept nogil:
    """Every block of code, before it runs: time passes, and interrupts get in."""
    cdef cpu_t *m = <cpu_t *>user
    cdef uint64_t rip
    cdef int vector
    if m.stopping:
        return                                      # the library leaves before it runs this block
    m.ticks += size
    m.blocks += 1
    m.block_address = address
    m.block_size = size
    if m.ticks >= m.next_event:
        if m.code[m.memory_size >> 12]:
            _forget_written(m)
            m.lib.reg_write(uc, UC_X86_REG_RIP, &address)   # this very block may be one of them: look it up again
            m.ticks -= size
            m.blocks -= 1
            return
        _event(m)
        if m.stopping:
            m.ticks -= size                         # the block will come again
            m.blocks -= 1
            m.block_size = 0
            return
    if m.interrupt and _flags(m) & FLAG_INTERRUPT:
        m.lib.context_save(uc, m.context)
        if m.head.hflags & HF_INHIBIT_IRQ:
            return
        vector = _accept(m)
        if vector < 0:
            return
        m.interrupts += 1
        if not _enter(m, vector, False, 0, _flags(m)):
            _deliver(m, VECTOR_DOUBLE_FAULT, True, 0)
        m.lib.context_restore(uc, m.context)
        rip = m.head.rip
        m.lib.reg_write(uc, UC_X86_REG_RIP, &rip)   # also makes the library leave the block that we came from
        m.ticks -= size
        m.blocks -= 1


cdef void _on_interrupt(void *uc, uint32_t number, void *user) noexcept nogil:
    """Intercepts, exceptions and software interrupts."""
    cdef cpu_t *m = <cpu_t *>user
    cdef int vector
    cdef uint8_t code[3]
    if m.stopping:
        return
    m.lib.context_save(uc, m.context)
    if number == INTERCEPT + SVM_EXIT_MSR:
        m.icpt.old_exception = -1
        _exit_msr(m, m.icpt.error_code & 1)
    elif number == INTERCEPT + SVM_EXIT_HLT:
        m.head.rip += 1
        m.head.hflags &= ~<uint32_t>HF_INHIBIT_IRQ
        _exit_halt(m, _flags(m) & FLAG_INTERRUPT != 0)
    elif number == INTERCEPT + SVM_EXIT_VMMCALL:
        _exit_hypercall(m)
    elif INTERCEPT + SVM_EXIT_EXCEPTION <= number < INTERCEPT + SVM_EXIT_EXCEPTION + 32:
        vector = number - (INTERCEPT + SVM_EXIT_EXCEPTION)
        if (vector == VECTOR_INVALID_OPCODE and not m.head.hflags & HF_CPL_MASK and _peek(m, m.head.rip, code, 3)
                and code[0] == 0x0F and code[1] == 0x01 and (code[2] == 0xC1 or code[2] == 0xD9)):
            m.icpt.old_exception = -1               # VMCALL or VMMCALL, which need SVM to be enabled otherwise
            _exit_hypercall(m)
        else:
            if vector == VECTOR_PAGE_FAULT:
                m.head.cr[2] = (<uint64_t *>(m.control + VMCB_EXIT_INFO_2))[0]
            _deliver(m, vector, _has_error(vector), <uint32_t>m.icpt.error_code)
    elif number < 256:
        _software_interrupt(m, number)
    else:
        _halt_with(m, 2)
        return
    m.lib.context_restore(uc, m.context)


cdef void _on_syscall(void *uc, void *user) noexcept nogil:
    """SYSCALL (SDM volume 2): the library adds the instruction's length to RIP after this."""
    cdef cpu_t *m = <cpu_t *>user
    cdef uint64_t flags = _flags(m)
    cdef uint32_t selector
    cdef uint8_t byte = 0
    cdef int length = 2
    m.syscalls += 1
    m.lib.context_save(uc, m.context)
    while length < 15 and _peek(m, m.head.rip + length - 2, &byte, 1) and byte != 0x0F:
        length += 1                                 # prefixes
    flags &= ~<uint64_t>FLAG_RESUME
    m.head.regs[RCX] = m.head.rip + length
    m.head.regs[R11] = flags
    selector = m.syscall.star >> 32 & 0xFFFC
    m.head.segs[CS].selector = selector
    m.head.segs[CS].base = 0
    m.head.segs[CS].limit = <uint32_t>MASK32
    m.head.segs[CS].flags = CODE64_FLAGS
    m.head.segs[SS].selector = selector + 8
    m.head.segs[SS].base = 0
    m.head.segs[SS].limit = <uint32_t>MASK32
    m.head.segs[SS].flags = DATA_FLAGS
    m.head.rip = (m.syscall.lstar if m.head.hflags & HF_CS64 else m.syscall.cstar) - length
    m.head.hflags = m.head.hflags & ~<uint32_t>(HF_CPL_MASK | HF_ADDSEG) | HF_CS64 | HF_CS32 | HF_SS32
    flags &= ~m.syscall.fmask
    m.head.cc_src = flags & FLAGS_ARITHMETIC
    m.head.cc_op = CC_OP_EFLAGS
    m.head.df = -1 if flags & FLAG_DIRECTION else 1
    m.head.eflags = flags & ~<uint64_t>(FLAGS_ARITHMETIC | FLAG_DIRECTION) | 2
    m.lib.context_restore(uc, m.context)


cdef int _on_rdtsc(void *uc, void *user) noexcept nogil:
    cdef cpu_t *m = <cpu_t *>user
    cdef uint64_t value
    m.ticks += RDTSC_TICKS
    m.time_reads += 1
    value = m.ticks + m.tsc_offset & MASK32
    m.lib.reg_write(uc, UC_X86_REG_RAX, &value)
    value = m.ticks + m.tsc_offset >> 32
    m.lib.reg_write(uc, UC_X86_REG_RDX, &value)
    return 1


# Translated code and writes to it
#
# The library drops the translation of code that is written over only when the store takes its slow path, and it
# lets stores to a page take the fast path after the first one. It makes an exception for pages under a memory hook. So
# every page with translated code lies under one of a few hooks of a kind that never fires (all memory may be fetched
# from), and stores elsewhere stay fast.


cdef void _protect_code(cpu_t *m, uint64_t page) noexcept nogil:
    cdef uint64_t begin = page << 12, end = (page << 12) + PAGE - 1, distance, best = ~<uint64_t>0
    cdef code_range_t *r
    cdef code_range_t *near = NULL
    cdef int index
    cdef size_t hook = 0
    for index in range(m.range_count):
        r = &m.ranges[index]
        distance = r.begin - end if end < r.begin else begin - r.end if begin > r.end else 0
        if distance < best:
            best = distance
            near = r
    if near != NULL and (best <= CODE_RANGE_GAP * PAGE or m.range_count == MOST_CODE_RANGES):
        if begin < near.begin:
            near.begin = near.bounds[0] = begin
        if end > near.end:
            near.end = near.bounds[1] = end
    else:
        r = &m.ranges[m.range_count]
        if m.lib.hook_add(m.uc, &hook, UC_HOOK_MEM_FETCH_PROT, <void *>_never, m, begin, end):
            return
        r.begin = begin
        r.end = end
        r.bounds = <uint64_t *>(hook + 24)
        m.range_count += 1
    m.lib.ctl(m.uc, UC_CTL_TLB_FLUSH)               # forget that stores to the page could be fast
    m.tlb_flushes += 1


cdef void _forget_written(cpu_t *m) noexcept nogil:
    """Drop the translations of pages that the host has written to, a disk's data for instance.

    The library drops by guest virtual address, through the page tables: so paging is off meanwhile.
    """
    cdef uint64_t page, pages = m.memory_size >> 12, paging
    m.code[pages] = 0
    m.lib.context_save(m.uc, m.context)
    paging = m.head.cr[0]
    m.head.cr[0] = paging & ~(<uint64_t>1 << 31)
    m.lib.context_restore(m.uc, m.context)
    m.lib.ctl(m.uc, UC_CTL_TLB_FLUSH)
    for page in range(pages):
        if m.code[page] == CODE_WRITTEN:
            m.code[page] = 0
            m.lib.ctl(m.uc, UC_CTL_TB_REMOVE, page << 12, (page + 1) << 12)
            m.pages_forgotten += 1
    m.lib.context_save(m.uc, m.context)
    m.head.cr[0] = paging
    m.lib.context_restore(m.uc, m.context)
    m.lib.ctl(m.uc, UC_CTL_TLB_FLUSH)


cdef bint _never(void *uc, int kind, uint64_t address, int size, int64_t value, void *user) noexcept nogil:
    return False


cdef void _on_translation(void *uc, uc_block_t *block, uc_block_t *previous, void *user) noexcept nogil:
    """A block was translated: note the one or two pages that its code is on."""
    cdef cpu_t *m = <cpu_t *>user
    cdef uint64_t cr0 = 0, cr3 = 0, address = block.pc, last = block.pc + (block.size - 1 if block.size else 0)
    cdef uint64_t physical = 0
    m.lib.reg_read(uc, UC_X86_REG_CR0, &cr0)
    m.lib.reg_read(uc, UC_X86_REG_CR3, &cr3)
    while True:
        if not cr0 >> 31 & 1:
            physical = address
        elif _walk(m, cr3, address, False, &physical) == NULL:
            physical = m.memory_size
        if physical < m.memory_size and m.code[physical >> 12] != CODE_TRANSLATED:
            m.code[physical >> 12] = CODE_TRANSLATED
            _protect_code(m, physical >> 12)
        if address >> 12 == last >> 12:
            return
        address = last


# Exits to Python


cdef void _event(cpu_t *m) noexcept with gil:
    cdef Cpu cpu = <Cpu>m.owner
    try:
        cpu.on_event(m.ticks)
    except BaseException as error:
        cpu._fail(error)


cdef int _accept(cpu_t *m) noexcept with gil:
    cdef Cpu cpu = <Cpu>m.owner
    try:
        vector = cpu.pop_interrupt()
        cpu.after()
        return -1 if vector is None else vector
    except BaseException as error:
        cpu._fail(error)
        return -1


cdef void _exit_msr(cpu_t *m, bint write) noexcept with gil:
    cdef Cpu cpu = <Cpu>m.owner
    cdef uint32_t index = m.head.regs[RCX] & MASK32
    cdef uint64_t value = m.head.regs[RAX] & MASK32 | m.head.regs[RDX] << 32
    try:
        cpu.before(m.ticks)
        try:
            if write:
                cpu.wrmsr(index, value)
            else:
                value = cpu.rdmsr(index)
        except cpu.fault as fault:
            _deliver(m, fault.vector, _has_error(fault.vector), 0)
            return
        finally:
            cpu.after()
        if not write:
            m.head.regs[RAX] = value & MASK32
            m.head.regs[RDX] = value >> 32
        m.head.rip += 2
    except BaseException as error:
        cpu._fail(error)


cdef void _exit_hypercall(cpu_t *m) noexcept with gil:
    cdef Cpu cpu = <Cpu>m.owner
    cdef uint8_t xmm[96]
    cdef int index
    cdef uint64_t control = m.head.regs[RCX]
    cdef bytes registers = b""
    try:
        cpu.before(m.ticks)
        if control & 0x10000:                       # a fast call may have input in XMM0 to XMM5
            for index in range(6):
                m.lib.reg_read(m.uc, UC_X86_REG_XMM0 + index, xmm + 16 * index)
            registers = xmm[:96]
        try:
            m.head.regs[RAX] = cpu.hypercall(control, m.head.regs[RDX], m.head.regs[R8], registers)
        except cpu.fault as fault:
            _deliver(m, fault.vector, _has_error(fault.vector), 0)
            return
        finally:
            cpu.after()
        m.head.rip += 3
    except BaseException as error:
        cpu._fail(error)


cdef void _exit_halt(cpu_t *m, bint interruptible) noexcept with gil:
    cdef Cpu cpu = <Cpu>m.owner
    try:
        cpu.on_halt(m.ticks, interruptible)
    except BaseException as error:
        cpu._fail(error)


cdef uint32_t _on_in(void *uc, uint32_t port, int size, void *user) noexcept with gil:
    cdef cpu_t *m = <cpu_t *>user
    cdef Cpu cpu = <Cpu>m.owner
    cdef uint32_t value = <uint32_t>MASK32
    try:
        cpu.before(m.ticks)
        value = cpu.io_read(port, size)
        cpu.after()
    except BaseException as error:
        cpu._fail(error)
    return value


cdef void _on_out(void *uc, uint32_t port, int size, uint32_t value, void *user) noexcept with gil:
    cdef cpu_t *m = <cpu_t *>user
    cdef Cpu cpu = <Cpu>m.owner
    try:
        cpu.before(m.ticks)
        cpu.io_write(port, size, value)
        cpu.after()
    except BaseException as error:
        cpu._fail(error)


cdef uint64_t _on_mmio_read(void *uc, uint64_t offset, unsigned size, void *user) noexcept with gil:
    cdef cpu_t *m = <cpu_t *>user
    cdef Cpu cpu = <Cpu>m.owner
    cdef uint64_t value = 0
    try:
        cpu.before(m.ticks)
        value = cpu.mmio_read(m.memory_size + offset, size)
        cpu.after()
    except BaseException as error:
        cpu._fail(error)
    return value


cdef void _on_mmio_write(void *uc, uint64_t offset, unsigned size, uint64_t value, void *user) noexcept with gil:
    cdef cpu_t *m = <cpu_t *>user
    cdef Cpu cpu = <Cpu>m.owner
    try:
        cpu.before(m.ticks)
        cpu.mmio_write(m.memory_size + offset, size, value)
        cpu.after()
    except BaseException as error:
        cpu._fail(error)


cdef int _on_cpuid(void *uc, void *user) noexcept with gil:
    cdef cpu_t *m = <cpu_t *>user
    cdef Cpu cpu = <Cpu>m.owner
    cdef uint64_t rax = 0, rbx = 0, rcx = 0, rdx = 0
    m.lib.reg_read(uc, UC_X86_REG_RAX, &rax)
    m.lib.reg_read(uc, UC_X86_REG_RCX, &rcx)
    try:
        rax, rbx, rcx, rdx = cpu.cpuid(rax & MASK32, rcx & MASK32)
    except BaseException as error:
        cpu._fail(error)
    m.lib.reg_write(uc, UC_X86_REG_RAX, &rax)
    m.lib.reg_write(uc, UC_X86_REG_RBX, &rbx)
    m.lib.reg_write(uc, UC_X86_REG_RCX, &rcx)
    m.lib.reg_write(uc, UC_X86_REG_RDX, &rdx)
    return 1


@cython.no_gc_clear
cdef class Cpu:
    """One processor over a partition's memory.

    Its exits call the methods of `processor` (those of `vmbus.engine.Processor`, and `pop_interrupt`) from inside
    `run`. An exception of such a call ends `run` and is raised there, except `fault`, which the guest gets.

    Args:
        memory: guest physical memory, from address 0.
        processor: answers the exits.
        fault: exception class with a `vector`: what the guest's own instruction raises.
        before: called with the time in ticks before an exit is answered.
        after: called without argument when it was answered.
        on_event: called with the time in ticks once that has reached `next_event`.
        on_halt: called with the time and RFLAGS.IF when the guest executes HLT; returns when it may go on.
        translation_cache: bytes for translated code.

    Raises:
        EngineError: `load` was not called, or the library refuses.

    Attributes:
        next_event: time in ticks at which `on_event` is called next.
        interrupt: an interrupt waits; `processor.pop_interrupt` is called once the guest can take it.
    """

    cdef cpu_t m
    cdef GuestMemory memory
    cdef object fault, before, after, on_event, on_halt
    cdef object io_read, io_write, mmio_read, mmio_write, rdmsr, wrmsr, cpuid_answer, hypercall, pop_interrupt, cpuid
    cdef object error
    cdef bint running, holds_memory

    def __cinit__(self, GuestMemory memory, processor, *, fault, before, after, on_event, on_halt,
                  uint32_t translation_cache=256 << 20):
        cdef cpu_t *m = &self.m
        cdef size_t hook
        if not library_path:
            raise EngineError("the unicorn library is not loaded")
        self.memory = memory
        self.fault, self.before, self.after, self.on_event, self.on_halt = fault, before, after, on_event, on_halt
        self.io_read, self.io_write = processor.io_read, processor.io_write
        self.mmio_read, self.mmio_write = processor.mmio_read, processor.mmio_write
        self.rdmsr, self.wrmsr, self.cpuid = processor.rdmsr, processor.wrmsr, processor.cpuid
        self.hypercall, self.pop_interrupt = processor.hypercall, processor.pop_interrupt
        m.owner = <PyObject *>self
        m.memory = memory.c.base
        m.memory_size = memory.c.size
        m.next_event = 0
        _open(m)
        _check(m.lib, m.lib.ctl(m.uc, UC_CTL_TCG_BUFFER_SIZE, translation_cache), "setting the translation cache")
        _check(m.lib, m.lib.ctl(m.uc, UC_CTL_USE_EXITS, 1), "exits")  # no address ends a run
        if memory.c.code != NULL:
            raise EngineError("another engine runs code of this partition")
        m.code = <uint8_t *>calloc((m.memory_size >> 12) + 1, 1)
        if m.code == NULL:
            raise MemoryError()
        memory.c.code = m.code
        _check(m.lib, m.lib.mem_map_ptr(m.uc, 0, m.memory_size, UC_PROT_ALL, m.memory), "mapping guest memory")
        memory.exports += 1                         # the library holds the address: no close() under it
        self.holds_memory = True
        _check(m.lib, m.lib.mmio_map(m.uc, m.memory_size, MMIO_END - m.memory_size, _on_mmio_read, m, _on_mmio_write, m),
               "mapping device memory")
        self._hook(UC_HOOK_INTR, <void *>_on_interrupt)
        self._hook(UC_HOOK_BLOCK, <void *>_on_block)
        self._hook(UC_HOOK_EDGE_GENERATED, <void *>_on_translation)
        self._hook(UC_HOOK_INSN, <void *>_on_in, UC_X86_INS_IN)
        self._hook(UC_HOOK_INSN, <void *>_on_out, UC_X86_INS_OUT)
        self._hook(UC_HOOK_INSN, <void *>_on_rdtsc, UC_X86_INS_RDTSC)
        self._hook(UC_HOOK_INSN, <void *>_on_cpuid, UC_X86_INS_CPUID)
        self._hook(UC_HOOK_INSN, <void *>_on_syscall, UC_X86_INS_SYSCALL)
        # See _protect_code: a hook's bounds grow in place.
        _check(m.lib, m.lib.hook_add(m.uc, &hook, UC_HOOK_MEM_FETCH_PROT, <void *>_never, m, MMIO_END, MMIO_END + 1), "hook")
        if (<uint64_t *>(hook + 24))[0] != MMIO_END or (<uint64_t *>(hook + 24))[1] != MMIO_END + 1:
            raise _mismatch("bounds of a hook")

    def __dealloc__(self):
        _close(&self.m)
        if self.m.code != NULL:
            self.memory.c.code = NULL
            free(self.m.code)
        if self.holds_memory:
            self.memory.exports -= 1

    cdef int _hook(self, int kind, void *callback, int instruction=0) except -1:
        cdef size_t hook
        return _check(self.m.lib, self.m.lib.hook_add(self.m.uc, &hook, kind, callback, &self.m, <uint64_t>1, <uint64_t>0,
                                                      instruction), "adding a hook")

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
        _long_mode(m, cr3, gdt, code, data)
        m.lib.reg_write(m.uc, UC_X86_REG_RIP, &rip)
        m.lib.reg_write(m.uc, UC_X86_REG_RSI, &rsi)
        m.lib.reg_write(m.uc, UC_X86_REG_RSP, &rsp)
        m.lib.reg_write(m.uc, UC_X86_REG_EFLAGS, &value)
        _intercepts(m)

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
        if self.running:
            raise EngineError("the processor runs already")
        m.stopping = False
        m.stop_reason = 0
        self.error = None
        m.lib.reg_read(m.uc, UC_X86_REG_RIP, &rip)
        self.running = True
        try:
            with nogil:
                code = m.lib.emu_start(m.uc, rip, 0, 0, 0)
        finally:
            self.running = False
        # Stopped inside a block, behind a port access for instance: its rest will be counted when it runs.
        m.lib.reg_read(m.uc, UC_X86_REG_RIP, &rip)
        if m.block_address < rip < m.block_address + m.block_size:
            m.ticks -= m.block_address + m.block_size - rip
            m.blocks -= 1
        m.block_size = 0
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        if code:
            raise EngineError(f"the unicorn library stopped: {m.lib.strerror(code).decode()} ({self.describe()})")
        return m.stop_reason

    def stop(self) -> None:
        """Make `run` return; for calls from inside an exit."""
        _halt_with(&self.m, 0)

    def advance_to(self, uint64_t ticks) -> None:
        """Let time pass while the processor is halted; going back is ignored."""
        if ticks > self.m.ticks:
            self.m.ticks = ticks

    def describe(self) -> str:
        """The processor's registers, for error messages."""
        cdef cpu_t *m = &self.m
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
        self.m.lib.reg_read(self.m.uc, UC_X86_REG_RIP, &rip)
        return rip

    @property
    def ticks(self) -> int:
        """Time: bytes of code executed, plus what reading the time costs and what passed while halted."""
        return self.m.ticks

    @property
    def next_event(self) -> int:
        return self.m.next_event

    @next_event.setter
    def next_event(self, uint64_t ticks):
        # Translations to be dropped are an event that is due at once.
        self.m.next_event = 0 if self.m.code[self.m.memory_size >> 12] else ticks

    @property
    def interrupt(self) -> bool:
        return self.m.interrupt

    @interrupt.setter
    def interrupt(self, bint value):
        self.m.interrupt = value

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
                "code_pages": pages, "code_ranges": self.m.range_count,
                "pages_forgotten": self.m.pages_forgotten}
