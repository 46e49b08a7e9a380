"""Hyper-V's I/O architecture in Python, with a compiled core: what a researcher imports.

The parts from the bottom up; each room of the package has more:

* the compiled core: `GuestMemory`, `GpaRanges`, `Window`, `RingWriter`, `RingReader`, `Packet`,
  `Dispatcher`, `Doorbell`
* the hypervisor: `Hypervisor`, `Partition`, `VirtualProcessor`, `HostClock`, `VirtualClock`, `PERSONALITIES`;
  `Budget` of what a guest makes its host spend; `ChildProcess`, a child in a process of its own, and its `Sandbox`
* VMBus: `VmbusHost` in the parent, `VmbusGuest` in the child, `Offer`, `Channel`, `loopback`
* storage: `RawDisk`, `MemoryDisk`, `open_disk` for images and NBD, `RedirectDisk`, `StorageVsp`, `StorageVsc`
* networking: `Switch`, `NetworkAdapter` in the parent with its `AdapterConfig`, `NetworkVsc` in the child with its
  `GuestConfig`; uplinks, captures and the rest are in `vmbus.network`
* whole machines: `ModelMachine`, and `compare`, the experiment on both paths; `Machine`, which runs an unmodified
  Linux kernel, with its `Result` and `Outcome`
* counts: `Ledger`, `Account`
* errors: all under `VmbusError`
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmbus.bus import Channel, Offer, VmbusGuest, VmbusHost, loopback
    from vmbus.core.dispatch import Dispatcher, Doorbell
    from vmbus.core.memory import GpaRanges, GuestMemory, Window
    from vmbus.core.ring import Packet, RingReader, RingWriter
    from vmbus.errors import (
        BudgetExceeded,
        DeviceError,
        EngineError,
        GuestMemoryError,
        HypercallError,
        LocalProtocolError,
        ProtocolError,
        RemoteProtocolError,
        RingCorrupt,
        RingEmpty,
        RingError,
        RingFull,
        VmbusError,
    )
    from vmbus.hypervisor import (
        PERSONALITIES,
        Budget,
        ChildProcess,
        HostClock,
        Hypervisor,
        Partition,
        Sandbox,
        VirtualClock,
        VirtualProcessor,
    )
    from vmbus.machine.comparison import Comparison, compare
    from vmbus.machine.guest import Machine, Outcome, Result
    from vmbus.machine.model import ModelMachine
    from vmbus.network import AdapterConfig, GuestConfig, NetworkAdapter, NetworkVsc, Switch
    from vmbus.storage.disk import Disk, MemoryDisk, RawDisk
    from vmbus.storage.guest_disk import StorageDisk
    from vmbus.storage.images import create_vhd, create_vhdx, open_disk
    from vmbus.storage.redirect import RedirectDisk
    from vmbus.storage.vsc import StorageVsc
    from vmbus.storage.vsp import StorageVsp
    from vmbus.trace.ledger import Account, Ledger

_ROOMS = {
    "vmbus.bus": (
        "Channel",
        "Offer",
        "VmbusGuest",
        "VmbusHost",
        "loopback",
    ),
    "vmbus.core.dispatch": (
        "Dispatcher",
        "Doorbell",
    ),
    "vmbus.core.memory": (
        "GpaRanges",
        "GuestMemory",
        "Window",
    ),
    "vmbus.core.ring": (
        "Packet",
        "RingReader",
        "RingWriter",
    ),
    "vmbus.errors": (
        "BudgetExceeded",
        "DeviceError",
        "EngineError",
        "GuestMemoryError",
        "HypercallError",
        "LocalProtocolError",
        "ProtocolError",
        "RemoteProtocolError",
        "RingCorrupt",
        "RingEmpty",
        "RingError",
        "RingFull",
        "VmbusError",
    ),
    "vmbus.hypervisor": (
        "PERSONALITIES",
        "Budget",
        "ChildProcess",
        "HostClock",
        "Hypervisor",
        "Partition",
        "Sandbox",
        "VirtualClock",
        "VirtualProcessor",
    ),
    "vmbus.machine.comparison": (
        "Comparison",
        "compare",
    ),
    "vmbus.machine.guest": (
        "Machine",
        "Outcome",
        "Result",
    ),
    "vmbus.machine.model": ("ModelMachine",),
    "vmbus.network": (
        "AdapterConfig",
        "GuestConfig",
        "NetworkAdapter",
        "NetworkVsc",
        "Switch",
    ),
    "vmbus.storage.disk": (
        "Disk",
        "MemoryDisk",
        "RawDisk",
    ),
    "vmbus.storage.guest_disk": ("StorageDisk",),
    "vmbus.storage.images": (
        "create_vhd",
        "create_vhdx",
        "open_disk",
    ),
    "vmbus.storage.redirect": ("RedirectDisk",),
    "vmbus.storage.vsc": ("StorageVsc",),
    "vmbus.storage.vsp": ("StorageVsp",),
    "vmbus.trace.ledger": (
        "Account",
        "Ledger",
    ),
}
"""The public names by the module that has them; each is imported when it is first used (PEP 562), so that
``import vmbus.core.ring`` does not pay for the rooms above it."""

_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "PERSONALITIES",
    "Account",
    "AdapterConfig",
    "Budget",
    "BudgetExceeded",
    "Channel",
    "ChildProcess",
    "Comparison",
    "DeviceError",
    "Disk",
    "Dispatcher",
    "Doorbell",
    "EngineError",
    "GpaRanges",
    "GuestConfig",
    "GuestMemory",
    "GuestMemoryError",
    "HostClock",
    "HypercallError",
    "Hypervisor",
    "Ledger",
    "LocalProtocolError",
    "Machine",
    "MemoryDisk",
    "ModelMachine",
    "NetworkAdapter",
    "NetworkVsc",
    "Offer",
    "Outcome",
    "Packet",
    "Partition",
    "ProtocolError",
    "RawDisk",
    "RedirectDisk",
    "RemoteProtocolError",
    "Result",
    "RingCorrupt",
    "RingEmpty",
    "RingError",
    "RingFull",
    "RingReader",
    "RingWriter",
    "Sandbox",
    "StorageDisk",
    "StorageVsc",
    "StorageVsp",
    "Switch",
    "VirtualClock",
    "VirtualProcessor",
    "VmbusError",
    "VmbusGuest",
    "VmbusHost",
    "Window",
    "compare",
    "create_vhd",
    "create_vhdx",
    "loopback",
    "open_disk",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            value: Any = version("vmbus")
        except PackageNotFoundError:  # a source tree that was never installed
            value = "0+unknown"
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'vmbus' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "__version__"})
