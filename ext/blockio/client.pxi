# The guest's end: many reads or writes at a queue depth. Included by blockio.pyx.

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
    cdef bint stepping
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
        self.template.request.sense_info_length = 20 if packet_size == HEADER + REQUEST_MOST else 18
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
        if self.count != self.completed or self.stepping:
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
            DeviceError: another thread is inside.
        """
        cdef int state
        if self.stepping:
            raise DeviceError("another thread drives the batch")
        self.stepping = True    # nobody begins another one, which frees this one's states
        with nogil:
            state = self._step()
        self.stepping = False
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
                    copy_from_shared(&answer, packet.start + packet.offset, sizeof(wire_request_t))
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
                copy_bytes(target, source, part)
                target += part
                left -= part
            made.append(data)
        return made

    @property
    def busy(self) -> bool:
        """Whether a batch was begun and is not done."""
        return self.completed != self.count

    def pending(self) -> list:
        """Transaction ids of the requests that the host has and has not completed: their pages are still its."""
        cdef uint64_t index
        if self.completed == self.submitted:
            return []
        return [self.base + index for index in range(self.submitted) if self.states[index] == STATE_SENT]

    def abandon(self) -> None:
        """Give the batch up; later completions of it are stale."""
        self.count = self.submitted = self.completed = self.failed = 0
