# The processor's TLB, filled from the guest's page tables by our own walk
#
# The library fills its TLB with all rights that a page table entry gives. That makes stores slow wherever a guest may
# also execute, which is all of a kernel's memory while it starts: an entry that can be fetched from sends every store through
# C code that looks for translations to drop. So entries are made for one kind of access at a time: a load or a store gets
# no right to execute, a fetch none to write, and stores to a page go straight to memory until code on it is translated.


cdef bint _map(cpu_t *m, uint64_t address, int access, int mmu_index) noexcept nogil:
    """Enter the page of `address` into the TLB.

    Returns:
        False if it is not mapped so, not RAM, or anything about it is unusual; the library then decides, and faults.
    """
    cdef x86_head_t *cpu = m.live
    cdef bint user = mmu_index == MMU_USER
    cdef uint64_t table = cpu.cr[3] & FRAME_MASK, offset, entry, physical, page, size
    cdef uint64_t allowed = PAGE_USER | PAGE_WRITABLE, reserved = FRAME_RESERVED, no_execute = 0
    cdef uint64_t *at
    cdef int level = 4, shift, rights = 0
    if (not cpu.hflags & HF_LMA or not cpu.cr[0] >> PAGING_SHIFT & 1 or cpu.cr[4] & (CR4_LA57 | CR4_PKE)
            or not (<int64_t>address >> 47 == 0 or <int64_t>address >> 47 == -1)):
        return False
    if not cpu.efer & EFER_NXE:
        reserved |= NO_EXECUTE
    while True:
        level -= 1
        shift = 12 + 9 * level
        offset = table + (address >> shift & 511) * 8
        if offset > m.memory_size - 8:
            return False
        at = <uint64_t *>(m.memory + offset)
        entry = at[0]
        if not entry & PAGE_PRESENT or entry & reserved:
            return False
        allowed &= entry
        no_execute |= entry & NO_EXECUTE
        if level == 0 or entry & PAGE_LARGE:
            break
        if not entry & PAGE_ACCESSED:
            at[0] = entry | PAGE_ACCESSED
        table = entry & FRAME_MASK
    size = <uint64_t>1 << shift
    if level == 3 or entry & FRAME_MASK & size - 1 & ~<uint64_t>PAGE or user and not allowed & PAGE_USER:
        return False
    if mmu_index != MMU_KERNEL_SMAP or not allowed & PAGE_USER:
        rights = RIGHT_READ
        if allowed & PAGE_WRITABLE or not user and not cpu.cr[0] >> WRITE_PROTECT_SHIFT & 1:
            rights |= RIGHT_WRITE
    if not no_execute and (user or not (cpu.cr[4] & CR4_SMEP and allowed & PAGE_USER)):
        rights |= RIGHT_EXECUTE
    physical = entry & FRAME_MASK & ~(size - 1) | address & size - 1
    if not rights >> access & 1 or physical >= m.memory_size:
        return False
    if access == ACCESS_STORE:
        entry |= PAGE_DIRTY
    entry |= PAGE_ACCESSED
    if entry != at[0]:
        at[0] = entry
    if not entry & PAGE_DIRTY:
        rights &= ~RIGHT_WRITE                      # the first store comes here to set the bit
    address &= ~<uint64_t>(PAGE - 1)
    page = physical >> 12
    if m.code[page]:
        m.lib.tlb_set_page(m.cpu, address, page << 12, 0, rights, mmu_index, size)
        return True
    if access == ACCESS_FETCH:
        rights &= ~RIGHT_WRITE
    else:
        rights &= ~RIGHT_EXECUTE
        if access == ACCESS_STORE:
            m.stored[page] = m.flush
        elif m.stored[page] != m.flush:
            rights &= ~RIGHT_WRITE
    m.lib.tlb_set_page(m.cpu, address, page << 12, 0, rights, mmu_index, size)
    if rights & RIGHT_WRITE:
        m.lib.tlb_set_dirty(m.cpu, address)         # no store needs to be looked at
    return True


cdef uint8_t _on_tlb_miss(void *cpu, uint64_t address, int size, int access, int mmu_index, uint8_t probe,
                          size_t origin) noexcept nogil:
    cdef cpu_t *m = <cpu_t *>vmbus_running
    if m != NULL and m.cpu == cpu and _map(m, address, access, mmu_index):
        return True
    return library.tlb_fill(cpu, address, size, access, mmu_index, probe, origin)   # raises a fault by a long jump


cdef void *_on_memory_mapping(void *uc, uint64_t address) noexcept nogil:
    """The library asks this at every access that its TLB does not answer; nearly always for RAM."""
    cdef cpu_t *m = <cpu_t *>vmbus_running
    if m != NULL and m.uc == uc and address < m.memory_size:
        return m.ram
    return library.memory_mapping(uc, address)


cdef int _serve_tlb(cpu_t *m) except -1:
    """Put the functions above where the library keeps its own; `_find_processor` has found the places."""
    m.ram = m.lib.memory_mapping(m.uc, 0)
    m.memory_mapping_slot[0] = <size_t><void *>_on_memory_mapping
    m.tlb_fill_slot[0] = <size_t><void *>_on_tlb_miss
    (<uint8_t *>m.uc + UC_NO_EXIT_REQUEST_OFFSET)[0] = 1
    return 0


cdef int _emulate(cpu_t *m, uint64_t rip) noexcept nogil:
    """Run the library on this thread, perhaps in the midst of another processor's exit."""
    cdef void *outer = vmbus_running
    cdef int code
    (&vmbus_running)[0] = m
    code = m.lib.emu_start(m.uc, rip, 0, 0, 0)
    (&vmbus_running)[0] = outer
    return code
