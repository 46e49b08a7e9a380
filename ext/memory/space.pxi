# Guest physical address spaces. Included by memory.pyx.

cdef class _Backing:
    """A memfd; closed when the last space that has pages of it is gone."""

    cdef int fd

    def __dealloc__(self):
        close_fd(self.fd)


cdef _Backing _backing(int fd):
    cdef _Backing backing = _Backing.__new__(_Backing)
    backing.fd = fd
    return backing


cdef inline bint _continues(const guest_page_t *page, const guest_page_t *before) noexcept nogil:
    """Whether two adjacent pages of a space can be in one mapping of the process."""
    return page.fd == before.fd and (page.fd < 0 or page.offset == before.offset + PAGE_BYTES)


cdef uint64_t _breaks(const guest_memory_t *memory, uint64_t first, uint64_t count) noexcept nogil:
    """How many of `count` pages from `first` on, and the page after them, do not continue the one before."""
    cdef uint64_t page, end = first + count, found = 0
    if count == 0:
        return 0
    if end == memory.size >> 12:
        end -= 1
    for page in range(first if first else 1, end + 1):
        found += not _continues(&memory.pages[page], &memory.pages[page - 1])
    return found


cdef int _check_file(fd, uint64_t size) except -1:
    """Whether the file behind a descriptor can be guest memory; else ValueError."""
    if not 0 <= fd <= 0x7fffffff:
        raise ValueError(f"guest memory in a file: {fd} is no descriptor")
    try:
        fits = os.fstat(fd).st_size >= size
        sealed = fcntl_module.fcntl(fd, fcntl_module.F_GET_SEALS) & F_SEAL_SHRINK
    except OSError as error:    # not open, or of a kind that has no seals and so may shrink at any time
        raise ValueError(f"guest memory in a file that is no memfd: {error.strerror}") from None
    if not fits or not sealed:
        raise ValueError("guest memory in a file that is too small or not sealed against shrinking")
    return 0


@cython.no_gc_clear     # the destructor needs what it refers to: cleared references are None
cdef class GuestMemory:
    """GuestMemory(size, *, mapped=True, fd=-1)\n--\n\nOne guest physical address space, from address 0 up.

    Args:
        size: bytes, a multiple of 4096.
        mapped: back every page with a memfd of the space's own, with all access rights. Otherwise the space
            starts empty and is filled with `map`.
        fd: an existing memfd to use (a duplicate of it) instead of a new one: the same memory in another process.

    Raises:
        ValueError: the size is not a positive multiple of 4096 below 2**46, or `fd` is no file that can be used: not
            open, no memfd, smaller, not sealed against shrinking, or not writable.
        OSError: the host has no memory or address space for it.
        TypeError: the size is no integer.

    Attributes:
        allowance: what the process's mappings for windows of it are charged to: an object with ``charge(count)``,
            which raises what `window` then raises, and ``release(count)``; or None. A window keeps it until it is
            unmapped.
    """

    def __cinit__(self, size, *, bint mapped=True, fd=-1):
        self.fd = -1
        self.sources = set()
        size = byte_count(size, "guest memory")
        if not 0 < size < MOST_MEMORY or size % PAGE_BYTES:
            raise ValueError(f"guest memory of {size} bytes: not a positive multiple of {PAGE_BYTES} below 2**46")
        cdef uint64_t length = size, page
        cdef int flags = MAP_PRIVATE | MAP_ANONYMOUS
        cdef bint theirs = fd != -1
        if theirs:
            _check_file(fd, length)
            self.fd = fcntl_module.fcntl(fd, fcntl_module.F_DUPFD_CLOEXEC, 0)
            self.backs = _backing(self.fd)
            mapped = True
            flags = MAP_SHARED
        elif mapped:
            self.fd = memfd_create("vmbus-guest", MFD_CLOEXEC | MFD_ALLOW_SEALING)
            if self.fd < 0:
                raise _os_error("guest memory")
            self.backs = _backing(self.fd)
            if ftruncate(self.fd, length) < 0:
                raise _os_error("guest memory")
            # A peer that holds the descriptor must not be able to shrink it under us: that would be SIGBUS.
            fcntl(self.fd, F_ADD_SEALS, <int>(F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
            flags = MAP_SHARED
        self.c.base = _reserve(length)
        if self.c.base == NULL:
            raise _os_error("guest memory")
        self.c.size = length
        if mmap(self.c.base, length, PROT_READ | PROT_WRITE, flags | MAP_NORESERVE | MAP_FIXED, self.fd, 0) == MAP_FAILED:
            if theirs and errno != ENOMEM:
                raise ValueError(f"guest memory in a file that cannot be mapped for writing: {os.strerror(errno)}")
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
        free(self.c.pages)
        self.breaks = 0
        try:
            self._settle()
        except BaseException:   # as in Window
            pass

    def __repr__(self):
        return f"<GuestMemory of {self.c.size:#x} bytes>" if self.c.base != NULL else "<GuestMemory, closed>"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

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
        return bytes_at(self.pointer(gpa, length, ACCESS_READ), length)

    def write(self, uint64_t gpa, data) -> None:
        """Copy `data` in.

        Raises:
            GuestMemoryError: the range is not wholly writable; nothing was written.
            TypeError: `data` has no bytes (text, numbers, an array of objects).
        """
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO)
        refuse_objects(data, &view)
        try:
            copy_bytes(self.pointer(gpa, view.len, ACCESS_WRITE), view.buf, view.len)
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

    @property
    def map_allowance(self):
        """What the mappings that the space falls apart into by `map` and `unmap` are charged to, or None: an object
        with ``adjust(count)``. It cannot refuse: what is taken out of a space must go."""
        return self._map_allowance

    @map_allowance.setter
    def map_allowance(self, allowance):
        if self._map_allowance is not None:
            self._map_allowance.adjust(-self.charged)
        self.charged = 0
        self._map_allowance = allowance
        self._settle()

    cdef int _settle(self) except -1:
        """Charge what the space falls apart into now."""
        cdef Py_ssize_t more = <Py_ssize_t>self.breaks - self.charged
        if self._map_allowance is not None and more:
            self.charged += more
            self._map_allowance.adjust(more)
        return 0

    @property
    def mappings(self) -> int:
        """How many mappings of the process the space takes: runs of pages that are adjacent in what backs them."""
        return self.breaks + 1 if self.c.base != NULL else 0

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
        if source is not self:
            # The descriptors behind our pages must stay open as long as windows may be made of them, also when the
            # source is closed: the number would soon be another file's.
            if source.backs is not None:
                self.sources.add(source.backs)
            self.sources.update(source.sources)
        self.breaks -= _breaks(&self.c, gpa >> 12, pages)
        try:
            while page < pages:
                backing = &source.c.pages[(source_gpa >> 12) + page]
                ours = &self.c.pages[(gpa >> 12) + page]
                run = 1
                while page + run < pages and _continues(&backing[run], &backing[run - 1]):
                    run += 1
                if mmap(self.c.base + gpa + (page << 12), run << 12, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_FIXED | MAP_NORESERVE, backing.fd, backing.offset) == MAP_FAILED:
                    raise _os_error("mapping guest pages")
                page += run
                while run:
                    run -= 1
                    ours[run] = backing[run]
                    ours[run].access = access
        finally:
            self.breaks += _breaks(&self.c, gpa >> 12, pages)
            self._settle()

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
        self.breaks -= _breaks(&self.c, gpa >> 12, length >> 12)
        for page in range(gpa >> 12, (gpa + length) >> 12):
            self.c.pages[page].access = 0
            self.c.pages[page].fd = -1
        self.breaks += _breaks(&self.c, gpa >> 12, length >> 12)
        # Harmless anonymous pages instead of a hole: code that runs without the GIL may still be copying. Should the
        # host refuse (too many mappings), the pages are out of reach all the same: every access looks at the rights.
        mmap(self.c.base + gpa, length, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0)
        self._settle()

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
            BudgetExceeded: whatever `allowance` raises.
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
            self.exports += 1   # while the allowance is asked: what backs the pages stays open
            try:
                window._map(pages, index, mirrored, self.allowance)
            finally:
                self.exports -= 1
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
            free(self.c.pages)
            self.c.pages = NULL
        self.fd = -1
        self.backs = None
        self.sources.clear()
        self.breaks = 0
        self._settle()      # last: while the allowance's lock is waited for, other threads run
