"""The hot path of the network: plain Ethernet frames between rings, buffers and the switch, in batches.

*Plain* is what most packets are: RNDIS packet messages in a send-buffer section without per-packet information that
would need work, transfer pages, frames without a tag. Whatever is not plain is left where it is and reported as
`SLOW`: `vmbus.network` then does that one packet or frame in Python and calls again, so nothing is reordered and
nothing is implemented twice but the plain case. The Python implementation is the oracle of the tests.

Rings and buffers are shared with a hostile peer. A descriptor or header is copied once, checked, and only the copy
counts; frame data is copied once, to where it goes.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_GET_SIZE
from cpython.list cimport PyList_Append, PyList_GET_ITEM, PyList_GET_SIZE
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from vmbus.core.copy cimport bytes_at, copy_bytes, copy_from_shared
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
    INFO_HASH_INFO = 9
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


cdef enum:
    LARGE_BLOCK = 4 << 20

cdef bint heap_is_kept = False


cdef void _keep_heap() noexcept:
    """Make glibc's allocator keep what a batch of frames leaves, from the first adapter of the process on.

    Frames come and go in batches of some 100 KiB. With its first settings the allocator gives the end of the heap back
    to the kernel each time that nothing happens to lie behind it, and every page of the next batch is a fault: 1500-byte
    frames took nearly three times as long. It adapts to programs that have freed a large block once, and keeps up to
    twice as much from then on (mallopt(3), M_MMAP_THRESHOLD) - unless the user has set a threshold, which then stays.
    By Python's functions, because a compiler leaves out malloc and free of what nobody uses.
    """
    global heap_is_kept
    if not heap_is_kept:
        heap_is_kept = True
        PyMem_RawFree(PyMem_RawMalloc(LARGE_BLOCK))


include "netio/sections.pxi"
include "netio/host.pxi"
include "netio/guest.pxi"
