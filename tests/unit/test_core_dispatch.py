import threading
import time

import pytest

from vmbus.core.dispatch import EVENT_FLAGS, Dispatcher, Doorbell, EventFlags, MessageSlot
from vmbus.core.memory import READ, WRITE, GuestMemory, Window
from vmbus.core.ring import Packet, RingReader, RingWriter
from vmbus.errors import GuestMemoryError, RingCorrupt


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory(1 << 16)


def test_event_flags_are_bits_of_the_page(memory: GuestMemory) -> None:
    flags = EventFlags(memory, 0x2000, 3)
    assert flags.set(0)
    assert flags.set(77)
    assert not flags.set(77)
    assert flags.set(EVENT_FLAGS - 1)
    page = memory.read(0x2000, 4096)
    assert [i for i in range(4096 * 8) if page[i // 8] >> i % 8 & 1] == [3 * 2048 + f for f in (0, 77, 2047)]
    assert flags.take() == [0, 77, 2047]
    assert flags.take() == []
    assert not any(memory.read(0x2000, 4096))


@pytest.mark.parametrize("flag", [-1, 2048, 1 << 20])
def test_an_event_flag_of_2048_or_more(memory: GuestMemory, flag: int) -> None:
    with pytest.raises(ValueError, match="event flag"):
        EventFlags(memory, 0, 0).set(flag)


def test_synic_pages_must_be_the_guests(memory: GuestMemory) -> None:
    memory.protect(0x3000, 0x1000, READ)
    for kind in (EventFlags, MessageSlot):
        for page in (0x10000, 1 << 60, 0x3000):
            with pytest.raises(GuestMemoryError):
                kind(memory, page, 0)
        with pytest.raises(ValueError, match="SINT"):
            kind(memory, 0x1000, 16)
        with pytest.raises(ValueError, match="SINT"):
            kind(memory, 0x1001, 1)


def test_message_slot(memory: GuestMemory) -> None:
    slot = MessageSlot(memory, 0x1000, 2)
    assert slot.take() is None
    assert slot.post(1, 0x77, b"first")
    assert memory.read(0x1200, 21) == b"\1\0\0\0\5\0\0\0\x77\0\0\0\0\0\0\0first"
    assert not slot.post(1, 0x77, b"second")
    message = slot.take()
    assert message is not None
    assert (message.type, message.sender, message.payload) == (1, 0x77, b"first")
    assert slot.end()  # message-pending: end-of-message is due
    assert slot.post(1, 0, bytes(240))
    assert not slot.end()
    with pytest.raises(ValueError, match="241"):
        slot.post(1, 0, bytes(241))
    with pytest.raises(ValueError, match="type 0"):
        slot.post(0, 0, b"")


def test_doorbell() -> None:
    bell = Doorbell()
    assert not bell.wait(0)
    bell.ring()
    bell.ring()
    assert bell.wait(0)
    assert not bell.wait(0.01)
    threading.Timer(0.02, bell.ring).start()
    assert bell.wait(5)
    assert bell.sleeps == 3


def test_a_wait_for_packets_ends_with_one_and_keeps_the_mask_right() -> None:
    window = Window.allocate(1)
    writer, reader, bell = RingWriter(window), RingReader(window), Doorbell()
    assert not bell.wait(0.01, 0.001, reader)
    assert writer.send(b"x")  # the reader sleeps or left: a signal is due
    assert bell.wait(0, 0, reader)
    reader.recv()
    bell.ring()  # left over: nobody must take it for a packet
    assert not bell.wait(0.01, 0, reader)

    def later() -> None:
        time.sleep(0.02)
        if writer.send(b"x"):
            bell.ring()

    for spin in (0.0, 5.0):
        thread = threading.Thread(target=later)
        thread.start()
        assert bell.wait(5, spin, reader)
        thread.join()
        reader.recv()


def channel() -> tuple[RingWriter, RingReader]:
    window = Window.allocate(2)
    return RingWriter(window), RingReader(window)


def test_the_dispatcher_serves_what_is_marked_in_batches() -> None:
    dispatcher = Dispatcher(100)
    ends = [channel() for _ in range(100)]
    got: dict[int, list[list[Packet]]] = {i: [] for i in range(100)}
    for i, (_, reader) in enumerate(ends):
        dispatcher.add(i, reader, got[i].append, batch=8)
    assert dispatcher.poll() == 0
    for i in (3, 64, 99):
        assert ends[i][0].send_batch([b"x"] * 20) == (20, True)
        dispatcher.signal(i)
    ends[5][0].send(b"not signalled")
    assert dispatcher.wait(0)
    assert dispatcher.poll() == 60
    assert [len(batch) for batch in got[64]] == [8, 8, 4]
    assert got[5] == []
    assert dispatcher.served == 60
    assert not dispatcher.wait(0)
    dispatcher.signal(100)
    dispatcher.signal(-1)
    assert not dispatcher.wait(0)


def test_packets_that_wait_when_a_channel_is_added_are_served() -> None:
    dispatcher = Dispatcher()
    writer, reader = channel()
    writer.send(b"early")
    got: list[Packet] = []
    dispatcher.add(9, reader, got.extend)
    dispatcher.poll()
    assert len(got) == 1
    with pytest.raises(ValueError, match="taken"):
        dispatcher.add(9, reader, got.extend)
    dispatcher.remove(9)
    writer.send(b"late")
    dispatcher.signal(9)
    dispatcher.poll()
    assert len(got) == 1


def test_one_busy_channel_does_not_starve_the_others() -> None:
    dispatcher = Dispatcher()
    busy, quiet = channel(), channel()
    order: list[str] = []

    def greedy(packets: list[Packet]) -> None:
        order.append("busy")
        if len(order) < 1000:
            busy[0].send(b"again")  # there is always one more

    dispatcher.add(0, busy[1], greedy)
    dispatcher.add(1, quiet[1], lambda packets: order.append("quiet"))
    busy[0].send(b"x")
    quiet[0].send(b"x")
    dispatcher.poll()
    assert "quiet" in order
    assert order.count("busy") < 20
    assert dispatcher.wait(0)  # the busy one is still marked


def test_a_corrupt_ring_or_a_failing_handler_costs_only_its_own_channel(
    caplog: pytest.LogCaptureFixture,
) -> None:
    dispatcher = Dispatcher()
    bad, failing, good = channel(), channel(), channel()
    errors: list[Exception] = []
    got: list[Packet] = []

    def fail(packets: list[Packet]) -> None:
        raise KeyError("handler")

    dispatcher.add(0, bad[1], got.extend, on_error=errors.append)
    dispatcher.add(1, failing[1], fail)
    dispatcher.add(2, good[1], got.extend)
    for round_ in range(2):
        for flag, (writer, _) in enumerate((bad, failing, good)):
            if flag == 2 or round_ == 0:
                writer.send(b"x")
            dispatcher.signal(flag)
        bad[1].window.view()[0:4] = b"\x03\0\0\0"
        dispatcher.poll()
    assert [type(e) for e in errors] == [RingCorrupt]
    assert len(got) == 2
    assert "channel 1 was removed" in caplog.text


def test_signals_wake_a_sleeping_dispatcher() -> None:
    dispatcher = Dispatcher()
    writer, reader = channel()
    got: list[Packet] = []
    dispatcher.add(0, reader, got.extend)
    dispatcher.poll()
    total = 300

    def produce() -> None:
        for number in range(total):
            while True:
                count, signal = writer.send_batch([b"x"], number)
                if signal:
                    dispatcher.signal(0)
                if count:
                    break
            if number % 7 == 0:
                time.sleep(0.0005)

    thread = threading.Thread(target=produce)
    thread.start()
    while len(got) < total:
        assert dispatcher.wait(5, spin=0.0001)
        dispatcher.poll()
    thread.join()
    assert [p.transaction_id for p in got] == list(range(total))


@pytest.mark.parametrize("access", [0, READ])
def test_event_flags_on_a_page_that_was_taken(memory: GuestMemory, access: int) -> None:
    """The host's view of a guest's page - an interrupt or monitor page - writes no more than the guest may."""
    flags = EventFlags(memory, 0x2000, 1)
    assert flags.set(5)
    assert flags.set(9)
    memory.protect(0x2000, 4096, access)
    assert not flags.set(6)
    assert not flags.clear(5)
    assert flags.take() == []
    memory.protect(0x2000, 4096, READ | WRITE)
    assert flags.take() == [5, 9]
