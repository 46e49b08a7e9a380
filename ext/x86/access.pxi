# Registers, and loads and stores of the guest.
#
# An access outside of the RAM that the guest may use leaves the interpreter in the middle of an instruction. The instruction
# is then executed again from its start, with the answer: each such access has a number within its instruction, and those
# already made are replayed from `replay` and not made twice. So an instruction changes registers and flags only after its
# last access, and its stores to RAM before a later exit are such that repeating them is harmless.

cdef enum:
    DONE = 0        # go on with the next instruction
    LEAVE = 1       # an exit: `reason` says why; the instruction is not finished
    FAULTED = 2     # an exception was delivered to the guest: the instruction does not count
    AGAIN = 3       # not finished, nothing to answer: execute it again (lost race of a locked access, part of a REP)

cdef enum:
    DE = 0
    DB = 1
    BP = 3
    OVERFLOW_TRAP = 4
    UD = 6
    SS_FAULT = 12
    GP = 13
    AC_FAULT = 17

cdef extern from *:
    """
    #define X86_CANONICAL ((uint64_t)1 << 47)
    /* the atomic exchange of a locked instruction; 0 if memory no longer holds `old`. Unaligned: not atomic. */
    static inline int x86_exchange(uint8_t *p, uint64_t old, uint64_t value, uint32_t size) {
        uint64_t have = 0;
        if (((uintptr_t)p & (size - 1)) == 0) {
            uint8_t o1 = (uint8_t)old; uint16_t o2 = (uint16_t)old; uint32_t o4 = (uint32_t)old;
            switch (size) {
            case 1: return __atomic_compare_exchange_n(p, &o1, (uint8_t)value, 0, 5, 5);
            case 2: return __atomic_compare_exchange_n((uint16_t *)p, &o2, (uint16_t)value, 0, 5, 5);
            case 4: return __atomic_compare_exchange_n((uint32_t *)p, &o4, (uint32_t)value, 0, 5, 5);
            default: return __atomic_compare_exchange_n((uint64_t *)p, &old, value, 0, 5, 5);
            }
        }
        memcpy(&have, p, size);
        if (have != old) return 0;
        memcpy(p, &value, size);
        return 1;
    }
    """
    uint64_t CANONICAL "X86_CANONICAL"
    int x86_exchange(uint8_t *p, uint64_t old, uint64_t value, uint32_t size) nogil


cdef inline uint64_t reg_get(const x86_state_t *c, uint32_t at, uint32_t size) noexcept nogil:
    cdef const uint8_t *p = <const uint8_t *>c.regs + at
    if size == 8:
        return (<const uint64_t *>p)[0]
    if size == 4:
        return (<const uint32_t *>p)[0]
    if size == 1:
        return p[0]
    return (<const uint16_t *>p)[0]


cdef inline void reg_set(x86_state_t *c, uint32_t at, uint32_t size, uint64_t value) noexcept nogil:
    cdef uint8_t *p = <uint8_t *>c.regs + at
    if size == 8:
        (<uint64_t *>p)[0] = value
    elif size == 4:
        (<uint64_t *>p)[0] = <uint32_t>value
    elif size == 1:
        p[0] = <uint8_t>value
    else:
        (<uint16_t *>p)[0] = <uint16_t>value


cdef inline uint64_t linear(const x86_state_t *c, uint64_t address) noexcept nogil:
    return address if c.long_mode else <uint32_t>address


cdef inline uint64_t address_of(const x86_state_t *c, const x86_insn_t *i) noexcept nogil:
    """The linear address of the r/m operand."""
    cdef uint64_t a = c.regs[i.base] + (c.regs[i.index] << i.scale) + <uint64_t>i.disp
    if i.address_size == 4:
        a = <uint32_t>a
    elif i.address_size == 2:
        a = <uint16_t>a
    if i.segment >= 4:
        a += c.segment_base[i.segment]
    return linear(c, a)


cdef inline uint64_t effective_address(const x86_state_t *c, const x86_insn_t *i) noexcept nogil:
    """The r/m operand's address without its segment, as LEA gives it."""
    cdef uint64_t a = c.regs[i.base] + (c.regs[i.index] << i.scale) + <uint64_t>i.disp
    if i.address_size == 4:
        return <uint32_t>a
    if i.address_size == 2:
        return <uint16_t>a
    return a


cdef inline uint64_t bytes_get(const uint8_t *p, uint32_t size) noexcept nogil:
    cdef uint64_t v8 = 0
    cdef uint32_t v4
    cdef uint16_t v2
    if size == 8:
        memcpy(&v8, p, 8)
        return v8
    if size == 4:
        memcpy(&v4, p, 4)
        return v4
    if size == 1:
        return p[0]
    memcpy(&v2, p, 2)
    return v2


cdef inline void bytes_set(uint8_t *p, uint32_t size, uint64_t value) noexcept nogil:
    if size == 8:
        memcpy(p, &value, 8)
    elif size == 4:
        memcpy(p, &value, 4)
    elif size == 1:
        p[0] = <uint8_t>value
    else:
        memcpy(p, &value, 2)


cdef inline uint8_t *ram(const x86_state_t *c, uint64_t gpa, uint32_t size, uint32_t access) noexcept nogil:
    """The guest's bytes, or NULL if they are not all in one page of RAM that may be accessed so."""
    cdef const guest_memory_t *m = c.memory
    if gpa < m.size and (gpa & 4095) + size <= 4096 and (m.pages[gpa >> 12].access & access) == access:
        return m.base + gpa
    return NULL


cdef int outside(x86_state_t *c, uint32_t reason, uint64_t *value) noexcept nogil:
    """Make, or replay, an access that the hypervisor answers. DONE: `value` is the answer."""
    cdef uint32_t number = c.replayed
    c.attention = 1
    if number < c.replays:
        c.replayed += 1
        value[0] = c.replay[number]
        return DONE
    if number >= X86_REPLAYS:
        c.reason = X86_UNKNOWN
        return LEAVE
    c.reason = reason
    return LEAVE


cdef int outside_memory(x86_state_t *c, uint64_t gpa, uint32_t size, bint write, uint64_t *value) noexcept nogil:
    cdef uint64_t stored = value[0]
    cdef int code = outside(c, X86_MMIO, value)
    if code == LEAVE and c.reason == X86_MMIO:
        c.address = gpa
        c.size = size
        c.write = write
        c.value = stored if write else 0
    return code


cdef int split(x86_state_t *c, uint64_t gpa, uint32_t size, bint write, uint64_t *value) noexcept nogil:
    """An access that is not simply in one page of RAM: page by page, to devices in naturally sized pieces."""
    cdef uint64_t result = 0, part, at
    cdef uint32_t done = 0, n
    cdef uint8_t *p
    cdef int code
    if c.long_mode and (((gpa + CANONICAL) | (gpa + size - 1 + CANONICAL)) >> 48):
        return raise_exception(c, GP, True, 0)      # not canonical
    while done < size:
        at = linear(c, gpa + done)
        n = size - done
        if (at & 4095) + n > 4096:
            n = <uint32_t>(4096 - (at & 4095))
        p = ram(c, at, n, ACCESS_WRITE if write else ACCESS_READ)
        if p != NULL:
            if write:
                part = value[0] >> (8 * done)
                memcpy(p, &part, n)
            else:
                part = 0
                memcpy(&part, p, n)
        else:
            n = 8 if n >= 8 else 4 if n >= 4 else 2 if n >= 2 else 1
            part = (value[0] >> (8 * done)) & mask_of(n) if write else 0
            code = outside_memory(c, at, n, write, &part)
            if code != DONE:
                return code
            part &= mask_of(n)
        if not write:
            result |= part << (8 * done)
        done += n
    if not write:
        value[0] = result
    return DONE


cdef inline int load(x86_state_t *c, uint64_t gpa, uint32_t size, uint64_t *value) noexcept nogil:
    cdef const uint8_t *p = ram(c, gpa, size, ACCESS_READ)
    if p != NULL:
        value[0] = bytes_get(p, size)
        return DONE
    return split(c, gpa, size, False, value)


cdef inline int store(x86_state_t *c, uint64_t gpa, uint32_t size, uint64_t value) noexcept nogil:
    cdef uint8_t *p = ram(c, gpa, size, ACCESS_WRITE)
    cdef uint64_t copy = value
    if p != NULL:
        bytes_set(p, size, value)
        return DONE
    return split(c, gpa, size, True, &copy)


cdef inline int operand_get(x86_state_t *c, const x86_insn_t *i, uint32_t size, uint64_t *value) noexcept nogil:
    """Read the r/m operand."""
    if not i.memory:
        value[0] = reg_get(c, i.rm_at, size)
        return DONE
    return load(c, address_of(c, i), size, value)


cdef inline int operand_set(x86_state_t *c, const x86_insn_t *i, uint32_t size, uint64_t value) noexcept nogil:
    """Write the r/m operand."""
    if not i.memory:
        reg_set(c, i.rm_at, size, value)
        return DONE
    return store(c, address_of(c, i), size, value)


cdef inline int replace(x86_state_t *c, const x86_insn_t *i, uint64_t gpa, uint32_t size, uint64_t old, uint64_t value,
                        bint lock) noexcept nogil:
    """Write back an operand in memory that was read at `gpa`; atomically if `lock`."""
    cdef uint8_t *p
    if lock:
        p = ram(c, gpa, size, ACCESS_READ | ACCESS_WRITE)
        if p != NULL:
            return DONE if x86_exchange(p, old, value, size) else AGAIN
    return store(c, gpa, size, value)


cdef inline int operand_replace(x86_state_t *c, const x86_insn_t *i, uint32_t size, uint64_t old, uint64_t value) noexcept nogil:
    """Write back the r/m operand of a read-modify-write instruction."""
    if not i.memory:
        reg_set(c, i.rm_at, size, value)
        return DONE
    return replace(c, i, address_of(c, i), size, old, value, i.lock)


cdef inline uint64_t stack_pointer(const x86_state_t *c) noexcept nogil:
    return c.regs[4] if c.long_mode else <uint32_t>c.regs[4]


cdef inline int push(x86_state_t *c, uint32_t size, uint64_t value) noexcept nogil:
    """Push; RSP changes only if the store succeeds."""
    cdef uint64_t at = linear(c, c.regs[4] - size)
    cdef int code = store(c, at, size, value)
    if code == DONE:
        c.regs[4] = at
    return code


cdef inline int pop(x86_state_t *c, uint32_t size, uint64_t *value) noexcept nogil:
    """Read the top of the stack; the caller moves RSP when the instruction can no longer fail."""
    return load(c, stack_pointer(c), size, value)


cdef inline void drop(x86_state_t *c, uint64_t count) noexcept nogil:
    c.regs[4] = linear(c, c.regs[4] + count)


cdef int raise_exception(x86_state_t *c, uint32_t vector, bint has_code, uint64_t error) noexcept nogil:
    """Deliver a fault at the current instruction: FAULTED, or LEAVE with X86_SHUTDOWN if the guest has no gate."""
    return LEAVE if deliver(c, vector, has_code, error, c.rip) else FAULTED


cdef int deliver(x86_state_t *c, uint32_t vector, bint has_code, uint64_t error, uint64_t return_to) noexcept nogil:
    """Enter the guest's handler through its IDT. 0, or -1 with X86_SHUTDOWN and nothing changed."""
    cdef uint32_t entry = 16 if c.long_mode else 8, kind, word = 8 if c.long_mode else 4, count = 0, n
    cdef uint64_t gate, high = 0, target, flags = flags_read(c), top
    cdef uint8_t *p
    cdef uint64_t frame[6]
    c.reason = X86_SHUTDOWN
    c.vector = vector
    if <uint64_t>vector * entry + entry - 1 > c.idt_limit:
        return -1
    p = ram(c, linear(c, c.idt_base + <uint64_t>vector * entry), 8, ACCESS_READ)
    if p == NULL:
        return -1
    gate = bytes_get(p, 8)
    if c.long_mode:
        p = ram(c, c.idt_base + <uint64_t>vector * entry + 8, 8, ACCESS_READ)
        if p == NULL:
            return -1
        high = <uint32_t>bytes_get(p, 8)
        if (gate >> 32) & 7:            # an interrupt stack table needs a task state segment
            return -1
    kind = (gate >> 40) & 0xff
    if kind & 0x9f != 0x8e and kind & 0x9f != 0x8f:     # a present interrupt or trap gate
        return -1
    target = (gate & 0xffff) | (((gate >> 48) & 0xffff) << 16) | (high << 32)
    top = stack_pointer(c)
    if c.long_mode:
        frame[count] = c.selector[2]
        frame[count + 1] = top
        count += 2
        top &= ~(<uint64_t>15)
    frame[count] = flags
    frame[count + 1] = c.selector[1]
    frame[count + 2] = return_to
    count += 3
    if has_code:
        frame[count] = error
        count += 1
    for n in range(count):
        if ram(c, linear(c, top - word * (n + 1)), word, ACCESS_READ | ACCESS_WRITE) == NULL:
            return -1
    for n in range(count):
        top = linear(c, top - word)
        bytes_set(c.memory.base + top, word, frame[n])
    c.regs[4] = top
    c.selector[1] = <uint16_t>(gate >> 16)
    flags &= ~(<uint64_t>(F_TF | F_NT | F_RF | F_VM))
    if kind & 1 == 0:
        flags &= ~(<uint64_t>F_IF)
    flags_write(c, flags)
    c.next = target
    c.shadow = 0
    return 0
