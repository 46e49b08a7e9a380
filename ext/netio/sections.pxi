# Sections of a buffer that both ends see. Included by netio.pyx.

@cython.no_gc_clear     # the destructor needs what it refers to: cleared references are None, not memory
cdef class _Sections:
    """Equal sections of a buffer that the peer sees too, the last freed used first: it is still in the cache."""

    cdef Window window
    cdef uint8_t *base
    cdef readonly uint32_t section_size
    cdef readonly uint32_t count
    cdef uint32_t *stack
    cdef uint32_t free_count
    cdef uint8_t *taken         # by section

    def __cinit__(self, Window window not None, uint32_t section_size, uint32_t count, *args):
        if window.base == NULL or section_size < HEADER or <uint64_t>section_size * count > <uint64_t>window.size:
            raise ValueError(f"{count} sections of {section_size} bytes do not fit a window of {window.size} bytes")
        _keep_heap()
        self.stack = <uint32_t *>malloc(4 * count + 4)
        self.taken = <uint8_t *>calloc(count + 1, 1)
        if self.stack == NULL or self.taken == NULL:
            raise MemoryError
        cdef uint32_t index
        for index in range(count):
            self.stack[index] = count - 1 - index
        self.free_count = self.count = count
        self.section_size = section_size
        self.window = window
        self.base = window.base
        window.exports += 1

    def __dealloc__(self):
        self._leave()
        free(self.stack)
        free(self.taken)

    cdef void _leave(self):
        if self.base != NULL:
            self.base = NULL
            self.window.exports -= 1

    def close(self) -> None:
        """Let the window go; nothing can be taken or written any more."""
        self._leave()
        self.free_count = 0

    @property
    def available(self) -> int:
        """Sections that are free."""
        return self.free_count

    def take(self) -> int:
        """Take a section; -1 if none is free."""
        if self.free_count == 0:
            return -1
        return self.pop()

    def give(self, uint32_t section) -> None:
        """Give a section back; one that is not taken stays as it is."""
        self.push(section)

    def write(self, uint32_t section, data, uint32_t offset=0) -> int:
        """Copy bytes into a section; the place from the start of the buffer."""
        cdef bytes source = bytes(data)
        cdef size_t size = PyBytes_GET_SIZE(source)
        if self.base == NULL or section >= self.count or offset > self.section_size or size > self.section_size - offset:
            raise ValueError(f"{size} bytes at {offset} do not fit section {section}")
        copy_bytes(self.base + <size_t>section * self.section_size + offset, PyBytes_AS_STRING(source), size)
        return <uint64_t>section * self.section_size + offset

    cdef inline uint32_t pop(self) noexcept:
        self.free_count -= 1
        cdef uint32_t section = self.stack[self.free_count]
        self.taken[section] = 1
        return section

    cdef inline void push(self, uint32_t section) noexcept:
        if section < self.count and self.taken[section] and self.base != NULL:
            self.taken[section] = 0
            self.stack[self.free_count] = section
            self.free_count += 1


cdef inline void _write_message(uint8_t *to, const uint8_t *frame, uint32_t size, uint32_t padded) noexcept nogil:
    """The RNDIS packet message of a frame, padded to `padded` bytes."""
    cdef rndis_packet_t head
    memset(&head, 0, sizeof(head))
    head.type = RNDIS_PACKET
    head.length = padded
    head.data_offset = HEADER - 8
    head.data_length = size
    memcpy(to, &head, HEADER)
    copy_bytes(to + HEADER, frame, size)
    if padded > HEADER + size:
        memset(to + HEADER + size, 0, padded - HEADER - size)


cdef bint _info_is_plain(const uint8_t *message, const rndis_packet_t *head, bint checksums) noexcept nogil:
    """Whether the per-packet information says nothing that needs work: hashes and, from a host, right checksums.

    Args:
        message: the packet message in shared memory.
        head: the checked copy of its header.
        checksums: the checksum information is a host's.
    """
    cdef uint8_t info[256]
    cdef uint32_t item[4]
    cdef uint32_t at = 0, body = head.length - 8
    if (head.info_length > sizeof(info) or head.info_offset < HEADER - 8 or head.info_offset > body
            or head.info_length > body - head.info_offset
            or (head.info_offset < head.data_offset + head.data_length
                and head.data_offset < head.info_offset + head.info_length)):
        return False
    copy_from_shared(info, message + 8 + head.info_offset, head.info_length)
    while at < head.info_length:
        if head.info_length - at < sizeof(item):
            return False
        memcpy(item, info + at, sizeof(item))
        if item[0] != 16 or item[2] != 12:
            return False
        if not (item[1] == INFO_HASH or item[1] == INFO_HASH_INFO
                or (checksums and item[1] == INFO_CHECKSUM and not item[3] & CHECKSUM_VALUE_INVALID)):
            return False
        at += 16
    return True
