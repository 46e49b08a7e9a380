# One request of the host: its checked copy, its data moved, its completion written. Included by blockio.pyx.

cdef enum:
    MOST_UNITS = 64             # units served here; more are served by the Python provider
    MOST_RANGE_WORDS = 131      # GPA ranges of a request served here: one of 512 KiB, or many small ones
    VECTORS = 64

cdef enum:
    SERVED = 0
    LEFT = -1                   # not for us: the packet stays in the ring

cdef struct unit_t:
    uint32_t enabled        # may be taken by requests; cleared by another thread at any time
    uint32_t busy           # a request is in it now
    uint8_t target
    uint8_t lun
    bint used
    bint writable
    bint python             # has a Python handler instead of fd or mapping
    int fd                  # our own duplicate, or -1
    uint8_t *mapping        # or NULL
    uint32_t sector_shift
    uint64_t sectors
    uint64_t most           # bytes of one request
    uint8_t *present        # by page of `mapping`: not 0 if it is known to be there; or NULL if all are
    int holes               # the file of `mapping`, to ask whether a page is there

cdef struct block_request_t:
    # A checked, private copy of one READ or WRITE.
    wire_request_t wire
    uint64_t transaction_id
    uint64_t offset         # bytes into the disk
    uint64_t length         # bytes to move
    uint32_t completion     # bytes of the completion's payload
    uint32_t range_count
    bint write
    unit_t *unit
    int index
    uint64_t ranges[MOST_RANGE_WORDS]


cdef inline int _parse(const ring_packet_t *packet, unit_t *units, int unit_count, int path,
                       block_request_t *request) noexcept nogil:
    """Copy a packet out of the ring and check it; LEFT unless it is a plain READ or WRITE of one of the units."""
    cdef uint32_t header = packet.offset - EXTERNAL_HEADER_BYTES, payload = packet.length - packet.offset, count
    cdef const uint8_t *start = packet.start
    cdef uint64_t lba, blocks
    cdef int64_t total
    cdef wire_request_t *wire = &request.wire
    cdef unit_t *unit
    cdef uint64_t first[2]
    if (packet.type != PACKET_GPA_DIRECT or packet.flags != FLAG_COMPLETION_REQUESTED
            or header > MOST_RANGE_WORDS * 8 or payload < HEADER + REQUEST_LEAST):
        return LEFT
    copy_from_shared(wire, start + packet.offset, sizeof(wire_request_t))
    if wire.operation != OPERATION_EXECUTE_SRB or (wire.path_id != 0 and path < 0) or wire.cdb[1] != 0:
        return LEFT
    if wire.cdb[0] == READ_10 or wire.cdb[0] == WRITE_10:
        memcpy(&count, wire.cdb + 2, 4)
        lba = be32toh(count)
        blocks = <uint64_t>wire.cdb[7] << 8 | wire.cdb[8]
        if wire.cdb[9]:
            return LEFT
    elif wire.cdb[0] == READ_16 or wire.cdb[0] == WRITE_16:
        memcpy(&lba, wire.cdb + 2, 8)
        lba = be64toh(lba)
        memcpy(&count, wire.cdb + 10, 4)
        blocks = be32toh(count)
        if wire.cdb[15]:
            return LEFT
    else:
        return LEFT
    request.write = wire.cdb[0] == WRITE_10 or wire.cdb[0] == WRITE_16
    for index in range(unit_count):
        unit = &units[index]
        if unit.used and unit.target == wire.target_id and unit.lun == wire.lun:
            break
    else:
        return LEFT
    if blocks == 0 or lba >= unit.sectors or blocks > unit.sectors - lba or (request.write and not unit.writable):
        return LEFT
    request.unit = unit
    request.index = index
    request.offset = lba << unit.sector_shift
    request.length = blocks << unit.sector_shift
    if request.length > wire.data_transfer_length or wire.data_transfer_length > unit.most:
        return LEFT
    copy_from_shared(first, start + DESCRIPTOR_BYTES, 8)
    request.range_count = <uint32_t>(first[0] >> 32)
    copy_from_shared(request.ranges, start + EXTERNAL_HEADER_BYTES, header)
    total = gpa_ranges_check(<const uint8_t *>request.ranges, header, request.range_count)
    if total < wire.data_transfer_length:   # malformed ranges are negative
        return LEFT
    request.transaction_id = packet.transaction_id
    request.completion = HEADER + (payload - HEADER if payload - HEADER < REQUEST_MOST else REQUEST_MOST)
    return SERVED


cdef inline bint _enter(unit_t *unit) noexcept nogil:
    """Mark the unit busy, unless it was disabled meanwhile. The exchange orders the mark before the look."""
    exchange32(&unit.busy, 1)
    if unlikely(load_acquire32(&unit.enabled) == 0):
        store_release32(&unit.busy, 0)
        return False
    return True


cdef inline void _read_mapping(unit_t *unit, uint64_t offset, uint8_t *to, uint64_t length) noexcept nogil:
    """Copy from the mapping, but zeros for pages that are not there: touching them would make the host allocate them."""
    cdef uint64_t page, part
    cdef int64_t data
    if unit.present == NULL:
        copy_bytes(to, unit.mapping + offset, length)
        return
    while length:
        page = offset >> 12
        part = 4096 - (offset & 4095)
        if part > length:
            part = length
        if unlikely(unit.present[page] == 0):
            data = lseek(unit.holes, page << 12, SEEK_DATA)
            if data < 0 or <uint64_t>data >= offset + part:
                memset(to, 0, part)
            else:
                unit.present[page] = 1
        if unit.present[page]:
            copy_bytes(to, unit.mapping + offset, part)
        to += part
        offset += part
        length -= part


cdef inline int _transfer(const guest_memory_t *memory, block_request_t *request) noexcept nogil:
    """Move the data of a request between disk and guest. LEFT if anything is wrong: the provider does it again."""
    cdef unit_t *unit = request.unit
    cdef uint32_t access = ACCESS_READ if request.write else ACCESS_WRITE
    cdef gpa_cursor_t cursor
    cdef iovec vectors[VECTORS]
    cdef uint64_t covered, done = 0
    cdef uint64_t *words = request.ranges
    cdef uint8_t *guest
    cdef uint8_t *disk
    cdef ssize_t moved
    cdef int used, index
    if request.range_count == 1 and (words[0] >> 32) + request.length <= 4096:
        # One page: no walk over ranges needed.
        if words[1] >= memory.size >> 12:
            return LEFT
        guest = guest_pointer(memory, (words[1] << 12) + (words[0] >> 32), request.length, access)
        if guest == NULL:
            return LEFT
        if unit.mapping != NULL:
            if request.write:
                copy_bytes(unit.mapping + request.offset, guest, request.length)
            else:
                _read_mapping(unit, request.offset, guest, request.length)
            return SERVED
        while True:
            if request.write:
                moved = pwrite(unit.fd, guest, request.length, request.offset)
            else:
                moved = pread(unit.fd, guest, request.length, request.offset)
            if moved >= 0 or errno != EINTR:
                break
        return SERVED if <uint64_t>moved == request.length and moved > 0 else LEFT
    gpa_cursor_start(&cursor, <const uint8_t *>request.ranges, request.range_count)
    if unit.mapping == NULL:
        return SERVED if gpa_transfer(memory, &cursor, unit.fd, request.offset, request.length,
                                      not request.write) == <int64_t>request.length else LEFT
    disk = unit.mapping + request.offset
    while done < request.length:
        used = gpa_cursor_iov(&cursor, memory, access, request.length - done, vectors, VECTORS, &covered)
        if used <= 0:
            return LEFT
        for index in range(used):
            if request.write:
                copy_bytes(disk, vectors[index].iov_base, vectors[index].iov_len)
            else:
                _read_mapping(unit, disk - unit.mapping, <uint8_t *>vectors[index].iov_base, vectors[index].iov_len)
            disk += vectors[index].iov_len
        done += covered
    return SERVED


cdef inline int _reserve_completion(ring_writer_t *ring, const block_request_t *request, uint8_t **start) noexcept nogil:
    return ring_reserve(ring, ring_packet_bytes(DESCRIPTOR_BYTES, request.completion), start)


cdef inline void _complete(ring_writer_t *ring, uint8_t *start, const block_request_t *request) noexcept nogil:
    """Fill the reserved completion: success, all bytes moved."""
    cdef wire_packet_t answer
    memset(&answer, 0, sizeof(answer))
    answer.request.operation = OPERATION_COMPLETE_IO
    answer.request.length = <uint16_t>(request.completion - HEADER)
    answer.request.srb_status = SRB_SUCCESS
    answer.request.path_id = request.wire.path_id
    answer.request.target_id = request.wire.target_id
    answer.request.lun = request.wire.lun
    answer.request.cdb_length = 16
    answer.request.data_in = request.wire.data_in
    answer.request.data_transfer_length = <uint32_t>request.length
    ring_describe(start, PACKET_COMPLETION, DESCRIPTOR_BYTES, DESCRIPTOR_BYTES + request.completion, 0,
                  request.transaction_id)
    if request.completion == sizeof(wire_packet_t):
        memcpy(start + DESCRIPTOR_BYTES, &answer, sizeof(wire_packet_t))
    else:
        if request.completion & 7:
            (<uint64_t *>(start + ring_packet_bytes(DESCRIPTOR_BYTES, request.completion) - 16))[0] = 0
        memcpy(start + DESCRIPTOR_BYTES, &answer, request.completion)
    ring_commit(ring, start, ring_packet_bytes(DESCRIPTOR_BYTES, request.completion))
