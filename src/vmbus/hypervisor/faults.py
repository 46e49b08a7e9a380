"""Processor exceptions that the hypervisor raises in the guest.

These are events of the guest's own processor: whoever executes the guest (an engine or a model guest)
delivers them to it. They never reach the parent.
"""

from typing import ClassVar, Final

from vmbus.errors import VmbusError

__all__ = [
    "GeneralProtectionFault",
    "GuestFault",
    "PageFault",
    "UndefinedOpcodeFault",
    "VpStalled",
    "VpSuspended",
]


class GuestFault(VmbusError):
    """An exception to deliver to the guest through its IDT; `vector` is the x86 exception number."""

    vector: ClassVar[int]


class UndefinedOpcodeFault(GuestFault):
    """#UD: for instance a hypercall before the hypercall page is enabled (TLFS, hypercall page)."""

    vector = 6


class GeneralProtectionFault(GuestFault):
    """#GP(0): an MSR that does not exist for this partition, or a value that it does not take."""

    vector = 13


class PageFault(GuestFault):
    """#PF: a guest virtual address that does not translate.

    Attributes:
        address: the faulting guest virtual address (CR2).
        error_code: the x86 page fault error code (bit 0 present, 1 write, 2 user, 3 reserved bit, 4 fetch).
    """

    vector = 14

    def __init__(self, address: int, error_code: int) -> None:
        super().__init__(f"page fault at 0x{address:x}, error code 0x{error_code:x}")
        self.address: Final = address
        self.error_code: Final = error_code


class VpSuspended(VmbusError):
    """The processor is stopped: by its parent, or for an intercept that its parent has not answered yet (TLFS).

    The exit has not taken place; it is made again when the processor runs again.
    """


class VpStalled(VpSuspended):
    """The processor itself was suspended by its parent, or is gone; not for an intercept."""
