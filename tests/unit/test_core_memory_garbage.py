"""Compiled objects that end as part of a reference cycle.

The garbage collector clears what the objects of a cycle refer to before it ends them. A destructor that still counts
down in what it referred to then has None in its hands, and None is no memory: the count next to it, of which CPython
keeps the name of None's type, was changed instead.
"""

import gc
from collections.abc import Callable

import pytest

from vmbus.core import netio
from vmbus.core.blockio import BlockServer
from vmbus.core.dispatch import EventFlags, MessageSlot
from vmbus.core.memory import GuestMemory, Window
from vmbus.core.ring import RingReader, RingWriter
from vmbus.core.x86 import Cpu

Held = tuple[GuestMemory, Window, Window]
Maker = Callable[[GuestMemory, Window, Window], object]


def host_queue(_: GuestMemory, ring: Window, buffer: Window) -> object:
    pool = netio.ReceivePool(Window.allocate(8), 2048, 8)
    queue = netio.HostQueue(RingReader(ring), RingWriter(ring), pool, 0, 0xCAFE, bytes(32), bytes(32))
    queue.use_send_buffer(buffer, 4096, 4)
    return queue


def guest_queue(_: GuestMemory, ring: Window, buffer: Window) -> object:
    pool = netio.SendPool(Window.allocate(8), 4096, 8)
    return netio.GuestQueue(RingReader(ring), RingWriter(ring), pool, buffer, 2048, 8, 0xCAFE, 32, 8, 8)


def reader_with_a_view(_: GuestMemory, ring: Window, __: Window) -> object:
    reader = RingReader(ring)
    RingWriter(ring).send(b"packet")
    list(reader.packets())
    return reader


MAKERS: dict[str, Maker] = {
    "HostQueue": host_queue,
    "GuestQueue": guest_queue,
    "RingReader": reader_with_a_view,
    "RingWriter": lambda _, ring, __: RingWriter(ring),
    "SendPool": lambda _, __, buffer: netio.SendPool(buffer, 4096, 4),
    "BlockServer": lambda memory, ring, _: BlockServer(RingReader(ring), RingWriter(ring), memory),
    "EventFlags": lambda memory, _, __: EventFlags(memory, 0, 2),
    "MessageSlot": lambda memory, _, __: MessageSlot(memory, 0, 2),
    "Cpu": lambda memory, _, __: Cpu(memory),
}


class Holder:
    """A Python object that refers to itself and to what is to end with it."""

    def __init__(self, thing: object) -> None:
        self.itself = self
        self.thing = thing


@pytest.mark.parametrize("name", MAKERS)
def test_the_end_of_a_cycle_counts_down_what_it_held_and_nothing_else(name: str) -> None:
    held: Held = GuestMemory(1 << 20), Window.allocate(4), Window.allocate(4)
    for _ in range(10):
        Holder(MAKERS[name](*held))
    gc.collect()
    assert type(None).__name__ == "NoneType"
    for thing in held:
        thing.close()  # BufferError if somebody still counted as a user
