"""What a partition is taken - pages, privileges, processors - is gone for everybody who had it through that one."""

import gc
import struct
import weakref

import pytest
from reference.raw_guest import HYPERCALL_GPA, RawGuest

from vmbus.core.dispatch import EventFlags
from vmbus.core.memory import EXECUTE, READ, WRITE
from vmbus.errors import GuestMemoryError, HypercallError
from vmbus.hypervisor import GeneralProtectionFault, Hypervisor, VirtualClock, VpSuspended
from vmbus.hypervisor.personality import ROOT_PRIVILEGES
from vmbus.hypervisor.tlfs import (
    PARTITION_ID_SELF,
    CallCode,
    MapFlags,
    Msr,
    PartitionProperty,
    PortType,
    Privilege,
    RegisterName,
    Status,
)
from vmbus.hypervisor.wire import ConnectPort, CreatePort, CreateVp, MapGpaPages, VpReference

SIZE = 1 << 18
ALL = READ | WRITE | EXECUTE
RWX = MapFlags.READABLE | MapFlags.WRITABLE | MapFlags.KERNEL_EXECUTABLE
ROOT_PAGE, MIDDLE_PAGE, LOW_PAGE, BOTTOM_PAGE = 0x80_000, 0x20_000, 0x30_000, 0x38_000


def q(*values):
    return struct.pack(f"<{len(values)}Q", *values)


@pytest.fixture
def clock():
    return VirtualClock()


@pytest.fixture
def hv(clock):
    hypervisor = Hypervisor(clock=clock)
    yield hypervisor
    hypervisor.root.destroy()


@pytest.fixture
def root(hv):
    return RawGuest(hv.create_root(memory_size=1 << 20).vps[0])


def child_of(hv, parent, name):
    child = hv.create_child(parent.vp.partition, name, memory_size=SIZE, vps=2, privileges=ROOT_PRIVILEGES)
    return RawGuest(child.vps[0])


@pytest.fixture
def chain(hv, root):
    """A page of the root's, handed down three levels with all rights."""
    middle = child_of(hv, root, "middle")
    low = child_of(hv, middle, "low")
    bottom = child_of(hv, low, "bottom")
    for parent, source, child, target in (
        (root, ROOT_PAGE, middle, MIDDLE_PAGE),
        (middle, MIDDLE_PAGE, low, LOW_PAGE),
        (low, LOW_PAGE, bottom, BOTTOM_PAGE),
    ):
        assert map_page(parent, child, target, source) == Status.SUCCESS
    assert bottom.memory.backing(BOTTOM_PAGE) == root.memory.backing(ROOT_PAGE)
    return middle, low, bottom


def map_page(parent, child, target, source, flags=RWX):
    header = MapGpaPages(child.vp.partition.id, target >> 12, flags, 0).pack()
    return parent.rep(CallCode.MAP_GPA_PAGES, header, [q(source >> 12)])[0]


def unmap_page(parent, child, target):
    header = MapGpaPages(child.vp.partition.id, target >> 12, 0, 0).pack()
    return parent.rep(CallCode.UNMAP_GPA_PAGES, header, [], count=1)[0]


def take_back(how, root, middle):
    if how == "unmapped":
        assert unmap_page(root, middle, MIDDLE_PAGE) == Status.SUCCESS
    elif how == "made read-only":
        assert map_page(root, middle, MIDDLE_PAGE, ROOT_PAGE, MapFlags.READABLE) == Status.SUCCESS
    elif how == "replaced":
        assert map_page(root, middle, MIDDLE_PAGE, ROOT_PAGE + 0x1000) == Status.SUCCESS
    else:
        status = middle.rep(CallCode.DEPOSIT_MEMORY, q(PARTITION_ID_SELF), [q(MIDDLE_PAGE >> 12)])[0]
        assert status == Status.SUCCESS


WAYS = ["unmapped", "made read-only", "replaced", "deposited"]


@pytest.mark.parametrize("how", WAYS)
def test_a_page_that_is_taken_back_is_gone_for_those_below(hv, root, chain, how):
    middle, low, bottom = chain
    take_back(how, root, middle)
    assert low.memory.access(LOW_PAGE) == bottom.memory.access(BOTTOM_PAGE) == 0
    with pytest.raises(GuestMemoryError):
        bottom.memory.write(BOTTOM_PAGE, b"still mine")
    assert root.memory.read(ROOT_PAGE, 10) == bytes(10)


@pytest.mark.parametrize("how", WAYS)
def test_so_is_the_hypervisor_page_that_lay_on_it(hv, root, chain, how):
    """The lowest one's message page must not be written back, or into, once the page is read-only or another's."""
    middle, _, bottom = chain
    root.memory.write(ROOT_PAGE, b"the root's")
    bottom.vp.wrmsr(Msr.SIMP, BOTTOM_PAGE | 1)
    take_back(how, root, middle)
    assert bottom.vp.rdmsr(Msr.SIMP) & 1 == 0
    left = bytes(10) if how == "deposited" else b"the root's"
    assert root.memory.read(ROOT_PAGE, 10) == left
    with pytest.raises(HypercallError) as refused:
        hv.post_message(bottom.vp.partition, 0, 2, 1, 0, b"for the bottom")
    assert refused.value.status == Status.INVALID_SYNIC_STATE
    root.memory.write(ROOT_PAGE, b"new words")
    bottom.vp.wrmsr(Msr.SIMP, 0)
    assert root.memory.read(ROOT_PAGE, 9) == b"new words"


def test_a_page_that_comes_back_from_the_pool_is_the_givers_alone(root, chain):
    middle, low, _ = chain
    take_back("deposited", root, middle)
    assert middle.rep(CallCode.WITHDRAW_MEMORY, q(PARTITION_ID_SELF, 0), [], count=1, output=8)[0] == 0
    assert middle.memory.access(MIDDLE_PAGE) == ALL
    assert low.memory.access(LOW_PAGE) == 0


def test_the_lender_takes_back_what_was_deposited(root, chain):
    """A deposited page is still a page of the root's: unmapped, it does not come back from the pool."""
    middle, _, _ = chain
    take_back("deposited", root, middle)
    assert root.rep(CallCode.DEPOSIT_MEMORY, q(PARTITION_ID_SELF), [q(ROOT_PAGE >> 12)])[0] == 0
    assert middle.rep(CallCode.WITHDRAW_MEMORY, q(PARTITION_ID_SELF, 0), [], count=1, output=8)[0] == 0
    assert middle.memory.access(MIDDLE_PAGE) == 0


def test_a_partition_that_is_gone_has_no_page_left_even_if_somebody_looks_at_its_memory(root, chain):
    middle, low, bottom = chain
    flags = EventFlags(bottom.memory, BOTTOM_PAGE, 0)  # keeps the memory from being closed
    low.vp.partition.destroy()
    assert bottom.memory.access(BOTTOM_PAGE) == 0
    flags.set(0)
    assert root.memory.read(ROOT_PAGE, 8) == bytes(8)
    assert not middle.vp.partition.loans.lent


def test_privileges_that_are_taken_are_taken_from_those_below(root, chain):
    middle, low, bottom = chain
    kept = int(ROOT_PRIVILEGES) & ~int(Privilege.POST_MESSAGES)
    data = q(middle.vp.partition.id) + struct.pack("<IIQ", PartitionProperty.PRIVILEGE_FLAGS, 0, kept)
    assert root.call(CallCode.SET_PARTITION_PROPERTY, data)[0] == Status.SUCCESS
    assert [g.vp.partition.privileges for g in (middle, low, bottom)] == [kept] * 3
    assert bottom.post(1, 1, b"x") == Status.ACCESS_DENIED
    given = q(middle.vp.partition.id) + struct.pack(
        "<IIQ", PartitionProperty.PRIVILEGE_FLAGS, 0, ROOT_PRIVILEGES
    )
    assert root.call(CallCode.SET_PARTITION_PROPERTY, given)[0] == Status.SUCCESS
    assert low.vp.partition.privileges == kept, "what it may hand on again is for itself to say"


EXITS = {
    "hypercall": lambda vp: vp.hypercall(CallCode.NOTIFY_LONG_SPIN_WAIT | 1 << 16, 0, 0),
    "rdmsr": lambda vp: vp.rdmsr(Msr.SIMP),
    "wrmsr": lambda vp: vp.wrmsr(Msr.SIMP, 1),
    "cpuid": lambda vp: vp.cpuid(1),
    "in": lambda vp: vp.io_read(0x60, 1),
    "out": lambda vp: vp.io_write(0x60, 1, 0),
    "load": lambda vp: vp.mmio_read(0xFEE0_0020, 4),
    "store": lambda vp: vp.mmio_write(0xFEE0_0080, 4, 0),
}


@pytest.mark.parametrize("exit", EXITS)
@pytest.mark.parametrize("end", ["deleted", "finalized", "destroyed"])
def test_a_processor_that_is_gone_makes_no_exits(clock, hv, root, end, exit):
    """An engine's thread may be inside of it: it must not lay pages over memory that is another's now."""
    guest = child_of(hv, root, "guest")
    partition, vp = guest.vp.partition, guest.vp.partition.vps[1]
    vp.wrmsr(Msr.STIMER0_COUNT, 10_000)
    vp.wrmsr(Msr.STIMER0_CONFIG, 3 | 1 << 12 | 0x60 << 4)
    if end == "deleted":
        data = VpReference(partition.id, 1, 0, b"").pack()
        assert root.call(CallCode.DELETE_VP, data)[0] == Status.SUCCESS
    elif end == "finalized":
        assert root.call(CallCode.FINALIZE_PARTITION, q(partition.id))[0] == Status.SUCCESS
    else:
        partition.destroy()
    for _ in range(2):
        with pytest.raises(VpSuspended, match="is gone"):
            EXITS[exit](vp)
    assert vp.pop_interrupt() is None
    assert clock.next_deadline() is None
    # Whoever holds the processor - a hypercall under way in another thread - arms nothing on it any more.
    vp.timers.set_count(0, 10_000)
    vp.timers.set_config(0, 3 | 1 << 12 | 0x60 << 4)
    vp.write_apic(0x320, 0x2_0050)
    vp.write_apic(0x380, 1000)
    assert clock.next_deadline() is None


def test_its_number_can_be_had_again(hv, root):
    guest = child_of(hv, root, "guest")
    partition = guest.vp.partition
    old = partition.vps[1]
    assert root.call(CallCode.DELETE_VP, VpReference(partition.id, 1, 0, b"").pack())[0] == Status.SUCCESS
    data = CreateVp(partition.id, 1, b"", 0, 0, 0, 0).pack()
    assert root.call(CallCode.CREATE_VP, data)[0] == Status.SUCCESS
    assert partition.vps[1].rdmsr(Msr.SIMP) == 0
    partition.suspend(True)
    partition.suspend(False)
    assert old.suspended
    assert not partition.vps[1].suspended


def test_a_waiting_exit_ends_when_its_processor_goes(hv, root):
    guest = child_of(hv, root, "guest")
    vp = guest.vp.partition.vps[1]
    vp.suspend(True)

    def stall(runs):
        data = VpReference(guest.vp.partition.id, 1, 0, b"").pack()
        assert root.call(CallCode.DELETE_VP, data)[0] == Status.SUCCESS
        return runs()

    vp.on_stall = stall
    with pytest.raises(VpSuspended, match="was taken away"):
        vp.rdmsr(Msr.SIMP)


def test_the_hypercall_page_is_not_the_guests_to_write(hv, root):
    """What it wrote over the code is gone when the page is placed anew: the next guest's, after a reset, is sound."""
    guest = child_of(hv, root, "guest")
    code = guest.memory.read(HYPERCALL_GPA, 4)
    guest.memory.write(HYPERCALL_GPA, b"\xcc" * 4)
    guest.vp.wrmsr(Msr.HYPERCALL, 0)
    guest.vp.wrmsr(Msr.HYPERCALL, 0x9000 | 1)
    assert guest.memory.read(0x9000, 4) == code
    guest.memory.write(0x9000, b"\xcc" * 4)
    guest.vp.partition.reset()
    assert RawGuest(guest.vp).memory.read(HYPERCALL_GPA, 4) == code


def test_registers_of_a_processor_that_is_gone(hv, root):
    guest = child_of(hv, root, "guest")
    partition = guest.vp.partition
    assert root.call(CallCode.DELETE_VP, VpReference(partition.id, 1, 0, b"").pack())[0] == Status.SUCCESS
    header = VpReference(partition.id, 1, 0, b"").pack()
    name = int(RegisterName.RIP).to_bytes(4, "little")
    assert root.rep(CallCode.GET_VP_REGISTERS, header, [name], output=16)[0] == Status.INVALID_VP_INDEX
    with pytest.raises(GeneralProtectionFault):
        guest.vp.wrmsr(0x1234_5678, 0)  # the other one goes on


@pytest.mark.parametrize("gone", ["receiver", "sender"])
def test_nothing_of_a_partition_is_kept_by_who_was_connected_to_it(hv, root, gone):
    """A parent that makes and deletes children around one that stays must not fill its host's memory with the dead."""
    receiver, sender = child_of(hv, root, "receiver"), child_of(hv, root, "sender")
    pair = {"receiver": receiver.vp.partition, "sender": sender.vp.partition}
    to, by = pair["receiver"].id, pair["sender"].id
    port = CreatePort(to, 7, 0, 0, 0, by, PortType.MESSAGE, 0, 2, 0, 0).pack()
    assert root.call(CallCode.CREATE_PORT, port)[0] == Status.SUCCESS
    connect = ConnectPort(by, 9, 0, 0, 0, to, 7, 0, PortType.MESSAGE, 0, b"", 0).pack()
    assert root.call(CallCode.CONNECT_PORT, connect)[0] == Status.SUCCESS
    for text in (b"first", b"it waits"):
        assert sender.post(9, 1, text) == Status.SUCCESS
    dead = weakref.ref(pair[gone])
    pair.pop(gone).destroy()
    if gone == "receiver":
        assert sender.post(9, 1, b"nowhere") == Status.INVALID_PORT_ID
        assert list(pair["sender"].connections) == [9]
        del receiver
    else:
        assert not pair["receiver"].ports
        assert pair["receiver"].vps[0].synic.queued_messages == 0
        del sender
    gc.collect()
    assert dead() is None


@pytest.mark.parametrize("call", ["create", "delete", "initialize"])
def test_a_partition_that_is_being_finalized_gets_nothing_new(hv, root, call):
    """Another of its parent's processors asks in the middle: a processor added then would outlive its partition."""
    guest = child_of(hv, root, "guest")
    partition, asked = guest.vp.partition, []
    reset = partition.reset

    def ask():
        reset()
        if call == "create":
            asked.append(root.call(CallCode.CREATE_VP, CreateVp(partition.id, 2, b"", 0, 0, 0, 0).pack())[0])
        elif call == "delete":
            asked.append(root.call(CallCode.DELETE_VP, VpReference(partition.id, 1, 0, b"").pack())[0])
        else:
            asked.append(root.fast(CallCode.INITIALIZE_PARTITION, q(partition.id))[0])

    partition.reset = ask
    assert root.fast(CallCode.FINALIZE_PARTITION, q(partition.id))[0] == Status.SUCCESS
    expected = Status.INVALID_VP_INDEX if call == "delete" else Status.INVALID_PARTITION_STATE
    assert asked == [expected]
    assert partition.vps == []
    assert root.fast(CallCode.DELETE_PARTITION, q(partition.id))[0] == Status.SUCCESS
