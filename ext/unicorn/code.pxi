# Translated code and writes to it
#
# The library drops the translation of code that is written over only when the store takes its slow path, and by itself it
# lets stores to a page take the fast path after the first one, unless the page is under a memory hook. So all pages are
# under one. Which stores are fast is then decided where the TLB is filled (tlb.pxi): those to pages without translated code.


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
            if m.stored[page] == m.flush:           # an entry of the TLB lets stores to it through, see tlb.pxi
                m.lib.ctl(m.uc, UC_CTL_TLB_FLUSH)
                m.flush += 1
        if first >> 12 == last >> 12:
            return
        first = last


cdef void _on_translation(void *uc, uc_block_t *block, uc_block_t *previous, void *user) noexcept nogil:
    cdef cpu_t *m = <cpu_t *>user
    _note_code(m, block.pc, block.pc + (block.size - 1 if block.size else 0))
    m.translations += 1
    if m.translations - m.renewed >= MOST_TRANSLATIONS:
        m.renewing = True
        m.next_event = 0
