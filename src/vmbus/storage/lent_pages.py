"""The data pages of a storage client: which are free, and which the host may still read or write.

Whoever sends requests borrows pages in a `Loan`. It ends when its owner is done, also when an exception (Ctrl-C, a
timeout of the caller's) takes the owner away at any point. Pages of requests that the host has not completed then
stay lent until it has: handed out again, they would carry other data to the old place on the disk.

An exception may come between any two steps, so pages move from list to list inside of single calls of the runtime, or
lists change places in one assignment: each page is in exactly one list at any time.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import repeat

from vmbus.errors import DeviceError

__all__ = ["Loan", "PagePool"]


class PagePool:
    """The pages of one client. Its methods are called with the client's lock held.

    Args:
        pages: page numbers, in the order in which they are to be used.

    Attributes:
        waiting: ended loans whose pages the host still uses.
    """

    def __init__(self, pages: Sequence[int]) -> None:
        self._free = list(pages)
        self.waiting: list[Loan] = []

    def __len__(self) -> int:
        """Pages that are free."""
        return len(self._free)

    def lend(self, count: int) -> "Loan":
        """Hand out free pages.

        Raises:
            DeviceError: there are not that many.
        """
        if count > len(self._free):
            raise DeviceError(f"{count} pages of data exceed the {len(self._free)} free buffer pages")
        loan = Loan(self)
        if count == len(self._free):
            self._free, loan.pages = loan.pages, self._free
        else:
            _move(self._free, loan.pages, count)
        return loan

    def completed(self, request: int) -> bool:
        """The host completed a request; whether it was one that nobody waits for any more."""
        known = False
        for loan in list(self.waiting):
            known = known or request in loan.outstanding
            loan.outstanding.discard(request)
            self.end(loan)
        return known

    def end(self, loan: "Loan") -> None:
        """Take the pages of a loan back, as soon as no request on them is outstanding."""
        waits = bool(self.waiting) and loan in self.waiting
        if loan.outstanding:
            if not waits:
                self.waiting.append(loan)
            return
        if self._free:
            _move(loan.pages, self._free, len(loan.pages))
        else:
            self._free, loan.pages = loan.pages, self._free
        if waits:
            self.waiting.remove(loan)


class Loan:
    """Pages that are lent, by `PagePool.lend`, or none, for requests on pages of somebody else's.

    Attributes:
        pages: their numbers.
        outstanding: after the end, the requests whose completion gives the pages back.
    """

    pages: list[int] = []  # noqa: RUF012  # until there are some; never changed
    outstanding: set[int] = set()  # noqa: RUF012  # as long as there are none; never changed
    _pending: Callable[[], Collection[int]] | None = None

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self.pages = []

    def watch(self, pending: Callable[[], Collection[int]]) -> None:
        """Before requests on the pages are sent: how to learn which of them the host has."""
        self._pending = pending

    def close(self) -> None:
        """Give the pages back, at once or when the host is done with them; again does nothing."""
        pending = self._pending
        if pending is not None:
            requests = pending()
            if requests:
                self.outstanding = self.outstanding.union(requests)
            self._pending = None
        self._pool.end(self)

    def __del__(self) -> None:  # an exception came while its owner was about to close it
        if self._pending is not None or (self.pages and not self.outstanding):
            self.close()


def _move(source: list[int], target: list[int], count: int) -> None:
    """Move the first `count` items; an exception from outside finds none of them moved, or all."""
    target.extend(map(list.pop, repeat(source, count), repeat(0, count)))
