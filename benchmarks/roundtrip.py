"""Round trips of 64 bytes between two processes on two CPUs: polled beside iceoryx2, sleeping beside a bare eventfd."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import repeat
from typing import Any

from benchmarks.harness import Case, Comparison, Row, Run, at_most_times, faster, rows_of
from benchmarks.link import Descriptor, SharedWindow, Work, two_processes, two_processors
from vmbus.core.memory import Window
from vmbus.core.ring import RingReader, RingWriter

PAYLOAD = bytes(range(64))
DATA_PAGES = 1


def polled_client(outgoing: Window, incoming: Window) -> Work:
    """Sends, then polls for the answer."""
    writer, reader = RingWriter(outgoing), RingReader(incoming)
    reader.mask()
    send, recv_batch = writer.send, reader.recv_batch

    def work(count: int) -> int:
        seen = 0
        for _ in repeat(None, count):
            send(PAYLOAD)
            while not (packets := recv_batch(1)):
                pass
            seen += len(packets[0])
        return seen

    return work


def polled_server(incoming: Window, outgoing: Window) -> Work:
    """Polls, and sends back what came."""
    reader, writer = RingReader(incoming), RingWriter(outgoing)
    reader.mask()
    send, recv_batch = writer.send, reader.recv_batch

    def work(count: int) -> int:
        seen = 0
        for _ in repeat(None, count):
            while not (packets := recv_batch(1)):
                pass
            send(packets[0])
            seen += len(packets[0])
        return seen

    return work


@contextmanager
def ring_polled() -> Iterator[Run]:
    there, back = SharedWindow(DATA_PAGES), SharedWindow(DATA_PAGES)
    with two_processes(
        polled_client(there.map(), back.map()), len(PAYLOAD), polled_server, there, back
    ) as run:
        yield run
    there.close()
    back.close()


@cache
def payload_type() -> type[ctypes.Structure]:
    """What iceoryx2 carries: 64 bytes under a name of its own."""

    class Payload(ctypes.Structure):
        _fields_ = (("data", ctypes.c_uint8 * len(PAYLOAD)),)

        @staticmethod
        def type_name() -> str:
            return "vmbus-benchmark-64"

    return Payload


def iceoryx_ends(name: str, sending: str, receiving: str) -> tuple[Any, Any, Any]:
    """A publisher, a subscriber, and what has to stay alive with them."""
    import iceoryx2

    iceoryx2.set_log_level(iceoryx2.LogLevel.Fatal)
    node = iceoryx2.NodeBuilder.new().create(iceoryx2.ServiceType.Ipc)

    def service(direction: str) -> Any:
        full_name = iceoryx2.ServiceName.new(f"{name}/{direction}")
        return node.service_builder(full_name).publish_subscribe(payload_type()).open_or_create()

    outgoing, incoming = service(sending), service(receiving)
    return (
        outgoing.publisher_builder().create(),
        incoming.subscriber_builder().create(),
        (node, outgoing, incoming),
    )


def iceoryx_client(name: str) -> Work:
    """Sends by its loan path, the fastest public one, and polls for the answer."""
    publisher, subscriber, alive = iceoryx_ends(name, "there", "back")
    loan, receive, size = publisher.loan_uninit, subscriber.receive, len(PAYLOAD)

    def work(count: int, _alive: object = alive) -> int:
        seen = 0
        for _ in repeat(None, count):
            sample = loan()
            ctypes.memmove(sample.payload_ptr, PAYLOAD, size)
            sample.assume_init().send()
            while (answer := receive()) is None:
                pass
            seen += len(ctypes.string_at(answer.payload_ptr, size))
            answer.delete()
        return seen

    return work


def iceoryx_server(name: str) -> Work:
    """Polls, and sends back what came."""
    publisher, subscriber, alive = iceoryx_ends(name, "back", "there")
    loan, receive, size = publisher.loan_uninit, subscriber.receive, len(PAYLOAD)

    def work(count: int, _alive: object = alive) -> int:
        seen = 0
        for _ in repeat(None, count):
            while (request := receive()) is None:
                pass
            data = ctypes.string_at(request.payload_ptr, size)
            request.delete()
            sample = loan()
            ctypes.memmove(sample.payload_ptr, data, size)
            sample.assume_init().send()
            seen += len(data)
        return seen

    return work


@contextmanager
def iceoryx() -> Iterator[Run]:
    name = f"vmbus-benchmark-{os.getpid()}-{os.urandom(4).hex()}"
    with two_processes(iceoryx_client(name), len(PAYLOAD), iceoryx_server, name) as run:
        yield run


def sleeping_client(outgoing: Window, incoming: Window, to_server: int, to_client: int) -> Work:
    """Sends, rings when the ring says so, and sleeps until it is rung."""
    writer, reader = RingWriter(outgoing), RingReader(incoming)
    send, recv = writer.send, reader.recv
    ring_bell, wait = os.eventfd_write, os.eventfd_read

    def work(count: int) -> int:
        seen = 0
        for _ in repeat(None, count):
            if send(PAYLOAD):
                ring_bell(to_server, 1)
            wait(to_client)
            seen += len(recv())
        return seen

    return work


def sleeping_server(incoming: Window, outgoing: Window, to_server: int, to_client: int) -> Work:
    """Sleeps until it is rung, and sends back what came."""
    reader, writer = RingReader(incoming), RingWriter(outgoing)
    send, recv = writer.send, reader.recv
    ring_bell, wait = os.eventfd_write, os.eventfd_read

    def work(count: int) -> int:
        seen = 0
        for _ in repeat(None, count):
            wait(to_server)
            data = recv()
            if send(data):
                ring_bell(to_client, 1)
            seen += len(data)
        return seen

    return work


@contextmanager
def ring_sleeping() -> Iterator[Run]:
    there, back = SharedWindow(DATA_PAGES), SharedWindow(DATA_PAGES)
    bells = [os.eventfd(0), os.eventfd(0)]
    client = sleeping_client(there.map(), back.map(), *bells)
    with two_processes(client, len(PAYLOAD), sleeping_server, there, back, *map(Descriptor, bells)) as run:
        yield run
    there.close()
    back.close()
    for bell in bells:
        os.close(bell)


def bare_client(to_server: int, to_client: int) -> Work:
    """Nothing but the two signals."""
    ring_bell, wait = os.eventfd_write, os.eventfd_read

    def work(count: int) -> int:
        for _ in repeat(None, count):
            ring_bell(to_server, 1)
            wait(to_client)
        return count * len(PAYLOAD)

    return work


def bare_server(to_server: int, to_client: int) -> Work:
    """Nothing but the two signals."""
    ring_bell, wait = os.eventfd_write, os.eventfd_read

    def work(count: int) -> int:
        for _ in repeat(None, count):
            wait(to_server)
            ring_bell(to_client, 1)
        return count * len(PAYLOAD)

    return work


@contextmanager
def bare_eventfd() -> Iterator[Run]:
    bells = [os.eventfd(0), os.eventfd(0)]
    with two_processes(bare_client(*bells), len(PAYLOAD), bare_server, *map(Descriptor, bells)) as run:
        yield run
    for bell in bells:
        os.close(bell)


COMPARISONS = [
    Comparison(
        "round trip of 64 B, polled",
        Case("two rings in shared memory", ring_polled, why_not=two_processors),
        [(Case("iceoryx2 publish/subscribe", iceoryx, needs="iceoryx2", why_not=two_processors), faster(3))],
    ),
    Comparison(
        "round trip of 64 B, sleeping on eventfds",
        Case("two rings + eventfds", ring_sleeping),
        [(Case("bare eventfd, no data", bare_eventfd), at_most_times(1.35))],
    ),
]


def rows(quick: bool) -> Iterator[Row]:
    """The rows of round trips."""
    return rows_of(COMPARISONS, quick)
