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
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from cpython cimport array

import os
from array import array as _array

from vmbus.core.atomic cimport exchange32, load_acquire32, store_release32, unlikely
from vmbus.core.copy cimport copy_bytes, copy_from_shared
from vmbus.core.memory cimport (ACCESS_READ, ACCESS_WRITE, GuestMemory, gpa_cursor_iov, gpa_cursor_start,
                                gpa_cursor_t, gpa_ranges_check, gpa_transfer, guest_memory_t, guest_pointer, iovec)
from vmbus.core.ring cimport (DESCRIPTOR_BYTES, EXTERNAL_HEADER_BYTES, FLAG_COMPLETION_REQUESTED, PACKET_COMPLETION,
                              PACKET_GPA_DIRECT, RING_CORRUPT, RING_EMPTY, RING_FULL, RingReader, RingWriter,
                              ring_advance, ring_commit, ring_describe, ring_mask, ring_packet_bytes, ring_packet_t,
                              ring_peek, ring_publish, ring_reader_t, ring_release, ring_reserve, ring_writer_t)

from vmbus.errors import DeviceError, GuestMemoryError, RingCorrupt

cdef enum:
    TURNS = 1 << 14             # rounds of client and server after which signals (Ctrl-C) are looked at

cdef array.array _QUADS = _array("Q")

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *data, size_t count, int64_t offset)
    ssize_t pwrite(int fd, const void *data, size_t count, int64_t offset)
    int usleep(unsigned int microseconds)
    int64_t lseek(int fd, int64_t offset, int whence)
    enum:
        SEEK_DATA

cdef extern from "<endian.h>" nogil:
    uint32_t be32toh(uint32_t value)
    uint64_t be64toh(uint64_t value)
    uint32_t htobe32(uint32_t value)
    uint64_t htobe64(uint64_t value)


include "blockio/wire.pxi"
include "blockio/request.pxi"
include "blockio/backend.pxi"
include "blockio/server.pxi"
include "blockio/client.pxi"


def run_without_gil(BlockClient client not None, BlockServer server not None) -> int:
    """Drive a client's batch and its server in turns on this thread until the batch is done, without the GIL.

    For measurements: no doorbell is rung, both poll. Returns the packets served; stops early (and returns fewer) when
    anything happens that needs Python.
    """
    cdef uint64_t before = server.packets
    cdef int turn, state, code = SERVE_EMPTY
    if client.stepping or server.serving:
        raise DeviceError("another thread drives the batch or serves the channel")
    server.serving = client.stepping = True
    try:
        ring_mask(&client.incoming.c)
        ring_mask(&server.incoming.c)
        while True:
            with nogil:
                for turn in range(TURNS):
                    state = client._step()
                    if state < 0 or state & (STEP_DONE | STEP_STRAY):
                        break
                    code = server._serve(1 << 16)
                    ring_release(&server.incoming.c)
                    ring_publish(&server.outgoing.c)
                    if code != SERVE_EMPTY:
                        break
            if state < 0 or state & (STEP_DONE | STEP_STRAY) or code != SERVE_EMPTY:
                break
            PyErr_CheckSignals()    # a request that got lost must not keep Ctrl-C from the user
    finally:
        server.serving = client.stepping = False
    return server.packets - before
