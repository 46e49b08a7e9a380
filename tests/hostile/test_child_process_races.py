"""A process of a child's own against what its parent does meanwhile: processors that come and go, threads that end."""

import logging
import os
import struct
import threading
import time

import pytest
from reference.descriptors import open_descriptors
from reference.eventually import eventually
from reference.process_guests import REPORT
from reference.raw_guest import RawGuest

from vmbus.errors import LocalProtocolError
from vmbus.hypervisor import ChildProcess, HostClock, Hypervisor
from vmbus.hypervisor.process import MAX_OUTPUT
from vmbus.hypervisor.tlfs import CallCode, MapFlags, PartitionProperty, PartitionState, Status
from vmbus.hypervisor.wire import CreateVp, MapGpaPages, VpReference

GUESTS = "reference.process_guests"


@pytest.fixture
def hv():
    hypervisor = Hypervisor(clock=HostClock())
    hypervisor.create_root()
    yield hypervisor
    hypervisor.root.destroy()


@pytest.fixture
def root(hv):
    return RawGuest(hv.root.vps[0])


@pytest.fixture
def child(hv):
    return hv.create_child(hv.root, "c", memory_size=4 << 20, vps=2)


def q(*values):
    return struct.pack(f"<{len(values)}Q", *values)


def counted(child, processor):
    return int.from_bytes(child.memory.read(REPORT + 8 * processor, 8), "little")


def goes_on(child, processor):
    before = counted(child, processor)
    return eventually(lambda: counted(child, processor) > before)


def test_it_outlives_the_thread_that_started_it(child):
    started = []

    def start():
        started.append(ChildProcess(child, f"{GUESTS}:second_processor"))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    (process,) = started
    assert goes_on(child, 0)
    assert process.wait(0.2) is None, "it still runs"
    process.kill()
    assert process.wait(30) == -9


def test_nothing_of_its_parents_streams_is_in_its_hands(child, capfd):
    """A terminal can be read through any of the three, and may be made non-blocking for everybody that has it."""
    process = ChildProcess(child, f"{GUESTS}:streams")
    assert process.wait(30) == 0
    kinds = child.memory.read(REPORT, 1024).rstrip(b"\0").decode().split("|")
    assert kinds == ["/dev/null", "pipe", "pipe", "read 0", "unreadable", "unreadable"]
    assert capfd.readouterr() == ("", "")


def test_what_it_prints_is_kept_and_logged_if_it_fails(child, caplog):
    caplog.set_level(logging.WARNING)
    descriptors = open_descriptors()
    text = "it failed: \x1b[2J\x07 \u202e because\n"
    process = ChildProcess(child, f"{GUESTS}:prints", {"text": text, "times": 1, "status": 3})
    assert process.wait(30) == 3
    assert process.output.decode() == 2 * text
    (record,) = caplog.records
    assert "it failed" in record.getMessage()
    assert "because" in record.getMessage()
    assert all(c.isprintable() or c == "\n" for c in record.getMessage())
    assert all(line.startswith("  | ") for line in record.getMessage().splitlines()[1:]), (
        "none passes for ours"
    )
    assert open_descriptors() == descriptors


def test_a_flood_of_output_takes_bounded_memory(child):
    process = ChildProcess(child, f"{GUESTS}:prints", {"text": "x" * 8192, "times": 200, "status": 0})
    assert process.wait(30) == 0
    assert process.output == b"x" * MAX_OUTPUT
    assert len(process._output) <= 3 * MAX_OUTPUT


def test_a_processor_that_comes_while_it_runs(root, child):
    process = ChildProcess(child, f"{GUESTS}:second_processor")
    assert goes_on(child, 1)
    assert root.call(CallCode.CREATE_VP, CreateVp(child.id, 2, b"", 0, 0, 0, 0).pack())[0] == Status.SUCCESS
    for value in (1, 0, 1, 0):
        data = q(child.id) + struct.pack("<IIQ", PartitionProperty.SUSPEND, 0, value)
        assert root.call(CallCode.SET_PARTITION_PROPERTY, data)[0] == Status.SUCCESS
    assert goes_on(child, 0)
    assert goes_on(child, 1)
    process.kill()


def test_a_processor_that_goes_while_it_runs(root, child):
    """The thread that executes it waits from then on; the other goes on, and the process lives."""
    process = ChildProcess(child, f"{GUESTS}:second_processor")
    assert goes_on(child, 1)
    assert root.call(CallCode.DELETE_VP, VpReference(child.id, 1, 0, b"").pack())[0] == Status.SUCCESS
    after = counted(child, 1)
    for _ in range(20):
        assert goes_on(child, 0)
    assert counted(child, 1) <= after + 1
    assert root.call(CallCode.CREATE_VP, CreateVp(child.id, 1, b"", 0, 0, 0, 0).pack())[0] == Status.SUCCESS
    assert goes_on(child, 1), "there is a processor of that number again"
    process.kill()
    assert child.state is PartitionState.ACTIVE


def test_memory_that_is_lent_cannot_be_had_in_a_process(root, child):
    """It would map the whole of its own memory, and see its own page where its parent's should lie."""
    header = MapGpaPages(child.id, 0x10, MapFlags.READABLE, 0).pack()
    assert root.rep(CallCode.MAP_GPA_PAGES, header, [q(0x80)])[0] == Status.SUCCESS
    with pytest.raises(LocalProtocolError):
        ChildProcess(child, f"{GUESTS}:exits")


@pytest.mark.parametrize("round_number", range(8))
def test_an_end_of_its_own_meets_its_destruction(hv, round_number):
    descriptors, threads = open_descriptors(), threading.active_count()
    child = hv.create_child(hv.root, f"c{round_number}", memory_size=1 << 20)
    process = ChildProcess(child, f"{GUESTS}:prints", {"text": "", "times": 0, "status": 0})
    errors = []

    def destroy():
        try:
            child.destroy()
        except Exception as error:
            errors.append(error)

    destroyers = [threading.Thread(target=destroy) for _ in range(3)]
    time.sleep(0.02 * round_number)
    for thread in destroyers:
        thread.start()
    for thread in destroyers:
        thread.join(30)
    assert process.wait(30) in (0, -9)
    assert not errors
    assert child.id not in hv.partitions
    assert eventually(lambda: (open_descriptors(), threading.active_count()) == (descriptors, threads))
    with pytest.raises(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)
