"""Children in operating system processes of their own."""

import os
import time

import pytest
from reference.descriptors import open_descriptors
from reference.eventually import eventually
from reference.process_guests import ECHO, REPORT

from vmbus.bus import Offer, VmbusHost
from vmbus.bus.hosting import Threads, hosting_of
from vmbus.errors import LocalProtocolError
from vmbus.hypervisor import ChildProcess, HostClock, Hypervisor
from vmbus.hypervisor.tlfs import CallCode, PartitionState

ECHO_OFFER = Offer(ECHO, ECHO)


@pytest.fixture
def hv():
    hypervisor = Hypervisor(clock=HostClock())
    hypervisor.create_root()
    yield hypervisor
    if hypervisor.root is not None:
        hypervisor.root.destroy()


def child_of(hv, name="c", **kwargs):
    return hv.create_child(hv.root, name, memory_size=4 << 20, **kwargs)


def run(child, name, *, timeout=30, **arguments):
    process = ChildProcess(child, f"reference.process_guests:{name}", arguments)
    status = process.wait(timeout)
    if status is None:
        process.kill()
    return status


def report(child):
    return child.memory.read(REPORT, 1024).rstrip(b"\0").decode()


def state_of(pid):
    """The state letter of a process: R, S, T (stopped), …"""
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        return stat.read().rpartition(")")[2].split()[0]


class Scratch:
    """A device that remembers what was written."""

    def __init__(self):
        self.value = 0

    def io_read(self, port, size):
        return self.value

    def io_write(self, port, size, value):
        self.value = value

    def mmio_read(self, offset, size):
        return self.value

    def mmio_write(self, offset, size, value):
        self.value = value


def test_every_kind_of_exit(hv):
    child = child_of(hv)
    got = []
    child.devices.add_ports(0x80, 1, Scratch())
    child.devices.add_mmio(0xE000_0000, 0x1000, Scratch())
    hv.create_message_port(child, 1, lambda *message: got.append(message))
    hv.create_event_port(child, 2, got.append)
    child.privileges |= 1 << 33  # AccessPartitionId
    assert run(child, "exits") == 0
    assert report(child).split("|") == [
        "ud", "gp", "8100060100000000", "Hv#1", "5a", "77", "post 0", "signals [0, 0, 0]", "nobody 18",
        f"id 0 {child.id}",
    ]  # fmt: skip
    assert got[0] == (0, 5, b"hello")
    # The first event came as a hypercall, the others through the eventfd, which may have joined them.
    assert got[1:] in ([0, 0], [0, 0, 0])
    assert child.account.hypercalls[CallCode.SIGNAL_EVENT] == 2  # one refused
    assert child.account.exits["doorbell"] in (1, 2)


def test_the_process_has_its_memory_and_its_lines_and_nothing_else(hv):
    child = child_of(hv, vps=2)
    other = child_of(hv, "other")
    assert other.memory.fd >= 0
    assert run(child, "descriptors") == 0
    assert report(child).split("|") == ["/memfd", "socket", "socket", "socket"]
    for connection_id in (2, 3):
        hv.create_event_port(child, connection_id, lambda flag: None)
    assert run(child, "descriptors", signals=2) == 0
    assert report(child).split("|") == ["/memfd", "[eventfd]", "[eventfd]", "socket", "socket", "socket"]


@pytest.mark.parametrize("spin", [0.0, 20e-6])
def test_interrupts_and_messages(hv, spin):
    child = child_of(hv)
    got = []
    hv.create_message_port(child, 1, lambda vp, kind, payload: got.append((kind, payload)))
    process = ChildProcess(child, "reference.process_guests:interrupts", {"count": 200}, spin=spin)
    assert eventually(lambda: child.memory.read(REPORT, 5) == b"ready")
    for n in range(200):
        hv.post_message(child, 0, 2, 1, 0, n.to_bytes(4, "little"))
    assert process.wait(30) == 0
    assert got == [(9, n.to_bytes(4, "little")) for n in range(200)]


@pytest.fixture
def hosting(hv):
    threads = Threads(workers=2)
    hosting_of(hv, threads)
    yield threads
    threads.close()


def test_a_real_driver_in_another_process(hv, hosting):
    child = child_of(hv)
    host = VmbusHost(hv, child)
    closed = []
    host.offer(
        ECHO_OFFER,
        lambda channel: channel.serve(lambda packets: [channel.send(packet.payload) for packet in packets]),
        lambda channel: closed.append(channel.channel_id),
    )
    assert run(child, "echo", rounds=300) == 0
    assert child.memory.read(REPORT, 32) != bytes(32)
    assert len(closed) == 1


def test_a_killed_child_is_noticed_and_nobody_else_is_disturbed(hv, hosting):
    doomed, survivor = child_of(hv, "doomed"), child_of(hv, "survivor")
    closed, opened = {}, {}
    hosts = {}
    for child in (doomed, survivor):
        closed[child.name], opened[child.name] = [], []

        def on_open(channel, name=child.name):
            opened[name].append(channel)
            channel.serve(lambda packets: [channel.send(packet.payload) for packet in packets])

        hosts[child.name] = VmbusHost(hv, child)
        hosts[child.name].offer(
            ECHO_OFFER, on_open, lambda channel, name=child.name: closed[name].append(channel)
        )
    events = []
    previous = doomed.on_event
    doomed.on_event = lambda event: (events.append(event.kind), previous(event))
    other = ChildProcess(survivor, "reference.process_guests:echo", {"rounds": 200})
    assert run(doomed, "echo", rounds=1000, crash_after=50) == -9
    assert events == ["reset", "stopped"]
    assert closed["doomed"] == opened["doomed"]
    assert len(closed["doomed"]) == 1
    assert not opened["doomed"][0].is_open
    assert other.wait(30) == 0
    # And the same partition runs again: the offer is still there.
    assert run(doomed, "echo", rounds=20) == 0
    assert len(opened["doomed"]) == 2


def test_killing_it_from_outside(hv):
    child = child_of(hv)
    stopped = []
    process = ChildProcess(
        child, "reference.process_guests:interrupts", {"count": 1}, on_stopped=stopped.append
    )
    assert eventually(lambda: child.memory.read(REPORT, 5) == b"ready")
    process.kill()
    assert stopped == [-9]
    assert child.state is PartitionState.ACTIVE
    assert not os.path.exists(f"/proc/{process.pid}")


def test_destroying_the_partition_stops_its_process(hv):
    child = child_of(hv)
    process = ChildProcess(child, "reference.process_guests:interrupts", {"count": 1})
    assert eventually(lambda: child.memory.read(REPORT, 5) == b"ready")
    child.destroy()
    assert process.wait(5) == -9


def test_a_suspended_process_does_not_run(hv):
    """The whole process is stopped by the operating system, and goes on where it was; nothing is lost meanwhile."""
    child = child_of(hv)
    rung, got = [], []
    hv.create_event_port(child, 2, rung.append)
    hv.create_message_port(child, 1, lambda vp, kind, payload: got.append(payload))
    process = ChildProcess(child, "reference.process_guests:ticker")
    count = lambda: int.from_bytes(child.memory.read(REPORT, 8), "little")  # noqa: E731
    assert eventually(lambda: count() > 20 and len(rung) > 20)
    child.suspend(True)
    assert eventually(lambda: state_of(process.pid) == "T")
    for n in range(20):
        hv.post_message(child, 0, 2, 1, 0, bytes([n]))
    time.sleep(0.05)
    before = count(), len(got)
    time.sleep(0.1)
    assert (count(), len(got)) == before
    child.suspend(False)
    assert eventually(lambda: count() > before[0] + 20 and len(got) == 20)
    assert got == [bytes([n]) for n in range(20)]
    child.suspend(True)
    process.kill()
    assert not os.path.exists(f"/proc/{process.pid}")


def test_one_suspended_processor_of_a_process_stalls_at_its_next_exit(hv):
    child = child_of(hv, vps=2)
    process = ChildProcess(child, "reference.process_guests:ticker")
    count = lambda: int.from_bytes(child.memory.read(REPORT, 8), "little")  # noqa: E731
    assert eventually(lambda: count() > 5)
    rung = []
    hv.create_event_port(child, 2, rung.append)
    assert eventually(lambda: len(rung) > 5)
    child.vps[0].suspend(True)
    time.sleep(0.05)
    before = count(), len(rung)
    hv.post_message(child, 0, 2, 1, 0, b"wake")
    time.sleep(0.1)
    assert state_of(process.pid) != "T"
    assert len(rung) == before[1]
    child.vps[0].suspend(False)
    assert eventually(lambda: len(rung) > before[1] + 5)
    process.kill()


@pytest.mark.parametrize(
    ("guest", "arguments", "status"),
    [
        ("garbage", {"size": 1}, -9),
        ("garbage", {"size": 136}, -9),
        ("garbage", {"size": 5000}, -9),
        ("flood", {}, -9),
        ("hang_up", {}, -9),
        ("leave", {"status": 3}, 3),
    ],
)
def test_a_process_that_misbehaves_is_ended_and_forgotten(hv, guest, arguments, status):
    child = child_of(hv)
    before = open_descriptors()
    assert run(child, guest, **arguments) == status
    assert open_descriptors() == before
    assert child.state is PartitionState.ACTIVE
    child.memory.write(REPORT, b"alive")


def test_shared_descriptors_cannot_hold_the_parent_up(hv):
    child = child_of(hv)
    rung = []
    hv.create_event_port(child, 2, rung.append)
    process = ChildProcess(child, "reference.process_guests:abuse_doorbells")
    assert eventually(lambda: child.memory.read(REPORT, 4) == b"done")
    assert eventually(lambda: len(rung) >= 2)  # the parent hears it when it gets to it
    process.kill()


def test_only_partitions_with_their_own_memory(hv):
    made = hv.create_uninitialized(hv.root)
    with pytest.raises(LocalProtocolError):
        ChildProcess(made, "reference.process_guests:leave")
