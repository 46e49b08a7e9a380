# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Loops without the GIL over the ring's public C functions, and the same copies without a ring.

Compiled when the benchmark runs, against the installed package's `.pxd` files, as anybody's Cython would be.
Payload lengths are ordinary variables: the compiler cannot fold the copies on either side. Payloads take turns, so that
what arrives can be told from what arrived before; they are not changed in the loop, since a byte stored just before
a wide load of it would stall both sides and hide the ring.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from vmbus.core.memory cimport Window
from vmbus.core.ring cimport (DESCRIPTOR_BYTES, PACKET_IN_BAND, ring_advance, ring_packet_bytes, ring_packet_t, ring_peek,
                              ring_publish, ring_reader_init, ring_reader_t, ring_release, ring_write,
                              ring_writer_init, ring_writer_t)

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_MONOTONIC
    int clock_gettime(int clock, timespec *now)

cdef extern from *:
    """
    #define bench_reads_all_memory(p) __asm__ volatile("" : : "r"(p) : "memory")
    """
    void bench_reads_all_memory(void *p) nogil


cdef enum:
    PAYLOADS = 8


cdef uint8_t *payloads_of(uint32_t length) except NULL:
    """Eight payloads, each filled with its number + 1, and room for one more; to be freed."""
    cdef uint8_t *made = <uint8_t *>calloc(PAYLOADS + 1, length)
    cdef uint32_t number
    if made == NULL:
        raise MemoryError
    for number in range(PAYLOADS):
        memset(made + number * length, number + 1, length)
    return made


cdef double seconds_now() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec + now.tv_nsec * 1e-9


def through_ring(Window window, uint32_t length, uint32_t batch, uint64_t batches):
    """Write `batch` packets, publish once, read them all into one buffer, release once; again and again.

    Returns:
        (seconds, sum of the first and last byte of what was read in each batch).
    """
    cdef ring_writer_t writer
    cdef ring_reader_t reader
    cdef ring_packet_t packet
    cdef uint8_t *payloads = payloads_of(length)
    cdef uint8_t *received = payloads + PAYLOADS * length
    cdef uint8_t *payload
    cdef uint64_t done, checksum = 0
    cdef uint32_t number
    cdef double took
    cdef int code = 0
    try:
        if ring_writer_init(&writer, window.base, window.size - 4096) or ring_reader_init(&reader, window.base,
                                                                                          window.size - 4096):
            raise RuntimeError("the window does not hold a ring")
        with nogil:
            took = seconds_now()
            for done in range(batches):
                payload = payloads + (done % PAYLOADS) * length
                for number in range(batch):
                    code = ring_write(&writer, PACKET_IN_BAND, 0, done, payload, length)
                    if code < 0:
                        break
                ring_publish(&writer)
                if code < 0:
                    break
                for number in range(batch):
                    code = ring_peek(&reader, &packet)
                    if code < 0:
                        break
                    memcpy(received, packet.start + packet.offset, packet.length - packet.offset)
                    bench_reads_all_memory(received)
                    ring_advance(&reader, &packet)
                ring_release(&reader)
                if code < 0:
                    break
                checksum += received[0] + received[length - 1]
            took = seconds_now() - took
        if code < 0:
            raise RuntimeError(f"the ring answered {code}")
        return took, checksum
    finally:
        free(payloads)


def copies_only(Window window, uint32_t length, uint32_t batch, uint64_t batches):
    """The copies of `through_ring`, at the same places of the same memory, and nothing else; returns the same."""
    cdef uint8_t *data = <uint8_t *>window.base + 4096
    cdef uint8_t *payloads = payloads_of(length)
    cdef uint8_t *received = payloads + PAYLOADS * length
    cdef uint8_t *payload
    cdef uint64_t done, checksum = 0
    cdef uint32_t number, size = <uint32_t>window.size - 4096, start = 0, at
    cdef uint32_t step = ring_packet_bytes(DESCRIPTOR_BYTES, length)
    cdef double took
    with nogil:
        took = seconds_now()
        for done in range(batches):
            payload = payloads + (done % PAYLOADS) * length
            at = start
            for number in range(batch):
                memcpy(data + at + DESCRIPTOR_BYTES, payload, length)
                bench_reads_all_memory(data)
                at = at + step if at + step < size else at + step - size
            at = start
            for number in range(batch):
                memcpy(received, data + at + DESCRIPTOR_BYTES, length)
                bench_reads_all_memory(received)
                at = at + step if at + step < size else at + step - size
            start = at
            checksum += received[0] + received[length - 1]
        took = seconds_now() - took
    free(payloads)
    return took, checksum
