# cython: language_level=3
"""Somebody else's extension module: cimports the installed ring and works on it without the GIL."""

from libc.stdint cimport uint64_t
from libc.string cimport memcpy

from vmbus.core.memory cimport Window
from vmbus.core.ring cimport (PACKET_IN_BAND, RING_EMPTY, RING_FULL, RingReader, RingWriter, ring_advance, ring_packet_t,
                              ring_peek, ring_publish, ring_reader_init, ring_reader_t, ring_release, ring_write,
                              ring_writer_init, ring_writer_t)


def pump(Window window not None, uint64_t count):
    """Fill the ring, drain it, until `count` numbers went through.

    Returns:
        (sum of the numbers received, how often the reader had to be signalled, packets of the fullest ring).
    """
    cdef ring_writer_t writer
    cdef ring_reader_t reader
    cdef ring_packet_t packet
    cdef uint64_t sent = 0, received = 0, number = 0, total = 0, signals = 0, fullest = 0
    cdef int code = ring_writer_init(&writer, window.base, window.size - 4096)
    code = code or ring_reader_init(&reader, window.base, window.size - 4096)
    with nogil:
        while code >= 0 and received < count:
            while sent < count:
                code = ring_write(&writer, PACKET_IN_BAND, 0, sent, &sent, sizeof(sent))
                if code < 0:
                    break
                sent += 1
            if code < 0 and code != RING_FULL:
                break
            signals += ring_publish(&writer)
            if sent - received > fullest:
                fullest = sent - received
            while True:
                code = ring_peek(&reader, &packet)
                if code < 0:
                    break
                memcpy(&number, packet.start + packet.offset, sizeof(number))
                total += number
                received += number == packet.transaction_id
                ring_advance(&reader, &packet)
            if code == RING_EMPTY:
                code = 0
            ring_release(&reader)
    if code < 0:
        raise RuntimeError(f"the ring answered {code}")
    return total, signals, fullest


def write_numbers(RingWriter writer not None, int count):
    """Write numbers through the C side of an existing `RingWriter`; returns whether the reader wants a signal."""
    cdef uint64_t number
    cdef int code = 0
    with nogil:
        for number in range(<uint64_t>count):
            code = ring_write(&writer.c, PACKET_IN_BAND, 0, number, &number, sizeof(number))
            if code < 0:
                break
        if code >= 0:
            code = ring_publish(&writer.c)
    if code < 0:
        raise RuntimeError(f"the ring answered {code}")
    return bool(code)


def count_packets(RingReader reader not None):
    """Step over all packets of an existing `RingReader` and give their space back."""
    cdef ring_packet_t packet
    cdef int count = 0
    with nogil:
        while ring_peek(&reader.c, &packet) == 0:
            ring_advance(&reader.c, &packet)
            count += 1
        ring_release(&reader.c)
    return count
