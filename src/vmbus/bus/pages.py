"""Which pages of its memory a model guest has given away: the least that a guest OS's page allocator does."""

import threading
from collections.abc import Iterable

from vmbus.core.memory import PAGE_SIZE, GuestMemory
from vmbus.errors import LocalProtocolError

__all__ = ["PageAllocator"]


class PageAllocator:
    """Hands out page numbers, the lowest free ones first.

    Args:
        first: the first page.
        end: the page after the last.
    """

    def __init__(self, first: int, end: int) -> None:
        self._next = first
        self._end = end
        self._free: list[int] = []
        self._used: set[int] = set()
        self._lock = threading.Lock()

    @classmethod
    def above(cls, memory: GuestMemory, address: int) -> "PageAllocator":
        """All pages of `memory` from `address` on; of a smaller memory its upper half."""
        first = min(address, memory.size // 2)
        return cls(max(1, first // PAGE_SIZE), memory.size // PAGE_SIZE)

    @property
    def in_use(self) -> int:
        """Pages handed out and not freed."""
        return len(self._used)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages.

        Raises:
            MemoryError: there are not that many.
        """
        with self._lock:
            if count > len(self._free) + self._end - self._next:
                raise MemoryError(f"the guest has no {count} free pages")
            taken = [self._free.pop() for _ in range(min(count, len(self._free)))]
            fresh = count - len(taken)
            taken += range(self._next, self._next + fresh)
            self._next += fresh
            self._used.update(taken)
            return taken

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back.

        Raises:
            LocalProtocolError: one was not taken.
        """
        with self._lock:
            back = list(pages)
            if not self._used.issuperset(back):
                raise LocalProtocolError("freeing pages that were not allocated")
            self._used.difference_update(back)
            self._free += sorted(back, reverse=True)
