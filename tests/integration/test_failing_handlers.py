"""A provider or driver that fails costs its own channel, with a word about it; Ctrl-C costs no channel."""

import contextlib
import logging
from collections.abc import Iterator
from uuid import UUID

import pytest

from vmbus.bus import Channel, Inline, Offer, Threads, VmbusGuest, VmbusHost
from vmbus.core.dispatch import Dispatcher
from vmbus.core.memory import Window
from vmbus.core.ring import RingReader, RingWriter
from vmbus.hypervisor import Hypervisor, VirtualClock

KIND = UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f")


class World:
    """A guest with two channels: the first one's provider is the test's, the second's echoes."""

    def __init__(self, hosting: str) -> None:
        inline = hosting == "inline"
        self.hv = Hypervisor(clock=VirtualClock() if inline else None)
        self.root = self.hv.create_root()
        self.child = self.hv.create_child(self.root, "c0", memory_size=16 << 20)
        self.hosting = Inline() if inline else Threads(workers=2)
        self.host = VmbusHost(self.hv, self.child, hosting=self.hosting)
        self.ends: dict[int, Channel] = {}
        for number in (1, 2):
            self.host.offer(
                Offer(KIND, UUID(int=number)),
                lambda end, n=number: self.ends.__setitem__(n, end),  # type: ignore[misc]
                name=f"device {number}",
            )
        self.guest = VmbusGuest(self.child.vps[0])
        self.guest.connect()
        offers = sorted(self.guest.offers, key=lambda offer: offer.instance_id.int)
        self.first, self.second = (self.guest.open(offer, 2, 2) for offer in offers)
        self.ends[2].serve(lambda packets: [self.ends[2].send(p.payload) for p in packets])

    def second_works(self) -> bool:
        got: list[bytes] = []
        self.second.serve(lambda packets: got.extend(p.payload for p in packets))
        self.second.send(b"neighbour")
        return self.hosting.wait_for(lambda: bool(got))

    def third(self) -> Offer:
        """The offer of a device that came later."""
        found: list[Offer] = []

        def look() -> bool:
            found[:] = [offer for offer in self.guest.offers if offer.instance_id.int == 3]
            return bool(found)

        assert self.hosting.wait_for(look)
        return found[0]

    def close(self) -> None:
        self.hosting.close()
        self.root.destroy()


@pytest.fixture(params=["inline", "threads"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(request.param)
    yield world
    world.close()


def fail(packets: object) -> None:
    raise KeyError("a defect")


def test_a_provider_that_fails(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    world.ends[1].serve(fail)
    try:
        world.first.send(b"hello")
    except KeyError:
        assert isinstance(world.hosting, Inline), "on one thread, whoever rings is told"
    assert world.hosting.wait_for(lambda: not world.first.is_open)
    assert not world.ends[1].is_open
    assert "device 1 is taken away: its provider failed: KeyError('a defect')" in caplog.text
    assert world.second_works()


def test_a_driver_that_fails(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    world.first.serve(fail)
    number = world.first.channel_id
    with contextlib.suppress(KeyError):
        world.ends[1].send(b"hello")
    world.hosting.wait_for(lambda: not world.first.is_open, 1.0)
    world.child.vps[0].request_interrupt(0xF3)  # callbacks are made after the next interrupt, at the latest
    assert world.hosting.wait_for(lambda: not world.first.is_open)
    assert f"channel {number} is closed: its driver failed: KeyError('a defect')" in caplog.text
    assert world.second_works()


@pytest.mark.parametrize("fault", [KeyError("a defect"), KeyboardInterrupt()], ids=repr)
def test_a_provider_that_fails_to_open(world: World, fault: BaseException) -> None:
    """The guest is refused, and may try again; whoever called the provider hears of the defect."""
    opened: list[Channel] = []
    faults = [fault]

    def on_open(end: Channel) -> None:
        if faults:
            raise faults.pop()
        opened.append(end)

    device = world.host.offer(Offer(KIND, UUID(int=3)), on_open, name="device 3")
    with pytest.raises(type(fault)):
        world.guest.open(world.third(), 2, 2)
    assert device.channel is None
    world.host.machine.check()
    assert world.second_works()
    world.guest = VmbusGuest(
        world.child.vps[0]
    )  # the wait of the driver's was cut short: another one takes over
    world.guest.connect()
    assert world.guest.open(world.third(), 2, 2).is_open
    assert opened == [device.channel]


@pytest.mark.parametrize("fault", [KeyError("a defect"), MemoryError(), KeyboardInterrupt()], ids=repr)
def test_a_channel_callback_that_fails_leaves_the_devices_own(world: World, fault: BaseException) -> None:
    closed: list[Channel] = []

    def on_open(end: Channel) -> None:
        end.on_closed = on_closed

    def on_closed() -> None:
        raise fault

    device = world.host.offer(Offer(KIND, UUID(int=3)), on_open, closed.append, name="device 3")
    channel = world.guest.open(world.third(), 2, 2)
    end = device.channel
    with contextlib.suppress(type(fault)):
        channel.close()
    assert closed == [end]
    assert device.channel is None
    world.host.machine.check()
    assert world.second_works()


class TestCtrlC:
    """A `KeyboardInterrupt` in the middle of a handler goes to whoever called; what it served goes on."""

    def test_in_a_provider(self) -> None:
        world = World("inline")
        got: list[bytes] = []

        def handler(packets: list) -> None:
            if not got:
                got.append(b"interrupted")
                raise KeyboardInterrupt
            got.extend(p.payload for p in packets)

        world.ends[1].serve(handler)
        with pytest.raises(KeyboardInterrupt):
            world.first.send(b"1" * 8)
        world.first.send(b"2" * 8)
        assert world.hosting.wait_for(lambda: len(got) > 1)
        assert got == [b"interrupted", b"2" * 8]
        world.close()

    def test_in_a_driver(self) -> None:
        world = World("inline")
        got: list[bytes] = []

        def handler(packets: list) -> None:
            if not got:
                got.append(b"interrupted")
                raise KeyboardInterrupt
            got.extend(p.payload for p in packets)

        world.first.serve(handler)
        with pytest.raises(KeyboardInterrupt):
            world.ends[1].send(b"1" * 8)
        world.ends[1].send(b"2" * 8)
        world.hosting.wait_for(lambda: len(got) > 1)
        assert got == [b"interrupted", b"2" * 8]
        world.close()

    def test_in_a_dispatcher(self) -> None:
        dispatcher = Dispatcher()
        pairs = [
            (RingWriter(window), RingReader(window)) for window in (Window.allocate(4), Window.allocate(4))
        ]
        got: list[tuple[int, bytes]] = []
        raising = [KeyboardInterrupt]

        def handler(flag: int, packets: list) -> None:
            if raising:
                raise raising.pop()
            got.extend((flag, p.payload) for p in packets)

        for flag, (_, reader) in enumerate(pairs):
            dispatcher.add(flag, reader, lambda packets, flag=flag: handler(flag, packets))
        for flag, (writer, _) in enumerate(pairs):
            writer.send(b"1" * 8)
            dispatcher.signal(flag)
        with pytest.raises(KeyboardInterrupt):
            dispatcher.poll()
        assert dispatcher.wait(0), "the other's signal, and a second look at the first"
        pairs[0][0].send(b"2" * 8)
        dispatcher.poll()
        assert got == [(0, b"2" * 8), (1, b"1" * 8)]
        assert pairs[0][0].send(b"3" * 8), "its peer is asked for signals again"

    def test_an_error_callback_that_fails_costs_nobody_else(self) -> None:
        dispatcher = Dispatcher()
        pairs = [
            (RingWriter(window), RingReader(window)) for window in (Window.allocate(4), Window.allocate(4))
        ]
        got: list[bytes] = []

        def worse(error: Exception) -> None:
            raise ZeroDivisionError

        dispatcher.add(0, pairs[0][1], fail, on_error=worse)
        dispatcher.add(1, pairs[1][1], lambda packets: got.extend(p.payload for p in packets))
        for flag, (writer, _) in enumerate(pairs):
            writer.send(b"1" * 8)
            dispatcher.signal(flag)
        with pytest.raises(ZeroDivisionError):
            dispatcher.poll()
        dispatcher.poll()
        assert got == [b"1" * 8]


def test_a_provider_that_fails_at_its_end_does_not_keep_the_bus(world: World) -> None:
    def on_close(end: Channel) -> None:
        raise KeyError("a defect")

    world.host.offer(Offer(KIND, UUID(int=3)), lambda end: None, on_close, name="device 3")
    world.guest.open(world.third(), 2, 2)
    with contextlib.suppress(KeyError):
        world.host.close()
    assert world.host.offered == {}
    another = VmbusHost(world.hv, world.child, hosting=world.hosting)
    another.close()


def test_a_provider_that_fails_twice_leaves_nobody_waiting() -> None:
    """In its `on_open`, and in the `on_close` that comes of it: the guest has its answer all the same."""
    world = World("inline")

    def on_open(end: Channel) -> None:
        raise RuntimeError("the first")

    def on_close(end: Channel) -> None:
        raise KeyError("the second")

    world.host.offer(Offer(KIND, UUID(int=3)), on_open, on_close, name="device 3")
    with pytest.raises(RuntimeError, match="the first"):
        world.guest.open(world.third(), 2, 2)
    world.host.machine.check()
    assert world.second_works()
    world.close()


def test_a_partition_event_reaches_others_whatever_a_provider_does_at_its_end() -> None:
    world = World("inline")

    def on_close(end: Channel) -> None:
        raise KeyError("a defect")

    heard: list[str] = []
    world.host.close()
    world.child.on_event = lambda event: heard.append(event.kind)
    host = VmbusHost(world.hv, world.child, hosting=world.hosting)
    host.offer(Offer(KIND, UUID(int=3)), lambda end: None, on_close, name="device 3")
    guest = VmbusGuest(world.child.vps[0])
    guest.connect()
    guest.open(guest.offers[0], 2, 2)
    with contextlib.suppress(KeyError):
        world.child.notify("reset", 0)
    assert heard == ["reset"]
    world.close()
