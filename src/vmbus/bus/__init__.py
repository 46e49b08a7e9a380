"""VMBus: the control plane between a parent and a child partition, and the channels it opens.

`VmbusHost` is the parent's end for one child, `VmbusGuest` a model guest's driver; both are thin wirings of the
state machines `HostMachine` and `GuestMachine`, which do no I/O.
"""

from vmbus.bus.channel import Channel, Gpadl, loopback
from vmbus.bus.guest import GuestMachine
from vmbus.bus.guest_run import GuestRun, start_guest
from vmbus.bus.host import HostMachine
from vmbus.bus.hosting import Hosting, Inline, Processes, Threads
from vmbus.bus.offer import Offer
from vmbus.bus.pages import PageAllocator
from vmbus.bus.versions import FeatureFlags, Version
from vmbus.bus.vmbus_guest import VmbusGuest
from vmbus.bus.vmbus_host import Offered, VmbusHost

__all__ = [
    "Channel",
    "FeatureFlags",
    "Gpadl",
    "GuestMachine",
    "GuestRun",
    "HostMachine",
    "Hosting",
    "Inline",
    "Offer",
    "Offered",
    "PageAllocator",
    "Processes",
    "Threads",
    "Version",
    "VmbusGuest",
    "VmbusHost",
    "loopback",
    "start_guest",
]
