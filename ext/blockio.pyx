"""Reads and writes of storage channels without the interpreter: the provider's hot path and the client's.

`BlockServer` stands in front of the SCSI target: it takes READ and WRITE requests (10 and 16) for units that are
nothing but a host file or mapped memory straight from the ring, moves the data between host and guest pages, and
writes the completions, all without the GIL and one publish a batch. Units with a Python backend get a `Request`
that is taken apart already. Whatever is not a plain, right read or write stays in the ring for the Python
provider, which also finds the right sense data for what failed here.

`BlockClient` is the guest's side: it sends many reads or writes at a queue depth and collects their completions.

Both sides copy a packet out of the ring once, check the copy, and use only that.
"""

cimport cython
from cpython.buffer cimport PyBUF_CONTIG, PyBUF_CONTIG_RO, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from cpython cimport array

import os
from array import array as _array

from vmbus.core.atomic cimport exchange32, load_acquire32, store_release32, unlikely
from vmbus.core.memory cimport (ACCESS_READ, ACCESS_WRITE, GuestMemory, gpa_cursor_iov, gpa_cursor_start,
                                gpa_cursor_t, gpa_ranges_check, gpa_transfer, guest_memory_t, guest_pointer, iovec)
from vmbus.core.ring cimport (DESCRIPTOR_BYTES, EXTERNAL_HEADER_BYTES, FLAG_COMPLETION_REQUESTED, PACKET_COMPLETION,
                              PACKET_GPA_DIRECT, RING_CORRUPT, RING_EMPTY, RING_FULL, RingReader, RingWriter,
                              ring_advance, ring_commit, ring_describe, ring_mask, ring_packet_bytes, ring_packet_t,
                              ring_peek, ring_publish, ring_reader_t, ring_release, ring_reserve, ring_writer_t)

from vmbus.errors import DeviceError, GuestMemoryError, RingCorrupt

cdef array.array _QUADS = _array("Q")

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *data, size_t count, int64_t offset)
    ssize_t pwrite(int fd, const void *data, size_t count, int64_t offset)
    int usleep(unsigned int microseconds)

cdef extern from "<endian.h>" nogil:
    uint32_t be32toh(uint32_t value)
    uint64_t be64toh(uint64_t value)
    uint32_t htobe32(uint32_t value)
    uint64_t htobe64(uint64_t value)

cdef enum:
    # vstor packet: 12-byte header, then the SCSI request of 36 or 52 bytes (vmbus.storage.wire)
    HEADER = 12
    REQUEST_LEAST = 36
    REQUEST_MOST = 52
    OPERATION_COMPLETE_IO = 1
    OPERATION_EXECUTE_SRB = 3
    DIRECTION_IN = 1
    SRB_SUCCESS = 1
    SRB_MASK = 0x3f
    READ_10 = 0x28
    WRITE_10 = 0x2a
    READ_16 = 0x88
    WRITE_16 = 0x8a

cdef enum:
    MOST_BATCH = 64             # requests that a Python backend gets at once
    SINGLE_AFTER_NONE = 8       # and one by one, when it has carried out none of a batch

cdef enum:
    MOST_UNITS = 64             # units served here; more are served by the Python provider
    MOST_RANGE_WORDS = 131      # GPA ranges of a request served here: one of 512 KiB, or many small ones
    VECTORS = 64

cdef enum:
    SERVED = 0
    LEFT = -1                   # not for us: the packet stays in the ring

cdef enum:
    SERVE_EMPTY = 0
    SERVE_MORE = 1
    SERVE_DEFERRED = 2
    SERVE_FULL = 3

EMPTY = <int>SERVE_EMPTY
MORE = <int>SERVE_MORE
DEFERRED = <int>SERVE_DEFERRED
FULL = <int>SERVE_FULL

cdef packed struct wire_request_t:
    # vstor packet up to the end of the command (vmbus.storage.wire.PacketHeader, ScsiRequest)
    uint32_t operation
    uint32_t flags
    uint32_t status
    uint16_t length
    uint8_t srb_status
    uint8_t scsi_status
    uint8_t reserved1
    uint8_t path_id
    uint8_t target_id
    uint8_t lun
    uint8_t cdb_length
    uint8_t sense_info_length
    uint8_t data_in
    uint8_t properties
    uint32_t data_transfer_length
    uint8_t cdb[20]

cdef packed struct wire_packet_t:
    wire_request_t request
    uint16_t reserve
    uint8_t queue_tag
    uint8_t queue_action
    uint32_t srb_flags
    uint32_t time_out_value
    uint32_t queue_sort_key

def layout() -> dict:
    """Bytes from the start of a packet to each field, as compiled here; with the sizes of both forms."""
    cdef wire_packet_t packet
    cdef size_t start = <size_t>&packet
    return {
        "operation": <size_t>&packet.request.operation - start,
        "flags": <size_t>&packet.request.flags - start,
        "status": <size_t>&packet.request.status - start,
        "length": <size_t>&packet.request.length - start,
        "srb_status": <size_t>&packet.request.srb_status - start,
        "scsi_status": <size_t>&packet.request.scsi_status - start,
        "reserved1": <size_t>&packet.request.reserved1 - start,
        "path_id": <size_t>&packet.request.path_id - start,
        "target_id": <size_t>&packet.request.target_id - start,
        "lun": <size_t>&packet.request.lun - start,
        "cdb_length": <size_t>&packet.request.cdb_length - start,
        "sense_info_length": <size_t>&packet.request.sense_info_length - start,
        "data_in": <size_t>&packet.request.data_in - start,
        "properties": <size_t>&packet.request.properties - start,
        "data_transfer_length": <size_t>&packet.request.data_transfer_length - start,
        "payload": <size_t>&packet.request.cdb - start,
        "reserve": <size_t>&packet.reserve - start,
        "queue_tag": <size_t>&packet.queue_tag - start,
        "queue_action": <size_t>&packet.queue_action - start,
        "srb_flags": <size_t>&packet.srb_flags - start,
        "time_out_value": <size_t>&packet.time_out_value - start,
        "queue_sort_key": <size_t>&packet.queue_sort_key - start,
        "short packet": sizeof(wire_request_t),
        "long packet": sizeof(wire_packet_t),
    }


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
    memcpy(wire, start + packet.offset, sizeof(wire_request_t))
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
    if request.length > wire.data_transfer_length:
        return LEFT
    memcpy(first, start + DESCRIPTOR_BYTES, 8)
    request.range_count = <uint32_t>(first[0] >> 32)
    memcpy(request.ranges, start + EXTERNAL_HEADER_BYTES, header)
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
                memcpy(unit.mapping + request.offset, guest, request.length)
            else:
                memcpy(guest, unit.mapping + request.offset, request.length)
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
                memcpy(disk, vectors[index].iov_base, vectors[index].iov_len)
            else:
                memcpy(vectors[index].iov_base, disk, vectors[index].iov_len)
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
        with nogil:
            gpa_cursor_start(&cursor, <const uint8_t *>self.c.ranges, self.c.range_count)
            moved = gpa_transfer(&self.memory.c, &cursor, fd, self.c.offset, self.c.length, not self.c.write)
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
                    memcpy(vectors[index].iov_base, ours, vectors[index].iov_len)
                else:
                    memcpy(ours, vectors[index].iov_base, vectors[index].iov_len)
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
        with nogil:
            for index in range(most):
                code = _relay(&self.memory.c, &self.items[first + index], &memory.c,
                              <uint64_t *>numbers.view.buf + <uint64_t>index * each)
                if code:
                    break
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
        with nogil:
            while index < most:
                request = &self.items[index]
                gpa_cursor_start(&cursor, <const uint8_t *>request.ranges, request.range_count)
                if gpa_transfer(&self.memory.c, &cursor, fd, (<uint64_t *>places.view.buf)[index], request.length,
                                not request.write) != <int64_t>request.length:
                    break
                index += 1
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
                    memcpy(ours, theirs, part)
                else:
                    memcpy(theirs, ours, part)
                theirs += part
                done += part
                left -= part
    return SERVED


@cython.final
cdef class BlockServer:
    """Serves the plain reads and writes of one storage channel.

    Only one thread at a time may be in `serve`; `disable` may come from any thread.

    Args:
        incoming: the ring of requests.
        outgoing: the ring of completions.
        memory: the guest's memory.
        path: the IDE channel if this is an IDE accelerator (requests of any path are then for it), else -1.

    Attributes:
        signal: set when the peer has to be rung; the caller rings and clears it.
        packets: requests taken, each of them completed.
        bytes_copied: bytes moved by the processor.
        backend_calls: reads and writes of backends.
    """

    cdef RingReader incoming
    cdef RingWriter outgoing
    cdef GuestMemory memory
    cdef int path
    cdef unit_t units[MOST_UNITS]
    cdef int unit_count
    cdef list handlers
    cdef list batches
    cdef list buffers
    cdef bint serving
    cdef int python_units
    cdef block_request_t request
    cdef public bint signal
    cdef readonly uint64_t packets
    cdef readonly uint64_t bytes_copied
    cdef readonly uint64_t backend_calls

    def __cinit__(self, RingReader incoming not None, RingWriter outgoing not None, GuestMemory memory not None,
                  int path=-1):
        self.incoming = incoming
        self.outgoing = outgoing
        self.memory = memory
        memory.exports += 1
        self.path = path
        self.handlers = [None] * MOST_UNITS
        self.batches = [None] * MOST_UNITS
        self.buffers = [None] * MOST_UNITS
        for index in range(MOST_UNITS):
            self.units[index].fd = -1

    def __dealloc__(self):
        if self.memory is not None:
            self.memory.exports -= 1
        for index in range(self.unit_count):
            if self.units[index].fd >= 0:
                os.close(self.units[index].fd)

    def enable(self, int target, int lun, int sector_size, uint64_t sectors, bint writable, *, int fd=-1,
               mapping=None, handler=None, batch=None) -> bool:
        """Serve a unit from now on, by `mapping`, `fd` or `handler`, whichever is given first.

        Args:
            target: SCSI target.
            lun: logical unit.
            sector_size: bytes of a sector.
            sectors: capacity.
            writable: take writes, too.
            fd: a file that holds the disk's bytes; it is duplicated.
            mapping: the disk's bytes as a buffer.
            handler: called with each `Request`; an exception lets the provider carry the request out again.
            batch: called with `Requests` where several follow each other; returns how many of them, from the first
                on, were carried out. The next one goes to the `handler`, which is needed, too.

        Returns:
            False if it cannot be served here now: `serve` is running, or there are too many units.
        """
        cdef int index
        cdef unit_t *unit
        if self.serving:
            return False
        self.disable(target, lun)
        for index in range(self.unit_count):
            if not self.units[index].used or (self.units[index].target == target and self.units[index].lun == lun):
                break
        else:
            if self.unit_count == MOST_UNITS:
                return False
            index = self.unit_count
            self.unit_count += 1
        unit = &self.units[index]
        self._free(index)
        if mapping is not None:
            view = memoryview(mapping)
            if view.nbytes < sectors * sector_size or (writable and view.readonly):
                raise ValueError("the mapping is smaller than the disk, or read-only")
            self.buffers[index] = _Mapped(view, writable)
            unit.mapping = (<_Mapped>self.buffers[index]).address()
        elif fd >= 0:
            unit.fd = os.dup(fd)
        elif handler is not None:
            self.handlers[index] = handler
            self.batches[index] = batch
            unit.python = True
            self.python_units += 1
        else:
            raise ValueError("a unit needs a mapping, a file or a handler")
        unit.target = target
        unit.lun = lun
        unit.writable = writable
        unit.sectors = sectors
        unit.sector_shift = sector_size.bit_length() - 1
        unit.used = True
        store_release32(&unit.enabled, 1)
        return True

    def disable(self, int target, int lun) -> None:
        """Stop serving a unit; on return none of its requests is under way here (except that of a handler that calls)."""
        cdef int index
        cdef unit_t *unit
        for index in range(self.unit_count):
            unit = &self.units[index]
            if unit.used and unit.target == target and unit.lun == lun:
                exchange32(&unit.enabled, 0)
                if not unit.python:
                    with nogil:
                        while load_acquire32(&unit.busy):
                            usleep(10)
                if not self.serving:
                    self._free(index)

    cdef int _free(self, int index) except -1:
        cdef unit_t *unit = &self.units[index]
        cdef int fd = unit.fd
        if unit.python:
            self.python_units -= 1
        memset(unit, 0, sizeof(unit_t))
        unit.fd = -1
        self.handlers[index] = None
        self.batches[index] = None
        self.buffers[index] = None
        if fd >= 0:
            os.close(fd)
        return 0

    def serve(self, int limit=64) -> int:
        """Take requests from the ring as long as they are for us, at most `limit`; complete and publish them.

        Returns:
            `EMPTY`, `MORE` (the limit was reached), `DEFERRED` (the next packet is for the Python provider) or
            `FULL` (no room for a completion).

        Raises:
            RingCorrupt: the peer broke a ring.
        """
        cdef int code = SERVE_MORE
        if self.unit_count == 0:
            return SERVE_DEFERRED
        self.serving = True
        try:
            if self.python_units:
                code = self._serve_python(limit)
            else:
                with nogil:
                    code = self._serve(limit)
            if ring_release(&self.incoming.c):
                self.signal = True
            if ring_publish(&self.outgoing.c):
                self.signal = True
        finally:
            self.serving = False
        if code == RING_CORRUPT:
            raise RingCorrupt("the peer left an index or a packet descriptor that no correct peer can produce")
        return code

    cdef int _next(self, ring_packet_t *packet, uint8_t **start) noexcept nogil:
        """Find the next request that is for us and room for its completion; negative: stop with that code."""
        cdef int code = ring_peek(&self.incoming.c, packet)
        if code:
            return -1 if code == RING_EMPTY else -4
        if _parse(packet, self.units, self.unit_count, self.path, &self.request):
            return -2
        code = _reserve_completion(&self.outgoing.c, &self.request, start)
        if code:
            return -3 if code == RING_FULL else -4
        return 0

    cdef int _serve(self, int limit) noexcept nogil:
        cdef ring_packet_t packet
        cdef uint8_t *start = NULL
        cdef unit_t *unit
        cdef int code
        while limit > 0:
            code = self._next(&packet, &start)
            if code:
                return _stop(code)
            unit = self.request.unit
            if unlikely(not _enter(unit)):
                return SERVE_DEFERRED
            code = _transfer(&self.memory.c, &self.request)
            store_release32(&unit.busy, 0)
            if code:
                return SERVE_DEFERRED
            self._done(&packet, start)
            limit -= 1
        return SERVE_MORE

    cdef int _serve_python(self, int limit) except? -99:
        """The same with the GIL, for channels that have units with Python handlers."""
        cdef ring_packet_t packet
        cdef uint8_t *start = NULL
        cdef unit_t *unit
        cdef Request request
        cdef int code, taken, single = 0
        while limit > 0:
            code = self._next(&packet, &start)
            if code:
                return _stop(code)
            unit = self.request.unit
            if not _enter(unit):
                return SERVE_DEFERRED
            try:
                if unit.python and single == 0 and self.batches[self.request.index] is not None and limit > 1:
                    taken = self._serve_batch(&packet, limit)
                    if taken < 0:
                        return SERVE_FULL
                    if taken == 0:
                        single = SINGLE_AFTER_NONE
                    limit -= taken
                    continue
                if single:
                    single -= 1
                if unit.python:
                    request = Request.__new__(Request)
                    request.memory = self.memory
                    memcpy(&request.c, &self.request, sizeof(block_request_t) - MOST_RANGE_WORDS * 8
                           + (packet.offset - EXTERNAL_HEADER_BYTES))
                    self.handlers[self.request.index](request)
                else:
                    with nogil:
                        code = _transfer(&self.memory.c, &self.request)
                    if code:
                        return SERVE_DEFERRED
            except Exception:   # the provider carries it out again and finds out what to tell the guest
                return SERVE_DEFERRED
            finally:
                store_release32(&unit.busy, 0)
            self._done(&packet, start)
            limit -= 1
        return SERVE_MORE

    cdef int _serve_batch(self, ring_packet_t *packet, int limit) except? -99:
        """Collect the requests that follow `self.request` and are like it, hand them over, complete them.

        Returns how many were completed, from the first on, or -1 if there is no room for completions. What was not
        completed is in the ring as if it had never been looked at.
        """
        cdef Requests batch = Requests.__new__(Requests)
        cdef uint8_t *start = NULL
        cdef unit_t *unit = self.request.unit
        cdef bint write = self.request.write
        cdef uint64_t length = self.request.length
        cdef uint32_t most = MOST_BATCH if limit > MOST_BATCH else limit, index = 0, done
        cdef int unit_index = self.request.index, code = SERVED
        batch.memory = self.memory
        with nogil:
            while True:
                memcpy(&batch.items[batch.count], &self.request, sizeof(block_request_t) - MOST_RANGE_WORDS * 8
                       + (packet.offset - EXTERNAL_HEADER_BYTES))
                batch.places[batch.count] = self.incoming.c.read
                batch.count += 1
                ring_advance(&self.incoming.c, packet)
                if (batch.count == most or ring_peek(&self.incoming.c, packet)
                        or _parse(packet, self.units, self.unit_count, self.path, &self.request)
                        or self.request.unit != unit or self.request.write != write
                        or self.request.length != length):
                    break
        try:
            done = self.batches[unit_index](batch)
        except Exception:   # the first one is tried by itself, which tells what to say to the guest
            done = 0
        if done > batch.count:
            done = batch.count
        for index in range(done):
            code = _reserve_completion(&self.outgoing.c, &batch.items[index], &start)
            if code:
                done = index
                break
            _complete(&self.outgoing.c, start, &batch.items[index])
        self.packets += done
        self.backend_calls += done
        self.bytes_copied += batch.copied
        if done == batch.count:
            return done
        self.incoming.c.read = batch.places[done]
        self.incoming.c.packets -= batch.count - done
        return -1 if code else done     # a corrupt ring shows itself to the next who looks

    cdef inline void _done(self, const ring_packet_t *packet, uint8_t *start) noexcept nogil:
        _complete(&self.outgoing.c, start, &self.request)
        ring_advance(&self.incoming.c, packet)
        self.packets += 1
        self.backend_calls += 1
        if self.request.unit.mapping != NULL or self.request.unit.python:
            self.bytes_copied += self.request.length


cdef inline int _stop(int code) noexcept nogil:
    if code == -1:
        return SERVE_EMPTY
    if code == -2:
        return SERVE_DEFERRED
    if code == -3:
        return SERVE_FULL
    return RING_CORRUPT


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


cdef enum:
    STATE_WAITING = 0
    STATE_SENT = 1
    STATE_GOOD = 2
    STATE_FAILED = 3

cdef enum:
    STEP_RING = 1
    STEP_DONE = 2
    STEP_STRAY = 4
    STEP_PROGRESS = 8

RING = <int>STEP_RING
DONE = <int>STEP_DONE
STRAY = <int>STEP_STRAY
PROGRESS = <int>STEP_PROGRESS


@cython.final
cdef class BlockClient:
    """Sends reads or writes of equal length at a queue depth, and collects their completions.

    Args:
        outgoing: the ring of requests.
        incoming: the ring of completions.
        memory: the guest's memory.
        target: SCSI target.
        lun: logical unit.
        sector_size: bytes of a sector.
        packet_size: bytes of a packet in the negotiated version, 48 or 64.

    Attributes:
        sent: requests sent, ever.
        received: completions taken, ever.
        stale: completions for which no request was outstanding.
    """

    cdef RingWriter outgoing
    cdef RingReader incoming
    cdef GuestMemory memory
    cdef wire_packet_t template
    cdef uint32_t packet_size
    cdef uint32_t sector_shift
    cdef uint64_t base
    cdef uint64_t count
    cdef uint64_t submitted
    cdef uint64_t completed
    cdef uint64_t failed
    cdef uint32_t depth
    cdef uint32_t length
    cdef uint32_t pages_each
    cdef uint64_t *offsets
    cdef uint64_t *pfns
    cdef uint8_t *states
    cdef _Mapped offsets_buffer
    cdef _Mapped pfns_buffer
    cdef readonly uint64_t sent
    cdef readonly uint64_t received
    cdef readonly uint64_t stale

    def __cinit__(self, RingWriter outgoing not None, RingReader incoming not None, GuestMemory memory not None,
                  int target, int lun, int sector_size, uint32_t packet_size):
        if packet_size not in (HEADER + REQUEST_LEAST, HEADER + REQUEST_MOST):
            raise ValueError(f"packets of {packet_size} bytes")
        self.outgoing = outgoing
        self.incoming = incoming
        self.memory = memory
        self.packet_size = packet_size
        self.sector_shift = sector_size.bit_length() - 1
        memset(&self.template, 0, sizeof(wire_packet_t))
        self.template.request.operation = OPERATION_EXECUTE_SRB
        self.template.request.flags = 1
        self.template.request.length = <uint16_t>(packet_size - HEADER)
        self.template.request.target_id = target
        self.template.request.lun = lun
        self.template.request.cdb_length = 16
        self.template.request.sense_info_length = 20
        self.template.time_out_value = 60

    def __dealloc__(self):
        free(self.states)

    def begin(self, offsets, pfns, uint32_t length, uint64_t first_id, bint write, uint32_t depth) -> None:
        """Prepare a batch; `step` then drives it.

        Args:
            offsets: byte offsets into the disk, a buffer of 64-bit integers.
            pfns: page frame numbers of the data, for each request as many as `length` needs; a buffer of 64-bit
                integers. Data begin at the start of each request's first page.
            length: bytes of each request, whole sectors.
            first_id: transaction id of the first request; the others count up.
            write: write instead of read.
            depth: requests outstanding at once.

        Raises:
            ValueError: lengths that do not fit each other.
        """
        cdef uint64_t count
        if self.count != self.completed:
            raise DeviceError("the last batch is not finished")
        if length == 0 or length & ((1 << self.sector_shift) - 1) or depth == 0:
            raise ValueError(f"requests of {length} bytes, {depth} at once")
        self.offsets_buffer = _Mapped(offsets, False)
        self.pfns_buffer = _Mapped(pfns, False)
        count = self.offsets_buffer.view.len // 8
        self.pages_each = (length + 4095) >> 12
        if self.offsets_buffer.view.itemsize != 8 or self.pfns_buffer.view.itemsize != 8:
            raise ValueError("offsets and page numbers must be 64-bit integers")
        if <uint64_t>self.pfns_buffer.view.len // 8 < count * self.pages_each:
            raise ValueError(f"{self.pfns_buffer.view.len // 8} pages for {count} requests of {self.pages_each}")
        self.offsets = <uint64_t *>self.offsets_buffer.view.buf
        self.pfns = <uint64_t *>self.pfns_buffer.view.buf
        free(self.states)
        self.states = <uint8_t *>calloc(count or 1, 1)
        if self.states == NULL:
            raise MemoryError()
        self.base = first_id
        self.count = count
        self.submitted = self.completed = self.failed = 0
        self.depth = depth
        self.length = length
        self.template.request.data_in = 0 if write else DIRECTION_IN
        self.template.request.data_transfer_length = length
        self.template.srb_flags = 0x08 | (0x80 if write else 0x40)
        self.template.request.cdb[0] = WRITE_16 if write else READ_16
        cdef uint32_t blocks = htobe32(length >> self.sector_shift)
        memcpy(self.template.request.cdb + 10, &blocks, 4)

    def step(self) -> int:
        """Take completions, then send up to the depth.

        Returns:
            a sum of `RING` (ring the host), `DONE` (all are completed), `STRAY` (the next packet is none of this
            batch's completions; take it away) and `PROGRESS` (something was taken or sent).

        Raises:
            RingCorrupt: the host broke a ring.
        """
        cdef int state
        with nogil:
            state = self._step()
        if state < 0:
            raise RingCorrupt("the peer left an index or a packet descriptor that no correct peer can produce")
        return state

    cdef int _step(self) noexcept nogil:
        cdef uint64_t before = self.submitted + self.completed
        cdef int state = 0, code
        code = self._collect()
        if code == RING_CORRUPT:
            return code
        if code:
            state |= STEP_STRAY
        if ring_release(&self.incoming.c):
            state |= STEP_RING
        code = self._submit()
        if code == RING_CORRUPT:
            return code
        if ring_publish(&self.outgoing.c):
            state |= STEP_RING
        if self.completed == self.count:
            state |= STEP_DONE
        if self.submitted + self.completed != before:
            state |= STEP_PROGRESS
        return state

    cdef inline int _collect(self) noexcept nogil:
        cdef ring_packet_t packet
        cdef wire_request_t answer
        cdef uint64_t index
        cdef int code
        while True:
            code = ring_peek(&self.incoming.c, &packet)
            if code:
                return 0 if code == RING_EMPTY else code
            index = packet.transaction_id - self.base
            if unlikely(packet.type != PACKET_COMPLETION or index >= self.count):
                return 1
            if unlikely(self.states[index] != STATE_SENT):
                self.stale += 1
            else:
                self.states[index] = STATE_FAILED
                if packet.length - packet.offset >= sizeof(wire_request_t):
                    memcpy(&answer, packet.start + packet.offset, sizeof(wire_request_t))
                    if (answer.operation == OPERATION_COMPLETE_IO and answer.status == 0
                            and (answer.srb_status & SRB_MASK) == SRB_SUCCESS and answer.scsi_status == 0
                            and answer.data_transfer_length == self.length):
                        self.states[index] = STATE_GOOD
                if self.states[index] == STATE_FAILED:
                    self.failed += 1
                self.completed += 1
                self.received += 1
            ring_advance(&self.incoming.c, &packet)

    cdef inline int _submit(self) noexcept nogil:
        cdef uint32_t header = EXTERNAL_HEADER_BYTES + 8 + 8 * self.pages_each
        cdef uint32_t total = ring_packet_bytes(header, self.packet_size)
        cdef uint8_t *start = NULL
        cdef uint64_t lba
        cdef int code
        while self.submitted < self.count and self.submitted - self.completed < self.depth:
            code = ring_reserve(&self.outgoing.c, total, &start)
            if code:
                return code
            ring_describe(start, PACKET_GPA_DIRECT, header, header + self.packet_size, FLAG_COMPLETION_REQUESTED,
                          self.base + self.submitted)
            (<uint64_t *>start)[2] = <uint64_t>1 << 32
            (<uint64_t *>start)[3] = self.length
            if self.pages_each == 1:
                (<uint64_t *>start)[4] = self.pfns[self.submitted]
            else:
                memcpy(start + 32, self.pfns + self.submitted * self.pages_each, 8 * self.pages_each)
            lba = htobe64(self.offsets[self.submitted] >> self.sector_shift)
            memcpy(self.template.request.cdb + 2, &lba, 8)
            memcpy(start + header, &self.template, self.packet_size)
            ring_commit(&self.outgoing.c, start, total)
            self.states[self.submitted] = STATE_SENT
            self.submitted += 1
            self.sent += 1
        return 0

    def failures(self) -> list:
        """Indices of the requests that did not succeed."""
        cdef uint64_t index
        if self.failed == 0:
            return []
        return [index for index in range(self.count) if self.states[index] != STATE_GOOD]

    def results(self) -> list:
        """The data of all requests of a read, copied out of the guest's pages.

        Raises:
            GuestMemoryError: a page is outside the guest's memory.
        """
        cdef list made = []
        cdef bytes data
        cdef uint64_t index, page, left, part
        cdef uint8_t *source
        cdef char *target
        for index in range(self.count):
            data = PyBytes_FromStringAndSize(NULL, self.length)
            target = PyBytes_AS_STRING(data)
            left = self.length
            for page in range(self.pages_each):
                part = left if left < 4096 else 4096
                source = self.memory.pointer(self.pfns[index * self.pages_each + page] << 12, part, ACCESS_READ)
                memcpy(target, source, part)
                target += part
                left -= part
            made.append(data)
        return made

    def abandon(self) -> None:
        """Give the batch up; later completions of it are stale."""
        self.count = self.submitted = self.completed = self.failed = 0


def run_without_gil(BlockClient client not None, BlockServer server not None) -> int:
    """Drive a client's batch and its server in turns on this thread until the batch is done, without the GIL.

    For measurements: no doorbell is rung, both poll. Returns the packets served; stops early (and returns fewer) when
    anything happens that needs Python.
    """
    cdef uint64_t before = server.packets
    cdef int state, code
    server.serving = True
    try:
        with nogil:
            ring_mask(&client.incoming.c)
            ring_mask(&server.incoming.c)
            while True:
                state = client._step()
                if state < 0 or state & (STEP_DONE | STEP_STRAY):
                    break
                code = server._serve(1 << 16)
                ring_release(&server.incoming.c)
                ring_publish(&server.outgoing.c)
                if code != SERVE_EMPTY:
                    break
    finally:
        server.serving = False
    return server.packets - before
