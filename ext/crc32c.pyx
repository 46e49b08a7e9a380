"""CRC-32C (Castagnoli), the checksum of every VHDX structure (MS-VHDX 2.2, RFC 3720 appendix B.4)."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef enum:
    POLYNOMIAL = 0x82F63B78  # 0x1EDC6F41 reflected

cdef uint32_t table[8][256]


cdef void fill_tables() noexcept nogil:
    cdef uint32_t value
    cdef int i, bit, k
    for i in range(256):
        value = i
        for bit in range(8):
            value = (value >> 1) ^ (POLYNOMIAL & -(value & 1))
        table[0][i] = value
    for i in range(256):
        for k in range(1, 8):
            table[k][i] = (table[k - 1][i] >> 8) ^ table[0][table[k - 1][i] & 0xFF]


cdef uint32_t update(uint32_t crc, const uint8_t *data, size_t length) noexcept nogil:
    cdef uint64_t word
    while length >= 8:  # eight table look-ups a step; little-endian hosts only, as the rest of ext/
        memcpy(&word, data, 8)
        word ^= crc
        crc = (
            table[7][word & 0xFF] ^ table[6][(word >> 8) & 0xFF]
            ^ table[5][(word >> 16) & 0xFF] ^ table[4][(word >> 24) & 0xFF]
            ^ table[3][(word >> 32) & 0xFF] ^ table[2][(word >> 40) & 0xFF]
            ^ table[1][(word >> 48) & 0xFF] ^ table[0][word >> 56]
        )
        data += 8
        length -= 8
    while length:
        crc = (crc >> 8) ^ table[0][(crc ^ data[0]) & 0xFF]
        data += 1
        length -= 1
    return crc


fill_tables()


def crc32c(data, uint32_t value=0):
    """The CRC-32C of `data` (any contiguous buffer), continued from the checksum `value` of what came before."""
    cdef Py_buffer view
    cdef uint32_t crc
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            crc = ~update(~value, <const uint8_t *> view.buf, <size_t> view.len)
    finally:
        PyBuffer_Release(&view)
    return crc
