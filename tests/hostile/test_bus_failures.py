"""The host lacks memory, mappings or descriptors at any point of the bus's work for a guest: what needs it ends, and
nothing else.

Each action of the control plane fails in turn, those that are added some day as well: they come from the type that
lists them.
"""

import errno
import typing
from collections.abc import Iterator
from uuid import UUID

import pytest

from vmbus.bus import Channel, Offer, Version, VmbusGuest, VmbusHost
from vmbus.bus import actions as act
from vmbus.core.memory import PAGE_SIZE
from vmbus.errors import ProtocolError, VmbusError
from vmbus.hypervisor import Hypervisor, VirtualClock
from vmbus.trace.events import EventTrace

KIND = UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f")
ACTIONS = sorted(typing.get_args(act.HostAction), key=lambda action: action.__name__)
UNUSED = {act.ReservedClosed}
"""Events that the model guest's driver does not know: it opens no reserved channels."""
EVENTS = sorted({*typing.get_args(act.GuestEvent)} - UNUSED, key=lambda event: event.__name__)
LACKS = [OSError(errno.ENOMEM, "Cannot allocate memory"), OSError(errno.EMFILE, "Too many"), MemoryError()]
CONNECTION = {act.Established, act.Disconnected, act.Send, act.UseMonitorPages}
"""Actions that are about the connection and not about one channel."""


class FailingHost(VmbusHost):
    """A bus on which one kind of action fails once."""

    failing: type | None = None
    lack: BaseException = MemoryError()
    failed = 0

    def _do(self, action: act.HostAction) -> None:
        if type(action) is self.failing:
            self.failing = None
            self.failed += 1
            raise self.lack
        super()._do(action)


class FailingGuest(VmbusGuest):
    """A driver that has no memory for one kind of event, once."""

    failing: type | None = None
    lack: BaseException = MemoryError()
    failed = 0

    def _fail(self, event: act.GuestEvent) -> None:
        if type(event) is self.failing:
            self.failing = None
            self.failed += 1
            raise self.lack

    def _take(self, event: act.GuestEvent) -> None:
        self._fail(event)
        super()._take(event)

    def _post_message(self, post: act.Post) -> None:
        self._fail(post)
        super()._post_message(post)


class World:
    """A guest on the bus that fails, and a neighbour."""

    def __init__(self) -> None:
        self.hv = Hypervisor(clock=VirtualClock())
        root = self.hv.create_root()
        self.children = [self.hv.create_child(root, name, memory_size=8 << 20) for name in ("hit", "victim")]
        self.host = FailingHost(self.hv, self.children[0], on_tl_connect=lambda *_: False)
        self.hosts = [self.host, VmbusHost(self.hv, self.children[1])]
        self.offered = {}
        self.opened: list[Channel] = []
        self.closed: list[Channel] = []
        for host in self.hosts:
            for number in range(3):
                offer = Offer(KIND, UUID(int=number + 1), monitor_latency=100_000 if number == 2 else None)
                self.offered[host, number] = host.offer(
                    offer, self.open, self.closed.append, name=f"echo{number}"
                )
        self.guest = FailingGuest(self.children[0].vps[0], versions=[Version.V6_0])
        self.neighbour = VmbusGuest(self.children[1].vps[0])
        self.neighbour.connect()
        self.kept = self.neighbour.open(self.neighbour.offers[0])

    def open(self, channel: Channel) -> None:
        self.opened.append(channel)
        echo(channel)

    def arm(self, kind: type, lack: BaseException) -> None:
        self.host.failing, self.host.lack = kind, lack

    def neighbour_works(self) -> bool:
        return answers(self.kept) and answers(self.neighbour.open(self.neighbour.offers[1]))

    def new_connection_works(self) -> bool:
        """A driver that starts anew, as after a crash, finds a bus that serves it."""
        again = VmbusGuest(self.children[0].vps[0])
        again.connect()
        offers = {offer.instance_id.int: offer for offer in again.offers}
        return all(answers(again.open(offers[number])) for number in (1, 2, 3) if number in offers)


def echo(channel: Channel) -> None:
    channel.serve(lambda packets: [channel.send(packet.payload) for packet in packets] and None)


def answers(channel: Channel) -> bool:
    channel.send(b"question")
    there = channel.wait(lambda: not channel.is_open or channel.incoming.available_bytes > 0)
    return there and channel.is_open and channel.incoming.recv() == b"question"


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.hv.close()


def life(world: World) -> Iterator[str]:
    """Everything that a guest does on its bus; each step alone may fail with an error of the protocol."""
    guest = world.guest
    yield "connect"
    guest.connect()
    offers = {offer.instance_id.int: offer for offer in guest.offers}
    opened: dict[int, Channel] = {}
    for number, offer in offers.items():
        yield f"open {number}"
        opened[number] = guest.open(offer)
    for number, channel in opened.items():
        yield f"use {number}"
        assert not channel.is_open or answers(channel)
    first = opened.get(1)
    if first is not None and first.is_open:
        yield "describe memory"
        gpadl_id = first.create_gpadl(guest.pages.allocate(3))
        yield "take it back"
        first.teardown_gpadl(gpadl_id)
        yield "retarget"
        guest.retarget(first, 0)
    yield "connect a socket"
    guest.tl_connect(UUID(int=5), UUID(int=6))
    if 3 in opened:
        yield "close"
        opened[3].close()
    yield "other monitor pages"
    pages = guest.pages.allocate(2)
    with guest._lock:
        guest._post(guest.machine.modify_connection(act.MonitorPages(pages[0] << 12, pages[1] << 12)))
    yield "lose a device"
    world.offered[world.host, 1].rescind()
    yield "unload"
    guest.disconnect()


@pytest.mark.parametrize("lack", LACKS, ids=["no memory to map", "no descriptors", "no memory"])
@pytest.mark.parametrize("kind", ACTIONS, ids=lambda kind: kind.__name__)
def test_an_action_that_fails(world: World, kind: type, lack: BaseException) -> None:
    world.arm(kind, lack)
    steps = life(world)
    went_wrong = []
    try:
        while True:
            step = next(steps)
    except StopIteration:
        pass
    except ProtocolError as error:
        went_wrong.append((step, error))
    assert world.host.failed == 1, "the guest's life has all actions in it"
    world.host.machine.check()
    assert world.neighbour_works()
    if kind in (act.MapGpadl, act.OpenDevice):
        assert went_wrong[0][0] == "open 1", "the one who asked is refused"
        second = next(o for o in world.guest.offers if o.instance_id.int == 2)
        assert answers(world.guest.open(second)), "its other channels serve"
        first = next(o for o in world.guest.offers if o.instance_id.int == 1)
        assert answers(world.guest.open(first)), "and this one, asked for again"
    elif kind is act.Established:
        assert went_wrong[0][0] == "connect"
    elif kind not in CONNECTION:
        assert not went_wrong or went_wrong[0][0] in ("close", "retarget", "use 1", "take it back"), (
            went_wrong
        )
    world.guest.abandon()
    assert world.new_connection_works()
    for host in world.hosts:
        host.close()
    assert len(world.closed) == len(world.opened), "every device that was opened was closed"


@pytest.mark.parametrize("lack", LACKS, ids=["no memory to map", "no descriptors", "no memory"])
@pytest.mark.parametrize("kind", EVENTS, ids=lambda kind: kind.__name__)
def test_an_event_that_fails_in_the_guest(world: World, kind: type, lack: BaseException) -> None:
    """The model guest's own driver: who asked gets an error, and no wait is without an end."""
    guest = world.guest
    if kind is act.ConnectionRefused:
        guest.failing, guest.lack = kind, lack
        with pytest.raises(ProtocolError):
            guest.connect([0x7_0000])
    guest.failing, guest.lack = kind if kind is not act.ConnectionRefused else None, lack
    went_wrong = []
    try:
        for _ in life(world):
            pass
        if kind is act.Paused:
            guest.connect()
            guest.pause()
    except (ProtocolError, type(lack)) as error:
        went_wrong.append(error)
    assert guest.failed == 1, "the guest's life has all events in it"
    assert world.neighbour_works()
    if kind in (act.GpadlAnswered, act.OpenAnswered):
        assert isinstance(went_wrong[0], ProtocolError)
        second = next(o for o in guest.offers if o.instance_id.int == 2)
        assert answers(guest.open(second)), "another channel serves"
        first = next(o for o in guest.offers if o.instance_id.int == 1)
        assert answers(guest.open(first)), "and this one, asked for again"
    world.host.machine.check()
    guest.abandon()
    assert world.new_connection_works()


def test_every_action_is_one_of_the_hosts_or_the_guests() -> None:
    kinds = {name for name in act.__all__ if isinstance(getattr(act, name), type)}
    structures = {"MonitorPages", "OpenRequest"}
    assert kinds - structures == {kind.__name__ for kind in (*ACTIONS, *EVENTS, *UNUSED)}


def test_a_message_that_could_not_be_sent_comes_later(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, and none twice: the guest waits for it."""
    post, lacking = Hypervisor.post_message, [3]

    def sometimes(self: Hypervisor, *arguments: typing.Any) -> None:
        if lacking[0] and arguments[0] is world.children[0]:
            lacking[0] -= 1
            raise MemoryError
        post(self, *arguments)

    world.guest.connect()
    monkeypatch.setattr(Hypervisor, "post_message", sometimes)
    first = world.guest.open(world.guest.offers[0])
    assert not lacking[0]
    assert answers(first)
    assert world.children[0].meter.backlog.used == 0


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()], ids=repr)
@pytest.mark.parametrize("where", ["on_open", "on_signal", "on_close"])
def test_a_provider_that_finds_no_memory(world: World, where: str, error: Exception) -> None:
    """What it is called for ends: the open is refused, the channel taken away, or it is closed all the same."""

    def fail(*_: object) -> None:
        raise error

    def on_open(channel: Channel) -> None:
        if where == "on_open":
            fail()
        channel.on_signal = fail if where == "on_signal" else None

    device = world.host.offer(
        Offer(KIND, UUID(int=9)), on_open, fail if where == "on_close" else None, name="poor"
    )
    world.guest.connect()
    offer = next(o for o in world.guest.offers if o.instance_id.int == 9)
    other = world.guest.open(next(o for o in world.guest.offers if o.instance_id.int == 2))
    if where == "on_open":
        with pytest.raises(VmbusError, match="refused"):
            world.guest.open(offer)
    else:
        channel = world.guest.open(offer)
        channel.send(b"question")
        if where == "on_close":
            channel.close()
        assert not channel.is_open
    assert device.channel is None
    assert answers(other)
    assert world.neighbour_works()
    world.host.machine.check()


class FailingTrace(EventTrace):
    """A trace that finds no memory for one kind of event, once."""

    failing = ""

    def record(self, time: int, source: str, target: str, kind: str, **particulars: object) -> None:
        if kind == self.failing:
            self.failing = ""
            raise MemoryError
        super().record(time, source, target, kind, **particulars)


@pytest.mark.parametrize("kind", ["open", "close", "doorbell", "connect", "unload", "message"])
def test_a_trace_that_finds_no_memory(world: World, kind: str) -> None:
    """An event is not in the trace, and the guest does not notice."""
    trace, closed = FailingTrace(), []
    child = world.hv.create_child(world.hv.root, "traced", memory_size=8 << 20)
    VmbusHost(world.hv, child, trace=trace).offer(Offer(KIND, UUID(int=1)), echo, closed.append)
    trace.failing = kind
    for life in (1, 2):
        guest = VmbusGuest(child.vps[0])
        guest.connect()
        channel = guest.open(guest.offers[0])
        assert answers(channel)
        channel.close()
        guest.close()
        assert len(closed) == life
        assert not trace.failing
    assert {event.kind for event in trace} >= {"open", "close", "doorbell", "connect", "unload", "message"}
    assert world.neighbour_works()


def test_a_port_that_could_not_be_deleted_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    delete, lacking = Hypervisor.delete_port, [1]

    def sometimes(self: Hypervisor, *arguments: typing.Any) -> None:
        if lacking[0]:
            lacking[0] -= 1
            raise MemoryError
        delete(self, *arguments)

    world.guest.connect()
    channel = world.guest.open(world.guest.offers[0])
    monkeypatch.setattr(Hypervisor, "delete_port", sometimes)
    channel.close()
    assert not lacking[0]
    assert answers(world.guest.open(world.guest.offers[0]))


def test_a_connection_that_cannot_be_set_up_is_refused_in_every_version(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest is told so in the version's own way, and may try again."""
    for version in sorted(Version):
        world.arm(act.Established, MemoryError())
        with pytest.raises(ProtocolError, match="the host"):
            world.guest.connect([version])
        assert world.host.version == 0
        assert world.guest.connect([version]) == version
        world.guest.disconnect()


def test_monitor_pages_that_cannot_be_used_leave_those_before(world: World) -> None:
    world.guest.connect()
    before = world.host.machine.monitor_pages
    monitored = next(o for o in world.guest.offers if o.instance_id.int == 3)
    pages = world.guest.pages.allocate(2)
    world.arm(act.UseMonitorPages, MemoryError())
    with world.guest._lock:
        events = world.guest.machine.modify_connection(act.MonitorPages(*(p * PAGE_SIZE for p in pages)))
        world.guest._post(events)
    assert world.host.machine.monitor_pages == before
    assert world.guest.machine.monitor_pages == before, "the guest goes on with them, too"
    channel = world.guest.open(monitored)
    channel.send(b"question")
    world.hv.clock.advance(1_000_000)  # type: ignore[attr-defined]
    assert channel.incoming.recv() == b"question"
