"""A machine whose guest is a Python model: one parent, one child, and the child's drivers, on one thread."""

from typing import Self

from vmbus.bus import VmbusGuest, VmbusHost
from vmbus.bus.pages import PageAllocator
from vmbus.core.memory import PAGE_SIZE
from vmbus.emulated.ports import attach_ide, attach_pci
from vmbus.errors import LocalProtocolError
from vmbus.hypervisor import Budget, Clock, Hypervisor, Personality
from vmbus.hypervisor.personality import LINUX, PERSONALITIES
from vmbus.machine.block import BlockDevice
from vmbus.machine.ide_guest import IdeDisk
from vmbus.machine.nic import NetworkDevice, TulipAdapter
from vmbus.machine.tulip_guest import TulipNic
from vmbus.network.adapter import NetworkAdapter
from vmbus.network.switch import Port
from vmbus.network.vsc import NetworkVsc, default_page_count
from vmbus.network.vsc_protocol import GuestConfig
from vmbus.network.vsp_oid import AdapterConfig
from vmbus.network.wire import Version as NetworkVersion
from vmbus.sizes import byte_count
from vmbus.storage.disk import Disk
from vmbus.storage.growth import limited
from vmbus.storage.guest_disk import StorageDisk
from vmbus.storage.vsc import StorageVsc
from vmbus.storage.vsp import StorageVsp
from vmbus.storage.wire import Version as StorageVersion
from vmbus.trace.ledger import Ledger

__all__ = ["ModelMachine"]

RING_PAGES = 16
"""Data pages of a channel's rings: 64 KiB; those of a deep queue get more."""
REQUEST_SIZE = 32 << 10
"""Bytes of the requests of which a disk's queue holds as many as its depth says."""
MIN_DATA_PAGES = 512
MIN_MEMORY = 8 << 20
"""Bytes that the child has at least."""
MAX_MEMORY = 1 << 46
"""And less than these."""
EMULATED_MEMORY = 2 << 20
"""Bytes at the end of the child's memory for the drivers of emulated hardware; VMBus drivers have the rest."""
TULIP_OFFSET = 0x140000
"""Where the network driver's part of it begins, behind the disk driver's 1 MiB of buffer and 4 pages."""


class ModelMachine:
    """A hypervisor with a root partition and one child.

    The child's guest has drivers for VMBus devices and, instead or as well, for emulated hardware. Both kinds of disk,
    and both kinds of network adapter, have the same interface; what they cost is in the ledger.

    Args:
        memory_size: bytes of the child's memory, at least 8 MiB.
        personality: the guest operating system, or its name in `PERSONALITIES`; `add_disk` and `add_network` choose the
            driver that it has, and an enlightened one speaks the protocol versions of its time.
        clock: the time of all partitions; the host's by default.
        ledger: where everything is counted; a new one by default.
        budget: what the guest may make the host spend; `Budget`'s defaults if None.

    Raises:
        LocalProtocolError: too little memory or not whole pages, or no personality of that name.
        OSError: the host has not that much memory.

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
        personality: Personality | str = LINUX,
        clock: Clock | None = None,
        ledger: Ledger | None = None,
        budget: Budget | None = None,
    ) -> None:
        memory_size = byte_count(memory_size, "memory")
        if not MIN_MEMORY <= memory_size < MAX_MEMORY or memory_size % PAGE_SIZE:
            raise LocalProtocolError(
                f"{memory_size} bytes of memory: the drivers need {MIN_MEMORY >> 20} MiB or more, whole pages"
            )
        if isinstance(personality, str):
            personality = _named(personality)
        self.ledger = ledger if ledger is not None else Ledger()
        self.hypervisor = Hypervisor(self.ledger, clock)
        self.root = self.hypervisor.create_root("root")
        self.child = self.hypervisor.create_child(
            self.root, "child", memory_size=memory_size, personality=personality, budget=budget
        )
        self._emulated = memory_size - EMULATED_MEMORY
        self._host: VmbusHost | None = None
        self._guest: VmbusGuest | None = None
        self._providers: list[StorageVsp] = []
        self._clients: list[StorageVsc] = []
        self._nics: list[NetworkVsc] = []
        self._ports: list[Port] = []
        self._emulated_network = False
        self._closed = False

    def __repr__(self) -> str:
        return f"<ModelMachine of {self.child.personality.name!r}{', closed' if self._closed else ''}>"

    @property
    def host(self) -> VmbusHost:
        """The parent's end of the child's VMBus, made on first use.

        Raises:
            LocalProtocolError: the machine is closed.
        """
        if self._host is None:
            self._check()
            self._host = VmbusHost(self.hypervisor, self.child)
        return self._host

    @property
    def guest(self) -> VmbusGuest:
        """The child's VMBus driver, connected on first use.

        Raises:
            GuestFault: the personality has no right to hypercalls.
            LocalProtocolError: the machine is closed, or the personality has no VMBus driver.
        """
        if self._guest is None:
            _ = self.host
            pages = PageAllocator((1 << 20) // PAGE_SIZE, self._emulated // PAGE_SIZE)
            self._guest = VmbusGuest(self.child.vps[0], pages=pages)
            self._guest.connect()
        return self._guest

    def add_disk(self, disk: Disk, *, depth: int = 32) -> BlockDevice:
        """Attach a disk in the way that the guest operating system has a driver for."""
        if self.child.personality.has_driver("storage"):
            return self.add_enlightened_disk(disk, depth=depth)
        return self.add_emulated_disk(disk)

    def add_enlightened_disk(
        self, disk: Disk, *, depth: int = 32, request_size: int = REQUEST_SIZE
    ) -> StorageDisk:
        """Attach a disk to a storage controller of its own: VSC → VMBus → VSP.

        Args:
            disk: what the parent has; the caller closes it.
            depth: how many requests the guest keeps under way in a batch. Ring and data pages are made for it.
            request_size: bytes of the largest requests for which that holds.

        Raises:
            LocalProtocolError: the machine is closed, the personality has no VMBus driver, or the guest has no memory
                for a queue of that depth.
        """
        self._check()
        if depth < 1:
            raise LocalProtocolError(f"a queue of {depth} requests: there must be at least one")
        each = -(-byte_count(request_size, "a request") // PAGE_SIZE)
        pages = max(MIN_DATA_PAGES, depth * each)
        ring_pages = max(RING_PAGES, -(-depth * (128 + 8 * each) // PAGE_SIZE))
        if pages + 2 * ring_pages > self.child.memory.size // PAGE_SIZE // 2:
            raise LocalProtocolError(
                f"a queue of {depth} requests of {request_size} bytes: needs {pages // 256} MiB of data pages, "
                "which may be half of the guest's memory"
            )
        vsp = StorageVsp({(0, 0): limited(disk, self.child.meter.disk_growth)})
        self.host.offer(vsp.offer, on_open=vsp.open, on_close=vsp.close, name="storage")
        self._providers.append(vsp)
        guest = self.guest
        offer = next(o for o in guest.offers if o.instance_id == vsp.offer.instance_id)
        channel = guest.open(
            offer, ring_pages, ring_pages, account=self.ledger.account(self.child.name, "storage")
        )
        newest = self.child.personality.storage_version or max(StorageVersion)
        versions = sorted((v for v in StorageVersion if v <= newest), reverse=True)
        vsc = StorageVsc(channel, guest.pages.allocate(pages), versions=versions)
        vsc.connect()
        self._clients.append(vsc)
        seen = vsc.disk()
        seen.queue_depth = depth
        return seen

    def add_emulated_disk(self, disk: Disk) -> IdeDisk:
        """Attach a disk to an emulated IDE controller, driven by machine code through intercepts.

        Raises:
            ValueError: the machine has its one controller already.
            LocalProtocolError: the machine is closed.
        """
        self._check()
        attach_ide(self.child, limited(disk, self.child.meter.disk_growth))
        return IdeDisk(self.child.vps[0], base=self._emulated)

    def add_network(self, port: Port, mac: bytes) -> NetworkDevice:
        """Attach a network adapter in the way that the guest operating system has a driver for.

        Args:
            port: the adapter's port of a virtual switch in the parent.
            mac: its address: six bytes, of one station.
        """
        if self.child.personality.has_driver("network"):
            return self.add_enlightened_network(port, mac)
        return self.add_emulated_network(port, mac)

    def add_enlightened_network(self, port: Port, mac: bytes) -> NetworkVsc:
        """Attach a synthetic adapter: VSC → VMBus → VSP → switch; arguments as for `add_network`."""
        self._check()
        self._ports.append(port)
        guest = self.guest
        known = {offer.key for offer in guest.offers}
        NetworkAdapter(self.host, port, AdapterConfig(mac), name="network")
        (offer,) = (o for o in guest.offers if o.key not in known)
        channel = guest.open(
            offer, RING_PAGES, RING_PAGES, account=self.ledger.account(self.child.name, "network")
        )
        newest = self.child.personality.network_version or max(NetworkVersion)
        config = GuestConfig(versions=sorted((v for v in NetworkVersion if v <= newest), reverse=True))
        nic = NetworkVsc(channel, guest.pages.allocate(default_page_count()), config)
        self._nics.append(nic)
        return nic

    def add_emulated_network(self, port: Port, mac: bytes) -> TulipNic:
        """Attach an emulated DEC 21140, driven by machine code through intercepts; arguments as for `add_network`.

        Raises:
            LocalProtocolError: the machine has its one such adapter already, or is closed.
        """
        self._check()
        if self._emulated_network:
            raise LocalProtocolError("the machine has its emulated adapter already")
        self._emulated_network = True
        self._ports.append(port)
        TulipAdapter(self.child, attach_pci(self.child), port, mac)
        return TulipNic(self.child.vps[0], base=self._emulated + TULIP_OFFSET)

    def _check(self) -> None:
        if self._closed:
            raise LocalProtocolError("the machine is closed")

    def close(self) -> None:
        """Close the guest's drivers, the bus and the partitions. The disks stay open, the switch stays."""
        self._closed = True
        for nic in self._nics:
            nic.close()
        for port in self._ports:
            port.disconnect()
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


def _named(name: str) -> Personality:
    if name not in PERSONALITIES:
        raise LocalProtocolError(f"no personality {name!r}: one of {', '.join(PERSONALITIES)}")
    return PERSONALITIES[name]
