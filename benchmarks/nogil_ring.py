"""The ring's C functions in a loop without the GIL (`ringloop.pyx`), beside memcpy of the same bytes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from benchmarks.harness import SHORT, Case, Comparison, Row, Run, Target, at_most_ns, at_most_times, rows_of
from benchmarks.native import compiled
from vmbus.core.memory import Window

DATA_PAGES = 16
FILL_4K = 15  # packets of 4 KiB that fit 64 KiB with their headers


@contextmanager
def loop(function: str, length: int, batch: int) -> Iterator[Run]:
    """One of the loops of ``ringloop.pyx`` on a window of its own; whole batches, times scaled to the count."""
    work: Callable[[Window, int, int, int], tuple[float, int]] = getattr(compiled("ringloop"), function)
    window = Window.allocate(DATA_PAGES)

    def run(count: int) -> float:
        batches = -(-count // batch)
        took, checksum = work(window, length, batch, batches)
        if checksum != 2 * sum(number % 8 + 1 for number in range(batches)):
            raise AssertionError("the packets came back different")
        return took * count / (batches * batch)

    yield run


def _comparison(what: str, length: int, batch: int, target: Target) -> Comparison:
    return Comparison(
        what,
        Case("ring", partial(loop, "through_ring", length, batch)),
        [(Case("memcpy of the same bytes", partial(loop, "copies_only", length, batch)), target)],
        rounds=SHORT,
    )


COMPARISONS = [
    _comparison("64 B, publish each", 64, 1, at_most_ns(24)),
    _comparison("64 B, batches of 32", 64, 32, at_most_ns(14)),
    _comparison("1 KiB, batches of 32", 1024, 32, Target("")),
    _comparison(f"4 KiB, batches of {FILL_4K} (fill)", 4096, FILL_4K, at_most_times(1.25)),
]


def rows(quick: bool) -> Iterator[Row]:
    """The rows of the ring in nogil code."""
    return rows_of(COMPARISONS, quick)
