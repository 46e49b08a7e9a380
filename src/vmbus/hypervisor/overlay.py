"""Overlay pages: the hypervisor's pages that a guest places over its own physical memory (TLFS, overlay pages).

An enabled overlay hides the guest's page; when it is moved or disabled the guest's page shows again. Guest memory
here is one mapping shared with providers and engines, so the overlay swaps contents: the page
that it hides is kept aside and put back.
"""

from contextlib import suppress

from vmbus.core.memory import GuestMemory
from vmbus.errors import GuestMemoryError
from vmbus.hypervisor.faults import GeneralProtectionFault
from vmbus.hypervisor.tlfs import HV_PAGE_SIZE

__all__ = ["OverlayPage"]


class OverlayPage:
    """One page of the hypervisor, placed in a partition through an MSR (bit 0 enable, bits 63:12 page number).

    Placed, moved and removed with `Hypervisor.map_lock` held.

    Args:
        memory: the partition's memory.
        content: what the page holds from its start.
        kept: whether what the guest writes to the page stays in it while it is away. The hypercall page and the
            reference TSC page are not the guest's to write: they come back as the hypervisor made them.
    """

    __slots__ = ("_content", "_hidden", "_kept", "_memory", "gpa")

    def __init__(
        self, memory: GuestMemory, content: bytes = bytes(HV_PAGE_SIZE), *, kept: bool = True
    ) -> None:
        self._memory = memory
        self._kept = kept
        self._content = content.ljust(HV_PAGE_SIZE, b"\0")
        self._hidden = b""
        self.gpa: int | None = None
        """Where the page is placed, None while it is disabled."""

    def place(self, register: int) -> None:
        """Place, move or remove the page as the value written to its MSR says.

        Raises:
            GeneralProtectionFault: the page number lies outside of what the partition can write; nothing changed.
        """
        gpa = register & ~0xFFF if register & 1 else None
        if gpa == self.gpa:
            return
        if gpa is None:
            self.remove()
            return
        try:
            hidden = self._memory.read(gpa, HV_PAGE_SIZE)
            self._memory.write(gpa, hidden)
        except (GuestMemoryError, OverflowError):
            raise GeneralProtectionFault(f"overlay page at 0x{gpa:x} is outside the partition") from None
        self.remove()
        self._memory.write(gpa, self._content)
        self._hidden = hidden
        self.gpa = gpa

    def remove(self) -> None:
        """Take the page away; the guest's own shows again."""
        if self.gpa is None:
            return
        gpa, self.gpa = self.gpa, None
        with suppress(
            GuestMemoryError
        ):  # the parent unmapped the page meanwhile: there is nothing left to restore
            if self._kept:
                self._content = self._memory.read(gpa, HV_PAGE_SIZE)
            self._memory.write(gpa, self._hidden)
        self._hidden = b""

    def write(self, offset: int, data: bytes) -> None:
        """Replace a part of the page's contents; where the page is placed, the guest sees it at once."""
        self._content = self._content[:offset] + data + self._content[offset + len(data) :]
        if self.gpa is not None:
            with suppress(GuestMemoryError):  # the page went from the guest meanwhile: nobody can look at it
                self._memory.write(self.gpa + offset, data)
