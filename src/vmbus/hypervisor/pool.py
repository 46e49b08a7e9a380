"""The pages that a parent has deposited for the hypervisor's own use on behalf of a partition (TLFS, memory pools)."""

from typing import Final

from vmbus.core.memory import GuestMemory
from vmbus.errors import GuestMemoryError, HypercallError
from vmbus.hypervisor.tlfs import HV_PAGE_SIZE, Status

__all__ = ["VP_PAGES", "MemoryPool"]

VP_PAGES: Final = 4
"""Deposited pages that a processor uses (a cost of this model; real ones vary by version)."""


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
        self._pages: list[tuple[GuestMemory, int, int]] = []

    @property
    def available(self) -> int:
        """Deposited pages that nothing uses."""
        return len(self._pages) - self.in_use if self.limited else len(self._pages)

    def deposit(self, memory: GuestMemory, gpa: int) -> None:
        """Take the page at `gpa` from its partition.

        Raises:
            HypercallError: INVALID_PARAMETER if the partition has no such page or no full access to it.
        """
        try:
            rights = memory.access(gpa)
            if rights & 3 != 3:
                raise HypercallError(Status.INVALID_PARAMETER)
            memory.write(gpa, bytes(HV_PAGE_SIZE))  # nothing of the depositor's stays behind
            memory.protect(gpa, HV_PAGE_SIZE, 0)
        except (GuestMemoryError, OverflowError):
            raise HypercallError(Status.INVALID_PARAMETER) from None
        self._pages.append((memory, gpa, rights))

    def withdraw(self, memory: GuestMemory) -> int:
        """Give one unused page back to the partition with `memory`; its address.

        Raises:
            HypercallError: NO_RESOURCES if every page of that partition's is in use.
        """
        if self.available > 0:
            for at in range(len(self._pages) - 1, -1, -1):
                giver, gpa, rights = self._pages[at]
                if giver is memory:
                    del self._pages[at]
                    memory.protect(gpa, HV_PAGE_SIZE, rights)
                    return gpa
        raise HypercallError(Status.NO_RESOURCES)

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
        for memory, gpa, rights in self._pages:
            if memory.size:
                memory.protect(gpa, HV_PAGE_SIZE, rights)
        self._pages.clear()
        self.in_use = 0
