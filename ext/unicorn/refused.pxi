# Instructions that the library must not see
#
# Its translator takes an operand of a locked instruction for a memory operand where the architecture knows none: it ends the process for
# LOCK BTS with a register, or uses an address that an earlier instruction left behind. A LOCK prefix that is not allowed
# is #UD on every processor, so the guest gets that before the library has looked.
#
# The place for it: before the translator fetches an instruction, it looks for its address among those at which the user wants
# translation to end, a sorted tree. The tree gets one address, and our function as its order: called for each instruction that
# is about to be translated, at the very moment, through the same TLB, so that nothing the guest does to its
# code or its page tables comes between. "Found" ends the block in front of the instruction; when it is the first of a block,
# #UD is raised and there is no translation at all.


cdef enum:
    MOST_INSTRUCTION_BYTES = 15
    PREFIX_LOCK = 0xF0


cdef bint _refused(const cpu_t *m, uint64_t address) noexcept nogil:
    """Whether the instruction at linear `address` has a LOCK prefix that it must not have (SDM volume 2, "LOCK").

    Bytes are fetched as far as the answer needs them, never beyond the instruction; a page fault of it is the guest's.
    """
    cdef bint locked = False, long_mode = m.live.hflags & HF_CS64 != 0
    cdef uint32_t byte, groups
    cdef int index
    for index in range(MOST_INSTRUCTION_BYTES):
        byte = m.lib.fetch_byte(m.live, address + index)
        if byte == PREFIX_LOCK:
            locked = True
        elif not (_is_prefix(byte) or long_mode and byte & 0xF0 == 0x40):
            break
    else:
        return False                                # too long: the library raises #GP
    if not locked:
        return False
    if byte == 0x0F:
        index += 1
        groups = _lockable_0f(m.lib.fetch_byte(m.live, address + index))
    else:
        groups = _lockable(byte, long_mode)
    if not groups:
        return True
    byte = m.lib.fetch_byte(m.live, address + index + 1)
    return byte >> 6 == 3 or not groups >> (byte >> 3 & 7) & 1


cdef bint _is_prefix(uint32_t byte) noexcept nogil:
    """Segment, operand size, address size, REP: everything but LOCK and REX."""
    return byte & 0xE7 == 0x26 or 0x64 <= byte <= 0x67 or byte == 0xF2 or byte == 0xF3


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
