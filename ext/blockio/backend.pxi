# Requests as a Python backend gets them: one, or many at once. Included by blockio.pyx.

cdef enum:
    MOST_BATCH = 64             # requests that a Python backend gets at once
    SINGLE_AFTER_NONE = 8       # and one by one, when it has carried out none of a batch


@cython.final
cdef class _Mapped:
    """Holds a buffer of host memory open."""

    cdef Py_buffer view

    def __cinit__(self, source, bint writable):
        PyObject_GetBuffer(source, &self.view, PyBUF_CONTIG if writable else PyBUF_CONTIG_RO)

    def __dealloc__(self):
        PyBuffer_Release(&self.view)     # harmless if nothing was taken

    cdef uint8_t *address(self):
        return <uint8_t *>self.view.buf


@cython.freelist(16)
@cython.final
cdef class Request:
    """One READ or WRITE for a Python backend, checked against the unit's size; good until the handler returns.

    Attributes:
        write: data go to the disk.
        offset: bytes into the disk.
        length: bytes to move.
    """

    cdef block_request_t c
    cdef GuestMemory memory

    @property
    def write(self) -> bool:
        return self.c.write

    @property
    def offset(self) -> int:
        return self.c.offset

    @property
    def length(self) -> int:
        return self.c.length

    def transfer(self, int fd) -> None:
        """Move the data between a host file at `offset` and the guest's pages, without the GIL.

        Raises:
            GuestMemoryError: a page is outside the guest's memory.
            OSError: the host failed, or the file ends.
        """
        cdef gpa_cursor_t cursor
        cdef int64_t moved
        self.memory.exports += 1    # nobody closes it while the GIL is released
        with nogil:
            gpa_cursor_start(&cursor, <const uint8_t *>self.c.ranges, self.c.range_count)
            moved = gpa_transfer(&self.memory.c, &cursor, fd, self.c.offset, self.c.length, not self.c.write)
        self.memory.exports -= 1
        if moved != <int64_t>self.c.length:
            if moved < -100:
                raise GuestMemoryError("a page of the guest's buffer is outside the partition")
            raise OSError(<int>-moved if moved < 0 else 5, "short transfer")

    def fetch(self) -> bytes:
        """A copy of the data to be written."""
        cdef bytes data = PyBytes_FromStringAndSize(NULL, self.c.length)
        self._copy(<uint8_t *>PyBytes_AS_STRING(data), False)
        return data

    def store(self, data) -> None:
        """Give the data read to the guest; `length` bytes.

        Raises:
            ValueError: it has another length.
            GuestMemoryError: a page is outside the guest's memory.
        """
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO)
        try:
            if <uint64_t>view.len != self.c.length:
                raise ValueError(f"{view.len} bytes for a read of {self.c.length}")
            self._copy(<uint8_t *>view.buf, True)
        finally:
            PyBuffer_Release(&view)

    cdef int _copy(self, uint8_t *ours, bint to_guest) except -1:
        cdef iovec vectors[VECTORS]
        cdef gpa_cursor_t cursor
        cdef uint64_t covered, left = self.c.length
        cdef int used, index
        gpa_cursor_start(&cursor, <const uint8_t *>self.c.ranges, self.c.range_count)
        while left:
            used = gpa_cursor_iov(&cursor, &self.memory.c, ACCESS_WRITE if to_guest else ACCESS_READ, left, vectors,
                                  VECTORS, &covered)
            if used <= 0:
                raise GuestMemoryError("a page of the guest's buffer is outside the partition")
            for index in range(used):
                if to_guest:
                    copy_bytes(vectors[index].iov_base, ours, vectors[index].iov_len)
                else:
                    copy_bytes(ours, vectors[index].iov_base, vectors[index].iov_len)
                ours += vectors[index].iov_len
            left -= covered
        return 0


@cython.final
cdef class Requests:
    """Consecutive READs, or consecutive WRITEs, of one length for a Python backend that takes many at once.

    Checked against the unit's size, in the guest's order; good until the handler returns.

    Attributes:
        write: data go to the disk.
        length: bytes of each request.
        offsets: where on the disk, bytes; an array of 64-bit integers.
    """

    cdef GuestMemory memory
    cdef block_request_t *items
    cdef uint32_t *places       # the ring's read index of each
    cdef uint32_t count
    cdef uint64_t copied        # bytes that were moved by the processor

    def __cinit__(self):
        self.items = <block_request_t *>malloc(MOST_BATCH * sizeof(block_request_t))
        self.places = <uint32_t *>malloc(MOST_BATCH * sizeof(uint32_t))
        if self.items == NULL or self.places == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.items)
        free(self.places)

    def __len__(self) -> int:
        return self.count

    @property
    def write(self) -> bool:
        return self.items[0].write

    @property
    def length(self) -> int:
        return self.items[0].length

    @property
    def offsets(self):
        cdef array.array made = array.clone(_QUADS, self.count, False)
        cdef uint32_t index
        for index in range(self.count):
            made.data.as_ulonglongs[index] = self.items[index].offset
        return made

    def transfer(self, GuestMemory memory not None, pfns, int first=0, int count=-1) -> None:
        """Copy the data of requests between the guest's pages and pages of another partition, without the GIL.

        Args:
            memory: the other partition's memory: the source for reads, the destination for writes.
            pfns: its page numbers, 64-bit integers, for each of the requests as many as `length` needs. Data begin at
                the start of each request's first page.
            first: the first request to copy.
            count: how many requests, -1 for all from `first` on.

        Raises:
            ValueError: too few pages, or no such requests.
            GuestMemoryError: a page is outside its memory.
        """
        cdef _Mapped numbers = _Mapped(pfns, False)
        cdef uint32_t index, each = (self.items[0].length + 4095) >> 12
        cdef uint32_t most = self.count - first if count < 0 else count
        cdef int code = 0
        if first < 0 or first + most > self.count:
            raise ValueError(f"requests {first} to {first + most} of {self.count}")
        if numbers.view.itemsize != 8 or <uint64_t>numbers.view.len // 8 < <uint64_t>most * each:
            raise ValueError(f"{numbers.view.len // 8} pages for {most} requests of {each}")
        self.memory.exports += 1    # nobody closes either while the GIL is released
        memory.exports += 1
        with nogil:
            for index in range(most):
                code = _relay(&self.memory.c, &self.items[first + index], &memory.c,
                              <uint64_t *>numbers.view.buf + <uint64_t>index * each)
                if code:
                    break
        memory.exports -= 1
        self.memory.exports -= 1
        if code:
            raise GuestMemoryError("a page of a buffer is outside the partition")
        self.copied += most * self.items[0].length

    def transfer_file(self, int fd, file_offsets, int count=-1) -> int:
        """Move the data of requests between a host file and the guest's pages, without the GIL and without a copy.

        Args:
            fd: the file.
            file_offsets: where in the file each request's data are, bytes; 64-bit integers.
            count: how many requests, from the first on; -1 for all.

        Returns:
            how many went well, from the first on.

        Raises:
            ValueError: too few offsets, or no such requests.
        """
        cdef _Mapped places = _Mapped(file_offsets, False)
        cdef uint32_t index = 0, most = self.count if count < 0 else count
        cdef gpa_cursor_t cursor
        cdef block_request_t *request
        if most > self.count or places.view.itemsize != 8 or <uint64_t>places.view.len // 8 < most:
            raise ValueError(f"{places.view.len // 8} offsets for {most} of {self.count} requests")
        self.memory.exports += 1    # nobody closes it while the GIL is released
        with nogil:
            while index < most:
                request = &self.items[index]
                gpa_cursor_start(&cursor, <const uint8_t *>request.ranges, request.range_count)
                if gpa_transfer(&self.memory.c, &cursor, fd, (<uint64_t *>places.view.buf)[index], request.length,
                                not request.write) != <int64_t>request.length:
                    break
                index += 1
        self.memory.exports -= 1
        return index


cdef inline int _relay(const guest_memory_t *guest, block_request_t *request, const guest_memory_t *other,
                       const uint64_t *pfns) noexcept nogil:
    """Copy the data of one request between two memories; LEFT if a page is not there."""
    cdef uint32_t access = ACCESS_READ if request.write else ACCESS_WRITE
    cdef uint32_t other_access = ACCESS_WRITE if request.write else ACCESS_READ
    cdef gpa_cursor_t cursor
    cdef iovec vectors[VECTORS]
    cdef uint64_t covered, done = 0, part, left
    cdef uint8_t *ours
    cdef uint8_t *theirs
    cdef int used, index
    gpa_cursor_start(&cursor, <const uint8_t *>request.ranges, request.range_count)
    while done < request.length:
        used = gpa_cursor_iov(&cursor, guest, access, request.length - done, vectors, VECTORS, &covered)
        if used <= 0:
            return LEFT
        for index in range(used):
            theirs = <uint8_t *>vectors[index].iov_base
            left = vectors[index].iov_len
            while left:
                part = 4096 - (done & 4095)
                if part > left:
                    part = left
                if pfns[done >> 12] >= other.size >> 12:
                    return LEFT
                ours = guest_pointer(other, (pfns[done >> 12] << 12) + (done & 4095), part, other_access)
                if ours == NULL:
                    return LEFT
                if request.write:
                    copy_bytes(ours, theirs, part)
                else:
                    copy_bytes(theirs, ours, part)
                theirs += part
                done += part
                left -= part
    return SERVED
