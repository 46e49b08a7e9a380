"""The VMBus ring: thin Python classes over the inline C functions of `ring.pxd`.

One ring carries packets one way, between a `RingWriter` and a `RingReader` over the same window. Three ways in and out:
one packet a call (`send`, `recv`), batches (`send_batch`, `recv_batch`, numpy arrays with `recv_into`), and iteration
over the packets in place (`packets`).

Lengths on the wire count units of 8 bytes: a payload whose length is not a multiple of 8 arrives zero-padded.

The ring reports when the peer needs a signal and never sends one: `send` and its like return it; the reader
collects it for `take_signal`.
"""

cimport cython
from cpython.buffer cimport (PyBUF_CONTIG_RO, PyBUF_ND, PyBUF_C_CONTIGUOUS, PyBUF_WRITABLE, PyBuffer_FillInfo,
                             PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_GET_SIZE
from cpython.list cimport PyList_Append
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from vmbus.core.copy cimport bytes_at, copy_bytes
from vmbus.core.memory cimport GpaRanges, Window, refuse_objects

from vmbus.errors import RingCorrupt, RingEmpty, RingFull

IN_BAND = <int>PACKET_IN_BAND
TRANSFER_PAGES = <int>PACKET_TRANSFER_PAGES
GPA_DIRECT = <int>PACKET_GPA_DIRECT
COMPLETION = <int>PACKET_COMPLETION
COMPLETION_REQUESTED = <int>FLAG_COMPLETION_REQUESTED


cdef object _error(int code):
    """The exception for a negative code of the C functions."""
    if code == RING_FULL:
        return RingFull("not enough free space in the ring")
    if code == RING_EMPTY:
        return RingEmpty("no packet in the ring")
    if code == RING_TOO_LONG:
        return ValueError("the packet is longer than this ring or a packet descriptor allows")
    return RingCorrupt("the peer left an index or a packet descriptor that no correct peer can produce")


@cython.freelist(128)
@cython.final
cdef class Packet:
    """One received packet, copied out of the ring.

    Attributes:
        type: `IN_BAND`, `TRANSFER_PAGES`, `GPA_DIRECT`, `COMPLETION`, or a number this package has no name for.
        flags: `COMPLETION_REQUESTED` or 0.
        transaction_id: the sender's; a completion carries that of the packet it completes.
        payload: the bytes after the header, padded to a multiple of 8.
        ranges: of a GPA-direct packet: the guest buffers. Otherwise None.
        transfer_set_id: of a transfer-page packet: which buffer its ranges are in.
        transfer_ranges: of a transfer-page packet: (byte_count, byte_offset) of each range.
    """

    cdef readonly int type
    cdef readonly int flags
    cdef readonly unsigned long long transaction_id
    cdef readonly bytes payload
    cdef readonly GpaRanges ranges
    cdef readonly int transfer_set_id
    cdef readonly tuple transfer_ranges

    def __init__(self, *args, **kwargs):
        raise TypeError("packets come from RingReader.recv_packet and recv_packets")

    def __repr__(self):
        return (f"<Packet type={self.type} flags={self.flags} transaction_id={self.transaction_id:#x} "
                f"payload={len(self.payload)} bytes>")


cdef Packet _packet(const ring_packet_t *at):
    cdef Packet packet = Packet.__new__(Packet)
    cdef bytes header
    cdef uint32_t count, index
    cdef const uint8_t *h
    packet.type = at.type
    packet.flags = at.flags
    packet.transaction_id = at.transaction_id
    packet.payload = bytes_at(at.start + at.offset, at.length - at.offset)
    if at.type == PACKET_GPA_DIRECT or at.type == PACKET_TRANSFER_PAGES:
        header = bytes_at(at.start + DESCRIPTOR_BYTES, at.offset - DESCRIPTOR_BYTES)
        h = <const uint8_t *>PyBytes_AS_STRING(header)
        memcpy(&count, h + 4, 4)
        if at.type == PACKET_GPA_DIRECT:
            packet.ranges = GpaRanges.parse(header[8:], count)
        else:
            if count > (at.offset - EXTERNAL_HEADER_BYTES) // 8:
                raise RingCorrupt(f"{count} transfer page ranges in a header of {at.offset} bytes")
            packet.transfer_set_id = h[0] | h[1] << 8
            words = memoryview(header)[8:8 + 8 * count].cast("I")
            packet.transfer_ranges = tuple(zip(words[::2], words[1::2]))
    return packet


@cython.no_gc_clear     # the destructor needs what it refers to: cleared references are None, not memory
cdef class RingWriter:
    """RingWriter(window)\n--\n\nThe sending end of a ring. It has no lock: one thread at a time.

    Args:
        window: a mirrored window; the ring goes on at the indices that it holds.

    Raises:
        ValueError: the window is not mirrored.
        RingCorrupt: its indices are wrong.
    """

    def __cinit__(self, Window window not None):
        if not window.mirrored or window.base == NULL:
            raise ValueError("a ring needs an open, mirrored window")
        cdef int code = ring_writer_init(&self.c, window.base, window.size - CONTROL_BYTES)
        if code:
            raise _error(code)
        self.window = window
        window.exports += 1

    def __dealloc__(self):
        if self.window is not None:
            self.window.exports -= 1

    def __repr__(self):
        return f"<RingWriter of {self.c.size} bytes: {self.c.packets} packets, {self.c.doorbells} doorbells>"

    @property
    def capacity(self) -> int:
        """Bytes of the largest packet with header, padding and trailer: the data area less 8."""
        return self.c.size - 8

    @property
    def free_bytes(self) -> int:
        """Bytes that packets may take now. Raises RingCorrupt if the peer's index is wrong."""
        cdef int64_t room = ring_free_bytes(&self.c)
        if room < 0:
            raise _error(<int>room)
        return room

    @property
    def packets(self) -> int:
        """Packets written so far."""
        return self.c.packets

    @property
    def publishes(self) -> int:
        """How often new packets were made visible to the peer."""
        return self.c.publishes

    @property
    def doorbells(self) -> int:
        """After how many publishes the peer had to be signalled; the others need none."""
        return self.c.doorbells

    def send(self, payload, unsigned long long transaction_id=0, int type=PACKET_IN_BAND, int flags=0) -> bool:
        """Send one packet.

        Args:
            payload: bytes or anything with a contiguous buffer.
            transaction_id: comes back in the completion, if one is requested.
            type: `IN_BAND` or `COMPLETION`.
            flags: `COMPLETION_REQUESTED` or 0.

        Returns:
            True if the peer must be signalled.

        Raises:
            RingFull: no room now; see `want_space`.
            RingCorrupt: the peer's read index is wrong.
            ValueError: the packet can never fit, or `type` or `flags` has more than 16 bits.
            TypeError: the payload has no bytes (text, numbers, an array of objects).
        """
        cdef Py_buffer view
        cdef int code
        _check_header(type, flags)
        if PyBytes_CheckExact(payload):
            code = _write(&self.c, type, flags, transaction_id, PyBytes_AS_STRING(payload), PyBytes_GET_SIZE(payload))
        else:
            PyObject_GetBuffer(payload, &view, PyBUF_CONTIG_RO)
            refuse_objects(payload, &view)
            code = _write(&self.c, type, flags, transaction_id, view.buf, view.len)
            PyBuffer_Release(&view)
        if code:
            raise _error(code)
        return ring_publish(&self.c) != 0

    def send_gpa_direct(self, payload, GpaRanges ranges not None, unsigned long long transaction_id,
                        int flags=FLAG_COMPLETION_REQUESTED) -> bool:
        """Send one packet that names guest buffers; as `send`."""
        return self._external(PACKET_GPA_DIRECT, flags, transaction_id, <uint64_t>ranges.count << 32, ranges.raw, payload)

    def send_transfer_pages(self, payload, int set_id, ranges, unsigned long long transaction_id,
                            int flags=FLAG_COMPLETION_REQUESTED) -> bool:
        """Send one packet that names parts of an agreed buffer; as `send`.

        Args:
            payload: the packet's own bytes.
            set_id: which buffer, 0 to 65535.
            ranges: (byte_count, byte_offset) of each part.
            transaction_id: comes back in the completion.
            flags: `COMPLETION_REQUESTED` or 0.

        Raises:
            ValueError: also if `set_id` has more than 16 bits, or a count or an offset more than 32.
        """
        if not 0 <= set_id <= 0xffff:
            raise ValueError(f"the id of a transfer page set has 16 bits: {set_id}")
        pairs = list(ranges)
        for count, offset in pairs:
            if not (0 <= count <= 0xffffffff and 0 <= offset <= 0xffffffff):
                raise ValueError(f"a transfer page range has 32 bits for its count and for its offset: {count}, {offset}")
        raw = b"".join([(count | offset << 32).to_bytes(8, "little") for count, offset in pairs])
        return self._external(PACKET_TRANSFER_PAGES, flags, transaction_id,
                              set_id | <uint64_t>len(pairs) << 32, raw, payload)

    cdef object _external(self, int type, int flags, uint64_t transaction_id, uint64_t word, bytes raw, object payload):
        cdef Py_buffer view
        cdef int code
        _check_header(type, flags)
        PyObject_GetBuffer(payload, &view, PyBUF_CONTIG_RO)
        refuse_objects(payload, &view)
        if view.len > MOST_PACKET_BYTES or PyBytes_GET_SIZE(raw) > MOST_PACKET_BYTES:
            code = RING_TOO_LONG
        else:
            code = ring_write_external(&self.c, type, flags, transaction_id, word, PyBytes_AS_STRING(raw),
                                       <uint32_t>PyBytes_GET_SIZE(raw), view.buf, <uint32_t>view.len)
        PyBuffer_Release(&view)
        if code:
            raise _error(code)
        return ring_publish(&self.c) != 0

    def send_batch(self, payloads, unsigned long long transaction_id=0, unsigned long long step=0,
                   int type=PACKET_IN_BAND, int flags=0) -> tuple:
        """Send packets until all are written or the ring is full, and publish them once.

        Args:
            payloads: a list or tuple of payloads, or an array whose rows are the payloads (a C-contiguous
                buffer of two dimensions, or of one dimension with items longer than a byte).
            transaction_id: of the first packet.
            step: what each further packet's transaction id is higher by.
            type: `IN_BAND` or `COMPLETION`.
            flags: `COMPLETION_REQUESTED` or 0.

        Returns:
            (packets sent, True if the peer must be signalled).

        Raises:
            RingCorrupt: the peer's read index is wrong; nothing was sent.
            ValueError: a packet can never fit, the array is not C-contiguous, or `type` or `flags` has more than
                16 bits; nothing was sent.
            TypeError: not such a list or array, or one of Python objects; nothing was sent.
        """
        cdef uint32_t start = self.c.write
        cdef uint64_t before = self.c.packets
        cdef int code = 0
        _check_header(type, flags)
        try:
            if isinstance(payloads, (list, tuple)):
                code = self._write_list(payloads, transaction_id, step, type, flags)
            else:
                code = self._write_rows(payloads, transaction_id, step, type, flags)
            if code and code != RING_FULL:
                raise _error(code)
        except BaseException:
            self.c.write = start
            self.c.packets = before
            raise
        return self.c.packets - before, ring_publish(&self.c) != 0

    cdef int _write_list(self, payloads, uint64_t transaction_id, uint64_t step, int type, int flags) except? -99:
        cdef Py_buffer view
        cdef int code
        for payload in payloads:
            if PyBytes_CheckExact(payload):
                code = _write(&self.c, type, flags, transaction_id, PyBytes_AS_STRING(payload), PyBytes_GET_SIZE(payload))
            else:
                PyObject_GetBuffer(payload, &view, PyBUF_CONTIG_RO)
                refuse_objects(payload, &view)
                code = _write(&self.c, type, flags, transaction_id, view.buf, view.len)
                PyBuffer_Release(&view)
            if code:
                return code
            transaction_id += step
        return 0

    cdef int _write_rows(self, payloads, uint64_t transaction_id, uint64_t step, int type, int flags) except? -99:
        cdef Py_buffer view
        cdef int code = 0
        cdef Py_ssize_t rows, size, row
        if not PyObject_CheckBuffer(payloads):
            raise TypeError("a list or tuple of payloads or an array with one payload a row is needed, not "
                            f"{_a(payloads)}")
        PyObject_GetBuffer(payloads, &view, PyBUF_ND | PyBUF_C_CONTIGUOUS)
        refuse_objects(payloads, &view)
        try:
            rows, size = _rows(&view)
            with nogil:
                for row in range(rows):
                    code = _write(&self.c, type, flags, transaction_id, <char *>view.buf + row * size, size)
                    if code:
                        break
                    transaction_id += step
        finally:
            PyBuffer_Release(&view)
        return code

    def want_space(self, Py_ssize_t payload_size) -> bool:
        """Ask the reader for a signal once an in-band packet of this payload fits (`pending_send_size`).

        Returns:
            True if there is room already: do not wait; the wish is taken back.
        """
        if not 0 <= payload_size <= MOST_PACKET_BYTES or ring_packet_bytes(DESCRIPTOR_BYTES, payload_size) > self.c.size - 8:
            raise _error(RING_TOO_LONG)
        cdef uint32_t total = ring_packet_bytes(DESCRIPTOR_BYTES, payload_size)
        ring_want_space(&self.c, total)
        cdef int64_t room = ring_free_bytes(&self.c)
        if room < 0:
            raise _error(<int>room)
        if room >= total:
            ring_want_space(&self.c, 0)
            return True
        return False

    def stop_waiting(self) -> None:
        """Take the wish of `want_space` back, after the signal came."""
        ring_want_space(&self.c, 0)


cdef str _a(thing):
    return f"something of type {type(thing).__name__}"


cdef inline int _check_header(int type, int flags) except -1:
    """Any type and flags may be sent, so that a hostile peer can be played, but not others than were asked for."""
    if (type | flags) & ~0xffff:
        raise ValueError(f"a packet's type and its flags have 16 bits each: {type}, {flags}")
    return 0


cdef inline int _write(ring_writer_t *ring, int type, int flags, uint64_t transaction_id, const void *payload,
                       Py_ssize_t length) noexcept nogil:
    if length > MOST_PACKET_BYTES:
        return RING_TOO_LONG
    return ring_write(ring, <uint16_t>type, <uint16_t>flags, transaction_id, payload, <uint32_t>length)


cdef (Py_ssize_t, Py_ssize_t) _rows(const Py_buffer *view) except *:
    """Rows of a buffer and the bytes of each."""
    if view.ndim == 0 or (view.ndim == 1 and view.itemsize == 1):
        raise TypeError("a list of payloads or an array with one payload a row is needed, not one run of bytes")
    if view.shape[0] == 0:
        return 0, 0
    return view.shape[0], view.len // view.shape[0]


@cython.no_gc_clear     # the destructor needs what it refers to: cleared references are None, not memory
@cython.final
cdef class _DataArea:
    """Exports a ring's mirrored data area, read-only."""

    cdef Window window

    def __cinit__(self, Window window):
        self.window = window
        window.exports += 1

    def __dealloc__(self):
        self.window.exports -= 1

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.window.base + CONTROL_BYTES, 2 * (self.window.size - CONTROL_BYTES), 1, flags)


@cython.no_gc_clear     # the destructor needs what it refers to: cleared references are None, not memory
cdef class RingReader:
    """RingReader(window)\n--\n\nThe receiving end of a ring. It has no lock: one thread at a time.

    Args:
        window: a mirrored window; the ring goes on at the indices that it holds.

    Raises:
        ValueError: the window is not mirrored.
        RingCorrupt: its indices are wrong.
    """

    def __cinit__(self, Window window not None):
        if not window.mirrored or window.base == NULL:
            raise ValueError("a ring needs an open, mirrored window")
        cdef int code = ring_reader_init(&self.c, window.base, window.size - CONTROL_BYTES)
        if code:
            raise _error(code)
        self.window = window
        window.exports += 1

    def __dealloc__(self):
        if self.window is not None:
            self.window.exports -= 1

    cdef int release(self) except -1:
        if ring_release(&self.c):
            self.signal = True
        return 0

    def __repr__(self):
        return f"<RingReader of {self.c.size} bytes: {self.c.packets} packets, {self.c.doorbells} doorbells>"

    @property
    def capacity(self) -> int:
        """Bytes of the largest packet with header, padding and trailer: the data area less 8."""
        return self.c.size - 8

    @property
    def available_bytes(self) -> int:
        """Bytes of packets waiting now. Raises RingCorrupt if the peer's index is wrong."""
        cdef uint32_t write = load_acquire32(self.c.control + CONTROL_WRITE_INDEX)
        if ring_index_bad(write, self.c.size):
            raise _error(RING_CORRUPT)
        return ring_distance(self.c.read, write, self.c.size)

    @property
    def packets_read(self) -> int:
        """Packets taken so far."""
        return self.c.packets

    @property
    def releases(self) -> int:
        """How often space was given back to the peer."""
        return self.c.releases

    @property
    def doorbells(self) -> int:
        """After how many releases the peer had to be signalled; the others need none."""
        return self.c.doorbells

    def recv(self) -> bytes:
        """Take the next packet's payload.

        Raises:
            RingEmpty: there is none.
            RingCorrupt: the peer broke the ring; close the channel.
        """
        cdef ring_packet_t at
        cdef int code = ring_peek(&self.c, &at)
        if code:
            raise _error(code)
        cdef bytes payload = bytes_at(at.start + at.offset, at.length - at.offset)
        ring_advance(&self.c, &at)
        if ring_release(&self.c):
            self.signal = True
        return payload

    def recv_packet(self) -> Packet:
        """Take the next packet whole; raises as `recv`."""
        cdef ring_packet_t at
        cdef int code = ring_peek(&self.c, &at)
        if code:
            raise _error(code)
        cdef Packet packet = _packet(&at)
        ring_advance(&self.c, &at)
        self.release()
        return packet

    def recv_batch(self, Py_ssize_t limit=64) -> list:
        """Take up to `limit` payloads, as many as are there; one release for all.

        Raises:
            RingCorrupt: the next packet is bad. Packets before it are returned first.
        """
        cdef list payloads = []
        cdef ring_packet_t at
        cdef int code = 0
        while limit > 0:
            code = ring_peek(&self.c, &at)
            if code:
                break
            payloads.append(bytes_at(at.start + at.offset, at.length - at.offset))
            ring_advance(&self.c, &at)
            limit -= 1
        if code == RING_CORRUPT and not payloads:
            raise _error(code)
        self.release()
        return payloads

    def recv_packets(self, Py_ssize_t limit=64) -> list:
        """Take up to `limit` whole packets, as many as are there; one release for all; raises as `recv_batch`."""
        cdef list packets = []
        cdef ring_packet_t at
        cdef int code = 0
        try:
            while limit > 0:
                code = ring_peek(&self.c, &at)
                if code:
                    break
                packets.append(_packet(&at))
                ring_advance(&self.c, &at)
                limit -= 1
        except RingCorrupt:
            code = RING_CORRUPT
            if not packets:
                raise
        if code == RING_CORRUPT and not packets:
            raise _error(code)
        self.release()
        return packets

    def recv_into(self, out) -> int:
        """Copy payloads into the rows of `out`, as many as are there and fit; one release for all.

        Args:
            out: a writable array as `RingWriter.send_batch` takes it.

        Returns:
            the number of rows filled. It ends before a packet whose payload is not of a row's length (rounded up
            to 8).

        Raises:
            RingCorrupt: the next packet is bad. Packets before it are returned first.
            ValueError: the next packet's payload is not of a row's length, or the array is read-only or not
                C-contiguous.
            TypeError: not such an array, or one of Python objects.
        """
        cdef Py_buffer view
        cdef Py_ssize_t rows, size, row = 0
        cdef uint32_t padded
        cdef ring_packet_t at
        cdef int code = 0
        cdef bint misfit = False
        if not PyObject_CheckBuffer(out):
            raise TypeError(f"a writable array with one payload a row is needed, not {_a(out)}")
        PyObject_GetBuffer(out, &view, PyBUF_ND | PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE)
        refuse_objects(out, &view)
        try:
            rows, size = _rows(&view)
            padded = (size + 7) & ~7
            with nogil:
                while row < rows:
                    code = ring_peek(&self.c, &at)
                    if code:
                        break
                    if at.length - at.offset != padded:
                        misfit = True
                        break
                    copy_bytes(<char *>view.buf + row * size, at.start + at.offset, size)
                    ring_advance(&self.c, &at)
                    row += 1
        finally:
            PyBuffer_Release(&view)
        if row == 0 and code == RING_CORRUPT:
            raise _error(code)
        if row == 0 and misfit:
            raise ValueError(f"the next payload has {at.length - at.offset} bytes, a row {size}")
        self.release()
        return row

    def packets(self, Py_ssize_t limit=-1):
        """Iterate over the payloads in place, as read-only memoryviews into the ring.

        A view is good until the iteration ends: then all packets yielded so far are given back to the writer, which
        will overwrite them. The peer can change what a view shows at any time; copy what you decide upon.

        Args:
            limit: the most packets to yield; -1 for all that are there.
        """
        cdef ring_packet_t at
        cdef int code
        cdef Py_ssize_t start
        if self.bytes_view is None:
            self.bytes_view = memoryview(_DataArea(self.window))
        try:
            while limit != 0:
                code = ring_peek(&self.c, &at)
                if code == RING_EMPTY:
                    return
                if code:
                    raise _error(code)
                start = at.start + at.offset - self.c.data
                ring_advance(&self.c, &at)
                yield self.bytes_view[start:start + at.length - at.offset]
                limit -= 1
        finally:
            self.release()

    def take_signal(self) -> bool:
        """True once after a release for which the peer must be signalled: it waits for that much space."""
        cdef bint signal = self.signal
        self.signal = False
        return signal

    def mask(self) -> None:
        """Ask the peer not to signal: we poll."""
        ring_mask(&self.c)

    def unmask(self) -> bool:
        """Ask for signals again.

        Returns:
            True if packets came meanwhile: read them before waiting.
        """
        return ring_unmask(&self.c)
