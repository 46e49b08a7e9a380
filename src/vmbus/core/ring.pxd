"""C interface of the VMBus ring, for `cimport` from other people's Cython.

One ring carries packets one way. Its window (see `vmbus.core.memory`) is a control page and a data area of whole
pages that is mapped twice in a row, so that every packet is contiguous in memory:

    control page   +0 write index   +4 read index   +8 interrupt mask   +12 pending send size   +64 feature bits
    packet         16-byte descriptor, rest of the header, payload, padding to 8 bytes, 8-byte trailer

All functions run without the GIL, allocate nothing, and return 0, 1 (the peer wants a signal) or a negative
`RING_…` code. The ring reports that a signal is needed; it never sends one.

    writer: ring_reserve … ring_commit (or ring_write), any number of times, then one ring_publish
    reader: ring_peek … ring_advance, any number of times, then one ring_release

The peer shares the memory and may change any of it at any time. Indices of the peer are checked each time they are
read; a descriptor is read once, and only the checked copy in `ring_packet_t` counts afterwards.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from vmbus.core.atomic cimport exchange32, load_acquire32, load_relaxed32, load_relaxed64, store_relaxed32, unlikely
from vmbus.core.copy cimport copy_bytes
from vmbus.core.memory cimport Window

cdef enum:
    RING_FULL = -1          # not enough free space now
    RING_EMPTY = -2         # no packet now
    RING_CORRUPT = -3       # an index or a descriptor that no correct peer can produce
    RING_TOO_LONG = -4      # the packet can never fit into this ring, or into a descriptor

cdef enum:
    # Offsets of the control page (Linux: struct hv_ring_buffer)
    CONTROL_WRITE_INDEX = 0
    CONTROL_READ_INDEX = 4
    CONTROL_INTERRUPT_MASK = 8
    CONTROL_PENDING_SEND_SIZE = 12
    CONTROL_FEATURE_BITS = 64
    CONTROL_BYTES = 4096

cdef enum:
    FEATURE_PENDING_SEND_SIZE = 1

cdef enum:
    # Packet types and flags (Linux: enum vmbus_packet_type, VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED)
    PACKET_IN_BAND = 6
    PACKET_TRANSFER_PAGES = 7
    PACKET_GPA_DIRECT = 9
    PACKET_COMPLETION = 11
    FLAG_COMPLETION_REQUESTED = 1

cdef enum:
    DESCRIPTOR_BYTES = 16
    TRAILER_BYTES = 8
    EXTERNAL_HEADER_BYTES = 24      # descriptor + 8 bytes, before the ranges of GPA-direct and transfer-page packets
    MOST_PACKET_BYTES = 0xffff * 8  # header and payload: the descriptor counts them in 16 bits of 8 bytes

cdef packed struct packet_descriptor_t:
    uint16_t type
    uint16_t offset8        # where the payload starts, in units of 8 bytes
    uint16_t length8        # where it ends
    uint16_t flags
    uint64_t transaction_id

cdef struct ring_packet_t:
    # A checked copy of one packet's descriptor, and where its bytes are. The bytes are still the peer's.
    uint8_t *start          # of the descriptor, in shared memory
    uint32_t offset         # bytes from start to the payload
    uint32_t length         # bytes from start to the end of the payload
    uint16_t type
    uint16_t flags
    uint64_t transaction_id

cdef struct ring_writer_t:
    uint8_t *control
    uint8_t *data
    uint32_t size           # bytes of the data area
    uint32_t write          # where the next packet goes
    uint32_t published      # the write index that the peer sees
    uint32_t read           # the peer's read index when last looked at
    uint64_t packets        # written so far
    uint64_t publishes
    uint64_t doorbells      # publishes after which the peer wanted a signal

cdef struct ring_reader_t:
    uint8_t *control
    uint8_t *data
    uint32_t size
    uint32_t read           # where the next packet is
    uint32_t released       # the read index that the peer sees
    uint32_t write          # the peer's write index when last looked at
    uint64_t packets        # consumed so far
    uint64_t releases
    uint64_t doorbells      # releases after which the peer wanted a signal


cdef inline bint ring_index_bad(uint32_t index, uint32_t size) noexcept nogil:
    return unlikely(index >= size or (index & 7) != 0)


cdef inline uint32_t ring_distance(uint32_t start, uint32_t end, uint32_t size) noexcept nogil:
    """Bytes from index `start` forward to index `end`."""
    return end - start if end >= start else end - start + size


cdef inline uint32_t ring_packet_bytes(uint32_t header, uint32_t payload) noexcept nogil:
    """Bytes that a packet takes in the ring: header, payload, padding and trailer."""
    return ((header + payload + 7) & ~<uint32_t>7) + TRAILER_BYTES


cdef inline int ring_writer_init(ring_writer_t *ring, void *window, uint32_t data_bytes) noexcept nogil:
    """Start writing where the control page says; tells the peer that we understand `pending_send_size`."""
    ring.control = <uint8_t *>window
    ring.data = ring.control + CONTROL_BYTES
    ring.size = data_bytes
    ring.write = load_relaxed32(ring.control + CONTROL_WRITE_INDEX)
    ring.published = ring.write
    ring.read = load_acquire32(ring.control + CONTROL_READ_INDEX)
    ring.packets = ring.publishes = ring.doorbells = 0
    if ring_index_bad(ring.write, ring.size) or ring_index_bad(ring.read, ring.size):
        return RING_CORRUPT
    store_relaxed32(ring.control + CONTROL_FEATURE_BITS, FEATURE_PENDING_SEND_SIZE)
    store_relaxed32(ring.control + CONTROL_PENDING_SEND_SIZE, 0)
    return 0


cdef inline int ring_reader_init(ring_reader_t *ring, void *window, uint32_t data_bytes) noexcept nogil:
    """Start reading where the control page says."""
    ring.control = <uint8_t *>window
    ring.data = ring.control + CONTROL_BYTES
    ring.size = data_bytes
    ring.read = load_relaxed32(ring.control + CONTROL_READ_INDEX)
    ring.released = ring.read
    ring.write = load_acquire32(ring.control + CONTROL_WRITE_INDEX)
    ring.packets = ring.releases = ring.doorbells = 0
    if ring_index_bad(ring.write, ring.size) or ring_index_bad(ring.read, ring.size):
        return RING_CORRUPT
    return 0


cdef inline int64_t ring_free_bytes(ring_writer_t *ring) noexcept nogil:
    """Bytes that packets may take now, by the peer's present read index; RING_CORRUPT if that is wrong."""
    cdef uint32_t read = load_acquire32(ring.control + CONTROL_READ_INDEX), used
    if ring_index_bad(read, ring.size):
        return RING_CORRUPT
    used = ring_distance(read, ring.write, ring.size)
    if unlikely(ring_distance(read, ring.published, ring.size) > used):
        return RING_CORRUPT     # the peer "read" what was not published yet
    ring.read = read
    return <int64_t>ring.size - used - 8    # a full ring would look empty, so 8 bytes always stay free


cdef inline int ring_reserve(ring_writer_t *ring, uint32_t total, uint8_t **start) noexcept nogil:
    """Find room for a packet of `total` bytes (see `ring_packet_bytes`); contiguous, thanks to the mirror."""
    cdef uint32_t used = ring_distance(ring.read, ring.write, ring.size)
    cdef int64_t room
    if unlikely(total > ring.size - used - 8):
        if total > ring.size - 8:
            return RING_TOO_LONG
        room = ring_free_bytes(ring)
        if room < total:
            return RING_FULL if room >= 0 else RING_CORRUPT
    start[0] = ring.data + ring.write
    return 0


cdef inline void ring_commit(ring_writer_t *ring, uint8_t *start, uint32_t total) noexcept nogil:
    """Close the reserved packet with its trailer: the index at which it starts, in the high 32 bits."""
    (<uint64_t *>(start + total - TRAILER_BYTES))[0] = <uint64_t>ring.write << 32
    ring.write += total
    if ring.write >= ring.size:
        ring.write -= ring.size
    ring.packets += 1


cdef inline void ring_describe(uint8_t *start, uint16_t type, uint32_t header, uint32_t length, uint16_t flags,
                               uint64_t transaction_id) noexcept nogil:
    """Write a descriptor: `header` and `length` are bytes to the start and to the end of the payload."""
    (<uint64_t *>start)[0] = (<uint64_t>type | <uint64_t>(header >> 3) << 16 | <uint64_t>((length + 7) >> 3) << 32
                              | <uint64_t>flags << 48)
    (<uint64_t *>start)[1] = transaction_id


cdef inline int ring_write(ring_writer_t *ring, uint16_t type, uint16_t flags, uint64_t transaction_id,
                           const void *payload, uint32_t length) noexcept nogil:
    """Write one packet without external ranges: in-band or completion. Nobody sees it before `ring_publish`."""
    cdef uint32_t total = ring_packet_bytes(DESCRIPTOR_BYTES, length)
    cdef uint8_t *start
    cdef int code
    if unlikely(length > MOST_PACKET_BYTES - DESCRIPTOR_BYTES):
        return RING_TOO_LONG
    code = ring_reserve(ring, total, &start)
    if unlikely(code):
        return code
    ring_describe(start, type, DESCRIPTOR_BYTES, DESCRIPTOR_BYTES + length, flags, transaction_id)
    if length & 7:
        (<uint64_t *>(start + total - 16))[0] = 0   # padding must not show older packets
    copy_bytes(start + DESCRIPTOR_BYTES, payload, length)
    ring_commit(ring, start, total)
    return 0


cdef inline int ring_write_external(ring_writer_t *ring, uint16_t type, uint16_t flags, uint64_t transaction_id,
                                    uint64_t word, const void *ranges, uint32_t ranges_length,
                                    const void *payload, uint32_t length) noexcept nogil:
    """Write one packet with ranges in its header: GPA-direct or transfer-page.

    `word` are the 8 bytes after the descriptor: the range count in the high half; for transfer pages the set id and
    the owner flag in the low half. `ranges_length` must be a multiple of 8.
    """
    cdef uint32_t header = EXTERNAL_HEADER_BYTES + ranges_length, total
    cdef uint8_t *start
    cdef int code
    if unlikely(ranges_length > MOST_PACKET_BYTES or length > MOST_PACKET_BYTES or header + length > MOST_PACKET_BYTES):
        return RING_TOO_LONG
    total = ring_packet_bytes(header, length)
    code = ring_reserve(ring, total, &start)
    if unlikely(code):
        return code
    ring_describe(start, type, header, header + length, flags, transaction_id)
    (<uint64_t *>start)[2] = word
    memcpy(start + EXTERNAL_HEADER_BYTES, ranges, ranges_length)
    if length & 7:
        (<uint64_t *>(start + total - 16))[0] = 0
    copy_bytes(start + header, payload, length)
    ring_commit(ring, start, total)
    return 0


cdef inline int ring_publish(ring_writer_t *ring) noexcept nogil:
    """Let the peer see all that was written; 1 if it must be signalled: it had read everything and is not masked."""
    cdef uint32_t before = ring.published, read
    if ring.write == before:
        return 0
    # One full barrier a batch: our index must be out before we look whether the peer went to sleep.
    exchange32(ring.control + CONTROL_WRITE_INDEX, ring.write)
    ring.published = ring.write
    ring.publishes += 1
    if load_relaxed32(ring.control + CONTROL_INTERRUPT_MASK):
        return 0
    read = load_acquire32(ring.control + CONTROL_READ_INDEX)
    if read != before:
        return 0
    ring.doorbells += 1
    return 1


cdef inline void ring_want_space(ring_writer_t *ring, uint32_t total) noexcept nogil:
    """Ask the peer for a signal once `total` bytes are free; 0 takes the wish back.

    Look at the free space again afterwards: the peer may have freed it just before.
    """
    exchange32(ring.control + CONTROL_PENDING_SEND_SIZE, total)


cdef inline int ring_peek(ring_reader_t *ring, ring_packet_t *packet) noexcept nogil:
    """Check the next packet and describe it; it stays where it is."""
    cdef uint32_t available = ring_distance(ring.read, ring.write, ring.size), write
    cdef uint64_t first
    if available == 0:
        write = load_acquire32(ring.control + CONTROL_WRITE_INDEX)
        if ring_index_bad(write, ring.size):
            return RING_CORRUPT
        ring.write = write
        available = ring_distance(ring.read, write, ring.size)
        if available == 0:
            return RING_EMPTY
    if unlikely(available < DESCRIPTOR_BYTES + TRAILER_BYTES):
        return RING_CORRUPT
    packet.start = ring.data + ring.read
    first = load_relaxed64(packet.start)
    packet.type = <uint16_t>first
    packet.offset = <uint32_t>(<uint16_t>(first >> 16)) << 3
    packet.length = <uint32_t>(<uint16_t>(first >> 32)) << 3
    packet.flags = <uint16_t>(first >> 48)
    packet.transaction_id = load_relaxed64(packet.start + 8)
    if unlikely(packet.offset < DESCRIPTOR_BYTES or packet.length < packet.offset
                or packet.length > available - TRAILER_BYTES):
        return RING_CORRUPT
    if packet.type == PACKET_GPA_DIRECT or packet.type == PACKET_TRANSFER_PAGES:
        if unlikely(packet.offset < EXTERNAL_HEADER_BYTES):
            return RING_CORRUPT
    return 0


cdef inline void ring_advance(ring_reader_t *ring, const ring_packet_t *packet) noexcept nogil:
    """Step over a packet that `ring_peek` described. Its bytes stay valid until `ring_release`."""
    ring.read += packet.length + TRAILER_BYTES
    if ring.read >= ring.size:
        ring.read -= ring.size
    ring.packets += 1


cdef inline int ring_release(ring_reader_t *ring) noexcept nogil:
    """Give the space of all packets stepped over back to the peer; 1 if it waits for that much and must be signalled."""
    cdef uint32_t before = ring.released, pending, write, free_before, free_now
    if ring.read == before:
        return 0
    exchange32(ring.control + CONTROL_READ_INDEX, ring.read)
    ring.released = ring.read
    ring.releases += 1
    # Some writers ask for the ring's size minus 1 to mean "all of it"; sizes are multiples of 8, so round down.
    pending = load_relaxed32(ring.control + CONTROL_PENDING_SEND_SIZE) & ~<uint32_t>7
    if pending == 0:
        return 0
    write = load_acquire32(ring.control + CONTROL_WRITE_INDEX)
    if ring_index_bad(write, ring.size):
        return 0    # the next ring_peek reports it
    free_before = ring.size - 8 - ring_distance(before, write, ring.size)
    free_now = ring.size - 8 - ring_distance(ring.read, write, ring.size)
    if free_before < pending and free_now >= pending:
        ring.doorbells += 1
        return 1
    return 0


cdef inline void ring_mask(ring_reader_t *ring) noexcept nogil:
    """Ask the peer not to signal when the ring becomes non-empty: we poll."""
    store_relaxed32(ring.control + CONTROL_INTERRUPT_MASK, 1)


cdef inline bint ring_unmask(ring_reader_t *ring) noexcept nogil:
    """Ask for signals again; true if packets came meanwhile and must be read before waiting."""
    exchange32(ring.control + CONTROL_INTERRUPT_MASK, 0)
    return load_acquire32(ring.control + CONTROL_WRITE_INDEX) != ring.read


cdef class RingWriter:
    cdef ring_writer_t c
    cdef readonly Window window
    cdef object _external(self, int type, int flags, uint64_t transaction_id, uint64_t word, bytes raw, object payload)
    cdef int _write_list(self, payloads, uint64_t transaction_id, uint64_t step, int type, int flags) except? -99
    cdef int _write_rows(self, payloads, uint64_t transaction_id, uint64_t step, int type, int flags) except? -99

cdef class RingReader:
    cdef ring_reader_t c
    cdef readonly Window window
    cdef bint signal
    cdef object bytes_view      # read-only memoryview of the mirrored data area, made on first use
    cdef int release(self) except -1
