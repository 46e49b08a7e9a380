"""Taking packets from a ring so that an exception from outside, as Ctrl-C brings one, loses none of them."""

from collections.abc import Callable
from itertools import chain

from vmbus.core.ring import Packet

__all__ = ["take_packets"]

_flatten = chain.from_iterable


def take_packets(receive: Callable[[int], list[Packet]], limit: int, into: list[Packet]) -> int:
    """Append up to `limit` packets to a list that outlives the caller; returns how many.

    Python looks for signals between bytecodes, so also between a call and the use of its result. Here both happen
    inside of one call of the runtime: a packet is in the ring or in the list.

    Args:
        receive: `RingReader.recv_packets` of the ring.
        limit: at most so many.
        into: whoever keeps it looks at what is left there before it takes more.

    Raises:
        RingCorrupt: the peer broke the ring.
    """
    before = len(into)
    into.extend(_flatten(map(receive, (limit,))))
    return len(into) - before
