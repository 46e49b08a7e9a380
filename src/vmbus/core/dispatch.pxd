"""C interface of event flags, message slots, doorbells and the channel dispatcher."""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from vmbus.core.memory cimport GuestMemory
from vmbus.core.ring cimport RingReader

cdef enum:
    # TLFS 11.10: a SINT's part of the event flags page is 2048 bits
    EVENT_FLAGS_BYTES = 256
    # TLFS 11.8.2: a message slot is a 16-byte header and 240 bytes of payload
    MESSAGE_SLOT_BYTES = 256
    MESSAGE_HEADER_BYTES = 16
    MESSAGE_PAYLOAD_BYTES = 240
    MESSAGE_FLAG_PENDING = 1

cdef int event_flags_take(uint64_t *words, uint32_t *found) noexcept nogil
cdef bint event_flag_set(uint64_t *words, uint32_t flag) noexcept nogil
cdef bint event_flag_clear(uint64_t *words, uint32_t flag) noexcept nogil
cdef bint message_post(uint8_t *slot, uint32_t type, uint64_t sender, const void *payload, uint8_t length) noexcept nogil

cdef class EventFlags:
    cdef uint64_t *words
    cdef uint64_t pfn
    cdef GuestMemory memory
    cdef bint _reachable(self) noexcept

cdef class MessageSlot:
    cdef uint8_t *slot
    cdef GuestMemory memory

cdef class Doorbell:
    cdef readonly int fd
    cdef bint owned
    cdef int waiting        # threads that use the descriptor without the GIL
    cdef int closing        # the descriptor, once closed while they do; else -1
    cdef int _leave(self) except -1
    cdef readonly uint64_t spins_paid
    cdef readonly uint64_t sleeps

cdef class Dispatcher:
    cdef uint64_t *pending
    cdef readonly int flags
    cdef int32_t sleeping
    cdef readonly Doorbell doorbell
    cdef list channels
    cdef readonly uint64_t served
    cdef void mark(self, uint32_t flag) noexcept nogil
    cdef bint _marked(self) noexcept nogil
