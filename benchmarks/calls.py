"""One `send` and one `recv` a packet, from Python, on one thread: the per-call API beside pipes and queues."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from queue import SimpleQueue

from benchmarks.harness import SHORT, Case, Comparison, Row, Run, at_most_times, faster, rows_of, timed
from vmbus.core.memory import Window
from vmbus.core.ring import RingReader, RingWriter

PAYLOAD = bytes(range(64))
DATA_PAGES = 16


def put_get(put: Callable[[bytes], object], get: Callable[[], object]) -> Run:
    """Times pairs of calls, after making sure once that what goes in comes out."""
    put(PAYLOAD)
    if get() != PAYLOAD:
        raise AssertionError("the payload came back different")

    def work(count: int) -> None:
        payload = PAYLOAD
        for _ in repeat(None, count):
            put(payload)
            get()

    return timed(work)


@contextmanager
def ring() -> Iterator[Run]:
    window = Window.allocate(DATA_PAGES)
    yield put_get(RingWriter(window).send, RingReader(window).recv)


@contextmanager
def os_pipe() -> Iterator[Run]:
    receiving, sending = os.pipe()
    size = len(PAYLOAD)
    yield put_get(lambda data: os.write(sending, data), lambda: os.read(receiving, size))
    os.close(receiving)
    os.close(sending)


@contextmanager
def mp_pipe() -> Iterator[Run]:
    receiving, sending = multiprocessing.Pipe(duplex=False)
    with receiving, sending:
        yield put_get(sending.send_bytes, receiving.recv_bytes)


@contextmanager
def zmq_inproc() -> Iterator[Run]:
    import zmq

    with zmq.Context() as context, context.socket(zmq.PAIR) as receiving, context.socket(zmq.PAIR) as sending:
        receiving.bind("inproc://calls")
        sending.connect("inproc://calls")
        yield put_get(sending.send, receiving.recv)


@contextmanager
def simple_queue() -> Iterator[Run]:
    queue: SimpleQueue[bytes] = SimpleQueue()
    yield put_get(queue.put, queue.get)


COMPARISONS = [
    Comparison(
        "64 B: send, recv → bytes",
        Case("ring", ring),
        [
            (Case("os.pipe", os_pipe), faster(8)),
            (Case("multiprocessing.Pipe", mp_pipe), faster(20)),
            (Case("pyzmq inproc", zmq_inproc, needs="zmq"), faster(3)),
            (Case("queue.SimpleQueue", simple_queue), at_most_times(2)),
        ],
        rounds=SHORT,
    )
]


def rows(quick: bool) -> Iterator[Row]:
    """The per-call rows."""
    return rows_of(COMPARISONS, quick)
