# String instructions, ports, and the loop that executes instructions.
#
# One iteration of a repeated instruction is one step of the budget, so that no REP runs longer than the caller allowed;
# registers are up to date after each iteration and RIP stays where it is, as on a processor that takes an interrupt there.
# The whole repeated instruction is one retired instruction.

cdef inline uint64_t source_address(const x86_state_t *c, const x86_insn_t *i) noexcept nogil:
    return linear(c, reg_get(c, 6 * 8, i.address_size) + (c.segment_base[i.segment] if i.segment >= 4 else 0))


cdef inline uint64_t target_address(const x86_state_t *c, const x86_insn_t *i) noexcept nogil:
    return reg_get(c, 7 * 8, i.address_size)


cdef inline void advance(x86_state_t *c, uint32_t number, uint32_t width, uint64_t by) noexcept nogil:
    reg_set(c, number * 8, width, reg_get(c, number * 8, width) + by)


cdef uint64_t bulk(x86_state_t *c, const x86_insn_t *i, uint64_t count) noexcept nogil:
    """Do as many iterations of a forward REP MOVS or REP STOS as stay in one page of RAM; returns how many."""
    cdef uint64_t to = target_address(c, i), come = 0, n, k
    cdef uint32_t size = i.size
    cdef uint8_t *target
    cdef const uint8_t *source = NULL
    n = (4096 - (to & 4095)) // size
    if i.op <= 0xa5:
        come = source_address(c, i)
        k = (4096 - (come & 4095)) // size
        n = k if k < n else n
    n = count if count < n else n
    n = c.budget if c.budget < n else n
    if n < 2:
        return 0
    target = ram(c, to, <uint32_t>(n * size), ACCESS_WRITE)
    if target == NULL:
        return 0
    if i.op <= 0xa5:
        source = ram(c, come, <uint32_t>(n * size), ACCESS_READ)
        if source == NULL:
            return 0
        if come + n * size <= to or to + n * size <= come:
            memcpy(target, source, n * size)
        else:                               # an overlap spreads element by element
            for k in range(n):
                bytes_set(target + k * size, size, bytes_get(source + k * size, size))
        advance(c, 6, i.address_size, n * size)
    elif size == 1:
        memset(target, <int>(c.regs[0] & 0xff), n)
    else:
        for k in range(n):
            bytes_set(target + k * size, size, c.regs[0])
    advance(c, 7, i.address_size, n * size)
    return n


cdef int string(x86_state_t *c, const x86_insn_t *i) noexcept nogil:
    """INS, OUTS, MOVS, CMPS, STOS, LODS and SCAS, with or without REP."""
    cdef uint32_t op = i.op & ~(<uint32_t>1), size = i.size, width = i.address_size
    cdef uint64_t a = 0, b = 0, r, n, carries = 0, count = 1, step = size if not c.eflags & F_DF else <uint64_t>0 - size
    cdef int code
    if i.rep:
        count = reg_get(c, 1 * 8, width)
        if count == 0:
            return DONE
    if op <= 0x6e:
        return string_port(c, i, count, step)
    while True:
        if i.rep:
            if c.budget == 0:
                return AGAIN
            if (op == 0xa4 or op == 0xaa) and not c.eflags & F_DF:
                n = bulk(c, i, count)
                if n:
                    c.budget -= n
                    count -= n
                    reg_set(c, 1 * 8, width, count)
                    if count == 0:
                        return DONE
                    continue
        if op == 0xa4:
            code = load(c, source_address(c, i), size, &a)
            if code == DONE:
                code = store(c, target_address(c, i), size, a)
        elif op == 0xaa:
            code = store(c, target_address(c, i), size, c.regs[0])
        elif op == 0xac:
            code = load(c, source_address(c, i), size, &a)
        elif op == 0xa6:
            code = load(c, source_address(c, i), size, &a)
            if code == DONE:
                code = load(c, target_address(c, i), size, &b)
        else:
            a = reg_get(c, 0, size)
            code = load(c, target_address(c, i), size, &b)
        if code != DONE:
            return code
        if op == 0xac:
            reg_set(c, 0, size, a)
        if op == 0xa6 or op == 0xae:
            r = alu(ALU_CMP, a, b, 0, mask_of(size), &carries)
            flags_result(c, r, carries, size)
        if op == 0xa4 or op == 0xa6 or op == 0xac:
            advance(c, 6, width, step)
        if op != 0xac:
            advance(c, 7, width, step)
        if not i.rep:
            return DONE
        c.replays = 0                       # the next iteration makes its own accesses
        c.replayed = 0
        c.budget -= 1
        count -= 1
        reg_set(c, 1 * 8, width, count)
        if count == 0 or ((op == 0xa6 or op == 0xae) and flag_zero(c) != (i.rep == 0xf3)):
            return DONE


cdef void port_exit(x86_state_t *c, const x86_insn_t *i, uint32_t port, bint write, uint64_t value) noexcept nogil:
    c.reason = X86_IO
    c.io_port = port & 0xffff
    c.io_size = i.size
    c.io_write = write
    c.io_string = 0
    c.io_replay = 0
    c.count = 1
    c.value = value


cdef int port_in(x86_state_t *c, const x86_insn_t *i) noexcept nogil:
    port_exit(c, i, <uint32_t>c.regs[2] if i.form else <uint32_t>i.imm, False, 0)
    return LEAVE


cdef int port_out(x86_state_t *c, const x86_insn_t *i) noexcept nogil:
    port_exit(c, i, <uint32_t>c.regs[2] if i.form else <uint32_t>i.imm, True, reg_get(c, 0, i.size))
    return LEAVE


cdef int string_port(x86_state_t *c, const x86_insn_t *i, uint64_t count, uint64_t step) noexcept nogil:
    """INS and OUTS: one exit for as many elements as are in RAM, at most `string_most`.

    Where the first element is not in RAM (or may not be accessed so), that element goes alone, through the
    exits of its port and of its memory.
    """
    cdef bint write = i.op >= 0x6e
    cdef uint32_t access = ACCESS_READ if write else ACCESS_WRITE, size = i.size, index = 6 if write else 7, n = 0
    cdef uint64_t at = source_address(c, i) if write else target_address(c, i), value = 0
    cdef int code
    if count > c.string_most:
        count = c.string_most
    while n < count and guest_pointer(c.memory, linear(c, at + n * step), size, access) != NULL:
        n += 1
    if n:
        port_exit(c, i, <uint32_t>c.regs[2], write, 0)
        c.io_string = 1
        c.count = n
        c.address = at
        c.element = step
        c.string_rep = i.rep != 0
        c.string_width = i.address_size
        c.string_index = index
        return LEAVE
    if write:
        code = load(c, at, size, &value)
        if code != DONE:
            return code
    code = outside(c, X86_IO, &value)
    if code != DONE:
        if c.reason == X86_IO:
            port_exit(c, i, <uint32_t>c.regs[2], write, value)
            c.io_replay = 1
        return code
    if not write:
        code = store(c, at, size, value)
        if code != DONE:
            return code
    c.attention = 1
    return string_advance(c, index, i.address_size, step, 1, i.rep != 0)


cdef int string_advance(x86_state_t *c, uint32_t index, uint32_t width, uint64_t step, uint64_t done, bint rep) noexcept nogil:
    """Account for `done` elements of INS or OUTS. AGAIN: there are more."""
    advance(c, index, width, step * done)
    if rep:
        advance(c, 1, width, <uint64_t>0 - done)
        if reg_get(c, 1 * 8, width):
            return AGAIN
    return DONE


cdef uint32_t fetch(const x86_state_t *c, uint64_t rip, uint8_t *code) noexcept nogil:
    """Copy up to 16 bytes of code that may cross into the next page; returns how many there are."""
    cdef uint32_t n = 0
    cdef uint8_t *p
    memset(code, 0, 16)
    while n < 16:
        p = ram(c, linear(c, rip + n), 1, ACCESS_EXECUTE)
        if p == NULL:
            break
        code[n] = p[0]
        n += 1
    return n


cdef uint32_t x86_run(x86_state_t *c, uint64_t limit) noexcept nogil:
    """Execute up to `limit` steps; returns, and leaves in `reason`, why it stopped.

    The caller has completed the exit before, and holds a reference to the memory.
    """
    cdef const guest_memory_t *m = c.memory
    cdef x86_insn_t *i
    cdef x86_insn_t fresh
    cdef uint8_t copy[16]
    cdef const uint8_t *code
    cdef uint64_t rip
    cdef uint32_t available, status
    cdef int done
    c.budget = limit
    c.replayed = 0
    c.reason = X86_LIMIT
    c.attention = 1 if c.shadow or c.window or c.nmi_window or c.replays else 0
    if not c.shadow and ((c.window and c.eflags & F_IF) or (c.nmi_window and not c.nmi_masked)):
        c.reason = X86_WINDOW
        return X86_WINDOW
    while c.budget:
        rip = c.rip
        if rip < m.size and (rip & 4095) <= 4080 and (m.pages[rip >> 12].access & ACCESS_EXECUTE) == ACCESS_EXECUTE:
            code = m.base + rip
            available = 16
        else:
            available = fetch(c, rip, copy)
            code = copy
        i = &c.cache[rip & (X86_CACHE - 1)]
        # comparing the bytes costs little and holds whoever changed the code: the guest, a device or another thread
        if (i.rip != rip or (bytes_get(code, 8) ^ i.raw0) & i.mask0 or (bytes_get(code + 8, 8) ^ i.raw1) & i.mask1
                or i.length > available or available == 0):
            if available == 16 and code != copy:
                copy_from_shared(copy, code, 16)
            status = <uint32_t>decode(c, rip, copy, available, &fresh)
            if status:
                c.reason = status
                c.failed = fresh.length
                return status
            i[0] = fresh
        c.next = linear(c, rip + i.length)
        done = execute(c, i)
        if done == DONE:
            c.rip = c.next
            c.retired += 1
            if c.budget:
                c.budget -= 1
        elif done == LEAVE:
            if c.reason == X86_HALT:
                c.rip = c.next
                c.retired += 1
                c.shadow = 0
            c.failed = i.length
            return c.reason
        else:
            if done == FAULTED:
                c.rip = c.next
            c.reason = X86_LIMIT
            if c.budget:
                c.budget -= 1
        if c.attention:
            c.replays = 0
            c.replayed = 0
            c.attention = 0
            if c.shadow:
                c.shadow -= 1
                c.attention = 1
            if c.window or c.nmi_window:
                c.attention = 1
                if not c.shadow and ((c.window and c.eflags & F_IF) or (c.nmi_window and not c.nmi_masked)):
                    c.reason = X86_WINDOW
                    return X86_WINDOW
    return X86_LIMIT
