# Translated code and writes to it
#
# The library drops the translation of code that is written over only when the store takes its slow path, and it
# lets stores to a page take the fast path after the first one. It makes an exception for pages under a memory hook. So
# every page with translated code lies under one of a few hooks of a kind that never fires (all memory may be fetched
# from), and stores elsewhere stay fast.


cdef void _protect_code(cpu_t *m, uint64_t page) noexcept nogil:
    cdef uint64_t begin = page << 12, end = (page << 12) + PAGE - 1, distance, best = ~<uint64_t>0
    cdef code_range_t *r
    cdef code_range_t *near = NULL
    cdef int index
    cdef size_t hook = 0
    for index in range(m.range_count):
        r = &m.ranges[index]
        distance = r.begin - end if end < r.begin else begin - r.end if begin > r.end else 0
        if distance < best:
            best = distance
            near = r
    if near != NULL and (best <= CODE_RANGE_GAP * PAGE or m.range_count == MOST_CODE_RANGES):
        if begin < near.begin:
            near.begin = near.bounds[0] = begin
        if end > near.end:
            near.end = near.bounds[1] = end
    else:
        r = &m.ranges[m.range_count]
        if m.lib.hook_add(m.uc, &hook, UC_HOOK_MEM_FETCH_PROT, <void *>_never, m, begin, end):
            return
        r.begin = begin
        r.end = end
        r.bounds = <uint64_t *>(hook + 24)
        m.range_count += 1


cdef void _forget_written(cpu_t *m) noexcept nogil:
    """Drop the translations of pages that the host has written to, a disk's data for instance.

    The library drops by guest virtual address, through the page tables: so paging is off meanwhile.
    """
    cdef uint64_t page, pages = m.memory_size >> 12, paging
    m.code[pages] = 0
    m.lib.context_save(m.uc, m.context)
    paging = m.head.cr[0]
    m.head.cr[0] = paging & ~(<uint64_t>1 << 31)
    m.lib.context_restore(m.uc, m.context)
    m.lib.ctl(m.uc, UC_CTL_TLB_FLUSH)
    for page in range(pages):
        if m.code[page] == CODE_WRITTEN:
            m.code[page] = 0
            m.lib.ctl(m.uc, UC_CTL_TB_REMOVE, page << 12, (page + 1) << 12)
            m.pages_forgotten += 1
    m.lib.context_save(m.uc, m.context)
    m.head.cr[0] = paging
    m.lib.context_restore(m.uc, m.context)
    m.lib.ctl(m.uc, UC_CTL_TLB_FLUSH)


cdef bint _never(void *uc, int kind, uint64_t address, int size, int64_t value, void *user) noexcept nogil:
    return False


cdef void _note_code(cpu_t *m, uint64_t first, uint64_t last) noexcept nogil:
    """There is a translation of the code from guest virtual `first` to `last`, which are on one or two pages."""
    cdef uint64_t physical = 0, page
    while True:
        if not m.live.cr[0] >> PAGING_SHIFT & 1:
            physical = first
        elif _walk(m, m.live.cr[3], first, False, &physical) == NULL:
            physical = m.memory_size
        page = physical >> 12
        if physical < m.memory_size and m.code[page] != CODE_TRANSLATED:
            m.code[page] = CODE_TRANSLATED
            _protect_code(m, page)
            if m.stored[page] == m.flush:           # an entry of the TLB lets stores to it through, see tlb.pxi
                m.lib.ctl(m.uc, UC_CTL_TLB_FLUSH)
                m.flush += 1
        if first >> 12 == last >> 12:
            return
        first = last


cdef void _on_translation(void *uc, uc_block_t *block, uc_block_t *previous, void *user) noexcept nogil:
    _note_code(<cpu_t *>user, block.pc, block.pc + (block.size - 1 if block.size else 0))
