# Guest buffers as a GPA-direct packet names them. Included by memory.pyx.

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
    """GpaRanges(ranges)\n--\n\nGuest buffers as a GPA-direct packet names them, in a private, checked copy.

    Args:
        ranges: (byte_count, byte_offset, pfns) for each buffer.

    Raises:
        ValueError: a range names no bytes, starts beyond its first page, or has the wrong number of pages, or a page
            number does not fit 64 bits.

    Attributes:
        total: bytes of all ranges together.
        raw: the wire form, without the packet's range count.
    """

    @cython.embedsignature(False)   # the class's docstring has it, in the form that `inspect` reads
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
        try:
            self.raw = _array("Q", parts).tobytes()
        except OverflowError:
            raise ValueError("a page number is negative, or of more than 64 bits") from None
        self.count = count
        self.total = gpa_ranges_check(<const uint8_t *>PyBytes_AS_STRING(self.raw), len(self.raw), self.count)

    @staticmethod
    def parse(data, count) -> GpaRanges:
        """`count` ranges in wire form; bytes after them are ignored.

        Raises:
            RingCorrupt: a range names no bytes, starts beyond its first page, or needs more pages than are there.
        """
        cdef GpaRanges ranges = GpaRanges.__new__(GpaRanges)
        ranges.raw = bytes(data)
        if not 0 <= count <= 0xffffffff:
            raise RingCorrupt(f"{count} GPA ranges")
        ranges.count = count
        ranges.total = gpa_ranges_check(<const uint8_t *>PyBytes_AS_STRING(ranges.raw), len(ranges.raw), count)
        if ranges.total < 0:
            raise RingCorrupt(f"malformed GPA ranges: {count} in {len(ranges.raw)} bytes")
        return ranges

    @staticmethod
    def contiguous(gpa, length) -> GpaRanges:
        """One buffer of `length` bytes at guest physical address `gpa`.

        Raises:
            ValueError: no bytes, 4 GiB or more of them, or an address that is none.
        """
        if not 0 <= gpa < MOST_ADDRESS or not 0 < length < 1 << 32:
            raise ValueError(f"a range of {length} bytes at {gpa:#x}")
        first = gpa // PAGE_BYTES
        return GpaRanges([(length, gpa % PAGE_BYTES, range(first, (gpa + length + PAGE_BYTES - 1) // PAGE_BYTES))])

    def __repr__(self):
        return f"<GpaRanges: {self.count} of {self.total} bytes>"

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
                    copy_bytes(vectors[index].iov_base, ours, vectors[index].iov_len)
                else:
                    copy_bytes(ours, vectors[index].iov_base, vectors[index].iov_len)
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
        refuse_objects(data, &view)
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
