"""Guest physical memory on a memfd, and the ways into it.

A `GuestMemory` is one guest physical address space: pages of memfds mapped at one contiguous host address,
with an access right per page. Everything a peer names by guest physical address goes through it; an address
outside it, or a page mapped without the right, is a `GuestMemoryError`, never a fault.

A `Window` maps pages given by a scattered list of page frame numbers as one flat range of host addresses. For
a ring the pages after the first, the data area, are mapped twice in a row, so that a packet never wraps.

`GpaRanges` are the guest buffers that a GPA-direct packet names. They are copied out of the ring once, checked,
and then become iovecs: disk I/O runs between the host's file and the guest's pages without a copy.
"""

from cpython.buffer cimport PyBUF_CONTIG_RO, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

import fcntl as fcntl_module
import os
from collections import namedtuple

from vmbus.errors import GuestMemoryError, RingCorrupt

cdef extern from "<sys/mman.h>" nogil:
    enum:
        PROT_NONE
        PROT_READ
        PROT_WRITE
        MAP_SHARED
        MAP_PRIVATE
        MAP_ANONYMOUS
        MAP_NORESERVE
        MAP_FIXED
        MFD_CLOEXEC
        MFD_ALLOW_SEALING
    void *MAP_FAILED
    void *mmap(void *address, size_t length, int protection, int flags, int fd, int64_t offset)
    int munmap(void *address, size_t length)
    int memfd_create(const char *name, unsigned int flags)

cdef extern from "<fcntl.h>" nogil:
    enum:
        F_ADD_SEALS
        F_SEAL_SHRINK
        F_SEAL_GROW
        F_SEAL_SEAL
    int fcntl(int fd, int command, ...)

cdef extern from "<unistd.h>" nogil:
    int ftruncate(int fd, int64_t length)
    int close_fd "close"(int fd)

cdef extern from "<sys/uio.h>" nogil:
    ssize_t preadv(int fd, const iovec *vectors, int count, int64_t offset)
    ssize_t pwritev(int fd, const iovec *vectors, int count, int64_t offset)

cdef enum:
    MOST_VECTORS = 64           # iovecs a system call; more pages take more calls
    MOST_WINDOW_PAGES = 1 << 19

cdef uint64_t MOST_MEMORY = <uint64_t>1 << 46

Buffer = bytes | bytearray | memoryview     # and numpy arrays: for annotations, see the stub
PAGE_SIZE = <int>PAGE_BYTES
READ = <int>ACCESS_READ
WRITE = <int>ACCESS_WRITE
EXECUTE = <int>ACCESS_EXECUTE

GpaRange = namedtuple("GpaRange", "byte_count byte_offset pfns")
GpaRange.__doc__ = "One guest buffer: `byte_count` bytes from `byte_offset` (below 4096) of the first of its pages."


cdef object _os_error(str what):
    cdef int code = errno
    return OSError(code, f"{what}: {os.strerror(code)}")


cdef uint8_t *_reserve(size_t length) noexcept nogil:
    """Address space for `length` bytes, between two pages that nobody may touch; NULL if there is none.

    Without those, the kernel likes to put mappings side by side, and an overrun would hit another partition or ring.
    """
    cdef void *start = mmap(NULL, length + 2 * PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    return NULL if start == MAP_FAILED else <uint8_t *>start + PAGE_BYTES


cdef void _give_back(uint8_t *base, size_t length) noexcept nogil:
    """Undo `_reserve`, with whatever was mapped there."""
    munmap(base - PAGE_BYTES, length + 2 * PAGE_BYTES)


cdef class GuestMemory:
    """One guest physical address space, from address 0 up.

    Args:
        size: bytes, a multiple of 4096.
        mapped: back every page with a memfd of the space's own, with all access rights. Otherwise the space
            starts empty and is filled with `map`.
        fd: an existing memfd to use (a duplicate of it) instead of a new one: the same memory in another process.

    Raises:
        ValueError: the size is not a positive multiple of 4096 below 2**46, or `fd` is smaller or could shrink.
        OSError: the host has no memory or address space for it.
    """

    def __cinit__(self, size, *, bint mapped=True, int fd=-1):
        self.fd = -1
        self.sources = {}
        if not 0 < size < MOST_MEMORY or size % PAGE_BYTES:
            raise ValueError(f"guest memory of {size} bytes: not a positive multiple of {PAGE_BYTES} below 2**46")
        cdef uint64_t length = size, page
        cdef int flags = MAP_PRIVATE | MAP_ANONYMOUS
        if fd >= 0:
            if os.fstat(fd).st_size < size or not fcntl_module.fcntl(fd, fcntl_module.F_GET_SEALS) & F_SEAL_SHRINK:
                raise ValueError("guest memory in a file that is too small or not sealed against shrinking")
            self.fd = fcntl_module.fcntl(fd, fcntl_module.F_DUPFD_CLOEXEC, 0)
            mapped = True
            flags = MAP_SHARED
        elif mapped:
            self.fd = memfd_create("vmbus-guest", MFD_CLOEXEC | MFD_ALLOW_SEALING)
            if self.fd < 0 or ftruncate(self.fd, length) < 0:
                raise _os_error("guest memory")
            # A peer that holds the descriptor must not be able to shrink it under us: that would be SIGBUS.
            fcntl(self.fd, F_ADD_SEALS, <int>(F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
            flags = MAP_SHARED
        self.c.base = _reserve(length)
        if self.c.base == NULL:
            raise _os_error("guest memory")
        self.c.size = length
        if mmap(self.c.base, length, PROT_READ | PROT_WRITE, flags | MAP_NORESERVE | MAP_FIXED, self.fd, 0) == MAP_FAILED:
            raise _os_error("guest memory")
        self.c.pages = <guest_page_t *>calloc(length >> 12, sizeof(guest_page_t))
        if self.c.pages == NULL:
            raise MemoryError()
        for page in range(length >> 12):
            self.c.pages[page].fd = self.fd
            if mapped:
                self.c.pages[page].access = ACCESS_READ | ACCESS_WRITE | ACCESS_EXECUTE
                self.c.pages[page].offset = page << 12

    def __dealloc__(self):
        if self.c.base != NULL:
            _give_back(self.c.base, self.c.size)
        if self.fd >= 0:
            close_fd(self.fd)
        free(self.c.pages)

    @property
    def size(self) -> int:
        """Bytes of the address space."""
        return self.c.size

    @property
    def address(self) -> int:
        """Host virtual address of guest physical address 0; 0 once closed."""
        return <size_t>self.c.base

    cdef uint8_t *pointer(self, uint64_t gpa, uint64_t length, uint32_t access) except NULL:
        cdef uint8_t *p = guest_pointer(&self.c, gpa, length, access)
        if p == NULL or self.c.base == NULL:
            raise GuestMemoryError(f"{length} bytes at guest physical address {gpa:#x}: outside the partition's "
                                   f"{self.c.size:#x} bytes or mapped without the access")
        return p

    def read(self, uint64_t gpa, uint64_t length) -> bytes:
        """A copy of `length` bytes.

        Raises:
            GuestMemoryError: the range is not wholly readable.
        """
        return PyBytes_FromStringAndSize(<char *>self.pointer(gpa, length, ACCESS_READ), length)

    def write(self, uint64_t gpa, data) -> None:
        """Copy `data` in.

        Raises:
            GuestMemoryError: the range is not wholly writable; nothing was written.
        """
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO)
        try:
            memcpy(self.pointer(gpa, view.len, ACCESS_WRITE), view.buf, view.len)
        finally:
            PyBuffer_Release(&view)

    def view(self, uint64_t gpa, uint64_t length, *, bint writable=True) -> memoryview:
        """The guest's own bytes, not a copy: they may change at any time.

        Raises:
            GuestMemoryError: the range is not wholly accessible.
        """
        self.pointer(gpa, length, ACCESS_READ | (ACCESS_WRITE if writable else 0))
        whole = memoryview(self)[gpa:gpa + length]
        return whole if writable else whole.toreadonly()

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if self.c.base == NULL:
            raise GuestMemoryError("the guest memory is closed")
        PyBuffer_FillInfo(buffer, self, self.c.base, self.c.size, 0, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self.exports -= 1

    def access(self, uint64_t gpa) -> int:
        """The access rights of the page at `gpa`; 0 where nothing is mapped or outside the space."""
        return self.c.pages[gpa >> 12].access if gpa < self.c.size else 0

    def backing(self, uint64_t gpa) -> tuple:
        """Where the byte at `gpa` really is: the descriptor of a memfd, and an offset in it (its system address).

        Two addresses, of whichever partitions, are the same memory exactly if these are equal.

        Raises:
            GuestMemoryError: no page is mapped there.
        """
        if gpa >= self.c.size or self.c.pages[gpa >> 12].fd < 0:
            raise GuestMemoryError(f"no page is mapped at {gpa:#x}")
        return self.c.pages[gpa >> 12].fd, self.c.pages[gpa >> 12].offset + (gpa & 0xfff)

    cdef int _check_extent(self, uint64_t gpa, uint64_t length) except -1:
        if gpa % PAGE_BYTES or length % PAGE_BYTES:
            raise ValueError(f"{length:#x} bytes at {gpa:#x}: not whole pages")
        if gpa > self.c.size or length > self.c.size - gpa:
            raise GuestMemoryError(f"{length:#x} bytes at {gpa:#x} are outside the address space of {self.c.size:#x}")
        return 0

    def map(self, uint64_t gpa, GuestMemory source, uint64_t source_gpa, uint64_t length, uint32_t access) -> None:
        """Map pages of another address space (or of this one) at `gpa`, replacing what was there.

        The mapping refers to the pages that back `source` now; it stays when `source` changes its own map.

        Raises:
            GuestMemoryError: either range is outside its space, or the source has no page there.
            ValueError: an address or the length is not page aligned.
            OSError: the host cannot map it.
        """
        cdef uint64_t page = 0, run, pages = length >> 12
        cdef guest_page_t *backing
        cdef guest_page_t *ours
        self._check_extent(gpa, length)
        source._check_extent(source_gpa, length)
        for page in range(pages):
            if source.c.pages[(source_gpa >> 12) + page].fd < 0:
                raise GuestMemoryError(f"the source has no page at {source_gpa + (page << 12):#x}")
        page = 0
        while page < pages:
            backing = &source.c.pages[(source_gpa >> 12) + page]
            ours = &self.c.pages[(gpa >> 12) + page]
            run = 1
            while page + run < pages and backing[run].fd == backing.fd and backing[run].offset == backing.offset + (run << 12):
                run += 1
            if mmap(self.c.base + gpa + (page << 12), run << 12, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_FIXED | MAP_NORESERVE, backing.fd, backing.offset) == MAP_FAILED:
                raise _os_error("mapping guest pages")
            page += run
            while run:
                run -= 1
                ours[run] = backing[run]
                ours[run].access = access
        if source is not self:
            # The descriptors behind our pages must stay open as long as windows may be made of them.
            self.sources[id(source)] = source
            self.sources.update(source.sources)

    def unmap(self, uint64_t gpa, uint64_t length) -> None:
        """Take pages out of the space; their contents stay with whoever else has them mapped.

        Raises:
            GuestMemoryError: the range is outside the space.
            ValueError: the address or the length is not page aligned.
        """
        cdef uint64_t page
        self._check_extent(gpa, length)
        if length == 0:
            return
        for page in range(gpa >> 12, (gpa + length) >> 12):
            self.c.pages[page].access = 0
            self.c.pages[page].fd = -1
        # Harmless anonymous pages instead of a hole: code that runs without the GIL may still be copying.
        if mmap(self.c.base + gpa, length, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED:
            raise _os_error("unmapping guest pages")

    def protect(self, uint64_t gpa, uint64_t length, uint32_t access) -> None:
        """Change the access rights of mapped pages.

        Raises:
            GuestMemoryError: the range is outside the space or not wholly mapped.
            ValueError: the address or the length is not page aligned.
        """
        cdef uint64_t page
        self._check_extent(gpa, length)
        for page in range(gpa >> 12, (gpa + length) >> 12):
            if self.c.pages[page].fd < 0:
                raise GuestMemoryError(f"no page is mapped at {page << 12:#x}")
        for page in range(gpa >> 12, (gpa + length) >> 12):
            self.c.pages[page].access = access

    def window(self, pfns, *, bint mirrored=True) -> Window:
        """Map the pages `pfns` (page frame numbers, in this order) as one flat range.

        Args:
            pfns: guest page frame numbers; they may repeat and come in any order.
            mirrored: for a ring: the pages after the first are mapped twice in a row.

        Raises:
            GuestMemoryError: a page is outside the space, or not both readable and writable.
            ValueError: no pages, or too few for a ring.
            OSError: the host cannot map it.
        """
        cdef Window window = Window.__new__(Window)
        cdef uint64_t pfn
        cdef size_t index = 0
        numbers = list(pfns)
        cdef guest_page_t *pages = <guest_page_t *>calloc(len(numbers) or 1, sizeof(guest_page_t))
        if pages == NULL:
            raise MemoryError()
        try:
            for number in numbers:
                if not 0 <= number < self.c.size >> 12:
                    raise GuestMemoryError(f"page {number:#x} is outside the partition")
                pfn = number
                if (self.c.pages[pfn].access & (ACCESS_READ | ACCESS_WRITE)) != ACCESS_READ | ACCESS_WRITE:
                    raise GuestMemoryError(f"page {pfn:#x} is mapped without the access")
                pages[index] = self.c.pages[pfn]
                index += 1
            window._map(pages, len(numbers), mirrored)
        finally:
            free(pages)
        return window

    def close(self) -> None:
        """Give the memory back now instead of when the last reference goes.

        Raises:
            BufferError: views of it, or native users, still exist.
        """
        if self.exports:
            raise BufferError("views of this guest memory still exist")
        if self.c.base != NULL:
            _give_back(self.c.base, self.c.size)
            self.c.base = NULL
            self.c.size = 0
        if self.fd >= 0:
            close_fd(self.fd)
            self.fd = -1
        self.sources.clear()


cdef class Window:
    """Guest pages mapped as one flat range of host addresses; made by `GuestMemory.window` or `Window.allocate`.

    Supports the buffer protocol over its pages, each once. A mirrored window is what a ring lives in: one control
    page, then the data area.

    Attributes:
        size: bytes of the pages, each counted once.
        mirrored: the pages after the first are mapped twice in a row.
    """

    cdef int _map(self, const guest_page_t *pages, size_t count, bint mirrored) except -1:
        cdef size_t index = 0, run
        if count < (2 if mirrored else 1):
            raise ValueError("a ring needs a control page and at least one data page" if mirrored else "no pages")
        if count > MOST_WINDOW_PAGES:
            raise ValueError(f"a window of {count} pages is too large")
        cdef size_t data = count - 1
        cdef size_t total = count + (data if mirrored else 0)
        self.base = _reserve(total << 12)
        if self.base == NULL:
            raise _os_error("mapping a window")
        self.mapped = total << 12
        self.size = count << 12
        self.mirrored = mirrored
        cdef const guest_page_t *page
        while index < total:
            page = &pages[index if index < count else index - data]
            run = 1
            # Adjacent pages of one file go into one mapping; the mirror starts a new one.
            while (index + run < total and index + run != count and page[run].fd == page.fd
                   and page[run].offset == page.offset + (run << 12)):
                run += 1
            if mmap(self.base + (index << 12), run << 12, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                    page.fd, page.offset) == MAP_FAILED:
                raise _os_error("mapping a window")
            index += run
        return 0

    def __dealloc__(self):
        if self.base != NULL:
            _give_back(self.base, self.mapped)

    @staticmethod
    def allocate(data_pages) -> Window:
        """A mirrored window of new, zeroed memory: one control page and `data_pages` pages of data."""
        if not 0 < data_pages < MOST_WINDOW_PAGES:
            raise ValueError(f"a ring of {data_pages} data pages")
        fd = os.memfd_create("vmbus-ring")
        try:
            os.ftruncate(fd, (data_pages + 1) * PAGE_BYTES)
            return Window.from_fd(fd, range(data_pages + 1))
        finally:
            os.close(fd)

    @staticmethod
    def from_fd(int fd, pages, *, bint mirrored=True) -> Window:
        """Map `pages` (page numbers within the file `fd`, in this order); the descriptor may be closed afterwards.

        The file must not shrink while the window exists: seal it if a peer holds its descriptor.

        Raises:
            ValueError: a page is beyond the end of the file, or there are too few.
            OSError: the host cannot map it.
        """
        cdef Window window = Window.__new__(Window)
        cdef size_t index
        numbers = list(pages)
        cdef guest_page_t *backing = <guest_page_t *>calloc(len(numbers) or 1, sizeof(guest_page_t))
        if backing == NULL:
            raise MemoryError()
        try:
            limit = os.fstat(fd).st_size // PAGE_BYTES
            for index, number in enumerate(numbers):
                if not 0 <= number < limit:
                    raise ValueError(f"page {number} of a file of {limit} pages")
                backing[index].fd = fd
                backing[index].offset = <uint64_t>number << 12
            window._map(backing, len(numbers), mirrored)
        finally:
            free(backing)
        return window

    @property
    def address(self) -> int:
        """Host virtual address of the first byte; 0 once closed."""
        return <size_t>self.base

    def view(self) -> memoryview:
        """The pages' bytes, writable, each page once."""
        return memoryview(self)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if self.base == NULL:
            raise GuestMemoryError("the window is closed")
        PyBuffer_FillInfo(buffer, self, self.base, self.size, 0, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self.exports -= 1

    def close(self) -> None:
        """Unmap now instead of when the last reference goes.

        Raises:
            BufferError: rings or views over it still exist.
        """
        if self.exports:
            raise BufferError("rings or views over this window still exist")
        if self.base != NULL:
            _give_back(self.base, self.mapped)
            self.base = NULL


# GPA ranges. Wire format (a GPA-direct packet's header after its first 24 bytes): for each range a 32-bit byte count,
# a 32-bit byte offset into the first page, and one 64-bit page frame number for every page that it touches.

cdef inline uint64_t _u64(const uint8_t *p) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, p, 8)
    return value


cdef int64_t gpa_ranges_check(const uint8_t *data, size_t length, uint32_t count) noexcept nogil:
    """Total bytes named by `count` ranges in `length` bytes of private memory, or MEMORY_BAD_RANGE."""
    cdef uint64_t head, size, pages, total = 0
    cdef size_t at = 0
    if count == 0:
        return MEMORY_BAD_RANGE
    while count:
        if length - at < 8:
            return MEMORY_BAD_RANGE
        head = _u64(data + at)
        at += 8
        size = <uint32_t>head
        if size == 0 or (head >> 32) >= PAGE_BYTES:
            return MEMORY_BAD_RANGE
        pages = (size + (head >> 32) + PAGE_BYTES - 1) >> 12
        if pages > (length - at) >> 3:
            return MEMORY_BAD_RANGE
        at += pages << 3
        total += size
        count -= 1
    return total


cdef inline void _next_range(gpa_cursor_t *cursor) noexcept nogil:
    cdef uint64_t head = _u64(cursor.data)
    cursor.pfns = cursor.data + 8
    cursor.left = <uint32_t>head
    cursor.position = head >> 32
    cursor.data = cursor.pfns + (((cursor.left + cursor.position + PAGE_BYTES - 1) >> 12) << 3)
    cursor.ranges -= 1


cdef void gpa_cursor_start(gpa_cursor_t *cursor, const uint8_t *data, uint32_t count) noexcept nogil:
    """Begin a walk over ranges that `gpa_ranges_check` accepted."""
    cursor.data = data
    cursor.ranges = count
    cursor.left = 0
    cursor.position = 0
    cursor.pfns = data
    if count:
        _next_range(cursor)


cdef int gpa_cursor_skip(gpa_cursor_t *cursor, uint64_t count) noexcept nogil:
    """Pass over `count` bytes; MEMORY_OUT_OF_RANGE if there are fewer."""
    cdef uint64_t step
    while count:
        if cursor.left == 0:
            if cursor.ranges == 0:
                return MEMORY_OUT_OF_RANGE
            _next_range(cursor)
        step = count if count < cursor.left else cursor.left
        cursor.left -= step
        cursor.position += step
        count -= step
    return 0


cdef int gpa_cursor_iov(gpa_cursor_t *cursor, const guest_memory_t *memory, uint32_t access, uint64_t want,
                        iovec *vectors, int most, uint64_t *covered) noexcept nogil:
    """Turn up to `want` of the next bytes into at most `most` iovecs.

    Returns the number of iovecs and sets `covered` to their bytes; or MEMORY_OUT_OF_RANGE.
    """
    cdef int used = 0
    cdef uint64_t pfn, step, done = 0
    cdef uint8_t *p
    while done < want:
        if cursor.left == 0:
            if cursor.ranges == 0:
                break
            _next_range(cursor)
        pfn = _u64(cursor.pfns + ((cursor.position >> 12) << 3))
        step = PAGE_BYTES - (cursor.position & (PAGE_BYTES - 1))
        if step > cursor.left:
            step = cursor.left
        if step > want - done:
            step = want - done
        if pfn >= memory.size >> 12 or (memory.pages[pfn].access & access) != access:
            return MEMORY_OUT_OF_RANGE
        if access & ACCESS_WRITE:
            note_write(memory, pfn)
        p = memory.base + (pfn << 12) + (cursor.position & (PAGE_BYTES - 1))
        if used and <uint8_t *>vectors[used - 1].iov_base + vectors[used - 1].iov_len == p:
            vectors[used - 1].iov_len += step
        elif used == most:
            break
        else:
            vectors[used].iov_base = p
            vectors[used].iov_len = step
            used += 1
        cursor.left -= step
        cursor.position += step
        done += step
    covered[0] = done
    return used


cdef int64_t gpa_transfer(const guest_memory_t *memory, gpa_cursor_t *cursor, int fd, uint64_t file_offset,
                          uint64_t length, bint to_guest) noexcept nogil:
    """Move `length` bytes between a host file and the next guest bytes of `cursor`, without a copy of our own.

    Returns the bytes moved (fewer only at the end of the file or of the ranges), MEMORY_OUT_OF_RANGE, or minus the
    errno of the host's failed call (always above -100).
    """
    cdef iovec vectors[MOST_VECTORS]
    cdef uint64_t covered, done = 0
    cdef gpa_cursor_t before
    cdef ssize_t moved
    cdef int used
    while done < length:
        before = cursor[0]
        used = gpa_cursor_iov(cursor, memory, ACCESS_WRITE if to_guest else ACCESS_READ, length - done, vectors,
                              MOST_VECTORS, &covered)
        if used < 0:
            return used
        if used == 0:
            break
        if to_guest:
            moved = preadv(fd, vectors, used, file_offset + done)
        else:
            moved = pwritev(fd, vectors, used, file_offset + done)
        if moved < 0:
            if errno == EINTR:
                cursor[0] = before
                continue
            return -errno if errno < 100 else -5
        done += moved
        if <uint64_t>moved < covered:
            if moved == 0:
                break
            cursor[0] = before
            gpa_cursor_skip(cursor, moved)
    return done


cdef class GpaRanges:
    """Guest buffers as a GPA-direct packet names them, in a private, checked copy.

    Args:
        ranges: (byte_count, byte_offset, pfns) for each buffer.

    Raises:
        ValueError: a range names no bytes, starts beyond its first page, or has the wrong number of pages.

    Attributes:
        total: bytes of all ranges together.
        raw: the wire form, without the packet's range count.
    """

    def __init__(self, ranges):
        parts = []
        count = 0
        for byte_count, byte_offset, pfns in ranges:
            if not 0 < byte_count < 1 << 32 or not 0 <= byte_offset < PAGE_BYTES:
                raise ValueError(f"a range of {byte_count} bytes at offset {byte_offset} of its first page")
            if len(pfns) != (byte_count + byte_offset + PAGE_BYTES - 1) // PAGE_BYTES:
                raise ValueError(f"{len(pfns)} pages for {byte_count} bytes at offset {byte_offset}")
            parts.append(byte_count | byte_offset << 32)
            parts.extend(pfns)
            count += 1
        if not count:
            raise ValueError("no ranges")
        self.raw = b"".join([part.to_bytes(8, "little") for part in parts])
        self.count = count
        self.total = gpa_ranges_check(<const uint8_t *>PyBytes_AS_STRING(self.raw), len(self.raw), self.count)

    @staticmethod
    def parse(data, uint32_t count) -> GpaRanges:
        """`count` ranges in wire form; bytes after them are ignored.

        Raises:
            RingCorrupt: a range names no bytes, starts beyond its first page, or needs more pages than are there.
        """
        cdef GpaRanges ranges = GpaRanges.__new__(GpaRanges)
        ranges.raw = bytes(data)
        ranges.count = count
        ranges.total = gpa_ranges_check(<const uint8_t *>PyBytes_AS_STRING(ranges.raw), len(ranges.raw), count)
        if ranges.total < 0:
            raise RingCorrupt(f"malformed GPA ranges: {count} in {len(ranges.raw)} bytes")
        return ranges

    @staticmethod
    def contiguous(uint64_t gpa, uint64_t length) -> GpaRanges:
        """One buffer of `length` bytes at guest physical address `gpa`."""
        first = gpa // PAGE_BYTES
        return GpaRanges([(length, gpa % PAGE_BYTES, range(first, (gpa + length + PAGE_BYTES - 1) // PAGE_BYTES))])

    def __len__(self):
        return self.count

    def __iter__(self):
        at = 0
        for _ in range(self.count):
            byte_count = int.from_bytes(self.raw[at:at + 4], "little")
            byte_offset = int.from_bytes(self.raw[at + 4:at + 8], "little")
            pages = (byte_count + byte_offset + PAGE_BYTES - 1) // PAGE_BYTES
            pfns = memoryview(self.raw)[at + 8:at + 8 + 8 * pages].cast("Q")
            yield GpaRange(byte_count, byte_offset, tuple(pfns))
            at += 8 + 8 * pages

    def __getitem__(self, index):
        return list(self)[index]

    def pack(self) -> bytes:
        """The wire form, without the packet's range count."""
        return self.raw

    cdef int64_t _start(self, gpa_cursor_t *cursor, int64_t offset, object length) except -1:
        """Place `cursor` at `offset`; returns the bytes to move."""
        cdef int64_t want = self.total - offset if length is None else length
        if offset < 0 or offset > self.total or want < 0 or want > self.total - offset:
            raise GuestMemoryError(f"{want} bytes at {offset} of guest ranges of {self.total} bytes")
        gpa_cursor_start(cursor, <const uint8_t *>PyBytes_AS_STRING(self.raw), self.count)
        gpa_cursor_skip(cursor, offset)
        return want

    cdef int _copy(self, GuestMemory memory, gpa_cursor_t *cursor, uint8_t *ours, uint64_t want, bint to_guest) except -1:
        cdef iovec vectors[MOST_VECTORS]
        cdef uint64_t covered, left = want
        cdef int used, index
        cdef uint32_t access = ACCESS_WRITE if to_guest else ACCESS_READ
        # All pages are checked before the first byte moves, so that a refused copy has changed nothing.
        cdef gpa_cursor_t check = cursor[0]
        while left:
            used = gpa_cursor_iov(&check, &memory.c, access, left, vectors, MOST_VECTORS, &covered)
            if used <= 0:
                raise GuestMemoryError("a page of the guest's buffer is outside the partition or mapped without the access")
            left -= covered
        while want:
            used = gpa_cursor_iov(cursor, &memory.c, access, want, vectors, MOST_VECTORS, &covered)
            for index in range(used):
                if to_guest:
                    memcpy(vectors[index].iov_base, ours, vectors[index].iov_len)
                else:
                    memcpy(ours, vectors[index].iov_base, vectors[index].iov_len)
                ours += vectors[index].iov_len
            want -= covered
        return 0

    def read(self, GuestMemory memory, int64_t offset=0, length=None) -> bytes:
        """A copy of the guest's bytes from `offset` on.

        Raises:
            GuestMemoryError: outside the ranges, or a page that may not be read.
        """
        cdef gpa_cursor_t cursor
        cdef int64_t want = self._start(&cursor, offset, length)
        cdef bytes result = PyBytes_FromStringAndSize(NULL, want)
        self._copy(memory, &cursor, <uint8_t *>PyBytes_AS_STRING(result), want, False)
        return result

    def write(self, GuestMemory memory, data, int64_t offset=0) -> None:
        """Copy `data` into the guest's buffers from `offset` on.

        Raises:
            GuestMemoryError: longer than the ranges, or a page that may not be written; nothing was written.
        """
        cdef gpa_cursor_t cursor
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO)
        try:
            self._start(&cursor, offset, view.len)
            self._copy(memory, &cursor, <uint8_t *>view.buf, view.len, True)
        finally:
            PyBuffer_Release(&view)

    cdef int64_t _transfer(self, GuestMemory memory, int fd, uint64_t file_offset, int64_t offset, object length,
                           bint to_guest) except -1:
        cdef gpa_cursor_t cursor
        cdef int64_t want = self._start(&cursor, offset, length), moved
        memory.exports += 1     # nobody closes it while the GIL is released
        with nogil:
            moved = gpa_transfer(&memory.c, &cursor, fd, file_offset, want, to_guest)
        memory.exports -= 1
        if moved == MEMORY_OUT_OF_RANGE:
            raise GuestMemoryError("a page of the guest's buffer is outside the partition or mapped without the access")
        if moved < 0:
            raise OSError(-moved, os.strerror(-moved))
        return moved

    def preadv(self, GuestMemory memory, int fd, uint64_t file_offset, int64_t offset=0, length=None) -> int:
        """Read from the host file into the guest's buffers, GIL released.

        Returns:
            bytes moved; fewer than asked for only at the end of the file.

        Raises:
            GuestMemoryError: a page outside the partition or not writable (earlier pages may have been filled).
            OSError: the host's read failed.
        """
        return self._transfer(memory, fd, file_offset, offset, length, True)

    def pwritev(self, GuestMemory memory, int fd, uint64_t file_offset, int64_t offset=0, length=None) -> int:
        """Write the guest's buffers to the host file, GIL released; as `preadv`."""
        return self._transfer(memory, fd, file_offset, offset, length, False)
