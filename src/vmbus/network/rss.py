"""Receive-side scaling: the Toeplitz hash and the indirection table that choose the queue of a frame.

Source: "RSS Hashing Functions" of the Windows driver documentation, whose test vectors are in the tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from vmbus.network.offload import Protocol, parse
from vmbus.network.oid import HASH_KEY_SIZE, HashTypes

__all__ = ["DEFAULT_KEY", "RssState", "Toeplitz"]

DEFAULT_KEY: Final = bytes.fromhex(
    "6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa"
)
"""The key of Microsoft's verification suite, also the default of Linux's driver."""


_TOEPLITZ: Final = int(HashTypes.TOEPLITZ)


class Toeplitz:
    """The Toeplitz hash under one key; every input byte costs one table look-up."""

    def __init__(self, key: bytes) -> None:
        """`key` must be at least 4 bytes longer than the longest input (40 bytes for IPv6 with ports)."""
        if len(key) != HASH_KEY_SIZE:
            raise ValueError(f"RSS key of {len(key)} bytes, not {HASH_KEY_SIZE}")
        self.key = key
        self._tables = _tables(key)

    def __call__(self, data: bytes) -> int:
        """The 32-bit hash of at most 36 bytes."""
        result = 0
        for value, table in zip(data, self._tables, strict=False):
            result ^= table[value]
        return result


@lru_cache(maxsize=64)
def _tables(key: bytes) -> list[list[int]]:
    """What each value of each input byte contributes to the hash."""
    bits, length = int.from_bytes(key, "big"), len(key) * 8
    tables = []
    for byte in range(len(key) - 4):
        table = [0]
        for bit in reversed(range(8)):  # the lowest bit first: each bit doubles the table
            window = bits >> length - 32 - byte * 8 - bit & 0xFFFFFFFF
            table += [value ^ window for value in table]
        tables.append(table)
    return tables


@dataclass(slots=True)
class RssState:
    """What a guest set with `Oid.GEN_RECEIVE_SCALE_PARAMETERS`.

    Attributes:
        hash_types: which headers go into the hash.
        table: queue numbers; its length is a power of two or at least not 0.
        toeplitz: the hash with the guest's key.
    """

    hash_types: HashTypes
    table: Sequence[int]
    toeplitz: Toeplitz

    def hash(self, frame: bytes) -> int | None:
        """The hash of a frame, None if none of the enabled types fits it."""
        found = self.hash_and_type(frame)
        return None if found is None else found[0]

    def hash_and_type(self, frame: bytes) -> tuple[int, int] | None:
        """The hash of a frame and which one it is (`HashTypes`, one type and the function), if one fits it."""
        layers = parse(frame)
        if layers is None:
            return None
        types, ip = self.hash_types, layers.ip
        if layers.version == 4:
            addresses = frame[ip + 12 : ip + 20]
            tcp, udp, alone = HashTypes.TCP_IPV4, HashTypes.UDP_IPV4, HashTypes.IPV4
        else:
            addresses = frame[ip + 8 : ip + 40]
            tcp, udp, alone = HashTypes.TCP_IPV6, HashTypes.UDP_IPV6, HashTypes.IPV6
        with_ports = types & (
            tcp if layers.protocol == Protocol.TCP else udp if layers.protocol == Protocol.UDP else 0
        )
        if with_ports and not layers.fragment and layers.end - layers.transport >= 4:
            ports = frame[layers.transport : layers.transport + 4]
            return self.toeplitz(addresses + ports), int(with_ports) | _TOEPLITZ
        return (self.toeplitz(addresses), int(alone) | _TOEPLITZ) if types & alone else None

    def queue(self, hash_value: int | None) -> int:
        """The queue for a hash; frames without one go to queue 0."""
        return 0 if hash_value is None else self.table[hash_value % len(self.table)]
