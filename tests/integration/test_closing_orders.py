"""Whatever is closed first, nothing is left behind: no hypervisor, no memory, no descriptor, no thread."""

import contextlib
import gc
import itertools
import os
import threading
import weakref
from uuid import UUID

import pytest
from reference.netpair import frame, mac

from vmbus import MemoryDisk, ModelMachine
from vmbus.bus import Inline, Offer, Threads, VmbusGuest, VmbusHost
from vmbus.errors import VmbusError
from vmbus.hypervisor import Hypervisor, VirtualClock
from vmbus.hypervisor.tlfs import Msr
from vmbus.network.adapter import NetworkAdapter
from vmbus.network.switch import Switch
from vmbus.network.vsc import NetworkVsc, default_page_count
from vmbus.network.vsc_protocol import GuestConfig
from vmbus.network.vsp_oid import AdapterConfig
from vmbus.network.wire import INTERFACE_ID
from vmbus.storage.vsc import StorageVsc
from vmbus.storage.vsp import StorageVsp

ORDERS = list(itertools.permutations(("hosting", "root", "storage", "guest")))


def left_behind() -> tuple[int, int]:
    """Descriptors and threads of ours."""
    gc.collect()
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("vmbus")]
    return len(os.listdir("/proc/self/fd")), len(threads)


class World:
    """A guest that has used a disk and an adapter, and has I/O under way if `busy`."""

    def __init__(self, hosting: str, *, given: bool = True) -> None:
        self.hv = Hypervisor(clock=VirtualClock() if hosting == "inline" else None)
        root = self.hv.create_root()
        child = self.hv.create_child(root, "c", memory_size=16 << 20)
        made = (Inline() if hosting == "inline" else Threads(2)) if given else hosting
        self.host = VmbusHost(self.hv, child, hosting=made)
        self.storage = StorageVsp({(0, 0): MemoryDisk(1 << 20)}, workers=2)
        self.storage.offer_on(self.host)
        self.switch = Switch()
        port = self.switch.connect("c")
        NetworkAdapter(self.host, port, AdapterConfig(mac(1)), instance_id=UUID(int=9), name="nic")
        self.guest = VmbusGuest(child.vps[0])
        self.guest.connect()
        disk, nic = sorted(self.guest.offers, key=lambda offer: offer.interface_id == INTERFACE_ID)
        vsc = StorageVsc(self.guest.open(disk, 8, 8), self.guest.pages.allocate(64), timeout=0.2)
        vsc.connect()
        self.disk = vsc.disk()
        self.disk.read(0, 512)
        pages = self.guest.pages.allocate(default_page_count())
        self.nic = NetworkVsc(self.guest.open(nic, 16, 16), pages, GuestConfig())
        self.nic.send(frame(mac(2), mac(1)))

    def end(self, what: str) -> None:
        with contextlib.suppress(VmbusError):  # a guest whose world is gone cannot say good-bye
            match what:
                case "hosting":
                    self.host.hosting.close()
                case "root":
                    self.hv.close()
                case "storage":
                    self.storage.shutdown()
                case "guest":
                    self.guest.close()


def round_(
    order: tuple[str, ...], hosting: str, *, busy: bool = False, given: bool = True
) -> weakref.ref[Hypervisor]:
    world = World(hosting, given=given)

    def read() -> None:
        with contextlib.suppress(VmbusError):
            for _ in range(1000):
                world.disk.read(0, 512)

    reader = threading.Thread(target=read)
    if busy:
        reader.start()
    for what in order:
        world.end(what)
    if busy:
        reader.join()
    return weakref.ref(world.hv)


@pytest.mark.parametrize("hosting", ["inline", "threads"])
@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
def test_in_any_order(order: tuple[str, ...], hosting: str) -> None:
    round_(order, hosting)
    before = left_behind()
    gone = [round_(order, hosting) for _ in range(3)]
    assert left_behind() == before
    assert [ref() for ref in gone] == [None] * 3


@pytest.mark.parametrize("order", [o for o in ORDERS if o[0] == "root"], ids=", ".join)
def test_with_requests_under_way(order: tuple[str, ...]) -> None:
    round_(order, "threads", busy=True)
    before = left_behind()
    gone = [round_(order, "threads", busy=True) for _ in range(2)]
    assert left_behind() == before
    assert [ref() for ref in gone] == [None] * 2


@pytest.mark.parametrize("hosting", ["inline", "threads", "processes"])
def test_a_hosting_that_was_only_named_ends_with_its_hypervisor(hosting: str) -> None:
    order = ("storage", "guest", "root")
    round_(order, hosting, given=False)
    before = left_behind()
    gone = [round_(order, hosting, given=False) for _ in range(3)]
    assert left_behind() == before
    assert [ref() for ref in gone] == [None] * 3


def test_model_machines() -> None:
    def use() -> weakref.ref[Hypervisor]:
        with ModelMachine() as machine:
            disk = machine.add_enlightened_disk(MemoryDisk(1 << 20))
            disk.write(0, bytes(512))
            return weakref.ref(machine.hypervisor)

    use()
    before = left_behind()
    gone = [use() for _ in range(3)]
    assert left_behind() == before
    assert [ref() for ref in gone] == [None] * 3


def test_a_bus_that_is_closed_while_its_partition_lives_on() -> None:
    """Processors are told to call it when their guest makes room: they forget it again."""
    closed = []
    with Hypervisor(clock=VirtualClock()) as hv:
        child = hv.create_child(hv.create_root(), "c", memory_size=8 << 20)
        vp = child.vps[0]
        told = vp.synic.slot_free
        for _ in range(3):
            host = VmbusHost(hv, child)
            closed.append(weakref.ref(host))
            guest = VmbusGuest(vp)
            guest.connect()
            page = vp.rdmsr(Msr.SIMP)
            vp.wrmsr(Msr.SIMP, page & ~1)
            host.offer(Offer(UUID(int=1), UUID(int=2)))
            vp.wrmsr(Msr.SIMP, page)
            assert len(guest.offers) == 1
            guest.close()
            host.close()
            del host, guest
        gc.collect()
        assert [host() for host in closed] == [None] * 3
        assert vp.synic.slot_free == told
