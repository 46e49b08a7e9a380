"""Messages of a bus that wait for a guest to make room."""

import threading

from reference.raw_guest import RawGuest

from vmbus.bus import Inline
from vmbus.bus.actions import Send
from vmbus.bus.outbox import Outbox
from vmbus.errors import HypercallError
from vmbus.hypervisor import Hypervisor, VirtualClock

OTHER = 5  # a message type that is not the bus's


def test_messages_for_several_processors_come_in_order_however_the_guest_reads() -> None:
    """A reserved channel is answered on the processor that it names, which may not be the connection's."""
    with Hypervisor(clock=VirtualClock()) as hv:
        child = hv.create_child(hv.create_root(), "c", memory_size=1 << 20, vps=2)
        guests = [RawGuest(vp, base=0x10000 * vp.index) for vp in child.vps]
        outbox = Outbox(hv, child, threading.RLock(), Inline(), is_read=lambda *_: True, on_room=lambda: None)
        for vp in (0, 1):
            fill(hv, child, vp)
        for vp in (0, 1):
            outbox.send(Send(bytes([vp]) * 8, vp, 2))
        assert child.meter.backlog.used == 2
        assert [drain(guest) for guest in guests] == [[bytes([vp]) * 8] for vp in (0, 1)]
        assert child.meter.backlog.used == 0


def fill(hv, child, vp):
    """Take all the room that there is for messages to a processor."""
    try:
        while True:
            hv.post_message(child, vp, 2, OTHER, 0, b"")
    except HypercallError:
        pass


def drain(guest):
    """Read everything; the bus's messages."""
    found = []
    while (message := guest.take_message(2)) is not None:
        if message[0] != OTHER:
            found.append(message[2])
    return found
