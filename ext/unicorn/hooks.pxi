# What the library calls while code runs, as far as Python has no part in it.


cdef void _on_block(void *uc, uint64_t address, uint32_t size, void *user) noexcept nogil:
    """Every block of code, before it runs: time passes, and interrupts get in. This is the hot path."""
    cdef cpu_t *m = <cpu_t *>user
    m.ticks += size
    m.blocks += 1
    m.block_address = address
    m.block_size = size
    if m.ticks >= m.next_event or m.interrupt:
        m.attend(m, address, size)                  # through a pointer, so that it is not inlined here


cdef void _attend(cpu_t *m, uint64_t address, uint32_t size) noexcept nogil:
    """Something is due or pending before the block at `address`; if that leads elsewhere, the block comes again."""
    cdef bint again = m.stopping
    cdef int vector
    if not again and m.ticks >= m.next_event:
        if m.code[m.memory_size >> 12]:
            _forget_written(m)
            again = True                            # this very block may be one of them: look it up again
            address = m.live.rip                    # in real mode not the block's linear address
            m.lib.reg_write(m.uc, UC_X86_REG_RIP, &address)
            m.next_event = 0
        else:
            _due(m)
            again = m.stopping
            if not again and m.next_processor != m.processor:
                again = True                        # this block comes when its processor runs again
                _switch(m)
                address = m.live.rip
                m.lib.reg_write(m.uc, UC_X86_REG_RIP, &address)
    if not again and m.interrupt and (m.nmi or _flags(m) & FLAG_INTERRUPT):
        m.lib.context_save(m.uc, m.context)
        if not m.head.hflags & HF_INHIBIT_IRQ:
            if m.nmi and not m.head.hflags2 & HF2_NMI:
                vector = _accept(m, True)
            else:
                vector = _accept(m, False) if _flags(m) & FLAG_INTERRUPT else -1
            if vector >= 0:
                again = True
                m.interrupts += 1
                if not _enter(m, vector, False, 0, _flags(m)):
                    _deliver(m, VECTOR_DOUBLE_FAULT, True, 0)
                m.lib.context_restore(m.uc, m.context)
                address = m.head.rip
                m.lib.reg_write(m.uc, UC_X86_REG_RIP, &address)     # makes the library leave this block, too
    if m.stopping or m.renewing:
        again = True
        m.lib.emu_stop(m.uc)                        # it leaves before it runs this block
    if again:
        m.ticks -= size
        m.blocks -= 1
        m.block_size = 0


cdef void _due(cpu_t *m) noexcept nogil:
    """`next_event` is reached: Python's own event, or a look at the host's clock.

    The guest's time says little about the host's: two bytes of code that change themselves are translated anew each time,
    which takes as long as executing some thousand. So the host's clock is looked at often, and once it has gone on, whoever
    waits for the host (limits, keys, signals) gets his turn. What the guest sees does not depend on it.
    """
    cdef int64_t now
    m.next_look = m.ticks + LOOK_TICKS
    if m.ticks >= m.wanted_event:
        _event(m)
    else:
        now = _host_ns()
        if now >= m.host_due:
            m.host_due = now + HOST_DUE_NS
            _look(m)
    _arm(m)


cdef void _arm(cpu_t *m) noexcept nogil:
    """Set `next_event`. A stop is due at once, and so are translations to be dropped."""
    if m.stopping or m.renewing or m.code[m.memory_size >> 12]:
        m.next_event = 0
    else:
        m.next_event = min(m.wanted_event, m.next_look)


cdef void _look_soon(cpu_t *m) noexcept nogil:
    """An exit takes the host far longer than its few bytes say."""
    m.next_look -= min(m.next_look, <uint64_t>(LOOK_TICKS // LOOKS_EXITS))
    m.next_event = min(m.next_event, m.next_look)


cdef int64_t _host_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now)     # exact to some milliseconds, and read without a system call
    return <int64_t>now.tv_sec * 1_000_000_000 + now.tv_nsec


cdef void _uncount(cpu_t *m) noexcept nogil:
    """What is left of the running block will be counted when `run` is called again."""
    cdef uint64_t end = m.block_address + m.block_size, here = m.live.rip + m.live.segs[CS].base
    if m.block_address < here < end:
        m.ticks -= end - here
        m.blocks -= 1


cdef void _on_interrupt(void *uc, uint32_t number, void *user) noexcept nogil:
    """Intercepts, exceptions and software interrupts."""
    cdef cpu_t *m = <cpu_t *>user
    cdef int vector
    cdef uint8_t code[3]
    m.lib.context_save(uc, m.context)
    if m.stopping and number >= INTERCEPT:          # the instruction comes again, and it too
        _uncount(m)
        m.lib.emu_stop(uc)
        m.icpt.old_exception = -1
        m.lib.context_restore(uc, m.context)
        return
    if number == INTERCEPT + SVM_EXIT_MSR:
        m.icpt.old_exception = -1
        _exit_msr(m, m.icpt.error_code & 1)
    elif number == INTERCEPT + SVM_EXIT_HLT:
        if _ended_before(m):                        # see refused.pxi: the next block starts with what was refused
            m.icpt.old_exception = -1
            m.lib.context_restore(uc, m.context)
            return
        m.head.rip = m.block_address + m.block_size - m.head.segs[CS].base     # HLT may have prefixes
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
        elif vector == VECTOR_INVALID_OPCODE and _read_random(m):
            m.icpt.old_exception = -1
            m.ticks += EXCEPTION_TICKS
        elif vector == VECTOR_INVALID_OPCODE and _taken_for_sse(m):
            m.icpt.old_exception = -1
            m.head.hflags |= HF_OSFXSR              # the instruction comes again, and is translated then
        else:
            if vector == VECTOR_PAGE_FAULT:
                m.head.cr[2] = (<uint64_t *>(m.control + VMCB_EXIT_INFO_2))[0]
            m.ticks += EXCEPTION_TICKS
            _deliver(m, vector, _has_error(vector), <uint32_t>m.icpt.error_code)
    elif number < INTERCEPT:
        m.ticks += EXCEPTION_TICKS
        _software_interrupt(m, number)
    elif number == INTERCEPT + SVM_EXIT_SHUTDOWN:
        _halt_with(m, 1)
        return
    else:
        m.ticks += EXCEPTION_TICKS
        _deliver(m, VECTOR_INVALID_OPCODE, False, 0)
    m.lib.context_restore(uc, m.context)
    if m.ticks >= m.next_event and not m.stopping:
        _due(m)                                     # an exception whose handler cannot be fetched never comes to a block
    if m.next_processor != m.processor and not m.stopping:
        _switch(m)                                  # this one halted


cdef bint _on_interrupt_6(void *uc, void *user) noexcept nogil:
    """INT 6: the library takes it for an invalid instruction (which is an intercept here) and would end the run."""
    cdef cpu_t *m = <cpu_t *>user
    m.lib.context_save(uc, m.context)
    if not m.icpt.exception_is_int:
        return False
    m.live.rip = m.icpt.exception_next_rip          # as it does for every other number
    _on_interrupt(uc, VECTOR_INVALID_OPCODE, user)
    return True


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
