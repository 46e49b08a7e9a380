"""The pages that a parent has deposited for the hypervisor's own use on behalf of a partition (TLFS, memory pools).

Pages are deposited and given back with `Hypervisor.map_lock` held.
"""

from typing import TYPE_CHECKING, Final, NamedTuple

from vmbus.errors import GuestMemoryError, HypercallError
from vmbus.hypervisor.tlfs import HV_PAGE_SIZE, Status

if TYPE_CHECKING:
    from vmbus.hypervisor.partition import Partition

__all__ = ["VP_PAGES", "Deposit", "MemoryPool"]

VP_PAGES: Final = 4
"""Deposited pages that a processor uses (a cost of this model; real ones vary by version)."""


class Deposit(NamedTuple):
    """One page: who gave it, where it lay there and with which access rights."""

    giver: "Partition"
    gpa: int
    rights: int

    def give_back(self) -> None:
        """Let the giver reach its page again, unless its parent has mapped or unmapped something there since."""
        if self.giver.deposits.get(self.gpa) is self and self.giver.memory.size:
            del self.giver.deposits[self.gpa]
            self.giver.memory.protect(self.gpa, HV_PAGE_SIZE, self.rights)


class MemoryPool:
    """Deposited pages. While deposited, a page is out of reach of the partition that gave it.

    Args:
        limited: whether what the partition uses must be covered by deposits. Partitions that a program makes
            through `Hypervisor.create_root` and `create_child` draw on the host's memory instead.
    """

    def __init__(self, limited: bool) -> None:
        self.limited = limited
        self.in_use = 0
        """Pages that the partition's objects use."""
        self._pages: dict[Partition, list[Deposit]] = {}
        self._count = 0

    @property
    def available(self) -> int:
        """Deposited pages that nothing uses."""
        return self._count - self.in_use if self.limited else self._count

    def deposit(self, giver: "Partition", gpa: int, gone: "list[tuple[Partition, int]]") -> None:
        """Take the page at `gpa` from its partition, and from the children that have it from there.

        A page of the hypervisor that lies over it goes away first.

        Args:
            giver: the partition.
            gpa: the page's address there.
            gone: collects who lost which page.

        Raises:
            HypercallError: INVALID_PARAMETER if the partition has no such page or no full access to it.
        """
        memory = giver.memory
        try:
            rights = memory.access(gpa)
            if rights & 3 != 3:
                raise HypercallError(Status.INVALID_PARAMETER)
            source = giver.loans.borrowed.get(gpa)
            giver.take_page(gpa, gone)
            memory.write(gpa, bytes(HV_PAGE_SIZE))  # nothing of the depositor's stays behind
            memory.protect(gpa, HV_PAGE_SIZE, 0)
            if source is not None:
                giver.loans.borrow(gpa, source)  # it stays the parent's, who may still take it back
        except (GuestMemoryError, OverflowError):
            raise HypercallError(Status.INVALID_PARAMETER) from None
        deposit = Deposit(giver, gpa, rights)
        giver.deposits[gpa] = deposit
        self._pages.setdefault(giver, []).append(deposit)
        self._count += 1

    def withdraw(self, giver: "Partition") -> int:
        """Give one unused page back to the partition that gave it; its address.

        Raises:
            HypercallError: NO_RESOURCES if every page of that partition's is in use.
        """
        theirs = self._pages.get(giver)
        if self.available <= 0 or not theirs:
            raise HypercallError(Status.NO_RESOURCES)
        deposit = theirs.pop()
        self._count -= 1
        deposit.give_back()
        return deposit.gpa

    def take(self, pages: int) -> None:
        """Use `pages` pages.

        Raises:
            HypercallError: INSUFFICIENT_MEMORY if fewer are available: the parent deposits more and tries again.
        """
        if self.limited and self.available < pages:
            raise HypercallError(Status.INSUFFICIENT_MEMORY)
        self.in_use += pages

    def give(self, pages: int) -> None:
        """Stop using `pages` pages."""
        self.in_use -= pages

    def release(self) -> None:
        """The partition is gone: give everything back."""
        for theirs in self._pages.values():
            for deposit in theirs:
                deposit.give_back()
        self._pages.clear()
        self._count = 0
        self.in_use = 0
