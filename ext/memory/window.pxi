# Scattered pages as one flat range. Included by memory.pyx.

cdef enum:
    GUARDS = 2                  # mappings of the pages before and after a window that nobody may touch


cdef inline size_t _run(const guest_page_t *pages, size_t count, size_t total, size_t index) noexcept nogil:
    """How many pages of a window from `index` on go into one mapping: adjacent pages of one file; the mirror of the
    data, which begins at `count`, starts a new one."""
    cdef const guest_page_t *page = &pages[index if index < count else index - (count - 1)]
    cdef size_t run = 1
    while (index + run < total and index + run != count and page[run].fd == page.fd
           and page[run].offset == page.offset + (run << 12)):
        run += 1
    return run


@cython.no_gc_clear     # the destructor needs what it refers to: cleared references are None
cdef class Window:
    """Guest pages mapped as one flat range of host addresses; made by `GuestMemory.window` or `Window.allocate`.

    Supports the buffer protocol over its pages, each once. A mirrored window is what a ring lives in: one control
    page, then the data area.

    Attributes:
        size: bytes of the pages, each counted once.
        mirrored: the pages after the first are mapped twice in a row.
        mappings: how many mappings of the process it takes: one for each run of adjacent pages, and the guard pages.
    """

    cdef int _map(self, const guest_page_t *pages, size_t count, bint mirrored, object allowance) except -1:
        cdef size_t index = 0, run
        cdef Py_ssize_t mappings = GUARDS
        cdef const guest_page_t *page
        if count < (2 if mirrored else 1):
            raise ValueError("a ring needs a control page and at least one data page" if mirrored else "no pages")
        if count > MOST_WINDOW_PAGES:
            raise ValueError(f"a window of {count} pages is too large")
        cdef size_t data = count - 1
        cdef size_t total = count + (data if mirrored else 0)
        while index < total:
            index += _run(pages, count, total, index)
            mappings += 1
        if allowance is not None:
            allowance.charge(mappings)
            self.allowance = allowance
        self.mappings = mappings
        index = 0
        self.base = _reserve(total << 12)
        if self.base == NULL:
            raise _os_error("mapping a window")
        self.mapped = total << 12
        self.size = count << 12
        self.mirrored = mirrored
        while index < total:
            page = &pages[index if index < count else index - data]
            run = _run(pages, count, total, index)
            if mmap(self.base + (index << 12), run << 12, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                    page.fd, page.offset) == MAP_FAILED:
                raise _os_error("mapping a window")
            index += run
        return 0

    cdef int _unmap(self) except -1:
        """Give the address space back, and what was charged for it."""
        allowance, self.allowance = self.allowance, None
        if self.base != NULL:
            _give_back(self.base, self.mapped)
            self.base = NULL
        if allowance is not None:
            allowance.release(self.mappings)
        return 0

    def __dealloc__(self):
        try:
            self._unmap()
        except BaseException:   # the interpreter ends and has taken the allowance's module apart: nobody counts any more
            pass

    def __init__(self, *_, **__):
        raise TypeError("windows are made by GuestMemory.window, Window.allocate and Window.from_fd")

    def __repr__(self):
        kind = " and their mirror" if self.mirrored else ""
        return f"<Window of {self.size // PAGE_BYTES} pages{kind}>" if self.base != NULL else "<Window, closed>"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @staticmethod
    def allocate(data_pages) -> Window:
        """A mirrored window of new, zeroed memory: one control page and `data_pages` pages of data.

        Raises:
            ValueError: no pages, or too many.
            OSError: the host has no memory, mappings or descriptors for it.
        """
        if not 0 < data_pages < MOST_WINDOW_PAGES:
            raise ValueError(f"a ring of {data_pages} data pages")
        fd = os.memfd_create("vmbus-ring")
        try:
            os.ftruncate(fd, (data_pages + 1) * PAGE_BYTES)
            return Window.from_fd(fd, range(data_pages + 1))
        finally:
            os.close(fd)

    @staticmethod
    def from_fd(fd, pages, *, bint mirrored=True) -> Window:
        """Map `pages` (page numbers within the file `fd`, in this order); the descriptor may be closed afterwards.

        The file must not shrink while the window exists: seal it if a peer holds its descriptor.

        Raises:
            ValueError: a page is beyond the end of the file, there are too few, or `fd` cannot be a descriptor.
            OSError: the host cannot map it: it is not open, not a file, or not writable.
        """
        cdef Window window = Window.__new__(Window)
        cdef size_t index
        numbers = list(pages)
        if not 0 <= fd <= 0x7fffffff:
            raise ValueError(f"{fd} is no descriptor")
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
            window._map(backing, len(numbers), mirrored, None)
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
        self._unmap()
