# From bytes to `x86_insn_t`: prefixes, opcode, ModRM, SIB, displacement, immediate (Intel SDM volume 2, chapter 2 and
# appendix A). What an opcode is followed by stands in one table of properties, what it does in one table of kinds.

cdef enum:
    P_MODRM = 0x001
    P_IMM8 = 0x002      # sign-extended byte
    P_IMMZ = 0x004      # 2 or 4 bytes by operand size, sign-extended
    P_IMMV = 0x008      # 2, 4 or 8 bytes by operand size
    P_IMM16 = 0x010
    P_BYTE = 0x020      # operands are bytes
    P_STACK = 0x040     # 64 bits by default in long mode
    P_NO64 = 0x080      # invalid in long mode
    P_MOFFS = 0x100     # an absolute address
    P_NEAR = 0x200      # a branch: always 64 bits in long mode
    P_UIMM8 = 0x400     # zero-extended byte
    P_LOCK = 0x800      # may be locked if its destination is in memory

cdef enum kind_t:
    K_NONE = 0
    K_ALU           # sub: operation
    K_ALU_IMM
    K_TEST
    K_TEST_IMM
    K_INC           # 40+r, 48+r in protected mode
    K_DEC
    K_MOV
    K_MOV_LOAD
    K_MOV_IMM
    K_MOV_REG_IMM
    K_MOVSXD
    K_MOVZX
    K_MOVSX
    K_LEA
    K_XCHG
    K_XCHG_ACC
    K_PUSH_REG
    K_POP_REG
    K_PUSH_IMM
    K_POP_RM
    K_PUSHA
    K_POPA
    K_PUSHF
    K_POPF
    K_SAHF
    K_LAHF
    K_IMUL_IMM
    K_IMUL
    K_JCC
    K_JMP
    K_CALL
    K_RET
    K_LOOP          # sub: 0 LOOPNE, 1 LOOPE, 2 LOOP, 3 JCXZ
    K_SETCC
    K_CMOV
    K_SHIFT         # form: 0 by immediate, 1 by one, 2 by CL
    K_GROUP3
    K_GROUP4
    K_GROUP5
    K_CONVERT       # CBW, CWDE, CDQE
    K_SPREAD        # CWD, CDQ, CQO
    K_MOFFS
    K_STRING        # sub: see strings.pxi
    K_IN
    K_OUT
    K_FLAG          # CLC, STC, CLI, STI, CLD, STD, CMC
    K_HLT
    K_NOP
    K_LEAVE
    K_ENTER
    K_INT
    K_INT3
    K_INTO
    K_IRET
    K_XLAT
    K_DECIMAL       # DAA, DAS, AAA, AAS, AAM, AAD
    K_PUSH_SEG
    K_MOV_FROM_SEG
    K_BT            # sub: 0 BT, 1 BTS, 2 BTR, 3 BTC
    K_BT_IMM
    K_BSF
    K_BSR
    K_SHIFT_DOUBLE
    K_CMPXCHG
    K_CMPXCHG8B
    K_XADD
    K_BSWAP
    K_POPCNT
    K_CPUID
    K_RDMSR
    K_WRMSR
    K_RDTSC
    K_UD
    K_SYSTEM        # 0F 01
    K_FENCE         # 0F AE

cdef uint16_t PROPERTIES[512]
cdef uint8_t KINDS[512]


cdef void define(int opcode, int kind, int properties) noexcept:
    KINDS[opcode] = kind
    PROPERTIES[opcode] = properties


cdef void define_all() noexcept:
    cdef int op
    for op in range(8):
        define(8 * op, K_ALU, P_MODRM | P_BYTE | P_LOCK)
        define(8 * op + 1, K_ALU, P_MODRM | P_LOCK)
        define(8 * op + 2, K_ALU, P_MODRM | P_BYTE)
        define(8 * op + 3, K_ALU, P_MODRM)
        define(8 * op + 4, K_ALU_IMM, P_IMM8 | P_BYTE)
        define(8 * op + 5, K_ALU_IMM, P_IMMZ)
        define(0x40 + op, K_INC, P_NO64)
        define(0x48 + op, K_DEC, P_NO64)
        define(0x50 + op, K_PUSH_REG, P_STACK)
        define(0x58 + op, K_POP_REG, P_STACK)
        define(0x90 + op, K_XCHG_ACC, 0)
        define(0xb0 + op, K_MOV_REG_IMM, P_BYTE | P_IMM8)
        define(0xb8 + op, K_MOV_REG_IMM, P_IMMV)
        define(0x1c8 + op, K_BSWAP, 0)
    for op in range(16):
        define(0x70 + op, K_JCC, P_IMM8 | P_NEAR)
        define(0x140 + op, K_CMOV, P_MODRM)
        define(0x180 + op, K_JCC, P_IMMZ | P_NEAR)
        define(0x190 + op, K_SETCC, P_MODRM | P_BYTE)
    for op in (0x06, 0x0e, 0x16, 0x1e):
        define(op, K_PUSH_SEG, P_STACK | P_NO64)
    define(0x1a0, K_PUSH_SEG, P_STACK)
    define(0x1a8, K_PUSH_SEG, P_STACK)
    for op in (0x27, 0x2f, 0x37, 0x3f):
        define(op, K_DECIMAL, P_NO64)
    define(0xd4, K_DECIMAL, P_NO64 | P_UIMM8)
    define(0xd5, K_DECIMAL, P_NO64 | P_UIMM8)
    define(0x60, K_PUSHA, P_NO64)
    define(0x61, K_POPA, P_NO64)
    define(0x63, K_MOVSXD, P_MODRM)
    define(0x68, K_PUSH_IMM, P_IMMZ | P_STACK)
    define(0x69, K_IMUL_IMM, P_MODRM | P_IMMZ)
    define(0x6a, K_PUSH_IMM, P_IMM8 | P_STACK)
    define(0x6b, K_IMUL_IMM, P_MODRM | P_IMM8)
    for op in (0x6c, 0x6e, 0xa4, 0xa6, 0xaa, 0xac, 0xae):
        define(op, K_STRING, P_BYTE)
        define(op + 1, K_STRING, 0)
    define(0x80, K_ALU_IMM, P_MODRM | P_BYTE | P_IMM8 | P_LOCK)
    define(0x81, K_ALU_IMM, P_MODRM | P_IMMZ | P_LOCK)
    define(0x82, K_ALU_IMM, P_MODRM | P_BYTE | P_IMM8 | P_LOCK | P_NO64)
    define(0x83, K_ALU_IMM, P_MODRM | P_IMM8 | P_LOCK)
    define(0x84, K_TEST, P_MODRM | P_BYTE)
    define(0x85, K_TEST, P_MODRM)
    define(0x86, K_XCHG, P_MODRM | P_BYTE | P_LOCK)
    define(0x87, K_XCHG, P_MODRM | P_LOCK)
    define(0x88, K_MOV, P_MODRM | P_BYTE)
    define(0x89, K_MOV, P_MODRM)
    define(0x8a, K_MOV_LOAD, P_MODRM | P_BYTE)
    define(0x8b, K_MOV_LOAD, P_MODRM)
    define(0x8c, K_MOV_FROM_SEG, P_MODRM)
    define(0x8d, K_LEA, P_MODRM)
    define(0x8f, K_POP_RM, P_MODRM | P_STACK)
    define(0x98, K_CONVERT, 0)
    define(0x99, K_SPREAD, 0)
    define(0x9c, K_PUSHF, P_STACK)
    define(0x9d, K_POPF, P_STACK)
    define(0x9e, K_SAHF, 0)
    define(0x9f, K_LAHF, 0)
    for op in (0xa0, 0xa2):
        define(op, K_MOFFS, P_MOFFS | P_BYTE)
        define(op + 1, K_MOFFS, P_MOFFS)
    define(0xa8, K_TEST_IMM, P_BYTE | P_IMM8)
    define(0xa9, K_TEST_IMM, P_IMMZ)
    for op in (0xc0, 0xd0, 0xd2):
        define(op, K_SHIFT, P_MODRM | P_BYTE | (P_UIMM8 if op == 0xc0 else 0))
        define(op + 1, K_SHIFT, P_MODRM | (P_UIMM8 if op == 0xc0 else 0))
    define(0xc2, K_RET, P_IMM16 | P_NEAR)
    define(0xc3, K_RET, P_NEAR)
    define(0xc6, K_MOV_IMM, P_MODRM | P_BYTE | P_IMM8)
    define(0xc7, K_MOV_IMM, P_MODRM | P_IMMZ)
    define(0xc8, K_ENTER, P_IMM16 | P_UIMM8 | P_STACK)
    define(0xc9, K_LEAVE, P_STACK)
    define(0xcc, K_INT3, 0)
    define(0xcd, K_INT, P_UIMM8)
    define(0xce, K_INTO, P_NO64)
    define(0xcf, K_IRET, 0)
    define(0xd7, K_XLAT, P_BYTE)
    for op in range(4):
        define(0xe0 + op, K_LOOP, P_IMM8 | P_NEAR)
    for op in (0xe4, 0xec):
        define(op, K_IN, P_BYTE | (P_UIMM8 if op == 0xe4 else 0))
        define(op + 1, K_IN, P_UIMM8 if op == 0xe4 else 0)
        define(op + 2, K_OUT, P_BYTE | (P_UIMM8 if op == 0xe4 else 0))
        define(op + 3, K_OUT, P_UIMM8 if op == 0xe4 else 0)
    define(0xe8, K_CALL, P_IMMZ | P_NEAR)
    define(0xe9, K_JMP, P_IMMZ | P_NEAR)
    define(0xeb, K_JMP, P_IMM8 | P_NEAR)
    define(0xf4, K_HLT, 0)
    define(0xf6, K_GROUP3, P_MODRM | P_BYTE | P_LOCK)
    define(0xf7, K_GROUP3, P_MODRM | P_LOCK)
    for op in (0xf5, 0xf8, 0xf9, 0xfa, 0xfb, 0xfc, 0xfd):
        define(op, K_FLAG, 0)
    define(0xfe, K_GROUP4, P_MODRM | P_BYTE | P_LOCK)
    define(0xff, K_GROUP5, P_MODRM | P_LOCK)

    define(0x101, K_SYSTEM, P_MODRM)
    define(0x10b, K_UD, 0)
    define(0x10d, K_NOP, P_MODRM)
    for op in range(0x118, 0x120):
        define(op, K_NOP, P_MODRM)
    define(0x130, K_WRMSR, 0)
    define(0x131, K_RDTSC, 0)
    define(0x132, K_RDMSR, 0)
    define(0x1a2, K_CPUID, 0)
    for op in (0x1a3, 0x1ab, 0x1b3, 0x1bb):
        define(op, K_BT, P_MODRM | (0 if op == 0x1a3 else P_LOCK))
    define(0x1ba, K_BT_IMM, P_MODRM | P_UIMM8 | P_LOCK)
    for op in (0x1a4, 0x1ac):
        define(op, K_SHIFT_DOUBLE, P_MODRM | P_UIMM8)
        define(op + 1, K_SHIFT_DOUBLE, P_MODRM)
    define(0x1ae, K_FENCE, P_MODRM)
    define(0x1af, K_IMUL, P_MODRM)
    define(0x1b0, K_CMPXCHG, P_MODRM | P_BYTE | P_LOCK)
    define(0x1b1, K_CMPXCHG, P_MODRM | P_LOCK)
    define(0x1b6, K_MOVZX, P_MODRM)
    define(0x1b7, K_MOVZX, P_MODRM)
    define(0x1b8, K_POPCNT, P_MODRM)
    define(0x1bc, K_BSF, P_MODRM)
    define(0x1bd, K_BSR, P_MODRM)
    define(0x1be, K_MOVSX, P_MODRM)
    define(0x1bf, K_MOVSX, P_MODRM)
    define(0x1c0, K_XADD, P_MODRM | P_BYTE | P_LOCK)
    define(0x1c1, K_XADD, P_MODRM | P_LOCK)
    define(0x1c3, K_MOV, P_MODRM)       # MOVNTI
    define(0x1c7, K_CMPXCHG8B, P_MODRM | P_LOCK)


define_all()


cdef inline uint8_t place(uint32_t number, uint32_t size, bint rex) noexcept nogil:
    """Where a register begins in the register file; AH, CH, DH and BH are second bytes."""
    if size == 1 and not rex and 4 <= number < 8:
        return <uint8_t>((number - 4) * 8 + 1)
    return <uint8_t>(number * 8)


cdef int decode(const x86_state_t *c, uint64_t rip, const uint8_t *code, uint32_t available, x86_insn_t *i) noexcept nogil:
    """Decode the instruction at `code`, which is a private copy of 16 bytes.

    Returns 0, X86_FETCH if it is longer than `available`, or X86_UNKNOWN; then `length` counts the bytes looked at.
    """
    cdef uint32_t at = 0, rex = 0, operand16 = 0, address_prefix = 0, op, modrm = 0, mod, rm, sib, properties, n, half
    cdef uint8_t byte
    memset(i, 0, sizeof(x86_insn_t))
    i.rip = rip
    i.base = 16
    i.index = 16
    i.segment = 3
    i.length = <uint8_t>available
    if not available:
        return X86_FETCH
    while True:
        if at >= available or at >= 15:
            return X86_FETCH if at < 15 else X86_UNKNOWN
        byte = code[at]
        if byte == 0x66:
            operand16 = 1
        elif byte == 0x67:
            address_prefix = 1
        elif byte == 0xf0:
            i.lock = 1
        elif byte == 0xf2 or byte == 0xf3:
            i.rep = byte
        elif byte == 0x26 or byte == 0x2e or byte == 0x36 or byte == 0x3e:
            if not c.long_mode:         # ignored in long mode
                i.segment = (byte >> 3) & 3
        elif byte == 0x64 or byte == 0x65:
            i.segment = byte - 0x60
        elif c.long_mode and byte & 0xf0 == 0x40:
            rex = byte
            at += 1
            continue
        else:
            break
        rex = 0                         # REX counts only right before the opcode
        at += 1
    op = byte
    at += 1
    if op == 0x0f:
        if at >= available:
            return X86_FETCH
        op = 0x100 | code[at]
        at += 1
    i.op = <uint16_t>op
    i.length = <uint8_t>at
    properties = PROPERTIES[op]
    i.kind = KINDS[op]
    if i.kind == K_NONE or (c.long_mode and properties & P_NO64):
        return X86_UNKNOWN
    if properties & P_BYTE:
        i.size = 1
    elif c.long_mode and (rex & 8 or properties & P_NEAR):
        i.size = 8
    elif operand16:
        i.size = 2
    elif c.long_mode and properties & P_STACK:
        i.size = 8
    else:
        i.size = 4
    if c.long_mode:
        i.address_size = 4 if address_prefix else 8
    else:
        i.address_size = 2 if address_prefix else 4

    i.reg = <uint8_t>((op & 7) | (rex & 1) << 3)        # for opcodes that hold a register
    if properties & P_MODRM:
        if at >= available:
            return X86_FETCH
        modrm = code[at]
        at += 1
        mod = modrm >> 6
        rm = modrm & 7
        i.reg = <uint8_t>((modrm >> 3 & 7) | (rex & 4) << 1)
        i.sub = modrm >> 3 & 7
        if mod == 3:
            i.rm = <uint8_t>(rm | (rex & 1) << 3)
        elif i.address_size == 2:
            i.memory = 1
            n = 0 if mod == 0 else mod
            i.base = 3 if rm < 2 or rm == 7 else 5 if rm == 2 or rm == 3 or rm == 6 else 6 if rm == 4 else 7
            if rm < 4:
                i.index = 6 if rm & 1 == 0 else 7
            if rm == 6 and mod == 0:
                i.base = 16
                n = 2
            if at + n > available:
                return X86_FETCH
            if n == 1:
                i.disp = <int8_t>code[at]
            elif n == 2:
                i.disp = <int16_t>bytes_get(code + at, 2)
            at += n
        else:
            i.memory = 1
            n = 0 if mod == 0 else 1 if mod == 1 else 4
            if rm == 4:
                if at >= available:
                    return X86_FETCH
                sib = code[at]
                at += 1
                i.scale = <uint8_t>(sib >> 6)
                i.index = <uint8_t>((sib >> 3 & 7) | (rex & 2) << 2)
                if i.index == 4:
                    i.index = 16
                i.base = <uint8_t>((sib & 7) | (rex & 1) << 3)
                if sib & 7 == 5 and mod == 0:
                    i.base = 16
                    n = 4
            elif rm == 5 and mod == 0:
                n = 4
            else:
                i.base = <uint8_t>(rm | (rex & 1) << 3)
            if at + n > available:
                return X86_FETCH
            if n == 1:
                i.disp = <int8_t>code[at]
            elif n == 4:
                i.disp = <int32_t>bytes_get(code + at, 4)
            at += n
    i.reg_at = place(i.reg, i.size, rex != 0)
    i.rm_at = place(i.rm, i.size, rex != 0)

    if i.kind == K_GROUP3 and i.sub < 2:                # TEST alone of its group has an immediate
        properties |= P_IMM8 if i.size == 1 else P_IMMZ
    n = 0
    if properties & P_IMM16:
        if at + 2 > available:
            return X86_FETCH
        i.imm = <int64_t>bytes_get(code + at, 2)
        at += 2
    if properties & P_IMM8 or properties & P_UIMM8:
        if at + 1 > available:
            return X86_FETCH
        if properties & P_IMM16:                        # ENTER: the nesting level
            i.sub = code[at] & 31
        else:
            i.imm = <int8_t>code[at] if properties & P_IMM8 else <int64_t>code[at]
        at += 1
    elif properties & P_IMMV:
        n = i.size
    elif properties & P_IMMZ:
        n = 2 if i.size == 2 else 4
    elif properties & P_MOFFS:
        n = i.address_size
    if n:
        if at + n > available:
            return X86_FETCH
        i.imm = extend(bytes_get(code + at, n), n) if not properties & P_MOFFS else <int64_t>bytes_get(code + at, n)
        at += n
    if at > 15:
        return X86_UNKNOWN
    i.length = <uint8_t>at
    if i.memory and modrm & 0xc7 == 5 and c.long_mode:  # RIP-relative: an absolute address from here on
        i.disp = <int64_t>(<uint64_t>i.disp + rip + at)
    if i.memory and i.segment == 3 and (i.base == 4 or i.base == 5):
        i.segment = 2                                   # SS; the base is 0 in a flat guest all the same
    if i.lock and not (properties & P_LOCK and i.memory):
        i.kind = K_UD
    half = at if at < 8 else 8
    i.mask0 = (<uint64_t>-1) >> (64 - 8 * half)
    i.mask1 = (<uint64_t>-1) >> (64 - 8 * (at - 8)) if at > 8 else 0
    i.raw0 = bytes_get(code, 8) & i.mask0
    i.raw1 = bytes_get(code + 8, 8) & i.mask1
    return specialise(c, i, modrm, rex != 0)


cdef int specialise(const x86_state_t *c, x86_insn_t *i, uint32_t modrm, bint rex) noexcept nogil:
    """What a kind needs to know beyond the opcode, and the combinations that do not exist."""
    cdef uint32_t op = i.op
    if i.kind == K_ALU:
        i.sub = <uint8_t>(op >> 3)
        i.form = op & 2
        if i.lock and i.sub == ALU_CMP:
            i.kind = K_UD
    elif i.kind == K_ALU_IMM:
        if op < 0x40:
            i.sub = <uint8_t>(op >> 3)
            i.rm = 0
            i.rm_at = 0
        elif i.lock and i.sub == ALU_CMP:
            i.kind = K_UD
    elif i.kind == K_INC or i.kind == K_DEC:
        i.rm_at = <uint8_t>((op & 7) * 8)
    elif i.kind == K_SHIFT:
        i.form = 0 if op < 0xd0 else 1 if op < 0xd2 else 2
    elif i.kind == K_JCC or i.kind == K_SETCC or i.kind == K_CMOV:
        i.sub = op & 15
    elif i.kind == K_LEA and not i.memory:
        i.kind = K_UD
    elif i.kind == K_MOVZX or i.kind == K_MOVSX:
        i.form = 2 if op & 1 else 1                     # bytes of the source
        i.rm_at = place(i.rm, i.form, rex)
    elif i.kind == K_MOV_IMM or i.kind == K_POP_RM:
        if i.sub != 0:
            return X86_UNKNOWN
    elif i.kind == K_LOOP or i.kind == K_FLAG:
        i.sub = op & 15
    elif i.kind == K_IN or i.kind == K_OUT or i.kind == K_STRING:
        if i.size == 8 and (i.kind != K_STRING or op <= 0x6f):
            i.size = 4                                  # there are no 64-bit ports
        i.form = 1 if i.kind != K_STRING and op >= 0xec else 0
    elif i.kind == K_MOFFS:
        i.form = op & 2
        i.disp = i.imm
        i.memory = 1
        i.base = 16
        i.reg_at = 0
    elif i.kind == K_GROUP4 and i.sub > 1:
        return X86_UNKNOWN
    elif i.kind == K_GROUP5:
        if i.sub == 3 or i.sub == 5 or i.sub == 7:      # far branches: there are no other segments
            return X86_UNKNOWN
        if i.lock and i.sub > 1:
            i.kind = K_UD
        if i.sub == 2 or i.sub == 4 or i.sub == 6:
            if c.long_mode and (i.sub != 6 or i.size != 2):
                i.size = 8
    elif i.kind == K_GROUP3:
        if i.lock and i.sub != 2 and i.sub != 3:
            i.kind = K_UD
    elif i.kind == K_BT:
        i.sub = (op >> 3) & 3
    elif i.kind == K_BT_IMM:
        if i.sub < 4:
            return X86_UNKNOWN
        i.sub &= 3
        if i.lock and i.sub == 0:
            i.kind = K_UD
    elif i.kind == K_CMPXCHG8B:
        if i.sub != 1 or not i.memory:
            return X86_UNKNOWN
    elif i.kind == K_POPCNT:
        if i.rep != 0xf3:
            return X86_UNKNOWN
    elif i.kind == K_PUSH_SEG:
        i.sub = (op >> 3) & 7
    elif i.kind == K_MOV_FROM_SEG:
        if i.sub > 5:
            return X86_UNKNOWN
    elif i.kind == K_SYSTEM:
        if modrm == 0xc1 or modrm == 0xd9:              # VMCALL, VMMCALL
            i.sub = 8
        elif i.memory and (i.sub == 1 or i.sub == 3):   # SIDT, LIDT
            pass
        else:
            return X86_UNKNOWN
    elif i.kind == K_FENCE:
        if i.sub < 5 or (i.memory and i.sub != 7):
            return X86_UNKNOWN
    elif i.kind == K_ENTER:
        if i.sub:                                       # nested frames
            return X86_UNKNOWN
    elif i.kind == K_XCHG_ACC:
        if op == 0x90 and i.reg == 0:
            i.kind = K_NOP                              # NOP, and PAUSE
    elif op == 0x1c3 and (not i.memory or i.size == 2):
        return X86_UNKNOWN
    return 0
