# Instructions that the library must not see
#
# For some locked instructions its translator takes an operand for a memory operand that is none: it ends the process for
# LOCK BTS with a register, or uses an address that an earlier instruction left behind. A LOCK prefix that is not allowed
# is #UD on every processor, so the guest gets that before the library has looked. And its RDRAND asks the host for random
# numbers, with which no run would repeat: it arrives as #UD, too, and is done here.
#
# The place for it: before the translator fetches an instruction, it looks for its address among those at which the user
# wants translation to end, a sorted tree. The tree gets one address, and our function as its order. That is called for
# each instruction that is about to be translated, at the very moment, and fetches through the same TLB, so that nothing the
# guest does to its code or its page tables comes between. "Found" ends the block in front of the instruction; when it is
# the first of a block, #UD is raised and there is no translation at all.


cdef enum:
    MOST_INSTRUCTION_BYTES = 15
    PREFIX_LOCK = 0xF0
    PREFIX_REP = 0xF3
    RDRAND = 0xF0               # the smallest ModRM of RDRAND (reg is 6) and RDSEED (7), whose operand is a register


cdef bint _refused(const cpu_t *m, uint64_t address) noexcept nogil:
    """Whether the instruction at linear `address` is RDRAND or RDSEED, or has a LOCK prefix that it must not have.

    The rules for LOCK are those of SDM volume 2. Bytes are fetched as far as the answer needs them, never beyond the
    instruction; a page fault of it is the guest's.
    """
    cdef bint locked = False, repeated = False, long_mode = m.live.hflags & HF_CS64 != 0
    cdef uint32_t byte, groups = 0
    cdef int index
    for index in range(MOST_INSTRUCTION_BYTES):
        byte = m.lib.fetch_byte(m.live, address + index)
        if byte == PREFIX_LOCK:
            locked = True
        elif byte == PREFIX_REP:
            repeated = True
        elif not (_is_prefix(byte) or long_mode and byte & 0xF0 == 0x40):
            break
    else:
        return False                                # too long: the library raises #GP
    if byte == 0x0F:
        index += 1
        byte = m.lib.fetch_byte(m.live, address + index)
        if byte == 0xC7 and not (locked or repeated):           # with REP it is RDPID
            return m.lib.fetch_byte(m.live, address + index + 1) >= RDRAND
        groups = _lockable_0f(byte)
    elif locked:
        groups = _lockable(byte, long_mode)
    if not locked:
        return False
    if not groups:
        return True
    byte = m.lib.fetch_byte(m.live, address + index + 1)
    return byte >> 6 == 3 or not groups >> (byte >> 3 & 7) & 1


cdef bint _is_prefix(uint32_t byte) noexcept nogil:
    """Segment, operand size, address size, REPNE: everything but LOCK, REP and REX."""
    return byte & 0xE7 == 0x26 or 0x64 <= byte <= 0x67 or byte == 0xF2


cdef uint32_t _lockable(uint32_t opcode, bint long_mode) noexcept nogil:
    """For which values of ModRM.reg, one bit each, a one-byte opcode with a memory operand may be locked."""
    if opcode < 0x38 and opcode & 6 == 0:           # ADD … XOR with a register as the source
        return 0xFF
    if opcode == 0x80 or opcode == 0x81 or opcode == 0x83 or opcode == 0x82 and not long_mode:
        return 0x7F                                 # all but CMP
    if opcode == 0x86 or opcode == 0x87:            # XCHG
        return 0xFF
    if opcode == 0xF6 or opcode == 0xF7:            # NOT, NEG
        return 0x0C
    if opcode == 0xFE or opcode == 0xFF:            # INC, DEC
        return 0x03
    return 0


cdef uint32_t _lockable_0f(uint32_t opcode) noexcept nogil:
    """The same for an opcode behind 0F."""
    if opcode == 0xAB or opcode == 0xB3 or opcode == 0xBB:      # BTS, BTR, BTC
        return 0xFF
    if opcode == 0xBA:                              # the same with a constant; not BT
        return 0xE0
    if opcode == 0xB0 or opcode == 0xB1 or opcode == 0xC0 or opcode == 0xC1:   # CMPXCHG, XADD
        return 0xFF
    if opcode == 0xC7:                              # CMPXCHG8B, CMPXCHG16B
        return 0x02
    return 0


cdef bint _read_random(cpu_t *m) noexcept nogil:
    """Execute RDRAND (SDM volume 2) in the saved state, if it is what RIP points to; every run gets the same numbers."""
    cdef uint8_t code[MOST_INSTRUCTION_BYTES]
    cdef bint word = False, long_mode = m.head.hflags & HF_CS64 != 0
    cdef uint64_t rip = m.head.rip + m.head.segs[CS].base, value
    cdef int at, target, rex = 0
    for at in range(MOST_INSTRUCTION_BYTES - 2):
        if not _peek(m, rip + at, &code[at], 1):
            return False
        if code[at] == 0x66:
            word = True
        elif long_mode and code[at] & 0xF0 == 0x40:
            rex = code[at]
            continue
        elif not _is_prefix(code[at]):
            break
        rex = 0                                     # it counts right before the opcode only
    if (code[at] != 0x0F or not _peek(m, rip + at + 1, &code[at + 1], 2) or code[at + 1] != 0xC7
            or not RDRAND <= code[at + 2] < RDRAND + 8):
        return False
    m.random += <uint64_t>0x9E3779B97F4A7C15        # SplitMix64 (Steele, Lea, Flood, 2014)
    value = (m.random ^ m.random >> 30) * <uint64_t>0xBF58476D1CE4E5B9
    value = (value ^ value >> 27) * <uint64_t>0x94D049BB133111EB
    value ^= value >> 31
    target = code[at + 2] & 7 | (rex & 1) << 3
    if rex & 8:
        m.head.regs[target] = value
    elif word:
        m.head.regs[target] = m.head.regs[target] & ~<uint64_t>0xFFFF | value & 0xFFFF
    else:
        m.head.regs[target] = value & MASK32
    m.head.cc_src = 1                               # CF: there was one; the other arithmetic flags are 0
    m.head.cc_op = CC_OP_EFLAGS
    m.head.rip += at + 3
    m.head.hflags &= ~<uint32_t>HF_INHIBIT_IRQ
    return True


cdef int _before_translation(const void *address, const void *key, void *user) noexcept nogil:
    """The order of the tree: 0 ends the block in front of the instruction at `address`, and 1 lets it be translated."""
    cdef cpu_t *m = <cpu_t *>user
    cdef uint64_t linear = (<const uint64_t *>address)[0]
    if vmbus_running != m or not _refused(m, linear):
        return 1
    if linear == m.live.rip + m.live.segs[CS].base:
        m.lib.raise_exception(m.live, VECTOR_INVALID_OPCODE)    # a long jump
    return 0


cdef int _watch_translation(cpu_t *m) except -1:
    """Put `_before_translation` into the tree of the library, which is where the header says if it holds what was put there."""
    cdef uint64_t mark = 0x1122_3344_5566_7788
    cdef uc_tree_t *tree
    cdef unsigned char present
    _check(m.lib, m.lib.ctl(m.uc, UC_CTL_USE_EXITS, 1), "exits")            # no address ends a run
    _check(m.lib, m.lib.ctl(m.uc, UC_CTL_EXITS, &mark, <size_t>1), "exits")
    tree = (<uc_tree_t **>(<uint8_t *>m.uc + UC_EXITS_OFFSET))[0]
    if (<size_t>tree & 7 or mincore(<void *>(<size_t>tree & ~<size_t>(PAGE - 1)), 1, &present) or tree.nodes != 1
            or mincore(<void *>(<size_t>tree.root & ~<size_t>(PAGE - 1)), 1, &present) or tree.root[0][0] != mark):
        raise _mismatch("the exits")
    tree.user = m
    tree.compare = _before_translation
    return 0


cdef bint _ended_before(const cpu_t *m) noexcept nogil:
    """Whether this HLT is none, but the end of a block in front of a refused instruction: the block does not contain it."""
    return m.block_size and m.block_address + m.block_size == m.head.rip + m.head.segs[CS].base


cdef bint _taken_for_sse(const cpu_t *m) noexcept nogil:
    """Whether the library refused an instruction on integers because CR4.OSFXSR is clear, which those do not need.

    It takes what has an operand-size prefix and one of the opcode maps of SSE for an SSE instruction: SHLX, and MOVBE of 16
    bits. Linux 6.12 unpacks itself with SHLX before it sets OSFXSR.
    """
    cdef uint8_t code[5]
    cdef int index = 1
    if m.head.hflags & HF_OSFXSR or not _peek(m, m.head.rip, code, 5):
        return False
    if code[0] == 0xC4:                             # VEX: map 0F38, prefix 66
        return code[1] & 0x1F == 2 and code[2] & 3 == 1 and code[3] == 0xF7
    if code[0] != 0x66:
        return False
    if code[1] & 0xF0 == 0x40 and m.head.hflags & HF_CS64:      # REX
        index = 2
    return code[index] == 0x0F and code[index + 1] == 0x38 and code[index + 2] & 0xFE == 0xF0
