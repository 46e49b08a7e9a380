# The host's end: the plain reads and writes of one channel. Included by blockio.pyx.

cdef enum:
    SERVE_EMPTY = 0
    SERVE_MORE = 1
    SERVE_DEFERRED = 2
    SERVE_FULL = 3

EMPTY = <int>SERVE_EMPTY
MORE = <int>SERVE_MORE
DEFERRED = <int>SERVE_DEFERRED
FULL = <int>SERVE_FULL


@cython.no_gc_clear     # the destructor needs what it refers to: cleared references are None, not memory
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
               mapping=None, present=None, handler=None, batch=None, uint64_t most=0) -> bool:
        """Serve a unit from now on, by `mapping`, `fd` or `handler`, whichever is given first.

        Args:
            target: SCSI target.
            lun: logical unit.
            sector_size: bytes of a sector.
            sectors: capacity.
            writable: take writes, too.
            fd: a file that holds the disk's bytes; it is duplicated.
            mapping: the disk's bytes as a buffer.
            present: with `mapping`, a writable byte for each of its pages that is not 0 if the page is known to be
                there; `fd` is then its file, which is asked about others. Holes are read as zeros, not touched.
            handler: called with each `Request`; an exception lets the provider carry the request out again.
            batch: called with `Requests` where several follow each other; returns how many of them, from the first
                on, were carried out. The next one goes to the `handler`, which is needed, too.

            most: bytes of one request, 0 for no limit; longer ones are left to the provider.

        Returns:
            False if it cannot be served here now: `serve` is running, or there are too many units.
        """
        cdef int index
        cdef unit_t *unit
        cdef _Mapped marks
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
            if present is not None and fd >= 0:
                marks = _Mapped(present, True)
                if <uint64_t>marks.view.len < (<uint64_t>view.nbytes + 4095) >> 12:
                    raise ValueError("a page of the mapping has no mark")
                self.buffers[index] = (self.buffers[index], marks)
                unit.present = marks.address()
                unit.holes = unit.fd = os.dup(fd)
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
        unit.most = most or <uint64_t>-1
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
        except BaseException:   # from outside, as Ctrl-C: nothing was looked at
            self.incoming.c.read = batch.places[0]
            self.incoming.c.packets -= batch.count
            raise
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
