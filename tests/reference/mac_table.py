"""The switch's table of addresses, the obvious way: the oracle of the compiled one."""

from typing import Any


class MacTable:
    """Which port an address was last seen on, by (VLAN, address), bounded and ageing.

    When the table or a port's share of it is full, further addresses are not learned and frames to them are
    flooded: a guest that invents addresses costs bandwidth, never memory, and cannot push others out.
    """

    def __init__(self, *, max_age: float = 300.0, capacity: int = 8192, per_port: int = 1024) -> None:
        """`max_age` in seconds (300 is IEEE 802.1D's default); the other two are numbers of addresses."""
        self.max_age = max_age
        self.capacity = capacity
        self.per_port = per_port
        self._entries: dict[tuple[int, bytes], tuple[Any, float]] = {}
        self._share: dict[Any, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def learn(self, vlan: int, address: bytes, port: Any, now: float) -> bool:
        """Note that `address` was seen on `port`; False if there was no room."""
        key = (vlan, address)
        known = self._entries.get(key)
        if known is not None:
            if known[0] is not port:
                if self._share.get(port, 0) >= self.per_port:
                    return False
                self._share[known[0]] -= 1
                self._share[port] = self._share.get(port, 0) + 1
            self._entries[key] = (port, now)
            return True
        if len(self._entries) >= self.capacity or self._share.get(port, 0) >= self.per_port:
            return False
        self._entries[key] = (port, now)
        self._share[port] = self._share.get(port, 0) + 1
        return True

    def find(self, vlan: int, address: bytes, now: float) -> Any:
        """The port of an address; None if it is unknown or has not been seen for `max_age`."""
        entry = self._entries.get((vlan, address))
        if entry is None:
            return None
        if now - entry[1] > self.max_age:
            self._remove((vlan, address))
            return None
        return entry[0]

    def age(self, now: float) -> int:
        """Remove all entries that are too old; how many."""
        old = [key for key, (_, seen) in self._entries.items() if now - seen > self.max_age]
        for key in old:
            self._remove(key)
        return len(old)

    def forget(self, port: Any) -> None:
        """Remove all entries of a port."""
        for key in [key for key, (owner, _) in self._entries.items() if owner is port]:
            del self._entries[key]
        self._share.pop(port, None)

    def entries(self) -> list[tuple[int, bytes, Any, float]]:
        """(VLAN, address, port, last seen) of all entries."""
        return [(vlan, address, port, seen) for (vlan, address), (port, seen) in self._entries.items()]

    def _remove(self, key: tuple[int, bytes]) -> None:
        port, _ = self._entries.pop(key)
        self._share[port] -= 1
