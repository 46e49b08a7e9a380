"""Pages that partitions have from their parents by HvCallMapGpaPages, and what happens when a page is taken away.

A child's mapping is a loan: it holds while the parent's own mapping of that page does. When a partition's page is
unmapped, mapped anew (with other rights, too) or deposited, the pages that its children have from there go first, and
their children's before those. Else a partition could keep what its parent takes back by lending it to a child.
"""

from typing import TYPE_CHECKING, Final

from vmbus.errors import GuestMemoryError
from vmbus.hypervisor.tlfs import HV_PAGE_SIZE

if TYPE_CHECKING:
    from vmbus.hypervisor.partition import Partition

__all__ = ["LOAN_COST", "Loans", "tell_watchers"]


LOAN_COST: Final = 256
"""Bytes of the host's memory that the parent's guest is charged with for each page that a child has from it."""


class Loans:
    """The loans of one partition; used with `Hypervisor.map_lock` held.

    Attributes:
        lent: where its children have its pages: by address here, the children and the addresses there.
        borrowed: the pages that it has from its parent: by address here, the address there.
    """

    __slots__ = ("_partition", "borrowed", "lent")

    def __init__(self, partition: "Partition") -> None:
        self._partition = partition
        self.lent: dict[int, set[tuple[Partition, int]]] = {}
        self.borrowed: dict[int, int] = {}

    def borrow(self, gpa: int, source: int) -> None:
        """The page at `gpa` is from now on the one at `source` in the parent."""
        parent = self._partition.parent
        assert parent is not None
        self.borrowed[gpa] = source
        parent.meter.host_memory.adjust(LOAN_COST)
        parent.loans.lent.setdefault(source, set()).add((self._partition, gpa))

    def forget(self, gpa: int) -> None:
        """The page at `gpa` is not the parent's any more."""
        source = self.borrowed.pop(gpa, None)
        parent = self._partition.parent
        if source is None or parent is None:
            return
        parent.meter.host_memory.adjust(-LOAN_COST)
        lent = parent.loans.lent
        others = lent.get(source)
        if others is not None:
            others.discard((self._partition, gpa))
            if not others:
                del lent[source]

    def call_in(self, gpa: int, gone: "list[tuple[Partition, int]]") -> None:
        """Take the page at `gpa` from every child that has it; `gone` collects who lost which."""
        for child, at in list(self.lent.get(gpa, ())):
            child.take_page(at, gone)
            child.memory.unmap(at, HV_PAGE_SIZE)

    def end(self) -> None:
        """The partition is gone: it gives back what it has from its parent, also where views keep its memory."""
        memory = self._partition.memory
        for gpa in list(self.borrowed):
            self.forget(gpa)
            try:
                memory.unmap(gpa, HV_PAGE_SIZE)
            except GuestMemoryError:
                continue  # it is closed already


def tell_watchers(gone: "list[tuple[Partition, int]]") -> None:
    """Tell whoever uses pages of partitions beside their memory map which of them were taken away."""
    for partition, gpa in gone:
        for watcher in list(partition.page_watchers):
            watcher(gpa)
