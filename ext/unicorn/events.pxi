# Exceptions and interrupts, delivered through the guest's own tables in its own memory.


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
    """Stop before the next block: only then the library is told, because it skips hooks once it is."""
    m.stopping = True
    m.next_event = 0
    m.stop_reason = reason


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
