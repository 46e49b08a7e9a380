"""Twelve children with eight channels each, every child in a process of its own; offers go and children die at random.

Seeded (``VMBUS_SEED``) as far as processes can be: which and after how many packets.
"""

import gc
import os
import random
import threading
import time
from uuid import UUID

import pytest
from reference.descriptors import open_descriptors
from reference.process_guests import REPORT

from vmbus.bus import Offer, VmbusHost
from vmbus.bus.hosting import Threads, hosting_of
from vmbus.hypervisor import ChildProcess, HostClock, Hypervisor

CHILDREN, CHANNELS, ROUNDS = 12, 8, 150
KIND = UUID("5ec0ec00-0000-4000-8000-0000000000ff")
SEED = int(os.environ.get("VMBUS_SEED", "20"))


class Served:
    """One channel's provider: echoes, and checks that packets come once each and in order."""

    def __init__(self, limit, act):
        self.taken = 0
        self.wrong = 0
        self.opened = self.closed = 0
        self.limit, self.act = limit, act
        self.offered = None

    def open(self, channel):
        self.opened += 1

        def serve(packets):
            for packet in packets:
                if packet.payload[:8] != self.taken.to_bytes(8, "little"):
                    self.wrong += 1
                self.taken += 1
                if self.taken == self.limit:
                    threading.Thread(target=self.act, args=(self,), daemon=True).start()
                channel.send(packet.payload)

        channel.serve(serve)

    def close(self, channel):
        self.closed += 1


@pytest.mark.slow
def test_a_crowd_of_processes():
    print(f"VMBUS_SEED={SEED}")
    gc.collect()
    descriptors = open_descriptors()
    run_a_crowd(random.Random(SEED))
    gc.collect()
    assert open_descriptors() == descriptors


def run_a_crowd(generator):
    hv = Hypervisor(clock=HostClock())
    hv.create_root()
    hosting = Threads(workers=2)
    hosting_of(hv, hosting)
    doomed = set(generator.sample(range(CHILDREN), 3))
    processes, served, rescinded = {}, {}, set()
    children = [hv.create_child(hv.root, f"c{n}", memory_size=4 << 20) for n in range(CHILDREN)]
    for n, child in enumerate(children):
        host = VmbusHost(hv, child)
        for k in range(CHANNELS):
            limit, act = 0, None
            if n in doomed and k == 0:
                limit, act = generator.randrange(1, ROUNDS), lambda s, n=n: processes[n].kill()
            elif generator.random() < 0.15:
                limit, act = generator.randrange(1, ROUNDS), lambda s: s.offered.rescind()
                rescinded.add((n, k))
            provider = served[n, k] = Served(limit, act)
            instance = UUID(int=KIND.int & ~0xFFFF | n << 8 | k)
            provider.offered = host.offer(Offer(KIND, instance), provider.open, provider.close)
    assert rescinded
    for n, child in enumerate(children):
        arguments = {"rounds": ROUNDS, "seed": generator.randrange(1 << 30)}
        processes[n] = ChildProcess(child, "reference.process_guests:crowd", arguments)
    end = time.monotonic() + 100
    status = {n: process.wait(max(0.0, end - time.monotonic())) for n, process in processes.items()}
    assert status == {n: -9 if n in doomed else 0 for n in range(CHILDREN)}
    for (n, k), provider in served.items():
        assert provider.wrong == 0
        assert provider.opened == provider.closed <= 1
        if n in doomed:
            continue
        result = int.from_bytes(children[n].memory.read(REPORT + 16 + 4 * k, 4), "little")
        if (n, k) in rescinded:
            assert result >> 16 == 1
            assert provider.limit <= provider.taken <= ROUNDS
        else:
            assert result == provider.taken == ROUNDS
    hv.root.destroy()
    hosting.close()
    assert hv.partitions == {}
