# Shifts, multiplication and division, bits, and decimal adjustments: the instructions with flags of their own.

cdef inline int increment(x86_state_t *c, const x86_insn_t *i, bint down) noexcept nogil:
    """INC and DEC: everything but CF."""
    cdef uint64_t a = 0, r, carries = 0, carry = c.carry
    cdef int code = operand_get(c, i, i.size, &a)
    if code != DONE:
        return code
    r = alu(ALU_SUB if down else ALU_ADD, a, 1, 0, mask_of(i.size), &carries)
    code = operand_replace(c, i, i.size, a, r)
    if code != DONE:
        return code
    flags_result(c, r, carries, i.size)
    c.carry = carry
    return DONE


cdef int shift_rotate(x86_state_t *c, const x86_insn_t *i) noexcept nogil:
    cdef uint64_t a = 0, r, flags = 0
    cdef uint32_t size = i.size, count
    cdef int code = operand_get(c, i, size, &a)
    if code != DONE:
        return code
    count = (<uint32_t>i.imm if i.form == 0 else 1 if i.form == 1 else <uint32_t>c.regs[1]) & (63 if size == 8 else 31)
    if count == 0:
        return operand_set(c, i, size, a)
    r = rotate(c, i.sub, a, count, size, &flags) if i.sub < 4 else shift(i.sub, a, count, size, &flags)
    code = operand_replace(c, i, size, a, r)
    if code != DONE:
        return code
    if i.sub < 4:
        flags_carry_overflow(c, flags & F_CF, (flags & F_OF) != 0)
    else:
        flags_shifted(c, r, flags & F_CF, (flags & F_OF) != 0, size)
    return DONE


cdef int shift_double(x86_state_t *c, const x86_insn_t *i) noexcept nogil:
    """SHLD and SHRD. For 16-bit operands a count above 16 is undefined: the destination is shifted in again."""
    cdef uint64_t a = 0, b, r, carry, mask = mask_of(i.size)
    cdef uint32_t size = i.size, bits = 8 * size, count
    cdef int code = operand_get(c, i, size, &a)
    if code != DONE:
        return code
    count = (<uint32_t>c.regs[1] if i.op & 1 else <uint32_t>i.imm) & (63 if size == 8 else 31)
    if count == 0:
        return operand_set(c, i, size, a)
    b = reg_get(c, i.reg_at, size)
    if i.op < 0x1a8:
        if count > bits:
            r = ((b << (count - bits)) | (a >> (2 * bits - count))) & mask
            carry = (b >> (2 * bits - count)) & 1
        else:
            r = ((a << count if count < 64 else 0) | (b >> (bits - count))) & mask
            carry = (a >> (bits - count)) & 1
    else:
        if count > bits:
            r = ((b >> (count - bits)) | (a << (2 * bits - count))) & mask
            carry = (b >> (count - bits - 1)) & 1
        else:
            r = ((a >> count) | (b << (bits - count))) & mask
            carry = (a >> (count - 1)) & 1
    code = operand_replace(c, i, size, a, r)
    if code == DONE:
        flags_shifted(c, r, carry, ((r ^ a) >> (bits - 1)) & 1, size)
    return code


cdef int group3(x86_state_t *c, const x86_insn_t *i) noexcept nogil:
    """TEST, NOT, NEG, MUL, IMUL, DIV, IDIV."""
    cdef uint64_t a = 0, r, carries = 0, mask = mask_of(i.size), high = 0, rest = 0, n
    cdef uint32_t size = i.size, bits = 8 * size
    cdef int code = operand_get(c, i, size, &a)
    if code != DONE:
        return code
    if i.sub < 2:
        flags_result(c, a & <uint64_t>i.imm & mask, 0, size)
        return DONE
    if i.sub == 2:
        return operand_replace(c, i, size, a, ~a & mask)
    if i.sub == 3:
        r = alu(ALU_SUB, 0, a, 0, mask, &carries)
        code = operand_replace(c, i, size, a, r)
        if code == DONE:
            flags_result(c, r, carries, size)
        return code
    if i.sub < 6:
        if i.sub == 4:
            r = x86_mul(reg_get(c, 0, size), a, &high)
            n = high if size == 8 else r >> bits
            code = n != 0
        else:
            r = x86_imul(extend(c.regs[0], size), extend(a, size), &high)
            n = high if size == 8 else (r >> bits) & mask
            code = n != (mask if extend(r, size) < 0 else 0)
        if size == 1:
            reg_set(c, 0, 2, r)
        else:
            reg_set(c, 0, size, r)
            reg_set(c, 2 * 8, size, n)
        flags_shifted(c, r & mask, code, code, size)
        return DONE
    if size == 1:
        n = <uint16_t>c.regs[0]
    else:
        n = reg_get(c, 0, size) | (reg_get(c, 2 * 8, size) << bits if size < 8 else 0)
    if i.sub == 6:
        code = x86_div(c.regs[2] if size == 8 else 0, n, a, &r, &rest)
        code = code != 0 or r > mask
    else:
        n = n if size == 8 else <uint64_t>extend(n, 2 * size)
        high = c.regs[2] if size == 8 else <uint64_t>(<int64_t>n >> 63)
        code = x86_idiv(high, n, extend(a, size), &r, &rest)
        code = code != 0 or extend(r, size) != <int64_t>r
    if code:
        return raise_exception(c, DE, False, 0)
    if size == 1:
        reg_set(c, 0, 2, (r & 0xff) | ((rest & 0xff) << 8))
    else:
        reg_set(c, 0, size, r)
        reg_set(c, 2 * 8, size, rest)
    return DONE


cdef int multiply_signed(x86_state_t *c, const x86_insn_t *i) noexcept nogil:
    """IMUL with two or three operands: the high half is lost, CF and OF say whether it mattered."""
    cdef uint64_t a = 0, r, high = 0, lost
    cdef int64_t b
    cdef int code = operand_get(c, i, i.size, &a)
    if code != DONE:
        return code
    b = i.imm if i.kind == K_IMUL_IMM else extend(reg_get(c, i.reg_at, i.size), i.size)
    r = x86_imul(extend(a, i.size), b, &high)
    if i.size == 8:
        lost = high != (<uint64_t>-1 if <int64_t>r < 0 else 0)
    else:
        lost = extend(r, i.size) != <int64_t>r
    reg_set(c, i.reg_at, i.size, r)
    flags_shifted(c, r & mask_of(i.size), lost, lost, i.size)
    return DONE


cdef int bit_test(x86_state_t *c, const x86_insn_t *i) noexcept nogil:
    """BT, BTS, BTR, BTC: CF alone changes. A bit offset in a register reaches beyond the addressed operand."""
    cdef uint64_t a = 0, r, bit, at = 0
    cdef uint32_t size = i.size, bits = 8 * size
    cdef int64_t offset
    cdef int code
    offset = i.imm if i.kind == K_BT_IMM else extend(reg_get(c, i.reg_at, size), size)
    bit = <uint64_t>offset & (bits - 1)
    if i.memory:
        at = effective_address(c, i)
        if i.kind == K_BT:
            at += <uint64_t>((offset >> (4 if size == 2 else 5 if size == 4 else 6)) * size)
            at = at if i.address_size == 8 else <uint32_t>at if i.address_size == 4 else <uint16_t>at
        at = linear(c, at + (c.segment_base[i.segment] if i.segment >= 4 else 0))
        code = load(c, at, size, &a)
        if code != DONE:
            return code
    else:
        a = reg_get(c, i.rm_at, size)
    if i.sub:
        r = <uint64_t>1 << bit
        r = a | r if i.sub == 1 else a & ~r if i.sub == 2 else a ^ r
        if i.memory:
            code = replace(c, i, at, size, a, r, i.lock)
            if code != DONE:
                return code
        else:
            reg_set(c, i.rm_at, size, r)
    c.carry = (a >> bit) & 1
    return DONE


cdef int bit_scan(x86_state_t *c, const x86_insn_t *i) noexcept nogil:
    """BSF, BSR; with F3 TZCNT, LZCNT."""
    cdef uint64_t a = 0, r
    cdef uint32_t bits = 8 * i.size
    cdef int code = operand_get(c, i, i.size, &a)
    if code != DONE:
        return code
    if i.rep == 0xf3:
        if i.kind == K_BSF:
            r = x86_ctz(a) if a else bits
        else:
            r = x86_clz(a) - (64 - bits) if a else bits
        reg_set(c, i.reg_at, i.size, r)
        flags_result(c, r, 0, i.size)
        c.carry = a == 0
        return DONE
    flags_result(c, a, 0, i.size)
    if a:                                   # otherwise the destination keeps its value
        reg_set(c, i.reg_at, i.size, <uint64_t>(x86_ctz(a) if i.kind == K_BSF else 63 - x86_clz(a)))
    return DONE


cdef int decimal(x86_state_t *c, const x86_insn_t *i) noexcept nogil:
    """DAA, DAS, AAA, AAS, AAM, AAD, in protected mode only."""
    cdef uint64_t flags = flags_read(c), al = c.regs[0] & 0xff, ah = (c.regs[0] >> 8) & 0xff, r, carry = flags & F_CF
    cdef uint64_t adjust = 1 if (al & 15) > 9 or flags & F_AF else 0
    if i.op == 0xd4 or i.op == 0xd5:
        if i.op == 0xd4:
            if i.imm == 0:
                return raise_exception(c, DE, False, 0)
            ah = al // <uint64_t>i.imm
            al = al % <uint64_t>i.imm
        else:
            al = (al + ah * <uint64_t>i.imm) & 0xff
            ah = 0
        reg_set(c, 0, 2, ah << 8 | al)
        flags_result(c, al, 0, 1)
        return DONE
    if i.op == 0x27 or i.op == 0x2f:
        r = al
        carry = 1 if al > 0x99 or carry else 0
        if adjust:
            if i.op == 0x2f and al < 6:
                carry = 1
            r = r + 6 if i.op == 0x27 else r - 6
        if al > 0x99 or flags & F_CF:
            r = r + 0x60 if i.op == 0x27 else r - 0x60
        r &= 0xff
        reg_set(c, 0, 1, r)
        flags_result(c, r, 0, 1)
        flags_write(c, (flags_read(c) & ~(<uint64_t>(F_AF | F_CF))) | adjust * F_AF | carry)
        return DONE
    if adjust:
        r = (c.regs[0] + 0x106 if i.op == 0x37 else c.regs[0] - 0x106) & 0xffff
        if i.op == 0x3f:                    # the borrow of AL does not reach AH twice
            r = ((ah - 1 - (1 if al < 6 else 0)) & 0xff) << 8 | ((al - 6) & 0xff)
        reg_set(c, 0, 2, r & 0xff0f)
    else:
        reg_set(c, 0, 1, al & 15)
    flags_write(c, (flags & ~(<uint64_t>(F_AF | F_CF))) | adjust * (F_AF | F_CF))
    return DONE
