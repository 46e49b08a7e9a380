"""Throughput between two processes: a ring in shared memory beside faster-fifo, both in batches of 64 packets.

Both buffers hold 256 KiB. The ring's ends poll for 50 µs and then sleep on an eventfd.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from benchmarks.harness import NO_TARGET, Case, Comparison, Row, Run, faster, rows_of
from benchmarks.link import Descriptor, SharedWindow, Work, two_processes, two_processors
from vmbus.core.dispatch import Doorbell
from vmbus.core.memory import Window
from vmbus.core.ring import RingReader, RingWriter

BATCH = 64
DATA_PAGES = 64
SPIN = 50e-6


def ring_producer(window: Window, to_reader: int, to_writer: int, payload_size: int) -> Work:
    """Sends batches; when the ring is full, asks for a signal at room for a batch and waits."""
    writer, reader_bell, writer_bell = RingWriter(window), Doorbell(to_reader), Doorbell(to_writer)
    payloads = [bytes(payload_size)] * BATCH
    enough = payload_size * BATCH

    def work(count: int) -> int:
        left = count
        while left:
            sent, signal = writer.send_batch(payloads if left >= BATCH else payloads[:left])
            if signal:
                reader_bell.ring()
            left -= sent
            if not sent and not writer.want_space(enough):
                writer_bell.wait(spin=SPIN)
                writer.stop_waiting()
        return count * payload_size

    return work


def ring_consumer(window: Window, to_reader: int, to_writer: int, payload_size: int) -> Work:
    """Takes batches; when the ring is empty, waits: signals are masked while that spins."""
    reader, reader_bell, writer_bell = RingReader(window), Doorbell(to_reader), Doorbell(to_writer)

    def work(count: int) -> int:
        left, seen = count, 0
        while left:
            packets = reader.recv_batch(BATCH)
            if packets:
                if reader.take_signal():
                    writer_bell.ring()
                left -= len(packets)
                seen += len(packets) * len(packets[-1])
            else:
                reader_bell.wait(spin=SPIN, reader=reader)
        return seen

    return work


@contextmanager
def ring(payload_size: int) -> Iterator[Run]:
    window = SharedWindow(DATA_PAGES)
    bells = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    producer = ring_producer(window.map(), *bells, payload_size)
    over_there = (window, *map(Descriptor, bells), payload_size)
    with two_processes(producer, payload_size, ring_consumer, *over_there) as run:
        yield run
    window.close()
    for bell in bells:
        os.close(bell)


def raw(data: Any) -> Any:
    """Instead of pickling."""
    return data


def fifo_consumer(queue: Any, payload_size: int) -> Work:
    """Takes whatever is there, at most a batch at a time."""

    def work(count: int) -> int:
        left, seen = count, 0
        while left:
            packets = queue.get_many(max_messages_to_get=min(BATCH, left))
            left -= len(packets)
            seen += len(packets) * len(packets[-1])
        return seen

    return work


@contextmanager
def faster_fifo(payload_size: int) -> Iterator[Run]:
    import faster_fifo
    import faster_fifo_reduction  # noqa: F401  (teaches multiprocessing to hand the queue over)

    queue = faster_fifo.Queue(max_size_bytes=DATA_PAGES * 4096, loads=raw, dumps=raw)
    payloads = [bytes(payload_size)] * BATCH

    def work(count: int) -> int:
        for done in range(0, count, BATCH):
            queue.put_many(payloads[: count - done])
        return count * payload_size

    with two_processes(work, payload_size, fifo_consumer, queue, payload_size) as run:
        yield run


def _comparison(payload_size: int, label: str, counted: bool) -> Comparison:
    opened: Callable[[Any], Any] = partial(partial, payload_size=payload_size)
    return Comparison(
        f"{label}, lists of {BATCH}",
        Case("ring in shared memory", opened(ring), why_not=two_processors),
        [
            (
                Case("faster-fifo raw put_many/get_many", opened(faster_fifo), needs="faster_fifo"),
                faster(20) if counted else NO_TARGET,
            )
        ],
    )


COMPARISONS = [_comparison(64, "64 B", counted=True), _comparison(1024, "1 KiB", counted=False)]


def rows(quick: bool) -> Iterator[Row]:
    """The rows of throughput between processes."""
    return rows_of(COMPARISONS, quick)
