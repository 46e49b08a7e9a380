"""Signal handlers that raise, again and again, while a client in the main thread works with providers in other threads.

What a handler interrupts must not keep a lock: neither this thread nor the workers would get on.
"""

import random
import signal
import threading
import time

import pytest
from reference.interruption import Interrupted, interrupted_at

from vmbus import Hypervisor, MemoryDisk, StorageVsc, StorageVsp, VmbusGuest, VmbusHost
from vmbus.bus import Threads
from vmbus.bus.progress import Progress

MIB = 1 << 20
BLOCK = 4096


class Alarm(BaseException):
    """What the handler raises."""


@pytest.fixture
def alarms():
    def handler(number, frame):
        raise Alarm

    before = signal.signal(signal.SIGALRM, handler)
    yield random.Random(1)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("workers", [0, 2], ids=["the ring's thread", "worker threads"])
def test_a_storage_client_goes_on_after_them(alarms, workers):
    hosting = Threads(workers=2)
    with Hypervisor() as hypervisor, MemoryDisk(8 * MIB) as disk:
        child = hypervisor.create_child(hypervisor.create_root(), memory_size=16 * MIB)
        host = VmbusHost(hypervisor, child, hosting=hosting)
        provider = StorageVsp({(0, 0): disk}, workers=workers)
        provider.offer_on(host)
        guest = VmbusGuest(child.vps[0])
        guest.connect()
        client = StorageVsc(guest.open(guest.offers[0], 16, 16), guest.pages.allocate(512), timeout=60)
        client.connect()
        seen = client.disk()
        stored = random.Random(2).randbytes(MIB)
        seen.write_batch(range(0, MIB, BLOCK), [stored[at : at + BLOCK] for at in range(0, MIB, BLOCK)])
        interrupted, end = 0, time.monotonic() + 1
        while time.monotonic() < end:
            try:
                signal.setitimer(signal.ITIMER_REAL, alarms.uniform(0.0001, 0.004))
                read = seen.read_batch(range(0, MIB, BLOCK), BLOCK)
                signal.setitimer(signal.ITIMER_REAL, 0)
                assert b"".join(bytes(block) for block in read) == stored
            except Alarm:
                interrupted += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert interrupted
        read = seen.read_batch(range(0, MIB, BLOCK), BLOCK)
        assert b"".join(bytes(block) for block in read) == stored
        provider.shutdown()
        hosting.close()


def test_an_interrupted_wait_wakes_nobody_too_late():
    """At every line of `Progress`, in the waiting and in the notifying thread."""
    for point in range(200):
        progress, happened = Progress(), threading.Event()
        done = threading.Thread(target=progress.wait_for, args=(happened.is_set, 60), daemon=True)
        done.start()
        try:
            with interrupted_at(point, "progress.py"):
                progress.wait_for(lambda: False, 0)
                progress.notify()
                finished = True
        except Interrupted:
            finished = False
        happened.set()
        progress.notify()
        done.join(60)
        assert not done.is_alive()
        assert progress.wait_for(lambda: True, 0)
        if finished:
            break
    else:
        pytest.fail("it never came to its end")


def test_a_wait_within_a_condition_takes_nothing_from_the_one_around_it():
    progress, inner, outer = Progress(), [], []

    def condition():
        progress.wait_for(lambda: bool(inner), 60)
        return bool(outer)

    waiting = threading.Thread(target=progress.wait_for, args=(condition, 60), daemon=True)
    waiting.start()
    inner.append(1)
    progress.notify()
    outer.append(1)
    progress.notify()
    waiting.join(60)
    assert not waiting.is_alive()
