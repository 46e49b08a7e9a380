# Opening the library, and making sure that its state is laid out as `unicorn_x86.h` says.


cdef int _resolve(void *handle, const char *name, void **target) except -1:
    target[0] = dlsym(handle, name)
    if target[0] == NULL:
        raise EngineError(f"this build of the unicorn library lacks {name.decode()}: install unicorn==2.1.4 from PyPI")
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
    _resolve(handle, b"uc_hook_del", <void **>&library.hook_del)
    _resolve(handle, b"uc_hook_add", <void **>&library.hook_add)
    _resolve(handle, b"uc_emu_start", <void **>&library.emu_start)
    _resolve(handle, b"uc_emu_stop", <void **>&library.emu_stop)
    _resolve(handle, b"uc_context_size", <void **>&library.context_size)
    _resolve(handle, b"uc_context_alloc", <void **>&library.context_alloc)
    _resolve(handle, b"uc_context_save", <void **>&library.context_save)
    _resolve(handle, b"uc_context_restore", <void **>&library.context_restore)
    _resolve(handle, b"uc_context_free", <void **>&library.context_free)
    _resolve(handle, b"uc_ctl", <void **>&library.ctl)
    _resolve(handle, b"x86_cpu_tlb_fill_x86_64", <void **>&library.tlb_fill)
    _resolve(handle, b"unicorn_fill_tlb_x86_64", <void **>&library.tlb_fill_virtual)
    _resolve(handle, b"find_memory_mapping_x86_64", <void **>&library.memory_mapping)
    _resolve(handle, b"tlb_set_page_with_attrs_x86_64", <void **>&library.tlb_set_page)
    _resolve(handle, b"tlb_set_dirty_x86_64", <void **>&library.tlb_set_dirty)
    _resolve(handle, b"cpu_loop_exit_x86_64", <void **>&library.loop_exit)
    _resolve(handle, b"cpu_ldub_code_x86_64", <void **>&library.fetch_byte)
    _resolve(handle, b"raise_exception_x86_64", <void **>&library.raise_exception)
    library.version(&major, &minor)
    if (major, minor) != VERSION:
        raise EngineError(f"unicorn {major}.{minor} is not supported: install unicorn==2.1.4 (pip install 'vmbus[guest]')")
    _catch_giving_up(handle)
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


cdef size_t *_find(void *place, size_t size, size_t value, str what) except NULL:
    """The first word from `place` on that is `value`."""
    cdef size_t *word
    cdef size_t index
    cdef unsigned char present
    for index in range(size // sizeof(size_t)):
        word = <size_t *>place + index
        if (index == 0 or <size_t>word % PAGE == 0) and mincore(<void *>(<size_t>word & ~<size_t>(PAGE - 1)), 1, &present):
            break                                   # the end of what is mapped
        if word[0] == value:
            return word
    raise _mismatch(f"{what} is not there")


cdef int _find_processor(cpu_t *m) except -1:
    """Find the live processor, whose state has just been saved, and the functions that the library calls through memory."""
    cdef size_t cpu = (<size_t *>(<uint8_t *>m.uc + UC_CPU_OFFSET))[0]
    cdef size_t fill = <size_t><void *>m.lib.tlb_fill
    cdef size_t other = <size_t><void *>m.lib.tlb_fill_virtual
    if cpu == 0 or cpu & 7 or cpu >> 47:
        raise _mismatch("the processor")
    m.cpu = <void *>cpu
    m.live = <x86_head_t *>_find(m.cpu, CPU_SEARCH, m.head.regs[RAX], "the live RAX")
    if memcmp(m.live, m.head, STATE_SIZE):
        raise _mismatch("the live state")
    # A request of the API changes the one pointer that is followed; the library has another copy of the first.
    _check(m.lib, m.lib.ctl(m.uc, UC_CTL_TLB_TYPE, 1), "choosing a TLB")
    m.tlb_fill_slot = _find(m.cpu, CPU_SEARCH, other, "what fills the TLB")
    _check(m.lib, m.lib.ctl(m.uc, UC_CTL_TLB_TYPE, 0), "choosing a TLB")
    if m.tlb_fill_slot[0] != fill:
        raise _mismatch("what fills the TLB")
    m.memory_mapping_slot = _find(m.uc, UC_SEARCH, <size_t><void *>m.lib.memory_mapping, "what finds memory")
    return 0


cdef int _open(cpu_t *m, uint32_t translation_cache) except -1:
    """Open an engine and find the parts of its saved state; every place is checked with a value written there."""
    cdef uint8_t *state
    cdef uint64_t value
    cdef uc_msr_t msr
    cdef uc_mmr_t table
    cdef int index, code
    cdef uint64_t efer
    cdef uint64_t mark = 0x1122_3344_5566_7700
    m.lib = &library
    _check(m.lib, m.lib.open(UC_ARCH_X86, UC_MODE_64, &m.uc), "opening an engine")
    # It counts until the engine's first use only, which is the next call but one.
    _check(m.lib, m.lib.ctl(m.uc, UC_CTL_TCG_BUFFER_SIZE, translation_cache), "setting the translation cache")
    flags = (<uint8_t *>m.uc)[UC_NO_EXIT_REQUEST_OFFSET], (<uint8_t *>m.uc)[UC_NO_EXIT_REQUEST_OFFSET + 1]
    if m.lib.context_size(m.uc) != STATE_OFFSET + STATE_SIZE:
        raise _mismatch(f"{m.lib.context_size(m.uc)} bytes instead of {STATE_OFFSET + STATE_SIZE}")
    # The flag's neighbour becomes true with an engine's first use.
    if flags != (0, 0) or (<uint8_t *>m.uc)[UC_NO_EXIT_REQUEST_OFFSET] or (<uint8_t *>m.uc)[UC_NO_EXIT_REQUEST_OFFSET + 1] != 1:
        raise _mismatch("flags of the engine")
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
    msr.rid = 0xC000_0080
    m.lib.reg_read(m.uc, UC_X86_REG_MSR, &msr)
    efer, msr.value = msr.value, msr.value ^ (EFER_NXE | EFER_SCE)
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
    if m.head.efer != efer ^ (EFER_NXE | EFER_SCE):
        raise _mismatch("EFER")
    if m.head.cc_op != CC_OP_EFLAGS or not m.head.hflags & HF_CS64:
        raise _mismatch("translation flags")
    _find_processor(m)
    # Back to what a reset leaves.
    msr.rid = 0xC000_0080
    msr.value = efer
    m.lib.reg_write(m.uc, UC_X86_REG_MSR, &msr)
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
    m.icpt.intercept = 0
    # What we need, and then what no guest may do: SVM itself (the library's processor has it, ours has not) and MWAIT.
    for code in (SVM_EXIT_MSR, SVM_EXIT_HLT, SVM_EXIT_VMMCALL, SVM_EXIT_SHUTDOWN, SVM_EXIT_INVLPGA, SVM_EXIT_VMRUN,
                 SVM_EXIT_MONITOR, SVM_EXIT_MWAIT, *range(SVM_EXIT_VMLOAD, SVM_EXIT_SKINIT + 1)):
        m.icpt.intercept |= <uint64_t>1 << <int>(code - SVM_EXIT_FIRST)
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
    _free_states(m)
    if m.context != NULL:
        m.lib.context_free(m.context)
        m.context = NULL
    if m.uc != NULL:
        m.lib.close(m.uc)
        m.uc = NULL
    free(m.control)
    m.control = NULL


cdef enum:
    MOST_SELF_TEST_EXITS = 12


cdef struct self_test_t:
    cpu_t *cpu
    uint32_t seen[MOST_SELF_TEST_EXITS]
    int32_t errors[MOST_SELF_TEST_EXITS]
    uint64_t address
    int count


cdef void _self_test_hook(void *uc, uint32_t number, void *user) noexcept nogil:
    cdef self_test_t *test = <self_test_t *>user
    cdef cpu_t *m = test.cpu
    m.lib.context_save(uc, m.context)
    if test.count < MOST_SELF_TEST_EXITS:
        test.seen[test.count] = number
        test.errors[test.count] = m.icpt.error_code
    if number == INTERCEPT + SVM_EXIT_EXCEPTION + VECTOR_PAGE_FAULT:
        test.address = (<uint64_t *>(m.control + VMCB_EXIT_INFO_2))[0]
    test.count += 1
    m.icpt.old_exception = -1
    m.icpt.exception_is_int = 0
    if number == INTERCEPT + SVM_EXIT_HLT or test.count >= MOST_SELF_TEST_EXITS:
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
    "8b0c2500900000"    # mov ecx, [0x9000]
    "890c2500a00000"    # mov [0xa000], ecx
    "90f090"    # nop; lock nop, which ends the block in front of it and arrives as a HLT there, but is none
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
    cdef uint8_t code[17]
    cdef uint32_t stored[16]
    if memory == NULL:
        raise MemoryError()
    memset(&m, 0, sizeof(m))
    memset(&test, 0, sizeof(test))
    memset(code, 0, sizeof(code))
    memset(stored, 0, sizeof(stored))
    test.cpu = &m
    try:
        _open(&m, 8 << 20)
        memset(memory, 0, 16 * PAGE)
        (<uint32_t *>(memory + 0x9000))[0] = 0x1234_5678
        entries[0x1000 // 8] = 0x2003           # one page table path that maps the first 2 MiB onto themselves
        entries[0x2000 // 8] = 0x3003
        entries[0x3000 // 8] = 0x0083
        memcpy(memory + 0x8000, <char *>SELF_TEST_CODE, len(SELF_TEST_CODE))
        _check(m.lib, m.lib.mem_map_ptr(m.uc, 0, 16 * PAGE, UC_PROT_ALL, memory), "mapping memory")
        m.memory = memory
        m.memory_size = 16 * PAGE
        m.code = code
        m.stored = stored
        m.flush = 1
        _serve_tlb(&m)
        _watch_translation(&m)
        _long_mode(&m, 0x1000, 0, 0x10, 0x18)
        _intercepts(&m)
        value = 0x174F
        m.lib.reg_write(m.uc, UC_X86_REG_RCX, &value)
        m.lib.reg_write(m.uc, UC_X86_REG_RBX, &unmapped)
        _check(m.lib, m.lib.hook_add(m.uc, &hook, UC_HOOK_INTR, <void *>_self_test_hook, &test,
                                     <uint64_t>1, <uint64_t>0), "hook")
        _emulate(&m, 0x8000)
        value = m.head.rip
        _emulate(&m, value)                     # the locked instruction comes first now
        expected = [INTERCEPT + SVM_EXIT_MSR, INTERCEPT + SVM_EXIT_MSR,
                    INTERCEPT + SVM_EXIT_EXCEPTION + VECTOR_INVALID_OPCODE, 0x80,
                    INTERCEPT + SVM_EXIT_EXCEPTION + VECTOR_PAGE_FAULT, INTERCEPT + SVM_EXIT_HLT,
                    INTERCEPT + SVM_EXIT_EXCEPTION + VECTOR_INVALID_OPCODE, INTERCEPT + SVM_EXIT_HLT]
        seen = [test.seen[n] for n in range(min(test.count, MOST_SELF_TEST_EXITS))]
        if value != 0x8000 + len(SELF_TEST_CODE) - 3 or m.head.rip != 0x8000 + len(SELF_TEST_CODE) - 1:
            raise _mismatch("where a block ends")
        if seen != expected or test.errors[0] & 1 != 0 or test.errors[1] & 1 != 1 or test.address != unmapped:
            raise _mismatch("intercepts arrive as " + ", ".join(hex(n) for n in seen))
        # The TLB asked for the page that was read and the one that was written, with the leaf entry's bits set.
        if ((<uint32_t *>(memory + 0xA000))[0] != 0x1234_5678 or stored[10] != m.flush or stored[9]
                or entries[0x3000 // 8] != 0x00E3):
            raise _mismatch("how the TLB is filled")
    finally:
        _close(&m)
        free(memory)
    return 0
