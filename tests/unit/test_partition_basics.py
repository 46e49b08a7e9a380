"""A hypervisor, its root and its children, and what a child's processor shows."""

import gc
import threading
import weakref

import pytest
from reference.descriptors import open_descriptors

from vmbus.errors import GuestMemoryError, HypercallError, LocalProtocolError
from vmbus.hypervisor import GeneralProtectionFault, Hypervisor, UndefinedOpcodeFault, VirtualClock
from vmbus.hypervisor.abi import control
from vmbus.hypervisor.personality import DOS, PERSONALITIES, SERVER_2008
from vmbus.hypervisor.tlfs import CallCode, Msr, PartitionState, Privilege, Status
from vmbus.trace.ledger import Ledger

OS_ID = 0x8100_0601_0000_0000
HYPERCALL_GPA, INPUT, SIM, SIEF = 0x1000, 0x2000, 0x3000, 0x4000
VECTOR = 0xF3


@pytest.fixture
def hv():
    hypervisor = Hypervisor(Ledger(), VirtualClock())
    hypervisor.create_root()
    yield hypervisor
    if hypervisor.root is not None:
        hypervisor.root.destroy()


@pytest.fixture
def child(hv):
    partition = hv.create_child(hv.root, "c0", memory_size=1 << 20)
    vp = partition.vps[0]
    vp.wrmsr(Msr.GUEST_OS_ID, OS_ID)
    vp.wrmsr(Msr.HYPERCALL, HYPERCALL_GPA | 1)
    vp.wrmsr(Msr.SIMP, SIM | 1)
    vp.wrmsr(Msr.SIEFP, SIEF | 1)
    vp.wrmsr(Msr.SINT0 + 2, VECTOR)
    return partition


def post(vp, connection_id, message_type, payload):
    data = b"".join(n.to_bytes(4, "little") for n in (connection_id, 0, message_type, len(payload))) + payload
    vp.partition.memory.write(INPUT, data.ljust(256, b"\0"))
    return vp.hypercall(CallCode.POST_MESSAGE, INPUT, 0)


def test_exactly_one_root(hv):
    with pytest.raises(LocalProtocolError):
        hv.create_root()


def test_message_from_child_to_provider(hv, child):
    got = []
    hv.create_message_port(child, 4, lambda *args: got.append(args))
    assert post(child.vps[0], 4, 1, b"hello") == Status.SUCCESS
    assert got == [(0, 1, b"hello")]
    assert child.account.hypercalls[CallCode.POST_MESSAGE] == 1
    hv.delete_port(child, 4)
    assert post(child.vps[0], 4, 1, b"hello") == Status.INVALID_CONNECTION_ID


def test_event_from_child_to_provider_fast_and_slow(hv, child):
    got = []
    hv.create_event_port(child, 0x10001, got.append)
    vp = child.vps[0]
    assert vp.hypercall(control(CallCode.SIGNAL_EVENT, fast=True), 0x10001 | 7 << 32, 0) == Status.SUCCESS
    child.memory.write(INPUT, (0x10001 | 9 << 32).to_bytes(8, "little"))
    assert vp.hypercall(CallCode.SIGNAL_EVENT, INPUT, 0) == Status.SUCCESS
    assert got == [7, 9]
    too_far = 0x10001 | 2048 << 32
    assert vp.hypercall(control(CallCode.SIGNAL_EVENT, fast=True), too_far, 0) == Status.INVALID_PARAMETER


def test_messages_to_child_queue_until_end_of_message(hv, child):
    vp = child.vps[0]
    seen = []

    def handler(vector):
        assert vector == VECTOR
        slot = child.memory.read(SIM + 2 * 256, 256)
        seen.append((int.from_bytes(slot[:4], "little"), slot[16 : 16 + slot[4]]))
        child.memory.write(SIM + 2 * 256, bytes(4))
        if slot[5] & 1:
            vp.wrmsr(Msr.EOM, 0)
        vp.wrmsr(Msr.EOI, 0)

    vp.interrupt_handler = handler
    vp.interrupts_enabled = False
    for n in range(5):
        hv.post_message(child, 0, 2, n + 1, 0, bytes([n] * n))
    assert seen == []
    assert vp.synic.queued_messages == 4
    vp.interrupts_enabled = True
    assert seen == [(n + 1, bytes([n] * n)) for n in range(5)]
    assert vp.synic.queued_messages == 0
    assert child.account.interrupts[VECTOR] == 5


def test_event_flag_interrupts_once_until_cleared(hv, child):
    vp = child.vps[0]
    assert hv.signal_event(child, 0, 2, 100) is True
    assert hv.signal_event(child, 0, 2, 100) is False
    assert vp.pop_interrupt() == VECTOR
    assert vp.pop_interrupt() is None
    assert child.memory.read(SIEF + 2 * 256 + 100 // 8, 1) == bytes([1 << 100 % 8])
    with pytest.raises(HypercallError) as caught:
        hv.signal_event(child, 0, 2, 2048)
    assert caught.value.status == Status.INVALID_PARAMETER


def test_hypercalls_need_the_hypercall_page(hv):
    vp = hv.create_child(hv.root, "bare", memory_size=1 << 20).vps[0]
    with pytest.raises(UndefinedOpcodeFault):
        vp.hypercall(CallCode.POST_MESSAGE, INPUT, 0)
    vp.wrmsr(Msr.HYPERCALL, HYPERCALL_GPA | 1)  # ignored while the guest has no identity
    assert vp.rdmsr(Msr.HYPERCALL) & 1 == 0
    vp.wrmsr(Msr.GUEST_OS_ID, OS_ID)
    vp.wrmsr(Msr.HYPERCALL, HYPERCALL_GPA | 1)
    assert vp.partition.memory.read(HYPERCALL_GPA, 4) == b"\x0f\x01\xc1\xc3"
    vp.wrmsr(Msr.GUEST_OS_ID, 0)
    assert vp.partition.memory.read(HYPERCALL_GPA, 4) == bytes(4)
    with pytest.raises(UndefinedOpcodeFault):
        vp.hypercall(CallCode.POST_MESSAGE, INPUT, 0)


def test_processor_denies_the_leaks_of_speculative_ones(child):
    vp = child.vps[0]
    assert vp.cpuid(7, 0)[3] == 1 << 29
    assert vp.cpuid(7, 1) == (0, 0, 0, 0)
    value = vp.rdmsr(0x10A)
    assert value & 1  # RDCL_NO: no separate page tables needed
    assert not value & 1 << 1  # but no enhanced IBRS, which would need MSRs of its own
    with pytest.raises(GeneralProtectionFault):
        vp.wrmsr(0x10A, value)


def test_cpuid_shows_the_hypervisor_only_to_those_who_know_it(hv):
    linux = hv.create_child(hv.root, "linux").vps[0]
    dos = hv.create_child(hv.root, "dos", personality=DOS).vps[0]
    old = hv.create_child(hv.root, "2008", personality=SERVER_2008).vps[0]
    eax, *name = linux.cpuid(0x4000_0000)
    assert eax >= 0x4000_0006
    assert b"".join(n.to_bytes(4, "little") for n in name) == b"Microsoft Hv"
    assert linux.cpuid(0x4000_0001)[0].to_bytes(4, "little") == b"Hv#1"
    assert linux.cpuid(1)[2] >> 31 == 1
    assert dos.cpuid(1)[2] >> 31 == 0
    assert dos.cpuid(0x4000_0000) == (0, 0, 0, 0)
    assert linux.cpuid(0x4000_0004)[0] >> 9 & 1 == 1
    assert old.cpuid(0x4000_0004)[0] >> 9 & 1 == 0
    with pytest.raises(GeneralProtectionFault):
        dos.rdmsr(Msr.SIMP)


@pytest.mark.parametrize("personality", PERSONALITIES.values(), ids=lambda p: p.name)
def test_the_leaves_of_every_personality(hv, personality):
    vp = hv.create_child(hv.root, "c", personality=personality).vps[0]
    last, *_ = vp.cpuid(0x4000_0000)
    assert last == (personality.max_leaf if personality.hypervisor_present else 0)
    assert vp.cpuid(max(last, 0x4000_0000) + 1) == (0, 0, 0, 0)
    eax, ebx, _, edx = vp.cpuid(0x4000_0003)
    assert ebx << 32 | eax == (personality.privileges if personality.hypervisor_present else 0)
    # What a leaf promises exists, and what it does not promise does not.
    promises = {
        Msr.VP_RUNTIME: eax >> 0,
        Msr.TIME_REF_COUNT: eax >> 1,
        Msr.SIMP: eax >> 2,
        Msr.STIMER0_CONFIG: eax >> 3,
        Msr.TPR: eax >> 4,
        Msr.HYPERCALL: eax >> 5,
        Msr.VP_INDEX: eax >> 6,
        Msr.RESET: eax >> 7,
        Msr.REFERENCE_TSC: eax >> 9,
        Msr.GUEST_IDLE: eax >> 10,
        Msr.TSC_FREQUENCY: eax >> 11,
        Msr.CRASH_CTL: edx >> 10,
    }
    for msr, promised in promises.items():
        if promised & 1:
            vp.rdmsr(msr)
        else:
            with pytest.raises(GeneralProtectionFault):
                vp.rdmsr(msr)


def test_privileges_gate_msrs_and_hypercalls(hv):
    mute = hv.create_child(hv.root, "mute", privileges=Privilege.ACCESS_HYPERCALL_MSRS)
    vp = mute.vps[0]
    vp.wrmsr(Msr.GUEST_OS_ID, OS_ID)
    vp.wrmsr(Msr.HYPERCALL, HYPERCALL_GPA | 1)
    hv.create_message_port(mute, 4, lambda *args: pytest.fail("delivered"))
    hv.create_event_port(mute, 5, lambda flag: pytest.fail("delivered"))
    assert post(vp, 4, 1, b"x") == Status.ACCESS_DENIED
    assert vp.hypercall(control(CallCode.SIGNAL_EVENT, fast=True), 5, 0) == Status.ACCESS_DENIED
    with pytest.raises(GeneralProtectionFault):
        vp.wrmsr(Msr.SINT0 + 2, VECTOR)


def test_destroying_a_parent_destroys_its_children(hv, child):
    grandchild = hv.create_child(child, "c0.0", memory_size=1 << 20)
    events = []
    grandchild.on_event = events.append
    child.destroy()
    assert grandchild.state is PartitionState.DELETED
    assert [e.kind for e in events] == ["destroyed"]
    assert set(hv.partitions) == {hv.root.id}
    with pytest.raises(GuestMemoryError):
        grandchild.memory.read(0, 1)
    with pytest.raises(LocalProtocolError):
        hv.create_child(child)


def test_a_thousand_rounds_with_running_guests_leave_nothing_behind(hv):
    gc.collect()
    descriptors, accounts = open_descriptors(), len(hv.ledger.accounts())
    gone = []
    for _ in range(1000):
        partition = hv.create_child(hv.root, memory_size=1 << 16, vps=2)
        vp = partition.vps[0]
        vp.wrmsr(Msr.GUEST_OS_ID, OS_ID)
        vp.wrmsr(Msr.HYPERCALL, HYPERCALL_GPA | 1)
        vp.wrmsr(Msr.SIMP, SIM | 1)
        vp.wrmsr(Msr.SIEFP, SIEF | 1)
        vp.wrmsr(Msr.SINT0 + 2, VECTOR)
        vp.wrmsr(Msr.STIMER0_COUNT, 1_000_000)
        vp.wrmsr(Msr.STIMER0_CONFIG, 3 | 2 << 16)
        hv.create_message_port(partition, 1, print)
        hv.create_event_port(partition, 2, print)
        hv.post_message(partition, 0, 2, 1, 0, b"unread")
        gone.append(weakref.ref(partition))
        partition.destroy()
    del partition, vp
    gc.collect()
    assert not any(reference() for reference in gone)
    assert hv.clock.next_deadline() is None
    assert len(hv.ledger.accounts()) == accounts + 1  # names come again
    assert open_descriptors() == descriptors
    assert hv.root.children == {}


def test_providers_in_other_threads_survive_a_childs_end(hv):
    """Whoever posts and signals while a child is torn down gets a status, nothing else."""
    failures, stop = [], threading.Event()
    current = [hv.create_child(hv.root, "0", memory_size=1 << 16)]

    def provide():
        while not stop.is_set():
            target = current[0]
            try:
                hv.post_message(target, 0, 2, 1, 0, b"hello")
                hv.signal_event(target, 0, 2, 1)
            except HypercallError:
                continue
            except Exception as error:
                failures.append(error)
                return

    workers = [threading.Thread(target=provide) for _ in range(3)]
    for worker in workers:
        worker.start()
    for n in range(60):
        vp = current[0].vps[0]
        vp.wrmsr(Msr.SIMP, SIM | 1)
        vp.wrmsr(Msr.SIEFP, SIEF | 1)
        vp.wrmsr(Msr.SINT0 + 2, VECTOR)
        old, current[0] = current[0], hv.create_child(hv.root, f"{n + 1}", memory_size=1 << 16)
        old.destroy()
    stop.set()
    for worker in workers:
        worker.join()
    assert failures == []


def test_partitions_come_and_go_in_several_threads(hv):
    ids, failures = [], []

    def churn():
        try:
            for _ in range(60):
                child = hv.create_child(hv.root, memory_size=1 << 16)
                ids.append(child.id)
                grandchild = hv.create_child(child, memory_size=1 << 16)
                ids.append(grandchild.id)
                child.destroy()
        except Exception as error:
            failures.append(error)

    workers = [threading.Thread(target=churn) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []
    assert len(set(ids)) == len(ids) == 480
    assert set(hv.partitions) == {hv.root.id}


def test_a_partition_whose_parent_objects_is_destroyed_all_the_same(hv, child):
    def object_to(event):
        raise RuntimeError(event.kind)

    child.on_event = object_to
    with pytest.raises(RuntimeError, match="destroyed"):
        child.destroy()
    assert child.state is PartitionState.DELETED
    assert set(hv.partitions) == {hv.root.id}
    child.destroy()
