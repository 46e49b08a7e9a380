"""A guest that asks for more than its share of what all guests of a process live from, with a neighbour beside it."""

import gc
import os
import resource
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest
from reference.eventually import eventually
from reference.raw_guest import RawGuest

from vmbus import Budget, BudgetExceeded, HypercallError, ModelMachine
from vmbus.bus import Channel, Offer, VmbusGuest, VmbusHost
from vmbus.bus.held_pages import HeldPages
from vmbus.core.memory import PAGE_SIZE, GpaRanges, GuestMemory
from vmbus.errors import RemoteProtocolError
from vmbus.hypervisor import ChildProcess, HostClock, Hypervisor, Partition
from vmbus.hypervisor.budget import Allowance, Meter, ProcessPool
from vmbus.hypervisor.hypervisor import PARTITION_COST
from vmbus.hypervisor.personality import ROOT_PRIVILEGES
from vmbus.hypervisor.tlfs import PARTITION_ID_SELF, CallCode, MapFlags, PortType, Status
from vmbus.hypervisor.wire import ConnectPort, CreatePartition, CreatePort, MapGpaPages
from vmbus.storage.disk import Buffer, Disk, DiskError, MemoryDisk
from vmbus.storage.growth import LimitedDisk, limited
from vmbus.storage.images import create_vhd, create_vhdx
from vmbus.storage.scsi.codes import AdditionalSense, SenseKey
from vmbus.storage.vsc import CommandError

KIND = UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f")
MIB = 1 << 20
RWX = MapFlags.READABLE | MapFlags.WRITABLE | MapFlags.KERNEL_EXECUTABLE


def q(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def mappings_of_process() -> int:
    return Path("/proc/self/maps").read_bytes().count(b"\n")


def mappings_of_guests() -> int:
    """Those of guests' memory; the others of the process come and go with its threads and allocators."""
    return Path("/proc/self/maps").read_bytes().count(b"memfd:vmbus-guest")


class Child:
    """A partition with a bus of a few echo devices, and the driver in it."""

    def __init__(self, hv: Hypervisor, name: str, devices: int = 2, budget: Budget | None = None) -> None:
        assert hv.root is not None
        self.partition = hv.create_child(hv.root, name, memory_size=8 * MIB, budget=budget)
        self.host = VmbusHost(hv, self.partition)
        self.windows: list[object] = []
        for number in range(devices):
            self.host.offer(Offer(KIND, UUID(int=number + 1)), self.opened, name=f"echo{number}")
        self.guest = VmbusGuest(self.partition.vps[0])
        self.guest.connect()

    def opened(self, channel: Channel) -> None:
        def echo() -> None:
            for packet in channel.incoming.recv_packets(64):
                if packet.payload[:4] == b"map!":
                    self.windows.append(channel.gpadl(int.from_bytes(packet.payload[4:8], "little")).window())
                channel.send(packet.payload)

        channel.on_signal = echo

    def scattered(self, pages: int) -> tuple[int, list[int]]:
        """A ring whose pages are all the same two, in turn: (pages of the first ring, page numbers)."""
        first = self.guest.pages.allocate(6)
        for pfn in first[:2]:
            self.partition.memory.write(pfn * PAGE_SIZE, bytes(PAGE_SIZE))
        up = pages // 2
        pfns = [first[0], *(first[2 + 2 * (n & 1)] for n in range(up - 1))]
        return up, [*pfns, first[1], *(first[2 + 2 * (n & 1)] for n in range(pages - up - 1))]

    def open_raw(self, offer: Offer, up: int, pfns: list[int]) -> int:
        """The host's status of an OPEN_CHANNEL with a ring of these pages."""
        guest = self.guest
        gpadl_id = guest._make_gpadl(offer.channel_id, GpaRanges([(len(pfns) * PAGE_SIZE, 0, pfns)]))
        with guest._lock:
            guest._post(guest.machine.open(offer.channel_id, gpadl_id, up))
        return guest._answer("open", offer.channel_id)

    def works(self, offer: Offer | None = None) -> bool:
        """Whether a channel can be opened, used and closed."""
        with self.guest.open(offer or self.guest.offers[0]) as channel:
            channel.send(b"are you there?")
            return channel.incoming.recv() == b"are you there?\0\0"


@pytest.fixture
def hv() -> Iterator[Hypervisor]:
    with Hypervisor() as hypervisor:
        hypervisor.create_root(memory_size=4 * MIB)
        yield hypervisor


# -- mappings ------------------------------------------------------------------------------------------------


def test_guests_with_rings_of_scattered_pages_leave_mappings_to_the_others(hv: Hypervisor) -> None:
    """Several at once, each with the default budget: the operating system's limit is not reached."""
    victim = Child(hv, "victim")
    attackers = [Child(hv, f"attacker{n}", devices=6) for n in range(5)]
    statuses = []
    for attacker in attackers:
        up, pfns = attacker.scattered(8190)
        statuses += [attacker.open_raw(offer, up, pfns) for offer in attacker.guest.offers]
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    assert any(statuses), "nothing was refused"
    assert any(status == 0 for status in statuses), "what is within the budget is served"
    assert mappings_of_process() < limit - 2000
    assert victim.works()
    assert Child(hv, "late").works(), "whoever comes later has its assured part"
    GuestMemory(8 * MIB).close()
    for attacker in attackers:
        assert attacker.partition.meter.mappings.refused
        assert attacker.partition.meter.mappings.most <= Budget().mappings  # type: ignore[operator]


def test_a_refused_ring_costs_its_channel_only_and_nothing_stays_charged(
    hv: Hypervisor, caplog: pytest.LogCaptureFixture
) -> None:
    child = Child(hv, "greedy", budget=Budget(mappings=100))
    mappings = child.partition.meter.mappings
    first, second = child.guest.offers
    up, pfns = child.scattered(100)
    assert child.open_raw(first, up, pfns) != 0
    assert "asks its host for" in caplog.text
    assert mappings.used == 0
    assert child.works(second)
    assert child.works(first), "the same channel with a ring that it can pay for"
    channel = child.guest.open(first)
    assert mappings.used == 16, "eight for each end, both of which are in this process"
    channel.close()
    del channel
    assert mappings.used == 0, "not only when the garbage collector comes by"


def test_what_a_ring_of_adjacent_pages_costs() -> None:
    """Runs of pages are one mapping; the data area is mapped twice, and two guard pages lie around it."""
    memory = GuestMemory(64 * PAGE_SIZE)
    for pfns, mirrored, expected in (
        (range(4, 36), False, 1 + 2),
        (range(4, 36), True, 2 + 2),
        ([4, *range(10, 20)], True, 3 + 2),
        ([5, 4, 3], False, 3 + 2),
        ([4] * 10, True, 10 + 9 + 2),
    ):
        before = mappings_of_guests()
        window = memory.window(pfns, mirrored=mirrored)
        assert window.mappings == expected
        assert mappings_of_guests() - before == expected - 2, "beside the guards, which have no file"
        window.close()
        assert mappings_of_guests() == before


@pytest.mark.parametrize("order", ["channel first", "partition first", "garbage"])
def test_mappings_come_back_in_every_closing_order(hv: Hypervisor, order: str) -> None:
    child = Child(hv, "closing")
    mappings = child.partition.meter.mappings
    channel = child.guest.open(child.guest.offers[0])
    ring = channel.outgoing
    assert mappings.used
    if order == "channel first":
        channel.close()
    child.partition.destroy()
    child.guest.abandon()
    if order == "garbage":
        ring.send(b"into nowhere")  # whoever still holds a ring holds its mapping
        assert mappings.used
    del child, channel, ring
    gc.collect()
    assert mappings.used == 0


def test_a_gpadl_that_a_provider_maps_is_charged_and_given_back(hv: Hypervisor) -> None:
    child = Child(hv, "buffers", budget=Budget(mappings=60))
    channel = child.guest.open(child.guest.offers[0])
    before = child.partition.meter.mappings.used
    page = child.guest.pages.allocate(8)[0]
    small = channel.create_gpadl([page + n % 2 * 2 for n in range(20)])
    large = channel.create_gpadl([page + n % 2 * 2 for n in range(100)])
    channel.send(b"map!" + small.to_bytes(4, "little"))
    assert child.partition.meter.mappings.used == before + 22
    channel.send(b"map!" + large.to_bytes(4, "little"))
    assert not channel.is_open, "the channel that asked for more is taken away"
    child.windows.clear()
    assert child.partition.meter.mappings.used <= before, "its buffer is unmapped with it"
    assert child.works(child.guest.offers[-1])


# -- GPADLs and messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [Budget(gpadls=5), Budget(gpadl_pages=60)])
def test_gpadls_beyond_the_budget_are_refused(hv: Hypervisor, budget: Budget) -> None:
    child, victim = Child(hv, "describes", budget=budget), Child(hv, "victim")
    channel = child.guest.open(child.guest.offers[0])
    refused = child.partition.meter.gpadls if budget.gpadls == 5 else child.partition.meter.gpadl_pages
    made = [channel.create_gpadl(range(16, 26)) for _ in range(4)]
    with pytest.raises(RemoteProtocolError, match="the host refused GPADL"):
        channel.create_gpadl(range(16, 26))  # beside the ring and the four
    assert refused.refused == 1
    channel.send(b"still here")
    assert channel.incoming.recv() == b"still here".ljust(16, b"\0")
    assert victim.works()
    channel.teardown_gpadl(made.pop())
    made.append(channel.create_gpadl(range(16, 26)))
    channel.close()
    child.guest.close()
    assert (child.partition.meter.gpadls.used, child.partition.meter.gpadl_pages.used) == (0, 0)


def test_messages_that_are_not_read(hv: Hypervisor) -> None:
    """Beyond the budget the connection is reset; a new one serves, and nothing stays charged."""
    child, victim = Child(hv, "deaf", budget=Budget(backlog=10)), Child(hv, "victim")
    vp = child.partition.vps[0]
    handler, vp.on_interrupt = vp.on_interrupt, None
    for number in range(2000):  # behind the hypervisor's own queue
        if not child.host.version:
            break
        child.host.offer(Offer(KIND, UUID(int=100 + number))).rescind()
    backlog = child.partition.meter.backlog
    assert child.host.version == 0
    assert (backlog.most, backlog.used, backlog.refused) == (10, 0, 1)
    assert victim.works()
    child.guest.abandon()
    vp.on_interrupt = handler
    again = VmbusGuest(vp)
    again.connect()
    assert again.open(again.offers[0]).is_open
    again.close()


# -- what hypercalls make the host keep ----------------------------------------------------------------------


@pytest.fixture
def middle(hv: Hypervisor) -> RawGuest:
    """A child that may have children of its own, with room for three of them."""
    assert hv.root is not None
    child = hv.create_child(
        hv.root,
        "middle",
        memory_size=1 * MIB,
        privileges=ROOT_PRIVILEGES,
        budget=Budget(host_memory=3 * PARTITION_COST + PARTITION_COST // 2, mappings=100),
    )
    return RawGuest(child.vps[0])


def create(guest: RawGuest) -> tuple[int, int]:
    status, out = guest.call(CallCode.CREATE_PARTITION, CreatePartition(0, 0, 0, 0, b"", 0, 0).pack(), 8)
    return status, int.from_bytes(out, "little")


def test_partitions_that_a_guest_makes_spend_its_budget(hv: Hypervisor, middle: RawGuest) -> None:
    """Each costs the host megabytes before a page is deposited for it."""
    seen: list[object] = []
    middle.vp.partition.on_event = seen.append
    made = []
    for _ in range(20):
        status, partition_id = create(middle)
        if status:
            break
        made.append(partition_id)
    assert status == Status.INSUFFICIENT_MEMORY
    assert len(made) == 3
    assert [type(event.detail) for event in seen] == [BudgetExceeded]  # type: ignore[attr-defined]
    assert hv.root is not None
    other = hv.create_child(hv.root, privileges=ROOT_PRIVILEGES, memory_size=1 * MIB)
    assert create(RawGuest(other.vps[0]))[0] == Status.SUCCESS
    assert hv.partitions[made[0]].meter is middle.vp.partition.meter
    assert middle.call(CallCode.DELETE_PARTITION, q(made[0]))[0] == Status.SUCCESS
    assert create(middle)[0] == Status.SUCCESS
    meter = middle.vp.partition.meter
    middle.vp.partition.destroy()
    assert meter.host_memory.used == 0


def test_a_root_without_limits_has_guests_with_limits(hv: Hypervisor) -> None:
    assert hv.root is not None
    made = hv.create_uninitialized(hv.root)
    assert made.meter.budget == Budget()
    assert hv.root.meter.budget == Budget.unlimited()
    limited_root = Hypervisor()
    with limited_root:
        root = limited_root.create_root(budget=Budget(host_memory=PARTITION_COST))
        limited_root.create_uninitialized(root)
        with pytest.raises(BudgetExceeded, match="root asks its host for"):
            limited_root.create_uninitialized(root)


def test_ports_and_connections_spend_host_memory(middle: RawGuest) -> None:
    own = middle.vp.partition.id
    statuses = []
    for number in range(1, 40_000):
        port = CreatePort(PARTITION_ID_SELF, number, 0, 0, 0, own, PortType.MESSAGE, 0, 2, 0, 0)
        connection = ConnectPort(
            PARTITION_ID_SELF, number, 0, 0, 0, own, number, 0, PortType.MESSAGE, 0, b"", 0
        )
        for code, call in ((CallCode.CREATE_PORT, port), (CallCode.CONNECT_PORT, connection)):
            statuses.append(middle.call(code, call.pack())[0])
        if any(statuses[-2:]):
            break
    assert Status.INSUFFICIENT_MEMORY in statuses[-2:]
    assert set(statuses[:-2]) == {Status.SUCCESS}
    meter = middle.vp.partition.meter
    assert meter.host_memory.used <= meter.host_memory.limit  # type: ignore[operator]
    middle.vp.partition.destroy()
    assert meter.host_memory.used == 0


def test_pages_lent_to_many_children_spend_host_memory(hv: Hypervisor, middle: RawGuest) -> None:
    """Who has which page from whom is noted: the same few pages, lent over and over, cost the host memory."""
    host_memory = middle.vp.partition.meter.host_memory
    children = [create(middle)[1] for _ in range(3)]
    before = host_memory.used
    assert lend(middle, children[0], 5, 40) == Status.SUCCESS
    cost = host_memory.used - before
    assert cost > 0
    host_memory.charge(host_memory.limit - host_memory.used - cost)  # type: ignore[operator]
    assert lend(middle, children[1], 5, 40) == Status.SUCCESS
    assert lend(middle, children[2], 5, 40) == Status.INSUFFICIENT_MEMORY
    assert take(middle, children[0], 5) == Status.SUCCESS
    assert lend(middle, children[2], 5, 40) == Status.SUCCESS
    middle.vp.partition.destroy()
    assert host_memory.used == host_memory.limit - before - 2 * cost  # type: ignore[operator]


def lend(parent: RawGuest, child_id: int, target: int, source: int) -> int:
    header = MapGpaPages(child_id, target, RWX, 0).pack()
    return parent.rep(CallCode.MAP_GPA_PAGES, header, [q(source)])[0]


def take(parent: RawGuest, child_id: int, target: int) -> int:
    header = MapGpaPages(child_id, target, 0, 0).pack()
    return parent.rep(CallCode.UNMAP_GPA_PAGES, header, [], count=1)[0]


@pytest.mark.parametrize("how", ["scattered", "unmapped", "deposited"])
def test_memory_maps_that_fall_apart(hv: Hypervisor, middle: RawGuest, how: str) -> None:
    """Every other page lent to a child, taken from it, or deposited: each splits a mapping of the process in three."""
    status, child_id = create(middle)
    assert status == Status.SUCCESS
    mappings = middle.vp.partition.meter.mappings
    before = mappings_of_guests()
    if how == "scattered":
        results = [lend(middle, child_id, 2 * n, 128) for n in range(400)]
    else:
        whole = [lend(middle, child_id, n, 16 + n) for n in range(240)]
        assert set(whole) == {Status.SUCCESS}
        assert mappings.used <= 2, "adjacent pages are one mapping"
        if how == "unmapped":
            results = [take(middle, child_id, 2 * n) for n in range(120)]
        else:
            results = [
                middle.rep(CallCode.DEPOSIT_MEMORY, q(PARTITION_ID_SELF), [q(16 + 2 * n)])[0]
                for n in range(120)
            ]
    assert results[0] == Status.SUCCESS
    assert results[-1] == Status.INSUFFICIENT_MEMORY
    assert mappings.used <= 100 + 2
    assert mappings_of_guests() - before <= mappings.used + 20
    middle.vp.partition.destroy()
    gc.collect()
    assert mappings.used == 0


def test_pages_are_taken_back_whatever_that_costs(hv: Hypervisor, middle: RawGuest) -> None:
    """The root takes a guest's pages: what its children have of them goes, although they are beyond their budget."""
    assert hv.root is not None
    status, child_id = create(middle)
    assert status == Status.SUCCESS
    grandchild = hv.partitions[child_id]
    for n in range(200):
        assert lend(middle, child_id, n, 32 + n) == Status.SUCCESS
    for n in range(0, 200, 2):
        assert take(RawGuest(hv.root.vps[0]), middle.vp.partition.id, 32 + n) == Status.SUCCESS
    assert [grandchild.memory.access(n << 12) != 0 for n in range(200)] == [False, True] * 100
    assert middle.vp.partition.meter.mappings.used > 100
    assert lend(middle, child_id, 210, 33) == Status.INSUFFICIENT_MEMORY, "and nothing more until it has room"


def test_a_hypercall_that_finds_no_memory_says_so(middle: RawGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host itself has none: an error of the call, not of whoever executes the guest."""
    for error in (MemoryError(), OSError(12, "Cannot allocate memory")):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("vmbus.hypervisor.hypervisor.GuestMemory", fail)
        assert create(middle)[0] == Status.INSUFFICIENT_MEMORY
    assert middle.vp.partition.meter.host_memory.used == 0


# -- descriptors ---------------------------------------------------------------------------------------------


def test_doorbells_of_a_child_process_leave_descriptors_to_the_others(
    hv: Hypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rings more flags than it may have eventfds; all arrive, those beyond through its socket."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    with Hypervisor(clock=HostClock()) as hypervisor:
        root = hypervisor.create_root()
        child = hypervisor.create_child(root, "rings", memory_size=MIB)
        rung: set[int] = set()
        hypervisor.create_event_port(child, 2, rung.add)
        try:
            process = ChildProcess(child, "reference.process_guests:ring_flags", {"flags": 1500})
            assert eventually(lambda: len(rung) == 1500 or process.wait(0) is not None)
            assert len(rung) == 1500
            descriptors = child.meter.descriptors
            assert descriptors.used == 512
            assert len(os.listdir("/proc/self/fd")) < 700
            Path("/dev/null").open().close()
            victim = hypervisor.create_child(root, "victim", memory_size=MIB)
            hypervisor.create_event_port(victim, 2, lambda flag: None)
            other = ChildProcess(victim, "reference.process_guests:ring_flags", {"flags": 3})
            assert eventually(lambda: victim.meter.descriptors.used == 3)
            other.kill()
            process.kill()
            assert (descriptors.used, victim.meter.descriptors.used) == (0, 0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- disks ---------------------------------------------------------------------------------------------------


def test_a_disk_that_may_grow_only_so_far() -> None:
    allowance = Meter(Budget(disk_growth=64 << 10), "small").disk_growth
    with limited(MemoryDisk(MIB, content=b"x" * 8192), allowance) as disk:
        assert isinstance(disk, LimitedDisk)
        assert disk.fd < 0
        assert disk.mapping is None
        disk.write(0, b"y" * 8192)
        assert allowance.used == 0, "that space was allocated before"
        disk.write(8192, b"z" * 512)
        assert allowance.used == 4096
        disk.write_through(12288, b"z" * 4096)
        disk.write_zeros(16384, 52 << 10)
        assert allowance.used == 60 << 10
        with pytest.raises(DiskError, match="small asks its host for 8,192 disk growth") as refused:
            disk.write(512 << 10, bytes(8192))
        assert refused.value.errno == 28
        assert disk.read(512 << 10, 512) == bytes(512)
        disk.write(512 << 10, bytes(4096))
        disk.unmap(16384, 52 << 10)
        assert allowance.used == 12 << 10
        disk.write(768 << 10, bytes(8192))
        disk.flush()
        assert disk.size == MIB
    plain = MemoryDisk(MIB)
    assert limited(plain, Meter(Budget()).disk_growth) is plain, "without a limit there is nothing in between"
    plain.close()


def test_what_is_given_back_during_a_write_is_charged_again() -> None:
    """A write over allocated blocks costs nothing; given back beneath it, they would be allocated for nothing."""

    class Held(MemoryDisk):
        entered, gate = threading.Event(), threading.Event()
        held = False

        def write(self, offset: int, data: Buffer) -> None:
            if self.held:
                self.entered.set()
                assert self.gate.wait(30)
            super().write(offset, data)

    allowance = Meter(Budget(disk_growth=2 * MIB), "small").disk_growth
    with Held(8 * MIB) as inner:
        disk = LimitedDisk(inner, allowance)
        disk.write(0, bytes([1]) * MIB)
        inner.held = True
        threads = [
            threading.Thread(target=disk.write, args=(0, bytes([2]) * MIB), daemon=True),
            threading.Thread(target=disk.unmap, args=(0, MIB), daemon=True),
        ]
        threads[0].start()
        assert inner.entered.wait(30)
        threads[1].start()
        threads[1].join(0.2)
        inner.gate.set()
        for thread in threads:
            thread.join(30)
        allocated = sum(extent.length for extent in inner.extents(0, 8 * MIB) if extent.allocated)
        assert allowance.used == allocated


def test_a_write_beneath_another_one_on_its_thread_is_charged_too() -> None:
    class Nested(MemoryDisk):
        then: Callable[[], object] | None = None

        def write(self, offset: int, data: Buffer) -> None:
            then, self.then = self.then, None
            if then is not None:
                then()
            super().write(offset, data)

    allowance = Meter(Budget(disk_growth=MIB), "small").disk_growth
    with Nested(MIB) as inner:
        disk = LimitedDisk(inner, allowance)
        inner.then = lambda: disk.write(512 << 10, bytes([1]) * 4096)
        disk.write(0, bytes([1]) * 4096)
        assert allowance.used == sum(extent.length for extent in inner.extents(0, MIB) if extent.allocated)


@pytest.mark.parametrize("create", [create_vhd, create_vhdx])
def test_what_a_parent_has_takes_space_when_it_is_overwritten(
    create: Callable[..., Disk], tmp_path: Path
) -> None:
    """The usual case: many guests on one image, each with a child of it."""
    with create(tmp_path / "parent", 16 * MIB, block_size=MIB) as parent:
        parent.write(0, b"p" * (16 * MIB))
    allowance = Meter(Budget(disk_growth=4 * MIB), "small").disk_growth
    with limited(create(tmp_path / "child", parent=tmp_path / "parent", block_size=MIB), allowance) as disk:
        for number in range(4):
            disk.write(number * MIB, b"c" * MIB)
        assert allowance.used == 4 * MIB
        with pytest.raises(DiskError, match="small asks its host"):
            disk.write(8 * MIB, b"c" * MIB)
        assert disk.read(8 * MIB, 512) == b"p" * 512
        assert [extent.allocated for extent in disk.extents(0, 16 * MIB)] == [True]
        disk.unmap(9 * MIB, 4 * MIB)  # of the parent's: nothing of the host's comes back
        assert allowance.used == 4 * MIB
        disk.unmap(0, MIB)
        assert allowance.used == 3 * MIB


def test_a_guest_is_told_that_its_disk_cannot_grow(hv: Hypervisor) -> None:
    with MemoryDisk(MIB) as disk, ModelMachine(budget=Budget(disk_growth=8192)) as machine:
        seen = machine.add_disk(disk)
        seen.write(0, b"a" * 8192)
        with pytest.raises(CommandError) as refused:
            seen.write(65536, b"b" * 512)
        sense = refused.value.sense
        assert (sense.key, sense.additional) == (
            SenseKey.DATA_PROTECT,
            AdditionalSense.SPACE_ALLOCATION_FAILED,
        )
        assert seen.read(0, 8192) == b"a" * 8192


# -- the accounts --------------------------------------------------------------------------------------------


def test_an_account() -> None:
    account = Allowance("mappings", 10, "somebody")
    account.charge(7)
    with pytest.raises(
        BudgetExceeded, match="somebody asks its host for 4 mappings beside the 7 it has, of at most 10"
    ):
        account.charge(4)
    account.charge(3)
    account.release(5)
    assert (account.used, account.most, account.refused) == (5, 10, 1)
    account.adjust(20)
    with pytest.raises(BudgetExceeded):
        account.charge(0)
    assert "25" in repr(account)
    assert "mappings 3" in repr(_charged(Meter(Budget())))


def _charged(meter: Meter) -> Meter:
    meter.mappings.charge(3)
    return meter


def test_a_pool_that_never_gives_all() -> None:
    pool = ProcessPool(lambda: 100, assured=5)
    greedy, other, late = (Allowance("mappings", 1000, name, pool) for name in "abc")
    greedy.charge(5 + 70)
    with pytest.raises(BudgetExceeded, match="the process has no more to spare"):
        other.charge(5 + 6)
    other.charge(5 + 5)
    with pytest.raises(BudgetExceeded):
        greedy.charge(1)
    late.charge(5)
    with pytest.raises(BudgetExceeded):
        late.charge(1)
    greedy.release(75)
    late.charge(70)
    assert pool.beyond == 75
    other.release(10)
    late.release(75)
    assert pool.beyond == 0


@pytest.mark.parametrize("bad", [-1, 1.5, "many"])
def test_a_budget_of_nonsense(bad: object) -> None:
    with pytest.raises(ValueError, match="a budget's mappings is a number from 0 up or None"):
        Budget(mappings=bad)  # type: ignore[arg-type]


def test_nothing_is_allowed_to_a_guest_without_a_budget(hv: Hypervisor) -> None:
    nothing = Budget(
        mappings=0, descriptors=0, gpadls=0, gpadl_pages=0, backlog=0, host_memory=0, disk_growth=0
    )
    child = Child(hv, "pauper", budget=nothing)
    with pytest.raises(BudgetExceeded):
        child.guest.open(child.guest.offers[0])
    with pytest.raises(RemoteProtocolError, match="refused"):
        child.guest._make_gpadl(child.guest.offers[0].channel_id, GpaRanges([(PAGE_SIZE, 0, [16])]))
    with pytest.raises(HypercallError):
        hv.post_message(child.partition, 5, 2, 1, 0, b"")
    assert isinstance(child.partition, Partition)


def test_what_is_given_back_while_something_is_charged_is_not_forgotten() -> None:
    """The garbage collector finds a window whenever it likes, also inside of a charge, on the same thread."""
    given_back: list[int] = []

    def capacity() -> int:
        if given_back:
            account.release(given_back.pop())
        return 1000

    pool = ProcessPool(capacity, 10)
    account = Allowance("mappings", 10_000, pool=pool)
    account.charge(100)
    given_back.append(60)
    account.charge(5)
    assert (account.used, pool.beyond) == (45, 35)
    account.release(45)
    assert (account.used, pool.beyond) == (0, 0)


def test_pages_that_could_not_be_held_are_held_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldPages(64)
    with monkeypatch.context() as full:
        full.setattr("numpy.zeros", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            held.hold(7, [3, 5])
    held.let_go(7)
    held.hold(7, [3, 5])
    assert held.holders(5) == [7]
    held.let_go(7)
    assert held.holders(5) == []
