"""A machine whose guest is a Python model: one parent, one child, and the child's drivers, on one thread."""

from typing import Self

from vmbus.bus import VmbusGuest, VmbusHost
from vmbus.emulated.ports import attach_ide
from vmbus.hypervisor import Clock, Hypervisor, Personality
from vmbus.hypervisor.personality import LINUX
from vmbus.machine.block import BlockDevice
from vmbus.machine.ide_guest import IdeDisk
from vmbus.storage.disk import Disk
from vmbus.storage.guest_disk import StorageDisk
from vmbus.storage.vsc import StorageVsc
from vmbus.storage.vsp import StorageVsp
from vmbus.trace.ledger import Ledger

__all__ = ["ModelMachine"]

RING_PAGES = 16
"""Data pages of each ring of a storage channel: 64 KiB, room for some hundred requests."""
DATA_PAGES = 512
"""Guest pages that a storage client may use for data: 2 MiB, 64 requests of 32 KiB."""


class ModelMachine:
    """A hypervisor with a root partition and one child.

    The child's guest has drivers for VMBus devices and, instead or as well, for emulated hardware. Both kinds of disk
    have the same interface; what they cost is in the ledger.

    Args:
        memory_size: bytes of the child's memory.
        personality: the guest operating system; `add_disk` chooses the driver that it has.
        clock: the time of all partitions; the host's by default.
        ledger: where everything is counted; a new one by default.

    Attributes:
        hypervisor: the instance.
        root: the parent, which alone has the host's files.
        child: the guest's partition.
        ledger: the counts.
    """

    def __init__(
        self,
        *,
        memory_size: int = 64 << 20,
        personality: Personality = LINUX,
        clock: Clock | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.ledger = ledger if ledger is not None else Ledger()
        self.hypervisor = Hypervisor(self.ledger, clock)
        self.root = self.hypervisor.create_root("root")
        self.child = self.hypervisor.create_child(
            self.root, "child", memory_size=memory_size, personality=personality
        )
        self._host: VmbusHost | None = None
        self._guest: VmbusGuest | None = None
        self._providers: list[StorageVsp] = []
        self._clients: list[StorageVsc] = []

    @property
    def host(self) -> VmbusHost:
        """The parent's end of the child's VMBus, made on first use."""
        if self._host is None:
            self._host = VmbusHost(self.hypervisor, self.child)
        return self._host

    @property
    def guest(self) -> VmbusGuest:
        """The child's VMBus driver, connected on first use.

        Raises:
            GuestFault: the personality has no right to hypercalls.
        """
        if self._guest is None:
            _ = self.host
            self._guest = VmbusGuest(self.child.vps[0])
            self._guest.connect()
        return self._guest

    def add_disk(self, disk: Disk, *, depth: int = 32) -> BlockDevice:
        """Attach a disk in the way that the guest operating system has a driver for."""
        if self.child.personality.has_driver("storage"):
            return self.add_enlightened_disk(disk, depth=depth)
        return self.add_emulated_disk(disk)

    def add_enlightened_disk(self, disk: Disk, *, depth: int = 32) -> StorageDisk:
        """Attach a disk to a storage controller of its own: VSC → VMBus → VSP.

        Args:
            disk: what the parent has; the caller closes it.
            depth: how many requests the guest keeps under way in a batch.
        """
        vsp = StorageVsp({(0, 0): disk})
        self.host.offer(vsp.offer, on_open=vsp.open, on_close=vsp.close, name="storage")
        self._providers.append(vsp)
        guest = self.guest
        offer = next(o for o in guest.offers if o.instance_id == vsp.offer.instance_id)
        channel = guest.open(
            offer, RING_PAGES, RING_PAGES, account=self.ledger.account(self.child.name, "storage")
        )
        vsc = StorageVsc(channel, guest.pages.allocate(DATA_PAGES))
        vsc.connect()
        self._clients.append(vsc)
        return vsc.disk()

    def add_emulated_disk(self, disk: Disk) -> IdeDisk:
        """Attach a disk to an emulated IDE controller, driven by machine code through intercepts.

        Raises:
            ValueError: the machine has its one controller already.
        """
        attach_ide(self.child, disk)
        return IdeDisk(self.child.vps[0])

    def close(self) -> None:
        """Close the guest's drivers, the bus and the partitions. The disks stay open."""
        for vsc in self._clients:
            vsc.close()
        for vsp in self._providers:
            vsp.shutdown()
        if self._guest is not None:
            self._guest.close()
        if self._host is not None:
            self._host.close()
        self.root.destroy()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
