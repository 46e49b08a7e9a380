"""Copies of payloads, which lie wherever the packets before them end.

The C library's memcpy copies a few KiB and more by REP MOVSB where the processor says that this is fast. On AMD's Zen 4
it is (measured), except when the target lies 1 to 31 bytes further into its page than the source into its own: then it
takes 1.3 times as long as a plain loop, and below 16 bytes some 15 times as long (glibc bug 30994). Packets move through
a ring in steps of 8 bytes, so each page-aligned buffer that is sent meets that sooner or later. `copy_bytes` is memcpy but
for these.

`copy_from_shared` is for what the other side of shared memory wrote and may still change. A compiler takes a copy for
the same value as its source, and may read the source again where the copy is used: then what was checked is not what
counts. After this copy it may not.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize

cdef extern from *:
    """
    #include <stddef.h>
    #include <string.h>
    #if defined(__SSE2__)
    #include <emmintrin.h>
    #include <stdint.h>
    #define VMBUS_REP_MOVSB_LEAST 2048 /* the C library's own limit */
    static __attribute__((noinline, unused)) void vmbus_copy_loop(char *to, const char *from, size_t length)
    {
        for (; length >= 64; length -= 64, from += 64, to += 64) {
            __m128i a, b, c, d;
            __asm__("" : "+r"(from)); /* or compilers see through the loop and call memcpy */
            a = _mm_loadu_si128((const __m128i *)from);
            b = _mm_loadu_si128((const __m128i *)(from + 16));
            c = _mm_loadu_si128((const __m128i *)(from + 32));
            d = _mm_loadu_si128((const __m128i *)(from + 48));
            _mm_storeu_si128((__m128i *)to, a);
            _mm_storeu_si128((__m128i *)(to + 16), b);
            _mm_storeu_si128((__m128i *)(to + 32), c);
            _mm_storeu_si128((__m128i *)(to + 48), d);
        }
        memcpy(to, from, length);
    }
    static inline __attribute__((unused)) void vmbus_copy_bytes(void *to, const void *from, size_t length)
    {
        if (length >= VMBUS_REP_MOVSB_LEAST && (((uintptr_t)to - (uintptr_t)from - 1) & 4095) < 31)
            vmbus_copy_loop((char *)to, (const char *)from, length);
        else
            memcpy(to, from, length);
    }
    #else
    #define vmbus_copy_bytes memcpy
    #endif
    /* The barrier reads the copy and changes any memory, as far as the compiler knows: so the copy is whole before it,
       and nothing behind it can come from the source. */
    static inline __attribute__((unused)) void vmbus_copy_from_shared(void *to, const void *from, size_t length)
    {
        vmbus_copy_bytes(to, from, length);
        __asm__ __volatile__("" : : "r"(to) : "memory");
    }
    """
    void copy_from_shared "vmbus_copy_from_shared"(void *to, const void *source, size_t length) noexcept nogil
    void copy_bytes "vmbus_copy_bytes"(void *to, const void *source, size_t length) noexcept nogil


cdef inline bytes bytes_at(const void *source, Py_ssize_t length):
    """A new `bytes` of what is there now."""
    cdef bytes made = PyBytes_FromStringAndSize(NULL, length)
    copy_from_shared(PyBytes_AS_STRING(made), source, length)
    return made
