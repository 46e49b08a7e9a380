"""From a peer's signal to a handled batch of packets: event flags, message slots, doorbells, the dispatcher.

`EventFlags` and `MessageSlot` are a virtual processor's SynIC pages in guest memory, seen from either side. A
`Doorbell` is an eventfd with a wait that first spins for a moment on the ring's index, because waking a sleeping thread
costs a hundred times what a poll does. A `Dispatcher` collects the signals of many channels in one bitmap and
serves each signalled channel in batches; a channel that fails is taken out, the others go on.
"""

cimport cython
from cpython.buffer cimport PyBUF_CONTIG_RO, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EBADF, EINTR, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from vmbus.core.atomic cimport (cpu_pause, exchange32, exchange64, fetch_and64, fetch_or8, fetch_or64, load_acquire32,
                                load_acquire64, load_relaxed32, load_relaxed64, store_relaxed32, store_release32)
from vmbus.core.copy cimport bytes_at, copy_from_shared
from vmbus.core.memory cimport ACCESS_READ, ACCESS_WRITE, GuestMemory
from vmbus.core.ring cimport CONTROL_WRITE_INDEX, RingReader, ring_mask, ring_unmask

import logging
import os
from collections import namedtuple

from vmbus.errors import RingCorrupt

cdef extern from "<sys/eventfd.h>" nogil:
    enum:
        EFD_CLOEXEC
        EFD_NONBLOCK
    int eventfd(unsigned int value, int flags)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    enum:
        POLLIN
    int poll(pollfd *fds, unsigned long count, int timeout)

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void *buffer, size_t count)
    ssize_t write(int fd, const void *buffer, size_t count)
    int close_fd "close"(int fd)

cdef extern from *:
    int __builtin_ctzll(unsigned long long value) noexcept nogil

cdef enum:
    FLAGS_PER_SINT = 2048
    ROUNDS = 8                  # batches of one channel before the others get their turn
    SPIN_TURN = 20000000        # nanoseconds of spinning after which signals (Ctrl-C) are looked at

EVENT_FLAGS = <int>FLAGS_PER_SINT
MESSAGE_PAYLOAD = <int>MESSAGE_PAYLOAD_BYTES

_log = logging.getLogger(__name__)

Message = namedtuple("Message", "type sender payload")
Message.__doc__ = "A SynIC message: its type, the sender's port or connection id, and up to 240 bytes."


cdef bint event_flag_set(uint64_t *words, uint32_t flag) noexcept nogil:
    """Set a flag; true if it was clear, so that the receiver needs an interrupt."""
    cdef uint64_t bit = <uint64_t>1 << (flag & 63)
    return (fetch_or64(&words[flag >> 6], bit) & bit) == 0


cdef bint event_flag_clear(uint64_t *words, uint32_t flag) noexcept nogil:
    """Clear a flag; true if it was set."""
    cdef uint64_t bit = <uint64_t>1 << (flag & 63)
    return (fetch_and64(&words[flag >> 6], ~bit) & bit) != 0


cdef int event_flags_take(uint64_t *words, uint32_t *found) noexcept nogil:
    """Clear all flags of one SINT; their numbers go to `found` (room for 2048). Returns how many were set."""
    cdef int index, count = 0
    cdef uint64_t bits
    for index in range(FLAGS_PER_SINT // 64):
        if load_relaxed64(&words[index]):
            bits = exchange64(&words[index], 0)
            while bits:
                found[count] = index * 64 + __builtin_ctzll(bits)
                count += 1
                bits &= bits - 1
    return count


cdef bint message_post(uint8_t *slot, uint32_t type, uint64_t sender, const void *payload, uint8_t length) noexcept nogil:
    """Put a message in an empty slot; false, with message-pending set, if the guest has not emptied it yet."""
    if load_acquire32(slot):
        fetch_or8(slot + 5, MESSAGE_FLAG_PENDING)
        # The guest may have emptied it just before it could see the flag; then nobody would say end-of-message.
        if load_acquire32(slot):
            return False
    memset(slot + 4, 0, MESSAGE_SLOT_BYTES - 4)
    slot[4] = length
    memcpy(slot + 8, &sender, 8)
    memcpy(slot + MESSAGE_HEADER_BYTES, payload, length)
    store_release32(slot, type)     # last: it is what the guest polls
    return True


@cython.no_gc_clear     # the destructor needs what it refers to: cleared references are None, not memory
cdef class EventFlags:
    """EventFlags(memory, page_gpa, sint)\n--\n\nThe 2048 event flags of one SINT, in a guest's event flags page (TLFS 11.10).

    While the page cannot be written - it was taken from the guest, or made read-only - no flag is set or found.

    Args:
        memory: the guest's memory.
        page_gpa: guest physical address of the page (SIEFP MSR).
        sint: 0 to 15.

    Raises:
        GuestMemoryError: the page is not the guest's.
        ValueError: the SINT or the address is wrong.
    """

    def __cinit__(self, GuestMemory memory not None, unsigned long long page_gpa, int sint):
        if not 0 <= sint < 16 or page_gpa % 4096:
            raise ValueError(f"SINT {sint} of an event flags page at {page_gpa:#x}")
        self.words = <uint64_t *>(memory.pointer(page_gpa, 4096, ACCESS_READ | ACCESS_WRITE) + sint * EVENT_FLAGS_BYTES)
        self.pfn = page_gpa >> 12
        self.memory = memory
        memory.exports += 1

    def __dealloc__(self):
        if self.memory is not None:
            self.memory.exports -= 1

    cdef bint _reachable(self) noexcept:
        cdef uint32_t access = self.memory.c.pages[self.pfn].access
        return access & ACCESS_READ and access & ACCESS_WRITE

    def set(self, int flag) -> bool:
        """Set a flag, atomically.

        Returns:
            True if it was clear: the receiver needs an interrupt.

        Raises:
            ValueError: there is no such flag.
        """
        if not 0 <= flag < FLAGS_PER_SINT:
            raise ValueError(f"event flag {flag}: there are {FLAGS_PER_SINT}")
        return self._reachable() and event_flag_set(self.words, flag)

    def clear(self, int flag) -> bool:
        """Clear a flag, atomically.

        Returns:
            True if it was set.

        Raises:
            ValueError: there is no such flag.
        """
        if not 0 <= flag < FLAGS_PER_SINT:
            raise ValueError(f"event flag {flag}: there are {FLAGS_PER_SINT}")
        return self._reachable() and event_flag_clear(self.words, flag)

    def take(self) -> list:
        """Clear all flags, each word atomically, and return the numbers of those that were set."""
        cdef uint32_t found[FLAGS_PER_SINT]
        cdef int index, count = event_flags_take(self.words, found) if self._reachable() else 0
        return [found[index] for index in range(count)]


@cython.no_gc_clear     # the destructor needs what it refers to: cleared references are None, not memory
cdef class MessageSlot:
    """MessageSlot(memory, page_gpa, sint)\n--\n\nOne SINT's slot in a guest's message page (TLFS 11.8), used by the hypervisor (`post`) or the guest.

    Args:
        memory: the guest's memory.
        page_gpa: guest physical address of the page (SIMP MSR).
        sint: 0 to 15.

    Raises:
        GuestMemoryError: the page is not the guest's.
        ValueError: the SINT or the address is wrong.
    """

    def __cinit__(self, GuestMemory memory not None, unsigned long long page_gpa, int sint):
        if not 0 <= sint < 16 or page_gpa % 4096:
            raise ValueError(f"SINT {sint} of a message page at {page_gpa:#x}")
        self.slot = memory.pointer(page_gpa, 4096, ACCESS_READ | ACCESS_WRITE) + sint * MESSAGE_SLOT_BYTES
        self.memory = memory
        memory.exports += 1

    def __dealloc__(self):
        if self.memory is not None:
            self.memory.exports -= 1

    def post(self, uint32_t type, unsigned long long sender, payload) -> bool:
        """Deliver a message.

        Returns:
            False if the slot is taken; message-pending is set, so the guest will write end-of-message.

        Raises:
            ValueError: more than 240 bytes, or type 0, which means an empty slot.
        """
        cdef Py_buffer view
        cdef bint posted
        PyObject_GetBuffer(payload, &view, PyBUF_CONTIG_RO)
        try:
            if view.len > MESSAGE_PAYLOAD_BYTES or type == 0:
                raise ValueError(f"a message of type {type} with {view.len} bytes")
            posted = message_post(self.slot, type, sender, view.buf, <uint8_t>view.len)
        finally:
            PyBuffer_Release(&view)
        return posted

    def take(self) -> "Message | None":
        """The guest's side: the message in the slot, which stays taken until `end`; None if it is empty."""
        cdef uint32_t type = load_acquire32(self.slot)
        cdef uint64_t sender
        cdef uint8_t header[MESSAGE_HEADER_BYTES]
        if type == 0:
            return None
        copy_from_shared(header, self.slot, sizeof(header))
        memcpy(&sender, header + 8, 8)
        return Message(type, sender, bytes_at(self.slot + MESSAGE_HEADER_BYTES, min(header[4], MESSAGE_PAYLOAD_BYTES)))

    def end(self) -> bool:
        """The guest's side: empty the slot.

        Returns:
            True if another message waits: the guest must write the end-of-message MSR.
        """
        exchange32(self.slot, 0)
        return self.slot[5] & MESSAGE_FLAG_PENDING


cdef int64_t _now() noexcept nogil:
    """Nanoseconds of the monotonic clock."""
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec * 1000000000 + t.tv_nsec


cdef int64_t _nanoseconds(object seconds) except? -1:
    return <int64_t>(<double>seconds * 1e9)


cdef int _sleep(Doorbell doorbell, int64_t deadline) except -2:
    """Wait without the GIL for a ring and take it; 0 once the deadline (-1: none) has passed."""
    if doorbell.fd < 0:
        raise OSError(EBADF, "the doorbell is closed")
    doorbell.waiting += 1
    try:
        return _wait_for(doorbell.fd, deadline)
    finally:
        doorbell.waiting -= 1
        doorbell._leave()


cdef int _wait_for(int fd, int64_t deadline) except -2:
    cdef pollfd waiting
    cdef uint64_t count
    cdef int64_t left
    cdef int ready
    while True:
        waiting.fd = fd
        waiting.events = POLLIN
        waiting.revents = 0
        left = -1
        if deadline >= 0:
            left = deadline - _now()
            left = 0 if left < 0 else (left + 999999) // 1000000
            if left > 0x7fffffff:
                left = 0x7fffffff
        with nogil:
            ready = poll(&waiting, 1, <int>left)
            if ready > 0:
                read(fd, &count, 8)
        if ready > 0:
            return 1
        if ready < 0:
            if errno != EINTR:
                raise OSError(errno, os.strerror(errno))
            PyErr_CheckSignals()
        elif deadline >= 0 and _now() >= deadline:
            return 0


cdef inline int64_t _turn_end(int64_t end) noexcept nogil:
    """When to look at signals while spinning until `end`."""
    cdef int64_t turn = _now() + SPIN_TURN
    return turn if turn < end else end


cdef inline bint _taken(int fd) noexcept nogil:
    cdef uint64_t count
    return read(fd, &count, 8) == 8


cdef class Doorbell:
    """Doorbell(fd=-1)\n--\n\nAn eventfd that one side rings and the other waits for.

    Args:
        fd: use this descriptor, which the caller keeps open and closes; -1 makes a new one.

    Raises:
        ValueError: `fd` cannot be a descriptor.
        OSError: the process can have no more.

    Attributes:
        fd: the descriptor: non-blocking, readable while rung.
        spins_paid: waits that ended while still spinning.
        sleeps: waits that went to sleep.
    """

    def __cinit__(self, fd=-1):
        self.closing = self.fd = -1
        if not -1 <= fd <= 0x7fffffff:
            raise ValueError(f"{fd} is no descriptor")
        self.owned = fd < 0
        self.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK) if fd < 0 else fd
        if self.fd < 0:
            raise OSError(errno, os.strerror(errno))

    def __dealloc__(self):
        if self.owned and self.fd >= 0:
            close_fd(self.fd)

    def __repr__(self):
        return f"<Doorbell on descriptor {self.fd}>" if self.fd >= 0 else "<Doorbell, closed>"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def ring(self) -> None:
        """Wake the other side, now or when it next waits."""
        cdef uint64_t one = 1
        if write(self.fd, &one, 8) < 0 and errno != EAGAIN:     # EAGAIN: rung 2**64 - 2 times; it is awake enough
            raise OSError(errno, os.strerror(errno))

    def clear(self) -> bool:
        """Take the rings so far; True if there were any."""
        return _taken(self.fd)

    def wait(self, timeout=None, double spin=0.0, RingReader reader=None) -> bool:
        """Wait for a ring of the doorbell or, given a reader, for a packet.

        With a reader its interrupt mask is handled here: the peer is asked for no signals while this side spins, and
        for signals before it sleeps. After a wait that ended while spinning the ring stays masked, which saves the
        peer its signals until the next wait.

        Args:
            timeout: seconds; None waits for ever.
            spin: seconds to poll before sleeping. Worth it where the peer runs on another processor.
            reader: the ring that the doorbell belongs to.

        Returns:
            False if the time ran out.

        Raises:
            OSError: the descriptor is not usable.
        """
        cdef int64_t start = _now(), deadline = -1, spin_end = start + <int64_t>(spin * 1e9)
        if timeout is not None:
            deadline = start + _nanoseconds(timeout)
            if spin_end > deadline:
                spin_end = deadline
        cdef bint found = False
        cdef int64_t turn_end
        cdef int fd
        if reader is None:
            if self.clear():
                return True
            fd = self.fd
            self.waiting += 1
            try:
                while not found and _now() < spin_end:
                    turn_end = _turn_end(spin_end)
                    with nogil:
                        while not found and _now() < turn_end:
                            found = _taken(fd)
                    PyErr_CheckSignals()
            finally:
                self.waiting -= 1
                self._leave()
            if found:
                self.spins_paid += 1
                return True
            self.sleeps += 1
            return _sleep(self, deadline) != 0
        while True:
            ring_mask(&reader.c)
            while True:
                turn_end = _turn_end(spin_end)
                with nogil:
                    found = _spin(reader, turn_end)
                if found or turn_end == spin_end:
                    break
                PyErr_CheckSignals()
            if found:
                self.spins_paid += 1
                return True
            if ring_unmask(&reader.c):
                return True
            self.sleeps += 1
            if not _sleep(self, deadline):
                return _has_packet(reader)
            if _has_packet(reader):
                return True
            # A ring for something else, or left over from a packet that was polled: wait on.

    def close(self) -> None:
        """Close the descriptor, if it is the doorbell's own.

        A wait under way in another thread ends as if rung; one for a packet of a ring, with OSError.
        """
        if self.owned and self.fd >= 0:
            self.closing = self.fd
        self.fd = -1
        self._leave()

    cdef int _leave(self) except -1:
        """Close a closed doorbell's descriptor when its last user has left.

        Not before: its number would soon be another file's, from which a waiting thread would then read.
        """
        cdef uint64_t one = 1
        if self.closing >= 0:
            if self.waiting:
                write(self.closing, &one, 8)    # each that leaves wakes the next
            else:
                close_fd(self.closing)
                self.closing = -1
        return 0


cdef inline bint _has_packet(RingReader reader) noexcept nogil:
    return load_acquire32(reader.c.control + CONTROL_WRITE_INDEX) != reader.c.read


cdef bint _spin(RingReader reader, int64_t end) noexcept nogil:
    cdef int turn
    while True:
        for turn in range(64):
            if _has_packet(reader):
                return True
            cpu_pause()
        if _now() >= end:
            return False


@cython.final
cdef class _Channel:
    """What the dispatcher knows of one channel."""

    cdef RingReader reader
    cdef object handler
    cdef object on_error
    cdef Py_ssize_t batch


cdef class Dispatcher:
    """Dispatcher(flags=2048)\n--\n\nServes many channels from one thread.

    Peers mark a channel with `signal`, from any thread; `poll` serves all marked channels in batches and `wait` sleeps
    until one is marked.

    Args:
        flags: how many channels; they are numbered from 0.

    Raises:
        ValueError: none, or more than 2**20.
        OSError: the process can have no more descriptors.

    Attributes:
        doorbell: rung by `signal` while `wait` sleeps.
        served: packets handled so far.
    """

    def __cinit__(self, flags=FLAGS_PER_SINT):
        if not 0 < flags <= 1 << 20:
            raise ValueError(f"a dispatcher of {flags} channels")
        self.flags = flags
        self.pending = <uint64_t *>calloc((flags + 63) // 64, 8)
        if self.pending == NULL:
            raise MemoryError()
        self.doorbell = Doorbell()
        self.channels = [None] * flags

    def __dealloc__(self):
        free(self.pending)

    def __repr__(self):
        used = sum(1 for channel in self.channels if channel is not None)
        return f"<Dispatcher of {used} channels: {self.served} packets served>"

    def add(self, int flag, RingReader reader not None, handler, *, Py_ssize_t batch=64, on_error=None) -> None:
        """Serve a channel: `handler` gets lists of packets, in order.

        Args:
            flag: the channel's number.
            reader: its incoming ring; only the dispatcher reads it from now on.
            handler: called with 1 to `batch` packets, on the thread that calls `poll`.
            batch: packets a call, at most.
            on_error: called with the exception when the ring is corrupt or the handler raises; the channel has
                been removed then. Without it the exception is logged.

        Raises:
            ValueError: no such number, or it is taken.
        """
        if not 0 <= flag < self.flags or self.channels[flag] is not None:
            raise ValueError(f"channel {flag} is taken or not below {self.flags}")
        if batch < 1:
            raise ValueError(f"a batch of {batch} packets")
        cdef _Channel channel = _Channel.__new__(_Channel)
        channel.reader = reader
        channel.handler = handler
        channel.on_error = on_error
        channel.batch = batch
        self.channels[flag] = channel
        self.mark(flag)     # packets may be there already

    def remove(self, int flag) -> None:
        """Serve a channel no longer; unknown numbers are ignored."""
        if 0 <= flag < self.flags:
            self.channels[flag] = None

    cdef void mark(self, uint32_t flag) noexcept nogil:
        cdef uint64_t one = 1
        fetch_or64(&self.pending[flag >> 6], <uint64_t>1 << (flag & 63))
        if load_relaxed32(&self.sleeping) and exchange32(&self.sleeping, 0):
            write(self.doorbell.fd, &one, 8)

    def signal(self, int flag) -> None:
        """Mark a channel; wakes a sleeping `wait`. A number that does not exist is ignored: it is the peer's."""
        if 0 <= flag < self.flags:
            self.mark(flag)

    def poll(self) -> int:
        """Serve every channel that is marked now, once.

        Returns:
            the number of packets handled.
        """
        cdef int index, flag
        cdef uint64_t bits
        cdef Py_ssize_t count = 0
        for index in range((self.flags + 63) // 64):
            if load_relaxed64(&self.pending[index]) == 0:
                continue
            bits = exchange64(&self.pending[index], 0)
            while bits:
                flag = index * 64 + __builtin_ctzll(bits)
                bits &= bits - 1
                channel = self.channels[flag]
                if channel is not None:
                    try:
                        count += self._serve(flag, channel)
                    except BaseException:
                        # Ctrl-C in a handler, or an `on_error` that fails: the others' signals are not lost.
                        fetch_or64(&self.pending[index], bits)
                        self.served += count
                        raise
        self.served += count
        return count

    def _serve(self, int flag, _Channel channel not None) -> int:
        cdef Py_ssize_t count = 0
        cdef int turn
        ring_mask(&channel.reader.c)
        try:
            for turn in range(ROUNDS):
                packets = channel.reader.recv_packets(channel.batch)
                if not packets:
                    break
                count += len(packets)
                channel.handler(packets)
                if self.channels[flag] is not channel:
                    return count
            else:
                self.mark(flag)     # more may be there; let the others have their turn
                return count
            if ring_unmask(&channel.reader.c):
                self.mark(flag)
        except Exception as error:
            # A bad peer, or a bad handler, costs its own channel and nothing else.
            if self.channels[flag] is channel:
                self.channels[flag] = None
            if channel.on_error is None:
                _log.exception("channel %d was removed", flag)
            else:
                channel.on_error(error)
        except BaseException:
            # The caller is interrupted (Ctrl-C), which is nobody's fault here: the channel goes on with the next poll.
            self.mark(flag)
            raise
        return count

    cdef bint _marked(self) noexcept nogil:
        cdef int index
        for index in range((self.flags + 63) // 64):
            if load_acquire64(&self.pending[index]):
                return True
        return False

    def wait(self, timeout=None, double spin=0.0) -> bool:
        """Wait until a channel is marked: poll for `spin` seconds, then sleep.

        Args:
            timeout: seconds; None waits for ever.
            spin: seconds to poll before sleeping.

        Returns:
            False if the time ran out.
        """
        cdef int64_t start = _now(), deadline = -1, spin_end = start + <int64_t>(spin * 1e9)
        cdef int64_t turn_end
        cdef bint marked = False
        if timeout is not None:
            deadline = start + _nanoseconds(timeout)
            if spin_end > deadline:
                spin_end = deadline
        while True:
            turn_end = _turn_end(spin_end)
            with nogil:
                while True:
                    marked = self._marked()
                    if marked or _now() >= turn_end:
                        break
                    cpu_pause()
            if marked or turn_end == spin_end:
                break
            PyErr_CheckSignals()
        if marked:
            self.doorbell.spins_paid += 1
            return True
        while True:
            exchange32(&self.sleeping, 1)
            if self._marked():
                store_relaxed32(&self.sleeping, 0)
                return True
            self.doorbell.sleeps += 1
            if not _sleep(self.doorbell, deadline):
                store_relaxed32(&self.sleeping, 0)
                return self._marked()
            if self._marked():
                return True
