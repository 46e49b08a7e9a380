"""Batches of packets from Python on one thread: lists of bytes and numpy arrays, 64 KiB ring."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

from benchmarks.harness import (
    NO_TARGET,
    SHORT,
    Case,
    Comparison,
    Row,
    Run,
    Target,
    at_most_ns,
    rows_of,
    timed,
)
from benchmarks.nogil_ring import loop
from benchmarks.processes import raw
from vmbus.core.memory import Window
from vmbus.core.ring import RingReader, RingWriter

DATA_PAGES = 16
LARGEST_BATCH = 32
DESCRIPTOR_AND_TRAILER = 24


def batch_size(payload_size: int) -> int:
    """32 packets, or as many as fit the ring (one byte of it always stays free)."""
    return min(LARGEST_BATCH, (DATA_PAGES * 4096 - 1) // (payload_size + DESCRIPTOR_AND_TRAILER))


@contextmanager
def lists(payload_size: int) -> Iterator[Run]:
    window = Window.allocate(DATA_PAGES)
    send_batch, recv_batch = RingWriter(window).send_batch, RingReader(window).recv_batch
    batch = batch_size(payload_size)
    different = [bytes([number]) * payload_size for number in range(batch)]
    send_batch(different)
    if recv_batch(batch) != different:
        raise AssertionError("the packets came back different")
    payloads = [bytes(payload_size)] * batch  # one object, as the peers have it

    def work(count: int) -> None:
        for _ in range(0, count, batch):
            send_batch(payloads)
            recv_batch(batch)

    yield rounded(work, batch)


@contextmanager
def arrays(payload_size: int) -> Iterator[Run]:
    window = Window.allocate(DATA_PAGES)
    send_batch, recv_into = RingWriter(window).send_batch, RingReader(window).recv_into
    batch = batch_size(payload_size)
    payloads = np.arange(batch * payload_size, dtype=np.uint8).reshape(batch, payload_size)
    received = np.zeros_like(payloads)
    send_batch(payloads)
    if recv_into(received) != batch or not np.array_equal(received, payloads):
        raise AssertionError("the packets came back different")

    def work(count: int) -> None:
        for _ in range(0, count, batch):
            send_batch(payloads)
            recv_into(received)

    yield rounded(work, batch)


@contextmanager
def copies(payload_size: int) -> Iterator[Run]:
    """The floor for lists: one copy into a bytearray and one new `bytes` a packet, by the interpreter's own means."""
    batch = batch_size(payload_size)
    payloads = [bytes(payload_size)] * batch

    def work(count: int) -> None:
        for _ in range(0, count, batch):
            joined = memoryview(b"".join(payloads))
            [bytes(joined[at : at + payload_size]) for at in range(0, len(joined), payload_size)]

    yield rounded(work, batch)


@contextmanager
def row_copies(payload_size: int) -> Iterator[Run]:
    """The same for arrays: numpy copies the rows to where packets would hold them, and back."""
    batch = batch_size(payload_size)
    payloads = np.zeros((batch, payload_size), dtype=np.uint8)
    received = np.zeros_like(payloads)
    held = np.zeros((batch, payload_size + DESCRIPTOR_AND_TRAILER), dtype=np.uint8)[:, 16 : 16 + payload_size]

    def work(count: int) -> None:
        for _ in range(0, count, batch):
            held[:] = payloads
            received[:] = held

    yield rounded(work, batch)


@contextmanager
def faster_fifo(payload_size: int) -> Iterator[Run]:
    from faster_fifo import Queue

    batch = batch_size(payload_size)
    queue = Queue(max_size_bytes=DATA_PAGES * 4096 * 2, loads=raw, dumps=raw)
    payloads = [bytes(payload_size)] * batch

    def work(count: int) -> None:
        for _ in range(0, count, batch):
            queue.put_many(payloads)
            left = batch
            while left:  # its read buffer grows on demand, so the first calls may bring fewer
                left -= len(queue.get_many(max_messages_to_get=left))

    yield rounded(work, batch)


def rounded(work: Callable[[int], object], batch: int) -> Run:
    """Whole batches only: a count is rounded up for the work, and the time scaled back."""
    once = timed(work)

    def run(count: int) -> float:
        done = -(-count // batch) * batch
        return once(done) * count / done

    return run


def _comparisons(payload_size: int, label: str, target: Target) -> Iterator[Comparison]:
    batch = batch_size(payload_size)
    memcpy = Case("memcpy of the same bytes, in C", partial(loop, "copies_only", payload_size, batch))
    fifo = Case("faster-fifo raw", partial(faster_fifo, payload_size), needs="faster_fifo")
    joined = Case("bytes joined and cut again", partial(copies, payload_size))
    rows = Case("numpy copies the rows, in and out", partial(row_copies, payload_size))
    for kind, ours, floor in (("lists", lists, joined), ("numpy arrays", arrays, rows)):
        yield Comparison(
            f"{label}, {kind} of {batch}",
            Case("ring", partial(ours, payload_size)),
            [(memcpy, target), (floor, NO_TARGET), (fifo, NO_TARGET)],
            rounds=SHORT,
        )


COMPARISONS = [
    *_comparisons(64, "64 B", at_most_ns(35)),
    *_comparisons(1024, "1 KiB", at_most_ns(90)),
    *_comparisons(4096, "4 KiB", at_most_ns(180)),
]


def rows(quick: bool) -> Iterator[Row]:
    """The rows of batches on one thread."""
    return rows_of(COMPARISONS, quick)
