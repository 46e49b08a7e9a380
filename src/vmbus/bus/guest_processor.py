"""What a guest's VMBus driver needs of its virtual processors, and keeps for each."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Protocol

from vmbus.bus import wire
from vmbus.bus.hosting import Hosting, Task, hosting_of
from vmbus.bus.pages import PageAllocator
from vmbus.bus.versions import Version
from vmbus.core.dispatch import EventFlags, MessageSlot
from vmbus.core.memory import PAGE_SIZE, GuestMemory
from vmbus.errors import LocalProtocolError
from vmbus.hypervisor import VirtualProcessor, VpSuspended
from vmbus.hypervisor.tlfs import Msr
from vmbus.trace.ledger import Account

__all__ = ["VECTOR", "GuestProcessor", "ProcessorPort", "spoken_versions", "surroundings"]

VECTOR: Final = 0xF3
"""Interrupt vector of the VMBus SINT (Linux: HYPERVISOR_CALLBACK_VECTOR)."""
RECOMMENDATIONS_LEAF: Final = 0x4000_0004
DEPRECATE_AUTO_EOI: Final = 1 << 9
"""EAX of that leaf: do not use auto-EOI (TLFS, feature discovery)."""
SINT_AUTO_EOI: Final = 1 << 17


class GuestProcessor(Protocol):
    """What the driver needs of a virtual processor."""

    index: int
    on_interrupt: Callable[[], None] | None

    def hypercall(self, control: int, input: int, output: int, xmm: bytes = b"") -> int:
        """RCX, RDX, R8 → RAX."""

    def rdmsr(self, index: int) -> int:
        """RDMSR."""

    def wrmsr(self, index: int, value: int) -> None:
        """WRMSR."""

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        """CPUID."""

    def pop_interrupt(self) -> int | None:
        """The next vector to handle."""


class ProcessorPort:
    """The driver's part of one processor: its message slot and event flags.

    Interrupts of the SINT end by themselves (auto-EOI) unless the hypervisor deprecates that in CPUID 0x40000004 EAX,
    as Linux has it; then each costs a write of the EOI register.
    """

    def __init__(self, vp: GuestProcessor, memory: GuestMemory, pages: PageAllocator) -> None:
        self.vp = vp
        self.pages = pages.allocate(2)
        message_page, flags_page = (pfn * PAGE_SIZE for pfn in self.pages)
        vp.wrmsr(Msr.SIMP, message_page | 1)
        vp.wrmsr(Msr.SIEFP, flags_page | 1)
        vp.wrmsr(Msr.SCONTROL, 1)
        self.auto_eoi = not vp.cpuid(RECOMMENDATIONS_LEAF)[0] & DEPRECATE_AUTO_EOI
        vp.wrmsr(Msr.SINT0 + wire.VMBUS_SINT, VECTOR | (SINT_AUTO_EOI if self.auto_eoi else 0))
        self.slot: MessageSlot | None = MessageSlot(memory, message_page, wire.VMBUS_SINT)
        self.flags: EventFlags | None = EventFlags(memory, flags_page, wire.VMBUS_SINT)
        self.task: Task | None = None

    def close(self) -> None:
        """Take the pages away and mask the interrupt."""
        self.slot = self.flags = None
        self.vp.on_interrupt = None
        if isinstance(self.vp, VirtualProcessor):
            self.vp.on_stall = self.vp.on_resume = None
        with suppress(VpSuspended):  # it was destroyed, or is stopped: there is nobody to take them from
            self.vp.wrmsr(Msr.SINT0 + wire.VMBUS_SINT, 1 << 16)
            self.vp.wrmsr(Msr.SIMP, 0)
            self.vp.wrmsr(Msr.SIEFP, 0)


def spoken_versions(processors: GuestProcessor | Sequence[GuestProcessor]) -> list[int]:
    """The versions that the guest operating system of that partition knows, best first."""
    newest = max(Version)
    if isinstance(processors, VirtualProcessor):
        personality = processors.partition.personality
        if not personality.vmbus_version:
            raise LocalProtocolError(f"{personality.name} has no VMBus driver: it needs emulated hardware")
        newest = Version(personality.vmbus_version)
    return sorted((v for v in Version if v <= newest), reverse=True)


def surroundings(
    processors: GuestProcessor | Sequence[GuestProcessor],
    memory: GuestMemory | None,
    hosting: Hosting | None,
    account: Account | None,
) -> tuple[list[GuestProcessor], GuestMemory, Hosting, Account]:
    """Fill in what a processor of a hypervisor in this process knows by itself."""
    if isinstance(processors, VirtualProcessor):
        partition = processors.partition
        return (
            list(partition.vps),
            partition.memory,
            hosting or hosting_of(partition.hypervisor),
            account or partition.hypervisor.ledger.account(partition.name, "vmbus"),
        )
    vps = [processors] if not isinstance(processors, Sequence) else list(processors)
    if memory is None or hosting is None:
        raise TypeError("processors that are not of this process's hypervisor need memory and hosting")
    return vps, memory, hosting, account or Account()
