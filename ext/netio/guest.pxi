# The guest's end: its send buffer, and its channel. Included by netio.pyx.

@cython.final
cdef class SendPool(_Sections):
    """A guest's send buffer: free sections, and what those in use carry.

    Args:
        window: the send buffer.
        section_size: bytes of a section.
        count: sections.
    """

    cdef uint64_t *owner        # transaction id of the packet that a section holds, 0 if none
    cdef uint32_t *frames
    cdef uint32_t *octets
    cdef uint64_t sequence

    def __cinit__(self, Window window, uint32_t section_size, uint32_t count):
        self.owner = <uint64_t *>calloc(count + 1, 8)
        self.frames = <uint32_t *>calloc(count + 1, 4)
        self.octets = <uint32_t *>calloc(count + 1, 4)
        if self.owner == NULL or self.frames == NULL or self.octets == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.owner)
        free(self.frames)
        free(self.octets)


@cython.no_gc_clear     # the destructor needs what it refers to: cleared references are None, not memory
@cython.final
cdef class GuestQueue:
    """A guest's end of its only channel.

    Args:
        reader: the channel's incoming ring.
        writer: its outgoing ring.
        pool: the send buffer.
        receive: the receive buffer.
        section_size: bytes of its sections.
        section_count: how many there are.
        set_id: transfer-page set id of the receive buffer.
        message_size: bytes that NVSP messages are padded to, at most 64.
        packets_per_message: most frames in one section.
        alignment: bytes that packet messages are aligned to, a power of two.

    Attributes:
        sent_frames: frames that the host completed with success.
        sent_bytes: of those.
        failed_frames: frames that the host completed with another status.
        bytes_copied: so far.
    """

    cdef RingReader reader
    cdef RingWriter writer
    cdef SendPool pool
    cdef Window receive
    cdef uint8_t *base
    cdef uint32_t section_size
    cdef uint64_t receive_size
    cdef uint16_t set_id
    cdef uint32_t message_size
    cdef uint32_t packets_per_message
    cdef uint32_t alignment
    cdef readonly uint64_t sent_frames
    cdef readonly uint64_t sent_bytes
    cdef readonly uint64_t failed_frames
    cdef readonly uint64_t bytes_copied

    def __cinit__(self, RingReader reader not None, RingWriter writer not None, SendPool pool not None,
                  Window receive not None, uint32_t section_size, uint32_t section_count, int set_id,
                  uint32_t message_size, uint32_t packets_per_message, uint32_t alignment):
        if receive.base == NULL or <uint64_t>section_size * section_count > <uint64_t>receive.size:
            raise ValueError("the sections do not fit the window")
        if not 16 <= message_size <= 64 or packets_per_message == 0 or alignment & (alignment - 1) or alignment == 0:
            raise ValueError("impossible message size, packets per message or alignment")
        self.reader = reader
        self.writer = writer
        self.pool = pool
        self.receive = receive
        self.base = receive.base
        self.section_size = section_size
        self.receive_size = <uint64_t>section_size * section_count
        self.set_id = <uint16_t>set_id
        self.message_size = message_size
        self.packets_per_message = packets_per_message
        self.alignment = alignment
        receive.exports += 1

    def __dealloc__(self):
        self.close()

    def close(self) -> None:
        """Let the receive buffer go."""
        if self.base != NULL:
            self.base = NULL
            self.receive.exports -= 1

    def send(self, frames not None, Py_ssize_t first) -> tuple:
        """Send plain frames, from `frames[first]` on, several to a section.

        Returns:
            (where it stopped, reason to stop, True if the host must be rung): `DONE`, `SLOW`, `FULL` or `NO_SECTION`.

        Raises:
            RingCorrupt: the host broke a ring.
        """
        cdef list items = frames if type(frames) is list else list(frames)
        cdef uint8_t message[64]
        cdef nvsp_rndis_t head
        cdef uint8_t *start
        cdef Py_ssize_t at = first, total = PyList_GET_SIZE(items), size
        cdef int reason = R_DONE, code
        cdef uint32_t section, used, padded, count, octets
        cdef uint8_t *to
        cdef object item
        if self.pool.base == NULL:
            return first, R_SLOW, False
        memset(message, 0, sizeof(message))
        head.type = NVSP_RNDIS_PACKET
        head.channel = 0
        while at < total and reason == R_DONE:
            if self.pool.free_count == 0:
                reason = R_NO_SECTION
                break
            code = ring_reserve(&self.writer.c, ring_packet_bytes(16, self.message_size), &start)
            if code:
                if code != RING_FULL:
                    raise RingCorrupt("the host broke its ring")
                reason = R_FULL
                break
            section = self.pool.stack[self.pool.free_count - 1]
            to = self.pool.base + <size_t>section * self.pool.section_size
            used = count = octets = 0
            while at < total and count < self.packets_per_message:
                item = <object>PyList_GET_ITEM(items, at)
                if not PyBytes_CheckExact(item):
                    reason = R_SLOW
                    break
                size = PyBytes_GET_SIZE(item)
                start = <uint8_t *>PyBytes_AS_STRING(item)
                if size < ETHERNET or size > 0xffff or (start[12] == 0x81 and start[13] == 0):
                    reason = R_SLOW
                    break
                padded = (HEADER + <uint32_t>size + self.alignment - 1) & ~(self.alignment - 1)
                if padded > self.pool.section_size - used:
                    if count == 0:
                        reason = R_SLOW     # a large one: it goes in GPA ranges
                    break
                _write_message(to + used, start, <uint32_t>size, padded)
                used += padded
                octets += <uint32_t>size
                count += 1
                at += 1
            if count == 0:
                break
            self.pool.pop()
            self.pool.sequence = (self.pool.sequence + 1) & 0x7fffffff
            if self.pool.sequence == 0:
                self.pool.sequence = 1
            self.pool.owner[section] = self.pool.sequence << 32 | section
            self.pool.frames[section] = count
            self.pool.octets[section] = octets
            head.section = section
            head.size = used
            memcpy(message, &head, sizeof(head))
            ring_write(&self.writer.c, PACKET_IN_BAND, FLAG_COMPLETION_REQUESTED, self.pool.owner[section], message,
                       self.message_size)
            self.bytes_copied += used
        return at, reason, ring_publish(&self.writer.c) != 0

    def drain(self, list frames not None, int limit) -> tuple:
        """Take plain packets from the ring: completions of `send`, and received frames, appended to `frames`.

        Returns:
            (packets taken, reason to stop, True if the host must be rung): `DONE` if the ring is empty or `limit`
            packets were taken, `SLOW`, or `FULL` if there is no room for completions.

        Raises:
            RingCorrupt: the host broke a ring.
        """
        cdef ring_packet_t at
        cdef uint32_t starts[MOST_IN_RANGES]
        cdef uint32_t sizes[MOST_IN_RANGES]
        cdef uint32_t answer[2]
        cdef uint8_t *start
        cdef int code, reason = R_DONE, found, index, taken = 0
        cdef bytes frame
        answer[0], answer[1] = NVSP_RNDIS_COMPLETE, NVSP_SUCCESS
        while taken < limit:
            code = ring_peek(&self.reader.c, &at)
            if code == RING_EMPTY:
                break
            if code:
                raise RingCorrupt("the host broke its ring")
            if at.type == PACKET_COMPLETION:
                if not self._completed(&at):
                    reason = R_SLOW
                    break
            elif at.type == PACKET_TRANSFER_PAGES and self.base != NULL:
                code = ring_reserve(&self.writer.c, ring_packet_bytes(16, sizeof(answer)), &start)
                if code:
                    if code != RING_FULL:
                        raise RingCorrupt("the host broke its ring")
                    reason = R_FULL
                    break
                found = self._parse(&at, starts, sizes)
                if found == 0:
                    reason = R_SLOW
                    break
                for index in range(found):
                    frame = bytes_at(self.base + starts[index], sizes[index])
                    PyList_Append(frames, frame)
                    self.bytes_copied += sizes[index]
                ring_write(&self.writer.c, PACKET_COMPLETION, 0, at.transaction_id, answer, sizeof(answer))
            else:
                reason = R_SLOW
                break
            ring_advance(&self.reader.c, &at)
            taken += 1
        self.reader.release()
        return taken, reason, ring_publish(&self.writer.c) != 0

    def complete(self, uint64_t transaction_id, bytes payload not None) -> bool:
        """Take a completion that was read from the ring by other means; False if it is none of a packet of `send`."""
        return self._finish(transaction_id, <const uint8_t *>PyBytes_AS_STRING(payload), PyBytes_GET_SIZE(payload))

    cdef bint _completed(self, const ring_packet_t *at) noexcept:
        """The host completed a packet of `send`; False if it is none, or says nothing."""
        if at.length - at.offset < 8:
            return False
        return self._finish(at.transaction_id, at.start + at.offset, at.length - at.offset)

    cdef bint _finish(self, uint64_t transaction_id, const uint8_t *payload, Py_ssize_t size) noexcept:
        """Whatever the host says, the section is free again."""
        cdef uint32_t answer[2]
        cdef uint32_t section = <uint32_t>transaction_id
        if transaction_id >> 32 == 0 or section >= self.pool.count or self.pool.owner[section] != transaction_id:
            return False
        answer[0] = answer[1] = 0
        if size >= <Py_ssize_t>sizeof(answer):
            copy_from_shared(answer, payload, sizeof(answer))
        if answer[0] == NVSP_RNDIS_COMPLETE and answer[1] == NVSP_SUCCESS:
            self.sent_frames += self.pool.frames[section]
            self.sent_bytes += self.pool.octets[section]
        else:
            self.failed_frames += self.pool.frames[section]
        self.pool.owner[section] = 0
        self.pool.push(section)
        return True

    cdef int _parse(self, const ring_packet_t *at, uint32_t *starts, uint32_t *sizes) noexcept:
        """Find the frames of a transfer-page packet; how many, 0 if not all of them are plain."""
        cdef uint64_t word, span
        cdef uint32_t type, count, index, size, offset, body
        cdef rndis_packet_t head
        if at.length - at.offset < 4:
            return 0
        copy_from_shared(&type, at.start + at.offset, 4)
        copy_from_shared(&word, at.start + 16, 8)
        count = <uint32_t>(word >> 32)
        if (type != NVSP_RNDIS_PACKET or <uint16_t>word != self.set_id or count == 0 or count > MOST_IN_RANGES
                or count > (at.offset - 24) // 8):
            return 0
        for index in range(count):
            copy_from_shared(&span, at.start + 24 + 8 * index, 8)
            size, offset = <uint32_t>span, <uint32_t>(span >> 32)
            if size < HEADER or size > self.section_size or <uint64_t>offset + size > self.receive_size:
                return 0
            copy_from_shared(&head, self.base + offset, HEADER)
            if head.type != RNDIS_PACKET or head.length < HEADER or head.length > size:
                return 0
            if head.oob_offset | head.oob_length | head.oob_count | head.handle:
                return 0
            body = head.length - 8
            if head.data_offset < HEADER - 8 or head.data_offset > body or head.data_length > body - head.data_offset:
                return 0
            if head.data_length == 0 or (head.length != size and head.length + self.alignment < size):
                return 0
            if head.info_length and not _info_is_plain(self.base + offset, &head, True):
                return 0
            starts[index] = offset + 8 + head.data_offset
            sizes[index] = head.data_length
        return <int>count
