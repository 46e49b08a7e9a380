"""The hot path of the network: plain Ethernet frames between rings, buffers and the switch, in batches.

*Plain* is what most packets are: RNDIS packet messages in a send-buffer section without per-packet information that
would need work, transfer pages, frames without a tag. Whatever is not plain is left where it is and reported as
`SLOW`: `vmbus.network` then does that one packet or frame in Python and calls again, so nothing is reordered and
nothing is implemented twice but the plain case. The Python implementation is the oracle of the tests.

Rings and buffers are shared with a hostile peer. A descriptor or header is copied once, checked, and only the copy
counts; frame data is copied once, to where it goes.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.list cimport PyList_Append, PyList_GET_ITEM, PyList_GET_SIZE
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from vmbus.core.memory cimport Window
from vmbus.core.ring cimport (FLAG_COMPLETION_REQUESTED, PACKET_COMPLETION, PACKET_IN_BAND, PACKET_TRANSFER_PAGES,
                              RING_EMPTY, RING_FULL, RingReader, RingWriter, ring_advance, ring_packet_bytes,
                              ring_packet_t, ring_peek, ring_publish, ring_reserve, ring_write, ring_write_external)

from vmbus.errors import RingCorrupt

cdef enum:
    R_DONE = 0
    R_SLOW = 1
    R_FULL = 2
    R_NO_SECTION = 3

DONE = <int>R_DONE                  # nothing is left
SLOW = <int>R_SLOW                  # the next packet or frame is not plain
FULL = <int>R_FULL                  # the outgoing ring has no room
NO_SECTION = <int>R_NO_SECTION      # no free section of the buffer

cdef enum:
    NVSP_RNDIS_PACKET = 107
    NVSP_RNDIS_COMPLETE = 108
    NVSP_SUCCESS = 1
    RNDIS_PACKET = 1
    HEADER = 44             # RNDIS message header and packet body
    NO_SECTION_INDEX = 0xffffffff
    INFO_CHECKSUM = 0
    INFO_HASH = 8
    CHECKSUM_VALUE_INVALID = 0x180
    MOST_MESSAGES = 32
    MOST_RANGES = 64        # transfer-page ranges in one packet of ours
    MOST_IN_RANGES = 562    # and in one of a host's (RSC); a plain packet may have as many
    FILTER_DIRECTED = 1
    FILTER_ALL_MULTICAST = 4
    FILTER_BROADCAST = 8
    FILTER_PROMISCUOUS = 32
    ETHERNET = 14

cdef uint64_t EVERYBODY = <uint64_t>0xffffffff << 16 | 0xffff

cdef struct nvsp_rndis_t:
    uint32_t type
    uint32_t channel
    uint32_t section
    uint32_t size

cdef struct rndis_packet_t:
    uint32_t type
    uint32_t length
    uint32_t data_offset        # from the body, which starts 8 bytes into the message
    uint32_t data_length
    uint32_t oob_offset
    uint32_t oob_length
    uint32_t oob_count
    uint32_t info_offset
    uint32_t info_length
    uint32_t handle
    uint32_t reserved

cdef struct counts_t:
    uint64_t frames[3]          # directed, multicast, broadcast
    uint64_t bytes[3]


cdef inline uint64_t _address(const uint8_t *at) noexcept nogil:
    """A MAC address as a number, the first byte the highest."""
    return (<uint64_t>at[0] << 40 | <uint64_t>at[1] << 32 | <uint64_t>at[2] << 24 | <uint64_t>at[3] << 16
            | <uint64_t>at[4] << 8 | at[5])


cdef inline void _count(counts_t *counts, const uint8_t *frame, uint64_t size) noexcept nogil:
    cdef int kind = 0
    if frame[0] & 1:
        kind = 2 if _address(frame) == EVERYBODY else 1
    counts.frames[kind] += 1
    counts.bytes[kind] += size


cdef tuple _take_counts(counts_t *counts):
    result = (counts.frames[0], counts.frames[1], counts.frames[2], counts.bytes[0], counts.bytes[1], counts.bytes[2])
    memset(counts, 0, sizeof(counts_t))
    return result


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
        memcpy(self.base + <size_t>section * self.section_size + offset, PyBytes_AS_STRING(source), size)
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


@cython.final
cdef class ReceivePool(_Sections):
    """The host's view of a guest's receive buffer: which sections are free, and which packet holds the others.

    A packet's transaction id names its first section in the low 32 bits and counts packets in the high ones, so that
    a completion that comes twice, or was never asked for, is known for what it is.

    Args:
        window: the receive buffer.
        section_size: bytes of a section.
        count: sections.
    """

    cdef uint32_t *next         # section after this one in its packet, or `count`
    cdef uint64_t *owner        # of a packet's first section: its transaction id; else 0
    cdef uint16_t *queue        # of a packet's first section: the channel it went to
    cdef uint64_t sequence

    def __cinit__(self, Window window, uint32_t section_size, uint32_t count):
        self.next = <uint32_t *>calloc(count + 1, 4)
        self.owner = <uint64_t *>calloc(count + 1, 8)
        self.queue = <uint16_t *>calloc(count + 1, 2)
        if self.next == NULL or self.owner == NULL or self.queue == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.next)
        free(self.owner)
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
            if self.owner[section] and self.queue[section] == queue:
                self._release(self.owner[section], <uint16_t>queue)
                packets += 1
        return packets

    def in_flight(self) -> dict:
        """The sections of each packet that the guest has not completed, by transaction id."""
        result = {}
        cdef uint32_t section, at
        for section in range(self.count):
            if self.owner[section]:
                held = []
                at = section
                while at < self.count:
                    held.append(at)
                    at = self.next[at]
                result[self.owner[section]] = tuple(held)
        return result

    cdef uint64_t _commit(self, const uint32_t *sections, uint32_t count, uint16_t queue) noexcept:
        cdef uint32_t index, first = sections[0]
        for index in range(count):
            self.next[sections[index]] = sections[index + 1] if index + 1 < count else self.count
        self.sequence = (self.sequence + 1) & 0x7fffffff
        if self.sequence == 0:
            self.sequence = 1
        self.owner[first] = self.sequence << 32 | first
        self.queue[first] = queue
        return self.owner[first]

    cdef bint _release(self, uint64_t transaction_id, uint16_t queue) noexcept:
        cdef uint32_t section = <uint32_t>transaction_id, following
        if (section >= self.count or transaction_id == 0 or self.owner[section] != transaction_id
                or self.queue[section] != queue):
            return False
        self.owner[section] = 0
        while section < self.count:
            following = self.next[section]
            self.push(section)
            section = following
        return True


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
                    self.violations += 1
                ring_advance(&self.reader.c, &at)
                taken += 1
                continue
            if at.type != PACKET_IN_BAND or at.length - at.offset < sizeof(nvsp_rndis_t) or self.send_base == NULL:
                reason = R_SLOW
                break
            memcpy(&message, at.start + at.offset, sizeof(nvsp_rndis_t))
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
                frame = PyBytes_FromStringAndSize(<char *>start + starts[index], sizes[index])
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
            memcpy(&head, buffer + at, HEADER)
            if head.type != RNDIS_PACKET or head.length < HEADER or head.length > left or head.info_length:
                return 0
            if head.oob_offset | head.oob_length | head.oob_count | head.handle:
                return 0
            body = head.length - 8
            if head.data_offset < HEADER - 8 or head.data_offset > body or head.data_length > body - head.data_offset:
                return 0
            if head.data_length < ETHERNET or head.data_length > self.frame_limit:
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


cdef inline void _write_message(uint8_t *to, const uint8_t *frame, uint32_t size, uint32_t padded) noexcept nogil:
    """The RNDIS packet message of a frame, padded to `padded` bytes."""
    cdef rndis_packet_t head
    memset(&head, 0, sizeof(head))
    head.type = RNDIS_PACKET
    head.length = padded
    head.data_offset = HEADER - 8
    head.data_length = size
    memcpy(to, &head, HEADER)
    memcpy(to + HEADER, frame, size)
    if padded > HEADER + size:
        memset(to + HEADER + size, 0, padded - HEADER - size)


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
                    frame = PyBytes_FromStringAndSize(<char *>self.base + starts[index], sizes[index])
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

    cdef bint _completed(self, const ring_packet_t *at) noexcept:
        """The host completed a packet of `send`; False if it is none, or says nothing."""
        cdef uint32_t answer[2]
        cdef uint32_t section = <uint32_t>at.transaction_id
        if (at.transaction_id >> 32 == 0 or section >= self.pool.count or at.length - at.offset < sizeof(answer)
                or self.pool.owner[section] != at.transaction_id):
            return False
        memcpy(answer, at.start + at.offset, sizeof(answer))
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
        memcpy(&type, at.start + at.offset, 4)
        memcpy(&word, at.start + 16, 8)
        count = <uint32_t>(word >> 32)
        if (type != NVSP_RNDIS_PACKET or <uint16_t>word != self.set_id or count == 0 or count > MOST_IN_RANGES
                or count > (at.offset - 24) // 8):
            return 0
        for index in range(count):
            memcpy(&span, at.start + 24 + 8 * index, 8)
            size, offset = <uint32_t>span, <uint32_t>(span >> 32)
            if size < HEADER or size > self.section_size or <uint64_t>offset + size > self.receive_size:
                return 0
            memcpy(&head, self.base + offset, HEADER)
            if head.type != RNDIS_PACKET or head.length < HEADER or head.length > size:
                return 0
            if head.oob_offset | head.oob_length | head.oob_count | head.handle:
                return 0
            body = head.length - 8
            if head.data_offset < HEADER - 8 or head.data_offset > body or head.data_length > body - head.data_offset:
                return 0
            if head.data_length == 0 or (head.length != size and head.length + self.alignment < size):
                return 0
            if head.info_length and not self._info_is_plain(offset, &head):
                return 0
            starts[index] = offset + 8 + head.data_offset
            sizes[index] = head.data_length
        return <int>count

    cdef bint _info_is_plain(self, uint32_t offset, const rndis_packet_t *head) noexcept:
        """Whether the per-packet information only says that checksums are right, or what the hash is."""
        cdef uint8_t info[256]
        cdef uint32_t item[4]
        cdef uint32_t at = 0, body = head.length - 8
        if (head.info_length > sizeof(info) or head.info_offset < HEADER - 8 or head.info_offset > body
                or head.info_length > body - head.info_offset
                or (head.info_offset < head.data_offset + head.data_length
                    and head.data_offset < head.info_offset + head.info_length)):
            return False
        memcpy(info, self.base + offset + 8 + head.info_offset, head.info_length)
        while at < head.info_length:
            if head.info_length - at < sizeof(item):
                return False
            memcpy(item, info + at, sizeof(item))
            if item[0] != 16 or item[2] != 12:
                return False
            if not (item[1] == INFO_HASH or (item[1] == INFO_CHECKSUM and not item[3] & CHECKSUM_VALUE_INVALID)):
                return False
            at += 16
        return True
