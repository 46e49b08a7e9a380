"""Twelve children with eight channels each at once, in every hosting, with offers rescinded and children killed."""

import contextlib
import gc
import logging
import os
import random
import threading
import time
from operator import le

import pytest
from reference.bus_soak import Provider
from reference.descriptors import open_descriptors

from vmbus.bus import GuestRun, Hosting, Inline, Processes, Threads, VmbusHost, start_guest
from vmbus.bus.vmbus_guest import VmbusGuest
from vmbus.errors import DeviceError
from vmbus.hypervisor import Hypervisor, VirtualClock
from vmbus.trace.events import EventTrace

CLIENT = "reference.bus_soak:client"


class Park:
    """A hypervisor with some children, each with a bus of some echoing devices."""

    def __init__(
        self,
        hosting: Hosting,
        children: int,
        channels: int,
        *,
        virtual: bool,
        trace: EventTrace | None = None,
    ) -> None:
        self.hosting = hosting
        self.hv = Hypervisor(clock=VirtualClock() if virtual else None)
        self.root = self.hv.create_root()
        self.hosts: list[VmbusHost] = []
        self.providers: dict[VmbusHost, list[Provider]] = {}
        for number in range(children):
            child = self.hv.create_child(self.root, f"c{number}", memory_size=8 << 20)
            host = VmbusHost(self.hv, child, hosting=hosting, trace=trace)
            self.hosts.append(host)
            # The last device is a pair of a primary channel and a sub-channel.
            numbers = [(n, 0) for n in range(1, channels)] + [(channels - 1, 1)]
            self.providers[host] = [Provider(host, n, sub) for n, sub in numbers]

    def rescind_something(self, rng: random.Random) -> None:
        host = rng.choice(self.hosts)
        provider = rng.choice(self.providers[host])
        provider.offered.rescind()
        for other in self.providers[host]:
            if not other.offered.is_present or other.offered.channel is None:
                self.offer_again(other)

    @staticmethod
    def offer_again(provider: Provider) -> None:
        known = {c.offer.key for c in provider.host.machine.channels.values()}
        waiting = {c.successor.offer.key for c in provider.host.machine.channels.values() if c.successor}
        states = {c.offer.key: c.state.value for c in provider.host.machine.channels.values()}
        if provider.offer.key in waiting:
            return
        if provider.offer.key not in known or states[provider.offer.key] == "rescinded":
            provider.offer_again()

    def check(self, results: list[dict[str, int] | None]) -> dict[str, int]:
        total: dict[str, int] = {}
        for result in results:
            for name, value in (result or {}).items():
                total[name] = total.get(name, 0) + value
        assert total["wrong"] == 0, "an answer was lost, came twice, or out of order"
        assert total["lost"] == 0
        assert total["leaked_pages"] == 0
        for host in self.hosts:
            host.machine.check()
            for provider in self.providers[host]:
                assert provider.wrong == 0, "a request was lost, came twice, or out of order"
                assert provider.opens == provider.closes
            assert host.channels == []
            assert not host.machine.gpadls
        return total

    def close(self) -> None:
        for host in self.hosts:
            host.child.destroy()
            assert host.offered == {}
        self.hosting.close()
        self.root.destroy()


class Chaos:
    """Rescinds and kills at random moments, and starts a new guest where one was killed."""

    def __init__(
        self, park: Park, seed: int, *, rounds: int, channels: int, kills: int, rescinds: int
    ) -> None:
        self.park = park
        self.rng = random.Random(seed)
        self.arguments = {"rounds": rounds, "channels": channels}
        self.runs: dict[VmbusHost, GuestRun] = {}
        self.results: list[dict[str, int] | None] = []
        self.plan = ["rescind"] * rescinds + ["kill"] * kills
        self.rng.shuffle(self.plan)
        for host in park.hosts:
            self.start(host)

    def start(self, host: VmbusHost) -> None:
        self.runs[host] = start_guest(host, CLIENT, {"seed": self.rng.randrange(1 << 30), **self.arguments})

    def revive(self) -> bool:
        """Start guests anew where the killed ones are gone; whether some still die."""
        dying = [host for host, run in self.runs.items() if run.killed]
        for host in dying:
            if self.runs[host].done:
                self.results.append(self.runs[host].join())
                self.start(host)
        return bool(dying)

    def strike(self) -> bool:
        """Do the next thing of the plan; False when everything is done."""
        self.revive()
        if self.plan:
            alive = [host for host in self.park.hosts if not self.runs[host].killed]
            if self.plan.pop() == "rescind":
                self.park.rescind_something(self.rng)
            elif alive:
                self.runs[self.rng.choice(alive)].kill()
        return bool(self.plan)


def soak(
    park: Park, seed: int, *, rounds: int, channels: int, kills: int, rescinds: int, pace: float = 0.0
) -> dict[str, int]:
    chaos = Chaos(park, seed, rounds=rounds, channels=channels, kills=kills, rescinds=rescinds)
    if isinstance(park.hosting, Inline):
        # It is one of the tasks, so that it strikes in the middle of what the others do.
        task = park.hosting.task("chaos", lambda: chaos.strike() and park.hosting.ring(task))
        park.hosting.ring(task)
        park.hosting.run()
    else:
        while chaos.strike():
            time.sleep(pace * chaos.rng.random())
    while chaos.revive():
        park.hosting.wait_for(lambda: not any(run.killed and not run.done for run in chaos.runs.values()), 30)
    return park.check(chaos.results + [run.join(120) for run in chaos.runs.values()])


def test_soak_inline() -> None:
    park = Park(Inline(seed=7, eager=False), 12, 8, virtual=True)
    total = soak(park, seed=7, rounds=40, channels=8, kills=6, rescinds=40)
    assert total["opened"] > 100
    assert total["sent"] > 2000
    assert total["gone"] > 5
    park.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_soak_inline_long(seed: int) -> None:
    park = Park(Inline(seed=seed, eager=False), 12, 8, virtual=True)
    soak(park, seed=seed, rounds=200, channels=8, kills=20, rescinds=200)
    park.close()


@pytest.mark.slow
def test_soak_threads() -> None:
    park = Park(Threads(workers=4), 12, 8, virtual=False)
    total = soak(park, seed=11, rounds=150, channels=8, kills=8, rescinds=60, pace=0.1)
    assert total["sent"] > 2000
    park.close()


def test_soak_threads_short() -> None:
    park = Park(Threads(workers=2), 3, 8, virtual=False)
    total = soak(park, seed=12, rounds=40, channels=8, kills=2, rescinds=10, pace=0.05)
    assert total["sent"] > 100
    park.close()


@pytest.mark.slow
def test_soak_processes() -> None:
    park = Park(Processes(workers=4), 12, 8, virtual=False)
    total = soak(park, seed=13, rounds=100, channels=8, kills=6, rescinds=40, pace=0.4)
    assert total["sent"] > 1000
    park.close()


def trace_of(seed: int) -> bytes:
    trace = EventTrace()
    park = Park(Inline(seed=seed, eager=False), 3, 4, virtual=True, trace=trace)
    soak(park, seed=seed, rounds=20, channels=4, kills=2, rescinds=10)
    park.close()
    return trace.dump()


def test_equal_seeds_give_equal_traces() -> None:
    first, second, other = trace_of(3), trace_of(3), trace_of(4)
    assert len(first.splitlines()) > 300
    assert first == second
    assert first != other


def mappings() -> int:
    with open("/proc/self/maps", encoding="ascii") as maps:
        return sum(1 for _ in maps)


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as counts:
        return int(counts.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def create_and_destroy(hv: Hypervisor, hosting: Hosting, rng: random.Random) -> None:
    child = hv.create_child(hv.root, memory_size=2 << 20)  # type: ignore[arg-type]
    host = VmbusHost(hv, child, hosting=hosting)
    providers = [Provider(host, n) for n in (1, 2)]
    guest = VmbusGuest(child.vps[0])
    guest.connect()
    channels = [guest.open(offer, 1, 1) for offer in guest.offers]
    channels[0].create_gpadl(guest.pages.allocate(3))
    end = rng.randrange(4)
    if end == 0:
        guest.close()
    elif end == 1:
        providers[0].offered.rescind()
        hosting.wait_for(lambda: not channels[0].is_open)
        guest.abandon()
    else:
        guest.abandon()
    if end == 3:
        host.close()
    child.destroy()
    assert host.offered == {}
    assert all(p.opens == p.closes for p in providers)


def rounds_without_leaks(rounds: int) -> None:
    rng = random.Random(5)
    hv = Hypervisor(clock=VirtualClock())
    hv.create_root()
    hosting = Inline()
    for _ in range(30):  # what is made once is made now
        create_and_destroy(hv, hosting, rng)
    gc.collect()
    before = open_descriptors(), mappings(), len(gc.get_objects())
    memory = resident()
    for _ in range(rounds):
        create_and_destroy(hv, hosting, rng)
    gc.collect()
    after = open_descriptors(), mappings(), len(gc.get_objects())
    assert after[0] == before[0], "file descriptors"
    assert after[1] <= before[1] + 20, "mappings"
    # One ledger account for each partition name stays: that is what a ledger is for.
    assert after[2] <= before[2] + rounds * 60, "objects"
    assert resident() - memory < (4 << 20) + rounds * 10_000, (
        "memory: a child has 2 MiB, a ledger account little"
    )
    assert len(hv.partitions) == 1


def test_create_and_destroy() -> None:
    rounds_without_leaks(60)


@pytest.mark.slow
def test_a_thousand_rounds_of_create_and_destroy() -> None:
    rounds_without_leaks(1000)


def guest_mappings() -> int:
    """Mappings of guests' memory; threads have stacks and heaps of the C library's, which it keeps."""
    with open("/proc/self/maps", encoding="ascii") as maps:
        return sum("memfd:vmbus-guest" in line for line in maps)


def live_and_die(hv: Hypervisor, hosting: Hosting, rng: random.Random, children: int) -> None:
    """Children that run at once, each from its creation to its destruction; some are killed, some lose a device."""
    hosts, providers, runs = [], [], []
    for _ in range(children):
        child = hv.create_child(hv.root, memory_size=2 << 20)  # type: ignore[arg-type]
        hosts.append(VmbusHost(hv, child, hosting=hosting))
        providers.append([Provider(hosts[-1], n) for n in (1, 2)])
        arguments = {"seed": rng.randrange(1 << 30), "rounds": 12, "channels": 2}
        runs.append(start_guest(hosts[-1], CLIENT, arguments))
    for number in range(children):
        fate = rng.randrange(4)
        if fate == 0:
            time.sleep(rng.random() * 0.005)
            runs[number].kill()
        elif fate == 1:
            providers[number][0].offered.rescind()
        elif fate == 2:
            hosts[number].child.destroy()  # with the guest still in it
    for host, run, mine in zip(hosts, runs, providers, strict=True):
        with contextlib.suppress(DeviceError):  # that of a destroyed child ends anyhow
            run.join(120)
        host.child.destroy()
        assert host.offered == {}
        assert host.channels == []
        assert not host.machine.channels
        assert not host.machine.gpadls
        assert all(p.opens == p.closes and p.wrong == 0 for p in mine)
        hosting.wait_for(lambda run=run: run.done)  # type: ignore[misc]


def generations_without_leaks(hosting: Threads, generations: int, children: int, seed: int) -> None:
    rng = random.Random(seed)
    hv = Hypervisor()
    hv.create_root()
    for _ in range(3):
        live_and_die(hv, hosting, rng, children)
    gc.collect()
    before = open_descriptors(), threading.active_count(), guest_mappings(), len(gc.get_objects())
    for _ in range(generations):
        live_and_die(hv, hosting, rng, children)
    gc.collect()
    after = open_descriptors(), threading.active_count(), guest_mappings(), len(gc.get_objects())
    # Fewer is fine: somebody may have been about to end.
    assert all(map(le, after[:3], before[:3])), ("descriptors, threads, mappings of guests", before, after)
    assert after[3] <= before[3] + generations * children * 60, "objects"
    assert set(hv.partitions) == {hv.root.id}  # type: ignore[union-attr]
    with pytest.raises(ChildProcessError):  # neither living children nor dead ones that nobody waited for
        os.waitpid(-1, os.WNOHANG)
    hosting.close()


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """What is logged keeps the exceptions that it names, and those what they came through: not to be counted."""
    caplog.set_level(logging.CRITICAL, logger="vmbus")


def test_lives_in_threads(quiet: None) -> None:
    generations_without_leaks(Threads(workers=2), 10, 8, seed=20)


@pytest.mark.slow
def test_a_thousand_lives_in_threads(quiet: None) -> None:
    generations_without_leaks(Threads(workers=4), 125, 8, seed=21)


@pytest.mark.slow
def test_lives_in_processes(quiet: None) -> None:
    """Ten generations of twelve; VMBUS_SOAK_GENERATIONS asks for more, as 84 for a thousand lives."""
    generations = int(os.environ.get("VMBUS_SOAK_GENERATIONS", "10"))
    generations_without_leaks(Processes(workers=4), generations, 12, seed=22)


def test_relids_and_gpadls_do_not_run_out() -> None:
    """One connection, many lives of an offer: ids come back."""
    hv = Hypervisor(clock=VirtualClock())
    child = hv.create_child(hv.create_root(), memory_size=4 << 20)
    host = VmbusHost(hv, child)
    guest = VmbusGuest(child.vps[0])
    guest.connect()
    used = guest.pages.in_use
    highest = 0
    for _ in range(300):
        provider = Provider(host, 1)
        (offer,) = guest.offers
        highest = max(highest, offer.channel_id)
        channel = guest.open(offer, 1, 1)
        provider.offered.rescind()
        assert not channel.is_open
        assert not provider.offered.is_present
    assert highest == 1
    assert guest.pages.in_use == used
    assert not guest.machine.gpadls
    assert not host.machine.gpadls
    assert host.machine.channels == {}
    guest.close()
