"""Which GPADLs stand on a page of the guest: an index, so that a page taken from it is looked up and not searched for.

Only GPADLs whose pages somebody keeps mapped are in it, rings of open channels and windows; the others go by guest
physical addresses, which lead to whatever lies there now.
"""

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["HeldPages"]


class HeldPages:
    """The pages of one guest that GPADLs stand on. All methods may be called from any thread.

    Looking up a page that none stands on takes the time of one array element; of one that some stand on, a binary
    search in each GPADL. What is found ends, so that nobody can make that happen often.

    Args:
        page_count: pages in the guest's address space.
    """

    def __init__(self, page_count: int) -> None:
        self._page_count = page_count
        self._lock = threading.Lock()
        self._held: dict[int, NDArray[np.intp]] = {}
        self._uses: dict[int, int] = {}
        self._counts: NDArray[np.uint32] | None = None  # by page; untouched parts of it take no memory

    def hold(self, key: int, pfns: Sequence[int]) -> None:
        """`key` stands on these pages until it was let go as often as it was held."""
        pages = np.unique(np.asarray(pfns, dtype=np.intp))
        with self._lock:
            uses = self._uses.get(key, 0)
            if not uses:
                if self._counts is None:
                    self._counts = np.zeros(self._page_count, dtype=np.uint32)
                self._held[key] = pages
                self._counts[pages] += 1
            self._uses[key] = uses + 1  # last: what fails before holds nothing

    def let_go(self, key: int) -> None:
        """Undo one `hold`; of an unknown key: nothing."""
        with self._lock:
            uses = self._uses.get(key, 0)
            if uses > 1:
                self._uses[key] = uses - 1
            elif uses and self._counts is not None:
                del self._uses[key]
                self._counts[self._held.pop(key)] -= 1

    def holders(self, pfn: int) -> list[int]:
        """The keys that stand on a page."""
        with self._lock:
            if self._counts is None or not self._counts[pfn]:
                return []
            return [key for key, pages in self._held.items() if _has(pages, pfn)]


def _has(pages: NDArray[np.intp], pfn: int) -> bool:
    at = int(pages.searchsorted(pfn))
    return at < len(pages) and pages[at] == pfn
