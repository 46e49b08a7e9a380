"""The switch's table of addresses, and the sorting of plain frames by the port that they go to.

Frames that are not plain - tagged, multicast, from or to addresses that are not known - are left to
`vmbus.network.switch`, which does one in Python and calls again, so that nothing is reordered.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_GET_SIZE
from cpython.list cimport PyList_Append, PyList_GET_ITEM, PyList_GET_SIZE
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

import random

cdef enum:
    ETHERNET = 14

cdef uint64_t ADDRESS_MASK = <uint64_t>0xffffffff << 16 | 0xffff


cdef inline uint64_t _address(const uint8_t *at) noexcept nogil:
    """A MAC address as a number, the first byte the highest."""
    return (<uint64_t>at[0] << 40 | <uint64_t>at[1] << 32 | <uint64_t>at[2] << 24 | <uint64_t>at[3] << 16
            | <uint64_t>at[4] << 8 | at[5])


cdef struct entry_t:
    uint64_t key        # VLAN and address; 0 is free: the zero address is never learned
    double seen
    int32_t port


cdef enum:
    MOST_PORTS = 4096


@cython.final
cdef class MacTable:
    """Which port of a switch an address was last seen on, by (VLAN, address), bounded and ageing.

    When the table or a port's share of it is full, further addresses are not learned and frames to them are flooded:
    a guest that invents addresses costs bandwidth, never memory, and cannot push others out.

    Args:
        max_age: seconds after which an address is forgotten (300 is IEEE 802.1D's default).
        capacity: addresses in all.
        per_port: addresses of one port.
    """

    cdef readonly double max_age
    cdef readonly int capacity
    cdef readonly int per_port
    cdef entry_t *entries_
    cdef uint32_t mask
    cdef uint64_t seed
    cdef int used
    cdef int share[MOST_PORTS]
    cdef int32_t vlan[MOST_PORTS]       # of a port that gets untagged frames of one VLAN; -1 for others
    cdef uint32_t limit[MOST_PORTS]     # longest frame
    cdef uint64_t frames[MOST_PORTS]    # forwarded since `collect`
    cdef uint64_t octets[MOST_PORTS]
    cdef int32_t touched[MOST_PORTS]
    cdef int touched_count

    def __cinit__(self, *, double max_age=300.0, int capacity=8192, int per_port=1024):
        cdef uint32_t size = 16
        cdef int index
        if not 0 < capacity <= 1 << 20:
            raise ValueError(f"a table of {capacity} addresses")
        while size < 2 * <uint32_t>capacity:
            size *= 2
        self.max_age = max_age
        self.capacity = capacity
        self.per_port = per_port
        self.entries_ = <entry_t *>calloc(size, sizeof(entry_t))
        if self.entries_ == NULL:
            raise MemoryError
        self.mask = size - 1
        self.seed = random.getrandbits(64) | 1      # nobody can aim at one slot
        for index in range(MOST_PORTS):
            self.vlan[index] = -1

    def __dealloc__(self):
        free(self.entries_)

    def __len__(self):
        return self.used

    def set_port(self, int port, int vlan, uint32_t limit) -> None:
        """What `plan` may send to a port: untagged frames of `vlan` (-1: nothing) up to `limit` bytes."""
        if not 0 <= port < MOST_PORTS:
            raise ValueError(f"port {port}")
        self.vlan[port] = vlan
        self.limit[port] = limit

    def learn(self, int vlan, bytes address not None, int port, double now) -> bool:
        """Note that `address` was seen on `port`; False if there was no room."""
        return self._learn(_key(vlan, address), port, now)

    def find(self, int vlan, bytes address not None, double now) -> int:
        """The port of an address; -1 if it is unknown or has not been seen for `max_age`."""
        return self._find(_key(vlan, address), now)

    def age(self, double now) -> int:
        """Remove all entries that are too old; how many."""
        return self._remove_if(-1, now)

    def forget(self, int port) -> None:
        """Remove all entries of a port."""
        self._remove_if(port, 0)

    def entries(self) -> list:
        """(VLAN, address, port, last seen) of all entries."""
        cdef uint32_t slot
        result = []
        for slot in range(self.mask + 1):
            if self.entries_[slot].key:
                key = self.entries_[slot].key
                address = (key & 0xffffffffffff).to_bytes(6, "big")
                result.append((key >> 48, address, self.entries_[slot].port, self.entries_[slot].seen))
        return result

    def plan(self, list frames not None, Py_ssize_t first, int source, int vlan, object guard, double now,
             dict outgoing not None) -> tuple:
        """Sort plain frames of one port, from `frames[first]` on, to the ports that they go to.

        Plain is an untagged frame to an individual address that is known, on a port that takes such frames.

        Args:
            frames: from the owner of port `source`.
            first: where to begin.
            source: the port.
            vlan: that its untagged frames belong to.
            guard: the only source address that is allowed, as a number, or None.
            now: in seconds.
            outgoing: lists of frames by port, which this adds to.

        Returns:
            (where it stopped, bytes so far): at the end, or at a frame that is not plain.
        """
        cdef Py_ssize_t at = first, total = PyList_GET_SIZE(frames), size
        cdef uint64_t octets = 0, only = 0
        cdef bint guarded = guard is not None
        cdef const uint8_t *data
        cdef uint64_t sender
        cdef int32_t port, last = -1
        cdef object item
        cdef list batch = None
        if not 0 <= source < MOST_PORTS or vlan < 0:
            return first, 0
        if guarded:
            only = guard
        while at < total:
            item = <object>PyList_GET_ITEM(frames, at)
            if not PyBytes_CheckExact(item):
                break
            size = PyBytes_GET_SIZE(item)
            data = <const uint8_t *>PyBytes_AS_STRING(item)
            if size < ETHERNET or size > self.limit[source] or data[0] & 1 or data[6] & 1:
                break
            if data[12] == 0x81 and data[13] == 0:
                break
            sender = _address(data + 6)
            if sender == 0 or (guarded and sender != only):
                break
            self._learn(sender | <uint64_t>vlan << 48, source, now)
            port = self._find(_address(data) | <uint64_t>vlan << 48, now)
            if port < 0 or port == source or self.vlan[port] != vlan or size > self.limit[port]:
                break
            if port != last:
                batch = outgoing.setdefault(port, [])
                last = port
                if self.frames[port] == 0:
                    self.touched[self.touched_count] = port
                    self.touched_count += 1
            PyList_Append(batch, item)
            self.frames[port] += 1
            self.octets[port] += size
            octets += size
            at += 1
        return at, octets

    def collect(self) -> list:
        """(port, frames, bytes) that `plan` forwarded since the last call."""
        cdef int index
        cdef int32_t port
        result = []
        for index in range(self.touched_count):
            port = self.touched[index]
            result.append((port, self.frames[port], self.octets[port]))
            self.frames[port] = self.octets[port] = 0
        self.touched_count = 0
        return result

    cdef inline uint32_t _slot(self, uint64_t key) noexcept nogil:
        cdef uint64_t mixed = (key ^ self.seed) * <uint64_t>0x9e3779b97f4a7c15
        mixed = (mixed ^ mixed >> 32) * self.seed
        return <uint32_t>(mixed >> 33) & self.mask

    cdef inline int32_t _find(self, uint64_t key, double now) noexcept nogil:
        cdef uint32_t slot = self._slot(key)
        while self.entries_[slot].key:
            if self.entries_[slot].key == key:
                if now - self.entries_[slot].seen > self.max_age:
                    self._delete(slot)
                    return -1
                return self.entries_[slot].port
            slot = (slot + 1) & self.mask
        return -1

    cdef inline bint _learn(self, uint64_t key, int32_t port, double now) noexcept nogil:
        cdef uint32_t slot = self._slot(key)
        if not 0 <= port < MOST_PORTS or (key & ADDRESS_MASK) == 0:
            return False
        while self.entries_[slot].key:
            if self.entries_[slot].key == key:
                if self.entries_[slot].port != port:
                    if self.share[port] >= self.per_port:
                        return False
                    self.share[self.entries_[slot].port] -= 1
                    self.share[port] += 1
                    self.entries_[slot].port = port
                self.entries_[slot].seen = now
                return True
            slot = (slot + 1) & self.mask
        if self.used >= self.capacity or self.share[port] >= self.per_port:
            return False
        self.entries_[slot].key = key
        self.entries_[slot].port = port
        self.entries_[slot].seen = now
        self.share[port] += 1
        self.used += 1
        return True

    cdef void _delete(self, uint32_t slot) noexcept nogil:
        """Free a slot and move back what would not be found behind it."""
        cdef uint32_t hole = slot, home
        self.share[self.entries_[slot].port] -= 1
        self.used -= 1
        while True:
            slot = (slot + 1) & self.mask
            if self.entries_[slot].key == 0:
                break
            home = self._slot(self.entries_[slot].key)
            if ((slot - home) & self.mask) >= ((slot - hole) & self.mask):
                self.entries_[hole] = self.entries_[slot]
                hole = slot
        self.entries_[hole].key = 0

    cdef int _remove_if(self, int port, double now) noexcept:
        """Remove the entries of a port, or with -1 those that are too old."""
        cdef uint32_t slot = 0
        cdef int removed = 0
        while slot <= self.mask:
            if self.entries_[slot].key and (
                    self.entries_[slot].port == port if port >= 0 else now - self.entries_[slot].seen > self.max_age):
                self._delete(slot)      # something else may be here now
                removed += 1
            else:
                slot += 1
        return removed


cdef uint64_t _key(int vlan, bytes address) except? 0:
    if PyBytes_GET_SIZE(address) != 6:
        raise ValueError(f"an address of {PyBytes_GET_SIZE(address)} bytes")
    return _address(<const uint8_t *>PyBytes_AS_STRING(address)) | <uint64_t>vlan << 48
