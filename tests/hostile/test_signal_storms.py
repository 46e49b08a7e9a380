"""Signal handlers that raise, again and again, while a client in the main thread works with providers in other threads.

What a handler interrupts must not keep a lock: neither this thread nor the workers would get on.
"""

import subprocess
import sys
import threading

import pytest
from reference.interruption import Interrupted, interrupted_at

from vmbus.bus.progress import Progress

STORM = """
import random, signal, sys
from vmbus import Hypervisor, MemoryDisk, StorageVsc, StorageVsp, VmbusGuest, VmbusHost
from vmbus.bus import Threads

class Alarm(BaseException):
    pass

def handler(number, frame):
    raise Alarm

SIZE, BLOCK = 1 << 20, 4096
PLACES = range(0, SIZE, BLOCK)
moments = random.Random(1)
hosting = Threads(workers=2)
with Hypervisor() as hypervisor, MemoryDisk(SIZE) as disk:
    child = hypervisor.create_child(hypervisor.create_root(), memory_size=16 << 20)
    host = VmbusHost(hypervisor, child, hosting=hosting)
    provider = StorageVsp({(0, 0): disk}, workers=int(sys.argv[1]))
    provider.offer_on(host)
    guest = VmbusGuest(child.vps[0])
    guest.connect()
    client = StorageVsc(guest.open(guest.offers[0], 16, 16), guest.pages.allocate(512), timeout=60)
    client.connect()
    seen = client.disk()
    stored = random.Random(2).randbytes(SIZE)
    seen.write_batch(PLACES, [stored[at : at + BLOCK] for at in PLACES])
    signal.signal(signal.SIGALRM, handler)
    interrupted = 0
    for _ in range(150):
        try:
            signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.0001, 0.004))
            seen.read_batch(PLACES, BLOCK)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Alarm:
            interrupted += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert interrupted
    assert b"".join(bytes(block) for block in seen.read_batch(PLACES, BLOCK)) == stored
    provider.shutdown()
    hosting.close()
    print("the same")
"""


@pytest.mark.parametrize("workers", [0, 2], ids=["the ring's thread", "worker threads"])
def test_a_storage_client_goes_on_after_them(workers):
    """In a process of its own: pytest and its plugins are not made for handlers that raise."""
    done = subprocess.run(
        [sys.executable, "-c", STORM, str(workers)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "the same\n", done.stderr


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
