"""The synthetic interrupt controller: masks, auto-EOI, polling, queues, moving pages."""

import pytest
from reference.raw_guest import SIEF, SIM, VECTOR, RawGuest

from vmbus.errors import HypercallError
from vmbus.hypervisor import GeneralProtectionFault, Hypervisor, VirtualClock
from vmbus.hypervisor.synic import MESSAGE_QUEUE_LIMIT
from vmbus.hypervisor.tlfs import Msr, Status

MASKED, AUTO_EOI, POLLING = 1 << 16, 1 << 17, 1 << 18


@pytest.fixture
def hv():
    hypervisor = Hypervisor(clock=VirtualClock())
    hypervisor.create_root()
    yield hypervisor
    hypervisor.root.destroy()


@pytest.fixture
def guest(hv):
    return RawGuest(hv.create_child(hv.root, "synic", memory_size=1 << 20).vps[0])


def status_of(call, *args):
    with pytest.raises(HypercallError) as caught:
        call(*args)
    return caught.value.status


def test_registers_at_reset(hv):
    vp = hv.create_child(hv.root, "fresh").vps[0]
    assert [vp.rdmsr(Msr.SINT0 + n) for n in range(16)] == [MASKED] * 16
    assert vp.rdmsr(Msr.SVERSION) == 1
    assert vp.rdmsr(Msr.SIMP) == vp.rdmsr(Msr.SIEFP) == vp.rdmsr(Msr.EOM) == 0
    with pytest.raises(GeneralProtectionFault):
        vp.wrmsr(Msr.SVERSION, 1)


def test_illegal_vectors(guest):
    with pytest.raises(GeneralProtectionFault):
        guest.vp.wrmsr(Msr.SINT0 + 4, 15)
    guest.vp.wrmsr(Msr.SINT0 + 4, 15 | MASKED)
    guest.vp.wrmsr(Msr.SINT0 + 4, 16)
    assert guest.vp.rdmsr(Msr.SINT0 + 4) == 16


def test_what_arrives_at_a_masked_sint_is_raised_when_it_is_unmasked(hv, guest):
    child = guest.vp.partition
    guest.vp.wrmsr(Msr.SINT0 + 2, VECTOR | MASKED)
    assert hv.signal_event(child, 0, 2, 5)
    hv.post_message(child, 0, 2, 1, 0, b"early")
    assert guest.take_interrupts() == []
    guest.vp.wrmsr(Msr.SINT0 + 2, VECTOR)
    assert guest.take_interrupts() == [VECTOR]
    assert guest.take_flags(2) == [5]
    assert guest.take_message(2) == (1, 0, b"early")
    guest.vp.wrmsr(Msr.SINT0 + 2, VECTOR)
    assert guest.take_interrupts() == []  # nothing is raised twice


def test_polling_sints_never_interrupt(hv, guest):
    guest.vp.wrmsr(Msr.SINT0 + 2, VECTOR | POLLING)
    hv.post_message(guest.vp.partition, 0, 2, 1, 0, b"")
    assert guest.take_interrupts() == []
    assert guest.take_message(2) == (1, 0, b"")


def test_auto_eoi_leaves_nothing_in_service(hv, guest):
    child, vp = guest.vp.partition, guest.vp
    vp.wrmsr(Msr.SINT0 + 2, VECTOR | AUTO_EOI)
    assert hv.signal_event(child, 0, 2, 1)
    assert vp.pop_interrupt() == VECTOR
    assert vp.apic.isr == 0
    assert hv.signal_event(child, 0, 2, 2)
    assert vp.pop_interrupt() == VECTOR  # delivered again without an EOI in between
    vp.wrmsr(Msr.SINT0 + 2, VECTOR)
    assert hv.signal_event(child, 0, 2, 3)
    assert vp.pop_interrupt() == VECTOR
    assert hv.signal_event(child, 0, 2, 4)
    assert vp.pop_interrupt() is None  # in service
    vp.wrmsr(Msr.EOI, 0)
    assert vp.pop_interrupt() == VECTOR


def test_disabled_pages_refuse(hv, guest):
    child, vp = guest.vp.partition, guest.vp
    vp.wrmsr(Msr.SIMP, SIM)
    vp.wrmsr(Msr.SIEFP, SIEF)
    assert status_of(hv.post_message, child, 0, 2, 1, 0, b"") == Status.INVALID_SYNIC_STATE
    assert status_of(hv.signal_event, child, 0, 2, 1) == Status.INVALID_SYNIC_STATE
    vp.wrmsr(Msr.SIMP, SIM | 1)
    vp.wrmsr(Msr.SIEFP, SIEF | 1)
    vp.wrmsr(Msr.SCONTROL, 0)
    assert status_of(hv.post_message, child, 0, 2, 1, 0, b"") == Status.INVALID_SYNIC_STATE
    assert status_of(hv.signal_event, child, 0, 2, 1) == Status.INVALID_SYNIC_STATE


def test_wrong_arguments(hv, guest):
    child = guest.vp.partition
    for args in ((0, 16, 1, 0, b""), (0, -1, 1, 0, b""), (0, 2, 0, 0, b""), (0, 2, 1, 0, bytes(241))):
        assert status_of(hv.post_message, child, *args) == Status.INVALID_PARAMETER
    assert status_of(hv.post_message, child, 1, 2, 1, 0, b"") == Status.INVALID_VP_INDEX
    for args in ((0, 16, 0), (0, 2, 2048), (0, 2, -1)):
        assert status_of(hv.signal_event, child, *args) == Status.INVALID_PARAMETER


def test_a_flood_is_bounded_and_nothing_queued_is_lost(hv, guest):
    child = guest.vp.partition
    for n in range(MESSAGE_QUEUE_LIMIT + 1):  # the first lies in the slot
        hv.post_message(child, 0, 2, 1, 0, n.to_bytes(4, "little"))
    for _ in range(2 * MESSAGE_QUEUE_LIMIT):
        assert status_of(hv.post_message, child, 0, 2, 1, 0, b"more") == Status.INSUFFICIENT_BUFFERS
    assert guest.vp.synic.queued_messages == MESSAGE_QUEUE_LIMIT
    hv.post_message(child, 0, 3, 1, 0, b"another SINT")
    got = []
    while (message := guest.take_message(2)) is not None:
        got.append(int.from_bytes(message[2], "little"))
    assert got == list(range(MESSAGE_QUEUE_LIMIT + 1))
    assert guest.take_message(3) == (1, 0, b"another SINT")


def test_the_end_of_interrupt_brings_the_next_message_too(hv, guest):
    """A guest that clears the slot but forgets EOM is served at its EOI."""
    child, vp = guest.vp.partition, guest.vp
    hv.post_message(child, 0, 2, 1, 0, b"first")
    hv.post_message(child, 0, 2, 1, 0, b"second")
    assert vp.pop_interrupt() == VECTOR
    child.memory.write(SIM + 2 * 256, bytes(4))
    vp.wrmsr(Msr.EOI, 0)
    assert child.memory.read(SIM + 2 * 256 + 16, 6) == b"second"


def test_moving_pages_keeps_their_contents_and_uncovers_the_guests(hv, guest):
    child, vp = guest.vp.partition, guest.vp
    child.memory.write(0x9000, b"under the new place")
    hv.post_message(child, 0, 2, 1, 0, b"here")
    vp.wrmsr(Msr.SIMP, 0x9000 | 1)
    assert child.memory.read(SIM, 4096) == bytes(4096)
    assert child.memory.read(0x9000 + 2 * 256 + 16, 4) == b"here"
    vp.wrmsr(Msr.SIMP, 0x9000)
    assert child.memory.read(0x9000, 19) == b"under the new place"


def test_the_priority_of_tasks_holds_interrupts_back(hv, guest):
    vp = guest.vp
    vp.wrmsr(Msr.TPR, 0xF0)
    hv.signal_event(vp.partition, 0, 2, 1)
    assert vp.pop_interrupt() is None
    vp.wrmsr(Msr.TPR, 0xE0)
    assert vp.pop_interrupt() == VECTOR


def test_an_inline_handler_never_runs_inside_itself(hv, guest):
    child, vp = guest.vp.partition, guest.vp
    depth = deepest = 0
    ended = []

    def handler(vector):
        nonlocal depth, deepest
        depth += 1
        deepest = max(deepest, depth)
        for flag in guest.take_flags(2):
            ended.append(flag)
            if flag < 5:
                hv.signal_event(child, 0, 2, flag + 1)
        vp.wrmsr(Msr.EOI, 0)
        depth -= 1

    vp.interrupt_handler = handler
    hv.signal_event(child, 0, 2, 0)
    assert ended == [0, 1, 2, 3, 4, 5]
    assert deepest == 1


def test_an_engine_is_woken_instead(hv, guest):
    woken = []
    guest.vp.on_interrupt = lambda: woken.append(guest.vp.interrupt_pending)
    hv.signal_event(guest.vp.partition, 0, 2, 0)
    assert woken == [True]
    assert guest.take_interrupts() == [VECTOR]
    assert not guest.vp.interrupt_pending


def test_many_threads_post_and_signal(hv, guest):
    """Posts from several threads at once: nothing lost, nothing twice, each sender's order kept."""
    import threading

    child = guest.vp.partition
    per_thread, threads = 100, 4

    def send(number):
        for n in range(per_thread):
            hv.post_message(child, 0, 2, 1, number, n.to_bytes(4, "little"))
            hv.signal_event(child, 0, 2, number * per_thread + n)

    workers = [threading.Thread(target=send, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    got = {number: [] for number in range(threads)}
    while any(worker.is_alive() for worker in workers):
        message = guest.take_message(2)
        if message is not None:
            got[message[1]].append(int.from_bytes(message[2], "little"))
    for worker in workers:
        worker.join()
    while (message := guest.take_message(2)) is not None:
        got[message[1]].append(int.from_bytes(message[2], "little"))
    assert got == {number: list(range(per_thread)) for number in range(threads)}
    assert guest.take_flags(2) == list(range(per_thread * threads))
