"""The control plane and channel dispatch, as pytest-benchmark cases.

    python -m pytest benchmarks/bench_control_plane.py --benchmark-enable

Each case says in its ``extra_info`` how many operations one round is (``operations``), so that rates follow; the
spin cases also say how often a worker slept, how often its spin paid off, and the processor time of a round trip.
"""

import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from uuid import UUID

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from vmbus.bus import (
    Channel,
    Hosting,
    HostMachine,
    Inline,
    Offer,
    Threads,
    Version,
    VmbusGuest,
    VmbusHost,
    wire,
)
from vmbus.bus import actions as act
from vmbus.bus.codec import encode
from vmbus.bus.versions import version_name
from vmbus.core.dispatch import Dispatcher, Doorbell
from vmbus.core.memory import Window
from vmbus.core.ring import Packet, RingReader, RingWriter
from vmbus.hypervisor import Hypervisor, VirtualClock

KIND = UUID("8e4d2c11-31ad-4d6b-9c6e-0f7c1e6a5b3d")
CHANNELS = 64
BATCH = 16
PAYLOAD = bytes(64)


@dataclass
class Bus:
    hosting: Hosting
    host: VmbusHost
    guest: VmbusGuest


@contextmanager
def bus(
    offers: int, hosting: Hosting | None = None, on_open: Callable[[Channel], None] | None = None
) -> Iterator[Bus]:
    hosting = hosting or Inline()
    hv = Hypervisor(clock=VirtualClock() if isinstance(hosting, Inline) else None)
    root = hv.create_root()
    child = hv.create_child(root, memory_size=64 << 20)
    host = VmbusHost(hv, child, hosting=hosting)
    for number in range(offers):
        host.offer(Offer(KIND, UUID(int=number)), on_open)
    guest = VmbusGuest(child.vps[0])
    try:
        yield Bus(hosting, host, guest)
    finally:
        guest.close()
        hosting.close()
        child.destroy()
        root.destroy()


def counted(benchmark: BenchmarkFixture, group: str, operations: int, run: Callable[[], object]) -> None:
    benchmark.group = group
    benchmark.extra_info["operations"] = operations
    benchmark(run)
    stats = getattr(benchmark, "stats", None)
    if stats is not None:
        benchmark.extra_info["per_second"] = round(operations / stats.stats.median)


@pytest.mark.parametrize("version", [Version.V0_13, Version.V5_3, Version.V6_0], ids=version_name)
def test_connect(benchmark: BenchmarkFixture, version: Version) -> None:
    """INITIATE_CONTACT to ALL_OFFERS_DELIVERED with eight offers, the last connection ended by it."""
    with bus(8) as made:
        counted(benchmark, "connect", 1, lambda: made.guest.connect([version]))
        assert len(made.guest.offers) == 8


@pytest.mark.parametrize("hosting", ["inline", "threads"])
def test_connect_and_open_per_channel(benchmark: BenchmarkFixture, hosting: str) -> None:
    """INITIATE_CONTACT, offers, and a ring of 4 + 4 pages opened on each of eight channels: the cost per channel."""
    with bus(8, Threads(1) if hosting == "threads" else None) as made:

        def run() -> None:
            made.guest.connect()
            for offer in made.guest.offers:
                made.guest.open(offer, 4, 4)

        counted(benchmark, "connect and open", 8, run)


@pytest.mark.parametrize("hosting", ["inline", "threads"])
def test_open_and_close_a_channel(benchmark: BenchmarkFixture, hosting: str) -> None:
    """Ring GPADL, open, close, teardown: five control messages and three answers, rings mapped at both ends."""
    with bus(1, Threads(1) if hosting == "threads" else None) as made:
        made.guest.connect()
        offer = made.guest.offers[0]
        counted(benchmark, "open and close", 1, lambda: made.guest.open(offer, 4, 4).close())


def test_messages_through_the_host_machine(benchmark: BenchmarkFixture) -> None:
    """The state machine alone: GPADL_HEADER and GPADL_TEARDOWN, answered."""
    machine = HostMachine(1 << 14)
    machine.offer(Offer(KIND, UUID(int=1)))
    machine.receive(encode(wire.InitiateContact(Version.V5_3, 0, 2, 0, 0)))
    machine.receive(encode(wire.RequestOffers()))
    header = encode(wire.GpadlHeader(1, 7, 16, 1), struct.pack("<IIQ", 4096, 0, 99))
    teardown = encode(wire.GpadlTeardown(1, 7))

    def run() -> None:
        for _ in repeat(None, 50):
            for action in machine.receive(header):
                if isinstance(action, act.MapGpadl):
                    machine.complete_gpadl(action.serial, True)
            machine.receive(teardown)

    counted(benchmark, "messages", 100, run)


def test_messages_through_the_hypervisor(benchmark: BenchmarkFixture) -> None:
    """The same, posted by hypercall and answered through the message slot of the SynIC."""
    with bus(1) as made:
        made.guest.connect()
        channel = made.guest.open(made.guest.offers[0])
        pfns = made.guest.pages.allocate(1)

        def run() -> None:
            for _ in repeat(None, 50):
                channel.teardown_gpadl(channel.create_gpadl(pfns))

        counted(benchmark, "messages", 100, run)


@pytest.mark.parametrize("monitored", [False, True], ids=["hypercall", "monitored"])
def test_events(benchmark: BenchmarkFixture, monitored: bool) -> None:
    """Doorbells from the guest: each an HvSignalEvent and a run of the channel's task, or a bit in the monitor page."""
    rung = [0]

    def on_open(channel: Channel) -> None:
        def count() -> None:
            rung[0] += 1

        channel.on_signal = count

    with bus(0) as made:
        latency = 100_000 if monitored else None
        made.host.offer(Offer(KIND, UUID(int=1), monitor_latency=latency), on_open)
        made.guest.connect()
        channel = made.guest.open(made.guest.offers[0])

        def run() -> None:
            for _ in repeat(None, 200):
                channel.signal()

        counted(benchmark, "events", 200, run)
        assert (rung[0] > 0) != monitored
        benchmark.extra_info["hypercalls_saved"] = channel.account.hypercalls_saved


@pytest.mark.parametrize("hosting", ["inline", "threads"])
def test_dispatch_of_64_busy_channels(benchmark: BenchmarkFixture, hosting: str) -> None:
    """64 channels, 16 packets each way on every one: sent, rung, served, answered, taken."""

    def on_open(channel: Channel) -> None:
        channel.serve(
            lambda packets: channel.notify(channel.outgoing.send_batch([p.payload for p in packets])[1])
        )

    with bus(CHANNELS, Threads(2) if hosting == "threads" else None, on_open) as made:
        made.guest.connect()
        channels = [made.guest.open(offer, 2, 2) for offer in made.guest.offers]
        got = [0]

        def take(packets: list[Packet]) -> None:
            got[0] += len(packets)

        for channel in channels:
            channel.serve(take)
        payloads = [PAYLOAD] * BATCH

        def run() -> None:
            got[0] = 0
            for channel in channels:
                channel.notify(channel.outgoing.send_batch(payloads)[1])
            assert made.hosting.wait_for(lambda: got[0] == CHANNELS * BATCH)

        counted(benchmark, "64 busy channels", CHANNELS * BATCH, run)


def test_dispatch_of_64_busy_channels_by_the_compiled_dispatcher(benchmark: BenchmarkFixture) -> None:
    """The same load, one way, without control plane or hypervisor: what the compiled dispatcher alone does."""
    dispatcher = Dispatcher(CHANNELS)
    windows = [Window.allocate(2) for _ in range(CHANNELS)]
    writers = [RingWriter(window) for window in windows]
    got = [0]

    def take(packets: list[Packet]) -> None:
        got[0] += len(packets)

    for flag, window in enumerate(windows):
        dispatcher.add(flag, RingReader(window), take)
    payloads = [PAYLOAD] * BATCH

    def run() -> None:
        got[0] = 0
        for flag, writer in enumerate(writers):
            if writer.send_batch(payloads)[1]:
                dispatcher.signal(flag)
        while got[0] < CHANNELS * BATCH:
            dispatcher.poll()

    counted(benchmark, "64 busy channels", CHANNELS * BATCH, run)


@pytest.mark.parametrize("spin", [0.0, 5e-6, 20e-6, 100e-6], ids=["no spin", "5 us", "20 us", "100 us"])
def test_what_the_spin_costs_and_saves(benchmark: BenchmarkFixture, spin: float) -> None:
    """A request and its answer through two threads' doorbells.

    A spin that pays off saves going to sleep and being woken; one that does not costs processor time that the other
    thread may have needed. Which it is depends on the processors: see ``slept`` and ``spins_paid``.
    """
    there, back = Doorbell(), Doorbell()
    stop = threading.Event()

    def server() -> None:
        while not stop.is_set():
            if there.wait(0.2, spin):
                back.ring()

    thread = threading.Thread(target=server)
    thread.start()

    def run() -> None:
        for _ in repeat(None, 50):
            there.ring()
            while not back.wait(1.0, spin):
                pass

    used = time.process_time()
    try:
        counted(benchmark, "a doorbell there and back", 50, run)
    finally:
        used = time.process_time() - used
        stop.set()
        thread.join()
    trips = there.sleeps + there.spins_paid
    benchmark.extra_info["slept"] = there.sleeps + back.sleeps
    benchmark.extra_info["spins_paid"] = there.spins_paid + back.spins_paid
    # Both threads': what is spun away is paid here, whether or not it made the answer come sooner.
    benchmark.extra_info["processor_us_per_trip"] = round(used * 1e6 / max(1, trips), 2)
    assert trips > 0
    there.close()
    back.close()
