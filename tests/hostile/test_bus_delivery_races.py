"""Doorbells that meet the setting of a callback, another processor's handler, or the end of the hosting."""

import threading
from uuid import UUID

import pytest

from vmbus.bus import Channel, Offer, Threads, VmbusGuest, VmbusHost
from vmbus.bus.guest_processor import VECTOR
from vmbus.bus.hosting import hosting_of
from vmbus.core.memory import GuestMemory, Window
from vmbus.core.ring import RingReader, RingWriter
from vmbus.errors import ProtocolError
from vmbus.hypervisor import Hypervisor

KIND = UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f")


class Owner:
    """Of a channel without a peer: counts how often it is asked to deliver again."""

    def __init__(self):
        self.asked = 0

    def again(self, channel):
        self.asked += 1


class SetMeanwhile(Channel):
    """Its provider sets the callback while a doorbell finds none, just before that is noted."""

    __slots__ = ("meanwhile", "noted")

    @property
    def _missed(self):
        return self.noted

    @_missed.setter
    def _missed(self, value):
        if value:
            self.on_signal = self.meanwhile
        self.noted = value


def test_a_doorbell_while_the_callback_is_being_set():
    owner, rings = Owner(), Window.allocate(1)
    channel = SetMeanwhile(
        owner, Offer(KIND, UUID(int=1)), RingWriter(rings), RingReader(rings), memory=GuestMemory(4096)
    )
    channel.meanwhile = lambda: None
    channel.deliver_signal()
    assert owner.asked == 1, "else nobody would look at the ring until it is rung again"


def test_a_missed_doorbell_is_delivered_where_all_others_are():
    """Not in the thread that sets the callback: the peer may ring again meanwhile, and two would read one ring."""
    owner, rings, called = Owner(), Window.allocate(1), []
    channel = Channel(
        owner, Offer(KIND, UUID(int=1)), RingWriter(rings), RingReader(rings), memory=GuestMemory(4096)
    )
    channel.deliver_signal()
    channel.on_signal = lambda: called.append(1)
    assert (called, owner.asked) == ([], 1)


@pytest.fixture
def pair():
    hv = Hypervisor()
    child = hv.create_child(hv.create_root(), "c", memory_size=4 << 20, vps=2)
    hosting = Threads(workers=2)
    host = VmbusHost(hv, child, hosting=hosting)
    offered = host.offer(Offer(KIND, UUID(int=1)))
    guest = VmbusGuest(child.vps[0], hosting=hosting)
    guest.connect()
    yield guest, offered
    hosting.close()
    hv.root.destroy()


@pytest.fixture
def world(pair):
    return pair[0]


def test_a_channels_driver_runs_on_one_processor_at_a_time(world):
    channel = world.open(world.offers[0], 2, 2)
    inside, go_on, depth, most, runs = threading.Event(), threading.Event(), [0], [0], [0]

    def driver():
        depth[0] += 1
        most[0] = max(most[0], depth[0])
        runs[0] += 1
        inside.set()
        assert go_on.wait(30)
        depth[0] -= 1

    channel.on_signal = driver
    first = threading.Thread(target=world._deliver, args=(channel,))
    first.start()
    assert inside.wait(30)
    world._deliver(channel)  # the other processor's handler, or the same one's from further down
    world._deliver(channel)
    go_on.set()
    first.join(30)
    assert most == [1]
    assert runs == [2], "what was rung meanwhile is seen, once"
    assert not world._busy


def test_a_failing_driver_does_not_stay_busy(world):
    channel = world.open(world.offers[0], 2, 2)

    def driver():
        raise ZeroDivisionError

    channel.on_signal = driver
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            world._deliver(channel)


def test_two_handlers_share_what_is_unfinished(world):
    """One of them takes the last, the other was about to."""

    class Shrinking(type(world._unfinished)):
        def __len__(self):
            return super().__len__() + 1

    world._unfinished = Shrinking()
    world._on_interrupt(world._ports[0])
    world._on_interrupt(world._ports[1])


def test_a_guest_that_was_abandoned_is_not_asked_again(world):
    channel = world.open(world.offers[0], 2, 2)
    world.abandon()
    world.again(channel)


def test_a_channel_that_is_rescinded_as_it_is_closed(world):
    channel, lock = world.open(world.offers[0], 2, 2), world._lock

    class Late:
        """The guest's lock, which the handler of the rescind gets first."""

        def __enter__(self):
            lock.acquire()
            if world._channels.pop(channel.channel_id, None) is not None:
                world._by_flag.pop(channel.channel_id)

        def __exit__(self, *exception):
            lock.release()

    world._lock = Late()
    channel.close()
    world._lock = lock
    assert not channel.is_open


def test_a_channel_that_is_rescinded_as_it_is_opened(pair):
    guest, offered = pair
    offer = guest.offers[0]

    class Late(dict):
        """The guest's rings; the host takes the offer back just as one is entered."""

        def __setitem__(self, channel_id, ring):
            super().__setitem__(channel_id, ring)
            offered.rescind()
            assert guest.hosting.wait_for(lambda: guest.machine.channel(channel_id) is None, 30)

    guest._rings = Late()
    in_use = guest.pages.in_use
    with pytest.raises(ProtocolError):
        guest.open(offer, 2, 2)
    assert guest.pages.in_use == in_use
    assert not guest._rings


def test_an_interrupt_handler_whose_guest_is_reset_in_the_middle(world, caplog):
    def reset():
        world._partition.reset()
        world._partition.vps[0].hypercall(0, 0, 0)

    world._take_messages = lambda port: reset()
    world._ports[0].vp.request_interrupt(VECTOR)
    assert world.hosting.wait_for(lambda: world.lost, 30)
    world._handle = lambda port: reset()
    world._on_interrupt(world._ports[0])
    assert not [record for record in caplog.records if record.exc_info]


def test_rings_that_meet_the_end_of_the_hosting():
    hosting = Threads(workers=1)
    task = hosting.task("late", lambda: None)
    closed = hosting._workers[0].doorbell

    class Late:
        """The worker's doorbell, closed between the look whether the hosting runs and the ring."""

        def ring(self):
            hosting.close()
            closed.ring()

        def close(self):
            closed.close()

    worker = hosting._workers[0]
    original_close = hosting.close

    def close():
        worker.stopping = True
        worker.doorbell = closed
        original_close()

    hosting.close = close
    worker.doorbell = Late()
    hosting.ring(task)
    assert hosting._closed


def test_one_hosting_for_all_buses_whoever_asks_first(monkeypatch):
    hv = Hypervisor()
    seen, together = [], threading.Barrier(8)

    def ask():
        together.wait(30)
        seen.append(hosting_of(hv))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len({id(hosting) for hosting in seen}) == 1
