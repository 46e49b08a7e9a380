"""C interface of guest memory: pointers into a partition, and the GPA ranges of a packet as iovecs.

Functions without the GIL return 0 or a count, or one of the negative `MEMORY_…` codes.
"""

from cpython.buffer cimport Py_buffer, PyBuffer_Release
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef enum:
    PAGE_BYTES = 4096

cdef enum:
    # HV_MAP_GPA_* access flags of TLFS 7.9.1: readable, writable, executable (kernel and user)
    ACCESS_READ = 1
    ACCESS_WRITE = 2
    ACCESS_EXECUTE = 12

cdef enum:
    MEMORY_OUT_OF_RANGE = -101   # outside the partition, or mapped without the access asked for
    MEMORY_BAD_RANGE = -102      # a malformed GPA range: no bytes, offset of a page or more, too few PFNs

cdef struct guest_page_t:
    int32_t fd          # what backs the page, -1 while it is not mapped
    uint32_t access
    uint64_t offset     # bytes into fd

cdef struct guest_memory_t:
    uint8_t *base       # guest physical address 0
    uint64_t size       # bytes, a multiple of the page size
    guest_page_t *pages
    uint8_t *code       # a CODE_… byte for each page and one for all, while an engine translates code; else NULL

cdef enum:
    CODE_TRANSLATED = 1     # the engine keeps a translation of code on this page
    CODE_WRITTEN = 2        # and the host has written to the page since

cdef inline void note_write(const guest_memory_t *memory, uint64_t page) noexcept nogil:
    """The host writes to `page`: an engine that keeps translated code of it must drop that."""
    if memory.code != NULL and memory.code[page]:
        memory.code[page] = CODE_WRITTEN
        memory.code[memory.size >> 12] = CODE_WRITTEN

cdef inline uint8_t *guest_pointer(const guest_memory_t *memory, uint64_t gpa, uint64_t length, uint32_t access) noexcept nogil:
    """The guest's bytes at `gpa`, or NULL if any of them may not be accessed that way."""
    cdef uint64_t page, last
    if gpa > memory.size or length > memory.size - gpa:
        return NULL
    if length:
        last = (gpa + length - 1) >> 12
        page = gpa >> 12
        while page <= last:
            if (memory.pages[page].access & access) != access:
                return NULL
            if access & ACCESS_WRITE:
                note_write(memory, page)
            page += 1
    return memory.base + gpa

cdef struct gpa_cursor_t:
    # A walk over the GPA ranges of one packet: `data` must be a private copy, never shared memory.
    const uint8_t *data     # the next range
    const uint8_t *pfns     # of the current range
    uint64_t left           # bytes of the current range not yet produced
    uint64_t position       # byte_offset plus bytes already produced of the current range
    uint32_t ranges         # ranges after the current one

cdef int64_t gpa_ranges_check(const uint8_t *data, size_t length, uint32_t count) noexcept nogil
cdef void gpa_cursor_start(gpa_cursor_t *cursor, const uint8_t *data, uint32_t count) noexcept nogil
cdef int gpa_cursor_skip(gpa_cursor_t *cursor, uint64_t count) noexcept nogil
cdef int gpa_cursor_iov(gpa_cursor_t *cursor, const guest_memory_t *memory, uint32_t access, uint64_t want,
                        iovec *vectors, int most, uint64_t *covered) noexcept nogil
cdef int64_t gpa_transfer(const guest_memory_t *memory, gpa_cursor_t *cursor, int fd, uint64_t file_offset,
                          uint64_t length, bint to_guest) noexcept nogil

cdef inline int refuse_objects(object source, Py_buffer *view) except -1:
    """Release `view` of `source` and raise TypeError if its items are Python objects: their bytes are addresses.

    Written out they mean nothing to a reader, and written over they crash the interpreter.
    """
    if view.itemsize < <Py_ssize_t>sizeof(void *):      # nearly everything: not even asked
        return 0
    dtype = getattr(source, "dtype", None)
    if dtype.hasobject if dtype is not None else "O" in memoryview(source).format:
        PyBuffer_Release(view)
        raise TypeError("an array of Python objects has no bytes to send or receive: use a numeric dtype")
    return 0

cdef class GuestMemory:
    cdef guest_memory_t c
    cdef readonly int fd
    cdef Py_ssize_t exports
    cdef uint64_t breaks    # pages that do not continue the one before: each begins a mapping of the process
    cdef Py_ssize_t charged # of them to the allowance
    cdef public object allowance
    cdef object _map_allowance
    cdef int _settle(self) except -1
    cdef object backs       # the memfd of its own
    cdef object sources     # those of others whose pages it has
    cdef uint8_t *pointer(self, uint64_t gpa, uint64_t length, uint32_t access) except NULL
    cdef int _check_extent(self, uint64_t gpa, uint64_t length) except -1

cdef class Window:
    cdef uint8_t *base
    cdef size_t mapped          # bytes of address space, the mirror included
    cdef readonly Py_ssize_t size
    cdef readonly bint mirrored
    cdef readonly Py_ssize_t mappings
    cdef Py_ssize_t exports
    cdef object allowance       # what was charged for them
    cdef int _map(self, const guest_page_t *pages, size_t count, bint mirrored, object allowance) except -1
    cdef int _unmap(self) except -1

cdef class GpaRanges:
    cdef readonly bytes raw
    cdef readonly int64_t total
    cdef uint32_t count
    cdef int64_t _start(self, gpa_cursor_t *cursor, int64_t offset, object length) except -1
    cdef int _copy(self, GuestMemory memory, gpa_cursor_t *cursor, uint8_t *ours, uint64_t want, bint to_guest) except -1
    cdef int64_t _transfer(self, GuestMemory memory, int fd, uint64_t file_offset, int64_t offset, object length,
                           bint to_guest) except -1
