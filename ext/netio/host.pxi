# The host's end: a guest's receive buffer, and one channel. Included by netio.pyx.

@cython.final
cdef class ReceivePool(_Sections):
    """The host's view of a guest's receive buffer: which sections are free, and which packet holds the others.

    A packet's transaction id is the number of its first section: DPDK has an array of that many packets, which it
    indexes with the transaction id, and takes no packet with a larger one. So a completion of a packet that is not in
    flight on its channel is known for what it is. One that comes twice is taken for that of a later packet, if the
    section is in use again by then: the guest then gets frames over frames that it has not read, and nobody else does.

    Args:
        window: the receive buffer.
        section_size: bytes of a section.
        count: sections.
    """

    cdef uint32_t *next         # section after this one in its packet, or `count`
    cdef uint8_t *first         # whether it is the first one of a packet
    cdef uint16_t *queue        # of a packet's first section: the channel it went to

    def __cinit__(self, Window window, uint32_t section_size, uint32_t count):
        self.next = <uint32_t *>calloc(count + 1, 4)
        self.first = <uint8_t *>calloc(count + 1, 1)
        self.queue = <uint16_t *>calloc(count + 1, 2)
        if self.next == NULL or self.first == NULL or self.queue == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.next)
        free(self.first)
        free(self.queue)

    def commit(self, list sections, int queue) -> int:
        """Taken sections become one packet on channel `queue`; its transaction id."""
        cdef uint32_t numbers[MOST_IN_RANGES]
        cdef Py_ssize_t index, size = len(sections)
        if not 0 < size <= MOST_IN_RANGES:
            raise ValueError(f"a packet of {size} sections")
        for index in range(size):
            numbers[index] = sections[index]
            if numbers[index] >= self.count or not self.taken[numbers[index]]:
                raise ValueError(f"section {numbers[index]} is not taken")
        return self._commit(numbers, <uint32_t>size, <uint16_t>queue)

    def release(self, uint64_t transaction_id, int queue) -> bool:
        """The guest completed a packet; False if there is no such packet on this channel."""
        return self._release(transaction_id, <uint16_t>queue)

    def drop(self, int queue) -> int:
        """A channel closed: all its sections are free; how many packets it held."""
        cdef uint32_t section
        cdef int packets = 0
        for section in range(self.count):
            if self.first[section] and self.queue[section] == queue:
                self._release(section, <uint16_t>queue)
                packets += 1
        return packets

    def in_flight(self) -> dict:
        """The sections of each packet that the guest has not completed, by transaction id."""
        result = {}
        cdef uint32_t section, at
        for section in range(self.count):
            if self.first[section]:
                held = []
                at = section
                while at < self.count:
                    held.append(at)
                    at = self.next[at]
                result[section] = tuple(held)
        return result

    cdef uint64_t _commit(self, const uint32_t *sections, uint32_t count, uint16_t queue) noexcept:
        cdef uint32_t index, first = sections[0]
        for index in range(count):
            self.next[sections[index]] = sections[index + 1] if index + 1 < count else self.count
        self.first[first] = 1
        self.queue[first] = queue
        return first

    cdef bint _release(self, uint64_t transaction_id, uint16_t queue) noexcept:
        cdef uint32_t section = <uint32_t>transaction_id, following
        if transaction_id >= self.count or not self.first[section] or self.queue[section] != queue:
            return False
        self.first[section] = 0
        while section < self.count:
            following = self.next[section]
            self.push(section)
            section = following
        return True


@cython.no_gc_clear     # the destructor needs what it refers to: cleared references are None, not memory
@cython.final
cdef class HostQueue:
    """The host's end of one channel.

    Args:
        reader: the channel's incoming ring.
        writer: its outgoing ring.
        pool: the adapter's receive buffer.
        queue: number of the channel.
        set_id: transfer-page set id that the guest gave its receive buffer.
        completion: payload that completes a guest's RNDIS packet with success.
        packet: payload beside transfer pages.

    Attributes:
        frame_limit: longest plain frame in bytes.
        reserve: receive sections that frames must leave free, for control messages.
        violations: completions of packets that there are not.
        filtered: frames that the packet filter kept from the guest.
        bytes_copied: so far.
    """

    cdef RingReader reader
    cdef RingWriter writer
    cdef ReceivePool pool
    cdef uint16_t queue
    cdef uint16_t set_id
    cdef bytes completion
    cdef bytes packet
    cdef Window send_window
    cdef uint8_t *send_base
    cdef uint32_t send_section_size
    cdef uint32_t send_section_count
    cdef public uint32_t frame_limit
    cdef public uint32_t reserve
    cdef readonly uint64_t violations
    cdef readonly uint64_t filtered
    cdef readonly uint64_t bytes_copied
    cdef counts_t sent
    cdef counts_t received

    def __cinit__(self, RingReader reader not None, RingWriter writer not None, ReceivePool pool not None, int queue,
                  int set_id, bytes completion not None, bytes packet not None):
        self.reader = reader
        self.writer = writer
        self.pool = pool
        self.queue = <uint16_t>queue
        self.set_id = <uint16_t>set_id
        self.completion = completion
        self.packet = packet
        self.frame_limit = 1514

    def __dealloc__(self):
        self._leave()

    cdef void _leave(self):
        if self.send_base != NULL:
            self.send_base = NULL
            self.send_window.exports -= 1

    def use_send_buffer(self, Window window, uint32_t section_size, uint32_t count) -> None:
        """Read frames from sections of this buffer; with None, no longer."""
        self._leave()
        if window is None:
            return
        if window.base == NULL or <uint64_t>section_size * count > <uint64_t>window.size:
            raise ValueError("the sections do not fit the window")
        self.send_window = window
        self.send_base = window.base
        self.send_section_size = section_size
        self.send_section_count = count
        window.exports += 1

    def take_sent(self) -> tuple:
        """Frames and bytes from the guest since the last call: directed, multicast, broadcast, and their bytes."""
        return _take_counts(&self.sent)

    def take_received(self) -> tuple:
        """The same of frames to the guest."""
        return _take_counts(&self.received)

    def drain(self, list frames not None, int limit) -> tuple:
        """Take plain packets from the ring, complete them, and append their frames to `frames`.

        Returns:
            (packets taken, reason to stop, True if the guest must be rung): `DONE` if the ring is empty or `limit`
            packets were taken, `SLOW`, or `FULL` if there is no room for completions.

        Raises:
            RingCorrupt: the guest broke a ring.
        """
        cdef ring_packet_t at
        cdef nvsp_rndis_t message
        cdef uint32_t starts[MOST_MESSAGES]
        cdef uint32_t sizes[MOST_MESSAGES]
        cdef uint8_t *start
        cdef int code, reason = R_DONE, found, index, taken = 0
        cdef uint32_t room = ring_packet_bytes(16, <uint32_t>PyBytes_GET_SIZE(self.completion))
        cdef bytes frame
        while taken < limit:
            code = ring_peek(&self.reader.c, &at)
            if code == RING_EMPTY:
                break
            if code:
                raise RingCorrupt("the guest broke its ring")
            if at.type == PACKET_COMPLETION:
                if not self.pool._release(at.transaction_id, self.queue):
                    if at.transaction_id >> 63:     # maybe of a message that is no packet of the pool
                        reason = R_SLOW
                        break
                    self.violations += 1
                ring_advance(&self.reader.c, &at)
                taken += 1
                continue
            if at.type != PACKET_IN_BAND or at.length - at.offset < sizeof(nvsp_rndis_t) or self.send_base == NULL:
                reason = R_SLOW
                break
            copy_from_shared(&message, at.start + at.offset, sizeof(nvsp_rndis_t))
            if (message.type != NVSP_RNDIS_PACKET or message.section >= self.send_section_count
                    or message.size > self.send_section_size):
                reason = R_SLOW
                break
            code = ring_reserve(&self.writer.c, room, &start)   # for the completion, which is written last
            if code:
                if code != RING_FULL:
                    raise RingCorrupt("the guest broke its ring")
                reason = R_FULL
                break
            start = self.send_base + <size_t>message.section * self.send_section_size
            found = self._parse(start, message.size, starts, sizes)
            if found == 0:
                reason = R_SLOW
                break
            for index in range(found):
                frame = bytes_at(start + starts[index], sizes[index])
                PyList_Append(frames, frame)
                _count(&self.sent, <const uint8_t *>PyBytes_AS_STRING(frame), sizes[index])
            if at.flags & FLAG_COMPLETION_REQUESTED:
                ring_write(&self.writer.c, PACKET_COMPLETION, 0, at.transaction_id,
                           PyBytes_AS_STRING(self.completion), <uint32_t>PyBytes_GET_SIZE(self.completion))
            self.bytes_copied += message.size
            ring_advance(&self.reader.c, &at)
            taken += 1
        self.reader.release()
        return taken, reason, ring_publish(&self.writer.c) != 0

    cdef int _parse(self, const uint8_t *buffer, uint32_t size, uint32_t *starts, uint32_t *sizes) noexcept:
        """Find the frames of the packet messages in shared memory; how many, 0 if not all of them are plain."""
        cdef rndis_packet_t head
        cdef uint32_t at = 0, left, body
        cdef int found = 0
        while at < size:
            left = size - at
            if left < HEADER or found == MOST_MESSAGES:
                return 0
            copy_from_shared(&head, buffer + at, HEADER)
            if head.type != RNDIS_PACKET or head.length < HEADER or head.length > left:
                return 0
            if head.oob_offset | head.oob_length | head.oob_count | head.handle:
                return 0
            body = head.length - 8
            if head.data_offset < HEADER - 8 or head.data_offset > body or head.data_length > body - head.data_offset:
                return 0
            if head.data_length < ETHERNET or head.data_length > self.frame_limit:
                return 0
            # DPDK and FreeBSD send a hash value with every frame, which says nothing to an adapter.
            if head.info_length and not _info_is_plain(buffer + at, &head, False):
                return 0
            starts[found] = at + 8 + head.data_offset
            sizes[found] = head.data_length
            found += 1
            at += head.length
        return found

    def deliver(self, list frames not None, Py_ssize_t first, uint64_t mac, uint32_t packet_filter) -> tuple:
        """Give frames to the guest, from `frames[first]` on.

        Args:
            frames: of the switch.
            first: where to begin.
            mac: the guest's present address as a number.
            packet_filter: what the guest wants to get.

        Returns:
            (where it stopped, reason to stop, True if the guest must be rung): `DONE`, `SLOW` (that frame is not
            plain), `FULL` or `NO_SECTION`.

        Raises:
            RingCorrupt: the guest broke a ring.
        """
        cdef uint64_t ranges[MOST_RANGES]
        cdef uint32_t sections[MOST_RANGES]
        cdef Py_ssize_t at = first, total = PyList_GET_SIZE(frames), begin
        cdef int reason = R_DONE, count, code
        cdef uint64_t filtered
        cdef counts_t counts
        while at < total and reason == R_DONE:
            begin, count, filtered = at, 0, 0
            counts = self.received
            while at < total and count < MOST_RANGES:
                code = self._place(frames, at, mac, packet_filter, &ranges[count], &sections[count], &counts)
                if code == R_DONE:
                    count += 1
                elif code < 0:
                    filtered += 1
                else:
                    reason = code
                    break
                at += 1
            if count:
                code = self._announce(ranges, sections, count)
                if code:
                    at = begin
                    reason = R_FULL
                    if code != RING_FULL:
                        raise RingCorrupt("the guest broke its ring")
                    break
            self.received = counts
            self.filtered += filtered
        return at, reason, ring_publish(&self.writer.c) != 0

    cdef int _place(self, list frames, Py_ssize_t at, uint64_t mac, uint32_t wanted, uint64_t *where, uint32_t *section,
                    counts_t *counts) noexcept:
        """Write one frame's RNDIS message into a section; -1 if the guest does not want it, else a reason."""
        cdef object item = <object>PyList_GET_ITEM(frames, at)
        if not PyBytes_CheckExact(item) or self.pool.base == NULL:
            return R_SLOW
        cdef const uint8_t *data = <const uint8_t *>PyBytes_AS_STRING(item)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(item)
        if size < ETHERNET or size > self.frame_limit or size > self.pool.section_size - HEADER:
            return R_SLOW
        if data[12] == 0x81 and data[13] == 0:
            return R_SLOW
        if not wanted & FILTER_PROMISCUOUS:
            if not data[0] & 1:
                if not wanted & FILTER_DIRECTED or _address(data) != mac:
                    return -1
            elif _address(data) == EVERYBODY:
                if not wanted & FILTER_BROADCAST:
                    return -1
            elif not wanted & FILTER_ALL_MULTICAST:
                return R_SLOW       # the multicast list decides
        if self.pool.free_count <= self.reserve:
            return R_NO_SECTION
        cdef uint32_t number = self.pool.pop()
        cdef uint64_t start = <uint64_t>number * self.pool.section_size
        _write_message(self.pool.base + start, data, <uint32_t>size, HEADER + <uint32_t>size)
        where[0] = (HEADER + <uint64_t>size) | start << 32
        section[0] = number
        _count(counts, data, size)
        return R_DONE

    cdef int _announce(self, const uint64_t *ranges, const uint32_t *sections, int count) noexcept:
        """One transfer-page packet for `count` sections; gives them back if the ring is full."""
        cdef uint64_t tid = self.pool._commit(sections, <uint32_t>count, self.queue)
        cdef int code = ring_write_external(
            &self.writer.c, PACKET_TRANSFER_PAGES, FLAG_COMPLETION_REQUESTED, tid,
            self.set_id | <uint64_t>count << 32, ranges, 8 * <uint32_t>count,
            PyBytes_AS_STRING(self.packet), <uint32_t>PyBytes_GET_SIZE(self.packet))
        cdef int index
        if code:
            self.pool._release(tid, self.queue)
            return code
        for index in range(count):
            self.bytes_copied += <uint32_t>ranges[index]
        return 0
