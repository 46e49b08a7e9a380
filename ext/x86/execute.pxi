# What instructions do. Each returns DONE, LEAVE, FAULTED or AGAIN (access.pxi) and changes registers and flags only after
# its last access to memory.

cdef inline void branch(x86_state_t *c, const x86_insn_t *i, uint64_t target) noexcept nogil:
    c.next = target if i.size == 8 else <uint32_t>target if i.size == 4 else <uint16_t>target


cdef inline int undefined(x86_state_t *c) noexcept nogil:
    return raise_exception(c, UD, False, 0)


cdef int execute(x86_state_t *c, const x86_insn_t *i) noexcept nogil:
    """Execute one decoded instruction; `next` is already the address behind it."""
    cdef uint64_t a = 0, b = 0, r, carries = 0, mask, at
    cdef uint32_t size = i.size, kind = i.kind
    cdef int code

    if kind == K_MOV:
        return operand_set(c, i, size, reg_get(c, i.reg_at, size))
    elif kind == K_MOV_LOAD:
        code = operand_get(c, i, size, &a)
        if code == DONE:
            reg_set(c, i.reg_at, size, a)
        return code
    elif kind == K_MOV_REG_IMM:
        reg_set(c, i.reg_at, size, <uint64_t>i.imm)
        return DONE
    elif kind == K_MOV_IMM:
        return operand_set(c, i, size, <uint64_t>i.imm)
    elif kind == K_ALU:
        code = operand_get(c, i, size, &a)
        if code != DONE:
            return code
        b = reg_get(c, i.reg_at, size)
        mask = mask_of(size)
        if i.form:                      # the register is the destination
            r = alu(i.sub, b, a, c.carry, mask, &carries)
            if i.sub != ALU_CMP:
                reg_set(c, i.reg_at, size, r)
        else:
            r = alu(i.sub, a, b, c.carry, mask, &carries)
            if i.sub != ALU_CMP:
                code = operand_replace(c, i, size, a, r)
                if code != DONE:
                    return code
        flags_result(c, r, carries, size)
        return DONE
    elif kind == K_ALU_IMM:
        code = operand_get(c, i, size, &a)
        if code != DONE:
            return code
        mask = mask_of(size)
        r = alu(i.sub, a, <uint64_t>i.imm & mask, c.carry, mask, &carries)
        if i.sub != ALU_CMP:
            code = operand_replace(c, i, size, a, r)
            if code != DONE:
                return code
        flags_result(c, r, carries, size)
        return DONE
    elif kind == K_TEST or kind == K_TEST_IMM:
        code = operand_get(c, i, size, &a)
        if code == DONE:
            b = reg_get(c, i.reg_at, size) if kind == K_TEST else <uint64_t>i.imm & mask_of(size)
            flags_result(c, a & b, 0, size)
        return code
    elif kind == K_JCC:
        if condition(c, i.sub):
            branch(c, i, c.next + <uint64_t>i.imm)
        return DONE
    elif kind == K_JMP:
        branch(c, i, c.next + <uint64_t>i.imm)
        return DONE
    elif kind == K_LEA:
        reg_set(c, i.reg_at, size, effective_address(c, i))
        return DONE
    elif kind == K_INC or kind == K_DEC:
        return increment(c, i, kind == K_DEC)
    elif kind == K_PUSH_REG:
        return push(c, size, reg_get(c, i.reg * 8, size))
    elif kind == K_POP_REG:
        code = pop(c, size, &a)
        if code == DONE:
            drop(c, size)
            reg_set(c, i.reg * 8, size, a)
        return code
    elif kind == K_CALL:
        code = push(c, size, c.next)
        if code == DONE:
            branch(c, i, c.next + <uint64_t>i.imm)
        return code
    elif kind == K_RET:
        code = pop(c, size, &a)
        if code == DONE:
            drop(c, size + <uint64_t>i.imm)
            branch(c, i, a)
        return code
    elif kind == K_MOVZX or kind == K_MOVSX:
        code = operand_get(c, i, i.form, &a)
        if code == DONE:
            reg_set(c, i.reg_at, size, a if kind == K_MOVZX else <uint64_t>extend(a, i.form))
        return code
    elif kind == K_MOVSXD:
        if not c.long_mode:
            c.reason = X86_UNKNOWN      # ARPL
            return LEAVE
        code = operand_get(c, i, 4 if size == 8 else size, &a)
        if code == DONE:
            reg_set(c, i.reg_at, size, <uint64_t>extend(a, 4) if size == 8 else a)
        return code
    elif kind == K_CMOV:
        code = operand_get(c, i, size, &a)
        if code == DONE:                # the load happens, and upper halves are cleared, even if the condition fails
            reg_set(c, i.reg_at, size, a if condition(c, i.sub) else reg_get(c, i.reg_at, size))
        return code
    elif kind == K_SETCC:
        return operand_set(c, i, 1, condition(c, i.sub))
    elif kind == K_SHIFT:
        return shift_rotate(c, i)
    elif kind == K_GROUP3:
        return group3(c, i)
    elif kind == K_GROUP4:
        return increment(c, i, i.sub == 1)
    elif kind == K_GROUP5:
        if i.sub < 2:
            return increment(c, i, i.sub == 1)
        code = operand_get(c, i, size, &a)
        if code != DONE:
            return code
        if i.sub == 6:
            return push(c, size, a)
        if i.sub == 2:
            code = push(c, size, c.next)
            if code != DONE:
                return code
        branch(c, i, a)
        return DONE
    elif kind == K_IMUL or kind == K_IMUL_IMM:
        return multiply_signed(c, i)
    elif kind == K_STRING:
        return string(c, i)
    elif kind == K_IN:
        return port_in(c, i)
    elif kind == K_OUT:
        return port_out(c, i)
    elif kind == K_LOOP:
        return loop(c, i)
    elif kind == K_XCHG:
        code = operand_get(c, i, size, &a)
        if code != DONE:
            return code
        b = reg_get(c, i.reg_at, size)
        if i.memory:
            code = replace(c, i, address_of(c, i), size, a, b, True)    # always locked
            if code != DONE:
                return code
        else:
            reg_set(c, i.rm_at, size, b)
        reg_set(c, i.reg_at, size, a)
        return DONE
    elif kind == K_XCHG_ACC:
        a = reg_get(c, i.reg * 8, size)
        reg_set(c, i.reg * 8, size, reg_get(c, 0, size))
        reg_set(c, 0, size, a)
        return DONE
    elif kind == K_PUSH_IMM:
        return push(c, size, <uint64_t>i.imm)
    elif kind == K_POP_RM:
        code = pop(c, size, &a)
        if code != DONE:
            return code
        b = c.regs[4]
        drop(c, size)                   # an address through RSP uses its new value
        code = operand_set(c, i, size, a)
        if code != DONE:
            c.regs[4] = b
        return code
    elif kind == K_LEAVE:
        code = load(c, linear(c, c.regs[5]), size, &a)
        if code == DONE:
            c.regs[4] = linear(c, c.regs[5] + size)
            reg_set(c, 5 * 8, size, a)
        return code
    elif kind == K_ENTER:
        code = push(c, size, reg_get(c, 5 * 8, size))
        if code == DONE:
            reg_set(c, 5 * 8, size, c.regs[4])
            c.regs[4] = linear(c, c.regs[4] - <uint64_t>i.imm)
        return code
    elif kind == K_CONVERT:
        reg_set(c, 0, size, <uint64_t>extend(c.regs[0], size // 2))
        return DONE
    elif kind == K_SPREAD:
        reg_set(c, 2 * 8, size, <uint64_t>-1 if extend(c.regs[0], size) < 0 else 0)
        return DONE
    elif kind == K_MOFFS:
        if i.form:
            return store(c, address_of(c, i), size, reg_get(c, 0, size))
        code = load(c, address_of(c, i), size, &a)
        if code == DONE:
            reg_set(c, 0, size, a)
        return code
    elif kind == K_NOP or kind == K_FENCE:
        return DONE
    elif kind == K_BT or kind == K_BT_IMM:
        return bit_test(c, i)
    elif kind == K_BSF or kind == K_BSR:
        return bit_scan(c, i)
    elif kind == K_POPCNT:
        code = operand_get(c, i, size, &a)
        if code == DONE:
            flags_write(c, (flags_read(c) & ~(<uint64_t>(ARITHMETIC | F_CF))) | (F_ZF if a == 0 else 0))
            reg_set(c, i.reg_at, size, <uint64_t>x86_popcount(a))
        return code
    elif kind == K_SHIFT_DOUBLE:
        return shift_double(c, i)
    elif kind == K_CMPXCHG:
        code = operand_get(c, i, size, &a)
        if code != DONE:
            return code
        b = reg_get(c, 0, size)
        r = alu(ALU_CMP, b, a, 0, mask_of(size), &carries)
        if r == 0:
            code = operand_replace(c, i, size, a, reg_get(c, i.reg_at, size))
        elif i.memory:                  # the write happens in any case
            code = operand_replace(c, i, size, a, a)
        if code != DONE:
            return code
        if r != 0:
            reg_set(c, 0, size, a)
        flags_result(c, r, carries, size)
        return DONE
    elif kind == K_XADD:
        code = operand_get(c, i, size, &a)
        if code != DONE:
            return code
        b = reg_get(c, i.reg_at, size)
        r = alu(ALU_ADD, a, b, 0, mask_of(size), &carries)
        if i.memory:
            code = operand_replace(c, i, size, a, r)
            if code != DONE:
                return code
        reg_set(c, i.reg_at, size, a)
        if not i.memory:
            reg_set(c, i.rm_at, size, r)
        flags_result(c, r, carries, size)
        return DONE
    elif kind == K_BSWAP:
        if size == 8:
            c.regs[i.reg] = x86_swap64(c.regs[i.reg])
        elif size == 4:
            c.regs[i.reg] = x86_swap32(<uint32_t>c.regs[i.reg])
        else:
            reg_set(c, i.reg * 8, 2, 0)     # undefined; processors clear it
        return DONE
    return execute_rare(c, i)


cdef int execute_rare(x86_state_t *c, const x86_insn_t *i) noexcept nogil:
    """Instructions that no inner loop consists of."""
    cdef uint64_t a = 0, b = 0
    cdef uint32_t size = i.size, kind = i.kind, n, which
    cdef uint64_t popped[8]
    cdef int code

    if kind == K_FLAG:
        if i.sub == 0x5:
            c.carry ^= 1
        elif i.sub == 0x8 or i.sub == 0x9:
            c.carry = i.sub & 1
        elif i.sub == 0xa:
            c.eflags &= ~(<uint64_t>F_IF)
        elif i.sub == 0xb:
            if not c.eflags & F_IF:           # interrupts wait for the end of the next instruction
                c.shadow = 2
                c.attention = 1
            c.eflags |= F_IF
        elif i.sub == 0xc:
            c.eflags &= ~(<uint64_t>F_DF)
        else:
            c.eflags |= F_DF
        return DONE
    elif kind == K_PUSHF:
        return push(c, size, flags_read(c) & ~(<uint64_t>(F_VM | F_RF)))
    elif kind == K_POPF:
        code = pop(c, size, &a)
        if code != DONE:
            return code
        if not flags_load(c, a, size):
            return LEAVE
        drop(c, size)
        return DONE
    elif kind == K_SAHF:
        a = reg_get(c, 1, 1)
        flags_write(c, (flags_read(c) & ~(<uint64_t>(F_SF | F_ZF | F_AF | F_PF | F_CF))) | (a & (F_SF | F_ZF | F_AF | F_PF | F_CF)))
        return DONE
    elif kind == K_LAHF:
        reg_set(c, 1, 1, flags_read(c))
        return DONE
    elif kind == K_XLAT:
        a = c.regs[3] + (c.regs[0] & 0xff)
        a = a if i.address_size == 8 else <uint32_t>a if i.address_size == 4 else <uint16_t>a
        code = load(c, linear(c, a + (c.segment_base[i.segment] if i.segment >= 4 else 0)), 1, &b)
        if code == DONE:
            reg_set(c, 0, 1, b)
        return code
    elif kind == K_PUSHA:
        for n in range(8):
            code = store(c, linear(c, c.regs[4] - size * (n + 1)), size, c.regs[n])
            if code != DONE:
                return code
        c.regs[4] = linear(c, c.regs[4] - size * 8)
        return DONE
    elif kind == K_POPA:
        for n in range(8):
            code = load(c, linear(c, c.regs[4] + size * n), size, &popped[n])
            if code != DONE:
                return code
        for n in range(8):
            if n != 3:                      # the saved ESP is not loaded
                reg_set(c, (7 - n) * 8, size, popped[n])
        drop(c, size * 8)
        return DONE
    elif kind == K_PUSH_SEG:
        return push(c, size, c.selector[i.sub])
    elif kind == K_MOV_FROM_SEG:
        return operand_set(c, i, 2 if i.memory else size, c.selector[i.sub])
    elif kind == K_DECIMAL:
        return decimal(c, i)
    elif kind == K_CMPXCHG8B:
        return compare_exchange_pair(c, i)
    elif kind == K_UD:
        return undefined(c)
    elif kind == K_INT3 or kind == K_INT or kind == K_INTO:
        if kind == K_INTO and not flag_overflow(c):
            return DONE
        n = BP if kind == K_INT3 else OVERFLOW_TRAP if kind == K_INTO else <uint32_t>i.imm
        return LEAVE if deliver(c, n, False, 0, c.next) else DONE
    elif kind == K_IRET:
        return interrupt_return(c, i)
    elif kind == K_RDTSC:
        a = c.retired + c.tsc_offset        # one tick an instruction
        c.regs[0] = <uint32_t>a
        c.regs[2] = a >> 32
        return DONE
    elif kind == K_SYSTEM and i.sub != 8:
        a = address_of(c, i)
        which = 8 if c.long_mode else 4
        if i.sub == 1:
            code = store(c, a, 2, c.idt_limit)
            return store(c, linear(c, a + 2), which, c.idt_base) if code == DONE else code
        code = load(c, a, 2, &b)
        if code == DONE:
            code = load(c, linear(c, a + 2), which, &a)
        if code == DONE:
            c.idt_limit = <uint32_t>b
            c.idt_base = a
        return code
    # what remains leaves to the hypervisor, which completes it
    if kind == K_HLT:
        c.reason = X86_HALT
    elif kind == K_CPUID:
        c.reason = X86_CPUID
    elif kind == K_RDMSR:
        c.reason = X86_RDMSR
    elif kind == K_WRMSR:
        c.reason = X86_WRMSR
    elif kind == K_SYSTEM:
        c.reason = X86_HYPERCALL
    else:
        c.reason = X86_UNKNOWN
    return LEAVE


cdef bint flags_load(x86_state_t *c, uint64_t value, uint32_t size) noexcept nogil:
    """POPF and IRET in ring 0. False: single-stepping was asked for, which there is not."""
    cdef uint64_t change = F_CF | ARITHMETIC | LOADABLE
    if value & F_TF:
        c.reason = X86_UNKNOWN
        return False
    if size == 2:
        change &= 0xffff
    flags_write(c, (flags_read(c) & ~change & ~(<uint64_t>F_RF)) | (value & change))
    c.attention = 1
    return True


cdef int interrupt_return(x86_state_t *c, const x86_insn_t *i) noexcept nogil:
    """IRET to the same privilege level; in long mode RSP and SS are popped too."""
    cdef uint32_t size = i.size, count = 5 if c.long_mode else 3, n
    cdef uint64_t frame[5]
    cdef int code
    for n in range(count):
        code = load(c, linear(c, c.regs[4] + size * n), size, &frame[n])
        if code != DONE:
            return code
    if not flags_load(c, frame[2], size):
        return LEAVE
    c.nmi_masked = 0
    c.selector[1] = <uint16_t>frame[1]
    if c.long_mode:
        c.regs[4] = frame[3]
        c.selector[2] = <uint16_t>frame[4]
    else:
        drop(c, 3 * size)
    branch(c, i, frame[0])
    return DONE


cdef int compare_exchange_pair(x86_state_t *c, const x86_insn_t *i) noexcept nogil:
    """CMPXCHG8B and CMPXCHG16B; two halves, so not atomic towards other threads of the host."""
    cdef uint64_t low = 0, high = 0, at = address_of(c, i)
    cdef uint32_t size = 8 if i.size == 8 else 4
    cdef bint same
    cdef int code
    if size == 8 and at & 15:
        return raise_exception(c, GP, True, 0)
    code = load(c, at, size, &low)
    if code == DONE:
        code = load(c, linear(c, at + size), size, &high)
    if code != DONE:
        return code
    same = low == reg_get(c, 0, size) and high == reg_get(c, 2 * 8, size)
    code = store(c, at, size, reg_get(c, 3 * 8, size) if same else low)
    if code == DONE:
        code = store(c, linear(c, at + size), size, reg_get(c, 1 * 8, size) if same else high)
    if code != DONE:
        return code
    if not same:
        reg_set(c, 0, size, low)
        reg_set(c, 2 * 8, size, high)
    flags_write(c, (flags_read(c) & ~(<uint64_t>F_ZF)) | (F_ZF if same else 0))
    return DONE


cdef int loop(x86_state_t *c, const x86_insn_t *i) noexcept nogil:
    """LOOPNE, LOOPE, LOOP and JCXZ; the counter is as wide as addresses are."""
    cdef uint64_t count = reg_get(c, 1 * 8, i.address_size)
    if i.sub == 3:
        if count == 0:
            branch(c, i, c.next + <uint64_t>i.imm)
        return DONE
    count = (count - 1) & mask_of(i.address_size)
    reg_set(c, 1 * 8, i.address_size, count)
    if count and (i.sub == 2 or flag_zero(c) == i.sub):
        branch(c, i, c.next + <uint64_t>i.imm)
    return DONE
