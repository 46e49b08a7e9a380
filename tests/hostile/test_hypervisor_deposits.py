"""A partition that deposits pages which other things stand on, or which its parent takes or changes meanwhile."""

import struct

import pytest
from reference.raw_guest import SIM, RawGuest

from vmbus.core.memory import EXECUTE, READ, WRITE
from vmbus.errors import GuestMemoryError, HypercallError
from vmbus.hypervisor import GeneralProtectionFault, Hypervisor
from vmbus.hypervisor.personality import ROOT_PRIVILEGES
from vmbus.hypervisor.tlfs import PARTITION_ID_SELF, CallCode, MapFlags, Msr, Status
from vmbus.hypervisor.wire import CreatePartition, MapGpaPages

SIZE = 1 << 18
PAGE = 0x20_000
ALL = READ | WRITE | EXECUTE


def q(*values):
    return struct.pack(f"<{len(values)}Q", *values)


@pytest.fixture
def hv():
    hypervisor = Hypervisor()
    yield hypervisor
    hypervisor.root.destroy()


@pytest.fixture
def root(hv):
    return RawGuest(hv.create_root(memory_size=1 << 20).vps[0])


@pytest.fixture
def middle(hv, root):
    """A child that may do everything, as one that has children of its own."""
    child = hv.create_child(root.vp.partition, "middle", memory_size=SIZE, privileges=ROOT_PRIVILEGES)
    return RawGuest(child.vps[0])


def deposit(guest, target, gpa):
    return guest.rep(CallCode.DEPOSIT_MEMORY, q(target), [q(gpa >> 12)])[0]


def withdraw(guest, target):
    return guest.rep(CallCode.WITHDRAW_MEMORY, q(target, 0), [], count=1, output=8)[0]


def remap(root, child, gpa, flags, call=CallCode.MAP_GPA_PAGES):
    header = MapGpaPages(child.vp.partition.id, gpa >> 12, flags, 0).pack()
    elements = [q(0x80_000 >> 12)] if call == CallCode.MAP_GPA_PAGES else []
    assert root.rep(call, header, elements, count=1)[0] == Status.SUCCESS


def below(middle):
    """A partition that `middle` makes by hypercall, which takes deposits."""
    status, out = middle.call(CallCode.CREATE_PARTITION, CreatePartition(0, 0, 0, 0, b"", 0, 0).pack(), 8)
    assert status == Status.SUCCESS
    return int.from_bytes(out, "little")


@pytest.mark.parametrize(("register", "offset"), [(Msr.SIMP, 0), (Msr.SIEFP, 0x1000)])
def test_a_deposited_page_takes_the_synic_page_over_it_along(middle, register, offset):
    vp, page = middle.vp, SIM + offset
    assert deposit(middle, PARTITION_ID_SELF, page) == Status.SUCCESS
    assert vp.rdmsr(register) & 1 == 0, "as if the guest had disabled it"
    with pytest.raises(GeneralProtectionFault):
        vp.wrmsr(register, page | 1)  # there is no page of the guest's there to lie over
    vp.wrmsr(register, PAGE | 1)
    assert vp.partition.is_overlay(PAGE)
    assert withdraw(middle, PARTITION_ID_SELF) == Status.SUCCESS
    assert vp.partition.memory.read(page, 4096) == bytes(4096)


def test_a_deposited_message_page_takes_no_messages_until_there_is_another(hv, middle):
    child = middle.vp.partition
    assert deposit(middle, PARTITION_ID_SELF, SIM) == Status.SUCCESS
    with pytest.raises(HypercallError) as refused:
        hv.post_message(child, 0, 2, 1, 0, b"too early")
    assert refused.value.status == Status.INVALID_SYNIC_STATE
    middle.vp.wrmsr(Msr.SIMP, PAGE | 1)
    hv.post_message(child, 0, 2, 1, 0, b"in time")
    assert child.memory.read(PAGE + 2 * 256 + 16, 7) == b"in time"


@pytest.mark.parametrize("end", ["withdraw", "destroy"])
def test_a_deposited_page_that_the_parent_unmaps_stays_away(hv, root, middle, end):
    target = below(middle)
    assert deposit(middle, target, PAGE) == Status.SUCCESS
    remap(root, middle, PAGE, 0, CallCode.UNMAP_GPA_PAGES)
    if end == "withdraw":
        assert withdraw(middle, target) == Status.SUCCESS
    hv.partitions[target].destroy()
    memory = middle.vp.partition.memory
    assert memory.access(PAGE) == 0
    with pytest.raises(GuestMemoryError):
        memory.read(PAGE, 1)


@pytest.mark.parametrize("end", ["withdraw", "destroy"])
def test_a_page_mapped_over_a_deposited_one_keeps_its_own_rights(hv, root, middle, end):
    """Withdrawing must not make writable what the parent mapped read-only."""
    target = below(middle)
    assert deposit(middle, target, PAGE) == Status.SUCCESS
    remap(root, middle, PAGE, MapFlags.READABLE)
    if end == "withdraw":
        assert withdraw(middle, target) == Status.SUCCESS
    hv.partitions[target].destroy()
    assert middle.vp.partition.memory.access(PAGE) == READ


def test_a_page_deposited_twice_comes_back_with_the_second_deposit(hv, root, middle):
    target = below(middle)
    memory = middle.vp.partition.memory
    assert deposit(middle, target, PAGE) == Status.SUCCESS
    assert deposit(middle, target, PAGE) == Status.INVALID_PARAMETER, "it is out of reach"
    remap(root, middle, PAGE, MapFlags.READABLE | MapFlags.WRITABLE | MapFlags.KERNEL_EXECUTABLE)
    assert deposit(middle, PARTITION_ID_SELF, PAGE) == Status.SUCCESS
    assert withdraw(middle, target) == Status.SUCCESS
    assert memory.access(PAGE) == 0, "the page that lies there now is still deposited"
    assert withdraw(middle, PARTITION_ID_SELF) == Status.SUCCESS
    assert memory.access(PAGE) == ALL
