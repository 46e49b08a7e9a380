# Several processors: one executes at a time, the states of the others are saved
#
# All share the library's translations, which depend on nothing but physical memory and the mode of the processor. Its TLB
# belongs to the executing one alone and is flushed at every switch. Switches happen before a block and after HLT only, so
# whatever a block does is indivisible, locked instructions included.


cdef int _make_states(cpu_t *m) except -1:
    """Room for the states of all processors; each starts as that of the boot processor, intercepts included."""
    cdef int index
    for index in range(m.processors if m.processors > 1 else 0):
        if m.states[index] == NULL:
            _check(m.lib, m.lib.context_alloc(m.uc, &m.states[index]), "allocating a processor's state")
        m.lib.context_save(m.uc, m.states[index])
    return 0


cdef void _free_states(cpu_t *m) noexcept:
    cdef int index
    for index in range(MOST_PROCESSORS):
        if m.states[index] != NULL:
            m.lib.context_free(m.states[index])
            m.states[index] = NULL


cdef void _start(cpu_t *m, int index, uint32_t page) noexcept nogil:
    """The state after INIT and a STARTUP IPI (SDM volume 3, table 9-1 and section 8.4): real mode, CS:IP = page << 8:0."""
    cdef uint8_t *state = <uint8_t *>m.states[index] + STATE_OFFSET
    cdef x86_head_t *head = <x86_head_t *>state
    cdef x86_intercept_t *icpt = <x86_intercept_t *>(state + INTERCEPT_OFFSET)
    cdef int n
    memset(head.regs, 0, sizeof(head.regs))
    head.regs[RDX] = STARTUP_RDX
    head.rip = 0
    head.eflags = 2
    head.cc_src = 0
    head.cc_op = CC_OP_EFLAGS
    head.df = 1
    head.hflags = HF_GUEST | HF_ADDSEG
    head.hflags2 &= ~<uint32_t>HF2_NMI
    for n in range(SEGMENTS):
        _segment(&head.segs[n], 0, REAL_DATA_FLAGS)
    _segment(&head.segs[CS], page << 8, REAL_CODE_FLAGS)
    _segment(&head.ldt, 0, REAL_LDT_FLAGS)
    _segment(&head.tr, 0, REAL_TSS_FLAGS)
    _segment(&head.gdt, 0, 0)
    _segment(&head.idt, 0, 0)
    memset(head.cr, 0, sizeof(head.cr))
    head.cr[0] = CR0_EXTENSION_TYPE
    head.efer = 0
    icpt.error_code = 0
    icpt.exception_is_int = 0
    icpt.old_exception = -1


cdef void _segment(x86_segment_t *segment, uint32_t selector, uint32_t flags) noexcept nogil:
    segment.selector = selector
    segment.base = <uint64_t>selector << 4
    segment.limit = 0xFFFF
    segment.flags = flags


cdef void _switch(cpu_t *m) noexcept nogil:
    """Make `next_processor` the executing one. The live state must be complete: before a block, or after an intercept."""
    m.lib.context_save(m.uc, m.states[m.processor])
    m.processor = m.next_processor
    m.lib.context_restore(m.uc, m.states[m.processor])
    m.lib.ctl(m.uc, UC_CTL_TLB_FLUSH)
    m.flush += 1
    m.switches += 1
    m.block_size = 0
