"""Guest physical memory on a memfd, and the ways into it.

A `GuestMemory` is one guest physical address space: pages of memfds mapped at one contiguous host address,
with an access right per page. Everything a peer names by guest physical address goes through it; an address
outside it, or a page mapped without the right, is a `GuestMemoryError`, never a fault.

A `Window` maps pages given by a scattered list of page frame numbers as one flat range of host addresses. For
a ring the pages after the first, the data area, are mapped twice in a row, so that a packet never wraps.

`GpaRanges` are the guest buffers that a GPA-direct packet names. They are copied out of the ring once, checked,
and then become iovecs: disk I/O runs between the host's file and the guest's pages without a copy.
"""

cimport cython
from cpython.buffer cimport PyBUF_CONTIG_RO, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINTR, ENOMEM, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

import fcntl as fcntl_module
import os
from array import array as _array
from collections import namedtuple

from vmbus.core.copy cimport bytes_at, copy_bytes

from vmbus.sizes import byte_count
from vmbus.errors import GuestMemoryError, RingCorrupt

cdef extern from "<sys/mman.h>" nogil:
    enum:
        PROT_NONE
        PROT_READ
        PROT_WRITE
        MAP_SHARED
        MAP_PRIVATE
        MAP_ANONYMOUS
        MAP_NORESERVE
        MAP_FIXED
        MFD_CLOEXEC
        MFD_ALLOW_SEALING
    void *MAP_FAILED
    void *mmap(void *address, size_t length, int protection, int flags, int fd, int64_t offset)
    int munmap(void *address, size_t length)
    int memfd_create(const char *name, unsigned int flags)

cdef extern from "<fcntl.h>" nogil:
    enum:
        F_ADD_SEALS
        F_SEAL_SHRINK
        F_SEAL_GROW
        F_SEAL_SEAL
    int fcntl(int fd, int command, ...)

cdef extern from "<unistd.h>" nogil:
    int ftruncate(int fd, int64_t length)
    int close_fd "close"(int fd)

cdef extern from "<sys/uio.h>" nogil:
    ssize_t preadv(int fd, const iovec *vectors, int count, int64_t offset)
    ssize_t pwritev(int fd, const iovec *vectors, int count, int64_t offset)

cdef enum:
    MOST_VECTORS = 64           # iovecs a system call; more pages take more calls
    MOST_WINDOW_PAGES = 1 << 19

cdef uint64_t MOST_MEMORY = <uint64_t>1 << 46
cdef object MOST_ADDRESS = 1 << 64

Buffer = bytes | bytearray | memoryview     # and numpy arrays: for annotations, see the stub
PAGE_SIZE = <int>PAGE_BYTES
READ = <int>ACCESS_READ
WRITE = <int>ACCESS_WRITE
EXECUTE = <int>ACCESS_EXECUTE

GpaRange = namedtuple("GpaRange", "byte_count byte_offset pfns")
GpaRange.__doc__ = "One guest buffer: `byte_count` bytes from `byte_offset` (below 4096) of the first of its pages."


cdef object _os_error(str what):
    cdef int code = errno
    return OSError(code, f"{what}: {os.strerror(code)}")


cdef uint8_t *_reserve(size_t length) noexcept nogil:
    """Address space for `length` bytes, between two pages that nobody may touch; NULL if there is none.

    Without those, the kernel likes to put mappings side by side, and an overrun would hit another partition or ring.
    """
    cdef void *start = mmap(NULL, length + 2 * PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    return NULL if start == MAP_FAILED else <uint8_t *>start + PAGE_BYTES


cdef void _give_back(uint8_t *base, size_t length) noexcept nogil:
    """Undo `_reserve`, with whatever was mapped there."""
    munmap(base - PAGE_BYTES, length + 2 * PAGE_BYTES)


include "memory/space.pxi"
include "memory/window.pxi"
include "memory/ranges.pxi"
