"""Round trips of 64 bytes between two processes on two CPUs: polled beside iceoryx2, sleeping beside a bare eventfd."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import repeat
from typing import Any

from benchmarks.harness import Case, Comparison, Row, Run, at_most_times, faster, rows_of
from benchmarks.link import Descriptor, SharedWindow, Work, two_processes, two_processors
from vmbus.core.dispatch import Doorbell
from vmbus.core.memory import Window
from vmbus.core.ring import RingReader, RingWriter

PAYLOAD = bytes(range(64))
DATA_PAGES = 1
POLL_SECONDS = 1.0


def ring_client(outgoing: Window, incoming: Window, to_server: int, to_client: int, spin: float) -> Work:
    """Sends, rings when the ring says so, and waits for the answer."""
    writer, reader = RingWriter(outgoing), RingReader(incoming)
    server_bell, client_bell = Doorbell(to_server), Doorbell(to_client)
    send, recv, wait = writer.send, reader.recv, client_bell.wait

    def work(count: int) -> int:
        seen = 0
        for _ in repeat(None, count):
            if send(PAYLOAD):
                server_bell.ring()
            wait(None, spin, reader)
            seen += len(recv())
        return seen

    return work


def ring_server(incoming: Window, outgoing: Window, to_server: int, to_client: int, spin: float) -> Work:
    """Waits, and sends back what came."""
    reader, writer = RingReader(incoming), RingWriter(outgoing)
    server_bell, client_bell = Doorbell(to_server), Doorbell(to_client)
    send, recv, wait = writer.send, reader.recv, server_bell.wait

    def work(count: int) -> int:
        seen = 0
        for _ in repeat(None, count):
            wait(None, spin, reader)
            data = recv()
            if send(data):
                client_bell.ring()
            seen += len(data)
        return seen

    return work


@contextmanager
def rings(spin: float) -> Iterator[Run]:
    there, back = SharedWindow(DATA_PAGES), SharedWindow(DATA_PAGES)
    bells = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    client = ring_client(there.map(), back.map(), *bells, spin)
    over_there = (there, back, *map(Descriptor, bells), spin)
    with two_processes(client, len(PAYLOAD), ring_server, *over_there) as run:
        yield run
    there.close()
    back.close()
    for bell in bells:
        os.close(bell)


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
        "64 B and back, polled",
        Case("two rings in shared memory", partial(rings, POLL_SECONDS), why_not=two_processors),
        [(Case("iceoryx2 publish/subscribe", iceoryx, needs="iceoryx2", why_not=two_processors), faster(3))],
    ),
    Comparison(
        "64 B and back, sleeping on eventfds",
        Case("two rings + eventfds", partial(rings, 0.0)),
        [(Case("bare eventfd, no data", bare_eventfd), at_most_times(1.35))],
    ),
]


def rows(quick: bool) -> Iterator[Row]:
    """The rows of round trips."""
    return rows_of(COMPARISONS, quick)
