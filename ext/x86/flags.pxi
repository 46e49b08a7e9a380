# Arithmetic and its flags.
#
# PF, AF, ZF, SF and OF are worked out only when something reads them. Until then the state keeps the last result, its
# width, and the vector of carries out of every bit: AF is the carry out of bit 3, OF the exclusive or of the two highest
# ones. CF is kept apart, because INC, DEC, rotates and bit tests treat it apart.

cdef enum:
    F_CF = 0x001
    F_PF = 0x004
    F_AF = 0x010
    F_ZF = 0x040
    F_SF = 0x080
    F_TF = 0x100
    F_IF = 0x200
    F_DF = 0x400
    F_OF = 0x800
    F_IOPL = 0x3000
    F_NT = 0x4000
    F_RF = 0x10000
    F_VM = 0x20000
    F_AC = 0x40000
    F_ID = 0x200000
    ARITHMETIC = F_PF | F_AF | F_ZF | F_SF | F_OF
    LOADABLE = F_IF | F_DF | F_IOPL | F_NT | F_AC | F_ID | F_TF   # what POPF and IRET change in ring 0, besides CF and ARITHMETIC

cdef enum:
    ALU_ADD = 0
    ALU_OR = 1
    ALU_ADC = 2
    ALU_SBB = 3
    ALU_AND = 4
    ALU_SUB = 5
    ALU_XOR = 6
    ALU_CMP = 7

cdef extern from *:
    """
    static inline int x86_parity(unsigned v) { return !__builtin_parity(v & 0xff); }
    static inline uint64_t x86_mul(uint64_t a, uint64_t b, uint64_t *high) {
        unsigned __int128 r = (unsigned __int128)a * b;
        *high = (uint64_t)(r >> 64);
        return (uint64_t)r;
    }
    static inline uint64_t x86_imul(int64_t a, int64_t b, uint64_t *high) {
        __int128 r = (__int128)a * b;
        *high = (uint64_t)((unsigned __int128)r >> 64);
        return (uint64_t)r;
    }
    /* 0, or -1 if the quotient does not fit into 64 bits or the divisor is 0 */
    static inline int x86_div(uint64_t high, uint64_t low, uint64_t by, uint64_t *quotient, uint64_t *rest) {
        unsigned __int128 n = (unsigned __int128)high << 64 | low;
        if (high >= by) return -1;
        *quotient = (uint64_t)(n / by);
        *rest = (uint64_t)(n % by);
        return 0;
    }
    static inline int x86_idiv(uint64_t high, uint64_t low, int64_t by, uint64_t *quotient, uint64_t *rest) {
        unsigned __int128 n = (unsigned __int128)high << 64 | low;
        int negative = (int64_t)high < 0;
        uint64_t divisor = by < 0 ? 0 - (uint64_t)by : (uint64_t)by, q, r;
        if (negative) n = -n;
        if (x86_div((uint64_t)(n >> 64), (uint64_t)n, divisor, &q, &r)) return -1;
        if (negative != (by < 0)) {
            if (q > (uint64_t)1 << 63) return -1;
            q = 0 - q;
        } else if (q >> 63) return -1;
        *quotient = q;
        *rest = negative ? 0 - r : r;
        return 0;
    }
    #define x86_swap32 __builtin_bswap32
    #define x86_swap64 __builtin_bswap64
    #define x86_ctz __builtin_ctzll
    #define x86_clz __builtin_clzll
    #define x86_popcount __builtin_popcountll
    """
    int x86_parity(unsigned v) nogil
    uint64_t x86_mul(uint64_t a, uint64_t b, uint64_t *high) nogil
    uint64_t x86_imul(int64_t a, int64_t b, uint64_t *high) nogil
    int x86_div(uint64_t high, uint64_t low, uint64_t by, uint64_t *quotient, uint64_t *rest) nogil
    int x86_idiv(uint64_t high, uint64_t low, int64_t by, uint64_t *quotient, uint64_t *rest) nogil
    uint32_t x86_swap32(uint32_t v) nogil
    uint64_t x86_swap64(uint64_t v) nogil
    int x86_ctz(uint64_t v) nogil
    int x86_clz(uint64_t v) nogil
    int x86_popcount(uint64_t v) nogil


cdef inline uint64_t mask_of(uint32_t size) noexcept nogil:
    return (<uint64_t>-1) >> (64 - 8 * size)


cdef inline int64_t extend(uint64_t value, uint32_t size) noexcept nogil:
    """The value of `size` bytes as a signed number."""
    if size == 1:
        return <int8_t>value
    if size == 2:
        return <int16_t>value
    if size == 4:
        return <int32_t>value
    return <int64_t>value


cdef inline uint64_t flag_zero(const x86_state_t *c) noexcept nogil:
    return c.lazy_result == 0 if c.lazy else (c.eflags & F_ZF) != 0


cdef inline uint64_t flag_sign(const x86_state_t *c) noexcept nogil:
    return (c.lazy_result >> (c.lazy - 1)) & 1 if c.lazy else (c.eflags & F_SF) != 0


cdef inline uint64_t flag_overflow(const x86_state_t *c) noexcept nogil:
    if c.lazy:
        return ((c.lazy_carries >> (c.lazy - 1)) ^ (c.lazy_carries >> (c.lazy - 2))) & 1
    return (c.eflags & F_OF) != 0


cdef inline uint64_t flag_parity(const x86_state_t *c) noexcept nogil:
    return x86_parity(<unsigned>c.lazy_result) if c.lazy else (c.eflags & F_PF) != 0


cdef inline uint64_t flags_read(const x86_state_t *c) noexcept nogil:
    """RFLAGS as the guest would see it."""
    cdef uint64_t flags = c.eflags & ~(<uint64_t>F_CF) | 2 | c.carry
    if c.lazy:
        flags = (flags & ~(<uint64_t>ARITHMETIC)) | (flag_parity(c) * F_PF) | (flag_zero(c) * F_ZF)
        flags |= (flag_sign(c) * F_SF) | (flag_overflow(c) * F_OF) | (((c.lazy_carries >> 3) & 1) * F_AF)
    return flags


cdef inline void flags_write(x86_state_t *c, uint64_t flags) noexcept nogil:
    c.eflags = flags & ~(<uint64_t>F_CF)
    c.carry = flags & F_CF
    c.lazy = 0


cdef inline void flags_result(x86_state_t *c, uint64_t result, uint64_t carries, uint32_t size) noexcept nogil:
    """All arithmetic flags from a result and its carries, CF included."""
    c.lazy_result = result
    c.lazy_carries = carries
    c.lazy = 8 * size
    c.carry = (carries >> (8 * size - 1)) & 1


cdef inline void flags_shifted(x86_state_t *c, uint64_t result, uint64_t carry, uint64_t overflow, uint32_t size) noexcept nogil:
    """All arithmetic flags from a result, CF and OF; AF becomes 0."""
    flags_result(c, result, (carry << (8 * size - 1)) | ((carry ^ overflow) << (8 * size - 2)), size)


cdef inline void flags_carry_overflow(x86_state_t *c, uint64_t carry, uint64_t overflow) noexcept nogil:
    """CF and OF alone, as rotates set them."""
    flags_write(c, (flags_read(c) & ~(<uint64_t>(F_CF | F_OF))) | carry | (overflow * F_OF))


cdef inline bint condition(const x86_state_t *c, uint32_t code) noexcept nogil:
    """The condition codes of Jcc, SETcc and CMOVcc."""
    cdef uint64_t value
    cdef uint32_t which = code >> 1
    if which == 0:
        value = flag_overflow(c)
    elif which == 1:
        value = c.carry
    elif which == 2:
        value = flag_zero(c)
    elif which == 3:
        value = c.carry | flag_zero(c)
    elif which == 4:
        value = flag_sign(c)
    elif which == 5:
        value = flag_parity(c)
    elif which == 6:
        value = flag_sign(c) ^ flag_overflow(c)
    else:
        value = flag_zero(c) | (flag_sign(c) ^ flag_overflow(c))
    return value != (code & 1)


cdef inline uint64_t alu(uint32_t operation, uint64_t a, uint64_t b, uint64_t carry, uint64_t mask, uint64_t *carries) noexcept nogil:
    """One of the eight basic operations; the caller commits the flags when its stores have succeeded."""
    cdef uint64_t r
    if operation == ALU_ADD or operation == ALU_ADC:
        r = a + b + (carry if operation == ALU_ADC else 0)
        carries[0] = (a & b) | ((a | b) & ~r)
    elif operation == ALU_SUB or operation == ALU_CMP or operation == ALU_SBB:
        r = a - b - (carry if operation == ALU_SBB else 0)
        carries[0] = (~a & b) | ((~a | b) & r)
    else:
        carries[0] = 0
        if operation == ALU_OR:
            r = a | b
        elif operation == ALU_AND:
            r = a & b
        else:
            r = a ^ b
    return r & mask


cdef inline uint64_t rotate(x86_state_t *c, uint32_t operation, uint64_t a, uint32_t count, uint32_t size,
                            uint64_t *flags) noexcept nogil:
    """ROL, ROR, RCL, RCR by a count that is masked and not 0; `flags` gets CF and OF."""
    cdef uint32_t bits = 8 * size
    cdef uint64_t mask = mask_of(size), r, carry = c.carry, overflow
    cdef uint32_t n
    if operation == 0 or operation == 1:
        n = count % bits
        if operation == 1:
            n = (bits - n) % bits
        r = ((a << n) | (a >> (bits - n))) & mask if n else a
        if operation == 0:
            carry = r & 1
            overflow = (r >> (bits - 1)) ^ carry
        else:
            carry = r >> (bits - 1)
            overflow = carry ^ ((r >> (bits - 2)) & 1)
    else:
        n = count % (bits + 1)
        r = a
        if operation == 3:      # through carry to the right by n is to the left by bits + 1 - n
            n = (bits + 1 - n) % (bits + 1)
        if n:
            r = (a << n if n < 64 else 0) | (carry << (n - 1))
            if n > 1:
                r |= a >> (bits + 1 - n)
            carry = (a >> (bits - n)) & 1
            r &= mask
        if n == 0:              # a full turn changes nothing
            overflow = flag_overflow(c)
        elif operation == 2:
            overflow = (r >> (bits - 1)) ^ carry
        else:
            overflow = (r >> (bits - 1)) ^ ((r >> (bits - 2)) & 1)
    flags[0] = carry | (overflow * F_OF)
    return r


cdef inline uint64_t shift(uint32_t operation, uint64_t a, uint32_t count, uint32_t size, uint64_t *flags) noexcept nogil:
    """SHL, SHR, SAR by a count that is masked and not 0; `flags` gets CF and OF."""
    cdef uint32_t bits = 8 * size
    cdef uint64_t mask = mask_of(size), r, carry, overflow
    cdef int64_t s
    if operation == 5:
        r = a >> count if count < bits else 0
        carry = (a >> (count - 1)) & 1 if count <= bits else 0
        overflow = a >> (bits - 1)
    elif operation == 7:
        s = extend(a, size)
        r = <uint64_t>(s >> count) & mask
        carry = <uint64_t>(s >> (count - 1)) & 1
        overflow = 0
    else:
        r = (a << count) & mask if count < bits else 0
        carry = (a >> (bits - count)) & 1 if count <= bits else 0
        overflow = (r >> (bits - 1)) ^ carry
    flags[0] = carry | (overflow * F_OF)
    return r
